"""Commands, configurations and children over HTTP: the round trips, the long poll over TLS, and how a wait ends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import cbor2
import httpx
import pytest

from adapters.http.app import HttpApiSettings
from registry.commands import Commands, NewCommand
from registry.model import DeviceId
from registry.sealing import KeyRing
from tests.http_api import BASE, Api, Https, running_api, serving
from tests.nodes import ACTOR, now, running_node, until


@pytest.fixture
async def https(dsn: str) -> AsyncIterator[Https]:
    async with running_api(dsn) as api, serving(api) as running:
        yield running


async def queued(https: Https, device_id: str, **body: Any) -> dict[str, Any]:
    async with https.operator() as operator:
        answer = await operator.post(f"{BASE}/devices/{device_id}/commands", json={"method": "reboot"} | body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def waiting(https: Https) -> int:
    return https.api.registry.commands.waiting


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


# -- commands ----------------------------------------------------------------------------------------------------------


async def test_a_whole_round_trip(https: Https) -> None:
    device = await https.api.registered()
    path = f"{BASE}/devices/{device['device_id']}/commands"
    made = await queued(https, device["device_id"], params={"delay_s": 1.50}, ttl_seconds=60)
    assert made["status"] == "queued"
    async with https.device(device["api_key"]) as client:
        fetched = await client.get(f"{path}/next?wait=30")
        assert fetched.status_code == 200
        down = fetched.json()
        assert sorted(down) == ["command_id", "expires_at", "method", "params"]
        assert (down["command_id"], down["method"], down["params"]) == (made["command_id"], "reboot", {"delay_s": 1.5})
        assert down["expires_at"] == made["expires_at"]
        answer_path = f"{path}/{made['command_id']}/response"
        for result in ({"done": True}, {"done": "again"}):
            answered = await client.post(answer_path, json={"result": result})
            assert (answered.status_code, answered.json()) == (
                200,
                {"command_id": made["command_id"], "status": "succeeded"},
            )
        assert (await client.get(f"{path}/next")).status_code == 204
    async with https.operator() as operator:
        shown = (await operator.get(f"{path}/{made['command_id']}")).json()
        assert (shown["status"], shown["result"], shown["error"]) == ("succeeded", {"done": True}, None)
        assert (shown["deliveries"], shown["answered_by"]) == (1, device["device_id"])
        listed = (await operator.get(f"{path}?status=succeeded&method=reboot")).json()
        assert listed == {"commands": [shown], "next_cursor": None}
        assert (await operator.get(f"{path}?status=queued")).json()["commands"] == []
        events = (await operator.get(f"{BASE}/events")).json()["events"]
        told = [e["kind"] for e in events if e["data"].get("command_id") == made["command_id"]]
        assert told == ["command.queued", "command.delivered", "command.finished"]
        audit = (await operator.get(f"{BASE}/audit")).json()
        assert any(row["object_id"] == made["command_id"] for row in next(iter(audit.values())))


async def test_a_failure_in_cbor(https: Https) -> None:
    device = await https.api.registered()
    made = await queued(https, device["device_id"])
    path = f"{BASE}/devices/{device['device_id']}/commands/{made['command_id']}"
    async with https.device(device["api_key"]) as client:
        body = cbor2.dumps({"error": {"code": "E_JAM", "message": "the door is jammed"}})
        answered = await client.post(f"{path}/response", content=body, headers={"content-type": "application/cbor"})
        assert answered.json()["status"] == "failed"
    async with https.operator() as operator:
        shown = (await operator.get(path)).json()
    assert shown["error"] == {"code": "E_JAM", "message": "the door is jammed"}
    assert shown["result"] is None


async def test_cancelling(https: Https) -> None:
    device = await https.api.registered()
    made = await queued(https, device["device_id"])
    path = f"{BASE}/devices/{device['device_id']}/commands/{made['command_id']}"
    async with https.operator() as operator, https.device(device["api_key"]) as client:
        for _ in range(2):
            cancelled = await operator.delete(path)
            assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        assert (await client.get(f"{BASE}/devices/{device['device_id']}/commands/next")).status_code == 204
        answered = await client.post(f"{path}/response", json={"result": 1})
        assert code(answered) == (400, "FAILED_PRECONDITION")
        other = await queued(https, device["device_id"])
        other_path = path.replace(made["command_id"], other["command_id"])
        await client.post(f"{other_path}/response", json={"result": 1})
        assert code(await operator.delete(other_path)) == (400, "FAILED_PRECONDITION")


@pytest.mark.parametrize(
    "body",
    [
        {}, {"method": ""}, {"method": "a b"}, {"method": "a", "ttl_seconds": 0}, {"method": "a", "ttl_seconds": 1e9},
        {"method": "a", "expires_at": "2020-01-01T00:00:00Z"}, {"method": "a", "tenant_id": "x"},
        {"method": "a", "expires_at": "2999-01-01T00:00:00Z"}, {"method": "a", "params": "x" * 40_000},
        {"method": "a", "params": "\0"},
    ],
)  # fmt: skip
async def test_what_is_no_command_is_refused(https: Https, body: dict[str, Any]) -> None:
    device = await https.api.registered()
    async with https.operator() as operator:
        refused = await operator.post(f"{BASE}/devices/{device['device_id']}/commands", json=body)
    assert code(refused) == (400, "INVALID_ARGUMENT")


async def test_what_is_no_response_or_no_query_is_refused(https: Https) -> None:
    device = await https.api.registered()
    made = await queued(https, device["device_id"])
    path = f"{BASE}/devices/{device['device_id']}/commands"
    async with https.device(device["api_key"]) as client:
        for body in ({}, {"result": 1, "error": {"code": "x"}}, {"error": "x"}, [1]):
            refused = await client.post(f"{path}/{made['command_id']}/response", json=body)
            assert code(refused) == (400, "INVALID_ARGUMENT"), body
        for query in ("wait=61", "wait=-1", "wait=1.5", "wait=x", "after=x", "since=1"):
            assert code(await client.get(f"{path}/next?{query}")) == (400, "INVALID_ARGUMENT"), query
        for missing in (str(uuid4()), "nothing"):
            assert code(await client.post(f"{path}/{missing}/response", json={"result": 1})) == (404, "NOT_FOUND")
        assert code(await client.get(f"{path}/next?after={uuid4()}")) == (404, "NOT_FOUND")
        assert (await client.head(f"{path}/next")).status_code == 204
    async with https.operator() as operator:
        assert (await operator.get(f"{path}/{made['command_id']}")).json()["status"] == "queued"


async def test_devices_reach_their_own_commands_only(https: Https) -> None:
    device, other = await https.api.registered("HW-1"), await https.api.registered("HW-2")
    made = await queued(https, device["device_id"])
    path = f"{BASE}/devices/{device['device_id']}/commands"
    async with https.device(other["api_key"]) as stranger:
        assert code(await stranger.get(f"{path}/next")) == (404, "NOT_FOUND")
        answered = await stranger.post(f"{path}/{made['command_id']}/response", json={"result": 1})
        assert code(answered) == (404, "NOT_FOUND")
        mine = f"{BASE}/devices/{other['device_id']}/commands/{made['command_id']}/response"
        assert code(await stranger.post(mine, json={"result": 1})) == (404, "NOT_FOUND")
        assert code(await stranger.get(path)) == (403, "PERMISSION_DENIED")
        assert code(await stranger.post(path, json={"method": "a"})) == (403, "PERMISSION_DENIED")
    async with https.operator() as operator:
        assert code(await operator.get(f"{path}/next")) == (403, "PERMISSION_DENIED")


# -- the long poll -----------------------------------------------------------------------------------------------------


async def test_a_poll_is_woken_and_its_connection_goes_on(https: Https) -> None:
    device = await https.api.registered()
    path = f"{BASE}/devices/{device['device_id']}/commands"
    async with https.device(device["api_key"]) as client:
        for _ in range(2):
            polling = asyncio.create_task(client.get(f"{path}/next?wait=30"))
            await until(lambda: waiting(https) == 1)
            await until(lambda: https.server.in_flight == 0)
            made = await queued(https, device["device_id"])
            fetched = await asyncio.wait_for(polling, 5)
            assert fetched.json()["command_id"] == made["command_id"]
            await client.post(f"{path}/{made['command_id']}/response", json={"result": None})
        assert len([c for c in https.server.connections if c.session is not None]) == 1
    assert https.server.in_flight == 0


async def test_a_poll_is_woken_by_another_node(dsn: str, https: Https) -> None:
    device = await https.api.registered()
    path = f"{BASE}/devices/{device['device_id']}/commands"
    async with running_node(dsn, "two", KeyRing.generate()) as two, https.device(device["api_key"]) as client:
        theirs = Commands(two.database, clock=now, random=os.urandom, feed=two.feed)
        polling = asyncio.create_task(client.get(f"{path}/next?wait=30"))
        await until(lambda: waiting(https) == 1)
        device_id = DeviceId(UUID(device["device_id"]))
        made = await theirs.queue(https.api.tenant_id, device_id, NewCommand("reboot"), ACTOR)
        fetched = await asyncio.wait_for(polling, 5)
        await theirs.stop()
    assert fetched.json()["command_id"] == str(made.command_id)


async def test_a_poll_ends_empty_after_its_wait(https: Https) -> None:
    device = await https.api.registered()
    async with https.device(device["api_key"]) as client:
        empty = await client.get(f"{BASE}/devices/{device['device_id']}/commands/next?wait=1")
    assert (empty.status_code, empty.content) == (204, b"")


async def test_a_revocation_ends_a_wait_at_once(https: Https) -> None:
    device = await https.api.registered()
    async with https.device(device["api_key"]) as client:
        polling = asyncio.create_task(client.get(f"{BASE}/devices/{device['device_id']}/commands/next?wait=60"))
        await until(lambda: waiting(https) == 1)
        async with https.operator() as operator:
            path = f"{BASE}/devices/{device['device_id']}/credentials/{device['credential_id']}"
            receipt = (await operator.delete(path)).json()
        assert len(receipt["sessions"]) == 1
        assert receipt["remaining"] == 0
        with pytest.raises(httpx.RemoteProtocolError):
            await asyncio.wait_for(polling, 5)
        await until(lambda: waiting(https) == 0)
    made = await queued(https, device["device_id"])
    assert made["status"] == "queued"
    assert https.server.counters.app_failures == 0


async def test_a_client_that_leaves_ends_its_wait_and_takes_no_command_with_it(https: Https) -> None:
    device = await https.api.registered()
    path = f"{BASE}/devices/{device['device_id']}/commands/next?wait=60"
    leaver = https.device(device["api_key"])
    polling = asyncio.create_task(leaver.get(path))
    await until(lambda: waiting(https) == 1)
    polling.cancel()
    await asyncio.gather(polling, return_exceptions=True)
    await leaver.aclose()
    await until(lambda: waiting(https) == 0)
    await until(lambda: https.server.in_flight == 0)
    made = await queued(https, device["device_id"])
    async with https.device(device["api_key"]) as client:
        assert (await client.get(path)).json()["command_id"] == made["command_id"]


async def test_draining_ends_waits_at_once(dsn: str) -> None:
    async with running_api(dsn) as api, serving(api) as https:
        device = await api.registered()
        async with https.device(device["api_key"]) as client:
            polling = asyncio.create_task(client.get(f"{BASE}/devices/{device['device_id']}/commands/next?wait=60"))
            await until(lambda: waiting(https) == 1)
            api.registry.commands.drain()
            draining = asyncio.create_task(https.server.drain(30.0))
            ended = await asyncio.wait_for(polling, 5)
            assert (ended.status_code, ended.headers["connection"]) == (204, "close")
            await asyncio.wait_for(draining, 5)


async def test_many_waits_leave_room_for_others(dsn: str) -> None:
    async with running_api(dsn, HttpApiSettings()) as api, serving(api) as https:
        devices = [await api.registered(f"HW-{n}") for n in range(8)]
        clients = [https.device(device["api_key"]) for device in devices]
        polls = [
            asyncio.create_task(client.get(f"{BASE}/devices/{device['device_id']}/commands/next?wait=60"))
            for client, device in zip(clients, devices, strict=True)
        ]
        await until(lambda: waiting(https) == 8)
        await until(lambda: https.server.in_flight == 0)
        made = [await queued(https, device["device_id"]) for device in devices]
        answers = await asyncio.wait_for(asyncio.gather(*polls), 10)
        assert [a.json()["command_id"] for a in answers] == [m["command_id"] for m in made]
        for client in clients:
            await client.aclose()


# -- configurations ----------------------------------------------------------------------------------------------------


async def test_a_configuration_is_put_fetched_and_reported(https: Https) -> None:
    device = await https.api.registered(config={"interval_s": 60})
    path = f"{BASE}/devices/{device['device_id']}/config"
    async with https.operator() as operator, https.device(device["api_key"]) as client:
        first = await operator.get(path)
        assert first.json() == {"version": 1, "config": {"interval_s": 60}, "reported": None}
        assert first.headers["etag"] == '"1"'
        changed = await operator.put(path, json={"config": {"interval_s": 5}}, headers={"if-match": '"1"'})
        assert changed.json() == {"version": 2, "config": {"interval_s": 5}, "reported": None}
        assert changed.headers["etag"] == '"2"'
        fetched = await client.get(path)
        assert fetched.json() == {"version": 2, "config": {"interval_s": 5}}
        said = await client.post(f"{path}/reported", json={"version": 2, "config": {"interval_s": 5}})
        assert (said.status_code, said.json()) == (200, {"version": 2})
        told = await client.post(
            f"{path}/reported", content=cbor2.dumps({"version": 1}), headers={"content-type": "application/cbor"}
        )
        assert told.status_code == 200
        reported = (await operator.get(path)).json()["reported"]
        assert (reported["version"], reported["config"]) == (1, None)
        assert (await operator.get(f"{BASE}/devices/{device['device_id']}")).json()["config"] == {"interval_s": 5}
        kinds = [e["kind"] for e in (await operator.get(f"{BASE}/events")).json()["events"]]
        assert [k for k in kinds if k.startswith("config.")] == ["config.changed", *["config.reported"] * 2]


async def test_putting_compares_the_version_that_was_seen(https: Https) -> None:
    device = await https.api.registered()
    path = f"{BASE}/devices/{device['device_id']}/config"
    async with https.operator() as operator:

        async def put(match: str | None = None, **more: Any) -> httpx.Response:
            headers = {} if match is None else {"if-match": match}
            return await operator.put(path, json={"config": {"n": str(uuid4())}} | more, headers=headers)

        assert (await put()).json()["version"] == 2
        assert (await put("*")).json()["version"] == 3
        assert (await put(version=3)).json()["version"] == 4
        assert (await put('"4"', version=4)).json()["version"] == 5
        assert code(await put(version=4)) == (400, "FAILED_PRECONDITION")
        for match in ('"4"', '"6"', '"9999999999"'):
            assert code(await put(match)) == (412, "FAILED_PRECONDITION"), match
        for match in ("5", 'W/"5"', '"5", "6"', '"x"', ""):
            assert code(await put(match)) == (400, "INVALID_ARGUMENT"), match
        assert code(await put('"5"', version=4)) == (400, "INVALID_ARGUMENT")
        assert (await operator.get(path)).json()["version"] == 5


async def test_devices_reach_their_own_configuration_only(https: Https) -> None:
    device, other = await https.api.registered("HW-1"), await https.api.registered("HW-2")
    path = f"{BASE}/devices/{device['device_id']}/config"
    async with https.device(other["api_key"]) as stranger, https.device(device["api_key"]) as client:
        assert code(await stranger.get(path)) == (404, "NOT_FOUND")
        assert code(await stranger.post(f"{path}/reported", json={"version": 1})) == (404, "NOT_FOUND")
        assert code(await client.put(path, json={"config": {}})) == (403, "PERMISSION_DENIED")
        for body in ({}, {"version": 0}, {"version": 2}, {"version": "1"}, {"version": 1, "config": []}):
            assert code(await client.post(f"{path}/reported", json=body)) == (400, "INVALID_ARGUMENT"), body
    async with https.api.client() as nobody:
        assert code(await nobody.get(path)) == (401, "UNAUTHENTICATED")


# -- children ----------------------------------------------------------------------------------------------------------


async def test_a_gateway_attaches_a_child_and_speaks_for_it(https: Https) -> None:
    gateway, other = await https.api.registered("GW-1"), await https.api.registered("GW-2")
    async with https.device(gateway["api_key"]) as client, https.device(other["api_key"]) as stranger:
        made = await client.post(f"{BASE}/devices/me/children", json={"hardware_id": "S-1", "name": "Freezer"})
        assert (made.status_code, made.json()["created"]) == (201, True)
        child = made.json()["device_id"]
        again = await client.post(f"{BASE}/devices/me/children", json={"hardware_id": "S-1"})
        assert (again.status_code, again.json()) == (200, {"device_id": child, "created": False})
        taken = await stranger.post(f"{BASE}/devices/me/children", json={"hardware_id": "S-1"})
        assert code(taken) == (403, "PERMISSION_DENIED")
        refused = await client.post(f"{BASE}/devices/me/children", json={"hardware_id": "S 1"})
        assert code(refused) == (400, "INVALID_ARGUMENT")
        path = f"{BASE}/devices/{child}"
        uplink = await client.post(f"{path}/uplink", json={"kind": "telemetry", "payload": {"t": 1}})
        assert uplink.status_code == 202
        polling = asyncio.create_task(client.get(f"{path}/commands/next?wait=30"))
        await until(lambda: waiting(https) == 1)
        command = await queued(https, child)
        assert (await asyncio.wait_for(polling, 5)).json()["command_id"] == command["command_id"]
        answered = await client.post(f"{path}/commands/{command['command_id']}/response", json={"result": 1})
        assert answered.json()["status"] == "succeeded"
        assert (await client.get(f"{path}/config")).json() == {"version": 1, "config": {}}
        assert (await client.post(f"{path}/config/reported", json={"version": 1})).status_code == 200
        for method, what, body in (
            ("POST", "uplink", {"kind": "event", "payload": 1}),
            ("GET", "commands/next", None),
            ("GET", "config", None),
            ("POST", "config/reported", {"version": 1}),
        ):
            assert code(await stranger.request(method, f"{path}/{what}", json=body)) == (404, "NOT_FOUND"), what
    async with https.operator() as operator:
        shown = (await operator.get(f"{path}/commands/{command['command_id']}")).json()
        assert shown["answered_by"] == gateway["device_id"]
        record = (await operator.get(path)).json()
        assert (record["gateway_id"], record["status"]) == (gateway["device_id"], "registered")


async def test_a_gateway_that_loses_a_child_loses_its_voice_at_once(https: Https) -> None:
    gateway = await https.api.registered("GW-1")
    async with https.device(gateway["api_key"]) as client, https.operator() as operator:
        child = (await client.post(f"{BASE}/devices/me/children", json={"hardware_id": "S-1"})).json()["device_id"]
        path = f"{BASE}/devices/{child}"
        body = {"kind": "event", "payload": 1}
        assert (await client.post(f"{path}/uplink", json=body)).status_code == 202
        await operator.put(path, json={"gateway_id": None})
        async with asyncio.timeout(10):  # an event's time, on a busy machine
            while (await client.post(f"{path}/uplink", json=body)).status_code != 404:
                pass


async def test_an_api_without_connections_serves_polls_too(dsn: str) -> None:
    async with running_api(dsn) as api:
        await served_by_asgi(api)


async def served_by_asgi(api: Api) -> None:
    device = await api.registered()
    async with api.operator() as operator, api.device(device["api_key"]) as client:
        path = f"{BASE}/devices/{device['device_id']}/commands"
        assert (await client.get(f"{path}/next")).status_code == 204
        made = (await operator.post(path, json={"method": "a"})).json()
        assert (await client.get(f"{path}/next?wait=5")).json()["command_id"] == made["command_id"]
