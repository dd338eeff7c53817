"""Granted topics: a broker among the devices of one tenant, and a wall around everything else.

Every device here has a profile that grants `site/#`, and `vault/#` without `vault/secret/#`. Which topics are refused,
to whom and how, is in test_mqtt_topic_table.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from unittest import mock

import pytest

from adapters.mqtt.properties import Properties
from adapters.mqtt.wire_packets import Ack, Disconnect, QoS, Subscribe, SubscriptionRequest, Will
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from tests.http_api import BASE, Api, api, running_api
from tests.mqtt_devices import KEEP, devices, regrant, silent
from tests.mqtt_server import Device, Running, serving_mqtt
from tests.nodes import until

__all__ = ["api"]

VERSIONS = pytest.mark.parametrize("version", list(Version), ids=["3.1.1", "5.0"])


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    async with serving_mqtt(api) as running:
        yield running


@VERSIONS
async def test_messages_go_among_the_devices_with_every_qos(mqtt: Running, version: Version) -> None:
    one, other = await devices(mqtt, 2)
    async with mqtt.client(version=version) as sender, mqtt.client(version=version) as receiver:
        await sender.connect(one)
        await receiver.connect(other)
        assert await receiver.subscribe("site/+/alarm", qos=QoS.EXACTLY_ONCE) == (ReasonCode.GRANTED_QOS_2,)
        for qos in QoS:
            await sender.publish("site/7/alarm", b"%d" % qos, qos)
            got = await receiver.message()
            assert (got.topic, got.payload, got.qos) == ("site/7/alarm", b"%d" % qos, qos)
            if qos is QoS.EXACTLY_ONCE:
                await receiver.send(Ack(PacketType.PUBREC, got.packet_id))
                assert (await receiver.expect(Ack)).type is PacketType.PUBREL
                await receiver.send(Ack(PacketType.PUBCOMP, got.packet_id))
        await silent(sender)
    assert await mqtt.uplinks(one.device_id) == []


@VERSIONS
async def test_a_session_that_is_away_gets_everything_when_it_is_back(mqtt: Running, version: Version) -> None:
    one, other = await devices(mqtt, 2)
    async with mqtt.client(version=version) as sender:
        await sender.connect(one)
        async with mqtt.client(version=version) as receiver:
            await receiver.connect(other, clean_start=False, properties=KEEP if version is Version.V5 else Properties())
            await receiver.subscribe("site/#", "devices/me/config")
        await until(lambda: len(mqtt.server.devices.by_key) == 1 and not mqtt.server.devices.leaving)
        for n in range(5):
            await sender.publish("site/log", b"%d" % n)
        async with mqtt.client(version=version) as receiver:
            back = await receiver.connect(
                other, clean_start=False, properties=KEEP if version is Version.V5 else Properties()
            )
            assert back.session_present
            got = [await receiver.message() for _ in range(6)]
            assert [m.payload for m in got if m.topic == "site/log"] == [b"%d" % n for n in range(5)]
            assert [m.topic for m in got if m.topic != "site/log"] == ["devices/me/config"]
            await receiver.goodbye()
            await receiver.closed()
        async with mqtt.client(version=version) as receiver:
            assert not (await receiver.connect(other)).session_present  # clean start


async def test_retained_messages_come_to_who_subscribes_later(mqtt: Running) -> None:
    one, other = await devices(mqtt, 2)
    async with mqtt.client() as sender, mqtt.client() as receiver:
        await sender.connect(one)
        for topic in ("site/a", "site/b", "site/c"):
            await sender.publish(topic, topic.encode(), retain=True)
        await sender.publish("site/b", b"", retain=True)
        await receiver.connect(other)
        await receiver.subscribe("site/#")
        got = [await receiver.message() for _ in range(2)]
        assert {(m.topic, m.retain) for m in got} == {("site/a", True), ("site/c", True)}
        await sender.publish("site/a", b"new", QoS.AT_MOST_ONCE, retain=True)
        assert (await receiver.message()).retain is False


async def test_a_shared_subscription_gives_each_message_to_one_member(mqtt: Running) -> None:
    one, other, third = await devices(mqtt, 3)
    async with mqtt.client() as sender, mqtt.client() as left, mqtt.client() as right:
        await sender.connect(one)
        await left.connect(other)
        await right.connect(third)
        for each in (left, right):
            assert await each.subscribe("$share/g/site/jobs") == (ReasonCode.GRANTED_QOS_1,)
        for n in range(6):
            await sender.publish("site/jobs", b"%d" % n)
        got = [(await left.message()).payload for _ in range(3)] + [(await right.message()).payload for _ in range(3)]
        assert sorted(got) == [b"%d" % n for n in range(6)]


async def test_no_local_subscription_identifiers_and_properties(mqtt: Running) -> None:
    one, other = await devices(mqtt, 2)
    async with mqtt.client() as sender, mqtt.client() as receiver:
        await sender.connect(one)
        await receiver.connect(other)
        await sender.send(Subscribe(1, (SubscriptionRequest("site/#", QoS.AT_LEAST_ONCE, no_local=True),)))
        await sender.packet()
        identified = Properties(subscription_identifiers=(7,))
        await receiver.send(Subscribe(1, (SubscriptionRequest("site/#", QoS.AT_LEAST_ONCE),), identified))
        await receiver.packet()
        told = Properties(content_type="text/plain", user_properties=(("a", "b"), ("a", "c")), correlation_data=b"x")
        await sender.publish("site/x", b"hello", properties=told)
        got = await receiver.message()
        assert got.properties.subscription_identifiers == (7,)
        assert (got.properties.content_type, got.properties.correlation_data) == ("text/plain", b"x")
        assert got.properties.user_properties == (("a", "b"), ("a", "c"))
        await silent(sender)


async def test_wills_are_brokered_at_once_and_delayed(mqtt: Running) -> None:
    one, other = await devices(mqtt, 2)
    async with mqtt.client() as receiver:
        await receiver.connect(other)
        await receiver.subscribe("site/#")
        async with mqtt.client() as client:
            await client.connect(one, will=Will("site/gone", b"now", QoS.AT_LEAST_ONCE))
        assert (await receiver.message()).payload == b"now"
        delayed = Will("site/gone", b"later", QoS.AT_LEAST_ONCE, properties=Properties(will_delay_interval=1))
        async with mqtt.client() as client:
            await client.connect(one, will=delayed, properties=KEEP)
        async with mqtt.client() as client:  # back in time: it is not sent
            await client.connect(one, clean_start=False, will=delayed, properties=KEEP)
        assert (await receiver.message()).payload == b"later"
        await silent(receiver)


async def test_tenants_do_not_meet(dsn: str) -> None:
    async with (
        running_api(dsn) as first,
        running_api(dsn, name="two", ring=first.ring) as second,
        serving_mqtt(first) as here,
        serving_mqtt(second) as there,
    ):
        one, two = (await devices(here, 1))[0], (await devices(there, 1))[0]
        async with here.client() as sender, here.client() as receiver, there.client() as stranger:
            await sender.connect(one)
            await receiver.connect(one, client_id="two")
            await stranger.connect(two)
            for each in (receiver, stranger):
                await each.subscribe("site/a")
            await sender.publish("site/a", b"x", retain=True)
            assert (await receiver.message()).payload == b"x"
            await stranger.subscribe("site/a")
            await silent(stranger)


async def test_messages_and_sessions_cross_nodes(dsn: str) -> None:
    async with (
        running_api(dsn) as first,
        serving_mqtt(first) as here,
        running_api(dsn, name="two", ring=first.ring) as second,
        serving_mqtt(second) as there,
    ):
        second.tenant_id, second.slug = first.tenant_id, first.slug
        one, other = await devices(here, 2)
        async with here.client() as sender, there.client() as receiver:
            await sender.connect(one)
            await receiver.connect(other)
            await receiver.subscribe("site/#")
            for qos in (QoS.AT_LEAST_ONCE, QoS.AT_MOST_ONCE):
                await sender.publish("site/a", b"%d" % qos, qos)
                assert (await receiver.message()).payload == b"%d" % qos
        async with there.client() as away:
            await away.connect(other, clean_start=False, client_id="kept", properties=KEEP)
            await away.subscribe("site/#")
            async with here.client() as taker:  # the session moves to this node
                back = await taker.connect(other, clean_start=False, client_id="kept", properties=KEEP)
                assert back.session_present
                rest = await away.closed()
                assert [p.reason for p in rest if isinstance(p, Disconnect)] == [ReasonCode.SESSION_TAKEN_OVER]
                async with there.client() as sender:
                    await sender.connect(one, client_id="elsewhere")
                    await sender.publish("site/b", b"moved")
                assert (await taker.message()).payload == b"moved"


async def test_grants_that_are_taken_away_end_live_offline_and_retained_state(mqtt: Running) -> None:
    one, other = await devices(mqtt, 2)
    async with mqtt.client() as sender, mqtt.client() as receiver:
        await sender.connect(one)
        await receiver.connect(other)
        await receiver.subscribe("site/a")
        async with mqtt.client() as away:
            await away.connect(other, clean_start=False, client_id="away", properties=KEEP)
            await away.subscribe("site/a")
        await until(lambda: not mqtt.server.devices.leaving)
        await sender.publish("site/a", b"before", retain=True)
        assert (await receiver.message()).payload == b"before"
        await regrant(mqtt, [])
        await until(lambda: all(not role.brokered for role in mqtt.server.devices.by_key.values()))
        assert await sender.publish("site/a", b"after") is ReasonCode.NOT_AUTHORIZED
        await silent(receiver)
        async with asyncio.timeout(10):
            while await mqtt.server.broker.messaging.retained_topics(mqtt.api.tenant_id, "site"):
                await asyncio.sleep(0.05)
        async with mqtt.client() as away:
            assert (await away.connect(other, clean_start=False, client_id="away", properties=KEEP)).session_present
            await silent(away)


async def test_a_revoked_device_leaves_no_session_no_queue_and_no_will(mqtt: Running) -> None:
    one, other = await devices(mqtt, 2)
    will = Will("site/gone", b"will", QoS.AT_LEAST_ONCE, properties=Properties(will_delay_interval=1))
    async with mqtt.client() as witness:
        await witness.connect(other)
        await witness.subscribe("site/gone")
        async with mqtt.client() as client:
            await client.connect(one, clean_start=False, will=will, properties=KEEP)
            await client.subscribe("site/a")
        await until(lambda: not mqtt.server.devices.leaving)
        async with mqtt.api.operator() as operator:
            listed = (await operator.get(f"{BASE}/devices/{one.device_id}/credentials")).json()["credentials"]
            fresh = (await operator.post(f"{BASE}/devices/{one.device_id}/api-keys", json={})).json()["api_key"]
            await operator.delete(f"{BASE}/devices/{one.device_id}/credentials/{listed[0]['credential_id']}")
        async with mqtt.client() as client:
            back = await client.connect(Device(one.device_id, fresh), clean_start=False, properties=KEEP)
            assert (back.reason, back.session_present) == (ReasonCode.SUCCESS, False)
        await asyncio.sleep(1.5)  # the will's delay, had it lived
        await silent(witness)


async def test_a_receiver_that_never_reads_loses_its_connection_and_nobody_else_anything(mqtt: Running) -> None:
    one, other, third = await devices(mqtt, 3)
    async with mqtt.client() as sender, mqtt.client() as deaf, mqtt.client() as good:
        await sender.connect(one)
        await deaf.connect(other)
        await good.connect(third)
        for each in (deaf, good):
            await each.subscribe("site/a")
        payload = b"x" * 20_000
        for sent in range(1_200):  # noqa: B007 (how far it went is asked for below)
            await sender.publish("site/a", payload)
            assert (await good.message()).payload == payload
            if len(mqtt.server.devices.by_key) == 2:
                break
        assert sent > 30  # what fits its queue was kept for it
        assert len(mqtt.server.devices.by_key) == 2


async def test_the_routes_that_a_will_was_sent_by_are_forgotten_where_nobody_of_its_tenant_is_left(
    mqtt: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.mqtt.broker.UNSERVED_SECONDS", 0.2)
    (one,) = await devices(mqtt, 1)
    broker = mqtt.server.broker
    kept = Properties(session_expiry_interval=60)
    delayed = Will("site/gone", b"x", QoS.AT_LEAST_ONCE, True, Properties(will_delay_interval=1))
    with mock.patch.object(broker, "changed", wraps=broker.changed) as told:
        async with mqtt.client() as client:
            await client.connect(one, will=delayed, properties=kept)
            await client.subscribe("site/#")
        await until(lambda: sum(call.kwargs["whole"] for call in told.call_args_list) == 2)  # its own, and the will's
    await until(lambda: not broker.messaging._routes.followed() and not broker._tenants)
    async with mqtt.client() as client:
        assert (await client.connect(one, clean_start=False, properties=kept)).session_present
        assert (await client.message()).payload == b"x"
