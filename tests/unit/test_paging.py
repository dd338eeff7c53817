"""Cursors: round trips, and one error for everything that is none of ours."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidArgument
from registry.paging import Listing, Page, decode_cursor, encode_cursor, listing

NOON = datetime(2030, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)


def test_limits() -> None:
    assert (Page().limit, Page(1).limit, Page(1000).limit) == (100, 1, 1000)
    for limit in (0, -1, 1001):
        with pytest.raises(InvalidArgument) as refused:
            Page(limit)
        assert refused.value.field == "limit"


def test_round_trip() -> None:
    some = uuid4()
    assert decode_cursor(encode_cursor(NOON, some), datetime, UUID) == (NOON, some)
    assert decode_cursor(encode_cursor("a", -(2**63), NOON), str, int, datetime) == ("a", -(2**63), NOON)


def test_times_are_utc_in_a_cursor() -> None:
    east = NOON.astimezone(timezone(timedelta(hours=9)))
    assert encode_cursor(east) == encode_cursor(NOON)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=100), st.uuids())
def test_any_text_goes_round(text: str, some: UUID) -> None:
    assert decode_cursor(encode_cursor(text, some), str, UUID) == (text, some)


@given(st.text(max_size=80) | st.binary(max_size=60).map(lambda b: base64.urlsafe_b64encode(b).decode()))
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        decode_cursor(text, datetime, UUID)
    assert refused.value.field == "cursor"


def _raw(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


@pytest.mark.parametrize(
    "text",
    [
        _raw(b'["2030-01-01T12:00:00.123456+00:00"]'),  # one value missing
        _raw(b'["2030-01-01T12:00:00.123456+00:00","x"]'),
        _raw(b'["2030-01-01T12:00:00.123456","' + b"0" * 32 + b'"]'),  # another spelling
        _raw(b'["0001-01-01T00:00:00+23:59","' + b"0" * 32 + b'"]'),  # before the year 1 in UTC
        _raw(b"[1, 2]"),
        _raw(b'{"a": 1}'),
        _raw(b"[" * 500),
        encode_cursor(NOON, UUID(int=0)) + "=",
        " " + encode_cursor(NOON, UUID(int=0)),
        encode_cursor("x" * 2000, UUID(int=0)),
    ],
)
def test_forgeries_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        decode_cursor(text, datetime, UUID)


def test_values_that_postgresql_cannot_take_are_refused() -> None:
    for text, wanted in ((encode_cursor("a\x00"), str), (_raw(b"[9223372036854775808]"), int)):
        with pytest.raises(InvalidArgument):
            decode_cursor(text, wanted)


def test_a_listing_tells_of_more() -> None:
    assert listing([1, 2, 3], Page(2), lambda n: (n,)) == Listing([1, 2], encode_cursor(2))
    assert listing([1, 2], Page(2), lambda n: (n,)) == Listing([1, 2], None)
    assert listing([], Page(2), lambda n: (n,)) == Listing([], None)
