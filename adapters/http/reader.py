"""The receiving half of an HTTPS connection: bytes in, requests out, each counted against its limits as it comes.

    IDLE ──first byte──▶ HEAD ──empty line──▶ BODY ──end──▶ IDLE           refusal, last request: nothing more is read

Theory
------
The parser (llhttp) calls back while it eats one read of at most 32 KiB. A head is counted as it comes in and refused
while it is still incomplete; a body by its announced length, or as its chunks arrive. What is complete, or is to be
answered while it still comes, goes to the connection, which answers one after another; this half never answers itself.

`check_at` is when progress is looked at: a head has to be complete by then, a body to have come on. It is a plain
number; the connection's one timer looks at it. An anonymous peer's unfinished bodies are counted by its address.

What can be lost: the request at hand, when the connection refuses, closes or drains; nobody has been told of it yet.
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NoReturn

import httptools

from adapters.http.answer import CONTINUE, Code, Refusal
from adapters.http.exchange import Exchange
from adapters.http.hot import HotRequest, KnownHeads
from adapters.http.request import Head, Headers, Refused, read_head
from adapters.http.upgrade import Upgrade, judge

if TYPE_CHECKING:
    from adapters.http.connection import HttpConnection
    from adapters.http.server import HttpsServer

NEVER: Final = float("inf")


class Phase(Enum):
    """Where in a request the next byte belongs."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()


class _Enough(Exception):
    """The last request of the connection has been read; what follows it is not."""


class RequestReader:
    """That of one connection. The public attributes are for the connection, the `on_…` methods for the parser."""

    __slots__ = (
        "_body_ends_by",
        "_body_framing",
        "_body_held",
        "_body_limit",
        "_body_mark",
        "_connection",
        "_feeding",
        "_head",
        "_head_fed",
        "_headers",
        "_loop",
        "_parser",
        "_read",
        "_read_size",
        "_server",
        "_target",
        "_trailer_bytes",
        "_upgrade",
        "body_bytes",
        "body_parts",
        "check_at",
        "known_heads",
        "last_seen",
        "phase",
        "receiving",
    )

    def __init__(self, connection: HttpConnection, server: HttpsServer, loop: asyncio.AbstractEventLoop) -> None:
        self._connection = connection
        self._server = server
        self._loop = loop
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._feeding = False
        self.phase = Phase.IDLE
        self.last_seen = False
        """What has been read is the last request."""
        self._target = b""
        self._headers: Headers = []
        self._trailer_bytes = 0
        self._head_fed = 0
        self._read_size = 0
        self._head: Head | None = None
        self._read = b""  # what the parser is being fed, if it began with a request whose head may become known
        self.known_heads = KnownHeads()
        self.receiving: Exchange | None = None
        """The request at hand, if the application has it already."""
        self._upgrade: Upgrade | None = None
        self.body_parts: list[bytes] | None = None
        """The body at hand, if it is kept here until it is whole."""
        self.body_bytes = 0
        self._body_framing = 0
        self._body_limit = 0
        self._body_mark = 0
        self._body_held = False  # counted by address
        self.check_at = NEVER
        """Loop time at which `check_progress` has something to do."""
        self._body_ends_by = NEVER

    def known_request(self, data: bytes) -> HotRequest | None:
        """The request that a read between two requests is as a whole, if its head is known. Nothing is kept of it."""
        if not self.known_heads or self.last_seen:
            return None
        return self.known_heads.request_in(data)

    def feed(self, data: bytes) -> None:
        """Take one read. What is wrong with it is refused by the connection."""
        parser = self._parser
        if parser is None:
            return
        if self.phase is Phase.IDLE and not self.known_heads.full:
            self._read = data
        self._read_size = len(data)
        self._feeding = True
        try:
            self._parse(parser, data)
        finally:
            self._feeding = False
            if self._parser is None:
                del self._connection

    def give_up(self) -> Exchange | None:
        """Read no more of the request at hand; the application's part of it, if it has one."""
        self.check_at = NEVER
        self._let_go_of_body()
        self.body_parts = None
        exchange, self.receiving = self.receiving, None
        return exchange

    def close(self) -> None:
        """The connection is gone. Nothing refers to it from here, so it is freed without a look for cycles."""
        self._let_go_of_body()
        self._parser = None
        if not self._feeding:
            del self._connection

    def _parse(self, parser: httptools.HttpRequestParser, data: bytes) -> None:
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            self._connection.hear_no_more()  # the last request: it becomes an upgrade, or was served as a plain one
            upgrade, self._upgrade = self._upgrade, None
            if upgrade is not None:
                self._connection.enqueue(upgrade.with_rest(data[stopped.args[0] :]))
        except httptools.HttpParserError as error:
            self._parse_failed(error)
        else:
            self._read = b""
            if self.phase is not Phase.IDLE:
                self._incomplete()

    # What the parser tells

    def on_message_begin(self) -> None:
        if self.last_seen:
            raise _Enough
        if self._connection.waiting >= self._server.limits.max_pipelined:
            self._stop(
                Refusal(
                    429,
                    Code.RESOURCE_EXHAUSTED,
                    f"more than {self._server.limits.max_pipelined} requests were sent ahead of their answers",
                    retry_after=1,
                )
            )
        self.phase = Phase.HEAD
        self.check_at = NEVER
        self._connection.request_begins()
        self._target = b""
        self._headers = []
        self._head_fed = 0

    def on_url(self, part: bytes) -> None:
        self._target += part
        if len(self._target) > self._server.limits.max_target_bytes:
            allowed = self._server.limits.max_target_bytes
            self._stop(
                Refusal(414, Code.INVALID_ARGUMENT, f"the request target is longer than the allowed {allowed} bytes")
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.phase is Phase.HEAD:
            self._headers.append((name.lower(), value.rstrip(b" \t")))
            return
        # Trailers: counted and forgotten. They must never join the headers that the application trusts.
        self._trailer_bytes += len(name) + len(value) + 4
        allowed = self._server.limits.max_trailer_bytes
        if self._trailer_bytes > allowed:
            self._stop(_too_large_headers(f"more than {allowed} bytes of trailers"))

    def on_headers_complete(self) -> None:
        parser = self._parser
        assert parser is not None
        server = self._server
        self._check_head_size()
        head = read_head(
            parser.get_method().decode("ascii"),
            parser.get_http_version(),
            self._target,
            self._headers,
            keep_alive=parser.should_keep_alive(),
            upgrade=parser.should_upgrade(),
        )
        route = server.upgrades.get(head.path)
        if route is not None:
            self._upgrade = judge(route, head, upgrade=parser.should_upgrade())
        limits = server.limits
        length = head.length
        self._body_limit = limits.body_overrides.get(head.path, limits.max_body_bytes)
        if length is not None and length > self._body_limit:
            self._stop(_too_large_body(self._body_limit))
        if self._overloaded:
            self._stop(_OVERLOADED)
        self.phase = Phase.BODY
        self.check_at = NEVER
        self._head = head
        self.body_bytes = self._body_framing = self._trailer_bytes = 0
        server.counters.requests += 1
        if self._upgrade is not None:
            return
        if head.path == "*" or (
            server.hot is not None
            and length is not None
            and length <= limits.max_buffered_body
            and server.hot.accepts(head.method, head.path)
        ):
            self.body_parts = []
            if head.expects_continue and length and self._connection.current is None:
                self._connection.write(CONTINUE)
            return
        self.receiving = exchange = Exchange(self._connection, head)
        if length == 0:
            exchange.body_complete = True
        self._connection.enqueue(exchange)

    @property
    def _overloaded(self) -> bool:
        return self._server.in_flight >= self._server.limits.max_in_flight

    def _check_head_size(self) -> None:
        limits = self._server.limits
        if len(self._headers) > limits.max_header_count:
            self._stop(_too_large_headers(f"more than {limits.max_header_count} headers"))
        if self._head_fed + self._read_size <= limits.max_header_bytes:
            return  # the usual head came whole in one small read
        size = len(self._target) + sum(len(name) + len(value) + 4 for name, value in self._headers)
        if size > limits.max_header_bytes:
            self._stop(_too_large_headers(f"more than {limits.max_header_bytes} bytes of headers"))

    def on_body(self, part: bytes) -> None:
        self.body_bytes += len(part)
        if self.body_bytes > self._body_limit:
            self._stop(_too_large_body(self._body_limit))
        if self.body_parts is not None:
            self.body_parts.append(part)
        elif self.receiving is not None and not self.receiving.complete:
            self.receiving.feed(part)

    def on_message_complete(self) -> None:
        late = self.receiving
        if (
            late is not None
            and late is self._connection.current
            and not (late.counted or late.started)
            and self._overloaded
        ):
            self._stop(_OVERLOADED)
        self.phase = Phase.IDLE
        self.check_at = NEVER
        self._let_go_of_body()
        head, self._head = self._head, None
        assert head is not None
        self.last_seen = not head.keep_alive
        if self.body_parts is not None:
            parts, self.body_parts = self.body_parts, None
            if self._read:
                self.known_heads.keep(self._read, head)
            self._connection.enqueue(HotRequest(head, parts[0] if len(parts) == 1 else b"".join(parts)))
        elif self.receiving is not None:
            exchange, self.receiving = self.receiving, None
            if exchange is self._connection.current and not exchange.complete:
                self._connection.count(exchange)
            exchange.end_body()
            if exchange.complete and self._connection.current is None:
                self._connection.become_idle()

    def _stop(self, refusal: Refusal) -> NoReturn:
        """From inside a parser callback: stop the parser; it hands the exception on and `data_received` answers."""
        raise Refused(refusal)

    def _parse_failed(self, error: httptools.HttpParserError) -> None:
        if self.last_seen:
            self._connection.hear_no_more()
            return
        cause = error.__context__
        if isinstance(cause, Refused):
            self._connection.refuse(cause.refusal)
        elif isinstance(error, httptools.HttpParserCallbackError):
            raise error  # our bug, not the peer's
        else:
            # llhttp's reasons are constants and quote no input.
            self._connection.refuse(Refusal(400, Code.INVALID_ARGUMENT, f"not a valid HTTP/1.1 request: {error}"))

    def _incomplete(self) -> None:
        """A read ended inside a request: count what no callback has seen, and start its clocks."""
        limits = self._server.limits
        first_read = self.check_at == NEVER
        if self.phase is Phase.HEAD:
            if first_read:
                self.check_at = self._loop.time() + limits.header_timeout
                return
            # A name or value that is not finished has had no callback yet, so what was fed is counted instead, from
            # the second read on: the first may have had other requests in it.
            self._head_fed += self._read_size
            if self._head_fed > limits.max_header_bytes:
                self._connection.refuse(_too_large_headers(f"more than {limits.max_header_bytes} bytes of headers"))
            return
        if first_read:
            now = self._loop.time()
            self._body_mark = self.body_bytes
            self._body_ends_by = now + limits.anonymous_body_timeout
            self.check_at = now + limits.body_grace
            if not self._connection.recognised:
                self._hold_body()
        elif self._head is not None and self._head.length is None:
            self._body_framing += self._read_size
            if self._body_framing - self.body_bytes * 9 > limits.max_chunk_overhead:
                allowed = limits.max_chunk_overhead
                message = f"chunk sizes and extensions take more than {allowed} bytes beyond the content"
                self._connection.refuse(Refusal(400, Code.INVALID_ARGUMENT, message))
                return
        self._connection.update_reading()

    def _hold_body(self) -> None:
        """Count a body that did not come in one piece, on an anonymous connection."""
        self._body_held = self._server.bodies.enter(self._connection.peer)
        if not self._body_held:
            most = self._server.limits.bodies_per_address
            message = f"this address has not finished the {most} requests that it may send at once"
            self._connection.refuse(Refusal(429, Code.RESOURCE_EXHAUSTED, message, retry_after=1))

    def _let_go_of_body(self) -> None:
        if self._body_held:
            self._body_held = False
            self._server.bodies.leave(self._connection.peer)

    # Time

    def check_progress(self, now: float) -> None:
        """What was to come by `check_at` has not, or not fast enough; or it has, and the next check is set."""
        window, rate = self._server.limits.body_grace, self._server.limits.min_body_rate
        if self.phase is Phase.HEAD:
            allowed = self._server.limits.header_timeout
            message = f"the request's headers were not complete within {allowed:g} seconds"
            self._connection.refuse(Refusal(408, Code.INVALID_ARGUMENT, message))
            return
        receiving = self.receiving
        excused = not self._connection.is_reading
        excused = excused or (receiving is not None and receiving.expects_continue)
        if not excused and not self._connection.recognised and now >= self._body_ends_by:
            allowed = self._server.limits.anonymous_body_timeout
            message = f"the request's body was not complete within {allowed:g} seconds"
            self._connection.refuse(Refusal(408, Code.INVALID_ARGUMENT, message))
            return
        if not excused and self.body_bytes - self._body_mark < rate * window:
            message = f"the request's body came slower than {rate} bytes per second"
            self._connection.refuse(Refusal(408, Code.INVALID_ARGUMENT, message))
            return
        self._body_mark = self.body_bytes
        self.check_at = now + window


_OVERLOADED: Final = Refusal(503, Code.UNAVAILABLE, "the server is answering as many requests as it can", retry_after=1)


def _too_large_headers(what: str) -> Refusal:
    return Refusal(431, Code.INVALID_ARGUMENT, f"{what} were sent; that is the limit")


def _too_large_body(allowed: int) -> Refusal:
    return Refusal(413, Code.INVALID_ARGUMENT, f"the request's body is larger than the allowed {allowed} bytes")
