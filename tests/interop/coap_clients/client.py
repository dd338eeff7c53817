"""A CoAP client for tests: aiocoap's codec, own exchanges, any of the DTLS clients of dtls.py, one UDP socket each.

    request ─► CON, sent again until it is acknowledged or answered ─► the response, piggy-backed or separate
    observe ─► the first response, then notifications in a queue

    request, cut in blocks by the server ─► the next block is asked for until there is no more (RFC 7959 §2.4)

One exchange after another is RFC 7252 §4.7's NSTART of 1; a caller that wants several at once may have them, each has
its own token and message id. A CON of the server is acknowledged each time it comes, and handed on once (§4.2). It is
sent again after `ack_seconds` × 1…1.5, then after twice that and so on (§4.8); after `tries` there is a TimeoutError.
Chance is an argument.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import cbor2
from aiocoap.message import Message
from aiocoap.numbers.codes import Code
from aiocoap.numbers.contentformat import ContentFormat
from aiocoap.numbers.types import Type

from tests.interop.coap_clients.dtls import Dtls

TICK = 0.05
"""Seconds between looks at a handshake's timer."""


class Ended(ConnectionError):
    """The association is over; the argument says how."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One response or notification."""

    code: str
    payload: bytes
    content_format: int | None
    message: Message = field(repr=False)

    @property
    def value(self) -> Any:
        """The payload decoded."""
        return cbor2.loads(self.payload) if self.content_format == 60 else json.loads(self.payload)


@dataclass(slots=True)
class _Exchange:
    answer: asyncio.Future[Message]
    acknowledged: asyncio.Event
    notifications: asyncio.Queue[Answer | None] | None = None


class CoapClient(asyncio.DatagramProtocol):
    """One association. Make it with `connected`."""

    def __init__(self, dtls: Dtls, chance: Random, *, ack_seconds: float, tries: int) -> None:
        self.dtls = dtls
        self._chance = chance
        self._ack_seconds = ack_seconds
        self._tries = tries
        self._transport: asyncio.DatagramTransport | None = None
        self._mid = chance.randrange(0x10000)
        self._token = chance.randrange(0x10000)
        self._exchanges: dict[bytes, _Exchange] = {}
        self._mids: dict[int, _Exchange] = {}
        self._seen: dict[int, bytes] = {}
        self._changed = asyncio.Event()
        self._gone = asyncio.get_running_loop().create_future()
        self.sent = 0
        """CoAP messages, those sent again included."""
        self.repeated = 0
        """Of the server's messages, those that had come before."""

    # -- what callers do -----------------------------------------------------------------------------------------------

    async def handshake(self, seconds: float) -> None:
        """Raises Ended when it is refused, TimeoutError."""
        async with asyncio.timeout(seconds):
            while not self.dtls.established:
                self.dtls.tick()
                self._flush()
                if self.dtls.ended is not None:
                    raise Ended(self.dtls.ended)
                self._changed.clear()
                try:
                    async with asyncio.timeout(TICK):
                        await self._changed.wait()
                except TimeoutError:
                    pass

    async def request(
        self,
        method: Code,
        path: str,
        payload: bytes = b"",
        content_format: int | None = None,
        *,
        accept: int | None = None,
        query: tuple[str, ...] = (),
    ) -> Answer:
        """One confirmable request; the answer with all its blocks. Raises TimeoutError, Ended."""
        first = await self._answered(self._message(method, path, payload, content_format, accept, query))
        whole, block = first.payload, first.message.opt.block2
        while block is not None and block.more:
            following = self._message(method, path, b"", content_format, accept, query)
            following.opt.block2 = (block.block_number + 1, False, block.size_exponent)
            part = await self._answered(following)
            if part.code != first.code:
                return part
            whole, block = whole + part.payload, part.message.opt.block2
        return replace(first, payload=whole)

    async def post(self, path: str, value: Any, content_format: int = 50) -> Answer:
        """POST of a value in JSON (50) or CBOR (60)."""
        payload = cbor2.dumps(value) if content_format == 60 else json.dumps(value).encode()
        return await self.request(Code.POST, path, payload, content_format)

    @asynccontextmanager
    async def observed(self, path: str, accept: int | None = None) -> AsyncIterator[asyncio.Queue[Answer | None]]:
        """Observe a resource: the first answer and all notifications, None when the association is over."""
        message = self._message(Code.GET, path, b"", None, accept, ())
        message.opt.observe = 0
        queue: asyncio.Queue[Answer | None] = asyncio.Queue()
        exchange = _Exchange(asyncio.get_running_loop().create_future(), asyncio.Event(), queue)
        try:
            queue.put_nowait(await self._exchange(message, exchange))
            yield queue
        finally:
            self._exchanges.pop(message.token, None)

    async def until_ended(self, seconds: float) -> str:
        """Wait for the end of the association, and say how it came. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while self.dtls.ended is None:
                self._changed.clear()
                await self._changed.wait()
        return self.dtls.ended

    async def close(self) -> None:
        """Say close_notify and free the socket."""
        self.dtls.close()
        self._flush()
        if self._transport is not None:
            self._transport.close()
            await self._gone

    def call_out(self, path: str, value: Any) -> None:
        """One non-confirmable POST in JSON, whose fate is not asked for; also on an association that is over, where the
        library sends it all the same. Raises ConnectionError where it does not."""
        message = self._message(Code.POST, path, json.dumps(value).encode(), 50, None, ())
        message.mtype = Type.NON
        self.dtls.send(message.encode())
        self._flush()

    # -- exchanges -----------------------------------------------------------------------------------------------------

    def _message(
        self,
        method: Code,
        path: str,
        payload: bytes,
        content_format: int | None,
        accept: int | None,
        query: tuple[str, ...],
    ) -> Message:
        self._mid = (self._mid + 1) & 0xFFFF
        self._token = (self._token + 1) & 0xFFFFFFFF
        token = self._token.to_bytes(4, "big")
        message = Message(code=method, payload=payload, _mid=self._mid, _mtype=Type.CON, _token=token)
        message.opt.uri_path = tuple(part for part in path.split("/") if part)
        message.opt.uri_query = query
        if content_format is not None:
            message.opt.content_format = ContentFormat(content_format)
        if accept is not None:
            message.opt.accept = ContentFormat(accept)
        return message

    async def _answered(self, message: Message) -> Answer:
        exchange = _Exchange(asyncio.get_running_loop().create_future(), asyncio.Event())
        try:
            return await self._exchange(message, exchange)
        finally:
            self._exchanges.pop(message.token, None)

    async def _exchange(self, message: Message, exchange: _Exchange) -> Answer:
        raw = message.encode()
        self._exchanges[message.token] = exchange
        self._mids[message.mid] = exchange
        wait = self._ack_seconds * (1 + self._chance.random() / 2)
        try:
            for _ in range(self._tries):
                self._send(raw)
                done, _ = await asyncio.wait([exchange.answer], timeout=wait)
                if done:
                    return _answer(exchange.answer.result())
                if exchange.acknowledged.is_set():  # the answer comes in a message of its own (§5.2.2)
                    async with asyncio.timeout(self._ack_seconds * 2**self._tries):
                        return _answer(await exchange.answer)
                wait *= 2
            raise TimeoutError(f"no answer to {message.code} after {self._tries} tries")
        finally:
            self._mids.pop(message.mid, None)

    def _send(self, raw: bytes) -> None:
        if self.dtls.ended is not None:
            raise Ended(self.dtls.ended)
        self.dtls.send(raw)
        self.sent += 1
        self._flush()

    def _flush(self) -> None:
        for datagram in self.dtls.outgoing():
            if self._transport is not None and not self._transport.is_closing():
                self._transport.sendto(datagram)

    # -- what the server does ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's has the interface without the class

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone.set_result(None)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.dtls.feed(data)
        self._flush()
        for plaintext in self.dtls.received:
            self._take(Message.decode(plaintext))
        self.dtls.received.clear()
        if self.dtls.ended is not None:
            for exchange in self._exchanges.values():
                if not exchange.answer.done():
                    exchange.answer.set_exception(Ended(self.dtls.ended))
                if exchange.notifications is not None:
                    exchange.notifications.put_nowait(None)
        self._changed.set()

    def _take(self, message: Message) -> None:
        if message.code is Code.EMPTY:
            exchange = self._mids.get(message.mid)
            if exchange is not None and message.mtype is Type.ACK:
                exchange.acknowledged.set()
            elif exchange is not None and message.mtype is Type.RST and not exchange.answer.done():
                exchange.answer.set_exception(Ended("reset"))
            return
        exchange = self._exchanges.get(message.token)
        if message.mtype is Type.CON:
            known = exchange is not None or message.mid in self._seen
            self._send(Message(code=Code.EMPTY, _mid=message.mid, _mtype=Type.ACK if known else Type.RST).encode())
        if message.mtype is not Type.ACK:
            if message.mid in self._seen:
                self.repeated += 1
                return
            self._seen[message.mid] = message.token
        if exchange is None:
            return
        if not exchange.answer.done():
            exchange.answer.set_result(message)
        elif exchange.notifications is not None:
            exchange.notifications.put_nowait(_answer(message))


def _answer(message: Message) -> Answer:
    chosen = message.opt.content_format
    return Answer(message.code.dotted, message.payload, None if chosen is None else int(chosen), message)


@asynccontextmanager
async def connected(
    make: Callable[[], Dtls],
    port: int,
    chance: Random,
    *,
    seconds: float = 30.0,
    ack_seconds: float = 2.0,
    tries: int = 5,
    host: str = "127.0.0.1",
) -> AsyncIterator[CoapClient]:
    """A client whose handshake is done. Raises Ended when it is refused, TimeoutError after `seconds`."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_datagram_endpoint(
        lambda: CoapClient(make(), chance, ack_seconds=ack_seconds, tries=tries), remote_addr=(host, port)
    )
    try:
        await client.handshake(seconds)
        yield client
    finally:
        await client.close()
