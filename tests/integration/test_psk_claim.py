"""Claim PSKs: which template's key opens a claim association, and what all others have in common."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from registry.claim_psk import ClaimPsks, is_claim_identity
from registry.errors import Unauthenticated
from registry.key_claim import Claimed, ClaimRequest
from registry.model import CredentialKind, Template, TenantId
from registry.sealing import KeyRing, SealContext
from registry.secrets import Secret
from registry.storage import credentials
from registry.storage.database import Database
from registry.templates import NewTemplate, TemplateChanges, TemplateStatus, claim_psk
from tests.services import CONTACT, OPERATOR, Services

NONCE = "a nonce of its own, kept in flash"


@pytest.fixture
def services(database: Database) -> Services:
    return Services(database)


@pytest.fixture
def claim_psks(services: Services) -> ClaimPsks:
    return claim_psks_of(services)


def claim_psks_of(services: Services, ring: KeyRing | None = None) -> ClaimPsks:
    return ClaimPsks(
        services.database, ring or services.ring, services.book, clock=services.clock, random=lambda n: b"?" * n
    )


async def template(services: Services, tenant_id: TenantId, **said: object) -> tuple[Template, Secret[str]]:
    new = NewTemplate(**{"name": "Batch 7", "credential_type": CredentialKind.PSK, **said})  # type: ignore[arg-type]
    made = await services.templates.create(tenant_id, new, OPERATOR)
    return made.template, made.provision_key


def identity_of(made: Template) -> bytes:
    return f"claim-{made.template_id}".encode()


async def opens(claim_psks: ClaimPsks, made: Template, key: Secret[str]) -> bool:
    """Whether the template's key opens an association now."""
    offer = await claim_psks.offer(identity_of(made), CONTACT)
    await asyncio.sleep(0)  # a refusal is noted behind the answer
    if offer.template_id is None:
        assert offer.key.reveal() == b"?" * 32, "a stand-in"
        with pytest.raises(Unauthenticated):
            claim_psks.confirm(offer)
        return False
    assert offer.key == claim_psk(key)
    assert claim_psks.confirm(offer) == made.template_id
    return True


async def claimed(services: Services, key: Secret[str], hardware_id: str = "HW-1") -> Claimed:
    return await services.key_claim.claim(ClaimRequest(key, "A sensor", hardware_id, nonce=NONCE), CONTACT)


async def used(services: Services, made: Claimed) -> None:
    assert made.issued is not None
    async with services.database.transaction() as connection:
        await credentials.mark_first_use(
            connection, made.tenant_id, made.device_id, made.issued.credential_id, services.clock(), "corr-9"
        )


def test_only_the_prefix_makes_an_identity_a_template_s() -> None:
    assert is_claim_identity(b"claim-abc")
    assert not is_claim_identity(b"meter-claim-7")
    assert not is_claim_identity(b"")


async def test_the_identity_of_a_template_gets_the_key_derived_from_its_own(
    services: Services, tenant_id: TenantId, claim_psks: ClaimPsks
) -> None:
    made, key = await template(services, tenant_id)
    other, _ = await template(services, tenant_id)
    assert await opens(claim_psks, made, key)
    assert (await claim_psks.offer(identity_of(other), CONTACT)).key != claim_psk(key)
    assert len(identity_of(made)) <= 32, "an identity of the length that old stacks take"


async def test_what_no_template_is_called_gets_a_stand_in(claim_psks: ClaimPsks) -> None:
    for identity in (b"claim-", b"claim-nobody", b"claim-\x00", b"claim-\xff" * 40, b"claim-%s"):
        offer = await claim_psks.offer(identity, CONTACT)
        assert (offer.template_id, offer.key.reveal()) == (None, b"?" * 32)


async def test_disabled_and_expired_templates_look_like_unknown_ones(
    services: Services, tenant_id: TenantId, claim_psks: ClaimPsks
) -> None:
    made, key = await template(services, tenant_id, expires_at=services.clock.now.replace(hour=13))
    await services.templates.update(
        tenant_id, made.template_id, TemplateChanges(status=TemplateStatus.DISABLED), OPERATOR
    )
    assert not await opens(claim_psks, made, key)
    await services.templates.update(
        tenant_id, made.template_id, TemplateChanges(status=TemplateStatus.ACTIVE), OPERATOR
    )
    assert await opens(claim_psks, made, key)
    services.clock.advance(hours=2)
    assert not await opens(claim_psks, made, key)
    assert services.book.reasons == ["template disabled", "template expired"]


async def test_a_used_template_opens_only_while_its_answer_may_have_been_lost(
    services: Services, tenant_id: TenantId, claim_psks: ClaimPsks
) -> None:
    made, key = await template(services, tenant_id, one_time=True)
    first = await claimed(services, key)
    assert await opens(claim_psks, made, key), "the device may ask again"
    assert (await claimed(services, key)).issued == first.issued
    await used(services, first)
    assert not await opens(claim_psks, made, key)
    assert services.book.reasons == ["template used"]


async def test_a_revoked_answer_is_not_waited_for(
    services: Services, tenant_id: TenantId, claim_psks: ClaimPsks
) -> None:
    made, key = await template(services, tenant_id, one_time=True)
    first = await claimed(services, key)
    assert first.issued is not None
    await services.credentials.revoke(tenant_id, first.device_id, first.issued.credential_id, OPERATOR)
    assert not await opens(claim_psks, made, key)


async def test_a_full_template_opens_for_those_it_made(
    services: Services, tenant_id: TenantId, claim_psks: ClaimPsks
) -> None:
    made, key = await template(services, tenant_id, max_claims=1)
    await used(services, await claimed(services, key))
    assert await opens(claim_psks, made, key)


async def test_every_offer_opens_one_seal(
    services: Services, tenant_id: TenantId, claim_psks: ClaimPsks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known, unknown or disabled: the time of an answer must not tell which it is."""
    made, _ = await template(services, tenant_id)
    gone, _ = await template(services, tenant_id)
    await services.templates.update(
        tenant_id, gone.template_id, TemplateChanges(status=TemplateStatus.DISABLED), OPERATOR
    )
    opened: list[str] = []
    real = KeyRing.open

    def counting(ring: KeyRing, sealed: bytes, context: SealContext) -> Secret[bytes]:
        opened.append(context.purpose)
        return real(ring, sealed, context)

    monkeypatch.setattr(KeyRing, "open", counting)
    for identity in (identity_of(made), identity_of(gone), b"claim-nobody"):
        opened.clear()
        await claim_psks.offer(identity, CONTACT)
        assert opened == ["claim-psk"]


async def test_a_damaged_seal_is_a_stand_in_and_told(services: Services, tenant_id: TenantId) -> None:
    made, _ = await template(services, tenant_id)
    foreign = claim_psks_of(services, KeyRing.generate("k9"))
    assert (await foreign.offer(identity_of(made), CONTACT)).template_id is None
    await asyncio.sleep(0)
    assert "does not open" in services.book.reasons[-1]


async def test_a_claim_with_another_template_s_key_is_refused_as_every_other(
    services: Services, tenant_id: TenantId
) -> None:
    made, _ = await template(services, tenant_id)
    _, other_key = await template(services, tenant_id)
    request = ClaimRequest(other_key, "A sensor", "HW-1", nonce=NONCE)
    with pytest.raises(Exception, match="provisioning refused"):
        await services.key_claim.claim(replace(request, proven_template=made.template_id), CONTACT)
