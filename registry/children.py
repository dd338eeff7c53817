"""Gateways and their children: attached by the gateway itself, spoken for by nobody else.

    gateway ── attach(hardware_id) ──┬─ unknown ──────────────────────► made, its child (`registered`, no credential)
                                     ├─ its child already ────────────► that one
                                     ├─ without gateway, never spoke ─► its child from now on
                                     └─ anything else ────────────────► PERMISSION_DENIED

A child without a credential cannot authenticate; it exists through its gateway, and an operator may give it a
credential of its own later (its type is api_key until then). "Never spoke" means: no credential of it was ever used.
A device that lives by itself can be given a gateway by an operator only; or else any device could make itself the
gateway of any other, read its commands and speak in its name. A child takes its gateway's site and nothing from a
profile: a gateway must not choose what a profile grants.

Whether a device is a gateway's child is asked for every uplink, topic and command of a child. The answer is remembered
until the feed tells of any change of the child; while the feed is not trusted it is read each time. A reading that was
under way when such a change came is not remembered. So a gateway that loses a child may speak for it for as long as an
event takes to come, milliseconds, and no longer.

Children have no sessions of their own here: they are reached and heard within their gateway's. What ends that session
(revoking, deactivating or deleting the gateway, kicking it) ends what it did for its children, by construction; the
transports hand down commands and configurations through attachments that end with it (registry/downlinks.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from registry import fields
from registry.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted
from registry.events import EventKind, NewEvent
from registry.feed import Seen
from registry.hardware_id import parse_hardware_id
from registry.model import (
    Actor,
    AnchorMode,
    CredentialKind,
    Device,
    DeviceId,
    DeviceStatus,
    Identity,
    Json,
    TenantId,
)
from registry.observation import NOBODY, Limit, Observer
from registry.ports import Clock, EventHint
from registry.secrets import RandomBytes
from registry.storage import audit, devices, events
from registry.storage import children as storage
from registry.storage.database import Connection, Database

MAX_CHILDREN: Final = 10_000
"""Of one gateway: beyond the largest radio networks behind one box."""
REMEMBERED: Final = 65_536
"""Children whose gateway a node remembers; about 200 bytes each."""

_CHANGES: Final = frozenset(
    {
        EventKind.DEVICE_UPDATED,
        EventKind.DEVICE_DEACTIVATED,
        EventKind.DEVICE_DELETED,
        EventKind.DEVICE_PROVISIONED,
    }
)
"""After these a device may be another gateway's child, or nobody's."""


@dataclass(frozen=True, slots=True)
class NewChild:
    """What a gateway says of a device behind it. Without a name it is called by its hardware_id.

    What is said of a device that exists already is not taken over: its record is the operator's.
    """

    hardware_id: str
    name: str | None = None
    firmware: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    meta: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attached:
    """A gateway's child. `created`: it was not known before."""

    device_id: DeviceId
    created: bool


class Children:
    """Attaches children and knows whose they are. Follows the feed."""

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock,
        random: RandomBytes,
        feed: EventHint,
        feed_trusted: Callable[[], bool],
        max_children: int = MAX_CHILDREN,
        remembered: int = REMEMBERED,
        observer: Observer = NOBODY,
    ) -> None:
        self._database = database
        self._clock = clock
        self._random = random
        self._feed = feed
        self._feed_trusted = feed_trusted
        self._max_children = max_children
        self._remembered = remembered
        self._observer = observer
        self._gateways: OrderedDict[DeviceId, DeviceId] = OrderedDict()
        self._reading: dict[DeviceId, object] = {}
        self.looked_up = 0
        """Questions that the database had to answer, for tests and metrics."""

    async def attach(self, gateway: Identity, new: NewChild, correlation_id: str) -> Attached:
        """Get or create the gateway's child with this hardware_id.

        Raises InvalidArgument, PermissionDenied (a device that is not this gateway's to attach), ResourceExhausted
        (it has its limit of children), NotFound (the gateway itself is gone), Unavailable.
        """
        checked = _checked(new)
        tenant_id, gateway_id = gateway.tenant_id, gateway.device_id
        async with self._database.connection() as connection:
            known = await storage.find(connection, tenant_id, checked.hardware_id)
        if known is not None and _is_its(known, gateway_id):
            return Attached(known.device_id, False)
        actor = Actor(f"device:{gateway_id}", correlation_id)
        async with self._database.transaction() as connection:
            # The order of all who change gateways: the tenant's lock, then devices' rows.
            await devices.lock_gateways(connection, tenant_id)
            above = await self._above(connection, tenant_id, gateway_id)
            device = await self._made(connection, above[0], checked, actor)
            if device is not None:
                attached = Attached(device.device_id, True)
            else:
                attached = Attached(await self._adopted(connection, gateway, checked, above, actor), False)
        self._feed.hint()
        return attached

    async def is_child(self, gateway: Identity, device_id: DeviceId) -> bool:
        """Whether the gateway may speak for a device: it is its child, and not inactive. Raises Unavailable."""
        return await self.belongs(gateway.tenant_id, gateway.device_id, device_id)

    async def belongs(self, tenant_id: TenantId, gateway_id: DeviceId, device_id: DeviceId) -> bool:
        """The same of a gateway that is not connected, as for a will of it. Raises Unavailable."""
        if self._feed_trusted() and self._gateways.get(device_id) == gateway_id:
            return True
        self.looked_up += 1
        self._reading[device_id] = mark = object()
        try:
            async with self._database.connection() as connection:
                found = await storage.gateway_of(connection, tenant_id, device_id)
        finally:
            current = self._reading.get(device_id) is mark
            if current:
                del self._reading[device_id]
        if current and found is not None and self._feed_trusted():
            self._gateways[device_id] = found
            self._gateways.move_to_end(device_id)
            if len(self._gateways) > self._remembered:
                self._gateways.popitem(last=False)
        return found == gateway_id

    async def via(self, speaker: Identity, device_id: DeviceId) -> DeviceId | None:
        """By whom `speaker` speaks for a device: None for itself, its own id for its child.

        Raises NotFound for any other device, whether there is one or not; Unavailable.
        """
        if device_id == speaker.device_id:
            return None
        if not await self.is_child(speaker, device_id):
            raise NotFound("no such device in this tenant")
        return speaker.device_id

    async def follow(self, seen: Seen) -> None:
        """The feed's word: a device may have another gateway."""
        if seen.event.kind in _CHANGES and seen.event.device_id is not None:
            self._gateways.pop(seen.event.device_id, None)
            self._reading.pop(seen.event.device_id, None)

    async def restored(self) -> None:
        """The feed was away: nothing that is remembered may be trusted."""
        self._gateways.clear()
        self._reading.clear()

    async def _above(self, connection: Connection, tenant_id: TenantId, gateway_id: DeviceId) -> list[Device]:
        """The gateway's record and those above it. Raises NotFound, InvalidArgument."""
        ids = await devices.gateways_above(connection, tenant_id, gateway_id)
        if len(ids) > devices.MAX_GATEWAY_DEPTH:
            raise InvalidArgument(
                f"this gateway has {len(ids) - 1} gateways above it; "
                f"with children, {devices.MAX_GATEWAY_DEPTH - 1} are allowed"
            )
        found = [await devices.get(connection, tenant_id, each) for each in ids]
        above = [each for each in found if each is not None]
        if not above:
            raise NotFound("no such gateway in this tenant")
        return above

    async def _made(self, connection: Connection, gateway: Device, new: NewChild, actor: Actor) -> Device | None:
        """The new child; None when the tenant has a device with its hardware_id. Raises ResourceExhausted."""
        if await storage.find(connection, gateway.tenant_id, new.hardware_id) is not None:
            return None
        await self._check_room(connection, gateway.tenant_id, gateway.device_id)
        now = self._clock()
        device = Device(
            tenant_id=gateway.tenant_id,
            device_id=DeviceId(fields.fresh_uuid(self._random)),
            hardware_id=new.hardware_id,
            name=new.name or new.hardware_id,
            status=DeviceStatus.REGISTERED,
            groups=[],
            tags=new.tags,
            anchor_mode=AnchorMode.MERKLE_BATCH,
            profile_id=None,
            site_id=gateway.site_id,
            gateway_id=gateway.device_id,
            firmware=new.firmware,
            meta=new.meta,
            config={},
            credential_type=CredentialKind.API_KEY,
            template_id=None,
            created_at=now,
            updated_at=now,
            activated_at=None,
            last_seen_at=None,
        )
        if not await devices.insert(connection, device):
            return None  # registered by somebody else this very moment
        data = {
            "name": device.name,
            "hardware_id": device.hardware_id,
            "gateway_id": str(gateway.device_id),
            "credential_type": device.credential_type.value,
        }
        await _record(connection, EventKind.DEVICE_REGISTERED, "register", device, actor, data)
        return device

    async def _adopted(
        self, connection: Connection, gateway: Identity, new: NewChild, above: list[Device], actor: Actor
    ) -> DeviceId:
        """The device that exists already, as the gateway's child. Raises PermissionDenied, ResourceExhausted."""
        tenant_id, gateway_id = gateway.tenant_id, gateway.device_id
        device = await storage.find(connection, tenant_id, new.hardware_id, lock=True)
        if device is None:
            raise PermissionDenied(_REFUSAL)  # deleted this very moment
        if _is_its(device, gateway_id):
            return device.device_id
        if (
            device.gateway_id is not None
            or device.status in (DeviceStatus.INACTIVE, DeviceStatus.PENDING)
            or device.device_id in {each.device_id for each in above}
            or await storage.has_spoken(connection, tenant_id, device.device_id)
        ):
            raise PermissionDenied(_REFUSAL)
        await self._check_room(connection, tenant_id, gateway_id)
        await storage.adopt(connection, tenant_id, device.device_id, gateway_id, self._clock())
        data = {"changed": ["gateway_id"], "gateway_id": str(gateway_id)}
        await _record(connection, EventKind.DEVICE_UPDATED, "update", device, actor, data)
        return device.device_id

    async def _check_room(self, connection: Connection, tenant_id: TenantId, gateway_id: DeviceId) -> None:
        if await storage.count(connection, tenant_id, gateway_id) >= self._max_children:
            self._observer.limit_hit(Limit.CHILDREN)
            raise ResourceExhausted(f"the gateway has its {self._max_children} children")


_REFUSAL: Final = "a device with this hardware_id exists and is not this gateway's to attach"


def _is_its(device: Device, gateway_id: DeviceId) -> bool:
    return device.gateway_id == gateway_id and device.status is not DeviceStatus.INACTIVE


def _checked(new: NewChild) -> NewChild:
    return NewChild(
        hardware_id=parse_hardware_id(new.hardware_id),
        name=None if new.name is None else fields.text("name", new.name, fields.MAX_NAME),
        firmware=None if new.firmware is None else fields.text("firmware", new.firmware, fields.MAX_FIRMWARE),
        tags=fields.tags("tags", new.tags),
        meta=fields.document("meta", new.meta),
    )


async def _record(
    connection: Connection, kind: EventKind, action: str, device: Device, actor: Actor, data: Mapping[str, Json]
) -> None:
    await audit.insert(connection, device.tenant_id, actor, action, "device", str(device.device_id), data)
    await events.insert(connection, NewEvent(kind, device.tenant_id, actor, device_id=device.device_id, data=data))
