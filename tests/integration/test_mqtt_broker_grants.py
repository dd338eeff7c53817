"""Grants that come and go: whatever is live, waiting, retained or promised follows them at once, on every node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from adapters.mqtt.properties import Properties
from adapters.mqtt.wire_packets import Publish, QoS, Suback, Subscribe, SubscriptionRequest, Will
from adapters.mqtt.wire_reasons import ReasonCode, Version
from registry.model import DeviceId, ProfileId, TenantId
from registry.storage import messaging as stored
from registry.storage import topic_grants
from registry.storage.database import Connection
from tests.http_api import BASE, Api, api, running_api
from tests.mqtt_devices import GRANTS, KEEP, devices, profile, regrant, silent
from tests.mqtt_server import Device, Running, serving_mqtt
from tests.nodes import until

__all__ = ["api"]

VERSIONS = pytest.mark.parametrize("version", list(Version), ids=["3.1.1", "5.0"])


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    async with serving_mqtt(api) as running:
        yield running


def without_the_sweep(mqtt: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the feed tells of changes."""

    async def nothing() -> list[tuple[TenantId, ProfileId]]:
        return []

    monkeypatch.setattr(mqtt.server.broker.messaging.grants, "refresh", nothing)


async def hold_routes(mqtt: Running, connection: Connection) -> None:
    """Nobody of the tenant can write a route until the transaction ends."""
    await connection.execute(
        """
        INSERT INTO messaging_tenant (tenant_id) VALUES ($1)
        ON CONFLICT (tenant_id) DO UPDATE SET version = messaging_tenant.version
        """,
        mqtt.api.tenant_id,
    )


async def move(mqtt: Running, device: Device, profile_id: str) -> None:
    async with mqtt.api.operator() as operator:
        shown = (await operator.get(f"{BASE}/devices/{device.device_id}")).json()
        body = {"name": shown["name"], "profile_id": profile_id}
        answer = await operator.put(f"{BASE}/devices/{device.device_id}", json=body)
    assert answer.status_code == 200, answer.text


async def test_a_change_is_felt_on_every_node_by_the_feed_alone(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        running_api(dsn) as first,
        serving_mqtt(first) as here,
        running_api(dsn, name="two", ring=first.ring) as second,
        serving_mqtt(second) as there,
    ):
        second.tenant_id, second.slug = first.tenant_id, first.slug
        for node in (here, there):
            without_the_sweep(node, monkeypatch)
        one, other = await devices(here, 2)
        async with here.client() as sender, there.client() as receiver:
            await sender.connect(one)
            await receiver.connect(other)
            await receiver.subscribe("site/a")
            await regrant(here, [])
            await until(lambda: all(not r.grants for n in (here, there) for r in n.server.devices.by_key.values()))
            assert await sender.publish("site/a", b"x") is ReasonCode.NOT_AUTHORIZED
            await until(lambda: not any(r.brokered for r in there.server.devices.by_key.values()))
            await regrant(there, GRANTS)
            await until(lambda: all(r.grants for n in (here, there) for r in n.server.devices.by_key.values()))
            assert await receiver.subscribe("site/a") == (ReasonCode.GRANTED_QOS_1,)
            for qos in (QoS.AT_LEAST_ONCE, QoS.AT_MOST_ONCE):  # with 1 it is sure that this node knows of the other
                await sender.publish("site/a", b"%d" % qos, qos)
                assert (await receiver.message()).payload == b"%d" % qos


async def test_the_change_is_an_event_that_names_the_fields(mqtt: Running) -> None:
    await profile(mqtt, GRANTS)
    await regrant(mqtt, [])
    async with mqtt.api.operator() as operator:
        await operator.delete(f"{BASE}/profiles/p_site")
        events = (await operator.get(f"{BASE}/events?limit=100")).json()["events"]
    told = [(e["kind"], e["data"]) for e in events if e["kind"].startswith("profile.")]
    assert told == [
        ("profile.updated", {"profile_id": "p_site", "changed": ["topic_grants"]}),
        ("profile.deleted", {"profile_id": "p_site"}),
    ]


async def test_grants_that_come_while_a_device_is_connected_count_at_once(mqtt: Running) -> None:
    granted = await profile(mqtt, [])
    one, other = [await mqtt.device(f"HW-{n}", profile_id=granted) for n in range(2)]
    async with mqtt.client() as sender, mqtt.client() as receiver:
        await sender.connect(one)
        await receiver.connect(other)
        await regrant(mqtt, GRANTS)
        await until(lambda: all(role.grants for role in mqtt.server.devices.by_key.values()))
        assert await receiver.subscribe("site/a") == (ReasonCode.GRANTED_QOS_1,)
        await sender.publish("site/a", b"x", QoS.AT_MOST_ONCE)
        assert (await receiver.message()).payload == b"x"


async def _wills_judged(mqtt: Running) -> None:
    """Wait until no will waits to be published or dropped."""
    async with asyncio.timeout(20):
        while await _waiting_wills(mqtt):
            await asyncio.sleep(0.01)


@VERSIONS
async def test_a_will_whose_grant_has_gone_is_not_published(mqtt: Running, version: Version) -> None:
    one, other = await devices(mqtt, 2)
    reader = await profile(mqtt, [{"filter": "site/#", "allow": ["subscribe"]}], "p_reader")
    await move(mqtt, other, reader)
    will = Will("site/gone", b"will", QoS.AT_LEAST_ONCE, retain=True)
    async with mqtt.client() as witness:
        await witness.connect(other)
        await witness.subscribe("site/gone")
        clients: list[dict[str, Any]] = [{"client_id": "clean"}, {"client_id": "kept", "clean_start": False}]
        if version is Version.V5:
            clients[1]["properties"] = KEEP
        for how in clients:
            async with mqtt.client(version=version) as client:
                await client.connect(one, will=will, **how)
                await regrant(mqtt, [])
                await until(partial(_granted_nothing, mqtt, one, how["client_id"]))
            await until(lambda: len(mqtt.server.devices.by_key) == 1 and not mqtt.server.devices.leaving)
            await _wills_judged(mqtt)  # before the grant is there again
            if how is clients[0]:
                await regrant(mqtt, GRANTS)
                await until(partial(_remembered, mqtt, one))
        await silent(witness)
    assert await mqtt.server.broker.messaging.retained_topics(mqtt.api.tenant_id, "site") == []


async def test_a_delayed_will_is_judged_when_it_is_due(mqtt: Running) -> None:
    one, other = await devices(mqtt, 2)
    reader = await profile(mqtt, [{"filter": "site/#", "allow": ["subscribe"]}], "p_reader")
    await move(mqtt, other, reader)
    messaging = mqtt.server.broker.messaging
    async with mqtt.client() as witness:
        await witness.connect(other)
        await witness.subscribe("site/gone")
        for payload in (b"first", b"second"):
            delayed = Will("site/gone", payload, QoS.AT_LEAST_ONCE, properties=Properties(will_delay_interval=1))
            async with mqtt.client() as client:
                await client.connect(one, will=delayed, properties=KEEP)
            await until(lambda: not mqtt.server.devices.leaving)
            if payload == b"second":
                await regrant(mqtt, [])
                await until(lambda: not _remembered(mqtt, one))
                messaging.grants.forget_device(DeviceId(_key(mqtt, one, "")[1]))  # as on a node that never saw it
            else:
                assert (await witness.message()).payload == b"first"
        async with asyncio.timeout(10):
            while await _waiting_wills(mqtt):
                await asyncio.sleep(0.05)
        await silent(witness)


async def test_a_device_that_gets_another_profile_loses_what_that_does_not_grant(mqtt: Running) -> None:
    one, other = await devices(mqtt, 2)
    bare = await profile(mqtt, [{"filter": "else/#", "allow": ["subscribe"]}], "p_bare")
    messaging = mqtt.server.broker.messaging
    async with mqtt.client() as sender, mqtt.client() as away:
        await sender.connect(other)
        await away.connect(one, clean_start=False, properties=KEEP)
        await away.subscribe("site/a")
        await away.publish("site/mine", b"x", retain=True)
        away.drop()
        await until(lambda: len(mqtt.server.devices.by_key) == 1 and not mqtt.server.devices.leaving)
        await sender.publish("site/a", b"waits")
        await sender.publish("site/theirs", b"stays", retain=True)
        await move(mqtt, one, bare)
        async with asyncio.timeout(10):
            while await messaging.retained_topics(mqtt.api.tenant_id, "site") != ["site/theirs"]:
                await asyncio.sleep(0.02)
            while await messaging.offline_of_device(mqtt.api.tenant_id, _key(mqtt, one, "")[1]):
                await asyncio.sleep(0.02)
        async with mqtt.client() as back:
            assert (await back.connect(one, clean_start=False, properties=KEEP)).session_present
            await silent(back)


@pytest.mark.parametrize("how", ["regranted", "moved"])
async def test_what_is_being_stored_when_its_grant_goes_is_not_retained(
    mqtt: Running, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = (await devices(mqtt, 1))[0]
    bare = await profile(mqtt, [], "p_bare")
    messaging = mqtt.server.broker.messaging
    hold, settle = stored.lock_retention, messaging.published
    storing, judging, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def held_late(*arguments: Any) -> Any:
        storing.set()
        await go_on.wait()
        return await hold(*arguments)

    async def settled() -> None:
        judging.set()
        await settle()

    monkeypatch.setattr(stored, "lock_retention", held_late)
    monkeypatch.setattr(messaging, "published", settled)
    async with mqtt.client() as client:
        await client.connect(one)
        publishing = asyncio.create_task(client.publish("site/a", b"x", retain=True))
        await storing.wait()
        await (regrant(mqtt, []) if how == "regranted" else move(mqtt, one, bare))
        await judging.wait()
        go_on.set()
        assert await publishing is ReasonCode.SUCCESS
        async with asyncio.timeout(10):
            while await messaging.retained_topics(mqtt.api.tenant_id, ""):
                await asyncio.sleep(0.02)


async def test_a_change_of_the_profile_that_a_device_is_just_given_counts(
    mqtt: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = (await devices(mqtt, 1))[0]
    given = await profile(mqtt, GRANTS, "p_given")
    messaging = mqtt.server.broker.messaging
    read, changed = topic_grants.of_device, messaging._router.grants_changed
    reading, go_on, told = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def read_before(*arguments: Any) -> Any:
        found = await read(*arguments)
        reading.set()
        await go_on.wait()
        return found

    def tell(tenant_id: TenantId, profile_id: ProfileId) -> None:
        changed(tenant_id, profile_id)
        if profile_id == given:
            told.set()

    async with mqtt.client() as client:
        await client.connect(one)
        assert await client.publish("site/a", b"") is ReasonCode.SUCCESS
        monkeypatch.setattr(topic_grants, "of_device", read_before)
        monkeypatch.setattr(messaging._router, "grants_changed", tell)
        await move(mqtt, one, given)
        await reading.wait()
        await regrant(mqtt, [], given)
        await told.wait()
        go_on.set()
        await until(partial(_granted_nothing, mqtt, one, "one"))
        assert await client.publish("site/a", b"") is ReasonCode.NOT_AUTHORIZED


async def test_a_grant_that_goes_while_a_subscription_is_written_takes_it_along(mqtt: Running) -> None:
    one = (await devices(mqtt, 1))[0]
    async with mqtt.client() as client:
        await client.connect(one, properties=KEEP)
        async with mqtt.api.database.transaction() as connection:
            await hold_routes(mqtt, connection)
            await client.send(Subscribe(1, (SubscriptionRequest("site/a", QoS.AT_LEAST_ONCE),)))
            await until(lambda: any(peer.machine.busy for peer in mqtt.server.peers))
            await regrant(mqtt, [])
            await until(partial(_granted_nothing, mqtt, one, "one"))
        assert (await client.expect(Suback)).reasons == (ReasonCode.NOT_AUTHORIZED,)
    assert not any(role.brokered for role in mqtt.server.devices.by_key.values())


@pytest.mark.parametrize("kept", [True, False])
async def test_a_connection_that_vanishes_while_it_subscribes_leaves_nothing_behind(mqtt: Running, kept: bool) -> None:
    one = (await devices(mqtt, 1))[0]
    broker = mqtt.server.broker
    routes = broker.messaging._routes
    for _ in range(3):
        async with mqtt.client() as client:
            await client.connect(one, properties=KEEP if kept else Properties())
            async with mqtt.api.database.transaction() as connection:
                await hold_routes(mqtt, connection)
                await client.send(Subscribe(1, (SubscriptionRequest("site/a", QoS.AT_LEAST_ONCE),)))
                await until(lambda: any(peer.machine.busy for peer in mqtt.server.peers))
                client.reset()
                await until(lambda: not mqtt.server.devices.by_key)
            await until(lambda: not mqtt.server.devices.leaving and not broker._tenants)
            await until(lambda: not routes._watched and not routes._written)


async def test_a_shared_subscription_that_is_taken_up_again_gets_its_turn_from_other_nodes(dsn: str) -> None:
    async with (
        running_api(dsn) as first,
        serving_mqtt(first) as here,
        running_api(dsn, name="two", ring=first.ring) as second,
        serving_mqtt(second) as there,
    ):
        second.tenant_id, second.slug = first.tenant_id, first.slug
        one, other = await devices(here, 2)
        for again in (False, True):
            async with there.client() as member:
                back = await member.connect(other, clean_start=False, properties=KEEP)
                assert back.session_present is again
                if not again:
                    await member.subscribe("$share/g/site/jobs")
                async with here.client() as sender:
                    await sender.connect(one)
                    for qos in (QoS.AT_LEAST_ONCE, QoS.AT_MOST_ONCE):
                        await sender.publish("site/jobs", b"%d" % qos, qos)
                        got: Publish = await member.message()
                        assert (got.payload, got.qos) == (b"%d" % qos, qos)
            await until(lambda: not there.server.devices.leaving and not there.server.devices.by_key)


def _key(mqtt: Running, device: Device, client_id: str) -> Any:
    return mqtt.api.tenant_id, DeviceId(UUID(device.device_id)), client_id


def _granted_nothing(mqtt: Running, device: Device, client_id: str) -> bool:
    return not mqtt.server.devices.by_key[_key(mqtt, device, client_id)].grants


def _remembered(mqtt: Running, device: Device) -> bool:
    known = mqtt.server.broker.messaging.grants.remembered(*_key(mqtt, device, "")[:2])
    return known is not None and bool(known.grants)


async def _waiting_wills(mqtt: Running) -> int:
    async with mqtt.api.database.connection() as connection:
        number: int = await connection.fetchval("SELECT count(*) FROM messaging_will")
    return number
