"""DTLS as others speak it: the openssl program, and Mbed TLS (python-mbedtls, where it can be had)."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.dtls.ports import Association, CertificateProven, NothingProven, PskProven
from tests.dtls_peers import KEY, Echo, make_client_certificate, serving
from tests.tls_peers import make_certificate

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
SECONDS = 30


@asynccontextmanager
async def s_client(port: int, *arguments: str, version: str = "-dtls1_2") -> AsyncIterator[Any]:
    """`openssl s_client`, with standard output and error together."""
    process = await asyncio.create_subprocess_exec(
        *("openssl", "s_client", version, "-connect", f"127.0.0.1:{port}", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until(process: Any, text: bytes) -> bytes:
    """All that the program says up to `text`."""
    said = b""
    async with asyncio.timeout(SECONDS):
        while text not in said:
            more = await process.stdout.read(4096)
            assert more, said.decode("latin1")
            said += more
    return said


@needs_openssl
@pytest.mark.parametrize(
    "suite", ["PSK-AES128-CCM8", "PSK-AES128-GCM-SHA256", "PSK-AES256-GCM-SHA384", "ECDHE-PSK-CHACHA20-POLY1305"]
)
async def test_openssl_with_a_key(suite: str) -> None:
    arguments = ("-psk", KEY.hex(), "-psk_identity", "device-1", "-cipher", f"{suite}:@SECLEVEL=0")
    async with serving() as listener, s_client(listener.port, *arguments) as process:
        process.stdin.write(b"a line for the echo\n")
        said = await until(process, b"\na line for the echo")
        assert f"Cipher is {suite}".encode() in said
        assert listener.application.proofs == [PskProven(b"device-1", ("offer", b"device-1"))]
        listener.associations()[0].close()
        await until(process, b"closed")


@needs_openssl
@pytest.mark.parametrize(
    "suite", ["ECDHE-ECDSA-AES128-CCM8", "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384"]
)
async def test_openssl_with_a_certificate_on_a_narrow_path(suite: str, tmp_path: Path) -> None:
    server, holder = make_certificate(), make_client_certificate()
    arguments = ("-cert", str(holder.save(tmp_path)), "-cipher", f"{suite}:@SECLEVEL=0", "-mtu", "600")
    credentials = server.credentials()
    async with serving(credentials=credentials) as listener, s_client(listener.port, *arguments) as process:
        process.stdin.write(b"a line for the echo\n")
        await until(process, b"\na line for the echo")
        assert listener.application.proofs == [CertificateProven(holder.der)]


@needs_openssl
async def test_openssl_is_told_of_a_wrong_key_and_of_an_old_version() -> None:
    async with serving() as listener:
        wrong = ("-psk", bytes(32).hex(), "-psk_identity", "device-1", "-cipher", "PSK-AES128-CCM8:@SECLEVEL=0")
        async with s_client(listener.port, *wrong) as process:
            await until(process, b"alert bad record mac")
        async with s_client(listener.port, "-cipher", "ALL:@SECLEVEL=0", version="-dtls1") as process:
            await until(process, b"alert protocol version")
        assert listener.application.associations == []


def mbedtls_echo(port: int, **configuration: Any) -> tuple[bytes, str]:
    """One handshake and one echo by Mbed TLS; blocks."""
    tls = pytest.importorskip("mbedtls.tls")
    context = tls.ClientContext(tls.DTLSConfiguration(validate_certificates=False, **configuration))
    made = context.wrap_socket(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), server_hostname=None)
    try:
        made.settimeout(SECONDS)
        made.connect(("127.0.0.1", port))
        made.do_handshake()
        made.send(b"hello")
        return made.recv(2048), made.cipher()[0] if isinstance(made.cipher(), tuple) else str(made.cipher())
    finally:
        made.close()


@pytest.mark.parametrize(
    "suite",
    [
        "TLS-PSK-WITH-AES-128-CCM-8",
        "TLS-PSK-WITH-AES-128-CCM",
        "TLS-PSK-WITH-AES-128-GCM-SHA256",
        "TLS-PSK-WITH-AES-256-GCM-SHA384",
        "TLS-ECDHE-PSK-WITH-CHACHA20-POLY1305-SHA256",
    ],
)
async def test_mbed_tls_with_a_key(suite: str) -> None:
    pytest.importorskip("mbedtls")
    async with serving() as listener:
        got, used = await asyncio.to_thread(
            mbedtls_echo, listener.port, pre_shared_key=("device-1", KEY), ciphers=[suite]
        )
        assert (got, used) == (b"hello", suite)
        assert listener.application.proofs == [PskProven(b"device-1", ("offer", b"device-1"))]


async def test_mbed_tls_with_a_key_and_every_suite_it_knows_proves_its_key() -> None:
    """It puts suites with certificates first, and here has none of its own."""
    pytest.importorskip("mbedtls")
    async with serving(credentials=make_certificate().credentials()) as listener:
        got, used = await asyncio.to_thread(mbedtls_echo, listener.port, pre_shared_key=("device-1", KEY))
        assert (got, used) == (b"hello", "TLS-ECDHE-PSK-WITH-CHACHA20-POLY1305-SHA256")
        assert listener.application.proofs == [PskProven(b"device-1", ("offer", b"device-1"))]


class Filling(Echo):
    """Answers with as much as one datagram may carry."""

    def received(self, association: Association, datagram: bytes) -> None:
        association.send(b"." * (association.room - 1) + b"\n")


@needs_openssl
@pytest.mark.parametrize("limit", [512, 1024])
async def test_openssl_with_room_for_short_records(limit: int) -> None:
    arguments = ("-psk", KEY.hex(), "-psk_identity", "device-1", "-cipher", "PSK-AES128-CCM8:@SECLEVEL=0")
    limited = (*arguments, "-maxfraglen", str(limit), "-quiet")
    async with serving(Filling()) as listener, s_client(listener.port, *limited) as process:
        process.stdin.write(b"fill it\n")
        said = await until(process, b".\n")
        assert said.rpartition(b"\n.")[2].count(b".") + 1 == limit - 1


async def test_mbed_tls_with_room_for_short_records() -> None:
    tls = pytest.importorskip("mbedtls.tls")
    async with serving(Filling()) as listener:
        got, _ = await asyncio.to_thread(
            mbedtls_echo,
            listener.port,
            pre_shared_key=("device-1", KEY),
            max_fragmentation_length=tls.MaxFragmentLength.MFL_512K,
        )
        assert len(got) == 512


async def test_mbed_tls_with_the_servers_certificate_only() -> None:
    pytest.importorskip("mbedtls")
    async with serving(credentials=make_certificate().credentials()) as listener:
        got, _ = await asyncio.to_thread(mbedtls_echo, listener.port, ciphers=["TLS-ECDHE-ECDSA-WITH-AES-128-CCM-8"])
        assert got == b"hello"
        assert listener.application.proofs == [NothingProven()]


async def test_mbed_tls_is_told_of_a_wrong_key() -> None:
    pytest.importorskip("mbedtls")
    async with serving() as listener:
        with pytest.raises(Exception, match=r"(?i)alert|fatal"):
            await asyncio.to_thread(
                mbedtls_echo,
                listener.port,
                pre_shared_key=("device-1", bytes(32)),
                ciphers=["TLS-PSK-WITH-AES-128-CCM-8"],
            )
        assert listener.counters.as_dict()["dropped_wrong_key"] == 1
