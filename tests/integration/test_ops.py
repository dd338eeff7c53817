"""The ops port answers what a prober asks, and nobody can keep it from answering the next one."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import psutil
import pytest

from edge import ops
from edge.metrics import (
    MAX_ROUTES,
    AuthOutcome,
    ClaimOutcome,
    CloseReason,
    Limit,
    Metrics,
    UplinkOutcome,
)
from edge.ops import CheckResult, OpsServer
from registry.model import Transport

HOST = "127.0.0.1"


class Readiness:
    """Checks that a test turns."""

    def __init__(self) -> None:
        self.checks: Mapping[str, CheckResult] = {"database": CheckResult(ok=True), "feed": CheckResult(ok=True)}

    def __call__(self) -> Mapping[str, CheckResult]:
        return self.checks


@asynccontextmanager
async def serving(
    metrics: Metrics | None = None, readiness: Readiness | None = None, *, deadline: float = 5.0
) -> AsyncIterator[int]:
    server = OpsServer(metrics or Metrics(), readiness or Readiness(), deadline=deadline)
    port = await server.start(HOST, 0)
    try:
        yield port
    finally:
        await server.close()


async def exchange(port: int, sent: bytes) -> bytes:
    """Everything that comes back for `sent`, until the server closes."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(sent)
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


async def get(port: int, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    got = await exchange(port, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = got.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, body


def peers_of_this_process() -> set[int]:
    """Local ports of connections that this process has accepted or made and still holds open."""
    return {
        connection.laddr.port
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED
    }


class TestPages:
    async def test_alive_while_the_loop_turns(self) -> None:
        async with serving() as port:
            status, headers, body = await get(port, "/livez")
        assert (status, json.loads(body)) == (200, {"status": "alive"})
        assert headers["connection"] == "close"
        assert int(headers["content-length"]) == len(body)

    async def test_ready_only_when_every_check_is_well(self) -> None:
        readiness = Readiness()
        async with serving(readiness=readiness) as port:
            status, _, body = await get(port, "/readyz")
            assert (status, json.loads(body)["status"]) == (200, "ready")
            readiness.checks = {
                "database": CheckResult(ok=True),
                "feed": CheckResult(ok=False, reason="silent for 12 s"),
            }
            status, _, body = await get(port, "/readyz?verbose")
        assert status == 503
        assert json.loads(body) == {
            "status": "not_ready",
            "checks": {"database": {"ok": True}, "feed": {"ok": False, "reason": "silent for 12 s"}},
        }

    async def test_head_has_the_headers_and_no_body(self) -> None:
        async with serving() as port:
            status, headers, body = await get(port, "/livez", "HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["content-length"]) > 0

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"GET / HTTP/1.1\r\n\r\n", 404),
            (b"GET /livez/ HTTP/1.1\r\n\r\n", 404),
            (b"POST /livez HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi", 405),
            (b"GET /livez\r\n\r\n", 400),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
            (b"\r\n\r\n", 400),
            (b"\xff\0 /livez HTTP/1.1\r\n\r\n", 405),
            (b"\x16\x03\x01\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nX: " + b"y" * 5000 + b"\r\n\r\n", 431),
        ],
    )
    async def test_anything_else_gets_a_clear_error(self, sent: bytes, status: int) -> None:
        async with serving() as port:
            head, _, body = (await exchange(port, sent)).partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status
        assert set(json.loads(body)) == {"code", "message", "correlation_id"}

    @pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
    async def test_curl_understands_it(self) -> None:
        async with serving() as port:
            process = await asyncio.create_subprocess_exec(
                "curl", "-sS", "--fail", f"http://{HOST}:{port}/readyz", stdout=asyncio.subprocess.PIPE
            )
            out, _ = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 0
        assert json.loads(out)["status"] == "ready"


class TestHostility:
    async def test_silent_peers_are_dropped_and_do_not_lock_others_out(self) -> None:
        async with serving(deadline=0.2) as port:
            silent = [await asyncio.open_connection(HOST, port) for _ in range(ops.MAX_CONNECTIONS)]
            silent[0][1].write(b"GET /livez HTTP/1.1\r\n")
            for reader, writer in silent:
                try:
                    assert await asyncio.wait_for(reader.read(), 10) == b""
                except ConnectionResetError:
                    pass
                writer.close()
            assert (await get(port, "/livez"))[0] == 200

    async def test_one_connection_too_many_is_closed_at_once(self) -> None:
        async with serving(deadline=30) as port:
            held = [await asyncio.open_connection(HOST, port) for _ in range(ops.MAX_CONNECTIONS)]
            with pytest.raises((ConnectionResetError, IndexError)):
                await get(port, "/livez")
            held[0][1].close()
            async with asyncio.timeout(10):
                while True:
                    try:
                        assert (await get(port, "/livez"))[0] == 200
                        break
                    except (ConnectionResetError, IndexError):
                        await asyncio.sleep(0)
            for _, writer in held:
                writer.close()

    async def test_a_peer_that_never_reads_is_dropped(self) -> None:
        metrics = Metrics()
        for n in range(MAX_ROUTES):
            metrics.http_answered("/" + "x" * 2000 + str(n), "GET", 200, 0.1)  # a page beyond any socket buffer
        size = len(metrics.render())
        async with serving(metrics, deadline=0.3) as port:
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
            async with asyncio.timeout(20):
                while port not in peers_of_this_process():
                    await asyncio.sleep(0)
                while port in peers_of_this_process():
                    assert (await get(port, "/livez"))[0] == 200
                    await asyncio.sleep(0.02)
                writer.transport.resume_reading()  # type: ignore[attr-defined]
                got = 0
                try:
                    while chunk := await reader.read(1 << 20):
                        got += len(chunk)
                except ConnectionResetError:
                    pass
            writer.close()
        assert got < size

    async def test_a_check_that_raises_is_an_answerless_connection_and_no_more(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        readiness = Readiness()
        readiness.checks = None  # type: ignore[assignment]
        async with serving(readiness=readiness) as port:
            with pytest.raises((ConnectionResetError, IndexError)):
                await get(port, "/readyz")
            assert (await get(port, "/livez"))[0] == 200
        assert [record.message for record in caplog.records] == ["ops.failed"]

    async def test_closing_ends_what_is_open_and_frees_the_port(self) -> None:
        server = OpsServer(Metrics(), Readiness())
        port = await server.start(HOST, 0)
        reader, writer = await asyncio.open_connection(HOST, port)
        await get(port, "/livez")
        await asyncio.wait_for(server.close(), 5)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
        await server.close()
        assert await server.start(HOST, port) == port
        await server.close()


class TestMetrics:
    async def test_what_happened_is_on_the_page(self) -> None:
        metrics = Metrics(version="1.2.3")
        metrics.auth_attempted(Transport.MQTT, AuthOutcome.REFUSED)
        metrics.session_closed(Transport.COAP, CloseReason.REVOKED)
        metrics.revocation_torn_down(0.02)
        metrics.uplinks_handled(Transport.HTTPS, UplinkOutcome.STORED, 7)
        metrics.batch_committed(7, 0.003)
        metrics.claim_handled(Transport.HTTPS, ClaimOutcome.CREATED)
        metrics.http_answered("/api/v1/devices/{device_id}", "GET", 200, 0.01)
        metrics.limit_hit(Limit.BODY)
        metrics.postgres_restarted()
        metrics.watch_sessions(lambda: {Transport.MQTT: 3})
        metrics.watch_uplink_queue(lambda: 4, lambda: 400)
        metrics.watch_feed(lambda: 0.5)
        metrics.watch_dropped_logs(lambda: 6)
        metrics.watch_listeners(lambda: {Transport.HTTPS: {"established": 8, "dropped_garbage": 2, "open": 1}})
        async with serving(metrics) as port:
            status, headers, body = await get(port, "/metrics")
        assert status == 200
        assert headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = body.decode().splitlines()
        for expected in (
            'gatehouse_build_info{version="1.2.3"} 1.0',
            'gatehouse_auth_attempts_total{outcome="refused",transport="mqtt"} 1.0',
            'gatehouse_auth_attempts_total{outcome="admitted",transport="coap"} 0.0',
            'gatehouse_sessions_closed_total{reason="revoked",transport="coap"} 1.0',
            "gatehouse_revocation_teardown_seconds_count 1.0",
            'gatehouse_uplinks_total{outcome="stored",transport="https"} 7.0',
            "gatehouse_uplink_batch_rows_sum 7.0",
            "gatehouse_uplink_commit_seconds_count 1.0",
            'gatehouse_claims_total{outcome="created",transport="https"} 1.0',
            'gatehouse_http_requests_total{method="GET",route="/api/v1/devices/{device_id}",status="200"} 1.0',
            'gatehouse_limits_hit_total{limit="body"} 1.0',
            "gatehouse_postgres_restarts_total 1.0",
            'gatehouse_sessions_open{transport="mqtt"} 3.0',
            'gatehouse_sessions_open{transport="coap"} 0.0',
            "gatehouse_uplink_queue_length 4.0",
            "gatehouse_uplink_queue_bytes 400.0",
            "gatehouse_feed_lag_seconds 0.5",
            "gatehouse_log_lines_dropped_total 6.0",
            'gatehouse_tls_connections_total{outcome="established",transport="https"} 8.0',
            'gatehouse_tls_connections_total{outcome="garbage",transport="https"} 2.0',
            'gatehouse_tls_connections_now{state="open",transport="https"} 1.0',
        ):
            assert expected in lines
        assert any(line.startswith("process_open_fds ") for line in lines)

    def test_two_of_them_never_meet(self) -> None:
        one, other = Metrics(), Metrics()
        one.postgres_restarted()
        assert b"gatehouse_postgres_restarts_total 1.0" in one.render()
        assert b"gatehouse_postgres_restarts_total 0.0" in other.render()

    def test_hostile_methods_statuses_and_routes_do_not_multiply_the_series(self) -> None:
        metrics = Metrics()
        for n in range(2 * MAX_ROUTES):
            metrics.http_answered(f"/r/{n}", f"M{n}", 1000 + n, 0.1)
        counted = [
            one for one in metrics.render().decode().splitlines() if one.startswith("gatehouse_http_requests_total")
        ]
        assert len(counted) == MAX_ROUTES + 1
        assert 'gatehouse_http_requests_total{method="other",route="other",status="other"} 500.0' in counted
