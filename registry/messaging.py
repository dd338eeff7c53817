"""Brokered messaging of one node: what the broker must not lose, whatever happens to this process.

                    publish                       publishing.py        queues, retained, relays, QoS 2 ids
    adapter ──► ───────────────► Messaging ──┬──► message_routes.py    who wants what, in versions
    (Router) ◄──────────────────             ├──► stored_sessions.py   who serves a session; wills; fencing
                committed, queued, arrived   ├──► delivery_progress.py how far deliveries have come
                                             ├──► message_inbox.py     what other nodes have for us
                                             └──► message_hints.py     that they have something

The adapter matches filters and runs the protocol; this package stores, and tells it what to send. What is promised:

- An acknowledged QoS 1 or 2 message is in the queue of every stored session that subscribed before, connected or not,
  and is delivered from there after any crash. A QoS 2 message enters once and leaves once: its incoming id is stored
  with it, its outgoing packet id before it is sent, its PUBREC before the PUBREL.
- Sessions that end with their connection live in their node's memory. Messages for them cross nodes by relay rows; a
  node that dies takes its sessions along, and nothing is owed to them any more.
- A session that takes nothing while its queue is full is ended after a grace, and told so: it must not stop its topics.
- Tenants do not meet: routes, queues, retained messages and limits are each tenant's own.
- A stale owner, of a session or of a whole node, writes nothing: every write carries the session's epoch.

A node beats every two seconds. One that has not for fifteen is dead: its sessions are orphaned (their epochs rise), its
interests and relays go. If it was only cut off it finds itself struck off the list, evicts what it served, and writes
its interests again. Meanwhile, and in the seconds until it is noticed, a shared subscription may pick a member on
the dead node: that message is lost for the group. So is one whose chosen member leaves while it is on its way; its
node may publish it anew.

The seconds are everybody's own clock: nodes of one database keep their clocks together within a second or so, as
expiries and will delays are told by whichever node looks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

from registry.batching import Batcher
from registry.delivery_progress import DeliveryProgress, Kind, Step
from registry.errors import RegistryError, Unavailable
from registry.events import Event, EventKind
from registry.feed import Seen
from registry.full_queues import Standstill
from registry.grant_table import GrantTable
from registry.message_hints import MessageHints
from registry.message_inbox import MessageInbox
from registry.message_routes import KEEP_REMOVED_SECONDS, MessageRoutes
from registry.messaging_limits import DEFAULT_LIMITS, MessagingLimits
from registry.messaging_values import (
    Message,
    NodeRoute,
    Opening,
    Ownership,
    PendingWill,
    Publication,
    Published,
    Relay,
    Retained,
    Router,
    Routing,
    SessionKey,
    SessionRoute,
    StoredSessionId,
    StoredSubscription,
    Taken,
)
from registry.model import DeviceId, NodeId, ProfileId, TenantId
from registry.publishing import Publishing
from registry.queue_fronts import QueueFronts
from registry.storage import messaging as storage
from registry.storage import messaging_routes, messaging_sessions
from registry.storage.database import Database
from registry.stored_sessions import StoredSessions

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
DEAD_SECONDS = 15.0
"""Several beats: a pause of the database's or the node's must not look like a death."""
_COUNT_SECONDS = 5.0
"""How old the figure may be by which a tenant's queues are bounded."""
_UPKEEP_SECONDS = 30.0
_WILLS = 100
_WILL_RETRY_SECONDS = 10.0
_CHUNK = 1_000


class Messaging:
    """The service. Make it, `start` it with the adapter's router, `run` it in a task; `stop` it in the end."""

    def __init__(
        self,
        database: Database,
        node_id: NodeId,
        *,
        clock: Callable[[], float],
        random: Callable[[int], bytes],
        limits: MessagingLimits = DEFAULT_LIMITS,
        observe: Callable[[int, float], None] | None = None,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` gives seconds since 1970, `steady` seconds that nobody sets, `random(n)` n bytes.
        `observe(publications, seconds)`: each batch."""
        self.node_id = node_id
        self._database = database
        self._clock = clock
        self._steady = steady
        self._random = random
        self._limits = limits
        self._observe = observe
        self._incarnation = uuid4()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._dropped: set[DeviceId] = set()
        self._swept: UUID = UUID(int=0)
        self._relays_dropped = 0
        self._ended_full = 0
        self._alone = False
        self._heard = 0
        self._struck_off = False
        self._will_left = asyncio.Event()
        self.grants = GrantTable(database)

    # Life ---------------------------------------------------------------------------------------------------------

    async def start(self, router: Router) -> None:
        """Join. What an earlier process of this node held is let go. Before anything else. Raises Unavailable."""
        self._router = router
        self._inbox = MessageInbox(self._database, self.node_id, router)
        self._hints = hints = MessageHints(
            self._database, self.node_id, self._incarnation, wake=self._inbox.wake, heard=self._met_another
        )
        self._routes = MessageRoutes(self._database, self.node_id, router, hints.everybody)
        self._sessions = StoredSessions(
            self._database,
            self.node_id,
            clock=self._clock,
            limits=self._limits,
            hint=hints.these,
            hint_all=hints.everybody,
        )
        fronts = QueueFronts()
        self._progress = DeliveryProgress(self._database, self.node_id, freed=self._inbox.freed, fronts=fronts)
        self._publishing = Publishing(
            self._database,
            self.node_id,
            router,
            self._routes,
            clock=self._clock,
            random=self._random,
            limits=self._limits,
            hint=hints.these,
            inbox=self._inbox,
            fronts=fronts,
            overdue=self._overdue,
            observe=self._observe,
            steady=self._steady,
        )
        self._catching_up: Batcher[TenantId, None] = Batcher(
            "routes", self._catch_up, max_items=_CHUNK, max_queued=100 * _CHUNK
        )
        await self._clear_up_after(self.node_id)
        await self._join()
        hints.everybody()  # who was alone is not any more
        async with self._database.connection() as connection:
            self._alone = not await storage.has_others(connection, self.node_id)
            word = await messaging_sessions.word_for(connection, self.node_id)
            await messaging_sessions.remove_word(connection, self.node_id, word)  # it was for the earlier process

    async def run(self) -> None:
        """Take what other nodes bring, and do what the clock asks for; survives the loss of the database. Cancel it
        to stop, then call `stop`."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hints.run(), name="messaging listener")
            group.create_task(self._follow(), name="messaging inbox")
            group.create_task(self._keep_up(), name="messaging upkeep")

    async def stop(self) -> None:
        """Store what is queued, then leave the list of nodes. Sessions are to be released before."""
        await self._catching_up.stop()
        await self._publishing.stop()
        await self._progress.stop()
        await self._routes.stop()
        await self._sessions.stop()
        await self.settled()
        try:
            await self._clear_up_after(self.node_id)
            async with self._database.connection() as connection:
                await storage.leave(connection, self.node_id, self._incarnation)
        except Unavailable:
            log.info("messaging.left_unannounced", extra={"fields": {"node": self.node_id}})
        await self._hints.settled()

    async def settled(self) -> None:
        """Wait for what events have set off."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._hints.settled()

    @property
    def queued(self) -> int:
        """Publications that wait for a batch."""
        return self._publishing.queued

    @property
    def turned_away(self) -> int:
        """Publications for which there was no room to wait, since the start."""
        return self._publishing.turned_away

    @property
    def overflowed(self) -> int:
        """Publications refused because a queue had no room, since the start."""
        return self._publishing.overflowed

    @property
    def retained_full(self) -> int:
        """Publications refused because their tenant retains as much as it may, since the start."""
        return self._publishing.retained_full

    @property
    def sessions_refused(self) -> int:
        """Sessions that were not stored because their device has as many as it may, since the start."""
        return self._sessions.refused

    @property
    def ended_full(self) -> int:
        """Sessions that this node ended because their queues stayed full, since the start."""
        return self._ended_full

    @property
    def relays_dropped(self) -> int:
        """QoS 0 messages for other nodes that were dropped for want of room, since the start."""
        return self._relays_dropped

    # Sessions -----------------------------------------------------------------------------------------------------

    def serving(self, ownership: Ownership) -> None:
        """The router knows this session from now on: what the inbox met before is tried again at once."""
        self._inbox.freed({ownership.session_id})

    async def take(self, opening: Opening) -> Taken:
        """Begin a session, or go on with it, from wherever it was; its earlier owner is fenced off and told.

        With a `clean` opening, or an expiry of 0 and nothing stored, there is nothing to store: `ownership` is None.
        The will of such a session is stored all the same (`Taken.will`). Judge what comes back by the grants of now:
        subscriptions and queued messages are as they were. Raises Unavailable, OutcomeOpen (`disown` it then),
        ResourceExhausted (the device's sessions).
        """
        return await self._sessions.take(opening)

    async def release(
        self, ownership: Ownership, *, publish_will: bool, expiry: float | None = None, unsent: Sequence[int] = ()
    ) -> None:
        """The connection is gone: the expiry runs (0: the session ends), and with `publish_will` the will's delay.

        `expiry`: as DISCONNECT changed it. `unsent`: ordinals that were never sent, so that they may still expire.
        Duty: `await` what was submitted about the session before. May be repeated when it raises Unavailable or
        OutcomeOpen; until it succeeds the session counts as served. Raises SessionLost: somebody else has it.
        """
        await self._sessions.release(ownership, publish_will=publish_will, expiry=expiry, unsent=unsent)
        if publish_will:
            self._will_left.set()

    async def disown(self, key: SessionKey) -> bool:
        """Let a session go that a `take` of this node may have taken without an answer: nobody would serve it, and it
        would never expire. Whether it was so. Its will was armed by nobody who connected, and is dropped.

        Duty of the caller: nobody here serves a session of this key, takes it or releases it meanwhile. May be repeated
        when it raises Unavailable or OutcomeOpen.
        """
        return await self._sessions.disown(key)

    async def end(self, ownership: Ownership, *, publish_will: bool = False) -> None:
        """The session is over, and everything of it goes. Raises SessionLost, Unavailable, OutcomeOpen."""
        await self._sessions.end(ownership, publish_will=publish_will)

    async def subscribe(self, ownership: Ownership, subscriptions: Sequence[StoredSubscription]) -> None:
        """Add or replace subscriptions. When it returns, every later publication on any node finds them.

        Raises SessionLost, Unavailable.
        """
        await self._routes.subscribe(ownership, subscriptions)

    async def unsubscribe(self, ownership: Ownership, filters: Sequence[str]) -> None:
        """Remove subscriptions by their texts. Raises SessionLost, Unavailable."""
        await self._routes.unsubscribe(ownership, filters)

    async def watch(self, tenant_id: TenantId, filter_text: str, *, stored: bool, qos: int) -> None:
        """A session that is connected here has this subscription: other nodes relay what `NodeRoute` says.

        Counted: one call for each session and subscription, and one `unwatch` at its end. Before SUBACK for sessions
        that are not stored. Raises Unavailable.
        """
        await self._routes.watch(tenant_id, NodeRoute(self.node_id, filter_text, stored, qos))

    async def unwatch(self, tenant_id: TenantId, filter_text: str, *, stored: bool, qos: int) -> None:
        """The opposite of `watch`; never raises."""
        await self._routes.unwatch(tenant_id, NodeRoute(self.node_id, filter_text, stored, qos))

    async def follow_tenant(self, tenant_id: TenantId) -> None:
        """Load the tenant's routes into the router, and keep them current. Raises Unavailable.

        Publications do it by themselves; QoS 0 messages that go no further than this node's memory need it done.
        """
        if not self._routes.follows(tenant_id):
            async with self._database.connection() as connection:
                await self._routes.refresh(connection, [tenant_id])

    @property
    def alone(self) -> bool:
        """Whether no other node is known, so that the router's routes are all there are. Some milliseconds old."""
        return self._alone

    def catch_up(self, tenant_id: TenantId) -> asyncio.Future[None]:
        """When it is done, the router has every route that was acknowledged on any node before this call: for messages
        that do not go through `publish`, which sees to it itself. Done in the order of the calls.

        Raises Unavailable at once when too much waits; the future raises Unavailable.
        """
        return self._catching_up.submit(tenant_id)

    async def _catch_up(self, tenants: Sequence[TenantId]) -> list[None]:
        async with self._database.connection() as connection:
            await self._routes.refresh(connection, set(tenants))
        return [None] * len(tenants)

    def forget_tenant(self, tenant_id: TenantId) -> None:
        """Nobody of the tenant is connected here any more; the router may drop its routes."""
        self._routes.forget(tenant_id)

    # Messages in --------------------------------------------------------------------------------------------------

    def publish(self, publication: Publication) -> asyncio.Future[Published]:
        """Route and store a message. Every QoS 1 or 2 message goes this way, and every one to be retained.

        The future is done when it is committed: acknowledge then. `Router.committed` has been called before, in order.
        It raises QueueFull (nothing stored; 0x97), SessionLost (close), OutcomeOpen (close without an answer),
        Unavailable or InvalidArgument (nothing stored). Raises Unavailable at once when too much waits.
        """
        return self._publishing.publish(publication)

    async def published(self) -> None:
        """Return when everything that was given to `publish` before is stored or refused."""
        await self._publishing.published()

    def enqueue(self, publication: Publication, routing: Routing) -> asyncio.Future[Published]:
        """Store a message for exactly these recipients, as a retained message for a new subscription; retains nothing.

        As `publish`; raises RetainedReplaced, too. `Router.abandoned` or `committed` is called with this routing once.
        """
        return self._publishing.publish(publication, routing)

    def relay(self, publication: Publication, relays: Sequence[Relay]) -> bool:
        """Send a QoS 0 message to other nodes, best effort. False: no room, dropped and counted."""
        try:
            future = self._publishing.publish(publication, Routing(relays=tuple(relays)))
        except Unavailable:
            self._relays_dropped += 1
            return False
        future.add_done_callback(self._relayed)
        return True

    def _relayed(self, future: asyncio.Future[Published]) -> None:
        if future.cancelled() or future.exception() is not None:
            self._relays_dropped += 1

    # Messages out -------------------------------------------------------------------------------------------------

    def delivered(self, ownership: Ownership, ordinal: int) -> asyncio.Future[None]:
        """The subscriber has it, or it was discarded: its row goes. The futures here raise SessionLost, Unavailable."""
        return self._progress.submit(Step(Kind.DELIVERED, ownership, ordinal))

    def received(self, ownership: Ownership, ordinal: int) -> asyncio.Future[None]:
        """PUBREC came. When the future is done, PUBREL may be sent, and after any crash only that."""
        return self._progress.submit(Step(Kind.RECEIVED, ownership, ordinal))

    def released(self, ownership: Ownership, packet_id: int) -> asyncio.Future[None]:
        """PUBREL came. When the future is done, the id is forgotten and PUBCOMP may be sent."""
        return self._progress.submit(Step(Kind.RELEASED, ownership, packet_id))

    # Retained messages --------------------------------------------------------------------------------------------

    async def retained_topics(self, tenant_id: TenantId, prefix: str) -> list[str]:
        """Topics with a retained message that begin with `prefix`: a filter up to its first wildcard. Bounded by the
        tenant's limit. Match them, then ask for the messages in portions. Raises Unavailable."""
        async with self._database.connection() as connection:
            return await storage.retained_topics(connection, tenant_id, prefix, self._clock())

    async def retained(self, tenant_id: TenantId, topics: Sequence[str]) -> list[Retained]:
        """The retained messages of these topics that there are, by topic. Raises Unavailable."""
        async with self._database.connection() as connection:
            return await storage.retained(connection, tenant_id, topics, self._clock())

    async def forget_retained(self, tenant_id: TenantId, kept: Sequence[tuple[DeviceId, str]]) -> int:
        """Remove what these devices have retained under these topics, as when a grant is gone; how many there were.

        In chunks: the tenant's row is held meanwhile, and publications wait for it. Raises Unavailable; what was
        removed by then stays so.
        """
        gone = [(tenant_id, *each) for each in sorted(set(kept))]
        total = 0
        for start in range(0, len(gone), _CHUNK):
            async with self._database.transaction() as connection:
                total += await storage.remove_retained(connection, gone[start : start + _CHUNK])
        return total

    async def retained_of_profile(self, tenant_id: TenantId, profile_id: ProfileId) -> list[tuple[DeviceId, str]]:
        """Publisher and topic of what devices of a profile have retained: judge them when its grants change."""
        async with self._database.connection() as connection:
            return await storage.retained_of_profile(connection, tenant_id, profile_id)

    async def retained_of_device(self, tenant_id: TenantId, device_id: DeviceId) -> list[tuple[DeviceId, str]]:
        """The same of one device, which may be deleted."""
        async with self._database.connection() as connection:
            return await storage.retained_of_device(connection, tenant_id, device_id)

    # Offline state, when grants change ----------------------------------------------------------------------------

    async def offline_of_profile(self, tenant_id: TenantId, profile_id: ProfileId) -> list[SessionRoute]:
        """Subscriptions of sessions that nobody serves, of devices of a profile. Raises Unavailable."""
        async with self._database.connection() as connection:
            return await messaging_routes.offline_of_profile(connection, tenant_id, profile_id)

    async def offline_of_device(self, tenant_id: TenantId, device_id: DeviceId) -> list[SessionRoute]:
        """The same of one device."""
        async with self._database.connection() as connection:
            return await messaging_routes.offline_of_device(connection, tenant_id, device_id)

    async def offline_topics(self, session_id: StoredSessionId) -> list[str]:
        """Topics of the messages that wait in a session's queue and were never sent. Raises Unavailable."""
        async with self._database.connection() as connection:
            return await storage.queued_topics(connection, session_id)

    async def withdraw(self, session_id: StoredSessionId, *, filters: Sequence[str], topics: Sequence[str]) -> None:
        """Take subscriptions and waiting messages from a session that nobody serves; one that somebody serves by now
        is left to him, who judges what he takes. Raises Unavailable."""
        async with self._database.transaction() as connection:
            held = (await messaging_sessions.lock(connection, [session_id])).get(session_id)
            if held is None or held.node_id is not None:
                return
            if filters:
                tenant_id = held.key.tenant_id
                versions = await messaging_routes.raise_versions(connection, [tenant_id])
                gone = [(tenant_id, session_id, text) for text in filters]
                await messaging_routes.remove_filters(connection, versions, gone)
            if topics:
                rows = await storage.rows_of_topics(connection, session_id, topics)
                await messaging_sessions.remove_rows(connection, rows)
        if filters:
            self._hints.everybody()

    # The feed's follower ------------------------------------------------------------------------------------------

    async def follow(self, seen: Seen) -> None:
        """Drop what a revocation ended; tell the router of devices and profiles that changed."""
        event = seen.event
        if event.kind is EventKind.PROFILE_UPDATED and "topic_grants" in _changed(event):
            profile_id = ProfileId(str(event.data.get("profile_id")))
            self._spawn(self._regrant(event.tenant_id, profile_id), "messaging grants")
        if event.device_id is None:
            return
        if event.kind in (EventKind.CREDENTIAL_REVOKED, EventKind.DEVICE_DEACTIVATED, EventKind.DEVICE_DELETED):
            self._dropped.add(event.device_id)
            self._spawn(self._drop(), "messaging drop")
        moved = event.kind is EventKind.DEVICE_UPDATED and "profile_id" in _changed(event)
        if moved or event.kind is EventKind.DEVICE_DELETED:
            self.grants.forget_device(event.device_id)
            self._router.device_changed(event.tenant_id, event.device_id)

    async def restored(self) -> None:
        """The feed was away; the grants are read again."""
        self.grants.forget_all()

    async def _regrant(self, tenant_id: TenantId, profile_id: ProfileId) -> None:
        try:
            await self.grants.reread(tenant_id, profile_id)
        except Unavailable:
            return  # the sweep compares what is remembered
        self._router.grants_changed(tenant_id, profile_id)

    async def _drop(self) -> None:
        devices, self._dropped = self._dropped, set()
        if not devices:
            return
        try:
            await self._sessions.drop_forfeited(devices)
        except Unavailable:
            pass  # the sweep comes, and whoever takes one of these sessions looks as well

    def _overdue(self, still: Standstill) -> None:
        self._spawn(self._end_full(still), "messaging full queue")

    async def _end_full(self, still: Standstill) -> None:
        try:
            if await self._sessions.end_full(still):
                self._ended_full += 1
                log.warning("messaging.session_ended_full", extra={"fields": {"session": still.session_id}})
        except Unavailable:
            pass  # the next publication finds it full again

    def _met_another(self) -> None:
        self._heard += 1
        self._alone = False

    # Loops --------------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            try:
                await self._inbox.pull()
                async with self._database.connection() as connection:
                    await self._routes.refresh(connection, self._routes.followed(), followed_only=True)
            except Unavailable:
                await asyncio.sleep(0.2)
            await self._inbox.wait()

    async def _keep_up(self) -> None:
        loop = asyncio.get_running_loop()
        next_beat = next_count = next_upkeep = loop.time()
        while True:
            try:
                if loop.time() >= next_beat:
                    next_beat = loop.time() + BEAT_SECONDS
                    await self._beat()
                await self.tick()
                if loop.time() >= next_count:
                    next_count = loop.time() + _COUNT_SECONDS
                    await self.count_queues()
                if loop.time() >= next_upkeep:
                    next_upkeep = loop.time() + _UPKEEP_SECONDS
                    await self.prune()
            except Unavailable:
                pass  # the next turn tries again
            await self._pause(0.5)

    async def _pause(self, seconds: float) -> None:
        """Wait so long; wills that connections leave behind meanwhile need not."""
        until = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                async with asyncio.timeout_at(until):
                    await self._will_left.wait()
            except TimeoutError:
                return
            self._will_left.clear()
            try:
                await self._publish_wills()
            except Unavailable:
                await asyncio.sleep(seconds)
                return

    async def tick(self) -> None:
        """What the clock asks for often: expired sessions, due wills, changed grants. Raises Unavailable."""
        await self._sessions.expire()
        await self._publish_wills()
        for tenant_id, profile_id in await self.grants.refresh():
            self._router.grants_changed(tenant_id, profile_id)

    async def count_queues(self) -> None:
        """Learn how much waits in the queues of the tenants that are served here. Raises Unavailable."""
        async with self._database.connection() as connection:
            self._publishing.tenant_queues = await storage.queued_by_tenant(connection, self._routes.followed())

    async def prune(self) -> None:
        """What it asks for rarely: what expired or lost its last user, missed revocations. Raises Unavailable."""
        await self._routes.tidy()
        await self._sessions.drop_forfeited()
        now = self._clock()
        while True:
            async with self._database.transaction() as connection:
                rows = await storage.expired_rows(connection, now, _CHUNK)
                if rows:
                    held = await messaging_sessions.lock(connection, {session_id for session_id, _ in rows})
                    # An owner may have taken charge before the rows were held.
                    still = await storage.expired_rows(connection, now, _CHUNK)
                    await messaging_sessions.remove_rows(connection, [row for row in still if row[0] in held])
            if len(rows) < _CHUNK:
                break
        while True:
            async with self._database.transaction() as connection:
                found = await storage.remove_expired_retained(connection, now, _CHUNK)
            if found < _CHUNK:
                break
        async with self._database.transaction() as connection:
            await messaging_routes.sweep(connection, _CHUNK)
            await messaging_routes.prune(connection, KEEP_REMOVED_SECONDS, 10 * _CHUNK)
            await storage.prune_evictions(connection, KEEP_REMOVED_SECONDS)
        async with self._database.transaction() as connection:
            self._swept, _ = await storage.sweep_bodies(connection, self._swept, 5 * _CHUNK)

    async def _publish_wills(self) -> None:
        while True:
            async with self._database.connection() as connection:
                due = await _due_wills(connection, self._clock())
            outcomes = await asyncio.gather(
                *(self._publish_will(will_id, publication) for will_id, publication in due), return_exceptions=True
            )
            for (will_id, _), outcome in zip(due, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    match outcome:
                        case RegistryError(code=code):
                            log.warning("messaging.will_postponed", extra={"fields": {"reason": code.value}})
                        case Exception():  # one that cannot be handled: the others are not to blame
                            log.error("messaging.will_not_handled", exc_info=outcome)
                        case _:
                            raise outcome
                    async with self._database.connection() as connection:
                        await messaging_sessions.postpone_will(connection, will_id, self._clock() + _WILL_RETRY_SECONDS)
            if len(due) < _WILLS:
                return

    async def _publish_will(self, will_id: int, publication: Publication) -> None:
        found = await self.grants.of_device(publication.tenant_id, publication.device_id)
        due = replace(publication, origin=PendingWill(will_id, found.grants))
        if await self._router.will_due(due):  # it is kept elsewhere: all that is left is to take it from the store
            due = replace(due, message=replace(due.message, retain=False))
        await self._publishing.publish(due)

    async def _beat(self) -> None:
        async with self._database.connection() as connection:
            alive = await storage.beat(connection, self.node_id, self._incarnation)
        if not alive:
            await self._rejoin()
        if self._struck_off:  # however often the database goes away meanwhile
            await self._routes.write_again()
            self._struck_off = False
            self._inbox.wake()  # for the evictions
        async with self._database.connection() as connection:
            dead = await storage.unlisted_owners(connection)
            dead += await storage.take_dead(connection, DEAD_SECONDS)
            heard = self._heard
            others = await storage.has_others(connection, self.node_id)
            if heard == self._heard:  # else another one has come after it was looked for
                self._alone = not others
        for node_id in dead:
            log.warning("messaging.node_dead", extra={"fields": {"node": node_id}})
            await self._clear_up_after(node_id)

    async def _rejoin(self) -> None:
        """Others took this node for dead, and gave its sessions away."""
        log.warning("messaging.struck_off", extra={"fields": {"node": self.node_id}})
        self._struck_off = True
        await self._clear_up_after(self.node_id)
        await self._join()

    async def _clear_up_after(self, node_id: NodeId) -> None:
        """Let go of everything that a process of this node held. Raises Unavailable; then it is done again later."""
        await self._sessions.drop_forfeited()  # a revocation that it did not follow any more: no wills of these
        while True:
            async with self._database.transaction() as connection:
                if await storage.hold_node(connection, node_id) and node_id != self.node_id:
                    return  # it is back, and has cleared up itself
                if await self._sessions.orphan(connection, node_id):
                    continue
                if await messaging_routes.remove_node(connection, node_id, _CHUNK):
                    continue
                await storage.remove_node(connection, node_id)
            break
        self._hints.everybody()

    async def _join(self) -> None:
        async with self._database.transaction() as connection:
            await storage.hold_node(connection, self.node_id)
            await storage.join(connection, self.node_id, self._incarnation)

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _changed(event: Event) -> Sequence[object]:
    """The names of the fields that an update changed."""
    changed = event.data.get("changed")
    return changed if isinstance(changed, list) else ()


async def _due_wills(connection: Any, now: float) -> list[tuple[int, Publication]]:
    """Due wills as publications, their message's expiry beginning now."""
    return [
        (
            row["will_id"],
            Publication(
                row["tenant_id"],
                row["device_id"],
                Message(
                    row["topic"],
                    row["payload"],
                    row["qos"],
                    row["retain"],
                    row["properties"],
                    None if row["expires_after"] is None else now + row["expires_after"],
                ),
            ),
        )
        for row in await messaging_sessions.due_wills(connection, now, _WILLS)
    ]
