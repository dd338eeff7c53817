"""A device's life over CoAP: provisioned, telling, observing, thrown out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiocoap.numbers.codes import Code

from tests.coap_server import CBOR, JSON, CoapDevice, Gone, Running, key_bytes, serving_coap
from tests.dtls_peers import udp_client
from tests.http_api import Api, api  # noqa: F401


@pytest.fixture
async def coap(api: Api) -> AsyncIterator[Running]:  # noqa: F811
    async with serving_coap(api) as running:
        yield running


async def test_a_device_provisions_itself_tells_observes_and_is_thrown_out(coap: Running) -> None:
    template, claim = await coap.template()
    async with coap.client(claim) as factory:
        asked = {"provision_key": template["provision_key"], "device_name": "Cellar", "hardware_id": "HW-7"}
        answer = await factory.post("/provision", asked, CBOR)
        assert (answer.code, answer.content_format) == (Code.CREATED, CBOR)
        made = answer.value
    device = CoapDevice(
        made["device_id"], made["credential_id"], made["psk"]["identity"], key_bytes(made["psk"]["key"])
    )

    async with coap.client(device) as client:
        assert (await client.post("/telemetry", {"main.t": 21.5}, CBOR)).code is Code.CHANGED
        assert (await client.post("/telemetry", {"main.t": 22.5})).code is Code.CHANGED
        assert [u["payload"] for u in await coap.uplinks(device.device_id)] == [{"main.t": 22.5}, {"main.t": 21.5}]
        assert (await coap.get(f"/devices/{device.device_id}"))["status"] == "active"

        first = await client.observe("/config", accept=JSON)
        assert first.observe is not None
        assert first.value == {"version": 1, "config": {}}
        await coap.post(f"/devices/{device.device_id}/config", {"config": {"interval_s": 60}}, "PUT")
        assert (await client.notified()).value == {"version": 2, "config": {"interval_s": 60}}

        path = f"/devices/{device.device_id}/credentials/{device.credential_id}"
        receipt = await coap.post(path, method="DELETE")
        assert [(s["transport"], receipt["remaining"]) for s in receipt["sessions"]] == [("coap", 0)]
        with pytest.raises(Gone):
            await client.notified()
    assert await coap.refuses(device)


async def test_a_drain_answers_what_is_under_way_and_takes_nothing_more(
    coap: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being stored gets its 2.04, what comes later 5.03, a newcomer nothing; then everybody a goodbye."""
    submit, gate = coap.api.registry.uplinks.submit, asyncio.Event()

    def held(uplink: Any) -> asyncio.Future[Any]:
        async def store() -> Any:
            await gate.wait()
            return await submit(uplink)

        return asyncio.ensure_future(store())

    monkeypatch.setattr(coap.api.registry.uplinks, "submit", held)
    device = await coap.device()
    async with coap.client(device) as early, coap.client(device) as late:
        await late.get("/time")
        under_way = asyncio.create_task(early.post("/telemetry", {"main.t": 21.5}))
        while not coap.server.coap_counters.serving:
            await asyncio.sleep(0.005)
        draining = asyncio.create_task(coap.server.drain(60.0))
        await asyncio.sleep(0)
        answer = await late.post("/telemetry", {"main.t": 22.5})
        assert (answer.code, answer.max_age) == (Code.SERVICE_UNAVAILABLE, 5)
        async with udp_client(coap.port, device.context()) as newcomer:
            newcomer.out(newcomer.client.step())
            with pytest.raises(TimeoutError):
                await newcomer.until(lambda: newcomer.heard, 0.2)
        assert not draining.done()
        gate.set()
        assert (await under_way).code is Code.CHANGED
        await draining
        for client in (early, late):
            with pytest.raises(Gone):
                await client.notified()
    assert [u["payload"] for u in await coap.uplinks(device.device_id)] == [{"main.t": 21.5}]
