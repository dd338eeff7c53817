"""Desired configurations are versioned and pushed; what a device reports is kept as its last word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import uuid4

import pytest

from registry.device_config import (
    ConfigAttachment,
    ConfigReport,
    DeviceConfig,
    DeviceConfigs,
    OtherVersion,
    ReportedConfig,
    encode_config,
    report_from,
)
from registry.devices import DeviceChanges, NewDevice
from registry.errors import InvalidArgument, NotFound
from registry.model import DeviceId, Json, TenantId, Transport
from registry.payloads import Source, payload_from_json
from registry.profiles import NewProfile
from registry.sealing import KeyRing
from registry.storage import device_config as storage
from registry.storage.database import Database
from tests.conftest import MakeDevice
from tests.nodes import ACTOR, TestNode, now, running_node, until
from tests.services import Clock, Services


@dataclass(eq=False)
class Listener:
    """A live session that a test holds."""

    got: list[DeviceConfig] = field(default_factory=list)

    def configure(self, config: DeviceConfig) -> None:
        self.got.append(config)

    @property
    def versions(self) -> list[int]:
        return [config.version for config in self.got]


@asynccontextmanager
async def configs_on(node: TestNode, clock: Clock) -> AsyncIterator[DeviceConfigs]:
    configs = DeviceConfigs(node.database, clock=clock, feed=node.feed)
    node.feed.add_follower(configs)
    try:
        yield configs
    finally:
        await configs.stop()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def node(dsn: str) -> AsyncIterator[TestNode]:
    async with running_node(dsn, "one", KeyRing.generate()) as running:
        yield running


@pytest.fixture
async def configs(node: TestNode, clock: Clock) -> AsyncIterator[DeviceConfigs]:
    async with configs_on(node, clock) as service:
        yield service


def of(tenant_id: TenantId, device_id: DeviceId) -> Source:
    return Source(tenant_id, device_id, Transport.MQTT)


async def waiting(node: TestNode, how_many: int) -> None:
    """Until so many wait for a lock in the database."""
    async with node.database.connection() as connection, asyncio.timeout(10):
        while how_many > await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ):
            await asyncio.sleep(0.005)


async def kinds(database: Database) -> list[str]:
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT kind FROM event WHERE kind LIKE 'config.%' ORDER BY seq")
    return [row["kind"] for row in rows]


async def test_a_change_is_a_version_and_a_repetition_is_none(
    node: TestNode, configs: DeviceConfigs, tenant_id: TenantId, device_id: DeviceId
) -> None:
    assert await configs.get(tenant_id, device_id) == DeviceConfig(device_id, 1, {}, None)
    first = await configs.put(tenant_id, device_id, {"a": 1}, ACTOR)
    assert (first.version, first.config) == (2, {"a": 1})
    assert (await configs.put(tenant_id, device_id, {"a": 1}, ACTOR)).version == 2
    # Equal for Python, not for a device.
    assert (await configs.put(tenant_id, device_id, {"a": True}, ACTOR)).version == 3
    assert await configs.get(tenant_id, device_id) == DeviceConfig(device_id, 3, {"a": True}, None)
    assert await kinds(node.database) == ["config.changed", "config.changed"]


async def test_of_many_who_have_seen_the_same_version_one_changes_it(
    configs: DeviceConfigs, tenant_id: TenantId, device_id: DeviceId
) -> None:
    outcomes = await asyncio.gather(
        *(configs.put(tenant_id, device_id, {"n": n}, ACTOR, seen_version=1) for n in range(8)),
        return_exceptions=True,
    )
    won = [o for o in outcomes if isinstance(o, DeviceConfig)]
    assert len(won) == 1
    assert [type(o) for o in outcomes].count(OtherVersion) == 7
    now = await configs.get(tenant_id, device_id)
    assert (now.version, now.config) == (2, won[0].config)


async def test_changing_the_record_changes_the_configuration(
    node: TestNode, configs: DeviceConfigs, clock: Clock, tenant_id: TenantId
) -> None:
    services = Services(node.database)
    profile = await services.profiles.create(tenant_id, NewProfile(name="P", config={"rate": 5, "unit": "C"}), ACTOR)
    new = NewDevice("D", "HW-1", profile_id=profile.profile_id, config={"rate": 1})
    device = (await services.devices.register(tenant_id, new, ACTOR)).device
    config = await configs.get(tenant_id, device.device_id)
    assert (config.version, config.config) == (1, {"rate": 1, "unit": "C"})
    await services.devices.update(tenant_id, device.device_id, DeviceChanges(name="E"), ACTOR)
    assert (await configs.get(tenant_id, device.device_id)).version == 1
    await services.devices.update(tenant_id, device.device_id, DeviceChanges(name="F", config={"rate": 2}), ACTOR)
    config = await configs.get(tenant_id, device.device_id)
    assert (config.version, config.config) == (2, {"rate": 2})
    assert await kinds(node.database) == ["config.changed"]


async def test_configurations_belong_to_one_tenant_and_are_bounded(
    configs: DeviceConfigs, tenant_id: TenantId, device_id: DeviceId
) -> None:
    stranger = TenantId(uuid4())
    with pytest.raises(NotFound):
        await configs.get(stranger, device_id)
    with pytest.raises(NotFound):
        await configs.put(stranger, device_id, {}, ACTOR)
    with pytest.raises(NotFound):
        await configs.report(of(stranger, device_id), ConfigReport(1), "c")
    with pytest.raises(InvalidArgument, match="config has"):
        await configs.put(tenant_id, device_id, {"a": "x" * 40_000}, ACTOR)


async def test_sessions_hear_the_present_one_and_each_newer_one_on_any_node(
    dsn: str, node: TestNode, configs: DeviceConfigs, clock: Clock, tenant_id: TenantId, device_id: DeviceId
) -> None:
    async with running_node(dsn, "two", KeyRing.generate()) as two, configs_on(two, clock) as theirs:
        near, far, stranger = Listener(), Listener(), Listener()
        configs.attach(tenant_id, device_id, near)
        attachment = theirs.attach(tenant_id, device_id, far)
        theirs.attach(TenantId(uuid4()), device_id, stranger)
        await until(lambda: near.got and far.got)
        await configs.put(tenant_id, device_id, {"a": 1}, ACTOR)
        await until(lambda: near.versions == [1, 2] and far.versions == [1, 2])
        theirs.detach(attachment)
        await theirs.put(tenant_id, device_id, {"a": 2}, ACTOR)
        await until(lambda: near.versions == [1, 2, 3])
        assert far.versions == [1, 2]
        assert not stranger.got
        assert encode_config(near.got[-1]) == b'{"version":3,"config":{"a":2}}'


async def test_a_gateway_hears_of_a_child_while_it_is_its_child(
    node: TestNode, configs: DeviceConfigs, tenant_id: TenantId, make_device: MakeDevice
) -> None:
    gateway = await make_device(tenant_id)
    child = await make_device(tenant_id, gateway_id=gateway)
    mine, own = Listener(), Listener()
    configs.attach(tenant_id, child, mine, via=gateway)
    configs.attach(tenant_id, child, own)
    await until(lambda: mine.got and own.got)
    services = Services(node.database)
    await services.devices.update(tenant_id, child, DeviceChanges(gateway_id=None), ACTOR)
    await configs.put(tenant_id, child, {"a": 1}, ACTOR)
    await until(lambda: own.versions == [1, 2])
    assert mine.versions == [1]


async def test_a_report_is_the_devices_last_word(
    node: TestNode, configs: DeviceConfigs, clock: Clock, tenant_id: TenantId, device_id: DeviceId
) -> None:
    await configs.put(tenant_id, device_id, {"a": 1}, ACTOR)
    for version in (0, 3, -1):
        with pytest.raises(InvalidArgument, match="1 to 2"):
            await configs.report(of(tenant_id, device_id), ConfigReport(version), "c")
    said: list[tuple[int, Json]] = [(2, {"a": 1}), (2, {"a": 1}), (2, {"a": True}), (1, None), (1, None)]
    for version, config in said:
        clock.advance(seconds=1)
        told = await configs.report(of(tenant_id, device_id), ConfigReport(version, config), "c")
        assert told == await configs.get(tenant_id, device_id)
        assert told.reported is not None
        assert (told.reported.version, told.reported.config) == (version, config)
    assert (await kinds(node.database)).count("config.reported") == 3


async def test_reports_that_come_at_once_are_told_of_once_and_the_last_one_stays(
    node: TestNode, configs: DeviceConfigs, tenant_id: TenantId, device_id: DeviceId
) -> None:
    await configs.put(tenant_id, device_id, {"a": 1}, ACTOR)
    source, first = of(tenant_id, device_id), ConfigReport(1)
    await configs.report(source, first, "c")
    async with node.database.transaction() as connection:
        await storage.get(connection, tenant_id, device_id, lock=True)
        repeated = [asyncio.create_task(configs.report(source, ConfigReport(2), "c")) for _ in range(2)]
        await waiting(node, 2)
    await asyncio.gather(*repeated)
    assert (await kinds(node.database)).count("config.reported") == 2
    async with node.database.transaction() as connection:
        await storage.get(connection, tenant_id, device_id, lock=True)
        reset = asyncio.create_task(configs.report(source, ConfigReport(2), "c"))
        await waiting(node, 1)
        # What it would repeat is not its last word any more.
        await storage.report(connection, tenant_id, device_id, ReportedConfig(1, None, now()))
    assert (await reset).reported is not None
    reported = (await configs.get(tenant_id, device_id)).reported
    assert reported is not None
    assert reported.version == 2


async def test_reports_are_read() -> None:
    assert report_from(payload_from_json(b'{"version": 3, "config": {"a": 1}}')) == ConfigReport(3, {"a": 1})
    assert report_from(payload_from_json(b'{"version": 3}')) == ConfigReport(3)
    for raw in (b"{}", b'{"version": "3"}', b'{"version": 3, "more": 1}', b'{"version": 3, "config": []}', b"3"):
        with pytest.raises(InvalidArgument):
            report_from(payload_from_json(raw))


async def test_attachments_are_their_own(configs: DeviceConfigs, tenant_id: TenantId, device_id: DeviceId) -> None:
    one, other = Listener(), Listener()
    attachments: list[ConfigAttachment] = [configs.attach(tenant_id, device_id, each) for each in (one, other)]
    await until(lambda: one.got and other.got)
    for attachment in attachments:
        configs.detach(attachment)
        configs.detach(attachment)
