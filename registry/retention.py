"""What is kept for how long, and partitions made before they are needed.

    run_once:  make today … +7 days ──► drop old days whole ──► delete old rows elsewhere, in chunks

Every step may be repeated, interrupted at any point, and run on several nodes at once: making waits for the other
node, dropping passes, and deleting the same rows twice deletes them once. What is left over is the next run's.

"Old" is judged by the earlier of the node's clock and the database's: a node whose clock runs ahead must not delete
what others still want. Rows leave later, never sooner, than configured: a day goes when all of it is past its time.

What can be lost: an uplink's message id goes with its day, so a repetition that comes later than the retention is a
new uplink. A reader of events whose cursor is older than `event_days` misses what was deleted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

from registry.storage import partitions, pruning
from registry.storage.database import Connection, Database
from registry.storage.pruning import Prunable

DAYS_AHEAD = 7
"""A node may sleep, or its retention fail, for a week before an uplink meets a day without a partition. (It would
then be made on the spot; the days ahead only keep that off the hot path.)"""
TEARDOWN_REPORT_AGE = timedelta(days=1)
"""Reports serve the answer to a revocation, which waits for seconds."""
LOCK_SECONDS = 2.0
"""How long dropping a day waits for whoever still reads it; the next run tries again."""
CHUNK_ROWS = 5000
"""Rows deleted in one transaction: some tens of milliseconds, no long locks and no burst of WAL."""
MAX_CHUNKS = 2000
"""Chunks of one table in one run; ten million rows in an hour keep ahead of any node that fills them."""


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """Days to keep; 0 keeps for ever."""

    retention_days: int = 90
    """Uplinks, readings and message ids."""
    event_days: int = 90
    """Events, and commands from when they were finished."""
    audit_days: int = 0


@dataclass(frozen=True, slots=True)
class RetentionReport:
    """What a run did, for the log."""

    made: list[str]
    dropped: list[str]
    locked: list[str]
    """Days that somebody is still reading; left for the next run."""
    deleted: dict[str, int] = field(default_factory=dict)
    """Rows by table, where there were any."""


class Retention:
    """Keeps the tables that grow within their bounds. edge runs it at the start and every hour."""

    def __init__(
        self,
        database: Database,
        settings: RetentionSettings,
        *,
        chunk_rows: int = CHUNK_ROWS,
        lock_seconds: float = LOCK_SECONDS,
    ) -> None:
        self._database = database
        self._settings = settings
        self._chunk_rows = chunk_rows
        self._lock_seconds = lock_seconds

    async def make_partitions(self) -> list[str]:
        """Make the partitions of today and the days ahead; the names of the new ones. Raises Unavailable.

        To be awaited once before the node takes uplinks.
        """
        async with self._database.connection() as connection:
            today = await partitions.today(connection)
            return await partitions.ensure(connection, [today + timedelta(days=n) for n in range(DAYS_AHEAD + 1)])

    async def run_once(self, now: datetime) -> RetentionReport:
        """Make, drop and delete what is due at `now`. Raises Unavailable; the next run goes on where this one ended."""
        made = await self.make_partitions()
        async with self._database.connection() as connection:
            now = min(now, await pruning.clock(connection))
            dropped, locked = await self._drop_days(connection, now)
        deleted = {}
        for what, before in self._due(now):
            count = await self._delete(what, before)
            if count:
                deleted[what.value] = count
        return RetentionReport(made, dropped, locked, deleted)

    async def _drop_days(self, connection: Connection, now: datetime) -> tuple[list[str], list[str]]:
        if self._settings.retention_days == 0:
            return [], []
        return await partitions.drop_before(connection, self._oldest_kept(now), lock_seconds=self._lock_seconds)

    def _oldest_kept(self, now: datetime) -> date:
        return (now - timedelta(days=self._settings.retention_days)).astimezone(UTC).date()

    def _due(self, now: datetime) -> list[tuple[Prunable, datetime]]:
        """Which tables lose rows from before which moment."""
        due = [(Prunable.TEARDOWN_REPORT, now - TEARDOWN_REPORT_AGE)]
        if self._settings.retention_days > 0:
            # With its day and not sooner: as long as an uplink is there, it is there once.
            due.append((Prunable.UPLINK_MESSAGE, partitions.first_moment(self._oldest_kept(now))))
        if self._settings.event_days > 0:
            due.append((Prunable.EVENT, now - timedelta(days=self._settings.event_days)))
            due.append((Prunable.COMMAND, now - timedelta(days=self._settings.event_days)))
        if self._settings.audit_days > 0:
            due.append((Prunable.AUDIT, now - timedelta(days=self._settings.audit_days)))
        return due

    async def _delete(self, what: Prunable, before: datetime) -> int:
        """Delete in chunks until none is left; how many went."""
        total = 0
        for _ in range(MAX_CHUNKS):
            async with self._database.connection() as connection:
                count = await pruning.delete_chunk(connection, what, before, self._chunk_rows)
            total += count
            if count < self._chunk_rows:
                break
        return total
