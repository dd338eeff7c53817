"""Messages between two nodes whose hints are lost: what SUBACK promised holds all the same."""

from __future__ import annotations

import pytest

from adapters.mqtt.wire_packets import QoS
from registry.errors import Unavailable
from tests.http_api import running_api
from tests.mqtt_devices import devices
from tests.mqtt_server import serving_mqtt
from tests.nodes import until

ROUNDS = 12


async def test_qos_0_finds_who_has_just_subscribed_on_another_node(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        running_api(dsn) as first,
        serving_mqtt(first) as here,
        running_api(dsn, name="two", ring=first.ring) as second,
        serving_mqtt(second) as there,
    ):
        second.tenant_id, second.slug = first.tenant_id, first.slug
        one, other = await devices(here, 2)
        messaging = here.server.broker.messaging
        await until(lambda: not messaging.alone)
        async with here.client() as sender, there.client() as receiver:
            await sender.connect(one)
            await receiver.connect(other)
            await receiver.subscribe("site/first")
            monkeypatch.setattr(messaging._inbox, "wake", lambda: None)
            for n in range(ROUNDS):  # the poll, once a second, cannot be what brings them all
                await receiver.subscribe(f"site/{n}", qos=QoS.AT_MOST_ONCE)
                await sender.publish(f"site/{n}", b"a", QoS.AT_MOST_ONCE)
                await sender.publish(f"site/{n}", b"b", QoS.AT_MOST_ONCE)
                got = [await receiver.message() for _ in range(2)]
                assert [(m.topic, m.payload) for m in got] == [(f"site/{n}", b"a"), (f"site/{n}", b"b")]

            def away(_: object) -> None:
                raise Unavailable("the database is away")

            monkeypatch.setattr(messaging, "catch_up", away)  # then what is known has to do
            await sender.publish("site/0", b"c", QoS.AT_MOST_ONCE)
            assert (await receiver.message()).payload == b"c"


async def test_a_node_knows_whether_it_is_alone(dsn: str) -> None:
    async with running_api(dsn) as first, serving_mqtt(first) as here:
        messaging = here.server.broker.messaging
        assert messaging.alone
        async with running_api(dsn, name="two", ring=first.ring) as second, serving_mqtt(second) as there:
            assert not there.server.broker.messaging.alone
            await until(lambda: not messaging.alone)
        await messaging._beat()
        assert messaging.alone
