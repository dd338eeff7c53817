"""The UDP socket of a DTLS service: many peers on one port, told apart, admitted, and undisturbed by strangers.

Theory
------
    datagram ──▶ a ClientHello? ──no cookie──▶ HelloVerifyRequest, nothing kept
                     │            └─cookie──▶ handshake (pending) ──verified──▶ association (living)
                     └─ no ──▶ epoch ≥ 1 ──▶ living of that address, and pending
                             └ epoch 0 ───▶ pending of that address, else living

- *Living associations hear nothing in the clear.* OpenSSL's record layer discards what is not under the current keys,
  and what it has seen before (RFC 6347 §4.1.2.6). A ClientHello never reaches it. So whoever only knows an address can
  neither end nor slow an association.
- *A device that has restarted* comes from the same port with a new ClientHello (RFC 6347 §4.2.8). With a good cookie
  its handshake begins beside the living association, and takes its place only when it has verified.
- *One pending handshake per address and port.* A newer ClientHello takes its place: the peer has begun again. The same
  one again, by its random value and its cookie, is a copy that the network made, or the peer's who has not heard our
  flight. With a newer cookie it is a new one: a device may draw the same random value whenever it starts.
- The places of handshakes and associations are counted in the ledger (admission.py).

One timer serves all handshakes: it looks every 50 ms for those whose flight or time is due. Nearly all are over long
before OpenSSL would send a flight again, and never ask for their timer.

Who is asked for a key may take its time, in a task of its own; datagrams of that peer wait in its engine.

Strangers wait. A handshake costs a hundred times what a record of a living association does. So the datagrams of those
who have none yet wait, bounded, in a queue from which 2 ms at a time are taken; those of living associations are taken
as they are read. A flood of handshakes delays other handshakes.

The socket is read directly, many datagrams per wake-up of the loop: measured at a third of the cost of asyncio's own
datagram transport. It is never waited for in writing: a full socket loses the datagram, as the network may.

What can race: the end of a handshake with the answer to its question for a key: the answer finds an ended engine.
The application may close associations from within any of its calls. What can be lost: datagrams, always.

Limits of this shell: bound to a wildcard address on a host with several, answers leave from the address that routing
chooses; bind one address there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, assert_never

from adapters.dtls.admission import Drop, DtlsCounters, DtlsLimits, GiveWay, Ledger, Place
from adapters.dtls.context import DtlsContext
from adapters.dtls.cookie import CookieJar
from adapters.dtls.engine import DtlsEngine, Ended, Established, Event, Received
from adapters.dtls.handshake import End, IdentityNeeded
from adapters.dtls.ports import Application, CertificateProven, NothingProven, Proof, PskKey, PskProven
from adapters.dtls.records import (
    ALERT_PROTOCOL_VERSION,
    RECORD_HEADER,
    ClientHello,
    hello_verify_request,
    is_client_hello,
    plaintext_alert,
    read_client_hello,
)
from registry.errors import Unavailable
from registry.secrets import RandomBytes

_log = logging.getLogger(__name__)

_LARGEST_DATAGRAM: Final = 16_384 + 2_048  # RFC 6347 §4.1: one record of the largest size; CoAP's are a tenth of it
_SWEEPS: Final = 16  # per idle timeout, so that it is kept to within a sixteenth
_GOODBYES: Final = 64  # in one go when the listener closes
_TURN: Final = 0.002  # seconds for strangers, before others of the loop: what an exchange of a device may be late
_PIECE: Final = 16  # datagrams of the living in one go: the database is at work for these while the next are read
_TICK: Final = 0.05  # by so much a flight may be sent again too late, of the second that OpenSSL waits first
_FIRST_LOOK: Final = 0.5  # after a handshake's beginning; nothing is due earlier
_LOOKS: Final = 1.0  # between two at the most
_DTLS_12: Final = 0xFEFD
_ID_BYTES: Final = 16
_SO_RCVBUFFORCE: Final = 33  # Linux: beyond rmem_max, for those who may

Address = tuple[Any, ...]
"""As the socket gives it: host and port first."""


class DtlsListener:
    """Serves `application` over DTLS on one UDP socket. Belongs to one event loop.

    `clock` is monotonic seconds; `random` gives cookies' secrets and ids.
    """

    def __init__(
        self,
        application: Application,
        context: DtlsContext,
        *,
        limits: DtlsLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: RandomBytes = secrets.token_bytes,
    ) -> None:
        self.application = application
        self.context = context
        self.limits = limits or DtlsLimits()
        self.counters = DtlsCounters()
        self.ledger = Ledger(self.limits, self.counters)
        self.clock = clock
        self.random = random
        self._cookies = CookieJar(self.limits.cookie_lifetime, random, clock())
        self._living: dict[Address, DtlsAssociation] = {}
        self._pending: dict[Address, _Pending] = {}
        self._by_place: dict[Place, _Pending | DtlsAssociation] = {}  # that may have to give way
        self._socket: socket.socket | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._closing = False
        self._strangers: deque[tuple[bytes, Address]] = deque()
        self._turn: asyncio.Handle | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen on `host` (a name or an address) and `port` (0: any free one). Returns the bound port.

        Raises OSError when the address cannot be bound; RuntimeError when already started.
        """
        if self._socket is not None:
            raise RuntimeError("the listener is already started")
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setblocking(False)
            _roomy(bound, self.limits.receive_buffer)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
        self._socket = bound
        self._closing = False
        loop.add_reader(bound.fileno(), self._readable)
        self._sweep()
        name: Address = bound.getsockname()
        return int(name[1])

    def associations(self) -> list[DtlsAssociation]:
        """A copy of all that live."""
        return list(self._living.values())

    def refuse(self) -> None:
        """Begin nothing new: ClientHellos are ignored from now on, and handshakes in flight end without a word.

        Their clients repeat themselves until somebody else listens here, or turn to another node.
        Associations live on until `close`.
        """
        self._closing = True
        for pending in list(self._pending.values()):
            self._forget_pending(pending)

    async def close(self) -> None:
        """Begin nothing new, say close_notify to all, and close the socket.

        `Application.ended` is not called: it is the application that ends.
        """
        bound = self._socket
        self.refuse()
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        for number, association in enumerate(self.associations(), 1):
            association.close()
            if number % _GOODBYES == 0:
                await asyncio.sleep(0)  # others' turn, and the network's
        if bound is not None:
            asyncio.get_running_loop().remove_reader(bound.fileno())
            bound.close()
            self._socket = None
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        self._strangers.clear()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    # In

    def _readable(self) -> None:
        bound = self._socket
        heard = 0
        for _ in range(self.limits.batch):
            if bound is None or self._socket is not bound:
                return
            try:
                datagram, address = bound.recvfrom(_LARGEST_DATAGRAM)
            except OSError:  # nothing more, or word of an earlier datagram that nobody took
                break
            if address in self._living and address not in self._pending and not is_client_hello(datagram):
                self.arrived(datagram, address)
                heard += 1
                if heard == _PIECE and not self._strangers:
                    return  # the loop calls again, once it has passed on what these ask for
            elif len(self._strangers) < self.limits.strangers:
                self._strangers.append((datagram, address))
            else:
                self.counters.drop(Drop.CROWDED)
        if self._turn is None:
            self._take_strangers()

    def _take_strangers(self) -> None:
        """A turn of those who wait; another one soon while there are any."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _TURN
        try:
            while self._strangers and loop.time() < until:
                self.arrived(*self._strangers.popleft())
        finally:  # whatever one of them did, the others' turn comes
            self._turn = loop.call_soon(self._take_strangers) if self._strangers else None

    def arrived(self, datagram: bytes, address: Address) -> None:
        """Take one datagram from anybody. Anything may be in it; nothing raises."""
        if len(datagram) <= RECORD_HEADER or datagram[1] != 0xFE or not 20 <= datagram[0] <= 23:
            self.counters.drop(Drop.GARBAGE)
            return
        if is_client_hello(datagram):
            self._hello(datagram, address)
            return
        living, pending = self._living.get(address), self._pending.get(address)
        if living is not None and (pending is None or datagram[3] or datagram[4]):
            living.receive(datagram)
        if pending is not None:
            pending.receive(datagram)
        elif living is None:
            self.counters.drop(Drop.STRAY)

    def _hello(self, datagram: bytes, address: Address) -> None:
        hello = read_client_hello(datagram)
        if hello is None:
            self.counters.drop(Drop.GARBAGE)
            return
        if self._closing:
            return
        if hello.version > _DTLS_12:  # older: DTLS counts its versions backwards
            self.counters.drop(Drop.VERSION)
            self.transmit(plaintext_alert(ALERT_PROTOCOL_VERSION, 0), address)
            return
        now = self.clock()
        source = f"{address[0]} {address[1]}".encode()
        if hello.cookie and self._cookies.good(hello.cookie, source, hello.parameters, now):
            self._begin(hello, address, now)
            return
        if hello.cookie:
            self.counters.drop(Drop.COOKIE)
        self.counters.challenged += 1
        self.transmit(hello_verify_request(hello, self._cookies.bake(source, hello.parameters, now)), address)

    def _begin(self, hello: ClientHello, address: Address, now: float) -> None:
        living, before = self._living.get(address), self._pending.get(address)
        if before is not None:
            if before.hello_mark == hello.mark:
                before.repeat()
                return
            self._forget_pending(before)
        if living is not None and living.hello_mark == hello.mark:
            return
        place = self._place(str(address[0]), now)
        if place is None:
            return
        self.counters.started += 1
        pending = _Pending(self, place, address, hello, now)
        self._pending[address] = self._by_place[place] = pending
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().call_later(_TICK, self._tick)
        pending.start(hello)

    def _place(self, host: str, now: float) -> Place | None:
        while True:
            match self.ledger.admit(host, now):
                case Place() as place:
                    return place
                case GiveWay(oldest):
                    self.counters.drop(Drop.DISPLACED)
                    self._displace(self._by_place[oldest])
                case Drop() as full:
                    self.counters.drop(full)
                    return None

    def _displace(self, oldest: _Pending | DtlsAssociation) -> None:
        match oldest:
            case _Pending():
                self._forget_pending(oldest)
            case DtlsAssociation():
                oldest.leave("gave way to a newcomer", farewell=True)
            case _:
                assert_never(oldest)

    # Out

    def transmit(self, datagram: bytes, address: Address) -> None:
        """Send one datagram now or never."""
        if self._socket is None:
            return
        try:
            self._socket.sendto(datagram, address)
        except OSError:  # full, too large for the path, no route: the network would have lost it as well
            self.counters.drop(Drop.UNSENT)

    # What pending handshakes and associations tell

    def verified(self, pending: _Pending, proof: Proof) -> DtlsAssociation:
        """A handshake has verified: an association takes its place, and that of an older one at its address."""
        self._remove_pending(pending)
        self.ledger.verified(pending.place)
        counters = self.counters
        counters.established += 1
        match proof:
            case PskProven():
                counters.psk += 1
            case CertificateProven():
                counters.client_certificates += 1
            case NothingProven():
                pass
        older = self._living.get(pending.address)
        association = DtlsAssociation(self, pending, proof)
        if older is not None:
            counters.replaced += 1
            older.leave("replaced by a new handshake", farewell=False)
        self._living[pending.address] = self._by_place[association.place] = association
        try:
            self.application.established(association)
        except Exception:  # the end of this connection, and of no other
            _log.exception("dtls.application.failed")
            association.leave("internal error", farewell=True)
        return association

    def failed(self, pending: _Pending, drop: Drop) -> None:
        """A handshake has come to nothing."""
        if self._pending.get(pending.address) is pending:
            self.counters.drop(drop)
            self._forget_pending(pending)

    def forget(self, association: DtlsAssociation) -> None:
        """An association has ended: its address and its place are free."""
        if self._living.get(association.key) is association:
            del self._living[association.key]
            self._by_place.pop(association.place, None)
            self.ledger.ended(association.place)

    def keep(self, association: DtlsAssociation) -> None:
        """An association is somebody's: it never has to give way."""
        self._by_place.pop(association.place, None)
        self.ledger.kept(association.place)

    def _forget_pending(self, pending: _Pending) -> None:
        self._remove_pending(pending)
        self.ledger.ended(pending.place)
        pending.stop()

    def _remove_pending(self, pending: _Pending) -> None:
        del self._pending[pending.address]
        del self._by_place[pending.place]

    def _tick(self) -> None:
        """Look after the handshakes that are due; again soon while there are any."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        try:
            for pending in [each for each in self._pending.values() if each.due <= now]:
                pending.look(now)
        finally:
            self._ticker = loop.call_later(_TICK, self._tick) if self._pending else None

    def _sweep(self) -> None:
        """End the associations that have been silent too long."""
        before = self.clock() - self.limits.idle_timeout
        for association in self.associations():
            if association.heard < before and association.alive:
                self.counters.idle += 1
                association.leave("silent too long", farewell=True)
        if self._socket is not None:
            self._sweeper = asyncio.get_running_loop().call_later(self.limits.idle_timeout / _SWEEPS, self._sweep)


class _Pending:
    """One handshake in flight: its engine, its times, and the question for its key."""

    __slots__ = ("_asking", "_listener", "_mismatched", "_until", "address", "due", "engine", "hello_mark", "place")

    def __init__(self, listener: DtlsListener, place: Place, address: Address, hello: ClientHello, now: float) -> None:
        self._listener = listener
        self._until = now + listener.limits.handshake_timeout
        self.due = asyncio.get_running_loop().time() + min(_FIRST_LOOK, listener.limits.handshake_timeout)
        """Loop time at which `look` has something to do."""
        self._asking: asyncio.Task[None] | None = None
        self._mismatched: Callable[[], None] | None = None
        self.place = place
        self.address = address
        self.hello_mark = hello.mark
        self.engine = DtlsEngine(listener.context, hello, listener.limits, listener.counters)

    def start(self, hello: ClientHello) -> None:
        self._handle(self.engine.start(hello))

    def repeat(self) -> None:
        """Its ClientHello has come again."""
        self.engine.repeat()
        self._handle([])

    def receive(self, datagram: bytes) -> None:
        events = self.engine.receive(datagram)
        if self.place.returned is None and self.engine.returned:
            self._listener.ledger.returned(self.place, self._listener.clock())
        self._handle(events)

    def stop(self) -> None:
        """Let go of everything; the listener has forgotten it already."""
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
        self.engine.close()

    def _handle(self, events: list[Event]) -> None:
        for datagram in self.engine.datagrams():
            self._listener.transmit(datagram, self.address)
        for number, event in enumerate(events, 1):
            match event:
                case IdentityNeeded(identity):
                    self._asking = asyncio.get_running_loop().create_task(self._ask(identity))
                case Established(proof):
                    self._listener.verified(self, proof).take(events[number:])
                    return
                case Ended(reason):
                    if reason is End.WRONG_KEY and self._mismatched is not None:
                        asyncio.get_running_loop().call_soon(self._mismatched)
                    self._listener.failed(self, _DROPS.get(reason, Drop.HANDSHAKE_FAILED))
                    return
                case Received():
                    raise AssertionError("nothing is received before the handshake has verified")

    def look(self, now: float) -> None:
        """Send a flight again whose time has come; give up when all of the time is over. `now` is loop time."""
        left = self._until - self._listener.clock()
        if left <= 0:
            self._listener.failed(self, Drop.HANDSHAKE_TIMEOUT)
            return
        self._handle(self.engine.retransmit())
        again = self.engine.retransmission_due()
        self.due = now + min(left, _LOOKS if again is None else again, _LOOKS)

    async def _ask(self, identity: bytes) -> None:
        key: PskKey | None
        try:
            key = await self._listener.application.psk(identity, str(self.address[0]))
        except Unavailable:
            key = None
        except Exception:
            _log.exception("dtls.psk.failed")
            key = None
        self._asking = None
        self._mismatched = None if key is None else key.mismatched
        try:
            self._handle(self.engine.key(key))
        except Exception:  # the end of this handshake, and of no other
            _log.exception("dtls.handshake.failed")
            self._listener.failed(self, Drop.HANDSHAKE_FAILED)


class DtlsAssociation:
    """One association whose handshake has verified: the `Association` of ports.py."""

    __slots__ = (
        "__weakref__",
        "_engine",
        "_listener",
        "address",
        "alive",
        "association_id",
        "heard",
        "hello_mark",
        "key",
        "place",
        "proof",
        "room",
    )

    def __init__(self, listener: DtlsListener, pending: _Pending, proof: Proof) -> None:
        self._listener = listener
        self._engine = pending.engine
        self.association_id = listener.random(_ID_BYTES).hex()
        self.key = pending.address
        self.address = str(pending.address[0])
        self.place = pending.place
        self.hello_mark = pending.hello_mark
        self.proof = proof
        self.alive = True
        self.room = pending.engine.room
        self.heard = listener.clock()

    def keep(self) -> None:
        """See ports.Association."""
        if self.alive:
            self._listener.keep(self)

    def send(self, datagram: bytes) -> None:
        """See ports.Association. Raises ValueError for a datagram larger than `room`."""
        if self.alive:
            self._engine.send(datagram)
            self._transmit()

    def close(self) -> None:
        """See ports.Association."""
        if self.alive:
            self._engine.close()
            self._transmit()
            self._end()

    def abort(self) -> None:
        """See ports.Association."""
        if self.alive:
            self._engine.close()
            self._engine.datagrams()
            self._end()

    def receive(self, datagram: bytes) -> None:
        """One datagram that came from its address."""
        events = self._engine.receive(datagram)
        self._transmit()
        self.take(events)

    def _hand_over(self, plain: bytes) -> None:
        try:
            self._listener.application.received(self, plain)
        except Exception:  # the end of this connection, and of no other
            _log.exception("dtls.application.failed")
            self.leave("internal error", farewell=True)

    def take(self, events: list[Event]) -> None:
        """What its engine has made of a datagram."""
        for event in events:
            match event:
                case Received(plain):
                    if self.alive:
                        self.heard = self._listener.clock()
                        self._hand_over(plain)
                case Ended(reason):
                    if reason is End.CLOSED_BY_PEER:
                        self._listener.counters.closed_by_peer += 1
                    else:
                        self._listener.counters.aborted += 1
                    self.leave(reason.value, farewell=False)
                case IdentityNeeded() | Established():
                    raise AssertionError("the handshake is over")

    def leave(self, reason: str, *, farewell: bool) -> None:
        """End it and tell the application why; with or without close_notify to the peer."""
        if not self.alive:
            return
        if farewell:
            self.close()
        else:
            self.abort()
        try:
            self._listener.application.ended(self, reason)
        except Exception:  # of this connection: who ends others, or replaces this one, goes on
            _log.exception("dtls.application.failed")

    def _transmit(self) -> None:
        for datagram in self._engine.datagrams():
            self._listener.transmit(datagram, self.key)

    def _end(self) -> None:
        self.alive = False
        self._listener.forget(self)


_DROPS: Final = {
    End.HANDSHAKE_OVERSIZED: Drop.HANDSHAKE_OVERSIZED,
    End.WRONG_KEY: Drop.WRONG_KEY,
    End.CERTIFICATE: Drop.CERTIFICATE,
    End.KEY_UNAVAILABLE: Drop.KEY_UNAVAILABLE,
}


def _roomy(bound: socket.socket, size: int) -> None:
    """As large a receive buffer as we are allowed."""
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    with contextlib.suppress(OSError):
        bound.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
