"""WebSocket's opening handshake: what a request must have to leave HTTP, and who may take the connection over.

    request head ──judge──▶ Refused: an ordinary answer, and the last one of its connection
                     └────▶ Upgrade ──its turn among the answers──▶ 101 ──▶ the route's `take`

The handshake (RFC 6455 §4.2) is HTTP's business and so stands here; the frames are the other protocol's, which knows
nothing of HTTP and is handed the TLS transport. Pure functions: a head in, an `Upgrade` or a `Refused` out.

Origins. A browser asks for a WebSocket of any host on behalf of any page, and shows the user's client certificate
without asking the page's owner (cross-site WebSocket hijacking, RFC 6455 §10.2). It always says which page asks. So an
Origin, where there is one, must be this very host, as the Host header and the certificate name it, or be configured.
Whoever is no browser can claim any origin, but carries nobody else's certificate either.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from wsproto.utilities import generate_accept_token

from adapters.http.answer import Code, Refusal
from adapters.http.request import Head, Refused, bad_request
from adapters.tls.stream import TlsTransport

ANY_ORIGIN: Final = "*"
_VERSION: Final = b"13"  # RFC 6455 §4.1; every other number was a draft's
_KEY_BYTES: Final = 16  # RFC 6455 §4.2.1


@dataclass(frozen=True, slots=True)
class WebSocketRoute:
    """A path that becomes a WebSocket.

    `take(transport, rest)` is called when 101 is written: it must set the transport's protocol and read on. `rest` is
    what the peer has sent behind its request without waiting, at most a read. `origins` are further origins, such as
    `https://console.example`, beside the host's own; `ANY_ORIGIN` among them lets every page in.
    """

    subprotocol: str
    take: Callable[[TlsTransport, bytes], None]
    origins: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Upgrade:
    """An accepted handshake that waits for its turn. `accept` proves to the client that its key was understood."""

    route: WebSocketRoute
    accept: bytes
    rest: bytes = b""

    def with_rest(self, rest: bytes) -> Upgrade:
        """The same, with what came behind the request."""
        return replace(self, rest=rest)

    def response(self, date_line: bytes) -> bytes:
        """101, RFC 6455 §4.2.2. No extension is ever accepted: compression beside secrets leaks them."""
        return b"".join(
            (
                b"HTTP/1.1 101 Switching Protocols\r\n",
                date_line,
                b"upgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: ",
                self.accept,
                b"\r\nsec-websocket-protocol: ",
                self.route.subprotocol.encode(),
                b"\r\n\r\n",
            )
        )


def judge(route: WebSocketRoute, head: Head, *, upgrade: bool) -> Upgrade:
    """What this request becomes. `upgrade`: it has `Connection: upgrade` and an Upgrade header. Raises Refused."""
    if head.method != "GET":
        allow = ((b"allow", b"GET"),)
        raise Refused(Refusal(405, Code.INVALID_ARGUMENT, "only GET opens a WebSocket", headers=allow))
    if not upgrade or b"websocket" not in (each.lower() for each in _list(head, b"upgrade")):
        raise _upgrade_required("this path is a WebSocket; ask for the upgrade")
    if _list(head, b"sec-websocket-version") != [_VERSION]:
        raise _upgrade_required("the WebSocket version served is 13", (b"sec-websocket-version", _VERSION))
    keys = _list(head, b"sec-websocket-key")
    if len(keys) != 1 or not _is_key(keys[0]):
        raise bad_request("Sec-WebSocket-Key is not 16 bytes in base64")
    if route.subprotocol.encode() not in _list(head, b"sec-websocket-protocol"):
        raise bad_request(f"the WebSocket subprotocol {route.subprotocol} was not offered; it is the one served")
    if not _welcome(route, head):
        message = "pages of this origin may not open a WebSocket here; https.websocket_origins lists further ones"
        raise Refused(Refusal(403, Code.PERMISSION_DENIED, message))
    return Upgrade(route, generate_accept_token(keys[0]))


def _upgrade_required(message: str, *more: tuple[bytes, bytes]) -> Refused:
    headers = ((b"upgrade", b"websocket"), (b"connection", b"upgrade"), *more)  # RFC 9110 §15.5.22
    return Refused(Refusal(426, Code.INVALID_ARGUMENT, message, headers=headers))


def _list(head: Head, wanted: bytes) -> list[bytes]:
    """The members of a list-valued header, RFC 9110 §5.6.1; a header sent twice is one list."""
    members = (each.strip() for name, value in head.headers if name == wanted for each in value.split(b","))
    return [each for each in members if each]


def _is_key(key: bytes) -> bool:
    try:
        return len(binascii.a2b_base64(key, strict_mode=True)) == _KEY_BYTES
    except binascii.Error:
        return False


def _welcome(route: WebSocketRoute, head: Head) -> bool:
    origins = [value for name, value in head.headers if name == b"origin"]
    if not origins or ANY_ORIGIN in route.origins:
        return True
    if len(origins) > 1:
        return False
    origin = origins[0].decode("latin-1").lower()
    if origin in route.origins:
        return True
    host = next((value for name, value in head.headers if name == b"host"), b"").decode("latin-1").lower()
    scheme, _, asking = origin.partition("://")
    # The default port is left out by browsers, RFC 6454 §6.2, and may be written by others.
    return scheme == "https" and asking != "" and asking.removesuffix(":443") == host.removesuffix(":443")
