"""Uplinks and readings over HTTP: sent by devices (intake.py), read by operators."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Final
from uuid import UUID

import msgspec
from litestar.params import FromPath
from litestar.response import Response
from msgspec import UNSET, Meta, UnsetType

from adapters.http import answer as whole
from adapters.http.api_request import ApiRequest, answer
from adapters.http.devices import device_id_in
from adapters.http.intake import UplinkAnswer, UplinkBody
from adapters.http.models import Answer, Instant, PageQuery, given, utc, utc_or_none
from adapters.http.operations import Media, Operation, Reply, operation
from registry.errors import InvalidArgument
from registry.model import Json, Transport

Filter = Annotated[str, Meta(min_length=1, max_length=128)]


_VALUES: Final[Mapping[str, Json]] = {
    "type": "object",
    "minProperties": 1,
    "maxProperties": 1000,
    "propertyNames": {"minLength": 1, "maxLength": 257},
    "additionalProperties": {"type": ["number", "boolean", "string", "null"], "maxLength": 4096},
}
_DATED: Final[Mapping[str, Json]] = {
    "type": "object",
    "required": ["values"],
    "properties": {"observed_at": {"type": ["string", "null"], "format": "date-time"}, "values": _VALUES},
    "additionalProperties": False,
}
_TELEMETRY: Final[Mapping[str, Json]] = {
    "title": "Telemetry",
    "anyOf": [
        _VALUES,
        _DATED,
        {"type": "array", "minItems": 1, "maxItems": 1000, "items": {"anyOf": [_VALUES, _DATED]}},
    ],
}


class TimeQuery(PageQuery, frozen=True, kw_only=True):
    """Which part, and of which time: `since` is included, `until` is not."""

    since: Instant | UnsetType = UNSET
    until: Instant | UnsetType = UNSET


class UplinkQuery(TimeQuery, frozen=True, kw_only=True):
    """Which uplinks; times are those of receipt."""

    kind: Filter | UnsetType = UNSET


class ReadingQuery(TimeQuery, frozen=True, kw_only=True):
    """Which readings; times are those of observation."""

    component: Filter | UnsetType = UNSET
    sensor: Filter | UnsetType = UNSET


class UplinkEntry(Answer, frozen=True, kw_only=True):
    """A stored uplink; `payload` is the sender's JSON, unchanged. `via` is the gateway that sent it."""

    uplink_id: UUID
    kind: str
    payload: msgspec.Raw
    message_id: str | None
    observed_at: datetime | None
    received_at: datetime
    transport: Transport
    via: UUID | None


class UplinksBody(Answer, frozen=True, kw_only=True):
    """A page of uplinks, newest first."""

    uplinks: list[UplinkEntry]
    next_cursor: str | None


class ReadingEntry(Answer, frozen=True, kw_only=True):
    """A reading of a sensor."""

    component: str
    sensor: str
    observed_at: datetime
    received_at: datetime
    value: float | int | bool | str
    uplink_id: UUID


class ReadingsBody(Answer, frozen=True, kw_only=True):
    """A page of readings, newest first."""

    readings: list[ReadingEntry]
    next_cursor: str | None


_STORED: Final = Reply("It is stored", UplinkAnswer, {"uplink_id": "0197a0c4-1c1e-7000-8a2b-3c4d5e6f7081"})
_MEDIA: Final = ("application/json", "application/cbor")


@operation(
    Operation(
        "POST",
        "/devices/{device_id}/uplink",
        "SendUplink",
        "Send an uplink, for oneself or for a child",
        "Uplinks",
        {202: _STORED},
        body=UplinkBody,
        body_media=_MEDIA,
        body_example={"kind": "telemetry", "payload": {"env.temperature": 21.5}, "message_id": "boot7-000042"},
        description="Answered after the commit. Repeating a `message_id` is safe and answers the first one's id.",
    )
)
async def send_uplink(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """POST /devices/{device_id}/uplink"""
    body = await request.body()
    return _response(
        await request.service.intake.uplink(request.device_session, device_id, request.scope["headers"], body)
    )


@operation(
    Operation(
        "POST",
        "/telemetry",
        "SendTelemetry",
        "Send readings of the calling device",
        "Uplinks",
        {202: _STORED},
        body=Media("application/json", _TELEMETRY),
        body_media=_MEDIA,
        body_example={"env.temperature": 21.5, "battery": 87},
        headers={"Idempotency-Key": "The message id; repeating it is safe and answers the first one's id."},
        description="An object of `<component>.<sensor>` members, `{observed_at, values}`, or an array of either.",
    )
)
async def send_telemetry(request: ApiRequest) -> Response[bytes]:
    """POST /telemetry"""
    body = await request.body()
    return _response(await request.service.intake.telemetry(request.device_session, request.scope["headers"], body))


@operation(
    Operation(
        "GET",
        "/devices/{device_id}/uplinks",
        "ListUplinks",
        "List a device's uplinks, newest first",
        "Uplinks",
        {200: Reply("A page of uplinks", UplinksBody)},
        query=UplinkQuery,
    )
)
async def list_uplinks(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """GET /devices/{device_id}/uplinks"""
    key, tenant_id = device_id_in(device_id), request.operator.tenant_id
    query = request.asked(UplinkQuery)
    await request.registry.devices.get(tenant_id, key)
    found = await request.registry.uplinks.list_uplinks(
        tenant_id,
        key,
        query.page(),
        kind=given(query.kind),
        since=_moment(query.since, "since"),
        until=_moment(query.until, "until"),
    )
    entries = [
        UplinkEntry(
            uplink_id=u.uplink_id,
            kind=u.kind,
            payload=msgspec.Raw(u.payload.encode()),
            message_id=u.message_id,
            observed_at=utc_or_none(u.observed_at),
            received_at=utc(u.received_at),
            transport=u.transport,
            via=u.via,
        )
        for u in found.items
    ]
    return answer(200, UplinksBody(uplinks=entries, next_cursor=found.next_cursor))


@operation(
    Operation(
        "GET",
        "/devices/{device_id}/readings",
        "ListReadings",
        "List a device's readings, newest first",
        "Uplinks",
        {200: Reply("A page of readings", ReadingsBody)},
        query=ReadingQuery,
    )
)
async def list_readings(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """GET /devices/{device_id}/readings"""
    key, tenant_id = device_id_in(device_id), request.operator.tenant_id
    query = request.asked(ReadingQuery)
    await request.registry.devices.get(tenant_id, key)
    found = await request.registry.uplinks.list_readings(
        tenant_id,
        key,
        query.page(),
        component=given(query.component),
        sensor=given(query.sensor),
        since=_moment(query.since, "since"),
        until=_moment(query.until, "until"),
    )
    entries = [
        ReadingEntry(
            component=r.component,
            sensor=r.sensor,
            observed_at=utc(r.observed_at),
            received_at=utc(r.received_at),
            value=r.value,
            uplink_id=r.uplink_id,
        )
        for r in found.items
    ]
    return answer(200, ReadingsBody(readings=entries, next_cursor=found.next_cursor))


def _moment(value: datetime | UnsetType, field: str) -> datetime | None:
    if isinstance(value, UnsetType):
        return None
    try:
        return utc(value)
    except OverflowError:
        raise InvalidArgument(f"{field} is outside the years 1 to 9999", field=field) from None


def _response(made: whole.Answer) -> Response[bytes]:
    return Response(made.body, status_code=made.status, media_type="application/json")


ROUTES: Final = (send_uplink, send_telemetry, list_uplinks, list_readings)
