"""What comes down from the core to a session that has no room for it now: later, and the newest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from adapters.mqtt import downlinks
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import Properties
from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.wire_packets import Ack, Publish, QoS, Unsuback, Unsubscribe
from adapters.mqtt.wire_reasons import PacketType, ReasonCode
from tests.http_api import BASE, Api, api
from tests.mqtt_devices import devices, silent
from tests.mqtt_server import Client, Running, serving_mqtt
from tests.nodes import until

__all__ = ["api"]

ROOM = 4


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    async with serving_mqtt(api, ServerLimits(machine=MqttLimits(queued_messages=ROOM))) as running:
        yield running


async def fill(sender: Client, receiver: Client) -> list[Publish]:
    """As many messages as the receiver's queue takes, none of them acknowledged."""
    for n in range(ROOM):
        assert await sender.publish("site/a", b"%d" % n) is ReasonCode.SUCCESS
    return [await receiver.expect(Publish) for _ in range(ROOM)]


async def put_config(mqtt: Running, device_id: str, value: int) -> int:
    async with mqtt.api.operator() as operator:
        answer = await operator.put(f"{BASE}/devices/{device_id}/config", json={"config": {"interval": value}})
    assert answer.status_code == 200, answer.text
    version: int = answer.json()["version"]
    return version


async def test_a_configuration_for_a_full_session_comes_when_there_is_room_and_only_the_newest(mqtt: Running) -> None:
    one, other = await devices(mqtt, 2)
    async with mqtt.client() as sender, mqtt.client() as receiver:
        await sender.connect(one)
        await receiver.connect(other)
        await receiver.subscribe("devices/me/config", "site/#")
        assert (await receiver.message()).topic == "devices/me/config"
        held = await fill(sender, receiver)
        line = _only_line(mqtt, other.device_id)
        for value in (10, 20, 30):
            version = await put_config(mqtt, other.device_id, value)
            await until(lambda version=version: line._unsent is not None and line._unsent.version == version)
        await silent(receiver)
        await receiver.send(Ack(PacketType.PUBACK, held[0].packet_id))
        down = await receiver.message()
        assert (down.topic, msgspec.json.decode(down.payload)) == (
            "devices/me/config",
            {"version": 4, "config": {"interval": 30}},
        )
        for each in held[1:]:
            await receiver.send(Ack(PacketType.PUBACK, each.packet_id))
        await silent(receiver)
        assert not _role(mqtt, other.device_id).downlinks.waiting


async def test_a_configuration_that_waits_is_forgotten_with_its_subscription(mqtt: Running) -> None:
    one, other = await devices(mqtt, 2)
    async with mqtt.client() as sender, mqtt.client() as receiver:
        await sender.connect(one)
        await receiver.connect(other)
        await receiver.subscribe("devices/me/config", "site/#")
        await receiver.message()
        held = await fill(sender, receiver)
        line = _only_line(mqtt, other.device_id)
        await put_config(mqtt, other.device_id, 10)
        await until(lambda: line._unsent is not None)
        await receiver.send(Unsubscribe(7, ("devices/me/config",)))
        await receiver.expect(Unsuback)
        assert line._unsent is None
        for each in held:
            await receiver.send(Ack(PacketType.PUBACK, each.packet_id))
        await silent(receiver)


async def test_commands_that_found_no_room_come_in_order_though_others_are_still_on_their_way(
    mqtt: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downlinks, "AGAIN_SECONDS", 0.05)
    (one,) = await devices(mqtt, 1)
    methods = [f"m{n}" for n in range(ROOM + 3)]
    async with mqtt.api.operator() as operator:
        for method in methods:
            asked = await operator.post(f"{BASE}/devices/{one.device_id}/commands", json={"method": method})
            assert asked.status_code == 201, asked.text
    async with mqtt.client() as receiver:
        await receiver.connect(one)
        await receiver.subscribe("devices/me/commands")
        got = [await receiver.expect(Publish) for _ in range(ROOM)]
        await silent(receiver)  # they are tried again in vain
        for n in range(len(methods)):
            await receiver.send(Ack(PacketType.PUBACK, got[n].packet_id))
            if len(got) < len(methods):
                got.append(await receiver.expect(Publish))
        assert [msgspec.json.decode(each.payload)["method"] for each in got] == methods


@pytest.mark.parametrize("qos", [QoS.AT_MOST_ONCE, QoS.AT_LEAST_ONCE])
async def test_a_command_larger_than_the_client_takes_stays_queued_and_holds_up_no_other(
    mqtt: Running, qos: QoS
) -> None:
    (one,) = await devices(mqtt, 1)
    path = f"{BASE}/devices/{one.device_id}/commands"
    sizes = {"small": 1, "large": 2000, "last": 1}
    ids = {}
    async with mqtt.api.operator() as operator, mqtt.client() as narrow, mqtt.client() as wide:
        for method, size in sizes.items():
            asked = await operator.post(path, json={"method": method, "params": {"x": "x" * size}})
            ids[method] = asked.json()["command_id"]

        async def statuses() -> dict[str, str]:
            return {method: (await operator.get(f"{path}/{ids[method]}")).json()["status"] for method in ids}

        async def become(**expected: str) -> None:
            async with asyncio.timeout(20):
                while await statuses() != expected:
                    await asyncio.sleep(0.02)

        await narrow.connect(one, properties=Properties(maximum_packet_size=1000))
        await narrow.subscribe("devices/me/commands", qos=qos)
        for method in ("small", "last"):
            down = await narrow.message()
            assert msgspec.json.decode(down.payload)["method"] == method
        await become(small="delivered", large="queued", last="delivered")
        await silent(narrow)
        await narrow.goodbye()
        await wide.connect(one)
        await wide.subscribe("devices/me/commands", qos=qos)
        got = {msgspec.json.decode((await wide.message()).payload)["method"] for _ in ids}
        assert got == set(ids), "unanswered ones come again, with the one that fits now"
        await become(**dict.fromkeys(ids, "delivered"))


def _role(mqtt: Running, device_id: str):  # type: ignore[no-untyped-def]
    return next(role for role in mqtt.server.devices.by_key.values() if str(role.own) == device_id)


def _only_line(mqtt: Running, device_id: str):  # type: ignore[no-untyped-def]
    (line,) = _role(mqtt, device_id).downlinks._lines.values()
    return line
