"""A device's life over CoAP: provisioned, telling, observing, thrown out."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiocoap.numbers.codes import Code

from tests.coap_server import CBOR, JSON, CoapDevice, Gone, Running, key_bytes, serving_coap
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
