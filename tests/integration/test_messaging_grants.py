"""Topic grants: parsed strictly, judged with deny above allow, remembered, and felt when a profile changes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from registry.events import Event, EventKind, Position
from registry.feed import Seen
from registry.grant_table import GrantTable
from registry.messaging_values import SessionKey
from registry.model import DeviceId, Json, ProfileId, TenantId
from registry.storage.database import Database
from registry.topic_grants import NO_GRANTS, Access, TopicGrant, judge, parse_grants
from tests.conftest import MakeDevice
from tests.messaging_brokers import Broker, Seconds, broker_on
from tests.nodes import now

ALARMS = [{"filter": "site/+/alarm", "allow": ["publish", "subscribe"]}, {"filter": "site/7/#", "deny": ["publish"]}]
PROFILE = ProfileId("pump")


@pytest.fixture
async def broker(dsn: str) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "a", Seconds()) as opened:
        yield opened


async def put_profile(database: Database, tenant_id: TenantId, grants: Json, profile_id: str = PROFILE) -> None:
    async with database.connection() as connection:
        await connection.execute(
            """
            INSERT INTO device_profile (tenant_id, profile_id, name, topic_grants) VALUES ($1, $2, 'P', $3)
            ON CONFLICT (tenant_id, profile_id) DO UPDATE SET topic_grants = EXCLUDED.topic_grants
            """,
            tenant_id,
            profile_id,
            grants,
        )


async def give_profile(database: Database, device_id: DeviceId, profile_id: str | None) -> None:
    async with database.connection() as connection:
        await connection.execute("UPDATE device SET profile_id = $2 WHERE device_id = $1", device_id, profile_id)


def test_deny_wins_and_nothing_is_granted_by_default() -> None:
    grants = parse_grants(ALARMS)

    def may(access: Access, *matching: str) -> bool:
        return judge(grants, access, covers=matching.__contains__, touches=matching.__contains__)

    assert may(Access.PUBLISH, "site/+/alarm")
    assert not may(Access.PUBLISH, "site/+/alarm", "site/7/#")
    assert may(Access.SUBSCRIBE, "site/+/alarm", "site/7/#")
    assert not may(Access.PUBLISH)
    assert not judge((), Access.SUBSCRIBE, covers=lambda _: True, touches=lambda _: True)
    # A filter that only touches what is allowed is not covered by it.
    assert not judge(grants, Access.SUBSCRIBE, covers=lambda _: False, touches=lambda _: True)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"filter": "a", "allow": ["publish"]}, TopicGrant("a", frozenset({Access.PUBLISH}), frozenset())),
        ({"filter": "a", "allow": ["publish", "fly"]}, TopicGrant("a", frozenset(), frozenset(Access))),
        ({"filter": "a", "allow": "publish"}, TopicGrant("a", frozenset(), frozenset(Access))),
        ({"filter": "a", "allow": [["publish"]]}, TopicGrant("a", frozenset(), frozenset(Access))),
        ({"allow": ["publish"]}, TopicGrant("#", frozenset(), frozenset(Access))),
        ({"filter": 7, "allow": ["publish"]}, TopicGrant("#", frozenset(), frozenset(Access))),
        ("a", TopicGrant("#", frozenset(), frozenset(Access))),
    ],
    ids=lambda value: None if isinstance(value, TopicGrant) else json.dumps(value),
)
def test_what_cannot_be_read_is_denied(entry: Json, expected: TopicGrant) -> None:
    assert parse_grants([entry]) == (expected,)


async def test_grants_are_found_by_device_remembered_and_compared(
    database: Database, tenant_id: TenantId, device_id: DeviceId, make_device: MakeDevice
) -> None:
    table = GrantTable(database)
    assert await table.of_device(tenant_id, device_id) == NO_GRANTS
    await put_profile(database, tenant_id, ALARMS)
    await give_profile(database, device_id, PROFILE)
    assert table.remembered(tenant_id, device_id) == NO_GRANTS  # until the feed tells
    table.forget_device(device_id)
    assert table.remembered(tenant_id, device_id) is None
    assert (await table.of_device(tenant_id, device_id)).grants == parse_grants(ALARMS)
    stranger = TenantId(device_id)
    assert table.remembered(stranger, device_id) is None
    assert await table.of_device(stranger, device_id) == NO_GRANTS
    assert await table.refresh() == []
    await put_profile(database, tenant_id, ALARMS[:1])
    assert await table.refresh() == [(tenant_id, PROFILE)]
    known = table.remembered(tenant_id, device_id)
    assert known is not None
    assert known.grants == parse_grants(ALARMS[:1])
    assert await table.grants_of(tenant_id, ProfileId("none")) == ()
    small = GrantTable(database, devices=1)
    for each in (device_id, await make_device(tenant_id)):
        await small.of_device(tenant_id, each)
    assert small.remembered(tenant_id, device_id) is None


async def test_a_changed_profile_is_told_and_what_is_offline_can_be_judged_again(
    broker: Broker, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    await put_profile(database, tenant_id, ALARMS)
    await give_profile(database, device_id, PROFILE)
    await broker.messaging.grants.of_device(tenant_id, device_id)
    served, _ = await broker.connect(SessionKey(tenant_id, device_id, "c"))
    await broker.subscribe(served, "site/+/alarm")
    await broker.subscribe(served, "kept")
    assert await broker.messaging.offline_of_profile(tenant_id, PROFILE) == []  # it is live: the adapter's memory
    await broker.disconnect(served)
    await broker.publish(tenant_id, device_id, "site/1/alarm", b"x", retain=True)
    await broker.publish(tenant_id, device_id, "kept", b"y")
    await put_profile(database, tenant_id, [])
    await broker.messaging.tick()
    assert broker.changed_grants == [PROFILE]
    routes = await broker.messaging.offline_of_profile(tenant_id, PROFILE)
    assert [r.subscription.filter for r in routes] == ["site/+/alarm", "kept"]
    assert sorted(await broker.messaging.offline_topics(routes[0].session_id)) == ["kept", "site/1/alarm"]
    await broker.messaging.withdraw(routes[0].session_id, filters=["site/+/alarm"], topics=["site/1/alarm"])
    assert await broker.messaging.retained_of_profile(tenant_id, PROFILE) == [(device_id, "site/1/alarm")]
    assert await broker.messaging.forget_retained(tenant_id, [(device_id, "site/1/alarm")]) == 1
    assert (await broker.publish(tenant_id, device_id, "site/1/alarm", b"z")).placements == ()
    again, resumed = await broker.connect(SessionKey(tenant_id, device_id, "c"))
    assert resumed is not None
    assert [s.filter for s in resumed.subscriptions] == ["kept"]
    assert again.payloads == [b"y"]


async def test_the_feed_forgets_devices_and_drops_what_was_revoked(
    broker: Broker, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    await broker.messaging.grants.of_device(tenant_id, device_id)
    served, _ = await broker.connect(SessionKey(tenant_id, device_id, "c"))
    async with database.connection() as connection:
        await connection.execute("UPDATE device SET status = 'inactive' WHERE device_id = $1", device_id)
    for kind in (EventKind.DEVICE_UPDATED, EventKind.DEVICE_DEACTIVATED):
        changed = {"changed": ["profile_id"]}
        event = Event(Position(1, 1), device_id, kind.value, tenant_id, now(), device_id, None, None, "x", "c", changed)
        await broker.messaging.follow(Seen(event, True, 0.0))
    assert broker.messaging.grants.remembered(tenant_id, device_id) is None
    await broker.messaging.settled()
    await broker.pull()
    assert broker.evictions == [served.ownership]


async def test_a_profile_that_is_gone_is_remembered_no_more(
    database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    table = GrantTable(database)
    await put_profile(database, tenant_id, ALARMS)
    await give_profile(database, device_id, PROFILE)
    assert (await table.of_device(tenant_id, device_id)).grants == parse_grants(ALARMS)
    await give_profile(database, device_id, None)
    async with database.connection() as connection:
        await connection.execute("DELETE FROM device_profile WHERE profile_id = $1", PROFILE)
    assert await table.refresh() == [(tenant_id, PROFILE)]
    assert await table.refresh() == []
    assert not table._profiles
    assert (await table.of_device(tenant_id, device_id)).grants == ()
    await put_profile(database, tenant_id, ALARMS)
    await give_profile(database, device_id, PROFILE)
    table.forget_device(device_id)  # as the feed says
    assert (await table.of_device(tenant_id, device_id)).grants == parse_grants(ALARMS)
