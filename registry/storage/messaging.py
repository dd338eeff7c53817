"""Messages in SQL: a batch of publications is written by one statement; the other end of the queues; retained ones.

Sessions are locked first (messaging_sessions.lock), then tenants, so that ordinals and counters may be reckoned in
memory and written back, and no two batches wait for each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg
import msgspec
from asyncpg import Record

from registry.messaging_values import Message, Relay, Retained, StoredSessionId
from registry.model import DeviceId, NodeId, TenantId
from registry.storage.database import Connection
from registry.storage.messaging_sessions import FORFEITED, ROTATED, Locked, message_of, remove_bodies

_DATA_CLASSES = frozenset({"22", "23", "54"})
"""SQLSTATE classes that blame a row: data exception, integrity constraint, program limit."""


class RowsRefused(Exception):
    """At least one row cannot be stored as it is. Nothing was stored."""


@dataclass(frozen=True, slots=True)
class QueueRow:
    """A message for a session. `waiting_for`: the node that is to take charge of it; with a packet id nobody is."""

    session_id: StoredSessionId
    ordinal: int
    message_id: UUID
    qos: int
    retain: bool
    identifiers: tuple[int, ...]
    size: int
    packet_id: int | None
    waiting_for: NodeId | None


@dataclass(slots=True)
class Retention:
    """What a tenant retains, its row held: counters, and the sizes of the topics that a batch touches."""

    messages: int
    bytes: int
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Writes:
    """Everything that a batch stores."""

    bodies: list[tuple[UUID, TenantId, DeviceId, Message]] = field(default_factory=list)
    rows: list[QueueRow] = field(default_factory=list)
    relays: list[tuple[UUID, Relay]] = field(default_factory=list)
    incoming: list[tuple[StoredSessionId, int]] = field(default_factory=list)
    wills: list[int] = field(default_factory=list)
    retained: dict[tuple[TenantId, str], tuple[DeviceId, Message] | None] = field(default_factory=dict)
    """The last word for each topic; None forgets it."""

    @property
    def anything(self) -> bool:
        """Whether there is something to write."""
        return bool(self.bodies or self.incoming or self.wills or self.retained)


async def known_incoming(
    connection: Connection, ids: Sequence[tuple[StoredSessionId, int]]
) -> set[tuple[StoredSessionId, int]]:
    """Which of these QoS 2 ids (session, packet id) are stored already."""
    rows = await connection.fetch(
        """
        SELECT session_id, packet_id FROM unnest($1::bigint[], $2::integer[]) AS u (session_id, packet_id)
        JOIN messaging_incoming USING (session_id, packet_id)
        """,
        [session_id for session_id, _ in ids],
        [packet_id for _, packet_id in ids],
    )
    return {(row["session_id"], row["packet_id"]) for row in rows}


async def remember_incoming(connection: Connection, ids: Sequence[tuple[StoredSessionId, int]]) -> None:
    """Store QoS 2 ids (session, packet id) that are not there; the sessions' rows are held by the caller."""
    await connection.execute(
        """
        INSERT INTO messaging_incoming (session_id, packet_id)
        SELECT session_id, packet_id FROM unnest($1::bigint[], $2::integer[]) AS u (session_id, packet_id)
        """,
        [session_id for session_id, _ in ids],
        [packet_id for _, packet_id in ids],
    )


async def pending_wills(connection: Connection, will_ids: Sequence[int]) -> set[int]:
    """Which of these wills still wait to be published, and were not forfeited meanwhile; held.

    Two statements: a revocation that came while their rows were waited for is seen by the second only.
    """
    await connection.execute(
        "SELECT FROM messaging_will WHERE will_id = ANY ($1::bigint[]) ORDER BY will_id FOR UPDATE", will_ids
    )
    rows = await connection.fetch(
        f"SELECT s.will_id FROM messaging_will s WHERE s.will_id = ANY ($2::bigint[]) AND NOT ({FORFEITED})",  # noqa: S608
        ROTATED,
        will_ids,
    )
    return {row["will_id"] for row in rows}


async def lock_retention(connection: Connection, topics: Collection[tuple[TenantId, str]]) -> dict[TenantId, Retention]:
    """Hold the tenants' rows; what they retain, and how large it is under these topics."""
    tenants = sorted({tenant_id for tenant_id, _ in topics})
    await connection.execute(
        """
        INSERT INTO messaging_tenant (tenant_id) SELECT u FROM unnest($1::uuid[]) AS u ORDER BY u
        ON CONFLICT (tenant_id) DO NOTHING
        """,
        tenants,
    )
    rows = await connection.fetch(
        """
        SELECT tenant_id, retained_messages, retained_bytes FROM messaging_tenant
        WHERE tenant_id = ANY ($1::uuid[]) ORDER BY tenant_id FOR NO KEY UPDATE
        """,
        tenants,
    )
    held = {row["tenant_id"]: Retention(row["retained_messages"], row["retained_bytes"]) for row in rows}
    sizes = await connection.fetch(
        """
        SELECT tenant_id, topic, size FROM unnest($1::uuid[], $2::text[]) AS u (tenant_id, topic)
        JOIN messaging_retained USING (tenant_id, topic)
        """,
        [tenant_id for tenant_id, _ in topics],
        [topic for _, topic in topics],
    )
    for row in sizes:
        held[row["tenant_id"]].sizes[row["topic"]] = row["size"]
    return held


async def write(
    connection: Connection, writes: Writes, sessions: Iterable[Locked], retention: Mapping[TenantId, Retention]
) -> None:
    """Store a batch, whose sessions and tenants are held. Raises RowsRefused."""
    try:
        await _write(connection, writes, list(sessions))
        if writes.retained:
            await _write_retained(connection, writes.retained, retention)
    except asyncpg.PostgresError as error:
        if (error.sqlstate or "")[:2] in _DATA_CLASSES:
            raise RowsRefused from error
        raise
    except ValueError as error:  # a value that has no encoding
        raise RowsRefused from error


_WRITE = """
WITH bodies AS (
    INSERT INTO messaging_message (message_id, tenant_id, device_id, topic, payload, qos, retain, properties,
                                   expires_at)
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::bytea[], $6::smallint[], $7::boolean[],
                         $8::bytea[], $9::float8[])
), queued AS (
    INSERT INTO messaging_queue (session_id, ordinal, message_id, qos, retain, identifiers, size, packet_id,
                                 waiting_for)
    SELECT session_id, ordinal, message_id, qos, retain, identifiers::bigint[], size, packet_id, waiting_for
    FROM unnest($10::bigint[], $11::bigint[], $12::uuid[], $13::smallint[], $14::boolean[], $15::text[],
                $16::integer[], $17::integer[], $18::text[])
         AS u (session_id, ordinal, message_id, qos, retain, identifiers, size, packet_id, waiting_for)
), relayed AS (
    INSERT INTO messaging_relay (node_id, message_id, direct, shared)
    SELECT u.node_id, u.message_id, u.direct, u.shared
    FROM unnest($19::text[], $20::uuid[], $21::boolean[], $22::text[])
         WITH ORDINALITY AS u (node_id, message_id, direct, shared, place)
    ORDER BY u.place
), received AS (
    INSERT INTO messaging_incoming (session_id, packet_id)
    SELECT * FROM unnest($23::bigint[], $24::integer[])
), published AS (
    DELETE FROM messaging_will WHERE will_id = ANY ($25::bigint[])
)
UPDATE messaging_session s
SET last_ordinal = u.last_ordinal, queued_messages = u.queued_messages, queued_bytes = u.queued_bytes
FROM unnest($26::bigint[], $27::bigint[], $28::integer[], $29::bigint[])
     AS u (session_id, last_ordinal, queued_messages, queued_bytes)
WHERE s.session_id = u.session_id
"""


async def _write(connection: Connection, writes: Writes, sessions: Sequence[Locked]) -> None:
    bodies, rows, relays = writes.bodies, writes.rows, writes.relays
    if not (bodies or writes.incoming or writes.wills):
        return
    await connection.execute(
        _WRITE,
        [i for i, _, _, _ in bodies],
        [t for _, t, _, _ in bodies],
        [d for _, _, d, _ in bodies],
        [m.topic for _, _, _, m in bodies],
        [m.payload for _, _, _, m in bodies],
        [m.qos for _, _, _, m in bodies],
        [m.retain for _, _, _, m in bodies],
        [m.properties for _, _, _, m in bodies],
        [m.expires_at for _, _, _, m in bodies],
        [r.session_id for r in rows],
        [r.ordinal for r in rows],
        [r.message_id for r in rows],
        [r.qos for r in rows],
        [r.retain for r in rows],
        # An array of arrays of different lengths does not exist in SQL; text of each does.
        [f"{{{','.join(map(str, r.identifiers))}}}" if r.identifiers else None for r in rows],
        [r.size for r in rows],
        [r.packet_id for r in rows],
        [r.waiting_for for r in rows],
        [relay.node_id for _, relay in relays],
        [i for i, _ in relays],
        [relay.direct for _, relay in relays],
        [msgspec.json.encode(relay.shared).decode() for _, relay in relays],
        [session_id for session_id, _ in writes.incoming],
        [packet_id for _, packet_id in writes.incoming],
        writes.wills,
        [s.session_id for s in sessions],
        [s.last_ordinal for s in sessions],
        [s.queued_messages for s in sessions],
        [s.queued_bytes for s in sessions],
    )


async def _write_retained(
    connection: Connection,
    retained: Mapping[tuple[TenantId, str], tuple[DeviceId, Message] | None],
    retention: Mapping[TenantId, Retention],
) -> None:
    gone = [key for key, value in retained.items() if value is None]
    kept = [(key, *value) for key, value in retained.items() if value is not None]
    if gone:
        await connection.execute(
            """
            DELETE FROM messaging_retained r USING unnest($1::uuid[], $2::text[]) AS u (tenant_id, topic)
            WHERE r.tenant_id = u.tenant_id AND r.topic = u.topic
            """,
            [tenant_id for tenant_id, _ in gone],
            [topic for _, topic in gone],
        )
    if kept:
        await connection.execute(
            """
            INSERT INTO messaging_retained (tenant_id, topic, device_id, payload, qos, properties, expires_at, size)
            SELECT * FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::bytea[], $5::smallint[], $6::bytea[],
                                 $7::float8[], $8::integer[])
            ON CONFLICT (tenant_id, topic) DO UPDATE
            SET device_id = EXCLUDED.device_id, payload = EXCLUDED.payload, qos = EXCLUDED.qos,
                properties = EXCLUDED.properties, expires_at = EXCLUDED.expires_at, size = EXCLUDED.size
            """,
            [tenant_id for (tenant_id, _), _, _ in kept],
            [topic for (_, topic), _, _ in kept],
            [device_id for _, device_id, _ in kept],
            [m.payload for _, _, m in kept],
            [m.qos for _, _, m in kept],
            [m.properties for _, _, m in kept],
            [m.expires_at for _, _, m in kept],
            [m.size for _, _, m in kept],
        )
    await connection.execute(
        """
        UPDATE messaging_tenant t SET retained_messages = u.messages, retained_bytes = u.bytes
        FROM unnest($1::uuid[], $2::integer[], $3::bigint[]) AS u (tenant_id, messages, bytes)
        WHERE t.tenant_id = u.tenant_id
        """,
        list(retention.keys()),
        [r.messages for r in retention.values()],
        [r.bytes for r in retention.values()],
    )


# The other end of the queues.


async def record_releases(connection: Connection, rows: Sequence[tuple[StoredSessionId, int, int]]) -> None:
    """From now on only PUBREL is sent for these rows (session, ordinal, place); a repetition keeps its first place."""
    await connection.execute(
        """
        UPDATE messaging_queue q SET released = coalesce(q.released, u.place)
        FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS u (session_id, ordinal, place)
        WHERE q.session_id = u.session_id AND q.ordinal = u.ordinal
        """,
        [session_id for session_id, _, _ in rows],
        [ordinal for _, ordinal, _ in rows],
        [place for _, _, place in rows],
    )


async def forget_incoming(connection: Connection, ids: Sequence[tuple[StoredSessionId, int]]) -> None:
    """The senders have released these QoS 2 ids (session, packet id)."""
    await connection.execute(
        """
        DELETE FROM messaging_incoming i USING unnest($1::bigint[], $2::integer[]) AS u (session_id, packet_id)
        WHERE i.session_id = u.session_id AND i.packet_id = u.packet_id
        """,
        [session_id for session_id, _ in ids],
        [packet_id for _, packet_id in ids],
    )


async def write_last_ordinals(connection: Connection, sessions: Sequence[Locked]) -> None:
    """Write the places back that were given out."""
    await connection.execute(
        """
        UPDATE messaging_session s SET last_ordinal = u.last_ordinal
        FROM unnest($1::bigint[], $2::bigint[]) AS u (session_id, last_ordinal)
        WHERE s.session_id = u.session_id
        """,
        [s.session_id for s in sessions],
        [s.last_ordinal for s in sessions],
    )


_WAITING = """
    SELECT q.session_id, s.epoch, q.ordinal, q.qos AS granted, q.retain AS retained, q.identifiers, q.size,
           q.packet_id, q.released, m.topic, m.payload, m.qos, m.retain, m.properties, m.expires_at
    FROM messaging_queue q
    JOIN messaging_session s ON s.session_id = q.session_id AND s.node_id = $1
    JOIN messaging_message m ON m.message_id = q.message_id
    WHERE q.waiting_for = $1 AND q.session_id {which} ($2::bigint[])
    ORDER BY q.session_id, q.ordinal
    LIMIT $3
"""


async def waiting(
    connection: Connection, node_id: NodeId, except_sessions: Collection[StoredSessionId], limit: int
) -> list[Record]:
    """Queue rows that wait for an owner on a node to take charge, with the owner's epoch and the message, in order."""
    rows: list[Record] = await connection.fetch(_WAITING.format(which="<> ALL"), node_id, list(except_sessions), limit)
    return rows


async def waiting_of(
    connection: Connection, node_id: NodeId, sessions: Collection[StoredSessionId], limit: int
) -> list[Record]:
    """The same, but of these sessions only."""
    rows: list[Record] = await connection.fetch(_WAITING.format(which="= ANY"), node_id, list(sessions), limit)
    return rows


async def which_wait(
    connection: Connection, node_id: NodeId, sessions: Collection[StoredSessionId]
) -> set[StoredSessionId]:
    """Which of these sessions, held by the caller and served by this node, have rows that wait for a packet id.

    A statement of its own: the one that waits for the sessions' rows sees the queues as they were before.
    """
    rows = await connection.fetch(
        """
        SELECT u.session_id FROM unnest($2::bigint[]) AS u (session_id)
        WHERE EXISTS (SELECT FROM messaging_queue q WHERE q.waiting_for = $1 AND q.session_id = u.session_id)
        """,
        node_id,
        list(sessions),
    )
    return {row["session_id"] for row in rows}


async def take_charge(
    connection: Connection, rows: Sequence[tuple[StoredSessionId, int, int]]
) -> set[tuple[StoredSessionId, int]]:
    """Give rows (session, ordinal, packet id) of held sessions their packet ids; which ones (session, ordinal) were
    still waiting and have it now."""
    taken = await connection.fetch(
        """
        UPDATE messaging_queue q SET packet_id = u.packet_id, waiting_for = NULL
        FROM unnest($1::bigint[], $2::bigint[], $3::integer[]) AS u (session_id, ordinal, packet_id)
        WHERE q.session_id = u.session_id AND q.ordinal = u.ordinal AND q.packet_id IS NULL
        RETURNING q.session_id, q.ordinal
        """,
        [session_id for session_id, _, _ in rows],
        [ordinal for _, ordinal, _ in rows],
        [packet_id for _, _, packet_id in rows],
    )
    return {(row["session_id"], row["ordinal"]) for row in taken}


async def relays(connection: Connection, node_id: NodeId, except_ids: Collection[int], limit: int) -> list[Record]:
    """Messages relayed to a node, in order, but those of `except_ids`."""
    rows: list[Record] = await connection.fetch(
        """
        SELECT r.relay_id, r.message_id, r.direct, r.shared, m.tenant_id, m.device_id, m.topic, m.payload, m.qos,
               m.retain, m.properties, m.expires_at
        FROM messaging_relay r JOIN messaging_message m ON m.message_id = r.message_id
        WHERE r.node_id = $1 AND r.relay_id <> ALL ($2::bigint[])
        ORDER BY r.relay_id
        LIMIT $3
        """,
        node_id,
        list(except_ids),
        limit,
    )
    return rows


async def remove_relays(connection: Connection, node_id: NodeId, relay_ids: Collection[int]) -> None:
    """These have arrived. In a transaction."""
    rows = await connection.fetch(
        "DELETE FROM messaging_relay WHERE node_id = $1 AND relay_id = ANY ($2::bigint[]) RETURNING message_id",
        node_id,
        list(relay_ids),
    )
    await remove_bodies(connection, list({row["message_id"] for row in rows}))


async def remove_node(connection: Connection, node_id: NodeId) -> None:
    """A node is gone: nobody waits there for relays any more. Evictions stay: it may only have been cut off."""
    await connection.execute("DELETE FROM messaging_relay WHERE node_id = $1", node_id)


async def prune_evictions(connection: Connection, seconds: float) -> None:
    """Delete word for nodes that never came for it."""
    await connection.execute(
        "DELETE FROM messaging_eviction WHERE written_at < now() - make_interval(secs => $1)", seconds
    )
    await connection.execute(
        "DELETE FROM messaging_takeover WHERE written_at < now() - make_interval(secs => $1)", seconds
    )


# Retained messages.


async def retained_topics(connection: Connection, tenant_id: TenantId, prefix: str, now: float) -> list[str]:
    """Topics with a living retained message that begin with `prefix`, in byte order."""
    rows = await connection.fetch(
        """
        SELECT topic FROM messaging_retained
        WHERE tenant_id = $1 AND topic >= $2 AND starts_with(topic, $2) AND topic < $2 || chr(1114111)
          AND (expires_at IS NULL OR expires_at > $3)
        ORDER BY topic
        """,
        tenant_id,
        prefix,
        now,
    )
    return [row["topic"] for row in rows]


async def retained(connection: Connection, tenant_id: TenantId, topics: Sequence[str], now: float) -> list[Retained]:
    """The living retained messages of these topics."""
    rows = await connection.fetch(
        """
        SELECT device_id, topic, payload, qos, true AS retain, properties, expires_at FROM messaging_retained
        WHERE tenant_id = $1 AND topic = ANY ($2::text[]) AND (expires_at IS NULL OR expires_at > $3)
        ORDER BY topic
        """,
        tenant_id,
        topics,
        now,
    )
    return [Retained(row["device_id"], message_of(row)) for row in rows]


async def retained_now(
    connection: Connection, topics: Collection[tuple[TenantId, str]]
) -> dict[tuple[TenantId, str], Message]:
    """What is retained under these topics of several tenants, whether it is over or not."""
    rows = await connection.fetch(
        """
        SELECT tenant_id, topic, payload, qos, true AS retain, properties, expires_at
        FROM unnest($1::uuid[], $2::text[]) AS u (tenant_id, topic) JOIN messaging_retained USING (tenant_id, topic)
        """,
        [tenant_id for tenant_id, _ in topics],
        [topic for _, topic in topics],
    )
    return {(row["tenant_id"], row["topic"]): message_of(row) for row in rows}


async def remove_retained(connection: Connection, kept: Sequence[tuple[TenantId, DeviceId, str]]) -> int:
    """Forget what these devices have retained under these topics; how many there were. In a transaction; holds the
    tenants' rows. What another device has put in its place by now stays."""
    held = await lock_retention(connection, {(tenant_id, topic) for tenant_id, _, topic in kept})
    rows = await connection.fetch(
        """
        SELECT tenant_id, topic FROM unnest($1::uuid[], $2::uuid[], $3::text[]) AS u (tenant_id, device_id, topic)
        JOIN messaging_retained USING (tenant_id, device_id, topic)
        """,
        [tenant_id for tenant_id, _, _ in kept],
        [device_id for _, device_id, _ in kept],
        [topic for _, _, topic in kept],
    )
    return await _forget_retained(connection, {(row["tenant_id"], row["topic"]) for row in rows}, held)


async def remove_expired_retained(connection: Connection, now: float, limit: int) -> int:
    """Forget at most so many retained messages that are over; how many were found. As `remove_retained`."""
    found = await expired_retained(connection, now, limit)
    if found:
        held = await lock_retention(connection, found)
        # A topic may have got its next message before the rows were held.
        still = await expired_retained(connection, now, limit)
        await _forget_retained(connection, set(found).intersection(still), held)
    return len(found)


async def _forget_retained(
    connection: Connection, topics: Collection[tuple[TenantId, str]], held: Mapping[TenantId, Retention]
) -> int:
    for tenant_id, topic in topics:
        held[tenant_id].messages -= 1
        held[tenant_id].bytes -= held[tenant_id].sizes.pop(topic)
    await _write_retained(connection, dict.fromkeys(topics), held)
    return len(topics)


async def expired_retained(connection: Connection, now: float, limit: int) -> list[tuple[TenantId, str]]:
    """Topics whose retained message is over."""
    rows = await connection.fetch(
        "SELECT tenant_id, topic FROM messaging_retained WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2",
        now,
        limit,
    )
    return [(row["tenant_id"], row["topic"]) for row in rows]


async def retained_of_profile(
    connection: Connection, tenant_id: TenantId, profile_id: str
) -> list[tuple[DeviceId, str]]:
    """Retained topics whose publishers have this profile."""
    rows = await connection.fetch(
        """
        SELECT r.device_id, r.topic FROM messaging_retained r
        JOIN device d ON d.tenant_id = r.tenant_id AND d.device_id = r.device_id
        WHERE r.tenant_id = $1 AND d.profile_id = $2
        ORDER BY r.topic
        """,
        tenant_id,
        profile_id,
    )
    return [(row["device_id"], row["topic"]) for row in rows]


async def retained_of_device(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId
) -> list[tuple[DeviceId, str]]:
    """Retained topics that a device published."""
    rows = await connection.fetch(
        "SELECT topic FROM messaging_retained WHERE tenant_id = $1 AND device_id = $2 ORDER BY topic",
        tenant_id,
        device_id,
    )
    return [(device_id, row["topic"]) for row in rows]


# Upkeep.


async def expired_rows(connection: Connection, now: float, limit: int) -> list[tuple[StoredSessionId, int]]:
    """Queue rows (session, ordinal) whose message is over and that nobody has taken charge of."""
    rows = await connection.fetch(
        """
        SELECT q.session_id, q.ordinal
        FROM messaging_message m JOIN messaging_queue q ON q.message_id = m.message_id
        WHERE m.expires_at <= $1 AND q.packet_id IS NULL
        ORDER BY m.expires_at
        LIMIT $2
        """,
        now,
        limit,
    )
    return [(row["session_id"], row["ordinal"]) for row in rows]


async def sweep_bodies(connection: Connection, after: UUID, limit: int) -> tuple[UUID, int]:
    """Delete messages that no row names, among the next `limit` behind `after`; the last one looked at (all zeros when
    there are no more) and how many went. A message that is being stored is not seen before its rows are."""
    rows = await connection.fetch(
        "SELECT message_id FROM messaging_message WHERE message_id > $1 ORDER BY message_id LIMIT $2", after, limit
    )
    if not rows:
        return UUID(int=0), 0
    status = await connection.execute(
        """
        DELETE FROM messaging_message m
        WHERE m.message_id > $1 AND m.message_id <= $2
          AND NOT EXISTS (SELECT FROM messaging_queue q WHERE q.message_id = m.message_id)
          AND NOT EXISTS (SELECT FROM messaging_relay r WHERE r.message_id = m.message_id)
        """,
        after,
        rows[-1]["message_id"],
    )
    return rows[-1]["message_id"], int(status.rsplit(" ", 1)[-1])


async def queued_by_tenant(connection: Connection, tenants: Collection[TenantId]) -> dict[TenantId, tuple[int, int]]:
    """Messages and bytes that wait in all queues of each tenant."""
    rows = await connection.fetch(
        """
        SELECT tenant_id, sum(queued_messages)::bigint AS messages, sum(queued_bytes)::bigint AS bytes
        FROM messaging_session WHERE tenant_id = ANY ($1::uuid[]) GROUP BY tenant_id
        """,
        list(tenants),
    )
    return {row["tenant_id"]: (row["messages"], row["bytes"]) for row in rows}


async def queued_topics(connection: Connection, session_id: StoredSessionId) -> list[str]:
    """Topics of the messages in a session's queue that nobody has taken charge of."""
    rows = await connection.fetch(
        """
        SELECT DISTINCT m.topic FROM messaging_queue q JOIN messaging_message m USING (message_id)
        WHERE q.session_id = $1 AND q.packet_id IS NULL
        """,
        session_id,
    )
    return [row["topic"] for row in rows]


async def rows_of_topics(
    connection: Connection, session_id: StoredSessionId, topics: Sequence[str]
) -> list[tuple[StoredSessionId, int]]:
    """Queue rows (session, ordinal) of these topics that nobody has taken charge of."""
    rows = await connection.fetch(
        """
        SELECT q.ordinal FROM messaging_queue q JOIN messaging_message m USING (message_id)
        WHERE q.session_id = $1 AND q.packet_id IS NULL AND m.topic = ANY ($2::text[])
        """,
        session_id,
        topics,
    )
    return [(session_id, row["ordinal"]) for row in rows]


# Nodes.


async def hold_node(connection: Connection, node_id: NodeId) -> bool:
    """Keep a node from joining, or from being cleared up after, until the transaction ends; whether it is listed."""
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('messaging ' || $1, 0))", node_id)
    listed: bool = await connection.fetchval("SELECT EXISTS (SELECT FROM messaging_node WHERE node_id = $1)", node_id)
    return listed


async def join(connection: Connection, node_id: NodeId, incarnation: UUID) -> None:
    """Announce a node's process; the caller holds the node."""
    await connection.execute(
        """
        INSERT INTO messaging_node (node_id, incarnation, seen_at) VALUES ($1, $2, clock_timestamp())
        ON CONFLICT (node_id) DO UPDATE SET incarnation = EXCLUDED.incarnation, seen_at = EXCLUDED.seen_at
        """,
        node_id,
        incarnation,
    )


async def beat(connection: Connection, node_id: NodeId, incarnation: UUID) -> bool:
    """Tell that the process lives; False when others took it for dead."""
    done = await connection.fetchval(
        """
        UPDATE messaging_node SET seen_at = clock_timestamp() WHERE node_id = $1 AND incarnation = $2 RETURNING true
        """,
        node_id,
        incarnation,
    )
    return done is not None


async def has_others(connection: Connection, node_id: NodeId) -> bool:
    """Whether any other node is listed."""
    found: bool = await connection.fetchval("SELECT EXISTS (SELECT FROM messaging_node WHERE node_id <> $1)", node_id)
    return found


async def leave(connection: Connection, node_id: NodeId, incarnation: UUID) -> None:
    """Take a node's process off the list."""
    await connection.execute("DELETE FROM messaging_node WHERE node_id = $1 AND incarnation = $2", node_id, incarnation)


async def take_dead(connection: Connection, seconds: float) -> list[NodeId]:
    """Take nodes off the list that have not beaten for so long. Clearing up after them comes next; `unlisted_owners`
    finds those whose turn a crash has cut short."""
    rows = await connection.fetch(
        """
        DELETE FROM messaging_node WHERE seen_at < clock_timestamp() - make_interval(secs => $1) RETURNING node_id
        """,
        seconds,
    )
    return [row["node_id"] for row in rows]


async def unlisted_owners(connection: Connection) -> list[NodeId]:
    """Nodes that are not on the list and still own sessions, have routes or are sent relays."""
    # A step through an index for each node, not a look at every row: every node asks this every two seconds.
    rows = await connection.fetch(
        """
        WITH RECURSIVE owner AS (
            SELECT min(node_id) AS node_id FROM messaging_session WHERE node_id IS NOT NULL
            UNION ALL
            SELECT (SELECT min(s.node_id) FROM messaging_session s WHERE s.node_id > owner.node_id)
            FROM owner WHERE owner.node_id IS NOT NULL
        ), interested AS (
            SELECT min(node_id) AS node_id FROM messaging_route WHERE node_id IS NOT NULL AND removed_at IS NULL
            UNION ALL
            SELECT (SELECT min(r.node_id) FROM messaging_route r
                    WHERE r.node_id > interested.node_id AND r.removed_at IS NULL)
            FROM interested WHERE interested.node_id IS NOT NULL
        ), receiver AS (
            SELECT min(node_id) AS node_id FROM messaging_relay
            UNION ALL
            SELECT (SELECT min(r.node_id) FROM messaging_relay r WHERE r.node_id > receiver.node_id)
            FROM receiver WHERE receiver.node_id IS NOT NULL
        )
        SELECT node_id FROM (
            SELECT node_id FROM owner UNION SELECT node_id FROM interested UNION SELECT node_id FROM receiver
        ) AS busy
        WHERE node_id IS NOT NULL AND NOT EXISTS (SELECT FROM messaging_node n WHERE n.node_id = busy.node_id)
        """
    )
    return [row["node_id"] for row in rows]
