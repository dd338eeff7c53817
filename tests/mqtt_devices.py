"""Devices of one tenant that share granted topics, for tests of the broker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapters.mqtt.properties import Properties
from adapters.mqtt.wire_packets import Ping
from adapters.mqtt.wire_reasons import PacketType
from tests.http_api import BASE
from tests.mqtt_server import Client, Device, Running

GRANTS: list[dict[str, Any]] = [
    {"filter": "site/#", "allow": ["publish", "subscribe"]},
    {"filter": "own/me/#", "allow": ["publish", "subscribe"]},
    {"filter": "vault/#", "allow": ["publish", "subscribe"]},
    {"filter": "vault/secret/#", "deny": ["publish", "subscribe"]},
    {"filter": "vault/read/#", "deny": ["publish"]},
]
KEEP = Properties(session_expiry_interval=3600)


async def profile(mqtt: Running, grants: Sequence[dict[str, Any]], profile_id: str = "p_site") -> str:
    async with mqtt.api.operator() as operator:
        body = {"name": "Site", "profile_id": profile_id, "topic_grants": list(grants)}
        answer = await operator.post(f"{BASE}/profiles", json=body)
    assert answer.status_code == 201, answer.text
    return profile_id


async def regrant(mqtt: Running, grants: Sequence[dict[str, Any]], profile_id: str = "p_site") -> None:
    """Change what the profile grants."""
    async with mqtt.api.operator() as operator:
        answer = await operator.put(f"{BASE}/profiles/{profile_id}", json={"topic_grants": list(grants)})
    assert answer.status_code == 200, answer.text


async def devices(mqtt: Running, count: int) -> list[Device]:
    granted = await profile(mqtt, GRANTS)
    return [await mqtt.device(f"HW-{n}", profile_id=granted) for n in range(count)]


async def silent(client: Client) -> None:
    """Nothing comes: whatever was on its way would be before the answer to a ping."""
    await client.send(Ping(PacketType.PINGREQ))
    assert isinstance(await client.packet(), Ping)
