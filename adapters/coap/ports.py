"""The seam between the CoAP message layer and the resources behind it.

    datagrams ─► message layer (exchanges, observations, block-wise) ─► Handler.handle(peer, request) ─► Response

The message layer gives whole requests: deduplicated (RFC 7252 §4.2), reassembled from Block1 (RFC 7959), with options
that it understands, and with every unknown critical one refused already (RFC 7252 §5.4.1). It slices large responses
into Block2 by itself. A handler never sees a message id, a block number or a retransmission.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from aiocoap.numbers.codes import Code


class Request(msgspec.Struct, frozen=True, gc=False):
    """One whole request."""

    method: Code
    path: tuple[str, ...] = ()
    query: tuple[str, ...] = ()
    payload: bytes = b""
    content_format: int | None = None
    accept: int | None = None
    if_match: tuple[bytes, ...] = ()
    if_none_match: bool = False
    etags: tuple[bytes, ...] = ()


class Response(msgspec.Struct, frozen=True, gc=False):
    """One whole response or notification."""

    code: Code
    payload: bytes = b""
    content_format: int | None = None
    max_age: int | None = None
    """Seconds (RFC 7252 §5.10.5); None leaves the option out, which means 60."""
    etag: bytes | None = None
    location_path: tuple[str, ...] = ()
    location_query: tuple[str, ...] = ()
    size1: int | None = None
    """With 4.13: bytes of the largest body that this resource takes (RFC 7959 §2.9.3)."""
    separate: bool = False
    """As a confirmable message of its own (RFC 7252 §5.2.2), which is repeated until it has arrived. No notification of
    the observation goes out before that: who got one first would take it for this answer."""


class Observation(Protocol):
    """An interest that the client has registered with this request (RFC 7641). Offered; `accept` takes it."""

    def accept(self, cancelled: Callable[[], None]) -> None:
        """Keep it. `cancelled` is called once when the client, its silence or the end of its peer ends it.

        So it is when `handle` then answers with an error. It is not called for what the handler ends by itself: `end`,
        or an error as notification. To call it a second time is our bug.
        """

    def notify(self, response: Response, delivered: Callable[[], None] | None = None) -> None:
        """Send the newest state; of several that wait only the last one is sent. An error code ends the observation.

        Valid from `accept` on, and before `handle` has answered too: it is sent after the answer. With `delivered` the
        notification is a confirmable one, and `delivered` is called when the client has acknowledged it; it is never
        called when a newer state has taken its place or the observation ends before. After the end this does nothing.
        """

    def end(self) -> None:
        """Forget it without a word."""


class Peer(Protocol):
    """Whoever asks, as the handler knows it."""

    @property
    def peer_id(self) -> str:
        """Opaque; for a DTLS association its id."""

    @property
    def address(self) -> str: ...

    context: Any
    """The handler's own; None at first."""


class Promise(msgspec.Struct, frozen=True):
    """An answer that hangs on a future alone; the message layer needs no task to wait for it."""

    future: asyncio.Future[Any]
    answer: Callable[[asyncio.Future[Any]], Response]
    """What the future, which is done and not cancelled, says in CoAP's words. What it raises is a 5.00 and our bug."""


Prompt = Callable[["Peer", Request], "Promise | Response | None"]
"""Asked first about every request that offers no observation; None leaves it to `Handler.handle`, and nothing has
happened then. Must not wait. What it raises is a 5.00 and our bug."""


class Handler(Protocol):
    """The resources."""

    async def handle(self, peer: Peer, request: Request, observation: Observation | None) -> Response:
        """The answer. `observation` is there where the client asks to observe by GET or FETCH with Observe 0.

        May take its time: a separate response follows then (RFC 7252 §5.2.2). What it raises is a 5.00 and our bug.
        """
