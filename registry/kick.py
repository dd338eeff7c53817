"""Ending one session by an operator's word. The credential stays good: the device may come back at once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from registry.errors import NotFound
from registry.events import EventKind, NewEvent
from registry.model import Actor, DeviceId, Receipt, SessionId, TenantId
from registry.ports import Ended, Teardown
from registry.sessions import Scope, SessionTable
from registry.storage import audit, events, nodes
from registry.storage.database import Database


class Kick:
    """Throws one session out, on whatever node it lives."""

    def __init__(
        self, database: Database, sessions: SessionTable, teardown: Teardown, *, clock: Callable[[], datetime]
    ) -> None:
        self._database = database
        self._sessions = sessions
        self._teardown = teardown
        self._clock = clock

    async def session(self, tenant_id: TenantId, session_id: SessionId, actor: Actor) -> Receipt:
        """Close a session. Raises NotFound when the tenant has no such live session on any node."""
        local = self._sessions.matching(Scope(tenant_id, session_id=session_id))
        async with self._database.transaction() as connection:
            if local:
                device_id: DeviceId = local[0].device_id
            else:
                row = await nodes.mirrored_session(connection, tenant_id, session_id)
                if row is None:
                    raise NotFound("no such session in this tenant")
                device_id = row["device_id"]
            await audit.insert(connection, tenant_id, actor, "kick", "session", str(session_id))
            seq = await events.insert(
                connection,
                NewEvent(EventKind.SESSION_KICKED, tenant_id, actor, device_id=device_id, session_id=session_id),
            )
        return await self._teardown.complete(
            Ended(
                event_seq=seq,
                tenant_id=tenant_id,
                revoked_at=self._clock(),
                device_id=device_id,
                session_id=session_id,
                reason="kicked by an operator",
            )
        )
