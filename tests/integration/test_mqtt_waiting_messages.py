"""Messages for which the core had no room, and what becomes of them when their device may not send them any more.

PUBLISH, 3.1.1 ─► no room ─► waits ─► tried again ─► its grant has gone: the connection is closed, at once
                                                └──► the session was closed meanwhile: it is dropped, not stored
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from unittest import mock

import pytest

from adapters.mqtt.device import DeviceRole
from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.wire_packets import Publish, QoS
from adapters.mqtt.wire_reasons import Version
from registry.errors import Unavailable
from tests.http_api import Api, api
from tests.mqtt_devices import devices
from tests.mqtt_server import Running, serving_mqtt
from tests.nodes import until

__all__ = ["api"]


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    async with serving_mqtt(api, replace(ServerLimits(), full_pause=0.05)) as running:
        yield running


def full(*_: object) -> None:
    raise Unavailable("the queue is full")


def only_role(mqtt: Running) -> DeviceRole:
    (role,) = mqtt.server.devices.by_key.values()
    return role


async def test_a_waiting_message_whose_grant_has_gone_closes_its_connection_at_once(mqtt: Running) -> None:
    (device,) = await devices(mqtt, 1)
    async with mqtt.client(version=Version.V311) as client:
        await client.connect(device)
        with mock.patch.object(mqtt.server.broker, "publish", full):
            await client.send(Publish("site/a", b"1", QoS.AT_LEAST_ONCE, packet_id=1))
            await until(lambda: mqtt.server.counters.full > 0)
            only_role(mqtt).grants = ()
            assert await client.closed() == []
    assert mqtt.server.counters.forbidden == 1


@pytest.mark.parametrize("topic", ["site/a", "devices/me/events"])
async def test_a_waiting_message_of_a_session_that_was_closed_is_not_stored(mqtt: Running, topic: str) -> None:
    (device,) = await devices(mqtt, 1)
    async with mqtt.client(version=Version.V311) as client:
        await client.connect(device)
        with (
            mock.patch.object(mqtt.server.broker, "publish", full),
            mock.patch.object(mqtt.api.registry.uplinks, "submit", full),
        ):
            await client.send(Publish(topic, b"1", QoS.AT_LEAST_ONCE, packet_id=1))
            role = only_role(mqtt)
            await until(lambda: len(role.publishing.waiting) == 1)
            role.session.closed = True  # as the registry does before it closes the connection
        await until(lambda: not role.publishing.waiting)
        await asyncio.sleep(0)
        assert (mqtt.server.counters.stored, mqtt.server.counters.brokered) == (0, 0)
        assert await mqtt.uplinks(device.device_id) == []


async def test_what_a_gateway_sends_for_a_child_is_stored_in_its_order(mqtt: Running) -> None:
    """The first question whose child it is takes longer than the ones behind it."""
    gateway, child, sibling = await devices(mqtt, 3)
    asked = 0
    answered = asyncio.Event()

    async def speaks_for(_: object, device_id: str) -> bool:
        nonlocal asked
        asked += 1
        if asked == 1:
            await answered.wait()
        return True

    async with mqtt.client() as client:
        await client.connect(gateway)
        with mock.patch.object(mqtt.server.devices, "speaks_for", speaks_for):
            for n in range(5):
                await client.send(Publish(f"devices/{child.device_id}/events", b"%d" % n, QoS.AT_MOST_ONCE))
            await client.send(Publish(f"devices/{sibling.device_id}/events", b"5", QoS.AT_MOST_ONCE))
            await until(lambda: mqtt.server.counters.stored == 1)  # another child's does not wait for them
            answered.set()
            await until(lambda: mqtt.server.counters.stored == 6)
        assert only_role(mqtt).publishing._for_children == {}
    assert [each["payload"] for each in await mqtt.uplinks(child.device_id)] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("revoked", [False, True])
async def test_a_message_that_is_judged_when_its_sender_goes_is_stored_unless_that_was_revoked(
    mqtt: Running, revoked: bool
) -> None:
    device, child = await devices(mqtt, 2)
    asked, answered = asyncio.Event(), asyncio.Event()

    async def speaks_for(*_: object) -> bool:
        asked.set()
        await answered.wait()
        return True

    async with mqtt.client() as client:
        await client.connect(device)
        role = only_role(mqtt)
        with mock.patch.object(mqtt.server.devices, "speaks_for", speaks_for):
            await client.send(Publish(f"devices/{child.device_id}/events", b"1", QoS.AT_MOST_ONCE))
            await asked.wait()
            if revoked:
                role.session.closed = True  # as the registry does before it closes the connection
            else:
                (peer,) = mqtt.server.peers
                peer.abort()
                await until(lambda: not mqtt.server.devices.by_key)
            answered.set()
            await until(lambda: not [task for task in mqtt.server._tasks if task.get_name() == "mqtt connection"])
    if not revoked:
        await until(lambda: mqtt.server.counters.stored == 1)
    assert len(await mqtt.uplinks(child.device_id)) == (0 if revoked else 1)
