"""Transactions whose outcome can be asked for when the answer to COMMIT was lost.

    Unavailable    before COMMIT was sent: nothing was stored, it may be tried again
    (returns)      committed; or the answer was lost, and PostgreSQL said afterwards that it was
    OutcomeOpen    COMMIT was sent, and PostgreSQL could not be asked within the time

A transaction that writes has a number, and `pg_xact_status` tells its fate, also after PostgreSQL has crashed and come
back. Backends outlive their connections for a moment, so "in progress" is asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from registry.errors import Unavailable
from registry.messaging_values import OutcomeOpen
from registry.storage.database import Connection, Database

ASK_SECONDS = 10.0
"""How long the fate of a commit is asked for: a PostgreSQL that restarts is back within it."""
_PAUSE = 0.05


@asynccontextmanager
async def certain_transaction(database: Database) -> AsyncIterator[Connection]:
    """A transaction that writes, committed when the block ends. Raises Unavailable (nothing stored), OutcomeOpen.

    What the block does outside of the database must be undone by the caller when this raises Unavailable.
    """
    number: str | None = None
    sent = False
    try:
        async with database.transaction() as connection:
            yield connection
            number = await connection.fetchval("SELECT pg_current_xact_id_if_assigned()::text")
            sent = True
    except Unavailable as error:
        if not sent or number is None:  # what has no number wrote nothing
            raise
        if not await _was_committed(database, number):
            raise
        del error


async def _was_committed(database: Database, number: str) -> bool:
    deadline = asyncio.get_running_loop().time() + ASK_SECONDS
    while True:
        try:
            async with database.connection() as connection:
                fate = await connection.fetchval("SELECT pg_xact_status($1::text::xid8)", number)
            if fate in ("committed", "aborted"):
                return bool(fate == "committed")
        except Unavailable:
            pass
        if asyncio.get_running_loop().time() >= deadline:
            raise OutcomeOpen("the database did not confirm the message; it may or may not be stored")
        await asyncio.sleep(_PAUSE)
