"""The wall clock is set, or the machine has slept: what is kept for a client expires when its publisher said."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from adapters.mqtt.properties import Properties
from tests.http_api import Api, api
from tests.mqtt_devices import KEEP, devices, silent
from tests.mqtt_server import Client, Running, serving_mqtt
from tests.nodes import until

__all__ = ["api"]

HOUR, DAY = 3_600.0, 86_400.0
EXPIRY = 600


@dataclass
class WallClock:
    """The machine's, and by how much it was set since."""

    set_by: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.set_by


@pytest.fixture
def wall_clock() -> WallClock:
    return WallClock()


@pytest.fixture
async def mqtt(api: Api, wall_clock: WallClock) -> AsyncIterator[Running]:
    async with serving_mqtt(api, wall_clock=wall_clock) as running:
        yield running


async def publish(sender: Client, *, retain: bool = False) -> None:
    await sender.publish("site/log", b"kept", retain=retain, properties=Properties(message_expiry_interval=EXPIRY))


@pytest.mark.parametrize("jump", [HOUR, -HOUR, DAY, -DAY])
async def test_a_message_that_waits_expires_when_it_should_after_the_clock_was_set(
    mqtt: Running, wall_clock: WallClock, jump: float
) -> None:
    one, other = await devices(mqtt, 2)
    async with mqtt.client() as sender:
        await sender.connect(one)
        async with mqtt.client() as receiver:
            await receiver.connect(other, clean_start=False, properties=Properties(session_expiry_interval=100_000))
            await receiver.subscribe("site/#")
        await until(lambda: len(mqtt.server.devices.by_key) == 1 and not mqtt.server.devices.leaving)
        wall_clock.set_by += jump
        await publish(sender)
        async with mqtt.client() as receiver:
            assert (await receiver.connect(other, clean_start=False, properties=KEEP)).session_present
            got = await receiver.message()
            assert got.payload == b"kept"
            assert EXPIRY - 10 <= (got.properties.message_expiry_interval or 0) <= EXPIRY
            await receiver.goodbye()
            await receiver.closed()
        await until(lambda: len(mqtt.server.devices.by_key) == 1 and not mqtt.server.devices.leaving)
        await publish(sender)
        wall_clock.set_by += EXPIRY + 1
        async with mqtt.client() as receiver:
            assert (await receiver.connect(other, clean_start=False, properties=KEEP)).session_present
            await silent(receiver)


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
async def test_so_does_a_retained_one(mqtt: Running, wall_clock: WallClock, jump: float) -> None:
    one, other = await devices(mqtt, 2)
    wall_clock.set_by += jump
    async with mqtt.client() as sender, mqtt.client() as receiver:
        await sender.connect(one)
        await publish(sender, retain=True)
        await receiver.connect(other)
        await receiver.subscribe("site/#")
        got = await receiver.message()
        assert EXPIRY - 10 <= (got.properties.message_expiry_interval or 0) <= EXPIRY
    wall_clock.set_by += EXPIRY + 1
    async with mqtt.client() as receiver:
        await receiver.connect(other)
        await receiver.subscribe("site/#")
        await silent(receiver)
