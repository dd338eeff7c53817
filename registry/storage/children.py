"""Who is whose child, and how a gateway gets one."""

from __future__ import annotations

from datetime import datetime

from registry.model import Device, DeviceId, TenantId
from registry.storage import devices
from registry.storage.database import Connection


async def gateway_of(connection: Connection, tenant_id: TenantId, device_id: DeviceId) -> DeviceId | None:
    """The gateway of a device that takes part; None where it has none, is inactive, or is not the tenant's."""
    gateway_id: DeviceId | None = await connection.fetchval(
        "SELECT gateway_id FROM device WHERE tenant_id = $1 AND device_id = $2 AND status <> 'inactive'",
        tenant_id,
        device_id,
    )
    return gateway_id


async def find(connection: Connection, tenant_id: TenantId, hardware_id: str, *, lock: bool = False) -> Device | None:
    """The tenant's device with a hardware_id; with `lock`, its row locked until the transaction ends."""
    device_id: DeviceId | None = await connection.fetchval(
        "SELECT device_id FROM device WHERE tenant_id = $1 AND hardware_id = $2", tenant_id, hardware_id
    )
    if device_id is None:
        return None
    if lock:
        return await devices.lock(connection, tenant_id, device_id)
    return await devices.get(connection, tenant_id, device_id)


async def count(connection: Connection, tenant_id: TenantId, gateway_id: DeviceId) -> int:
    """How many children a gateway has."""
    number: int = await connection.fetchval(
        "SELECT count(*) FROM device WHERE tenant_id = $1 AND gateway_id = $2", tenant_id, gateway_id
    )
    return number


async def has_spoken(connection: Connection, tenant_id: TenantId, device_id: DeviceId) -> bool:
    """Whether a device has ever authenticated by a credential of its own."""
    spoken: bool = await connection.fetchval(
        """
        SELECT EXISTS (
            SELECT FROM credential WHERE tenant_id = $1 AND device_id = $2 AND first_used_at IS NOT NULL)
        """,
        tenant_id,
        device_id,
    )
    return spoken


async def adopt(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, gateway_id: DeviceId, now: datetime
) -> None:
    """Give a device a gateway. Duty of the caller: hold the tenant's gateway lock and the device's row."""
    await connection.execute(
        "UPDATE device SET gateway_id = $3, updated_at = $4 WHERE tenant_id = $1 AND device_id = $2",
        tenant_id,
        device_id,
        gateway_id,
        now,
    )
