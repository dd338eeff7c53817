"""The device table. A row is locked before the rows of its credentials and before its messaging sessions, always in
that order; several rows by rising id."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from asyncpg import ForeignKeyViolationError, Record, UniqueViolationError

from registry.errors import AlreadyExists, InvalidArgument, NotFound
from registry.model import AnchorMode, CredentialKind, Device, DeviceId, DeviceStatus, TemplateId, TenantId
from registry.storage import certificates, messaging_sessions
from registry.storage.database import Connection

MAX_GATEWAY_DEPTH = 8
"""Gateways above a device. Real installations have one or two; a bound keeps the walk upwards short."""

FIRST = (datetime(1970, 1, 1, tzinfo=UTC), UUID(int=0))
"""Before every (created_at, device_id)."""

_GATEWAY_LOCK = 0x6761_7465
"""The class of the advisory locks that order changes of gateways, one for each tenant (two may share; ASCII "gate")."""

_COLUMNS = """
    tenant_id, device_id, hardware_id, name, status, groups, tags, anchor_mode, profile_id, site_id, gateway_id,
    firmware, meta, config, credential_type, template_id, created_at, updated_at, activated_at, last_seen_at
"""


@dataclass(frozen=True, slots=True)
class DeviceQuery:
    """Which rows to read; every part that is given must hold."""

    status: DeviceStatus | None = None
    group: str | None = None
    tag_key: str | None = None
    tag_value: str | None = None
    profile_id: str | None = None
    site_id: str | None = None
    gateway_id: DeviceId | None = None
    template_id: TemplateId | None = None
    q: str | None = None
    """Part of the name in any case, or the beginning of the hardware_id."""


async def insert(connection: Connection, device: Device) -> bool:
    """Whether the device was made; False when the tenant has its hardware_id. Waits for a rival's transaction.

    Raises InvalidArgument for a profile or a gateway that the tenant does not have.
    """
    with _references_checked(device):
        made = await connection.fetchval(
            f"""
            INSERT INTO device ({_COLUMNS})
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)
            ON CONFLICT (tenant_id, hardware_id) DO NOTHING
            RETURNING true
            """,  # noqa: S608  # the columns are a constant of this file
            device.tenant_id,
            device.device_id,
            device.hardware_id,
            device.name,
            device.status.value,
            device.groups,
            device.tags,
            device.anchor_mode.value,
            device.profile_id,
            device.site_id,
            device.gateway_id,
            device.firmware,
            device.meta,
            device.config,
            device.credential_type.value,
            device.template_id,
            device.created_at,
            device.updated_at,
            device.activated_at,
            device.last_seen_at,
        )
    return made is not None


async def get(connection: Connection, tenant_id: TenantId, device_id: DeviceId) -> Device | None:
    """The tenant's device of this id."""
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM device WHERE tenant_id = $1 AND device_id = $2",  # noqa: S608  # a constant
        tenant_id,
        device_id,
    )
    return _device(row) if row else None


async def lock(connection: Connection, tenant_id: TenantId, device_id: DeviceId) -> Device:
    """The device, its row locked against other changes until the transaction ends. Raises NotFound.

    Rows that refer to it (credentials, children) may still be added meanwhile.
    """
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM device WHERE tenant_id = $1 AND device_id = $2 FOR NO KEY UPDATE",  # noqa: S608
        tenant_id,
        device_id,
    )
    if row is None:
        raise NotFound("no such device in this tenant")
    return _device(row)


async def lock_claimed(
    connection: Connection, tenant_id: TenantId, template_id: str, after: tuple[datetime, UUID], limit: int
) -> list[tuple[datetime, DeviceId]]:
    """The next devices that were claimed with a template, behind (created_at, device_id) in that order, and locked in
    the order of their ids, as everybody does who locks several."""
    rows = await connection.fetch(
        """
        SELECT created_at, device_id FROM device
        WHERE tenant_id = $1 AND template_id = $2 AND (created_at, device_id) > ($3, $4)
        ORDER BY created_at, device_id
        LIMIT $5
        """,
        tenant_id,
        template_id,
        *after,
        limit,
    )
    await connection.execute(
        """
        SELECT FROM device WHERE tenant_id = $1 AND device_id = ANY ($2::uuid[])
        ORDER BY device_id
        FOR NO KEY UPDATE
        """,
        tenant_id,
        [row["device_id"] for row in rows],
    )
    return [(row["created_at"], row["device_id"]) for row in rows]


async def forget_template(
    connection: Connection, tenant_id: TenantId, template_id: str, device_ids: Sequence[DeviceId]
) -> None:
    """Those of these devices that were claimed with a template know nothing of it any more. Duty of the caller: hold
    their locks."""
    await connection.execute(
        """
        UPDATE device SET template_id = NULL
        WHERE tenant_id = $1 AND template_id = $2 AND device_id = ANY ($3::uuid[])
        """,
        tenant_id,
        template_id,
        list(device_ids),
    )


async def read(
    connection: Connection,
    tenant_id: TenantId,
    query: DeviceQuery,
    after: tuple[datetime, UUID] | None,
    limit: int,
) -> list[Device]:
    """Devices behind (created_at, device_id), in that order."""
    where, arguments = _conditions(tenant_id, query, after)
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM device
        WHERE {" AND ".join(where)}
        ORDER BY created_at, device_id
        LIMIT {int(limit)}
        """,  # noqa: S608  # constants of this file and a number
        *arguments,
    )
    return [_device(row) for row in rows]


async def count(connection: Connection, tenant_id: TenantId) -> list[tuple[DeviceStatus, CredentialKind, int]]:
    """How many devices of each status and credential type."""
    rows = await connection.fetch(
        """
        SELECT status, credential_type, count(*) AS devices FROM device
        WHERE tenant_id = $1
        GROUP BY status, credential_type
        """,
        tenant_id,
    )
    return [(DeviceStatus(r["status"]), CredentialKind(r["credential_type"]), r["devices"]) for r in rows]


async def update(connection: Connection, device: Device) -> int | None:
    """Write all that may change; the next version of the configuration, if that is among what changed.

    Raises AlreadyExists, InvalidArgument (references). Duty of the caller: hold the row's lock.
    """
    with _references_checked(device):
        config_version: int | None = await connection.fetchval(
            """
            UPDATE device
            SET hardware_id = $3, name = $4, status = $5, groups = $6, tags = $7, anchor_mode = $8, profile_id = $9,
                site_id = $10, gateway_id = $11, firmware = $12, meta = $13, config = $14, credential_type = $15,
                updated_at = $16, config_version = config_version + (config IS DISTINCT FROM $14)::integer
            WHERE tenant_id = $1 AND device_id = $2
            RETURNING CASE WHEN config_version > (SELECT d.config_version FROM device d WHERE d.device_id = $2)
                      THEN config_version END
            """,
            device.tenant_id,
            device.device_id,
            device.hardware_id,
            device.name,
            device.status.value,
            device.groups,
            device.tags,
            device.anchor_mode.value,
            device.profile_id,
            device.site_id,
            device.gateway_id,
            device.firmware,
            device.meta,
            device.config,
            device.credential_type.value,
            device.updated_at,
        )
    return config_version


async def set_credential_type(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, kind: CredentialKind, now: datetime
) -> None:
    """What is issued for the device from now on."""
    await connection.execute(
        "UPDATE device SET credential_type = $3, updated_at = $4 WHERE tenant_id = $1 AND device_id = $2",
        tenant_id,
        device_id,
        kind.value,
        now,
    )


async def delete(connection: Connection, tenant_id: TenantId, device_id: DeviceId, now: datetime) -> Device:
    """Delete the device and with it its credentials; its children lose their gateway. Its certificates stay on record
    as revoked. Raises NotFound.

    The exclusive locks come first: no child can be added once the children have been let go. They are taken in the
    house's order, devices by id, then sessions and wills, which the cascade would lock in an order of its own.
    """
    await connection.execute(
        """
        SELECT FROM device WHERE tenant_id = $1 AND (device_id = $2 OR gateway_id = $2)
        ORDER BY device_id
        FOR UPDATE
        """,
        tenant_id,
        device_id,
    )
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM device WHERE tenant_id = $1 AND device_id = $2",  # noqa: S608  # a constant
        tenant_id,
        device_id,
    )
    if row is None:
        raise NotFound("no such device in this tenant")
    await connection.execute(
        "UPDATE device SET gateway_id = NULL, updated_at = $3 WHERE tenant_id = $1 AND gateway_id = $2",
        tenant_id,
        device_id,
        now,
    )
    await messaging_sessions.hold_of_device(connection, tenant_id, device_id)
    await certificates.end_of_device(connection, tenant_id, device_id, now, "device deleted")
    await connection.execute("DELETE FROM device WHERE tenant_id = $1 AND device_id = $2", tenant_id, device_id)
    return _device(row)


async def lock_gateways(connection: Connection, tenant_id: TenantId) -> None:
    """Wait for, and hold, the tenant's turn to change who is whose gateway, until the transaction ends."""
    await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", _GATEWAY_LOCK, tenant_id.int % 2**31)


async def gateways_above(connection: Connection, tenant_id: TenantId, gateway_id: DeviceId) -> list[DeviceId]:
    """The gateway and those above it, at most MAX_GATEWAY_DEPTH + 1; empty when the tenant has no such device."""
    rows = await connection.fetch(
        """
        WITH RECURSIVE above (device_id, gateway_id, depth) AS (
            SELECT device_id, gateway_id, 1 FROM device WHERE tenant_id = $1 AND device_id = $2
            UNION ALL
            SELECT d.device_id, d.gateway_id, above.depth + 1
            FROM device d JOIN above ON d.device_id = above.gateway_id
            WHERE d.tenant_id = $1 AND above.depth <= $3
        )
        SELECT device_id FROM above ORDER BY depth
        """,
        tenant_id,
        gateway_id,
        MAX_GATEWAY_DEPTH,
    )
    return [row["device_id"] for row in rows]


def _conditions(
    tenant_id: TenantId, query: DeviceQuery, after: tuple[datetime, UUID] | None
) -> tuple[list[str], list[Any]]:
    """The WHERE clauses of those parts that are given, so that the planner sees what it may use an index for."""
    where, arguments = ["tenant_id = $1"], list[Any]([tenant_id])

    def add(clause: str, *values: Any) -> None:
        first = len(arguments) + 1
        where.append(clause.format(*(f"${first + n}" for n in range(len(values)))))
        arguments.extend(values)

    if after is not None:
        add("(created_at, device_id) > ({}, {})", *after)
    if query.status is not None:
        add("status = {}", query.status.value)
    if query.group is not None:
        add("groups @> {}::text[]", [query.group])
    if query.tag_key is not None and query.tag_value is not None:
        add("tags @> {}::jsonb", {query.tag_key: query.tag_value})
    elif query.tag_key is not None:
        add("tags ? {}", query.tag_key)
    if query.profile_id is not None:
        add("profile_id = {}", query.profile_id)
    if query.site_id is not None:
        add("site_id = {}", query.site_id)
    if query.gateway_id is not None:
        add("gateway_id = {}", query.gateway_id)
    if query.template_id is not None:
        add("template_id = {}", query.template_id)
    if query.q is not None:
        escaped = query.q.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        add("(name ILIKE {} OR hardware_id LIKE {})", f"%{escaped}%", f"{escaped}%")
    return where, arguments


@contextmanager
def _references_checked(device: Device) -> Iterator[None]:
    try:
        yield
    except UniqueViolationError as error:
        if error.constraint_name != "device_tenant_id_hardware_id_key":
            raise
        raise hardware_id_taken(device.hardware_id) from error
    except ForeignKeyViolationError as error:
        match error.constraint_name:
            case "device_tenant_id_profile_id_fkey":
                raise InvalidArgument(
                    f'profile_id "{device.profile_id}" is not a profile of this tenant', field="profile_id"
                ) from error
            case "device_tenant_id_gateway_id_fkey":
                raise InvalidArgument(
                    f'gateway_id "{device.gateway_id}" is not a device of this tenant', field="gateway_id"
                ) from error
            case "device_tenant_id_fkey":
                raise NotFound("no such tenant") from error
            case _:
                raise


def hardware_id_taken(hardware_id: str | None) -> AlreadyExists:
    """Seed 002's answer, to the letter."""
    return AlreadyExists(f'device with hardware_id "{hardware_id}" already exists in this tenant')


def _device(row: Record) -> Device:
    return Device(
        tenant_id=row["tenant_id"],
        device_id=row["device_id"],
        hardware_id=row["hardware_id"],
        name=row["name"],
        status=DeviceStatus(row["status"]),
        groups=row["groups"],
        tags=row["tags"],
        anchor_mode=AnchorMode(row["anchor_mode"]),
        profile_id=row["profile_id"],
        site_id=row["site_id"],
        gateway_id=row["gateway_id"],
        firmware=row["firmware"],
        meta=row["meta"],
        config=row["config"],
        credential_type=CredentialKind(row["credential_type"]),
        template_id=row["template_id"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        activated_at=row["activated_at"],
        last_seen_at=row["last_seen_at"],
    )
