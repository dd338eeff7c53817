"""A small broker for tests of the messaging store: matches filters, gives out packet ids, remembers what it was told.

It does what an adapter's router must do and nothing of a protocol. `Broker.crash` forgets everything, as kill -9 does.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import uuid4

import pytest

from adapters.mqtt.topics import Subscriptions, parse_filter, parse_name
from registry.messaging import Messaging
from registry.messaging_limits import MessagingLimits
from registry.messaging_values import (
    Arrival,
    Eviction,
    Incoming,
    Message,
    NodeRoute,
    Opening,
    Ownership,
    Publication,
    Published,
    QueuedMessage,
    Recipient,
    Relay,
    Reserved,
    RouteChange,
    Routing,
    SessionKey,
    SessionRoute,
    StoredSession,
    StoredSessionId,
    StoredSubscription,
    StoredWill,
)
from registry.model import CredentialId, DeviceId, NodeId, ProfileId, TenantId
from registry.storage.database import Database

NOON = 1_900_000_000.0


@dataclass(slots=True)
class Seconds:
    """A clock that stands until it is moved."""

    now: float = NOON

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True, eq=False)
class Served:
    """A session that is connected here: (ordinal, packet id, message) of what it was sent, in order."""

    ownership: Ownership
    next_id: int = 1
    taken_ids: set[int] = field(default_factory=set)
    sent: list[tuple[int, int, Message]] = field(default_factory=list)
    full: bool = False

    def reserve(self) -> int | None:
        if self.full:
            return None
        packet_id, self.next_id = self.next_id, self.next_id + 1
        self.taken_ids.add(packet_id)
        return packet_id

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for _, _, message in self.sent]


Key = StoredSessionId | NodeRoute


class Broker:
    """One node's router and its messaging, and what a test asks of them."""

    def __init__(self, database: Database, name: str, clock: Seconds, limits: MessagingLimits | None) -> None:
        self.database = database
        self.clock = clock
        self.steady = clock
        self.limits = limits or MessagingLimits()
        self.name = NodeId(name)
        self.tables: dict[TenantId, Subscriptions[Key, SessionRoute | NodeRoute]] = {}
        self.served: dict[StoredSessionId, Served] = {}
        self.arrivals: list[Arrival] = []
        self.evictions: list[Ownership] = []
        self.full: list[Ownership] = []
        self.taken_elsewhere: list[tuple[SessionKey, int]] = []
        self.commits: list[bytes] = []
        self.changed_grants: list[ProfileId] = []
        self.forbid = False
        self.messaging = self._messaging()

    def _messaging(self) -> Messaging:
        return Messaging(
            self.database,
            self.name,
            clock=self.clock,
            random=os.urandom,
            limits=self.limits,
            steady=lambda: self.steady(),
        )

    async def start(self) -> None:
        await self.messaging.start(self)

    async def crash(self) -> None:
        """kill -9, and a new process under the same name."""
        self.tables.clear()
        self.served.clear()
        self.messaging = self._messaging()
        await self.start()

    # What a test does.

    async def connect(
        self,
        key: SessionKey,
        credential_id: CredentialId | None = None,
        *,
        clean: bool = False,
        expiry: float = 3600.0,
        will: StoredWill | None = None,
    ) -> tuple[Served, StoredSession | None]:
        opening = Opening(key, credential_id or CredentialId(uuid4()), clean, expiry, will)
        taken = await self.messaging.take(opening)
        assert taken.ownership is not None
        served = Served(taken.ownership)
        if taken.resumed is not None:
            for queued in taken.resumed.outgoing:
                served.taken_ids.add(queued.packet_id)
                served.next_id = max(served.next_id, queued.packet_id + 1)
                served.sent.append((queued.ordinal, queued.packet_id, queued.message))
        self.served[taken.ownership.session_id] = served
        return served, taken.resumed

    async def disconnect(self, served: Served, *, publish_will: bool = False, unsent: Sequence[int] = ()) -> None:
        self.served.pop(served.ownership.session_id, None)
        await self.messaging.release(served.ownership, publish_will=publish_will, unsent=unsent)

    async def subscribe(self, served: Served, text: str, qos: int = 2, **options: bool) -> None:
        await self.messaging.subscribe(served.ownership, [StoredSubscription(text, qos, **options)])

    async def publish(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expires_at: float | None = None,
        origin: Incoming | None = None,
    ) -> Published:
        message = Message(topic, payload, qos, retain, b"", expires_at)
        return await self.messaging.publish(Publication(tenant_id, device_id, message, origin))

    async def pull(self) -> None:
        """What the run loop does when it wakes."""
        await self.messaging._inbox.pull()

    # Router.

    def changed(self, tenant_id: TenantId, changes: Sequence[RouteChange], *, whole: bool) -> None:
        if whole or tenant_id not in self.tables:
            self.tables[tenant_id] = Subscriptions()
        table = self.tables[tenant_id]
        for change in changes:
            match change.route:
                case SessionRoute(session_id, _, subscription) as route:
                    key: Key = session_id
                    text = subscription.filter
                case NodeRoute() as route:
                    assert route.node_id != self.name
                    key, text = route, route.filter
            if change.removed:
                table.remove(parse_filter(text), key)
            else:
                table.add(parse_filter(text), key, route)

    def route(self, publication: Publication) -> Routing | None:
        if self.forbid:
            return None
        message = publication.message
        found = self.tables[publication.tenant_id].match(parse_name(message.topic))
        direct: dict[StoredSessionId, list[SessionRoute]] = {}
        relayed: dict[NodeId, tuple[bool, list[str]]] = {}
        members = [(value, "") for _, value in found.subscribers]
        for group in found.groups:
            picked = group.pick(lambda key: True)
            if picked is not None:
                value = picked[1]
                members.append((value, value.filter if isinstance(value, NodeRoute) else ""))
        for value, shared in members:
            if isinstance(value, NodeRoute):
                if not value.stored or min(value.qos, message.qos) == 0:
                    was, texts = relayed.get(value.node_id, (False, []))
                    relayed[value.node_id] = (was or not shared, [*texts, shared] if shared else texts)
            elif value.subscription.no_local and value.session_id == publication.sender:
                continue
            elif min(value.subscription.qos, message.qos) > 0:
                direct.setdefault(value.session_id, []).append(value)
        recipients = []
        for session_id, routes in direct.items():
            served = self.served.get(session_id)
            packet_id = served.reserve() if served is not None else None
            recipients.append(
                Recipient(
                    session_id,
                    min(message.qos, max(r.subscription.qos for r in routes)),
                    message.retain and any(r.subscription.retain_as_published for r in routes),
                    tuple(r.subscription.identifier for r in routes if r.subscription.identifier is not None),
                    Reserved(served.ownership.epoch, packet_id) if served and packet_id is not None else None,
                )
            )
        relays = [Relay(node_id, whole, tuple(texts)) for node_id, (whole, texts) in relayed.items()]
        return Routing(tuple(recipients), tuple(relays), "the broker's own")

    async def will_due(self, publication: Publication) -> bool:
        return False

    def abandoned(self, publication: Publication, routing: Routing) -> None:
        for recipient in routing.recipients:
            served = self.served.get(recipient.session_id)
            if served is not None and recipient.reserved is not None:
                served.taken_ids.remove(recipient.reserved.packet_id)

    def committed(self, publication: Publication, published: Published) -> Iterator[None]:
        self.commits.append(publication.message.payload)
        reserved = {r.session_id: r.reserved for r in published.routing.recipients}
        for placement in published.placements:
            served = self.served.get(placement.session_id)
            if served is None:
                continue
            if placement.packet_id is None:
                given = reserved[placement.session_id]
                if given is not None:
                    served.taken_ids.discard(given.packet_id)
                continue
            assert placement.packet_id in served.taken_ids
            served.sent.append((placement.ordinal, placement.packet_id, publication.message))
            yield

    def reserve(self, ownership: Ownership, size: int) -> int | None:
        served = self.served.get(ownership.session_id)
        return served.reserve() if served is not None and served.ownership == ownership else None

    def unreserve(self, ownership: Ownership, packet_id: int) -> None:
        served = self.served.get(ownership.session_id)
        if served is not None:
            served.taken_ids.discard(packet_id)

    def queued(self, ownership: Ownership, queued: QueuedMessage) -> None:
        served = self.served[ownership.session_id]
        assert queued.packet_id in served.taken_ids
        served.sent.append((queued.ordinal, queued.packet_id, queued.message))

    def arrived(self, arrival: Arrival) -> Iterator[None]:
        self.arrivals.append(arrival)
        yield

    def evicted(self, ownership: Ownership, *, why: Eviction = Eviction.TAKEN) -> None:
        (self.full if why is Eviction.FULL else self.evictions).append(ownership)
        served = self.served.get(ownership.session_id)
        if served is not None and served.ownership == ownership:
            del self.served[ownership.session_id]

    def taken(self, key: SessionKey, number: int) -> None:
        self.taken_elsewhere.append((key, number))

    def grants_changed(self, tenant_id: TenantId, profile_id: ProfileId) -> None:
        self.changed_grants.append(profile_id)

    def device_changed(self, tenant_id: TenantId, device_id: DeviceId) -> None:
        pass


@asynccontextmanager
async def broker_on(
    dsn: str, name: str, clock: Seconds, limits: MessagingLimits | None = None
) -> AsyncIterator[Broker]:
    """A node with its own pool, started; its loops are the test's to turn."""
    database = await Database.open(dsn, size=4)
    broker = Broker(database, name, clock, limits)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.messaging.stop()
        await database.close()


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
async def broker(dsn: str, clock: Seconds) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "a", clock) as opened:
        yield opened


@pytest.fixture
async def other(dsn: str, clock: Seconds) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "b", clock) as opened:
        yield opened


@pytest.fixture
def key(tenant_id: TenantId, device_id: DeviceId) -> SessionKey:
    return SessionKey(tenant_id, device_id, "client")
