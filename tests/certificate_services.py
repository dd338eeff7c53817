"""The services of certificates on a test's own database, and devices that make keys and requests of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from certs.chains import bundle
from certs.issuing import DeviceProfile
from registry.certificates import Certificates, ForeignCertificates
from registry.credentials import Credentials
from registry.enrolment import Enrolment
from registry.events import EventKind
from registry.hardware_id import PatternCache
from registry.key_claim import KeyClaim
from registry.model import RenewalRight, TenantId
from registry.ports import IssuedCertificate
from registry.registration_tokens import NewToken, Provisioned, RegistrationTokens
from registry.resolver import Resolver
from registry.revocation_lists import RevocationLists
from registry.sealing import KeyRing
from registry.storage.database import Database
from registry.trust import Trust, open_trust
from tests.services import CONTACT, OPERATOR, Book, Clock, Services


class OpenBook(Book):
    """Remembers refusals of every kind."""

    def note(self, *, kind: EventKind, **said: Any) -> None:
        super().note(kind=EventKind.PROVISIONING_REFUSED, **said)


class CertificateServices(Services):
    """One node's services, the issuer among them."""

    def __init__(self, database: Database, ring: KeyRing, trust: Trust, clock: Clock, profile: DeviceProfile) -> None:
        super().__init__(database, ring)
        self.clock, self.book = clock, OpenBook()
        self.trust = trust
        told: dict[str, Any] = {"clock": clock, "random": os.urandom}
        self.certificates = Certificates(database, trust.live, profile=profile, **told)
        self.credentials = Credentials(
            database, key_ring=ring, feed=self.bell, teardown=self.doors, issuer=self.certificates, **told
        )
        self.foreign = ForeignCertificates(self.credentials, trust.live)
        self.key_claim = KeyClaim(
            database,
            key_ring=ring,
            feed=self.bell,
            refusals=self.book,
            patterns=PatternCache(),
            issuer=self.certificates,
            **told,
        )
        self.tokens = RegistrationTokens(database, self.certificates, feed=self.bell, refusals=self.book, **told)
        self.enrolment = Enrolment(
            database, self.certificates, clock=clock, feed=self.bell, refusals=self.book, teardown=self.doors
        )
        self.lists = RevocationLists(database, trust.live, clock=clock)
        self.resolver = Resolver(
            database,
            ring,
            self.book,
            clock=clock,
            random=os.urandom,
            feed_trusted=lambda: False,
            hint=self.bell.hint,
        )

    @classmethod
    async def open(
        cls,
        database: Database,
        *,
        ring: KeyRing | None = None,
        clock: Clock | None = None,
        profile: DeviceProfile | None = None,
    ) -> CertificateServices:
        """A node on `database`; give the second node of a database the ring and the clock of the first."""
        ring, clock = ring or KeyRing.generate(), clock or Clock()
        trust = await open_trust(database, ring, clock=clock, random=os.urandom)
        return cls(database, ring, trust, clock, profile or DeviceProfile())

    async def provisioned(self, tenant_id: TenantId, key: DeviceKey | None = None, **said: Any) -> Provisioned:
        """A device that came online by a token."""
        made = await self.tokens.create(tenant_id, NewToken(**{"name": "Pump 7", **said}), OPERATOR)
        return await self.tokens.provision(made.secret, (key or DeviceKey.new()).csr(), CONTACT)

    async def certificate_rows(self, status: str | None = None) -> list[Any]:
        """The certificate table, in the order of the intents."""
        return await self.rows(
            "SELECT * FROM certificate WHERE $1::text IS NULL OR status = $1 ORDER BY intended_at, serial", status
        )


@dataclass(frozen=True, slots=True)
class DeviceKey:
    """A device's own key."""

    private: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls) -> DeviceKey:
        return cls(ec.generate_private_key(ec.SECP256R1()))

    def csr(self, subject: x509.Name | None = None) -> bytes:
        """A certification request in PEM, for the subject or for none."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(subject or x509.Name([]))
        return builder.sign(self.private, hashes.SHA256()).public_bytes(Encoding.PEM)

    def renewal(self, issued: IssuedCertificate) -> bytes:
        """A request with the subject of a certificate (RFC 7030 §4.2.2)."""
        return self.csr(leaf(issued).subject)

    def self_signed(self, now: datetime, days: int = 30, issuer: DeviceKey | None = None) -> bytes:
        """A certificate of a foreign make, in PEM: by the key itself, or by somebody else's."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pump.example")])
        signer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Somebody's CA")]) if issuer else name
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(signer)
            .public_key(self.private.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=days))
        )
        return builder.sign((issuer or self).private, hashes.SHA256()).public_bytes(Encoding.PEM)


def leaf(issued: IssuedCertificate) -> x509.Certificate:
    """The certificate, opened."""
    return x509.load_pem_x509_certificate(issued.certificate_pem)


def der(pem: bytes) -> bytes:
    """What a TLS peer shows."""
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def right(provisioned: Provisioned) -> RenewalRight:
    """What the resolver gives for its certificate."""
    return RenewalRight(provisioned.tenant_id, provisioned.device_id, provisioned.issued.credential_id, in_grace=False)


def openssl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The openssl program; skips where there is none."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("needs openssl")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30, check=False)


def verify(folder: Path, services: CertificateServices, issued: IssuedCertificate, *more: str) -> str:
    """What `openssl verify -x509_strict` says of a device's certificate at the services' time."""
    (folder / "leaf.pem").write_bytes(issued.certificate_pem)
    (folder / "chain.pem").write_bytes(issued.chain_pem)
    (folder / "root.pem").write_bytes(bundle((services.trust.authorities.root.certificate_der,)))
    done = openssl(
        *("verify", "-x509_strict", "-purpose", "sslclient", "-attime", str(int(services.clock().timestamp()))),
        *("-CAfile", str(folder / "root.pem"), "-untrusted", str(folder / "chain.pem"), *more),
        str(folder / "leaf.pem"),
    )
    return done.stdout + done.stderr
