"""MQTT over WebSocket: frames between the TLS transport and a connection's `Peer`.

    HTTPS hands over the transport and what it has read behind the handshake ─► WebSocket ─► Peer, as on MQTT's own port
        TLS bytes ─► Frames ─► payloads of one read, together ─► Peer
        Peer's bytes ─► one binary frame ─► TLS

The peer's certificate and address are the TLS connection's. Pausing and resuming go straight through in both
directions, so a slow reader or a full core reaches the peer's TCP as it does without frames. MQTT's clocks are the only
ones: a WebSocket ping keeps nothing alive, because keep-alive counts MQTT packets (5.0 §3.1.2.10).

Ends. Ours: MQTT's last words, a close frame, TLS's goodbye, without waiting for the peer's close frame (RFC 6455
§7.1.1 lets the server be first); a revocation waits for nobody. Theirs: a close frame ends what they send, as TLS's
goodbye does; it is answered when all that came before it is stored or refused and, without a DISCONNECT among that,
counts as a lost connection, so the will is published. After it no data may be sent to them, so acknowledgements are
dropped (RFC 6455 §5.5.1 does not let them be expected). Whatever breaks the framing ends at once.
What can race: the peer may be closed while the payload of a read is handled; what came behind it is not looked at.
What can be lost: on `abort`, what was written and not sent.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, cast

from adapters.mqtt.websocket_frames import CloseReason, End, Frames, WebSocketLimits
from adapters.tls.stream import TlsTransport

if TYPE_CHECKING:
    from adapters.mqtt.peer import Peer
    from adapters.mqtt.server import MqttServer

log: Final = logging.getLogger(__name__)

SUBPROTOCOL: Final = "mqtt"
"""[MQTT-6.0.0-3], [MQTT-6.0.0-4]."""
_LEAST_MESSAGE_BYTES: Final = 1_048_576  # however small the packets of a configuration are


class WebSockets:
    """The WebSocket side of an MQTT server: `take` is what HTTPS's upgrade calls."""

    def __init__(self, server: MqttServer, limits: WebSocketLimits | None = None) -> None:
        self._server = server
        self._limits = limits or WebSocketLimits(
            message_bytes=max(_LEAST_MESSAGE_BYTES, 16 * server.limits.machine.packet_bytes)
        )

    def take(self, transport: TlsTransport, rest: bytes) -> None:
        """Go on with a connection whose opening handshake is done; `rest` came behind it."""
        socket = WebSocket(self._server.new_peer(), self._limits)
        transport.set_protocol(socket)
        socket.connection_made(transport)
        if rest:
            socket.data_received(rest)


class WebSocket(asyncio.Protocol):
    """One connection: TLS's inner protocol, and the `Transport` of its peer."""

    __slots__ = ("_frames", "_full", "_goodbye", "_peer", "_pong", "_tls")

    def __init__(self, peer: Peer, limits: WebSocketLimits) -> None:
        self._peer = peer
        self._frames = Frames(limits)
        self._tls: TlsTransport | None = None
        self._full = False
        self._goodbye: int | None = None
        """The code of the peer's close frame, until it is answered."""
        self._pong: bytes | None = None
        """A ping that is answered when the peer reads again; a later one takes its place."""

    # What TLS tells -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tls = cast(TlsTransport, transport)
        self._peer.stand_on(self)

    def data_received(self, data: bytes) -> None:
        received = self._frames.receive(data)
        if received.payload:
            self._peer.data_received(received.payload)
        if received.ping is not None:
            self._answer_ping(received.ping)
        if received.end is not None:
            self._end(received.end)

    def eof_received(self) -> bool:
        return self._peer.eof_received()

    def pause_writing(self) -> None:
        self._full = True
        self._peer.pause_writing()

    def resume_writing(self) -> None:
        self._full = False
        ping, self._pong = self._pong, None
        if ping is not None:
            self._answer_ping(ping)
        self._peer.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tls = None
        self._peer.connection_lost(exc)

    # What the peer asks ---------------------------------------------------------------------------------------------

    @property
    def peer_certificate_der(self) -> bytes | None:
        return self._tls.peer_certificate_der if self._tls is not None else None

    @property
    def peer_address(self) -> str:
        return self._tls.peer_address if self._tls is not None else ""

    def write(self, data: bytes, /) -> None:
        self._send(self._frames.binary(data))

    def pause_reading(self) -> None:
        if self._tls is not None:
            self._tls.pause_reading()

    def resume_reading(self) -> None:
        if self._tls is not None:
            self._tls.resume_reading()

    def close(self) -> None:
        ours = CloseReason.GOING_AWAY if self._peer.server.draining else CloseReason.NORMAL_CLOSURE
        self._close(ours if self._goodbye is None else self._goodbye, "")

    def close_draining(self) -> None:
        self._send(self._frames.close(CloseReason.NORMAL_CLOSURE if self._goodbye is None else self._goodbye, ""))
        if self._tls is not None:
            self._tls.close_draining()

    def unsent(self) -> int:
        return self._tls.unsent() if self._tls is not None else 0

    def abort(self) -> None:
        if self._tls is not None:
            self._tls.abort()

    # Below ----------------------------------------------------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        if self._tls is not None:
            self._tls.write(data)

    def _answer_ping(self, payload: bytes) -> None:
        if self._full:
            self._pong = payload
        else:
            self._send(self._frames.pong(payload))

    def _end(self, end: End) -> None:
        if not end.violation:  # as TLS's: what came before it may wait for its turn still
            self._goodbye = end.code
            self._peer.eof_received()
            return
        if self._peer.alive:
            self._peer.server.counters.violations += 1
            log.debug("mqtt.websocket_violation", extra={"fields": {"peer": self.peer_address, "code": int(end.code)}})
        self._close(end.code, end.text)

    def _close(self, code: int, text: str) -> None:
        self._send(self._frames.close(code, text))
        if self._tls is not None:
            self._tls.close()
