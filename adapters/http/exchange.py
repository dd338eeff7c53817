"""One request and its response, as the ASGI application sees them.

Theory
------
An exchange is made when the head is complete and runs as one task. The connection feeds the body in; the application
takes it out and sends a response. Whatever the application does, the peer gets either one complete, correctly framed
response or a connection that visibly breaks off.

    response:  NOTHING ──http.response.start──▶ STARTED ──last http.response.body──▶ COMPLETE
                   └────────── `detach` (peer gone, refused, drained) from any state ──▶ sends go nowhere

- A failure before the start becomes a 500 in the API's error shape; after it, the connection is cut, and the missing
  last chunk or bytes tell the client (RFC 9112 §8).
- The body is bounded by the connection (it stops reading above a mark); the response by `drained`.
- After `detach` the task is not cancelled: the application hears `http.disconnect` and may finish what it has begun in
  the database. Only the drain's deadline cancels.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final, Protocol

from adapters.http.answer import CONTINUE, STATUS_LINES, Code, Refusal, render
from adapters.http.request import Head

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
AsgiApp = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_LOG: Final = logging.getLogger("gatehouse.http")
_NAME_BREAKERS: Final = frozenset(b"\x00\r\n: ")


class LocalProtocolError(Exception):
    """The application broke ASGI or would have broken HTTP."""


class ExchangeOwner(Protocol):
    """What an exchange needs of its connection."""

    def write(self, data: bytes) -> None: ...

    async def drained(self) -> None: ...

    def date_line(self) -> bytes: ...

    def new_correlation_id(self) -> str: ...

    def body_consumed(self) -> None: ...

    def keeps_alive_after(self, exchange: Exchange) -> bool: ...

    def exchange_finished(self, exchange: Exchange, *, intact: bool) -> None: ...

    def count_app_failure(self) -> None: ...


class Exchange:
    """One request being answered by the application."""

    __slots__ = (
        "_changed",
        "_chunked",
        "_delivered",
        "_detached",
        "_owner",
        "_remaining",
        "body",
        "body_complete",
        "complete",
        "counted",
        "expects_continue",
        "half_closed",
        "head",
        "keep_alive",
        "spared",
        "started",
    )

    def __init__(self, owner: ExchangeOwner, head: Head) -> None:
        self._owner = owner
        self.head = head
        self.body = bytearray()
        self.body_complete = False
        self.keep_alive = head.keep_alive
        self.expects_continue = head.expects_continue
        self.started = False
        self.complete = False
        self.counted = False  # by the connection, as a request in flight
        self.spared = False  # by the connection, when a session on it ends
        self.half_closed = False
        self._delivered = False
        self._detached = False
        self._chunked = False
        self._remaining: int | None = None
        self._changed: asyncio.Event | None = None

    # What the connection tells

    def feed(self, data: bytes) -> None:
        """More of the body has arrived."""
        self.body += data
        self._wake()

    def end_body(self) -> None:
        """The body is complete."""
        self.body_complete = True
        self._wake()

    def end_of_peer(self) -> None:
        """The peer has stopped sending: the application hears a disconnect, its answer may still arrive."""
        self.half_closed = True
        self._wake()

    def detach(self) -> None:
        """The peer is gone or refused: nothing that the application sends reaches it any more."""
        self._detached = True
        self._wake()

    # What the application is given

    async def run(self, app: AsgiApp, scope: Scope) -> None:
        """Let the application answer, and settle whatever it leaves behind."""
        try:
            await app(scope, self.receive, self.send)
            if not self.complete and not self._detached:
                raise LocalProtocolError("the application returned without completing its response")
        except asyncio.CancelledError:
            self._settle(Refusal(503, Code.UNAVAILABLE, "the server is stopping", retry_after=1))
            raise
        except Exception:  # the end of this task
            correlation_id = self._owner.new_correlation_id()
            self._owner.count_app_failure()
            fields = {"method": self.head.method, "correlation_id": correlation_id}
            _LOG.exception("http.app_failed", extra={"fields": fields})
            self._settle(Refusal(500, Code.INTERNAL, "internal error"), correlation_id)

    async def receive(self) -> Message:
        """ASGI receive: the body in parts as they arrive, then `http.disconnect` when there is nothing to wait for."""
        if self.expects_continue and not self._detached:
            self.expects_continue = False
            if not self.body_complete and not self.started:
                self._owner.write(CONTINUE)
        while not (self.body or self._body_ends_now() or self._gone()):
            await self._wait()
        if self._detached or not (self.body or self._body_ends_now()):
            return {"type": "http.disconnect"}
        body = bytes(self.body)
        self.body.clear()
        self._owner.body_consumed()
        self._delivered = self.body_complete
        return {"type": "http.request", "body": body, "more_body": not self.body_complete}

    async def send(self, message: Message) -> None:
        """ASGI send. Raises LocalProtocolError when the message cannot follow the ones before it."""
        await self._owner.drained()
        if self._detached:
            # A generator that never looks at `receive` must not keep the loop to itself.
            await asyncio.sleep(0)
            return
        kind = message["type"]
        if self.complete:
            raise LocalProtocolError(f"{kind} was sent after the response was complete")
        if not self.started:
            if kind != "http.response.start":
                raise LocalProtocolError(f"{kind} was sent; http.response.start has to be first")
            self._start(int(message["status"]), message.get("headers", ()))
        else:
            if kind != "http.response.body":
                raise LocalProtocolError(f"{kind} was sent; http.response.body has to follow")
            self._send_body(bytes(message.get("body", b"")), last=not message.get("more_body", False))

    # Inside

    def _start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        if status not in STATUS_LINES:
            raise LocalProtocolError(f"status {status} was sent; 200 to 599 can be")
        self.keep_alive = self.keep_alive and self._owner.keeps_alive_after(self)
        parts = [STATUS_LINES[status]]
        dated = False
        for name, value in headers:
            name = name.lower()
            if not _NAME_BREAKERS.isdisjoint(name) or b"\n" in value or b"\r" in value or b"\0" in value:
                raise LocalProtocolError("a response header has a character that would break the framing")
            if name == b"content-length":
                if status == 204:
                    continue
                self._remaining = int(value)
            elif name == b"connection":
                self.keep_alive = self.keep_alive and b"close" not in value.lower()
                continue
            elif name in (b"transfer-encoding", b"keep-alive"):
                continue  # framing is ours
            elif name == b"date":
                dated = True
            parts += (name, b": ", value, b"\r\n")
        if not dated:
            parts.append(self._owner.date_line())
        if self.head.method == "HEAD" or status in (204, 304):
            self._remaining = 0
        elif self._remaining is None:
            if self.head.version == "1.1":
                self._chunked = True
                parts.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False  # RFC 9112 §6.3: the end of the connection ends the body
        parts.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        self.started = True
        self._owner.write(b"".join(parts))

    def _send_body(self, data: bytes, *, last: bool) -> None:
        if self.head.method == "HEAD":
            data = b""
        if self._remaining is not None:
            if len(data) > self._remaining or (last and len(data) < self._remaining):
                raise LocalProtocolError(f"{len(data)} bytes of body were sent where {self._remaining} were announced")
            self._remaining -= len(data)
        if self._chunked:
            if data:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if last:
                data += b"0\r\n\r\n"
        if data:
            self._owner.write(data)
        if last:
            self.complete = True
            self._wake()
            self._owner.exchange_finished(self, intact=True)

    def _settle(self, refusal: Refusal, correlation_id: str | None = None) -> None:
        if self.complete or self._detached:
            return
        intact = not self.started
        if intact:
            answer = refusal.answer(correlation_id or self._owner.new_correlation_id())
            head_only = self.head.method == "HEAD"
            self._owner.write(render(answer, self._owner.date_line(), keep_alive=False, head_only=head_only))
            self.started = True
        self.keep_alive = False
        self.complete = True
        self._owner.exchange_finished(self, intact=intact)

    def _gone(self) -> bool:
        return self._detached or self.complete or self.half_closed

    def _body_ends_now(self) -> bool:
        return self.body_complete and not self._delivered

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    async def _wait(self) -> None:
        # Made on demand: most requests are complete before anybody has to wait.
        if self._changed is None:
            self._changed = asyncio.Event()
        self._changed.clear()
        await self._changed.wait()
