"""Which devices are connected: `active` and `offline`, and the events of coming and going, written behind.

    session opens ── connected ───┐                      ┌── presence rows: (device, node)
                                  ├─► pending, by device ─┼── status: active ⇄ offline
    session ends ── disconnected ─┘    (a fifth of a     └── events: device.connected, device.disconnected
                                        second together)

For transports that have connections (MQTT). A device is connected while any node holds any session of it, and the
events tell of that: it connects with the first and disconnects with the last. A device that leaves and is back within
one writing has not been away; one that comes and goes within it gets both events. `inactive`, `maintenance` and
`pending` are other people's words and stay.

A writing takes up to a thousand devices in six statements, so a reconnect storm of ten thousand costs sixty. What is
written is this node's truth at that moment, not a log of what was queued: a writing that failed, or was lost with its
answer, is simply done again.

The nodes agree through the rows of `presence`, under the locks of the devices' rows: who writes reads first who else
holds the device. A node that dies leaves its rows behind. Its next life, or any other node once it is off the list of
nodes (nodes.FORGET_SECONDS), takes them away and calls the devices offline. A node that was taken for dead and was not
notices that its rows are gone and writes them again.

What can be lost: nothing but time. What the status can be late by: a fifth of a second in a healthy node, a minute
after a crash without a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from registry.errors import Unavailable
from registry.events import EventKind, NewEvent
from registry.model import Actor, CredentialId, DeviceId, Json, NodeId, SessionId, TenantId
from registry.ports import Clock, EventHint
from registry.sessions import Session
from registry.storage import events
from registry.storage import presence as storage
from registry.storage.database import Database

log = logging.getLogger(__name__)

HOLD_SECONDS: Final = 0.2
"""What happens within this time is written together."""
SWEEP_SECONDS: Final = 10.0
"""How often rows of dead nodes, and missing ones of this node, are looked for."""
WRITTEN_AT_ONCE: Final = 1_000
"""Devices in one transaction: some tens of milliseconds, during which their rows are locked."""
_RETRY_SECONDS: Final = 1.0

NODE_LOST: Final = "node lost"
"""The reason of those whose node died: nobody heard how their connections ended."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """Who came or went, for the events."""

    session_id: SessionId | None = None
    credential_id: CredentialId | None = None
    transport: str = ""
    peer: str = ""
    correlation_id: str = ""


@dataclass(frozen=True, slots=True)
class _Change:
    """What is to be written about a device on one node."""

    device_id: DeviceId
    node_id: NodeId
    online: bool
    facts: _Facts
    reason: str = ""
    blinked: bool = False
    """It came and went since the last writing that is known to have succeeded."""
    detail: str = ""


class Presence:
    """Keeps the presence of one node's devices."""

    def __init__(self, database: Database, node_id: NodeId, *, clock: Clock, feed: EventHint) -> None:
        self._database = database
        self._node_id = node_id
        self._clock = clock
        self._feed = feed
        self._sessions: dict[DeviceId, dict[SessionId, _Facts]] = {}
        self._pending: dict[DeviceId, _Change] = {}
        self._written: set[DeviceId] = set()
        self._writing = asyncio.Lock()
        self._wake = asyncio.Event()

    def connected(self, session: Session) -> None:
        """A session with a connection is open. Cheap, never waits, never raises."""
        device_id, facts = session.device_id, _facts(session)
        self._sessions.setdefault(device_id, {})[session.session_id] = facts
        self._put(_Change(device_id, self._node_id, True, facts))

    def disconnected(self, session: Session, reason: str, detail: str = "") -> None:
        """Its connection is over; `reason` is one of the program's own texts, and `detail` says to the operator what
        exactly was wrong, as the device itself would be told. Idempotent, cheap, never raises."""
        device_id = session.device_id
        held = self._sessions.get(device_id, {})
        facts = held.pop(session.session_id, None)
        if facts is None or held:
            return
        del self._sessions[device_id]
        blinked = device_id not in self._written
        self._put(_Change(device_id, self._node_id, False, facts, reason, blinked, detail))

    async def run(self) -> None:
        """Write behind for ever, beginning with what an earlier life of this node left."""
        loop = asyncio.get_running_loop()
        next_sweep = loop.time()
        while True:
            try:
                if loop.time() >= next_sweep:
                    next_sweep = loop.time() + SWEEP_SECONDS
                    await self.reconcile()
                    await self.sweep()
                await self.flush()
            except Unavailable:
                await asyncio.sleep(_RETRY_SECONDS)
                continue  # what is pending stays pending
            try:
                async with asyncio.timeout_at(next_sweep):
                    await self._wake.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(HOLD_SECONDS)

    async def flush(self) -> None:
        """Write what is pending. Raises Unavailable, and then loses nothing."""
        async with self._writing:
            self._wake.clear()
            while self._pending:
                taken = [self._pending.pop(d) for d in list(self._pending)[:WRITTEN_AT_ONCE]]
                # What holds now counts, not what held when the change was noted.
                changes = [replace(c, online=c.device_id in self._sessions) for c in taken]
                leaving = self._written.intersection(c.device_id for c in changes if not c.online)
                self._written -= leaving  # at once: who comes and goes during the writing has been there again
                try:
                    await self._write(changes)
                except BaseException:
                    self._pending = {c.device_id: c for c in taken} | self._pending
                    self._written |= leaving
                    self._wake.set()
                    raise
                self._written.update(c.device_id for c in changes if c.online)

    async def reconcile(self) -> None:
        """Compare the rows of this node with its sessions, and queue the differences. Raises Unavailable."""
        async with self._writing:
            async with self._database.connection() as connection:
                if self._written and await storage.count_of_node(connection, self._node_id) == len(self._written):
                    return
                rows = await storage.of_node(connection, self._node_id)
            self._written = rows
            for device_id in rows - self._sessions.keys() - self._pending.keys():
                self._put(_Change(device_id, self._node_id, False, _Facts(), NODE_LOST))
            for device_id, held in self._sessions.items():
                if device_id not in rows and device_id not in self._pending:
                    self._put(_Change(device_id, self._node_id, True, next(iter(held.values()))))

    async def sweep(self) -> None:
        """Take away the rows of nodes that are gone. Raises Unavailable."""
        while True:
            async with self._database.connection() as connection:
                orphans = await storage.of_nobody(connection, WRITTEN_AT_ONCE)
            orphans = [(device_id, node_id) for device_id, node_id in orphans if node_id != self._node_id]
            if not orphans:
                return
            await self._write([_Change(d, node_id, False, _Facts(), NODE_LOST) for d, node_id in orphans])
            log.warning("presence.orphans", extra={"fields": {"devices": len(orphans)}})

    async def stop(self) -> None:
        """Write the rest, if the database can be reached; the listeners have ended their sessions before."""
        try:
            await self.flush()
        except Unavailable:
            log.warning("presence.unwritten", extra={"fields": {"devices": len(self._pending)}})

    def _put(self, change: _Change) -> None:
        self._pending[change.device_id] = change
        self._wake.set()

    async def _write(self, changes: Sequence[_Change]) -> None:
        now = self._clock()
        async with self._database.transaction() as connection:
            device_ids = list({c.device_id for c in changes})
            tenants = await storage.lock_devices(connection, device_ids)
            holders = await storage.places(connection, device_ids)
            called_dead = {c.node_id for c in changes} - {self._node_id}
            returned = await storage.on_the_list(connection, called_dead) if called_dead else set()  # they speak again
            living = [c for c in changes if c.device_id in tenants and c.node_id not in returned]
            await storage.move(
                connection,
                {(c.device_id, c.node_id): tenants[c.device_id] for c in living if c.online},
                [(c.device_id, c.node_id) for c in living if not c.online],
                now,
            )
            told: list[NewEvent] = []
            for change in living:
                told += _events(change, tenants[change.device_id], holders.setdefault(change.device_id, set()))
            await storage.set_statuses(connection, {c.device_id: bool(holders[c.device_id]) for c in living}, now)
            if told:
                await events.insert_many(connection, told)
        if told:
            self._feed.hint()


def _events(change: _Change, tenant_id: TenantId, holders: set[NodeId]) -> list[NewEvent]:
    """What a change tells about a device that these nodes hold; brings `holders` up to date."""
    was_held = bool(holders)
    if change.online:
        holders.add(change.node_id)
    else:
        holders.discard(change.node_id)
    told: list[NewEvent] = []
    if not was_held and (change.online or change.blinked):
        told.append(_event(EventKind.DEVICE_CONNECTED, change, tenant_id))
    if not holders and (was_held or change.blinked):
        told.append(_event(EventKind.DEVICE_DISCONNECTED, change, tenant_id))
    return told


def _event(kind: EventKind, change: _Change, tenant_id: TenantId) -> NewEvent:
    facts = change.facts
    data: dict[str, Json] = {"node_id": change.node_id}
    if facts.transport:
        data |= {"transport": facts.transport, "peer": facts.peer}
    if kind is EventKind.DEVICE_DISCONNECTED:
        data["reason"] = change.reason
        if change.detail:
            data["detail"] = change.detail
    return NewEvent(
        kind,
        tenant_id,
        Actor("system:presence", facts.correlation_id),
        device_id=change.device_id,
        credential_id=facts.credential_id,
        session_id=facts.session_id,
        data=data,
    )


def _facts(session: Session) -> _Facts:
    contact = session.contact
    return _Facts(
        session.session_id,
        session.identity.credential_id,
        contact.transport.value,
        contact.peer,
        contact.correlation_id,
    )
