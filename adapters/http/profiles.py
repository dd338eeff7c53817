"""Device profiles over HTTP."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final
from uuid import UUID

from litestar.params import FromPath
from litestar.response import Response
from msgspec import UNSET, Meta, UnsetType, field

from adapters.http.api_request import ApiRequest, answer
from adapters.http.models import Answer, Document, Name, PageQuery, ProfileIdText, Request, Tags, utc
from adapters.http.operations import Operation, Reply, operation
from registry.model import AnchorMode, DeviceProfile, Json
from registry.profiles import NewProfile, ProfileChanges

Description = Annotated[str, Meta(max_length=4096)]
Documents = Annotated[list[dict[str, Json]], Meta(max_length=64)]
FieldNames = Annotated[list[Annotated[str, Meta(min_length=1, max_length=128)]], Meta(max_length=64)]


class ProfileCreation(Request, frozen=True, kw_only=True):
    """A profile to be made. Without `profile_id` one is generated."""

    name: Name
    profile_id: ProfileIdText | None = None
    description: Description = ""
    tags: Tags = field(default_factory=dict)
    config: Document = field(default_factory=dict)
    anchor_mode: AnchorMode | None = None
    components: Documents = field(default_factory=list)
    telemetry_schema: Document = field(default_factory=dict)
    writable_fields: FieldNames = field(default_factory=list)
    topic_grants: Documents = field(default_factory=list)
    allow_short_psk: bool = False

    def profile(self) -> NewProfile:
        """As the core takes it."""
        return NewProfile(
            name=self.name,
            profile_id=self.profile_id,
            description=self.description,
            tags=self.tags,
            config=self.config,
            anchor_mode=self.anchor_mode,
            components=self.components,
            telemetry_schema=self.telemetry_schema,
            writable_fields=self.writable_fields,
            topic_grants=self.topic_grants,
            allow_short_psk=self.allow_short_psk,
        )


class ProfileUpdate(Request, frozen=True, kw_only=True):
    """What to change. A field that is left out stays; `null` empties it. `profile_id` may only repeat itself."""

    profile_id: ProfileIdText | UnsetType = UNSET
    name: Name | UnsetType = UNSET
    description: Description | UnsetType | None = UNSET
    tags: Tags | UnsetType | None = UNSET
    config: Document | UnsetType | None = UNSET
    anchor_mode: AnchorMode | UnsetType | None = UNSET
    components: Documents | UnsetType | None = UNSET
    telemetry_schema: Document | UnsetType | None = UNSET
    writable_fields: FieldNames | UnsetType | None = UNSET
    topic_grants: Documents | UnsetType | None = UNSET
    allow_short_psk: bool | UnsetType = UNSET

    def changes(self) -> ProfileChanges:
        """As the core takes them."""
        return ProfileChanges(
            profile_id=self.profile_id,
            name=self.name,
            description=self.description,
            tags=self.tags,
            config=self.config,
            anchor_mode=self.anchor_mode,
            components=self.components,
            telemetry_schema=self.telemetry_schema,
            writable_fields=self.writable_fields,
            topic_grants=self.topic_grants,
            allow_short_psk=self.allow_short_psk,
        )


class ProfileBody(Answer, frozen=True, kw_only=True):
    """A device profile."""

    profile_id: str
    tenant_id: UUID
    name: str
    description: str
    tags: dict[str, str]
    config: dict[str, Json]
    anchor_mode: AnchorMode | None
    components: list[dict[str, Json]]
    telemetry_schema: dict[str, Json]
    writable_fields: list[str]
    topic_grants: list[dict[str, Json]]
    allow_short_psk: bool
    created_at: datetime
    updated_at: datetime


class ProfilesBody(Answer, frozen=True, kw_only=True):
    """A page of profiles, in the order of their ids."""

    profiles: list[ProfileBody]
    next_cursor: str | None


def profile_body(profile: DeviceProfile) -> ProfileBody:
    """A profile as it is shown."""
    return ProfileBody(
        profile_id=profile.profile_id,
        tenant_id=profile.tenant_id,
        name=profile.name,
        description=profile.description,
        tags=dict(profile.tags),
        config=dict(profile.config),
        anchor_mode=profile.anchor_mode,
        components=list(profile.components),
        telemetry_schema=dict(profile.telemetry_schema),
        writable_fields=list(profile.writable_fields),
        topic_grants=list(profile.topic_grants),
        allow_short_psk=profile.allow_short_psk,
        created_at=utc(profile.created_at),
        updated_at=utc(profile.updated_at),
    )


@operation(
    Operation(
        "POST",
        "/profiles",
        "CreateProfile",
        "Make a device profile",
        "Profiles",
        {201: Reply("The profile", ProfileBody)},
        body=ProfileCreation,
        body_example={"profile_id": "p_temp_sensor_v2", "name": "Temperature sensor", "tags": {"kind": "temp"}},
        refusals=(409,),
    )
)
async def create_profile(request: ApiRequest) -> Response[bytes]:
    """POST /profiles"""
    new = (await request.decoded(ProfileCreation)).profile()
    operator = request.operator
    return answer(201, profile_body(await request.registry.profiles.create(operator.tenant_id, new, operator.actor)))


@operation(
    Operation(
        "GET",
        "/profiles",
        "ListProfiles",
        "List device profiles",
        "Profiles",
        {200: Reply("A page of profiles", ProfilesBody)},
        query=PageQuery,
    )
)
async def list_profiles(request: ApiRequest) -> Response[bytes]:
    """GET /profiles"""
    page = request.asked(PageQuery).page()
    found = await request.registry.profiles.list(request.operator.tenant_id, page)
    return answer(200, ProfilesBody(profiles=[profile_body(p) for p in found.items], next_cursor=found.next_cursor))


@operation(
    Operation(
        "GET",
        "/profiles/{profile_id}",
        "GetProfile",
        "Read a device profile",
        "Profiles",
        {200: Reply("The profile", ProfileBody)},
    )
)
async def get_profile(request: ApiRequest, profile_id: FromPath[str]) -> Response[bytes]:
    """GET /profiles/{profile_id}"""
    return answer(200, profile_body(await request.registry.profiles.get(request.operator.tenant_id, profile_id)))


@operation(
    Operation(
        "PUT",
        "/profiles/{profile_id}",
        "UpdateProfile",
        "Change a device profile",
        "Profiles",
        {200: Reply("The profile after the change", ProfileBody)},
        body=ProfileUpdate,
        body_example={"description": "Second hardware revision"},
        description="Devices that exist keep what they took from the profile when they were made.",
    )
)
async def update_profile(request: ApiRequest, profile_id: FromPath[str]) -> Response[bytes]:
    """PUT /profiles/{profile_id}"""
    changes = (await request.decoded(ProfileUpdate)).changes()
    operator = request.operator
    changed = await request.registry.profiles.update(operator.tenant_id, profile_id, changes, operator.actor)
    return answer(200, profile_body(changed))


@operation(
    Operation(
        "DELETE",
        "/profiles/{profile_id}",
        "DeleteProfile",
        "Delete a device profile that nothing uses",
        "Profiles",
        {204: Reply("It is deleted")},
        description="FAILED_PRECONDITION (400) while devices or templates use it.",
    )
)
async def delete_profile(request: ApiRequest, profile_id: FromPath[str]) -> None:
    """DELETE /profiles/{profile_id}"""
    operator = request.operator
    await request.registry.profiles.delete(operator.tenant_id, profile_id, operator.actor)


ROUTES: Final = (create_profile, list_profiles, get_profile, update_profile, delete_profile)
