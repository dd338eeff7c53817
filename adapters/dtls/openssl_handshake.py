"""The handshakes that OpenSSL does: certificates, and ECDHE with a PSK.

Theory
------
OpenSSL does the handshake (RFC 6347 §4.2), its reassembly and its retransmission; it stands between two memory
buffers. When it has verified, the master secret is taken and OpenSSL's object goes (protection.py).

- *A key takes time.* OpenSSL's callback cannot wait, so the identity is read from the ClientKeyExchange before OpenSSL
  sees its last byte (records.IdentityReader); the datagram waits here until `key` is called. If OpenSSL comes to
  another identity than ours, or to one where we saw none, it gets a random key.
- *A wrong key is told.* To OpenSSL a Finished under a wrong key is one more record that does not verify, discarded in
  silence (RFC 6347 §4.1.2.7), and the device would wait for its own timeouts. That section lets a server answer with
  bad_record_mac; so do we, once, when under a PSK suite everything up to the Finished has come and has not verified.
- *Numbers.* Our first record has the number of the ClientHello (RFC 6347 §4.2.1). OpenSSL's has 1, which a client that
  had to repeat itself has seen already, in a HelloVerifyRequest, and takes for a copy. Records in the clear are
  therefore numbered anew; no key covers these numbers.
- *A flight that is too large for the path.* After the first flight that has to be sent again, one that had large
  datagrams is cut to `fallback_mtu`.

Invariants: OpenSSL is fed one datagram at a time and read until it wants more, so its buffer holds never two.

Time: OpenSSL's retransmission runs on its own clock, which cannot be given; calling too early does nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

from OpenSSL import SSL
from OpenSSL.crypto import FILETYPE_ASN1, dump_certificate

from adapters.dtls import records as wire
from adapters.dtls.admission import DtlsLimits
from adapters.dtls.context import DtlsContext
from adapters.dtls.handshake import End, IdentityNeeded, Outcome, Verified
from adapters.dtls.ports import CertificateProven, NothingProven, Proof, PskKey, PskProven
from adapters.dtls.protection import OPENSSL_SUITES, Prf, Protection
from adapters.dtls.psk_binding import forget_errors
from adapters.dtls.records import (
    PSK_SUITES,
    RECORD_HEADER,
    ClientHello,
    IdentityReader,
    Record,
    agreed_fragment,
    chosen_suite,
    plaintext_alert,
    split_records,
)

_WRITTEN: Final = 4_096  # most flights at once
_CHANGED_CIPHER: Final = b"SSLv3/TLS read change cipher spec"  # OpenSSL's name for "the Finished comes next"
_RANDOM_KEY: Final = 32
_ALERT_ROOM: Final = 16  # record numbers that OpenSSL may have used for alerts that we did not see
_LAST_START: Final = (1 << 48) - 4096  # of our record numbers: no client that counts from 0 comes so far


class OpensslHandshake:
    """One handshake in an OpenSSL connection of `context`. See handshake.Handshake.

    `has_psk`: the client offers a suite with a pre-shared key; `out` is where its datagrams go.
    """

    __slots__ = (
        "_ahead",
        "_connection",
        "_context",
        "_first",
        "_fragment",
        "_identity",
        "_key",
        "_largest",
        "_limits",
        "_out",
        "_reader",
        "_sequences",
        "_waiting",
        "certificate_accepted",
        "certificate_fault",
        "mtu",
    )

    def __init__(self, context: DtlsContext, *, has_psk: bool, limits: DtlsLimits, out: list[bytes]) -> None:
        self.mtu = limits.mtu
        self.certificate_fault: str | None = None
        self.certificate_accepted = False
        self._context = context
        self._limits = limits
        self._out = out
        self._connection = context.connection(limits.mtu, has_psk=has_psk)
        self._sequences = [0, 0]  # next record numbers of epochs 0 and 1 in our direction
        self._first = 0  # record number of the ClientHello, and of our first record
        self._ahead: int | None = None  # of OpenSSL's numbers
        self._largest = 0  # datagram of the last flight
        self._fragment: int | None = None
        self._reader: IdentityReader | None = None
        self._identity: bytes | None = None
        self._key: PskKey | None = None
        self._waiting: tuple[bytes, Sequence[Record]] = (b"", ())  # for the key

    def start(self, hello: ClientHello) -> Outcome:
        """See the seam."""
        self._first = int.from_bytes(hello.record[5:11], "big")
        if self._first > _LAST_START:
            return End.HANDSHAKE_FAILED
        forget_errors()
        try:
            self._connection.bio_write(hello.record)
            # Its messages go on as if it had sent our cookie itself (RFC 6347 §4.2.2).
            self._connection.DTLSv1_listen()
        except SSL.Error:
            return End.HANDSHAKE_FAILED
        outcome = self._step(b"")
        if self._out:
            self._fragment = agreed_fragment(self._out[0])
            if chosen_suite(self._out[0]) in PSK_SUITES:
                self._reader = IdentityReader(hello.message_seq + 1)
        return outcome

    def repeat(self) -> None:
        """See the seam. OpenSSL sends again by its own clock only."""

    def receive(self, datagram: bytes, records: Sequence[Record]) -> Outcome:
        """See the seam."""
        reader = self._reader
        if reader is not None:
            for record in records:
                if record.content == wire.HANDSHAKE and record.epoch == 0:
                    reader.feed(datagram[record.start + RECORD_HEADER : record.end])
            if reader.complete:
                self._reader = None
                self._identity = reader.identity()
                if self._identity is not None:
                    self._waiting = datagram, records
                    return IdentityNeeded(self._identity)
        return self._pass_on(datagram, records)

    def key(self, key: PskKey | None) -> Outcome:
        """See the seam."""
        if key is None:
            self._alert(wire.ALERT_INTERNAL_ERROR)
            return End.KEY_UNAVAILABLE
        self._key = key
        waiting, self._waiting = self._waiting, (b"", ())
        return self._pass_on(*waiting)

    def retransmission_due(self) -> float | None:
        """See the seam."""
        return self._connection.DTLSv1_get_timeout()

    def retransmit(self) -> Outcome:
        """See the seam."""
        if self._largest > self._limits.fallback_mtu < self.mtu:
            self.mtu = self._limits.fallback_mtu
            self._connection.set_ciphertext_mtu(self.mtu)
        forget_errors()
        try:
            self._connection.DTLSv1_handle_timeout()
        except SSL.Error:
            return End.HANDSHAKE_FAILED
        self._collect()
        return None

    # What OpenSSL's callbacks ask in the middle of a step

    def key_of(self, identity: bytes) -> bytes:
        """The prepared key, if it was prepared for this identity."""
        if self._key is None or self._identity != identity:
            return secrets.token_bytes(_RANDOM_KEY)
        return self._key.key.reveal()

    # Steps

    def _pass_on(self, datagram: bytes, records: Sequence[Record]) -> Outcome:
        connection = self._connection
        changed = finished = False
        if self._key is not None:
            for record in records:
                if record.content == wire.CHANGE_CIPHER_SPEC:
                    changed = True
                elif record.epoch == 1:
                    changed = changed or connection.get_state_string() == _CHANGED_CIPHER
                    finished = finished or changed
        outcome = self._step(datagram)
        # OpenSSL is asked too: it may have discarded the ChangeCipherSpec as too early, or as a copy.
        if outcome is None and finished and connection.get_state_string() == _CHANGED_CIPHER:
            self._alert(wire.ALERT_BAD_RECORD_MAC)
            return End.WRONG_KEY
        return outcome

    def _step(self, datagram: bytes) -> Outcome:
        connection = self._connection
        forget_errors()
        self._context.turn = self
        try:
            if datagram:
                connection.bio_write(datagram)
            connection.do_handshake()
        except SSL.WantReadError:
            self._collect()
            return None
        except SSL.Error:
            self._collect()
            return End.CERTIFICATE if self.certificate_fault else End.HANDSHAKE_FAILED
        finally:
            self._context.turn = None
        self._collect()
        return Verified(self._proof(), self._take_over(), self._fragment)

    def _proof(self) -> Proof:
        if self._key is not None and self._identity is not None:  # a PSK suite: neither side shows a certificate
            return PskProven(self._identity, self._key.offer)
        certificate = self._connection.get_peer_certificate()
        if certificate is None:
            return NothingProven()
        return CertificateProven(dump_certificate(FILETYPE_ASN1, certificate))

    def _take_over(self) -> Protection:
        """What is needed to go on without OpenSSL (protection.py says why)."""
        connection = self._connection
        name, master = connection.get_cipher_name(), connection.master_key()
        client, server = connection.client_random(), connection.server_random()
        assert name is not None
        assert master is not None
        assert client is not None
        assert server is not None
        suite = OPENSSL_SUITES[name]
        return Protection(suite, Prf(suite.prf, master), client, server, self._sequences[1])

    # Out

    def _collect(self) -> None:
        """Cut what OpenSSL wrote into datagrams: as many whole records as fit into each (RFC 6347 §4.1.1)."""
        written = _written(self._connection)
        if not written:
            return
        cut, start = len(self._out), 0
        records = split_records(bytes(written))
        if self._ahead is None:
            self._ahead = self._first - records[0].sequence
        for record in records:
            number = record.sequence
            if not record.epoch:
                number += self._ahead
                written[record.start + 5 : record.start + 11] = number.to_bytes(6, "big")
            self._sequences[record.epoch & 1] = max(self._sequences[record.epoch & 1], number + 1)
            if record.end - start > self.mtu and record.start > start:
                self._out.append(bytes(written[start : record.start]))
                start = record.start
        self._out.append(bytes(written[start:]))
        self._largest = max(map(len, self._out[cut:]))

    def _alert(self, description: int) -> None:
        self._out.append(plaintext_alert(description, self._sequences[0] + _ALERT_ROOM))


def _written(connection: SSL.Connection) -> bytearray:
    """All that OpenSSL has written."""
    parts: list[bytes] = []
    try:
        while True:
            parts.append(connection.bio_read(_WRITTEN))
            if len(parts[-1]) < _WRITTEN:
                break
    except SSL.WantReadError:
        pass
    return bytearray().join(parts)
