"""MQTT QoS 1 over mutual TLS: stored messages a second, connects a second and memory, against mosquitto with glue.

    .venv/bin/python -m tests.bench.mqtt [--quick]     these lines of `make bench` alone

The rival is what a fleet builds without this product: mosquitto, and beside it a subscriber that writes each message
into PostgreSQL (mqtt_subscriber.py), here into the product's own database, which is idle meanwhile. Both servers take
the same clients with the same certificates from the same generator (mqtt_load.py), in turns.

What counts is what is *stored*: rows in the database when the clock stops, less those when it started. The product
acknowledges a message when it is committed; mosquitto acknowledges when it has it in memory, so its acknowledgements
run ahead, and what its subscriber has not taken yet is lost with the process. Each turn of the rival begins with a new
mosquitto, so that no turn pays for the backlog of another.

mosquitto's limits are lifted where they would drop messages (queue without bound) or hold back a sender (256 messages
in flight, as the product's default); it keeps no access lists and its subscriber comes over plain TCP: each favours it.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import asyncpg
import msgspec
import psutil
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from rich.console import Console

from edge.postgres import attach_or_start
from tests.bench.callers import percentile
from tests.bench.handshakes import Pair, certified_server
from tests.bench.mqtt_load import Client, Connected, Connecting, Idling, Published, Publishing
from tests.bench.report import Report
from tests.bench.servers import BenchServer
from tests.processes import Api

SECTION = "MQTT QoS 1 over mTLS, messages stored"
CONNECTS = "MQTT over mTLS, connections"
PAYLOAD = '{"env.temperature": 21.5}'
MISSING = "MOSQUITTO IS NOT INSTALLED: there is nothing to compare with (Debian's package `mosquitto`)"
GENERATORS = 2
"""Processes of the load; one would be as busy as the server."""
_PATIENCE = 600.0
"""Seconds for thousands of handshakes on a machine that does other work as well."""
_STEADY = 2.0
"""Seconds of load before the first turn: plans, caches and partitions are warm then."""


@dataclass(frozen=True, slots=True)
class Shape:
    """So many connections with so many messages in flight each, and the ratio that is aimed at."""

    name: str
    connections: int
    window: int
    aim: float


SHAPES = (
    Shape("200 connections, one in flight", 200, 1, 1.0),
    Shape("50 connections, pipelining", 50, 256, 5.0),
)


@dataclass(frozen=True, slots=True)
class MqttPace:
    """How long each part may take."""

    seconds: float
    rounds: int
    idle: int
    """Sessions for the memory's line."""
    batched: bool
    """Whether the other glue is measured as well."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one server did in one turn. CPU in seconds; `times` are of single messages, for a window of one."""

    stored: int
    acknowledged: int
    seconds: float
    server: float
    glue: float
    postgres: float
    load: float
    window: int
    times: Sequence[float]

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.stored / self.seconds

    @property
    def work(self) -> float:
        """CPU seconds for each row, the load's excluded."""
        return (self.server + self.glue + self.postgres) / max(1, self.stored)


@dataclass(frozen=True, slots=True)
class Connects:
    """How many a second, and the CPU seconds of the server and of the load for each."""

    rate: float
    server: float
    load: float


@dataclass(slots=True)
class Side:
    """One contender's turns."""

    name: str
    turns: list[Turn] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The median, rows per second."""
        return statistics.median(turn.rate for turn in self.turns)

    @property
    def acknowledged(self) -> float:
        """The median, PUBACKs per second."""
        return statistics.median(turn.acknowledged / turn.seconds for turn in self.turns)

    @property
    def work(self) -> float:
        """CPU seconds for each row."""
        return statistics.median(turn.work for turn in self.turns)

    def note(self) -> str:
        """Acknowledged, and where the CPU time went."""
        stored = max(1, sum(turn.stored for turn in self.turns))
        acknowledged = max(1, sum(turn.acknowledged for turn in self.turns))
        parts = [("server", sum(turn.server for turn in self.turns) / stored)]
        if any(turn.glue for turn in self.turns):
            parts.append(("subscriber", sum(turn.glue for turn in self.turns) / stored))
        parts.append(("PostgreSQL", sum(turn.postgres for turn in self.turns) / stored))
        costs = ", ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in parts)
        load = sum(turn.load for turn in self.turns) / acknowledged * 1e6
        return f"acknowledged {self.acknowledged:,.0f}/s; µs of a core for each stored: {costs}; load {load:.0f}"

    def latencies(self) -> str:
        """Medians over the turns, in milliseconds."""
        percents = (50, 99)
        found = [statistics.median(percentile(turn.times, p) for turn in self.turns) * 1e3 for p in percents]
        return ", ".join(f"p{p} {value:.1f} ms" for p, value in zip(percents, found, strict=True))


class Authority:
    """The customer's own: signs the certificates of its devices, and is all that mosquitto trusts."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "devices-ca.pem"
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench devices")])
        builder = self._builder(self._name, self._key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        made = builder.sign(self._key, hashes.SHA256())
        self.path.write_bytes(made.public_bytes(Encoding.PEM))

    def client(self, name: str) -> tuple[Path, str]:
        """The PEM file of a new certificate with its key, and the certificate alone."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._builder(subject, key.public_key()).sign(self._key, hashes.SHA256())
        public = made.public_bytes(Encoding.PEM)
        path = self._directory / f"{name}.pem"
        path.write_bytes(public + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return path, public.decode()

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=7))


async def fleet(server: BenchServer, directory: Path, count: int) -> tuple[Authority, list[Client]]:
    """So many devices, each with a certificate of the customer's authority that the product has registered."""
    directory.mkdir()
    authority = Authority(directory)
    clients: list[Client] = []
    left = iter(range(count))

    async def register() -> None:
        api = await Api.connect(server)
        try:
            for number in left:
                body = {"name": "bench", "hardware_id": f"MQTT-{uuid4().hex}"}
                status, made = await api.request("POST", "/devices", body, server.token)
                assert status == 201, made
                device_id = made["device_id"]
                path, public = authority.client(f"device-{number}")
                body = {"certificate": public, "overlap_seconds": 0}
                status, made = await api.request("POST", f"/devices/{device_id}/certs", body, server.token)
                assert status == 201, made
                clients.append(Client(f"bench-{number}", str(path), f"devices/{device_id}/events"))
        finally:
            api.close()

    await asyncio.gather(*[register() for _ in range(16)])
    return authority, clients


class Generator:
    """Processes of mqtt_load.py that share the clients."""

    def __init__(self) -> None:
        self.processes: list[asyncio.subprocess.Process] = []

    @classmethod
    @asynccontextmanager
    async def of(cls, orders: Sequence[Publishing | Connecting | Idling]) -> AsyncIterator[Generator]:
        """Started, with their orders; killed at the end."""
        self = cls()
        try:
            for order in orders:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "tests.bench.mqtt_load"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=1 << 26,
                )
                self.processes.append(process)
                assert process.stdin is not None
                process.stdin.write(msgspec.json.encode(order) + b"\n")
            yield self
        finally:
            for process in self.processes:
                if process.returncode is None:
                    process.kill()
                await process.wait()

    async def lines(self) -> list[bytes]:
        """The next line of each. Fails if one has ended."""
        lines = []
        for process in self.processes:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), _PATIENCE)
            assert line, "a load generator ended; its reason is above"
            lines.append(line)
        return lines

    def go(self) -> None:
        """Let them begin, or leave."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")


@dataclass
class Mosquitto:
    """A running broker."""

    process: asyncio.subprocess.Process
    port: int
    plain_port: int


@asynccontextmanager
async def mosquitto(directory: Path, authority: Authority, shown: Pair) -> AsyncIterator[Mosquitto]:
    """A started broker, killed at the end."""
    program = mosquitto_program()
    assert program is not None
    ports = [_free_port(), _free_port()]
    settings = directory / "mosquitto.conf"
    settings.write_text(
        f"""per_listener_settings true
user {os.environ.get("USER", "root")}
log_type error
max_inflight_messages 256
max_queued_messages 0
listener {ports[0]} 127.0.0.1
cafile {authority.path}
certfile {shown.path}
keyfile {shown.path}
require_certificate true
use_identity_as_username true
listener {ports[1]} 127.0.0.1
allow_anonymous true
"""
    )
    process = await asyncio.create_subprocess_exec(
        program, "-c", str(settings), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        for port in ports:
            await _listening(port)
        yield Mosquitto(process, *ports)
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def subscriber(broker: Mosquitto, dsn: str, how: str) -> AsyncIterator[psutil.Process]:
    """The glue beside it, subscribed; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.mqtt_subscriber", how, str(broker.plain_port)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "BENCH_DSN": dsn},
    )
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"ready\n"
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        await process.wait()


def mosquitto_program() -> str | None:
    """Where mosquitto is, if it is."""
    return shutil.which("mosquitto") or shutil.which("/usr/sbin/mosquitto")


class Contest:
    """Product and rival with the same clients and the same database."""

    def __init__(
        self,
        server: BenchServer,
        dsn: str,
        database: asyncpg.Connection[asyncpg.Record],
        directory: Path,
        authority: Authority,
        clients: Sequence[Client],
        shown: Pair,
    ) -> None:
        self.server = server
        self.dsn = dsn
        self.database = database
        self.directory = directory
        self.authority = authority
        self.clients = clients
        self.shown = shown
        self.missing = 0
        """Messages that the product acknowledged and the database does not have."""

    async def product(self, shape: Shape, seconds: float) -> Turn:
        """A turn of the product."""
        server = psutil.Process(self.server.pid)
        port, ca = self.server.ports["mqtt"], self.server.ca_chain
        before = await self._stored()
        turn = await self._turn(shape, seconds, port, ca, server, None)
        await asyncio.sleep(0.2)  # what was under way when the clock stopped
        self.missing += max(0, turn.acknowledged - (await self._stored() - before))
        return turn

    async def rival(self, shape: Shape, seconds: float, how: str = "each") -> Turn:
        """A turn of mosquitto with its subscriber."""
        async with (
            mosquitto(self.directory, self.authority, self.shown) as broker,
            subscriber(broker, self.dsn, how) as glue,
        ):
            process = psutil.Process(broker.process.pid)
            return await self._turn(shape, seconds, broker.port, self.shown.path, process, glue)

    async def _turn(
        self, shape: Shape, seconds: float, port: int, ca: Path, server: psutil.Process, glue: psutil.Process | None
    ) -> Turn:
        orders = [
            Publishing(port, str(ca), clients, PAYLOAD, shape.window, seconds)
            for clients in _shares(self.clients[: shape.connections])
        ]
        async with Generator.of(orders) as generator:
            assert await generator.lines() == [b"ready\n"] * len(orders)
            await asyncio.sleep(0.2)
            stored, postgres = await self._stored(), self.server.usage().postgres
            used, used_glue = _cpu(server), _cpu(glue)
            began = time.perf_counter()
            generator.go()
            answers = [msgspec.json.decode(line, type=Published) for line in await generator.lines()]
            stored_after = asyncio.ensure_future(self._stored())
            took = time.perf_counter() - began
            used, used_glue = _cpu(server) - used, _cpu(glue) - used_glue
            postgres = self.server.usage().postgres - postgres
            stored = await stored_after - stored
        return Turn(
            stored=stored,
            acknowledged=sum(answer.acknowledged for answer in answers),
            seconds=took,
            server=used,
            glue=used_glue,
            postgres=postgres,
            load=sum(answer.cpu for answer in answers),
            window=answers[0].window,
            times=sorted(time for answer in answers for time in answer.times),
        )

    async def connects(self, port: int, ca: Path, process: psutil.Process, seconds: float) -> Connects:
        """Full handshakes with CONNECT and CONNACK."""
        orders = [Connecting(port, str(ca), clients, 16, seconds) for clients in _shares(self.clients[:200])]
        before = _cpu(process)
        async with Generator.of(orders) as generator:
            answers = [msgspec.json.decode(line, type=Connected) for line in await generator.lines()]
        count = sum(answer.connects for answer in answers)
        return Connects(count / seconds, (_cpu(process) - before) / count, sum(each.cpu for each in answers) / count)

    async def memory(self, port: int, ca: Path, process: psutil.Process, count: int) -> float:
        """KiB of resident memory for each of `count` idle sessions, after some that are not counted."""
        warm, counted = self.clients[:64], self.clients[64 : 64 + count]
        async with Generator.of([Idling(port, str(ca), list(warm), 16)]) as before:
            await before.lines()
            await asyncio.sleep(1)
            resident = process.memory_info().rss
            orders = [Idling(port, str(ca), clients, 16) for clients in _shares(counted)]
            async with Generator.of(orders) as generator:
                await generator.lines()
                await asyncio.sleep(1)  # what the last handshakes left is freed by then, and presence is written
                return float(process.memory_info().rss - resident) / 1024 / len(counted)

    async def _stored(self) -> int:
        count: int = await self.database.fetchval("SELECT count(*) FROM uplink")
        return count


async def mqtt(report: Report, base: Path, pace: MqttPace) -> bool:
    """All lines of MQTT; whether everything that was acknowledged is stored."""
    shown = Pair.make(base, "mqtt-servers")
    async with certified_server(base / "mqtt", shown) as server:
        authority, clients = await fleet(server, base / "mqtt-devices", max(200, 64 + pace.idle))
        async with attach_or_start(server.data_dir) as postgres, server.database() as database:
            contest = Contest(server, postgres.dsn, database, base, authority, clients, shown)
            await throughput(report, contest, pace)
            await connects(report, contest, pace)
        await server.stop()
        await server.start()
        await memory(report, contest, pace)
        return not contest.missing


async def throughput(report: Report, contest: Contest, pace: MqttPace) -> None:
    """Stored messages, in turns."""
    rivals = mosquitto_program() is not None
    for shape in SHAPES:
        ours, theirs, batched = Side("product"), Side("mosquitto"), Side("batched")
        await contest.product(shape, _STEADY)
        for _ in range(pace.rounds):
            ours.turns.append(await contest.product(shape, pace.seconds))
            if rivals:
                theirs.turns.append(await contest.rival(shape, pace.seconds))
        note = ours.note() + (f"; {ours.latencies()}" if shape.window == 1 else f"; window {ours.turns[0].window}")
        report.add(SECTION, shape.name, ours.rate, "/s", note)
        if not rivals:
            report.add(SECTION, "  NO RATIO", 0, "×", MISSING)
            continue
        note = theirs.note() + (f"; {theirs.latencies()}" if shape.window == 1 else "")
        report.add(SECTION, "  mosquitto, one INSERT per message", theirs.rate, "/s", note)
        ratio = statistics.median(a.rate / b.rate for a, b in zip(ours.turns, theirs.turns, strict=True))
        note = f"median of {pace.rounds} pairs, in turns; aim: {shape.aim:.0f}"
        report.add(SECTION, "  ratio", ratio, "×", note)
        report.add(
            SECTION, "  less CPU for each stored", theirs.work / ours.work, "×", "server, subscriber, PostgreSQL"
        )
        if not pace.batched:
            continue
        batched.turns.append(await contest.rival(shape, pace.seconds, "batched"))
        note = f"the product's is {ours.rate / max(1.0, batched.rate):.1f}× that; {batched.note()}"
        report.add(SECTION, "  mosquitto, INSERT of what waits", batched.rate, "/s", note)
    verdict = "all are in the database" if not contest.missing else f"{contest.missing} ARE MISSING"
    report.add(SECTION, "acknowledged by the product and missing", contest.missing, "", verdict)


async def connects(report: Report, contest: Contest, pace: MqttPace) -> None:
    """Connects a second, in turns."""
    server = contest.server
    ours: list[Connects] = []
    theirs: list[Connects] = []
    process = psutil.Process(server.pid)
    for _ in range(pace.rounds):
        ours.append(await contest.connects(server.ports["mqtt"], contest.shown.path, process, pace.seconds))
        if mosquitto_program() is not None:
            async with mosquitto(contest.directory, contest.authority, contest.shown) as broker:
                other = psutil.Process(broker.process.pid)
                theirs.append(await contest.connects(broker.port, contest.shown.path, other, pace.seconds))
    note = f"full handshake with client certificate, CONNECT, CONNACK; {_connect_cost(ours)}"
    report.add(CONNECTS, "connects", statistics.median(each.rate for each in ours), "/s", note)
    if not theirs:
        report.add(CONNECTS, "  NO RATIO", 0, "×", MISSING)
        return
    note = f"{_connect_cost(theirs)}; asks nobody, keeps no session table"
    report.add(CONNECTS, "  mosquitto", statistics.median(each.rate for each in theirs), "/s", note)
    ratio = statistics.median(a.rate / b.rate for a, b in zip(ours, theirs, strict=True))
    report.add(CONNECTS, "  ratio", ratio, "×", f"median of {pace.rounds} pairs, in turns; load on the same cores")


def _connect_cost(seen: Sequence[Connects]) -> str:
    server, load = (statistics.median(values) for values in zip(*((e.server, e.load) for e in seen), strict=True))
    return f"µs of a core each: server {server * 1e6:,.0f}, load {load * 1e6:,.0f}"


async def memory(report: Report, contest: Contest, pace: MqttPace) -> None:
    """What an idle session takes, on a server that has just been started."""
    server = contest.server
    note = f"of {pace.idle:,}, each of a device of its own; aim: 45"
    each = await contest.memory(server.ports["mqtt"], server.ca_chain, psutil.Process(server.pid), pace.idle)
    if mosquitto_program() is not None:
        async with mosquitto(contest.directory, contest.authority, contest.shown) as broker:
            process = psutil.Process(broker.process.pid)
            other = await contest.memory(broker.port, contest.shown.path, process, pace.idle)
        note += f"; mosquitto {other:.0f}"
    report.add(CONNECTS, "an idle session", each, "KiB", note)


def _shares(clients: Sequence[Client]) -> list[list[Client]]:
    """One for each generator."""
    return [list(clients[number::GENERATORS]) for number in range(GENERATORS)]


def _cpu(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


async def _listening(port: int) -> None:
    end = time.perf_counter() + 10
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if time.perf_counter() > end:
                raise
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return


async def _alone(pace: MqttPace) -> None:
    report = Report({}, [])
    try:
        with tempfile.TemporaryDirectory(prefix="gatehouse-bench-") as directory:
            await mqtt(report, Path(directory), pace)
    finally:  # what is known by then, also when the rest went wrong
        report.show(Console())


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
    uvloop.run(_alone(MqttPace(2, 1, 200, False) if "--quick" in sys.argv else MqttPace(2, 3, 5_000, True)))
