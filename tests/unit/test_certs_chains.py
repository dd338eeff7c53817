"""Bundles, PKCS#7, fingerprints, and certificates that somebody else made."""

from __future__ import annotations

import base64
import random
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL.crypto import X509

from adapters.dtls.context import certificate_fault
from certs.authority import Authority, make_issuing, make_root
from certs.chains import (
    BadCertificate,
    CertificateFault,
    bundle,
    describe_certificate,
    fingerprint,
    order_chain,
    pkcs7_base64,
    pkcs7_der,
    read_foreign_certificate,
    unbundle,
)
from certs.der import read_der
from certs.pem import MalformedPem, decode_base64, read_blocks, write_block

NOW = datetime(2026, 5, 1, tzinfo=UTC)
RANDOM = random.Random(5).randbytes
ROOT = make_root("Gatehouse", NOW, RANDOM)
ISSUING = make_issuing(Authority(ROOT), "Gatehouse", NOW, RANDOM)
OTHER = make_root("Other", NOW, RANDOM)
KEY = ec.derive_private_key(8, ec.SECP256R1())


def self_signed(
    key=KEY,
    name: str = "foreign",
    serial: int = 1,
    begin: datetime = NOW,
    days: int = 10,
    extensions: Sequence[x509.ExtensionType] = (),
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=days))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def refused(data: bytes, fault: CertificateFault) -> str:
    with pytest.raises(BadCertificate) as caught:
        read_foreign_certificate(data)
    assert caught.value.reason is fault, caught.value.message
    return caught.value.message


def test_a_bundle_comes_apart_as_it_was_made() -> None:
    ders = (ISSUING.certificate_der, ROOT.certificate_der)
    assert unbundle(bundle(ders)) == ders


def test_chains_are_ordered_by_signatures() -> None:
    others = (ROOT.certificate_der, OTHER.certificate_der, ISSUING.certificate_der)
    assert order_chain(ISSUING.certificate_der, others) == (ISSUING.certificate_der, ROOT.certificate_der)
    assert order_chain(ROOT.certificate_der, others) == (ROOT.certificate_der,)
    with pytest.raises(BadCertificate):
        order_chain(b"nonsense", ())
    with pytest.raises(BadCertificate):
        order_chain(ROOT.certificate_der, [OTHER.certificate_der] * 17)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl binary")
def test_openssl_reads_our_pkcs7(tmp_path: Path) -> None:
    ders = (ISSUING.certificate_der, ROOT.certificate_der)
    (tmp_path / "chain.p7").write_bytes(pkcs7_der(ders))
    read = subprocess.run(
        ["openssl", "pkcs7", "-inform", "DER", "-in", "chain.p7", "-print_certs"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
        timeout=30,
    )
    assert set(unbundle(read.stdout)) == set(ders)
    assert base64.b64decode(pkcs7_base64(ders)) == pkcs7_der(ders)
    assert max(map(len, pkcs7_base64(ders).splitlines())) == 76
    assert b"\r" not in pkcs7_base64(ders)


def test_a_foreign_certificate_is_described() -> None:
    der = self_signed(serial=0x0ABC)
    foreign = read_foreign_certificate(b"Bag Attributes\n    friendlyName: x\n" + bundle([der]))
    assert foreign.fingerprint == fingerprint(der) == sha256(der).hexdigest()
    assert (foreign.subject, foreign.issuer, foreign.serial_hex) == ("CN=foreign", "CN=foreign", "0abc")
    assert (foreign.not_before, foreign.not_after) == (NOW, NOW + timedelta(days=10))
    assert foreign.public_key_kind == "ec-secp256r1"
    assert describe_certificate(der) == foreign
    assert describe_certificate(self_signed(rsa.generate_private_key(65537, 2048))).public_key_kind == "rsa-2048"


def test_foreign_names_cannot_forge_a_line() -> None:
    hostile = "a\r\nlevel=critical\x00\x1b[2J\u202e" + "y" * 9 + ",O=x"
    subject = read_foreign_certificate(bundle([self_signed(name=hostile)])).subject
    assert subject.isprintable()
    assert subject.endswith("yyy\\,O\\=x")
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "z" * 5000)])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(KEY.public_key())
    builder = builder.serial_number(1).not_valid_before(NOW).not_valid_after(NOW)
    long = describe_certificate(builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)).subject
    assert len(long) == 256


def test_names_that_break_the_rules_harmlessly_are_read_without_a_warning() -> None:
    der = self_signed(name="n" * 64)
    longer = der.replace(b"\x0c\x40" + b"n" * 64, b"\x14\x40" + b"\xe9" * 64)  # Teletex
    assert describe_certificate(longer).subject == "CN=" + "é" * 64
    country = x509.Name([x509.NameAttribute(NameOID.COUNTRY_NAME, "DE"), x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateBuilder().subject_name(country).issuer_name(country).public_key(KEY.public_key())
    builder = builder.serial_number(1).not_valid_before(NOW).not_valid_after(NOW)
    der = builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)
    # "C=D" is what the library warns of: a country has two letters. The name must shrink by one octet everywhere.
    short = _with_country_of_one_letter(der)
    assert describe_certificate(short).subject == "CN=x,C=D"


def _with_country_of_one_letter(der: bytes) -> bytes:
    certificate = read_der(der)
    body = certificate.parts[0]
    fields = [part.encoding for part in body.parts]
    relative = b"\x31\x0a\x30\x08\x06\x03\x55\x04\x06\x13\x01D"
    name = relative + b"\x31\x0a\x30\x08\x06\x03\x55\x04\x03\x0c\x01x"
    fields[5] = fields[3] = bytes((0x30, len(name))) + name
    new_body = b"".join(fields)
    new_body = b"\x30\x81" + bytes((len(new_body),)) + new_body
    whole = new_body + certificate.parts[1].encoding + certificate.parts[2].encoding
    return b"\x30\x82" + len(whole).to_bytes(2, "big") + whole


def test_private_keys_in_the_text_are_refused_by_name() -> None:
    text = bundle([self_signed()]) + OTHER.private_key.reveal()
    message = refused(text, CertificateFault.PRIVATE_KEY)
    assert OTHER.private_key.reveal().decode().splitlines()[1] not in message


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"", CertificateFault.NOT_A_CERTIFICATE),
        (b"\x00", CertificateFault.NOT_A_CERTIFICATE),
        (b"\xff\xfe", CertificateFault.NOT_A_CERTIFICATE),
        (self_signed(), CertificateFault.NOT_A_CERTIFICATE),
        (bundle([self_signed()] * 2), CertificateFault.NOT_A_CERTIFICATE),
        (write_block("CERTIFICATE REQUEST", b"\x30\x00"), CertificateFault.NOT_A_CERTIFICATE),
        (write_block("CERTIFICATE", b"\x30\x00"), CertificateFault.MALFORMED),
        (write_block("CERTIFICATE", self_signed() + b"\x00"), CertificateFault.MALFORMED),
        (b" " * 16385, CertificateFault.TOO_LARGE),
        (bundle([self_signed(rsa.generate_private_key(65537, 1024))]), CertificateFault.KEY),
        (bundle([self_signed(ec.derive_private_key(3, ec.SECP256K1()))]), CertificateFault.KEY),
    ],
    ids=range(11),
)
def test_what_is_not_one_usable_certificate_is_refused(text: bytes, fault: CertificateFault) -> None:
    refused(text, fault)


def usage(**bits: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    more = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**dict.fromkeys((*names, *more), False) | bits)


SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
USAGES: dict[str, tuple[list[x509.ExtensionType], bool]] = {
    "none": ([], True),
    "others": ([x509.BasicConstraints(False, None), x509.SubjectAlternativeName([x509.DNSName("a")])], True),
    "for clients": ([usage(digital_signature=True), x509.ExtendedKeyUsage([CLIENT])], True),
    "for both": ([x509.ExtendedKeyUsage([SERVER, CLIENT])], True),
    "for anything": ([x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])], True),
    "for servers": ([x509.ExtendedKeyUsage([SERVER])], False),
    "for mail": ([usage(digital_signature=True), x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])], False),
    "for key agreement": ([usage(key_agreement=True), x509.ExtendedKeyUsage([CLIENT])], False),
    "for an authority": ([usage(key_cert_sign=True, crl_sign=True)], False),
    "in the second octet": ([usage(key_agreement=True, decipher_only=True)], False),
}


@pytest.mark.parametrize("kind", [*USAGES])
def test_a_certificate_that_says_that_it_is_for_something_else_is_refused_as_in_a_dtls_handshake(kind: str) -> None:
    extensions, usable = USAGES[kind]
    der = self_signed(extensions=extensions)
    if usable:
        assert read_foreign_certificate(bundle([der])).der == der
    else:
        assert "the certificate is not for" in refused(bundle([der]), CertificateFault.USAGE)
    fault = certificate_fault(X509.from_cryptography(x509.load_der_x509_certificate(der)))
    assert (fault is None) == usable
    assert describe_certificate(der).der == der  # what is registered already stays readable


def test_usages_that_are_no_usages_are_refused() -> None:
    der = self_signed(extensions=[usage(digital_signature=True), x509.ExtendedKeyUsage([SERVER, CLIENT])])
    bits = bytes.fromhex("03020780")
    purposes = bytes.fromhex("301406082b0601050507030106082b06010505070302")
    for before, after in (
        (bits, bytes.fromhex("03020700")),
        (bits, bytes.fromhex("04020780")),
        (bits, bytes.fromhex("03030780")),
        (purposes, b"\x31" + purposes[1:]),
        (purposes, purposes.replace(b"\x06\x08", b"\x04\x08")),
    ):
        assert der.count(before) == 1
        refused(bundle([der.replace(before, after)]), CertificateFault.MALFORMED)
    twice = der.replace(bytes.fromhex("0603551d25"), bytes.fromhex("0603551d0f"))
    refused(bundle([twice]), CertificateFault.MALFORMED)


def test_a_serial_that_is_not_positive_is_refused() -> None:
    der = self_signed(serial=0x7A)
    at = der.index(b"\x02\x01\x7a")
    for serial in (b"\x00", b"\xff"):
        refused(bundle([der[: at + 2] + serial + der[at + 3 :]]), CertificateFault.MALFORMED)


def test_a_certificate_that_ends_before_it_begins_is_refused() -> None:
    der = self_signed(begin=datetime(2026, 5, 1, tzinfo=UTC), days=10)
    refused(bundle([der.replace(b"260501000000Z", b"270501000000Z")]), CertificateFault.VALIDITY)


def test_endless_bundles_are_refused() -> None:
    with pytest.raises(BadCertificate):
        unbundle(bundle([self_signed()] * 17))
    with pytest.raises(BadCertificate):
        unbundle(b"-----BEGIN CERTIFICATE-----\n" * 10_000)


def test_a_certificate_cut_or_bent_anywhere_gives_the_declared_error_only() -> None:
    der = self_signed(extensions=[usage(digital_signature=True), x509.ExtendedKeyUsage([CLIENT])])
    source = random.Random(4)
    for at in range(len(der)):
        with pytest.raises(BadCertificate):
            describe_certificate(der[:at])
        bent = bytearray(der)
        bent[at] ^= source.randrange(1, 256)
        try:
            read_foreign_certificate(bundle([bytes(bent)]))  # whoever signed it is not our question
        except BadCertificate:
            pass


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_random_bytes_are_no_certificate(data: bytes) -> None:
    for form in (data, bundle([data])):
        with pytest.raises(BadCertificate):
            read_foreign_certificate(form)
    with pytest.raises(BadCertificate):
        describe_certificate(data)


# --- PEM --------------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from(["CERTIFICATE", "X509 CRL", "NEW CERTIFICATE REQUEST"]), st.binary()), max_size=4
    )
)
@settings(deadline=None)
def test_pem_blocks_round_trip(blocks: list[tuple[str, bytes]]) -> None:
    text = b"".join(write_block(label, der) for label, der in blocks)
    assert [(block.label, block.der) for block in read_blocks(text)] == blocks


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_pem_reading_is_total(data: bytes) -> None:
    for form in (data, b"-----BEGIN X-----\n" + data, b"-----BEGIN X-----\n" + data + b"\n-----END X-----"):
        try:
            read_blocks(form)
        except MalformedPem:
            pass


@pytest.mark.parametrize(
    "text",
    [
        b"-----BEGIN A-----\nAAAA\n",
        b"-----END A-----\n",
        b"-----BEGIN A-----\nAAAA\n-----END B-----\n",
        b"-----BEGIN A-----\n-----BEGIN A-----\nAAAA\n-----END A-----\n",
        b"-----BEGIN A-----\nProc-Type: 4\n\nAAAA\n-----END A-----\n",
        b"-----BEGIN A-----\nAAA\n-----END A-----\n",
        b"-----BEGIN A-----\nAAB=\n-----END A-----\n",
        b"-----BEGIN A-----\nAA*A\n-----END A-----\n",
        b"x -----BEGIN A-----\nAAAA\n-----END A-----\n",
        b"-----BEGIN A-----AAAA-----END A-----\n",
        "-----BEGIN A-----\nAAÄA\n-----END A-----\n".encode(),
        "text\u2028-----BEGIN A-----\nAAAA\n-----END A-----\n".encode(),
        b"-----BEGIN A-----\x0cAAAA\x0c-----END A-----",
    ],
    ids=range(13),
)
def test_ambiguous_pem_is_refused(text: bytes) -> None:
    with pytest.raises(MalformedPem):
        read_blocks(text)


def test_bare_base64_is_decoded_strictly() -> None:
    assert decode_base64(b"AAEC\r\n Aw==\r\n") == b"\x00\x01\x02\x03"
    for text in (b"AAE", b"AAEC!", b"\xff", b"AB=="):
        with pytest.raises(MalformedPem):
            decode_base64(text)
