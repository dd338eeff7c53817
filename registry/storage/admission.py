"""What the resolver asks: the state of credentials and their devices, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from asyncpg import Record

from registry.model import CredentialId, CredentialKind, DeviceId, DeviceStatus, TenantId
from registry.storage.database import Connection


@dataclass(frozen=True, slots=True)
class CredentialState:
    """All that decides whether a credential admits, as the database has it now."""

    tenant_id: TenantId
    device_id: DeviceId
    credential_id: CredentialId
    kind: CredentialKind
    lookup: bytes
    sealed_key: bytes | None
    version: int
    not_before: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    first_used_at: datetime | None
    device_status: DeviceStatus
    gateway_id: DeviceId | None


_COLUMNS = """
    c.tenant_id, c.device_id, c.credential_id, c.kind, c.lookup, c.sealed_key, c.version, c.not_before, c.expires_at,
    c.revoked_at, c.first_used_at, d.status AS device_status, d.gateway_id
"""


async def by_lookup(
    connection: Connection, wanted: Sequence[tuple[CredentialKind, bytes]]
) -> list[CredentialState | None]:
    """One entry per wanted (kind, lookup), in order; a living row before a revoked one, None where there is none."""
    rows = await connection.fetch(
        f"""
        SELECT found.*
        FROM unnest($1::text[], $2::bytea[]) WITH ORDINALITY AS wanted (kind, lookup, position)
        LEFT JOIN LATERAL (
            SELECT {_COLUMNS}
            FROM credential c JOIN device d ON d.tenant_id = c.tenant_id AND d.device_id = c.device_id
            WHERE c.kind = wanted.kind AND c.lookup = wanted.lookup
            ORDER BY c.revoked_at IS NOT NULL, c.created_at DESC
            LIMIT 1
        ) AS found ON true
        ORDER BY wanted.position
        """,  # noqa: S608  # the columns are a constant of this file
        [kind.value for kind, _ in wanted],
        [lookup for _, lookup in wanted],
    )
    return [_state(row) if row["credential_id"] else None for row in rows]


async def by_id(connection: Connection, wanted: Sequence[CredentialId]) -> dict[CredentialId, CredentialState]:
    """The states of those of `wanted` that exist. Across tenants: the ids are of live sessions, not a caller's."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS}
        FROM credential c JOIN device d ON d.tenant_id = c.tenant_id AND d.device_id = c.device_id
        WHERE c.credential_id = ANY ($1::uuid[])
        """,  # noqa: S608  # the columns are a constant of this file
        list(wanted),
    )
    return {row["credential_id"]: _state(row) for row in rows}


async def tenants_of(connection: Connection, wanted: Sequence[DeviceId]) -> dict[DeviceId, TenantId]:
    """Whose those of `wanted` are that exist. Across tenants: a refused peer named them, and is told nothing of it."""
    rows = await connection.fetch("SELECT device_id, tenant_id FROM device WHERE device_id = ANY ($1::uuid[])", wanted)
    return {row["device_id"]: row["tenant_id"] for row in rows}


def _state(row: Record) -> CredentialState:
    return CredentialState(
        tenant_id=row["tenant_id"],
        device_id=row["device_id"],
        credential_id=row["credential_id"],
        kind=CredentialKind(row["kind"]),
        lookup=row["lookup"],
        sealed_key=row["sealed_key"],
        version=row["version"],
        not_before=row["not_before"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
        first_used_at=row["first_used_at"],
        device_status=DeviceStatus(row["device_status"]),
        gateway_id=row["gateway_id"],
    )
