"""Topic grants as they stand in profiles."""

from __future__ import annotations

from collections.abc import Sequence

from registry.model import DeviceId, Json, ProfileId, TenantId
from registry.storage.database import Connection


async def of_device(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId
) -> tuple[ProfileId | None, list[Json]] | None:
    """A device's profile and what that grants; None without such a device."""
    row = await connection.fetchrow(
        """
        SELECT d.profile_id, p.topic_grants
        FROM device d LEFT JOIN device_profile p ON p.tenant_id = d.tenant_id AND p.profile_id = d.profile_id
        WHERE d.tenant_id = $1 AND d.device_id = $2
        """,
        tenant_id,
        device_id,
    )
    return None if row is None else (row["profile_id"], row["topic_grants"] or [])


async def of_profiles(
    connection: Connection, keys: Sequence[tuple[TenantId, ProfileId]]
) -> dict[tuple[TenantId, ProfileId], list[Json]]:
    """What these profiles grant; those that do not exist are absent."""
    rows = await connection.fetch(
        """
        SELECT tenant_id, profile_id, topic_grants
        FROM unnest($1::uuid[], $2::text[]) AS u (tenant_id, profile_id)
        JOIN device_profile USING (tenant_id, profile_id)
        """,
        [tenant_id for tenant_id, _ in keys],
        [profile_id for _, profile_id in keys],
    )
    return {(row["tenant_id"], row["profile_id"]): row["topic_grants"] for row in rows}
