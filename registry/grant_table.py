"""The grants of profiles, and the profiles of devices, as one node remembers them.

A change of a device or of a profile comes by the feed (`device.updated`, `profile.updated`) and forgets what it
concerns; so it is felt on every node as soon as a revocation is. `refresh` compares the profiles that are remembered
with the store every few seconds: the net below the feed. What can be lost: nothing; what is stale is read again.
Bounded: the oldest device is forgotten first, which costs a query when it comes back.

What can race: a reading with a change. What was read while something was forgotten is handed out and not remembered;
whoever holds grants for longer asks again when the router is told of the change.
"""

from __future__ import annotations

from collections import OrderedDict

from registry.model import DeviceId, ProfileId, TenantId
from registry.storage import topic_grants as storage
from registry.storage.database import Database
from registry.topic_grants import NO_GRANTS, DeviceGrants, TopicGrant, parse_grants

_DEVICES = 50_000
"""As many as a node has sessions."""


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

    async def reread(self, tenant_id: TenantId, profile_id: ProfileId) -> None:
        """A profile has changed: from now on the present grants are known. Raises Unavailable."""
        async with self._database.connection() as connection:
            rows = await storage.of_profiles(connection, [(tenant_id, profile_id)])
        self._changes += 1
        if (tenant_id, profile_id) in self._profiles:
            self._profiles[tenant_id, profile_id] = parse_grants(rows.get((tenant_id, profile_id), []))

    def forget_all(self) -> None:
        """Devices may have changed unheard. Profiles are compared anyway, so that no change of theirs is missed."""
        self._changes += 1
        self._devices.clear()

    async def refresh(self) -> list[tuple[TenantId, ProfileId]]:
        """Compare what is remembered with the store; the profiles whose grants have changed. Raises Unavailable.

        Profiles that are gone are remembered no more.
        """
        known = dict(self._profiles)
        if not known:
            return []
        async with self._database.connection() as connection:
            rows = await storage.of_profiles(connection, list(known))
        changed: list[tuple[TenantId, ProfileId]] = []
        for key, before in known.items():
            after = parse_grants(rows.get(key, []))
            if after != before and self._profiles.get(key) is before:  # else somebody has read it since
                self._profiles[key] = after
                changed.append(key)
            if key not in rows and not self._profiles.get(key):
                self._profiles.pop(key, None)
        if changed:
            self._changes += 1
        return changed
