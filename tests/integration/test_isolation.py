"""Tenants do not see one another: every operation of the OpenAPI document, with another tenant's objects.

The document is walked, so a new route is tested by being there. For each operation with parameters in its path a
fresh set of objects is made for tenant A; tenant B's administrator then asks with A's ids, and the answer must be
NOT_FOUND or PERMISSION_DENIED. Then A asks the very same, which must not be refused: otherwise the test would prove
nothing. A path parameter that this file does not know fails the test: teach `World` the object that it names.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import pytest

from registry.permissions import Role
from tests.http_api import BASE, Api, Https, running_api, serving
from tests.tls_peers import make_certificate

METHODS = ("get", "post", "put", "delete")
DEVICE_OPERATIONS = (
    "/devices/{device_id}/uplink",
    "/devices/{device_id}/commands/next",
    "/devices/{device_id}/commands/{command_id}/response",
    "/devices/{device_id}/config/reported",
)
"""Operations of devices with an id in the path: they are asked by a device of tenant B."""


@dataclass
class World:
    """Objects of one tenant, one of each kind, by the path parameter that names them."""

    slug: str
    ids: dict[str, str]
    api_key: str
    psk_device_id: str
    fields: dict[str, str]
    """What bodies may contain beside ids, by the field's name."""

    def ids_for(self, path: str) -> dict[str, str]:
        """The ids for one path: some operations want a device of a certain credential type."""
        return self.ids | ({"device_id": self.psk_device_id} if path.endswith("/psk") else {})


async def make_world(https: Https, slug: str) -> tuple[World, httpx.AsyncClient]:
    """A tenant's objects; the returned client holds the live session among them."""
    mark = uuid4().hex[:10]
    async with https.operator(tenant=slug) as operator:
        await expect(201, operator.post(f"{BASE}/profiles", json={"profile_id": f"p-{mark}", "name": "P"}))
        template = await expect(201, operator.post(f"{BASE}/provisioning/templates", json={"name": f"T {mark}"}))
        device = await expect(
            201, operator.post(f"{BASE}/devices", json={"name": f"D {mark}", "hardware_id": f"HW-{mark}"})
        )
        psk_device = await expect(
            201,
            operator.post(
                f"{BASE}/devices", json={"name": "D", "hardware_id": f"HW-{mark}-psk", "credential_type": "psk"}
            ),
        )
        credentials = await expect(200, operator.get(f"{BASE}/devices/{device['device_id']}/credentials"))
        connected = https.device(device["api_key"])
        await expect(202, connected.post(f"{BASE}/telemetry", json={"t": 1}))
        sessions = await expect(200, operator.get(f"{BASE}/sessions"))
        token = await expect(201, operator.post(f"{BASE}/devices/registration/tokens", json={"name": f"R {mark}"}))
        holder = await expect(
            201,
            operator.post(
                f"{BASE}/devices", json={"name": "D", "hardware_id": f"HW-{mark}-x", "credential_type": "x509"}
            ),
        )
        pem = make_certificate(mark).pem.decode()
        path = f"{BASE}/devices/{holder['device_id']}/certs"
        registered = await expect(201, operator.post(path, json={"certificate": pem}))
        path = f"{BASE}/devices/{device['device_id']}/commands"
        command = await expect(201, operator.post(path, json={"method": "reboot"}))
    ids = {
        "profile_id": f"p-{mark}",
        "template_id": template["template_id"],
        "device_id": device["device_id"],
        "credential_id": credentials["credentials"][0]["credential_id"],
        "session_id": sessions["sessions"][0]["session_id"],
        "token_id": token["token_id"],
        "fingerprint": registered["fingerprint"],
        "command_id": command["command_id"],
    }
    fields = {"certificate": make_certificate(f"{mark} second").pem.decode()}
    return World(slug, ids, device["api_key"], psk_device["device_id"], fields), connected


async def expect(status: int, asking: Any) -> Any:
    answer = await asking
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.fixture
async def https(dsn: str) -> AsyncIterator[Https]:
    async with running_api(dsn) as api, serving(api) as running:
        yield running


async def document(api: Api) -> dict[str, Any]:
    async with api.client() as client:
        return (await client.get(f"{BASE}/openapi.json")).json()  # type: ignore[no-any-return]


def operations(openapi: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in openapi["paths"].items():
        for method in METHODS:
            if method in methods:
                yield path.removeprefix(BASE), method, methods[method]


@pytest.mark.timeout(300)
async def test_no_operation_reaches_another_tenants_objects(https: Https) -> None:
    openapi = await document(https.api)
    walked = 0
    stranger, strangers_client = await make_world(https, await https.api.another_tenant())
    for path, method, operation in operations(openapi):
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        if not names:
            continue
        slug = await https.api.another_tenant()
        world, connected = await make_world(https, slug)
        for name in names:
            assert name in world.ids, f"{method} {path}: teach World what {name} names"
        target = BASE + path.format(**world.ids_for(path))
        body = example_body(openapi, operation, world)
        if path in DEVICE_OPERATIONS:
            askers = [https.device(stranger.api_key)]
            owner = https.device(world.api_key)
        else:
            askers = [
                https.operator(tenant=stranger.slug, role=Role.TENANT_ADMIN),
                https.operator(tenant=stranger.slug, role=Role.PLATFORM_ADMIN),
            ]
            owner = https.operator(tenant=slug)
        for asker in askers:
            async with asker:
                refused = await asker.request(method, target, json=body)
            assert refused.status_code in (403, 404), (
                f"{method} {path} for a stranger: {refused.status_code} {refused.text}"
            )
            assert refused.json()["code"] in ("NOT_FOUND", "PERMISSION_DENIED")
            for value in world.ids.values():
                assert value not in refused.text.replace(target, ""), f"{method} {path} shows {value}"
        async with owner:
            allowed = await owner.request(method, target, json=body)
        assert allowed.status_code < 300, f"{method} {path} for its owner: {allowed.status_code} {allowed.text}"
        await connected.aclose()
        walked += 1
    await strangers_client.aclose()
    assert walked >= 20, "the walk found fewer operations than there were when it was written"


async def test_lists_show_nothing_of_other_tenants(https: Https) -> None:
    openapi = await document(https.api)
    world, connected = await make_world(https, https.api.slug)
    stranger = https.operator(tenant=await https.api.another_tenant())
    owner = https.operator(tenant=https.api.slug)
    lists = [
        path
        for path, method, operation in operations(openapi)
        if method == "get" and "{" not in path and "stream" not in path and operator_only(operation)
    ]
    assert len(lists) >= 6, lists
    shown = ""
    async with stranger, owner:
        for path in lists:
            theirs = await stranger.get(BASE + path)
            assert theirs.status_code == 200, f"{path}: {theirs.text}"
            for value in world.ids.values():
                assert value not in theirs.text, f"{path} shows another tenant's {value}"
            shown += (await owner.get(BASE + path)).text
    missing = [name for name, value in world.ids.items() if value not in shown]
    assert not missing, f"the owner's own lists show no {missing}: the test would prove nothing"
    await connected.aclose()


def operator_only(operation: dict[str, Any]) -> bool:
    return any("operator" in scheme.lower() for entry in operation.get("security", []) for scheme in entry)


def example_body(openapi: dict[str, Any], operation: dict[str, Any], world: World) -> Any:
    """The smallest body that the operation's schema allows, naming the world's own objects where it names any."""
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" not in content:
        return None
    media = content["application/json"]
    if "example" in media:
        return json.loads(json.dumps(media["example"]))
    return minimal(openapi, media["schema"], world)


def minimal(openapi: dict[str, Any], schema: dict[str, Any], world: World, name: str = "") -> Any:
    if "$ref" in schema:
        target = openapi
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return minimal(openapi, target, world, name)
    if name in world.ids or name in world.fields:
        return (world.ids | world.fields)[name]
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return minimal(openapi, schema[choice][0], world, name)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            required = schema.get("required", [])
            return {n: minimal(openapi, schema["properties"][n], world, n) for n in required}
        case "array":
            return []
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return False
        case "string":
            return "event" if name == "kind" else "text"
        case _:
            return {}
