"""The built-in authority as devices' issuer: on record before it signs, one key for one device, no pool deadlock."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

import registry.certificates
from certs.chains import bundle
from certs.issuing import DeviceProfile
from certs.keys import generate_p256, load_private_key
from registry.certificates import UNFINISHED_AFTER
from registry.credentials import RotateRequest
from registry.devices import NewDevice
from registry.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unauthenticated
from registry.key_claim import ClaimRequest
from registry.model import ClientCertificate, CredentialKind, DeviceId, TenantId
from registry.paging import Page
from registry.ports import IssuedCertificate
from registry.storage import devices
from registry.storage.database import Database
from registry.templates import NewTemplate
from tests.certificate_services import CertificateServices, DeviceKey, der, leaf, verify
from tests.conftest import MakeTenant
from tests.services import CONTACT, NOON, OPERATOR


@pytest.fixture
async def services(database: Database) -> CertificateServices:
    return await CertificateServices.open(database)


async def x509_device(services: CertificateServices, tenant_id: TenantId, hardware_id: str = "HW-1") -> DeviceId:
    new = NewDevice("Pump", hardware_id, credential_type=CredentialKind.X509)
    return (await services.devices.register(tenant_id, new, OPERATOR)).device.device_id


async def rotated(
    services: CertificateServices, tenant_id: TenantId, device_id: DeviceId, csr: bytes
) -> IssuedCertificate:
    done = await services.credentials.rotate(tenant_id, device_id, RotateRequest(csr=csr), OPERATOR)
    assert isinstance(done.issued, IssuedCertificate)
    return done.issued


async def x509_claim(services: CertificateServices, tenant_id: TenantId, csr: bytes) -> ClaimRequest:
    made = await services.templates.create(
        tenant_id, NewTemplate("Batch", credential_type=CredentialKind.X509), OPERATOR
    )
    return ClaimRequest(made.provision_key, "Sensor", "AA:BB:CC:00:11:22", csr=csr)


async def test_a_claim_with_a_csr_gives_a_certificate_that_openssl_accepts(
    services: CertificateServices, tenant_id: TenantId, tmp_path: Path
) -> None:
    key = DeviceKey.new()
    claimed = await services.key_claim.claim(await x509_claim(services, tenant_id, key.csr()), CONTACT)

    issued = claimed.issued
    assert isinstance(issued, IssuedCertificate)
    assert verify(tmp_path, services, issued).endswith("leaf.pem: OK\n")
    certificate = leaf(issued)
    slug = (await services.rows("SELECT slug FROM tenant"))[0]["slug"]
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == str(claimed.device_id)
    assert certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value == slug
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert issued.not_before < NOON < issued.renew_after < issued.not_after
    assert issued.renew_after > issued.not_before + (issued.not_after - issued.not_before) * 0.66
    [row] = await services.certificate_rows()
    assert (row["status"], row["credential_id"], row["der"]) == (
        "issued",
        issued.credential_id,
        der(issued.certificate_pem),
    )
    identity = await services.resolver.admit(ClientCertificate(row["der"]), CONTACT)
    assert (identity.device_id, identity.expires_at) == (claimed.device_id, issued.not_after)


async def test_a_repeated_claim_with_the_same_key_gives_the_same_certificate(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    key = DeviceKey.new()
    request = await x509_claim(services, tenant_id, key.csr())
    first = await services.key_claim.claim(request, CONTACT)
    again = await services.key_claim.claim(request, CONTACT)
    other = ClaimRequest(request.provision_key, "Sensor", request.hardware_id, csr=DeviceKey.new().csr())
    with_another_key = await services.key_claim.claim(other, CONTACT)

    assert again.issued == first.issued
    assert with_another_key.issued is None
    assert len(await services.certificate_rows("issued")) == 1


async def test_two_hundred_claims_at_once_make_one_certificate_through_a_small_pool(
    dsn: str, services: CertificateServices, tenant_id: TenantId
) -> None:
    request = await x509_claim(services, tenant_id, DeviceKey.new().csr())
    small = await Database.open(dsn, size=4)
    try:
        node = await CertificateServices.open(small, ring=services.ring, clock=services.clock)
        async with asyncio.timeout(60):
            claimed = await asyncio.gather(*(node.key_claim.claim(request, CONTACT) for _ in range(200)))
    finally:
        await small.close()

    assert sum(each.created for each in claimed) == 1
    assert len({each.device_id for each in claimed}) == 1
    assert len({each.issued.certificate_pem for each in claimed if isinstance(each.issued, IssuedCertificate)}) == 1
    assert all(isinstance(each.issued, IssuedCertificate) for each in claimed)
    assert len(await services.rows("SELECT 1 FROM credential")) == 1
    assert await services.kinds(tenant_id) == ["device.provisioned"]
    assert await services.certificate_rows("intended") == []
    assert len(await services.certificate_rows("issued")) == 1


# -- on record before it is signed -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


async def test_a_crash_between_intent_and_signature_leaves_an_intent_that_is_never_used_again(
    services: CertificateServices, tenant_id: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    device_id, key = await x509_device(services, tenant_id), DeviceKey.new()

    def die(_: object) -> None:
        raise Killed

    async def dead(_: object) -> None:
        """A process that has ended withdraws nothing."""

    with monkeypatch.context() as crash:
        crash.setattr(registry.certificates, "sign", die)
        crash.setattr(services.certificates, "withdraw", dead)
        with pytest.raises(Killed):
            await rotated(services, tenant_id, device_id, key.csr())

    [left] = await services.certificate_rows("intended")
    assert (left["device_id"], left["der"], left["credential_id"]) == (device_id, None, None)
    assert await services.rows("SELECT 1 FROM credential") == []

    issued = await rotated(services, tenant_id, device_id, key.csr())
    assert f"{leaf(issued).serial_number:x}" != left["serial"]
    assert await services.certificates.unfinished() == []
    services.clock.now = NOON + UNFINISHED_AFTER + timedelta(seconds=1)
    [found] = await services.certificates.unfinished()
    assert (found.serial, found.device_id) == (left["serial"], device_id)
    assert (await services.certificates.tidy()).abandoned == 1
    assert [row["serial"] for row in await services.certificate_rows("abandoned")] == [left["serial"]]


async def test_the_intent_is_seen_by_others_when_the_signer_begins(
    dsn: str, services: CertificateServices, tenant_id: TenantId
) -> None:
    device_id = await x509_device(services, tenant_id)
    prepared = await services.certificates.prepare(tenant_id, device_id, DeviceKey.new().csr(), now=NOON)

    other = await Database.open(dsn, size=1)
    try:
        async with other.connection() as connection:
            row = await connection.fetchrow("SELECT serial, status, spki_sha256 FROM certificate")
    finally:
        await other.close()
    assert row is not None
    intent = prepared.certificate.intent
    assert tuple(row) == (intent.serial_hex, "intended", bytes.fromhex(intent.spki_sha256))
    assert not prepared.certificate.spent
    await services.certificates.withdraw(prepared)
    assert await services.certificate_rows() == []
    async with services.database.transaction() as connection:
        device = await devices.lock(connection, tenant_id, device_id)
        with pytest.raises(Exception, match="given up"):
            await services.certificates.issue(connection, device, prepared, now=NOON)


async def test_a_transaction_that_fails_after_signing_leaves_no_certificate(
    services: CertificateServices, tenant_id: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    device_id = await x509_device(services, tenant_id)

    async def fail(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as crash:
        crash.setattr("registry.credentials.record_rotation", fail)
        with pytest.raises(Killed):
            await rotated(services, tenant_id, device_id, DeviceKey.new().csr())
    assert [row["status"] for row in await services.certificate_rows()] == ["abandoned"]
    assert await services.rows("SELECT 1 FROM credential") == []


@pytest.mark.parametrize(
    "csr",
    [
        b"",
        b"garbage",
        b"\x30\x82\xff\xff",
        DeviceKey.new().csr()[:-40],
        DeviceKey.new().csr() * 2,
        b"x" * 2_000_000,
        bundle((der(DeviceKey.new().self_signed(NOON)),)),
    ],
    ids=["empty", "garbage", "ber", "cut", "two", "huge", "certificate"],
)
async def test_a_bad_request_is_an_invalid_argument_and_nothing_is_recorded(
    services: CertificateServices, tenant_id: TenantId, csr: bytes
) -> None:
    device_id = await x509_device(services, tenant_id)
    with pytest.raises(InvalidArgument) as refused:
        await rotated(services, tenant_id, device_id, csr)
    assert refused.value.field == "csr"
    assert await services.certificate_rows() == []


async def test_an_issuer_that_has_expired_signs_nothing_and_says_what_helps(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    device_id = await x509_device(services, tenant_id)
    services.clock.advance(days=6 * 365)
    with pytest.raises(FailedPrecondition, match="rollover"):
        await rotated(services, tenant_id, device_id, DeviceKey.new().csr())


async def test_the_distribution_point_names_the_issuers_own_list(database: Database, tenant_id: TenantId) -> None:
    profile = DeviceProfile(crl_url="http://gate.example/crl?issuer={issuer}")
    services = await CertificateServices.open(database, profile=profile)
    issued = (await services.provisioned(tenant_id)).issued
    [point] = leaf(issued).extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    assert point.full_name is not None
    active = services.trust.authorities.active.fingerprint
    assert point.full_name[0].value == f"http://gate.example/crl?issuer={active}"


# -- one key, one device -----------------------------------------------------------------------------------------------


async def test_a_key_is_certified_for_one_device_of_a_tenant_only(
    services: CertificateServices, tenant_id: TenantId, make_tenant: MakeTenant
) -> None:
    key, one, two = DeviceKey.new(), await x509_device(services, tenant_id), await x509_device(services, tenant_id, "2")
    issued = await rotated(services, tenant_id, one, key.csr())
    with pytest.raises(InvalidArgument, match="another device"):
        await rotated(services, tenant_id, two, key.csr())

    buyer = await make_tenant()
    assert await rotated(services, buyer, await x509_device(services, buyer), key.csr())
    assert await rotated(services, tenant_id, one, key.csr())
    await services.devices.delete(tenant_id, one, OPERATOR)
    assert await rotated(services, tenant_id, two, key.csr()) != issued


async def test_of_many_devices_with_one_key_at_once_one_gets_a_certificate(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    key = DeviceKey.new()
    clones = [await x509_device(services, tenant_id, f"clone-{n}") for n in range(12)]
    done = await asyncio.gather(
        *(rotated(services, tenant_id, each, key.csr()) for each in clones), return_exceptions=True
    )
    assert sum(isinstance(each, IssuedCertificate) for each in done) == 1
    assert sum(isinstance(each, InvalidArgument) for each in done) == 11


async def test_the_keys_of_the_server_and_its_authorities_are_nobodys(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    device_id = await x509_device(services, tenant_id)
    server_key = generate_p256(os.urandom)
    await services.certificates.issue_server(server_key, ["localhost"])
    opened = load_private_key(server_key)
    with pytest.raises(InvalidArgument, match="this server"):
        await rotated(services, tenant_id, device_id, DeviceKey(opened).csr())  # type: ignore[arg-type]
    authority_key = services.trust.authorities.active._key
    with pytest.raises(InvalidArgument, match="key of this server"):
        await rotated(services, tenant_id, device_id, DeviceKey(authority_key).csr())  # type: ignore[arg-type]


async def test_a_servers_certificate_is_on_record_and_chains(services: CertificateServices) -> None:
    key = generate_p256(os.urandom)
    made = await services.certificates.issue_server(key, ["localhost", "127.0.0.1"])
    first, issuer = x509.load_pem_x509_certificates(made.chain_pem)
    first.verify_directly_issued_by(issuer)
    spki = first.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert spki == load_private_key(key).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    [row] = await services.certificate_rows()
    assert (row["purpose"], row["status"], row["serial"], row["device_id"]) == ("server", "issued", made.serial, None)


async def test_two_nodes_issue_at_once(dsn: str, services: CertificateServices, tenant_id: TenantId) -> None:
    second = await Database.open(dsn)
    try:
        other = await CertificateServices.open(second, ring=services.ring, clock=services.clock)
        done = await asyncio.gather(
            *((services if n % 2 else other).provisioned(tenant_id, hardware_id=f"HW-{n}") for n in range(40))
        )
    finally:
        await second.close()
    assert len({leaf(each.issued).serial_number for each in done}) == 40
    assert {each.issued.chain_pem for each in done} == {done[0].issued.chain_pem}
    assert len(await services.certificate_rows("issued")) == 40


async def test_rows_go_long_after_the_certificates_end(services: CertificateServices, tenant_id: TenantId) -> None:
    await services.provisioned(tenant_id)
    services.clock.advance(days=365 + 80)
    assert (await services.certificates.tidy()).deleted == 0
    services.clock.advance(days=20)
    assert (await services.certificates.tidy()).deleted == 1


# -- foreign certificates ----------------------------------------------------------------------------------------------


async def test_foreign_certificates_are_registered_and_others_of_the_same_ca_are_not_let_in(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    device_id, authority = await x509_device(services, tenant_id), DeviceKey.new()
    alone = DeviceKey.new().self_signed(NOON)
    ours, stranger = (DeviceKey.new().self_signed(NOON, issuer=authority) for _ in range(2))
    for pem in (alone, ours):
        credential = await services.foreign.register(tenant_id, device_id, pem, OPERATOR)
        assert credential.detail["subject"] == "CN=pump.example"
        assert (await services.resolver.admit(ClientCertificate(der(pem)), CONTACT)).device_id == device_id
    with pytest.raises(Unauthenticated):
        await services.resolver.admit(ClientCertificate(der(stranger)), CONTACT)
    with pytest.raises(AlreadyExists):
        await services.foreign.register(tenant_id, device_id, ours, OPERATOR)

    listed = await services.credentials.list(tenant_id, device_id, Page(), kind=CredentialKind.X509)
    fingerprint = sha256(der(ours)).hexdigest()
    assert {each.fingerprint for each in listed.items} == {fingerprint, sha256(der(alone)).hexdigest()}
    await services.credentials.revoke_by_fingerprint(tenant_id, fingerprint, OPERATOR)
    with pytest.raises(Unauthenticated):
        await services.resolver.admit(ClientCertificate(der(ours)), CONTACT)
    kept = await services.rows("SELECT lookup, detail::text AS detail FROM credential")
    assert all(len(row["lookup"]) == 32 for row in kept)
    assert await services.certificate_rows() == []


async def test_our_own_certificates_are_not_registered_as_foreign(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    device_id = await x509_device(services, tenant_id)
    issued = (await services.provisioned(tenant_id)).issued
    await services.credentials.revoke(tenant_id, None, issued.credential_id, OPERATOR)
    with pytest.raises(InvalidArgument, match="own authority"):
        await services.foreign.register(tenant_id, device_id, issued.certificate_pem, OPERATOR)
    root = bundle((services.trust.authorities.root.certificate_der,))
    with pytest.raises(InvalidArgument, match="without digitalSignature"):  # which no authority's has
        await services.foreign.register(tenant_id, device_id, root, OPERATOR)


async def test_bad_and_expired_foreign_certificates_are_refused(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    device_id = await x509_device(services, tenant_id)
    pem = DeviceKey.new().self_signed(NOON)
    for bad in (b"", b"no", pem * 2, pem[:-50], DeviceKey.new().csr()):
        with pytest.raises(InvalidArgument):
            await services.foreign.register(tenant_id, device_id, bad, OPERATOR)
    services.clock.advance(days=31)
    with pytest.raises(InvalidArgument, match="past"):
        await services.foreign.register(tenant_id, device_id, pem, OPERATOR)
