"""The records of an established association: sealed, opened, and each taken once. AEAD suites of DTLS 1.2.

Theory
------
OpenSSL does the handshake and proves the keys. It would also keep 62 KB for every association that then sleeps for
an hour, because its object carries the handshake's buffers along (measured; docs/decisions.md). What an established
association really needs is two keys, two counters and a bitmap; so the keys are taken over here, derived from the same
master secret (RFC 5246 §6.3), the OpenSSL object goes, and `cryptography` does the AEAD.

    nonce  = salt(4) ‖ epoch(2) ‖ sequence(6), the last eight sent along     CCM, GCM: RFC 6655 §3, RFC 5288 §3
    nonce  = iv(12) xor (0(4) ‖ epoch(2) ‖ sequence(6)), nothing sent along  ChaCha20: RFC 7905 §2
    AAD    = epoch(2) ‖ sequence(6) ‖ type ‖ version ‖ length of the plain text     RFC 5246 §6.2.3.3, RFC 6347 §4.1.2.1

Invariants
- A nonce is used once: sending goes on behind every number that the handshake used (its object is gone by then and
  sends nothing more), counts up by one, and ends at 2^48 - 1 instead of beginning again (RFC 6347 §4.1).
- A record counts as seen only after it has verified (RFC 6347 §4.1.2.6), so no forgery moves the window.
- What does not verify does not exist: it is discarded without a trace or an answer (RFC 6347 §4.1.2.7).

The window begins empty: the client's Finished, which OpenSSL has taken, may be taken once more. It is no data; its
only effect is our last flight again, which is what a client that repeats it needs (RFC 6347 §4.2.4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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


class _Aead(Protocol):
    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes) -> bytes: ...

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Suite:
    make: Callable[[bytes], _Aead]
    key: int
    iv: int
    tag: int
    prf: type[hashes.HashAlgorithm] = hashes.SHA256


_CCM: Final = _Suite(AESCCM, 16, _SALT, 16)
_CCM8: Final = _Suite(lambda key: AESCCM(key, tag_length=8), 16, _SALT, 8)
_GCM: Final = _Suite(AESGCM, 16, _SALT, 16)
_GCM256: Final = _Suite(AESGCM, 32, _SALT, 16, hashes.SHA384)
_CHACHA: Final = _Suite(ChaCha20Poly1305, 32, _WHOLE_NONCE, 16)

# By OpenSSL's names. Those that end in SHA384 use that hash for the PRF, all others SHA-256 (RFC 5246 §5, RFC 5289
# §3.2, RFC 5487 §2, RFC 6655 §3, RFC 7905 §2).
_SUITES: Final = {
    "PSK-AES128-CCM8": _CCM8,
    "PSK-AES128-CCM": _CCM,
    "PSK-AES128-GCM-SHA256": _GCM,
    "PSK-AES256-GCM-SHA384": _GCM256,
    "ECDHE-PSK-CHACHA20-POLY1305": _CHACHA,
    "ECDHE-ECDSA-AES128-CCM8": _CCM8,
    "ECDHE-ECDSA-AES128-CCM": _CCM,
    "ECDHE-ECDSA-AES128-GCM-SHA256": _GCM,
    "ECDHE-ECDSA-AES256-GCM-SHA384": _GCM256,
    "ECDHE-RSA-AES128-GCM-SHA256": _GCM,
}


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a finished handshake leaves: 48 bytes of master secret, and the two random values of 32 bytes."""

    master: bytes = field(repr=False)
    client_random: bytes
    server_random: bytes


class Protection:
    """The server's side. `suite` is OpenSSL's name of one that context.py offers; `next_sequence` is the first record
    number that epoch 1 has not used in our direction."""

    __slots__ = ("_iv", "_next", "_opener", "_peer_iv", "_sealer", "_seen", "_top", "explicit", "overhead")

    def __init__(self, suite: str, secrets: Secrets, next_sequence: int) -> None:
        chosen = _SUITES[suite]
        size = 2 * (chosen.key + chosen.iv)
        # RFC 5246 §6.3: the server's random value comes first here, and there are no MAC keys.
        seed = b"key expansion" + secrets.server_random + secrets.client_random
        block = _prf(chosen.prf, secrets.master, seed, size)
        ivs = 2 * chosen.key
        self._opener = chosen.make(block[: chosen.key])
        self._sealer = chosen.make(block[chosen.key : ivs])
        self._peer_iv = block[ivs : ivs + chosen.iv]
        self._iv = block[ivs + chosen.iv :]
        self._next = next_sequence
        self._top = -1
        self._seen = 0
        self.explicit = 0 if chosen.iv == _WHOLE_NONCE else _EXPLICIT
        self.overhead = RECORD_HEADER + self.explicit + chosen.tag

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
        if record.epoch != _EPOCH or self._is_seen(record.sequence):
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
            plain = self._opener.decrypt(self._nonce(self._peer_iv, spoken), body, associated)
        except InvalidTag:
            return None
        self._mark(record.sequence)
        return plain

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


def _prf(digest: type[hashes.HashAlgorithm], secret: bytes, seed: bytes, size: int) -> bytes:
    """P_hash of RFC 5246 §5; `seed` begins with the label."""
    keyed = HMAC(secret, digest())  # copied for each use, a quarter of what the standard library's takes
    out, link = b"", seed
    while len(out) < size:
        link = _mac(keyed, link)
        out += _mac(keyed, link + seed)
    return out[:size]


def _mac(keyed: HMAC, message: bytes) -> bytes:
    mac = keyed.copy()
    mac.update(message)
    return mac.finalize()
