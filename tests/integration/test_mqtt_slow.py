"""A client that reads nothing is cut, one that reads slowly is not, and neither holds up anybody else.

The server runs here, with short times. Both clients have so small a receive window that what they do not read stays on
the server's side: first in the kernel's send buffer, then in the transport, and there the session stops.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.wire import encode
from adapters.mqtt.wire_packets import Connect, Ping, Publish, QoS, Subscribe, SubscriptionRequest
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from tests.http_api import Api, api
from tests.mqtt_server import Device, Running, serving_mqtt
from tests.nodes import until
from tests.tls_peers import client_context

__all__ = ["api"]

STALL = 1.0
GRANTS = [{"filter": "site/#", "allow": ["publish", "subscribe"]}]
BODY = b"x" * 8_192


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    limits = ServerLimits(machine=MqttLimits(write_stall=STALL))
    async with serving_mqtt(api, limits) as running:
        yield running


async def devices(mqtt: Running, count: int) -> list[Device]:
    async with mqtt.api.operator() as operator:
        body = {"name": "Site", "profile_id": "p_site", "topic_grants": GRANTS}
        assert (await operator.post("/api/v1/profiles", json=body)).status_code == 201
    return [await mqtt.device(f"HW-{n}", profile_id="p_site") for n in range(count)]


class Narrow:
    """A connection over a socket with a small window, which reads only when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, size: int) -> bytes:
        """Up to so many bytes; empty at the end."""
        try:
            return await self._reader.read(size)
        except OSError:
            return b""

    def send(self, data: bytes) -> None:
        self._writer.write(data)


@asynccontextmanager
async def narrow(mqtt: Running, device: Device, topic: str) -> AsyncIterator[Narrow]:
    """A connected subscriber with QoS 0, whose stream holds 4 KB and whose kernel little more."""
    plain = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    plain.setblocking(False)
    await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", mqtt.port))
    reader, writer = await asyncio.open_connection(
        sock=plain, ssl=client_context(mqtt.holder), server_hostname="localhost", limit=4_096
    )
    client = Narrow(reader, writer)
    connect = Connect(Version.V5, "narrow", True, 0, None, device.device_id, device.api_key.encode())
    client.send(encode(connect, Version.V5))
    client.send(encode(Subscribe(1, (SubscriptionRequest(topic, QoS.AT_MOST_ONCE),)), Version.V5))
    await until(lambda: _subscribed(mqtt))
    try:
        yield client
    finally:
        writer.transport.abort()


def _subscribed(mqtt: Running) -> bool:
    return any(role.key[2] == "narrow" and role.brokered for role in mqtt.server.devices.by_key.values())


def _stalled(mqtt: Running) -> bool:
    return any(peer.machine.stalled_since is not None for peer in mqtt.server.peers)


async def fill(mqtt: Running, publisher: Device) -> None:
    """Publish until the subscriber's connection takes no more."""
    async with mqtt.client() as client:
        await client.connect(publisher, client_id="filler")
        async with asyncio.timeout(30):
            while not _stalled(mqtt):
                for _ in range(20):
                    await client.send(Publish("site/flood", BODY, QoS.AT_MOST_ONCE))
                assert await client.publish("devices/me/events", {"n": 1}) is ReasonCode.SUCCESS
        await client.goodbye()


async def test_a_client_that_never_reads_is_cut_while_others_go_on(mqtt: Running) -> None:
    publisher, silent = await devices(mqtt, 2)
    pings = encode(Ping(PacketType.PINGREQ), Version.V5) * 1_000
    async with narrow(mqtt, silent, "site/flood") as client:
        await fill(mqtt, publisher)
        stalled_at = time.monotonic()
        client.send(pings)  # it asks on, without a look at the answers
        dropped = mqtt.server.counters.dropped
        async with mqtt.client() as good:
            await good.connect(publisher)
            while _subscribed(mqtt):
                assert time.monotonic() - stalled_at < 30
                await good.send(Publish("site/flood", BODY, QoS.AT_MOST_ONCE))
                assert await good.publish("devices/me/events", {"n": 1}) is ReasonCode.SUCCESS
        assert time.monotonic() - stalled_at > 0.9 * STALL
        assert mqtt.server.counters.dropped > dropped  # of QoS 0, counted
        assert mqtt.server.counters.timed_out == 1
        await until(lambda: mqtt.server.tls_counters.open == 0, seconds=20)


async def test_a_slow_reader_is_not_cut(mqtt: Running) -> None:
    publisher, slow = await devices(mqtt, 2)
    async with narrow(mqtt, slow, "site/flood") as client:
        await fill(mqtt, publisher)
        stalled_at = time.monotonic()
        while time.monotonic() - stalled_at < 3 * STALL and _stalled(mqtt):
            assert await client.read(4_096)
            await asyncio.sleep(0.02)  # what makes it slow
        assert time.monotonic() - stalled_at > 2 * STALL, "not slow enough to prove anything"
        assert _subscribed(mqtt)
        assert mqtt.server.counters.timed_out == 0
        while _stalled(mqtt):
            assert await client.read(65_536)
        client.send(encode(Ping(PacketType.PINGREQ), Version.V5))
        heard = b""
        async with asyncio.timeout(20):
            while not heard.endswith(b"\xd0\x00"):
                heard = heard[-8:] + await client.read(65_536)
