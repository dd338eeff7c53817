"""Provisioning by key claim (seed 001): a device off the line makes itself known with its batch's key.

Theory, in the seed's order:

    SHA-256(key) → template by hash → constant-time compare → status, expiry, pattern, quota
                 → device → credential → event

The tenant is the template's. A caller whose key is not good learns nothing: unknown, disabled, expired, used, over
quota and outside the pattern are the same `Refused`, after the same look-up. Only the form of the request is judged
before the key is: a missing name is InvalidArgument for anybody and tells nothing about any key.

Concurrency. `INSERT … ON CONFLICT DO NOTHING` on (tenant, hardware_id) decides who makes the device; the losers wait
for the winner's commit, then answer as any re-claim. One claim makes one device, one credential, one event
(`device.provisioned`), in one transaction. A limited template (one_time, max_claims) is first consumed by one
conditional UPDATE, which queues the claims on that template; if the device then turns out to exist, the consumption
is rolled back.

Lost answers. With a `nonce`, the new secret is derived, by the key ring, from the key's digest, the nonce and the ids
of the device and credential (fresh with each creation, so a deleted device's secret never returns). Nothing of it is
stored but its hash (or seal), and whoever repeats the claim with the same nonce before the credential's first use
gets the same secret again. Without a nonce, or after the first use, a re-claim is answered with no secret, as the
seed says. A one-time template that is used answers nothing but this repeat, for the device it made.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from registry.credentials import IssuedCredential
from registry.hardware_id import PatternCache
from registry.model import Contact, CredentialKind, DeviceId, TemplateId, TenantId
from registry.ports import CertificateIssuer, Clock, EventHint, RefusalLog
from registry.sealing import KeyRing
from registry.secrets import RandomBytes, Secret
from registry.storage.database import Database


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """What a device sends. `nonce`: 16–128 printable ASCII characters, its own and kept until the claim succeeded.

    `csr` (PEM or DER) is for templates of type x509. `proven_template` is set by a transport on which the peer has
    already proved a template's claim PSK; the key must then be that template's.
    """

    provision_key: Secret[str]
    device_name: str
    hardware_id: str
    nonce: str | None = field(default=None, repr=False)
    csr: bytes | None = field(default=None, repr=False)
    proven_template: TemplateId | None = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """The answer. `issued` is None on a re-claim (seed 001: `api_key: ""`), unless it repeats a lost answer."""

    tenant_id: TenantId
    device_id: DeviceId
    created: bool
    issued: IssuedCredential | None
    credential_type: CredentialKind


class KeyClaim:
    """The flow; holds no state of its own."""

    def __init__(
        self,
        database: Database,
        *,
        key_ring: KeyRing,
        clock: Clock,
        random: RandomBytes,
        feed: EventHint,
        refusals: RefusalLog,
        patterns: PatternCache,
        issuer: CertificateIssuer | None = None,
    ) -> None: ...

    async def claim(self, request: ClaimRequest, contact: Contact) -> Claimed:
        """Raises InvalidArgument (the form of the request), Refused (uniform), FailedPrecondition (the key is good, the
        template's type is x509 and there is no csr, or no CA), Unavailable."""
        raise NotImplementedError
