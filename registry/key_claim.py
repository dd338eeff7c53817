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

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, assert_never

from registry import fields, secrets
from registry.credentials import MAX_LIVING, IssuedApiKey, IssuedCredential, Mint, issue_certificate, preparing
from registry.devices import inherited
from registry.errors import InvalidArgument, Refused, RegistryError, Unavailable
from registry.events import EventKind, NewEvent
from registry.hardware_id import HardwareId, PatternCache, parse_hardware_id
from registry.model import (
    Actor,
    AnchorMode,
    Contact,
    CredentialId,
    CredentialKind,
    Device,
    DeviceId,
    DeviceStatus,
    TemplateId,
    TemplateStatus,
    TenantId,
)
from registry.observation import NOBODY, ClaimOutcome, Observer
from registry.ports import CertificateIssuer, Clock, EventHint, PreparedIssue, RefusalLog
from registry.psk import IssuedPsk, seal_context
from registry.sealing import KeyRing, SealBroken
from registry.secrets import RandomBytes, Secret, SecretKind
from registry.storage import audit, credentials, devices, events, templates
from registry.storage.credentials import UnusedSecret
from registry.storage.database import Connection, Database
from registry.storage.templates import ClaimedBefore, ClaimTerms

MAX_CSR_BYTES: Final = 16 * 1024
"""A request with an RSA key of 8,192 bits and many names stays below 4 KiB."""

_ATTEMPTS: Final = 4
"""Rounds of look and act. A second one follows a lost race; a third needs the template or device to change again."""

_NONCE = re.compile(r"[\x20-\x7e]{16,128}")
_NO_KEY: Final = bytes(32)
"""Compared with when no template was found; SHA-256 of no text that anybody knows."""


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """What a device sends. `nonce`: 16–128 printable ASCII characters, its own and kept until the claim succeeded.

    `csr` (PEM or DER) is for templates of type x509. `proven_template` is set by a transport on which the peer has
    already proved a template's claim PSK; the key must then be that template's. `credential_type` is set where the
    answer can carry one type only (EST: certificates); the template must then be of that type.
    """

    provision_key: Secret[str]
    device_name: str
    hardware_id: str
    nonce: str | None = field(default=None, repr=False)
    csr: bytes | None = field(default=None, repr=False)
    proven_template: TemplateId | None = None
    credential_type: CredentialKind | None = None


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
        observer: Observer = NOBODY,
    ) -> None:
        self._database = database
        self._key_ring = key_ring
        self._mint = Mint(key_ring, random)
        self._clock = clock
        self._random = random
        self._feed = feed
        self._refusals = refusals
        self._patterns = patterns
        self._issuer = issuer
        self._observer = observer

    async def claim(self, request: ClaimRequest, contact: Contact) -> Claimed:
        """Raises InvalidArgument (the form of the request), Refused (uniform), FailedPrecondition (the key is good, the
        template's type is x509 and there is no csr, or no CA), Unavailable."""
        try:
            claimed = await self._claim(request, contact)
        except RegistryError as error:
            outcome = ClaimOutcome.REFUSED if isinstance(error, Refused) else ClaimOutcome.FAILED
            self._observer.claim_handled(contact.transport, outcome)
            raise
        self._observer.claim_handled(
            contact.transport, ClaimOutcome.CREATED if claimed.created else ClaimOutcome.EXISTING
        )
        return claimed

    async def _claim(self, request: ClaimRequest, contact: Contact) -> Claimed:
        hardware_id = _check(request)
        key_hash = secrets.digest(request.provision_key.reveal())
        for _ in range(_ATTEMPTS):
            now = self._clock()
            terms, before = await self._look_up(key_hash, hardware_id, contact)
            objection = self._objection(terms, request, hardware_id, now)
            if objection is not None:
                raise self._refuse(terms, before, hardware_id, objection, contact)
            if before is not None:
                return await self._claimed_before(terms, before, request, hardware_id, now, contact)
            if _exhausted(terms):
                raise self._refuse(terms, None, hardware_id, "no claim left", contact)
            claimed = await self._create(terms, request, hardware_id, now, contact)
            if claimed is not None:
                self._feed.hint()
                return claimed
        raise Unavailable("the claim kept losing races; try again")

    async def _look_up(
        self, key_hash: bytes, hardware_id: HardwareId, contact: Contact
    ) -> tuple[ClaimTerms, ClaimedBefore | None]:
        async with self._database.connection() as connection:
            found = await templates.for_claim(connection, key_hash, hardware_id)
        known = secrets.same(found[0].key_hash if found else _NO_KEY, key_hash)
        if found is None or not known:
            raise self._refuse(None, None, hardware_id, "unknown provisioning key", contact)
        return found

    def _objection(
        self, terms: ClaimTerms, request: ClaimRequest, hardware_id: HardwareId, now: datetime
    ) -> str | None:
        """Why this template takes no claim of this device, whether or not the device exists; None when it does."""
        if request.proven_template is not None and request.proven_template != terms.template_id:
            return "key of another template than the association's"
        if request.credential_type not in (None, terms.credential_type):
            return "template of another credential type than the protocol carries"
        if terms.status is TemplateStatus.DISABLED:
            return "template disabled"
        if terms.expires_at is not None and terms.expires_at <= now:
            return "template expired"
        if terms.hardware_id_pattern is None:
            return None
        if not self._patterns.compile(terms.hardware_id_pattern).matches(hardware_id):
            return "hardware_id outside the pattern"
        return None

    async def _create(
        self, terms: ClaimTerms, request: ClaimRequest, hardware_id: HardwareId, now: datetime, contact: Contact
    ) -> Claimed | None:
        """Make the device, or None when a rival was first or the terms changed: look again."""
        take = templates.consume if terms.limited else templates.hold_terms
        device_id = DeviceId(fields.fresh_uuid(self._random))
        try:
            async with (
                preparing(
                    self._issuer, terms.credential_type, terms.tenant_id, device_id, request.csr, now
                ) as prepared,
                self._database.transaction() as connection,
            ):
                held = await take(connection, terms.tenant_id, terms.template_id)
                if held is None or (held.limited and not terms.limited):
                    return None
                if not terms.limited and held.status is not TemplateStatus.ACTIVE:
                    return None
                if self._objection(held, request, hardware_id, now) is not None:
                    raise _Lost
                if held.credential_type is not terms.credential_type:
                    raise _Lost
                if held.profile_id != terms.profile_id:
                    raise _Lost  # what waited for the change has the template as it is now, but not its profile
                device = self._device(held, device_id, request, hardware_id, now)
                if not await devices.insert(connection, device):
                    raise _Lost
                issued = await self._issue(connection, device, request, prepared, now)
                await _record(connection, device, issued.credential_id, contact)
        except _Lost:
            return None
        return Claimed(device.tenant_id, device.device_id, True, issued, device.credential_type)

    def _device(
        self,
        terms: ClaimTerms,
        device_id: DeviceId,
        request: ClaimRequest,
        hardware_id: HardwareId,
        now: datetime,
    ) -> Device:
        tags, config = inherited(terms.profile_tags, terms.profile_config, {}, {})
        return Device(
            tenant_id=terms.tenant_id,
            device_id=device_id,
            hardware_id=hardware_id,
            name=request.device_name,
            status=DeviceStatus.REGISTERED,
            groups=terms.default_groups,
            tags=tags,
            anchor_mode=terms.profile_anchor_mode or AnchorMode.MERKLE_BATCH,
            profile_id=terms.profile_id,
            site_id=None,
            gateway_id=None,
            firmware=None,
            meta={},
            config=config,
            credential_type=terms.credential_type,
            template_id=terms.template_id,
            created_at=now,
            updated_at=now,
            activated_at=None,
            last_seen_at=None,
        )

    async def _issue(
        self,
        connection: Connection,
        device: Device,
        request: ClaimRequest,
        prepared: PreparedIssue | None,
        now: datetime,
    ) -> IssuedCredential:
        made = self._mint.credential_id()
        raw = self._derived(request, device, made)[0] if request.nonce is not None else None
        match device.credential_type:
            case CredentialKind.API_KEY:
                return await self._mint.api_key(connection, device, now, credential_id=made, raw=raw)
            case CredentialKind.PSK:
                return await self._mint.psk(connection, device, now, credential_id=made, raw=raw)
            case CredentialKind.X509:
                return await issue_certificate(self._issuer, connection, device, prepared, now)
            case _:
                assert_never(device.credential_type)

    async def _claimed_before(
        self,
        terms: ClaimTerms,
        before: ClaimedBefore,
        request: ClaimRequest,
        hardware_id: HardwareId,
        now: datetime,
        contact: Contact,
    ) -> Claimed:
        """Seed 001's idempotent re-claim; with the secret only where it repeats an answer that may have been lost."""
        issued = None
        if before.template_id == terms.template_id and before.status is not DeviceStatus.INACTIVE:
            issued = await self._issued_before(terms.tenant_id, before.device_id, request, now)
        if issued is None and terms.status is TemplateStatus.USED:
            raise self._refuse(terms, before, hardware_id, "template used", contact)
        return Claimed(terms.tenant_id, before.device_id, False, issued, before.credential_type)

    async def _issued_before(
        self, tenant_id: TenantId, device_id: DeviceId, request: ClaimRequest, now: datetime
    ) -> IssuedCredential | None:
        async with self._database.connection() as connection:
            device = await devices.get(connection, tenant_id, device_id)
            if device is None:
                return None
            if device.credential_type is CredentialKind.X509:
                if self._issuer is None or request.csr is None:
                    return None
                return await self._issuer.again(connection, device, request.csr, now=now)
            if request.nonce is None:
                return None
            unused = await credentials.unused(connection, tenant_id, device_id, now, MAX_LIVING)
        return self._repeated(request, device, unused)

    def _repeated(
        self, request: ClaimRequest, device: Device, unused: Sequence[UnusedSecret]
    ) -> IssuedApiKey | IssuedPsk | None:
        """The unused secret that this key and nonce made, under whatever key of the ring. Looks at all of them."""
        found: IssuedApiKey | IssuedPsk | None = None
        for each in unused:
            for raw in self._derived(request, device, each.credential_id):
                found = self._matching(device, each, raw) or found
        return found

    def _matching(self, device: Device, stored: UnusedSecret, raw: Secret[bytes]) -> IssuedApiKey | IssuedPsk | None:
        match stored.kind:
            case CredentialKind.API_KEY:
                key = secrets.encode(SecretKind.API_KEY, raw.reveal())
                if not secrets.same(secrets.digest(key.reveal()), stored.lookup):
                    return None
                return IssuedApiKey(stored.credential_id, key, stored.expires_at)
            case CredentialKind.PSK:
                context = seal_context(device.tenant_id, stored.credential_id, stored.version)
                try:
                    opened = self._key_ring.open(stored.sealed_key or b"", context)
                except SealBroken:
                    return None
                if opened != raw:
                    return None
                return IssuedPsk(stored.credential_id, stored.lookup.decode("ascii"), opened)
            case CredentialKind.X509:
                return None
            case _:
                assert_never(stored.kind)

    def _derived(self, request: ClaimRequest, device: Device, credential_id: CredentialId) -> list[Secret[bytes]]:
        """32 bytes for this claim and credential under each key of the ring, the active one's first.

        Two keys are needed, the ring's and the provisioning key itself, of which the database has neither.
        """
        parts = (
            request.nonce or "",
            str(device.tenant_id),
            device.template_id or "",
            device.hardware_id or "",
            str(device.device_id),
            str(credential_id),
        )
        message = b"".join(len(p.encode()).to_bytes(4, "big") + p.encode() for p in parts)
        material = hmac.digest(request.provision_key.reveal().encode(), message, "sha256")
        return self._key_ring.derivations(b"gatehouse claim secret 1", material)

    def _refuse(
        self,
        terms: ClaimTerms | None,
        before: ClaimedBefore | None,
        hardware_id: HardwareId,
        reason: str,
        contact: Contact,
    ) -> Refused:
        detail = {"hardware_id": str(hardware_id)}
        if terms is not None:
            detail["template_id"] = terms.template_id
        self._refusals.note(
            tenant_id=terms.tenant_id if terms else None,
            device_id=before.device_id if before else None,
            kind=EventKind.PROVISIONING_REFUSED,
            reason=reason,
            contact=contact,
            detail=detail,
        )
        return Refused(reason)


class _Lost(Exception):
    """The transaction of a claim is given up: the device exists, or the terms have changed."""


def _check(request: ClaimRequest) -> HardwareId:
    """The form of a request, whoever sends it. Raises InvalidArgument."""
    fields.text("device_name", request.device_name, fields.MAX_NAME)
    if request.nonce is not None and _NONCE.fullmatch(request.nonce) is None:
        raise InvalidArgument("nonce is not accepted: it takes 16 to 128 printable ASCII characters", field="nonce")
    if request.csr is not None and len(request.csr) > MAX_CSR_BYTES:
        raise InvalidArgument(f"csr has {len(request.csr)} bytes; {MAX_CSR_BYTES} are allowed", field="csr")
    return parse_hardware_id(request.hardware_id)


def _exhausted(terms: ClaimTerms) -> bool:
    if terms.status is not TemplateStatus.ACTIVE or (terms.one_time and terms.counted_claims > 0):
        return True
    return terms.max_claims is not None and terms.counted_claims >= terms.max_claims


async def _record(connection: Connection, device: Device, credential_id: CredentialId, contact: Contact) -> None:
    actor = Actor(f"template:{device.template_id}", contact.correlation_id)
    data = {
        "name": device.name,
        "hardware_id": device.hardware_id,
        "profile_id": device.profile_id,
        "credential_type": device.credential_type.value,
        "template_id": device.template_id,
        "transport": contact.transport.value,
    }
    await audit.insert(connection, device.tenant_id, actor, "claim", "device", str(device.device_id), data)
    await events.insert(
        connection,
        NewEvent(
            EventKind.DEVICE_PROVISIONED,
            device.tenant_id,
            actor,
            device_id=device.device_id,
            credential_id=credential_id,
            data=data,
        ),
    )
