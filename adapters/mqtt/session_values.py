"""What a session holds, as values: messages, deliveries, subscriptions, receipts, and the snapshot that survives us.

Theory
------
A *message* is what somebody published, without what belonged to that one hop (packet id, DUP, alias). A *delivery* is
a message on its way to one subscriber: with the QoS, the RETAIN flag and the subscription identifiers that its
subscriptions give it. A *receipt* names one incoming PUBLISH until its fate is known; it is not the packet id, because
a packet id may return on the next connection while the first message is still being stored.

All times are seconds on one clock, the caller's, which must go on across restarts (UNIX time does) for what is kept
in a snapshot.

What every message makes is a struct of msgspec: made in a fifth of a frozen dataclass's time, and unknown to the
garbage collector, since it forms no cycles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

import msgspec

from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.topics import Filter
from adapters.mqtt.wire_packets import Publish, QoS, RetainHandling, Will

NEVER: Final = float("inf")
_OVERHEAD: Final = 256  # what a queued message costs in objects, in bytes, beside its topic and payload


class Message(msgspec.Struct, frozen=True, gc=False):
    """A published message. `properties` are the forwarded ones only; `expires_at` is a time, None for never."""

    topic: str
    payload: bytes
    qos: QoS = QoS.AT_MOST_ONCE
    retain: bool = False
    properties: Properties = NO_PROPERTIES
    expires_at: float | None = None

    def __repr__(self) -> str:
        """Without the payload, which is the devices' own."""
        return f"Message({self.topic!r}, {len(self.payload)} bytes, {self.qos!r})"

    @property
    def size(self) -> int:
        """About how many bytes it keeps, for limits."""
        size = _OVERHEAD + len(self.topic) + len(self.payload)
        if self.properties is not NO_PROPERTIES:
            size += _OVERHEAD + len(self.properties.correlation_data or b"")
            size += sum(64 + len(name) + len(value) for name, value in self.properties.user_properties)
        return size

    def expired(self, now: float) -> bool:
        """Whether its Message Expiry Interval has passed. 5.0 §3.3.2.3.3."""
        return self.expires_at is not None and now >= self.expires_at


@dataclass(frozen=True, slots=True)
class Subscription:
    """A granted subscription. `qos` is the granted one; `identifier` is the client's, None without one."""

    filter: Filter
    qos: QoS
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: RetainHandling = RetainHandling.SEND
    identifier: int | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message for one subscriber. `key` is the caller's name for it, given back in every event about it."""

    message: Message
    qos: QoS
    retain: bool = False
    subscription_identifiers: tuple[int, ...] = ()
    key: int = 0


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """Names one incoming PUBLISH towards `Session.stored` and `Session.failed`. `size` in bytes."""

    number: int
    packet_id: int
    qos: QoS
    epoch: int
    size: int


class Phase(Enum):
    """Where an outgoing message of QoS 1 or 2 stands. 5.0 §4.3.2, §4.3.3."""

    QUEUED = auto()  # never sent
    PUBLISHED = auto()  # sent, perhaps; a resend has DUP
    RECEIVED = auto()  # QoS 2: PUBREC came, and is being recorded; PUBREL waits for that
    RELEASED = auto()  # QoS 2: PUBREC is recorded; from here on only PUBREL is sent


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One outgoing message with its packet id, as it is kept in a snapshot."""

    packet_id: int
    delivery: Delivery
    phase: Phase


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything of a session that a restart must not lose. 5.0 §4.1.

    `incoming` are packet ids of QoS 2 between stored and released; `outgoing` is in sending order, those that are
    RELEASED in the order of their PUBRECs. `will_at` and `expires_at` are times, None while they do not run.
    """

    subscriptions: tuple[Subscription, ...] = ()
    incoming: tuple[int, ...] = ()
    outgoing: tuple[Outgoing, ...] = ()
    expiry: float = 0.0
    expires_at: float | None = None
    will: Will | None = None
    will_at: float | None = None


def message_of(packet: Publish, topic: str, now: float) -> Message:
    """The message in an incoming PUBLISH whose topic is known."""
    properties, expires_at = _forwarded(packet.properties, now)
    return Message(topic, packet.payload, packet.qos, packet.retain, properties, expires_at)


def message_of_will(will: Will, now: float) -> Message:
    """The message of a will that is published `now`, when its expiry begins to run (5.0 §3.1.3.2.4)."""
    properties, expires_at = _forwarded(will.properties, now)
    return Message(will.topic, will.payload, will.qos, will.retain, properties, expires_at)


def delivery_of(message: Message, subscriptions: Iterable[Subscription], *, own: bool, key: int = 0) -> Delivery | None:
    """One delivery for all subscriptions of one session that match, or None when none of them wants it.

    `own` says that this session published the message: then No Local subscriptions do not count [MQTT-3.8.3-3]. The
    QoS is the highest granted, at most the message's [MQTT-3.3.4-2], [MQTT-3.8.4-8]; all identifiers go along
    [MQTT-3.3.4-4]; RETAIN stays when a subscription asks for it [MQTT-3.3.1-12], [MQTT-3.3.1-13].
    """
    wanted = [one for one in subscriptions if not (own and one.no_local)]
    if not wanted:
        return None
    return Delivery(
        message,
        min(message.qos, max(one.qos for one in wanted)),
        message.retain and any(one.retain_as_published for one in wanted),
        tuple(one.identifier for one in wanted if one.identifier is not None),
        key,
    )


def retained_delivery_of(message: Message, subscription: Subscription, key: int = 0) -> Delivery:
    """A retained message that a new subscription gets: with RETAIN set. 5.0 §3.3.1.3, 3.1.1 [MQTT-3.3.1-8]."""
    identifiers = () if subscription.identifier is None else (subscription.identifier,)
    return Delivery(message, min(message.qos, subscription.qos), True, identifiers, key)


def publish_of(delivery: Delivery, packet_id: int, dup: bool, now: float) -> Publish:
    """The PUBLISH for a delivery in MQTT 5, without an alias. The expiry is what is left of it [MQTT-3.3.2-6]."""
    message = delivery.message
    properties = message.properties
    if message.expires_at is not None or delivery.subscription_identifiers:
        left = None if message.expires_at is None else min(0xFFFF_FFFF, max(0, int(message.expires_at - now)))
        properties = replace(
            properties,
            message_expiry_interval=left,
            subscription_identifiers=delivery.subscription_identifiers,
        )
    return Publish(message.topic, message.payload, delivery.qos, delivery.retain, dup, packet_id, properties)


def _forwarded(properties: Properties, now: float) -> tuple[Properties, float | None]:
    if properties is NO_PROPERTIES:
        return NO_PROPERTIES, None
    interval = properties.message_expiry_interval
    kept = Properties(
        payload_format_indicator=properties.payload_format_indicator,
        content_type=properties.content_type,
        response_topic=properties.response_topic,
        correlation_data=properties.correlation_data,
        user_properties=properties.user_properties,
    )
    return (NO_PROPERTIES if kept == NO_PROPERTIES else kept), (None if interval is None else now + interval)
