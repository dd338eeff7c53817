"""The registration_token table. Whoever uses or revokes a token holds its device's row first (storage/devices.lock)."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from registry.model import CredentialId, DeviceId, TenantId
from registry.storage.database import Connection

_COLUMNS = """
    t.token_id, t.tenant_id, t.device_id, t.name, t.token_hash, t.created_by, t.created_at, t.expires_at, t.used_at,
    t.credential_id, t.revoked_at, d.hardware_id, d.profile_id
"""
_TABLES = "registration_token t JOIN device d ON d.tenant_id = t.tenant_id AND d.device_id = t.device_id"


@dataclass(frozen=True, slots=True)
class StoredToken:
    """A token without its text, and what its device is."""

    token_id: UUID
    tenant_id: TenantId
    device_id: DeviceId
    name: str
    token_hash: bytes = field(repr=False)
    created_by: str
    created_at: datetime
    expires_at: datetime
    used_at: datetime | None
    credential_id: CredentialId | None
    revoked_at: datetime | None
    hardware_id: str | None
    profile_id: str | None


async def insert(
    connection: Connection,
    token_id: UUID,
    tenant_id: TenantId,
    device_id: DeviceId,
    name: str,
    token_hash: bytes,
    created_by: str,
    created_at: datetime,
    expires_at: datetime,
) -> None:
    """Write a new token."""
    await connection.execute(
        """
        INSERT INTO registration_token (token_id, tenant_id, device_id, name, token_hash, created_by, created_at,
                                        expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
        """,
        token_id,
        tenant_id,
        device_id,
        name,
        token_hash,
        created_by,
        created_at,
        expires_at,
    )


async def by_hash(connection: Connection, token_hash: bytes) -> StoredToken | None:
    """The token with this hash, of whatever tenant: the token says which."""
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM {_TABLES} WHERE t.token_hash = $1",  # noqa: S608  # constants of this file
        token_hash,
    )
    return StoredToken(**dict(row)) if row else None


async def get(connection: Connection, tenant_id: TenantId, token_id: UUID) -> StoredToken | None:
    """The tenant's token of this id."""
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM {_TABLES} WHERE t.tenant_id = $1 AND t.token_id = $2",  # noqa: S608  # constants
        tenant_id,
        token_id,
    )
    return StoredToken(**dict(row)) if row else None


async def read_open(
    connection: Connection, tenant_id: TenantId, after: tuple[datetime, UUID] | None, limit: int
) -> list[StoredToken]:
    """Tokens neither used nor revoked, expired ones included, behind (created_at, token_id), in that order."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM {_TABLES}
        WHERE t.tenant_id = $1 AND t.used_at IS NULL AND t.revoked_at IS NULL
          AND ($2::timestamptz IS NULL OR (t.created_at, t.token_id) > ($2, $3::uuid))
        ORDER BY t.created_at, t.token_id
        LIMIT $4
        """,  # noqa: S608  # constants of this file
        tenant_id,
        after[0] if after else None,
        after[1] if after else None,
        limit,
    )
    return [StoredToken(**dict(row)) for row in rows]


async def use(
    connection: Connection, tenant_id: TenantId, token_id: UUID, credential_id: CredentialId, now: datetime
) -> None:
    """Note what the token was used for."""
    await connection.execute(
        "UPDATE registration_token SET used_at = $4, credential_id = $3 WHERE tenant_id = $1 AND token_id = $2",
        tenant_id,
        token_id,
        credential_id,
        now,
    )


async def revoke(connection: Connection, tenant_id: TenantId, token_id: UUID, now: datetime) -> None:
    """Note that the token is revoked; the first time stands."""
    await connection.execute(
        """
        UPDATE registration_token SET revoked_at = coalesce(revoked_at, $3) WHERE tenant_id = $1 AND token_id = $2
        """,
        tenant_id,
        token_id,
        now,
    )
