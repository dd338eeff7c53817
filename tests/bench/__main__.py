"""`make bench`: what this machine does with this Gatehouse, in figures of one run that compare with each other.

    make bench [ARGS="--quick"] [ARGS="--json"]

Servers are processes of their own with embedded PostgreSQL and fsync on; everything goes over TLS. The load, the
server and PostgreSQL share the machine's cores, so absolute figures say little about another machine: compare lines of
one run. Throughput is measured in rounds, product and rivals in turns, and medians are shown, because a machine is
never as quiet as one thinks; a ratio is the median of those of neighbouring rounds. docs/benchmarks.md explains every
line. Nothing here can fail a test run; a line that contradicts a promise (an acknowledged uplink that is not stored)
says so and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from rich.console import Console

from tests.bench import machine
from tests.bench.callers import percentile
from tests.bench.certificates import idle_tls, issue
from tests.bench.coap import FULL as COAP
from tests.bench.coap import QUICK as COAP_QUICK
from tests.bench.coap import CoapPace, coap
from tests.bench.handshakes import Pair, certified_server, of_openssl, of_product
from tests.bench.load import DEVICES, Kind, Load, load
from tests.bench.mqtt import MqttPace, mqtt
from tests.bench.provisioning import Guess, claims, refused_api_keys, refused_provision_keys
from tests.bench.report import Report
from tests.bench.servers import BenchServer, Device, Usage, bench_server
from tests.bench.sessions import memory_and_revocation

UPLINKS = "Durable uplinks over TLS, 64 connections"
CLAIMS = "Provisioning, 64 connections"
MEMORY = "Memory of the server's process"
REVOCATION = "Revocation of one credential"
TLS = "Mutual TLS 1.3 with client certificates"
REFUSALS = "Refusals, one request at a time"
BOUNDS = "Bounds of this machine"
KINDS: tuple[Kind, ...] = ("telemetry", "event")
"""Telemetry writes two rows, the uplink and its reading; an event one."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long each part may take."""

    seconds: float
    rounds: int
    claim_seconds: float
    idle: tuple[int, int]
    guesses: int
    certificates: bool
    mqtt: MqttPace
    coap: CoapPace


FULL = Pace(
    seconds=3,
    rounds=5,
    claim_seconds=5,
    idle=(1000, 2000),
    guesses=2000,
    certificates=True,
    mqtt=MqttPace(seconds=2, rounds=3, idle=5_000, batched=True),
    coap=COAP,
)
QUICK = Pace(
    seconds=2,
    rounds=1,
    claim_seconds=2,
    idle=(100, 200),
    guesses=200,
    certificates=False,
    mqtt=MqttPace(seconds=2, rounds=1, idle=200, batched=False),
    coap=COAP_QUICK,
)


@dataclass(slots=True)
class Contender:
    """A server under load, and what its rounds gave."""

    name: str
    server: BenchServer
    devices: Sequence[Device]
    loads: dict[Kind, list[Load]] = field(default_factory=dict)
    usages: dict[Kind, list[Usage]] = field(default_factory=dict)
    acknowledged: int = 0
    refused: int = 0
    """Requests that were answered otherwise, or not at all."""
    missing: int = 0
    """Acknowledged uplinks that the database does not have."""

    async def run(self, kind: Kind, seconds: float, *, rate: float = 0.0) -> Load:
        """One round; counts what the database has afterwards."""
        before, used = await self.server.stored(), self.server.usage()
        seen = await load(self.server, self.devices, kind, seconds, rate=rate)
        spent = self.server.usage().since(used)
        if not rate:
            self.loads.setdefault(kind, []).append(seen)
            self.usages.setdefault(kind, []).append(spent)
        self.acknowledged += seen.accepted
        self.refused += seen.refused + seen.other + seen.failed
        self.missing += max(0, seen.accepted - (await self.server.stored() - before))
        return seen

    def rate(self, kind: Kind) -> float:
        """The median of its rounds, uplinks per second."""
        return statistics.median(seen.rate for seen in self.loads[kind])

    def cost(self, kind: Kind) -> str:
        """CPU microseconds per uplink."""
        count = sum(seen.accepted for seen in self.loads[kind])
        server = sum(used.server for used in self.usages[kind]) / count
        postgres = sum(used.postgres for used in self.usages[kind]) / count
        generator = sum(seen.generator_cpu for seen in self.loads[kind]) / count
        parts = (("server", server), ("PostgreSQL", postgres), ("load", generator))
        return "µs of a core each: " + ", ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in parts)

    def work(self, kind: Kind) -> float:
        """CPU seconds per uplink of the server and its PostgreSQL."""
        spent = sum(used.server + used.postgres for used in self.usages[kind])
        return spent / sum(seen.accepted for seen in self.loads[kind])

    def latencies(self, kind: Kind) -> str:
        """Medians of its rounds, in milliseconds."""
        parts = [
            (name, statistics.median(getattr(s, name) for s in self.loads[kind])) for name in ("p50", "p99", "max")
        ]
        return ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in parts)

    def p99(self, kind: Kind) -> float:
        """The median of its rounds, milliseconds."""
        return statistics.median(seen.p99 for seen in self.loads[kind]) * 1e3


async def bench(pace: Pace, console: Console) -> tuple[Report, bool]:
    """All measurements; the report and whether every promise held."""
    report = Report({}, [])
    with tempfile.TemporaryDirectory(prefix="gatehouse-bench-") as directory:
        base = Path(directory)
        async with AsyncExitStack() as stack:
            with console.status("starting three servers") as status:
                contenders = await asyncio.gather(
                    _contender(stack, "product", base / "product", None),
                    _contender(stack, "one INSERT per request", base / "one-insert", "one-insert"),
                    _contender(stack, "naive", base / "naive", "naive"),
                )
                product = contenders[0]
                report.context = dict(machine.described(product.server, await machine.postgres_version(product.server)))
                started = product.server.resident_mib()
                status.update("uplinks")
                await throughput(report, contenders, pace)
                loaded = product.server.resident_mib()
                status.update("claims")
                await provisioning(report, product.server, pace)
                status.update("refusals")
                await refusals(report, product.server, pace)
                status.update("bounds")
                await bounds(report, product, base, pace)
                for rival in contenders[1:]:
                    await rival.server.kill()
                await product.server.stop()
                await product.server.start()
                status.update("idle sessions and revocations")
                await sessions(report, product.server, pace, started, loaded)
                await product.server.kill()
                if pace.certificates:
                    status.update("handshakes and certificates")
                    await certificates(report, base, pace)
        with console.status("MQTT"):
            stored = await mqtt(report, base, pace.mqtt)
        with console.status("CoAP"):
            stored = await coap(report, base, pace.coap) and stored
        held = stored and not any(contender.missing for contender in contenders)
    return report, held


async def throughput(report: Report, contenders: Sequence[Contender], pace: Pace) -> None:
    """Uplinks: product and rivals in turns, then the product alone with message ids and at half its rate."""
    product, single, naive = contenders
    for contender in contenders:
        await load(contender.server, contender.devices, "telemetry", 1)  # sessions, plans and caches are warm then
    for number in range(pace.rounds):
        for kind in KINDS:
            for contender in (product, single) if number or kind == "event" else contenders:
                await contender.run(kind, pace.seconds)
    await product.run("named", pace.seconds)
    half = await product.run("telemetry", pace.seconds, rate=product.rate("telemetry") / 2)
    for kind in KINDS:
        pairs = zip(product.loads[kind], single.loads[kind], strict=True)
        ratio = statistics.median(ours.rate / theirs.rate for ours, theirs in pairs)
        report.add(UPLINKS, f"{kind}: group commit", product.rate(kind), "/s", product.cost(kind))
        report.add(UPLINKS, f"{kind}: one INSERT per request", single.rate(kind), "/s", single.cost(kind))
        report.add(UPLINKS, f"{kind}: ratio", ratio, "×", f"median of {pace.rounds} pairs, in turns; required are 3")
        less = single.work(kind) / product.work(kind)
        report.add(
            UPLINKS, f"{kind}: less CPU per uplink", less, "×", "server and PostgreSQL; other load changes it little"
        )
    report.add(
        UPLINKS,
        "telemetry: naive, a look-up and an INSERT",
        naive.rate("telemetry"),
        "/s",
        f"the product's is {product.rate('telemetry') / naive.rate('telemetry'):.1f}× that; {naive.cost('telemetry')}",
    )
    report.add(UPLINKS, "telemetry with message ids", product.rate("named"), "/s", product.cost("named"))
    for kind in KINDS:
        note = f"{product.latencies(kind)}; one INSERT per request: {single.latencies(kind)}"
        report.add(UPLINKS, f"{kind}: p99 latency, as fast as it goes", product.p99(kind), "ms", note)
    note = f"p50 {half.p50 * 1e3:.1f}, max {half.max * 1e3:.1f}; {half.rate:,.0f}/s sent by a timetable"
    if half.late > 0.05:
        note += f", the latest {half.late * 1e3:.0f} ms late"
    report.add(UPLINKS, "telemetry: p99 latency at half of that rate", half.p99 * 1e3, "ms", note)
    for contender in contenders:
        verdict = "all are in the database" if not contender.missing else f"{contender.missing} ARE MISSING"
        note = f"{verdict}; {contender.refused} requests were refused or failed"
        report.add(UPLINKS, f"acknowledged, {contender.name}", contender.acknowledged, "", note)


async def provisioning(report: Report, server: BenchServer, pace: Pace) -> None:
    """Claims and re-claims."""
    seen = await claims(server, pace.claim_seconds)
    note = f"{seen.answered} answered 201, {seen.devices} new devices; each its own transaction"
    report.add(CLAIMS, "claims", seen.rate, "/s", note)
    report.add(CLAIMS, "claim: p99 latency", percentile(seen.times, 99) * 1e3, "ms", _spread(seen.times))
    report.add(CLAIMS, "re-claims", seen.again_rate, "/s", "the same hardware ids again; they only read")
    report.add(CLAIMS, "re-claim: p99 latency", percentile(seen.again_times, 99) * 1e3, "ms", _spread(seen.again_times))


async def refusals(report: Report, server: BenchServer, pace: Pace) -> None:
    """Whether the time tells a known secret from an unknown one."""

    def show(name: str, guess: Guess) -> None:
        difference = (guess.known - guess.unknown) * 1e6
        note = f"unknown: {guess.unknown * 1e3:.3f} ms; difference {difference:+.0f} µs; medians of {pace.guesses}"
        report.add(REFUSALS, name, guess.known * 1e3, "ms", note)

    show("revoked API key", await refused_api_keys(server, pace.guesses))
    show("disabled template's provisioning key", await refused_provision_keys(server, pace.guesses))


async def sessions(report: Report, server: BenchServer, pace: Pace, started: float, loaded: float) -> None:
    """Memory and revocation, on a server that has just been started again."""
    memory, revocations = await memory_and_revocation(server, pace.idle)
    report.add(MEMORY, "after its start", started, "MiB", "resident, without PostgreSQL")
    report.add(MEMORY, "after the load", loaded, "MiB")
    idle = memory[0]
    for seen in memory[1:]:
        each = (seen.mib - idle.mib) * 1024 / seen.connections
        note = f"{each:.0f} KiB for each connection, its TLS and its session"
        report.add(MEMORY, f"with {seen.connections:,} idle sessions", seen.mib, "MiB", note)
    for revoked in revocations:
        name = f"{revoked.sessions:,} HTTPS session" + ("s" if revoked.sessions > 1 else "")
        note = f"from the commit to the last one closed; the last device knew after {revoked.seen * 1e3:.0f} ms"
        if revoked.remaining:
            note += f"; {revoked.remaining} REMAINED"
        report.add(REVOCATION, name, revoked.closed * 1e3, "ms", note)


async def certificates(report: Report, base: Path, pace: Pace) -> None:
    """Handshakes against openssl's own server, certificates, and idle connections by certificate."""
    shown, own = Pair.make(base, "server"), Pair.make(base, "client")
    rival = await of_openssl(shown, own, pace.seconds)
    async with certified_server(base / "certified", shown) as server:
        seen = await of_product(server, shown, own, pace.seconds)
        issued = await issue(server, pace.claim_seconds)
        await server.stop()
        await server.start()
        idle = await idle_tls(server, base, pace.idle[1])
    for name, ours, theirs in (
        ("full handshakes", seen.full, rival.full if rival else None),
        ("resumed handshakes", seen.resumed, rival.resumed if rival else None),
    ):
        note = (
            f"openssl s_server {theirs:,.0f}/s: ratio {ours / theirs:.2f}" if theirs else "no openssl to compare with"
        )
        report.add(TLS, name, ours, "/s", f"{note}; callers on the same cores")
    note = f"claims with a CSR; one core signs {issued.bound:,.0f}/s without a database"
    report.add(TLS, "certificates issued", issued.rate, "/s", note)
    report.add(TLS, "certificate: p99 latency", percentile(issued.times, 99) * 1e3, "ms", _spread(issued.times))
    note = f"of {idle.connections:,}; {idle.session:.0f} KiB with its session after an uplink; aim: 45 KB"
    report.add(TLS, "an idle connection", idle.tls, "KiB", note)


async def bounds(report: Report, product: Contender, base: Path, pace: Pace) -> None:
    """What the disk and PostgreSQL allow."""
    fsync = machine.fsync_seconds(base)
    note = f"{1 / fsync:,.0f} a second, one after another"
    report.add(BOUNDS, "8 KiB written and synced", fsync * 1e3, "ms", note)
    rate = await machine.pgbench_rate(product.server, round(pace.seconds))
    if rate is not None:
        report.add(BOUNDS, "pgbench: single INSERTs, 10 connections", rate, "/s", "no TLS, no HTTP, no Python")


async def _contender(stack: AsyncExitStack, name: str, data_dir: Path, rival: str | None) -> Contender:
    server = await stack.enter_async_context(bench_server(data_dir, rival))
    return Contender(name, server, await server.register(DEVICES))


def _spread(times: Sequence[float]) -> str:
    return f"p50 {percentile(times, 50) * 1e3:.1f}, max {times[-1] * 1e3:.1f}"


def main() -> int:
    """Run and print; 0 unless a promise was broken."""
    parser = argparse.ArgumentParser(prog="make bench", description="See docs/benchmarks.md.")
    parser.add_argument(
        "--quick", action="store_true", help="less of everything, no certificates, about 80 s; figures are rough"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
    console = Console(stderr=arguments.json)
    report, held = uvloop.run(bench(QUICK if arguments.quick else FULL, console))
    if arguments.json:
        sys.stdout.write(report.json() + "\n")
    else:
        report.show(Console())
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
