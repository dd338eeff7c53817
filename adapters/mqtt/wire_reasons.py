"""Versions, reason codes, and the two errors: theirs and ours.

Theory
------
MQTT 5 §2.4 gives every outcome one byte; which of them a packet may carry is a table, and a code that is not in its
packet's row is a malformed packet when it arrives and our own bug when we send it. MQTT 3.1.1 has return codes in two
packets only (§3.2.2.3, §3.9.3); `CONNACK_RETURN_CODES` says which of our reasons they can express. For all others
3.1.1 has one answer, a closed connection.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Version(IntEnum):
    """The protocol level in CONNECT. 3.1.1: §3.1.2.2; 5.0: §3.1.2.2."""

    V311 = 4
    V5 = 5


class PacketType(IntEnum):
    """The high half of a packet's first byte. 5.0 §2.1.2; AUTH does not exist in 3.1.1."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14
    AUTH = 15


class ReasonCode(IntEnum):
    """MQTT 5 §2.4. From 0x80 on the operation failed."""

    SUCCESS = 0x00  # also normal disconnection and granted QoS 0
    GRANTED_QOS_1 = 0x01
    GRANTED_QOS_2 = 0x02
    DISCONNECT_WITH_WILL = 0x04
    NO_MATCHING_SUBSCRIBERS = 0x10
    NO_SUBSCRIPTION_EXISTED = 0x11
    CONTINUE_AUTHENTICATION = 0x18
    RE_AUTHENTICATE = 0x19
    UNSPECIFIED_ERROR = 0x80
    MALFORMED_PACKET = 0x81
    PROTOCOL_ERROR = 0x82
    IMPLEMENTATION_SPECIFIC_ERROR = 0x83
    UNSUPPORTED_PROTOCOL_VERSION = 0x84
    CLIENT_IDENTIFIER_NOT_VALID = 0x85
    BAD_USER_NAME_OR_PASSWORD = 0x86
    NOT_AUTHORIZED = 0x87
    SERVER_UNAVAILABLE = 0x88
    SERVER_BUSY = 0x89
    BANNED = 0x8A
    SERVER_SHUTTING_DOWN = 0x8B
    BAD_AUTHENTICATION_METHOD = 0x8C
    KEEP_ALIVE_TIMEOUT = 0x8D
    SESSION_TAKEN_OVER = 0x8E
    TOPIC_FILTER_INVALID = 0x8F
    TOPIC_NAME_INVALID = 0x90
    PACKET_IDENTIFIER_IN_USE = 0x91
    PACKET_IDENTIFIER_NOT_FOUND = 0x92
    RECEIVE_MAXIMUM_EXCEEDED = 0x93
    TOPIC_ALIAS_INVALID = 0x94
    PACKET_TOO_LARGE = 0x95
    MESSAGE_RATE_TOO_HIGH = 0x96
    QUOTA_EXCEEDED = 0x97
    ADMINISTRATIVE_ACTION = 0x98
    PAYLOAD_FORMAT_INVALID = 0x99
    RETAIN_NOT_SUPPORTED = 0x9A
    QOS_NOT_SUPPORTED = 0x9B
    USE_ANOTHER_SERVER = 0x9C
    SERVER_MOVED = 0x9D
    SHARED_SUBSCRIPTIONS_NOT_SUPPORTED = 0x9E
    CONNECTION_RATE_EXCEEDED = 0x9F
    MAXIMUM_CONNECT_TIME = 0xA0
    SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED = 0xA1
    WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED = 0xA2

    @property
    def failed(self) -> bool:
        """Whether the operation did not succeed. 5.0 §2.4."""
        return self >= 0x80


_PUBLISH_ANSWERS: Final = frozenset((0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99))
_RELEASE_ANSWERS: Final = frozenset((0x00, 0x92))

REASONS_OF: Final[dict[PacketType, frozenset[int]]] = {
    # 5.0 tables 3-1, 3-4 to 3-9, 3-10, 3-11
    PacketType.CONNACK: frozenset(
        (0x00, *range(0x80, 0x8B), 0x8C, 0x90, 0x95, 0x97, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9F)
    ),
    PacketType.PUBACK: _PUBLISH_ANSWERS,
    PacketType.PUBREC: _PUBLISH_ANSWERS,
    PacketType.PUBREL: _RELEASE_ANSWERS,
    PacketType.PUBCOMP: _RELEASE_ANSWERS,
    PacketType.SUBACK: frozenset((0x00, 0x01, 0x02, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2)),
    PacketType.UNSUBACK: frozenset((0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91)),
    PacketType.DISCONNECT: frozenset(
        (0x00, 0x04, *range(0x80, 0x84), 0x87, 0x89, 0x8B, *range(0x8D, 0x91), *range(0x93, 0xA3))
    ),
    PacketType.AUTH: frozenset((0x00, 0x18, 0x19)),
}
"""Which reason codes each packet of MQTT 5 may carry."""

CONNACK_RETURN_CODES: Final[dict[ReasonCode, int]] = {
    # 3.1.1 table 3.1. A reason that is not here has no return code: close without CONNACK [MQTT-3.2.2-6].
    ReasonCode.SUCCESS: 0,
    ReasonCode.UNSUPPORTED_PROTOCOL_VERSION: 1,
    ReasonCode.CLIENT_IDENTIFIER_NOT_VALID: 2,
    ReasonCode.SERVER_UNAVAILABLE: 3,
    ReasonCode.SERVER_BUSY: 3,
    ReasonCode.QUOTA_EXCEEDED: 3,
    ReasonCode.CONNECTION_RATE_EXCEEDED: 3,
    ReasonCode.BAD_USER_NAME_OR_PASSWORD: 4,
    ReasonCode.NOT_AUTHORIZED: 5,
    ReasonCode.BANNED: 5,
}


class RemoteProtocolError(Exception):
    """The peer broke the protocol. `reason` is the code of MQTT 5 to answer with before closing.

    The text names rules and numbers, never what the peer sent, so it is safe for logs and for the peer.
    """

    def __init__(self, reason: ReasonCode, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


class LocalProtocolError(Exception):
    """We were about to break the protocol: a bug of ours."""


def malformed(text: str) -> RemoteProtocolError:
    """Bytes that cannot be parsed as this packet. 5.0 §1.2, §4.13.1."""
    return RemoteProtocolError(ReasonCode.MALFORMED_PACKET, text)


def violation(text: str) -> RemoteProtocolError:
    """A packet that parses and is not allowed. 5.0 §1.2, §4.13.1."""
    return RemoteProtocolError(ReasonCode.PROTOCOL_ERROR, text)
