"""The commands over a real database, as an operator types them."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from edge.cli import run
from registry.credentials import Credentials
from registry.model import Actor, DeviceId, TenantId
from registry.operators import IssuerPublicKey, OperatorVerifier
from registry.storage.database import Database
from tests.conftest import MakeDevice

Gatehouse = Callable[..., Awaitable["Said"]]
EVIL = "\x1b[2J[red]evil[/red]\u202e"


class Said:
    """What a command said, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def gatehouse(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Gatehouse:
    """`await gatehouse("tenant", "list")`, on this test's database."""
    monkeypatch.setenv("GATEHOUSE_DATABASE__DSN", dsn)
    monkeypatch.setenv("GATEHOUSE_DATA_DIR", str(tmp_path / "data"))

    async def call(*words: str) -> Said:
        capsys.readouterr()
        code = await asyncio.to_thread(run, list(words))
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call


async def _issuer_keys(database: Database) -> dict[str, IssuerPublicKey]:
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT kid, public_key FROM issuer_key")
    return {row["kid"]: IssuerPublicKey(row["public_key"]) for row in rows}


async def test_a_tenant_is_made_and_listed_and_audited(gatehouse: Gatehouse, database: Database) -> None:
    made = await gatehouse("tenant", "create", "Kühl & Söhne")
    assert (made.code, made.err) == (0, "")
    assert made.json == {"tenant_id": made.json["tenant_id"], "slug": "kuhl-sohne"}

    taken = await gatehouse("tenant", "create", "Other", "--slug", "kuhl-sohne")
    assert (taken.code, taken.out) == (1, "")
    assert taken.err == 'gatehouse: a tenant with slug "kuhl-sohne" already exists\n'

    listed = await gatehouse("tenant", "list", "--json")
    assert [(t["slug"], t["name"]) for t in listed.json["tenants"]] == [("kuhl-sohne", "Kühl & Söhne")]
    async with database.connection() as connection:
        assert (await connection.fetchval("SELECT actor FROM audit")).startswith("operator:cli:")


async def test_a_minted_token_is_one_that_the_server_accepts(gatehouse: Gatehouse, database: Database) -> None:
    from edge.wiring import utc_now

    tenant_id = (await gatehouse("tenant", "create", "Acme")).json["tenant_id"]
    minted = await gatehouse(
        "token", "mint", "--tenant", "acme", "--role", "member",
        "--permission", "devices:read", "--permission", "sessions,events:read", "--ttl", "15m", "--subject", "Ada",
    )  # fmt: skip
    assert minted.code == 0
    assert minted.out.count("\n") == 1

    verifier = OperatorVerifier(await _issuer_keys(database))
    operator = verifier.verify(minted.out.strip(), utc_now())
    assert (operator.subject, operator.tenant_claim, operator.role.value) == ("Ada", tenant_id, "member")
    assert {each.value for each in operator.permissions} == {"devices:read", "sessions", "events:read"}
    assert 890 < (operator.expires_at - utc_now()).total_seconds() <= 900


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--role", "member", "--ttl", "7d"), "security.operator_token_max_seconds"),
        (("--role", "member", "--tenant", "nobody"), "'nobody'"),
    ],
)
async def test_a_token_that_cannot_be_minted_says_what_could_be(
    words: tuple[str, ...], named: str, gatehouse: Gatehouse
) -> None:
    await gatehouse("tenant", "create", "Acme")
    said = await gatehouse("token", "mint", "--tenant", "acme", *words)
    assert (said.code, said.out) == (1, "")
    assert named in said.err
    assert said.err.count("\n") == 1


async def test_devices_are_listed_over_all_tenants_or_one_and_filtered(
    gatehouse: Gatehouse, database: Database, make_device: MakeDevice
) -> None:
    tenants = []
    for name in ("One", "Two"):
        made = (await gatehouse("tenant", "create", name)).json
        tenants.append(TenantId(made["tenant_id"]))
    first, second = await make_device(tenants[0]), await make_device(tenants[1])
    await _rename(database, second, "Boiler")

    everything = await gatehouse("device", "list", "--json")
    assert _ids(everything) == {str(first), str(second)}
    assert _ids(await gatehouse("device", "list", "--json", "--tenant", "two")) == {str(second)}
    assert _ids(await gatehouse("device", "list", "--json", "--q", "boil")) == {str(second)}
    assert _ids(await gatehouse("device", "list", "--json", "--status", "offline")) == set()
    cut = (await gatehouse("device", "list", "--json", "--limit", "1")).json
    assert (len(cut["devices"]), cut["more"]) == (1, True)

    unknown = await gatehouse("device", "list", "--status", "asleep")
    assert (unknown.code, "pending, registered, active" in unknown.err) == (2, True)


async def test_a_devices_name_reaches_the_terminal_harmless(
    gatehouse: Gatehouse, database: Database, make_device: MakeDevice
) -> None:
    made = (await gatehouse("tenant", "create", "Acme")).json
    device_id = await make_device(TenantId(made["tenant_id"]))
    await _rename(database, device_id, EVIL)
    for words in (("device", "list"), ("device", "show", str(device_id)), ("device", "revoke", str(device_id))):
        said = await gatehouse(*words)
        assert said.code == 0, said.err
        assert "\\x1b[2J[red]evil[/red]\\u202e" in said.out
    as_json = await gatehouse("device", "show", str(device_id), "--json")
    assert as_json.out.isascii()
    assert as_json.json["name"] == EVIL


async def test_revoking_a_device_ends_its_living_credentials_once(gatehouse: Gatehouse, database: Database) -> None:
    device_id, credential_id = await _registered(gatehouse, database)

    shown = (await gatehouse("device", "show", device_id, "--json")).json
    assert [c["credential_id"] for c in shown["credentials"]] == [credential_id]
    assert "hash" not in json.dumps(shown)

    receipt = await gatehouse("device", "revoke", device_id, "--json")
    assert receipt.code == 0, receipt.err
    assert receipt.json == {
        "device_id": device_id,
        "credential_id": credential_id,
        "credential_ids": [credential_id],
        "revoked_at": receipt.json["revoked_at"],
        "sessions": [],
        "remaining": 0,
    }
    again = await gatehouse("device", "revoke", device_id)
    assert (again.code, again.out.startswith("nothing to revoke")) == (0, True)
    by_id = (await gatehouse("device", "revoke", device_id, "--credential", credential_id, "--json")).json
    assert by_id["revoked_at"] == receipt.json["revoked_at"]
    async with database.connection() as connection:
        actors = await connection.fetch("SELECT actor FROM event WHERE kind = 'credential.revoked'")
    assert [row["actor"].split(":")[:2] for row in actors] == [["operator", "cli"]]


async def test_revoking_a_device_ends_what_it_gets_meanwhile(
    gatehouse: Gatehouse, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that renews itself just then would be let in again with what the command has not seen."""
    device_id, credential_id = await _registered(gatehouse, database)
    revoke, renewed = Credentials.revoke, []

    async def renews(self: Credentials, tenant_id: TenantId, device: DeviceId, *rest: Any) -> Any:
        if not renewed:
            renewed.append(await self.issue_api_key(tenant_id, device, "", None, Actor("device:x", "c")))
        return await revoke(self, tenant_id, device, *rest)

    monkeypatch.setattr(Credentials, "revoke", renews)
    receipt = await gatehouse("device", "revoke", device_id, "--json")
    assert receipt.json["credential_ids"] == [credential_id, str(renewed[0].credential_id)]
    shown = (await gatehouse("device", "show", device_id, "--json")).json
    assert all(each["revoked_at"] for each in shown["credentials"])


@pytest.mark.parametrize("words", [("device", "show"), ("device", "revoke")])
async def test_an_unknown_device_is_one_line(words: tuple[str, ...], gatehouse: Gatehouse) -> None:
    await gatehouse("tenant", "create", "Acme")
    for name, code in ((str(uuid4()), 1), ("8f1c", 2), ("\x1b[31m", 2)):
        said = await gatehouse(*words, name)
        assert (said.code, said.out, said.err.count("\n")) == (code, "", 1)
        assert "\x1b" not in said.err


async def test_ca_show_can_be_saved_as_a_pem_file(gatehouse: Gatehouse, tmp_path: Path) -> None:
    import ssl

    said = await gatehouse("ca", "show")
    (tmp_path / "ca.pem").write_text(said.out)
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    assert len(context.get_ca_certs()) == 2
    as_json = (await gatehouse("ca", "show", "--json")).json
    assert as_json["ca_chain"].count("BEGIN CERTIFICATE") == 2
    assert "PRIVATE" not in said.out


async def test_migrate_says_what_it_did(gatehouse: Gatehouse, empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await gatehouse("migrate")).out == "the schema is up to date\n"
    monkeypatch.setenv("GATEHOUSE_DATABASE__DSN", empty_dsn)
    assert (await gatehouse("migrate", "--json")).json["applied"][0] == "0001_core.sql"
    assert (await gatehouse("migrate", "--json")).json == {"applied": []}


async def test_another_key_ring_is_refused(
    gatehouse: Gatehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await gatehouse("tenant", "create", "Acme")).code == 0
    monkeypatch.setenv("GATEHOUSE_SECURITY__KEY_RING", str(tmp_path / "other.json"))
    said = await gatehouse("token", "mint", "--tenant", "acme", "--role", "member")
    assert (said.code, said.out, said.err.count("\n")) == (1, "", 1)
    assert "every node of a database needs the same ring" in said.err


@pytest.mark.parametrize("dsn", ["postgres://nobody@127.0.0.1:1/gatehouse", "postgres:///x?host=/nowhere"])
async def test_a_database_that_is_not_there_is_one_line(dsn: str, gatehouse: Gatehouse) -> None:
    for words in (("tenant", "list"), ("migrate",), ("ca", "show")):
        said = await gatehouse(*words)
        assert (said.code, said.out, said.err.count("\n")) == (1, "", 1), said.err
        assert said.err.startswith("gatehouse: database")


async def test_a_reader_that_leaves_is_no_error_to_speak_of(dsn: str, gatehouse: Gatehouse) -> None:
    for number in range(3):
        await gatehouse("tenant", "create", f"T{number}")
    writer = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "edge", "tenant", "list"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout is not None
    writer.stdout._transport.close()  # type: ignore[attr-defined]
    async with asyncio.timeout(60):
        assert writer.stderr is not None
        assert await writer.stderr.read() == b""
        await writer.wait()


async def test_ctrl_c_while_waiting_for_the_database_ends_quietly_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("GATEHOUSE_DATABASE__DSN", f"postgres://me@127.0.0.1:{port}/x?sslmode=disable")
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "edge", "tenant", "list", "--data-dir", str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            await connected.wait()
            command.send_signal(signal.SIGINT)
            out, err = await command.communicate()
        assert (command.returncode, out, err) == (130, b"", b"")
    finally:
        server.close()
        await server.wait_closed()


async def _registered(gatehouse: Gatehouse, database: Database) -> tuple[str, str]:
    """A device with a living API key."""
    import os

    from edge.commands import cli_actor
    from edge.config import load
    from edge.wiring import open_registry
    from registry.devices import NewDevice

    await gatehouse("tenant", "create", "Acme")
    async with open_registry(load(None, None, os.environ), environ=os.environ) as core:
        tenant = await core.registry.tenants.find("acme")
        registered = await core.registry.devices.register(tenant.tenant_id, NewDevice("A device", "HW-1"), cli_actor())
    assert registered.issued is not None
    return str(registered.device.device_id), str(registered.issued.credential_id)


async def _rename(database: Database, device_id: DeviceId, name: str) -> None:
    async with database.connection() as connection:
        await connection.execute("UPDATE device SET name = $2 WHERE device_id = $1", device_id, name)


def _ids(said: Said) -> set[str]:
    assert said.code == 0, said.err
    return {device["device_id"] for device in said.json["devices"]}
