"""One stored receiver that takes nothing, seen by its senders, its fellow receivers, itself and the operator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from adapters.mqtt.properties import Properties
from adapters.mqtt.wire_packets import Disconnect, Publish
from adapters.mqtt.wire_reasons import ReasonCode, Version
from registry.messaging_limits import MessagingLimits
from tests.http_api import BASE, Api, api
from tests.mqtt_devices import KEEP, devices
from tests.mqtt_server import Client, Device, Gone, Running, serving_mqtt

__all__ = ["api"]

ROOM = 6
VERSIONS = pytest.mark.parametrize("version", list(Version), ids=["3.1.1", "5.0"])


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    async with serving_mqtt(api, stored=MessagingLimits(queued_messages=ROOM, full_queue_seconds=0.3)) as running:
        yield running


def kept(version: Version) -> Properties:
    return KEEP if version is Version.V5 else Properties()


async def sent(mqtt: Running, device: Device, version: Version, count: int) -> tuple[list[bytes], int]:
    """What was acknowledged, in its order, and how often the sender was refused; it tries each message for ever."""
    acknowledged: list[bytes] = []
    refused = 0
    async with asyncio.timeout(30):
        while len(acknowledged) < count:
            async with mqtt.client(version=version) as sender:
                try:
                    await sender.connect(device, client_id="sender")
                    while len(acknowledged) < count:
                        payload = b"%d" % len(acknowledged)
                        answer = await sender.publish("site/a", payload)
                        if answer is ReasonCode.SUCCESS:
                            acknowledged.append(payload)
                            continue
                        assert answer is ReasonCode.QUOTA_EXCEEDED
                        refused += 1
                        await asyncio.sleep(0.02)  # a client that tries again, not one that floods
                except Gone:
                    assert version is Version.V311
                    refused += 1
    return acknowledged, refused


@VERSIONS
async def test_it_is_ended_after_the_grace_and_nobody_else_loses_anything(mqtt: Running, version: Version) -> None:
    one, good, bad = await devices(mqtt, 3)
    async with mqtt.client(version=version) as healthy, mqtt.client(version=version) as stuck:
        for client, device in ((healthy, good), (stuck, bad)):
            await client.connect(device, clean_start=False, properties=kept(version))
            await client.subscribe("site/a")
        hearing = asyncio.create_task(_all_of(healthy, 2 * ROOM))
        acknowledged, refused = await sent(mqtt, one, version, 2 * ROOM)
        assert refused > 0
        assert await hearing == acknowledged
        rest = await stuck.closed()
        assert [p.payload for p in rest if isinstance(p, Publish)] == acknowledged[:ROOM]
        told = [p.reason for p in rest if isinstance(p, Disconnect)]
        assert told == ([ReasonCode.QUOTA_EXCEEDED] if version is Version.V5 else [])
    async with mqtt.client(version=version) as back:
        answer = await back.connect(bad, clean_start=False, properties=kept(version))
        assert not answer.session_present
    assert mqtt.server.broker.messaging.ended_full == 1
    async with mqtt.api.operator() as operator:
        timeline = (await operator.get(f"{BASE}/devices/{bad.device_id}/timeline")).text
    assert "queue stayed full" in timeline


@VERSIONS
async def test_one_that_is_away_is_ended_too(mqtt: Running, version: Version) -> None:
    one, bad = await devices(mqtt, 2)
    async with mqtt.client(version=version) as away:
        await away.connect(bad, clean_start=False, properties=kept(version))
        await away.subscribe("site/a")
    acknowledged, refused = await sent(mqtt, one, version, ROOM + 1)
    assert refused > 0
    assert len(acknowledged) == ROOM + 1
    async with mqtt.client(version=version) as back:
        assert not (await back.connect(bad, clean_start=False, properties=kept(version))).session_present


async def _all_of(client: Client, count: int) -> list[bytes]:
    return [(await client.message()).payload for _ in range(count)]
