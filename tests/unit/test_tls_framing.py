"""The record counter: the same counts however the stream is cut, and only its declared error for anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.tls.framing import RecordCounter, RemoteProtocolError


def record(kind: int, size: int) -> bytes:
    return bytes((kind, 3, 3)) + size.to_bytes(2, "big") + b"x" * size


STREAM = record(22, 3) + record(23, 0) + record(20, 1) + record(23, 300) + record(21, 2)


def test_counts_whole_records_at_every_cut() -> None:
    for cut in range(len(STREAM) + 1):
        counter = RecordCounter()
        first = counter.feed(memoryview(STREAM[:cut]))
        assert first + counter.feed(memoryview(STREAM[cut:])) == 5
        assert first == sum(cut >= end for end in (8, 13, 19, 324, 331))


def test_counts_byte_by_byte() -> None:
    counter = RecordCounter()
    assert sum(counter.feed(memoryview(STREAM[at : at + 1])) for at in range(len(STREAM))) == 5


def test_tells_which_read_began_a_handshake_record() -> None:
    counter = RecordCounter()
    counter.feed(memoryview(record(23, 5)))
    assert not counter.saw_handshake
    counter.feed(memoryview(record(22, 5)[:3]))
    counter.feed(memoryview(record(22, 5)[3:]))
    assert counter.saw_handshake


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n",
        bytes(9),
        b"\x17\x02\x00\x00\x01",
        b"\x17\x03\x03\xff\xff",
        b"\x80\x2e\x01\x00\x02",
        b"\x18",
    ],
)
def test_refuses_what_is_not_tls(garbage: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        RecordCounter().feed(memoryview(garbage))


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8))
def test_random_bytes_raise_only_the_declared_error(parts: list[bytes]) -> None:
    counter = RecordCounter()
    try:
        for part in parts:
            assert 0 <= counter.feed(memoryview(part)) <= len(part)
    except RemoteProtocolError:
        pass
