"""WebSocket frames around MQTT's bytes, without the network: what came in one read in, MQTT's bytes and duties out.

MQTT sees one stream: neither frames nor messages have to end where packets do [MQTT-6.0.0-2], so payloads are handed
on as they come, and nothing waits for the end of a frame or of a message. wsproto keeps the rules of RFC 6455: masks,
lengths, reserved bits, control frames in between, close codes. No extension is offered, so none is ever in use.

    OPEN ──Close, or anything wrong──▶ `Received.end` is set: answer with it and close; nothing after it is looked at

Only binary messages carry MQTT; a text one ends the connection [MQTT-6.0.0-1]. What is wrong never loses what was
right before it: the payload up to there is in the same `Received`.

What a peer could send without end is bounded: a message, its fragments, and the frames of one read that carry nothing.
The frames are cheap to send and cost us about 8 µs each, and no clock of MQTT's is stopped by them. Of several pings in
a read only the last is answered (RFC 6455 §5.5.3), so a ping flood makes no flood of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Pong, TextMessage
from wsproto.frame_protocol import CloseReason

__all__ = ["CloseReason", "End", "Frames", "Received", "WebSocketLimits"]


@dataclass(frozen=True, slots=True)
class WebSocketLimits:
    """Sizes in bytes."""

    message_bytes: int = 4_194_304  # nothing of it is kept; a client that sends its whole backlog at once has less
    fragments: int = 4_096  # of one message; clients that fragment at all do so at a kilobyte or more
    empty_frames: int = 64  # of one read: pings, pongs and frames without payload; clients ping a few times a minute


@dataclass(frozen=True, slots=True)
class End:
    """The connection is to be closed with this code. `violation`: the peer broke a rule; otherwise it said goodbye."""

    code: int
    text: str
    violation: bool


@dataclass(frozen=True, slots=True)
class Received:
    """What a read has brought. `payload` are MQTT's bytes; `ping`, unless None, is to be answered with a pong."""

    payload: bytes
    ping: bytes | None = None
    end: End | None = None


class Frames:
    """One connection, the server's side. Nothing raises for the peer's faults."""

    __slots__ = ("_connection", "_ended", "_fragments", "_limits", "_message_bytes")

    def __init__(self, limits: WebSocketLimits) -> None:
        self._limits = limits
        self._connection = Connection(ConnectionType.SERVER)
        self._message_bytes = 0
        self._fragments = 0
        self._ended = False

    def receive(self, data: bytes) -> Received:
        """What these bytes mean. After an end: nothing."""
        if self._ended or not data:
            return Received(b"")
        self._connection.receive_data(data)
        payload: list[bytes | bytearray] = []
        ping: bytes | None = None
        end: End | None = None
        empty = 0
        for event in self._connection.events():
            if isinstance(event, BytesMessage) and event.data:
                payload.append(event.data)
            else:
                empty += 1
            if isinstance(event, Ping):
                ping = bytes(event.payload)
            end = self._judge(event, empty)
            if end is not None:
                self._ended = True
                break
        return Received(b"".join(payload), ping, end)

    def binary(self, data: bytes) -> bytes:
        """A frame with MQTT's bytes; empty once the close frame is sent."""
        if self._connection.state is not ConnectionState.OPEN:
            return b""
        return bytes(self._connection.send(BytesMessage(data)))

    def pong(self, payload: bytes) -> bytes:
        """The answer to a ping; empty once the close frame is sent."""
        if self._connection.state is not ConnectionState.OPEN:
            return b""
        return bytes(self._connection.send(Pong(payload)))

    def close(self, code: int, text: str = "") -> bytes:
        """The close frame, ours or the answer to theirs. Empty the second time."""
        self._ended = True
        if self._connection.state not in _MAY_CLOSE:
            return b""
        return bytes(self._connection.send(CloseConnection(code, text or None)))

    def _judge(self, event: Event, empty: int) -> End | None:
        allowed = self._limits.empty_frames
        if empty > allowed:
            return End(CloseReason.POLICY_VIOLATION, f"more than {allowed} frames without payload", violation=True)
        match event:
            case BytesMessage():
                return self._count(event)
            case TextMessage():
                return End(CloseReason.UNSUPPORTED_DATA, "only binary messages carry MQTT", violation=True)
            case CloseConnection():
                # wsproto tells a broken rule as an event of the same kind; its state does not change then.
                violation = self._connection.state is ConnectionState.OPEN
                return End(event.code, (event.reason or "") if violation else "", violation)
            case Ping() | Pong():
                return None
            case _:
                raise AssertionError(f"no event of an open connection: {type(event).__name__}")

    def _count(self, message: BytesMessage) -> End | None:
        limits = self._limits
        self._message_bytes += len(message.data)
        self._fragments += message.frame_finished
        if self._message_bytes > limits.message_bytes:
            return End(CloseReason.MESSAGE_TOO_BIG, f"a message above {limits.message_bytes} bytes", violation=True)
        if self._fragments > limits.fragments:
            return End(CloseReason.POLICY_VIOLATION, f"more than {limits.fragments} fragments", violation=True)
        if message.message_finished:
            self._message_bytes = self._fragments = 0
        return None


_MAY_CLOSE: Final = (ConnectionState.OPEN, ConnectionState.REMOTE_CLOSING)
