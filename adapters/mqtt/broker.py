"""The broker among the granted topics of one tenant: who gets which message, on this node and beyond.

    PUBLISH, QoS 1, 2 or retained ─► Messaging.publish ─► route ─► commit ─► committed ─► sessions of this node
    PUBLISH, QoS 0 ────────────────► the same plan, from memory ─► sessions of this node, relays to other nodes
                      (with other nodes, new routes are read before)
    another node's ────────────────► arrived, queued ─► sessions of this node

The store (registry/messaging.py) keeps what must not be lost and calls the methods of its `Router` here; what a filter
matches is decided here only. For each tenant there is one table of who wants what, a trie (topics.py), with three
kinds of entries:

    SessionRoute   a stored session's subscription, wherever it is connected, or nowhere. Told by `changed`
    NodeRoute      another node has sessions that want this. Told by `changed`
    _Local         a session of this node that ends with its connection. Put in by `subscribe`

A stored session gets QoS 1 and 2 through its queue in the store, and QoS 0 from memory while it is connected here. A
session that is not stored gets everything from memory; if it does not keep up with QoS 1 and 2 it is disconnected with
0x97 instead of losing something silently. QoS 0 that cannot be sent at once is dropped and counted.

Shared subscriptions: each message goes to one member (5.0 §4.8.2). The node that has the message chooses: by turns,
first among its own that are connected and among other nodes, else a stored one that is away.

Grants are judged when somebody subscribes and publishes, when a stored session is taken up again, when a will is due,
and for everything there is (live, offline, retained) when a profile's grants change or a device gets another profile.
A role is a member of its tenant before it is judged for the last time, so a change either finds it or is found by it.

What can race: a subscription ends while a message for it is on its way; it may still arrive (5.0 §3.10.4 permits it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, assert_never

from adapters.mqtt.authorization import (
    Brokered,
    may_publish,
    may_receive,
    may_subscribe,
    reserved,
    subscribe_target,
)
from adapters.mqtt.fan_out import FanOut
from adapters.mqtt.messages import (
    delivery_of_queued,
    filter_of,
    from_store,
    subscription_from_store,
    subscription_to_store,
    to_store,
)
from adapters.mqtt.session import Untaken
from adapters.mqtt.session_values import (
    Delivery,
    Message,
    Receipt,
    Subscription,
    delivery_of,
)
from adapters.mqtt.topics import SharedGroup, Subscriptions
from adapters.mqtt.wire_packets import QoS
from adapters.mqtt.wire_reasons import ReasonCode
from registry.errors import RegistryError, ResourceExhausted, Unavailable
from registry.messaging import Messaging
from registry.messaging_values import (
    Arrival,
    Eviction,
    Incoming,
    NodeRoute,
    Ownership,
    PendingWill,
    Publication,
    Published,
    QueuedMessage,
    Recipient,
    Relay,
    Reserved,
    Retained,
    RouteChange,
    Routing,
    SessionKey,
    SessionLost,
    SessionRoute,
    StoredSessionId,
    StoredSubscription,
)
from registry.model import DeviceId, NodeId, ProfileId, TenantId
from registry.topic_grants import TopicGrant

if TYPE_CHECKING:
    from adapters.mqtt.device import DeviceRole
    from adapters.mqtt.server import MqttServer

AGAIN_SECONDS: Final = 1.0
"""After this, what the database could not do is tried again."""


UNSERVED_SECONDS: Final = 60.0
"""So long are the routes of a tenant kept that were read for a message of somebody who has left, such as a will."""


_AT_ONCE: Final = 64
"""To so many receivers a message of QoS 0 goes in one step."""
_AS_ONE_PACKET: Final = 4
"""Receivers that take as much of their publisher's turn as a packet that it sends."""


@dataclass(frozen=True, slots=True, eq=False)
class _Local:
    """A subscription of a session that is not stored."""

    role: DeviceRole
    subscription: Subscription


_Route = SessionRoute | NodeRoute | _Local
_Judging = asyncio.Task[None]
_Key = Any  # a StoredSessionId, a NodeRoute, or a DeviceRole: whoever may have one entry under one filter


@dataclass(slots=True)
class _Plan:
    """Where one message goes; `local` are sessions that get it from memory."""

    message: Message
    local: dict[DeviceRole, list[Subscription]] = field(default_factory=dict)
    stored: dict[StoredSessionId, list[StoredSubscription]] = field(default_factory=dict)
    relays: dict[NodeId, tuple[bool, list[str]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _FromHere(Publication):
    """A publication whose publisher is connected here, for No Local."""

    publisher: DeviceRole | None = field(default=None, repr=False, compare=False)


@dataclass(slots=True)
class _Tenant:
    table: Subscriptions[_Key, _Route] = field(default_factory=Subscriptions)
    members: dict[DeviceId, set[DeviceRole]] = field(default_factory=dict)
    """Who is connected here, by device."""
    shared: dict[str, SharedGroup[DeviceRole, Subscription]] = field(default_factory=dict)
    """Own members by the text of their shared filter, to take what other nodes relay."""

    def roles(self) -> tuple[DeviceRole, ...]:
        """All members."""
        return tuple(role for of_device in self.members.values() for role in of_device)


class Broker:
    """Routes the messages of one node. It is the store's `Router`."""

    def __init__(self, server: MqttServer, messaging: Messaging) -> None:
        self.server = server
        self.messaging = messaging
        self._tenants: dict[TenantId, _Tenant] = {}
        self._served: dict[StoredSessionId, DeviceRole] = {}
        self._fan_out = FanOut(lambda work: server.track(server.loop.create_task(work, name="mqtt fan-out")))

    # Members --------------------------------------------------------------------------------------------------------

    def serve(self, role: DeviceRole) -> None:
        """A session was taken: what comes for it, if it is stored, and word of its end come to this role."""
        if role.held is not None:
            self._served[role.held.session_id] = role
            self.messaging.serving(role.held)

    async def enter(self, role: DeviceRole) -> None:
        """A device with grants, or with inherited subscriptions, is about to be accepted. Raises Unavailable."""
        self._tenant(role.tenant_id).members.setdefault(role.own, set()).add(role)
        await role.judge()  # from now on whoever changes the grants finds it: what it was told before may be old
        for subscription in tuple(role.mqtt.subscriptions.values()):
            if isinstance(subscribe_target(subscription.filter, role.own), Brokered):
                await self._join(role, subscription)

    def leave(self, role: DeviceRole) -> None:
        """Its connection is gone."""
        if role.held is not None and self._served.get(role.held.session_id) is role:
            del self._served[role.held.session_id]
        tenant = self._tenants.get(role.tenant_id)
        if tenant is None:
            return
        for subscription in role.brokered.values():
            self._take_out(tenant, role, subscription)
            self._spawn(partial(self._unwatch, role, subscription))
        role.brokered.clear()
        of_device = tenant.members.get(role.own, set())
        of_device.discard(role)
        if not of_device:
            tenant.members.pop(role.own, None)
        self._forget_if_empty(role.tenant_id)

    async def follow(self, role: DeviceRole) -> None:
        """Have the tenant's routes at hand. Raises Unavailable, and SessionLost where the connection has ended."""
        await self.messaging.follow_tenant(role.tenant_id)
        if not self._is_member(role):
            self._forget_if_empty(role.tenant_id)
            raise SessionLost

    async def subscribe(self, role: DeviceRole, subscriptions: Sequence[Subscription]) -> None:
        """Add or replace granted subscriptions, before SUBACK. Raises SessionLost, Unavailable."""
        if role.ownership is not None:
            await self.messaging.subscribe(role.ownership, [subscription_to_store(each) for each in subscriptions])
        for subscription in subscriptions:
            if isinstance(subscribe_target(subscription.filter, role.own), Brokered):
                await self._join(role, subscription)  # what comes down from the core is kept with the session only

    async def unsubscribe(self, role: DeviceRole, subscriptions: Sequence[Subscription]) -> None:
        """Remove subscriptions, before UNSUBACK. Raises SessionLost, Unavailable."""
        if role.ownership is not None:
            await self.messaging.unsubscribe(role.ownership, [each.filter.text for each in subscriptions])
        for subscription in subscriptions:
            known = role.brokered.pop(subscription.filter.text, None)
            tenant = self._tenants.get(role.tenant_id)
            if known is not None and tenant is not None:
                self._take_out(tenant, role, known)
                await self._unwatch(role, known)

    # Messages -------------------------------------------------------------------------------------------------------

    def publish(self, role: DeviceRole, message: Message, receipt: Receipt) -> asyncio.Future[Published]:
        """Store and route a message of QoS 1 or 2, or one to be retained. As `Messaging.publish`."""
        ownership = role.ownership
        origin = None
        if ownership is not None and receipt.qos is QoS.EXACTLY_ONCE:
            origin = Incoming(ownership, receipt.packet_id)
        sender = None if ownership is None else ownership.session_id
        return self.messaging.publish(
            _FromHere(role.tenant_id, role.own, to_store(message, self.server.ahead), origin, sender, publisher=role)
        )

    def publish_unsure(self, role: DeviceRole, message: Message, later: Callable[[], None]) -> bool:
        """Send a message of QoS 0 that is not retained to whoever is there. True: done; else `later` is called then.

        Where there are other nodes, what was subscribed there before is asked for first. To many receivers it goes in
        steps, and to few it takes of its publisher's turn.
        """
        if not self.messaging.alone:
            try:
                future = self.messaging.catch_up(role.tenant_id)
            except Unavailable:
                pass  # what is known has to do, as when the future fails
            else:
                future.add_done_callback(partial(self._caught_up, role, message, later))
                return False
        if self._fan_out.busy(role.tenant_id):
            self._fan_out.put(role.tenant_id, self._give_unsure(role, message), later)
            return False
        plan = self._plan_unsure(role, message)
        if len(plan.local) > _AT_ONCE:
            self._fan_out.put(role.tenant_id, self._give_local(plan), later)
            return False
        for _ in self._give_local(plan):
            pass
        machine = role.peer.machine
        if machine.turn is not None:
            machine.turn -= len(plan.local) // _AS_ONE_PACKET
        return True

    def _caught_up(self, role: DeviceRole, message: Message, later: Callable[[], None], _: object) -> None:
        self._fan_out.put(role.tenant_id, self._give_unsure(role, message), later)

    def _give_unsure(self, role: DeviceRole, message: Message) -> Iterator[None]:
        """Planned when its turn comes: plans for crowds are large, and a line of them is as long as all publishers of a
        tenant may have messages unanswered. Who was revoked meanwhile says nothing more."""
        if not role.revoked:
            yield from self._give_local(self._plan_unsure(role, message))

    def _plan_unsure(self, role: DeviceRole, message: Message) -> _Plan:
        """Where it goes; to other nodes at once."""
        sender = None if role.ownership is None else role.ownership.session_id
        publication = _FromHere(
            role.tenant_id, role.own, to_store(message, self.server.ahead), None, sender, publisher=role
        )
        plan = self._planned(publication, message)
        if plan.relays:
            self.messaging.relay(publication, _relays(plan))
        return plan

    async def enqueue(self, role: DeviceRole, ownership: Ownership, delivery: Delivery, kept: Retained) -> bool:
        """Put a retained message into a stored session's queue; False: there is no room now.

        Raises RetainedReplaced, SessionLost, Unavailable.
        """
        packet_id = role.mqtt.reserve(delivery.message.size)
        if isinstance(packet_id, Untaken):
            return False
        recipient = Recipient(
            ownership.session_id,
            delivery.qos,
            True,
            delivery.subscription_identifiers,
            Reserved(ownership.epoch, packet_id),
        )
        publication = Publication(role.tenant_id, kept.device_id, kept.message)
        try:
            await self.messaging.enqueue(publication, Routing((recipient,), (), _Plan(delivery.message)))
        except ResourceExhausted:
            return False
        return True

    # What the store asks (registry.messaging_values.Router) ---------------------------------------------------------

    def changed(self, tenant_id: TenantId, changes: Sequence[RouteChange], *, whole: bool) -> None:
        tenant = self._tenant(tenant_id)
        if whole:
            tenant.table = Subscriptions()
            for role in tenant.roles():
                if role.ownership is None:
                    for subscription in role.brokered.values():
                        tenant.table.add(subscription.filter, role, _Local(role, subscription))
            if not tenant.members:
                self.server.loop.call_later(UNSERVED_SECONDS, self._forget_if_empty, tenant_id)
        for change in changes:
            match change.route:
                case SessionRoute(session_id, _, kept) as route:
                    key: _Key = session_id
                    topic_filter = filter_of(kept.filter)
                case NodeRoute() as route:
                    key, topic_filter = route, filter_of(route.filter)
            if reserved(topic_filter.levels):
                continue
            if change.removed:
                tenant.table.remove(topic_filter, key)
            else:
                tenant.table.add(topic_filter, key, route)

    def route(self, publication: Publication) -> Routing | None:
        message = from_store(publication.message, self.server.ahead)
        name = tuple(message.topic.split("/"))
        if isinstance(publication.origin, PendingWill):
            if reserved(name):
                return Routing()  # the will of an uplink's topic, which is stored as one by now
            if not may_publish(publication.origin.grants, name, publication.device_id):
                return None
        plan = self._planned(publication, message)
        recipients = tuple(self._recipient(plan, session_id, kept) for session_id, kept in plan.stored.items())
        return Routing(recipients, _relays(plan), plan, len(plan.local))

    async def will_due(self, publication: Publication) -> bool:
        message = from_store(publication.message, self.server.ahead)
        if not isinstance(publication.origin, PendingWill) or not reserved(tuple(message.topic.split("/"))):
            return False
        await self.server.devices.store_will(publication, publication.origin.will_id, message)
        return True

    def abandoned(self, publication: Publication, routing: Routing) -> None:
        for recipient in routing.recipients:
            self._give_back(recipient)

    def committed(self, publication: Publication, published: Published) -> Iterator[None]:
        context = published.routing.context
        if not isinstance(context, _Plan):
            return
        yield from self._give_local(context)
        recipients = {each.session_id: each for each in published.routing.recipients}
        for placement in published.placements:
            recipient = recipients[placement.session_id]
            if placement.packet_id is None:
                self._give_back(recipient)
                continue
            role = self._served.get(placement.session_id)
            if role is None or role.ownership is None or recipient.reserved is None:
                continue
            if role.ownership.epoch != recipient.reserved.epoch:
                continue
            _retained_anew(role, context.message)
            delivery = Delivery(
                context.message,
                QoS(recipient.qos),
                recipient.retain,
                recipient.subscription_identifiers,
                placement.ordinal,
            )
            role.peer.run(partial(role.mqtt.deliver, delivery, self.server.now(), placement.packet_id))
            yield

    def reserve(self, ownership: Ownership, size: int) -> int | None:
        role = self._owner(ownership)
        packet_id = None if role is None else role.mqtt.reserve(size)
        return None if isinstance(packet_id, Untaken) else packet_id

    def unreserve(self, ownership: Ownership, packet_id: int) -> None:
        role = self._owner(ownership)
        if role is not None:
            role.mqtt.unreserve(packet_id)

    def queued(self, ownership: Ownership, queued: QueuedMessage) -> None:
        role = self._owner(ownership)
        if role is None:
            return
        if not role.may_hear(queued.message.topic):  # it was queued elsewhere, and has lost its grant meanwhile
            role.mqtt.unreserve(queued.packet_id)
            role.finished(queued.ordinal)
            return
        delivery = delivery_of_queued(queued, self.server.ahead)
        _retained_anew(role, delivery.message)
        role.peer.run(partial(role.mqtt.deliver, delivery, self.server.now(), queued.packet_id))

    def arrived(self, arrival: Arrival) -> Iterator[None]:
        tenant = self._tenants.get(arrival.tenant_id)
        if tenant is None:
            return
        message = from_store(arrival.message, self.server.ahead)
        plan = _Plan(message)
        if arrival.direct:
            for _, route in tenant.table.match(tuple(message.topic.split("/"))).subscribers:
                match route:
                    case _Local(role, subscription):
                        plan.local.setdefault(role, []).append(subscription)
                    case SessionRoute(session_id, _, kept):
                        role_here = self._served.get(session_id)
                        if role_here is not None and min(kept.qos, message.qos) == 0:
                            plan.local.setdefault(role_here, []).append(subscription_from_store(kept))
                    case NodeRoute():
                        pass
        for text in arrival.shared:
            group = tenant.shared.get(text)
            chosen = None if group is None else group.pick(lambda role: role.ready)
            if chosen is not None:
                plan.local.setdefault(chosen[0], []).append(chosen[1])
        yield from self._give_local(plan)

    def evicted(self, ownership: Ownership, *, why: Eviction = Eviction.TAKEN) -> None:
        role = self._served.get(ownership.session_id)
        if role is None:
            self.server.devices.evicted_early(ownership)
            return
        if role.held != ownership or not role.peer.alive:  # the same word may come twice
            return
        match why:  # its will is the store's
            case Eviction.FULL:
                self._end_soon(role, ReasonCode.QUOTA_EXCEEDED)
            case Eviction.LOST:
                self._end_soon(role, ReasonCode.SERVER_BUSY)
            case Eviction.TAKEN:
                self.server.counters.taken_over += 1
                self._end_soon(role, ReasonCode.SESSION_TAKEN_OVER)
            case _:
                assert_never(why)

    def taken(self, key: SessionKey, number: int) -> None:
        self.server.devices.taken_elsewhere((key.tenant_id, key.device_id, key.client_id), number)

    def grants_changed(self, tenant_id: TenantId, profile_id: ProfileId) -> None:
        tenant = self._tenants.get(tenant_id)
        roles = () if tenant is None else tenant.roles()
        live = [role.peer.start(self._judge_live(role)) for role in roles if role.may_have_profile(profile_id)]
        self._spawn(partial(self._judge_profile, tenant_id, profile_id, live))

    def device_changed(self, tenant_id: TenantId, device_id: DeviceId) -> None:
        tenant = self._tenants.get(tenant_id)
        roles = () if tenant is None else tuple(tenant.members.get(device_id, ()))
        live = [role.peer.start(self._judge_live(role)) for role in roles]
        self._spawn(partial(self._judge_device, tenant_id, device_id, live))

    # Planning -------------------------------------------------------------------------------------------------------

    def _planned(self, publication: Publication, message: Message) -> _Plan:
        plan = _Plan(message)
        tenant = self._tenants.get(publication.tenant_id)
        if tenant is None:
            return plan
        found = tenant.table.match(tuple(message.topic.split("/")))
        for _, route in found.subscribers:
            self._add(plan, route, publication, None)
        for group in found.groups:
            chosen = self._chosen(group, message)
            if chosen is not None:
                self._add(plan, chosen, publication, group)
        return plan

    def _add(
        self, plan: _Plan, route: _Route, publication: Publication, group: SharedGroup[_Key, _Route] | None
    ) -> None:
        match route:
            case _Local(role, subscription):
                own = isinstance(publication, _FromHere) and publication.publisher is role
                if not (own and subscription.no_local):
                    plan.local.setdefault(role, []).append(subscription)
            case SessionRoute(session_id, _, kept):
                if kept.no_local and session_id == publication.sender:
                    return
                if min(kept.qos, plan.message.qos) > 0:
                    plan.stored.setdefault(session_id, []).append(kept)
                elif (role_here := self._served.get(session_id)) is not None:
                    plan.local.setdefault(role_here, []).append(subscription_from_store(kept))
            case NodeRoute(node_id, text, stored, qos):
                if stored and min(qos, plan.message.qos) > 0:
                    return
                direct, shared = plan.relays.get(node_id, (False, []))
                plan.relays[node_id] = (direct or group is None, shared if group is None else [*shared, text])

    def _chosen(self, group: SharedGroup[_Key, _Route], message: Message) -> _Route | None:
        def able(key: _Key) -> bool:
            route = group.members[key]
            match route:
                case _Local():
                    return True
                case SessionRoute(session_id, _, kept):
                    return min(kept.qos, message.qos) > 0 or session_id in self._served
                case NodeRoute(_, _, stored, qos):
                    return not stored or min(qos, message.qos) == 0

        def ready(key: _Key) -> bool:
            route = group.members[key]
            match route:
                case _Local(role, _):
                    return role.ready
                case SessionRoute(session_id, _, _):
                    role_here = self._served.get(session_id)
                    return role_here is not None and role_here.ready
                case NodeRoute():
                    return able(key)

        picked = group.pick(ready)
        if picked is not None and able(picked[0]):
            return picked[1]
        return next((route for key, route in group.members.items() if able(key)), None)

    def _recipient(self, plan: _Plan, session_id: StoredSessionId, kept: Sequence[StoredSubscription]) -> Recipient:
        role = self._served.get(session_id)
        if role is not None:  # what it would get with QoS 0 besides is the same message
            for subscription in plan.local.pop(role, ()):
                kept = [*kept, subscription_to_store(subscription)]
        place: Reserved | None = None
        if role is not None and role.ownership is not None:
            packet_id = role.mqtt.reserve(plan.message.size)
            if not isinstance(packet_id, Untaken):
                place = Reserved(role.ownership.epoch, packet_id)
        return Recipient(
            session_id,
            min(plan.message.qos, max(each.qos for each in kept)),
            plan.message.retain and any(each.retain_as_published for each in kept),
            tuple(each.identifier for each in kept if each.identifier is not None),
            place,
        )

    # Handing out ----------------------------------------------------------------------------------------------------

    def _give_local(self, plan: _Plan) -> Iterator[None]:
        """A receiver in each step."""
        for role, subscriptions in plan.local.items():
            delivery = delivery_of(plan.message, subscriptions, own=False)
            if delivery is not None:
                role.peer.run(partial(self._give, role, delivery))
            yield

    def _give(self, role: DeviceRole, delivery: Delivery) -> None:
        _retained_anew(role, delivery.message)
        taken = role.mqtt.deliver(delivery, self.server.now())
        match taken:
            case Untaken.QUEUE_FULL:
                self._end_soon(role, ReasonCode.QUOTA_EXCEEDED)
            case Untaken():
                self.server.counters.dropped += 1
            case _:
                pass

    def _give_back(self, recipient: Recipient) -> None:
        role = self._served.get(recipient.session_id)
        if role is None or role.ownership is None or recipient.reserved is None:
            return
        if role.ownership.epoch == recipient.reserved.epoch:
            role.mqtt.unreserve(recipient.reserved.packet_id)

    def _end_soon(self, role: DeviceRole, reason: ReasonCode) -> None:
        """Not at once: the store is in the middle of handing out. The session may be ours still, where only the outcome
        of a commit is open, and then the will is as well."""
        self.server.loop.call_soon(partial(role.peer.end, reason, publish_will=True))

    # Grants that change ---------------------------------------------------------------------------------------------

    async def _judge_live(self, role: DeviceRole) -> None:
        try:
            await role.judge()
        except SessionLost:
            role.peer.end(ReasonCode.SESSION_TAKEN_OVER, publish_will=True)
        except RegistryError:  # nobody stays by grants of yesterday; it is judged when it is back
            role.peer.end(ReasonCode.SERVER_BUSY, publish_will=True)

    async def _judge_profile(self, tenant_id: TenantId, profile_id: ProfileId, live: Sequence[_Judging]) -> None:
        await self._said_before(live)
        messaging = self.messaging
        grants = await messaging.grants.grants_of(tenant_id, profile_id)
        await self._judge_offline(grants, await messaging.offline_of_profile(tenant_id, profile_id))
        await self._judge_retained(tenant_id, grants, await messaging.retained_of_profile(tenant_id, profile_id))

    async def _judge_device(self, tenant_id: TenantId, device_id: DeviceId, live: Sequence[_Judging]) -> None:
        await self._said_before(live)
        messaging = self.messaging
        grants = (await messaging.grants.of_device(tenant_id, device_id)).grants
        await self._judge_offline(grants, await messaging.offline_of_device(tenant_id, device_id))
        await self._judge_retained(tenant_id, grants, await messaging.retained_of_device(tenant_id, device_id))

    async def _said_before(self, judging: Sequence[_Judging]) -> None:
        """Wait until what was published by the grants of before is stored: it may be retained."""
        if judging:
            await asyncio.wait(judging)
        await self.messaging.published()

    async def _judge_offline(self, grants: Sequence[TopicGrant], routes: Sequence[SessionRoute]) -> None:
        offline: dict[tuple[StoredSessionId, DeviceId], list[str]] = {}
        for route in routes:
            filters = offline.setdefault((route.session_id, route.key.device_id), [])
            topic_filter = filter_of(route.subscription.filter)
            if isinstance(subscribe_target(topic_filter, route.key.device_id), Brokered) and not may_subscribe(
                grants, topic_filter.levels, route.key.device_id
            ):
                filters.append(topic_filter.text)
        for (session_id, device_id), filters in offline.items():
            waiting = await self.messaging.offline_topics(session_id)
            topics = [topic for topic in waiting if not may_receive(grants, tuple(topic.split("/")), device_id)]
            if filters or topics:
                await self.messaging.withdraw(session_id, filters=filters, topics=topics)

    async def _judge_retained(
        self, tenant_id: TenantId, grants: Sequence[TopicGrant], kept: Sequence[tuple[DeviceId, str]]
    ) -> None:
        gone = [each for each in kept if not may_publish(grants, tuple(each[1].split("/")), each[0])]
        await self.messaging.forget_retained(tenant_id, gone)

    # Parts ----------------------------------------------------------------------------------------------------------

    def _tenant(self, tenant_id: TenantId) -> _Tenant:
        return self._tenants.setdefault(tenant_id, _Tenant())

    def _is_member(self, role: DeviceRole) -> bool:
        tenant = self._tenants.get(role.tenant_id)
        return tenant is not None and role in tenant.members.get(role.own, ())

    def _forget_if_empty(self, tenant_id: TenantId) -> None:
        tenant = self._tenants.get(tenant_id)
        if tenant is not None and not tenant.members:
            del self._tenants[tenant_id]
            self.messaging.forget_tenant(tenant_id)

    def _owner(self, ownership: Ownership) -> DeviceRole | None:
        role = self._served.get(ownership.session_id)
        return role if role is not None and role.ownership == ownership else None

    async def _join(self, role: DeviceRole, subscription: Subscription) -> None:
        """Put a granted subscription where messages find it. Raises SessionLost: the connection has ended meanwhile."""
        await self.follow(role)
        await self._watch(role, subscription)
        if not self._is_member(role):
            await self._unwatch(role, subscription)
            raise SessionLost
        tenant = self._tenant(role.tenant_id)
        before = role.brokered.get(subscription.filter.text)
        role.brokered[subscription.filter.text] = subscription
        if role.ownership is None:
            tenant.table.add(subscription.filter, role, _Local(role, subscription))
        if subscription.filter.group is not None:
            group = tenant.shared.setdefault(subscription.filter.text, SharedGroup())
            group.members[role] = subscription
        if before is not None:
            await self._unwatch(role, before)

    def _take_out(self, tenant: _Tenant, role: DeviceRole, subscription: Subscription) -> None:
        if role.ownership is None:
            tenant.table.remove(subscription.filter, role)
        group = tenant.shared.get(subscription.filter.text)
        if group is not None:
            group.members.pop(role, None)
            if not group.members:
                del tenant.shared[subscription.filter.text]

    async def _watch(self, role: DeviceRole, subscription: Subscription) -> None:
        await self.messaging.watch(
            role.tenant_id, subscription.filter.text, stored=role.ownership is not None, qos=subscription.qos
        )

    async def _unwatch(self, role: DeviceRole, subscription: Subscription) -> None:
        await self.messaging.unwatch(
            role.tenant_id, subscription.filter.text, stored=role.ownership is not None, qos=subscription.qos
        )

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do it, however often the database is away meanwhile."""

        async def run() -> None:
            while True:
                try:
                    return await work()
                except RegistryError:
                    await asyncio.sleep(AGAIN_SECONDS)

        self.server.track(self.server.loop.create_task(run(), name="mqtt broker"))


def _retained_anew(role: DeviceRole, message: Message) -> None:
    """What is sent now is newer than what may have been read of its topic before."""
    if message.retain:
        role.retained.replaced(message.topic)


def _relays(plan: _Plan) -> tuple[Relay, ...]:
    return tuple(Relay(node_id, direct, tuple(shared)) for node_id, (direct, shared) in plan.relays.items())
