"""Device profiles: what devices of one type have in common.

A device takes its anchoring mode, tags and config from its profile when it is made (see devices.py for the rule); a
later change of the profile leaves existing devices as they are. What a profile *allows* (topic grants, short PSKs,
writable fields) is read when it is needed, so a change of those is felt at once.

A profile that devices or templates use cannot be deleted; the foreign keys decide, so no race slips past.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from registry.model import Actor, AnchorMode, DeviceProfile, Json, ProfileId, TenantId
from registry.paging import Listing, Page
from registry.ports import Clock
from registry.secrets import RandomBytes
from registry.storage.database import Database


@dataclass(frozen=True, slots=True)
class NewProfile:
    """A profile to be made. `profile_id` is `[A-Za-z0-9_.-]{1,64}`, or generated as `p_…` when it is None."""

    name: str
    profile_id: str | None = None
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Json] = field(default_factory=dict)
    anchor_mode: AnchorMode | None = None
    components: Sequence[Json] = ()
    telemetry_schema: Mapping[str, Json] = field(default_factory=dict)
    writable_fields: Sequence[str] = ()
    topic_grants: Sequence[Json] = ()
    allow_short_psk: bool = False


@dataclass(frozen=True, slots=True)
class ProfileChanges:
    """What a PUT says: a field that is UNSET stays as it is; None empties it. `profile_id` may only repeat itself."""

    profile_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    tags: Mapping[str, str] | UnsetType | None = UNSET
    config: Mapping[str, Json] | UnsetType | None = UNSET
    anchor_mode: AnchorMode | UnsetType | None = UNSET
    components: Sequence[Json] | UnsetType | None = UNSET
    telemetry_schema: Mapping[str, Json] | UnsetType | None = UNSET
    writable_fields: Sequence[str] | UnsetType | None = UNSET
    topic_grants: Sequence[Json] | UnsetType | None = UNSET
    allow_short_psk: bool | UnsetType = UNSET


class Profiles:
    """Makes, reads, changes and deletes device profiles of one tenant at a time."""

    def __init__(self, database: Database, *, clock: Clock, random: RandomBytes) -> None: ...

    async def create(self, tenant_id: TenantId, new: NewProfile, actor: Actor) -> DeviceProfile:
        """Raises InvalidArgument, and AlreadyExists when the tenant has a profile of this id."""
        raise NotImplementedError

    async def get(self, tenant_id: TenantId, profile_id: str) -> DeviceProfile:
        """Raises NotFound."""
        raise NotImplementedError

    async def list(self, tenant_id: TenantId, page: Page) -> Listing[DeviceProfile]:
        """The tenant's profiles in the order of their ids."""
        raise NotImplementedError

    async def update(
        self, tenant_id: TenantId, profile_id: str, changes: ProfileChanges, actor: Actor
    ) -> DeviceProfile:
        """The profile after the change. Raises NotFound, InvalidArgument."""
        raise NotImplementedError

    async def delete(self, tenant_id: TenantId, profile_id: str, actor: Actor) -> None:
        """Raises NotFound, and FailedPrecondition while devices or templates use it."""
        raise NotImplementedError


def known(profile_id: str) -> ProfileId:
    """`profile_id` as an id, if it can be one. Raises InvalidArgument."""
    raise NotImplementedError
