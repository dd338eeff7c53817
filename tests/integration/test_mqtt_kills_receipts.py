"""The packet id of a QoS 2 uplink is stored with the uplink: a repeated PUBLISH finds it, whatever was lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapters.mqtt.properties import Properties
from adapters.mqtt.wire_packets import Ack, Publish, QoS
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from registry.messaging_values import Incoming, Ownership, SessionKey, SessionLost
from registry.model import DeviceId, TenantId, Transport
from registry.payloads import NewUplink, Source, payload_from_json, uplink_from
from registry.storage.database import Database
from registry.uplinks import Uplinks
from tests.http_api import Api, api
from tests.integration.test_uplinks import wired
from tests.messaging_brokers import Seconds, broker_on
from tests.mqtt_server import Client, Device, Running, serving_mqtt

__all__ = ["api"]

VERSIONS = pytest.mark.parametrize("version", list(Version), ids=["3.1.1", "5.0"])


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    async with serving_mqtt(api) as running:
        yield running


async def come_back(client: Client, device: Device) -> bool:
    kept = Properties(session_expiry_interval=3600) if client.version is Version.V5 else Properties()
    return (await client.connect(device, clean_start=False, properties=kept)).session_present


def uplink(device_id: str, number: int, packet_id: int, *, dup: bool) -> Publish:
    return Publish(f"devices/{device_id}/events", b'{"n":%d}' % number, QoS.EXACTLY_ONCE, False, dup, packet_id)


@VERSIONS
async def test_an_uplink_repeated_on_the_next_connection_is_stored_once(mqtt: Running, version: Version) -> None:
    device = await mqtt.device()
    async with mqtt.client(version=version) as client:
        await come_back(client, device)
        await client.send(uplink(device.device_id, 1, 7, dup=False))
        assert (await client.acknowledged(PacketType.PUBREC, 7)) is ReasonCode.SUCCESS
    async with mqtt.client(version=version) as client:  # its PUBREC was lost, it believes
        assert await come_back(client, device)
        await client.send(uplink(device.device_id, 1, 7, dup=True))
        assert (await client.acknowledged(PacketType.PUBREC, 7)) is ReasonCode.SUCCESS
        await client.send(Ack(PacketType.PUBREL, 7))
        assert (await client.acknowledged(PacketType.PUBCOMP, 7)) is ReasonCode.SUCCESS
    async with mqtt.client(version=version) as client:  # the id is free again, and means another message
        assert await come_back(client, device)
        await client.send(uplink(device.device_id, 2, 7, dup=False))
        assert (await client.acknowledged(PacketType.PUBREC, 7)) is ReasonCode.SUCCESS
    assert [each["payload"] for each in await mqtt.uplinks(device.device_id)] == [{"n": 2}, {"n": 1}]


async def test_the_core_stores_once_what_came_under_one_packet_id(
    dsn: str, database: Database, tenant_id: TenantId, device_id: DeviceId, tmp_path: Path
) -> None:
    def under(ownership: Ownership, packet_id: int) -> NewUplink:
        source = Source(tenant_id, device_id, Transport.MQTT)
        made = uplink_from(source, payload_from_json(b"{}"), kind="event", message_id=None)
        fields = {name: getattr(made, name) for name in made.__struct_fields__}
        return NewUplink(**{**fields, "origin": Incoming(ownership, packet_id)})

    async with broker_on(dsn, "a", Seconds()) as broker, wired(dsn, tmp_path) as (wire, through):
        served, _ = await broker.connect(SessionKey(tenant_id, device_id, "one"))
        uplinks = Uplinks(through)
        together = await asyncio.gather(*(uplinks.submit(under(served.ownership, n)) for n in (1, 2, 1)))
        assert [each.duplicate for each in together] == [False, False, True]
        assert (await uplinks.submit(under(served.ownership, 2))).duplicate
        wire.lose_the_answer_to(b"COMMIT")
        await uplinks.submit(under(served.ownership, 3))
        assert wire.lost == 1
        await broker.messaging.released(served.ownership, 1)
        assert not (await uplinks.submit(under(served.ownership, 1))).duplicate
        later, resumed = await broker.connect(SessionKey(tenant_id, device_id, "one"))
        assert resumed is not None
        assert resumed.incoming == (1, 2, 3)
        with pytest.raises(SessionLost):
            await uplinks.submit(under(served.ownership, 4))
        await uplinks.submit(under(later.ownership, 4))
        await uplinks.stop()
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM uplink") == 5
