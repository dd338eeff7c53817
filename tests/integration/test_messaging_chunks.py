"""What goes in a great many rows goes in chunks: publications of the tenant wait for each of them, and not for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from registry.model import DeviceId, NodeId, TenantId
from registry.storage import messaging as storage
from registry.storage import messaging_routes
from registry.storage.database import Connection
from tests.messaging_brokers import Seconds, broker_on


@pytest.fixture(autouse=True)
def chunks_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.messaging._CHUNK", 2)


async def test_what_a_profile_may_not_retain_any_more_is_forgotten_in_chunks(
    dsn: str, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, sizes = storage.remove_retained, []

    async def removed(connection: Connection, kept: Sequence[Any]) -> int:
        sizes.append(len(kept))
        return await remove(connection, kept)

    monkeypatch.setattr(storage, "remove_retained", removed)
    async with broker_on(dsn, "a", Seconds()) as broker:
        for topic in "abcde":
            await broker.publish(tenant_id, device_id, topic, b"kept", retain=True)
        kept = await broker.messaging.retained_of_device(tenant_id, device_id)
        assert await broker.messaging.forget_retained(tenant_id, kept) == 5
        assert await broker.messaging.retained_topics(tenant_id, "") == []
    assert sizes == [2, 2, 1]


async def test_the_interests_of_a_node_that_died_go_in_chunks(
    dsn: str, tenant_id: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, counts = messaging_routes.remove_node, []

    async def removed(connection: Connection, node_id: NodeId, limit: int) -> int:
        counts.append(await remove(connection, node_id, limit))
        return counts[-1]

    async with broker_on(dsn, "a", Seconds()) as broker, broker_on(dsn, "b", Seconds()) as other:
        for number in range(5):
            await broker.messaging.watch(tenant_id, f"t/{number}", stored=False, qos=1)
        await other.messaging.follow_tenant(tenant_id)
        assert len(other.tables[tenant_id].match(("t", "3")).subscribers) == 1
        monkeypatch.setattr(messaging_routes, "remove_node", removed)
        async with broker.database.connection() as connection:
            await connection.execute(
                "UPDATE messaging_node SET seen_at = now() - interval '1 hour' WHERE node_id = 'a'"
            )
        await other.messaging._beat()
        assert counts[:4] == [2, 2, 1, 0]
        await other.messaging.catch_up(tenant_id)
        assert not other.tables[tenant_id].match(("t", "3")).subscribers
