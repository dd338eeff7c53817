"""Nodes of one database: their locks, heartbeats, session mirrors and teardown reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal
from uuid import UUID

from asyncpg import Record

from registry.model import ClosedSession, CredentialId, DeviceId, NodeId, SessionId, TenantId, Transport
from registry.storage.database import Connection

MirrorRow = tuple[SessionId, TenantId, DeviceId, CredentialId, Transport, str, datetime]
"""Session, tenant, device, credential, transport, peer, opened at."""
ALIVE_SECONDS = 10
"""Nobody waits for a node whose heartbeat is older. Its mirrored sessions still count as not confirmed."""
FORGET_SECONDS = 60
"""After this its row and its mirrored sessions are removed; if it lives after all, it announces itself again."""


async def take_lock(connection: Connection, number: int, *, wait_seconds: float = 10.0) -> bool:
    """Take a session-level advisory lock, waiting for a predecessor's connection to die; whether it was had."""
    await connection.execute("SELECT set_config('lock_timeout', $1, false)", f"{int(wait_seconds * 1000)}ms")
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", number, timeout=wait_seconds + 5)
    except Exception as error:
        if getattr(error, "sqlstate", None) == "55P03":  # lock_not_available
            return False
        raise
    await connection.execute("SELECT set_config('lock_timeout', '0', false)")
    return True


async def join(connection: Connection, node_id: NodeId, incarnation: UUID, started_at: datetime) -> None:
    """Announce a node; what its predecessor left behind goes."""
    await connection.execute("DELETE FROM session WHERE node_id = $1", node_id)
    await connection.execute(
        """
        INSERT INTO node (node_id, incarnation, started_at, heartbeat_at) VALUES ($1, $2, $3, clock_timestamp())
        ON CONFLICT (node_id) DO UPDATE
        SET incarnation = EXCLUDED.incarnation, started_at = EXCLUDED.started_at, heartbeat_at = EXCLUDED.heartbeat_at
        """,
        node_id,
        incarnation,
        started_at,
    )


async def leave(connection: Connection, node_id: NodeId, incarnation: UUID) -> None:
    """Take a node off the list."""
    await connection.execute("DELETE FROM session WHERE node_id = $1", node_id)
    await connection.execute("DELETE FROM node WHERE node_id = $1 AND incarnation = $2", node_id, incarnation)


async def heartbeat(
    connection: Connection, node_id: NodeId, incarnation: UUID, started_at: datetime
) -> tuple[list[NodeId], bool]:
    """Tell that this node lives; the other living ones, and whether this one had been forgotten meanwhile."""
    known: bool = await connection.fetchval(
        """
        INSERT INTO node (node_id, incarnation, started_at, heartbeat_at) VALUES ($1, $2, $3, clock_timestamp())
        ON CONFLICT (node_id) DO UPDATE SET heartbeat_at = EXCLUDED.heartbeat_at
        RETURNING xmax <> 0
        """,
        node_id,
        incarnation,
        started_at,
    )
    return await others(connection, node_id), not known


async def others(connection: Connection, node_id: NodeId) -> list[NodeId]:
    """The other living nodes."""
    rows = await connection.fetch(
        """
        SELECT node_id FROM node
        WHERE node_id <> $1 AND heartbeat_at > clock_timestamp() - make_interval(secs => $2)
        ORDER BY node_id
        """,
        node_id,
        ALIVE_SECONDS,
    )
    return [row["node_id"] for row in rows]


async def remove_dead(connection: Connection) -> None:
    """Remove nodes that stopped beating long ago, and mirrored sessions of nodes that there are not."""
    await connection.execute(
        "DELETE FROM node WHERE heartbeat_at < clock_timestamp() - make_interval(secs => $1)", FORGET_SECONDS
    )
    for node_id in await unlisted(connection, "session"):
        # One that comes back this very moment finds its mirror smaller than it should be.
        await connection.execute(
            """
            DELETE FROM session WHERE node_id = $1 AND session_id = ANY (ARRAY (
                SELECT session_id FROM session WHERE node_id = $1 ORDER BY session_id FOR UPDATE))
            """,
            node_id,
        )


async def unlisted(connection: Connection, table: Literal["session", "presence"]) -> list[NodeId]:
    """Nodes that are not on the list and still have rows in a table.

    A step through its index for each node, not a look at every row: every node asks this every two seconds.
    """
    rows = await connection.fetch(
        f"""
        WITH RECURSIVE holder AS (
            SELECT min(node_id) AS node_id FROM {table}
            UNION ALL
            SELECT (SELECT min(t.node_id) FROM {table} t WHERE t.node_id > holder.node_id)
            FROM holder WHERE holder.node_id IS NOT NULL
        )
        SELECT h.node_id FROM holder h
        WHERE h.node_id IS NOT NULL AND NOT EXISTS (SELECT FROM node n WHERE n.node_id = h.node_id)
        """  # noqa: S608  # one of two names
    )
    return [row["node_id"] for row in rows]


async def clear_mirror(connection: Connection, node_id: NodeId) -> None:
    """Remove all mirrored sessions of a node."""
    await connection.execute("DELETE FROM session WHERE node_id = $1", node_id)


async def mirror_size(connection: Connection, node_id: NodeId) -> int:
    """How many sessions of a node are mirrored."""
    number: int = await connection.fetchval("SELECT count(*) FROM session WHERE node_id = $1", node_id)
    return number


async def mirror(
    connection: Connection,
    node_id: NodeId,
    opened: Sequence[MirrorRow],
    closed: Sequence[SessionId],
) -> None:
    """Bring the mirror of this node's sessions up to date."""
    if closed:
        await connection.execute("DELETE FROM session WHERE session_id = ANY ($1::uuid[])", list(closed))
    if opened:
        await connection.execute(
            """
            INSERT INTO session (session_id, node_id, tenant_id, device_id, credential_id, transport, peer, opened_at)
            SELECT u.session_id, $1, u.tenant_id, u.device_id, u.credential_id, u.transport, u.peer, u.opened_at
            FROM unnest($2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::text[], $7::text[], $8::timestamptz[])
                AS u (session_id, tenant_id, device_id, credential_id, transport, peer, opened_at)
            ON CONFLICT (session_id) DO NOTHING
            """,
            node_id,
            [o[0] for o in opened],
            [o[1] for o in opened],
            [o[2] for o in opened],
            [o[3] for o in opened],
            [o[4].value for o in opened],
            [o[5] for o in opened],
            [o[6] for o in opened],
        )


async def mirrored(connection: Connection, tenant_id: TenantId, except_node: NodeId, limit: int) -> list[Record]:
    """Sessions of a tenant on the other living nodes, oldest first."""
    rows: list[Record] = await connection.fetch(
        """
        SELECT s.session_id, s.node_id, s.tenant_id, s.device_id, s.credential_id, s.transport, s.peer, s.opened_at
        FROM session s JOIN node n ON n.node_id = s.node_id
        WHERE s.tenant_id = $1 AND s.node_id <> $2
          AND n.heartbeat_at > clock_timestamp() - make_interval(secs => $3)
        ORDER BY s.opened_at, s.session_id
        LIMIT $4
        """,
        tenant_id,
        except_node,
        ALIVE_SECONDS,
        limit,
    )
    return rows


async def mirrored_session(connection: Connection, tenant_id: TenantId, session_id: SessionId) -> Record | None:
    """One mirrored session of a tenant."""
    return await connection.fetchrow(
        "SELECT session_id, node_id, device_id, credential_id FROM session WHERE tenant_id = $1 AND session_id = $2",
        tenant_id,
        session_id,
    )


async def count_mirrored(
    connection: Connection,
    tenant_id: TenantId,
    except_nodes: Sequence[NodeId],
    device_id: DeviceId | None,
    credential_id: CredentialId | None,
    session_id: SessionId | None,
) -> int:
    """Mirrored sessions that an end concerns on all nodes but those that are known to have closed them."""
    number: int = await connection.fetchval(
        """
        SELECT count(*) FROM session
        WHERE tenant_id = $1 AND node_id <> ALL ($2::text[])
          AND ($3::uuid IS NULL OR device_id = $3)
          AND ($4::uuid IS NULL OR credential_id = $4)
          AND ($5::uuid IS NULL OR session_id = $5)
        """,
        tenant_id,
        list(except_nodes),
        device_id,
        credential_id,
        session_id,
    )
    return number


async def report(
    connection: Connection, event_seq: int, node_id: NodeId, sessions: Sequence[ClosedSession], remaining: int
) -> None:
    """What this node closed because of a teardown event; the first report stands."""
    lines = [[str(s.session_id), s.transport.value, s.closed_after_ms] for s in sessions]
    await connection.execute(
        """
        INSERT INTO teardown_report (event_seq, node_id, sessions, remaining) VALUES ($1, $2, $3, $4)
        ON CONFLICT DO NOTHING
        """,
        event_seq,
        node_id,
        lines,
        remaining,
    )


async def reports(connection: Connection, event_seq: int) -> dict[NodeId, tuple[list[ClosedSession], int]]:
    """The reports of a teardown event by node: what each closed, and how many remain there."""
    rows = await connection.fetch(
        "SELECT node_id, sessions, remaining FROM teardown_report WHERE event_seq = $1", event_seq
    )
    return {
        row["node_id"]: (
            [
                ClosedSession(SessionId(UUID(i)), Transport(transport), row["node_id"], after)
                for i, transport, after in row["sessions"]
            ],
            row["remaining"],
        )
        for row in rows
    }


async def seen(connection: Connection, devices: Mapping[DeviceId, datetime], now: datetime) -> None:
    """Move `last_seen_at` of these devices forward, but of those that somebody else is changing: their turn comes.

    One that is minutes ahead of `now` was written by a clock that was wrong, and gives way to any other. Ids of live
    sessions, so across tenants.
    """
    await connection.execute(
        """
        UPDATE device d SET last_seen_at = s.at
        FROM (
            SELECT l.device_id, u.at
            FROM unnest($1::uuid[], $2::timestamptz[]) AS u (device_id, at) JOIN device l ON l.device_id = u.device_id
            ORDER BY l.device_id
            FOR NO KEY UPDATE OF l SKIP LOCKED
        ) AS s
        WHERE d.device_id = s.device_id
          AND (d.last_seen_at IS NULL OR d.last_seen_at < s.at
               OR d.last_seen_at > $3::timestamptz + interval '5 minutes')
        """,
        list(devices.keys()),
        list(devices.values()),
        now,
    )
