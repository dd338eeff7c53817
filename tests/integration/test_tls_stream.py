"""The TLS shell against real sockets: what clients may rely on, and what hostile ones cannot do to others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from OpenSSL import SSL

from adapters.tls.admission import TlsLimits
from adapters.tls.context import TlsContext
from adapters.tls.listener import TlsListener
from adapters.tls.stream import TlsTransport
from tests.tls_peers import Holder, client_context, connect, eventually, make_certificate, on_both_loops

SERVER = make_certificate()
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


class Echo(asyncio.Protocol):
    """Sends back what it gets, and remembers what happened to it."""

    def __init__(self) -> None:
        self.received = 0
        self.calls = 0
        self.paused = False
        self.pauses = 0
        self.ended = False
        self.lost = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, TlsTransport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.calls += 1
        self.transport.write(data)

    def count(self, data: bytes) -> None:
        self.received += len(data)

    def pause_writing(self) -> None:
        self.paused = True
        self.pauses += 1
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.paused = False
        self.transport.resume_reading()

    def eof_received(self) -> None:
        self.ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost += 1


class Service:
    """An echo listener and all protocols that it has made."""

    def __init__(self, limits: TlsLimits | None = None, make: Callable[[], Echo] = Echo) -> None:
        self.protocols: list[Echo] = []
        self.make = make
        self.context = TlsContext(SERVER.credentials(), alpn=[b"http/1.1", b"mqtt"])
        self.listener = TlsListener(self.context, self._new, limits=limits)
        self.port = 0

    def _new(self) -> Echo:
        self.protocols.append(self.make())
        return self.protocols[-1]

    @property
    def only(self) -> Echo:
        (protocol,) = self.protocols
        return protocol

    def counted(self) -> dict[str, int]:
        return {name: count for name, count in self.listener.counters.as_dict().items() if count}


@contextlib.asynccontextmanager
async def serving(limits: TlsLimits | None = None, make: Callable[[], Echo] = Echo) -> AsyncIterator[Service]:
    service = Service(limits, make)
    service.port = await service.listener.start("127.0.0.1", 0)
    try:
        yield service
    finally:
        await service.listener.close()
        service.listener.abort_all()
        await eventually(lambda: not service.listener.connections)
        counters = service.listener.counters
        assert (counters.open, counters.handshaking) == (0, 0)
        assert all(protocol.lost == 1 for protocol in service.protocols)


async def assert_others_are_served(service: Service) -> None:
    reader, writer = await connect(service.port, client_context(SERVER))
    writer.write(b"still here?")
    assert await reader.readexactly(11) == b"still here?"
    await hang_up(writer)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def raw_connection(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """Everything until the server ends the connection, by FIN or by reset."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := await asyncio.wait_for(reader.read(65536), 5):
            data += part
    return data


# What clients may rely on


@pytest.mark.parametrize("version", VERSIONS)
@on_both_loops
async def test_echoes_large_and_small_and_says_goodbye(version: ssl.TLSVersion) -> None:
    async with serving() as service:
        reader, writer = await connect(service.port, client_context(SERVER, version=version))
        for size in (1, 16_384, 16_385, 1_000_000):
            sent = os.urandom(size)
            writer.write(sent)
            assert await reader.readexactly(size) == sent
        service.only.transport.write(b"last words")
        service.only.transport.close()
        assert await asyncio.wait_for(reader.read(), 5) == b"last words"  # a clean end: close_notify before FIN
        await hang_up(writer)
        await eventually(lambda: not service.listener.connections)
        assert service.counted() == {"accepted": 1, "established": 1}


@on_both_loops
async def test_the_protocol_sees_what_was_agreed() -> None:
    async with serving() as service:
        context = client_context(SERVER)
        context.set_alpn_protocols(["h2", "mqtt"])
        _, writer = await connect(service.port, context)
        await eventually(lambda: service.protocols)
        tls = service.only.transport.tls
        assert tls is not None
        assert (tls.version, tls.alpn, tls.resumed, tls.peer_certificate) == ("TLSv1.3", "mqtt", False, None)
        assert service.only.transport.get_extra_info("peername")[0] == "127.0.0.1"
        await hang_up(writer)


@on_both_loops
async def test_no_common_alpn_is_no_refusal() -> None:
    async with serving() as service:
        context = client_context(SERVER)
        context.set_alpn_protocols(["h2"])
        _, writer = await connect(service.port, context)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() is None
        await hang_up(writer)


@on_both_loops
async def test_new_connections_get_the_replaced_certificate_and_old_ones_live_on() -> None:
    async with serving() as service:
        reader, writer = await connect(service.port, client_context(SERVER))
        renewed = make_certificate()
        service.context.replace(renewed.credentials())
        _, second = await connect(service.port, client_context(renewed))
        assert second.get_extra_info("ssl_object").getpeercert(binary_form=True) == renewed.der
        writer.write(b"old")
        assert await reader.readexactly(3) == b"old"
        await hang_up(second)
        await hang_up(writer)


@on_both_loops
async def test_old_versions_and_suites_are_refused() -> None:
    async with serving() as service:
        old = client_context(SERVER)
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        static = client_context(SERVER, version=ssl.TLSVersion.TLSv1_2)
        static.set_ciphers("ECDHE-ECDSA-AES128-SHA256:AES128-GCM-SHA256")
        for context in (old, static):
            with pytest.raises(ssl.SSLError):
                await connect(service.port, context)
        await eventually(lambda: service.listener.counters.dropped_handshake_failed == 2)


@on_both_loops
async def test_half_close_reaches_the_protocol_once_and_ends_the_connection() -> None:
    async with serving() as service:
        reader, writer = await connect(service.port, client_context(SERVER))
        await eventually(lambda: service.protocols)
        raw: socket.socket = writer.get_extra_info("socket")
        # The client's transport owns the socket; its sending half is shut down behind its back.
        with socket.socket(fileno=os.dup(raw.fileno())) as behind:
            behind.shutdown(socket.SHUT_WR)
        assert await read_to_end(reader) == b""
        await eventually(lambda: service.only.lost)
        assert service.only.ended
        assert service.listener.counters.truncated == 1
        await hang_up(writer)


@on_both_loops
async def test_writes_of_one_iteration_leave_as_one_record() -> None:
    async with serving() as service:
        reader, writer = await connect(service.port, client_context(SERVER))
        await eventually(lambda: service.protocols)
        for part in (b"one ", b"two ", b"three"):
            service.only.transport.write(part)
        assert await reader.read(100) == b"one two three"
        await hang_up(writer)


@on_both_loops
async def test_pause_reading_stops_the_socket_and_the_peer_feels_it() -> None:
    async with serving() as service:
        peer = await blocking_client(service.port)
        await eventually(lambda: service.protocols)
        service.only.data_received = service.only.count  # type: ignore[method-assign]
        service.only.transport.pause_reading()
        sent = fill(peer)
        assert sent < 60_000_000
        assert service.only.received == 0
        service.only.transport.resume_reading()
        await eventually(lambda: service.only.received >= sent)
        peer.close()


async def blocking_client(port: int) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", port))
    return await asyncio.to_thread(client_context(SERVER).wrap_socket, raw, server_hostname="localhost")


def fill(peer: ssl.SSLSocket) -> int:
    """Send until nobody takes it any more, or 64 MB."""
    peer.setblocking(False)
    sent = 0
    with contextlib.suppress(ssl.SSLWantWriteError):
        while sent < 64_000_000:
            sent += peer.send(bytes(65_536))
    return sent


# Hostile peers


@on_both_loops
async def test_a_peer_that_never_reads_makes_the_protocol_pause_and_memory_stays_flat() -> None:
    limits = TlsLimits(linger=0.05)
    async with serving(limits) as service:
        context = client_context(SERVER)
        raw = socket.create_connection(("127.0.0.1", service.port))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer = await asyncio.to_thread(context.wrap_socket, raw, server_hostname="localhost")
        await eventually(lambda: service.protocols)
        before = psutil.Process().memory_info().rss

        async def pour() -> None:
            peer.setblocking(False)
            chunk = bytes(65_536)
            for _ in range(2_000):
                with contextlib.suppress(ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    peer.send(chunk)
                await asyncio.sleep(0)
                if service.only.paused:
                    return

        await asyncio.wait_for(pour(), 20)
        assert service.only.paused
        held = service.only.transport.get_write_buffer_size()
        assert held < 65_536 + 2 * 32_768 + 2_048
        assert psutil.Process().memory_info().rss - before < 30_000_000
        await assert_others_are_served(service)
        service.protocols[0].transport.close()
        await eventually(lambda: service.protocols[0].lost)  # within the linger time, though it still reads nothing
        assert service.listener.counters.dropped_linger == 1
        raw.close()
        peer.close()


@on_both_loops
async def test_an_unfinished_handshake_is_cut_at_its_time() -> None:
    async with serving(TlsLimits(handshake_timeout=0.05)) as service:
        reader, writer = await raw_connection(service.port)
        assert await read_to_end(reader) == b""
        writer.close()
        await eventually(lambda: not service.listener.connections)
        assert service.listener.counters.dropped_handshake_timeout == 1
        assert service.protocols == []
        await assert_others_are_served(service)


@on_both_loops
async def test_handshakes_in_flight_are_capped_and_places_come_back() -> None:
    async with serving(TlsLimits(handshakes_per_address=3)) as service:
        silent = [await raw_connection(service.port) for _ in range(3)]
        await eventually(lambda: service.listener.counters.handshaking == 3)
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await connect(service.port, client_context(SERVER))
        assert service.listener.counters.dropped_address_limit == 1
        silent[0][1].close()
        await eventually(lambda: service.listener.counters.handshaking == 2)
        await assert_others_are_served(service)
        for _, writer in silent:
            writer.close()


@on_both_loops
async def test_strays_that_took_every_place_give_way_to_a_newcomer() -> None:
    limits = TlsLimits(handshakes_in_flight=6, handshakes_per_address=6)
    async with serving(limits) as service:
        strays = [await asyncio.open_connection("127.0.0.1", service.port, local_addr=("127.0.0.2", 0)) for _ in "ab"]
        strays += [
            await asyncio.open_connection("127.0.0.1", service.port, local_addr=("127.0.0.3", 0)) for _ in "abcd"
        ]
        for _, writer in strays[::2]:
            writer.write(hello()[:100])
        await eventually(lambda: service.listener.counters.handshaking == 6)
        await assert_others_are_served(service)
        assert await read_to_end(strays[2][0]) == b""  # the oldest of who had most
        counters = service.listener.counters
        await eventually(lambda: counters.dropped_handshake_displaced == 1)
        assert (counters.dropped_handshake_limit, counters.dropped_handshake_truncated) == (0, 0)
        assert counters.handshaking == 5
        for _, writer in strays:
            writer.close()


@on_both_loops
async def test_connections_are_capped_in_all() -> None:
    async with serving(TlsLimits(connections=1)) as service:
        _, writer = await connect(service.port, client_context(SERVER))
        reader, refused = await raw_connection(service.port)
        assert await read_to_end(reader) == b""
        refused.close()
        assert service.listener.counters.dropped_connection_limit == 1
        await hang_up(writer)


def hello(version: ssl.TLSVersion | None = None) -> bytes:
    """A real ClientHello."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context(SERVER, version=version).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize(
    ("data", "counter"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "dropped_plaintext"),
        (b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00", "dropped_garbage"),
        (b"\x00" * 100, "dropped_garbage"),
        (b"\x80\x2e\x01\x03\x01" + b"\x00" * 50, "dropped_garbage"),
        (b"\x16\x03\x01\xff\xff" + b"\x00" * 100, "dropped_garbage"),
        (b"\x16\x03\x01\x00\x10" + b"\x09" * 16, "dropped_handshake_failed"),
        (b"\x16\x03\x01\x00\x00" * 100, "dropped_handshake_failed"),
        (hello() + b"\x17\x03\x03\x00\x20" + b"\x01" * 32, "dropped_handshake_failed"),
        (
            b"\x16\x03\x01\x40\x00\x01\x02\x00\x00"
            + b"\x00" * 16_380
            + (b"\x16\x03\x01\x40\x00" + b"\x00" * 16_384) * 3,
            "dropped_handshake_",
        ),
    ],
)
@on_both_loops
async def test_garbage_is_dropped_with_one_count_and_no_traceback(
    data: bytes, counter: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as service:
        reader, writer = await raw_connection(service.port)
        writer.write(data)
        await read_to_end(reader)
        writer.close()
        await eventually(lambda: not service.listener.connections)
        drops = {name: count for name, count in service.counted().items() if name.startswith("dropped")}
        assert len(drops) == 1
        assert next(iter(drops)).startswith(counter)
        assert list(drops.values()) == [1]
        assert service.protocols == []
        assert caplog.records == []
        await assert_others_are_served(service)


@on_both_loops
async def test_a_hello_cut_at_any_place_and_a_reset_leave_nothing_behind() -> None:
    async with serving() as service:
        whole = hello()
        for cut in range(0, len(whole), 37):
            _, writer = await raw_connection(service.port)
            writer.write(whole[:cut])
            await writer.drain()
            if cut % 2:
                writer.transport.abort()
            else:
                writer.close()
        await eventually(lambda: not service.listener.connections)
        await assert_others_are_served(service)


@on_both_loops
async def test_a_hello_in_single_bytes_is_still_served() -> None:
    async with serving() as service:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_context(SERVER).wrap_bio(incoming, outgoing, server_hostname="localhost")
        reader, writer = await raw_connection(service.port)
        raw: socket.socket = writer.get_extra_info("socket")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                for byte in outgoing.read():
                    writer.write(bytes((byte,)))
                    await asyncio.sleep(0)
                incoming.write(await reader.read(65_536))
        writer.write(outgoing.read())
        await eventually(lambda: service.protocols)
        writer.close()


@pytest.mark.parametrize("version", VERSIONS)
@on_both_loops
async def test_a_flood_of_tiny_records_arrives_in_few_calls(version: ssl.TLSVersion) -> None:
    async with serving() as service:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_context(SERVER, version=version).wrap_bio(incoming, outgoing, server_hostname="localhost")
        reader, writer = await raw_connection(service.port)
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await reader.read(65_536))
        for _ in range(20_000):
            client.write(b"x")
        flood = outgoing.read()
        discard = asyncio.create_task(read_to_end(reader))
        writer.write(flood)
        await eventually(lambda: service.protocols and service.only.received == 20_000)
        assert service.only.calls < 2_000
        writer.close()
        await discard


@on_both_loops
async def test_renegotiation_is_dropped_and_counted() -> None:
    async with serving() as service:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
        client = SSL.Connection(context)
        client.set_connect_state()
        reader, writer = await raw_connection(service.port)

        async def exchange() -> None:
            with contextlib.suppress(SSL.WantReadError):
                while True:
                    writer.write(client.bio_read(65_536))
            client.bio_write(await asyncio.wait_for(reader.read(65_536), 5))

        while True:
            try:
                client.do_handshake()
                break
            except SSL.WantReadError:
                await exchange()
        await eventually(lambda: service.protocols)
        assert client.renegotiate()
        with contextlib.suppress(SSL.WantReadError):
            client.do_handshake()
        with contextlib.suppress(SSL.WantReadError):
            writer.write(client.bio_read(65_536))
        await read_to_end(reader)
        assert service.listener.counters.dropped_renegotiation == 1
        writer.close()


@on_both_loops
async def test_key_updates_are_answered_without_waiting_for_the_application() -> None:
    async with serving() as service:
        peer = await asyncio.create_subprocess_exec(
            *("openssl", "s_client", "-connect", f"127.0.0.1:{service.port}", "-tls1_3"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert peer.stdin is not None
        assert peer.stdout is not None
        assert peer.stderr is not None
        async with asyncio.timeout(10):
            await eventually(lambda: service.protocols)
            peer.stdin.write(b"K\n")  # update, and ask for an update in return (RFC 8446 §4.6.3)
            await peer.stderr.readuntil(b"KEYUPDATE\n")
            peer.stdin.write(b"new keys\n")
            await peer.stdout.readuntil(b"new keys\n")
            peer.stdin.close()
            await peer.wait()
        assert not any(name.startswith("dropped") for name in service.counted())


@on_both_loops
async def test_corrupted_records_drop_the_connection_only() -> None:
    async with serving() as service:
        _, writer = await connect(service.port, client_context(SERVER))
        await eventually(lambda: service.protocols)
        raw: socket.socket = writer.get_extra_info("socket")
        os.write(raw.fileno(), b"\x17\x03\x03\x00\x40" + b"\x55" * 64)
        await eventually(lambda: service.only.lost)
        assert service.listener.counters.dropped_garbage == 1
        await assert_others_are_served(service)
        writer.transport.abort()


# Client certificates: any issuer, proved possession


RSA_KEY = rsa.generate_private_key(65537, 2048)
FOREIGN = make_certificate("foreign authority")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "client",
    [
        make_certificate("device"),
        make_certificate("expired", expired=True),
        make_certificate("of a foreign authority", issuer=FOREIGN),
        make_certificate("rsa", key=RSA_KEY),
        make_certificate("p-384", key=ec.generate_private_key(ec.SECP384R1())),
    ],
    ids=["self-signed", "expired", "foreign", "rsa", "p384"],
)
@on_both_loops
async def test_any_certificate_with_its_key_is_accepted_and_seen(
    version: ssl.TLSVersion, client: Holder, tmp_path: Path
) -> None:
    async with serving() as service:
        context = client_context(SERVER, version=version, certificate=client.save(tmp_path))
        reader, writer = await connect(service.port, context)
        writer.write(b"hi")
        assert await reader.readexactly(2) == b"hi"
        assert service.only.transport.peer_certificate_der == client.der
        assert service.listener.counters.client_certificates == 1
        await hang_up(writer)


@on_both_loops
async def test_a_key_too_weak_to_prove_anything_is_refused(tmp_path: Path) -> None:
    async with serving() as service:
        weak = make_certificate(key=rsa.generate_private_key(65537, 1024))
        context = client_context(SERVER, version=ssl.TLSVersion.TLSv1_2)
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.load_cert_chain(weak.save(tmp_path))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await connect(service.port, context)
        await eventually(lambda: service.listener.counters.dropped_handshake_failed == 1)


def stolen_certificate(victim: ec.EllipticCurvePrivateKey, own: ec.EllipticCurvePrivateKey) -> bytes:
    """A SEC1 key file whose public half is the victim's: OpenSSL pairs it with the certificate and signs with ours."""
    point = victim.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    scalar = own.private_numbers().private_value.to_bytes(32, "big")
    return bytes.fromhex("30770201010420") + scalar + bytes.fromhex("a00a06082a8648ce3d030107a144034200") + point


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@on_both_loops
async def test_a_certificate_without_its_key_does_not_get_in(version: str, tmp_path: Path) -> None:
    victim, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "certificate.pem").write_bytes(make_certificate("victim", key=victim).pem)

    async def knock(key: bytes) -> None:
        (tmp_path / "key.der").write_bytes(key)
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{service.port}", version, "-keyform", "DER"]
        command += ["-cert", str(tmp_path / "certificate.pem"), "-key", str(tmp_path / "key.der")]
        await asyncio.to_thread(subprocess.run, command, input=b"hi\n", capture_output=True, timeout=20, check=False)
        await eventually(lambda: service.listener.counters.accepted and not service.listener.connections)

    async with serving() as service:
        await knock(stolen_certificate(victim, own))
        assert service.counted() == {"accepted": 1, "dropped_handshake_failed": 1}
        await knock(stolen_certificate(victim, victim))  # the same file with the right key: so it was the signature
        assert service.listener.counters.client_certificates == 1


@pytest.mark.parametrize("version", VERSIONS)
@on_both_loops
async def test_a_resumed_session_still_shows_the_client_certificate(version: ssl.TLSVersion, tmp_path: Path) -> None:
    client = make_certificate("device")
    context = client_context(SERVER, version=version, certificate=client.save(tmp_path))

    def talk(port: int, session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool | None]:
        with socket.create_connection(("127.0.0.1", port)) as raw:
            peer = context.wrap_socket(raw, server_hostname="localhost", session=session)
            peer.sendall(b"x")
            peer.recv(1)  # TLS 1.3 brings its tickets with the first answer
            result = peer.session, peer.session_reused
            peer.unwrap().close()
            return result

    async with serving() as service:
        session, reused = await asyncio.to_thread(talk, service.port, None)
        assert not reused
        _, reused = await asyncio.to_thread(talk, service.port, session)
        assert reused
        assert [protocol.transport.resumed for protocol in service.protocols] == [False, True]
        assert [protocol.transport.peer_certificate_der for protocol in service.protocols] == [client.der] * 2
        # New credentials bring new ticket keys: the old ticket only costs a full handshake.
        service.context.replace(SERVER.credentials())
        _, reused = await asyncio.to_thread(talk, service.port, session)
        assert not reused


@on_both_loops
async def test_an_oversized_client_chain_is_dropped(tmp_path: Path) -> None:
    leaf = make_certificate("leaf")
    path = tmp_path / "long.pem"
    path.write_bytes(leaf.pem + leaf.key_pem + b"".join(make_certificate(f"ca{n}").pem for n in range(120)))
    async with serving() as service:
        context = client_context(SERVER)
        context.load_cert_chain(path)
        reader, writer = await connect(service.port, context)
        assert await read_to_end(reader) == b""
        assert service.listener.counters.dropped_handshake_oversized == 1
        writer.transport.abort()
