"""What is a hardware_id, what is a pattern over them, and that neither can run for ever or forge anything."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import InvalidArgument
from registry.hardware_id import (
    MAX_HARDWARE_ID,
    MAX_PATTERN,
    HardwareId,
    HardwareIdPattern,
    PatternCache,
    parse_hardware_id,
)

PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))

# Matching takes microseconds to a few milliseconds; a backtracking matcher would need centuries for these.
LINEAR_SECONDS = 2.0


@pytest.mark.parametrize(
    "text", ["AA:BB:CC:00:11:22", "HW-LAB-0001", "x", "';DROP/**/TABLE-devices;--", "../../etc", PRINTABLE, "~" * 128]
)
def test_printable_ascii_without_spaces_is_a_hardware_id(text: str) -> None:
    assert parse_hardware_id(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a b",
        " a",
        "a ",
        "a\n",
        "a\x00b",
        "a\tb",
        "\x7f",
        "\x1b[31m",
        "é",
        "AA\u202eBB",
        "\ud800",
        "１２",
        "a" * 129,
    ],
)
def test_everything_else_is_none(text: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_hardware_id(text)
    assert refusal.value.field == "hardware_id"
    assert refusal.value.message.isascii() or "…" in refusal.value.message
    assert refusal.value.message.isprintable()


def test_an_absent_hardware_id_is_called_required() -> None:
    with pytest.raises(InvalidArgument, match=r"^hardware_id is required$"):
        parse_hardware_id("")


def test_a_refusal_shows_the_start_of_a_long_text_only() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_hardware_id("\x00" * 1_000_000)
    assert len(refusal.value.message) < 500


@given(st.text(max_size=140))
def test_any_text_is_a_hardware_id_or_a_clear_refusal(text: str) -> None:
    if 1 <= len(text) <= MAX_HARDWARE_ID and all(0x21 <= ord(each) <= 0x7E for each in text):
        assert parse_hardware_id(text) == text
        return
    with pytest.raises(InvalidArgument) as refusal:
        parse_hardware_id(text)
    assert refusal.value.message.isprintable()


@pytest.mark.parametrize(
    ("pattern", "admitted", "turned_away"),
    [
        ("AA:BB:.*", "AA:BB:CC", "xAA:BB:CC"),
        ("AA", "AA", "AAA"),
        ("a|bc", "bc", "abc"),
        (r"HW-\d{4}", "HW-0001", "HW-00012"),
        (r"[0-9A-F]{2}(:[0-9A-F]{2}){5}", "AA:BB:CC:00:11:22", "aa:bb:cc:00:11:22"),
        (r"(?i)hw-.+", "HW-1", "HW-"),
        (r"^a$", "a", "aa"),
        (r"[!-~]+", PRINTABLE, "never"),
        (r"a\.b", "a.b", "axb"),
    ],
)
def test_a_pattern_matches_the_whole_hardware_id(pattern: str, admitted: str, turned_away: str) -> None:
    compiled = HardwareIdPattern(pattern)
    assert compiled.matches(parse_hardware_id(admitted))
    if turned_away != "never":
        assert not compiled.matches(parse_hardware_id(turned_away))


@pytest.mark.parametrize(
    "pattern",
    [r"(a)\1", "(?=a)a", "(?!a)b", "(?<=a)b", "(?<!a)b", "(?>a)", "a++", "[", "(", "a)", "*", r"\Z", r"(?P<n>a)(?P=n)"],
)
def test_what_re2_does_not_support_is_refused_with_its_words(pattern: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidArgument, match="no back-references and no look-around") as refusal:
        HardwareIdPattern(pattern)
    assert refusal.value.field == "hardware_id_pattern"
    assert repr(pattern) in refusal.value.message
    assert capfd.readouterr() == ("", ""), "RE2 must not write to our stderr"


@pytest.mark.parametrize("pattern", ["é", "a\nb", "\x00", "\ud800", "\u202e", "\t"])
def test_a_pattern_is_printable_ascii(pattern: str) -> None:
    with pytest.raises(InvalidArgument, match="printable ASCII only") as refusal:
        HardwareIdPattern(pattern)
    assert refusal.value.message.isascii()
    assert refusal.value.message.isprintable()


def test_an_empty_pattern_is_refused_because_it_would_admit_nothing() -> None:
    with pytest.raises(InvalidArgument, match="leave it out"):
        HardwareIdPattern("")


def test_the_length_of_a_pattern_is_capped() -> None:
    assert HardwareIdPattern("a" * MAX_PATTERN).text == "a" * MAX_PATTERN
    with pytest.raises(InvalidArgument, match="257 characters, 256 are allowed") as refusal:
        HardwareIdPattern("a" * (MAX_PATTERN + 1))
    assert len(refusal.value.message) < 300


@pytest.mark.parametrize(
    "pattern",
    [
        "((a{0,100}){0,100}){0,100}",
        "a{1001}",
        "((a{1,10}){1,10}){1,11}",
        "(((((((a*)*)*)*)*)*){900})(.{900})(.{900})(.{900})(.{900})(.{900})(.{900})(.{900})(.{900})(.{900})(.{900})",
    ],
)
def test_a_pattern_that_would_need_much_memory_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidArgument, match=r"repetition size|too large"):
        HardwareIdPattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "(a|aa)+b",
        "(.*)*(.*)*(.*)*b",
        "(a?){60}a{60}b",
        "(a|b)*a(a|b){60}c",  # needs 2^60 states when made deterministic
        "(a{0,30}){0,30}b",
        "(" * 80 + "a" + ")*" * 80,
    ],
)
def test_an_evil_pattern_is_matched_in_linear_time(pattern: str) -> None:
    started = time.perf_counter()
    compiled = HardwareIdPattern(pattern)
    for hostile in ("a" * 127 + "!", "ab" * 63 + "!", "a" * 128):
        compiled.matches(parse_hardware_id(hostile))
    assert time.perf_counter() - started < LINEAR_SECONDS


@settings(max_examples=150)
@given(st.text(alphabet="ab.*+?(){}[]|^$\\1:,09-", max_size=60), st.text(alphabet="ab:-01", min_size=1, max_size=128))
def test_any_pattern_compiles_and_answers_or_is_refused(pattern: str, hardware_id: str) -> None:
    try:
        compiled = HardwareIdPattern(pattern)
    except InvalidArgument:
        return
    assert compiled.matches(HardwareId(hardware_id)) in (True, False)


@given(st.text(alphabet=PRINTABLE, min_size=1, max_size=60), st.text(alphabet=PRINTABLE, min_size=1, max_size=60))
def test_an_escaped_text_matches_itself_alone(text: str, other: str) -> None:
    compiled = HardwareIdPattern(re.escape(text))
    assert compiled.matches(HardwareId(text))
    assert compiled.matches(HardwareId(other)) is (text == other)


def test_patterns_are_values() -> None:
    assert HardwareIdPattern("a+") == HardwareIdPattern("a+")
    assert HardwareIdPattern("a+") != HardwareIdPattern("a*")
    assert HardwareIdPattern("a+") != "a+"
    assert len({HardwareIdPattern("a+"), HardwareIdPattern("a+")}) == 1
    assert repr(HardwareIdPattern("a+")) == "HardwareIdPattern('a+')"


def test_the_cache_compiles_once_and_forgets_the_least_recently_used() -> None:
    cache = PatternCache(max_patterns=2)
    first, second = cache.compile("a"), cache.compile("b")
    assert cache.compile("a") is first
    cache.compile("c")
    assert len(cache) == 2
    assert cache.compile("a") is first
    assert cache.compile("b") is not second


def test_the_cache_keeps_no_refusals() -> None:
    cache = PatternCache()
    for _ in range(2):
        with pytest.raises(InvalidArgument):
            cache.compile("[")
    assert len(cache) == 0


def test_a_cache_of_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PatternCache(0)
