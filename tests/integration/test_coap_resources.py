"""The resources of CoAP: what is stored, what is answered, and what each refusal looks like."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import cbor2
import pytest
from aiocoap import Message
from aiocoap.numbers.codes import Code
from aiocoap.numbers.types import Type

from adapters.coap.limits import CoapLimits
from adapters.coap.server_limits import ServerLimits
from registry.errors import Unavailable
from registry.model import DeviceId
from registry.payloads import NewUplink
from registry.uplinks import StoredUplink
from tests.coap_server import CBOR, JSON, CoapClient, Running, serving_coap
from tests.http_api import Api, api  # noqa: F401
from tests.nodes import until


@pytest.fixture
async def coap(api: Api) -> AsyncIterator[Running]:  # noqa: F811
    async with serving_coap(api) as running:
        yield running


async def test_every_kind_of_uplink_in_both_formats(coap: Running) -> None:
    device = await coap.device()
    sent = {
        "telemetry": {"main.t": 1},
        "events": {"door": "open"},
        "health": {"uptime_s": 7},
        "components": [{"name": "main", "sensors": [{"name": "t", "type": "DOUBLE"}]}],
        "uplink": {"kind": "note", "payload": {"n": 1}, "message_id": "m-1"},
    }
    async with coap.client(device) as client:
        for path, value in sent.items():
            for content_format in (JSON, CBOR):
                assert (await client.post(path, value, content_format)).code is Code.CHANGED
        self_described = cbor2.dumps(cbor2.CBORTag(55799, {"main.t": 2}))
        assert (await client.post("telemetry", self_described, None)).code is Code.CHANGED
        assert (await client.post("telemetry", b'{"main.t": 3}', None)).code is Code.CHANGED
    stored = await coap.uplinks(device.device_id)
    kinds = sorted(u["kind"] for u in stored)
    assert kinds == sorted(["telemetry"] * 4 + ["event"] * 2 + ["health"] * 2 + ["components"] * 2 + ["note"])
    assert {u["transport"] for u in stored} == {"coap"}
    assert (coap.server.counters.stored, coap.server.counters.duplicate) == (11, 1), "a message id is stored once"


async def test_a_message_id_is_stored_once_over_associations_and_a_repeated_message_too(coap: Running) -> None:
    device = await coap.device()
    for _ in range(2):
        async with coap.client(device) as client:
            answer = await client.post("/telemetry", {"main.t": 1}, query=["message_id=boot-7"])
            assert answer.code is Code.CHANGED
    async with coap.client(device) as client:
        asked = client.message(Code.POST, "/telemetry", b'{"main.t": 2}', content_format=JSON)
        heard = client.socket.client.plain
        before = len(heard)
        for number in range(1, 4):
            client.send(asked)
            await client.socket.until(lambda number=number: len(heard) >= before + number)
        answers = {Message.decode(each).code for each in heard[before:]}
        assert answers == {Code.CHANGED}
    assert [u["payload"] for u in await coap.uplinks(device.device_id)] == [{"main.t": 2}, {"main.t": 1}]


async def test_refusals_say_what_and_store_nothing(coap: Running) -> None:
    device = await coap.device()
    async with coap.client(device) as client:

        async def refused(path: str, payload: bytes = b"{}", code: Code = Code.POST, **options: Any) -> Code:
            answer = await client.ask(code, path, payload, **options)
            assert answer.content_format is None, "a diagnostic payload (RFC 7252 §5.5.2)"
            assert 0 < len(answer.payload) <= 512
            assert answer.payload.decode()
            return answer.code

        assert await refused("/telemetry", b"{") is Code.BAD_REQUEST
        assert await refused("/telemetry", b"\xa1") is Code.BAD_REQUEST
        assert await refused("/telemetry", b'{"a": [[]]}') is Code.BAD_REQUEST
        assert await refused("/uplink", b'{"kind": "K!", "payload": 1}') is Code.BAD_REQUEST
        for number in (float("nan"), float("inf")):
            assert await refused("/telemetry", cbor2.dumps({"t": number, "u": 1})) is Code.BAD_REQUEST
            envelope = cbor2.dumps({"kind": "telemetry", "payload": {"t": number, "u": 1}})
            assert await refused("/uplink", envelope) is Code.BAD_REQUEST
        assert await refused("/telemetry", b"{}", query=["message_id=" + "x" * 129]) is Code.BAD_REQUEST
        assert await refused("/telemetry", content_format=0) is Code.UNSUPPORTED_CONTENT_FORMAT
        assert await refused("/telemetry", content_format=110) is Code.UNSUPPORTED_CONTENT_FORMAT
        assert await refused("/telemetry", b"", Code.GET) is Code.METHOD_NOT_ALLOWED
        assert await refused("/nothing") is Code.NOT_FOUND
        assert await refused("/telemetry/more") is Code.NOT_FOUND
        assert await refused("/commands/no-uuid") is Code.NOT_FOUND
        assert await refused(f"/commands/{uuid4()}", b'{"result": 1}') is Code.NOT_FOUND
        assert await refused("/config", b"", Code.GET, accept=40) is Code.NOT_ACCEPTABLE
        assert await refused("/commands", b"", Code.GET, query=["after=1"]) is Code.BAD_REQUEST
        assert await refused("/provision", b"{}") is Code.FORBIDDEN
        assert await refused("/config/reported", b'{"version": 9}') is Code.BAD_REQUEST
        assert await refused("/.well-known/est/sren", b"0\x00") is Code.FORBIDDEN, "a PSK renews no certificate"
    assert await coap.uplinks(device.device_id) == []


NOT_TAKEN = [
    *((Code.POST, f"/{path}", "device_id") for path in ("telemetry", "events", "health", "components", "uplink")),
    (Code.POST, "/telemetry", "child"),
    (Code.POST, "/config/reported", "device_id"),
    (Code.POST, f"/commands/{UUID(int=0)}", "device_id"),
    (Code.POST, "/provision", "device_id"),
    (Code.GET, "/config", "device_id"),
    (Code.GET, "/commands", "device_id"),
    (Code.GET, "/time", "zone"),
    (Code.GET, "/.well-known/est/crts", "root"),
]


async def test_a_query_that_is_not_taken_is_refused_by_its_name(coap: Running) -> None:
    device = await coap.device()
    body = json.dumps({"version": 1, "kind": "note", "payload": 1}).encode()
    async with coap.client(device) as client:
        for code, path, name in NOT_TAKEN:
            for query in (f"{name}={device.device_id}", name):
                answer = await client.ask(code, path, b"" if code is Code.GET else body, query=[query])
                assert answer.code is Code.BAD_REQUEST, path
                assert f"the query '{name}' is not taken here".encode() in answer.payload
        both = await client.post("/telemetry", {"main.t": 1}, query=["message_id=a", "device_id=b"])
        assert both.code is Code.BAD_REQUEST
    assert await coap.uplinks(device.device_id) == []


async def test_the_queries_that_are_taken_are_taken_once(coap: Running) -> None:
    device = await coap.device()
    async with coap.client(device) as client:
        for queries, code in (
            (["message_id=a"], Code.CHANGED),
            (["message_id=b", ""], Code.CHANGED),
            ([""], Code.CHANGED),
            (["message_id=c", "message_id=d"], Code.BAD_REQUEST),
            (["message_id"], Code.BAD_REQUEST),
            (["\n=1"], Code.BAD_REQUEST),
        ):
            answer = await client.post("/telemetry", {"main.t": 1}, query=queries)
            assert answer.code is code, queries
            assert b"\n" not in answer.payload
        links = await client.get("/.well-known/core", query=["rt=ace.est.crts"])
        assert links.payload.startswith(b"</.well-known/est/crts>")
    assert len(await coap.uplinks(device.device_id)) == 3


async def test_limits_are_answered_and_counted(api: Api) -> None:  # noqa: F811
    limits = ServerLimits(payload_bytes=64, key_requests_per_second=0.001, key_requests_burst=3)
    async with serving_coap(api, limits) as coap:
        device = await coap.device()
        async with coap.client(device) as client:
            for content_format in (JSON, CBOR):
                answer = await client.post("/telemetry", {"t": "x" * 80}, content_format)
                assert (answer.code, answer.size1) == (Code.REQUEST_ENTITY_TOO_LARGE, 64), "RFC 7959 §2.9.3"
            assert (await client.get("/time")).code is Code.CONTENT
            answer = await client.get("/time")
            assert answer.code is Code.TOO_MANY_REQUESTS
            assert answer.max_age is not None
            assert answer.max_age > 100
        counters = coap.server.counters
        assert (counters.too_large, counters.rejected, counters.key_requests) == (2, 2, 1)


async def test_what_is_too_large_is_told_how_large_it_may_be(api: Api) -> None:  # noqa: F811
    async with serving_coap(api, ServerLimits(payload_bytes=64)) as coap:
        device = await coap.device()
        async with coap.client(device) as client:
            short_in_cbor = await client.post("/telemetry", cbor2.dumps({"t": b"\0" * 50}), CBOR)
            assert (short_in_cbor.code, short_in_cbor.size1) == (Code.REQUEST_ENTITY_TOO_LARGE, None), (
                "what it is in JSON exceeds the limit; the body that was sent did not"
            )
            report = await client.post("/config/reported", {"version": 1, "config": {"t": "x" * 80}})
            assert (report.code, report.size1) == (Code.REQUEST_ENTITY_TOO_LARGE, 64)
            upload = client.message(Code.POST, "/telemetry", b"{" * 64, block1=(0, True, 2), size1=70_000)
            heard = client.socket.client.plain
            before = len(heard)
            client.send(upload)
            await client.socket.until(lambda: len(heard) > before)
            answer = Message.decode(heard[-1])
            assert (answer.code, answer.opt.size1) == (Code.REQUEST_ENTITY_TOO_LARGE, 65_536)


async def test_nothing_is_acknowledged_before_its_commit(coap: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    device = await coap.device()
    committed: asyncio.Future[StoredUplink] = asyncio.get_running_loop().create_future()
    submit = coap.api.registry.uplinks.submit
    seen: list[NewUplink] = []

    def held(uplink: NewUplink) -> asyncio.Future[StoredUplink]:
        seen.append(uplink)
        return committed

    monkeypatch.setattr(coap.api.registry.uplinks, "submit", held)
    async with coap.client(device) as client:
        asking = asyncio.create_task(client.post("/telemetry", {"main.t": 1}))
        await until(lambda: seen)
        assert not asking.done()
        committed.set_result(await submit(seen[0]))
        assert (await asking).code is Code.CHANGED

        def full(uplink: NewUplink) -> asyncio.Future[StoredUplink]:
            raise Unavailable("uplinks is at its limit", retry_after=7.0)

        monkeypatch.setattr(coap.api.registry.uplinks, "submit", full)
        answer = await client.post("/telemetry", {"main.t": 2})
        assert (answer.code, answer.max_age) == (Code.SERVICE_UNAVAILABLE, 7)
    assert len(await coap.uplinks(device.device_id)) == 1


async def test_the_configuration_is_read_observed_and_reported(coap: Running) -> None:
    device = await coap.device(config={"interval_s": 10})
    desired = f"/devices/{device.device_id}/config"
    async with coap.client(device) as client:
        first = await client.observe("/config", accept=CBOR)
        assert (first.observe is not None, first.content_format) == (True, CBOR)
        assert first.value == {"version": 1, "config": {"interval_s": 10}}
        assert first.etag is not None
        valid = await client.get("/config", etags=[first.etag])
        assert (valid.code, valid.payload, valid.etag) == (Code.VALID, b"", first.etag)
        await coap.post(desired, {"config": {"interval_s": 20}}, "PUT")
        second = await client.notified()
        assert second.value == {"version": 2, "config": {"interval_s": 20}}
        assert (await client.get("/config", etags=[first.etag])).value == second.value
        for code in (Code.POST, Code.PUT):
            reported = await client.ask(code, "/config/reported", b'{"version": 2}', content_format=JSON)
            assert reported.code is Code.CHANGED
    assert (await coap.get(desired))["reported"]["version"] == 2


async def test_a_configuration_that_changes_while_it_is_fetched_is_never_mixed(coap: Running) -> None:
    old, new = {"text": "old " * 200}, {"text": "new " * 400}
    device = await coap.device(config=old)
    desired = f"/devices/{device.device_id}/config"

    async def block(client: CoapClient, number: int) -> Message:
        answer = await client._exchange(Code.GET, "/config", b"", block2=(number, False, 4))
        assert (answer.code, answer.opt.block2.block_number) == (Code.CONTENT, number)
        return answer

    async with coap.client(device) as client:
        first = await block(client, 0)
        assert first.opt.size2 > 800
        await coap.post(desired, {"config": new}, "PUT")
        blocks = [first] + [await block(client, number) for number in (1, 2, 3)]
        assert {each.opt.etag for each in blocks} == {b"\x01"}, "RFC 7959 §2.4: the same representation"
        assert json.loads(b"".join(each.payload for each in blocks)) == {"version": 1, "config": old}
        assert (await client.get("/config")).value == {"version": 2, "config": new}

        observed = await client.observe("/config", block2=(0, False, 4))
        assert observed.etag == b"\x02"
        halfway = [await block(client, number) for number in (0, 1)]
        await coap.post(desired, {"config": old}, "PUT")
        rest = [await block(client, number) for number in (2, 3, 4, 5, 6)]
        assert {each.opt.etag for each in halfway + rest} == {b"\x02"}
        whole = b"".join(each.payload for each in halfway + rest)
        assert json.loads(whole) == {"version": 2, "config": new}, "the news wait until it is whole"
        news = await client.notified()
        blocks = [await block(client, number) for number in (1, 2, 3)]
        assert json.loads(news.payload + b"".join(each.payload for each in blocks)) == {"version": 3, "config": old}


async def _queued(coap: Running, device_id: str, method: str) -> str:
    made = await coap.post(f"/devices/{device_id}/commands", {"method": method})
    return str(made["command_id"])


async def _status(coap: Running, device_id: str, command_id: str) -> str:
    return str((await coap.get(f"/devices/{device_id}/commands/{command_id}"))["status"])


async def test_commands_come_one_by_one_in_order_and_are_answered(coap: Running) -> None:
    device = await coap.device()
    waiting = [await _queued(coap, device.device_id, f"m{n}") for n in range(3)]
    async with coap.client(device) as client:
        first = await client.observe("/commands")
        got = [first.value]
        for _ in waiting[1:]:
            got.append((await client.notified()).value)
        assert [each["command_id"] for each in got] == waiting
        assert set(got[0]) == {"command_id", "method", "params", "expires_at"}
        late = await _queued(coap, device.device_id, "late")
        assert (await client.notified()).value["command_id"] == late
        await _until_status(coap, device.device_id, late, "delivered")

        assert (await client.post(f"/commands/{waiting[0]}", {"result": {"ok": True}})).code is Code.CHANGED
        bad = {"error": {"code": "E7", "message": "stuck"}}
        assert (await client.post(f"/commands/{waiting[1]}", bad, CBOR)).code is Code.CHANGED
        assert (await client.post(f"/commands/{waiting[1]}", {"result": 1})).code is Code.CHANGED, "the first stands"
        assert await _status(coap, device.device_id, waiting[0]) == "succeeded"
        assert await _status(coap, device.device_id, waiting[1]) == "failed"
        await coap.post(f"/devices/{device.device_id}/commands/{late}", method="DELETE")
        assert (await client.post(f"/commands/{late}", {"result": 1})).code is Code.BAD_REQUEST

        third = await client.get("/commands")
        assert third.value["command_id"] == waiting[2], "what is not answered comes again"
        behind = await client.get("/commands", query=[f"after={waiting[2]}"])
        assert (behind.code, behind.payload) == (Code.CONTENT, b"")


async def _until_status(coap: Running, device_id: str, command_id: str, status: str) -> None:
    async with asyncio.timeout(15):
        while await _status(coap, device_id, command_id) != status:
            await asyncio.sleep(0.02)


async def test_a_command_that_nobody_acknowledged_is_not_delivered_and_comes_again(coap: Running) -> None:
    device = await coap.device()
    async with coap.client(device) as client:
        assert (await client.observe("/commands")).payload == b""
        client.silent = True
        command = await _queued(coap, device.device_id, "reboot")
        assert (await client.notified()).value["command_id"] == command
        assert await _status(coap, device.device_id, command) == "queued"
    async with coap.client(device) as client:
        assert (await client.observe("/commands")).value["command_id"] == command
        assert await _status(coap, device.device_id, command) == "delivered"


async def test_the_first_command_is_repeated_and_the_second_waits_until_it_has_arrived(api: Api) -> None:  # noqa: F811
    """In an ACK it could be lost, and the second, which has the same token, be taken for the registration's answer."""
    async with serving_coap(api, coap_limits=CoapLimits(ack_timeout=0.3)) as coap:
        device = await coap.device()
        first, second = [await _queued(coap, device.device_id, f"m{n}") for n in range(2)]
        async with coap.client(device) as client:
            client.silent = True
            assert (await client.observe("/commands")).value["command_id"] == first
            await until(lambda: coap.server.coap_counters.retransmissions)
            assert (await client.notified()).value["command_id"] == first, "again"
            client.silent = False
            while (latest := (await client.notified()).value["command_id"]) == first:
                pass
            assert latest == second


async def test_an_observation_behind_a_command_begins_behind_it_though_there_is_none_yet(coap: Running) -> None:
    device = await coap.device()
    async with coap.client(device) as client:
        unanswered = await _queued(coap, device.device_id, "slow")
        assert (await client.observe("/commands", query=[f"after={unanswered}"])).payload == b""
        late = await _queued(coap, device.device_id, "late")
        assert (await client.notified()).value["command_id"] == late


async def test_large_commands_come_one_after_the_other_and_each_whole(coap: Running) -> None:
    """The next one waits until the blocks of the one before are fetched: they have no other name than the path."""
    device = await coap.device()
    texts = [letter * 3_000 for letter in "abc"]
    for text in texts:
        await coap.post(f"/devices/{device.device_id}/commands", {"method": "write", "params": {"text": text}})

    async with coap.client(device) as client:
        got: list[str] = []
        for number in range(len(texts)):
            part = await client.observe("/commands") if number == 0 else await client.notified()
            whole = part.payload
            assert len(whole) == 1024
            for block in (1, 2, 3):
                assert client.notifications.empty()
                answer = await client._exchange(Code.GET, "/commands", b"", block2=(block, False, 6))
                whole += answer.payload
                if not answer.opt.block2.more:
                    break
            got.append(json.loads(whole)["params"]["text"])
    assert got == texts


async def test_a_command_that_is_cancelled_before_its_turn_is_not_sent(api: Api) -> None:  # noqa: F811
    async with serving_coap(api, coap_limits=CoapLimits(ack_timeout=0.3)) as coap:
        device = await coap.device()
        async with coap.client(device) as client:
            assert (await client.observe("/commands")).payload == b""
            client.silent = True
            first, second, third, fourth = [await _queued(coap, device.device_id, f"m{n}") for n in range(4)]
            assert (await client.notified()).value["command_id"] == first
            [place] = coap.api.registry.commands._downlinks.of(DeviceId(UUID(device.device_id)))
            await until(lambda: len(place.unconfirmed) == 4)
            await coap.post(f"/devices/{device.device_id}/commands/{second}", method="DELETE")
            answered = await client.post(f"/commands/{third}", {"result": "found by a GET before"})
            assert answered.code is Code.CHANGED
            await until(lambda: len(place.unconfirmed) == 2)
            client.silent = False  # the first comes again and is acknowledged
            told = [(await client.notified()).value["command_id"]]
            while told[-1] == first:
                told.append((await client.notified()).value["command_id"])
            assert told[-1] == fourth


async def test_the_time_in_three_formats_and_the_links_of_each_role(coap: Running) -> None:
    device = await coap.device()
    _, claim = await coap.template()
    expected = {
        "device": {"/telemetry", "/events", "/health", "/components", "/uplink", "/config", "/config/reported",
                   "/commands", "/time", "/.well-known/est/crts", "/.well-known/est/att"},
        "claimant": {"/provision", "/time", "/.well-known/est/crts", "/.well-known/est/att"},
    }  # fmt: skip
    for who, role in ((device, "device"), (claim, "claimant"), (None, "claimant")):
        async with coap.client(who) as client:
            links = await client.get("/.well-known/core")
            assert links.content_format == 40
            named = {link.split(">")[0].lstrip("<") for link in links.payload.decode().split(",")}
            assert named == expected[role]
            json, cbor = await client.get("/time"), await client.get("/time", accept=CBOR)
            text = await client.get("/time", accept=0)
            assert {json.max_age, cbor.max_age, text.max_age} == {0}
            assert json.value.keys() == cbor.value.keys() == {"time", "unix", "unix_ms"}
            assert abs(cbor.value["unix_ms"] - json.value["unix_ms"]) < 60_000
            assert text.payload.endswith(b"Z")
            assert text.content_format == 0


async def test_an_unconfirmable_uplink_is_stored_and_answered_alike(coap: Running) -> None:
    device = await coap.device()
    async with coap.client(device) as client:
        await _non(client)
    assert len(await coap.uplinks(device.device_id)) == 1


async def _non(client: CoapClient) -> None:
    client.send(client.message(Code.POST, "/telemetry", b'{"main.t": 1}', Type.NON, content_format=JSON))
    await client.socket.until(lambda: client.socket.client.plain)
    answer = Message.decode(client.socket.client.plain[0])
    assert (answer.mtype, answer.code) == (Type.NON, Code.CHANGED)
