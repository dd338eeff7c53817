"""The messaging store on a real PostgreSQL: what is acknowledged survives, enters and leaves once, stays apart."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from registry.errors import ResourceExhausted, Unavailable
from registry.messaging_limits import MessagingLimits
from registry.messaging_values import (
    Incoming,
    Message,
    Opening,
    Publication,
    QueueFull,
    Recipient,
    Relay,
    Reserved,
    Routing,
    SessionKey,
    SessionLost,
    StoredSubscription,
    StoredWill,
)
from registry.model import CredentialId, DeviceId, NodeId, TenantId
from registry.storage.database import Database
from tests.conftest import MakeDevice, MakeTenant
from tests.messaging_brokers import NOON, Broker, Seconds, broker, broker_on, clock, key, other

__all__ = ["broker", "clock", "key", "other"]


async def rows(database: Database, table: str) -> int:
    async with database.connection() as connection:
        number: int = await connection.fetchval(f"SELECT count(*) FROM {table}")
        return number


async def counters(database: Database) -> tuple[int, int, int, int]:
    """Queued messages and bytes as sessions count them, and as they are."""
    async with database.connection() as connection:
        row = await connection.fetchrow(
            """
            SELECT (SELECT coalesce(sum(queued_messages), 0) FROM messaging_session),
                   (SELECT coalesce(sum(queued_bytes), 0) FROM messaging_session),
                   (SELECT count(*) FROM messaging_queue), (SELECT coalesce(sum(size), 0) FROM messaging_queue)
            """
        )
    assert row is not None
    return tuple(int(value) for value in row)  # type: ignore[return-value]


# Queues.


async def test_a_message_for_an_offline_session_waits_until_it_is_acknowledged(
    broker: Broker, database: Database, key: SessionKey
) -> None:
    served, resumed = await broker.connect(key)
    assert resumed is None
    await broker.subscribe(served, "site/+/alarm", 1)
    await broker.disconnect(served)
    await broker.publish(key.tenant_id, key.device_id, "site/7/alarm", b"fire", qos=2)
    served, resumed = await broker.connect(key)
    assert resumed is not None
    (queued,) = resumed.outgoing
    assert (queued.message, queued.qos, queued.fresh) == (Message("site/7/alarm", b"fire", 2), 1, True)
    assert resumed.subscriptions == (StoredSubscription("site/+/alarm", 1),)
    await broker.messaging.delivered(served.ownership, queued.ordinal)
    await broker.disconnect(served)
    assert (await broker.connect(key))[1] is not None
    assert await rows(database, "messaging_queue") == await rows(database, "messaging_message") == 0
    assert await counters(database) == (0, 0, 0, 0)


async def test_a_live_session_gets_it_under_the_packet_id_that_is_stored_with_it(
    broker: Broker, key: SessionKey
) -> None:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    await asyncio.gather(*(broker.publish(key.tenant_id, key.device_id, "t", str(n).encode()) for n in range(40)))
    assert served.payloads == [str(n).encode() for n in range(40)]
    ids = [packet_id for _, packet_id, _ in served.sent]
    await broker.crash()
    again, resumed = await broker.connect(key)
    assert resumed is not None
    assert [q.packet_id for q in resumed.outgoing] == ids
    assert not any(q.fresh for q in resumed.outgoing)
    assert again.payloads == served.payloads
    assert again.ownership.epoch > served.ownership.epoch


async def test_a_body_is_stored_once_and_goes_with_its_last_reader(
    broker: Broker, database: Database, tenant_id: TenantId, make_device: MakeDevice
) -> None:
    readers = []
    for _ in range(3):
        served, _ = await broker.connect(SessionKey(tenant_id, await make_device(tenant_id), "c"))
        await broker.subscribe(served, "#")
        readers.append(served)
    await broker.publish(tenant_id, DeviceId(uuid4()), "t", b"x" * 1000)
    assert await rows(database, "messaging_message") == 1
    for left, served in zip((1, 1, 0), readers, strict=True):
        await broker.messaging.delivered(served.ownership, served.sent[0][0])
        assert await rows(database, "messaging_message") == left


async def test_overlapping_subscriptions_make_one_delivery_with_all_identifiers(
    broker: Broker, key: SessionKey
) -> None:
    served, _ = await broker.connect(key)
    subscriptions = [StoredSubscription("a/#", 1, identifier=7), StoredSubscription("a/b", 2, identifier=8)]
    await broker.messaging.subscribe(served.ownership, subscriptions)
    await broker.disconnect(served)
    await broker.publish(key.tenant_id, key.device_id, "a/b", b"1", qos=2)
    _, resumed = await broker.connect(key)
    assert resumed is not None
    (queued,) = resumed.outgoing
    assert (queued.qos, sorted(queued.subscription_identifiers)) == (2, [7, 8])
    assert set(resumed.subscriptions) == set(subscriptions)


async def test_an_unsubscribed_session_gets_nothing_more(broker: Broker, key: SessionKey) -> None:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    await broker.messaging.unsubscribe(served.ownership, ["t", "never/there"])
    published = await broker.publish(key.tenant_id, key.device_id, "t", b"x")
    assert published.placements == ()
    await broker.subscribe(served, "t")
    assert len((await broker.publish(key.tenant_id, key.device_id, "t", b"y")).placements) == 1


async def test_a_clean_start_ends_what_there_was(broker: Broker, database: Database, key: SessionKey) -> None:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    await broker.disconnect(served)
    await broker.publish(key.tenant_id, key.device_id, "t", b"x")
    taken = await broker.messaging.take(Opening(key, CredentialId(uuid4()), clean=True, expiry=0.0))
    assert taken.ownership is None
    assert taken.resumed is None
    assert await rows(database, "messaging_session") == await rows(database, "messaging_queue") == 0
    assert (await broker.publish(key.tenant_id, key.device_id, "t", b"y")).routing.recipients == ()


async def test_a_session_resumed_with_expiry_zero_ends_with_its_connection(
    broker: Broker, database: Database, key: SessionKey
) -> None:
    served, _ = await broker.connect(key)
    await broker.disconnect(served)
    served, resumed = await broker.connect(key, expiry=0.0)
    assert resumed is not None
    await broker.disconnect(served)
    assert await rows(database, "messaging_session") == 0


async def test_a_message_that_expires_unsent_is_not_delivered(
    broker: Broker, database: Database, key: SessionKey, clock: Seconds
) -> None:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    await broker.publish(key.tenant_id, key.device_id, "t", b"never sent", expires_at=clock.now + 10)
    await broker.publish(key.tenant_id, key.device_id, "t", b"perhaps sent", expires_at=clock.now + 10)
    await broker.disconnect(served, unsent=[served.sent[0][0]])
    await broker.publish(key.tenant_id, key.device_id, "t", b"offline", expires_at=clock.now + 10)
    clock.now += 11
    await broker.messaging.prune()
    assert await rows(database, "messaging_queue") == 1
    again, _ = await broker.connect(key)
    assert again.payloads == [b"perhaps sent"]
    assert (await counters(database))[0] == 1


async def test_of_two_rows_under_one_packet_id_the_older_is_done(
    broker: Broker, database: Database, key: SessionKey
) -> None:
    # The owner saw the end of the first, reused its id, and died before the end was recorded.
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    await broker.publish(key.tenant_id, key.device_id, "t", b"done")
    served.next_id = 1
    await broker.publish(key.tenant_id, key.device_id, "t", b"open")
    await broker.crash()
    again, _ = await broker.connect(key)
    assert again.payloads == [b"open"]
    messages, size, _, _ = await counters(database)
    assert await counters(database) == (1, size, messages, size)


# QoS 2.


async def test_a_qos_2_message_enters_once_whatever_is_repeated(
    broker: Broker, database: Database, key: SessionKey, make_device: MakeDevice
) -> None:
    reader, _ = await broker.connect(SessionKey(key.tenant_id, await make_device(key.tenant_id), "r"))
    await broker.subscribe(reader, "t")
    sender, _ = await broker.connect(key)
    origin = Incoming(sender.ownership, 5)
    await broker.publish(key.tenant_id, key.device_id, "t", b"once", qos=2, origin=origin)
    again = await broker.publish(key.tenant_id, key.device_id, "t", b"once", qos=2, origin=origin)
    assert again.duplicate
    both = await asyncio.gather(
        *(
            broker.publish(key.tenant_id, key.device_id, "t", b"two", qos=2, origin=Incoming(sender.ownership, 6))
            for _ in range(2)
        )
    )
    assert sorted(p.duplicate for p in both) == [False, True]
    assert reader.payloads == [b"once", b"two"]
    assert reader.taken_ids == {packet_id for _, packet_id, _ in reader.sent}  # the rest was given back
    await broker.crash()
    sender, resumed = await broker.connect(key)
    assert resumed is not None
    assert resumed.incoming == (5, 6)
    await broker.messaging.released(sender.ownership, 5)
    await broker.messaging.released(sender.ownership, 5)
    third = await broker.publish(
        key.tenant_id, key.device_id, "t", b"next", qos=2, origin=Incoming(sender.ownership, 5)
    )
    assert not third.duplicate


async def test_releases_come_back_in_the_order_of_their_receipts(broker: Broker, key: SessionKey) -> None:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    for n in range(4):
        await broker.publish(key.tenant_id, key.device_id, "t", bytes([n]), qos=2)
    ordinals = [ordinal for ordinal, _, _ in served.sent]
    await asyncio.gather(*(broker.messaging.received(served.ownership, ordinals[n]) for n in (2, 0)))
    await broker.messaging.received(served.ownership, ordinals[2])  # a repetition keeps its place
    await broker.crash()
    _, resumed = await broker.connect(key)
    assert resumed is not None
    assert [(q.message.payload[0], q.released) for q in resumed.outgoing] == [
        (1, False),
        (3, False),
        (2, True),
        (0, True),
    ]


# Owners.


async def test_a_taken_session_fences_its_earlier_owner_off(broker: Broker, other: Broker, key: SessionKey) -> None:
    old, _ = await broker.connect(key)
    await broker.subscribe(old, "t")
    await broker.publish(key.tenant_id, key.device_id, "t", b"1")
    new, resumed = await other.connect(key)
    assert resumed is not None
    assert new.payloads == [b"1"]
    for refused in (
        broker.messaging.delivered(old.ownership, old.sent[0][0]),
        broker.messaging.received(old.ownership, old.sent[0][0]),
        broker.messaging.released(old.ownership, 1),
        broker.messaging.subscribe(old.ownership, [StoredSubscription("u", 1)]),
        broker.messaging.unsubscribe(old.ownership, ["t"]),
        broker.publish(key.tenant_id, key.device_id, "x", b"", qos=2, origin=Incoming(old.ownership, 9)),
        broker.messaging.release(old.ownership, publish_will=True),
        broker.messaging.end(old.ownership),
    ):
        with pytest.raises(SessionLost):
            await refused
    await broker.pull()
    assert broker.evictions == [old.ownership]
    # What the old node still sends its way reaches the new owner.
    broker.served[old.ownership.session_id] = old
    published = await broker.publish(key.tenant_id, key.device_id, "t", b"2")
    assert published.placements[0].packet_id is None
    await other.pull()
    assert new.payloads == [b"1", b"2"]
    assert old.payloads == [b"1"]


async def test_many_takers_leave_one_owner(broker: Broker, other: Broker, key: SessionKey) -> None:
    opening = Opening(key, CredentialId(uuid4()), clean=False, expiry=60.0)
    taken = await asyncio.gather(*(b.messaging.take(opening) for b in (broker, other) * 5))
    owners = [t.ownership for t in taken if t.ownership is not None]
    assert len({o.session_id for o in owners}) == 1
    assert sorted(o.epoch for o in owners) == list(range(1, 11))
    assert [t.resumed is None for t in taken].count(True) == 1


async def test_messages_of_another_node_get_a_packet_id_before_they_are_sent(
    broker: Broker, other: Broker, key: SessionKey
) -> None:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    for n in range(3):
        await other.publish(key.tenant_id, key.device_id, "t", bytes([n]), qos=2)
    await broker.pull()
    assert served.payloads == [b"\0", b"\1", b"\2"]
    ids = [packet_id for _, packet_id, _ in served.sent]
    await broker.crash()
    _, resumed = await broker.connect(key)
    assert resumed is not None
    assert [(q.packet_id, q.fresh) for q in resumed.outgoing] == [(i, False) for i in ids]


async def test_a_session_without_room_holds_messages_back_in_their_order(
    broker: Broker, other: Broker, key: SessionKey
) -> None:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "t")
    await broker.publish(key.tenant_id, key.device_id, "t", b"0")
    served.full = True
    await other.publish(key.tenant_id, key.device_id, "t", b"1")
    await broker.pull()
    served.full = False
    await broker.publish(key.tenant_id, key.device_id, "t", b"2")  # must not overtake
    assert served.payloads == [b"0"]
    await broker.messaging.delivered(served.ownership, served.sent[0][0])
    await broker.pull()
    assert served.payloads == [b"0", b"1", b"2"]
    assert served.taken_ids == {packet_id for _, packet_id, _ in served.sent}


async def test_a_subscription_is_known_everywhere_when_it_is_acknowledged(
    broker: Broker, other: Broker, tenant_id: TenantId, make_device: MakeDevice
) -> None:
    # No loop runs here: publications alone keep the routes current.
    for n in range(10):
        at, away = (broker, other) if n % 2 else (other, broker)
        served, _ = await at.connect(SessionKey(tenant_id, await make_device(tenant_id), "c"))
        await at.subscribe(served, f"n/{n}")
        assert len((await away.publish(tenant_id, served_device(), f"n/{n}", b"")).placements) == 1
        await at.messaging.unsubscribe(served.ownership, [f"n/{n}"])
        assert (await away.publish(tenant_id, served_device(), f"n/{n}", b"")).placements == ()


def served_device() -> DeviceId:
    return DeviceId(uuid4())


async def test_sessions_that_are_not_stored_are_reached_through_their_node(
    broker: Broker, other: Broker, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    await other.messaging.watch(tenant_id, "t/#", stored=False, qos=2)
    await other.messaging.watch(tenant_id, "t/#", stored=False, qos=2)
    await other.messaging.watch(tenant_id, "$share/g/s", stored=False, qos=1)
    await other.messaging.watch(tenant_id, "d", stored=True, qos=1)
    await broker.publish(tenant_id, device_id, "t/1", b"1", qos=2)
    await broker.publish(tenant_id, device_id, "s", b"2")
    await broker.publish(tenant_id, device_id, "d", b"3")  # its queue brings it
    await other.pull()
    await other.pull()
    assert [(a.message.payload, a.direct, a.shared) for a in other.arrivals] == [
        (b"1", True, ()),
        (b"2", False, ("$share/g/s",)),
    ]
    assert await rows(database, "messaging_message") == await rows(database, "messaging_relay") == 0
    zero = Publication(tenant_id, device_id, Message("d", b"4"))
    assert broker.messaging.relay(zero, [Relay(NodeId("b"), True)])
    await other.messaging.unwatch(tenant_id, "t/#", stored=False, qos=2)
    assert (await broker.publish(tenant_id, device_id, "t/1", b"5")).routing.relays != ()
    await other.messaging.unwatch(tenant_id, "t/#", stored=False, qos=2)
    assert (await broker.publish(tenant_id, device_id, "t/1", b"6")).routing.relays == ()
    await other.pull()
    assert [a.message.payload for a in other.arrivals[2:]] == [b"4", b"5"]


async def test_what_nobody_wants_any_more_goes_when_the_database_is_back(
    broker: Broker, other: Broker, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.message_routes.RETRY_PAUSES", ())
    for text in ("gone", "wanted"):
        await other.messaging.watch(tenant_id, text, stored=False, qos=1)
    with monkeypatch.context() as outage:
        outage.setattr(other.database, "transaction", broken)
        for text in ("gone", "wanted"):
            await other.messaging.unwatch(tenant_id, text, stored=False, qos=1)
        with pytest.raises(Unavailable):
            await other.messaging.prune()
    await other.messaging.watch(tenant_id, "wanted", stored=False, qos=1)
    assert (await broker.publish(tenant_id, device_id, "gone", b"")).routing.relays
    await other.messaging.prune()
    assert not (await broker.publish(tenant_id, device_id, "gone", b"")).routing.relays
    assert (await broker.publish(tenant_id, device_id, "wanted", b"")).routing.relays
    await other.messaging.unwatch(tenant_id, "wanted", stored=False, qos=1)
    assert not (await broker.publish(tenant_id, device_id, "wanted", b"")).routing.relays


def broken() -> None:
    raise Unavailable("the database is away")


async def test_the_loops_carry_messages_and_routes_by_hints(broker: Broker, other: Broker, key: SessionKey) -> None:
    tasks = [asyncio.create_task(b.messaging.run()) for b in (broker, other)]
    try:
        served, _ = await broker.connect(key)
        await broker.subscribe(served, "t")
        for each in (broker, other):
            await each.messaging.follow_tenant(key.tenant_id)
        await other.publish(key.tenant_id, key.device_id, "t", b"x")
        async with asyncio.timeout(10):
            while served.payloads != [b"x"]:
                await asyncio.sleep(0.005)
            new, _ = await other.connect(key)
            while not broker.evictions:
                await asyncio.sleep(0.005)
            await other.messaging.unsubscribe(new.ownership, ["t"])
            while len(broker.tables[key.tenant_id]):
                await asyncio.sleep(0.005)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# Tenants and limits.


async def test_tenants_do_not_meet(
    broker: Broker, key: SessionKey, make_tenant: MakeTenant, make_device: MakeDevice
) -> None:
    served, _ = await broker.connect(key)
    await broker.subscribe(served, "#")
    stranger = await make_tenant()
    device = await make_device(stranger)
    await broker.publish(stranger, device, "t", b"x", retain=True)
    assert served.sent == []
    assert await broker.messaging.retained_topics(key.tenant_id, "") == []
    # Even a router that errs does not carry a message across.
    wrong = Routing((Recipient(served.ownership.session_id, 1, reserved=Reserved(1, 1)),))
    served.taken_ids.add(1)
    published = await broker.messaging.enqueue(Publication(stranger, device, Message("t", b"x", 1)), wrong)
    assert published.placements == ()
    assert published.gone == (served.ownership.session_id,)


async def test_a_full_queue_refuses_the_whole_publication(
    dsn: str, clock: Seconds, tenant_id: TenantId, make_device: MakeDevice, database: Database
) -> None:
    async with broker_on(dsn, "a", clock, MessagingLimits(queued_messages=3, queued_bytes=2_000)) as broker:
        first, _ = await broker.connect(SessionKey(tenant_id, await make_device(tenant_id), "c"))
        second, _ = await broker.connect(SessionKey(tenant_id, await make_device(tenant_id), "c"))
        await broker.subscribe(first, "t")
        await broker.subscribe(second, "#")
        sending = [broker.publish(tenant_id, served_device(), "u", b"") for _ in range(5)]
        outcomes = await asyncio.gather(*sending, return_exceptions=True)
        assert [isinstance(o, QueueFull) for o in outcomes] == [False] * 3 + [True] * 2
        with pytest.raises(QueueFull):
            await broker.publish(tenant_id, served_device(), "t", b"")
        assert first.sent == []
        assert first.taken_ids == set()
        assert broker.messaging.overflowed == 3
        for ordinal, _, _ in list(second.sent):
            await broker.messaging.delivered(second.ownership, ordinal)
        with pytest.raises(QueueFull, match="bytes"):
            await broker.publish(tenant_id, served_device(), "t", bytes(1_900))
        await broker.publish(tenant_id, served_device(), "t", b"")
        assert len(first.sent) == 1
        assert (await counters(database))[:2] == (await counters(database))[2:]


async def test_a_tenant_queues_so_much_in_all(
    dsn: str, clock: Seconds, key: SessionKey, make_tenant: MakeTenant, make_device: MakeDevice
) -> None:
    async with broker_on(dsn, "a", clock, MessagingLimits(tenant_messages=2)) as broker:
        served, _ = await broker.connect(key)
        await broker.subscribe(served, "t")
        for _ in range(2):
            await broker.publish(key.tenant_id, key.device_id, "t", b"")
        with pytest.raises(QueueFull, match="tenant"):
            await broker.publish(key.tenant_id, key.device_id, "t", b"")
        stranger = await make_tenant()
        theirs, _ = await broker.connect(SessionKey(stranger, await make_device(stranger), "c"))
        await broker.subscribe(theirs, "t")
        await broker.publish(stranger, served_device(), "t", b"")
        await broker.messaging.delivered(served.ownership, served.sent[0][0])
        await broker.messaging.count_queues()
        await broker.publish(key.tenant_id, key.device_id, "t", b"")
        assert len(served.sent) == 3


async def test_a_device_has_so_many_stored_sessions(dsn: str, clock: Seconds, key: SessionKey) -> None:
    async with broker_on(dsn, "a", clock, MessagingLimits(sessions_per_device=2)) as broker:
        for n in range(2):
            await broker.connect(SessionKey(key.tenant_id, key.device_id, str(n)))
        with pytest.raises(ResourceExhausted):
            await broker.connect(SessionKey(key.tenant_id, key.device_id, "2"))
        await broker.connect(SessionKey(key.tenant_id, key.device_id, "1"), clean=True)


# Retained messages.


async def test_the_last_retained_message_of_a_topic_is_kept_until_an_empty_one(
    broker: Broker, other: Broker, tenant_id: TenantId, device_id: DeviceId, clock: Seconds
) -> None:
    sending = [broker.publish(tenant_id, device_id, "a/b", bytes([n]), qos=0, retain=True) for n in range(3)]
    await asyncio.gather(*sending)
    await broker.publish(tenant_id, device_id, "a/c", b"c", retain=True, expires_at=clock.now + 5)
    await broker.publish(tenant_id, device_id, "ab", b"d", retain=True)
    assert await other.messaging.retained_topics(tenant_id, "a/") == ["a/b", "a/c"]
    assert await other.messaging.retained_topics(tenant_id, "") == ["a/b", "a/c", "ab"]
    (kept,) = await other.messaging.retained(tenant_id, ["a/b", "nothing"])
    assert (kept.message.payload, kept.message.retain, kept.device_id) == (b"\2", True, device_id)
    await other.publish(tenant_id, device_id, "a/b", b"", retain=True)
    clock.now += 5
    assert await broker.messaging.retained_topics(tenant_id, "a/") == []
    await broker.messaging.prune()
    assert await rows(broker.database, "messaging_retained") == 1
    assert await broker.messaging.forget_retained(tenant_id, [(device_id, each) for each in ("ab", "ab", "a/b")]) == 1
    async with broker.database.connection() as connection:
        row = await connection.fetchrow("SELECT retained_messages, retained_bytes FROM messaging_tenant")
    assert row is not None
    assert tuple(row) == (0, 0)


async def test_a_tenant_retains_so_much_and_replacing_costs_nothing(
    dsn: str, clock: Seconds, tenant_id: TenantId, device_id: DeviceId
) -> None:
    async with broker_on(dsn, "a", clock, MessagingLimits(retained_messages=2, retained_bytes=3_000)) as broker:
        for topic in ("a", "b", "a"):
            await broker.publish(tenant_id, device_id, topic, b"x", retain=True)
        with pytest.raises(QueueFull, match="retained"):
            await broker.publish(tenant_id, device_id, "c", b"x", retain=True)
        with pytest.raises(QueueFull, match="bytes"):
            await broker.publish(tenant_id, device_id, "a", bytes(2_800), retain=True)
        await broker.publish(tenant_id, device_id, "a", b"", retain=True)
        await broker.publish(tenant_id, device_id, "c", b"x", retain=True)
        assert await broker.messaging.retained_topics(tenant_id, "") == ["b", "c"]


# Wills, expiry, ends.


def a_will(delay: float = 0.0, **options: Any) -> StoredWill:
    return StoredWill(Message("will", b"gone", 1, **options), delay, 60.0)


async def watcher(broker: Broker, tenant_id: TenantId, make_device: MakeDevice) -> Any:
    served, _ = await broker.connect(SessionKey(tenant_id, await make_device(tenant_id), "watcher"))
    await broker.subscribe(served, "will")
    return served


async def test_a_will_is_published_once_whoever_looks(
    broker: Broker, other: Broker, key: SessionKey, make_device: MakeDevice, clock: Seconds
) -> None:
    watching = await watcher(broker, key.tenant_id, make_device)
    served, _ = await broker.connect(key, will=a_will(10.0))
    await broker.disconnect(served, publish_will=True)
    await broker.messaging.tick()
    assert watching.sent == []
    clock.now += 10
    await asyncio.gather(*(b.messaging.tick() for b in (broker, other, broker, other)))
    await broker.pull()
    assert watching.payloads == [b"gone"]
    assert watching.sent[0][2].expires_at == NOON + 70
    assert await rows(broker.database, "messaging_will") == 0


async def test_a_goodbye_or_a_return_in_time_drops_the_will(
    broker: Broker, key: SessionKey, make_device: MakeDevice, clock: Seconds
) -> None:
    watching = await watcher(broker, key.tenant_id, make_device)
    served, _ = await broker.connect(key, will=a_will())
    await broker.disconnect(served)
    served, _ = await broker.connect(key, will=a_will(10.0))
    await broker.disconnect(served, publish_will=True)
    clock.now += 9
    served, _ = await broker.connect(key)
    clock.now += 9
    await broker.messaging.tick()
    assert watching.sent == []


async def test_a_will_is_due_when_its_session_ends_or_its_connection_is_taken_over(
    broker: Broker, other: Broker, key: SessionKey, make_device: MakeDevice, clock: Seconds
) -> None:
    watching = await watcher(broker, key.tenant_id, make_device)
    await broker.connect(key, will=a_will())
    await other.connect(key, will=a_will(1000.0))  # taken over: the first one has no delay
    await broker.messaging.tick()
    assert len(watching.sent) == 1
    served, _ = await broker.connect(key, clean=True, expiry=5.0, will=a_will(1000.0))  # ended: the delay is cut
    await broker.messaging.tick()
    assert len(watching.sent) == 2
    await broker.disconnect(served, publish_will=True)
    clock.now += 5
    await broker.messaging.tick()  # so is it at the session's expiry
    await broker.messaging.tick()
    assert len(watching.sent) == 3


async def test_a_will_whose_author_may_not_publish_any_more_is_dropped(
    broker: Broker, key: SessionKey, make_device: MakeDevice
) -> None:
    watching = await watcher(broker, key.tenant_id, make_device)
    served, _ = await broker.connect(key, will=a_will(retain=True))
    await broker.disconnect(served, publish_will=True)
    broker.forbid = True
    await broker.messaging.tick()
    assert watching.sent == []
    assert await rows(broker.database, "messaging_will") == await rows(broker.database, "messaging_retained") == 0


async def test_a_session_expires_with_all_that_is_its(
    broker: Broker, database: Database, key: SessionKey, clock: Seconds
) -> None:
    served, _ = await broker.connect(key, expiry=30.0)
    await broker.subscribe(served, "t")
    await broker.publish(key.tenant_id, key.device_id, "t", b"x", qos=2, origin=Incoming(served.ownership, 1))
    await broker.disconnect(served)
    eternal, _ = await broker.connect(SessionKey(key.tenant_id, key.device_id, "eternal"), expiry=float("inf"))
    await broker.disconnect(eternal)
    clock.now += 29
    await broker.messaging.tick()
    assert await rows(database, "messaging_session") == 2
    clock.now += 1
    assert (await broker.messaging.take(Opening(key, CredentialId(uuid4()), False, 0.0))).resumed is None
    clock.now += 1e9
    await broker.messaging.tick()
    assert await rows(database, "messaging_session") == 1
    await broker.messaging.prune()
    for table in ("messaging_queue", "messaging_incoming", "messaging_message"):
        assert await rows(database, table) == 0
    assert (await broker.publish(key.tenant_id, key.device_id, "t", b"")).routing.recipients == ()


async def credential(database: Database, key: SessionKey) -> CredentialId:
    credential_id = CredentialId(uuid4())
    async with database.connection() as connection:
        await connection.execute(
            """
            INSERT INTO credential (credential_id, tenant_id, device_id, kind, lookup)
            VALUES ($1, $2, $3, 'api_key', $4)
            """,
            credential_id,
            key.tenant_id,
            key.device_id,
            credential_id.bytes,
        )
    return credential_id


async def revoke(database: Database, credential_id: CredentialId, reason: str) -> None:
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE credential SET revoked_at = now(), revoked_reason = $2 WHERE credential_id = $1",
            credential_id,
            reason,
        )


@pytest.mark.parametrize("seen_by", ["taking", "sweep", "feed"])
async def test_a_revocation_drops_session_queue_subscriptions_and_will(
    broker: Broker, database: Database, key: SessionKey, make_device: MakeDevice, clock: Seconds, seen_by: str
) -> None:
    watching = await watcher(broker, key.tenant_id, make_device)
    used = await credential(database, key)
    served, _ = await broker.connect(key, used, will=a_will(5.0))
    await broker.subscribe(served, "t")
    await broker.disconnect(served, publish_will=True)
    await broker.publish(key.tenant_id, key.device_id, "t", b"x")
    await revoke(database, used, "lost in the field")
    match seen_by:
        case "taking":
            assert (await broker.connect(key, await credential(database, key)))[1] is None
        case "sweep":
            await broker.messaging.prune()
        case _:
            await broker.messaging._sessions.drop_forfeited({key.device_id})
    clock.now += 6
    await broker.messaging.tick()
    assert watching.sent == []
    assert await rows(database, "messaging_queue") == 0
    assert (await broker.publish(key.tenant_id, key.device_id, "t", b"")).placements == ()


async def test_a_rotation_keeps_what_the_device_is_owed(broker: Broker, database: Database, key: SessionKey) -> None:
    old, new = await credential(database, key), await credential(database, key)
    served, _ = await broker.connect(key, old)
    await broker.subscribe(served, "t")
    await broker.disconnect(served)
    await broker.publish(key.tenant_id, key.device_id, "t", b"x")
    await revoke(database, old, "retired: its successor was used")
    await broker.messaging.prune()
    served, resumed = await broker.connect(key, new)
    assert resumed is not None
    assert served.payloads == [b"x"]
    await revoke(database, old, "lost")  # it is the session's no more
    await broker.messaging.prune()
    assert await rows(database, "messaging_session") == 1


async def test_a_deleted_device_leaves_nothing_behind(
    broker: Broker, other: Broker, database: Database, key: SessionKey
) -> None:
    served, _ = await broker.connect(key, will=a_will())
    await broker.subscribe(served, "t")
    await other.publish(key.tenant_id, key.device_id, "t", b"x")
    async with database.connection() as connection:
        await connection.execute("DELETE FROM device WHERE device_id = $1", key.device_id)
    published = await other.publish(key.tenant_id, key.device_id, "t", b"y")
    assert published.gone == (served.ownership.session_id,)
    with pytest.raises(SessionLost):
        await broker.messaging.delivered(served.ownership, 1)
    await broker.messaging.prune()
    assert (await other.publish(key.tenant_id, key.device_id, "t", b"z")).routing.recipients == ()
    for table in ("messaging_session", "messaging_queue", "messaging_message", "messaging_will"):
        assert await rows(database, table) == 0


# Nodes that die.


async def age(database: Database, name: str) -> None:
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE messaging_node SET seen_at = seen_at - interval '1 minute' WHERE node_id = $1", name
        )


async def test_a_dead_node_lets_go_of_its_sessions_and_wills(
    broker: Broker, other: Broker, database: Database, key: SessionKey, make_device: MakeDevice, clock: Seconds
) -> None:
    watching = await watcher(other, key.tenant_id, make_device)
    served, _ = await broker.connect(key, expiry=30.0, will=a_will())
    await broker.messaging.watch(key.tenant_id, "w", stored=False, qos=1)
    assert (await other.publish(key.tenant_id, key.device_id, "w", b"")).routing.relays != ()
    await age(database, "a")
    await other.messaging._beat()
    await other.messaging.tick()
    assert watching.payloads == [b"gone"]
    assert (await other.publish(key.tenant_id, key.device_id, "w", b"")).routing.relays == ()
    # It was only cut off: it hears so, and serves again.
    with pytest.raises(SessionLost):
        await broker.messaging.delivered(served.ownership, 1)
    await broker.messaging._beat()
    await broker.pull()
    assert broker.evictions == [served.ownership]
    assert (await other.publish(key.tenant_id, key.device_id, "w", b"back")).routing.relays != ()
    await broker.pull()
    assert [a.message.payload for a in broker.arrivals] == [b"back"]
    clock.now += 31
    await other.messaging.tick()
    assert await rows(database, "messaging_session") == 1


async def test_a_restarted_node_owes_its_sessions_their_wills(
    broker: Broker, other: Broker, key: SessionKey, make_device: MakeDevice
) -> None:
    watching = await watcher(other, key.tenant_id, make_device)
    await broker.connect(key, will=a_will())
    await broker.crash()
    await broker.messaging.tick()
    await other.pull()
    assert watching.payloads == [b"gone"]
    assert (await broker.connect(key))[1] is not None
    await broker.pull()
    assert broker.evictions == []
