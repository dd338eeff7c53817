"""What a device may send as its certification request, and everything that it may not.

Requests are made by `cryptography` and by the openssl binary, then bent: by cutting, by flipping, and by assembling
DER by hand where no library would write what an attacker writes. Whatever the bytes, the answer is a CheckedRequest or
a BadRequest.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from certs.authority import Authority, make_root
from certs.keys import KeyKind, load_private_key, spki_der
from certs.pem import write_block
from certs.request import BadRequest, CheckedRequest, RequestFault, RequestPolicy, check_csr

SHA256 = hashes.SHA256()
KEY = ec.derive_private_key(0x1234567890ABCDEF, ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)
NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pump-17")])
EMPTY = x509.Name([])


def request(
    key=KEY, subject: x509.Name = NAME, extensions=(), algorithm: hashes.HashAlgorithm | None = SHA256, **sign
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(key, algorithm, **sign).public_bytes(Encoding.DER)


def tlv(tag: int, *contents: bytes) -> bytes:
    body = b"".join(contents)
    if len(body) < 0x80:
        return bytes((tag, len(body))) + body
    length = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + body


ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
EXTENSION_REQUEST = bytes.fromhex("06092a864886f70d01090e")


def assemble(
    *,
    key=KEY,
    version: bytes = b"\x02\x01\x00",
    subject: bytes | None = None,
    spki: bytes | None = None,
    attributes: bytes = b"\xa0\x00",
    algorithm: bytes = ECDSA_SHA256,
) -> bytes:
    """A request from raw parts, correctly signed whatever they are."""
    info = tlv(
        0x30,
        version,
        NAME.public_bytes() if subject is None else subject,
        spki or spki_der(key.public_key()),
        attributes,
    )
    signature = key.sign(info, ec.ECDSA(SHA256, deterministic_signing=True))
    return tlv(0x30, info, algorithm, tlv(0x03, b"\x00", signature))


def extension_request(*extensions: bytes) -> bytes:
    return tlv(0xA0, tlv(0x30, EXTENSION_REQUEST, tlv(0x31, tlv(0x30, *extensions))))


def common_name(text: bytes, tag: int = 0x0C) -> bytes:
    return tlv(0x30, tlv(0x31, tlv(0x30, bytes.fromhex("0603550403"), tlv(tag, text))))


def refused(data: bytes, fault: RequestFault, policy: RequestPolicy | None = None) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        check_csr(data, policy)
    assert caught.value.reason is fault, caught.value.message
    return caught.value


# --- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "algorithm", "kind"),
    [
        (KEY, hashes.SHA256(), KeyKind.P256),
        (KEY, hashes.SHA512(), KeyKind.P256),
        (ec.derive_private_key(99, ec.SECP384R1()), hashes.SHA384(), KeyKind.P384),
        (ed25519.Ed25519PrivateKey.from_private_bytes(b"\x07" * 32), None, KeyKind.ED25519),
        (RSA_KEY, hashes.SHA256(), KeyKind.RSA),
    ],
)
def test_every_allowed_kind_of_key_passes_in_der_and_pem(key, algorithm, kind) -> None:
    der = request(key, algorithm=algorithm)
    for form in (
        der,
        write_block("CERTIFICATE REQUEST", der),
        write_block("NEW CERTIFICATE REQUEST", der),
        b"Certificate Request:\n    Data:\n" + write_block("CERTIFICATE REQUEST", der).replace(b"\n", b"\r\n"),
    ):
        checked = check_csr(form)
        assert checked.kind is kind
        assert checked.spki_der == spki_der(key.public_key())
        assert checked.common_name == "pump-17"


def test_the_hand_made_request_is_itself_acceptable() -> None:
    assert check_csr(assemble()).common_name == "pump-17"


def test_no_subject_is_as_good_as_any() -> None:
    checked = check_csr(request(subject=EMPTY))
    assert checked.subject == ()
    assert checked.common_name is None


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl binary")
@pytest.mark.parametrize(
    "arguments",
    [
        ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"],
        ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1", "-sha384"],
        ["-newkey", "ed25519"],
        ["-newkey", "rsa:2048"],
        [
            "-newkey",
            "ed25519",
            "-addext",
            "extendedKeyUsage=clientAuth",
            "-addext",
            "keyUsage=critical,digitalSignature",
        ],
        ["-newkey", "ed25519", "-addext", "basicConstraints=CA:FALSE", "-text"],
    ],
)
def test_plain_openssl_requests_pass(arguments: list[str], tmp_path: Path) -> None:
    made = subprocess.run(
        [
            "openssl",
            "req",
            "-new",
            "-nodes",
            "-keyout",
            str(tmp_path / "key"),
            "-subj",
            "/O=Acme/CN=anything",
            *arguments,
        ],
        capture_output=True,
        check=True,
        timeout=30,
    )
    assert check_csr(made.stdout).common_name == "anything"


def test_what_a_device_gets_anyhow_may_be_asked_for() -> None:
    usage = x509.KeyUsage(True, True, True, False, True, False, False, False, False)
    der = request(
        extensions=[
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (usage, True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
            (x509.SubjectKeyIdentifier.from_public_key(KEY.public_key()), False),
        ]
    )
    assert check_csr(der).kind is KeyKind.P256


def test_a_challenge_password_is_ignored() -> None:
    builder = x509.CertificateSigningRequestBuilder().subject_name(NAME)
    builder = builder.add_attribute(x509.oid.AttributeOID.CHALLENGE_PASSWORD, b"tell nobody")
    checked = check_csr(builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER))
    assert "tell nobody" not in repr(checked)


# --- the hostile list of the issue ------------------------------------------------------------------------------------


def test_a_wrong_signature_is_refused() -> None:
    der = bytearray(request())
    der[-1] ^= 1
    refused(bytes(der), RequestFault.SIGNATURE)
    other = ec.derive_private_key(5, ec.SECP256R1())
    refused(assemble(spki=spki_der(other.public_key())), RequestFault.SIGNATURE)


def test_short_and_huge_rsa_keys_are_refused() -> None:
    short = rsa.generate_private_key(65537, 1024)
    assert "2048 to 8192" in refused(request(short), RequestFault.WEAK_KEY).message
    # The size is looked at before anything is computed with it.
    key = tlv(0x30, tlv(0x02, b"\x00" + b"\xff" * 8000), tlv(0x02, b"\x01\x00\x01"))
    spki = tlv(0x30, bytes.fromhex("300d06092a864886f70d0101010500"), tlv(0x03, b"\x00", key))
    with pytest.raises(BadRequest):
        check_csr(assemble(spki=spki, algorithm=bytes.fromhex("300d06092a864886f70d01010b0500")))


@pytest.mark.parametrize("exponent", [1, 2, 3, 65536, 2**32 + 1, 2**2000 + 1])
def test_odd_rsa_exponents_are_refused(exponent: int) -> None:
    modulus = RSA_KEY.public_key().public_numbers().n

    def integer(value: int) -> bytes:
        return tlv(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))

    key = tlv(0x30, integer(modulus), integer(exponent))
    spki = tlv(0x30, bytes.fromhex("300d06092a864886f70d0101010500"), tlv(0x03, b"\x00", key))
    with pytest.raises(BadRequest) as caught:
        check_csr(assemble(spki=spki, algorithm=bytes.fromhex("300d06092a864886f70d01010b0500")))
    assert caught.value.reason in (RequestFault.WEAK_KEY, RequestFault.KEY)


@pytest.mark.parametrize("curve", [ec.SECP521R1(), ec.SECP256K1(), ec.BrainpoolP256R1(), ec.SECP224R1()])
def test_unusual_curves_are_refused(curve: ec.EllipticCurve) -> None:
    assert "P-256" in refused(request(ec.derive_private_key(77, curve)), RequestFault.KEY).message


def test_ed448_is_refused() -> None:
    refused(request(ed448.Ed448PrivateKey.generate(), algorithm=None), RequestFault.KEY)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl binary")
def test_explicit_parameters_of_a_good_curve_are_refused(tmp_path: Path) -> None:
    made = subprocess.run(
        [
            *["openssl", "req", "-new", "-nodes", "-keyout", str(tmp_path / "key"), "-subj", "/CN=x", "-newkey", "ec"],
            *["-pkeyopt", "ec_paramgen_curve:prime256v1", "-pkeyopt", "ec_param_enc:explicit"],
        ],
        capture_output=True,
        check=True,
        timeout=30,
    )
    refused(made.stdout, RequestFault.KEY)


def test_a_compressed_point_is_refused() -> None:
    numbers = KEY.public_key().public_numbers()
    point = bytes((2 + numbers.y % 2,)) + numbers.x.to_bytes(32, "big")
    spki = tlv(0x30, bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107"), tlv(0x03, b"\x00", point))
    refused(assemble(spki=spki), RequestFault.KEY)


def test_a_point_off_the_curve_is_refused() -> None:
    point = b"\x04" + b"\x01" * 64
    spki = tlv(0x30, bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107"), tlv(0x03, b"\x00", point))
    refused(assemble(spki=spki), RequestFault.KEY)


def test_an_ed25519_key_that_needs_no_private_half_is_refused() -> None:
    # With the neutral element as public key, R = s·B for any s verifies every message: a forged possession.
    public = (1).to_bytes(32, "little")
    spki = tlv(0x30, bytes.fromhex("300506032b6570"), tlv(0x03, b"\x00", public))
    info = tlv(0x30, b"\x02\x01\x00", NAME.public_bytes(), spki, b"\xa0\x00")
    base = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex("58" + "66" * 31)).public_bytes_raw()
    forged = base + (1).to_bytes(32, "little")
    whole = tlv(0x30, info, bytes.fromhex("300506032b6570"), tlv(0x03, b"\x00", forged))
    assert x509.load_der_x509_csr(whole).is_signature_valid, "the forgery has to be real, or this test shows nothing"
    refused(whole, RequestFault.WEAK_KEY)


@pytest.mark.parametrize("number", ["04", "05", "0e"])  # MD5, SHA-1, SHA-224 with RSA
def test_weak_rsa_hashes_are_refused(number: str) -> None:
    algorithm = bytes.fromhex(f"300d06092a864886f70d0101{number}0500")
    spki = spki_der(RSA_KEY.public_key())
    assert "SHA-256" in refused(assemble(spki=spki, algorithm=algorithm), RequestFault.SIGNATURE_ALGORITHM).message


@pytest.mark.parametrize("algorithm", ["300906072a8648ce3d0401", "300a06082a8648ce3d040301"])  # SHA-1, SHA-224
def test_weak_ecdsa_hashes_are_refused(algorithm: str) -> None:
    refused(assemble(algorithm=bytes.fromhex(algorithm)), RequestFault.SIGNATURE_ALGORITHM)


def test_rsa_pss_is_refused_with_a_hint() -> None:
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    assert "PKCS#1" in refused(request(RSA_KEY, rsa_padding=pss), RequestFault.SIGNATURE_ALGORITHM).message


@pytest.mark.parametrize(
    "extension",
    [
        x509.BasicConstraints(ca=True, path_length=None),
        x509.BasicConstraints(ca=True, path_length=0),
        x509.KeyUsage(True, False, False, False, False, True, False, False, False),
        x509.KeyUsage(True, False, False, False, False, False, True, False, False),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]),
        x509.SubjectAlternativeName([x509.DNSName("example.org")]),
        x509.SubjectAlternativeName([x509.UniformResourceIdentifier("https://gatehouse.internal/devices/other")]),
        x509.NameConstraints([x509.DNSName("example.org")], None),
        x509.TLSFeature([x509.TLSFeatureType.status_request]),
    ],
)
def test_asking_for_more_than_a_device_gets_is_refused(extension: x509.ExtensionType) -> None:
    for critical in (False, True):
        refused(request(extensions=[(extension, critical)]), RequestFault.EXTENSION)


BASIC = bytes.fromhex("0603551d13")
USAGE = bytes.fromhex("0603551d0f")
PURPOSES = bytes.fromhex("0603551d25")


@pytest.mark.parametrize(
    "attributes",
    [
        extension_request(),
        tlv(0xA0, tlv(0x30, EXTENSION_REQUEST, tlv(0x31))),
        tlv(0xA0, tlv(0x30, EXTENSION_REQUEST)),
        tlv(0xA0, tlv(0x30)),
        tlv(0xA0, b"\x05\x00"),
        extension_request(tlv(0x30, BASIC, tlv(0x04))),
        extension_request(tlv(0x30, BASIC)),
        extension_request(tlv(0x30)),
        extension_request(tlv(0x30, PURPOSES, tlv(0x04, tlv(0x30)))),
        extension_request(tlv(0x30, USAGE, tlv(0x04, b"\x03\x01\x00"))),
        extension_request(tlv(0x30, USAGE, tlv(0x04, b"\x03\x02\x07\x00"))),
        extension_request(tlv(0x30, BASIC, tlv(0x04, tlv(0x30)), b"\x05\x00")),
        extension_request(tlv(0x30, BASIC, b"\x01\x01\x00", tlv(0x04, tlv(0x30)))),
        extension_request(tlv(0x30, BASIC, tlv(0x04, tlv(0x30, b"\x01\x01\x00")))),
        extension_request(tlv(0x30, BASIC, tlv(0x04, tlv(0x30))), tlv(0x30, BASIC, tlv(0x04, tlv(0x30)))),
        extension_request(tlv(0x30, BASIC, tlv(0x04, b"\x30\x80\x00\x00"))),
    ],
    ids=range(16),
)
def test_empty_and_misshapen_extensions_are_refused(attributes: bytes) -> None:
    refused(assemble(attributes=attributes), RequestFault.MALFORMED)


@pytest.mark.parametrize(
    "text", ["a\x00b", "a\nb", "a\r\nb", "\x1b[2J", "", "   ", "x\u202ey", "x\u200by", "\ufeff", "n" * 129]
)
def test_controls_and_invisible_text_in_names_are_refused(text: str) -> None:
    fault = refused(assemble(subject=common_name(text.encode())), RequestFault.SUBJECT)
    assert not text.strip() or text not in fault.message


@pytest.mark.parametrize(("tag", "text"), [(0x14, b"t61"), (0x1E, b"\x00b\x00m"), (0x1C, b"\x00\x00\x00u")])
def test_string_types_of_the_past_are_refused(tag: int, text: bytes) -> None:
    refused(assemble(subject=common_name(text, tag)), RequestFault.SUBJECT)


@pytest.mark.parametrize(
    "subject",
    [
        common_name(b"a\xff"),
        common_name(b"a_b", 0x13),
        common_name(b"\xc3\xa4", 0x16),
        tlv(0x30, tlv(0x31)),
        tlv(0x30, b"\x05\x00"),
        tlv(0x30, tlv(0x31, tlv(0x30))),
    ],
    ids=range(6),
)
def test_misshapen_subjects_are_refused(subject: bytes) -> None:
    refused(assemble(subject=subject), RequestFault.MALFORMED)


def test_two_common_names_and_endless_subjects_are_refused() -> None:
    part = tlv(0x31, tlv(0x30, bytes.fromhex("0603550403"), tlv(0x0C, b"x")))
    refused(assemble(subject=tlv(0x30, part, part)), RequestFault.SUBJECT)
    organisation = tlv(0x31, tlv(0x30, bytes.fromhex("060355040a"), tlv(0x0C, b"x")))
    refused(assemble(subject=tlv(0x30, *[organisation] * 17)), RequestFault.SUBJECT)


def test_a_policy_can_name_the_acceptable_common_names() -> None:
    policy = RequestPolicy(acceptable_common_names=frozenset({"SN-0001"}))
    refused(request(), RequestFault.SUBJECT, policy)
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SN-0001")])
    assert check_csr(request(subject=own), policy).common_name == "SN-0001"
    assert check_csr(request(subject=EMPTY), policy).common_name is None


def test_a_policy_can_allow_the_uri_of_the_device_and_only_that() -> None:
    uri = "https://gatehouse.internal/devices/6a1f"
    policy = RequestPolicy(acceptable_uris=frozenset({uri}))

    def with_names(*names: x509.GeneralName) -> bytes:
        return request(extensions=[(x509.SubjectAlternativeName(names), False)])

    check_csr(with_names(x509.UniformResourceIdentifier(uri)), policy)
    refused(with_names(x509.UniformResourceIdentifier(uri), x509.DNSName("a.example")), RequestFault.EXTENSION, policy)


def test_two_blocks_or_none_are_refused() -> None:
    block = write_block("CERTIFICATE REQUEST", request())
    refused(block + block, RequestFault.NOT_A_REQUEST)
    refused(b"", RequestFault.NOT_A_REQUEST)
    refused(b"hello", RequestFault.NOT_A_REQUEST)
    refused(write_block("CERTIFICATE", request()), RequestFault.NOT_A_REQUEST)


def test_a_private_key_is_refused_by_name_and_not_repeated() -> None:
    key = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for text in (key, write_block("CERTIFICATE REQUEST", request()) + key):
        message = refused(text, RequestFault.PRIVATE_KEY).message
        assert key.split(b"\n")[1][:20].decode() not in message
    with pytest.raises(BadRequest):
        check_csr(KEY.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))


def test_the_keys_of_the_authorities_are_refused() -> None:
    root = make_root("Acme", datetime(2026, 1, 1, tzinfo=UTC), random.Random(1).randbytes)
    policy = RequestPolicy(forbidden_spki=frozenset({Authority(root).spki_der}))
    refused(request(load_private_key(root.private_key)), RequestFault.FORBIDDEN_KEY, policy)
    assert check_csr(request(), policy)


def test_oversized_requests_are_refused_unread() -> None:
    message = refused(b"\x30" * (2 * 1024 * 1024), RequestFault.TOO_LARGE).message
    assert "16384" in message
    refused(b"-----BEGIN CERTIFICATE REQUEST-----\n" * 60_000, RequestFault.TOO_LARGE)


@pytest.mark.parametrize(
    "data",
    [
        b"\x30\x80" + request()[4:] + b"\x00\x00",  # indefinite length
        b"\x30\x83\x00" + request()[2:4] + request()[4:],  # a length longer than it needs
        request() + b"\x00",
        b"\x3f" + request()[1:],
        b"\x30\x00",
    ],
    ids=range(5),
)
def test_ber_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        check_csr(data)


def test_ber_hidden_in_an_attribute_that_nobody_reads_is_refused() -> None:
    def with_value(value: bytes) -> bytes:
        return assemble(attributes=tlv(0xA0, tlv(0x30, bytes.fromhex("06092a864886f70d010902"), tlv(0x31, value))))

    assert check_csr(with_value(tlv(0x0C, b"harmless")))
    refused(with_value(b"\x0c\x81\x01x"), RequestFault.MALFORMED)  # a long form of a short length
    refused(with_value(b"\x01\x01\x01"), RequestFault.MALFORMED)  # TRUE that is not FF
    refused(with_value(b"\x24\x03\x04\x01x"), RequestFault.MALFORMED)  # a string in pieces
    refused(with_value(b"\x02\x02\x00\x01"), RequestFault.MALFORMED)  # an integer with a leading zero
    refused(with_value(_nested(40)), RequestFault.MALFORMED)


def _nested(depth: int) -> bytes:
    value = b"\x05\x00"
    for _ in range(depth):
        value = tlv(0x30, value)
    return value


@pytest.mark.parametrize("version", [b"\x02\x01\x01", b"\x02\x01\xff", b"\x02\x02\x00\x00"])
def test_other_versions_are_refused(version: bytes) -> None:
    refused(assemble(version=version), RequestFault.MALFORMED)


# --- any bytes at all -------------------------------------------------------------------------------------------------

PLAIN = assemble()
RICH = request(
    RSA_KEY,
    extensions=[
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
    ],
)


@pytest.mark.parametrize("whole", [PLAIN, RICH], ids=["ec", "rsa"])
def test_cut_anywhere_it_is_refused(whole: bytes) -> None:
    for end in range(len(whole)):
        with pytest.raises(BadRequest):
            check_csr(whole[:end])


def test_pem_cut_anywhere_it_is_refused() -> None:
    pem = write_block("CERTIFICATE REQUEST", assemble()).rstrip(b"\n")
    for end in range(len(pem)):
        with pytest.raises(BadRequest):
            check_csr(pem[:end])


@pytest.mark.parametrize("whole", [PLAIN, RICH], ids=["ec", "rsa"])
def test_no_octet_can_be_changed(whole: bytes) -> None:
    source = random.Random(20)
    for at in range(len(whole)):
        bent = bytearray(whole)
        bent[at] ^= source.randrange(1, 256)
        with pytest.raises(BadRequest):
            check_csr(bytes(bent))


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_random_bytes_are_refused(data: bytes) -> None:
    for form in (data, b"\x30" + data, write_block("CERTIFICATE REQUEST", data)):
        with pytest.raises(BadRequest):
            check_csr(form)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_spliced_requests_are_refused(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([PLAIN, RICH]))
    start = data.draw(st.integers(0, len(whole) - 1))
    end = data.draw(st.integers(start, len(whole)))
    piece = data.draw(st.binary(max_size=12) | st.just(whole[start:end] * 2))
    bent = whole[:start] + piece + whole[end:]
    if bent == whole:
        return
    with pytest.raises(BadRequest):
        check_csr(bent)


@given(st.binary(max_size=60), st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_signed_nonsense_is_refused_or_harmless(attribute: bytes, subject: bytes) -> None:
    """The attacker signs whatever he likes: the structure has to be judged, not only the signature."""
    for data in (
        assemble(attributes=tlv(0xA0, attribute)),
        assemble(subject=tlv(0x30, subject)),
        assemble(attributes=extension_request(tlv(0x30, PURPOSES, tlv(0x04, attribute)))),
        assemble(attributes=extension_request(tlv(0x30, USAGE, tlv(0x04, b"\x03" + attribute)))),
        assemble(spki=tlv(0x30, bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107"), tlv(3, b"\0", subject))),
    ):
        try:
            checked = check_csr(data)
        except BadRequest:
            continue
        assert checked.spki_der == spki_der(KEY.public_key())


# --- the token that a check makes -------------------------------------------------------------------------------------


def test_a_checked_request_cannot_be_made_bent_or_copied_elsewhere() -> None:
    checked = check_csr(assemble())
    with pytest.raises(TypeError):
        CheckedRequest(checked.spki_der, checked.kind, checked.subject, witness=object())
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(checked, spki_der=b"another key")
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            duplicate(checked)
    with pytest.raises(dataclasses.FrozenInstanceError):
        checked.spki_der = b"another key"


def test_equal_keys_are_recognised_across_requests() -> None:
    first, second = check_csr(assemble()), check_csr(request(subject=EMPTY))
    assert first.spki_sha256 == second.spki_sha256
    assert first.spki_sha256 != check_csr(request(RSA_KEY)).spki_sha256
