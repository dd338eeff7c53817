"""MQTT as transcripts: SUBSCRIBE and UNSUBSCRIBE, and what a subscription makes of a message."""

from __future__ import annotations

import pytest

from adapters.mqtt.connection import Granted
from adapters.mqtt.machine_events import Delivered, SubscribeRequested, UnsubscribeRequested
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import Properties
from adapters.mqtt.session_values import Subscription, delivery_of, retained_delivery_of
from adapters.mqtt.topics import parse_filter
from adapters.mqtt.wire_packets import (
    QoS,
    RetainHandling,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Unsuback,
    Unsubscribe,
)
from adapters.mqtt.wire_reasons import LocalProtocolError
from tests.mqtt_transcripts import PINGREQ, PINGRESP, Q0, Q1, Q2, V311, Peer, R, message, puback, subscription, to_send


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
