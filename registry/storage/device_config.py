"""What a device should run with (columns of its row), and what it says it runs with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from asyncpg import Record

from registry.model import DeviceId, Json, TenantId
from registry.storage.database import Connection


@dataclass(frozen=True, slots=True)
class ReportedConfig:
    """What the device says it has applied. `config` is None where it told the version only."""

    version: int
    config: Mapping[str, Json] | None
    reported_at: datetime


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """What a device should run with, and what it said last."""

    device_id: DeviceId
    version: int
    """Counts the changes; 1 is what the device was registered with."""
    config: Mapping[str, Json]
    reported: ReportedConfig | None


@dataclass(frozen=True, slots=True)
class Watched:
    """A device whose configuration is wanted when it is newer than `version`; with `via`, while it is its child."""

    tenant_id: TenantId
    device_id: DeviceId
    version: int
    via: DeviceId | None


_COLUMNS = """
    d.device_id, d.config_version, d.config, r.version AS reported_version, r.config AS reported_config, r.reported_at
"""
_FROM = "device d LEFT JOIN reported_config r ON r.tenant_id = d.tenant_id AND r.device_id = d.device_id"


async def get(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, *, lock: bool = False
) -> DeviceConfig | None:
    """A device's configuration; with `lock`, the device's row is locked until the transaction ends.

    Two statements then: what the device has reported must be read after the wait, not before it.
    """
    if lock:
        await connection.execute(
            "SELECT FROM device WHERE tenant_id = $1 AND device_id = $2 FOR NO KEY UPDATE", tenant_id, device_id
        )
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM {_FROM} WHERE d.tenant_id = $1 AND d.device_id = $2",  # noqa: S608  # constants
        tenant_id,
        device_id,
    )
    return _config(row) if row else None


async def newer(connection: Connection, watched: Sequence[Watched]) -> list[DeviceConfig | None]:
    """For each of `watched`, its configuration if it is newer; None where not, or not `via`'s child, or inactive."""
    rows = await connection.fetch(
        f"""
        SELECT w.place, {_COLUMNS}
        FROM unnest($1::uuid[], $2::uuid[], $3::integer[], $4::uuid[])
             WITH ORDINALITY AS w (tenant_id, device_id, version, via, place)
        JOIN ({_FROM}) ON d.tenant_id = w.tenant_id AND d.device_id = w.device_id
             AND d.status <> 'inactive' AND d.config_version > w.version AND (w.via IS NULL OR d.gateway_id = w.via)
        """,  # noqa: S608  # constants of this file
        [w.tenant_id for w in watched],
        [w.device_id for w in watched],
        [w.version for w in watched],
        [w.via for w in watched],
    )
    found: list[DeviceConfig | None] = [None] * len(watched)
    for row in rows:
        found[row["place"] - 1] = _config(row)
    return found


async def put(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, config: Mapping[str, Json], now: datetime
) -> int | None:
    """Write a configuration as the next version, unless it is there already; its number, or None.

    Duty of the caller: hold the lock of the device's row. Whether two are the same is for jsonb to say: in Python 1,
    1.0 and True are equal.
    """
    version: int | None = await connection.fetchval(
        """
        UPDATE device SET config = $3, config_version = config_version + 1, updated_at = $4
        WHERE tenant_id = $1 AND device_id = $2 AND config <> $3
        RETURNING config_version
        """,
        tenant_id,
        device_id,
        dict(config),
        now,
    )
    return version


async def report(connection: Connection, tenant_id: TenantId, device_id: DeviceId, reported: ReportedConfig) -> None:
    """Keep what the device said last. Duty of the caller: hold the lock of the device's row."""
    await connection.execute(
        """
        INSERT INTO reported_config (device_id, tenant_id, version, config, reported_at) VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (device_id) DO UPDATE
        SET version = EXCLUDED.version, config = EXCLUDED.config, reported_at = EXCLUDED.reported_at
        """,
        device_id,
        tenant_id,
        reported.version,
        None if reported.config is None else dict(reported.config),
        reported.reported_at,
    )


def _config(row: Record) -> DeviceConfig:
    reported = None
    if row["reported_version"] is not None:
        reported = ReportedConfig(row["reported_version"], row["reported_config"], row["reported_at"])
    return DeviceConfig(row["device_id"], row["config_version"], row["config"], reported)
