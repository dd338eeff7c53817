"""A server under measurement: a process of its own with an embedded PostgreSQL of its own, fsync on, and a tenant.

The limits that exist to hold back single callers are lifted by configuration, because here one machine plays a fleet.
Everything else is the default: pool, group commit, queue. `Usage` reads what the process and its PostgreSQL have
consumed; PostgreSQL's backends are children of the server, so both sums are of one process tree.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import asyncpg
import psutil

from edge.postgres import attach_or_start
from tests.processes import START_SECONDS, Api, ServerProcess

RIVALS = (sys.executable, "-m", "tests.bench.rivals")
LIFTED = {
    "GATEHOUSE_LIMITS__KEY_REQUESTS_PER_SECOND": "1000000",
    "GATEHOUSE_LIMITS__KEY_REQUESTS_BURST": "10000000",
    "GATEHOUSE_LIMITS__TENANT_REQUESTS_PER_SECOND": "1000000",
    "GATEHOUSE_LIMITS__TENANT_REQUESTS_BURST": "10000000",
    "GATEHOUSE_LIMITS__PROVISIONING_ATTEMPTS_PER_SECOND": "1000000",
    "GATEHOUSE_LIMITS__PROVISIONING_ATTEMPTS_BURST": "10000000",
    "GATEHOUSE_LIMITS__SESSIONS_PER_DEVICE": "100000",
    "GATEHOUSE_LIMITS__CONNECTIONS_PER_ADDRESS": "1000000",
    "GATEHOUSE_LIMITS__KEEP_ALIVE_SECONDS": "600",
    "GATEHOUSE_LOGS__LEVEL": "warning",
}


@dataclass(frozen=True, slots=True)
class Device:
    """A registered device and the key it was given."""

    device_id: str
    key: str
    credential_id: str


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds consumed so far, by the server's own process and by its PostgreSQL."""

    server: float
    postgres: float

    def since(self, earlier: Usage) -> Usage:
        """What came to it."""
        return Usage(self.server - earlier.server, self.postgres - earlier.postgres)


@dataclass
class BenchServer(ServerProcess):
    """A product's or a rival's process, and the operator's dealings with it."""

    rival: str | None = None
    token: str = ""

    async def start(self) -> None:
        """As the product's; a rival has another program."""
        if self.rival is None:
            await super().start()
            return
        with (self.data_dir.parent / f"{self.data_dir.name}.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *RIVALS,
                self.rival,
                "serve",
                "--data-dir",
                str(self.data_dir),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=self._environment(),
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = await self._process.stdout.readline()
        assert line, f"the server did not start:\n{self.log_tail()}"
        self.ports = json.loads(line)["ready"]

    async def settle(self) -> None:
        """Make a tenant and an operator."""
        await self.command("tenant", "create", "Bench", "--slug", "bench")
        minted = await self.command("token", "mint", "--tenant", "bench", "--role", "tenant_admin", "--ttl", "1h")
        self.token = minted.strip()

    async def ask(self, method: str, path: str, body: object = None) -> dict[str, object]:
        """One operator's request over a connection of its own; the answer's body. Fails on refusals."""
        api = await Api.connect(self)
        try:
            status, answer = await api.request(method, path, body, self.token)
        finally:
            api.close()
        assert status < 300, f"{method} {path}: {status} {answer}"
        assert isinstance(answer, dict)
        return answer

    async def register(self, count: int) -> list[Device]:
        """New devices with API keys."""
        api = await Api.connect(self)
        devices = []
        try:
            for _ in range(count):
                body = {"name": "bench", "hardware_id": f"BENCH-{uuid4().hex}"}
                status, made = await api.request("POST", "/devices", body, self.token)
                assert status == 201, made
                devices.append(Device(made["device_id"], made["api_key"], made["credential_id"]))
        finally:
            api.close()
        return devices

    def resident_mib(self) -> float:
        """Resident memory of the server's own process, in MiB."""
        return float(psutil.Process(self.pid).memory_info().rss) / 2**20

    def usage(self) -> Usage:
        """CPU seconds so far."""
        server = psutil.Process(self.pid)
        below = [_cpu(child) for child in server.children(recursive=True)]
        return Usage(_cpu(server), sum(below))

    @asynccontextmanager
    async def database(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """A connection to its PostgreSQL."""
        async with attach_or_start(self.data_dir) as postgres:
            connection = await asyncpg.connect(postgres.dsn)
            try:
                yield connection
            finally:
                await connection.close()

    async def stored(self) -> int:
        """Uplinks in the database."""
        async with self.database() as connection:
            count: int = await connection.fetchval("SELECT count(*) FROM uplink")
            return count


@asynccontextmanager
async def bench_server(data_dir: Path, rival: str | None = None) -> AsyncIterator[BenchServer]:
    """A started server with a tenant; killed at the end, its database with it."""
    server = BenchServer(data_dir, LIFTED, rival=rival)
    try:
        await server.start()
        await server.settle()
        yield server
    finally:
        if server.running:
            await server.kill()


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0
    return float(times.user + times.system)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
