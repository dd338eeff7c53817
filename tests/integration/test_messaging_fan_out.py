"""One message for very many receivers, and one that cannot be handled: what they cost everybody else, on a real
PostgreSQL. Turns of the loop are counted, not timed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import pytest

from registry import publishing
from registry.errors import Unavailable
from registry.messaging_values import (
    Arrival,
    Message,
    Ownership,
    Publication,
    Published,
    QueuedMessage,
    Routing,
    SessionKey,
    StoredWill,
)
from registry.model import DeviceId, TenantId
from registry.pacing import TURN
from registry.storage import messaging as storage
from registry.storage.database import Connection
from registry.storage.messaging import Writes
from tests.messaging_brokers import Broker, Seconds, Served, broker_on
from tests.nodes import until


class Unhandled(Exception):
    """What no router should raise."""


@pytest.fixture
async def broker(dsn: str) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "a", Seconds()) as opened:
        yield opened


@pytest.fixture
async def other(dsn: str) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "b", Seconds()) as opened:
        yield opened


@pytest.fixture
def key(tenant_id: TenantId, device_id: DeviceId) -> SessionKey:
    return SessionKey(tenant_id, device_id, "client")


async def served_by(broker: Broker, key: SessionKey) -> Served:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t", 1)
    return served


async def publish(broker: Broker, key: SessionKey, *payloads: bytes) -> list[Published | BaseException]:
    """All of them in one batch."""
    return await asyncio.gather(
        *(broker.publish(key.tenant_id, key.device_id, "t", payload) for payload in payloads), return_exceptions=True
    )


class Crowd:
    """`count` receivers of each message, and how many had theirs before anybody else had a turn of the loop."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.served: list[int] = []
        self._since = 0
        self._going = True

    async def watch(self) -> None:
        while self._going:
            self._since = 0
            await asyncio.sleep(0)

    def stop(self) -> None:
        self._going = False

    def committed(self, publication: Publication, published: Published) -> Iterator[None]:
        return self._hand_out()

    def arrived(self, arrival: Arrival) -> Iterator[None]:
        return self._hand_out()

    def _hand_out(self) -> Iterator[None]:
        for _ in range(self.count):
            self._since += 1
            self.served.append(self._since)
            yield


async def test_others_have_their_turn_while_a_batch_is_handed_out(
    broker: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(3 * TURN)
    monkeypatch.setattr(broker, "committed", crowd.committed)
    watching = asyncio.create_task(crowd.watch())
    await publish(broker, key, b"0", b"1", b"2")
    crowd.stop()
    await watching
    assert len(crowd.served) == 9 * TURN
    assert max(crowd.served) <= TURN


async def test_others_have_their_turn_while_relays_are_handed_out(
    broker: Broker, other: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.messaging.watch(key.tenant_id, "t", stored=False, qos=1)
    crowd = Crowd(3 * TURN)
    monkeypatch.setattr(broker, "arrived", crowd.arrived)
    await publish(other, key, b"0", b"1")
    watching = asyncio.create_task(crowd.watch())
    await broker.pull()
    crowd.stop()
    await watching
    assert len(crowd.served) == 6 * TURN
    assert max(crowd.served) <= TURN


async def test_what_is_committed_is_handed_out_by_whoever_is_cancelled_meanwhile(
    broker: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(3 * TURN)

    def committed(publication: Publication, published: Published) -> Iterator[None]:
        for task in broker.messaging._publishing._batcher._running:
            task.cancel()
        return crowd.committed(publication, published)

    monkeypatch.setattr(broker, "committed", committed)
    outcomes = await publish(broker, key, b"0", b"1")
    assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
    assert len(crowd.served) == 6 * TURN


async def test_the_inbox_does_not_overtake_a_batch_that_is_being_handed_out(
    broker: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await served_by(broker, key)
    route, committed = broker.route, broker.committed

    def full_for_the_second(publication: Publication) -> Routing | None:
        served.full = publication.message.payload == b"1"
        return route(publication)

    def slow(publication: Publication, published: Published) -> Iterator[None]:
        if publication.message.payload == b"0":
            served.full = False  # the client has acknowledged something meanwhile
            pulling = asyncio.create_task(broker.pull())
            while not pulling.done():
                yield
        yield from committed(publication, published)

    monkeypatch.setattr(broker, "route", full_for_the_second)
    monkeypatch.setattr(broker, "committed", slow)
    await publish(broker, key, b"0", b"1")
    assert served.payloads == [b"0"]
    assert broker.messaging._inbox._wake.is_set()
    await broker.pull()
    assert served.payloads == [b"0", b"1"]


async def test_the_receivers_of_one_transaction_are_bounded(
    broker: Broker, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [SessionKey(tenant_id, device_id, f"client-{n}") for n in range(4)]
    sessions = [await served_by(broker, key) for key in keys]
    rows: list[int] = []
    write = storage.write

    async def counted(connection: Connection, writes: Writes, *rest: Any) -> None:
        rows.append(len(writes.rows))
        await write(connection, writes, *rest)

    monkeypatch.setattr(storage, "write", counted)
    monkeypatch.setattr(publishing, "MAX_RECEIVERS", 10)
    payloads = [b"%d" % n for n in range(32)]
    outcomes = await publish(broker, keys[0], *payloads)
    assert all(isinstance(outcome, Published) for outcome in outcomes)
    assert [session.payloads for session in sessions] == [payloads] * 4
    assert sum(rows) == 4 * 32
    assert max(rows) == 12  # the publication that reaches the bound is in, whole


async def test_who_is_stored_with_the_first_transaction_is_not_kept_waiting_for_the_others(
    broker: Broker, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch may have hundreds, where each message has a crowd of receivers."""
    key = SessionKey(tenant_id, device_id, "client")
    served = await served_by(broker, key)
    write, written, go_on = storage.write, 0, asyncio.Event()

    async def slow(connection: Connection, writes: Writes, *rest: Any) -> None:
        nonlocal written
        written += 1
        if written == 3:
            await go_on.wait()
        await write(connection, writes, *rest)

    monkeypatch.setattr(storage, "write", slow)
    monkeypatch.setattr(publishing, "MAX_RECEIVERS", 2)
    futures = [
        broker.messaging.publish(Publication(tenant_id, device_id, Message("t", b"%d" % n, 1))) for n in range(6)
    ]
    try:
        await until(lambda: written == 3)
        assert [future.done() for future in futures] == [True] * 4 + [False] * 2
        assert served.payloads == [b"0", b"1", b"2", b"3"]
    finally:
        go_on.set()
    assert all(isinstance(outcome, Published) for outcome in await asyncio.gather(*futures))
    assert written == 3


async def test_receivers_that_live_in_memory_count_as_well(
    broker: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[int] = []
    refresh = broker.messaging._routes.refresh

    async def counted(connection: Connection, tenants: Sequence[TenantId]) -> None:
        bodies.append(0)
        await refresh(connection, tenants)

    def route(publication: Publication) -> Routing:
        bodies[-1] += 1
        return Routing(live=4)

    monkeypatch.setattr(broker, "route", route)
    monkeypatch.setattr(broker.messaging._routes, "refresh", counted)
    monkeypatch.setattr(publishing, "MAX_RECEIVERS", 10)
    await publish(broker, key, *(b"%d" % n for n in range(7)))
    assert bodies == [3, 3, 1]


async def test_a_publication_that_cannot_be_routed_fails_alone(
    broker: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await served_by(broker, key)
    route = broker.route

    def unable(publication: Publication) -> Routing | None:
        if publication.message.payload == b"3":
            raise Unhandled
        return route(publication)

    monkeypatch.setattr(broker, "route", unable)
    outcomes = await publish(broker, key, *(b"%d" % n for n in range(6)))
    assert [type(outcome) for outcome in outcomes] == [*[Published] * 3, Unhandled, *[Published] * 2]
    assert served.payloads == [b"0", b"1", b"2", b"4", b"5"]


async def test_a_publication_whose_delivery_fails_is_stored_once_and_fails_nobody(
    broker: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await served_by(broker, key)
    committed = broker.committed

    def unable(publication: Publication, published: Published) -> Iterator[None]:
        if publication.message.payload == b"1":
            raise Unhandled
        return committed(publication, published)

    monkeypatch.setattr(broker, "committed", unable)
    outcomes = await publish(broker, key, b"0", b"1", b"2")
    assert [type(outcome) for outcome in outcomes] == [Published] * 3
    assert broker.evictions == [served.ownership]
    again, _ = await broker.connect(key)
    assert again.payloads == [b"0", b"1", b"2"]


async def test_a_will_that_cannot_be_handled_holds_up_no_other(
    broker: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await served_by(broker, key)
    for name in ("bad", "t"):
        dying, _ = await broker.connect(
            SessionKey(key.tenant_id, key.device_id, f"dying-{name}"), will=StoredWill(Message(name, b"will", 1))
        )
        await broker.disconnect(dying, publish_will=True)
    route = broker.route
    tried: list[str] = []

    def unable(publication: Publication) -> Routing | None:
        tried.append(publication.message.topic)
        if publication.message.topic == "bad":
            raise Unhandled
        return route(publication)

    monkeypatch.setattr(broker, "route", unable)
    await broker.messaging.tick()
    assert served.payloads == [b"will"]
    await broker.messaging.tick()
    assert sorted(tried) == ["bad", "t"]  # put off, not given up
    broker.clock.now += 60
    await broker.messaging.tick()
    assert sorted(tried) == ["bad", "bad", "t"]


async def test_a_relay_that_cannot_be_handled_holds_up_no_other(
    broker: Broker, other: Broker, key: SessionKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.messaging.watch(key.tenant_id, "t", stored=False, qos=1)
    heard: list[bytes] = []

    def arrived(arrival: Arrival) -> Iterator[None]:
        heard.append(arrival.message.payload)
        if arrival.message.payload == b"1":
            raise Unhandled
        yield

    monkeypatch.setattr(broker, "arrived", arrived)
    await publish(other, key, b"0", b"1", b"2")
    await broker.pull()
    await broker.pull()
    assert heard == [b"0", b"1", b"2"]


async def test_a_queued_message_that_cannot_be_handled_ends_its_own_session_only(
    broker: Broker, other: Broker, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [SessionKey(tenant_id, device_id, f"client-{n}") for n in range(3)]
    sessions: Mapping[Ownership, Served] = {s.ownership: s for s in [await served_by(broker, key) for key in keys]}
    unlucky = next(iter(sessions))
    queued = broker.queued

    def unable(ownership: Ownership, message: QueuedMessage) -> None:
        if ownership == unlucky:
            raise Unhandled
        queued(ownership, message)

    monkeypatch.setattr(broker, "queued", unable)
    await publish(other, keys[0], b"0")
    await broker.pull()
    assert broker.evictions == [unlucky]
    assert [served.payloads for served in sessions.values()] == [[], [b"0"], [b"0"]]
