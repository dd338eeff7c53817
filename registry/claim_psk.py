"""The claim PSKs of templates (CONTRACT §4): who may come in over DTLS to provision.

    identity `claim-<template id>` ─► offer ─► key ─► handshake ─► confirm ─► TemplateId ─► key_claim, `proven_template`

A handshake with a claim PSK proves that the peer knows the provisioning key; it makes nobody a device and opens no
session. Whether a claim is taken is decided by the claim (key_claim.py), with the provisioning key in its body.

As with devices' PSKs, every identity is offered a key. A template that is unknown, disabled or expired gets a random
one, after the same reading and the same opening of a seal, so that it fails exactly as a wrong key does. A one-time
template that is used does so too, except while the credential that it made has never been used: then the answer may
have been lost, and the device must be able to come and ask again. A template that has made its `max_claims` devices
stays open, because those may claim again; a further one is refused by the claim.

Nothing is remembered between handshakes: what a handshake gets is what the database says then. An association that is
up already is not closed when its template is disabled; its next claim is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from registry.batching import Batcher
from registry.errors import Unauthenticated
from registry.events import EventKind
from registry.model import Contact, TemplateId, TemplateStatus, TenantId
from registry.ports import Clock, RefusalLog
from registry.psk import CLAIM_PREFIX
from registry.sealing import KeyRing, SealBroken
from registry.secrets import SECRET_BYTES, RandomBytes, Secret
from registry.storage import templates
from registry.storage.database import Database
from registry.storage.templates import ClaimPskState
from registry.templates import claim_psk_context

_LOOKUP_BATCH: Final = 128
_LOOKUP_QUEUE: Final = 10_000
"""Waiting look-ups: more handshakes than the DTLS shell lets be in flight."""
_NOBODYS: Final = TenantId(templates.NOBODY), TemplateId("")
"""Whose the decoy is: what is opened for identities that nobody has."""


@dataclass(frozen=True, slots=True)
class ClaimOffer:
    """A key for a handshake that has not proved anything yet; `ClaimPsks.confirm` must follow."""

    key: Secret[bytes]
    tenant_id: TenantId | None = field(repr=False)
    template_id: TemplateId | None = field(repr=False)


def is_claim_identity(identity: bytes) -> bool:
    """Whether a PSK identity is a template's and not a device's."""
    return identity.startswith(CLAIM_PREFIX.encode())


class ClaimPsks:
    """Gives the keys of claim associations; holds no state but a decoy."""

    def __init__(
        self, database: Database, ring: KeyRing, refusals: RefusalLog, *, clock: Clock, random: RandomBytes
    ) -> None:
        self._database = database
        self._ring = ring
        self._refusals = refusals
        self._clock = clock
        self._random = random
        self._decoy = ring.seal(Secret(random(SECRET_BYTES)), claim_psk_context(*_NOBODYS))
        self._lookups: Batcher[str, ClaimPskState | None] = Batcher(
            "claim psk look-up", self._look_up, max_items=_LOOKUP_BATCH, max_queued=_LOOKUP_QUEUE
        )

    async def offer(self, identity: bytes, contact: Contact) -> ClaimOffer:
        """A key to run the handshake of a claim identity with, known or not. Raises Unavailable only."""
        template_id = identity.removeprefix(CLAIM_PREFIX.encode()).decode("ascii", "replace").replace("\0", "?")
        state = await self._lookups.submit(template_id)
        stand_in: Secret[bytes] = Secret(self._random(SECRET_BYTES))
        if state is None:
            self._ring.open(self._decoy, claim_psk_context(*_NOBODYS))
            self._note_behind(None, "unknown claim psk", contact)
            return ClaimOffer(stand_in, None, None)
        try:
            key = self._ring.open(state.sealed_claim_psk, claim_psk_context(state.tenant_id, state.template_id))
        except SealBroken as broken:
            self._note_behind(state, f"sealed claim psk does not open: {broken}", contact)
            return ClaimOffer(stand_in, None, None)
        objection = self._objection(state)
        if objection is not None:
            self._note_behind(state, objection, contact)
            return ClaimOffer(stand_in, None, None)
        return ClaimOffer(key, state.tenant_id, state.template_id)

    def confirm(self, offer: ClaimOffer) -> TemplateId:
        """The template whose key a verified handshake has proved. Raises Unauthenticated."""
        if offer.template_id is None:
            raise Unauthenticated("claim psk without a template")
        return offer.template_id

    def unproven(self, offer: ClaimOffer, contact: Contact) -> None:
        """Note for the operator that a handshake did not verify under an offer's key: the peer has another one.

        Duty of the caller: the peer has been answered. An offer without a template has been noted already.
        """
        if offer.template_id is not None:
            self._note(offer.tenant_id, offer.template_id, "claim psk does not verify", contact)

    async def stop(self) -> None:
        """Finish what is under way."""
        await self._lookups.stop()

    async def _look_up(self, wanted: Sequence[str]) -> Sequence[ClaimPskState | None]:
        async with self._database.connection() as connection:
            return await templates.claim_psks(connection, wanted)

    def _objection(self, state: ClaimPskState) -> str | None:
        if state.status is TemplateStatus.DISABLED:
            return "template disabled"
        if state.expires_at is not None and state.expires_at <= self._clock():
            return "template expired"
        if state.status is TemplateStatus.USED and not state.repeatable:
            return "template used"
        return None

    def _note_behind(self, state: ClaimPskState | None, reason: str, contact: Contact) -> None:
        """Behind the caller's next step, which answers the peer: so the note takes none of the peer's time."""
        tenant_id = None if state is None else state.tenant_id
        template_id = None if state is None else state.template_id
        asyncio.get_running_loop().call_soon(self._note, tenant_id, template_id, reason, contact)

    def _note(self, tenant_id: TenantId | None, template_id: TemplateId | None, reason: str, contact: Contact) -> None:
        self._refusals.note(
            tenant_id=tenant_id,
            device_id=None,
            kind=EventKind.PROVISIONING_REFUSED,
            reason=reason,
            contact=contact,
            detail={"template_id": template_id} if template_id else {},
        )
