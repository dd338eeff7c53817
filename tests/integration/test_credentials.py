"""Seed 003: credentials issued, listed, rotated with an overlap, revoked with a receipt."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from uuid import uuid4

import pytest

from registry import secrets
from registry.credentials import IssuedApiKey, Rotated, RotateRequest
from registry.devices import DeviceChanges, NewDevice
from registry.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from registry.model import Credential, CredentialId, CredentialKind, DeviceId, DeviceStatus, TenantId
from registry.paging import Page
from registry.profiles import NewProfile
from registry.psk import IssuedPsk, PskAssignment, seal_context
from registry.sealing import SealBroken
from registry.secrets import Secret
from registry.storage import credentials
from registry.storage.database import Database
from tests.services import NOON, OPERATOR, Services

DAY = timedelta(days=1)


@pytest.fixture
def services(database: Database) -> Services:
    return Services(database)


async def device(
    services: Services, tenant_id: TenantId, kind: CredentialKind = CredentialKind.API_KEY, hardware_id: str = "HW-1"
) -> tuple[DeviceId, CredentialId]:
    """A device of this type and its first credential."""
    made = await services.devices.register(tenant_id, NewDevice("D", hardware_id, credential_type=kind), OPERATOR)
    services.clock.advance(seconds=1)
    return made.device.device_id, made.issued.credential_id if made.issued else CredentialId(uuid4())


async def by_id(services: Services, tenant_id: TenantId, device_id: DeviceId) -> Mapping[CredentialId, Credential]:
    listed = await services.credentials.list(tenant_id, device_id, Page())
    return {c.credential_id: c for c in listed.items}


async def living(services: Services, tenant_id: TenantId, device_id: DeviceId) -> set[CredentialId]:
    now = services.clock()
    every = (await by_id(services, tenant_id, device_id)).values()
    return {c.credential_id for c in every if not c.revoked_at and (c.expires_at is None or c.expires_at > now)}


async def use(services: Services, tenant_id: TenantId, device_id: DeviceId, credential_id: CredentialId) -> None:
    async with services.database.transaction() as connection:
        await credentials.mark_first_use(connection, tenant_id, device_id, credential_id, services.clock(), "corr-9")


async def rotate(
    services: Services, tenant_id: TenantId, device_id: DeviceId, request: RotateRequest | None = None
) -> Rotated:
    rotated = await services.credentials.rotate(tenant_id, device_id, request or RotateRequest(), OPERATOR)
    services.clock.advance(seconds=1)
    return rotated


# -- issuing -----------------------------------------------------------------------------------------------------------


async def test_one_more_api_key(services: Services, tenant_id: TenantId) -> None:
    device_id, first = await device(services, tenant_id)

    issued = await services.credentials.issue_api_key(tenant_id, device_id, "laptop", services.clock() + DAY, OPERATOR)

    listed = await by_id(services, tenant_id, device_id)
    assert list(listed) == [first, issued.credential_id]
    second = listed[issued.credential_id]
    assert (second.kind, second.label, second.expires_at) == (CredentialKind.API_KEY, "laptop", services.clock() + DAY)
    [row] = await services.rows("SELECT lookup FROM credential WHERE credential_id = $1", issued.credential_id)
    assert row["lookup"] == secrets.digest(issued.api_key.reveal())
    assert issued.api_key.reveal() not in repr((issued, listed))
    assert await services.kinds(tenant_id) == ["device.registered", "credential.issued"]
    for label, expires_at in (
        ("two\nlines", None),
        ("x" * 129, None),
        ("", services.clock()),
        ("", (NOON + DAY).replace(tzinfo=None)),
    ):
        with pytest.raises(InvalidArgument):
            await services.credentials.issue_api_key(tenant_id, device_id, label, expires_at, OPERATOR)


async def test_ten_may_live_at_once(services: Services, tenant_id: TenantId) -> None:
    device_id, first = await device(services, tenant_id)
    outcomes = await asyncio.gather(
        *(services.credentials.issue_api_key(tenant_id, device_id, "", None, OPERATOR) for _ in range(12)),
        return_exceptions=True,
    )
    assert [type(o) for o in outcomes].count(ResourceExhausted) == 3
    await services.credentials.revoke(tenant_id, device_id, first, OPERATOR)
    await services.credentials.issue_api_key(tenant_id, device_id, "", None, OPERATOR)


async def test_a_psk_is_generated_or_assigned_and_sealed(services: Services, tenant_id: TenantId) -> None:
    device_id, _ = await device(services, tenant_id, CredentialKind.PSK)
    key = Secret(bytes(range(32)))

    assigned = await services.credentials.issue_psk(tenant_id, device_id, PskAssignment("meter/7", key), OPERATOR)
    generated = await services.credentials.issue_psk(tenant_id, device_id, PskAssignment(), OPERATOR)

    assert (assigned.identity, assigned.key) == ("meter/7", key)
    assert len(generated.identity) == 16
    sealed = {r["credential_id"]: r["sealed_key"] for r in await services.rows("SELECT * FROM credential")}
    for issued in (assigned, generated):
        opened = services.ring.open(sealed[issued.credential_id], seal_context(tenant_id, issued.credential_id, 1))
        assert opened == issued.key
    with pytest.raises(SealBroken):  # rows swapped
        services.ring.open(sealed[assigned.credential_id], seal_context(tenant_id, generated.credential_id, 1))
    assert (await by_id(services, tenant_id, device_id))[assigned.credential_id].identity == "meter/7"
    assert not any(key.reveal() in s for s in sealed.values())


async def test_identities_and_keys_that_are_refused(services: Services, tenant_id: TenantId) -> None:
    device_id, _ = await device(services, tenant_id, CredentialKind.PSK)

    async def issue(identity: str | None = None, key: bytes | None = None) -> IssuedPsk:
        wish = PskAssignment(identity, Secret(key) if key is not None else None)
        return await services.credentials.issue_psk(tenant_id, device_id, wish, OPERATOR)

    for identity in ("", "a b", "ä", "x" * 33, "claim-abc", "a\x00", "a\n"):
        with pytest.raises(InvalidArgument) as refused:
            await issue(identity)
        assert refused.value.field == "identity"
    for length in (0, 1, 16, 31, 33, 64):
        with pytest.raises(InvalidArgument, match=f"key has {length} bytes; exactly 32") as refused:
            await issue(key=b"\x41" * length)
        assert "AAAA" not in str(refused.value)
    one = await issue("taken")
    with pytest.raises(AlreadyExists):
        await issue("taken")
    await services.credentials.revoke(tenant_id, device_id, one.credential_id, OPERATOR)
    assert (await issue("taken")).identity == "taken"


async def test_a_profile_may_allow_short_keys(services: Services, tenant_id: TenantId) -> None:
    await services.profiles.create(tenant_id, NewProfile("Old", "p_old", allow_short_psk=True), OPERATOR)
    device_id, _ = await device(services, tenant_id, CredentialKind.PSK)
    short = PskAssignment(key=Secret(b"k" * 16))
    with pytest.raises(InvalidArgument):
        await services.credentials.issue_psk(tenant_id, device_id, short, OPERATOR)
    await services.devices.update(tenant_id, device_id, DeviceChanges(profile_id="p_old"), OPERATOR)
    assert len((await services.credentials.issue_psk(tenant_id, device_id, short, OPERATOR)).key.reveal()) == 16


async def test_a_certificate_is_known_by_its_fingerprint(services: Services, tenant_id: TenantId) -> None:
    device_id, _ = await device(services, tenant_id, CredentialKind.X509)
    fingerprint = "AB" * 32

    made = await services.credentials.register_certificate(
        tenant_id, device_id, fingerprint, NOON - DAY, NOON + DAY, {"subject": "CN=x"}, OPERATOR
    )

    assert (made.fingerprint, made.detail, made.not_before) == (fingerprint.lower(), {"subject": "CN=x"}, NOON - DAY)
    with pytest.raises(AlreadyExists):
        await services.credentials.register_certificate(
            tenant_id, device_id, fingerprint, NOON - DAY, NOON + DAY, {}, OPERATOR
        )
    receipt = await services.credentials.revoke_by_fingerprint(tenant_id, fingerprint, OPERATOR)
    assert receipt.credential_id == made.credential_id
    services.clock.advance(hours=1)
    again = await services.credentials.revoke_by_fingerprint(tenant_id, fingerprint.lower(), OPERATOR)
    assert again.revoked_at == receipt.revoked_at
    with pytest.raises(NotFound):
        await services.credentials.revoke_by_fingerprint(tenant_id, "cd" * 32, OPERATOR)
    for wrong in ("", "ab" * 31, "xy" * 32, "ab" * 32 + "\n"):
        with pytest.raises(InvalidArgument):
            await services.credentials.revoke_by_fingerprint(tenant_id, wrong, OPERATOR)
    expired = (NOON - 2 * DAY, NOON - DAY)
    with pytest.raises(InvalidArgument):
        await services.credentials.register_certificate(tenant_id, device_id, "cd" * 32, *expired, {}, OPERATOR)


async def test_a_device_has_one_credential_type(services: Services, tenant_id: TenantId) -> None:
    device_id, _ = await device(services, tenant_id)
    for attempt in (
        services.credentials.issue_psk(tenant_id, device_id, PskAssignment(), OPERATOR),
        services.credentials.register_certificate(tenant_id, device_id, "ab" * 32, NOON, NOON + DAY, {}, OPERATOR),
    ):
        with pytest.raises(FailedPrecondition, match="credential type is api_key"):
            await attempt


async def test_a_pending_device_gets_nothing(services: Services, tenant_id: TenantId) -> None:
    device_id, _ = await device(services, tenant_id)
    async with services.database.connection() as connection:
        await connection.execute("UPDATE device SET status = 'pending'")
    for attempt in (
        services.credentials.issue_api_key(tenant_id, device_id, "", None, OPERATOR),
        services.credentials.rotate(tenant_id, device_id, RotateRequest(), OPERATOR),
    ):
        with pytest.raises(FailedPrecondition, match="pending"):
            await attempt


# -- rotating ----------------------------------------------------------------------------------------------------------


async def test_the_old_key_lives_through_the_overlap(services: Services, tenant_id: TenantId) -> None:
    device_id, old = await device(services, tenant_id)
    now = services.clock()

    rotated = await rotate(services, tenant_id, device_id)

    new = rotated.issued.credential_id
    assert isinstance(rotated.issued, IssuedApiKey)
    assert (rotated.retired, rotated.valid_until, rotated.receipts) == ([old], now + DAY, [])
    before = (await by_id(services, tenant_id, device_id))[old]
    assert (before.expires_at, before.superseded_by, before.retire_on_use) == (now + DAY, new, False)
    assert await living(services, tenant_id, device_id) == {old, new}
    services.clock.advance(days=1)
    assert await living(services, tenant_id, device_id) == {new}
    assert await services.kinds(tenant_id) == ["device.registered", "credential.rotated"]
    [event] = await services.rows("SELECT credential_id, data FROM event WHERE kind = 'credential.rotated'")
    assert (event["credential_id"], event["data"]["retired"]) == (new, [str(old)])


async def test_no_overlap_ends_the_old_at_once(services: Services, tenant_id: TenantId) -> None:
    device_id, old = await device(services, tenant_id)
    extra = (await services.credentials.issue_api_key(tenant_id, device_id, "", None, OPERATOR)).credential_id
    now = services.clock()

    rotated = await rotate(services, tenant_id, device_id, RotateRequest(overlap_seconds=0))

    assert (set(rotated.retired), rotated.valid_until) == ({old, extra}, now)
    assert {r.credential_id for r in rotated.receipts} == {old, extra}
    assert {e.credential_id for e in services.doors.ended} == {old, extra}
    assert await living(services, tenant_id, device_id) == {rotated.issued.credential_id}
    assert (await services.kinds(tenant_id)).count("credential.revoked") == 2


async def test_rotating_again_before_the_first_use_replaces_the_unused_one(
    services: Services, tenant_id: TenantId
) -> None:
    device_id, old = await device(services, tenant_id)
    lost = await rotate(services, tenant_id, device_id)

    second = await rotate(services, tenant_id, device_id, RotateRequest(overlap_seconds=600))

    assert await living(services, tenant_id, device_id) == {old, second.issued.credential_id}
    assert [r.credential_id for r in second.receipts] == [lost.issued.credential_id]
    assert second.valid_until == lost.valid_until  # the one in use keeps its overlap
    assert (await by_id(services, tenant_id, device_id))[old].superseded_by == second.issued.credential_id


async def test_rotating_again_after_the_first_use_ends_the_oldest(services: Services, tenant_id: TenantId) -> None:
    device_id, old = await device(services, tenant_id)
    first = await rotate(services, tenant_id, device_id)
    await use(services, tenant_id, device_id, first.issued.credential_id)

    second = await rotate(services, tenant_id, device_id)

    assert await living(services, tenant_id, device_id) == {first.issued.credential_id, second.issued.credential_id}
    assert [r.credential_id for r in second.receipts] == [old]


async def test_rotating_after_the_new_one_was_revoked_keeps_the_one_in_use(
    services: Services, tenant_id: TenantId
) -> None:
    device_id, old = await device(services, tenant_id)
    leaked = await rotate(services, tenant_id, device_id)
    await services.credentials.revoke(tenant_id, device_id, leaked.issued.credential_id, OPERATOR)

    second = await rotate(services, tenant_id, device_id)

    assert await living(services, tenant_id, device_id) == {old, second.issued.credential_id}


async def test_a_key_issued_by_hand_does_not_end_the_one_in_use(services: Services, tenant_id: TenantId) -> None:
    device_id, old = await device(services, tenant_id)
    lost = await rotate(services, tenant_id, device_id)
    by_hand = await services.credentials.issue_api_key(tenant_id, device_id, "laptop", None, OPERATOR)
    services.clock.advance(seconds=1)

    second = await rotate(services, tenant_id, device_id)

    left = {old, by_hand.credential_id, second.issued.credential_id}
    assert await living(services, tenant_id, device_id) == left
    assert [r.credential_id for r in second.receipts] == [lost.issued.credential_id]
    assert (await by_id(services, tenant_id, device_id))[second.issued.credential_id].label == "laptop"


async def test_many_rotations_at_once_leave_two(services: Services, tenant_id: TenantId) -> None:
    device_id, old = await device(services, tenant_id)
    await asyncio.gather(*(rotate(services, tenant_id, device_id) for _ in range(10)))
    left = await living(services, tenant_id, device_id)
    assert len(left) == 2
    assert old in left


async def test_the_old_one_retires_when_the_new_one_is_used(services: Services, tenant_id: TenantId) -> None:
    device_id, old = await device(services, tenant_id)
    rotated = await rotate(services, tenant_id, device_id, RotateRequest(retire_on_use=True))
    assert await living(services, tenant_id, device_id) == {old, rotated.issued.credential_id}

    await use(services, tenant_id, device_id, rotated.issued.credential_id)
    await use(services, tenant_id, device_id, rotated.issued.credential_id)

    assert await living(services, tenant_id, device_id) == {rotated.issued.credential_id}
    assert (await services.kinds(tenant_id))[2:] == ["credential.revoked", "device.activated"]


async def test_using_the_old_one_retires_nothing(services: Services, tenant_id: TenantId) -> None:
    device_id, old = await device(services, tenant_id)
    rotated = await rotate(services, tenant_id, device_id, RotateRequest(retire_on_use=True))
    await use(services, tenant_id, device_id, old)
    assert await living(services, tenant_id, device_id) == {old, rotated.issued.credential_id}


async def test_rotation_may_change_the_type(services: Services, tenant_id: TenantId) -> None:
    device_id, old = await device(services, tenant_id)

    rotated = await rotate(services, tenant_id, device_id, RotateRequest(credential_type=CredentialKind.PSK))

    assert isinstance(rotated.issued, IssuedPsk)
    assert (await services.devices.get(tenant_id, device_id)).credential_type is CredentialKind.PSK
    assert await living(services, tenant_id, device_id) == {old, rotated.issued.credential_id}


async def test_rotations_that_are_refused_change_nothing(services: Services, tenant_id: TenantId) -> None:
    device_id, old = await device(services, tenant_id)
    for request, error in (
        (RotateRequest(overlap_seconds=-1), InvalidArgument),
        (RotateRequest(overlap_seconds=30 * 86_400 + 1), InvalidArgument),
        (RotateRequest(csr=b"x"), InvalidArgument),
        (RotateRequest(credential_type=CredentialKind.X509), FailedPrecondition),
    ):
        with pytest.raises(error):
            await rotate(services, tenant_id, device_id, request)
    assert await living(services, tenant_id, device_id) == {old}
    assert (await by_id(services, tenant_id, device_id))[old].expires_at is None


# -- revoking ----------------------------------------------------------------------------------------------------------


async def test_revoking_closes_and_says_so_once(services: Services, tenant_id: TenantId) -> None:
    device_id, credential_id = await device(services, tenant_id)

    receipts = await asyncio.gather(
        *(services.credentials.revoke(tenant_id, device_id, credential_id, OPERATOR, "leaked") for _ in range(5))
    )
    services.clock.advance(hours=1)
    later = await services.credentials.revoke(tenant_id, None, credential_id, OPERATOR)

    assert {r.revoked_at for r in [*receipts, later]} == {services.clock() - timedelta(hours=1)}
    [told] = services.doors.ended
    assert (told.device_id, told.credential_id) == (device_id, credential_id)
    assert await services.kinds(tenant_id) == ["device.registered", "credential.revoked"]
    assert (await by_id(services, tenant_id, device_id))[credential_id].revoked_reason == "leaked"
    assert (await services.audited(tenant_id)).count("revoke credential") == 1


async def test_what_is_not_found(services: Services, tenant_id: TenantId) -> None:
    device_id, credential_id = await device(services, tenant_id)
    neighbour, _ = await device(services, tenant_id, hardware_id="HW-2")
    other = (await services.tenants.create("Other", None, OPERATOR)).tenant_id
    for attempt in (
        services.credentials.revoke(other, None, credential_id, OPERATOR),
        services.credentials.revoke(tenant_id, neighbour, credential_id, OPERATOR),
        services.credentials.revoke(tenant_id, device_id, CredentialId(uuid4()), OPERATOR),
        services.credentials.list(other, device_id, Page()),
        services.credentials.rotate(other, device_id, RotateRequest(), OPERATOR),
        services.credentials.issue_api_key(other, device_id, "", None, OPERATOR),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert (await services.credentials.list(other, None, Page())).items == []
    every = await services.credentials.list(tenant_id, None, Page(1), kind=CredentialKind.API_KEY)
    assert len(every.items) == 1
    assert every.next_cursor is not None


# -- the first contact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "then"),
    [
        (DeviceStatus.REGISTERED, DeviceStatus.ACTIVE),
        (DeviceStatus.OFFLINE, DeviceStatus.ACTIVE),
        (DeviceStatus.MAINTENANCE, DeviceStatus.MAINTENANCE),
    ],
)
async def test_the_first_contact_brings_the_device_to_life(
    services: Services, tenant_id: TenantId, status: DeviceStatus, then: DeviceStatus
) -> None:
    device_id, credential_id = await device(services, tenant_id)
    async with services.database.connection() as connection:
        await connection.execute("UPDATE device SET status = $1", status.value)

    await asyncio.gather(*(use(services, tenant_id, device_id, credential_id) for _ in range(5)))

    seen = await services.devices.get(tenant_id, device_id)
    now = services.clock()
    assert (seen.status, seen.activated_at, seen.last_seen_at) == (then, now, now)
    assert (await by_id(services, tenant_id, device_id))[credential_id].first_used_at == now
    assert await services.kinds(tenant_id) == ["device.registered", "device.activated"]


async def test_a_revoked_credential_brings_nothing_to_life(services: Services, tenant_id: TenantId) -> None:
    device_id, credential_id = await device(services, tenant_id)
    await services.credentials.revoke(tenant_id, device_id, credential_id, OPERATOR)

    await use(services, tenant_id, device_id, credential_id)

    assert (await services.devices.get(tenant_id, device_id)).status is DeviceStatus.REGISTERED
    assert (await by_id(services, tenant_id, device_id))[credential_id].first_used_at is None
