"""Uplinks by the thousand: wrk with 64 keep-alive connections over TLS, all of one gateway.

wrk is C and an event loop, so that the generator takes little of the cores that the server and PostgreSQL need. It has
one thread for the same reason, and therefore one key: only its threads can differ in what they send. For the server
these are 64 sessions either way.
Its script (uplinks.lua) counts each answer by its status. Latencies are wrk's own: from the first written byte to
the answer's last, with its correction for the requests that a stalled connection could not send (without that, a
closed loop hides exactly the stalls). Where wrk cannot be had, callers.py does the same at a multiple of the cost.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from tests.bench.callers import closed_loop, connect_many, percentile, post
from tests.bench.servers import BenchServer, Device

CONNECTIONS = 64
DEVICES = 1
"""Threads of wrk, each with a key of its own."""
Kind = Literal["telemetry", "event", "named"]
_SCRIPT = Path(__file__).with_name("uplinks.lua")


class Load(msgspec.Struct, frozen=True):
    """What one run of load saw. Times are seconds; `late` is how late a request by the timetable left, at worst."""

    accepted: int
    refused: int
    other: int
    failed: int
    seconds: float
    p50: float
    p90: float
    p99: float
    max: float
    late: float
    generator_cpu: float = 0.0

    @property
    def rate(self) -> float:
        """Uplinks acknowledged per second."""
        return self.accepted / self.seconds

    @property
    def clean(self) -> bool:
        """Whether every answer was a 202."""
        return not (self.refused or self.other or self.failed)


def wrk() -> str | None:
    """Where wrk is, if it is."""
    return shutil.which("wrk")


async def load(
    server: BenchServer, devices: Sequence[Device], kind: Kind, seconds: float, *, rate: float = 0.0
) -> Load:
    """Send uplinks over 64 connections for so long; as fast as they are answered, or `rate` a second by a timetable."""
    program = wrk()
    if program is None:
        return await _load_by_callers(server, devices, kind, seconds)
    with tempfile.TemporaryDirectory() as directory:
        keys = Path(directory) / "devices"
        keys.touch(0o600)
        keys.write_text("".join(f"{device.device_id} {device.key}\n" for device in devices))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = await asyncio.create_subprocess_exec(
            program,
            *("-t", str(len(devices)), "-c", str(CONNECTIONS), "-d", f"{round(seconds)}s", "--timeout", "20s"),
            *("-s", str(_SCRIPT), f"https://127.0.0.1:{server.ports['https']}/"),
            *("--", str(keys), kind, str(rate)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **({"BENCH_TIMETABLE": "1"} if rate else {})},
        )
        out, _ = await process.communicate()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = out.decode()
    lines = [line.removeprefix("result ") for line in text.splitlines() if line.startswith("result ")]
    assert process.returncode == 0, f"wrk failed:\n{text}"
    assert lines, f"wrk said nothing:\n{text}"
    seen = msgspec.json.decode(lines[0])
    for name in ("p50", "p90", "p99", "max", "late"):
        seen[name] /= 1e6
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return msgspec.convert({**seen, "generator_cpu": cpu}, Load)


async def _load_by_callers(server: BenchServer, devices: Sequence[Device], kind: Kind, seconds: float) -> Load:
    callers = await connect_many(server, CONNECTIONS)
    body = {"kind": "event" if kind == "event" else "telemetry", "payload": {"env.temperature": 21.5}}
    requests = {}
    for number, caller in enumerate(callers):
        device = devices[number % len(devices)]
        requests[caller] = post(f"/devices/{device.device_id}/uplink", body, device.key)
    rate, times = await closed_loop(callers, seconds, lambda caller: caller.ask(requests[caller]), 202)
    for caller in callers:
        caller.cut()
    p50, p90, p99 = (percentile(times, percent) for percent in (50, 90, 99))
    return Load(len(times), 0, 0, 0, len(times) / rate, p50, p90, p99, times[-1], 0.0)
