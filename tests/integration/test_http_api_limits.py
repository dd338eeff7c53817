"""What one caller may use up over HTTP, and that it is nobody else's loss."""

from __future__ import annotations

import pytest

from tests.http_api import BASE, Api, Https, api, https, serving  # noqa: F401  # fixtures
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
