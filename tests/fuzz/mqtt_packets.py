"""What the MQTT tests draw from: strategies for every packet of both versions, samples of them, and a seeded mutator.

Strategies draw only what `encode` accepts, so that a round trip must succeed. `SAMPLES` has at least one packet of each
type and version with every property that it may carry; the mutator starts from their bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from hypothesis import strategies as st

from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.wire import encode
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
from adapters.mqtt.wire_reasons import CONNACK_RETURN_CODES, REASONS_OF, PacketType, ReasonCode, Version

ACKS = (PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0+#"), min_size=1, max_size=12)
blobs = st.binary(max_size=24)
flags = st.sampled_from((0, 1))
twos = st.integers(0, 0xFFFF)
fours = st.integers(0, 0xFFFF_FFFF)
identifiers = st.integers(1, 0xFFFF)
pairs = st.lists(st.tuples(texts, texts), max_size=3).map(tuple)


def maybe(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.none() | strategy


MESSAGE = {
    "payload_format_indicator": maybe(flags),
    "message_expiry_interval": maybe(fours),
    "content_type": maybe(texts),
    "response_topic": maybe(texts),
    "correlation_data": maybe(blobs),
    "user_properties": pairs,
}
ANSWER = {"reason_string": maybe(texts), "user_properties": pairs}
AUTHENTICATION = {"authentication_method": maybe(texts), "authentication_data": maybe(blobs)}
SIZES = {
    "session_expiry_interval": maybe(fours),
    "receive_maximum": maybe(identifiers),
    "maximum_packet_size": maybe(st.integers(1, 0xFFFF_FFFF)),
    "topic_alias_maximum": maybe(twos),
}


def properties(fields: dict[str, st.SearchStrategy[object]]) -> st.SearchStrategy[Properties]:
    return st.builds(Properties, **fields)


def of(version: Version, fields: dict[str, st.SearchStrategy[object]]) -> st.SearchStrategy[Properties]:
    return st.just(NO_PROPERTIES) if version is Version.V311 else st.just(NO_PROPERTIES) | properties(fields)


def reasons(version: Version, kind: PacketType) -> st.SearchStrategy[ReasonCode]:
    if version is Version.V311:
        return st.just(ReasonCode.SUCCESS)
    return st.sampled_from(sorted(REASONS_OF[kind])).map(ReasonCode)


def connects(version: Version) -> st.SearchStrategy[Connect]:
    wills = st.builds(
        Will,
        names,
        blobs,
        st.sampled_from(QoS),
        st.booleans(),
        of(version, MESSAGE | {"will_delay_interval": maybe(fours)}),
    )
    carried = {"request_problem_information": maybe(flags), "request_response_information": maybe(flags)}
    passwords = st.none() | blobs

    def build(packet: Connect) -> Connect:
        if version is Version.V311 and packet.user_name is None and packet.password is not None:
            return Connect(version, packet.client_id, packet.clean_start, packet.keep_alive, packet.will)
        if packet.properties.authentication_data is not None and packet.properties.authentication_method is None:
            return Connect(version, packet.client_id, packet.clean_start, packet.keep_alive, packet.will)
        return packet

    return st.builds(
        Connect,
        st.just(version),
        texts,
        st.booleans(),
        twos,
        st.none() | wills,
        st.none() | texts,
        passwords,
        of(version, SIZES | carried | AUTHENTICATION | {"user_properties": pairs}),
    ).map(build)


def connacks(version: Version) -> st.SearchStrategy[Connack]:
    carried = {
        name: maybe(flags)
        for name in (
            "maximum_qos",
            "retain_available",
            "wildcard_subscription_available",
            "subscription_identifier_available",
            "shared_subscription_available",
        )
    } | {
        "assigned_client_identifier": maybe(texts),
        "server_keep_alive": maybe(twos),
        "response_information": maybe(texts),
        "server_reference": maybe(texts),
    }
    codes = (
        st.sampled_from(
            [code for code in CONNACK_RETURN_CODES if code not in _FOLDED],
        )
        if version is Version.V311
        else reasons(version, PacketType.CONNACK)
    )
    return st.tuples(st.booleans(), codes, of(version, SIZES | carried | ANSWER | AUTHENTICATION)).map(
        lambda drawn: Connack(drawn[0] and drawn[1] is ReasonCode.SUCCESS, drawn[1], drawn[2])
    )


_FOLDED = (  # several of our reasons become one return code of 3.1.1
    ReasonCode.SERVER_BUSY,
    ReasonCode.QUOTA_EXCEEDED,
    ReasonCode.CONNECTION_RATE_EXCEEDED,
    ReasonCode.BANNED,
)


def publishes(version: Version) -> st.SearchStrategy[Publish]:
    carried = MESSAGE | {
        "subscription_identifiers": st.lists(st.integers(1, 268_435_455), max_size=3).map(tuple),
        "topic_alias": maybe(identifiers),
    }
    return st.builds(
        lambda topic, payload, qos, retain, dup, packet_id, carried: Publish(
            topic, payload, qos, retain, dup and qos > 0, packet_id if qos else 0, carried
        ),
        names,
        blobs,
        st.sampled_from(QoS),
        st.booleans(),
        st.booleans(),
        identifiers,
        of(version, carried),
    )


def acks(version: Version) -> st.SearchStrategy[Ack]:
    return st.sampled_from(ACKS).flatmap(
        lambda kind: st.builds(Ack, st.just(kind), identifiers, reasons(version, kind), of(version, ANSWER))
    )


def subscribes(version: Version) -> st.SearchStrategy[Subscribe]:
    if version is Version.V311:
        requests = st.builds(SubscriptionRequest, texts, st.sampled_from(QoS))
    else:
        requests = st.builds(
            SubscriptionRequest,
            texts,
            st.sampled_from(QoS),
            st.booleans(),
            st.booleans(),
            st.sampled_from(RetainHandling),
        )
    carried = {
        "subscription_identifiers": st.just(()) | st.integers(1, 268_435_455).map(lambda number: (number,)),
        "user_properties": pairs,
    }
    return st.builds(
        Subscribe, identifiers, st.lists(requests, min_size=1, max_size=4).map(tuple), of(version, carried)
    )


def subacks(version: Version) -> st.SearchStrategy[Suback]:
    codes = (
        st.sampled_from((0, 1, 2, 0x80)).map(ReasonCode)
        if version is Version.V311
        else reasons(version, PacketType.SUBACK)
    )
    return st.builds(Suback, identifiers, st.lists(codes, min_size=1, max_size=4).map(tuple), of(version, ANSWER))


def unsubscribes(version: Version) -> st.SearchStrategy[Unsubscribe]:
    return st.builds(
        Unsubscribe,
        identifiers,
        st.lists(texts, min_size=1, max_size=4).map(tuple),
        of(version, {"user_properties": pairs}),
    )


def unsubacks(version: Version) -> st.SearchStrategy[Unsuback]:
    if version is Version.V311:
        return st.builds(Unsuback, identifiers)
    codes = st.lists(reasons(version, PacketType.UNSUBACK), min_size=1, max_size=4).map(tuple)
    return st.builds(Unsuback, identifiers, codes, of(version, ANSWER))


def disconnects(version: Version) -> st.SearchStrategy[Disconnect]:
    carried = ANSWER | {"session_expiry_interval": maybe(fours), "server_reference": maybe(texts)}
    return st.builds(Disconnect, reasons(version, PacketType.DISCONNECT), of(version, carried))


def auths() -> st.SearchStrategy[Auth]:
    return st.builds(Auth, reasons(Version.V5, PacketType.AUTH), of(Version.V5, ANSWER | AUTHENTICATION))


def packets(version: Version) -> st.SearchStrategy[Packet]:
    every = [
        connects(version),
        connacks(version),
        publishes(version),
        acks(version),
        subscribes(version),
        subacks(version),
        unsubscribes(version),
        unsubacks(version),
        st.sampled_from((Ping(PacketType.PINGREQ), Ping(PacketType.PINGRESP))),
        disconnects(version),
    ]
    if version is Version.V5:
        every.append(auths())
    return st.one_of(every)


_USER = (("name", "value"), ("näme", "\ufeffvalue"))
_MESSAGE = Properties(
    payload_format_indicator=1,
    message_expiry_interval=3_600,
    content_type="application/cbor",
    response_topic="answers/here",
    correlation_data=b"\x00\x01",
    user_properties=_USER,
)
SAMPLES: tuple[tuple[Version, Packet], ...] = (
    (
        Version.V311,
        Connect(Version.V311, "meter-7", False, 60, Will("gone", b"bye", QoS(1), True), "user", b"password"),
    ),
    (Version.V311, Connack(True)),
    (Version.V311, Publish("devices/me/telemetry", b'{"t": 21.5}', QoS(1), False, True, 7)),
    (Version.V311, Publish("a", b"")),
    *((Version.V311, Ack(kind, 9)) for kind in ACKS),
    (Version.V311, Subscribe(3, (SubscriptionRequest("a/+/c", QoS(1)), SubscriptionRequest("#", QoS(2))))),
    (Version.V311, Suback(3, (ReasonCode.GRANTED_QOS_1, ReasonCode.UNSPECIFIED_ERROR))),
    (Version.V311, Unsubscribe(4, ("a/+/c", "#"))),
    (Version.V311, Unsuback(4)),
    (Version.V311, Ping(PacketType.PINGREQ)),
    (Version.V311, Ping(PacketType.PINGRESP)),
    (Version.V311, Disconnect()),
    (
        Version.V5,
        Connect(
            Version.V5,
            "meter-7",
            True,
            60,
            Will("gone", b"bye", QoS(2), False, _MESSAGE),
            "user",
            b"password",
            Properties(
                session_expiry_interval=600,
                receive_maximum=20,
                maximum_packet_size=65_536,
                topic_alias_maximum=10,
                request_response_information=1,
                request_problem_information=0,
                user_properties=_USER,
                authentication_method="SCRAM-SHA-256",
                authentication_data=b"n,,n=user",
            ),
        ),
    ),
    (
        Version.V5,
        Connack(
            False,
            ReasonCode.SUCCESS,
            Properties(
                session_expiry_interval=600,
                receive_maximum=256,
                maximum_qos=1,
                retain_available=1,
                maximum_packet_size=262_144,
                assigned_client_identifier="assigned",
                topic_alias_maximum=32,
                reason_string="welcome",
                user_properties=_USER,
                wildcard_subscription_available=1,
                subscription_identifier_available=1,
                shared_subscription_available=1,
                server_keep_alive=60,
                response_information="answers/",
                server_reference="other:8883",
                authentication_method="SCRAM-SHA-256",
                authentication_data=b"v=",
            ),
        ),
    ),
    (
        Version.V5,
        Publish(
            "devices/me/telemetry",
            b"\xa1at\x18\x15",
            QoS(2),
            True,
            False,
            7,
            Properties(
                payload_format_indicator=0,
                message_expiry_interval=60,
                topic_alias=3,
                response_topic="answers/here",
                correlation_data=b"\x00\x01",
                user_properties=_USER,
                subscription_identifiers=(1, 200, 268_435_455),
                content_type="application/cbor",
            ),
        ),
    ),
    *(
        (Version.V5, Ack(kind, 9, ReasonCode.SUCCESS, Properties(reason_string="why", user_properties=_USER)))
        for kind in ACKS
    ),
    (Version.V5, Ack(PacketType.PUBACK, 9, ReasonCode.NO_MATCHING_SUBSCRIBERS)),
    (
        Version.V5,
        Subscribe(
            3,
            (
                SubscriptionRequest("a/+/c", QoS(1), True, True, RetainHandling.DO_NOT_SEND),
                SubscriptionRequest("$share/group/#", QoS(2)),
            ),
            Properties(subscription_identifiers=(268_435_455,), user_properties=_USER),
        ),
    ),
    (Version.V5, Suback(3, (ReasonCode.GRANTED_QOS_1, ReasonCode.QUOTA_EXCEEDED), Properties(reason_string="why"))),
    (Version.V5, Unsubscribe(4, ("a/+/c", "#"), Properties(user_properties=_USER))),
    (Version.V5, Unsuback(4, (ReasonCode.SUCCESS, ReasonCode.NO_SUBSCRIPTION_EXISTED), Properties(reason_string="."))),
    (Version.V5, Ping(PacketType.PINGREQ)),
    (Version.V5, Ping(PacketType.PINGRESP)),
    (
        Version.V5,
        Disconnect(
            ReasonCode.USE_ANOTHER_SERVER,
            Properties(
                session_expiry_interval=0, reason_string="moved", user_properties=_USER, server_reference="other:8883"
            ),
        ),
    ),
    (
        Version.V5,
        Auth(
            ReasonCode.CONTINUE_AUTHENTICATION,
            Properties(
                authentication_method="SCRAM-SHA-256",
                authentication_data=b"c=biws",
                reason_string="more",
                user_properties=_USER,
            ),
        ),
    ),
)


def mutants(seed: int, count: int) -> Iterator[tuple[Version, bytearray]]:
    """`count` packets, each a sample with one to four changes; the same for the same seed.

    Half of them have their remaining length put right again, so that the change reaches the fields.
    """
    source = random.Random(seed)
    originals = [(version, encode(packet, version)) for version, packet in SAMPLES]
    for _ in range(count):
        version, original = originals[source.randrange(len(originals))]
        packet = bytearray(original)
        for _ in range(source.randrange(1, 5)):
            _mutate(source, packet, originals)
        if source.random() < 0.5:
            body = packet[_header_size(packet) :]
            packet = bytearray(packet[:1] or b"\x30") + _varint(len(body)) + body
        if source.random() < 0.1:
            version = Version.V311 if version is Version.V5 else Version.V5
        yield version, packet


def _mutate(source: random.Random, packet: bytearray, originals: list[tuple[Version, bytes]]) -> None:
    at = source.randrange(len(packet) + 1)
    match source.randrange(7):
        case 0 if at < len(packet):
            packet[at] ^= 1 << source.randrange(8)
        case 1 if at < len(packet):
            packet[at] = source.choice((0, 1, 2, 0x7F, 0x80, 0xC0, 0xED, 0xFF, source.randrange(256)))
        case 2:
            del packet[at:]
        case 3:
            del packet[at : at + source.randrange(1, 5)]
        case 4:
            packet[at:at] = source.randbytes(source.randrange(1, 9))
        case 5:
            packet[at:at] = packet[at : at + source.randrange(1, 20)]
        case _:
            other = source.choice(originals)[1]
            start = source.randrange(len(other))
            packet[at : at + source.randrange(20)] = other[start : start + source.randrange(20)]


def _header_size(packet: bytearray) -> int:
    at = 1
    while at < min(len(packet), 5) and packet[at] & 0x80:
        at += 1
    return min(at + 1, len(packet))


def _varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, part = value >> 7, value & 0x7F
        out.append(part | (0x80 if value else 0))
        if not value:
            return bytes(out)
