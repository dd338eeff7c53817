"""What grows is read through an index that serves the order and the limit: a page costs what it shows.

Each statement is planned as PostgreSQL does for one that it has prepared (for any values), and for its values, on
tables that have some thousands of rows, so that an index is worth it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from registry.events import Position
from registry.model import CredentialKind, DeviceId, DeviceStatus, TemplateId, TenantId
from registry.storage import (
    credentials,
    devices,
    events,
    messaging,
    nodes,
    presence,
    registration_tokens,
    uplinks,
)
from registry.storage.database import Connection, Database
from registry.storage.devices import DeviceQuery
from registry.storage.uplinks import BEGINNING, END, LAST_UUID, Window

TENANT = TenantId(UUID(int=1))
DEVICE = DeviceId(UUID(int=7))
TEMPLATE = TemplateId("T" * 26)
AFTER = (datetime(2030, 1, 1, tzinfo=UTC), UUID(int=5))
ROWS = 4_000

_FILL = f"""
INSERT INTO tenant (tenant_id, slug, name) SELECT lpad(to_hex(n), 32, '0')::uuid, 't' || n, 'T'
FROM generate_series(1, 20) n;
INSERT INTO device_profile (tenant_id, profile_id, name) SELECT tenant_id, 'p' || n, 'P'
FROM tenant, generate_series(0, 9) n;
INSERT INTO provisioning_template (tenant_id, template_id, name, one_time, credential_type, default_groups, status,
                                   key_hash, sealed_claim_psk, created_by)
VALUES ('{TENANT}', '{TEMPLATE}', 'T', false, 'api_key', '{{}}', 'active', '', '', 'me');
INSERT INTO device (device_id, tenant_id, hardware_id, name, status, anchor_mode, credential_type, profile_id, site_id,
                    template_id, created_at, gateway_id)
SELECT lpad(to_hex(n), 32, '0')::uuid, '{TENANT}', 'HW-' || n, 'D', CASE WHEN n < 5 THEN 'offline' ELSE 'active' END,
       'ANCHOR_MODE_MERKLE_BATCH', 'api_key', 'p' || n % 10, CASE WHEN n < 5 THEN 'rare' ELSE 'usual' END,
       CASE WHEN n % 4 > 0 THEN '{TEMPLATE}' END, now() - n * interval '1 minute',
       CASE WHEN n > 100 THEN lpad(to_hex(n % 100 + 1), 32, '0')::uuid END
FROM generate_series(1, {ROWS}) n;
INSERT INTO credential (credential_id, tenant_id, device_id, kind, lookup)
SELECT gen_random_uuid(), tenant_id, device_id, CASE WHEN device_id > '{DEVICE}' THEN 'x509' ELSE 'api_key' END,
       uuid_send(device_id)
FROM device;
INSERT INTO registration_token (token_id, tenant_id, device_id, name, token_hash, created_by, created_at, expires_at,
                                used_at, credential_id)
SELECT gen_random_uuid(), tenant_id, device_id, 'T', uuid_send(device_id), 'me', now(), now(), now(), device_id
FROM device;
INSERT INTO event (event_id, tenant_id, kind, device_id, actor, correlation_id)
SELECT gen_random_uuid(), tenant_id, 'device.connected', CASE WHEN n % 2 = 0 THEN '{DEVICE}'::uuid ELSE device_id END,
       'me', ''
FROM device, generate_series(1, 4) n;
INSERT INTO uplink (uplink_id, tenant_id, device_id, kind, payload, received_at, transport)
SELECT gen_random_uuid(), '{TENANT}', '{DEVICE}', 'event', '1', date_trunc('day', now()) + n * interval '1 second',
       'mqtt'
FROM generate_series(1, {ROWS}) n;
INSERT INTO uplink (uplink_id, tenant_id, device_id, kind, payload, received_at, transport)
SELECT gen_random_uuid(), tenant_id, device_id, 'event', '1', date_trunc('day', now()), 'mqtt' FROM device;
INSERT INTO reading (tenant_id, device_id, component, sensor, observed_at, received_at, uplink_id, ordinal, number)
SELECT tenant_id, device_id, 'main', 't', received_at, received_at, uplink_id, 0, 1 FROM uplink;
INSERT INTO session (session_id, node_id, tenant_id, device_id, credential_id, transport, peer, opened_at)
SELECT device_id, 'a', tenant_id, device_id, device_id, 'mqtt', '', now() FROM device;
INSERT INTO node (node_id, incarnation, started_at, heartbeat_at) VALUES ('a', gen_random_uuid(), now(), now());
INSERT INTO presence (device_id, node_id, tenant_id, connected_at) SELECT device_id, 'a', tenant_id, now() FROM device;
INSERT INTO messaging_session (tenant_id, device_id, client_id, credential_id, epoch, node_id, expiry)
SELECT tenant_id, device_id, 'c', device_id, 1, 'a', 60 FROM device;
INSERT INTO messaging_route (tenant_id, version, session_id, device_id, client_id, filter, stored, qos)
SELECT tenant_id, session_id, session_id, device_id, 'c', 't', true, 1 FROM messaging_session;
INSERT INTO messaging_route (tenant_id, version, node_id, filter, stored, qos)
SELECT tenant_id, session_id, 'a', 't' || session_id, true, 1 FROM messaging_session;
"""

Reading = Callable[[Any], Awaitable[object]]
WINDOW = Window(BEGINNING, END, 11)
PAGES: dict[str, Reading] = {
    "events of the feed": lambda c: events.read_settled(c, Position(0, 0), 10),
    "events that end sessions": lambda c: events.read_early(c, [1], 10),
    "the newest event": events.newest_settled,
    "the oldest unsettled event": events.oldest_unsettled,
    "events of a tenant": lambda c: events.read_tenant(c, TENANT, Position(0, 0), 10),
    "a device's timeline": lambda c: events.read_device(c, TENANT, DEVICE, None, 10),
    "a device's timeline, further": lambda c: events.read_device(c, TENANT, DEVICE, Position(2**40, 2**40), 10),
    "devices": lambda c: devices.read(c, TENANT, DeviceQuery(), None, 10),
    "devices of a status": lambda c: devices.read(c, TENANT, DeviceQuery(status=DeviceStatus.ACTIVE), AFTER, 10),
    "devices of a rare status": lambda c: devices.read(c, TENANT, DeviceQuery(status=DeviceStatus.OFFLINE), None, 10),
    "devices of a profile": lambda c: devices.read(c, TENANT, DeviceQuery(profile_id="p1"), AFTER, 10),
    "devices of a site": lambda c: devices.read(c, TENANT, DeviceQuery(site_id="usual"), None, 10),
    "devices of a small site": lambda c: devices.read(c, TENANT, DeviceQuery(site_id="rare"), None, 10),
    "devices of a gateway": lambda c: devices.read(c, TENANT, DeviceQuery(gateway_id=DEVICE), None, 10),
    "devices of a template": lambda c: devices.read(c, TENANT, DeviceQuery(template_id=TEMPLATE), AFTER, 10),
    "a chunk of a template's devices": lambda c: devices.lock_claimed(c, TENANT, TEMPLATE, devices.FIRST, 10),
    "certificates": lambda c: credentials.read(c, TENANT, None, CredentialKind.X509, AFTER, 10),
    "credentials of a device": lambda c: credentials.read(c, TENANT, DEVICE, None, None, 10),
    "open registration tokens": lambda c: registration_tokens.read_open(c, TENANT, AFTER, 10),
    "dead owners": messaging.unlisted_owners,
    "dead nodes": nodes.remove_dead,
    "dead nodes' devices": lambda c: presence.of_nobody(c, 10),
}
"""Statements that PostgreSQL prepares once and runs often."""
PLANNED_EACH_TIME: dict[str, Reading] = {
    "uplinks": lambda c: uplinks.read_uplinks(c, TENANT, DEVICE, None, WINDOW, (END, LAST_UUID)),
    "readings": lambda c: uplinks.read_readings(c, TENANT, DEVICE, None, None, WINDOW, (END, LAST_UUID, 0)),
    "readings of a sensor": lambda c: uplinks.read_readings(
        c, TENANT, DEVICE, "main", "t", WINDOW, (END, LAST_UUID, 0)
    ),
}


@pytest.fixture
async def filled(database: Database) -> AsyncIterator[Connection]:
    async with database.connection() as connection:
        await connection.execute(_FILL)
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("LOAD 'auto_explain'")
        for name, value in (
            ("auto_explain.log_min_duration", "0"),
            ("auto_explain.log_analyze", "on"),
            ("auto_explain.log_timing", "off"),
            ("auto_explain.log_level", "notice"),
            ("client_min_messages", "notice"),
        ):
            await connection.execute("SELECT set_config($1, $2, false)", name, value)
        yield connection


async def most_rows(connection: Connection, reading: Reading, mode: str) -> tuple[int, str]:
    """The most rows that a node of the plans of `reading` met, and the plans, as they were executed."""
    plans: list[str] = []

    def listen(_: object, message: Any) -> None:
        plans.append(str(message.message))

    await connection.execute("SELECT set_config('plan_cache_mode', $1, false)", mode)
    connection.add_log_listener(listen)
    try:
        for _ in range(7):  # the sixth is the first for which a plan for any values may be taken
            plans.clear()
            await reading(connection)
    finally:
        connection.remove_log_listener(listen)
    text = "\n".join(plans)
    met = [0]
    for line in text.splitlines():
        words = line.replace("(", " ").replace(")", " ").split()
        rows = [word.removeprefix("rows=") for word in words if word.startswith("rows=")]
        loops = [word.removeprefix("loops=") for word in words if word.startswith("loops=")]
        if loops:
            met.append(int(float(rows[-1]) * int(loops[-1])))
        if line.strip().startswith("Rows Removed by"):
            met.append(int(float(words[-1])))
    return max(met), text


@pytest.mark.parametrize("mode", ["auto", "force_generic_plan"])
async def test_a_page_costs_what_it_shows(filled: Connection, mode: str) -> None:
    for name, reading in PAGES.items():
        rows, plans = await most_rows(filled, reading, mode)
        assert rows <= 100, f"{name}\n{plans}"


async def test_a_page_of_what_a_device_sent_costs_what_it_shows(filled: Connection) -> None:
    for name, reading in PLANNED_EACH_TIME.items():
        rows, plans = await most_rows(filled, reading, "auto")
        assert rows <= 100, f"{name}\n{plans}"
