"""Stored sessions: who serves them, what they are when somebody takes them, and how they end.

                 take                                        release
    (none) ───────────────► served by a node, epoch n ─────────────────────► waiting, expires_at runs
                                │        ▲        │ node dies: orphaned ─────────►│
                                │ take elsewhere: epoch n+1                       │ take: epoch n+1
                                └────────┘ the loser is evicted                   │ expired, clean start, end,
                                                                                  │ its queue stayed full
                                                                                  ▼
                                     revoked, device inactive or deleted ─────► (none)

Invariants
- All that a client was promised is in the store before it is promised, so a session may be taken from its owner at any
  time without asking: the epoch fences the loser off, and what he had not written, nobody was told.
- A session that does not outlive its connection is not stored, unless it was and is resumed so. So nobody can look up
  where such a one lives: who begins a session tells every other node, and the older connection is closed there.
- Wills stand beside the sessions. One is armed while its connection lives, due when that is lost without a goodbye
  and the delay has passed, or the session has ended; then it is published once (publishing.py). The client's return
  before that drops it.
- A will is in the store before its client hears that it is connected, of whatever kind the session is: no end of a
  process loses it (MQTT 5.0 §3.1.2.5). A session that is kept in memory has a row for that, with expiry 0 and neither
  subscriptions nor a queue: it is owned, fenced, forfeited and orphaned like any other, and never resumed.
- Whether a revocation concerns a session is asked of the credential that opened it, when the revocation is followed,
  when the session is taken, and by a sweep: a lost event may delay the dropping, never cancel it. The end of a
  credential by rotation drops nothing; it is its successors' revocation then that counts.
- Of a will that is asked again when it is due, and once more in the transaction that publishes it; one that is stored
  as an uplink is asked only when it is due, milliseconds before. So its connection may end in any way, before the
  revocation is followed or after: what was revoked says nothing more.

What can race: two takers (the row decides, the later one wins), a taking with a publication (either the row is loaded,
or it finds the new owner), a revocation with a taking with a fresh credential (the session then has that one), a
goodbye with the end of this process (unless the goodbye was committed the will is published all the same).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from registry.batching import Batcher
from registry.errors import NotFound, ResourceExhausted
from registry.events import EventKind, NewEvent
from registry.full_queues import Standstill
from registry.messaging_limits import MessagingLimits
from registry.messaging_values import Eviction, Opening, Ownership, SessionKey, SessionLost, StoredSessionId, Taken
from registry.model import Actor, DeviceId, NodeId, Transport
from registry.storage import events
from registry.storage import messaging_sessions as storage
from registry.storage.commits import certain_transaction
from registry.storage.database import Connection, Database
from registry.storage.messaging_sessions import Locked

_CHUNK = 500
"""Sessions in one transaction of upkeep: some tens of milliseconds."""
_LOOKUP_BATCH = 256
_LOOKUP_QUEUE = 20_000
"""As many as a node has connections; each waits for a millisecond or two."""


class StoredSessions:
    """The stored sessions, as one node handles them."""

    def __init__(
        self,
        database: Database,
        node_id: NodeId,
        *,
        clock: Callable[[], float],
        limits: MessagingLimits,
        hint: Callable[[set[NodeId]], None],
        hint_all: Callable[[], None],
    ) -> None:
        self._database = database
        self._node_id = node_id
        self._clock = clock
        self._limits = limits
        self.refused = 0
        """Sessions for which a device had no room, since the start."""
        self._hint = hint
        self._hint_all = hint_all
        self._lookups: Batcher[SessionKey, int | None] = Batcher(
            "session look-up", self._look_up, max_items=_LOOKUP_BATCH, max_queued=_LOOKUP_QUEUE, runners=2
        )

    async def stop(self) -> None:
        """Finish what is under way."""
        await self._lookups.stop()

    async def take(self, opening: Opening) -> Taken:
        """See `Messaging.take`."""
        # Most sessions end with their connections, and most of those find nothing: a storm of them asks in batches.
        if opening.expiry <= 0 and opening.will is None:
            number = await self._lookups.submit(opening.key)
            if number is not None:
                return Taken(None, None, number)
        while True:
            told: set[NodeId] = set()
            async with certain_transaction(self._database) as connection:
                taken, routed = await self._take(connection, opening, told)
            self._hint(told)
            if routed:
                self._hint_all()
            if taken is not None:
                return taken

    async def _look_up(self, keys: Sequence[SessionKey]) -> list[int | None]:
        """Of each that has no session: the number of its taking, which other nodes are told of."""
        async with self._database.connection() as connection:
            announced = await storage.announce(connection, keys, self._node_id)
        self._hint(set(announced.told))
        return [announced.numbers.get(key) for key in keys]

    async def _take(self, connection: Connection, opening: Opening, told: set[NodeId]) -> tuple[Taken | None, bool]:
        """What was taken (None: another one was faster with a new session, try again), and whether routes changed."""
        now = self._clock()
        adds = opening.expiry > 0 or opening.will is not None
        if adds and not await storage.hold_device(connection, opening.key):
            raise NotFound("no such device in this tenant")  # deleted this very moment
        place = await storage.find(connection, opening.key)
        if place is not None and place.node_id is not None and place.node_id != self._node_id:
            await storage.evict(connection, place.node_id, Ownership(place.session_id, place.epoch))
            told.add(place.node_id)
        routed = False
        if place is not None:
            # What does not outlive its connection ends with being taken over (5.0 §3.1.2.11.2).
            over = place.expiry <= 0 or (place.expires_at is not None and place.expires_at <= now)
            if not (opening.clean or over or place.forfeited):
                return await self._resume(connection, place.session_id, opening, now), False
            if place.forfeited:
                await storage.drop_wills(connection, [place.session_id])
            else:
                await storage.finish_wills(connection, [place.session_id], now)
            routed = await storage.remove(connection, {place.session_id: opening.key.tenant_id})
        announced = await storage.announce(connection, [opening.key], self._node_id)
        number = announced.numbers.get(opening.key)
        if number is None:
            return None, routed
        told |= announced.told
        if not adds:
            return Taken(None, None, number), routed
        if opening.expiry > 0:
            await self._check_room(connection, opening.key)
        session_id = await storage.insert(connection, opening, self._node_id)
        if session_id is None:
            return None, routed
        if opening.will is not None:
            await storage.arm_will(connection, session_id, opening, opening.will)
        taken = Ownership(session_id, 1)
        if opening.expiry <= 0:
            return Taken(None, None, number, will=taken), routed
        return Taken(taken, None, number), routed

    async def _check_room(self, connection: Connection, key: SessionKey) -> None:
        """Raises ResourceExhausted."""
        stored = await storage.count(connection, key.tenant_id, key.device_id)
        if stored >= self._limits.sessions_per_device:
            self.refused += 1
            raise ResourceExhausted(f"the device has its {self._limits.sessions_per_device} stored sessions")

    async def _resume(self, connection: Connection, session_id: StoredSessionId, opening: Opening, now: float) -> Taken:
        await storage.resume_without_will(connection, session_id, now)
        epoch, number = await storage.seize(connection, session_id, opening, self._node_id)
        if opening.will is not None:
            await storage.arm_will(connection, session_id, opening, opening.will)
        resumed = await storage.load(connection, session_id, opening.expiry, now)
        return Taken(Ownership(session_id, epoch), resumed, number)

    async def release(
        self, ownership: Ownership, *, publish_will: bool, expiry: float | None, unsent: Sequence[int]
    ) -> None:
        """See `Messaging.release`. May be repeated."""
        async with certain_transaction(self._database) as connection:
            session = (await storage.lock(connection, [ownership.session_id])).get(ownership.session_id)
            if session is None or session.epoch != ownership.epoch:
                raise SessionLost
            if session.node_id is None:
                return
            routed = await self._release(connection, session, publish_will, expiry, unsent)
        if routed:
            self._hint_all()

    async def disown(self, key: SessionKey) -> bool:
        """See `Messaging.disown`. May be repeated."""
        async with certain_transaction(self._database) as connection:
            place = await storage.find(connection, key)
            if place is None or place.node_id != self._node_id:
                return False
            session = (await storage.lock(connection, [place.session_id]))[place.session_id]
            routed = await self._release(connection, session, publish_will=False, expiry=None, unsent=())
        if routed:
            self._hint_all()
        return True

    async def _release(
        self, connection: Connection, session: Locked, publish_will: bool, expiry: float | None, unsent: Sequence[int]
    ) -> bool:
        """Let a session go whose row is held; whether routes changed."""
        now = self._clock()
        outlives = session.expiry if expiry is None else expiry
        if publish_will:
            await storage.trigger_will(connection, session.session_id, now, outlives)
        else:
            await storage.drop_wills(connection, [session.session_id])
        if outlives > 0:
            await storage.let_go(connection, session.session_id, outlives, now, unsent)
            return False
        await storage.finish_wills(connection, [session.session_id], now)
        return await storage.remove(connection, {session.session_id: session.key.tenant_id})

    async def end(self, ownership: Ownership, *, publish_will: bool) -> None:
        """See `Messaging.end`. May be repeated."""
        async with certain_transaction(self._database) as connection:
            session = (await storage.lock(connection, [ownership.session_id])).get(ownership.session_id)
            if session is None:
                return
            if session.epoch != ownership.epoch:
                raise SessionLost
            if publish_will:
                await storage.finish_wills(connection, [session.session_id], self._clock())
            else:
                await storage.drop_wills(connection, [session.session_id])
            routed = await storage.remove(connection, {session.session_id: session.key.tenant_id})
        if routed:
            self._hint_all()

    async def end_full(self, still: Standstill) -> bool:
        """End a session whose queue stayed full, if it stands where it stood; its will is due. May be repeated.

        Its owner, on any node, is told; the operator finds it among the device's events.
        """
        async with certain_transaction(self._database) as connection:
            session = (await storage.lock(connection, [still.session_id])).get(still.session_id)
            if session is None or Standstill.of(session) != still:
                return False
            await storage.finish_wills(connection, [session.session_id], self._clock())
            if session.node_id is not None:
                owned = Ownership(session.session_id, session.epoch)
                await storage.evict(connection, session.node_id, owned, why=Eviction.FULL)
            await storage.remove(connection, {session.session_id: session.key.tenant_id})
            data = {
                "reason": "queue stayed full",
                "transport": Transport.MQTT.value,
                "client_id": session.key.client_id,
                "queued_messages": session.queued_messages,
            }
            await events.insert(
                connection,
                NewEvent(
                    EventKind.SESSION_CLOSED,
                    session.key.tenant_id,
                    Actor("system:messaging", ""),
                    device_id=session.key.device_id,
                    data=data,
                ),
            )
        if session.node_id is not None:
            self._hint({session.node_id})
        self._hint_all()
        return True

    async def drop_forfeited(self, devices: Collection[DeviceId] | None = None) -> int:
        """Drop what revocations ended, of these devices or of all: no will is published. How many sessions."""
        total = 0
        while True:
            async with certain_transaction(self._database) as connection:
                doomed = await storage.forfeited(connection, devices, _CHUNK)
                ids = {session_id: tenant_id for session_id, tenant_id, _, _ in doomed}
                await storage.drop_wills(connection, list(ids))
                for session_id, _, node_id, epoch in doomed:
                    if node_id is not None:
                        await storage.evict(connection, node_id, Ownership(session_id, epoch))
                await storage.remove(connection, ids)
            total += len(doomed)
            if doomed:
                self._hint_all()
            if len(doomed) < _CHUNK:
                return total

    async def expire(self) -> int:
        """End the sessions whose time is over, their wills are due with them; how many."""
        total = 0
        while True:
            async with certain_transaction(self._database) as connection:
                now = self._clock()
                over = await storage.expired(connection, now, _CHUNK)
                await storage.finish_wills(connection, list(over), now)
                await storage.remove(connection, over)
            total += len(over)
            if over:
                self._hint_all()
            if len(over) < _CHUNK:
                return total

    async def orphan(self, connection: Connection, node_id: NodeId) -> int:
        """In the caller's transaction: a chunk of the sessions of a node that died; fewer than asked is the last."""
        return await storage.orphan(connection, node_id, self._clock(), _CHUNK)
