"""A DTLS 1.2 client with a pre-shared key that costs little: a load generator must not be what is measured.

Theory
------
    HELLO ──HelloVerifyRequest──▶ COOKIE ──ServerHelloDone──▶ FINISHED ──the server's Finished──▶ OPEN

One suite, PSK-AES128-GCM-SHA256 (RFC 5487 §3.1), one flight at a time, no retransmission, no extension: a fraction of
what OpenSSL takes for the same in a Python process (the table of docs/benchmarks.md shows what it took). It is for a
loopback network and for servers that are trusted: the server's Finished is decrypted, which proves the key, and not
compared. What does not fit raises ProtocolError, so that a broken server cannot look fast.

Requests are sealed before the clock starts (`seal`) and answers are opened after it has stopped (`open`), so that
meanwhile the generator only sends and receives.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from enum import Enum, auto
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CHANGE_CIPHER_SPEC: Final = 20
ALERT: Final = 21
HANDSHAKE: Final = 22
APPLICATION_DATA: Final = 23
_RECORD: Final = 13
_MESSAGE: Final = 12
_VERSION: Final = b"\xfe\xfd"
_SUITE: Final = b"\x00\xa8"
_CLOSE_NOTIFY: Final = b"\x01\x00"
_HELLO_VERIFY, _SERVER_HELLO, _SERVER_KEY_EXCHANGE, _SERVER_DONE = 3, 2, 12, 14


class ProtocolError(Exception):
    """The server said what this client does not expect."""


class Stage(Enum):
    """What the server is to say next; OPEN when the handshake is over."""

    HELLO = auto()
    COOKIE = auto()
    FINISHED = auto()
    OPEN = auto()


class PskClient:
    """One association with one server. `identity` and `key` as the device has them."""

    __slots__ = ("_identity", "_opener", "_peer_salt", "_premaster", "_random", "_salt", "_sealer", "_sent",
                 "_server_random", "_spoken", "stage")  # fmt: skip

    def __init__(self, identity: bytes, key: bytes) -> None:
        self._identity = identity
        # RFC 4279 §2: as many zeros as the key has bytes, and the key, each behind its length
        length = len(key).to_bytes(2, "big")
        self._premaster = length + bytes(len(key)) + length + key
        self.stage = Stage.HELLO
        self._sent = 0

    def hello(self) -> bytes:
        """The first datagram."""
        self.stage = Stage.HELLO
        self._sent = 0
        self._random = os.urandom(32)
        return _record(HANDSHAKE, 0, _message(1, 0, self._hello(b"")))

    def receive(self, datagram: bytes) -> bytes | None:
        """The next datagram to send; None when the server has not finished its flight, or the handshake is over.

        Raises ProtocolError.
        """
        at, end = 0, len(datagram)
        answer = None
        while at < end:
            stop = at + _RECORD + (datagram[at + 11] << 8 | datagram[at + 12])
            content, epoch = datagram[at], datagram[at + 4]
            if content == ALERT and epoch == 0:
                raise ProtocolError(f"alert {datagram[stop - 1]}")
            if content == HANDSHAKE and epoch == 1 and self.stage is Stage.FINISHED:
                self._decrypt(datagram[at:stop])
                self.stage = Stage.OPEN
                self._sent = 1
            elif content == HANDSHAKE and epoch == 0:
                at += _RECORD
                while at < stop:
                    after = at + _MESSAGE + int.from_bytes(datagram[at + 9 : at + 12], "big")
                    answer = self._take(datagram[at:after]) or answer
                    at = after
            at = stop
        return answer

    def seal(self, plain: bytes) -> bytes:
        """One record of application data."""
        return self._encrypt(APPLICATION_DATA, plain)

    def close_notify(self) -> bytes:
        """The goodbye (RFC 5246 §7.2.1)."""
        return self._encrypt(ALERT, _CLOSE_NOTIFY)

    def open(self, datagram: bytes) -> bytes | None:
        """What the first record of a datagram says; None when it is no application data. Raises InvalidTag."""
        return self._decrypt(datagram) if datagram[0] == APPLICATION_DATA else None

    def _hello(self, cookie: bytes) -> bytes:
        # version, random, no session id, cookie, the suite, no compression
        return b"".join(
            (_VERSION, self._random, b"\0", bytes((len(cookie),)), cookie, b"\0\2", _SUITE, b"\1\0")
        )  # fmt: skip

    def _take(self, message: bytes) -> bytes | None:
        kind, stage = message[0], self.stage
        if kind == _HELLO_VERIFY and stage is Stage.HELLO:
            self.stage = Stage.COOKIE
            hello = _message(1, 1, self._hello(message[_MESSAGE + 3 :]))
            self._spoken = [hello]  # RFC 6347 §4.2.1: without the first exchange
            return _record(HANDSHAKE, 1, hello)
        if stage is not Stage.COOKIE:
            if kind in (_SERVER_HELLO, _SERVER_KEY_EXCHANGE, _SERVER_DONE, _HELLO_VERIFY):
                return None  # again
            raise ProtocolError(f"message {kind} at {stage.name}")
        self._spoken.append(message)
        if kind == _SERVER_HELLO:
            self._server_random = message[_MESSAGE + 2 : _MESSAGE + 34]
            suite = _MESSAGE + 35 + message[_MESSAGE + 34]
            if message[suite : suite + 2] != _SUITE:
                raise ProtocolError(f"suite {message[suite : suite + 2].hex()}")
        elif kind == _SERVER_DONE:
            return self._finish()
        elif kind != _SERVER_KEY_EXCHANGE:
            raise ProtocolError(f"message {kind}")
        return None

    def _finish(self) -> bytes:
        exchange = _message(16, 2, len(self._identity).to_bytes(2, "big") + self._identity)
        self._spoken.append(exchange)
        randoms = self._random, self._server_random
        master = _prf(self._premaster, b"master secret" + b"".join(randoms), 48)
        block = _prf(master, b"key expansion" + self._server_random + self._random, 40)  # RFC 5246 §6.3
        self._sealer, self._opener = AESGCM(block[:16]), AESGCM(block[16:32])
        self._salt, self._peer_salt = block[32:36], block[36:40]
        said = hashlib.sha256(b"".join(self._spoken)).digest()
        finished = _message(20, 3, _prf(master, b"client finished" + said, 12))
        self.stage = Stage.FINISHED
        self._sent = 0
        return b"".join(
            (_record(HANDSHAKE, 2, exchange), _record(CHANGE_CIPHER_SPEC, 3, b"\1"), self._encrypt(HANDSHAKE, finished))
        )

    def _encrypt(self, content: int, plain: bytes) -> bytes:
        number = (1 << 48 | self._sent).to_bytes(8, "big")
        self._sent += 1
        start = bytes((content,)) + _VERSION
        sealed = self._sealer.encrypt(self._salt + number, plain, number + start + len(plain).to_bytes(2, "big"))
        return b"".join((start, number, (8 + len(sealed)).to_bytes(2, "big"), number, sealed))

    def _decrypt(self, record: bytes) -> bytes:
        end = _RECORD + (record[11] << 8 | record[12])
        nonce, body = record[_RECORD : _RECORD + 8], record[_RECORD + 8 : end]
        said = record[3:11] + record[:3] + (len(body) - 16).to_bytes(2, "big")
        return self._opener.decrypt(self._peer_salt + nonce, body, said)


def _record(content: int, number: int, fragment: bytes) -> bytes:
    return b"".join(
        (bytes((content,)), _VERSION, number.to_bytes(8, "big"), len(fragment).to_bytes(2, "big"), fragment)
    )


def _message(kind: int, number: int, body: bytes) -> bytes:
    length = len(body).to_bytes(3, "big")
    return b"".join((bytes((kind,)), length, number.to_bytes(2, "big"), b"\0\0\0", length, body))


def _prf(secret: bytes, seed: bytes, size: int) -> bytes:
    """P_SHA256 of RFC 5246 §5; `seed` begins with the label."""
    out, link = b"", seed
    while len(out) < size:
        link = hmac.digest(secret, link, "sha256")
        out += hmac.digest(secret, link + seed, "sha256")
    return out[:size]
