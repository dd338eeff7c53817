"""The messaging store, and what changes between its reading and its writing: each test stands in the middle of a step.

What is written between the two by somebody else is acknowledged already, and stays.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from registry.messaging_limits import MessagingLimits
from registry.messaging_values import Message, QueueFull, SessionKey, StoredWill
from registry.model import DeviceId, TenantId
from registry.storage import messaging as storage
from registry.storage.database import Connection, Database
from tests.conftest import MakeDevice
from tests.messaging_brokers import Broker, Seconds, broker_on


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
async def broker(dsn: str, clock: Seconds) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "a", clock) as opened:
        yield opened


@pytest.fixture
async def other(dsn: str, clock: Seconds) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "b", clock) as opened:
        yield opened


@pytest.fixture
def key(tenant_id: TenantId, device_id: DeviceId) -> SessionKey:
    return SessionKey(tenant_id, device_id, "client")


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
