"""What a connection and a session tell their server. Each event says what the server owes in return."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import msgspec

from adapters.mqtt.session_values import Delivery, Message, Receipt, Subscription
from adapters.mqtt.wire_packets import Connect, SubscriptionRequest
from adapters.mqtt.wire_reasons import ReasonCode


@dataclass(frozen=True, slots=True)
class ConnectRequested:
    """A valid CONNECT. Owed: `Connection.accept` or `Connection.refuse`. Nothing more is read until then."""

    connect: Connect


class PublishReceived(msgspec.Struct, frozen=True, gc=False):
    """A message. Owed, for every QoS: `Session.stored` once it is committed, or `Session.failed`.

    For QoS 2 in a durable session the commit includes `receipt.packet_id` among the incoming ids of the session.
    `levels` are the topic's.
    """

    receipt: Receipt
    message: Message
    levels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReleaseReceived:
    """PUBREL in a durable session. Owed: forget the incoming id durably, then `Session.released`."""

    packet_id: int


@dataclass(frozen=True, slots=True)
class SubscribeRequested:
    """Filters to judge. Owed: `Connection.subscribed` with one reason for each. Nothing more is read until then."""

    packet_id: int
    requests: tuple[SubscriptionRequest, ...]
    identifier: int | None


@dataclass(frozen=True, slots=True)
class UnsubscribeRequested:
    """Subscriptions that end. Owed: `Connection.unsubscribed`. Nothing more is read until then."""

    packet_id: int
    subscriptions: tuple[Subscription, ...]


@dataclass(frozen=True, slots=True)
class ReceiptRecorded:
    """The subscriber sent PUBREC for a QoS 2 delivery in a durable session.

    Owed: record durably that only PUBREL may be sent from now on, then `Session.recorded`.
    """

    packet_id: int
    key: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """The subscriber has acknowledged; its reason may be a failure, and the message is done all the same."""

    packet_id: int
    key: int
    reason: ReasonCode


class DiscardReason(StrEnum):
    """Why a delivery was given up."""

    EXPIRED = "expired"  # [MQTT-3.3.2-5]
    TOO_LARGE = "too_large"  # for the subscriber's Maximum Packet Size [MQTT-3.1.2-25]


@dataclass(frozen=True, slots=True)
class Discarded:
    """A delivery of QoS 1 or 2 that was given up; to be forgotten as a delivered one, and counted."""

    packet_id: int
    delivery: Delivery
    reason: DiscardReason


@dataclass(frozen=True, slots=True)
class WillDue:
    """The will is to be published now."""

    message: Message


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The session is over; its subscriptions and whatever is kept of it are to be dropped."""


class Cause(StrEnum):
    """Who ended a connection, and how."""

    DISCONNECTED = "disconnected"  # by the peer, with DISCONNECT
    LOST = "lost"  # the network closed without one
    VIOLATION = "violation"  # the peer broke the protocol or a limit
    TIMEOUT = "timeout"
    REFUSED = "refused"
    CLOSED = "closed"  # by us


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a connection. Owed: send what `data_to_send` still has, close the network, tick the session.

    `text` names the rule that was broken; it is safe for logs.
    """

    cause: Cause
    reason: ReasonCode
    text: str


SessionEvent: TypeAlias = ReceiptRecorded | Delivered | Discarded | WillDue | SessionEnded
Event: TypeAlias = (
    ConnectRequested
    | PublishReceived
    | ReleaseReceived
    | SubscribeRequested
    | UnsubscribeRequested
    | SessionEvent
    | Ended
)
