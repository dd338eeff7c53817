"""Packets to bytes and back, for MQTT 3.1.1 and 5.0: decode beside encode, one pair for each packet.

Theory
------
`decode` gets the first byte and the body of one packet that `wire_framing` cut out of the stream and whose size was
capped there. It either answers the packet or raises RemoteProtocolError with the reason to answer with; no other
exception leaves it for any bytes (the fuzz tests hold it to that). `encode` raises LocalProtocolError for what the
protocol does not allow us to send. decode(encode(packet)) is the packet again; the other way round does not hold,
because a property may stand in any order.

Both versions share one layout. What differs: 5.0 adds properties and reason codes, 3.1.1 forbids a password without a
user name [MQTT-3.1.2-22] and knows no AUTH. What the reserved flags must be is a table (3.1.1 table 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from adapters.mqtt.properties import NO_PROPERTIES, WILL, Properties, read_properties, write_properties
from adapters.mqtt.wire_fields import Reader, write_binary, write_text, write_two, write_varint
from adapters.mqtt.wire_packets import (
    Ack,
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Ping,
    Publish,
    QoS,
    RetainHandling,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Unsuback,
    Unsubscribe,
    Will,
)
from adapters.mqtt.wire_reasons import (
    CONNACK_RETURN_CODES,
    REASONS_OF,
    LocalProtocolError,
    PacketType,
    ReasonCode,
    RemoteProtocolError,
    Version,
    malformed,
    violation,
)

_QOS: Final = (QoS.AT_MOST_ONCE, QoS.AT_LEAST_ONCE, QoS.EXACTLY_ONCE)
_PROTOCOL_NAME: Final = "MQTT"
_RETURN_CODE_REASONS: Final[dict[int, ReasonCode]] = {
    0: ReasonCode.SUCCESS,
    1: ReasonCode.UNSUPPORTED_PROTOCOL_VERSION,
    2: ReasonCode.CLIENT_IDENTIFIER_NOT_VALID,
    3: ReasonCode.SERVER_UNAVAILABLE,
    4: ReasonCode.BAD_USER_NAME_OR_PASSWORD,
    5: ReasonCode.NOT_AUTHORIZED,
}
_FLAGS: Final[dict[PacketType, int]] = {  # PUBLISH uses all four [MQTT-2.1.3-1]
    kind: 2 if kind in (PacketType.PUBREL, PacketType.SUBSCRIBE, PacketType.UNSUBSCRIBE) else 0
    for kind in PacketType
    if kind is not PacketType.PUBLISH
}
_BY_FIRST_BYTE: Final[dict[int, PacketType]] = {
    **{kind << 4 | flags: kind for kind, flags in _FLAGS.items()},
    **{PacketType.PUBLISH << 4 | flags: PacketType.PUBLISH for flags in range(16)},
}


@dataclass(frozen=True, slots=True)
class WireLimits:
    """What one packet may hold, beyond its size in bytes."""

    user_properties: int = 64  # bridges and tracing use a handful; each costs two strings on every copy of a message
    filters: int = 256  # in one SUBSCRIBE or UNSUBSCRIBE; clients send more packets instead


DEFAULT_WIRE_LIMITS: Final = WireLimits()


def packet_type(first: int) -> PacketType:
    """The type in the first byte of a packet; its reserved flags are checked too [MQTT-2.1.3-1]."""
    kind = _BY_FIRST_BYTE.get(first)
    if kind is not None:
        return kind
    if first >> 4 == 0:
        raise malformed("packet type 0")
    kind = PacketType(first >> 4)
    raise malformed(f"flags {first & 0x0F:#x} in {kind.name}; {_FLAGS[kind]:#x} is allowed")


def announced_version(body: bytes) -> Version | None:
    """The version that the body of a CONNECT claims, or None when it is neither of ours. Raises as `decode`.

    Told apart from decoding because the answer to a CONNECT that is otherwise broken depends on it.
    """
    reader = Reader(body)
    name = reader.text()
    level = reader.byte()
    if name != _PROTOCOL_NAME:
        if name == "MQIsdp" and level == 3:  # MQTT 3.1, whose clients understand the return code
            return None
        raise RemoteProtocolError(ReasonCode.PROTOCOL_ERROR, "a protocol name that is not MQTT")
    if level == Version.V311:
        return Version.V311
    if level == Version.V5:
        return Version.V5
    return None


def decode(first: int, body: bytes, version: Version | None, limits: WireLimits = DEFAULT_WIRE_LIMITS) -> Packet:
    """One packet from its first byte and its body. `version` is None before CONNECT, which brings its own."""
    kind = packet_type(first)
    if kind is PacketType.CONNECT:
        return _decode_connect(body, limits)
    if version is None:
        raise violation(f"{kind.name} before CONNECT")
    if kind is PacketType.PUBLISH:
        return _decode_publish(first, body, version, limits)
    reader = Reader(body)
    packet: Packet
    match kind:
        case PacketType.PUBACK | PacketType.PUBREC | PacketType.PUBREL | PacketType.PUBCOMP:
            packet = _decode_ack(kind, reader, version, limits)
        case PacketType.SUBSCRIBE:
            packet = _decode_subscribe(reader, version, limits)
        case PacketType.SUBACK:
            packet = _decode_suback(reader, version, limits)
        case PacketType.UNSUBSCRIBE:
            packet = _decode_unsubscribe(reader, version, limits)
        case PacketType.UNSUBACK:
            packet = _decode_unsuback(reader, version, limits)
        case PacketType.CONNACK:
            packet = _decode_connack(reader, version, limits)
        case PacketType.PINGREQ | PacketType.PINGRESP:
            packet = Ping(kind)
        case PacketType.DISCONNECT:
            packet = _decode_disconnect(reader, version, limits)
        case PacketType.AUTH:
            packet = _decode_auth(reader, version, limits)
    reader.finish()
    return packet


def encode(packet: Packet, version: Version) -> bytes:
    """The whole packet. Raises LocalProtocolError for what `version` does not allow."""
    match packet:
        case Publish():
            return _encode_publish(packet, version)
        case Ack():
            return _encode_ack(packet, version)
        case Connect():
            return _frame(PacketType.CONNECT, 0, _connect_body(packet, version))
        case Connack():
            return _frame(PacketType.CONNACK, 0, _connack_body(packet, version))
        case Subscribe():
            return _frame(PacketType.SUBSCRIBE, 2, _subscribe_body(packet, version))
        case Suback():
            return _frame(PacketType.SUBACK, 0, _suback_body(packet, version))
        case Unsubscribe():
            return _frame(PacketType.UNSUBSCRIBE, 2, _unsubscribe_body(packet, version))
        case Unsuback():
            return _frame(PacketType.UNSUBACK, 0, _unsuback_body(packet, version))
        case Ping():
            if packet.type not in (PacketType.PINGREQ, PacketType.PINGRESP):
                raise LocalProtocolError(f"a ping of type {packet.type.name}")
            return _frame(packet.type, 0, b"")
        case Disconnect():
            return _frame(PacketType.DISCONNECT, 0, _disconnect_body(packet, version))
        case Auth():
            return _frame(PacketType.AUTH, 0, _auth_body(packet, version))


# CONNECT ------------------------------------------------------------------------------------------------------------


def _decode_connect(body: bytes, limits: WireLimits) -> Connect:
    version = announced_version(body)
    if version is None:
        raise RemoteProtocolError(
            ReasonCode.UNSUPPORTED_PROTOCOL_VERSION, "a protocol level that is neither 4 (3.1.1) nor 5"
        )
    reader = Reader(body, 7)  # past the name and the level
    flags = reader.byte()
    if flags & 0x01:
        raise malformed("the reserved flag of CONNECT is set")  # [MQTT-3.1.2-3]
    has_will = bool(flags & 0x04)
    will_qos = flags >> 3 & 0x03
    has_user, has_password = bool(flags & 0x80), bool(flags & 0x40)
    if not has_will and flags & 0x38:
        raise malformed("will QoS or will retain without a will")  # 5.0 [MQTT-3.1.2-11, -13]
    if will_qos == 3:
        raise malformed("will QoS 3")  # 5.0 [MQTT-3.1.2-12]
    if has_password and not has_user and version is Version.V311:
        raise malformed("a password without a user name")  # 3.1.1 [MQTT-3.1.2-22]
    keep_alive = reader.two()
    properties = NO_PROPERTIES
    if version is Version.V5:
        properties = read_properties(reader, PacketType.CONNECT, limits.user_properties)
        if properties.authentication_data is not None and properties.authentication_method is None:
            raise violation("authentication data without a method")  # 5.0 §3.1.2.11.10
    client_id = reader.text()
    will: Will | None = None
    if has_will:
        will_properties = NO_PROPERTIES
        if version is Version.V5:
            will_properties = read_properties(reader, WILL, limits.user_properties)
        topic = reader.text()
        will = Will(topic, reader.binary(), _QOS[will_qos], bool(flags & 0x20), will_properties)
    user_name = reader.text() if has_user else None
    password = reader.binary() if has_password else None
    reader.finish()
    return Connect(version, client_id, bool(flags & 0x02), keep_alive, will, user_name, password, properties)


def _connect_body(packet: Connect, version: Version) -> bytes:
    if packet.version is not version:
        raise LocalProtocolError("a CONNECT of another version")
    if packet.password is not None and packet.user_name is None and version is Version.V311:
        raise LocalProtocolError("a password without a user name")
    will = packet.will
    flags = 0x02 if packet.clean_start else 0
    if will is not None:
        flags |= 0x04 | will.qos << 3 | (0x20 if will.retain else 0)
    flags |= (0x80 if packet.user_name is not None else 0) | (0x40 if packet.password is not None else 0)
    parts = [write_text(_PROTOCOL_NAME), bytes((version, flags)), write_two(packet.keep_alive)]
    parts.append(_properties(packet.properties, PacketType.CONNECT, version))
    parts.append(write_text(packet.client_id))
    if will is not None:
        parts.append(_properties(will.properties, WILL, version))
        parts.append(write_text(will.topic))
        parts.append(write_binary(will.payload))
    if packet.user_name is not None:
        parts.append(write_text(packet.user_name))
    if packet.password is not None:
        parts.append(write_binary(packet.password))
    return b"".join(parts)


# CONNACK ------------------------------------------------------------------------------------------------------------


def _decode_connack(reader: Reader, version: Version, limits: WireLimits) -> Connack:
    flags = reader.byte()
    if flags > 1:
        raise malformed("reserved flags of CONNACK are set")  # [MQTT-3.2.2-1]
    code = reader.byte()
    if version is Version.V311:
        if code not in _RETURN_CODE_REASONS:
            raise malformed(f"return code {code} in CONNACK")
        reason = _RETURN_CODE_REASONS[code]
        properties = NO_PROPERTIES
    else:
        reason = _reason(code, PacketType.CONNACK)
        properties = read_properties(reader, PacketType.CONNACK, limits.user_properties)
    if flags and reason is not ReasonCode.SUCCESS:
        raise violation("session present in a refusal")  # [MQTT-3.2.2-6]
    return Connack(bool(flags), reason, properties)


def _connack_body(packet: Connack, version: Version) -> bytes:
    if packet.session_present and packet.reason is not ReasonCode.SUCCESS:
        raise LocalProtocolError("session present in a refusal")
    flags = 1 if packet.session_present else 0
    if version is Version.V311:
        code = CONNACK_RETURN_CODES.get(packet.reason)
        if code is None:
            raise LocalProtocolError(f"{packet.reason.name} has no return code in 3.1.1")
        return bytes((flags, code)) + _properties(packet.properties, PacketType.CONNACK, version)
    code = _allowed(packet.reason, PacketType.CONNACK)
    return bytes((flags, code)) + _properties(packet.properties, PacketType.CONNACK, version)


# PUBLISH ------------------------------------------------------------------------------------------------------------


def _decode_publish(first: int, body: bytes, version: Version, limits: WireLimits) -> Publish:
    qos = first >> 1 & 0x03
    if qos == 3:
        raise malformed("QoS 3")  # [MQTT-3.3.1-4]
    dup = bool(first & 0x08)
    if dup and qos == 0:
        raise malformed("DUP with QoS 0")  # [MQTT-3.3.1-2]
    reader = Reader(body)
    topic = reader.text()
    packet_id = _packet_id(reader) if qos else 0
    properties = NO_PROPERTIES
    if version is Version.V5:
        properties = read_properties(reader, PacketType.PUBLISH, limits.user_properties)
        if not topic and properties.topic_alias is None:
            raise violation("neither a topic nor an alias")  # 5.0 §3.3.2.1
    elif not topic:
        raise malformed("an empty topic")  # [MQTT-4.7.3-1]
    return Publish(topic, reader.rest(), _QOS[qos], bool(first & 0x01), dup, packet_id, properties)


def _encode_publish(packet: Publish, version: Version) -> bytes:
    qos = packet.qos
    if packet.dup and not qos:
        raise LocalProtocolError("DUP with QoS 0")  # [MQTT-3.3.1-2]
    if bool(packet.packet_id) != bool(qos):
        raise LocalProtocolError("a packet identifier belongs to QoS 1 and 2")  # [MQTT-2.2.1-2]
    if not packet.topic and packet.properties.topic_alias is None:
        raise LocalProtocolError("neither a topic nor an alias")
    topic = write_text(packet.topic)
    identifier = write_two(packet.packet_id) if qos else b""
    properties = _properties(packet.properties, PacketType.PUBLISH, version)
    first = 0x30 | (8 if packet.dup else 0) | qos << 1 | (1 if packet.retain else 0)
    size = len(topic) + len(identifier) + len(properties) + len(packet.payload)
    return b"".join((bytes((first,)), write_varint(size), topic, identifier, properties, packet.payload))


# PUBACK, PUBREC, PUBREL, PUBCOMP ------------------------------------------------------------------------------------


def _decode_ack(kind: PacketType, reader: Reader, version: Version, limits: WireLimits) -> Ack:
    packet_id = _packet_id(reader)
    if version is Version.V311 or reader.at == reader.end:
        return Ack(kind, packet_id)
    reason = _reason(reader.byte(), kind)
    if reader.at == reader.end:  # 5.0 §3.4.2.2.1: no property length when there is nothing to say
        return Ack(kind, packet_id, reason)
    return Ack(kind, packet_id, reason, read_properties(reader, kind, limits.user_properties))


def _encode_ack(packet: Ack, version: Version) -> bytes:
    first = packet.type << 4 | _FLAGS[packet.type]
    reason = _allowed(packet.reason, packet.type)
    identifier = _identifier(packet.packet_id)
    if version is Version.V311:
        _properties(packet.properties, packet.type, version)
        return bytes((first, 2)) + identifier
    if packet.properties is NO_PROPERTIES or packet.properties == NO_PROPERTIES:
        if packet.reason is ReasonCode.SUCCESS:
            return bytes((first, 2)) + identifier
        return bytes((first, 3)) + identifier + bytes((reason,))
    body = identifier + bytes((reason,)) + write_properties(packet.properties, packet.type)
    return _frame(packet.type, _FLAGS[packet.type], body)


# SUBSCRIBE, SUBACK --------------------------------------------------------------------------------------------------


def _decode_subscribe(reader: Reader, version: Version, limits: WireLimits) -> Subscribe:
    packet_id = _packet_id(reader)
    properties = NO_PROPERTIES
    if version is Version.V5:
        properties = read_properties(reader, PacketType.SUBSCRIBE, limits.user_properties)
    requests: list[SubscriptionRequest] = []
    while reader.at < reader.end:
        if len(requests) >= limits.filters:
            raise RemoteProtocolError(ReasonCode.QUOTA_EXCEEDED, f"more than {limits.filters} filters in one packet")
        topic_filter = reader.text()
        options = reader.byte()
        if options & (0xC0 if version is Version.V5 else 0xFC):
            raise malformed("reserved bits in subscription options")  # [MQTT-3.8.3-5], 3.1.1 [MQTT-3-8.3-4]
        qos = options & 0x03
        handling = options >> 4 & 0x03
        if qos == 3:
            raise malformed("a requested QoS of 3")
        if handling == 3:
            raise violation("retain handling 3")  # 5.0 §3.8.3.1
        requests.append(
            SubscriptionRequest(topic_filter, _QOS[qos], bool(options & 4), bool(options & 8), RetainHandling(handling))
        )
    if not requests:
        raise violation("SUBSCRIBE without a filter")  # [MQTT-3.8.3-2]
    return Subscribe(packet_id, tuple(requests), properties)


def _subscribe_body(packet: Subscribe, version: Version) -> bytes:
    if not packet.requests:
        raise LocalProtocolError("SUBSCRIBE without a filter")
    parts = [_identifier(packet.packet_id), _properties(packet.properties, PacketType.SUBSCRIBE, version)]
    for request in packet.requests:
        options = (
            request.qos
            | (4 if request.no_local else 0)
            | (8 if request.retain_as_published else 0)
            | request.retain_handling << 4
        )
        if version is Version.V311 and options > 2:
            raise LocalProtocolError("subscription options of 5.0")
        parts.append(write_text(request.filter) + bytes((options,)))
    return b"".join(parts)


def _decode_suback(reader: Reader, version: Version, limits: WireLimits) -> Suback:
    packet_id = _packet_id(reader)
    properties = NO_PROPERTIES
    if version is Version.V5:
        properties = read_properties(reader, PacketType.SUBACK, limits.user_properties)
    codes = reader.rest()
    if not codes:
        raise violation("SUBACK without a reason code")
    if version is Version.V311 and any(code not in (0, 1, 2, 0x80) for code in codes):
        raise malformed("a reserved return code in SUBACK")  # 3.1.1 [MQTT-3.9.3-2]
    return Suback(packet_id, tuple(_reason(code, PacketType.SUBACK) for code in codes), properties)


def _suback_body(packet: Suback, version: Version) -> bytes:
    codes = bytes(_allowed(reason, PacketType.SUBACK) for reason in packet.reasons)
    if not codes:
        raise LocalProtocolError("SUBACK without a reason code")
    if version is Version.V311:
        codes = bytes(min(code, 0x80) for code in codes)  # one failure is all it knows
    properties = _properties(packet.properties, PacketType.SUBACK, version)
    return _identifier(packet.packet_id) + properties + codes


# UNSUBSCRIBE, UNSUBACK ----------------------------------------------------------------------------------------------


def _decode_unsubscribe(reader: Reader, version: Version, limits: WireLimits) -> Unsubscribe:
    packet_id = _packet_id(reader)
    properties = NO_PROPERTIES
    if version is Version.V5:
        properties = read_properties(reader, PacketType.UNSUBSCRIBE, limits.user_properties)
    filters: list[str] = []
    while reader.at < reader.end:
        if len(filters) >= limits.filters:
            raise RemoteProtocolError(ReasonCode.QUOTA_EXCEEDED, f"more than {limits.filters} filters in one packet")
        filters.append(reader.text())
    if not filters:
        raise violation("UNSUBSCRIBE without a filter")  # 5.0 [MQTT-3.10.3-2]
    return Unsubscribe(packet_id, tuple(filters), properties)


def _unsubscribe_body(packet: Unsubscribe, version: Version) -> bytes:
    if not packet.filters:
        raise LocalProtocolError("UNSUBSCRIBE without a filter")
    properties = _properties(packet.properties, PacketType.UNSUBSCRIBE, version)
    return _identifier(packet.packet_id) + properties + b"".join(map(write_text, packet.filters))


def _decode_unsuback(reader: Reader, version: Version, limits: WireLimits) -> Unsuback:
    packet_id = _packet_id(reader)
    if version is Version.V311:
        return Unsuback(packet_id)
    properties = read_properties(reader, PacketType.UNSUBACK, limits.user_properties)
    codes = reader.rest()
    if not codes:
        raise violation("UNSUBACK without a reason code")
    return Unsuback(packet_id, tuple(_reason(code, PacketType.UNSUBACK) for code in codes), properties)


def _unsuback_body(packet: Unsuback, version: Version) -> bytes:
    properties = _properties(packet.properties, PacketType.UNSUBACK, version)
    if version is Version.V311:
        return _identifier(packet.packet_id)
    if not packet.reasons:
        raise LocalProtocolError("UNSUBACK without a reason code")
    codes = bytes(_allowed(reason, PacketType.UNSUBACK) for reason in packet.reasons)
    return _identifier(packet.packet_id) + properties + codes


# DISCONNECT, AUTH ---------------------------------------------------------------------------------------------------


def _decode_disconnect(reader: Reader, version: Version, limits: WireLimits) -> Disconnect:
    if version is Version.V311 or reader.at == reader.end:
        return Disconnect()
    reason = _reason(reader.byte(), PacketType.DISCONNECT)
    if reader.at == reader.end:  # 5.0 §3.14.2.2.1
        return Disconnect(reason)
    return Disconnect(reason, read_properties(reader, PacketType.DISCONNECT, limits.user_properties))


def _disconnect_body(packet: Disconnect, version: Version) -> bytes:
    if version is Version.V311:
        if packet.reason is not ReasonCode.SUCCESS or packet.properties != NO_PROPERTIES:
            raise LocalProtocolError("3.1.1 disconnects without a reason")
        return b""
    return _reason_and_properties(packet.reason, packet.properties, PacketType.DISCONNECT)


def _decode_auth(reader: Reader, version: Version, limits: WireLimits) -> Auth:
    if version is Version.V311:
        raise malformed("packet type 15 is reserved in 3.1.1")
    if reader.at == reader.end:
        return Auth()
    reason = _reason(reader.byte(), PacketType.AUTH)
    if reader.at == reader.end:
        return Auth(reason)
    return Auth(reason, read_properties(reader, PacketType.AUTH, limits.user_properties))


def _auth_body(packet: Auth, version: Version) -> bytes:
    if version is Version.V311:
        raise LocalProtocolError("3.1.1 has no AUTH")
    return _reason_and_properties(packet.reason, packet.properties, PacketType.AUTH)


# Parts --------------------------------------------------------------------------------------------------------------


def _reason_and_properties(reason: ReasonCode, properties: Properties, kind: PacketType) -> bytes:
    code = _allowed(reason, kind)
    if properties != NO_PROPERTIES:
        return bytes((code,)) + write_properties(properties, kind)
    if reason is not ReasonCode.SUCCESS:
        return bytes((code,))
    return b""


def _frame(kind: PacketType, flags: int, body: bytes) -> bytes:
    return bytes((kind << 4 | flags,)) + write_varint(len(body)) + body


def _packet_id(reader: Reader) -> int:
    value = reader.two()
    if value == 0:
        raise violation("packet identifier 0")  # [MQTT-2.2.1-3]
    return value


def _identifier(value: int) -> bytes:
    if not 0 < value <= 0xFFFF:
        raise LocalProtocolError(f"packet identifier {value}")
    return value.to_bytes(2, "big")


def _properties(value: Properties, carrier: int, version: Version) -> bytes:
    if version is Version.V5:
        return write_properties(value, carrier)
    if value is not NO_PROPERTIES and value != NO_PROPERTIES:
        raise LocalProtocolError("3.1.1 has no properties")
    return b""


def _reason(code: int, kind: PacketType) -> ReasonCode:
    if code not in REASONS_OF[kind]:
        raise malformed(f"reason code {code:#04x} in {kind.name}")
    return ReasonCode(code)


def _allowed(reason: ReasonCode, kind: PacketType) -> int:
    if reason not in REASONS_OF[kind]:
        raise LocalProtocolError(f"reason {reason.name} in {kind.name}")
    return int(reason)
