"""The HTTPS server against hostile clients: a clear answer or a closed connection, and nobody else disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import psutil
import pytest

from adapters.http.limits import HttpLimits
from adapters.http.server import HttpsServer
from adapters.tls.admission import TlsLimits
from tests.integration.test_http_server import App, Client, Hot, Site, get, post, serving
from tests.tls_peers import eventually, on_both_loops

SMUGGLED = get("/smuggled")


@contextlib.asynccontextmanager
async def undisturbed(site: Site) -> AsyncIterator[Client]:
    """A client that is served before and after what happens inside; inside is the hostile one."""
    neighbour, hostile = await site.client(), await site.client()
    for phase in ("before", "after"):
        neighbour.send(post("/echo", phase.encode()))
        assert (await neighbour.response()).body == phase.encode()
        if phase == "before":
            yield hostile


async def assert_refused(client: Client, status: int, code: str) -> str:
    """The error has the API's shape and is the last thing on the connection. Returns its message."""
    response = await client.response()
    assert response.status == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["connection"] == "close"
    document = json.loads(response.body)
    assert sorted(document) == ["code", "correlation_id", "message"]
    assert document["code"] == code
    assert len(document["correlation_id"]) == 32
    assert await client.ended() == b""
    message: str = document["message"]
    return message


HEAD = b"POST /echo HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    {
        "cl and te": HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        "te and cl": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED,
        "two lengths": HEAD + b"Content-Length: 4\r\nContent-Length: 40\r\n\r\nabcd" + SMUGGLED,
        "same length twice": HEAD + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
        "list of lengths": HEAD + b"Content-Length: 4, 4\r\n\r\nabcd",
        "signed length": HEAD + b"Content-Length: +4\r\n\r\nabcd",
        "negative length": HEAD + b"Content-Length: -4\r\n\r\nabcd",
        "hexadecimal length": HEAD + b"Content-Length: 0x4\r\n\r\nabcd",
        "empty length": HEAD + b"Content-Length:\r\n\r\nabcd",
        "huge length": HEAD + b"Content-Length: 99999999999999999999\r\n\r\n",
        "te twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        "te chunked not last": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        "te with a vertical tab": HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        "te in 1.0": b"POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "folded header": HEAD + b"X: a\r\n b\r\n\r\n",
        "bare lf": b"GET /echo HTTP/1.1\nHost: a\n\n",
        "bare lf after a header": HEAD + b"X: a\nY: b\r\n\r\n",
        "bare cr in a value": HEAD + b"X: a\rY: b\r\n\r\n",
        "cr at the end": HEAD + b"\rX",
        "nul in a value": HEAD + b"X: a\x00b\r\n\r\n",
        "control in a value": HEAD + b"X: a\x01b\r\n\r\n",
        "delete in a value": HEAD + b"X: a\x7fb\r\n\r\n",
        "space before the colon": HEAD + b"Content-Length : 4\r\n\r\nabcd",
        "space before the name": b"GET /echo HTTP/1.1\r\n Host: a\r\n\r\n",
        "no name": HEAD + b": a\r\n\r\n",
        "no host": b"GET /echo HTTP/1.1\r\n\r\n",
        "two hosts": HEAD + b"Host: a\r\n\r\n",
        "http 0.9": b"GET /echo\r\n\r\n",
        "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "version 2.0": b"GET /echo HTTP/2.0\r\nHost: a\r\n\r\n",
        "connect": b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
        "raw utf-8 in the target": "GET /é HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
        "broken utf-8 in the path": b"GET /%ff HTTP/1.1\r\nHost: a\r\n\r\n",
        "nul in the path": b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n",
        "control in the target": b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
        "a response": b"HTTP/1.1 200 OK\r\n\r\n",
        "noise": bytes(range(128, 256)),
        "unknown method": b"STEAL / HTTP/1.1\r\nHost: a\r\n\r\n",
        "negative chunk": CHUNKED + b"-1\r\n",
        "huge chunk": CHUNKED + b"FFFFFFFFFFFFFFFFF\r\n",
        "bare lf after a chunk size": CHUNKED + b"1\nx\r\n0\r\n\r\n",
        "chunk longer than said": CHUNKED + b"1\r\nxy\r\n0\r\n\r\n",
        "nul in a chunk extension": CHUNKED + b"1;\x00\r\nx\r\n0\r\n\r\n",
    }.values(),
    ids=lambda data: repr(data[:60]),
)
async def test_ambiguous_or_malformed_requests_get_400_and_nothing_behind_them_is_served(data: bytes) -> None:
    app = App()
    async with serving(app) as site, undisturbed(site) as client:
        client.send(data)
        await assert_refused(client, 400, "INVALID_ARGUMENT")
        assert all(scope["path"] != "/smuggled" for scope in app.scopes)
        assert site.server.counters.refused_bad_request == 1


async def test_a_transfer_coding_that_is_not_served_is_501() -> None:
    async with serving(App()) as site, undisturbed(site) as client:
        client.send(HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")
        await assert_refused(client, 501, "INVALID_ARGUMENT")


async def test_a_refusal_waits_for_the_answers_before_it() -> None:
    app = App()
    async with serving(app, hot=Hot()) as site, undisturbed(site) as client:
        app.started.clear()
        client.send(get("/wait"), post("/hot", b"2"), b"garbage\r\n\r\n")
        await app.started.wait()
        app.gate.set()
        assert (await client.response()).body == b"waited"
        assert (await client.response()).body == b"hot 2"
        await assert_refused(client, 400, "INVALID_ARGUMENT")


# Size


@pytest.mark.parametrize(
    ("filler", "status"),
    [
        (b"X: " + b"a" * 20_000, 431),
        (b"\r\n".join(b"X%d: a" % n for n in range(101)), 431),
    ],
)
async def test_a_head_over_its_limits_is_431(filler: bytes, status: int) -> None:
    async with serving(App()) as site, undisturbed(site) as client:
        client.send(HEAD, filler, b"\r\n\r\n")
        await assert_refused(client, status, "INVALID_ARGUMENT")


async def test_a_head_at_its_limits_passes() -> None:
    async with serving(App()) as site, undisturbed(site) as client:
        client.send(get("/echo", *(f"X{n}: {'a' * 150}" for n in range(99))))
        assert (await client.response()).status == 200


async def test_a_target_over_its_limit_is_414() -> None:
    async with serving(App()) as site, undisturbed(site) as client:
        client.send(get("/echo?" + "a" * 8_200))
        await assert_refused(client, 414, "INVALID_ARGUMENT")


@on_both_loops
async def test_64_megabytes_of_headers_end_early_and_memory_stays_flat() -> None:
    async with serving(App(), tls_limits=TlsLimits(linger=0.2)) as site, undisturbed(site) as client:
        process = psutil.Process()
        before = peak = process.memory_info().rss
        client.send(b"GET /echo HTTP/1.1\r\nHost: a\r\n")
        sent = 0
        line = b"X" * 60 + b": " + b"a" * 65_474 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            while sent < 64_000_000:
                client.send(line)
                await asyncio.wait_for(client.writer.drain(), 5)
                sent += len(line)
                if sent % (10 * len(line)) == 0:
                    peak = max(peak, process.memory_info().rss)
        await eventually(lambda: site.server.counters.refused_headers_too_large == 1)
        assert peak - before < 20_000_000


async def test_one_endless_header_is_431_before_it_ends() -> None:
    async with serving(App()) as site, undisturbed(site) as client:
        client.send(b"GET /echo HTTP/1.1\r\nHost: a\r\nX: ")
        for _ in range(20):
            client.send(b"a" * 10_000)
            await asyncio.sleep(0)
        await assert_refused(client, 431, "INVALID_ARGUMENT")


@on_both_loops
async def test_a_body_over_its_limit_is_413_announced_or_not() -> None:
    limits = HttpLimits(max_body_bytes=1_000, body_overrides={"/echo": 2_000})
    async with serving(App(), limits=limits) as site, undisturbed(site) as client:
        client.send(get("/x", "Content-Length: 1001", method="POST"))
        await assert_refused(client, 413, "INVALID_ARGUMENT")
        chunked = await site.client()
        chunked.send(get("/echo", "Transfer-Encoding: chunked", method="POST"))
        chunked.send(b"3e8\r\n" + b"x" * 1_000 + b"\r\n")
        chunked.send(b"3e9\r\n" + b"x" * 1_001 + b"\r\n0\r\n\r\n")
        await assert_refused(chunked, 413, "INVALID_ARGUMENT")
        allowed = await site.client()
        allowed.send(post("/echo", b"x" * 2_000))
        assert (await allowed.response()).status == 200


async def test_endless_chunk_extensions_and_trailers_are_refused() -> None:
    async with serving(App()) as site, undisturbed(site) as client:
        client.send(CHUNKED, b"1;a=")
        for _ in range(20):
            client.send(b"b" * 8_000)
            await asyncio.sleep(0)
        await assert_refused(client, 400, "INVALID_ARGUMENT")
        trailers = await site.client()
        trailers.send(CHUNKED, b"1\r\nx\r\n0\r\n", b"T: " + b"a" * 5_000 + b"\r\n\r\n")
        await assert_refused(trailers, 431, "INVALID_ARGUMENT")


async def test_too_many_pipelined_requests_end_in_429_after_the_answers() -> None:
    app = App()
    async with serving(app, limits=HttpLimits(max_pipelined=3)) as site, undisturbed(site) as client:
        app.started.clear()
        client.send(get("/wait"), post("/echo", b"1") * 5)
        await app.started.wait()
        app.gate.set()
        assert [(await client.response()).body for _ in range(4)] == [b"waited", b"1", b"1", b"1"]
        await assert_refused(client, 429, "RESOURCE_EXHAUSTED")


async def test_more_requests_than_can_be_answered_get_503_with_retry_after() -> None:
    app = App()
    async with serving(app, limits=HttpLimits(max_in_flight=1)) as site:
        busy, late = await site.client(), await site.client()
        busy.send(get("/wait"))
        await app.started.wait()
        late.send(get("/echo"))
        response = await late.response()
        assert (response.status, response.json()["code"], response.headers["retry-after"]) == (503, "UNAVAILABLE", "1")
        app.gate.set()
        assert (await busy.response()).body == b"waited"


# Slowness


@on_both_loops
async def test_a_slow_head_is_408() -> None:
    async with serving(App(), limits=HttpLimits(header_timeout=0.4)) as site:
        client = await site.client()
        client.send(b"GET /echo HTTP/1.1\r\n")
        drip = asyncio.create_task(drip_headers(client))
        assert "0.4 seconds" in await assert_refused(client, 408, "INVALID_ARGUMENT")
        drip.cancel()
        assert site.server.counters.refused_slow == 1


async def drip_headers(client: Client) -> None:
    while True:
        client.send(b"X: a\r\n")
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", ["/echo", "/hot"])
async def test_a_slow_body_is_408(path: str) -> None:
    limits = HttpLimits(body_grace=0.05, min_body_rate=10_000)
    async with serving(App(), hot=Hot(), limits=limits) as site, undisturbed(site) as client:
        client.send(get(path, "Content-Length: 50000", method="POST"), b"x")
        await assert_refused(client, 408, "INVALID_ARGUMENT")


@pytest.mark.parametrize("path", ["/echo", "/hot"])
async def test_an_anonymous_body_has_to_end_in_time_however_fast_it_comes(path: str) -> None:
    limits = HttpLimits(body_grace=0.03, min_body_rate=0, anonymous_body_timeout=0.1)
    async with serving(App(), hot=Hot(), limits=limits) as site, undisturbed(site) as client:
        client.send(get(path, "Content-Length: 50000", method="POST"))
        drip = asyncio.create_task(drip_body(client))
        assert "0.1 seconds" in await assert_refused(client, 408, "INVALID_ARGUMENT")
        drip.cancel()


async def test_a_recognised_sender_may_take_its_time() -> None:
    app = App()
    limits = HttpLimits(min_body_rate=0, anonymous_body_timeout=0.05)
    async with serving(app, limits=limits) as site:
        client = await site.client()
        client.send(get("/recognised", "Content-Length: 20", method="POST"))
        await app.started.wait()
        (connection,) = site.server.connections
        for number in range(1, 20):
            client.send(b"x")
            await eventually(lambda number=number: connection._reader.body_bytes == number)
            connection._reader.check_progress(asyncio.get_running_loop().time() + number)
        client.send(b"x")
        assert (await client.response()).status == 200


async def drip_body(client: Client) -> None:
    while True:
        client.send(b"x" * 20)
        await asyncio.sleep(0.005)


async def test_slow_senders_hold_no_place_in_flight() -> None:
    limits = HttpLimits(max_in_flight=1)
    async with serving(App(), limits=limits) as site, undisturbed(site) as client:
        client.send(get("/echo", "Content-Length: 9", method="POST"), b"slow")
        slow = await site.client()
        slow.send(get("/echo", "Content-Length: 4", method="POST"), b"slo")
        await eventually(lambda: len(site.server.bodies._by_block) == 1)
        assert site.server.in_flight == 0
        slow.send(b"w")
        assert (await slow.response()).body == b"slow"


async def test_a_body_that_ends_when_the_server_is_full_is_503() -> None:
    app = App()
    async with serving(app, limits=HttpLimits(max_in_flight=1)) as site:
        slow, busy = await site.client(), await site.client()
        slow.send(get("/echo", "Content-Length: 4", "Connection: close", method="POST"), b"slo")
        await eventually(lambda: len(app.scopes) == 1)
        busy.send(get("/wait"))
        await eventually(lambda: len(app.scopes) == 2)
        slow.send(b"w")
        await assert_refused(slow, 503, "UNAVAILABLE")
        app.gate.set()
        assert (await busy.response()).body == b"waited"


async def test_unfinished_bodies_of_one_address_are_counted() -> None:
    async with serving(App(), hot=Hot(), limits=HttpLimits(bodies_per_address=2)) as site:
        first, second, third = [await site.client() for _ in range(3)]
        for client, path in ((first, "/echo"), (second, "/hot"), (third, "/echo")):
            client.send(get(path, "Content-Length: 2", method="POST"))
            if client is not third:
                held = 1 if client is first else 2
                await eventually(lambda held=held: sum(site.server.bodies._by_block.values()) == held)
        await assert_refused(third, 429, "RESOURCE_EXHAUSTED")
        for client in (first, second):
            client.send(b"ok")
            assert (await client.response()).status in (200, 202)
        assert site.server.bodies._by_block == {}


async def test_an_anonymous_reader_is_cut_sooner() -> None:
    limits = HttpLimits(anonymous_send_timeout=0.2)
    async with serving(App(), limits=limits) as site, undisturbed(site) as client:
        client.send(get("/big"))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await eventually(lambda: site.server.counters.stalled == 1)


async def test_a_body_that_waits_for_us_is_not_slow() -> None:
    app = App()
    limits = HttpLimits(body_grace=0.4, min_body_rate=20_000, max_buffered_body=1_000)
    async with serving(app, limits=limits) as site:
        client = await site.client()
        client.send(get("/wait", "Content-Length: 50000", method="POST"), bytes(20_000))
        await app.started.wait()
        await asyncio.sleep(1.0)  # two windows pass while the application does not read
        assert site.server.counters.refused_slow == 0
        app.gate.set()
        assert (await client.response()).status == 200
        client.send(bytes(30_000), post("/echo", b"next"))  # what nobody read does not stop the reading for good
        assert (await client.response()).body == b"next"


async def test_an_application_that_does_not_read_stops_the_peer() -> None:
    app = App()
    async with serving(app, limits=HttpLimits(max_body_bytes=50_000_000)) as site:
        client = await site.client()
        client.send(get("/wait", "Content-Length: 40000000", method="POST"))
        before = psutil.Process().memory_info().rss
        client.send(bytes(1))
        for _ in range(200):
            client.writer.transport.write(bytes(65_536))
            await asyncio.sleep(0)
        (connection,) = site.server.connections
        await eventually(lambda: not connection._transport or not connection._transport.is_reading())
        assert psutil.Process().memory_info().rss - before < 40_000_000  # 13 MB of it are the client's own
        app.gate.set()


@on_both_loops
async def test_a_peer_that_never_reads_its_answer_is_cut_and_holds_little() -> None:
    limits = HttpLimits(send_timeout=0.3)
    async with serving(App(), limits=limits) as site, undisturbed(site) as client:
        before = psutil.Process().memory_info().rss
        client.send(get("/big"))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await eventually(lambda: site.server.counters.stalled == 1)
        assert psutil.Process().memory_info().rss - before < 30_000_000


async def test_a_peer_that_asks_but_never_reads_is_not_served_ahead() -> None:
    app = App()
    async with serving(app, limits=HttpLimits(send_timeout=0.3)) as site, undisturbed(site) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(ConnectionError, TimeoutError):
            for _ in range(400):
                client.send(post("/echo", bytes(60_000)))
                await asyncio.wait_for(client.writer.drain(), 1)
        await eventually(lambda: site.server.counters.stalled == 1)
        assert len(app.scopes) < 400


async def test_drain_does_not_wait_for_a_half_sent_request() -> None:
    app = App()
    async with serving(app) as site:
        client = await site.client()
        client.send(b"GET / HTTP/1.1\r\nHost:")
        await eventually(lambda: site.server.tls_counters.established == 1)
        server: HttpsServer = site.server
        await asyncio.wait_for(server.drain(60), 20)
        assert await client.ended() == b""


async def test_many_connections_cut_at_random_places_leave_nothing() -> None:
    app = App()
    request = post("/echo", b"x" * 500) + CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"
    async with serving(app, hot=Hot()) as site, undisturbed(site):
        for cut in range(1, len(request), 23):
            client = await site.client()
            client.send(request[:cut])
            await client.writer.drain()
            client.writer.transport.abort()
        await eventually(lambda: len(site.server.connections) <= 2)
