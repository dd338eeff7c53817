"""The PostgreSQL of a test session: one embedded server, one migrated template, a fresh copy of it per test.

    session: EmbeddedPostgres (fsync off) ── template database, migrated, partitions of this week
    test:       CREATE DATABASE … TEMPLATE …  ── test ──  DROP DATABASE … WITH (FORCE)

The server, its supervisor and one maintenance connection live in a thread with an event loop of its own, because the
loops of the tests come and go. Tests may kill backends and whole databases; the server itself belongs to all of them.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from edge.postgres import EmbeddedPostgres, PostgresBinaries, all_binaries, find_binaries
from registry.storage import partitions
from registry.storage.migrate import migrate

Answer = TypeVar("Answer")

TEMPLATE = "gatehouse_template"
CHOICE = "GATEHOUSE_TEST_POSTGRES"
"""`wheel` or `installed`: which PostgreSQL the tests run on. Unset: the one that a server here would choose."""
DAYS_AHEAD = 2


def chosen_binaries() -> PostgresBinaries:
    """What `GATEHOUSE_TEST_POSTGRES` selects. Raises LookupError if this machine has none of that origin."""
    choice = os.environ.get(CHOICE)
    if not choice:
        return find_binaries(environ=os.environ)
    if choice not in ("wheel", "installed"):
        raise LookupError(f"{CHOICE}={choice!r} is neither wheel nor installed")
    origin: Literal["wheel", "installed"] = "wheel" if choice == "wheel" else "installed"
    for binaries in all_binaries({k: v for k, v in os.environ.items() if k != "PG_BINDIR"}):
        if binaries.origin == origin:
            return binaries
    raise LookupError(f"{CHOICE}={choice}: this machine has no such PostgreSQL")


class PostgresServer:
    """A running server; its methods may be called from any thread, and block until done."""

    def __init__(self, data_dir: Path, binaries: PostgresBinaries) -> None:
        self.binaries = binaries
        self._embedded = EmbeddedPostgres(data_dir, owner="serve", binaries=binaries, fsync=False)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-postgres", daemon=True)
        self._maintenance: asyncpg.Connection[asyncpg.Record] | None = None
        self._numbers = count(1)

    def start(self) -> None:
        """Start PostgreSQL and make the template. Raises PostgresUnavailable."""
        self._thread.start()
        try:
            self._run(self._start())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop PostgreSQL; does nothing the second time."""
        if self._loop.is_closed():
            return
        try:
            self._run(self._stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def create_database(self, template: str | None = TEMPLATE) -> str:
        """The DSN of a new database: a copy of the migrated template, or empty for `template=None`."""
        name = f"test_{os.getpid()}_{next(self._numbers)}"
        source = template or "template0"
        # Copying files costs two checkpoints, which are nothing without fsync, and is three times as fast as WAL_LOG.
        self._run(self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{source}" STRATEGY FILE_COPY'))
        return self.dsn(name)

    def drop_database(self, dsn: str) -> None:
        """Drop it, whoever is still connected."""
        name = urlsplit(dsn).path.removeprefix("/")
        self._run(self._execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))

    def dsn(self, database: str) -> str:
        """The address of a database of this server."""
        return urlunsplit(urlsplit(self._embedded.dsn)._replace(path=f"/{database}"))

    def _run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=90)

    async def _start(self) -> None:
        await self._embedded.start()
        self._maintenance = await asyncpg.connect(self.dsn("postgres"))
        await self._maintenance.execute(f"CREATE DATABASE {TEMPLATE} TEMPLATE template0")
        connection = await asyncpg.connect(self.dsn(TEMPLATE))
        try:
            await migrate(connection)
            today = await partitions.today(connection)
            await partitions.ensure(connection, [today + timedelta(days=n) for n in range(DAYS_AHEAD + 1)])
        finally:
            await connection.close()

    async def _stop(self) -> None:
        if self._maintenance is not None:
            await self._maintenance.close()
        await self._embedded.stop()

    async def _execute(self, statement: str) -> None:
        assert self._maintenance is not None
        await self._maintenance.execute(statement)
