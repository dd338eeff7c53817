"""What the standards ask of a server as a whole: sessions, retained messages, order, shared subscriptions, transport.

tests/mqtt_conformance.toml names these tests beside the statements that they prove; what the machine alone can prove is
in tests/unit. One server for all tests: each has devices and topics of its own, so that none sees another's messages.

That nothing comes is asked with a ping. A message is handed to its receivers before its sender's PUBACK is written, and
a connection's packets keep their order, so after the PUBACK and a ping's answer nothing can be on its way any more.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import pytest_asyncio

from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.wire import encode
from adapters.mqtt.wire_packets import (
    Ack,
    Auth,
    Connack,
    Connect,
    Disconnect,
    Ping,
    Publish,
    QoS,
    RetainHandling,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Unsuback,
    Unsubscribe,
    Will,
)
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from tests.http_api import running_api
from tests.mqtt_devices import KEEP, profile, silent
from tests.mqtt_server import Client, Device, Running, serving_mqtt
from tests.nodes import until
from tests.postgres import PostgresServer
from tests.tls_peers import client_context

pytestmark = pytest.mark.asyncio(loop_scope="module")

VERSIONS = pytest.mark.parametrize("version", list(Version), ids=["3.1.1", "5.0"])
QOS = pytest.mark.parametrize("qos", list(QoS), ids=["qos0", "qos1", "qos2"])
Q0, Q1, Q2 = QoS
R = ReasonCode


@dataclass
class Site:
    """The server, and devices and topics that nobody had before."""

    mqtt: Running
    made: int = field(default=0)

    async def device(self) -> Device:
        self.made += 1
        return await self.mqtt.device(f"HW-{self.made}", profile_id="p_site")

    def topic(self) -> str:
        """What a test's topics begin with."""
        self.made += 1
        return f"site/{self.made}"

    async def retained(self, topic: str) -> list[str]:
        """The retained topics that are stored below one."""
        return await self.mqtt.server.broker.messaging.retained_topics(self.mqtt.api.tenant_id, topic)

    async def let_go(self) -> None:
        """Every session whose connection is gone is given back to the store."""
        await until(lambda: not self.mqtt.server.devices.leaving)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def site(postgres_server: PostgresServer) -> AsyncIterator[Site]:
    dsn = postgres_server.create_database()
    try:
        async with running_api(dsn) as api, serving_mqtt(api) as mqtt:
            await profile(mqtt, [{"filter": "site/#", "allow": ["publish", "subscribe"]}])
            yield Site(mqtt)
    finally:
        postgres_server.drop_database(dsn)


def kept(version: Version) -> dict[str, Any]:
    """How a client asks for a session that outlives its connection."""
    return {"clean_start": False, "properties": KEEP if version is Version.V5 else NO_PROPERTIES}


async def vanish(site: Site, client: Client) -> None:
    """Drop the connection and wait until the session is the store's."""
    sessions = len(site.mqtt.server.devices.by_key)
    client.drop()
    await until(lambda: len(site.mqtt.server.devices.by_key) < sessions)
    await site.let_go()


async def take(client: Client, count: int) -> list[Publish]:
    """So many messages, each acknowledged to its end."""
    taken: list[Publish] = []
    open_ids: set[int] = set()
    while len(taken) < count or open_ids:
        packet = await client.packet()
        match packet:
            case Publish(qos=QoS.AT_MOST_ONCE):
                taken.append(packet)
            case Publish(qos=QoS.AT_LEAST_ONCE):
                taken.append(packet)
                await client.send(Ack(PacketType.PUBACK, packet.packet_id))
            case Publish():
                taken.append(packet)
                open_ids.add(packet.packet_id)
                await client.send(Ack(PacketType.PUBREC, packet.packet_id))
            case Ack(type=PacketType.PUBREL):
                open_ids.discard(packet.packet_id)
                await client.send(Ack(PacketType.PUBCOMP, packet.packet_id))
            case _:
                raise AssertionError(packet)
    return taken


# Sessions -------------------------------------------------------------------------------------------------------------


@VERSIONS
async def test_without_a_session_a_new_one_is_made_and_goes_on(site: Site, version: Version) -> None:
    device, topic = await site.device(), site.topic()
    async with site.mqtt.client(version=version) as client:
        assert (await client.connect(device, **kept(version))).session_present is False
        await client.subscribe(topic)
        await vanish(site, client)
    async with site.mqtt.client(version=version) as client:
        assert (await client.connect(device, **kept(version))).session_present is True
        await client.publish(topic, b"x", Q0)  # to the subscription that was never repeated
        assert (await client.message()).payload == b"x"


@VERSIONS
async def test_sessions_are_found_by_client_id_within_one_device(site: Site, version: Version) -> None:
    device, other, topic = await site.device(), await site.device(), site.topic()
    for name in ("one", "two"):
        async with site.mqtt.client(version=version) as client:
            assert (await client.connect(device, client_id=name, **kept(version))).session_present is False
            await client.subscribe(f"{topic}/{name}")
            await vanish(site, client)
    async with site.mqtt.client(version=version) as client:  # the same client id, of somebody else
        assert (await client.connect(other, client_id="one", **kept(version))).session_present is False
        for name in ("one", "two"):
            await client.publish(f"{topic}/{name}", name.encode())
        await silent(client)
    for name in ("one", "two"):
        async with site.mqtt.client(version=version) as client:
            assert (await client.connect(device, client_id=name, **kept(version))).session_present is True
            assert (await client.message()).payload == name.encode()
            await silent(client)


@VERSIONS
async def test_an_empty_client_id_gets_a_new_one_each_time_and_is_told_in_5(site: Site, version: Version) -> None:
    device = await site.device()
    names: set[str] = set()
    async with site.mqtt.client(version=version) as one, site.mqtt.client(version=version) as other:
        for client in (one, other):
            connack = await client.connect(device, client_id="")
            assert connack.reason is R.SUCCESS
            names.add(connack.properties.assigned_client_identifier or "")
        await silent(one)  # the second has not taken it over
        known = {key[2] for key in site.mqtt.server.devices.by_key if str(key[1]) == device.device_id}
        assert len(known) == 2
        assert names == (known if version is Version.V5 else {""})


@VERSIONS
async def test_clean_start_discards_what_was_kept(site: Site, version: Version) -> None:
    device, topic = await site.device(), site.topic()
    async with site.mqtt.client(version=version) as client:
        await client.connect(device, **kept(version))
        await client.subscribe(topic)
        await vanish(site, client)
    async with site.mqtt.client(version=version) as client:
        assert (await client.connect(device, clean_start=True)).session_present is False
        await client.publish(topic, b"x")
        await silent(client)
        await vanish(site, client)
    async with site.mqtt.client(version=version) as client:
        assert (await client.connect(device, **kept(version))).session_present is False


@VERSIONS
async def test_a_second_connection_takes_the_session_over_and_the_first_is_closed(site: Site, version: Version) -> None:
    device, topic = await site.device(), site.topic()
    async with site.mqtt.client(version=version) as first, site.mqtt.client(version=version) as second:
        await first.connect(device, **kept(version))
        await first.subscribe(topic)
        assert (await second.connect(device, **kept(version))).session_present is True
        rest = await first.closed()
        said = [Disconnect(R.SESSION_TAKEN_OVER)] if version is Version.V5 else []
        assert [type(p)(p.reason) for p in rest if isinstance(p, Disconnect)] == said
        await second.publish(topic, b"x", Q0)
        assert (await second.message()).payload == b"x"


@VERSIONS
async def test_after_disconnect_the_connection_is_closed_and_nothing_more_is_taken(
    site: Site, version: Version
) -> None:
    device, topic = await site.device(), site.topic()
    async with site.mqtt.client(version=version) as witness, site.mqtt.client(version=version) as client:
        await witness.connect(device, client_id="witness")
        await witness.subscribe(f"{topic}/#")
        await client.connect(device, client_id="leaver", will=Will(f"{topic}/will", b"never", Q1))
        before = encode(Publish(f"{topic}/a", b"before", Q1, packet_id=1), version)
        after = encode(Publish(f"{topic}/a", b"after", Q1, packet_id=2), version)
        await client.send_raw(before + encode(Disconnect(), version) + after)
        assert all(not isinstance(packet, Ack) or packet.packet_id == 1 for packet in await client.closed())
        assert (await witness.message()).payload == b"before"
        await witness.publish(f"{topic}/b", b"last", Q0)
        assert (await witness.message()).payload == b"last"
        await silent(witness)


@VERSIONS
async def test_who_breaks_the_protocol_is_told_in_5_and_closed(site: Site, version: Version) -> None:
    device = await site.device()
    async with site.mqtt.client(version=version) as client:
        await client.connect(device)
        await client.send(Connect(version, "again"))
        rest = await client.closed()
        assert [p.reason for p in rest if isinstance(p, Disconnect)] == (
            [R.PROTOCOL_ERROR] if version is Version.V5 else []
        )


# Retained messages ----------------------------------------------------------------------------------------------------


@VERSIONS
@QOS
async def test_a_retained_message_replaces_the_one_before_and_comes_to_new_subscriptions(
    site: Site, version: Version, qos: QoS
) -> None:
    device, topic = await site.device(), site.topic()
    async with site.mqtt.client(version=version) as sender, site.mqtt.client(version=version) as client:
        await sender.connect(device, client_id="sender")
        await sender.publish(f"{topic}/a", b"first", Q1, retain=True)
        await sender.publish(f"{topic}/a", b"second", qos, retain=True)
        await sender.publish(f"{topic}/z", b"marker", Q1, retain=True)
        await client.connect(device)
        assert await client.subscribe(f"{topic}/#", qos=Q2) == (R.GRANTED_QOS_2,)
        got = await take(client, 2)
        assert [(m.topic, m.payload, m.qos, m.retain, m.dup) for m in got] == [
            (f"{topic}/a", b"second", qos, True, False),
            (f"{topic}/z", b"marker", Q1, True, False),
        ]
        await silent(client)


@VERSIONS
@QOS
async def test_an_empty_retained_message_removes_and_is_sent_on_and_not_kept(
    site: Site, version: Version, qos: QoS
) -> None:
    device, topic = await site.device(), site.topic()
    async with site.mqtt.client(version=version) as sender, site.mqtt.client(version=version) as client:
        await sender.connect(device, client_id="sender")
        await client.connect(device)
        await sender.publish(f"{topic}/a", b"kept", Q1, retain=True)
        await sender.publish(f"{topic}/z", b"marker", Q1, retain=True)
        await client.subscribe(f"{topic}/a", qos=Q2)
        assert (await take(client, 1))[0].payload == b"kept"
        await sender.publish(f"{topic}/a", b"", qos, retain=True)
        gone = (await take(client, 1))[0]  # the subscription stood: a message like any other, without RETAIN
        assert (gone.topic, gone.payload, gone.qos, gone.retain) == (f"{topic}/a", b"", qos, False)
        await sender.publish(f"{topic}/none", b"", Q1, retain=True)  # nothing to remove, nothing to keep
        assert await site.retained(topic) == [f"{topic}/z"]
        await client.subscribe(f"{topic}/#", qos=Q2)
        assert [m.payload for m in await take(client, 1)] == [b"marker"]
        await silent(client)


@VERSIONS
@QOS
async def test_messages_without_retain_change_nothing_that_is_retained(site: Site, version: Version, qos: QoS) -> None:
    device, topic = await site.device(), site.topic()
    async with site.mqtt.client(version=version) as sender, site.mqtt.client(version=version) as client:
        await sender.connect(device, client_id="sender")
        await sender.publish(f"{topic}/a", b"kept", Q1, retain=True)
        await sender.publish(f"{topic}/a", b"passing", qos)
        await sender.publish(f"{topic}/b", b"passing", qos)
        await sender.publish(f"{topic}/a", b"", qos)  # empty, and yet it removes nothing without the flag
        assert await site.retained(topic) == [f"{topic}/a"]
        await client.connect(device)
        await client.subscribe(f"{topic}/#")
        assert [(m.payload, m.retain) for m in await take(client, 1)] == [(b"kept", True)]
        await silent(client)


@VERSIONS
async def test_retained_messages_outlive_the_session_of_their_publisher(site: Site, version: Version) -> None:
    device, other, topic = await site.device(), await site.device(), site.topic()
    async with site.mqtt.client(version=version) as sender:
        await sender.connect(device, clean_start=True)
        await sender.publish(topic, b"kept", retain=True)
        await vanish(site, sender)
    async with site.mqtt.client(version=version) as sender:
        assert (await sender.connect(device, clean_start=True)).session_present is False
    async with site.mqtt.client(version=version) as client:
        await client.connect(other)
        await client.subscribe(topic)
        assert [(m.payload, m.retain) for m in await take(client, 1)] == [(b"kept", True)]


async def test_retain_handling_and_retain_as_published_are_obeyed(site: Site) -> None:
    device, topic = await site.device(), site.topic()
    async with site.mqtt.client() as sender, site.mqtt.client() as client:
        await sender.connect(device, client_id="sender")
        await sender.publish(topic, b"kept", retain=True)
        await client.connect(device)

        async def subscribe(handling: RetainHandling, *, as_published: bool = False) -> None:
            asked = SubscriptionRequest(topic, Q1, retain_as_published=as_published, retain_handling=handling)
            await client.send(Subscribe(client.new_id(), (asked,)))
            await client.expect(Suback)

        await subscribe(RetainHandling.DO_NOT_SEND)
        await subscribe(RetainHandling.SEND_IF_NEW)  # it is not new
        await sender.publish(topic, b"first", retain=True)
        assert [(m.payload, m.retain) for m in await take(client, 1)] == [(b"first", False)]
        await subscribe(RetainHandling.SEND, as_published=True)
        assert [(m.payload, m.retain) for m in await take(client, 1)] == [(b"first", True)]
        await sender.publish(topic, b"second", retain=True)
        await sender.publish(topic, b"third")
        assert [(m.payload, m.retain) for m in await take(client, 2)] == [(b"second", True), (b"third", False)]
        await silent(client)


# Who gets what, and in which order ------------------------------------------------------------------------------------


@VERSIONS
@QOS
async def test_every_session_that_matches_gets_the_message_and_nobody_else(
    site: Site, version: Version, qos: QoS
) -> None:
    one, other, topic = await site.device(), await site.device(), site.topic()
    filters = {f"{topic}/a": True, f"{topic}/#": True, f"{topic}/+": True, f"{topic}/b": False, f"{topic}/a/b": False}
    clients: list[tuple[Client, bool]] = []
    async with site.mqtt.client(version=version) as sender:
        await sender.connect(one, client_id="sender")
        try:
            for number, (text, matches) in enumerate(filters.items()):
                client = await site.mqtt.client(version=version).__aenter__()
                clients.append((client, matches))
                await client.connect(other, client_id=f"c{number}", **(kept(version) if number % 2 else {}))
                await client.subscribe(text, qos=qos)
            await sender.publish(f"{topic}/a", b"x", qos)
            await sender.publish(f"{topic}", b"parent", Q1)  # `#` matches its parent level, too
            for client, matches in clients:
                expected = [b"x"] * matches + [b"parent"] * (client is clients[1][0])
                assert [m.payload for m in await take(client, len(expected))] == expected
                await silent(client)
        finally:
            for client, _ in clients:
                client.drop()
    await site.let_go()


@VERSIONS
@QOS
async def test_messages_reach_a_subscriber_in_their_order(site: Site, version: Version, qos: QoS) -> None:
    """Pipelined from one sender, mixed topics, to a live and to a stored session, and again after a lost connection."""
    one, other, topic = await site.device(), await site.device(), site.topic()
    number = 60
    async with (
        site.mqtt.client(version=version) as sender,
        site.mqtt.client(version=version) as live,
        site.mqtt.client(version=version) as stored,
    ):
        await sender.connect(one)
        await live.connect(other, client_id="live")
        await stored.connect(other, client_id="stored", **kept(version))
        for client in (live, stored):
            await client.subscribe(f"{topic}/#", qos=qos)
        sending = b"".join(
            encode(Publish(f"{topic}/{n % 3}", b"%d" % n, qos, packet_id=0 if qos is Q0 else n + 1), version)
            for n in range(number)
        )
        await sender.send_raw(sending)
        finishing = asyncio.create_task(_finish(sender, qos, number))
        expected = [b"%d" % n for n in range(number)]
        assert [m.payload for m in await take(live, number)] == expected
        begun = [await _publish(stored) for _ in range(number // 2)]  # and never acknowledged
        assert [m.payload for m in begun] == expected[: number // 2]
        await finishing
        if qos is Q0:
            return
        await vanish(site, stored)
        async with site.mqtt.client(version=version) as back:
            assert (await back.connect(other, client_id="stored", **kept(version))).session_present
            again = await take(back, number)
            assert [m.payload for m in again] == expected
            for before, after in zip(begun, again, strict=False):
                assert (after.packet_id, after.dup) == (before.packet_id, True)
            await silent(back)


async def _publish(client: Client) -> Publish:
    return await client.expect(Publish)


async def _finish(sender: Client, qos: QoS, number: int) -> None:
    """Every pipelined message is acknowledged, in its order."""
    if qos is Q0:
        return
    kind = PacketType.PUBACK if qos is Q1 else PacketType.PUBREC
    answers = [await sender.expect(Ack) for _ in range(number)]
    assert [(a.type, a.packet_id, a.reason) for a in answers] == [(kind, n + 1, R.SUCCESS) for n in range(number)]
    if qos is Q2:
        for answer in answers:
            await sender.send(Ack(PacketType.PUBREL, answer.packet_id))
        done = [await sender.expect(Ack) for _ in range(number)]
        assert [a.packet_id for a in done if a.type is PacketType.PUBCOMP] == [n + 1 for n in range(number)]


@VERSIONS
@pytest.mark.parametrize("stored", [False, True])
async def test_an_unsubscribed_filter_gets_nothing_new_and_what_was_begun_is_finished(
    site: Site, version: Version, stored: bool
) -> None:
    one, other, topic = await site.device(), await site.device(), site.topic()
    async with site.mqtt.client(version=version) as sender, site.mqtt.client(version=version) as client:
        await sender.connect(one)
        await client.connect(other, **(kept(version) if stored else {}))
        await client.subscribe(f"{topic}/a", f"{topic}/+", qos=Q2)
        await sender.publish(f"{topic}/a", b"begun", Q2)
        begun = await client.expect(Publish)
        unsubscribing = client.new_id()
        await client.send(Unsubscribe(unsubscribing, (f"{topic}/a", f"{topic}/+", f"{topic}/never")))
        answer = await client.expect(Unsuback)
        assert answer.packet_id == unsubscribing
        if version is Version.V5:
            assert answer.reasons == (R.SUCCESS, R.SUCCESS, R.NO_SUBSCRIPTION_EXISTED)
        for qos in QoS:
            await sender.publish(f"{topic}/a", b"too late", qos)
        await client.send(Ack(PacketType.PUBREC, begun.packet_id))
        released = await client.expect(Ack)
        assert (released.type, released.packet_id) == (PacketType.PUBREL, begun.packet_id)
        await client.send(Ack(PacketType.PUBCOMP, begun.packet_id))
        await silent(client)


# Shared subscriptions (5.0 §4.8.2) ------------------------------------------------------------------------------------


@dataclass
class Members:
    """Two clients of one group, in the order in which one got the message and the other did not."""

    chosen: Client
    other: Client
    got: Publish
    name: str
    device: Device


async def _share(site: Site, sender: Client, left: Client, right: Client, qos: QoS, *, keep: bool) -> Members:
    """Both subscribe to one shared filter, and one message is published."""
    topic = site.topic()
    by_client: dict[int, tuple[str, Device]] = {}
    for name, client in (("left", left), ("right", right)):
        device = await site.device()
        by_client[id(client)] = name, device
        await client.connect(device, client_id=name, **(kept(Version.V5) if keep else {}))
        assert await client.subscribe(f"$share/g/{topic}", qos=Q2) == (R.GRANTED_QOS_2,)
    await sender.publish(topic, b"job", qos)
    await left.send(Ping(PacketType.PINGREQ))
    first = await left.packet()
    chosen, other = (left, right) if isinstance(first, Publish) else (right, left)
    if chosen is left:
        assert isinstance(first, Publish)
        assert isinstance(await left.packet(), Ping)
        got = first
    else:
        got = await right.expect(Publish)
    await silent(other)
    return Members(chosen, other, got, *by_client[id(chosen)])


async def test_the_granted_qos_holds_for_shared_subscriptions(site: Site) -> None:
    one, other, topic = await site.device(), await site.device(), site.topic()
    async with site.mqtt.client() as sender, site.mqtt.client() as member:
        await sender.connect(one)
        await member.connect(other)
        for granted in QoS:
            await member.subscribe(f"$share/g/{topic}", qos=granted)
            for sent in QoS:
                await sender.publish(topic, b"%d" % sent, sent)
                (got,) = await take(member, 1)
                assert (got.payload, got.qos) == (b"%d" % sent, min(granted, sent))


async def test_a_shared_qos_2_message_that_was_begun_is_finished_with_the_same_client(site: Site) -> None:
    async with site.mqtt.client() as sender, site.mqtt.client() as left, site.mqtt.client() as right:
        await sender.connect(await site.device())
        members = await _share(site, sender, left, right, Q2, keep=True)
        await vanish(site, members.chosen)
        await silent(members.other)
        async with site.mqtt.client() as back:
            assert (await back.connect(members.device, client_id=members.name, **kept(Version.V5))).session_present
            again = await back.expect(Publish)
            assert (again.payload, again.packet_id, again.dup) == (b"job", members.got.packet_id, True)
            await back.send(Ack(PacketType.PUBREC, again.packet_id))
            assert (await back.expect(Ack)).type is PacketType.PUBREL
            await back.send(Ack(PacketType.PUBCOMP, again.packet_id))
            await silent(back)
        await silent(members.other)


@pytest.mark.parametrize("received", [False, True], ids=["before PUBREC", "after PUBREC"])
@pytest.mark.parametrize("keep", [False, True], ids=["ends with its connection", "ended by clean start"])
async def test_a_shared_qos_2_message_goes_to_nobody_else_when_its_session_ends(
    site: Site, received: bool, keep: bool
) -> None:
    async with site.mqtt.client() as sender, site.mqtt.client() as left, site.mqtt.client() as right:
        await sender.connect(await site.device())
        members = await _share(site, sender, left, right, Q2, keep=keep)
        if received:
            await members.chosen.send(Ack(PacketType.PUBREC, members.got.packet_id))
            assert (await members.chosen.expect(Ack)).type is PacketType.PUBREL
        await vanish(site, members.chosen)
        if keep:
            async with site.mqtt.client() as anew:
                assert not (await anew.connect(members.device, client_id=members.name)).session_present
                await silent(anew)
        await site.let_go()
        await silent(members.other)


@pytest.mark.parametrize("keep", [False, True], ids=["clean", "kept"])
@pytest.mark.parametrize("qos", [Q1, Q2], ids=["qos1", "qos2"])
async def test_a_shared_message_that_its_receiver_refuses_goes_to_nobody_else(site: Site, qos: QoS, keep: bool) -> None:
    async with site.mqtt.client() as sender, site.mqtt.client() as left, site.mqtt.client() as right:
        await sender.connect(await site.device())
        members = await _share(site, sender, left, right, qos, keep=keep)
        kind = PacketType.PUBACK if qos is Q1 else PacketType.PUBREC
        await members.chosen.send(Ack(kind, members.got.packet_id, R.IMPLEMENTATION_SPECIFIC_ERROR))
        await silent(members.chosen)  # no PUBREL after a failed PUBREC
        await silent(members.other)
        await vanish(site, members.chosen)
        await silent(members.other)
        if keep:
            async with site.mqtt.client() as back:
                assert (await back.connect(members.device, client_id=members.name, **kept(Version.V5))).session_present
                await silent(back)


# Transport, and no more than the standard -----------------------------------------------------------------------------


@VERSIONS
@pytest.mark.parametrize("tls", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"])
async def test_tls_over_tcp_carries_every_byte_in_its_order_however_it_is_cut(
    site: Site, version: Version, tls: ssl.TLSVersion
) -> None:
    device, topic = await site.device(), site.topic()
    payload = bytes(range(256)) * 300
    async with Client(site.mqtt.port, client_context(site.mqtt.holder, version=tls), version) as client:
        await client.connect(device)
        await client.subscribe(topic)
        data = encode(Publish(topic, payload, Q1, packet_id=7), version)
        cuts = [0, 1, 2, 3, 5, 8, 21, 1_460, 16_384, 16_385, 40_000, len(data)]
        for start, end in pairwise(cuts):
            await client.send_raw(data[start:end])
        got = await client.message()
        assert (got.payload, got.qos) == (payload, Q1)


async def test_plain_tcp_is_no_transport_of_ours(site: Site) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.mqtt.port)
    writer.write(encode(Connect(Version.V311, "plain", user_name="provision"), Version.V311))
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    assert not answer.startswith(b"\x20")  # at most a TLS alert, never CONNACK


async def test_the_bytes_of_the_standard_are_all_that_a_client_needs(site: Site) -> None:
    """Written by hand from the figures of 3.1.1: no property, no extension, nothing that only our own codec makes."""
    device, topic = await site.device(), site.topic().encode()
    name, key = device.device_id.encode(), device.api_key.encode()

    def text(value: bytes) -> bytes:
        return len(value).to_bytes(2) + value

    def packet(first: int, body: bytes) -> bytes:
        assert len(body) < 128
        return bytes([first, len(body)]) + body

    connect = b"\x00\x04MQTT\x04\xc2\x00\x3c" + text(b"hand") + text(name) + text(key)
    context = client_context(site.mqtt.holder)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.mqtt.port, ssl=context)

    async def expect(expected: bytes) -> None:
        async with asyncio.timeout(10):
            assert await reader.readexactly(len(expected)) == expected

    writer.write(packet(0x10, connect))
    await expect(b"\x20\x02\x00\x00")
    writer.write(packet(0x82, b"\x00\x01" + text(topic) + b"\x02"))
    await expect(b"\x90\x03\x00\x01\x02")
    writer.write(packet(0x30, text(topic) + b"zero"))
    await expect(packet(0x30, text(topic) + b"zero"))
    writer.write(packet(0x34, text(topic) + b"\x00\x09two"))
    down = packet(0x34, text(topic) + b"\x00\x01two")
    received = bytearray()
    async with asyncio.timeout(10):
        while len(received) < len(down) + 4:  # the message and the PUBREC, in either order
            received += await reader.read(4096)
    assert sorted([bytes(received[: len(down)]), bytes(received[len(down) :])]) == sorted([down, b"\x50\x02\x00\x09"])
    writer.write(b"\x62\x02\x00\x09")
    await expect(b"\x70\x02\x00\x09")
    writer.write(b"\x50\x02\x00\x01")
    await expect(b"\x62\x02\x00\x01")
    writer.write(b"\x70\x02\x00\x01")
    writer.write(packet(0xA2, b"\x00\x02" + text(topic)))
    await expect(b"\xb0\x02\x00\x02")
    writer.write(b"\xc0\x00")
    await expect(b"\xd0\x00")
    writer.write(b"\xe0\x00")
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    writer.close()


# What is not supported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("connect", "answer"),
    [
        ("10 0e 00064d514973647003 02 0000 0000", "20020001"),  # MQTT 3.1
        ("10 0c 00044d51545403 02 0000 0000", "20020001"),  # a level below
        ("10 0d 00044d51545406 02 0000 00 0000", "2003008400"),  # and above ours: 0x84, in the words of 5.0
        ("10 0c 00044d51545484 02 0000 0000", "20020001"),  # what some bridges call 3.1.1
        ("10 0c 00044e4f504504 02 0000 0000", ""),  # another protocol
    ],
)
async def test_other_versions_are_refused_in_words_that_they_know(site: Site, connect: str, answer: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.mqtt.port, ssl=client_context(site.mqtt.holder))
    writer.write(bytes.fromhex(connect))
    async with asyncio.timeout(10):
        received = await reader.read()
    writer.close()
    if answer.startswith("2003"):
        assert (received[:1], received[3:4]) == (b"\x20", bytes.fromhex(answer)[3:4])
    else:
        assert received == bytes.fromhex(answer)


async def test_enhanced_authentication_is_refused_with_0x8c_and_auth_with_0x82(site: Site) -> None:
    device = await site.device()
    async with site.mqtt.client() as client:
        method = Properties(authentication_method="SCRAM-SHA-256", authentication_data=b"n,,n=u,r=1")
        assert (await client.connect(device, properties=method)).reason is R.BAD_AUTHENTICATION_METHOD
        assert await client.closed() == []
    async with site.mqtt.client() as client:
        connack = await client.connect(device)
        assert connack.properties.authentication_method is None
        await client.send(Auth(R.RE_AUTHENTICATE, Properties(authentication_method="SCRAM-SHA-256")))
        assert [p.reason for p in await client.closed() if isinstance(p, Disconnect)] == [R.PROTOCOL_ERROR]


async def test_connack_says_what_there_is_and_offers_nothing_that_there_is_not(site: Site) -> None:
    device = await site.device()
    async with site.mqtt.client() as client:
        connack = await client.connect(device, properties=Properties(request_response_information=1))
        said = connack.properties
    assert said.response_information is None  # nothing is made up: Response Topics are the table's
    assert said.server_reference is None
    for offered in (said.maximum_qos, said.retain_available, said.wildcard_subscription_available):
        assert offered is None  # which means: yes, without limit (5.0 §3.2.2.3)
    for offered in (said.shared_subscription_available, said.subscription_identifier_available):
        assert offered is None
    limits = site.mqtt.server.limits.machine
    assert said.receive_maximum == limits.receive_maximum
    assert said.maximum_packet_size == limits.packet_bytes
    assert said.topic_alias_maximum == limits.topic_aliases_in


async def test_what_is_above_a_limit_of_ours_is_refused_with_its_reason(site: Site) -> None:
    device, topic = await site.device(), site.topic()
    limits = site.mqtt.server.limits.machine
    deep, long = topic + "/a" * limits.topic_levels, topic + "/" + "a" * limits.topic_bytes
    async with site.mqtt.client() as client:
        await client.connect(device)
        assert await client.subscribe(deep, long) == (R.TOPIC_FILTER_INVALID, R.TOPIC_FILTER_INVALID)
        beyond = limits.subscriptions + 1
        reasons = await client.subscribe(*(f"{topic}/{n}" for n in range(beyond)))
        assert reasons == (R.GRANTED_QOS_1,) * limits.subscriptions + (R.QUOTA_EXCEEDED,)
    cases: list[tuple[Publish, ReasonCode]] = [
        (Publish(deep, b"x"), R.TOPIC_NAME_INVALID),
        (Publish(long, b"x"), R.TOPIC_NAME_INVALID),
        (
            Publish(topic, b"x", properties=Properties(topic_alias=limits.topic_aliases_in + 1)),
            R.TOPIC_ALIAS_INVALID,
        ),
        (Publish(topic, b"x" * limits.packet_bytes), R.PACKET_TOO_LARGE),
    ]
    for packet, reason in cases:
        async with site.mqtt.client() as client:
            await client.connect(device)
            await client.send(packet)
            assert [p.reason for p in await client.closed() if isinstance(p, Disconnect)] == [reason]


async def test_a_client_id_above_our_limit_is_0x85(site: Site) -> None:
    device = await site.device()
    for version, answer in ((Version.V5, R.CLIENT_IDENTIFIER_NOT_VALID), (Version.V311, R.CLIENT_IDENTIFIER_NOT_VALID)):
        async with site.mqtt.client(version=version) as client:
            connack: Connack = await client.connect(device, client_id="x" * 257)
            assert connack.reason is answer
