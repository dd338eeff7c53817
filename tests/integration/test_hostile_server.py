"""A whole server under hostile clients: each gets a 4xx or a closed connection, memory stays flat, nobody else notices.

Beside every attack a well-behaved device reports over one connection, and counts what goes wrong for it: nothing may.
Attacks are bytes on TLS or TCP connections of the test's own; the server is a process with short timeouts, so that slow
senders are slow within a second or two. Memory is that of the process: sampled all the time against its peak, and
compared after whole rounds of all attacks, since a first round fills caches and allocators. Latencies are printed, and
only a bound that means starvation fails the test.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.processes import Api, ServerProcess, server_process
from tests.whole_system import Tenant, new_tenant, samples, value

SHORT = {
    "GATEHOUSE_LIMITS__HEADER_TIMEOUT_SECONDS": "1",
    "GATEHOUSE_LIMITS__TLS_HANDSHAKE_SECONDS": "1.5",
    "GATEHOUSE_LIMITS__KEEP_ALIVE_SECONDS": "3",
    "GATEHOUSE_LIMITS__PROVISIONING_ATTEMPTS_BURST": "10000",
}
PATIENCE = 25.0
"""Seconds until a hostile connection must have been answered or closed; a slow body is judged over ten."""
STARVED = 5.0
"""Seconds for one uplink of the good device: far above a shared machine's worst, far below its own timeout."""
FLAT = 24 << 20
"""Bytes that the process may grow over a second round of all attacks; one attack's input alone is 64 MB."""
PEAK = 160 << 20
"""Bytes above the start at any time, with hundreds of connections open."""

Attack = Callable[["Target"], Awaitable[list[int | None]]]
"""Returns the status of each request, None for a connection that was closed without one."""


@dataclass
class Target:
    """A server, and one device and operator that an attack may pretend to be."""

    server: ServerProcess
    context: ssl.SSLContext
    device_id: str
    api_key: str
    token: str

    async def connect(self) -> Api:
        return await Api.connect(self.server, self.context)

    async def outcome(self, *parts: bytes) -> int | None:
        """Send the parts on a connection of their own, and say how it ended."""
        api = await self.connect()
        try:
            return await _outcome(api, *parts)
        finally:
            api.close()

    def post(self, path: str, body: bytes, bearer: str = "") -> bytes:
        """The bytes of a POST of a JSON body, the connection to be closed after it."""
        credential = f"Authorization: Bearer {bearer}\r\n" if bearer else ""
        head = f"POST /api/v1{path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
        return f"{head}{credential}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _outcome(api: Api, *parts: bytes) -> int | None:
    sending = asyncio.create_task(_send(api, *parts))
    try:
        async with asyncio.timeout(PATIENCE):
            line = await api.reader.readline()
    except (OSError, ssl.SSLError):
        return None
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else None


async def _send(api: Api, *parts: bytes) -> None:
    with suppress(OSError, ssl.SSLError):
        for part in parts:
            api.writer.write(part)
            await api.writer.drain()


@dataclass
class GoodDevice:
    """Reports without a pause, and remembers how that went; samples the server's memory on the way."""

    target: Target
    process: psutil.Process
    latencies: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    peak: int = 0

    async def run(self) -> None:
        api = await self.target.connect()
        path = f"/devices/{self.target.device_id}/uplink"
        try:
            while True:
                began = time.perf_counter()
                try:
                    async with asyncio.timeout(STARVED):
                        status, answer = await api.request(
                            "POST", path, {"kind": "event", "payload": {"n": len(self.latencies)}}, self.target.api_key
                        )
                except (OSError, EOFError, TimeoutError) as error:
                    self.errors.append(repr(error))
                    return
                if status != 202:
                    self.errors.append(f"{status} {answer}")
                self.latencies.append(time.perf_counter() - began)
                self.peak = max(self.peak, self.process.memory_info().rss)
                await asyncio.sleep(0.01)
        finally:
            api.close()


@asynccontextmanager
async def undisturbed(target: Target, what: str) -> AsyncIterator[GoodDevice]:
    """A good device reports inside, and must not have noticed anything."""
    good = GoodDevice(target, psutil.Process(target.server.pid))
    before = good.process.memory_info().rss
    task = asyncio.create_task(good.run())
    try:
        async with asyncio.timeout(10):
            while not good.latencies and not good.errors:
                await asyncio.sleep(0.01)
        yield good
        served = len(good.latencies)
        async with asyncio.timeout(STARVED):
            while len(good.latencies) < served + 2 and not good.errors:
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert good.errors == []
    assert good.peak - before < PEAK
    ranked = sorted(good.latencies)
    print(
        f"{what}: {len(ranked)} uplinks beside it, median {1000 * ranked[len(ranked) // 2]:.1f} ms, "
        f"worst {1000 * ranked[-1]:.1f} ms, peak {(good.peak - before) / 2**20:+.1f} MiB"
    )


@asynccontextmanager
async def _target(tmp_path: Path, environ: dict[str, str] = SHORT) -> AsyncIterator[Target]:
    async with server_process(tmp_path / "D", environ) as server:
        tenant: Tenant = await new_tenant(server)
        made = await tenant.registered("HW-good")
        yield Target(server, server.tls(), made["device_id"], made["api_key"], tenant.token)


# -- attacks -----------------------------------------------------------------------------------------------------------

HEAD = b"POST /api/v1/provision HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


async def headers_of_64_megabytes(target: Target) -> list[int | None]:
    """In one endless line, in many lines, and as an endless request line."""
    block = b"a" * (1 << 16)
    lines = b"".join(b"X%d: y\r\n" % n for n in range(8000))
    floods = (
        (HEAD + b"X: ", *[block] * 1024),
        (HEAD, *[lines] * 600),
        (b"GET /", *[block] * 1024),
    )
    return list(await asyncio.gather(*(target.outcome(*flood) for flood in floods)))


async def slow_senders(target: Target) -> list[int | None]:
    """A byte of a head from time to time, a head that stops, silence, and bodies that trickle or stop."""

    async def trickle(*first: bytes) -> int | None:
        api = await target.connect()

        async def drops() -> None:
            with suppress(OSError, ssl.SSLError):
                while True:
                    await asyncio.sleep(0.25)
                    api.writer.write(b"x")

        dropping = asyncio.create_task(drops())
        try:
            return await _outcome(api, *first)
        finally:
            dropping.cancel()
            await asyncio.gather(dropping, return_exceptions=True)
            api.close()

    body = HEAD + b"Content-Length: 5000\r\n\r\n"
    return list(
        await asyncio.gather(
            trickle(b"GET /"),
            trickle(HEAD + b"X: "),
            trickle(body),
            target.outcome(HEAD),
            target.outcome(b""),
            target.outcome(body + b"{"),
        )
    )


async def announced_too_large(target: Target) -> list[int | None]:
    """A gibibyte by Content-Length, the same with the question first, a number without end, chunks without end."""
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    extended = b"1;" + b"e" * 60_000 + b"\r\nx\r\n"
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    requests: tuple[tuple[bytes, ...], ...] = (
        (HEAD + b"Content-Length: 1073741824\r\n\r\n",),
        (HEAD + b"Content-Length: 1073741824\r\nExpect: 100-continue\r\n\r\n",),
        (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",),
        (
            chunked,
            *[chunk] * 1024,
        ),
        (
            chunked,
            *[extended] * 200,
        ),
        (
            chunked,
            *[b"1\r\nx\r\n" * 5000] * 300,
        ),
        (
            chunked + b"FFFFFFFFFFFFFFFF\r\n",
            b"x" * 65_536,
        ),
        (
            chunked + b"0\r\n",
            b"T: " + b"t" * (1 << 20),
        ),
    )
    return list(await asyncio.gather(*(target.outcome(*parts) for parts in requests)))


HOSTILE_JSON: dict[str, bytes] = {
    "arrays 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
    "objects 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "unclosed arrays": b"[" * 500_000,
    "deep payload": b'{"kind":"event","payload":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "broken UTF-8": b'{"kind":"event","payload":"\xff\xfe\xc0\x80"}',
    "a surrogate in UTF-8": b'{"kind":"event","payload":"\xed\xa0\x80"}',
    "a lone surrogate": b'{"kind":"event","payload":"\\ud800"}',
    "a raw NUL": b'{"kind":"event","payload":"a\x00b"}',
    "an escaped NUL": b'{"kind":"event","payload":{"a":"\\u0000"}}',
    "an escaped NUL in a key": b'{"kind":"event","payload":{"\\u0000":1}}',
    "NULs only": b"\x00" * 1000,
    "a NUL behind": b'{"kind":"event","payload":1}\x00',
    "infinity": b'{"kind":"event","payload":Infinity}',
    "not a number": b'{"kind":"event","payload":NaN}',
    "two documents": b'{"kind":"event","payload":1}{"kind":"event","payload":1}',
    "unknown fields": b'{"kind":"event","payload":1,"' + b"x" * 100_000 + b'":1}',
    "a number of 10,000 digits as a kind": b'{"kind":' + b"9" * 10_000 + b',"payload":1}',
    "an exponent without end": b'{"kind":"event","payload":1,"observed_at":1e' + b"9" * 10_000 + b"}",
    "a byte order mark of UTF-16": '{"kind":"event","payload":1}'.encode("utf-16"),
}
STRANGE_JSON: dict[str, bytes] = {
    "1e400": b'{"kind":"event","payload":1e400}',
    "10,000 digits": b'{"kind":"event","payload":' + b"9" * 10_000 + b"}",
    "-0.0 and tiny": b'{"kind":"event","payload":[-0.0,1e-400,1E+308]}',
    "10,000 digits behind the point": b'{"kind":"event","payload":0.' + b"1" * 10_000 + b"}",
    "duplicate keys": b'{"kind":"event","payload":{"a":1,"a":2},"kind":"event"}',
    "10,000 keys": b'{"kind":"event","payload":{' + b",".join(b'"k%d":1' % n for n in range(10_000)) + b"}}",
    "a megabyte of spaces": b'{"kind":"event","payload":1' + b" " * 900_000 + b"}",
}
"""Valid or a matter of taste: taken or refused, and what was taken can be read again."""


async def hostile_json(target: Target) -> list[int | None]:
    """The same bodies to a device's operation and to an operator's."""
    statuses = []
    for body in HOSTILE_JSON.values():
        uplink = target.post(f"/devices/{target.device_id}/uplink", body, target.api_key)
        statuses.append(await target.outcome(uplink))
        statuses.append(await target.outcome(target.post("/telemetry", body, target.api_key)))
        statuses.append(await target.outcome(target.post("/devices", body, target.token)))
        statuses.append(await target.outcome(target.post("/provision", body)))
    return statuses


HOSTILE_HEADS = (
    b"GET /api/v1/devices HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer \xff\xfe\xc3\x28\r\n\r\n",
    b"GET /api/v1/devices HTTP/1.1\r\nHost: a\r\nX-API-Key: \x80\x81\x82\r\n\r\n",
    b"GET /api/v1/devices HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + b"a." * 4000 + b"\r\n\r\n",
    b"GET /api/v1/devices HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
    b"GET /api/v1/devices?q=%00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /api/v1/devices/%ff%fe HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /api/v1/devices/%00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /api/v1/devices?limit=" + b"9" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /api/v1/devices?" + b"&".join(b"a=%d" % n for n in range(1500)) + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x00" * 4096,
    b"\r\n" * 4096,
    b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n",
    HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


async def hostile_heads(target: Target) -> list[int | None]:
    """Broken UTF-8, NUL and noise in heads, and in the queries of somebody who is known."""
    known = f"Authorization: Bearer {target.token}\r\n\r\n".encode()
    statuses = [await target.outcome(head) for head in HOSTILE_HEADS]
    for head in HOSTILE_HEADS[4:9]:
        statuses.append(await target.outcome(head.removesuffix(b"\r\n") + known))
    return statuses


async def not_tls(target: Target) -> list[int | None]:
    """Garbage, plain HTTP, a hello that stops, a record that lies about its length, and silence; 300 at once each."""
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"

    async def one(sent: bytes) -> int | None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", target.server.ports["https"])
        except ConnectionError:
            return None
        try:
            writer.write(sent)
            async with asyncio.timeout(PATIENCE):
                line = await reader.readline()
            return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else None
        except ConnectionError:
            return None
        finally:
            writer.transport.abort()

    sent = (os.urandom(1000), b"GET / HTTP/1.1\r\n\r\n", hello, hello + b"\xff" * 70_000, b"")
    statuses: list[int | None] = []
    for each in sent:
        statuses += await asyncio.gather(*(one(each) for _ in range(300)))
    return statuses


async def idle_connections(target: Target) -> list[int | None]:
    """Hundreds of TLS connections that ask nothing; all are closed by the server's own timeout."""
    held: list[Api] = []
    try:
        for _ in range(40):  # few handshakes at once: a busy machine has a second and a half for each of them
            held += await asyncio.gather(*(target.connect() for _ in range(10)))
        async with asyncio.timeout(PATIENCE):
            ends = await asyncio.gather(*(api.reader.readline() for api in held), return_exceptions=True)
    finally:
        for api in held:
            api.close()
    return [int(end.split()[1]) if isinstance(end, bytes) and end else None for end in ends]


async def never_reading(target: Target) -> list[int | None]:
    """Ask for large answers again and again and read none of them; the socket's window fills and stays full."""
    ask = b"GET /api/v1/openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
    held: list[Api] = []
    try:
        for _ in range(30):
            api = await target.connect()
            held.append(api)
            api.writer.transport.pause_reading()  # type: ignore[attr-defined]
            api.writer.write(ask * 60)
        await asyncio.sleep(1.0)  # the attack itself: nobody reads for a while
    finally:
        for api in held:
            api.close()
    return []


ATTACKS: tuple[Attack, ...] = (
    headers_of_64_megabytes,
    announced_too_large,
    hostile_json,
    hostile_heads,
    not_tls,
    never_reading,
)


@pytest.mark.timeout(150)
async def test_memory_stays_flat_over_rounds_of_everything(tmp_path: Path) -> None:
    async with _target(tmp_path) as target:
        process = psutil.Process(target.server.pid)
        after: list[int] = []
        for number in range(2):
            for attack in ATTACKS:
                async with undisturbed(target, f"round {number}, {attack.__name__}"):
                    statuses = await attack(target)
                print(attack.__name__, Counter(statuses))
                assert _refused(statuses), (attack.__name__, statuses)
            after.append(process.memory_info().rss)
        print("MiB after each round:", [round(rss / 2**20, 1) for rss in after])
        assert after[-1] - after[0] < FLAT
        assert target.server.running
        assert '"level": "error"' not in target.server.log_text()
        read = await samples(target.server)
        for limit in ("header", "body", "handshakes"):
            assert value(read, "gatehouse_limits_hit_total", limit=limit) > 0


@pytest.mark.timeout(90)
async def test_slow_and_silent_senders_are_cut(tmp_path: Path) -> None:
    async with _target(tmp_path) as target:
        async with undisturbed(target, "slow senders"):
            statuses = await slow_senders(target)
            print("slow senders:", statuses)
            assert _refused(statuses)
        async with undisturbed(target, "idle connections"):
            assert set(await idle_connections(target)) <= {408, None}
        read = await samples(target.server)
        assert value(read, "gatehouse_limits_hit_total", limit="slow_sender") > 0
        assert value(read, "gatehouse_tls_connections_now", state="open") <= 2


async def test_strange_bodies_are_taken_whole_or_refused(tmp_path: Path) -> None:
    async with _target(tmp_path) as target, undisturbed(target, "strange bodies"):
        uplinks = f"/devices/{target.device_id}/uplink"
        outcomes = {
            name: await target.outcome(target.post(uplinks, body, target.api_key))
            for name, body in STRANGE_JSON.items()
        }
        assert all(outcome == 202 or (outcome is not None and 400 <= outcome < 500) for outcome in outcomes.values()), (
            outcomes
        )
        print(outcomes)
        api = await target.connect()
        status, listed = await api.request("GET", f"{uplinks}s?limit=100", None, target.token)
        api.close()
        assert status == 200
        taken = sum(outcome == 202 for outcome in outcomes.values())
        assert (
            len([u for u in listed["uplinks"] if not isinstance(u["payload"], dict) or "n" not in u["payload"]])
            == taken
        )
        assert json.dumps(listed)


def _refused(statuses: list[int | None]) -> bool:
    return all(status is None or 400 <= status < 500 for status in statuses)
