"""Plain SQL migrations, numbered, applied in order, each once, each in its own transaction.

Several starters at once are safe: whoever holds the advisory lock applies, the others wait and then find nothing to
do. An applied file must not change: its SHA-256 is kept and compared, so that two nodes of different builds cannot
disagree silently. A database that is newer than this program is refused: an old node must not write into a schema it
does not know.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from asyncpg import Connection

LOCK = 0x6761_7465_686F_7573
"""The advisory lock of migrations: the ASCII of "gatehous"."""


class MigrationError(Exception):
    """The schema cannot be brought to this program's version; the message says why."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered SQL file."""

    number: int
    name: str
    sql: str

    @property
    def digest(self) -> str:
        """SHA-256 of the file, hexadecimal."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def available() -> list[Migration]:
    """The migrations this program ships, in order."""
    folder = resources.files("registry.storage") / "migrations"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    return [Migration(int(f.name.split("_")[0]), f.name, f.read_text("utf-8")) for f in files]


async def migrate(connection: Connection) -> list[str]:
    """Bring the schema to this program's version; the names of the files applied. Raises MigrationError."""
    await connection.execute("SELECT pg_advisory_lock($1)", LOCK)
    try:
        return await _apply_missing(connection)
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", LOCK)


async def _apply_missing(connection: Connection) -> list[str]:
    await connection.execute(
        """
        CREATE TABLE IF NOT EXISTS schema_migration (
            number integer PRIMARY KEY, name text NOT NULL, digest text NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT now())
        """
    )
    rows = await connection.fetch("SELECT number, name, digest FROM schema_migration ORDER BY number")
    known = {m.number: m for m in available()}
    for row in rows:
        migration = known.get(row["number"])
        if migration is None:
            raise MigrationError(
                f"the database has migration {row['name']}, which this program does not know: it is older"
            )
        if migration.digest != row["digest"]:
            raise MigrationError(f"migration {row['name']} was changed after it was applied to this database")
    applied = {row["number"] for row in rows}
    missing = [m for m in known.values() if m.number not in applied]
    for migration in missing:
        async with connection.transaction():
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO schema_migration (number, name, digest) VALUES ($1, $2, $3)",
                migration.number,
                migration.name,
                migration.digest,
            )
    return [m.name for m in missing]
