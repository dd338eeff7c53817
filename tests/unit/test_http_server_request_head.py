"""Judging a request's head: what could be read in two ways is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.http.request import Headers, Refused, read_head, read_target

HOST = (b"host", b"gate.example:8443")


def judge(headers: Headers, *, method: str = "POST", version: str = "1.1", upgrade: bool = False) -> int | None:
    return read_head(method, version, b"/", headers, keep_alive=True, upgrade=upgrade).length


def test_framing_is_a_length_or_chunked() -> None:
    assert judge([HOST]) == 0
    assert judge([HOST, (b"content-length", b"12")]) == 12
    assert judge([HOST, (b"transfer-encoding", b"Chunked")]) is None


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [HOST, HOST],
        [(b"host", b"")],
        [(b"host", b"a b")],
        [(b"host", b"user@a")],
        [(b"host", b"a/b")],
        [(b"host", b"a:x")],
        [(b"host", b"[::1")],
    ],
)
def test_exactly_one_plausible_host_is_required(headers: Headers) -> None:
    with pytest.raises(Refused) as refused:
        judge(headers)
    assert refused.value.refusal.status == 400


@pytest.mark.parametrize("host", [b"a", b"a.example:1", b"[::1]:8443", b"127.0.0.1", b"a_b", b"a:"])
def test_hosts_of_every_kind_pass(host: bytes) -> None:
    assert judge([(b"host", host)]) == 0


@pytest.mark.parametrize(
    ("headers", "method", "version", "upgrade", "status"),
    [
        ([HOST, (b"transfer-encoding", b"gzip, chunked")], "POST", "1.1", False, 501),
        ([HOST, (b"transfer-encoding", b"chunked")], "POST", "1.0", False, 400),
        ([HOST], "GET", "0.9", False, 400),
        ([HOST], "GET", "2.0", False, 400),
        ([HOST], "CONNECT", "1.1", False, 400),
        ([HOST, (b"content-length", b"1")], "POST", "1.1", True, 400),
    ],
)
def test_what_is_not_served_is_refused(headers: Headers, method: str, version: str, upgrade: bool, status: int) -> None:
    with pytest.raises(Refused) as refused:
        judge(headers, method=method, version=version, upgrade=upgrade)
    assert refused.value.refusal.status == status


def test_old_clients_and_ignored_upgrades_get_one_answer_and_a_close() -> None:
    assert not read_head("GET", "1.0", b"/", [], keep_alive=True, upgrade=False).keep_alive
    assert not read_head("GET", "1.1", b"/", [HOST], keep_alive=True, upgrade=True).keep_alive


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/a/b?x=1&y", ("/a/b", b"/a/b", b"x=1&y")),
        (b"/caf%C3%A9", ("/café", b"/caf%C3%A9", b"")),
        (b"https://gate/a?b", ("/a", b"/a", b"b")),
        (b"HTTP://gate", ("/", b"/", b"")),
        (b"http://gate?b", ("/", b"/", b"b")),
        (b"//other/a", ("//other/a", b"//other/a", b"")),
        (b"/a%2Fb", ("/a/b", b"/a%2Fb", b"")),
    ],
)
def test_targets(target: bytes, expected: tuple[str, bytes, bytes]) -> None:
    assert read_target("GET", target) == expected


@pytest.mark.parametrize(
    "target",
    [b"/%ff", b"/a%00b", b"/a%0d%0ab", b"/a#b", b"*", b"a:1", b"ftp://a/b", b"http://a b/", b"http://u@a/", b""],
)
def test_targets_that_mean_nothing_here(target: bytes) -> None:
    with pytest.raises(Refused) as refused:
        read_target("GET", target)
    assert refused.value.refusal.status == 400


@given(st.binary(max_size=60))
def test_any_target_is_read_or_refused(target: bytes) -> None:
    try:
        path, _, _ = read_target("GET", target)
    except Refused:
        return
    assert path.startswith("/")
    assert path.isprintable() or not any(ord(character) < 32 or ord(character) == 127 for character in path)
