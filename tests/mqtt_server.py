"""An MQTT server over a running core, and a client that speaks packets, for tests.

The client is the wire module's other side: it sends and expects packets as values, so that a test reads as the
conversation that it is. What independent clients make of the same server is in tests/interop.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.server import MqttServer
from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.wire import WireLimits, decode, encode
from adapters.mqtt.wire_framing import Framer
from adapters.mqtt.wire_packets import (
    Ack,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Publish,
    QoS,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Will,
)
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from adapters.provisioning import Endpoint, Provisioning
from adapters.tls.context import TlsContext
from registry.messaging import Messaging
from registry.messaging_limits import DEFAULT_LIMITS, MessagingLimits
from tests.http_api import Api
from tests.tls_peers import Holder, client_context, make_certificate

P = TypeVar("P", bound=Packet)

WAIT = 10.0
"""Seconds that a test waits for a packet; they come within milliseconds."""


class Gone(Exception):
    """The server closed the connection."""


@dataclass
class Running:
    """A server and what is below it."""

    api: Api
    server: MqttServer
    port: int
    holder: Holder

    def client(self, certificate: Path | None = None, version: Version = Version.V5) -> Client:
        """A client that is not connected yet."""
        return Client(self.port, client_context(self.holder, certificate=certificate), version)

    async def device(self, hardware_id: str = "HW-1", **more: Any) -> Device:
        """A device with an API key."""
        made = await self.api.registered(hardware_id, **more)
        return Device(made["device_id"], made["api_key"])

    async def uplinks(self, device_id: str) -> list[dict[str, Any]]:
        """What is stored of a device, newest first."""
        async with self.api.operator() as operator:
            answer = await operator.get(f"/api/v1/devices/{device_id}/uplinks")
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["uplinks"]
        return found


@dataclass(frozen=True)
class Device:
    """Who connects by key."""

    device_id: str
    api_key: str


@dataclass
class Client:
    """One connection. `async with` opens and drops it."""

    port: int
    context: ssl.SSLContext
    version: Version = Version.V5
    received: list[Packet] = field(default_factory=list)
    _framer: Framer = field(default_factory=lambda: Framer(1 << 20))
    _reader: asyncio.StreamReader | None = None
    _writer: asyncio.StreamWriter | None = None
    _next_id: int = 0

    async def __aenter__(self) -> Client:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop()

    def drop(self) -> None:
        """Vanish without a goodbye."""
        if self._writer is not None:
            self._writer.transport.abort()

    def reset(self) -> None:
        """Vanish so that the other side hears of it at once, and that nothing can be sent to us any more (RST)."""
        if self._writer is not None:
            raw = self._writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()

    async def send(self, packet: Packet) -> None:
        assert self._writer is not None
        self._writer.write(encode(packet, self.version))
        await self._writer.drain()

    async def send_raw(self, data: bytes) -> None:
        assert self._writer is not None
        self._writer.write(data)
        await self._writer.drain()

    async def packet(self) -> Packet:
        """The next packet from the server. Raises Gone."""
        assert self._reader is not None
        async with asyncio.timeout(WAIT):
            while (frame := self._framer.next()) is None:
                try:
                    data = await self._reader.read(65_536)
                except (ConnectionError, ssl.SSLError):
                    data = b""
                if not data:
                    raise Gone
                self._framer.feed(data)
        packet = decode(*frame, self.version, WireLimits())
        self.received.append(packet)
        return packet

    async def expect(self, kind: type[P]) -> P:
        """The next packet, of this type."""
        packet = await self.packet()
        assert isinstance(packet, kind), f"{packet} instead of {kind.__name__}"
        return packet

    async def closed(self) -> list[Packet]:
        """What still comes before the server closes the connection."""
        rest: list[Packet] = []
        while True:
            try:
                rest.append(await self.packet())
            except Gone:
                return rest

    async def connect(
        self,
        device: Device | None = None,
        *,
        client_id: str = "one",
        user_name: str | None = None,
        password: str | None = None,
        clean_start: bool = True,
        will: Will | None = None,
        keep_alive: int = 0,
        properties: Properties = NO_PROPERTIES,
    ) -> Connack:
        """CONNECT, and the answer."""
        if device is not None:
            user_name, password = device.device_id, device.api_key
        await self.send(
            Connect(
                self.version,
                client_id,
                clean_start,
                keep_alive,
                will,
                user_name,
                None if password is None else password.encode(),
                properties,
            )
        )
        return await self.expect(Connack)

    async def subscribe(self, *filters: str, qos: QoS = QoS.AT_LEAST_ONCE) -> tuple[ReasonCode, ...]:
        """SUBSCRIBE, and the reasons. What comes in between stays in `received`."""
        packet_id = self.new_id()
        await self.send(Subscribe(packet_id, tuple(SubscriptionRequest(each, qos) for each in filters)))
        while True:
            packet = await self.packet()
            if isinstance(packet, Suback):
                assert packet.packet_id == packet_id
                return packet.reasons

    async def publish(
        self,
        topic: str,
        payload: object,
        qos: QoS = QoS.AT_LEAST_ONCE,
        *,
        properties: Properties = NO_PROPERTIES,
        retain: bool = False,
    ) -> ReasonCode | None:
        """PUBLISH, and how it is acknowledged; QoS 2 to its end."""
        raw = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
        packet_id = 0 if qos is QoS.AT_MOST_ONCE else self.new_id()
        await self.send(Publish(topic, raw, qos, retain, False, packet_id, properties))
        if qos is QoS.AT_MOST_ONCE:
            return None
        kind = PacketType.PUBACK if qos is QoS.AT_LEAST_ONCE else PacketType.PUBREC
        answer = await self.acknowledged(kind, packet_id)
        if qos is QoS.EXACTLY_ONCE and not answer.failed:
            await self.send(Ack(PacketType.PUBREL, packet_id))
            await self.acknowledged(PacketType.PUBCOMP, packet_id)
        return answer

    async def acknowledged(self, kind: PacketType, packet_id: int) -> ReasonCode:
        """The acknowledgement of this kind; other packets before it stay in `received`."""
        while True:
            packet = await self.packet()
            if isinstance(packet, Ack) and packet.type is kind and packet.packet_id == packet_id:
                return packet.reason

    async def message(self) -> Publish:
        """The next message, acknowledged."""
        while True:
            packet = await self.packet()
            if isinstance(packet, Publish):
                if packet.qos is QoS.AT_LEAST_ONCE:
                    await self.send(Ack(PacketType.PUBACK, packet.packet_id))
                return packet

    async def goodbye(self) -> None:
        """DISCONNECT."""
        await self.send(Disconnect())

    def new_id(self) -> int:
        self._next_id = self._next_id % 0xFFFF + 1
        return self._next_id


@asynccontextmanager
async def serving_mqtt(
    api: Api,
    limits: ServerLimits | None = None,
    stored: MessagingLimits = DEFAULT_LIMITS,
    wall_clock: Callable[[], float] = time.time,
) -> AsyncIterator[Running]:
    """The server over a running core, until the block ends."""
    holder = make_certificate()
    context = TlsContext(holder.credentials(), alpn=(b"mqtt",), session_name=b"gatehouse test mqtt")
    provisioning = Provisioning(api.registry, Endpoint("localhost", 8883), Endpoint("localhost", 5684))
    messaging = Messaging(api.database, api.registry.node.node_id, clock=wall_clock, random=os.urandom, limits=stored)
    server = MqttServer(api.registry, messaging, provisioning, context, limits=limits, wall_clock=wall_clock)
    await messaging.start(server.broker)
    api.registry.feed.add_follower(messaging)
    following = asyncio.create_task(messaging.run())
    port = await server.start("127.0.0.1", 0)
    try:
        yield Running(api, server, port, holder)
    finally:
        await server.drain(2.0)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await messaging.stop()


@dataclass(frozen=True)
class OwnKey:
    """A key that a device made itself."""

    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls) -> OwnKey:
        return cls(ec.generate_private_key(ec.SECP256R1()))

    def csr(self) -> str:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "device")])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self.key, hashes.SHA256())
        return request.public_bytes(Encoding.PEM).decode()

    def with_certificate(self, folder: Path, certificate: str) -> Path:
        """A PEM file of both."""
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path = folder / f"{x509.load_pem_x509_certificate(certificate.encode()).serial_number:x}.pem"
        path.write_bytes(certificate.encode() + pem)
        return path
