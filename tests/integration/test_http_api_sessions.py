"""Devices on connections: one session per key, reused; revocation ends keep-alive and event connections (over TLS)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from adapters.http.app import HttpApiSettings
from adapters.http.events import stream_of
from registry.model import Actor, DeviceId, Fingerprint, Transport
from tests.http_api import BASE, Api, Https, api, https, now, running_api, serving  # noqa: F401  # fixtures
from tests.tls_peers import client_context, connect, eventually, make_certificate

TELEMETRY = f"{BASE}/telemetry"


def live(api: Api) -> int:  # noqa: F811
    return api.registry.sessions.count()[Transport.HTTPS]


async def test_requests_of_a_connection_share_one_session(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    async with https.device(device["api_key"]) as caller:
        for _ in range(5):
            assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 202
        assert live(https.api) == 1
        assert https.api.registry.resolver.counters.admitted == 1
        async with https.operator() as admin:
            listed = (await admin.get(f"{BASE}/sessions")).json()
        assert [s["device_id"] for s in listed["sessions"]] == [device["device_id"]]
        assert listed["sessions"][0]["transport"] == "https"
        assert listed["sessions"][0]["peer"] == "127.0.0.1"
        assert listed["next_cursor"] is None
    await eventually(lambda: live(https.api) == 0)


async def test_pipelined_first_requests_open_one_session(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    reader, writer = await connect(https.port, client_context(https.holder))
    head = f"POST {TELEMETRY} HTTP/1.1\r\nHost: x\r\nX-API-Key: {device['api_key']}\r\nContent-Length: 7\r\n\r\n"
    writer.write((head + '{"a":1}').encode() * 10)
    answered = 0
    while answered < 10:
        line = await asyncio.wait_for(reader.readline(), 10)
        assert line
        answered += b"HTTP/1.1 202" in line
    assert live(https.api) == 1
    assert https.api.registry.resolver.counters.admitted == 1
    writer.close()
    await writer.wait_closed()


async def test_another_key_on_the_connection_has_its_own_session_up_to_a_bound(https: Https) -> None:  # noqa: F811
    devices = [await https.api.registered(f"HW-{n}") for n in range(9)]
    async with https.client() as pool:
        answers = [
            await pool.post(TELEMETRY, json={"a": 1}, headers={"x-api-key": device["api_key"]}) for device in devices
        ]
        assert [a.status_code for a in answers] == [202] * 8 + [429]
        assert live(https.api) == 8
        again = await pool.post(TELEMETRY, json={"a": 1}, headers={"x-api-key": devices[0]["api_key"]})
        assert again.status_code == 202
    await eventually(lambda: live(https.api) == 0)


async def test_revoking_a_key_closes_its_connection_and_refuses_the_next(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    path = f"{BASE}/devices/{device['device_id']}/credentials"
    async with https.operator() as admin, https.device(device["api_key"]) as caller:
        assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 202
        credential = (await admin.get(path)).json()["credentials"][0]
        assert "api_key" not in credential
        assert credential["credential_id"] == device["credential_id"]
        receipt = (await admin.delete(f"{path}/{credential['credential_id']}")).json()
        assert receipt["remaining"] == 0
        assert [s["transport"] for s in receipt["sessions"]] == ["https"]
        assert receipt["sessions"][0]["closed_after_ms"] < 1000
        assert live(https.api) == 0
        await eventually(lambda: len(https.server.connections) == 1)  # the operator's own
        refused = await caller.post(TELEMETRY, json={"a": 1})
        assert refused.status_code == 401
        assert refused.json()["code"] == "UNAUTHENTICATED"
        again = (await admin.delete(f"{path}/{credential['credential_id']}")).json()
        assert again["revoked_at"] == receipt["revoked_at"]
        assert again["sessions"] == []
        timeline = (await admin.get(f"{BASE}/devices/{device['device_id']}/timeline")).json()["events"]
        refusal = next(e for e in timeline if e["kind"] == "auth.refused")
        assert refusal["data"]["reason"] == "credential revoked"
        assert refused.json()["correlation_id"] in refusal["data"]["correlation_ids"]


async def test_who_revokes_over_the_devices_own_connection_gets_the_receipt(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    credential = f"{BASE}/devices/{device['device_id']}/credentials/{device['credential_id']}"
    key, operators = {"x-api-key": device["api_key"]}, {"authorization": f"Bearer {https.api.token()}"}
    async with https.client() as one:
        assert (await one.post(TELEMETRY, json={"a": 1}, headers=key)).status_code == 202
        assert len(https.server.connections) == 1
        answer = await one.delete(credential, headers=operators)
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
        receipt = answer.json()
        assert receipt["remaining"] == 0
        assert [s["transport"] for s in receipt["sessions"]] == ["https"]
        await eventually(lambda: not https.server.connections)
        assert live(https.api) == 0
        assert (await one.post(TELEMETRY, json={"a": 1}, headers=key)).status_code == 401
        assert (await one.get(f"{BASE}/devices", headers=operators)).status_code == 200


async def test_nothing_behind_the_revocation_is_answered(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    reader, writer = await connect(https.port, client_context(https.holder))
    send = (
        f"POST {TELEMETRY} HTTP/1.1\r\nHost: x\r\nX-API-Key: {device['api_key']}\r\nContent-Length: 7\r\n\r\n"
        + '{"a":1}'
    )
    bearer = f"Bearer {https.api.token()}"
    revoke = (
        f"DELETE {BASE}/devices/{device['device_id']}/credentials/{device['credential_id']} HTTP/1.1\r\n"
        f"Host: x\r\nAuthorization: {bearer}\r\n\r\n"
    )
    writer.write((send + revoke + send).encode())
    async with asyncio.timeout(10):
        heard = await reader.read(-1)
    assert re.findall(rb"HTTP/1\.1 (\d+)", heard) == [b"202", b"200"]
    writer.close()


async def test_the_raw_connection_sees_the_end(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    reader, writer = await connect(https.port, client_context(https.holder))
    writer.write(
        f"POST {TELEMETRY} HTTP/1.1\r\nHost: x\r\nX-API-Key: {device['api_key']}\r\n"
        'Content-Length: 7\r\n\r\n{"a":1}'.encode()
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 202")
    async with https.operator() as admin:
        assert (await admin.delete(f"{BASE}/devices/{device['device_id']}")).status_code == 200
    async with asyncio.timeout(5):
        while await reader.read(1000):
            pass
    writer.close()


async def test_an_inactive_device_is_out_and_comes_back(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    path = f"{BASE}/devices/{device['device_id']}"
    async with https.operator() as admin, https.device(device["api_key"]) as caller:
        assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 202
        changed = (await admin.put(path, json={"status": "inactive"})).json()
        assert changed["status"] == "inactive"
        assert len(changed["receipt"]["sessions"]) == 1
        assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 401
        back = (await admin.put(path, json={"status": "active"})).json()
        assert "receipt" not in back
        assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 202


async def test_a_kicked_session_may_come_back_at_once(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    async with https.operator() as admin, https.device(device["api_key"]) as caller:
        assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 202
        [session] = (await admin.get(f"{BASE}/sessions")).json()["sessions"]
        receipt = (await admin.delete(f"{BASE}/sessions/{session['session_id']}")).json()
        assert [s["session_id"] for s in receipt["sessions"]] == [session["session_id"]]
        assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 202


async def test_rotation_overlaps_and_ends(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    path = f"{BASE}/devices/{device['device_id']}/credentials/rotate"
    async with https.operator() as admin:
        answer = await admin.post(path, json={"overlap_seconds": 600})
        assert answer.status_code == 201
        rotated = answer.json()
        assert rotated["credential_type"] == "api_key"
        assert rotated["retired"] == [device["credential_id"]]
        for key in (device["api_key"], rotated["api_key"]):
            async with https.device(key) as caller:
                assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 202
        last = (await admin.post(path, json={"overlap_seconds": 0})).json()
        for key, status in ((device["api_key"], 401), (rotated["api_key"], 401), (last["api_key"], 202)):
            async with https.device(key) as caller:
                assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == status


async def test_a_client_certificate_is_a_credential(https: Https, tmp_path: Path) -> None:  # noqa: F811
    holder = make_certificate("a device")
    device = await https.api.registered(credential_type="x509")
    assert "api_key" not in device
    await https.api.registry.credentials.register_certificate(
        https.api.tenant_id,
        DeviceId(UUID(device["device_id"])),
        Fingerprint(hashlib.sha256(holder.der).hexdigest()),
        now() - timedelta(days=1),
        now() + timedelta(days=1),
        {},
        Actor("operator:test", "c"),
    )
    async with https.client(certificate=holder.save(tmp_path)) as caller:
        for _ in range(2):
            assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 202
        assert live(https.api) == 1
        assert (await caller.get(f"{BASE}/devices")).status_code == 403
    stranger = make_certificate("nobody")
    async with https.client(certificate=stranger.save(tmp_path)) as caller:
        assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 401


async def test_without_a_connection_a_session_lives_as_long_as_its_request(api: Api) -> None:  # noqa: F811
    device = await api.registered()
    async with api.device(device["api_key"]) as caller:
        assert (await caller.post(TELEMETRY, json={"a": 1})).status_code == 202
    assert live(api) == 0


# -- event streams -----------------------------------------------------------------------------------------------------


class Stream:
    """A reader of server-sent events."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()

    async def message(self) -> dict[str, str]:
        """The next message's fields; a comment is `{"": text}`."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(10):
            while True:
                line = await anext(self._lines)
                if not line:
                    return fields
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")


@pytest.fixture
async def one(dsn: str) -> AsyncIterator[Https]:
    async with running_api(dsn, HttpApiSettings(sse_streams_per_tenant=1)) as running, serving(running) as server:
        yield server


async def test_the_stream_tells_what_happens_and_resumes(one: Https) -> None:
    async with one.operator() as admin, admin.stream("GET", f"{BASE}/events/stream") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        stream = Stream(response)
        first = await stream.message()
        assert set(first) == {"retry", "id"}
        assert (one.api.http.service.streams.open, one.server.in_flight) == (1, 0)
        made = await one.api.registered("HW-1")
        told = await stream.message()
        assert told["event"] == "device.registered"
        body = json.loads(told["data"])
        assert body["device_id"] == made["device_id"]
        assert body["cursor"] == told["id"]
        assert "sk_live_" not in told["data"]
        async with one.operator() as another:
            full = await another.get(f"{BASE}/events/stream")
            assert full.status_code == 429
            assert "retry-after" in full.headers
    streams = one.api.http.service.streams
    await eventually(lambda: streams.open == 0)
    await one.api.registered("HW-2")
    headers = {"last-event-id": told["id"]}
    async with one.operator() as admin, admin.stream("GET", f"{BASE}/events/stream", headers=headers) as response:
        stream = Stream(response)
        await stream.message()
        resumed = json.loads((await stream.message())["data"])
        assert resumed["kind"] == "device.registered"
        assert resumed["cursor"] != told["id"]
    async with one.operator() as admin:
        bad = await admin.get(f"{BASE}/events/stream", headers={"last-event-id": "nonsense"})
        assert bad.status_code == 400
        assert (await admin.head(f"{BASE}/events/stream")).status_code == 200
    await eventually(lambda: streams.open == 0)


async def test_the_stream_ends_with_its_token(one: Https) -> None:
    token = one.api.token(ttl=timedelta(seconds=60), at=now() - timedelta(seconds=56))
    async with (
        one.client(authorization=f"Bearer {token}") as admin,
        admin.stream("GET", f"{BASE}/events/stream") as response,
    ):
        async with asyncio.timeout(30):
            text = (await response.aread()).decode()
    assert text.endswith(": the token has expired\n\n")
    await eventually(lambda: one.api.http.service.streams.open == 0)


async def test_the_stream_ends_cleanly_when_the_node_drains(one: Https) -> None:
    async with one.operator() as admin, admin.stream("GET", f"{BASE}/events/stream") as response:
        stream = Stream(response)
        await stream.message()
        one.api.http.service.streams.end()
        async with asyncio.timeout(20):
            await one.server.drain(60)
            assert await stream.message() == {"": "this node is leaving; come back with Last-Event-ID"}
            with pytest.raises(StopAsyncIteration):  # the last chunk came: this is an end, not a break
                await stream.message()


async def test_a_heartbeat_keeps_the_stream_alive(one: Https) -> None:
    registry = one.api.registry
    content = stream_of(
        registry.event_log,
        one.api.tenant_id,
        str(registry.feed.cursor),
        timedelta(seconds=5),
        asyncio.Event(),
        heartbeat_seconds=0.01,
    )
    parts: list[Any] = [await anext(content) for _ in range(3)]
    assert parts[1:] == [b": still here\n\n"] * 2
    await content.aclose()  # type: ignore[attr-defined]  # a generator
