"""The MQTT server of one node: its listener, what its connections share, and how it goes away.

    TlsListener ─► Peer (peer.py) ─► Admission ─► Devices (devices.py) or Provisioners (provisioning.py)
    HTTPS's upgrade of /mqtt ─► WebSocket frames (websocket.py) ─► Peer, the same

Time. The machines want one clock that goes on across restarts, because a message's expiry is kept with it: `now` is
UNIX time at the server's start plus what the loop's clock has counted since. It never jumps. The wall clock does, when
it is set or the machine has slept, and what is kept has its times, as other nodes and the next process have no other;
`ahead` is what lies between the two (messages.py).

Draining. Nobody new is let in; what was received is stored and acknowledged, for a bounded time; then every peer gets
DISCONNECT 0x8B in 5.0, a closed connection in 3.1.1. Nobody but the client can take a will back [MQTT-3.1.2-8], so
their delays begin to run, and what is due is published by whichever node looks first: this one, another one, or this
one after its restart (registry/stored_sessions.py). What is left after that is cut. What can be lost: messages that
were not acknowledged; their senders repeat them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from adapters.mqtt.admission import Admission
from adapters.mqtt.broker import Broker
from adapters.mqtt.devices import Devices
from adapters.mqtt.machine_events import Cause, Ended
from adapters.mqtt.peer import Peer
from adapters.mqtt.provisioning import Provisioners
from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.wire_reasons import ReasonCode
from adapters.provisioning import Provisioning
from adapters.tls.admission import TlsCounters, TlsLimits
from adapters.tls.context import TlsContext
from adapters.tls.listener import TlsListener
from registry.core import Registry
from registry.messaging import Messaging

LAST_WORDS = 1.0
"""Seconds that the peers have to take their DISCONNECT."""


@dataclass(slots=True)
class MqttCounters:
    """Plain counts since the start; `held` is how many wait now."""

    stored: int = 0
    duplicate: int = 0
    rejected: int = 0
    """Uplinks that the core refused for good."""
    too_large: int = 0
    """Of these, those above the limit on one payload."""
    unknown: int = 0
    """Messages whose fate nobody knows; their connections were closed."""
    full: int = 0
    """How often the core had no room."""
    forbidden: int = 0
    """Topics and filters that their senders may not use."""
    refused: int = 0
    """CONNECTs that were refused."""
    tamed: int = 0
    """Of these and of later ones, those that were made to wait."""
    held: int = 0
    turned_away: int = 0
    """Connections for which a limit had no room."""
    taken_over: int = 0
    closed_by_us: int = 0
    timed_out: int = 0
    """Connections that were too slow, or silent for too long."""
    violations: int = 0
    """Connections that broke the protocol or a limit of theirs."""
    provisioning_timed_out: int = 0
    brokered: int = 0
    """Messages among granted topics that were stored."""
    dropped: int = 0
    """Deliveries and messages of QoS 0 for which there was no room."""
    discarded: int = 0
    """Deliveries that expired, or were too large for their receiver."""
    wills_lost: int = 0
    failures: int = 0
    """Connections that ended by a bug of ours."""
    subscriptions_full: int = 0
    """Filters for which a session had no room."""
    topics_too_long: int = 0
    """Names and filters with more bytes or levels than are taken."""
    provisioning_full: int = 0
    """Of `turned_away`, those without credentials."""
    provisioning_displaced: int = 0
    """Connections without credentials that gave up their places to addresses with fewer."""
    provisioning_refused: int = 0
    """Provisioning requests beyond what one connection or one address may send."""
    refusals_full: int = 0
    """Of `turned_away`, refused credentials for which there was no room to wait."""
    ended: Counter[ReasonCode] = field(default_factory=Counter)
    """Connections that did not end by their peers' will, by the reason that 5.0 has for it: which limit it was."""

    def as_dict(self) -> Mapping[str, int]:
        """All counts by name; `ended_…` by reason."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "ended"}
        return plain | {f"ended_{reason.name.lower()}": count for reason, count in self.ended.items()}


class MqttServer:
    """Serves MQTT 3.1.1 and 5.0."""

    def __init__(
        self,
        registry: Registry,
        messaging: Messaging,
        provisioning: Provisioning,
        tls_context: TlsContext,
        *,
        limits: ServerLimits | None = None,
        tls_limits: TlsLimits | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = registry
        self.limits = limits or ServerLimits()
        self.counters = MqttCounters()
        self.peers: set[Peer] = set()
        self.draining = False
        self.loop = asyncio.get_running_loop()
        self._wall_clock = wall_clock
        self._epoch = wall_clock() - self.loop.time()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listener = TlsListener(tls_context, self.new_peer, limits=tls_limits)
        self.admission = Admission(self, registry, self.limits)
        self.broker = Broker(self, messaging)
        self.devices = Devices(self, self.broker)
        self.provisioning = Provisioners(self, provisioning, self.limits)

    @property
    def tls_counters(self) -> TlsCounters:
        """The counts of the TLS listener below."""
        return self._listener.counters

    def now(self) -> float:
        """Seconds since 1970, never backwards."""
        return self.loop.time() + self._epoch

    @property
    def ahead(self) -> float:
        """By how many seconds the wall clock is ahead of `now`: 0 until it jumps, as less than one is no jump."""
        ahead = self._wall_clock() - self.now()
        return ahead if abs(ahead) >= 1.0 else 0.0

    def new_peer(self) -> Peer:
        """One more connection; it begins with `connection_made` or `stand_on`."""
        return Peer(self)

    async def start(self, host: str, port: int) -> int:
        """Listen, when `Messaging.start` has this server's broker. Returns the bound port. Raises OSError when the
        address cannot be bound."""
        return await self._listener.start(host, port)

    async def drain(self, seconds: float) -> None:
        """Let what was received be stored, for at most `seconds`; then say goodbye to everybody and cut who stays."""
        self.draining = True
        await self._listener.close()
        for peer in list(self.peers):
            peer.pump()  # who is owed nothing is told goodbye at once, the others when they have their answers
        await self._all_gone(seconds)
        for peer in list(self.peers):
            peer.end(ReasonCode.SERVER_SHUTTING_DOWN, publish_will=True)
        await self._all_gone(LAST_WORDS)
        for peer in list(self.peers):
            peer.abort()
        await self._all_gone(LAST_WORDS)
        if self._tasks:  # sessions that are being given back to the store
            await asyncio.wait(list(self._tasks), timeout=LAST_WORDS)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=LAST_WORDS)
        self._listener.abort_all()

    def track(self, task: asyncio.Task[Any]) -> None:
        """Hold a task until it is done."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def ended(self, peer: Peer, ended: Ended) -> None:
        """Count how a connection ended."""
        if ended.cause not in (Cause.DISCONNECTED, Cause.LOST):
            self.counters.ended[ended.reason] += 1
        match ended.cause:
            case Cause.TIMEOUT:
                self.counters.timed_out += 1
            case Cause.VIOLATION:
                self.counters.violations += 1
            case Cause.DISCONNECTED | Cause.LOST | Cause.REFUSED | Cause.CLOSED:
                pass

    async def _all_gone(self, seconds: float) -> None:
        waiting = [asyncio.ensure_future(peer.gone()) for peer in self.peers]
        if not waiting:
            return
        _, late = await asyncio.wait(waiting, timeout=seconds)
        for each in late:
            each.cancel()
