"""What must hold for any bytes that reach the MQTT wire: a packet that says itself again, or the declared error."""

from __future__ import annotations

from adapters.mqtt.wire import decode, encode
from adapters.mqtt.wire_framing import Framer
from adapters.mqtt.wire_reasons import RemoteProtocolError, Version


def survives(version: Version, data: bytes | bytearray, max_packet: int = 4_096) -> int:
    """How many packets `data` held before it ended or the declared error came. Any other exception is the failure."""
    framer = Framer(max_packet)
    framer.feed(data)
    decoded = 0
    try:
        while (frame := framer.next()) is not None:
            packet = decode(frame[0], frame[1], version)
            decoded += 1
            if getattr(packet, "version", version) is not version:
                continue  # a CONNECT that says another version than its connection's; the machine judges that
            again = encode(packet, version)
            framed = Framer(len(again) + 5)
            framed.feed(again)
            first, body = framed.next() or (0, b"")
            assert decode(first, body, version) == packet
    except RemoteProtocolError as error:
        if not error.reason.failed or not error.text:
            raise AssertionError("an error without a reason to answer with") from error
    return decoded
