"""What the resolver asks: the state of credentials and their devices, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from types import MappingProxyType

import msgspec
from asyncpg import Record

from registry.model import CredentialId, CredentialKind, DeviceId, DeviceStatus, TenantId
from registry.storage.database import Connection


class CredentialState(msgspec.Struct, frozen=True, gc=False):
    """All that decides whether a credential admits, as the database has it now.

    Two are made for each admission: a Struct costs a tenth of a frozen dataclass, and is in no cycle.
    """

    kind: CredentialKind
    device_status: DeviceStatus
    tenant_id: TenantId
    device_id: DeviceId
    credential_id: CredentialId
    lookup: bytes
    sealed_key: bytes | None
    version: int
    not_before: datetime | None
    expires_at: datetime | None
    revoked: bool
    used: bool
    """It has admitted before."""
    gateway_id: DeviceId | None


_COLUMNS = """
    c.kind, d.status, c.tenant_id, c.device_id, c.credential_id, c.lookup, c.sealed_key, c.version, c.not_before,
    c.expires_at, c.revoked_at IS NOT NULL AS revoked, c.first_used_at IS NOT NULL AS used, d.gateway_id
"""
"""In the order of CredentialState's fields."""
_KINDS = MappingProxyType({kind.value: kind for kind in CredentialKind})
_STATUSES = MappingProxyType({status.value: status for status in DeviceStatus})


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
    return {state.credential_id: state for state in map(_state, rows)}


async def tenants_of(connection: Connection, wanted: Sequence[DeviceId]) -> dict[DeviceId, TenantId]:
    """Whose those of `wanted` are that exist. Across tenants: a refused peer named them, and is told nothing of it."""
    rows = await connection.fetch("SELECT device_id, tenant_id FROM device WHERE device_id = ANY ($1::uuid[])", wanted)
    return {row["device_id"]: row["tenant_id"] for row in rows}


def _state(row: Record) -> CredentialState:
    kind, status, *others = row
    return CredentialState(_KINDS[kind], _STATUSES[status], *others)
