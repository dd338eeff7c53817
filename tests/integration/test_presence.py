"""Presence: devices that connect are active, devices that leave are offline, and the nodes agree about it."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from registry.errors import Unavailable
from registry.model import (
    Contact,
    CredentialId,
    CredentialKind,
    DeviceId,
    Identity,
    NodeId,
    SessionId,
    TenantId,
    Transport,
)
from registry.presence import NODE_LOST, WRITTEN_AT_ONCE, Presence
from registry.sessions import Session
from registry.storage import presence as storage
from registry.storage.database import Database
from tests.conftest import MakeDevice
from tests.nodes import WatchedCloser
from tests.services import NOON, Bell, Clock


@dataclass
class World:
    """Presence services of several nodes on one database; the nodes are rows only."""

    database: Database
    clock: Clock
    bell: Bell

    async def node(self, name: str) -> Presence:
        await self.run(
            """
            INSERT INTO node (node_id, incarnation, started_at, heartbeat_at)
            VALUES ($1, gen_random_uuid(), now(), now())
            ON CONFLICT DO NOTHING
            """,
            name,
        )
        return Presence(self.database, NodeId(name), clock=self.clock, feed=self.bell)

    async def run(self, sql: str, *arguments: Any) -> Any:
        async with self.database.connection() as connection:
            return await connection.fetch(sql, *arguments)

    async def status(self, device_id: DeviceId) -> str:
        return str((await self.run("SELECT status FROM device WHERE device_id = $1", device_id))[0]["status"])

    async def set_status(self, device_id: DeviceId, status: str) -> None:
        await self.run("UPDATE device SET status = $2 WHERE device_id = $1", device_id, status)

    async def told(self, device_id: DeviceId) -> list[str]:
        rows = await self.run("SELECT kind FROM event WHERE device_id = $1 ORDER BY seq", device_id)
        return [row["kind"].removeprefix("device.") for row in rows]

    async def last(self, device_id: DeviceId) -> Any:
        rows = await self.run("SELECT * FROM event WHERE device_id = $1 ORDER BY seq DESC LIMIT 1", device_id)
        return rows[0]


@pytest.fixture
def world(database: Database) -> World:
    return World(database, Clock(), Bell())


def session(tenant_id: TenantId, device_id: DeviceId) -> Session:
    identity = Identity(tenant_id, device_id, CredentialId(uuid4()), CredentialKind.X509, None, None)
    contact = Contact(Transport.MQTT, "192.0.2.7:40000", "corr-9")
    return Session(SessionId(uuid4()), identity, contact, NOON, WatchedCloser(), live=True)


@pytest.mark.parametrize("ahead", [timedelta(days=1), timedelta(seconds=1)])
async def test_when_it_was_seen_is_not_held_by_a_clock_that_was_ahead(
    world: World, tenant_id: TenantId, device_id: DeviceId, ahead: timedelta
) -> None:
    one = await world.node("one")
    before = world.clock.now + ahead
    await world.run("UPDATE device SET last_seen_at = $2 WHERE device_id = $1", device_id, before)
    one.connected(session(tenant_id, device_id))
    await one.flush()
    (row,) = await world.run("SELECT last_seen_at FROM device WHERE device_id = $1", device_id)
    assert row["last_seen_at"] == (world.clock.now if ahead > timedelta(minutes=5) else before)


async def test_a_device_is_active_while_it_is_connected_and_offline_afterwards(
    world: World, tenant_id: TenantId, device_id: DeviceId
) -> None:
    one = await world.node("one")
    await world.set_status(device_id, "offline")
    live = session(tenant_id, device_id)
    one.connected(live)
    await one.flush()
    assert await world.status(device_id) == "active"
    event = await world.last(device_id)
    assert (event["kind"], event["session_id"], event["correlation_id"]) == (
        "device.connected",
        live.session_id,
        "corr-9",
    )
    assert event["data"] == {"node_id": "one", "transport": "mqtt", "peer": "192.0.2.7:40000"}
    seen = await world.run("SELECT last_seen_at FROM device WHERE device_id = $1", device_id)
    assert seen[0]["last_seen_at"] == world.clock.now
    one.disconnected(live, "keep-alive timeout")
    one.disconnected(live, "again")
    await one.flush()
    assert await world.status(device_id) == "offline"
    event = await world.last(device_id)
    assert (event["kind"], event["data"]["reason"]) == ("device.disconnected", "keep-alive timeout")
    assert await world.told(device_id) == ["connected", "disconnected"]
    assert world.bell.rung == 2


@pytest.mark.parametrize("status", ["inactive", "maintenance", "pending"])
async def test_statuses_of_others_stay(world: World, tenant_id: TenantId, device_id: DeviceId, status: str) -> None:
    one, live = await world.node("one"), session(tenant_id, device_id)
    await world.set_status(device_id, status)
    one.connected(live)
    await one.flush()
    assert await world.status(device_id) == status
    one.disconnected(live, "left")
    await one.flush()
    assert await world.status(device_id) == status
    assert await world.told(device_id) == ["connected", "disconnected"]


async def test_the_last_session_of_the_last_node_makes_it_offline(
    world: World, tenant_id: TenantId, device_id: DeviceId
) -> None:
    one, two = await world.node("one"), await world.node("two")
    first, second, elsewhere = (session(tenant_id, device_id) for _ in range(3))
    one.connected(first)
    await one.flush()
    one.connected(second)
    two.connected(elsewhere)
    await one.flush()
    await two.flush()
    one.disconnected(first, "left")
    await one.flush()
    one.disconnected(second, "left")
    await one.flush()
    assert await world.status(device_id) == "active"
    assert await world.told(device_id) == ["connected"]
    two.disconnected(elsewhere, "left")
    await two.flush()
    assert await world.status(device_id) == "offline"
    assert await world.told(device_id) == ["connected", "disconnected"]


async def test_who_is_back_at_once_has_not_been_away_and_who_leaves_at_once_has_been_there(
    world: World, tenant_id: TenantId, device_id: DeviceId, make_device: MakeDevice
) -> None:
    one, live = await world.node("one"), session(tenant_id, device_id)
    one.connected(live)
    await one.flush()
    one.disconnected(live, "left")
    one.connected(session(tenant_id, device_id))
    await one.flush()
    assert await world.told(device_id) == ["connected"]
    assert await world.status(device_id) == "active"
    brief_id = await make_device(tenant_id)
    brief = session(tenant_id, brief_id)
    one.connected(brief)
    one.disconnected(brief, "protocol error")
    await one.flush()
    assert await world.told(brief_id) == ["connected", "disconnected"]
    assert await world.status(brief_id) == "offline"


async def test_who_comes_and_goes_while_its_leaving_is_being_written_has_been_there(
    world: World, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, live, brief = await world.node("one"), session(tenant_id, device_id), session(tenant_id, device_id)
    one.connected(live)
    await one.flush()
    one.disconnected(live, "left")
    places = storage.places

    async def overtaken(*arguments: Any) -> Any:
        if not brief.closed:
            brief.closed = True
            one.connected(brief)
            one.disconnected(brief, "left again")
        return await places(*arguments)

    monkeypatch.setattr(storage, "places", overtaken)
    await one.flush()
    assert await world.told(device_id) == ["connected", "disconnected"] * 2
    assert (await world.last(device_id))["data"]["reason"] == "left again"


async def test_a_storm_costs_few_transactions(
    world: World, tenant_id: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = 2 * WRITTEN_AT_ONCE + 500
    rows = await world.run(
        """
        INSERT INTO device (device_id, tenant_id, hardware_id, name, status, anchor_mode, credential_type)
        SELECT gen_random_uuid(), $1, 'S-' || n, 'A device', 'offline', 'ANCHOR_MODE_MERKLE_BATCH', 'api_key'
        FROM generate_series(1, $2) AS n
        RETURNING device_id
        """,
        tenant_id,
        many,
    )
    transactions = 0
    begin = Database.transaction

    @asynccontextmanager
    async def counted(self: Database) -> AsyncIterator[Any]:
        nonlocal transactions
        transactions += 1
        async with begin(self) as connection:
            yield connection

    monkeypatch.setattr(Database, "transaction", counted)
    one = await world.node("one")
    live = [session(tenant_id, DeviceId(row["device_id"])) for row in rows]
    for each in live:
        one.connected(each)
    await one.flush()
    assert transactions == 3
    counts = await world.run("SELECT status, count(*) AS n FROM device WHERE hardware_id LIKE 'S-%' GROUP BY status")
    assert [tuple(row) for row in counts] == [("active", many)]
    assert (await world.run("SELECT count(*) AS n FROM event WHERE kind = 'device.connected'"))[0]["n"] == many
    for each in live:
        one.disconnected(each, "left")
    await one.flush()
    assert transactions == 6
    counts = await world.run("SELECT status, count(*) AS n FROM device WHERE hardware_id LIKE 'S-%' GROUP BY status")
    assert [tuple(row) for row in counts] == [("offline", many)]


async def test_the_next_life_of_a_node_calls_what_it_lost_offline(
    world: World, tenant_id: TenantId, make_device: MakeDevice
) -> None:
    lost, elsewhere, back = [await make_device(tenant_id) for _ in range(3)]
    one, two = await world.node("one"), await world.node("two")
    for device_id in (lost, elsewhere, back):
        one.connected(session(tenant_id, device_id))
    two.connected(session(tenant_id, elsewhere))
    await one.flush()
    await two.flush()
    reborn = await world.node("one")  # the first one was killed
    reborn.connected(session(tenant_id, back))
    await reborn.reconcile()
    await reborn.flush()
    assert [await world.status(each) for each in (lost, elsewhere, back)] == ["offline", "active", "active"]
    assert (await world.last(lost))["data"] == {"node_id": "one", "reason": NODE_LOST}
    assert await world.told(elsewhere) == ["connected"]
    assert await world.told(back) == ["connected"]


async def test_survivors_call_the_devices_of_a_dead_node_offline_once(
    world: World, tenant_id: TenantId, make_device: MakeDevice
) -> None:
    lost, elsewhere = [await make_device(tenant_id) for _ in range(2)]
    one, two, three = [await world.node(name) for name in ("one", "two", "three")]
    for device_id in (lost, elsewhere):
        one.connected(session(tenant_id, device_id))
    two.connected(session(tenant_id, elsewhere))
    await one.flush()
    await two.flush()
    await asyncio.gather(two.sweep(), three.sweep())
    assert await world.status(lost) == "active", "its node is still on the list"
    await world.run("DELETE FROM node WHERE node_id = 'one'")
    await asyncio.gather(two.sweep(), three.sweep())
    assert await world.status(lost) == "offline"
    assert await world.status(elsewhere) == "active"
    assert await world.told(lost) == ["connected", "disconnected"]
    assert await world.told(elsewhere) == ["connected"]
    # It was only slow: it announces itself again and finds its rows gone.
    await world.node("one")
    await one.reconcile()
    await one.flush()
    assert await world.status(lost) == "active"
    assert await world.told(lost) == ["connected", "disconnected", "connected"]
    assert await world.told(elsewhere) == ["connected"]


async def test_a_node_that_comes_back_while_it_is_being_cleared_away_keeps_its_devices(
    world: World, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    survivor, before = await world.node("survivor"), await world.node("back")
    before.connected(session(tenant_id, device_id))
    await before.flush()
    await world.run("DELETE FROM node WHERE node_id = 'back'")
    of_nobody, returned = storage.of_nobody, asyncio.Event()

    async def overtaken(*arguments: Any) -> Any:
        orphans = await of_nobody(*arguments)
        if not returned.is_set():
            returned.set()
            back = await world.node("back")
            back.connected(session(tenant_id, device_id))
            await back.flush()
        return orphans

    monkeypatch.setattr(storage, "of_nobody", overtaken)
    await survivor.sweep()
    assert await world.status(device_id) == "active"
    assert await world.told(device_id) == ["connected"]


async def test_nodes_that_write_about_one_device_at_once_agree(
    world: World, tenant_id: TenantId, make_device: MakeDevice
) -> None:
    chance = random.Random(7)
    device_ids = [await make_device(tenant_id) for _ in range(6)]
    nodes = [await world.node(name) for name in ("one", "two", "three")]
    live: dict[tuple[int, DeviceId], Session] = {}
    for _ in range(12):
        for place, node in enumerate(nodes):
            for device_id in device_ids:
                if chance.random() < 0.5:
                    continue
                held = live.pop((place, device_id), None)
                if held is None:
                    live[place, device_id] = made = session(tenant_id, device_id)
                    node.connected(made)
                else:
                    node.disconnected(held, "left")
        await asyncio.gather(*(node.flush() for node in nodes))
        for device_id in device_ids:
            there = any(device == device_id for _, device in live)
            told = await world.told(device_id)
            assert (told[-1:] == ["connected"]) == there
            assert all(a != b for a, b in itertools.pairwise(told)), told
            if told:
                assert await world.status(device_id) == ("active" if there else "offline")


async def test_what_could_not_be_written_is_written_later_as_it_is_then(
    world: World, tenant_id: TenantId, make_device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays, leaves, gone = [await make_device(tenant_id) for _ in range(3)]
    one = await world.node("one")

    async def away(*_: Any) -> Any:
        raise Unavailable("the database is away")

    with monkeypatch.context() as outage:
        outage.setattr(storage, "lock_devices", away)
        one.connected(session(tenant_id, stays))
        leaver, goner = session(tenant_id, leaves), session(tenant_id, gone)
        one.connected(leaver)
        one.connected(goner)
        with pytest.raises(Unavailable):
            await one.flush()
        one.disconnected(leaver, "left")
        await one.stop()  # only says so
    await world.run("DELETE FROM device WHERE device_id = $1", gone)
    await one.flush()
    assert await world.told(stays) == ["connected"]
    assert await world.told(leaves) == ["connected", "disconnected"]
    assert [await world.status(each) for each in (stays, leaves)] == ["active", "offline"]
    assert await world.told(gone) == []


async def test_it_writes_by_itself(world: World, tenant_id: TenantId, device_id: DeviceId) -> None:
    one, live = await world.node("one"), session(tenant_id, device_id)
    running = asyncio.create_task(one.run())
    async with asyncio.timeout(10):
        one.connected(live)
        while await world.told(device_id) != ["connected"]:
            await asyncio.sleep(0.02)
        one.disconnected(live, "left")
        while await world.status(device_id) != "offline":
            await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
