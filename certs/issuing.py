"""Issuing: from a checked request to a certificate, in two steps that cannot be swapped or repeated.

    CheckedRequest ─ prepare_device ─▶ PreparedCertificate ── intent ──▶ (the caller commits the intent)
                                              │
                                              └─ sign(prepared) ─▶ IssuedCertificate; a second sign raises

`prepare` decides everything, serial and dates included, and signs nothing. The caller stores `prepared.intent` and
commits; only then it signs. A crash between the two leaves an intent without a certificate: harmless. The other
order could leave a certificate that nobody knows and nobody can revoke. A prepared certificate is spent by its first
`sign`, successful or not, also when two threads race: the pending builder is taken out of it by one atomic pop.

Profiles (RFC 5280, RFC 7925 §4.4):

  device   CN = device_id, O = tenant; SAN = one URI naming the device; KU digitalSignature; EKU clientAuth; CA:FALSE;
           AKI, SKI; a CRL distribution point where one is configured. No keyAgreement and no keyEncipherment: every
           cipher suite that is offered signs with the certificate's key (ECDHE), none encrypts to it.
  server   CN = the first name; SAN = DNS names and addresses; KU digitalSignature; EKU serverAuth; CA:FALSE; AKI, SKI

The device's URI is an https one, not `urn:uuid:`. Both are lawful (RFC 5280 §4.2.1.6), but linters know only schemes
with an authority, and then the host has to be a domain name: `gatehouse.internal` by default, a name under the
top-level domain that is reserved for private use, or the server's public base URL where the operator configures it.

Certificates begin a day early, for devices whose clock runs behind, and never outlive their issuer.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Final, NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.authority import (
    BACKDATE,
    Authority,
    AuthorityRole,
    BadAuthority,
    distribution_point,
    make_serial,
    validity,
)
from certs.chains import bundle, fingerprint, serial_hex
from certs.keys import PrivateKeyPem, RandomBytes, SubjectPublicKey, load_subject_public_key, public_key_of, spki_sha256
from certs.request import CheckedRequest

DEVICE_LIFETIME: Final = timedelta(days=365)
SERVER_LIFETIME: Final = timedelta(days=90)
DEVICE_URI_BASE: Final = "https://gatehouse.internal/devices/"

_MAXIMUM_NAME = 64  # RFC 5280, appendix A.1: ub-common-name, ub-organization-name
_DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_URI_BASE = re.compile(r"https?://[A-Za-z0-9.-]+(?::[0-9]{1,5})?/(?:[A-Za-z0-9._~-]+/)*")
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")  # RFC 1034 §3.5, with the leading digits of RFC 1123 §2.1
_MAXIMUM_DOMAIN = 253
_MAXIMUM_SERVER_NAMES = 100


class AlreadySigned(RuntimeError):
    """A prepared certificate was signed for the second time. Ours to mend: prepare again, with a new serial."""


class CertificatePurpose(Enum):
    """Which profile a certificate follows."""

    DEVICE = "device"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the registry says about a device: its id, which becomes the common name, and its tenant, the organisation.

    Raises ValueError for an id that is not 1 to 64 of letters, digits, dot, dash and underscore, and for a tenant that
    is not printable text of 1 to 64 characters.
    """

    device_id: str
    tenant: str

    def __post_init__(self) -> None:
        if not _DEVICE_ID.fullmatch(self.device_id):
            raise ValueError("a device_id for a certificate has to be 1 to 64 letters, digits, '.', '_' or '-'")
        if not self.tenant.strip() or not self.tenant.isprintable() or len(self.tenant.encode()) > _MAXIMUM_NAME:
            raise ValueError(f"a tenant for a certificate has to be printable text of 1 to {_MAXIMUM_NAME} bytes")


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """How device certificates are made. `uri_base` ends with a slash; the device_id follows it."""

    lifetime: timedelta = DEVICE_LIFETIME
    backdate: timedelta = BACKDATE
    uri_base: str = DEVICE_URI_BASE
    crl_url: str | None = None

    def __post_init__(self) -> None:
        if not _URI_BASE.fullmatch(self.uri_base):
            raise ValueError("the base of device URIs has to be an http or https URL that ends with a slash")
        if self.crl_url is not None:
            distribution_point(self.crl_url)


@dataclass(frozen=True, slots=True)
class IssuanceIntent:
    """What is recorded before signing: enough to find, to revoke, and to list a certificate that nobody ever saw."""

    purpose: CertificatePurpose
    serial_hex: str
    issuer_fingerprint: str
    spki_sha256: str
    subject: str
    not_before: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """A signed certificate and the intent that it fulfils."""

    der: bytes
    intent: IssuanceIntent

    @property
    def pem(self) -> bytes:
        """The certificate alone, in PEM."""
        return bundle((self.der,))

    @property
    def fingerprint(self) -> str:
        """Lower-case hex SHA-256 of the DER."""
        return fingerprint(self.der)


class PreparedCertificate:
    """The right to sign one certificate once. Made by `prepare_device` and `prepare_server` only."""

    __slots__ = ("_issuer", "_pending", "intent")

    def __init__(
        self, intent: IssuanceIntent, issuer: Authority, builder: x509.CertificateBuilder, witness: object
    ) -> None:
        if witness is not _WITNESS:
            raise TypeError("a PreparedCertificate is made by prepare_device and prepare_server only")
        self.intent: Final = intent
        self._issuer: Final = issuer
        self._pending: Final = [builder]

    @property
    def spent(self) -> bool:
        """Whether it was signed, or tried to be."""
        return not self._pending

    def __repr__(self) -> str:
        state = "pending" if self._pending else "spent"
        return f"PreparedCertificate({self.intent.serial_hex}, {state})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PreparedCertificate is neither copied nor pickled: it signs once")


_WITNESS: Final = object()


def prepare_device(
    request: CheckedRequest,
    device: DeviceFacts,
    issuer: Authority,
    now: datetime,
    random: RandomBytes,
    profile: DeviceProfile | None = None,
) -> PreparedCertificate:
    """Decides a device certificate completely. Record its `intent`, commit, then `sign`.

    Raises BadAuthority where the issuer is not an issuing CA or not valid at `now`; ValueError for a naive `now`.
    """
    profile = profile or DeviceProfile()
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, device.tenant),
            x509.NameAttribute(NameOID.COMMON_NAME, device.device_id),
        ]
    )
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(device_uri(device.device_id, profile))])
    leaf = _Leaf(
        CertificatePurpose.DEVICE, request.spki_der, subject, names, ExtendedKeyUsageOID.CLIENT_AUTH, profile.crl_url
    )
    return _prepare(leaf, issuer, validity(now, profile.lifetime, profile.backdate, issuer=issuer), random)


def prepare_server(
    key: PrivateKeyPem,
    names: Sequence[str],
    issuer: Authority,
    now: datetime,
    random: RandomBytes,
    *,
    lifetime: timedelta = SERVER_LIFETIME,
    backdate: timedelta = BACKDATE,
    crl_url: str | None = None,
) -> PreparedCertificate:
    """Decides a certificate for our own listeners. The private key shows that the key is ours, and is not kept.

    `names` are DNS names (a leading `*.` label is allowed) and IP addresses in text. Raises BadServerName,
    BadKey, BadAuthority, and ValueError for a naive `now`.
    """
    alternatives = server_names(names)
    common_name = next((name for name in names if len(name) <= _MAXIMUM_NAME), "Gatehouse server")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    leaf = _Leaf(
        CertificatePurpose.SERVER,
        public_key_of(key),
        subject,
        x509.SubjectAlternativeName(alternatives),
        ExtendedKeyUsageOID.SERVER_AUTH,
        crl_url,
    )
    return _prepare(leaf, issuer, validity(now, lifetime, backdate, issuer=issuer), random)


def sign(prepared: PreparedCertificate) -> IssuedCertificate:
    """Signs a prepared certificate. The caller has committed `prepared.intent` before.

    Raises AlreadySigned on the second call, and BadAuthority where the signature does not verify (a broken machine).
    """
    try:
        builder = prepared._pending.pop()
    except IndexError:
        raise AlreadySigned(f"the certificate {prepared.intent.serial_hex} was signed before") from None
    certificate = prepared._issuer._sign_certificate(builder)
    try:
        certificate.verify_directly_issued_by(prepared._issuer.certificate)
    except (ValueError, TypeError, InvalidSignature):
        # A fault while signing can give away the key (differential faults): such a signature never leaves.
        raise BadAuthority("the issuer made a signature that does not verify") from None
    return IssuedCertificate(certificate.public_bytes(Encoding.DER), prepared.intent)


def device_uri(device_id: str, profile: DeviceProfile | None = None) -> str:
    """The URI that names a device in the SAN of its certificate."""
    return f"{(profile or DeviceProfile()).uri_base}{device_id}"


class BadServerName(ValueError):
    """A configured server name is neither a DNS name nor an IP address."""


def server_names(names: Sequence[str]) -> list[x509.GeneralName]:
    """SAN entries for DNS names and IP addresses, duplicates removed, order kept. Raises BadServerName."""
    if not 1 <= len(names) <= _MAXIMUM_SERVER_NAMES:
        raise BadServerName(f"{len(names)} server names; 1 to {_MAXIMUM_SERVER_NAMES} are allowed")
    return list(dict.fromkeys(_server_name(name) for name in names))


@dataclass(frozen=True, slots=True)
class _Leaf:
    purpose: CertificatePurpose
    spki_der: bytes
    subject: x509.Name
    names: x509.SubjectAlternativeName
    extended_usage: x509.ObjectIdentifier
    crl_url: str | None


def _prepare(
    leaf: _Leaf, issuer: Authority, dates: tuple[datetime, datetime], random: RandomBytes
) -> PreparedCertificate:
    if issuer.role is not AuthorityRole.ISSUING:
        raise BadAuthority("leaves are signed by an issuing CA, never by a root")
    key = load_subject_public_key(leaf.spki_der)
    serial = make_serial(random)
    start, end = dates
    builder = (
        _with_extensions(x509.CertificateBuilder(), leaf, issuer, key)
        .subject_name(leaf.subject)
        .issuer_name(issuer.certificate.subject)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(end)
    )
    intent = IssuanceIntent(
        purpose=leaf.purpose,
        serial_hex=serial_hex(serial),
        issuer_fingerprint=issuer.fingerprint,
        spki_sha256=spki_sha256(leaf.spki_der),
        subject=leaf.subject.rfc4514_string(),
        not_before=start,
        not_after=end,
    )
    return PreparedCertificate(intent, issuer, builder, _WITNESS)


def _with_extensions(
    builder: x509.CertificateBuilder, leaf: _Leaf, issuer: Authority, key: SubjectPublicKey
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([leaf.extended_usage]), critical=False)
        .add_extension(leaf.names, critical=False)
        .add_extension(issuer.key_identifier, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    if leaf.crl_url is None:
        return builder
    return builder.add_extension(distribution_point(leaf.crl_url), critical=False)


def _server_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    domain = name.lower().removeprefix("*.")
    if len(name) > _MAXIMUM_DOMAIN or not all(_LABEL.fullmatch(label) for label in domain.split(".")):
        raise BadServerName(f"{ascii(name)[:80]} is neither an IP address nor a DNS name")
    return x509.DNSName(name.lower())
