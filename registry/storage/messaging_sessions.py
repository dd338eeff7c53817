"""Stored sessions in SQL: taken, let go, ended, dropped with a revocation, and left behind by nodes that died.

Every function works in the caller's transaction. Locks are taken in one order: devices, then sessions by rising number,
then wills by rising number, then tenants.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from asyncpg import Record

from registry.messaging_values import (
    Eviction,
    Message,
    Opening,
    Ownership,
    QueuedMessage,
    SessionKey,
    StoredSession,
    StoredSessionId,
    StoredWill,
)
from registry.model import DeviceId, NodeId, TenantId
from registry.storage import messaging_routes as routes
from registry.storage.database import Connection

ROTATED = ["rotated", "retired: its successor was used"]
"""Ends of a credential that are no revocation of its device's rights: what the device was owed stays. The registry's
own words; what an operator may say of a revocation (certs.crl.RevocationReason), `superseded` too, is none of them."""

FORFEITED = """
    EXISTS (SELECT FROM credential c
            WHERE c.tenant_id = s.tenant_id AND c.credential_id = s.credential_id
              AND c.revoked_at IS NOT NULL AND c.revoked_reason <> ALL ($1::text[]))
    OR EXISTS (SELECT FROM device d
               WHERE d.tenant_id = s.tenant_id AND d.device_id = s.device_id AND d.status = 'inactive')
    OR EXISTS (SELECT FROM credential c
               JOIN credential n ON n.tenant_id = c.tenant_id AND n.device_id = c.device_id
                AND n.credential_id <> c.credential_id AND n.created_at >= c.created_at
               WHERE c.tenant_id = s.tenant_id AND c.credential_id = s.credential_id
                 AND n.revoked_at IS NOT NULL AND n.revoked_reason <> ALL ($1::text[])
                 AND NOT EXISTS (SELECT FROM credential l
                                 WHERE l.tenant_id = c.tenant_id AND l.device_id = c.device_id
                                   AND l.revoked_at IS NULL AND (l.expires_at IS NULL OR l.expires_at > now())))
"""
"""Of a session or a will `s`, with ROTATED as the first argument: what it stands for is over. Its credential was
revoked; its device is inactive; or its credential gave way to newer ones, one of them was revoked, and none is left."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session of a key stands."""

    session_id: StoredSessionId
    epoch: int
    node_id: NodeId | None
    expiry: float
    expires_at: float | None
    forfeited: bool


@dataclass(frozen=True, slots=True)
class Announced:
    """Takings that begin a session: the number of each, and the nodes for which word was left."""

    numbers: Mapping[SessionKey, int]
    told: frozenset[NodeId]


@dataclass(slots=True)
class Locked:
    """A session whose row is held: what a batch counts on."""

    session_id: StoredSessionId
    key: SessionKey
    epoch: int
    node_id: NodeId | None
    expiry: float
    last_ordinal: int
    queued_messages: int
    queued_bytes: int


async def hold_device(connection: Connection, key: SessionKey) -> bool:
    """Keep the device from being deleted, as a session or a will that is added will do anyway; whether there is one.

    Before its sessions are held: who deletes it holds the device first, and its sessions then.
    """
    held = await connection.fetchval(
        "SELECT true FROM device WHERE tenant_id = $1 AND device_id = $2 FOR KEY SHARE", key.tenant_id, key.device_id
    )
    return held is not None


async def hold_of_device(connection: Connection, tenant_id: TenantId, device_id: DeviceId) -> None:
    """Hold a device's sessions, and its wills. Duty of the caller: hold the device."""
    for statement in (
        "SELECT FROM messaging_session WHERE tenant_id = $1 AND device_id = $2 ORDER BY session_id FOR UPDATE",
        "SELECT FROM messaging_will WHERE tenant_id = $1 AND device_id = $2 ORDER BY will_id FOR UPDATE",
    ):
        await connection.execute(statement, tenant_id, device_id)


async def find(connection: Connection, key: SessionKey) -> Place | None:
    """The session of a key, its row held."""
    row = await connection.fetchrow(
        f"""
        SELECT s.session_id, s.epoch, s.node_id, s.expiry, s.expires_at, ({FORFEITED}) AS forfeited
        FROM messaging_session s
        WHERE s.tenant_id = $2 AND s.device_id = $3 AND s.client_id = $4
        FOR NO KEY UPDATE OF s
        """,  # noqa: S608  # the condition is a constant of this file
        ROTATED,
        key.tenant_id,
        key.device_id,
        key.client_id,
    )
    return None if row is None else Place(**dict(row))


async def announce(connection: Connection, keys: Collection[SessionKey], node_id: NodeId) -> Announced:
    """Number the takings of those keys that have no session, and leave word of them for every other node."""
    rows = await connection.fetch(
        """
        WITH free AS (
            SELECT nextval('messaging_taking') AS number, tenant_id, device_id, client_id
            FROM unnest($1::uuid[], $2::uuid[], $3::text[]) AS u (tenant_id, device_id, client_id)
            WHERE NOT EXISTS (SELECT FROM messaging_session s
                              WHERE (s.tenant_id, s.device_id, s.client_id) = (u.tenant_id, u.device_id, u.client_id))
        ), told AS (
            INSERT INTO messaging_takeover (node_id, number, tenant_id, device_id, client_id)
            SELECT n.node_id, f.number, f.tenant_id, f.device_id, f.client_id
            FROM messaging_node n, free f WHERE n.node_id <> $4
            RETURNING node_id
        )
        SELECT number, tenant_id, device_id, client_id, ARRAY(SELECT DISTINCT node_id FROM told) AS told FROM free
        """,
        [key.tenant_id for key in keys],
        [key.device_id for key in keys],
        [key.client_id for key in keys],
        node_id,
    )
    return Announced(
        {SessionKey(row["tenant_id"], row["device_id"], row["client_id"]): row["number"] for row in rows},
        frozenset(rows[0]["told"] if rows else ()),
    )


async def lock(connection: Connection, sessions: Collection[StoredSessionId]) -> dict[StoredSessionId, Locked]:
    """Hold these sessions' rows; those that are gone are absent."""
    rows = await connection.fetch(
        """
        SELECT session_id, tenant_id, device_id, client_id, epoch, node_id, expiry, last_ordinal, queued_messages,
               queued_bytes
        FROM messaging_session WHERE session_id = ANY ($1::bigint[])
        ORDER BY session_id
        FOR NO KEY UPDATE
        """,
        list(sessions),
    )
    return {
        row["session_id"]: Locked(
            row["session_id"],
            SessionKey(row["tenant_id"], row["device_id"], row["client_id"]),
            row["epoch"],
            row["node_id"],
            row["expiry"],
            row["last_ordinal"],
            row["queued_messages"],
            row["queued_bytes"],
        )
        for row in rows
    }


async def count(connection: Connection, tenant_id: TenantId, device_id: DeviceId) -> int:
    """How many sessions that outlive their connections are stored for a device."""
    number: int = await connection.fetchval(
        "SELECT count(*) FROM messaging_session WHERE tenant_id = $1 AND device_id = $2 AND expiry > 0",
        tenant_id,
        device_id,
    )
    return number


async def insert(connection: Connection, opening: Opening, node_id: NodeId) -> StoredSessionId | None:
    """A new session, owned by a node with epoch 1; None when another transaction has just made one."""
    session_id: StoredSessionId | None = await connection.fetchval(
        """
        INSERT INTO messaging_session (tenant_id, device_id, client_id, credential_id, epoch, node_id, expiry)
        VALUES ($1, $2, $3, $4, 1, $5, $6)
        ON CONFLICT (tenant_id, device_id, client_id) DO NOTHING
        RETURNING session_id
        """,
        opening.key.tenant_id,
        opening.key.device_id,
        opening.key.client_id,
        opening.credential_id,
        node_id,
        opening.expiry,
    )
    return session_id


async def seize(
    connection: Connection, session_id: StoredSessionId, opening: Opening, node_id: NodeId
) -> tuple[int, int]:
    """Make a node the owner; the new epoch, and the number of this taking."""
    row = await connection.fetchrow(
        """
        UPDATE messaging_session
        SET epoch = epoch + 1, node_id = $2, credential_id = $3, expiry = $4, expires_at = NULL
        WHERE session_id = $1
        RETURNING epoch, nextval('messaging_taking') AS number
        """,
        session_id,
        node_id,
        opening.credential_id,
        opening.expiry,
    )
    assert row is not None, "the caller holds it"
    return row["epoch"], row["number"]


async def evict(
    connection: Connection, node_id: NodeId, ownership: Ownership, *, why: Eviction = Eviction.TAKEN
) -> None:
    """Leave word for an owner that it owns no more."""
    await connection.execute(
        """
        INSERT INTO messaging_eviction (node_id, session_id, epoch, full_queue, orphaned) VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT DO NOTHING
        """,
        node_id,
        ownership.session_id,
        ownership.epoch,
        why is Eviction.FULL,
        why is Eviction.LOST,
    )


@dataclass(frozen=True, slots=True)
class Word:
    """What was left for a node."""

    evicted: tuple[tuple[Ownership, Eviction], ...]
    taken: tuple[tuple[SessionKey, int], ...]
    """Connections that came elsewhere, each with the number of its taking."""


async def word_for(connection: Connection, node_id: NodeId) -> Word:
    """What word there is for a node, until `remove_word`: a reader that dies on the way reads it again."""
    rows = await connection.fetch(
        """
        SELECT session_id, epoch, full_queue, orphaned,
               NULL::bigint AS number, NULL::uuid AS tenant_id, NULL::uuid AS device_id, NULL::text AS client_id
        FROM messaging_eviction WHERE node_id = $1
        UNION ALL
        SELECT NULL, NULL, NULL, NULL, number, tenant_id, device_id, client_id
        FROM messaging_takeover WHERE node_id = $1
        """,
        node_id,
    )
    return Word(
        tuple((Ownership(r["session_id"], r["epoch"]), _why(r)) for r in rows if r["number"] is None),
        tuple(
            (SessionKey(r["tenant_id"], r["device_id"], r["client_id"]), r["number"])
            for r in rows
            if r["number"] is not None
        ),
    )


def _why(row: Record) -> Eviction:
    if row["full_queue"]:
        return Eviction.FULL
    return Eviction.LOST if row["orphaned"] else Eviction.TAKEN


async def remove_word(connection: Connection, node_id: NodeId, word: Word) -> None:
    """These were told."""
    await connection.execute(
        """
        WITH evicted AS (
            DELETE FROM messaging_eviction
            WHERE node_id = $1 AND (session_id, epoch) IN (SELECT * FROM unnest($2::bigint[], $3::bigint[]))
        )
        DELETE FROM messaging_takeover WHERE node_id = $1 AND number = ANY ($4::bigint[])
        """,
        node_id,
        [ownership.session_id for ownership, _ in word.evicted],
        [ownership.epoch for ownership, _ in word.evicted],
        [number for _, number in word.taken],
    )


async def load(connection: Connection, session_id: StoredSessionId, expiry: float, now: float) -> StoredSession:
    """What a session is, for its new owner: every row of its queue gets a packet id, those that expired unsent go.

    A packet id may stand in two rows after a crash: the owner gives an id again only when the older message is done,
    so the older row is a delivery whose end was not recorded any more, and goes.
    """
    incoming = await connection.fetch(
        "SELECT packet_id FROM messaging_incoming WHERE session_id = $1 ORDER BY packet_id", session_id
    )
    rows = await connection.fetch(
        """
        SELECT q.ordinal, q.message_id, q.qos AS granted, q.retain AS retained, q.identifiers, q.size, q.packet_id,
               q.released, m.topic, m.payload, m.qos, m.retain, m.properties, m.expires_at
        FROM messaging_queue q LEFT JOIN messaging_message m USING (message_id)
        WHERE q.session_id = $1
        ORDER BY q.ordinal
        """,
        session_id,
    )
    latest = {row["packet_id"]: row["ordinal"] for row in rows if row["packet_id"] is not None}
    gone = [row for row in rows if _is_over(row, latest, now)]
    over = {row["ordinal"] for row in gone}
    kept = [row for row in rows if row["ordinal"] not in over]
    ids = _packet_ids(kept)
    if gone:
        await remove_rows(connection, [(session_id, row["ordinal"]) for row in gone])
    await connection.execute(
        """
        UPDATE messaging_queue q SET packet_id = u.packet_id, waiting_for = NULL
        FROM unnest($2::bigint[], $3::integer[]) AS u (ordinal, packet_id)
        WHERE q.session_id = $1 AND q.ordinal = u.ordinal AND q.packet_id IS NULL
        """,
        session_id,
        [row["ordinal"] for row in kept],
        [ids[row["ordinal"]] for row in kept],
    )
    waiting = [row for row in kept if row["released"] is None]
    released = sorted((row for row in kept if row["released"] is not None), key=lambda row: int(row["released"]))
    return StoredSession(
        subscriptions=tuple(await routes.of_session(connection, session_id)),
        incoming=tuple(row["packet_id"] for row in incoming),
        outgoing=tuple(queued_of(row, ids[row["ordinal"]]) for row in [*waiting, *released]),
        expiry=expiry,
    )


def queued_of(row: Record, packet_id: int) -> QueuedMessage:
    """A queue row joined with its message."""
    return QueuedMessage(
        ordinal=row["ordinal"],
        packet_id=packet_id,
        qos=row["granted"],
        retain=row["retained"],
        subscription_identifiers=tuple(row["identifiers"] or ()),
        message=message_of(row),
        fresh=row["packet_id"] is None,
        released=row["released"] is not None,
    )


def message_of(row: Record) -> Message:
    """The message in a row that has its columns."""
    return Message(row["topic"], row["payload"], row["qos"], row["retain"], row["properties"], row["expires_at"])


async def remove_rows(connection: Connection, rows: Sequence[tuple[StoredSessionId, int]]) -> int:
    """Delete queue rows (session, ordinal) of sessions that the caller holds, what they count for, and bodies that
    nobody needs any more; how many rows there were."""
    removed = await connection.fetch(
        """
        WITH gone AS (
            DELETE FROM messaging_queue q
            USING unnest($1::bigint[], $2::bigint[]) AS u (session_id, ordinal)
            WHERE q.session_id = u.session_id AND q.ordinal = u.ordinal
            RETURNING q.session_id, q.message_id, q.size
        ), counted AS (
            UPDATE messaging_session s
            SET queued_messages = s.queued_messages - g.messages, queued_bytes = s.queued_bytes - g.bytes
            FROM (SELECT session_id, count(*) AS messages, sum(size) AS bytes FROM gone GROUP BY session_id) AS g
            WHERE s.session_id = g.session_id
        )
        SELECT message_id FROM gone
        """,
        [session_id for session_id, _ in rows],
        [ordinal for _, ordinal in rows],
    )
    if removed:
        await remove_bodies(connection, list({row["message_id"] for row in removed}))
    return len(removed)


async def remove_bodies(connection: Connection, message_ids: Sequence[UUID]) -> None:
    """Delete those of these messages that no row names. Two transactions that delete the last two rows at the same time
    both leave it; the sweep finds it."""
    await connection.execute(
        """
        DELETE FROM messaging_message m
        WHERE m.message_id = ANY ($1::uuid[])
          AND NOT EXISTS (SELECT FROM messaging_queue q WHERE q.message_id = m.message_id)
          AND NOT EXISTS (SELECT FROM messaging_relay r WHERE r.message_id = m.message_id)
        """,
        message_ids,
    )


async def let_go(
    connection: Connection, session_id: StoredSessionId, expiry: float, now: float, unsent: Sequence[int]
) -> None:
    """Nobody serves it any more: its expiry runs. Rows of `unsent` lose their packet ids: they were never sent."""
    await connection.execute(
        "UPDATE messaging_session SET node_id = NULL, expiry = $2, expires_at = $3 WHERE session_id = $1",
        session_id,
        expiry,
        now + expiry,
    )
    await connection.execute(
        """
        UPDATE messaging_queue
        SET waiting_for = NULL,
            packet_id = CASE WHEN ordinal = ANY ($2::bigint[]) AND released IS NULL THEN NULL ELSE packet_id END
        WHERE session_id = $1 AND (waiting_for IS NOT NULL OR ordinal = ANY ($2::bigint[]))
        """,
        session_id,
        list(unsent),
    )


async def remove(connection: Connection, sessions: Mapping[StoredSessionId, TenantId]) -> bool:
    """End sessions that the caller holds; whether any had routes. Bodies that lose their last row are swept later."""
    if not sessions:
        return False
    routed = await routes.remove_sessions(connection, sessions)
    await connection.execute("DELETE FROM messaging_session WHERE session_id = ANY ($1::bigint[])", list(sessions))
    return routed


async def forfeited(
    connection: Connection, devices: Collection[DeviceId] | None, limit: int
) -> list[tuple[StoredSessionId, TenantId, NodeId | None, int]]:
    """Sessions, of these devices or of all, whose credential was revoked or whose device is inactive; held."""
    rows = await connection.fetch(
        f"""
        SELECT s.session_id, s.tenant_id, s.node_id, s.epoch
        FROM messaging_session s
        WHERE ($2::uuid[] IS NULL OR s.device_id = ANY ($2)) AND ({FORFEITED})
        ORDER BY s.session_id
        LIMIT $3
        FOR UPDATE OF s
        """,  # noqa: S608  # the condition is a constant of this file
        ROTATED,
        None if devices is None else list(devices),
        limit,
    )
    return [(row["session_id"], row["tenant_id"], row["node_id"], row["epoch"]) for row in rows]


async def expired(connection: Connection, now: float, limit: int) -> dict[StoredSessionId, TenantId]:
    """Sessions whose time is over, held; those that somebody else holds are left to him."""
    rows = await connection.fetch(
        """
        SELECT session_id, tenant_id FROM messaging_session
        WHERE expires_at <= $1 AND node_id IS NULL
        ORDER BY session_id
        LIMIT $2
        FOR UPDATE SKIP LOCKED
        """,
        now,
        limit,
    )
    return {row["session_id"]: row["tenant_id"] for row in rows}


async def orphan(connection: Connection, node_id: NodeId, now: float, limit: int) -> int:
    """Take sessions from a node that died: nobody owns them, their expiry and their wills' delays run; how many.

    Word is left, for the case that it was only cut off.
    """
    rows = await connection.fetch(
        """
        SELECT session_id, epoch FROM messaging_session WHERE node_id = $1
        ORDER BY session_id LIMIT $2 FOR NO KEY UPDATE
        """,
        node_id,
        limit,
    )
    if not rows:
        return 0
    sessions = [row["session_id"] for row in rows]
    await connection.execute(
        """
        UPDATE messaging_session
        SET node_id = NULL, epoch = epoch + 1, expires_at = $2 + expiry
        WHERE session_id = ANY ($1::bigint[])
        """,
        sessions,
        now,
    )
    await connection.execute(
        """
        INSERT INTO messaging_eviction (node_id, session_id, epoch, orphaned)
        SELECT $1, *, true FROM unnest($2::bigint[], $3::bigint[]) ON CONFLICT DO NOTHING
        """,
        node_id,
        sessions,
        [row["epoch"] for row in rows],
    )
    await connection.execute(
        "UPDATE messaging_queue SET waiting_for = NULL WHERE waiting_for = $2 AND session_id = ANY ($1::bigint[])",
        sessions,
        node_id,
    )
    await connection.execute(
        """
        UPDATE messaging_will w SET due_at = $2 + least(w.delay, s.expiry)
        FROM messaging_session s
        WHERE w.session_id = s.session_id AND w.due_at IS NULL AND s.session_id = ANY ($1::bigint[])
          AND w.will_id = ANY (ARRAY (
              SELECT will_id FROM messaging_will WHERE session_id = ANY ($1::bigint[]) ORDER BY will_id FOR UPDATE))
        """,
        sessions,
        now,
    )
    return len(rows)


# Wills.


async def arm_will(connection: Connection, session_id: StoredSessionId, opening: Opening, will: StoredWill) -> None:
    """Keep a will while its connection lives. There is none for this session."""
    await connection.execute(
        """
        INSERT INTO messaging_will (session_id, tenant_id, device_id, credential_id, delay, expires_after, topic,
                                    payload, qos, retain, properties)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
        """,
        session_id,
        opening.key.tenant_id,
        opening.key.device_id,
        opening.credential_id,
        will.delay,
        will.expires_after,
        will.message.topic,
        will.message.payload,
        will.message.qos,
        will.message.retain,
        will.message.properties,
    )


async def trigger_will(connection: Connection, session_id: StoredSessionId, now: float, expiry: float) -> None:
    """The connection is gone without a goodbye: the will's delay runs, at most as long as the session lasts."""
    await connection.execute(
        "UPDATE messaging_will SET due_at = $2 + least(delay, $3) WHERE session_id = $1 AND due_at IS NULL",
        session_id,
        now,
        expiry,
    )


async def resume_without_will(connection: Connection, session_id: StoredSessionId, now: float) -> None:
    """The client is back. A will that was due, or has no delay (its connection was taken over), stands alone from now
    on; one that was delayed is dropped."""
    await connection.execute(
        """
        UPDATE messaging_will SET session_id = NULL, due_at = least(coalesce(due_at, $2), $2)
        WHERE session_id = $1 AND (due_at <= $2 OR (due_at IS NULL AND delay <= 0))
        """,
        session_id,
        now,
    )
    await drop_wills(connection, [session_id])


async def finish_wills(connection: Connection, sessions: Collection[StoredSessionId], now: float) -> None:
    """The sessions end, and their wills are due with them."""
    await connection.execute(
        """
        UPDATE messaging_will SET session_id = NULL, due_at = least(coalesce(due_at, $2), $2)
        WHERE session_id = ANY ($1::bigint[]) AND will_id = ANY (ARRAY (
            SELECT will_id FROM messaging_will WHERE session_id = ANY ($1::bigint[]) ORDER BY will_id FOR UPDATE))
        """,
        list(sessions),
        now,
    )


async def drop_wills(connection: Connection, sessions: Collection[StoredSessionId]) -> None:
    """Forget wills, unpublished."""
    await connection.execute(
        """
        DELETE FROM messaging_will
        WHERE session_id = ANY ($1::bigint[]) AND will_id = ANY (ARRAY (
            SELECT will_id FROM messaging_will WHERE session_id = ANY ($1::bigint[]) ORDER BY will_id FOR UPDATE))
        """,
        list(sessions),
    )


async def due_wills(connection: Connection, now: float, limit: int) -> list[Record]:
    """Wills whose time has come, the oldest first; those that were forfeited meanwhile are dropped, however their
    sessions ended. Fewer than `limit` are all there are."""
    while await connection.fetch(
        f"""
        DELETE FROM messaging_will WHERE will_id IN (
            SELECT s.will_id FROM messaging_will s
            JOIN (SELECT will_id FROM messaging_will WHERE due_at <= $2 ORDER BY due_at, will_id LIMIT $3) AS page
                USING (will_id)
            WHERE {FORFEITED}
            ORDER BY s.will_id
            FOR UPDATE OF s SKIP LOCKED
        )
        RETURNING will_id
        """,  # noqa: S608  # the condition is a constant of this file
        ROTATED,
        now,
        limit,
    ):
        pass
    rows: list[Record] = await connection.fetch(
        """
        SELECT will_id, tenant_id, device_id, expires_after, topic, payload, qos, retain, properties
        FROM messaging_will WHERE due_at <= $1 ORDER BY due_at, will_id LIMIT $2
        """,
        now,
        limit,
    )
    return rows


async def postpone_will(connection: Connection, will_id: int, until: float) -> None:
    """It could not be published now; try again later. It was due, so it stands alone from now on: its client comes back
    too late to take it back."""
    await connection.execute(
        "UPDATE messaging_will SET due_at = $2, session_id = NULL WHERE will_id = $1", will_id, until
    )


def _is_over(row: Record, latest: Mapping[int, int], now: float) -> bool:
    if row["topic"] is None:  # no body: cannot be, and must not stop the session from being served
        return True
    if row["packet_id"] is not None:
        return bool(latest[row["packet_id"]] != row["ordinal"])
    return bool(row["expires_at"] is not None and row["expires_at"] <= now)


def _packet_ids(rows: Sequence[Record]) -> dict[int, int]:
    """Packet ids by ordinal: those that there are, and new ones behind the last of them."""
    used = {row["packet_id"] for row in rows if row["packet_id"] is not None}
    ids: dict[int, int] = {}
    last = 0
    for row in rows:
        if row["packet_id"] is not None:
            last = row["packet_id"]
            ids[row["ordinal"]] = last
    for row in rows:
        if row["packet_id"] is not None:
            continue
        last = last % 0xFFFF + 1
        while last in used:
            last = last % 0xFFFF + 1
        used.add(last)
        ids[row["ordinal"]] = last
    return ids
