"""Why devices fail, kept for the operator, bounded however hard somebody knocks.

    note(…) ──► log line ──► known tenant: counted under (device, kind, reason, transport) ──► event row
                         └─► no tenant, but a device is named: the same, and its tenant is looked up with the writing

The first refusal of a key is written soon; repetitions within `HOLD_SECONDS` are only counted and written together
with the count, the last peer and the last correlation ids. So a device that knocks a thousand times a second costs six
rows a minute. At most `MAX_KEYS` keys of known tenants are held, and `MAX_ROWS` rows written at a time; what exceeds
that is counted in `dropped` and still logged. A refusal of nobody known has no tenant: it is logged and counted only.

A peer may say which device it is and prove nothing (MQTT's user name, with a key that is nobody's). Whether there is
such a device is asked behind the answer, of all that wait in one query, so that no answer can tell. What names no
device is dropped then; it has places of its own, `MAX_NAMED`, so that invented names take none from what is known.

More is noted while a row is being written, of the same key too. So what is written is taken out first, in one turn of
the loop, and put back if it could not be written: each refusal is in one row, and what was noted since is the next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from registry.errors import Unavailable
from registry.events import EventKind, NewEvent
from registry.feed import Feed
from registry.model import Actor, Contact, DeviceId, TenantId, Transport
from registry.observation import NOBODY, AuthOutcome, Observer
from registry.storage import admission, events
from registry.storage.database import Database

log = logging.getLogger(__name__)

HOLD_SECONDS = 10.0
"""Repetitions of one refusal within this time become one row."""
MAX_KEYS = 4096
MAX_NAMED = 512
MAX_ROWS = 256
_FLUSH_SECONDS = 0.1
_CORRELATIONS_KEPT = 5
_LOG_LINES_PER_SECOND = 50


class _Key(NamedTuple):
    tenant_id: TenantId | None
    device_id: DeviceId | None
    kind: EventKind
    reason: str
    transport: Transport


@dataclass(slots=True)
class _Held:
    count: int = 0
    last_written: float = float("-inf")
    peer: str = ""
    correlation_ids: list[str] = field(default_factory=list)
    """The last of those that are counted; there is at least one as long as `count` is not zero."""
    detail: Mapping[str, str] = field(default_factory=dict)

    def note(self, contact: Contact, detail: Mapping[str, str]) -> None:
        self.count += 1
        self.peer = contact.peer
        self.correlation_ids = [*self.correlation_ids, contact.correlation_id][-_CORRELATIONS_KEPT:]
        self.detail = detail

    def take(self) -> tuple[int, list[str]]:
        taken = self.count, self.correlation_ids
        self.count, self.correlation_ids = 0, []
        return taken

    def put_back(self, count: int, correlation_ids: list[str]) -> None:
        self.count += count
        self.correlation_ids = [*correlation_ids, *self.correlation_ids][-_CORRELATIONS_KEPT:]


class Refusals:
    """Collects refusals and writes them behind (ports.RefusalLog)."""

    def __init__(self, database: Database, feed: Feed, *, observer: Observer = NOBODY) -> None:
        self._database = database
        self._observer = observer
        self._feed = feed
        self._held: dict[_Key, _Held] = {}
        self._named = 0
        """How many of them name a device without its tenant."""
        self._writing = asyncio.Lock()
        self._log_window = 0.0
        self._logged = 0
        self.dropped = 0

    def note(
        self,
        *,
        tenant_id: TenantId | None,
        device_id: DeviceId | None,
        kind: EventKind,
        reason: str,
        contact: Contact,
        detail: Mapping[str, str],
    ) -> None:
        """Remember one refusal. Never raises, never waits. `reason` is one of the program's own texts.

        A `device_id` without `tenant_id` is what the peer says it is.
        """
        if kind is EventKind.AUTH_REFUSED:
            self._observer.auth_attempted(contact.transport, AuthOutcome.REFUSED)
        self._log(tenant_id, device_id, kind, reason, contact)
        if tenant_id is None and device_id is None:
            return
        key = _Key(tenant_id, device_id, kind, reason, contact.transport)
        held = self._held.get(key)
        if held is None:
            full = self._named >= MAX_NAMED if tenant_id is None else len(self._held) - self._named >= MAX_KEYS
            if full:
                self.dropped += 1
                return
            held = self._held[key] = _Held()
            self._named += tenant_id is None
        held.note(contact, detail)

    async def run(self) -> None:
        """Write behind for ever."""
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            try:
                await self.flush()
            except Unavailable:
                continue  # still held; written when the database is back

    async def flush_all(self) -> None:
        """Write everything that is held, whether due or not: the process is about to end. Raises Unavailable."""
        while True:
            await self.flush(everything=True)  # at least once: another one may be under way, and fail
            if not any(held.count for held in self._held.values()):
                return

    async def flush(self, *, device_id: DeviceId | None = None, everything: bool = False) -> None:
        """Write what is due; all of one device's at once if it is named. Raises Unavailable, and then loses nothing."""
        async with self._writing:
            await asyncio.sleep(0)  # for what is being noted in this turn of the loop (resolver.py, `offer`)
            now = asyncio.get_running_loop().time()
            for key in [k for k, h in self._held.items() if not h.count and now - h.last_written > HOLD_SECONDS]:
                self._forget(key)
            due = [
                (key, held)
                for key, held in self._held.items()
                if held.count
                and (
                    everything
                    or now - held.last_written > HOLD_SECONDS
                    or (device_id is not None and key.device_id == device_id)
                )
            ]
            due.sort(key=lambda each: each[0].device_id != device_id)  # whose timeline is being read comes first
            if due and await self._write(due[:MAX_ROWS], now):
                self._feed.hint()

    async def _write(self, due: list[tuple[_Key, _Held]], now: float) -> bool:
        """Write a row for each, but for those that name no device; whether there was any. Raises Unavailable."""
        named = [key.device_id for key, _ in due if key.tenant_id is None and key.device_id is not None]
        async with self._database.connection() as connection:
            tenants = await admission.tenants_of(connection, named) if named else {}
            writing: list[tuple[_Held, NewEvent]] = []
            for key, held in due:
                tenant_id = _tenant(key, tenants)
                if tenant_id is None:
                    self._forget(key)  # there is no such device
                else:
                    writing.append((held, _event(key, held, tenant_id)))
            if not writing:
                return False
            try:
                await events.insert_many(connection, [event for _, event in writing])
            except BaseException:
                for held, event in writing:
                    held.put_back(event.data["count"], event.data["correlation_ids"])
                raise
        for held, _ in writing:
            held.last_written = now
        return True

    def _forget(self, key: _Key) -> None:
        del self._held[key]
        self._named -= key.tenant_id is None

    def _log(
        self, tenant_id: TenantId | None, device_id: DeviceId | None, kind: EventKind, reason: str, contact: Contact
    ) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._log_window >= 1:
            self._log_window, self._logged = now, 0
        self._logged += 1
        if self._logged > _LOG_LINES_PER_SECOND:
            return
        fields = {
            "tenant": str(tenant_id) if tenant_id else None,
            "device": str(device_id) if device_id else None,
            "transport": contact.transport.value,
            "peer": contact.peer,
            "reason": reason,
            "correlation_id": contact.correlation_id,
        }
        log.info(kind.value, extra={"fields": fields})


def _tenant(key: _Key, tenants: Mapping[DeviceId, TenantId]) -> TenantId | None:
    if key.tenant_id is not None or key.device_id is None:
        return key.tenant_id
    return tenants.get(key.device_id)


def _event(key: _Key, held: _Held, tenant_id: TenantId) -> NewEvent:
    """Takes out of `held` what it tells of."""
    count, correlation_ids = held.take()
    return NewEvent(
        key.kind,
        tenant_id,
        Actor("system:admission", correlation_ids[-1]),
        device_id=key.device_id,
        data={
            **held.detail,
            "reason": key.reason,
            "transport": key.transport.value,
            "peer": held.peer,
            "count": count,
            "correlation_ids": correlation_ids,
        },
    )
