"""Where packets begin and end in a byte stream: the fixed header, and the body once it is all there.

Theory
------
    feed(data) ──► buffer ──► next() ──► (first byte, body) … None when the next packet is not complete

The remaining length says how big a packet will be before any of it has arrived (5.0 §2.1.4), so one that is larger
than `max_packet` is refused from its header alone, and the buffer never holds more than one read beyond it. The limit
is the whole packet's size, header included, as Maximum Packet Size counts (5.0 §3.1.2.11.4). Bytes are copied once into
the buffer and once out; consumed ones are given back in large steps, so that many small packets in one read cost no
moving.
"""

from __future__ import annotations

from adapters.mqtt.wire_reasons import ReasonCode, RemoteProtocolError, malformed

_COMPACT = 65_536  # consumed bytes that are worth moving the rest for


class Framer:
    """Cuts one direction of one connection into packets. `max_packet` in bytes; it may change between packets."""

    __slots__ = ("_at", "_buffer", "max_packet")

    def __init__(self, max_packet: int) -> None:
        self.max_packet = max_packet
        self._buffer = bytearray()
        self._at = 0

    @property
    def buffered(self) -> int:
        """Bytes that wait here."""
        return len(self._buffer) - self._at

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the network brought."""
        self._buffer += data

    def next(self) -> tuple[int, bytes] | None:
        """The first byte and the body of the next packet, or None until more is fed.

        Raises RemoteProtocolError for a header that cannot be, or for a packet larger than allowed; the stream has
        no meaning after that.
        """
        buffer = self._buffer
        start = self._at
        end = len(buffer)
        length = 0
        shift = 0
        at = start + 1
        while True:
            if at >= end:
                self._compact()
                return None
            part = buffer[at]
            at += 1
            length |= (part & 0x7F) << shift
            if part < 0x80:
                break
            shift += 7
            if shift > 21:
                raise malformed("a remaining length of more than four bytes")
        if part == 0 and shift:
            raise malformed("a remaining length that is longer than needed")  # [MQTT-1.5.5-1]
        if at - start + length > self.max_packet:
            raise RemoteProtocolError(
                ReasonCode.PACKET_TOO_LARGE,
                f"a packet of {at - start + length} bytes; {self.max_packet} are allowed",
            )
        if end - at < length:
            self._compact()
            return None
        first = buffer[start]
        self._at = at + length
        with memoryview(buffer) as view:
            body = bytes(view[at : at + length])
        if self._at == end:
            self.clear()
        return first, body

    def clear(self) -> None:
        """Forget what waits."""
        self._buffer.clear()
        self._at = 0

    def _compact(self) -> None:
        if self._at >= _COMPACT:
            del self._buffer[: self._at]
            self._at = 0
