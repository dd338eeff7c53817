"""Retained messages for new subscriptions: all of them, whatever there is to wait for, and by one task of a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import UUID

import pytest

from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import NO_PROPERTIES
from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.wire_packets import Ack, Publish, QoS, Suback, Subscribe, SubscriptionRequest
from adapters.mqtt.wire_reasons import PacketType, ReasonCode
from registry.messaging_values import Message, Publication, Retained
from registry.model import DeviceId, TenantId
from registry.storage import messaging as storage
from tests.http_api import Api, api
from tests.mqtt_devices import KEEP, devices, silent
from tests.mqtt_server import Client, Running, serving_mqtt
from tests.nodes import until

__all__ = ["api"]

KEPT = 60
BODY = b"x" * 300


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    limits = ServerLimits(machine=MqttLimits(write_bytes=4_096, queued_messages=16))
    async with serving_mqtt(api, limits) as running:
        yield running


async def keep(sender: Client, count: int = KEPT) -> set[str]:
    """Retain something under so many topics."""
    topics = {f"site/kept/{n}" for n in range(count)}
    for topic in sorted(topics):
        assert await sender.publish(topic, BODY, retain=True) is ReasonCode.SUCCESS
    return topics


@pytest.mark.parametrize("qos", [QoS.AT_MOST_ONCE, QoS.AT_LEAST_ONCE], ids=["QoS 0", "QoS 1"])
async def test_more_than_the_network_takes_at_once_comes_whole(mqtt: Running, qos: QoS) -> None:
    one, other = await devices(mqtt, 2)
    async with mqtt.client() as sender, mqtt.client() as receiver:
        await sender.connect(one)
        topics = await keep(sender)
        await receiver.connect(other)
        await receiver.subscribe("site/kept/#", qos=qos)
        got = [await receiver.message() for _ in topics]
        assert {m.topic for m in got} == topics
        assert all(m.retain and m.payload == BODY and m.qos is qos for m in got)
        await silent(receiver)
    assert mqtt.server.counters.dropped == 0


async def test_who_subscribes_again_and_again_keeps_one_task_busy_and_gets_everything(
    mqtt: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    messaging = mqtt.server.broker.messaging
    gate, reading, most, asked = asyncio.Event(), 0, 0, 0
    read = messaging.retained

    async def slowly(tenant_id: TenantId, topics: Sequence[str]) -> list[Retained]:
        nonlocal reading, most, asked
        reading, asked = reading + 1, asked + 1
        most = max(most, reading)
        await gate.wait()
        found = await read(tenant_id, topics)
        reading -= 1
        return found

    one, other = await devices(mqtt, 2)
    async with mqtt.client() as sender, mqtt.client() as greedy:
        await sender.connect(one)
        topics = await keep(sender, 5)
        monkeypatch.setattr(messaging, "retained", slowly)
        await greedy.connect(other)
        for packet_id in range(1, 41):
            text = f"site/kept/{'#' if packet_id % 2 else '+'}"
            await greedy.send(Subscribe(packet_id, (SubscriptionRequest(text, QoS.AT_LEAST_ONCE),)))
        for _ in range(40):
            assert isinstance(await greedy.packet(), Suback)
        await silent(greedy)
        assert (most, asked) == (1, 1)
        gate.set()
        # The first one was asked for again and stops; then each filter's once, the longest waiting first.
        got = [await greedy.message() for _ in range(2 * len(topics))]
        await silent(greedy)
        assert [{m.topic for m in got[:5]}, {m.topic for m in got[5:]}] == [topics, topics]
        assert (most, asked) == (1, 3)


async def test_retained_messages_wait_for_who_does_not_acknowledge(mqtt: Running) -> None:
    """The queue takes 16: the rest comes as the receiver takes them, and other subscribers need not wait for it."""
    one, other, third = await devices(mqtt, 3)
    async with mqtt.client() as sender, mqtt.client() as lazy, mqtt.client() as quick:
        await sender.connect(one)
        topics = await keep(sender, 40)
        await lazy.connect(other)
        await lazy.subscribe("site/kept/#")
        held: list[Publish] = []
        while len(held) < 16:
            held.append(await lazy.expect(Publish))
        await silent(lazy)
        await quick.connect(third)
        await quick.subscribe("site/kept/#")
        assert {(await quick.message()).topic for _ in topics} == topics
        for each in held:
            await lazy.send(Ack(PacketType.PUBACK, each.packet_id))
        rest = [await lazy.message() for _ in range(24)]
        assert {m.topic for m in [*held, *rest]} == topics
    await until(lambda: not mqtt.server.peers)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "in memory"])
@pytest.mark.parametrize("qos", [QoS.AT_MOST_ONCE, QoS.AT_LEAST_ONCE], ids=["QoS 0", "QoS 1"])
@pytest.mark.parametrize("word", [b"new", b""], ids=["replaced", "cleared"])
async def test_what_has_been_replaced_does_not_come_behind_what_replaced_it(
    mqtt: Running, monkeypatch: pytest.MonkeyPatch, stored: bool, qos: QoS, word: bytes
) -> None:
    messaging = mqtt.server.broker.messaging
    read, replaced = messaging.retained, False

    async def read_before(tenant_id: TenantId, topics: Sequence[str]) -> list[Retained]:
        nonlocal replaced
        found = await read(tenant_id, topics)
        if not replaced:
            replaced = True
            await messaging.publish(Publication(tenant_id, publisher, Message("site/a", word, 1, retain=True)))
        return found

    one, other = await devices(mqtt, 2)
    publisher = DeviceId(UUID(one.device_id))
    async with mqtt.client() as sender, mqtt.client() as receiver:
        await sender.connect(one)
        for topic in ("site/a", "site/b"):
            await sender.publish(topic, b"old", retain=True)
        await receiver.connect(other, properties=KEEP if stored else NO_PROPERTIES)
        monkeypatch.setattr(messaging, "retained", read_before)
        await receiver.subscribe("site/#", qos=qos)
        got = []
        while not got or got[-1].topic != "site/b":
            got.append(await receiver.message())
        assert [m.payload for m in got if m.topic == "site/a" and m.payload != word] == []
        assert replaced
        await silent(receiver)


async def test_what_is_being_stored_when_somebody_subscribes_is_not_missed(
    mqtt: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    messaging = mqtt.server.broker.messaging
    hold, settle = storage.lock_retention, messaging.published
    storing, waiting, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def held_late(*arguments: Any) -> Any:
        storing.set()
        await go_on.wait()
        return await hold(*arguments)

    async def settled() -> None:
        waiting.set()
        await settle()

    one, other = await devices(mqtt, 2)
    async with mqtt.client() as sender, mqtt.client() as receiver:
        await sender.connect(one)
        await sender.publish("site/a", b"old", retain=True)
        await receiver.connect(other)
        monkeypatch.setattr(storage, "lock_retention", held_late)
        monkeypatch.setattr(messaging, "published", settled)
        publishing = asyncio.create_task(sender.publish("site/a", b"new", retain=True))
        await storing.wait()
        await receiver.subscribe("site/a")
        await waiting.wait()
        go_on.set()
        assert await publishing is ReasonCode.SUCCESS
        assert (await receiver.message()).payload == b"new"
