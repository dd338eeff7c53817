"""The data types of MQTT: integers, strings, binary data, the variable byte integer. 5.0 §1.5, 3.1.1 §1.5.

Theory
------
`Reader` walks over the body of one packet whose size was capped before it was read, so no length in it can make us
allocate more than the packet itself has; each length is compared with what is left before it is used. It raises
RemoteProtocolError and nothing else. The writers raise LocalProtocolError: what we cannot encode is our bug.
"""

from __future__ import annotations

from typing import Final

from adapters.mqtt.wire_reasons import LocalProtocolError, RemoteProtocolError, malformed

MAX_VARINT: Final = 268_435_455  # 5.0 §1.5.5: four bytes of seven bits
MAX_FIELD: Final = 65_535  # 5.0 §1.5.4, §1.5.6: a two-byte length


class Reader:
    """Reads the fields of one packet in order; `at` is the position in `data`, both in bytes."""

    __slots__ = ("at", "data", "end")

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data = data
        self.at = at
        self.end = len(data)

    def byte(self) -> int:
        """One byte."""
        at = self.at
        if at >= self.end:
            raise _cut()
        self.at = at + 1
        return self.data[at]

    def two(self) -> int:
        """A two byte integer, big-endian (5.0 §1.5.2)."""
        at = self.at
        if at + 2 > self.end:
            raise _cut()
        self.at = at + 2
        return self.data[at] << 8 | self.data[at + 1]

    def four(self) -> int:
        """A four byte integer, big-endian (5.0 §1.5.3)."""
        at = self.at
        if at + 4 > self.end:
            raise _cut()
        self.at = at + 4
        return int.from_bytes(self.data[at : at + 4], "big")

    def varint(self) -> int:
        """A variable byte integer: at most four bytes, in the shortest form [MQTT-1.5.5-1]."""
        value = 0
        shift = 0
        while True:
            part = self.byte()
            value |= (part & 0x7F) << shift
            if part < 0x80:
                break
            shift += 7
            if shift > 21:
                raise malformed("a variable byte integer of more than four bytes")
        if part == 0 and shift:
            raise malformed("a variable byte integer that is longer than needed")
        return value

    def binary(self) -> bytes:
        """Binary data with a two byte length (5.0 §1.5.6)."""
        size = self.two()
        at = self.at
        if at + size > self.end:
            raise _cut()
        self.at = at + size
        return self.data[at : at + size]

    def text(self) -> str:
        """A UTF-8 encoded string: well-formed, no surrogates, no U+0000 [MQTT-1.5.4-1, -2]; U+FEFF stays [-3]."""
        raw = self.binary()
        try:
            value = raw.decode("utf-8", "strict")
        except UnicodeDecodeError:
            raise malformed("a string that is not well-formed UTF-8") from None
        if "\0" in value:
            raise malformed("a string with U+0000")
        return value

    def rest(self) -> bytes:
        """Everything that is left, possibly nothing."""
        at = self.at
        self.at = self.end
        return self.data[at:]

    def finish(self) -> None:
        """Raises unless everything was read: nothing may follow the last field."""
        if self.at != self.end:
            raise malformed(f"{self.end - self.at} bytes after the last field")


def write_two(value: int) -> bytes:
    """A two byte integer."""
    if not 0 <= value <= 0xFFFF:
        raise LocalProtocolError(f"{value} does not fit in two bytes")
    return value.to_bytes(2, "big")


def write_four(value: int) -> bytes:
    """A four byte integer."""
    if not 0 <= value <= 0xFFFF_FFFF:
        raise LocalProtocolError(f"{value} does not fit in four bytes")
    return value.to_bytes(4, "big")


def write_varint(value: int) -> bytes:
    """A variable byte integer in its shortest form."""
    if 0 <= value < 0x80:
        return value.to_bytes(1, "big")
    if not 0 <= value <= MAX_VARINT:
        raise LocalProtocolError(f"{value} does not fit in a variable byte integer")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def write_binary(value: bytes) -> bytes:
    """Binary data with its two byte length."""
    if len(value) > MAX_FIELD:
        raise LocalProtocolError(f"a field of {len(value)} bytes; {MAX_FIELD} fit")
    return len(value).to_bytes(2, "big") + value


def write_text(value: str) -> bytes:
    """A UTF-8 encoded string."""
    if "\0" in value:
        raise LocalProtocolError("a string with U+0000")
    try:
        raw = value.encode("utf-8", "strict")
    except UnicodeEncodeError:
        raise LocalProtocolError("a string with surrogates") from None
    return write_binary(raw)


def _cut() -> RemoteProtocolError:
    return malformed("a field is longer than its packet")
