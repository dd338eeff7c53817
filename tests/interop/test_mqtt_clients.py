"""Four clients that we did not write live a device's life: mosquitto's programs, paho-mqtt, MQTT.js and amqtt.

Each provisions itself over the topic with a CSR, comes back with the certificate, publishes with QoS 0, 1 and 2,
receives a command and answers it, is revoked while it is connected, and cannot return. paho-mqtt and MQTT.js do it over
WebSocket, too. The server is a process of its own; the clients are, too, and say in JSON lines what they saw
(tests/interop/mqtt_clients).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.mqtt_server import OwnKey
from tests.processes import ServerProcess, server_process
from tests.whole_system import Tenant, new_tenant

CLIENTS = Path(__file__).parent / "mqtt_clients"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
NODE_MODULES = Path(os.environ.get("GATEHOUSE_TEST_NODE_MODULES") or _CACHE / "gatehouse-tests/node_modules")
"""Where tests/parts.sh puts MQTT.js."""
SECONDS = 30.0


@dataclass(frozen=True)
class Kind:
    """A client: how it is called, the version that it speaks, and what it can tell about an end."""

    name: str
    version: int
    websocket: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.version}{'-websocket' * self.websocket}"

    @property
    def ends(self) -> set[int]:
        """What it tells of a revocation: 0x98 in 5.0, a closed socket in 3.1.1, which paho calls 0x80."""
        return {0x98} if self.version == 5 else {0, 0x80}

    @property
    def refusals(self) -> set[int]:
        """What it may call CONNACK's refusal; paho gives MQTT 5's number for both."""
        return {0x87} if self.version == 5 else {5, 0x87}

    def command(self) -> list[str]:
        match self.name:
            case "paho":
                return [sys.executable, str(CLIENTS / "paho_client.py")]
            case "amqtt":
                return [sys.executable, str(CLIENTS / "amqtt_client.py")]
            case _:
                return ["node", str(CLIENTS / "mqtt_js_client.cjs")]

    def missing(self) -> str | None:
        match self.name:
            case "paho":
                return None if find_spec("paho") else "paho-mqtt is not installed"
            case "amqtt":
                return None if find_spec("amqtt") else "amqtt is not installed"
            case _:
                there = shutil.which("node") and (NODE_MODULES / "mqtt").is_dir()
                return None if there else "node or its module mqtt is missing"


KINDS = [
    Kind("paho", 4),
    Kind("paho", 5),
    Kind("paho", 5, websocket=True),
    Kind("amqtt", 4),
    Kind("mqtt-js", 4),
    Kind("mqtt-js", 5),
    Kind("mqtt-js", 4, websocket=True),
]


@pytest.fixture
async def server(dsn: str, tmp_path: Path) -> AsyncIterator[ServerProcess]:
    async with server_process(tmp_path / "D", {"GATEHOUSE_DATABASE__DSN": dsn}) as running:
        yield running


@pytest.fixture
async def tenant(server: ServerProcess) -> Tenant:
    return await new_tenant(server)


@dataclass
class Lines:
    """A client's process, line by line."""

    process: asyncio.subprocess.Process

    async def next(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(SECONDS):
            line = await self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise AssertionError((await self.process.stderr.read()).decode())
        told: dict[str, Any] = json.loads(line)
        return told


@asynccontextmanager
async def running(*command: str) -> AsyncIterator[Lines]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "NODE_PATH": str(NODE_MODULES), "PYTHONWARNINGS": "ignore"},
    )
    try:
        yield Lines(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def a_token(tenant: Tenant) -> str:
    async with tenant.operator() as operator:
        answer = await operator.post("/devices/registration/tokens", json={"name": "Pump"})
    token: str = answer.json()["token"]
    return token


async def command_to(tenant: Tenant, device_id: str, method: str = "reboot") -> str:
    async with tenant.operator() as operator:
        answer = await operator.post(f"/devices/{device_id}/commands", json={"method": method})
    assert answer.status_code == 201, answer.text
    command_id: str = answer.json()["command_id"]
    return command_id


async def result_of(tenant: Tenant, device_id: str, command_id: str) -> Any:
    async with tenant.operator() as operator:
        shown = (await operator.get(f"/devices/{device_id}/commands/{command_id}")).json()
    return shown["status"], shown["result"]


async def revoke(tenant: Tenant, device_id: str) -> dict[str, Any]:
    async with tenant.operator() as operator:
        listed = (await operator.get("/devices/certs", params={"device_id": device_id})).json()["certificates"]
        answer = await operator.delete(f"/devices/certs/{listed[0]['fingerprint']}")
    assert answer.status_code == 200, answer.text
    receipt: dict[str, Any] = answer.json()
    return receipt


async def stored(tenant: Tenant, device_id: str) -> list[Any]:
    async with tenant.operator() as operator:
        found = (await operator.get(f"/devices/{device_id}/uplinks")).json()["uplinks"]
    return sorted((u["payload"] for u in found), key=str)


@pytest.mark.parametrize("kind", KINDS, ids=str)
async def test_a_client_lives_a_devices_life(server: ServerProcess, tenant: Tenant, tmp_path: Path, kind: Kind) -> None:
    missing = kind.missing()
    if missing is not None:
        pytest.skip(missing)
    key = OwnKey.new()
    common = {"port": server.ports["mqtt"], "ca": str(server.ca_chain), "version": kind.version}
    if kind.websocket:
        common["ws"] = server.ports["https"]
    request = {"token": await a_token(tenant), "csr": key.csr()}
    asked = {**common, "step": "provision", "user": "provision", "request": request}
    async with running(*kind.command(), json.dumps(asked)) as client:
        answer = (await client.next())["answer"]
    assert answer["status"] == "ok", answer
    device_id = answer["device_id"]
    pem = key.with_certificate(tmp_path, answer["certificate"])

    async with running(*kind.command(), json.dumps({**common, "step": "live", "pem": str(pem)})) as client:
        assert await client.next() == {"ready": True}
        command_id = await command_to(tenant, device_id)
        assert (await client.next())["answered"] == "reboot"
        assert (await result_of(tenant, device_id, command_id))[0] == "succeeded"
        assert await stored(tenant, device_id) == [{"n": 0}, {"n": 1}, {"n": 2}]
        receipt = await revoke(tenant, device_id)
        assert [s["transport"] for s in receipt["sessions"]] == ["mqtt"]
        told = await client.next()
        while "error" in told:
            told = await client.next()
        assert told["closed"] in kind.ends
        assert (await client.next())["refused"] in kind.refusals


@pytest.mark.skipif(shutil.which("mosquitto_sub") is None, reason="needs mosquitto's clients")
@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
async def test_mosquittos_programs_live_a_devices_life(
    server: ServerProcess, tenant: Tenant, tmp_path: Path, version: str
) -> None:
    key = OwnKey.new()
    common = ["-h", "localhost", "-p", str(server.ports["mqtt"]), "--cafile", str(server.ca_chain), "-V", version]
    request = json.dumps({"token": await a_token(tenant), "csr": key.csr()})
    provision = [
        "mosquitto_rr", *common, "-u", "provision", "-t", "provision/request", "-e", "provision/response",
        "-q", "1", "-m", request, "-W", "20",
    ]  # fmt: skip
    async with running(*provision) as client:
        answer = await client.next()
    assert answer["status"] == "ok", answer
    device_id = answer["device_id"]
    pem = str(key.with_certificate(tmp_path, answer["certificate"]))
    own = [*common, "--cert", pem, "--key", pem]

    for qos in ("0", "1", "2"):
        published = ["mosquitto_pub", *own, "-t", "devices/me/telemetry", "-q", qos, "-m", json.dumps({"n": int(qos)})]
        async with running(*published) as client:
            assert await client.process.wait() == 0
    assert await stored(tenant, device_id) == [{"n": 0}, {"n": 1}, {"n": 2}]

    command_id = await command_to(tenant, device_id)
    async with running("mosquitto_sub", *own, "-t", "devices/me/commands", "-q", "1") as client:
        assert (await client.next())["command_id"] == command_id
        answered = [
            "mosquitto_pub", *own, "-t", f"devices/me/commands/{command_id}/response", "-q", "1",
            "-m", '{"result": "mosquitto"}',
        ]  # fmt: skip
        async with running(*answered) as answering:
            assert await answering.process.wait() == 0
        assert await result_of(tenant, device_id, command_id) == ("succeeded", "mosquitto")
        receipt = await revoke(tenant, device_id)
        assert [s["transport"] for s in receipt["sessions"]] == ["mqtt"]
        async with asyncio.timeout(SECONDS):  # it tries again by itself, and ends where it is refused
            await client.process.wait()

    async with running("mosquitto_pub", *own, "-t", "devices/me/telemetry", "-m", "{}", "-q", "1") as client:
        assert await client.process.wait() != 0
        assert client.process.stderr is not None
        said = (await client.process.stderr.read()).decode().lower()
        assert "not authori" in said, said
