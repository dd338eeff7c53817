"""A node among others: what it tells of itself stays true through absences, crashes of the database and slow peers."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import uuid4

import asyncpg
import pytest
from msgspec.structs import replace

from registry.errors import Unavailable
from registry.events import TEARDOWN, EventKind
from registry.model import DeviceId, Identity, PskIdentity, SessionId, TenantId
from registry.sealing import KeyRing, SealContext
from registry.secrets import Secret
from registry.storage import devices, events, nodes
from registry.storage.credentials import NewCredential, insert
from registry.storage.database import Database
from tests.nodes import (
    ACTOR,
    CredentialId,
    CredentialKind,
    TestNode,
    WatchedCloser,
    issue_key,
    note_event,
    now,
    revoke,
    running_node,
    until,
)

RING = KeyRing.generate()


async def test_a_node_that_was_forgotten_announces_itself_again_with_its_sessions(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    _, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a, running_node(dsn, "b", RING) as b:
        session, _ = await a.connect(key)
        await until_seen(b, tenant_id, {session.session_id})
        async with database.connection() as connection:
            await connection.execute("UPDATE node SET heartbeat_at = now() - interval '2 min' WHERE node_id = 'a'")
            await nodes.remove_dead(connection)
            await connection.execute("DELETE FROM session WHERE node_id = 'a'")
        await until_seen(b, tenant_id, {session.session_id})


async def test_the_mirror_heals_when_its_rows_are_lost(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    """Crash recovery empties an unlogged table."""
    _, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING, sweep_seconds=0.2) as a, running_node(dsn, "b", RING) as b:
        session, _ = await a.connect(key)
        await until_seen(b, tenant_id, {session.session_id})
        async with database.connection() as connection:
            await connection.execute("TRUNCATE session")
        await until_seen(b, tenant_id, {session.session_id})


async def test_sessions_that_end_while_a_node_is_alone_are_not_shown_later(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    _, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        async with running_node(dsn, "b", RING) as b:
            session, _ = await a.connect(key)
            await until_seen(b, tenant_id, {session.session_id})
        await until(lambda: not a.node._others)
        a.sessions.ended(session)
        async with running_node(dsn, "b", RING) as b:
            await until_seen(b, tenant_id, set())


async def test_a_locked_device_row_stops_neither_the_beat_nor_expiry(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    credential_id, key = await issue_key(database, tenant_id, device_id)
    holder = await asyncpg.connect(dsn)
    try:
        async with running_node(dsn, "a", RING) as a:
            session, closer = await a.connect(key)
            transaction = holder.transaction()
            await transaction.start()
            await holder.execute("SELECT FROM device WHERE device_id = $1 FOR UPDATE", device_id)
            async with asyncio.timeout(5):
                await a.node._write_seen()  # passes over the locked row
            async with database.connection() as connection:
                await connection.execute(
                    "UPDATE credential SET expires_at = now() WHERE credential_id = $1", credential_id
                )
            session.identity = _expiring(session.identity)
            a.sessions._expect_expiry(session)
            await until(lambda: closer.reasons == ["credential expired"])
            await transaction.rollback()
    finally:
        await holder.close()


async def test_a_flood_of_events_behind_a_long_transaction_hides_no_revocation(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    credential_id, key = await issue_key(database, tenant_id, device_id)
    slow = await asyncpg.connect(dsn)
    try:
        async with running_node(dsn, "a", RING) as a:
            session, _ = await a.connect(key)
            transaction = slow.transaction()
            await transaction.start()
            await slow.execute("SELECT pg_current_xact_id()")
            async with database.transaction() as connection:
                await events.insert_many(
                    connection,
                    [events.NewEvent(EventKind.DEVICE_UPDATED, tenant_id, ACTOR, device_id=device_id)] * 2500,
                )
            await revoke(database, tenant_id, credential_id)  # silently
            await until(lambda: session.closed, seconds=5)
            await until(lambda: a.feed.lag_seconds > 0)
            await transaction.rollback()
    finally:
        await slow.close()


async def test_an_event_of_an_unknown_kind_stops_nobody(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    """A newer node of the same database may write kinds that this one does not know."""
    async with running_node(dsn, "a", RING) as a:
        async with database.connection() as connection:
            await connection.execute(
                "INSERT INTO event (event_id, tenant_id, kind, actor, correlation_id) "
                "VALUES ($1, $2, 'device.teleported', 'x', 'y')",
                uuid4(),
                tenant_id,
            )
        last = await note_event(database, tenant_id, device_id)
        a.feed.hint()
        await until(lambda: a.feed.cursor.seq >= last)


async def test_living_events_are_not_moved_by_a_starting_node(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    async with asyncio.timeout(60):
        await asyncio.gather(*(_churn(database, tenant_id, device_id) for _ in range(4)), _rebase(database))


async def _churn(database: Database, tenant_id: TenantId, device_id: DeviceId) -> None:
    for _ in range(150):
        await note_event(database, tenant_id, device_id)


async def _rebase(database: Database) -> None:
    for _ in range(300):
        async with database.connection() as connection:
            assert await events.rebase(connection) == 0


async def test_when_a_device_was_seen_is_written_when_the_database_is_back(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING, run=False) as a:
        session, _ = await a.connect(key)
        a.sessions.ended(session)
        async with database.connection() as connection:
            await connection.execute("UPDATE device SET last_seen_at = NULL")  # its first use has set it, too

            async def away(*_: object) -> None:
                raise Unavailable("the database is away")

            with monkeypatch.context() as outage:
                outage.setattr(nodes, "seen", away)
                with pytest.raises(Unavailable):
                    await a.node._write_seen()
            await a.node._write_seen()
            assert await connection.fetchval("SELECT last_seen_at FROM device") == session.opened_at


async def test_when_a_device_was_seen_is_not_held_by_a_clock_that_was_ahead(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    _, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING, run=False) as a, database.connection() as connection:
        for ahead, stays in ((timedelta(days=365), False), (timedelta(seconds=2), True)):
            session, _ = await a.connect(key)
            a.sessions.ended(session)
            before = session.opened_at + ahead
            await connection.execute("UPDATE device SET last_seen_at = $1", before)
            await a.node._write_seen()
            seen = await connection.fetchval("SELECT last_seen_at FROM device")
            assert seen == (before if stays else session.opened_at)


@pytest.mark.alone
async def test_peers_that_do_not_answer_expire_together_within_one_deadline(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    _, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING, polite_seconds=1.0) as a:
        a.sessions._max_per_device = 5000
        opened = await asyncio.gather(*(a.connect(key, WatchedCloser(stubborn=True)) for _ in range(1500)))
        loop = asyncio.get_running_loop()
        began = loop.time()
        await a.sessions.close([s for s, _ in opened], "test")
        assert loop.time() - began < 2.9, "three groups, one after the other, would take three deadlines"
        assert all(c.aborted for _, c in opened)


async def test_a_repeated_revocation_counts_what_nobody_confirmed(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    """Another node's session stands in the mirror, and that node does not answer."""
    credential_id, _ = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        async with database.connection() as connection:
            await nodes.join(connection, nodes.NodeId("silent"), uuid4(), now())
            await connection.execute("UPDATE node SET heartbeat_at = now() - interval '20 s' WHERE node_id = 'silent'")
            row = (SessionId(uuid4()), tenant_id, device_id, credential_id, a.contact().transport, "x", now())
            await nodes.mirror(connection, nodes.NodeId("silent"), [row], [])
        ended = await revoke(database, tenant_id, credential_id)
        assert (await a.teardown.complete(ended)).remaining == 1
        assert await a.teardown.remaining(ended) == 1


async def test_a_revoked_psk_is_not_offered_its_key(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    """Else the handshake would succeed, and its peer would know that the key had been right."""
    key = b"k" * 32
    credential_id = CredentialId(uuid4())
    sealed = RING.seal(Secret(key), SealContext("psk", str(tenant_id), str(credential_id)))
    async with database.transaction() as connection:
        await insert(
            connection,
            NewCredential(
                tenant_id, device_id, credential_id, CredentialKind.PSK, b"identity-1", now(), sealed_key=sealed
            ),
        )
    async with running_node(dsn, "a", RING) as a:
        offered = await a.resolver.offer(PskIdentity(b"identity-1"), a.contact())
        assert offered.key.reveal() == key
        await a.teardown.complete(await revoke(database, tenant_id, credential_id))
        offered = await a.resolver.offer(PskIdentity(b"identity-1"), a.contact())
        assert offered.key.reveal() != key
        assert len(offered.key.reveal()) == 32


async def test_connections_insist_on_durable_commits(dsn: str, database: Database) -> None:
    async with database.connection() as connection:
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    later = await Database.open(dsn, size=2)
    try:
        async with later.connection() as connection:
            assert await connection.fetchval("SHOW synchronous_commit") == "on"
    finally:
        await later.close()


async def test_a_database_that_waits_for_no_lock_has_its_rows_waited_for(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    async with database.connection() as connection:
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f"ALTER DATABASE \"{name}\" SET lock_timeout = '1ms'")
    later = await Database.open(dsn, size=2)

    async def changed() -> None:
        async with later.connection() as connection:
            await connection.execute("UPDATE device SET name = 'changed' WHERE device_id = $1", device_id)

    try:
        async with database.transaction() as connection:
            await devices.lock(connection, tenant_id, device_id)
            changing = asyncio.create_task(changed())
            await asyncio.wait((changing,), timeout=0.5)
            assert not changing.done()
        await changing
    finally:
        await later.close()


async def test_what_ends_sessions_is_looked_for_early(database: Database) -> None:
    """The statement, its index and `TEARDOWN` name the same kinds."""
    async with database.connection() as connection:
        index = await connection.fetchval("SELECT indexdef FROM pg_indexes WHERE indexname = 'event_teardown'")
        plan = "\n".join(
            row[0]
            for row in await connection.fetch(
                "EXPLAIN SELECT FROM event WHERE kind IN ("
                + ", ".join(f"'{kind.value}'" for kind in TEARDOWN)
                + ") AND xid >= pg_snapshot_xmin(pg_current_snapshot()) ORDER BY xid, seq"
            )
        )
    for kind in TEARDOWN:
        assert kind.value in index
    assert "event_teardown" in plan


async def until_seen(node: TestNode, tenant_id: TenantId, wanted: set[SessionId]) -> None:
    """Until `node` shows exactly these sessions of a tenant."""
    async with asyncio.timeout(15):
        while {s.session_id for s in await node.node.sessions_of(tenant_id, 100)} != wanted:
            await asyncio.sleep(0.02)


def _expiring(identity: Identity) -> Identity:
    return replace(identity, expires_at=now() - timedelta(milliseconds=1))


async def test_a_connection_that_nobody_waits_for_any_more_is_closed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: asyncio.Queue[asyncpg.Connection[asyncpg.Record]] = asyncio.Queue()

    async def never_ready(connection: asyncpg.Connection[asyncpg.Record]) -> None:
        opened.put_nowait(connection)
        await asyncio.Event().wait()

    monkeypatch.setattr("registry.storage.database._prepare_connection", never_ready)
    asking = asyncio.create_task(database.dedicated())
    connection = await opened.get()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert connection.is_closed()
