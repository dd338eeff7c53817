"""A core that has no room: nothing is lost, nothing is promised, nobody else waits, and memory stays where it is.

The database stands still (a lock on the table that is written), a small queue is filled from elsewhere, and then
devices publish:

    MQTT 5, QoS 1 and 2     0x97 at once, nothing is stored, the connection goes on; the same message is taken later
    3.1.1, and every QoS 0  no answer and no loss: what was read waits and is tried again, the rest is not read
    everybody else          pings, commands, subscriptions and messages of other queues go on

What waits is bounded by what one peer may have unanswered (machine_limits.py), however much it sends. When the database
goes on, everything is acknowledged in its order, and what is stored is exactly what was not refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from uuid import UUID

import pytest
import pytest_asyncio

from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.wire import encode
from adapters.mqtt.wire_packets import Ack, Ping, Publish, QoS
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from registry.errors import Unavailable
from registry.messaging_limits import MessagingLimits
from registry.messaging_values import Message, Publication
from registry.model import DeviceId, Transport
from registry.payloads import Source, payload_from_json, uplink_from
from registry.uplinks import UplinkLimits, Uplinks
from tests.http_api import BASE, running_api
from tests.mqtt_devices import profile, silent
from tests.mqtt_server import Client, Device, Running, serving_mqtt
from tests.nodes import until
from tests.postgres import PostgresServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

VERSIONS = pytest.mark.parametrize("version", list(Version), ids=["3.1.1", "5.0"])
Q0, Q1, Q2 = QoS
QUEUE = 8
PAUSES = ServerLimits(full_pause=0.02, crowded_pause=0.002)
TRIES = 5
"""How often the core was asked again, in vain, before a test believes that no answer comes."""


@dataclass
class Core:
    """A server whose core has little room, and somebody else who can fill it."""

    mqtt: Running
    other: Device
    fillers: list[asyncio.Future[object]] = field(default_factory=list)
    made: int = 0

    async def device(self) -> Device:
        """One that nobody had before."""
        self.made += 1
        return await self.mqtt.device(f"HW-{self.made}", profile_id="p_site")

    @property
    def uplinks(self) -> Uplinks:
        return self.mqtt.api.registry.uplinks

    @asynccontextmanager
    async def full(self) -> AsyncIterator[None]:
        """Inside, the database stands still and the queue of uplinks has no place left."""
        async with self.standing_still("uplink"):
            source = Source(self.mqtt.api.tenant_id, DeviceId(UUID(self.other.device_id)), Transport.HTTPS)
            uplink = uplink_from(source, payload_from_json(b'{"n": 0}'), kind="event")
            async with asyncio.timeout(10):
                while True:
                    try:
                        self.fillers.append(self.uplinks.submit(uplink))
                    except Unavailable:
                        if self.uplinks.queued == QUEUE and len(self.fillers) > QUEUE:
                            break
                    await asyncio.sleep(0.001)
            yield
            assert self.uplinks.queued == QUEUE  # it was so all the time: nothing was taken inside

    @asynccontextmanager
    async def standing_still(self, table: str) -> AsyncIterator[None]:
        """Inside, nothing can be written to a table. A lock that takes no transaction id: the feed of events waits for
        transactions that have one and are under way, and the rest of the core is to go on."""
        async with self.mqtt.api.database.transaction() as connection:
            await connection.execute(f"LOCK TABLE {table} IN SHARE MODE")
            yield

    async def tried_again(self) -> None:
        """Who waits has asked several times more, in vain."""
        seen = self.uplinks.turned_away
        await until(lambda: self.uplinks.turned_away >= seen + TRIES)

    async def stored(self, device: Device) -> list[int]:
        """The numbers in the device's uplinks, each as often as it is stored."""
        async with self.mqtt.api.database.connection() as connection:
            rows = await connection.fetch("SELECT payload FROM uplink WHERE device_id = $1", UUID(device.device_id))
        return sorted(row["payload"]["n"] for row in rows)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def site(postgres_server: PostgresServer) -> AsyncIterator[Core]:
    dsn = postgres_server.create_database()
    limits = UplinkLimits(queue=QUEUE, batch=4, runners=1)
    messaging = MessagingLimits(waiting=4, batch=2)
    try:
        async with running_api(dsn) as api:
            api.registry = replace(api.registry, uplinks=Uplinks(api.database, limits=limits))
            async with serving_mqtt(api, PAUSES, messaging) as mqtt:
                await profile(mqtt, [{"filter": "site/#", "allow": ["publish", "subscribe"]}])
                yield Core(mqtt, await mqtt.device("HW-filler"))
                assert mqtt.server.counters.failures == 0
                assert mqtt.server.counters.dropped == 0
            await api.registry.uplinks.stop()
    finally:
        postgres_server.drop_database(dsn)


@pytest_asyncio.fixture(loop_scope="module")
async def core(site: Core) -> AsyncIterator[Core]:
    """The server, with room again after each test."""
    yield site
    await asyncio.gather(*site.fillers)
    site.fillers.clear()
    await until(lambda: not site.mqtt.server.devices.by_key and not site.mqtt.server.devices.leaving)


def publish(number: int, qos: QoS, topic: str = "devices/me/events", padding: str = "") -> Publish:
    payload = json.dumps({"n": number, "padding": padding}).encode()
    return Publish(topic, payload, qos, packet_id=0 if qos is Q0 else number)


async def send_all(client: Client, packets: Sequence[Publish]) -> None:
    await client.send_raw(b"".join(encode(packet, client.version) for packet in packets))


async def acknowledged(client: Client, number: int, kinds: frozenset[PacketType]) -> list[Ack]:
    """So many acknowledgements of these kinds; every PUBREC is answered."""
    got: list[Ack] = []
    while len(got) < number:
        packet = await client.expect(Ack)
        if packet.type in kinds:
            got.append(packet)
        if packet.type is PacketType.PUBREC and not packet.reason.failed:
            await client.send(Ack(PacketType.PUBREL, packet.packet_id))
    return got


ANSWERS = frozenset({PacketType.PUBACK, PacketType.PUBREC})


async def test_5_is_told_0x97_and_goes_on_and_what_was_refused_is_taken_later(core: Core) -> None:
    device = await core.device()
    async with core.mqtt.client() as client:
        await client.connect(device)
        full = core.mqtt.server.counters.full
        async with core.full():
            for number, (qos, kind) in enumerate(((Q1, PacketType.PUBACK), (Q2, PacketType.PUBREC)) * 2, 1):
                await client.send(publish(number, qos))
                answer = await client.expect(Ack)
                assert (answer.type, answer.packet_id, answer.reason) == (kind, number, ReasonCode.QUOTA_EXCEEDED)
                assert "full" in (answer.properties.reason_string or "")
            await silent(client)  # it is read again after each pause
            assert core.mqtt.server.counters.full >= full + 4
        await asyncio.gather(*core.fillers)
        assert await core.stored(device) == []
        for number, qos in enumerate((Q1, Q2) * 2, 1):  # the same packet ids, as of new messages [MQTT-4.3.3-9]
            await client.send(publish(number, qos))
            (answer,) = await acknowledged(client, 1, ANSWERS)
            assert (answer.packet_id, answer.reason) == (number, ReasonCode.SUCCESS)
            if qos is Q2:
                assert (await client.expect(Ack)).type is PacketType.PUBCOMP
    assert await core.stored(device) == [1, 2, 3, 4]


async def test_3_1_1_waits_without_an_answer_and_loses_nothing(core: Core) -> None:
    device = await core.device()
    packets = [publish(number, (Q1, Q2, Q0)[number % 3]) for number in range(1, 16)]
    named = [packet.packet_id for packet in packets if packet.packet_id]
    stored = core.mqtt.server.counters.stored
    async with core.mqtt.client(version=Version.V311) as client:
        await client.connect(device)
        async with core.full():
            await send_all(client, packets)
            hearing = asyncio.create_task(acknowledged(client, len(named), ANSWERS))
            await core.tried_again()
            assert client.received[1:] == []  # nothing after CONNACK
            assert not hearing.done()
        answers = await hearing
        for kind in ANSWERS:  # each kind in the order of its PUBLISHes [MQTT-4.6.0-2], [MQTT-4.6.0-3]
            expected = [p.packet_id for p in packets if p.qos is (Q1 if kind is PacketType.PUBACK else Q2)]
            assert [a.packet_id for a in answers if a.type is kind] == expected
        await until(lambda: core.mqtt.server.counters.stored == stored + len(packets))
        await client.send(Ping(PacketType.PINGREQ))
        while not isinstance(client.received[-1], Ping):
            await client.packet()
        completed = [a.packet_id for a in client.received if isinstance(a, Ack) and a.type is PacketType.PUBCOMP]
        assert completed == [p.packet_id for p in packets if p.qos is Q2]
    assert await core.stored(device) == list(range(1, 16))


@VERSIONS
async def test_qos_0_waits_in_both_versions(core: Core, version: Version) -> None:
    device, stored = await core.device(), core.mqtt.server.counters.stored
    async with core.mqtt.client(version=version) as client:
        await client.connect(device)
        async with core.full():
            await send_all(client, [publish(number, Q0) for number in range(1, 6)])
            await core.tried_again()
        await until(lambda: core.mqtt.server.counters.stored == stored + 5)
    assert await core.stored(device) == [1, 2, 3, 4, 5]


async def test_what_waits_is_bounded_however_much_is_sent(core: Core) -> None:
    device, number = await core.device(), 600
    limits = core.mqtt.server.limits.machine
    async with core.mqtt.client(version=Version.V311) as client:
        await client.connect(device)
        peer = next(p for p in core.mqtt.server.peers if p.session is not None)
        async with core.full():
            packets = [publish(n, Q1, padding="x" * 6_000) for n in range(1, number + 1)]
            sending = asyncio.create_task(send_all(client, packets))
            await until(lambda: not peer.machine.wants_read)
            for _ in range(TRIES):
                await core.tried_again()
                assert peer.machine._unanswered <= limits.unanswered_messages
                assert peer.machine._unanswered_bytes <= limits.unanswered_bytes + limits.packet_bytes
                assert peer.machine._framer.buffered <= limits.packet_bytes + (1 << 18)  # one read beyond
                assert not peer.machine.wants_read
            assert client.received[1:] == []
        answers = await acknowledged(client, number, ANSWERS)
        await sending
        assert [a.packet_id for a in answers] == list(range(1, number + 1))
    assert await core.stored(device) == list(range(1, number + 1))


async def test_the_others_go_on(core: Core) -> None:
    """Pings, commands to devices, answers to SUBSCRIBE, configurations, and messages that are no uplinks."""
    one, other = await core.device(), await core.device()
    async with (
        core.mqtt.client(version=Version.V311) as stuck,
        core.mqtt.client(version=Version.V311) as listener,
        core.mqtt.client() as sender,
    ):
        for client, device, name in ((stuck, one, "stuck"), (listener, other, "listener"), (sender, one, "sender")):
            await client.connect(device, client_id=name)
        async with core.full():
            await stuck.send(publish(1, Q1))
            await core.tried_again()
            await listener.send(Ping(PacketType.PINGREQ))
            assert isinstance(await listener.packet(), Ping)
            await listener.subscribe("devices/me/commands", "site/#")
            async with core.mqtt.api.operator() as operator:
                asked = {"method": "blink", "params": {}}
                made = await operator.post(f"{BASE}/devices/{other.device_id}/commands", json=asked)
                assert made.status_code == 201, made.text
            assert (await listener.message()).topic == "devices/me/commands"
            assert await sender.publish("site/a", b"brokered") is ReasonCode.SUCCESS
            assert (await listener.message()).payload == b"brokered"
            async with core.mqtt.client() as newcomer:
                assert (await newcomer.connect(other, client_id="newcomer")).reason is ReasonCode.SUCCESS
        assert (await stuck.expect(Ack)).packet_id == 1
    assert await core.stored(one) == [1]


async def test_a_client_that_goes_while_it_waits_repeats_and_it_is_stored_once(core: Core) -> None:
    """With QoS 2 in a session that is kept, whether its first message was taken after it had gone, or never."""
    device = await core.device()
    async with core.full(), core.mqtt.client(version=Version.V311) as client:
        await client.connect(device, clean_start=False)
        await client.send(publish(1, Q2))
        await core.tried_again()
        assert client.received[1:] == []
    async with core.mqtt.client(version=Version.V311) as client:
        assert (await client.connect(device, clean_start=False)).session_present
        await client.send(replace(publish(1, Q2), dup=True))
        (answer,) = await acknowledged(client, 1, ANSWERS)
        assert (answer.type, answer.packet_id) == (PacketType.PUBREC, 1)
        assert (await client.expect(Ack)).type is PacketType.PUBCOMP
    assert await core.stored(device) == [1]


async def test_a_queue_of_brokered_messages_that_is_full_is_no_different(core: Core) -> None:
    one, other = await core.device(), await core.device()
    messaging, tenant_id = core.mqtt.server.broker.messaging, core.mqtt.api.tenant_id
    own = DeviceId(UUID(other.device_id))
    async with core.mqtt.client() as five, core.mqtt.client(version=Version.V311) as three:
        await five.connect(one, client_id="five")
        await three.connect(one, client_id="three")
        filled: list[asyncio.Future[object]] = []
        async with core.standing_still("messaging_retained"):
            async with asyncio.timeout(10):
                while True:
                    kept = Message("site/filler", b"x", 1, True)
                    try:
                        filled.append(messaging.publish(Publication(tenant_id, own, kept)))
                    except Unavailable:
                        if messaging.queued == 4 and len(filled) > 4:
                            break
                    await asyncio.sleep(0.001)
            for qos in (Q1, Q2):
                refused = await five.publish("site/five", b"x", qos, retain=True)
                assert refused is ReasonCode.QUOTA_EXCEEDED
            packets = [
                Publish("site/three", b"%d" % n, qos, retain=True, packet_id=n if qos else 0)
                for n, qos in enumerate((Q1, Q2, Q0, Q1), 1)
            ]
            await send_all(three, packets)
            seen = messaging.turned_away
            await until(lambda: messaging.turned_away >= seen + TRIES)
            assert three.received[1:] == []
            assert messaging.queued == 4
        answers = await acknowledged(three, 3, ANSWERS)
        assert sorted(a.packet_id for a in answers) == [1, 2, 4]
        await asyncio.gather(*filled)
        kept_topics = await messaging.retained_topics(tenant_id, "site")
        assert kept_topics == ["site/filler", "site/three"]
        (last,) = await messaging.retained(tenant_id, ["site/three"])
        assert last.message.payload == b"4"  # in their order
