"""Whoever runs into a limit of the MQTT server is answered as the standard has it, and counted where operators look.

One server with small limits for all; each test runs into one of them and finds exactly that label of
`gatehouse_limits_hit_total` grown. Limits on time are tested in test_mqtt_abuse.py, a full core in
test_mqtt_core_full.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import Properties
from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.wire import WireLimits
from adapters.mqtt.wire_packets import Ack, Connect, Disconnect, Publish, QoS, Subscribe, SubscriptionRequest, Will
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from edge.instruments import watch_mqtt
from edge.metrics import Metrics
from registry.messaging_limits import MessagingLimits
from registry.observation import Limit
from tests.http_api import running_api
from tests.mqtt_devices import KEEP, profile
from tests.mqtt_server import Client, Device, Gone, Running, serving_mqtt
from tests.nodes import until
from tests.postgres import PostgresServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

R = ReasonCode
VERSIONS = pytest.mark.parametrize("version", list(Version), ids=["3.1.1", "5.0"])
MACHINE = MqttLimits(
    connect_bytes=2_048,
    packet_bytes=4_096,
    wire=WireLimits(user_properties=3, filters=5),
    topic_bytes=200,
    topic_levels=8,
    client_id_bytes=40,
    receive_maximum=4,
    unreleased=5,
    topic_aliases_in=2,
    queued_messages=6,
    queued_bytes=3_000,
    subscriptions=3,
)
LIMITS = ServerLimits(
    machine=MACHINE,
    provisioning=3,
    provisioning_per_address=2,
    provisioning_attempts=2,
    provisioning_attempts_per_second=0.001,
    provisioning_attempts_burst=5,
    taming_first=30.0,
    taming_longest=30.0,
    held=1,
)
STORED = MessagingLimits(
    queued_messages=6, queued_bytes=3_000, full_queue_seconds=0, retained_messages=2, retained_bytes=2_000,
    sessions_per_device=2,
)  # fmt: skip


@dataclass
class Site:
    mqtt: Running
    metrics: Metrics
    made: int = 0

    async def device(self) -> Device:
        self.made += 1
        return await self.mqtt.device(f"HW-{self.made}", profile_id="p_site")

    def hits(self) -> dict[str, float]:
        """What operators see, by limit."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.metrics.render().decode()):
            for sample in family.samples:
                if sample.name == "gatehouse_limits_hit_total":
                    found[sample.labels["limit"]] = sample.value
        return found

    @asynccontextmanager
    async def grown(self, limit: Limit, by: int = 1) -> AsyncIterator[None]:
        """Inside, this limit is hit so many times, and no other."""
        before = self.hits()
        yield
        await until(lambda: self.hits().get(limit.value, 0) >= before.get(limit.value, 0) + by)
        after = self.hits()
        assert {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)} == {
            limit.value: by
        }

    @asynccontextmanager
    async def connected(self, version: Version = Version.V5) -> AsyncIterator[Client]:
        async with self.mqtt.client(version=version) as client:
            assert (await client.connect(await self.device())).reason is R.SUCCESS
            yield client


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def site(postgres_server: PostgresServer) -> AsyncIterator[Site]:
    dsn = postgres_server.create_database()
    try:
        async with running_api(dsn) as api, serving_mqtt(api, LIMITS, STORED) as mqtt:
            await profile(mqtt, [{"filter": "site/#", "allow": ["publish", "subscribe"]}])
            metrics = Metrics()
            watch_mqtt(metrics, mqtt.server)
            yield Site(mqtt, metrics)
    finally:
        postgres_server.drop_database(dsn)


async def goodbye(client: Client) -> list[ReasonCode]:
    """Why the server closed the connection; nothing in 3.1.1."""
    return [packet.reason for packet in await client.closed() if isinstance(packet, Disconnect)]


@VERSIONS
async def test_a_packet_that_is_too_large(site: Site, version: Version) -> None:
    async with site.connected(version) as client, site.grown(Limit.PACKET):
        await client.send(Publish("site/a", b"x" * 4_096, QoS.AT_MOST_ONCE))
        assert await goodbye(client) == ([R.PACKET_TOO_LARGE] if version is Version.V5 else [])


async def test_a_connect_that_is_too_large(site: Site) -> None:
    async with site.mqtt.client() as client, site.grown(Limit.PACKET):
        with pytest.raises(Gone):  # from its header: the version is not known yet
            await client.connect(user_name="provision", password="x" * 2_048)


@VERSIONS
async def test_a_client_id_that_is_too_long(site: Site, version: Version) -> None:
    device = await site.device()
    async with site.mqtt.client(version=version) as client, site.grown(Limit.CLIENT_ID):
        assert (await client.connect(device, client_id="x" * 41)).reason is R.CLIENT_IDENTIFIER_NOT_VALID


@pytest.mark.parametrize("topic", ["site/" + "x" * 200, "site" + "/a" * 8])
async def test_names_and_filters_that_are_too_long(site: Site, topic: str) -> None:
    async with site.connected() as client:
        async with site.grown(Limit.TOPIC):
            assert await client.subscribe(topic, "site/a") == (R.TOPIC_FILTER_INVALID, R.GRANTED_QOS_1)
        async with site.grown(Limit.TOPIC):
            await client.send(Publish(topic, b"x", QoS.AT_MOST_ONCE))
            assert await goodbye(client) == [R.TOPIC_NAME_INVALID]
    device = await site.device()
    async with site.mqtt.client() as client, site.grown(Limit.TOPIC):
        assert (await client.connect(device, will=Will(topic, b"x"))).reason is R.TOPIC_NAME_INVALID


@VERSIONS
async def test_subscriptions_beyond_those_of_a_session(site: Site, version: Version) -> None:
    refusal = R.QUOTA_EXCEEDED if version is Version.V5 else R.UNSPECIFIED_ERROR
    async with site.connected(version) as client, site.grown(Limit.SUBSCRIPTIONS, 2):
        granted = R.GRANTED_QOS_1
        assert await client.subscribe("site/a", "site/b", "site/c", "site/d") == (granted, granted, granted, refusal)
        assert await client.subscribe("site/a", "site/e") == (granted, refusal)  # the same one again takes no room


async def test_topic_aliases_beyond_ours(site: Site) -> None:
    async with site.connected() as client, site.grown(Limit.TOPIC_ALIASES):
        for alias in (1, 2):
            assert await client.publish("site/a", b"x", properties=Properties(topic_alias=alias)) is R.SUCCESS
        await client.send(Publish("site/a", b"x", properties=Properties(topic_alias=3)))
        assert await goodbye(client) == [R.TOPIC_ALIAS_INVALID]


async def test_more_than_receive_maximum(site: Site) -> None:
    async with site.connected() as client, site.grown(Limit.RECEIVE_MAXIMUM):
        for packet_id in range(1, 6):  # QoS 2 that is stored and never released counts until it is
            await client.send(Publish("site/a", b"x", QoS.EXACTLY_ONCE, packet_id=packet_id))
        assert await goodbye(client) == [R.RECEIVE_MAXIMUM_EXCEEDED]


async def test_a_receivers_queue_that_is_full(site: Site) -> None:
    receiver = await site.device()
    async with site.connected() as sender:
        async with site.mqtt.client() as away:
            await away.connect(receiver, clean_start=False, properties=KEEP)
            await away.subscribe("site/queue")
        await until(lambda: not site.mqtt.server.devices.leaving and len(site.mqtt.server.devices.by_key) == 1)
        for _ in range(6):
            assert await sender.publish("site/queue", b"x") is R.SUCCESS
        async with site.grown(Limit.SESSION_QUEUE, 2):
            for qos in (QoS.AT_LEAST_ONCE, QoS.EXACTLY_ONCE):
                assert await sender.publish("site/queue", b"x", qos) is R.QUOTA_EXCEEDED
        async with site.mqtt.client() as back:  # what was acknowledged is there
            await back.connect(receiver, clean_start=False, properties=KEEP)
            assert [(await back.message()).payload for _ in range(6)] == [b"x"] * 6
            await back.send(Disconnect(properties=Properties(session_expiry_interval=0)))
            await back.closed()
        await until(lambda: not site.mqtt.server.devices.leaving)


async def test_retained_messages_beyond_those_of_a_tenant(site: Site) -> None:
    async with site.connected() as client:
        for topic in ("site/1", "site/2"):
            assert await client.publish(topic, b"x", retain=True) is R.SUCCESS
        async with site.grown(Limit.RETAINED, 2):
            assert await client.publish("site/3", b"x", retain=True) is R.QUOTA_EXCEEDED
            assert await client.publish("site/2", b"x" * 2_500, retain=True) is R.QUOTA_EXCEEDED
        for topic in ("site/1", "site/2"):
            assert await client.publish(topic, b"", retain=True) is R.SUCCESS


async def test_stored_sessions_beyond_those_of_a_device(site: Site) -> None:
    device = await site.device()
    for name in ("one", "two"):
        async with site.mqtt.client() as client:
            assert (await client.connect(device, client_id=name, properties=KEEP)).reason is R.SUCCESS
    async with site.mqtt.client() as client, site.grown(Limit.STORED_SESSIONS):
        assert (await client.connect(device, client_id="three", properties=KEEP)).reason is R.QUOTA_EXCEEDED


async def test_provisioning_connections_and_requests(site: Site) -> None:
    async with site.mqtt.client() as one, site.mqtt.client() as two, site.mqtt.client() as three:
        for client in (one, two):
            assert (await client.connect(user_name="provision")).reason is R.SUCCESS
        async with site.grown(Limit.PROVISIONING_CONNECTIONS):
            assert (await three.connect(user_name="provision")).reason is R.QUOTA_EXCEEDED
        for _ in range(2):
            assert await one.publish("provision/request", b"{}") is R.SUCCESS
        async with site.grown(Limit.PROVISIONING_ATTEMPTS):
            assert await one.publish("provision/request", b"{}") is R.QUOTA_EXCEEDED
        await two.publish("provision/request", b"{}")
        await two.publish("provision/request", b"{}")
    await until(lambda: not any(peer.role for peer in site.mqtt.server.peers))
    async with site.mqtt.client() as four:
        await four.connect(user_name="provision")
        await four.publish("provision/request", b"{}")  # the fifth of this address
        async with site.grown(Limit.PROVISIONING_ATTEMPTS):
            assert await four.publish("provision/request", b"{}") is R.SUCCESS  # a refusal is an answer
            answers = [packet.payload for packet in four.received if isinstance(packet, Publish)]
            assert b"RESOURCE_EXHAUSTED" in answers[-1]


async def test_refused_credentials_for_which_there_is_no_room_to_wait(site: Site) -> None:
    device = await site.device()
    async with site.mqtt.client() as first, site.mqtt.client() as second, site.mqtt.client() as third:
        for client in (first, second):
            wrong = Device(device.device_id, f"sk_live_wrong_{id(client)}")
            assert (await client.connect(wrong)).reason is R.NOT_AUTHORIZED
        async with site.mqtt.client() as waiting:
            password = f"sk_live_wrong_{id(first)}".encode()
            await waiting.send(Connect(Version.V5, "waits", user_name=device.device_id, password=password))
            await until(lambda: site.mqtt.server.counters.held == 1)
            async with site.grown(Limit.REFUSED_WAITING):
                again = Device(device.device_id, f"sk_live_wrong_{id(second)}")
                assert (await third.connect(again)).reason is R.NOT_AUTHORIZED


async def test_counts_in_one_packet_are_bounded(site: Site) -> None:
    many = Properties(user_properties=(("a", "b"),) * 4)
    async with site.connected() as client:
        ended = site.mqtt.server.counters.ended[R.QUOTA_EXCEEDED]
        await client.send(Publish("site/a", b"x", properties=many))
        assert await goodbye(client) == [R.QUOTA_EXCEEDED]
        assert site.mqtt.server.counters.ended[R.QUOTA_EXCEEDED] == ended + 1
    async with site.connected() as client:
        filters = tuple(SubscriptionRequest(f"site/{n}", QoS.AT_MOST_ONCE) for n in range(6))
        await client.send(Subscribe(1, filters))
        assert await goodbye(client) == [R.QUOTA_EXCEEDED]
    assert 'what="ended_quota_exceeded"' in site.metrics.render().decode()


async def test_qos_2_that_is_never_released_in_3(site: Site) -> None:
    async with site.connected(Version.V311) as client:
        ended = site.mqtt.server.counters.ended[R.QUOTA_EXCEEDED]
        for packet_id in range(1, 6):
            await client.send(Publish("site/a", b"x", QoS.EXACTLY_ONCE, packet_id=packet_id))
            assert (await client.expect(Ack)).type is PacketType.PUBREC
        await client.send(Publish("site/a", b"x", QoS.EXACTLY_ONCE, packet_id=6))
        assert await goodbye(client) == []
        assert site.mqtt.server.counters.ended[R.QUOTA_EXCEEDED] == ended + 1
