"""A revoked device says nothing more, its will neither: whichever way its session ends, before the revocation or after.

    session ends (released, ended, expired, queue full, node killed, taken over) ─► will due ─► published
                 ▲                                                          ▲           ▲
                 └── the credential is revoked, or the device inactive ─────┴───────────┘

A rotation is no revocation: then the will is published.
Nobody follows the revocation here; the judgement is the will's own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from unittest import mock
from uuid import uuid4

import pytest

from certs.crl import RevocationReason
from registry.full_queues import Standstill
from registry.messaging_values import Message, Opening, Publication, SessionKey, StoredWill
from registry.model import CredentialId, DeviceId, TenantId
from registry.storage import messaging_sessions
from registry.storage.database import Database
from tests.conftest import MakeDevice
from tests.messaging_brokers import Broker, Served, broker, clock

__all__ = ["broker", "clock"]

EXPIRY = 30.0


@pytest.fixture
async def watching(broker: Broker, tenant_id: TenantId, make_device: MakeDevice) -> Served:
    served, _ = await broker.connect(SessionKey(tenant_id, await make_device(tenant_id), "watcher"))
    await broker.subscribe(served, "will")
    return served


@pytest.fixture
async def credential_id(database: Database, tenant_id: TenantId, device_id: DeviceId) -> CredentialId:
    return await credential(database, tenant_id, device_id)


async def credential(database: Database, tenant_id: TenantId, device_id: DeviceId, age: int = 0) -> CredentialId:
    made = CredentialId(uuid4())
    async with database.connection() as connection:
        await connection.execute(
            """
            INSERT INTO credential (credential_id, tenant_id, device_id, kind, lookup, created_at)
            VALUES ($1, $2, $3, 'api_key', $4, now() - make_interval(secs => $5))
            """,
            made,
            tenant_id,
            device_id,
            made.bytes,
            age,
        )
    return made


def opening(device_id: DeviceId, tenant_id: TenantId, credential_id: CredentialId, expiry: float) -> Opening:
    key = SessionKey(tenant_id, device_id, "client")
    return Opening(key, credential_id, False, expiry, StoredWill(Message("will", b"gone", 1)))


# How a session may end. Each is given what it was opened with.

End = Callable[[Broker, Opening], Awaitable[None]]


async def lost(broker: Broker, told: Opening) -> None:
    """The connection breaks."""
    taken = await broker.messaging.take(told)
    ownership = taken.ownership or taken.will
    assert ownership is not None
    await broker.messaging.release(ownership, publish_will=True)


async def ended(broker: Broker, told: Opening) -> None:
    taken = await broker.messaging.take(told)
    ownership = taken.ownership or taken.will
    assert ownership is not None
    await broker.messaging.end(ownership, publish_will=True)


async def expired(broker: Broker, told: Opening) -> None:
    delayed = StoredWill(Message("will", b"gone", 1), 2 * EXPIRY)
    taken = await broker.messaging.take(Opening(told.key, told.credential_id, False, EXPIRY, delayed))
    assert taken.ownership is not None
    await broker.messaging.release(taken.ownership, publish_will=True)
    broker.clock.now += EXPIRY
    assert await broker.messaging._sessions.expire() == 1


async def full(broker: Broker, told: Opening) -> None:
    taken = await broker.messaging.take(told)
    ownership = taken.ownership or taken.will
    assert ownership is not None
    async with broker.database.transaction() as connection:
        held = await messaging_sessions.lock(connection, [ownership.session_id])
    assert await broker.messaging._sessions.end_full(Standstill.of(held[ownership.session_id]))


async def killed(broker: Broker, told: Opening) -> None:
    await broker.messaging.take(told)
    async with broker.database.transaction() as connection:
        assert await broker.messaging._sessions.orphan(connection, broker.name) == 2  # the watcher's as well


ENDS: Mapping[str, tuple[End, float]] = {
    "lost, in memory": (lost, 0.0),
    "lost, kept": (lost, EXPIRY),
    "ended, in memory": (ended, 0.0),
    "ended, kept": (ended, EXPIRY),
    "expired": (expired, EXPIRY),
    "full": (full, EXPIRY),
    "killed, in memory": (killed, 0.0),
    "killed, kept": (killed, EXPIRY),
}


async def revoke(database: Database, credential_id: CredentialId, reason: str) -> None:
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE credential SET revoked_at = now(), revoked_reason = $2 WHERE credential_id = $1",
            credential_id,
            reason,
        )


async def wills(database: Database) -> int:
    async with database.connection() as connection:
        count: int = await connection.fetchval("SELECT count(*) FROM messaging_will")
    return count


async def published(broker: Broker, tenant_id: TenantId) -> list[bytes]:
    """What becomes of the wills that are due: whatever the broker is asked to hand out or to store."""
    await broker.messaging._publish_wills()
    async with broker.database.connection() as connection:
        rows = await connection.fetch("SELECT payload FROM messaging_message WHERE tenant_id = $1", tenant_id)
    return [row["payload"] for row in rows]


@pytest.mark.parametrize("end", [*ENDS])
async def test_the_will_of_what_was_revoked_is_never_published(
    broker: Broker,
    database: Database,
    watching: Served,
    tenant_id: TenantId,
    device_id: DeviceId,
    credential_id: CredentialId,
    end: str,
) -> None:
    finish, expiry = ENDS[end]
    await finish(broker, opening(device_id, tenant_id, credential_id, expiry))
    assert await wills(database) == 1
    await revoke(database, credential_id, "stolen")
    assert await published(broker, tenant_id) == []
    assert await wills(database) == 0
    assert watching.payloads == []


@pytest.mark.parametrize("reason", RevocationReason)
async def test_whatever_reason_an_operator_gives_nothing_is_left_of_the_session(
    broker: Broker,
    database: Database,
    watching: Served,
    tenant_id: TenantId,
    device_id: DeviceId,
    credential_id: CredentialId,
    reason: RevocationReason,
) -> None:
    await lost(broker, opening(device_id, tenant_id, credential_id, EXPIRY))
    await revoke(database, credential_id, reason.value)
    assert await published(broker, tenant_id) == []
    assert await broker.messaging._sessions.drop_forfeited([device_id]) == 1


@pytest.mark.parametrize("gave_way", ["rotated", "expired"])
@pytest.mark.parametrize("left", [False, True])
async def test_with_its_last_credential_revoked_a_device_has_no_will_of_an_earlier_one(
    broker: Broker,
    database: Database,
    watching: Served,
    tenant_id: TenantId,
    device_id: DeviceId,
    gave_way: str,
    left: bool,
) -> None:
    first = await credential(database, tenant_id, device_id, age=20)
    second = await credential(database, tenant_id, device_id, age=10)
    await lost(broker, opening(device_id, tenant_id, first, EXPIRY))
    if gave_way == "rotated":
        await revoke(database, first, "rotated")
    else:
        async with database.connection() as connection:  # the overlap of a rotation is over
            await connection.execute("UPDATE credential SET expires_at = now() WHERE credential_id = $1", first)
    if left:
        await credential(database, tenant_id, device_id)
    await revoke(database, second, "stolen")
    assert await published(broker, tenant_id) == ([b"gone"] if left else [])
    assert await broker.messaging._sessions.drop_forfeited([device_id]) == (0 if left else 1)


async def test_a_revocation_before_a_rotation_is_no_matter_of_the_credential_that_was_rotated(
    broker: Broker, database: Database, watching: Served, tenant_id: TenantId, device_id: DeviceId
) -> None:
    stolen = await credential(database, tenant_id, device_id, age=20)
    await revoke(database, stolen, "stolen")
    fresh = await credential(database, tenant_id, device_id)
    await lost(broker, opening(device_id, tenant_id, fresh, EXPIRY))
    await revoke(database, fresh, "rotated")
    assert await published(broker, tenant_id) == [b"gone"]


@pytest.mark.parametrize("end", ["lost, in memory", "expired"])
async def test_a_rotated_credential_leaves_the_will_standing(
    broker: Broker,
    database: Database,
    watching: Served,
    tenant_id: TenantId,
    device_id: DeviceId,
    credential_id: CredentialId,
    end: str,
) -> None:
    finish, expiry = ENDS[end]
    await finish(broker, opening(device_id, tenant_id, credential_id, expiry))
    await revoke(database, credential_id, "rotated")
    assert await published(broker, tenant_id) == [b"gone"]
    assert await wills(database) == 0


@pytest.mark.parametrize("end", ["lost, in memory", "lost, kept"])
async def test_a_session_that_ends_behind_its_revocation_leaves_no_will(
    broker: Broker,
    database: Database,
    watching: Served,
    tenant_id: TenantId,
    device_id: DeviceId,
    credential_id: CredentialId,
    end: str,
) -> None:
    """Before anybody has followed it."""
    finish, expiry = ENDS[end]
    await revoke(database, credential_id, "stolen")
    await finish(broker, opening(device_id, tenant_id, credential_id, expiry))
    assert await published(broker, tenant_id) == []
    assert await wills(database) == 0


async def test_a_device_that_is_inactive_has_no_will(
    broker: Broker,
    database: Database,
    watching: Served,
    tenant_id: TenantId,
    device_id: DeviceId,
    credential_id: CredentialId,
) -> None:
    await lost(broker, opening(device_id, tenant_id, credential_id, 0.0))
    async with database.connection() as connection:
        await connection.execute("UPDATE device SET status = 'inactive' WHERE device_id = $1", device_id)
    assert await published(broker, tenant_id) == []
    assert await wills(database) == 0


async def test_a_revocation_between_the_finding_and_the_publishing_of_a_will_still_counts(
    broker: Broker,
    database: Database,
    watching: Served,
    tenant_id: TenantId,
    device_id: DeviceId,
    credential_id: CredentialId,
) -> None:
    await lost(broker, opening(device_id, tenant_id, credential_id, 0.0))
    asked: list[bytes] = []

    async def will_due(publication: Publication) -> bool:
        asked.append(publication.message.payload)
        await revoke(database, credential_id, "stolen")
        return False

    with mock.patch.object(broker, "will_due", will_due):
        assert await published(broker, tenant_id) == []
    assert asked == [b"gone"]
    assert await wills(database) == 1
    assert await published(broker, tenant_id) == []
    assert await wills(database) == 0
    assert watching.payloads == []


async def test_many_forfeited_wills_hide_none_behind_them(
    broker: Broker,
    database: Database,
    watching: Served,
    tenant_id: TenantId,
    device_id: DeviceId,
    credential_id: CredentialId,
    make_device: MakeDevice,
) -> None:
    """More than one turn takes, and older than the one that is still somebody's."""
    async with database.connection() as connection:
        await connection.execute(
            """
            INSERT INTO messaging_will (tenant_id, device_id, credential_id, delay, due_at, topic, payload, qos, retain,
                                        properties)
            SELECT $1, $2, $3, 0, $4, 'will', 'gone', 1, false, '' FROM generate_series(1, 250)
            """,
            tenant_id,
            device_id,
            credential_id,
            broker.clock.now - 1,
        )
    await revoke(database, credential_id, "stolen")
    other = opening(await make_device(tenant_id), tenant_id, CredentialId(uuid4()), 0.0)
    await lost(broker, other)
    assert await published(broker, tenant_id) == [b"gone"]
    assert await wills(database) == 0
