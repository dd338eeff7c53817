"""MQTT clients that keep their word over lost connections, and a count of what their server promised.

A client's session outlives its connections, as 5.0 §4.1 and §4.4 ask of it: what it published and has no answer for is
sent again with DUP under the same packet id, a PUBREC that it has seen is followed by PUBREL for ever, and a receiver
of QoS 2 hands a message on once for each packet id that is not released (method A of 5.0 §4.3.3).

    Publisher   PUBLISHED ──PUBACK──► done                       a mark is in `acknowledged` from PUBACK or PUBREC on
                PUBLISHED ──PUBREC──► RELEASED ──PUBCOMP──► done     a failed one: tried again as a new message
    Receiver    PUBLISH ─► got[mark] + 1, PUBREC ─► PUBREL ─► PUBCOMP

Packet ids are the lowest free ones, so that every id is used again and again: a server that forgets an id too late, or
too early, shows it. Marks are `name-number-qN`; where the topic is one of the device's own, the mark is in the payload
as JSON. What can race: nothing within a client, it reads and writes in one task. Pauses between tries only keep two
cores free for the server; nothing is concluded from them.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.wire import WireLimits, decode, encode
from adapters.mqtt.wire_framing import Framer
from adapters.mqtt.wire_packets import (
    Ack,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Ping,
    Publish,
    QoS,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Will,
)
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version

CONNECTION_FAULTS = (OSError, EOFError, TimeoutError)
"""What a connection to a server that dies raises; `ssl.SSLError` and `Gone` are among them."""
AGAIN_SECONDS = 0.05
CONNECT_SECONDS = 30.0
KEPT_SECONDS = 3_600
_READ = 65_536


class Gone(EOFError):
    """The server closed the connection, or refused it."""


@dataclass(frozen=True)
class Account:
    """Who connects, and where."""

    port: int
    context: ssl.SSLContext
    device_id: str
    api_key: str


class Wire:
    """One connection that speaks packets."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, version: Version) -> None:
        self.reader = reader
        self.writer = writer
        self.version = version
        self._framer = Framer(1 << 24)

    @classmethod
    async def open(cls, account: Account, version: Version, address: str = "127.0.0.1") -> Wire:
        """A TLS connection from this loopback address. Raises OSError, TimeoutError."""
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", account.port, ssl=account.context, server_hostname="localhost", local_addr=(address, 0)
            )
        return cls(reader, writer, version)

    async def connect(
        self,
        account: Account,
        client_id: str,
        *,
        clean_start: bool = False,
        properties: Properties = NO_PROPERTIES,
        will: Will | None = None,
        keep_alive: int = 0,
    ) -> Connack:
        """CONNECT and its answer, whatever it is. Raises Gone, OSError, TimeoutError."""
        packet = Connect(
            self.version,
            client_id,
            clean_start,
            keep_alive,
            will,
            account.device_id,
            account.api_key.encode(),
            properties,
        )
        self.send(packet)
        async with asyncio.timeout(CONNECT_SECONDS):
            answer = await self.packet()
        assert isinstance(answer, Connack), answer
        return answer

    def send(self, *packets: Packet) -> None:
        """Write packets; `drain` waits for the network."""
        self.writer.write(b"".join(encode(packet, self.version) for packet in packets))

    async def drain(self) -> None:
        await self.writer.drain()

    def waiting(self) -> Packet | None:
        """A packet that has arrived already, or None."""
        frame = self._framer.next()
        return None if frame is None else decode(*frame, self.version, WireLimits())

    async def packet(self) -> Packet:
        """The next packet. Raises Gone, OSError."""
        while (packet := self.waiting()) is None:
            data = await self.reader.read(_READ)
            if not data:
                raise Gone
            self._framer.feed(data)
        return packet

    async def ping(self) -> list[Packet]:
        """PINGREQ; what came before its answer. Everything that the server had sent by then is among it."""
        self.send(Ping(PacketType.PINGREQ))
        before: list[Packet] = []
        while not isinstance(packet := await self.packet(), Ping):
            before.append(packet)
        return before

    def drop(self) -> None:
        """Vanish without a goodbye."""
        self.writer.transport.abort()


@dataclass
class _Sent:
    mark: str
    qos: QoS
    released: bool = False


@dataclass
class Persistent:
    """What both kinds of clients do: connect again for ever, and expect their session to be there."""

    account: Account
    name: str
    version: Version
    connects: int = 0
    sessions_lost: int = 0
    """Connections after the first one that found no session: the server broke its word."""
    refusals: Counter[str] = field(default_factory=Counter)
    stopping: bool = False
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    wire: Wire | None = None

    async def run(self) -> None:
        """Until `stopping`, and everything begun is finished."""
        while not self.finished.is_set():
            try:
                await self._once()
            except CONNECTION_FAULTS:
                pass
            finally:
                if self.wire is not None:
                    self.wire.drop()
                    self.wire = None
            if not self.finished.is_set():
                await asyncio.sleep(AGAIN_SECONDS)

    async def _once(self) -> None:
        wire = self.wire = await Wire.open(self.account, self.version)
        kept = NO_PROPERTIES
        if self.version is Version.V5:
            kept = Properties(session_expiry_interval=KEPT_SECONDS)
        answer = await wire.connect(self.account, self.name, properties=kept)
        if answer.reason.failed:
            self.refusals[answer.reason.name] += 1
            raise Gone
        self.connects += 1
        if self.connects > 1 and not answer.session_present:
            self.sessions_lost += 1
        await self.converse(wire)

    async def converse(self, wire: Wire) -> None:
        raise NotImplementedError


@dataclass
class Publisher(Persistent):
    """Publishes for ever, QoS 1 and 2 by turns, with `window` messages under way."""

    topic: str = ""
    window: int = 4
    wrapped: bool = False
    """Whether the payload is JSON around the mark, as an uplink is."""
    acknowledged: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    strays: list[str] = field(default_factory=list)
    _sent: dict[int, _Sent] = field(default_factory=dict)
    _again: deque[tuple[str, QoS]] = field(default_factory=deque)
    _number: int = 0

    async def converse(self, wire: Wire) -> None:
        for packet_id, sent in self._sent.items():
            wire.send(Ack(PacketType.PUBREL, packet_id) if sent.released else self._publish(packet_id, sent, dup=True))
        while True:
            self._fill(wire)
            if self.stopping and not self._sent and not self._again:
                wire.send(Disconnect())
                await wire.drain()
                self.finished.set()
                return
            await wire.drain()
            packet = await wire.packet()
            while packet is not None:
                self._take(packet, wire)
                packet = wire.waiting()

    def _fill(self, wire: Wire) -> None:
        while len(self._sent) < self.window and (self._again or not self.stopping):
            if self._again:
                mark, qos = self._again.popleft()
            else:
                self._number += 1
                qos = QoS.EXACTLY_ONCE if self._number % 2 else QoS.AT_LEAST_ONCE
                mark = f"{self.name}-{self._number}-q{qos:d}"
            packet_id = next(n for n in range(1, self.window + 1) if n not in self._sent)
            sent = self._sent[packet_id] = _Sent(mark, qos)
            wire.send(self._publish(packet_id, sent, dup=False))

    def _publish(self, packet_id: int, sent: _Sent, *, dup: bool) -> Publish:
        payload = json.dumps({"mark": sent.mark}).encode() if self.wrapped else sent.mark.encode()
        return Publish(self.topic, payload, sent.qos, False, dup, packet_id)

    def _take(self, packet: Packet, wire: Wire) -> None:
        match packet:
            case Ack(type=PacketType.PUBACK, packet_id=packet_id, reason=reason):
                sent = self._sent.pop(packet_id)
                self._answered(sent, reason)
            case Ack(type=PacketType.PUBREC, packet_id=packet_id, reason=reason):
                sent = self._sent[packet_id]
                if reason.failed:
                    del self._sent[packet_id]
                    self._answered(sent, reason)
                    return
                if not sent.released:
                    sent.released = True
                    self._answered(sent, reason)
                wire.send(Ack(PacketType.PUBREL, packet_id))
            case Ack(type=PacketType.PUBCOMP, packet_id=packet_id):
                del self._sent[packet_id]
            case Disconnect(reason=reason):
                self.refusals[reason.name] += 1
                raise Gone
            case _:
                self.strays.append(repr(packet))

    def _answered(self, sent: _Sent, reason: ReasonCode) -> None:
        if reason.failed:
            self.refused[reason.name] += 1
            self._again.append((sent.mark, sent.qos))
        else:
            self.acknowledged.append(sent.mark)


@dataclass
class Receiver(Persistent):
    """Subscribes once with QoS 2 and counts what comes; `away_after` makes it leave without a goodbye so often."""

    filter: str = ""
    away_after: int | None = None
    """Messages after which it drops its connection, so that the others meet its queue."""
    got: Counter[str] = field(default_factory=Counter)
    subscribed: asyncio.Event = field(default_factory=asyncio.Event)
    _open: set[int] = field(default_factory=set)
    """Packet ids of QoS 2 that were handed on and are not released."""

    async def converse(self, wire: Wire) -> None:
        if not self.subscribed.is_set():
            wire.send(Subscribe(1, (SubscriptionRequest(self.filter, QoS.EXACTLY_ONCE),)))
        seen = 0
        while not self.stopping and seen != self.away_after:
            packet: Packet | None = await wire.packet()
            while packet is not None:
                seen += self._take(packet, wire)
                if seen == self.away_after:
                    return
                packet = wire.waiting()
            await wire.drain()
        self.finished.set()

    def _take(self, packet: Packet, wire: Wire) -> bool:
        match packet:
            case Publish(qos=QoS.EXACTLY_ONCE, packet_id=packet_id, payload=payload):
                if packet_id not in self._open:
                    self._open.add(packet_id)
                    self.got[payload.decode()] += 1
                wire.send(Ack(PacketType.PUBREC, packet_id))
                return True
            case Publish(packet_id=packet_id, payload=payload):
                self.got[payload.decode()] += 1
                wire.send(Ack(PacketType.PUBACK, packet_id))
                return True
            case Ack(type=PacketType.PUBREL, packet_id=packet_id):
                self._open.discard(packet_id)
                wire.send(Ack(PacketType.PUBCOMP, packet_id))
            case Suback(reasons=reasons):
                assert reasons == (ReasonCode.GRANTED_QOS_2,), reasons
                self.subscribed.set()
            case Disconnect(reason=reason):
                self.refusals[reason.name] += 1
                raise Gone
            case _:
                raise AssertionError(packet)
        return False


def of_qos(marks: Iterable[str], qos: QoS) -> list[str]:
    """Those of these marks that were published with this QoS."""
    return [mark for mark in marks if mark.endswith(f"-q{qos:d}")]
