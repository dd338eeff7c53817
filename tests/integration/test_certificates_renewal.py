"""Re-enrolment: a certificate's holder gets its successor, also a few days late; a lost answer locks nobody out."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from registry.credentials import RotateRequest
from registry.devices import DeviceChanges, NewDevice
from registry.enrolment import MAX_PER_HOUR
from registry.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unauthenticated
from registry.hardware_id import PatternCache
from registry.model import (
    ClientCertificate,
    CredentialKind,
    DeviceStatus,
    Identity,
    RenewalRight,
    TenantId,
)
from registry.ports import IssuedCertificate, PreparedIssue
from registry.registration_tokens import Provisioned
from registry.storage import credentials
from registry.storage.database import Database
from registry.templates import NewTemplate, Templates
from tests.certificate_services import CertificateServices, DeviceKey, der, leaf, right, verify
from tests.services import CONTACT, NOON, OPERATOR


@pytest.fixture
async def services(database: Database) -> CertificateServices:
    return await CertificateServices.open(database)


async def admitted(services: CertificateServices, issued: IssuedCertificate) -> bool:
    try:
        await services.resolver.admit(ClientCertificate(der(issued.certificate_pem)), CONTACT)
    except Unauthenticated:
        return False
    return True


async def used(services: CertificateServices, done: Provisioned, issued: IssuedCertificate) -> None:
    """The device has connected with it."""
    async with services.database.transaction() as connection:
        await credentials.mark_first_use(
            connection, done.tenant_id, done.device_id, issued.credential_id, services.clock(), "corr-9"
        )


def right_of(done: Provisioned, issued: IssuedCertificate) -> RenewalRight:
    return RenewalRight(done.tenant_id, done.device_id, issued.credential_id, in_grace=False)


@pytest.mark.parametrize("same_key", [True, False], ids=["renew", "rekey"])
async def test_the_successor_has_the_same_subject_and_the_old_one_keeps_its_end(
    services: CertificateServices, tenant_id: TenantId, tmp_path: Path, same_key: bool
) -> None:
    key = DeviceKey.new()
    done = await services.provisioned(tenant_id, key)
    services.clock.now = done.issued.renew_after
    fresh = await services.enrolment.renew(
        right(done), (key if same_key else DeviceKey.new()).renewal(done.issued), CONTACT
    )

    assert verify(tmp_path, services, fresh).endswith("OK\n")
    assert leaf(fresh).subject == leaf(done.issued).subject
    assert (leaf(fresh).public_key() == leaf(done.issued).public_key()) is same_key
    assert leaf(fresh).serial_number != leaf(done.issued).serial_number
    assert fresh.not_after > done.issued.not_after
    assert await admitted(services, done.issued)
    assert await admitted(services, fresh)
    assert (await services.kinds(tenant_id))[-1] == "credential.rotated"
    assert services.doors.ended == []
    assert await services.certificates.renew_after(tenant_id, done.device_id) == fresh.renew_after
    services.clock.now = done.issued.not_after
    assert not await admitted(services, done.issued)
    assert await admitted(services, fresh)
    assert len((await services.lists.current()).der) > 0
    assert (await services.lists.current()).number == 1


async def test_a_live_session_may_renew(services: CertificateServices, tenant_id: TenantId) -> None:
    key = DeviceKey.new()
    done = await services.provisioned(tenant_id, key)
    identity = await services.resolver.admit(ClientCertificate(der(done.issued.certificate_pem)), CONTACT)
    assert isinstance(identity, Identity)
    assert await services.enrolment.renew(identity, key.renewal(done.issued), CONTACT)


async def test_a_lost_answer_is_given_again_until_the_successor_is_used(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    done, key = await services.provisioned(tenant_id), DeviceKey.new()
    request = key.renewal(done.issued)
    first = await services.enrolment.renew(right(done), request, CONTACT)
    assert await services.enrolment.renew(right(done), request, CONTACT) == first
    assert len(await services.certificate_rows("issued")) == 2

    other = await services.enrolment.renew(right(done), DeviceKey.new().renewal(done.issued), CONTACT)
    assert not await admitted(services, first)  # nobody ever used it
    assert await admitted(services, done.issued)
    assert await admitted(services, other)


async def test_the_same_renewal_sent_many_times_at_once_gives_one_certificate(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    done, key = await services.provisioned(tenant_id), DeviceKey.new()
    request = key.renewal(done.issued)
    answers = await asyncio.gather(*(services.enrolment.renew(right(done), request, CONTACT) for _ in range(9)))
    assert len({each.certificate_pem for each in answers}) == 1
    assert len(await services.certificate_rows("issued")) == 2
    assert await services.certificate_rows("intended") == []
    assert await admitted(services, answers[0])


async def test_a_line_of_renewals_keeps_two_generations(services: CertificateServices, tenant_id: TenantId) -> None:
    done, key = await services.provisioned(tenant_id), DeviceKey.new()
    line = [done.issued]
    for _ in range(3):
        await used(services, done, line[-1])
        services.clock.advance(hours=2)
        line.append(await services.enrolment.renew(right_of(done, line[-1]), key.renewal(done.issued), CONTACT))
    assert [await admitted(services, each) for each in line] == [False, False, True, True]
    assert [each.credential_id for each in services.doors.ended] == [each.credential_id for each in line[:2]]


async def test_a_device_that_went_back_to_its_old_certificate_renews_it_again(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    done = await services.provisioned(tenant_id)
    services.clock.advance(hours=2)
    lost = await services.enrolment.renew(right(done), DeviceKey.new().renewal(done.issued), CONTACT)
    await used(services, done, lost)
    request = DeviceKey.new().renewal(done.issued)
    fresh = await services.enrolment.renew(right(done), request, CONTACT)
    assert services.doors.ended == []  # the connection that asks is not cut before its answer
    assert await services.enrolment.renew(right(done), request, CONTACT) == fresh
    assert [await admitted(services, each) for each in (done.issued, lost, fresh)] == [True, True, True]

    again = await services.enrolment.renew(right(done), DeviceKey.new().renewal(done.issued), CONTACT)
    assert [await admitted(services, each) for each in (done.issued, lost, fresh, again)] == [True, True, False, True]
    await used(services, done, again)
    assert [await admitted(services, each) for each in (done.issued, lost, fresh, again)] == [True, False, False, True]


async def test_other_credentials_of_the_device_are_not_touched(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    key = DeviceKey.new()
    done = await services.provisioned(tenant_id, key)
    foreign = DeviceKey.new().self_signed(NOON)
    registered = await services.foreign.register(tenant_id, done.device_id, foreign, OPERATOR)
    await services.enrolment.renew(right(done), key.renewal(done.issued), CONTACT)
    async with services.database.connection() as connection:
        after = await credentials.get(connection, tenant_id, registered.credential_id)
    assert after == registered


async def test_the_subject_and_the_key_are_checked(services: CertificateServices, tenant_id: TenantId) -> None:
    done, other = await services.provisioned(tenant_id), DeviceKey.new()
    stranger = await services.provisioned(tenant_id, other)
    for csr in (
        DeviceKey.new().csr(),
        DeviceKey.new().csr(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(done.device_id))])),
        DeviceKey.new().renewal(stranger.issued),
        other.renewal(done.issued),
        b"no request",
    ):
        with pytest.raises(InvalidArgument):
            await services.enrolment.renew(right(done), csr, CONTACT)
    assert len(await services.certificate_rows("issued")) == 2


async def test_a_device_that_asks_too_often_waits(services: CertificateServices, tenant_id: TenantId) -> None:
    done = await services.provisioned(tenant_id)
    for _ in range(MAX_PER_HOUR - 1):
        await services.enrolment.renew(right(done), DeviceKey.new().renewal(done.issued), CONTACT)
    with pytest.raises(ResourceExhausted):
        await services.enrolment.renew(right(done), DeviceKey.new().renewal(done.issued), CONTACT)
    services.clock.advance(hours=1)
    assert await services.enrolment.renew(right(done), DeviceKey.new().renewal(done.issued), CONTACT)


async def test_a_device_that_asks_often_at_once_waits_too(
    services: CertificateServices, tenant_id: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = await services.provisioned(tenant_id)
    prepare, everybody = services.certificates.prepare, asyncio.Barrier(MAX_PER_HOUR + 2)

    async def together(*arguments: Any, **more: Any) -> PreparedIssue:
        prepared = await prepare(*arguments, **more)
        await everybody.wait()  # all have been counted as few by now
        return prepared

    monkeypatch.setattr(services.certificates, "prepare", together)
    requests = [DeviceKey.new().renewal(done.issued) for _ in range(everybody.parties)]
    answers = await asyncio.gather(
        *(services.enrolment.renew(right(done), each, CONTACT) for each in requests), return_exceptions=True
    )
    assert sum(isinstance(each, ResourceExhausted) for each in answers) == 3
    assert len(await services.certificate_rows("issued")) == MAX_PER_HOUR
    assert await services.certificate_rows("intended") == []


# -- the grace door ----------------------------------------------------------------------------------------------------


async def door(services: CertificateServices, issued: IssuedCertificate) -> RenewalRight:
    return await services.resolver.admit_for_renewal(ClientCertificate(der(issued.certificate_pem)), CONTACT)


async def test_a_certificate_that_has_just_expired_may_re_enrol_and_nothing_else(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    key = DeviceKey.new()
    done = await services.provisioned(tenant_id, key)
    assert not (await door(services, done.issued)).in_grace
    services.clock.now = done.issued.not_after + timedelta(days=6, hours=23)

    assert not await admitted(services, done.issued)
    given = await door(services, done.issued)
    assert given.in_grace
    assert not isinstance(given, Identity)
    fresh = await services.enrolment.renew(given, key.renewal(done.issued), CONTACT)
    assert await admitted(services, fresh)
    assert await services.enrolment.renew(given, key.renewal(done.issued), CONTACT) == fresh

    services.clock.now = done.issued.not_after + timedelta(days=7, seconds=1)
    with pytest.raises(Unauthenticated) as refused:
        await door(services, done.issued)
    assert refused.value.reason == "credential expired"
    with pytest.raises(Unauthenticated):
        await services.enrolment.renew(given, DeviceKey.new().renewal(done.issued), CONTACT)


async def test_one_that_is_not_valid_yet_never_may(services: CertificateServices, tenant_id: TenantId) -> None:
    done = await services.provisioned(tenant_id)
    services.clock.now = done.issued.not_before - timedelta(seconds=1)
    with pytest.raises(Unauthenticated) as refused:
        await door(services, done.issued)
    assert refused.value.reason == "credential not yet valid"


async def test_the_grace_is_not_for_what_was_ended_by_somebody(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    revoked, rotated, inactive, deleted = [await services.provisioned(tenant_id) for _ in range(4)]
    await services.credentials.revoke(tenant_id, None, revoked.issued.credential_id, OPERATOR)
    await services.credentials.rotate(
        tenant_id, rotated.device_id, RotateRequest(overlap_seconds=60, csr=DeviceKey.new().csr()), OPERATOR
    )
    services.clock.advance(seconds=61)
    reasons = []
    for each in (revoked, rotated):
        with pytest.raises(Unauthenticated) as refused:
            await door(services, each.issued)
        reasons.append(refused.value.reason)
    services.clock.now = NOON + timedelta(days=366)
    await services.devices.update(tenant_id, inactive.device_id, DeviceChanges(status=DeviceStatus.INACTIVE), OPERATOR)
    await services.devices.delete(tenant_id, deleted.device_id, OPERATOR)
    for each in (inactive, deleted):
        with pytest.raises(Unauthenticated) as refused:
            await door(services, each.issued)
        reasons.append(refused.value.reason)
    assert reasons == ["credential revoked", "credential expired", "device inactive", "unknown x509"]


@pytest.mark.parametrize("how", ["one by one", "with its template", "by a rotation at once"])
async def test_who_revokes_all_that_a_device_has_means_what_has_just_expired_too(
    services: CertificateServices, tenant_id: TenantId, how: str
) -> None:
    """Else whoever has stolen it comes back with its successor."""
    templates = Templates(
        services.database,
        key_ring=services.ring,
        clock=services.clock,
        random=os.urandom,
        feed=services.bell,
        teardown=services.doors,
        patterns=PatternCache(),
    )
    made = await templates.create(tenant_id, NewTemplate("T"), OPERATOR)
    done, key = await services.provisioned(tenant_id), DeviceKey.new()
    async with services.database.connection() as connection:
        await connection.execute("UPDATE device SET template_id = $1", made.template.template_id)
    services.clock.advance(seconds=1)
    await services.credentials.rotate(
        tenant_id, done.device_id, RotateRequest(overlap_seconds=60, csr=key.csr()), OPERATOR
    )
    ended_early, latest = await services.credentials.usable(tenant_id, done.device_id)
    assert ended_early == done.issued.credential_id
    services.clock.now = done.issued.not_after + timedelta(days=1)
    assert await services.credentials.usable(tenant_id, done.device_id) == [latest]

    match how:
        case "one by one":
            await services.credentials.revoke(tenant_id, done.device_id, latest, OPERATOR)
        case "with its template":
            await templates.revoke_devices(tenant_id, made.template.template_id, OPERATOR)
        case _:
            await services.credentials.rotate(
                tenant_id, done.device_id, RotateRequest(overlap_seconds=0, csr=DeviceKey.new().csr()), OPERATOR
            )
    rows = await services.rows("SELECT credential_id, revoked_at FROM credential WHERE revoked_at IS NOT NULL")
    assert [(row["credential_id"], row["revoked_at"]) for row in rows] == [(latest, services.clock.now)]
    assert latest not in await services.credentials.usable(tenant_id, done.device_id)


async def test_a_right_ends_with_the_revocation_that_comes_before_its_use(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    key = DeviceKey.new()
    done = await services.provisioned(tenant_id, key)
    given = await door(services, done.issued)
    await services.credentials.revoke(tenant_id, None, done.issued.credential_id, OPERATOR)
    with pytest.raises(Unauthenticated):
        await services.enrolment.renew(given, key.renewal(done.issued), CONTACT)
    assert len(await services.certificate_rows("issued")) == 1


async def test_foreign_certificates_and_keys_are_not_renewed_here(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    new = NewDevice("Pump", "HW-1", credential_type=CredentialKind.X509)
    device = (await services.devices.register(tenant_id, new, OPERATOR)).device
    pem = DeviceKey.new().self_signed(NOON)
    await services.foreign.register(tenant_id, device.device_id, pem, OPERATOR)
    given = await services.resolver.admit_for_renewal(ClientCertificate(der(pem)), CONTACT)
    with pytest.raises(FailedPrecondition, match="foreign"):
        await services.enrolment.renew(given, DeviceKey.new().csr(), CONTACT)
    services.clock.now = x509.load_pem_x509_certificate(pem).not_valid_after_utc + timedelta(hours=1)
    with pytest.raises(Unauthenticated) as refused:
        await services.resolver.admit_for_renewal(ClientCertificate(der(pem)), CONTACT)
    assert refused.value.reason == "credential expired", "the days of grace are for what is renewed here"


async def test_a_device_that_was_moved_to_api_keys_renews_no_certificate(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    key = DeviceKey.new()
    done = await services.provisioned(tenant_id, key)
    await services.credentials.rotate(
        tenant_id, done.device_id, RotateRequest(credential_type=CredentialKind.API_KEY), OPERATOR
    )
    with pytest.raises(FailedPrecondition, match="api_key"):
        await services.enrolment.renew(right(done), key.renewal(done.issued), CONTACT)
