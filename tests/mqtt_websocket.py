"""MQTT over WebSocket for tests: the HTTPS server in front of an MQTT one, and a client that speaks packets in frames.

`SocketClient` is tests/mqtt_server.py's client with a WebSocket below it, so that a test reads the same on both ports.
Its frames are wsproto's, as the server's; what independent clients make of them is in tests/interop.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage

from adapters.http.limits import HttpLimits
from adapters.http.server import HttpsServer
from adapters.http.upgrade import WebSocketRoute
from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.websocket import SUBPROTOCOL, WebSockets
from adapters.mqtt.websocket_frames import WebSocketLimits
from adapters.mqtt.wire_reasons import Version
from adapters.tls.admission import TlsLimits
from adapters.tls.context import TlsContext
from tests.http_api import Api
from tests.mqtt_server import WAIT, Client, Running, serving_mqtt
from tests.tls_peers import client_context


@dataclass
class Site(Running):
    """Both servers; `port` is HTTPS's."""

    https: HttpsServer

    def client(self, certificate: Path | None = None, version: Version = Version.V5) -> SocketClient:
        """A client that is not connected yet."""
        return SocketClient(self.port, client_context(self.holder, certificate=certificate), version)


def opening(*lines: str, host: str = "localhost:8443") -> bytes:
    """The opening handshake's request, RFC 6455 §4.1; `lines` are further header lines."""
    head = [
        "GET /mqtt HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: keep-alive, Upgrade",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Protocol: mqtt",
        *lines,
    ]
    return ("\r\n".join(head) + "\r\n\r\n").encode()


def framed(data: bytes) -> bytes:
    """A client's binary message."""
    return Connection(ConnectionType.CLIENT).send(BytesMessage(data))


class FrameStream:
    """Reader and writer of a WebSocket's payloads, in the place of asyncio's, which are below it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._frames = Connection(ConnectionType.CLIENT)
        self.close_code: int | None = None
        """What the server's close frame said."""
        self.pongs: list[bytes] = []

    @property
    def transport(self) -> asyncio.WriteTransport:
        return self.writer.transport

    def write(self, data: bytes) -> None:
        self.writer.write(framed(data))

    def write_raw(self, data: bytes) -> None:
        self.writer.write(data)

    def ping(self, payload: bytes) -> None:
        self.writer.write(self._frames.send(Ping(payload)))

    def text(self, payload: str) -> None:
        self.writer.write(self._frames.send(TextMessage(payload)))

    def close(self, code: int) -> None:
        self.writer.write(self._frames.send(CloseConnection(code)))

    async def drain(self) -> None:
        await self.writer.drain()

    async def read(self, most: int) -> bytes:
        """Payload bytes; empty at the end of the connection."""
        while True:
            data = await self.reader.read(most)
            if not data:
                return b""
            self._frames.receive_data(data)
            payload = b""
            for event in self._frames.events():
                match event:
                    case BytesMessage():
                        payload += event.data
                    case Pong():
                        self.pongs.append(bytes(event.payload))
                    case CloseConnection():
                        self.close_code = event.code
                    case _:
                        raise AssertionError(f"the server sent {event}")
            if payload:
                return payload


@dataclass
class SocketClient(Client):
    """One connection over WebSocket."""

    async def __aenter__(self) -> SocketClient:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context)
        writer.write(opening())
        head = await response_head(reader)
        assert head.startswith(b"HTTP/1.1 101 "), head
        self.over(reader, writer)
        return self

    def over(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Go on with a connection whose handshake is done."""
        stream = FrameStream(reader, writer)
        self._reader, self._writer = cast(asyncio.StreamReader, stream), cast(asyncio.StreamWriter, stream)

    @property
    def frames(self) -> FrameStream:
        return cast(FrameStream, self._reader)


async def response_head(reader: asyncio.StreamReader) -> bytes:
    """A response up to its empty line."""
    async with asyncio.timeout(WAIT):
        return await reader.readuntil(b"\r\n\r\n")


@asynccontextmanager
async def opened(site: Site, request: bytes) -> AsyncIterator[tuple[SocketClient, bytes]]:
    """A connection on which `request` was sent, and the head of the answer."""
    client = site.client()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=client.context)
    try:
        writer.write(request)
        head = await response_head(reader)
        client.over(reader, writer)
        yield client, head
    finally:
        writer.transport.abort()


@asynccontextmanager
async def serving_site(
    api: Api,
    *,
    limits: ServerLimits | None = None,
    frames: WebSocketLimits | None = None,
    http_limits: HttpLimits | None = None,
    tls_limits: TlsLimits | None = None,
    origins: frozenset[str] = frozenset(),
) -> AsyncIterator[Site]:
    """HTTPS with MQTT at /mqtt over a running core, until the block ends; they stop in the product's order."""
    async with serving_mqtt(api, limits) as mqtt:
        context = TlsContext(mqtt.holder.credentials(), alpn=(b"http/1.1",), session_name=b"gatehouse test https")
        route = WebSocketRoute(SUBPROTOCOL, WebSockets(mqtt.server, frames).take, origins)
        https = HttpsServer(
            api.http.asgi,
            context,
            limits=http_limits,
            tls_limits=tls_limits,
            hot=api.http.hot,
            upgrades={"/mqtt": route},
        )
        port = await https.start("127.0.0.1", 0)
        try:
            yield Site(api, mqtt.server, port, mqtt.holder, https)
        finally:
            await https.drain(1.0)
