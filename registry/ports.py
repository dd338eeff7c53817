"""What the registry's services need from one another and from outside, as protocols.

A service takes these in its constructor; `edge` names the classes behind them. They stand here and not beside their
implementations so that no service imports another one that imports it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from registry.events import EventKind
from registry.model import Contact, CredentialId, Device, DeviceId, Fingerprint, Receipt, SessionId, TenantId
from registry.storage.database import Connection

Clock = Callable[[], datetime]
"""The time now, in UTC, with its zone."""


class EventHint(Protocol):
    """The feed's bell."""

    def hint(self) -> None:
        """Say that events were committed. Cheap, never waits, may be lost: the followers also look by themselves."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    """What a committed transaction ended: a credential, a session, or with only `device_id` the whole device.

    `event_seq` numbers the event that makes every node close the sessions; receipts are collected under it.
    """

    event_seq: int
    tenant_id: TenantId
    revoked_at: datetime
    device_id: DeviceId | None = None
    credential_id: CredentialId | None = None
    session_id: SessionId | None = None
    reason: str = "credential revoked"
    """Told to the peer where its protocol has words for it, and to the operator."""


class Teardown(Protocol):
    """Closes what a committed transaction ended."""

    async def complete(self, ended: Ended) -> Receipt:
        """Close the sessions on all nodes and say which were closed, bounded by a deadline. After the commit only."""
        ...


class RefusalLog(Protocol):
    """Keeps the exact reason of a refusal for the operator; the peer sees a uniform one."""

    def note(
        self,
        *,
        tenant_id: TenantId | None,
        device_id: DeviceId | None,
        kind: EventKind,
        reason: str,
        contact: Contact,
        detail: Mapping[str, str],
    ) -> None:
        """Cheap, never waits, bounded. `reason` and `detail` hold no secrets. Without a tenant it is only logged."""
        ...


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """A certificate made for a device, registered as its credential."""

    credential_id: CredentialId
    certificate_pem: bytes
    chain_pem: bytes
    """The issuers' certificates, leaf's issuer first."""
    fingerprint: Fingerprint
    not_after: datetime


class CertificateIssuer(Protocol):
    """Makes client certificates for devices."""

    async def issue(self, connection: Connection, device: Device, csr: bytes, *, now: datetime) -> IssuedCertificate:
        """Check the request, issue, and insert the credential row, in the caller's transaction.

        From `csr` (PEM or DER) only the proved public key is taken. Raises InvalidArgument for a bad request.
        """
        ...

    async def again(
        self, connection: Connection, device: Device, csr: bytes, *, now: datetime
    ) -> IssuedCertificate | None:
        """The device's living certificate for the request's public key, if there is one; nothing is made."""
        ...
