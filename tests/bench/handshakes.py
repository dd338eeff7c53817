"""Mutual TLS 1.3 handshakes per second, full and resumed: the product against `openssl s_server` in the same run.

A handshake here lasts from the TCP connection to the server's first session ticket: the server sends it after it has
checked the client's certificate and signature, so nothing is left undone. Then the connection is dropped. Resumed ones
come with the ticket of the connection before. Both servers have the same certificate, made here (P-256, as the
client's), and the same callers: blocking loops in processes of their own, since TLS costs the client as much as the
server. s_server serves one connection at a time, so each caller has one of its own; the product is a single process.

    python -m tests.bench.handshakes PORT CA CERTIFICATE full|resumed SECONDS     one caller; prints its count
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.bench.servers import LIFTED, BenchServer

CALLERS = 4
_RECORD = 16_384 + 2_048


@dataclass(frozen=True, slots=True)
class Handshakes:
    """Per second."""

    full: float
    resumed: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A self-signed certificate with its key, in one PEM file."""

    path: Path

    @classmethod
    def make(cls, directory: Path, name: str) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=7))
        names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        made = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
        path = directory / f"{name}.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(made.public_bytes(Encoding.PEM) + private)
        return cls(path)


@dataclass
class CertifiedServer(BenchServer):
    """A product's process that shows a given certificate."""

    shown: Path | None = None

    @property
    def ca_chain(self) -> Path:
        """The certificate itself, which is self-signed."""
        assert self.shown is not None
        return self.shown


@asynccontextmanager
async def certified_server(data_dir: Path, shown: Pair) -> AsyncIterator[CertifiedServer]:
    """A started server with a tenant, in no hurry to see the first request of a connection."""
    configured = {
        **LIFTED,
        "GATEHOUSE_HTTPS__CERTIFICATE": str(shown.path),
        "GATEHOUSE_HTTPS__KEY": str(shown.path),
        "GATEHOUSE_LIMITS__HEADER_TIMEOUT_SECONDS": "600",
    }
    server = CertifiedServer(data_dir, configured, shown=shown.path)
    try:
        await server.start()
        await server.settle()
        yield server
    finally:
        if server.running:
            await server.kill()


async def of_product(server: BenchServer, shown: Pair, own: Pair, seconds: float) -> Handshakes:
    """The product's, whose certificate is `shown`."""
    return await _measure([server.ports["https"]] * CALLERS, shown, own, seconds)


async def of_openssl(shown: Pair, own: Pair, seconds: float) -> Handshakes | None:
    """Those of s_server; None where there is no openssl."""
    program = shutil.which("openssl")
    if program is None:
        return None
    async with AsyncExitStack() as stack:
        ports = [await stack.enter_async_context(_s_server(program, shown, own)) for _ in range(CALLERS)]
        return await _measure(ports, shown, own, seconds)


@asynccontextmanager
async def _s_server(program: str, shown: Pair, own: Pair) -> AsyncIterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        program, "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(shown.path), "-key", str(shown.path),
        "-Verify", "1", "-CAfile", str(own.path), "-tls1_3", "-quiet", "-www",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await asyncio.to_thread(_wait_for, port)
        yield port
    finally:
        process.kill()
        await process.wait()


def _wait_for(port: int) -> None:
    end = time.perf_counter() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.perf_counter() > end:
                raise
            time.sleep(0.05)
        else:
            return


async def _measure(ports: Sequence[int], shown: Pair, own: Pair, seconds: float) -> Handshakes:
    full = await _rate(ports, shown, own, "full", seconds)
    return Handshakes(full, await _rate(ports, shown, own, "resumed", seconds))


async def _rate(ports: Sequence[int], shown: Pair, own: Pair, how: str, seconds: float) -> float:
    callers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.handshakes"),
            *(str(port), str(shown.path), str(own.path), how, str(seconds)),
            stdout=asyncio.subprocess.PIPE,
        )
        for port in ports
    ]
    said = [(await caller.communicate())[0] for caller in callers]
    return sum(float(each) for each in said)


def call(port: int, ca: str, certificate: str, *, resumed: bool, seconds: float) -> float:
    """One caller's closed loop; handshakes per second."""
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate)
    session = handshake(port, context, None)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        session = handshake(port, context, session if resumed else None)
        done += 1
    return done / (time.perf_counter() - began)


def handshake(port: int, context: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLSession:
    """One connection up to its first ticket. Fails if a session was given and not resumed."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    stream = context.wrap_bio(incoming, outgoing, server_hostname="localhost", session=session)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _go_on(connection, incoming, outgoing, stream.do_handshake)
        assert stream.session_reused == (session is not None)
        before = stream.session
        while True:
            received = connection.recv(_RECORD)
            assert received, "closed instead of sending a ticket"
            incoming.write(received)
            try:
                stream.read(1)
            except ssl.SSLWantReadError:
                pass
            now = stream.session
            if now is not None and now.has_ticket and now != before:
                return now


def _go_on(connection: socket.socket, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, step: object) -> None:
    assert callable(step)
    while True:
        try:
            step()
        except ssl.SSLWantReadError:
            waiting = True
        else:
            waiting = False
        if outgoing.pending:
            connection.sendall(outgoing.read())
        if not waiting:
            return
        received = connection.recv(_RECORD)
        assert received, "closed in the handshake"
        incoming.write(received)


if __name__ == "__main__":
    where, ca_file, certificate_file, kind, time_limit = sys.argv[1:]
    rate = call(int(where), ca_file, certificate_file, resumed=kind == "resumed", seconds=float(time_limit))
    sys.stdout.write(f"{rate}\n")
