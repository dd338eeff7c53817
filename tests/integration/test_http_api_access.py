"""Who may do what over HTTP, walked from the OpenAPI document, so that a new operation is covered by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from litestar.handlers import HTTPRouteHandler

from adapters.http.access import ACCESS, DeviceOr, Public
from adapters.http.app import operations
from registry.permissions import Permission, Role
from tests.http_api import BASE, Api, api  # noqa: F401  # a fixture
from tests.tls_peers import make_certificate

BODIES: dict[str, Any] = {
    "UpdateDevice": {"name": "stolen"},
    "UpdateProfile": {"name": "stolen"},
    "UpdateTemplate": {"name": "stolen"},
    "RegisterDevice": {"name": "a", "hardware_id": "x"},
    "CreateProfile": {"name": "a"},
    "CreateTemplate": {"name": "a"},
    "CreateRegistrationToken": {"name": "a"},
    "QueueCommand": {"method": "stolen"},
    "PutDeviceConfig": {"config": {"stolen": True}},
    "RegisterDeviceCert": {"certificate": make_certificate("stolen").pem.decode()},
}


def of_operators() -> Iterator[tuple[str, str, str, Permission]]:
    for each in operations():
        access = ACCESS[each.operation_id]
        if isinstance(access, DeviceOr):
            access = access.permission
        if isinstance(access, Permission):
            yield each.operation_id, each.method, BASE + each.path, access


def test_every_operation_has_its_line() -> None:
    offered = {each.operation_id for each in operations()}
    pages = {"GetOpenApi", "GetDocs", "GetDocsAsset"}
    assert offered | pages == set(ACCESS)
    authority = {"GetCaChain", "GetCaCrl", "EstCaCerts", "EstCsrAttrs"}
    assert {each for each, access in ACCESS.items() if access is Public.OPEN} == authority | pages
    assert {each for each, access in ACCESS.items() if access is Public.CLAIM} == {"Provision", "ProvisionDevice"}
    assert {each for each, access in ACCESS.items() if access is Public.ENROLMENT} == {"EstSimpleEnroll"}
    assert {each for each, access in ACCESS.items() if access is Public.RENEWAL} == {"EstSimpleReenroll"}
    down = {"NextCommand", "AnswerCommand", "ReportDeviceConfig", "AttachChild"}
    assert {each for each, access in ACCESS.items() if access is Public.DEVICE} == {
        "SendUplink",
        "SendTelemetry",
        *down,
    }
    assert {each for each, access in ACCESS.items() if isinstance(access, DeviceOr)} == {"GetDeviceConfig"}


async def test_an_operation_without_a_line_is_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    import adapters.http.api_request as guarded

    monkeypatch.setattr(guarded, "ACCESS", {k: v for k, v in ACCESS.items() if k != "ListDevices"})
    async with api.operator(role=Role.PLATFORM_ADMIN) as admin:
        answer = await admin.get(f"{BASE}/devices")
    assert answer.status_code == 403


async def test_each_operation_needs_its_own_permission(api: Api) -> None:  # noqa: F811
    objects = await made_objects(api)
    for operation_id, method, path, needed in of_operators():
        if operation_id == "StreamEvents":
            method = "HEAD"  # the stream itself has no end
        if method in ("DELETE", "POST", "PUT") and "{" in path:
            filled = path.format(**dict.fromkeys(objects, "3a9f1d22-6b4c-4e8a-bf21-90c7e5d4a118"))
        else:
            filled = path.format(**objects)
        for permission in Permission:
            async with api.operator(role=Role.MEMBER, permissions=frozenset({permission})) as caller:
                answer = await caller.request(method, filled, json=BODIES.get(operation_id))
            implied = permission.value == needed.value.removesuffix(":read")
            may = permission is needed or implied
            assert (answer.status_code != 403) == may, (operation_id, permission, answer.status_code)
            if may:
                assert answer.status_code < 500
        async with api.client() as nobody:
            assert (await nobody.request(method, filled)).status_code == 401, operation_id


async def test_another_tenant_finds_nothing(api: Api) -> None:  # noqa: F811
    objects = await made_objects(api)
    slug = await api.another_tenant()
    async with api.operator(tenant=slug) as intruder:
        for operation_id, method, path, _ in of_operators():
            if "{" not in path:
                continue
            answer = await intruder.request(method, path.format(**objects), json=BODIES.get(operation_id))
            assert answer.status_code == 404, (operation_id, answer.status_code, answer.text)
        lists = ("devices", "profiles", "provisioning/templates", "sessions", "events", "audit")
        for path in (*lists, "devices/certs", "devices/registration/tokens"):
            listed = (await intruder.get(f"{BASE}/{path}")).json()
            entries = next(value for value in listed.values() if isinstance(value, list))
            assert entries == [] or path == "audit", path
    async with api.operator() as owner:
        for path in ("devices/{device_id}", "profiles/{profile_id}", "provisioning/templates/{template_id}"):
            answer = await owner.get(f"{BASE}/{path}".format(**objects))
            assert answer.status_code == 200
            assert answer.json()["name"] != "stolen"


async def made_objects(api: Api) -> dict[str, str]:  # noqa: F811
    device = await api.registered()
    async with api.operator() as admin:
        profile = (await admin.post(f"{BASE}/profiles", json={"name": "P"})).json()
        template = (await admin.post(f"{BASE}/provisioning/templates", json={"name": "T"})).json()
        token = (await admin.post(f"{BASE}/devices/registration/tokens", json={"name": "T"})).json()
        holder = await api.registered("HW-certificate", credential_type="x509")
        pem = make_certificate("device").pem.decode()
        path = f"{BASE}/devices/{holder['device_id']}/certs"
        certificate = (await admin.post(path, json={"certificate": pem})).json()
        path = f"{BASE}/devices/{device['device_id']}/commands"
        command = (await admin.post(path, json={"method": "reboot"})).json()
    return {
        "device_id": device["device_id"],
        "credential_id": device["credential_id"],
        "profile_id": profile["profile_id"],
        "template_id": template["template_id"],
        "token_id": token["token_id"],
        "fingerprint": certificate["fingerprint"],
        "command_id": command["command_id"],
        "session_id": "3a9f1d22-6b4c-4e8a-bf21-90c7e5d4a118",
    }


def test_routes_are_made_of_operations() -> None:
    from adapters.http.app import _ROUTES

    assert all(isinstance(route, HTTPRouteHandler) for route in _ROUTES)
    assert len({(each.method, each.path) for each in operations()}) == len(operations())
