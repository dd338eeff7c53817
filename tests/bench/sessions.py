"""What idle devices cost, and how fast a revocation throws them out.

One credential with as many connections as said, each authenticated by one uplink and idle since. Its revocation is
timed twice: by the receipt, from the commit to the last closed session on the server; and by the devices, from the
operator's request leaving to the last of them having read the end of its connection.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.callers import Caller, connect_many, uplink
from tests.bench.servers import BenchServer, Device


@dataclass(frozen=True, slots=True)
class Revocation:
    """Seconds until the last session was gone: `closed` by the server's receipt, `seen` by the devices."""

    sessions: int
    closed: float
    seen: float
    remaining: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident MiB of the server with so many idle TLS connections, each with its session."""

    connections: int
    mib: float


async def open_sessions(server: BenchServer, device: Device, count: int, *, first: int = 0) -> list[Caller]:
    """So many connections of one device, each with a session."""
    callers = await connect_many(server, count, first=first)
    request = uplink(device)
    for start in range(0, count, 64):
        replies = await asyncio.gather(*[caller.ask(request) for caller in callers[start : start + 64]])
        assert all(reply.status == 202 for reply in replies), replies[0]
    return callers


async def revoke(server: BenchServer, device: Device, callers: Sequence[Caller]) -> Revocation:
    """Revoke the device's credential and wait until every connection is closed."""
    gc.collect()
    began = time.perf_counter()
    path = f"/devices/{device.device_id}/credentials/{device.credential_id}"
    receipt = await server.ask("DELETE", path)
    await asyncio.wait_for(asyncio.gather(*[caller.closed for caller in callers]), 60)
    sessions, remaining = receipt["sessions"], receipt["remaining"]
    assert isinstance(sessions, list)
    assert isinstance(remaining, int)
    last = max((caller.closed_at or 0.0) for caller in callers) - began
    closed = max(session["closed_after_ms"] for session in sessions) / 1000
    return Revocation(len(callers), closed, last, remaining)


async def memory_and_revocation(server: BenchServer, counts: tuple[int, int]) -> tuple[list[Memory], list[Revocation]]:
    """With a server that has just started: memory at two counts, `(fewer, more)`; then revocations of that many and of
    one."""
    fewer, more = counts
    one, some, many = await server.register(3)
    memory = [Memory(0, server.resident_mib())]
    few = await open_sessions(server, some, fewer)
    memory.append(await _settled(server, fewer))
    lot = await open_sessions(server, many, more - fewer, first=fewer)
    memory.append(await _settled(server, more))
    lot += await open_sessions(server, many, fewer, first=more)
    single = await open_sessions(server, one, 1, first=more + fewer)
    revocations = [await revoke(server, one, single), await revoke(server, some, few), await revoke(server, many, lot)]
    return memory, revocations


async def _settled(server: BenchServer, count: int) -> Memory:
    await asyncio.sleep(0.5)  # what the last handshakes left is freed by then
    return Memory(count, server.resident_mib())
