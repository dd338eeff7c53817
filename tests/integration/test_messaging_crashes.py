"""The messaging store against kill -9 and lost answers: nothing acknowledged is missing, nothing of QoS 2 comes twice.

A publisher and a subscriber, played by their protocol, go through QoS 1 and QoS 2 in the small steps that a node takes:
what it writes, what it says. The node dies before every single step once; then another one, or the same again, takes
both sessions, and the clients repeat what they had no answer for, as they must (5.0 §4.4).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from registry.errors import Unavailable
from registry.messaging_values import Incoming, Message, OutcomeOpen, Publication, SessionKey, StoredSession
from registry.model import DeviceId, TenantId
from registry.storage import commits
from registry.storage.database import Database
from tests.conftest import MakeDevice
from tests.integration.test_uplinks import wired
from tests.messaging_brokers import Broker, Seconds, Served, broker_on


class Died(Exception):
    """The node is gone, in the middle of something."""


@dataclass
class Fuse:
    """Kills the node before its nth step."""

    steps: int

    def step(self) -> None:
        if self.steps == 0:
            raise Died
        self.steps -= 1


@dataclass
class Sender:
    """A publishing client: what it still has to finish, by packet id; `released`: PUBREC came, it sends PUBREL."""

    qos: int
    unfinished: dict[int, bytes] = field(default_factory=dict)
    released: set[int] = field(default_factory=set)


@dataclass
class Receiver:
    """A subscribing client: what its application got, and the QoS 2 ids that it has not seen released."""

    got: list[bytes] = field(default_factory=list)
    open_ids: set[int] = field(default_factory=set)

    def publish(self, packet_id: int, payload: bytes, qos: int) -> None:
        if qos == 2 and packet_id in self.open_ids:
            return  # a repetition
        if qos == 2:
            self.open_ids.add(packet_id)
        self.got.append(payload)


@dataclass
class Node:
    """What a server does with both clients, each step able to be its last."""

    broker: Broker
    fuse: Fuse
    writer: Served
    reader: Served
    incoming: set[int]
    phases: dict[int, tuple[int, bytes, bool]]
    """packet id → (ordinal, payload, released)"""

    async def accept(self, sender: Sender, packet_id: int) -> None:
        """One PUBLISH and, with QoS 2, its PUBREL, as far as we come."""
        payload = sender.unfinished[packet_id]
        if sender.qos == 1:
            self.fuse.step()
            await self.publish(payload, 1, None)
            self.fuse.step()
            del sender.unfinished[packet_id]  # PUBACK
            return
        if packet_id not in sender.released:
            self.fuse.step()
            if packet_id not in self.incoming:
                await self.publish(payload, 2, Incoming(self.writer.ownership, packet_id))
                self.incoming.add(packet_id)
            self.fuse.step()
            sender.released.add(packet_id)  # PUBREC
        self.fuse.step()
        await self.broker.messaging.released(self.writer.ownership, packet_id)
        self.incoming.discard(packet_id)
        self.fuse.step()
        sender.released.remove(packet_id)  # PUBCOMP
        del sender.unfinished[packet_id]

    async def publish(self, payload: bytes, qos: int, origin: Incoming | None) -> None:
        message = Message("t", payload, qos)
        key = KEYS[0]
        await self.broker.messaging.publish(Publication(key.tenant_id, key.device_id, message, origin))
        for ordinal, packet_id, sent in self.reader.sent[len(self.phases) :]:
            self.phases[packet_id] = (ordinal, sent.payload, False)

    async def deliver(self, receiver: Receiver, qos: int) -> None:
        for packet_id, (ordinal, payload, released) in list(self.phases.items()):
            if not released:
                self.fuse.step()
                receiver.publish(packet_id, payload, qos)
                if qos == 2:
                    self.fuse.step()  # PUBREC
                    await self.broker.messaging.received(self.reader.ownership, ordinal)
            if qos == 2:
                self.fuse.step()
                receiver.open_ids.discard(packet_id)  # PUBREL, PUBCOMP
            self.fuse.step()
            await self.broker.messaging.delivered(self.reader.ownership, ordinal)
            self.phases[packet_id] = (ordinal, payload, True)


KEYS: list[SessionKey] = []


async def serve(broker: Broker, fuse: Fuse) -> Node:
    writer, written = await broker.connect(KEYS[0])
    reader, resumed = await broker.connect(KEYS[1])
    phases = _phases(resumed)
    reader.sent = reader.sent[: len(phases)]
    return Node(broker, fuse, writer, reader, set(written.incoming) if written else set(), phases)


def _phases(resumed: StoredSession | None) -> dict[int, tuple[int, bytes, bool]]:
    outgoing = () if resumed is None else resumed.outgoing
    return {q.packet_id: (q.ordinal, q.message.payload, q.released) for q in outgoing}


@pytest.fixture
async def pair(dsn: str) -> AsyncIterator[tuple[Broker, Broker]]:
    clock = Seconds()
    async with broker_on(dsn, "a", clock) as first, broker_on(dsn, "b", clock) as second:
        yield first, second


@pytest.fixture
def keys(tenant_id: TenantId, device_id: DeviceId) -> Iterator[None]:
    KEYS[:] = [SessionKey(tenant_id, device_id, name) for name in ("writer", "reader")]
    yield
    KEYS.clear()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["restarted", "taken over"])
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_node_that_dies_before_any_step_loses_nothing_and_doubles_no_qos_2(
    pair: tuple[Broker, Broker], keys: None, database: Database, qos: int, elsewhere: bool
) -> None:
    payloads = [b"one", b"two"]
    for fatal in range(100):
        for key in KEYS:
            served, _ = await pair[0].connect(key, clean=True)
            if key is KEYS[1]:
                await pair[0].subscribe(served, "t", qos)
        sender = Sender(qos, dict(enumerate(payloads, 1)))
        receiver = Receiver()
        deaths = await run_through(pair, Fuse(fatal), sender, receiver, elsewhere)
        assert sender.unfinished == {}
        if qos == 2:
            assert receiver.got == payloads
        else:
            assert list(dict.fromkeys(receiver.got)) == payloads
        async with database.connection() as connection:
            for table in ("messaging_queue", "messaging_incoming", "messaging_message"):
                assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 0, (table, fatal)
        if deaths == 0:
            assert fatal > (12 if qos == 2 else 6)  # it did go through every step
            return
    raise AssertionError("it never came to an end")


async def run_through(
    pair: tuple[Broker, Broker], fuse: Fuse, sender: Sender, receiver: Receiver, elsewhere: bool
) -> int:
    """All that there is to do, with one death; how many there were."""
    at, deaths = pair[0], 0
    while True:
        try:
            node = await serve(at, fuse)
            for packet_id in list(sender.unfinished):
                await node.accept(sender, packet_id)
            await node.deliver(receiver, sender.qos)
            return deaths
        except Died:
            deaths += 1
            if elsewhere:
                at = pair[1]
            else:
                await at.crash()
            fuse.steps = 10_000


# Answers that are lost.


async def test_a_commit_whose_answer_is_lost_is_recognised(
    dsn: str, pair: tuple[Broker, Broker], keys: None, tmp_path: Path
) -> None:
    async with wired(dsn, tmp_path) as (wire, through):
        broker = Broker(through, "c", Seconds(), None)
        await broker.start()
        reader, _ = await broker.connect(KEYS[1])
        await broker.subscribe(reader, "t")
        writer, _ = await broker.connect(KEYS[0])
        wire.lose_the_answer_to(b"COMMIT")
        sending = [
            broker.publish(
                KEYS[0].tenant_id, KEYS[0].device_id, "t", b"1", qos=2, origin=Incoming(writer.ownership, 1)
            ),
            broker.publish(KEYS[0].tenant_id, KEYS[0].device_id, "t", b"2"),
        ]
        published = await asyncio.gather(*sending)
        assert wire.lost == 1
        assert [p.duplicate for p in published] == [False, False]
        assert reader.payloads == [b"1", b"2"]
        wire.lose_the_answer_to(b"COMMIT")
        await broker.messaging.received(reader.ownership, reader.sent[0][0])
        wire.lose_the_answer_to(b"COMMIT")
        await broker.messaging.delivered(reader.ownership, reader.sent[1][0])
        wire.lose_the_answer_to(b"COMMIT")
        await broker.subscribe(reader, "u")
        wire.lose_the_answer_to(b"COMMIT")
        await broker.disconnect(reader)
        wire.lose_the_answer_to(b"COMMIT")
        _, resumed = await broker.connect(KEYS[1])
        assert wire.lost == 6
        assert resumed is not None
        assert [(q.message.payload, q.released) for q in resumed.outgoing] == [(b"1", True)]
        assert {s.filter for s in resumed.subscriptions} == {"t", "u"}
        await broker.messaging.stop()


async def test_a_connection_lost_before_the_commit_stores_nothing_and_is_tried_again(
    pair: tuple[Broker, Broker], keys: None, database: Database
) -> None:
    broker = pair[0]
    reader, _ = await broker.connect(KEYS[1])
    await broker.subscribe(reader, "t")
    async with database.connection() as blocker:
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("SELECT FROM messaging_session FOR UPDATE")
        sending = asyncio.ensure_future(broker.publish(KEYS[0].tenant_id, KEYS[0].device_id, "t", b"x"))
        async with asyncio.timeout(10):
            while not await blocker.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE wait_event_type = 'Lock' AND pid <> pg_backend_pid() AND datname = current_database()"
            ):
                await asyncio.sleep(0.01)
        await transaction.rollback()
    assert len((await sending).placements) == 1
    assert reader.payloads == [b"x"]
    assert len(reader.taken_ids) == 1  # what the failed try had reserved went back


async def test_an_outcome_that_cannot_be_learned_is_open_and_closes_who_might_hold_it(
    pair: tuple[Broker, Broker], keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = pair[0]
    reader, _ = await broker.connect(KEYS[1])
    await broker.subscribe(reader, "t")

    async def nobody_knows(*_: object) -> bool:
        raise OutcomeOpen("nobody knows")

    monkeypatch.setattr(commits, "_was_committed", nobody_knows)
    real = broker.database.transaction

    def losing() -> Any:
        return _Losing(real())

    monkeypatch.setattr(broker.database, "transaction", losing)
    with pytest.raises(OutcomeOpen):
        await broker.publish(KEYS[0].tenant_id, KEYS[0].device_id, "t", b"x")
    monkeypatch.undo()
    assert broker.evictions == [reader.ownership]
    again, _ = await broker.connect(KEYS[1])
    assert again.payloads == [b"x"]


class _Losing:
    """A transaction that commits and does not say so."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def __aenter__(self) -> Any:
        return await self._inner.__aenter__()

    async def __aexit__(self, *error: Any) -> bool | None:
        done: bool | None = await self._inner.__aexit__(*error)
        if error[0] is None:
            raise Unavailable("the answer was lost")
        return done


async def test_an_unstorable_message_harms_nobody_else(
    pair: tuple[Broker, Broker], keys: None, make_device: MakeDevice
) -> None:
    broker = pair[0]
    reader, _ = await broker.connect(KEYS[1])
    await broker.subscribe(reader, "#")
    sending = [
        broker.publish(KEYS[0].tenant_id, KEYS[0].device_id, topic, topic.encode(), qos=qos)
        for topic, qos in (("a", 1), ("no qos", 40_000), ("b", 1), ("c", 1))
    ]
    outcomes = await asyncio.gather(*sending, return_exceptions=True)
    assert [isinstance(o, Exception) for o in outcomes] == [False, True, False, False]
    assert reader.payloads == [b"a", b"b", b"c"]
    assert reader.taken_ids == {packet_id for _, packet_id, _ in reader.sent}
