"""Provisioning templates over HTTP, with every field of seed 001. The key is shown once, when the template is made."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from litestar.params import FromPath
from litestar.response import Response
from msgspec import UNSET, Meta, UnsetType, field

from adapters.http.api_request import ApiRequest, answer
from adapters.http.devices import DevicesBody, device_body
from adapters.http.models import (
    Answer,
    ClosedSessionLine,
    GroupNames,
    Instant,
    Name,
    PageQuery,
    ProfileIdText,
    Request,
    utc,
    utc_or_none,
)
from adapters.http.operations import Operation, Reply, operation
from registry.model import CredentialKind, Template, TemplateStatus
from registry.templates import NewTemplate, TemplateChanges

Pattern = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=256,
        description="RE2 syntax, matched against the whole hardware_id",
        examples=["AA:BB:CC(:[0-9A-F]{2}){3}"],
    ),
]
MaxClaims = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class TemplateCreation(Request, frozen=True, kw_only=True):
    """A template to be made."""

    name: Name
    profile_id: ProfileIdText | None = None
    hardware_id_pattern: Pattern | None = None
    expires_at: Instant | None = None
    one_time: bool = False
    max_claims: MaxClaims | None = None
    credential_type: CredentialKind = CredentialKind.API_KEY
    default_groups: GroupNames = field(default_factory=list)
    status: TemplateStatus = TemplateStatus.ACTIVE

    def template(self) -> NewTemplate:
        """As the core takes it."""
        return NewTemplate(
            name=self.name,
            profile_id=self.profile_id,
            hardware_id_pattern=self.hardware_id_pattern,
            expires_at=self.expires_at,
            one_time=self.one_time,
            max_claims=self.max_claims,
            credential_type=self.credential_type,
            default_groups=self.default_groups,
            status=self.status,
        )


class TemplateUpdate(Request, frozen=True, kw_only=True):
    """What to change. A field that is left out stays; `null` takes the restriction away."""

    template_id: str | UnsetType = UNSET
    name: Name | UnsetType = UNSET
    profile_id: ProfileIdText | UnsetType | None = UNSET
    hardware_id_pattern: Pattern | UnsetType | None = UNSET
    expires_at: Instant | UnsetType | None = UNSET
    one_time: bool | UnsetType = UNSET
    max_claims: MaxClaims | UnsetType | None = UNSET
    credential_type: CredentialKind | UnsetType = UNSET
    default_groups: GroupNames | UnsetType | None = UNSET
    status: TemplateStatus | UnsetType = UNSET

    def changes(self) -> TemplateChanges:
        """As the core takes them."""
        return TemplateChanges(
            template_id=self.template_id,
            name=self.name,
            profile_id=self.profile_id,
            hardware_id_pattern=self.hardware_id_pattern,
            expires_at=self.expires_at,
            one_time=self.one_time,
            max_claims=self.max_claims,
            credential_type=self.credential_type,
            default_groups=self.default_groups,
            status=self.status,
        )


class TemplateBody(Answer, frozen=True, kw_only=True):
    """A provisioning template, without its key."""

    template_id: str
    tenant_id: UUID
    name: str
    profile_id: str | None
    hardware_id_pattern: str | None
    expires_at: datetime | None
    one_time: bool
    max_claims: int | None
    claims: int
    credential_type: CredentialKind
    default_groups: list[str]
    status: TemplateStatus
    created_by: str
    created_at: datetime
    updated_at: datetime


class CreatedTemplateBody(TemplateBody, frozen=True, kw_only=True):
    """A new template and its key, which is shown this once."""

    provision_key: Annotated[str, Meta(examples=["pk_factory_7Qx2mZr8K..."])]


class TemplatesBody(Answer, frozen=True, kw_only=True):
    """A page of templates, in the order in which they were made."""

    templates: list[TemplateBody]
    next_cursor: str | None


class RevokedDevicesBody(Answer, frozen=True, kw_only=True):
    """What ended. `remaining` counts sessions that no node has confirmed as closed.

    `unconfirmed` counts credentials whose receipts were not awaited; their sessions are closed all the same.
    """

    template_id: str
    status: TemplateStatus
    devices: int
    credentials: int
    revoked_at: datetime
    sessions: list[ClosedSessionLine]
    remaining: int
    unconfirmed: int


def template_fields(template: Template) -> Mapping[str, Any]:
    """The fields of a template as it is shown."""
    return {
        "template_id": template.template_id,
        "tenant_id": template.tenant_id,
        "name": template.name,
        "profile_id": template.profile_id,
        "hardware_id_pattern": template.hardware_id_pattern,
        "expires_at": utc_or_none(template.expires_at),
        "one_time": template.one_time,
        "max_claims": template.max_claims,
        "claims": template.claims,
        "credential_type": template.credential_type,
        "default_groups": list(template.default_groups),
        "status": template.status,
        "created_by": template.created_by,
        "created_at": utc(template.created_at),
        "updated_at": utc(template.updated_at),
    }


def template_body(template: Template) -> TemplateBody:
    """A template as it is shown."""
    return TemplateBody(**template_fields(template))


@operation(
    Operation(
        "POST",
        "/provisioning/templates",
        "CreateTemplate",
        "Make a provisioning template and its key",
        "Provisioning",
        {201: Reply("The template and its key, shown this once", CreatedTemplateBody)},
        body=TemplateCreation,
        body_example={
            "name": "Cold store, line A",
            "profile_id": "p_temp_sensor_v2",
            "hardware_id_pattern": "AA:BB:CC(:[0-9A-F]{2}){3}",
            "expires_at": "2027-01-01T00:00:00Z",
            "default_groups": ["cold-store"],
        },
    )
)
async def create_template(request: ApiRequest) -> Response[bytes]:
    """POST /provisioning/templates"""
    new = (await request.decoded(TemplateCreation)).template()
    operator = request.operator
    made = await request.registry.templates.create(operator.tenant_id, new, operator.actor)
    key = made.provision_key.reveal()
    return answer(201, CreatedTemplateBody(**template_fields(made.template), provision_key=key))


@operation(
    Operation(
        "GET",
        "/provisioning/templates",
        "ListTemplates",
        "List provisioning templates",
        "Provisioning",
        {200: Reply("A page of templates", TemplatesBody)},
        query=PageQuery,
    )
)
async def list_templates(request: ApiRequest) -> Response[bytes]:
    """GET /provisioning/templates"""
    page = request.asked(PageQuery).page()
    found = await request.registry.templates.list(request.operator.tenant_id, page)
    return answer(200, TemplatesBody(templates=[template_body(t) for t in found.items], next_cursor=found.next_cursor))


@operation(
    Operation(
        "GET",
        "/provisioning/templates/{template_id}",
        "GetTemplate",
        "Read a provisioning template",
        "Provisioning",
        {200: Reply("The template", TemplateBody)},
    )
)
async def get_template(request: ApiRequest, template_id: FromPath[str]) -> Response[bytes]:
    """GET /provisioning/templates/{template_id}"""
    return answer(200, template_body(await request.registry.templates.get(request.operator.tenant_id, template_id)))


@operation(
    Operation(
        "PUT",
        "/provisioning/templates/{template_id}",
        "UpdateTemplate",
        "Change a provisioning template",
        "Provisioning",
        {200: Reply("The template after the change", TemplateBody)},
        body=TemplateUpdate,
        body_example={"status": "disabled"},
    )
)
async def update_template(request: ApiRequest, template_id: FromPath[str]) -> Response[bytes]:
    """PUT /provisioning/templates/{template_id}"""
    changes = (await request.decoded(TemplateUpdate)).changes()
    operator = request.operator
    changed = await request.registry.templates.update(operator.tenant_id, template_id, changes, operator.actor)
    return answer(200, template_body(changed))


@operation(
    Operation(
        "DELETE",
        "/provisioning/templates/{template_id}",
        "DeleteTemplate",
        "Delete a provisioning template; its devices stay",
        "Provisioning",
        {204: Reply("It is deleted; its key is unknown from now on")},
    )
)
async def delete_template(request: ApiRequest, template_id: FromPath[str]) -> None:
    """DELETE /provisioning/templates/{template_id}"""
    operator = request.operator
    await request.registry.templates.delete(operator.tenant_id, template_id, operator.actor)


@operation(
    Operation(
        "GET",
        "/provisioning/templates/{template_id}/devices",
        "ListTemplateDevices",
        "List the devices that were claimed with a template's key",
        "Provisioning",
        {200: Reply("A page of devices", DevicesBody)},
        query=PageQuery,
    )
)
async def list_template_devices(request: ApiRequest, template_id: FromPath[str]) -> Response[bytes]:
    """GET /provisioning/templates/{template_id}/devices"""
    page = request.asked(PageQuery).page()
    found = await request.registry.templates.devices(request.operator.tenant_id, template_id, page)
    return answer(200, DevicesBody(devices=[device_body(d) for d in found.items], next_cursor=found.next_cursor))


@operation(
    Operation(
        "POST",
        "/provisioning/templates/{template_id}/revoke-devices",
        "RevokeTemplateDevices",
        "Disable a template and end every credential of the devices that were claimed with its key",
        "Provisioning",
        {200: Reply("What ended", RevokedDevicesBody)},
        description="Takes no body. If it fails half-way, calling it again goes on.",
    )
)
async def revoke_template_devices(request: ApiRequest, template_id: FromPath[str]) -> Response[bytes]:
    """POST /provisioning/templates/{template_id}/revoke-devices"""
    operator = request.operator
    done = await request.registry.templates.revoke_devices(operator.tenant_id, template_id, operator.actor)
    return answer(
        200,
        RevokedDevicesBody(
            template_id=done.template.template_id,
            status=done.template.status,
            devices=done.devices,
            credentials=done.credentials,
            revoked_at=utc(done.revoked_at),
            sessions=[
                ClosedSessionLine(
                    session_id=s.session_id, transport=s.transport, node_id=s.node_id, closed_after_ms=s.closed_after_ms
                )
                for s in done.sessions
            ],
            remaining=done.remaining,
            unconfirmed=done.unconfirmed,
        ),
    )


ROUTES: Final = (
    create_template,
    list_templates,
    get_template,
    update_template,
    delete_template,
    list_template_devices,
    revoke_template_devices,
)
