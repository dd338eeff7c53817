"""The device_profile table."""

from __future__ import annotations

from asyncpg import ForeignKeyViolationError, Record

from registry.errors import FailedPrecondition
from registry.model import AnchorMode, DeviceProfile, ProfileId, TenantId
from registry.storage.database import Connection

_COLUMNS = """
    tenant_id, profile_id, name, description, tags, config, anchor_mode, components, telemetry_schema, writable_fields,
    topic_grants, allow_short_psk, created_at, updated_at
"""


async def insert(connection: Connection, profile: DeviceProfile) -> bool:
    """Whether the profile was made; False when the tenant has one of this id."""
    made = await connection.fetchval(
        f"""
        INSERT INTO device_profile ({_COLUMNS})
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
        ON CONFLICT (tenant_id, profile_id) DO NOTHING
        RETURNING true
        """,  # noqa: S608  # the columns are a constant of this file
        profile.tenant_id,
        profile.profile_id,
        profile.name,
        profile.description,
        profile.tags,
        profile.config,
        profile.anchor_mode.value if profile.anchor_mode else None,
        profile.components,
        profile.telemetry_schema,
        profile.writable_fields,
        profile.topic_grants,
        profile.allow_short_psk,
        profile.created_at,
        profile.updated_at,
    )
    return made is not None


async def get(
    connection: Connection, tenant_id: TenantId, profile_id: str, *, for_update: bool = False
) -> DeviceProfile | None:
    """The tenant's profile of this id; with `for_update` its row is locked until the transaction ends."""
    row = await connection.fetchrow(
        f"""
        SELECT {_COLUMNS} FROM device_profile
        WHERE tenant_id = $1 AND profile_id = $2 {"FOR NO KEY UPDATE" if for_update else ""}
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        profile_id,
    )
    return _profile(row) if row else None


async def read(connection: Connection, tenant_id: TenantId, after: str | None, limit: int) -> list[DeviceProfile]:
    """Profiles behind an id, in the order of their ids."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM device_profile
        WHERE tenant_id = $1 AND ($2::text IS NULL OR profile_id > $2 COLLATE "C")
        ORDER BY profile_id
        LIMIT $3
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        after,
        limit,
    )
    return [_profile(row) for row in rows]


async def update(connection: Connection, profile: DeviceProfile) -> None:
    """Write all that may change."""
    await connection.execute(
        """
        UPDATE device_profile
        SET name = $3, description = $4, tags = $5, config = $6, anchor_mode = $7, components = $8,
            telemetry_schema = $9, writable_fields = $10, topic_grants = $11, allow_short_psk = $12, updated_at = $13
        WHERE tenant_id = $1 AND profile_id = $2
        """,
        profile.tenant_id,
        profile.profile_id,
        profile.name,
        profile.description,
        profile.tags,
        profile.config,
        profile.anchor_mode.value if profile.anchor_mode else None,
        profile.components,
        profile.telemetry_schema,
        profile.writable_fields,
        profile.topic_grants,
        profile.allow_short_psk,
        profile.updated_at,
    )


async def delete(connection: Connection, tenant_id: TenantId, profile_id: str) -> bool:
    """Whether there was one. Raises FailedPrecondition while devices or templates name it."""
    try:
        gone = await connection.fetchval(
            "DELETE FROM device_profile WHERE tenant_id = $1 AND profile_id = $2 RETURNING true", tenant_id, profile_id
        )
    except ForeignKeyViolationError as error:
        users = "provisioning templates" if error.table_name == "provisioning_template" else "devices"
        raise FailedPrecondition(f'profile "{profile_id}" is in use by {users}; give them another one first') from error
    return gone is not None


def _profile(row: Record) -> DeviceProfile:
    return DeviceProfile(
        tenant_id=row["tenant_id"],
        profile_id=ProfileId(row["profile_id"]),
        name=row["name"],
        description=row["description"],
        tags=row["tags"],
        config=row["config"],
        anchor_mode=AnchorMode(row["anchor_mode"]) if row["anchor_mode"] else None,
        components=row["components"],
        telemetry_schema=row["telemetry_schema"],
        writable_fields=row["writable_fields"],
        topic_grants=row["topic_grants"],
        allow_short_psk=row["allow_short_psk"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )
