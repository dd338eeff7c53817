"""Provisioning templates: every field of seed 001, the key that is shown once, and the end of a leaked batch."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from registry import secrets
from registry.devices import NewDevice
from registry.errors import FailedPrecondition, InvalidArgument, NotFound, Refused
from registry.key_claim import Claimed, ClaimRequest
from registry.model import CredentialKind, TemplateStatus, TenantId
from registry.paging import Page
from registry.profiles import NewProfile
from registry.sealing import SealBroken
from registry.secrets import Secret
from registry.storage import templates
from registry.storage.database import Database
from registry.templates import NewTemplate, TemplateChanges, claim_psk_context
from tests.services import CONTACT, NOON, OPERATOR, Services


@pytest.fixture
def services(database: Database) -> Services:
    return Services(database)


async def claim(services: Services, key: Secret[str], hardware_id: str) -> Claimed:
    return await services.key_claim.claim(ClaimRequest(key, "Device", hardware_id), CONTACT)


async def test_a_template_comes_back_as_it_was_given_and_its_key_only_once(
    services: Services, tenant_id: TenantId
) -> None:
    await services.profiles.create(tenant_id, NewProfile("P", "p_1"), OPERATOR)
    new = NewTemplate(
        name="Batch 7",
        profile_id="p_1",
        hardware_id_pattern="[0-9A-F]{2}(:[0-9A-F]{2}){5}",
        expires_at=NOON + timedelta(days=30),
        one_time=False,
        max_claims=500,
        credential_type=CredentialKind.PSK,
        default_groups=["cold", "cold", "new"],
    )

    made = await services.templates.create(tenant_id, new, OPERATOR)

    template = made.template
    assert await services.templates.get(tenant_id, template.template_id) == template
    for name in (
        "name",
        "profile_id",
        "hardware_id_pattern",
        "expires_at",
        "one_time",
        "max_claims",
        "credential_type",
    ):
        assert getattr(template, name) == getattr(new, name)
    assert (template.default_groups, template.status, template.claims) == (["cold", "new"], TemplateStatus.ACTIVE, 0)
    assert (len(template.template_id), template.created_by) == (26, "operator:ada")
    assert made.provision_key.reveal().startswith("pk_")
    [row] = await services.rows("SELECT key_hash FROM provisioning_template")
    assert row["key_hash"] == secrets.digest(made.provision_key.reveal())
    assert len(f"claim-{template.template_id}") <= 32


async def test_the_claim_psk_rests_sealed_and_is_bound_to_its_template(services: Services, tenant_id: TenantId) -> None:
    made = await services.templates.create(tenant_id, NewTemplate("T"), OPERATOR)
    template_id = made.template.template_id
    async with services.database.connection() as connection:
        found = await templates.sealed_claim_psk(connection, template_id)
        assert await templates.sealed_claim_psk(connection, "unknown") is None
    assert found is not None
    owner, status, sealed = found

    expected = HKDF(SHA256(), 32, None, b"gatehouse claim psk").derive(made.provision_key.reveal().encode())
    assert (owner, status) == (tenant_id, TemplateStatus.ACTIVE)
    assert services.ring.open(sealed, claim_psk_context(tenant_id, template_id)).reveal() == expected
    other = (await services.templates.create(tenant_id, NewTemplate("U"), OPERATOR)).template
    with pytest.raises(SealBroken):
        services.ring.open(sealed, claim_psk_context(tenant_id, other.template_id))


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "name"),
    ({"profile_id": "p_unknown"}, "profile_id"),
    ({"profile_id": "\x00"}, "profile_id"),
    ({"hardware_id_pattern": "("}, "hardware_id_pattern"),
    ({"hardware_id_pattern": r"(a)\1"}, "hardware_id_pattern"),
    ({"hardware_id_pattern": ""}, "hardware_id_pattern"),
    ({"expires_at": NOON}, "expires_at"),
    ({"expires_at": NOON.replace(tzinfo=None)}, "expires_at"),
    ({"max_claims": 0}, "max_claims"),
    ({"max_claims": 2**31}, "max_claims"),
    ({"default_groups": ["\x00"]}, "default_groups"),
    ({"status": TemplateStatus.USED}, "status"),
]


async def test_a_template_may_be_made_disabled(services: Services, tenant_id: TenantId) -> None:
    made = await services.templates.create(tenant_id, NewTemplate("T", status=TemplateStatus.DISABLED), OPERATOR)
    assert made.template.status is TemplateStatus.DISABLED
    template_id = made.template.template_id
    assert (await services.templates.get(tenant_id, template_id)).status is TemplateStatus.DISABLED


async def test_malformed_templates_are_refused(services: Services, tenant_id: TenantId) -> None:
    for wrong, field in MALFORMED:
        with pytest.raises(InvalidArgument) as refused:
            await services.templates.create(tenant_id, NewTemplate(**{"name": "T", **wrong}), OPERATOR)
        assert refused.value.field == field, wrong
    assert await services.rows("SELECT 1 FROM provisioning_template") == []


async def test_an_update_is_felt_by_the_next_claim(services: Services, tenant_id: TenantId) -> None:
    made = await services.templates.create(tenant_id, NewTemplate("T"), OPERATOR)
    template_id, key = made.template.template_id, made.provision_key

    async def change(**said: Any) -> None:
        await services.templates.update(tenant_id, template_id, TemplateChanges(**said), OPERATOR)

    await change(hardware_id_pattern="A-.*", default_groups=["a"], name="New")
    with pytest.raises(Refused):
        await claim(services, key, "B-1")
    claimed = await claim(services, key, "A-1")
    assert (await services.devices.get(tenant_id, claimed.device_id)).groups == ["a"]
    await change(hardware_id_pattern=None, default_groups=None, credential_type=CredentialKind.PSK)
    assert (await claim(services, key, "B-1")).credential_type is CredentialKind.PSK
    await change(expires_at=NOON - timedelta(seconds=1))
    with pytest.raises(Refused):
        await claim(services, key, "B-2")
    await change(expires_at=None, max_claims=2)
    with pytest.raises(Refused):
        await claim(services, key, "B-2")  # the claims from before are counted
    await change(max_claims=3)
    assert (await claim(services, key, "B-2")).created
    after = await services.templates.get(tenant_id, template_id)
    assert (after.name, after.claims, after.max_claims, after.status) == ("New", 3, 3, TemplateStatus.ACTIVE)
    for wrong in ({"template_id": "other"}, {"status": TemplateStatus.USED}, {"max_claims": -1}):
        with pytest.raises(InvalidArgument):
            await change(**wrong)


async def test_a_one_time_key_stays_used_until_one_time_is_taken_back(services: Services, tenant_id: TenantId) -> None:
    made = await services.templates.create(tenant_id, NewTemplate("T", one_time=True), OPERATOR)
    template_id, key = made.template.template_id, made.provision_key
    await claim(services, key, "A")

    async def change(**said: Any) -> TemplateStatus:
        return (await services.templates.update(tenant_id, template_id, TemplateChanges(**said), OPERATOR)).status

    with pytest.raises(FailedPrecondition):
        await change(status=TemplateStatus.ACTIVE)
    assert await change(status=TemplateStatus.DISABLED) is TemplateStatus.DISABLED
    with pytest.raises(FailedPrecondition):
        await change(status=TemplateStatus.ACTIVE)
    assert await change(one_time=False, status=TemplateStatus.ACTIVE) is TemplateStatus.ACTIVE
    assert (await claim(services, key, "B")).created
    assert await change(one_time=True) is TemplateStatus.USED
    with pytest.raises(Refused):
        await claim(services, key, "C")


async def test_a_deleted_template_is_unknown_and_its_devices_stay(services: Services, tenant_id: TenantId) -> None:
    made = await services.templates.create(tenant_id, NewTemplate("T"), OPERATOR)
    claimed = await claim(services, made.provision_key, "A")

    await services.templates.delete(tenant_id, made.template.template_id, OPERATOR)

    with pytest.raises(Refused):
        await claim(services, made.provision_key, "A")
    assert services.book.reasons == ["unknown provisioning key"]
    assert (await services.devices.get(tenant_id, claimed.device_id)).template_id is None


async def test_the_devices_of_a_template(services: Services, tenant_id: TenantId) -> None:
    one = await services.templates.create(tenant_id, NewTemplate("One"), OPERATOR)
    two = await services.templates.create(tenant_id, NewTemplate("Two"), OPERATOR)
    made = []
    for n in range(3):
        made.append((await claim(services, one.provision_key, f"A-{n}")).device_id)
        services.clock.advance(seconds=1)
    await claim(services, two.provision_key, "B")
    await services.devices.register(tenant_id, NewDevice("D", "C"), OPERATOR)

    first = await services.templates.devices(tenant_id, one.template.template_id, Page(2))
    rest = await services.templates.devices(tenant_id, one.template.template_id, Page(2, first.next_cursor))

    assert [d.device_id for d in first.items + rest.items] == made
    assert (await services.templates.get(tenant_id, one.template.template_id)).claims == 3


async def test_revoking_a_batch_ends_its_credentials_and_no_others(
    services: Services, tenant_id: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.templates.DEVICES_AT_ONCE", 2)
    made = await services.templates.create(tenant_id, NewTemplate("T"), OPERATOR)
    claimed = [await claim(services, made.provision_key, f"A-{n}") for n in range(5)]
    by_hand = await services.devices.register(tenant_id, NewDevice("D", "C"), OPERATOR)
    await services.credentials.issue_api_key(tenant_id, claimed[0].device_id, "second", None, OPERATOR)

    result = await services.templates.revoke_devices(tenant_id, made.template.template_id, OPERATOR)

    assert (result.devices, result.credentials, result.remaining, result.unconfirmed) == (5, 6, 0, 0)
    assert result.template.status is TemplateStatus.DISABLED
    assert {e.device_id for e in services.doors.ended} == {c.device_id for c in claimed}
    assert len(services.doors.ended) == 6
    living = await services.rows("SELECT device_id FROM credential WHERE revoked_at IS NULL")
    assert [r["device_id"] for r in living] == [by_hand.device.device_id]
    assert (await services.kinds(tenant_id)).count("credential.revoked") == 6
    with pytest.raises(Refused):
        await claim(services, made.provision_key, "A-0")

    again = await services.templates.revoke_devices(tenant_id, made.template.template_id, OPERATOR)
    assert (again.devices, again.credentials, len(services.doors.ended)) == (5, 0, 6)


async def test_other_tenants_find_nothing(services: Services, tenant_id: TenantId) -> None:
    made = await services.templates.create(tenant_id, NewTemplate("T"), OPERATOR)
    template_id = made.template.template_id
    other = (await services.tenants.create("Other", None, OPERATOR)).tenant_id
    for attempt in (
        services.templates.get(other, template_id),
        services.templates.get(tenant_id, "\x00"),
        services.templates.update(other, template_id, TemplateChanges(name="x"), OPERATOR),
        services.templates.delete(other, template_id, OPERATOR),
        services.templates.devices(other, template_id, Page()),
        services.templates.revoke_devices(other, template_id, OPERATOR),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert (await services.templates.list(other, Page())).items == []
    assert (await services.templates.list(tenant_id, Page())).items == [replace(made.template)]
