"""Wills outlive the server: MQTT 5.0 §3.1.2.5 and [MQTT-3.1.2-8] let it publish them late, and never drop them.

    CONNECT with a will ─► stored ─► CONNACK ─► the server ends: drained, or killed ─► this one or the next publishes

Whatever kind of session it is, and however the server ends. Only the client's DISCONNECT, a revocation, or a client
that resumes its session before a delay is over keeps a will from being published (5.0 §3.1.3.2.2).

A kill is a store that starts anew under its node's name without having stopped; the whole program, under both signals,
is in the last test. The watcher has a stored session, so that it misses nothing while there is no server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from unittest import mock
from uuid import uuid4

import pytest

from adapters.mqtt.device import DeviceRole
from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.wire_packets import Publish, QoS, Will
from adapters.mqtt.wire_reasons import Version
from registry.errors import Unavailable
from registry.messaging_values import Message, Opening, SessionKey, SessionLost, StoredWill
from registry.model import CredentialId, TenantId
from registry.storage.database import Database
from tests.conftest import MakeDevice
from tests.http_api import Api, api
from tests.messaging_brokers import Broker, Served, broker, clock, key, other
from tests.mqtt_devices import GRANTS, KEEP, devices, silent
from tests.mqtt_server import Client, Device, Gone, Running, serving_mqtt
from tests.nodes import until
from tests.processes import server_process
from tests.whole_system import new_tenant

__all__ = ["api", "broker", "clock", "key", "other"]

Kind = tuple[Version, bool, Properties]
"""Version, clean start, properties."""
KINDS: Mapping[str, Kind] = {
    "5.0, ending with its connection": (Version.V5, True, NO_PROPERTIES),
    "5.0, kept": (Version.V5, False, KEEP),
    "3.1.1, clean": (Version.V311, True, NO_PROPERTIES),
    "3.1.1, kept": (Version.V311, False, NO_PROPERTIES),
}


def will_of(name: str, delay: int | None = None) -> Will:
    properties = Properties(will_delay_interval=delay)
    return Will("site/will", name.encode(), QoS.AT_LEAST_ONCE, properties=properties)


async def watch(client: Client, watcher: Device) -> None:
    await client.connect(watcher, client_id="watcher", clean_start=False, properties=KEEP)
    await client.subscribe("site/will")
    await client.goodbye()
    await client.closed()


async def heard(client: Client, watcher: Device, count: int) -> list[str]:
    """What the watcher is told: so many wills."""
    await client.connect(watcher, client_id="watcher", clean_start=False, properties=KEEP)
    return sorted([(await client.message()).payload.decode() for _ in range(count)])


async def promise(client: Client, device: Device, name: str) -> None:
    _, clean, properties = KINDS[name]
    await client.connect(device, client_id=name, clean_start=clean, properties=properties, will=will_of(name))


async def rows(database: Database, table: str) -> int:
    async with database.connection() as connection:
        count: int = await connection.fetchval(f"SELECT count(*) FROM {table}")
    return count


# A drained server.


async def test_a_server_that_drains_owes_the_wills_of_all_sessions(api: Api) -> None:
    clients: list[Client] = []
    async with serving_mqtt(api) as mqtt:
        one, other = await devices(mqtt, 2)
        async with mqtt.client() as client:
            await watch(client, other)
        for name, (version, _, _) in KINDS.items():
            clients.append(await mqtt.client(version=version).__aenter__())
            await promise(clients[-1], one, name)
    for client in clients:
        client.drop()
    async with serving_mqtt(api) as mqtt, mqtt.client() as client:
        assert await heard(client, other, len(KINDS)) == sorted(KINDS)
        await mqtt.server.broker.messaging.tick()
        await silent(client)
        assert await rows(api.database, "messaging_will") == 0
        assert await rows(api.database, "messaging_session") == 3  # the watcher's, and the two that are to be kept


async def test_what_a_device_says_last_is_stored_once_over_a_drain(api: Api) -> None:
    async with serving_mqtt(api) as mqtt:
        device = await mqtt.device()
        async with mqtt.client() as client:
            await client.connect(device, will=Will("devices/me/events", b'"gone"', QoS.AT_LEAST_ONCE, retain=True))
            await mqtt.server.drain(0.0)
    async with serving_mqtt(api) as mqtt:
        await mqtt.server.broker.messaging.tick()
        assert [u["payload"] for u in await mqtt.uplinks(device.device_id)] == ["gone"]
        assert await rows(api.database, "messaging_will") == await rows(api.database, "messaging_retained") == 0


async def test_a_client_that_resumes_its_session_in_time_takes_a_delayed_will_back(api: Api) -> None:
    async with serving_mqtt(api) as mqtt:
        (one,) = await devices(mqtt, 1)
        client = await mqtt.client().__aenter__()
        await client.connect(one, client_id="late", clean_start=False, properties=KEEP, will=will_of("late", delay=600))
    client.drop()
    assert await rows(api.database, "messaging_will") == 1
    async with serving_mqtt(api) as mqtt, mqtt.client() as client:
        assert (await client.connect(one, client_id="late", clean_start=False, properties=KEEP)).session_present
        assert await rows(api.database, "messaging_will") == 0


async def test_a_goodbye_leaves_no_will_and_no_session_that_ends_with_it(api: Api) -> None:
    async with serving_mqtt(api) as mqtt:
        (one,) = await devices(mqtt, 1)
        for name, (version, _, _) in KINDS.items():
            async with mqtt.client(version=version) as client:
                await promise(client, one, name)
                await client.goodbye()
                await client.closed()
        await until(lambda: not mqtt.server.devices.by_key and not mqtt.server.devices.leaving)
        assert await rows(api.database, "messaging_will") == 0
        assert await rows(api.database, "messaging_session") == 2


# Ends that nobody asked for: the client has not taken its will back.


async def an_uplink_whose_outcome_is_open(mqtt: Running, client: Client, role: DeviceRole) -> None:
    def submit(_: object) -> asyncio.Future[None]:
        late = asyncio.get_running_loop().create_future()
        late.set_exception(Unavailable("the database answers late"))
        return late

    with mock.patch.object(mqtt.api.registry.uplinks, "submit", submit):
        await client.send(Publish("devices/me/events", b"1", QoS.AT_LEAST_ONCE, packet_id=1))
        await client.closed()


async def grants_that_cannot_be_read(mqtt: Running, client: Client, role: DeviceRole) -> None:
    async def judge(_: DeviceRole) -> None:
        raise Unavailable("the database answers late")

    with mock.patch.object(DeviceRole, "judge", judge):
        await mqtt.server.broker._judge_live(role)
    await client.closed()


async def a_delivery_whose_outcome_is_open(mqtt: Running, client: Client, role: DeviceRole) -> None:
    assert role.held is not None
    taken_over = mqtt.server.counters.taken_over
    mqtt.server.broker.evicted(role.held)  # as the store does then: the session is ours still
    await client.closed()
    mqtt.server.broker.evicted(role.held)
    assert mqtt.server.counters.taken_over == taken_over + 1


@pytest.mark.parametrize("name", ["5.0, kept", "3.1.1, clean"])
@pytest.mark.parametrize(
    "fault", [an_uplink_whose_outcome_is_open, grants_that_cannot_be_read, a_delivery_whose_outcome_is_open]
)
async def test_a_connection_that_the_server_ends_for_its_own_reasons_leaves_its_will(
    api: Api, fault: Callable[[Running, Client, DeviceRole], Awaitable[None]], name: str
) -> None:
    async with serving_mqtt(api) as mqtt:
        one, other = await devices(mqtt, 2)
        async with mqtt.client() as witness, mqtt.client(version=KINDS[name][0]) as client:
            await witness.connect(other)
            await witness.subscribe("site/will")
            await promise(client, one, name)
            (role,) = (role for key, role in mqtt.server.devices.by_key.items() if key[2] == name)
            await fault(mqtt, client, role)
            assert (await witness.message()).payload.decode() == name


@pytest.mark.parametrize("revoked", [False, True])
async def test_who_vanishes_while_being_admitted_leaves_the_will_unless_revoked(api: Api, revoked: bool) -> None:
    """Its return has ended the delay of the will before."""
    async with serving_mqtt(api) as mqtt:
        one, other = await devices(mqtt, 2)
        async with mqtt.client() as witness, mqtt.client() as before, mqtt.client() as client:
            await witness.connect(other)
            await witness.subscribe("site/will")
            await before.connect(one, clean_start=False, properties=KEEP, will=will_of("before", delay=600))
            before.drop()
            await until(lambda: len(mqtt.server.peers) == 2 and not mqtt.server.devices.leaving)
            enter = mqtt.server.broker.enter

            async def vanishing(role: DeviceRole) -> None:
                await enter(role)
                role.session.closed = revoked  # as the registry does before it closes the connection
                client.reset()
                await until(lambda: not role.peer.alive)

            with mock.patch.object(mqtt.server.broker, "enter", vanishing):
                with pytest.raises(Gone):
                    await client.connect(one, clean_start=False, properties=KEEP, will=will_of("again"))
                await until(lambda: len(mqtt.server.peers) == 1 and not mqtt.server.devices.leaving)
            assert await rows(api.database, "messaging_session") == 1
            if revoked:
                assert await rows(api.database, "messaging_will") == 0
            else:
                assert (await witness.message()).payload == b"again"


# A killed node.


@pytest.fixture
async def watching(broker: Broker, tenant_id: TenantId, make_device: MakeDevice) -> Served:
    served, _ = await broker.connect(SessionKey(tenant_id, await make_device(tenant_id), "watcher"))
    await broker.subscribe(served, "will")
    return served


def opening(key: SessionKey, *, clean: bool = True, delay: float = 60.0) -> Opening:
    """Of a session that ends with its connection, and with it the delay of its will."""
    will = StoredWill(Message("will", b"gone", 1), delay)
    return Opening(key, CredentialId(uuid4()), clean, 0.0, will)


@pytest.mark.parametrize("clean", [True, False])
async def test_a_killed_node_owes_the_wills_of_sessions_that_it_had_in_memory(
    broker: Broker, other: Broker, watching: Served, key: SessionKey, clean: bool
) -> None:
    taken = await other.messaging.take(opening(key, clean=clean))
    assert taken.ownership is None
    assert taken.will is not None
    await other.messaging.tick()
    await other.crash()
    await other.messaging.tick()
    await broker.pull()
    assert watching.payloads == [b"gone"]
    assert await rows(broker.database, "messaging_will") == 0
    assert await rows(broker.database, "messaging_session") == 1
    with pytest.raises(SessionLost):
        await other.messaging.release(taken.will, publish_will=True)


async def test_a_will_of_a_session_in_memory_is_due_once_wherever_its_client_goes(
    broker: Broker, other: Broker, watching: Served, key: SessionKey
) -> None:
    first = await other.messaging.take(opening(key, clean=False))
    second = await broker.messaging.take(opening(key, clean=False))
    assert second.resumed is None  # it ended with its connection (5.0 §3.1.2.11.2)
    await broker.messaging.tick()
    assert watching.payloads == [b"gone"]
    await other.pull()
    assert other.taken_elsewhere[-1] == (key, second.number)
    assert first.will is not None
    with pytest.raises(SessionLost):
        await other.messaging.release(first.will, publish_will=True)
    assert second.will is not None
    await broker.messaging.release(second.will, publish_will=False)
    await broker.messaging.tick()
    assert watching.payloads == [b"gone"]
    assert await rows(broker.database, "messaging_will") == 0


async def test_wills_take_no_room_from_sessions_that_are_to_be_kept(broker: Broker, key: SessionKey) -> None:
    for n in range(broker.limits.sessions_per_device + 1):
        await broker.messaging.take(opening(SessionKey(key.tenant_id, key.device_id, f"in memory {n}")))
    assert (await broker.connect(key))[1] is None


async def test_a_device_that_was_revoked_just_before_the_kill_has_no_will(
    broker: Broker, database: Database, watching: Served, other: Broker, key: SessionKey
) -> None:
    await other.messaging.take(opening(key))
    async with database.connection() as connection:
        await connection.execute("UPDATE device SET status = 'inactive' WHERE device_id = $1", key.device_id)
    await other.crash()
    await other.messaging.tick()
    await broker.pull()
    assert watching.payloads == []
    assert await rows(database, "messaging_will") == 0


# The program.


@pytest.mark.timeout(300)
async def test_the_program_publishes_wills_after_sigterm_and_after_sigkill(tmp_path: Path) -> None:
    async with server_process(tmp_path / "D") as server:
        tenant = await new_tenant(server, "wills")
        async with tenant.operator() as operator:
            body = {"name": "Site", "profile_id": "p_site", "topic_grants": GRANTS}
            assert (await operator.post("/profiles", json=body)).status_code == 201
        made = [await tenant.registered(f"HW-{n}", profile_id="p_site") for n in range(2)]
        one, other = (Device(each["device_id"], each["api_key"]) for each in made)

        def client(version: Version = Version.V5) -> Client:
            return Client(server.ports["mqtt"], server.tls(), version)

        async with client() as watcher:
            await watch(watcher, other)
        for end in (server.stop, server.kill):
            clients = [await client(version).__aenter__() for version, _, _ in KINDS.values()]
            for name, each in zip(KINDS, clients, strict=True):
                await promise(each, one, name)
            await end()
            for each in clients:
                each.drop()
            await server.start()
            async with client() as watcher:
                assert await heard(watcher, other, len(KINDS)) == sorted(KINDS)
                await silent(watcher)
                await watcher.goodbye()
                await watcher.closed()
        assert await server.stop() == 0
