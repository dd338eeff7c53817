"""MQTT as transcripts: what a client publishes is taken once, acknowledged when stored, and bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.mqtt.machine_events import Cause, ReleaseReceived
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.session import Session
from adapters.mqtt.session_values import Message, Subscription, delivery_of
from adapters.mqtt.topics import parse_filter
from adapters.mqtt.wire_packets import (
    Connack,
    Disconnect,
    Packet,
    Publish,
    QoS,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Unsuback,
    Unsubscribe,
)
from adapters.mqtt.wire_reasons import LocalProtocolError, Version
from tests.mqtt_transcripts import (
    BOTH,
    LIMITS,
    PINGREQ,
    PINGRESP,
    Q0,
    Q1,
    Q2,
    V5,
    V311,
    Peer,
    R,
    ended,
    puback,
    pubcomp,
    published,
    pubrec,
    pubrel,
)


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
