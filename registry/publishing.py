"""Publications: routed and stored in groups, acknowledged after the commit.

    publish ──► queue ──► batch, one at a time:
        read new routes ─► route each ─► hold the receivers' sessions ─► judge each ─► write ─► commit
                                                                             │
        committed: the router delivers here, in this order; then the futures │ SessionLost, QueueFull, duplicate,
        nothing stored: reservations back, again or Unavailable              ▼ forbidden: nothing of this one is stored

Invariants
- A future that resolves to `Published` means that the message is committed in the queue of every stored session that
  subscribed before, and on its way to every node with sessions that are not stored: acknowledge it now.
- All or nothing for each publication: if one receiver has no room, nobody gets it and the sender is told (`QueueFull`,
  MQTT's 0x97). A receiver that takes nothing stops its topics for a while, then its session ends (full_queues.py).
- A QoS 2 id is stored in the transaction of its message, and only by the session's present owner: whoever restores
  the session finds both or none.
- One batch at a time, so messages of one sender are committed, queued and delivered in their order. The delivery lets
  others have their turn (pacing.py); what is committed behind it waits, and the inbox passes over these sessions.
- A publication that cannot be handled fails alone. If that shows in the delivery only, it is stored all the same: the
  sessions that may not have it are closed, and find it when they are taken up.

What can race: a session that is taken elsewhere while its message is on the way. Its row is held until the commit, so
either the taker loads the message, or the message finds the taker as the owner and waits for it. What can be lost: the
answer to a commit; PostgreSQL is asked for its fate (storage/commits.py), and if it cannot be had in time the outcome
is open, and said to be (`OutcomeOpen`).

A message that has a packet id here is delivered by `committed`; one without is fetched by its owner (message_inbox.py).
No message overtakes an older one of its session (MQTT 5.0 §4.6), whatever way either goes. While the row is held:

    a row waits for its packet id ──► the new one waits behind it, and the inbox is asked to catch up before the next
                                      batch, so that a session gets out of this under load as well
    the inbox hands older ones over ► the new one has its packet id, and is delivered when that is done
    neither ────────────────────────► the new one has its packet id, and is delivered after the commit
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from registry.batching import Batcher
from registry.errors import InvalidArgument, ResourceExhausted, Unavailable
from registry.full_queues import FullQueues, Standstill
from registry.message_inbox import MessageInbox
from registry.message_routes import RETRY_PAUSES, MessageRoutes
from registry.messaging_limits import MessagingLimits
from registry.messaging_values import (
    Eviction,
    Incoming,
    Message,
    OutcomeOpen,
    Ownership,
    PendingWill,
    Placement,
    Publication,
    Published,
    QueueFull,
    Recipient,
    RetainedFull,
    RetainedReplaced,
    Router,
    Routing,
    SessionLost,
    StoredSessionId,
)
from registry.model import NodeId, TenantId
from registry.pacing import Pace
from registry.queue_fronts import QueueFronts
from registry.storage import messaging as storage
from registry.storage import messaging_sessions as sessions
from registry.storage.commits import certain_transaction
from registry.storage.database import Connection, Database
from registry.storage.messaging import QueueRow, Retention, RowsRefused, Writes
from registry.storage.messaging_sessions import Locked
from registry.storage.uplinks import MAX_BATCH, new_ids

log = logging.getLogger(__name__)

MAX_RECEIVERS = 5_000
"""A transaction takes no further publication behind this many receivers: its rows are bounded, and what is made of them
in one step of the loop, however many subscribe to one topic."""


@dataclass(frozen=True, slots=True)
class _Item:
    """`routing` None: the router is asked. With one given, nothing is retained. `answer`: what the publisher waits for;
    it is done with its transaction. Where there are crowds, a batch may have hundreds of these."""

    publication: Publication
    routing: Routing | None
    answer: asyncio.Future[Published]


Outcome = Published | BaseException


@dataclass(slots=True)
class _Held:
    """What a batch holds while it judges; changed by each publication that is accepted."""

    sessions: dict[StoredSessionId, Locked]
    incoming: set[tuple[StoredSessionId, int]]
    wills: set[int]
    retention: dict[TenantId, Retention]
    behind: set[StoredSessionId]
    """Sessions with rows that wait for a packet id: what comes now waits behind them."""
    kept: dict[tuple[TenantId, str], Message]
    """What is retained now under the topics of retained messages that are to be given to somebody."""


@dataclass(slots=True)
class _Batch:
    """A batch under way: routings to give back if it fails, outcomes to give out when it is committed."""

    routings: list[Routing | None] = field(default_factory=list)
    failures: dict[int, Exception] = field(default_factory=dict)
    """By their place in the batch, those that the router cannot handle."""
    outcomes: list[Outcome] = field(default_factory=list)
    writes: Writes = field(default_factory=Writes)
    touched: set[StoredSessionId] = field(default_factory=set)
    queued: list[tuple[TenantId, int, int]] = field(default_factory=list)
    overdue: set[Standstill] = field(default_factory=set)
    in_hand: list[Locked] = field(default_factory=list)
    """Sessions in whose queues no row waits, at the end of the batch."""
    behind: set[StoredSessionId] = field(default_factory=set)
    """Sessions that would have had room, but for rows that wait."""


class Publishing:
    """Stores the publications of this node."""

    def __init__(
        self,
        database: Database,
        node_id: NodeId,
        router: Router,
        routes: MessageRoutes,
        *,
        clock: Callable[[], float],
        random: Callable[[int], bytes],
        limits: MessagingLimits,
        hint: Callable[[set[NodeId]], None],
        inbox: MessageInbox,
        fronts: QueueFronts,
        overdue: Callable[[Standstill], None],
        observe: Callable[[int, float], None] | None = None,
        steady: Callable[[], float],
    ) -> None:
        self._database = database
        self._node_id = node_id
        self._router = router
        self._routes = routes
        self._clock = clock
        self._steady = steady
        self._random = random
        self._limits = limits
        self._hint = hint
        self._inbox = inbox
        self._fronts = fronts
        self._behind: set[StoredSessionId] = set()
        self._overdue = overdue
        self._full = FullQueues(limits.full_queue_seconds)
        self._last: asyncio.Future[Published] | None = None
        self.tenant_queues: dict[TenantId, tuple[int, int]] = {}
        """Messages and bytes in the queues of each tenant, some seconds old, with what this node has added since."""
        self.overflowed = 0
        """Publications refused because a queue had no room, since the start."""
        self.retained_full = 0
        """Publications refused because the tenant retains as much as it may, since the start."""
        self._batcher: Batcher[_Item, Published] = Batcher(
            "publications",
            self._process,
            max_items=min(limits.batch, MAX_BATCH),
            max_queued=limits.waiting,
            observe=observe,
            weigh=lambda item: item.publication.message.size,
            max_weight=limits.batch_bytes,
            max_queued_weight=limits.waiting_bytes,
        )

    @property
    def queued(self) -> int:
        """Publications that wait for a batch."""
        return self._batcher.queued

    @property
    def turned_away(self) -> int:
        """Publications for which there was no room to wait, since the start."""
        return self._batcher.turned_away

    async def stop(self) -> None:
        """Take nothing new and store what is queued."""
        await self._batcher.stop()

    def publish(self, publication: Publication, routing: Routing | None = None) -> asyncio.Future[Published]:
        """See `Messaging.publish` and `Messaging.enqueue`. Raises Unavailable at once if the queue is full."""
        item = _Item(publication, routing, asyncio.get_running_loop().create_future())
        self._batcher.submit(item).add_done_callback(partial(_answer_late, item.answer))
        self._last = item.answer
        return item.answer

    async def published(self) -> None:
        """See `Messaging.published`. They are answered in the order in which they came."""
        if self._last is not None and not self._last.done():
            await asyncio.wait((self._last,))

    async def _process(self, items: Sequence[_Item]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        while len(outcomes) < len(items):
            done = await self._process_first(items[len(outcomes) :])
            for item, outcome in zip(items[len(outcomes) :], done, strict=False):
                _answer(item.answer, outcome)
            outcomes += done
        return outcomes

    async def _process_first(self, items: Sequence[_Item]) -> list[Outcome]:
        """Of as many as go into one transaction; of all of them if that fails."""
        for pause in (*RETRY_PAUSES, None):
            try:
                return await self._store(items)
            except OutcomeOpen as error:
                return [OutcomeOpen(error.message) for _ in items]
            except RowsRefused:
                return await self._store_halves(items)
            except Unavailable as error:
                if pause is None:
                    self._give_back(items)
                    return [Unavailable(error.message) for _ in items]
                await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _store_halves(self, items: Sequence[_Item]) -> list[Outcome]:
        if len(items) == 1:
            self._give_back(items)
            return [InvalidArgument("the database cannot store this message as it is")]
        middle = len(items) // 2
        return await self._process(items[:middle]) + await self._process(items[middle:])

    def _give_back(self, items: Sequence[_Item]) -> None:
        """What the caller had reserved for them; what the router reserves goes back after each try."""
        for item in items:
            if item.routing is not None:
                self._router.abandoned(item.publication, item.routing)

    async def _store(self, items: Sequence[_Item]) -> list[Outcome]:
        await self._catch_up()
        batch = _Batch()
        try:
            return await self._commit(items, batch)
        finally:
            self._inbox.given_out(batch.touched)

    async def _commit(self, items: Sequence[_Item], batch: _Batch) -> list[Outcome]:
        try:
            async with certain_transaction(self._database) as connection:
                tenants = {item.publication.tenant_id for item in items if item.routing is None}
                await self._routes.refresh(connection, tenants)
                self._route(items, batch)
                items = items[: len(batch.routings)]
                held = await self._hold(connection, items, batch.routings)
                ids = new_ids(len(items), int(self._clock() * 1000), self._random)
                for place, (item, routing, message_id) in enumerate(zip(items, batch.routings, ids, strict=True)):
                    failure = batch.failures.get(place)
                    batch.outcomes.append(failure or self._judge(item, routing, message_id, held, batch))
                if batch.writes.anything:
                    self._inbox.giving_out(batch.touched)
                    touched = [held.sessions[session_id] for session_id in sorted(batch.touched)]
                    await storage.write(connection, batch.writes, touched, held.retention)
                    batch.in_hand = [session for session in touched if session.session_id not in held.behind]
        except OutcomeOpen:
            self._doubt(batch.routings)
            raise
        except BaseException:
            for item, routing in zip(items, batch.routings, strict=False):
                if routing is not None and item.routing is None:
                    self._router.abandoned(item.publication, routing)
            raise
        self._account(batch)
        await self._hand_out(items, batch)
        return batch.outcomes

    def _route(self, items: Sequence[_Item], batch: _Batch) -> None:
        receivers = 0
        for place, item in enumerate(items):
            try:
                routing = item.routing or self._router.route(item.publication)
            except Exception as error:  # one publication that cannot be handled: the others are not to blame
                log.exception("messaging.not_routed")
                batch.failures[place] = error
                routing = None
            batch.routings.append(routing)
            receivers += 0 if routing is None else len(routing.recipients) + routing.live
            if receivers >= MAX_RECEIVERS:
                return

    async def _catch_up(self) -> None:
        behind, self._behind = self._behind, set()
        if not behind:
            return
        try:
            await self._inbox.catch_up(behind)
        except (OutcomeOpen, Unavailable):
            pass  # the inbox comes back to them by itself

    def _doubt(self, routings: Sequence[Routing | None]) -> None:
        """Rows may stand with packet ids that were reserved here, so those must not be used for anything else: their
        sessions are closed, and whoever takes them next finds what was stored."""
        reserved = {
            Ownership(r.session_id, r.reserved.epoch)
            for routing in routings
            if routing is not None
            for r in routing.recipients
            if r.reserved is not None
        }
        for ownership in reserved:
            self._router.evicted(ownership, why=Eviction.LOST)

    async def _hand_out(self, items: Sequence[_Item], batch: _Batch) -> None:
        """Whoever is cancelled here hands out the rest at once; a stored session would find it in its queue, a live one
        nowhere."""
        pace = Pace()
        await pace.behind(self._inbox.handed_over({session.session_id for session in batch.in_hand}))
        for item, routing, outcome in zip(items, batch.routings, batch.outcomes, strict=True):
            try:
                if isinstance(outcome, Published) and not outcome.duplicate and not outcome.forbidden:
                    await pace.through(self._router.committed(item.publication, outcome))
                elif routing is not None:
                    self._router.abandoned(item.publication, routing)
            except Exception:  # it is stored, whatever became of its delivery: the outcome stands
                log.exception("messaging.not_delivered")
                self._doubt([routing])
        pace.end()

    def _account(self, batch: _Batch) -> None:
        for outcome in batch.outcomes:
            if isinstance(outcome, RetainedFull):
                self.retained_full += 1
            elif isinstance(outcome, QueueFull):
                self.overflowed += 1
        for session in batch.in_hand:
            self._fronts.reached(session)
        self._behind |= batch.behind
        self._inbox.freed(batch.behind)
        for still in batch.overdue:
            self._full.forget(still.session_id)
            self._overdue(still)
        for tenant_id, messages, size in batch.queued:
            before = self.tenant_queues.get(tenant_id, (0, 0))
            self.tenant_queues[tenant_id] = (before[0] + messages, before[1] + size)
        waiting = {row.waiting_for for row in batch.writes.rows if row.waiting_for is not None}
        nodes = waiting | {relay.node_id for _, relay in batch.writes.relays}
        if nodes:
            self._hint(nodes)

    async def _hold(self, connection: Connection, items: Sequence[_Item], routings: Sequence[Routing | None]) -> _Held:
        wanted = {r.session_id for routing in routings if routing is not None for r in routing.recipients}
        origins = [item.publication.origin for item in items]
        incoming = [(o.ownership.session_id, o.packet_id) for o in origins if isinstance(o, Incoming)]
        wanted |= {session_id for session_id, _ in incoming}
        wills = [o.will_id for o in origins if isinstance(o, PendingWill)]
        topics = {
            (item.publication.tenant_id, item.publication.message.topic)
            for item, routing in zip(items, routings, strict=True)
            if item.routing is None and item.publication.message.retain and routing is not None
        }
        given = {
            (item.publication.tenant_id, item.publication.message.topic) for item in items if _is_given_retained(item)
        }
        held = await sessions.lock(connection, wanted) if wanted else {}
        unsure = {
            session.session_id
            for routing in routings
            if routing is not None
            for r in routing.recipients
            if (session := held.get(r.session_id)) is not None
            and self._serves(session, r)
            and not self._fronts.current(session)
        }
        return _Held(
            sessions=held,
            behind=await storage.which_wait(connection, self._node_id, unsure) if unsure else set(),
            incoming=await storage.known_incoming(connection, incoming) if incoming else set(),
            wills=await storage.pending_wills(connection, wills) if wills else set(),
            retention=await storage.lock_retention(connection, topics) if topics else {},
            kept=await storage.retained_now(connection, given) if given else {},
        )

    def _judge(self, item: _Item, routing: Routing | None, message_id: UUID, held: _Held, batch: _Batch) -> Outcome:
        """Accept a publication into the batch, or say why not; then nothing of it is in the batch."""
        publication, message = item.publication, item.publication.message
        match publication.origin:
            case Incoming(ownership, packet_id):
                sender = held.sessions.get(ownership.session_id)
                if sender is None or sender.epoch != ownership.epoch or sender.node_id != self._node_id:
                    return SessionLost()
                if (ownership.session_id, packet_id) in held.incoming:
                    return Published(routing or Routing(), duplicate=True)
            case PendingWill(will_id):
                if will_id not in held.wills:
                    return Published(routing or Routing(), duplicate=True)
            case None:
                pass
        if routing is None:
            if isinstance(publication.origin, PendingWill):
                batch.writes.wills.append(publication.origin.will_id)
            return Published(Routing(), forbidden=True)
        if _is_given_retained(item) and _kept_now(publication.tenant_id, message.topic, held, batch) != message:
            return RetainedReplaced()
        found = [(r, held.sessions.get(r.session_id)) for r in routing.recipients]
        living = [(r, s) for r, s in found if s is not None and s.key.tenant_id == publication.tenant_id]
        living_ids = {s.session_id for _, s in living}
        refusal = self._no_room(item, living, batch) or self._no_retention(item, held)
        if refusal is not None:
            return refusal
        self._retain(item, held, batch)
        match publication.origin:
            case Incoming(ownership, packet_id):
                held.incoming.add((ownership.session_id, packet_id))
                batch.writes.incoming.append((ownership.session_id, packet_id))
            case PendingWill(will_id):
                held.wills.discard(will_id)
                batch.writes.wills.append(will_id)
            case None:
                pass
        placements = tuple(self._place(r, s, message_id, message, held, batch) for r, s in living)
        relays = [relay for relay in routing.relays if relay.node_id != self._node_id]
        if living or relays:
            batch.writes.bodies.append((message_id, publication.tenant_id, publication.device_id, message))
            batch.writes.relays += [(message_id, relay) for relay in relays]
        if living:
            batch.queued.append((publication.tenant_id, len(living), len(living) * message.size))
        gone = tuple(r.session_id for r, _ in found if r.session_id not in living_ids)
        return Published(routing, placements, gone)

    def _serves(self, session: Locked, recipient: Recipient) -> bool:
        """Whether the recipient's packet id was reserved by the session's present owner."""
        reserved = recipient.reserved
        return reserved is not None and session.node_id == self._node_id and session.epoch == reserved.epoch

    def _place(
        self, recipient: Recipient, session: Locked, message_id: UUID, message: Message, held: _Held, batch: _Batch
    ) -> Placement:
        session.last_ordinal += 1
        session.queued_messages += 1
        session.queued_bytes += message.size
        batch.touched.add(session.session_id)
        packet_id = None
        if recipient.reserved is None or not self._serves(session, recipient):
            held.behind.add(session.session_id)  # so that the next one of this batch does not overtake it
        elif session.session_id in held.behind:
            batch.behind.add(session.session_id)
        else:
            packet_id = recipient.reserved.packet_id
        batch.writes.rows.append(
            QueueRow(
                session_id=session.session_id,
                ordinal=session.last_ordinal,
                message_id=message_id,
                qos=recipient.qos,
                retain=recipient.retain,
                identifiers=recipient.subscription_identifiers,
                size=message.size,
                packet_id=packet_id,
                waiting_for=session.node_id if packet_id is None else None,
            )
        )
        return Placement(session.session_id, session.last_ordinal, packet_id)

    def _no_room(
        self, item: _Item, living: Sequence[tuple[Recipient, Locked]], batch: _Batch
    ) -> ResourceExhausted | None:
        limits, publication = self._limits, item.publication
        size = publication.message.size
        if living and size > limits.queued_bytes:
            return QueueFull(f"a subscriber's queue takes {limits.queued_bytes} bytes; the message has {size}")
        full = [
            session
            for _, session in living
            if session.queued_messages >= limits.queued_messages or session.queued_bytes + size > limits.queued_bytes
        ]
        for session in full if item.routing is None else ():  # what a session is sent for itself holds up nobody else
            overdue = self._full.seen(session, self._steady())
            if overdue is not None:
                batch.overdue.add(overdue)
        if full:
            what = "messages" if full[0].queued_messages >= limits.queued_messages else "bytes"
            most = limits.queued_messages if what == "messages" else limits.queued_bytes
            return QueueFull(f"a subscriber's queue has its {most} {what}", retry_after=5.0)
        if not living:
            return None
        messages, held = self.tenant_queues.get(publication.tenant_id, (0, 0))
        if messages + len(living) > limits.tenant_messages or held + len(living) * size > limits.tenant_bytes:
            return QueueFull("the tenant's queues are full", retry_after=5.0)
        return None

    def _no_retention(self, item: _Item, held: _Held) -> ResourceExhausted | None:
        message = item.publication.message
        if item.routing is not None or not message.retain or not message.payload:
            return None
        retention = held.retention[item.publication.tenant_id]
        before = retention.sizes.get(message.topic)
        if before is None and retention.messages >= self._limits.retained_messages:
            return RetainedFull(f"the tenant has its {self._limits.retained_messages} retained messages")
        if retention.bytes - (before or 0) + message.size > self._limits.retained_bytes:
            return RetainedFull(f"the tenant has its {self._limits.retained_bytes} bytes of retained messages")
        return None

    def _retain(self, item: _Item, held: _Held, batch: _Batch) -> None:
        publication, message = item.publication, item.publication.message
        if item.routing is not None or not message.retain:
            return
        retention = held.retention[publication.tenant_id]
        before = retention.sizes.pop(message.topic, None)
        if before is not None:
            retention.messages -= 1
            retention.bytes -= before
        if message.payload:
            retention.sizes[message.topic] = message.size
            retention.messages += 1
            retention.bytes += message.size
        batch.writes.retained[publication.tenant_id, message.topic] = (
            (publication.device_id, message) if message.payload else None
        )


def _is_given_retained(item: _Item) -> bool:
    """A retained message on its way to a new subscription. What replaces it comes by the same session: where that is
    held, either the one that replaces it is known by now, or it comes behind."""
    return item.routing is not None and item.publication.message.retain


def _kept_now(tenant_id: TenantId, topic: str, held: _Held, batch: _Batch) -> Message | None:
    """What is retained under a topic, as of what stands in the batch so far."""
    if (tenant_id, topic) not in batch.writes.retained:
        return held.kept.get((tenant_id, topic))
    written = batch.writes.retained[tenant_id, topic]
    return None if written is None else written[1]


def _answer(waiting: asyncio.Future[Published], outcome: Outcome) -> None:
    if waiting.done():
        return
    if isinstance(outcome, BaseException):
        waiting.set_exception(outcome)
        waiting.exception()  # a caller that went away does not make this an unseen error
    else:
        waiting.set_result(outcome)


def _answer_late(waiting: asyncio.Future[Published], done: asyncio.Future[Published]) -> None:
    """However the batch ended: what was not answered with its transaction."""
    error = Unavailable("publications were stopped") if done.cancelled() else done.exception()
    _answer(waiting, error or done.result())
