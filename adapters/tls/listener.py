"""The listening socket of a TLS service: accepts, admits, and knows its live connections.

Theory
------
A listener owns everything that its connections share: the context (and so the certificate), the limits and their
ledger, the counters, and the one read buffer. It makes one `TlsTransport` per accepted socket; that one makes the inner
protocol when its handshake is finished.

`close` stops accepting and ends handshakes in flight; established connections are the protocol's to end, because only
the protocol knows how to say goodbye. Sharing the read buffer is safe because the loop fills it and hands it over in
one step; so a listener belongs to exactly one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from adapters.tls.admission import Ledger, TlsCounters, TlsLimits
from adapters.tls.context import TlsContext
from adapters.tls.stream import TlsTransport

# Two whole records: enough for bulk, and a flood of the smallest records costs about 2 ms before others get their turn.
_READ_BUFFER: Final = 32_768


class TlsListener:
    """Serves `protocol_factory` over TLS. `plaintext_hint` makes what a peer gets that speaks HTTP without TLS."""

    def __init__(
        self,
        context: TlsContext,
        protocol_factory: Callable[[], asyncio.Protocol],
        *,
        limits: TlsLimits | None = None,
        plaintext_hint: Callable[[], bytes] | None = None,
    ) -> None:
        self.context = context
        self.protocol_factory = protocol_factory
        self.limits = limits or TlsLimits()
        self.plaintext_hint = plaintext_hint
        self.counters = TlsCounters()
        self.ledger = Ledger(self.limits, self.counters)
        self.connections: set[TlsTransport] = set()
        self.closing = False
        """Whether it takes nobody any more."""
        self.read_buffer = memoryview(bytearray(_READ_BUFFER))
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen on `host` (a name or an address) and `port` (0: any free one). Returns the bound port.

        Raises OSError when the address cannot be bound; RuntimeError when already started.
        """
        if self._server is not None:
            raise RuntimeError("the listener is already started")
        self.closing = False
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: TlsTransport(self, loop), host, port, backlog=self.limits.backlog
        )
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Stop accepting and end unfinished handshakes. Established connections live on; end them with `abort_all`."""
        self.closing = True
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            if connection.tls is None:
                connection.abort()

    def abort_all(self) -> None:
        """Cut every connection."""
        for connection in list(self.connections):
            connection.abort()
