"""What one client publishes to a topic reaches each session in its order (MQTT 5.0 §4.6), whichever way it goes: at
once, through the inbox, or with the session that is taken up again, on a real PostgreSQL.

More of the race without a break, by hand: GATEHOUSE_ORDER_ROUNDS=50 pytest tests/integration/test_messaging_order.py
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Sequence
from functools import partial
from typing import Any

import pytest

from registry import message_inbox
from registry.messaging_limits import MessagingLimits
from registry.messaging_values import Message, Ownership, Publication, Routing, SessionKey, StoredSessionId
from registry.model import DeviceId, NodeId, TenantId
from registry.queue_fronts import QueueFronts
from registry.storage import messaging as storage
from registry.storage.database import Connection, Database
from registry.storage.messaging_sessions import Locked
from tests.messaging_brokers import Broker, Seconds, Served, broker_on
from tests.nodes import until

ROUNDS = int(os.environ.get("GATEHOUSE_ORDER_ROUNDS", "2"))


@pytest.fixture
async def broker(dsn: str) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "a", Seconds(), MessagingLimits(queued_messages=32_000, queued_bytes=10**8)) as opened:
        yield opened


@pytest.fixture
async def other(dsn: str) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "b", Seconds()) as opened:
        yield opened


@pytest.fixture
def key(tenant_id: TenantId, device_id: DeviceId) -> SessionKey:
    return SessionKey(tenant_id, device_id, "client")


class Publisher:
    """Publishes 0, 1, 2 and so on without a break, some hundred of them on their way."""

    def __init__(self, broker: Broker, key: SessionKey, qos: int) -> None:
        self.count = 0
        self._broker, self._key, self._qos = broker, key, qos
        self._going = True
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        under_way: list[asyncio.Future[Any]] = []
        while self._going:
            for _ in range(100):
                message = Message("t", b"%d" % self.count, self._qos, False, b"", None)
                publication = Publication(self._key.tenant_id, self._key.device_id, message)
                under_way.append(self._broker.messaging.publish(publication))
                self.count += 1
            oldest, under_way = under_way[:-200], under_way[-200:]
            await asyncio.gather(*oldest)
            await asyncio.sleep(0)
        await asyncio.gather(*under_way)

    async def reaches(self, count: int) -> None:
        while self.count < count:
            await asyncio.sleep(0.001)

    async def stop(self) -> None:
        self._going = False
        await self._task


def has(served: Served, count: int) -> bool:
    return len(served.sent) >= count


async def publish(broker: Broker, key: SessionKey, payload: bytes, qos: int = 1) -> None:
    await broker.publish(key.tenant_id, key.device_id, "t", payload, qos=qos)


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_session_taken_up_under_load_gets_everything_in_order(
    broker: Broker, key: SessionKey, qos: int
) -> None:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t", qos)
    running = asyncio.create_task(broker.messaging.run())
    try:
        for _ in range(ROUNDS):
            await broker.disconnect(served)
            publisher = Publisher(broker, key, qos)
            await publisher.reaches(500)
            served, _ = await broker.connect(key)
            await publisher.reaches(publisher.count + 1_000)
            await publisher.stop()
            expected = [b"%d" % n for n in range(publisher.count)]
            await until(partial(has, served, publisher.count), seconds=60.0)
            assert served.payloads == expected
            await asyncio.gather(*(broker.messaging.delivered(served.ownership, o) for o, _, _ in served.sent))
    finally:
        running.cancel()
        await asyncio.wait([running])


@pytest.mark.parametrize("qos", [1, 2])
async def test_nothing_overtakes_what_was_routed_before_the_session_was_taken_up(
    broker: Broker, database: Database, key: SessionKey, qos: int
) -> None:
    away, _ = await broker.connect(key)
    await broker.subscribe(away, "t", qos)
    await broker.disconnect(away)
    async with database.transaction() as connection:
        await connection.execute("SELECT FROM messaging_session FOR NO KEY UPDATE")
        taking = asyncio.create_task(broker.connect(key))
        await waiting_for_a_row(database, 1)
        first = asyncio.create_task(publish(broker, key, b"0", qos))  # routed while nobody serves the session
        await waiting_for_a_row(database, 2)
    served, resumed = await taking
    await first
    assert resumed is not None
    assert not resumed.outgoing
    await publish(broker, key, b"1", qos)
    assert served.payloads == []
    await publish(broker, key, b"2", qos)
    assert served.payloads == [b"0", b"1", b"2"]  # it caught up without the inbox's loop
    assert served.taken_ids == {packet_id for _, packet_id, _ in served.sent}


async def waiting_for_a_row(database: Database, count: int) -> None:
    """Return when so many statements wait for a row."""
    deadline = asyncio.get_running_loop().time() + 30.0
    while asyncio.get_running_loop().time() < deadline:
        async with database.connection() as connection:
            number = await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        if number == count:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"{number} statements wait, not {count}")


async def test_nothing_overtakes_what_waited_for_room_when_there_is_room_again(
    broker: Broker, other: Broker, key: SessionKey
) -> None:
    served = await served_by(broker, key)
    await publish(broker, key, b"0")
    served.full = True
    await publish(other, key, b"1")
    await broker.pull()
    served.full = False
    await broker.messaging.delivered(served.ownership, served.sent[0][0])  # the inbox may try again, but has not
    await publish(broker, key, b"2")
    assert served.payloads == [b"0"]
    await publish(broker, key, b"3")
    assert served.payloads == [b"0", b"1", b"2", b"3"]


async def test_what_waited_for_room_is_tried_again_however_busy_the_inbox_is(
    broker: Broker, other: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room that nobody tells of, as when a reserved packet id is given back."""
    monkeypatch.setattr(message_inbox, "POLL_SECONDS", 0.05)
    served = await served_by(broker, key)
    inbox = broker.messaging._inbox

    async def wake_often() -> None:
        while True:
            inbox.wake()
            await asyncio.sleep(0.002)

    running, waking = asyncio.create_task(broker.messaging.run()), asyncio.create_task(wake_often())
    try:
        served.full = True
        await publish(other, key, b"0")
        await until(lambda: served.ownership.session_id in inbox._held_back)
        served.full = False
        await until(partial(has, served, 1))
        assert not inbox._held_back
    finally:
        for task in (running, waking):
            task.cancel()
        await asyncio.wait([running, waking])


async def test_nothing_overtakes_what_another_node_accepted_before(
    broker: Broker, other: Broker, key: SessionKey
) -> None:
    served = await served_by(broker, key)
    await publish(broker, key, b"0")
    await publish(other, key, b"1")  # the publisher moves to the other node, and back
    await publish(broker, key, b"2")
    await broker.pull()
    assert served.payloads == [b"0", b"1", b"2"]


async def test_nothing_overtakes_what_had_no_room_in_the_same_batch(
    broker: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await served_by(broker, key)
    route = broker.route

    def without_room_for_the_first(publication: Publication) -> Routing | None:
        served.full = publication.message.payload == b"0"
        return route(publication)

    monkeypatch.setattr(broker, "route", without_room_for_the_first)
    await asyncio.gather(*(publish(broker, key, b"%d" % n) for n in range(3)))
    assert served.payloads == []
    await broker.pull()
    assert served.payloads == [b"0", b"1", b"2"]


async def test_a_message_waits_for_older_ones_that_are_being_handed_over(
    broker: Broker, other: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await served_by(broker, key)
    await publish(other, key, b"0")
    inbox = broker.messaging._inbox
    record, handed_over = inbox._record, inbox.handed_over
    recorded, go_on = asyncio.Event(), asyncio.Event()

    async def slow(reserved: Sequence[tuple[Any, Ownership, int]]) -> set[tuple[StoredSessionId, int]]:
        taken = await record(reserved)
        recorded.set()
        await go_on.wait()
        return taken

    async def committed(session_ids: set[StoredSessionId]) -> None:
        go_on.set()
        await handed_over(session_ids)

    monkeypatch.setattr(inbox, "_record", slow)
    monkeypatch.setattr(inbox, "handed_over", committed)
    pulling = asyncio.create_task(broker.pull())
    await recorded.wait()  # the packet id of 0 is committed, and the router does not know
    await publish(broker, key, b"1")
    go_on.set()
    await pulling
    assert served.payloads == [b"0", b"1"]


async def test_a_session_for_which_nothing_waits_costs_no_question(
    broker: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = []
    which_wait = storage.which_wait

    async def counted(
        connection: Connection, node_id: NodeId, sessions: Collection[StoredSessionId]
    ) -> set[StoredSessionId]:
        questions.append(set(sessions))
        return await which_wait(connection, node_id, sessions)

    monkeypatch.setattr(storage, "which_wait", counted)
    served = await served_by(broker, key)
    for n in range(4):
        await publish(broker, key, b"%d" % n, qos=2)
        await broker.messaging.received(served.ownership, served.sent[n][0])  # takes an ordinal for its place
        await broker.messaging.delivered(served.ownership, served.sent[n][0])
    assert served.payloads == [b"0", b"1", b"2", b"3"]
    assert questions == [{served.ownership.session_id}]


def test_what_is_known_of_a_queue_is_of_one_owner_and_one_place_and_bounded(key: SessionKey) -> None:
    def held(session_id: int, epoch: int, last_ordinal: int) -> Locked:
        return Locked(StoredSessionId(session_id), key, epoch, NodeId("a"), 60.0, last_ordinal, 0, 0)

    fronts = QueueFronts(kept=2)
    assert not fronts.current(held(1, 1, 0))
    fronts.reached(held(1, 1, 5))
    assert fronts.current(held(1, 1, 5))
    assert not fronts.current(held(1, 1, 6))
    assert not fronts.current(held(1, 2, 5))
    fronts.reached(held(1, 1, 4))  # told late
    assert fronts.current(held(1, 1, 5))
    fronts.reached(held(2, 1, 1))
    fronts.reached(held(3, 1, 1))
    assert [fronts.current(held(n, 1, last)) for n, last in ((1, 5), (2, 1), (3, 1))] == [False, True, True]


async def served_by(broker: Broker, key: SessionKey) -> Served:
    """A session that is connected here and subscribed to `t`."""
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    return served
