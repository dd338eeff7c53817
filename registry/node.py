"""This node among the others: its heartbeat, the mirror of its sessions, and the work that a clock starts.

Every node of a database beats every two seconds. A node that has not beaten for `nodes.ALIVE_SECONDS` is gone: receipts
do not wait for it and its mirrored sessions are removed. Sessions are mirrored only while another node lives: alone,
this memory is all there is to see. Nothing here decides about admission; a late tick delays a view, or an expiry by a
second, or the safety net's sweep.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

from registry.errors import Unavailable
from registry.model import CredentialId, DeviceId, NodeId, SessionId, TenantId
from registry.revocation import Teardown
from registry.sessions import SessionTable
from registry.storage import nodes
from registry.storage.database import Database

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
TICK_SECONDS = 0.5
SEEN_SECONDS = 10.0
"""How often `last_seen_at` is written for devices that are active: the precision of that field."""


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session of any node, for operators."""

    session_id: SessionId
    node_id: NodeId
    tenant_id: TenantId
    device_id: DeviceId
    credential_id: CredentialId
    transport: str
    peer: str
    opened_at: datetime


class Node:
    """Keeps this node's place in the database."""

    def __init__(
        self,
        database: Database,
        sessions: SessionTable,
        teardown: Teardown,
        *,
        clock: Callable[[], datetime],
        sweep_seconds: float = 30.0,
    ) -> None:
        self.node_id = sessions.node_id
        self._database = database
        self._sessions = sessions
        self._teardown = teardown
        self._clock = clock
        self._sweep_seconds = sweep_seconds
        self._incarnation: UUID = uuid4()
        self._mirrored: set[SessionId] = set()
        self._others: list[NodeId] = []

    async def join(self) -> None:
        """Announce this node; the caller holds its lock (feed.py). Raises Unavailable."""
        async with self._database.connection() as connection:
            await nodes.join(connection, self.node_id, self._incarnation, self._clock())
            await nodes.remove_dead(connection)
            self._others = await nodes.others(connection, self.node_id)

    async def leave(self) -> None:
        """Take this node off the list, if the database can be reached."""
        try:
            async with self._database.connection() as connection:
                await nodes.leave(connection, self.node_id, self._incarnation)
        except Unavailable:
            log.info("node.left_unannounced", extra={"fields": {"node": self.node_id}})

    async def run(self) -> None:
        """Beat, mirror, expire and sweep for ever."""
        loop = asyncio.get_running_loop()
        next_beat = next_sweep = next_seen = loop.time()
        next_sweep += self._sweep_seconds
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = loop.time()
            try:
                await self._teardown.expire()
                if now >= next_beat:
                    next_beat = now + BEAT_SECONDS
                    await self._beat()
                if self._others:
                    await self._mirror()
                if now >= next_seen:
                    next_seen = now + SEEN_SECONDS
                    await self._write_seen()
                if now >= next_sweep:
                    next_sweep = now + self._sweep_seconds
                    await self._teardown.sweep()
                    async with self._database.connection() as connection:
                        await nodes.remove_dead(connection)
            except Unavailable:
                continue  # the feed tells of the loss; the next tick tries again

    async def sessions_of(self, tenant_id: TenantId, limit: int) -> list[SessionView]:
        """Live sessions of a tenant on all nodes, oldest first. Raises Unavailable."""
        mine = [
            SessionView(
                s.session_id,
                self.node_id,
                s.tenant_id,
                s.device_id,
                s.identity.credential_id,
                s.contact.transport.value,
                s.contact.peer,
                s.opened_at,
            )
            for s in self._sessions.all()
            if s.tenant_id == tenant_id
        ]
        async with self._database.connection() as connection:
            rows = await nodes.mirrored(connection, tenant_id, self.node_id, limit)
        theirs = [SessionView(**dict(row)) for row in rows]
        return sorted(mine + theirs, key=lambda s: (s.opened_at, s.session_id))[:limit]

    async def _beat(self) -> None:
        async with self._database.connection() as connection:
            others = await nodes.heartbeat(connection, self.node_id)
        if not others:
            self._mirrored.clear()
        self._others = others

    async def _mirror(self) -> None:
        live = {s.session_id: s for s in self._sessions.all()}
        closed = self._mirrored - live.keys()
        opened = [s for i, s in live.items() if i not in self._mirrored]
        if not closed and not opened:
            return
        rows = [
            (
                s.session_id,
                s.tenant_id,
                s.device_id,
                s.identity.credential_id,
                s.contact.transport,
                s.contact.peer,
                s.opened_at,
            )
            for s in opened
        ]
        async with self._database.connection() as connection:
            await nodes.mirror(connection, self.node_id, rows, list(closed))
        self._mirrored = set(live)

    async def _write_seen(self) -> None:
        seen = self._sessions.take_seen()
        if seen:
            async with self._database.connection() as connection:
                await nodes.seen(connection, seen)
