"""The messaging store, and what changes between its reading and its writing: each test stands in the middle of a step.

What is written between the two by somebody else is acknowledged already, and stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import pytest

from registry import messaging as subject
from registry.errors import Unavailable
from registry.messaging_limits import MessagingLimits
from registry.messaging_values import (
    Message,
    Publication,
    QueueFull,
    Recipient,
    Reserved,
    RetainedReplaced,
    Routing,
    SessionKey,
    StoredWill,
)
from registry.model import DeviceId, TenantId
from registry.storage import messaging as storage
from registry.storage import messaging_routes
from registry.storage.commits import certain_transaction
from registry.storage.database import Connection, Database
from tests.conftest import MakeDevice
from tests.messaging_brokers import Broker, Seconds, broker, broker_on, clock, key, other

__all__ = ["broker", "clock", "key", "other"]


async def retained(broker: Broker, tenant_id: TenantId) -> list[bytes]:
    topics = await broker.messaging.retained_topics(tenant_id, "")
    return [each.message.payload for each in await broker.messaging.retained(tenant_id, topics)]


async def retained_as_counted(database: Database) -> int:
    async with database.connection() as connection:
        number: int = await connection.fetchval("SELECT retained_messages FROM messaging_tenant")
    return number


async def test_a_retained_message_that_takes_the_place_of_an_expired_one_is_not_swept_with_it(
    broker: Broker, tenant_id: TenantId, device_id: DeviceId, clock: Seconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    for topic in ("t", "over"):
        await broker.publish(tenant_id, device_id, topic, b"old", retain=True, expires_at=clock.now + 5)
    clock.now += 5
    find = storage.expired_retained
    once = iter([True])

    async def found_and_replaced(connection: Connection, now: float, limit: int) -> list[tuple[TenantId, str]]:
        found = await find(connection, now, limit)
        if next(once, False):
            await broker.publish(tenant_id, device_id, "t", b"new", retain=True)
        return found

    monkeypatch.setattr(storage, "expired_retained", found_and_replaced)
    await broker.messaging.prune()
    assert await retained(broker, tenant_id) == [b"new"]
    assert await retained_as_counted(broker.database) == 1


async def test_who_loses_a_grant_takes_nobody_elses_retained_message_along(
    broker: Broker, tenant_id: TenantId, device_id: DeviceId, make_device: MakeDevice
) -> None:
    another = await make_device(tenant_id)
    for topic in ("t", "mine"):
        await broker.publish(tenant_id, device_id, topic, b"mine", retain=True)
    found = await broker.messaging.retained_of_device(tenant_id, device_id)
    await broker.publish(tenant_id, another, "t", b"theirs", retain=True)
    assert await broker.messaging.forget_retained(tenant_id, found) == 1
    assert await retained(broker, tenant_id) == [b"theirs"]
    assert await retained_as_counted(broker.database) == 1


async def test_a_will_that_was_due_and_could_not_be_published_outlasts_its_clients_return(
    dsn: str, clock: Seconds, key: SessionKey, make_device: MakeDevice
) -> None:
    async with broker_on(dsn, "a", clock, MessagingLimits(queued_messages=1)) as broker:
        watching, _ = await broker.connect(SessionKey(key.tenant_id, await make_device(key.tenant_id), "w"))
        await broker.subscribe(watching, "#")
        await broker.publish(key.tenant_id, key.device_id, "t", b"fills the queue")
        with pytest.raises(QueueFull):
            await broker.publish(key.tenant_id, key.device_id, "t", b"has no room")
        served, _ = await broker.connect(key, will=StoredWill(Message("will", b"gone", 1)))
        await broker.disconnect(served, publish_will=True)
        await broker.messaging.tick()
        await broker.connect(key, will=StoredWill(Message("will", b"of the next connection", 1)))
        ((ordinal, _, _),) = watching.sent
        await broker.messaging.delivered(watching.ownership, ordinal)
        clock.now += 60
        await broker.messaging.tick()
        assert watching.payloads == [b"fills the queue", b"gone"]


async def test_a_route_that_is_taken_up_while_it_is_pruned_stays(
    broker: Broker, other: Broker, database: Database, key: SessionKey
) -> None:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    await broker.messaging.unsubscribe(served.ownership, ["t"])
    async with database.connection() as connection:
        await connection.execute("UPDATE messaging_route SET removed_at = removed_at - interval '1 day'")
        await connection.execute(  # so many that PostgreSQL does not read the whole table for one
            """
            INSERT INTO messaging_route (tenant_id, version, node_id, filter, stored, qos)
            SELECT $1, 0, 'elsewhere', n::text, false, 0 FROM generate_series(1, 5000) AS n
            """,
            key.tenant_id,
        )
        await connection.execute("ANALYZE messaging_route")
    writing, written = asyncio.Event(), asyncio.Event()
    put = messaging_routes.put_sessions

    async def put_slowly(*arguments: Any) -> None:
        await put(*arguments)
        writing.set()
        await written.wait()

    with mock.patch.object(messaging_routes, "put_sessions", put_slowly):
        subscribing = asyncio.create_task(broker.subscribe(served, "t"))
        await writing.wait()
        pruning = asyncio.create_task(other.messaging.prune())
        async with asyncio.timeout(10):
            while not await waits_for_a_lock(database):
                await asyncio.sleep(0.01)
        written.set()
        await subscribing
        await pruning
    await broker.disconnect(served)
    _, resumed = await broker.connect(key)
    assert resumed is not None
    assert [each.filter for each in resumed.subscriptions] == ["t"]


async def waits_for_a_lock(database: Database) -> bool:
    async with database.connection() as connection:
        waits: bool = await connection.fetchval(
            """
            SELECT EXISTS (SELECT FROM pg_stat_activity
                           WHERE wait_event_type = 'Lock' AND datname = current_database()
                             AND query LIKE '%DELETE FROM messaging_route%')
            """
        )
    return waits


@pytest.mark.parametrize("step", ["join", "write"])
async def test_a_node_that_comes_back_writes_its_interests_though_the_database_goes_away_again(
    broker: Broker, other: Broker, database: Database, tenant_id: TenantId, device_id: DeviceId, step: str
) -> None:
    await broker.messaging.watch(tenant_id, "w", stored=False, qos=1)
    async with database.connection() as connection:
        await connection.execute("DELETE FROM messaging_node WHERE node_id = 'a'")
    messaging = broker.messaging
    failing, name = (messaging, "_join") if step == "join" else (messaging._routes, "_write")
    whole = getattr(failing, name)

    async def unheard(*arguments: Any) -> None:  # committed, or not: the answer is lost
        if step == "join":
            await whole(*arguments)
        raise Unavailable("the database is away")

    with (
        mock.patch("registry.message_routes.RETRY_PAUSES", ()),
        mock.patch.object(failing, name, unheard),
        pytest.raises(Unavailable),
    ):
        await messaging._beat()
    await messaging._beat()
    assert (await other.publish(tenant_id, device_id, "w", b"")).routing.relays != ()


async def test_a_node_that_comes_back_writes_its_interests_before_it_is_taken_for_dead_again(
    broker: Broker, database: Database, tenant_id: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.gather(*(broker.messaging.watch(tenant_id, f"t/{n}", stored=False, qos=1) for n in range(200)))
    async with database.connection() as connection:
        await connection.execute("DELETE FROM messaging_node WHERE node_id = 'a'")
    put, written = messaging_routes.put_nodes, []

    async def counted(connection: Connection, versions: Any, interests: Any) -> None:
        written.append(len(interests))
        await put(connection, versions, interests)

    monkeypatch.setattr(messaging_routes, "put_nodes", counted)
    await broker.messaging._beat()
    assert sum(written) == 200
    assert len(written) <= 2  # transactions, each some milliseconds, in which it does not beat


async def test_a_node_that_is_heard_of_while_a_beat_looks_for_others_is_not_forgotten(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = storage.has_others

    async def looked_before(connection: Connection, node_id: Any) -> bool:
        found = await look(connection, node_id)
        broker.messaging._met_another()
        return found

    monkeypatch.setattr(subject.storage, "has_others", looked_before)
    assert broker.messaging.alone
    await broker.messaging._beat()
    assert not broker.messaging.alone
    monkeypatch.setattr(subject.storage, "has_others", look)
    await broker.messaging._beat()
    assert broker.messaging.alone


async def test_a_tenant_that_is_forgotten_while_its_routes_are_read_stays_forgotten(
    broker: Broker, tenant_id: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.messaging.follow_tenant(tenant_id)
    read = messaging_routes.read

    async def read_before(*arguments: Any) -> Any:
        found = await read(*arguments)
        broker.messaging.forget_tenant(tenant_id)
        broker.tables.clear()
        return found

    monkeypatch.setattr(messaging_routes, "read", read_before)
    following = asyncio.create_task(broker.messaging._follow())
    async with asyncio.timeout(10):
        while broker.messaging._inbox._poll_at == 0.0:  # it waits behind its first turn
            await asyncio.sleep(0)
    following.cancel()
    assert broker.tables == {}
    monkeypatch.setattr(messaging_routes, "read", read)
    await broker.messaging.follow_tenant(tenant_id)
    assert list(broker.tables) == [tenant_id]


@pytest.mark.parametrize("word", [b"new", b""], ids=["replaced", "cleared"])
@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "before"])
async def test_a_retained_message_is_given_to_nobody_behind_the_one_that_replaced_it(
    broker: Broker, key: SessionKey, word: bytes, together: bool
) -> None:
    await broker.publish(key.tenant_id, key.device_id, "t", b"old", retain=True)
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    (kept,) = await broker.messaging.retained(key.tenant_id, ["t"])
    replacing = asyncio.ensure_future(broker.publish(key.tenant_id, key.device_id, "t", word, retain=True))
    await (asyncio.sleep(0) if together else replacing)
    packet_id = served.reserve()
    assert packet_id is not None
    reserved = Reserved(served.ownership.epoch, packet_id)
    recipient = Recipient(served.ownership.session_id, 1, True, (), reserved)
    giving = broker.messaging.enqueue(Publication(key.tenant_id, kept.device_id, kept.message), Routing((recipient,)))
    with pytest.raises(RetainedReplaced):
        await giving
    await replacing
    assert served.payloads == [word]
    assert packet_id not in served.taken_ids


async def test_whose_messages_get_packet_ids_while_the_loop_is_stopped_is_closed(
    broker: Broker, other: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loops are started again when one of them fails; whether the commit was heard of is not known then."""
    committed = asyncio.Event()

    @asynccontextmanager
    async def unheard(database: Database) -> AsyncIterator[Connection]:
        async with certain_transaction(database) as connection:
            yield connection
        committed.set()
        await asyncio.Event().wait()

    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    await other.publish(key.tenant_id, key.device_id, "t", b"x")
    with monkeypatch.context() as patch:
        patch.setattr("registry.message_inbox.certain_transaction", unheard)
        pulling = asyncio.create_task(broker.pull())
        await committed.wait()
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
    assert broker.evictions == [served.ownership]  # else it would wait for a message that nobody sends
    again, _ = await broker.connect(key)
    assert again.payloads == [b"x"]
