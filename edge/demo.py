"""`gatehouse demo`: a server of its own, and a story told through its real API over real TLS.

    start (ports: configured, or free ones) ─► tenant, token ─► steps, each one checked ─► commands to paste ─► Ctrl-C
                                                                  └ one does not hold: one line, exit 1

The server runs on this process's loop; the steps (demo_steps.py) block, and run in a thread like any other client. Its
log goes to D/demo.log, so that the story stays readable. What is made here belongs to the tenant `demo`; every run
takes new hardware ids, so a second one on the same directory tells the same story.

The story claims nothing that it does not check: a step that sees something else than it says raises `Unexpected`.
Secrets that are printed are those of the demo's own devices.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import msgspec
from rich.text import Text

from edge import logs
from edge.api_client import BASE, ConnectionClosed
from edge.commands import cli_actor, sign_token
from edge.config import Config
from edge.demo_coap import HandshakeFailed
from edge.demo_mqtt import NotConnected
from edge.demo_pastes import Hands, chapters, lay_out, variables
from edge.demo_steps import STEPS, Listener, Site, Story, Unexpected
from edge.serve import Server
from edge.stop_signals import StopSignals
from edge.terminal import complain, console, plain
from edge.wiring import open_registry
from registry.errors import NotFound
from registry.permissions import Role

TENANT_SLUG = "demo"
TOKEN_LIFETIME = timedelta(hours=12)
FAILED = 1


async def tell(config: Config, *, once: bool) -> int:
    """Start, tell the story, print commands and serve until Ctrl-C (not with `once`); the exit code.

    Raises StartError, and what `open_registry` raises.
    """
    stage = Stage()
    config, remarks = _with_free_ports(_for_demo(config))
    config.data_dir.mkdir(parents=True, exist_ok=True)
    stage.heading("Gatehouse demo")
    stage.fact("data directory", str(config.data_dir))
    stage.fact("database", "embedded PostgreSQL" if config.database.dsn is None else "the configured one")
    with _log_file(config.data_dir / "demo.log", config.logs.level):
        since = time.perf_counter()
        server = Server(config)
        signals = StopSignals(server.hurry)
        ports = await server.start()
        try:
            stage.fact("listening", ", ".join(f"{name} {port}" for name, port in ports.items()))
            for remark in remarks:
                stage.fact("", remark)
            stage.fact("started in", f"{time.perf_counter() - since:.1f} s")
            site = await _site(config, ports)
            stage.fact("the API", site.base)
            story = Story(site, stage, secrets.token_hex(3).upper())
            try:
                await asyncio.to_thread(story.tell)
                hands = None if once else await asyncio.to_thread(lay_out, story, config.data_dir)
            except (Unexpected, ConnectionClosed, NotConnected, HandshakeFailed, OSError, KeyError) as error:
                complain(
                    f"the demo failed in step {stage.number}: {_reason(error)} (log: {config.data_dir / 'demo.log'})"
                )
                return FAILED
            stage.verbatim("")
            stage.heading(f"All {len(STEPS)} steps held.")
            if hands is not None:
                _print_commands(stage, config, story, hands)
                signals.listen()
                stage.heading("Serving. Ctrl-C stops.")
                await signals.asked.wait()
        finally:
            await server.stop()
            signals.ignore()
    return 0


class Stage:
    """Where the story is told: lines on standard output, readable without colour and when piped."""

    def __init__(self) -> None:
        self.number = 0
        self._console = console()

    def heading(self, text: str) -> None:
        """A line that stands out."""
        self._line(text, "bold")

    def fact(self, name: str, value: str) -> None:
        """A name and its value."""
        self._line(f"  {name:<15} {plain(value)}")

    def step(self, number: int, title: str) -> None:
        """A new step begins."""
        self.number = number
        self._line("")
        self._line(f"{number}. {title}", "bold cyan")

    def exchange(self, what: str, outcome: str, milliseconds: float | None) -> None:
        """Something was asked and answered."""
        took = f"{milliseconds:8.1f} ms" if milliseconds is not None else ""
        self._line(f"   {plain(what):<58} {plain(outcome):<20}{took}".rstrip(), "dim")

    def note(self, text: str) -> None:
        """What it means."""
        self._line(f"   -> {plain(text)}")

    def verbatim(self, text: str) -> None:
        """Lines to be copied: nothing is added, cut or folded."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)
        sys.stdout.flush()


def _print_commands(stage: Stage, config: Config, story: Story, hands: Hands) -> None:
    stage.verbatim("")
    stage.heading("Try it from another terminal. Paste these lines first:")
    stage.verbatim("")
    for name, value in variables(story, hands):
        stage.verbatim(f"export {name}={shlex.quote(value)}")
    stage.verbatim("")
    stage.heading("Then, one by one:")
    for chapter in chapters(config.data_dir, _own_command()):
        stage.verbatim("")
        stage.heading(chapter.title)
        for paste in chapter.pastes:
            stage.verbatim(f"\n# {paste.what}{' (goes on until Ctrl-C)' if paste.endless else ''}")
            stage.verbatim(paste.command)
    stage.verbatim(f"\n# the API in a browser: {story.site.base.removesuffix(BASE)}/docs")
    stage.verbatim("")


def _own_command() -> str:
    beside = Path(sys.executable).with_name("gatehouse")
    if not beside.is_file():
        return "gatehouse"
    return shlex.quote(str(beside))


async def _site(config: Config, ports: Mapping[str, int]) -> Site:
    """The tenant, made at the first run, and a token of its administrator."""
    async with open_registry(config, environ=os.environ) as core:
        try:
            tenant = await core.registry.tenants.find(TENANT_SLUG)
        except NotFound:
            tenant = await core.registry.tenants.create("Demo", TENANT_SLUG, cli_actor())
        lifetime = min(TOKEN_LIFETIME, timedelta(seconds=config.security.operator_token_max_seconds))
        token = sign_token(config, core, tenant, Role.TENANT_ADMIN, frozenset(), lifetime, "demo operator")
    return Site(
        _reachable(config.https.host),
        ports["https"],
        Listener(_reachable(config.mqtt.host), ports["mqtt"]),
        Listener(_reachable(config.coap.host), ports["coap"]),
        config.data_dir / "ca-chain.pem",
        token,
    )


def _for_demo(config: Config) -> Config:
    """The built-in CA's certificate, whatever else is configured: the demo's clients trust that CA alone."""
    return msgspec.structs.replace(config, https=msgspec.structs.replace(config.https, certificate=None, key=None))


def _with_free_ports(config: Config) -> tuple[Config, list[str]]:
    """The configuration with free ports where the configured ones are taken, and what to say about it."""
    remarks: list[str] = []
    https, mqtt, coap, ops = config.https, config.mqtt, config.coap, config.ops
    if not _is_free(https.host, https.port):
        remarks.append(f"port {https.port} (https) is in use, so a free one was taken")
        https = msgspec.structs.replace(https, port=0)
    if not _is_free(mqtt.host, mqtt.port):
        remarks.append(f"port {mqtt.port} (mqtt) is in use, so a free one was taken")
        mqtt = msgspec.structs.replace(mqtt, port=0)
    if not _is_free(coap.host, coap.port, socket.SOCK_DGRAM):
        remarks.append(f"port {coap.port} (coap) is in use, so a free one was taken")
        coap = msgspec.structs.replace(coap, port=0)
    if not _is_free(ops.host, ops.port):
        remarks.append(f"port {ops.port} (ops) is in use, so a free one was taken")
        ops = msgspec.structs.replace(ops, port=0)
    return msgspec.structs.replace(config, https=https, mqtt=mqtt, coap=coap, ops=ops), remarks


def _is_free(host: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> bool:
    """Whether somebody could listen there now. What cannot be found out is left to the listener to say."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=kind)[0]
        with socket.socket(family, kind, protocol) as probe:
            if kind is socket.SOCK_DGRAM:  # with SO_REUSEADDR two of them could be bound at once
                probe.bind(address)
                return True
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def _reachable(host: str) -> str:
    """Where a client on this machine finds a listener of `host`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


@contextmanager
def _log_file(path: Path, level: str) -> Iterator[None]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with logs.configure(level, descriptor=descriptor):
            yield
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    match error:
        case KeyError():
            return f"an answer has no field {error}"
        case _:
            return str(error) or type(error).__name__
