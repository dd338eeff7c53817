"""What an operator sees of a running node: health that tells the truth, metrics that move, a drain that loses nothing.

Real processes throughout. PostgreSQL is stopped with SIGSTOP (it is there and does not answer, the worst kind of away)
and killed; a request is known to be in flight because PostgreSQL shows it waiting for a lock that the test holds.
"""

from __future__ import annotations

import ast
import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import asyncpg
import httpx
import psutil
import pytest

import edge
from edge.config import KEYS
from registry.observation import Limit
from tests.processes import Api, ServerProcess, server_process
from tests.whole_system import (
    Samples,
    Tenant,
    client,
    new_tenant,
    ops_page,
    readiness,
    samples,
    start_that_fails,
    until,
    value,
)

EDGE = Path(edge.__file__).parent

TIGHT = {
    "GATEHOUSE_LIMITS__BODY_BYTES": "8192",
    "GATEHOUSE_LIMITS__HEADER_BYTES": "4096",
    "GATEHOUSE_LIMITS__HEADER_TIMEOUT_SECONDS": "1",
    "GATEHOUSE_LIMITS__TLS_HANDSHAKE_SECONDS": "1",
    "GATEHOUSE_LIMITS__UPLINK_PAYLOAD_BYTES": "1024",
    "GATEHOUSE_LIMITS__UPLINK_QUEUE": "1",
    "GATEHOUSE_LIMITS__SESSIONS_PER_DEVICE": "3",
    "GATEHOUSE_LIMITS__KEY_REQUESTS_PER_SECOND": "1",
    "GATEHOUSE_LIMITS__KEY_REQUESTS_BURST": "40",
    "GATEHOUSE_LIMITS__PROVISIONING_ATTEMPTS_PER_SECOND": "0.1",
    "GATEHOUSE_LIMITS__PROVISIONING_ATTEMPTS_BURST": "4",
    "GATEHOUSE_LIMITS__SSE_STREAMS_PER_TENANT": "1",
}
"""Limits that a test can reach in a few requests."""


async def test_metrics_move_with_what_happens(tmp_path: Path) -> None:
    async with server_process(tmp_path / "D", TIGHT) as server:
        tenant = await new_tenant(server)
        before = await samples(server)
        await _daily_life(tenant)
        await _hit_limits(tenant)
        async with asyncio.timeout(10):
            after = await samples(server)

    def moved(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value_or_zero(before, name, **labels)

    assert moved("gatehouse_auth_attempts_total", transport="https", outcome="admitted") >= 4
    assert moved("gatehouse_auth_attempts_total", transport="https", outcome="refused") == 2
    assert moved("gatehouse_uplinks_total", transport="https", outcome="duplicate") == 1
    assert moved("gatehouse_uplinks_total", transport="https", outcome="rejected") >= 2
    stored = moved("gatehouse_uplinks_total", transport="https", outcome="stored")
    assert stored >= 1
    assert moved("gatehouse_uplink_batch_rows_sum") >= stored + 1
    assert moved("gatehouse_uplink_commit_seconds_count") >= 2
    assert moved("gatehouse_claims_total", transport="https", outcome="created") == 1
    assert moved("gatehouse_claims_total", transport="https", outcome="existing") == 1
    assert moved("gatehouse_claims_total", transport="https", outcome="refused") == 2
    assert moved("gatehouse_sessions_closed_total", transport="https", reason="revoked") == 1
    assert moved("gatehouse_sessions_closed_total", transport="https", reason="kicked") == 1
    assert moved("gatehouse_sessions_closed_total", transport="https", reason="peer") >= 1
    assert moved("gatehouse_revocation_teardown_seconds_count") == 2
    assert 0 < moved("gatehouse_revocation_teardown_seconds_sum") < 5
    route = "/api/v1/devices/{device_id}/uplink"
    assert moved("gatehouse_http_requests_total", route=route, method="POST", status="202") >= stored
    assert moved("gatehouse_http_request_seconds_count", route=route, method="POST") >= stored
    assert moved("gatehouse_tls_connections_total", transport="https", outcome="established") >= 8
    hit = {limit.value for limit in Limit if moved("gatehouse_limits_hit_total", limit=limit.value)}
    unreached = {"connections", "sessions", "tenant_requests", "open_requests", "requests", "failed_authentications"}
    unreached |= {"commands", "command_waits", "children"}  # by a thousand and more; their own tests reach them
    unreached |= {  # of MQTT, which is not spoken here: tests/integration/test_mqtt_limits.py
        "provisioning_connections",
        "refused_waiting",
        "subscriptions",
        "topic",
        "topic_aliases",
        "packet",
        "client_id",
        "receive_maximum",
        "publish_queue",
        "session_queue",
        "retained",
        "stored_sessions",
    }
    assert hit == {limit.value for limit in Limit} - unreached
    assert value(after, "gatehouse_sessions_open", transport="https") == 0
    assert value(after, "gatehouse_uplink_queue_length") == 0
    assert value(after, "gatehouse_feed_lag_seconds") < 5
    for quiet in ("gatehouse_postgres_restarts_total", "gatehouse_loop_restarts_total"):
        assert value(after, quiet) == 0
    assert value(after, "gatehouse_log_lines_dropped_total") == 0
    assert value(after, "gatehouse_build_info") == 1
    assert value(after, "process_resident_memory_bytes") > 1 << 20


def value_or_zero(read: Samples, name: str, **labels: str) -> float:
    """A series with a label that first appears with its first event is 0 before."""
    try:
        return value(read, name, **labels)
    except KeyError:
        return 0.0


async def _daily_life(tenant: Tenant) -> None:
    made = await tenant.registered("HW-life")
    path = f"/devices/{made['device_id']}/uplink"
    async with tenant.operator() as operator, tenant.device(made["api_key"]) as device:
        for _ in range(2):
            sent = await device.post(path, json={"kind": "event", "payload": {"n": 1}, "message_id": "one"})
            assert sent.status_code == 202
        assert (await device.post(path, json={"kind": "event"})).status_code == 400
        for wrong in ("sk_live_" + "A" * 43, "no.such.token"):
            async with tenant.device(wrong) as nobody:
                assert (await nobody.post(path, json={"kind": "event", "payload": 1})).status_code == 401
        (session,) = (await operator.get("/sessions")).json()["sessions"]
        assert (await operator.delete(f"/sessions/{session['session_id']}")).json()["remaining"] == 0
        assert (await device.post(path, json={"kind": "event", "payload": {"n": 2}})).status_code == 202
        gone = await operator.delete(f"/devices/{made['device_id']}/credentials/{made['credential_id']}")
        assert len(gone.json()["sessions"]) == 1
        template = (await operator.post("/provisioning/templates", json={"name": "line"})).json()
        claim = {"provision_key": template["provision_key"], "device_name": "d", "hardware_id": "HW-claim"}
        async with client(tenant.server) as factory:
            answers = [
                (await factory.post("/provision", json=body)).status_code
                for body in (claim, claim, claim | {"provision_key": "pk_" + "A" * 43})
            ]
        assert answers == [201, 200, 403]


async def _hit_limits(tenant: Tenant) -> None:
    made = await tenant.registered("HW-limits")
    path = f"/devices/{made['device_id']}/uplink"
    await _hit_sizes(tenant, made["api_key"], path)
    async with client(tenant.server) as factory:
        claim = {"provision_key": "pk_x", "device_name": "d", "hardware_id": "HW-x"}
        answers = [(await factory.post("/provision", json=claim)).status_code for _ in range(2)]
        assert answers[-1] == 429
    async with (
        tenant.operator() as operator,
        tenant.operator() as other,
        operator.stream("GET", "/events/stream") as stream,
    ):
        assert stream.status_code == 200
        assert (await other.get("/events/stream")).status_code == 429
    devices = [tenant.device(made["api_key"]) for _ in range(4)]
    try:
        body = {"kind": "event", "payload": 1}
        statuses: list[int] = [(await d.post(path, json=body)).status_code for d in devices]
        assert statuses == [202, 202, 202, 429]
        for _ in range(8):  # one place in the queue, three senders at once
            sent = await asyncio.gather(*(d.post(path, json=body) for d in devices[:3]))
            statuses += [answer.status_code for answer in sent]
        assert 503 in statuses
        more = [(await devices[0].post(path, json=body)).status_code for _ in range(30)]
        assert more[-1] == 429
    finally:
        for device in devices:
            await device.aclose()


async def _hit_sizes(tenant: Tenant, api_key: str, path: str) -> None:
    async with tenant.device(api_key) as device:
        large = await device.post(path, json={"kind": "event", "payload": "x" * 2000})
        assert (large.status_code, "2002 bytes" in large.text) == (400, True)
    async with client(tenant.server) as peer:
        assert (await peer.post("/provision", content=b"x" * 9000)).status_code == 413
    async with client(tenant.server) as peer:
        assert (await peer.get("/ca/chain", headers={"x": "y" * 5000})).status_code == 431
    slow = await Api.connect(tenant.server)
    slow.writer.write(b"GET / HT")
    assert b" 408 " in await slow.reader.readline()
    slow.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", tenant.server.ports["https"])
    assert await asyncio.wait_for(reader.read(), 10) == b""  # a handshake that never begins
    writer.close()


@contextmanager
def _stopped(processes: list[psutil.Process]) -> Iterator[None]:
    """Processes that are there and do nothing."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            if process.is_running():
                process.resume()


@pytest.mark.timeout(120)
async def test_readiness_names_what_is_away_and_comes_back_by_itself(tmp_path: Path) -> None:
    async with server_process(tmp_path / "D") as server:
        assert await readiness(server) == (200, set())
        postmaster = psutil.Process(server.postmaster_pid())
        with _stopped([postmaster, *postmaster.children(recursive=True)]):
            await until(lambda: _not_well(server, {"database", "feed"}), seconds=20)
            assert (await ops_page(server, "/livez"))[0] == 200
        await until(lambda: _not_well(server, set()), seconds=20)
        postmaster = psutil.Process(server.postmaster_pid())
        with _stopped([psutil.Process(server.pid)]):  # so that it cannot heal before the test has looked
            postmaster.kill()
        await until(lambda: _restarted(server), seconds=30)
        await until(lambda: _not_well(server, set()), seconds=20)
        tenant = await new_tenant(server)
        assert (await tenant.registered("HW-after"))["api_key"]


async def _not_well(server: ServerProcess, names: set[str]) -> bool:
    return await readiness(server) == (503 if names else 200, names)


async def _restarted(server: ServerProcess) -> bool:
    return value(await samples(server), "gatehouse_postgres_restarts_total") == 1


@asynccontextmanager
async def _held_up(dsn: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Inside, every uplink waits in PostgreSQL until the block ends."""
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE uplink IN ACCESS EXCLUSIVE MODE")
            yield connection
    finally:
        await connection.close()


async def test_a_drain_answers_what_is_in_flight_and_closes_the_rest(dsn: str, tmp_path: Path) -> None:
    environ = {"GATEHOUSE_DATABASE__DSN": dsn, "GATEHOUSE_NODE__DRAIN_SECONDS": "8"}
    async with server_process(tmp_path / "D", environ) as server:
        tenant = await new_tenant(server)
        made = await tenant.registered("HW-1")
        idle, busy = await Api.connect(server), await Api.connect(server)
        assert (await idle.request("GET", "/devices", None, tenant.token))[0] == 200
        loop = asyncio.get_running_loop()
        async with _held_up(dsn) as watcher:
            uplink = {"kind": "event", "payload": {"mark": "in flight"}}
            sending = asyncio.create_task(
                busy.request("POST", f"/devices/{made['device_id']}/uplink", uplink, made["api_key"])
            )
            await until(lambda: _waiting(watcher))
            began = loop.time()
            stopping = asyncio.create_task(server.stop())
            assert await asyncio.wait_for(idle.reader.read(), 5) == b"", "an idle connection is closed at once"
            await until(lambda: _refuses(server))
            assert not sending.done()
            assert not stopping.done()
        assert (await sending)[0] == 202
        assert await asyncio.wait_for(busy.reader.read(), 5) == b""
        assert await stopping == 0
        assert loop.time() - began < 8 + 3
        for each in (idle, busy):
            each.close()
    connection = await asyncpg.connect(dsn)
    try:
        assert await connection.fetchval("SELECT count(*) FROM uplink WHERE payload->>'mark' = 'in flight'") == 1
    finally:
        await connection.close()


async def test_a_drain_does_not_wait_for_ever(dsn: str, tmp_path: Path) -> None:
    environ = {
        "GATEHOUSE_DATABASE__DSN": dsn,
        "GATEHOUSE_NODE__DRAIN_SECONDS": "0.5",
        "GATEHOUSE_DATABASE__STATEMENT_TIMEOUT_SECONDS": "2",
    }
    async with server_process(tmp_path / "D", environ) as server:
        tenant = await new_tenant(server)
        made = await tenant.registered("HW-1")
        busy = await Api.connect(server)
        async with _held_up(dsn) as watcher:
            path, uplink = f"/devices/{made['device_id']}/uplink", {"kind": "event", "payload": 1}
            sending = asyncio.create_task(busy.request("POST", path, uplink, made["api_key"]))
            await until(lambda: _waiting(watcher))
            async with asyncio.timeout(15):
                assert await server.stop() == 0
            try:
                status = (await sending)[0]
            except (EOFError, OSError):
                status = None
            assert status in (None, 503), "what is not stored is not acknowledged"
        busy.close()


async def _waiting(watcher: asyncpg.Connection[asyncpg.Record]) -> bool:
    return bool(
        await watcher.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    )


async def _ends(stream: httpx.Response) -> bool:
    try:
        async with asyncio.timeout(5):
            async for _ in stream.aiter_raw():
                pass
    except httpx.HTTPError:
        pass
    return True


async def _refuses(server: ServerProcess) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", server.ports["https"])
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_a_node_is_stopped_while_its_database_does_not_answer(dsn: str, tmp_path: Path) -> None:
    environ = {"GATEHOUSE_DATABASE__DSN": dsn, "GATEHOUSE_DATABASE__STATEMENT_TIMEOUT_SECONDS": "5"}
    async with server_process(tmp_path / "D", environ) as server:
        watcher = await asyncpg.connect(dsn)
        rows = await watcher.fetch(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'gatehouse%'"
        )
        with _stopped([psutil.Process(row["pid"]) for row in rows]):
            await until(lambda: _feed_is_lost(server))
            assert await server.stop() == 0
        await watcher.close()


async def _feed_is_lost(server: ServerProcess) -> bool:
    return "feed" in (await readiness(server))[1]


async def test_a_second_signal_hurries(dsn: str, tmp_path: Path) -> None:
    environ = {"GATEHOUSE_DATABASE__DSN": dsn, "GATEHOUSE_NODE__DRAIN_SECONDS": "600"}
    async with server_process(tmp_path / "D", environ) as server:
        tenant = await new_tenant(server)
        async with tenant.operator() as operator, operator.stream("GET", "/events/stream") as stream:
            assert stream.status_code == 200
            psutil.Process(server.pid).send_signal(signal.SIGTERM)
            await until(lambda: _refuses(server))
            async with asyncio.timeout(15):
                assert await server.stop() == 0
            assert await _ends(stream), "a stream has no end of its own, so it is ended"


@pytest.mark.parametrize(
    ("variable", "text", "named"),
    [
        ("GATEHOUSE_LIMITS__BODY_BYTES", "lots", "limits.body_bytes"),
        ("GATEHOUSE_LIMITS__BODY_BITS", "1", "limits.body_bits"),
        ("GATEHOUSE_SECURITY__OPERATOR_JWKS", "/no/such/file", "security.operator_jwks"),
        ("GATEHOUSE_DATABASE__DSN", "mysql://host/db", "database.dsn"),
    ],
)
async def test_a_bad_configuration_is_exit_2_and_names_the_key(
    variable: str, text: str, named: str, tmp_path: Path
) -> None:
    code, out, err = await start_that_fails(tmp_path / "D", {variable: text})
    assert (code, out) == (2, "")
    assert named in err
    assert not (tmp_path / "D").exists(), "nothing was made"


async def test_a_broken_key_set_of_operators_stops_the_start(dsn: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"kty": "RSA"}]}))
    environ = {"GATEHOUSE_DATABASE__DSN": dsn, "GATEHOUSE_SECURITY__OPERATOR_JWKS": str(keys)}
    code, out, err = await start_that_fails(tmp_path / "D", environ)
    assert (code, out) == (2, "")
    assert "security.operator_jwks" in err.splitlines()[-1]
    assert not (tmp_path / "D").exists(), "nothing was made"


RESERVED = {
    ("lwm2m", "host"),
    ("lwm2m", "port"),
}
"""Sections whose listeners are still to come; the document says so."""


def test_every_documented_key_is_read_somewhere() -> None:
    read: set[tuple[str, str]] = set()
    for module in EDGE.glob("*.py"):
        if module.name == "config.py":
            continue
        nodes = list(ast.walk(ast.parse(module.read_text())))
        called = {
            target.id: node.value.attr
            for node in nodes
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in nodes:
            match node:
                case ast.Attribute(value=ast.Attribute(attr=section), attr=key):
                    read.add((section, key))
                case ast.Attribute(value=ast.Name(id=name), attr=key):
                    read.add((called.get(name, name), key))
                case _:
                    pass
    known = set(KEYS) - RESERVED - {("", "data_dir"), ("database", "dsn_file")}  # the last becomes database.dsn
    assert ("limits", "no_such_key") not in read
    assert known - read == set()
