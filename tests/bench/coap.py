"""CoAP over DTLS: the product against libcoap's `coap-server-openssl`, in one run with the same clients.

Both serve one port of loopback with the same suite (PSK-AES128-GCM-SHA256; ECDHE-ECDSA-AES128-GCM-SHA256 by
certificate) and both ask for a cookie first. The product is a whole server: a handshake admits a device (two reads of
the database and a session), and a request's 2.04 comes after its commit. libcoap compares with one key, keeps nothing,
and a PUT to it changes a string in memory. They run in turns; a ratio is the median of those of neighbouring rounds.

The load is tests/bench/coap_load.py in a process of its own. Rates depend on who else uses the cores, so the CPU time
of each server is shown too: that is the steadier comparison, and the load's own is there to see that it was no limit.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import resource
import shutil
import socket
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import msgspec
import psutil
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from rich.console import Console

from tests.bench.coap_load import Psk, Seen, Task
from tests.bench.handshakes import Pair
from tests.bench.report import Report
from tests.bench.servers import LIFTED, BenchServer
from tests.processes import Api

SECTION = "CoAP over DTLS 1.2, against libcoap's server"
DEVICES = 64
_KEY = bytes(range(97, 97 + 26)) + b"012345"
"""libcoap's: printable, because it comes from a command line."""
_STARTED = 10.0
_SETTLE = 0.7  # what the last handshakes left is freed by then
_MOST_PER_SECOND = 1_600
"""Requests of one device that are sealed before the clock starts: more than any machine at hand answers."""


@dataclass(frozen=True, slots=True)
class CoapPace:
    """How long each part may take."""

    seconds: float
    rounds: int
    sessions: int
    """Idle ones with a key; and a fifth as many with a certificate."""


FULL = CoapPace(seconds=2, rounds=3, sessions=5_000)
QUICK = CoapPace(seconds=1, rounds=1, sessions=500)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a round cost: CPU seconds of the server, and of its PostgreSQL."""

    server: float
    postgres: float = 0.0


@dataclass(frozen=True, slots=True)
class Round:
    """What the load saw, and what it cost."""

    seen: Seen
    cost: Cost

    @property
    def each(self) -> float:
        """CPU microseconds of the server's process for one."""
        return self.cost.server / max(1, self.seen.count) * 1e6

    @property
    def note(self) -> str:
        """The costs of one, in words."""
        count = max(1, self.seen.count)
        parts = [f"server {self.each:.0f}"]
        if self.cost.postgres:
            parts.append(f"PostgreSQL {self.cost.postgres / count * 1e6:.0f}")
        parts.append(f"load {self.seen.cpu / count * 1e6:.0f}")
        stalled = f"; {self.seen.stalled} STALLED" if self.seen.stalled else ""
        return "µs of a core each: " + ", ".join(parts) + stalled


@dataclass(slots=True)
class Libcoap:
    """A running coap-server-openssl."""

    port: int
    process: asyncio.subprocess.Process

    def cost(self) -> Cost:
        """CPU seconds so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return Cost(times.user + times.system)

    def resident_kib(self) -> float:
        """Resident memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1024


@asynccontextmanager
async def libcoap(program: str, *arguments: str) -> AsyncIterator[Libcoap]:
    """The server on a free pair of ports, until the block ends. Raises AssertionError when it does not start."""
    port = _free_pair()
    process = await asyncio.create_subprocess_exec(
        program,
        *("-A", "127.0.0.1", "-p", str(port), *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_STARTED):
            while not _bound(port + 1):
                assert process.returncode is None, f"{program} ended with {process.returncode}"
                await asyncio.sleep(0.02)
        yield Libcoap(port + 1, process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def run(task: Task) -> Seen:
    """One load to its end."""
    process = await _started(task)
    assert process.stdout is not None
    out = await process.stdout.read()
    assert await process.wait() == 0, "the load failed"
    return msgspec.json.decode(out, type=Seen)


@asynccontextmanager
async def idle(task: Task) -> AsyncIterator[None]:
    """The task's sessions, for as long as the block."""
    process = await _started(task)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert await process.stdout.readline(), "the sessions did not come about"
        yield
    finally:
        process.stdin.close()
        await process.wait()


async def coap(report: Report, base: Path, pace: CoapPace) -> bool:
    """All of it into the report; whether every acknowledged request is in the database."""
    program = shutil.which("coap-server-openssl")
    if program is None:
        report.add(SECTION, "NO RIVAL", 0, "", "coap-server-openssl (libcoap3-bin) IS NOT INSTALLED: no ratios below")
    shown, own = Pair.make(base, "coap-server"), Pair.make(base, "coap-client")
    rival = None if program is None else _Rival(program, shown, own)
    async with _served(base / "coap", shown) as server:
        devices = await server.enrol(DEVICES)
        await server.believe(own)
        bench = _Bench(report, server, rival, pace, devices, own)
        await bench.handshakes("PSK", by_certificate=False, aim="; aim 0.6")
        held = await bench.requests()
        await bench.handshakes("X.509", by_certificate=True, aim="")
        await server.stop()
        await server.start()
        await bench.memory()
    return held


@dataclass
class _Server(BenchServer):
    """A product's process that shows a given certificate, and its devices."""

    shown: Path | None = None

    @property
    def ca_chain(self) -> Path:
        """The certificate itself, which is self-signed."""
        assert self.shown is not None
        return self.shown

    async def enrol(self, count: int) -> list[Psk]:
        """New devices with keys."""
        api = await Api.connect(self)
        devices = []
        try:
            for _ in range(count):
                body = {"name": "bench", "hardware_id": f"BENCH-{uuid4().hex}", "credential_type": "psk"}
                status, made = await api.request("POST", "/devices", body, self.token)
                assert status == 201, made
                key = made["psk"]["key"]
                raw = base64.urlsafe_b64decode(key + "=" * (-len(key) % 4))
                devices.append(Psk(made["psk"]["identity"], raw))
        finally:
            api.close()
        return devices

    async def believe(self, own: Pair) -> None:
        """A device that comes with this certificate."""
        (device,) = await self.register(1)
        leaf = x509.load_pem_x509_certificate(own.path.read_bytes()).public_bytes(Encoding.PEM)
        await self.ask("POST", f"/devices/{device.device_id}/certs", {"certificate": leaf.decode()})

    def cost(self) -> Cost:
        """CPU seconds so far."""
        used = self.usage()
        return Cost(used.server, used.postgres)

    def resident_kib(self) -> float:
        """Resident memory of the server's own process."""
        return self.resident_mib() * 1024

    @property
    def port(self) -> int:
        """Of CoAP."""
        return self.ports["coap"]


@asynccontextmanager
async def _served(data_dir: Path, shown: Pair) -> AsyncIterator[_Server]:
    configured = {
        **LIFTED,
        "GATEHOUSE_HTTPS__CERTIFICATE": str(shown.path),
        "GATEHOUSE_HTTPS__KEY": str(shown.path),
        # one certificate plays many devices
        "GATEHOUSE_COAP__ASSOCIATIONS_PER_DEVICE": "100",
    }
    server = _Server(data_dir, configured, shown=shown.path)
    try:
        await server.start()
        await server.settle()
        yield server
    finally:
        if server.running:
            await server.kill()


@dataclass(frozen=True, slots=True)
class _Rival:
    """How libcoap's server is started."""

    program: str
    shown: Pair
    own: Pair

    def by_key(self) -> AbstractAsyncContextManager[Libcoap]:
        return libcoap(self.program, "-k", _KEY.decode(), "-h", "")

    def by_certificate(self) -> AbstractAsyncContextManager[Libcoap]:
        pem = str(self.shown.path)
        return libcoap(self.program, "-c", pem, "-j", pem, "-C", str(self.own.path))


@dataclass(frozen=True, slots=True)
class _Bench:
    """The measurements, each of which adds its lines."""

    report: Report
    server: _Server
    rival: _Rival | None
    pace: CoapPace
    devices: Sequence[Psk]
    own: Pair

    async def handshakes(self, name: str, *, by_certificate: bool, aim: str) -> None:
        """Full handshakes with a cookie, each closed again."""
        more: dict[str, object] = {"kind": "handshakes"}
        if by_certificate:
            more["certificate"] = str(self.own.path)
        await self._warm(more)
        ours, theirs = await self._in_turns(by_certificate, more, rounds=1 if by_certificate else self.pace.rounds)
        self._show(f"{name} handshakes", ours, theirs, aim)

    async def requests(self) -> bool:
        """Telemetry that is stored against a PUT that is not; whether all is there that was acknowledged."""
        more: dict[str, object] = {"kind": "requests", "most": round(self.pace.seconds * _MOST_PER_SECOND)}
        await self._warm(more)
        before = await self.server.stored()
        put = {"method": 3, "path": "example_data"}
        ours, theirs = await self._in_turns(False, more, rounds=self.pace.rounds, rivals=put)
        self._show("telemetry stored", ours, theirs, "; libcoap's is a PUT that nobody stores; aim 0.25")
        acknowledged = sum(each.seen.count + each.seen.before for each in ours)
        stored = await self.server.stored() - before
        missing = max(0, acknowledged - stored)
        verdict = f"{missing} ARE MISSING" if missing else "all are in the database"
        self.report.add(SECTION, "telemetry acknowledged", acknowledged, "", verdict)
        return not missing

    async def memory(self) -> None:
        """What a session adds that is idle since its handshake, on servers that have just been started."""
        count = self.pace.sessions
        by_key: dict[str, object] = {"kind": "idle", "sessions": count}
        by_certificate = {"kind": "idle", "sessions": count // 5, "certificate": str(self.own.path)}
        key, certificate = await self._grown(self.server, by_key, by_certificate)
        note = f"{count:,} of them; aim 70"
        if self.rival is not None:
            async with self.rival.by_key() as other:
                note += f"; libcoap {(await self._grown(other, by_key))[0]:.1f}"
        self.report.add(SECTION, "memory of an idle session, PSK", key, "KiB", note)
        note = f"{count // 5:,} of them, with one certificate, beside the others"
        self.report.add(SECTION, "memory of an idle session, X.509", certificate, "KiB", note)

    async def _grown(self, server: _Server | Libcoap, *lots: dict[str, object]) -> list[float]:
        """KiB of one session of each lot; all stay open."""
        for lot in lots:
            async with idle(self._task(server.port, {**lot, "sessions": 32})):  # what the first ones take
                pass
        grown: list[float] = []
        async with AsyncExitStack() as stack:
            await asyncio.sleep(_SETTLE)
            for lot in lots:
                before = server.resident_kib()
                task = self._task(server.port, lot)
                await stack.enter_async_context(idle(task))
                await asyncio.sleep(_SETTLE)
                grown.append((server.resident_kib() - before) / task.sessions)
        return grown

    async def _warm(self, more: dict[str, object]) -> None:
        """First uses, plans and caches."""
        await run(self._task(self.server.port, {**more, "seconds": 0.5, "most": 500}))

    async def _in_turns(
        self,
        by_certificate: bool,
        more: dict[str, object],
        *,
        rounds: int,
        rivals: dict[str, object] | None = None,
    ) -> tuple[list[Round], list[Round]]:
        ours: list[Round] = []
        theirs: list[Round] = []
        for _ in range(rounds):
            ours.append(await self._round(self.server, more))
            if self.rival is not None:
                started = self.rival.by_certificate if by_certificate else self.rival.by_key
                async with started() as other:
                    theirs.append(await self._round(other, {**more, **(rivals or {})}))
        return ours, theirs

    async def _round(self, server: _Server | Libcoap, more: dict[str, object]) -> Round:
        before = server.cost()
        seen = await run(self._task(server.port, more))
        after = server.cost()
        return Round(seen, Cost(after.server - before.server, after.postgres - before.postgres))

    def _task(self, port: int, more: dict[str, object]) -> Task:
        known = port == self.server.port
        keys = self.devices if known else [Psk(each.identity, _KEY) for each in self.devices]
        return msgspec.convert(
            {"port": port, "devices": keys, "seconds": self.pace.seconds, "at_once": DEVICES, **more}, Task
        )

    def _show(self, name: str, ours: Sequence[Round], theirs: Sequence[Round], aim: str) -> None:
        add = self.report.add
        rate = statistics.median(each.seen.rate for each in ours)
        add(SECTION, name, rate, "/s", statistics.median_low([(each.each, each.note) for each in ours])[1])
        if not theirs:
            return
        rate = statistics.median(each.seen.rate for each in theirs)
        add(
            SECTION,
            f"{name}: libcoap",
            rate,
            "/s",
            statistics.median_low([(each.each, each.note) for each in theirs])[1],
        )
        ratio = statistics.median(a.seen.rate / b.seen.rate for a, b in zip(ours, theirs, strict=True))
        add(SECTION, f"{name}: ratio", ratio, "×", f"median of {len(ours)} pairs, in turns{aim}")
        less = statistics.median(b.each / a.each for a, b in zip(ours, theirs, strict=True))
        add(SECTION, f"{name}: ratio by CPU", less, "×", "µs of libcoap's process through those of the server's")


async def _started(task: Task) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.coap_load"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(task) + b"\n")
    await process.stdin.drain()
    return process


def _free_pair() -> int:
    """A port that is free with the next one, which libcoap takes for DTLS."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as first, socket.socket(type=socket.SOCK_DGRAM) as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def _bound(port: int) -> bool:
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def main() -> None:
    """Print the section alone."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.coap", description="See docs/benchmarks.md.")
    parser.add_argument("--quick", action="store_true", help="about 15 s")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
    pace = QUICK if parser.parse_args().quick else FULL
    report = Report({}, [])
    with tempfile.TemporaryDirectory(prefix="gatehouse-bench-") as directory:
        held = asyncio.run(coap(report, Path(directory), pace))
    report.show(Console())
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
