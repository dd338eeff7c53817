"""Devices as plain callers: one keep-alive HTTPS connection each, one request at a time, timed.

For what wrk cannot do: every connection has a source address of its own (127.x.y.z), as devices have, because the
server limits unauthenticated requests by address; bodies differ; connections stay idle; the moment of the server's
close is noted.
The cost per request is near the server's own, so figures made with callers are lower bounds where they are rates.
"""

from __future__ import annotations

import asyncio
import ssl
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from tests.bench.servers import BenchServer, Device

Body = bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and the seconds from the request's first byte to the answer's last."""

    status: int
    body: bytes
    seconds: float


class Caller(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._reply: asyncio.Future[Reply] | None = None
        self._sent_at = 0.0
        self.closed_at: float | None = None
        """`time.perf_counter()` of the connection's end."""
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]  # uvloop's has the interface without the class

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank:
            return
        lower = head.lower()
        at = lower.find(b"content-length: ")
        length = int(lower[at + 16 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(body) < length:
            return
        self._received = b""
        reply, self._reply = self._reply, None
        if reply is not None and not reply.done():
            reply.set_result(Reply(int(head[9:12]), body, time.perf_counter() - self._sent_at))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed_at = time.perf_counter()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(exc or ConnectionResetError("closed instead of answered"))
        if not self.closed.done():
            self.closed.set_result(None)

    async def ask(self, request: bytes) -> Reply:
        """Send one request and wait for its answer. Raises OSError when the connection ends instead."""
        assert self._transport is not None
        assert self._reply is None, "one request at a time"
        self._reply = asyncio.get_running_loop().create_future()
        self._sent_at = time.perf_counter()
        self._transport.write(request)
        return await self._reply

    def cut(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()


async def connect(server: BenchServer, number: int, context: ssl.SSLContext) -> Caller:
    """Caller `number` (below 2**20), from an address of its own."""
    address = f"127.{16 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
    _, caller = await asyncio.get_running_loop().create_connection(
        Caller,
        "127.0.0.1",
        server.ports["https"],
        ssl=context,
        server_hostname="localhost",
        local_addr=(address, 0),
    )
    return caller


async def connect_many(server: BenchServer, count: int, *, first: int = 0, at_once: int = 32) -> list[Caller]:
    """Callers `first` and following, a few handshakes at a time."""
    context = server.tls()
    turn = asyncio.Semaphore(at_once)

    async def one(number: int) -> Caller:
        async with turn:
            return await connect(server, number, context)

    return list(await asyncio.gather(*[one(first + n) for n in range(count)]))


def post(path: str, body: object, bearer: str | None = None) -> bytes:
    """A POST of JSON on the wire."""
    content = msgspec.json.encode(body)
    key = f"Authorization: Bearer {bearer}\r\n" if bearer else ""
    head = (
        f"POST /api/v1{path} HTTP/1.1\r\nHost: localhost\r\n{key}"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def uplink(device: Device) -> bytes:
    """An uplink of one reading on the wire."""
    path = f"/devices/{device.device_id}/uplink"
    return post(path, {"kind": "telemetry", "payload": {"env.temperature": 21.5}}, device.key)


async def closed_loop(
    callers: Sequence[Caller], seconds: float, send: Callable[[Caller], Awaitable[Reply]], expected: int
) -> tuple[float, list[float]]:
    """Each caller sends as soon as it is answered: answers per second, and their times in ascending order."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def loop(caller: Caller) -> None:
        while time.perf_counter() < end:
            reply = await send(caller)
            assert reply.status == expected, (reply.status, reply.body)
            times.append(reply.seconds)

    began = time.perf_counter()
    await asyncio.gather(*[loop(caller) for caller in callers])
    return len(times) / (time.perf_counter() - began), sorted(times)


def percentile(times: Sequence[float], percent: float) -> float:
    """Of times in ascending order."""
    return times[min(len(times) - 1, int(len(times) * percent / 100))]


def median(times: Sequence[float]) -> float:
    """Of any times."""
    return statistics.median(times)
