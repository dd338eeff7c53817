"""A path that loses every large datagram: what was sent twice in vain is cut smaller, and so is all that follows."""

from __future__ import annotations

import pytest
from aiocoap import Message
from aiocoap.numbers.codes import Code

from adapters.coap.limits import CoapLimits
from tests.coap_peers import ACK, CON, Dialogue

NARROW = CoapLimits().narrow_room
LARGE = bytes(range(256)) * 12  # three blocks of 1024, twelve of 256
MIDDLE = LARGE[:1000]  # one datagram, and not a small one


def sizes(talk: Dialogue) -> list[int]:
    """Of the datagrams said since the last time."""
    said, talk.datagrams = talk.datagrams, []
    return [len(each) for each in said]


def small(talk: Dialogue) -> Message:
    """The one datagram said since the last time, which fits."""
    assert len(talk.datagrams[0]) <= NARROW
    [message] = talk.heard()
    return message


@pytest.mark.parametrize("body", [LARGE, MIDDLE])
def test_a_get_that_comes_a_third_time_is_answered_in_small_blocks(body: bytes) -> None:
    talk = Dialogue()
    for time in range(2):
        talk.sends(CON, Code.GET, 1, b"t", path="config")
        if time == 0:
            talk.asked()
            talk.answers(Code.CONTENT, body)
        assert sizes(talk)[0] > 1000, "lost once is chance: the same bytes again"
    assert not talk.events
    talk.sends(CON, Code.GET, 1, b"t", path="config")
    talk.asked()
    talk.answers(Code.CONTENT, body)
    answer = small(talk)
    assert (answer.mtype, answer.mid, answer.token, answer.opt.block2) == (ACK, 1, b"t", (0, True, 4))
    whole, number = answer.payload, 0
    while answer.opt.block2.more:
        number += 1
        talk.sends(CON, Code.GET, 1 + number, b"t", path="config", block2=(number, False, 4))
        answer = small(talk)
        whole += answer.payload
    assert whole == body
    assert talk.counters.narrowed == 1


def test_a_later_block_that_does_not_arrive_is_cut_smaller_and_the_next_answers_are_small_at_once() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, path="config")
    talk.asked()
    talk.answers(Code.CONTENT, LARGE)
    for _ in range(3):
        talk.sends(CON, Code.GET, 2, path="config", block2=(1, False, 6))
    *twice, third = talk.heard()[1:]
    assert [each.opt.block2 for each in twice] == [(1, True, 6)] * 2
    assert (third.opt.block2, third.payload) == ((4, True, 4), LARGE[1024:1280])
    talk.sends(CON, Code.GET, 3, path="other")
    talk.asked()
    talk.answers(Code.CONTENT, LARGE)
    assert sizes(talk)[0] <= NARROW


def test_an_answer_to_post_is_cut_from_what_is_kept_and_the_handler_is_not_asked_again() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.POST, 1, path="sren", block1=(0, True, 6), payload=bytes(1024))
    talk.sends(CON, Code.POST, 2, path="sren", block1=(1, False, 6), payload=b"end")
    talk.asked()
    talk.answers(Code.CHANGED, LARGE, content_format=281)
    for _ in range(2):
        talk.sends(CON, Code.POST, 2, path="sren", block1=(1, False, 6), payload=b"end")
    third = talk.heard()[-1]
    assert (third.code, third.opt.block1, third.opt.block2) == (Code.CHANGED, (1, False, 6), (0, True, 4))
    assert (third.opt.content_format, third.payload) == (281, LARGE[:256])
    assert not talk.events
    for _ in range(3):  # what was answered in one piece is not kept: the same bytes, whatever their size
        talk.sends(CON, Code.POST, 9, path="provision", payload=b"{}")
        if talk.events:
            talk.asked()
            talk.answers(Code.CREATED, b"short")
    assert not talk.events


def test_a_small_answer_is_never_asked_for_again() -> None:
    talk = Dialogue()
    for _ in range(6):
        talk.sends(CON, Code.GET, 1, path="time")
        if talk.events:
            talk.asked()
            talk.answers(Code.CONTENT, bytes(400))
    assert len(set(talk.said())) == 1
    assert talk.counters.narrowed == 0


def test_a_notification_that_does_not_arrive_is_cut_smaller_and_its_receipt_stands() -> None:
    talk = Dialogue()
    number = talk.observes(1, b"t")
    talk.heard()
    talk.notifies(number, Code.CONTENT, LARGE, receipt="arrived")
    talk.passes(10)  # again after 2 to 3 s, and then after 4 to 6 s
    first, again, third = talk.heard()
    assert (first.mid, len(first.payload), len(again.payload)) == (again.mid, 1024, 1024)
    assert (third.mtype, third.token, third.opt.block2, third.payload) == (CON, b"t", (0, True, 4), LARGE[:256])
    assert third.opt.observe > first.opt.observe, "RFC 7641 §4.5.2"
    talk.sends(ACK, Code.EMPTY, third.mid)
    assert talk.event().receipt == "arrived"  # type: ignore[union-attr]
    talk.passes(100)
    assert talk.said() == []
    assert (talk.counters.observations, talk.counters.narrowed) == (1, 1)


def test_another_request_under_a_message_id_that_was_used_is_answered_as_a_repetition_whatever_is_in_it() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, b"t", path="config")
    talk.asked()
    talk.answers(Code.CONTENT, MIDDLE)
    talk.sends(CON, Code.GET, 1, b"t", path="config")
    sizes(talk)
    unknown_critical_option = bytes([0x41, Code.POST, 0, 1]) + b"t" + bytes([0x90])
    talk.sends_bytes(unknown_critical_option)
    [whole] = sizes(talk)
    assert whole > 1000, "the answer that was kept"
    assert not talk.events
