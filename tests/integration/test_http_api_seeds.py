"""Seeds 001 and 002, walked with their own JSON: the same fields, the same codes, through TLS as a device does."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import datetime

import pytest

from registry.permissions import Permission, Role
from tests.http_api import BASE, Api, Https, is_uuid, running_api, serving

SEED_001_CLAIM = {
    "provision_key": "pk_factory_7Qx2mZr8K...redacted...",
    "device_name": "Cold Store Sensor 014",
    "hardware_id": "AA:BB:CC:00:11:22",
}
SEED_002_REGISTRATION = {
    "name": "Lab Bench Thermometer",
    "hardware_id": "HW-LAB-0001",
    "groups": ["lab", "floor-3"],
    "tags": {"region": "eu", "owner": "qa"},
    "anchor_mode": "ANCHOR_MODE_MERKLE_BATCH",
    "profile_id": "p_temp_sensor_v2",
}
SEED_002_FIELDS = {
    "device_id",
    "tenant_id",
    "name",
    "hardware_id",
    "status",
    "groups",
    "tags",
    "anchor_mode",
    "profile_id",
    "api_key",
    "created_at",
}
API_KEY = re.compile(r"sk_live_[A-Za-z0-9_-]{43}")


@pytest.fixture
async def https(dsn: str) -> AsyncIterator[Https]:
    async with running_api(dsn) as api, serving(api) as running:
        async with running.operator() as admin:
            made = await admin.post(
                f"{BASE}/profiles",
                json={"profile_id": "p_temp_sensor_v2", "name": "Temperature", "tags": {"kind": "temp"}},
            )
            assert made.status_code == 201, made.text
        yield running


async def events_of(api: Api, kind: str) -> list[dict[str, object]]:
    async with api.operator() as admin:
        answer = await admin.get(f"{BASE}/events", params={"limit": 1000})
    return [event for event in answer.json()["events"] if event["kind"] == kind]


async def template(https: Https, **more: object) -> dict[str, object]:
    body = {
        "name": "Line A",
        "profile_id": "p_temp_sensor_v2",
        "hardware_id_pattern": "AA:BB:CC(:[0-9A-F]{2}){3}",
        "expires_at": "2099-01-01T00:00:00Z",
        "one_time": False,
        "credential_type": "api_key",
        "default_groups": ["cold-store"],
    } | more
    async with https.operator() as admin:
        answer = await admin.post(f"{BASE}/provisioning/templates", json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, object] = answer.json()
    assert {key: made[key] for key in body} == body
    assert re.fullmatch(r"pk_[A-Za-z0-9_-]{43}", str(made["provision_key"]))
    return made


async def test_seed_001_claims_once_and_then_knows_the_device(https: Https) -> None:
    made = await template(https)
    claim = SEED_001_CLAIM | {"provision_key": made["provision_key"]}
    async with https.client() as device:
        first = await device.post(f"{BASE}/provision", json=claim)
        assert first.status_code == 201
        body = first.json()
        assert is_uuid(body["device_id"])
        assert API_KEY.fullmatch(body["api_key"])
        assert body["credential_type"] == "api_key"
        assert first.headers["cache-control"] == "no-store"

        again = await device.post(f"{BASE}/provision", json=claim | {"device_name": "Renamed"})
        assert again.status_code == 200
        assert again.json() == {"device_id": body["device_id"], "api_key": "", "credential_type": "api_key"}

        uplink = await device.post(
            f"{BASE}/devices/{body['device_id']}/uplink",
            headers={"authorization": f"Bearer {body['api_key']}"},
            json={"kind": "telemetry", "payload": "..."},
        )
        assert uplink.status_code == 202
        assert list(uplink.json()) == ["uplink_id"]
    assert len(await events_of(https.api, "device.provisioned")) == 1
    async with https.operator() as admin:
        record = (await admin.get(f"{BASE}/devices/{body['device_id']}")).json()
    assert record["name"] == "Cold Store Sensor 014"
    assert record["groups"] == ["cold-store"]
    assert record["tags"] == {"kind": "temp"}
    assert record["template_id"] == made["template_id"]
    assert record["status"] == "active"


async def test_seed_001_refuses_every_key_alike(https: Https) -> None:
    good = await template(https)
    disabled = await template(https)
    used = await template(https, one_time=True)
    full = await template(https, max_claims=1)
    async with https.operator() as admin:
        path = f"{BASE}/provisioning/templates/{disabled['template_id']}"
        assert (await admin.put(path, json={"status": "disabled"})).status_code == 200
    bodies = []
    async with https.client() as device:
        for number, spent in enumerate((used, full)):
            claim = SEED_001_CLAIM | {
                "provision_key": spent["provision_key"],
                "hardware_id": f"AA:BB:CC:00:12:0{number}",
            }
            assert (await device.post(f"{BASE}/provision", json=claim)).status_code == 201
        refused = [
            SEED_001_CLAIM,
            SEED_001_CLAIM | {"provision_key": disabled["provision_key"]},
            SEED_001_CLAIM | {"provision_key": used["provision_key"]},
            SEED_001_CLAIM | {"provision_key": full["provision_key"]},
            SEED_001_CLAIM | {"provision_key": good["provision_key"], "hardware_id": "FF:00:00:00:00:00"},
        ]
        for claim in refused:
            answer = await device.post(f"{BASE}/provision", json=claim)
            assert answer.status_code == 403
            body = answer.json()
            assert body.pop("correlation_id") == answer.headers["x-correlation-id"]
            bodies.append(body)
    assert all(body == {"code": "PERMISSION_DENIED", "message": "provisioning refused"} for body in bodies)


async def test_a_psk_template_gives_the_psk_once(https: Https) -> None:
    made = await template(https, credential_type="psk")
    claim = SEED_001_CLAIM | {"provision_key": made["provision_key"], "nonce": "0123456789abcdef"}
    async with https.client() as device:
        first = (await device.post(f"{BASE}/provision", json=claim)).json()
        assert first["credential_type"] == "psk"
        assert first["api_key"] == ""
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", first["psk"]["key"])
        repeated = await device.post(f"{BASE}/provision", json=claim)
        assert repeated.status_code == 200
        assert repeated.json()["psk"] == first["psk"]
        without = await device.post(f"{BASE}/provision", json=claim | {"nonce": "another-0123456789"})
        assert "psk" not in without.json()


async def test_seed_002_registers_with_the_seeds_own_fields(https: Https) -> None:
    async with https.operator() as admin:
        answer = await admin.post(f"{BASE}/devices", json=SEED_002_REGISTRATION)
        assert answer.status_code == 201, answer.text
        body = answer.json()
        assert set(body) >= SEED_002_FIELDS
        assert {key: body[key] for key in SEED_002_REGISTRATION} == SEED_002_REGISTRATION | {
            "tags": {"kind": "temp", "region": "eu", "owner": "qa"}
        }
        assert body["status"] == "registered"
        assert body["tenant_id"] == str(https.api.tenant_id)
        assert is_uuid(body["device_id"])
        assert API_KEY.fullmatch(body["api_key"])
        assert body["created_at"].endswith("Z")
        datetime.fromisoformat(body["created_at"])

        clash = await admin.post(f"{BASE}/devices", json=SEED_002_REGISTRATION)
        assert clash.status_code == 409
        refused = clash.json()
        assert refused["code"] == "ALREADY_EXISTS"
        assert refused["message"] == 'device with hardware_id "HW-LAB-0001" already exists in this tenant'

        record = (await admin.get(f"{BASE}/devices/{body['device_id']}")).json()
        assert "api_key" not in record
        listed = (await admin.get(f"{BASE}/devices", params={"tag": "region=eu"})).json()
        assert [d["device_id"] for d in listed["devices"]] == [body["device_id"]]
        assert listed["next_cursor"] is None
    assert len(await events_of(https.api, "device.registered")) == 1


async def test_seed_002_says_who_may_register(https: Https) -> None:
    wanted = [
        (Role.TENANT_ADMIN, frozenset(), 201),
        (Role.PLATFORM_ADMIN, frozenset(), 201),
        (Role.MEMBER, frozenset({Permission.DEVICES}), 201),
        (Role.MEMBER, frozenset({Permission.DEVICES_READ}), 403),
        (Role.MEMBER, frozenset(), 403),
    ]
    for number, (role, permissions, status) in enumerate(wanted):
        async with https.operator(role=role, permissions=permissions) as caller:
            body = SEED_002_REGISTRATION | {"hardware_id": f"HW-{number}"}
            assert (await caller.post(f"{BASE}/devices", json=body)).status_code == status
    async with https.operator() as admin:
        body = SEED_002_REGISTRATION | {"tenant_id": "22222222-2222-2222-2222-222222222222"}
        answer = await admin.post(f"{BASE}/devices", json=body)
        assert answer.status_code == 400
        assert answer.json()["code"] == "INVALID_ARGUMENT"
        assert "tenant_id" in answer.json()["message"]
    device = await https.api.registered("HW-own")
    async with https.device(device["api_key"]) as caller:
        answer = await caller.post(f"{BASE}/devices", json=SEED_002_REGISTRATION)
        assert answer.status_code == 403


async def test_seed_003_presents_the_key_in_either_header(https: Https) -> None:
    device = await https.api.registered()
    path = f"{BASE}/devices/{device['device_id']}/uplink"
    for headers in (
        {"authorization": f"Bearer {device['api_key']}"},
        {"authorization": f"bearer {device['api_key']}"},
        {"x-api-key": device["api_key"]},
    ):
        async with https.client(**headers) as caller:
            answer = await caller.post(path, json={"kind": "telemetry", "payload": "..."})
            assert answer.status_code == 202
