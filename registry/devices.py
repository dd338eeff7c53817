"""Devices: registered by hand, read, changed, deleted (seeds 002 and 004).

Theory. `hardware_id` is the anchor: unique within the tenant by a database constraint, so of two that register it at
once one is told AlreadyExists. Registration is one transaction: device, credential, event `device.registered`, audit.

A device takes from its profile, once, when it is made: `anchor_mode` where it says none itself (else the default,
ANCHOR_MODE_MERKLE_BATCH); `tags` and `config` are the profile's overlaid with its own, key by key at the top level
(a config object below the top level is replaced, not merged). Giving a device another profile later changes none of
these.

Status (CONTRACT §2): `pending` is left by redeeming the token, `offline` is the broker's word; neither is set by hand,
and what may be set from where is the table `_SETTABLE`. `inactive` ends the device's sessions and, while it lasts, its
credentials are refused; they live again when it is reactivated.

A gateway is a device that others name as `gateway_id`. The chain of gateways is finite: who changes one takes the
tenant's gateway lock and walks up from the new parent first. A device that is deleted leaves its children without a
gateway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import assert_never
from uuid import UUID

from msgspec import UNSET, UnsetType

from registry import fields
from registry.credentials import IssuedCredential, Mint, issue_certificate, preparing
from registry.device_config import record_change
from registry.errors import FailedPrecondition, InvalidArgument, NotFound
from registry.events import EventKind, NewEvent
from registry.hardware_id import parse_hardware_id
from registry.model import (
    Actor,
    AnchorMode,
    CredentialKind,
    Device,
    DeviceId,
    DeviceProfile,
    DeviceStatus,
    Json,
    ProfileId,
    Receipt,
    TenantId,
)
from registry.paging import Listing, Page, decode_cursor, listing
from registry.ports import CertificateIssuer, Clock, Ended, EventHint, PreparedIssue, Teardown
from registry.psk import PskAssignment
from registry.sealing import KeyRing
from registry.secrets import RandomBytes
from registry.storage import audit, devices, events, profiles
from registry.storage.database import Connection, Database
from registry.storage.devices import DeviceQuery

MAX_QUERY = 256
"""Characters of `q`, `group` and `tag`: as long as what they are compared with."""

_SETTABLE: Mapping[DeviceStatus, frozenset[DeviceStatus]] = {
    DeviceStatus.PENDING: frozenset(),
    DeviceStatus.REGISTERED: frozenset({DeviceStatus.ACTIVE, DeviceStatus.INACTIVE, DeviceStatus.MAINTENANCE}),
    DeviceStatus.ACTIVE: frozenset({DeviceStatus.INACTIVE, DeviceStatus.MAINTENANCE}),
    DeviceStatus.OFFLINE: frozenset({DeviceStatus.ACTIVE, DeviceStatus.INACTIVE, DeviceStatus.MAINTENANCE}),
    DeviceStatus.MAINTENANCE: frozenset({DeviceStatus.REGISTERED, DeviceStatus.ACTIVE, DeviceStatus.INACTIVE}),
    DeviceStatus.INACTIVE: frozenset({DeviceStatus.REGISTERED, DeviceStatus.ACTIVE, DeviceStatus.MAINTENANCE}),
}
"""What an operator may set from what; the present status may always be repeated."""


@dataclass(frozen=True, slots=True)
class NewDevice:
    """A device to be registered (seed 002). What is None or empty is inherited from the profile, where it has it."""

    name: str
    hardware_id: str
    groups: Sequence[str] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    anchor_mode: AnchorMode | None = None
    profile_id: str | None = None
    site_id: str | None = None
    gateway_id: DeviceId | None = None
    firmware: str | None = None
    meta: Mapping[str, Json] = field(default_factory=dict)
    config: Mapping[str, Json] = field(default_factory=dict)
    credential_type: CredentialKind = CredentialKind.API_KEY
    psk: PskAssignment | None = None
    """For `credential_type` psk: the identity or key to be assigned instead of generated ones."""
    csr: bytes | None = field(default=None, repr=False)
    """For `credential_type` x509 (PEM or DER): a certificate is issued at once."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A device and its credential, shown once. `issued` is None for x509 without a csr: its certificate is registered
    or issued later."""

    device: Device
    issued: IssuedCredential | None


@dataclass(frozen=True, slots=True)
class DeviceFilter:
    """Which devices to list; every part that is given must hold. `tag` is `key=value` or `key`.

    `q` is part of the name, in any case, or the beginning of the hardware_id.
    """

    status: DeviceStatus | None = None
    group: str | None = None
    tag: str | None = None
    profile_id: str | None = None
    site_id: str | None = None
    gateway_id: DeviceId | None = None
    q: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceSummary:
    """How many devices a tenant has; every status and every credential type is present, with 0 where there is none."""

    total: int
    by_status: Mapping[DeviceStatus, int]
    by_credential_type: Mapping[CredentialKind, int]


@dataclass(frozen=True, slots=True)
class DeviceChanges:
    """What a PUT says: a field that is UNSET stays as it is; None empties it.

    `device_id`, `hardware_id` and `credential_type` may be repeated but not changed (a device that was made by a token
    without a hardware_id may be given one, once).
    """

    device_id: DeviceId | UnsetType = UNSET
    hardware_id: str | UnsetType | None = UNSET
    credential_type: CredentialKind | UnsetType = UNSET
    name: str | UnsetType = UNSET
    status: DeviceStatus | UnsetType = UNSET
    groups: Sequence[str] | UnsetType | None = UNSET
    tags: Mapping[str, str] | UnsetType | None = UNSET
    anchor_mode: AnchorMode | UnsetType = UNSET
    profile_id: str | UnsetType | None = UNSET
    site_id: str | UnsetType | None = UNSET
    gateway_id: DeviceId | UnsetType | None = UNSET
    firmware: str | UnsetType | None = UNSET
    meta: Mapping[str, Json] | UnsetType | None = UNSET
    config: Mapping[str, Json] | UnsetType | None = UNSET


@dataclass(frozen=True, slots=True)
class Updated:
    """A device after a change. `receipt` tells of the sessions that ended because it became inactive."""

    device: Device
    receipt: Receipt | None


class Devices:
    """The devices of one tenant at a time."""

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
        self._issuer = issuer
        self._mint = Mint(key_ring, random)
        self._clock = clock
        self._random = random
        self._feed = feed
        self._teardown = teardown

    async def register(self, tenant_id: TenantId, new: NewDevice, actor: Actor) -> Registered:
        """Raises AlreadyExists (hardware_id, or an assigned PSK identity) and InvalidArgument (a malformed field; a
        profile or gateway that this tenant does not have; a csr that is refused). Then nothing is made and nothing is
        published."""
        checked = check_new(new)
        now = self._clock()
        device_id = DeviceId(fields.fresh_uuid(self._random))
        csr, kind = checked.csr, checked.credential_type
        async with (
            nullcontext() if csr is None else preparing(self._issuer, kind, tenant_id, device_id, csr, now) as prepared,
            self._database.transaction() as connection,
        ):
            profile = await _profile(connection, tenant_id, checked.profile_id)
            if checked.gateway_id is not None:
                await _check_gateway(connection, tenant_id, device_id, checked.gateway_id)
            device = _made(tenant_id, device_id, checked, profile, now)
            if not await devices.insert(connection, device):
                raise devices.hardware_id_taken(device.hardware_id)
            issued = await self._first_credential(connection, device, profile, checked.psk, prepared, now)
            await _record(connection, EventKind.DEVICE_REGISTERED, "register", device, actor, _description(device))
        self._feed.hint()
        return Registered(device, issued)

    async def get(self, tenant_id: TenantId, device_id: DeviceId) -> Device:
        """Raises NotFound."""
        async with self._database.connection() as connection:
            device = await devices.get(connection, tenant_id, device_id)
        if device is None:
            raise NotFound("no such device in this tenant")
        return device

    async def list(self, tenant_id: TenantId, wanted: DeviceFilter, page: Page) -> Listing[Device]:
        """Devices in the order in which they were made. Raises InvalidArgument."""
        query = _query(wanted)
        after = decode_cursor(page.cursor, datetime, UUID) if page.cursor is not None else None
        async with self._database.connection() as connection:
            rows = await devices.read(connection, tenant_id, query, after, page.limit + 1)
        return listing(rows, page, cursor_key)

    async def summary(self, tenant_id: TenantId) -> DeviceSummary:
        """Counts of the tenant's devices."""
        async with self._database.connection() as connection:
            counts = await devices.count(connection, tenant_id)
        by_status = dict.fromkeys(DeviceStatus, 0)
        by_type = dict.fromkeys(CredentialKind, 0)
        for status, kind, number in counts:
            by_status[status] += number
            by_type[kind] += number
        return DeviceSummary(sum(by_status.values()), by_status, by_type)

    async def update(self, tenant_id: TenantId, device_id: DeviceId, changes: DeviceChanges, actor: Actor) -> Updated:
        """Raises NotFound, InvalidArgument (also for another device_id, hardware_id or credential_type), AlreadyExists,
        FailedPrecondition (a status that cannot be set from the present one)."""
        now = self._clock()
        wish = _check_changes(changes)
        event_seq = None
        async with self._database.transaction() as connection:
            if wish.gateway_id is not UNSET and wish.gateway_id is not None:
                await devices.lock_gateways(connection, tenant_id)
                await _check_gateway(connection, tenant_id, device_id, wish.gateway_id)
            before = await devices.lock(connection, tenant_id, device_id)
            after = _changed(before, wish)
            if after == before:
                return Updated(before, None)
            after = replace(after, updated_at=now)
            config_version = await devices.update(connection, after)
            if config_version is not None:
                await record_change(connection, tenant_id, device_id, config_version, actor)
            event_seq = await _record_change(connection, before, after, actor)
        self._feed.hint()
        if after.status is before.status or after.status is not DeviceStatus.INACTIVE:
            return Updated(after, None)
        return Updated(after, await self._teardown.complete(_ended(after, event_seq, now, "device inactive")))

    async def delete(self, tenant_id: TenantId, device_id: DeviceId, actor: Actor) -> Receipt:
        """Delete the device with its credentials and end its sessions; its children stay. Raises NotFound."""
        now = self._clock()
        async with self._database.transaction() as connection:
            device = await devices.delete(connection, tenant_id, device_id, now)
            event_seq = await _record(
                connection, EventKind.DEVICE_DELETED, "delete", device, actor, _description(device)
            )
        self._feed.hint()
        return await self._teardown.complete(_ended(device, event_seq, now, "device deleted"))

    async def _first_credential(
        self,
        connection: Connection,
        device: Device,
        profile: DeviceProfile | None,
        assignment: PskAssignment | None,
        prepared: PreparedIssue | None,
        now: datetime,
    ) -> IssuedCredential | None:
        match device.credential_type:
            case CredentialKind.API_KEY:
                return await self._mint.api_key(connection, device, now)
            case CredentialKind.PSK:
                short = profile is not None and profile.allow_short_psk
                return await self._mint.psk(connection, device, now, assignment=assignment, allow_short=short)
            case CredentialKind.X509 if prepared is not None:
                return await issue_certificate(self._issuer, connection, device, prepared, now)
            case CredentialKind.X509:
                return None
            case _:
                assert_never(device.credential_type)


def check_new(new: NewDevice) -> NewDevice:
    """`new` with every field checked; what only the database can know is not. Raises InvalidArgument."""
    if new.psk is not None and new.credential_type is not CredentialKind.PSK:
        raise InvalidArgument(
            f"psk is for credential_type psk; credential_type is {new.credential_type.value}", field="psk"
        )
    if new.csr is not None and new.credential_type is not CredentialKind.X509:
        raise InvalidArgument(
            f"csr is for credential_type x509; credential_type is {new.credential_type.value}", field="csr"
        )
    return replace(
        new,
        name=fields.text("name", new.name, fields.MAX_NAME),
        hardware_id=parse_hardware_id(new.hardware_id),
        groups=fields.names("groups", new.groups),
        tags=fields.tags("tags", new.tags),
        profile_id=_optional_identifier("profile_id", new.profile_id),
        site_id=_optional_identifier("site_id", new.site_id),
        firmware=_optional_text("firmware", new.firmware),
        meta=fields.document("meta", new.meta),
        config=fields.document("config", new.config),
    )


def inherited(
    profile_tags: Mapping[str, str],
    profile_config: Mapping[str, Json],
    own_tags: Mapping[str, str],
    own_config: Mapping[str, Json],
) -> tuple[dict[str, str], dict[str, Json]]:
    """A new device's tags and config: the profile's overlaid with its own. Raises InvalidArgument when the sum is too
    much for one device."""
    return (
        fields.tags("tags with the profile's", {**profile_tags, **own_tags}),
        fields.document("config with the profile's", {**profile_config, **own_config}),
    )


def cursor_key(device: Device) -> tuple[datetime, UUID]:
    """Where a device stands in lists."""
    return device.created_at, device.device_id


def _made(
    tenant_id: TenantId, device_id: DeviceId, new: NewDevice, profile: DeviceProfile | None, now: datetime
) -> Device:
    anchor_mode = new.anchor_mode or (profile.anchor_mode if profile else None) or AnchorMode.MERKLE_BATCH
    tags, config = inherited(profile.tags if profile else {}, profile.config if profile else {}, new.tags, new.config)
    return Device(
        tenant_id=tenant_id,
        device_id=device_id,
        hardware_id=new.hardware_id,
        name=new.name,
        status=DeviceStatus.REGISTERED,
        groups=[*new.groups],
        tags=tags,
        anchor_mode=anchor_mode,
        profile_id=profile.profile_id if profile else None,
        site_id=new.site_id,
        gateway_id=new.gateway_id,
        firmware=new.firmware,
        meta=new.meta,
        config=config,
        credential_type=new.credential_type,
        template_id=None,
        created_at=now,
        updated_at=now,
        activated_at=None,
        last_seen_at=None,
    )


async def _profile(connection: Connection, tenant_id: TenantId, profile_id: str | None) -> DeviceProfile | None:
    if profile_id is None:
        return None
    profile = await profiles.get(connection, tenant_id, profile_id)
    if profile is None:
        raise InvalidArgument(f'profile_id "{profile_id}" is not a profile of this tenant', field="profile_id")
    return profile


async def _check_gateway(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, gateway_id: DeviceId
) -> None:
    above = await devices.gateways_above(connection, tenant_id, gateway_id)
    if not above:
        raise InvalidArgument(f'gateway_id "{gateway_id}" is not a device of this tenant', field="gateway_id")
    if device_id in above:
        raise InvalidArgument("gateway_id would make the device its own gateway", field="gateway_id")
    if len(above) > devices.MAX_GATEWAY_DEPTH:
        raise InvalidArgument(
            f"gateway_id has {len(above) - 1} or more gateways above it; {devices.MAX_GATEWAY_DEPTH - 1} are allowed",
            field="gateway_id",
        )


def _query(wanted: DeviceFilter) -> DeviceQuery:
    key, equals, value = (wanted.tag or "").partition("=")
    return DeviceQuery(
        status=wanted.status,
        group=_optional_text("group", wanted.group, MAX_QUERY),
        tag_key=fields.text("tag", key, fields.MAX_TAG_KEY) if wanted.tag is not None else None,
        tag_value=fields.text("tag", value, fields.MAX_TAG_BYTES, least=0) if equals else None,
        profile_id=_optional_text("profile_id", wanted.profile_id, MAX_QUERY),
        site_id=_optional_text("site_id", wanted.site_id, MAX_QUERY),
        gateway_id=wanted.gateway_id,
        q=_optional_text("q", wanted.q, MAX_QUERY) if wanted.q else None,
    )


def _check_changes(changes: DeviceChanges) -> DeviceChanges:
    """`changes` with every given field checked; None is what it stands for (an empty list or object)."""
    wish = changes
    if wish.hardware_id is not UNSET and wish.hardware_id is not None:
        wish = replace(wish, hardware_id=parse_hardware_id(wish.hardware_id))
    if wish.name is not UNSET:
        wish = replace(wish, name=fields.text("name", wish.name, fields.MAX_NAME))
    if wish.groups is not UNSET:
        wish = replace(wish, groups=fields.names("groups", wish.groups or ()))
    if wish.tags is not UNSET:
        wish = replace(wish, tags=fields.tags("tags", wish.tags or {}))
    if wish.profile_id is not UNSET:
        wish = replace(wish, profile_id=_optional_identifier("profile_id", wish.profile_id))
    if wish.site_id is not UNSET:
        wish = replace(wish, site_id=_optional_identifier("site_id", wish.site_id))
    if wish.firmware is not UNSET:
        wish = replace(wish, firmware=_optional_text("firmware", wish.firmware))
    if wish.meta is not UNSET:
        wish = replace(wish, meta=fields.document("meta", wish.meta or {}))
    if wish.config is not UNSET:
        wish = replace(wish, config=fields.document("config", wish.config or {}))
    return wish


def _changed(before: Device, wish: DeviceChanges) -> Device:
    """The device as the checked `wish` wants it. Raises InvalidArgument, FailedPrecondition."""
    after = before
    if wish.device_id is not UNSET and wish.device_id != before.device_id:
        raise InvalidArgument("device_id cannot be changed", field="device_id")
    if wish.hardware_id is not UNSET and wish.hardware_id != before.hardware_id:
        if before.hardware_id is not None:
            raise InvalidArgument(f'hardware_id "{before.hardware_id}" cannot be changed', field="hardware_id")
        after = replace(after, hardware_id=wish.hardware_id)
    if wish.credential_type is not UNSET and wish.credential_type is not before.credential_type:
        raise InvalidArgument(
            f"credential_type is {before.credential_type.value}; rotating the device's credentials changes it",
            field="credential_type",
        )
    if wish.name is not UNSET:
        after = replace(after, name=wish.name)
    if wish.status is not UNSET:
        after = replace(after, status=_settable(before.status, wish.status))
    if wish.groups is not UNSET:
        after = replace(after, groups=[*(wish.groups or ())])
    if wish.tags is not UNSET:
        after = replace(after, tags=wish.tags or {})
    if wish.anchor_mode is not UNSET:
        after = replace(after, anchor_mode=wish.anchor_mode)
    if wish.profile_id is not UNSET:
        after = replace(after, profile_id=ProfileId(wish.profile_id) if wish.profile_id is not None else None)
    if wish.site_id is not UNSET:
        after = replace(after, site_id=wish.site_id)
    if wish.gateway_id is not UNSET:
        after = replace(after, gateway_id=wish.gateway_id)
    if wish.firmware is not UNSET:
        after = replace(after, firmware=wish.firmware)
    if wish.meta is not UNSET:
        after = replace(after, meta=wish.meta or {})
    if wish.config is not UNSET:
        after = replace(after, config=wish.config or {})
    return after


def _settable(present: DeviceStatus, wanted: DeviceStatus) -> DeviceStatus:
    if wanted is present:
        return present
    allowed = _SETTABLE[present]
    if wanted not in allowed:
        words = ", ".join(sorted(each.value for each in allowed)) or "nothing else"
        raise FailedPrecondition(
            f"status is {present.value} and cannot be set to {wanted.value}; it can be set to {words}"
        )
    return wanted


async def _record_change(connection: Connection, before: Device, after: Device, actor: Actor) -> int:
    """The event of a change: a deactivation ends sessions, so it is one of its own kind."""
    deactivated = after.status is DeviceStatus.INACTIVE and before.status is not DeviceStatus.INACTIVE
    kind = EventKind.DEVICE_DEACTIVATED if deactivated else EventKind.DEVICE_UPDATED
    data: dict[str, Json] = {"changed": fields.differing(before, after)}
    if after.status is not before.status:
        data["status"] = {"from": before.status.value, "to": after.status.value}
    return await _record(connection, kind, "update", after, actor, data)


async def _record(
    connection: Connection,
    kind: EventKind,
    action: str,
    device: Device,
    actor: Actor,
    data: Mapping[str, Json],
) -> int:
    await audit.insert(connection, device.tenant_id, actor, action, "device", str(device.device_id), data)
    return await events.insert(
        connection, NewEvent(kind, device.tenant_id, actor, device_id=device.device_id, data=data)
    )


def _description(device: Device) -> dict[str, Json]:
    return {
        "name": device.name,
        "hardware_id": device.hardware_id,
        "profile_id": device.profile_id,
        "credential_type": device.credential_type.value,
    }


def _ended(device: Device, event_seq: int, now: datetime, reason: str) -> Ended:
    return Ended(
        event_seq=event_seq, tenant_id=device.tenant_id, revoked_at=now, device_id=device.device_id, reason=reason
    )


def _optional_text(field_name: str, value: str | None, most: int = fields.MAX_FIRMWARE) -> str | None:
    return None if value is None else fields.text(field_name, value, most)


def _optional_identifier(field_name: str, value: str | None) -> str | None:
    return None if value is None else fields.identifier(field_name, value)
