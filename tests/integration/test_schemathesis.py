"""Schemathesis over every documented operation: no 5xx, no undocumented status, type or shape of an answer.

It talks to the real server over TLS, as a client with the published document would. The seed is fixed and the examples
are few, so that a test run stays short; more of them by hand: `SCHEMATHESIS_EXAMPLES=250 pytest …test_schemathesis.py`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from adapters.http.access import ACCESS, Public
from adapters.http.app import HttpApiSettings
from tests.http_api import BASE, Https, running_api, serving
from tests.tls_peers import eventually, make_certificate

EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "20")
SECONDS = 180 if EXAMPLES == "20" else 1200
"""About ten times what it takes: it ends what hangs, and decides nothing."""
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "missing_required_header",
)
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"COLUMNS": "160", "SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
DEVICES_OWN = sorted(each for each, access in ACCESS.items() if access is Public.DEVICE)
ENDLESS = ["StreamEvents"]
ENDING = (
    "DeleteDevice",
    "RevokeCredential",
    "DeleteProfile",
    "DeleteTemplate",
    "RotateCredential",
    "RevokeRegistrationToken",
    "RevokeDeviceCert",
)
"""Operations that end the object that they are given."""


@pytest.fixture
async def https(dsn: str) -> AsyncIterator[Https]:
    plenty = HttpApiSettings(provisioning_attempts_burst=100_000, open_requests_burst=100_000)
    async with running_api(dsn, plenty) as api, serving(api) as running:
        yield running


CONFIGURATION = """
[checks]
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 412, 413, 414, 415, 429, 431]

[generation]
with-security-parameters = false

[parameters]
{parameters}
"""
"""413, 414, 431: what violates the document by being too long may be refused below the application."""
ONCE = """
[[operations]]
include-operation-id = "{operation_id}"
[operations.parameters]
{parameters}
"""


async def objects(https: Https) -> dict[str, str]:
    """One of everything, by the names of the path's parameters."""
    device = await https.api.registered(f"HW-{uuid4().hex}")
    async with https.operator() as admin:
        profile = (await admin.post(f"{BASE}/profiles", json={"name": "P"})).json()
        template = (await admin.post(f"{BASE}/provisioning/templates", json={"name": "T"})).json()
        token = (await admin.post(f"{BASE}/devices/registration/tokens", json={"name": "R"})).json()
        holder = await https.api.registered(f"HW-{uuid4().hex}", credential_type="x509")
        pem = make_certificate(uuid4().hex).pem.decode()
        path = f"{BASE}/devices/{holder['device_id']}/certs"
        certificate = (await admin.post(path, json={"certificate": pem})).json()
        command = (await admin.post(f"{BASE}/devices/{device['device_id']}/commands", json={"method": "a"})).json()
    return {
        "device_id": device["device_id"],
        "credential_id": device["credential_id"],
        "profile_id": profile["profile_id"],
        "template_id": template["template_id"],
        "token_id": token["token_id"],
        "fingerprint": certificate["fingerprint"],
        "command_id": command["command_id"],
    }


async def configured(https: Https, folder: Path) -> Path:
    """A configuration that names objects that exist, and others for the operations that end them."""
    text = CONFIGURATION.format(parameters=as_toml(await objects(https)))
    for operation_id in ENDING:
        text += ONCE.format(operation_id=operation_id, parameters=as_toml(await objects(https)))
    path = folder / "schemathesis.toml"
    path.write_text(text)
    return path


def as_toml(parameters: dict[str, str]) -> str:
    return "\n".join(f'"path.{name}" = "{value}"' for name, value in parameters.items())


async def explored(https: Https, configuration: Path, token: str, *selection: str) -> str:
    """Run the command; its report. Fails with the report when it finds anything."""
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "--config-file",
        str(configuration),
        "run",
        f"https://127.0.0.1:{https.port}{BASE}/openapi.json",
        "--tls-verify=false",
        "--header",
        f"Authorization: Bearer {token}",
        "--checks",
        ",".join(CHECKS),
        "--phases",
        "examples,coverage,fuzzing",
        "--max-examples",
        EXAMPLES,
        "--seed",
        "20260529",
        "--generation-database",
        "none",
        "--suppress-health-check",
        "all",
        "--no-color",
        *selection,
    ]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | ENVIRONMENT,
        cwd=configuration.parent,
    )
    try:
        async with asyncio.timeout(SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    report = "\n".join(line[:200] for line in output.decode(errors="replace").splitlines())
    assert process.returncode == 0, report[-20_000:]
    return report


@pytest.mark.timeout(SECONDS * 2 + 30)
async def test_operators_operations(https: Https, tmp_path: Path) -> None:
    excluded = [part for each in (*DEVICES_OWN, *ENDLESS) for part in ("--exclude-operation-id", each)]
    await explored(https, await configured(https, tmp_path), https.api.token(), *excluded)
    assert https.server.counters.app_failures == 0


@pytest.mark.timeout(SECONDS * 2 + 30)
async def test_devices_operations(https: Https, tmp_path: Path) -> None:
    device = await https.api.registered()
    async with https.operator() as admin:
        path = f"{BASE}/devices/{device['device_id']}/commands"
        command = (await admin.post(path, json={"method": "a"})).json()
    configuration = tmp_path / "schemathesis.toml"
    known = as_toml({"device_id": device["device_id"], "command_id": command["command_id"]})
    configuration.write_text(CONFIGURATION.format(parameters=known + '\n"query.wait" = 0'))
    included = [part for each in DEVICES_OWN for part in ("--include-operation-id", each)]
    await explored(https, configuration, device["api_key"], *included)
    assert https.server.counters.app_failures == 0
    await eventually(lambda: not https.server.connections)
