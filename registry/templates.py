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

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from msgspec import UNSET, UnsetType

from registry.hardware_id import PatternCache
from registry.model import (
    Actor,
    ClosedSession,
    CredentialKind,
    Device,
    Template,
    TemplateStatus,
    TenantId,
)
from registry.paging import Listing, Page
from registry.ports import Clock, EventHint, Teardown
from registry.sealing import KeyRing
from registry.secrets import RandomBytes, Secret
from registry.storage.database import Database


@dataclass(frozen=True, slots=True)
class NewTemplate:
    """A template to be made. Without a pattern every hardware_id may claim; without `expires_at` it never expires."""

    name: str
    profile_id: str | None = None
    hardware_id_pattern: str | None = None
    expires_at: datetime | None = None
    one_time: bool = False
    max_claims: int | None = None
    credential_type: CredentialKind = CredentialKind.API_KEY
    default_groups: Sequence[str] = ()


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
    """

    template: Template
    devices: int
    credentials: int
    revoked_at: datetime
    sessions: list[ClosedSession]
    closed: int
    remaining: int


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
    ) -> None: ...

    async def create(self, tenant_id: TenantId, new: NewTemplate, actor: Actor) -> CreatedTemplate:
        """Raises InvalidArgument (also for a profile that this tenant does not have)."""
        raise NotImplementedError

    async def get(self, tenant_id: TenantId, template_id: str) -> Template:
        """Raises NotFound."""
        raise NotImplementedError

    async def list(self, tenant_id: TenantId, page: Page) -> Listing[Template]:
        """The tenant's templates in the order in which they were made."""
        raise NotImplementedError

    async def update(self, tenant_id: TenantId, template_id: str, changes: TemplateChanges, actor: Actor) -> Template:
        """Raises NotFound, InvalidArgument, FailedPrecondition (`active` while no claim is left)."""
        raise NotImplementedError

    async def delete(self, tenant_id: TenantId, template_id: str, actor: Actor) -> None:
        """Delete the template; its key is unknown from then on. The devices it made stay. Raises NotFound."""
        raise NotImplementedError

    async def devices(self, tenant_id: TenantId, template_id: str, page: Page) -> Listing[Device]:
        """The devices that were claimed with the template's key, oldest first. Raises NotFound."""
        raise NotImplementedError

    async def revoke_devices(self, tenant_id: TenantId, template_id: str, actor: Actor) -> RevokedDevices:
        """Disable the template, then end every credential of the devices that were claimed with its key, in chunks.

        If it fails half-way, what was revoked stays revoked and the template disabled; calling it again goes on.
        Raises NotFound.
        """
        raise NotImplementedError
