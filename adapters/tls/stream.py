"""One TLS connection: encrypted bytes on one side, an ordinary asyncio transport on the other.

Theory
------
`TlsTransport` has two faces. Towards the socket it is the protocol of the raw TCP transport; towards the application
it is the transport of the inner protocol. Between them stands an OpenSSL connection over memory buffers.

    HANDSHAKING ──finished──▶ OPEN ──close()──────────▶ FLUSHING ──flushed──▶ CLOSED
         │                     │  └─close_draining()──▶ FLUSHING ──flushed──▶ DRAINING ──their end──▶ CLOSED
         └──any drop──▶ CLOSED └──abort(), drop──▶ CLOSED             (both bounded by `linger` seconds)

Invariants
- The inner protocol is made when the handshake is finished, and gets exactly one `connection_made` and one
  `connection_lost`. A handshake that fails makes no protocol at all, only a count.
- Received: what one read of the socket brought (at most the listener's buffer) is decrypted at once and handed over in
  one call, so nothing piles up: `pause_reading` stops the socket itself, and TCP pushes back on the peer. Only
  what arrives together with the end of the handshake can be held, when `connection_made` paused reading.
- Many small records cost one decryption each and one hand-over together; a part of a record costs no decryption.
- Sent: writes of one loop iteration become one pass of encryption. While the socket is full nothing more is encrypted;
  plain text waits, and the inner protocol was told to pause. It resumes when all of it is encrypted and on its way.
- What TLS itself answers (key updates, alerts) does not wait for the application; a peer that provokes such answers
  and does not read them is dropped.
- After any exit the OpenSSL object is released, and `closed` timers are cancelled.

Ends: close_notify or the end of the stream both arrive as `eof_received` of the inner protocol (if that returns a true
value the sending half stays open; RFC 8446 §6.1 permits it). An end without close_notify is a possible truncation: it
is counted, and the protocol's own framing must notice it, as HTTP and MQTT do.

What can race: nothing within one loop; callbacks from the raw transport may arrive after we closed and are ignored by
state. What can be lost: on abort, drop or expiry of the linger time, whatever was written and not yet sent.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, Protocol, cast

from OpenSSL import SSL
from OpenSSL.crypto import FILETYPE_ASN1, dump_certificate

from adapters.tls.admission import Drop, Ledger, TlsCounters, TlsLimits
from adapters.tls.context import TlsContext, session_was_resumed
from adapters.tls.framing import HANDSHAKE, RecordCounter, RemoteProtocolError

MAX_PLAINTEXT: Final = 16_384  # RFC 8446 §5.1: what one record can carry
_RECORD_ROOM: Final = 512  # header, tag, padding, and a ticket or alert that leaves together with a small record
_INT: Final = struct.Struct("i")
_SLICE: Final = 16_384  # what OpenSSL is fed at a time; its buffer keeps the largest size it ever had
_PLAINTEXT_PROTOCOLS: Final = frozenset(b"GPHODCTM")  # the first letters of HTTP's methods


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """The certificate whose key the peer has proved to hold. Nothing in it has been checked against any issuer."""

    der: bytes


@dataclass(frozen=True, slots=True)
class TlsSession:
    """What the handshake agreed on. `version` and `cipher` are OpenSSL's names, such as `TLSv1.3`."""

    version: str
    cipher: str
    alpn: str | None
    resumed: bool
    peer_certificate: PeerCertificate | None


class StreamOwner(Protocol):
    """What a stream needs of its listener."""

    context: TlsContext
    limits: TlsLimits
    counters: TlsCounters
    ledger: Ledger
    plaintext_hint: Callable[[], bytes] | None
    protocol_factory: Callable[[], asyncio.Protocol]
    read_buffer: memoryview
    connections: set[TlsTransport]
    closing: bool


class _State(Enum):
    HANDSHAKING = auto()
    OPEN = auto()
    FLUSHING = auto()
    DRAINING = auto()
    CLOSED = auto()


class TlsTransport(asyncio.Transport, asyncio.BufferedProtocol):
    """The transport an inner protocol gets. Beyond `asyncio.Transport`: `tls`, `peer_certificate_der`, `resumed`,
    `close_draining`. All methods belong to the loop's thread."""

    __slots__ = (
        "__weakref__",
        "_admitted",
        "_after_flush",
        "_flush_scheduled",
        "_flushing",
        "_handshake_received",
        "_held",
        "_inner",
        "_inner_paused",
        "_loop",
        "_owner",
        "_peer_ended",
        "_queue",
        "_queued",
        "_raw",
        "_raw_full",
        "_reading",
        "_records",
        "_shaking",
        "_ssl",
        "_state",
        "_timer",
        "_unsolicited",
        "peer_address",
        "tls",
    )

    def __init__(self, owner: StreamOwner, loop: asyncio.AbstractEventLoop) -> None:
        self._extra: dict[str, Any] | None = None
        self._owner = owner
        self._loop = loop
        self._raw: asyncio.Transport | None = None
        self._ssl: SSL.Connection | None = None
        self._inner: asyncio.Protocol | None = None
        self._records = RecordCounter()
        self._state = _State.HANDSHAKING
        self._after_flush = _State.CLOSED
        self._admitted = False
        self._shaking = False
        self._handshake_received = 0
        self._queue: list[bytes | memoryview] = []
        self._queued = 0
        self._flush_scheduled = False
        self._flushing = False
        self._raw_full = False
        self._inner_paused = False
        self._reading = True
        self._held = b""
        self._peer_ended = False
        self._unsolicited = 0
        self._timer: asyncio.TimerHandle | None = None
        self.peer_address = ""
        self.tls: TlsSession | None = None
        """None until the handshake is finished; the inner protocol never sees None."""

    # What the inner protocol may ask

    @property
    def peer_certificate_der(self) -> bytes | None:
        """The peer's certificate as it was sent, when it showed one and proved its key."""
        certificate = self.tls.peer_certificate if self.tls is not None else None
        return certificate.der if certificate is not None else None

    @property
    def resumed(self) -> bool:
        """Whether the handshake continued an earlier session (its certificate is then the earlier one)."""
        return self.tls is not None and self.tls.resumed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "tls":
            return self.tls
        return self._raw.get_extra_info(name, default) if self._raw is not None else default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        if not isinstance(protocol, asyncio.Protocol):
            raise TypeError(f"the inner protocol must be an asyncio.Protocol, not {type(protocol).__name__}")
        self._inner = protocol
        self._inner_paused = False  # this one has been told nothing
        if self._raw_full:
            self._loop.call_soon(self._tell_writing)  # when it has the transport

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self._inner is not None, "the connection is lost"
        return self._inner

    def is_closing(self) -> bool:
        return self._state is not _State.OPEN

    def is_reading(self) -> bool:
        return self._reading and not self.is_closing()

    def pause_reading(self) -> None:
        """Stop taking bytes from the socket. Repeating it does nothing."""
        if self._reading and self._state is _State.OPEN and self._raw is not None:
            self._reading = False
            self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Take bytes again. Repeating it does nothing."""
        if not self._reading and self._state is _State.OPEN and self._raw is not None:
            self._reading = True
            self._raw.resume_reading()
            if self._held:
                self._loop.call_soon(self._hand_over_held)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` soon, together with everything else written in this loop iteration."""
        if self._state is not _State.OPEN or not data:
            return
        # A caller may reuse its bytearray; bytes are taken as they are.
        self._queue.append(data if type(data) is bytes else bytes(data))
        self._queued += len(data)
        if self._raw_full or self._queued >= self._owner.limits.write_high_water:
            self._flush()
        elif not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        """Bytes written and not yet taken by the kernel (part of them already encrypted)."""
        return self._queued + (self._raw.get_write_buffer_size() if self._raw is not None else 0)

    def unsent(self) -> int:
        """Bytes written that the peer has not confirmed, as far as the kernel tells: it falls while a slow peer reads,
        also when nothing can be seen above the socket."""
        if self._raw is None:
            return self._queued
        return self.get_write_buffer_size() + _in_kernel(self._raw)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        limits = self._owner.limits
        return limits.write_low_water, limits.write_high_water

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """For this connection only; as in asyncio, without arguments the event loop's own defaults."""
        if self._raw is not None:
            self._raw.set_write_buffer_limits(high, low)

    def close(self) -> None:
        """Send what was written, close_notify and FIN; a peer that does not take them in `linger` seconds is cut."""
        self._start_closing(_State.CLOSED)

    def close_draining(self) -> None:
        """As `close`, but read and discard what the peer is still sending until it ends, for at most `linger` seconds.

        For answers that end a connection in the middle of a request: closing with unread bytes would make the kernel
        send a reset, which may destroy the answer on its way (RFC 9112 §9.6).
        """
        self._start_closing(_State.DRAINING)

    def abort(self) -> None:
        """Cut the connection now; unsent bytes are lost."""
        if self._raw is not None:
            self._state = _State.CLOSED
            self._raw.abort()

    # What the raw transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface without the base class.
        self._raw = raw = cast(asyncio.Transport, transport)
        owner = self._owner
        if owner.closing:  # accepted just before: the loop tells of it a turn later
            self.abort()
            return
        owner.counters.accepted += 1
        peer = raw.get_extra_info("peername")
        self.peer_address = str(peer[0]) if peer else ""
        refused = owner.ledger.admit(self.peer_address, self)
        if refused is not None:
            self._drop(refused)
            return
        self._admitted = self._shaking = True
        owner.connections.add(self)
        limits = owner.limits
        raw.set_write_buffer_limits(limits.write_high_water, limits.write_low_water)
        self._ssl = owner.context.connection()
        self._timer = self._loop.call_later(limits.handshake_timeout, self._drop, Drop.HANDSHAKE_TIMEOUT)

    def get_buffer(self, sizehint: int) -> memoryview:
        # One buffer serves every connection of the loop: the loop fills it and calls buffer_updated at once.
        return self._owner.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = self._owner.read_buffer[:nbytes]
        if self._state is _State.OPEN:
            self._receive(data)
        elif self._state is _State.HANDSHAKING:
            self._shake_hands(data)

    def eof_received(self) -> bool:
        match self._state:
            case _State.HANDSHAKING:
                self._drop(Drop.HANDSHAKE_TRUNCATED)
            case _State.OPEN:
                if not self._peer_ended:
                    self._owner.counters.truncated += 1
                    self._peer_has_ended()
                # The raw transport closes itself unless told to stay; our own close decides that.
                return True
            case _State.FLUSHING:
                return True
            case _State.DRAINING | _State.CLOSED:
                pass
        return False

    def pause_writing(self) -> None:
        self._raw_full = True
        if not self._flushing:  # else at its end: who writes or closes when told finds in the queue what is left
            self._tell_writing()

    def resume_writing(self) -> None:
        self._raw_full = False
        self._unsolicited = 0
        if self._queue:
            self._flush()
        if self._state is _State.FLUSHING and not self._queue:
            self._finish_closing()
        self._tell_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        was = self._state
        self._state = _State.CLOSED
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._admitted:
            if self.tls is None and was is _State.HANDSHAKING:  # reset by the peer: nobody has counted it yet
                self._owner.counters.drop(Drop.HANDSHAKE_TRUNCATED)
            self._give_back_handshake()
            self._owner.ledger.connection_ended(self.peer_address)
            self._owner.connections.discard(self)
        inner = self._inner
        self._raw = self._ssl = self._inner = None
        self._queue.clear()
        self._queued = 0
        if inner is not None:
            inner.connection_lost(exc if was is _State.OPEN else None)

    # Handshake

    def displace(self) -> None:
        """Another connection needs the place of this handshake (admission.Handshake)."""
        self._give_back_handshake()
        self._drop(Drop.HANDSHAKE_DISPLACED)

    def _give_back_handshake(self) -> None:
        """Once, however the handshake ends."""
        if self._shaking:
            self._shaking = False
            self._owner.ledger.handshake_ended(self.peer_address, self)

    def _shake_hands(self, data: memoryview) -> None:
        ssl = self._ssl
        assert ssl is not None
        owner = self._owner
        if self._handshake_received == 0 and data[0] != HANDSHAKE:
            self._refuse_plaintext(data)
            return
        try:
            for start in range(0, len(data), _SLICE):
                part = data[start : start + _SLICE]
                self._handshake_received += len(part)
                if self._handshake_received > owner.limits.handshake_bytes:
                    self._drop(Drop.HANDSHAKE_OVERSIZED)
                    return
                ended = self._records.feed(part)
                ssl.bio_write(part)
                if ended and self._handshake_done(ssl):
                    self._open(ssl, data[start + _SLICE :])
                    return
        except RemoteProtocolError:
            self._drop(Drop.GARBAGE)
        except SSL.Error:
            self._send_pending(ssl)  # the alert that tells the peer why
            self._drop(Drop.HANDSHAKE_FAILED, polite=True)

    def _handshake_done(self, ssl: SSL.Connection) -> bool:
        try:
            ssl.do_handshake()
        except SSL.WantReadError:
            self._send_pending(ssl)
            return False
        self._send_pending(ssl)
        return True

    def _open(self, ssl: SSL.Connection, rest: memoryview) -> None:
        owner = self._owner
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.tls = tls = _describe(ssl)
        self._give_back_handshake()
        counters = owner.counters
        counters.established += 1
        counters.resumed += tls.resumed
        counters.client_certificates += tls.peer_certificate is not None
        self._state = _State.OPEN
        self._inner = inner = owner.protocol_factory()
        inner.connection_made(self)
        # The client's first words may have come in the same read as its Finished; nobody counted those records.
        self._receive(rest, at_least=MAX_PLAINTEXT)

    def _refuse_plaintext(self, data: memoryview) -> None:
        if data[0] not in _PLAINTEXT_PROTOCOLS:
            self._drop(Drop.GARBAGE)
            return
        assert self._raw is not None
        if self._owner.plaintext_hint is not None:
            self._raw.write(self._owner.plaintext_hint())
        self._drop(Drop.PLAINTEXT, polite=True)

    # Receiving

    def _receive(self, data: memoryview, at_least: int = 0) -> None:
        ssl = self._ssl
        if ssl is None or self._state is not _State.OPEN:
            return
        chunks: list[bytes] = []
        drop: Drop | None = None
        try:
            if len(data) <= _SLICE:
                self._decrypt(ssl, data, chunks, at_least)
            else:
                for start in range(0, len(data), _SLICE):
                    self._decrypt(ssl, data[start : start + _SLICE], chunks, at_least)
        except RemoteProtocolError:
            drop = Drop.GARBAGE
        except _RenegotiationAttempt:
            drop = Drop.RENEGOTIATION
        except SSL.ZeroReturnError:
            self._peer_ended = True
        except SSL.Error:
            drop = Drop.GARBAGE
        # What was authenticated before the fault still counts: the peer did send it.
        if chunks:
            self._hand_over(chunks[0] if len(chunks) == 1 else b"".join(chunks))
        if drop is not None:
            if self._state is _State.OPEN:
                self._send_pending(ssl)
                self._drop(drop, polite=True)
        elif self._peer_ended and self._state is _State.OPEN:
            self._peer_has_ended()

    def _decrypt(self, ssl: SSL.Connection, data: memoryview, chunks: list[bytes], at_least: int) -> None:
        ended = max(self._records.feed(data), at_least)
        if self._records.saw_handshake and self.tls is not None and self.tls.version == "TLSv1.2":
            raise _RenegotiationAttempt
        if len(data):
            ssl.bio_write(data)
        try:
            for _ in range(ended):
                chunks.append(ssl.recv(MAX_PLAINTEXT))
        except SSL.WantReadError:
            # A record was TLS's own business (a key update, say), and may have an answer.
            self._send_unsolicited(ssl)

    def _hand_over(self, data: bytes) -> None:
        if not self._reading:
            self._held += data
        elif self._inner is not None:
            self._inner.data_received(data)

    def _hand_over_held(self) -> None:
        if self._held and self._reading and self._inner is not None and self._state is _State.OPEN:
            held, self._held = self._held, b""
            self._inner.data_received(held)

    def _peer_has_ended(self) -> None:
        self._peer_ended = True
        if self._inner is None or not self._inner.eof_received():
            self.close()

    # Sending

    def _flush(self) -> None:
        self._flush_scheduled = False
        ssl, raw = self._ssl, self._raw
        if ssl is None or raw is None or self._raw_full or not self._queue:
            self._tell_writing()
            return
        queue, self._queue = self._queue, []
        size, self._queued = self._queued, 0
        self._flushing = True
        try:
            if size <= MAX_PLAINTEXT:
                ssl.send(queue[0] if len(queue) == 1 else b"".join(queue))
                raw.write(_take(ssl, size + _RECORD_ROOM))
            else:
                self._flush_large(ssl, raw, _pieces(queue))
        except SSL.Error:
            self._drop(Drop.GARBAGE)
            return
        finally:
            self._flushing = False
        self._tell_writing()

    def _flush_large(self, ssl: SSL.Connection, raw: asyncio.Transport, pieces: list[memoryview]) -> None:
        for number, piece in enumerate(pieces):
            position = 0
            while position < len(piece) and not self._raw_full:
                position += ssl.send(piece[position : position + MAX_PLAINTEXT])
                raw.write(_take(ssl, MAX_PLAINTEXT + _RECORD_ROOM))
            if position < len(piece):
                self._queue = [piece[position:], *pieces[number + 1 :]]
                self._queued = sum(len(left) for left in self._queue)
                return

    def _tell_writing(self) -> None:
        inner = self._inner
        if inner is None or self._inner_paused == self._raw_full:
            return
        self._inner_paused = self._raw_full
        if self._raw_full:
            inner.pause_writing()
        else:
            inner.resume_writing()

    def _send_pending(self, ssl: SSL.Connection) -> int:
        """Pass on what TLS itself wants to say; returns how many bytes."""
        if self._raw is None:
            return 0
        try:
            data = _take(ssl, MAX_PLAINTEXT)
        except SSL.WantReadError:
            return 0
        self._raw.write(data)
        return len(data)

    def _send_unsolicited(self, ssl: SSL.Connection) -> None:
        sent = self._send_pending(ssl)
        if not self._raw_full:
            return
        self._unsolicited += sent
        if self._unsolicited > self._owner.limits.unsolicited_bytes:
            self._drop(Drop.FLOOD)

    # Closing

    def _start_closing(self, then: _State) -> None:
        if self._state is _State.HANDSHAKING:
            self.abort()
        if self.is_closing():
            return
        self._flush()
        if self.is_closing():  # the flush found the connection broken
            return
        self._state = _State.FLUSHING
        self._after_flush = then
        self._held = b""
        if not self._reading and self._raw is not None and then is _State.DRAINING:
            self._reading = True
            self._raw.resume_reading()
        if not self._queue:
            self._finish_closing()
        if self._raw is not None and (then is _State.DRAINING or self._raw.get_write_buffer_size()):
            self._timer = self._loop.call_later(self._owner.limits.linger, self._linger_expired)

    def _finish_closing(self) -> None:
        """All that was written is encrypted and with the raw transport: say goodbye after it."""
        ssl, raw = self._ssl, self._raw
        if ssl is None or raw is None:
            return
        try:
            ssl.shutdown()
        except SSL.Error:
            pass  # the session is broken already; FIN alone then
        self._send_pending(ssl)
        if self._after_flush is _State.DRAINING and not self._peer_ended and raw.can_write_eof():
            self._state = _State.DRAINING
            raw.write_eof()
        else:
            self._state = _State.CLOSED
            raw.close()

    def _linger_expired(self) -> None:
        self._timer = None
        if self._raw is None:
            return
        if self._raw.get_write_buffer_size() or self._queue:
            self._owner.counters.drop(Drop.LINGER)
        self._state = _State.CLOSED
        self._raw.abort()

    def _drop(self, reason: Drop, *, polite: bool = False) -> None:
        """End the connection by our decision. Polite: what TLS has already queued (an alert) still leaves."""
        raw = self._raw
        if raw is None or self._state is _State.CLOSED:
            return
        self._owner.counters.drop(reason)
        self._state = _State.CLOSED
        if polite and not raw.get_write_buffer_size():
            raw.close()
        else:
            raw.abort()


def _in_kernel(raw: asyncio.Transport) -> int:
    """What the kernel holds of a connection until the peer confirms it: tcp(7), SIOCOUTQ. 0 where it has no word."""
    try:
        told = fcntl.ioctl(raw.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(_INT.size))
    except (OSError, AttributeError):
        return 0
    return int(_INT.unpack(told)[0])


def _pieces(queue: list[bytes | memoryview]) -> list[memoryview]:
    """What is to be sent, small writes joined into whole records. A large one stays where it lies: joined, every slow
    reader of one answer would hold a copy of it."""
    pieces: list[memoryview] = []
    small: list[bytes | memoryview] = []
    for data in queue:
        if len(data) < MAX_PLAINTEXT:
            small.append(data)
            continue
        if small:
            pieces.append(memoryview(b"".join(small)))
            small.clear()
        pieces.append(memoryview(data))
    if small:
        pieces.append(memoryview(b"".join(small)))
    return pieces


class _RenegotiationAttempt(Exception):
    """The peer began a second handshake inside TLS 1.2."""


def _take(ssl: SSL.Connection, room: int) -> bytes:
    """All encrypted bytes that wait to be sent. Raises WantReadError when there are none."""
    data = ssl.bio_read(room)
    if len(data) < room:
        return data
    parts = [data]
    try:
        while True:
            parts.append(ssl.bio_read(room))
    except SSL.WantReadError:
        return b"".join(parts)


def _describe(ssl: SSL.Connection) -> TlsSession:
    certificate = ssl.get_peer_certificate()
    return TlsSession(
        version=ssl.get_protocol_version_name(),
        cipher=ssl.get_cipher_name() or "",
        alpn=ssl.get_alpn_proto_negotiated().decode("ascii", "replace") or None,
        resumed=session_was_resumed(ssl),
        peer_certificate=None if certificate is None else PeerCertificate(dump_certificate(FILETYPE_ASN1, certificate)),
    )
