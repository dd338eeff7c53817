"""DTLS 1.2 clients that we did not write, without I/O: OpenSSL's and Mbed TLS's, behind one interface.

    datagram in ─► feed ─► datagrams out (`outgoing`), plaintexts (`received`), `established`, `ended`

Both libraries are given memory instead of a socket, and memory knows no datagrams: one datagram is fed at a time, and
what comes out is cut where its records end (RFC 6347 §4.1: 13 bytes, the last two say how much follows). The clock is
the library's own: OpenSSL sends again after 1 s and doubles that, Mbed TLS after what it is told. `tick` lets them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.bindings.openssl.binding import Binding
from OpenSSL import SSL

_HEADER = 13
_lib, _ffi = Binding.lib, Binding.ffi


@dataclass(frozen=True, slots=True)
class Psk:
    """What a device holds: its identity and its key."""

    identity: str
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a device holds: one PEM file with its certificate, its chain and its key."""

    pem: Path


class Dtls(Protocol):
    """One association of a client."""

    established: bool
    ended: str | None
    """Why it is over, in the library's words; "close_notify" for a good end."""
    received: list[bytes]
    """Plaintexts, to be taken by the caller."""

    def tick(self) -> None:
        """Begin, or send again what is due."""

    def feed(self, datagram: bytes) -> None:
        """One datagram of the server."""

    def send(self, plaintext: bytes) -> None:
        """Encrypt. Raises ConnectionError where the library does nothing more after the end."""

    def close(self) -> None:
        """Make the close_notify."""

    def outgoing(self) -> list[bytes]:
        """The datagrams to be sent since the last call."""


def records(raw: bytes) -> list[bytes]:
    """The records in these bytes. The last may be cut short; it is given as it is."""
    found = []
    while raw:
        length = _HEADER + int.from_bytes(raw[11:13], "big")
        found.append(raw[:length])
        raw = raw[length:]
    return found


def datagrams(raw: bytes, mtu: int) -> list[bytes]:
    """Records packed into datagrams of at most `mtu` bytes; a longer record goes alone."""
    packed: list[bytes] = []
    for record in records(raw):
        if packed and len(packed[-1]) + len(record) <= mtu:
            packed[-1] += record
        else:
            packed.append(record)
    return packed


# -- OpenSSL -----------------------------------------------------------------------------------------------------------

_holders: dict[int, Psk] = {}
"""The PSK of each SSL object under way, by its address: OpenSSL's callback is told nothing else."""


@_ffi.callback("unsigned int(SSL *, const char *, char *, unsigned int, unsigned char *, unsigned int)")  # type: ignore[untyped-decorator]  # cffi
def _psk_of_client(ssl: Any, hint: Any, identity: Any, identity_room: int, key: Any, key_room: int) -> int:
    psk = _holders.get(int(_ffi.cast("uintptr_t", ssl)))
    if psk is None or len(psk.identity) >= identity_room or len(psk.key) > key_room:
        return 0
    _ffi.memmove(identity, psk.identity.encode() + b"\0", len(psk.identity) + 1)
    _ffi.memmove(key, psk.key, len(psk.key))
    return len(psk.key)


class OpensslContext:
    """What OpenSSL clients share. `suites`: OpenSSL's names; `ca`: the chain that the server must have, or None."""

    def __init__(self, suites: str, certificate: Certificate | None = None, ca: Path | None = None) -> None:
        self.context = SSL.Context(SSL.DTLS_METHOD)
        self.context.set_cipher_list(f"{suites}:@SECLEVEL=0".encode())
        self.context.set_options(SSL.OP_NO_QUERY_MTU | SSL.OP_NO_TICKET)
        self.context.set_mode(_lib.SSL_MODE_RELEASE_BUFFERS)
        if certificate is not None:
            self.context.use_certificate_chain_file(str(certificate.pem))
            self.context.use_privatekey_file(str(certificate.pem))
        if ca is not None:
            self.context.load_verify_locations(str(ca))
            self.context.set_verify(SSL.VERIFY_PEER, lambda _c, _x, _e, _d, ok: bool(ok))
        _lib.SSL_CTX_set_psk_client_callback(self.context._context, _psk_of_client)


class OpensslDtls:
    """A client of OpenSSL (through pyOpenSSL)."""

    def __init__(self, shared: OpensslContext, psk: Psk | None = None, mtu: int = 1200) -> None:
        self.established = False
        self.ended: str | None = None
        self.received: list[bytes] = []
        self._mtu = mtu
        self._connection = SSL.Connection(shared.context, None)
        self._connection.set_connect_state()
        self._connection.set_ciphertext_mtu(mtu)
        self._address = int(_ffi.cast("uintptr_t", self._connection._ssl))
        if psk is not None:
            _holders[self._address] = psk

    def tick(self) -> None:
        if self.established or self.ended is not None:
            return
        try:
            self._connection.DTLSv1_handle_timeout()
        except SSL.Error:
            self._end("gave up")
            return
        self._handshake()

    def feed(self, datagram: bytes) -> None:
        if self.ended is not None:
            return
        self._connection.bio_write(datagram)
        if not self.established:
            self._handshake()
        if self.established:
            self._read()

    def send(self, plaintext: bytes) -> None:
        self._connection.send(plaintext)

    def close(self) -> None:
        if self.established and self.ended is None:
            try:
                self._connection.shutdown()
            except SSL.Error:
                pass
            self._end("closed by us")

    def outgoing(self) -> list[bytes]:
        parts = []
        try:
            while True:
                parts.append(self._connection.bio_read(65536))
        except SSL.Error:
            pass
        return datagrams(b"".join(parts), self._mtu) if parts else []

    def _handshake(self) -> None:
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return
        except SSL.Error as error:
            self._end(_words(error))
            return
        self.established = True
        _holders.pop(self._address, None)

    def _read(self) -> None:
        while True:
            try:
                self.received.append(self._connection.recv(65536))
            except SSL.WantReadError:
                return
            except SSL.ZeroReturnError:
                self._end("close_notify")
                return
            except SSL.Error as error:
                self._end(_words(error))
                return

    def _end(self, why: str) -> None:
        self.ended = why
        _holders.pop(self._address, None)


def _words(error: SSL.Error) -> str:
    return " ".join(reason for *_, reason in (error.args[0] if error.args else ())) or type(error).__name__


# -- Mbed TLS ----------------------------------------------------------------------------------------------------------


class MbedtlsDtls:
    """A client of Mbed TLS (through python-mbedtls, which tests that use this have to have).

    `seconds`: of the first retransmission and of the last. `suites`: Mbed TLS's names.
    """

    def __init__(
        self,
        suites: Sequence[str],
        who: Psk | Certificate | None,
        ca: Path | None = None,
        *,
        mtu: int = 1200,
        seconds: tuple[float, float] = (1.0, 60.0),
    ) -> None:
        from mbedtls import tls
        from mbedtls.exceptions import TLSError

        self._tls = tls
        self._errors = (TLSError, tls.RaggedEOF, OSError)
        self.established = False
        self.ended: str | None = None
        self.received: list[bytes] = []
        self._mtu = mtu
        configuration = tls.DTLSConfiguration(
            validate_certificates=ca is not None,
            ciphers=tuple(suites),
            lowest_supported_version=tls.DTLSVersion.DTLSv1_2,
            handshake_timeout_min=seconds[0],
            handshake_timeout_max=seconds[1],
            pre_shared_key=(who.identity, who.key) if isinstance(who, Psk) else None,
            certificate_chain=_mbedtls_chain(who) if isinstance(who, Certificate) else None,
            trust_store=None if ca is None else tls.TrustStore(_mbedtls_certificates(ca.read_text())),
        )
        self._buffer: Any = tls.ClientContext(configuration).wrap_buffers("localhost" if ca is not None else None)
        self._buffer.setmtu(mtu)
        self._out: list[bytes] = []

    def tick(self) -> None:
        if not self.established and self.ended is None:
            self._handshake()

    def feed(self, datagram: bytes) -> None:
        if self.ended is not None:
            return
        self._buffer.receive_from_network(datagram)
        if not self.established:
            self._handshake()
        if self.established:
            self._read()

    def send(self, plaintext: bytes) -> None:
        try:
            self._buffer.write(plaintext)
        except self._tls.WantReadError as error:  # all it says of an association that is over
            raise ConnectionError("Mbed TLS writes nothing more") from error
        self._take()

    def close(self) -> None:
        if self.established and self.ended is None:
            self._buffer.shutdown()
            self._take()
            self.ended = "closed by us"

    def outgoing(self) -> list[bytes]:
        taken, self._out = self._out, []
        return datagrams(b"".join(taken), self._mtu)

    def _handshake(self) -> None:
        over = self._tls.HandshakeStep.HANDSHAKE_OVER
        while self._buffer._handshake_state is not over:
            try:
                self._buffer.do_handshake()
            except self._tls.WantReadError:
                self._take()
                return
            except self._tls.WantWriteError:
                self._take()
            except self._errors as error:
                self._take()
                self.ended = str(error)
                return
        self._take()
        self.established = True

    def _read(self) -> None:
        while True:
            try:
                plaintext = self._buffer.read(16384)
            except (self._tls.WantReadError, self._tls.WantWriteError):
                self._take()
                return
            except self._errors as error:
                self.ended = "close_notify" if "0x7880" in str(error) else str(error)
                return
            if not plaintext:
                self._take()
                return
            self.received.append(plaintext)

    def _take(self) -> None:
        while taken := self._buffer.peek_outgoing(65536):
            self._out.append(taken)
            self._buffer.consume_outgoing(len(taken))


def _mbedtls_certificates(pem: str) -> list[Any]:
    from mbedtls.x509 import CRT

    blocks = re.findall("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", pem, re.DOTALL)
    return [CRT.from_PEM(block) for block in blocks]


def _mbedtls_chain(certificate: Certificate) -> tuple[tuple[Any, ...], Any]:
    from mbedtls.pk import ECC

    text = certificate.pem.read_text()
    key = re.search("-----BEGIN [A-Z ]*PRIVATE KEY-----.+?-----END [A-Z ]*PRIVATE KEY-----\n?", text, re.DOTALL)
    assert key is not None
    return tuple(_mbedtls_certificates(text)), ECC.from_PEM(key[0])
