"""Six CoAP clients that we did not write live a device's life over DTLS: libcoap on OpenSSL and on GnuTLS, aiocoap on
tinydtls, node-coap-client on node-dtls-client, Mbed TLS and OpenSSL under exchanges of our own.

With a PSK: the claim PSK of a template opens the association on which the device is provisioned; with its own PSK it
sends telemetry in JSON and in CBOR, observes its configuration, sees it change, is revoked while it observes, hears
close_notify, and its next handshake ends in the alert that a wrong key gets (RFC 5246 §7.2.2, bad_record_mac). With a
certificate: the device makes its key, redeems a registration token on an association where only the server has shown
a certificate, and lives the same life; at the end its handshake succeeds, because a handshake proves possession only,
and then it gets 4.01 and close_notify. After either end nothing is stored and no session is left, and the operator is
told why.

The server is a process of its own, one for all; the clients are, too, and say in JSON lines what they saw
(tests/interop/coap_clients). Each has its limits. libcoap's programs take the key as an argument, which cannot hold a
zero byte, so for them devices are provisioned until one has a key without; they make one request a call, so that each
is a handshake. tinydtls is built for keys of 32 bytes by tests/parts.sh. Neither tinydtls's binding nor
node-dtls-client knows certificates.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cbor2
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from registry.secrets import Secret
from registry.templates import claim_psk
from tests.mqtt_server import OwnKey
from tests.postgres import PostgresServer
from tests.processes import ServerProcess, server_process
from tests.whole_system import Tenant, new_tenant, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLIENTS = Path(__file__).parent / "coap_clients"
ROOT = Path(__file__).parents[2]
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
NODE_MODULES = Path(os.environ.get("GATEHOUSE_TEST_NODE_MODULES") or _CACHE / "gatehouse-tests/node_modules")
"""Where tests/parts.sh puts node-coap-client."""
SECONDS = 60.0
CONFIG = {"interval_s": 60}
BAD_RECORD_MAC = 20
"""The alert of a key that is wrong, unknown or revoked."""


@dataclass(frozen=True)
class Own:
    """What a device holds."""

    device_id: str
    identity: str
    key: bytes

    def proof(self) -> dict[str, str]:
        """What a client is told of it."""
        return {"identity": self.identity, "key": self.key.hex()}


@dataclass(frozen=True)
class Kind:
    """A client that is a program of this tree on somebody's library."""

    name: str
    module: str
    """What has to be there."""
    refusal: str
    """How its library calls the alert bad_record_mac."""
    closed: str = "close_notify"
    """How it tells of the server's close_notify."""

    def command(self) -> list[str]:
        if self.name == "node-coap-client":
            return ["node", str(CLIENTS / "node_coap_client.cjs")]
        return [sys.executable, "-m", f"tests.interop.coap_clients.{self.name}_client"]

    def missing(self) -> str | None:
        if self.name == "node-coap-client":
            there = bool(shutil.which("node")) and (NODE_MODULES / self.module).is_dir()
        else:
            there = find_spec(self.module) is not None
        return None if there else f"{self.module} is not installed"


AIOCOAP = Kind("aiocoap", "DTLSSocket", f"FatalDTLSError({BAD_RECORD_MAC})")
NODE = Kind("node-coap-client", "node-coap-client", "auth failed", closed="close")
MBEDTLS = Kind("mbedtls", "mbedtls", "fatal alert message was received")
OPENSSL = Kind("openssl", "OpenSSL", "alert bad record mac")
LIBCOAP = {"coap-client-openssl": "alert read:fatal:bad record mac", "coap-client-gnutls": "Alert '20': Bad record MAC"}
"""The programs, and how they call that alert."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ServerProcess]:
    dsn = postgres_server.create_database()
    folder = tmp_path_factory.mktemp("coap-clients")
    async with server_process(folder / "D", {"GATEHOUSE_DATABASE__DSN": dsn}) as running:
        yield running
    postgres_server.drop_database(dsn)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tenant(server: ServerProcess) -> Tenant:
    return await new_tenant(server)


# -- what the operator does --------------------------------------------------------------------------------------------


async def claim_of(tenant: Tenant) -> tuple[str, Own]:
    """A template's provisioning key, and the PSK that devices derive from it. Its key has no zero byte."""
    while True:
        body = {"name": f"Line {os.urandom(4).hex()}", "credential_type": "psk"}
        made = await ask(tenant, "POST", "/provisioning/templates", body)
        key = claim_psk(Secret(made["provision_key"])).reveal()
        if 0 not in key:
            return made["provision_key"], Own("", f"claim-{made['template_id']}", key)


async def ask(tenant: Tenant, method: str, path: str, body: Any = None) -> dict[str, Any]:
    async with tenant.operator() as operator:
        answer = await operator.request(method, path, json=body)
    assert answer.status_code < 300, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def configure(tenant: Tenant, device_id: str) -> None:
    await ask(tenant, "PUT", f"/devices/{device_id}/config", {"config": CONFIG})


async def revoke(tenant: Tenant, device_id: str) -> None:
    """Revoke what the device came with: one session over CoAP ends."""
    found = (await ask(tenant, "GET", f"/devices/{device_id}/credentials"))["credentials"]
    (only,) = found
    receipt = await ask(tenant, "DELETE", f"/devices/{device_id}/credentials/{only['credential_id']}")
    assert [s["transport"] for s in receipt["sessions"]] == ["coap"]
    assert receipt["remaining"] == 0


async def stored(tenant: Tenant, device_id: str) -> list[Any]:
    found = (await ask(tenant, "GET", f"/devices/{device_id}/uplinks"))["uplinks"]
    return sorted((u["payload"] for u in found), key=str)


async def sessions(tenant: Tenant, device_id: str) -> int:
    found = (await ask(tenant, "GET", "/sessions"))["sessions"]
    return len([s for s in found if s["device_id"] == device_id])


async def is_out(tenant: Tenant, device_id: str) -> None:
    """After the end: the refusal is in the timeline with its reason, nothing came through, nobody is in."""

    async def refusals() -> list[str]:
        events = (await ask(tenant, "GET", f"/devices/{device_id}/timeline"))["events"]
        return [event["data"]["reason"] for event in events if event["kind"] == "auth.refused"]

    async def refused() -> bool:
        return bool(await refusals())

    await until(refused, seconds=SECONDS)
    assert set(await refusals()) == {"credential revoked"}
    assert await stored(tenant, device_id) == [{"n": 1}, {"n": 2}]
    assert await sessions(tenant, device_id) == 0


async def token_of(tenant: Tenant) -> str:
    token: str = (await ask(tenant, "POST", "/devices/registration/tokens", {"name": "Pump"}))["token"]
    return token


def holder(made: Mapping[str, Any]) -> Own:
    """What the answer of a provisioning gives a device."""
    key = made["psk"]["key"]
    return Own(made["device_id"], made["psk"]["identity"], base64.urlsafe_b64decode(key + "=" * (-len(key) % 4)))


def holding(folder: Path, key: OwnKey, made: Mapping[str, Any]) -> Path:
    """A file of the certificate that a device was given, its chain and the key."""
    return key.with_certificate(folder, made["certificate"] + made["ca_chain"])


# -- clients as processes ----------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A client's process, line by line."""

    process: asyncio.subprocess.Process

    async def next(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(await self.line())
        return told

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(SECONDS):
            line = await self.process.stdout.readline()
        if not line:
            raise AssertionError(f"it said no more, but: {await self.complaint()}")
        return line.decode()

    async def complaint(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode(errors="replace")


@asynccontextmanager
async def running(*command: str | bytes) -> AsyncIterator[Running]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "NODE_PATH": str(NODE_MODULES), "PYTHONWARNINGS": "ignore"},
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def live(tenant: Tenant, device_id: str, client: Running, kind: Kind) -> None:
    """What a client's "live" step tells up to the end of its association, and what the operator does meanwhile."""
    assert await client.next() == {"telemetry": ["2.04", "2.04"]}
    assert await stored(tenant, device_id) == [{"n": 1}, {"n": 2}]
    assert await client.next() == {"config": {"version": 1, "config": {}}, "code": "2.05"}
    await configure(tenant, device_id)
    assert await client.next() == {"config": {"version": 2, "config": CONFIG}, "code": "2.05"}
    await revoke(tenant, device_id)
    assert await client.next() == {"closed": kind.closed}
    if kind is OPENSSL:  # it lets a caller write after the other side has closed; nobody listens any more
        assert await client.next() == {"called_out": True}
    elif kind is MBEDTLS:
        assert await client.next() == {"called_out": False}


@pytest.mark.parametrize("kind", [AIOCOAP, NODE, MBEDTLS, OPENSSL], ids=lambda kind: kind.name)
async def test_a_client_lives_a_devices_life_with_a_psk(server: ServerProcess, tenant: Tenant, kind: Kind) -> None:
    missing = kind.missing()
    if missing is not None:
        pytest.skip(missing)

    def asked(step: str, own: Own, **more: Any) -> str:
        return json.dumps({"step": step, "port": server.ports["coap"], **own.proof(), **more})

    provision_key, claim = await claim_of(tenant)
    request = {"provision_key": provision_key, "device_name": "Pump", "hardware_id": f"HW-{kind.name}"}
    async with running(*kind.command(), asked("provision", claim, request=request)) as client:
        told = await client.next()
    assert told["code"] == "2.01", told
    own = holder(told["answer"])
    async with running(*kind.command(), asked("live", own)) as client:
        await live(tenant, own.device_id, client, kind)
        told = await client.next()
        assert kind.refusal in told["refused"]
    await is_out(tenant, own.device_id)


async def test_a_client_that_holds_16_bytes_at_most_lives_a_devices_life(server: ServerProcess, tenant: Tenant) -> None:
    """As tinydtls is published, and many an old stack: its devices have a profile that allows such keys."""
    missing = AIOCOAP.missing()
    if missing is not None:
        pytest.skip(missing)
    profile = await ask(tenant, "POST", "/profiles", {"name": "Old stack", "allow_short_psk": True})
    key = os.urandom(16)
    psk = {"identity": "old-stack-1", "key": base64.urlsafe_b64encode(key).decode().rstrip("=")}
    made = await tenant.registered("HW-old", credential_type="psk", profile_id=profile["profile_id"], psk=psk)
    own = Own(made["device_id"], psk["identity"], key)
    asked = {"step": "live", "port": server.ports["coap"], **own.proof()}
    async with running(*AIOCOAP.command(), json.dumps(asked)) as client:
        await live(tenant, own.device_id, client, AIOCOAP)
        assert AIOCOAP.refusal in (await client.next())["refused"]
    await is_out(tenant, own.device_id)


async def with_commands(tenant: Tenant, hardware_id: str) -> tuple[Own, list[str]]:
    """A device whose key has no zero byte, and the methods of the commands that wait for it."""
    own = Own("", "", b"\0")
    while 0 in own.key:
        hardware_id += "x"
        own = holder(await tenant.registered(hardware_id, credential_type="psk"))
    methods = [f"step-{number}" for number in range(4)]
    for method in methods:
        await ask(tenant, "POST", f"/devices/{own.device_id}/commands", {"method": method})
    return own, methods


@pytest.mark.parametrize("kind", [AIOCOAP, NODE, MBEDTLS, OPENSSL], ids=lambda kind: kind.name)
async def test_a_client_gets_the_commands_that_wait_for_it_in_order(
    server: ServerProcess, tenant: Tenant, kind: Kind
) -> None:
    """The first one is the registration's answer, a message of its own; each other follows when one is acknowledged."""
    missing = kind.missing()
    if missing is not None:
        pytest.skip(missing)
    own, methods = await with_commands(tenant, f"HW-commands-{kind.name}")
    asked = {"step": "commands", "port": server.ports["coap"], "count": len(methods), **own.proof()}
    async with running(*kind.command(), json.dumps(asked)) as client:
        assert [(await client.next())["command"]["method"] for _ in methods] == methods


@pytest.mark.parametrize("kind", [MBEDTLS, OPENSSL], ids=lambda kind: kind.name)
async def test_a_client_lives_a_devices_life_with_a_certificate(
    server: ServerProcess, tenant: Tenant, tmp_path: Path, kind: Kind
) -> None:
    missing = kind.missing()
    if missing is not None:
        pytest.skip(missing)

    def asked(step: str, **more: Any) -> str:
        return json.dumps({"step": step, "port": server.ports["coap"], "ca": str(server.ca_chain), **more})

    key = OwnKey.new()
    request = {"token": await token_of(tenant), "csr": key.csr()}
    async with running(*kind.command(), asked("provision", request=request)) as client:
        told = await client.next()
    assert told["code"] == "2.01", told
    device_id, pem = told["answer"]["device_id"], holding(tmp_path, key, told["answer"])
    async with running(*kind.command(), asked("live", pem=str(pem))) as client:
        await live(tenant, device_id, client, kind)
        assert await client.next() == {"answered": "4.01"}
        assert await client.next() == {"closed": kind.closed}
    await is_out(tenant, device_id)


# -- libcoap -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Libcoap:
    """One of libcoap's client programs, and who it is."""

    program: str
    port: int
    who: tuple[str | bytes, ...]
    """Its arguments for a PSK or a certificate."""

    def command(self, method: str, path: str, *more: str | bytes) -> Sequence[str | bytes]:
        uri = f"coaps://127.0.0.1:{self.port}/{path}"
        return (self.program, *self.who, "-w", "-B", "20", "-m", method, *more, uri)

    async def ask(self, method: str, path: str, *more: str | bytes) -> tuple[bytes, str]:
        """One request: what it prints, the payload or its log, and the code and text of an error's answer."""
        async with running(*self.command(method, path, *more)) as client, asyncio.timeout(SECONDS):
            out, err = await client.process.communicate()
        return out, err.decode(errors="replace")

    async def live(self, tenant: Tenant, device_id: str, folder: Path) -> None:
        """Up to the end of its association."""
        (folder / "telemetry.json").write_bytes(b'{"n": 1}')
        (folder / "telemetry.cbor").write_bytes(cbor2.dumps({"n": 2}))
        for form, name in (("50", "telemetry.json"), ("60", "telemetry.cbor")):
            assert await self.ask("post", "telemetry", "-t", form, "-f", str(folder / name)) == (b"", "")
        assert await stored(tenant, device_id) == [{"n": 1}, {"n": 2}]

        async def alone() -> bool:
            return await sessions(tenant, device_id) == 1

        async with running(*self.command("get", "config", "-s", "300", "-A", "50")) as client:
            assert await client.next() == {"version": 1, "config": {}}
            await configure(tenant, device_id)
            assert await client.next() == {"version": 2, "config": CONFIG}
            await until(alone, seconds=SECONDS)  # the associations of the calls before have ended
            await revoke(tenant, device_id)
            async with asyncio.timeout(SECONDS):  # it would have observed for 300 s; close_notify ends it
                assert await client.process.wait() == 0


@pytest.mark.parametrize("program", LIBCOAP)
async def test_libcoap_lives_a_devices_life_with_a_psk(
    server: ServerProcess, tenant: Tenant, tmp_path: Path, program: str
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing (tests/parts.sh)")

    def client(own: Own) -> Libcoap:
        return Libcoap(program, server.ports["coap"], ("-u", own.identity, "-k", own.key))

    provision_key, claim = await claim_of(tenant)
    own, number = Own("", "", b"\0"), 0
    while 0 in own.key:
        number += 1
        hardware_id = f"HW-{program}-{number}"
        request = {"provision_key": provision_key, "device_name": "Pump", "hardware_id": hardware_id}
        (tmp_path / "request").write_text(json.dumps(request))
        out, complaint = await client(claim).ask("post", "provision", "-t", "50", "-f", str(tmp_path / "request"))
        assert complaint == ""
        own = holder(json.loads(out))
    await client(own).live(tenant, own.device_id, tmp_path)
    out, _ = await client(own).ask("get", "time")
    assert LIBCOAP[program] in out.decode()
    await is_out(tenant, own.device_id)


@pytest.mark.parametrize("program", LIBCOAP)
async def test_libcoap_gets_the_commands_that_wait_for_it_in_order(
    server: ServerProcess, tenant: Tenant, program: str
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing (tests/parts.sh)")
    own, methods = await with_commands(tenant, f"HW-commands-{program}")
    libcoap = Libcoap(program, server.ports["coap"], ("-u", own.identity, "-k", own.key))
    async with running(*libcoap.command("get", "commands", "-s", "300", "-A", "50")) as client:
        assert [(await client.next())["method"] for _ in methods] == methods


@pytest.mark.parametrize("program", LIBCOAP)
async def test_libcoap_lives_a_devices_life_with_a_certificate(
    server: ServerProcess, tenant: Tenant, tmp_path: Path, program: str
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing (tests/parts.sh)")

    def client(*who: str) -> Libcoap:
        return Libcoap(program, server.ports["coap"], ("-C", str(server.ca_chain), *who))

    key = OwnKey.new()
    (tmp_path / "request").write_text(json.dumps({"token": await token_of(tenant), "csr": key.csr()}))
    out, complaint = await client().ask("post", "provision", "-t", "50", "-f", str(tmp_path / "request"))
    assert complaint == ""
    made = json.loads(out)
    pem = str(holding(tmp_path, key, made))
    await client("-c", pem, "-j", pem).live(tenant, made["device_id"], tmp_path)
    out, complaint = await client("-c", pem, "-j", pem).ask("get", "time")
    assert (out, complaint[:4]) == (b"", "4.01")
    await is_out(tenant, made["device_id"])


@pytest.mark.parametrize("program", LIBCOAP)
async def test_libcoap_renews_a_certificate_over_est(
    server: ServerProcess, tenant: Tenant, tmp_path: Path, program: str
) -> None:
    """RFC 9148 with a program that knows nothing of it: a CSR in, a certificate out, both in DER."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing (tests/parts.sh)")

    def client(pem: Path) -> Libcoap:
        who = ("-C", str(server.ca_chain), "-c", str(pem), "-j", str(pem))
        return Libcoap(program, server.ports["coap"], who)

    key = OwnKey.new()
    made = await ask(tenant, "POST", "/devices/provision", {"token": await token_of(tenant), "csr": key.csr()})
    old = client(holding(tmp_path, key, made))
    authority, complaint = await old.ask("get", ".well-known/est/crts", "-A", "287")
    assert complaint == ""
    assert der(authority).subject == der(authority).issuer

    new = OwnKey.new()
    (tmp_path / "csr").write_bytes(x509.load_pem_x509_csr(new.csr().encode()).public_bytes(Encoding.DER))
    request = ("-t", "286", "-A", "287", "-f", str(tmp_path / "csr"))
    successor, complaint = await old.ask("post", ".well-known/est/sen", *request)
    assert complaint == ""
    renewed = der(successor).public_bytes(Encoding.PEM).decode() + made["ca_chain"]
    told = await client(new.with_certificate(tmp_path, renewed)).ask("post", "telemetry", "-t", "50", "-e", '{"n": 1}')
    assert told == (b"", "")
    assert await stored(tenant, made["device_id"]) == [{"n": 1}]


def der(printed: bytes) -> x509.Certificate:
    """A certificate that the program has printed, which adds the ends of two lines."""
    return x509.load_der_x509_certificate(printed.removesuffix(b"\n").removesuffix(b"\n"))
