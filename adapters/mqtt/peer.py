"""One MQTT connection: the machine of connection.py between a transport and whoever its peer turns out to be.

    connection_made ─► bytes ─► machine ─► ConnectRequested ─► admission (a task) ─► accept or refuse
                                   │                                  └─► a Role: a device, or a provisioner
                                   └─► every other event ─► the Role
    closed by the machine ─► what is written leaves ─► transport closed ─► Role.lost, once

Theory. Everything runs in the loop's callbacks; only admission and what asks the database are tasks. The one place
where bytes and events move is `pump`: take events while there are any, write what the machine has to say, again until
both are silent or the peer's turn is over; then read on or stop reading, as the machine wants it, and set the timer.
Answers of the store call `poke`, which pumps once for everything that became ready in the same turn of the loop.

What can race: the peer may vanish, or the registry may close the session, while admission waits. `alive` is looked at
after each wait. What is received after the registry has closed the session is not looked at: nothing of a revoked
device is stored. What can be lost: on `abort`, what was written and not sent. A peer that is gone is heard to the end
of what it sent: `server.peers` has it until then.

The timer is lazy: it is only moved forward, so a busy connection does not touch it; early firings cost a look.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Final, Protocol, cast

from adapters.mqtt.connection import Connection, State
from adapters.mqtt.machine_events import Cause, ConnectRequested, Ended, Event
from adapters.mqtt.wire_reasons import ReasonCode
from registry.sessions import Session as RegistrySession

if TYPE_CHECKING:
    from adapters.mqtt.server import MqttServer

log: Final = logging.getLogger(__name__)


class Transport(Protocol):
    """What a connection stands on: TLS, or WebSocket frames over TLS."""

    @property
    def peer_certificate_der(self) -> bytes | None: ...

    @property
    def peer_address(self) -> str: ...

    def write(self, data: bytes, /) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def unsent(self) -> int: ...

    def close(self) -> None: ...

    def close_draining(self) -> None: ...

    def abort(self) -> None: ...


class Role(Protocol):
    """Who the peer is, once it is admitted."""

    def handle(self, event: Event, now: float) -> None:
        """Take one event of the machine; it says what is owed."""

    def lost(self, ended: Ended | None, now: float) -> None:
        """The connection is over. Called once."""


class Peer(asyncio.Protocol):
    """One connection. `server` is what it shares with the others."""

    __slots__ = (
        "__weakref__",
        "_closed",
        "_ended",
        "_ended_sending",
        "_held_until",
        "_lost",
        "_poked",
        "_pumping",
        "_timer",
        "_timer_at",
        "_unsent",
        "address",
        "certificate",
        "machine",
        "role",
        "server",
        "session",
        "tamed",
        "transport",
    )

    def __init__(self, server: MqttServer) -> None:
        self.server = server
        self.transport: Transport | None = None
        self.machine = Connection(server.limits.machine, server.now())
        self.role: Role | None = None
        self.session: RegistrySession | None = None
        """The registry's session, for a device."""
        self.tamed = False
        """Whether it waits because it was refused before. Who leaves meanwhile is not waited for."""
        self.address = ""
        self.certificate: bytes | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._held_until = 0.0
        self._unsent = 0  # bytes under way when the network was last known to take something
        self._poked = False
        self._pumping = False
        self._ended: Ended | None = None
        self._ended_sending = False
        self._closed = False
        self._lost: asyncio.Future[None] | None = None

    # What the transport tells ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.stand_on(cast(Transport, transport))

    def stand_on(self, transport: Transport) -> None:
        """Begin."""
        self.transport = transport
        self.address = transport.peer_address
        self.certificate = transport.peer_certificate_der
        self.server.peers.add(self)
        self.pump()

    def data_received(self, data: bytes) -> None:
        session = self.session
        if session is not None:
            if session.closed:
                return
            session.last_active = self.server.loop.time()
        self.machine.receive(data, self.server.now())
        self.pump()

    def eof_received(self) -> bool:
        """Nothing more comes, but what came may wait for its turn or its answer still: the connection is closed behind
        these. How long that takes is the store's matter; who does not read the answers is cut as ever."""
        self._ended_sending = True
        self.pump()
        return True

    def pause_writing(self) -> None:
        self._unsent = 0 if self.transport is None else self.transport.unsent()
        self.machine.pause_writing(self.server.now())
        self.pump()

    def resume_writing(self) -> None:
        self.machine.resume_writing(self.server.now())
        self.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        """What was received and waits for its turn is looked at still, as the client's DISCONNECT may be behind it;
        not without end, where the core has no room."""
        self.transport = None
        self._stop_timer()
        self.machine.resume_writing(self.server.now())  # nobody waits for who reads our answers any more
        self.pump()
        if not self._closed:
            self._timer = self.server.loop.call_later(self.machine.limits.write_stall, self._give_up)

    # What the registry asks (registry.sessions.Closer) --------------------------------------------------------------

    async def close(self, reason: str) -> None:
        """End it in MQTT's words: DISCONNECT 0x98 in 5.0, a closed connection in 3.1.1; the will is dropped."""
        self.server.counters.closed_by_us += 1
        log.debug("mqtt.closing", extra={"fields": {"peer": self.address, "reason": reason}})
        if self.machine.state is State.DECIDING:  # revoked while it was being admitted: as any refusal
            self.refuse(ReasonCode.NOT_AUTHORIZED)
        else:
            self.end(ReasonCode.ADMINISTRATIVE_ACTION, publish_will=reason == KICKED)
        await self.gone()

    def abort(self) -> None:
        """Cut it."""
        if self.transport is not None:
            self.transport.abort()

    def end(self, reason: ReasonCode, *, publish_will: bool, text: str = "") -> None:
        """Say goodbye and close; returns at once."""
        self.machine.disconnect(reason, self.server.now(), publish_will=publish_will, text=text)
        self.pump()

    def refuse(self, reason: ReasonCode) -> None:
        """Answer the CONNECT that is being judged with a refusal, if anybody still waits for it."""
        if self.machine.state is State.DECIDING:
            self.machine.refuse(reason, self.server.now())
        self.pump()

    async def gone(self) -> None:
        """Wait until the transport is closed."""
        if self._closed:
            return
        if self._lost is None:
            self._lost = self.server.loop.create_future()
        await asyncio.shield(self._lost)

    # Movement -------------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether there is still somebody to talk to."""
        return not self.machine.closed

    def poke(self) -> None:
        """Pump soon, once for all that becomes ready in this turn of the loop."""
        if not self._poked:
            self._poked = True
            self.server.loop.call_soon(self._pump_poked)

    def hold(self, seconds: float) -> None:
        """Take nothing for a while, of what was read neither: the core is full, or will be."""
        self._held_until = self.server.now() + seconds
        self.machine.turn = 0
        self.server.loop.call_later(seconds, self.poke)

    def run(self, work: Callable[[], object]) -> None:
        """Call `work` and pump; a failure of it ends this connection only."""
        try:
            work()
        except Exception as error:  # the end of a connection's callback: one connection's failure stays its own
            self._failed(error)
        self.poke()

    def pump(self) -> None:
        """Move everything that can move now."""
        if self._pumping:
            self.poke()  # from inside a handler: the loop below goes on by itself, a later one looks again
            return
        self._pumping = True
        try:
            self._move()
        except Exception as error:  # as above
            self._failed(error)
        finally:
            self._pumping = False
        if self.transport is None and self.machine.closed:
            self._over()

    def _pump_poked(self) -> None:
        self._poked = False
        self.pump()

    def _move(self) -> None:
        machine, server = self.machine, self.server
        now = server.now()
        machine.turn = machine.limits.packets_per_turn if now >= self._held_until else 0
        while True:
            while (event := machine.next_event(now)) is not None:
                self._handle(event, now)
            if server.draining and not machine.busy and not machine.closed:
                machine.disconnect(ReasonCode.SERVER_SHUTTING_DOWN, now, publish_will=True)
            data = machine.data_to_send(now)
            if data and self.transport is not None:
                self.transport.write(data)
            elif not machine.has_events:
                break
        full, too_long = machine.take_refusals()
        server.counters.subscriptions_full += full
        server.counters.topics_too_long += too_long
        transport = self.transport
        if transport is None and not (machine.state is State.OPEN and machine.waiting):
            self._lose(now)
        if machine.closed:
            # Who is told what was wrong may be sending still: a reset would take our words from it.
            in_the_middle = self._ended is not None and self._ended.cause in (Cause.VIOLATION, Cause.REFUSED)
            self._finish(now)
            if transport is not None:
                (transport.close_draining if in_the_middle else transport.close)()
            return
        if machine.behind and now >= self._held_until:
            self.poke()
        if transport is None:
            return
        if self._ended_sending:
            if not machine.waiting and (self.tamed or not machine.busy):
                transport.close()
        elif machine.wants_read and now >= self._held_until and not server.draining:
            transport.resume_reading()
        else:
            transport.pause_reading()
        self._arm(now)

    def _handle(self, event: Event, now: float) -> None:
        match event:
            case ConnectRequested(connect):
                self.start(self.server.admission.admit(self, connect))
            case Ended():
                self._ended = event
            case _:
                session = self.session
                if self.role is not None and (session is None or not session.closed):
                    self.role.handle(event, now)

    def _finish(self, now: float) -> None:
        """The machine is closed: tell the role, once."""
        role, self.role = self.role, None
        if role is not None:
            role.lost(self._ended, now)
        if self._ended is not None:
            self.server.ended(self, self._ended)
            self._ended = None

    def _lose(self, now: float) -> None:
        self.machine.lost(now)
        while (event := self.machine.next_event(now)) is not None:
            self._handle(event, now)

    def _give_up(self) -> None:
        self.machine.lost(self.server.now())
        self.pump()

    def _over(self) -> None:
        """The network is gone, and nothing that it brought is left."""
        self._closed = True
        self._stop_timer()
        self.server.peers.discard(self)
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    # Tasks ----------------------------------------------------------------------------------------------------------

    def start(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run a task for this connection, then pump; its failure ends the connection."""
        task = self.server.loop.create_task(self._guarded(work), name="mqtt connection")
        self.server.track(task)
        return task

    async def _guarded(self, work: Coroutine[object, object, None]) -> None:
        try:
            await work
        except Exception as error:  # the end of a connection task
            self._failed(error)
        self.pump()

    # Time and failure -----------------------------------------------------------------------------------------------

    def _arm(self, now: float) -> None:
        if self._timer is not None and self.machine.timer_stands:
            return
        due = self.machine.next_timer()
        if due is None or (self._timer is not None and self._timer_at <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        self._timer = self.server.loop.call_later(max(0.0, due - now), self._tick)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = None
        now = self.server.now()
        self._look_at_slow_reader(now)
        self.machine.tick(now)
        self.pump()

    def _look_at_slow_reader(self, now: float) -> None:
        """A peer behind a slow link may take minutes for what fills the buffers in between, and is not to be cut."""
        since = self.machine.stalled_since
        if since is None or self.transport is None:
            return
        unsent = self.transport.unsent()
        if self._unsent - unsent >= self.machine.limits.min_packet_rate * (now - since):
            self._unsent = unsent
            self.machine.taking(now)

    def _failed(self, error: Exception) -> None:
        self.server.counters.failures += 1
        log.error("mqtt.connection_failed", exc_info=error, extra={"fields": {"peer": self.address}})
        self.machine.lost(self.server.now())
        role, self.role = self.role, None
        if role is not None:
            try:
                role.lost(None, self.server.now())
            except Exception as again:  # as above; the connection is cut all the same
                log.error("mqtt.cleanup_failed", exc_info=again, extra={"fields": {"peer": self.address}})
        self.abort()


KICKED: Final = "kicked by an operator"
"""registry/kick.py's reason: the device may come back, so its will is published."""
