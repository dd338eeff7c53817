"""What telemetry is, what a payload may be, and that nothing else gets through or raises anything undeclared."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidArgument
from registry.model import DeviceId, TenantId, Transport
from registry.payloads import (
    MAX_DEPTH,
    Payload,
    Source,
    payload_from_json,
    payload_from_value,
    telemetry_from,
    uplink_from,
)
from registry.telemetry import MAX_NAME, MAX_READINGS, MAX_TEXT_BYTES, Reading, parse_telemetry, split_name

NOON = datetime(2026, 5, 29, 12, 0, tzinfo=UTC)
SOURCE = Source(TenantId(UUID(int=1)), DeviceId(UUID(int=2)), Transport.HTTPS)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


def readings_of(payload: object) -> list[tuple[str, str, object]]:
    return [(r.component, r.sensor, r.value) for r in parse_telemetry(payload)]


def test_a_flat_object_is_one_reading_per_member() -> None:
    assert parse_telemetry({"env.temperature": 21.5, "battery": 87, "door.open": True, "state": "idle"}) == [
        Reading("env", "temperature", None, 21.5),
        Reading("main", "battery", None, 87),
        Reading("door", "open", None, True),
        Reading("main", "state", None, "idle"),
    ]


def test_the_type_of_a_value_is_kept() -> None:
    assert [type(r.value) for r in parse_telemetry({"a": 1, "b": 1.0, "c": True, "d": "1"})] == [int, float, bool, str]


def test_a_dated_object_dates_its_values() -> None:
    (reading,) = parse_telemetry({"observed_at": "2026-05-29T14:00:00+02:00", "values": {"t": 1}})
    assert reading.observed_at == NOON
    assert reading.observed_at.utcoffset() == timedelta(0)


def test_a_backlog_mixes_both_forms_in_order() -> None:
    backlog = [{"t": 1}, {"observed_at": "2026-05-29T12:00:00Z", "values": {"t": 2}}, {"values": {"t": 3}}]
    assert [(r.value, r.observed_at) for r in parse_telemetry(backlog)] == [(1, None), (2, NOON), (3, None)]


def test_a_decoded_time_is_taken_as_well_as_its_text() -> None:
    local = NOON.astimezone(timezone(timedelta(hours=-7)))
    (reading,) = parse_telemetry({"observed_at": local, "values": {"t": 1}})
    assert reading.observed_at == NOON


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("t", ("main", "t")),
        ("env.t", ("env", "t")),
        ("rack1.psu2.voltage", ("rack1.psu2", "voltage")),
        ("Kühlraum.Temperatur °C", ("Kühlraum", "Temperatur °C")),
        ("c" * MAX_NAME + "." + "s" * MAX_NAME, ("c" * MAX_NAME, "s" * MAX_NAME)),
    ],
)
def test_a_name_splits_at_its_last_dot(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        ".t",
        "env.",
        "a\nb",
        "a\0b",
        "a\x7f",
        "a\u202eb",
        "a\u2028b",
        "\ud800",
        "s" * (MAX_NAME + 1),
        "c" * (MAX_NAME + 1) + ".s",
    ],
)
def test_other_names_are_refused_without_being_repeated_raw(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"allowed are <component>\.<sensor>") as refusal:
        parse_telemetry({name: 1})
    assert refusal.value.message.isascii()
    assert refusal.value.message.isprintable()
    assert len(refusal.value.message) < 300


def test_null_reports_nothing_and_costs_its_neighbours_nothing() -> None:
    assert readings_of({"a": None, "c": 3}) == [("main", "c", 3)]
    assert readings_of({"a": None}) == []


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 0.0, -0.0, 1.7976931348623157e308, 5e-324, ""])
def test_values_at_their_limits_are_taken(value: object) -> None:
    assert readings_of({"a": value}) == [("main", "a", value)]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (2**63, "beyond 64 bits"),
        (-(2**63) - 1, "beyond 64 bits"),
        (math.nan, "NaN"),
        (math.inf, "infinite"),
        (-math.inf, "infinite"),
        ("é" * (MAX_TEXT_BYTES // 2) + "x", f"{MAX_TEXT_BYTES + 1} bytes"),
        ("a\0b", "NUL"),
        ("\ud800", "surrogate"),
        ({"x": 1}, "an object"),
        ([1], "an array"),
        (b"\x01", "a byte string"),
        (NOON, "a datetime"),
    ],
)
def test_other_values_are_refused_by_name(value: object, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as refusal:
        parse_telemetry({"fine": 1, "env.bad": value})
    assert "'env.bad'" in refusal.value.message
    assert "allowed" in refusal.value.message or "cannot be stored" in refusal.value.message


@pytest.mark.parametrize(
    "payload",
    [
        None,
        1,
        "t",
        True,
        b"{}",
        {},
        [],
        [[]],
        [1],
        [{}],
        [{"t": 1}, {}],
        {"values": {}},
        {"values": 1},
        {"values": [1]},
        {"observed_at": "2026-05-29T12:00:00Z"},
        {"observed_at": "2026-05-29T12:00:00Z", "t": 1},
        {"values": {"t": 1}, "t": 2},
        {"values": {"values": {"t": 1}}},
        {1: 2},
    ],
)
def test_what_is_no_telemetry_is_refused_as_a_whole(payload: object) -> None:
    with pytest.raises(InvalidArgument, match="allowed"):
        parse_telemetry(payload)


@pytest.mark.parametrize(
    "time",
    [
        "",
        "yesterday",
        "2026-05-29",
        "2026-05-29T12:00:00",
        "2026-02-30T12:00:00Z",
        1780056000,
        1.5,
        True,
        b"2026",
        NOON.replace(tzinfo=None),
        "1969-12-31T23:59:59Z",
        "2201-01-01T00:00:00Z",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59-23:59",
    ],
)
def test_a_time_that_is_none_or_beyond_reason_is_refused(time: object) -> None:
    with pytest.raises(InvalidArgument, match=r"observed_at.*allowed are"):
        parse_telemetry({"observed_at": time, "values": {"t": 1}})


@pytest.mark.parametrize("time", ["1970-01-01T00:00:00Z", "2200-12-31T23:59:59Z", None])
def test_times_at_their_limits_are_taken(time: str | None) -> None:
    assert len(parse_telemetry({"observed_at": time, "values": {"t": 1}})) == 1


def test_the_number_of_readings_is_bounded_over_the_whole_backlog() -> None:
    full = [{f"s{n}": n for n in range(MAX_READINGS // 2)}] * 2
    assert len(parse_telemetry(full)) == MAX_READINGS
    with pytest.raises(InvalidArgument, match="several messages"):
        parse_telemetry([*full, {"t": None}])


@given(json_values)
def test_any_decoded_value_gives_readings_or_the_declared_error(value: object) -> None:
    try:
        readings = parse_telemetry(value)
    except InvalidArgument:
        return
    for reading in readings:
        assert reading.value is not None
        assert type(reading.value) in (float, int, bool, str)


# Payloads.


@pytest.mark.parametrize(
    "raw", [b'{"a": 1.50, "a": 2}', b"[]", b'"..."', b"null", b" 1e2\n", '"é\\ud83d\\ude00"'.encode()]
)
def test_a_payload_keeps_its_text(raw: bytes) -> None:
    assert payload_from_json(raw).text == raw.decode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        b"{",
        b"[1,]",
        b"{}{}",
        b"nul",
        b"NaN",
        b"01",
        b"1e999",
        b"-1e999",
        b"1" * 5000,
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b'"\x00"',
        b"\x00",
        b"1\x00",
        b'"\t"',
        b'"\\ud800"',
        b'"\\udc00"',
        b'"\\ud800\\ud800"',
        b'"\\ud800x"',
        b'"\\u0000"',
        b'{"\\u0000": 1}',
        b'[["a", {"b": "c\\u0000"}]]',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe[\x00]\x00",
        b"'a'",
        b"/**/1",
        b"[" * 100_000,
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b'{"a":' * 70 + b"1" + b"}" * 70,
    ],
)
def test_what_cannot_be_stored_for_good_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        payload_from_json(raw)
    assert refusal.value.field == "payload"
    assert len(refusal.value.message) < 300


def test_nesting_up_to_the_limit_is_taken_and_so_are_many_brackets_side_by_side() -> None:
    payload_from_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    payload_from_json(b"[" + b"[]," * 1000 + b"{}]")


def test_an_escaped_backslash_before_u0000_is_no_nul() -> None:
    assert payload_from_json(b'"\\\\u0000"').value == "\\u0000"


def test_a_payload_is_bounded() -> None:
    assert payload_from_json(b'"123456"', max_bytes=8).value == "123456"
    with pytest.raises(InvalidArgument, match="9 bytes; allowed are up to 8"):
        payload_from_json(b'"1234567"', max_bytes=8)


@given(json_values)
def test_what_json_writes_is_a_payload_or_the_declared_error(value: object) -> None:
    raw = json.dumps(value).encode()
    try:
        payload = payload_from_json(raw)
    except InvalidArgument:
        return
    assert payload.text.encode() == raw


@given(st.binary(max_size=40))
def test_random_bytes_are_a_payload_or_the_declared_error(raw: bytes) -> None:
    try:
        payload = payload_from_json(raw)
    except InvalidArgument:
        return
    assert payload.text.encode() == raw


def test_a_decoded_value_becomes_json_and_stays_readable() -> None:
    payload = payload_from_value({"t": 1.5, "n": None, "when": NOON, "raw": b"\x00\xff"})
    assert json.loads(payload.text) == {"t": 1.5, "n": None, "when": "2026-05-29T12:00:00Z", "raw": "AP8="}
    assert payload.value["t"] == 1.5


@pytest.mark.parametrize("value", [{(1, 2): 3}, {"a": object()}, "\ud800", "a\0b"])
def test_a_value_that_json_has_no_word_for_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgument):
        payload_from_value(value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_number_for_is_refused_wherever_it_stands_and_not_stored_as_null(number: float) -> None:
    for value, where in (
        (number, "payload"),
        ([1, [number]], "payload"),
        ({"a": None, "t": number}, "'t'"),
        ({"values": [{"deep\n": [0.5, number]}]}, r"'deep\\n'"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{where} is NaN or infinite"):
            payload_from_value(value)
    assert payload_from_value({"note": "null", "n": None}).value == {"note": "null", "n": None}


def test_a_value_that_contains_itself_is_refused() -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(InvalidArgument, match="nested too deep"):
        payload_from_value(endless)


# Uplinks.


def test_telemetry_that_is_none_is_kept_without_readings_on_one_way_and_refused_on_the_other() -> None:
    payload = payload_from_json(b'"..."')  # the example of seed 003
    uplink = uplink_from(SOURCE, payload, kind="telemetry")
    assert (uplink.payload, uplink.readings) == ('"..."', [])
    with pytest.raises(InvalidArgument, match="telemetry is a text"):
        telemetry_from(SOURCE, payload)


def test_only_telemetry_becomes_readings() -> None:
    payload = payload_from_json(b'{"t": 1}')
    assert uplink_from(SOURCE, payload, kind="event").readings == []
    assert uplink_from(SOURCE, payload, kind="telemetry").readings == [Reading("main", "t", None, 1)]
    assert telemetry_from(SOURCE, payload).readings == [Reading("main", "t", None, 1)]


@pytest.mark.parametrize("kind", ["", "Telemetry", "1st", "a b", "a/b", "a\n", "é", "a" * 65])
def test_a_kind_that_is_no_name_is_refused(kind: str) -> None:
    with pytest.raises(InvalidArgument, match="kind is") as refusal:
        uplink_from(SOURCE, Payload("1", 1), kind=kind)
    assert refusal.value.field == "kind"


@pytest.mark.parametrize("message_id", ["", " ", "a b", "a\n", "é", "\x7f", "a" * 129])
def test_a_message_id_that_could_not_be_copied_is_refused(message_id: str) -> None:
    with pytest.raises(InvalidArgument, match="message_id is") as refusal:
        telemetry_from(SOURCE, payload_from_json(b'{"t": 1}'), message_id=message_id)
    assert refusal.value.field == "message_id"


def test_an_uplink_holds_what_was_said() -> None:
    uplink = uplink_from(
        SOURCE, Payload("1", 1), kind="a.b_c-9", message_id="!~" * 64, observed_at="2026-05-29T14:00:00+02:00"
    )
    assert (uplink.kind, uplink.message_id, uplink.observed_at) == ("a.b_c-9", "!~" * 64, NOON)
    assert (uplink.tenant_id, uplink.device_id, uplink.transport, uplink.via) == (
        UUID(int=1),
        UUID(int=2),
        Transport.HTTPS,
        None,
    )
