"""A session that is taken up again while somebody publishes without a break gets his messages in their order (MQTT 5.0
§4.6), over TLS and the whole broker. What can overtake what in the store is in test_messaging_order.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from adapters.mqtt.wire_packets import Ack, Publish, QoS
from adapters.mqtt.wire_reasons import PacketType
from registry.messaging_limits import MessagingLimits
from tests.http_api import Api, api
from tests.mqtt_devices import KEEP, devices
from tests.mqtt_server import Client, Running, serving_mqtt

__all__ = ["api"]

WINDOW = 100
FIRST = 300
"""Publications that are accepted before the session is taken up, and as many while it is."""


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    roomy = MessagingLimits(queued_messages=32_000, queued_bytes=10**8)  # however slow the subscriber is here
    async with serving_mqtt(api, stored=roomy) as running:
        yield running


async def publish_without_a_break(client: Client, qos: QoS, accepted: asyncio.Semaphore, enough: asyncio.Event) -> int:
    """Numbered messages, a window of them on their way; how many. `accepted` counts those that are acknowledged."""
    sent = under_way = 0
    while under_way or not enough.is_set():
        while under_way < WINDOW and not enough.is_set():
            await client.send(Publish("site/a", b"%d" % sent, qos, packet_id=client.new_id()))
            sent, under_way = sent + 1, under_way + 1
        answer = await client.expect(Ack)
        assert not answer.reason.failed, answer
        if answer.type is PacketType.PUBREC:
            await client.send(Ack(PacketType.PUBREL, answer.packet_id))
        else:
            under_way -= 1
            accepted.release()
    return sent


async def heard(client: Client) -> int:
    """The number of the next message, which is acknowledged, and so are the releases before it."""
    while True:
        packet = await client.packet()
        match packet:
            case Publish():
                kind = PacketType.PUBACK if packet.qos is QoS.AT_LEAST_ONCE else PacketType.PUBREC
                await client.send(Ack(kind, packet.packet_id))
                return int(packet.payload)
            case Ack(PacketType.PUBREL):
                await client.send(Ack(PacketType.PUBCOMP, packet.packet_id))
            case _:
                pytest.fail(f"{packet} came")


@pytest.mark.parametrize("qos", [QoS.AT_LEAST_ONCE, QoS.EXACTLY_ONCE])
async def test_a_session_taken_up_under_load_hears_a_publisher_in_his_order(mqtt: Running, qos: QoS) -> None:
    one, two = await devices(mqtt, 2)
    async with mqtt.client() as away:
        await away.connect(two, client_id="subscriber", clean_start=False, properties=KEEP)
        await away.subscribe("site/#", qos=qos)
        await away.goodbye()
        await away.closed()
    accepted, enough = asyncio.Semaphore(0), asyncio.Event()
    async with mqtt.client() as publisher, mqtt.client() as subscriber:
        await publisher.connect(one, client_id="publisher")
        publishing = asyncio.create_task(publish_without_a_break(publisher, qos, accepted, enough))
        for _ in range(FIRST):
            await accepted.acquire()
        connack = await subscriber.connect(two, client_id="subscriber", clean_start=False, properties=KEEP)
        assert connack.session_present
        numbers = [await heard(subscriber) for _ in range(2 * FIRST)]
        enough.set()
        sent = await publishing
        numbers += [await heard(subscriber) for _ in range(sent - len(numbers))]
    assert numbers == list(range(sent))
