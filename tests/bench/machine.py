"""The machine at hand, and the bounds that it sets: how fast it can make a commit durable, and PostgreSQL insert."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import ssl
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from edge.postgres import attach_or_start
from tests.bench.callers import median
from tests.bench.load import wrk
from tests.bench.servers import BenchServer, cores

_BLOCK = 8192  # PostgreSQL's page, and what one small commit writes of its log
_INSERT = """\\set n random(1, 1000)
INSERT INTO uplink (uplink_id, tenant_id, device_id, kind, payload, received_at, transport)
VALUES (gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 'event', '{"env.temperature": 21.5}', now(), 'https');
"""


def described(server: BenchServer, postgres: str) -> list[tuple[str, str]]:
    """What a reader must know to compare the figures."""
    tools = wrk() or "missing: loaded by Python callers instead, whose cost is near the server's"
    return [
        ("processor", f"{_model()}, {cores()} cores for load, server and PostgreSQL together"),
        ("PostgreSQL", f"{postgres}, default settings of the embedded server, fsync on"),
        ("Python", f"{platform.python_version()}, uvloop {version('uvloop')}, asyncpg {version('asyncpg')}"),
        ("TLS", f"{ssl.OPENSSL_VERSION} in the callers; pyOpenSSL {version('pyopenssl')} in the server, TLS 1.3"),
        ("wrk", tools),
        ("load before", f"{os.getloadavg()[0]:.1f} runnable on average in the last minute"),
    ]


def fsync_seconds(directory: Path, seconds: float = 1.0) -> float:
    """Median time of writing 8 KiB in place and fdatasync, which is what a commit waits for at least."""
    times = []
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(_BLOCK))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            os.pwrite(file.fileno(), os.urandom(_BLOCK), 0)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return median(times)


async def postgres_version(server: BenchServer) -> str:
    """Version and origin of the binaries that the server runs on."""
    async with server.database() as database:
        number = await database.fetchval("SHOW server_version")
    origin = "installed" if _bindir(server) is not None and "site-packages" not in str(_bindir(server)) else "wheel"
    return f"{number}, {origin}"


async def pgbench_rate(server: BenchServer, seconds: int) -> float | None:
    """Single INSERTs per second by pgbench with ten connections, prepared; None where there is no pgbench."""
    program = _pgbench(server)
    if program is None:
        return None
    async with attach_or_start(server.data_dir) as postgres:
        with tempfile.TemporaryDirectory() as directory:
            script = Path(directory) / "insert.sql"
            script.write_text(_INSERT)
            process = await asyncio.create_subprocess_exec(
                str(program),
                *("-n", "-f", str(script), "-c", "10", "-j", "1", "-M", "prepared", "-T", str(seconds)),
                postgres.dsn,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            out, _ = await process.communicate()
    found = re.search(r"tps = ([0-9.]+)", out.decode())
    return float(found[1]) if found else None


def _bindir(server: BenchServer) -> Path | None:
    try:
        return Path(os.readlink(f"/proc/{server.postmaster_pid()}/exe")).parent
    except OSError:
        return None


def _pgbench(server: BenchServer) -> Path | None:
    bindir = _bindir(server)
    program = bindir / "pgbench" if bindir is not None else None
    return program if program is not None and program.exists() else None


def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
