"""Durable uplinks per second through the group commit, against one INSERT per uplink through the same pool.

    .venv/bin/python -m tests.bench.uplinks [--seconds 3]

Both run on one embedded PostgreSQL with fsync on, in this process, closed loop: as many senders as said, each waiting
for its uplink before it sends the next. The baseline inserts the uplink only; the group commit also checks the payload
and, for telemetry, writes a reading. Figures are of the machine at hand; compare the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import uuid4

import asyncpg
import uvloop

from edge.postgres import EmbeddedPostgres
from registry.model import DeviceId, TenantId, Transport
from registry.payloads import Source, payload_from_json, uplink_from
from registry.storage.database import Database
from registry.storage.migrate import migrate
from registry.storage.uplinks import make_todays_partitions, new_ids
from registry.uplinks import UplinkLimits, Uplinks

PAYLOAD = b'{"env.temperature": 21.5}'
DEVICES = 1000
Send = Callable[[int], Awaitable[object]]


async def rate(send: Send, senders: int, seconds: float) -> float:
    """Uplinks per second of `senders` closed loops."""
    end = time.perf_counter() + seconds
    done = 0

    async def loop(number: int) -> None:
        nonlocal done
        while time.perf_counter() < end:
            await send(number)
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*[loop(number) for number in range(senders)])
    return done / (time.perf_counter() - began)


def one_insert_each(database: Database, sources: list[Source]) -> Send:
    """The baseline: what a straightforward handler would do."""

    async def send(number: int) -> None:
        source = sources[number % len(sources)]
        (uplink_id,) = new_ids(1, int(time.time() * 1000), os.urandom)
        async with database.connection() as connection:
            await connection.execute(
                "INSERT INTO uplink (uplink_id, tenant_id, device_id, kind, payload, received_at, transport) "
                "VALUES ($1, $2, $3, 'event', $4::text::json, now(), 'https')",
                uplink_id,
                source.tenant_id,
                source.device_id,
                PAYLOAD.decode(),
            )

    return send


def grouped(uplinks: Uplinks, sources: list[Source], kind: str, *, named: bool) -> Send:
    """The product's way."""

    def send(number: int) -> Awaitable[object]:
        message_id = uuid4().hex if named else None
        payload = payload_from_json(PAYLOAD)
        return uplinks.submit(uplink_from(sources[number % len(sources)], payload, kind=kind, message_id=message_id))

    return send


async def measure(seconds: float) -> None:
    sources = [Source(TenantId(uuid4()), DeviceId(uuid4()), Transport.HTTPS) for _ in range(DEVICES)]
    with tempfile.TemporaryDirectory() as directory:
        async with EmbeddedPostgres(Path(directory), owner="command") as postgres:
            connection = await asyncpg.connect(postgres.dsn)
            await migrate(connection)
            await make_todays_partitions(connection)
            await connection.close()
            database = await Database.open(postgres.dsn, size=10)
            print(f"PostgreSQL {postgres.binaries.version}, {postgres.binaries.origin}; uplinks/s and × the baseline")
            print(f"{'':44}{'64 in flight':>18}{'1,000 in flight':>20}")
            base = [await rate(one_insert_each(database, sources), n, seconds) for n in (64, 1000)]
            show("one INSERT per uplink, pool of 10", base, base)
            for runners in (1, 2, 3):
                for kind, named in (("event", False), ("telemetry", False), ("telemetry", True)):
                    figures = []
                    for senders in (64, 1000):
                        uplinks = Uplinks(database, limits=UplinkLimits(runners=runners))
                        figures.append(await rate(grouped(uplinks, sources, kind, named=named), senders, seconds))
                        await uplinks.stop()
                    name = f"group commit, {runners} runner(s), {kind}{', message id' if named else ''}"
                    show(name, figures, base)
            await database.close()


def show(name: str, figures: list[float], base: list[float]) -> None:
    cells = [f"{figure:>12,.0f} {figure / ground:4.1f}×" for figure, ground in zip(figures, base, strict=True)]
    print(f"{name:44}{cells[0]:>18}{cells[1]:>20}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    uvloop.run(measure(parser.parse_args().seconds))
