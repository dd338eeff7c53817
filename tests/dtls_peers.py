"""Clients, an application and a network for tests of what stands on the DTLS shell."""

from __future__ import annotations

import asyncio
import datetime
import random
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.bindings.openssl.binding import Binding
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID, ObjectIdentifier
from OpenSSL import SSL

from adapters.dtls.admission import DtlsLimits
from adapters.dtls.context import DtlsContext
from adapters.dtls.listener import DtlsListener
from adapters.dtls.ports import Association, Proof, PskKey
from adapters.tls.context import ServerCredentials
from registry.errors import Unavailable
from registry.secrets import Secret
from tests.tls_peers import Holder

_FFI: Any = Binding().ffi
_LIB: Any = Binding().lib

KEY = bytes(range(32))
PSK_SUITE = b"PSK-AES128-CCM8"


class Echo:
    """An application that answers every datagram with itself and remembers what happened."""

    def __init__(self, keys: dict[bytes, bytes] | None = None) -> None:
        self.keys = {b"device-1": KEY} if keys is None else keys
        self.asked: list[tuple[bytes, str]] = []
        self.associations: list[Association] = []
        self.received_datagrams: list[bytes] = []
        self.endings: list[tuple[Association, str]] = []
        self.unavailable = False
        self.gate: asyncio.Event | None = None
        self._unknown = random.Random(7)

    @property
    def proofs(self) -> list[Proof]:
        return [association.proof for association in self.associations]

    async def psk(self, identity: bytes, address: str) -> PskKey:
        self.asked.append((identity, address))
        if self.gate is not None:
            await self.gate.wait()
        if self.unavailable:
            raise Unavailable("the database is away")
        key = self.keys.get(identity)
        return PskKey(Secret(key or self._unknown.randbytes(32)), None if key is None else ("offer", identity))

    def established(self, association: Association) -> None:
        self.associations.append(association)
        association.keep()

    def received(self, association: Association, datagram: bytes) -> None:
        self.received_datagrams.append(datagram)
        association.send(datagram)

    def ended(self, association: Association, reason: str) -> None:
        self.endings.append((association, reason))


@asynccontextmanager
async def serving(
    application: Any = None,
    credentials: ServerCredentials | None = None,
    limits: DtlsLimits | None = None,
    clock: Callable[[], float] | None = None,
) -> Any:
    """A started listener; `port` and `application` are set on it."""
    extra: dict[str, Any] = {} if clock is None else {"clock": clock}
    listener: Any = DtlsListener(application or Echo(), DtlsContext(credentials), limits=limits, **extra)
    listener.port = await listener.start("127.0.0.1", 0)
    try:
        yield listener
    finally:
        await listener.close()


def psk_client_context(
    identity: bytes = b"device-1",
    key: bytes = KEY,
    suites: bytes = PSK_SUITE,
    holder: Holder | None = None,
    version: int = 0xFEFD,
) -> SSL.Context:
    """A client's context: with a key, or with `holder`'s certificate; it believes any server."""
    context: Any = SSL.Context(SSL.DTLS_CLIENT_METHOD)
    _LIB.SSL_CTX_set_min_proto_version(context._context, version)
    _LIB.SSL_CTX_set_max_proto_version(context._context, version)
    context.set_cipher_list(suites + b":@SECLEVEL=0")
    context.set_options(SSL.OP_NO_QUERY_MTU | SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)

    def callback(_ssl: Any, _hint: Any, room: Any, _room: int, psk: Any, _size: int) -> int:
        _FFI.memmove(room, identity + b"\0", len(identity) + 1)
        _FFI.memmove(psk, key, len(key))
        return len(key)

    context.psk = _FFI.callback(
        "unsigned int(SSL *, char *, char *, unsigned int, unsigned char *, unsigned int)", callback
    )
    _LIB.SSL_CTX_set_psk_client_callback(context._context, context.psk)
    if holder is not None:
        context.use_certificate(holder.certificate)
        context.use_privatekey(holder.key)
    result: SSL.Context = context
    return result


def certificate_client_context(holder: Holder | None, suites: bytes = b"ECDHE-ECDSA-AES128-CCM8") -> SSL.Context:
    """A client's context with a certificate, or with none."""
    return psk_client_context(suites=suites, holder=holder)


class Client:
    """A DTLS client without a network: OpenSSL between memory buffers."""

    def __init__(self, context: SSL.Context, mtu: int = 1200) -> None:
        self.connection = SSL.Connection(context)
        self.connection.set_connect_state()
        self.connection.set_ciphertext_mtu(mtu)
        self.mtu = mtu
        self.done = False
        self.error: str | None = None
        self.plain: list[bytes] = []
        self.closed = False

    def step(self) -> list[bytes]:
        """Go on as far as possible; returns the datagrams to send."""
        _LIB.ERR_clear_error()
        try:
            if not self.done:
                self.connection.do_handshake()
                self.done = True
            while True:
                self.plain.append(self.connection.recv(16_384))
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self.closed = True
        except SSL.Error as error:
            self.error = str(error)
        return self.written()

    def feed(self, datagram: bytes) -> list[bytes]:
        if self.error is not None or self.closed:
            return []
        self.connection.bio_write(datagram)
        return self.step()

    def send(self, plain: bytes) -> list[bytes]:
        self.connection.send(plain)
        return self.written()

    def due(self) -> float | None:
        return None if self.error is not None else self.connection.DTLSv1_get_timeout()

    def retransmit(self) -> list[bytes]:
        _LIB.ERR_clear_error()
        try:
            self.connection.DTLSv1_handle_timeout()
        except SSL.Error as error:
            self.error = str(error)
        return self.written()

    def written(self) -> list[bytes]:
        try:
            written = self.connection.bio_read(65_536)
        except SSL.WantReadError:
            return []
        datagrams, start, at = [], 0, 0
        while at < len(written):
            end = at + 13 + int.from_bytes(written[at + 11 : at + 13], "big")
            if end - start > self.mtu and at > start:
                datagrams.append(written[start:at])
                start = at
            at = end
        return [*datagrams, written[start:]]


class Driven:
    """`Client` with a clock: what it says goes to `put`, what comes to `take`, and a timer repeats what got lost."""

    patience = 20.0
    """Seconds that it waits for what it was asked to wait for."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.changed = asyncio.Event()
        self.sent: list[bytes] = []
        self.heard: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None

    def put(self, datagram: bytes) -> None:
        """Send it on its way."""
        raise NotImplementedError

    def take(self, datagram: bytes) -> None:
        """One has come."""
        self.heard.append(datagram)
        self.out(self.client.feed(datagram))
        self.changed.set()

    def out(self, datagrams: Iterable[bytes]) -> None:
        for datagram in datagrams:
            self.sent.append(datagram)
            self.put(datagram)
        self.rest()
        due = None if self.client.done else self.client.due()
        if due is not None:
            self._timer = asyncio.get_running_loop().call_later(due + 0.001, self._late)

    def rest(self) -> None:
        """Repeat nothing more by itself."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        self.out(self.client.retransmit())
        self.changed.set()

    async def until(self, condition: Callable[[], object], seconds: float | None = None) -> None:
        async with asyncio.timeout(self.patience if seconds is None else seconds):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def handshake(self, seconds: float | None = None) -> Self:
        """Raises AssertionError when it fails, TimeoutError when nobody answers."""
        self.out(self.client.step())
        await self.until(lambda: self.client.done or self.client.error, seconds)
        assert self.client.error is None, self.client.error
        return self

    async def ask(self, plain: bytes, seconds: float | None = None) -> bytes:
        """Send one datagram and wait for one."""
        before = len(self.client.plain)
        self.out(self.client.send(plain))
        await self.until(lambda: len(self.client.plain) > before, seconds)
        return self.client.plain[before]


class UdpClient(Driven, asyncio.DatagramProtocol):
    """One on a socket of this machine."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.take(data)

    def put(self, datagram: bytes) -> None:
        self.transport.sendto(datagram)

    def close(self) -> None:
        self.rest()
        self.transport.abort()


@asynccontextmanager
async def udp_client(port: int, context: SSL.Context | None = None, local: Any = None, mtu: int = 1200) -> Any:
    """A client on a socket of its own, connected to a port of this machine; nothing is sent yet."""
    client = Client(context or psk_client_context(), mtu)
    loop = asyncio.get_running_loop()
    _, protocol = await loop.create_datagram_endpoint(
        lambda: UdpClient(client),
        remote_addr=("127.0.0.1", port),
        local_addr=local,
        reuse_port=local is not None or None,
    )
    try:
        yield protocol
    finally:
        protocol.close()


def make_client_certificate(
    name: str = "device-1",
    *,
    usages: list[ObjectIdentifier] | None = None,
    signing: bool = True,
    expired: bool = False,
    key: Any = None,
) -> Holder:
    """A self-signed client certificate with these usages."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    end = now - datetime.timedelta(days=1) if expired else now + datetime.timedelta(days=2)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=3))
        .not_valid_after(end)
        .add_extension(
            x509.KeyUsage(signing, False, False, False, not signing, False, False, False, False), critical=True
        )
    )
    if usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return Holder(builder.sign(key, hashes.SHA256()), key)


@dataclass(frozen=True, slots=True)
class Weather:
    """What a network does to datagrams. Delays in seconds, drawn evenly up to the longest, so they also reorder."""

    loss: float = 0.0
    duplication: float = 0.0
    longest_delay: float = 0.0
    mtu: int = 65_535


class MemoryListener(DtlsListener):
    """A listener whose network is this process: links by address instead of a socket."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.links: dict[Any, Link] = {}

    def transmit(self, datagram: bytes, address: Any) -> None:
        link = self.links.get(address)
        if link is not None:
            link.travel(datagram, link.take)


class Link(Driven):
    """One with a way to a listener of this process, and weather by a seed in both directions."""

    patience = 60.0

    def __init__(
        self, listener: MemoryListener, client: Client, address: Any, weather: Weather | None = None, seed: int = 0
    ) -> None:
        super().__init__(client)
        self.listener, self.address = listener, address
        self.weather = weather or Weather()
        self.allowance = 1_000_000
        """Datagrams that the client sends before it falls silent."""
        self.lost = self.doubled = self.oversized = 0
        self._random = random.Random(seed)
        listener.links[address] = self

    def travel(self, datagram: bytes, arrive: Callable[[bytes], None]) -> None:
        weather, roll = self.weather, self._random.random
        if len(datagram) > weather.mtu:
            self.oversized += 1
            return
        if roll() < weather.loss:
            self.lost += 1
            return
        copies = 2 if roll() < weather.duplication else 1
        self.doubled += copies - 1
        for _ in range(copies):
            asyncio.get_running_loop().call_later(roll() * weather.longest_delay, arrive, datagram)

    def put(self, datagram: bytes) -> None:
        self.travel(datagram, self.to_server)

    def to_server(self, datagram: bytes) -> None:
        self.listener.arrived(datagram, self.address)

    def out(self, datagrams: Iterable[bytes]) -> None:
        said = list(datagrams)
        left = self.allowance - len(self.sent)
        if len(said) <= left:
            super().out(said)
            return
        for datagram in said[: max(0, left)]:
            self.sent.append(datagram)
            self.put(datagram)  # and nothing is repeated from now on


def memory_listener(
    application: Any = None, credentials: ServerCredentials | None = None, limits: DtlsLimits | None = None
) -> MemoryListener:
    return MemoryListener(application or Echo(), DtlsContext(credentials), limits=limits)


def plain_socket(port: int, local: str = "127.0.0.1") -> socket.socket:
    """A UDP socket on an address of this machine, connected to `port`."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((local, 0))
    made.connect(("127.0.0.1", port))
    made.settimeout(5)
    return made


async def refusal(port: int, context: SSL.Context) -> tuple[float, list[bytes]]:
    """A handshake that must fail: seconds from the client's last flight to the alert, and every datagram heard."""
    client, made, loop = Client(context), plain_socket(port), asyncio.get_running_loop()
    made.setblocking(False)
    try:
        heard: list[bytes] = []
        out, spent = client.step(), 0.0
        while client.error is None:
            assert not client.done, "the handshake succeeded"
            begun = time.perf_counter()
            for datagram in out:
                made.send(datagram)
            heard.append(await asyncio.wait_for(loop.sock_recv(made, 4096), 20))
            spent = time.perf_counter() - begun
            out = client.feed(heard[-1])
        return spent, heard
    finally:
        made.close()
