"""Device profiles: made, read, changed, deleted; refused where something would break."""

from __future__ import annotations

from typing import Any

import pytest

from registry.devices import NewDevice
from registry.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from registry.model import AnchorMode, Json, TenantId
from registry.paging import Page
from registry.profiles import NewProfile, ProfileChanges
from registry.storage.database import Database
from registry.templates import NewTemplate
from tests.services import OPERATOR, Services

EVERYTHING = NewProfile(
    name="Temperature sensor",
    profile_id="p_temp_sensor_v2",
    description="Measures.\nAnd reports.",
    tags={"kind": "sensor"},
    config={"interval": 60, "limits": {"low": -20.5, "high": None}},
    anchor_mode=AnchorMode.PER_EVENT,
    components=[{"name": "main", "sensors": [{"name": "t", "type": "DOUBLE", "unit": "°C"}]}],
    telemetry_schema={"type": "object"},
    writable_fields=["config.interval"],
    topic_grants=[{"filter": "site/+/alarm", "allow": ["publish", "subscribe"]}, {"filter": "#", "deny": ["publish"]}],
    allow_short_psk=True,
)


@pytest.fixture
def services(database: Database) -> Services:
    return Services(database)


async def test_a_profile_comes_back_as_it_was_given(services: Services, tenant_id: TenantId) -> None:
    made = await services.profiles.create(tenant_id, EVERYTHING, OPERATOR)
    assert await services.profiles.get(tenant_id, "p_temp_sensor_v2") == made
    for name in ("name", "description", "tags", "config", "anchor_mode", "telemetry_schema", "allow_short_psk"):
        assert getattr(made, name) == getattr(EVERYTHING, name)
    assert made.components == EVERYTHING.components
    assert made.topic_grants == EVERYTHING.topic_grants
    assert await services.audited(tenant_id) == ["create profile"]


async def test_an_id_is_generated_and_a_taken_one_refused(services: Services, tenant_id: TenantId) -> None:
    one = await services.profiles.create(tenant_id, NewProfile("One"), OPERATOR)
    assert one.profile_id.startswith("p_")
    with pytest.raises(AlreadyExists):
        await services.profiles.create(tenant_id, NewProfile("Two", one.profile_id), OPERATOR)


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"profile_id": "a b"}, "profile_id"),
    ({"profile_id": "x" * 65}, "profile_id"),
    ({"name": ""}, "name"),
    ({"description": "\x00"}, "description"),
    ({"config": {"a": "\x00"}}, "config"),
    ({"config": {"a": "x" * 40_000}}, "config"),
    ({"config": {"a": float("nan")}}, "config"),
    ({"tags": {str(n): "" for n in range(65)}}, "tags"),
    ({"components": [{"sensors": []}]}, "components"),
    ({"components": [{"name": "m", "sensors": [{"name": "t", "type": "FLOAT"}]}]}, "components"),
    ({"components": ["main"]}, "components"),
    ({"writable_fields": ["x"] * 65}, "writable_fields"),
    ({"topic_grants": [{"filter": "a"}]}, "topic_grants"),
    ({"topic_grants": [{"filter": "a", "allow": ["delete"]}]}, "topic_grants"),
    ({"topic_grants": [{"filter": "a", "allow": ["publish"], "denied": []}]}, "topic_grants"),
    ({"topic_grants": [{"filter": 7, "allow": []}]}, "topic_grants"),
    *(
        ({"topic_grants": [{"filter": wrong, "allow": ["publish"]}]}, "topic_grants")
        for wrong in (
            "a/#/b",
            "a#",
            "#/",
            "+a/b",
            "a/x+",
            "devices/me/x",
            "devices",
            "provision/#",
            "$SYS/a",
            "$share/g/a",
        )
    ),
]


async def test_filters_with_wildcards_in_their_places_are_kept(services: Services, tenant_id: TenantId) -> None:
    grants: list[Json] = [
        {"filter": text, "allow": ["publish"]}
        for text in ("#", "+", "+/+/#", "a/+/b", "/a//", "site/me/#", "devicesx", "x/devices", "a$/b")
    ]
    made = await services.profiles.create(tenant_id, NewProfile("P", topic_grants=grants), OPERATOR)
    assert list(made.topic_grants) == grants


async def test_malformed_profiles_are_refused(services: Services, tenant_id: TenantId) -> None:
    for wrong, field in MALFORMED:
        with pytest.raises(InvalidArgument) as refused:
            await services.profiles.create(tenant_id, NewProfile(**{"name": "P", **wrong}), OPERATOR)
        assert refused.value.field == field, wrong


async def test_an_update_changes_what_it_names_and_null_empties(services: Services, tenant_id: TenantId) -> None:
    before = await services.profiles.create(tenant_id, EVERYTHING, OPERATOR)
    services.clock.advance(minutes=1)

    after = await services.profiles.update(
        tenant_id, before.profile_id, ProfileChanges(name="New", anchor_mode=None, tags=None, topic_grants=[]), OPERATOR
    )

    assert await services.profiles.get(tenant_id, before.profile_id) == after
    assert (after.name, after.anchor_mode, after.tags, after.topic_grants) == ("New", None, {}, [])
    assert (after.config, after.components) == (before.config, before.components)
    assert after.updated_at > before.updated_at
    with pytest.raises(InvalidArgument):
        await services.profiles.update(tenant_id, before.profile_id, ProfileChanges(profile_id="p_other"), OPERATOR)


async def test_a_profile_in_use_stays(services: Services, tenant_id: TenantId) -> None:
    profile = await services.profiles.create(tenant_id, EVERYTHING, OPERATOR)
    made = await services.devices.register(tenant_id, NewDevice("D", "HW-1", profile_id=profile.profile_id), OPERATOR)
    with pytest.raises(FailedPrecondition, match="in use by devices"):
        await services.profiles.delete(tenant_id, profile.profile_id, OPERATOR)

    await services.devices.delete(tenant_id, made.device.device_id, OPERATOR)
    template = await services.templates.create(tenant_id, NewTemplate("T", profile_id=profile.profile_id), OPERATOR)
    with pytest.raises(FailedPrecondition, match="in use by provisioning templates"):
        await services.profiles.delete(tenant_id, profile.profile_id, OPERATOR)

    await services.templates.delete(tenant_id, template.template.template_id, OPERATOR)
    await services.profiles.delete(tenant_id, profile.profile_id, OPERATOR)
    with pytest.raises(NotFound):
        await services.profiles.get(tenant_id, profile.profile_id)


async def test_other_tenants_find_nothing(services: Services, tenant_id: TenantId) -> None:
    profile = await services.profiles.create(tenant_id, EVERYTHING, OPERATOR)
    other = (await services.tenants.create("Other", None, OPERATOR)).tenant_id

    for attempt in (
        services.profiles.get(other, profile.profile_id),
        services.profiles.update(other, profile.profile_id, ProfileChanges(name="X"), OPERATOR),
        services.profiles.delete(other, profile.profile_id, OPERATOR),
        services.profiles.get(tenant_id, "no such\x00"),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert (await services.profiles.list(other, Page())).items == []


async def test_the_list_is_in_the_order_of_ids(services: Services, tenant_id: TenantId) -> None:
    for profile_id in ("b", "A", "a", "Z", "_"):
        await services.profiles.create(tenant_id, NewProfile("P", profile_id), OPERATOR)
    first = await services.profiles.list(tenant_id, Page(3))
    rest = await services.profiles.list(tenant_id, Page(3, first.next_cursor))
    assert [p.profile_id for p in first.items + rest.items] == ["A", "Z", "_", "a", "b"]
    assert rest.next_cursor is None
