"""MQTT as transcripts: how a connection and a session end, by whom, and what becomes of the will."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.mqtt.connection import State
from adapters.mqtt.machine_events import Cause, Ended, SessionEnded, WillDue
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.session import Session
from adapters.mqtt.session_values import Message, Snapshot
from adapters.mqtt.wire import encode
from adapters.mqtt.wire_packets import Disconnect, Publish, QoS, Subscribe, SubscriptionRequest, Will
from adapters.mqtt.wire_reasons import LocalProtocolError, Version
from tests.fuzz.mqtt_server import noise
from tests.mqtt_transcripts import (
    BOTH,
    LIMITS,
    PINGREQ,
    Q0,
    Q1,
    Q2,
    V5,
    V311,
    Peer,
    R,
    ended,
    puback,
    published,
    pubrec,
    to_send,
)

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
