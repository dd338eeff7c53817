"""`gatehouse serve` as a process of its own: started as its operator starts it, killed as nobody should.

Commands run through the same interpreter's environment as the tests. Everything a `ServerProcess` starts is gone when
its block ends: the server is killed, and its PostgreSQL dies with it (edge/postgres_child.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 60.0
PROGRAM = (sys.executable, "-m", "edge")
LISTENERS = ("https", "mqtt", "coap", "ops")
_GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass
class ServerProcess:
    """One server; `start` it as often as it is killed."""

    data_dir: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    _process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start and wait for the ready line. Without `ports` they are chosen at the first start and kept."""
        log = (self.data_dir.parent / f"{self.data_dir.name}.log").open("ab")
        try:
            self._process = await asyncio.create_subprocess_exec(
                *PROGRAM,
                "serve",
                "--data-dir",
                str(self.data_dir),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=self._environment(),
            )
        finally:
            log.close()
        assert self._process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = await self._process.stdout.readline()
        assert line, f"the server did not start:\n{self.log_tail()}"
        self.ports = json.loads(line)["ready"]

    async def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            return await self._process.wait()

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def postmaster_pid(self) -> int:
        """The process id of the embedded PostgreSQL's first process."""
        return int((self.data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0])

    async def kill_postgres(self) -> None:
        """kill -9 of that process; returns when another one is named as its successor."""
        killed = self.postmaster_pid()
        os.kill(killed, signal.SIGKILL)
        async with asyncio.timeout(START_SECONDS):
            while True:
                try:
                    if self.postmaster_pid() != killed:
                        return
                except (FileNotFoundError, IndexError, ValueError):
                    pass  # between the two, or half written
                await asyncio.sleep(0.01)

    @property
    def ca_chain(self) -> Path:
        """What a client must trust."""
        return self.data_dir / "ca-chain.pem"

    def tls(self) -> ssl.SSLContext:
        """A client context that trusts this server."""
        return ssl.create_default_context(cafile=str(self.ca_chain))

    def log_text(self) -> str:
        """Everything that the server logged so far."""
        return (self.data_dir.parent / f"{self.data_dir.name}.log").read_text(errors="replace")

    def log_tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log_text().splitlines()[-20:])

    async def command(self, *arguments: str) -> str:
        """Run another `gatehouse` command on this server's data directory; its standard output."""
        process = await asyncio.create_subprocess_exec(
            *PROGRAM,
            *arguments,
            "--data-dir",
            str(self.data_dir),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment(),
        )
        async with asyncio.timeout(START_SECONDS):
            out, err = await process.communicate()
        assert process.returncode == 0, f"{arguments}: {err.decode()}"
        return out.decode()

    def _environment(self) -> dict[str, str]:
        ports = self.ports or dict.fromkeys(LISTENERS, 0)
        chosen = {f"GATEHOUSE_{name.upper()}__PORT": str(port) for name, port in ports.items()}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("GATEHOUSE_")}
        return {**inherited, **chosen, **self.environ}


def lasting_ports() -> dict[str, int]:
    """Ports for a server that is started on them again: while it is down nobody else is given one.

    What the kernel gives out by itself, also to tests that other workers run, comes from a range of its own. These are
    below it, and random, as others may choose there too.
    """
    end = int(_GIVEN_OUT.read_text().split()[0]) if _GIVEN_OUT.exists() else 32_768
    free = (port for port in random.sample(range(10_000, max(end, 20_000)), 500) if _is_free(port))
    return {name: next(free) for name in LISTENERS}


def _is_free(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


@asynccontextmanager
async def server_process(
    data_dir: Path, environ: Mapping[str, str] | None = None, ports: Mapping[str, int] | None = None
) -> AsyncIterator[ServerProcess]:
    """A started server, gone at the end."""
    server = ServerProcess(data_dir, environ or {}, dict(ports or {}))
    try:
        await server.start()
        yield server
    finally:
        if server.running:
            await server.kill()


@dataclass
class Api:
    """One keep-alive HTTPS connection, as plain as a device's."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def connect(cls, server: ServerProcess, context: ssl.SSLContext | None = None) -> Api:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", server.ports["https"], ssl=context or server.tls(), server_hostname="localhost"
        )
        return cls(reader, writer)

    async def request(self, method: str, path: str, body: object = None, bearer: str | None = None) -> tuple[int, Any]:
        """One request; status and decoded JSON body. Raises ConnectionError, IncompleteReadError, ssl.SSLError."""
        content = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} /api/v1{path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}"]
        if body is not None:
            head.append("Content-Type: application/json")
        if bearer is not None:
            head.append(f"Authorization: Bearer {bearer}")
        self.writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + content)
        await self.writer.drain()
        answer = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(answer.split(" ", 2)[1])
        length = next((int(x.split(":")[1]) for x in answer.split("\r\n") if x.startswith("content-length:")), 0)
        raw = await self.reader.readexactly(length) if length else b""
        return status, json.loads(raw) if raw else None

    def close(self) -> None:
        """Drop the connection."""
        self.writer.transport.abort()
