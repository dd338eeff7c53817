"""Authorities and what they sign, judged by others: openssl's strict verifier and Python's TLS."""

from __future__ import annotations

import copy
import random
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.authority import (
    Authority,
    AuthorityMaterial,
    AuthorityRole,
    AuthoritySet,
    BadAuthority,
    make_issuing,
    make_root,
    make_serial,
    open_set,
    validity,
)
from certs.chains import bundle
from certs.crl import RevokedEntry, build_crl, crl_pem
from certs.issuing import (
    AlreadySigned,
    BadServerName,
    DeviceFacts,
    DeviceProfile,
    IssuedCertificate,
    PreparedCertificate,
    device_uri,
    prepare_device,
    prepare_server,
    server_names,
    sign,
)
from certs.keys import generate_p256
from certs.request import BadRequest, CheckedRequest, RequestPolicy, check_csr, renewal_policy

NOW = datetime.now(UTC).replace(microsecond=0)  # openssl and ssl verify against the machine's clock
DEVICE = DeviceFacts("6a1f2c3e-1111-4222-8333-944455556666", "acme")
DEVICE_KEY = ec.derive_private_key(4711, ec.SECP256R1())
RANDOM = random.Random(3).randbytes

ROOT = make_root("Gatehouse", NOW, RANDOM)
ISSUING = make_issuing(Authority(ROOT), "Gatehouse", NOW, RANDOM, crl_url="http://gatehouse.example/root.crl")
AUTHORITIES = open_set((ROOT, ISSUING))


def checked(key=DEVICE_KEY, subject: x509.Name | None = None, policy: RequestPolicy | None = None) -> CheckedRequest:
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject or x509.Name([]))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return check_csr(builder.sign(key, algorithm).public_bytes(Encoding.DER), policy)


def device_certificate(
    profile: DeviceProfile | None = None, issuer: Authority = AUTHORITIES.active
) -> IssuedCertificate:
    return sign(prepare_device(checked(), DEVICE, issuer, NOW, RANDOM, profile))


def opened(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


def openssl_verify(directory: Path, leaf: bytes, *, purpose: str, more: Sequence[str] = ()) -> str:
    (directory / "root.pem").write_bytes(bundle([ROOT.certificate_der]))
    (directory / "issuing.pem").write_bytes(bundle([ISSUING.certificate_der]))
    (directory / "leaf.pem").write_bytes(bundle([leaf]))
    done = subprocess.run(
        [
            *["openssl", "verify", "-x509_strict", "-purpose", purpose],
            *["-CAfile", "root.pem", "-untrusted", "issuing.pem", *more, "leaf.pem"],
        ],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.stdout + done.stderr


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl binary")


# --- judged by others -------------------------------------------------------------------------------------------------


@needs_openssl
def test_openssl_accepts_the_chain_strictly(tmp_path: Path) -> None:
    leaf = device_certificate(DeviceProfile(crl_url="http://gatehouse.example/ca.crl"))
    assert openssl_verify(tmp_path, leaf.der, purpose="sslclient").endswith("leaf.pem: OK\n")
    assert "error" in openssl_verify(tmp_path, leaf.der, purpose="sslserver")


@needs_openssl
def test_openssl_accepts_it_by_the_revocation_list_until_it_is_listed(tmp_path: Path) -> None:
    leaf = device_certificate()
    entry = RevokedEntry(leaf.intent.serial_hex, NOW)
    for entries, verdict in (((), "leaf.pem: OK"), ((entry,), "certificate revoked")):
        crl = build_crl(AUTHORITIES.active, entries, 1, NOW - timedelta(minutes=1))
        (tmp_path / "crl.pem").write_bytes(crl_pem(crl))
        told = openssl_verify(tmp_path, leaf.der, purpose="sslclient", more=["-crl_check", "-CRLfile", "crl.pem"])
        assert verdict in told


def test_python_tls_accepts_the_server_certificate_by_name_and_address(tmp_path: Path) -> None:
    key = generate_p256(RANDOM)
    names = ["localhost", "127.0.0.1", "::1", "gate.example"]
    server = sign(prepare_server(key, names, AUTHORITIES.active, NOW, RANDOM))
    chain, secret = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(bundle([server.der, ISSUING.certificate_der]))
    secret.write_bytes(key.reveal())
    for name, accepted in (("localhost", True), ("127.0.0.1", True), ("::1", True), ("other.example", False)):
        assert _handshake(chain, secret, name) is accepted


def _handshake(chain: Path, key: Path, name: str) -> bool:
    """A whole TLS handshake in memory, the client strict about chain and name."""
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.load_cert_chain(chain, key)
    connecting = ssl.create_default_context(cadata=bundle([ROOT.certificate_der]).decode())
    connecting.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = connecting.wrap_bio(down, up, server_hostname=name)
    server = listening.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return client.version() is not None and client.getpeercert() != {}


# --- the device profile -----------------------------------------------------------------------------------------------


def test_the_device_profile_says_what_the_registry_says() -> None:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody else")])
    prepared = prepare_device(checked(subject=subject), DEVICE, AUTHORITIES.active, NOW, RANDOM)
    certificate = opened(sign(prepared).der)
    assert certificate.subject.rfc4514_string() == f"CN={DEVICE.device_id},O=acme"
    extensions = certificate.extensions
    assert {extension.oid._name: extension.critical for extension in extensions} == {
        "basicConstraints": True,
        "keyUsage": True,
        "extendedKeyUsage": False,
        "subjectAltName": False,
        "authorityKeyIdentifier": False,
        "subjectKeyIdentifier": False,
    }
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [device_uri(DEVICE.device_id)]
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert not usage.key_agreement
    assert certificate.version is x509.Version.v3


def test_the_intent_is_what_gets_signed() -> None:
    prepared = prepare_device(checked(), DEVICE, AUTHORITIES.active, NOW, RANDOM)
    intent = prepared.intent
    issued = sign(prepared)
    certificate = opened(issued.der)
    assert f"{certificate.serial_number:x}" == intent.serial_hex
    assert (certificate.not_valid_before_utc, certificate.not_valid_after_utc) == (intent.not_before, intent.not_after)
    assert certificate.subject.rfc4514_string() == intent.subject
    assert intent.issuer_fingerprint == AUTHORITIES.active.fingerprint
    assert intent.spki_sha256 == checked().spki_sha256
    assert issued.intent is intent
    assert issued.fingerprint == certificate.fingerprint(hashes.SHA256()).hex()


def test_a_certificate_begins_early_and_never_outlives_its_issuer() -> None:
    ordinary = device_certificate().intent
    assert ordinary.not_before == NOW - timedelta(days=1)
    assert ordinary.not_after == NOW + timedelta(days=365)
    endless = device_certificate(DeviceProfile(lifetime=timedelta(days=36500), backdate=timedelta(days=36500))).intent
    assert endless.not_after == AUTHORITIES.active.not_after
    assert endless.not_before == AUTHORITIES.active.not_before


def test_an_issuer_outside_its_own_validity_issues_nothing() -> None:
    for moment in (AUTHORITIES.active.not_after, AUTHORITIES.active.not_before - timedelta(seconds=1)):
        with pytest.raises(BadAuthority):
            prepare_device(checked(), DEVICE, AUTHORITIES.active, moment, RANDOM)


def test_the_root_signs_no_leaf() -> None:
    with pytest.raises(BadAuthority):
        prepare_device(checked(), DEVICE, AUTHORITIES.root, NOW, RANDOM)


def test_a_time_without_zone_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="zone"):
        prepare_device(checked(), DEVICE, AUTHORITIES.active, NOW.replace(tzinfo=None), RANDOM)


@pytest.mark.parametrize(
    ("device_id", "tenant"),
    [("", "acme"), ("a b", "acme"), ("x" * 65, "acme"), ("x", ""), ("x", "a\nb"), ("x", "t" * 65)],
)
def test_facts_that_do_not_fit_a_certificate_are_refused(device_id: str, tenant: str) -> None:
    with pytest.raises(ValueError, match="certificate"):
        DeviceFacts(device_id, tenant)


@pytest.mark.parametrize(
    "base", ["urn:uuid:", "https://host", "https://host/a", "https://ho st/", "https:///", "ftp://h/"]
)
def test_a_uri_base_that_makes_no_uri_is_refused(base: str) -> None:
    with pytest.raises(ValueError, match="URI"):
        DeviceProfile(uri_base=base)


def test_a_crl_url_that_is_none_is_refused() -> None:
    for url in ("ldap://x/", "/ca.crl", "http://a b/", "http://ä/"):
        with pytest.raises(ValueError, match="CRL"):
            DeviceProfile(crl_url=url)


# --- one signature for one preparation --------------------------------------------------------------------------------


def test_a_prepared_certificate_signs_once() -> None:
    prepared = prepare_device(checked(), DEVICE, AUTHORITIES.active, NOW, RANDOM)
    sign(prepared)
    with pytest.raises(AlreadySigned):
        sign(prepared)


def test_threads_racing_for_one_signature_get_one() -> None:
    prepared = prepare_device(checked(), DEVICE, AUTHORITIES.active, NOW, RANDOM)

    def attempt(_: int) -> IssuedCertificate | None:
        try:
            return sign(prepared)
        except AlreadySigned:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert sum(result is not None for result in pool.map(attempt, range(32))) == 1


def test_a_prepared_certificate_is_neither_forged_nor_copied() -> None:
    prepared = prepare_device(checked(), DEVICE, AUTHORITIES.active, NOW, RANDOM)
    with pytest.raises(TypeError):
        PreparedCertificate(prepared.intent, AUTHORITIES.active, x509.CertificateBuilder(), object())
    for duplicate in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            duplicate(prepared)


def test_signatures_are_reproducible() -> None:
    def issue() -> bytes:
        return sign(prepare_device(checked(), DEVICE, AUTHORITIES.active, NOW, random.Random(9).randbytes)).der

    assert issue() == issue()


def test_serials_are_sixteen_positive_octets() -> None:
    for drawn in (b"\x00" * 16, b"\xff" * 16, RANDOM(16)):
        serial = make_serial(lambda _, drawn=drawn: drawn)
        assert serial > 0
        assert serial.bit_length() == 127
    with pytest.raises(ValueError, match="random source"):
        make_serial(lambda _: b"")


# --- servers ----------------------------------------------------------------------------------------------------------


def test_a_server_gets_its_names_and_only_server_authentication() -> None:
    key = generate_p256(RANDOM)
    issued = sign(prepare_server(key, ["Gate.Example", "*.gate.example", "192.0.2.1"], AUTHORITIES.active, NOW, RANDOM))
    extensions = opened(issued.der).extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gate.example", "*.gate.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.1"]
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert issued.intent.not_after == NOW + timedelta(days=90)


@pytest.mark.parametrize(
    "name",
    ["", ".", "a..b", "-a", "a-", "a_b", "a b", "*", "a.*.b", "é.example", "a\n", "x" * 64, "1.2.3.4/8", "a" * 300],
)
def test_names_that_are_no_server_names_are_refused(name: str) -> None:
    with pytest.raises(BadServerName):
        server_names([name])


def test_no_names_or_endless_names_are_refused_and_repeated_ones_merged() -> None:
    for names in ([], ["a.example"] * 101):
        with pytest.raises(BadServerName):
            server_names(names)
    assert server_names(["a.example", "A.example", "::1", "0:0::1"]) == server_names(["a.example", "::1"])


# --- authorities ------------------------------------------------------------------------------------------------------


def test_the_profiles_of_the_authorities() -> None:
    for authority, length in ((AUTHORITIES.root, 1), (AUTHORITIES.active, 0)):
        extensions = authority.certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert constraints.value == x509.BasicConstraints(ca=True, path_length=length)
        usage = extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical
        assert usage.value == x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    assert AUTHORITIES.root.not_after == NOW + timedelta(days=20 * 365)
    assert AUTHORITIES.active.not_after == NOW + timedelta(days=5 * 365)


def test_dates_after_2049_are_written_with_four_digit_years() -> None:
    late = datetime(2049, 6, 1, tzinfo=UTC)
    root = make_root("Late", late, RANDOM)
    certificate = opened(root.certificate_der)
    assert certificate.not_valid_after_utc.year == 2069
    assert b"\x17\x0d490531000000Z\x18\x0f2069" in root.certificate_der  # UTCTime, then GeneralizedTime
    crl = build_crl(
        open_set((root, make_issuing(Authority(root), "Late", late, RANDOM))).active, (), 1, late + timedelta(300)
    )
    assert b"\x18\x0f20500328000000Z" in crl
    endless = validity(late, timedelta(days=10_000 * 365), timedelta())[1]
    assert endless == datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


def test_roll_over_keeps_the_old_authority_beside_the_new_one() -> None:
    old_leaf = device_certificate()
    successor = Authority(make_issuing(AUTHORITIES.root, "Gatehouse", NOW + timedelta(seconds=1), RANDOM))
    rolled = AUTHORITIES.roll_over(successor)
    new_leaf = device_certificate(issuer=successor)
    assert rolled.active is successor
    assert rolled.issuer_of(old_leaf.der) is AUTHORITIES.active
    assert rolled.issuer_of(new_leaf.der) is successor
    assert AUTHORITIES.issuer_of(new_leaf.der) is None
    assert rolled.issuer_of(b"nonsense") is None
    assert len(rolled.chain) == 3
    assert rolled.chain[-1] == ROOT.certificate_der
    assert successor.certificate.subject != AUTHORITIES.active.certificate.subject
    assert len(rolled.forbidden_spki) == 3


def test_a_stored_set_opens_with_the_recorded_or_the_latest_authority_active() -> None:
    second = make_issuing(AUTHORITIES.root, "Gatehouse", NOW + timedelta(days=400), RANDOM)
    materials = (second, ROOT, ISSUING)
    assert open_set(materials).active.certificate_der == second.certificate_der
    assert open_set(materials, AUTHORITIES.active.fingerprint).active.certificate_der == ISSUING.certificate_der
    for broken in ((ROOT,), (ISSUING,), (ROOT, ROOT, ISSUING)):
        with pytest.raises(BadAuthority):
            open_set(broken)
    with pytest.raises(BadAuthority):
        open_set(materials, "00" * 32)


def test_material_that_was_swapped_is_found_when_it_is_opened() -> None:
    other = make_root("Other", NOW, RANDOM)
    with pytest.raises(BadAuthority, match="does not belong"):
        Authority(replace(ROOT, private_key=other.private_key))
    with pytest.raises(BadAuthority, match="role"):
        Authority(replace(ROOT, role=AuthorityRole.ISSUING))
    key = generate_p256(RANDOM)
    leaf = sign(prepare_server(key, ["a.example"], AUTHORITIES.active, NOW, RANDOM))
    with pytest.raises(BadAuthority, match="may not sign"):
        Authority(AuthorityMaterial(AuthorityRole.ISSUING, leaf.der, key))
    with pytest.raises(BadAuthority):
        Authority(replace(ROOT, certificate_der=b"\x30\x00"))
    with pytest.raises(BadAuthority, match="not signed by its root"):
        AuthoritySet(Authority(other), AUTHORITIES.active)


def test_an_issuing_authority_never_outlives_or_replaces_its_root() -> None:
    issuing = make_issuing(AUTHORITIES.root, "Gatehouse", NOW, RANDOM, lifetime=timedelta(days=36500))
    assert Authority(issuing).not_after == AUTHORITIES.root.not_after
    with pytest.raises(BadAuthority, match="signed by a root"):
        make_issuing(AUTHORITIES.active, "Gatehouse", NOW, RANDOM)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 45, "ü" * 23])
def test_an_authority_needs_a_printable_name_that_fits(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        make_root(name, NOW, RANDOM)
    assert make_root("x" * 44, NOW, RANDOM)


def test_no_private_key_shows_in_any_repr() -> None:
    prepared = prepare_device(checked(), DEVICE, AUTHORITIES.active, NOW, RANDOM)
    shown = f"{ROOT!r} {ISSUING} {AUTHORITIES!r} {AUTHORITIES.active} {prepared}"
    for material in (ROOT, ISSUING):
        for line in material.private_key.reveal().decode().splitlines()[1:-1]:
            assert line not in shown


# --- renewal ----------------------------------------------------------------------------------------------------------


def test_a_renewal_keeps_its_subject_and_may_bring_a_new_key() -> None:
    current = device_certificate()
    policy = renewal_policy(current.der, RequestPolicy(forbidden_spki=AUTHORITIES.forbidden_spki))
    subject = opened(current.der).subject
    assert checked(subject=subject, policy=policy).spki_sha256 == current.intent.spki_sha256
    rekeyed = checked(ed25519.Ed25519PrivateKey.from_private_bytes(b"\x01" * 32), subject, policy)
    assert rekeyed.spki_sha256 != current.intent.spki_sha256
    with pytest.raises(BadRequest):
        checked(subject=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, DEVICE.device_id)]), policy=policy)
    with pytest.raises(BadRequest):
        checked(policy=policy)
    assert policy.forbidden_spki == AUTHORITIES.forbidden_spki
    assert policy.acceptable_uris == {device_uri(DEVICE.device_id)}
