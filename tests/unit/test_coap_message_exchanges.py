"""Exchanges of one CoAP peer as transcripts, in virtual time (RFC 7252 §4, §5; RFC 7967)."""

from __future__ import annotations

import pytest
from aiocoap.numbers.codes import Code

from adapters.coap.codec import encode
from adapters.coap.limits import CoapCounters, CoapLimits
from adapters.coap.memory import Memory
from adapters.coap.messages import LocalProtocolError, Message
from adapters.coap.ports import Request
from tests.coap_peers import ACK, CON, NON, RST, Dialogue, message


def test_a_prompt_answer_rides_on_the_acknowledgement() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.POST, 7, b"\1", path="telemetry", payload=b"{}", content_format=50, accept=60)
    assert talk.asked() == Request(Code.POST, ("telemetry",), (), b"{}", 50, 60)
    talk.passes(0.9)
    assert talk.said() == []
    talk.answers(Code.CHANGED)
    assert talk.said() == ["ACK 2.04 7 token=01"]
    assert talk.machine.next_timer() is None


def test_conditional_requests_and_queries_reach_the_handler() -> None:
    talk = Dialogue()
    talk.sends(
        CON, Code.PUT, 7, path="a/b", uri_query=("x=1", "y"), if_match=(b"1",), if_none_match=True, etags=(b"e",)
    )
    assert talk.asked() == Request(Code.PUT, ("a", "b"), ("x=1", "y"), b"", None, None, (b"1",), True, (b"e",))


def test_each_request_is_read_by_its_own_options_however_alike_they_are() -> None:
    talk = Dialogue()
    asked = [("a", 50, b"1"), ("a", 50, b"2"), ("a", 60, b"2"), ("a", 50, b""), ("ab", 50, b"3"), ("a", 50, b"4")]
    asked += [("a" * 80, 50, b"5"), ("a" * 80, 50, b"6"), ("a", 50, b"7")]
    for number, (path, content_format, payload) in enumerate(asked):
        talk.sends(CON, Code.POST, number, bytes((number,)), path=path, payload=payload, content_format=content_format)
        assert talk.asked() == Request(Code.POST, (path,), (), payload, content_format)
        talk.answers(Code.CHANGED)
        assert talk.said() == [f"ACK 2.04 {number} token={number:02x}"]


def test_what_was_asked_twice_is_refused_twice() -> None:
    talk = Dialogue()
    for number in range(3):
        datagram = encode(Message(CON, Code.POST, number, b"", ((11, b"a"), (2_049, b"?")), b"{}"))
        talk.sends_bytes(datagram)
        assert talk.said() == [f"ACK 4.02 {number} 'option 2049'"]


def test_a_slow_answer_is_acknowledged_first_and_sent_by_itself() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 7, b"\1", path="separate")
    talk.asked()
    talk.passes(1.0)
    assert talk.said() == ["ACK empty 7"]
    talk.sends(CON, Code.GET, 7, b"\1", path="separate")
    assert talk.said() == ["ACK empty 7"]  # again, for it was lost
    talk.passes(10)
    talk.answers(Code.CONTENT, b"at last")
    assert talk.said() == ["CON 2.05 #1 token=01 'at last'"]
    talk.passes(3)
    assert talk.said() == ["CON 2.05 #1 token=01 'at last'"]
    talk.acknowledges(1)
    talk.passes(300)
    assert talk.said() == []
    assert talk.counters.retransmissions == 1


def test_a_separate_answer_that_nobody_acknowledges_is_given_up() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 7, b"\1", path="separate")
    talk.asked()
    talk.passes(2)
    talk.answers(Code.CONTENT, b"!")
    sent_at = []
    began = talk.now
    talk.datagrams.clear()
    while (due := talk.machine.next_timer()) is not None:
        talk.passes(due - talk.now)
        sent_at += [talk.now - began] * len(talk.said())
    # RFC 7252 §4.2: the first timeout is 2 to 3 s, and each further one twice the one before
    first = sent_at[0]
    assert 2 <= first <= 3
    assert sent_at == pytest.approx([first, first * 3, first * 7, first * 15])
    assert talk.now - began == pytest.approx(first * 31)
    assert talk.now - began <= 93  # MAX_TRANSMIT_WAIT
    assert talk.counters.given_up == 1


def test_a_reset_ends_a_separate_answer_and_the_next_one_follows() -> None:
    talk = Dialogue()
    for message_id in (7, 8):
        talk.sends(CON, Code.GET, message_id, bytes((message_id,)), path="separate")
    first, second = (event.exchange for event in talk.events)  # type: ignore[union-attr]
    talk.passes(2)
    assert talk.said() == ["ACK empty 7", "ACK empty 8"]
    talk.answers(Code.CONTENT, b"one", exchange=first)
    talk.answers(Code.CONTENT, b"two", exchange=second)
    assert talk.said() == ["CON 2.05 #1 token=07 'one'"]  # NSTART is 1, RFC 7252 §4.7
    talk.resets(1)
    assert talk.said() == ["CON 2.05 #2 token=08 'two'"]
    talk.acknowledges(2)
    assert talk.machine.next_timer() is None


def test_a_repeated_request_gets_the_same_answer_and_is_asked_once() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.POST, 7, b"\1", path="telemetry")
    talk.asked()
    talk.sends(CON, Code.POST, 7, b"\1", path="telemetry")
    assert talk.said() == []  # it is being worked on
    talk.answers(Code.CHANGED, b"once")
    for _ in range(3):
        talk.sends(CON, Code.POST, 7, b"\1", path="telemetry")
    assert talk.said() == ["ACK 2.04 7 token=01 'once'"] * 4
    assert not talk.events
    assert talk.counters.duplicates == 4


def test_an_answer_is_kept_for_the_lifetime_of_the_exchange() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.POST, 7, path="telemetry")
    talk.asked()
    talk.answers(Code.CHANGED)
    talk.passes(246)
    talk.sends(CON, Code.POST, 7, path="telemetry")
    assert not talk.events
    talk.passes(2)
    talk.sends(CON, Code.POST, 7, path="telemetry")
    talk.asked()  # EXCHANGE_LIFETIME is over: the message id is a new one's
    assert len(talk.memory.duplicates) == 1


def test_a_non_is_answered_by_a_non_once() -> None:
    talk = Dialogue()
    for _ in range(3):
        talk.sends(NON, Code.GET, 7, b"\1\2", path="test")
    talk.asked()
    talk.passes(5)
    assert talk.said() == []  # no acknowledgement
    talk.answers(Code.CONTENT, b"hello", content_format=0, max_age=30)
    talk.sends(NON, Code.GET, 7, b"\1\2", path="test")
    assert talk.said() == ["NON 2.05 #1 token=0102 content_format=0 max_age=30 'hello'"]
    talk.passes(300)
    assert talk.said() == []
    talk.sends(NON, Code.GET, 7, b"\1\2", path="test")
    talk.asked()  # NON_LIFETIME is over


@pytest.mark.parametrize(
    ("datagram", "answer"),
    [
        (message(CON, Code.EMPTY, 9), ["RST empty 9"]),  # a ping, §4.3
        (message(NON, Code.EMPTY, 9), []),
        (message(ACK, Code.EMPTY, 9), []),
        (message(RST, Code.EMPTY, 9), []),
        (message(CON, Code.CONTENT, 9, b"t", payload=b"unasked"), ["RST empty 9"]),
        (message(NON, Code.CONTENT, 9, b"t", payload=b"unasked"), ["RST empty 9"]),
        (message(ACK, Code.CONTENT, 9, b"t", payload=b"unasked"), []),
        (message(ACK, Code.GET, 9), []),
        (encode(Message(CON, Code(32), 9)), ["RST empty 9"]),  # class 1 is reserved, §4.2
        (encode(Message(CON, Code(224), 9)), ["RST empty 9"]),
        (message(RST, Code.EMPTY, 9)[:1] + b"\1\0\x09", []),
        (b"\x49\x01\x00\x09" + bytes(9), ["RST empty 9"]),  # garbage after a header, as CON …
        (b"\x59\x01\x00\x09" + bytes(9), []),  # … and as NON
        (b"\x40\x01\x00\x09\xff", ["RST empty 9"]),
        (b"\x40\x01\x00", []),
        (b"\x80\x01\x00\x09", []),
        (b"", []),
    ],
)
def test_what_is_rejected_and_what_is_ignored(datagram: bytes, answer: list[str]) -> None:
    talk = Dialogue()
    talk.sends_bytes(datagram)
    assert talk.said() == answer
    assert not talk.events
    assert talk.machine.next_timer() is None


def test_unknown_critical_options_are_refused() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, b"\1", path="test", oscore=b"")
    talk.sends(NON, Code.GET, 2, b"\1", path="test", oscore=b"")
    talk.sends(CON, Code.GET, 3, b"\1", proxy_uri="coap://example.org/")
    talk.sends(NON, Code.GET, 4, b"\1", proxy_scheme="coap", uri_host="example.org")
    talk.sends(CON, Code.GET, 5, b"\1", path="test", block2=(0, False, 7))
    assert talk.said() == [
        "ACK 4.02 1 token=01 'option 9'",
        "RST empty 2",  # RFC 7252 §5.4.1: a NON is rejected
        "ACK 5.05 3 token=01 'this is no proxy'",
        "NON 5.05 #1 token=01 'this is no proxy'",
        "ACK 4.00 5 token=01 45 bytes",
    ]
    assert not talk.events


def test_no_response_holds_back_what_the_client_does_not_want() -> None:
    talk = Dialogue()
    talk.sends(NON, Code.POST, 1, path="telemetry", no_response=2)
    talk.asked()
    talk.answers(Code.CHANGED)
    assert talk.said() == []
    talk.sends(NON, Code.POST, 2, path="telemetry", no_response=2)
    talk.asked()
    talk.answers(Code.BAD_REQUEST)
    assert talk.said() == ["NON 4.00 #1"]
    talk.sends(CON, Code.POST, 3, path="telemetry", no_response=26)
    talk.asked()
    talk.answers(Code.SERVICE_UNAVAILABLE)
    assert talk.said() == ["ACK empty 3"]  # RFC 7967 §2: a CON is acknowledged all the same
    talk.sends(CON, Code.POST, 3, path="telemetry", no_response=26)
    assert talk.said() == ["ACK empty 3"]
    talk.sends(CON, Code.POST, 4, path="telemetry", no_response=0)
    talk.asked()
    talk.answers(Code.CHANGED)
    assert talk.said() == ["ACK 2.04 4"]


def test_a_peer_with_too_many_requests_is_told_to_wait() -> None:
    talk = Dialogue(CoapLimits(requests_per_peer=2))
    for message_id in (1, 2, 3):
        talk.sends(CON, Code.GET, message_id, path="slow")
    assert talk.said() == ["ACK 5.03 3 max_age=5"]
    assert len(talk.events) == 2
    talk.passes(2)
    talk.answers(Code.CONTENT, exchange=1)
    talk.answers(Code.CONTENT, exchange=2)
    assert talk.said() == ["ACK empty 1", "ACK empty 2", "CON 2.05 #1"]
    talk.events.clear()
    talk.sends(CON, Code.GET, 4, path="slow")
    talk.sends(CON, Code.GET, 5, path="slow")  # one answer still waits for its turn, and counts
    assert talk.said() == ["ACK 5.03 5 max_age=5"]
    assert len(talk.events) == 1
    assert talk.counters.busy == 2


def test_answering_twice_is_our_bug_and_after_the_end_nothing() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, path="test")
    talk.asked()
    talk.answers(Code.CONTENT)
    with pytest.raises(LocalProtocolError, match="not open"):
        talk.answers(Code.CONTENT)
    talk.machine.close()
    talk.answers(Code.CONTENT)
    talk.sends(CON, Code.GET, 2, path="test")
    assert not talk.events
    assert len(talk.memory.duplicates) == 0


def test_a_response_that_cannot_be_written_leaves_the_request_open() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, path="test")
    talk.asked()
    with pytest.raises((LocalProtocolError, OverflowError)):
        talk.answers(Code.CONTENT, content_format=-1)
    talk.answers(Code.INTERNAL_SERVER_ERROR)
    assert talk.said() == ["ACK 5.00 1"]


# Memory ---------------------------------------------------------------------------------------------------------------


def test_the_oldest_message_ids_of_a_peer_go_first() -> None:
    talk = Dialogue(CoapLimits(duplicates_per_peer=3))
    for message_id in (1, 2, 3, 4):
        talk.sends(CON, Code.GET, message_id, path="test")
        talk.asked()
        talk.answers(Code.CONTENT)
    for message_id in (2, 3, 4):
        talk.sends(CON, Code.GET, message_id, path="test")
    assert not talk.events
    talk.sends(CON, Code.GET, 1, path="test")
    talk.asked()
    assert talk.counters.duplicates_forgotten == 2


def test_large_answers_are_forgotten_by_their_bytes() -> None:
    talk = Dialogue(CoapLimits(duplicate_bytes_per_peer=4_000))
    for message_id in range(10):
        talk.sends(CON, Code.GET, message_id, path="test")
        talk.asked()
        talk.answers(Code.CONTENT, bytes(1_000))
    assert talk.memory.duplicates.size <= 4_000
    talk.sends(CON, Code.GET, 9, path="test")
    assert not talk.events


def test_the_memory_of_all_is_bounded_and_given_back() -> None:
    limits = CoapLimits(duplicate_bytes=20_000)
    memory = Memory(limits, CoapCounters())
    crowd = [Dialogue(limits, memory) for _ in range(20)]
    for message_id in range(10):
        for talk in crowd:
            kind = CON if message_id % 2 else NON
            talk.sends(kind, Code.POST, message_id, path="test")
            talk.asked()
            talk.answers(Code.CHANGED)
            assert memory.duplicates.size <= 20_000
    assert len(memory.duplicates) > 40
    for talk in crowd[:19]:
        talk.machine.close()
    crowd[19].sends(CON, Code.POST, 9, path="test")
    assert not crowd[19].events  # its own newest one is still there
    crowd[19].machine.close()
    assert (memory.duplicates.size, len(memory.duplicates)) == (0, 0)
    assert memory.next_expiry() is None


def test_silent_peers_are_forgotten_in_time() -> None:
    talk = Dialogue()
    for message_id in range(100):
        talk.sends(CON if message_id % 3 else NON, Code.POST, message_id, path="test")
        talk.asked()
        talk.answers(Code.CHANGED)
        talk.passes(0.1)
    due = talk.memory.next_expiry()
    assert due is not None
    talk.memory.expire(due)
    assert len(talk.memory.duplicates) == 99
    talk.passes(248)
    assert len(talk.memory.duplicates) == 0


def test_a_silent_peer_disturbs_nobody_else() -> None:
    limits = CoapLimits()
    memory = Memory(limits, CoapCounters())
    silent, other = Dialogue(limits, memory), Dialogue(limits, memory)
    watched = other.observes(1, b"o")
    for talk in (silent, other):
        talk.sends(CON, Code.GET, 7, b"\1", path="separate")
        talk.asked()
        talk.passes(2)
        talk.answers(Code.CONTENT, b"late")
        talk.datagrams.clear()
    other.sends(ACK, Code.EMPTY, other.machine._active.message_id)  # type: ignore[union-attr]
    silent.passes(100)
    assert memory.counters.given_up == 1
    other.passes(100)
    other.notifies(watched, Code.CONTENT, b"new")
    assert other.said() == ["CON 2.05 #1 token=6f observe=2 'new'"]
