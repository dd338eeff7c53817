"""Re-enrolment: the holder of one of our certificates asks for its successor (RFC 7030 §4.2.2).

    right (from the resolver, or a live session's identity) ─► our certificate? ─► request: subject unchanged
      ─► intent ─► transaction: device locked, right judged again ─► issue ─► the old one is superseded ─► commit

The same public key is a renewal, another one a rekey; both give a new certificate. The old one keeps its validity to
its own end, or for the configured overlap, by the rules of a rotation (credentials.py) applied to the certificate's own
line: its predecessor, itself, its successor. Other credentials of the device are not touched.

A lost answer: as long as the successor has not been used, asking again with the successor's key brings the successor
again; asking with yet another key replaces it, and the one that nobody used is revoked. So one line never has more than
two generations that are valid, and a device can always get back in with what it has.

One that goes back to the old certificate after it has used the successor (restored from an image, or the new key was
lost in a power cut) gets another successor, and keeps what it asks with: ending it would cut the very connection on
which the answer goes out. The successor that was used ends when the new one is used, because until then nobody knows
which of the two its device still has.

A certificate in its grace (expired a few days ago) has the same right and leaves nothing behind. What was revoked, or
ended by a rotation, or belongs to a device that is inactive or deleted has none, judged under the device's lock, so
that a revocation that commits first wins. A foreign certificate is renewed by its own CA.

Bounded: a device gets at most 10 certificates an hour by this road; each one more would be an entry in the revocation
list that everybody has to read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from certs.renewal import GRACE
from certs.request import RequestPolicy, renewal_policy
from registry import secrets
from registry.certificates import Certificates
from registry.credentials import Rotation, end_all, plan_rotation, record_rotation
from registry.errors import FailedPrecondition, NotFound, ResourceExhausted, Unauthenticated
from registry.events import EventKind
from registry.model import (
    Actor,
    Contact,
    Credential,
    CredentialKind,
    Device,
    DeviceStatus,
    Identity,
    RenewalRight,
)
from registry.ports import Clock, EventHint, IssuedCertificate, PreparedIssue, RefusalLog, Teardown
from registry.storage import certificates, credentials, devices
from registry.storage.database import Connection, Database

MAX_PER_HOUR: Final = 10
_HOUR: Final = timedelta(hours=1)
_UNBOUNDED: Final = timedelta(days=36_500)
"""An overlap that ends with the old certificate itself."""


class Enrolment:
    """The flow; holds no state of its own."""

    def __init__(
        self,
        database: Database,
        issuer: Certificates,
        *,
        clock: Clock,
        feed: EventHint,
        refusals: RefusalLog,
        teardown: Teardown,
        overlap: timedelta | None = None,
        grace: timedelta = GRACE,
    ) -> None:
        """`overlap` bounds how long the old certificate stays valid beside a new one; None is to its own end.
        `grace` as the resolver has it."""
        self._database = database
        self._issuer = issuer
        self._clock = clock
        self._feed = feed
        self._refusals = refusals
        self._teardown = teardown
        self._overlap = _UNBOUNDED if overlap is None else overlap
        self._grace = grace

    async def renew(
        self, right: RenewalRight | Identity, csr: bytes, contact: Contact, *, same_subject: bool = True
    ) -> IssuedCertificate:
        """The successor of the certificate that `right` was given for. `csr`: PEM or DER, the subject unchanged.

        Without `same_subject` the request's subject may be any, as in a first enrolment; it decides nothing.

        Raises InvalidArgument (the request), FailedPrecondition (no certificate of ours; no authority can sign),
        Unauthenticated (the right has ended meanwhile), ResourceExhausted (10 in an hour), Unavailable.
        """
        now = self._clock()
        async with self._database.connection() as connection:
            old = await certificates.of_credential(connection, right.tenant_id, right.credential_id)
        if old is None:
            raise FailedPrecondition(
                "only a certificate that this server has issued is renewed here; a foreign one by its own authority"
            )
        policy = renewal_policy(old.der, RequestPolicy())
        if not same_subject:
            policy = replace(policy, required_subject=None)
        spki = bytes.fromhex(self._issuer.checked(csr, policy).spki_sha256)
        async with self._database.connection() as connection:
            present = await self._living(connection, right, now, contact)
            repeated = await self._successor(connection, present, spki, now)
            if repeated is not None:
                return repeated
            await _check_rate(connection, right, now)
        prepared = await self._issuer.prepare(right.tenant_id, right.device_id, csr, now=now, policy=policy)
        try:
            return await self._replace(right, prepared, now, contact)
        finally:
            if not prepared.certificate.spent:
                await self._issuer.withdraw(prepared)

    async def _successor(
        self, connection: Connection, present: Credential, spki: bytes, now: datetime
    ) -> IssuedCertificate | None:
        """The successor that was issued before and has not been used, if it is for this public key."""
        if present.superseded_by is None:
            return None
        successor = await credentials.get(connection, present.tenant_id, present.superseded_by)
        stored = await certificates.of_credential(connection, present.tenant_id, present.superseded_by)
        if successor is None or stored is None or successor.first_used_at is not None:
            return None
        if not _lives(successor, now) or not secrets.same(stored.spki_sha256, spki):
            return None
        return self._issuer.issued_before(stored)

    async def _replace(
        self,
        right: RenewalRight | Identity,
        prepared: PreparedIssue,
        now: datetime,
        contact: Contact,
    ) -> IssuedCertificate:
        actor = Actor(f"device:{right.device_id}", contact.correlation_id)
        async with self._database.transaction() as connection:
            device = await self._device(connection, right, contact)
            present = await self._living(connection, right, now, contact)
            spki = bytes.fromhex(prepared.certificate.intent.spki_sha256)
            repeated = await self._successor(connection, present, spki, now)
            if repeated is not None:
                return repeated  # the same request was sent twice, and the other one was first
            await _check_rate(connection, right, now)  # again: of many at once, those before this one count now
            living = await credentials.living(connection, right.tenant_id, [right.device_id], now)
            plan = _plan(_line(living, present), present, now, self._overlap)
            issued = await self._issuer.issue(connection, device, prepared, now=now)
            for each, end in plan.lingering:
                stepped_back_from = each.created_at > present.created_at
                await credentials.supersede(
                    connection, right.tenant_id, each.credential_id, issued.credential_id, end, stepped_back_from
                )
            if _expired(present, now):
                await credentials.supersede(
                    connection, right.tenant_id, present.credential_id, issued.credential_id, present.expires_at, False
                )
            ended = await end_all(connection, plan.ending, now, "rotated", actor)
            plan = _told(plan, present)
            await record_rotation(connection, device, CredentialKind.X509, issued.credential_id, plan, now, actor)
        self._feed.hint()
        await asyncio.gather(*(self._teardown.complete(each) for each in ended))
        return issued

    async def _device(self, connection: Connection, right: RenewalRight | Identity, contact: Contact) -> Device:
        try:
            device = await devices.lock(connection, right.tenant_id, right.device_id)
        except NotFound:
            raise self._refuse(right, "device deleted", contact) from None
        if device.status is DeviceStatus.INACTIVE:
            raise self._refuse(right, "device inactive", contact)
        if device.credential_type is not CredentialKind.X509:
            raise FailedPrecondition(
                f"the device's credential type is {device.credential_type.value} now; its certificates are not renewed"
            )
        return device

    async def _living(
        self, connection: Connection, right: RenewalRight | Identity, now: datetime, contact: Contact
    ) -> Credential:
        """The credential of the right, as it is now. Raises Unauthenticated."""
        found = await credentials.get(connection, right.tenant_id, right.credential_id)
        if found is None or found.device_id != right.device_id:
            raise self._refuse(right, "credential deleted", contact)
        if found.revoked_at is not None:
            raise self._refuse(right, "credential revoked", contact)
        if found.expires_at is None or found.expires_at > now:
            return found
        if isinstance(right, RenewalRight) and right.in_grace and found.expires_at + self._grace >= now:
            return found
        raise self._refuse(right, "credential expired", contact)

    def _refuse(self, right: RenewalRight | Identity, reason: str, contact: Contact) -> Unauthenticated:
        self._refusals.note(
            tenant_id=right.tenant_id,
            device_id=right.device_id,
            kind=EventKind.AUTH_REFUSED,
            reason=reason,
            contact=contact,
            detail={"credential_id": str(right.credential_id)},
        )
        return Unauthenticated(reason)


async def _check_rate(connection: Connection, right: RenewalRight | Identity, now: datetime) -> None:
    """Raises ResourceExhausted where the device has had its certificates of the hour."""
    recent = await certificates.count_since(connection, right.tenant_id, right.device_id, now - _HOUR)
    if recent >= MAX_PER_HOUR:
        raise ResourceExhausted(
            f"the device has had {recent} certificates within the hour; {MAX_PER_HOUR} are allowed",
            retry_after=_HOUR.total_seconds(),
        )


def _line(living: Sequence[Credential], present: Credential) -> Sequence[Credential]:
    """Of the device's living credentials those that a renewal of `present` concerns, oldest first."""
    return [
        each
        for each in living
        if each.credential_id in (present.credential_id, present.superseded_by)
        or each.superseded_by == present.credential_id
        or (each.superseded_by is not None and each.superseded_by == present.superseded_by)
    ]


def _plan(line: Sequence[Credential], present: Credential, now: datetime, overlap: timedelta) -> Rotation:
    """What becomes of the line. Where old ones may linger at all, the one that asks keeps its end."""
    plan = plan_rotation(line, now, overlap)
    if not overlap or present.credential_id not in [each.credential_id for each in plan.ending]:
        return plan
    ending = [each for each in plan.ending if each.credential_id != present.credential_id]
    return replace(plan, ending=ending, lingering=[(present, present.expires_at), *plan.lingering])


def _told(plan: Rotation, present: Credential) -> Rotation:
    """For the event: the certificate that was renewed is among those that have an end, expired or not."""
    if present.credential_id in plan.retired:
        return plan
    return replace(plan, lingering=[*plan.lingering, (present, present.expires_at)])


def _lives(credential: Credential, now: datetime) -> bool:
    return credential.revoked_at is None and not _expired(credential, now)


def _expired(credential: Credential, now: datetime) -> bool:
    return credential.expires_at is not None and credential.expires_at <= now
