"""Provisioning templates and the keys they issue (seed 001).

Theory. A template says what whoever holds its key may claim. The key is shown once; its SHA-256 finds the template.

    active ⇄ disabled          by the operator
    active → used              by the one claim of a one-time template, in the claim's transaction
    used → active | disabled   by the operator, `active` only where a claim is left (`one_time` was taken back)

`max_claims` bounds how many devices may be *made* with the key; reaching it leaves the template active, so that those
devices may still re-claim. Claims are counted in the row only where `one_time` or `max_claims` needs it; otherwise
they are the devices that name the template, and claims do not queue behind one another for a counter.

A claim holds a shared lock (FOR KEY SHARE, as its foreign key does anyway) on the template's row until it commits; who
changes or disables the template takes the exclusive one. So when `update` or `revoke_devices` goes on, every claim
under the old terms has committed and is seen, and every later one sees the new terms.

The claim PSK of CoAP (CONTRACT §4) is derived from the key, so it must be derived when the key is seen, at creation; it
rests sealed.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import UNSET, UnsetType

from registry import fields, secrets
from registry.credentials import end_all
from registry.devices import cursor_key
from registry.errors import FailedPrecondition, InvalidArgument, NotFound
from registry.hardware_id import PatternCache
from registry.model import (
    Actor,
    ClosedSession,
    CredentialKind,
    Device,
    DeviceId,
    Json,
    ProfileId,
    Receipt,
    Template,
    TemplateId,
    TemplateStatus,
    TenantId,
)
from registry.paging import Listing, Page, decode_cursor, listing
from registry.ports import Clock, Ended, EventHint, Teardown
from registry.sealing import KeyRing, SealContext
from registry.secrets import RandomBytes, Secret, SecretKind
from registry.storage import audit, credentials, devices, templates
from registry.storage.database import Database
from registry.storage.devices import FIRST, DeviceQuery

CLAIM_PSK_INFO = b"gatehouse claim psk"
"""HKDF's info for the claim PSK (CONTRACT §4)."""
MAX_CLAIMS = 2**31 - 1
"""What the column holds; nobody makes more devices with one key."""

DEVICES_AT_ONCE = 100
"""Devices in one transaction of `revoke_devices` and of `delete`: some milliseconds of locks."""
RECEIPTS_AWAITED = 1000
"""Credentials whose sessions `revoke_devices` waits for; the feed closes the others' sessions just the same."""
SESSIONS_NAMED = 1000
"""Closed sessions in one answer; more is for `GET /events`."""
RECEIPTS_AT_ONCE = 16
RECEIPTS_SECONDS = 10.0
"""How long the operator waits for all of those receipts together."""


@dataclass(frozen=True, slots=True)
class NewTemplate:
    """A template to be made. Without a pattern every hardware_id may claim; without `expires_at` it never expires.
    `status` may be active, or disabled until somebody sets it to active."""

    name: str
    profile_id: str | None = None
    hardware_id_pattern: str | None = None
    expires_at: datetime | None = None
    one_time: bool = False
    max_claims: int | None = None
    credential_type: CredentialKind = CredentialKind.API_KEY
    default_groups: Sequence[str] = ()
    status: TemplateStatus = TemplateStatus.ACTIVE


@dataclass(frozen=True, slots=True)
class CreatedTemplate:
    """A template and its key (`pk_…`), shown once."""

    template: Template
    provision_key: Secret[str]


@dataclass(frozen=True, slots=True)
class TemplateChanges:
    """What a PUT says: a field that is UNSET stays as it is; None takes the restriction away. `status` may be set to
    active or disabled; `template_id` may only repeat itself."""

    template_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    profile_id: str | UnsetType | None = UNSET
    hardware_id_pattern: str | UnsetType | None = UNSET
    expires_at: datetime | UnsetType | None = UNSET
    one_time: bool | UnsetType = UNSET
    max_claims: int | UnsetType | None = UNSET
    credential_type: CredentialKind | UnsetType = UNSET
    default_groups: Sequence[str] | UnsetType | None = UNSET
    status: TemplateStatus | UnsetType = UNSET


@dataclass(frozen=True, slots=True)
class RevokedDevices:
    """What `revoke_devices` did: over how many devices, how many credentials it ended and which sessions it closed.

    `sessions` names the first thousand; `closed` counts all; `remaining` those that no node has confirmed as closed.
    `unconfirmed` counts the credentials whose receipts were not awaited, because there were too many or it took too
    long: every node closes their sessions all the same.
    """

    template: Template
    devices: int
    credentials: int
    revoked_at: datetime
    sessions: list[ClosedSession]
    closed: int
    remaining: int
    unconfirmed: int = 0


class Templates:
    """The provisioning templates of one tenant at a time."""

    def __init__(
        self,
        database: Database,
        *,
        key_ring: KeyRing,
        clock: Clock,
        random: RandomBytes,
        feed: EventHint,
        teardown: Teardown,
        patterns: PatternCache,
    ) -> None:
        self._database = database
        self._key_ring = key_ring
        self._clock = clock
        self._random = random
        self._feed = feed
        self._teardown = teardown
        self._patterns = patterns

    async def create(self, tenant_id: TenantId, new: NewTemplate, actor: Actor) -> CreatedTemplate:
        """Raises InvalidArgument (also for a profile that this tenant does not have)."""
        now = self._clock()
        template = Template(
            tenant_id=tenant_id,
            template_id=new_template_id(self._random),
            name=fields.text("name", new.name, fields.MAX_NAME),
            profile_id=_profile_id(new.profile_id),
            hardware_id_pattern=self._pattern(new.hardware_id_pattern),
            expires_at=fields.future("expires_at", new.expires_at, now) if new.expires_at is not None else None,
            one_time=new.one_time,
            max_claims=_checked_max_claims(new.max_claims),
            claims=0,
            credential_type=new.credential_type,
            default_groups=fields.names("default_groups", new.default_groups),
            status=TemplateStatus.ACTIVE,
            created_by=actor.name,
            created_at=now,
            updated_at=now,
        )
        template = replace(template, status=_status(template, new.status))
        key = secrets.generate(SecretKind.PROVISIONING_KEY, self._random)
        sealed = self._key_ring.seal(claim_psk(key), claim_psk_context(tenant_id, template.template_id))
        async with self._database.transaction() as connection:
            await templates.insert(connection, template, secrets.digest(key.reveal()), sealed)
            await audit.insert(connection, tenant_id, actor, "create", "provisioning_template", template.template_id)
        return CreatedTemplate(template, key)

    async def get(self, tenant_id: TenantId, template_id: str) -> Template:
        """Raises NotFound."""
        async with self._database.connection() as connection:
            template = await templates.get(connection, tenant_id, _storable(template_id))
        if template is None:
            raise _unknown()
        return template

    async def list(self, tenant_id: TenantId, page: Page) -> Listing[Template]:
        """The tenant's templates in the order in which they were made."""
        after = decode_cursor(page.cursor, datetime, str) if page.cursor is not None else None
        async with self._database.connection() as connection:
            rows = await templates.read(connection, tenant_id, after, page.limit + 1)
        return listing(rows, page, lambda template: (template.created_at, template.template_id))

    async def update(self, tenant_id: TenantId, template_id: str, changes: TemplateChanges, actor: Actor) -> Template:
        """Raises NotFound, InvalidArgument, FailedPrecondition (`active` while no claim is left)."""
        now = self._clock()
        async with self._database.transaction() as connection:
            before = await templates.lock(connection, tenant_id, _storable(template_id))
            after = self._changed(before, changes, now)
            if after == before:
                return before
            after = replace(after, updated_at=now)
            await templates.update(connection, after)
            await audit.insert(
                connection,
                tenant_id,
                actor,
                "update",
                "provisioning_template",
                template_id,
                {"changed": fields.differing(before, after)},
            )
        return after

    async def delete(self, tenant_id: TenantId, template_id: str, actor: Actor) -> None:
        """Delete the template; its key is unknown from then on. The devices it made stay; they forget it in chunks.

        If it fails half-way the template is disabled; calling it again goes on. Raises NotFound.
        """
        while not await self._forgotten(tenant_id, template_id, actor):
            pass

    async def _forgotten(self, tenant_id: TenantId, template_id: str, actor: Actor) -> bool:
        """A chunk of the devices forget the template, and with the last ones it goes; whether it has gone."""
        async with self._database.transaction() as connection:
            status = await templates.hold(connection, tenant_id, _storable(template_id))
            if status is None:
                raise _unknown()
            chunk = await devices.lock_claimed(connection, tenant_id, template_id, FIRST, DEVICES_AT_ONCE)
            await devices.forget_template(connection, tenant_id, template_id, [device_id for _, device_id in chunk])
            if len(chunk) < DEVICES_AT_ONCE:
                await templates.delete(connection, tenant_id, template_id)
                await audit.insert(connection, tenant_id, actor, "delete", "provisioning_template", template_id)
                return True
            if status is not TemplateStatus.DISABLED:  # no claim is to come behind
                await templates.disable(connection, tenant_id, template_id, self._clock())
                detail: dict[str, Json] = {"changed": ["status"]}
                await audit.insert(connection, tenant_id, actor, "update", "provisioning_template", template_id, detail)
            return False

    async def devices(self, tenant_id: TenantId, template_id: str, page: Page) -> Listing[Device]:
        """The devices that were claimed with the template's key, oldest first. Raises NotFound."""
        template = await self.get(tenant_id, template_id)
        after = decode_cursor(page.cursor, datetime, UUID) if page.cursor is not None else None
        query = DeviceQuery(template_id=template.template_id)
        async with self._database.connection() as connection:
            rows = await devices.read(connection, tenant_id, query, after, page.limit + 1)
        return listing(rows, page, cursor_key)

    async def revoke_devices(self, tenant_id: TenantId, template_id: str, actor: Actor) -> RevokedDevices:
        """Disable the template, then end every credential of the devices that were claimed with its key, in chunks.

        If it fails half-way, what was revoked stays revoked and the template disabled; calling it again goes on.
        Raises NotFound.
        """
        now = self._clock()
        template = await self._disable(tenant_id, template_id, now, actor)
        awaited: list[Ended] = []
        seen = revoked = 0
        last = FIRST
        while True:
            chunk, ended = await self._revoke_chunk(template, last, now, actor)
            seen, revoked = seen + len(chunk), revoked + len(ended)
            awaited += ended[: RECEIPTS_AWAITED - len(awaited)]
            if len(chunk) < DEVICES_AT_ONCE:
                break
            last = chunk[-1]
        receipts = await self._receipts(awaited)
        sessions = [session for receipt in receipts for session in receipt.sessions]
        return RevokedDevices(
            template=template,
            devices=seen,
            credentials=revoked,
            revoked_at=now,
            sessions=sessions[:SESSIONS_NAMED],
            closed=len(sessions),
            remaining=sum(receipt.remaining for receipt in receipts),
            unconfirmed=revoked - len(receipts),
        )

    async def _disable(self, tenant_id: TenantId, template_id: str, now: datetime, actor: Actor) -> Template:
        async with self._database.transaction() as connection:
            before = await templates.lock(connection, tenant_id, _storable(template_id))
            disabled = replace(before, status=TemplateStatus.DISABLED, updated_at=now)
            await templates.update(connection, disabled)
            await audit.insert(connection, tenant_id, actor, "revoke_devices", "provisioning_template", template_id)
        return disabled

    async def _revoke_chunk(
        self, template: Template, after: tuple[datetime, UUID], now: datetime, actor: Actor
    ) -> tuple[Sequence[tuple[datetime, DeviceId]], Sequence[Ended]]:
        async with self._database.transaction() as connection:
            chunk = await devices.lock_claimed(
                connection, template.tenant_id, template.template_id, after, DEVICES_AT_ONCE
            )
            device_ids = [device_id for _, device_id in chunk]
            usable = await credentials.usable(connection, template.tenant_id, device_ids, now)
            ended = await end_all(connection, usable, now, "template's devices revoked", actor)
        if ended:
            self._feed.hint()
        return chunk, ended

    async def _receipts(self, ended: Sequence[Ended]) -> Sequence[Receipt]:
        """The receipts that come in time; those that do not are left to the feed."""
        if not ended:
            return []
        turn = asyncio.Semaphore(RECEIPTS_AT_ONCE)

        async def complete(one: Ended) -> Receipt:
            async with turn:
                return await self._teardown.complete(one)

        tasks = [asyncio.create_task(complete(each)) for each in ended]
        try:
            done, _ = await asyncio.wait(tasks, timeout=RECEIPTS_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
        return [task.result() for task in tasks if task in done]

    def _pattern(self, pattern: str | None) -> str | None:
        return None if pattern is None else self._patterns.compile(pattern).text

    def _changed(self, before: Template, changes: TemplateChanges, now: datetime) -> Template:
        """The template as `changes` wants it. Raises InvalidArgument, FailedPrecondition."""
        after = before
        if changes.template_id is not UNSET and changes.template_id != before.template_id:
            raise InvalidArgument("template_id cannot be changed", field="template_id")
        if changes.name is not UNSET:
            after = replace(after, name=fields.text("name", changes.name, fields.MAX_NAME))
        if changes.profile_id is not UNSET:
            after = replace(after, profile_id=_profile_id(changes.profile_id))
        if changes.hardware_id_pattern is not UNSET:
            after = replace(after, hardware_id_pattern=self._pattern(changes.hardware_id_pattern))
        if changes.expires_at is not UNSET and changes.expires_at != before.expires_at:
            end = changes.expires_at
            after = replace(after, expires_at=fields.instant("expires_at", end) if end is not None else None)
        if changes.one_time is not UNSET:
            after = replace(after, one_time=changes.one_time)
        if changes.max_claims is not UNSET:
            after = replace(after, max_claims=_checked_max_claims(changes.max_claims))
        if changes.credential_type is not UNSET:
            after = replace(after, credential_type=changes.credential_type)
        if changes.default_groups is not UNSET:
            after = replace(after, default_groups=fields.names("default_groups", changes.default_groups or ()))
        return replace(after, status=_status(after, changes.status))


def new_template_id(random: RandomBytes) -> TemplateId:
    """26 characters of a–z and 2–7 for 128 random bits, so that `claim-<template id>` fits a PSK identity."""
    return TemplateId(base64.b32encode(random(16)).decode().rstrip("=").lower())


def claim_psk(provision_key: Secret[str]) -> Secret[bytes]:
    """The 32-byte PSK of a template's claim association (CONTRACT §4): HKDF-SHA256 (RFC 5869) without salt, over the
    provisioning key's text as it is shown."""
    derive = HKDF(algorithm=SHA256(), length=32, salt=None, info=CLAIM_PSK_INFO)
    return Secret(derive.derive(provision_key.reveal().encode()))


def claim_psk_context(tenant_id: TenantId, template_id: TemplateId) -> SealContext:
    """What a template's sealed claim PSK is bound to."""
    return SealContext("claim-psk", str(tenant_id), template_id)


def _status(after: Template, wanted: TemplateStatus | UnsetType) -> TemplateStatus:
    """The status that fits: a one-time template that has had its claim is never active."""
    spent = after.one_time and after.claims > 0
    if wanted is UNSET or wanted is after.status:
        return TemplateStatus.USED if spent and after.status is TemplateStatus.ACTIVE else after.status
    if wanted is TemplateStatus.USED:
        raise InvalidArgument("status can be set to active or disabled; a claim makes it used", field="status")
    if wanted is TemplateStatus.ACTIVE and spent:
        raise FailedPrecondition("the one-time key has been used; take one_time back to set the status to active")
    return wanted


def _checked_max_claims(max_claims: int | None) -> int | None:
    if max_claims is not None and not 1 <= max_claims <= MAX_CLAIMS:
        raise InvalidArgument(f"max_claims is {max_claims}; 1 to {MAX_CLAIMS} are allowed", field="max_claims")
    return max_claims


def _profile_id(profile_id: str | None) -> ProfileId | None:
    return None if profile_id is None else ProfileId(fields.identifier("profile_id", profile_id))


def _storable(template_id: str) -> str:
    """An id of a path: what cannot be one is simply not found."""
    try:
        return fields.identifier("template_id", template_id)
    except InvalidArgument:
        raise _unknown() from None


def _unknown() -> NotFound:
    return NotFound("no such provisioning template in this tenant")
