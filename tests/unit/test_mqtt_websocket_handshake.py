"""What a request must have to become a WebSocket, RFC 6455 §4.2.1, and which pages may ask."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.http.request import Head, Headers, Refused
from adapters.http.upgrade import ANY_ORIGIN, Upgrade, WebSocketRoute, judge
from adapters.tls.stream import TlsTransport

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="  # the standard's own example, §1.3


def take(transport: TlsTransport, rest: bytes) -> None:
    raise AssertionError("judging takes nothing over")


def judged(
    *changed: tuple[bytes, bytes],
    without: bytes = b"",
    origins: frozenset[str] = frozenset(),
    method: str = "GET",
    upgrade: bool = True,
) -> Upgrade:
    """The verdict on a good request with some headers replaced, added or left out."""
    good = {
        b"host": b"gate.example:8443",
        b"upgrade": b"websocket",
        b"connection": b"Upgrade",
        b"sec-websocket-key": KEY,
        b"sec-websocket-version": b"13",
        b"sec-websocket-protocol": b"mqtt",
    }
    kept: Headers = [(n, v) for n, v in good.items() if n != without and n not in dict(changed)]
    head = Head(method, "1.1", "/mqtt", b"/mqtt", b"", [*kept, *changed], 0, keep_alive=False, expects_continue=False)
    return judge(WebSocketRoute("mqtt", take, origins), head, upgrade=upgrade)


def test_the_answer_proves_that_the_key_was_understood_and_names_the_subprotocol() -> None:
    upgrade = judged()
    lines = upgrade.response(b"date: now\r\n").decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 101 Switching Protocols"
    assert "sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in lines
    assert "sec-websocket-protocol: mqtt" in lines
    assert not any("extensions" in line for line in lines)
    assert upgrade.with_rest(b"ahead").rest == b"ahead"


@pytest.mark.parametrize(
    "headers",
    [
        [(b"upgrade", b"WebSocket")],
        [(b"upgrade", b"h2c, websocket")],
        [(b"sec-websocket-protocol", b"mqttv3.1, mqtt")],
        [(b"sec-websocket-protocol", b"mqttv3.1"), (b"sec-websocket-protocol", b"mqtt")],
        [(b"sec-websocket-extensions", b"permessage-deflate")],
    ],
)
def test_what_is_said_in_other_words_is_the_same(headers: Headers) -> None:
    assert judged(*headers).accept == judged().accept


@pytest.mark.parametrize(
    ("headers", "without", "status"),
    [
        ([], b"upgrade", 426),
        ([(b"upgrade", b"h2c")], b"", 426),
        ([], b"sec-websocket-version", 426),
        ([(b"sec-websocket-version", b"12")], b"", 426),
        ([(b"sec-websocket-version", b"13, 8")], b"", 426),
        ([], b"sec-websocket-key", 400),
        ([(b"sec-websocket-key", b"c2hvcnQ=")], b"", 400),
        ([(b"sec-websocket-key", b"no base64 at all!!!!!!!=")], b"", 400),
        ([(b"sec-websocket-key", KEY), (b"sec-websocket-key", KEY)], b"", 400),
        ([], b"sec-websocket-protocol", 400),
        ([(b"sec-websocket-protocol", b"MQTT")], b"", 400),  # subprotocols are compared to the letter
        ([(b"sec-websocket-protocol", b"wamp")], b"", 400),
    ],
)
def test_what_is_missing_or_wrong_is_refused(headers: Headers, without: bytes, status: int) -> None:
    with pytest.raises(Refused) as refused:
        judged(*headers, without=without)
    assert refused.value.refusal.status == status


def test_no_upgrade_and_other_methods_are_told_what_is_served() -> None:
    with pytest.raises(Refused) as refused:
        judged(upgrade=False)
    assert refused.value.refusal.status == 426
    assert (b"upgrade", b"websocket") in refused.value.refusal.headers
    with pytest.raises(Refused) as refused:
        judged(method="POST")
    assert refused.value.refusal.headers == ((b"allow", b"GET"),)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (b"https://gate.example:8443", b"gate.example:8443"),
        (b"https://GATE.example:8443", b"gate.EXAMPLE:8443"),
        (b"https://gate.example", b"gate.example:443"),
        (b"https://gate.example:443", b"gate.example"),
        (b"https://[::1]:8443", b"[::1]:8443"),
    ],
)
def test_this_hosts_own_pages_come_in(origin: bytes, host: bytes) -> None:
    assert judged((b"origin", origin), (b"host", host))


@pytest.mark.parametrize(
    "origin",
    [
        b"https://evil.example",
        b"https://gate.example",  # another port is another origin
        b"https://gate.example:84430",
        b"https://gate.example:8443.evil.example",
        b"http://gate.example:8443",  # a page that anybody on the network could have written
        b"null",
        b"",
        b"https://",
    ],
)
def test_pages_of_other_origins_are_refused_unless_they_are_configured(origin: bytes) -> None:
    with pytest.raises(Refused) as refused:
        judged((b"origin", origin), origins=frozenset({"https://console.example"}))
    assert refused.value.refusal.status == 403
    assert judged((b"origin", origin), origins=frozenset({origin.decode(), "https://console.example"}))
    assert judged((b"origin", origin), origins=frozenset({ANY_ORIGIN}))


def test_two_origins_are_none() -> None:
    with pytest.raises(Refused):
        judged((b"origin", b"https://gate.example:8443"), (b"origin", b"https://gate.example:8443"))


@given(st.lists(st.tuples(st.sampled_from([b"origin", b"sec-websocket-key", b"upgrade"]), st.binary(max_size=40))))
def test_any_headers_are_judged(headers: Headers) -> None:
    status = 101
    try:
        judged(*headers)
    except Refused as refused:
        status = refused.refusal.status
    assert status in (101, 400, 403, 426)
