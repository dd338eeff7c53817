"""What devices send over HTTPS, by the hot handler and by the router alike: stored, once, for oneself or a child."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import cbor2
import httpx
import pytest

from registry.errors import Unavailable
from tests.http_api import BASE, Api, Https, api, https, is_uuid  # noqa: F401  # fixtures

TELEMETRY = f"{BASE}/telemetry"
CBOR = {"content-type": "application/cbor"}


async def stored(api: Api, device_id: str, what: str = "uplinks", **query: str) -> list[dict[str, Any]]:  # noqa: F811
    async with api.operator() as admin:
        answer = await admin.get(f"{BASE}/devices/{device_id}/{what}", params=query)
    assert answer.status_code == 200, answer.text
    entries: list[dict[str, Any]] = answer.json()[what]
    return entries


async def test_an_uplink_is_kept_as_it_was_sent(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    raw = b'{"kind":"event","message_id":"m-1","observed_at":"2026-05-29T10:15:00+02:00","payload":{"b": 1.50,"a":[ ]}}'
    async with https.device(device["api_key"]) as caller:
        path = f"{BASE}/devices/{device['device_id']}/uplink"
        first = await caller.post(path, content=raw)
        again = await caller.post(path, content=raw.replace(b"1.50", b"2"))
    assert first.status_code == 202
    assert first.headers["content-type"] == "application/json"
    assert first.headers["cache-control"] == "no-store"
    assert len(first.headers["x-correlation-id"]) == 32
    assert is_uuid(first.json()["uplink_id"])
    assert again.json() == first.json()
    async with https.api.operator() as admin:
        answer = await admin.get(f"{BASE}/devices/{device['device_id']}/uplinks")
    assert b'"payload":{"b": 1.50,"a":[ ]}' in answer.content
    [uplink] = answer.json()["uplinks"]
    assert uplink["uplink_id"] == first.json()["uplink_id"]
    assert uplink["observed_at"] == "2026-05-29T08:15:00Z"
    assert (uplink["kind"], uplink["message_id"], uplink["transport"], uplink["via"]) == ("event", "m-1", "https", None)
    routes = [(route, status) for route, _, status in https.api.seen.answers if route.endswith("/uplink")]
    assert routes == [(f"{BASE}/devices/{{device_id}}/uplink", 202)] * 2


async def test_telemetry_becomes_readings(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    async with https.device(device["api_key"]) as caller:
        for body in (
            {"env.temperature": 21.5, "battery": 87},
            {"observed_at": "2026-05-29T10:15:00Z", "values": {"env.temperature": 22, "door": True}},
            [{"state": "open"}, {"observed_at": "2026-05-29T10:16:00Z", "values": {"state": "shut"}}],
        ):
            answer = await caller.post(TELEMETRY, json=body)
            assert answer.status_code == 202, answer.text
        key = {"idempotency-key": "boot7-42"}
        ids = {(await caller.post(TELEMETRY, json={"n": n}, headers=key)).json()["uplink_id"] for n in range(3)}
        assert len(ids) == 1
    readings = await stored(https.api, device["device_id"], "readings")
    assert sorted((r["component"], r["sensor"], str(r["value"])) for r in readings) == [
        ("env", "temperature", "21.5"),
        ("env", "temperature", "22"),
        ("main", "battery", "87"),
        ("main", "door", "True"),
        ("main", "n", "0"),
        ("main", "state", "open"),
        ("main", "state", "shut"),
    ]
    only = await stored(https.api, device["device_id"], "readings", component="env", since="2026-05-29T10:15:00Z")
    assert {r["value"] for r in only} == {21.5, 22}


async def test_cbor_says_the_same(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    path = f"{BASE}/devices/{device['device_id']}/uplink"
    moment = datetime(2026, 5, 29, 10, 15, tzinfo=UTC)
    async with https.device(device["api_key"]) as caller:
        body = {"observed_at": moment, "values": {"t": 21.5}}
        assert (await caller.post(TELEMETRY, content=cbor2.dumps(body), headers=CBOR)).status_code == 202
        uplink = {
            "kind": "event",
            "payload": {"raw": b"\x01\x02", "n": None},
            "message_id": "c1",
            "observed_at": moment,
        }
        answer = await caller.post(path, content=cbor2.dumps(uplink), headers=CBOR)
        assert answer.status_code == 202, answer.text
        for bad in (
            b"",
            b"\xff",
            b"\x01\x02",
            b"\xa1\x01\x02",
            b"\x81" * 10_000 + b"\x00",
            cbor2.dumps({"t": float("inf")}),
            cbor2.dumps({"t": float("nan"), "u": 1}),
            cbor2.dumps(cbor2.CBORTag(35, "a+")),
            cbor2.dumps({"t": 2**70}),
            cbor2.dumps({}),
        ):
            answer = await caller.post(TELEMETRY, content=bad, headers=CBOR)
            assert answer.status_code == 400, (bad[:20], answer.text)
        answer = await caller.post(path, content=cbor2.dumps({"kind": "event", "payload": 1, "x": 1}), headers=CBOR)
        assert answer.status_code == 400
        assert '"x"' in answer.json()["message"]
        unstorable = cbor2.dumps({"kind": "event", "payload": {"r": float("nan")}})
        answer = await caller.post(path, content=unstorable, headers=CBOR)
        assert answer.status_code == 400
        assert "'r' is NaN or infinite" in answer.json()["message"]
    [reading] = await stored(https.api, device["device_id"], "readings")
    assert (reading["value"], reading["observed_at"]) == (21.5, "2026-05-29T10:15:00Z")
    [event] = await stored(https.api, device["device_id"], kind="event")
    assert event["payload"] == {"raw": "AQI=", "n": None}
    assert event["observed_at"] == "2026-05-29T10:15:00Z"


async def test_bad_uplinks_store_nothing(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    path = f"{BASE}/devices/{device['device_id']}/uplink"
    async with https.device(device["api_key"]) as caller:
        for body in (
            b"",
            b"{",
            b'{"kind":"event"}',
            b'{"kind":"Event","payload":1}',
            b'{"kind":"event","payload":1,"x":2}',
            b'{"kind":"event","payload":1,"tenant_id":"x"}',
            b'{"kind":"event","payload":"\\u0000"}',
            b'{"kind":"event","payload":"\xff"}',
            b'{"kind":"event","payload":"\\ud800"}',
            b'{"kind":"event","payload":1e999}',
            b'{"kind":"event","payload":' + b"[" * 5000 + b"]" * 5000 + b"}",
            b'{"kind":"event","payload":' + b"[" * 80 + b"]" * 80 + b"}",
            b'{"kind":"event","payload":1,"message_id":"a b"}',
            b'{"kind":"event","payload":1,"observed_at":"yesterday"}',
            b'{"kind":"event","payload":1,"observed_at":"2026-05-29T10:15:00"}',
            b'{"kind":"event","payload":1,"observed_at":"0001-01-01T00:00:00+14:00"}',
            b'{"kind":"event","payload":"' + b"x" * 300_000 + b'"}',
        ):
            answer = await caller.post(path, content=body)
            assert answer.status_code == 400, (body[:60], answer.text)
            assert answer.json()["code"] == "INVALID_ARGUMENT"
        for telemetry in (b"[]", b"{}", b"1", b'{"a":{}}', b'{"a":1e999}', b'{"a":"\\u0000"}', b'{"\xff":1}'):
            answer = await caller.post(TELEMETRY, content=telemetry)
            assert answer.status_code == 400, (telemetry, answer.text)
        wrong = await caller.post(TELEMETRY, content=b"a=1", headers={"content-type": "text/plain"})
        assert wrong.status_code == 415
        assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 202
    assert len(await stored(https.api, device["device_id"])) == 1
    assert https.api.http.hot.counters.stored == 1


async def test_a_gateway_sends_for_its_children_only(https: Https) -> None:  # noqa: F811
    gateway = await https.api.registered("HW-GW")
    child = await https.api.registered("HW-CHILD", gateway_id=gateway["device_id"])
    stranger = await https.api.registered("HW-STRANGER")
    body = {"kind": "telemetry", "payload": {"t": 1}}
    async with https.device(gateway["api_key"]) as caller:

        async def send(device_id: str) -> httpx.Response:
            return await caller.post(f"{BASE}/devices/{device_id}/uplink", json=body)

        assert (await send(child["device_id"])).status_code == 202
        assert (await send(child["device_id"].upper())).status_code == 202
        assert (await send(gateway["device_id"])).status_code == 202
        for other in (stranger["device_id"], "3a9f1d22-6b4c-4e8a-bf21-90c7e5d4a118", "x", "x" * 36):
            refused = await send(other)
            assert refused.status_code == 404
            assert refused.json()["message"] == "no such device in this tenant"
    async with https.device(child["api_key"]) as caller:
        assert (await send_as(caller, gateway["device_id"])).status_code == 404
    uplinks = await stored(https.api, child["device_id"])
    assert [u["via"] for u in uplinks] == [gateway["device_id"]] * 2
    assert len(await stored(https.api, child["device_id"], "readings")) == 2


async def send_as(caller: httpx.AsyncClient, device_id: str) -> httpx.Response:
    return await caller.post(f"{BASE}/devices/{device_id}/uplink", json={"kind": "event", "payload": 1})


async def test_a_full_queue_says_when_to_come_back(https: Https, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def full(*_: object) -> None:
        raise Unavailable("the queue is full", retry_after=2.2)

    device = await https.api.registered()
    monkeypatch.setattr(type(https.api.registry.uplinks), "submit", full)
    async with https.device(device["api_key"]) as caller:
        answer = await caller.post(TELEMETRY, json={"a": 1})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["code"] == "UNAVAILABLE"


async def test_lists_walk_by_cursor(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    async with https.device(device["api_key"]) as caller:
        sent = [(await caller.post(TELEMETRY, json={"n": n})).json()["uplink_id"] for n in range(5)]
    seen: list[str] = []
    cursor: dict[str, str] = {}
    async with https.operator() as admin:
        while True:
            path = f"{BASE}/devices/{device['device_id']}/uplinks"
            page = (await admin.get(path, params={"limit": "2", **cursor})).json()
            seen += [u["uplink_id"] for u in page["uplinks"]]
            if page["next_cursor"] is None:
                break
            cursor = {"cursor": page["next_cursor"]}
    assert seen == list(reversed(sent))
