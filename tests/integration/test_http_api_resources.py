"""The operators' daily work over HTTP: what is made is read, changed, listed and deleted; secrets are shown once."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from adapters.http.app import operations
from tests.http_api import BASE, Api, api  # noqa: F401  # a fixture

SECRET = re.compile(r"sk_live_[A-Za-z0-9_-]{40,}|pk_[A-Za-z0-9_-]{40,}")


async def test_profiles(api: Api) -> None:  # noqa: F811
    path = f"{BASE}/profiles"
    async with api.operator() as admin:
        made = await admin.post(path, json={"profile_id": "p_a", "name": "A", "anchor_mode": "ANCHOR_MODE_HASH_CHAIN"})
        assert made.status_code == 201
        assert made.json()["anchor_mode"] == "ANCHOR_MODE_HASH_CHAIN"
        assert (await admin.post(path, json={"profile_id": "p_a", "name": "B"})).status_code == 409
        generated = (await admin.post(path, json={"name": "B"})).json()
        assert generated["profile_id"].startswith("p_")
        changed = (await admin.put(f"{path}/p_a", json={"description": "new", "anchor_mode": None})).json()
        assert (changed["name"], changed["description"], changed["anchor_mode"]) == ("A", "new", None)
        assert (await admin.get(f"{path}/p_a")).json() == changed
        device = await api.registered(profile_id="p_a")
        blocked = await admin.delete(f"{path}/p_a")
        assert (blocked.status_code, blocked.json()["code"]) == (400, "FAILED_PRECONDITION")
        assert (await admin.delete(f"{BASE}/devices/{device['device_id']}")).status_code == 200
        gone = await admin.delete(f"{path}/p_a")
        assert (gone.status_code, gone.content) == (204, b"")
        assert (await admin.get(f"{path}/p_a")).status_code == 404
        listed = (await admin.get(path)).json()
        assert [p["profile_id"] for p in listed["profiles"]] == [generated["profile_id"]]


async def test_templates(api: Api) -> None:  # noqa: F811
    path = f"{BASE}/provisioning/templates"
    async with api.operator() as admin, api.client() as device:
        made = (await admin.post(path, json={"name": "T", "max_claims": 2})).json()
        one = f"{path}/{made['template_id']}"
        assert "provision_key" not in (await admin.get(one)).json()
        keys = []
        for n in range(2):
            claim = {"provision_key": made["provision_key"], "device_name": "D", "hardware_id": f"H{n}"}
            keys.append((await device.post(f"{BASE}/provision", json=claim)).json()["api_key"])
        assert (await admin.get(one)).json()["claims"] == 2
        devices = (await admin.get(f"{one}/devices")).json()["devices"]
        assert [d["hardware_id"] for d in devices] == ["H0", "H1"]
        done = await admin.post(f"{one}/revoke-devices")
        assert done.status_code == 200
        assert (done.json()["devices"], done.json()["credentials"], done.json()["status"]) == (2, 2, "disabled")
        for key in keys:
            async with api.device(key) as caller:
                assert (await caller.post(f"{BASE}/telemetry", json={"a": 1})).status_code == 401
        assert (await admin.delete(one)).status_code == 204
        assert (await admin.get(one)).status_code == 404
        assert (await admin.get(path)).json() == {"templates": [], "next_cursor": None}


async def test_devices_are_filtered_counted_and_walked(api: Api) -> None:  # noqa: F811
    gateway = await api.registered("GW", name="Gateway")
    for n in range(4):
        await api.registered(
            f"HW-{n}", groups=["lab"] if n % 2 else [], tags={"n": str(n)}, gateway_id=gateway["device_id"]
        )
    async with api.operator() as admin:

        async def ids(**query: str) -> list[str]:
            return [d["hardware_id"] for d in (await admin.get(f"{BASE}/devices", params=query)).json()["devices"]]

        assert await ids(group="lab") == ["HW-1", "HW-3"]
        assert await ids(tag="n=2") == ["HW-2"]
        assert await ids(gateway_id=gateway["device_id"], limit="1") == ["HW-0"]
        assert await ids(q="gate") == ["GW"]
        assert await ids(q="HW-") == ["HW-0", "HW-1", "HW-2", "HW-3"]
        assert await ids(status="active") == []
        walked, cursor = [], {}
        while True:
            page = (await admin.get(f"{BASE}/devices", params={"limit": "2", **cursor})).json()
            walked += [d["hardware_id"] for d in page["devices"]]
            if page["next_cursor"] is None:
                break
            cursor = {"cursor": page["next_cursor"]}
        assert walked == ["GW", "HW-0", "HW-1", "HW-2", "HW-3"]
        summary = (await admin.get(f"{BASE}/devices/summary")).json()
        assert (summary["total"], summary["by_status"]["registered"]) == (5, 5)
        assert set(summary["by_status"]) == {"pending", "registered", "active", "inactive", "maintenance", "offline"}
        assert summary["by_credential_type"] == {"api_key": 5, "psk": 0, "x509": 0}


async def test_a_device_is_changed_field_by_field(api: Api) -> None:  # noqa: F811
    device = await api.registered(tags={"a": "1"}, firmware="1.0")
    path = f"{BASE}/devices/{device['device_id']}"
    async with api.operator() as admin:
        changed = (await admin.put(path, json={"name": "New", "firmware": None, "status": "maintenance"})).json()
        assert (changed["name"], changed["firmware"], changed["status"]) == ("New", None, "maintenance")
        assert changed["tags"] == {"a": "1"}
        assert (await admin.put(path, json={"hardware_id": "HW-2"})).status_code == 400
        assert (await admin.put(path, json={"hardware_id": "HW-1"})).status_code == 200
        assert (await admin.put(path, json={"tenant_id": device["tenant_id"]})).status_code == 400
        assert (await admin.put(path, json={"status": "offline"})).status_code == 400


async def test_psk_devices(api: Api) -> None:  # noqa: F811
    key = "A" * 43
    device = await api.registered(credential_type="psk", psk={"identity": "press-7", "key": key})
    assert device["psk"] == {"identity": "press-7", "key": key}
    assert "api_key" not in device
    async with api.operator() as admin:
        more = await admin.post(f"{BASE}/devices/{device['device_id']}/psk")
        assert more.status_code == 201
        assert len(more.json()["psk"]["key"]) == 43
        taken = await admin.post(f"{BASE}/devices/{device['device_id']}/psk", json={"identity": "press-7"})
        assert (taken.status_code, taken.json()["code"]) == (409, "ALREADY_EXISTS")
        wrong = await admin.post(f"{BASE}/devices/{device['device_id']}/api-keys")
        assert (wrong.status_code, wrong.json()["code"]) == (400, "FAILED_PRECONDITION")
        listed = (await admin.get(f"{BASE}/devices/{device['device_id']}/credentials")).text
        assert key not in listed


async def test_more_api_keys(api: Api) -> None:  # noqa: F811
    device = await api.registered()
    path = f"{BASE}/devices/{device['device_id']}/api-keys"
    async with api.operator() as admin:
        body = {"label": "bench", "expires_at": "2099-01-01T00:00:00Z"}
        made = (await admin.post(path, json=body)).json()
        assert (made["label"], made["expires_at"]) == ("bench", "2099-01-01T00:00:00Z")
        assert (await admin.post(path, json={"expires_at": "2001-01-01T00:00:00Z"})).status_code == 400
        for _ in range(8):
            assert (await admin.post(path)).status_code == 201
        full = await admin.post(path)
        assert (full.status_code, full.json()["code"]) == (429, "RESOURCE_EXHAUSTED")
        assert int(full.headers["retry-after"]) >= 1


async def test_every_change_is_audited_and_told_without_secrets(api: Api) -> None:  # noqa: F811
    secrets: list[str] = []
    async with api.operator() as admin:
        device = await api.registered()
        template = (await admin.post(f"{BASE}/provisioning/templates", json={"name": "T"})).json()
        rotated = (await admin.post(f"{BASE}/devices/{device['device_id']}/credentials/rotate")).json()
        secrets += [device["api_key"], template["provision_key"], rotated["api_key"]]
        answer = await admin.get(f"{BASE}/devices/{device['device_id']}", headers={"x-correlation-id": "look-0001"})
        assert answer.headers["x-correlation-id"] == "look-0001"
        await admin.put(
            f"{BASE}/devices/{device['device_id']}", json={"name": "N"}, headers={"x-correlation-id": "change-0001"}
        )
        audit = await admin.get(f"{BASE}/audit")
        events = await admin.get(f"{BASE}/events")
        timeline = await admin.get(f"{BASE}/devices/{device['device_id']}/timeline")
    assert audit.json()["audit"][0]["correlation_id"] == "change-0001"
    assert audit.json()["audit"][0]["actor"] == "operator:ada"
    assert {row["object_type"] for row in audit.json()["audit"]} >= {"device", "credential"}
    kinds = [event["kind"] for event in events.json()["events"]]
    assert kinds[0] == "device.registered"
    assert "credential.rotated" in kinds
    last = events.json()["events"][-1]["cursor"]
    async with api.operator() as admin:
        rest = (await admin.get(f"{BASE}/events", params={"after": last})).json()
    assert rest == {"events": [], "next_cursor": None}
    assert [e["kind"] for e in timeline.json()["events"]] == list(reversed(kinds))
    for text in (audit.text, events.text, timeline.text):
        assert not SECRET.search(text)
        assert not any(secret in text for secret in secrets)


async def test_the_document_and_its_page_are_served_from_here(api: Api) -> None:  # noqa: F811
    async with api.client() as nobody:
        answer = await nobody.get(f"{BASE}/openapi.json")
        document: dict[str, Any] = msgspec.json.decode(answer.content)
        assert document["openapi"].startswith("3.1")
        page = await nobody.get("/docs")
        assert page.status_code == 200
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "://" not in page.text.replace("<!doctype html>", "")
        for source in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
            asset = await nobody.get(source)
            assert asset.status_code == 200, source
        assert (await nobody.get("/docs/nothing.js")).status_code == 404
        chain = await nobody.get(f"{BASE}/ca/chain")
        assert chain.content == api.registry.certificates.chain_pem()
        assert chain.headers["content-type"] == "application/pem-certificate-chain"


async def test_every_reference_in_the_document_leads_somewhere(api: Api) -> None:  # noqa: F811
    async with api.client() as nobody:
        document = (await nobody.get(f"{BASE}/openapi.json")).json()

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if "$ref" in node else []
            return own + [r for each in node.values() for r in references(each)]
        return [r for each in node for r in references(each)] if isinstance(node, list) else []

    for reference in set(references(document)):
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
    ids = [o["operationId"] for item in document["paths"].values() for k, o in item.items() if k != "parameters"]
    assert len(ids) == len(set(ids)) == len(operations())
    schemas = document["components"]["schemas"]
    assert schemas["DeviceRegistration"]["additionalProperties"] is False
    assert schemas["DeviceRegistration"]["required"] == ["name", "hardware_id"]
    assert schemas["DeviceRegistration"]["properties"]["hardware_id"]["pattern"] == "^[!-~]{1,128}$"
