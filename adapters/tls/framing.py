"""Where TLS records begin and end in a byte stream: the five-byte headers, nothing inside them.

Theory
------
OpenSSL is the judge of records; this counts them, for three reasons that need no decryption (RFC 8446 §5.1):

- knowing how many whole records have arrived says how often to ask for plaintext, so the usual small message costs
  one read and no failing second one, and half a record costs none;
- a first byte that cannot begin a handshake record exposes plaintext HTTP or noise before OpenSSL spends anything;
- in TLS 1.2 a handshake record after the handshake is a renegotiation attempt, visible in its type (RFC 5246 §7.4.1).

The state is how much of the current record is still to come, and up to four bytes of a split header.
"""

from __future__ import annotations

from typing import Final

HANDSHAKE: Final = 22
_TYPES: Final = frozenset((20, 21, 22, 23))  # change_cipher_spec, alert, handshake, application_data
_HEADER: Final = 5
# RFC 5246 §6.2.3: ciphertext may be 2^14 + 2048 long (RFC 8446 §5.2: + 256). OpenSSL applies the exact one.
_MAX_LENGTH: Final = 16_384 + 2_048


class RemoteProtocolError(Exception):
    """The peer's bytes are not TLS records."""


class RecordCounter:
    """Follows one direction of one connection."""

    __slots__ = ("_header", "_missing", "saw_handshake")

    def __init__(self) -> None:
        self._header = b""
        self._missing = 0
        self.saw_handshake = False
        """Whether the latest `feed` contained the start of a handshake record."""

    def feed(self, data: memoryview) -> int:
        """How many records end within `data`. Raises RemoteProtocolError when it cannot be TLS."""
        ended = 0
        self.saw_handshake = False
        size = len(data)
        position = 0
        if self._header:
            position = min(_HEADER - len(self._header), size)
            self._header += bytes(data[:position])
            if len(self._header) < _HEADER:
                return 0
            self._missing = self._length(self._header, 0)
            self._header = b""
            ended += self._missing == 0
        if self._missing:
            taken = min(self._missing, size - position)
            self._missing -= taken
            if self._missing:
                return ended
            position += taken
            ended += 1
        while position < size:
            if size - position < _HEADER:
                if data[position] not in _TYPES:
                    raise RemoteProtocolError("not a TLS record type")
                self._header = bytes(data[position:])
                return ended
            end = position + _HEADER + self._length(data, position)
            if end > size:
                self._missing = end - size
                return ended
            ended += 1
            position = end
        return ended

    def _length(self, data: memoryview | bytes, at: int) -> int:
        kind = data[at]
        if kind == HANDSHAKE:
            self.saw_handshake = True
        elif kind not in _TYPES:
            raise RemoteProtocolError("not a TLS record type")
        if data[at + 1] != 3:
            raise RemoteProtocolError("not a TLS record version")
        length = data[at + 3] << 8 | data[at + 4]
        if length > _MAX_LENGTH:
            raise RemoteProtocolError("a TLS record longer than allowed")
        return length
