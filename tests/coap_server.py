"""A CoAP server over a running core, and a client that asks, for tests.

The client is OpenSSL's DTLS on a socket of this machine (tests/dtls_peers.py) and aiocoap's codec; the few rules of
RFC 7252, 7641 and 7959 between the two are here. What independent clients make of the same server is in tests/interop.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import cbor2
import msgspec
from aiocoap import Message
from aiocoap.numbers.codes import Code
from aiocoap.numbers.types import Type
from OpenSSL import SSL

from adapters.coap.limits import CoapLimits
from adapters.coap.server import CoapServer
from adapters.coap.server_limits import ServerLimits
from adapters.dtls.admission import DtlsLimits
from adapters.dtls.context import DtlsContext
from adapters.provisioning import Endpoint, Provisioning
from registry.secrets import Secret
from registry.templates import claim_psk
from tests.dtls_peers import UdpClient, certificate_client_context, psk_client_context, udp_client
from tests.http_api import BASE, Api
from tests.tls_peers import Holder, make_certificate

JSON, CBOR = 50, 60
WAIT = 20.0
"""Seconds that a test waits for a message; they come within milliseconds."""
AGAIN = 2.0
"""Seconds after which a request is repeated (RFC 7252 §4.8)."""


class Gone(Exception):
    """The server closed the association."""


@dataclass
class Answer:
    """A response."""

    code: Code
    payload: bytes
    content_format: int | None
    max_age: int | None
    etag: bytes | None
    observe: int | None
    size1: int | None

    @property
    def value(self) -> Any:
        """The payload, read as its format says."""
        if self.content_format == CBOR:
            return cbor2.loads(self.payload)
        return msgspec.json.decode(self.payload)


@dataclass
class CoapDevice:
    """Who connects by PSK."""

    device_id: str
    credential_id: str
    identity: str
    key: bytes

    def context(self, **more: Any) -> SSL.Context:
        return psk_client_context(self.identity.encode(), self.key, **more)


@dataclass
class Running:
    """A server and what is below it."""

    api: Api
    server: CoapServer
    port: int
    holder: Holder

    async def device(self, hardware_id: str = "HW-1", **more: Any) -> CoapDevice:
        """A device with a PSK."""
        made = await self.api.registered(hardware_id, credential_type="psk", **more)
        psk = made["psk"]
        return CoapDevice(made["device_id"], made["credential_id"], psk["identity"], key_bytes(psk["key"]))

    async def template(self, **more: Any) -> tuple[dict[str, Any], SSL.Context]:
        """A template, and the context of a client that holds its claim PSK."""
        async with self.api.operator() as operator:
            body = {"name": "Line 1", "credential_type": "psk"} | more
            answer = await operator.post(f"{BASE}/provisioning/templates", json=body)
        assert answer.status_code == 201, answer.text
        made = answer.json()
        return made, claim_context(made["template_id"], made["provision_key"])

    @asynccontextmanager
    async def client(self, who: CoapDevice | SSL.Context | None = None, **more: Any) -> AsyncIterator[CoapClient]:
        """A client whose handshake is done; by certificate, or nobody, where `who` says so."""
        match who:
            case CoapDevice():
                context = who.context()
            case None:
                context = certificate_client_context(None)
            case _:
                context = who
        async with udp_client(self.port, context, **more) as socket:
            await socket.handshake(WAIT)
            client = CoapClient(socket)
            try:
                yield client
            finally:
                client.stop()

    async def refuses(self, who: CoapDevice | SSL.Context) -> str:
        """The error of a handshake that must fail."""
        context = who.context() if isinstance(who, CoapDevice) else who
        async with udp_client(self.port, context) as socket:
            socket.out(socket.client.step())
            await socket.until(lambda: socket.client.done or socket.client.error, WAIT)
            assert socket.client.error is not None, "the handshake succeeded"
            return str(socket.client.error)

    async def uplinks(self, device_id: str) -> list[dict[str, Any]]:
        """What is stored of a device, newest first."""
        found: list[dict[str, Any]] = (await self.get(f"/devices/{device_id}/uplinks"))["uplinks"]
        return found

    async def get(self, path: str) -> Any:
        """What an operator is answered."""
        async with self.api.operator() as operator:
            answer = await operator.get(BASE + path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """What an operator is answered who does something."""
        async with self.api.operator() as operator:
            answer = await operator.request(method, BASE + path, json=body)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None


def key_bytes(text: str) -> bytes:
    """A key as the API shows it."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def claim_context(template_id: str, provision_key: str) -> SSL.Context:
    """A client that holds a template's claim PSK."""
    return psk_client_context(f"claim-{template_id}".encode(), claim_psk(Secret(provision_key)).reveal())


@dataclass
class CoapClient:
    """One association. Every answer to a request, and every notification, is acknowledged."""

    socket: UdpClient
    notifications: asyncio.Queue[Answer] = field(default_factory=asyncio.Queue)
    silent: bool = False
    """Acknowledge nothing any more."""
    _tokens: int = 0
    _message_id: int = 4711
    _waiting: dict[bytes, asyncio.Future[Message]] = field(default_factory=dict)
    _observed: set[bytes] = field(default_factory=set)
    _task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._task = asyncio.create_task(self._read())

    def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.ask(Code.GET, path, **options)

    async def post(self, path: str, value: Any = None, content_format: int | None = JSON, **options: Any) -> Answer:
        """POST a value in JSON or CBOR, or bytes as they are."""
        if isinstance(value, bytes):
            payload = value
        else:
            payload = cbor2.dumps(value) if content_format == CBOR else msgspec.json.encode(value)
        return await self.ask(Code.POST, path, payload, content_format=content_format, **options)

    async def ask(self, code: Code, path: str, payload: bytes = b"", **options: Any) -> Answer:
        """One request, with all the blocks of its answer. Raises Gone."""
        first = await self._exchange(code, path, payload, **options)
        whole, block = first.payload, first.opt.block2
        while block is not None and block.more:
            following = (block.block_number + 1, False, block.size_exponent)
            part = await self._exchange(
                code, path, b"", **{k: v for k, v in options.items() if k == "accept"}, block2=following
            )
            assert part.code is first.code
            whole, block = whole + part.payload, part.opt.block2
        return _answer(first, whole)

    async def upload(self, path: str, payload: bytes, content_format: int = JSON, exponent: int = 6) -> Answer:
        """POST in blocks of `16 << exponent` bytes (RFC 7959 §2.3); the last answer, or the first that is an error."""
        size = 16 << exponent
        for number in range((len(payload) + size - 1) // size):
            start, more = number * size, (number + 1) * size < len(payload)
            answer = await self._exchange(
                Code.POST,
                path,
                payload[start : start + size],
                content_format=content_format,
                block1=(number, more, exponent),
            )
            if not answer.code.is_successful():
                break
        return _answer(answer)

    async def observe(self, path: str, **options: Any) -> Answer:
        """Register; notifications come into `notifications`."""
        token = self._next_token()
        self._observed.add(token)
        return _answer(await self._exchange(Code.GET, path, b"", token=token, observe=0, **options))

    async def notified(self) -> Answer:
        """The next notification. Raises Gone."""
        async with asyncio.timeout(WAIT):
            waiting = asyncio.ensure_future(self.notifications.get())
            closed = asyncio.ensure_future(self.closed())
            await asyncio.wait({waiting, closed}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                raise Gone
            closed.cancel()
            return waiting.result()

    async def closed(self) -> None:
        """Returns when the server has said close_notify."""
        await self.socket.until(lambda: self.socket.client.closed, WAIT)

    def send(self, message: Message) -> None:
        """One message as it is."""
        self.socket.out(self.socket.client.send(bytes(message.encode())))

    def message(self, code: Code, path: str, payload: bytes = b"", kind: Type = Type.CON, **options: Any) -> Message:
        """A request with a message id and a token of its own."""
        self._message_id += 1
        token = options.pop("token", None) or self._next_token()
        query = tuple(options.pop("query", ()))
        made = Message(code=code, _mid=self._message_id, _mtype=kind, _token=token, payload=payload)
        made.opt.uri_path = tuple(path.strip("/").split("/"))
        if query:
            made.opt.uri_query = query
        for name, value in options.items():
            if value is not None:
                setattr(made.opt, name, value)
        return made

    async def _exchange(self, code: Code, path: str, payload: bytes, **options: Any) -> Message:
        message = self.message(code, path, payload, **options)
        answered: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[message.token] = answered
        gone = asyncio.ensure_future(self.closed())
        try:
            async with asyncio.timeout(WAIT):
                while not answered.done() and not gone.done():
                    self.send(message)
                    await asyncio.wait({answered, gone}, timeout=AGAIN, return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise Gone
            return answered.result()
        finally:
            gone.cancel()
            self._waiting.pop(message.token, None)

    def _next_token(self) -> bytes:
        self._tokens += 1
        return self._tokens.to_bytes(2, "big")

    async def _read(self) -> None:
        client, taken = self.socket.client, 0
        while True:
            while taken < len(client.plain):
                self._take(Message.decode(client.plain[taken]))
                taken += 1
            self.socket.changed.clear()
            if taken == len(client.plain):
                await self.socket.changed.wait()

    def _take(self, message: Message) -> None:
        if message.mtype is Type.CON and not self.silent:
            self.send(Message(code=Code.EMPTY, _mid=message.mid, _mtype=Type.ACK, _token=b""))
        if not message.code.is_response():
            return
        waiting = self._waiting.get(message.token)
        if waiting is not None:
            if not waiting.done():
                waiting.set_result(message)
        elif message.token in self._observed:
            self.notifications.put_nowait(_answer(message))


def _answer(message: Message, payload: bytes | None = None) -> Answer:
    options = message.opt
    return Answer(
        message.code,
        message.payload if payload is None else payload,
        None if options.content_format is None else int(options.content_format),
        options.max_age,
        options.etag,
        options.observe,
        options.size1,
    )


@asynccontextmanager
async def serving_coap(
    api: Api,
    limits: ServerLimits | None = None,
    coap_limits: CoapLimits | None = None,
    dtls_limits: DtlsLimits | None = None,
) -> AsyncIterator[Running]:
    """The server over a running core, until the block ends."""
    holder = make_certificate()
    provisioning = Provisioning(api.registry, Endpoint("localhost", 8883), Endpoint("localhost", 5684))
    server = CoapServer(
        api.registry,
        provisioning,
        DtlsContext(holder.credentials()),
        limits=limits,
        coap_limits=coap_limits,
        dtls_limits=dtls_limits,
    )
    port = await server.start("127.0.0.1", 0)
    try:
        yield Running(api, server, port, holder)
    finally:
        await server.drain(2.0)
