"""EST-coaps (RFC 9148): authorities, suggestions, enrolment and re-enrolment by the certificate of the association."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiocoap.numbers.codes import Code
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from adapters.coap import est
from adapters.coap.server_limits import ServerLimits
from certs.chains import bundle, pkcs7_der, unbundle
from certs.request import MAXIMUM_REQUEST_BYTES
from tests.coap_server import Running, serving_coap
from tests.dtls_peers import certificate_client_context, make_client_certificate
from tests.http_api import BASE, Api, api, now, running_api  # noqa: F401
from tests.tls_peers import Holder

PKCS7, ATTRIBUTES, PKCS10, SINGLE = 281, 285, 286, 287


@pytest.fixture
async def coap(api: Api) -> AsyncIterator[Running]:  # noqa: F811
    async with serving_coap(api) as running:
        yield running


class MovableClock:
    """The real time and an offset."""

    def __init__(self) -> None:
        self.offset = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.offset


def request(key: ec.EllipticCurvePrivateKey, subject: x509.Name) -> bytes:
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return made.public_bytes(Encoding.DER)


async def holder(coap: Running) -> Holder:
    """A device that has a certificate of ours."""
    token = (await coap.post("/devices/registration/tokens", {"name": "Valve"}))["token"]
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.load_der_x509_csr(request(key, x509.Name([]))).public_bytes(Encoding.PEM).decode()
    made = await coap.post("/devices/provision", {"token": token, "csr": csr})
    return Holder(x509.load_pem_x509_certificate(made["certificate"].encode()), key)


async def test_anybody_reads_the_authorities_and_what_is_suggested(coap: Running) -> None:
    async with coap.client() as client:
        chain = await client.get("/.well-known/est/crts")
        assert (chain.code, chain.content_format) == (Code.CONTENT, PKCS7)
        certificates = pkcs7.load_der_pkcs7_certificates(chain.payload)
        root = await client.get("/.well-known/est/crts", accept=SINGLE)
        assert root.content_format == SINGLE
        single = x509.load_der_x509_certificate(root.payload)
        assert single in certificates
        assert single.subject == single.issuer
        attributes = await client.get("/.well-known/est/att")
        assert (attributes.content_format, attributes.payload[:1]) == (ATTRIBUTES, b"0")
        assert (await client.get("/.well-known/est/crts", accept=50)).code is Code.NOT_ACCEPTABLE
        csr = request(ec.generate_private_key(ec.SECP256R1()), x509.Name([]))
        for name in ("sen", "sren"):
            refused = await client.post(f"/.well-known/est/{name}", csr, PKCS10)
            assert refused.code is Code.UNAUTHORIZED


async def test_the_authorities_are_written_once_and_again_when_they_change(
    coap: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[bytes, ...]] = []

    def counted(chain: tuple[bytes, ...]) -> bytes:
        written.append(chain)
        return pkcs7_der(chain)

    monkeypatch.setattr(est, "pkcs7_der", counted)
    certificates = coap.api.registry.certificates
    chain = unbundle(certificates.chain_pem())
    async with coap.client() as client:
        for path in ("/.well-known/est/crts",) * 3:
            assert (await client.get(path)).payload == pkcs7_der(chain)
            assert (await client.get(path, accept=SINGLE)).payload == chain[-1]
        assert written == [chain]
        other = make_client_certificate("another root").certificate.public_bytes(Encoding.DER)
        monkeypatch.setattr(type(certificates), "chain_pem", lambda _: bundle([chain[0], other]))
        assert (await client.get("/.well-known/est/crts", accept=SINGLE)).payload == other
        assert (await client.get("/.well-known/est/crts")).payload == pkcs7_der([chain[0], other])
        assert len(written) == 2


async def test_a_holder_renews_and_comes_back_with_the_new_one(coap: Running) -> None:
    old = await holder(coap)
    fresh = ec.generate_private_key(ec.SECP256R1())
    async with coap.client(certificate_client_context(old)) as client:
        stranger = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "another")])
        wrong = await client.post("/.well-known/est/sren", request(fresh, stranger), PKCS10)
        assert wrong.code is Code.BAD_REQUEST, "RFC 7030 §4.2.2: the same subject"
        assert (await client.post("/.well-known/est/sren", b"0\x00", PKCS10)).code is Code.BAD_REQUEST
        assert (await client.post("/.well-known/est/sren", b"0\x00", 50)).code is Code.UNSUPPORTED_CONTENT_FORMAT
        csr = request(fresh, old.certificate.subject)
        renewed = await client.post("/.well-known/est/sren", csr, PKCS10)
        assert (renewed.code, renewed.content_format) == (Code.CHANGED, PKCS7)
        [certificate] = pkcs7.load_der_pkcs7_certificates(renewed.payload)
        again = await client.post("/.well-known/est/sren", csr, PKCS10, accept=SINGLE)
        assert again.content_format == SINGLE
        assert x509.load_der_x509_certificate(again.payload) == certificate, "a lost answer harms nobody"
    assert certificate.subject == old.certificate.subject
    async with coap.client(certificate_client_context(Holder(certificate, fresh))) as client:
        assert (await client.post("/telemetry", {"main.t": 1})).code is Code.CHANGED
        links = (await client.get("/.well-known/core")).payload
        assert b"/.well-known/est/sren" in links


async def test_within_the_grace_a_certificate_renews_and_does_nothing_else(dsn: str) -> None:
    clock = MovableClock()
    limits = ServerLimits(provisioning_seconds=2.0)
    async with running_api(dsn, clock=clock) as running, serving_coap(running, limits) as coap:
        old = await holder(coap)
        end = old.certificate.not_valid_after_utc
        fresh = ec.generate_private_key(ec.SECP256R1())
        csr = request(fresh, old.certificate.subject)
        clock.offset = end - now() + timedelta(days=6)
        async with coap.client(certificate_client_context(old)) as client:
            for path in ("/config", "/telemetry"):
                answer = await client.post(path, {}) if path == "/telemetry" else await client.get(path)
                assert answer.code is Code.FORBIDDEN, "it is known, and may only be renewed"
            links = (await client.get("/.well-known/core")).payload.decode()
            assert {link.split(">")[0].split("/")[-1] for link in links.split(",")} == {
                "time", "crts", "att", "sen", "sren"
            }  # fmt: skip
            renewed = await client.post("/.well-known/est/sren", csr, PKCS10, accept=SINGLE)
            assert renewed.code is Code.CHANGED
            assert coap.api.registry.sessions.all() == []
            await client.closed()
        certificate = x509.load_der_x509_certificate(renewed.payload)
        assert certificate.not_valid_after_utc > clock()
        async with coap.client(certificate_client_context(Holder(certificate, fresh))) as client:
            assert (await client.post("/telemetry", {"main.t": 1})).code is Code.CHANGED
        clock.offset = end - now() + timedelta(days=8)
        async with coap.client(certificate_client_context(old)) as client:
            assert (await client.post("/.well-known/est/sren", csr, PKCS10)).code is Code.UNAUTHORIZED
            await client.closed()


async def test_the_grace_of_a_revoked_certificate_is_over(dsn: str) -> None:
    clock = MovableClock()
    async with running_api(dsn, clock=clock) as running, serving_coap(running) as coap:
        old = await holder(coap)
        csr = request(old.key, old.certificate.subject)
        clock.offset = old.certificate.not_valid_after_utc - now() + timedelta(days=1)
        async with coap.client(certificate_client_context(old)) as client:
            assert (await client.get("/time")).code is Code.CONTENT
            fingerprint = old.certificate.fingerprint(hashes.SHA256()).hex()
            async with running.client(authorization=f"Bearer {running.token(at=clock())}") as operator:
                assert (await operator.delete(f"{BASE}/devices/certs/{fingerprint}")).status_code == 200
            refused = await client.post("/.well-known/est/sren", csr, PKCS10)
            assert refused.code is Code.UNAUTHORIZED, "the right is judged again, though the association stands"


async def test_a_foreign_certificate_is_its_own_authority_s_to_renew(coap: Running) -> None:
    """RFC 7030 §4.2.1 leaves to the server whom it enrolls. A certificate of ours would outlive the foreign one and its
    revocation, which the operator has not asked for."""
    foreign = make_client_certificate("foreign")
    made = await coap.api.registered()
    pem = foreign.certificate.public_bytes(Encoding.PEM).decode()
    await coap.post(f"/devices/{made['device_id']}/certs", {"certificate": pem, "overlap_seconds": 0})
    async with coap.client(certificate_client_context(foreign)) as client:
        assert (await client.get("/config")).code is Code.CONTENT
        for name in ("sen", "sren"):
            answer = await client.post(f"/.well-known/est/{name}", request(foreign.key, x509.Name([])), PKCS10)
            assert answer.code is Code.BAD_REQUEST
            assert b"by its own authority" in answer.payload
        large = await client.upload("/.well-known/est/sen", bytes(20_000), PKCS10)
        assert (large.code, large.size1) == (Code.REQUEST_ENTITY_TOO_LARGE, MAXIMUM_REQUEST_BYTES)


async def test_an_expired_certificate_of_another_authority_is_refused_as_an_unknown_one_is(dsn: str) -> None:
    clock = MovableClock()
    async with running_api(dsn, clock=clock) as running, serving_coap(running) as coap:
        foreign, unknown = make_client_certificate("foreign"), make_client_certificate("unknown")
        made = await coap.api.registered()
        pem = foreign.certificate.public_bytes(Encoding.PEM).decode()
        await coap.post(f"/devices/{made['device_id']}/certs", {"certificate": pem, "overlap_seconds": 0})
        clock.offset = foreign.certificate.not_valid_after_utc - now() + timedelta(hours=1)
        told = []
        for each in (foreign, unknown):
            async with coap.client(certificate_client_context(each)) as client:
                answers = [await client.get(path) for path in ("/time", "/config", "/.well-known/est/crts")]
                answers.append(await client.post("/.well-known/est/sen", request(each.key, x509.Name([])), PKCS10))
                await client.closed()
                told.append([(answer.code, answer.payload.partition(b" (")[0]) for answer in answers])
        assert told[0] == told[1]
        assert {code for code, _ in told[0]} == {Code.UNAUTHORIZED}


async def test_a_first_name_of_enrolment_takes_any_subject_and_gives_the_registry_s(coap: Running) -> None:
    old = await holder(coap)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "whatever")])
    csr: Any = request(ec.generate_private_key(ec.SECP256R1()), subject)
    async with coap.client(certificate_client_context(old)) as client:
        enrolled = await client.post("/.well-known/est/sen", csr, PKCS10, accept=SINGLE)
    assert enrolled.code is Code.CHANGED
    assert x509.load_der_x509_certificate(enrolled.payload).subject == old.certificate.subject
