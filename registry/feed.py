"""The node's cursor over the event table: what drives revocation, cache invalidation and event streams.

    ┌── hint: a local commit, or NOTIFY from another node ──┐
    ▼                                                       │
  read after cursor ──► settled: deliver, move the cursor   │      connection lost: reconnect, go on from the cursor,
    │                 ─► early:  deliver at once, stay      │      tell `lost` / `restored` followers
    └── nothing new: wait for a hint, or a second ──────────┘

A row is *settled* when every transaction that could still commit before it has ended (its xid is below the snapshot's
xmin); only then may the cursor pass it, or a row that commits late with a lower number would be skipped for ever. A
teardown event that is committed but not settled yet is delivered *early* as well, found by an index of its own past any
number of other events, because a revocation does not wait for somebody else's long transaction. So a follower sees
every event at least once, a teardown maybe twice: followers are idempotent.

A hint may be lost; the cursor and the poll make that a delay, never a loss. Positions survive the connection, not the
process: a new process has no sessions and an empty cache, so it starts at the newest settled row.

The feed is trusted while its last reading is recent. While it is not, the resolver's cache is not asked; when it is
lost for longer than the grace period nobody new is admitted (sessions.py).

The feed's connection holds the node's advisory lock: one living process per node id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

from registry.errors import RegistryError, Unavailable
from registry.events import START, Event, Position
from registry.model import NodeId, TenantId
from registry.storage import events, nodes
from registry.storage.database import Database, is_away

log = logging.getLogger(__name__)

CHANNEL = "gatehouse_event"
POLL_SECONDS = 1.0
"""Without any hint the table is read this often: the most that a lost NOTIFY delays a revocation."""
TRUST_SECONDS = 5.0
"""A reading older than this means that the feed is not trusted: several polls have failed."""
UNSETTLED_POLL_SECONDS = 0.02
"""How soon rows that wait for older transactions are looked at again; doubled while nothing comes, up to a poll."""
READ_SECONDS = 5.0
"""A reading that takes longer is given up with its connection."""
_SLICE = 1000
_HINT_SECONDS = 0.002
"""Hints of commits within this time become one NOTIFY, which takes a lock that all notifying commits share."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An event as a follower gets it."""

    event: Event
    settled: bool
    age_seconds: float
    """Since it was written, on the database's clock."""


class Follower(Protocol):
    """Gets every event of all tenants, at least once each."""

    async def follow(self, seen: Seen) -> None:
        """Must not raise, and must not wait long: the next event waits for it."""

    async def restored(self) -> None:
        """The feed was lost and is back; events of the gap follow, yet anything may have gone stale."""


class NodeBusy(Exception):
    """Another living process uses this node id on this database."""


class Feed:
    """Follows the event table until it is stopped."""

    def __init__(self, database: Database, node_id: NodeId) -> None:
        self._database = database
        self._node_id = node_id
        self._followers: list[Follower] = []
        self._cursor = START
        self._wake = asyncio.Event()
        self._hinted = False
        self._hint_tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()  # to look it up takes a system call, and every session asks the time
        self._last_reading: float | None = None
        self._started_at = 0.0
        self._streams: dict[TenantId, asyncio.Event] = {}
        self._connection: Any = None
        self._early: set[int] = set()
        self.lag_seconds = 0.0
        """How long the oldest event waits that is committed and held back by an older transaction; 0 without one."""

    def add_follower(self, follower: Follower) -> None:
        """Before `start`."""
        self._followers.append(follower)

    async def start(self) -> None:
        """Connect, take the node's lock, find the newest position. Raises Unavailable, NodeBusy."""
        self._started_at = self._loop.time()
        self._connection = await self._connect()
        await self._begin_anew()
        self._read_now()

    async def run(self) -> None:
        """Follow for ever; survives the loss of the database. Cancel it to stop, then call `close`."""
        backoff = 0.05
        while True:
            try:
                if self._connection is None or self._connection.is_closed():
                    self._connection = await self._connect()
                    if await events.is_ahead(self._connection, self._cursor):
                        await self._begin_anew()  # a standby or a restored dump took over: the sweep covers the gap
                    for follower in self._followers:
                        await follower.restored()
                    log.info("feed.restored", extra={"fields": {"node": self._node_id}})
                backoff = 0.05
                await self._follow_connection(self._connection)
            except (RegistryError, NodeBusy) as error:
                log.warning("feed.lost", extra={"fields": {"node": self._node_id, "reason": str(error)}})
            except Exception as error:
                if not is_away(error):
                    raise
                log.warning("feed.lost", extra={"fields": {"node": self._node_id, "reason": type(error).__name__}})
            await self._drop_connection()
            await asyncio.sleep(backoff)
            backoff = min(2.0, backoff * 2)

    async def close(self) -> None:
        """Give the connection and the node's lock back."""
        for task in list(self._hint_tasks):
            task.cancel()
        await self._drop_connection()

    @property
    def trusted(self) -> bool:
        """Whether what the feed has not told may be taken for unchanged."""
        return self.lost_seconds() < TRUST_SECONDS and self._connection is not None and not self._connection.is_closed()

    def lost_seconds(self) -> float:
        """Seconds since the last successful reading."""
        now = self._loop.time()
        return now - (self._started_at if self._last_reading is None else self._last_reading)

    @property
    def cursor(self) -> Position:
        """The last settled position delivered."""
        return self._cursor

    # -- hints -----------------------------------------------------------------------------------------------------

    def hint(self) -> None:
        """A transaction that wrote events was committed here: read soon, and let the other nodes know."""
        self._wake.set()
        if self._hinted:
            return
        self._hinted = True
        task = self._loop.create_task(self._notify(), name="feed hint")
        self._hint_tasks.add(task)
        task.add_done_callback(self._hint_tasks.discard)

    async def _notify(self) -> None:
        await asyncio.sleep(_HINT_SECONDS)
        self._hinted = False
        try:
            async with self._database.connection() as connection:
                await connection.execute(f"NOTIFY {CHANNEL}")
        except Unavailable:
            log.info("feed.hint_lost", extra={"fields": {"node": self._node_id}})

    def changed(self, tenant_id: TenantId) -> asyncio.Event:
        """Set when the tenant has new settled events; a stream takes it *before* it reads, then waits on it."""
        return self._streams.setdefault(tenant_id, asyncio.Event())

    # -- following -------------------------------------------------------------------------------------------------

    async def _connect(self) -> Any:
        connection = await self._database.dedicated()
        try:
            if not await nodes.take_lock(connection, _lock_number(self._node_id)):
                raise NodeBusy(f"another process uses node id {self._node_id!r} on this database ([node] id)")
            await connection.add_listener(CHANNEL, self._on_notify)
            connection.add_termination_listener(self._on_termination)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            connection.terminate()
            await asyncio.sleep(0)

    def _on_notify(self, *_: object) -> None:
        self._wake.set()

    def _on_termination(self, *_: object) -> None:
        self._wake.set()

    async def _follow_connection(self, connection: Any) -> None:
        pause = UNSETTLED_POLL_SECONDS
        while True:
            self._wake.clear()
            if connection.is_closed():
                raise Unavailable("the feed's connection is closed")
            try:
                async with asyncio.timeout(READ_SECONDS):
                    early = await events.read_early(connection, self._early, _SLICE)
                    settled = await events.read_settled(connection, self._cursor, _SLICE)
                    waiting = await events.oldest_unsettled(connection)
            except TimeoutError:
                raise Unavailable(f"the events could not be read within {READ_SECONDS:.0f} s") from None
            self._read_now()
            self.lag_seconds = waiting or 0.0
            await self._take(early, settled)
            if len(settled) == _SLICE:
                continue
            pause = UNSETTLED_POLL_SECONDS if settled or early else min(POLL_SECONDS, pause * 2)
            await self._wait(pause if waiting is not None else POLL_SECONDS)

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _take(self, early: Sequence[events.Aged], settled: Sequence[events.Aged]) -> None:
        for each in early:
            self._early.add(each.event.position.seq)
            await self._deliver(Seen(each.event, False, each.age_seconds))
        touched: set[TenantId] = set()
        for each in settled:
            await self._deliver(Seen(each.event, True, each.age_seconds))
            self._early.discard(each.event.position.seq)
            self._cursor = each.event.position
            touched.add(each.event.tenant_id)
        for tenant_id in touched:
            waiting = self._streams.pop(tenant_id, None)
            if waiting is not None:
                waiting.set()

    async def _begin_anew(self) -> None:
        async with self._database.connection() as connection:
            moved = await events.rebase(connection)
            if moved:
                log.warning("feed.rebased", extra={"fields": {"events": moved}})
            self._cursor = await events.newest_settled(connection)
        self._early.clear()

    async def _deliver(self, seen: Seen) -> None:
        for follower in self._followers:
            await follower.follow(seen)

    def _read_now(self) -> None:
        self._last_reading = self._loop.time()


def _lock_number(node_id: NodeId) -> int:
    """The advisory lock of a node id: 63 bits of its hash."""
    return int.from_bytes(sha256(b"gatehouse node " + node_id.encode()).digest()[:8], "big") >> 1
