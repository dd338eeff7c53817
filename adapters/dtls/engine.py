"""One DTLS association, from its ClientHello with a good cookie to its end. Datagrams in, events and datagrams out.

Theory
------
    SHAKING ──identity needed──▶ WAITING ──key()──▶ SHAKING ──verified──▶ OPEN ──▶ ENDED
       └── failed, timed out, refused ─────┴──────────────────────────────────────▶ ENDED

The handshake is somebody else's (handshake.py): ours for clients whose first suite of those that we have is plain PSK,
OpenSSL's for all others. Here is what both need, and what comes afterwards, when keys, two counters and a replay
window are all that is left (protection.py).

- *A key takes time.* The datagrams of this peer are held, at most `held_datagrams`, until `key` is called; more are
  dropped, and sent again by the peer.
- *Bounds.* All bytes of a handshake are counted; of a datagram the first 64 records are looked at. Records of the next
  epoch that come early OpenSSL would keep in buffers of 16 KB each, so it gets so many and no more; ours keeps a few
  small ones, and no number of them stalls it. What no handshake has a use for never reaches it.

Invariants: events of one call are in order; after ENDED nothing is sent or accepted, but `datagrams` may still be
collected once.

What can race: `key` may come after the end; then it does nothing. What can be lost: what UDP loses.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Final, assert_never

import msgspec

from adapters.dtls import records as wire
from adapters.dtls.admission import Drop, DtlsCounters, DtlsLimits
from adapters.dtls.context import DtlsContext
from adapters.dtls.handshake import End, Handshake, IdentityNeeded, Outcome, Verified
from adapters.dtls.openssl_handshake import OpensslHandshake
from adapters.dtls.ports import Proof, PskKey
from adapters.dtls.protection import PLAIN_PSK_SUITES, Protection
from adapters.dtls.psk_handshake import PskHandshake
from adapters.dtls.records import ClientHello, Record, psk_suite, split_records
from registry.secrets import RandomBytes

_FINISHED: Final = b"\x14"  # RFC 5246 §7.4: the message's type
_CLOSE_NOTIFY: Final = b"\x01\x00"  # RFC 5246 §7.2.1, at level warning
_FATAL: Final = b"\x02"
_MOST_RECORDS: Final = 64  # of one datagram: more fragments of a handshake do not fit into 1,500 bytes


class Established(msgspec.Struct, frozen=True):
    """The handshake has verified."""

    proof: Proof


class Received(msgspec.Struct, frozen=True, gc=False):
    """One decrypted datagram."""

    datagram: bytes

    def __repr__(self) -> str:
        return f"Received({len(self.datagram)} bytes)"


class Ended(msgspec.Struct, frozen=True, gc=False):
    """It is over; nothing follows."""

    reason: End


Event = IdentityNeeded | Established | Received | Ended


class _State(Enum):
    SHAKING = auto()
    WAITING = auto()
    OPEN = auto()
    ENDED = auto()


_OPEN: Final = _State.OPEN  # asked for with every datagram; by its class it takes ten times as long


class DtlsEngine:
    """Carries one association. `hello` has a good cookie: the caller has judged it.

    Every method that returns events may also have made datagrams: collect them with `datagrams` and send them first.
    `clock` is monotonic seconds and serves our own handshake; OpenSSL has its own clock.
    """

    __slots__ = (
        "_bytes",
        "_counters",
        "_early",
        "_handshake",
        "_held",
        "_last_flight",
        "_limits",
        "_out",
        "_protection",
        "_state",
        "mtu",
        "room",
    )

    def __init__(
        self,
        context: DtlsContext,
        hello: ClientHello,
        limits: DtlsLimits,
        counters: DtlsCounters | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        random: RandomBytes = secrets.token_bytes,
    ) -> None:
        self.mtu = limits.mtu
        self.room = 0
        """Bytes that one call of `send` takes at most; 0 when it is not open."""
        self._limits = limits
        self._counters = counters or DtlsCounters()
        self._state = _State.SHAKING
        self._out: list[bytes] = []
        self._bytes = 0  # of the handshake
        self._early = 0
        self._held: list[bytes] = []
        self._protection: Protection | None = None
        self._last_flight: tuple[bytes, ...] = ()
        suite = psk_suite(hello)
        self._handshake: Handshake | None
        if suite in PLAIN_PSK_SUITES:
            self._handshake = PskHandshake(suite, self._out, limits.mtu, clock, random)
        else:
            self._handshake = OpensslHandshake(context, has_psk=suite is not None, limits=limits, out=self._out)

    def start(self, hello: ClientHello) -> list[Event]:
        """Answer the ClientHello with the first flight, or end."""
        assert self._handshake is not None
        return self._went(self._handshake.start(hello))

    def repeat(self) -> None:
        """The ClientHello has come again, the very one."""
        if self._handshake is not None:
            before = len(self._out)
            self._handshake.repeat()
            self._counters.retransmitted += len(self._out) - before

    @property
    def returned(self) -> bool:
        """Whether the peer has come back since the first flight: it read what went to its address."""
        return self._bytes > 0

    def datagrams(self) -> list[bytes]:
        """What is to be sent now, each at most `mtu` bytes."""
        if not self._out:
            return []
        out = self._out[:]
        self._out.clear()
        return out

    def receive(self, datagram: bytes) -> list[Event]:
        """Take one datagram of the peer. Anything may be in it; nothing raises."""
        if self._state is _OPEN:
            return self._open(datagram)
        match self._state:
            case _State.SHAKING:
                return self._shake(datagram)
            case _State.WAITING:
                self._hold(datagram)
                return []
            case _:
                return []

    def key(self, key: PskKey | None) -> list[Event]:
        """The answer to IdentityNeeded; None when there can be none now, which ends the handshake."""
        if self._state is not _State.WAITING or self._handshake is None:
            return []
        self._state = _State.SHAKING
        held, self._held = self._held, []
        events = self._went(self._handshake.key(key))
        for datagram in held:  # counted already
            events += self._go_on(datagram) if self._state is _State.SHAKING else self.receive(datagram)
        return events

    def send(self, datagram: bytes) -> None:
        """Encrypt one datagram of at most `room` bytes. Raises ValueError when it is larger; after the end nothing."""
        if self._state is not _OPEN or not datagram:
            return
        if len(datagram) > self.room:
            raise ValueError(f"a datagram of {len(datagram)} bytes; there is room for {self.room}")
        assert self._protection is not None
        self._out.append(self._protection.seal(wire.APPLICATION_DATA, datagram))

    def close(self) -> None:
        """End with close_notify (RFC 5246 §7.2.1); an unfinished handshake ends without a word."""
        if self._protection is not None:
            self._out.append(self._protection.seal(wire.ALERT, _CLOSE_NOTIFY))
        self._forget()

    def retransmission_due(self) -> float | None:
        """Seconds until `retransmit` is to be called; None when no flight waits for an answer."""
        return None if self._handshake is None else self._handshake.retransmission_due()

    def retransmit(self) -> list[Event]:
        """Send the last flight again if its time has come (RFC 6347 §4.2.4)."""
        handshake = self._handshake
        if handshake is None:
            return []
        due = handshake.retransmission_due()
        if due is None or due > 0:
            return []
        self._counters.retransmitted += 1
        return self._went(handshake.retransmit())

    # Shaking hands

    def _shake(self, datagram: bytes) -> list[Event]:
        self._bytes += len(datagram)
        if self._bytes > self._limits.handshake_bytes:
            return self._end(End.HANDSHAKE_OVERSIZED)
        return self._go_on(datagram)

    def _go_on(self, datagram: bytes) -> list[Event]:
        datagram, records = self._screen(datagram)
        if not records:
            return []
        assert self._handshake is not None
        return self._went(self._handshake.receive(datagram, records))

    def _went(self, outcome: Outcome) -> list[Event]:
        """What a step of the handshake has brought."""
        assert self._handshake is not None
        match outcome:
            case None:
                return []
            case IdentityNeeded():
                self._state = _State.WAITING
                return [outcome]
            case Verified(proof, protection, fragment):
                self.mtu = self._handshake.mtu
                path = self.mtu - protection.overhead
                self.room = path if fragment is None else min(path, fragment)
                self._protection = protection
                self._last_flight = tuple(self._out)
                self._state = _State.OPEN
                self._handshake = None
                return [Established(proof)]
            case End():
                return self._end(outcome)
            case _:
                assert_never(outcome)

    def _screen(self, datagram: bytes) -> tuple[bytes, list[Record]]:
        """The datagram without the records that a handshake has no use for."""
        records = split_records(datagram)
        wanted = [record for record in records[:_MOST_RECORDS] if self._is_wanted(record)]
        if len(wanted) == len(records):
            return datagram, records
        cut = b"".join(datagram[record.start : record.end] for record in wanted)
        return cut, split_records(cut)

    def _is_wanted(self, record: Record) -> bool:
        if record.epoch == 0:
            return record.content != wire.APPLICATION_DATA
        if record.epoch > 1 or record.content != wire.HANDSHAKE:
            return False
        if isinstance(self._handshake, PskHandshake):
            return True
        self._early += 1
        return self._early <= self._limits.handshake_early_records

    def _hold(self, datagram: bytes) -> None:
        if len(self._held) >= self._limits.held_datagrams:
            self._counters.drop(Drop.HELD)
        elif self._bytes + len(datagram) <= self._limits.handshake_bytes:
            self._bytes += len(datagram)
            self._held.append(datagram)

    # Open

    def _open(self, datagram: bytes) -> list[Event]:
        protection = self._protection
        assert protection is not None
        events: list[Event] = []
        for record in split_records(datagram):
            plain = protection.open(datagram, record)
            if plain is None:
                continue
            match record.content:
                case wire.APPLICATION_DATA:
                    self._last_flight = ()  # it has arrived: the peer would not have gone on without it
                    if plain:
                        events.append(Received(plain))
                case wire.HANDSHAKE if plain[:1] == _FINISHED:
                    self._out += self._last_flight
                case wire.ALERT if plain == _CLOSE_NOTIFY:
                    self.close()
                    events.append(Ended(End.CLOSED_BY_PEER))
                    break
                case wire.ALERT if plain[:1] == _FATAL:
                    events += self._end(End.ABORTED_BY_PEER)
                    break
                case _:  # a warning, or an attempt to renegotiate, which may be ignored (RFC 5246 §7.4.1.1)
                    pass
        return events

    # Ending

    def _end(self, reason: End) -> list[Event]:
        self._forget()
        return [Ended(reason)]

    def _forget(self) -> None:
        self._state = _State.ENDED
        self.room = 0
        self._handshake = self._protection = None
        self._last_flight = ()
        self._held.clear()
