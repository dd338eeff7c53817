"""MQTT as transcripts: CONNECT, from an unknown version to what CONNACK says of limits."""

from __future__ import annotations

import pytest

from adapters.mqtt.connection import Connection
from adapters.mqtt.machine_events import Cause, ConnectRequested, Ended
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import Properties
from adapters.mqtt.session import Session
from adapters.mqtt.session_values import NEVER
from adapters.mqtt.wire import encode
from adapters.mqtt.wire_packets import (
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Publish,
    Subscribe,
    SubscriptionRequest,
    Will,
)
from adapters.mqtt.wire_reasons import LocalProtocolError, Version
from tests.mqtt_transcripts import BOTH, LIMITS, PINGREQ, PINGRESP, V5, V311, Peer, R, ended


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
        (V5, R.SERVER_SHUTTING_DOWN, [Connack(False, R.SERVER_UNAVAILABLE)]),
        (V5, R.SESSION_TAKEN_OVER, [Connack(False, R.SERVER_UNAVAILABLE)]),
        (V5, R.DISCONNECT_WITH_WILL, [Connack(False, R.UNSPECIFIED_ERROR)]),
        (V311, R.NOT_AUTHORIZED, [Connack(False, R.NOT_AUTHORIZED)]),
        (V311, R.SERVER_BUSY, [Connack(False, R.SERVER_UNAVAILABLE)]),
        (V311, R.SERVER_SHUTTING_DOWN, [Connack(False, R.SERVER_UNAVAILABLE)]),
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


@BOTH
def test_a_connect_that_nobody_decides_ends(version: Version) -> None:
    peer = Peer(version)
    connect = Connect(version, "c", True)
    assert peer.sends(connect) == [ConnectRequested(connect)]
    due = peer.connection.next_timer()
    assert due is not None
    peer.connection.tick(due - 0.1)
    assert peer.events() == []
    peer.connection.tick(due)
    (event,) = peer.events()
    assert isinstance(event, Ended)
    assert (event.cause, event.reason) == (Cause.TIMEOUT, R.SERVER_UNAVAILABLE)
    assert [each.reason for each in peer.gets() if isinstance(each, Connack)] == [R.SERVER_UNAVAILABLE]
    assert peer.connection.closed


def test_a_connect_that_is_too_large_is_refused_from_its_header() -> None:
    connection = Connection(LIMITS, 0)
    connection.receive(b"\x10\xff\xff\x7f", 0)
    event = connection.next_event(0)
    assert isinstance(event, Ended)
    assert event.reason is R.PACKET_TOO_LARGE
