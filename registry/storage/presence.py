"""Which node holds a connection of which device, and what that makes of the device's status.

Duty of every caller that writes: lock the devices first (`lock_devices`). Then what the next statements read is the
truth until the transaction ends: two nodes that write about one device come one after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from registry.model import DeviceId, NodeId, TenantId
from registry.storage import nodes
from registry.storage.database import Connection

Place = tuple[DeviceId, NodeId]


async def lock_devices(connection: Connection, device_ids: Sequence[DeviceId]) -> dict[DeviceId, TenantId]:
    """Lock those of the devices that exist, in the order of their ids; their tenants. Across tenants."""
    rows = await connection.fetch(
        """
        SELECT device_id, tenant_id FROM device WHERE device_id = ANY ($1::uuid[])
        ORDER BY device_id
        FOR NO KEY UPDATE
        """,
        list(device_ids),
    )
    return {row["device_id"]: row["tenant_id"] for row in rows}


async def places(connection: Connection, device_ids: Sequence[DeviceId]) -> dict[DeviceId, set[NodeId]]:
    """On which nodes these devices are connected."""
    rows = await connection.fetch(
        "SELECT device_id, node_id FROM presence WHERE device_id = ANY ($1::uuid[])", list(device_ids)
    )
    found: dict[DeviceId, set[NodeId]] = {}
    for row in rows:
        found.setdefault(row["device_id"], set()).add(row["node_id"])
    return found


async def move(connection: Connection, came: Mapping[Place, TenantId], left: Sequence[Place], now: datetime) -> None:
    """Write who is connected where, and where no more."""
    if left:
        await connection.execute(
            """
            DELETE FROM presence p USING unnest($1::uuid[], $2::text[]) AS u (device_id, node_id)
            WHERE p.device_id = u.device_id AND p.node_id = u.node_id
            """,
            [device_id for device_id, _ in left],
            [node_id for _, node_id in left],
        )
    if came:
        await connection.execute(
            """
            INSERT INTO presence (device_id, node_id, tenant_id, connected_at)
            SELECT u.device_id, u.node_id, u.tenant_id, $4
            FROM unnest($1::uuid[], $2::text[], $3::uuid[]) AS u (device_id, node_id, tenant_id)
            ON CONFLICT (device_id, node_id) DO NOTHING
            """,
            [device_id for device_id, _ in came],
            [node_id for _, node_id in came],
            list(came.values()),
            now,
        )


async def set_statuses(connection: Connection, online: Mapping[DeviceId, bool], now: datetime) -> None:
    """What being connected, or not, says about devices' statuses; no other status is touched (CONTRACT §2).

    When one was seen moves forward, unless it is minutes ahead of `now`: that was a clock that was wrong.
    """
    await connection.execute(
        """
        UPDATE device d
        SET status = CASE WHEN u.online AND d.status IN ('registered', 'offline') THEN 'active'
                          WHEN NOT u.online AND d.status = 'active' THEN 'offline'
                          ELSE d.status END,
            last_seen_at = CASE WHEN NOT u.online THEN d.last_seen_at
                                WHEN d.last_seen_at <= $3::timestamptz + interval '5 minutes'
                                THEN greatest(d.last_seen_at, $3)
                                ELSE $3 END
        FROM unnest($1::uuid[], $2::boolean[]) AS u (device_id, online)
        WHERE d.device_id = u.device_id
        """,
        list(online.keys()),
        list(online.values()),
        now,
    )


async def count_of_node(connection: Connection, node_id: NodeId) -> int:
    """How many devices a node is said to hold."""
    number: int = await connection.fetchval("SELECT count(*) FROM presence WHERE node_id = $1", node_id)
    return number


async def of_node(connection: Connection, node_id: NodeId) -> set[DeviceId]:
    """Which devices a node is said to hold."""
    rows = await connection.fetch("SELECT device_id FROM presence WHERE node_id = $1", node_id)
    return {row["device_id"] for row in rows}


async def of_nobody(connection: Connection, limit: int) -> list[Place]:
    """Devices that are held by nodes which are off the list."""
    gone = await nodes.unlisted(connection, "presence")
    if not gone:
        return []
    rows = await connection.fetch(
        "SELECT device_id, node_id FROM presence WHERE node_id = ANY ($1::text[]) LIMIT $2",
        gone,
        limit,
    )
    return [(row["device_id"], row["node_id"]) for row in rows]


async def on_the_list(connection: Connection, node_ids: Collection[NodeId]) -> set[NodeId]:
    """Those of the nodes that are on the list now."""
    rows = await connection.fetch("SELECT node_id FROM node WHERE node_id = ANY ($1::text[])", list(node_ids))
    return {row["node_id"] for row in rows}
