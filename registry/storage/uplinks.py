"""Uplinks and readings in SQL: a batch goes in with one statement, which is its own transaction.

What the statement does, in PostgreSQL's order of effects:

    1. `won`     claims (device_id, message_id) for every uplink that has one. A key that another transaction is about
                 to claim is waited for; one that is taken is passed over. Keys are claimed in one global order, so two
                 nodes cannot wait for each other.
    2. `stored`  inserts the uplinks that have no key or won theirs.
    3. `measured` inserts their readings.

It answers the uplinks that won. Who lost is looked up afterwards, in a new snapshot, in which the winner is committed.

Uplinks that came under a QoS 2 packet id of a stored session go in with `insert_received`: the session's row is held
until the commit, so the id is recorded by the session's present owner only, and whoever takes the session next finds
both the uplink and the id, or neither.

Failures are told apart by what they say about the outcome, see `insert`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from uuid import UUID

import asyncpg
from asyncpg import Record
from asyncpg.pgproto import pgproto

from registry.messaging_values import StoredSessionId
from registry.model import DeviceId, TenantId, UplinkId
from registry.payloads import NewUplink
from registry.storage import messaging, messaging_sessions, partitions
from registry.storage.database import Connection

Row = tuple[UplinkId, NewUplink]
_Value = TypeVar("_Value")

BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
END = datetime(9999, 1, 1, tzinfo=UTC)
"""Bounds for "no bound": a plain range keeps PostgreSQL's partition pruning, which `$1 IS NULL OR …` would lose."""
LAST_UUID = UUID(int=2**128 - 1)
MAX_BATCH = 4096
"""Uplinks in one batch: the twelve bits of an id that count within it."""

_DATA_CLASSES = frozenset({"22", "23", "54"})
"""SQLSTATE classes that blame a row: data exception, integrity constraint, program limit."""
_OUTCOME_UNKNOWN = "40003"
"""statement_completion_unknown, the one of its class that does not say that nothing happened."""


class RowsRefused(Exception):
    """At least one row cannot be stored as it is. Nothing of the batch was stored."""


class PartitionMissing(Exception):
    """There is no partition for the database's today. Nothing of the batch was stored."""


class RolledBack(Exception):
    """PostgreSQL chose to roll back (a deadlock). Nothing of the batch was stored; it may be tried again."""


@dataclass(frozen=True, slots=True)
class Window:
    """Which rows of a device: from `since` up to, not including, `until`, and behind the last one shown."""

    since: datetime
    until: datetime
    limit: int


def new_ids(count: int, milliseconds: int, random: Callable[[int], bytes]) -> list[UplinkId]:
    """`count` (at most `MAX_BATCH`) new ids in ascending order. `milliseconds` since 1970; `random(n)` gives n bytes.

    UUID version 7 (RFC 9562 §5.7) with a counter in rand_a (§6.2, method 1) and 62 random bits, not meant as a secret.
    """
    assert count <= MAX_BATCH
    first = (milliseconds & 0xFFFF_FFFF_FFFF) << 80 | 0x7 << 76 | 0x2 << 62  # the time, the version, the variant
    tails = struct.unpack(f">{count}Q", random(8 * count))
    # asyncpg's own UUID class: made from bytes in a fifth of the time, and encoded without a detour.
    return [
        UplinkId(pgproto.UUID((first | place << 64 | tail & 0x3FFF_FFFF_FFFF_FFFF).to_bytes(16, "big")))
        for place, tail in enumerate(tails)
    ]


async def insert(connection: Connection, rows: Sequence[Row]) -> set[UplinkId]:
    """Store a batch, all or nothing; the ids of the uplinks that won their message id. Commits by itself.

    Raises RowsRefused, PartitionMissing or RolledBack: nothing was stored. Any other failure leaves the outcome open.
    """
    try:
        won = await connection.fetch(_INSERT, *_uplink_columns(rows), *_message_columns(rows), *_reading_columns(rows))
    except asyncpg.CheckViolationError as error:
        # A row without a partition is reported as a violated check that has no name.
        if error.constraint_name is None and error.table_name in partitions.PARENTS:
            raise PartitionMissing from error
        raise RowsRefused from error
    except asyncpg.PostgresError as error:
        state = error.sqlstate or ""
        if state[:2] in _DATA_CLASSES:
            raise RowsRefused from error
        if state[:2] == "40" and state != _OUTCOME_UNKNOWN:
            raise RolledBack from error
        raise
    except ValueError as error:  # a value that has no encoding; nothing was sent
        raise RowsRefused from error
    return {row["uplink_id"] for row in won}


@dataclass(frozen=True, slots=True)
class Received:
    """What became of a batch: who won their message id, who was stored before under its packet id, and whose session
    belongs to somebody else now or is gone. Of the last two nothing was stored."""

    won: set[UplinkId]
    repeated: frozenset[UplinkId] = frozenset()
    strangers: frozenset[UplinkId] = frozenset()

    @property
    def untouched(self) -> frozenset[UplinkId]:
        """Those of which nothing was stored now."""
        return self.repeated | self.strangers


async def insert_received(connection: Connection, rows: Sequence[Row]) -> Received:
    """Store a batch with the packet ids of its origins, in the caller's transaction. Raises as `insert`."""
    origins = {uplink_id: u.origin for uplink_id, u in rows if u.origin is not None}
    held = await messaging_sessions.lock(connection, {o.ownership.session_id for o in origins.values()})
    places = [(o.ownership.session_id, o.packet_id) for o in origins.values()]
    known = await messaging.known_incoming(connection, places)
    repeated: set[UplinkId] = set()
    strangers: set[UplinkId] = set()
    fresh: list[tuple[StoredSessionId, int]] = []
    for uplink_id, origin in origins.items():
        session = held.get(origin.ownership.session_id)
        place = origin.ownership.session_id, origin.packet_id
        if session is None or session.epoch != origin.ownership.epoch:
            strangers.add(uplink_id)
        elif place in known:
            repeated.add(uplink_id)
        else:
            known.add(place)
            fresh.append(place)
    await messaging.remember_incoming(connection, fresh)
    won = await insert(connection, [row for row in rows if row[0] not in repeated and row[0] not in strangers])
    return Received(won, frozenset(repeated), frozenset(strangers))


# An array may be shorter than the others, and `unnest` fills it up by NULL: one without elements where the column is
# NULL throughout; one with a single element where all rows have that value. The second is read by its cardinality, so
# that a NULL never takes another row's value. A reading names its uplink by its place in the batch, from 1.
_INSERT = """
WITH won AS (
    INSERT INTO uplink_message (device_id, message_id, uplink_id, received_at)
    SELECT device_id, message_id, uplink_id, now()
    FROM unnest($10::uuid[], $11::text[], $12::uuid[])
         WITH ORDINALITY AS m (device_id, message_id, uplink_id, place)
    ORDER BY device_id, message_id COLLATE "C", place
    ON CONFLICT (device_id, message_id) DO NOTHING
    RETURNING uplink_id
), stored AS (
    INSERT INTO uplink (uplink_id, tenant_id, device_id, kind, payload, message_id, observed_at, received_at,
                        transport, via)
    SELECT uplink_id,
           CASE cardinality($2::uuid[]) WHEN 1 THEN ($2::uuid[])[1] ELSE tenant_id END,
           CASE cardinality($3::uuid[]) WHEN 1 THEN ($3::uuid[])[1] ELSE device_id END,
           CASE cardinality($4::text[]) WHEN 1 THEN ($4::text[])[1] ELSE kind END,
           payload::json, message_id, observed_at, now(),
           CASE cardinality($8::text[]) WHEN 1 THEN ($8::text[])[1] ELSE transport END,
           via
    FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::timestamptz[],
                $8::text[], $9::uuid[])
         AS u (uplink_id, tenant_id, device_id, kind, payload, message_id, observed_at, transport, via)
    WHERE message_id IS NULL OR uplink_id IN (SELECT uplink_id FROM won)
), measured AS (
    INSERT INTO reading (tenant_id, device_id, component, sensor, observed_at, received_at, uplink_id, ordinal,
                         number, "integer", "boolean", "text")
    SELECT ($2::uuid[])[least(place, cardinality($2::uuid[]))],
           ($3::uuid[])[least(place, cardinality($3::uuid[]))],
           CASE cardinality($16::text[]) WHEN 1 THEN ($16::text[])[1] ELSE component END,
           CASE cardinality($17::text[]) WHEN 1 THEN ($17::text[])[1] ELSE sensor END,
           coalesce(observed_at, now()), now(), ($1::uuid[])[place],
           CASE cardinality($15::smallint[]) WHEN 1 THEN ($15::smallint[])[1] ELSE ordinal END,
           number, "integer", "boolean", "text"
    FROM unnest($13::smallint[], $14::boolean[], $15::smallint[], $16::text[], $17::text[], $18::timestamptz[],
                $19::float8[], $20::bigint[], $21::boolean[], $22::text[])
         AS r (place, named, ordinal, component, sensor, observed_at, number, "integer", "boolean", "text")
    WHERE named IS NULL OR ($1::uuid[])[place] IN (SELECT uplink_id FROM won)
)
SELECT uplink_id FROM won
"""


def _uplink_columns(rows: Sequence[Row]) -> tuple[Sequence[object], ...]:
    uplinks = [u for _, u in rows]
    return (
        [i for i, _ in rows],
        _once([u.tenant_id for u in uplinks]),
        _once([u.device_id for u in uplinks]),
        _once([u.kind for u in uplinks]),
        [u.payload for u in uplinks],
        _unless_empty([u.message_id for u in uplinks]),
        _unless_empty([u.observed_at for u in uplinks]),
        [transport.value for transport in _once([u.transport for u in uplinks])],
        _unless_empty([u.via for u in uplinks]),
    )


def _unless_empty(column: Sequence[_Value]) -> Sequence[_Value]:
    """The column, or none of it where it is all NULL: asyncpg looks at every element of an array several times."""
    return [] if column.count(None) == len(column) else column


def _once(column: Sequence[_Value]) -> Sequence[_Value]:
    """The column, or one element of it where all are the same; not for columns that `_unless_empty` may shorten."""
    # The last one first: where they differ, it mostly does, too.
    same = bool(column) and column[0] == column[-1] and column.count(column[0]) == len(column)
    return column[:1] if same else column


def _message_columns(rows: Sequence[Row]) -> tuple[list[object], ...]:
    named = [row for row in rows if row[1].message_id is not None]
    return [u.device_id for _, u in named], [u.message_id for _, u in named], [i for i, _ in named]


def _reading_columns(rows: Sequence[Row]) -> tuple[Sequence[object], ...]:
    owned = [(place, u) for place, (_, u) in enumerate(rows, 1) for _ in u.readings]
    readings = [r for _, u in rows for r in u.readings]
    values = [r.value for r in readings]
    kinds = [type(value) for value in values]
    return (
        [place for place, _ in owned],
        _unless_empty([None if u.message_id is None else True for _, u in owned]),
        _once([ordinal for _, u in rows for ordinal in range(len(u.readings))]),
        _once([r.component for r in readings]),
        _once([r.sensor for r in readings]),
        _unless_empty([r.observed_at or u.observed_at for r, (_, u) in zip(readings, owned, strict=True)]),
        *[_of_kind(wanted, values, kinds) for wanted in (float, int, bool, str)],
    )


def _of_kind(wanted: type, values: Sequence[object], kinds: Sequence[type]) -> Sequence[object]:
    """The column of the values of one type; empty where there is none."""
    count = kinds.count(wanted)
    if count in (0, len(kinds)):
        return values if count else []
    return [value if kind is wanted else None for value, kind in zip(values, kinds, strict=True)]


async def winners(connection: Connection, keys: Sequence[tuple[DeviceId, str]]) -> dict[tuple[DeviceId, str], UplinkId]:
    """The uplinks that hold these (device_id, message_id); a key that nobody holds is absent."""
    rows = await connection.fetch(
        """
        SELECT device_id, message_id, uplink_id
        FROM unnest($1::uuid[], $2::text[]) AS k (device_id, message_id)
        JOIN uplink_message USING (device_id, message_id)
        """,
        [device_id for device_id, _ in keys],
        [message_id for _, message_id in keys],
    )
    return {(row["device_id"], row["message_id"]): row["uplink_id"] for row in rows}


async def make_todays_partitions(connection: Connection) -> list[str]:
    """Today's and tomorrow's, by the database's clock; the names of the new ones. Raises Unavailable."""
    today = await partitions.today(connection)
    return await partitions.ensure(connection, [today, today + timedelta(days=1)])


# What follows is prepared anew each time, and so is planned for its values. The plan for any values, which PostgreSQL
# turns to for a statement that it has seen five times, takes the bounds for narrow and sorts all that a device has.


async def read_uplinks(
    connection: Connection,
    tenant_id: TenantId,
    device_id: DeviceId,
    kind: str | None,
    window: Window,
    behind: tuple[datetime, UUID],
) -> list[Record]:
    """Uplinks of one device received in the window, newest first, behind (received_at, uplink_id)."""
    statement = await connection.prepare(
        """
        SELECT uplink_id, kind, payload::text AS payload, message_id, observed_at, received_at, transport, via
        FROM uplink
        WHERE tenant_id = $1 AND device_id = $2 AND ($3::text IS NULL OR kind = $3)
          AND received_at >= $4 AND received_at < $5
          AND received_at <= $6 AND (received_at, uplink_id) < ($6, $7)
        ORDER BY received_at DESC, uplink_id DESC
        LIMIT $8
        """
    )
    return await statement.fetch(tenant_id, device_id, kind, window.since, window.until, *behind, window.limit)


async def read_readings(
    connection: Connection,
    tenant_id: TenantId,
    device_id: DeviceId,
    component: str | None,
    sensor: str | None,
    window: Window,
    behind: tuple[datetime, UUID, int],
) -> list[Record]:
    """Readings of one device observed in the window, newest first, behind (observed_at, uplink_id, ordinal)."""
    statement = await connection.prepare(
        _READINGS_OF_SENSOR if component is not None and sensor is not None else _READINGS
    )
    return await statement.fetch(
        tenant_id, device_id, component, sensor, window.since, window.until, *behind, window.limit
    )


def _readings_where(condition: str) -> str:
    return f"""
        SELECT component, sensor, observed_at, received_at, uplink_id, ordinal, number, "integer", "boolean", "text"
        FROM reading
        WHERE tenant_id = $1 AND device_id = $2 AND {condition}
          AND observed_at >= $5 AND observed_at < $6
          AND observed_at <= $7 AND (observed_at, uplink_id, ordinal) < ($7, $8, $9::bigint)
        ORDER BY observed_at DESC, uplink_id DESC, ordinal DESC
        LIMIT $10
    """  # noqa: S608  # the conditions are the two below


# Two statements, because each has an index of its own.
_READINGS = _readings_where("($3::text IS NULL OR component = $3) AND ($4::text IS NULL OR sensor = $4)")
_READINGS_OF_SENSOR = _readings_where("component = $3 AND sensor = $4")
