"""The command table. Its rows are locked in the order of `seq`, after the device's row where both are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from asyncpg import Record

from registry.model import CommandId, DeviceId, TenantId
from registry.storage.database import Connection


class CommandStatus(Enum):
    """Where a command stands (registry/commands.py has the steps between)."""

    QUEUED = "queued"
    DELIVERED = "delivered"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


UNFINISHED = frozenset({CommandStatus.QUEUED, CommandStatus.DELIVERED})


@dataclass(frozen=True, slots=True)
class CommandError:
    """What a device says went wrong."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command to a device, with what became of it."""

    seq: int
    """Its place among the device's commands."""
    command_id: CommandId
    tenant_id: TenantId
    device_id: DeviceId
    method: str
    params: str
    """JSON text, the operator's own."""
    status: CommandStatus
    created_by: str
    created_at: datetime
    expires_at: datetime
    delivered_at: datetime | None = None
    """When it was first delivered."""
    deliveries: int = 0
    finished_at: datetime | None = None
    result: str | None = None
    """JSON text, the device's own; of a success."""
    error: CommandError | None = None
    answered_by: DeviceId | None = None
    """The device itself, or its gateway."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which unfinished commands a transport wants: those of a device behind `after`, at most `most`.

    With `via` only while that gateway is the device's parent.
    """

    tenant_id: TenantId
    device_id: DeviceId
    after: int
    most: int
    via: DeviceId | None


_COLUMNS = """
    c.seq, c.command_id, c.tenant_id, c.device_id, c.method, c.params::text AS params, c.status, c.created_by,
    c.created_at, c.expires_at, c.delivered_at, c.deliveries, c.finished_at, c.result::text AS result, c.error_code,
    c.error_message, c.answered_by
"""
_UNFINISHED = "c.status IN ('queued', 'delivered')"


async def count_unfinished(connection: Connection, device_id: DeviceId, at_most: int) -> int:
    """How many commands of a device are not finished, counted up to `at_most`."""
    number: int = await connection.fetchval(
        f"SELECT count(*) FROM (SELECT FROM command c WHERE device_id = $1 AND {_UNFINISHED} LIMIT $2) AS open",  # noqa: S608
        device_id,
        at_most,
    )
    return number


async def insert(
    connection: Connection,
    *,
    command_id: CommandId,
    tenant_id: TenantId,
    device_id: DeviceId,
    method: str,
    params: str,
    created_by: str,
    created_at: datetime,
    expires_at: datetime,
) -> Command:
    """Queue a command. Duty of the caller: hold the lock of the device's row, which makes `seq` its order."""
    row = await connection.fetchrow(
        f"""
        INSERT INTO command AS c
            (command_id, tenant_id, device_id, method, params, status, created_by, created_at, expires_at)
        VALUES ($1, $2, $3, $4, $5::text::json, 'queued', $6, $7, $8)
        RETURNING {_COLUMNS}
        """,  # noqa: S608  # the columns are a constant of this file
        command_id,
        tenant_id,
        device_id,
        method,
        params,
        created_by,
        created_at,
        expires_at,
    )
    assert row is not None
    return _command(row)


async def get(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, command_id: CommandId, *, lock: bool = False
) -> Command | None:
    """One command of a device; with `lock`, its row locked until the transaction ends."""
    row = await connection.fetchrow(
        f"""
        SELECT {_COLUMNS} FROM command c WHERE c.tenant_id = $1 AND c.device_id = $2 AND c.command_id = $3
        {"FOR UPDATE" if lock else ""}
        """,  # noqa: S608  # constants of this file
        tenant_id,
        device_id,
        command_id,
    )
    return _command(row) if row else None


async def read(
    connection: Connection,
    tenant_id: TenantId,
    device_id: DeviceId,
    status: CommandStatus | None,
    method: str | None,
    before: int | None,
    limit: int,
) -> list[Command]:
    """A device's commands before a place, the newest first."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM command c
        WHERE c.tenant_id = $1 AND c.device_id = $2 AND ($3::text IS NULL OR c.status = $3)
          AND ($4::text IS NULL OR c.method = $4) AND ($5::bigint IS NULL OR c.seq < $5)
        ORDER BY c.seq DESC
        LIMIT $6
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        device_id,
        None if status is None else status.value,
        method,
        before,
        limit,
    )
    return [_command(row) for row in rows]


async def unfinished(connection: Connection, wanted: Sequence[Wanted], now: datetime) -> list[list[Command]]:
    """For each of `wanted`, the unfinished and unexpired commands in their order.

    None for a device that is inactive, gone, or not `via`'s child.
    """
    rows = await connection.fetch(
        f"""
        SELECT w.place, c.*
        FROM unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::integer[], $5::uuid[])
             WITH ORDINALITY AS w (tenant_id, device_id, after, most, via, place)
        JOIN device d ON d.tenant_id = w.tenant_id AND d.device_id = w.device_id
             AND d.status <> 'inactive' AND (w.via IS NULL OR d.gateway_id = w.via)
        CROSS JOIN LATERAL (
            SELECT {_COLUMNS} FROM command c
            WHERE c.tenant_id = w.tenant_id AND c.device_id = w.device_id AND c.seq > w.after AND {_UNFINISHED}
              AND c.expires_at > $6
            ORDER BY c.seq
            LIMIT w.most
        ) AS c
        ORDER BY w.place, c.seq
        """,  # noqa: S608  # the columns are a constant of this file
        [w.tenant_id for w in wanted],
        [w.device_id for w in wanted],
        [w.after for w in wanted],
        [w.most for w in wanted],
        [w.via for w in wanted],
        now,
    )
    found: list[list[Command]] = [[] for _ in wanted]
    for row in rows:
        found[row["place"] - 1].append(_command(row))
    return found


async def lock_many(connection: Connection, command_ids: Sequence[CommandId]) -> list[Command]:
    """Lock these commands, in the order of `seq`. Across tenants: their ids come from this node's own readings."""
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM command c WHERE c.command_id = ANY ($1::uuid[]) ORDER BY c.seq FOR UPDATE",  # noqa: S608
        list(command_ids),
    )
    return [_command(row) for row in rows]


async def lock_due(connection: Connection, now: datetime, limit: int) -> list[Command]:
    """Lock unfinished commands of all tenants whose time is over; those that somebody works on are left to them."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM command c WHERE {_UNFINISHED} AND c.expires_at <= $1
        ORDER BY c.expires_at LIMIT $2
        FOR UPDATE SKIP LOCKED
        """,  # noqa: S608  # constants of this file
        now,
        limit,
    )
    return [_command(row) for row in rows]


async def update_many(connection: Connection, commands: Sequence[Command]) -> None:
    """Write what may change. Duty of the caller: hold the locks of their rows."""
    await connection.execute(
        """
        UPDATE command c
        SET status = u.status, delivered_at = u.delivered_at, deliveries = u.deliveries, finished_at = u.finished_at,
            result = u.result::json, error_code = u.error_code, error_message = u.error_message,
            answered_by = u.answered_by
        FROM unnest($1::bigint[], $2::text[], $3::timestamptz[], $4::integer[], $5::timestamptz[], $6::text[],
                    $7::text[], $8::text[], $9::uuid[])
             AS u (seq, status, delivered_at, deliveries, finished_at, result, error_code, error_message, answered_by)
        WHERE c.seq = u.seq
        """,
        [c.seq for c in commands],
        [c.status.value for c in commands],
        [c.delivered_at for c in commands],
        [c.deliveries for c in commands],
        [c.finished_at for c in commands],
        [c.result for c in commands],
        [c.error.code if c.error else None for c in commands],
        [c.error.message if c.error else None for c in commands],
        [c.answered_by for c in commands],
    )


def _command(row: Record) -> Command:
    return Command(
        seq=row["seq"],
        command_id=row["command_id"],
        tenant_id=row["tenant_id"],
        device_id=row["device_id"],
        method=row["method"],
        params=row["params"],
        status=CommandStatus(row["status"]),
        created_by=row["created_by"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        delivered_at=row["delivered_at"],
        deliveries=row["deliveries"],
        finished_at=row["finished_at"],
        result=row["result"],
        error=None if row["error_code"] is None else CommandError(row["error_code"], row["error_message"]),
        answered_by=row["answered_by"],
    )
