"""Revocation: whoever is admitted is thrown out, on every node, whatever is lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from registry import secrets
from registry.errors import Unauthenticated, Unavailable
from registry.feed import CHANNEL, Feed, NodeBusy
from registry.model import ApiKey, CredentialId, DeviceId, NodeId, TenantId
from registry.ports import Ended
from registry.sealing import KeyRing
from registry.sessions import Scope, Session
from registry.storage import admission, events
from registry.storage.admission import CredentialState
from registry.storage.database import Database
from tests.nodes import WatchedCloser, closed_sessions, issue_key, note_event, now, revoke, running_node, until

RING = KeyRing.generate()


async def test_a_revocation_closes_the_sessions_of_all_nodes_and_the_receipt_names_them(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a, running_node(dsn, "b", RING) as b:
        here, closer_here = await a.connect(key)
        there, closer_there = await b.connect(key)

        receipt = await a.teardown.complete(await revoke(a.database, tenant_id, credential_id))

        assert closed_sessions(receipt) == {str(here.session_id), str(there.session_id)}
        assert {s.node_id for s in receipt.sessions} == {"a", "b"}
        assert receipt.remaining == 0
        assert all(0 <= s.closed_after_ms < 5000 for s in receipt.sessions)
        assert closer_here.reasons == closer_there.reasons == ["credential revoked"]
        for node in (a, b):
            with pytest.raises(Unauthenticated) as refused:
                await node.connect(key)
            assert refused.value.reason == "credential revoked"


async def test_a_revocation_spares_other_credentials(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    doomed, key = await issue_key(database, tenant_id, device_id)
    _, other_key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        await a.connect(key)
        spared, closer = await a.connect(other_key)
        await a.teardown.complete(await revoke(a.database, tenant_id, doomed))
        assert not spared.closed
        assert closer.reasons == []


async def test_a_peer_that_will_not_close_is_aborted(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING, polite_seconds=0.05) as a:
        session, closer = await a.connect(key, WatchedCloser(stubborn=True))
        receipt = await a.teardown.complete(await revoke(a.database, tenant_id, credential_id))
        assert closer.aborted
        assert closed_sessions(receipt) == {str(session.session_id)}
        assert receipt.remaining == 0


async def test_the_cursor_alone_carries_a_revocation_whose_hint_was_lost(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        session, _ = await a.connect(key)
        await revoke(database, tenant_id, credential_id)  # nobody completes it, nobody notifies
        await until(lambda: session.closed)


async def test_a_revocation_does_not_wait_for_somebody_elses_long_transaction(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    credential_id, key = await issue_key(database, tenant_id, device_id)
    slow = await asyncpg.connect(dsn)
    try:
        async with running_node(dsn, "a", RING) as a, running_node(dsn, "b", RING) as b:
            transaction = slow.transaction()
            await transaction.start()
            await slow.execute("SELECT pg_current_xact_id()")
            session, _ = await b.connect(key)
            receipt = await a.teardown.complete(await revoke(a.database, tenant_id, credential_id))
            assert closed_sessions(receipt) == {str(session.session_id)}
            assert receipt.remaining == 0
            await transaction.rollback()
    finally:
        await slow.close()


async def test_events_that_commit_late_with_a_lower_number_are_not_skipped(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    """The early writer commits last: a cursor over numbers alone would have passed it."""
    seen: list[int] = []

    class Follower:
        async def follow(self, each: object) -> None:
            if each.settled:  # type: ignore[attr-defined]
                seen.append(each.event.position.seq)  # type: ignore[attr-defined]

        async def restored(self) -> None: ...

    feed = Feed(database, NodeId("late"))
    feed.add_follower(Follower())
    await feed.start()
    running = asyncio.create_task(feed.run())
    try:
        late = await asyncpg.connect(dsn)
        transaction = late.transaction()
        await transaction.start()
        lower = await late.fetchval(
            "INSERT INTO event (event_id, tenant_id, kind, actor, correlation_id) "
            "VALUES (gen_random_uuid(), $1, 'device.updated', 'x', 'y') RETURNING seq",
            tenant_id,
        )
        higher = await note_event(database, tenant_id, device_id)
        assert lower < higher
        feed.hint()
        await asyncio.sleep(0.1)  # the higher one is visible and must be held back
        assert seen == []
        await transaction.commit()
        await late.close()
        feed.hint()
        await until(lambda: len(seen) == 2)
        assert seen == [lower, higher]
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await feed.close()


async def test_sessions_that_open_during_a_revocation_do_not_survive_it(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    """Many openings race one revocation; every one is refused or closed."""
    async with running_node(dsn, "a", RING) as a:
        for _ in range(15):
            credential_id, key = await issue_key(database, tenant_id, device_id)
            opening = [asyncio.create_task(a.connect(key)) for _ in range(12)]
            await asyncio.sleep(0)
            ended = await revoke(a.database, tenant_id, credential_id)
            receipt = await a.teardown.complete(ended)
            outcomes = await asyncio.gather(*opening, return_exceptions=True)
            admitted = [o[0] for o in outcomes if isinstance(o, tuple)]
            refused = [o for o in outcomes if isinstance(o, Unauthenticated)]
            assert len(admitted) + len(refused) == len(outcomes), outcomes
            assert all(s.closed for s in admitted)
            assert receipt.remaining == 0
            assert not a.sessions.all()


async def test_who_enters_the_table_while_others_are_closed_is_closed_too_and_not_counted_as_remaining(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first reading was before the revocation, its second one takes longer than the receipt."""
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        identity = await a.resolver.admit(ApiKey(secrets.digest(key.reveal())), a.contact())
        never = asyncio.Event()
        late: list[asyncio.Task[object]] = []

        async def slow(*_: object) -> None:
            await never.wait()

        class Opens(WatchedCloser):
            async def close(self, reason: str) -> None:
                monkeypatch.setattr(a.resolver, "recheck", slow)
                late.append(asyncio.create_task(a.sessions.open(identity, a.contact(), WatchedCloser())))
                await asyncio.sleep(0)

        await a.connect(key, Opens())
        receipt = await a.teardown.complete(await revoke(a.database, tenant_id, credential_id))
        assert len(late) == 1
        assert receipt.remaining == 0
        assert not a.sessions.matching(Scope(tenant_id, device_id, credential_id, None))
        late[0].cancel()
        await asyncio.gather(*late, return_exceptions=True)


async def test_who_enters_the_table_after_the_feed_has_closed_the_others_is_not_counted_as_remaining(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The feed may be sooner than `complete`, which then finds the closing done, and a newcomer in the table."""
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        identity = await a.resolver.admit(ApiKey(secrets.digest(key.reveal())), a.contact())
        session, _ = await a.connect(key)
        ended = await revoke(a.database, tenant_id, credential_id)
        a.feed.hint()
        await until(lambda: not a.sessions.matching(Scope(tenant_id, device_id, credential_id, None)))
        reading, read = asyncio.Event(), a.resolver.recheck

        async def slow(*arguments: Any) -> Any:
            await reading.wait()
            return await read(*arguments)

        monkeypatch.setattr(a.resolver, "recheck", slow)
        late = asyncio.create_task(a.sessions.open(identity, a.contact(), WatchedCloser()))
        await asyncio.sleep(0)
        receipt = await a.teardown.complete(ended)
        assert (closed_sessions(receipt), receipt.remaining) == ({str(session.session_id)}, 0)
        assert await a.teardown.remaining(ended) == 0, "so is it told to who revokes again"
        reading.set()
        with pytest.raises(Unauthenticated):
            await late
        assert not a.sessions.matching(Scope(tenant_id, device_id, credential_id, None))


async def reasons_told(database: Database) -> list[str]:
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT data FROM event WHERE kind = 'session.closed' ORDER BY seq")
    return [row["data"]["reason"] for row in rows]


async def test_a_session_that_two_ends_concern_is_told_of_once(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    """Its device is deactivated while the revocation of its credential waits for its peer to let itself be closed."""
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        session, closer = await a.connect(key, WatchedCloser(stubborn=True))
        first = asyncio.create_task(a.teardown.complete(await revoke(a.database, tenant_id, credential_id)))
        await until(lambda: closer.reasons)
        seq = await note_event(database, tenant_id, device_id)
        ended = Ended(seq, tenant_id, now(), device_id=device_id, reason="device inactive")
        receipts = await asyncio.gather(first, a.teardown.complete(ended))
        assert [closed_sessions(each) for each in receipts] == [{str(session.session_id)}] * 2
        await a.teardown.stop()
        assert await reasons_told(database) == ["credential revoked"]


async def test_a_session_that_is_closed_while_a_sweep_reads_is_told_of_once(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        await a.connect(key)
        states = a.resolver.states

        async def overtaken(wanted: Sequence[CredentialId]) -> dict[CredentialId, CredentialState]:
            await a.teardown.complete(await revoke(a.database, tenant_id, credential_id))
            return await states(wanted)

        monkeypatch.setattr(a.resolver, "states", overtaken)
        await a.teardown.sweep()
        await a.teardown.stop()
        assert await reasons_told(database) == ["credential revoked"]


async def test_a_device_that_was_let_in_again_is_not_closed_for_an_end_that_is_over(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    """Set inactive and active again before its sessions were closed, it comes back at once, and each time."""
    _, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        opened: list[Session] = []

        class ComesBack(WatchedCloser):
            async def close(self, reason: str) -> None:
                if len(opened) < 20:
                    opened.append((await a.connect(key, ComesBack()))[0])

        first, _ = await a.connect(key, ComesBack())
        seq = await note_event(database, tenant_id, device_id)
        receipt = await a.teardown.complete(Ended(seq, tenant_id, now(), device_id=device_id, reason="device inactive"))
        assert closed_sessions(receipt) == {str(first.session_id)}
        assert [session.live for session in opened] == [True]


async def test_opening_reads_the_credential_again_after_the_session_is_in_the_table(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that closes the race: at the second reading the session must already be there to be found."""
    _, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        in_table: list[int] = []
        reading = admission.by_id

        async def watched(connection: object, wanted: object) -> object:
            in_table.append(len(a.sessions._by_id))
            return await reading(connection, wanted)  # type: ignore[arg-type]

        monkeypatch.setattr(admission, "by_id", watched)
        await a.connect(key)
        assert in_table == [1]


async def test_a_cached_credential_is_not_admitted_after_its_revocation(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        await a.connect(key)
        async with database.connection() as connection:
            first_use = await events.newest_settled(connection)
        await until(lambda: a.feed.cursor >= first_use)  # the first use is an event that drops the entry again
        await a.connect(key)
        await a.connect(key)
        assert a.resolver.counters.cache_hits > 0
        await revoke(database, tenant_id, credential_id)  # silently: the feed has not told yet
        with pytest.raises(Unauthenticated):
            await a.connect(key)


async def test_a_node_that_lost_the_feed_catches_up_and_sweeps(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        session, _ = await a.connect(key)
        async with database.connection() as connection:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'gatehouse-feed' AND datname = current_database()"
            )
        await revoke(database, tenant_id, credential_id)
        await until(lambda: session.closed)
        await until(lambda: a.feed.trusted)


async def test_nobody_new_is_admitted_when_the_feed_is_lost_for_long(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    _, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING, run=False) as a:
        await a.connect(key)
        a.sessions._feed_grace_seconds = 0.0
        with pytest.raises(Unavailable):
            await a.connect(key)


async def test_a_second_process_with_the_same_node_id_is_refused(
    dsn: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.storage.nodes.take_lock.__kwdefaults__", {"wait_seconds": 0.1})
    async with running_node(dsn, "a", RING):
        with pytest.raises(NodeBusy):
            await Feed(database, NodeId("a")).start()


async def test_hints_reach_the_other_nodes(dsn: str, database: Database) -> None:
    heard = asyncio.Event()
    listener = await asyncpg.connect(dsn)
    await listener.add_listener(CHANNEL, lambda *_: heard.set())
    async with running_node(dsn, "a", RING, run=False) as a:
        a.feed.hint()
        async with asyncio.timeout(5):
            await heard.wait()
    await listener.close()


async def test_a_shortened_life_reaches_open_sessions(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    """A rotation gives the old key an end; a session opened before must end with it."""
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        session, closer = await a.connect(key)
        async with database.transaction() as connection:
            await connection.execute(
                "UPDATE credential SET expires_at = now() + interval '0.3 s' WHERE credential_id = $1", credential_id
            )
            await connection.execute(
                "INSERT INTO event (event_id, tenant_id, kind, device_id, actor, correlation_id) "
                "VALUES (gen_random_uuid(), $1, 'credential.rotated', $2, 'x', 'y')",
                tenant_id,
                device_id,
            )
        a.feed.hint()
        await until(lambda: closer.reasons)
        assert session.closed
        assert closer.reasons in (["credential expired"], ["credential no longer valid"])


async def test_a_sweep_that_read_before_a_rotation_does_not_undo_what_the_rotations_own_sweep_found(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING, run=False) as a:
        session, _ = await a.connect(key)
        states, has_read, goes_on = a.resolver.states, asyncio.Event(), asyncio.Event()

        async def slow(wanted: Sequence[CredentialId]) -> dict[CredentialId, CredentialState]:
            found = await states(wanted)
            has_read.set()
            await goes_on.wait()
            return found

        with monkeypatch.context() as first:
            first.setattr(a.resolver, "states", slow)
            periodic = asyncio.create_task(a.sessions.sweep())
            await has_read.wait()
        async with database.connection() as connection:
            await connection.execute(
                "UPDATE credential SET expires_at = now() + interval '1 h' WHERE credential_id = $1", credential_id
            )
        await a.sessions.sweep(device_id)
        goes_on.set()
        await periodic
        assert session.identity.expires_at is not None, "the session would outlive its credential until the next sweep"


async def test_a_thousand_sessions_close_at_once(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    credential_id, key = await issue_key(database, tenant_id, device_id)
    async with running_node(dsn, "a", RING) as a:
        a.sessions._max_per_device = 2000
        sessions = [s for s, _ in await asyncio.gather(*(a.connect(key) for _ in range(1000)))]
        receipt = await a.teardown.complete(await revoke(a.database, tenant_id, credential_id))
        assert len(receipt.sessions) == 1000
        assert receipt.remaining == 0
        assert all(s.closed for s in sessions)
