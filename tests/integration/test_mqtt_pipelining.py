"""Gateways that fill their windows at once: they wait where the core's queue is half full, and none is refused.

The queue here is smaller than what the clients send together, as 10,000 is against a few dozen full windows. What is
proved is that nothing of it is answered 0x97 and nothing is lost; how fast it goes is `make bench`'s matter.

Who sends all that it has in one piece and ends its sending, or is gone, has been heard to the end as well.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from unittest import mock
from uuid import uuid4

import pytest
from OpenSSL import SSL

from adapters.mqtt.wire import encode
from adapters.mqtt.wire_packets import (
    Ack,
    Connack,
    Connect,
    Disconnect,
    Publish,
    QoS,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Will,
)
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from registry.errors import Unavailable
from registry.model import UplinkId
from registry.uplinks import StoredUplink, UplinkLimits, Uplinks
from tests.http_api import Api, api
from tests.mqtt_server import WAIT, Running, serving_mqtt
from tests.nodes import until

__all__ = ["api"]

QUEUE = 200
WINDOW = 256
GATEWAYS = 4
BURST = 300


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    uplinks = Uplinks(api.database, limits=UplinkLimits(queue=QUEUE, batch=20))
    small = replace(api, registry=replace(api.registry, uplinks=uplinks))
    async with serving_mqtt(small) as running:
        yield running
    await uplinks.stop()


def burst(device_id: str, count: int, qos: QoS, version: Version) -> bytes:
    """Numbered events, all in one piece."""
    topic = f"devices/{device_id}/events"
    packets = [Publish(topic, b"%d" % n, qos, False, False, n if qos else 0) for n in range(1, count + 1)]
    return b"".join(encode(packet, version) for packet in packets)


async def test_full_windows_wait_for_room_and_none_is_refused(mqtt: Running) -> None:
    async def gateway(number: int) -> tuple[str, list[ReasonCode]]:
        device = await mqtt.device(f"HW-{number}")
        async with mqtt.client() as client:
            await client.connect(device)
            ready.release()
            await all_ready.wait()
            await client.send_raw(burst(device.device_id, WINDOW, QoS.AT_LEAST_ONCE, Version.V5))
            answers = [await client.expect(Ack) for _ in range(WINDOW)]
            assert [answer.packet_id for answer in answers] == list(range(1, WINDOW + 1))
            return device.device_id, [answer.reason for answer in answers]

    ready, all_ready = asyncio.Semaphore(0), asyncio.Event()
    gateways = [asyncio.ensure_future(gateway(number)) for number in range(GATEWAYS)]
    for _ in gateways:
        await ready.acquire()
    all_ready.set()
    for device_id, reasons in await asyncio.gather(*gateways):
        assert set(reasons) == {ReasonCode.SUCCESS}
        async with mqtt.api.operator() as operator:
            answer = await operator.get(f"/api/v1/devices/{device_id}/uplinks", params={"limit": 500})
        assert len(answer.json()["uplinks"]) == WINDOW
    assert mqtt.server.counters.full == 0
    assert mqtt.server.counters.stored == GATEWAYS * WINDOW


@pytest.mark.parametrize("version", Version)
async def test_who_says_goodbye_right_behind_a_burst_has_said_all_of_it(mqtt: Running, version: Version) -> None:
    device = await mqtt.device()
    async with mqtt.client(version=version) as client:
        await client.connect(device)
        goodbye = encode(Disconnect(), version)
        await client.send_raw(burst(device.device_id, BURST, QoS.AT_MOST_ONCE, version) + goodbye)
        assert client._writer is not None
        client._writer.close()  # close_notify follows at once
        await until(lambda: not mqtt.server.peers)
    await until(lambda: mqtt.server.counters.stored == BURST)
    assert mqtt.server.counters.full == 0


@pytest.mark.parametrize("version", Version)
async def test_who_says_all_in_one_piece_learns_that_all_is_stored(mqtt: Running, version: Version) -> None:
    device = await mqtt.device()
    connect = Connect(version, "one", user_name=device.device_id, password=device.api_key.encode())
    goodbye = encode(Disconnect(), version)
    async with mqtt.client(version=version) as client:
        await client.send_raw(
            encode(connect, version) + burst(device.device_id, 3, QoS.AT_LEAST_ONCE, version) + goodbye
        )
        rest = await client.closed()
    assert isinstance(rest[0], Connack)
    assert rest[0].reason is ReasonCode.SUCCESS
    assert rest[1:] == [Ack(PacketType.PUBACK, n) for n in (1, 2, 3)]
    assert mqtt.server.counters.stored == 3


def half_closed(port: int, data: bytes) -> bytes:
    """What is answered to `data` with close_notify right behind it: a script's way to speak. Blocks."""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as plain:
        plain.settimeout(None)
        tls = SSL.Connection(SSL.Context(SSL.TLS_METHOD), plain)
        tls.set_connect_state()
        tls.do_handshake()
        tls.sendall(data)
        tls.shutdown()
        answer = b""
        with suppress(SSL.ZeroReturnError, SSL.SysCallError):
            while True:
                answer += tls.recv(4096)
        return answer


@pytest.mark.parametrize("version", Version)
async def test_who_ends_its_sending_has_the_answers_to_what_it_sent(mqtt: Running, version: Version) -> None:
    device = await mqtt.device()
    connect = Connect(version, "one", user_name=device.device_id, password=device.api_key.encode())
    words = encode(connect, version)
    asked = Subscribe(9, (SubscriptionRequest(f"devices/{device.device_id}/commands", QoS.AT_LEAST_ONCE),))
    published = burst(device.device_id, 3, QoS.AT_LEAST_ONCE, version)
    alone = await asyncio.to_thread(half_closed, mqtt.port, words)
    assert alone[:1] == b"\x20"  # CONNACK
    acks = b"".join(encode(Ack(PacketType.PUBACK, n), version) for n in (1, 2, 3))
    answer = await asyncio.to_thread(half_closed, mqtt.port, words + published)
    assert answer == alone + acks
    answer = await asyncio.to_thread(half_closed, mqtt.port, words + encode(asked, version))
    assert answer == alone + encode(Suback(9, (ReasonCode.GRANTED_QOS_1,)), version)
    await until(lambda: not mqtt.server.peers)
    assert mqtt.server.counters.stored == 3


async def test_who_is_gone_or_has_said_goodbye_is_chosen_for_no_message_while_it_is_heard_to_the_end(
    mqtt: Running,
) -> None:
    """A shared subscription would lose what it gives to such a member (5.0 §4.8.2)."""

    def full(*_: object) -> None:
        raise Unavailable("the queue is full")

    device = await mqtt.device()
    uplinks = mqtt.api.registry.uplinks
    late: asyncio.Future[StoredUplink] = asyncio.get_running_loop().create_future()
    async with mqtt.client() as gone, mqtt.client() as leaving:
        await gone.connect(device, client_id="gone")
        await leaving.connect(device, client_id="leaving")
        roles = {key[2]: role for key, role in mqtt.server.devices.by_key.items()}
        assert all(role.ready for role in roles.values())
        with mock.patch.object(uplinks, "submit", return_value=late):
            await leaving.send_raw(burst(device.device_id, 1, QoS.AT_LEAST_ONCE, Version.V5))
            await leaving.goodbye()
            await until(lambda: roles["leaving"].peer.machine.leaving)
        with mock.patch.object(uplinks, "submit", full):
            await gone.send_raw(burst(device.device_id, BURST, QoS.AT_MOST_ONCE, Version.V5))
            await until(lambda: roles["gone"].publishing.waiting)
            roles["gone"].peer.abort()  # as when its network tells that it is gone; nobody reads from it now
            await until(lambda: roles["gone"].peer.transport is None)
            assert [(role.peer.alive, role.ready) for role in roles.values()] == [(True, False)] * 2
        late.set_result(StoredUplink(UplinkId(uuid4()), False))
        assert isinstance((await leaving.closed())[0], Ack)
        await until(lambda: not mqtt.server.peers)


@pytest.mark.parametrize("qos", [QoS.AT_MOST_ONCE, QoS.AT_LEAST_ONCE])
async def test_who_is_gone_has_said_all_that_was_received(mqtt: Running, qos: QoS) -> None:
    device = await mqtt.device()
    count = BURST if qos is QoS.AT_MOST_ONCE else WINDOW
    will = Will(f"devices/{device.device_id}/events", b'"lost"', QoS.AT_LEAST_ONCE)
    async with mqtt.client() as client:
        await client.connect(device, will=will)
        (peer,) = mqtt.server.peers
        everything = burst(device.device_id, count, qos, Version.V5) + encode(Disconnect(), Version.V5)
        peer.data_received(everything)  # in one read
        peer.abort()
        await until(lambda: not mqtt.server.peers)
    await until(lambda: mqtt.server.counters.stored == count)
    assert mqtt.server.counters.ended == {}
    await until(lambda: not mqtt.server.devices.leaving)
    await mqtt.server.broker.messaging.tick()
    assert {each["payload"] for each in await mqtt.uplinks(device.device_id)}.isdisjoint({"lost"})
