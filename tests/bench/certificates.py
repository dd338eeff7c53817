"""Certificates per second, and what an idle connection of a device with one costs.

A claim of a template of type x509 checks the request's signature, commits an intent (grouped with those of others),
signs, and commits device, credential, event and audit row: two commits and three signatures more than nothing. The
bound beside it does the same cryptography in one process without a database or a network.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from certs.authority import Authority, make_issuing, make_root
from certs.issuing import DeviceFacts, DeviceProfile, prepare_device, sign
from certs.request import check_csr
from tests.bench.callers import Caller, closed_loop, connect, connect_many, post
from tests.bench.servers import BenchServer

CALLERS = 64
_MOST_PER_SECOND = 1_500
"""Requests are made before the clock starts, and more than any machine at hand gets through."""


@dataclass(frozen=True, slots=True)
class Issued:
    """Certificates per second, the times of single ones in seconds (ascending), and the bound of one core."""

    rate: float
    times: list[float]
    bound: float


@dataclass(frozen=True, slots=True)
class IdleTls:
    """KiB of the server for one of so many idle connections: of TLS alone, and with its session after an uplink."""

    connections: int
    tls: float
    session: float


async def issue(server: BenchServer, seconds: float) -> Issued:
    """Claims with a CSR, 64 at a time."""
    made = await server.ask("POST", "/provisioning/templates", {"name": uuid4().hex[:8], "credential_type": "x509"})
    mark = uuid4().hex[:8]
    requests = [
        post(
            "/provision",
            {
                "provision_key": made["provision_key"],
                "device_name": "bench",
                "hardware_id": f"{mark}-{number}",
                "csr": csr.decode(),
            },
        )
        for number, csr in enumerate(_csrs(round(seconds * _MOST_PER_SECOND)))
    ]
    callers = await connect_many(server, CALLERS, first=700_000)
    left = iter(requests)
    rate, times = await closed_loop(callers, seconds, lambda c: c.ask(next(left)), 201)
    for caller in callers:
        caller.cut()
    return Issued(rate, times, bound())


def bound(seconds: float = 1.0) -> float:
    """Requests checked and certificates signed per second by one core, and nothing else."""
    now = datetime.now(UTC)
    root = make_root("bench", now, os.urandom)
    authority = Authority(make_issuing(Authority(root), "bench", now, os.urandom))
    requests = itertools.cycle(_csrs(64))
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        checked = check_csr(next(requests))
        facts = DeviceFacts(str(uuid4()), "bench")
        sign(prepare_device(checked, facts, authority, now, os.urandom, DeviceProfile()))
        done += 1
    return done / (time.perf_counter() - began)


async def idle_tls(server: BenchServer, directory: Path, count: int) -> IdleTls:
    """So many connections by mutual TLS: idle after their handshakes, and after one uplink of each."""
    device_id, own = await _device(server, directory)
    context = server.tls()
    context.load_cert_chain(own)
    request = post(f"/devices/{device_id}/uplink", {"kind": "event", "payload": 1})
    warm = [await connect(server, 800_000 + number, context) for number in range(64)]
    for _ in range(20):  # what every load takes once: batches, plans, arenas
        await asyncio.gather(*[caller.ask(request) for caller in warm])
    before = await _settled(server)
    callers: list[Caller] = []
    for start in range(0, count, 32):
        some = range(start, min(start + 32, count))
        callers += await asyncio.gather(*[connect(server, 810_000 + number, context) for number in some])
    connected = await _settled(server)
    for batch in _batches(callers, 64):
        replies = await asyncio.gather(*[caller.ask(request) for caller in batch])
        assert all(reply.status == 202 for reply in replies), replies[0]
    after = await _settled(server)
    for caller in (*warm, *callers):
        caller.cut()
    return IdleTls(count, (connected - before) * 1024 / count, (after - before) * 1024 / count)


async def _settled(server: BenchServer) -> float:
    await asyncio.sleep(0.5)  # what the last handshakes left is freed by then
    return server.resident_mib()


async def _device(server: BenchServer, directory: Path) -> tuple[str, Path]:
    """A device with a certificate, and the file with its key."""
    token = await server.ask("POST", "/devices/registration/tokens", {"name": "bench"})
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    body = {"token": token["token"], "csr": csr.public_bytes(Encoding.PEM).decode()}
    given = await server.ask("POST", "/devices/provision", body)
    path = directory / "device.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(str(given["certificate"]).encode() + private)
    return str(given["device_id"]), path


def _batches(callers: Sequence[Caller], size: int) -> list[Sequence[Caller]]:
    return [callers[start : start + size] for start in range(0, len(callers), size)]


def _csrs(count: int) -> list[bytes]:
    """Requests in PEM, each for a key of its own."""
    subject = x509.Name([])
    keys = [ec.derive_private_key(random.getrandbits(250) + 1, ec.SECP256R1()) for _ in range(count)]
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return [builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM) for key in keys]
