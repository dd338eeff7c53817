"""This node among the others: its heartbeat, the mirror of its sessions, and the work that a clock starts.

Every node of a database beats every two seconds. Receipts do not wait for a node that has not beaten for
`nodes.ALIVE_SECONDS`; after `nodes.FORGET_SECONDS` it is forgotten, and announces itself again if it was only away.
Sessions are mirrored only while another node lives: alone, this memory is all there is to see. Whenever the mirror may
have drifted (others appear, this node was forgotten, rows are missing after a crash of the database emptied the
unlogged table) it is cleared and written anew.

Four loops, so that none waits for another: the beat and the mirror; expiry; `last_seen`; the sweep. Nothing here
decides about admission: a late tick delays a view, an expiry, or the safety net.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

from registry.errors import Unavailable
from registry.model import CredentialId, DeviceId, NodeId, SessionId, TenantId
from registry.revocation import Teardown
from registry.sessions import Session, SessionTable
from registry.storage import nodes
from registry.storage.database import Database

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
TICK_SECONDS = 0.5
"""How late an expiry, or a session in another node's view, may be."""
_ROWS_AT_ONCE = 2000
"""Rows in one statement of the background: a few tens of milliseconds, and few row locks at a time."""
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
        self._started_at = clock()
        self._next_beat = 0.0
        self._mirror_stale = True
        self._mirrored: set[SessionId] = set()
        self._others: list[NodeId] = []

    async def join(self) -> None:
        """Announce this node; the caller holds its lock (feed.py). Raises Unavailable."""
        async with self._database.connection() as connection:
            await nodes.join(connection, self.node_id, self._incarnation, self._started_at)
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
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._every(TICK_SECONDS, self._beat_and_mirror))
            loops.create_task(self._every(TICK_SECONDS, self._teardown.expire))
            loops.create_task(self._every(SEEN_SECONDS, self._write_seen))
            loops.create_task(self._every(self._sweep_seconds, self._sweep))

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

    @staticmethod
    async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except Unavailable:
                continue  # the feed tells of the loss; the next tick tries again

    async def _beat_and_mirror(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_beat:
            self._next_beat = now + BEAT_SECONDS
            await self._beat()
        if self._others:
            await self._mirror()

    async def _beat(self) -> None:
        async with self._database.connection() as connection:
            others, forgotten = await nodes.heartbeat(connection, self.node_id, self._incarnation, self._started_at)
        if forgotten:
            log.warning("node.returned", extra={"fields": {"node": self.node_id}})
        if forgotten or bool(others) != bool(self._others):
            self._mirror_stale = True
        self._others = others

    async def _sweep(self) -> None:
        await self._teardown.sweep()
        async with self._database.connection() as connection:
            await nodes.remove_dead(connection)
            if self._others and await nodes.mirror_size(connection, self.node_id) != len(self._mirrored):
                self._mirror_stale = True

    async def _mirror(self) -> None:
        async with self._database.connection() as connection:
            if self._mirror_stale:
                await nodes.clear_mirror(connection, self.node_id)
                self._mirrored.clear()
                self._mirror_stale = False
            live = {s.session_id: s for s in self._sessions.all()}
            closed = list(self._mirrored - live.keys())
            opened = [s for i, s in live.items() if i not in self._mirrored]
            for start in range(0, max(len(closed), len(opened)), _ROWS_AT_ONCE):
                end = start + _ROWS_AT_ONCE
                rows = [_row(s) for s in opened[start:end]]
                await nodes.mirror(connection, self.node_id, rows, closed[start:end])
                self._mirrored.difference_update(closed[start:end])
                self._mirrored.update(row[0] for row in rows)

    async def _write_seen(self) -> None:
        seen = list(self._sessions.take_seen().items())
        for start in range(0, len(seen), _ROWS_AT_ONCE):
            try:
                async with self._database.connection() as connection:
                    await nodes.seen(connection, dict(seen[start : start + _ROWS_AT_ONCE]), self._clock())
            except Unavailable:
                self._sessions.put_back_seen(dict(seen[start:]))
                raise


def _row(session: Session) -> nodes.MirrorRow:
    return (
        session.session_id,
        session.tenant_id,
        session.device_id,
        session.identity.credential_id,
        session.contact.transport,
        session.contact.peer,
        session.opened_at,
    )
