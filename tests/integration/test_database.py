"""The pool's border: who borrows a connection of a database that does not answer, and is told to stop, stops."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from edge.wiring import migrate_database
from registry.storage import database as subject
from registry.storage.database import Database


@dataclass
class Frozen:
    """A pool whose one connection answers until `freeze`."""

    database: Database
    backend: int
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def freeze(self) -> None:
        os.kill(self.backend, signal.SIGSTOP)
        self.done.set()


@pytest.fixture
async def frozen(dsn: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Frozen]:
    monkeypatch.setattr(subject, "ACQUIRE_SECONDS", 0.2)
    database = await Database.open(dsn, size=1, statement_timeout=5.0)
    async with database.connection() as connection:
        made = Frozen(database, await connection.fetchval("SELECT pg_backend_pid()"))
    try:
        yield made
    finally:
        os.kill(made.backend, signal.SIGCONT)
        await database.close()


async def in_a_statement(frozen: Frozen) -> None:
    async with frozen.database.connection() as connection:
        frozen.freeze()
        await connection.fetchval("SELECT 1")


async def in_begin(frozen: Frozen) -> None:
    frozen.freeze()
    async with frozen.database.transaction():
        pass


async def in_a_transaction(frozen: Frozen) -> None:
    async with frozen.database.transaction() as connection:
        frozen.freeze()
        await connection.fetchval("SELECT 1")


async def in_commit(frozen: Frozen) -> None:
    async with frozen.database.transaction():
        frozen.freeze()


@pytest.mark.parametrize("use", [in_a_statement, in_begin, in_a_transaction, in_commit])
async def test_who_is_cancelled_while_nothing_answers_is_cancelled(
    frozen: Frozen, use: Callable[[Frozen], Coroutine[Any, Any, None]]
) -> None:
    """To give the connection back fails as well; a loop that took this for the database's loss was never stopped."""
    await cancelled(asyncio.create_task(use(frozen)), frozen.done)


async def cancelled(task: asyncio.Task[Any], frozen: asyncio.Event) -> None:
    await frozen.wait()
    for _ in range(20):  # turns of the loop, until it waits for the answer
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=60)
    assert task.cancelled()


async def test_a_migration_is_cancelled_while_nothing_answers(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is told to stop while it starts does not wait for its goodbye to be answered."""
    frozen, backends = asyncio.Event(), []

    async def migrate(connection: Any) -> list[str]:
        backends.append(await connection.fetchval("SELECT pg_backend_pid()"))
        os.kill(backends[0], signal.SIGSTOP)
        frozen.set()
        await connection.fetchval("SELECT 1")
        raise AssertionError

    monkeypatch.setattr("edge.wiring.migrate", migrate)
    try:
        await cancelled(asyncio.create_task(migrate_database(dsn)), frozen)
    finally:
        os.kill(backends[0], signal.SIGCONT)
