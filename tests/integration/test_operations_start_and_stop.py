"""`gatehouse serve` as a process: what it says when it cannot start, and what its stop does not wait for."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from tests.processes import server_process
from tests.whole_system import Tenant, new_tenant, start_that_fails


async def test_an_open_event_stream_does_not_hold_the_stop(dsn: str, tmp_path: Path) -> None:
    environ = {"GATEHOUSE_DATABASE__DSN": dsn, "GATEHOUSE_NODE__DRAIN_SECONDS": "60"}
    async with server_process(tmp_path / "D", environ) as server:
        tenant: Tenant = await new_tenant(server)
        async with tenant.operator() as admin, admin.stream("GET", "/events/stream") as response:
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith("retry:")
            async with asyncio.timeout(20):
                assert await server.stop() == 0
            assert [line async for line in lines][-3:] == [
                "",
                ": this node is leaving; come back with Last-Event-ID",
                "",
            ]


@pytest.mark.parametrize("listener", ["https", "mqtt", "ops"])
async def test_a_taken_port_is_named(dsn: str, tmp_path: Path, listener: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environ = {"GATEHOUSE_DATABASE__DSN": dsn, f"GATEHOUSE_{listener.upper()}__PORT": str(port)}
        code, out, err = await start_that_fails(tmp_path / "D", environ)
    assert (code, out) == (1, "")
    said = err.splitlines()[-1]
    assert said.startswith(f"gatehouse: cannot listen on 127.0.0.1 port {port} ({listener}.host, {listener}.port)")


async def test_a_file_that_cannot_be_written_is_named_and_no_listener_blamed(dsn: str, tmp_path: Path) -> None:
    data_dir = tmp_path / "D"
    (data_dir / "ca-chain.pem").mkdir(parents=True)
    code, out, err = await start_that_fails(data_dir, {"GATEHOUSE_DATABASE__DSN": dsn})
    assert (code, out) == (1, "")
    assert "listen" not in err.splitlines()[-1]
    assert str(data_dir / "ca-chain.pem") in err.splitlines()[-1]
    assert os.listdir(data_dir / "ca-chain.pem") == []
