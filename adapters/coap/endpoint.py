"""The I/O shell of CoAP: associations of a datagram shell on one side, a `Handler` on the other.

Theory
------
    Association ──received()──► PeerMachine ──RequestReceived──► a task: Handler.handle ──► respond ──► Association.send
                                    ▲ one heap of timers for all peers, one call_later of the event loop

    A handler that knows its answer at once, or when one future is done, says so by a `Prompt`: then there is no task.

    open(held=True) ──► HELD: requests wait, bounded ──admit()──► SERVING
                            └──refuse(response): each waiting and each further request gets it, and nothing else

Everything runs on the event loop; a handler's task touches its peer again only when it has ended. Bounds: requests in
flight of all peers here, the rest in the machine. What exceeds a bound is answered 5.03 with Max-Age, never dropped.

`close` forgets a peer at once. Handlers that are already at work for it finish, since what they store was received in
good order (a device may well send and say goodbye); their answers go nowhere, and they count among those in flight
until they end.

`drain` takes no further request (5.03 with Max-Age, so that its sender comes back to whoever serves then), waits until
those in flight are answered and what we have sent as confirmable is acknowledged, and cancels what remains at its end.

What a handler raises is a bug: 5.00 with a correlation id as diagnostic payload, and the traceback in the log under it.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from itertools import count
from random import Random, SystemRandom
from typing import Any, Final, Protocol, assert_never
from uuid import uuid4

from aiocoap.numbers.codes import Code

from adapters.coap.exchanges import NotificationArrived, ObservationEnded, RequestReceived
from adapters.coap.limits import CoapCounters, CoapLimits
from adapters.coap.memory import Memory
from adapters.coap.messages import LocalProtocolError
from adapters.coap.peer import PeerMachine
from adapters.coap.ports import Handler, Promise, Prompt, Response

log: Final = logging.getLogger(__name__)


class Association(Protocol):
    """As much of a datagram association as CoAP needs; `adapters.dtls.ports.Association` is one."""

    @property
    def association_id(self) -> str: ...

    @property
    def address(self) -> str: ...

    @property
    def room(self) -> int: ...

    def send(self, datagram: bytes) -> None: ...


class PeerState(Enum):
    """Whether a peer's requests are handled."""

    HELD = auto()
    SERVING = auto()
    REFUSED = auto()
    CLOSED = auto()


_SERVING: Final = PeerState.SERVING


class EndpointPeer:
    """One peer of an endpoint; the handler knows it as `ports.Peer`."""

    __slots__ = ("_armed", "_held", "_machine", "_observations", "_refusal", "association", "context", "state")

    def __init__(self, association: Association, machine: PeerMachine, state: PeerState) -> None:
        self.association = association
        self.context: Any = None
        """The handler's own."""
        self.state = state
        self._machine = machine
        self._held: list[RequestReceived] = []
        self._refusal: Response | None = None
        self._observations: dict[int, EndpointObservation] = {}
        self._armed: float | None = None

    @property
    def peer_id(self) -> str:
        return self.association.association_id

    @property
    def address(self) -> str:
        return self.association.address


class EndpointObservation:
    """An observation that the handler is offered; `ports.Observation`."""

    __slots__ = ("_cancelled", "_endpoint", "_number", "_peer")

    def __init__(self, endpoint: CoapEndpoint, peer: EndpointPeer, number: int) -> None:
        self._endpoint = endpoint
        self._peer = peer
        self._number = number
        self._cancelled: Callable[[], None] | None = None

    def accept(self, cancelled: Callable[[], None]) -> None:
        """See the port. When the client is gone already, `cancelled` is called at once."""
        if self._cancelled is not None:
            raise LocalProtocolError("an observation is accepted once")
        self._cancelled = cancelled
        self._endpoint._accept(self._peer, self._number, self)

    def notify(self, response: Response, delivered: Callable[[], None] | None = None) -> None:
        """See the port."""
        self._endpoint._notify(self._peer, self._number, response, delivered)

    def end(self) -> None:
        """See the port."""
        self._endpoint._end(self._peer, self._number)


class CoapEndpoint:
    """Serves a handler's resources to peers. Made, used and drained on one event loop.

    `now` is a monotonic clock in seconds, the loop's when none is given; `random` decides message ids and back-off.
    """

    def __init__(
        self,
        handler: Handler,
        limits: CoapLimits | None = None,
        counters: CoapCounters | None = None,
        now: Callable[[], float] | None = None,
        random: Random | None = None,
        prompt: Prompt | None = None,
    ) -> None:
        self.limits = limits if limits is not None else CoapLimits()
        self.counters = counters if counters is not None else CoapCounters()
        self._handler = handler
        self._prompt = prompt
        self._loop = asyncio.get_running_loop()
        self._now = now if now is not None else self._loop.time
        self._random: Random = random if random is not None else SystemRandom()
        self._memory = Memory(self.limits, self.counters)
        self._keys = count(1)
        self._peers: dict[str, EndpointPeer] = {}
        self._serving: set[asyncio.Future[Any]] = set()  # tasks, and the futures of promises
        self._timers: list[tuple[float, int, EndpointPeer | None]] = []
        self._order = count()
        self._wakeup: asyncio.TimerHandle | None = None
        self._wakeup_at = 0.0
        self._expiry_armed = False
        self._draining = False
        self._unacknowledged: set[EndpointPeer] = set()  # while it drains: peers that owe us an acknowledgement
        self._quiet: asyncio.Future[None] | None = None  # done when none is left

    # The datagram shell's calls ---------------------------------------------------------------------------------------

    def open(self, association: Association, *, held: bool = False) -> EndpointPeer:
        """Take a peer. `held`: its requests wait for `admit` or `refuse`, and until then it is a stranger."""
        machine = PeerMachine(next(self._keys), self._memory, self._random, association.room, known=not held)
        peer = EndpointPeer(association, machine, PeerState.HELD if held else PeerState.SERVING)
        self._peers[association.association_id] = peer
        self.counters.peers += 1
        return peer

    def peer(self, association_id: str) -> EndpointPeer | None:
        """The peer of an association, while it is open."""
        return self._peers.get(association_id)

    def received(self, association: Association, datagram: bytes) -> None:
        """Take one datagram of an open peer; of another one, drop it."""
        peer = self._peers.get(association.association_id)
        if peer is None:
            return
        now = self._now()
        machine = peer._machine
        machine.has_room(association.room)
        machine.receive(datagram, now)
        self._work(peer, now)

    def close(self, association_id: str) -> None:
        """Forget a peer; its observations are cancelled. The association itself is the caller's to end."""
        peer = self._peers.pop(association_id, None)
        if peer is None:
            return
        peer.state = PeerState.CLOSED
        peer._held.clear()
        self.counters.peers -= 1
        peer._machine.close()
        if peer._observations or self._quiet is not None:  # somebody is owed word of it
            self._work(peer, self._now())

    # Admission --------------------------------------------------------------------------------------------------------

    def admit(self, association_id: str, *, known: bool = True) -> None:
        """Handle what a held peer has asked meanwhile, and all it asks from now on. `known`: it is a device, and no
        stranger any longer; this may be said later too. Nothing happens when it is gone."""
        peer = self._peers.get(association_id)
        if peer is None:
            return
        if known:
            peer._machine.becomes_known()
        if peer.state is not PeerState.HELD:
            return
        peer.state = PeerState.SERVING
        if not peer._held:
            return
        held, peer._held = peer._held, []
        now = self._now()
        for event in held:
            self._serve(peer, event, now)
        self._work(peer, now)

    def refuse(self, association_id: str, response: Response) -> None:
        """Answer with this whatever a held peer has asked, and whatever it asks from now on. It stays open."""
        peer = self._peers.get(association_id)
        if peer is None or peer.state is not PeerState.HELD:
            return
        peer.state = PeerState.REFUSED
        peer._refusal = response
        held, peer._held = peer._held, []
        now = self._now()
        for event in held:
            peer._machine.respond(event.exchange, response, now)
        self._work(peer, now)

    # The end ----------------------------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Finish what is under way, for so long at most; then cancel the rest, and forget every peer."""
        self._draining = True
        end = self._loop.time() + seconds
        if self._serving:
            await asyncio.wait(set(self._serving), timeout=seconds)
        self._unacknowledged = {peer for peer in self._peers.values() if peer._machine.transmitting}
        if self._unacknowledged:
            self._quiet = self._loop.create_future()
            try:
                await asyncio.wait((self._quiet,), timeout=max(0.0, end - self._loop.time()))
            finally:
                self._quiet = None
                self._unacknowledged.clear()
        for association_id in list(self._peers):
            self.close(association_id)
        serving = list(self._serving)
        for each in serving:
            each.cancel()
        if serving:
            await asyncio.gather(*serving, return_exceptions=True)
        if self._wakeup is not None:
            self._wakeup.cancel()
            self._wakeup = None
        self._timers.clear()

    # One peer's work --------------------------------------------------------------------------------------------------

    def _work(self, peer: EndpointPeer, now: float) -> None:
        """What is owed to a machine after each call: its events, its datagrams, its timer."""
        machine = peer._machine
        while (event := machine.next_event()) is not None:
            match event:
                case RequestReceived() if peer.state is _SERVING:
                    self._serve(peer, event, now)
                case RequestReceived():
                    self._on_request(peer, event, now)
                case NotificationArrived(receipt=receipt):
                    assert callable(receipt)
                    self._call(receipt)
                case ObservationEnded(observation=number):
                    ended = peer._observations.pop(number, None)
                    if ended is not None and ended._cancelled is not None:
                        self._call(ended._cancelled)
                case _:
                    assert_never(event)
        send = peer.association.send
        for datagram in machine.datagrams_to_send():
            send(datagram)
        due = machine.next_timer()
        if due is not None and (peer._armed is None or due < peer._armed):
            peer._armed = due
            self._arm(due, peer)
        if self._quiet is not None and peer in self._unacknowledged and not machine.transmitting:
            self._unacknowledged.discard(peer)
            if not self._unacknowledged and not self._quiet.done():
                self._quiet.set_result(None)
        if not self._expiry_armed and (expiry := self._memory.next_expiry()) is not None:
            self._expiry_armed = True
            self._arm(expiry, None)

    def _on_request(self, peer: EndpointPeer, event: RequestReceived, now: float) -> None:
        match peer.state:
            case PeerState.SERVING:
                self._serve(peer, event, now)
            case PeerState.HELD:
                if len(peer._held) < self.limits.held_requests:
                    peer._held.append(event)
                else:
                    self._busy(peer, event, now)
            case PeerState.REFUSED:
                assert peer._refusal is not None
                peer._machine.respond(event.exchange, peer._refusal, now)
            case PeerState.CLOSED:
                pass
            case _:
                assert_never(peer.state)

    def _serve(self, peer: EndpointPeer, event: RequestReceived, now: float) -> None:
        if self._draining or len(self._serving) >= self.limits.requests:
            self._busy(peer, event, now)
            return
        promise: Promise | Response | None = None
        if self._prompt is not None and event.observation is None:
            try:
                promise = self._prompt(peer, event.request)
            except Exception:
                promise = self._failed("coap.handler_failed", peer)
        if type(promise) is Response:
            self._respond(peer, event.exchange, promise, now)
        elif type(promise) is Promise:
            self._begin(promise.future, partial(self._kept, peer, event.exchange, promise.answer))
        else:
            self._begin(self._loop.create_task(self._handle(peer, event)), self._handled)

    def _begin(self, serving: asyncio.Future[Any], done: Callable[[asyncio.Future[Any]], None]) -> None:
        self._serving.add(serving)
        self.counters.serving += 1
        serving.add_done_callback(done)

    def _busy(self, peer: EndpointPeer, event: RequestReceived, now: float) -> None:
        self.counters.busy += 1
        response = Response(Code.SERVICE_UNAVAILABLE, max_age=self.limits.busy_max_age)
        peer._machine.respond(event.exchange, response, now)

    async def _handle(self, peer: EndpointPeer, event: RequestReceived) -> None:
        offered = EndpointObservation(self, peer, event.observation) if event.observation is not None else None
        try:
            response = await self._handler.handle(peer, event.request, offered)
        except Exception:
            response = self._failed("coap.handler_failed", peer)
        now = self._now()
        self._respond(peer, event.exchange, response, now)
        self._work(peer, now)

    def _kept(
        self,
        peer: EndpointPeer,
        exchange: int,
        answer: Callable[[asyncio.Future[Any]], Response],
        future: asyncio.Future[Any],
    ) -> None:
        self._serving.discard(future)
        self.counters.serving -= 1
        if future.cancelled():  # the end of the drain
            return
        try:
            response = answer(future)
        except Exception:
            response = self._failed("coap.handler_failed", peer)
        now = self._now()
        self._respond(peer, exchange, response, now)
        self._work(peer, now)

    def _respond(self, peer: EndpointPeer, exchange: int, response: Response, now: float) -> None:
        try:
            peer._machine.respond(exchange, response, now)
        except Exception:  # a response that cannot be written: the exchange is still open
            peer._machine.respond(exchange, self._failed("coap.response_failed", peer), now)

    def _handled(self, task: asyncio.Future[Any]) -> None:
        self._serving.discard(task)
        self.counters.serving -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("coap.task_failed", exc_info=error)

    def _failed(self, event: str, peer: EndpointPeer) -> Response:
        self.counters.failures += 1
        correlation_id = uuid4().hex
        log.exception(event, extra={"fields": {"correlation_id": correlation_id, "peer": peer.peer_id}})
        return Response(Code.INTERNAL_SERVER_ERROR, payload=f"correlation id {correlation_id}".encode())

    def _call(self, told: Callable[[], object]) -> None:
        """Tell the handler of something, whose errors must not touch the peers."""
        try:
            told()
        except Exception:
            self.counters.failures += 1
            log.exception("coap.callback_failed")

    # Observations -----------------------------------------------------------------------------------------------------

    def _accept(self, peer: EndpointPeer, number: int, observation: EndpointObservation) -> None:
        if not peer._machine.accept(number):
            assert observation._cancelled is not None
            self._loop.call_soon(self._call, observation._cancelled)
            return
        peer._observations[number] = observation

    def _notify(
        self, peer: EndpointPeer, number: int, response: Response, delivered: Callable[[], None] | None
    ) -> None:
        now = self._now()
        peer._machine.notify(number, response, now, delivered)
        if not response.code.is_successful():
            peer._observations.pop(number, None)
        self._work(peer, now)

    def _end(self, peer: EndpointPeer, number: int) -> None:
        now = self._now()
        peer._observations.pop(number, None)
        peer._machine.end(number, now)
        self._work(peer, now)

    # Timers -----------------------------------------------------------------------------------------------------------

    def _arm(self, due: float, peer: EndpointPeer | None) -> None:
        """Wake up for a peer; for None, to let go of what is too old."""
        heapq.heappush(self._timers, (due, next(self._order), peer))
        self._wake_by(due)

    def _wake_by(self, due: float) -> None:
        if self._wakeup is None or due < self._wakeup_at:
            if self._wakeup is not None:
                self._wakeup.cancel()
            self._wakeup_at = due
            self._wakeup = self._loop.call_later(max(0.0, due - self._now()), self._wake)

    def _wake(self) -> None:
        self._wakeup = None
        now = self._now()
        timers = self._timers
        try:
            while timers and timers[0][0] <= now:
                due, _, peer = heapq.heappop(timers)
                if peer is None:
                    self._expiry_armed = False
                    self._memory.expire(now)
                    if (expiry := self._memory.next_expiry()) is not None:
                        self._expiry_armed = True
                        heapq.heappush(timers, (max(expiry, now + 1.0), next(self._order), None))
                elif peer._armed == due:
                    peer._armed = None
                    peer._machine.tick(now)
                    self._work(peer, now)
        finally:  # a peer that fails stops nobody else's timers, and one that armed a late one delays nobody's
            if timers:
                self._wake_by(timers[0][0])
