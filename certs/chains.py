"""Certificates as others see them: fingerprints, PEM bundles, PKCS#7 for EST, and foreign certificates.

A certificate is identified by the SHA-256 of its DER. A chain is a tuple of DER, the leaf first, each next one the
issuer of the one before (the order in which TLS sends them, RFC 8446 §4.4.2).

A foreign certificate is one that a customer's own CA made. Gatehouse does not judge its chain, because it does not
know the CA; it only needs to read it safely, keep its fingerprint and dates, and refuse what could never work in TLS,
or was not made for a client: DTLS refuses these in the handshake, where nobody learns why (adapters/dtls/context.py).
Names in it are somebody else's text: they are escaped and cut before anybody sees them.

Pure. Bad input raises BadCertificate, whatever the bytes, and nothing else.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from hashlib import sha256
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7
from cryptography.utils import CryptographyDeprecationWarning

from certs.der import (
    BIT_STRING,
    CONTEXT_0,
    INTEGER,
    OBJECT_IDENTIFIER,
    OCTET_STRING,
    SEQUENCE,
    Element,
    MalformedDer,
    dotted,
    read_der,
)
from certs.names import name_text, read_name
from certs.pem import MalformedPem, read_blocks, write_block

MAXIMUM_CERTIFICATE_BYTES: Final = 16 * 1024
"""The largest device certificates in use, with RSA-4096 and policy texts, are below 4 KB."""
MAXIMUM_CHAIN_BYTES: Final = 128 * 1024
MAXIMUM_CHAIN_LENGTH: Final = 16
"""TLS stacks stop at about ten; a bundle of several generations of authorities may be a little longer."""
_MINIMUM_RSA_BITS = 2048  # OpenSSL's security level 2, the default, refuses shorter ones in the handshake
# Of Diffie-Hellman keys the library says a warning, which is an exception where warnings are errors: they are refused
# either way.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    CryptographyDeprecationWarning,
)


_KEY_USAGE: Final = "2.5.29.15"
_EXTENDED_KEY_USAGE: Final = "2.5.29.37"
_USAGES: Final = (_KEY_USAGE, _EXTENDED_KEY_USAGE)
_DIGITAL_SIGNATURE: Final = 0x80  # RFC 5280 §4.2.1.3: bit 0, counted from the left
_FOR_CLIENTS: Final = frozenset(("1.3.6.1.5.5.7.3.2", "2.5.29.37.0"))  # clientAuth, anyExtendedKeyUsage
_EXTENSIONS: Final = 0xA3  # RFC 5280 §4.1: extensions [3] EXPLICIT


class CertificateFault(Enum):
    """What a refused certificate failed on: a stable word for logs and counters."""

    TOO_LARGE = "too_large"
    NOT_A_CERTIFICATE = "not_a_certificate"
    PRIVATE_KEY = "private_key"
    MALFORMED = "malformed"
    KEY = "key"
    VALIDITY = "validity"
    USAGE = "usage"


class BadCertificate(ValueError):
    """A certificate or bundle is refused. `message` may be shown to the caller: it never quotes the input."""

    def __init__(self, reason: CertificateFault, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class ForeignCertificate:
    """What Gatehouse keeps of a certificate that somebody else's CA made. All texts are safe to print."""

    der: bytes
    fingerprint: str
    """Lower-case hex SHA-256 of the DER."""
    subject: str
    issuer: str
    serial_hex: str
    """Lower-case hex, two digits an octet."""
    not_before: datetime
    not_after: datetime
    public_key_kind: str
    """Such as `ec-secp256r1`, `ed25519`, `rsa-2048`."""


def fingerprint(der: bytes) -> str:
    """The lower-case hex SHA-256 of a certificate's DER: what the resolver looks up."""
    return sha256(der).hexdigest()


def serial_hex(serial: int) -> str:
    """A serial as it is written everywhere in Gatehouse: lower-case hex, two digits an octet, no separators."""
    text = f"{serial:x}"
    return text if len(text) % 2 == 0 else f"0{text}"


def bundle(certificates: Iterable[bytes]) -> bytes:
    """Certificates (DER) as one PEM text, in the order given."""
    return b"".join(write_block("CERTIFICATE", der) for der in certificates)


def unbundle(pem: bytes) -> tuple[bytes, ...]:
    """The certificates (DER) of a PEM text, in its order; at least one. Raises BadCertificate."""
    if len(pem) > MAXIMUM_CHAIN_BYTES:
        raise BadCertificate(
            CertificateFault.TOO_LARGE, f"a bundle of {len(pem)} bytes; at most {MAXIMUM_CHAIN_BYTES} are read"
        )
    try:
        blocks = read_blocks(pem)
    except MalformedPem as error:
        raise BadCertificate(CertificateFault.NOT_A_CERTIFICATE, f"not a certificate in PEM: {error}") from None
    if any(block.is_private_key for block in blocks):
        raise BadCertificate(
            CertificateFault.PRIVATE_KEY,
            "the text contains a private key: treat that key as exposed, and send the certificate only",
        )
    if not blocks or any(block.label != "CERTIFICATE" for block in blocks):
        raise BadCertificate(
            CertificateFault.NOT_A_CERTIFICATE,
            "no certificate, or something else beside it; only CERTIFICATE blocks are allowed",
        )
    if len(blocks) > MAXIMUM_CHAIN_LENGTH:
        raise BadCertificate(
            CertificateFault.TOO_LARGE, f"{len(blocks)} certificates; at most {MAXIMUM_CHAIN_LENGTH} are allowed"
        )
    for block in blocks:
        _load(block.der)
    return tuple(block.der for block in blocks)


def order_chain(leaf: bytes, others: Sequence[bytes]) -> tuple[bytes, ...]:
    """The leaf and those of the others that lead from it towards a root, in TLS's order; the rest is left out.

    Raises BadCertificate for bytes that are not certificates. Signatures decide, not names.
    """
    if len(others) > MAXIMUM_CHAIN_LENGTH:
        raise BadCertificate(
            CertificateFault.TOO_LARGE, f"{len(others)} certificates; at most {MAXIMUM_CHAIN_LENGTH} are allowed"
        )
    pool = [_load(der) for der in others if der != leaf]
    chain = [_load(leaf)]
    while (issuer := _issuer_among(pool, chain[-1])) is not None:
        chain.append(issuer)
        pool = [certificate for certificate in pool if certificate != issuer]
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in chain)


def pkcs7_der(certificates: Sequence[bytes]) -> bytes:
    """A certs-only CMS SignedData (RFC 5652 §5, RFC 7030 §4.1.3) of certificates (DER); for EST over CoAP as it is."""
    return pkcs7.serialize_certificates([_load(der) for der in certificates], Encoding.DER)


def pkcs7_base64(certificates: Sequence[bytes]) -> bytes:
    """The same in base64, as EST carries it over HTTPS (RFC 7030 §4.1.3).

    Line breaks are free (RFC 8951 §3.2). These are lines of 76 characters that end with LF: OpenSSL's reader wants
    lines, and `base64 -d` takes no CR.
    """
    return base64.encodebytes(pkcs7_der(certificates))


def read_foreign_certificate(pem: bytes) -> ForeignCertificate:
    """Reads the one certificate of a PEM text, made by any CA or self-signed. Raises BadCertificate.

    Its chain and its dates are not judged: whether it is valid *now* is for each connection to decide. Its usages are.
    """
    if len(pem) > MAXIMUM_CERTIFICATE_BYTES:
        raise BadCertificate(
            CertificateFault.TOO_LARGE,
            f"a certificate of {len(pem)} bytes; at most {MAXIMUM_CERTIFICATE_BYTES} are read",
        )
    certificates = unbundle(pem)
    if len(certificates) != 1:
        raise BadCertificate(
            CertificateFault.NOT_A_CERTIFICATE,
            f"{len(certificates)} certificates; exactly one is allowed, the device's own without its chain",
        )
    described = describe_certificate(certificates[0])
    _check_usages(certificates[0])
    return described


def describe_certificate(der: bytes) -> ForeignCertificate:
    """The same for DER, such as a TLS peer's. Raises BadCertificate."""
    if len(der) > MAXIMUM_CERTIFICATE_BYTES:
        raise BadCertificate(
            CertificateFault.TOO_LARGE,
            f"a certificate of {len(der)} bytes; at most {MAXIMUM_CERTIFICATE_BYTES} are read",
        )
    outline = _outline(der)
    try:
        certificate = x509.load_der_x509_certificate(der)
        not_before, not_after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        key = certificate.public_key()
    except _UNREADABLE:
        raise BadCertificate(
            CertificateFault.MALFORMED, "a date or the public key of the certificate cannot be read"
        ) from None
    if not_after < not_before:
        raise BadCertificate(CertificateFault.VALIDITY, "the certificate ends before it begins")
    return ForeignCertificate(
        der=der,
        fingerprint=fingerprint(der),
        subject=outline.subject,
        issuer=outline.issuer,
        serial_hex=serial_hex(outline.serial),
        not_before=not_before,
        not_after=not_after,
        public_key_kind=_describe_key(key),
    )


def _check_usages(encoded: bytes) -> None:
    """Refuse a certificate that says that it is not for a TLS client that signs. One that says nothing is for anything
    (RFC 5280 §4.2.1.3, §4.2.1.12)."""
    try:
        usages = dict(_usages(read_der(encoded)))
        key_usage, purposes = usages.get(_KEY_USAGE), usages.get(_EXTENDED_KEY_USAGE)
        if key_usage is not None and (key_usage.tag != BIT_STRING or not any(key_usage.contents[1:])):
            raise MalformedDer("keyUsage is not a bit string with at least one bit set")
        if purposes is not None and (
            purposes.tag != SEQUENCE
            or not purposes.parts
            or any(part.tag != OBJECT_IDENTIFIER for part in purposes.parts)
        ):
            raise MalformedDer("extendedKeyUsage is not a sequence of purposes")
    except MalformedDer as error:
        raise BadCertificate(
            CertificateFault.MALFORMED, f"the usages of the certificate cannot be read: {error}"
        ) from None
    if purposes is not None and _FOR_CLIENTS.isdisjoint(dotted(part) for part in purposes.parts):
        raise BadCertificate(
            CertificateFault.USAGE,
            "the certificate is not for clients: its extended key usage has neither clientAuth nor "
            "anyExtendedKeyUsage; have it issued with clientAuth, or without that extension",
        )
    if key_usage is not None and not key_usage.contents[1] & _DIGITAL_SIGNATURE:
        raise BadCertificate(
            CertificateFault.USAGE,
            "the certificate is not for signing: its key usage is without digitalSignature, with which a TLS client "
            "proves its key; have it issued with digitalSignature, or without that extension",
        )


def _usages(certificate: Element) -> Iterator[tuple[str, Element]]:
    """Both usages, where they are; neither may be repeated (RFC 5280 §4.2). Raises MalformedDer."""
    wrapped = next((part for part in certificate.parts[0].parts if part.tag == _EXTENSIONS), None)
    if wrapped is None:
        return
    seen: set[str] = set()
    for extension in wrapped.parts[0].parts if wrapped.parts else ():
        parts = extension.parts
        if len(parts) not in (2, 3) or parts[0].tag != OBJECT_IDENTIFIER or parts[-1].tag != OCTET_STRING:
            raise MalformedDer("an extension does not have the structure of RFC 5280")
        name = dotted(parts[0])
        if name not in _USAGES:
            continue
        if name in seen:
            raise MalformedDer("an extension is repeated")
        seen.add(name)
        yield name, read_der(parts[-1].contents)


def _load(der: bytes) -> x509.Certificate:
    _outline(der)
    try:
        return x509.load_der_x509_certificate(der)
    except _UNREADABLE:
        raise BadCertificate(CertificateFault.MALFORMED, "not a certificate of X.509 in DER") from None


@dataclass(frozen=True, slots=True)
class _Outline:
    serial: int
    issuer: str
    subject: str


def _outline(encoded: bytes) -> _Outline:
    """Serial and names, read by our own strict reader before the library sees the certificate.

    The library warns of serials that are not positive (RFC 5280 §4.1.2.2 forbids them, and so do we) and of names of
    unusual length (which are harmless); a warning is neither an answer nor a place for somebody else's text.
    """
    try:
        whole = read_der(encoded)
        body = whole.parts[0] if whole.tag == SEQUENCE and whole.parts else whole
        # RFC 5280 §4.1: an optional version [0], then serial, algorithm, issuer, validity, subject, key, …
        fields = body.parts[1:] if body.parts and body.parts[0].tag == CONTEXT_0 else body.parts
        if len(fields) < 6 or fields[0].tag != INTEGER:
            raise MalformedDer("the fields of a certificate are missing")
        issuer, subject = read_name(fields[2]), read_name(fields[4])
    except MalformedDer as error:
        raise BadCertificate(CertificateFault.MALFORMED, f"not a certificate of X.509 in DER: {error}") from None
    serial = int.from_bytes(fields[0].contents, "big", signed=True)
    if serial <= 0:
        raise BadCertificate(
            CertificateFault.MALFORMED, "the serial number of the certificate is not positive, as RFC 5280 demands"
        )
    return _Outline(serial, name_text(issuer), name_text(subject))


def _issuer_among(pool: Iterable[x509.Certificate], certificate: x509.Certificate) -> x509.Certificate | None:
    for candidate in pool:
        try:
            certificate.verify_directly_issued_by(candidate)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            continue
        return candidate
    return None


def _describe_key(key: PublicKeyTypes) -> str:
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MINIMUM_RSA_BITS:
        return f"rsa-{key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
        return f"ec-{key.curve.name}"
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ed25519"
    if isinstance(key, ed448.Ed448PublicKey):
        return "ed448"
    raise BadCertificate(
        CertificateFault.KEY,
        f"the key of the certificate is of no use in TLS; allowed are RSA from {_MINIMUM_RSA_BITS} bits, P-256, P-384, "
        "P-521, Ed25519 and Ed448",
    )
