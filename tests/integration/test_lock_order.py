"""Whoever holds several rows takes them in the house's order: devices by id, sessions, wills, each by rising number.

In each test a rival does so, and meets an operation between its two rows. Had the operation taken the other one first,
PostgreSQL would end one of them: the operation, as the rival looks for deadlocks long after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock
from uuid import UUID, uuid4

import pytest

from registry.errors import NotFound
from registry.messaging_values import Message, SessionKey, StoredWill
from registry.model import DeviceId, TemplateStatus, TenantId
from registry.storage import certificates, messaging, messaging_sessions, trust
from registry.storage.database import Connection, Database
from registry.templates import NewTemplate
from tests.conftest import MakeDevice
from tests.messaging_brokers import NOON, Broker, Seconds, broker_on
from tests.services import OPERATOR, Services

LOW, HIGH = DeviceId(UUID(int=1)), DeviceId(UUID(int=2**128 - 1))


@pytest.fixture
def services(database: Database) -> Services:
    return Services(database)


@pytest.fixture
async def broker(dsn: str) -> AsyncIterator[Broker]:
    async with broker_on(dsn, "a", Seconds()) as opened:
        yield opened


@asynccontextmanager
async def rival(database: Database) -> AsyncIterator[Connection]:
    """A transaction that does not look for deadlocks before the test is over."""
    async with database.transaction() as connection:
        await connection.execute("SET LOCAL deadlock_timeout = '60s'")
        yield connection


async def until_blocked(database: Database) -> None:
    async with asyncio.timeout(20):
        while True:
            async with database.connection() as connection:
                if await connection.fetchval(
                    "SELECT EXISTS (SELECT FROM pg_stat_activity "
                    "WHERE wait_event_type = 'Lock' AND datname = current_database())"
                ):
                    return


async def in_between(database: Database, statement: str, rows: tuple[object, object], work: Awaitable[object]) -> None:
    """The rival holds the first of two rows; `work` runs until it waits; the rival holds the second, and ends."""
    async with rival(database) as connection:
        await connection.execute(statement, rows[0])
        working = asyncio.ensure_future(work)
        await until_blocked(database)
        await connection.execute(statement, rows[1])
    await working


HOLD_DEVICE = "SELECT FROM device WHERE device_id = $1 FOR NO KEY UPDATE"


async def add_device(
    database: Database, tenant_id: TenantId, device_id: DeviceId, gateway_id: DeviceId | None, template_id: str | None
) -> None:
    async with database.connection() as connection:
        await connection.execute(
            """
            INSERT INTO device (device_id, tenant_id, name, status, anchor_mode, credential_type, gateway_id,
                                template_id)
            VALUES ($1, $2, 'D', 'active', 'ANCHOR_MODE_MERKLE_BATCH', 'api_key', $3, $4)
            """,
            device_id,
            tenant_id,
            gateway_id,
            template_id,
        )


@pytest.mark.parametrize("chunk", [100, 1])
async def test_deleting_a_template_holds_its_devices_in_their_order(
    services: Services, database: Database, tenant_id: TenantId, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("registry.templates.DEVICES_AT_ONCE", chunk)
    template = (await services.templates.create(tenant_id, NewTemplate("T"), OPERATOR)).template
    for device_id in (HIGH, LOW):
        await add_device(database, tenant_id, device_id, None, template.template_id)
    deleting = services.templates.delete(tenant_id, template.template_id, OPERATOR)
    await in_between(database, HOLD_DEVICE, (LOW, HIGH), deleting)
    with pytest.raises(NotFound):
        await services.templates.get(tenant_id, template.template_id)
    rows = await services.rows("SELECT template_id FROM device")
    assert [row["template_id"] for row in rows] == [None, None]


async def test_a_template_that_is_deleted_half_way_takes_no_claims_and_can_be_deleted_again(
    services: Services, database: Database, tenant_id: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.templates.DEVICES_AT_ONCE", 2)
    template = (await services.templates.create(tenant_id, NewTemplate("T"), OPERATOR)).template
    for _ in range(5):
        await add_device(database, tenant_id, DeviceId(uuid4()), None, template.template_id)
    assert not await services.templates._forgotten(tenant_id, template.template_id, OPERATOR)
    left = await services.templates.get(tenant_id, template.template_id)
    assert (left.status, left.claims) == (TemplateStatus.DISABLED, 3)
    await services.templates.delete(tenant_id, template.template_id, OPERATOR)
    assert await services.audited(tenant_id) == [
        "create provisioning_template",
        "update provisioning_template",
        "delete provisioning_template",
    ]


async def test_deleting_a_gateway_holds_it_and_its_children_in_their_order(
    services: Services, database: Database, tenant_id: TenantId
) -> None:
    await add_device(database, tenant_id, HIGH, None, None)
    await add_device(database, tenant_id, LOW, HIGH, None)
    await in_between(database, HOLD_DEVICE, (LOW, HIGH), services.devices.delete(tenant_id, HIGH, OPERATOR))
    assert await services.rows("SELECT FROM device WHERE gateway_id IS NULL AND device_id = $1", LOW)


HOLD_SESSION = "SELECT FROM messaging_session WHERE session_id = $1 FOR NO KEY UPDATE"


async def test_deleting_a_device_holds_its_sessions_in_their_order(
    services: Services, broker: Broker, tenant_id: TenantId, device_id: DeviceId
) -> None:
    first, _ = await broker.connect(SessionKey(tenant_id, device_id, "z"))
    second, _ = await broker.connect(SessionKey(tenant_id, device_id, "a"))
    await services.rows("UPDATE messaging_session SET expiry = 5 WHERE client_id = 'z'")  # it stands behind the other
    held = first.ownership.session_id, second.ownership.session_id
    await in_between(broker.database, HOLD_SESSION, held, services.devices.delete(tenant_id, device_id, OPERATOR))
    assert not await services.rows("SELECT FROM messaging_session")


async def test_a_session_that_is_taken_while_its_device_is_deleted_ends_with_it(
    services: Services, broker: Broker, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    key = SessionKey(tenant_id, device_id, "c")
    await broker.connect(key)
    found, deleting = asyncio.Event(), asyncio.Event()
    find = messaging_sessions.find

    async def found_and_held(*arguments: Any) -> Any:
        place = await find(*arguments)
        found.set()
        await deleting.wait()
        return place

    with mock.patch.object(messaging_sessions, "find", found_and_held):
        taking = asyncio.create_task(broker.connect(key, will=StoredWill(Message("t", b"gone", 1))))
        await found.wait()
        deleted = asyncio.create_task(services.devices.delete(tenant_id, device_id, OPERATOR))
        await until_blocked(database)
        deleting.set()
        await taking
        await deleted
    assert not await services.rows("SELECT FROM messaging_session")
    assert not await services.rows("SELECT FROM messaging_will")
    with pytest.raises(NotFound):
        await broker.connect(key)


HOLD_WILL = "SELECT FROM messaging_will WHERE will_id = $1 FOR UPDATE"
WILLS = {
    "finished": lambda c, ids: messaging_sessions.finish_wills(c, ids, NOON),
    "dropped": lambda c, ids: messaging_sessions.drop_wills(c, ids),
    "orphaned": lambda c, ids: messaging_sessions.orphan(c, "a", NOON, 10),
}


@pytest.mark.parametrize("end", WILLS)
async def test_wills_are_held_in_their_order(
    services: Services, broker: Broker, database: Database, tenant_id: TenantId, make_device: MakeDevice, end: str
) -> None:
    sessions = []
    for number in (2, 1):  # a session that goes on with another will has a lower number than its will's neighbours
        device_id = await make_device(tenant_id)
        served, _ = await broker.connect(SessionKey(tenant_id, device_id, "c"))
        sessions.append(served.ownership.session_id)
        await services.rows(
            """
            INSERT INTO messaging_will (will_id, session_id, tenant_id, device_id, credential_id, delay, topic, payload,
                                        qos, retain, properties)
            OVERRIDING SYSTEM VALUE VALUES ($1, $2, $3, $4, $5, 0, 't', '', 1, false, '')
            """,
            number,
            served.ownership.session_id,
            tenant_id,
            device_id,
            uuid4(),
        )
    work: Callable[[Connection, list[int]], Awaitable[object]] = WILLS[end]

    async def ended() -> None:
        async with database.transaction() as connection:
            await work(connection, sessions)

    await in_between(database, HOLD_WILL, (1, 2), ended())


async def test_a_revocation_that_comes_while_a_will_is_waited_for_forfeits_it(
    broker: Broker, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    await broker.connect(SessionKey(tenant_id, device_id, "c"), will=StoredWill(Message("t", b"gone", 1)))
    async with database.connection() as connection:
        will_id = await connection.fetchval("SELECT will_id FROM messaging_will")

    async def pending() -> set[int]:
        async with database.transaction() as connection:
            return await messaging.pending_wills(connection, [will_id])

    assert await pending() == {will_id}
    async with rival(database) as connection:
        await connection.execute(HOLD_WILL, will_id)
        waiting = asyncio.create_task(pending())
        await until_blocked(database)
        async with database.connection() as other:
            await other.execute("UPDATE device SET status = 'inactive' WHERE device_id = $1", device_id)
    assert await waiting == set()


async def test_resealing_holds_devices_before_their_credentials(
    services: Services, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    for number in (1, 2):
        await services.rows(
            """
            INSERT INTO credential (credential_id, tenant_id, device_id, kind, lookup, sealed_key)
            VALUES ($1, $2, $3, 'psk', $4, 'old')
            """,
            UUID(int=number),
            tenant_id,
            device_id,
            bytes([number]),
        )

    async def reseal() -> None:
        async with database.transaction() as connection:
            found = await trust.not_sealed_with(connection, trust.SEALED_COLUMNS[0], b"new", None, 10)
            assert len(found) == 2

    use = "UPDATE credential SET first_used_at = now() WHERE credential_id = $1"
    async with rival(database) as connection:  # a first use: the device, the new credential, the one that it retires
        await connection.execute(HOLD_DEVICE, device_id)
        await connection.execute(use, UUID(int=2))
        resealing = asyncio.create_task(reseal())
        await until_blocked(database)
        await connection.execute(use, UUID(int=1))
    await resealing


async def test_a_revocation_list_waits_for_no_certificate(
    services: Services, database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    authority = UUID(int=9)
    await services.rows(
        """
        INSERT INTO authority (authority_id, kind, certificate, sealed_key, active) VALUES ($1, 'issuing', '', '', true)
        """,
        authority,
    )
    for serial in ("01", "02"):
        await services.rows(
            """
            INSERT INTO certificate (authority_id, serial, purpose, tenant_id, device_id, subject, spki_sha256, status,
                                     not_before, not_after, renew_after, intended_at, issued_at, fingerprint, der,
                                     ends_at)
            VALUES ($1, $2, 'device', $3, $4, '', '', 'issued', $5, $5::timestamptz + interval '1 day', $5, $5, $5, '',
                    '', $5)
            """,
            authority,
            serial,
            tenant_id,
            device_id,
            services.clock(),
        )

    async def listed(number: int) -> list[str]:
        async with asyncio.timeout(10), database.transaction() as connection:
            await certificates.take_into_list(connection, authority, services.clock(), number)
            found = await certificates.listed(connection, authority, None)
        return sorted(each.serial for each in found)

    async with rival(database) as connection:
        await connection.execute("UPDATE certificate SET revoked_at = now() WHERE serial = '02'")
        assert await listed(1) == ["01"]
    assert await listed(2) == ["01", "02"]
