"""Places for peers without credentials: who gives way when all are taken, and how long one is held for nothing.

The addresses are those of the loopback network, each a block of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from unittest import mock

from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.wire_packets import Ack, Connack, Connect, Disconnect, Publish, QoS
from adapters.mqtt.wire_reasons import ReasonCode as R
from adapters.mqtt.wire_reasons import Version
from registry.model import Contact
from tests.http_api import Api, api
from tests.mqtt_server import Client, Gone, Running, serving_mqtt
from tests.nodes import until

__all__ = ["api"]

REQUEST = "provision/request"


@asynccontextmanager
async def comers(mqtt: Running) -> AsyncIterator[Crowd]:
    async with AsyncExitStack() as stack:
        yield Crowd(mqtt, stack)


class Crowd:
    """Clients of several addresses."""

    def __init__(self, mqtt: Running, stack: AsyncExitStack) -> None:
        self._mqtt = mqtt
        self._stack = stack

    async def open(self, number: int) -> Client:
        """A connection from 127.0.9.`number`."""
        client = self._mqtt.client()
        client._reader, client._writer = await asyncio.open_connection(
            "127.0.0.1", client.port, ssl=client.context, local_addr=(f"127.0.9.{number}", 0)
        )
        self._stack.callback(client.drop)
        return client

    async def come(self, number: int, reason: R = R.SUCCESS) -> Client:
        """A provisioner from there, answered so."""
        client = await self.open(number)
        assert (await client.connect(user_name="provision")).reason is reason
        return client


async def said_goodbye(client: Client) -> R:
    """The server's reason; then the connection is closed."""
    told = await client.expect(Disconnect)
    assert await client.closed() == []
    return told.reason


async def here_still(client: Client) -> bool:
    try:
        await client.subscribe("provision/response")
    except (Gone, ConnectionError):
        return False
    return True


async def test_the_oldest_of_the_address_that_holds_most_gives_way_until_all_hold_the_same(api: Api) -> None:
    async with (
        serving_mqtt(api, ServerLimits(provisioning=4, provisioning_per_address=3)) as mqtt,
        comers(mqtt) as all_,
    ):
        oldest, second, third = [await all_.come(1) for _ in range(3)]
        alone = await all_.come(2)
        counters = mqtt.server.counters
        assert counters.provisioning_displaced == 0
        newcomer = await all_.come(3)
        assert await said_goodbye(oldest) is R.QUOTA_EXCEEDED
        another = await all_.come(4)
        assert await said_goodbye(second) is R.QUOTA_EXCEEDED
        await all_.come(5, R.QUOTA_EXCEEDED)  # everybody has one
        await all_.come(1, R.QUOTA_EXCEEDED)
        assert [await here_still(each) for each in (third, alone, newcomer, another)] == [True] * 4
        assert (counters.provisioning_displaced, counters.provisioning_full) == (2, 2)
        third.drop()
        await until(lambda: len([peer for peer in mqtt.server.peers if peer.role]) == 3)
        await all_.come(5)


async def test_few_addresses_that_come_again_and_again_shut_nobody_out(api: Api) -> None:
    async with (
        serving_mqtt(api, ServerLimits(provisioning=8, provisioning_per_address=4)) as mqtt,
        comers(mqtt) as all_,
    ):
        for _ in range(4):
            for number in (1, 2):
                await all_.come(number)
        good = await all_.come(3)
        for _ in range(10):
            for number in (1, 2):
                client = await all_.open(number)
                await client.connect(user_name="provision")
        assert await here_still(good)
        assert await good.publish(REQUEST, b"{}") is R.SUCCESS
        assert len([peer for peer in mqtt.server.peers if peer.role]) == 8


async def test_who_is_being_answered_keeps_its_place(api: Api) -> None:
    async with (
        serving_mqtt(api, ServerLimits(provisioning=3, provisioning_per_address=3)) as mqtt,
        comers(mqtt) as all_,
    ):
        asking, idle, last = [await all_.come(1) for _ in range(3)]
        begun, go_on = asyncio.Event(), asyncio.Event()
        answer = mqtt.server.provisioning.provisioning.answer

        async def slow(payload: bytes, contact: Contact) -> object:
            begun.set()
            await go_on.wait()
            return await answer(payload, contact)

        with mock.patch.object(mqtt.server.provisioning, "provisioning", mock.Mock(answer=slow)):
            await asking.send(Publish(REQUEST, b"{}", QoS.AT_LEAST_ONCE, packet_id=1))
            await begun.wait()
            await all_.come(2)
            assert await said_goodbye(idle) is R.QUOTA_EXCEEDED
            go_on.set()
            kinds = {type(await asking.packet()) for _ in range(2)}
        assert kinds == {Publish, Ack}  # the answer, and that the request has come
        assert await here_still(last)


async def test_a_place_is_for_who_asks(api: Api) -> None:
    limits = ServerLimits(provisioning_silence=1.0, provisioning_seconds=3.0)
    async with serving_mqtt(api, limits) as mqtt, comers(mqtt) as all_:
        silent, asking = await all_.open(1), await all_.open(1)
        await silent.send(Connect(Version.V5, "silent", user_name="provision"))
        await asking.send(Connect(Version.V5, "asking", user_name="provision"))
        await asking.send(Publish(REQUEST, b"{}", QoS.AT_LEAST_ONCE, packet_id=1))
        assert (await silent.expect(Connack)).reason is R.SUCCESS
        assert await said_goodbye(silent) is R.MAXIMUM_CONNECT_TIME
        assert await here_still(asking)
        assert [type(packet) for packet in await asking.closed()] == [Disconnect]
        assert mqtt.server.counters.provisioning_timed_out == 2
