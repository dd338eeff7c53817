"""The tenant table."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from asyncpg import Record

from registry.model import Tenant, TenantId
from registry.storage.database import Connection


async def insert(connection: Connection, tenant: Tenant) -> bool:
    """Whether the tenant was made; False when its slug is taken."""
    made = await connection.fetchval(
        """
        INSERT INTO tenant (tenant_id, slug, name, created_at) VALUES ($1, $2, $3, $4)
        ON CONFLICT (slug) DO NOTHING
        RETURNING true
        """,
        tenant.tenant_id,
        tenant.slug,
        tenant.name,
        tenant.created_at,
    )
    return made is not None


async def by_id(connection: Connection, tenant_id: TenantId) -> Tenant | None:
    """The tenant with this id."""
    row = await connection.fetchrow(
        "SELECT tenant_id, slug, name, created_at FROM tenant WHERE tenant_id = $1", tenant_id
    )
    return _tenant(row) if row else None


async def by_slug(connection: Connection, slug: str) -> Tenant | None:
    """The tenant with this slug."""
    row = await connection.fetchrow("SELECT tenant_id, slug, name, created_at FROM tenant WHERE slug = $1", slug)
    return _tenant(row) if row else None


async def read(connection: Connection, after: tuple[datetime, UUID] | None, limit: int) -> list[Tenant]:
    """Tenants behind (created_at, tenant_id), in that order. Few enough (thousands) to be sorted each time."""
    rows = await connection.fetch(
        """
        SELECT tenant_id, slug, name, created_at FROM tenant
        WHERE $1::timestamptz IS NULL OR (created_at, tenant_id) > ($1, $2::uuid)
        ORDER BY created_at, tenant_id
        LIMIT $3
        """,
        after[0] if after else None,
        after[1] if after else None,
        limit,
    )
    return [_tenant(row) for row in rows]


def _tenant(row: Record) -> Tenant:
    return Tenant(tenant_id=row["tenant_id"], slug=row["slug"], name=row["name"], created_at=row["created_at"])
