"""Uplinks: stored in groups, acknowledged after the commit, found again.

    NewUplink ──submit──► queue ──► batch ──insert──┬─ committed ───────────► StoredUplink
                 │ full                             ├─ some had lost ───────► looked up: StoredUplink(duplicate=True)
                 ▼                                  ├─ a row was refused ───► halves, until the culprit is alone
            Unavailable                             ├─ no partition ────────► made, again
                                                    ├─ rolled back ─────────► again
                                                    └─ outcome open ────────► with an id: again; else Unavailable

Invariants
- A future that resolves to a `StoredUplink` means that its transaction is committed (DESIGN, an acknowledgement means
  stored). The opposite does not hold: `Unavailable` means that nobody knows, and the sender repeats.
- (device_id, message_id) is stored once, whichever node, batch or day it comes in. The first one wins, whatever its
  content; the others get its id and `duplicate=True`. Keys are forgotten together with the uplinks (retention).
- The QoS 2 packet id of a stored session that an uplink came under (`origin`) is stored in its transaction, and only
  by the session's present owner: a repeated PUBLISH finds it, whatever was killed in between.
- One uplink cannot harm another: payloads are checked before they are queued, and a refused batch is split.

What can race: the same key in one batch (the first submitted wins), on two nodes (PostgreSQL lets the second wait for
the first), and with the retention that deletes it (it is then stored again). What can be lost: nothing acknowledged.
A repeated try keeps the ids of the first, so a commit whose answer was lost is recognised as our own.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import msgspec
from asyncpg import Record

from registry.batching import Batcher
from registry.errors import InvalidArgument, RegistryError, Unavailable
from registry.messaging_values import SessionLost
from registry.model import DeviceId, TenantId, Transport, UplinkId
from registry.paging import Listing, Page, decode_cursor, listing
from registry.payloads import NewUplink
from registry.storage import uplinks as storage
from registry.storage.commits import certain_transaction
from registry.storage.database import Database
from registry.storage.uplinks import BEGINNING, END, LAST_UUID, Received, Row, Window
from registry.telemetry import Value

RETRY_PAUSES = (0.05, 0.2, 0.5, 1.0)
"""Seconds before each further try of what may be tried again. A PostgreSQL that restarts is back within these."""
RETRY_SECONDS = 5.0
"""No further try begins this long after the batch began: its senders are about to give up and to repeat."""
_ROW_WEIGHT = 300
_READING_WEIGHT = 150
"""Bytes that an uplink and a reading take in the queue beside the payload, roughly."""


@dataclass(frozen=True, slots=True)
class UplinkLimits:
    """How much may wait, and how much one statement may hold."""

    queue: int = 10_000
    """Uplinks waiting."""
    queue_bytes: int = 64 * 1024 * 1024
    """The same in bytes."""
    batch: int = 1000
    """Uplinks in one statement: at the plateau of the throughput, and a few tens of milliseconds at most."""
    batch_bytes: int = 4 * 1024 * 1024
    """The same in bytes; one larger uplink goes alone."""
    runners: int = 2
    """Batches under way at once. The rate is the same with one; the second goes on while the first waits for a message
    id that another node is storing, or to try again."""


class StoredUplink(msgspec.Struct, frozen=True, gc=False):
    """The answer to an uplink: it is committed. `duplicate`: it was already there, under this id."""

    uplink_id: UplinkId
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Uplink:
    """A stored uplink as it is shown."""

    uplink_id: UplinkId
    kind: str
    payload: str
    """The sender's JSON text, unchanged."""
    message_id: str | None
    observed_at: datetime | None
    received_at: datetime
    transport: Transport
    via: DeviceId | None


@dataclass(frozen=True, slots=True)
class StoredReading:
    """A stored reading as it is shown. `observed_at` is the time of receipt where the device said none."""

    component: str
    sensor: str
    observed_at: datetime
    received_at: datetime
    value: Value
    uplink_id: UplinkId


Outcome = StoredUplink | RegistryError


class Uplinks:
    """Stores the uplinks of this node and reads everybody's."""

    def __init__(
        self,
        database: Database,
        *,
        limits: UplinkLimits = UplinkLimits(),  # frozen
        clock: Callable[[], float] = time.time,
        random: Callable[[int], bytes] = os.urandom,
        observe: Callable[[int, float], None] | None = None,
        retry_pauses: Sequence[float] = RETRY_PAUSES,
    ) -> None:
        """`clock` gives seconds since 1970, `random(n)` n bytes; both only make ids. `observe(items, seconds)` is told
        of each batch."""
        self._database = database
        self._clock = clock
        self._random = random
        self._retry_pauses = retry_pauses
        self._batcher: Batcher[NewUplink, StoredUplink] = Batcher(
            "uplinks",
            self._process,
            max_items=min(limits.batch, storage.MAX_BATCH),
            max_queued=limits.queue,
            runners=limits.runners,
            observe=observe,
            weigh=_weight,
            max_weight=limits.batch_bytes,
            max_queued_weight=limits.queue_bytes,
        )

    @property
    def queued(self) -> int:
        """Uplinks that wait for a batch."""
        return self._batcher.queued

    @property
    def queued_bytes(self) -> int:
        """What they weigh together, roughly."""
        return self._batcher.queued_weight

    @property
    def crowded(self) -> bool:
        """Whether half of the queue is taken: a transport that can make its senders wait does so from here on."""
        return self._batcher.crowded

    @property
    def turned_away(self) -> int:
        """Uplinks for which the queue had no room, since the start."""
        return self._batcher.turned_away

    def submit(self, uplink: NewUplink) -> asyncio.Future[StoredUplink]:
        """Queue an uplink; the future is done when it is committed, or has the error.

        Raises Unavailable at once if the queue is full. The future raises Unavailable if the outcome is not known,
        InvalidArgument if PostgreSQL refused this very row, and SessionLost if the session of its `origin` is somebody
        else's now; in the last two cases nothing was stored. A caller that is cancelled leaves its uplink in.
        """
        return self._batcher.submit(uplink)

    async def stop(self) -> None:
        """Take nothing new and store what is queued."""
        await self._batcher.stop()

    async def list_uplinks(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        page: Page,
        *,
        kind: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Listing[Uplink]:
        """A device's uplinks, newest first by receipt; `since` is included, `until` is not. Raises Unavailable.

        A device that does not exist in the tenant has none. Raises InvalidArgument for a foreign cursor.
        """
        behind = (END, LAST_UUID) if page.cursor is None else decode_cursor(page.cursor, datetime, UUID)
        window = _window(since, until, page)
        async with self._database.connection() as connection:
            rows = await storage.read_uplinks(connection, tenant_id, device_id, kind, window, behind)
        shown = [
            Uplink(
                uplink_id=row["uplink_id"],
                kind=row["kind"],
                payload=row["payload"],
                message_id=row["message_id"],
                observed_at=row["observed_at"],
                received_at=row["received_at"],
                transport=Transport(row["transport"]),
                via=row["via"],
            )
            for row in rows
        ]
        return listing(shown, page, lambda uplink: (uplink.received_at, uplink.uplink_id))

    async def list_readings(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        page: Page,
        *,
        component: str | None = None,
        sensor: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Listing[StoredReading]:
        """A device's readings, newest first by observation; `since` is included, `until` is not. Raises Unavailable.

        A device that does not exist in the tenant has none. Raises InvalidArgument for a foreign cursor.
        """
        behind = (END, LAST_UUID, 0) if page.cursor is None else decode_cursor(page.cursor, datetime, UUID, int)
        window = _window(since, until, page)
        async with self._database.connection() as connection:
            rows = await storage.read_readings(connection, tenant_id, device_id, component, sensor, window, behind)
        page_of_rows = listing(rows, page, lambda row: (row["observed_at"], row["uplink_id"], row["ordinal"]))
        return Listing([_reading(row) for row in page_of_rows.items], page_of_rows.next_cursor)

    async def _process(self, uplinks: Sequence[NewUplink]) -> list[Outcome]:
        ids = storage.new_ids(len(uplinks), int(self._clock() * 1000), self._random)
        give_up_at = asyncio.get_running_loop().time() + RETRY_SECONDS
        return await self._store(list(zip(ids, uplinks, strict=True)), 0, give_up_at)

    async def _store(self, rows: list[Row], tries: int, give_up_at: float) -> list[Outcome]:
        """One outcome per row, in order. `tries` counts the failed ones before."""
        try:
            stored = await self._insert(rows)
        except storage.RowsRefused:
            return await self._store_halves(rows, tries, give_up_at)
        except storage.PartitionMissing:
            await self._make_partitions()
            return await self._store_again(rows, tries, give_up_at)
        except storage.RolledBack:
            return await self._store_again(rows, tries, give_up_at)
        except Unavailable:
            # Committed or not: only a message id, or a packet id that is stored with it, makes it safe to try again.
            known = [row for row in rows if _is_named(row) or row[1].origin is not None]
            again = _by_id(known, await self._store_again(known, tries, give_up_at))
            return [again.get(uplink_id) or _outcome_open() for uplink_id, _ in rows]
        lost = [row for row in rows if _is_named(row) and row[0] not in stored.won and row[0] not in stored.untouched]
        if not lost and not stored.untouched:
            return [StoredUplink(uplink_id, False) for uplink_id, _ in rows]
        settled = _by_id(rows, [_without_winner(uplink_id, stored) for uplink_id, _ in rows])
        winners = _by_id(lost, await self._find_winners(lost, tries, give_up_at))
        return [winners.get(uplink_id) or settled[uplink_id] for uplink_id, _ in rows]

    async def _insert(self, rows: list[Row]) -> Received:
        if all(uplink.origin is None for _, uplink in rows):
            async with self._database.connection() as connection:
                return Received(await storage.insert(connection, rows))
        async with certain_transaction(self._database) as connection:
            return await storage.insert_received(connection, rows)

    async def _store_again(self, rows: list[Row], tries: int, give_up_at: float) -> list[Outcome]:
        if not rows:
            return []
        if tries >= len(self._retry_pauses) or asyncio.get_running_loop().time() >= give_up_at:
            return [_outcome_open() for _ in rows]
        await asyncio.sleep(self._retry_pauses[tries])
        return await self._store(rows, tries + 1, give_up_at)

    async def _store_halves(self, rows: list[Row], tries: int, give_up_at: float) -> list[Outcome]:
        if len(rows) == 1:
            return [InvalidArgument("the database cannot store this uplink as it is", field="payload")]
        middle = len(rows) // 2
        first = await self._store(rows[:middle], tries, give_up_at)
        return first + await self._store(rows[middle:], tries, give_up_at)

    async def _find_winners(self, lost: list[Row], tries: int, give_up_at: float) -> list[Outcome]:
        """Outcomes of rows whose message id was taken. Their own earlier try may be who took it."""
        if not lost:
            return []
        try:
            async with self._database.connection() as connection:
                holders = await storage.winners(connection, [_key(uplink) for _, uplink in lost])
        except Unavailable:
            return await self._store_again(lost, tries, give_up_at)
        # A key that nobody holds any more was deleted by the retention in between.
        gone = [row for row in lost if _key(row[1]) not in holders]
        again = _by_id(gone, await self._store_again(gone, tries, give_up_at))
        return [
            again.get(uplink_id) or StoredUplink(holders[_key(uplink)], holders[_key(uplink)] != uplink_id)
            for uplink_id, uplink in lost
        ]

    async def _make_partitions(self) -> None:
        async with self._database.connection() as connection:
            await storage.make_todays_partitions(connection)


def _weight(uplink: NewUplink) -> int:
    return len(uplink.payload) + _ROW_WEIGHT + _READING_WEIGHT * len(uplink.readings)


def _is_named(row: Row) -> bool:
    return row[1].message_id is not None


def _without_winner(uplink_id: UplinkId, stored: Received) -> Outcome:
    if uplink_id in stored.strangers:
        return SessionLost()
    return StoredUplink(uplink_id, uplink_id in stored.repeated)


def _key(uplink: NewUplink) -> tuple[DeviceId, str]:
    assert uplink.message_id is not None
    return uplink.device_id, uplink.message_id


def _by_id(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> dict[UplinkId, Outcome]:
    return {uplink_id: outcome for (uplink_id, _), outcome in zip(rows, outcomes, strict=True)}


def _outcome_open() -> Unavailable:
    return Unavailable("the database did not confirm the uplink; it may or may not be stored")


def _window(since: datetime | None, until: datetime | None, page: Page) -> Window:
    # Clamped by comparing, not by converting, which may overflow at the ends of the calendar.
    return Window(max(since or BEGINNING, BEGINNING), min(until or END, END), page.limit + 1)


def _reading(row: Record) -> StoredReading:
    # Exactly one is there; the table says so.
    (value,) = (row[c] for c in ("number", "integer", "boolean", "text") if row[c] is not None)
    return StoredReading(
        component=row["component"],
        sensor=row["sensor"],
        observed_at=row["observed_at"],
        received_at=row["received_at"],
        value=value,
        uplink_id=row["uplink_id"],
    )
