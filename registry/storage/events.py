"""The event table: written inside other transactions, read by position below the oldest running transaction."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID, uuid4

from asyncpg import Record

from registry.events import Event, NewEvent, Position
from registry.model import DeviceId, TenantId
from registry.storage.database import Connection

_COLUMNS = """
    seq, xid::text::bigint AS xid, event_id, tenant_id, kind, at, device_id, credential_id, session_id,
    actor, correlation_id, data
"""


async def insert(connection: Connection, event: NewEvent) -> int:
    """Write an event in the caller's transaction; its number. It is seen if, and when, that transaction commits."""
    number: int = await connection.fetchval(
        """
        INSERT INTO event (event_id, tenant_id, kind, device_id, credential_id, session_id, actor, correlation_id, data)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        RETURNING seq
        """,
        uuid4(),
        event.tenant_id,
        event.kind.value,
        event.device_id,
        event.credential_id,
        event.session_id,
        event.actor.name,
        event.actor.correlation_id,
        dict(event.data),
    )
    return number


async def insert_many(connection: Connection, events: list[NewEvent]) -> None:
    """Write several events in one statement."""
    await connection.execute(
        """
        INSERT INTO event (event_id, tenant_id, kind, device_id, credential_id, session_id, actor, correlation_id, data)
        SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::uuid[], $5::uuid[], $6::uuid[], $7::text[],
                             $8::text[], $9::jsonb[])
        """,
        [uuid4() for _ in events],
        [e.tenant_id for e in events],
        [e.kind.value for e in events],
        [e.device_id for e in events],
        [e.credential_id for e in events],
        [e.session_id for e in events],
        [e.actor.name for e in events],
        [e.actor.correlation_id for e in events],
        [dict(e.data) for e in events],
    )


@dataclass(frozen=True, slots=True)
class Aged:
    """An event, and the seconds since it was written, on the database's clock."""

    event: Event
    age_seconds: float


async def read_settled(connection: Connection, after: Position, limit: int) -> list[Aged]:
    """Events of all tenants after a position, which no later commit can precede, for the node's own feed."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS}, extract(epoch FROM clock_timestamp() - at)::float8 AS age
        FROM event
        WHERE (xid, seq) > ($1::text::xid8, $2) AND xid < pg_snapshot_xmin(pg_current_snapshot())
        ORDER BY event.xid, event.seq
        LIMIT $3
        """,  # noqa: S608  # the columns are a constant of this file
        str(after.xid),
        after.seq,
        limit,
    )
    return [Aged(_event(r), r["age"]) for r in rows]


async def read_early(connection: Connection, known: Collection[int], limit: int) -> list[Aged]:
    """Teardown events that are committed but not settled, without the `known` ones (their numbers)."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS}, extract(epoch FROM clock_timestamp() - at)::float8 AS age
        FROM event
        WHERE kind IN ('credential.revoked', 'device.deactivated', 'device.deleted', 'session.kicked')
          AND xid >= pg_snapshot_xmin(pg_current_snapshot()) AND seq <> ALL ($1::bigint[])
        ORDER BY event.xid, event.seq
        LIMIT $2
        """,  # noqa: S608  # the columns are a constant of this file
        list(known),
        limit,
    )
    return [Aged(_event(r), r["age"]) for r in rows]


async def oldest_unsettled(connection: Connection) -> float | None:
    """Seconds since the first event was written that still waits for older transactions; None if none waits."""
    age: float | None = await connection.fetchval(
        """
        SELECT extract(epoch FROM clock_timestamp() - at)::float8 FROM event
        WHERE xid >= pg_snapshot_xmin(pg_current_snapshot())
        ORDER BY event.xid, event.seq
        LIMIT 1
        """
    )
    return age


async def newest_settled(connection: Connection) -> Position:
    """The position from which a new reader sees only what is yet to come."""
    row = await connection.fetchrow(
        """
        SELECT xid::text::bigint AS xid, seq FROM event
        WHERE xid < pg_snapshot_xmin(pg_current_snapshot())
        ORDER BY event.xid DESC, event.seq DESC LIMIT 1
        """
    )
    return Position(row["xid"], row["seq"]) if row else Position(0, 0)


async def read_tenant(connection: Connection, tenant_id: TenantId, after: Position, limit: int) -> list[Event]:
    """Settled events of one tenant after a position, oldest first."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM event
        WHERE tenant_id = $1 AND (xid, seq) > ($2::text::xid8, $3)
          AND xid < pg_snapshot_xmin(pg_current_snapshot())
        ORDER BY event.xid, event.seq
        LIMIT $4
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        str(after.xid),
        after.seq,
        limit,
    )
    return [_event(r) for r in rows]


async def read_device(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, before: Position | None, limit: int
) -> list[Event]:
    """Events of one device, newest first, committed ones at once (a timeline may be re-read)."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM event
        WHERE tenant_id = $1 AND device_id = $2 AND ($3::text IS NULL OR (xid, seq) < ($3::text::xid8, $4))
        ORDER BY event.xid DESC, event.seq DESC
        LIMIT $5
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        device_id,
        str(before.xid) if before else None,
        before.seq if before else 0,
        limit,
    )
    return [_event(r) for r in rows]


async def rebase(connection: Connection) -> int:
    """After a dump was restored into another cluster, transaction numbers start low again and old events would never
    settle. Such rows are moved to transaction 0, in their old order; the number of rows moved."""
    # What a snapshot shows has a transaction number below its xmax, in the cluster where it was written.
    status = await connection.execute("UPDATE event SET xid = '0' WHERE xid >= pg_snapshot_xmax(pg_current_snapshot())")
    return int(status.rsplit(" ", 1)[-1])


async def is_ahead(connection: Connection, position: Position) -> bool:
    """Whether a position lies in this cluster's future: it is from another one, before a failover or a restore."""
    ahead: bool = await connection.fetchval(
        "SELECT $1::text::xid8 >= pg_snapshot_xmax(pg_current_snapshot())", str(position.xid)
    )
    return ahead


def _event(row: Record) -> Event:
    event_id: UUID = row["event_id"]
    return Event(
        position=Position(row["xid"], row["seq"]),
        event_id=event_id,
        name=row["kind"],
        tenant_id=row["tenant_id"],
        at=row["at"],
        device_id=row["device_id"],
        credential_id=row["credential_id"],
        session_id=row["session_id"],
        actor=row["actor"],
        correlation_id=row["correlation_id"],
        data=row["data"],
    )
