"""Certification requests (CSR, RFC 2986): the only way for a device's public key to reach the signer.

    bytes ── size cap ── PEM or DER ── strict DER ── structure ── names ── extensions ── key ── possession ── Checked
      └────────────────────────── any failure: BadRequest(reason, message), nothing else ──────────────────────┘

From a request only the public key is taken. The subject, names, usages and validity of a certificate come from the
registry. What a request *asks for* still matters, because a device that asks for something will believe it got it:
a request is refused, not quietly corrected, when it asks for what it cannot have. The rules:

  key         P-256 or P-384 as named curves with an uncompressed point, Ed25519, RSA of 2048 to 8192 bits with an odd
              exponent from 65537; in its one canonical encoding; not weak, not one of the policy's forbidden keys
  signature   by that key (proof of possession), SHA-256, SHA-384 or SHA-512 with PKCS#1 v1.5 for RSA, or Ed25519
  subject     may be empty, or hold clean printable text (no controls, invisible or empty values, at most one CN), which
              is ignored. A device cannot know its device_id before it enrols, so plain `openssl req -new -subj /CN=…`
              has to work. A policy can name the common names that are acceptable, or the exact subject (renewal)
  extensions  basicConstraints CA:FALSE, end-entity key usages, clientAuth and a subject key identifier are what the
              device gets anyhow: accepted, ignored. Names (SAN) only where the policy lists them. CA:TRUE, certificate
              signing, serverAuth and every other purpose or extension: refused
  attributes  an extension request at most once; others (a challenge password, a description) are ignored

Two parsers must agree: the strict reader here decides, and `cryptography` opens the key and verifies the signature.
What is not looked at is only what is not used.

State: none. A CheckedRequest cannot be made, copied with changes, or unpickled anywhere but here.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import Final, NoReturn

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from certs import der
from certs.der import Element, MalformedDer, dotted, read_der
from certs.keys import BadKey, KeyKind, kind_of, load_subject_public_key, spki_der, spki_sha256
from certs.names import COMMON_NAME, DistinguishedName, read_name
from certs.pem import MalformedPem, read_blocks
from certs.weak_keys import ed25519_weakness, rsa_weakness

MAXIMUM_REQUEST_BYTES: Final = 16 * 1024
"""An RSA-8192 request with every ordinary extension is below 6 KB in PEM; the rest is room for explanatory text."""

RSA_BITS: Final = range(2048, 8192 + 1)
_RSA_EXPONENTS: Final = range(65537, 2**32, 2)
"""Small exponents have a history of forgeries; huge ones only cost the verifier time."""
_MAXIMUM_NAME_PARTS = 16
_MAXIMUM_NAME_CHARACTERS = 128
"""A hardware_id has at most 128 characters (CONTRACT §2), and devices put it into the common name."""
_MAXIMUM_ATTRIBUTES = 16
_MAXIMUM_EXTENSIONS = 16


class RequestFault(Enum):
    """What a refused request failed on: a stable word for logs and counters."""

    TOO_LARGE = "too_large"
    NOT_A_REQUEST = "not_a_request"
    PRIVATE_KEY = "private_key"
    MALFORMED = "malformed"
    KEY = "key"
    WEAK_KEY = "weak_key"
    FORBIDDEN_KEY = "forbidden_key"
    SIGNATURE_ALGORITHM = "signature_algorithm"
    SIGNATURE = "signature"
    SUBJECT = "subject"
    EXTENSION = "extension"


class BadRequest(ValueError):
    """A certification request is refused. `message` says what was wrong and what is allowed, and may be shown to the
    caller: it never quotes the request. `reason` is for logs and counters."""

    def __init__(self, reason: RequestFault, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class RequestPolicy:
    """What a request may contain, beyond what the module's rules fix. The default suits a first enrolment."""

    acceptable_common_names: frozenset[str] | None = None
    """The common names that a request may carry (it may always carry none). None: any clean text, ignored."""
    acceptable_uris: frozenset[str] = frozenset()
    """URIs that a requested SAN may contain. Empty: no SAN at all."""
    required_subject: DistinguishedName | None = None
    """The exact subject, for a renewal (RFC 7030 §4.2.2). Wins over `acceptable_common_names`."""
    forbidden_spki: frozenset[bytes] = frozenset()
    """SubjectPublicKeyInfo (DER) that nobody may have certified: the keys of the authorities and of the server."""
    maximum_bytes: int = MAXIMUM_REQUEST_BYTES


SUGGESTED_ATTRIBUTES: Final = bytes.fromhex("302106082a8648ce3d040302301506072a8648ce3d0201310a06082a8648ce3d030107")
"""RFC 7030 §4.5.2: CsrAttrs (DER) with the OID ecdsa-with-SHA256 and the attribute id-ecPublicKey = { secp256r1 }: what
the authority itself uses, and what the smallest devices can do. A suggestion; other keys are accepted."""

_WITNESS: Final = object()


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A public key whose owner proved possession, from a request that passed `check_csr`. Only that function makes one.

    The subject is what the device wrote, clean but unproven: it may help an operator, and decides nothing.
    """

    spki_der: bytes
    kind: KeyKind
    subject: DistinguishedName
    witness: InitVar[object] = field(kw_only=True)

    def __post_init__(self, witness: object) -> None:
        if witness is not _WITNESS:
            raise TypeError("a CheckedRequest is made by check_csr only")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CheckedRequest is not pickled: check the request again")

    @property
    def spki_sha256(self) -> str:
        """Lower-case hex; the same token with the same value here is the same request again."""
        return spki_sha256(self.spki_der)

    @property
    def common_name(self) -> str | None:
        """What the device wrote as its common name, if anything."""
        names = [text for relative in self.subject for kind, text in relative if kind == COMMON_NAME]
        return names[0] if names else None


def check_csr(data: bytes, policy: RequestPolicy | None = None) -> CheckedRequest:
    """Checks a certification request, PEM (one block) or DER, against the module's rules and a policy.

    Raises BadRequest for every request that is not acceptable, whatever the bytes; no other exception.
    """
    policy = policy or RequestPolicy()
    if len(data) > policy.maximum_bytes:
        raise BadRequest(
            RequestFault.TOO_LARGE, f"the request has {len(data)} bytes; at most {policy.maximum_bytes} are read"
        )
    encoded = _unwrap(data)
    try:
        request = _Structure.read(encoded)
        key_kind = _check_key_algorithm(request.key)
        _check_signature_algorithm(request.signature_algorithm, key_kind)
        subject = read_name(request.subject)
        _require_plain_strings(request.subject)
        _check_subject(subject, policy)
        _check_attributes(request.attributes, policy)
    except MalformedDer as error:
        raise BadRequest(RequestFault.MALFORMED, f"the request is not DER: {error}") from None
    if request.key.encoding in policy.forbidden_spki:
        raise BadRequest(
            RequestFault.FORBIDDEN_KEY, "the request is for a key of this server; a device makes a key of its own"
        )
    _check_key(request.key.encoding, key_kind)  # before the signature: an odd key may be dear to verify with
    _check_possession(encoded)
    return CheckedRequest(request.key.encoding, key_kind, subject, witness=_WITNESS)


def renewal_policy(certificate_der: bytes, policy: RequestPolicy) -> RequestPolicy:
    """The policy for renewing or rekeying this certificate of ours: the same subject, and its own URIs if any SAN.

    RFC 7030 §4.2.2 wants subject and SAN identical to those of the certificate. A request without a SAN is accepted,
    since many clients copy the subject only and the new certificate gets its SAN from the registry anyhow. Ask
    `AuthoritySet.issuer_of` first whether the certificate is ours; raises ValueError for one that cannot be read.
    """
    certificate = x509.load_der_x509_certificate(certificate_der)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = frozenset(names.get_values_for_type(x509.UniformResourceIdentifier))
    except x509.ExtensionNotFound:
        uris = frozenset()
    return RequestPolicy(
        acceptable_uris=uris,
        required_subject=read_name(read_der(certificate.subject.public_bytes())),
        forbidden_spki=policy.forbidden_spki,
        maximum_bytes=policy.maximum_bytes,
    )


_EXTENSION_REQUEST: Final = "1.2.840.113549.1.9.14"  # RFC 2985 §5.4.2
_BASIC_CONSTRAINTS: Final = "2.5.29.19"
_KEY_USAGE: Final = "2.5.29.15"
_EXTENDED_KEY_USAGE: Final = "2.5.29.37"
_SUBJECT_ALTERNATIVE_NAME: Final = "2.5.29.17"
_SUBJECT_KEY_IDENTIFIER: Final = "2.5.29.14"
_CLIENT_AUTH: Final = "1.3.6.1.5.5.7.3.2"
_URI_TAG: Final = 0x86  # RFC 5280 §4.2.1.6: uniformResourceIdentifier [6] IA5String
_CERTIFICATE_SIGNING_BITS: Final = 0b0000_0110  # RFC 5280 §4.2.1.3: keyCertSign (5), cRLSign (6), counted from the left

# Whole AlgorithmIdentifiers, compared octet by octet: nothing unusual can hide in parameters.
_KEY_ALGORITHMS: Final = {
    bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107"): KeyKind.P256,  # RFC 5480 §2.1.1.1
    bytes.fromhex("301006072a8648ce3d020106052b81040022"): KeyKind.P384,
    bytes.fromhex("300506032b6570"): KeyKind.ED25519,  # RFC 8410 §3
    bytes.fromhex("300d06092a864886f70d0101010500"): KeyKind.RSA,  # RFC 3279 §2.3.1
}
_ECDSA_SIGNATURES: Final = frozenset(
    bytes.fromhex(f"300a06082a8648ce3d0403{number:02x}")
    for number in (2, 3, 4)  # RFC 5758 §3.2: SHA-256, 384, 512
)
_RSA_SIGNATURES: Final = frozenset(
    bytes.fromhex(form.format(number))
    for number in ("0b", "0c", "0d")
    for form in ("300d06092a864886f70d0101{}0500", "300b06092a864886f70d0101{}")  # RFC 4055 §5: NULL or absent
)
_SIGNATURE_ALGORITHMS: Final = {
    KeyKind.P256: _ECDSA_SIGNATURES,
    KeyKind.P384: _ECDSA_SIGNATURES,
    KeyKind.ED25519: frozenset({bytes.fromhex("300506032b6570")}),
    KeyKind.RSA: _RSA_SIGNATURES,
}


def _unwrap(data: bytes) -> bytes:
    if data[:1] == b"\x30" and b"-----BEGIN" not in data[:64]:
        return data
    try:
        blocks = read_blocks(data)
    except MalformedPem as error:
        raise BadRequest(RequestFault.NOT_A_REQUEST, f"not a certification request: {error}") from None
    if any(block.is_private_key for block in blocks):
        raise BadRequest(
            RequestFault.PRIVATE_KEY,
            "the request contains a private key, which never leaves its device: make a new key and send only the CSR",
        )
    if len(blocks) != 1:
        raise BadRequest(
            RequestFault.NOT_A_REQUEST, f"{len(blocks)} PEM blocks; exactly one CERTIFICATE REQUEST is allowed"
        )
    # RFC 7468 §7: the second label is an old one that some tools still write.
    if blocks[0].label not in ("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"):
        raise BadRequest(
            RequestFault.NOT_A_REQUEST, "the PEM block has another label; CERTIFICATE REQUEST is what is allowed"
        )
    return blocks[0].der


@dataclass(frozen=True, slots=True)
class _Structure:
    """The fields of a CertificationRequest (RFC 2986 §4)."""

    subject: Element
    key: Element
    attributes: Element
    signature_algorithm: Element

    @classmethod
    def read(cls, encoded: bytes) -> _Structure:
        whole = _expect(read_der(encoded), (der.SEQUENCE, der.SEQUENCE, der.BIT_STRING), "the request")
        info = _expect(whole[0], (der.INTEGER, der.SEQUENCE, der.SEQUENCE, der.CONTEXT_0), "the request's information")
        if info[0].contents != b"\x00":
            raise MalformedDer("the version is not 0, the only one there is")
        _expect(info[2], (der.SEQUENCE, der.BIT_STRING), "the public key")
        return cls(info[1], info[2], info[3], whole[1])


def _expect(element: Element, tags: tuple[int, ...], what: str) -> tuple[Element, ...]:
    if element.tag != der.SEQUENCE or tuple(part.tag for part in element.parts) != tags:
        raise MalformedDer(f"{what} does not have the structure of RFC 2986")
    return element.parts


def _check_key_algorithm(key: Element) -> KeyKind:
    kind = _KEY_ALGORITHMS.get(key.parts[0].encoding)
    if kind is None:
        raise BadRequest(
            RequestFault.KEY,
            "the key is of a kind, curve or parameter form that is not allowed; allowed are P-256 and P-384 as named "
            "curves, Ed25519, and RSA",
        )
    return kind


def _check_signature_algorithm(algorithm: Element, kind: KeyKind) -> None:
    if algorithm.encoding not in _SIGNATURE_ALGORITHMS[kind]:
        raise BadRequest(
            RequestFault.SIGNATURE_ALGORITHM,
            f"the request is signed with an algorithm that is not allowed for a key of kind {kind.value}; allowed are "
            "SHA-256, SHA-384 and SHA-512 with ECDSA or RSA PKCS#1 v1.5, and Ed25519",
        )


def _require_plain_strings(name: Element) -> None:
    values = (part.parts[-1] for relative in name.parts for part in relative.parts if part.parts)
    if any(value.tag not in (der.UTF8_STRING, der.PRINTABLE_STRING, der.IA5_STRING) for value in values):
        raise BadRequest(
            RequestFault.SUBJECT,
            "the subject contains a string of an unusual type; UTF8String, PrintableString and IA5String are allowed",
        )


def _check_subject(subject: DistinguishedName, policy: RequestPolicy) -> None:
    parts = [part for relative in subject for part in relative]
    if len(parts) > _MAXIMUM_NAME_PARTS:
        raise BadRequest(
            RequestFault.SUBJECT, f"the subject has {len(parts)} attributes; at most {_MAXIMUM_NAME_PARTS} are allowed"
        )
    for _, text in parts:
        if not text.strip() or not text.isprintable() or len(text) > _MAXIMUM_NAME_CHARACTERS:
            raise BadRequest(
                RequestFault.SUBJECT,
                "the subject contains an empty, overlong or unprintable value; allowed is printable text of 1 to "
                f"{_MAXIMUM_NAME_CHARACTERS} characters, or no subject at all",
            )
    names = [text for kind, text in parts if kind == COMMON_NAME]
    if len(names) > 1:
        raise BadRequest(RequestFault.SUBJECT, f"the subject has {len(names)} common names; at most one is allowed")
    if policy.required_subject is not None:
        if subject != policy.required_subject:
            raise BadRequest(
                RequestFault.SUBJECT, "the subject is not that of the certificate being renewed; it has to be the same"
            )
        return
    acceptable = policy.acceptable_common_names
    if acceptable is not None and names and names[0] not in acceptable:
        raise BadRequest(
            RequestFault.SUBJECT,
            "the common name is not one of this device; allowed is one of its own names, or no subject at all",
        )


def _check_attributes(attributes: Element, policy: RequestPolicy) -> None:
    if len(attributes.parts) > _MAXIMUM_ATTRIBUTES:
        raise BadRequest(
            RequestFault.MALFORMED,
            f"the request has {len(attributes.parts)} attributes; at most {_MAXIMUM_ATTRIBUTES} are allowed",
        )
    der.require_set_order(attributes.parts)
    seen: set[str] = set()
    for attribute in attributes.parts:
        kind, values = _expect(attribute, (der.OBJECT_IDENTIFIER, der.SET), "an attribute")
        name = dotted(kind)
        if name in seen:
            raise MalformedDer("an attribute is repeated")
        seen.add(name)
        if not values.parts:
            raise MalformedDer("an attribute has no value")
        if name == _EXTENSION_REQUEST:
            if len(values.parts) != 1:
                raise MalformedDer("the extension request has more than one value")
            _check_extensions(values.parts[0], policy)


def _check_extensions(extensions: Element, policy: RequestPolicy) -> None:
    # RFC 5280 §4.1: Extensions ::= SEQUENCE SIZE (1..MAX) OF Extension
    if extensions.tag != der.SEQUENCE or not extensions.parts:
        raise MalformedDer("the extension request is empty; leave it out where nothing is requested")
    if len(extensions.parts) > _MAXIMUM_EXTENSIONS:
        raise BadRequest(
            RequestFault.EXTENSION,
            f"the request asks for {len(extensions.parts)} extensions; at most {_MAXIMUM_EXTENSIONS} are allowed",
        )
    seen: set[str] = set()
    for extension in extensions.parts:
        name, value = _read_extension(extension)
        if name in seen:
            raise MalformedDer("an extension is repeated")
        seen.add(name)
        _check_extension(name, value, policy)


def _read_extension(extension: Element) -> tuple[str, Element]:
    parts = extension.parts
    tags = tuple(part.tag for part in parts)
    plain = (der.OBJECT_IDENTIFIER, der.OCTET_STRING)
    flagged = (der.OBJECT_IDENTIFIER, der.BOOLEAN, der.OCTET_STRING)
    if extension.tag != der.SEQUENCE or tags not in (plain, flagged):
        raise MalformedDer("an extension does not have the structure of RFC 5280")
    if tags == flagged and parts[1].contents != b"\xff":
        raise MalformedDer("an extension spells out a default, which DER leaves out")  # X.690 §11.5
    if not parts[-1].contents:
        raise MalformedDer("an extension is empty")
    return dotted(parts[0]), read_der(parts[-1].contents)


def _check_extension(name: str, value: Element, policy: RequestPolicy) -> None:
    if name == _BASIC_CONSTRAINTS:
        _check_basic_constraints(value)
    elif name == _KEY_USAGE:
        _check_key_usage(value)
    elif name == _EXTENDED_KEY_USAGE:
        _check_extended_key_usage(value)
    elif name == _SUBJECT_ALTERNATIVE_NAME:
        _check_alternative_names(value, policy)
    elif name == _SUBJECT_KEY_IDENTIFIER:
        if value.tag != der.OCTET_STRING or not value.contents:
            raise MalformedDer("the subject key identifier is not an octet string")
    else:
        raise BadRequest(
            RequestFault.EXTENSION,
            f"the request asks for the extension {name}; allowed are basicConstraints CA:FALSE, keyUsage, "
            "extendedKeyUsage clientAuth and subjectKeyIdentifier",
        )


def _check_basic_constraints(value: Element) -> None:
    if value.tag != der.SEQUENCE:
        raise MalformedDer("basicConstraints is not a sequence")
    if not value.parts:
        return  # CA:FALSE is the default, and DER leaves defaults out
    if value.parts[0].tag == der.BOOLEAN and value.parts[0].contents == b"\x00":
        raise MalformedDer("basicConstraints spells out a default, which DER leaves out")
    raise BadRequest(
        RequestFault.EXTENSION, "the request asks for the certificate of an authority; a device gets CA:FALSE"
    )


def _check_key_usage(value: Element) -> None:
    if value.tag != der.BIT_STRING or not any(value.contents[1:]):
        raise MalformedDer("keyUsage is not a bit string with at least one bit set")  # RFC 5280 §4.2.1.3
    if value.contents[1] & _CERTIFICATE_SIGNING_BITS:
        raise BadRequest(
            RequestFault.EXTENSION, "the request asks to sign certificates or revocation lists; a device may not"
        )


def _check_extended_key_usage(value: Element) -> None:
    if value.tag != der.SEQUENCE or not value.parts:
        raise MalformedDer("extendedKeyUsage is not a sequence of purposes")
    if any(part.tag != der.OBJECT_IDENTIFIER for part in value.parts):
        raise MalformedDer("extendedKeyUsage contains something else than purposes")
    others = [dotted(part) for part in value.parts if dotted(part) != _CLIENT_AUTH]
    if others:
        raise BadRequest(
            RequestFault.EXTENSION,
            f"the request asks for the purpose {others[0]}; a device gets clientAuth ({_CLIENT_AUTH}) and no other",
        )


def _check_alternative_names(value: Element, policy: RequestPolicy) -> None:
    if value.tag != der.SEQUENCE or not value.parts:
        raise MalformedDer("subjectAltName is not a sequence of names")
    acceptable = {uri.encode("utf-8") for uri in policy.acceptable_uris}
    if any(part.tag != _URI_TAG or part.contents not in acceptable for part in value.parts):
        raise BadRequest(
            RequestFault.EXTENSION,
            "the request asks for alternative names; leave them out, the certificate gets its name from the registry",
        )


def _check_key(encoding: bytes, kind: KeyKind) -> None:
    try:
        key = load_subject_public_key(encoding)
    except BadKey:
        raise BadRequest(RequestFault.KEY, "the public key is not a valid key of its kind") from None
    if kind_of(key) is not kind:
        raise BadRequest(RequestFault.KEY, "the key is not of the kind that its algorithm names")
    if spki_der(key) != encoding:
        raise BadRequest(
            RequestFault.KEY, "the key is not in its canonical encoding; points of a curve have to be uncompressed"
        )
    if isinstance(key, ed25519.Ed25519PublicKey):
        _refuse_weakness(ed25519_weakness(key.public_bytes_raw()))
    if isinstance(key, rsa.RSAPublicKey):
        _check_rsa(key.public_numbers())


def _check_possession(encoded: bytes) -> None:
    try:
        proved = x509.load_der_x509_csr(encoded).is_signature_valid
    except (ValueError, TypeError, OverflowError, UnsupportedAlgorithm):
        raise BadRequest(RequestFault.SIGNATURE, "the signature cannot be read") from None
    if not proved:
        raise BadRequest(
            RequestFault.SIGNATURE,
            "the signature does not match: a request has to be signed by the private key of its public key",
        )


def _check_rsa(numbers: rsa.RSAPublicNumbers) -> None:
    bits = numbers.n.bit_length()
    if bits not in RSA_BITS:
        raise BadRequest(
            RequestFault.WEAK_KEY, f"an RSA key of {bits} bits; {RSA_BITS[0]} to {RSA_BITS[-1]} are allowed"
        )
    if numbers.e not in _RSA_EXPONENTS:
        raise BadRequest(
            RequestFault.WEAK_KEY, "the RSA exponent is not allowed; use 65537, or an odd number from there to 2^32"
        )
    _refuse_weakness(rsa_weakness(numbers.n))


def _refuse_weakness(weakness: str | None) -> None:
    if weakness is not None:
        raise BadRequest(RequestFault.WEAK_KEY, f"the key is weak: {weakness}; make a new one with another tool")
