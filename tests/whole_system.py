"""What the tests of whole processes share: an operator of a fresh tenant, clients with one connection, the ops pages.

The servers come from tests/processes.py. A client here keeps exactly one connection, so that a session, a keep-alive
connection and a client are the same thing. Nothing here sleeps; `until` polls a condition under a deadline.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import START_SECONDS, ServerProcess

FREE_PORTS = {f"GATEHOUSE_{name}__PORT": "0" for name in ("HTTPS", "MQTT", "COAP", "OPS")}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True)
class Tenant:
    """A tenant and a token of its administrator."""

    server: ServerProcess
    slug: str
    token: str

    def operator(self) -> httpx.AsyncClient:
        """An administrator's client."""
        return client(self.server, authorization=f"Bearer {self.token}")

    def device(self, api_key: str) -> httpx.AsyncClient:
        """A device's client."""
        return client(self.server, authorization=f"Bearer {api_key}")

    async def registered(self, hardware_id: str, **more: Any) -> dict[str, Any]:
        """A device: the answer of POST /devices."""
        async with self.operator() as operator:
            answer = await operator.post("/devices", json={"name": "A device", "hardware_id": hardware_id} | more)
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made


def client(server: ServerProcess, **headers: str) -> httpx.AsyncClient:
    """A client of the API with one keep-alive connection."""
    return httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{server.ports['https']}/api/v1",
        verify=server.tls(),
        headers=headers,
        limits=httpx.Limits(max_connections=1),
        timeout=30,
        trust_env=False,
    )


async def new_tenant(server: ServerProcess, slug: str = "acme") -> Tenant:
    """A tenant made by the command line, as an operator makes it."""
    await server.command("tenant", "create", slug.title(), "--slug", slug)
    token = await server.command("token", "mint", "--tenant", slug, "--role", "tenant_admin")
    return Tenant(server, slug, token.strip())


async def ops_page(server: ServerProcess, path: str) -> tuple[int, str]:
    """Status and body of a page of the ops port. Raises OSError when it does not answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.ports["ops"])
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()
    finally:
        writer.close()


async def readiness(server: ServerProcess) -> tuple[int, set[str]]:
    """The status of `/readyz`, and the names of the checks that are not well."""
    status, body = await ops_page(server, "/readyz")
    return status, {name for name, check in json.loads(body)["checks"].items() if not check["ok"]}


async def samples(server: ServerProcess) -> Samples:
    """Every sample of `/metrics`, by name and labels."""
    status, page = await ops_page(server, "/metrics")
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(read: Samples, name: str, **labels: str) -> float:
    """The sum of a sample over the labels that are not named. Raises KeyError where there is no such series."""
    wanted = set(labels.items())
    found = [v for (known, has), v in read.items() if known == name and wanted <= has]
    if not found:
        raise KeyError(f"{name} {labels}")
    return sum(found)


async def until(condition: Callable[[], Awaitable[bool]], *, seconds: float = 30.0, pause: float = 0.05) -> None:
    """Wait until the condition holds; TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(pause)


async def start_that_fails(
    data_dir: Path, environ: Mapping[str, str], *arguments: str, seconds: float = START_SECONDS
) -> tuple[int, str, str]:
    """`gatehouse serve` that is expected to end by itself: exit code, stdout, stderr."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GATEHOUSE_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge", "serve", "--data-dir", str(data_dir), *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**inherited, **FREE_PORTS, **environ},
    )  # fmt: skip
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
