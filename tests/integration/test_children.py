"""Children: got or created by their gateway, nobody else's, forgotten the moment they change hands."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from registry.children import Attached, Children, NewChild
from registry.devices import DeviceChanges, NewDevice
from registry.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from registry.model import CredentialId, CredentialKind, DeviceId, DeviceStatus, Identity, TenantId
from registry.sealing import KeyRing
from registry.storage import children as storage
from tests.conftest import MakeDevice
from tests.nodes import ACTOR, TestNode, now, running_node
from tests.services import Services


@pytest.fixture
async def node(dsn: str) -> AsyncIterator[TestNode]:
    async with running_node(dsn, "one", KeyRing.generate()) as running:
        yield running


@asynccontextmanager
async def children_on(node: TestNode, *, max_children: int = 100, trusted: bool = True) -> AsyncIterator[Children]:
    children = Children(
        node.database,
        clock=now,
        random=os.urandom,
        feed=node.feed,
        feed_trusted=lambda: trusted and node.feed.trusted,
        max_children=max_children,
    )
    node.feed.add_follower(children)
    yield children


@pytest.fixture
async def children(node: TestNode) -> AsyncIterator[Children]:
    async with children_on(node) as service:
        yield service


@pytest.fixture
def services(node: TestNode) -> Services:
    return Services(node.database)


@pytest.fixture
async def gateway(tenant_id: TenantId, device_id: DeviceId) -> Identity:
    return identity(tenant_id, device_id)


def identity(tenant_id: TenantId, device_id: DeviceId) -> Identity:
    return Identity(tenant_id, device_id, CredentialId(uuid4()), CredentialKind.X509, None, None)


async def test_a_child_is_made_once_and_then_found(children: Children, services: Services, gateway: Identity) -> None:
    new = NewChild("SENSOR-1", name="Freezer", firmware="1.0", tags={"room": "2"}, meta={"slot": 4})
    outcomes = await asyncio.gather(*(children.attach(gateway, new, "c") for _ in range(8)))
    assert [o.created for o in outcomes].count(True) == 1
    assert len({o.device_id for o in outcomes}) == 1
    device = await services.devices.get(gateway.tenant_id, outcomes[0].device_id)
    assert (device.name, device.firmware, device.tags, device.meta) == ("Freezer", "1.0", {"room": "2"}, {"slot": 4})
    assert (device.gateway_id, device.status) == (gateway.device_id, DeviceStatus.REGISTERED)
    rows = await services.rows("SELECT kind, actor FROM event WHERE device_id = $1", device.device_id)
    assert [tuple(row) for row in rows] == [("device.registered", f"device:{gateway.device_id}")]
    assert await services.rows("SELECT FROM credential WHERE device_id = $1", device.device_id) == []
    unnamed = await children.attach(gateway, NewChild("SENSOR-2"), "c")
    assert (await services.devices.get(gateway.tenant_id, unnamed.device_id)).name == "SENSOR-2"


async def test_a_device_without_gateway_that_never_spoke_is_adopted(
    children: Children, services: Services, gateway: Identity
) -> None:
    made = (await services.devices.register(gateway.tenant_id, NewDevice("Known", "SENSOR-1"), ACTOR)).device
    attached = await children.attach(gateway, NewChild("SENSOR-1", name="Another name"), "c")
    assert attached == Attached(made.device_id, False)
    device = await services.devices.get(gateway.tenant_id, made.device_id)
    assert (device.gateway_id, device.name) == (gateway.device_id, "Known")
    assert await services.kinds(gateway.tenant_id) == ["device.registered", "device.updated"]


async def test_what_is_not_the_gateways_is_refused_alike(
    children: Children, services: Services, gateway: Identity, make_device: MakeDevice
) -> None:
    tenant_id = gateway.tenant_id
    other = identity(tenant_id, await make_device(tenant_id))
    await children.attach(other, NewChild("OTHERS"), "c")
    lives = (await services.devices.register(tenant_id, NewDevice("Lives", "LIVES"), ACTOR)).device
    await services.rows("UPDATE credential SET first_used_at = now() WHERE device_id = $1", lives.device_id)
    for hardware_id, status in (("INACTIVE", "inactive"), ("PENDING", "pending")):
        made = (await services.devices.register(tenant_id, NewDevice("D", hardware_id), ACTOR)).device
        await services.rows("UPDATE device SET status = $2 WHERE device_id = $1", made.device_id, status)
    above = (await services.devices.register(tenant_id, NewDevice("Above", "ABOVE"), ACTOR)).device
    await services.devices.update(tenant_id, gateway.device_id, DeviceChanges(gateway_id=above.device_id), ACTOR)
    own = await services.devices.get(tenant_id, gateway.device_id)
    messages = set()
    for hardware_id in ("OTHERS", "LIVES", "INACTIVE", "PENDING", "ABOVE", str(own.hardware_id)):
        with pytest.raises(PermissionDenied) as refused:
            await children.attach(gateway, NewChild(hardware_id), "c")
        messages.add(refused.value.message)
    assert len(messages) == 1


async def test_a_replaced_gateway_hands_its_children_on(
    children: Children, services: Services, gateway: Identity, make_device: MakeDevice
) -> None:
    first = await children.attach(gateway, NewChild("SENSOR-1"), "c")
    await services.devices.delete(gateway.tenant_id, gateway.device_id, ACTOR)
    with pytest.raises(NotFound):
        await children.attach(gateway, NewChild("SENSOR-2"), "c")
    successor = identity(gateway.tenant_id, await make_device(gateway.tenant_id))
    assert await children.attach(successor, NewChild("SENSOR-1"), "c") == Attached(first.device_id, False)


async def test_tenants_have_their_own_hardware_ids(
    children: Children, gateway: Identity, make_tenant: object, make_device: MakeDevice
) -> None:
    assert callable(make_tenant)
    stranger_tenant = await make_tenant()
    stranger = identity(stranger_tenant, await make_device(stranger_tenant))
    mine = await children.attach(gateway, NewChild("SENSOR-1"), "c")
    theirs = await children.attach(stranger, NewChild("SENSOR-1"), "c")
    assert theirs.created
    assert mine.device_id != theirs.device_id
    assert not await children.is_child(stranger, mine.device_id)
    assert not await children.is_child(identity(stranger_tenant, gateway.device_id), mine.device_id)


async def test_children_are_bounded_and_fields_are_checked(node: TestNode, gateway: Identity) -> None:
    async with children_on(node, max_children=2) as children:
        outcomes = await asyncio.gather(
            *(children.attach(gateway, NewChild(f"S-{n}"), "c") for n in range(5)), return_exceptions=True
        )
        assert [type(o) for o in outcomes].count(ResourceExhausted) == 3
        for new in (NewChild("with space"), NewChild("X", name="a\nb"), NewChild("X", tags={"a=": "b"})):
            with pytest.raises(InvalidArgument):
                await children.attach(gateway, new, "c")


async def test_gateways_stack_no_deeper_than_a_registration_allows(
    children: Children, gateway: Identity, tenant_id: TenantId
) -> None:
    speaker = gateway
    for depth in range(8):
        attached = await children.attach(speaker, NewChild(f"LEVEL-{depth}"), "c")
        speaker = identity(tenant_id, attached.device_id)
    with pytest.raises(InvalidArgument, match="gateways above"):
        await children.attach(speaker, NewChild("TOO-DEEP"), "c")


async def test_whose_child_it_is_is_remembered_until_it_changes(
    dsn: str, children: Children, services: Services, gateway: Identity, make_device: MakeDevice
) -> None:
    child = (await children.attach(gateway, NewChild("SENSOR-1"), "c")).device_id
    other = identity(gateway.tenant_id, await make_device(gateway.tenant_id))
    async with running_node(dsn, "two", KeyRing.generate()) as two, children_on(two) as theirs:
        for service in (children, theirs):
            assert await service.is_child(gateway, child)
            asked = service.looked_up
            for _ in range(5):
                assert await service.is_child(gateway, child)
            assert service.looked_up == asked
        assert not await children.is_child(other, child)
        changes = DeviceChanges(gateway_id=other.device_id)
        await services.devices.update(gateway.tenant_id, child, changes, ACTOR)
        async with asyncio.timeout(5):
            for service in (children, theirs):
                while await service.is_child(gateway, child):
                    await asyncio.sleep(0.005)
                assert await service.is_child(other, child)
        await services.devices.update(gateway.tenant_id, child, DeviceChanges(status=DeviceStatus.INACTIVE), ACTOR)
        async with asyncio.timeout(5):
            while await theirs.is_child(other, child):
                await asyncio.sleep(0.005)


async def test_an_untrusted_feed_means_asking_each_time(node: TestNode, gateway: Identity) -> None:
    async with children_on(node, trusted=False) as children:
        child = (await children.attach(gateway, NewChild("SENSOR-1"), "c")).device_id
        for _ in range(3):
            assert await children.is_child(gateway, child)
        assert children.looked_up == 3


async def test_a_reading_that_a_change_overtakes_is_not_remembered(
    children: Children, gateway: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = (await children.attach(gateway, NewChild("SENSOR-1"), "c")).device_id
    read = storage.gateway_of

    async def overtaken(*arguments: object) -> DeviceId | None:
        answer = await read(*arguments)  # type: ignore[arg-type]
        await children.restored()
        return answer

    with monkeypatch.context() as slow:
        slow.setattr(storage, "gateway_of", overtaken)
        assert await children.is_child(gateway, child)
    asked = children.looked_up
    assert await children.is_child(gateway, child)
    assert children.looked_up == asked + 1


async def test_a_question_that_is_not_answered_leaves_nothing_behind(
    children: Children, gateway: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> DeviceId | None:
        raise Unavailable("the database is away")

    monkeypatch.setattr(storage, "gateway_of", away)
    for _ in range(3):
        with pytest.raises(Unavailable):
            await children.is_child(gateway, DeviceId(uuid4()))
    assert not children._reading


async def test_a_device_speaks_for_itself_and_its_children_only(
    children: Children, gateway: Identity, make_device: MakeDevice
) -> None:
    child = (await children.attach(gateway, NewChild("SENSOR-1"), "c")).device_id
    sibling = await make_device(gateway.tenant_id)
    assert await children.via(gateway, gateway.device_id) is None
    assert await children.via(gateway, child) == gateway.device_id
    for device_id in (sibling, DeviceId(uuid4())):
        with pytest.raises(NotFound):
            await children.via(gateway, device_id)
    with pytest.raises(NotFound):
        await children.via(identity(gateway.tenant_id, child), gateway.device_id)
