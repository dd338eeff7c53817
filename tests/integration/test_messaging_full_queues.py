"""A stored session that takes nothing holds up its topics for a while, then it ends and everybody is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from registry.full_queues import Standstill
from registry.messaging_limits import MessagingLimits
from registry.messaging_values import Message, QueueFull, SessionKey, SessionLost, StoredWill
from registry.model import DeviceId, TenantId
from registry.storage.database import Database
from tests.messaging_brokers import Broker, Seconds, Served, broker_on

GRACE = 10.0
LIMITS = MessagingLimits(queued_messages=3, queued_bytes=8_000, full_queue_seconds=GRACE)


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
async def broker(dsn: str, clock: Seconds) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "a", clock, LIMITS) as opened:
        yield opened


@pytest.fixture
async def other(dsn: str, clock: Seconds) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "b", clock, LIMITS) as opened:
        yield opened


@pytest.fixture
def key(tenant_id: TenantId, device_id: DeviceId) -> SessionKey:
    return SessionKey(tenant_id, device_id, "stuck")


async def publish(broker: Broker, key: SessionKey, payload: bytes = b"") -> bool:
    """Whether it was stored; what the refusal set off is done."""
    try:
        await broker.publish(key.tenant_id, key.device_id, "t", payload)
    except QueueFull:
        return False
    finally:
        await broker.messaging.settled()
    return True


async def stuck(broker: Broker, key: SessionKey, will: StoredWill | None = None) -> Served:
    """A session with a full queue, connected."""
    served, _ = await broker.connect(key, will=will)
    await broker.subscribe(served, "t", 1)
    for _ in range(3):
        assert await publish(broker, key)
    return served


async def is_there(broker: Broker, key: SessionKey) -> bool:
    async with broker.database.connection() as connection:
        return bool(
            await connection.fetchval(
                "SELECT count(*) FROM messaging_session WHERE device_id = $1 AND client_id = $2",
                key.device_id,
                key.client_id,
            )
        )


async def test_a_session_that_takes_nothing_for_the_grace_ends_and_its_topics_are_free(
    broker: Broker, clock: Seconds, key: SessionKey, database: Database
) -> None:
    will = StoredWill(Message("dead", b"x", 1))
    served = await stuck(broker, key, will)
    witness, _ = await broker.connect(SessionKey(key.tenant_id, key.device_id, "witness"))
    await broker.subscribe(witness, "dead", 1)
    for _ in range(4):
        assert not await publish(broker, key)
        assert await is_there(broker, key)
        clock.now += GRACE / 4
    assert not await publish(broker, key)
    assert not await is_there(broker, key)
    assert broker.messaging.ended_full == 1
    await broker.pull()
    assert (broker.full, broker.evictions) == ([served.ownership], [])
    assert await publish(broker, key)
    await broker.messaging.tick()
    assert witness.payloads == [b"x"]
    with pytest.raises(SessionLost):
        await broker.messaging.release(served.ownership, publish_will=True)
    _, resumed = await broker.connect(key)
    assert resumed is None
    async with database.connection() as connection:
        told = await connection.fetchrow("SELECT device_id, data FROM event WHERE kind = 'session.closed'")
    assert told is not None
    assert told["device_id"] == key.device_id
    assert told["data"] == {
        "reason": "queue stayed full",
        "transport": "mqtt",
        "client_id": "stuck",
        "queued_messages": 3,
    }


async def test_a_step_of_the_wall_clock_ends_nobody(broker: Broker, clock: Seconds, key: SessionKey) -> None:
    broker.steady = Seconds()
    await stuck(broker, key)
    for step in (0.0, 60.0, 86_400.0, -86_400.0):
        clock.now += step
        assert not await publish(broker, key)
        assert await is_there(broker, key)
    broker.steady.now += GRACE
    assert not await publish(broker, key)
    assert not await is_there(broker, key)


async def test_the_owner_on_another_node_is_told(
    broker: Broker, other: Broker, clock: Seconds, key: SessionKey
) -> None:
    served = await stuck(other, key)
    assert not await publish(broker, key)
    clock.now += GRACE
    assert not await publish(broker, key)
    await other.pull()
    assert (other.full, other.evictions) == ([served.ownership], [])
    assert await publish(broker, key)


async def test_a_session_that_nobody_serves_ends_as_well(broker: Broker, clock: Seconds, key: SessionKey) -> None:
    await broker.disconnect(await stuck(broker, key))
    assert not await publish(broker, key)
    clock.now += GRACE
    assert not await publish(broker, key)
    assert not await is_there(broker, key)
    assert broker.full == []


async def test_whoever_takes_something_is_waited_for(broker: Broker, clock: Seconds, key: SessionKey) -> None:
    served = await stuck(broker, key)
    for _ in range(5):
        assert not await publish(broker, key)
        clock.now += 0.9 * GRACE
        await broker.messaging.delivered(served.ownership, served.sent.pop(0)[0])
        assert await publish(broker, key)
    assert await is_there(broker, key)


async def test_whoever_comes_back_gets_the_whole_grace_again(broker: Broker, clock: Seconds, key: SessionKey) -> None:
    await broker.disconnect(await stuck(broker, key))
    assert not await publish(broker, key)
    clock.now += 2 * GRACE
    await broker.connect(key)
    assert not await publish(broker, key)
    clock.now += 0.9 * GRACE
    assert not await publish(broker, key)
    assert await is_there(broker, key)
    clock.now += 0.1 * GRACE
    assert not await publish(broker, key)
    assert not await is_there(broker, key)


async def test_a_session_that_moves_at_the_last_moment_stays(broker: Broker, key: SessionKey) -> None:
    """It took something, or was taken up, between the refusal and the look that ends it."""
    served = await stuck(broker, key)
    stood = Standstill(served.ownership.session_id, served.ownership.epoch, 0)
    await broker.messaging.delivered(served.ownership, served.sent[0][0])
    assert not await broker.messaging._sessions.end_full(stood)
    moved = replace(stood, left=1)
    await broker.disconnect(served)
    await broker.connect(key)
    assert not await broker.messaging._sessions.end_full(moved)
    assert await broker.messaging._sessions.end_full(replace(moved, epoch=2))
    assert not await broker.messaging._sessions.end_full(replace(moved, epoch=2))


async def test_a_message_that_no_queue_takes_ends_nobody(broker: Broker, clock: Seconds, key: SessionKey) -> None:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t", 1)
    for _ in range(3):
        assert not await publish(broker, key, bytes(9_000))
        clock.now += GRACE
    assert await is_there(broker, key)


async def test_without_a_grace_the_senders_wait_for_ever(dsn: str, clock: Seconds, key: SessionKey) -> None:
    limits = MessagingLimits(queued_messages=3, full_queue_seconds=0)
    async with broker_on(dsn, "a", clock, limits) as broker:
        await stuck(broker, key)
        for _ in range(3):
            assert not await publish(broker, key)
            clock.now += 100 * GRACE
        assert await is_there(broker, key)
