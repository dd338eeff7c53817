"""One DTLS association, from its ClientHello with a good cookie to its end. Datagrams in, events and datagrams out.

Theory
------
OpenSSL does the handshake (RFC 6347 §4.2), its reassembly and its retransmission; it stands between two memory
buffers. Afterwards the keys are taken over and OpenSSL's object goes (protection.py). This machine adds what OpenSSL
cannot do by itself:

    SHAKING ──whole ClientKeyExchange of a PSK suite──▶ WAITING ──key()──▶ SHAKING ──verified──▶ OPEN ──▶ ENDED
       └── failed, timed out, refused ─────────────────────┴──────────────────────────────────────────▶ ENDED

- *A key takes time.* OpenSSL's callback cannot wait, so the identity is read from the ClientKeyExchange before OpenSSL
  sees its last byte (records.IdentityReader). The datagrams of this peer are held, at most `held_datagrams`, until
  `key` is called; more are dropped, and sent again by the peer. If OpenSSL comes to another identity than ours, or to
  one where we saw none, it gets a random key.
- *A wrong key is told.* To OpenSSL a Finished under a wrong key is one more record that does not verify, discarded in
  silence (RFC 6347 §4.1.2.7), and the device would wait for its own timeouts. That section lets a server answer with
  bad_record_mac; so do we, once, when under a PSK suite everything up to the Finished has come and has not verified.
  The same bytes for a wrong key and for an identity that nobody knows.
- *A flight that is too large for the path.* After the first flight that has to be sent again, one that had large
  datagrams is cut to `fallback_mtu`.
- *What OpenSSL would keep.* Records of the next epoch that come too early are kept in a buffer of 16 KB each, so their
  number is bounded here, as are all bytes of a handshake.

Invariants: OpenSSL is fed one datagram at a time and read until it wants more, so its buffer holds never two; events
of one call are in order; after ENDED nothing is sent or accepted, but `datagrams` may still be collected once.

Time: OpenSSL's retransmission runs on its own clock, which cannot be given. `retransmission_due` hides that: it says
in how many seconds `retransmit` is to be called, and calling too early does nothing.

What can race: `key` may come after the end; then it does nothing. What can be lost: what UDP loses.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from typing import Final

from OpenSSL import SSL
from OpenSSL.crypto import FILETYPE_ASN1, dump_certificate

from adapters.dtls import records as wire
from adapters.dtls.admission import Drop, DtlsCounters, DtlsLimits
from adapters.dtls.context import DtlsContext
from adapters.dtls.ports import CertificateProven, NothingProven, Proof, PskKey, PskProven
from adapters.dtls.protection import Protection, Secrets
from adapters.dtls.psk_binding import forget_errors
from adapters.dtls.records import (
    PSK_SUITES,
    RECORD_HEADER,
    ClientHello,
    IdentityReader,
    Record,
    agreed_fragment,
    chosen_suite,
    offers_psk,
    plaintext_alert,
    split_records,
)

_FINISHED: Final = b"\x14"  # RFC 5246 §7.4: the message's type
_CLOSE_NOTIFY: Final = b"\x01\x00"  # RFC 5246 §7.2.1, at level warning
_FATAL: Final = b"\x02"
_WRITTEN: Final = 4_096  # most flights at once
_CHANGED_CIPHER: Final = b"SSLv3/TLS read change cipher spec"  # OpenSSL's name for "the Finished comes next"
_RANDOM_KEY: Final = 32
_ALERT_ROOM: Final = 16  # record numbers that OpenSSL may have used for alerts that we did not see


class End(StrEnum):
    """Why an association, or the handshake that should have become one, has ended."""

    CLOSED_BY_PEER = "closed by the peer"
    ABORTED_BY_PEER = "aborted by the peer"
    HANDSHAKE_FAILED = "the handshake failed"
    HANDSHAKE_OVERSIZED = "the handshake was too large"
    WRONG_KEY = "the key did not verify"
    CERTIFICATE = "the certificate is not one for this"
    KEY_UNAVAILABLE = "no key could be had"


@dataclass(frozen=True, slots=True)
class IdentityNeeded:
    """Call `key` with what the application gives for this identity; until then the peer's datagrams wait."""

    identity: bytes


@dataclass(frozen=True, slots=True)
class Established:
    """The handshake has verified."""

    proof: Proof


@dataclass(frozen=True, slots=True)
class Received:
    """One decrypted datagram."""

    datagram: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ended:
    """It is over; nothing follows."""

    reason: End


Event = IdentityNeeded | Established | Received | Ended


class _State(Enum):
    SHAKING = auto()
    WAITING = auto()
    OPEN = auto()
    ENDED = auto()


class _Handshake:
    """What is needed until the handshake has verified, and let go then."""

    __slots__ = ("bytes", "changed_cipher", "early", "finished", "held", "identity", "key", "largest", "reader")

    def __init__(self, hello: ClientHello) -> None:
        self.bytes = 0
        self.early = 0
        self.held: list[tuple[bytes, list[Record]]] = []
        self.reader: IdentityReader | None = IdentityReader(hello.message_seq + 1)
        self.identity: bytes | None = None
        self.key: PskKey | None = None
        self.largest = 0


class DtlsEngine:
    """Carries one association. `hello` has a good cookie: the caller has judged it.

    Every method that returns events may also have made datagrams: collect them with `datagrams` and send them first.
    """

    __slots__ = (
        "_connection",
        "_context",
        "_counters",
        "_fragment",
        "_handshake",
        "_last_flight",
        "_limits",
        "_out",
        "_protection",
        "_sequences",
        "_state",
        "certificate_accepted",
        "certificate_fault",
        "mtu",
    )

    def __init__(
        self, context: DtlsContext, hello: ClientHello, limits: DtlsLimits, counters: DtlsCounters | None = None
    ) -> None:
        self._context = context
        self._limits = limits
        self._counters = counters or DtlsCounters()
        self._state = _State.SHAKING
        self._out: list[bytes] = []
        self._sequences = [0, 0]  # next record numbers of epochs 0 and 1 in our direction
        self._protection: Protection | None = None
        self._last_flight: tuple[bytes, ...] = ()
        self.mtu = limits.mtu
        self.certificate_fault: str | None = None
        self.certificate_accepted = False
        self._fragment: int | None = None  # the most that one record may carry, where the client has a limit
        self._connection: SSL.Connection | None = context.connection(limits.mtu, has_psk=offers_psk(hello))
        self._handshake: _Handshake | None = _Handshake(hello)

    def start(self, hello: ClientHello) -> list[Event]:
        """Answer the ClientHello with the first flight, or end."""
        connection, handshake = self._connection, self._handshake
        assert connection is not None
        assert handshake is not None
        forget_errors()
        try:
            connection.bio_write(hello.record)
            # It begins at the number of this very ClientHello (RFC 6347 §4.2.2), as if it had sent our cookie itself.
            connection.DTLSv1_listen()
        except SSL.Error:
            return self._end(End.HANDSHAKE_FAILED)
        events = self._step(connection, b"")
        if self._out:
            self._fragment = agreed_fragment(self._out[0])
            if chosen_suite(self._out[0]) not in PSK_SUITES:
                handshake.reader = None
        return events

    @property
    def returned(self) -> bool:
        """Whether the peer has come back since the first flight: it read what went to its address."""
        return self._handshake is None or self._handshake.bytes > 0

    @property
    def room(self) -> int:
        """Bytes that one call of `send` takes at most; 0 when it is not open."""
        if self._protection is None:
            return 0
        path = self.mtu - self._protection.overhead
        return path if self._fragment is None else min(path, self._fragment)

    def datagrams(self) -> list[bytes]:
        """What is to be sent now, each at most `mtu` bytes."""
        out, self._out = self._out, []
        return out

    def receive(self, datagram: bytes) -> list[Event]:
        """Take one datagram of the peer. Anything may be in it; nothing raises."""
        if self._state is _State.OPEN:
            return self._open(datagram)
        match self._state:
            case _State.SHAKING:
                return self._shake(datagram)
            case _State.WAITING:
                self._hold(datagram)
                return []
            case _State.ENDED:
                return []

    def key(self, key: PskKey | None) -> list[Event]:
        """The answer to IdentityNeeded; None when there can be none now, which ends the handshake."""
        handshake = self._handshake
        if self._state is not _State.WAITING or handshake is None:
            return []
        if key is None:
            self._alert(wire.ALERT_INTERNAL_ERROR)
            return self._end(End.KEY_UNAVAILABLE)
        self._state = _State.SHAKING
        handshake.key = key
        held, handshake.held = handshake.held, []
        events: list[Event] = []
        for datagram, records in held:
            events += self._pass_on(datagram, records) if self._state is _State.SHAKING else self.receive(datagram)
        return events

    def send(self, datagram: bytes) -> None:
        """Encrypt one datagram of at most `room` bytes. Raises ValueError when it is larger; after the end nothing."""
        if self._state is not _State.OPEN or not datagram:
            return
        if len(datagram) > self.room:
            raise ValueError(f"a datagram of {len(datagram)} bytes; there is room for {self.room}")
        assert self._protection is not None
        self._out.append(self._protection.seal(wire.APPLICATION_DATA, datagram))

    def close(self) -> None:
        """End with close_notify (RFC 5246 §7.2.1); an unfinished handshake ends without a word."""
        if self._protection is not None:
            self._out.append(self._protection.seal(wire.ALERT, _CLOSE_NOTIFY))
        self._forget()

    def retransmission_due(self) -> float | None:
        """Seconds until `retransmit` is to be called; None when no flight waits for an answer."""
        if self._connection is None or self._handshake is None:
            return None
        return self._connection.DTLSv1_get_timeout()

    def retransmit(self) -> list[Event]:
        """Send the last flight again if its time has come (RFC 6347 §4.2.4)."""
        connection, handshake = self._connection, self._handshake
        if connection is None or handshake is None:
            return []
        due = connection.DTLSv1_get_timeout()
        if due is None or due > 0:
            return []
        self._counters.retransmitted += 1
        if handshake.largest > self._limits.fallback_mtu < self.mtu:
            self.mtu = self._limits.fallback_mtu
            connection.set_ciphertext_mtu(self.mtu)
        forget_errors()
        try:
            connection.DTLSv1_handle_timeout()
        except SSL.Error:
            return self._end(End.HANDSHAKE_FAILED)
        self._collect(connection)
        return []

    # What OpenSSL's callbacks ask in the middle of a step

    def key_of(self, identity: bytes) -> bytes:
        """The prepared key, if it was prepared for this identity."""
        handshake = self._handshake
        if handshake is None or handshake.key is None or handshake.identity != identity:
            return secrets.token_bytes(_RANDOM_KEY)
        return handshake.key.key.reveal()

    # Shaking hands

    def _shake(self, datagram: bytes) -> list[Event]:
        handshake = self._handshake
        assert handshake is not None
        datagram, records = self._screen(handshake, datagram)
        if not records:
            return []
        handshake.bytes += len(datagram)
        if handshake.bytes > self._limits.handshake_bytes:
            return self._end(End.HANDSHAKE_OVERSIZED)
        reader = handshake.reader
        if reader is not None:
            for record in records:
                if record.content == wire.HANDSHAKE and record.epoch == 0:
                    reader.feed(datagram[record.start + RECORD_HEADER : record.end])
            if reader.complete:
                handshake.reader = None
                handshake.identity = reader.identity()
                if handshake.identity is not None:
                    self._state = _State.WAITING
                    handshake.held.append((datagram, records))
                    return [IdentityNeeded(handshake.identity)]
        return self._pass_on(datagram, records)

    def _screen(self, handshake: _Handshake, datagram: bytes) -> tuple[bytes, list[Record]]:
        """The datagram without the records that a handshake has no use for."""
        records = split_records(datagram)
        wanted = [record for record in records if self._wanted(handshake, record)]
        if len(wanted) == len(records):
            return datagram, records
        cut = b"".join(datagram[record.start : record.end] for record in wanted)
        return cut, split_records(cut)

    def _wanted(self, handshake: _Handshake, record: Record) -> bool:
        if record.epoch == 0:
            return record.content != wire.APPLICATION_DATA
        if record.epoch > 1 or record.content != wire.HANDSHAKE:
            return False
        handshake.early += 1
        return handshake.early <= self._limits.handshake_early_records

    def _hold(self, datagram: bytes) -> None:
        handshake = self._handshake
        assert handshake is not None
        if len(handshake.held) >= self._limits.held_datagrams:
            self._counters.drop(Drop.HELD)
            return
        datagram, records = self._screen(handshake, datagram)
        handshake.bytes += len(datagram)
        if records and handshake.bytes <= self._limits.handshake_bytes:
            handshake.held.append((datagram, records))

    def _pass_on(self, datagram: bytes, records: list[Record]) -> list[Event]:
        connection, handshake = self._connection, self._handshake
        assert connection is not None
        assert handshake is not None
        changed = finished = False
        if handshake.key is not None:
            for record in records:
                if record.content == wire.CHANGE_CIPHER_SPEC:
                    changed = True
                elif record.epoch == 1:
                    changed = changed or connection.get_state_string() == _CHANGED_CIPHER
                    finished = finished or changed
        events = self._step(connection, datagram)
        # OpenSSL is asked too: it may have discarded the ChangeCipherSpec as too early, or as a copy.
        if self._state is _State.SHAKING and finished and connection.get_state_string() == _CHANGED_CIPHER:
            self._alert(wire.ALERT_BAD_RECORD_MAC)
            return self._end(End.WRONG_KEY)
        return events

    def _step(self, connection: SSL.Connection, datagram: bytes) -> list[Event]:
        forget_errors()
        self._context.turn = self
        try:
            if datagram:
                connection.bio_write(datagram)
            connection.do_handshake()
        except SSL.WantReadError:
            self._collect(connection)
            return []
        except SSL.Error:
            self._collect(connection)
            return self._end(End.CERTIFICATE if self.certificate_fault else End.HANDSHAKE_FAILED)
        finally:
            self._context.turn = None
        self._collect(connection)
        return self._establish(connection)

    def _establish(self, connection: SSL.Connection) -> list[Event]:
        handshake, self._handshake = self._handshake, None
        assert handshake is not None
        self._state = _State.OPEN
        self._take_over(connection)
        proof: Proof
        if handshake.key is not None and handshake.identity is not None:  # a PSK suite: neither shows a certificate
            proof = PskProven(handshake.identity, handshake.key.offer)
        elif (certificate := connection.get_peer_certificate()) is not None:
            proof = CertificateProven(dump_certificate(FILETYPE_ASN1, certificate))
        else:
            proof = NothingProven()
        return [Established(proof)]

    def _take_over(self, connection: SSL.Connection) -> None:
        """Go on without OpenSSL (protection.py says why)."""
        suite, master = connection.get_cipher_name(), connection.master_key()
        client, server = connection.client_random(), connection.server_random()
        assert suite is not None
        assert master is not None
        assert client is not None
        assert server is not None
        self._protection = Protection(suite, Secrets(master, client, server), self._sequences[1])
        self._last_flight = tuple(self._out)
        self._connection = None

    # Open

    def _open(self, datagram: bytes) -> list[Event]:
        protection = self._protection
        assert protection is not None
        events: list[Event] = []
        for record in split_records(datagram):
            plain = protection.open(datagram, record)
            if plain is None:
                continue
            match record.content:
                case wire.APPLICATION_DATA:
                    self._last_flight = ()  # it has arrived: the peer would not have gone on without it
                    if plain:
                        events.append(Received(plain))
                case wire.HANDSHAKE if plain[:1] == _FINISHED:
                    self._out += self._last_flight
                case wire.ALERT if plain == _CLOSE_NOTIFY:
                    self.close()
                    events.append(Ended(End.CLOSED_BY_PEER))
                    break
                case wire.ALERT if plain[:1] == _FATAL:
                    events += self._end(End.ABORTED_BY_PEER)
                    break
                case _:  # a warning, or an attempt to renegotiate, which may be ignored (RFC 5246 §7.4.1.1)
                    pass
        return events

    # Out

    def _collect(self, connection: SSL.Connection) -> None:
        """Cut what OpenSSL wrote into datagrams: as many whole records as fit into each (RFC 6347 §4.1.1)."""
        written = _written(connection)
        start, handshake = 0, self._handshake
        for record in split_records(written):
            self._sequences[record.epoch & 1] = max(self._sequences[record.epoch & 1], record.sequence + 1)
            if record.end - start > self.mtu and record.start > start:
                self._out.append(written[start : record.start])
                start = record.start
        if written:
            self._out.append(written[start:])
        if handshake is not None:
            handshake.largest = max(map(len, self._out), default=0)

    def _alert(self, description: int) -> None:
        self._out.append(plaintext_alert(description, self._sequences[0] + _ALERT_ROOM))

    def _end(self, reason: End) -> list[Event]:
        self._forget()
        return [Ended(reason)]

    def _forget(self) -> None:
        self._state = _State.ENDED
        self._connection = self._protection = None
        self._last_flight = ()
        self._handshake = None


def _written(connection: SSL.Connection) -> bytes:
    """All that OpenSSL has written."""
    parts: list[bytes] = []
    try:
        while True:
            parts.append(connection.bio_read(_WRITTEN))
            if len(parts[-1]) < _WRITTEN:
                break
    except SSL.WantReadError:
        pass
    return b"".join(parts)
