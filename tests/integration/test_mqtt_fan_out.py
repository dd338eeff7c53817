"""A message of QoS 0 for many receivers: handed out in steps, in order, and of its publisher's own turn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from unittest import mock

import pytest

from adapters.mqtt import broker as brokers
from adapters.mqtt.broker import Broker
from adapters.mqtt.fan_out import FanOut
from adapters.mqtt.peer import Peer
from adapters.mqtt.wire import encode
from adapters.mqtt.wire_packets import Ping, Publish, QoS
from adapters.mqtt.wire_reasons import PacketType
from registry.model import TenantId
from registry.pacing import TURN
from tests.http_api import Api, api
from tests.mqtt_devices import devices
from tests.mqtt_server import serving_mqtt
from tests.nodes import until

__all__ = ["api"]

ONE, TWO = TenantId("one"), TenantId("two")


class Log:
    """Who was served, and where the loop turned in between."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def steps(self, name: str, count: int) -> Iterator[None]:
        for _ in range(count):
            self.lines.append(name)
            yield

    def without_pause(self) -> int:
        return max(len(part) for part in "".join(line[0] for line in self.lines).split("|"))


async def test_a_line_is_handed_out_in_order_and_in_turns() -> None:
    log = Log()
    tasks: list[asyncio.Task[None]] = []
    fan_out = FanOut(lambda work: tasks.append(asyncio.ensure_future(work)))
    fan_out.put(ONE, log.steps("a", 2 * TURN + 1), lambda: log.lines.append("A"))
    fan_out.put(ONE, log.steps("b", 3), lambda: log.lines.append("B"))
    fan_out.put(TWO, log.steps("c", 1), lambda: log.lines.append("C"))
    assert fan_out.busy(ONE)
    assert fan_out.busy(TWO)
    while not all(task.done() for task in tasks):
        log.lines.append("|")
        await asyncio.sleep(0)
    assert not fan_out.busy(ONE)
    assert [line for line in log.lines if line in "ABC"] == ["C", "A", "B"]
    assert log.without_pause() <= TURN + 3  # of both tenants, with what is said when they are done
    assert log.lines.count("a") == 2 * TURN + 1


async def test_who_sent_what_cannot_be_handed_out_is_told_all_the_same() -> None:
    """Else it would be one of the few messages that its publisher may have on their way, for ever."""

    def broken() -> Iterator[None]:
        yield
        raise ValueError("nobody has thought of this")

    def unlucky() -> None:
        log.lines.append("A")
        raise ValueError("nor of this")

    log = Log()
    tasks: list[asyncio.Task[None]] = []
    fan_out = FanOut(lambda work: tasks.append(asyncio.ensure_future(work)))
    fan_out.put(ONE, broken(), unlucky)
    fan_out.put(ONE, log.steps("b", 1), lambda: log.lines.append("B"))
    await asyncio.gather(*tasks)
    assert log.lines == ["A", "b", "B"]
    assert not fan_out.busy(ONE)


async def test_messages_of_qos_0_keep_their_order_at_once_and_in_line(api: Api) -> None:
    async with serving_mqtt(api) as mqtt, mqtt.client() as first, mqtt.client() as second, mqtt.client() as sender:
        one, two = await devices(mqtt, 2)
        for number, client in enumerate((first, second)):
            await client.connect(two, client_id=f"s{number}")
            await client.subscribe("site/wide", qos=QoS.AT_MOST_ONCE)
        await first.subscribe("site/narrow", qos=QoS.AT_MOST_ONCE)
        await sender.connect(one, client_id="p")
        assert sender._writer is not None
        topics = ["site/wide" if number % 3 else "site/narrow" for number in range(90)]
        with mock.patch.object(brokers, "_AT_ONCE", 1):
            sender._writer.write(
                b"".join(
                    encode(Publish(topic, b"%d" % number, QoS.AT_MOST_ONCE), sender.version)
                    for number, topic in enumerate(topics)
                )
            )
            heard = [await first.packet() for _ in range(90)]
        assert [each.payload for each in heard if isinstance(each, Publish)] == [b"%d" % n for n in range(90)]


@pytest.mark.parametrize("revoked", [False, True])
async def test_what_waits_in_line_is_planned_in_its_turn_and_not_for_who_was_revoked(api: Api, revoked: bool) -> None:
    """A plan names every receiver: those of all that waits would be receivers times publishers times their windows."""
    waits = True

    def until_told() -> Iterator[None]:
        while waits:
            yield

    async with serving_mqtt(api) as mqtt, mqtt.client() as subscriber, mqtt.client() as sender:
        one, two = await devices(mqtt, 2)
        await subscriber.connect(two, client_id="s")
        await subscriber.subscribe("site/#", qos=QoS.AT_MOST_ONCE)
        await sender.connect(one, client_id="p")
        (role,) = (role for key, role in mqtt.server.devices.by_key.items() if key[2] == "p")
        broker = mqtt.server.broker
        broker._fan_out.put(role.tenant_id, until_told(), lambda: None)
        with mock.patch.object(broker, "_planned", side_effect=broker._planned) as planned:
            try:
                for number in range(20):
                    await sender.publish("site/a", b"%d" % number, QoS.AT_MOST_ONCE)
                await until(lambda: role.peer.machine._unanswered == 20)
                assert planned.call_count == 0
                role.session.closed = revoked  # as the registry does before it closes the connection
            finally:
                waits = False
            await until(lambda: role.peer.machine._unanswered == 0)
            assert planned.call_count == (0 if revoked else 20)
        await subscriber.send(Ping(PacketType.PINGREQ))
        while not isinstance(await subscriber.packet(), Ping):
            pass
    heard = [each.payload for each in subscriber.received if isinstance(each, Publish)]
    assert heard == ([] if revoked else [b"%d" % number for number in range(20)])


async def test_receivers_take_of_their_publishers_turn(api: Api) -> None:
    given: list[int] = [0]
    give, move = Broker._give, Peer._move

    def counted(self: Broker, *args: object) -> None:
        given[-1] += 1
        give(self, *args)  # type: ignore[arg-type]

    def turn(self: Peer) -> None:
        given.append(0)
        move(self)

    async with serving_mqtt(api) as mqtt, mqtt.client() as sender:
        one, two = await devices(mqtt, 2)
        clients = [await mqtt.client().__aenter__() for _ in range(8)]
        for number, client in enumerate(clients):
            await client.connect(two, client_id=f"s{number}")
            await client.subscribe("site/#", qos=QoS.AT_MOST_ONCE)
        await sender.connect(one, client_id="p")
        assert sender._writer is not None
        packet = encode(Publish("site/a", b"x", QoS.AT_MOST_ONCE), sender.version)
        with mock.patch.object(Broker, "_give", counted), mock.patch.object(Peer, "_move", turn):
            sender._writer.write(128 * packet)
            for client in clients:
                for _ in range(128):
                    await client.packet()
        for client in clients:
            await client.__aexit__(None, None, None)
    packets_per_turn = mqtt.server.limits.machine.packets_per_turn
    assert sum(given) == 8 * 128
    assert max(given) <= 8 * (packets_per_turn // 3 + 1)  # a packet, and two more for its eight receivers
