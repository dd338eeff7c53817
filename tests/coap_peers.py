"""Clients for the tests of CoAP: one that talks to a peer machine in virtual time, and a plain UDP transport.

A `Dialogue` reads as a transcript: what the client `sends`, what the handler is `asked` and `answers`, what the server
then `said`. The client's side is written and read with aiocoap's codec, which shares nothing with ours.

    CON 2.05 #1 token=07 observe=1 'payload'        #1, #2 …: the server's own message ids, in the order of their use
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any, cast

from aiocoap import Message
from aiocoap.numbers.codes import Code
from aiocoap.numbers.types import Type

from adapters.coap.endpoint import CoapEndpoint, EndpointPeer
from adapters.coap.exchanges import Event, RequestReceived
from adapters.coap.limits import CoapCounters, CoapLimits
from adapters.coap.memory import Memory
from adapters.coap.peer import PeerMachine
from adapters.coap.ports import Request, Response

CON, NON, ACK, RST = Type.CON, Type.NON, Type.ACK, Type.RST


def message(kind: Type, code: Code, message_id: int, token: bytes = b"", payload: bytes = b"", **options: Any) -> bytes:
    """A datagram by aiocoap's codec; `path="a/b"` stands for uri_path."""
    if (path := options.pop("path", None)) is not None:
        options["uri_path"] = tuple(path.split("/"))
    return bytes(Message(code=code, _mid=message_id, _mtype=kind, _token=token, payload=payload, **options).encode())


class Dialogue:
    """One client of one peer machine. `now` is virtual; `passes` lets it pass, timer by timer."""

    def __init__(
        self, limits: CoapLimits | None = None, memory: Memory | None = None, room: int = 1_280, known: bool = True
    ) -> None:
        self.limits = limits or CoapLimits()
        self.memory = memory or Memory(self.limits, CoapCounters())
        self.counters = self.memory.counters
        Dialogue._keys += 1
        self.machine = PeerMachine(Dialogue._keys, self.memory, Random(5), room, known)
        self.now = 1_000.0
        self.events: list[Event] = []
        self.datagrams: list[bytes] = []
        self._ids: list[int] = []
        self._exchange = 0

    _keys = 0

    # The client ---------------------------------------------------------------------------------------------------

    def sends(self, kind: Type, code: Code, message_id: int, token: bytes = b"", **more: Any) -> None:
        self.sends_bytes(message(kind, code, message_id, token, **more))

    def sends_bytes(self, datagram: bytes) -> None:
        self.machine.receive(datagram, self.now)
        self._collect()

    def acknowledges(self, number: int) -> None:
        """An empty ACK to the server's message #number."""
        self.sends(ACK, Code.EMPTY, self._ids[number - 1])

    def resets(self, number: int) -> None:
        self.sends(RST, Code.EMPTY, self._ids[number - 1])

    def said(self) -> list[str]:
        """What the server has sent since the last time."""
        said, self.datagrams = self.datagrams, []
        return [self._read(datagram) for datagram in said]

    def heard(self) -> list[Message]:
        """The same as messages."""
        heard, self.datagrams = self.datagrams, []
        return [Message.decode(datagram) for datagram in heard]

    # The handler --------------------------------------------------------------------------------------------------

    def asked(self) -> Request:
        """The one request that the handler has got."""
        event = self.event()
        assert isinstance(event, RequestReceived), event
        self._exchange = event.exchange
        self.offered = event.observation
        return event.request

    def event(self) -> Event:
        """The one event that there is."""
        assert len(self.events) == 1, self.events
        return self.events.pop()

    def answers(self, code: Code, payload: bytes = b"", exchange: int | None = None, **more: Any) -> None:
        number = self._exchange if exchange is None else exchange
        self.machine.respond(number, Response(code, payload, **more), self.now)
        self._collect()

    def notifies(self, number: int, code: Code, payload: bytes = b"", receipt: object = None, **more: Any) -> None:
        self.machine.notify(number, Response(code, payload, **more), self.now, receipt)
        self._collect()

    def observes(self, message_id: int, token: bytes, kind: Type = CON, **more: Any) -> int:
        """A registration for /obs, all of it; the observation's number."""
        self.sends(kind, Code.GET, message_id, token, path="obs", observe=0, **more)
        self.asked()
        assert self.offered is not None
        assert self.machine.accept(self.offered)
        self.answers(Code.CONTENT, b"state 0")
        return self.offered

    # Time ---------------------------------------------------------------------------------------------------------

    def passes(self, seconds: float) -> None:
        end = self.now + seconds
        while (due := self.machine.next_timer()) is not None and due <= end:
            self.now = max(self.now, due)
            self.machine.tick(self.now)
            self._collect()
        self.now = end
        self.memory.expire(end)

    def _collect(self) -> None:
        while (event := self.machine.next_event()) is not None:
            self.events.append(event)
        self.datagrams += self.machine.datagrams_to_send()

    def _read(self, datagram: bytes) -> str:
        read = Message.decode(datagram)
        if read.mtype in (CON, NON):
            if read.mid not in self._ids:
                self._ids.append(read.mid)
            name = f"#{self._ids.index(read.mid) + 1}"
        else:
            name = str(read.mid)
        parts = [str(read.mtype), read.code.dotted if read.code else "empty", name]
        if read.token:
            parts.append(f"token={read.token.hex()}")
        for option in ("observe", "content_format", "max_age", "size1", "size2"):
            if (value := getattr(read.opt, option)) is not None:
                parts.append(f"{option}={int(value)}")
        for option in ("block1", "block2"):
            if (block := getattr(read.opt, option)) is not None:
                parts.append(f"{option}={block.block_number}/{int(block.more)}/{block.size}")
        if read.payload:
            text = read.payload.decode("ascii", "replace")
            parts.append(repr(text) if len(text) <= 32 else f"{len(text)} bytes")
        return " ".join(parts)


class UdpAssociation:
    """A client of a plain UDP socket, known by its address."""

    room = 1_280

    def __init__(self, transport: asyncio.DatagramTransport, remote: tuple[Any, ...]) -> None:
        self._transport = transport
        self._remote = remote
        self.association_id = f"{remote[0]} {remote[1]}"
        self.address = str(remote[0])

    def send(self, datagram: bytes) -> None:
        self._transport.sendto(datagram, self._remote)


class UdpTransport(asyncio.DatagramProtocol):
    """CoAP without DTLS, which the product does not speak."""

    def __init__(self, endpoint: CoapEndpoint, opened: Callable[[EndpointPeer], None] | None = None) -> None:
        self.endpoint = endpoint
        self._opened = opened
        self._transport: asyncio.DatagramTransport | None = None
        self._associations: dict[tuple[Any, ...], UdpAssociation] = {}

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Bind; the port."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(host, port))
        return int(transport.get_extra_info("sockname")[1])

    def stop(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # asyncio's own is no subclass of it

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        association = self._associations.get(addr)
        if association is None:
            assert self._transport is not None
            association = self._associations[addr] = UdpAssociation(self._transport, addr)
            peer = self.endpoint.open(association)
            if self._opened is not None:
                self._opened(peer)
        self.endpoint.received(association, data)


class RawClient(asyncio.DatagramProtocol):
    """A client of a plain UDP port that says exactly what it is told to, by aiocoap's codec."""

    def __init__(self) -> None:
        self._received: asyncio.Queue[Message] = asyncio.Queue()
        self._transport: asyncio.DatagramTransport | None = None
        self._message_id = 0

    async def start(self, port: int, host: str = "127.0.0.1") -> None:
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, remote_addr=(host, port))

    def stop(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self._received.put_nowait(Message.decode(data))

    def sends(self, kind: Type, code: Code, token: bytes = b"", **more: Any) -> int:
        """Send a message; its id."""
        self._message_id += 1
        self.sends_bytes(message(kind, code, self._message_id, token, **more))
        return self._message_id

    def sends_bytes(self, datagram: bytes) -> None:
        assert self._transport is not None
        self._transport.sendto(datagram)

    def acknowledges(self, received: Message) -> None:
        self.sends_bytes(message(ACK, Code.EMPTY, received.mid))

    def resets(self, received: Message) -> None:
        self.sends_bytes(message(RST, Code.EMPTY, received.mid))

    async def hears(self) -> Message:
        """The next message, whatever it is."""
        return await asyncio.wait_for(self._received.get(), 20)

    async def asks(self, code: Code, token: bytes = b"\1", kind: Type = CON, **more: Any) -> Message:
        """A request and its prompt answer."""
        message_id = self.sends(kind, code, token, **more)
        answer = await self.hears()
        assert answer.token == token
        assert answer.mtype == (ACK if kind == CON else NON)
        assert kind == NON or answer.mid == message_id
        return answer

    async def hears_nothing(self) -> None:
        """Nothing was sent before the answer to a ping: on loopback datagrams keep their order."""
        message_id = self.sends(CON, Code.EMPTY)
        answer = await self.hears()
        assert (answer.mtype, answer.mid) == (RST, message_id), answer
