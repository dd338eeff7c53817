"""A device that repeats itself is answered by a shorter way; nobody can tell, and nothing is let through by it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from adapters.http.limits import HttpLimits
from tests.http_api import BASE, Https, api, https  # noqa: F401  # fixtures
from tests.integration.test_http_server import App, Client, Hot, Site, eventually, get, post, serving
from tests.tls_peers import client_context, connect

LEARNT = post("/hot", b"12345")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with serving(App(), hot=Hot(), limits=HttpLimits(max_body_bytes=1000)) as running:
        yield running


async def accustomed(site: Site, times: int = 3) -> Client:
    """A client whose head the server knows by now."""
    client = await site.client()
    for _ in range(times):
        client.send(LEARNT)
        assert (await client.response()).body == b"hot 12345"
    (connection,) = site.server.connections
    assert connection._reader.known_heads, "the shorter way is not taken"
    return client


async def test_only_the_body_of_a_repeated_request_may_differ(site: Site) -> None:
    client = await accustomed(site)
    for body in (b"54321", b"abcde", b"\r\n\r\n!", b"POST ", b"\x00\xff\x00\xff\x00"):
        client.send(post("/hot", body))
        assert (await client.response()).body == b"hot " + body
    assert site.server.counters.requests == 8
    assert site.server.counters.hot_requests == 8


async def test_bodies_of_many_lengths_are_told_apart(site: Site) -> None:
    client = await site.client()
    for round_ in range(3):
        for length in range(12):
            body = str(round_).encode() * length
            client.send(post("/hot", body))
            assert (await client.response()).body == b"hot " + body
    (connection,) = site.server.connections
    assert len(connection._reader.known_heads) == 4  # bounded, whatever the device does


@pytest.mark.parametrize("cut", [1, 10, len(LEARNT) - 6, len(LEARNT) - 5, len(LEARNT) - 1])
async def test_a_repeated_request_may_come_in_pieces(site: Site, cut: int) -> None:
    client = await accustomed(site)
    client.send(LEARNT[:cut])
    await client.writer.drain()
    await asyncio.sleep(0.01)  # so that it is two reads; as one it is answered alike
    client.send(LEARNT[cut:], LEARNT)
    for _ in range(2):
        assert (await client.response()).body == b"hot 12345"


async def test_pipelined_repetitions_are_answered_in_order(site: Site) -> None:
    client = await accustomed(site)
    bodies = [b"%05d" % number for number in range(10)]
    client.send(*[post("/hot", body) for body in bodies])
    for body in bodies:
        assert (await client.response()).body == b"hot " + body


async def test_what_follows_a_known_head_is_still_judged(site: Site) -> None:
    client = await accustomed(site)
    client.send(LEARNT + b"GARBAGE\r\n\r\n")
    assert (await client.response()).body == b"hot 12345"
    assert (await client.response()).status == 400
    assert await client.ended() == b""


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post("/hot", b"12345").replace(b"Host: localhost", b"Host: local host"), 400),
        (post("/hot", b"12345").replace(b"Content-Length: 5", b"Content-Length: 5\r\nTransfer-Encoding: chunked"), 400),
        (post("/hot", b"12345").replace(b"Content-Length: 5", b"Content-Length: 1001"), 413),
    ],
)
async def test_a_head_that_differs_is_refused_as_ever(site: Site, request_: bytes, status: int) -> None:
    client = await accustomed(site)
    client.send(request_)
    assert (await client.response()).status == status


async def test_heads_that_end_a_connection_or_wait_are_not_learnt(site: Site) -> None:
    for header in ("Connection: close", "Expect: 100-continue"):
        client = await site.client()
        client.send(post("/hot", b"12345", header))
        async with asyncio.timeout(5):
            assert b"hot 12345" in await client.reader.readuntil(b"hot 12345")
        assert not any(connection._reader.known_heads for connection in site.server.connections)
        client.writer.transport.abort()


async def test_a_connection_that_repeats_itself_goes_idle_and_ends_as_any_other() -> None:
    async with serving(App(), hot=Hot(), limits=HttpLimits(keep_alive_timeout=0.3)) as site:
        client = await accustomed(site)
        assert await client.ended() == b""
        assert site.server.counters.idle_closed == 1


async def test_other_requests_pass_between_repetitions(site: Site) -> None:
    client = await accustomed(site)
    client.send(get("/echo"), LEARNT, post("/echo", b"x"), LEARNT)
    bodies = [(await client.response()).body for _ in range(4)]
    assert bodies == [b"", b"hot 12345", b"x", b"hot 12345"]


def telemetry(key: str, value: int) -> bytes:
    body = b'{"a":%d}' % value
    head = f"POST {BASE}/telemetry HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def test_each_key_on_a_connection_stays_its_own_device(https: Https) -> None:  # noqa: F811
    devices: list[dict[str, Any]] = [await https.api.registered(f"HW-{n}") for n in range(3)]
    reader, writer = await connect(https.port, client_context(https.holder))
    client = Client(reader, writer)
    for number in range(30):
        client.send(telemetry(devices[number % 3]["api_key"], number))
        assert (await client.response()).status == 202
    async with https.api.operator() as operator:
        for place, device in enumerate(devices):
            found = (await operator.get(f"{BASE}/devices/{device['device_id']}/readings")).json()["readings"]
            assert sorted(r["value"] for r in found) == list(range(place, 30, 3))
    writer.transport.abort()


async def test_a_repeated_request_does_not_use_a_session_that_has_ended(https: Https) -> None:  # noqa: F811
    device = await https.api.registered()
    resolver, sessions = https.api.registry.resolver, https.api.registry.sessions
    reader, writer = await connect(https.port, client_context(https.holder))
    client = Client(reader, writer)
    for number in range(3):
        client.send(telemetry(device["api_key"], number))
        assert (await client.response()).status == 202
    assert resolver.counters.admitted == 1
    (session,) = sessions.all()
    sessions.ended(session)  # its connection is about to be closed, but a request comes first
    client.send(telemetry(device["api_key"], 3))
    assert (await client.response()).status == 202
    assert resolver.counters.admitted == 2
    assert session not in sessions.all()
    writer.transport.abort()


async def test_a_closed_connection_is_freed_without_a_look_for_cycles(site: Site) -> None:
    client = await accustomed(site)
    known = [weakref.ref(connection) for connection in site.server.connections]
    assert len(known) == 1
    gc.collect()
    gc.disable()
    try:
        client.writer.close()
        await eventually(lambda: known[0]() is None)
    finally:
        gc.enable()
