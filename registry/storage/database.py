"""The pool, and the border where PostgreSQL's failures become the core's.

A connection that is lost before a commit was answered leaves the outcome open. Callers see `Unavailable`, never a
success; whoever can repeat safely (an id, a unique key) may. A pool that gives no connection within its time is
`Unavailable` too: waiting longer than the caller is no help.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType, TracebackType
from typing import Any, TypeAlias

import asyncpg
import msgspec
from asyncpg.pool import PoolConnectionProxy

from registry.errors import Unavailable

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"

ACQUIRE_SECONDS = 5.0
"""How long a request waits for a connection before it is answered 503; below every client's own timeout."""

SESSION_SETTINGS = MappingProxyType(
    {
        "timezone": "UTC",
        "default_transaction_isolation": "read committed",
        "lock_timeout": "0",  # who waits for a row is cut short by the statement's own time, and told "not now"
        "idle_in_transaction_session_timeout": "60s",  # a frozen node must not hold back everybody's feed
        "tcp_keepalives_idle": "10",  # a peer that vanished is noticed before ALIVE_SECONDS are over twice
        "tcp_keepalives_interval": "5",
        "tcp_keepalives_count": "3",
    }
)
"""What every connection of ours is set to, whatever the database's own defaults are."""

_AWAY_CLASSES = frozenset({"08", "40", "53", "57", "58"})
"""SQLSTATE classes that say "not now": connection, rolled-back, resources, operator intervention, system error."""
_READ_ONLY = "25006"
"""A standby, or a primary that was demoted: to write, another server is needed."""


class Database:
    """A pool of connections to one PostgreSQL."""

    def __init__(self, pool: asyncpg.Pool[asyncpg.Record], dsn: str, connect_timeout: float) -> None:
        self._pool = pool
        self._dsn = dsn
        self._connect_timeout = connect_timeout

    @classmethod
    async def open(
        cls, dsn: str, *, size: int = 10, statement_timeout: float = 30.0, connect_timeout: float = 10.0
    ) -> Database:
        """Connect. Seconds: `statement_timeout` bounds every statement, `connect_timeout` every new connection.

        Raises Unavailable.
        """
        try:
            pool = await asyncpg.create_pool(
                dsn,
                min_size=min(2, size),
                max_size=size,
                command_timeout=statement_timeout,
                timeout=connect_timeout,
                init=_prepare_connection,
                reset=_leave_as_it_is,
                max_inactive_connection_lifetime=300,
                server_settings={"application_name": "gatehouse", "jit": "off", **SESSION_SETTINGS},
            )
        except Exception as error:
            if not is_away(error):
                raise
            raise Unavailable(f"the database cannot be reached: {type(error).__name__}") from error
        return cls(pool, dsn, connect_timeout)

    async def close(self) -> None:
        """Close the pool; waits for running statements a little, then cuts them."""
        try:
            async with asyncio.timeout(5):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection without a transaction: each statement commits by itself. Raises Unavailable."""
        with _mapped() as cancellation:
            async with self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
                with cancellation:
                    yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A transaction: committed when the block ends, rolled back when it raises. Raises Unavailable."""
        with _mapped() as cancellation:
            async with self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
                with cancellation:  # of BEGIN and COMMIT
                    async with connection.transaction():
                        with cancellation:
                            yield connection

    async def dedicated(self) -> asyncpg.Connection[asyncpg.Record]:
        """A connection of its own outside the pool, for LISTEN. The caller closes it. Raises Unavailable."""
        with _mapped():
            connection = await asyncpg.connect(
                self._dsn,
                timeout=self._connect_timeout,
                server_settings={"application_name": "gatehouse-feed", **SESSION_SETTINGS},
            )
            try:
                await _prepare_connection(connection)
            except BaseException:  # whoever asked may be stopped meanwhile, and nobody else knows of the connection
                connection.terminate()
                raise
            return connection


def decode_json(text: str) -> Any:
    """What the database's json and jsonb columns hold, as Python values."""
    return msgspec.json.decode(text)


def encode_json(value: Any) -> str:
    """A value for a json or jsonb column."""
    return msgspec.json.encode(value).decode()


async def _leave_as_it_is(_connection: object) -> None:
    """Instead of asyncpg's reset, a round trip after every use: whoever borrows a connection leaves nothing behind.

    Transactions end with their block, locks are transaction-level, and a setting that is changed is set back in a
    `finally` (storage/partitions.py).
    """


async def _prepare_connection(connection: Any) -> None:
    # An acknowledgement means stored: a database whose default gives that up does not give it up for us. What is
    # stricter than "on" stays.
    await connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, schema="pg_catalog", encoder=encode_json, decoder=decode_json)


class _Cancellation:
    """Remembers that whoever has borrowed a connection was cancelled. To give one back to a database which does not
    answer fails, and that failure would take the cancellation's place: the caller would go on."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen: asyncio.CancelledError | None = None

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.seen = error


@contextmanager
def _mapped() -> Iterator[_Cancellation]:
    cancellation = _Cancellation()
    try:
        yield cancellation
    except Exception as error:
        if cancellation.seen is not None:
            raise cancellation.seen from None
        if not is_away(error):
            raise
        raise Unavailable("the database is not available") from error


def is_away(error: BaseException) -> bool:
    """Whether `error` says that PostgreSQL could not answer, as opposed to having refused what was asked."""
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return state[:2] in _AWAY_CLASSES or state == _READ_ONLY
    if isinstance(error, asyncpg.InterfaceError):
        return not isinstance(error, ValueError)  # a value that cannot be encoded, or a DSN that is none
    return isinstance(error, OSError | TimeoutError | asyncpg.InternalClientError)
