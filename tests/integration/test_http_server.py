"""The HTTPS server over real sockets: what honest clients and the application may rely on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.http.answer import Answer
from adapters.http.connection import HttpConnection
from adapters.http.exchange import AsgiApp, Message, Scope
from adapters.http.limits import HttpLimits
from adapters.http.request import Head
from adapters.http.server import HttpsServer
from adapters.tls.admission import TlsLimits
from adapters.tls.context import TlsContext
from tests.tls_peers import client_context, connect, eventually, make_certificate, on_both_loops

SERVER = make_certificate()
STATIC = bytes(range(256)) * 40_000
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class App:
    """An application of many small habits, chosen by path."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.disconnects = 0
        self.gate = asyncio.Event()
        self.started = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        self.started.set()
        match scope["path"]:
            case "/echo":
                await answer(send, 200, await body_of(receive))
            case "/unread":
                await answer(send, 401, b"no")
            case "/static":
                await answer(send, 200, STATIC)
            case "/recognised":
                scope["extensions"]["gatehouse.connection"].recognised = True
                await answer(send, 200, await body_of(receive))
            case "/wait":
                await self.gate.wait()
                await answer(send, 200, b"waited")
            case "/until-disconnect":
                while (await receive())["type"] != "http.disconnect":
                    pass
                self.disconnects += 1
            case "/stream":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                for part in (b"one", b"", b"two"):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body"})
            case "/events":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                while True:
                    await send({"type": "http.response.body", "body": b"tick\n", "more_body": True})
                    await asyncio.sleep(0.01)
            case "/big":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                for _ in range(1000):
                    await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
                await send({"type": "http.response.body"})
            case "/fail":
                raise RuntimeError("the reason, for the log only")
            case "/fail-late":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
                await send({"type": "http.response.body", "body": b"half", "more_body": True})
                raise RuntimeError("too late")
            case "/split":
                headers = [(b"x", b"a\r\nset-cookie: b")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            case "/nothing":
                return
            case "/empty":
                await send({"type": "http.response.start", "status": 204, "headers": [(b"content-length", b"0")]})
                await send({"type": "http.response.body"})
            case _:
                await answer(send, 404, b"none")


async def answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode()), (b"Content-Type", b"text/plain")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def body_of(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


@dataclass(slots=True)
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.body)
        return document


class Client:
    """Raw bytes out, responses in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def response(self, *, head_only: bool = False) -> Response:
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:-2])
            body = b""
            if head_only:
                pass
            elif headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                assert await self.reader.readexactly(2) == b"\r\n"
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            return Response(int(lines[0].split()[1]), headers, body)

    async def ended(self) -> bytes:
        """What still comes before the server ends the connection."""
        data = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                while part := await self.reader.read(65_536):
                    data += part
        return data


class Site:
    """A running server, and how to reach it."""

    def __init__(self, server: HttpsServer, port: int) -> None:
        self.server = server
        self.port = port
        self._writers: list[asyncio.StreamWriter] = []

    async def client(self) -> Client:
        reader, writer = await connect(self.port, client_context(SERVER))
        self._writers.append(writer)
        return Client(reader, writer)

    async def ask(self, *parts: bytes) -> Response:
        """One request on a connection of its own."""
        client = await self.client()
        client.send(*parts)
        return await client.response()

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def serving(
    app: AsgiApp, *, limits: HttpLimits | None = None, hot: Any = None, tls_limits: TlsLimits | None = None
) -> AsyncIterator[Site]:
    context = TlsContext(SERVER.credentials(), alpn=[b"http/1.1"])
    server = HttpsServer(app, context, limits=limits, hot=hot, tls_limits=tls_limits)
    site = Site(server, await server.start("127.0.0.1", 0))
    try:
        yield site
    finally:
        site.hang_up()
        await server.drain(2)
        assert server.connections == set()
        assert server.in_flight == 0


def get(path: str, *headers: str, method: str = "GET", host: str = "localhost") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]
    return "\r\n".join(lines).encode()


def post(path: str, body: bytes, *headers: str) -> bytes:
    return get(path, f"Content-Length: {len(body)}", *headers, method="POST") + body


# Requests and responses


@on_both_loops
async def test_requests_follow_each_other_on_one_connection() -> None:
    app = App()
    async with serving(app) as site:
        client = await site.client()
        for body in (b"", b"x", bytes(300_000)):
            client.send(post("/echo", body))
            response = await client.response()
            assert (response.status, response.body) == (200, body)
            assert "connection" not in response.headers
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} [\d:]{8} gmt", response.headers["date"])
            assert "server" not in response.headers
        assert site.server.tls_counters.established == 1


@on_both_loops
async def test_the_application_sees_the_request_and_its_connection() -> None:
    app = App()
    async with serving(app) as site:
        await site.ask(get("/echo?q=%20", "X-Thing:  padded \t", "Empty:"))
        (scope,) = app.scopes
        assert (scope["method"], scope["path"], scope["query_string"], scope["scheme"]) == (
            "GET",
            "/echo",
            b"q=%20",
            "https",
        )
        assert (b"x-thing", b"padded") in scope["headers"]
        assert (b"empty", b"") in scope["headers"]
        assert scope["client"][0] == "127.0.0.1"
        connection = scope["extensions"]["gatehouse.connection"]
        assert isinstance(connection, HttpConnection)
        assert connection.peer == "127.0.0.1"
        assert connection.tls_version == "TLSv1.3"
        assert connection.peer_certificate_der is None
        assert re.fullmatch(r"[0-9a-f]{32}", connection.id)


@on_both_loops
async def test_chunked_both_ways_and_trailers_never_become_headers() -> None:
    app = App()
    async with serving(app) as site:
        chunked = get("/echo", "Transfer-Encoding: chunked", method="POST")
        response = await site.ask(chunked, b"3;a=b\r\none\r\n3\r\ntwo\r\n0\r\nX-Evil: 1\r\nHost: other\r\n\r\n")
        assert response.body == b"onetwo"
        assert all(name not in (b"x-evil",) for name, _ in app.scopes[0]["headers"])
        assert (await site.ask(get("/stream"))).body == b"onetwo"


@on_both_loops
async def test_slow_readers_of_one_answer_share_its_bytes() -> None:
    async with serving(App()) as site:
        clients = [await site.client() for _ in range(3)]
        for client in clients:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(get("/static"))
        streams = [connection._transport for connection in site.server.connections]
        await eventually(lambda: all(stream is not None and stream.get_write_buffer_size() for stream in streams))
        for stream in streams:
            assert stream is not None
            assert [getattr(piece, "obj", None) is STATIC for piece in stream._queue] == [True]
        for client in clients:
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert (await client.response()).body == STATIC


@on_both_loops
async def test_head_and_empty_answers_are_framed() -> None:
    async with serving(App()) as site:
        client = await site.client()
        client.send(get("/unread", method="HEAD"), get("/empty"), get("/stream", method="HEAD"), post("/echo", b"end"))
        first = await client.response(head_only=True)
        assert (first.status, first.headers["content-length"]) == (401, "2")
        empty = await client.response(head_only=True)
        assert empty.status == 204
        assert "content-length" not in empty.headers
        await client.response(head_only=True)
        assert (await client.response()).body == b"end"


async def test_http_1_0_gets_an_answer_and_a_close() -> None:
    async with serving(App()) as site:
        client = await site.client()
        client.send(b"GET /stream HTTP/1.0\r\n\r\n")
        head, _, body = (await client.ended()).partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert b"connection: close" in head
        assert body == b"onetwo"


@on_both_loops
async def test_pipelined_requests_are_answered_in_order() -> None:
    app = App()
    async with serving(app, hot=Hot()) as site:
        client = await site.client()
        client.send(
            get("/wait"), post("/hot", b"1"), post("/echo", b"2"), post("/hot", b"3"), get("/x", "Connection: close")
        )
        await app.started.wait()
        assert len(app.scopes) == 1  # one after another, not side by side
        app.gate.set()
        bodies = [(await client.response()).body for _ in range(5)]
        assert bodies == [b"waited", b"hot 1", b"2", b"hot 3", b"none"]
        assert await client.ended() == b""


async def test_continue_is_sent_when_the_application_wants_the_body() -> None:
    async with serving(App()) as site:
        client = await site.client()
        client.send(get("/echo", "Content-Length: 2", "Expect: 100-continue", method="POST"))
        assert await client.reader.readexactly(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"ok")
        assert (await client.response()).body == b"ok"
        # An application that does not want it answers at once, and the connection cannot go on.
        client.send(get("/unread", "Content-Length: 2", "Expect: 100-continue", method="POST"))
        response = await client.response()
        assert (response.status, response.headers["connection"]) == (401, "close")


@on_both_loops
async def test_an_unread_body_is_skipped_when_small_and_ends_the_connection_when_large() -> None:
    async with serving(App()) as site:
        client = await site.client()
        client.send(get("/unread", "Content-Length: 1000", method="POST"))
        assert (await client.response()).status == 401
        client.send(bytes(1000), post("/echo", b"next"))
        assert (await client.response()).body == b"next"
        client.send(get("/unread", "Content-Length: 500000", method="POST"))
        response = await client.response()
        assert (response.status, response.headers["connection"]) == (401, "close")
        client.send(bytes(500_000))
        assert await client.ended() == b""


async def test_options_of_the_whole_server_and_absolute_targets() -> None:
    app = App()
    async with serving(app) as site:
        client = await site.client()
        client.send(get("*", method="OPTIONS"), get("https://localhost/echo"))
        assert (await client.response(head_only=True)).headers["allow"]
        assert (await client.response()).status == 200
        assert app.scopes[0]["path"] == "/echo"


async def test_an_upgrade_is_ignored_and_the_request_served() -> None:
    async with serving(App()) as site:
        client = await site.client()
        client.send(get("/echo", "Connection: Upgrade", "Upgrade: websocket"), b"\x81\x05hello")
        response = await client.response()
        assert (response.status, response.headers["connection"]) == (200, "close")
        assert await client.ended() == b""


async def test_failures_of_the_application_are_a_500_with_a_correlation_id(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(App()) as site:
        for path in ("/fail", "/nothing", "/split"):
            response = await site.ask(get(path))
            assert response.status == 500
            document = response.json()
            assert document["code"] == "INTERNAL"
            assert "reason" not in response.body.decode()
            logged = [record.__dict__["fields"]["correlation_id"] for record in caplog.records]
            assert logged[-1] == document["correlation_id"]
        assert site.server.counters.app_failures == 3


async def test_a_response_that_breaks_off_is_visibly_incomplete() -> None:
    async with serving(App()) as site:
        client = await site.client()
        client.send(get("/fail-late"))
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await client.response()


# The hot path


class Hot:
    """Answers /hot, by the way that the body asks for."""

    def __init__(self) -> None:
        self.held: list[asyncio.Future[Answer]] = []
        self.asking: list[asyncio.Task[Any] | None] = []

    def accepts(self, method: str, path: str) -> bool:
        return method == "POST" and path == "/hot"

    def handle(self, connection: HttpConnection, head: Head, body: bytes) -> Answer | Awaitable[Answer]:
        match body:
            case b"fail":
                raise RuntimeError("hot failure")
            case b"fail later":
                return self._fail()
            case b"hold":
                self.held.append(asyncio.get_running_loop().create_future())
                return self.held[-1]
            case b"coroutine":
                return self._later(body)
            case b"ask":
                return self._ask()
            case _:
                return Answer(202, b"hot " + body, ((b"x-hot", b"1"),))

    async def _later(self, body: bytes) -> Answer:
        await asyncio.sleep(0)
        return Answer(202, b"later")

    async def _fail(self) -> Answer:
        raise RuntimeError("hot failure")

    async def _ask(self) -> Answer:
        self.asking.append(asyncio.current_task())
        await asyncio.Event().wait()
        raise AssertionError


@on_both_loops
async def test_the_hot_handler_answers_now_or_later() -> None:
    hot = Hot()
    async with serving(App(), hot=hot) as site:
        client = await site.client()
        client.send(post("/hot", b"now"), post("/hot", b"coroutine"), post("/hot", b"hold"), post("/hot", b"after"))
        now = await client.response()
        assert (now.status, now.body, now.headers["x-hot"]) == (202, b"hot now", "1")
        assert now.headers["content-type"] == "application/json"
        assert (await client.response()).body == b"later"
        await eventually(lambda: hot.held)
        hot.held[0].set_result(Answer(202, b"stored"))
        assert (await client.response()).body == b"stored"
        assert (await client.response()).body == b"hot after"


async def test_failures_of_the_hot_handler_are_a_500_and_the_connection_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(App(), hot=Hot()) as site:
        client = await site.client()
        for body in (b"fail", b"fail later"):
            client.send(post("/hot", body))
            response = await client.response()
            assert (response.status, response.json()["code"]) == (500, "INTERNAL")
        assert len(caplog.records) == 2
        client.send(post("/hot", b"on"))
        assert (await client.response()).body == b"hot on"


async def test_a_peer_that_leaves_a_held_request_loses_only_its_answer() -> None:
    hot = Hot()
    async with serving(App(), hot=hot, limits=HttpLimits(half_close_grace=0.05)) as site:
        client = await site.client()
        client.send(post("/hot", b"hold"))
        await eventually(lambda: hot.held)
        client.writer.transport.abort()
        await eventually(lambda: not site.server.connections)
        assert not hot.held[0].cancelled()
        hot.held[0].set_result(Answer(202))
        await eventually(lambda: site.server.in_flight == 0)


async def test_a_half_closed_peer_still_gets_its_answer() -> None:
    hot = Hot()
    async with serving(App(), hot=hot) as site:
        peer = await asyncio.create_subprocess_exec(
            *("openssl", "s_client", "-connect", f"127.0.0.1:{site.port}", "-quiet", "-no_ign_eof"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert peer.stdin is not None
        peer.stdin.write(post("/hot", b"hold"))
        await eventually(lambda: hot.held)
        (connection,) = site.server.connections
        assert connection.eof_received() is True  # as a close_notify from the peer arrives
        hot.held[0].set_result(Answer(202, b"stored"))
        output, _ = await asyncio.wait_for(peer.communicate(), 5)
        assert output.endswith(b"connection: close\r\n\r\nstored")


# Ending connections from our side


@on_both_loops
async def test_close_cuts_the_response_in_flight_and_returns_when_the_socket_is_closed() -> None:
    app = App()
    async with serving(app) as site:
        client = await site.client()
        client.send(get("/until-disconnect"))
        await app.started.wait()
        connection: HttpConnection = app.scopes[0]["extensions"]["gatehouse.connection"]
        gone: list[HttpConnection] = []
        connection.add_close_callback(gone.append)
        connection.session = "a session"
        await asyncio.wait_for(connection.close("credential revoked"), 20)
        assert connection.closed
        assert connection.close_reason == "credential revoked"
        assert gone == [connection]
        assert await client.ended() == b""
        await eventually(lambda: app.disconnects == 1)
        connection.add_close_callback(gone.append)
        await eventually(lambda: len(gone) == 2)
        await connection.close("again")


async def test_idle_connections_are_closed_in_their_time() -> None:
    async with serving(App(), limits=HttpLimits(keep_alive_timeout=0.3, header_timeout=0.3)) as site:
        never_asked, asked = await site.client(), await site.client()
        asked.send(post("/echo", b"x"))
        await asked.response()
        assert await asked.ended() == b""
        assert await never_asked.ended() == b""
        assert site.server.counters.idle_closed == 2


async def test_an_anonymous_connection_is_not_kept_idle() -> None:
    async with serving(App(), limits=HttpLimits(anonymous_keep_alive=0.05)) as site:
        known, unknown = await site.client(), await site.client()
        known.send(post("/recognised", b"x"))
        assert (await known.response()).status == 200
        unknown.send(post("/echo", b"x"))
        assert (await unknown.response()).status == 200
        assert await unknown.ended() == b""
        known.send(post("/echo", b"y"))
        assert (await known.response()).body == b"y"


async def test_debug_names_every_connection(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="gatehouse.http")
    async with serving(App()) as site:
        await site.ask(get("/echo"))
    opened, closed = (record.__dict__["fields"] for record in caplog.records)
    assert (opened["peer"], opened["tls"]) == ("127.0.0.1", "TLSv1.3")
    assert closed["connection"] == opened["connection"]


async def test_a_waiting_request_is_not_idle() -> None:
    app = App()
    async with serving(app, limits=HttpLimits(keep_alive_timeout=0.2, header_timeout=0.2, body_grace=0.02)) as site:
        client = await site.client()
        client.send(get("/wait"))
        await app.started.wait()
        asyncio.get_running_loop().call_later(0.5, app.gate.set)
        assert (await client.response()).body == b"waited"


@on_both_loops
async def test_drain_answers_what_was_asked_and_closes_the_idle() -> None:
    app = App()
    async with serving(app, hot=Hot()) as site:
        idle, busy = await site.client(), await site.client()
        idle.send(post("/echo", b"x"))
        await idle.response()
        busy.send(get("/wait"))
        await eventually(lambda: len(app.scopes) == 2)
        draining = asyncio.create_task(site.server.drain(60))
        assert await idle.ended() == b""
        app.gate.set()
        response = await busy.response()
        assert (response.body, response.headers["connection"]) == (b"waited", "close")
        await asyncio.wait_for(draining, 20)
        with pytest.raises(OSError):  # noqa: PT011
            await site.client()


@on_both_loops
async def test_drain_cancels_streams_and_waiters_at_its_deadline() -> None:
    app = App()
    async with serving(app) as site:
        stream, waiting = await site.client(), await site.client()
        stream.send(get("/events"))
        await stream.reader.readuntil(b"tick")
        waiting.send(get("/wait"))
        await eventually(lambda: len(app.scopes) == 2)
        await asyncio.wait_for(site.server.drain(0.05), 20)
        response = await waiting.response()
        assert (response.status, response.json()["code"]) == (503, "UNAVAILABLE")
        assert not (await stream.ended()).endswith(b"0\r\n\r\n")


@on_both_loops
async def test_drain_cancels_hot_requests_at_its_deadline_also_of_peers_that_are_gone() -> None:
    hot = Hot()
    async with serving(App(), hot=hot, limits=HttpLimits(half_close_grace=0.05)) as site:
        waiting, gone = await site.client(), await site.client()
        for client in (waiting, gone):
            client.send(post("/hot", b"ask"))
        await eventually(lambda: len(hot.asking) == 2)
        gone.writer.transport.abort()
        await eventually(lambda: len(site.server.connections) == 1)
        await asyncio.wait_for(site.server.drain(0.05), 10)
        response = await waiting.response()
        assert (response.status, response.json()["code"]) == (503, "UNAVAILABLE")
        assert all(task is not None and task.cancelled() for task in hot.asking)


# Other people's clients


async def test_curl_is_served(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(SERVER.pem)
    client_certificate = make_certificate("device").save(tmp_path)
    (tmp_path / "body").write_bytes(bytes(200_000))
    app = App()
    async with serving(app, limits=HttpLimits(body_overrides={"/echo": 400_000}, max_body_bytes=1000)) as site:
        base = f"https://localhost:{site.port}"
        command = ["curl", "-sS", "--cacert", str(tmp_path / "ca.pem"), "--cert", str(client_certificate), "--http1.1"]
        command += ["--data-binary", f"@{tmp_path / 'body'}", "-H", "Expect: 100-continue"]
        command += ["-w", "%{http_code} %{size_download}\n", f"{base}/echo", f"{base}/x"]
        command += ["-o", str(tmp_path / "one"), "-o", str(tmp_path / "two")]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=20, check=False)
        served, refused = done.stdout.decode().splitlines()
        assert served == "200 200000"
        assert refused.startswith("413 ")
        connection: HttpConnection = app.scopes[0]["extensions"]["gatehouse.connection"]
        assert connection.closed


async def test_plain_http_gets_a_hint() -> None:
    async with serving(App()) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(get("/"))
        assert b"https" in await asyncio.wait_for(reader.read(), 5)
        writer.close()
