"""A peer without credentials: it may ask on `provision/request`, and gets its answers itself, nobody else.

    CONNECT user `provision` ─► room? ─► a session that nobody else has ─► requests, one after the other ─► closed
                                                                             by the peer, or when its time is over

It has no identity, so it opens no session of the registry, reaches no topic but its own two, and takes over nobody's
client id: two provisioners may have the same one. The answer goes to the Response Topic with the Correlation Data where
MQTT 5 has them (5.0 §4.10), else to `provision/response`, and to this connection only, subscribed or not: what the
answer contains is meant for whoever showed the key. The PUBLISH is acknowledged when the answer is on its way; a
refusal is an answer, not a refused PUBLISH. A will would be published by nobody in particular, so it is refused.

Bounds: connections at once, in all and of one address; their time, and a shorter one until the first request; requests
on one; attempts of an address over time. When every place is taken, the address that holds the most gives one up to a
newcomer whose address will then hold no more than that one keeps: its oldest that has no request under way (the rule of
tls/admission.py). So strays from few addresses shut nobody out, and an address with one connection keeps it. A place
goes with its connection, once: who is displaced has left before the newcomer comes in.

What can be lost: the answer, with the connection. The request may then be repeated (registry/key_claim.py, `nonce`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from uuid import uuid4

import msgspec

from adapters.mqtt.machine_events import (
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
from adapters.mqtt.properties import Properties
from adapters.mqtt.session import Session
from adapters.mqtt.session_values import Delivery, Message, Receipt
from adapters.mqtt.topics import matches, parse_filter
from adapters.mqtt.wire_packets import Connect, QoS
from adapters.mqtt.wire_reasons import ReasonCode
from adapters.provisioning import Provisioning, error_answer
from adapters.tls.admission import address_block
from registry.errors import ResourceExhausted
from registry.model import Contact, Transport
from registry.rate_limits import RateLimiter

if TYPE_CHECKING:
    from adapters.mqtt.peer import Peer
    from adapters.mqtt.server import MqttServer
    from adapters.mqtt.server_limits import ServerLimits

REQUEST: Final = "provision/request"
RESPONSE: Final = "provision/response"
_REQUEST_LEVELS: Final = ("provision", "request")
_RESPONSE_LEVELS: Final = ("provision", "response")


class Provisioners:
    """Every peer without credentials of a server."""

    def __init__(self, server: MqttServer, provisioning: Provisioning, limits: ServerLimits) -> None:
        self.server = server
        self.provisioning = provisioning
        self.limits = limits
        self._attempts = RateLimiter(limits.provisioning_attempts_per_second, limits.provisioning_attempts_burst)
        self._by_block: dict[str, dict[Provisioner, None]] = {}
        """Oldest first."""
        self._count = 0

    def admit(self, peer: Peer, connect: Connect) -> None:
        """Accept or refuse a CONNECT that names nobody."""
        if connect.will is not None:
            peer.refuse(ReasonCode.NOT_AUTHORIZED)
            return
        block = address_block(peer.address)
        here = len(self._by_block.get(block, ()))
        full = here >= self.limits.provisioning_per_address
        if full or (self._count >= self.limits.provisioning and not self._displaced_for(here)):
            self.server.counters.turned_away += 1
            self.server.counters.provisioning_full += 1
            peer.refuse(ReasonCode.QUOTA_EXCEEDED)
            return
        machine = peer.machine
        machine.limits = self.limits.provisioning_machine
        peer.role = role = Provisioner(self, peer, block)
        self._by_block.setdefault(block, {})[role] = None
        self._count += 1
        assigned = None if connect.client_id else f"provision-{uuid4().hex[:16]}"
        machine.accept(role.session, session_present=False, now=self.server.now(), client_id=assigned)
        peer.pump()

    def leave(self, role: Provisioner) -> None:
        """One is gone."""
        held = self._by_block[role.block]
        del held[role]
        if not held:
            del self._by_block[role.block]
        self._count -= 1

    def attempt(self, block: str) -> None:
        """Count one request. Raises ResourceExhausted."""
        wait = self._attempts.take(block, self.server.now())
        if wait is not None:
            self.server.counters.provisioning_refused += 1
            raise ResourceExhausted("this address has sent too many provisioning attempts", retry_after=wait)

    def _displaced_for(self, here: int) -> bool:
        """Make room for somebody whose block holds `here`; False: nobody who could wait holds so many more."""
        for held in sorted(self._by_block.values(), key=len, reverse=True):
            if len(held) <= here + 1:
                return False
            idle = next((role for role in held if not role.answering), None)
            if idle is not None:
                self.server.counters.provisioning_displaced += 1
                idle.displace()
                return True
        return False


class Provisioner:
    """One of them (peer.Role)."""

    def __init__(self, owner: Provisioners, peer: Peer, block: str) -> None:
        self._owner = owner
        self._peer = peer
        self.block = block
        self.answering = 0
        """Requests under way."""
        self._asked = 0
        self.session = Session(peer.machine.limits)
        loop, limits = owner.server.loop, owner.limits
        self._until = loop.time() + limits.provisioning_seconds
        if limits.provisioning_silence < limits.provisioning_seconds:
            self._timer = loop.call_later(limits.provisioning_silence, self._over)
        else:
            self._timer = loop.call_at(self._until, self._over)

    def handle(self, event: Event, now: float) -> None:
        match event:
            case PublishReceived(receipt, message, levels):
                self._publish(receipt, message, levels, now)
            case SubscribeRequested(packet_id, requests, _):
                reasons = [self._judge(request.filter, request.qos) for request in requests]
                self._peer.machine.subscribed(packet_id, reasons, now)
            case UnsubscribeRequested(packet_id, _):
                self._peer.machine.unsubscribed(packet_id, now)
            case (
                Delivered() | Discarded() | ReceiptRecorded() | ReleaseReceived() | SessionEnded() | WillDue()
            ):  # nothing is kept of it
                pass
            case _:
                raise AssertionError(f"the peer passed {type(event).__name__} on")

    def lost(self, ended: Ended | None, now: float) -> None:
        self._timer.cancel()
        self._owner.leave(self)

    def displace(self) -> None:
        """Give up the place to an address that holds fewer; it has left when this returns."""
        self._peer.end(ReasonCode.QUOTA_EXCEEDED, publish_will=False, text="the place is needed for another address")

    def _over(self) -> None:
        self._owner.server.counters.provisioning_timed_out += 1
        text = "provisioning took too long" if self._asked else "nothing was asked"
        self._peer.end(ReasonCode.MAXIMUM_CONNECT_TIME, publish_will=False, text=text)

    def _judge(self, text: str, qos: QoS) -> ReasonCode:
        topic_filter = parse_filter(text)
        if topic_filter.group is not None or topic_filter.levels[:2] != _RESPONSE_LEVELS:
            return ReasonCode.NOT_AUTHORIZED
        return ReasonCode(qos)

    def _publish(self, receipt: Receipt, message: Message, levels: tuple[str, ...], now: float) -> None:
        if levels != _REQUEST_LEVELS:
            self.session.failed(receipt, ReasonCode.NOT_AUTHORIZED, now, "only provision/request is open here")
            return
        self._asked += 1
        if self._asked == 1:
            self._timer.cancel()
            self._timer = self._owner.server.loop.call_at(self._until, self._over)
        if self._asked > self._owner.limits.provisioning_attempts:
            self._owner.server.counters.provisioning_refused += 1
            self.session.failed(receipt, ReasonCode.QUOTA_EXCEEDED, now, "too many requests on one connection")
            return
        self.answering += 1
        self._peer.start(self._answer(receipt, message))

    async def _answer(self, receipt: Receipt, message: Message) -> None:
        contact = Contact(Transport.MQTT, self._peer.address, uuid4().hex)
        try:
            self._owner.attempt(self.block)
            answer = await self._owner.provisioning.answer(message.payload, contact)
        except ResourceExhausted as error:
            answer = error_answer(error, contact.correlation_id)
        finally:
            self.answering -= 1
        now = self._owner.server.now()
        self.session.deliver(response_to(message, msgspec.json.encode(answer), RESPONSE, self._qos(message)), now)
        self.session.stored(receipt, now)

    def _qos(self, request: Message) -> QoS:
        """As the peer has subscribed for it; without a subscription as it asked, at most once more than needed."""
        topic = request.properties.response_topic or RESPONSE
        levels = tuple(topic.split("/"))
        granted = [one.qos for one in self.session.subscriptions.values() if matches(one.filter.levels, levels)]
        return max(granted) if granted else min(request.qos, QoS.AT_LEAST_ONCE)


def response_to(request: Message, payload: bytes, otherwise: str, qos: QoS, *, key: int = 0) -> Delivery:
    """The response to a request: to its Response Topic with its Correlation Data, or to the topic `otherwise`."""
    properties = Properties(
        payload_format_indicator=1,
        content_type="application/json",
        correlation_data=request.properties.correlation_data,
    )
    topic = request.properties.response_topic or otherwise
    return Delivery(Message(topic, payload, qos, properties=properties), qos, key=key)
