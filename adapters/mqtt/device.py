"""A device's connection: what it publishes goes to the core, what it may hear comes down, nothing else passes.

    PUBLISH ─► topic (authorization.py) ─► own, or a child's? ─► uplink | answer | report | renewal | child | broker
                    │ not allowed                 │ no                │ stored ─► PUBACK, PUBREC
                    └── 0x87, or closed ──────────┘                   └ refused ─► its reason, or closed
    SUBSCRIBE ─► filter ─► own, or a child's? ─► commands and configuration attached | broker's table | 0x80, 0x87

Acknowledgements. `Session.stored` is called when the core says that its transaction is committed, never before. The
packet id of a QoS 2 uplink is in that transaction where the session is stored, unless the uplink has a message id of
its own: both make a repetition harmless over any crash, and the message id over sessions too. What
the core refuses for good (a payload that is none) is 0x99 in MQTT 5; 3.1.1 has no such word, and saying yes would be
untrue, so the connection is closed [MQTT-3.3.5-2]. Of QoS 0 nobody expects an answer: a payload that cannot be read is
counted and dropped, while a topic that is not allowed ends the connection in both versions, with 0x87 in 5. When the
outcome is unknown (the database is away in the middle of a commit) nothing is said and the connection is closed: the
client repeats. An answer to a command that is over already is the one thing that 3.1.1 sees acknowledged without being
kept: closing would make the client repeat it for ever.

A full core. From half of its queue on, whoever sends is read from more slowly: gateways that fill their windows wait,
and nobody is refused. Where it is full all the same, reading stops for longer. MQTT 5 is told 0x97 for QoS 1 and 2; the
messages of 3.1.1, and of QoS 0, wait here and are tried again, in their order. What waits is bounded by what was read.

Client ids are scoped to the device: the table of connections is by (tenant, device, client id), so a second connection
takes over one of the same device only (5.0 §3.1.4: 0x8E), on this node or another.

Wills. Only the client takes its will back, by DISCONNECT [MQTT-3.1.2-8]; whatever else ends the connection publishes
it, our own faults too. The exception is a revocation. Where the session is another connection's by now, its will is as
well: `release` meets SessionLost and touches nothing.

What can race: the store answers after the connection is gone (the session's state moves on, nobody is answered); a
child is taken from its gateway between the look and the commit (as over HTTPS, it was its own when it was asked).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, assert_never
from uuid import uuid4

import msgspec

from adapters.mqtt.authorization import (
    CHILD_ATTACHED,
    RENEWED,
    Brokered,
    ChildAttachment,
    CommandAnswer,
    ConfigReport,
    Downlink,
    Renewal,
    Target,
    UplinkTopic,
    may_publish,
    may_receive,
    may_subscribe,
    publish_target,
    subscribe_target,
)
from adapters.mqtt.broker import Broker
from adapters.mqtt.connection import Granted
from adapters.mqtt.downlinks import Downlinks
from adapters.mqtt.machine_events import (
    Cause,
    ConnectRequested,
    Delivered,
    Discarded,
    Ended,
    Event,
    PublishReceived,
    ReceiptRecorded,
    ReleaseReceived,
    SessionEnded,
    SubscribeRequested,
    UnsubscribeRequested,
    WillDue,
)
from adapters.mqtt.messages import snapshot_of, will_to_store
from adapters.mqtt.provisioning import response_to
from adapters.mqtt.retained import RetainedMessages
from adapters.mqtt.session import Session
from adapters.mqtt.session_values import Message, Receipt, Subscription, message_of_will
from adapters.mqtt.topics import Filter, parse_filter, parse_name
from adapters.mqtt.uplinks import payload_of, uplink_of
from adapters.mqtt.wire_packets import Connect, QoS, SubscriptionRequest, Will
from adapters.mqtt.wire_reasons import ReasonCode, Version
from adapters.provisioning import error_answer, issued_fields
from registry.children import NewChild
from registry.commands import response_from
from registry.device_config import report_from
from registry.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    RegistryError,
    ResourceExhausted,
    Unavailable,
)
from registry.events import EventKind
from registry.messaging_values import (
    Incoming,
    Opening,
    OutcomeOpen,
    Ownership,
    Publication,
    Published,
    SessionKey,
    SessionLost,
    StoredSession,
)
from registry.model import Contact, DeviceId, TenantId, Transport
from registry.payloads import NewUplink, PayloadTooLarge, Source
from registry.rate_limits import RateLimiter
from registry.sessions import Session as RegistrySession
from registry.topic_grants import DeviceGrants
from registry.uplinks import StoredUplink

if TYPE_CHECKING:
    from adapters.mqtt.peer import Peer
    from adapters.mqtt.server import MqttServer

log: Final = logging.getLogger(__name__)

Key = tuple[TenantId, DeviceId, str]
"""Whose session it is: tenant, device, client id."""

_NO_TOPIC: Final = "this topic is not open to this device"


class Devices:
    """The devices connected to one server."""

    def __init__(self, server: MqttServer, broker: Broker) -> None:
        self.server = server
        self.broker = broker
        self.by_key: dict[Key, DeviceRole] = {}
        self.leaving: dict[Key, asyncio.Task[None]] = {}
        """Sessions whose connection is gone and whose store does not know it yet."""
        self._opening: dict[Key, tuple[asyncio.Lock, int]] = {}
        self._log_lines = RateLimiter(_LOG_LINES_PER_SECOND, _LOG_LINES_PER_SECOND)
        self._taken_elsewhere: dict[Key, int] = {}
        """Of those that are being opened: the number of a taking on another node."""

    async def admit(self, peer: Peer, session: RegistrySession, connect: Connect) -> None:
        """Accept a CONNECT whose credential is good, or refuse it for its will. The caller sees by `peer.role`.

        Raises ResourceExhausted (stored sessions of the device), Unavailable.
        """
        grants = await self.broker.messaging.grants.of_device(session.tenant_id, session.device_id)
        if connect.will is not None and not await self._may_will(session, grants, connect.will):
            note_refusal(self.server, session, "will outside the device's topics")
            peer.refuse(ReasonCode.NOT_AUTHORIZED)
            return
        client_id = connect.client_id or f"gh-{uuid4().hex}"
        key = (session.tenant_id, session.device_id, client_id)
        async with self._alone(key):
            if _is_over(peer, session):  # while it waited for its turn
                return
            role = DeviceRole(self, peer, session, key, grants)
            try:
                present = await self._take(role, connect)
                await self.broker.enter(role)
            except BaseException:
                role.give_up(publish_will=False)
                raise
            if _is_over(peer, session):
                role.give_up(publish_will=not session.closed)
                return
            self.by_key[key] = role
            peer.role = role
            assigned = None if connect.client_id else client_id
            peer.machine.accept(role.mqtt, session_present=present, now=self.server.now(), client_id=assigned)
            role.connected()
            if role.taking < self._taken_elsewhere.get(key, 0):
                self._end_taken(role)
        peer.pump()

    async def _take(self, role: DeviceRole, connect: Connect) -> bool:
        """Give the role its session, from whoever had it; whether it is an earlier one that goes on."""
        before = self.by_key.get(role.key)
        if before is not None:
            self._end_taken(before)
        leaving = self.leaving.get(role.key)
        if leaving is not None:
            await asyncio.wait((leaving,))
        tenant_id, device_id, client_id = role.key
        expiry = role.peer.machine.granted_expiry(connect)
        if expiry <= 0 and connect.clean_start and not connect.client_id and connect.will is None:
            return False  # nobody can have had this session
        opening = Opening(
            SessionKey(tenant_id, device_id, client_id),
            role.session.identity.credential_id,
            connect.clean_start,
            expiry,
            None if connect.will is None else will_to_store(connect.will),
        )
        try:
            taken = await self.broker.messaging.take(opening)
        except OutcomeOpen:
            self.server.track(self.server.loop.create_task(self._disown(role.key), name="mqtt disown"))
            raise
        role.taking = taken.number
        role.will = taken.will
        role.own_session(taken.ownership, taken.resumed)
        self.broker.serve(role)
        return taken.resumed is not None

    def taken_elsewhere(self, key: Key, number: int) -> None:
        """The client has connected to another node: end its connection here, if that is the older one."""
        role = self.by_key.get(key)
        if role is not None and role.taking < number:
            self.server.loop.call_soon(self._end_taken, role)
        if key in self._opening:
            self._taken_elsewhere[key] = max(number, self._taken_elsewhere.get(key, 0))

    def _end_taken(self, role: DeviceRole) -> None:
        if not role.peer.alive:
            return
        self.server.counters.taken_over += 1
        role.peer.end(ReasonCode.SESSION_TAKEN_OVER, publish_will=True)

    async def _disown(self, key: Key) -> None:
        """Nobody knows whether a session was taken, and its client was turned away: if it was, let it go again, unless
        the client is back before."""
        while True:
            async with self._alone(key):
                if key in self.by_key:
                    return
                leaving = self.leaving.get(key)
                if leaving is not None:
                    await asyncio.wait((leaving,))
                try:
                    await self.broker.messaging.disown(SessionKey(*key))
                except Unavailable:
                    pass
                else:
                    return
            await asyncio.sleep(_RELEASE_AGAIN_SECONDS)

    @asynccontextmanager
    async def _alone(self, key: Key) -> AsyncIterator[None]:
        """One CONNECT after the other for one session."""
        lock, waiting = self._opening.get(key, (None, 0))
        lock = lock or asyncio.Lock()
        self._opening[key] = lock, waiting + 1
        try:
            async with lock:
                yield
        finally:
            _, waiting = self._opening[key]
            if waiting == 1:
                del self._opening[key]
                self._taken_elsewhere.pop(key, None)
            else:
                self._opening[key] = lock, waiting - 1

    def may_log(self, now: float) -> bool:
        """Whether there is room in the log for one more line about what a device did wrong."""
        return self._log_lines.take(None, now) is None

    async def speaks_for(self, session: RegistrySession, device_id: DeviceId) -> bool:
        """Whether a device may act for this one: itself, or its child."""
        if device_id == session.device_id:
            return True
        return await self.server.registry.children.is_child(session.identity, device_id)

    async def store_will(self, publication: Publication, will_id: int, message: Message) -> None:
        """Store a will on an uplink's topic, as what the device says last, or its gateway for it. Once, however often
        it is tried: it has a message id, of its own or by its number. Raises Unavailable."""
        registry, tenant_id, device_id = self.server.registry, publication.tenant_id, publication.device_id
        target = publish_target(parse_name(message.topic), device_id)
        if not isinstance(target, UplinkTopic):
            return
        via = None if target.device_id == device_id else device_id
        try:
            if via is not None and not await registry.children.belongs(tenant_id, via, target.device_id):
                raise PermissionDenied("the child is another gateway's by now")
            source = Source(tenant_id, target.device_id, Transport.MQTT, via)
            uplink = uplink_of(target, message, source, max_bytes=self.server.limits.payload_bytes)
            if uplink.message_id is None:
                uplink = msgspec.structs.replace(uplink, message_id=f"will-{will_id}")
            await registry.uplinks.submit(uplink)
        except Unavailable:
            raise
        except RegistryError:
            self.server.counters.wills_lost += 1

    async def _may_will(self, session: RegistrySession, grants: DeviceGrants, will: Will) -> bool:
        levels = parse_name(will.topic)
        target = publish_target(levels, session.device_id)
        match target:
            case UplinkTopic(device_id):
                allowed = await self.speaks_for(session, device_id)
                return allowed and _readable(will, target, session, self.server)
            case Brokered():
                return may_publish(grants.grants, levels, session.device_id)
            case _:
                return False


class DeviceRole:
    """One of them (peer.Role)."""

    __slots__ = (
        "_asked",
        "_for_children",
        "_left",
        "_levels",
        "_moved",
        "_pending",
        "_retry",
        "_source",
        "_target",
        "_waiting",
        "broker",
        "brokered",
        "downlinks",
        "grants",
        "key",
        "mqtt",
        "own",
        "owner",
        "ownership",
        "peer",
        "profile_id",
        "registry",
        "retained",
        "server",
        "session",
        "taking",
        "tenant_id",
        "will",
    )

    def __init__(self, owner: Devices, peer: Peer, session: RegistrySession, key: Key, grants: DeviceGrants) -> None:
        self.owner = owner
        self.server = owner.server
        self.broker = owner.broker
        self.registry = owner.server.registry
        self.peer = peer
        self.session = session
        self.key = key
        self.tenant_id = session.tenant_id
        self.own = session.device_id
        self.grants = grants.grants
        self.profile_id = grants.profile_id
        self.ownership: Ownership | None = None
        """The right to serve the session, where it is stored."""
        self.will: Ownership | None = None
        """The right to the will, where the session is not stored; the will is."""
        self.taking = 0
        """Its number among the takings of this client, on whatever nodes."""
        self.mqtt = Session(peer.machine.limits)
        self.brokered: dict[str, Subscription] = {}
        """Subscriptions among the granted topics that stand, by the text of their filter; the broker's to change."""
        self.downlinks = Downlinks(self)
        self.retained = RetainedMessages(self)
        self._waiting: list[Callable[[], bool]] = []
        """Messages for which the core had no room, as attempts to hand them over: whether it was taken."""
        self._retry: asyncio.TimerHandle | None = None
        self._for_children: dict[DeviceId, list[tuple[Receipt, Message, UplinkTopic]]] = {}
        """What it sends for each child and has to be judged, the oldest first."""
        self._pending: set[asyncio.Future[None]] = set()
        self._moved: asyncio.Event | None = None  # made by who waits for it: few do
        self._asked = 0
        self._left = False  # the connection ended before anybody closed the session: what it has said still counts
        self._source = source_of(session, self.own)
        self._levels: tuple[str, ...] = ()  # of the last message's topic, and where that goes: mostly the next one's
        self._target: Target | None = None

    @property
    def ready(self) -> bool:
        """Whether a message that is given now can leave now."""
        return self.peer.alive and self.mqtt.attached and not self.peer.machine.leaving

    @property
    def held(self) -> Ownership | None:
        """What is to be given back when the connection is gone."""
        return self.ownership or self.will

    def own_session(self, ownership: Ownership | None, resumed: StoredSession | None) -> None:
        """The session was taken: continue it, or begin a new one."""
        self.ownership = ownership
        if ownership is None:
            return
        limits = self.peer.machine.limits
        if resumed is None:
            self.mqtt = Session(limits, durable=True)
            return
        self.mqtt.expiry = resumed.expiry  # so that it is let go, and not ended, if it cannot be restored
        self.mqtt = Session.restore(snapshot_of(resumed), limits)

    async def judge(self) -> None:
        """Take away subscriptions, and messages that wait, that the grants of now do not allow.

        When a session is taken up, and whenever grants change. Raises SessionLost, Unavailable.
        """
        self._asked += 1
        asked = self._asked
        found = await self.broker.messaging.grants.of_device(self.tenant_id, self.own)
        if asked == self._asked:  # else somebody asked later, and judges by a fresher answer
            self.grants, self.profile_id = found.grants, found.profile_id
        if self.grants:
            await self.broker.follow(self)
        gone: list[Subscription] = []
        for subscription in tuple({**self.brokered, **self.mqtt.subscriptions}.values()):
            target = subscribe_target(subscription.filter, self.own)
            if target is None or not await self._may_hear(target, subscription.filter):
                gone.append(subscription)
        if gone:
            await self.broker.unsubscribe(self, gone)
            for subscription in gone:
                self.mqtt.unsubscribe(subscription.filter.text)
                target = subscribe_target(subscription.filter, self.own)
                if isinstance(target, Downlink):
                    self.downlinks.closed(target)
        for outgoing in self.mqtt.discard_queued(
            lambda delivery: delivery.key >= 0 and not self.may_hear(delivery.message.topic)
        ):
            self.finished(outgoing.delivery.key)

    def connected(self) -> None:
        """CONNACK is on its way."""
        self.registry.presence.connected(self.session)
        for subscription in tuple(self.mqtt.subscriptions.values()):
            target = subscribe_target(subscription.filter, self.own)
            if isinstance(target, Downlink):
                self.downlinks.opened(target, subscription)

    def give_up(self, *, publish_will: bool) -> None:
        """It was never accepted: what was taken goes back. `publish_will` for a client that was about to be accepted,
        and is gone: with the taking a delayed will of before was dropped, and somebody is to hear of its end. A client
        that is told that it was not admitted has armed none."""
        self.broker.leave(self)
        self._let_go(publish_will=publish_will)

    def lost(self, ended: Ended | None, now: float) -> None:
        self.downlinks.close()
        self._waiting.clear()
        if self._moved is not None:
            self._moved.set()
        if self._retry is not None:
            self._retry.cancel()
        if self.owner.by_key.get(self.key) is self:
            del self.owner.by_key[self.key]
        self._tell_operator(ended, now)
        self._left = not self.session.closed
        self.registry.sessions.ended(self.session)
        self.broker.leave(self)
        self._let_go(publish_will=self.mqtt.owes_will)  # published from the store, when its delay is over

    def _tell_operator(self, ended: Ended | None, now: float) -> None:
        """How it ended, and what was wrong: 3.1.1 is told nothing of it, and a client may repeat it for ever."""
        detail = ""
        if ended is not None and ended.cause in (Cause.VIOLATION, Cause.TIMEOUT):
            detail = ended.text[:_MAX_TEXT]
        self.registry.presence.disconnected(self.session, ended.cause.value if ended is not None else "failed", detail)
        if ended is not None and ended.cause is Cause.VIOLATION and self.owner.may_log(now):
            fields = {
                "tenant": str(self.tenant_id),
                "device": str(self.own),
                "peer": self.peer.address,
                "reason": ended.reason.name.lower(),
                "detail": detail,
                "correlation_id": self.session.contact.correlation_id,
            }
            log.info("mqtt.violation", extra={"fields": fields})

    def _let_go(self, *, publish_will: bool) -> None:
        if self.held is None:
            return
        task = self.server.loop.create_task(self._release(self.held, publish_will), name="mqtt release")
        self.owner.leaving[self.key] = task
        self.server.track(task)

    async def _release(self, ownership: Ownership, publish_will: bool) -> None:
        unsent = [key for key in self.mqtt.unsent if key > 0]
        expiry = self.mqtt.expiry if self.ownership is not None else 0.0
        try:
            if self._pending:
                await asyncio.wait(self._pending)
            while True:
                try:
                    await self.broker.messaging.release(
                        ownership, publish_will=publish_will, expiry=expiry, unsent=unsent
                    )
                    return
                except SessionLost:
                    return
                except Unavailable:  # until the store hears of it, the session counts as served
                    await asyncio.sleep(_RELEASE_AGAIN_SECONDS)
        finally:
            if self.owner.leaving.get(self.key) is asyncio.current_task():
                del self.owner.leaving[self.key]

    def handle(self, event: Event, now: float) -> None:
        match event:
            case PublishReceived(receipt, message, levels):
                self._publish(receipt, message, levels, now)
            case SubscribeRequested(packet_id, requests, identifier):
                self._subscribe(packet_id, requests, identifier, now)
            case UnsubscribeRequested(packet_id, subscriptions):
                self._unsubscribe(packet_id, subscriptions, now)
            case Delivered(_, key, _):
                self.finished(key)
            case Discarded(_, delivery, _):
                self.server.counters.discarded += 1
                self.finished(delivery.key)
            case ReceiptRecorded(packet_id, key):
                self._received(packet_id, key)
            case ReleaseReceived(packet_id):
                self._released(packet_id)
            case WillDue() | SessionEnded():  # only without a connection
                pass
            case ConnectRequested() | Ended():
                raise AssertionError(f"the peer passed {type(event).__name__} on")
            case _:
                assert_never(event)

    # How far deliveries have come -----------------------------------------------------------------------------------

    def finished(self, key: int) -> None:
        """A delivery is done, or was discarded. Keys below 0 are downlinks', above 0 rows of the stored queue."""
        if self._moved is not None:
            self._moved.set()
        if key < 0:
            self.downlinks.acknowledged(key)
        elif key > 0 and self.ownership is not None:
            self._follow(self.broker.messaging.delivered(self.ownership, key), None)
        self.downlinks.room()

    def _received(self, packet_id: int, key: int) -> None:
        if key > 0 and self.ownership is not None:
            done = self.broker.messaging.received(self.ownership, key)
            self._follow(done, lambda: self.mqtt.recorded(packet_id))
        else:
            self.mqtt.recorded(packet_id)

    def _released(self, packet_id: int) -> None:
        assert self.ownership is not None
        done = self.broker.messaging.released(self.ownership, packet_id)
        self._follow(done, lambda: self.mqtt.released(packet_id))

    def _follow(self, future: asyncio.Future[None], then: Callable[[], None] | None) -> None:
        """Go on when the store has written it down; without that the session cannot go on here."""
        self._pending.add(future)

        def done(ended: asyncio.Future[None]) -> None:
            self._pending.discard(future)
            if ended.cancelled() or ended.exception() is not None:
                self.peer.run(partial(self.peer.end, ReasonCode.SERVER_BUSY, publish_will=True))
            elif then is not None and self.peer.alive:
                self.peer.run(then)

        future.add_done_callback(done)

    async def room(self, seconds: float) -> None:
        """Wait until a delivery is done, or so long."""
        self._moved = moved = self._moved or asyncio.Event()
        moved.clear()
        try:
            async with asyncio.timeout(seconds):
                await moved.wait()
        except TimeoutError:
            pass

    def may_hear(self, topic: str) -> bool:
        """Whether the grants of now let it have a brokered message."""
        return may_receive(self.grants, tuple(topic.split("/")), self.own)

    # Publishing -----------------------------------------------------------------------------------------------------

    def _publish(self, receipt: Receipt, message: Message, levels: tuple[str, ...], now: float) -> None:
        if levels is not self._levels:  # the machine gives the same ones for the same topic
            self._levels, self._target = levels, publish_target(levels, self.own)
        target = self._target
        match target:
            case UplinkTopic(device_id) if device_id == self.own:
                self._store(receipt, message, target, now)
            case Brokered() if may_publish(self.grants, levels, self.own):
                self._broker(receipt, message, now)
            case Brokered() | None:
                self._forbidden(receipt, now)
            case UplinkTopic(device_id):
                line = self._for_children.setdefault(device_id, [])
                line.append((receipt, message, target))
                if len(line) == 1:
                    self.peer.start(self._speak_for(device_id))
            case _:
                self._start(receipt, message, partial(self._publish_later, receipt, message, target))

    async def _speak_for(self, device_id: DeviceId) -> None:
        """Store what is sent for a child, in its order, however long it takes to learn whose child it is."""
        line = self._for_children[device_id]
        while line:
            receipt, message, target = line[0]
            try:
                if not await self.owner.speaks_for(self.session, device_id):
                    self._forbidden(receipt, self.server.now())
                elif not self.revoked:  # else it was revoked while we asked
                    self._store(receipt, message, target, self.server.now())
            except RegistryError as error:
                self._refused(receipt, error)
            line.pop(0)
            self.peer.poke()
        del self._for_children[device_id]

    async def _publish_later(self, receipt: Receipt, message: Message, target: Target) -> None:
        """What has to ask the database before its fate is known."""
        match target:
            case Brokered() | UplinkTopic():
                raise AssertionError("these do not come here")
            case Renewal():
                await self._renew(receipt, message)
                return
            case ChildAttachment():
                await self._attach_child(receipt, message)
                return
            case CommandAnswer() | ConfigReport():
                pass
            case _:
                assert_never(target)
        if not await self.owner.speaks_for(self.session, target.device_id):
            self._forbidden(receipt, self.server.now())
            return
        if self.revoked:  # revoked while we asked
            return
        source = source_of(self.session, target.device_id)
        match target:
            case CommandAnswer(_, command_id):
                payload = payload_of(message, max_bytes=self.server.limits.payload_bytes)
                await self.registry.commands.answer(source, command_id, response_from(payload), uuid4().hex)
            case ConfigReport():
                payload = payload_of(message, max_bytes=self.server.limits.payload_bytes)
                await self.registry.device_configs.report(source, report_from(payload), uuid4().hex)
            case _:
                assert_never(target)
        self._stored(receipt)

    def _store(self, receipt: Receipt, message: Message, topic: UplinkTopic, now: float) -> None:
        source = self._source if topic.device_id == self.own else source_of(self.session, topic.device_id)
        try:
            uplink = uplink_of(topic, message, source, max_bytes=self.server.limits.payload_bytes)
        except InvalidArgument as error:
            self._unreadable(receipt, error, now)
            return
        if self.ownership is not None and receipt.qos is QoS.EXACTLY_ONCE and uplink.message_id is None:
            uplink = msgspec.structs.replace(uplink, origin=Incoming(self.ownership, receipt.packet_id))
        self._offer(receipt, partial(self._submit, receipt, uplink), now)

    def _broker(self, receipt: Receipt, message: Message, now: float) -> None:
        if receipt.qos is QoS.AT_MOST_ONCE and not message.retain:
            if self.broker.publish_unsure(self, message, lambda: self.peer.run(partial(self._stored, receipt))):
                self.mqtt.stored(receipt, now)
            return
        self._offer(receipt, partial(self._submit_brokered, receipt, message), now)

    def _brokered(self, receipt: Receipt, done: asyncio.Future[Published]) -> None:
        error = Unavailable("the server is stopping") if done.cancelled() else done.exception()
        match error:
            case None:
                self.server.counters.brokered += 1
                self.peer.run(partial(self._stored, receipt))
            case ResourceExhausted():
                self.server.counters.full += 1
                self.peer.run(lambda: self._no_room(receipt, self.server.now()))
            case SessionLost():
                self.peer.run(partial(self.peer.end, ReasonCode.SESSION_TAKEN_OVER, publish_will=True))
            case _:
                self.peer.run(partial(self._refused, receipt, error))

    def _no_room(self, receipt: Receipt, now: float) -> None:
        """A receiver's queue is full, and nothing was stored: 0x97 in 5.0; 3.1.1 is closed, and repeats it. QoS 0 is
        dropped."""
        if receipt.qos is QoS.AT_MOST_ONCE:
            self.server.counters.dropped += 1
            self.mqtt.stored(receipt, now)
        else:
            self.mqtt.failed(receipt, ReasonCode.QUOTA_EXCEEDED, now, "a queue is full; try again")

    def _offer(self, receipt: Receipt, attempt: Callable[[], bool], now: float) -> None:
        """Hand a message to the core, behind those of this connection that wait for room."""
        if self._waiting:
            self._waiting.append(attempt)
        elif not attempt():
            self._full(receipt, attempt, now)

    def _submit_brokered(self, receipt: Receipt, message: Message) -> bool:
        if self.revoked:  # revoked while it waited: nothing of it is stored, and the connection is being closed
            return True
        if not may_publish(self.grants, tuple(message.topic.split("/")), self.own):  # its grant went while it waited
            self._forbidden(receipt, self.server.now())
            return True
        try:
            future = self.broker.publish(self, message, receipt)
        except Unavailable:
            return False
        future.add_done_callback(partial(self._brokered, receipt))
        return True

    def _submit(self, receipt: Receipt, uplink: NewUplink) -> bool:
        if self.revoked:  # as above
            return True
        try:
            future = self.registry.uplinks.submit(uplink)
        except Unavailable:
            return False
        future.add_done_callback(partial(self._committed, receipt))
        if self.registry.uplinks.crowded:
            self.peer.hold(self.server.limits.crowded_pause)
        return True

    def _committed(self, receipt: Receipt, done: asyncio.Future[StoredUplink]) -> None:
        counters = self.server.counters
        error = Unavailable("the server is stopping") if done.cancelled() else done.exception()
        if error is not None:
            self.peer.run(partial(self._refused, receipt, error))
            return
        if done.result().duplicate:
            counters.duplicate += 1
        else:
            counters.stored += 1
        self.peer.run(partial(self._stored, receipt))

    def _full(self, receipt: Receipt, attempt: Callable[[], bool], now: float) -> None:
        """The core has no room: say so where there is a word for it, try again where there is none; read no more."""
        pause = self.server.limits.full_pause
        self.server.counters.full += 1
        self.peer.hold(pause)
        if self.peer.machine.version is Version.V5 and receipt.qos is not QoS.AT_MOST_ONCE:
            self.mqtt.failed(receipt, ReasonCode.QUOTA_EXCEEDED, now, "the server is full; try again")
            return
        self._waiting.append(attempt)
        if self._retry is None:
            self._retry = self.server.loop.call_later(pause, self.peer.run, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        while self._waiting:
            if not self._waiting[0]():
                pause = self.server.limits.full_pause
                self.peer.hold(pause)
                self._retry = self.server.loop.call_later(pause, self.peer.run, self._try_again)
                return
            self._waiting.pop(0)

    @property
    def revoked(self) -> bool:
        """Whether the registry closed the session before its connection ended: nothing that it sent is kept or passed
        on any more."""
        return self.session.closed and not self._left

    # What became of a message ---------------------------------------------------------------------------------------

    def _stored(self, receipt: Receipt) -> None:
        self.mqtt.stored(receipt, self.server.now())

    def _refused(self, receipt: Receipt, error: BaseException) -> None:
        now = self.server.now()
        match error:
            case InvalidArgument():
                self._unreadable(receipt, error, now)
            case SessionLost():  # nothing was stored; whoever has the session now hears it again
                self.peer.end(ReasonCode.SESSION_TAKEN_OVER, publish_will=True)
            case FailedPrecondition() | NotFound():
                if self.peer.machine.version is Version.V5 and receipt.qos is not QoS.AT_MOST_ONCE:
                    self.mqtt.failed(receipt, ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR, now, error.message)
                else:
                    self.mqtt.stored(receipt, now)
            case RegistryError():  # the outcome is not known: nothing is acknowledged, nothing refused
                self.server.counters.unknown += 1
                if receipt.qos is QoS.AT_MOST_ONCE:
                    self.mqtt.stored(receipt, now)
                else:
                    self.peer.end(ReasonCode.SERVER_BUSY, publish_will=True)
            case _:
                raise error

    def _unreadable(self, receipt: Receipt, error: InvalidArgument, now: float) -> None:
        self.server.counters.rejected += 1
        self.server.counters.too_large += isinstance(error, PayloadTooLarge)
        if receipt.qos is QoS.AT_MOST_ONCE:
            self.mqtt.stored(receipt, now)
        else:
            self.mqtt.failed(receipt, ReasonCode.PAYLOAD_FORMAT_INVALID, now, error.message[:_MAX_TEXT])

    def _forbidden(self, receipt: Receipt, now: float) -> None:
        self.server.counters.forbidden += 1
        note_refusal(self.server, self.session, "publish outside the device's topics")
        self.mqtt.failed(receipt, ReasonCode.NOT_AUTHORIZED, now, _NO_TOPIC)

    def _start(self, receipt: Receipt, message: Message, work: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            try:
                await work()
            except RegistryError as error:
                self._refused(receipt, error)

        self.peer.start(run())

    # Requests with an answer ----------------------------------------------------------------------------------------

    async def _renew(self, receipt: Receipt, message: Message) -> None:
        contact = Contact(Transport.MQTT, self.peer.address, uuid4().hex)
        answer: dict[str, object]
        try:
            enrolment = self.registry.enrolment
            issued = await enrolment.renew(self.session.identity, _csr(message), contact, same_subject=False)
            answer = {"status": "ok", "device_id": self.own, **issued_fields(issued)}
        except Unavailable:
            raise
        except RegistryError as error:
            answer = dict(error_answer(error, contact.correlation_id))
        self._respond(receipt, message, answer, RENEWED)

    async def _attach_child(self, receipt: Receipt, message: Message) -> None:
        correlation_id = uuid4().hex
        answer: dict[str, object]
        try:
            child = _child(message, self.server.limits.payload_bytes)
            attached = await self.registry.children.attach(self.session.identity, child, correlation_id)
            answer = {"status": "ok", "device_id": attached.device_id, "created": attached.created}
        except Unavailable:
            raise
        except RegistryError as error:
            answer = dict(error_answer(error, correlation_id))
        self._respond(receipt, message, answer, CHILD_ATTACHED)

    def _respond(self, receipt: Receipt, message: Message, answer: dict[str, object], tail: tuple[str, ...]) -> None:
        """Answer to this connection, under the name that the request used for the device."""
        now = self.server.now()
        name = message.topic.split("/")[1]
        otherwise = "/".join(("devices", name, *tail))
        qos = min(message.qos, QoS.AT_LEAST_ONCE)
        delivery = response_to(message, msgspec.json.encode(answer), otherwise, qos, key=self.downlinks.next_key())
        self.mqtt.deliver(delivery, now)
        self.mqtt.stored(receipt, now)

    # Subscribing ----------------------------------------------------------------------------------------------------

    def _subscribe(
        self, packet_id: int, requests: Sequence[SubscriptionRequest], identifier: int | None, now: float
    ) -> None:
        filters = [_filter(self.peer, request) for request in requests]
        targets = [subscribe_target(each, self.own) for each in filters]
        if self.ownership is None and all(t is None or self._at_once(t) for t in targets):
            self._subscribed(packet_id, requests, targets, now)
            return
        self.peer.start(self._subscribe_later(packet_id, requests, filters, targets, identifier))

    def _at_once(self, target: Downlink | Brokered) -> bool:
        return isinstance(target, Downlink) and target.device_id == self.own

    async def _subscribe_later(
        self,
        packet_id: int,
        requests: Sequence[SubscriptionRequest],
        filters: Sequence[Filter],
        targets: Sequence[Downlink | Brokered | None],
        identifier: int | None,
    ) -> None:
        judged: list[Downlink | Brokered | None] = []
        granted: list[Subscription] = []
        try:
            for request, topic_filter, target in zip(requests, filters, targets, strict=True):
                if target is None or not await self._may_hear(target, topic_filter):
                    judged.append(None)
                    continue
                judged.append(target)
                granted.append(_subscription(request, topic_filter, target, identifier))
            if granted:
                await self.broker.subscribe(self, granted)
            judged = [await self._still_granted(each, target) for each, target in zip(filters, judged, strict=True)]
        except SessionLost:
            self.peer.end(ReasonCode.SESSION_TAKEN_OVER, publish_will=True)
            return
        except RegistryError:  # what stands is not known; the client asks again
            self.peer.end(ReasonCode.SERVER_BUSY, publish_will=True)
            return
        self._subscribed(packet_id, requests, judged, self.server.now())

    async def _still_granted(
        self, topic_filter: Filter, target: Downlink | Brokered | None
    ) -> Downlink | Brokered | None:
        """The target, unless its grant was taken away while it was being written down. Raises as `judge`."""
        if not isinstance(target, Brokered):
            return target
        added = self.brokered.get(topic_filter.text)
        if added is None or may_subscribe(self.grants, topic_filter.levels, self.own):
            return None if added is None else target
        await self.broker.unsubscribe(self, (added,))
        return None

    async def _may_hear(self, target: Downlink | Brokered, topic_filter: Filter) -> bool:
        """Whether the grants of now, or the children, allow a filter. Raises Unavailable."""
        match target:
            case Brokered():
                return may_subscribe(self.grants, topic_filter.levels, self.own)
            case Downlink(device_id):
                return await self.owner.speaks_for(self.session, device_id)
            case _:
                assert_never(target)

    def _subscribed(
        self,
        packet_id: int,
        requests: Sequence[SubscriptionRequest],
        targets: Sequence[Downlink | Brokered | None],
        now: float,
    ) -> None:
        reasons: list[ReasonCode] = []
        for request, target in zip(requests, targets, strict=True):
            if target is None:
                note_refusal(self.server, self.session, "subscription outside the device's topics")
                self.server.counters.forbidden += 1
                reasons.append(ReasonCode.NOT_AUTHORIZED)
            else:
                reasons.append(ReasonCode(_granted_qos(request, target)))
        by_filter = {request.filter: target for request, target in zip(requests, targets, strict=True)}
        for granted in self.peer.machine.subscribed(packet_id, reasons, now):
            self._granted(granted, by_filter[granted.subscription.filter.text])

    def _granted(self, granted: Granted, target: Downlink | Brokered | None) -> None:
        if isinstance(target, Downlink):
            self.downlinks.opened(target, granted.subscription)
        elif isinstance(target, Brokered) and granted.send_retained:
            self.retained.owe(granted.subscription)

    def _unsubscribe(self, packet_id: int, subscriptions: Sequence[Subscription], now: float) -> None:
        for subscription in subscriptions:
            target = subscribe_target(subscription.filter, self.own)
            if isinstance(target, Downlink):
                self.downlinks.closed(target)
        if self.ownership is None and not any(each.filter.text in self.brokered for each in subscriptions):
            self.peer.machine.unsubscribed(packet_id, now)
            return
        self.peer.start(self._unsubscribe_later(packet_id, subscriptions))

    async def _unsubscribe_later(self, packet_id: int, subscriptions: Sequence[Subscription]) -> None:
        try:
            await self.broker.unsubscribe(self, subscriptions)
        except RegistryError:
            self.peer.end(ReasonCode.SERVER_BUSY, publish_will=True)
            return
        self.peer.machine.unsubscribed(packet_id, self.server.now())


_RELEASE_AGAIN_SECONDS: Final = 1.0
_LOG_LINES_PER_SECOND: Final = 50
_MAX_TEXT: Final = 200


def source_of(session: RegistrySession, device_id: DeviceId) -> Source:
    """Whose uplink it is: the device's own, or a child's that it sends for."""
    if device_id == session.device_id:
        return Source.of(session.identity, Transport.MQTT)
    return Source(session.tenant_id, device_id, Transport.MQTT, via=session.device_id)


def _is_over(peer: Peer, session: RegistrySession) -> bool:
    return session.closed or not peer.alive


def note_refusal(server: MqttServer, session: RegistrySession, reason: str) -> None:
    """Keep for the operator what a device tried and may not; repetitions are counted together."""
    server.registry.refusals.note(
        tenant_id=session.tenant_id,
        device_id=session.device_id,
        kind=EventKind.AUTH_REFUSED,
        reason=reason,
        contact=session.contact,
        detail={"credential_id": str(session.identity.credential_id)},
    )


def _subscription(
    request: SubscriptionRequest, topic_filter: Filter, target: Downlink | Brokered, identifier: int | None
) -> Subscription:
    return Subscription(
        topic_filter,
        _granted_qos(request, target),
        request.no_local,
        request.retain_as_published,
        request.retain_handling,
        identifier,
    )


def _granted_qos(request: SubscriptionRequest, target: Downlink | Brokered) -> QoS:
    """As it was asked for; what comes down from the core has QoS 1 at most."""
    return min(request.qos, QoS.AT_LEAST_ONCE) if isinstance(target, Downlink) else request.qos


def _filter(peer: Peer, request: SubscriptionRequest) -> Filter:
    limits = peer.machine.limits
    return parse_filter(request.filter, max_bytes=limits.topic_bytes, max_levels=limits.topic_levels)


def _readable(will: Will, target: UplinkTopic, session: RegistrySession, server: MqttServer) -> bool:
    """Whether a will can be stored when its time comes: it is judged while somebody is there to be told."""
    try:
        message = message_of_will(will, server.now())
        uplink_of(target, message, source_of(session, target.device_id), max_bytes=server.limits.payload_bytes)
    except InvalidArgument:
        return False
    return True


class _CsrRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    csr: str


def _csr(message: Message) -> bytes:
    """The request in a message: PEM or DER as they are, or `{"csr": PEM}`. Raises InvalidArgument."""
    if not message.payload.lstrip().startswith(b"{"):
        return message.payload
    try:
        return msgspec.json.decode(message.payload, type=_CsrRequest).csr.encode()
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"the request is refused: {str(error)[:_MAX_TEXT]}", field="csr") from None


class _ChildRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    hardware_id: str
    name: str | None = None
    firmware: str | None = None
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    meta: dict[str, Any] = msgspec.field(default_factory=dict)


def _child(message: Message, max_bytes: int) -> NewChild:
    """What a gateway says of a child. Raises InvalidArgument."""
    try:
        read = msgspec.convert(payload_of(message, max_bytes=max_bytes).value, _ChildRequest)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"the child is refused: {str(error)[:_MAX_TEXT]}") from None
    return NewChild(read.hardware_id, read.name, read.firmware, read.tags, read.meta)
