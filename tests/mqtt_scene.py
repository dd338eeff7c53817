"""A whole server with hostile MQTT clients around it, and well-behaved ones beside them who must not notice.

A good device publishes QoS 1 on one connection and counts what goes wrong for it, and now and then a newcomer connects:
nothing may go wrong. The server's memory is sampled all the time. Latencies are printed, and only a bound that means
starvation fails. What an attack hits is looked up in `/metrics`: a limit that is hit unseen helps no operator.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import psutil

from adapters.mqtt.wire_packets import Ack, Disconnect, Publish, QoS
from adapters.mqtt.wire_reasons import ReasonCode, Version
from tests.mqtt_load import CONNECTION_FAULTS, Account, Wire
from tests.mqtt_websocket import FrameStream, opening, response_head
from tests.processes import ServerProcess, server_process
from tests.whole_system import Tenant, new_tenant, samples, value

STRAYS = int(os.environ.get("MQTT_STRAYS", "1000"))
DOSE = int(os.environ.get("MQTT_DOSE", "1"))
"""How many times the suite's dose of everything else."""
PLACES = max(400, STRAYS // 10)
"""For handshakes, as in the large dose: a fraction of what comes."""
SHORT = {
    "GATEHOUSE_LIMITS__TLS_HANDSHAKE_SECONDS": "2",
    "GATEHOUSE_LIMITS__TLS_HANDSHAKES": str(PLACES),
    "GATEHOUSE_LIMITS__HEADER_TIMEOUT_SECONDS": "2",
    "GATEHOUSE_LIMITS__UNAUTHENTICATED_KEEP_ALIVE_SECONDS": "2",
    "GATEHOUSE_MQTT__CONNECT_SECONDS": "2",
    "GATEHOUSE_LIMITS__SESSIONS_PER_DEVICE": "30",
    "GATEHOUSE_MQTT__QUEUED_MESSAGES": "140",
    "GATEHOUSE_MQTT__FULL_QUEUE_SECONDS": "300",
}
PATIENCE = 30.0
STARVED = 8.0
"""Seconds for one message of the good device: far above a shared machine's worst."""
PEAK = 200 << 20
"""Bytes above the start at any time; a thousand handshakes may take 50 MB of it."""
GRANTS = [{"filter": "open/#", "allow": ["publish", "subscribe"]}]
Opener = Callable[[Account], Awaitable[Wire]]


async def over_tls(account: Account) -> Wire:
    """A connection to the MQTT port."""
    return await Wire.open(account, Version.V5)


async def over_websocket(account: Account) -> Wire:
    """A connection to the HTTPS port, which is the account's, in frames."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", account.port, ssl=account.context, server_hostname="localhost"
    )
    try:
        writer.write(opening())
        head = await response_head(reader)
        assert head.startswith(b"HTTP/1.1 101 "), head
    except BaseException:  # also a test that ends meanwhile: nobody else would close it
        writer.transport.abort()
        raise
    stream = FrameStream(reader, writer)
    return Wire(cast(asyncio.StreamReader, stream), cast(asyncio.StreamWriter, stream), Version.V5)


@dataclass
class Scene:
    """A server, its operator, and who lives there."""

    server: ServerProcess
    tenant: Tenant
    context: ssl.SSLContext
    good: Account
    made: int = 0

    @property
    def websocket(self) -> Account:
        """The good device, on the HTTPS port."""
        return replace(self.good, port=self.server.ports["https"])

    async def account(self) -> Account:
        """A device of its own, with the granted topics."""
        self.made += 1
        made = await self.tenant.registered(f"HW-{self.made}", profile_id="p_open")
        return Account(self.server.ports["mqtt"], self.context, made["device_id"], made["api_key"])

    async def attacker(
        self, account: Account | None = None, version: Version = Version.V5, client_id: str = "attacker"
    ) -> Wire:
        """A connected hostile client."""
        account = account or await self.account()
        wire = await Wire.open(account, version)
        answer = await wire.connect(account, client_id, clean_start=True)
        assert answer.reason is ReasonCode.SUCCESS
        return wire

    async def count(self, name: str, **labels: str) -> float:
        """A sample of `/metrics`, 0 where there is none yet."""
        try:
            return value(await samples(self.server), name, **labels)
        except KeyError:
            return 0.0

    async def counted(self, before: float, at_least: int, name: str, **labels: str) -> None:
        """Wait until the metric has grown by so much."""
        async with asyncio.timeout(PATIENCE):
            while await self.count(name, **labels) < before + at_least:
                await asyncio.sleep(0.1)


@dataclass
class GoodDevice:
    """Publishes without a pause, remembers how that went, and samples the server's memory on the way."""

    account: Account
    open: Opener
    process: psutil.Process
    latencies: list[float] = field(default_factory=list)
    newcomers: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    peak: int = 0

    async def run(self) -> None:
        wire = await self.open(self.account)
        try:
            await wire.connect(self.account, "good", clean_start=True)
            while True:
                began = time.perf_counter()
                async with asyncio.timeout(STARVED):
                    wire.send(Publish("devices/me/events", b'{"n":1}', QoS.AT_LEAST_ONCE, packet_id=1))
                    answer = await wire.packet()
                if not isinstance(answer, Ack) or answer.reason.failed:
                    self.errors.append(repr(answer))
                self.latencies.append(time.perf_counter() - began)
                self.peak = max(self.peak, self.process.memory_info().rss)
                await asyncio.sleep(0.01)
        except CONNECTION_FAULTS as error:
            self.errors.append(repr(error))
        finally:
            wire.drop()

    async def welcome(self) -> None:
        """Newcomers, one after the other."""
        number = 0
        while True:
            number += 1
            began = time.perf_counter()
            try:
                async with asyncio.timeout(STARVED):
                    wire = await self.open(self.account)
                    try:
                        answer = await wire.connect(self.account, f"new-{number}", clean_start=True)
                        wire.send(Disconnect())
                        await wire.drain()
                    finally:
                        wire.drop()
                if answer.reason.failed:
                    self.errors.append(f"newcomer: {answer}")
            except CONNECTION_FAULTS as error:
                self.errors.append(f"newcomer: {error!r}")
            self.newcomers.append(time.perf_counter() - began)
            await asyncio.sleep(0.1)


@asynccontextmanager
async def undisturbed(scene: Scene, what: str, *, websocket: bool = False) -> AsyncIterator[GoodDevice]:
    """A good device publishes inside and others come, and must not have noticed anything."""
    account, way = (scene.websocket, over_websocket) if websocket else (scene.good, over_tls)
    good = GoodDevice(account, way, psutil.Process(scene.server.pid))
    before = good.process.memory_info().rss
    tasks = [asyncio.create_task(good.run()), asyncio.create_task(good.welcome())]
    try:
        async with asyncio.timeout(PATIENCE):
            while not (good.latencies and good.newcomers) and not good.errors:
                await asyncio.sleep(0.01)
        yield good
        served, welcomed = len(good.latencies), len(good.newcomers)
        async with asyncio.timeout(PATIENCE):
            while len(good.latencies) < served + 2 or len(good.newcomers) < welcomed + 1:
                assert good.errors == []
                await asyncio.sleep(0.01)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        _report(good, what, before)
    assert good.errors == []
    assert good.peak - before < PEAK


def _report(good: GoodDevice, what: str, before: int) -> None:
    ranked, came = sorted(good.latencies) or [0.0], sorted(good.newcomers) or [0.0]
    print(
        f"\n{what}: {len(ranked)} messages beside it, median {1000 * ranked[len(ranked) // 2]:.1f} ms, "
        f"worst {1000 * ranked[-1]:.1f} ms; {len(came)} newcomers, worst {1000 * came[-1]:.0f} ms; "
        f"memory {before >> 20} MiB, peak {(good.peak - before) / 2**20:+.1f} MiB"
    )


@asynccontextmanager
async def new_scene(folder: Path) -> AsyncIterator[Scene]:
    """A server of its own, with short times."""
    async with server_process(folder / "D", SHORT) as server:
        tenant = await new_tenant(server)
        async with tenant.operator() as operator:
            body = {"name": "Open", "profile_id": "p_open", "topic_grants": GRANTS}
            answer = await operator.post("/profiles", json=body)
            assert answer.status_code == 201, answer.text
        made = await tenant.registered("HW-good", profile_id="p_open")
        context = server.tls()
        yield Scene(server, tenant, context, Account(server.ports["mqtt"], context, made["device_id"], made["api_key"]))
        assert "Traceback" not in server.log_text()
