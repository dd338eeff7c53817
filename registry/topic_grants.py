"""Topic grants: what a profile lets its devices do beyond the fixed topics (CONTRACT §3).

    [{"filter": "site/+/alarm", "allow": ["publish", "subscribe"]}, {"filter": "site/7/#", "deny": ["publish"]}]

Nothing is granted by default, and a deny wins over every allow. What a filter matches is the adapter's knowledge: the
registry parses, and the adapter asks `judge` with what it knows. A grant that cannot be read (an older program's, or
a broken row) allows nothing and denies all that it might have.

`GrantTable` remembers the grants of profiles and the profiles of devices. A device's change comes by the feed and
forgets the device. Profiles have no events: the few that are remembered are compared with the store by `refresh`, every
half second or so; so a change of grants is felt on every node within a second. What can be lost: nothing; what is
stale is read again. Bounded: the oldest device is forgotten first, which costs a query when it comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from registry.model import DeviceId, Json, ProfileId, TenantId
from registry.storage import topic_grants as storage
from registry.storage.database import Database

_DEVICES = 50_000
"""As many as a node has sessions."""


class Access(Enum):
    """What may be granted; the values are the words of a profile."""

    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"


@dataclass(frozen=True, slots=True)
class TopicGrant:
    """One entry. `filter` is the profile's text, with `me` where it stands."""

    filter: str
    allow: frozenset[Access]
    deny: frozenset[Access]


@dataclass(frozen=True, slots=True)
class DeviceGrants:
    """What a device may: the grants of its profile. A device without a profile has none."""

    profile_id: ProfileId | None = None
    grants: tuple[TopicGrant, ...] = ()


NO_GRANTS = DeviceGrants()


def judge(
    grants: Sequence[TopicGrant], access: Access, *, covers: Callable[[str], bool], touches: Callable[[str], bool]
) -> bool:
    """Whether `access` is granted: some allow covers all of what is asked, and no deny touches any of it.

    `covers(filter)`, `touches(filter)`: the adapter's word on what is asked. For a topic name both mean "matches"; a
    topic filter is covered by one that matches whatever it matches, and touched by one that matches some of that.
    """
    if any(access in grant.deny and touches(grant.filter) for grant in grants):
        return False
    return any(access in grant.allow and covers(grant.filter) for grant in grants)


def parse_grants(entries: Sequence[Json]) -> tuple[TopicGrant, ...]:
    """A profile's `topic_grants` as values. An entry that is broken denies everything under its filter, or, without a
    proper one, everything."""
    return tuple(_parse(entry) for entry in entries)


def _parse(entry: Json) -> TopicGrant:
    text = entry.get("filter") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text:
        return TopicGrant("#", frozenset(), frozenset(Access))
    try:
        return TopicGrant(text, _words(entry.get("allow")), _words(entry.get("deny")))
    except ValueError:
        return TopicGrant(text, frozenset(), frozenset(Access))


def _words(words: Json) -> frozenset[Access]:
    if words is None:
        return frozenset()
    if not isinstance(words, list):
        raise ValueError("no array")
    return frozenset(Access(word) for word in words)


class GrantTable:
    """Grants by profile and by device, remembered."""

    def __init__(self, database: Database, *, devices: int = _DEVICES) -> None:
        """`devices`: how many are remembered."""
        self._database = database
        self._most = devices
        self._profiles: dict[tuple[TenantId, ProfileId], tuple[TopicGrant, ...]] = {}
        self._devices: OrderedDict[DeviceId, tuple[TenantId, ProfileId | None]] = OrderedDict()
        self._changes = 0
        """How often something was forgotten: what was read before that may be stale."""

    async def of_device(self, tenant_id: TenantId, device_id: DeviceId) -> DeviceGrants:
        """The grants of a device; none for one that does not exist in the tenant. Raises Unavailable."""
        known = self.remembered(tenant_id, device_id)
        if known is not None:
            return known
        changes = self._changes
        async with self._database.connection() as connection:
            row = await storage.of_device(connection, tenant_id, device_id)
        if row is None:
            return NO_GRANTS
        profile_id, entries = row
        grants = parse_grants(entries)
        if changes == self._changes:
            self._devices[device_id] = (tenant_id, profile_id)
            if profile_id is not None:
                grants = self._profiles.setdefault((tenant_id, profile_id), grants)
            while len(self._devices) > self._most:
                self._devices.popitem(last=False)
        return DeviceGrants(profile_id, grants)

    def remembered(self, tenant_id: TenantId, device_id: DeviceId) -> DeviceGrants | None:
        """The same without waiting; None: ask `of_device`."""
        found = self._devices.get(device_id)
        if found is None or found[0] != tenant_id:
            return None
        profile_id = found[1]
        if profile_id is None:
            return NO_GRANTS
        grants = self._profiles.get((tenant_id, profile_id))
        return None if grants is None else DeviceGrants(profile_id, grants)

    async def grants_of(self, tenant_id: TenantId, profile_id: ProfileId) -> tuple[TopicGrant, ...]:
        """The grants of a profile; none for one that does not exist. Raises Unavailable."""
        known = self._profiles.get((tenant_id, profile_id))
        if known is not None:
            return known
        changes = self._changes
        async with self._database.connection() as connection:
            rows = await storage.of_profiles(connection, [(tenant_id, profile_id)])
        grants = parse_grants(rows.get((tenant_id, profile_id), []))
        if changes == self._changes:
            return self._profiles.setdefault((tenant_id, profile_id), grants)
        return grants

    def forget_device(self, device_id: DeviceId) -> None:
        """Its record has changed."""
        self._changes += 1
        self._devices.pop(device_id, None)

    def forget_all(self) -> None:
        """Devices may have changed unheard. Profiles are compared anyway, so that no change of theirs is missed."""
        self._changes += 1
        self._devices.clear()

    async def refresh(self) -> list[tuple[TenantId, ProfileId]]:
        """Compare what is remembered with the store; the profiles whose grants have changed. Raises Unavailable."""
        known = dict(self._profiles)
        if not known:
            return []
        async with self._database.connection() as connection:
            rows = await storage.of_profiles(connection, list(known))
        changed: list[tuple[TenantId, ProfileId]] = []
        for key, before in known.items():
            after = parse_grants(rows.get(key, []))
            if after != before:
                self._profiles[key] = after
                changed.append(key)
        if changed:
            self._changes += 1
        return changed
