"""MQTT as transcripts: what the client sends, what the server is told and answers, what the client gets.

A line that starts with `>` is a packet to the server, `<` one from it, `!` an event, `.` a call of the server.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.mqtt.connection import Connection, Granted, State
from adapters.mqtt.machine_events import (
    Cause,
    ConnectRequested,
    Delivered,
    Discarded,
    DiscardReason,
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
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.session import Session, Untaken
from adapters.mqtt.session_values import (
    NEVER,
    Delivery,
    Message,
    Phase,
    Snapshot,
    Subscription,
    delivery_of,
    retained_delivery_of,
)
from adapters.mqtt.topics import parse_filter
from adapters.mqtt.wire import decode, encode
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
    RetainHandling,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Unsuback,
    Unsubscribe,
    Will,
)
from adapters.mqtt.wire_reasons import LocalProtocolError, PacketType, ReasonCode, Version
from tests.fuzz.mqtt_server import noise

V311, V5 = Version.V311, Version.V5
Q0, Q1, Q2 = QoS
R = ReasonCode
LIMITS = MqttLimits()
BOTH = pytest.mark.parametrize("version", Version)


def puback(packet_id: int, reason: R = R.SUCCESS, text: str = "") -> Ack:
    return Ack(PacketType.PUBACK, packet_id, reason, Properties(reason_string=text) if text else NO_PROPERTIES)


def pubrec(packet_id: int, reason: R = R.SUCCESS) -> Ack:
    return Ack(PacketType.PUBREC, packet_id, reason)


def pubrel(packet_id: int, reason: R = R.SUCCESS) -> Ack:
    return Ack(PacketType.PUBREL, packet_id, reason)


def pubcomp(packet_id: int, reason: R = R.SUCCESS) -> Ack:
    return Ack(PacketType.PUBCOMP, packet_id, reason)


PINGREQ, PINGRESP = Ping(PacketType.PINGREQ), Ping(PacketType.PINGRESP)


class Peer:
    """A client's end: what it sends goes in, what it gets comes out as packets, and the events in between."""

    def __init__(self, version: Version = V5, limits: MqttLimits = LIMITS, now: float = 0.0) -> None:
        self.version = version
        self.now = now
        self.connection = Connection(limits, now)
        self.limits = limits
        self._framer = Framer(268_435_460)

    def sends(self, *packets: Packet) -> list[Event]:
        return self.sends_bytes(b"".join(encode(packet, self.version) for packet in packets))

    def sends_bytes(self, data: bytes) -> list[Event]:
        self.connection.receive(data, self.now)
        return self.events()

    def events(self) -> list[Event]:
        events = []
        while (event := self.connection.next_event(self.now)) is not None:
            events.append(event)
        return events

    def gets(self) -> list[Packet]:
        while data := self.connection.data_to_send(self.now):
            self._framer.feed(data)
        packets = []
        while (frame := self._framer.next()) is not None:
            packets.append(decode(*frame, self.version))
        return packets

    def connects(
        self,
        session: Session | None = None,
        *,
        clean: bool = False,
        client_id: str = "c",
        present: bool | None = None,
        will: Will | None = None,
        keep_alive: int = 0,
        properties: Properties | None = None,
    ) -> Session:
        if properties is None:
            properties = Properties(session_expiry_interval=600) if self.version is V5 else NO_PROPERTIES
        packet = Connect(self.version, client_id, clean, keep_alive, will, properties=properties)
        assert self.sends(packet) == [ConnectRequested(packet)]
        present = session is not None if present is None else present
        session = session or Session(self.limits)
        self.connection.accept(session, session_present=present, now=self.now)
        (connack,) = self.gets_first()
        assert isinstance(connack, Connack)
        assert connack.reason is R.SUCCESS
        assert connack.session_present is present
        return session

    def gets_first(self) -> list[Packet]:
        packets = self.gets()
        self.early = packets[1:]
        return packets[:1]

    @property
    def reason(self) -> R:
        """Of the DISCONNECT or CONNACK that it got last, in 5.0; in 3.1.1 there is none."""
        last = self.gets()[-1]
        assert isinstance(last, Disconnect | Connack)
        return last.reason


def published(events: list[Event]) -> list[PublishReceived]:
    assert all(isinstance(event, PublishReceived) for event in events)
    return [event for event in events if isinstance(event, PublishReceived)]


def ended(events: list[Event]) -> Ended:
    last = events[-1]
    assert isinstance(last, Ended)
    return last


def message(topic: str = "a", payload: bytes = b"x", qos: QoS = Q2, **more: object) -> Message:
    return Message(topic, payload, qos, **more)  # type: ignore[arg-type]


def to_send(qos: QoS, key: int = 0, payload: bytes = b"x", topic: str = "a") -> Delivery:
    return Delivery(message(topic, payload), qos, key=key)


# CONNECT ------------------------------------------------------------------------------------------------------------


def test_connect_is_decided_outside_and_nothing_is_read_before() -> None:
    peer = Peer()
    connect = Connect(V5, "c", True, properties=Properties(session_expiry_interval=60))
    assert peer.sends(connect, PINGREQ) == [ConnectRequested(connect)]
    assert peer.gets() == []
    assert not peer.connection.wants_read
    peer.connection.accept(Session(LIMITS), session_present=False, now=0)
    assert peer.events() == []
    assert peer.gets() == [
        Connack(
            properties=Properties(
                receive_maximum=LIMITS.receive_maximum,
                maximum_packet_size=LIMITS.packet_bytes,
                topic_alias_maximum=LIMITS.topic_aliases_in,
                server_keep_alive=LIMITS.keep_alive,
            )
        ),
        PINGRESP,
    ]


@pytest.mark.parametrize(
    ("version", "reason", "expected"),
    [
        (V5, R.NOT_AUTHORIZED, [Connack(False, R.NOT_AUTHORIZED)]),
        (V5, R.SERVER_SHUTTING_DOWN, [Connack(False, R.UNSPECIFIED_ERROR)]),
        (V311, R.NOT_AUTHORIZED, [Connack(False, R.NOT_AUTHORIZED)]),
        (V311, R.SERVER_BUSY, [Connack(False, R.SERVER_UNAVAILABLE)]),
        (V311, R.IMPLEMENTATION_SPECIFIC_ERROR, []),
    ],
)
def test_a_refused_connect_gets_its_reason_and_nothing_after_it_is_read(
    version: Version, reason: R, expected: list[Packet]
) -> None:
    peer = Peer(version)
    peer.sends(Connect(version, "c"), Publish("a", b""))
    peer.connection.refuse(reason, 0)
    assert peer.gets() == expected
    assert peer.events() == [Ended(Cause.REFUSED, reason, "")]
    assert peer.connection.closed


@BOTH
@pytest.mark.parametrize(
    "packet", [PINGREQ, Publish("a", b""), Disconnect(), Subscribe(1, (SubscriptionRequest("a"),))]
)
def test_the_first_packet_must_be_connect(version: Version, packet: Packet) -> None:
    peer = Peer(version)
    end = ended(peer.sends(packet))
    assert (end.cause, end.reason) == (Cause.VIOLATION, R.PROTOCOL_ERROR)
    assert peer.gets() == []  # no CONNACK, no DISCONNECT before CONNACK


@BOTH
def test_a_second_connect_ends_the_connection(version: Version) -> None:
    peer = Peer(version)
    peer.connects()
    assert ended(peer.sends(Connect(version, "c"))).reason is R.PROTOCOL_ERROR
    rest = peer.gets()
    assert [type(packet) for packet in rest] == ([Disconnect] if version is V5 else [])  # and no second CONNACK
    assert [packet.reason for packet in rest if isinstance(packet, Disconnect)] == [R.PROTOCOL_ERROR] * len(rest)


@pytest.mark.parametrize(
    ("level", "name", "expected"),
    [
        (3, "MQIsdp", "20020001"),
        (3, "MQTT", "20020001"),
        (6, "MQTT", "2003008400"),
        (4, "HTTP", ""),
    ],
)
def test_an_unknown_version_is_told_so_in_words_that_it_knows(level: int, name: str, expected: str) -> None:
    body = len(name).to_bytes(2, "big") + name.encode() + bytes((level, 2, 0, 0, 0, 1)) + b"c"
    connection = Connection(LIMITS, 0)
    connection.receive(bytes((0x10, len(body))) + body, 0)
    assert isinstance(connection.next_event(0), Ended)
    sent = connection.data_to_send(0).hex()
    if level == 6:
        sent = sent[:2] + "03" + sent[4:8] + "00"  # without the reason string
    assert sent == expected


def test_a_malformed_connect_gets_connack_in_5_and_silence_in_3() -> None:
    for version in Version:
        peer = Peer(version)
        data = bytearray(encode(Connect(version, "c"), version))
        data[9] |= 1  # the reserved flag
        assert ended(peer.sends_bytes(bytes(data))).reason is R.MALFORMED_PACKET
        replies = peer.gets()
        assert [reply.reason for reply in replies if isinstance(reply, Connack)] == (
            [R.MALFORMED_PACKET] if version is V5 else []
        )


def test_enhanced_authentication_is_refused() -> None:
    peer = Peer()
    properties = Properties(authentication_method="SCRAM-SHA-1", authentication_data=b"n")
    end = ended(peer.sends(Connect(V5, "c", properties=properties), Auth(R.CONTINUE_AUTHENTICATION)))
    assert (end.cause, end.reason) == (Cause.REFUSED, R.BAD_AUTHENTICATION_METHOD)
    assert peer.reason is R.BAD_AUTHENTICATION_METHOD


def test_auth_without_a_method_is_a_protocol_error() -> None:
    peer = Peer()
    peer.connects()
    assert ended(peer.sends(Auth(R.RE_AUTHENTICATE))).reason is R.PROTOCOL_ERROR


def test_an_empty_client_id_is_assigned_one() -> None:
    peer = Peer()
    peer.sends(Connect(V5, "", True))
    with pytest.raises(LocalProtocolError):
        peer.connection.accept(Session(LIMITS), session_present=False, now=0)
    peer.connection.accept(Session(LIMITS), session_present=False, now=0, client_id="made-up")
    (connack,) = peer.gets()
    assert isinstance(connack, Connack)
    assert connack.properties.assigned_client_identifier == "made-up"
    assert peer.connection.client_id == "made-up"


def test_an_empty_client_id_is_assigned_one_in_3() -> None:
    peer = Peer(V311)
    peer.sends(Connect(V311, "", True))
    peer.connection.accept(Session(LIMITS), session_present=False, now=0, client_id="made-up")
    assert peer.gets() == [Connack()]
    assert peer.connection.client_id == "made-up"


def test_in_3_an_empty_client_id_needs_a_clean_session() -> None:
    peer = Peer(V311)
    ended(peer.sends(Connect(V311, "", clean_start=False)))
    assert peer.gets() == [Connack(False, R.CLIENT_IDENTIFIER_NOT_VALID)]


@BOTH
@pytest.mark.parametrize("client_id", ["x" * 257, "a\nb", "a\x7f"])
def test_a_client_id_that_we_do_not_take(version: Version, client_id: str) -> None:
    peer = Peer(version)
    assert ended(peer.sends(Connect(version, client_id))).reason is R.CLIENT_IDENTIFIER_NOT_VALID
    assert peer.reason is R.CLIENT_IDENTIFIER_NOT_VALID


def test_a_client_id_of_the_plainest_kind_is_taken() -> None:
    Peer(V311).connects(client_id="0123456789abcdefghijklm")  # [MQTT-3.1.3-5]


def test_clean_start_never_resumes() -> None:
    peer = Peer()
    peer.sends(Connect(V5, "c", clean_start=True))
    with pytest.raises(LocalProtocolError):
        peer.connection.accept(Session(LIMITS), session_present=True, now=0)


@pytest.mark.parametrize("topic", ["a/+", "#", "x" * 1_025])
def test_a_will_for_no_topic_is_refused(topic: str) -> None:
    peer = Peer()
    assert ended(peer.sends(Connect(V5, "c", will=Will(topic, b"")))).reason is R.TOPIC_NAME_INVALID
    assert peer.reason is R.TOPIC_NAME_INVALID


def test_session_expiry_and_keep_alive_are_capped_and_said_so() -> None:
    limits = MqttLimits(session_expiry=100.0, keep_alive=60)
    peer = Peer(limits=limits)
    peer.sends(Connect(V5, "c", keep_alive=61, properties=Properties(session_expiry_interval=0xFFFF_FFFF)))
    session = Session(limits)
    peer.connection.accept(session, session_present=False, now=0)
    (connack,) = peer.gets()
    assert isinstance(connack, Connack)
    assert (connack.properties.session_expiry_interval, connack.properties.server_keep_alive) == (100, 60)
    assert session.expiry == 100.0


def test_a_session_may_last_for_ever_where_it_is_allowed() -> None:
    limits = MqttLimits(session_expiry=NEVER)
    peer = Peer(limits=limits)
    session = peer.connects(properties=Properties(session_expiry_interval=0xFFFF_FFFF))
    peer.connection.lost(0)
    assert session.next_timer() is None
    assert not session.over(1e12)


@pytest.mark.parametrize("asked", [0, 1])
def test_response_information_is_for_those_who_ask(asked: int) -> None:
    peer = Peer()
    peer.sends(Connect(V5, "c", properties=Properties(request_response_information=asked)))
    peer.connection.accept(Session(LIMITS), session_present=False, now=0, response_information="answers/c")
    (connack,) = peer.gets()
    assert isinstance(connack, Connack)
    assert connack.properties.response_information == ("answers/c" if asked else None)


def test_a_connect_that_is_too_large_is_refused_from_its_header() -> None:
    connection = Connection(LIMITS, 0)
    connection.receive(b"\x10\xff\xff\x7f", 0)
    event = connection.next_event(0)
    assert isinstance(event, Ended)
    assert event.reason is R.PACKET_TOO_LARGE


# Incoming PUBLISH ---------------------------------------------------------------------------------------------------


@BOTH
def test_an_acknowledgement_means_stored_and_leaves_in_the_order_of_the_publishes(version: Version) -> None:
    peer = Peer(version)
    session = peer.connects()
    first, second, third, fourth, fifth = published(
        peer.sends(
            Publish("a", b"1", Q1, packet_id=1),
            Publish("a", b"2", Q1, packet_id=2),
            Publish("a", b"3", Q2, packet_id=3),
            Publish("a", b"4", Q2, packet_id=4),
            Publish("a", b"5", Q0),
        )
    )
    assert first.message == Message("a", b"1", Q1)
    assert first.levels == ("a",)
    assert peer.gets() == []
    session.stored(fifth.receipt, 0)
    session.stored(second.receipt, 0)
    session.stored(fourth.receipt, 0)
    assert peer.gets() == []
    session.stored(third.receipt, 0)
    assert peer.gets() == [pubrec(3), pubrec(4)]  # not held up by the QoS 1 messages
    session.stored(first.receipt, 0)
    assert peer.gets() == [puback(1), puback(2)]


def test_a_refused_message_is_told_in_5() -> None:
    peer = Peer()
    session = peer.connects()
    one, two, three = published(
        peer.sends(
            Publish("a", b"", Q1, packet_id=1), Publish("a", b"", Q2, packet_id=2), Publish("a", b"", Q1, packet_id=3)
        )
    )
    session.failed(one.receipt, R.NOT_AUTHORIZED, 0, "no grant")
    session.failed(two.receipt, R.QUOTA_EXCEEDED, 0)
    session.stored(three.receipt, 0, R.NO_MATCHING_SUBSCRIBERS)
    assert peer.gets() == [
        puback(1, R.NOT_AUTHORIZED, "no grant"),
        pubrec(2, R.QUOTA_EXCEEDED),
        puback(3, R.NO_MATCHING_SUBSCRIBERS),
    ]
    assert len(published(peer.sends(Publish("a", b"", Q2, packet_id=2)))) == 1  # a new message [MQTT-4.3.3-9]


@pytest.mark.parametrize("qos", [Q1, Q2])
def test_a_refused_message_ends_the_connection_in_3(qos: QoS) -> None:
    peer = Peer(V311)
    session = peer.connects()
    (one,) = published(peer.sends(Publish("a", b"", qos, packet_id=1)))
    session.failed(one.receipt, R.NOT_AUTHORIZED, 0)
    assert ended(peer.events()).reason is R.NOT_AUTHORIZED
    assert peer.gets() == []
    assert session.incoming == {}


@BOTH
def test_a_refused_message_of_qos_0_ends_the_connection(version: Version) -> None:
    peer = Peer(version)
    session = peer.connects()
    (one,) = published(peer.sends(Publish("a", b"")))
    session.failed(one.receipt, R.NOT_AUTHORIZED, 0)
    assert ended(peer.events()).reason is R.NOT_AUTHORIZED
    assert [type(packet) for packet in peer.gets()] == ([Disconnect] if version is V5 else [])


def test_reasons_that_do_not_fit_the_call_are_our_error() -> None:
    peer = Peer()
    session = peer.connects()
    (one,) = published(peer.sends(Publish("a", b"", Q1, packet_id=1)))
    with pytest.raises(LocalProtocolError):
        session.stored(one.receipt, 0, R.NOT_AUTHORIZED)
    with pytest.raises(LocalProtocolError):
        session.failed(one.receipt, R.SUCCESS, 0)


@BOTH
def test_qos_2_is_received_once_however_often_it_is_sent(version: Version) -> None:
    peer = Peer(version)
    session = peer.connects()
    publish = Publish("a", b"", Q2, packet_id=7)
    (one,) = published(peer.sends(publish))
    assert peer.sends(replace(publish, dup=True)) == []
    session.stored(one.receipt, 0)
    assert peer.gets() == [pubrec(7)]
    assert peer.sends(replace(publish, dup=True)) == []  # [MQTT-4.3.3-10]
    assert peer.gets() == [pubrec(7)]
    assert peer.sends(pubrel(7)) == []
    assert peer.gets() == [pubcomp(7)]
    assert len(published(peer.sends(replace(publish, dup=True)))) == 1  # [MQTT-4.3.3-12]


def test_in_a_durable_session_the_release_is_written_before_pubcomp() -> None:
    peer = Peer()
    session = peer.connects(Session(LIMITS, durable=True), present=False)
    (one,) = published(peer.sends(Publish("a", b"", Q2, packet_id=7)))
    session.stored(one.receipt, 0)
    assert session.snapshot().incoming == (7,)
    assert peer.sends(pubrel(7)) == [ReleaseReceived(7)]
    assert peer.sends(pubrel(7)) == []  # impatient
    assert peer.gets() == [pubrec(7)]
    assert session.snapshot().incoming == (7,)
    session.released(7)
    assert peer.gets() == [pubcomp(7)]
    assert session.snapshot().incoming == ()
    with pytest.raises(LocalProtocolError):
        session.released(7)


def test_a_release_begun_on_an_earlier_connection_is_completed_once() -> None:
    peer = Peer()
    session = peer.connects(Session(LIMITS, durable=True), present=False)
    for packet_id in (7, 8):
        (one,) = published(peer.sends(Publish("a", b"", Q2, packet_id=packet_id)))
        session.stored(one.receipt, 0)
        peer.sends(pubrel(packet_id))
    peer.connection.lost(0)
    again = Peer()
    again.connects(session)
    session.released(7)
    assert again.gets() == []  # its PUBREL is still to come
    again.sends(pubrel(7), pubrel(8))
    assert again.gets() == [pubcomp(7, R.PACKET_IDENTIFIER_NOT_FOUND)]
    session.released(8)
    assert again.gets() == [pubcomp(8)]


@pytest.mark.parametrize(("version", "reason"), [(V5, R.PACKET_IDENTIFIER_NOT_FOUND), (V311, R.SUCCESS)])
def test_pubrel_of_an_unknown_id_is_completed(version: Version, reason: R) -> None:
    peer = Peer(version)
    peer.connects()
    assert peer.sends(pubrel(9)) == []
    assert peer.gets() == [pubcomp(9, reason)]


def test_pubrel_before_pubrec_is_a_protocol_error() -> None:
    peer = Peer()
    peer.connects()
    published(peer.sends(Publish("a", b"", Q2, packet_id=1)))
    assert ended(peer.sends(pubrel(1))).reason is R.PROTOCOL_ERROR


@BOTH
def test_a_qos_1_message_repeated_before_its_puback_is_one_message(version: Version) -> None:
    peer = Peer(version)
    session = peer.connects()
    (one,) = published(peer.sends(Publish("a", b"", Q1, packet_id=1)))
    assert peer.sends(Publish("a", b"", Q1, dup=True, packet_id=1)) == []
    session.stored(one.receipt, 0)
    assert peer.gets() == [puback(1)]
    assert len(published(peer.sends(Publish("a", b"", Q1, dup=True, packet_id=1)))) == 1  # [MQTT-4.3.2-5]
    assert ended(peer.sends(Publish("a", b"", Q1, packet_id=1))).reason is R.PROTOCOL_ERROR  # in use


def test_the_store_may_answer_after_the_connection_is_gone_and_back() -> None:
    peer = Peer()
    session = peer.connects()
    one, two = published(peer.sends(Publish("a", b"1", Q1, packet_id=1), Publish("a", b"2", Q2, packet_id=2)))
    peer.connection.lost(1)
    again = Peer(now=2)
    again.connects(session)
    repeated = published(
        again.sends(Publish("a", b"1", Q1, dup=True, packet_id=1), Publish("a", b"2", Q2, dup=True, packet_id=2))
    )
    assert [event.message.qos for event in repeated] == [Q1]  # QoS 2 is still being stored: no second one
    session.stored(one.receipt, 3)
    assert again.gets() == []  # the old receipt of QoS 1 is not the new message's
    session.stored(two.receipt, 3)
    assert again.gets() == [pubrec(2)]
    session.stored(repeated[0].receipt, 3)
    assert again.gets() == [puback(1)]
    assert peer.gets() == []


def test_qos_2_survives_a_restart_of_the_server_without_a_second_message() -> None:
    peer = Peer()
    session = peer.connects(Session(LIMITS, durable=True), present=False)
    (one,) = published(peer.sends(Publish("a", b"", Q2, packet_id=7)))
    session.stored(one.receipt, 0)
    restored = Session.restore(session.snapshot(), LIMITS)
    again = Peer()
    again.connects(restored)
    assert again.sends(Publish("a", b"", Q2, dup=True, packet_id=7)) == []
    assert again.gets() == [pubrec(7)]
    assert again.sends(pubrel(7)) == [ReleaseReceived(7)]
    restored.released(7)
    assert again.gets() == [pubcomp(7)]


def test_more_than_receive_maximum_is_disconnected() -> None:
    limits = MqttLimits(receive_maximum=2)
    peer = Peer(limits=limits)
    session = peer.connects()
    one, two = published(
        peer.sends(Publish("a", b"", Q2, packet_id=1), Publish("a", b"", Q1, packet_id=2), Publish("a", b""))[:2]
    )
    session.stored(two.receipt, 0)
    session.stored(one.receipt, 0)
    (three,) = published(peer.sends(Publish("a", b"", Q1, packet_id=3)))
    assert three.receipt.packet_id == 3
    assert ended(peer.sends(Publish("a", b"", Q1, packet_id=4))).reason is R.RECEIVE_MAXIMUM_EXCEEDED
    assert peer.reason is R.RECEIVE_MAXIMUM_EXCEEDED


def test_qos_2_that_is_never_released_is_bounded_in_3() -> None:
    limits = MqttLimits(unreleased=2, receive_maximum=1)
    peer = Peer(V311, limits)
    session = peer.connects()
    for packet_id in (1, 2):
        (one,) = published(peer.sends(Publish("a", b"", Q2, packet_id=packet_id)))
        session.stored(one.receipt, 0)
    assert ended(peer.sends(Publish("a", b"", Q2, packet_id=3))).reason is R.QUOTA_EXCEEDED


@pytest.mark.parametrize("limits", [MqttLimits(unanswered_messages=2), MqttLimits(unanswered_bytes=500)])
def test_a_server_that_cannot_keep_up_stops_reading_and_loses_nothing(limits: MqttLimits) -> None:
    peer = Peer(V311, limits)
    session = peer.connects(keep_alive=10)
    first = published(peer.sends(*(Publish("a", b"", Q1, packet_id=number) for number in range(1, 6))))
    assert len(first) == 2
    assert not peer.connection.wants_read
    peer.now = 16
    peer.connection.tick(16)
    assert not peer.connection.closed  # we made it wait
    rest = []
    for event in first:
        session.stored(event.receipt, 16)
        rest += published(peer.events())
    assert [event.receipt.packet_id for event in first + rest] == [1, 2, 3, 4]
    for event in rest:
        session.stored(event.receipt, 16)
    (last,) = published(peer.events())
    assert peer.connection.wants_read
    session.stored(last.receipt, 16)
    assert peer.gets() == [puback(number) for number in range(1, 6)]


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (Publish("a/+", b""), R.TOPIC_NAME_INVALID),
        (Publish("a/#", b""), R.TOPIC_NAME_INVALID),
        (Publish("x" * 1_025, b""), R.TOPIC_NAME_INVALID),
        (Publish("/" * 64, b""), R.TOPIC_NAME_INVALID),
        (Publish("a", b"", properties=Properties(response_topic="b/+")), R.TOPIC_NAME_INVALID),
        (Publish("a", b"", properties=Properties(subscription_identifiers=(1,))), R.PROTOCOL_ERROR),
        (Publish("a", b"", properties=Properties(topic_alias=17)), R.TOPIC_ALIAS_INVALID),
        (Publish("", b"", properties=Properties(topic_alias=1)), R.PROTOCOL_ERROR),
        (Connack(), R.PROTOCOL_ERROR),
        (Suback(1, (R.SUCCESS,)), R.PROTOCOL_ERROR),
        (Unsuback(1, (R.SUCCESS,)), R.PROTOCOL_ERROR),
        (PINGRESP, R.PROTOCOL_ERROR),
        (Subscribe(1, (SubscriptionRequest("a/#/b"),)), R.TOPIC_FILTER_INVALID),
        (Subscribe(1, (SubscriptionRequest("$share//a"),)), R.TOPIC_FILTER_INVALID),
        (Subscribe(1, (SubscriptionRequest("$share/g/a", no_local=True),)), R.PROTOCOL_ERROR),
        (Unsubscribe(1, ("a+",)), R.TOPIC_FILTER_INVALID),
        (Disconnect(properties=Properties(server_reference="x")), R.PROTOCOL_ERROR),
        (Disconnect(properties=Properties(session_expiry_interval=1)), R.PROTOCOL_ERROR),
    ],
)
def test_what_breaks_the_protocol_is_disconnected_with_its_reason(packet: Packet, reason: R) -> None:
    peer = Peer()
    peer.connects(properties=NO_PROPERTIES)
    end = ended(peer.sends(packet, PINGREQ))
    assert (end.cause, end.reason) == (Cause.VIOLATION, reason)
    (goodbye,) = peer.gets()  # and no PINGRESP
    assert isinstance(goodbye, Disconnect)
    assert goodbye.reason is reason
    assert goodbye.properties.reason_string == end.text
    assert peer.connection.closed
    assert not peer.connection.wants_read


def test_topic_aliases_of_the_client_live_as_long_as_the_connection() -> None:
    peer = Peer()
    session = peer.connects()
    alias = Properties(topic_alias=16)
    events = published(
        peer.sends(
            Publish("long/topic", b"1", properties=alias),
            Publish("", b"2", properties=alias),
            Publish("other", b"3", properties=alias),
            Publish("", b"4", properties=alias),
        )
    )
    assert [event.message.topic for event in events] == ["long/topic", "long/topic", "other", "other"]
    assert events[0].message.properties == NO_PROPERTIES
    peer.connection.lost(0)
    again = Peer()
    again.connects(session)
    assert ended(again.sends(Publish("", b"", properties=alias))).reason is R.PROTOCOL_ERROR


def test_a_packet_beyond_our_maximum_is_refused_from_its_header() -> None:
    peer = Peer()
    peer.connects()
    assert ended(peer.sends_bytes(b"\x30\x80\x80\x10")).reason is R.PACKET_TOO_LARGE
    assert peer.reason is R.PACKET_TOO_LARGE


def test_what_a_message_carries_is_kept_and_what_belongs_to_the_hop_is_not() -> None:
    peer = Peer(now=100)
    peer.connects()
    carried = Properties(
        payload_format_indicator=1,
        content_type="text/plain",
        response_topic="answers",
        correlation_data=b"7",
        user_properties=(("b", "2"), ("a", "1"), ("b", "3")),
    )
    sent = replace(carried, message_expiry_interval=30, topic_alias=1)
    (event,) = published(peer.sends(Publish("a", b"x", Q1, True, False, 5, sent)))
    assert event.message == Message("a", b"x", Q1, True, carried, 130.0)
    other = Peer(now=110)
    reader = other.connects()
    delivery = delivery_of(event.message, [Subscription(parse_filter("a"), Q1, identifier=9)], own=False)
    assert delivery is not None
    reader.deliver(delivery, 110)
    (got,) = other.gets()
    assert got == Publish(
        "a", b"x", Q1, False, False, 1, replace(carried, message_expiry_interval=20, subscription_identifiers=(9,))
    )


# Outgoing PUBLISH ---------------------------------------------------------------------------------------------------


@BOTH
def test_each_qos_goes_out_and_is_acknowledged_in_its_way(version: Version) -> None:
    peer = Peer(version)
    session = peer.connects()
    assert [session.deliver(to_send(qos, key=qos + 10), 0) for qos in QoS] == [0, 1, 2]
    assert peer.gets() == [
        Publish("a", b"x"),
        Publish("a", b"x", Q1, packet_id=1),
        Publish("a", b"x", Q2, packet_id=2),
    ]
    assert peer.sends(pubrec(2)) == []
    assert peer.gets() == [pubrel(2)]
    assert peer.sends(puback(1)) == [Delivered(1, 11, R.SUCCESS)]
    assert peer.sends(pubcomp(2)) == [Delivered(2, 12, R.SUCCESS)]
    assert (session.queued, session.queued_bytes) == (0, 0)


def test_what_is_not_acknowledged_is_sent_again_on_the_next_connection_and_only_there() -> None:
    peer = Peer()
    session = peer.connects()
    for number, qos in enumerate((Q1, Q2, Q2, Q1)):
        session.deliver(to_send(qos, payload=str(number).encode()), 0)
    peer.gets()
    peer.sends(pubrec(3))
    assert peer.gets() == [pubrel(3)]
    peer.connection.lost(0)
    session.deliver(to_send(Q1, payload=b"new"), 1)
    assert session.deliver(to_send(Q0), 1) is Untaken.OFFLINE
    again = Peer(now=2)
    again.connects(session)
    assert again.early == [
        pubrel(3),
        Publish("a", b"0", Q1, dup=True, packet_id=1),
        Publish("a", b"1", Q2, dup=True, packet_id=2),
        Publish("a", b"3", Q1, dup=True, packet_id=4),
        Publish("a", b"new", Q1, packet_id=5),
    ]
    assert again.sends(pubcomp(3), puback(1), pubrec(2), puback(4), puback(5)) == [
        Delivered(3, 0, R.SUCCESS),
        Delivered(1, 0, R.SUCCESS),
        Delivered(4, 0, R.SUCCESS),
        Delivered(5, 0, R.SUCCESS),
    ]
    assert again.gets() == [pubrel(2)]


def test_in_a_durable_session_pubrel_waits_for_the_record_and_keeps_the_order_of_the_pubrecs() -> None:
    peer = Peer()
    session = peer.connects(Session(LIMITS, durable=True), present=False)
    for key in (1, 2):
        session.deliver(to_send(Q2, key), 0)
    peer.gets()
    assert peer.sends(pubrec(2), pubrec(1)) == [ReceiptRecorded(2, 2), ReceiptRecorded(1, 1)]
    session.recorded(1)
    assert peer.gets() == []  # [MQTT-4.6.0-4]
    session.recorded(2)
    assert peer.gets() == [pubrel(2), pubrel(1)]
    assert [(row.packet_id, row.phase) for row in session.snapshot().outgoing] == [
        (2, Phase.RELEASED),
        (1, Phase.RELEASED),
    ]
    with pytest.raises(LocalProtocolError):
        session.recorded(1)
    restored = Session.restore(session.snapshot(), LIMITS)
    again = Peer()
    again.connects(restored)
    assert again.early == [pubrel(2), pubrel(1)]  # and no PUBLISH [MQTT-4.3.3-6]


def test_a_record_that_is_not_confirmed_counts_as_not_written() -> None:
    peer = Peer()
    session = peer.connects(Session(LIMITS, durable=True), present=False)
    session.deliver(to_send(Q2), 0)
    peer.gets()
    peer.sends(pubrec(1))
    again = Peer()
    again.connects(Session.restore(session.snapshot(), LIMITS))
    assert again.early == [Publish("a", b"x", Q2, dup=True, packet_id=1)]


def test_a_record_confirmed_on_the_next_connection_sends_its_pubrel_there() -> None:
    peer = Peer()
    session = peer.connects(Session(LIMITS, durable=True), present=False)
    session.deliver(to_send(Q2), 0)
    peer.gets()
    peer.sends(pubrec(1))
    peer.connection.lost(0)
    again = Peer()
    again.connects(session)
    assert again.early == []
    session.recorded(1)
    assert again.gets() == [pubrel(1)]


def test_a_message_is_stored_with_its_packet_id_before_it_is_sent() -> None:
    peer = Peer()
    session = peer.connects()
    size = to_send(Q1).message.size
    first, second = session.reserve(size), session.reserve(size)
    assert (first, second) == (1, 2)
    assert peer.gets() == []
    session.unreserve(1)
    assert session.deliver(to_send(Q1), 0, packet_id=2) == 2
    assert peer.gets() == [Publish("a", b"x", Q1, packet_id=2)]
    with pytest.raises(LocalProtocolError):
        session.deliver(to_send(Q1), 0, packet_id=2)
    assert session.queued_bytes == size


def test_a_failure_from_the_client_is_final() -> None:
    peer = Peer()
    session = peer.connects()
    session.deliver(to_send(Q1, 1), 0)
    session.deliver(to_send(Q2, 2), 0)
    peer.gets()
    assert peer.sends(puback(1, R.QUOTA_EXCEEDED), pubrec(2, R.PAYLOAD_FORMAT_INVALID)) == [
        Delivered(1, 1, R.QUOTA_EXCEEDED),
        Delivered(2, 2, R.PAYLOAD_FORMAT_INVALID),
    ]
    peer.connection.lost(0)
    again = Peer()
    again.connects(session)
    assert again.early == []  # [MQTT-4.4.0-2]


@pytest.mark.parametrize(
    ("qos", "packets"),
    [
        (Q1, [pubrec(1)]),
        (Q1, [pubcomp(1)]),
        (Q2, [puback(1)]),
        (Q2, [pubcomp(1)]),
        (Q2, [pubrec(1), puback(1)]),
        (Q2, [pubrec(1), pubrec(1, R.QUOTA_EXCEEDED)]),
    ],
)
def test_an_acknowledgement_out_of_place_is_a_protocol_error(qos: QoS, packets: list[Packet]) -> None:
    peer = Peer()
    session = peer.connects()
    session.deliver(to_send(qos), 0)
    peer.gets()
    assert ended(peer.sends(*packets)).reason is R.PROTOCOL_ERROR


@pytest.mark.parametrize(("version", "reason"), [(V5, R.PACKET_IDENTIFIER_NOT_FOUND), (V311, R.SUCCESS)])
def test_acknowledgements_of_what_is_forgotten_do_no_harm(version: Version, reason: R) -> None:
    peer = Peer(version)
    session = peer.connects()
    assert peer.sends(puback(7), pubcomp(8), pubrec(9)) == []
    assert peer.gets() == [pubrel(9, reason)]
    session.deliver(to_send(Q2), 0)
    assert peer.sends(pubrec(1), pubrec(1)) == []
    assert peer.gets() == [Publish("a", b"x", Q2, packet_id=1), pubrel(1), pubrel(1)]


def test_no_more_than_the_clients_receive_maximum_is_on_the_way_and_nothing_else_waits() -> None:
    peer = Peer()
    session = peer.connects(properties=Properties(receive_maximum=2, session_expiry_interval=60))
    for _ in range(4):
        session.deliver(to_send(Q1), 0)
    session.deliver(to_send(Q0), 0)
    assert [packet.packet_id for packet in peer.gets() if isinstance(packet, Publish)] == [1, 2, 0]
    peer.sends(PINGREQ)
    assert peer.gets() == [PINGRESP]  # [MQTT-3.3.4-10]
    peer.sends(puback(2))
    assert [packet.packet_id for packet in peer.gets() if isinstance(packet, Publish)] == [3]
    peer.connection.lost(0)
    again = Peer()
    again.connects(session, properties=Properties(receive_maximum=1, session_expiry_interval=60))
    assert [packet.packet_id for packet in again.early if isinstance(packet, Publish)] == [1]


def test_a_released_message_still_counts_against_the_window() -> None:
    peer = Peer()
    session = peer.connects(properties=Properties(receive_maximum=1, session_expiry_interval=60))
    session.deliver(to_send(Q2), 0)
    session.deliver(to_send(Q1), 0)
    peer.gets()
    peer.sends(pubrec(1))
    assert peer.gets() == [pubrel(1)]
    peer.connection.lost(0)
    again = Peer()
    again.connects(session, properties=Properties(receive_maximum=1, session_expiry_interval=60))
    assert again.early == [pubrel(1)]
    again.sends(pubcomp(1))
    assert again.gets() == [Publish("a", b"x", Q1, packet_id=2)]


def test_a_message_above_the_clients_maximum_packet_size_counts_as_delivered() -> None:
    peer = Peer()
    session = peer.connects(properties=Properties(maximum_packet_size=40, session_expiry_interval=60))
    big, small = to_send(Q1, 5, b"x" * 40), to_send(Q1, 6)
    session.deliver(big, 0)
    session.deliver(small, 0)
    assert session.deliver(replace(big, qos=Q0), 0) is Untaken.TOO_LARGE
    assert peer.events() == [Discarded(1, big, DiscardReason.TOO_LARGE)]
    assert peer.gets() == [Publish("a", b"x", Q1, packet_id=2)]


def test_texts_are_left_out_where_they_do_not_fit_or_are_not_wanted() -> None:
    small = Properties(maximum_packet_size=36)
    quiet = Properties(request_problem_information=0)
    for properties, goodbye_text in ((small, None), (quiet, "x" * 40)):
        peer = Peer()
        session = peer.connects(properties=properties)
        (one,) = published(peer.sends(Publish("a", b"", Q1, packet_id=1)))
        session.failed(one.receipt, R.NOT_AUTHORIZED, 0, "x" * 40)
        assert peer.gets() == [puback(1, R.NOT_AUTHORIZED)]
        peer.connection.disconnect(R.ADMINISTRATIVE_ACTION, 0, text="x" * 40)
        (goodbye,) = peer.gets()
        assert isinstance(goodbye, Disconnect)
        assert goodbye.properties.reason_string == goodbye_text


def test_a_maximum_packet_size_that_not_even_connack_fits_closes() -> None:
    peer = Peer()
    peer.sends(Connect(V5, "c", properties=Properties(maximum_packet_size=4)))
    session = Session(LIMITS)
    peer.connection.accept(session, session_present=False, now=0)
    assert peer.gets() == []
    assert ended(peer.events()).reason is R.PACKET_TOO_LARGE
    assert not session.attached


def test_aliases_towards_the_client_stay_within_what_it_allows() -> None:
    peer = Peer()
    session = peer.connects(properties=Properties(topic_alias_maximum=1, session_expiry_interval=60))
    for topic in ("a", "a", "b", "a"):
        session.deliver(to_send(Q0, topic=topic), 0)
    assert [(p.topic, p.properties.topic_alias) for p in peer.gets() if isinstance(p, Publish)] == [
        ("a", 1),
        ("", 1),
        ("b", None),
        ("", 1),
    ]
    plain = Peer()
    session = plain.connects()
    session.deliver(to_send(Q0), 0)
    assert plain.gets() == [Publish("a", b"x")]  # [MQTT-3.1.2-27]


def test_an_expired_message_is_dropped_unless_it_was_begun() -> None:
    peer = Peer()
    session = peer.connects(properties=Properties(receive_maximum=1, session_expiry_interval=600))
    begun = Delivery(message(expires_at=10.0), Q1, key=1)
    waiting = Delivery(message(expires_at=10.0), Q1, key=2)
    session.deliver(begun, 0)
    session.deliver(waiting, 0)
    assert len(peer.gets()) == 1
    peer.connection.lost(5)
    again = Peer(now=11)
    again.connects(session)
    assert again.early == [
        Publish("a", b"x", Q1, dup=True, packet_id=1, properties=Properties(message_expiry_interval=0))
    ]  # [MQTT-4.3.3-7]
    assert again.events() == [Discarded(2, waiting, DiscardReason.EXPIRED)]
    assert session.deliver(replace(begun, qos=Q0), 11) is Untaken.EXPIRED


def test_a_full_queue_says_so() -> None:
    session = Session(MqttLimits(queued_messages=2))
    assert [session.deliver(to_send(Q1), 0) for _ in range(3)] == [1, 2, Untaken.QUEUE_FULL]
    session = Session(MqttLimits(queued_bytes=2 * to_send(Q1).message.size))
    assert [session.deliver(to_send(Q1), 0) for _ in range(3)] == [1, 2, Untaken.QUEUE_FULL]
    gone = session.discard_queued(lambda delivery: True)
    assert [one.packet_id for one in gone] == [1, 2]
    assert session.queued_bytes == 0


def test_packet_ids_go_round_and_pass_over_those_in_use() -> None:
    peer = Peer()
    session = peer.connects()
    session.deliver(to_send(Q1, 99), 0)
    for expected in range(2, 65_536):
        assert session.deliver(to_send(Q1), 0) == expected
        peer.connection.receive(encode(puback(expected), V5), 0)
        assert peer.connection.next_event(0) == Delivered(expected, 0, R.SUCCESS)
        peer.connection.data_to_send(0)
    assert session.deliver(to_send(Q1), 0) == 2


def test_a_peer_that_does_not_read_loses_qos_0_and_keeps_the_rest_and_is_cut_in_the_end() -> None:
    peer = Peer()
    session = peer.connects()
    peer.connection.pause_writing(0)
    assert session.deliver(to_send(Q0), 0) is Untaken.SLOW
    assert session.deliver(to_send(Q1), 0) == 1
    assert peer.sends(PINGREQ) == []
    assert peer.gets() == []
    assert not peer.connection.wants_read
    peer.connection.resume_writing(1)
    assert peer.events() == []
    assert peer.gets() == [PINGRESP, Publish("a", b"x", Q1, packet_id=1)]
    peer.connection.pause_writing(2)
    assert peer.connection.next_timer() == 22
    peer.connection.tick(21)
    assert not peer.connection.closed
    peer.connection.taking(21)  # slowly, but it does
    peer.connection.tick(40)
    assert not peer.connection.closed
    peer.connection.tick(41)
    assert ended(peer.events()).cause is Cause.TIMEOUT


def test_a_flood_of_packets_is_taken_in_turns() -> None:
    peer = Peer()
    peer.connects()
    peer.connection.turn = 2
    peer.connection.receive(encode(PINGREQ, Version.V5) * 5, 0)
    for answered in (2, 2, 1):
        assert peer.connection.next_event(0) is None
        assert peer.gets() == [PINGRESP] * answered
        assert peer.connection.behind == (not peer.connection.wants_read) == (answered == 2)
        peer.connection.turn = 2


def test_unwritten_bytes_are_bounded() -> None:
    peer = Peer(limits=MqttLimits(write_bytes=100))
    session = peer.connects()
    taken = [session.deliver(to_send(Q0, payload=b"x" * 60), 0) for _ in range(4)]
    assert taken == [0, 0, Untaken.SLOW, Untaken.SLOW]
    for _ in range(4):
        session.deliver(to_send(Q1, payload=b"x" * 60), 0)
    assert len(peer.connection.data_to_send(0)) < 200
    assert len(peer.gets()) == 6 - 2 + 2 - 2  # the rest follows as it is written


@BOTH
def test_dup_is_not_forwarded(version: Version) -> None:
    peer = Peer(version)
    session = peer.connects()
    (event,) = published(peer.sends(Publish("a", b"x", Q1, dup=True, packet_id=4)))
    delivery = delivery_of(event.message, [subscription()], own=False)
    assert delivery is not None
    session.deliver(delivery, 0)
    assert peer.gets() == [Publish("a", b"x", Q1, dup=False, packet_id=1)]


# SUBSCRIBE ----------------------------------------------------------------------------------------------------------


def test_subscriptions_are_judged_outside_and_answered_in_order() -> None:
    peer = Peer(limits=MqttLimits(subscriptions=3))
    session = peer.connects()
    requests = (
        SubscriptionRequest("a/+", Q2, True, True, RetainHandling.SEND_IF_NEW),
        SubscriptionRequest("forbidden/#", Q1),
        SubscriptionRequest("/" * 64, Q1),
        SubscriptionRequest("$share/g/b", Q1),
        SubscriptionRequest("third", Q0),
        SubscriptionRequest("one/too/many", Q0),
        SubscriptionRequest("a/+", Q0),
        SubscriptionRequest("another/too/many", Q0),
    )
    subscribe = Subscribe(9, requests, Properties(subscription_identifiers=(77,)))
    assert peer.sends(subscribe, PINGREQ) == [SubscribeRequested(9, (requests[0], requests[1], requests[3]), 77)]
    assert peer.gets() == []  # what comes after it waits
    granted = peer.connection.subscribed(9, (R.GRANTED_QOS_1, R.NOT_AUTHORIZED, R.GRANTED_QOS_1), 0)
    first = Subscription(parse_filter("a/+"), Q1, True, True, RetainHandling.SEND_IF_NEW, 77)
    shared = Subscription(parse_filter("$share/g/b"), Q1, identifier=77)
    assert granted == (Granted(first, None, True), Granted(shared, None, False))
    assert session.subscriptions == {"a/+": first, "$share/g/b": shared}
    assert peer.events() == [SubscribeRequested(9, (requests[4],), 77)]  # the refused one has left its room
    assert peer.gets() == []
    granted = peer.connection.subscribed(9, (R.SUCCESS,), 0)
    assert [one.subscription.filter.text for one in granted] == ["third"]
    assert peer.events() == [SubscribeRequested(9, (requests[6],), 77)]  # the same filter again takes no room
    (again,) = peer.connection.subscribed(9, (R.SUCCESS,), 0)
    assert again.replaced == first
    assert peer.events() == []
    assert peer.connection.take_refusals() == (2, 1)
    assert peer.gets() == [
        Suback(
            9,
            (
                R.GRANTED_QOS_1,
                R.NOT_AUTHORIZED,
                R.TOPIC_FILTER_INVALID,
                R.GRANTED_QOS_1,
                R.SUCCESS,
                R.QUOTA_EXCEEDED,
                R.SUCCESS,
                R.QUOTA_EXCEEDED,
            ),
        ),
        PINGRESP,
    ]


def test_in_3_every_failure_of_a_subscription_is_0x80() -> None:
    peer = Peer(V311)
    peer.connects()
    peer.sends(Subscribe(9, (SubscriptionRequest("a", Q2), SubscriptionRequest("b", Q1))))
    peer.connection.subscribed(9, (R.GRANTED_QOS_2, R.NOT_AUTHORIZED), 0)
    assert peer.gets() == [Suback(9, (R.GRANTED_QOS_2, R.UNSPECIFIED_ERROR))]


@pytest.mark.parametrize(
    ("handling", "first", "second"),
    [
        (RetainHandling.SEND, True, True),
        (RetainHandling.SEND_IF_NEW, True, False),
        (RetainHandling.DO_NOT_SEND, False, False),
    ],
)
def test_retain_handling_and_replacement(handling: RetainHandling, first: bool, second: bool) -> None:
    peer = Peer()
    session = peer.connects()
    for number, (qos, expected) in enumerate(((Q1, first), (Q0, second)), 1):
        peer.sends(Subscribe(number, (SubscriptionRequest("a", qos, retain_handling=handling),)))
        (granted,) = peer.connection.subscribed(number, (R(qos),), 0)
        assert granted.send_retained is expected
        assert (granted.replaced is None) is (number == 1)
    assert [one.qos for one in session.subscriptions.values()] == [Q0]


def test_more_than_was_asked_for_is_never_granted() -> None:
    peer = Peer()
    peer.connects()
    peer.sends(Subscribe(1, (SubscriptionRequest("a", Q0),)))
    with pytest.raises(LocalProtocolError):
        peer.connection.subscribed(1, (R.GRANTED_QOS_1,), 0)


def test_a_subscription_beyond_every_limit_is_answered_without_asking() -> None:
    peer = Peer(limits=MqttLimits(subscriptions=0))
    peer.connects()
    assert peer.sends(Subscribe(1, (SubscriptionRequest("a"),)), PINGREQ) == []
    assert peer.gets() == [Suback(1, (R.QUOTA_EXCEEDED,)), PINGRESP]


def test_unsubscribe_answers_for_each_filter_also_where_there_was_none() -> None:
    peer = Peer()
    session = peer.connects()
    peer.sends(Subscribe(1, (SubscriptionRequest("a"), SubscriptionRequest("b/#"))))
    granted = peer.connection.subscribed(1, (R.SUCCESS, R.SUCCESS), 0)
    session.deliver(to_send(Q1), 0)
    peer.gets()
    assert peer.sends(Unsubscribe(2, ("b/#", "b/+", "b/#"))) == [UnsubscribeRequested(2, (granted[1].subscription,))]
    peer.connection.unsubscribed(2, 0)
    assert peer.gets() == [Unsuback(2, (R.SUCCESS, R.NO_SUBSCRIPTION_EXISTED, R.NO_SUBSCRIPTION_EXISTED))]
    assert list(session.subscriptions) == ["a"]
    assert peer.sends(puback(1)) == [Delivered(1, 0, R.SUCCESS)]  # what was begun is finished


def test_unsubscribe_in_3_has_no_reasons() -> None:
    peer = Peer(V311)
    peer.connects()
    assert peer.sends(Unsubscribe(2, ("never", "subscribed"))) == [UnsubscribeRequested(2, ())]
    peer.connection.unsubscribed(2, 0)
    assert peer.gets() == [Unsuback(2)]


def test_an_answer_to_nothing_is_our_error_and_after_the_end_of_no_use() -> None:
    peer = Peer()
    peer.connects()
    with pytest.raises(LocalProtocolError):
        peer.connection.subscribed(1, (), 0)
    with pytest.raises(LocalProtocolError):
        peer.connection.unsubscribed(1, 0)
    peer.sends(Subscribe(1, (SubscriptionRequest("a"),)))
    with pytest.raises(LocalProtocolError):
        peer.connection.subscribed(1, (), 0)
    peer.connection.lost(0)
    assert peer.connection.subscribed(1, (R.SUCCESS,), 0) == ()
    peer.connection.unsubscribed(1, 0)


def subscription(text: str = "a", qos: QoS = Q1, **more: object) -> Subscription:
    return Subscription(parse_filter(text), qos, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("subscriptions", "own", "expected"),
    [
        ([subscription(qos=Q0), subscription(qos=Q2)], False, (Q1, False, ())),  # the message has QoS 1
        ([subscription(qos=Q0)], False, (Q0, False, ())),
        ([subscription(identifier=1), subscription(identifier=2), subscription()], False, (Q1, False, (1, 2))),
        ([subscription(retain_as_published=True), subscription()], False, (Q1, True, ())),
        ([subscription(no_local=True)], True, None),
        ([subscription(no_local=True)], False, (Q1, False, ())),
        ([subscription(no_local=True, identifier=1), subscription(qos=Q0, identifier=2)], True, (Q0, False, (2,))),
        ([], False, None),
    ],
)
def test_overlapping_subscriptions_make_one_delivery(
    subscriptions: list[Subscription], own: bool, expected: tuple[QoS, bool, tuple[int, ...]] | None
) -> None:
    delivery = delivery_of(message(qos=Q1, retain=True), subscriptions, own=own)
    found = None if delivery is None else (delivery.qos, delivery.retain, delivery.subscription_identifiers)
    assert found == expected


def test_a_retained_message_for_a_new_subscription_has_retain_set() -> None:
    delivery = retained_delivery_of(message(qos=Q2, retain=True), subscription(qos=Q1, identifier=4), key=3)
    assert (delivery.retain, delivery.qos, delivery.subscription_identifiers, delivery.key) == (True, Q1, (4,), 3)


# The end ------------------------------------------------------------------------------------------------------------

WILL = Will("gone", b"bye", Q1, True)


def delayed(seconds: int) -> Will:
    return replace(WILL, properties=Properties(will_delay_interval=seconds, message_expiry_interval=9))


@BOTH
def test_a_normal_disconnect_drops_the_will(version: Version) -> None:
    peer = Peer(version)
    session = peer.connects(will=WILL)
    assert peer.sends(Disconnect(), PINGREQ) == [Ended(Cause.DISCONNECTED, R.SUCCESS, "")]
    assert peer.gets() == []
    assert session.tick(0) == []


@BOTH
@pytest.mark.parametrize("how", ["lost", "violation", "timeout", "closed"])
def test_any_other_end_publishes_it_as_it_was_given(version: Version, how: str) -> None:
    peer = Peer(version)
    session = peer.connects(will=WILL, keep_alive=10)
    match how:
        case "lost":
            peer.connection.lost(15)
        case "violation":
            peer.sends_bytes(b"\x00\x00")
        case "timeout":
            peer.connection.tick(15)
        case _:
            peer.connection.disconnect(R.SERVER_SHUTTING_DOWN, 15)
    assert peer.connection.closed
    assert session.tick(15) == [WillDue(Message("gone", b"bye", Q1, True))]
    assert session.tick(15) == []


@BOTH
@pytest.mark.parametrize("retain", [False, True])
def test_a_will_keeps_its_retain_flag(version: Version, retain: bool) -> None:
    peer = Peer(version)
    session = peer.connects(will=replace(WILL, retain=retain))
    peer.connection.lost(0)
    assert session.tick(0)[:1] == [WillDue(Message("gone", b"bye", Q1, retain))]


def test_a_will_keeps_the_order_of_its_user_properties() -> None:
    pairs = (("b", "2"), ("a", "1"), ("b", "3"))
    peer = Peer()
    session = peer.connects(will=replace(WILL, properties=Properties(user_properties=pairs)))
    peer.connection.lost(0)
    (due,) = session.tick(0)
    assert isinstance(due, WillDue)
    assert due.message.properties.user_properties == pairs


def test_a_disconnect_may_ask_for_the_will() -> None:
    peer = Peer()
    session = peer.connects(will=WILL)
    peer.sends(Disconnect(R.DISCONNECT_WITH_WILL))
    assert session.tick(0) == [WillDue(Message("gone", b"bye", Q1, True))]


def test_revocation_publishes_no_will_and_says_0x98() -> None:
    for version in Version:
        peer = Peer(version)
        session = peer.connects(will=WILL)
        peer.connection.disconnect(R.ADMINISTRATIVE_ACTION, 0, publish_will=False)
        peer.connection.disconnect(R.ADMINISTRATIVE_ACTION, 0)
        assert peer.gets() == ([Disconnect(R.ADMINISTRATIVE_ACTION)] if version is V5 else [])
        assert len(peer.events()) == 1
        assert session.end(0, publish_will=False) == [SessionEnded()]
        assert session.tick(1) == []


def test_a_delayed_will_waits_and_a_return_in_time_cancels_it() -> None:
    peer = Peer()
    session = peer.connects(will=delayed(30))
    peer.connection.lost(100)
    assert session.tick(100) == []
    assert session.next_timer() == 130
    Peer(now=110).connects(session)
    assert session.tick(131) == []
    peer = Peer()
    session = peer.connects(will=delayed(30))
    peer.connection.lost(100)
    assert session.tick(130) == [WillDue(Message("gone", b"bye", Q1, True, NO_PROPERTIES, 139.0))]
    assert session.next_timer() == 700


def test_a_will_is_due_when_the_session_ends_before_its_delay() -> None:
    peer = Peer()
    session = peer.connects(will=delayed(30), properties=Properties(session_expiry_interval=5))
    peer.connection.lost(100)
    (due, end) = session.tick(105)
    assert isinstance(due, WillDue)
    assert end == SessionEnded()
    peer = Peer()
    session = peer.connects(will=delayed(30))
    peer.connection.lost(100)
    (due, end) = session.end(101, publish_will=True)  # clean start of the next connection
    assert isinstance(due, WillDue)


def test_a_will_of_no_delay_is_published_at_takeover_and_a_delayed_one_is_not() -> None:
    for will, expected in ((WILL, 1), (delayed(30), 0)):
        peer = Peer()
        session = peer.connects(will=will)
        peer.connection.disconnect(R.SESSION_TAKEN_OVER, 5)
        assert peer.reason is R.SESSION_TAKEN_OVER
        other = Peer(now=5)
        other.connects(session)
        assert sum(isinstance(event, WillDue) for event in other.events()) == expected


def test_a_session_expires_after_its_interval_and_clean_ones_at_once() -> None:
    for version, clean, properties, expected in (
        (V5, True, NO_PROPERTIES, 10.0),
        (V5, True, Properties(session_expiry_interval=60), 70.0),
        (V311, True, NO_PROPERTIES, 10.0),
        (V311, False, NO_PROPERTIES, 10.0 + LIMITS.session_expiry),
    ):
        peer = Peer(version)
        session = peer.connects(clean=clean, properties=properties)
        assert not session.over(1e9)  # not while it has a connection [MQTT-4.1.0-1]
        peer.connection.lost(10)
        assert session.next_timer() == expected
        assert not session.over(expected - 0.5) or expected == 10.0
        assert session.tick(expected) == [SessionEnded()]
        assert session.over(expected)
        assert session.next_timer() is None


def test_disconnect_may_change_the_expiry() -> None:
    peer = Peer()
    session = peer.connects()
    peer.sends(Disconnect(properties=Properties(session_expiry_interval=0)))
    assert session.tick(0) == [SessionEnded()]
    peer = Peer()
    session = peer.connects()
    peer.sends(Disconnect(properties=Properties(session_expiry_interval=1_000)))
    assert session.next_timer() == 1_000


def test_a_session_has_one_connection_and_an_ended_one_none() -> None:
    peer = Peer()
    session = peer.connects()
    with pytest.raises(LocalProtocolError):
        Peer().connects(session)
    with pytest.raises(LocalProtocolError):
        session.end(0, publish_will=True)
    peer.connection.lost(0)
    session.end(0, publish_will=True)
    with pytest.raises(LocalProtocolError):
        Peer().connects(session)


@BOTH
def test_keep_alive_is_one_and_a_half_times_and_any_packet_resets_it(version: Version) -> None:
    peer = Peer(version)
    peer.connects(keep_alive=10)
    assert peer.connection.next_timer() == 15
    peer.now = 14
    peer.sends(PINGREQ)
    peer.gets()
    peer.connection.tick(28.9)
    assert not peer.connection.closed
    peer.now = 20
    peer.sends_bytes(b"\x30\x10")  # half a packet is no packet
    peer.connection.tick(29)
    assert ended(peer.events()).reason is R.KEEP_ALIVE_TIMEOUT
    assert [packet.reason for packet in peer.gets() if isinstance(packet, Disconnect)] == (
        [R.KEEP_ALIVE_TIMEOUT] if version is V5 else []
    )


def test_without_keep_alive_silence_is_bounded_in_3_or_not_at_all() -> None:
    peer = Peer(V311, limits=MqttLimits(idle=0.0))
    peer.connects()
    assert peer.connection.next_timer() is None
    for keep_alive in (0, 60_000):
        peer = Peer(V311, limits=MqttLimits(idle=100.0))
        peer.connects(keep_alive=keep_alive)
        peer.now = 99
        peer.sends(PINGREQ)
        peer.gets()
        assert peer.connection.next_timer() == 199
        peer.connection.tick(199)
        assert ended(peer.events()).reason is R.KEEP_ALIVE_TIMEOUT


def test_connect_must_come_in_time_whole() -> None:
    peer = Peer()
    assert peer.connection.next_timer() == 10
    peer.now = 9
    peer.sends_bytes(b"\x10\x20\x00")
    peer.connection.tick(10)
    end = ended(peer.events())
    assert (end.cause, end.reason) == (Cause.TIMEOUT, R.MAXIMUM_CONNECT_TIME)
    assert peer.gets() == []


def test_endless_small_fragments_are_cut() -> None:
    peer = Peer()
    peer.connects()
    for now in range(21):
        peer.now = now
        peer.sends_bytes(b"\x30\xff\x7f" if now == 0 else b"x")
        peer.connection.tick(now)
    assert peer.connection.closed is False
    due = peer.connection.next_timer()
    assert due is not None
    assert 20 < due < 21
    peer.connection.tick(due)
    assert ended(peer.events()).cause is Cause.TIMEOUT


def test_a_slow_and_honest_packet_is_not() -> None:
    peer = Peer()
    peer.connects()
    data = encode(Publish("a", b"x" * 20_000), V5)
    for now in range(len(data) // 100 + 1):
        peer.now = now
        events = peer.sends_bytes(data[now * 100 : now * 100 + 100])
        peer.connection.tick(now)
    assert len(published(events)) == 1


def test_what_comes_after_the_end_is_ignored() -> None:
    peer = Peer()
    peer.connects()
    peer.connection.lost(0)
    peer.connection.lost(0)
    assert peer.events() == [Ended(Cause.LOST, R.UNSPECIFIED_ERROR, "the network closed")]
    assert peer.sends(PINGREQ) == []
    assert peer.gets() == []
    assert peer.connection.state is State.CLOSED
    assert peer.connection.next_timer() is None
    with pytest.raises(LocalProtocolError):
        peer.connection.refuse(R.NOT_AUTHORIZED, 0)


@BOTH
@pytest.mark.parametrize("qos", [Q0, Q1, Q2])
def test_what_came_before_a_disconnect_is_answered_before_the_end(version: Version, qos: QoS) -> None:
    peer = Peer(version)
    session = peer.connects(will=WILL)
    packets = [Publish("a", b"", qos, packet_id=n if qos else 0) for n in (1, 2)]
    first, second = (each.receipt for each in published(peer.sends(*packets, Disconnect(), Publish("b", b"", Q0))))
    session.deliver(to_send(Q1), 0)
    session.deliver(to_send(Q0), 0)
    assert peer.gets() == []  # who has said goodbye is sent nothing more
    session.stored(second, 0)
    assert peer.gets() == []
    assert not peer.connection.closed
    peer.sends_bytes(b"\x00\x00")  # no packet, and not looked at
    session.stored(first, 0)
    answers = {Q0: [], Q1: [puback(1), puback(2)], Q2: [pubrec(1), pubrec(2)]}
    assert peer.gets() == answers[qos]
    assert peer.events() == [Ended(Cause.DISCONNECTED, R.SUCCESS, "")]
    assert not session.owes_will


@BOTH
@pytest.mark.parametrize("reason", [R.SUCCESS, R.DISCONNECT_WITH_WILL])
@pytest.mark.parametrize("how", ["lost", "refused", "taken over", "revoked"])
def test_whatever_ends_a_connection_behind_its_disconnect_the_clients_word_was_first(
    version: Version, reason: R, how: str
) -> None:
    if version is V311 and reason is not R.SUCCESS:
        return  # it has no such word
    peer = Peer(version)
    session = peer.connects(will=WILL)
    (event,) = published(peer.sends(Publish("a", b"", Q0), Disconnect(reason)))
    match how:
        case "lost":
            peer.connection.lost(0)
        case "refused":
            session.failed(event.receipt, R.NOT_AUTHORIZED, 0)
        case "taken over":
            peer.connection.disconnect(R.SESSION_TAKEN_OVER, 0)
        case _:
            peer.connection.disconnect(R.ADMINISTRATIVE_ACTION, 0, publish_will=False)
    assert peer.gets() == []
    assert peer.events() == [Ended(Cause.DISCONNECTED, reason, "")]
    assert session.owes_will == (reason is not R.SUCCESS and how != "revoked")


def test_a_disconnect_that_waits_keeps_the_expiry_that_it_gave() -> None:
    peer = Peer()
    session = peer.connects()
    peer.sends(Publish("a", b"", Q1, packet_id=1), Disconnect(properties=Properties(session_expiry_interval=1_000)))
    peer.connection.lost(5)
    assert session.next_timer() == 1_005


def test_a_snapshot_is_a_value_that_restores_the_session() -> None:
    peer = Peer()
    session = peer.connects(Session(LIMITS, durable=True), present=False, will=delayed(30))
    peer.sends(Subscribe(1, (SubscriptionRequest("a/#", Q1),)))
    peer.connection.subscribed(1, (R.GRANTED_QOS_1,), 0)
    for qos in (Q1, Q2, Q2):
        session.deliver(to_send(qos), 0)
    peer.gets()
    peer.sends(pubrec(2))
    session.recorded(2)
    peer.connection.lost(10)
    snapshot = session.snapshot()
    restored = Session.restore(snapshot, LIMITS)
    assert restored.snapshot() == snapshot
    assert restored.next_timer() == 40
    assert restored.queued_bytes == session.queued_bytes
    assert Session.restore(Snapshot(), LIMITS).snapshot() == Snapshot()
    with pytest.raises(LocalProtocolError):
        Session.restore(replace(snapshot, outgoing=snapshot.outgoing * 2), LIMITS)


def test_noise_raises_nothing() -> None:
    thrown, hardy = noise(0, 500)
    assert thrown > 2_000
    assert hardy > 20


def test_limits_that_cannot_be_are_refused() -> None:
    for wrong in (
        {"queued_messages": 40_000},
        {"receive_maximum": 0},
        {"inflight": 0},
        {"topic_aliases_in": 70_000},
        {"keep_alive": 70_000},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MqttLimits(**wrong)  # type: ignore[arg-type]
