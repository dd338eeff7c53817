"""A whole batch of connected devices is revoked at once, under load and with full queues: all gone, no will, no return.

Every device of the batch has a stored session, a will, and a subscription whose messages it never acknowledges until
its queue is full. Some of them publish without a pause. Beside them live devices of no batch: one publishes and must
not notice, one hears the wills. That a will comes at all is shown by a bystander who dies; that none was on its
way, by a last message on the same topic after everything of the batch is gone from the store.

How long it took is printed, and never asserted. The suite revokes a hundred. A thousand:
    MQTT_REVOKED=1000 .venv/bin/pytest -s tests/integration/test_mqtt_revocation_load.py
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from adapters.mqtt.properties import Properties
from adapters.mqtt.wire_packets import Ack, Disconnect, Publish, QoS, Suback, Subscribe, SubscriptionRequest, Will
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from edge.postgres import attach_or_start
from tests.mqtt_load import CONNECTION_FAULTS, Account, Wire
from tests.processes import ServerProcess, server_process
from tests.whole_system import Tenant, new_tenant

REVOKED = int(os.environ.get("MQTT_REVOKED", "100"))
QUEUE = 20
BUSY = int(os.environ.get("MQTT_BUSY", "10"))
"""Each device of the batch whose number this divides publishes, too."""
ENVIRON = {
    "GATEHOUSE_MQTT__QUEUED_MESSAGES": str(QUEUE),
    "GATEHOUSE_MQTT__FULL_QUEUE_SECONDS": "0",
    "GATEHOUSE_LIMITS__FAILED_AUTHENTICATIONS_BURST": str(10 * REVOKED),
}
AT_ONCE = 40
PATIENCE = 60.0
GRANTS = [{"filter": "open/#", "allow": ["publish", "subscribe"]}]
KEPT = Properties(session_expiry_interval=3_600)


@dataclass
class Doomed:
    """A device of the batch, connected."""

    account: Account
    number: int
    version: Version
    heard: int = 0
    published: int = 0
    told: ReasonCode | None = None
    gone_at: float = 0.0
    full: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def client_id(self) -> str:
        return f"doomed-{self.number}"

    async def come(self) -> Wire:
        wire = await Wire.open(self.account, self.version)
        will = Will("open/wills", self.client_id.encode(), QoS.AT_LEAST_ONCE)
        kept = KEPT if self.version is Version.V5 else Properties()
        answer = await wire.connect(self.account, self.client_id, properties=kept, will=will)
        assert answer.reason is ReasonCode.SUCCESS, answer
        wire.send(Subscribe(1, (SubscriptionRequest("open/all", QoS.AT_LEAST_ONCE),)))
        assert isinstance(await wire.packet(), Suback)
        return wire

    async def live(self, wire: Wire) -> None:
        """Read without acknowledging, and publish if it is a busy one, until the end."""
        try:
            while True:
                match await wire.packet():
                    case Publish():
                        self.heard += 1
                        if self.heard == QUEUE:
                            self.full.set()
                            if self.number % BUSY == 0:
                                self._publish(wire)
                    case Ack(type=PacketType.PUBACK):
                        self.published += 1
                        self._publish(wire)
                    case Disconnect(reason=reason):
                        self.told = reason
                    case other:
                        raise AssertionError(other)
        except CONNECTION_FAULTS:
            self.gone_at = time.perf_counter()
        finally:
            wire.drop()

    def _publish(self, wire: Wire) -> None:
        wire.send(Publish("devices/me/events", b'{"n":1}', QoS.AT_LEAST_ONCE, packet_id=7))

    async def comes_back(self) -> ReasonCode:
        wire = await Wire.open(self.account, self.version)
        try:
            return (await wire.connect(self.account, self.client_id)).reason
        finally:
            wire.drop()


@pytest.mark.timeout(600)
async def test_a_revoked_batch_is_gone_whole_and_nobody_else_notices(tmp_path: Path) -> None:
    async with server_process(tmp_path / "D", ENVIRON) as server:
        tenant = await new_tenant(server, "batch")
        template_id, accounts = await _claimed(tenant)
        doomed = [Doomed(each, n, Version.V5 if n % 2 else Version.V311) for n, each in enumerate(accounts)]
        good, witness, dying = [await _spared(tenant, n) for n in range(3)]
        wires = await _in_portions(doomed, Doomed.come)
        living = [asyncio.create_task(d.live(w)) for d, w in zip(doomed, wires, strict=True)]
        hearing = await _subscribed(witness, "open/wills")
        latencies: list[float] = []
        publishing = asyncio.create_task(_publish_on(good, latencies))
        try:
            await _fill(good)
            await asyncio.wait_for(asyncio.gather(*(d.full.wait() for d in doomed)), PATIENCE)
            await _die(dying)
            assert (await _message(hearing)).payload == b"dying"
            began = time.perf_counter()
            async with tenant.operator() as operator:
                operator.timeout = PATIENCE
                answer = await operator.post(f"/provisioning/templates/{template_id}/revoke-devices")
            answered = time.perf_counter() - began
            await asyncio.wait_for(asyncio.gather(*living), PATIENCE)
            assert answer.status_code == 200, answer.text
            _judge(answer.json(), doomed)
            await _until_nothing_is_left(server, doomed)
            assert not publishing.done()
            await _say(good, "open/wills", b"last")
            assert (await _message(hearing)).payload == b"last", "a will of a revoked device"
            refused = Counter(await _in_portions(doomed[:AT_ONCE], Doomed.comes_back))
            assert refused.total() == min(REVOKED, AT_ONCE)
            assert set(refused) <= {ReasonCode.NOT_AUTHORIZED}
        finally:
            for task in (publishing, *living):
                task.cancel()
            await asyncio.gather(publishing, *living, return_exceptions=True)
            hearing.drop()
        _report(doomed, latencies, began, answered)
        assert await server.stop() == 0
        assert "Traceback" not in server.log_text()


def _report(doomed: list[Doomed], latencies: list[float], began: float, answered: float) -> None:
    gone, ranked = sorted(each.gone_at - began for each in doomed), sorted(latencies)
    print(
        f"\n{REVOKED} devices with {QUEUE} messages each: answered after {answered:.2f} s; "
        f"gone: first after {gone[0]:.2f} s, median {gone[len(gone) // 2]:.2f} s, last {gone[-1]:.2f} s; "
        f"beside it {len(ranked)} messages of the good device, median {1000 * ranked[len(ranked) // 2]:.1f} ms, "
        f"worst {1000 * ranked[-1]:.0f} ms, and {sum(each.published for each in doomed)} of the doomed"
    )


def _judge(receipt: dict[str, Any], doomed: list[Doomed]) -> None:
    assert (receipt["devices"], receipt["credentials"]) == (REVOKED, REVOKED)
    assert (receipt["remaining"], receipt["unconfirmed"]) == (0, 0)
    assert len(receipt["sessions"]) == REVOKED
    assert {each["transport"] for each in receipt["sessions"]} == {"mqtt"}
    told = {version: {each.told for each in doomed if each.version is version} for version in Version}
    assert told == {Version.V5: {ReasonCode.ADMINISTRATIVE_ACTION}, Version.V311: {None}}
    assert all(each.heard == QUEUE for each in doomed), "more than the queue takes, or twice"
    assert sum(each.published for each in doomed) > 0


async def _claimed(tenant: Tenant) -> tuple[str, list[Account]]:
    """The batch: claimed with one key, with the granted topics."""
    async with tenant.operator() as operator:
        body: dict[str, Any] = {"name": "Open", "profile_id": "p_open", "topic_grants": GRANTS}
        assert (await operator.post("/profiles", json=body)).status_code == 201
        made = (await operator.post("/provisioning/templates", json={"name": "T", "profile_id": "p_open"})).json()
        accounts: list[Account] = []
        context, port = tenant.server.tls(), tenant.server.ports["mqtt"]
        for n in range(REVOKED):
            claim = {"provision_key": made["provision_key"], "device_name": "D", "hardware_id": f"HW-{n}"}
            answer = await operator.post("/provision", json=claim)
            assert answer.status_code == 201, answer.text
            accounts.append(Account(port, context, answer.json()["device_id"], answer.json()["api_key"]))
    return made["template_id"], accounts


async def _spared(tenant: Tenant, number: int) -> Account:
    made = await tenant.registered(f"SPARED-{number}", profile_id="p_open")
    return Account(tenant.server.ports["mqtt"], tenant.server.tls(), made["device_id"], made["api_key"])


async def _in_portions(doomed: list[Doomed], work: Any) -> list[Any]:
    done: list[Any] = []
    for start in range(0, len(doomed), AT_ONCE):
        done += await asyncio.gather(*(work(each) for each in doomed[start : start + AT_ONCE]))
    return done


async def _subscribed(account: Account, topic: str) -> Wire:
    wire = await Wire.open(account, Version.V5)
    await wire.connect(account, "witness", clean_start=True)
    wire.send(Subscribe(1, (SubscriptionRequest(topic, QoS.AT_LEAST_ONCE),)))
    assert isinstance(await wire.packet(), Suback)
    return wire


async def _message(wire: Wire) -> Publish:
    async with asyncio.timeout(PATIENCE):
        packet = await wire.packet()
    assert isinstance(packet, Publish)
    wire.send(Ack(PacketType.PUBACK, packet.packet_id))
    return packet


async def _fill(account: Account) -> None:
    """One message into every queue of the batch, so often as they take it; then they take no more."""
    wire = await Wire.open(account, Version.V5)
    await wire.connect(account, "filler", clean_start=True)
    reasons = []
    for packet_id in range(1, QUEUE + 2):
        wire.send(Publish("open/all", b"x" * 200, QoS.AT_LEAST_ONCE, packet_id=packet_id))
        answer = await wire.packet()
        assert isinstance(answer, Ack)
        reasons.append(answer.reason)
    wire.drop()
    assert reasons == [ReasonCode.SUCCESS] * QUEUE + [ReasonCode.QUOTA_EXCEEDED]


async def _say(account: Account, topic: str, payload: bytes) -> None:
    wire = await Wire.open(account, Version.V5)
    await wire.connect(account, "speaker", clean_start=True)
    wire.send(Publish(topic, payload, QoS.AT_LEAST_ONCE, packet_id=1))
    answer = await wire.packet()
    assert isinstance(answer, Ack)
    assert answer.reason is ReasonCode.SUCCESS
    wire.drop()


async def _die(account: Account) -> None:
    """Connect with a will, and vanish."""
    wire = await Wire.open(account, Version.V5)
    await wire.connect(account, "dying", properties=KEPT, will=Will("open/wills", b"dying", QoS.AT_LEAST_ONCE))
    wire.drop()


async def _publish_on(account: Account, latencies: list[float]) -> None:
    """One message after the other, for ever; any fault ends it."""
    wire = await Wire.open(account, Version.V5)
    await wire.connect(account, "good", clean_start=True)
    while True:
        began = time.perf_counter()
        wire.send(Publish("devices/me/events", b'{"n":1}', QoS.AT_LEAST_ONCE, packet_id=1))
        answer = await wire.packet()
        assert isinstance(answer, Ack)
        assert not answer.reason.failed
        latencies.append(time.perf_counter() - began)


async def _until_nothing_is_left(server: ServerProcess, doomed: list[Doomed]) -> None:
    """Neither session nor queue nor will of the batch is in the store."""
    devices = [each.account.device_id for each in doomed]
    async with attach_or_start(server.data_dir) as postgres:
        connection = await asyncpg.connect(postgres.dsn)
        try:
            async with asyncio.timeout(PATIENCE):
                while await connection.fetchval(
                    """
                    SELECT (SELECT count(*) FROM messaging_session WHERE device_id = ANY ($1::uuid[]))
                         + (SELECT count(*) FROM messaging_will WHERE device_id = ANY ($1::uuid[]))
                         + (SELECT count(*) FROM messaging_queue)
                    """,
                    devices,
                ):
                    await asyncio.sleep(0.05)
        finally:
            await connection.close()
