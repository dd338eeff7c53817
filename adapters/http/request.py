"""What the head of a request means: its framing, its target, and every reason to refuse it.

Theory
------
llhttp has read the syntax and refused what is malformed: bare CR or LF, folded lines, control characters, spaces before
a colon, Content-Length twice or beside Transfer-Encoding. What is left to judge is meaning, where two parsers in a row
might disagree about where a request ends (RFC 9112 §11.2). The rule is: what could be read in two ways is refused.
Pure functions; a head in, a `Head` or a `Refused` out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from adapters.http.answer import Code, Refusal

Headers = list[tuple[bytes, bytes]]

# RFC 3986 §3.2.2 and §3.2.3, wide enough for names, addresses and ports, too narrow for userinfo or a path.
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_FRAMING: Final = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect"))
_CONTROL: Final = re.compile("[\x00-\x1f\x7f]")


class Refused(Exception):
    """The request cannot be served; `refusal` is the answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@dataclass(slots=True)
class Head:
    """A request's head as the server understands it. `length` is None for a chunked body, else the declared bytes.

    `path` is decoded text, `raw_path` and `query` are as sent. `path` is `*` for OPTIONS of the whole server. One that
    comes again on its connection may be the same object; `meaning` is free for whoever serves it, to read it once.
    """

    method: str
    version: str
    path: str
    raw_path: bytes
    query: bytes
    headers: Headers
    length: int | None
    keep_alive: bool
    expects_continue: bool
    meaning: Any = None


def read_head(method: str, version: str, target: bytes, headers: Headers, *, keep_alive: bool, upgrade: bool) -> Head:
    """Judge a syntactically correct head. `headers` have lower-case names. Raises Refused."""
    if version != "1.1" and version != "1.0":
        raise bad_request(f"HTTP/{version} was used; HTTP/1.1 and HTTP/1.0 are served")
    if method == "CONNECT":
        raise bad_request("CONNECT was asked; this server is not a proxy")
    length: int | None = 0
    hosts = 0
    expects_continue = False
    for name, value in headers:
        if name not in _FRAMING:
            continue
        if name == b"host":
            hosts += 1
            if _HOST.fullmatch(value) is None:
                raise bad_request("the Host header is not a host with an optional port")
        elif name == b"content-length":
            length = int(value)  # llhttp has let only digits pass, and only one such header
        elif name == b"transfer-encoding":
            _require_chunked(value, version)
            length = None
        else:
            expects_continue = value.lower() == b"100-continue" and version == "1.1"
    if hosts > 1 or (hosts == 0 and version == "1.1"):  # RFC 9112 §3.2
        raise bad_request(f"{hosts} Host headers were sent; exactly one is required")
    if upgrade and length != 0:
        # llhttp takes what follows the head of such a request for another protocol's bytes.
        raise bad_request("a request with a body asked for an upgrade; only one without a body may")
    path, raw_path, query = read_target(method, target)
    return Head(
        method=method,
        version=version,
        path=path,
        raw_path=raw_path,
        query=query,
        headers=headers,
        length=length,
        # An upgrade that is not served may be ignored (RFC 9110 §7.8); llhttp cannot go on after it, though.
        keep_alive=keep_alive and version == "1.1" and not upgrade,
        expects_continue=expects_continue,
    )


def read_target(method: str, target: bytes) -> tuple[str, bytes, bytes]:
    """Split a request target (RFC 9112 §3.2) into decoded path, raw path and query. Raises Refused."""
    if target == b"*":
        if method != "OPTIONS":
            raise bad_request("only OPTIONS may be asked of the whole server")
        return "*", b"*", b""
    if b"#" in target:
        raise bad_request("the request target has a fragment; fragments stay with the client")
    if not target.startswith(b"/"):
        target = _origin_form(target)
    raw_path, _, query = target.partition(b"?")
    try:
        path = raw_path.decode("ascii") if b"%" not in raw_path else unquote_to_bytes(raw_path).decode("utf-8")
    except UnicodeDecodeError:
        raise bad_request("the path is not percent-encoded UTF-8") from None
    if _CONTROL.search(path) is not None:
        raise bad_request("the path has control characters")
    return path, raw_path, query


def bad_request(message: str) -> Refused:
    """A refusal with status 400."""
    return Refused(Refusal(400, Code.INVALID_ARGUMENT, message))


def _require_chunked(value: bytes, version: str) -> None:
    if version != "1.1":  # RFC 9112 §6.1: its framing cannot be trusted
        raise bad_request("Transfer-Encoding was used with HTTP/1.0")
    if value.lower() != b"chunked":
        raise Refused(Refusal(501, Code.INVALID_ARGUMENT, "only the transfer coding `chunked` is served"))


def _origin_form(target: bytes) -> bytes:
    scheme, separator, rest = target.partition(b"://")
    if not separator or scheme.lower() not in (b"https", b"http"):
        raise bad_request("the request target is neither a path nor an http(s) URL")
    authority, slash, path = rest.partition(b"/")
    if not slash:
        authority, mark, query = rest.partition(b"?")
        path = mark + query
    if _HOST.fullmatch(authority) is None:
        raise bad_request("the request target's authority is not a host with an optional port")
    return b"/" + path
