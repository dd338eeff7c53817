"""Claims per second: `POST /provision` with one provisioning key, by 64 devices at a time.

A claim makes a device, a credential, an event and an audit row in one transaction with one commit of its own: nothing
is grouped, because each answer carries a secret. A re-claim (the same hardware id again) only reads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

from tests.bench.callers import Caller, Reply, closed_loop, connect_many, median, post
from tests.bench.servers import BenchServer

CALLERS = 64


@dataclass(frozen=True, slots=True)
class Claims:
    """Rates per second and the times of single claims in seconds, ascending."""

    rate: float
    times: list[float]
    again_rate: float
    again_times: list[float]
    devices: int
    answered: int


async def claims(server: BenchServer, seconds: float) -> Claims:
    """Measure first claims, then re-claims of what was claimed."""
    key = str((await _template(server))["provision_key"])
    numbers = itertools.count()
    mark = uuid4().hex[:8]

    def request(number: int) -> bytes:
        hardware_id = f"{mark}-{number:08d}"
        return post("/provision", {"provision_key": key, "device_name": "bench", "hardware_id": hardware_id})

    callers = await connect_many(server, CALLERS)
    async with server.database() as database:
        before: int = await database.fetchval("SELECT count(*) FROM device")
        rate, times = await closed_loop(callers, seconds, lambda c: c.ask(request(next(numbers))), 201)
        after: int = await database.fetchval("SELECT count(*) FROM device")
    claimed = itertools.cycle(range(len(times)))
    again_rate, again_times = await closed_loop(callers, seconds / 2, lambda c: c.ask(request(next(claimed))), 200)
    for caller in callers:
        caller.cut()
    return Claims(rate, times, again_rate, again_times, after - before, len(times))


@dataclass(frozen=True, slots=True)
class Guess:
    """Median seconds until a refusal, of a secret that the server knows and of one that it does not."""

    known: float
    unknown: float


async def refused_api_keys(server: BenchServer, samples: int) -> Guess:
    """A revoked device's key against one that never was: both are refused with the same 401."""
    (device,) = await server.register(1)
    await server.ask("DELETE", f"/devices/{device.device_id}/credentials/{device.credential_id}")
    path = f"/devices/{device.device_id}/uplink"
    body = {"kind": "event", "payload": 1}
    return await _alternate(
        server,
        samples,
        lambda: post(path, body, device.key),
        lambda: post(path, body, "sk_live_" + (uuid4().hex + uuid4().hex)[:43]),
        401,
    )


async def refused_provision_keys(server: BenchServer, samples: int) -> Guess:
    """A disabled template's key against one that never was: both are refused with the same 403."""
    made = await _template(server)
    await server.ask("PUT", f"/provisioning/templates/{made['template_id']}", {"status": "disabled"})

    def request(key: str) -> bytes:
        body = {"provision_key": key, "device_name": "bench", "hardware_id": uuid4().hex}
        return post("/provision", body)

    return await _alternate(
        server,
        samples,
        lambda: request(str(made["provision_key"])),
        lambda: request("pk_" + (uuid4().hex + uuid4().hex)[:43]),
        403,
    )


_PER_ADDRESS = 100  # below what one address may fail before it is told to slow down


async def _alternate(
    server: BenchServer,
    samples: int,
    known: Callable[[], bytes],
    unknown: Callable[[], bytes],
    expected: int,
) -> Guess:
    """Ask in turns, one request at a time, so that whatever else the machine does meets both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    first = 4096 + int(time.monotonic() * 7) % 500_000
    for address in range(max(1, 2 * samples // _PER_ADDRESS)):
        (caller,) = await connect_many(server, 1, first=first + address)
        for number in range(_PER_ADDRESS):
            reply = await _ask(caller, (known, unknown)[number % 2](), expected)
            times[number % 2].append(reply.seconds)
        caller.cut()
    return Guess(median(times[0]), median(times[1]))


async def _ask(caller: Caller, request: bytes, expected: int) -> Reply:
    reply = await caller.ask(request)
    assert reply.status == expected, (reply.status, reply.body)
    return reply


async def _template(server: BenchServer) -> dict[str, object]:
    return await server.ask("POST", "/provisioning/templates", {"name": f"bench {uuid4().hex[:8]}"})
