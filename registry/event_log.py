"""Events and audit rows as operators read them: by cursor, as a stream, and as one device's timeline.

A stream is its own reader: it waits until the feed has seen something of the tenant, then reads from its own position.
So a slow reader loses nothing and holds nothing, and a reader that comes back with its last position goes on from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from registry.errors import InvalidArgument
from registry.events import START, Event, Position
from registry.feed import Feed
from registry.model import DeviceId, Json, TenantId
from registry.paging import Listing, Page, decode_cursor, encode_cursor
from registry.refusals import Refusals
from registry.storage import audit, events
from registry.storage.database import Database

_STREAM_SLICE = 500
_RECHECK_SECONDS = 5.0
"""A stream looks by itself this often, in case its wake-up was lost."""


@dataclass(frozen=True, slots=True)
class AuditRow:
    """Who changed what."""

    at: datetime
    actor: str
    action: str
    object_type: str
    object_id: str
    correlation_id: str
    detail: Mapping[str, Json]


class EventLog:
    """Reads what was recorded; writes nothing."""

    def __init__(self, database: Database, feed: Feed, refusals: Refusals) -> None:
        self._database = database
        self._feed = feed
        self._refusals = refusals

    async def list(self, tenant_id: TenantId, after: str | None, limit: int) -> Listing[Event]:
        """Events after a position (the `cursor` of an earlier event), oldest first; no `next_cursor` at the end."""
        position = parse_position(after)
        async with self._database.connection() as connection:
            found = await events.read_tenant(connection, tenant_id, position, limit + 1)
        more = len(found) > limit
        found = found[:limit]
        return Listing(found, str(found[-1].position) if more else None)

    async def stream(self, tenant_id: TenantId, after: str | None) -> AsyncIterator[Sequence[Event]]:
        """Slices of events after a position (None: from now on) for ever, oldest first, each event once."""
        position = self._feed.cursor if after is None else parse_position(after)
        while True:
            changed = self._feed.changed(tenant_id)
            async with self._database.connection() as connection:
                found = await events.read_tenant(connection, tenant_id, position, _STREAM_SLICE)
            if found:
                position = found[-1].position
                yield found
                continue
            try:
                async with asyncio.timeout(_RECHECK_SECONDS):
                    await changed.wait()
            except TimeoutError:
                continue

    async def timeline(self, tenant_id: TenantId, device_id: DeviceId, page: Page) -> Listing[Event]:
        """What happened to one device, newest first, refusals and their exact reasons included."""
        await self._refusals.flush(device_id=device_id)
        before = Position(*decode_cursor(page.cursor, int, int)) if page.cursor else None
        async with self._database.connection() as connection:
            found = await events.read_device(connection, tenant_id, device_id, before, page.limit + 1)
        more = len(found) > page.limit
        found = found[: page.limit]
        return Listing(found, encode_cursor(found[-1].position.xid, found[-1].position.seq) if more else None)

    async def audit(self, tenant_id: TenantId, page: Page) -> Listing[AuditRow]:
        """Changes of a tenant, newest first."""
        before = decode_cursor(page.cursor, int)[0] if page.cursor else None
        async with self._database.connection() as connection:
            rows = await audit.read(connection, tenant_id, before, page.limit + 1)
        more = len(rows) > page.limit
        rows = rows[: page.limit]
        items = [AuditRow(**{k: v for k, v in row.items() if k != "seq"}) for row in rows]
        return Listing(items, encode_cursor(rows[-1]["seq"]) if more else None)


def parse_position(text: str | None) -> Position:
    """The position a reader gave; None is the beginning. Raises InvalidArgument."""
    if text is None:
        return START
    try:
        return Position.parse(text)
    except ValueError:
        raise InvalidArgument("after is not a cursor of this server's events", field="after") from None
