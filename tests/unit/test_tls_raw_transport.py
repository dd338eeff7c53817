"""The TLS shell on a raw transport of the test's own, which tells it of things when sockets seldom do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from OpenSSL import SSL

from adapters.tls.admission import TlsLimits
from adapters.tls.context import TlsContext
from adapters.tls.listener import TlsListener
from adapters.tls.stream import TlsTransport
from tests.tls_peers import make_certificate

SERVER = make_certificate()
LARGE = b"1" * 40_000


class Raw:
    """The raw transport, as asyncio's and uvloop's: it says `pause_writing` in the middle of a write."""

    def __init__(self) -> None:
        self.sent = b""
        self.waiting = b""
        self.room = 1 << 30
        self.closed = self.aborted = False
        self.above: TlsTransport | None = None

    def write(self, data: bytes) -> None:
        assert not self.closed, "written after the end"
        assert self.above is not None
        full = bool(self.waiting)
        self.waiting += data
        self.sent, self.waiting = self.sent + self.waiting[: self.room], self.waiting[self.room :]
        self.room -= min(self.room, len(data))
        if self.waiting and not full:
            self.above.pause_writing()

    def drains(self) -> None:
        """The peer reads on."""
        assert self.above is not None
        self.room = 1 << 30
        self.sent, self.waiting = self.sent + self.waiting, b""
        self.above.resume_writing()

    def get_write_buffer_size(self) -> int:
        return len(self.waiting)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 5) if name == "peername" else default

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def set_write_buffer_limits(self, *_: Any) -> None: ...

    def can_write_eof(self) -> bool:
        return False


class Inner(asyncio.Protocol):
    """Does what the test tells it to when it is to pause."""

    def __init__(self) -> None:
        self.when_paused: Callable[[], None] = lambda: None
        self.told: list[str] = []

    def pause_writing(self) -> None:
        self.told.append("pause")
        self.when_paused()

    def resume_writing(self) -> None:
        self.told.append("resume")


class Scene:
    """A connection whose handshake is done, and its client."""

    def __init__(self) -> None:
        self.inner = Inner()
        self.listener = TlsListener(
            TlsContext(SERVER.credentials()), lambda: self.inner, limits=TlsLimits(write_high_water=1 << 20)
        )
        self.raw = Raw()
        self.transport = self.raw.above = TlsTransport(self.listener, asyncio.get_running_loop())
        self.transport.connection_made(self.raw)  # type: ignore[arg-type]
        self.client = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD))
        self.client.set_connect_state()
        while self.transport.tls is None:
            with contextlib.suppress(SSL.WantReadError):
                self.client.do_handshake()
            self._client_says()
            self._client_hears()

    def heard(self) -> bytes:
        """All that the client can read."""
        self._client_hears()
        data = b""
        try:
            while True:
                data += self.client.recv(65_536)
        except (SSL.WantReadError, SSL.ZeroReturnError):
            return data

    def _client_says(self) -> None:
        try:
            data = self.client.bio_read(65_536)
        except SSL.WantReadError:
            return
        self.listener.read_buffer[: len(data)] = data
        self.transport.buffer_updated(len(data))

    def _client_hears(self) -> None:
        if self.raw.sent:
            self.client.bio_write(self.raw.sent)
            self.raw.sent = b""


async def test_what_is_written_when_the_socket_is_full_in_the_middle_of_a_large_write_comes_behind_it() -> None:
    scene = Scene()
    scene.inner.when_paused = lambda: scene.transport.write(b"2" * 10)
    scene.raw.room = 10_000
    scene.transport.write(LARGE)
    await asyncio.sleep(0)
    assert scene.inner.told == ["pause"]
    scene.raw.drains()
    assert scene.heard() == LARGE + b"2" * 10
    assert (scene.inner.told, scene.transport.get_write_buffer_size()) == (["pause", "resume"], 0)


async def test_who_closes_when_the_socket_is_full_in_the_middle_of_a_large_write_loses_nothing_of_it() -> None:
    scene = Scene()
    scene.inner.when_paused = scene.transport.close
    scene.raw.room = 10_000
    scene.transport.write(LARGE)
    await asyncio.sleep(0)
    assert not scene.raw.closed
    scene.raw.drains()
    assert scene.heard() == LARGE
    assert scene.client.get_shutdown() == SSL.RECEIVED_SHUTDOWN
    assert (scene.raw.closed, scene.raw.aborted) == (True, False)
    scene.transport.connection_lost(None)


async def test_a_protocol_that_takes_over_while_the_socket_is_full_is_told_so() -> None:
    """As MQTT does from HTTP: it bounds what waits for a slow reader by this, and cuts who takes nothing for long."""
    scene, taking_over = Scene(), Inner()
    scene.raw.room = 0
    scene.transport.write(LARGE)
    await asyncio.sleep(0)
    scene.transport.set_protocol(taking_over)
    assert taking_over.told == [], "not before it has the transport"
    await asyncio.sleep(0)
    assert (scene.inner.told, taking_over.told) == (["pause"], ["pause"])
    scene.raw.drains()
    assert (scene.inner.told, taking_over.told) == (["pause"], ["pause", "resume"])
    third = Inner()
    scene.transport.set_protocol(third)
    await asyncio.sleep(0)
    assert third.told == []


async def test_who_was_accepted_just_before_the_listener_closed_is_cut() -> None:
    """The event loop tells of a connection a turn after it has accepted it; nobody would end that one any more."""
    scene = Scene()
    late = Raw()
    late.above = TlsTransport(scene.listener, asyncio.get_running_loop())
    await scene.listener.close()
    late.above.connection_made(late)  # type: ignore[arg-type]
    assert late.aborted
    late.above.connection_lost(None)
    assert scene.listener.connections == {scene.transport}
    assert (scene.listener.counters.open, scene.listener.counters.handshaking) == (1, 0)
