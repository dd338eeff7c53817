"""The records of an established association: sealed, opened, and each taken once. AEAD suites of DTLS 1.2.

Theory
------
A handshake proves the keys. One of OpenSSL's would also keep 62 KB for every association that then sleeps for an
hour, because its object carries the handshake's buffers along (measured; docs/decisions.md). What an established
association really needs is two keys, two counters and a bitmap; so the keys are derived here from the handshake's
master secret (RFC 5246 §6.3), whoever did the handshake, and `cryptography` does the AEAD.

    nonce  = salt(4) ‖ epoch(2) ‖ sequence(6), the last eight sent along     CCM, GCM: RFC 6655 §3, RFC 5288 §3
    nonce  = iv(12) xor (0(4) ‖ epoch(2) ‖ sequence(6)), nothing sent along  ChaCha20: RFC 7905 §2
    AAD    = epoch(2) ‖ sequence(6) ‖ type ‖ version ‖ length of the plain text     RFC 5246 §6.2.3.3, RFC 6347 §4.1.2.1

Invariants
- A nonce is used once: sending goes on behind every number that the handshake used (OpenSSL's object is gone by then
  and sends nothing more), counts up by one, and ends at 2^48 - 1 instead of beginning again (RFC 6347 §4.1).
- A record counts as seen only after it has verified (RFC 6347 §4.1.2.6), so no forgery moves the window.
- What does not verify does not exist: it is discarded without a trace or an answer (RFC 6347 §4.1.2.7).

The window begins empty: the client's Finished, which the handshake has taken, may be taken once more. It is no data;
its only effect is our last flight again, which is what a client that repeats it needs (RFC 6347 §4.2.4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256, sha384
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hmac import HMAC

from adapters.dtls.records import RECORD_HEADER, Record

_VERSION: Final = b"\xfe\xfd"
_EPOCH: Final = 1  # the only one under keys, without renegotiation
_LAST_SEQUENCE: Final = (1 << 48) - 1
_WINDOW: Final = 64  # RFC 6347 §4.1.2.6 asks for 32 at least and suggests 64
_EXPLICIT: Final = 8
_SALT: Final = 4
_WHOLE_NONCE: Final = 12
_SHA256: Final = hashes.SHA256()


class _Aead(Protocol):
    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes) -> bytes: ...

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes) -> bytes: ...


class _Digest(Protocol):
    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Suite:
    """What follows from the agreed suite: sizes in bytes, the AEAD, and the hash of the PRF and of the handshake."""

    make: Callable[[bytes], _Aead]
    key: int
    iv: int
    tag: int
    prf: hashes.HashAlgorithm = field(default_factory=lambda: _SHA256)
    digest: Callable[[bytes], _Digest] = sha256

    def hashed(self, spoken: bytes) -> bytes:
        """The hash of handshake messages (RFC 5246 §7.4.9)."""
        return self.digest(spoken).digest()


_CCM: Final = Suite(AESCCM, 16, _SALT, 16)
_CCM8: Final = Suite(lambda key: AESCCM(key, tag_length=8), 16, _SALT, 8)
_GCM: Final = Suite(AESGCM, 16, _SALT, 16)
_GCM256: Final = Suite(AESGCM, 32, _SALT, 16, hashes.SHA384(), sha384)
_CHACHA: Final = Suite(ChaCha20Poly1305, 32, _WHOLE_NONCE, 16)

# Those that end in SHA384 use that hash for the PRF, all others SHA-256 (RFC 5246 §5, RFC 5289 §3.2, RFC 5487 §2,
# RFC 6655 §3, RFC 7905 §2).
PLAIN_PSK_SUITES: Final = {0x00A8: _GCM, 0x00A9: _GCM256, 0xC0A4: _CCM, 0xC0A8: _CCM8}
"""The suites of plain PSK, by their numbers (RFC 5487 §3.1, RFC 6655 §3)."""

OPENSSL_SUITES: Final = {
    "PSK-AES128-GCM-SHA256": _GCM,  # behind ECDHE with a curve that we do not have
    "PSK-AES256-GCM-SHA384": _GCM256,
    "PSK-AES128-CCM": _CCM,
    "PSK-AES128-CCM8": _CCM8,
    "ECDHE-PSK-CHACHA20-POLY1305": _CHACHA,
    "ECDHE-ECDSA-AES128-CCM8": _CCM8,
    "ECDHE-ECDSA-AES128-CCM": _CCM,
    "ECDHE-ECDSA-AES128-GCM-SHA256": _GCM,
    "ECDHE-ECDSA-AES256-GCM-SHA384": _GCM256,
    "ECDHE-RSA-AES128-GCM-SHA256": _GCM,
}
"""The suites of OpenSSL's handshakes, by its names: those that context.py offers."""


class Prf:
    """The pseudorandom function under one secret: P_hash of RFC 5246 §5. A call's `seed` begins with the label."""

    __slots__ = ("_keyed",)

    def __init__(self, digest: hashes.HashAlgorithm, secret: bytes) -> None:
        self._keyed = HMAC(secret, digest)  # copied for each use, a quarter of what the standard library's takes

    def __call__(self, seed: bytes, size: int) -> bytes:
        keyed, out, link = self._keyed, b"", seed
        while len(out) < size:
            mac = keyed.copy()
            mac.update(link)
            link = mac.finalize()
            mac = keyed.copy()
            mac.update(link + seed)
            out += mac.finalize()
        return out[:size]


class Protection:
    """The server's side. `master` is the PRF under the master secret, the random values have 32 bytes each;
    `next_sequence` is the first record number that epoch 1 has not used in our direction."""

    __slots__ = ("_iv", "_next", "_opener", "_peer_iv", "_sealer", "_seen", "_top", "explicit", "overhead")

    def __init__(
        self, suite: Suite, master: Prf, client_random: bytes, server_random: bytes, next_sequence: int
    ) -> None:
        ivs = 2 * suite.key
        # RFC 5246 §6.3: the server's random value comes first here, and there are no MAC keys.
        block = master(b"key expansion" + server_random + client_random, ivs + 2 * suite.iv)
        self._opener = suite.make(block[: suite.key])
        self._sealer = suite.make(block[suite.key : ivs])
        self._peer_iv = block[ivs : ivs + suite.iv]
        self._iv = block[ivs + suite.iv :]
        self._next = next_sequence
        self._top = -1
        self._seen = 0
        self.explicit = 0 if suite.iv == _WHOLE_NONCE else _EXPLICIT
        self.overhead = RECORD_HEADER + self.explicit + suite.tag

    def seal(self, content: int, plain: bytes) -> bytes:
        """One whole record. Raises OverflowError when all record numbers are used."""
        if self._next > _LAST_SEQUENCE:
            raise OverflowError("every record number of this association has been used")
        number = (_EPOCH << 48 | self._next).to_bytes(8, "big")
        self._next += 1
        start = bytes((content,)) + _VERSION
        sealed = self._sealer.encrypt(
            self._nonce(self._iv, number), plain, number + start + len(plain).to_bytes(2, "big")
        )
        length = (self.explicit + len(sealed)).to_bytes(2, "big")
        return start + number + length + (number + sealed if self.explicit else sealed)

    def open(self, datagram: bytes, record: Record) -> bytes | None:
        """The plain text of a record that verifies and is new; None for any other."""
        if self._is_seen(record.sequence):
            return None
        plain = self.verified(datagram, record)
        if plain is not None:
            self._mark(record.sequence)
        return plain

    def verified(self, datagram: bytes, record: Record) -> bytes | None:
        """The plain text of a record that verifies, new or not; None for any other."""
        if record.epoch != _EPOCH:
            return None
        start = record.start + RECORD_HEADER
        body = datagram[start + self.explicit : record.end]
        length = record.end - record.start - self.overhead
        if length < 0:
            return None
        number = datagram[record.start + 3 : record.start + 11]
        # The sender chooses the explicit part (RFC 5288 §3); nearly all choose the record's number.
        spoken = datagram[start : start + _EXPLICIT] if self.explicit else number
        associated = number + datagram[record.start : record.start + 3] + length.to_bytes(2, "big")
        try:
            return self._opener.decrypt(self._nonce(self._peer_iv, spoken), body, associated)
        except InvalidTag:
            return None

    def _nonce(self, iv: bytes, number: bytes) -> bytes:
        if len(iv) == _SALT:
            return iv + number
        return (int.from_bytes(iv, "big") ^ int.from_bytes(number, "big")).to_bytes(_WHOLE_NONCE, "big")

    def _is_seen(self, sequence: int) -> bool:
        back = self._top - sequence
        return back >= 0 and (back >= _WINDOW or bool(self._seen >> back & 1))

    def _mark(self, sequence: int) -> None:
        ahead = sequence - self._top
        if ahead > 0:
            self._seen = (self._seen << ahead | 1) & ((1 << _WINDOW) - 1) if ahead < _WINDOW else 1
            self._top = sequence
        else:
            self._seen |= 1 << -ahead
