"""What one caller may use up over HTTP, and that it is nobody else's loss."""

from __future__ import annotations

import pytest

from adapters.http.allowances import Allowances
from adapters.http.app import HttpApiSettings
from registry.errors import ResourceExhausted
from registry.rate_limits import RateLimiter
from tests.http_api import BASE, Api, Https, api, https, running_api, serving  # noqa: F401  # fixtures
from tests.integration.test_http_server import Client, get
from tests.tls_peers import client_context, connect


async def raw(site: Https) -> Client:
    """A connection to write bytes to."""
    return Client(*await connect(site.port, client_context(site.holder)))


@pytest.mark.parametrize("path", [f"{BASE}/provision", f"{BASE}/provision/", f"{BASE}//provision"])
@pytest.mark.parametrize("framing", ["Content-Length: 40000", "Transfer-Encoding: chunked"])
async def test_a_large_body_is_not_read_before_anybody_is_recognised(api: Api, path: str, framing: str) -> None:  # noqa: F811
    async with serving(api) as site:
        client = await raw(site)
        client.send(get(path, framing, "Content-Type: application/json", method="POST"))
        if "chunked" in framing:
            client.send(b"9c40\r\n", b" " * 39_000)
        response = await client.response()
        assert response.status in (404, 413)
        assert response.status == 413 or "//" in path
        client.writer.transport.abort()


async def test_an_operator_may_send_more_than_a_stranger(api: Api) -> None:  # noqa: F811
    async with api.operator() as admin:
        answer = await admin.post(
            f"{BASE}/devices", json={"name": "n", "hardware_id": "h", "tags": {"a": "x" * 40_000}}
        )
        assert answer.status_code == 400  # it was read, and judged
    async with api.client() as nobody:
        answer = await nobody.post(f"{BASE}/provision", content=b" " * 40_000)
        assert answer.status_code == 413
    assert api.http.service.allowances.counters.body == 1


async def test_who_is_recognised_is_kept_idle_longer(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    async with https.device(device["api_key"]) as known, https.operator() as admin, https.client() as nobody:
        assert (await known.post(f"{BASE}/telemetry", json={"a": 1})).status_code == 202
        assert (await admin.get(f"{BASE}/devices")).status_code == 200
        assert (await nobody.get(f"{BASE}/devices")).status_code == 401
        assert (await nobody.get(f"{BASE}/ca/chain")).status_code == 200
        assert sorted(each.recognised for each in https.server.connections) == [False, True, True]


async def test_a_flood_of_devices_does_not_keep_their_operator_out(dsn: str) -> None:
    settings = HttpApiSettings(tenant_requests_per_second=0.001, tenant_requests_burst=5)
    async with running_api(dsn, settings) as api, serving(api) as site:  # noqa: F811
        device = await api.registered()
        async with site.device(device["api_key"]) as caller, site.operator() as admin:
            answers = [(await caller.post(f"{BASE}/telemetry", json={"a": 1})).status_code for _ in range(8)]
            assert answers == [202] * 5 + [429] * 3
            assert (await admin.delete(f"{BASE}/devices/{device['device_id']}")).status_code == 200


def test_a_refusal_by_the_tenants_limit_takes_nothing_from_the_credential() -> None:
    clock = 100.0
    allowances = Allowances(
        tenant=RateLimiter(1, 1),
        credential=RateLimiter(0.001, 3),
        operator_tenant=RateLimiter(1, 1),
        operator=RateLimiter(0.001, 3),
        provisioning=RateLimiter(1, 1),
        address=RateLimiter(1, 1),
        failures=RateLimiter(1, 1),
        look_ups=RateLimiter(1, 1),
    )
    for spend in (allowances.spend, allowances.spend_operator):
        spend("tenant", "holder", clock)
        for _ in range(5):
            with pytest.raises(ResourceExhausted, match="tenant"):
                spend("tenant", "holder", clock)
        spend("tenant", "holder", clock + 1)
        spend("tenant", "holder", clock + 2)
        with pytest.raises(ResourceExhausted, match=r"this (credential|operator)"):
            spend("tenant", "holder", clock + 3)


async def test_a_credential_of_the_wrong_kind_is_limited_too(dsn: str) -> None:
    settings = HttpApiSettings(key_requests_per_second=0.001, key_requests_burst=3)
    async with running_api(dsn, settings) as api, serving(api) as site:  # noqa: F811
        device = await api.registered()
        async with site.device(device["api_key"]) as caller:
            answers = [(await caller.get(f"{BASE}/devices")).status_code for _ in range(5)]
            assert answers == [403, 403, 403, 429, 429]
        async with site.operator(subject="eve") as eve:
            answers = [(await eve.post(f"{BASE}/telemetry", json={"a": 1})).status_code for _ in range(5)]
            assert answers == [403, 403, 403, 429, 429]


@pytest.mark.parametrize("hot", [True, False])
async def test_who_failed_too_often_costs_no_look_up_and_nobody_else_their_access(dsn: str, hot: bool) -> None:
    settings = HttpApiSettings(failed_authentications_per_second=0.01, failed_authentications_burst=2)
    async with running_api(dsn, settings) as api, serving(api, hot=hot) as site:  # noqa: F811
        device, unseen = await api.registered("HW-1"), await api.registered("HW-2")
        resolver = api.registry.resolver
        async with site.device(device["api_key"]) as first:  # its first use is recorded, and it is looked up again
            assert (await first.post(f"{BASE}/telemetry", json={"a": 0})).status_code == 202
        async with site.device(device["api_key"]) as known:
            assert (await known.post(f"{BASE}/telemetry", json={"a": 1})).status_code == 202
            async with site.client() as wrong:
                answers = []
                for number in range(8):
                    key = {"x-api-key": f"sk_live_{number:043d}"}
                    answers.append((await wrong.post(f"{BASE}/telemetry", json={"a": 1}, headers=key)).status_code)
            assert answers == [401, 401, *[429] * 6]
            assert resolver.counters.refused == {"unknown api_key": 3}  # the third by the trickle
            assert (await known.post(f"{BASE}/telemetry", json={"a": 2})).status_code == 202
        async with site.device(device["api_key"]) as again, site.device(unseen["api_key"]) as new:
            assert (await again.post(f"{BASE}/telemetry", json={"a": 3})).status_code == 202  # remembered
            refused = await new.post(f"{BASE}/telemetry", json={"a": 3})
            assert (refused.status_code, int(refused.headers["retry-after"]) <= 10) == (429, True)
        async with site.operator() as admin:
            assert (await admin.delete(f"{BASE}/devices/{device['device_id']}")).status_code == 200
