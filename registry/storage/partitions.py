"""Daily partitions of `uplink` and `reading`: made ahead, dropped whole.

    (nothing) ──ensure──► attached ──detach──► detaching ──► loose table ──drop──► (nothing)
                                                  │ interrupted: the next run finishes it

A partition is a table `<parent>_<yyyymmdd>` that holds the rows received on that day, UTC, by the database's clock.

Invariants
- Writers are never held up for long. A partition is made as a table of its own and then attached, and it is detached
  concurrently: both take SHARE UPDATE EXCLUSIVE on the parent, which writers do not conflict with. (CREATE TABLE …
  PARTITION OF and a plain DETACH or DROP would lock the parent against everybody.)
- Every statement that waits for a lock gives up after a lock timeout of the caller's; what was begun is finished by a
  later run, found by its name.
- One node at a time: making waits for the advisory lock, dropping passes if another node has it.

What can race: two nodes that make the same day (the second finds it), making against dropping (the same lock), a
crash in the middle of a detach (PostgreSQL marks the partition as pending; `drop` finalises it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

import asyncpg

from registry.errors import Unavailable
from registry.storage.database import Connection

PARENTS = ("uplink", "reading")
LOCK = 0x6761_7465_7061_7274
"""The advisory lock of partitions: the ASCII of "gatepart"."""
MAKE_LOCK_SECONDS = 5.0
"""How long making a partition waits for a lock; another node's making takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A day's table. `attached` is false for one whose dropping was interrupted after the detach."""

    parent: str
    day: date
    attached: bool
    pending: bool
    """Its concurrent detach was interrupted and waits to be finalised."""

    @property
    def name(self) -> str:
        return table_name(self.parent, self.day)


def table_name(parent: str, day: date) -> str:
    """The table that holds `parent`'s rows of `day`."""
    return f"{parent}_{day:%Y%m%d}"


def first_moment(day: date) -> datetime:
    """When a day begins, UTC."""
    return datetime.combine(day, time(), UTC)


async def today(connection: Connection) -> date:
    """The day that the database's clock shows, UTC."""
    day: date = await connection.fetchval("SELECT (now() AT TIME ZONE 'UTC')::date")
    return day


async def ensure(connection: Connection, days: Sequence[date]) -> list[str]:
    """Make the partitions of `days` that are missing, all or none; the names of the new ones.

    Safe with several nodes at once. Raises Unavailable if a lock is not to be had within `MAKE_LOCK_SECONDS`.
    """
    wanted = {table_name(parent, day): (parent, day) for parent in PARENTS for day in days}
    if not set(wanted) - await _attached(connection, list(wanted)):
        return []
    try:
        async with connection.transaction():
            await _set_lock_timeout(connection, MAKE_LOCK_SECONDS)
            await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
            missing = sorted(set(wanted) - await _attached(connection, list(wanted)))
            for name in missing:
                await _make(connection, name, *wanted[name])
    except asyncpg.LockNotAvailableError as error:
        raise Unavailable("the partitions of uplinks are locked") from error
    return missing


async def listing(connection: Connection) -> list[Partition]:
    """All partitions, oldest first, with those that an interrupted drop left behind."""
    rows = await connection.fetch(
        """
        SELECT p.parent, to_date(right(c.relname, 8), 'YYYYMMDD') AS day,
               i.inhrelid IS NOT NULL AS attached, coalesce(i.inhdetachpending, false) AS pending
        FROM unnest($1::text[]) AS p (parent)
        JOIN pg_class c ON c.relname ~ ('^' || p.parent || '_[0-9]{8}$') AND c.relkind = 'r'
                       AND c.relnamespace = current_schema()::regnamespace
        LEFT JOIN pg_inherits i ON i.inhrelid = c.oid
        ORDER BY day, p.parent
        """,
        list(PARENTS),
    )
    return [Partition(row["parent"], row["day"], row["attached"], row["pending"]) for row in rows]


async def drop_before(connection: Connection, oldest_kept: date, *, lock_seconds: float) -> tuple[list[str], list[str]]:
    """Drop the partitions of days before `oldest_kept`; the names of the dropped, and of those still locked.

    The connection must not be in a transaction. Passes (nothing dropped, nothing locked) while another node is at it.
    A partition that is still locked after `lock_seconds`, or that a view is of, is left for the next call.
    """
    if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
        return [], []
    dropped, locked = [], []
    blocked: set[str] = set()
    try:
        await connection.execute("SELECT set_config('lock_timeout', $1, false)", f"{int(lock_seconds * 1000)}ms")
        for partition in await listing(connection):
            if partition.day >= oldest_kept:
                break
            if partition.parent in blocked:  # a table has at most one partition whose detaching is under way
                locked.append(partition.name)
                continue
            try:
                await _drop(connection, partition)
            except (asyncpg.LockNotAvailableError, asyncpg.ObjectNotInPrerequisiteStateError):
                locked.append(partition.name)
                blocked.add(partition.parent)
            except asyncpg.DependentObjectsStillExistError:  # somebody's view of that day; the others go all the same
                locked.append(partition.name)
            else:
                dropped.append(partition.name)
    finally:
        await connection.execute("RESET lock_timeout")
        await connection.execute("SELECT pg_advisory_unlock($1)", LOCK)
    return dropped, locked


async def _drop(connection: Connection, partition: Partition) -> None:
    # The names are built from PARENTS and a date, never from input.
    if partition.pending:
        await connection.execute(f"ALTER TABLE {partition.parent} DETACH PARTITION {partition.name} FINALIZE")
    elif partition.attached:
        await connection.execute(f"ALTER TABLE {partition.parent} DETACH PARTITION {partition.name} CONCURRENTLY")
    await connection.execute(f"DROP TABLE {partition.name}")


async def _make(connection: Connection, name: str, parent: str, day: date) -> None:
    # A loose table of that name is a day whose dropping was interrupted, and which is wanted again: it is attached as
    # it is, with its rows.
    start, end = first_moment(day), first_moment(day + timedelta(days=1))
    await connection.execute(f"CREATE TABLE IF NOT EXISTS {name} (LIKE {parent} INCLUDING ALL EXCLUDING INDEXES)")
    await connection.execute(
        f"ALTER TABLE {parent} ATTACH PARTITION {name} FOR VALUES FROM ('{start.isoformat()}') TO ('{end.isoformat()}')"
    )


async def _attached(connection: Connection, names: list[str]) -> set[str]:
    rows = await connection.fetch(
        """
        SELECT c.relname FROM pg_class c JOIN pg_inherits i ON i.inhrelid = c.oid
        WHERE c.relname = ANY($1::text[]) AND c.relnamespace = current_schema()::regnamespace
          AND NOT i.inhdetachpending
        """,
        names,
    )
    return {row["relname"] for row in rows}


async def _set_lock_timeout(connection: Connection, seconds: float) -> None:
    await connection.execute("SELECT set_config('lock_timeout', $1, true)", f"{int(seconds * 1000)}ms")
