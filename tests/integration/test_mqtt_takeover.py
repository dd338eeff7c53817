"""Whose a session is after a CONNECT that went wrong half-way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from adapters.mqtt.session import Session
from adapters.mqtt.wire_packets import Connack, QoS, Will
from adapters.mqtt.wire_reasons import LocalProtocolError, ReasonCode
from registry.errors import Unavailable
from registry.messaging_values import Opening, OutcomeOpen, SessionKey, Taken
from tests.http_api import Api, api
from tests.mqtt_devices import KEEP, devices, silent
from tests.mqtt_server import Gone, Running, serving_mqtt
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
        monkeypatch.setattr("adapters.mqtt.device._RELEASE_AGAIN_SECONDS", 0.01)
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
