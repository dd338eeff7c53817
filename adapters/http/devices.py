"""Devices over HTTP: manual registration to the letter of seed 002, the list, the record, its end, its timeline."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from litestar.params import FromPath
from litestar.response import Response
from msgspec import UNSET, Meta, UnsetType, field

from adapters.http.api_request import ApiRequest, answer
from adapters.http.bodies import uuid_in_path
from adapters.http.events import EventBody, EventsBody, event_body
from adapters.http.models import (
    Answer,
    CsrText,
    Document,
    GroupNames,
    HardwareIdText,
    Name,
    PageQuery,
    ProfileIdText,
    Psk,
    PskChoice,
    ReceiptBody,
    Request,
    Tags,
    given,
    issued_parts,
    receipt_body,
    utc,
    utc_or_none,
)
from adapters.http.operations import Operation, Reply, operation
from registry.devices import DeviceChanges, DeviceFilter, NewDevice
from registry.model import AnchorMode, CredentialKind, Device, DeviceId, DeviceStatus, Json

Firmware = Annotated[str, Meta(min_length=1, max_length=128)]
SiteId = Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]{1,64}$")]
FilterText = Annotated[str, Meta(min_length=1, max_length=256)]


class DeviceRegistration(Request, frozen=True, kw_only=True):
    """A device to be registered by hand (RegisterDevice). The tenant is the operator's, never the body's."""

    name: Name
    hardware_id: HardwareIdText
    groups: GroupNames = field(default_factory=list)
    tags: Tags = field(default_factory=dict)
    anchor_mode: AnchorMode | None = None
    profile_id: ProfileIdText | None = None
    site_id: SiteId | None = None
    gateway_id: UUID | None = None
    firmware: Firmware | None = None
    meta: Document = field(default_factory=dict)
    config: Document = field(default_factory=dict)
    credential_type: CredentialKind = CredentialKind.API_KEY
    psk: PskChoice | None = None
    csr: CsrText | None = None
    """For `credential_type` x509: the certificate is issued at once."""

    def device(self) -> NewDevice:
        """As the core takes it. Raises InvalidArgument."""
        return NewDevice(
            name=self.name,
            hardware_id=self.hardware_id,
            groups=self.groups,
            tags=self.tags,
            anchor_mode=self.anchor_mode,
            profile_id=self.profile_id,
            site_id=self.site_id,
            gateway_id=None if self.gateway_id is None else DeviceId(self.gateway_id),
            firmware=self.firmware,
            meta=self.meta,
            config=self.config,
            credential_type=self.credential_type,
            psk=None if self.psk is None else self.psk.assignment(),
            csr=None if self.csr is None else self.csr.encode(),
        )


class DeviceUpdate(Request, frozen=True, kw_only=True):
    """What to change. A field that is left out stays; `null` empties it. Identifiers may only repeat themselves."""

    device_id: UUID | UnsetType = UNSET
    hardware_id: HardwareIdText | UnsetType | None = UNSET
    credential_type: CredentialKind | UnsetType = UNSET
    name: Name | UnsetType = UNSET
    status: DeviceStatus | UnsetType = UNSET
    groups: GroupNames | UnsetType | None = UNSET
    tags: Tags | UnsetType | None = UNSET
    anchor_mode: AnchorMode | UnsetType = UNSET
    profile_id: ProfileIdText | UnsetType | None = UNSET
    site_id: SiteId | UnsetType | None = UNSET
    gateway_id: UUID | UnsetType | None = UNSET
    firmware: Firmware | UnsetType | None = UNSET
    meta: Document | UnsetType | None = UNSET
    config: Document | UnsetType | None = UNSET

    def changes(self) -> DeviceChanges:
        """As the core takes them."""
        return DeviceChanges(
            device_id=self.device_id if isinstance(self.device_id, UnsetType) else DeviceId(self.device_id),
            hardware_id=self.hardware_id,
            credential_type=self.credential_type,
            name=self.name,
            status=self.status,
            groups=self.groups,
            tags=self.tags,
            anchor_mode=self.anchor_mode,
            profile_id=self.profile_id,
            site_id=self.site_id,
            gateway_id=DeviceId(self.gateway_id) if isinstance(self.gateway_id, UUID) else self.gateway_id,
            firmware=self.firmware,
            meta=self.meta,
            config=self.config,
        )


class DeviceQuery(PageQuery, frozen=True, kw_only=True):
    """Which devices; every filter that is given must hold."""

    status: DeviceStatus | UnsetType = UNSET
    group: FilterText | UnsetType = UNSET
    tag: Annotated[str, Meta(min_length=1, max_length=1153, description="`key=value`, or `key`")] | UnsetType = UNSET
    profile_id: FilterText | UnsetType = UNSET
    site_id: FilterText | UnsetType = UNSET
    gateway_id: UUID | UnsetType = UNSET
    q: (
        Annotated[
            str, Meta(min_length=1, max_length=256, description="Part of the name, or the beginning of the hardware_id")
        ]
        | UnsetType
    ) = UNSET

    def wanted(self) -> DeviceFilter:
        """As the core takes it."""
        gateway_id = given(self.gateway_id)
        return DeviceFilter(
            status=given(self.status),
            group=given(self.group),
            tag=given(self.tag),
            profile_id=given(self.profile_id),
            site_id=given(self.site_id),
            gateway_id=None if gateway_id is None else DeviceId(gateway_id),
            q=given(self.q),
        )


class DeviceBody(Answer, frozen=True, kw_only=True):
    """A device's record."""

    device_id: UUID
    tenant_id: UUID
    name: str
    hardware_id: str | None
    status: DeviceStatus
    groups: list[str]
    tags: dict[str, str]
    anchor_mode: AnchorMode
    profile_id: str | None
    site_id: str | None
    gateway_id: UUID | None
    firmware: str | None
    meta: dict[str, Json]
    config: dict[str, Json]
    credential_type: CredentialKind
    template_id: str | None
    created_at: datetime
    updated_at: datetime
    activated_at: datetime | None
    last_seen_at: datetime | None


class RegisteredDevice(DeviceBody, frozen=True, kw_only=True):
    """A new device's record with its credential, which is shown this once; only the parts of its type are present."""

    credential_id: UUID | UnsetType = UNSET
    api_key: Annotated[str, Meta(examples=["sk_live_Zr8K2mQx..."])] | UnsetType = UNSET
    psk: Psk | UnsetType = UNSET
    certificate: str | UnsetType = UNSET
    ca_chain: str | UnsetType = UNSET
    fingerprint: str | UnsetType = UNSET
    not_after: datetime | UnsetType = UNSET
    renew_after: datetime | UnsetType = UNSET


class DeviceRecord(DeviceBody, frozen=True, kw_only=True):
    """A device's record with advice: `renew_after` is when to renew its certificate, null without one of ours."""

    renew_after: datetime | None


class UpdatedDevice(DeviceBody, frozen=True, kw_only=True):
    """A device's record after a change. `receipt` is there when the change ended its sessions."""

    receipt: ReceiptBody | UnsetType = UNSET


class DevicesBody(Answer, frozen=True, kw_only=True):
    """A page of devices, in the order in which they were made."""

    devices: list[DeviceBody]
    next_cursor: str | None


class SummaryBody(Answer, frozen=True, kw_only=True):
    """How many devices there are. Every status and every type is listed."""

    total: int
    by_status: dict[DeviceStatus, int]
    by_credential_type: dict[CredentialKind, int]


def device_body(device: Device) -> DeviceBody:
    """A device as it is shown."""
    return DeviceBody(**device_fields(device))


def device_fields(device: Device) -> Mapping[str, Any]:
    """The fields of a device as it is shown."""
    return {
        "device_id": device.device_id,
        "tenant_id": device.tenant_id,
        "name": device.name,
        "hardware_id": device.hardware_id,
        "status": device.status,
        "groups": list(device.groups),
        "tags": dict(device.tags),
        "anchor_mode": device.anchor_mode,
        "profile_id": device.profile_id,
        "site_id": device.site_id,
        "gateway_id": device.gateway_id,
        "firmware": device.firmware,
        "meta": dict(device.meta),
        "config": dict(device.config),
        "credential_type": device.credential_type,
        "template_id": device.template_id,
        "created_at": utc(device.created_at),
        "updated_at": utc(device.updated_at),
        "activated_at": utc_or_none(device.activated_at),
        "last_seen_at": utc_or_none(device.last_seen_at),
    }


def device_id_in(text: str) -> DeviceId:
    """The device id in a path. Raises NotFound for what is no UUID."""
    return DeviceId(uuid_in_path(text, "device"))


_EXAMPLE_REGISTRATION: Final = {
    "name": "Lab Bench Thermometer",
    "hardware_id": "HW-LAB-0001",
    "groups": ["lab", "floor-3"],
    "tags": {"region": "eu", "owner": "qa"},
    "anchor_mode": "ANCHOR_MODE_MERKLE_BATCH",
    "profile_id": "p_temp_sensor_v2",
}
_EXAMPLE_DEVICE: Final = {
    "device_id": "3a9f1d22-6b4c-4e8a-bf21-90c7e5d4a118",
    "tenant_id": "11111111-1111-1111-1111-111111111111",
    "name": "Lab Bench Thermometer",
    "hardware_id": "HW-LAB-0001",
    "status": "registered",
    "groups": ["lab", "floor-3"],
    "tags": {"region": "eu", "owner": "qa"},
    "anchor_mode": "ANCHOR_MODE_MERKLE_BATCH",
    "profile_id": "p_temp_sensor_v2",
    "site_id": None,
    "gateway_id": None,
    "firmware": None,
    "meta": {},
    "config": {},
    "credential_type": "api_key",
    "template_id": None,
    "created_at": "2026-05-29T10:15:00Z",
    "updated_at": "2026-05-29T10:15:00Z",
    "activated_at": None,
    "last_seen_at": None,
}


@operation(
    Operation(
        "POST",
        "/devices",
        "RegisterDevice",
        "Register a device by hand",
        "Devices",
        {
            201: Reply(
                "The device and its credential, shown this once",
                RegisteredDevice,
                _EXAMPLE_DEVICE | {"api_key": "sk_live_Zr8K2mQx...redacted..."},
            )
        },
        body=DeviceRegistration,
        body_example=_EXAMPLE_REGISTRATION,
        refusals=(409,),
        description="A hardware_id that the tenant already has is ALREADY_EXISTS: nothing is made, no event is "
        "published. A device of type x509 that sends no `csr` gets its certificate afterwards.",
    )
)
async def register_device(request: ApiRequest) -> Response[bytes]:
    """POST /devices"""
    new = (await request.decoded(DeviceRegistration)).device()
    operator = request.operator
    made = await request.registry.devices.register(operator.tenant_id, new, operator.actor)
    return answer(201, RegisteredDevice(**device_fields(made.device), **issued_parts(made.issued)))


@operation(
    Operation(
        "GET",
        "/devices",
        "ListDevices",
        "List devices",
        "Devices",
        {200: Reply("A page of devices", DevicesBody)},
        query=DeviceQuery,
    )
)
async def list_devices(request: ApiRequest) -> Response[bytes]:
    """GET /devices"""
    query = request.asked(DeviceQuery)
    found = await request.registry.devices.list(request.operator.tenant_id, query.wanted(), query.page())
    return answer(200, DevicesBody(devices=[device_body(d) for d in found.items], next_cursor=found.next_cursor))


@operation(
    Operation(
        "GET",
        "/devices/summary",
        "SummarizeDevices",
        "Count devices by status and credential type",
        "Devices",
        {200: Reply("The counts", SummaryBody)},
    )
)
async def summarize_devices(request: ApiRequest) -> Response[bytes]:
    """GET /devices/summary"""
    counts = await request.registry.devices.summary(request.operator.tenant_id)
    return answer(
        200,
        SummaryBody(
            total=counts.total,
            by_status=dict(counts.by_status),
            by_credential_type=dict(counts.by_credential_type),
        ),
    )


@operation(
    Operation(
        "GET",
        "/devices/{device_id}",
        "GetDevice",
        "Read a device",
        "Devices",
        {200: Reply("The device", DeviceRecord, _EXAMPLE_DEVICE | {"renew_after": None})},
    )
)
async def get_device(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """GET /devices/{device_id}"""
    registry, tenant_id = request.registry, request.operator.tenant_id
    device = await registry.devices.get(tenant_id, device_id_in(device_id))
    renew_after = None
    if device.credential_type is CredentialKind.X509:
        renew_after = utc_or_none(await registry.certificates.renew_after(tenant_id, device.device_id))
    return answer(200, DeviceRecord(**device_fields(device), renew_after=renew_after))


@operation(
    Operation(
        "PUT",
        "/devices/{device_id}",
        "UpdateDevice",
        "Change a device",
        "Devices",
        {200: Reply("The device after the change", UpdatedDevice)},
        body=DeviceUpdate,
        body_example={"status": "maintenance", "tags": {"region": "eu"}},
        refusals=(409,),
        description="Fields that are left out stay as they are. Setting `status` to `inactive` ends the device's "
        "sessions as a revocation does.",
    )
)
async def update_device(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """PUT /devices/{device_id}"""
    key = device_id_in(device_id)
    changes = (await request.decoded(DeviceUpdate)).changes()
    operator = request.operator
    updated = await request.registry.devices.update(operator.tenant_id, key, changes, operator.actor)
    receipt = UNSET if updated.receipt is None else receipt_body(updated.receipt)
    return answer(200, UpdatedDevice(**device_fields(updated.device), receipt=receipt))


@operation(
    Operation(
        "DELETE",
        "/devices/{device_id}",
        "DeleteDevice",
        "Delete a device with its credentials and end its sessions",
        "Devices",
        {200: Reply("What ended", ReceiptBody)},
    )
)
async def delete_device(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """DELETE /devices/{device_id}"""
    operator = request.operator
    receipt = await request.registry.devices.delete(operator.tenant_id, device_id_in(device_id), operator.actor)
    return answer(200, receipt_body(receipt))


@operation(
    Operation(
        "GET",
        "/devices/{device_id}/timeline",
        "GetDeviceTimeline",
        "What happened to a device, newest first, refusals and their exact reasons included",
        "Devices",
        {200: Reply("A page of events", EventsBody)},
        query=PageQuery,
    )
)
async def get_device_timeline(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """GET /devices/{device_id}/timeline"""
    key, tenant_id = device_id_in(device_id), request.operator.tenant_id
    page = request.asked(PageQuery).page()
    found = await request.registry.event_log.timeline(tenant_id, key, page)
    if not found.items and page.cursor is None:
        await request.registry.devices.get(tenant_id, key)  # a deleted device keeps its timeline; nobody's has none
    events: list[EventBody] = [event_body(event) for event in found.items]
    return answer(200, EventsBody(events=events, next_cursor=found.next_cursor))


ROUTES: Final = (
    register_device,
    list_devices,
    summarize_devices,
    get_device,
    update_device,
    delete_device,
    get_device_timeline,
)
