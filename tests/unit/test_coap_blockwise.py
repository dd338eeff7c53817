"""Bodies in blocks as transcripts, in virtual time (RFC 7959), and their bounds."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from aiocoap.numbers.codes import Code
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.coap.exchanges import RequestReceived
from adapters.coap.limits import CoapCounters, CoapLimits
from adapters.coap.memory import Memory
from tests.coap_peers import CON, NON, Dialogue

BODY = Random(3).randbytes(65_536)


def put(talk: Dialogue, number: int, more: bool, exponent: int, payload: bytes, **other: Any) -> None:
    """One block to /large-update under its own message id."""
    path = other.pop("path", "large-update")
    talk.sends(CON, Code.PUT, 1_000 + number, path=path, block1=(number, more, exponent), payload=payload, **other)


def upload(talk: Dialogue, body: bytes, exponent: int) -> None:
    size = 16 << exponent
    blocks = range(0, len(body), size)
    for number, start in enumerate(blocks):
        more = start + size < len(body)
        put(talk, number, more, exponent, body[start : start + size])
        if more:
            assert talk.said() == [f"ACK 2.31 {1_000 + number} block1={number}/1/{size}"]


# Uploads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0, 3, 6])
def test_an_upload_becomes_one_request(exponent: int) -> None:
    talk = Dialogue()
    body = BODY[: 100 * (16 << exponent) - 5] if exponent < 6 else BODY
    upload(talk, body, exponent)
    assert talk.asked().payload == body
    talk.answers(Code.CHANGED)
    last = (len(body) - 1) // (16 << exponent)
    assert talk.said() == [f"ACK 2.04 {1_000 + last} block1={last}/0/{16 << exponent}"]
    assert (len(talk.memory.uploads), talk.memory.uploads.size) == (0, 0)


def test_a_body_of_one_block_is_a_request_at_once() -> None:
    talk = Dialogue()
    put(talk, 0, False, 6, b"small")
    assert talk.asked().payload == b"small"
    talk.answers(Code.CHANGED)
    assert talk.said() == ["ACK 2.04 1000 block1=0/0/1024"]


def test_a_smaller_size_is_asked_for_with_the_first_block() -> None:
    talk = Dialogue(CoapLimits(block_exponent=2))
    put(talk, 0, True, 6, bytes(1024))
    assert talk.said() == ["ACK 2.31 1000 block1=0/1/64"]
    put(talk, 16, True, 2, bytes(64))  # it goes on behind what was taken, RFC 7959 §2.3
    assert talk.said() == ["ACK 2.31 1016 block1=16/1/64"]
    put(talk, 17, False, 2, b"end")
    assert len(talk.asked().payload) == 1024 + 64 + 3


def test_a_gap_is_incomplete_and_ends_the_upload() -> None:
    talk = Dialogue()
    put(talk, 0, True, 0, bytes(16))
    put(talk, 2, True, 0, bytes(16))
    put(talk, 1, True, 0, bytes(16))
    assert talk.said() == [
        "ACK 2.31 1000 block1=0/1/16",
        "ACK 4.08 1002 block1=2/1/16 'blocks are missing; begin anew'",
        "ACK 4.08 1001 block1=1/1/16 'blocks are missing; begin anew'",
    ]
    assert not talk.events
    assert talk.counters.incomplete == 2


def test_blocks_without_a_first_one_are_incomplete() -> None:
    talk = Dialogue()
    put(talk, 3, False, 6, b"the end of something")
    assert talk.said() == ["ACK 4.08 1003 block1=3/0/1024 'blocks are missing; begin anew'"]


def test_another_content_format_is_incomplete() -> None:
    talk = Dialogue()
    put(talk, 0, True, 0, bytes(16), content_format=50)
    put(talk, 1, False, 0, bytes(4), content_format=60)
    assert talk.said()[1] == "ACK 4.08 1001 block1=1/0/16 'blocks are missing; begin anew'"  # RFC 7959 §2.9.2


def test_a_new_first_block_begins_anew() -> None:
    talk = Dialogue()
    put(talk, 0, True, 0, b"a" * 16)
    talk.sends(CON, Code.PUT, 5, path="large-update", block1=(0, True, 0), payload=b"b" * 16)
    put(talk, 1, False, 0, b"c")
    assert talk.asked().payload == b"b" * 16 + b"c"


def test_the_last_block_again_under_a_new_message_id_is_taken_once() -> None:
    talk = Dialogue()
    put(talk, 0, True, 0, b"a" * 16)
    put(talk, 1, True, 0, b"b" * 16)
    talk.sends(CON, Code.PUT, 5, path="large-update", block1=(1, True, 0), payload=b"b" * 16)
    put(talk, 2, False, 0, b"c")
    assert talk.said()[2] == "ACK 2.31 5 block1=1/1/16"
    assert talk.asked().payload == b"a" * 16 + b"b" * 16 + b"c"


def test_uploads_to_different_places_or_with_different_tags_do_not_mix() -> None:
    talk = Dialogue()
    kinds: list[dict[str, Any]] = [
        {"path": "a"},
        {"path": "b"},
        {"path": "b", "uri_query": ("x",)},
        {"path": "b", "request_tag": (b"1",)},
    ]
    for number, kind in enumerate(kinds):
        talk.sends(CON, Code.PUT, number, block1=(0, True, 0), payload=b"%d" % number * 16, **kind)
    for number, kind in reversed(list(enumerate(kinds))):
        talk.sends(CON, Code.PUT, 10 + number, block1=(1, False, 0), payload=b"%d" % number, **kind)
        assert talk.asked().payload == b"%d" % number * 17


@pytest.mark.parametrize(
    ("number", "more", "payload", "size1"),
    [(0, True, bytes(1024), 65_537), (64, True, bytes(1024), None), (64, False, b"x", None)],
)
def test_too_much_is_refused_with_the_size_that_is_allowed(
    number: int, more: bool, payload: bytes, size1: int | None
) -> None:
    talk = Dialogue()
    if number:
        for done in range(number):
            put(talk, done, True, 6, BODY[done * 1024 : done * 1024 + 1024])
        talk.said()
    put(talk, number, more, 6, payload, size1=size1)
    told = "'up to 65536 bytes are taken'"
    assert talk.said() == [f"ACK 4.13 {1_000 + number} size1=65536 block1={number}/{int(more)}/1024 {told}"]
    assert (len(talk.memory.uploads), talk.memory.uploads.size, talk.counters.too_large) == (0, 0, 1)


@pytest.mark.parametrize(("more", "payload"), [(True, bytes(15)), (True, bytes(17)), (True, b""), (False, bytes(17))])
def test_a_block_of_another_size_than_it_says_is_refused(more: bool, payload: bytes) -> None:
    talk = Dialogue()
    put(talk, 0, True, 0, bytes(16))
    put(talk, 1, more, 0, payload)
    assert talk.said()[1].startswith("ACK 4.00 1001")
    assert len(talk.memory.uploads) == 0


def test_an_interrupted_upload_is_forgotten() -> None:
    talk = Dialogue()
    put(talk, 0, True, 6, bytes(1024))
    talk.passes(246)
    put(talk, 1, True, 6, bytes(1024))
    talk.passes(246)
    assert len(talk.memory.uploads) == 1  # each block gives it time again
    talk.passes(2)
    assert (len(talk.memory.uploads), talk.memory.uploads.size) == (0, 0)
    put(talk, 2, False, 6, bytes(1024))
    assert talk.said()[-1] == "ACK 4.08 1002 block1=2/0/1024 'blocks are missing; begin anew'"


def test_a_peer_with_many_uploads_loses_its_own_oldest() -> None:
    talk = Dialogue(CoapLimits(uploads_per_peer=2))
    for path in ("a", "b", "c"):
        put(talk, 0, True, 6, bytes(1024), path=path)
        talk.machine._table.entries.clear()
    assert len(talk.memory.uploads) == 2
    put(talk, 1, False, 6, b"x", path="a")
    assert talk.said()[-1] == "ACK 4.08 1001 block1=1/0/1024 'blocks are missing; begin anew'"


def test_the_bytes_of_one_peer_are_bounded() -> None:
    talk = Dialogue()
    for path in "abcd":
        for number in range(50):
            talk.sends(CON, Code.PUT, 50 * ord(path) + number, path=path, block1=(number, True, 6), payload=bytes(1024))
            assert talk.memory.uploads.size <= talk.limits.upload_bytes_per_peer


def test_where_all_memory_is_taken_a_newcomer_waits_and_the_others_go_on() -> None:
    limits = CoapLimits(upload_bytes=6_000)
    memory = Memory(limits, CoapCounters())
    first, other, second = (Dialogue(limits, memory) for _ in range(3))
    for number in range(2):
        put(first, number, True, 6, bytes(1024))
        put(other, number, True, 6, bytes(1024))
    put(second, 0, True, 6, bytes(1024))
    assert second.said() == ["ACK 5.03 1000 max_age=5"]
    for goes_on in (first, other):
        put(goes_on, 2, False, 6, b"end")
        assert len(goes_on.asked().payload) == 2 * 1024 + 3
    second.sends(CON, Code.PUT, 7, path="large-update", block1=(0, True, 6), payload=bytes(1024))
    assert second.said() == ["ACK 2.31 7 block1=0/1/1024"]
    second.machine.close()
    assert memory.uploads.size == 0


# Answers --------------------------------------------------------------------------------------------------------------


def fetch(talk: Dialogue, exponent: int | None, answer: bytes, **other: Any) -> bytes:
    """/large by GETs, the handler asked for the first block only; the body."""
    body = bytearray()
    number, asked = 0, False
    while True:
        block = (number, False, exponent) if exponent is not None else None
        talk.sends(CON, Code.GET, 3_000 + talk.counters.received, b"\1", path="large", block2=block)
        if not asked:
            asked = True
            talk.asked()
            talk.answers(Code.CONTENT, answer, **other)
        (reply,) = talk.heard()
        assert reply.code == Code.CONTENT
        body += reply.payload
        if reply.opt.block2 is None or not reply.opt.block2.more:
            return bytes(body)
        exponent = reply.opt.block2.size_exponent
        number = reply.opt.block2.block_number + 1


@pytest.mark.parametrize("exponent", [None, 0, 2, 6])
def test_a_large_answer_is_fetched_in_blocks(exponent: int | None) -> None:
    talk = Dialogue(CoapLimits(duplicates_per_peer=10_000))
    assert fetch(talk, exponent, BODY) == BODY
    assert not talk.events


def test_blocks_fit_into_the_room_that_there_is() -> None:
    talk = Dialogue(room=200)
    talk.sends(CON, Code.GET, 1, b"12345678", path="large")
    talk.asked()
    talk.answers(Code.CONTENT, BODY, content_format=42, max_age=60)
    assert len(talk.datagrams[0]) <= 200
    assert talk.said()[0].split()[-3:] == ["block2=0/1/128", "128", "bytes"]


def test_the_first_block_tells_the_size_and_each_the_same_tag() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, path="large")
    talk.asked()
    talk.answers(Code.CONTENT, BODY[:2_000])
    talk.sends(CON, Code.GET, 2, path="large", block2=(1, False, 6))
    first, second = talk.heard()
    assert (first.opt.size2, second.opt.size2) == (2_000, None)
    assert first.opt.etag == second.opt.etag
    assert len(first.opt.etag) == 6


def test_a_smaller_size_may_be_asked_for_later() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, path="large")
    talk.asked()
    talk.answers(Code.CONTENT, BODY[:2_000])
    talk.sends(CON, Code.GET, 2, path="large", block2=(16, False, 2))  # RFC 7959 §3.2, figure 8
    first, second = talk.heard()
    assert second.opt.block2 == (16, True, 2)
    assert first.payload + second.payload == BODY[: 1024 + 64]


def test_a_tag_that_we_gave_is_valid_later() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, path="large")
    talk.asked()
    talk.answers(Code.CONTENT, BODY[:2_000])
    tag = talk.heard()[0].opt.etag
    for body, code in ((BODY[:2_000], "2.03"), (BODY[:2_001], "2.05")):
        talk.sends(CON, Code.GET, 2 + len(body), path="large", etags=(tag,))
        talk.asked()
        talk.answers(Code.CONTENT, body)
        (reply,) = talk.heard()
        assert reply.code.dotted == code


def test_when_nothing_is_kept_the_handler_is_asked_again() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, path="large")
    talk.asked()
    talk.answers(Code.CONTENT, BODY[:2_000])
    talk.passes(248)
    assert talk.memory.snapshots.size == 0
    talk.sends(CON, Code.GET, 2, path="large", block2=(1, False, 6))
    talk.asked()
    talk.answers(Code.CONTENT, BODY[:2_000])
    first, second = talk.heard()
    assert (first.payload + second.payload, first.opt.etag) == (BODY[:2_000], second.opt.etag)


def test_a_block_beyond_the_end_is_refused() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, path="large", block2=(2, False, 6))
    talk.asked()
    talk.answers(Code.CONTENT, BODY[:2_000])
    assert talk.said() == ["ACK 4.00 1 'a block beyond the end'"]


def test_an_error_answers_any_block() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.GET, 1, path="large", block2=(2, False, 6))
    talk.asked()
    talk.answers(Code.NOT_FOUND, b"not here")
    assert talk.said() == ["ACK 4.04 1 'not here'"]


def test_the_rest_of_an_answer_to_post_is_not_made_anew() -> None:
    talk = Dialogue()
    talk.sends(CON, Code.POST, 1, path="large", block2=(1, False, 6))
    assert talk.said() == ["ACK 4.08 1 'this answer is kept no longer'"]
    assert not talk.events


def test_snapshots_are_bounded_for_one_peer_and_over_all() -> None:
    limits = CoapLimits(snapshot_bytes=20_000, snapshot_bytes_per_peer=8_000)
    memory = Memory(limits, CoapCounters())
    crowd = [Dialogue(limits, memory) for _ in range(8)]
    for path in ("a", "b", "c", "d"):
        for talk in crowd:
            talk.sends(CON, Code.GET, ord(path), path=path)
            talk.asked()
            talk.answers(Code.CONTENT, BODY[:3_000])
            assert memory.snapshots.size <= 20_000
    assert len(memory.snapshots) == 5
    assert memory.counters.snapshots_forgotten == 32 - 5
    crowd[0].sends(CON, Code.GET, 999, path="d", block2=(1, False, 6))
    crowd[0].asked()  # forgotten: the handler is asked
    for talk in crowd:
        talk.machine.close()
    assert (len(memory.snapshots), memory.snapshots.size) == (0, 0)


def test_an_answer_too_large_to_keep_is_asked_for_block_by_block() -> None:
    talk = Dialogue(CoapLimits(snapshot_bytes_per_peer=1_000))
    body = bytearray()
    for number in range(2):
        talk.sends(CON, Code.GET, number, path="large", block2=(number, False, 6))
        talk.asked()
        talk.answers(Code.CONTENT, BODY[:2_000], etag=b"v")
        body += talk.heard()[0].payload
    assert body == BODY[:2_000]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 5_000), st.integers(0, 5_000))
def test_both_ways_in_one_exchange(up: int, down: int, sent: int, answered: int) -> None:
    """RFC 7959 §3.3: POST with Block1, whose answer is fetched with Block2, no byte changed and asked once."""
    talk = Dialogue(CoapLimits(duplicates_per_peer=10_000))
    there, back = BODY[:sent], BODY[-answered:] if answered else b""
    message_id, size = 0, 16 << up
    for number in range(max(1, -(-sent // size))):
        message_id += 1
        payload = there[number * size : (number + 1) * size]
        more = (number + 1) * size < sent
        talk.sends(
            CON,
            Code.POST,
            message_id,
            b"\1",
            path="echo",
            block1=(number, more, up),
            block2=None if more else (0, False, down),
            payload=payload,
        )
    assert talk.asked().payload == there
    talk.datagrams.clear()
    talk.answers(Code.CHANGED, back)
    (reply,) = talk.heard()
    got = bytearray(reply.payload)
    while reply.opt.block2 is not None and reply.opt.block2.more:
        message_id += 1
        number = reply.opt.block2.block_number + 1
        talk.sends(CON, Code.POST, message_id, b"\1", path="echo", block2=(number, False, down))
        (reply,) = talk.heard()
        got += reply.payload
    assert got == back
    assert not talk.events


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]), st.integers(0, 5), st.booleans(), st.integers(0, 2), st.binary(max_size=70)
        ),
        max_size=30,
    )
)
def test_any_blocks_in_any_order_stay_within_bounds(
    blocks: list[tuple[str, int, bool, int, bytes]],
) -> None:
    limits = CoapLimits(body_bytes=200, upload_bytes_per_peer=2_000, upload_bytes=1_500, uploads_per_peer=1)
    talk = Dialogue(limits)
    for message_id, (path, number, more, exponent, noise) in enumerate(blocks):
        payload = (noise * 64)[: 16 << exponent] if more and noise else noise
        talk.sends(NON, Code.PUT, message_id, path=path, block1=(number, more, exponent), payload=payload)
        for event in talk.events:
            assert isinstance(event, RequestReceived)
            assert len(event.request.payload) <= 200
            talk.answers(Code.CHANGED, exchange=event.exchange)
        talk.events.clear()
        assert len(talk.said()) == 1
        assert talk.memory.uploads.size <= 1_500
        assert len(talk.memory.uploads) <= 1
    talk.passes(300)
    assert talk.memory.uploads.size == 0
