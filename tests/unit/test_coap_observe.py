"""Observations of one CoAP peer as transcripts, in virtual time (RFC 7641)."""

from __future__ import annotations

import pytest
from aiocoap.numbers.codes import Code
from aiocoap.numbers.types import Type

from adapters.coap.exchanges import NotificationArrived, ObservationEnded
from adapters.coap.limits import CoapLimits
from adapters.coap.observations import EndCause
from tests.coap_peers import CON, NON, Dialogue


def test_a_registration_and_its_notifications() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7")
    assert talk.said() == ["ACK 2.05 1 token=07 observe=1 'state 0'"]
    talk.notifies(number, Code.CONTENT, b"state 1", max_age=30, content_format=0)
    assert talk.said() == ["CON 2.05 #1 token=07 observe=2 content_format=0 max_age=30 'state 1'"]
    talk.acknowledges(1)
    talk.notifies(number, Code.CONTENT, b"state 2")
    assert talk.said() == ["CON 2.05 #2 token=07 observe=3 'state 2'"]
    talk.acknowledges(2)
    assert talk.machine.next_timer() is None
    assert talk.counters.observations == 1


def test_a_handler_that_does_not_accept_answers_plainly() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, b"\7", path="obs", observe=0)
    talk.asked()
    talk.answers(Code.CONTENT, b"state")
    assert talk.said() == ["ACK 2.05 1 token=07 'state'"]
    assert talk.counters.observations == 0


def test_an_accepted_observation_that_is_then_refused_is_ended() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, b"\7", path="obs", observe=0)
    talk.asked()
    assert talk.offered is not None
    talk.machine.accept(talk.offered)
    talk.answers(Code.NOT_FOUND)
    assert talk.said() == ["ACK 4.04 1 token=07"]
    assert talk.event() == ObservationEnded(talk.offered, EndCause.REFUSED)


def test_only_get_and_fetch_observe() -> None:
    talk = Dialogue()
    for message_id, method in enumerate((Code.POST, Code.PUT, Code.DELETE)):
        talk.sends(CON, method, message_id, b"\7", path="obs", observe=0)
        talk.asked()
        assert talk.offered is None
    talk.sends(CON, Code.FETCH, 9, b"\7", path="obs", observe=0)
    talk.asked()
    assert talk.offered is not None


def test_a_newer_state_takes_the_place_of_one_that_does_not_arrive() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7")
    talk.said()
    talk.notifies(number, Code.CONTENT, b"1")
    talk.notifies(number, Code.CONTENT, b"2")
    talk.notifies(number, Code.CONTENT, b"3")
    assert talk.said() == ["CON 2.05 #1 token=07 observe=2 '1'"]
    talk.passes(3)
    assert talk.said() == ["CON 2.05 #2 token=07 observe=3 '3'"]  # RFC 7641 §4.5.2
    talk.acknowledges(1)  # too late: the state on its way is another one
    talk.passes(6)
    assert talk.said() == ["CON 2.05 #2 token=07 observe=3 '3'"]
    talk.acknowledges(2)
    talk.passes(100)
    assert talk.said() == []


def test_the_newest_state_follows_the_acknowledgement() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7")
    talk.said()
    for state in (b"1", b"2", b"3"):
        talk.notifies(number, Code.CONTENT, state)
    assert talk.said() == ["CON 2.05 #1 token=07 observe=2 '1'"]
    talk.acknowledges(1)
    assert talk.said() == ["CON 2.05 #2 token=07 observe=3 '3'"]


def test_silence_ends_an_observation_and_only_that_one() -> None:
    talk = Dialogue()
    first, second = talk.observes(1, b"\1"), talk.observes(2, b"\2")
    talk.said()
    talk.notifies(first, Code.CONTENT, b"a")
    began = talk.now
    for _ in range(12):  # newer states do not begin the count anew, RFC 7641 §4.5.2
        talk.passes(9)
        talk.notifies(first, Code.CONTENT, b"b")
    assert talk.event() == ObservationEnded(first, EndCause.SILENCE)
    assert talk.now - began > 93
    talk.said()
    talk.notifies(second, Code.CONTENT, b"c")
    assert len(talk.said()) == 1
    assert (talk.counters.observations, talk.counters.cancelled_by_silence) == (1, 1)


@pytest.mark.parametrize("kind", [CON, NON])
def test_a_reset_ends_an_observation(kind: object) -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7", kind=kind)  # type: ignore[arg-type]
    talk.said()
    talk.notifies(number, Code.CONTENT, b"1")
    assert len(talk.said()) == 1
    talk.passes(1)
    talk.resets(1 if kind is CON else 2)
    assert talk.event() == ObservationEnded(number, EndCause.RESET)
    talk.notifies(number, Code.CONTENT, b"2")
    talk.passes(100)
    assert talk.said() == []


def test_a_reset_of_the_first_answer_ends_it_too() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7", kind=NON)
    talk.said()
    talk.resets(1)
    assert talk.event() == ObservationEnded(number, EndCause.RESET)
    talk.sends(CON, Code.GET, 2, b"\7", path="obs", observe=0)
    talk.asked()
    talk.passes(1)
    assert talk.offered is not None
    talk.machine.accept(talk.offered)
    talk.answers(Code.CONTENT, b"late")
    assert talk.said() == ["ACK empty 2", "CON 2.05 #2 token=07 observe=2 'late'"]
    talk.resets(2)
    assert talk.event() == ObservationEnded(talk.offered, EndCause.RESET)


def test_a_late_reset_still_finds_its_observation() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7", kind=NON)
    talk.said()
    for state in range(5):
        talk.notifies(number, Code.CONTENT, b"%d" % state)
        talk.passes(10)
    assert [line.split()[:3] for line in talk.said()] == [["NON", "2.05", f"#{n}"] for n in range(2, 7)]
    talk.resets(3)
    assert talk.event() == ObservationEnded(number, EndCause.RESET)


def test_observe_1_deregisters_and_is_answered_plainly() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7")
    talk.said()
    talk.sends(CON, Code.GET, 2, b"\7", path="obs", observe=1)
    assert talk.events.pop(0) == ObservationEnded(number, EndCause.DEREGISTERED)
    talk.asked()
    assert talk.offered is None
    talk.answers(Code.CONTENT, b"state")
    assert talk.said() == ["ACK 2.05 2 token=07 'state'"]


def test_the_same_token_again_replaces_the_observation() -> None:
    talk = Dialogue()
    old = talk.observes(1, b"\7")
    talk.notifies(old, Code.CONTENT, b"1")
    talk.said()
    talk.sends(CON, Code.GET, 2, b"\7", path="obs", observe=0)
    assert talk.events.pop(0) == ObservationEnded(old, EndCause.REPLACED)
    talk.asked()
    assert talk.offered not in (None, old)
    talk.machine.accept(talk.offered)  # type: ignore[arg-type]
    talk.answers(Code.CONTENT, b"2")
    assert talk.said() == ["ACK 2.05 2 token=07 observe=3 '2'"]  # and its numbers go on
    talk.passes(100)
    assert talk.said() == []  # the old notification is not repeated
    assert talk.counters.observations == 1


def test_an_error_ends_an_observation_and_is_delivered() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7", kind=NON)
    talk.said()
    talk.notifies(number, Code.NOT_FOUND)
    assert talk.said() == ["CON 4.04 #2 token=07"]  # without Observe, RFC 7641 §4.2
    talk.notifies(number, Code.CONTENT, b"after the end")
    talk.passes(3)
    assert talk.said() == ["CON 4.04 #2 token=07"]
    talk.acknowledges(2)
    talk.passes(100)
    assert (talk.said(), talk.events, talk.counters.observations) == ([], [], 0)


def test_an_error_while_a_state_is_on_its_way_is_delivered_too() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7")
    talk.said()
    talk.notifies(number, Code.CONTENT, b"1")
    talk.notifies(number, Code.SERVICE_UNAVAILABLE)
    talk.passes(3)
    assert talk.said() == ["CON 2.05 #1 token=07 observe=2 '1'", "CON 5.03 #2 token=07"]
    talk.passes(6)
    assert talk.said() == ["CON 5.03 #2 token=07"]
    talk.acknowledges(2)
    assert talk.counters.observations == 0
    assert talk.machine.next_timer() is None


def test_those_who_asked_by_non_are_told_by_non_and_at_times_by_con() -> None:
    talk = Dialogue(CoapLimits(confirm_every=4))
    number = talk.observes(1, b"\7", kind=NON)
    assert talk.said() == ["NON 2.05 #1 token=07 observe=1 'state 0'"]
    kinds = []
    for state in range(8):
        talk.notifies(number, Code.CONTENT, b"%d" % state)
        line = talk.said()[0].split()
        kinds.append(line[0])
        if line[0] == "CON":
            talk.acknowledges(int(line[2][1:]))
        talk.passes(10)
    assert kinds == ["NON", "NON", "NON", "CON"] * 2
    talk.passes(3_600)
    talk.notifies(number, Code.CONTENT, b"after an hour")
    assert talk.said()[0].startswith("CON")


def test_nons_keep_a_distance() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7", kind=NON)
    talk.said()
    for state in (b"1", b"2", b"3"):
        talk.notifies(number, Code.CONTENT, state)
        talk.passes(0.5)
    assert talk.said() == ["NON 2.05 #2 token=07 observe=2 '1'"]
    talk.passes(3)
    assert talk.said() == ["NON 2.05 #3 token=07 observe=3 '3'"]  # RFC 7641 §4.5.1


def test_a_receipt_comes_with_the_acknowledgement_of_its_own_state() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7", kind=NON)
    talk.said()
    talk.notifies(number, Code.CONTENT, b"1", receipt="one")
    assert talk.said() == ["CON 2.05 #2 token=07 observe=2 '1'"]
    talk.acknowledges(2)
    assert talk.event() == NotificationArrived(number, "one")
    talk.notifies(number, Code.CONTENT, b"2", receipt="two")
    talk.notifies(number, Code.CONTENT, b"3", receipt="three")
    talk.passes(3)
    assert [line.split()[2] for line in talk.said()] == ["#3", "#4"]
    talk.acknowledges(3)
    assert not talk.events  # the state of #3 has been replaced by that of #4
    talk.acknowledges(4)
    assert talk.event() == NotificationArrived(number, "three")


def test_a_state_that_is_given_before_the_answer_follows_it() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, b"\7", path="obs", observe=0)
    talk.asked()
    assert talk.offered is not None
    talk.machine.accept(talk.offered)
    talk.notifies(talk.offered, Code.CONTENT, b"newer")
    assert talk.said() == []
    talk.answers(Code.CONTENT, b"older")
    assert talk.said() == ["ACK 2.05 1 token=07 observe=1 'older'", "CON 2.05 #1 token=07 observe=2 'newer'"]


def test_a_separate_answer_to_the_registration_is_repeated_and_a_state_waits_behind_it() -> None:
    """Nothing takes its place: to who lists commands one by one it is the first of them."""
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, b"\7", path="obs", observe=0)
    talk.asked()
    assert talk.offered is not None
    talk.machine.accept(talk.offered)
    talk.passes(1)
    assert talk.said() == ["ACK empty 1"]
    talk.answers(Code.CONTENT, b"first")
    assert talk.said() == ["CON 2.05 #1 token=07 observe=1 'first'"]
    talk.notifies(talk.offered, Code.CONTENT, b"second", receipt="second")
    talk.passes(3)
    assert talk.said() == ["CON 2.05 #1 token=07 observe=1 'first'"]
    talk.acknowledges(1)
    assert talk.said() == ["CON 2.05 #2 token=07 observe=2 'second'"]
    talk.acknowledges(2)
    assert talk.event() == NotificationArrived(talk.offered, "second")


@pytest.mark.parametrize("kind", [CON, NON])
def test_an_answer_that_is_to_be_separate_is_repeated_before_any_notification(kind: Type) -> None:
    talk = Dialogue()
    talk.sends(kind, Code.GET, 1, b"\7", path="obs", observe=0)
    talk.asked()
    assert talk.offered is not None
    talk.machine.accept(talk.offered)
    talk.notifies(talk.offered, Code.CONTENT, b"second", receipt="second")
    talk.answers(Code.CONTENT, b"first", separate=True)
    answer = "CON 2.05 #1 token=07 observe=1 'first'"
    assert talk.said() == (["ACK empty 1"] if kind is CON else []) + [answer]
    talk.sends(kind, Code.GET, 1, b"\7", path="obs", observe=0)
    assert talk.said() == (["ACK empty 1"] if kind is CON else [])
    talk.passes(3)
    assert talk.said() == [answer]
    talk.acknowledges(1)
    assert talk.said() == ["CON 2.05 #2 token=07 observe=2 'second'"]


def test_too_many_observations_are_answered_plainly() -> None:
    talk = Dialogue(CoapLimits(observations_per_peer=2))
    talk.observes(1, b"\1")
    talk.observes(2, b"\2")
    talk.sends(CON, Code.GET, 3, b"\3", path="obs", observe=0)
    talk.asked()
    assert talk.offered is None
    talk.answers(Code.CONTENT, b"state")
    assert talk.said()[-1] == "ACK 2.05 3 token=03 'state'"
    assert talk.counters.observations_refused == 1


def test_the_end_of_the_peer_ends_its_observations() -> None:
    talk = Dialogue()
    first, second = talk.observes(1, b"\1"), talk.observes(2, b"\2")
    talk.notifies(first, Code.CONTENT, b"on its way")
    talk.said()
    talk.machine.close()
    assert [talk.machine.next_event(), talk.machine.next_event()] == [
        ObservationEnded(first, EndCause.PEER_GONE),
        ObservationEnded(second, EndCause.PEER_GONE),
    ]
    assert talk.machine.next_timer() is None
    assert talk.counters.observations == 0


def test_the_handler_ends_an_observation_without_a_word() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\1")
    talk.notifies(number, Code.CONTENT, b"1")
    talk.said()
    talk.machine.end(number, talk.now)
    talk.passes(100)
    assert (talk.said(), talk.events) == ([], [])


def test_a_large_state_comes_as_its_first_block() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7")
    talk.said()
    talk.notifies(number, Code.CONTENT, bytes(1_500), etag=b"v1")
    assert talk.said() == ["CON 2.05 #1 token=07 observe=2 size2=1500 block2=0/1/1024 1024 bytes"]
    talk.sends(CON, Code.GET, 2, b"\x08", path="obs", block2=(1, False, 6))  # RFC 7959 §2.6, another token
    assert talk.said() == ["ACK 2.05 2 token=08 block2=1/0/1024 476 bytes"]
    assert not talk.events


def test_a_newer_state_waits_while_the_one_before_is_fetched() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"t")
    talk.said()
    talk.notifies(number, Code.CONTENT, b"a" * 2500)
    assert len(talk.said()) == 1
    talk.acknowledges(1)
    talk.notifies(number, Code.CONTENT, b"b" * 2500)
    talk.notifies(number, Code.CONTENT, b"c" * 2500)
    assert talk.said() == []
    for block, size in ((1, 1024), (2, 452)):
        talk.sends(CON, Code.GET, 1 + block, path="obs", block2=(block, False, 6))
        answer, *news = talk.heard()
        assert (answer.payload, len(news)) == (b"a" * size, block - 1)
    assert (news[0].mtype, news[0].payload) == (CON, b"c" * 1024), "with the last block the newest one follows"


def test_a_newer_state_does_not_wait_for_who_fetches_no_more() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"t")
    talk.said()
    talk.notifies(number, Code.CONTENT, b"a" * 2500)
    assert len(talk.said()) == 1
    talk.acknowledges(1)
    talk.passes(10)
    talk.sends(CON, Code.GET, 2, path="obs", block2=(1, False, 6))
    talk.heard()
    talk.notifies(number, Code.CONTENT, b"b")
    talk.passes(14)
    assert talk.heard() == [], "each block begins the wait anew"
    talk.passes(1.1)
    [news] = talk.heard()
    assert news.payload == b"b"
    assert talk.machine.next_timer() is not None, "its acknowledgement"


def test_bodies_that_are_waited_for_are_bounded() -> None:
    talk = Dialogue()
    for message_id in range(100):
        talk.sends(CON, Code.GET, message_id, path="large", uri_query=(str(message_id),))
        talk.asked()
        talk.answers(Code.CONTENT, bytes(2000))
    assert len(talk.machine._slices._fetches) == talk.limits.fetches_per_peer


def test_the_sequence_wraps_at_24_bits() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"\7")
    talk.machine._sequence = (1 << 24) - 2
    talk.said()
    talk.notifies(number, Code.CONTENT, b"1")
    assert talk.said() == ["CON 2.05 #1 token=07 observe=16777215 '1'"]
    talk.acknowledges(1)
    talk.notifies(number, Code.CONTENT, b"2")
    assert talk.said() == ["CON 2.05 #2 token=07 observe=0 '2'"]
