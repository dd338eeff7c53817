"""Device profiles: what devices of one type have in common.

A device takes its anchoring mode, tags and config from its profile when it is made (see devices.py for the rule); a
later change of the profile leaves existing devices as they are. What a profile *allows* (topic grants, short PSKs,
writable fields) is read when it is needed, so a change of those is felt at once.

So every change of one is an event with the names of the fields that changed: nodes follow it as they do a revocation.

A profile that devices or templates use cannot be deleted; the foreign keys decide, so no race slips past.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from msgspec import UNSET, UnsetType

from registry import fields
from registry.errors import AlreadyExists, InvalidArgument, NotFound
from registry.events import EventKind, NewEvent
from registry.model import Actor, AnchorMode, DeviceProfile, Json, ProfileId, TenantId
from registry.paging import Listing, Page, decode_cursor, listing
from registry.ports import Clock, EventHint
from registry.secrets import RandomBytes
from registry.storage import audit, events, profiles
from registry.storage.database import Database

MAX_COMPONENTS = 64
MAX_GRANTS = 64
MAX_FILTER = 256
_GRANT_WORDS = frozenset({"publish", "subscribe"})
_UNGRANTABLE = frozenset({"devices", "provision"})
_SENSOR_TYPES = ("DOUBLE", "BIGINT", "BOOLEAN", "TEXT")


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

    def __init__(self, database: Database, *, clock: Clock, random: RandomBytes, feed: EventHint) -> None:
        self._database = database
        self._clock = clock
        self._random = random
        self._feed = feed

    async def create(self, tenant_id: TenantId, new: NewProfile, actor: Actor) -> DeviceProfile:
        """Raises InvalidArgument, and AlreadyExists when the tenant has a profile of this id."""
        profile = self._checked(tenant_id, new)
        async with self._database.transaction() as connection:
            if not await profiles.insert(connection, profile):
                raise AlreadyExists(f'profile "{profile.profile_id}" already exists in this tenant')
            await audit.insert(connection, tenant_id, actor, "create", "profile", profile.profile_id)
        return profile

    async def get(self, tenant_id: TenantId, profile_id: str) -> DeviceProfile:
        """Raises NotFound."""
        async with self._database.connection() as connection:
            profile = await profiles.get(connection, tenant_id, _storable(profile_id))
        if profile is None:
            raise _unknown()
        return profile

    async def list(self, tenant_id: TenantId, page: Page) -> Listing[DeviceProfile]:
        """The tenant's profiles in the order of their ids."""
        after = decode_cursor(page.cursor, str)[0] if page.cursor is not None else None
        async with self._database.connection() as connection:
            rows = await profiles.read(connection, tenant_id, after, page.limit + 1)
        return listing(rows, page, lambda profile: (profile.profile_id,))

    async def update(
        self, tenant_id: TenantId, profile_id: str, changes: ProfileChanges, actor: Actor
    ) -> DeviceProfile:
        """The profile after the change. Raises NotFound, InvalidArgument."""
        now = self._clock()
        async with self._database.transaction() as connection:
            before = await profiles.get(connection, tenant_id, _storable(profile_id), for_update=True)
            if before is None:
                raise _unknown()
            after = _changed(before, changes)
            if after == before:
                return before
            after = replace(after, updated_at=now)
            await profiles.update(connection, after)
            changed = fields.differing(before, after)
            await audit.insert(connection, tenant_id, actor, "update", "profile", profile_id, {"changed": changed})
            data: dict[str, Json] = {"profile_id": profile_id, "changed": changed}
            await events.insert(connection, NewEvent(EventKind.PROFILE_UPDATED, tenant_id, actor, data=data))
        self._feed.hint()
        return after

    async def delete(self, tenant_id: TenantId, profile_id: str, actor: Actor) -> None:
        """Raises NotFound, and FailedPrecondition while devices or templates use it."""
        async with self._database.transaction() as connection:
            if not await profiles.delete(connection, tenant_id, _storable(profile_id)):
                raise _unknown()
            await audit.insert(connection, tenant_id, actor, "delete", "profile", profile_id)
            data: dict[str, Json] = {"profile_id": profile_id}
            await events.insert(connection, NewEvent(EventKind.PROFILE_DELETED, tenant_id, actor, data=data))
        self._feed.hint()

    def _checked(self, tenant_id: TenantId, new: NewProfile) -> DeviceProfile:
        now = self._clock()
        return DeviceProfile(
            tenant_id=tenant_id,
            profile_id=known(new.profile_id) if new.profile_id is not None else self._new_id(),
            name=fields.text("name", new.name, fields.MAX_NAME),
            description=fields.prose("description", new.description, fields.MAX_DESCRIPTION),
            tags=fields.tags("tags", new.tags),
            config=fields.document("config", new.config),
            anchor_mode=new.anchor_mode,
            components=_checked_components(new.components),
            telemetry_schema=fields.document("telemetry_schema", new.telemetry_schema),
            writable_fields=fields.names("writable_fields", new.writable_fields),
            topic_grants=_checked_grants(new.topic_grants),
            allow_short_psk=new.allow_short_psk,
            created_at=now,
            updated_at=now,
        )

    def _new_id(self) -> ProfileId:
        return ProfileId("p_" + base64.b32encode(self._random(10)).decode().lower())


def known(profile_id: str) -> ProfileId:
    """`profile_id` as an id, if it can be one. Raises InvalidArgument."""
    return ProfileId(fields.identifier("profile_id", profile_id))


def _storable(profile_id: str) -> str:
    """An id of a path: what cannot be one is simply not found."""
    try:
        return known(profile_id)
    except InvalidArgument:
        raise _unknown() from None


def _unknown() -> NotFound:
    return NotFound("no such profile in this tenant")


def _changed(before: DeviceProfile, changes: ProfileChanges) -> DeviceProfile:
    after = before
    if changes.profile_id is not UNSET and changes.profile_id != before.profile_id:
        raise InvalidArgument("profile_id cannot be changed", field="profile_id")
    if changes.name is not UNSET:
        after = replace(after, name=fields.text("name", changes.name, fields.MAX_NAME))
    if changes.description is not UNSET:
        after = replace(
            after, description=fields.prose("description", changes.description or "", fields.MAX_DESCRIPTION)
        )
    if changes.tags is not UNSET:
        after = replace(after, tags=fields.tags("tags", changes.tags or {}))
    if changes.config is not UNSET:
        after = replace(after, config=fields.document("config", changes.config or {}))
    if changes.anchor_mode is not UNSET:
        after = replace(after, anchor_mode=changes.anchor_mode)
    if changes.components is not UNSET:
        after = replace(after, components=_checked_components(changes.components or ()))
    if changes.telemetry_schema is not UNSET:
        after = replace(after, telemetry_schema=fields.document("telemetry_schema", changes.telemetry_schema or {}))
    if changes.writable_fields is not UNSET:
        after = replace(after, writable_fields=fields.names("writable_fields", changes.writable_fields or ()))
    if changes.topic_grants is not UNSET:
        after = replace(after, topic_grants=_checked_grants(changes.topic_grants or ()))
    if changes.allow_short_psk is not UNSET:
        after = replace(after, allow_short_psk=changes.allow_short_psk)
    return after


def _checked_components(components: Sequence[Json]) -> list[Json]:
    """`[{"name", "profile_id"?, "sensors": [{"name", "type", "unit"?}]}]` (CONTRACT §2, payloads)."""
    kept = fields.array("components", components, most=MAX_COMPONENTS)
    for component in kept:
        _checked_keys("components", component, required={"name"}, optional={"profile_id", "sensors"})
        _checked_name("components", component["name"])
        if "profile_id" in component:
            _checked_name("components", component["profile_id"])
        sensors = component.get("sensors", [])
        if not isinstance(sensors, list):
            raise InvalidArgument("components: sensors is no array", field="components")
        for sensor in sensors:
            _checked_keys("components", sensor, required={"name", "type"}, optional={"unit"})
            _checked_name("components", sensor["name"])
            if sensor["type"] not in _SENSOR_TYPES:
                raise InvalidArgument(
                    f"components: a sensor's type is one of {', '.join(_SENSOR_TYPES)}", field="components"
                )
            if sensor.get("unit") is not None:
                _checked_name("components", sensor["unit"])
    return kept


def _checked_grants(grants: Sequence[Json]) -> list[Json]:
    """`[{"filter", "allow"?: ["publish", "subscribe"], "deny"?: […]}]` (CONTRACT §3)."""
    kept = fields.array("topic_grants", grants, most=MAX_GRANTS)
    for grant in kept:
        _checked_keys("topic_grants", grant, required={"filter"}, optional={"allow", "deny"})
        if not isinstance(grant["filter"], str):
            raise InvalidArgument("topic_grants: a filter is a text", field="topic_grants")
        _check_filter(fields.text("topic_grants", grant["filter"], MAX_FILTER))
        if not ({"allow", "deny"} & set(grant)):
            raise InvalidArgument("topic_grants: a grant says what it allows or denies", field="topic_grants")
        for rule in ("allow", "deny"):
            words = grant.get(rule, [])
            if not (isinstance(words, list) and all(isinstance(w, str) and w in _GRANT_WORDS for w in words)):
                raise InvalidArgument(
                    f"topic_grants: {rule} is an array of publish and subscribe", field="topic_grants"
                )
    return kept


def _check_filter(text: str) -> None:
    """A topic filter (MQTT 5.0 §4.7.1) of topics that can be granted. A wildcard may reach further than that; what
    `devices/`, `provision/` and `$` begin is never brokered all the same."""
    *parents, last = levels = text.split("/")
    if any("#" in level for level in parents) or ("#" in last and last != "#"):
        wrong = "# stands for the rest of a topic, alone in the last level"
    elif any("+" in level and level != "+" for level in levels):
        wrong = "+ stands for one level, alone in it"
    elif levels[0] in _UNGRANTABLE or text.startswith("$"):
        wrong = "topics that begin with devices/, provision/ or $ are not for grants"
    else:
        return
    raise InvalidArgument(f"topic_grants: the filter {text!r} is wrong: {wrong}", field="topic_grants")


def _checked_keys(field: str, value: Json, *, required: set[str], optional: set[str]) -> None:
    if not isinstance(value, Mapping) or not required <= set(value) <= required | optional:
        raise InvalidArgument(
            f"{field}: an entry is an object with {', '.join(sorted(required))}"
            f" and, where wanted, {', '.join(sorted(optional))}; nothing else",
            field=field,
        )


def _checked_name(field: str, value: Json) -> None:
    if not isinstance(value, str):
        raise InvalidArgument(f"{field}: a name is a text", field=field)
    fields.text(field, value, fields.MAX_LABEL)
