"""The properties of MQTT 5: one value with a field for each, and the table of who may carry what. 5.0 §2.2.2.

Theory
------
Every property has an identifier, a data type and the set of packets that it may stand in (table 2-4). An unknown
identifier, or one in a packet that may not carry it, is malformed (§2.2.2.2); a second occurrence or a value outside
its range is a protocol error (§3.1.2.11 and alike). Two may repeat: the user property everywhere, in order
[MQTT-3.3.2-18], and the subscription identifier in PUBLISH. User properties are the only unbounded number, so their
count is capped by the caller.

None means absent. Most packets carry none, and share `NO_PROPERTIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, TypeAlias

from adapters.mqtt.wire_fields import (
    Reader,
    write_binary,
    write_four,
    write_text,
    write_two,
    write_varint,
)
from adapters.mqtt.wire_reasons import (
    LocalProtocolError,
    PacketType,
    ReasonCode,
    RemoteProtocolError,
    malformed,
    violation,
)

UserProperties: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Properties:
    """The properties of one packet, or of a will. Intervals in seconds, sizes in bytes, flags as 0 or 1."""

    payload_format_indicator: int | None = None
    message_expiry_interval: int | None = None
    content_type: str | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    subscription_identifiers: tuple[int, ...] = ()
    session_expiry_interval: int | None = None
    assigned_client_identifier: str | None = None
    server_keep_alive: int | None = None
    authentication_method: str | None = None
    authentication_data: bytes | None = None
    request_problem_information: int | None = None
    will_delay_interval: int | None = None
    request_response_information: int | None = None
    response_information: str | None = None
    server_reference: str | None = None
    reason_string: str | None = None
    receive_maximum: int | None = None
    topic_alias_maximum: int | None = None
    topic_alias: int | None = None
    maximum_qos: int | None = None
    retain_available: int | None = None
    user_properties: UserProperties = ()
    maximum_packet_size: int | None = None
    wildcard_subscription_available: int | None = None
    subscription_identifier_available: int | None = None
    shared_subscription_available: int | None = None

    def __repr__(self) -> str:
        """Names of what is present only: authentication data and user properties may hold secrets."""
        return f"Properties({', '.join(name for name in self.__slots__ if getattr(self, name) not in (None, ()))})"


NO_PROPERTIES: Final = Properties()

WILL: Final = 0
"""Where a packet type is asked for, the properties of the will inside CONNECT (§3.1.3.2)."""


class _Kind(Enum):
    FLAG = auto()  # one byte, 0 or 1
    TWO = auto()
    FOUR = auto()
    VARINT = auto()
    TEXT = auto()
    BINARY = auto()
    PAIR = auto()


@dataclass(frozen=True, slots=True)
class _Rule:
    kind: _Kind
    carriers: frozenset[int]
    zero: ReasonCode | None = None  # the reason to refuse a zero with, where zero is not allowed


def _in(*carriers: int) -> frozenset[int]:
    return frozenset(carriers)


_CONNECT: Final = PacketType.CONNECT
_CONNACK: Final = PacketType.CONNACK
_PUBLISH: Final = PacketType.PUBLISH
_MESSAGE: Final = _in(_PUBLISH, WILL)
_ANSWERS: Final = _in(
    _CONNACK,
    PacketType.PUBACK,
    PacketType.PUBREC,
    PacketType.PUBREL,
    PacketType.PUBCOMP,
    PacketType.SUBACK,
    PacketType.UNSUBACK,
    PacketType.DISCONNECT,
    PacketType.AUTH,
)
_RULES: Final[dict[int, _Rule]] = {
    # 5.0 table 2-4
    0x01: _Rule(_Kind.FLAG, _MESSAGE),
    0x02: _Rule(_Kind.FOUR, _MESSAGE),
    0x03: _Rule(_Kind.TEXT, _MESSAGE),
    0x08: _Rule(_Kind.TEXT, _MESSAGE),
    0x09: _Rule(_Kind.BINARY, _MESSAGE),
    0x0B: _Rule(_Kind.VARINT, _in(_PUBLISH, PacketType.SUBSCRIBE), zero=ReasonCode.PROTOCOL_ERROR),  # §3.8.2.1.2
    0x11: _Rule(_Kind.FOUR, _in(_CONNECT, _CONNACK, PacketType.DISCONNECT)),
    0x12: _Rule(_Kind.TEXT, _in(_CONNACK)),
    0x13: _Rule(_Kind.TWO, _in(_CONNACK)),
    0x15: _Rule(_Kind.TEXT, _in(_CONNECT, _CONNACK, PacketType.AUTH)),
    0x16: _Rule(_Kind.BINARY, _in(_CONNECT, _CONNACK, PacketType.AUTH)),
    0x17: _Rule(_Kind.FLAG, _in(_CONNECT)),
    0x18: _Rule(_Kind.FOUR, _in(WILL)),
    0x19: _Rule(_Kind.FLAG, _in(_CONNECT)),
    0x1A: _Rule(_Kind.TEXT, _in(_CONNACK)),
    0x1C: _Rule(_Kind.TEXT, _in(_CONNACK, PacketType.DISCONNECT)),
    0x1F: _Rule(_Kind.TEXT, _ANSWERS),
    0x21: _Rule(_Kind.TWO, _in(_CONNECT, _CONNACK), zero=ReasonCode.PROTOCOL_ERROR),  # §3.1.2.11.3
    0x22: _Rule(_Kind.TWO, _in(_CONNECT, _CONNACK)),
    0x23: _Rule(_Kind.TWO, _in(_PUBLISH), zero=ReasonCode.TOPIC_ALIAS_INVALID),  # [MQTT-3.3.2-8], §3.3.2.3.4
    0x24: _Rule(_Kind.FLAG, _in(_CONNACK)),
    0x25: _Rule(_Kind.FLAG, _in(_CONNACK)),
    0x26: _Rule(_Kind.PAIR, _ANSWERS | _MESSAGE | _in(_CONNECT, PacketType.SUBSCRIBE, PacketType.UNSUBSCRIBE)),
    0x27: _Rule(_Kind.FOUR, _in(_CONNECT, _CONNACK), zero=ReasonCode.PROTOCOL_ERROR),  # §3.1.2.11.4
    0x28: _Rule(_Kind.FLAG, _in(_CONNACK)),
    0x29: _Rule(_Kind.FLAG, _in(_CONNACK)),
    0x2A: _Rule(_Kind.FLAG, _in(_CONNACK)),
}


def read_properties(reader: Reader, carrier: int, max_user_properties: int) -> Properties:
    """The property length and the properties after it, in a packet of type `carrier` (or `WILL`).

    Raises RemoteProtocolError; `max_user_properties` is ours, and exceeding it is QUOTA_EXCEEDED.
    """
    size = reader.varint()
    if size == 0:
        return NO_PROPERTIES
    if reader.at + size > reader.end:
        raise malformed("properties longer than their packet")
    inner = Reader(reader.data, reader.at)
    inner.end = reader.at + size
    reader.at = inner.end
    numbers: dict[int, int] = {}
    texts: dict[int, str] = {}
    blobs: dict[int, bytes] = {}
    pairs: list[tuple[str, str]] = []
    identifiers: list[int] = []
    while inner.at < inner.end:
        identifier = inner.varint()
        rule = _RULES.get(identifier)
        if rule is None or carrier not in rule.carriers:
            raise malformed(f"property {identifier:#04x} is not allowed in this packet")
        if identifier in numbers or identifier in texts or identifier in blobs:
            raise violation(f"property {identifier:#04x} more than once")
        match rule.kind:
            case _Kind.PAIR:
                if len(pairs) >= max_user_properties:
                    raise RemoteProtocolError(
                        ReasonCode.QUOTA_EXCEEDED, f"more than {max_user_properties} user properties"
                    )
                pairs.append((inner.text(), inner.text()))
            case _Kind.TEXT:
                texts[identifier] = inner.text()
            case _Kind.BINARY:
                blobs[identifier] = inner.binary()
            case _Kind.FLAG | _Kind.TWO | _Kind.FOUR | _Kind.VARINT:
                number = _number(inner, identifier, rule)
                if identifier == 0x0B and carrier == _PUBLISH:
                    identifiers.append(number)  # one for each matching subscription, so no count of ours
                else:
                    numbers[identifier] = number
    if 0x0B in numbers:
        identifiers.append(numbers[0x0B])
    return Properties(
        payload_format_indicator=numbers.get(0x01),
        message_expiry_interval=numbers.get(0x02),
        content_type=texts.get(0x03),
        response_topic=texts.get(0x08),
        correlation_data=blobs.get(0x09),
        subscription_identifiers=tuple(identifiers),
        session_expiry_interval=numbers.get(0x11),
        assigned_client_identifier=texts.get(0x12),
        server_keep_alive=numbers.get(0x13),
        authentication_method=texts.get(0x15),
        authentication_data=blobs.get(0x16),
        request_problem_information=numbers.get(0x17),
        will_delay_interval=numbers.get(0x18),
        request_response_information=numbers.get(0x19),
        response_information=texts.get(0x1A),
        server_reference=texts.get(0x1C),
        reason_string=texts.get(0x1F),
        receive_maximum=numbers.get(0x21),
        topic_alias_maximum=numbers.get(0x22),
        topic_alias=numbers.get(0x23),
        maximum_qos=numbers.get(0x24),
        retain_available=numbers.get(0x25),
        user_properties=tuple(pairs),
        maximum_packet_size=numbers.get(0x27),
        wildcard_subscription_available=numbers.get(0x28),
        subscription_identifier_available=numbers.get(0x29),
        shared_subscription_available=numbers.get(0x2A),
    )


def write_properties(value: Properties, carrier: int) -> bytes:
    """The property length and the properties; a single zero byte for none [MQTT-2.2.2-1]."""
    if value is NO_PROPERTIES:
        return b"\0"
    out: list[bytes] = []
    for identifier, number in (
        (0x01, value.payload_format_indicator),
        (0x02, value.message_expiry_interval),
        (0x11, value.session_expiry_interval),
        (0x13, value.server_keep_alive),
        (0x17, value.request_problem_information),
        (0x18, value.will_delay_interval),
        (0x19, value.request_response_information),
        (0x21, value.receive_maximum),
        (0x22, value.topic_alias_maximum),
        (0x23, value.topic_alias),
        (0x24, value.maximum_qos),
        (0x25, value.retain_available),
        (0x27, value.maximum_packet_size),
        (0x28, value.wildcard_subscription_available),
        (0x29, value.subscription_identifier_available),
        (0x2A, value.shared_subscription_available),
    ):
        if number is not None:
            out.append(_write_number(identifier, number, carrier))
    for number in value.subscription_identifiers:
        out.append(_write_number(0x0B, number, carrier))
    if len(value.subscription_identifiers) > 1 and carrier != _PUBLISH:
        raise LocalProtocolError("several subscription identifiers outside PUBLISH")
    for identifier, text in (
        (0x03, value.content_type),
        (0x08, value.response_topic),
        (0x12, value.assigned_client_identifier),
        (0x15, value.authentication_method),
        (0x1A, value.response_information),
        (0x1C, value.server_reference),
        (0x1F, value.reason_string),
    ):
        if text is not None:
            _rule(identifier, carrier)
            out.append(bytes((identifier,)) + write_text(text))
    for identifier, blob in ((0x09, value.correlation_data), (0x16, value.authentication_data)):
        if blob is not None:
            _rule(identifier, carrier)
            out.append(bytes((identifier,)) + write_binary(blob))
    if value.user_properties:
        _rule(0x26, carrier)
        for name, text in value.user_properties:
            out.append(b"\x26" + write_text(name) + write_text(text))
    body = b"".join(out)
    return write_varint(len(body)) + body


def _number(reader: Reader, identifier: int, rule: _Rule) -> int:
    match rule.kind:
        case _Kind.FLAG:
            number = reader.byte()
            if number > 1:
                raise violation(f"property {identifier:#04x} is {number}; it may be 0 or 1")
        case _Kind.TWO:
            number = reader.two()
        case _Kind.FOUR:
            number = reader.four()
        case _:
            number = reader.varint()
    if number == 0 and rule.zero is not None:
        raise RemoteProtocolError(rule.zero, f"property {identifier:#04x} must not be 0")
    return number


def _rule(identifier: int, carrier: int) -> _Rule:
    rule = _RULES[identifier]
    if carrier not in rule.carriers:
        raise LocalProtocolError(f"property {identifier:#04x} is not allowed in this packet")
    return rule


def _write_number(identifier: int, number: int, carrier: int) -> bytes:
    rule = _rule(identifier, carrier)
    if number == 0 and rule.zero is not None:
        raise LocalProtocolError(f"property {identifier:#04x} must not be 0")
    tag = bytes((identifier,))
    match rule.kind:
        case _Kind.FLAG:
            if number not in (0, 1):
                raise LocalProtocolError(f"property {identifier:#04x} is {number}; it may be 0 or 1")
            return tag + bytes((number,))
        case _Kind.TWO:
            return tag + write_two(number)
        case _Kind.FOUR:
            return tag + write_four(number)
        case _:
            return tag + write_varint(number)
