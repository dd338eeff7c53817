"""Routes in SQL: who wants messages, in versions that rise in the order of commits.

A version is taken by raising the tenant's counter, which holds the tenant's row until the commit: so whoever has seen
version n has everything below it, and a reader asks for what is above what it has. A removed route stays as a row
until `prune`, for the readers; sessions that a cascade deleted leave routes behind, which `sweep` removes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from asyncpg import Record

from registry.messaging_values import (
    NodeRoute,
    RouteChange,
    SessionKey,
    SessionRoute,
    StoredSessionId,
    StoredSubscription,
)
from registry.model import DeviceId, NodeId, TenantId
from registry.storage.database import Connection


@dataclass(frozen=True, slots=True)
class Slice:
    """Changes of one tenant, oldest first, each with its version."""

    tenant_id: TenantId
    changes: list[tuple[int, RouteChange]]


async def read(connection: Connection, after: Mapping[TenantId, int | None], except_node: NodeId) -> list[Slice]:
    """Changes above each tenant's version, or with None all that there is. Routes of `except_node` are left out."""
    rows = await connection.fetch(
        """
        SELECT r.tenant_id, r.version, r.session_id, r.device_id, r.client_id, r.node_id, r.filter, r.stored, r.qos,
               r.no_local, r.retain_as_published, r.retain_handling, r.identifier, r.removed_at IS NOT NULL AS removed
        FROM unnest($1::uuid[], $2::bigint[]) AS t (tenant_id, version)
        JOIN messaging_route r ON r.tenant_id = t.tenant_id AND r.version > coalesce(t.version, -1)
        WHERE r.node_id IS DISTINCT FROM $3 AND (t.version IS NOT NULL OR r.removed_at IS NULL)
        ORDER BY r.tenant_id, r.version
        """,
        list(after.keys()),
        list(after.values()),
        except_node,
    )
    slices: dict[TenantId, Slice] = {}
    for row in rows:
        tenant_id = row["tenant_id"]
        found = slices.setdefault(tenant_id, Slice(tenant_id, []))
        found.changes.append((row["version"], _change(row)))
    return list(slices.values())


async def of_session(connection: Connection, session_id: StoredSessionId) -> list[StoredSubscription]:
    """The subscriptions of a session, in the order in which they came."""
    rows = await connection.fetch(
        """
        SELECT filter, qos, no_local, retain_as_published, retain_handling, identifier
        FROM messaging_route WHERE session_id = $1 AND removed_at IS NULL
        ORDER BY version, filter
        """,
        session_id,
    )
    return [_subscription(row) for row in rows]


async def offline_of_profile(connection: Connection, tenant_id: TenantId, profile_id: str) -> list[SessionRoute]:
    """Subscriptions of sessions that nobody serves, of devices of a profile."""
    rows = await connection.fetch(
        """
        SELECT r.tenant_id, r.session_id, r.device_id, r.client_id, r.filter, r.qos, r.no_local, r.retain_as_published,
               r.retain_handling, r.identifier
        FROM messaging_route r
        JOIN messaging_session s ON s.session_id = r.session_id AND s.node_id IS NULL
        JOIN device d ON d.tenant_id = s.tenant_id AND d.device_id = s.device_id
        WHERE r.tenant_id = $1 AND d.profile_id = $2 AND r.removed_at IS NULL
        ORDER BY r.session_id, r.version
        """,
        tenant_id,
        profile_id,
    )
    return [_session_route(row) for row in rows]


async def offline_of_device(connection: Connection, tenant_id: TenantId, device_id: DeviceId) -> list[SessionRoute]:
    """The same of one device."""
    rows = await connection.fetch(
        """
        SELECT r.tenant_id, r.session_id, r.device_id, r.client_id, r.filter, r.qos, r.no_local, r.retain_as_published,
               r.retain_handling, r.identifier
        FROM messaging_session s JOIN messaging_route r ON r.session_id = s.session_id AND r.removed_at IS NULL
        WHERE s.tenant_id = $1 AND s.device_id = $2 AND s.node_id IS NULL
        ORDER BY r.session_id, r.version
        """,
        tenant_id,
        device_id,
    )
    return [_session_route(row) for row in rows]


async def raise_versions(connection: Connection, tenants: Collection[TenantId]) -> dict[TenantId, int]:
    """The next version of each tenant; holds their rows until the transaction ends."""
    rows = await connection.fetch(
        """
        INSERT INTO messaging_tenant AS t (tenant_id, version)
        SELECT u, 1 FROM unnest($1::uuid[]) AS u ORDER BY u
        ON CONFLICT (tenant_id) DO UPDATE SET version = t.version + 1
        RETURNING tenant_id, version
        """,
        sorted(set(tenants)),
    )
    return {row["tenant_id"]: row["version"] for row in rows}


async def put_sessions(
    connection: Connection, versions: Mapping[TenantId, int], routes: Sequence[SessionRoute]
) -> None:
    """Add or replace subscriptions; no (session, filter) twice."""
    if not routes:
        return
    await connection.execute(
        """
        INSERT INTO messaging_route (tenant_id, version, session_id, device_id, client_id, filter, stored, qos,
                                     no_local, retain_as_published, retain_handling, identifier)
        SELECT tenant_id, version, session_id, device_id, client_id, filter, true, qos, no_local,
               retain_as_published, retain_handling, identifier
        FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::uuid[], $5::text[], $6::text[], $7::smallint[],
                    $8::boolean[], $9::boolean[], $10::smallint[], $11::bigint[])
             AS u (tenant_id, version, session_id, device_id, client_id, filter, qos, no_local, retain_as_published,
                   retain_handling, identifier)
        ON CONFLICT (session_id, filter) WHERE session_id IS NOT NULL DO UPDATE
        SET version = EXCLUDED.version, qos = EXCLUDED.qos, no_local = EXCLUDED.no_local,
            retain_as_published = EXCLUDED.retain_as_published, retain_handling = EXCLUDED.retain_handling,
            identifier = EXCLUDED.identifier, removed_at = NULL
        """,
        [r.key.tenant_id for r in routes],
        [versions[r.key.tenant_id] for r in routes],
        [r.session_id for r in routes],
        [r.key.device_id for r in routes],
        [r.key.client_id for r in routes],
        [r.subscription.filter for r in routes],
        [r.subscription.qos for r in routes],
        [r.subscription.no_local for r in routes],
        [r.subscription.retain_as_published for r in routes],
        [r.subscription.retain_handling for r in routes],
        [r.subscription.identifier for r in routes],
    )


async def remove_filters(
    connection: Connection,
    versions: Mapping[TenantId, int],
    gone: Sequence[tuple[TenantId, StoredSessionId, str]],
) -> None:
    """Remove single subscriptions."""
    if not gone:
        return
    await connection.execute(
        """
        UPDATE messaging_route r SET removed_at = now(), version = u.version
        FROM unnest($1::bigint[], $2::text[], $3::bigint[]) AS u (session_id, filter, version)
        WHERE r.session_id = u.session_id AND r.filter = u.filter AND r.removed_at IS NULL
        """,
        [session_id for _, session_id, _ in gone],
        [text for _, _, text in gone],
        [versions[tenant_id] for tenant_id, _, _ in gone],
    )


async def remove_sessions(connection: Connection, sessions: Mapping[StoredSessionId, TenantId]) -> bool:
    """Remove all routes of these sessions, with new versions of their tenants; whether there were any."""
    if not sessions:
        return False
    busy = await connection.fetch(
        "SELECT DISTINCT tenant_id FROM messaging_route WHERE session_id = ANY ($1::bigint[]) AND removed_at IS NULL",
        list(sessions),
    )
    if not busy:
        return False
    versions = await raise_versions(connection, [row["tenant_id"] for row in busy])
    await connection.execute(
        """
        UPDATE messaging_route r SET removed_at = now(), version = u.version
        FROM unnest($2::uuid[], $3::bigint[]) AS u (tenant_id, version)
        WHERE r.session_id = ANY ($1::bigint[]) AND r.tenant_id = u.tenant_id AND r.removed_at IS NULL
        """,
        list(sessions),
        list(versions.keys()),
        list(versions.values()),
    )
    return True


async def put_nodes(
    connection: Connection,
    versions: Mapping[TenantId, int],
    interests: Sequence[tuple[TenantId, NodeRoute, bool]],
) -> None:
    """Write a node's interests: there (True) or not any more (False); none twice."""
    if not interests:
        return
    await connection.execute(
        """
        INSERT INTO messaging_route (tenant_id, version, node_id, filter, stored, qos, removed_at)
        SELECT tenant_id, version, node_id, filter, stored, qos, CASE WHEN present THEN NULL ELSE now() END
        FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::boolean[], $6::smallint[], $7::boolean[])
             AS u (tenant_id, version, node_id, filter, stored, qos, present)
        ON CONFLICT (node_id, tenant_id, filter, stored, qos) WHERE node_id IS NOT NULL DO UPDATE
        SET version = EXCLUDED.version, removed_at = EXCLUDED.removed_at
        """,
        [tenant_id for tenant_id, _, _ in interests],
        [versions[tenant_id] for tenant_id, _, _ in interests],
        [route.node_id for _, route, _ in interests],
        [route.filter for _, route, _ in interests],
        [route.stored for _, route, _ in interests],
        [route.qos for _, route, _ in interests],
        [present for _, _, present in interests],
    )


async def remove_node(connection: Connection, node_id: NodeId, limit: int) -> int:
    """A node is gone, and what lived there goes: at most `limit` routes at once; how many. Their tenants are held."""
    rows = await connection.fetch(
        """
        SELECT tenant_id, filter, stored, qos FROM messaging_route WHERE node_id = $1 AND removed_at IS NULL LIMIT $2
        """,
        node_id,
        limit,
    )
    if not rows:
        return 0
    versions = await raise_versions(connection, {row["tenant_id"] for row in rows})
    await connection.execute(
        """
        UPDATE messaging_route r SET removed_at = now(), version = u.version
        FROM unnest($2::uuid[], $3::text[], $4::boolean[], $5::smallint[], $6::bigint[])
             AS u (tenant_id, filter, stored, qos, version)
        WHERE r.node_id = $1 AND r.tenant_id = u.tenant_id AND r.filter = u.filter AND r.stored = u.stored
          AND r.qos = u.qos AND r.removed_at IS NULL
        """,
        node_id,
        [row["tenant_id"] for row in rows],
        [row["filter"] for row in rows],
        [row["stored"] for row in rows],
        [row["qos"] for row in rows],
        [versions[row["tenant_id"]] for row in rows],
    )
    return len(rows)


async def sweep(connection: Connection, limit: int) -> int:
    """Remove routes of sessions that a deleted device took along; how many sessions. In a transaction."""
    rows = await connection.fetch(
        """
        SELECT DISTINCT session_id, tenant_id FROM messaging_route r
        WHERE session_id IS NOT NULL AND removed_at IS NULL
          AND NOT EXISTS (SELECT FROM messaging_session s WHERE s.session_id = r.session_id)
        LIMIT $1
        """,
        limit,
    )
    await remove_sessions(connection, {row["session_id"]: row["tenant_id"] for row in rows})
    return len(rows)


async def prune(connection: Connection, seconds: float, limit: int) -> int:
    """Delete rows that were removed longer ago than any follower may be behind; how many.

    One that is taken up again meanwhile stays, which only the condition outside sees to: a row that was found by its
    place is deleted by older PostgreSQLs (16.2 is one) whatever has become of it.
    """
    status = await connection.execute(
        """
        DELETE FROM messaging_route WHERE ctid = ANY (ARRAY (
            SELECT ctid FROM messaging_route WHERE removed_at < now() - make_interval(secs => $1)
            ORDER BY removed_at LIMIT $2))
          AND removed_at < now() - make_interval(secs => $1)
        """,
        seconds,
        limit,
    )
    return int(status.rsplit(" ", 1)[-1])


def _change(row: Record) -> RouteChange:
    if row["session_id"] is None:
        return RouteChange(NodeRoute(row["node_id"], row["filter"], row["stored"], row["qos"]), row["removed"])
    return RouteChange(_session_route(row), row["removed"])


def _session_route(row: Record) -> SessionRoute:
    key = SessionKey(row["tenant_id"], row["device_id"], row["client_id"])
    return SessionRoute(row["session_id"], key, _subscription(row))


def _subscription(row: Record) -> StoredSubscription:
    return StoredSubscription(
        row["filter"],
        row["qos"],
        row["no_local"],
        row["retain_as_published"],
        row["retain_handling"],
        row["identifier"],
    )
