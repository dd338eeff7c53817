"""One HTTPS connection: requests in, responses out, in order, within limits.

Theory
------
The parser (llhttp) calls back while it eats what TLS decrypted, at most one read (32 KiB) at a time. Requests are
answered one after another in the order of their arrival (RFC 9112 §9.3.2): at most one is `current`, the rest wait.

    reader.py:  bytes ──▶ requests, refusals, upgrades; what it hands over comes whole, or with its body still to come
    answering:  nothing ──▶ current (an exchange, a hot answer, a refusal) ──▶ next waiting, or nothing

What waits is one of
- `Exchange`: handed to the ASGI application as soon as its head is there; its body follows;
- `HotRequest`: a small, complete request of a path that the hot handler accepts. The handler answers at once or with
  a future; no task, no scope, one write;
- `Refusal`: the answer to bad input. It keeps its place in the order, is the last, and then the connection drains;
- `Upgrade`: the last, too. When its turn comes, everything of this connection ends but its transport, which goes on
  under another protocol, with what has been read already.

A request of which a read holds all, under a head that is known already, does not go through the parser (hot.py).

Bounds: a head is counted as it comes in and refused while it is still incomplete; a body by its announced length, or as
its chunks arrive; what is buffered for a slow application, or behind the current request, stops the reading of the
socket, so a connection holds no more than one read beyond its limits. One lazy timer per connection watches all times:
deadlines are plain numbers, the timer looks at them when it fires and arms itself for the next.

A connection is anonymous until the application sets `recognised`. Until then its peer has shown nothing that could be
taken away from it, so its times are shorter, and the bodies that it has not finished are counted by its address. A
request counts as in flight from its complete body on: who sends slowly holds a place of its own connection only.

What can race: the application may answer before the body has arrived; the peer may vanish at any point; the registry
may close the connection at any point. All of these `detach` the current exchange, once. What can be lost: responses
of requests behind a refusal, a close or a drain; clients may repeat requests that got no answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, assert_never, cast
from uuid import uuid4

from adapters.http.answer import Answer, Code, Refusal, render
from adapters.http.exchange import Exchange, Scope
from adapters.http.hot import HotRequest, Later
from adapters.http.reader import NEVER, Phase, RequestReader
from adapters.http.request import Head
from adapters.http.upgrade import Upgrade
from adapters.tls.stream import TlsTransport

if TYPE_CHECKING:
    from adapters.http.server import HttpsServer

_LOG: Final = logging.getLogger("gatehouse.http")

_DISCARDED_BODY: Final = 65_536  # what is still to come of a body that nobody wants, rather than closing


_Item = Exchange | HotRequest | Refusal | Upgrade
"""What is answered in its turn."""


class HttpConnection(asyncio.Protocol):
    """What the application finds as `scope["extensions"]["gatehouse.connection"]`."""

    __slots__ = (
        "__weakref__",
        "_close_callbacks",
        "_deaf",
        "_half_closed",
        "_idle_at",
        "_loop",
        "_lost",
        "_reader",
        "_server",
        "_stall_at",
        "_timer",
        "_transport",
        "_waiting",
        "_writable",
        "close_reason",
        "closed",
        "current",
        "id",
        "peer",
        "recognised",
        "session",
    )

    def __init__(self, server: HttpsServer, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._transport: TlsTransport | None = None
        self._lost: asyncio.Future[None] | None = None
        self._close_callbacks: list[Callable[[HttpConnection], None]] = []
        self._timer: asyncio.TimerHandle | None = None
        # Receiving
        self._reader = RequestReader(self, server, loop)
        self._deaf = False
        self._half_closed = False
        # Answering
        self.current: _Item | None = None
        self._waiting: deque[_Item] = deque()
        self._writable: asyncio.Event | None = None
        # Deadlines, in loop time; infinity when they do not apply
        self._idle_at = NEVER
        self._stall_at = NEVER
        # For the application
        self.id = uuid4().hex
        self.peer = ""
        self.closed = False
        self.close_reason: str | None = None
        self.recognised = False
        """For the application to set: a device or an operator has proved on this connection who it is."""
        self.session: object | None = None
        """Free for the application: the session that it opened for this connection."""

    # What the application may ask

    @property
    def peer_certificate_der(self) -> bytes | None:
        """The client's certificate, whose key it has proved to hold; nothing else about it has been checked."""
        return self._transport.peer_certificate_der if self._transport is not None else None

    @property
    def tls_version(self) -> str:
        """`TLSv1.3` or `TLSv1.2`; empty once closed."""
        tls = self._transport.tls if self._transport is not None else None
        return tls.version if tls is not None else ""

    async def close(self, reason: str) -> None:
        """End the connection with TLS's goodbye and return when its socket is closed.

        A response in flight is cut; its request hears `http.disconnect`. The first `reason` is kept in `close_reason`.
        Cancelling the caller leaves the close going on; a deadline is the caller's to set, `abort` is the next step.

        One answer is not cut: the one to an operator, before it has begun (`spare_answer`). Who revokes over the very
        connection that carries the device's session must hear what became of it. Nothing else is read or answered, the
        connection ends behind that answer, and this returns at once, as the answer may be waiting for it.
        """
        if self.closed:
            return
        current = self.current
        if isinstance(current, Exchange) and current.spared and current.body_complete and not current.started:
            self.close_reason = self.close_reason or reason
            self._deaf = True
            self._waiting.clear()
            current.keep_alive = False
            return
        self._end(reason)
        if self._lost is None:
            self._lost = self._loop.create_future()
        await asyncio.shield(self._lost)

    def abort(self) -> None:
        """Cut the connection now."""
        if self._transport is not None:
            self._transport.abort()

    def spare_answer(self) -> None:
        """The request being answered is an operator's: `close` lets it have its answer first."""
        if isinstance(self.current, Exchange):
            self.current.spared = True

    def rest(self) -> None:
        """The request being answered waits for news and costs no work meanwhile: it is in flight no longer."""
        if isinstance(self.current, Exchange):
            self._uncount(self.current)

    def add_close_callback(self, callback: Callable[[HttpConnection], None]) -> None:
        """Call `callback` once when the socket is closed, soon if it is already."""
        if self.closed:
            self._loop.call_soon(callback, self)
        else:
            self._close_callbacks.append(callback)

    # What the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = stream = cast(TlsTransport, transport)
        self.peer = stream.peer_address
        self._server.connections.add(self)
        if _LOG.isEnabledFor(logging.DEBUG):
            fields = {"connection": self.id, "peer": self.peer, "tls": self.tls_version}
            _LOG.debug("http.opened", extra={"fields": fields})
        # Until the first request the head's time counts, not the keep-alive time: nobody has shown any manners yet.
        self._idle_at = self._loop.time() + self._server.limits.header_timeout
        self._arm()

    def data_received(self, data: bytes) -> None:
        if self._deaf or self.closed:
            return
        reader = self._reader
        if (
            reader.phase is Phase.IDLE
            and not self._waiting
            and self._server.in_flight < self._server.limits.max_in_flight
        ):
            request = reader.known_request(data)
            if request is not None:
                self._server.counters.requests += 1
                self._idle_at = NEVER
                self.enqueue(request)
                return
        reader.feed(data)

    def eof_received(self) -> bool:
        self._deaf = True
        current = self.current
        if (
            isinstance(current, Refusal)
            or current is None
            or self._reader.receiving is not None
            or self._reader.body_parts is not None
        ):
            return False
        if isinstance(current, Exchange):
            if current.started:
                return False
            current.keep_alive = False
            current.end_of_peer()
        self._half_closed = True
        self._waiting.clear()
        self._idle_at = self._loop.time() + self._server.limits.half_close_grace
        if self._timer is not None:  # it may be armed for later than this
            self._timer.cancel()
            self._timer = None
        self._arm()
        return True

    def pause_writing(self) -> None:
        limits = self._server.limits
        allowed = limits.send_timeout if self.recognised else min(limits.send_timeout, limits.anonymous_send_timeout)
        self._stall_at = self._loop.time() + allowed
        if self._writable is None:
            self._writable = asyncio.Event()
        self._writable.clear()

    def resume_writing(self) -> None:
        self._stall_at = NEVER
        if self._writable is not None:
            self._writable.set()
        if self.current is None:
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._server.connections.discard(self)
        self._reader.close()
        if _LOG.isEnabledFor(logging.DEBUG):
            fields = {"connection": self.id, "peer": self.peer, "reason": self.close_reason}
            _LOG.debug("http.closed", extra={"fields": fields})
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._detach()
        self._transport = None
        if self._writable is not None:
            self._writable.set()
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)
        callbacks, self._close_callbacks = self._close_callbacks, []
        for callback in callbacks:
            callback(self)

    # What an exchange asks

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    async def drained(self) -> None:
        while self._stall_at != NEVER and self._writable is not None and not self.closed:
            await self._writable.wait()

    def date_line(self) -> bytes:
        return self._server.date_line()

    def new_correlation_id(self) -> str:
        return uuid4().hex

    def count_app_failure(self) -> None:
        self._server.counters.app_failures += 1

    def body_consumed(self) -> None:
        self.update_reading()

    def keeps_alive_after(self, exchange: Exchange) -> bool:
        """Whether the connection can go on after this response, judged when its head is written."""
        if self._server.draining:
            return False
        if exchange is not self._reader.receiving:
            return True
        # The body is not all here. A little is worth waiting for; a peer that waits for 100 Continue will not send it.
        length = exchange.head.length
        return (
            length is not None and length - self._reader.body_bytes <= _DISCARDED_BODY and not exchange.expects_continue
        )

    def exchange_finished(self, exchange: Exchange, *, intact: bool) -> None:
        if exchange is not self.current:
            return
        self.current = None
        if not intact:
            self.abort()  # no goodbye: the client must see that this was not the whole of it
            return
        self._after_answer(keep_alive=exchange.keep_alive)

    # What its reader asks, and tells

    @property
    def waiting(self) -> int:
        """Requests that were sent ahead of their answers."""
        return len(self._waiting)

    @property
    def is_reading(self) -> bool:
        """Whether the peer is listened to now."""
        return self._transport is not None and self._transport.is_reading()

    def request_begins(self) -> None:
        self._idle_at = NEVER

    def hear_no_more(self) -> None:
        self._deaf = True

    # Answering

    def enqueue(self, item: _Item) -> None:
        if self.current is None and not self._waiting and self._stall_at == NEVER:
            self._begin(item)
        else:
            self._waiting.append(item)
            self.update_reading()

    def _next(self) -> None:
        """Begin what waits, unless the peer must first take what it has been sent."""
        if self._waiting and self._stall_at == NEVER:
            self._begin(self._waiting.popleft())
            self.update_reading()

    def _begin(self, item: _Item) -> None:
        self.current = item
        self._idle_at = NEVER
        match item:
            case Exchange():
                self._start_task(item)
            case HotRequest():
                self._answer_hot(item)
            case Refusal():
                self._server.counters.refused(item.status)
                answer = item.answer(self.new_correlation_id())
                self.write(render(answer, self.date_line(), keep_alive=False))
                if self._transport is not None:
                    self._transport.close_draining()
            case Upgrade():
                self._hand_over(item)
            case _:
                assert_never(item)

    def _hand_over(self, upgrade: Upgrade) -> None:
        """Leave HTTP. What knows this connection, such as a session that was opened on it, sees it end."""
        transport = self._transport
        if self._server.draining or transport is None or transport.is_closing():
            self._begin(Refusal(503, Code.UNAVAILABLE, "the server is stopping", retry_after=1))
            return
        self._server.counters.upgraded += 1
        self.close_reason = "upgraded"
        self.write(upgrade.response(self.date_line()))
        self.connection_lost(None)
        upgrade.route.take(transport, upgrade.rest)

    def _start_task(self, exchange: Exchange) -> None:
        server = self._server
        task = self._loop.create_task(exchange.run(server.app, self._scope(exchange.head)))
        server.track(task)
        task.add_done_callback(partial(self._answered, exchange))
        if exchange.body_complete:
            self.count(exchange)

    def count(self, exchange: Exchange) -> None:
        if not exchange.counted:
            exchange.counted = True
            self._server.in_flight += 1

    def _answered(self, exchange: Exchange, _task: asyncio.Task[None]) -> None:
        self._uncount(exchange)

    def _uncount(self, exchange: Exchange) -> None:
        if exchange.counted:
            exchange.counted = False
            self._server.in_flight -= 1

    def _answer_hot(self, request: HotRequest) -> None:
        head = request.head
        if head.path == "*":
            self._send_answer(request, Answer(204, headers=((b"allow", b"GET, HEAD, POST, PUT, DELETE, OPTIONS"),)))
            return
        hot = self._server.hot
        assert hot is not None
        try:
            outcome = hot.handle(self, head, request.body)
        except Exception as error:  # as at the end of a connection task: one request's failure stays its own
            self._hot_failed(request, error)
            return
        self._server.counters.hot_requests += 1
        if isinstance(outcome, Answer):
            self._send_answer(request, outcome)
            return
        self._server.in_flight += 1
        if isinstance(outcome, Later):
            outcome.future.add_done_callback(partial(self._hot_done, request, outcome.answer))
        else:
            task = asyncio.ensure_future(outcome)
            self._server.track(task)
            task.add_done_callback(partial(self._hot_done, request, _result))

    def _hot_done(
        self, request: HotRequest, make: Callable[[asyncio.Future[Any]], Answer], done: asyncio.Future[Any]
    ) -> None:
        self._server.in_flight -= 1
        if done.cancelled():
            refusal = Refusal(503, Code.UNAVAILABLE, "the server is stopping", retry_after=1)
            self._send_answer(request, refusal.answer(self.new_correlation_id()))
            return
        try:
            answer = make(done)
        except Exception as error:  # as above
            self._hot_failed(request, error)
            return
        self._send_answer(request, answer)

    def _hot_failed(self, request: HotRequest, error: BaseException) -> None:
        correlation_id = self.new_correlation_id()
        self.count_app_failure()
        fields = {"method": request.head.method, "correlation_id": correlation_id}
        _LOG.error("http.hot_failed", extra={"fields": fields}, exc_info=error)
        self._send_answer(request, Refusal(500, Code.INTERNAL, "internal error").answer(correlation_id))

    def _send_answer(self, request: HotRequest, answer: Answer) -> None:
        if self.current is not request or self._transport is None:
            return  # the peer is gone; what the handler did stays done
        self.current = None
        head = request.head
        keep_alive = head.keep_alive and not self._half_closed and not self._server.draining
        head_only = head.method == "HEAD"
        self._transport.write(render(answer, self._server.date_line(), keep_alive=keep_alive, head_only=head_only))
        self._after_answer(keep_alive=keep_alive)

    def _after_answer(self, *, keep_alive: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if not keep_alive:
            self._deaf = True
            self._waiting.clear()
            if self._reader.phase is Phase.IDLE:
                self._transport.close()
            else:
                self._transport.close_draining()
            return
        if self._waiting:
            self._next()
        elif self._reader.phase is Phase.IDLE:
            self.become_idle()
        else:
            self.update_reading()

    def become_idle(self) -> None:
        if self._server.draining:
            self._end("drain")
            return
        limits = self._server.limits
        allowed = limits.keep_alive_timeout
        self._idle_at = self._loop.time() + (allowed if self.recognised else min(allowed, limits.anonymous_keep_alive))
        self.update_reading()

    def update_reading(self) -> None:
        if self._transport is None:
            return
        receiving = self._reader.receiving
        backlog = len(receiving.body) if receiving is not None and not receiving.complete else 0
        if self._waiting or backlog > self._server.limits.max_buffered_body:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _scope(self, head: Head) -> Scope:
        transport = self._transport
        client = transport.get_extra_info("peername") if transport is not None else None
        local = transport.get_extra_info("sockname") if transport is not None else None
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.version,
            "method": head.method,
            "scheme": "https",
            "path": head.path,
            "raw_path": head.raw_path,
            "query_string": head.query,
            "root_path": "",
            "headers": head.headers,
            "client": client[:2] if client else None,
            "server": local[:2] if local else None,
            "extensions": {"gatehouse.connection": self},
        }

    # Refusing

    def refuse(self, refusal: Refusal) -> None:
        self._deaf = True
        exchange = self._reader.give_up()
        if exchange is None:
            self.enqueue(refusal)
            return
        # The request being received is already with the application, or waits to be: always the newest.
        if self._waiting:
            self._waiting[-1] = refusal
            return
        exchange.detach()
        if exchange.started or exchange is not self.current:
            self._server.counters.refused(refusal.status)
            self._cut()
            return
        self.current = None
        self.enqueue(refusal)

    def _cut(self) -> None:
        self.current = None
        if self._transport is not None:
            self._transport.close_draining()

    # Ending

    def drain(self) -> None:
        """Close as soon as nothing is being answered; a request half received is given up."""
        if self.current is None and not self._waiting and self._reader.phase is not Phase.BODY:
            self._end("drain")

    def _end(self, reason: str) -> None:
        if self.close_reason is None:
            self.close_reason = reason
        self._deaf = True
        self._detach()
        if self._transport is not None:
            self._transport.close()

    def _detach(self) -> None:
        current, self.current = self.current, None
        if isinstance(current, Exchange):
            current.detach()
        self._reader.receiving = None
        self._waiting.clear()

    # Time

    def _arm(self) -> None:
        """Fire at the earliest deadline, and at least as often as the shortest time allowed: then any deadline that is
        set meanwhile is met without touching the timer."""
        if self._timer is None and not self.closed:
            now = self._loop.time()
            earliest = min(self._reader.check_at, self._idle_at, self._stall_at, now + self._server.shortest_timeout)
            self._timer = self._loop.call_at(earliest, self._look_at_clock)

    def _look_at_clock(self) -> None:
        self._timer = None
        now = self._loop.time()
        if now >= self._stall_at:
            self._server.counters.stalled += 1
            self.close_reason = self.close_reason or "stalled"
            self.abort()
            return
        if now >= self._idle_at:
            self._server.counters.idle_closed += not self._half_closed
            self._end("half-closed" if self._half_closed else "idle")
            return
        if now >= self._reader.check_at:
            self._reader.check_progress(now)
        self._arm()


def _result(done: asyncio.Future[Answer]) -> Answer:
    return done.result()
