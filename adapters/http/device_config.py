"""Configurations over HTTP: put and compared by operators, fetched and reported back by devices.

The version is the entity tag (RFC 9110 §8.8.3): `GET` answers `ETag: "7"`, and a `PUT` with `If-Match: "7"` is refused
with 412 if that is no longer the newest (§13.1.1). `version` in the body asks the same, and is refused with 400 as
every FAILED_PRECONDITION is. Operators and devices read at one path; an operator sees what the device has reported,
too.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Final

from litestar.params import FromPath
from litestar.response import Response
from msgspec import UNSET, Meta, UnsetType, json

from adapters.http.api_request import ApiRequest, answer
from adapters.http.devices import device_id_in
from adapters.http.errors import NoMatch
from adapters.http.models import Answer, Document, Request, utc
from adapters.http.operations import Operation, Reply, operation
from registry.device_config import DeviceConfig, OtherVersion, report_from
from registry.errors import InvalidArgument
from registry.model import Json

Version = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_TAG: Final = re.compile(r'"([1-9][0-9]{0,9})"')


class ConfigPut(Request, frozen=True, kw_only=True):
    """What the device should run with from now on, whole. `version` is the one that the caller has seen."""

    config: Document
    version: Version | None = None


class ConfigReportBody(Request, frozen=True, kw_only=True):
    """What the device has applied."""

    version: Version
    config: Document | None = None


class ReportedBody(Answer, frozen=True, kw_only=True):
    """What the device said last. `config` is null where it told the version only."""

    version: int
    config: dict[str, Json] | None
    reported_at: datetime


class ConfigBody(Answer, frozen=True, kw_only=True):
    """What the device should run with; and for operators, what it says it runs with."""

    version: int
    config: dict[str, Json]
    reported: ReportedBody | UnsetType | None = UNSET


class ReportAnswer(Answer, frozen=True, kw_only=True):
    """It is stored; `version` is the newest there is."""

    version: int


@operation(
    Operation(
        "GET",
        "/devices/{device_id}/config",
        "GetDeviceConfig",
        "Read what a device should run with",
        "Commands",
        {200: Reply("The configuration; its version is the ETag, too", ConfigBody)},
        description="For operators also what the device has reported; devices read their own and their children's.",
    )
)
async def get_config(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """GET /devices/{device_id}/config"""
    configs = request.registry.device_configs
    if request.is_of_operator:
        found = await configs.get(request.operator.tenant_id, device_id_in(device_id))
        return _tagged(found, ConfigBody(version=found.version, config=dict(found.config), reported=_reported(found)))
    source = await request.service.intake.source(request.device_session, device_id)
    found = await configs.get(source.tenant_id, source.device_id)
    return _tagged(found, ConfigBody(version=found.version, config=dict(found.config)))


@operation(
    Operation(
        "PUT",
        "/devices/{device_id}/config",
        "PutDeviceConfig",
        "Replace what a device should run with",
        "Commands",
        {200: Reply("The configuration; what is there already is no new version", ConfigBody)},
        body=ConfigPut,
        body_example={"config": {"interval_s": 60}},
        headers={"If-Match": "The ETag that the caller has seen."},
        refusals=(412,),
    )
)
async def put_config(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """PUT /devices/{device_id}/config"""
    key, operator = device_id_in(device_id), request.operator
    matched = _if_match(request.headers.get("if-match"))
    read = await request.decoded(ConfigPut)
    if matched is not None and read.version not in (None, matched):
        raise InvalidArgument("If-Match and version name two versions; give one of them", field="version")
    try:
        config = await request.registry.device_configs.put(
            operator.tenant_id, key, read.config, operator.actor, seen_version=matched or read.version
        )
    except OtherVersion as other:
        if matched is None:
            raise
        raise NoMatch(other.message) from None
    return _tagged(config, ConfigBody(version=config.version, config=dict(config.config), reported=_reported(config)))


@operation(
    Operation(
        "POST",
        "/devices/{device_id}/config/reported",
        "ReportDeviceConfig",
        "Say what has been applied, for oneself or for a child",
        "Commands",
        {200: Reply("It is stored", ReportAnswer)},
        body=ConfigReportBody,
        body_media=("application/json", "application/cbor"),
        body_example={"version": 1, "config": {"interval_s": 60}},
    )
)
async def report_config(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """POST /devices/{device_id}/config/reported"""
    intake = request.service.intake
    source = await intake.source(request.device_session, device_id)
    report = report_from(intake.payload(request.scope["headers"], await request.body()))
    config = await request.registry.device_configs.report(source, report, request.correlation_id)
    return answer(200, ReportAnswer(version=config.version))


def _if_match(text: str | None) -> int | None:
    """The version of an If-Match header; None for `*` and for no header. Raises InvalidArgument, NoMatch."""
    if text is None or text.strip() == "*":
        return None
    tag = _TAG.fullmatch(text.strip())
    if tag is None:
        raise InvalidArgument('If-Match is not the ETag of a configuration; "7" is how it looks', field="If-Match")
    version = int(tag[1])
    if version >= 2**31:
        raise NoMatch(f"there has never been a version {version}")
    return version


def _reported(config: DeviceConfig) -> ReportedBody | None:
    said = config.reported
    if said is None:
        return None
    return ReportedBody(
        version=said.version,
        config=None if said.config is None else dict(said.config),
        reported_at=utc(said.reported_at),
    )


def _tagged(config: DeviceConfig, body: ConfigBody) -> Response[bytes]:
    return Response(
        json.encode(body),
        status_code=200,
        media_type="application/json",
        headers={"etag": f'"{config.version}"'},
    )


ROUTES: Final = (get_config, put_config, report_config)
