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

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import assert_never
from uuid import UUID

from registry import fields, psk, secrets
from registry.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from registry.events import EventKind, NewEvent
from registry.model import (
    Actor,
    Credential,
    CredentialId,
    CredentialKind,
    Device,
    DeviceId,
    DeviceStatus,
    Fingerprint,
    Json,
    Receipt,
    TenantId,
)
from registry.paging import Listing, Page, decode_cursor, listing
from registry.ports import CertificateIssuer, Clock, Ended, EventHint, IssuedCertificate, PreparedIssue, Teardown
from registry.psk import IssuedPsk, PskAssignment
from registry.sealing import KeyRing
from registry.secrets import RandomBytes, Secret, SecretKind
from registry.storage import audit, credentials, devices, events, profiles
from registry.storage.credentials import NewCredential
from registry.storage.database import Connection, Database

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


class Mint:
    """Makes secrets and writes their credential rows in the caller's transaction. Shared by every flow that issues.

    `raw` are the 32 bytes of the secret where the caller derives them; otherwise they are random. The caller holds the
    device's row, or has just made it.
    """

    def __init__(self, key_ring: KeyRing, random: RandomBytes) -> None:
        self._key_ring = key_ring
        self._random = random

    def credential_id(self) -> CredentialId:
        """An id for a credential that is about to be made."""
        return CredentialId(fields.fresh_uuid(self._random))

    async def api_key(
        self,
        connection: Connection,
        device: Device,
        now: datetime,
        *,
        label: str = "",
        expires_at: datetime | None = None,
        credential_id: CredentialId | None = None,
        raw: Secret[bytes] | None = None,
    ) -> IssuedApiKey:
        """A new API key of the device."""
        made = credential_id or self.credential_id()
        key = secrets.encode(SecretKind.API_KEY, raw.reveal() if raw else self._random(secrets.SECRET_BYTES))
        await credentials.insert(
            connection,
            NewCredential(
                tenant_id=device.tenant_id,
                device_id=device.device_id,
                credential_id=made,
                kind=CredentialKind.API_KEY,
                lookup=secrets.digest(key.reveal()),
                created_at=now,
                label=label,
                expires_at=expires_at,
            ),
        )
        return IssuedApiKey(made, key, expires_at)

    async def psk(
        self,
        connection: Connection,
        device: Device,
        now: datetime,
        *,
        assignment: PskAssignment | None = None,
        allow_short: bool = False,
        credential_id: CredentialId | None = None,
        raw: Secret[bytes] | None = None,
    ) -> IssuedPsk:
        """A new PSK of the device. Raises InvalidArgument, and AlreadyExists for an assigned identity that is taken."""
        wish = assignment or PskAssignment()
        made = credential_id or self.credential_id()
        identity = psk.checked_identity(wish.identity) if wish.identity is not None else psk.new_identity(self._random)
        key = raw or Secret(self._random(psk.KEY_BYTES))
        if wish.key is not None:
            key = psk.checked_key(wish.key, allow_short=allow_short)
        await credentials.insert(
            connection,
            NewCredential(
                tenant_id=device.tenant_id,
                device_id=device.device_id,
                credential_id=made,
                kind=CredentialKind.PSK,
                lookup=identity.encode("ascii"),
                created_at=now,
                sealed_key=self._key_ring.seal(key, psk.seal_context(device.tenant_id, made, 1)),
            ),
        )
        return IssuedPsk(made, identity, key)


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
    ) -> None:
        self._database = database
        self._mint = Mint(key_ring, random)
        self._clock = clock
        self._feed = feed
        self._teardown = teardown
        self._issuer = issuer

    async def issue_api_key(
        self, tenant_id: TenantId, device_id: DeviceId, label: str, expires_at: datetime | None, actor: Actor
    ) -> IssuedApiKey:
        """One more API key (CreateAPIKey). `label`: 0–128 characters; `expires_at` in the future.

        Raises NotFound, InvalidArgument, FailedPrecondition (another credential type, a pending device),
        ResourceExhausted (10 living credentials).
        """
        now = self._clock()
        fields.text("label", label, fields.MAX_LABEL, least=0)
        end = fields.future("expires_at", expires_at, now) if expires_at is not None else None
        async with self._database.transaction() as connection:
            device = await self._issuable(connection, tenant_id, device_id, CredentialKind.API_KEY, now)
            issued = await self._mint.api_key(connection, device, now, label=label, expires_at=end)
            await _record_issue(connection, device, issued.credential_id, {"label": label}, actor)
        self._feed.hint()
        return issued

    async def issue_psk(
        self, tenant_id: TenantId, device_id: DeviceId, assignment: PskAssignment, actor: Actor
    ) -> IssuedPsk:
        """One more PSK, generated or assigned. Raises as `issue_api_key`, and AlreadyExists for a taken identity."""
        now = self._clock()
        async with self._database.transaction() as connection:
            device = await self._issuable(connection, tenant_id, device_id, CredentialKind.PSK, now)
            issued = await self._mint.psk(
                connection, device, now, assignment=assignment, allow_short=await allows_short_psk(connection, device)
            )
            await _record_issue(connection, device, issued.credential_id, {"identity": issued.identity}, actor)
        self._feed.hint()
        return issued

    async def register_certificate(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        fingerprint: str,
        not_before: datetime,
        not_after: datetime,
        detail: Mapping[str, Json],
        actor: Actor,
        *,
        overlap: timedelta | None = None,
    ) -> Credential:
        """A certificate of any CA, known by the SHA-256 of its DER (64 hexadecimal digits); nothing else is kept of it
        but `detail` (subject, issuer, serial: for the operator's eyes).

        With `overlap`, a device of another credential type changes to x509, and what it had retires as by a rotation
        of that overlap; without, it is refused. Raises as `issue_api_key`, and AlreadyExists when the certificate is
        already registered for a device.
        """
        now = self._clock()
        found_by = checked_fingerprint(fingerprint)
        new = NewCredential(
            tenant_id=tenant_id,
            device_id=device_id,
            credential_id=self._mint.credential_id(),
            kind=CredentialKind.X509,
            lookup=bytes.fromhex(found_by),
            created_at=now,
            detail=fields.document("detail", detail),
            not_before=fields.instant("not_before", not_before),
            expires_at=fields.future("not_after", not_after, now),
        )
        ended: list[Ended] = []
        async with self._database.transaction() as connection:
            device = _past_pending(await devices.lock(connection, tenant_id, device_id))
            if device.credential_type is CredentialKind.X509 or overlap is None:
                await self._issuable(connection, tenant_id, device_id, CredentialKind.X509, now)
                await credentials.insert(connection, new)
                await _record_issue(connection, device, new.credential_id, {"fingerprint": found_by}, actor)
            else:
                await credentials.insert(connection, new)
                ended = await _retire_for(connection, device, new, now, overlap, actor)
            made = await credentials.get(connection, tenant_id, new.credential_id)
        assert made is not None
        self._feed.hint()
        await asyncio.gather(*(self._teardown.complete(each) for each in ended))
        return made

    async def list(
        self,
        tenant_id: TenantId,
        device_id: DeviceId | None,
        page: Page,
        *,
        kind: CredentialKind | None = None,
    ) -> Listing[Credential]:
        """Credentials without secrets, revoked ones included, oldest first; of one device (NotFound) or of all."""
        after = decode_cursor(page.cursor, datetime, UUID) if page.cursor is not None else None
        async with self._database.connection() as connection:
            if device_id is not None and await devices.get(connection, tenant_id, device_id) is None:
                raise NotFound("no such device in this tenant")
            rows = await credentials.read(connection, tenant_id, device_id, kind, after, page.limit + 1)
        return listing(rows, page, lambda credential: (credential.created_at, credential.credential_id))

    async def rotate(self, tenant_id: TenantId, device_id: DeviceId, request: RotateRequest, actor: Actor) -> Rotated:
        """A fresh credential; the old ones retire as this file's theory says.

        Raises NotFound, InvalidArgument, FailedPrecondition (a pending device; x509 without `csr` or without a CA).
        """
        now = self._clock()
        overlap = _checked_overlap(request)
        kind = await self._kind_to_issue(tenant_id, device_id, request)
        async with (
            preparing(self._issuer, kind, tenant_id, device_id, request.csr, now) as prepared,
            self._database.transaction() as connection,
        ):
            device = _past_pending(await devices.lock(connection, tenant_id, device_id))
            if kind is not (request.credential_type or device.credential_type):
                raise Unavailable("the device's credential type has just changed; try again")
            plan = plan_rotation(await _to_retire(connection, device, now, overlap), now, overlap)
            issued = await self._issue_successor(connection, device, kind, plan, prepared, now)
            if kind is not device.credential_type:
                await devices.set_credential_type(connection, tenant_id, device_id, kind, now)
            for old, end in plan.lingering:
                await credentials.supersede(
                    connection, tenant_id, old.credential_id, issued.credential_id, end, request.retire_on_use
                )
            ended = await end_all(connection, plan.ending, now, "rotated", actor)
            await record_rotation(connection, device, kind, issued.credential_id, plan, now, actor)
        self._feed.hint()
        receipts = await asyncio.gather(*(self._teardown.complete(each) for each in ended))
        return Rotated(issued, plan.retired, plan.valid_until(now), receipts)

    async def usable(self, tenant_id: TenantId, device_id: DeviceId) -> Sequence[CredentialId]:
        """The credentials that the device can do anything with, if only renew them; oldest first."""
        async with self._database.connection() as connection:
            found = await credentials.usable(connection, tenant_id, [device_id], self._clock())
        return [each.credential_id for each in found]

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
        async with self._database.connection() as connection:
            credential = await credentials.get(connection, tenant_id, credential_id)
        if credential is None or device_id not in (None, credential.device_id):
            raise NotFound("no such credential in this tenant" if device_id is None else "no such credential")
        return await self._revoke(credential, actor, reason)

    async def revoke_by_fingerprint(
        self, tenant_id: TenantId, fingerprint: str, actor: Actor, reason: str = "revoked by operator"
    ) -> Receipt:
        """End a certificate by the SHA-256 of its DER (64 hexadecimal digits). As `revoke`."""
        found_by = checked_fingerprint(fingerprint)
        async with self._database.connection() as connection:
            credential = await credentials.by_fingerprint(connection, tenant_id, found_by)
        if credential is None:
            raise NotFound("no certificate with this fingerprint is registered in this tenant")
        return await self._revoke(credential, actor, reason)

    async def _revoke(self, found: Credential, actor: Actor, reason: str) -> Receipt:
        now = self._clock()
        fields.text("reason", reason, fields.MAX_NAME)
        async with self._database.transaction() as connection:
            await devices.lock(connection, found.tenant_id, found.device_id)
            ended = await end_all(connection, [found], now, reason, actor)
            fresh = await credentials.get(connection, found.tenant_id, found.credential_id)
        if not ended:
            before = fresh.revoked_at if fresh and fresh.revoked_at else now
            ended_before = Ended(0, found.tenant_id, before, found.device_id, found.credential_id)
            remaining = await self._teardown.remaining(ended_before)
            return Receipt(found.credential_id, found.device_id, before, remaining=remaining)
        self._feed.hint()
        return await self._teardown.complete(ended[0])

    async def _issuable(
        self, connection: Connection, tenant_id: TenantId, device_id: DeviceId, kind: CredentialKind, now: datetime
    ) -> Device:
        device = _past_pending(await devices.lock(connection, tenant_id, device_id))
        if device.credential_type is not kind:
            raise FailedPrecondition(
                f"the device's credential type is {device.credential_type.value}, not {kind.value}; "
                "rotate its credentials with another credential_type to change it"
            )
        if len(await credentials.living(connection, tenant_id, [device_id], now)) >= MAX_LIVING:
            raise ResourceExhausted(f"the device has {MAX_LIVING} living credentials; revoke one first")
        return device

    async def _kind_to_issue(self, tenant_id: TenantId, device_id: DeviceId, request: RotateRequest) -> CredentialKind:
        """What the successor will be, as the device is now: a certificate is prepared before the transaction."""
        async with self._database.connection() as connection:
            device = await devices.get(connection, tenant_id, device_id)
        if device is None:
            raise NotFound("no such device in this tenant")
        kind = request.credential_type or _past_pending(device).credential_type
        if kind is not CredentialKind.X509 and request.csr is not None:
            raise InvalidArgument(f"csr is for x509; the credential type is {kind.value}", field="csr")
        return kind

    async def _issue_successor(
        self,
        connection: Connection,
        device: Device,
        kind: CredentialKind,
        plan: Rotation,
        prepared: PreparedIssue | None,
        now: datetime,
    ) -> IssuedCredential:
        match kind:
            case CredentialKind.API_KEY:
                return await self._mint.api_key(connection, device, now, label=plan.label)
            case CredentialKind.PSK:
                return await self._mint.psk(connection, device, now)
            case CredentialKind.X509:
                return await issue_certificate(self._issuer, connection, device, prepared, now)
            case _:
                assert_never(kind)


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a rotation does to the credentials that live: `ending` now, `lingering` until the time beside each."""

    ending: Sequence[Credential]
    lingering: Sequence[tuple[Credential, datetime | None]]
    label: str
    """The successor's, taken from the youngest that it takes the place of."""

    @property
    def retired(self) -> list[CredentialId]:
        """All that have an end now."""
        return [c.credential_id for c in self.ending] + [c.credential_id for c, _ in self.lingering]

    def valid_until(self, now: datetime) -> datetime | None:
        """When the last of them stops being valid."""
        if not self.retired:
            return None
        return max((end for _, end in self.lingering if end is not None), default=now)


def plan_rotation(living: Sequence[Credential], now: datetime, overlap: timedelta) -> Rotation:
    """What becomes of the living credentials of a device (oldest first); this file's theory as a function.

    Those with a successor are in an overlap already and keep their end: they end at once only if the successor proved
    to work, or no one would be left who can connect.
    """
    retiring = [c for c in living if c.superseded_by is not None]
    current = [c for c in living if c.superseded_by is None]
    label = next((c.label for c in reversed(current) if c.label), "")
    if not overlap:
        return Rotation(living, [], label)
    made_by_rotation = {c.superseded_by for c in retiring}
    replaced = [c for c in current if c.first_used_at is None and c.credential_id in made_by_rotation]
    keeping = [(c, _earlier(c.expires_at, now + overlap)) for c in current if c not in replaced]
    if keeping and not replaced:
        return Rotation(retiring, keeping, label)
    return Rotation(replaced, [*((c, c.expires_at) for c in retiring), *keeping], label)


@asynccontextmanager
async def preparing(
    issuer: CertificateIssuer | None,
    kind: CredentialKind,
    tenant_id: TenantId,
    device_id: DeviceId,
    csr: bytes | None,
    now: datetime,
) -> AsyncIterator[PreparedIssue | None]:
    """Around the transaction that issues a credential of this kind: a certificate is on record before it is signed.

    None for kinds that need no preparation. What the block did not issue is withdrawn. Raises FailedPrecondition
    without a CA or a request, InvalidArgument, Unavailable.
    """
    if kind is not CredentialKind.X509:
        yield None
        return
    if issuer is None:
        raise FailedPrecondition(
            "credential type x509 needs a csr and a certificate authority; none is configured here"
        )
    if csr is None:
        raise FailedPrecondition("credential type x509 needs a csr, made with the device's own key")
    prepared = await issuer.prepare(tenant_id, device_id, csr, now=now)
    done = False
    try:
        yield prepared
        done = prepared.certificate.spent
    finally:
        if not done:
            await issuer.withdraw(prepared)


async def issue_certificate(
    issuer: CertificateIssuer | None,
    connection: Connection,
    device: Device,
    prepared: PreparedIssue | None,
    now: datetime,
) -> IssuedCertificate:
    """A client certificate for the device, as it was prepared. Raises InvalidArgument (another device's key)."""
    assert issuer is not None
    assert prepared is not None, "a certificate is prepared before the transaction (`preparing`)"
    return await issuer.issue(connection, device, prepared, now=now)


async def allows_short_psk(connection: Connection, device: Device) -> bool:
    """Whether the device's profile takes PSKs of 16 bytes."""
    if device.profile_id is None:
        return False
    profile = await profiles.get(connection, device.tenant_id, device.profile_id)
    return profile is not None and profile.allow_short_psk


def checked_fingerprint(text: str) -> Fingerprint:
    """A SHA-256 fingerprint in lower case. Raises InvalidArgument."""
    if re.fullmatch(r"[0-9A-Fa-f]{64}", text) is None:
        raise InvalidArgument(
            f"fingerprint {fields.shown(text)} is none: the SHA-256 of the certificate's DER has 64 hexadecimal digits",
            field="fingerprint",
        )
    return Fingerprint(text.lower())


async def end_all(
    connection: Connection, ending: Sequence[Credential], now: datetime, reason: str, actor: Actor
) -> list[Ended]:
    """Revoke these in the caller's transaction, which holds their devices' rows; those that had not ended before.

    Duty of the caller: after the commit, `hint` and `Teardown.complete`.
    """
    ended: list[Ended] = []
    for credential in ending:
        event_seq = await credentials.revoke(connection, credential, now, reason, actor)
        if event_seq is None:
            continue
        ended.append(
            Ended(
                event_seq=event_seq,
                tenant_id=credential.tenant_id,
                revoked_at=now,
                device_id=credential.device_id,
                credential_id=credential.credential_id,
                reason="credential revoked",
            )
        )
    return ended


async def _record_issue(
    connection: Connection, device: Device, credential_id: CredentialId, data: Mapping[str, Json], actor: Actor
) -> None:
    told = {"device_id": str(device.device_id), "kind": device.credential_type.value, **data}
    await audit.insert(connection, device.tenant_id, actor, "issue", "credential", str(credential_id), told)
    await events.insert(
        connection,
        NewEvent(
            EventKind.CREDENTIAL_ISSUED,
            device.tenant_id,
            actor,
            device_id=device.device_id,
            credential_id=credential_id,
            data={"kind": device.credential_type.value, **data},
        ),
    )


async def _to_retire(connection: Connection, device: Device, now: datetime, overlap: timedelta) -> list[Credential]:
    """What a rotation concerns. One without overlap is made because somebody else may have the old ones: it ends what
    may still renew itself, too."""
    find = credentials.living if overlap else credentials.usable
    return await find(connection, device.tenant_id, [device.device_id], now)


async def _retire_for(
    connection: Connection, device: Device, new: NewCredential, now: datetime, overlap: timedelta, actor: Actor
) -> list[Ended]:
    """Make `new`'s type the device's, and retire what the device had; what ended at once."""
    present = await _to_retire(connection, device, now, overlap)
    plan = plan_rotation([each for each in present if each.credential_id != new.credential_id], now, overlap)
    await devices.set_credential_type(connection, device.tenant_id, device.device_id, new.kind, now)
    for old, end in plan.lingering:
        await credentials.supersede(connection, device.tenant_id, old.credential_id, new.credential_id, end, False)
    ended = await end_all(connection, plan.ending, now, "rotated", actor)
    await record_rotation(connection, device, new.kind, new.credential_id, plan, now, actor)
    return ended


async def record_rotation(
    connection: Connection,
    device: Device,
    kind: CredentialKind,
    credential_id: CredentialId,
    plan: Rotation,
    now: datetime,
    actor: Actor,
) -> None:
    """Write the audit row and the event of a rotation, in its transaction."""
    until = plan.valid_until(now)
    data = {
        "kind": kind.value,
        "retired": [str(each) for each in plan.retired],
        "valid_until": until.isoformat() if until else None,
    }
    told = {"device_id": str(device.device_id), **data}
    await audit.insert(connection, device.tenant_id, actor, "rotate", "credential", str(credential_id), told)
    await events.insert(
        connection,
        NewEvent(
            EventKind.CREDENTIAL_ROTATED,
            device.tenant_id,
            actor,
            device_id=device.device_id,
            credential_id=credential_id,
            data=data,
        ),
    )


def _checked_overlap(request: RotateRequest) -> timedelta:
    seconds = DEFAULT_OVERLAP_SECONDS if request.overlap_seconds is None else request.overlap_seconds
    if not 0 <= seconds <= MAX_OVERLAP_SECONDS:
        raise InvalidArgument(
            f"overlap_seconds is {seconds}; 0 to {MAX_OVERLAP_SECONDS} are allowed", field="overlap_seconds"
        )
    return timedelta(seconds=seconds)


def _past_pending(device: Device) -> Device:
    if device.status is DeviceStatus.PENDING:
        raise FailedPrecondition("the device is pending; it gets its first credential by its registration token")
    return device


def _earlier(one: datetime | None, other: datetime) -> datetime:
    return other if one is None else min(one, other)
