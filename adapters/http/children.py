"""A gateway's children over HTTP: attached by the gateway itself (registry/children.py)."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from litestar.response import Response
from msgspec import field

from adapters.http.api_request import ApiRequest, answer
from adapters.http.devices import Firmware
from adapters.http.models import Answer, Document, HardwareIdText, Name, Request, Tags
from adapters.http.operations import Operation, Reply, operation
from registry.children import NewChild


class ChildRequest(Request, frozen=True, kw_only=True):
    """A device behind the calling one. What is said beside `hardware_id` is for one that is not known yet."""

    hardware_id: HardwareIdText
    name: Name | None = None
    firmware: Firmware | None = None
    tags: Tags = field(default_factory=dict)
    meta: Document = field(default_factory=dict)


class ChildAnswer(Answer, frozen=True, kw_only=True):
    """The child, whose `gateway_id` the calling device is."""

    device_id: UUID
    created: bool


@operation(
    Operation(
        "POST",
        "/devices/me/children",
        "AttachChild",
        "Get or create a child of the calling device",
        "Devices",
        {201: Reply("It was made", ChildAnswer), 200: Reply("It is known", ChildAnswer)},
        body=ChildRequest,
        body_example={"hardware_id": "SENSOR-17", "name": "Freezer 17"},
        description="PERMISSION_DENIED for a device that exists and belongs to another gateway, or has ever "
        "authenticated by itself.",
    )
)
async def attach_child(request: ApiRequest) -> Response[bytes]:
    """POST /devices/me/children"""
    read = await request.decoded(ChildRequest)
    new = NewChild(read.hardware_id, read.name, read.firmware, read.tags, read.meta)
    attached = await request.registry.children.attach(request.device_session.identity, new, request.correlation_id)
    status = 201 if attached.created else 200
    return answer(status, ChildAnswer(device_id=attached.device_id, created=attached.created))


ROUTES: Final = (attach_child,)
