"""An acknowledgement means stored: the server and its PostgreSQL are killed under a load of uplinks, again and again.

Each sender numbers its uplinks, sends without a pause over keep-alive connections, and writes down what was answered
202. Half of them give a message id and repeat what was not answered, as a careful device does. After all the kills the
database must hold every acknowledged uplink, and each repeated one exactly once.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import Counter
from pathlib import Path

import asyncpg
import pytest

from edge.postgres import attach_or_start
from tests.processes import Api, ServerProcess, lasting_ports, server_process

SERVER_KILLS = 12
POSTGRES_KILLS = 10
SENDERS = 8
ACKNOWLEDGED_BETWEEN_KILLS = 40
"""Enough that a kill falls into the middle of a stream, few enough that twenty-two fit into a minute."""


class Sender:
    """One device that reports for ever; `careful` repeats what was not acknowledged under the same message id."""

    def __init__(self, server: ServerProcess, device_id: str, key: str, name: str, careful: bool) -> None:
        self._server = server
        self._path = f"/devices/{device_id}/uplink"
        self._key = key
        self._name = name
        self._careful = careful
        self.acknowledged: list[str] = []
        self.unexpected: list[tuple[int, object]] = []

    async def run(self) -> None:
        number = 0
        api: Api | None = None
        while True:
            mark = f"{self._name}-{number}"
            body = {"kind": "event", "payload": {"mark": mark}, **({"message_id": mark} if self._careful else {})}
            try:
                if api is None:
                    api = await Api.connect(self._server)
                status, answer = await api.request("POST", self._path, body, self._key)
            except (OSError, EOFError, ssl.SSLError, ValueError):
                if api is not None:
                    api.close()
                api = None
                number += not self._careful
                await asyncio.sleep(0.02)
                continue
            if status == 202:
                self.acknowledged.append(mark)
                number += 1
            elif status in (429, 503):
                number += not self._careful
                await asyncio.sleep(0.02)
            else:
                self.unexpected.append((status, answer))
                number += 1


@pytest.mark.timeout(400)
async def test_every_acknowledged_uplink_survives_kills_of_the_server_and_of_postgresql(tmp_path: Path) -> None:
    async with server_process(tmp_path / "D", ports=lasting_ports()) as server:
        senders = await _senders(server)
        running = [asyncio.create_task(s.run()) for s in senders]
        try:
            for _ in range(SERVER_KILLS):
                await _progress(senders)
                await server.kill()
                await server.start()
            for _ in range(POSTGRES_KILLS):
                await _progress(senders)
                await server.kill_postgres()
            await _progress(senders)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        assert await server.stop() == 0
    assert [s.unexpected for s in senders] == [[]] * len(senders)
    stored = await _stored(tmp_path / "D")
    acknowledged = Counter(mark for s in senders for mark in s.acknowledged)
    lost = [mark for mark in acknowledged if mark not in stored]
    assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged uplinks are gone: {lost[:5]}"
    twice = [m for s in senders if s._careful for m in s.acknowledged if stored[m] != 1]
    assert not twice
    print(f"{len(acknowledged)} uplinks acknowledged over {SERVER_KILLS + POSTGRES_KILLS} kills, all stored")


async def _senders(server: ServerProcess) -> list[Sender]:
    slug = json.loads(await server.command("tenant", "create", "Kills", "--slug", "kills"))["slug"]
    token = (await server.command("token", "mint", "--tenant", slug, "--role", "tenant_admin")).strip()
    api = await Api.connect(server)
    senders = []
    for n in range(SENDERS):
        status, device = await api.request("POST", "/devices", {"name": f"d{n}", "hardware_id": f"HW-{n}"}, token)
        assert status == 201, device
        senders.append(Sender(server, device["device_id"], device["api_key"], f"s{n}", careful=n % 2 == 0))
    api.close()
    return senders


async def _progress(senders: list[Sender]) -> None:
    """Until the load flows again."""
    goal = sum(len(s.acknowledged) for s in senders) + ACKNOWLEDGED_BETWEEN_KILLS
    async with asyncio.timeout(45):
        while sum(len(s.acknowledged) for s in senders) < goal:
            await asyncio.sleep(0.005)


async def _stored(data_dir: Path) -> Counter[str]:
    async with attach_or_start(data_dir) as postgres:
        connection = await asyncpg.connect(postgres.dsn)
        try:
            rows = await connection.fetch("SELECT payload->>'mark' AS mark FROM uplink")
        finally:
            await connection.close()
    return Counter(row["mark"] for row in rows)
