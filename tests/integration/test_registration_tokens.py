"""Seed 004: a one-time token brings one named device online, once, whatever is lost or raced."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from registry.devices import DeviceChanges
from registry.errors import AlreadyExists, ErrorCode, FailedPrecondition, InvalidArgument, NotFound, Refused
from registry.model import ClientCertificate, CredentialKind, DeviceStatus, TenantId
from registry.paging import Page
from registry.profiles import NewProfile
from registry.registration_tokens import DEFAULT_TTL_SECONDS, MAX_TTL_SECONDS, CreatedToken, NewToken, TokenStatus
from registry.secrets import Secret, digest
from registry.storage.database import Database
from tests.certificate_services import CertificateServices, DeviceKey, der, verify
from tests.conftest import MakeTenant
from tests.services import CONTACT, NOON, OPERATOR


@pytest.fixture
async def services(database: Database) -> CertificateServices:
    return await CertificateServices.open(database)


async def token(services: CertificateServices, tenant_id: TenantId, **said: object) -> CreatedToken:
    return await services.tokens.create(tenant_id, NewToken(**{"name": "Pump 7", **said}), OPERATOR)  # type: ignore[arg-type]


async def refused(services: CertificateServices, secret: Secret[str], csr: bytes) -> Refused:
    with pytest.raises(Refused) as error:
        await services.tokens.provision(secret, csr, CONTACT)
    return error.value


async def test_a_token_names_a_device_that_is_pending(services: CertificateServices, tenant_id: TenantId) -> None:
    await services.profiles.create(tenant_id, NewProfile("Pumps", "p_pump", tags={"use": "pump"}), OPERATOR)
    made = await token(
        services, tenant_id, hardware_id="AA:BB", profile_id="p_pump", groups=["north"], tags={"line": "A"}
    )

    text = made.secret.reveal()
    assert text.startswith("rt_")
    assert len(text) == 46
    assert "rt_" not in repr(made)
    assert made.token.expires_at == NOON + timedelta(seconds=DEFAULT_TTL_SECONDS)
    device = await services.devices.get(tenant_id, made.token.device_id)
    assert (device.status, device.credential_type) == (DeviceStatus.PENDING, CredentialKind.X509)
    assert (device.hardware_id, device.profile_id, device.groups) == ("AA:BB", "p_pump", ["north"])
    assert device.tags == {"use": "pump", "line": "A"}
    assert await services.kinds(tenant_id) == ["device.registered"]
    assert (await services.audited(tenant_id))[-1] == "create registration_token"
    [row] = await services.rows("SELECT token_hash FROM registration_token")
    assert row["token_hash"] == digest(text)
    listed = await services.tokens.list(tenant_id, Page())
    assert listed.items == [made.token]


async def test_the_device_makes_its_key_and_gets_a_certificate(
    services: CertificateServices, tenant_id: TenantId, tmp_path: Path
) -> None:
    made = await token(services, tenant_id)
    done = await services.tokens.provision(made.secret, DeviceKey.new().csr(), CONTACT)

    assert (done.tenant_id, done.device_id, done.created) == (tenant_id, made.token.device_id, True)
    assert verify(tmp_path, services, done.issued).endswith("OK\n")
    assert (await services.devices.get(tenant_id, done.device_id)).status is DeviceStatus.REGISTERED
    assert await services.kinds(tenant_id) == ["device.registered", "device.provisioned"]
    assert (await services.audited(tenant_id))[-1] == "provision device"
    assert (await services.tokens.list(tenant_id, Page())).items == []
    identity = await services.resolver.admit(ClientCertificate(der(done.issued.certificate_pem)), CONTACT)
    assert identity.device_id == done.device_id


async def test_the_same_key_gets_the_same_certificate_again_and_another_is_refused(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    made, key = await token(services, tenant_id), DeviceKey.new()
    first = await services.tokens.provision(made.secret, key.csr(), CONTACT)
    again = await services.tokens.provision(made.secret, key.csr(), CONTACT)

    assert again.issued == first.issued
    assert not again.created
    assert (await refused(services, made.secret, DeviceKey.new().csr())).reason == "token used"
    assert (await refused(services, made.secret, b"no request")).reason == "token used"
    assert await services.kinds(tenant_id) == ["device.registered", "device.provisioned"]
    services.clock.advance(seconds=DEFAULT_TTL_SECONDS)
    assert (await refused(services, made.secret, key.csr())).reason == "token expired"


async def test_one_hundred_at_once_with_one_key_get_one_certificate_on_two_nodes(
    dsn: str, services: CertificateServices, tenant_id: TenantId
) -> None:
    made, csr = await token(services, tenant_id), DeviceKey.new().csr()
    second = await Database.open(dsn, size=4)
    try:
        other = await CertificateServices.open(second, ring=services.ring, clock=services.clock)
        async with asyncio.timeout(60):
            done = await asyncio.gather(
                *((services if n % 2 else other).tokens.provision(made.secret, csr, CONTACT) for n in range(100))
            )
    finally:
        await second.close()

    assert len({each.issued.certificate_pem for each in done}) == 1
    assert sum(each.created for each in done) == 1
    assert len(await services.certificate_rows("issued")) == 1
    assert await services.certificate_rows("intended") == []
    assert len(await services.rows("SELECT 1 FROM credential")) == 1
    assert await services.kinds(tenant_id) == ["device.registered", "device.provisioned"]


async def test_one_hundred_at_once_with_different_keys_have_one_winner(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    made = await token(services, tenant_id)
    requests = [DeviceKey.new().csr() for _ in range(100)]
    done = await asyncio.gather(
        *(services.tokens.provision(made.secret, csr, CONTACT) for csr in requests), return_exceptions=True
    )

    [winner] = [n for n, each in enumerate(done) if not isinstance(each, BaseException)]
    assert sum(isinstance(each, Refused) for each in done) == 99
    assert set(services.book.reasons) == {"token used"}
    assert len(await services.certificate_rows("issued")) == 1
    again = await services.tokens.provision(made.secret, requests[winner], CONTACT)
    assert again == done[winner] or not again.created


async def test_every_bad_token_looks_the_same_and_the_request_is_not_judged(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    expired, revoked, used = [await token(services, tenant_id, ttl_seconds=60 * n) for n in (1, 10, 10)]
    await services.tokens.provision(used.secret, DeviceKey.new().csr(), CONTACT)
    await services.tokens.revoke(tenant_id, used.token.token_id, OPERATOR)
    await services.tokens.revoke(tenant_id, revoked.token.token_id, OPERATOR)
    services.clock.advance(seconds=60)

    texts = [expired.secret, revoked.secret, used.secret, Secret("rt_" + "A" * 43), Secret(""), Secret("rt_\x00" * 999)]
    for csr in (DeviceKey.new().csr(), b"no request", b"x" * 2_000_000):
        answers = [await refused(services, text, csr) for text in texts]
        assert {(a.code, a.message, a.retry_after) for a in answers} == {
            (ErrorCode.PERMISSION_DENIED, "provisioning refused", None)
        }
    assert services.book.reasons[:6] == [
        "token expired",
        "unknown registration token",
        "token revoked",
        *["unknown registration token"] * 3,
    ]
    assert all("rt_" not in str(note) for note in services.book.refusals)


async def test_a_bad_request_leaves_a_good_token_usable(services: CertificateServices, tenant_id: TenantId) -> None:
    made, key = await token(services, tenant_id), DeviceKey.new()
    for csr in (b"", b"no request", key.csr()[:-60], key.csr() * 2):
        with pytest.raises(InvalidArgument):
            await services.tokens.provision(made.secret, csr, CONTACT)
    taken = DeviceKey.new()
    await services.provisioned(tenant_id, taken)
    with pytest.raises(InvalidArgument, match="another device"):
        await services.tokens.provision(made.secret, taken.csr(), CONTACT)
    assert (await services.tokens.provision(made.secret, key.csr(), CONTACT)).created


async def test_an_authority_that_cannot_sign_leaves_the_token_usable(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    services.clock.advance(days=6 * 365)
    made = await token(services, tenant_id)
    with pytest.raises(FailedPrecondition):
        await services.tokens.provision(made.secret, DeviceKey.new().csr(), CONTACT)
    assert [t.token_id for t in (await services.tokens.list(tenant_id, Page())).items] == [made.token.token_id]


async def test_a_revoked_certificate_is_not_given_again(services: CertificateServices, tenant_id: TenantId) -> None:
    made, key = await token(services, tenant_id), DeviceKey.new()
    done = await services.tokens.provision(made.secret, key.csr(), CONTACT)
    await services.credentials.revoke(tenant_id, done.device_id, done.issued.credential_id, OPERATOR)
    assert (await refused(services, made.secret, key.csr())).reason == "certificate revoked or expired"


async def test_an_inactive_device_gets_nothing_again(services: CertificateServices, tenant_id: TenantId) -> None:
    made, key = await token(services, tenant_id), DeviceKey.new()
    done = await services.tokens.provision(made.secret, key.csr(), CONTACT)
    await services.devices.update(tenant_id, done.device_id, DeviceChanges(status=DeviceStatus.INACTIVE), OPERATOR)
    assert (await refused(services, made.secret, key.csr())).reason == "device inactive"


async def test_revoking_a_token_takes_the_device_that_never_lived_with_it(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    made = await token(services, tenant_id, hardware_id="AA:BB")
    with pytest.raises(AlreadyExists, match="AA:BB"):
        await token(services, tenant_id, hardware_id="AA:BB")
    await services.tokens.revoke(tenant_id, made.token.token_id, OPERATOR)

    with pytest.raises(NotFound):
        await services.devices.get(tenant_id, made.token.device_id)
    with pytest.raises(NotFound):
        await services.tokens.revoke(tenant_id, made.token.token_id, OPERATOR)
    assert await services.kinds(tenant_id) == ["device.registered", "device.deleted"]
    assert (await token(services, tenant_id, hardware_id="AA:BB")).device.hardware_id == "AA:BB"


async def test_revoking_a_used_token_leaves_the_device_and_its_certificate(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    made, key = await token(services, tenant_id), DeviceKey.new()
    done = await services.tokens.provision(made.secret, key.csr(), CONTACT)
    await services.tokens.revoke(tenant_id, made.token.token_id, OPERATOR)
    assert await services.resolver.admit(ClientCertificate(der(done.issued.certificate_pem)), CONTACT)
    assert (await refused(services, made.secret, key.csr())).reason == "token revoked"


async def test_revoking_while_provisioning_ends_in_one_of_two_ways(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    for _ in range(10):
        made = await token(services, tenant_id)
        provisioned, revoked = await asyncio.gather(
            services.tokens.provision(made.secret, DeviceKey.new().csr(), CONTACT),
            services.tokens.revoke(tenant_id, made.token.token_id, OPERATOR),
            return_exceptions=True,
        )
        assert not isinstance(revoked, BaseException)
        lives = await services.rows("SELECT status FROM device WHERE device_id = $1", made.token.device_id)
        if isinstance(provisioned, BaseException):
            assert isinstance(provisioned, Refused)
            assert lives == []
        else:
            assert [row["status"] for row in lives] == ["registered"]


async def test_expired_tokens_are_listed_as_such_and_pages_follow_one_another(
    services: CertificateServices, tenant_id: TenantId, make_tenant: MakeTenant
) -> None:
    made = [await token(services, tenant_id, name=f"Pump {n}", ttl_seconds=60 + n) for n in range(5)]
    await token(services, await make_tenant())
    services.clock.advance(seconds=62)
    first = await services.tokens.list(tenant_id, Page(limit=3))
    rest = await services.tokens.list(tenant_id, Page(limit=3, cursor=first.next_cursor))
    shown = {t.token_id: t.status for t in (*first.items, *rest.items)}
    assert shown == {
        m.token.token_id: TokenStatus.EXPIRED if n <= 2 else TokenStatus.PENDING for n, m in enumerate(made)
    }
    assert (len(first.items), len(rest.items), rest.next_cursor) == (3, 2, None)


async def test_a_token_is_of_its_tenant(
    services: CertificateServices, tenant_id: TenantId, make_tenant: MakeTenant
) -> None:
    made, other = await token(services, tenant_id), await make_tenant()
    for token_id in (made.token.token_id, uuid4()):
        with pytest.raises(NotFound):
            await services.tokens.revoke(other, token_id, OPERATOR)
    assert (await services.tokens.list(other, Page())).items == []


@pytest.mark.parametrize(
    "said",
    [
        {"name": ""},
        {"name": "two\nlines"},
        {"hardware_id": "with space"},
        {"profile_id": "p_unknown"},
        {"profile_id": "not/one"},
        {"ttl_seconds": 0},
        {"ttl_seconds": MAX_TTL_SECONDS + 1},
        {"tags": {"": "x"}},
        {"groups": ["x"] * 65},
    ],
)
async def test_what_an_operator_cannot_ask_for(
    services: CertificateServices, tenant_id: TenantId, said: dict[str, object]
) -> None:
    with pytest.raises(InvalidArgument):
        await token(services, tenant_id, **said)
    assert await services.rows("SELECT 1 FROM device") == []
