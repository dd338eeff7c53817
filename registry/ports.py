"""What the registry's services need from one another and from outside, as protocols.

A service takes these in its constructor; `edge` names the classes behind them. They stand here and not beside their
implementations so that no service imports another one that imports it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol
from uuid import UUID

from certs.issuing import PreparedCertificate
from certs.request import RequestPolicy
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

    async def remaining(self, ended: Ended) -> int:
        """How many sessions of an earlier end are not known to be closed. `event_seq` is not looked at."""
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
        """Cheap, never waits, bounded. `reason` and `detail` hold no secrets.

        Without a tenant it is only logged, unless there is a device of this id: then it is in that one's timeline, too.
        """
        ...


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """A certificate made for a device, registered as its credential."""

    credential_id: CredentialId
    certificate_pem: bytes
    chain_pem: bytes
    """The issuers' certificates, leaf's issuer first."""
    fingerprint: Fingerprint
    not_before: datetime
    not_after: datetime
    renew_after: datetime
    """From when the device is advised to renew it: a moment of its own within the last third of the validity."""


@dataclass(frozen=True, slots=True)
class PreparedIssue:
    """A device's certificate that is decided, and whose serial and intent are committed; not signed yet.

    `CertificateIssuer.issue` spends it. One that is not spent is withdrawn.
    """

    tenant_id: TenantId
    device_id: DeviceId
    certificate: PreparedCertificate = field(repr=False)
    authority_id: UUID
    chain_pem: bytes = field(repr=False)
    renew_after: datetime


class CertificateIssuer(Protocol):
    """Makes client certificates for devices, in two steps: what is to be signed is on record before it is."""

    async def prepare(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        csr: bytes,
        *,
        now: datetime,
        policy: RequestPolicy | None = None,
    ) -> PreparedIssue:
        """Check the request and commit serial and intent. The device need not exist yet.

        From `csr` (PEM or DER) only the proved public key is taken. Duties of the caller: be in no transaction (this
        takes a connection of its own), and `withdraw` what is not issued. Raises InvalidArgument for a bad request,
        FailedPrecondition where no authority can sign now, Unavailable.
        """
        ...

    async def issue(
        self, connection: Connection, device: Device, prepared: PreparedIssue, *, now: datetime
    ) -> IssuedCertificate:
        """Sign, and insert the credential row, in the caller's transaction, which holds the device's row.

        Raises InvalidArgument where the public key is another device's. It takes a lock; take none after it.
        """
        ...

    async def withdraw(self, prepared: PreparedIssue) -> None:
        """Give up what was not issued. Outside of transactions; never raises, since a forgotten intent harms nobody."""
        ...

    async def again(
        self, connection: Connection, device: Device, csr: bytes, *, now: datetime
    ) -> IssuedCertificate | None:
        """The device's living certificate for the request's public key, if there is one; nothing is made.

        Raises InvalidArgument for a bad request, Unavailable.
        """
        ...
