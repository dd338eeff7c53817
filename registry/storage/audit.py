"""The audit table: one row for every change, in the transaction of the change."""

from __future__ import annotations

from collections.abc import Mapping

from asyncpg import Record

from registry.model import Actor, Json, TenantId
from registry.storage.database import Connection


async def insert(
    connection: Connection,
    tenant_id: TenantId | None,
    actor: Actor,
    action: str,
    object_type: str,
    object_id: str,
    detail: Mapping[str, Json] | None = None,
) -> None:
    """`action` is a verb (`create`, `update`, `delete`, `revoke`, …). `detail` holds no secrets and no hashes."""
    await connection.execute(
        """
        INSERT INTO audit (tenant_id, actor, action, object_type, object_id, correlation_id, detail)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        tenant_id,
        actor.name,
        action,
        object_type,
        object_id,
        actor.correlation_id,
        dict(detail or {}),
    )


async def read(connection: Connection, tenant_id: TenantId, before: int | None, limit: int) -> list[Record]:
    """Audit rows of one tenant, newest first."""
    rows: list[Record] = await connection.fetch(
        """
        SELECT seq, at, actor, action, object_type, object_id, correlation_id, detail FROM audit
        WHERE tenant_id = $1 AND ($2::bigint IS NULL OR seq < $2)
        ORDER BY seq DESC
        LIMIT $3
        """,
        tenant_id,
        before,
        limit,
    )
    return rows
