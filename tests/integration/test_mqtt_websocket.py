"""A device over WebSocket is a device over MQTT: the same credentials, sessions, answers and ends, in frames.

And what is WebSocket's own: the opening handshake beside other HTTP requests, hostile frames, closing, draining.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection

from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.websocket import WebSocket
from adapters.mqtt.wire import encode
from adapters.mqtt.wire_packets import Connack, Connect, Disconnect, Packet, Ping, Publish, QoS, Will
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from adapters.tls.admission import TlsLimits
from tests.http_api import BASE, Api, api
from tests.mqtt_server import Device, OwnKey
from tests.mqtt_websocket import Site, SocketClient, framed, opened, opening, response_head, serving_site
from tests.nodes import until
from tests.tls_peers import client_context

__all__ = ["api"]

VERSIONS = pytest.mark.parametrize("version", list(Version), ids=["3.1.1", "5.0"])
WILL = Will("devices/me/events", b'{"gone": true}', QoS.AT_LEAST_ONCE)


@pytest.fixture
async def site(api: Api) -> AsyncIterator[Site]:
    async with serving_site(api) as running:
        yield running


async def revoke(site: Site, device_id: str) -> dict[str, Any]:
    """Revoke the device's only credential; the receipt."""
    async with site.api.operator() as operator:
        listed = (await operator.get(f"{BASE}/devices/{device_id}/credentials")).json()["credentials"]
        answer = await operator.delete(f"{BASE}/devices/{device_id}/credentials/{listed[0]['credential_id']}")
    assert answer.status_code == 200, answer.text
    receipt: dict[str, Any] = answer.json()
    return receipt


async def payloads(site: Site, device: Device) -> list[Any]:
    return [each["payload"] for each in await site.uplinks(device.device_id)]


@VERSIONS
async def test_a_device_reports_and_is_revoked_while_connected(site: Site, version: Version) -> None:
    device = await site.device()
    async with site.client(version=version) as client:
        assert (await client.connect(device, will=WILL)).reason is ReasonCode.SUCCESS
        for qos in QoS:
            await client.publish("devices/me/telemetry", {"n": qos}, qos)
        await until(lambda: site.server.counters.stored == 3)
        assert {each["transport"] for each in await site.uplinks(device.device_id)} == {"mqtt"}
        assert [s.contact.transport.value for s in site.api.registry.sessions.all()] == ["mqtt"]

        receipt = await revoke(site, device.device_id)
        assert [s["transport"] for s in receipt["sessions"]] == ["mqtt"]
        assert receipt["remaining"] == 0
        rest = await client.closed()
        told = [p.reason for p in rest if isinstance(p, Disconnect)]
        assert told == ([ReasonCode.ADMINISTRATIVE_ACTION] if version is Version.V5 else [])
        assert client.frames.close_code == 1000

    async with site.client(version=version) as client:
        assert (await client.connect(device)).reason is ReasonCode.NOT_AUTHORIZED
    assert await payloads(site, device) == [{"n": n} for n in (2, 1, 0)]  # and no will


async def test_the_certificate_of_the_tls_connection_is_the_evidence(site: Site, tmp_path: Path) -> None:
    async with site.api.operator() as operator:
        token = (await operator.post(f"{BASE}/devices/registration/tokens", json={"name": "Pump"})).json()["token"]
    key = OwnKey.new()
    async with site.client() as client:
        assert (await client.connect(user_name="provision")).reason is ReasonCode.SUCCESS
        await client.subscribe("provision/response")
        await client.publish("provision/request", {"token": token, "csr": key.csr()}, QoS.AT_MOST_ONCE)
        answer = (await client.message()).payload
    made = msgspec.json.decode(answer)
    pem = key.with_certificate(tmp_path, made["certificate"])
    async with site.client(pem) as client:
        assert (await client.connect()).reason is ReasonCode.SUCCESS
        await client.publish("devices/me/telemetry", {"n": 1})
        await revoke(site, made["device_id"])
        assert any(isinstance(p, Disconnect) for p in await client.closed())
    async with site.client(pem) as client:
        assert (await client.connect()).reason is ReasonCode.NOT_AUTHORIZED
    async with site.client() as client:
        assert (await client.connect()).reason is ReasonCode.NOT_AUTHORIZED


async def test_packets_span_frames_and_frames_hold_packets(site: Site) -> None:
    device = await site.device()
    connect = Connect(Version.V5, "one", user_name=device.device_id, password=device.api_key.encode())
    publish = Publish("devices/me/telemetry", b'{"n": 1}', QoS.AT_LEAST_ONCE, packet_id=7)
    raw = encode(connect, Version.V5)
    async with site.client() as client:
        for at in range(len(raw)):
            await client.send_raw(raw[at : at + 1])
        assert (await client.expect(Connack)).reason is ReasonCode.SUCCESS
        await client.send_raw(encode(publish, Version.V5) + encode(Ping(PacketType.PINGREQ), Version.V5))
        kinds = {type(await client.packet()).__name__ for _ in range(2)}
        assert kinds == {"Ack", "Ping"}
    assert await payloads(site, device) == [{"n": 1}]


async def test_a_request_before_the_upgrade_is_answered_and_its_session_ends_with_http(site: Site) -> None:
    device = await site.device()
    body = b'{"n": 0}'
    post = (
        f"POST {BASE}/telemetry HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {device.api_key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    async with opened(site, post) as (client, head):
        assert head.startswith(b"HTTP/1.1 202 ")
        assert [s.contact.transport.value for s in site.api.registry.sessions.all()] == ["https"]
        reader = client.frames.reader
        assert await asyncio.wait_for(reader.readuntil(b"}"), 10)
        client.frames.write_raw(opening())
        assert (await response_head(reader)).startswith(b"HTTP/1.1 101 ")
        await client.connect(device)
        await client.publish("devices/me/telemetry", {"n": 1})
        assert [s.contact.transport.value for s in site.api.registry.sessions.all()] == ["mqtt"]
        assert (site.https.in_flight, site.https.connections, len(site.server.peers)) == (0, set(), 1)
        assert site.https.counters.upgraded == 1
    await until(lambda: not site.server.peers)


async def test_what_is_sent_ahead_of_the_answers_keeps_its_order(site: Site) -> None:
    device = await site.device()
    connect = Connect(Version.V5, "one", user_name=device.device_id, password=device.api_key.encode())
    get = f"GET {BASE}/ca/chain HTTP/1.1\r\nHost: a\r\n\r\n".encode()  # the application's, so it takes its turns
    ahead = framed(encode(connect, Version.V5))
    async with opened(site, get + get + opening() + ahead) as (client, head):
        assert head.startswith(b"HTTP/1.1 200 ")
        between = await asyncio.wait_for(client.frames.reader.readuntil(b"sec-websocket-protocol: mqtt\r\n\r\n"), 10)
        assert between.count(b"HTTP/1.1 200 ") == 1
        assert between.count(b"HTTP/1.1 101 ") == 1
        assert (await client.expect(Connack)).reason is ReasonCode.SUCCESS


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        (b"GET /mqtt HTTP/1.1\r\nHost: a\r\n\r\n", 426, b"upgrade: websocket\r\n"),
        (opening().replace(b"websocket\r\n", b"h2c\r\n", 1), 426, b"upgrade: websocket\r\n"),
        (opening().replace(b"Version: 13", b"Version: 8"), 426, b"sec-websocket-version: 13\r\n"),
        (opening().replace(b"Protocol: mqtt", b"Protocol: mqttv3.1"), 400, b""),
        (opening("Origin: https://evil.example"), 403, b""),
        (opening().replace(b"GET", b"POST"), 405, b"allow: GET\r\n"),
        (opening("Content-Length: 5") + b"hello", 400, b""),
    ],
)
async def test_a_handshake_that_is_not_right_is_answered_and_closed(
    site: Site, request_: bytes, status: int, says: bytes
) -> None:
    async with opened(site, request_) as (client, head):
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert b"connection: close\r\n" in head
        assert says in head
        assert b'"correlation_id"' in await asyncio.wait_for(client.frames.reader.read(), 10)
        assert not site.server.peers
        await until(lambda: not site.https.connections)


async def test_pages_of_this_host_and_of_configured_origins_come_in(api: Api) -> None:
    async with serving_site(api, origins=frozenset({"https://console.example"})) as site:
        for origin in ("https://localhost:8443", "https://console.example"):
            async with opened(site, opening(f"Origin: {origin}")) as (_, head):
                assert head.startswith(b"HTTP/1.1 101 "), origin
        async with opened(site, opening("Origin: https://console.example.evil")) as (_, head):
            assert head.startswith(b"HTTP/1.1 403 ")


HOSTILE = [
    (b"\x81\x85\0\0\0\0hello", 1003),
    (b"\x82\x05hello", 1002),
    (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 1002),
    (b"\xff" * 100, 1002),
    (b"\x89\x80\0\0\0\0" * 500, 1008),
    (b"\x02\x80\0\0\0\0" + b"\x00\x80\0\0\0\0" * 500, 1008),
    (b"\x02\x81\0\0\0\0x" + b"\x00\x81\0\0\0\0x" * 5_000, 1008),
]


@pytest.mark.parametrize(("raw", "code"), HOSTILE)
async def test_hostile_frames_end_their_connection_as_any_loss(site: Site, raw: bytes, code: int) -> None:
    device, other = await site.device(), await site.device("HW-2")
    async with site.client() as client, site.client() as witness:
        await witness.connect(other)
        await client.connect(device, will=WILL)
        if len(raw) > 30_000:  # endless fragments, which MQTT must not take for the end of its packet
            await client.send_raw(b"\x30\xff\xff\x03")
        client.frames.write_raw(raw)
        await client.closed()
        assert client.frames.close_code == code
        await until(lambda: len(site.server.peers) == 1)
        assert await witness.publish("devices/me/telemetry", {"n": 1}) is ReasonCode.SUCCESS
        assert site.server.counters.violations == 1
    await until(lambda: not site.server.peers)
    async with asyncio.timeout(10):
        while await payloads(site, device) != [{"gone": True}]:
            await asyncio.sleep(0.01)


async def test_strays_are_dropped_whatever_they_send_below_mqtt(api: Api) -> None:
    limits = ServerLimits(machine=MqttLimits(connect_timeout=0.5))
    async with serving_site(api, limits=limits) as site, site.client() as client:
        async with asyncio.timeout(10):
            while site.server.peers:
                try:
                    client.frames.ping(b"still here")
                    await client.frames.drain()
                except ConnectionError:
                    break
                await asyncio.sleep(0.05)
        await until(lambda: not site.server.peers)
        assert site.server.counters.timed_out == 1


async def test_pings_are_answered_and_a_clients_close_is_a_lost_connection(site: Site) -> None:
    device = await site.device()
    async with site.client() as client:
        await client.connect(device, will=WILL)
        client.frames.ping(b"hello")
        await client.send(Ping(PacketType.PINGREQ))
        await client.expect(Ping)
        assert client.frames.pongs == [b"hello"]
        client.frames.close(1001)
        assert await client.closed() == []
        assert client.frames.close_code == 1001
    await until(lambda: not site.api.registry.sessions.all())
    async with site.client() as client:
        await client.connect(device, will=WILL)
        await client.goodbye()
        assert await client.closed() == []
        assert client.frames.close_code == 1000
    await until(lambda: not site.server.peers and not site.server.devices.leaving)
    await site.server.broker.messaging.tick()
    assert await payloads(site, device) == [{"gone": True}]
    assert site.server.counters.violations == 0


@pytest.mark.parametrize("count", [0, 3, 600])
@pytest.mark.parametrize("whole", [True, False])
async def test_all_that_came_before_a_close_frame_is_heard(site: Site, count: int, whole: bool) -> None:
    """What a client sends that publishes and ends at once: in one read, and more than a turn takes."""
    device = await site.device()
    key = device.api_key.encode()
    async with site.client() as client:
        connect = Connect(Version.V5, "one", user_name=device.device_id, password=key, will=WILL)
        packets: list[Packet] = [
            Publish(f"devices/{device.device_id}/events", b"%d" % n, QoS.AT_MOST_ONCE) for n in range(count)
        ]
        if not whole:
            await client.send(connect)
            await client.expect(Connack)
            packets = [*packets, Disconnect()]
        else:
            packets = [connect, *packets, Disconnect()]
        end = Connection(ConnectionType.CLIENT).send(CloseConnection(1000))
        client.frames.write_raw(framed(b"".join(encode(each, Version.V5) for each in packets)) + end)
        await client.closed()
        assert client.frames.close_code == 1000
    await until(lambda: not site.server.peers and not site.server.devices.leaving)
    await until(lambda: site.server.counters.stored == count)
    await site.server.broker.messaging.tick()
    assert {"gone": True} not in await payloads(site, device)


async def test_a_client_that_never_reads_is_held_back_and_cut_and_its_pongs_do_not_pile_up(api: Api) -> None:
    limits = ServerLimits(machine=MqttLimits(write_stall=1.0, packet_bytes=1_048_576, write_bytes=262_144))
    tls = TlsLimits(write_high_water=65_536, write_low_water=16_384, linger=0.5)
    async with serving_site(api, limits=limits, tls_limits=tls) as site:
        device = await site.device(profile_id=await granting(site))
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        plain.setblocking(False)
        await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", site.port))
        reader, writer = await asyncio.open_connection(
            sock=plain, ssl=client_context(site.holder), server_hostname="localhost", limit=1_024
        )
        writer.write(opening())
        await reader.readuntil(b"\r\n\r\n")
        client = SocketClient(site.port, client_context(site.holder))
        client.over(reader, writer)
        await client.connect(device)
        await client.subscribe("site/#")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        peer = next(iter(site.server.peers))
        assert isinstance(peer.transport, WebSocket)
        tls_transport = peer.transport._tls
        assert tls_transport is not None
        async with site.client() as sender:
            await sender.connect(device, client_id="two")
            while not peer.machine.closed and peer.machine._stalled_since is None:
                await sender.publish("site/x", bytes(200_000), QoS.AT_MOST_ONCE)
                await sender.publish("devices/me/telemetry", {"n": 1})  # in step with the server
            size = tls_transport.get_write_buffer_size()
            for _ in range(1_000):
                peer.transport.data_received(b"\x89\xfd\0\0\0\0" + bytes(125))  # a ping, as from the network
            assert not peer.machine.closed
            assert tls_transport.get_write_buffer_size() <= size
            await until(lambda: len(site.server.peers) == 1)
            assert await sender.publish("devices/me/telemetry", {"n": 2}) is ReasonCode.SUCCESS
        assert site.server.counters.timed_out == 1
        writer.transport.abort()


async def granting(site: Site) -> str:
    async with site.api.operator() as operator:
        grants = [{"filter": "site/#", "allow": ["publish", "subscribe"]}]
        body = {"name": "Site", "profile_id": "p_site", "topic_grants": grants}
        assert (await operator.post(f"{BASE}/profiles", json=body)).status_code == 201
    return "p_site"


@VERSIONS
async def test_https_drains_without_waiting_and_mqtt_says_goodbye(site: Site, version: Version) -> None:
    device = await site.device()
    async with site.client(version=version) as client:
        await client.connect(device, will=WILL)
        await site.https.drain(5.0)
        assert await client.publish("devices/me/telemetry", {"n": 1}) in (ReasonCode.SUCCESS, None)
        await site.server.drain(5.0)
        rest = await client.closed()
        told = [p.reason for p in rest if isinstance(p, Disconnect)]
        assert told == ([ReasonCode.SERVER_SHUTTING_DOWN] if version is Version.V5 else [])
        assert client.frames.close_code == 1001
    async with asyncio.timeout(10):  # it has not said goodbye itself: its will is due [MQTT-3.1.2-8]
        while await payloads(site, device) != [{"gone": True}, {"n": 1}]:
            await asyncio.sleep(0.01)


async def test_a_drain_of_https_that_runs_out_of_time_cuts_no_websocket(site: Site) -> None:
    device = await site.device()
    post = f"POST {BASE}/devices HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
    async with site.client() as client:
        await client.connect(device)
        _, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=client.context)
        writer.write(post.encode() + b"{")  # and nothing more, nor will it close
        await until(lambda: site.https.counters.requests == 2)
        await site.https.drain(0.0)
        assert not site.https.connections
        assert await client.publish("devices/me/telemetry", {"n": 1}) is ReasonCode.SUCCESS
        writer.transport.abort()


async def test_the_store_that_is_slow_stops_the_reading_of_the_socket(api: Api) -> None:
    limits = ServerLimits(machine=MqttLimits(unanswered_messages=4))
    async with serving_site(api, limits=limits) as site:
        device = await site.device()
        async with site.client() as client:
            await client.connect(device)
            peer = next(iter(site.server.peers))
            assert isinstance(peer.transport, WebSocket)
            tls_transport = peer.transport._tls
            assert tls_transport is not None
            async with api.database.transaction() as connection:
                await connection.execute("LOCK TABLE uplink IN ACCESS EXCLUSIVE MODE")
                for n in range(40):
                    await client.send(
                        Publish("devices/me/telemetry", b'{"n": %d}' % n, QoS.AT_LEAST_ONCE, packet_id=n + 1)
                    )
                await until(lambda: not tls_transport.is_reading())
                assert not tls_transport.is_closing()
            for _ in range(40):
                await client.packet()
            assert tls_transport.is_reading()
        assert len(await payloads(site, device)) == 40
