"""The HTTPS server: an ASGI application behind the TLS shell.

Theory
------
    NEW ──start()──▶ SERVING ──drain(seconds)──▶ DRAINING ──▶ STOPPED
`drain` refuses new sockets, closes idle connections, answers what has been asked (with `Connection: close`), and at the
deadline cancels what still runs, event streams above all; a second later it cuts what is left. Nothing survives it.

The server holds what its connections share: the application, the limits, the hot handler, the counters. It has no
signal handling, no access log and no configuration of its own; those belong to the process. The application is started
and stopped by whoever made it: there is no ASGI lifespan.

A connection that became a WebSocket is its new protocol's from then on, to count, to time and to end; of this server's
it only keeps its place among the listener's connections. `drain` leaves it alone.

What can race: a connection may appear while draining starts (its handshake had just finished): it is in `connections`
and is closed with the others, or at its first idle moment. What can be lost: responses cut by the deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final
from uuid import uuid4

from adapters.http.answer import Code, DateLine, Refusal, render
from adapters.http.connection import HttpConnection
from adapters.http.exchange import AsgiApp
from adapters.http.hot import HotHandler
from adapters.http.limits import Bodies, HttpCounters, HttpLimits
from adapters.http.upgrade import WebSocketRoute
from adapters.tls.admission import TlsCounters, TlsLimits
from adapters.tls.context import TlsContext
from adapters.tls.listener import TlsListener

_LAST_WORDS: Final = 1.0  # seconds for cancelled requests to send their 503 before everything is cut


class HttpsServer:
    """Serves `app` with HTTP/1.1 over TLS. `hot`, when given, is asked before the application; the paths in `upgrades`
    become WebSockets and are neither's."""

    def __init__(
        self,
        app: AsgiApp,
        tls_context: TlsContext,
        *,
        limits: HttpLimits | None = None,
        tls_limits: TlsLimits | None = None,
        hot: HotHandler | None = None,
        upgrades: Mapping[str, WebSocketRoute] = MappingProxyType({}),
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.app = app
        self.hot = hot
        self.upgrades = upgrades
        self.limits = limits or HttpLimits()
        self.counters = HttpCounters()
        self.connections: set[HttpConnection] = set()
        self.in_flight = 0
        self.bodies = Bodies(self.limits.bodies_per_address)
        self.draining = False
        self.date_line = DateLine(wall_clock)
        self.shortest_timeout = min(
            self.limits.header_timeout,
            self.limits.body_grace,
            self.limits.anonymous_body_timeout,
            self.limits.keep_alive_timeout,
            self.limits.anonymous_keep_alive,
            self.limits.send_timeout,
            self.limits.anonymous_send_timeout,
        )
        self._tasks: set[asyncio.Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener = TlsListener(
            tls_context, self._new_connection, limits=tls_limits, plaintext_hint=self._plaintext_hint
        )

    @property
    def tls_counters(self) -> TlsCounters:
        """The counts of the TLS listener below."""
        return self._listener.counters

    async def start(self, host: str, port: int) -> int:
        """Listen on `host` (a name or an address) and `port` (0: any free one). Returns the bound port.

        Raises OSError when the address cannot be bound.
        """
        self._loop = asyncio.get_running_loop()
        return await self._listener.start(host, port)

    async def drain(self, seconds: float) -> None:
        """Stop serving: politely for `seconds`, then not. Returns when every connection is closed and no request runs.
        A second call waits for nothing more than what is left."""
        self.draining = True
        await self._listener.close()
        for connection in list(self.connections):
            connection.drain()
        if not await self._all_closed(seconds):
            for task in list(self._tasks):
                task.cancel()
            if not await self._all_closed(_LAST_WORDS):
                for connection in list(self.connections):
                    connection.abort()
                await self._all_closed(_LAST_WORDS)
        if self._tasks:  # answered already, but still running
            for task in list(self._tasks):
                task.cancel()
            await asyncio.wait(list(self._tasks), timeout=_LAST_WORDS)

    def track(self, task: asyncio.Future[Any]) -> None:
        """Hold a request's task until it is done; it is cancelled at the end of the drain."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _new_connection(self) -> HttpConnection:
        assert self._loop is not None
        return HttpConnection(self, self._loop)

    def _plaintext_hint(self) -> bytes:
        refusal = Refusal(400, Code.INVALID_ARGUMENT, "plain HTTP was sent to an HTTPS port; use https://")
        return render(refusal.answer(uuid4().hex), self.date_line(), keep_alive=False)

    async def _all_closed(self, seconds: float) -> bool:
        """Whether all connections closed within `seconds`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        for connection in list(self.connections):
            gone = loop.create_future()
            connection.add_close_callback(lambda _closed, gone=gone: gone.done() or gone.set_result(None))  # type: ignore[misc]
            done, _ = await asyncio.wait((gone,), timeout=max(0.0, deadline - loop.time()))
            if not done:
                return False
        return True
