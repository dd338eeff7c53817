"""The handshake with a pre-shared key and nothing else (RFC 4279 §2), the server's side over DTLS 1.2.

Theory
------
    client                                                      server
    ClientHello (its cookie is good)    ──────────▶
                                        ◀──────────             ServerHello, ServerHelloDone      flight 4
    ClientKeyExchange, ChangeCipherSpec,
    Finished                            ──────────▶                                               flight 5
                                        ◀──────────             ChangeCipherSpec, Finished        flight 6

    OFFERED ──whole ClientKeyExchange──▶ ASKING ──key()──▶ KEYED ──Finished verifies──▶ Verified

No asymmetric cryptography is in it: HMACs, one hash, and an AEAD that protection.py does anyway. What it takes is a
third of what a connection object of OpenSSL takes, which is why it is here; everything else (certificates, ECDHE) is
OpenSSL's. There is no hint of an identity, so no ServerKeyExchange (RFC 4279 §2); no resumption, so the session id is
empty; no renegotiation, so the extension that speaks of it is answered and never used again (RFC 5746 §3.6). The
master secret is bound to the whole handshake where the client can do that (RFC 7627), and the limit on a record's
length is kept to (RFC 6066 §4). All other extensions are passed over, as RFC 5246 §7.4.1.4 has it.

What is hashed are whole messages with the headers of unfragmented ones, from the ClientHello with the cookie on (RFC
6347 §4.2.6). Only ClientKeyExchange may come in fragments; a Finished has 24 bytes.

- *Order.* Datagrams overtake each other. A Finished that comes before the keys is kept, as far as `_EARLY` of them go;
  ChangeCipherSpec says nothing that a key does not say better, but without it nothing under the keys is taken
  (RFC 5246 §7.4.9). What is lost comes again with the client's flight.
- *A wrong key is told.* Under it a Finished is a record that does not verify, which would be discarded in silence and
  leave the device to its time-outs. RFC 6347 §4.1.2.7 lets a server answer bad_record_mac; so do we, once, when the
  keys are there and a Finished has come behind them. The same bytes and the same work for an identity that nobody
  knows: the application gives a random key for it, and nothing here can tell the two apart.
- *Numbers.* Our first record has the number of the ClientHello (RFC 6347 §4.2.1): the HelloVerifyRequest had the
  number of the ClientHello before. A flight that is sent again has new ones (RFC 6347 §4.2.4).
- *Time.* A flight is sent again after 1 s, then 2, 4 … up to 60 (RFC 6347 §4.2.4.1), until the ClientKeyExchange shows
  that it has arrived; sooner where the client says with its ClientHello again that it has not. The last flight has no
  timer: who misses it repeats its Finished (engine.py).

Invariants: the Finished is compared in constant time, before anything is said to be proved; a message counts only
under its own number; nothing of a second ClientKeyExchange is looked at. What can race: nothing. What can be lost:
what UDP loses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Final

from cryptography.hazmat.primitives.constant_time import bytes_eq

from adapters.dtls import records as wire
from adapters.dtls.handshake import End, IdentityNeeded, Outcome, Verified
from adapters.dtls.ports import PskKey, PskProven
from adapters.dtls.protection import PLAIN_PSK_SUITES, Prf, Protection
from adapters.dtls.records import (
    DTLS_12,
    MESSAGE_HEADER,
    RECORD_HEADER,
    ClientHello,
    IdentityReader,
    Record,
    handshake_message,
    plaintext_alert,
    plaintext_record,
    read_extensions,
    read_offer,
    split_records,
)
from registry.secrets import RandomBytes

_SERVER_HELLO: Final = 2
_SERVER_HELLO_DONE: Final = 14
_FINISHED: Final = 20
_VERIFY_DATA: Final = 12  # RFC 5246 §7.4.9
_FINISHED_SIZE: Final = MESSAGE_HEADER + _VERIFY_DATA
_MASTER_SECRET: Final = 48
_RANDOM: Final = 32

_MAX_FRAGMENT_LENGTH: Final = 1  # RFC 6066 §4
_EXTENDED_MASTER_SECRET: Final = 23  # RFC 7627 §5.1
_RENEGOTIATION_INFO: Final = 0xFF01  # RFC 5746 §3.2
_RENEGOTIATION_SCSV: Final = 0x00FF  # RFC 5746 §3.3
_LAST_FRAGMENT_CODE: Final = 4

_EARLY: Final = 4
_EARLY_BYTES: Final = 128  # a Finished has 24 and what its suite adds
_FIRST_TIMEOUT: Final = 1.0
_LAST_TIMEOUT: Final = 60.0
_PAUSE: Final = 0.5  # between two flights, whoever asks: copies that the network made come sooner
_LAST_START: Final = (1 << 48) - 1024  # of our record numbers: no client that counts from 0 comes so far
_FATAL: Final = 2
_CLOSE_NOTIFY: Final = b"\x01\x00"
_CHANGE: Final = b"\x01"  # RFC 5246 §7.1


class _State(Enum):
    OFFERED = auto()
    ASKING = auto()
    KEYED = auto()


class PskHandshake:
    """One handshake under `suite`, the number of one of protection.PLAIN_PSK_SUITES. See handshake.Handshake.

    `clock` is monotonic seconds; `out` is where its datagrams go.
    """

    __slots__ = (
        "_changed_cipher",
        "_clock",
        "_due",
        "_early",
        "_extended",
        "_flight",
        "_fragment",
        "_hello_random",
        "_identity",
        "_in_order",
        "_key",
        "_number",
        "_out",
        "_prf",
        "_protection",
        "_random",
        "_reader",
        "_rest",
        "_sequence",
        "_spoken",
        "_state",
        "_suite",
        "_timeout",
        "mtu",
    )

    def __init__(self, suite: int, out: list[bytes], mtu: int, clock: Callable[[], float], random: RandomBytes) -> None:
        self.mtu = mtu
        self._suite = suite
        self._out = out
        self._clock = clock
        self._random = random(_RANDOM)
        self._state = _State.OFFERED
        self._hello_random = b""
        self._number = 0  # of the message that the client sends next
        self._sequence = 0  # of our next record in the clear
        self._spoken = b""
        self._flight: tuple[bytes, ...] = ()
        self._fragment: int | None = None
        self._extended = False
        self._reader: IdentityReader | None = None
        self._identity = b""
        self._changed_cipher = False
        self._in_order = False  # a ChangeCipherSpec has come behind the ClientKeyExchange
        self._early: list[bytes] = []
        self._rest: tuple[bytes, Sequence[Record]] = (b"", ())
        self._key: PskKey | None = None
        self._prf: Prf | None = None
        self._protection: Protection | None = None
        self._timeout = _FIRST_TIMEOUT
        self._due: float | None = None

    def start(self, hello: ClientHello) -> Outcome:
        """See the seam."""
        self._sequence = int.from_bytes(hello.record[5:11], "big")
        if self._sequence > _LAST_START:
            return End.HANDSHAKE_FAILED
        if hello.version >> 8 != DTLS_12[0] or hello.version > int.from_bytes(DTLS_12, "big"):
            return self._refuse(wire.ALERT_PROTOCOL_VERSION)
        offer, extensions = read_offer(hello), read_extensions(hello)
        if offer is None or extensions is None:
            return self._refuse(wire.ALERT_DECODE_ERROR)
        if 0 not in offer.compressions:
            return self._refuse(wire.ALERT_ILLEGAL_PARAMETER)
        answers = b""
        if _RENEGOTIATION_INFO in extensions or _RENEGOTIATION_SCSV in offer.suites:
            if extensions.get(_RENEGOTIATION_INFO, b"\0") != b"\0":
                return self._refuse(wire.ALERT_HANDSHAKE_FAILURE)  # RFC 5746 §3.6
            answers += b"\xff\x01\0\1\0"
        if (fragment := extensions.get(_MAX_FRAGMENT_LENGTH)) is not None:
            if len(fragment) != 1 or not 1 <= fragment[0] <= _LAST_FRAGMENT_CODE:
                return self._refuse(wire.ALERT_ILLEGAL_PARAMETER)
            self._fragment = 256 << fragment[0]
            answers += b"\0\1\0\1" + fragment
        if (extended := extensions.get(_EXTENDED_MASTER_SECRET)) is not None:
            if extended:
                return self._refuse(wire.ALERT_DECODE_ERROR)
            self._extended = True
            answers += b"\0\x17\0\0"
        self._hello_random = hello.random
        body = b"".join((DTLS_12, self._random, b"\0", self._suite.to_bytes(2, "big"), b"\0"))
        if answers:
            body += len(answers).to_bytes(2, "big") + answers
        ours = hello.message_seq
        self._flight = (
            handshake_message(_SERVER_HELLO, ours, body),
            handshake_message(_SERVER_HELLO_DONE, ours + 1, b""),
        )
        self._number = ours + 1
        self._spoken = hello.record[RECORD_HEADER:] + self._flight[0] + self._flight[1]
        self._reader = IdentityReader(self._number)
        self._send_flight()
        self._due = self._clock() + _FIRST_TIMEOUT
        return None

    def repeat(self) -> None:
        """See the seam."""
        if self._due is not None and self._clock() - (self._due - self._timeout) >= _PAUSE:
            self._send_flight()
            self._due = self._clock() + self._timeout

    def receive(self, datagram: bytes, records: Sequence[Record]) -> Outcome:
        """See the seam."""
        for at, record in enumerate(records):
            outcome = self._take(datagram, record)
            if outcome is not None:
                self._rest = datagram, records[at + 1 :]
                return outcome
        return None

    def key(self, key: PskKey | None) -> Outcome:
        """See the seam."""
        if key is None:
            return self._refuse(wire.ALERT_INTERNAL_ERROR, End.KEY_UNAVAILABLE)
        self._key = key
        self._derive(key.key.reveal())
        self._state = _State.KEYED
        (datagram, records), self._rest = self._rest, (b"", ())
        return self._recall() or self.receive(datagram, records)

    def retransmission_due(self) -> float | None:
        """See the seam."""
        return None if self._due is None else max(0.0, self._due - self._clock())

    def retransmit(self) -> Outcome:
        """See the seam."""
        self._send_flight()
        self._timeout = min(2 * self._timeout, _LAST_TIMEOUT)
        self._due = self._clock() + self._timeout
        return None

    # In

    def _take(self, datagram: bytes, record: Record) -> Outcome:
        fragment = datagram[record.start + RECORD_HEADER : record.end]
        if record.epoch:
            return self._take_protected(datagram, record)
        match record.content:
            case wire.HANDSHAKE:
                return self._take_key_exchange(fragment)
            case wire.CHANGE_CIPHER_SPEC if fragment == _CHANGE:
                self._changed_cipher = True
                self._in_order = self._reader is None
                return self._recall()
            case wire.ALERT if fragment == _CLOSE_NOTIFY or (len(fragment) == 2 and fragment[0] == _FATAL):
                return End.HANDSHAKE_FAILED
            case _:
                return None

    def _take_key_exchange(self, fragment: bytes) -> Outcome:
        reader = self._reader
        if reader is None:
            return None
        reader.feed(fragment)
        if not reader.complete:
            return None
        self._reader = None
        self._due = None  # our flight has arrived
        identity = reader.identity()
        if identity is None or len(reader.body) != 2 + len(identity):
            return self._refuse(wire.ALERT_DECODE_ERROR)
        self._identity = identity
        self._spoken += handshake_message(wire.CLIENT_KEY_EXCHANGE, self._number, reader.body)
        self._state = _State.ASKING
        return IdentityNeeded(identity)

    def _take_protected(self, datagram: bytes, record: Record) -> Outcome:
        protection = self._protection
        if protection is None or not self._changed_cipher:
            if len(self._early) < _EARLY and record.end - record.start <= _EARLY_BYTES:
                self._early.append(datagram[record.start : record.end])
            return None
        plain = protection.verified(datagram, record)
        if plain is not None:
            return self._finish(protection, plain)
        if not self._in_order or record.end - record.start != protection.overhead + _FINISHED_SIZE:
            return None
        return self._refuse(wire.ALERT_BAD_RECORD_MAC, End.WRONG_KEY)

    def _recall(self) -> Outcome:
        """Look again at what came under the keys before it could be read; what does not verify is nobody's word."""
        protection = self._protection
        if protection is None or not self._changed_cipher:
            return None
        early, self._early = self._early, []
        for each in early:
            for record in split_records(each):
                plain = protection.verified(each, record)
                if plain is not None:
                    return self._finish(protection, plain)
        return None

    # Keys

    def _derive(self, key: bytes) -> None:
        suite = PLAIN_PSK_SUITES[self._suite]
        # RFC 4279 §2: as many zeros as the key has bytes, and the key, each behind its length
        length = len(key).to_bytes(2, "big")
        premaster = Prf(suite.prf, b"".join((length, bytes(len(key)), length, key)))
        if self._extended:
            seed = b"extended master secret" + suite.hashed(self._spoken)  # RFC 7627 §4
        else:
            seed = b"master secret" + self._hello_random + self._random  # RFC 5246 §8.1
        self._prf = Prf(suite.prf, premaster(seed, _MASTER_SECRET))
        self._protection = Protection(suite, self._prf, self._hello_random, self._random, 0)

    def _finish(self, protection: Protection, plain: bytes) -> Outcome:
        prf, key = self._prf, self._key
        assert prf is not None
        assert key is not None
        hashed = PLAIN_PSK_SUITES[self._suite].hashed
        theirs = prf(b"client finished" + hashed(self._spoken), _VERIFY_DATA)
        if not bytes_eq(plain, handshake_message(_FINISHED, self._number + 1, theirs)):
            return self._refuse(wire.ALERT_DECRYPT_ERROR)
        ours = prf(b"server finished" + hashed(self._spoken + plain), _VERIFY_DATA)
        finished = protection.seal(wire.HANDSHAKE, handshake_message(_FINISHED, self._number + 1, ours))
        self._out.append(self._in_the_clear(wire.CHANGE_CIPHER_SPEC, _CHANGE) + finished)
        return Verified(PskProven(self._identity, key.offer), protection, self._fragment)

    # Out

    def _send_flight(self) -> None:
        self._out.append(b"".join([self._in_the_clear(wire.HANDSHAKE, each) for each in self._flight]))

    def _in_the_clear(self, content: int, fragment: bytes) -> bytes:
        record = plaintext_record(content, self._sequence, fragment)
        self._sequence += 1
        return record

    def _refuse(self, description: int, end: End = End.HANDSHAKE_FAILED) -> End:
        self._out.append(plaintext_alert(description, self._sequence))
        return end
