"""CBOR from devices: what is read, what is refused, and that nothing else happens for any bytes."""

from __future__ import annotations

from datetime import UTC, datetime

import cbor2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapters.cbor import MAX_DEPTH, decode_cbor
from registry.errors import InvalidArgument

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.binary()
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner), max_leaves=30
)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_what_json_can_say_comes_back(value: object) -> None:
    assert decode_cbor(cbor2.dumps(value)) == value


@given(VALUES, st.data())
@settings(max_examples=100, deadline=None)
def test_cut_short_it_is_refused(value: object, data: st.DataObject) -> None:
    raw = cbor2.dumps(value)
    with pytest.raises(InvalidArgument):
        decode_cbor(raw[: data.draw(st.integers(0, len(raw) - 1))])


@given(st.binary(max_size=200))
@example(b"\xd8\x1c\x81\xd8\x1d\x00")
@example(b"\x9f" * 100)
@example(b"\xbf\xff")
@example(b"\x5f\x41a\x41b\xff")
@example(b"\x5f\x61a\xff")
@example(b"\x1f")
@example(b"\xfc")
@example(b"\xf8\x00")
@settings(max_examples=1000, deadline=None)
def test_any_bytes_give_a_value_or_the_one_error(raw: bytes) -> None:
    try:
        decode_cbor(raw)
    except InvalidArgument:
        pass


@pytest.mark.parametrize(
    "raw",
    [
        b"\xc0" + cbor2.dumps("9999-12-31T23:59:59-23:59"),
        b"\xc0" + cbor2.dumps("0001-01-01T00:00:00+23:59"),
        cbor2.dumps(cbor2.CBORTag(35, "(a+)+$")),
        cbor2.dumps(2**64),
        b"\xd8\x1c\x81\xd8\x1d\x00",
        b"\xd9\x01\x00\x82\x63abc\xd8\x19\x00",
        cbor2.dumps(cbor2.CBORTag(4, [-2, 27315])),
        cbor2.dumps({1: 2}),
        b"\xa2\x61a\x01\x61a\x02",
        b"\x61\xff",
        b"\x63\xed\xa0\x80",
        b"\x01\x02",
        b"",
        b"\xff",
        b"\xf8\xff",
        b"\x9b\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\x7b\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\x81" * (MAX_DEPTH + 1) + b"\x00",
        b"\x9f" * 1_000_000,
        cbor2.dumps(cbor2.CBORTag(0, "not a time")),
        cbor2.dumps(cbor2.CBORTag(1, 1e300)),
    ],
)
def test_what_devices_should_not_send_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidArgument, match="CBOR"):
        decode_cbor(raw)


@given(VALUES)
@example({"a": 1})
@settings(max_examples=100, deadline=None)
def test_self_described_it_is_the_same(value: object) -> None:
    """RFC 8949 §3.4.6."""
    assert decode_cbor(b"\xd9\xd9\xf7" + cbor2.dumps(value)) == value


def test_the_tag_that_says_nothing_hides_nothing() -> None:
    self_described = b"\xd9\xd9\xf7"
    for raw in (
        self_described,
        self_described + b"\x00\x00",
        self_described + b"\xd8\x1c\x81\xd8\x1d\x00",
        b"\xa2\x61a\x01" + self_described + b"\x61a\x02",
        self_described * 2 + b"\x00",
    ):
        with pytest.raises(InvalidArgument, match="CBOR"):
            decode_cbor(raw)


def test_times_undefined_and_depth() -> None:
    moment = datetime(2013, 3, 21, 20, 4, tzinfo=UTC)
    assert decode_cbor(cbor2.dumps(cbor2.CBORTag(0, "2013-03-21T20:04:00Z"))) == moment
    assert decode_cbor(bytes.fromhex("c11a514b67b0")) == moment
    assert decode_cbor(b"\xf7") is None
    assert decode_cbor(b"\x81" * MAX_DEPTH + b"\x00")
    assert decode_cbor(b"\xbf\x61a\x9f\x01\xff\xff") == {"a": [1]}
