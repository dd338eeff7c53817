"""Credentials: issued, listed, rotated, revoked (seed 003).

Theory. A credential is *living* while it is neither revoked nor expired. A device has one credential *type*, and all
that is issued for it is of that type; only a rotation changes it. Rotation in pictures (time →):

    first rotation          old ━━━━━━━━━━━━━━┥ overlap          superseded_by = new, expires_at = now + overlap
                                     new ━━━━━━━━━━━━━━━━━
    again, new unused       old ━━━━━━━━━━━━━━┥ keeps its overlap
                                     new ━━┥ replaced (revoked)
                                           newer ━━━━━━━━━
    again, new in use       old ━━━━━━━━━━━┥ ends at once (revoked)
                                     new ━━━━━━━━━━━━━━━━┥ overlap
                                           newer ━━━━━━━━━

so that a rotation leaves at most two generations valid, and one whose answer was lost locks nobody out. With
`retire_on_use` the old one also ends as soon as the new one is first used, within the overlap. Overlap 0 ends it at
once, and its sessions with it.

Every change locks the device's row first and the credentials after it, so the changes of one device stand in a line
and cannot deadlock. A revocation is one transaction (row, event, audit); closing the sessions comes after the commit
(`Teardown`), and if this node dies in between, every node still finds the event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from registry.model import Actor, Credential, CredentialId, CredentialKind, DeviceId, Json, Receipt, TenantId
from registry.paging import Listing, Page
from registry.ports import CertificateIssuer, Clock, EventHint, IssuedCertificate, Teardown
from registry.psk import IssuedPsk, PskAssignment
from registry.sealing import KeyRing
from registry.secrets import RandomBytes, Secret
from registry.storage.database import Database

DEFAULT_OVERLAP_SECONDS = 86_400
MAX_OVERLAP_SECONDS = 30 * 86_400
MAX_LIVING = 10
"""Living credentials of one device: a few hands may hold keys of their own; more is a leak in somebody's script."""


@dataclass(frozen=True, slots=True)
class IssuedApiKey:
    """An API key, shown once."""

    credential_id: CredentialId
    api_key: Secret[str]
    expires_at: datetime | None


IssuedCredential = IssuedApiKey | IssuedPsk | IssuedCertificate


@dataclass(frozen=True, slots=True)
class RotateRequest:
    """How to rotate. `overlap_seconds`: 0 … 2,592,000 (30 days), None is a day; 0 ends the old at once.

    `credential_type` changes the device's type. `csr` (PEM or DER) is needed for, and only for, x509.
    """

    overlap_seconds: int | None = None
    credential_type: CredentialKind | None = None
    retire_on_use: bool = False
    csr: bytes | None = None


@dataclass(frozen=True, slots=True)
class Rotated:
    """The new credential, and what became of the old ones.

    `retired` are all that this rotation ended or gave an end; `valid_until` is when the last of them stops being valid
    (None when there was none); `receipts` tell of those that ended at once.
    """

    issued: IssuedCredential
    retired: list[CredentialId]
    valid_until: datetime | None
    receipts: list[Receipt] = field(default_factory=list)


class Credentials:
    """The credentials of devices that exist."""

    def __init__(
        self,
        database: Database,
        *,
        key_ring: KeyRing,
        clock: Clock,
        random: RandomBytes,
        feed: EventHint,
        teardown: Teardown,
        issuer: CertificateIssuer | None = None,
    ) -> None: ...

    async def issue_api_key(
        self, tenant_id: TenantId, device_id: DeviceId, label: str, expires_at: datetime | None, actor: Actor
    ) -> IssuedApiKey:
        """One more API key (CreateAPIKey). `label`: 0–128 characters; `expires_at` in the future.

        Raises NotFound, InvalidArgument, FailedPrecondition (another credential type, a pending device),
        ResourceExhausted (10 living credentials).
        """
        raise NotImplementedError

    async def issue_psk(
        self, tenant_id: TenantId, device_id: DeviceId, assignment: PskAssignment, actor: Actor
    ) -> IssuedPsk:
        """One more PSK, generated or assigned. Raises as `issue_api_key`, and AlreadyExists for a taken identity."""
        raise NotImplementedError

    async def register_certificate(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        fingerprint: str,
        not_before: datetime,
        not_after: datetime,
        detail: Mapping[str, Json],
        actor: Actor,
    ) -> Credential:
        """A certificate of any CA, known by the SHA-256 of its DER (64 hexadecimal digits); nothing else is kept of it
        but `detail` (subject, issuer, serial: for the operator's eyes).

        Raises as `issue_api_key`, and AlreadyExists when the certificate is already registered for a device.
        """
        raise NotImplementedError

    async def list(
        self,
        tenant_id: TenantId,
        device_id: DeviceId | None,
        page: Page,
        *,
        kind: CredentialKind | None = None,
    ) -> Listing[Credential]:
        """Credentials without secrets, revoked ones included, oldest first; of one device (NotFound) or of all."""
        raise NotImplementedError

    async def rotate(self, tenant_id: TenantId, device_id: DeviceId, request: RotateRequest, actor: Actor) -> Rotated:
        """A fresh credential; the old ones retire as this file's theory says.

        Raises NotFound, InvalidArgument, FailedPrecondition (a pending device; x509 without `csr` or without a CA).
        """
        raise NotImplementedError

    async def revoke(
        self,
        tenant_id: TenantId,
        device_id: DeviceId | None,
        credential_id: CredentialId,
        actor: Actor,
        reason: str = "revoked by operator",
    ) -> Receipt:
        """End a credential now and close its sessions. Again: the first `revoked_at` and no sessions. Raises NotFound,
        also when the credential is not `device_id`'s."""
        raise NotImplementedError

    async def revoke_by_fingerprint(
        self, tenant_id: TenantId, fingerprint: str, actor: Actor, reason: str = "revoked by operator"
    ) -> Receipt:
        """End a certificate by the SHA-256 of its DER (64 hexadecimal digits). As `revoke`."""
        raise NotImplementedError
