"""The raw keys of a whole run appear nowhere: not in the database, the logs, the events, the metrics, or any file.

One server process with debug logs goes through every flow that shows or takes a secret, good and bad. Each secret that
was shown or sent is kept in all the spellings somebody could grep for. Afterwards every place that outlives a request
is searched for every spelling. A search that finds nothing could also be one that cannot find: so markers that are no
secrets travel the same ways, and each of them has to be found in its place.

Decisions (docs/operations.md): a text that holds one of our keys is refused as a hardware_id or a name and is ignored
as a correlation id. What a device sends as the content of an uplink is its own: it is stored unchanged, and its bounds
are its owner's. So no uplink here carries a secret, but malformed ones do, and must leave nothing.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from edge.postgres import attach_or_start
from registry.secrets import Secret
from registry.templates import claim_psk
from tests.postgres import chosen_binaries
from tests.processes import ServerProcess, server_process
from tests.whole_system import Tenant, client, new_tenant, ops_page, until

MARK = "harmless-marker-of-this-run"
"""Travels as a correlation id, a device's name and an identifier in SQL; long enough to be found only where it went."""
SHORTEST = 16
"""A spelling shorter than this could be anywhere by chance."""


@dataclass
class Kept:
    """Every secret of the run, by name, in the spellings that a place is searched for."""

    spellings: dict[str, list[bytes]] = field(default_factory=dict)

    def text(self, name: str, value: str) -> str:
        """Keep a secret text; a prefix of ours is taken off for one more spelling. Returns it."""
        self._add(name, value)
        for prefix in ("sk_live_", "pk_", "rt_"):
            if value.startswith(prefix):
                payload = value.removeprefix(prefix)
                self._add(name, payload)
                self.raw(name, base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return value

    def raw(self, name: str, value: bytes) -> None:
        """Keep secret bytes."""
        for spelling in (base64.urlsafe_b64encode(value), base64.b64encode(value)):
            self._add(name, spelling.decode().rstrip("="))
        self._add(name, value.hex())
        self._add(name, value.hex().upper())
        self.spellings[name].append(value)

    def jwt(self, name: str, token: str) -> str:
        """Keep a token, and its payload and signature by themselves; its header is nobody's secret."""
        self.text(name, token)
        for part in token.split(".")[1:]:
            self._add(name, part)
        return token

    def issued(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Keep the secret parts of an answer that shows a credential. Returns the answer."""
        if body.get("api_key"):
            self.text(name, body["api_key"])
        if "psk" in body:
            self.text(name, body["psk"]["key"])
            self.raw(name, base64.urlsafe_b64decode(body["psk"]["key"] + "="))
        return body

    def found_in(self, content: bytes) -> set[str]:
        """The names of the secrets that a content holds."""
        return {name for name, spellings in self.spellings.items() if any(s in content for s in spellings)}

    def _add(self, name: str, spelling: str) -> None:
        assert len(spelling) >= SHORTEST, name
        self.spellings.setdefault(name, []).append(spelling.encode())


def test_the_search_finds_every_spelling() -> None:
    kept = Kept()
    kept.text("key", "sk_live_" + base64.urlsafe_b64encode(bytes(range(200, 232))).decode().rstrip("="))
    assert len(kept.spellings["key"]) >= 6
    for spelling in kept.spellings["key"]:
        assert kept.found_in(b"a line with " + spelling + b" in it") == {"key"}
    assert kept.found_in(b"a line without") == set()


@pytest.mark.timeout(180)
async def test_no_secret_of_a_whole_run_is_anywhere(tmp_path: Path) -> None:
    kept = Kept()
    async with server_process(tmp_path / "D", {"GATEHOUSE_LOGS__LEVEL": "debug"}) as server:
        tenant = await new_tenant(server)
        kept.jwt("operator token", tenant.token)
        told: list[str] = []
        async with _listening(tenant, told):
            devices = await _flows(tenant, kept)
            await _wrong_places(tenant, kept, devices)
            await _errors(server, devices)
            await until(lambda: _told(told, "credential.revoked"))
        places = await _visible_places(tenant, devices)
        places["events stream"] = "".join(told).encode()
        places["dump"] = await _dump(server)
        _keep_secrets_of_the_node(kept, server)
        assert await server.stop() == 0
    places["log"] = server.log_text().encode()
    places |= dict(_files(server.data_dir))

    assert len(kept.spellings) >= 20
    leaks = {place: kept.found_in(content) for place, content in places.items()}
    assert {place: names for place, names in leaks.items() if names} == {}
    _assert_markers(places)


def _assert_markers(places: dict[str, bytes]) -> None:
    """Each place has what was put there openly, so that finding nothing means something."""
    mark = MARK.encode()
    for place in ("dump", "log", "postgres.log", "events", "events stream", "timeline", "audit", "device list"):
        assert mark in places[place], place
    assert any(mark in content for place, content in places.items() if place.startswith("postgres/")), "data files"
    assert b"gatehouse_auth_attempts_total" in places["metrics"]
    assert b'"database"' in places["readyz"]
    assert b"BEGIN CERTIFICATE" in places["ca-chain.pem"]


# -- the run -----------------------------------------------------------------------------------------------------------


async def _flows(tenant: Tenant, kept: Kept) -> list[dict[str, Any]]:
    """Every flow that shows a secret, with every secret used once. The devices, the first with an API key revoked."""
    async with tenant.operator() as operator, client(tenant.server) as factory:
        factory.headers["x-correlation-id"] = MARK
        operator.headers["x-correlation-id"] = MARK
        first = kept.issued("registered api key", await _made(operator, "/devices", name=MARK, hardware_id="HW-1"))
        chosen = base64.urlsafe_b64encode(bytes(range(100, 132))).decode().rstrip("=")
        second = kept.issued(
            "registered psk", await _made(operator, "/devices", name="d", hardware_id="HW-2", credential_type="psk")
        )
        given = await _made(operator, f"/devices/{second['device_id']}/psk", identity="chosen", key=chosen)
        kept.issued("chosen psk", given)
        assert given["psk"]["key"] == chosen
        path = f"/devices/{first['device_id']}"
        kept.issued("second api key", await _made(operator, f"{path}/api-keys", label="spare"))
        kept.issued("rotated api key", await _made(operator, f"{path}/credentials/rotate", overlap_seconds=60))
        kept.issued("rotated to psk", await _made(operator, f"{path}/credentials/rotate", credential_type="psk"))
        third = kept.issued("other api key", await _made(operator, "/devices", name="d", hardware_id="HW-3"))
        async with tenant.device(third["api_key"]) as device:
            for header in ({}, {"x-api-key": third["api_key"]}):
                sent = await device.post(
                    f"/devices/{third['device_id']}/uplink", json={"kind": "event", "payload": 1}, headers=header
                )
                assert sent.status_code == (401 if header else 202), "two credentials are ambiguous"
            path = f"/devices/{third['device_id']}"
            gone = await operator.delete(f"{path}/credentials/{third['credential_id']}")
            assert gone.json()["remaining"] == 0
            sent = await device.post(f"{path}/uplink", json={"kind": "event", "payload": 1})
            assert sent.status_code == 401
        claimed = [await _claims(operator, factory, kept, kind) for kind in ("api_key", "psk")]
    return [first, second, third, *claimed]


async def _claims(operator: httpx.AsyncClient, factory: httpx.AsyncClient, kept: Kept, kind: str) -> dict[str, Any]:
    template = await _made(operator, "/provisioning/templates", name=f"line {kind}", credential_type=kind)
    key = kept.text(f"provisioning key {kind}", template["provision_key"])
    kept.raw(f"claim psk {kind}", claim_psk(Secret(key)).reveal())
    nonce = kept.text(f"nonce {kind}", f"nonce-of-the-device-{kind}-0123456789")
    claim = {"provision_key": key, "device_name": "d", "hardware_id": f"HW-c-{kind}"}
    first = await factory.post("/provision", json=claim | {"nonce": nonce})
    again = await factory.post("/provision", json=claim | {"nonce": nonce})
    bare = await factory.post("/provision", json=claim)
    assert (first.status_code, again.status_code, bare.status_code) == (201, 200, 200)
    kept.issued(f"claimed {kind}", first.json())
    assert bare.json()["api_key"] == ""
    other = await factory.post("/provision", json=claim | {"hardware_id": f"HW-d-{kind}"})
    kept.issued(f"claimed without nonce {kind}", other.json())
    ended = await operator.put(f"/provisioning/templates/{template['template_id']}", json={"status": "disabled"})
    assert ended.json()["status"] == "disabled"
    assert (await factory.post("/provision", json=claim | {"hardware_id": "HW-late"})).status_code == 403
    body: dict[str, Any] = first.json()
    return body


async def _wrong_places(tenant: Tenant, kept: Kept, devices: list[dict[str, Any]]) -> None:
    """Secrets where none belongs: every answer is a refusal, and none keeps the secret."""
    key = kept.text("wrong key", "sk_live_" + base64.urlsafe_b64encode(bytes(range(50, 82))).decode().rstrip("="))
    line = kept.text("wrong provisioning key", "pk_" + base64.urlsafe_b64encode(bytes(range(32))).decode().rstrip("="))
    foreign = "eyJhbGciOiJFZERTQSIsImtpZCI6Im5vbmUifQ.eyJzdWIiOiJzb21lYm9keSBlbHNlIGVudGlyZWx5In0." + "c2ln" * 16
    kept.jwt("foreign token", foreign)
    real, token = devices[-2]["api_key"], tenant.token
    uplink = f"/devices/{devices[0]['device_id']}/uplink"
    async with client(tenant.server) as peer, tenant.operator() as operator:
        for secret in (key, line, foreign, real):
            for headers in (
                {"authorization": f"Bearer {secret}"},
                {"authorization": f"Basic {secret}"},
                {"authorization": secret},
                {"x-api-key": secret},
                {"x-api-key": secret, "authorization": f"Bearer {secret}"},
            ):
                assert (await peer.get("/devices", headers=headers)).status_code in (401, 403)
                sent = await peer.post(uplink, json={"kind": "event"}, headers=headers)
                assert 400 <= sent.status_code < 500
            assert (await peer.get(f"/devices/{secret}")).status_code == 401
            assert (await peer.get(f"/{secret}")).status_code == 404
            assert (await peer.get("/ca/chain", params={"token": secret})).status_code in (200, 400)
            await peer.get("/ca/chain", headers={"user-agent": secret, "cookie": f"a={secret}", "referer": secret})
            await peer.get("/devices", headers={"x-correlation-id": secret[:64]})
            for content in _bodies(secret):
                answer = await peer.post("/provision", content=content, headers={"content-type": "application/json"})
                assert answer.status_code in (400, 403), content
        for secret in (key, line, real):
            assert (await operator.get(f"/devices/{secret}")).status_code in (400, 404)
            assert (await operator.get("/devices", params={"q": secret})).status_code in (200, 400)
            assert (await operator.get("/events", params={"after": secret})).status_code == 400
            assert (await operator.get("/devices", params={"cursor": secret})).status_code == 400
            for field_name in ("hardware_id", "name", "profile_id", "firmware"):
                body = {"name": "d", "hardware_id": "HW-x"} | {field_name: secret}
                assert (await operator.post("/devices", json=body)).status_code == 400, field_name
            assert (await operator.post("/devices", content=f'{{"name": "{secret}')).status_code == 400
            assert (await operator.post("/provisioning/templates", json={"name": secret})).status_code == 400
            tagged = {"name": "d", "hardware_id": "HW-y", "tags": {"note": secret}}
            assert (await operator.post("/devices", json=tagged)).status_code == 400
        async with tenant.device(real) as device:  # malformed uplinks of a good device
            own = f"/devices/{devices[-2]['device_id']}/uplink"
            for text in (f'{{"kind": "event", "payload": "{real}', f'{{"kind": "{real}", "payload": 1}}', token):
                sent = await device.post(own, content=text, headers={"content-type": "application/json"})
                assert sent.status_code == 400


def _bodies(secret: str) -> Iterator[bytes]:
    """Claims that are malformed around a secret, and one that is well-formed."""
    claim = {"provision_key": secret, "device_name": "d", "hardware_id": "HW-z"}
    whole = json.dumps(claim).encode()
    yield whole
    yield whole[:-2]
    yield whole + b"}"
    yield whole.replace(b'"d"', b"7")
    yield whole.replace(b'"HW-z"', b'"\\u0000"')
    yield json.dumps(claim | {secret: 1}).encode()
    yield json.dumps(claim | {"nonce": secret, "extra": secret}).encode()
    yield json.dumps(claim | {"device_name": secret + "\u202e"}).encode()
    yield json.dumps(claim | {"csr": secret}).encode() + b"\xff"
    yield secret.encode()


async def _errors(server: ServerProcess, devices: list[dict[str, Any]]) -> None:
    """Errors of PostgreSQL and of the server's connections, with the marker in PostgreSQL's log."""
    async with attach_or_start(server.data_dir) as postgres:
        connection = await asyncpg.connect(postgres.dsn)
        try:
            with pytest.raises(asyncpg.UndefinedColumnError):
                await connection.execute(f'SELECT "{MARK}"')
            await connection.execute(f"DO $$ BEGIN RAISE LOG '{MARK}'; END $$")
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
        finally:
            await connection.close()
    for api_key in (devices[-2]["api_key"], "sk_live_" + "A" * 43):
        async with client(server, authorization=f"Bearer {api_key}", **{"x-correlation-id": MARK}) as peer:
            await until(lambda peer=peer: _answers(peer))  # type: ignore[misc]


async def _answers(peer: httpx.AsyncClient) -> bool:
    return (await peer.post("/telemetry", json={"t": 1})).status_code in (202, 401)


# -- the places --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _listening(tenant: Tenant, told: list[str]) -> AsyncIterator[None]:
    """Follows the events inside."""

    async def follow() -> None:
        async with tenant.operator() as operator, operator.stream("GET", "/events/stream") as stream:
            opened.set()
            async for text in stream.aiter_text():
                told.append(text)

    opened = asyncio.Event()
    task = asyncio.create_task(follow())
    await asyncio.wait_for(opened.wait(), 10)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _told(told: list[str], kind: str) -> bool:
    return kind in "".join(told)


async def _visible_places(tenant: Tenant, devices: list[dict[str, Any]]) -> dict[str, bytes]:
    places: dict[str, bytes] = {}
    async with tenant.operator() as operator:
        for name, path, item in (
            ("events", "/events", "events"),
            ("audit", "/audit", "audit"),
            ("device list", "/devices", "devices"),
            ("template list", "/provisioning/templates", "templates"),
            ("sessions", "/sessions", "sessions"),
        ):
            places[name] = await _pages(operator, path, item)
        timelines = [await _pages(operator, f"/devices/{d['device_id']}/timeline", "events") for d in devices]
        places["timeline"] = b"".join(timelines)
        credentials = [await _pages(operator, f"/devices/{d['device_id']}/credentials", "credentials") for d in devices]
        places["credentials"] = b"".join(credentials)
    for name in ("metrics", "readyz"):
        places[name] = (await ops_page(tenant.server, f"/{name}"))[1].encode()
    return places


async def _pages(operator: httpx.AsyncClient, path: str, item: str) -> bytes:
    collected, cursor = b"", None
    while True:
        answer = await operator.get(path, params={"limit": 100} | ({"cursor": cursor} if cursor else {}))
        assert answer.status_code == 200, answer.text
        assert item in answer.json()
        collected += answer.content
        cursor = answer.json()["next_cursor"]
        if cursor is None:
            return collected


async def _dump(server: ServerProcess) -> bytes:
    """The whole database as plain SQL."""
    async with attach_or_start(server.data_dir) as postgres:
        process = await asyncio.create_subprocess_exec(
            str(chosen_binaries().bindir / "pg_dump"), "--inserts", postgres.dsn,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert b"INSERT INTO public.credential" in out
    return out


def _keep_secrets_of_the_node(kept: Kept, server: ServerProcess) -> None:
    secrets = server.data_dir / "secrets"
    kept.text("postgres password", (secrets / "postgres-password").read_text().strip())
    for index, value in enumerate(_texts(json.loads((secrets / "key-ring.json").read_text()))):
        raw = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))
        if len(raw) == 32:
            kept.raw(f"key ring {index}", raw)
    assert any(name.startswith("key ring") for name in kept.spellings)


def _texts(document: Any) -> Iterator[str]:
    """The strings of a JSON document that could be base64."""
    match document:
        case dict():
            for inner in document.values():
                yield from _texts(inner)
        case list():
            for inner in document:
                yield from _texts(inner)
        case str() if len(document) in (43, 44):
            yield document.replace("+", "-").replace("/", "_").rstrip("=")


def _files(data_dir: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(data_dir.rglob("*")):
        place = path.relative_to(data_dir)
        if path.is_file() and place.parts[0] != "secrets":
            yield str(place), path.read_bytes()


# -- requests ----------------------------------------------------------------------------------------------------------


async def _made(operator: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    answer = await operator.post(path, json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made
