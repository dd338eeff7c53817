"""The MQTT wire: every packet of both versions there and back, cut anywhere, mutated, and refused with a reason."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.wire import WireLimits, announced_version, decode, encode
from adapters.mqtt.wire_fields import MAX_VARINT, Reader, write_text, write_varint
from adapters.mqtt.wire_framing import Framer
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
    Suback,
    Subscribe,
    SubscriptionRequest,
    Unsuback,
    Unsubscribe,
    Will,
)
from adapters.mqtt.wire_reasons import (
    REASONS_OF,
    LocalProtocolError,
    PacketType,
    ReasonCode,
    RemoteProtocolError,
    Version,
)
from tests.fuzz.mqtt_judge import survives
from tests.fuzz.mqtt_packets import SAMPLES, mutants, packets

V311, V5 = Version.V311, Version.V5
MALFORMED, PROTOCOL = ReasonCode.MALFORMED_PACKET, ReasonCode.PROTOCOL_ERROR


def cut(data: bytes, max_packet: int = 268_435_460) -> tuple[int, bytes]:
    framer = Framer(max_packet)
    framer.feed(data)
    frame = framer.next()
    assert frame is not None
    assert framer.buffered == 0
    return frame


def back(packet: Packet, version: Version) -> Packet:
    return decode(*cut(encode(packet, version)), version)


def refused(hexadecimal: str, version: Version | None = V5, limits: WireLimits | None = None) -> ReasonCode:
    data = bytes.fromhex(hexadecimal)
    with pytest.raises(RemoteProtocolError) as caught:
        decode(*cut(data), version, limits or WireLimits())
    return caught.value.reason


def outcome(first: int, body: bytes, version: Version) -> Packet | ReasonCode:
    try:
        return decode(first, body, version)
    except RemoteProtocolError as error:
        return error.reason


# There and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", Version)
def test_every_packet_survives_the_round_trip(version: Version) -> None:
    @settings(max_examples=400, deadline=None)
    @given(packets(version))
    def check(packet: Packet) -> None:
        assert back(packet, version) == packet

    check()


@pytest.mark.parametrize(("version", "packet"), SAMPLES)
def test_samples_survive_the_round_trip(version: Version, packet: Packet) -> None:
    assert back(packet, version) == packet


def test_the_samples_cover_every_packet_type_and_every_property() -> None:
    types = {(version, encode(packet, version)[0] >> 4) for version, packet in SAMPLES}
    assert types == {(V311, kind) for kind in range(1, 15)} | {(V5, kind) for kind in range(1, 16)}
    carried = [
        properties
        for _, packet in SAMPLES
        for properties in (
            getattr(packet, "properties", None),
            getattr(getattr(packet, "will", None), "properties", None),
        )
        if properties is not None
    ]
    never = [
        name
        for name in Properties.__slots__
        if name != "will_delay_interval" and all(getattr(one, name) in (None, ()) for one in carried)
    ]
    assert never == []


@pytest.mark.parametrize(
    ("packet", "version", "expected"),
    [
        (Connect(V311, "a"), V311, "100d 0004 4d515454 04 02 0000 0001 61"),
        (Connect(V5, "a", keep_alive=10), V5, "100e 0004 4d515454 05 02 000a 00 0001 61"),
        (Connect(V311, "a", False, 0, Will("w", b"x", QoS(1), True), "u", b"p"), V311,
         "1019 0004 4d515454 04 ec 0000 0001 61 0001 77 0001 78 0001 75 0001 70"),
        (Connack(True), V311, "2002 0100"),
        (Connack(False, ReasonCode.NOT_AUTHORIZED), V311, "2002 0005"),
        (Connack(False, ReasonCode.NOT_AUTHORIZED), V5, "2003 008700"),
        (Publish("a/b", b"hi"), V311, "3007 0003 612f62 6869"),
        (Publish("a/b", b"hi", QoS(2), True, True, 10), V5, "3d0a 0003 612f62 000a 00 6869"),
        (Publish("", b"", QoS(1), packet_id=1, properties=Properties(topic_alias=2)), V5, "3208 0000 0001 03 230002"),
        (Ack(PacketType.PUBACK, 1), V5, "4002 0001"),
        (Ack(PacketType.PUBREC, 1, ReasonCode.QUOTA_EXCEEDED), V5, "5003 000197"),
        (Ack(PacketType.PUBREL, 1), V311, "6202 0001"),
        (Ack(PacketType.PUBCOMP, 1, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND), V5, "7003 000192"),
        (Ack(PacketType.PUBACK, 1, properties=Properties(reason_string="a")), V5, "4008 0001 00 04 1f000161"),
        (Subscribe(5, (SubscriptionRequest("#", QoS(1)),)), V311, "8206 0005 0001 23 01"),
        (Subscribe(5, (SubscriptionRequest("#", QoS(1), no_local=True),)), V5, "8207 0005 00 0001 23 05"),
        (Suback(5, (ReasonCode.GRANTED_QOS_2, ReasonCode.NOT_AUTHORIZED)), V311, "9004 0005 0280"),
        (Unsubscribe(6, ("#",)), V311, "a205 0006 0001 23"),
        (Unsuback(6, (ReasonCode.NO_SUBSCRIPTION_EXISTED,)), V311, "b002 0006"),
        (Unsuback(6, (ReasonCode.NO_SUBSCRIPTION_EXISTED,)), V5, "b004 0006 00 11"),
        (Ping(PacketType.PINGREQ), V5, "c000"),
        (Ping(PacketType.PINGRESP), V311, "d000"),
        (Disconnect(), V311, "e000"),
        (Disconnect(), V5, "e000"),
        (Disconnect(ReasonCode.ADMINISTRATIVE_ACTION), V5, "e001 98"),
        (Auth(), V5, "f000"),
    ],
)  # fmt: skip
def test_packets_have_the_bytes_of_the_specification(packet: Packet, version: Version, expected: str) -> None:
    assert encode(packet, version).hex() == expected.replace(" ", "")


@pytest.mark.parametrize("value", [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, MAX_VARINT])
def test_variable_byte_integers_have_their_shortest_form(value: int) -> None:
    data = write_varint(value)
    assert len(data) == 1 + (value > 127) + (value > 16_383) + (value > 2_097_151)
    assert Reader(data).varint() == value


# Cut ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "packet"), SAMPLES)
def test_a_packet_cut_at_any_length_is_awaited_and_its_cut_body_refused_or_another_packet(
    version: Version, packet: Packet
) -> None:
    data = encode(packet, version)
    for length in range(len(data)):
        framer = Framer(1_000)
        framer.feed(data[:length])
        assert framer.next() is None
        framer.feed(data[length:])
        first, body = framer.next() or (0, b"")
        assert decode(first, body, version) == packet
    first, body = cut(data)
    for length in range(len(body)):
        assert outcome(first, body[:length], version) not in (packet, ReasonCode.UNSUPPORTED_PROTOCOL_VERSION)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(SAMPLES), min_size=1, max_size=6), st.data())
def test_a_stream_gives_the_same_packets_however_it_is_cut(
    chosen: list[tuple[Version, Packet]], data: st.DataObject
) -> None:
    stream = b"".join(encode(packet, version) for version, packet in chosen)
    framer = Framer(1_000)
    seen = []
    at = 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        framer.feed(memoryview(stream)[at : at + size])
        at += size
        while (frame := framer.next()) is not None:
            seen.append(frame)
    assert seen == [cut(encode(packet, version)) for version, packet in chosen]
    assert framer.buffered == 0


def test_a_packet_that_is_too_large_is_refused_from_its_header_alone() -> None:
    framer = Framer(100)
    framer.feed(b"\x30\x62" + bytes(98))
    assert framer.next() == (0x30, bytes(98))  # 100 bytes with its header
    framer.feed(b"\x30\x63")
    with pytest.raises(RemoteProtocolError) as caught:
        framer.next()
    assert caught.value.reason is ReasonCode.PACKET_TOO_LARGE
    assert framer.buffered == 2


def test_many_small_packets_in_one_buffer_are_all_found() -> None:
    framer = Framer(100)
    framer.feed(b"\xc0\x00" * 100_000 + b"\xc0")
    count = 0
    while framer.next() is not None:
        count += 1
    assert count == 100_000
    assert framer.buffered == 1
    framer.feed(b"\x00")
    assert framer.next() == (0xC0, b"")


@pytest.mark.parametrize("header", ["30ffffffff", "30ffffffff00", "3080808080", "308000", "30ff8000"])
def test_a_remaining_length_that_cannot_be_is_refused(header: str) -> None:
    framer = Framer(268_435_460)
    framer.feed(bytes.fromhex(header))
    with pytest.raises(RemoteProtocolError) as caught:
        framer.next()
    assert caught.value.reason is MALFORMED


# Refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packet", "version", "reason"),
    [
        ("0000", V5, MALFORMED),  # packet type 0
        ("f000", V311, MALFORMED),  # AUTH does not exist
        ("f100", V5, MALFORMED),  # [MQTT-3.15.1-1]
        ("1100", None, MALFORMED),
        ("c000", None, PROTOCOL),  # before CONNECT
        ("c100", V5, MALFORMED),
        ("c00100", V5, MALFORMED),  # PINGREQ has no body
        ("e100", V5, MALFORMED),  # [MQTT-3.14.1-1]
        ("e100", V311, MALFORMED),
        ("e00100", V311, MALFORMED),
        ("e00101", V5, MALFORMED),  # not a reason of DISCONNECT
        ("e00200ff", V5, MALFORMED),  # properties longer than the packet
        ("60020001", V5, MALFORMED),  # [MQTT-3.6.1-1]
        ("80060001000123 00", V5, MALFORMED),  # [MQTT-3.8.1-1]
        ("a00500010001 23", V311, MALFORMED),  # [MQTT-3.10.1-1]
        ("40020000", V311, PROTOCOL),  # packet identifier 0
        ("400100", V5, MALFORMED),
        ("400400010000", V5, None),
        ("40050001000000", V5, MALFORMED),  # a byte after the last field
        ("4003000101", V5, MALFORMED),  # not a reason of PUBACK
        ("3600", V5, MALFORMED),  # QoS 3
        ("380400016100", V5, MALFORMED),  # DUP with QoS 0
        ("32050001610000", V311, PROTOCOL),  # packet identifier 0
        ("3003000000", V5, PROTOCOL),  # neither topic nor alias
        ("30020000", V311, MALFORMED),  # empty topic
        ("30040002c0af", V311, MALFORMED),  # overlong UTF-8
        ("30050003eda080", V311, MALFORMED),  # a surrogate
        ("30030001ff", V311, MALFORMED),
        ("3003000100", V311, MALFORMED),  # U+0000
        ("82020001", V311, PROTOCOL),  # no filter
        ("8203000100", V5, PROTOCOL),
        ("82060001000123 03", V311, MALFORMED),  # QoS 3
        ("82060001000123 04", V311, MALFORMED),  # options of 5.0
        ("8207000100000123 40", V5, MALFORMED),  # [MQTT-3.8.3-5]
        ("8207000100000123 30", V5, PROTOCOL),  # retain handling 3
        ("8209000102 0b00 000123 00", V5, PROTOCOL),  # subscription identifier 0
        ("820b000104 0b010b02 000123 00", V5, PROTOCOL),  # two of them
        ("a2020001", V311, PROTOCOL),
        ("a203000100", V5, PROTOCOL),
        ("9003000500", V5, PROTOCOL),  # SUBACK without a reason
        ("9003000503", V311, MALFORMED),
        ("b003000600", V5, PROTOCOL),
        ("20020200", V311, MALFORMED),  # [MQTT-3.2.2-1]
        ("20020006", V311, MALFORMED),
        ("20020105", V311, PROTOCOL),  # session present in a refusal
        ("2003000100", V5, MALFORMED),
        ("3009000161 05 2300002300", V5, ReasonCode.TOPIC_ALIAS_INVALID),
        ("300a000161 06 230001230001", V5, PROTOCOL),  # an alias twice
        ("3006000161 02 0102", V5, PROTOCOL),  # a flag of 2
        ("3006000161 02 7f00", V5, MALFORMED),  # no such property
        ("3009000161 05 1100000001", V5, MALFORMED),  # not a property of PUBLISH
        ("3007000161 03 a60000", V5, MALFORMED),
        ("3006000161 02 8100", V5, MALFORMED),  # an identifier longer than needed
        ("3005000161 01 02", V5, MALFORMED),  # a property without its value
        ("300c000161 08 260002c0af000176", V5, MALFORMED),  # [MQTT-1.5.7-1]: the name of a user property
        ("300b000161 07 26000161 000100", V5, MALFORMED),  # and its value
        ("3009000161 05 080002c0af", V5, MALFORMED),  # [MQTT-3.3.2-13]: a response topic
        ("3009000161 05 030002c0af", V5, MALFORMED),  # [MQTT-3.3.2-19]: a content type
        ("82070001 0002c0af 00", V311, MALFORMED),  # [MQTT-3.8.3-1]
        ("82080001 00 0002c0af 00", V5, MALFORMED),
        ("a2060001 0002c0af", V311, MALFORMED),  # [MQTT-3.10.3-1]
        ("a2070001 00 0002c0af", V5, MALFORMED),  # [MQTT-3.10.2-1]
    ],
)
def test_what_is_not_allowed_is_refused_with_its_reason(
    packet: str, version: Version | None, reason: ReasonCode | None
) -> None:
    if reason is None:
        decode(*cut(bytes.fromhex(packet)), version)
        return
    assert refused(packet, version) is reason


def connect(level: int, flags: int, rest: str, name: str = "MQTT") -> str:
    body = write_text(name) + bytes((level, flags)) + bytes.fromhex(rest)
    return (b"\x10" + write_varint(len(body)) + body).hex()


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (connect(4, 0x03, "0000 000161"), MALFORMED),  # [MQTT-3.1.2-3]
        (connect(4, 0x0A, "0000 000161"), MALFORMED),  # will QoS without a will
        (connect(4, 0x22, "0000 000161"), MALFORMED),  # will retain without a will
        (connect(4, 0x1E, "0000 000161 000177 0000"), MALFORMED),  # will QoS 3
        (connect(4, 0x42, "0000 000161 000170"), MALFORMED),  # a password without a user name
        (connect(4, 0x02, "0000"), MALFORMED),  # no client identifier
        (connect(4, 0x82, "0000 000161"), MALFORMED),  # no user name
        (connect(4, 0xC2, "0000 000161 000175"), MALFORMED),  # no password
        (connect(5, 0x42, "0000 00 000161"), MALFORMED),
        (connect(4, 0x06, "0000 000161"), MALFORMED),  # no will topic
        (connect(4, 0x06, "0000 000161 000177"), MALFORMED),  # no will message
        (connect(5, 0x06, "0000 00 000161"), MALFORMED),  # no will properties
        (connect(4, 0x02, "0000 000161 000175"), MALFORMED),  # a user name without its flag
        (connect(4, 0x82, "0000 000161 000175 000170"), MALFORMED),  # a password without its flag
        (connect(4, 0x02, "0000 0002c0af"), MALFORMED),  # a client identifier that is no string
        (connect(4, 0x06, "0000 000161 0002c0af 0000"), MALFORMED),  # [MQTT-3.1.3-10]: a will topic
        (connect(5, 0x06, "0000 00 000161 00 0002c0af 0000"), MALFORMED),  # [MQTT-3.1.3-11]
        (connect(4, 0x82, "0000 000161 0002c0af"), MALFORMED),  # [MQTT-3.1.3-11]: a user name
        (connect(5, 0x82, "0000 00 000161 0002c0af"), MALFORMED),  # [MQTT-3.1.3-12]
        (connect(4, 0x02, "0000 000161 00"), MALFORMED),  # more than there should be
        (connect(4, 0x02, "0000 000100"), MALFORMED),
        (connect(5, 0x02, "0000 03 210000 000161"), PROTOCOL),  # receive maximum 0
        (connect(5, 0x02, "0000 05 2700000000 000161"), PROTOCOL),  # maximum packet size 0
        (connect(5, 0x02, "0000 03 160000 000161"), PROTOCOL),  # data without a method
        (connect(5, 0x06, "0000 00 000161 03 1f0000 000177 0000"), MALFORMED),  # not a property of a will
        (connect(3, 0x02, "0000 000161"), ReasonCode.UNSUPPORTED_PROTOCOL_VERSION),
        (connect(6, 0x02, "0000 000161"), ReasonCode.UNSUPPORTED_PROTOCOL_VERSION),
        (connect(0x84, 0x02, "0000 000161"), ReasonCode.UNSUPPORTED_PROTOCOL_VERSION),
        (connect(3, 0x02, "0000 000161", "MQIsdp"), ReasonCode.UNSUPPORTED_PROTOCOL_VERSION),
        (connect(4, 0x02, "0000 000161", "mqtt"), PROTOCOL),
        (connect(4, 0x02, "0000 000161", "HTTP"), PROTOCOL),
    ],
)
def test_a_connect_that_does_not_conform_is_refused(packet: str, reason: ReasonCode) -> None:
    assert refused(packet, None) is reason


def test_a_password_without_a_user_name_is_allowed_in_5() -> None:
    packet = Connect(V5, "a", password=b"key")
    assert back(packet, V5) == packet


def test_the_version_is_known_even_when_the_rest_is_broken() -> None:
    assert announced_version(bytes.fromhex("00044d51545405ff")) is V5
    assert announced_version(bytes.fromhex("00044d51545404")) is V311
    assert announced_version(bytes.fromhex("00044d51545407")) is None


def test_caps_on_counts_are_quota_exceeded() -> None:
    packet = Publish("a", b"", properties=Properties(user_properties=(("a", "b"),) * 3))
    data = encode(packet, V5)
    assert decode(*cut(data), V5, WireLimits(user_properties=3)) == packet
    assert refused(data.hex(), V5, WireLimits(user_properties=2)) is ReasonCode.QUOTA_EXCEEDED
    subscribe = encode(Subscribe(1, (SubscriptionRequest("a"),) * 3), V311)
    assert refused(subscribe.hex(), V311, WireLimits(filters=2)) is ReasonCode.QUOTA_EXCEEDED
    unsubscribe = encode(Unsubscribe(1, ("a",) * 3), V5)
    assert refused(unsubscribe.hex(), V5, WireLimits(filters=2)) is ReasonCode.QUOTA_EXCEEDED


def test_a_byte_order_mark_is_kept() -> None:
    assert back(Publish("\ufeffa", b""), V311) == Publish("\ufeffa", b"")  # [MQTT-1.5.4-3]


@pytest.mark.parametrize("kind", REASONS_OF)
def test_only_the_reasons_of_a_packet_pass_in_either_direction(kind: PacketType) -> None:
    def build(reason: ReasonCode) -> Packet:
        match kind:
            case PacketType.CONNACK:
                return Connack(False, reason)
            case PacketType.SUBACK:
                return Suback(1, (reason,))
            case PacketType.UNSUBACK:
                return Unsuback(1, (reason,))
            case PacketType.DISCONNECT:
                return Disconnect(reason)
            case PacketType.AUTH:
                return Auth(reason)
            case _:
                return Ack(kind, 1, reason)

    good = encode(build(ReasonCode(max(REASONS_OF[kind]))), V5)
    place = good.rindex(max(REASONS_OF[kind]))
    for reason in ReasonCode:
        data = bytearray(good)
        data[place] = reason
        if reason in REASONS_OF[kind]:
            assert back(build(reason), V5) == build(reason)
            assert decode(*cut(bytes(data)), V5) == build(reason)
        else:
            with pytest.raises(LocalProtocolError):
                encode(build(reason), V5)
            assert refused(data.hex(), V5) is MALFORMED


@pytest.mark.parametrize(
    ("packet", "version"),
    [
        (Publish("a", b"", QoS(1)), V5),
        (Publish("a", b"", packet_id=1), V5),
        (Publish("a", b"", dup=True), V5),
        (Publish("", b""), V5),
        (Publish("a\0", b""), V5),
        (Publish("\ud800", b""), V5),
        (Publish("a" * 65_536, b""), V5),
        (Publish("a", b"", properties=Properties(topic_alias=0)), V5),
        (Publish("a", b"", properties=Properties(content_type="a")), V311),
        (Publish("a", b"", properties=Properties(reason_string="a")), V5),
        (Publish("a", b"", properties=Properties(payload_format_indicator=2)), V5),
        (Ack(PacketType.PUBACK, 0), V5),
        (Connack(True, ReasonCode.NOT_AUTHORIZED), V5),
        (Connack(False, ReasonCode.PACKET_TOO_LARGE), V311),
        (Connect(V5, "a"), V311),
        (Connect(V311, "a", password=b"key"), V311),
        (Subscribe(1, ()), V5),
        (Subscribe(1, (SubscriptionRequest("a", no_local=True),)), V311),
        (Subscribe(1, (SubscriptionRequest("a"),), Properties(subscription_identifiers=(1, 2))), V5),
        (Suback(1, ()), V5),
        (Unsubscribe(1, ()), V5),
        (Unsuback(1), V5),
        (Ping(PacketType.PUBLISH), V5),
        (Disconnect(ReasonCode.ADMINISTRATIVE_ACTION), V311),
        (Auth(), V311),
        (Disconnect(properties=Properties(receive_maximum=1)), V5),
        (Connect(V5, "a", keep_alive=65_536), V5),
    ],
)
def test_what_we_must_not_send_is_our_error(packet: Packet, version: Version) -> None:
    with pytest.raises(LocalProtocolError):
        encode(packet, version)


def test_nothing_secret_is_printed() -> None:
    packet = Connect(V5, "a", user_name="u", password=b"hunter2", will=Will("w", b"hunter2"),
                     properties=Properties(authentication_method="m", authentication_data=b"hunter2",
                                           user_properties=(("token", "hunter2"),)))  # fmt: skip
    assert "hunter2" not in repr(packet) + repr(Publish("a", b"hunter2"))
    assert repr(NO_PROPERTIES) == "Properties()"


# Noise --------------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(Version), st.binary(max_size=64))
def test_random_bytes_raise_only_the_declared_error(version: Version, data: bytes) -> None:
    survives(version, data)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(Version), st.integers(0, 255), st.binary(max_size=64))
def test_random_bodies_raise_only_the_declared_error(version: Version, first: int, body: bytes) -> None:
    survives(version, bytes((first, len(body))) + body)


def test_mutated_packets_raise_only_the_declared_error() -> None:
    decoded = sum(survives(version, data) > 0 for version, data in mutants(0, 20_000))
    assert 1_000 < decoded < 20_000
