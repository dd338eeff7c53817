"""The packets of MQTT as values: what each one says, not how it is written.

One class for each packet of both versions. What 3.1.1 lacks stands at its default there: no properties, reason
SUCCESS. Values are only as valid as their types; the rules that need both versions' bytes are in `wire`, the rules
that need a connection's history are in `machine`. Nothing here prints a payload or a password.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version


class QoS(IntEnum):
    """How surely a message is delivered. 5.0 §4.3."""

    AT_MOST_ONCE = 0
    AT_LEAST_ONCE = 1
    EXACTLY_ONCE = 2


class RetainHandling(IntEnum):
    """When retained messages are sent for a subscription. 5.0 §3.8.3.1."""

    SEND = 0
    SEND_IF_NEW = 1
    DO_NOT_SEND = 2


@dataclass(frozen=True, slots=True)
class Will:
    """The message to publish when the client is gone without a goodbye. 5.0 §3.1.2.5. `delay` is in properties."""

    topic: str
    payload: bytes = field(repr=False)
    qos: QoS = QoS.AT_MOST_ONCE
    retain: bool = False
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Connect:
    """5.0 §3.1. `keep_alive` in seconds, 0 for none. `clean_start` is 3.1.1's clean session."""

    version: Version
    client_id: str
    clean_start: bool = True
    keep_alive: int = 0
    will: Will | None = None
    user_name: str | None = None
    password: bytes | None = field(default=None, repr=False)
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Connack:
    """5.0 §3.2. In 3.1.1 only reasons that have a return code can be encoded."""

    session_present: bool = False
    reason: ReasonCode = ReasonCode.SUCCESS
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Publish:
    """5.0 §3.3. `packet_id` is 0 exactly when `qos` is 0; the topic may be empty in 5.0 with an alias."""

    topic: str
    payload: bytes = field(repr=False)
    qos: QoS = QoS.AT_MOST_ONCE
    retain: bool = False
    dup: bool = False
    packet_id: int = 0
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Ack:
    """PUBACK, PUBREC, PUBREL or PUBCOMP, which differ in `type` alone. 5.0 §3.4 to §3.7."""

    type: PacketType
    packet_id: int
    reason: ReasonCode = ReasonCode.SUCCESS
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class SubscriptionRequest:
    """One filter of SUBSCRIBE with its options. 5.0 §3.8.3.1; in 3.1.1 only the QoS."""

    filter: str
    qos: QoS = QoS.AT_MOST_ONCE
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: RetainHandling = RetainHandling.SEND


@dataclass(frozen=True, slots=True)
class Subscribe:
    """5.0 §3.8. At least one request."""

    packet_id: int
    requests: tuple[SubscriptionRequest, ...]
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Suback:
    """5.0 §3.9. One reason for each request, in their order."""

    packet_id: int
    reasons: tuple[ReasonCode, ...]
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """5.0 §3.10. At least one filter."""

    packet_id: int
    filters: tuple[str, ...]
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Unsuback:
    """5.0 §3.11. One reason for each filter, in their order; 3.1.1 has none on the wire."""

    packet_id: int
    reasons: tuple[ReasonCode, ...] = ()
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Ping:
    """PINGREQ or PINGRESP. 5.0 §3.12, §3.13."""

    type: PacketType


@dataclass(frozen=True, slots=True)
class Disconnect:
    """5.0 §3.14. In 3.1.1 only clients send it, and it says nothing."""

    reason: ReasonCode = ReasonCode.SUCCESS
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Auth:
    """5.0 §3.15."""

    reason: ReasonCode = ReasonCode.SUCCESS
    properties: Properties = NO_PROPERTIES


Packet: TypeAlias = (
    Connect | Connack | Publish | Ack | Subscribe | Suback | Unsubscribe | Unsuback | Ping | Disconnect | Auth
)
