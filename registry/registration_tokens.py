"""Registration tokens (seed 004): one device, named beforehand, comes online by itself with a key of its own.

    create ──► pending ──provision (token + CSR)──► used          the same token and public key: the same certificate
                  │                                   │           again, until the token expires
                  ├── time ──► expired                ├── time ──► spent
                  └── revoke: the token and the       └── revoke: the certificate stays, the token repeats nothing
                      device, which never lived

Creating a token makes the device, `pending`, in one transaction: `device.registered`. Provisioning makes it
`registered`, with its certificate as the only credential: `device.provisioned`. Revoking a token whose device never
provisioned deletes that device too: nothing but the token could ever bring it to life, and a name or hardware_id that
is held by a ghost could not be registered anew. An expired token keeps its device, so that the operator sees in the
list what did not come; revoking it clears both.

Who sends a token that is not good learns nothing: unknown, used, expired and revoked are the same `Refused`, after the
same look-up, whatever the request beside it is like. Only with a good token a bad CSR is InvalidArgument, and the token
stays usable.

Concurrency. Whoever provisions holds the device's row, then reads the token again; so of many that provision at once
the first to hold the row wins. The others find the token used: with the winner's public key they get the winner's
certificate, with another key they are refused. It does not matter on which nodes they are. Their intents, committed
before they could know, are withdrawn. An answer that is lost, a commit's included, is repaired by sending the same
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import Enum
from typing import Final
from uuid import UUID

from registry import fields, secrets
from registry.certificates import Certificates
from registry.credentials import issue_certificate, preparing
from registry.devices import inherited
from registry.errors import InvalidArgument, NotFound, Refused
from registry.events import EventKind, NewEvent
from registry.hardware_id import parse_hardware_id
from registry.model import (
    Actor,
    AnchorMode,
    Contact,
    CredentialKind,
    Device,
    DeviceId,
    DeviceProfile,
    DeviceStatus,
    Json,
    Receipt,
    TenantId,
)
from registry.paging import Listing, Page, decode_cursor, listing
from registry.ports import Clock, EventHint, IssuedCertificate, RefusalLog
from registry.secrets import RandomBytes, Secret, SecretKind
from registry.storage import audit, certificates, credentials, devices, events, profiles, registration_tokens
from registry.storage.database import Connection, Database
from registry.storage.registration_tokens import StoredToken

DEFAULT_TTL_SECONDS: Final = 24 * 3600
MAX_TTL_SECONDS: Final = 90 * 24 * 3600
"""A token that is flashed at the factory and shipped by sea comes online within three months, or is made anew."""

_NO_TOKEN: Final = bytes(32)
"""Compared with when no token was found; SHA-256 of no text that anybody knows."""


class TokenStatus(Enum):
    """Where a listed token is; what was used or revoked is not listed."""

    PENDING = "pending"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class NewToken:
    """What an operator asks for (seed 004). `ttl_seconds`: 1 … 7,776,000 (90 days), None is 24 hours."""

    name: str
    hardware_id: str | None = None
    profile_id: str | None = None
    groups: Sequence[str] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    ttl_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class RegistrationToken:
    """A token as operators see it: without its text."""

    token_id: UUID
    device_id: DeviceId
    name: str
    hardware_id: str | None
    profile_id: str | None
    status: TokenStatus
    created_by: str
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class CreatedToken:
    """A token and its text (`rt_…`), shown once; and its device, which is pending."""

    token: RegistrationToken
    secret: Secret[str]
    device: Device


@dataclass(frozen=True, slots=True)
class Provisioned:
    """The answer to a device. `created` is False where an answer was given again."""

    tenant_id: TenantId
    device_id: DeviceId
    issued: IssuedCertificate
    created: bool


class RegistrationTokens:
    """The tokens of one tenant at a time, and the door for those who hold one."""

    def __init__(
        self,
        database: Database,
        certificates: Certificates,
        *,
        clock: Clock,
        random: RandomBytes,
        feed: EventHint,
        refusals: RefusalLog,
    ) -> None:
        self._database = database
        self._certificates = certificates
        self._clock = clock
        self._random = random
        self._feed = feed
        self._refusals = refusals

    async def create(self, tenant_id: TenantId, new: NewToken, actor: Actor) -> CreatedToken:
        """A token, and with it a pending device.

        Raises InvalidArgument (also for a profile that this tenant does not have), AlreadyExists (hardware_id).
        """
        now = self._clock()
        checked, ttl = _check(new)
        secret = secrets.generate(SecretKind.REGISTRATION_TOKEN, self._random)
        token_id = fields.fresh_uuid(self._random)
        expires_at = now + ttl
        async with self._database.transaction() as connection:
            profile = await _profile(connection, tenant_id, checked.profile_id)
            device = _pending(tenant_id, DeviceId(fields.fresh_uuid(self._random)), checked, profile, now)
            if not await devices.insert(connection, device):
                raise devices.hardware_id_taken(device.hardware_id)
            await registration_tokens.insert(
                connection,
                token_id,
                tenant_id,
                device.device_id,
                device.name,
                secrets.digest(secret.reveal()),
                actor.name,
                now,
                expires_at,
            )
            data = {**_description(device), "origin": "registration_token", "token_id": str(token_id)}
            await audit.insert(connection, tenant_id, actor, "create", "registration_token", str(token_id), data)
            await _tell(connection, EventKind.DEVICE_REGISTERED, device, actor, data)
        self._feed.hint()
        token = RegistrationToken(
            token_id=token_id,
            device_id=device.device_id,
            name=device.name,
            hardware_id=device.hardware_id,
            profile_id=device.profile_id,
            status=TokenStatus.PENDING,
            created_by=actor.name,
            created_at=now,
            expires_at=expires_at,
        )
        return CreatedToken(token, secret, device)

    async def list(self, tenant_id: TenantId, page: Page) -> Listing[RegistrationToken]:
        """Tokens that wait for their device, those that waited in vain (`expired`) included, oldest first."""
        now = self._clock()
        after = decode_cursor(page.cursor, datetime, UUID) if page.cursor is not None else None
        async with self._database.connection() as connection:
            rows = await registration_tokens.read_open(connection, tenant_id, after, page.limit + 1)
        return listing([_shown(row, now) for row in rows], page, lambda token: (token.created_at, token.token_id))

    async def revoke(self, tenant_id: TenantId, token_id: UUID, actor: Actor) -> Receipt:
        """End a token; a device that never provisioned goes with it. A token opens no sessions, so none are closed.

        Again: NotFound, or nothing. Raises NotFound.
        """
        now = self._clock()
        async with self._database.transaction() as connection:
            token = await registration_tokens.get(connection, tenant_id, token_id)
            if token is None:
                raise _unknown()
            try:
                device = await devices.lock(connection, tenant_id, token.device_id)
            except NotFound:
                raise _unknown() from None
            data: dict[str, Json] = {"device_id": str(device.device_id), "device_deleted": _never_lived(device)}
            await audit.insert(connection, tenant_id, actor, "revoke", "registration_token", str(token_id), data)
            if _never_lived(device):
                await devices.delete(connection, tenant_id, device.device_id, now)
                await _tell(connection, EventKind.DEVICE_DELETED, device, actor, _description(device))
            else:
                await registration_tokens.revoke(connection, tenant_id, token_id, now)
        self._feed.hint()
        return Receipt(None, device.device_id, now)

    async def provision(self, token: Secret[str], csr: bytes, contact: Contact) -> Provisioned:
        """A device makes itself known: token and CSR (PEM or DER) in, certificate out.

        Raises Refused (uniform), InvalidArgument (the token is good, the request is not: the token stays usable),
        FailedPrecondition (no authority can sign now), Unavailable.
        """
        now = self._clock()
        token_hash = secrets.digest(token.reveal())
        async with self._database.connection() as connection:
            found = await registration_tokens.by_hash(connection, token_hash)
        if not secrets.same(found.token_hash if found else _NO_TOKEN, token_hash) or found is None:
            raise self._refuse(None, "unknown registration token", contact)
        objection = _objection(found, now)
        if objection is not None:
            raise self._refuse(found, objection, contact)
        if found.used_at is not None:
            return await self._again(found, csr, now, contact)
        provisioned = await self._provision(found, csr, now, contact)
        if provisioned is None:
            return await self._again(found, csr, now, contact)
        self._feed.hint()
        return provisioned

    async def _provision(self, found: StoredToken, csr: bytes, now: datetime, contact: Contact) -> Provisioned | None:
        """Use the token; None when a rival was first."""
        actor = Actor(f"device:{found.device_id}", contact.correlation_id)
        issuer, kind = self._certificates, CredentialKind.X509
        async with (
            preparing(issuer, kind, found.tenant_id, found.device_id, csr, now) as prepared,
            self._database.transaction() as connection,
        ):
            try:
                device = await devices.lock(connection, found.tenant_id, found.device_id)
            except NotFound:
                raise self._refuse(None, "device deleted", contact) from None
            token = await registration_tokens.get(connection, found.tenant_id, found.token_id)
            objection = "device deleted" if token is None else _objection(token, now)
            if objection is not None:
                raise self._refuse(found, objection, contact)
            if token is not None and token.used_at is not None:
                return None
            if not _never_lived(device):
                raise self._refuse(found, "device is not pending", contact)
            issued = await issue_certificate(issuer, connection, device, prepared, now)
            registered = replace(device, status=DeviceStatus.REGISTERED, updated_at=now)
            await devices.update(connection, registered)
            await registration_tokens.use(connection, found.tenant_id, found.token_id, issued.credential_id, now)
            data = {
                **_description(registered),
                "token_id": str(found.token_id),
                "fingerprint": issued.fingerprint,
                "transport": contact.transport.value,
            }
            await audit.insert(connection, device.tenant_id, actor, "provision", "device", str(device.device_id), data)
            await events.insert(
                connection,
                NewEvent(
                    EventKind.DEVICE_PROVISIONED,
                    device.tenant_id,
                    actor,
                    device_id=device.device_id,
                    credential_id=issued.credential_id,
                    data=data,
                ),
            )
        return Provisioned(found.tenant_id, found.device_id, issued, True)

    async def _again(self, found: StoredToken, csr: bytes, now: datetime, contact: Contact) -> Provisioned:
        """The answer that was given before, to the same public key only."""
        try:
            spki = bytes.fromhex(self._certificates.checked(csr).spki_sha256)
        except InvalidArgument:
            raise self._refuse(found, "token used", contact) from None
        async with self._database.connection() as connection:
            token = await registration_tokens.get(connection, found.tenant_id, found.token_id)
            if token is None or token.credential_id is None or token.revoked_at is not None:
                raise self._refuse(found, "token revoked", contact)
            device = await devices.get(connection, token.tenant_id, token.device_id)
            stored = await certificates.of_credential(connection, token.tenant_id, token.credential_id)
            credential = await credentials.get(connection, token.tenant_id, token.credential_id)
        if stored is None or not secrets.same(stored.spki_sha256, spki):
            raise self._refuse(found, "token used", contact)
        if device is None or device.status is DeviceStatus.INACTIVE:
            raise self._refuse(found, "device inactive", contact)
        ended = credential is None or credential.revoked_at is not None
        if ended or (credential is not None and credential.expires_at is not None and credential.expires_at <= now):
            raise self._refuse(found, "certificate revoked or expired", contact)
        return Provisioned(token.tenant_id, token.device_id, self._certificates.issued_before(stored), False)

    def _refuse(self, found: StoredToken | None, reason: str, contact: Contact) -> Refused:
        self._refusals.note(
            tenant_id=found.tenant_id if found else None,
            device_id=found.device_id if found else None,
            kind=EventKind.PROVISIONING_REFUSED,
            reason=reason,
            contact=contact,
            detail={"token_id": str(found.token_id)} if found else {},
        )
        return Refused(reason)


def _objection(token: StoredToken, now: datetime) -> str | None:
    """Why a token is not good, whatever comes with it; being used is judged with the request's key."""
    if token.revoked_at is not None:
        return "token revoked"
    if token.expires_at <= now:
        return "token expired"
    return None


def _never_lived(device: Device) -> bool:
    return device.status is DeviceStatus.PENDING


def _check(new: NewToken) -> tuple[NewToken, timedelta]:
    seconds = DEFAULT_TTL_SECONDS if new.ttl_seconds is None else new.ttl_seconds
    if not 1 <= seconds <= MAX_TTL_SECONDS:
        raise InvalidArgument(f"ttl_seconds is {seconds}; 1 to {MAX_TTL_SECONDS} are allowed", field="ttl_seconds")
    checked = replace(
        new,
        name=fields.text("name", new.name, fields.MAX_NAME),
        hardware_id=parse_hardware_id(new.hardware_id) if new.hardware_id is not None else None,
        profile_id=fields.identifier("profile_id", new.profile_id) if new.profile_id is not None else None,
        groups=fields.names("groups", new.groups),
        tags=fields.tags("tags", new.tags),
    )
    return checked, timedelta(seconds=seconds)


async def _profile(connection: Connection, tenant_id: TenantId, profile_id: str | None) -> DeviceProfile | None:
    if profile_id is None:
        return None
    profile = await profiles.get(connection, tenant_id, profile_id)
    if profile is None:
        raise InvalidArgument(f'profile_id "{profile_id}" is not a profile of this tenant', field="profile_id")
    return profile


def _pending(
    tenant_id: TenantId, device_id: DeviceId, new: NewToken, profile: DeviceProfile | None, now: datetime
) -> Device:
    tags, config = inherited(profile.tags if profile else {}, profile.config if profile else {}, new.tags, {})
    return Device(
        tenant_id=tenant_id,
        device_id=device_id,
        hardware_id=new.hardware_id,
        name=new.name,
        status=DeviceStatus.PENDING,
        groups=[*new.groups],
        tags=tags,
        anchor_mode=(profile.anchor_mode if profile else None) or AnchorMode.MERKLE_BATCH,
        profile_id=profile.profile_id if profile else None,
        site_id=None,
        gateway_id=None,
        firmware=None,
        meta={},
        config=config,
        credential_type=CredentialKind.X509,
        template_id=None,
        created_at=now,
        updated_at=now,
        activated_at=None,
        last_seen_at=None,
    )


def _description(device: Device) -> dict[str, Json]:
    return {
        "name": device.name,
        "hardware_id": device.hardware_id,
        "profile_id": device.profile_id,
        "credential_type": device.credential_type.value,
    }


async def _tell(
    connection: Connection, kind: EventKind, device: Device, actor: Actor, data: Mapping[str, Json]
) -> None:
    await events.insert(connection, NewEvent(kind, device.tenant_id, actor, device_id=device.device_id, data=data))


def _shown(row: StoredToken, now: datetime) -> RegistrationToken:
    return RegistrationToken(
        token_id=row.token_id,
        device_id=row.device_id,
        name=row.name,
        hardware_id=row.hardware_id,
        profile_id=row.profile_id,
        status=TokenStatus.EXPIRED if row.expires_at <= now else TokenStatus.PENDING,
        created_by=row.created_by,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def _unknown() -> NotFound:
    return NotFound("no such registration token in this tenant")
