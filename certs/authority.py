"""Authorities: a root that signs issuing CAs, and issuing CAs that sign leaves and revocation lists.

    root CA (20 years, pathlen 1, offline in spirit: its key is opened only to make an issuing CA)
      ├─ issuing CA, active (5 years, pathlen 0)        signs everything new
      └─ issuing CAs of before                          sign their own revocation lists until the last leaf has expired

Roll-over is adding an issuing CA and making it the active one. Certificates of the old one stay valid: they chain to
the same root, and the old CA stays in the set. Each issuing CA has a name of its own (a few random hex digits), because
OpenSSL looks issuers and revocation lists up by name.

`AuthorityMaterial` is what is stored (the certificate, and the private key to be sealed); `Authority` is the opened
form that can sign. Opening checks that the key belongs to the certificate and that the certificate may sign what the
role needs: a swapped row is found here, at start, and not by a device in the field.

Profiles: RFC 5280 §4.1 and §4.2, certificates of version 3, ECDSA P-256 with SHA-256.
Time and randomness are arguments. What can be lost: nothing; nothing here is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from certs.chains import fingerprint
from certs.keys import (
    PrivateKeyPem,
    RandomBytes,
    SigningKey,
    SubjectPublicKey,
    deterministic_ecdsa,
    generate_p256,
    load_private_key,
    signature_hash,
    spki_der,
)

ROOT_LIFETIME: Final = timedelta(days=20 * 365)
"""A root sits in the firmware of devices, which live 15 years in the field."""
ISSUING_LIFETIME: Final = timedelta(days=5 * 365)
"""Several times the life of a leaf; a roll-over every few years keeps the procedure known."""
BACKDATE: Final = timedelta(days=1)
"""Clocks without battery run behind; a certificate that begins "now" would be refused by them."""
LATEST_DATE: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280 §4.1.2.5

_SERIAL_BYTES = 16
_MAXIMUM_NAME = 64 - len(" Issuing CA 00000000")
"""X.520's upper bound for a common name is 64; the rest is the suffix that tells authorities apart."""


class AuthorityRole(Enum):
    """What an authority signs."""

    ROOT = "root"
    ISSUING = "issuing"


class BadAuthority(ValueError):
    """Stored authority material that does not fit together, or cannot do what is asked of it."""


@dataclass(frozen=True, slots=True)
class AuthorityMaterial:
    """An authority as it is stored. The caller seals the private key; the certificate (DER) is public."""

    role: AuthorityRole
    certificate_der: bytes
    private_key: PrivateKeyPem


class Authority:
    """An opened authority. Holds the signing key and hands it to nobody but this package."""

    __slots__ = ("_key", "certificate", "certificate_der", "role", "spki_der")

    def __init__(self, material: AuthorityMaterial) -> None:
        """Opens stored material. Raises BadAuthority where it does not fit together, BadKey for an unreadable key."""
        key = load_private_key(material.private_key)
        try:
            certificate = x509.load_der_x509_certificate(material.certificate_der)
            own = spki_der(certificate.public_key())
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        except (ValueError, x509.ExtensionNotFound):
            raise BadAuthority("the certificate is not that of an authority") from None
        if own != spki_der(key.public_key()):
            raise BadAuthority("the private key does not belong to the certificate")
        if not (constraints.ca and usage.key_cert_sign and usage.crl_sign):
            raise BadAuthority("the certificate may not sign certificates and revocation lists")
        if (certificate.issuer == certificate.subject) != (material.role is AuthorityRole.ROOT):
            raise BadAuthority(f"the certificate is not that of an authority of role {material.role.value}")
        self.role: Final = material.role
        self.certificate: Final = certificate
        self.certificate_der: Final = material.certificate_der
        self.spki_der: Final = own
        self._key: Final[SigningKey] = key

    def __repr__(self) -> str:
        return f"Authority({self.role.value}, {self.certificate.subject.rfc4514_string()!r})"

    @property
    def fingerprint(self) -> str:
        """Lower-case hex SHA-256 of the certificate."""
        return fingerprint(self.certificate_der)

    @property
    def not_before(self) -> datetime:
        """The first instant of its validity, UTC."""
        return self.certificate.not_valid_before_utc

    @property
    def not_after(self) -> datetime:
        """The last instant of its validity, UTC; nothing that it signs outlives it."""
        return self.certificate.not_valid_after_utc

    @property
    def key_identifier(self) -> x509.AuthorityKeyIdentifier:
        """The AKI for everything that this authority signs (RFC 5280 §4.2.1.1)."""
        own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own.value)

    def _sign_certificate(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        """Private to this package: `certs.issuing` and this module call it, after their checks."""
        return builder.sign(self._key, signature_hash(self._key), ecdsa_deterministic=deterministic_ecdsa(self._key))

    def _sign_revocation_list(self, builder: x509.CertificateRevocationListBuilder) -> x509.CertificateRevocationList:
        """Private to this package: `certs.crl` calls it."""
        return builder.sign(self._key, signature_hash(self._key), ecdsa_deterministic=deterministic_ecdsa(self._key))


@dataclass(frozen=True, slots=True)
class AuthoritySet:
    """The root and all issuing CAs that still matter, one of them active."""

    root: Authority
    active: Authority
    former: tuple[Authority, ...] = ()

    def __post_init__(self) -> None:
        if self.root.role is not AuthorityRole.ROOT:
            raise BadAuthority("the root of the set is not a root")
        for authority in self.issuing:
            if authority.role is not AuthorityRole.ISSUING:
                raise BadAuthority("an issuing CA of the set is not one")
            try:
                authority.certificate.verify_directly_issued_by(self.root.certificate)
            except (ValueError, TypeError, InvalidSignature):
                raise BadAuthority("an issuing CA of the set is not signed by its root") from None

    @property
    def issuing(self) -> tuple[Authority, ...]:
        """All issuing CAs, the active one first."""
        return (self.active, *self.former)

    @property
    def chain(self) -> tuple[bytes, ...]:
        """Every authority certificate (DER), the active one first, the root last: what a client may have to know."""
        return (*(authority.certificate_der for authority in self.issuing), self.root.certificate_der)

    @property
    def forbidden_spki(self) -> frozenset[bytes]:
        """The public keys (DER) of all authorities, which nobody may have certified as a device."""
        return frozenset(authority.spki_der for authority in (self.root, *self.issuing))

    def roll_over(self, successor: Authority) -> AuthoritySet:
        """The set with a new active issuing CA; the one before stays, for its leaves and its revocation list."""
        return AuthoritySet(self.root, successor, self.issuing)

    def issuer_of(self, certificate_der: bytes) -> Authority | None:
        """The issuing CA of this set that signed a certificate, or None for one that is not ours."""
        try:
            certificate = x509.load_der_x509_certificate(certificate_der)
        except ValueError:
            return None
        for authority in self.issuing:
            try:
                certificate.verify_directly_issued_by(authority.certificate)
            except (ValueError, TypeError, InvalidSignature):
                continue
            return authority
        return None


def make_root(
    name: str,
    now: datetime,
    random: RandomBytes,
    *,
    lifetime: timedelta = ROOT_LIFETIME,
    backdate: timedelta = BACKDATE,
) -> AuthorityMaterial:
    """A new self-signed root, P-256. `name` is the organisation: printable text of 1 to 44 bytes; `now` is aware.

    Raises ValueError for a bad name or time.
    """
    key = generate_p256(random)
    opened = load_private_key(key)
    subject = _authority_name(name, f"{name} Root CA {_mark(random)}")
    start, end = validity(now, lifetime, backdate)
    own = x509.SubjectKeyIdentifier.from_public_key(opened.public_key())
    builder = (
        _authority_builder(subject, opened.public_key(), path_length=1)
        .issuer_name(subject)
        .serial_number(make_serial(random))
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
    )
    certificate = builder.sign(opened, signature_hash(opened), ecdsa_deterministic=deterministic_ecdsa(opened))
    return AuthorityMaterial(AuthorityRole.ROOT, certificate.public_bytes(Encoding.DER), key)


def make_issuing(
    root: Authority,
    name: str,
    now: datetime,
    random: RandomBytes,
    *,
    lifetime: timedelta = ISSUING_LIFETIME,
    backdate: timedelta = BACKDATE,
    crl_url: str | None = None,
) -> AuthorityMaterial:
    """A new issuing CA, P-256, path length 0, signed by `root` and never valid longer than it.

    Raises BadAuthority where `root` is none or is not valid at `now`, ValueError for a bad name or time.
    """
    if root.role is not AuthorityRole.ROOT:
        raise BadAuthority("an issuing CA is signed by a root")
    start, end = validity(now, lifetime, backdate, issuer=root)
    key = generate_p256(random)
    subject = _authority_name(name, f"{name} Issuing CA {_mark(random)}")
    builder = (
        _authority_builder(subject, load_private_key(key).public_key(), path_length=0)
        .issuer_name(root.certificate.subject)
        .serial_number(make_serial(random))
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(root.key_identifier, critical=False)
    )
    if crl_url is not None:
        builder = builder.add_extension(distribution_point(crl_url), critical=False)
    certificate = root._sign_certificate(builder)
    return AuthorityMaterial(AuthorityRole.ISSUING, certificate.public_bytes(Encoding.DER), key)


def make_serial(random: RandomBytes) -> int:
    """A positive serial of exactly 16 octets, 126 of its bits random (RFC 5280 §4.1.2.2 asks for ≤ 20 octets)."""
    drawn = random(_SERIAL_BYTES)
    if len(drawn) != _SERIAL_BYTES:
        raise ValueError(f"the random source gave {len(drawn)} bytes where {_SERIAL_BYTES} were asked for")
    return int.from_bytes(drawn, "big") & (1 << 127) - 1 | 1 << 126


def validity(
    now: datetime, lifetime: timedelta, backdate: timedelta, *, issuer: Authority | None = None
) -> tuple[datetime, datetime]:
    """First and last instant of a new certificate: whole seconds of UTC, within the validity of its issuer.

    `now` has to be aware; `lifetime` counts from `now`, not from the back-dated begin. Raises ValueError, or
    BadAuthority where the issuer is not valid at `now`.
    """
    if now.tzinfo is None:
        raise ValueError("a time without a zone; certificates are dated in UTC")
    if lifetime <= timedelta() or backdate < timedelta():
        raise ValueError("a lifetime has to be positive, and back-dating cannot be negative")
    moment = now.astimezone(UTC).replace(microsecond=0)  # RFC 5280 §4.1.2.5: no fractions of a second
    start = moment - backdate
    end = LATEST_DATE if lifetime > LATEST_DATE - moment else moment + lifetime
    if issuer is None:
        return start, end
    if not issuer.not_before <= moment < issuer.not_after:
        raise BadAuthority(f"the issuer is valid from {issuer.not_before} to {issuer.not_after}, and it is {moment}")
    return max(start, issuer.not_before), min(end, issuer.not_after)


def distribution_point(url: str) -> x509.CRLDistributionPoints:
    """Where the revocation list is (RFC 5280 §4.2.1.13). Raises ValueError for what is not a plain http(s) URL."""
    if not url.startswith(("http://", "https://")) or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("a CRL distribution point has to be an http or https URL")
    return x509.CRLDistributionPoints([x509.DistributionPoint([x509.UniformResourceIdentifier(url)], None, None, None)])


def open_set(materials: Iterable[AuthorityMaterial], active_fingerprint: str | None = None) -> AuthoritySet:
    """Opens everything that is stored: exactly one root, at least one issuing CA.

    Active is the issuing CA with the given fingerprint (SHA-256 of the DER, lower-case hex), or else the one that
    began last. Raises BadAuthority.
    """
    opened = [Authority(material) for material in materials]
    roots = [authority for authority in opened if authority.role is AuthorityRole.ROOT]
    issuing = [authority for authority in opened if authority.role is AuthorityRole.ISSUING]
    if len(roots) != 1 or not issuing:
        raise BadAuthority(f"{len(roots)} roots and {len(issuing)} issuing CAs; one root and at least one are needed")
    issuing.sort(key=lambda authority: (authority.not_before, authority.certificate_der), reverse=True)
    if active_fingerprint is None:
        return AuthoritySet(roots[0], issuing[0], tuple(issuing[1:]))
    for authority in issuing:
        if authority.fingerprint == active_fingerprint:
            former = tuple(other for other in issuing if other is not authority)
            return AuthoritySet(roots[0], authority, former)
    raise BadAuthority("no issuing CA has the fingerprint that is recorded as active")


def _authority_builder(
    subject: x509.Name, public_key: SubjectPublicKey, *, path_length: int
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _authority_name(organisation: str, common_name: str) -> x509.Name:
    if not organisation.strip() or not organisation.isprintable() or len(organisation.encode()) > _MAXIMUM_NAME:
        raise ValueError(f"the name of an authority has to be printable text of 1 to {_MAXIMUM_NAME} bytes")
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _mark(random: RandomBytes) -> str:
    return random(4).hex()
