"""Certificates over HTTP: tokens, refused requests, certificates as credentials, beside keys and past their end.

The walk with openssl and curl is tests/interop/test_openssl_curl.py; here is what only a test can arrange: races,
clocks, hostile bytes, two credentials in one request.
"""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.http_api import BASE, Api, Https, api, https, now, running_api, serving  # noqa: F401  # fixtures
from tests.tls_peers import Holder, eventually, make_certificate

EST = "/.well-known/est"
TELEMETRY = f"{BASE}/telemetry"
PKCS10 = {"content-type": "application/pkcs10"}


class MovableClock:
    """The real time and an offset."""

    def __init__(self) -> None:
        self.offset = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.offset


@dataclass(frozen=True, slots=True)
class Device:
    """A device's own key."""

    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls) -> Device:
        return cls(ec.generate_private_key(ec.SECP256R1()))

    def csr(self, name: x509.Name | str = "pump", *extensions: x509.ExtensionType) -> str:
        return csr(self.key, name, *extensions)

    def holding(self, pem: str) -> Holder:
        return Holder(x509.load_pem_x509_certificate(pem.encode()), self.key)


def csr(key: Any, name: x509.Name | str = "pump", *extensions: x509.ExtensionType, algorithm: Any = None) -> str:
    """A certification request in PEM."""
    subject = name if isinstance(name, x509.Name) else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    signature = None if isinstance(key, ed25519.Ed25519PrivateKey) else algorithm or hashes.SHA256()
    return builder.sign(key, signature).public_bytes(Encoding.PEM).decode()


def dated(begins: datetime, ends: datetime) -> Holder:
    """A self-signed certificate with these dates."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dated")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(begins).not_valid_after(ends)
    return Holder(builder.sign(key, hashes.SHA256()), key)


async def token(api: Api, **more: Any) -> dict[str, Any]:  # noqa: F811
    async with api.operator() as operator:
        answer = await operator.post(f"{BASE}/devices/registration/tokens", json={"name": "Pump"} | more)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def provisioned(api: Api, device: Device) -> dict[str, Any]:  # noqa: F811
    made = await token(api)
    async with api.client() as anybody:
        body = {"token": made["token"], "csr": device.csr()}
        answer = await anybody.post(f"{BASE}/devices/provision", json=body)
    assert answer.status_code == 201, answer.text
    given: dict[str, Any] = answer.json()
    return given


async def registered(api: Api, holder: Holder, hardware_id: str = "HW-x", **more: Any) -> dict[str, Any]:  # noqa: F811
    """A device with a foreign certificate."""
    device = await api.registered(hardware_id, **({"credential_type": "x509"} | more))
    async with api.operator() as operator:
        body = {"certificate": holder.pem.decode()}
        answer = await operator.post(f"{BASE}/devices/{device['device_id']}/certs", json=body)
    assert answer.status_code == 201, answer.text
    return device


async def reasons(api: Api, device_id: str) -> list[str]:  # noqa: F811
    """Why the device was refused, as its timeline tells it."""
    async with api.operator() as operator:
        events = (await operator.get(f"{BASE}/devices/{device_id}/timeline")).json()["events"]
    return [event["data"]["reason"] for event in events if event["kind"] == "auth.refused"]


def refused(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


# -- tokens ------------------------------------------------------------------------------------------------------------


async def test_of_a_hundred_at_once_with_one_token_one_certificate_comes(https: Https) -> None:  # noqa: F811
    made = await token(https.api)
    devices = [Device.new(), Device.new()]
    bodies = [{"token": made["token"], "csr": devices[n % 2].csr()} for n in range(100)]
    async with https.api.client() as anybody:
        answers = await asyncio.gather(*(anybody.post(f"{BASE}/devices/provision", json=body) for body in bodies))
    statuses = Counter(answer.status_code for answer in answers)
    assert (statuses[201], statuses[200], statuses[403]) == (1, 49, 50)
    won = {answer.json()["certificate"] for answer in answers if answer.status_code < 300}
    assert len(won) == 1
    said = {tuple((k, v) for k, v in a.json().items() if k != "correlation_id") for a in answers if a.status_code > 299}
    assert said == {(("code", "PERMISSION_DENIED"), ("message", "provisioning refused"))}
    async with https.api.operator() as operator:
        listed = (await operator.get(f"{BASE}/devices/certs")).json()["certificates"]
    assert [each["device_id"] for each in listed] == [made["device_id"]]
    async with https.api.database.connection() as connection:
        rows = await connection.fetch("SELECT status FROM certificate WHERE purpose = 'device'")
    assert [row["status"] for row in rows] == ["issued"]


async def test_tokens_that_are_not_good_look_alike(api: Api) -> None:  # noqa: F811
    used, ended = await token(api), await token(api, hardware_id="HW-9")
    async with api.operator() as operator, api.client() as anybody:
        body = {"token": used["token"], "csr": Device.new().csr()}
        assert (await anybody.post(f"{BASE}/devices/provision", json=body)).status_code == 201
        path = f"{BASE}/devices/registration/tokens/{ended['token_id']}"
        receipt = (await operator.delete(path)).json()
        assert (receipt["device_id"], receipt["sessions"], receipt["remaining"]) == (ended["device_id"], [], 0)
        refused(await operator.delete(path), 404, "NOT_FOUND")
        refused(await operator.get(f"{BASE}/devices/{ended['device_id']}"), 404, "NOT_FOUND")
        messages = set()
        for text in (used["token"], ended["token"], "rt_" + "A" * 43, "sk_live_" + "A" * 43, "x"):
            for request in (Device.new().csr(), "no request at all"):
                answer = await anybody.post(f"{BASE}/devices/provision", json={"token": text, "csr": request})
                refused(answer, 403, "PERMISSION_DENIED")
                messages.add(answer.json()["message"])
        assert messages == {"provisioning refused"}
        assert (await operator.get(f"{BASE}/devices/registration/tokens")).json()["tokens"] == []
        again = await token(api, hardware_id="HW-9")  # the name is free again
        refused(
            await operator.post(f"{BASE}/devices/registration/tokens", json={"name": "P", "hardware_id": "HW-9"}),
            409,
            "ALREADY_EXISTS",
        )
        for wrong in ({"ttl_seconds": 0}, {"ttl_seconds": 10**9}, {"hardware_id": "a b"}, {"profile_id": "none"}):
            body = {"name": "P"} | wrong
            refused(await operator.post(f"{BASE}/devices/registration/tokens", json=body), 400, "INVALID_ARGUMENT")
        listed = (await operator.get(f"{BASE}/devices/registration/tokens")).json()["tokens"]
        assert [each["token_id"] for each in listed] == [again["token_id"]]
        assert "token" not in listed[0]


# -- hostile requests --------------------------------------------------------------------------------------------------


def _hostile() -> dict[str, str]:
    """Requests that nobody may get a certificate for, in text."""
    good = Device.new()
    plain = good.csr()
    der = base64.b64decode("".join(plain.splitlines()[1:-1]))
    bent = bytearray(der)
    bent[-5] ^= 1
    names = [x509.NameAttribute(NameOID.COMMON_NAME, "a")] * 2
    private = good.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return {
        "wrong signature": pem(bytes(bent)),
        "rsa 1024": csr(rsa.generate_private_key(65537, 1024)),
        "small exponent": csr(rsa.generate_private_key(3, 2048)),
        "dsa": csr(dsa.generate_private_key(2048)),
        "p-521": csr(ec.generate_private_key(ec.SECP521R1())),
        "secp256k1": csr(ec.generate_private_key(ec.SECP256K1())),
        "sha-224": csr(good.key, algorithm=hashes.SHA224()),
        "ca": good.csr("pump", x509.BasicConstraints(ca=True, path_length=None)),
        "server": good.csr("pump", x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
        "names": good.csr("pump", x509.SubjectAlternativeName([x509.DNSName("gate.example")])),
        "newline in a name": good.csr("pump\nadmin"),
        "nul in a name": good.csr("pump\x00.example"),
        "two common names": good.csr(x509.Name(names)),
        "two blocks": plain + plain,
        "a private key": private,
        "a private key, too": plain + private,
        "a certificate": make_certificate().pem.decode(),
        "cut": pem(der[:-1]),
        "longer": pem(der + b"\x00"),
        "empty block": pem(b""),
        "not base64": "-----BEGIN CERTIFICATE REQUEST-----\n????\n-----END CERTIFICATE REQUEST-----\n",
        "text": "hello",
        "huge": plain + "x" * 16_384,
    }


def pem(der: bytes) -> str:
    lines = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{lines}-----END CERTIFICATE REQUEST-----\n"


async def test_hostile_requests_are_refused_and_the_token_stays_good(api: Api) -> None:  # noqa: F811
    made = await token(api)
    basic = httpx.BasicAuth("", made["token"])
    async with api.client() as anybody:
        for name, text in _hostile().items():
            answer = await anybody.post(f"{BASE}/devices/provision", json={"token": made["token"], "csr": text})
            assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_ARGUMENT"), (name, answer.text)
            assert text.strip()[30:60] not in answer.text or len(text) < 60
            enrolled = await anybody.post(f"{EST}/simpleenroll", content=text, headers=PKCS10, auth=basic)
            assert (enrolled.status_code, enrolled.json()["code"]) == (400, "INVALID_ARGUMENT"), name
        for raw in (
            b"\x30\x80\x00\x00",
            b"\xff" * 100,
            b"\x30\x82\xff\xff",
            base64.b64encode(b"\x30" * 50),
            b"",
            b"==",
        ):
            enrolled = await anybody.post(f"{EST}/simpleenroll", content=raw, headers=PKCS10, auth=basic)
            refused(enrolled, 400, "INVALID_ARGUMENT")
        body = {"token": made["token"], "csr": "A" * 2_000_000}
        refused(await anybody.post(f"{BASE}/devices/provision", json=body), 413, "INVALID_ARGUMENT")
        enrolled = await anybody.post(f"{EST}/simpleenroll", content=b"A" * 2_000_000, headers=PKCS10, auth=basic)
        refused(enrolled, 413, "INVALID_ARGUMENT")
        enrolled = await anybody.post(f"{EST}/simpleenroll", content=b"A" * 100_000, headers=PKCS10, auth=basic)
        refused(enrolled, 413, "INVALID_ARGUMENT")
        async with api.database.connection() as connection:
            assert await connection.fetchval("SELECT count(*) FROM certificate") == 0
        body = {"token": made["token"], "csr": Device.new().csr()}
        assert (await anybody.post(f"{BASE}/devices/provision", json=body)).status_code == 201


async def test_a_key_of_the_authority_or_of_another_device_gets_no_certificate(api: Api) -> None:  # noqa: F811
    made, device = await token(api), Device.new()
    authorities = api.registry.certificates._authorities.current
    await provisioned(api, device)
    async with api.client() as anybody:
        for key in (authorities.root._key, authorities.active._key, device.key):
            body = {"token": made["token"], "csr": csr(key)}
            refused(await anybody.post(f"{BASE}/devices/provision", json=body), 400, "INVALID_ARGUMENT")


# -- certificates as credentials ---------------------------------------------------------------------------------------


async def test_revoking_by_fingerprint_closes_the_connection_and_the_next_is_refused(
    https: Https,  # noqa: F811
    tmp_path: Path,
) -> None:
    device = Device.new()
    given = await provisioned(https.api, device)
    own = device.holding(given["certificate"]).save(tmp_path)
    async with https.client(certificate=own) as caller, https.operator() as operator:
        for _ in range(3):
            assert (await caller.post(TELEMETRY, json={"t": 1})).status_code == 202
        assert https.api.registry.resolver.counters.admitted == 1
        printed = ":".join(given["fingerprint"][n : n + 2].upper() for n in range(0, 64, 2))
        receipt = (await operator.delete(f"{BASE}/devices/certs/{printed}")).json()
        assert (receipt["credential_id"], receipt["remaining"]) == (given["credential_id"], 0)
        assert [each["transport"] for each in receipt["sessions"]] == ["https"]
        await eventually(lambda: len(https.server.connections) == 1)  # the operator's own
        refused(await caller.post(TELEMETRY, json={"t": 1}), 401, "UNAUTHENTICATED")
    assert "credential revoked" in await reasons(https.api, given["device_id"])


async def test_a_certificate_before_and_after_its_time_and_in_its_grace(dsn: str, tmp_path: Path) -> None:
    clock = MovableClock()
    async with running_api(dsn, clock=clock) as early, serving(early) as https:  # noqa: F811
        later = dated(now() + timedelta(days=3), now() + timedelta(days=9))
        soon = await registered(early, later)
        device = Device.new()
        given = await provisioned(early, device)
        own = device.holding(given["certificate"])
        end = own.certificate.not_valid_after_utc
        async with https.client(certificate=later.save(tmp_path)) as caller:
            refused(await caller.post(TELEMETRY, json={"t": 1}), 401, "UNAUTHENTICATED")
        assert await reasons(early, soon["device_id"]) == ["credential not yet valid"]

        renewal = device.csr(own.certificate.subject)
        clock.offset = end - now() + timedelta(days=6)
        async with https.client(certificate=own.save(tmp_path)) as caller:
            refused(await caller.post(TELEMETRY, json={"t": 1}), 401, "UNAUTHENTICATED")
            renewed = await caller.post(f"{EST}/simplereenroll", content=renewal, headers=PKCS10)
            assert renewed.status_code == 200, renewed.text
            assert early.registry.sessions.count() == dict.fromkeys(early.registry.sessions.count(), 0)
            clock.offset = end - now() + timedelta(days=8)
            late = await caller.post(f"{EST}/simplereenroll", content=renewal, headers=PKCS10)
            refused(late, 401, "UNAUTHENTICATED")
            assert late.headers["www-authenticate"].startswith("Basic ")
        operator = early.client(authorization=f"Bearer {early.token(at=clock())}")
        async with operator:
            path = f"{BASE}/devices/{given['device_id']}/timeline"
            events = (await operator.get(path)).json()["events"]
        assert "credential expired" in [e["data"].get("reason") for e in events]


async def test_a_certificate_that_nobody_registered_is_nobody(https: Https, tmp_path: Path) -> None:  # noqa: F811
    device = await https.api.registered()
    stranger = make_certificate("stranger").save(tmp_path)
    async with https.client(certificate=stranger) as caller:
        assert (await caller.get(f"{BASE}/ca/chain")).status_code == 200
        refused(await caller.post(TELEMETRY, json={"t": 1}), 401, "UNAUTHENTICATED")
        refused(await caller.get(f"{BASE}/devices"), 401, "UNAUTHENTICATED")
        by_key = {"x-api-key": device["api_key"]}
        assert (await caller.post(TELEMETRY, json={"t": 1}, headers=by_key)).status_code == 202


async def test_a_key_and_a_certificate_have_to_be_of_one_device(https: Https, tmp_path: Path) -> None:  # noqa: F811
    other = await https.api.registered("HW-other")
    holder = make_certificate("gateway")
    device = await registered(https.api, holder, "HW-both", credential_type="api_key")
    both = {"x-api-key": device["api_key"]}
    async with https.client(certificate=holder.save(tmp_path)) as caller:
        assert (await caller.post(TELEMETRY, json={"t": 1})).status_code == 202
        assert (await caller.post(TELEMETRY, json={"t": 1}, headers=both)).status_code == 202
        wrong = await caller.post(TELEMETRY, json={"t": 1}, headers={"x-api-key": other["api_key"]})
        refused(wrong, 401, "UNAUTHENTICATED")
        refused(await caller.get(f"{BASE}/devices"), 403, "PERMISSION_DENIED")
        bearer = {"authorization": f"Bearer {https.api.token()}"}
        assert (await caller.get(f"{BASE}/devices", headers=bearer)).status_code == 200
    told = await reasons(https.api, other["device_id"])
    assert told == ["key of another device than the connection's certificate"]
    async with https.device(other["api_key"]) as caller:
        assert (await caller.post(TELEMETRY, json={"t": 1})).status_code == 202


# -- registering -------------------------------------------------------------------------------------------------------


async def test_a_certificate_changes_the_devices_type_and_its_key_has_an_overlap(api: Api) -> None:  # noqa: F811
    device = await api.registered("HW-switch")
    path = f"{BASE}/devices/{device['device_id']}"
    async with api.operator() as operator:
        body = {"certificate": make_certificate("a").pem.decode(), "overlap_seconds": 600}
        made = (await operator.post(f"{path}/certs", json=body)).json()
        assert (await operator.get(path)).json()["credential_type"] == "x509"
        listed = (await operator.get(f"{path}/credentials")).json()["credentials"]
        old, new = listed
        assert (old["credential_type"], old["superseded_by"]) == ("api_key", made["credential_id"])
        assert old["expires_at"] is not None
        assert new["fingerprint"] == made["fingerprint"]
        async with api.device(device["api_key"]) as caller:
            assert (await caller.post(TELEMETRY, json={"t": 1})).status_code == 202
        at_once = await api.registered("HW-now")
        body = {"certificate": make_certificate("b").pem.decode(), "overlap_seconds": 0}
        answer = await operator.post(f"{BASE}/devices/{at_once['device_id']}/certs", json=body)
        assert answer.status_code == 201
    async with api.device(at_once["api_key"]) as caller:
        refused(await caller.post(TELEMETRY, json={"t": 1}), 401, "UNAUTHENTICATED")


async def test_what_is_no_certificate_is_not_registered(api: Api) -> None:  # noqa: F811
    device = await api.registered("HW-x", credential_type="x509")
    path = f"{BASE}/devices/{device['device_id']}/certs"
    holder = make_certificate("mine")
    expired = make_certificate("late", expired=True).pem.decode()
    texts = ("", "hello", expired, holder.key_pem.decode(), holder.pem.decode() * 2, Device.new().csr())
    async with api.operator() as operator:
        for text in texts:
            refused(await operator.post(path, json={"certificate": text}), 400, "INVALID_ARGUMENT")
        wrong = {"content-type": "application/x-x509-ca-cert"}
        refused(await operator.post(path, content=holder.der, headers=wrong), 415, "INVALID_ARGUMENT")
        assert (await operator.get(f"{BASE}/devices/certs")).json()["certificates"] == []
        for text in ("00", "zz" * 32, "a" * 63):
            refused(await operator.delete(f"{BASE}/devices/certs/{text}"), 404, "NOT_FOUND")


async def test_a_certificate_that_is_for_servers_is_refused_when_it_is_registered(api: Api) -> None:  # noqa: F811
    """Not later, in a handshake that cannot say why."""
    device = await api.registered("HW-x", credential_type="x509")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "press")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now()).not_valid_after(now() + timedelta(days=1))
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    text = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    async with api.operator() as operator:
        answer = await operator.post(f"{BASE}/devices/{device['device_id']}/certs", json={"certificate": text})
        refused(answer, 400, "INVALID_ARGUMENT")
        assert "has neither clientAuth nor anyExtendedKeyUsage" in answer.json()["message"]
        assert (await operator.get(f"{BASE}/devices/certs")).json()["certificates"] == []


async def test_every_flow_that_takes_a_request_answers_a_certificate(api: Api) -> None:  # noqa: F811
    async with api.operator() as operator, api.client() as anybody:
        body = {"name": "D", "hardware_id": "HW-1", "credential_type": "x509", "csr": Device.new().csr()}
        by_hand = (await operator.post(f"{BASE}/devices", json=body)).json()
        assert by_hand["certificate"].startswith("-----BEGIN CERTIFICATE-----")
        wrong = {"name": "D", "hardware_id": "HW-2", "csr": Device.new().csr()}
        refused(await operator.post(f"{BASE}/devices", json=wrong), 400, "INVALID_ARGUMENT")
        rotated = await operator.post(
            f"{BASE}/devices/{by_hand['device_id']}/credentials/rotate", json={"csr": Device.new().csr()}
        )
        assert rotated.status_code == 201, rotated.text
        assert rotated.json()["certificate"] != by_hand["certificate"]

        template = {"name": "T", "credential_type": "x509"}
        key = (await operator.post(f"{BASE}/provisioning/templates", json=template)).json()["provision_key"]
        claim = {"provision_key": key, "device_name": "C", "hardware_id": "HW-3"}
        refused(await anybody.post(f"{BASE}/provision", json=claim), 400, "FAILED_PRECONDITION")
        claim["csr"] = Device.new().csr()
        claimed = await anybody.post(f"{BASE}/provision", json=claim)
        assert claimed.status_code == 201, claimed.text
        assert claimed.json()["renew_after"] < claimed.json()["not_after"]
        again = await anybody.post(f"{BASE}/provision", json=claim)
        assert (again.status_code, again.json()["certificate"]) == (200, claimed.json()["certificate"])
        claim["csr"] = Device.new().csr()
        known = (await anybody.post(f"{BASE}/provision", json=claim)).json()
        assert (known["api_key"], "certificate" in known) == ("", False)


# -- EST's doors -------------------------------------------------------------------------------------------------------


async def test_est_asks_for_basic_and_takes_what_tools_send(api: Api) -> None:  # noqa: F811
    made, device = await token(api), Device.new()
    der = base64.b64decode("".join(device.csr().splitlines()[1:-1]))
    path = f"{EST}/simpleenroll"
    bad = [
        {},
        {"authorization": "Basic"},
        {"authorization": "Basic ????"},
        {"authorization": "Basic " + base64.b64encode(b"no colon").decode()},
        {"authorization": "Basic " + base64.b64encode(b"\xff:\xff").decode()},
        {"authorization": f"Bearer {made['token']}"},
        {"authorization": "Basic " + base64.b64encode(b"x:rt_unknown").decode()},
        {"authorization": "Basic " + base64.b64encode(b"x:pk_unknown").decode()},
    ]
    async with api.client() as anybody:
        for headers in bad:
            answer = await anybody.post(path, content=base64.b64encode(der), headers=PKCS10 | headers)
            refused(answer, 401, "UNAUTHENTICATED")
            assert answer.headers["www-authenticate"] == 'Basic realm="gatehouse", charset="UTF-8"'
        good = httpx.BasicAuth("anybody", made["token"])
        sent = [der, base64.b64encode(der), base64.encodebytes(der), device.csr().encode()]
        sent.append(base64.encodebytes(der).replace(b"\n", b"\r\n"))
        answers = [await anybody.post(path, content=each, headers=PKCS10, auth=good) for each in sent]
        assert [answer.status_code for answer in answers] == [200] * len(sent)
        assert len({answer.content for answer in answers}) == 1
        other = {"content-type": "application/x-www-form-urlencoded"}
        refused(await anybody.post(path, content=der, headers=other, auth=good), 415, "INVALID_ARGUMENT")
        for missing in ("fullcmc", "serverkeygen", "pumps/simpleenroll"):
            refused(await anybody.post(f"{EST}/{missing}", content=der, headers=PKCS10), 404, "NOT_FOUND")


async def test_the_list_names_what_was_revoked_before_the_question(api: Api) -> None:  # noqa: F811
    given = [await provisioned(api, Device.new()) for _ in range(3)]
    async with api.operator() as operator, api.client() as anybody:
        empty = x509.load_der_x509_crl((await anybody.get(f"{BASE}/ca/crl")).content)
        assert len(list(empty)) == 0
        for number, each in enumerate(given[:2], 1):
            await operator.delete(f"{BASE}/devices/certs/{each['fingerprint']}")
            answer = await anybody.get(f"{BASE}/ca/crl")
            listed = x509.load_der_x509_crl(answer.content)
            assert len(list(listed)) == number
            assert _number(listed) > _number(empty)
        chain = x509.load_pem_x509_certificates((await anybody.get(f"{BASE}/ca/chain")).content)
        assert listed.is_signature_valid(chain[0].public_key())
        for accept, kind in (
            ("*/*", "pkix-crl"),
            ("application/pkix-crl, text/plain", "pkix-crl"),
            ("text/plain", "x-pem-file"),
        ):
            answer = await anybody.get(f"{BASE}/ca/crl", headers={"accept": accept})
            assert kind in answer.headers["content-type"]
        root = (await anybody.get(f"{BASE}/ca/crl?issuer={chain[-1].fingerprint(hashes.SHA256()).hex()}")).content
        assert x509.load_der_x509_crl(root).issuer == chain[-1].subject
        refused(await anybody.get(f"{BASE}/ca/crl?issuer=00"), 400, "INVALID_ARGUMENT")


def _number(listed: x509.CertificateRevocationList) -> int:
    return listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
