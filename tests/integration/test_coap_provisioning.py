"""Provisioning over CoAP: with a claim PSK, with the server's certificate only, and what is refused alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiocoap.numbers.codes import Code

from adapters.coap.server_limits import ServerLimits
from tests.coap_server import CBOR, JSON, Answer, CoapClient, Gone, Running, claim_context, serving_coap
from tests.http_api import BASE, Api, api  # noqa: F401
from tests.mqtt_server import OwnKey
from tests.nodes import until


@pytest.fixture
async def coap(api: Api) -> AsyncIterator[Running]:  # noqa: F811
    async with serving_coap(api) as running:
        yield running


def claim(template: dict[str, Any], hardware_id: str = "HW-1", **more: Any) -> dict[str, Any]:
    return {"provision_key": template["provision_key"], "device_name": "d", "hardware_id": hardware_id} | more


async def test_a_claim_is_answered_in_the_format_that_was_asked_in_or_for(coap: Running) -> None:
    template, context = await coap.template()
    async with coap.client(context) as client:
        for number, (sent, accept, answered) in enumerate(
            ((JSON, None, JSON), (CBOR, None, CBOR), (CBOR, JSON, JSON), (JSON, CBOR, CBOR))
        ):
            answer = await client.post("/provision", claim(template, f"HW-{number}"), sent, accept=accept)
            assert (answer.code, answer.content_format) == (Code.CREATED, answered)
            assert {"device_id", "credential_type", "psk", "api_key"} <= answer.value.keys()
            again = await client.post("/provision", claim(template, f"HW-{number}"), sent)
            assert again.code is Code.CHANGED
            assert "psk" not in again.value


async def test_a_lost_answer_is_repeated_over_another_association(coap: Running) -> None:
    template, context = await coap.template(one_time=True)
    asked = claim(template, nonce="0123456789abcdef")
    answers: list[Answer] = []
    for _ in range(2):
        async with coap.client(context) as client:
            answers.append(await client.post("/provision", asked, CBOR))
    assert [answer.code for answer in answers] == [Code.CREATED, Code.CHANGED]
    assert answers[0].value["psk"] == answers[1].value["psk"]


async def test_refusals_of_a_claim_look_alike(coap: Running) -> None:
    template, context = await coap.template()
    other, _ = await coap.template(name="Line 2", hardware_id_pattern="ONLY-.*")

    async def told(client: CoapClient, body: dict[str, Any]) -> tuple[Code, bytes]:
        answer = await client.post("/provision", body, CBOR)
        return answer.code, answer.payload.split(b" (")[0]

    async with coap.client(context) as client:
        assert await told(client, claim(other)) == (Code.FORBIDDEN, b"provisioning refused"), "not the association's"
        assert await told(client, {"token": "rt_x", "csr": "x"}) == (Code.FORBIDDEN, b"provisioning refused")
        assert (await client.post("/provision", b"{")).code is Code.BAD_REQUEST
        large = await client.upload("/provision", b"{" * 33_000)
        assert (large.code, large.size1) == (Code.REQUEST_ENTITY_TOO_LARGE, 32_768)
        assert (await client.post("/telemetry", {"t": 1})).code is Code.UNAUTHORIZED
    async with coap.client() as client:
        refused = {
            await told(client, claim(other)),
            await told(client, claim(template | {"provision_key": "pk_nobodys"})),
            await told(client, {"token": "rt_nobodys", "csr": "x"}),
        }
        assert refused == {(Code.FORBIDDEN, b"provisioning refused")}
        assert (await client.post("/provision", claim(template), CBOR)).code is Code.CREATED


async def test_a_template_without_claims_left_still_answers_those_it_made(coap: Running) -> None:
    template, context = await coap.template(max_claims=1)
    for hardware_id, code in (("W-1", Code.CREATED), ("W-2", Code.FORBIDDEN), ("W-1", Code.CHANGED)):
        async with coap.client(context) as client:
            answer = await client.post("/provision", claim(template) | {"hardware_id": hardware_id}, CBOR)
        assert answer.code is code, hardware_id


async def test_a_token_and_a_request_bring_a_certificate_and_where_to_go(coap: Running) -> None:
    made = await coap.post("/devices/registration/tokens", {"name": "Valve"})
    async with coap.client() as client:
        answer = await client.post("/provision", {"token": made["token"], "csr": OwnKey.new().csr()})
    assert answer.code is Code.CREATED
    assert answer.value["coap"] == {"host": "localhost", "port": 5684}
    assert answer.value["certificate"].startswith("-----BEGIN CERTIFICATE")


async def test_an_unknown_template_and_a_wrong_key_fail_the_handshake_with_one_face(coap: Running) -> None:
    template, _ = await coap.template()
    disabled, gone = await coap.template()
    async with coap.api.operator() as operator:
        path = f"{BASE}/provisioning/templates/{disabled['template_id']}"
        assert (await operator.put(path, json={"status": "disabled"})).is_success
    faces = {
        await coap.refuses(claim_context(template["template_id"], "pk_wrong")),
        await coap.refuses(claim_context("nobody", "pk_wrong")),
        await coap.refuses(gone),
    }
    assert len(faces) == 1
    told: set[tuple[str, str]] = set()
    async with asyncio.timeout(20):
        while len(told) < 2:
            await coap.api.registry.refusals.flush_all()
            events = (await coap.get("/events?limit=500"))["events"]
            refused = [each["data"] for each in events if each["kind"] == "provisioning.refused"]
            told = {(each["template_id"], each["reason"]) for each in refused}
            await asyncio.sleep(0.01)
    assert told == {
        (template["template_id"], "claim psk does not verify"),
        (disabled["template_id"], "template disabled"),
    }, "the operator is told why"


async def test_who_belongs_to_nobody_has_little_room_little_time_and_few_tries(api: Api) -> None:  # noqa: F811
    limits = ServerLimits(provisioning_per_address=1, provisioning_seconds=1.5, provisioning_attempts=1)
    async with serving_coap(api, limits) as coap:
        async with coap.client() as first, coap.client() as second:
            assert (await first.get("/time")).code is Code.CONTENT
            turned_away = await second.get("/time")
            assert (turned_away.code, turned_away.max_age) == (Code.TOO_MANY_REQUESTS, 5)
            assert (await first.post("/provision", b"{")).code is Code.BAD_REQUEST
            assert (await first.post("/provision", b"{")).code is Code.TOO_MANY_REQUESTS
            await first.closed()
        async with coap.client() as third:
            assert (await third.get("/time")).code is Code.CONTENT, "now there is room"
        counters = coap.server.counters
        assert (counters.turned_away > 0, counters.provisioning_attempts) == (True, 1)
        await until(lambda: coap.server.admission.claimants == 0)


async def test_a_gone_association_answers_nothing(coap: Running) -> None:
    async with coap.client() as client:
        await client.get("/time")
        await coap.server.drain(0.1)
        with pytest.raises(Gone):
            await client.get("/time")
