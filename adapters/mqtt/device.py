"""One device's connection, from its acceptance to the giving back of its session.

    machine's events ─► publishing.py   what it sends
                     ├► subscribing.py  what it asks to hear
                     └► here: how far deliveries have come ─► the store
    downlinks.py (commands, configuration), retained.py, the broker ─► the session ─► the machine

Wills. Only the client takes its will back, by DISCONNECT [MQTT-3.1.2-8]; whatever else ends the connection publishes
it, our own faults too. The exception is a revocation. Where the session is another connection's by now, its will is as
well: `release` meets SessionLost and touches nothing.

What can race: grants change while they are judged (who asked last judges by the freshest answer). What can be lost: how
far deliveries have come, where the store cannot write it down; then the session does not go on here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, assert_never

from adapters.mqtt.authorization import Downlink, may_receive, subscribe_target
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
from adapters.mqtt.messages import snapshot_of
from adapters.mqtt.publishing import Publishing
from adapters.mqtt.refusals import MAX_TEXT
from adapters.mqtt.retained import RetainedMessages
from adapters.mqtt.session import Session
from adapters.mqtt.session_values import Subscription
from adapters.mqtt.subscribing import Subscribing
from adapters.mqtt.wire_reasons import ReasonCode
from registry.errors import Unavailable
from registry.messaging_values import Ownership, SessionLost, StoredSession
from registry.model import DeviceId, ProfileId, TenantId
from registry.sessions import Session as RegistrySession
from registry.topic_grants import DeviceGrants

if TYPE_CHECKING:
    from adapters.mqtt.devices import Devices
    from adapters.mqtt.peer import Peer

log: Final = logging.getLogger(__name__)

Key = tuple[TenantId, DeviceId, str]
"""Whose session it is: tenant, device, client id."""

_RELEASE_AGAIN_SECONDS: Final = 1.0


class DeviceRole:
    """One of them (peer.Role)."""

    __slots__ = (
        "_asked",
        "_asking",
        "_left",
        "_moved",
        "_pending",
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
        "publishing",
        "registry",
        "retained",
        "server",
        "session",
        "subscribing",
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
        self.publishing = Publishing(self)
        self.subscribing = Subscribing(self)
        self._pending: set[asyncio.Future[None]] = set()
        self._moved: asyncio.Event | None = None  # made by who waits for it: few do
        self._asked = 0
        self._asking = 0
        self._left = False  # the connection ended before anybody closed the session: what it has said still counts

    @property
    def ready(self) -> bool:
        """Whether a message that is given now can leave now."""
        peer = self.peer
        return peer.transport is not None and peer.alive and self.mqtt.attached and not peer.machine.leaving

    @property
    def held(self) -> Ownership | None:
        """What is to be given back when the connection is gone."""
        return self.ownership or self.will

    @property
    def revoked(self) -> bool:
        """Whether the registry closed the session before its connection ended: nothing that it sent is kept or passed
        on any more."""
        return self.session.closed and not self._left

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
        self.mqtt = Session.restore(snapshot_of(resumed, self.server.ahead), limits)

    def may_have_profile(self, profile_id: ProfileId) -> bool:
        """Whether this is its profile, or may be: while it is asked which one that is, any is."""
        return self.profile_id == profile_id or self._asking > 0

    async def judge(self) -> None:
        """Take away subscriptions, and messages that wait, that the grants of now do not allow.

        When a session is taken up, and whenever grants change. Raises SessionLost, Unavailable.
        """
        self._asked += 1
        asked = self._asked
        self._asking += 1
        try:
            found = await self.broker.messaging.grants.of_device(self.tenant_id, self.own)
        finally:
            self._asking -= 1
        if asked == self._asked:  # else somebody asked later, and judges by a fresher answer
            self.grants, self.profile_id = found.grants, found.profile_id
        if self.grants:
            await self.broker.follow(self)
        gone: list[Subscription] = []
        for subscription in tuple({**self.brokered, **self.mqtt.subscriptions}.values()):
            target = subscribe_target(subscription.filter, self.own)
            if target is None or not await self.subscribing.may_have(target, subscription.filter):
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
        self.publishing.close()
        if self._moved is not None:
            self._moved.set()
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
            detail = ended.text[:MAX_TEXT]
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
                self.publishing.take(receipt, message, levels, now)
            case SubscribeRequested(packet_id, requests, identifier):
                self.subscribing.subscribe(packet_id, requests, identifier, now)
            case UnsubscribeRequested(packet_id, subscriptions):
                self.subscribing.unsubscribe(packet_id, subscriptions, now)
            case Delivered(_, key, _):
                self.finished(key)
            case Discarded(_, delivery, _):
                self.server.counters.discarded += 1
                self.finished(delivery.key, arrived=False)
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

    def finished(self, key: int, *, arrived: bool = True) -> None:
        """A delivery is done, or was discarded. Keys below 0 are downlinks', above 0 rows of the stored queue."""
        if self._moved is not None:
            self._moved.set()
        if key < 0:
            self.downlinks.finished(key, arrived=arrived)
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
