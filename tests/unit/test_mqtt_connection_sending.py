"""MQTT as transcripts: what a client is sent, until it has acknowledged it, over as many connections as that takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.mqtt.machine_events import Cause, Delivered, Discarded, DiscardReason, ReceiptRecorded
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import Properties
from adapters.mqtt.session import Session, Untaken
from adapters.mqtt.session_values import Delivery, Phase, delivery_of
from adapters.mqtt.wire import encode
from adapters.mqtt.wire_packets import Connect, Disconnect, Packet, Publish, QoS
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
    message,
    puback,
    pubcomp,
    published,
    pubrec,
    pubrel,
    subscription,
    to_send,
)


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
