"""What is read of DTLS without a key: anything may come, nothing raises, and only what is whole is there."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.dtls.cookie import CookieJar
from adapters.dtls.records import (
    PSK_SUITES,
    IdentityReader,
    agreed_fragment,
    chosen_suite,
    hello_verify_request,
    is_client_hello,
    plaintext_alert,
    psk_suite,
    read_client_hello,
    split_records,
)
from tests.dtls_peers import Client, psk_client_context

HOME = b"127.0.0.1 4711"


@pytest.fixture(scope="module")
def hello() -> bytes:
    [datagram] = Client(psk_client_context()).step()
    return datagram


def jar(now: float = 0.0) -> CookieJar:
    return CookieJar(60.0, random.Random(1).randbytes, now)


def message(kind: int, body: bytes, number: int, offset: int = 0, part: bytes | None = None) -> bytes:
    part = body if part is None else part
    return (
        bytes((kind,))
        + len(body).to_bytes(3, "big")
        + number.to_bytes(2, "big")
        + offset.to_bytes(3, "big")
        + len(part).to_bytes(3, "big")
        + part
    )


def test_a_client_hello_is_read(hello: bytes) -> None:
    read = read_client_hello(hello)
    assert read is not None
    assert (read.version, read.message_seq, read.cookie, len(read.random)) == (0xFEFD, 0, b"", 32)
    assert read.record == hello


def test_what_follows_the_record_is_not_part_of_it(hello: bytes) -> None:
    read = read_client_hello(hello + b"more")
    assert read is not None
    assert read.record == hello


def test_a_client_hello_cut_anywhere_is_none(hello: bytes) -> None:
    assert [read_client_hello(hello[:end]) for end in range(len(hello))] == [None] * len(hello)


def test_a_client_hello_in_fragments_is_none(hello: bytes) -> None:
    body = hello[25:]
    part = message(1, body, 0, 0, body[:50])
    assert read_client_hello(hello[:11] + len(part).to_bytes(2, "big") + part) is None


@pytest.mark.parametrize("number", [3, 255, 256, 65_535])
def test_a_client_hello_numbered_past_any_cookie_is_none(hello: bytes, number: int) -> None:
    assert read_client_hello(hello[:17] + number.to_bytes(2, "big") + hello[19:]) is None


@given(st.binary(max_size=200))
def test_random_bytes_are_nothing_and_raise_nothing(data: bytes) -> None:
    for candidate in (data, b"\x16\xfe\xfd\0\0" + data, b"\x16\xfe\xff\0\0\0\0\0\0\0\0\0\x50\x01" + data):
        is_client_hello(candidate)
        read = read_client_hello(candidate)
        assert read is None or psk_suite(read) is None or psk_suite(read) in PSK_SUITES
        chosen_suite(candidate)
        assert agreed_fragment(candidate) in (None, 512, 1024, 2048, 4096)
        for record in split_records(candidate):
            assert 0 <= record.start < record.end <= len(candidate)
    reader = IdentityReader(2)
    reader.feed(data)
    reader.feed(b"\x10" + data)
    reader.identity()


@given(st.integers(0, 10_000), st.data())
def test_flipped_bytes_of_a_hello_raise_nothing(seed: int, data: st.DataObject) -> None:
    [datagram] = Client(psk_client_context()).step()
    spoilt = bytearray(datagram)
    for _ in range(data.draw(st.integers(1, 5))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = seed % 256
    read = read_client_hello(bytes(spoilt))
    assert read is None or psk_suite(read) is None or psk_suite(read) in PSK_SUITES


@pytest.mark.parametrize(
    ("suites", "is_offered"),
    [
        (b"PSK-AES128-CCM8", True),
        (b"ECDHE-ECDSA-AES128-CCM8:PSK-AES256-GCM-SHA384", True),
        (b"ECDHE-ECDSA-AES128-CCM8", False),
        (b"PSK-AES128-CBC-SHA256", False),  # not one of ours
    ],
)
def test_a_client_that_offers_a_key_is_known_by_its_hello(suites: bytes, is_offered: bool) -> None:
    [datagram] = Client(psk_client_context(suites=suites)).step()
    read = read_client_hello(datagram)
    assert read is not None
    assert (psk_suite(read) is not None) is is_offered


def server_hello(extensions: bytes, session_id: bytes = b"") -> bytes:
    body = b"\xfe\xfd" + bytes(32) + bytes((len(session_id),)) + session_id + b"\xc0\xa8\0"
    body += len(extensions).to_bytes(2, "big") + extensions if extensions else b""
    whole = message(2, body, 1)
    return b"\x16\xfe\xfd" + bytes(8) + len(whole).to_bytes(2, "big") + whole


@pytest.mark.parametrize(
    ("extensions", "agreed"),
    [
        (b"", None),
        (b"\0\1\0\1\1", 512),
        (b"\xff\1\0\1\0" + b"\0\1\0\1\4", 4096),
        (b"\0\1\0\1\5", None),  # RFC 6066 §4 knows 1 to 4
        (b"\0\1\0\1\0", None),
        (b"\0\1\0\0", None),
        (b"\xff\1\0\1\0", None),
    ],
)
def test_the_limit_of_a_record_stands_in_the_server_hello(extensions: bytes, agreed: int | None) -> None:
    flight = server_hello(extensions, b"id")
    assert agreed_fragment(flight) == agreed
    assert agreed_fragment(flight + b"\x16\xfe\xfd and what follows") == agreed
    for end in range(len(flight)):
        assert agreed_fragment(flight[:end]) in (None, agreed)


def test_records_that_do_not_fit_end_the_list(hello: bytes) -> None:
    assert [record.end for record in split_records(hello + hello)] == [len(hello), 2 * len(hello)]
    assert len(split_records(hello + hello[:-1])) == 1
    assert split_records(hello[:12]) == []


def test_a_hello_verify_request_is_no_larger_than_the_smallest_hello(hello: bytes) -> None:
    read = read_client_hello(hello)
    assert read is not None
    smallest = 13 + 12 + 2 + 32 + 1 + 1 + 2 + 2 + 2  # one suite, one compression method, no extension
    assert len(hello_verify_request(read, jar().bake(HOME, read.parameters, 0))) <= smallest


def test_the_answer_takes_its_record_number_from_the_hello(hello: bytes) -> None:
    numbered = hello[:5] + b"\0\0\0\0\1\2" + hello[11:]
    read = read_client_hello(numbered)
    assert read is not None
    [answer] = split_records(hello_verify_request(read, b"c" * 20))
    assert (answer.epoch, answer.sequence) == (0, 0x0102)


def test_a_client_comes_back_with_the_cookie(hello: bytes) -> None:
    client = Client(psk_client_context())
    [first] = client.step()
    read = read_client_hello(first)
    assert read is not None
    cookies = jar()
    [second] = client.feed(hello_verify_request(read, cookies.bake(HOME, read.parameters, 0)))
    again = read_client_hello(second)
    assert again is not None
    assert again.message_seq == 1
    assert again.parameters == read.parameters
    assert cookies.good(again.cookie, HOME, again.parameters, 0)


def test_a_cookie_is_good_for_its_address_its_parameters_and_its_time() -> None:
    cookies = jar()
    cookie = cookies.bake(HOME, b"parameters", 0)
    assert cookies.good(cookie, HOME, b"parameters", 59)
    assert cookies.good(cookie, HOME, b"parameters", 60)  # the last secret is good for one lifetime more
    assert not cookies.good(cookie, b"127.0.0.1 4712", b"parameters", 60)
    assert not cookies.good(cookie, HOME, b"others", 60)
    assert not cookies.good(cookie, HOME, b"parameters", 121)
    assert not cookies.good(b"", HOME, b"parameters", 121)
    assert not cookies.good(cookie[:-1], HOME, b"parameters", 121)


@pytest.mark.parametrize("heard", [60.0, 90.0, 119.9])
def test_a_cookie_is_never_good_for_more_than_two_lifetimes_however_late_somebody_else_came(heard: float) -> None:
    cookies = jar()
    cookie = cookies.bake(HOME, b"p", 0)
    later = cookies.bake(HOME, b"p", heard)
    assert cookies.good(cookie, HOME, b"p", 119.9)
    assert not cookies.good(cookie, HOME, b"p", 120.1)
    assert cookies.good(later, HOME, b"p", heard + 60.0), "and for one lifetime at the least"
    assert not cookies.good(later, HOME, b"p", 180.1)


def test_an_old_cookie_is_bad_after_a_long_silence() -> None:
    cookies = jar()
    cookie = cookies.bake(HOME, b"p", 0)
    assert not cookies.good(cookie, HOME, b"p", 10_000)


def test_a_cookie_of_another_server_is_bad() -> None:
    other = CookieJar(60.0, random.Random(2).randbytes, 0)
    assert not jar().good(other.bake(HOME, b"p", 0), HOME, b"p", 0)


def test_the_identity_is_read_whole() -> None:
    reader = IdentityReader(2)
    reader.feed(message(16, b"\0\x08device-1", 2))
    assert reader.complete
    assert reader.identity() == b"device-1"


def test_the_identity_is_read_before_a_public_key() -> None:
    reader = IdentityReader(2)
    reader.feed(message(16, b"\0\x08device-1\x20" + bytes(32), 2))
    assert reader.identity() == b"device-1"


@given(st.permutations(range(5)), st.integers(0, 4))
def test_the_identity_is_read_from_fragments_of_any_order_and_number(order: list[int], twice: int) -> None:
    body = b"\0\x12a longer identity."
    reader = IdentityReader(2)
    seen: set[int] = set()
    for number in [order[twice], *order]:
        assert reader.complete == (len(seen) == 5)
        seen.add(number)
        reader.feed(message(16, body, 2, number * 4, body[number * 4 : number * 4 + 4]))
    assert reader.complete
    assert reader.identity() == b"a longer identity."


def test_two_messages_of_one_record_are_both_read() -> None:
    reader = IdentityReader(2)
    body = b"\0\x02ab"
    reader.feed(message(16, body, 2, 0, body[:1]) + message(16, body, 2, 1, body[1:]))
    assert reader.identity() == b"ab"


@pytest.mark.parametrize(
    "body",
    [b"\0\x09device-1", b"\0", b"", b"\x41\x04" + bytes(64)],
    ids=["longer than there is", "no length", "empty", "a point"],
)
def test_what_has_no_identity_gives_none(body: bytes) -> None:
    reader = IdentityReader(2)
    reader.feed(message(16, body, 2))
    assert reader.identity() is None


def test_other_messages_and_contradictions_are_left_out() -> None:
    reader = IdentityReader(2)
    reader.feed(message(16, b"\0\x01x", 1))
    reader.feed(message(20, b"\0\x01x", 2))
    reader.feed(message(16, bytes(2000), 2))
    reader.feed(message(16, b"\0\x01x", 2, 2, b"xx"))
    assert not reader.complete
    reader.feed(message(16, b"\0\x02xy", 2, 0, b"\0\x02"))
    reader.feed(message(16, b"\0\x03xyz", 2, 2, b"xyz"))
    assert not reader.complete
    reader.feed(message(16, b"\0\x02xy", 2, 2, b"xy"))
    assert reader.identity() == b"xy"


def test_a_whole_message_counts_whatever_fragments_came_before() -> None:
    """A stranger who knows an address and a port needs one datagram for such a fragment."""
    for length in (9, 10, 500):
        reader = IdentityReader(2)
        reader.feed(message(16, bytes(length), 2, 0, b"\0"))
        reader.feed(message(16, b"\0\x08device-1", 2))
        assert reader.identity() == b"device-1"


def test_fragments_of_nothing_cost_no_more_than_those_of_another_message() -> None:
    """1,300 fit into one datagram. Once what is missing was counted for each of them: 28 times as much."""
    reader = IdentityReader(2)
    reader.feed(message(16, bytes(1024), 2, 0, bytes(1023)))
    cost = {}
    for number in (2, 3):
        fragments = message(16, bytes(1024), number, 0, b"") * 1300
        cost[number] = min(seconds(reader, fragments) for _ in range(10))
    assert cost[2] < 4 * cost[3]
    assert not reader.complete


def seconds(reader: IdentityReader, fragments: bytes) -> float:
    begun = time.perf_counter()
    reader.feed(fragments)
    return time.perf_counter() - begun


def test_an_alert_is_a_record() -> None:
    [record] = split_records(plaintext_alert(20, 9))
    assert (record.content, record.epoch, record.sequence) == (21, 0, 9)
