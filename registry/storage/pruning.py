"""Old rows of tables that are not partitioned, deleted in chunks in the order of their age.

Each chunk is one statement and its own transaction. It walks an index from its old end, so a run costs what it deletes
and not the size of the table. Events and audit rows are numbered in nearly the order of their times; a chunk looks at
the lowest numbers, and is done when it finds fewer old rows than it may delete.
"""

from __future__ import annotations

from datetime import datetime
from enum import Enum

from registry.storage.database import Connection


class Prunable(Enum):
    """A table that loses old rows; the value is its name."""

    UPLINK_MESSAGE = "uplink_message"
    EVENT = "event"
    AUDIT = "audit"
    TEARDOWN_REPORT = "teardown_report"
    COMMAND = "command"


async def clock(connection: Connection) -> datetime:
    """The database's time."""
    moment: datetime = await connection.fetchval("SELECT now()")
    return moment


async def delete_chunk(connection: Connection, what: Prunable, before: datetime, limit: int) -> int:
    """Delete at most `limit` rows from before a moment, the oldest first; how many."""
    status = await connection.execute(_STATEMENTS[what], before, limit)
    return int(status.rsplit(" ", 1)[-1])


_STATEMENTS = {
    Prunable.UPLINK_MESSAGE: """
        DELETE FROM uplink_message WHERE ctid = ANY (ARRAY (
            SELECT ctid FROM uplink_message WHERE received_at < $1 ORDER BY received_at LIMIT $2))
        """,
    Prunable.EVENT: """
        DELETE FROM event WHERE seq = ANY (ARRAY (
            SELECT seq FROM (SELECT seq, at FROM event ORDER BY seq LIMIT $2) AS oldest WHERE at < $1))
        """,
    Prunable.AUDIT: """
        DELETE FROM audit WHERE seq = ANY (ARRAY (
            SELECT seq FROM (SELECT seq, at FROM audit ORDER BY seq LIMIT $2) AS oldest WHERE at < $1))
        """,
    Prunable.TEARDOWN_REPORT: """
        DELETE FROM teardown_report WHERE (event_seq, node_id) IN (
            SELECT event_seq, node_id FROM teardown_report WHERE reported_at < $1 ORDER BY reported_at LIMIT $2)
        """,
    Prunable.COMMAND: """
        DELETE FROM command WHERE seq = ANY (ARRAY (
            SELECT seq FROM command WHERE finished_at < $1 ORDER BY finished_at LIMIT $2))
        """,
}
