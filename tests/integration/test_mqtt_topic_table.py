"""Who may touch which topic: CONTRACT §3's table, over both versions, and what a refusal must leave untouched.

Four kinds of clients (one without credentials, a device with an API key, one with a certificate, a gateway with a
child) publish, arm wills and subscribe on every topic of two tables, which say who may; everybody else must not.

    refused    PUBLISH    5.0: QoS 1 and 2 0x87 in PUBACK or PUBREC, QoS 0 DISCONNECT 0x87; 3.1.1: closed
               will       CONNACK 0x87, return code 5
               SUBSCRIBE  0x87; 3.1.1: 0x80
    never      a name with a wildcard: DISCONNECT 0x90 and CONNACK 0x90; closed in 3.1.1

After each refusal the two victims, a device of the same tenant and one of another, both listening to everything that
they may hear, have heard nothing; and not one row is there that was not there before: uplinks, retained and queued
messages, wills, answers to commands, reported configurations, devices, credentials. What is allowed arrives, is stored,
and reaches exactly who is meant, so that a server that refuses everything fails here, too.

One server, two tenants. In the suite QoS and retain go round from row to row and from client to client; the product of
all of them is
    MQTT_TABLE=full .venv/bin/pytest tests/integration/test_mqtt_topic_table.py
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
import pytest_asyncio

from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.wire_packets import (
    Ack,
    Connack,
    Disconnect,
    Ping,
    Publish,
    QoS,
    Will,
)
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from registry.model import DeviceId
from tests.http_api import BASE, running_api
from tests.mqtt_devices import KEEP, profile, regrant
from tests.mqtt_server import Client, Device, Gone, OwnKey, Running, serving_mqtt
from tests.nodes import until
from tests.postgres import PostgresServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

FULL = os.environ.get("MQTT_TABLE") == "full"
GRANTS: list[dict[str, Any]] = [
    {"filter": "site/#", "allow": ["publish", "subscribe"]},
    {"filter": "own/me/#", "allow": ["publish", "subscribe"]},
    {"filter": "read/#", "allow": ["subscribe"]},
    {"filter": "write/#", "allow": ["publish"]},
    {"filter": "vault/#", "allow": ["publish", "subscribe"]},
    {"filter": "vault/secret/#", "deny": ["publish", "subscribe"]},
]
WRITER: list[dict[str, Any]] = [{"filter": "#", "allow": ["publish"]}]
"""Of a device that may publish whatever a grant can reach: what it says must not reach those who were refused."""

VERSIONS = pytest.mark.parametrize("version", list(Version), ids=["3.1.1", "5.0"])
KINDS = ("nobody", "key", "certificate", "gateway")
DEVICES = frozenset({"key", "certificate", "gateway"})
GATEWAY, NOBODY_AT_ALL, PROVISIONER = frozenset({"gateway"}), frozenset[str](), frozenset({"nobody"})
WHO = pytest.mark.parametrize("kind", KINDS)
R = ReasonCode

PAYLOADS: Mapping[str, object] = {
    "telemetry": {"t": 1},
    "events": {"door": "open"},
    "health": {"uptime_s": 1},
    "components": [{"name": "main", "sensors": [{"name": "t", "type": "DOUBLE"}]}],
    "uplink": {"kind": "event", "payload": {"n": 1}},
}
REQUESTS: Mapping[str, object] = {
    "response": {"result": {"taken": True}},
    "reported": {"version": 1},
    "children": {"hardware_id": "CH-taken"},
    "renew": {"csr": OwnKey.new().csr()},
}
UP = (*PAYLOADS, "config/reported", "credentials/renew", "children", "commands/{command}/response")
DOWN = ("commands", "config", "credentials/renew/response", "children/response")

PUBLISH: tuple[tuple[str, frozenset[str]], ...] = (
    # one's own, under both names
    *((f"devices/{name}/{kind}", DEVICES) for kind, name in zip(PAYLOADS, ("me", "{own}") * 3, strict=False)),
    *((f"devices/me/{tail}", NOBODY_AT_ALL) for tail in (*DOWN, "nothing", "telemetry/more", "telemetry/")),
    ("devices/me/commands/x/response", NOBODY_AT_ALL),
    ("devices/{OWN}/telemetry", NOBODY_AT_ALL),
    ("devices/me", NOBODY_AT_ALL), ("devices", NOBODY_AT_ALL), ("devices//telemetry", NOBODY_AT_ALL),
    ("/devices/me/telemetry", NOBODY_AT_ALL), ("Devices/me/telemetry", NOBODY_AT_ALL), ("me/telemetry", NOBODY_AT_ALL),
    # a gateway's child's; what is the gateway's own is not done for a child
    ("devices/{child}/telemetry", GATEWAY), ("devices/{child}/events", GATEWAY),
    *((f"devices/{{child}}/{tail}", NOBODY_AT_ALL) for tail in (*DOWN, "credentials/renew", "children")),
    # another device's: of the same tenant, of another one, and nobody's
    *((f"devices/{{victim}}/{tail}", NOBODY_AT_ALL) for tail in (*UP, *DOWN)),
    *((f"devices/{{foreign}}/{tail}", NOBODY_AT_ALL) for tail in (*UP, *DOWN)),
    ("devices/{stranger}/telemetry", NOBODY_AT_ALL),
    # provisioning, and what begins with $
    ("provision/request", PROVISIONER), ("provision/response", NOBODY_AT_ALL), ("provision/request/x", NOBODY_AT_ALL),
    ("provision", NOBODY_AT_ALL), ("$SYS/broker/uptime", NOBODY_AT_ALL), ("$SYS", NOBODY_AT_ALL),
    ("$share/g/site/a", NOBODY_AT_ALL), ("$queue/site/a", NOBODY_AT_ALL), ("$me/x", NOBODY_AT_ALL),
    # granted, and not
    ("site/a", DEVICES), ("site", DEVICES), ("site/a/b/c", DEVICES), ("write/a", DEVICES), ("vault/a", DEVICES),
    ("own/{own}/x", DEVICES), ("own/{victim}/x", NOBODY_AT_ALL), ("own/me/x", NOBODY_AT_ALL), ("own", NOBODY_AT_ALL),
    ("read/a", NOBODY_AT_ALL), ("vault/secret", NOBODY_AT_ALL), ("vault/secret/x", NOBODY_AT_ALL),
    ("free", NOBODY_AT_ALL), ("/site/a", NOBODY_AT_ALL), ("Site/a", NOBODY_AT_ALL), ("sites", NOBODY_AT_ALL),
)  # fmt: skip
NO_NAMES = ("#", "+", "+/telemetry", "site/#", "site/+", "devices/+/telemetry", "$share/g/#", "$SYS/#")
"""What no message may be published to, whoever asks [MQTT-3.3.2-2]."""

SUBSCRIBE: tuple[tuple[str, frozenset[str]], ...] = (
    *((f"devices/me/{tail}", DEVICES) for tail in (*DOWN, "#", "+", "+/response", "credentials/#")),
    *((f"devices/{{own}}/{tail}", DEVICES) for tail in (*DOWN, "#")),
    *((f"devices/me/{tail}", NOBODY_AT_ALL) for tail in (*PAYLOADS, "commands/+/response", "config/reported", "no/#")),
    ("devices/me", NOBODY_AT_ALL), ("devices/{OWN}/commands", NOBODY_AT_ALL),
    *((f"devices/{{child}}/{tail}", GATEWAY) for tail in ("commands", "config", "#")),
    ("devices/{child}/telemetry", NOBODY_AT_ALL),
    *((f"devices/{{victim}}/{tail}", NOBODY_AT_ALL) for tail in (*DOWN, *PAYLOADS, "#", "+", "+/#")),
    *((f"devices/{{foreign}}/{tail}", NOBODY_AT_ALL) for tail in (*DOWN, *PAYLOADS, "#", "+")),
    *((text, NOBODY_AT_ALL) for text in (
        "#", "+", "+/#", "/#", "+/+", "+/+/#", "devices/#", "devices/+", "devices/+/#", "devices/+/commands",
        "devices/+/config", "+/me/commands", "+/{own}/commands", "+/{victim}/#", "devices", "devices/",
        "$share/g/#", "$share/g/+/#", "$share/g/devices/#", "$share/g/devices/{own}/commands",
        "$share/g/devices/me/#", "$share/g/devices/{victim}/commands", "$share/g/provision/#", "$share/g/$SYS/#",
        "$SYS/#", "$SYS/+", "$SYS/broker/load", "$queue/site/a", "$me/#",
        "provision", "provision/#", "provision/+", "provision/request", "$share/g/provision/response",
        "own/#", "own/+/x", "own/{victim}/#", "own/me/x", "+/a", "+/{own}/x", "write/a", "write/#", "free", "Site/a",
        "vault/#", "vault/+", "vault/+/x", "vault/secret", "vault/secret/#", "vault/secret/x", "sites",
        "$share/g/vault/#", "$share/g/vault/secret/x", "$share/g/write/a", "$share/g/own/{victim}/x", "$share/g/free",
    )),
    ("provision/response", PROVISIONER), ("provision/response/#", PROVISIONER), ("provision/response/7", PROVISIONER),
    *((text, DEVICES) for text in (
        "site/#", "site", "site/+", "site/a", "site/+/b/#", "read/#", "read/+", "own/{own}/#", "own/{own}/x",
        "vault/a", "vault/other/#", "$share/g/site/a", "$share/g/site/#", "$share/g/site/+/b", "$share/other/read/a",
    )),
)  # fmt: skip

ROWS = """
    SELECT (SELECT count(*) FROM uplink) AS uplinks, (SELECT count(*) FROM reading) AS readings,
           (SELECT count(*) FROM messaging_retained) AS retained, (SELECT count(*) FROM messaging_queue) AS queued,
           (SELECT count(*) FROM messaging_message) AS messages, (SELECT count(*) FROM messaging_will) AS wills,
           (SELECT count(*) FROM messaging_session) AS sessions, (SELECT count(*) FROM messaging_route) AS routes,
           (SELECT count(*) FROM command WHERE finished_at IS NOT NULL) AS answered,
           (SELECT count(*) FROM reported_config) AS reported, (SELECT count(*) FROM device) AS devices,
           (SELECT count(*) FROM credential) AS credentials, (SELECT count(*) FROM certificate) AS certificates
"""


@dataclass
class World:
    """Two tenants on one server, and two victims who listen."""

    mqtt: Running
    folder: Path
    devices: dict[str, Device] = field(default_factory=dict)
    certificate: Path = Path()
    child: str = ""
    victim: Device = field(default_factory=lambda: Device("", ""))
    foreign: Device = field(default_factory=lambda: Device("", ""))
    writer: Device = field(default_factory=lambda: Device("", ""))
    other_slug: str = ""
    command: str = ""
    """One that waits for the victim's answer."""
    listening: dict[str, Client] = field(default_factory=dict)

    def text(self, template: str, kind: str) -> str:
        """A row's topic, for one kind of client."""
        own = "" if kind == "nobody" else self.devices[kind].device_id
        names = {
            "{own}": own or self.victim.device_id,
            "{OWN}": own.upper() or "ME",
            "{child}": self.child,
            "{victim}": self.victim.device_id,
            "{foreign}": self.foreign.device_id,
            "{stranger}": str(uuid4()),
            "{command}": self.command,
        }
        for name, value in names.items():
            template = template.replace(name, value)
        return template

    def client(self, kind: str, version: Version) -> Client:
        return self.mqtt.client(self.certificate if kind == "certificate" else None, version)

    async def connect(self, client: Client, kind: str, **more: Any) -> Connack:
        match kind:
            case "nobody":
                return await client.connect(user_name="provision", **more)
            case "certificate":
                return await client.connect(**more)
            case _:
                return await client.connect(self.devices[kind], **more)

    async def rows(self) -> dict[str, int]:
        """How much is stored, of everything that a topic could reach, when all that was said is done."""
        await until(lambda: _is_quiet(self.mqtt))
        async with self.mqtt.api.database.connection() as connection:
            return dict(await connection.fetchrow(ROWS))

    async def heard(self, name: str) -> list[Publish]:
        """What a victim has heard since it was asked last, each message acknowledged."""
        client, messages = self.listening[name], []
        await client.send(Ping(PacketType.PINGREQ))
        while not isinstance(packet := await client.packet(), Ping):
            if isinstance(packet, Publish):
                messages.append(packet)
                kind = PacketType.PUBACK if packet.qos is QoS.AT_LEAST_ONCE else PacketType.PUBREC
                if packet.qos is not QoS.AT_MOST_ONCE:
                    await client.send(Ack(kind, packet.packet_id))
            elif isinstance(packet, Ack) and packet.type is PacketType.PUBREL:
                await client.send(Ack(PacketType.PUBCOMP, packet.packet_id))
        return messages

    async def undisturbed(self, topic: str) -> None:
        """Neither victim has heard anything."""
        for name in self.listening:
            assert await self.heard(name) == [], topic


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    dsn = postgres_server.create_database()
    try:
        async with running_api(dsn) as api, serving_mqtt(api) as mqtt:
            world = World(mqtt, tmp_path_factory.mktemp("table"))
            await _populate(world)
            async with mqtt.client() as victim, mqtt.client() as foreign:
                for name, client, device in (("victim", victim, world.victim), ("foreign", foreign, world.foreign)):
                    await client.connect(device, client_id="victim")
                    filters = ("devices/me/#", "site/#", f"own/{device.device_id}/#", "read/#", "vault/a")
                    assert not any(r.failed for r in await client.subscribe(*filters, qos=QoS.EXACTLY_ONCE))
                    world.listening[name] = client
                for client, expected in ((victim, {"commands", "config"}), (foreign, {"config"})):
                    first = [await client.message() for _ in expected]  # what comes by subscribing
                    assert {message.topic.rpartition("/")[2] for message in first} == expected
                await until(lambda: _is_quiet(mqtt))
                yield world
    finally:
        postgres_server.drop_database(dsn)


def _is_quiet(mqtt: Running) -> bool:
    return not mqtt.server.devices.leaving and not any(peer.machine.busy for peer in mqtt.server.peers)


async def _populate(world: World) -> None:
    api = world.mqtt.api
    await profile(world.mqtt, GRANTS)
    await profile(world.mqtt, WRITER, "p_writer")
    for name in ("key", "gateway"):
        world.devices[name] = await world.mqtt.device(f"HW-{name}", profile_id="p_site")
    world.victim = await world.mqtt.device("HW-victim", profile_id="p_site")
    world.writer = await world.mqtt.device("HW-writer", profile_id="p_writer")
    async with api.operator() as operator:
        minted = {"name": "With a certificate", "profile_id": "p_site"}
        token = (await operator.post(f"{BASE}/devices/registration/tokens", json=minted)).json()["token"]
        asked = {"method": "wait", "params": {}}
        command = await operator.post(f"{BASE}/devices/{world.victim.device_id}/commands", json=asked)
        world.command = command.json()["command_id"]
    key = OwnKey.new()
    async with api.client() as device:
        issued = (await device.post(f"{BASE}/devices/provision", json={"token": token, "csr": key.csr()})).json()
    world.certificate = key.with_certificate(world.folder, issued["certificate"])
    world.devices["certificate"] = Device(issued["device_id"], "")
    async with world.mqtt.client() as gateway:
        await gateway.connect(world.devices["gateway"])
        await gateway.publish("devices/me/children", {"hardware_id": "CH-1"}, QoS.AT_MOST_ONCE)
        world.child = msgspec.json.decode((await gateway.message()).payload)["device_id"]
    world.other_slug = await api.another_tenant()
    async with api.operator(tenant=world.other_slug) as operator:
        body = {"name": "Site", "profile_id": "p_site", "topic_grants": GRANTS}
        assert (await operator.post(f"{BASE}/profiles", json=body)).status_code == 201
        made = {"name": "Foreign", "hardware_id": "HW-foreign", "profile_id": "p_site"}
        answer = (await operator.post(f"{BASE}/devices", json=made)).json()
    world.foreign = Device(answer["device_id"], answer["api_key"])


def ways(row: int, kind: str, version: Version) -> Sequence[tuple[QoS, bool]]:
    """The QoS and retain flags that a row is tried with: all of them, or one or two that go round."""
    every = list(product(QoS, (False, True)))
    if FULL:
        return every
    turn = row + KINDS.index(kind) + 2 * (version is Version.V5)
    if version is Version.V311:  # where each one takes a connection
        return [every[turn % 6]]
    return [every[turn % 6], every[(turn + 3) % 6]]  # one with the other flag, and another QoS


def payload_of(topic: str) -> bytes:
    """What would be taken there, were the topic allowed."""
    last = topic.rpartition("/")[2]
    return msgspec.json.encode(PAYLOADS.get(last) or REQUESTS.get(last, {"n": 1}))


# Publishing -----------------------------------------------------------------------------------------------------------


async def refused_publish(
    world: World, kind: str, version: Version, topic: str, ways: Sequence[tuple[QoS, bool]], reason: ReasonCode
) -> None:
    """Every way is refused; a connection serves as long as it lasts. A name that is none always ends it."""
    client = world.client(kind, version)
    connected = False
    for qos, retain in ways:
        if not connected:
            await client.__aenter__()
            assert (await world.connect(client, kind)).reason is R.SUCCESS
            connected = True
        packet_id = 0 if qos is QoS.AT_MOST_ONCE else client.new_id()
        await client.send(Publish(topic, payload_of(topic), qos, retain, packet_id=packet_id))
        if version is Version.V5 and qos is not QoS.AT_MOST_ONCE and reason is R.NOT_AUTHORIZED:
            answer = await client.expect(Ack)
            kind_of = PacketType.PUBACK if qos is QoS.AT_LEAST_ONCE else PacketType.PUBREC
            assert (answer.type, answer.packet_id, answer.reason) == (kind_of, packet_id, reason), topic
            continue
        rest = await client.closed()
        assert [type(p) for p in rest] == [Disconnect] * (version is Version.V5), (topic, rest)
        assert [p.reason for p in rest if isinstance(p, Disconnect)] == [reason] * (version is Version.V5), topic
        client.drop()
        client, connected = world.client(kind, version), False
    client.drop()


@VERSIONS
@WHO
async def test_publishing(world: World, kind: str, version: Version) -> None:
    before = await world.rows()
    for row, (template, allowed) in enumerate(PUBLISH):
        if kind in allowed:
            continue
        if not FULL and kind in ("key", "certificate") and (row + (kind == "key") + (version is Version.V5)) % 2:
            continue  # a key in one version, a certificate in the other
        topic = world.text(template, kind)
        await refused_publish(world, kind, version, topic, ways(row, kind, version), R.NOT_AUTHORIZED)
        await world.undisturbed(topic)
    for row, topic in enumerate(NO_NAMES):
        await refused_publish(world, kind, version, topic, ways(row, kind, version)[:1], R.TOPIC_NAME_INVALID)
        await world.undisturbed(topic)
    assert await world.rows() == before


@VERSIONS
@WHO
async def test_what_is_allowed_is_published_and_reaches_who_is_meant(world: World, kind: str, version: Version) -> None:
    async with world.client(kind, version) as client:
        await world.connect(client, kind)
        for row, (template, allowed) in enumerate(PUBLISH):
            if kind not in allowed or kind == "nobody":
                continue
            topic = world.text(template, kind)
            for qos, retain in ways(row, kind, version):
                before = await world.rows()
                assert await client.publish(topic, payload_of(topic), qos, retain=retain) in (None, R.SUCCESS), topic
                if qos is QoS.AT_MOST_ONCE:  # the answer to what comes behind it
                    await client.publish("devices/me/events", {"behind": 1})
                    await until(lambda: _is_quiet(world.mqtt))
                after = await world.rows()
                grown = after["uplinks"] - before["uplinks"] - (qos is QoS.AT_MOST_ONCE)
                await _arrived(world, topic, qos, retain)
                kept = await world.mqtt.server.broker.messaging.retained_topics(world.mqtt.api.tenant_id, topic)
                if topic.startswith("devices/"):
                    assert (grown, kept) == (1, []), topic  # stored as an uplink, and never retained
                else:
                    assert (grown, topic in kept) == (0, retain), topic
                    if retain:
                        await client.publish(topic, b"", retain=True)
                        await world.heard("victim")


async def _arrived(world: World, topic: str, qos: QoS, retain: bool) -> None:
    """A granted message is with the victim of the same tenant, if its filters match; nothing else is with anybody."""
    matching = topic.startswith(("site", "vault/a"))
    expected = [(topic, payload_of(topic), qos, False)] * matching
    assert [(m.topic, m.payload, m.qos, m.retain) for m in await world.heard("victim")] == expected
    assert await world.heard("foreign") == []


# Wills ----------------------------------------------------------------------------------------------------------------


@VERSIONS
@WHO
async def test_wills(world: World, kind: str, version: Version) -> None:
    """A will that is not allowed is refused before anything begins, and so never comes, however the client ends."""
    before = await world.rows()
    for row, (template, allowed) in enumerate(PUBLISH):
        topic = world.text(template, kind)
        if kind in allowed and kind != "nobody":
            continue
        if not FULL and (row + KINDS.index(kind) + (version is Version.V5)) % 2:
            continue  # the other version has this row's turn
        for qos, retain in ways(row, kind, version)[: None if FULL else 1]:
            await _refused_will(world, kind, version, Will(topic, payload_of(topic), qos, retain), R.NOT_AUTHORIZED)
    for topic in NO_NAMES:
        will = Will(topic, b"{}", QoS.AT_LEAST_ONCE, True)
        await _refused_will(world, kind, version, will, R.TOPIC_NAME_INVALID)
    await until(lambda: _is_quiet(world.mqtt))
    await world.undisturbed("wills")
    assert await world.rows() == before


async def _refused_will(world: World, kind: str, version: Version, will: Will, reason: ReasonCode) -> None:
    async with world.client(kind, version) as client:
        if version is Version.V311 and reason is R.TOPIC_NAME_INVALID:  # it has no return code for this
            with pytest.raises(Gone):
                await world.connect(client, kind, will=will)
            return
        connack = await world.connect(client, kind, will=will)
        assert (connack.reason, connack.session_present) == (reason, False), will
        assert await client.closed() == []


@VERSIONS
@pytest.mark.parametrize("kind", sorted(DEVICES))
async def test_wills_that_are_allowed_come_and_reach_who_is_meant(world: World, kind: str, version: Version) -> None:
    for row, (template, allowed) in enumerate(PUBLISH):
        if kind not in allowed:
            continue
        topic = world.text(template, kind)
        qos, retain = ways(row, kind, version)[0]
        before = await world.rows()
        async with world.client(kind, version) as client:
            connack = await world.connect(client, kind, will=Will(topic, payload_of(topic), qos, retain))
            assert connack.reason is R.SUCCESS, topic
        messaging = world.mqtt.server.broker.messaging
        for name in ("wills", "sessions"):  # it has been published, and the session is over
            await _until_rows(world, name, before[name])
        if topic.startswith("devices/"):
            await _until_rows(world, "uplinks", before["uplinks"] + 1)
            assert await messaging.retained_topics(world.mqtt.api.tenant_id, topic) == []
            await world.undisturbed(topic)
            continue
        if retain:
            await _until_rows(world, "retained", before["retained"] + 1)
            assert topic in await messaging.retained_topics(world.mqtt.api.tenant_id, topic)
        if topic.startswith(("site", "vault/a")):
            got = await world.listening["victim"].message()
            assert (got.topic, got.payload, got.qos, got.retain) == (topic, payload_of(topic), qos, False)
            if qos is QoS.EXACTLY_ONCE:
                await world.listening["victim"].send(Ack(PacketType.PUBREC, got.packet_id))
            await world.heard("victim")
        assert await world.heard("foreign") == []
        kept = await messaging.retained(world.mqtt.api.tenant_id, [topic])
        await messaging.forget_retained(world.mqtt.api.tenant_id, [(each.device_id, topic) for each in kept])


async def _until_rows(world: World, name: str, number: int) -> None:
    async with asyncio.timeout(10):
        while (await world.rows())[name] != number:
            await asyncio.sleep(0.01)


# Subscribing ----------------------------------------------------------------------------------------------------------


@VERSIONS
@WHO
async def test_subscribing(world: World, kind: str, version: Version) -> None:
    """Refused ones first, alone on their connection: whatever is said anywhere, it hears nothing."""
    refusal = R.NOT_AUTHORIZED if version is Version.V5 else R.UNSPECIFIED_ERROR
    refused = [world.text(template, kind) for template, allowed in SUBSCRIBE if kind not in allowed]
    granted = [world.text(template, kind) for template, allowed in SUBSCRIBE if kind in allowed]
    before = await world.rows()
    async with world.client(kind, version) as client:
        await world.connect(client, kind)
        for qos in QoS:
            reasons = await client.subscribe(*refused, qos=qos)  # many more than a provisioner may have
            assert dict(zip(refused, reasons, strict=True)) == dict.fromkeys(refused, refusal)
        await _say_everything(world)
        await client.send(Ping(PacketType.PINGREQ))
        assert isinstance(await client.packet(), Ping)
    after = await world.rows()
    assert after | {"uplinks": 0, "readings": 0} == before | {"uplinks": 0, "readings": 0}
    async with world.client(kind, version) as client:
        await world.connect(client, kind)
        for qos in (QoS.EXACTLY_ONCE, QoS.AT_LEAST_ONCE, QoS.AT_MOST_ONCE):
            reasons = await client.subscribe(*granted, qos=qos)
            for text, reason in zip(granted, reasons, strict=True):
                down = text.startswith("devices/")
                assert reason == (min(qos, QoS.AT_LEAST_ONCE) if down else qos), text


async def _say_everything(world: World) -> None:
    """Somebody who may publish all that grants can reach does, and the victims speak on their own topics."""
    async with world.mqtt.client() as writer:
        await writer.connect(world.writer)
        own = [device.device_id for device in (*world.devices.values(), world.victim)]
        topics = ["site/a", "site/a/b", "read/a", "write/a", "vault/secret/x", "vault/a", "free", "Site/a", "sites"]
        for topic in (*topics, *(f"own/{name}/x" for name in (*own, "me"))):
            for qos in (QoS.AT_MOST_ONCE, QoS.AT_LEAST_ONCE):
                assert await writer.publish(topic, topic.encode(), qos) in (None, R.SUCCESS), topic
        for topic in ("devices/x/commands", "provision/response", "$SYS/broker/load"):
            assert await writer.publish(topic, b"{}") is R.NOT_AUTHORIZED
    for victim in world.listening.values():
        await victim.send(Publish("devices/me/telemetry", b'{"t": 2}', QoS.AT_MOST_ONCE))
    await until(lambda: _is_quiet(world.mqtt))
    heard = {message.topic for message in await world.heard("victim")}
    assert heard == {"site/a", "site/a/b", "read/a", "vault/a", f"own/{world.victim.device_id}/x"}
    assert await world.heard("foreign") == []


async def test_a_message_by_an_alias_is_judged_as_by_its_name(world: World) -> None:
    """5.0 §3.3.2.3.4: an alias that was set with a refused message stands, and opens nothing."""
    before = await world.rows()
    for topic in (f"devices/{world.victim.device_id}/telemetry", "vault/secret/x", "read/a"):
        async with world.client("key", Version.V5) as client:
            await world.connect(client, "key")
            alias = Properties(topic_alias=1)
            assert await client.publish(topic, {"t": 1}, properties=alias) is R.NOT_AUTHORIZED
            for qos in (QoS.AT_LEAST_ONCE, QoS.EXACTLY_ONCE):
                assert await client.publish("", {"t": 1}, qos, properties=alias, retain=True) is R.NOT_AUTHORIZED
        await world.undisturbed(topic)
    assert await world.rows() == before


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_goes_to_who_asked_whatever_response_topic_it_names(world: World, kind: str) -> None:
    request = "provision/request" if kind == "nobody" else "devices/me/credentials/renew"
    for name in ("victim", "foreign"):
        for tail in ("commands", "config", "telemetry"):
            response = world.text(f"devices/{{{name}}}/{tail}", kind)
            async with world.client(kind, Version.V5) as client:
                await world.connect(client, kind)
                properties = Properties(response_topic=response, correlation_data=b"7")
                await client.publish(request, b"{}", QoS.AT_MOST_ONCE, properties=properties)
                answer = await client.message()
                assert (answer.topic, answer.properties.correlation_data) == (response, b"7")
                assert msgspec.json.decode(answer.payload)["status"] == "error"
            await world.undisturbed(response)


async def test_a_client_without_credentials_takes_no_session_over_and_keeps_none(world: World) -> None:
    for version in Version:
        async with world.client("nobody", version) as client:
            more: dict[str, Any] = {"properties": KEEP if version is Version.V5 else NO_PROPERTIES}
            connack = await world.connect(client, "nobody", client_id="victim", clean_start=False, **more)
            assert (connack.reason, connack.session_present) == (R.SUCCESS, False)
            await client.subscribe("provision/response")
        async with world.client("nobody", version) as client:
            connack = await world.connect(client, "nobody", client_id="victim", clean_start=False, **more)
            assert connack.session_present is False
    await world.undisturbed("victim")  # who is still connected under that client id


# Subscriptions that a session brings along ----------------------------------------------------------------------------

INHERITED = ("site/a", "site/#", "site/+", "$share/g/site/a", "$share/g/site/#")


@VERSIONS
@pytest.mark.parametrize("online", [False, True], ids=["away", "connected"])
async def test_inherited_subscriptions_end_with_their_grants(world: World, version: Version, online: bool) -> None:
    """Grants go while the session is away, or there: it has lost what they allowed, and nothing else."""
    name = f"p_{version.name.lower()}_{online}".lower()
    kept: list[dict[str, Any]] = [{"filter": "stays/#", "allow": ["subscribe"]}]
    await profile(world.mqtt, [*kept, {"filter": "site/#", "allow": ["subscribe"]}], name)
    device = await world.mqtt.device(f"HW-{name}", profile_id=name)
    more: dict[str, Any] = {"clean_start": False, "properties": KEEP if version is Version.V5 else NO_PROPERTIES}
    async with world.mqtt.client(version=version) as client, world.mqtt.client() as writer:
        await writer.connect(world.writer)
        await client.connect(device, **more)
        assert not any(reason.failed for reason in await client.subscribe(*INHERITED, "stays/a", "devices/me/commands"))
        if not online:
            client.drop()
            await until(lambda: _key(world, device) not in world.mqtt.server.devices.by_key)
            await until(lambda: _is_quiet(world.mqtt))
            await writer.publish("site/a", b"waits")  # queued by a grant that is about to go
        await regrant(world.mqtt, kept, name)
        if online:
            await until(lambda: not _shared_or_site(world, device))
        else:
            await _withdrawn(world, device)
        for qos in QoS:
            await writer.publish("site/a", b"after", qos)
            await writer.publish("stays/a", b"%d" % qos, qos)
        back = client if online else world.mqtt.client(version=version)
        if not online:
            await back.__aenter__()
            assert (await back.connect(device, **more)).session_present
        await writer.publish("site/a", b"later")
        await writer.publish("stays/a", b"last")
        got = [await back.message() for _ in range(4 if online else 3)]  # QoS 0 is not kept for who is away
        assert [m.payload for m in got] == [b"0", b"1", b"2", b"last"][0 if online else 1 :]
        async with world.mqtt.api.operator() as operator:  # its own topics do not hang on a grant
            asked = {"method": "still", "params": {}}
            await operator.post(f"{BASE}/devices/{device.device_id}/commands", json=asked)
        assert (await back.message()).topic == "devices/me/commands"
        back.drop()
    await world.heard("victim")


@VERSIONS
async def test_a_gateways_inherited_subscriptions_end_with_its_child(world: World, version: Version) -> None:
    gateway = await world.mqtt.device(f"HW-gw-{version.name}", profile_id="p_site")
    more: dict[str, Any] = {"clean_start": False, "properties": KEEP if version is Version.V5 else NO_PROPERTIES}
    async with world.mqtt.client(version=version) as client:
        await client.connect(gateway, **more)
        await client.publish("devices/me/children", {"hardware_id": f"CH-{version.name}"}, QoS.AT_MOST_ONCE)
        child = msgspec.json.decode((await client.message()).payload)["device_id"]
        filters = (f"devices/{child}/commands", f"devices/{child}/#")
        assert not any(reason.failed for reason in await client.subscribe(*filters, "devices/me/commands"))
        client.drop()
        await until(lambda: _key(world, gateway) not in world.mqtt.server.devices.by_key)
        await until(lambda: _is_quiet(world.mqtt))
    async with world.mqtt.api.operator() as operator:
        shown = (await operator.get(f"{BASE}/devices/{child}")).json()
        changed = {"name": shown["name"], "gateway_id": world.devices["gateway"].device_id}
        assert (await operator.put(f"{BASE}/devices/{child}", json=changed)).status_code == 200
        await operator.post(f"{BASE}/devices/{child}/commands", json={"method": "theirs", "params": {}})
        async with world.mqtt.client(version=version) as client:
            assert (await client.connect(gateway, **more)).session_present
            await operator.post(f"{BASE}/devices/{child}/commands", json={"method": "theirs", "params": {}})
            await operator.post(f"{BASE}/devices/{gateway.device_id}/commands", json={"method": "own", "params": {}})
            down = await client.message()
            assert (down.topic, msgspec.json.decode(down.payload)["method"]) == ("devices/me/commands", "own")
            reasons = await client.subscribe(*filters)
            assert all(reason.failed for reason in reasons)


def _key(world: World, device: Device) -> Any:
    return world.mqtt.api.tenant_id, DeviceId(UUID(device.device_id)), "one"


def _shared_or_site(world: World, device: Device) -> set[str]:
    """What a connected session still has of what it lost its grant for."""
    role = world.mqtt.server.devices.by_key[_key(world, device)]
    return set(INHERITED) & (set(role.brokered) | set(role.mqtt.subscriptions))


async def _withdrawn(world: World, device: Device) -> None:
    """Wait until a session that is away has lost them in the store, and what was queued by them."""
    messaging, tenant_id = world.mqtt.server.broker.messaging, world.mqtt.api.tenant_id
    async with asyncio.timeout(10):
        while True:
            routes = await messaging.offline_of_device(tenant_id, _key(world, device)[1])
            if {route.subscription.filter for route in routes}.isdisjoint(INHERITED):
                return
            await asyncio.sleep(0.01)


@VERSIONS
async def test_nothing_is_granted_by_default(world: World, version: Version) -> None:
    """A device without a profile has its own topics and no other."""
    world.devices["bare"] = bare = await world.mqtt.device(f"HW-bare-{version.name}")
    before = await world.rows()
    try:
        granted = [topic for topic, allowed in PUBLISH if allowed == DEVICES and not topic.startswith("devices/")]
        for row, template in enumerate(granted):
            topic = template.replace("{own}", bare.device_id)
            await refused_publish(world, "bare", version, topic, ways(row, "key", version), R.NOT_AUTHORIZED)
            will = Will(topic, b"{}", QoS.AT_LEAST_ONCE, bool(row % 2))
            await _refused_will(world, "bare", version, will, R.NOT_AUTHORIZED)
        filters = [text for text, allowed in SUBSCRIBE if allowed == DEVICES and not text.startswith("devices/")]
        async with world.client("bare", version) as client:
            await client.connect(bare)
            reasons = await client.subscribe(*(text.replace("{own}", bare.device_id) for text in filters))
            assert all(reason.failed for reason in reasons)
    finally:
        del world.devices["bare"]
    await world.undisturbed("bare")
    assert await world.rows() == before
