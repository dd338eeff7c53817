"""Two `gatehouse serve` processes on one PostgreSQL: what one is told, the other does, and who is silent is named.

Each node has its own data directory, and both have the same `dsn` and key ring (docs/operations.md, two nodes). What
can be lost here is a node: killed, it takes its sessions along and confirms nothing; frozen, it keeps them until it
hears again, which it does by itself.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psutil
import pytest

from registry.sealing import load_or_create
from registry.storage.migrate import available
from tests.processes import Api, ServerProcess, server_process
from tests.whole_system import Tenant, client, new_tenant, ops_page, start_that_fails, until

SOON = 4.0
"""Seconds within which a revocation reaches another node, a busy machine's worst; a silent one is waited for longer."""


def _environ(dsn: str, tmp_path: Path, node: str) -> dict[str, str]:
    return {
        "GATEHOUSE_DATABASE__DSN": dsn,
        "GATEHOUSE_SECURITY__KEY_RING": str(tmp_path / "key-ring.json"),
        "GATEHOUSE_NODE__ID": node,
    }


@asynccontextmanager
async def _two_nodes(dsn: str, tmp_path: Path) -> AsyncIterator[tuple[ServerProcess, ServerProcess, Tenant]]:
    """Nodes `a` and `b`, and a tenant whose operator talks to `a`."""
    async with (
        server_process(tmp_path / "A", _environ(dsn, tmp_path, "a")) as a,
        server_process(tmp_path / "B", _environ(dsn, tmp_path, "b")) as b,
    ):
        yield a, b, await new_tenant(a)


class Device:
    """A device connected to one node."""

    def __init__(self, api: Api, made: dict[str, Any]) -> None:
        self.api = api
        self.made = made
        self.path = f"/devices/{made['device_id']}"

    async def sends(self) -> int:
        """The status of one uplink over this connection."""
        body = {"kind": "event", "payload": {"n": 1}}
        return (await self.api.request("POST", f"{self.path}/uplink", body, self.made["api_key"]))[0]

    async def thrown_out(self, seconds: float = SOON) -> bool:
        """Whether the server ends the connection within the time; what it still sends is not looked at."""
        try:
            async with asyncio.timeout(seconds):
                while await self.api.reader.read(4096):
                    pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True

    async def revoked_by(self, operator: httpx.AsyncClient) -> dict[str, Any]:
        """The receipt of revoking the device's credential."""
        answer = await operator.delete(f"{self.path}/credentials/{self.made['credential_id']}")
        assert answer.status_code == 200, answer.text
        receipt: dict[str, Any] = answer.json()
        return receipt


Connect = Callable[[ServerProcess, dict[str, Any]], Awaitable[Device]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connects a device to a node and sends one uplink; all connections are gone at the end."""
    made: list[Device] = []

    async def connected(server: ServerProcess, device: dict[str, Any]) -> Device:
        made.append(Device(await Api.connect(server), device))
        assert await made[-1].sends() == 202
        return made[-1]

    yield connected
    for device in made:
        device.api.close()


async def _nodes_in_sessions(operator: httpx.AsyncClient) -> list[str]:
    return sorted(s["node_id"] for s in (await operator.get("/sessions")).json()["sessions"])


async def test_a_revocation_at_one_node_throws_the_device_out_of_the_other(
    dsn: str, tmp_path: Path, connect: Connect
) -> None:
    async with _two_nodes(dsn, tmp_path) as (a, b, tenant), tenant.operator() as operator:
        doomed, spared = await tenant.registered("HW-doomed"), await tenant.registered("HW-spared")
        at_a, at_b = await connect(a, doomed), await connect(b, doomed)
        neighbour = await connect(b, spared)

        loop = asyncio.get_running_loop()
        began = loop.time()
        receipt = await at_b.revoked_by(operator)
        assert loop.time() - began < SOON
        assert await at_a.thrown_out()
        assert await at_b.thrown_out()

        assert sorted((s["node_id"], s["transport"]) for s in receipt["sessions"]) == [("a", "https"), ("b", "https")]
        assert all(0 <= s["closed_after_ms"] < 1000 * SOON for s in receipt["sessions"])
        assert receipt["remaining"] == 0
        assert await neighbour.sends() == 202, "another device on the same node is not disturbed"
        for server in (a, b):
            with pytest.raises(AssertionError, match="401"):
                await connect(server, doomed)


async def test_the_sessions_of_both_nodes_are_listed_and_either_can_kick(
    dsn: str, tmp_path: Path, connect: Connect
) -> None:
    async with _two_nodes(dsn, tmp_path) as (a, b, tenant), tenant.operator() as operator:
        made = await tenant.registered("HW-1")
        await connect(a, made)
        at_b = await connect(b, made)

        async def both() -> bool:
            return await _nodes_in_sessions(operator) == ["a", "b"]

        await until(both)
        sessions = (await operator.get("/sessions")).json()["sessions"]
        (of_b,) = (s for s in sessions if s["node_id"] == "b")
        kicked = (await operator.delete(f"/sessions/{of_b['session_id']}")).json()
        assert [s["node_id"] for s in kicked["sessions"]] == ["b"]
        assert await at_b.thrown_out()
        assert (await connect(b, made)).made is made, "a kick leaves the credential good"


async def test_a_stream_at_one_node_tells_what_the_other_did(dsn: str, tmp_path: Path, connect: Connect) -> None:
    async with _two_nodes(dsn, tmp_path) as (_, b, tenant), tenant.operator() as operator:
        async with operator.stream("GET", "/events/stream") as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("retry:")
            async with client(b, authorization=f"Bearer {tenant.token}") as at_b:
                made = (await at_b.post("/devices", json={"name": "d", "hardware_id": "HW-b"})).json()
                device = await connect(b, made)
                receipt = await device.revoked_by(at_b)
            seen: list[str] = []
            async with asyncio.timeout(10):
                async for line in lines:
                    if line.startswith("data:"):
                        event = json.loads(line.removeprefix("data:"))
                        assert event["device_id"] == made["device_id"]
                        seen.append(event["kind"])
                    if seen[-1:] == ["session.closed"]:
                        break
        assert {"device.registered", "credential.issued", "device.activated", "credential.revoked"} >= set(seen[:-1])
        assert seen.index("device.registered") < seen.index("device.activated") < seen.index("credential.revoked")
        assert [s["node_id"] for s in receipt["sessions"]] == ["b"]


async def test_a_killed_node_delays_a_receipt_by_seconds_and_is_named_as_unconfirmed(
    dsn: str, tmp_path: Path, connect: Connect
) -> None:
    async with _two_nodes(dsn, tmp_path) as (a, b, tenant), tenant.operator() as operator:
        made = await tenant.registered("HW-1")
        device = await connect(b, made)
        await until(lambda: _mirrored(operator, "b"))
        await b.kill()
        assert await device.thrown_out()
        loop = asyncio.get_running_loop()
        began = loop.time()
        receipt = await device.revoked_by(operator)
        assert loop.time() - began < 15
        assert (receipt["sessions"], receipt["remaining"]) == ([], 1), "nobody has confirmed the end of that session"

        async def named() -> bool:  # the log is written by a thread of its own
            lines = [json.loads(line) for line in a.log_text().splitlines() if "revocation.silent_nodes" in line]
            return [entry["nodes"] for entry in lines] == [["b"]]

        await until(named)

        async def forgotten() -> bool:
            return await _nodes_in_sessions(operator) == []

        await until(forgotten, seconds=20)
        began = loop.time()
        second = await tenant.registered("HW-2")
        at_a = await connect(a, second)
        receipt = await at_a.revoked_by(operator)
        assert loop.time() - began < SOON, "nobody waits for a node that is known to be gone"
        assert ([s["node_id"] for s in receipt["sessions"]], receipt["remaining"]) == (["a"], 0)


async def _mirrored(operator: httpx.AsyncClient, node: str) -> bool:
    return node in await _nodes_in_sessions(operator)


async def test_a_frozen_node_carries_the_revocation_out_when_it_wakes(
    dsn: str, tmp_path: Path, connect: Connect
) -> None:
    async with _two_nodes(dsn, tmp_path) as (_, b, tenant), tenant.operator() as operator:
        made = await tenant.registered("HW-1")
        device = await connect(b, made)
        await until(lambda: _mirrored(operator, "b"))
        frozen = psutil.Process(b.pid)
        frozen.send_signal(signal.SIGSTOP)
        try:
            receipt = await device.revoked_by(operator)
            assert (receipt["sessions"], receipt["remaining"]) == ([], 1)
        finally:
            frozen.send_signal(signal.SIGCONT)
        assert await device.thrown_out(2 * SOON)


async def test_a_node_with_another_key_ring_does_not_start(dsn: str, tmp_path: Path) -> None:
    async with server_process(tmp_path / "A", _environ(dsn, tmp_path, "a")) as a:
        load_or_create(tmp_path / "other.json")
        environ = _environ(dsn, tmp_path, "c") | {"GATEHOUSE_SECURITY__KEY_RING": str(tmp_path / "other.json")}
        code, out, err = await start_that_fails(tmp_path / "C", environ)
        assert (code, out) == (1, ""), "it ends before anything listens"
        reason = err.splitlines()[-1]
        assert "key ring" in reason
        assert "Traceback" not in err
        assert (await ops_page(a, "/readyz"))[0] == 200
    code, out, err = await start_that_fails(tmp_path / "C", environ)
    assert (code, out) == (1, ""), "alone it is refused, too"
    assert "key ring" in err.splitlines()[-1]


async def test_a_node_id_that_is_taken_is_refused(dsn: str, tmp_path: Path) -> None:
    async with server_process(tmp_path / "A", _environ(dsn, tmp_path, "twin")) as a:
        code, out, err = await start_that_fails(tmp_path / "B", _environ(dsn, tmp_path, "twin"), seconds=40)
        assert (code, out) == (1, "")
        assert "'twin'" in err.splitlines()[-1]
        assert "Traceback" not in err
        assert (await ops_page(a, "/readyz"))[0] == 200


async def test_several_starters_on_an_empty_database_make_one_schema_one_ring_and_one_ca(
    empty_dsn: str, tmp_path: Path, connect: Connect
) -> None:
    names = ["a", "b", "c", "d"]
    servers = [ServerProcess(tmp_path / name.upper(), _environ(empty_dsn, tmp_path, name)) for name in names]
    try:
        await asyncio.gather(*(server.start() for server in servers))
        chains = {server.ca_chain.read_text() for server in servers}
        assert len(chains) == 1
        tenant = await new_tenant(servers[0])
        made = await tenant.registered("HW-1")
        devices = [await connect(server, made) for server in servers]
        async with tenant.operator() as operator:
            receipt = await devices[0].revoked_by(operator)
        assert sorted(s["node_id"] for s in receipt["sessions"]) == names
        assert [await server.stop() for server in servers] == [0] * len(names)
    finally:
        for server in servers:
            if server.running:
                await server.kill()
    applied = [json.loads(line) for s in servers for line in s.log_text().splitlines() if "schema.migrated" in line]
    assert sorted(name for entry in applied for name in entry["files"]) == [m.name for m in available()]
    connection = await asyncpg.connect(empty_dsn)
    try:
        assert await connection.fetchval("SELECT count(*) FROM node") == 0, "who stops takes itself off the list"
    finally:
        await connection.close()
