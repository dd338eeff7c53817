"""The largest names that the configuration allows fit the indexes that they are found by: a row of a B-tree takes some
2,700 bytes, less than a name that cannot be compressed may have."""

from __future__ import annotations

from secrets import token_urlsafe
from typing import Annotated, get_args, get_origin, get_type_hints

from msgspec import Meta

from edge.config_listeners import Mqtt
from registry.messaging_values import SessionKey
from registry.model import DeviceId, TenantId
from tests.messaging_brokers import Seconds, broker_on


def largest(field: str) -> int:
    hint = get_type_hints(Mqtt, include_extras=True)[field]
    assert get_origin(hint) is Annotated
    (most,) = [meta.le for meta in get_args(hint) if isinstance(meta, Meta)]
    assert isinstance(most, int)
    return most


async def test_a_session_of_the_largest_name_subscribes_and_retains_under_the_largest_topic(
    dsn: str, tenant_id: TenantId, device_id: DeviceId
) -> None:
    client_id, topic = (token_urlsafe(largest(field))[: largest(field)] for field in ("client_id_bytes", "topic_bytes"))
    key = SessionKey(tenant_id, device_id, client_id)
    async with broker_on(dsn, "a", Seconds()) as broker:
        served, _ = await broker.connect(key)
        await broker.subscribe(served, topic)
        await broker.publish(tenant_id, device_id, topic, b"kept", retain=True)
        assert served.payloads == [b"kept"]
        await broker.disconnect(served)
        _, resumed = await broker.connect(key)
        assert resumed is not None
        assert await broker.messaging.retained_topics(tenant_id, topic) == [topic]
