"""Seed 001: a device claims its identity with its batch's key, once, whatever is lost or raced."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from registry import secrets
from registry.credentials import IssuedApiKey
from registry.devices import NewDevice
from registry.errors import FailedPrecondition, InvalidArgument, Refused
from registry.key_claim import Claimed, ClaimRequest
from registry.model import AnchorMode, CredentialKind, DeviceStatus, ProfileId, Template, TemplateStatus, TenantId
from registry.profiles import NewProfile
from registry.psk import IssuedPsk, seal_context
from registry.sealing import KeyRing
from registry.secrets import Secret
from registry.storage import credentials, templates
from registry.storage.database import Database
from registry.templates import NewTemplate, TemplateChanges
from tests.services import CONTACT, NOON, OPERATOR, Services

NONCE = "a nonce of its own, kept in flash"


@pytest.fixture
def services(database: Database) -> Services:
    return Services(database)


async def template(services: Services, tenant_id: TenantId, **said: object) -> tuple[Template, ClaimRequest]:
    """A template and the request of the first device that holds its key."""
    made = await services.templates.create(tenant_id, NewTemplate(**{"name": "Batch 7", **said}), OPERATOR)  # type: ignore[arg-type]
    return made.template, ClaimRequest(made.provision_key, "Cold Store Sensor 014", "AA:BB:CC:00:11:22")


def api_key(claimed: Claimed) -> str:
    assert isinstance(claimed.issued, IssuedApiKey)
    return claimed.issued.api_key.reveal()


async def first_use(services: Services, claimed: Claimed) -> None:
    assert claimed.issued is not None
    async with services.database.transaction() as connection:
        await credentials.mark_first_use(
            connection, claimed.tenant_id, claimed.device_id, claimed.issued.credential_id, services.clock(), "corr-9"
        )


async def test_first_claim_makes_the_device_its_key_and_one_event(services: Services, tenant_id: TenantId) -> None:
    await services.profiles.create(
        tenant_id,
        NewProfile(
            "Cold store", "p_cold", tags={"use": "cold"}, config={"interval": 60}, anchor_mode=AnchorMode.HASH_CHAIN
        ),
        OPERATOR,
    )
    terms, request = await template(services, tenant_id, profile_id="p_cold", default_groups=["cold", "factory-2"])

    claimed = await services.key_claim.claim(request, CONTACT)

    assert claimed.created
    assert api_key(claimed).startswith("sk_live_")
    device = await services.devices.get(tenant_id, claimed.device_id)
    assert (device.name, device.hardware_id) == ("Cold Store Sensor 014", "AA:BB:CC:00:11:22")
    assert (device.status, device.credential_type) == (DeviceStatus.REGISTERED, CredentialKind.API_KEY)
    assert (device.profile_id, device.groups, device.template_id) == (
        "p_cold",
        ["cold", "factory-2"],
        terms.template_id,
    )
    assert (device.tags, device.config, device.anchor_mode) == (
        {"use": "cold"},
        {"interval": 60},
        AnchorMode.HASH_CHAIN,
    )
    assert await services.kinds(tenant_id) == ["device.provisioned"]
    assert "claim device" in await services.audited(tenant_id)
    [stored] = await services.rows("SELECT lookup, first_used_at FROM credential")
    assert stored["lookup"] == secrets.digest(api_key(claimed))
    assert services.bell.rung == 1


async def test_reclaim_is_quiet_and_brings_no_second_key(services: Services, tenant_id: TenantId) -> None:
    _, request = await template(services, tenant_id)
    first = await services.key_claim.claim(request, CONTACT)

    again = await services.key_claim.claim(replace(request, device_name="Renamed"), CONTACT)

    assert again == replace(first, created=False, issued=None)
    assert await services.kinds(tenant_id) == ["device.provisioned"]
    assert len(await services.rows("SELECT 1 FROM credential")) == 1
    assert (await services.devices.get(tenant_id, first.device_id)).name == "Cold Store Sensor 014"


async def test_reclaim_of_a_device_that_was_registered_by_hand(services: Services, tenant_id: TenantId) -> None:
    by_hand = await services.devices.register(tenant_id, NewDevice("By hand", "AA:BB:CC:00:11:22"), OPERATOR)
    _, request = await template(services, tenant_id)

    claimed = await services.key_claim.claim(replace(request, nonce=NONCE), CONTACT)

    assert (claimed.device_id, claimed.created, claimed.issued) == (by_hand.device.device_id, False, None)


async def test_the_tenant_is_the_keys(services: Services, tenant_id: TenantId) -> None:
    other = await services.tenants.create("Other", None, OPERATOR)
    _, ours = await template(services, tenant_id)
    _, theirs = await template(services, other.tenant_id)

    one = await services.key_claim.claim(ours, CONTACT)
    two = await services.key_claim.claim(theirs, CONTACT)

    assert (one.tenant_id, two.tenant_id) == (tenant_id, other.tenant_id)
    assert two.created
    assert one.device_id != two.device_id


@pytest.mark.parametrize(
    ("said", "changed", "reason"),
    [
        ({"hardware_id_pattern": "DD:.*"}, {}, "hardware_id outside the pattern"),
        ({"expires_at": NOON + timedelta(hours=1)}, {}, "template expired"),
        ({}, {"status": TemplateStatus.DISABLED}, "template disabled"),
    ],
)
async def test_refusals_are_uniform_and_told_to_the_operator(
    services: Services, tenant_id: TenantId, said: dict[str, object], changed: dict[str, object], reason: str
) -> None:
    terms, request = await template(services, tenant_id, **said)
    if changed:
        await services.templates.update(tenant_id, terms.template_id, TemplateChanges(**changed), OPERATOR)  # type: ignore[arg-type]
    services.clock.advance(hours=1)

    with pytest.raises(Refused) as refused:
        await services.key_claim.claim(request, CONTACT)

    assert refused.value.message == "provisioning refused"
    detail = {"hardware_id": "AA:BB:CC:00:11:22", "template_id": terms.template_id}
    assert services.book.refusals == [(tenant_id, reason, detail)]
    assert await services.rows("SELECT 1 FROM device") == []


async def test_an_unknown_key_is_refused_alike(services: Services, tenant_id: TenantId) -> None:
    _, request = await template(services, tenant_id)
    for key in ("", "pk_wrong", "pk_" + "x" * 400, "pk_\ud800", "pk_\x00", request.provision_key.reveal() + "="):
        with pytest.raises(Refused) as refused:
            await services.key_claim.claim(replace(request, provision_key=Secret(key)), CONTACT)
        assert refused.value.message == "provisioning refused"
    assert {(tenant, reason) for tenant, reason, _ in services.book.refusals} == {(None, "unknown provisioning key")}


MALFORMED: list[dict[str, Any]] = [
    {"device_name": ""},
    {"device_name": "  "},
    {"device_name": "x" * 257},
    {"device_name": "two\nlines"},
    {"device_name": "nul\x00"},
    {"hardware_id": ""},
    {"hardware_id": "two words"},
    {"hardware_id": "ä"},
    {"hardware_id": "x" * 129},
    {"nonce": "short"},
    {"nonce": "n" * 129},
    {"nonce": "control\x07character"},
    {"csr": b"x" * 20_000},
]


async def test_form_is_judged_the_same_with_a_good_key_and_a_bad_one(services: Services, tenant_id: TenantId) -> None:
    _, request = await template(services, tenant_id)
    for wrong in MALFORMED:
        malformed = replace(request, **wrong)
        with pytest.raises(InvalidArgument) as with_good_key:
            await services.key_claim.claim(malformed, CONTACT)
        with pytest.raises(InvalidArgument) as with_bad_key:
            await services.key_claim.claim(replace(malformed, provision_key=Secret("pk_no")), CONTACT)
        assert with_good_key.value.message == with_bad_key.value.message


async def test_a_key_must_be_the_associations(services: Services, tenant_id: TenantId) -> None:
    terms, request = await template(services, tenant_id)
    other, _ = await template(services, tenant_id)

    with pytest.raises(Refused):
        await services.key_claim.claim(replace(request, proven_template=other.template_id), CONTACT)

    assert (await services.key_claim.claim(replace(request, proven_template=terms.template_id), CONTACT)).created


async def test_psk_templates_give_identity_and_key(services: Services, tenant_id: TenantId) -> None:
    _, request = await template(services, tenant_id, credential_type=CredentialKind.PSK)

    claimed = await services.key_claim.claim(request, CONTACT)

    assert isinstance(claimed.issued, IssuedPsk)
    assert (claimed.credential_type, len(claimed.issued.key.reveal())) == (CredentialKind.PSK, 32)
    [row] = await services.rows("SELECT lookup, sealed_key, credential_id FROM credential")
    assert row["lookup"] == claimed.issued.identity.encode()
    assert services.ring.open(row["sealed_key"], seal_context(tenant_id, row["credential_id"], 1)) == claimed.issued.key


async def test_x509_templates_need_a_csr_and_an_authority_and_make_nothing_without(
    services: Services, tenant_id: TenantId
) -> None:
    terms, request = await template(services, tenant_id, credential_type=CredentialKind.X509, one_time=True)

    with pytest.raises(FailedPrecondition, match="csr"):
        await services.key_claim.claim(request, CONTACT)

    assert await services.rows("SELECT 1 FROM device") == []
    assert (await services.templates.get(tenant_id, terms.template_id)).status is TemplateStatus.ACTIVE


# -- the nonce ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CredentialKind.API_KEY, CredentialKind.PSK])
async def test_a_repeat_with_the_nonce_brings_the_same_secret_until_it_is_used(
    services: Services, tenant_id: TenantId, kind: CredentialKind
) -> None:
    _, request = await template(services, tenant_id, credential_type=kind)
    request = replace(request, nonce=NONCE)
    first = await services.key_claim.claim(request, CONTACT)

    again = await services.key_claim.claim(request, CONTACT)
    with_another = await services.key_claim.claim(replace(request, nonce=NONCE + "!"), CONTACT)
    without = await services.key_claim.claim(replace(request, nonce=None), CONTACT)
    await first_use(services, first)
    after_use = await services.key_claim.claim(request, CONTACT)

    assert again == replace(first, created=False)
    assert (with_another.issued, without.issued, after_use.issued) == (None, None, None)
    assert await services.kinds(tenant_id) == ["device.provisioned", "device.activated"]
    assert len(await services.rows("SELECT 1 FROM credential")) == 1


async def test_the_secret_is_derived_under_the_ring_that_made_it(services: Services, tenant_id: TenantId) -> None:
    _, request = await template(services, tenant_id)
    request = replace(request, nonce=NONCE)
    first = await services.key_claim.claim(request, CONTACT)

    rotated = Services(services.database, services.ring.with_new_active("k2"))
    foreign = Services(services.database, KeyRing.generate())

    assert api_key(await rotated.key_claim.claim(request, CONTACT)) == api_key(first)
    assert (await foreign.key_claim.claim(request, CONTACT)).issued is None


async def test_a_revoked_secret_does_not_come_back(services: Services, tenant_id: TenantId) -> None:
    _, request = await template(services, tenant_id)
    request = replace(request, nonce=NONCE)
    first = await services.key_claim.claim(request, CONTACT)
    assert first.issued is not None

    await services.credentials.revoke(tenant_id, first.device_id, first.issued.credential_id, OPERATOR)
    assert (await services.key_claim.claim(request, CONTACT)).issued is None

    await services.devices.delete(tenant_id, first.device_id, OPERATOR)
    reborn = await services.key_claim.claim(request, CONTACT)
    assert reborn.created
    assert api_key(reborn) != api_key(first)


async def test_two_devices_with_one_nonce_have_two_secrets(services: Services, tenant_id: TenantId) -> None:
    _, request = await template(services, tenant_id)
    request = replace(request, nonce=NONCE)

    one = await services.key_claim.claim(request, CONTACT)
    two = await services.key_claim.claim(replace(request, hardware_id="AA:BB:CC:00:11:23"), CONTACT)

    assert api_key(one) != api_key(two)


async def test_a_used_one_time_template_answers_only_the_lost_answer(services: Services, tenant_id: TenantId) -> None:
    terms, request = await template(services, tenant_id, one_time=True)
    request = replace(request, nonce=NONCE)
    first = await services.key_claim.claim(request, CONTACT)
    assert (await services.templates.get(tenant_id, terms.template_id)).status is TemplateStatus.USED

    assert (await services.key_claim.claim(request, CONTACT)).issued == first.issued
    for refused in (
        replace(request, nonce=None),
        replace(request, nonce=NONCE + "!"),
        replace(request, hardware_id="AA:BB:CC:00:11:23"),
    ):
        with pytest.raises(Refused):
            await services.key_claim.claim(refused, CONTACT)
    await first_use(services, first)
    with pytest.raises(Refused):
        await services.key_claim.claim(request, CONTACT)

    assert services.book.reasons == ["template used", "template used", "no claim left", "template used"]


# -- many at once ------------------------------------------------------------------------------------------------------


async def test_200_claims_of_one_hardware_id_make_one_device_one_key_one_event(
    services: Services, tenant_id: TenantId
) -> None:
    _, request = await template(services, tenant_id)

    claims = await asyncio.gather(*(services.key_claim.claim(request, CONTACT) for _ in range(200)))

    assert Counter(c.created for c in claims) == {True: 1, False: 199}
    assert Counter(c.issued is None for c in claims) == {False: 1, True: 199}
    assert len({c.device_id for c in claims}) == 1
    assert len(await services.rows("SELECT 1 FROM device")) == 1
    assert len(await services.rows("SELECT 1 FROM credential")) == 1
    assert await services.kinds(tenant_id) == ["device.provisioned"]


async def test_200_claims_of_one_hardware_id_with_one_nonce_get_one_key(
    services: Services, tenant_id: TenantId
) -> None:
    _, request = await template(services, tenant_id, max_claims=5)
    request = replace(request, nonce=NONCE)

    claims = await asyncio.gather(*(services.key_claim.claim(request, CONTACT) for _ in range(200)))

    assert len({api_key(c) for c in claims}) == 1
    assert await services.kinds(tenant_id) == ["device.provisioned"]
    [counted] = await services.rows("SELECT counted_claims FROM provisioning_template")
    assert counted["counted_claims"] == 1


async def test_200_claims_with_a_one_time_key_have_one_winner(services: Services, tenant_id: TenantId) -> None:
    terms, request = await template(services, tenant_id, one_time=True)

    outcomes = await asyncio.gather(
        *(services.key_claim.claim(replace(request, hardware_id=f"HW-{n}"), CONTACT) for n in range(200)),
        return_exceptions=True,
    )

    assert Counter(type(o) for o in outcomes) == {Claimed: 1, Refused: 199}
    assert {o.message for o in outcomes if isinstance(o, Refused)} == {"provisioning refused"}
    assert len(await services.rows("SELECT 1 FROM device")) == 1
    after = await services.templates.get(tenant_id, terms.template_id)
    assert (after.status, after.claims) == (TemplateStatus.USED, 1)


async def test_a_quota_is_never_exceeded_and_lets_its_devices_reclaim(services: Services, tenant_id: TenantId) -> None:
    terms, request = await template(services, tenant_id, max_claims=7)
    requests = [replace(request, hardware_id=f"HW-{n % 40}") for n in range(120)]

    outcomes = await asyncio.gather(*(services.key_claim.claim(r, CONTACT) for r in requests), return_exceptions=True)

    made = [o for o in outcomes if isinstance(o, Claimed) and o.created]
    assert len(made) == 7
    assert {type(o) for o in outcomes} == {Claimed, Refused}
    after = await services.templates.get(tenant_id, terms.template_id)
    assert (after.status, after.claims) == (TemplateStatus.ACTIVE, 7)
    device = await services.devices.get(tenant_id, made[0].device_id)
    again = await services.key_claim.claim(replace(request, hardware_id=device.hardware_id or ""), CONTACT)
    assert (again.device_id, again.created) == (made[0].device_id, False)


async def blocked(services: Services, task: asyncio.Task[Any]) -> None:
    """Until `task` waits for a lock in the database, or has ended without."""
    while not task.done():
        waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        if await services.rows(waiting):
            return


async def test_revoking_a_batch_waits_for_a_claim_under_way(services: Services, tenant_id: TenantId) -> None:
    terms, _ = await template(services, tenant_id)
    async with services.database.transaction() as connection:
        held = await templates.hold_terms(connection, tenant_id, terms.template_id)
        assert held is not None
        revoking = asyncio.create_task(services.templates.revoke_devices(tenant_id, terms.template_id, OPERATOR))
        await blocked(services, revoking)
        device_id = uuid4()
        await connection.execute(
            """
            INSERT INTO device (device_id, tenant_id, hardware_id, name, status, anchor_mode, credential_type,
                                template_id)
            VALUES ($1, $2, 'HW-1', 'Late', 'registered', 'ANCHOR_MODE_MERKLE_BATCH', 'api_key', $3)
            """,
            device_id,
            tenant_id,
            terms.template_id,
        )
        await connection.execute(
            "INSERT INTO credential (credential_id, tenant_id, device_id, kind, lookup)"
            " VALUES ($1, $2, $3, 'api_key', 'x')",
            uuid4(),
            tenant_id,
            device_id,
        )

    result = await revoking

    assert (result.devices, result.credentials) == (1, 1)
    assert await services.rows("SELECT 1 FROM credential WHERE revoked_at IS NULL") == []


@pytest.mark.parametrize("said", [{}, {"max_claims": 5}, {"one_time": True}])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": TemplateStatus.DISABLED}, "template disabled"),
        ({"expires_at": NOON}, "template expired"),
        ({"hardware_id_pattern": "ZZ"}, "hardware_id outside the pattern"),
    ],
)
async def test_a_claim_waits_for_a_change_under_way_and_obeys_it(
    services: Services, tenant_id: TenantId, said: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    terms, request = await template(services, tenant_id, **said)
    async with services.database.transaction() as connection:
        held = await templates.lock(connection, tenant_id, terms.template_id)
        claiming = asyncio.create_task(services.key_claim.claim(request, CONTACT))
        await blocked(services, claiming)
        await templates.update(connection, replace(held, **change))

    with pytest.raises(Refused):
        await claiming

    assert services.book.reasons == [reason]
    assert await services.rows("SELECT 1 FROM device") == []
    assert (await services.templates.get(tenant_id, terms.template_id)).claims == 0


@pytest.mark.parametrize("said", [{}, {"max_claims": 5}])
async def test_a_claim_that_waits_for_another_profile_takes_what_that_one_gives(
    services: Services, tenant_id: TenantId, said: dict[str, Any]
) -> None:
    for name in ("before", "after"):
        profile = NewProfile(name, name, tags={"of": name}, config={"of": name}, anchor_mode=AnchorMode.HASH_CHAIN)
        await services.profiles.create(tenant_id, profile, OPERATOR)
    terms, request = await template(services, tenant_id, profile_id="before", **said)
    async with services.database.transaction() as connection:
        held = await templates.lock(connection, tenant_id, terms.template_id)
        claiming = asyncio.create_task(services.key_claim.claim(request, CONTACT))
        await blocked(services, claiming)
        await templates.update(connection, replace(held, profile_id=ProfileId("after")))

    device = await services.devices.get(tenant_id, (await claiming).device_id)
    assert (device.profile_id, device.tags, device.config) == ("after", {"of": "after"}, {"of": "after"})
    assert device.anchor_mode is AnchorMode.HASH_CHAIN


async def test_a_claim_under_way_counts_when_the_template_becomes_one_time(
    services: Services, tenant_id: TenantId
) -> None:
    terms, request = await template(services, tenant_id)
    async with services.database.transaction() as connection:
        held = await templates.lock(connection, tenant_id, terms.template_id)
        claims = [
            asyncio.create_task(services.key_claim.claim(replace(request, hardware_id=f"HW-{n}"), CONTACT))
            for n in range(5)
        ]
        await blocked(services, claims[0])
        await templates.update(connection, replace(held, one_time=True))

    outcomes = await asyncio.gather(*claims, return_exceptions=True)

    assert Counter(type(o) for o in outcomes) == {Claimed: 1, Refused: 4}


# -- secrecy -----------------------------------------------------------------------------------------------------------


async def test_no_secret_is_in_the_database_or_in_a_repr(services: Services, tenant_id: TenantId) -> None:
    _, request = await template(services, tenant_id)
    request = replace(request, nonce=NONCE)
    claimed = await services.key_claim.claim(request, CONTACT)

    dump = ""
    for table in ("device", "credential", "event", "audit", "provisioning_template", "tenant"):
        dump += "".join(str(dict(r)) for r in await services.rows(f"SELECT * FROM {table}"))
    seen = dump + repr(request) + repr(claimed)

    for secret in (request.provision_key.reveal(), api_key(claimed), NONCE):
        assert secret not in seen
