"""The provisioning_template table, and what a claim reads of it.

Lock order: the template's row first (a claim takes it shared, FOR KEY SHARE, or by the consuming UPDATE), then devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from asyncpg import ForeignKeyViolationError, Record

from registry.errors import InvalidArgument, NotFound
from registry.model import (
    AnchorMode,
    CredentialKind,
    DeviceId,
    DeviceStatus,
    Json,
    ProfileId,
    Template,
    TemplateId,
    TemplateStatus,
    TenantId,
)
from registry.storage.database import Connection

_COLUMNS = """
    t.tenant_id, t.template_id, t.name, t.profile_id, t.hardware_id_pattern, t.expires_at, t.one_time, t.max_claims,
    CASE WHEN t.one_time OR t.max_claims IS NOT NULL THEN t.counted_claims
         ELSE (SELECT count(*) FROM device d WHERE d.template_id = t.template_id AND d.tenant_id = t.tenant_id)
    END AS claims,
    t.credential_type, t.default_groups, t.status, t.created_by, t.created_at, t.updated_at
"""

_TERMS = """
    t.tenant_id, t.template_id, t.key_hash, t.profile_id, t.hardware_id_pattern, t.expires_at, t.one_time, t.max_claims,
    t.counted_claims, t.credential_type, t.default_groups, t.status,
    p.tags AS profile_tags, p.config AS profile_config, p.anchor_mode AS profile_anchor_mode
"""

NOBODY = UUID(int=0)
"""No tenant has this id: theirs are random (RFC 9562 §5.9 calls it the nil UUID)."""

_PROFILE = "device_profile p ON p.tenant_id = t.tenant_id AND p.profile_id = t.profile_id"


@dataclass(frozen=True, slots=True)
class ClaimTerms:
    """What a template says to a claim, and what its profile gives to the device."""

    tenant_id: TenantId
    template_id: TemplateId
    key_hash: bytes = field(repr=False)
    profile_id: ProfileId | None
    hardware_id_pattern: str | None
    expires_at: datetime | None
    one_time: bool
    max_claims: int | None
    counted_claims: int
    credential_type: CredentialKind
    default_groups: list[str]
    status: TemplateStatus
    profile_tags: Mapping[str, str]
    profile_config: Mapping[str, Json]
    profile_anchor_mode: AnchorMode | None

    @property
    def limited(self) -> bool:
        """Whether claims must be counted one by one."""
        return self.one_time or self.max_claims is not None


@dataclass(frozen=True, slots=True)
class ClaimPskState:
    """What decides whether a claim PSK opens an association."""

    tenant_id: TenantId
    template_id: TemplateId
    status: TemplateStatus
    expires_at: datetime | None
    sealed_claim_psk: bytes = field(repr=False)
    repeatable: bool
    """A credential that the template made is living and has never been used: its answer may have been lost."""


@dataclass(frozen=True, slots=True)
class ClaimedBefore:
    """The device of the tenant that has the claimed hardware_id already."""

    device_id: DeviceId
    template_id: TemplateId | None
    credential_type: CredentialKind
    status: DeviceStatus


async def insert(connection: Connection, template: Template, key_hash: bytes, sealed_claim_psk: bytes) -> None:
    """Write a new template. Raises InvalidArgument for a profile that the tenant does not have."""
    with _references_checked(template):
        await connection.execute(
            """
            INSERT INTO provisioning_template (
                tenant_id, template_id, name, profile_id, hardware_id_pattern, expires_at, one_time, max_claims,
                credential_type, default_groups, status, key_hash, sealed_claim_psk, created_by, created_at, updated_at)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
            """,
            template.tenant_id,
            template.template_id,
            template.name,
            template.profile_id,
            template.hardware_id_pattern,
            template.expires_at,
            template.one_time,
            template.max_claims,
            template.credential_type.value,
            template.default_groups,
            template.status.value,
            key_hash,
            sealed_claim_psk,
            template.created_by,
            template.created_at,
            template.updated_at,
        )


async def get(connection: Connection, tenant_id: TenantId, template_id: str) -> Template | None:
    """The tenant's template of this id."""
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM provisioning_template t WHERE t.tenant_id = $1 AND t.template_id = $2",  # noqa: S608
        tenant_id,
        template_id,
    )
    return _template(row) if row else None


async def lock(connection: Connection, tenant_id: TenantId, template_id: str) -> Template:
    """The template, after every claim under way has ended and with none beginning until the transaction ends.

    Raises NotFound. Two statements: what is counted must be counted after the wait, not before it.
    """
    await connection.execute(
        "SELECT FROM provisioning_template WHERE tenant_id = $1 AND template_id = $2 FOR UPDATE", tenant_id, template_id
    )
    template = await get(connection, tenant_id, template_id)
    if template is None:
        raise NotFound("no such provisioning template in this tenant")
    return template


async def read(
    connection: Connection, tenant_id: TenantId, after: tuple[datetime, str] | None, limit: int
) -> list[Template]:
    """Templates behind (created_at, template_id), in that order."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM provisioning_template t
        WHERE t.tenant_id = $1 AND ($2::timestamptz IS NULL OR (t.created_at, t.template_id) > ($2, $3::text))
        ORDER BY t.created_at, t.template_id
        LIMIT $4
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        after[0] if after else None,
        after[1] if after else None,
        limit,
    )
    return [_template(row) for row in rows]


async def update(connection: Connection, template: Template) -> None:
    """Write all that may change; a template that is limited from now on begins with the claims it has had.

    Raises InvalidArgument for a profile that the tenant does not have.
    """
    with _references_checked(template):
        await connection.execute(
            """
            UPDATE provisioning_template
            SET name = $3, profile_id = $4, hardware_id_pattern = $5, expires_at = $6, one_time = $7, max_claims = $8,
                counted_claims = greatest(counted_claims, $9), credential_type = $10, default_groups = $11,
                status = $12, updated_at = $13
            WHERE tenant_id = $1 AND template_id = $2
            """,
            template.tenant_id,
            template.template_id,
            template.name,
            template.profile_id,
            template.hardware_id_pattern,
            template.expires_at,
            template.one_time,
            template.max_claims,
            template.claims,
            template.credential_type.value,
            template.default_groups,
            template.status.value,
            template.updated_at,
        )


async def hold(connection: Connection, tenant_id: TenantId, template_id: str) -> TemplateStatus | None:
    """As `lock`, without counting the claims: the template's status; None where there is none."""
    status = await connection.fetchval(
        "SELECT status FROM provisioning_template WHERE tenant_id = $1 AND template_id = $2 FOR UPDATE",
        tenant_id,
        template_id,
    )
    return None if status is None else TemplateStatus(status)


async def disable(connection: Connection, tenant_id: TenantId, template_id: str, now: datetime) -> None:
    """No claim from now on."""
    await connection.execute(
        """
        UPDATE provisioning_template SET status = 'disabled', updated_at = $3
        WHERE tenant_id = $1 AND template_id = $2
        """,
        tenant_id,
        template_id,
        now,
    )


async def delete(connection: Connection, tenant_id: TenantId, template_id: str) -> None:
    """Delete it. Its devices forget it, all in this transaction and in no order: let most of them do so before."""
    await connection.execute(
        "DELETE FROM provisioning_template WHERE tenant_id = $1 AND template_id = $2", tenant_id, template_id
    )


async def for_claim(
    connection: Connection, key_hash: bytes, hardware_id: str
) -> tuple[ClaimTerms, ClaimedBefore | None] | None:
    """The template of a key and the device of its tenant with this hardware_id.

    The tenant is not known yet: the key says which it is. A key that nobody has is looked up in the same tables, under
    a tenant that nobody is, so that the time of the answer does not tell whether there is such a key.
    """
    row = await connection.fetchrow(
        f"""
        SELECT {_TERMS}, d.device_id, d.template_id AS device_template_id, d.credential_type AS device_credential_type,
               d.status AS device_status
        FROM (VALUES ($1::bytea)) AS wanted (key_hash)
        LEFT JOIN provisioning_template t ON t.key_hash = wanted.key_hash
        LEFT JOIN device_profile p
            ON p.tenant_id = coalesce(t.tenant_id, $3) AND p.profile_id = coalesce(t.profile_id, '')
        LEFT JOIN device d ON d.tenant_id = coalesce(t.tenant_id, $3) AND d.hardware_id = $2
        """,  # noqa: S608  # the columns are a constant of this file
        key_hash,
        hardware_id,
        NOBODY,
    )
    if row is None or row["template_id"] is None:
        return None
    return _terms(row), _claimed_before(row) if row["device_id"] else None


async def hold_terms(connection: Connection, tenant_id: TenantId, template_id: TemplateId) -> ClaimTerms | None:
    """The terms as they are now and stay until the transaction ends. Claims do not wait for one another."""
    row = await connection.fetchrow(
        f"""
        SELECT {_TERMS} FROM provisioning_template t LEFT JOIN {_PROFILE}
        WHERE t.tenant_id = $1 AND t.template_id = $2
        FOR KEY SHARE OF t
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        template_id,
    )
    return _terms(row) if row else None


async def consume(connection: Connection, tenant_id: TenantId, template_id: TemplateId) -> ClaimTerms | None:
    """Take one claim of a limited template, in the caller's transaction; the terms, or None when none is left."""
    row = await connection.fetchrow(
        f"""
        WITH t AS (
            UPDATE provisioning_template
            SET counted_claims = counted_claims + 1, status = CASE WHEN one_time THEN 'used' ELSE status END
            WHERE tenant_id = $1 AND template_id = $2 AND status = 'active'
              AND (NOT one_time OR counted_claims = 0) AND (max_claims IS NULL OR counted_claims < max_claims)
            RETURNING *
        )
        SELECT {_TERMS} FROM t LEFT JOIN {_PROFILE}
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        template_id,
    )
    return _terms(row) if row else None


async def sealed_claim_psk(connection: Connection, template_id: str) -> tuple[TenantId, TemplateStatus, bytes] | None:
    """The sealed claim PSK of a template (CONTRACT §4). The tenant is not known yet: the identity says which it is."""
    row = await connection.fetchrow(
        "SELECT tenant_id, status, sealed_claim_psk FROM provisioning_template WHERE template_id = $1", template_id
    )
    return (row["tenant_id"], TemplateStatus(row["status"]), row["sealed_claim_psk"]) if row else None


async def claim_psks(connection: Connection, wanted: Sequence[str]) -> list[ClaimPskState | None]:
    """One entry per template id, in order; None where there is none. The identity says which tenant it is."""
    rows = await connection.fetch(
        """
        SELECT t.tenant_id, t.template_id, t.status, t.expires_at, t.sealed_claim_psk,
               t.status = 'used' AND EXISTS (
                   SELECT FROM device d JOIN credential c ON c.tenant_id = d.tenant_id AND c.device_id = d.device_id
                   WHERE d.tenant_id = t.tenant_id AND d.template_id = t.template_id
                     AND c.first_used_at IS NULL AND c.revoked_at IS NULL
               ) AS repeatable
        FROM unnest($1::text[]) WITH ORDINALITY AS wanted (template_id, position)
        LEFT JOIN provisioning_template t ON t.template_id = wanted.template_id
        ORDER BY wanted.position
        """,
        list(wanted),
    )
    return [_claim_psk_state(row) if row["template_id"] else None for row in rows]


@contextmanager
def _references_checked(template: Template) -> Iterator[None]:
    try:
        yield
    except ForeignKeyViolationError as error:
        match error.constraint_name:
            case "provisioning_template_tenant_id_profile_id_fkey":
                raise InvalidArgument(
                    f'profile_id "{template.profile_id}" is not a profile of this tenant', field="profile_id"
                ) from error
            case "provisioning_template_tenant_id_fkey":
                raise NotFound("no such tenant") from error
            case _:
                raise


def _template(row: Record) -> Template:
    return Template(
        tenant_id=row["tenant_id"],
        template_id=row["template_id"],
        name=row["name"],
        profile_id=row["profile_id"],
        hardware_id_pattern=row["hardware_id_pattern"],
        expires_at=row["expires_at"],
        one_time=row["one_time"],
        max_claims=row["max_claims"],
        claims=row["claims"],
        credential_type=CredentialKind(row["credential_type"]),
        default_groups=row["default_groups"],
        status=TemplateStatus(row["status"]),
        created_by=row["created_by"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def _terms(row: Record) -> ClaimTerms:
    return ClaimTerms(
        tenant_id=row["tenant_id"],
        template_id=row["template_id"],
        key_hash=row["key_hash"],
        profile_id=row["profile_id"],
        hardware_id_pattern=row["hardware_id_pattern"],
        expires_at=row["expires_at"],
        one_time=row["one_time"],
        max_claims=row["max_claims"],
        counted_claims=row["counted_claims"],
        credential_type=CredentialKind(row["credential_type"]),
        default_groups=row["default_groups"],
        status=TemplateStatus(row["status"]),
        profile_tags=row["profile_tags"] or {},
        profile_config=row["profile_config"] or {},
        profile_anchor_mode=AnchorMode(row["profile_anchor_mode"]) if row["profile_anchor_mode"] else None,
    )


def _claim_psk_state(row: Record) -> ClaimPskState:
    return ClaimPskState(
        tenant_id=row["tenant_id"],
        template_id=row["template_id"],
        status=TemplateStatus(row["status"]),
        expires_at=row["expires_at"],
        sealed_claim_psk=row["sealed_claim_psk"],
        repeatable=row["repeatable"],
    )


def _claimed_before(row: Record) -> ClaimedBefore:
    device_id: UUID = row["device_id"]
    return ClaimedBefore(
        device_id=DeviceId(device_id),
        template_id=row["device_template_id"],
        credential_type=CredentialKind(row["device_credential_type"]),
        status=DeviceStatus(row["device_status"]),
    )
