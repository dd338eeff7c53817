"""Whose a session is: one client, one connection, on whatever nodes; and nobody's after a CONNECT that went wrong."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from adapters.mqtt.device import DeviceRole
from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.session import Session
from adapters.mqtt.wire_packets import Connack, Connect, Disconnect, Publish, QoS, Will
from adapters.mqtt.wire_reasons import LocalProtocolError, ReasonCode, Version
from registry.errors import Unavailable
from registry.messaging_values import Eviction, Opening, OutcomeOpen, Ownership, Published, Routing, SessionKey, Taken
from registry.storage import messaging_sessions
from tests.http_api import Api, api, running_api
from tests.mqtt_devices import KEEP, devices, silent
from tests.mqtt_server import Client, Device, Gone, Running, serving_mqtt
from tests.nodes import until

__all__ = ["api"]


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    async with serving_mqtt(api) as running:
        yield running


async def owners(mqtt: Running) -> list[str | None]:
    """Of each stored session, the node that serves it."""
    async with mqtt.api.database.connection() as connection:
        return [row["node_id"] for row in await connection.fetch("SELECT node_id FROM messaging_session")]


async def until_owned_by(mqtt: Running, *nodes: str | None) -> None:
    async with asyncio.timeout(10):
        while await owners(mqtt) != list(nodes):
            await asyncio.sleep(0.01)


async def until_idle(mqtt: Running) -> None:
    await until(lambda: not mqtt.server.devices.by_key and not mqtt.server.devices.leaving)


async def test_a_session_that_was_taken_without_an_answer_is_let_go_again(
    mqtt: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await devices(mqtt, 2)
    messaging = mqtt.server.broker.messaging
    take, disown, tries = messaging.take, messaging.disown, 0

    async def taken_unheard(opening: Opening) -> Taken:
        await take(opening)
        raise OutcomeOpen("nobody knows")

    async def disowned_late(key: SessionKey) -> bool:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise Unavailable("the database is away")
        return await disown(key)

    async with mqtt.client() as witness:
        await witness.connect(other)
        await witness.subscribe("site/will")
        monkeypatch.setattr(messaging, "take", taken_unheard)
        monkeypatch.setattr(messaging, "disown", disowned_late)
        monkeypatch.setattr("adapters.mqtt.devices._DISOWN_AGAIN_SECONDS", 0.01)
        will = Will("site/will", b"never connected", QoS.AT_LEAST_ONCE)
        async with mqtt.client() as client:
            answer = await client.connect(one, clean_start=False, properties=KEEP, will=will)
            assert answer.reason.failed
        monkeypatch.setattr(messaging, "take", take)
        await until_owned_by(mqtt, None)
        assert tries == 2
        await messaging.tick()
        async with mqtt.client() as client:
            assert (await client.connect(one, clean_start=False, properties=KEEP)).session_present
            await client.goodbye()
        await silent(witness)


async def test_whoever_comes_back_at_once_keeps_the_session(mqtt: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = await devices(mqtt, 1)
    messaging = mqtt.server.broker.messaging
    take, failed = messaging.take, False

    async def taken_unheard_once(opening: Opening) -> Taken:
        nonlocal failed
        taken = await take(opening)
        if not failed:
            failed = True
            raise OutcomeOpen("nobody knows")
        return taken

    monkeypatch.setattr(messaging, "take", taken_unheard_once)
    async with mqtt.client() as client:
        assert (await client.connect(one, clean_start=False, properties=KEEP)).reason.failed
    async with mqtt.client() as client:
        assert (await client.connect(one, clean_start=False, properties=KEEP)).reason is ReasonCode.SUCCESS
        for _ in range(3):  # what was left to do for the first one has had its turn
            await silent(client)
        await until_owned_by(mqtt, messaging.node_id)


async def test_a_session_that_cannot_be_restored_is_let_go(mqtt: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = await devices(mqtt, 1)
    async with mqtt.client() as client:
        await client.connect(one, clean_start=False, properties=KEEP)
    await until_idle(mqtt)

    def broken(*_: object) -> Session:
        raise LocalProtocolError("packet id 1 cannot be restored")

    with monkeypatch.context() as patch:
        patch.setattr("adapters.mqtt.device.Session.restore", broken)
        async with mqtt.client() as client:
            with pytest.raises(Gone):
                await client.connect(one, clean_start=False, properties=KEEP)
    await until_owned_by(mqtt, None)
    async with mqtt.client() as client:
        answer = await client.connect(one, clean_start=False, properties=KEEP)
        assert isinstance(answer, Connack)
        assert answer.session_present


async def test_a_goodbye_that_is_over_in_the_turn_in_which_its_client_is_back_counts(
    mqtt: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DISCONNECT waits for the answer to what came before it; that comes when the next connection is being admitted."""
    one, other = await devices(mqtt, 2)
    devices_here, messaging = mqtt.server.devices, mqtt.server.broker.messaging
    storing: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
    take = devices_here._take

    async def taken_in_the_turn_of_the_answer(role: DeviceRole, connect: Connect) -> bool:
        storing.set_result(Published(Routing()))
        await asyncio.sleep(0)  # its callback, and what that leaves for the next turn, are in line before and behind us
        return await take(role, connect)

    async with mqtt.client() as witness, mqtt.client() as first, mqtt.client() as second:
        await witness.connect(other)
        await witness.subscribe("site/will")
        will = Will("site/will", b"said goodbye", QoS.AT_LEAST_ONCE)
        await first.connect(one, clean_start=False, properties=KEEP, will=will)
        with monkeypatch.context() as patch:
            patch.setattr(messaging, "publish", lambda _: storing)
            await first.send(Publish("site/a", b"", QoS.AT_LEAST_ONCE, packet_id=1))
            await first.send(Disconnect(properties=Properties(session_expiry_interval=0)))
            await until(lambda: any(role.peer.machine.leaving for role in devices_here.by_key.values()))
        monkeypatch.setattr(devices_here, "_take", taken_in_the_turn_of_the_answer)
        answer = await second.connect(one, clean_start=False, properties=KEEP)
        assert not answer.session_present
        await messaging.tick()
        await silent(witness)
        await second.goodbye()


# Two nodes ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def two_nodes(dsn: str) -> AsyncIterator[tuple[Running, Running]]:
    async with (
        running_api(dsn) as first,
        serving_mqtt(first) as here,
        running_api(dsn, name="two", ring=first.ring) as second,
        serving_mqtt(second) as there,
    ):
        second.tenant_id, second.slug = first.tenant_id, first.slug
        yield here, there


@pytest.mark.parametrize("version", list(Version), ids=["3.1.1", "5.0"])
@pytest.mark.parametrize("kept", ["neither", "older", "newer"])
async def test_an_older_connection_on_another_node_is_closed(dsn: str, version: Version, kept: str) -> None:
    """Also where nothing of it is stored; its will is published, as with a takeover on one node."""

    def how(which: str) -> tuple[bool, Properties]:
        stored = kept == which
        return not stored, KEEP if stored and version is Version.V5 else NO_PROPERTIES

    async with two_nodes(dsn) as (here, there):
        one, other = await devices(here, 2)
        async with (
            here.client() as witness,
            here.client(version=version) as older,
            there.client(version=version) as newer,
        ):
            await witness.connect(other)
            await witness.subscribe("site/will")
            clean, properties = how("older")
            will = Will("site/will", b"taken over", QoS.AT_LEAST_ONCE)
            await older.connect(one, client_id="same", clean_start=clean, properties=properties, will=will)
            clean, properties = how("newer")
            await newer.connect(one, client_id="same", clean_start=clean, properties=properties)
            told = [p.reason for p in await older.closed() if isinstance(p, Disconnect)]
            assert told == ([ReasonCode.SESSION_TAKEN_OVER] if version is Version.V5 else [])
            if kept == "neither":
                assert (await witness.message()).payload == b"taken over"
            await silent(newer)
            await until(lambda: here.server.counters.taken_over == 1)
            assert there.server.counters.taken_over == 0


async def test_other_clients_and_other_devices_are_not_touched(dsn: str) -> None:
    async with two_nodes(dsn) as (here, there):
        one, other = await devices(here, 2)
        async with here.client() as first, here.client() as second, there.client() as third, there.client() as fourth:
            await first.connect(one, client_id="a")
            await second.connect(other, client_id="b")
            await third.connect(one, client_id="b")
            await fourth.connect(other, client_id="a")
            for node in (here, there):
                await node.server.broker.messaging._inbox.pull()
            for client in (first, second, third, fourth):
                await silent(client)


async def test_of_many_that_come_at_once_to_two_nodes_one_stays(dsn: str) -> None:
    async with two_nodes(dsn) as nodes:
        (one,) = await devices(nodes[0], 1)
        clients = [nodes[n % 2].client() for n in range(12)]
        try:
            outcomes = Counter(await asyncio.gather(*(_come(client, one) for client in clients)))
            assert outcomes[ReasonCode.SUCCESS] >= 1
            await until(lambda: sum(len(node.server.devices.by_key) for node in nodes) == 1)
            for node in nodes:
                await node.server.broker.messaging._inbox.pull()
            (role,) = [role for node in nodes for role in node.server.devices.by_key.values()]
            assert role.peer.alive
        finally:
            for client in clients:
                client.drop()


async def _come(client: Client, device: Device) -> ReasonCode | None:
    await client.__aenter__()
    try:
        return (await client.connect(device, client_id="same")).reason
    except Gone:
        return None


async def test_a_connection_that_is_overtaken_before_it_is_accepted_ends(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_nodes(dsn) as (here, there):
        (one,) = await devices(here, 1)
        enter, entered, gate = here.server.broker.enter, asyncio.Event(), asyncio.Event()

        async def late(role: DeviceRole) -> None:
            entered.set()
            await gate.wait()
            await enter(role)

        monkeypatch.setattr(here.server.broker, "enter", late)
        async with here.client() as slow, there.client() as quick:
            connecting = asyncio.create_task(slow.connect(one, client_id="same"))
            await entered.wait()
            await quick.connect(one, client_id="same")
            await until(lambda: bool(here.server.devices._taken_elsewhere))
            gate.set()
            await connecting
            told = [p.reason for p in await slow.closed() if isinstance(p, Disconnect)]
            assert told == [ReasonCode.SESSION_TAKEN_OVER]
            await silent(quick)
        assert here.server.devices._taken_elsewhere == {}


async def test_a_kept_session_that_is_overtaken_before_its_taking_is_answered_ends(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to a commit may be late: it is asked for as long as PostgreSQL is away (storage/commits.py)."""
    async with two_nodes(dsn) as (here, there):
        (one,) = await devices(here, 1)
        messaging, broker = here.server.broker.messaging, here.server.broker
        take, tell = messaging.take, broker.evicted
        taken, told, gate = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def answered_late(opening: Opening) -> Taken:
            answer = await take(opening)
            taken.set()
            await gate.wait()
            return answer

        def evicted(ownership: Ownership, *, why: Eviction = Eviction.TAKEN) -> None:
            tell(ownership, why=why)
            told.set()

        monkeypatch.setattr(messaging, "take", answered_late)
        monkeypatch.setattr(broker, "evicted", evicted)
        async with here.client() as slow, there.client() as quick:
            connecting = asyncio.create_task(slow.connect(one, client_id="same", clean_start=False, properties=KEEP))
            await taken.wait()
            await quick.connect(one, client_id="same", clean_start=False, properties=KEEP)
            await told.wait()
            gate.set()
            assert (await connecting).reason is ReasonCode.SERVER_UNAVAILABLE
            await silent(quick)
        await until_idle(here)
        assert here.server.devices._evicted_early == {}


async def test_the_clients_of_a_node_that_was_taken_for_dead_are_told_to_come_back(mqtt: Running) -> None:
    """Nobody has taken their places: there are clients that do not connect again where somebody has."""
    (one,) = await devices(mqtt, 1)
    messaging = mqtt.server.broker.messaging
    async with mqtt.client() as client:
        await client.connect(one, clean_start=False, properties=KEEP)
        async with mqtt.api.database.transaction() as connection:
            assert await messaging_sessions.orphan(connection, messaging.node_id, mqtt.server.now(), 10) == 1
        messaging._inbox.wake()
        assert (await client.expect(Disconnect)).reason is ReasonCode.SERVER_BUSY
    assert mqtt.server.counters.taken_over == 0
    async with mqtt.client() as client:
        connack = await client.connect(one, clean_start=False, properties=KEEP)
        assert connack.session_present
