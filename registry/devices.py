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
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from registry.credentials import IssuedCredential
from registry.model import (
    Actor,
    AnchorMode,
    CredentialKind,
    Device,
    DeviceId,
    DeviceStatus,
    Json,
    Receipt,
    TenantId,
)
from registry.paging import Listing, Page
from registry.ports import Clock, EventHint, Teardown
from registry.psk import PskAssignment
from registry.sealing import KeyRing
from registry.secrets import RandomBytes
from registry.storage.database import Database


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


@dataclass(frozen=True, slots=True)
class Registered:
    """A device and its credential, shown once. `issued` is None for x509: its certificate is registered or issued
    later."""

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
    ) -> None: ...

    async def register(self, tenant_id: TenantId, new: NewDevice, actor: Actor) -> Registered:
        """Raises AlreadyExists (hardware_id, or an assigned PSK identity) and InvalidArgument (a malformed field; a
        profile or gateway that this tenant does not have). Then nothing is made and nothing is published."""
        raise NotImplementedError

    async def get(self, tenant_id: TenantId, device_id: DeviceId) -> Device:
        """Raises NotFound."""
        raise NotImplementedError

    async def list(self, tenant_id: TenantId, wanted: DeviceFilter, page: Page) -> Listing[Device]:
        """Devices in the order in which they were made. Raises InvalidArgument."""
        raise NotImplementedError

    async def summary(self, tenant_id: TenantId) -> DeviceSummary:
        """Counts of the tenant's devices."""
        raise NotImplementedError

    async def update(self, tenant_id: TenantId, device_id: DeviceId, changes: DeviceChanges, actor: Actor) -> Updated:
        """Raises NotFound, InvalidArgument (also for another device_id, hardware_id or credential_type), AlreadyExists,
        FailedPrecondition (a status that cannot be set from the present one)."""
        raise NotImplementedError

    async def delete(self, tenant_id: TenantId, device_id: DeviceId, actor: Actor) -> Receipt:
        """Delete the device with its credentials and end its sessions; its children stay. Raises NotFound."""
        raise NotImplementedError
