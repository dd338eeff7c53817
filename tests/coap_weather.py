"""A bad network between clients and a server on this machine, and a CoAP client that is not ours to send through it.

    client's socket ──► BadPath ──► server's port          each direction of each client has a random generator of its
                    ◄──         ◄──                         own: the n-th datagram of a seed always has the same fate

A datagram larger than the path's MTU is lost every time, as where fragments are filtered. Others are lost, doubled and
held back by chance, one in twenty of them ten times as long; those are overtaken by later ones, and by themselves sent
again.

`CoapThroughDtls` is aiocoap's client (message layer, tokens, block-wise) on OpenSSL's DTLS, as dtls_peers.UdpClient
has it. Nothing of the server's code is in it. Its patience is RFC 7252's with shorter times and more repetitions, so
that not chance but only a defect ends an exchange: of ten datagrams one is lost either way, so one try in five fails;
nine do so once in three million exchanges. All of them fit into the 247 s for which a server must know a message again
(§4.8.2).
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiocoap
from aiocoap.interfaces import EndpointAddress
from aiocoap.numbers.codes import Code
from aiocoap.numbers.constants import TransportTuning
from aiocoap.transports.generic_udp import GenericMessageInterface
from OpenSSL import SSL

from tests.dtls_peers import UdpClient, Weather, udp_client


class BadPath:
    """A relay before one UDP port. `port` is where clients send to; the counts are over both directions."""

    def __init__(self, server: int, weather: Weather, seed: int) -> None:
        self.port = 0
        self.lost = self.doubled = self.oversized = self.overtaken = self.carried = 0
        self._server, self._weather, self._seed = server, weather, seed
        self._loop = asyncio.get_running_loop()
        self._front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._ways: dict[tuple[str, int], tuple[socket.socket, _Direction, _Direction]] = {}

    def open(self) -> None:
        self._front.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_194_304)
        self._front.bind(("127.0.0.1", 0))
        self._front.setblocking(False)
        self.port = self._front.getsockname()[1]
        self._loop.add_reader(self._front, self._from_clients)

    def close(self) -> None:
        for made in (self._front, *(way[0] for way in self._ways.values())):
            self._loop.remove_reader(made)
            made.close()
        self._ways.clear()

    def _from_clients(self) -> None:
        while True:
            try:
                datagram, client = self._front.recvfrom(65_536)
            except BlockingIOError:
                return
            behind, up, _ = self._ways.get(client) or self._way(client)
            up.carry(datagram, lambda each, behind=behind: _send(behind, each))

    def _way(self, client: tuple[str, int]) -> tuple[socket.socket, _Direction, _Direction]:
        behind = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        behind.connect(("127.0.0.1", self._server))
        behind.setblocking(False)
        number = len(self._ways)
        up, down = (_Direction(self, self._weather, f"{self._seed} {number} {name}") for name in ("up", "down"))
        self._ways[client] = behind, up, down
        self._loop.add_reader(behind, self._from_server, client)
        return self._ways[client]

    def _from_server(self, client: tuple[str, int]) -> None:
        behind, _, down = self._ways[client]
        while True:
            try:
                datagram = behind.recv(65_536)
            except (BlockingIOError, ConnectionRefusedError):
                return
            down.carry(datagram, lambda each: _send(self._front, each, client))


class _Direction:
    def __init__(self, path: BadPath, weather: Weather, seed: str) -> None:
        self._path, self._weather, self._random = path, weather, random.Random(seed)
        self._sent = self._newest = 0

    def carry(self, datagram: bytes, arrive: Any) -> None:
        path, weather, roll = self._path, self._weather, self._random.random
        fate, copies = roll(), 1 + (roll() < weather.duplication)
        delays = [roll() * (10 if roll() < 0.05 else 1) for _ in range(2)]
        if len(datagram) > weather.mtu:
            path.oversized += 1
            return
        if fate < weather.loss:
            path.lost += 1
            return
        path.doubled += copies - 1
        self._sent += 1
        for delay in delays[:copies]:
            path._loop.call_later(delay * weather.longest_delay, self._arrive, self._sent, datagram, arrive)

    def _arrive(self, number: int, datagram: bytes, arrive: Any) -> None:
        self._path.carried += 1
        self._path.overtaken += number < self._newest
        self._newest = max(self._newest, number)
        arrive(datagram)


def _send(sender: socket.socket, datagram: bytes, *to: Any) -> None:
    try:
        sender.sendto(datagram, *to) if to else sender.send(datagram)
    except OSError:
        pass  # closed, or nobody there any more: one more that is lost


@asynccontextmanager
async def bad_path(server: int, weather: Weather, seed: int) -> AsyncIterator[BadPath]:
    """A relay before `server`, until the block ends."""
    path = BadPath(server, weather, seed)
    path.open()
    try:
        yield path
    finally:
        path.close()


class Patience(TransportTuning):
    """See above."""

    ACK_TIMEOUT = 0.2
    MAX_RETRANSMIT = 8


class _Address(EndpointAddress):
    """The one peer of a client: what is on the other end of its association."""

    scheme = "coaps"
    hostinfo = hostinfo_local = "device.test"
    uri_base = uri_base_local = "coaps://device.test"
    is_multicast = is_multicast_locally = False
    maximum_block_size_exp = 6

    def __init__(self, client: UdpClient, exponent: int) -> None:
        self._client = client
        self.maximum_block_size_exp = exponent

    @property
    def blockwise_key(self) -> object:
        return self

    def send(self, datagram: bytes) -> None:
        self._client.out(self._client.client.send(datagram))


class _Interface(GenericMessageInterface):  # type: ignore[misc]
    """aiocoap's seam for datagrams."""

    def __init__(self, manager: Any, context: aiocoap.Context, address: _Address) -> None:
        super().__init__(manager, context.log, context.loop)
        self.address = address

    async def recognize_remote(self, remote: object) -> bool:
        return remote is self.address

    async def determine_remote(self, request: Any) -> _Address:
        return self.address

    async def shutdown(self) -> None:
        self._mman = None


class CoapThroughDtls:
    """aiocoap's client over one association. `exponent`: of the largest block that it sends and asks for."""

    def __init__(self, client: UdpClient, exponent: int) -> None:
        self.socket = client
        self._exponent = exponent
        self._address = _Address(client, exponent)
        self._context = aiocoap.Context()
        self._interface: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Shake hands; raises AssertionError when that fails."""
        await self.socket.handshake(60)

        async def interface(manager: Any) -> _Interface:
            self._interface = _Interface(manager, self._context, self._address)
            return self._interface

        await self._context._append_tokenmanaged_messagemanaged_transport(interface)
        self._reader = asyncio.create_task(self._read())

    async def stop(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await self._context.shutdown()

    async def ask(self, code: Code, path: str, payload: bytes = b"", **options: Any) -> aiocoap.Message:
        """One exchange, in as many blocks as it takes. Raises what aiocoap raises when nobody answers."""
        message = aiocoap.Message(code=code, payload=payload, transport_tuning=Patience(), **options)
        message.opt.uri_path = tuple(path.split("/"))
        if code == Code.GET and self._exponent < 6:
            message.opt.block2 = (0, False, self._exponent)  # early negotiation, RFC 7959 §2.4
        message.remote = self._address
        answer: aiocoap.Message = await self._context.request(message).response
        return answer

    async def _read(self) -> None:
        taken, client = 0, self.socket.client
        while True:
            self.socket.changed.clear()
            while taken < len(client.plain):
                self._interface._received_datagram(self._address, client.plain[taken])
                taken += 1
            await self.socket.changed.wait()


@asynccontextmanager
async def coap_through_dtls(
    port: int, context: SSL.Context, *, mtu: int = 1200, exponent: int = 6
) -> AsyncIterator[CoapThroughDtls]:
    """A client whose handshake is done, on a socket of its own."""
    async with udp_client(port, context, mtu=mtu) as made:
        client = CoapThroughDtls(made, exponent)
        try:
            await client.start()
            yield client
        finally:
            await client.stop()
