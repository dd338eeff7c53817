"""What other nodes have for this one: relayed messages, queue rows that wait for their owner here, and evictions.

    another node commits ── NOTIFY (a hint) ──► wake ──► pull until nothing is left ──► wait for a hint, or a second
                                                           │
        relay row ──► router.arrived ──► row deleted       │  what is in the tables is the truth: a lost hint delays
        queue row ──► router.reserve ──► packet id stored ──► router.queued
        eviction  ──► router.evicted                       │
        takeover  ──► router.taken                         │

Nothing is followed by a cursor here: a row waits until it is taken, so none can be skipped by committing late.

A relay row is handed over before it is deleted; if the deletion fails its number is remembered and it is not handed
over twice. Its receivers live in this process and die with it. A queue row gets the packet id that the owner reserved
in a transaction, and is sent only after that is committed: a restart repeats the same id. Word is told before it is
deleted; telling it twice does nothing.

A session that has no room (or has just been taken and is not known to the router yet) holds its messages back: its
rows are passed over until its queue gets shorter or the next second comes. Later messages queue behind rows that wait,
for whatever reason (publishing.py).

Rows are taken charge of by one task at a time, the loop or a batch of publications that found itself behind them. What
can race: a batch that is committed after the packet ids and before the hand-over; it waits for that (`handed_over`).
The other way round, a batch may be committed and its delivery take many turns of the loop: rows of its sessions are
younger than what is being delivered, and are passed over until that is done (`giving_out`, `given_out`).

Of a message that cannot be handled only its own receivers have the loss: a relay is dropped, a session is closed and
finds it again in its queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence

import msgspec
from asyncpg import Record

from registry.messaging_values import Arrival, Eviction, OutcomeOpen, Ownership, Router, StoredSessionId
from registry.model import NodeId
from registry.pacing import Pace
from registry.storage import messaging as storage
from registry.storage import messaging_sessions as sessions
from registry.storage.commits import certain_transaction
from registry.storage.database import Connection, Database
from registry.storage.messaging_sessions import message_of, queued_of

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Without any hint the tables are looked at this often: the most that a lost NOTIFY delays a message."""
_SLICE = 500


class MessageInbox:
    """Takes what is for this node."""

    def __init__(self, database: Database, node_id: NodeId, router: Router) -> None:
        self._database = database
        self._node_id = node_id
        self._router = router
        self._wake = asyncio.Event()
        self._poll_at = 0.0
        self._held_back: set[StoredSessionId] = set()
        self._undeleted: set[int] = set()
        self._taking = asyncio.Lock()
        self._taken: set[StoredSessionId] = set()
        """Sessions whose rows get their packet ids now, or have them and are not handed over yet."""
        self._given: set[StoredSessionId] = set()
        """Sessions to which a batch of this node gives its messages."""
        self._passed: set[StoredSessionId] = set()
        """Those of them whose rows wait for that."""

    def wake(self) -> None:
        """Look soon."""
        self._wake.set()

    async def catch_up(self, session_ids: Collection[StoredSessionId]) -> None:
        """Take what waits for these sessions now, as far as they have room. Raises Unavailable, OutcomeOpen."""
        wanted = set(session_ids)
        async with self._taking:
            self._held_back -= wanted
            while wanted:
                async with self._database.connection() as connection:
                    rows = await storage.waiting_of(connection, self._node_id, wanted, _SLICE)
                await self._take_these(rows)
                if len(rows) < _SLICE:
                    return
                wanted -= self._held_back

    async def handed_over(self, session_ids: set[StoredSessionId]) -> None:
        """Return when the router has every row of these sessions that has its packet id from here by now."""
        if not self._taken.isdisjoint(session_ids):
            async with self._taking:
                pass

    def giving_out(self, session_ids: set[StoredSessionId]) -> None:
        """A batch is about to be committed with messages for these; take no rows of theirs until `given_out`."""
        self._given = set(session_ids)

    def given_out(self, session_ids: set[StoredSessionId]) -> None:
        """The router has what the batch had for these, or nothing was committed."""
        self._given -= session_ids
        if self._passed:
            self._passed.clear()
            self._wake.set()

    def freed(self, session_ids: set[StoredSessionId]) -> None:
        """There may be room now in these sessions: those that hold messages back are tried again."""
        if not self._held_back.isdisjoint(session_ids):
            self._held_back -= session_ids
            self._wake.set()

    async def wait(self) -> None:
        """Until somebody wakes us, or the poll is due. What was held back is tried again once in each poll's time, also
        where somebody always wakes us before: not all that makes room says so, and nothing is to be kept for ever."""
        try:
            async with asyncio.timeout_at(self._poll_at):
                await self._wake.wait()
        except TimeoutError:
            pass
        now = asyncio.get_running_loop().time()
        if now >= self._poll_at:
            self._held_back.clear()
            self._poll_at = now + POLL_SECONDS
        self._wake.clear()

    async def pull(self) -> None:
        """Take everything that there is now. Raises Unavailable."""
        while True:
            async with self._database.connection() as connection:
                await self._hear(connection)
                relayed = await storage.relays(connection, self._node_id, self._undeleted, _SLICE)
                rows = await storage.waiting(connection, self._node_id, self._held_back | self._passed, _SLICE)
            if relayed or self._undeleted:
                await self._hand_over(relayed)
            if rows:
                await self._take_charge(rows)
            if len(relayed) < _SLICE and len(rows) < _SLICE:
                return

    async def _hear(self, connection: Connection) -> None:
        word = await sessions.word_for(connection, self._node_id)
        for ownership, why in word.evicted:
            self._router.evicted(ownership, why=why)
        for key, number in word.taken:
            self._router.taken(key, number)
        if word.evicted or word.taken:
            await sessions.remove_word(connection, self._node_id, word)

    async def _hand_over(self, rows: Sequence[Record]) -> None:
        pace = Pace()
        for row in rows:
            self._undeleted.add(row["relay_id"])
            try:
                await pace.through(self._router.arrived(_arrival_of(row)))
            except Exception:  # what cannot be handled would be read again for ever
                log.exception("messaging.relay_not_handled")
        pace.end()
        done = set(self._undeleted)
        async with self._database.transaction() as connection:
            await storage.remove_relays(connection, self._node_id, done)
        self._undeleted -= done

    async def _take_charge(self, rows: Sequence[Record]) -> None:
        async with self._taking:
            await self._take_these(rows)

    async def _take_these(self, rows: Sequence[Record]) -> None:
        reserved: list[tuple[Record, Ownership, int]] = []
        for row in rows:
            if row["session_id"] in self._held_back:
                continue  # an earlier one of this session found no room
            if row["session_id"] in self._given:
                self._passed.add(row["session_id"])
                continue
            ownership = Ownership(row["session_id"], row["epoch"])
            packet_id = self._router.reserve(ownership, row["size"])
            if packet_id is None:
                self._held_back.add(row["session_id"])
                continue
            reserved.append((row, ownership, packet_id))
        if not reserved:
            return
        self._taken = {ownership.session_id for _, ownership, _ in reserved}
        try:
            await self._hand_out(reserved)
        finally:
            self._taken = set()

    async def _hand_out(self, reserved: Sequence[tuple[Record, Ownership, int]]) -> None:
        try:
            taken = await self._record(reserved)
        except (OutcomeOpen, asyncio.CancelledError):  # the loop may go on anew; what it had committed is not known
            for ownership in {ownership for _, ownership, _ in reserved}:
                self._router.evicted(ownership, why=Eviction.LOST)
            raise
        except BaseException:
            for _, ownership, packet_id in reserved:
                self._router.unreserve(ownership, packet_id)
            raise
        for row, ownership, packet_id in reserved:
            if (row["session_id"], row["ordinal"]) not in taken:
                self._router.unreserve(ownership, packet_id)
                continue
            try:
                self._router.queued(ownership, queued_of(row, packet_id))
            except Exception:  # its packet id is recorded, and nobody is to use it for anything else
                log.exception("messaging.queued_not_handled")
                self._router.evicted(ownership, why=Eviction.LOST)

    async def _record(self, reserved: Sequence[tuple[Record, Ownership, int]]) -> set[tuple[StoredSessionId, int]]:
        async with certain_transaction(self._database) as connection:
            held = await sessions.lock(connection, {ownership.session_id for _, ownership, _ in reserved})
            mine = [
                (ownership.session_id, row["ordinal"], packet_id)
                for row, ownership, packet_id in reserved
                if (session := held.get(ownership.session_id)) is not None
                and session.epoch == ownership.epoch
                and session.node_id == self._node_id
            ]
            return await storage.take_charge(connection, mine)


def _arrival_of(row: Record) -> Arrival:
    shared = tuple(msgspec.json.decode(row["shared"], type=list[str]))
    return Arrival(row["tenant_id"], row["device_id"], message_of(row), row["direct"], shared)
