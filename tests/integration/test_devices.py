"""Seed 002 and the device part of seed 004: registration by hand, lists, changes, deletion."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any
from uuid import uuid4

import pytest

from registry import secrets
from registry.credentials import IssuedApiKey
from registry.devices import DeviceChanges, DeviceFilter, NewDevice, Registered
from registry.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from registry.model import AnchorMode, CredentialKind, Device, DeviceId, DeviceStatus, TenantId
from registry.paging import Page
from registry.profiles import NewProfile
from registry.psk import IssuedPsk, PskAssignment
from registry.secrets import Secret
from registry.storage.database import Database
from tests.services import NOON, OPERATOR, Services

THERMOMETER = NewDevice(
    name="Lab Bench Thermometer",
    hardware_id="HW-LAB-0001",
    groups=["lab", "floor-3"],
    tags={"region": "eu", "owner": "qa"},
    anchor_mode=AnchorMode.MERKLE_BATCH,
    profile_id="p_temp_sensor_v2",
)


@pytest.fixture
async def services(database: Database, tenant_id: TenantId) -> Services:
    services = Services(database)
    await services.profiles.create(
        tenant_id,
        NewProfile(
            "Temperature",
            "p_temp_sensor_v2",
            tags={"region": "us", "kind": "temp"},
            config={"interval": 60, "limits": {"low": 1, "high": 9}},
            anchor_mode=AnchorMode.HASH_CHAIN,
        ),
        OPERATOR,
    )
    return services


async def named(services: Services, tenant_id: TenantId, hardware_id: str, **said: Any) -> Device:
    made = await services.devices.register(
        tenant_id, NewDevice(**{"name": hardware_id, "hardware_id": hardware_id, **said}), OPERATOR
    )
    services.clock.advance(seconds=1)
    return made.device


# -- registration ------------------------------------------------------------------------------------------------------


async def test_registration_as_the_seed_shows_it(services: Services, tenant_id: TenantId) -> None:
    registered = await services.devices.register(tenant_id, THERMOMETER, OPERATOR)

    device, issued = registered.device, registered.issued
    assert await services.devices.get(tenant_id, device.device_id) == device
    assert (device.tenant_id, device.status, device.created_at) == (tenant_id, DeviceStatus.REGISTERED, NOON)
    assert (device.groups, device.profile_id) == (["lab", "floor-3"], "p_temp_sensor_v2")
    assert isinstance(issued, IssuedApiKey)
    [row] = await services.rows("SELECT lookup, device_id FROM credential")
    assert (row["lookup"], row["device_id"]) == (secrets.digest(issued.api_key.reveal()), device.device_id)
    assert await services.kinds(tenant_id) == ["device.registered"]
    assert await services.audited(tenant_id) == ["create profile", "register device"]
    assert services.bell.rung == 1


async def test_a_taken_hardware_id_is_refused_loudly_and_without_a_trace(
    services: Services, tenant_id: TenantId
) -> None:
    await services.devices.register(tenant_id, THERMOMETER, OPERATOR)

    with pytest.raises(AlreadyExists) as refused:
        await services.devices.register(tenant_id, NewDevice("Another", "HW-LAB-0001"), OPERATOR)

    assert refused.value.message == 'device with hardware_id "HW-LAB-0001" already exists in this tenant'
    assert await services.kinds(tenant_id) == ["device.registered"]
    assert len(await services.rows("SELECT 1 FROM credential")) == 1
    other = (await services.tenants.create("Other", None, OPERATOR)).tenant_id
    assert (
        await services.devices.register(other, NewDevice("Same", "HW-LAB-0001"), OPERATOR)
    ).device.tenant_id == other


async def test_of_many_at_once_one_registers(services: Services, tenant_id: TenantId) -> None:
    outcomes = await asyncio.gather(
        *(services.devices.register(tenant_id, THERMOMETER, OPERATOR) for _ in range(20)), return_exceptions=True
    )
    assert sorted(type(o).__name__ for o in outcomes) == ["AlreadyExists"] * 19 + ["Registered"]
    assert await services.kinds(tenant_id) == ["device.registered"]


async def test_what_is_not_said_is_inherited(services: Services, tenant_id: TenantId) -> None:
    silent = await named(services, tenant_id, "HW-1", profile_id="p_temp_sensor_v2")
    assert silent.anchor_mode is AnchorMode.HASH_CHAIN
    assert silent.tags == {"region": "us", "kind": "temp"}

    outspoken = await named(
        services,
        tenant_id,
        "HW-2",
        profile_id="p_temp_sensor_v2",
        tags={"region": "eu"},
        config={"limits": {"low": 0}},
        anchor_mode=AnchorMode.PER_EVENT,
    )
    assert outspoken.anchor_mode is AnchorMode.PER_EVENT
    assert outspoken.tags == {"region": "eu", "kind": "temp"}
    assert outspoken.config == {"interval": 60, "limits": {"low": 0}}

    assert (await named(services, tenant_id, "HW-3")).anchor_mode is AnchorMode.MERKLE_BATCH


async def test_every_field_comes_back(services: Services, tenant_id: TenantId) -> None:
    gateway = await named(services, tenant_id, "GW-1")
    device = await named(
        services,
        tenant_id,
        "HW-1",
        gateway_id=gateway.device_id,
        site_id="site-7",
        firmware="1.2.3+build",
        meta={"deep": [{"a": None}, 1.5, "ü"], "big": 2**63},
        config={"on": True},
    )
    assert await services.devices.get(tenant_id, device.device_id) == device
    assert (device.gateway_id, device.site_id, device.firmware) == (gateway.device_id, "site-7", "1.2.3+build")
    assert device.meta == {"deep": [{"a": None}, 1.5, "ü"], "big": 2**63}


async def test_credentials_by_type(services: Services, tenant_id: TenantId) -> None:
    psk = await services.devices.register(
        tenant_id, NewDevice("P", "HW-P", credential_type=CredentialKind.PSK), OPERATOR
    )
    assert isinstance(psk.issued, IssuedPsk)
    key = Secret(b"k" * 32)
    assigned = await services.devices.register(
        tenant_id,
        NewDevice("A", "HW-A", credential_type=CredentialKind.PSK, psk=PskAssignment("sensor-a", key)),
        OPERATOR,
    )
    assert isinstance(assigned.issued, IssuedPsk)
    assert (assigned.issued.identity, assigned.issued.key) == ("sensor-a", key)
    x509 = await services.devices.register(
        tenant_id, NewDevice("X", "HW-X", credential_type=CredentialKind.X509), OPERATOR
    )
    assert x509.issued is None
    assert len(await services.rows("SELECT 1 FROM credential")) == 2

    with pytest.raises(AlreadyExists, match="PSK identity"):
        await services.devices.register(
            tenant_id,
            NewDevice("B", "HW-B", credential_type=CredentialKind.PSK, psk=PskAssignment("sensor-a")),
            OPERATOR,
        )
    assert len(await services.rows("SELECT 1 FROM device")) == 3


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "name"),
    ({"name": "x" * 257}, "name"),
    ({"name": "a\x1bb"}, "name"),
    ({"hardware_id": ""}, "hardware_id"),
    ({"hardware_id": "a b"}, "hardware_id"),
    ({"groups": [""]}, "groups"),
    ({"groups": ["x" * 129]}, "groups"),
    ({"groups": [str(n) for n in range(65)]}, "groups"),
    ({"tags": {"a=b": "c"}}, "tags"),
    ({"tags": {"a": "x" * 1025}}, "tags"),
    ({"tags": {"": "x"}}, "tags"),
    ({"profile_id": "p_unknown"}, "profile_id"),
    ({"profile_id": "p/../x"}, "profile_id"),
    ({"gateway_id": DeviceId(uuid4())}, "gateway_id"),
    ({"site_id": ""}, "site_id"),
    ({"firmware": "x" * 129}, "firmware"),
    ({"firmware": "\x00"}, "firmware"),
    ({"meta": {"a": "\x00"}}, "meta"),
    ({"meta": {"\ud800": 1}}, "meta"),
    ({"meta": {"a": 2**64}}, "meta"),
    ({"meta": {"a": b"bytes"}}, "meta"),
    ({"config": {"a": float("inf")}}, "config"),
    ({"config": {"a": "x" * 33_000}}, "config"),
    ({"psk": PskAssignment("id")}, "psk"),
]


async def test_malformed_devices_are_refused(services: Services, tenant_id: TenantId) -> None:
    for wrong, field in MALFORMED:
        new = NewDevice(**{"name": "N", "hardware_id": "HW", **wrong})
        with pytest.raises(InvalidArgument) as refused:
            await services.devices.register(tenant_id, new, OPERATOR)
        assert refused.value.field == field, wrong
    assert await services.rows("SELECT 1 FROM device") == []


async def test_deep_nesting_is_refused(services: Services, tenant_id: TenantId) -> None:
    nested: Any = 1
    for _ in range(31):
        nested = [nested]
    await named(services, tenant_id, "HW-32", meta={"a": nested})
    with pytest.raises(InvalidArgument, match="32 levels"):
        await named(services, tenant_id, "HW-33", meta={"a": [nested]})


# -- reading -----------------------------------------------------------------------------------------------------------


async def test_filters(services: Services, tenant_id: TenantId) -> None:
    gateway = await named(services, tenant_id, "GW-1", groups=["core"])
    a = await named(services, tenant_id, "HW-A", name="Boiler 50%", tags={"floor": "1"}, gateway_id=gateway.device_id)
    b = await named(services, tenant_id, "HW-B", name="boiler 5_", tags={"floor": "2"}, site_id="s1", groups=["core"])
    c = await named(services, tenant_id, "XX-C", name="Pump", profile_id="p_temp_sensor_v2")
    await services.devices.update(tenant_id, c.device_id, DeviceChanges(status=DeviceStatus.MAINTENANCE), OPERATOR)

    async def found(**wanted: Any) -> list[DeviceId]:
        return [d.device_id for d in (await services.devices.list(tenant_id, DeviceFilter(**wanted), Page())).items]

    assert await found() == [gateway.device_id, a.device_id, b.device_id, c.device_id]
    assert await found(status=DeviceStatus.MAINTENANCE) == [c.device_id]
    assert await found(group="core") == [gateway.device_id, b.device_id]
    assert await found(tag="floor") == [a.device_id, b.device_id]
    assert await found(tag="floor=2") == [b.device_id]
    assert await found(tag="floor=") == []
    assert await found(profile_id="p_temp_sensor_v2") == [c.device_id]
    assert await found(site_id="s1") == [b.device_id]
    assert await found(gateway_id=gateway.device_id) == [a.device_id]
    assert await found(q="BOILER") == [a.device_id, b.device_id]
    assert await found(q="0%") == [a.device_id]
    assert await found(q="5_") == [b.device_id]
    assert await found(q="HW-") == [a.device_id, b.device_id]
    assert await found(q="W-A") == []
    assert await found(q="\\") == []
    assert await found(q="boiler", group="core", tag="floor=2") == [b.device_id]
    for wrong in ({"q": "\x00"}, {"tag": "=x"}, {"group": ""}, {"profile_id": "\x00"}, {"tag": "a=\x00"}):
        with pytest.raises(InvalidArgument):
            await found(**wrong)


async def test_a_walk_through_pages_shows_each_device_once(services: Services, tenant_id: TenantId) -> None:
    for n in range(7):
        await services.devices.register(tenant_id, NewDevice("same moment", f"HW-{n}"), OPERATOR)
    seen: list[DeviceId] = []
    page: Page | None = Page(3)
    while page is not None:
        part = await services.devices.list(tenant_id, DeviceFilter(), page)
        seen += [d.device_id for d in part.items]
        page = Page(3, part.next_cursor) if part.next_cursor else None
    assert len(seen) == len(set(seen)) == 7
    with pytest.raises(InvalidArgument):
        await services.devices.list(tenant_id, DeviceFilter(), Page(3, "bm9wZQ"))


async def test_summary(services: Services, tenant_id: TenantId) -> None:
    await named(services, tenant_id, "HW-1")
    two = await named(services, tenant_id, "HW-2", credential_type=CredentialKind.PSK)
    await services.devices.update(tenant_id, two.device_id, DeviceChanges(status=DeviceStatus.INACTIVE), OPERATOR)

    summary = await services.devices.summary(tenant_id)

    assert summary.total == 2
    assert {s.value: n for s, n in summary.by_status.items()} == {
        "pending": 0, "registered": 1, "active": 0, "inactive": 1, "maintenance": 0, "offline": 0,
    }  # fmt: skip
    assert summary.by_credential_type == {CredentialKind.API_KEY: 1, CredentialKind.PSK: 1, CredentialKind.X509: 0}


# -- changing ----------------------------------------------------------------------------------------------------------


async def test_an_update_changes_what_it_names(services: Services, tenant_id: TenantId) -> None:
    gateway = await named(services, tenant_id, "GW-1")
    before = await named(services, tenant_id, "HW-1", groups=["a"], tags={"x": "y"}, firmware="1", config={"a": 1})

    updated = await services.devices.update(
        tenant_id,
        before.device_id,
        DeviceChanges(
            device_id=before.device_id,
            hardware_id="HW-1",
            name="New",
            groups=["b", "b"],
            tags=None,
            firmware=None,
            gateway_id=gateway.device_id,
            profile_id="p_temp_sensor_v2",
            meta={"m": 1},
        ),
        OPERATOR,
    )

    after = updated.device
    assert updated.receipt is None
    assert await services.devices.get(tenant_id, before.device_id) == after
    assert (after.name, after.groups, after.tags, after.firmware) == ("New", ["b"], {}, None)
    assert (after.gateway_id, after.profile_id, after.meta) == (gateway.device_id, "p_temp_sensor_v2", {"m": 1})
    assert (after.config, after.anchor_mode, after.status) == (before.config, before.anchor_mode, before.status)
    assert (await services.kinds(tenant_id))[-1] == "device.updated"
    [event] = await services.rows("SELECT data FROM event WHERE kind = 'device.updated'")
    assert set(event["data"]["changed"]) == {"name", "groups", "tags", "firmware", "gateway_id", "profile_id", "meta"}


async def test_an_update_that_changes_nothing_says_nothing(services: Services, tenant_id: TenantId) -> None:
    device = await named(services, tenant_id, "HW-1")
    updated = await services.devices.update(
        tenant_id, device.device_id, DeviceChanges(name=device.name, status=device.status), OPERATOR
    )
    assert updated.device == device
    assert await services.kinds(tenant_id) == ["device.registered"]


UNCHANGEABLE = [
    (DeviceChanges(device_id=DeviceId(uuid4())), "device_id"),
    (DeviceChanges(hardware_id="HW-2"), "hardware_id"),
    (DeviceChanges(hardware_id=None), "hardware_id"),
    (DeviceChanges(credential_type=CredentialKind.PSK), "credential_type"),
    (DeviceChanges(profile_id="p_unknown"), "profile_id"),
    (DeviceChanges(gateway_id=DeviceId(uuid4())), "gateway_id"),
    (DeviceChanges(name=""), "name"),
    (DeviceChanges(site_id="\x00"), "site_id"),
]


async def test_what_cannot_be_changed(services: Services, tenant_id: TenantId) -> None:
    device = await named(services, tenant_id, "HW-1")
    for changes, field in UNCHANGEABLE:
        with pytest.raises(InvalidArgument) as refused:
            await services.devices.update(tenant_id, device.device_id, changes, OPERATOR)
        assert refused.value.field == field, changes
    assert await services.devices.get(tenant_id, device.device_id) == device


async def test_a_profile_or_gateway_of_another_tenant_is_unknown(services: Services, tenant_id: TenantId) -> None:
    other = (await services.tenants.create("Other", None, OPERATOR)).tenant_id
    theirs = await named(services, other, "GW-1")
    for said in ({"gateway_id": theirs.device_id},):
        with pytest.raises(InvalidArgument):
            await named(services, tenant_id, "HW-1", **said)
    with pytest.raises(InvalidArgument):
        await named(services, other, "HW-2", profile_id="p_temp_sensor_v2")


async def test_gateways_make_no_circle(services: Services, tenant_id: TenantId) -> None:
    top = await named(services, tenant_id, "GW-1")
    middle = await named(services, tenant_id, "GW-2", gateway_id=top.device_id)
    low = await named(services, tenant_id, "GW-3", gateway_id=middle.device_id)
    for device, above in ((top, top), (top, middle), (top, low)):
        with pytest.raises(InvalidArgument, match="its own gateway"):
            await services.devices.update(
                tenant_id, device.device_id, DeviceChanges(gateway_id=above.device_id), OPERATOR
            )


async def test_gateways_make_no_circle_at_once_either(services: Services, tenant_id: TenantId) -> None:
    ring = [await named(services, tenant_id, f"GW-{n}") for n in range(4)]
    outcomes = await asyncio.gather(
        *(
            services.devices.update(
                tenant_id, d.device_id, DeviceChanges(gateway_id=ring[(n + 1) % 4].device_id), OPERATOR
            )
            for n, d in enumerate(ring)
        ),
        return_exceptions=True,
    )
    assert [type(o) for o in outcomes].count(InvalidArgument) == 1


async def test_a_chain_of_gateways_is_bounded(services: Services, tenant_id: TenantId) -> None:
    above: DeviceId | None = None
    for n in range(9):
        above = (await named(services, tenant_id, f"GW-{n}", gateway_id=above)).device_id
    with pytest.raises(InvalidArgument, match="gateways above"):
        await named(services, tenant_id, "GW-9", gateway_id=above)


# -- status ------------------------------------------------------------------------------------------------------------


async def test_setting_inactive_ends_the_device_and_active_brings_it_back(
    services: Services, tenant_id: TenantId
) -> None:
    device = await named(services, tenant_id, "HW-1")

    ended = await services.devices.update(
        tenant_id, device.device_id, DeviceChanges(status=DeviceStatus.INACTIVE), OPERATOR
    )

    assert ended.receipt is not None
    assert (ended.receipt.device_id, ended.receipt.revoked_at) == (device.device_id, services.clock.now)
    [told] = services.doors.ended
    assert (told.device_id, told.credential_id, told.reason) == (device.device_id, None, "device inactive")
    [event] = await services.rows("SELECT seq, kind, data FROM event WHERE seq = $1", told.event_seq)
    assert event["kind"] == "device.deactivated"
    assert event["data"]["status"] == {"from": "registered", "to": "inactive"}

    back = await services.devices.update(
        tenant_id, device.device_id, DeviceChanges(status=DeviceStatus.ACTIVE), OPERATOR
    )
    assert (back.device.status, back.receipt, len(services.doors.ended)) == (DeviceStatus.ACTIVE, None, 1)


_ALLOWED = {
    "pending": "pending",
    "registered": "registered active inactive maintenance",
    "active": "active inactive maintenance",
    "offline": "offline active inactive maintenance",
    "maintenance": "maintenance registered active inactive",
    "inactive": "inactive registered active maintenance",
}


async def test_statuses_that_can_be_set(services: Services, tenant_id: TenantId) -> None:
    device = await named(services, tenant_id, "HW-1")
    for present, wanted in itertools.product(DeviceStatus, DeviceStatus):
        async with services.database.connection() as connection:
            await connection.execute("UPDATE device SET status = $1", present.value)
        attempt = services.devices.update(tenant_id, device.device_id, DeviceChanges(status=wanted), OPERATOR)
        if wanted.value in _ALLOWED[present.value].split():
            assert (await attempt).device.status is wanted
        else:
            with pytest.raises(FailedPrecondition, match=f"status is {present.value}"):
                await attempt


# -- deletion ----------------------------------------------------------------------------------------------------------


async def test_deleting_takes_the_credentials_and_leaves_the_children(services: Services, tenant_id: TenantId) -> None:
    gateway = await named(services, tenant_id, "GW-1")
    child = await named(services, tenant_id, "HW-1", gateway_id=gateway.device_id)

    receipt = await services.devices.delete(tenant_id, gateway.device_id, OPERATOR)

    assert (receipt.device_id, receipt.remaining) == (gateway.device_id, 0)
    [told] = services.doors.ended
    assert (told.device_id, told.reason) == (gateway.device_id, "device deleted")
    [event] = await services.rows("SELECT kind, device_id FROM event WHERE seq = $1", told.event_seq)
    assert (event["kind"], event["device_id"]) == ("device.deleted", gateway.device_id)
    assert (await services.devices.get(tenant_id, child.device_id)).gateway_id is None
    assert [r["device_id"] for r in await services.rows("SELECT device_id FROM credential")] == [child.device_id]
    for attempt in (
        services.devices.get(tenant_id, gateway.device_id),
        services.devices.delete(tenant_id, gateway.device_id, OPERATOR),
        services.devices.update(tenant_id, gateway.device_id, DeviceChanges(name="x"), OPERATOR),
    ):
        with pytest.raises(NotFound):
            await attempt
    again = await services.devices.register(tenant_id, NewDevice("Again", "GW-1"), OPERATOR)
    assert isinstance(again, Registered)
    assert again.device.device_id != gateway.device_id


async def test_other_tenants_find_nothing(services: Services, tenant_id: TenantId) -> None:
    device = await named(services, tenant_id, "HW-1")
    other = (await services.tenants.create("Other", None, OPERATOR)).tenant_id
    for attempt in (
        services.devices.get(other, device.device_id),
        services.devices.delete(other, device.device_id, OPERATOR),
        services.devices.update(other, device.device_id, DeviceChanges(name="x"), OPERATOR),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert (await services.devices.list(other, DeviceFilter(), Page())).items == []
    assert (await services.devices.summary(other)).total == 0
