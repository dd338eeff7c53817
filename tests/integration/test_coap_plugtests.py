"""The test descriptions of the ETSI CoAP Plugtests (TD_COAP_*), against tests/coap_plugtest_server.py.

The client's side is raw messages, so that what the descriptions check of the server is checked to the letter; what
independent clients make of the same server is at the end. The descriptions of proxies (CORE_24 to 30) do not apply:
this is none. "After some time" is a step that the test makes, or a timeout that is short here.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiocoap
import pytest
import pytest_asyncio
from aiocoap.numbers.codes import Code

from adapters.coap.endpoint import CoapEndpoint
from adapters.coap.limits import CoapLimits
from tests.coap_peers import ACK, CON, NON, RST, RawClient, UdpTransport
from tests.coap_plugtest_server import _LARGE, _LARGE_64K, LINKS, PlugtestResources

TEXT, XML, LINK_FORMAT = 0, 41, 40


class Plugtest:
    """A server whose resources the test steps, and one client. `lossy`: what is not acknowledged comes again soon."""

    def __init__(self, lossy: bool) -> None:
        self.gate = asyncio.Event()
        self.resources = PlugtestResources(sleep=self._wait)
        timeout = 0.3 if lossy else 60.0
        limits = CoapLimits(ack_delay=0.02, ack_timeout=timeout, max_retransmit=2, non_interval=0.0)
        self.endpoint = CoapEndpoint(self.resources, limits)
        self.transport = UdpTransport(self.endpoint)
        self.client = RawClient()
        self.port = 0

    async def _wait(self, _: float) -> None:
        await self.gate.wait()

    @property
    def observers(self) -> int:
        return self.endpoint.counters.observations

    async def observes(self, path: str, kind: Any = CON) -> aiocoap.Message:
        first = await self.client.asks(Code.GET, b"t", kind, path=path, observe=0)
        assert (first.code, first.opt.content_format) == (Code.CONTENT, TEXT)
        assert first.opt.observe is not None
        return first

    async def notified(self, path: str, before: aiocoap.Message, kind: Any = CON) -> aiocoap.Message:
        """The resource changes; its notification, acknowledged."""
        self.resources.observed[(path,)].step()
        news = await self.client.hears()
        assert (news.mtype, news.code, news.token) == (kind, Code.CONTENT, b"t")
        assert news.opt.content_format == before.opt.content_format
        assert news.opt.observe > before.opt.observe
        if kind == CON:
            self.client.acknowledges(news)
        return news

    async def rest(self, first: aiocoap.Message, path: str, code: Code = Code.GET, **more: Any) -> bytes:
        """The other blocks of an answer, in the size of the first one."""
        body, block = bytearray(first.payload), first.opt.block2
        while block.more:
            number = block.block_number + 1
            wanted = (number, False, block.size_exponent)
            answer = await self.client.asks(code, b"b", path=path, block2=wanted, **more)
            assert answer.code == first.code
            assert answer.opt.etag == first.opt.etag
            block = answer.opt.block2
            assert (block.block_number, block.size_exponent) == (number, first.opt.block2.size_exponent)
            assert len(answer.payload) == block.size or not block.more
            body += answer.payload
        return bytes(body)


@pytest_asyncio.fixture
async def plugtest(request: pytest.FixtureRequest) -> AsyncIterator[Plugtest]:
    made = Plugtest(lossy=getattr(request, "param", False))
    made.port = await made.transport.start()
    await made.client.start(made.port)
    yield made
    made.gate.set()
    await made.endpoint.drain(1.0)
    assert made.endpoint.counters.failures == 0
    made.client.stop()
    made.transport.stop()


lossy = pytest.mark.parametrize("plugtest", [True], indirect=True)


@pytest.mark.parametrize(
    ("identifier", "kind", "method", "codes"),
    [
        ("TD_COAP_CORE_01", CON, Code.GET, {Code.CONTENT}),
        ("TD_COAP_CORE_02", CON, Code.DELETE, {Code.DELETED}),
        ("TD_COAP_CORE_03", CON, Code.PUT, {Code.CHANGED, Code.CREATED}),
        ("TD_COAP_CORE_04", CON, Code.POST, {Code.CHANGED, Code.CREATED}),
        ("TD_COAP_CORE_05", NON, Code.GET, {Code.CONTENT}),
        ("TD_COAP_CORE_06", NON, Code.DELETE, {Code.DELETED}),
        ("TD_COAP_CORE_07", NON, Code.PUT, {Code.CHANGED, Code.CREATED}),
        ("TD_COAP_CORE_08", NON, Code.POST, {Code.CHANGED, Code.CREATED}),
    ],
)
async def test_TD_COAP_CORE_01_to_08(
    plugtest: Plugtest, identifier: str, kind: Any, method: Code, codes: set[Code]
) -> None:
    more = {"payload": b"arbitrary", "content_format": TEXT} if method in (Code.PUT, Code.POST) else {}
    answer = await plugtest.client.asks(method, b"tok", kind, path="test", **more)
    assert answer.code in codes
    if method == Code.GET:
        assert (answer.opt.content_format, bool(answer.payload)) == (TEXT, True)


@pytest.mark.parametrize("token", [b"", b"\1\2\3\4"])
async def test_TD_COAP_CORE_09_and_11_separate_response(plugtest: Plugtest, token: bytes) -> None:
    message_id = plugtest.client.sends(CON, Code.GET, token, path="separate")
    acknowledgement = await plugtest.client.hears()
    assert (acknowledgement.mtype, acknowledgement.code, acknowledgement.mid) == (ACK, Code.EMPTY, message_id)
    plugtest.gate.set()
    answer = await plugtest.client.hears()
    assert (answer.mtype, answer.code, answer.token) == (CON, Code.CONTENT, token)
    assert (answer.opt.content_format, answer.payload) == (TEXT, b"that took a while")
    plugtest.client.acknowledges(answer)
    await plugtest.client.hears_nothing()


@pytest.mark.parametrize("token", [b"", b"\1", b"12345678"])
async def test_TD_COAP_CORE_10_and_12_tokens(plugtest: Plugtest, token: bytes) -> None:
    assert (await plugtest.client.asks(Code.GET, token, path="test")).token == token


async def test_TD_COAP_CORE_13_several_path_segments(plugtest: Plugtest) -> None:
    assert (await plugtest.client.asks(Code.GET, path="seg1/seg2/seg3")).payload == b"/seg1/seg2/seg3"


async def test_TD_COAP_CORE_14_several_queries(plugtest: Plugtest) -> None:
    answer = await plugtest.client.asks(Code.GET, path="query", uri_query=("first=1", "second=2", "third=3"))
    assert (answer.code, answer.opt.content_format, answer.payload) == (Code.CONTENT, TEXT, b"first=1&second=2&third=3")


async def test_TD_COAP_CORE_15_lost_request_and_lost_response(plugtest: Plugtest) -> None:
    request = aiocoap.Message(code=Code.POST, uri_path=("large-create",), _mid=7, _mtype=CON).encode()
    answers = []
    for _ in range(3):  # what a client does whose request, or whose answer, was lost
        plugtest.client.sends_bytes(request)
        answer = await plugtest.client.hears()
        answers.append((answer.mtype, answer.mid, answer.code, answer.opt.location_path))
    assert answers == [(ACK, 7, Code.CREATED, ("large-create", "1"))] * 3  # created once
    assert plugtest.endpoint.counters.duplicates == 2


@lossy
async def test_TD_COAP_CORE_16_lossy_separate_response(plugtest: Plugtest) -> None:
    request = aiocoap.Message(code=Code.GET, uri_path=("separate",), _mid=7, _mtype=CON).encode()
    for _ in range(2):  # the acknowledgement of the request was lost
        plugtest.client.sends_bytes(request)
        assert (await plugtest.client.hears()).code == Code.EMPTY
    plugtest.gate.set()
    first, again = await plugtest.client.hears(), await plugtest.client.hears()  # the answer was lost, or its ACK
    assert (first.mtype, first.mid, first.payload) == (again.mtype, again.mid, again.payload)
    plugtest.client.acknowledges(again)
    await plugtest.client.hears_nothing()
    assert plugtest.endpoint.counters.retransmissions >= 1


async def test_TD_COAP_CORE_17_separate_response_to_a_non(plugtest: Plugtest) -> None:
    message_id = plugtest.client.sends(NON, Code.GET, b"t", path="separate")
    await plugtest.client.hears_nothing()
    plugtest.gate.set()
    answer = await plugtest.client.hears()
    assert (answer.mtype, answer.code, answer.token) == (NON, Code.CONTENT, b"t")
    assert message_id  # the answer has an id of the server's own


async def test_TD_COAP_CORE_18_location_path(plugtest: Plugtest) -> None:
    answer = await plugtest.client.asks(Code.POST, path="test", payload=b"new", content_format=TEXT)
    assert (answer.code, answer.opt.location_path) == (Code.CREATED, ("location1", "location2", "location3"))


async def test_TD_COAP_CORE_19_location_query(plugtest: Plugtest) -> None:
    answer = await plugtest.client.asks(Code.POST, path="location-query", payload=b"new", content_format=TEXT)
    assert (answer.code, answer.opt.location_query) == (Code.CREATED, ("first=1", "second=2"))


async def test_TD_COAP_CORE_20_accept(plugtest: Plugtest) -> None:
    for accept, payload in ((TEXT, b"plain"), (XML, b"<format>xml</format>")):
        answer = await plugtest.client.asks(Code.GET, path="multi-format", accept=accept)
        assert (answer.code, answer.opt.content_format, answer.payload) == (Code.CONTENT, accept, payload)
    assert (await plugtest.client.asks(Code.GET, path="multi-format", accept=60)).code == Code.NOT_ACCEPTABLE


async def test_TD_COAP_CORE_21_etag(plugtest: Plugtest) -> None:
    client = plugtest.client
    first = await client.asks(Code.GET, path="validate")
    valid = await client.asks(Code.GET, path="validate", etags=(first.opt.etag,))
    assert (valid.code, valid.opt.etag, valid.payload) == (Code.VALID, first.opt.etag, b"")
    await client.asks(Code.PUT, path="validate", payload=b"other", content_format=TEXT)
    changed = await client.asks(Code.GET, path="validate", etags=(first.opt.etag,))
    assert (changed.code, changed.payload) == (Code.CONTENT, b"other")
    assert changed.opt.etag != first.opt.etag


async def test_TD_COAP_CORE_22_if_match(plugtest: Plugtest) -> None:
    client = plugtest.client
    first = await client.asks(Code.GET, path="validate")
    mine = await client.asks(Code.PUT, path="validate", if_match=(first.opt.etag,), payload=b"1", content_format=TEXT)
    assert mine.code == Code.CHANGED
    second = await client.asks(Code.GET, path="validate")
    assert second.payload == b"1"
    await client.asks(Code.PUT, path="validate", payload=b"2", content_format=TEXT)
    late = await client.asks(Code.PUT, path="validate", if_match=(second.opt.etag,), payload=b"3", content_format=TEXT)
    assert late.code == Code.PRECONDITION_FAILED
    assert (await client.asks(Code.GET, path="validate")).payload == b"2"


async def test_TD_COAP_CORE_23_if_none_match(plugtest: Plugtest) -> None:
    codes = [
        (
            await plugtest.client.asks(Code.PUT, path="create1", if_none_match=True, payload=b"x", content_format=TEXT)
        ).code
        for _ in range(2)
    ]
    assert codes == [Code.CREATED, Code.PRECONDITION_FAILED]


async def test_TD_COAP_CORE_31_ping(plugtest: Plugtest) -> None:
    message_id = plugtest.client.sends(CON, Code.EMPTY)
    pong = await plugtest.client.hears()
    assert (pong.mtype, pong.code, pong.mid, pong.token, pong.payload) == (RST, Code.EMPTY, message_id, b"", b"")


# Links ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identifier", "query", "expected"),
    [
        ("TD_COAP_LINK_01", (), lambda link: True),
        ("TD_COAP_LINK_02", ("rt=Type1",), lambda link: "Type1" in link.resource_types),
        ("TD_COAP_LINK_03", ("rt=*",), lambda link: link.resource_types),
        ("TD_COAP_LINK_04", ("rt=Type2",), lambda link: "Type2" in link.resource_types),
        ("TD_COAP_LINK_05", ("if=If*",), lambda link: link.interfaces and link.interfaces[0].startswith("If")),
        ("TD_COAP_LINK_06", ("sz=*",), lambda link: link.size is not None),
        ("TD_COAP_LINK_07", ("href=/link1",), lambda link: link.path == ("link1",)),
        ("TD_COAP_LINK_08", ("href=/link*",), lambda link: link.path[0].startswith("link")),
        ("two filters", ("rt=Type1", "if=foo"), lambda link: link.path == ("multi-format",)),
        ("presence", ("obs",), lambda link: link.observable),
        ("nothing", ("rt=Type",), lambda link: False),
        ("unknown", ("nonsense=*",), lambda link: False),
    ],
)
async def test_TD_COAP_LINK_01_to_08(
    plugtest: Plugtest, identifier: str, query: tuple[str, ...], expected: Callable[[Any], Any]
) -> None:
    answer = await plugtest.client.asks(Code.GET, path=".well-known/core", uri_query=query)
    assert (answer.code, answer.opt.content_format) == (Code.CONTENT, LINK_FORMAT)
    body = answer.payload
    if answer.opt.block2 is not None:
        body = await plugtest.rest(answer, ".well-known/core", uri_query=query)
    assert re.findall(r"<([^>]*)>", body.decode()) == [link.target() for link in LINKS if expected(link)]


async def test_TD_COAP_LINK_09_hierarchy(plugtest: Plugtest) -> None:
    client = plugtest.client
    top = await client.asks(Code.GET, path=".well-known/core", uri_query=("href=/path",))
    assert top.payload == b"</path>;ct=40"
    below = await client.asks(Code.GET, path="path")
    assert (below.opt.content_format, below.payload[:16]) == (LINK_FORMAT, b"</path/sub1>;ct=")
    assert (await client.asks(Code.GET, path="path/sub1")).payload == b"/path/sub1"


# Blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("identifier", "exponent"), [("TD_COAP_BLOCK_01", 2), ("TD_COAP_BLOCK_06", 0)])
async def test_TD_COAP_BLOCK_01_and_06_early_negotiation(plugtest: Plugtest, identifier: str, exponent: int) -> None:
    first = await plugtest.client.asks(Code.GET, path="large", block2=(0, False, exponent))
    assert first.opt.block2 == (0, True, exponent)
    assert await plugtest.rest(first, "large") == _LARGE


async def test_TD_COAP_BLOCK_02_late_negotiation(plugtest: Plugtest) -> None:
    first = await plugtest.client.asks(Code.GET, path="large")
    assert (first.opt.block2, len(first.payload)) == ((0, True, 6), 1024)
    second = await plugtest.client.asks(Code.GET, path="large", block2=(4, False, 4))
    assert second.opt.block2 == (4, True, 4)
    assert first.payload + await plugtest.rest(second, "large") == _LARGE


async def _upload(plugtest: Plugtest, method: Code, path: str, body: bytes, exponent: int) -> aiocoap.Message:
    size = 16 << exponent
    last = (len(body) - 1) // size
    for number in range(last + 1):
        answer = await plugtest.client.asks(
            method,
            path=path,
            block1=(number, number < last, exponent),
            payload=body[number * size : (number + 1) * size],
            content_format=TEXT,
        )
        assert answer.opt.block1 == (number, number < last, exponent)
        assert number == last or answer.code == Code.CONTINUE
    return answer


async def test_TD_COAP_BLOCK_03_put(plugtest: Plugtest) -> None:
    body = _LARGE_64K[5:]
    assert (await _upload(plugtest, Code.PUT, "large-update", body, 6)).code == Code.CHANGED
    stored = await plugtest.client.asks(Code.GET, path="large-update")
    assert await plugtest.rest(stored, "large-update") == body


async def test_TD_COAP_BLOCK_04_post_creates(plugtest: Plugtest) -> None:
    created = await _upload(plugtest, Code.POST, "large-create", _LARGE, 5)
    assert (created.code, created.opt.location_path[0]) == (Code.CREATED, "large-create")
    path = "/".join(created.opt.location_path)
    assert await plugtest.rest(await plugtest.client.asks(Code.GET, path=path), path) == _LARGE


async def test_TD_COAP_BLOCK_05_both_ways_with_64_KiB(plugtest: Plugtest) -> None:
    answer = await _upload(plugtest, Code.POST, "large-post", _LARGE_64K, 6)
    assert (answer.code, answer.opt.block2) == (Code.CHANGED, (0, True, 6))
    assert await plugtest.rest(answer, "large-post", Code.POST) == _LARGE_64K.upper()


# Observations ---------------------------------------------------------------------------------------------------------


async def test_TD_COAP_OBS_01_con(plugtest: Plugtest) -> None:
    news = await plugtest.observes("obs")
    for _ in range(5):
        news = await plugtest.notified("obs", news)


async def test_TD_COAP_OBS_02_non(plugtest: Plugtest) -> None:
    news = await plugtest.observes("obs-non", NON)
    for _ in range(5):
        news = await plugtest.notified("obs-non", news, NON)


async def test_TD_COAP_OBS_04_a_client_registers_again(plugtest: Plugtest) -> None:
    await plugtest.notified("obs", await plugtest.observes("obs"))
    for association in list(plugtest.endpoint._peers):
        plugtest.endpoint.close(association)  # the server forgets
    assert plugtest.observers == 0
    plugtest.transport._associations.clear()
    plugtest.resources.step()
    await plugtest.client.hears_nothing()
    news = await plugtest.observes("obs")  # the same token
    await plugtest.notified("obs", news)


@lossy
async def test_TD_COAP_OBS_05_client_off(plugtest: Plugtest) -> None:
    first = await plugtest.observes("obs")
    plugtest.resources.step()
    numbers = [(await plugtest.client.hears()).opt.observe]
    for _ in range(2):
        plugtest.resources.step()  # retransmissions carry the newest state, and its number
        numbers.append((await plugtest.client.hears()).opt.observe)
    assert numbers == sorted(set(numbers))
    assert numbers[0] > first.opt.observe
    async with asyncio.timeout(20):
        while plugtest.observers:
            await asyncio.sleep(0.02)
    plugtest.resources.step()
    await plugtest.client.hears_nothing()
    assert plugtest.resources.observed[("obs",)].observers == 0


async def test_TD_COAP_OBS_06_reset(plugtest: Plugtest) -> None:
    await plugtest.notified("obs", await plugtest.observes("obs"))
    plugtest.resources.step()
    plugtest.client.resets(await plugtest.client.hears())
    await plugtest.client.hears_nothing()
    plugtest.resources.step()
    await plugtest.client.hears_nothing()
    assert plugtest.resources.observed[("obs",)].observers == 0


async def test_TD_COAP_OBS_07_delete(plugtest: Plugtest) -> None:
    await plugtest.notified("obs", await plugtest.observes("obs"))
    message_id = plugtest.client.sends(CON, Code.DELETE, b"d", path="obs")
    last, deleted = await plugtest.client.hears(), await plugtest.client.hears()
    assert (deleted.code, deleted.mid) == (Code.DELETED, message_id)
    assert (last.mtype, last.code, last.token, last.opt.observe) == (CON, Code.NOT_FOUND, b"t", None)
    plugtest.client.acknowledges(last)
    plugtest.resources.step()
    await plugtest.client.hears_nothing()


async def test_TD_COAP_OBS_08_another_content_format(plugtest: Plugtest) -> None:
    await plugtest.notified("obs", await plugtest.observes("obs"))
    plugtest.client.sends(CON, Code.PUT, b"p", path="obs", payload=b"{}", content_format=50)
    last, changed = await plugtest.client.hears(), await plugtest.client.hears()
    assert changed.code == Code.CHANGED
    assert (last.mtype, last.code, last.token, last.opt.observe) == (CON, Code.NOT_ACCEPTABLE, b"t", None)
    plugtest.client.acknowledges(last)
    plugtest.resources.step()
    await plugtest.client.hears_nothing()


async def test_TD_COAP_OBS_09_update(plugtest: Plugtest) -> None:
    before = await plugtest.notified("obs", await plugtest.observes("obs"))
    plugtest.client.sends(CON, Code.PUT, b"p", path="obs", payload=b"put", content_format=TEXT)
    news, changed = await plugtest.client.hears(), await plugtest.client.hears()
    assert changed.code == Code.CHANGED
    assert (news.mtype, news.payload, news.token) == (CON, b"put", b"t")
    assert news.opt.observe > before.opt.observe
    plugtest.client.acknowledges(news)
    assert (await plugtest.notified("obs", news)).payload == b"put"


async def test_TD_COAP_OBS_10_a_plain_get_cancels_nothing(plugtest: Plugtest) -> None:
    news = await plugtest.notified("obs", await plugtest.observes("obs"))
    plain = await plugtest.client.asks(Code.GET, b"t2", path="obs")
    assert (plain.code, plain.opt.observe) == (Code.CONTENT, None)
    await plugtest.notified("obs", news)


@lossy
async def test_TD_COAP_OBS_11_lossy(plugtest: Plugtest) -> None:
    news = await plugtest.observes("obs")
    for _ in range(3):
        plugtest.resources.step()
        lost, again = await plugtest.client.hears(), await plugtest.client.hears()
        assert (lost.mid, lost.payload) == (again.mid, again.payload)
        plugtest.client.acknowledges(again)
        await plugtest.client.hears_nothing()  # never more than one at a time
        assert again.opt.observe > news.opt.observe
        news = again


async def test_TD_COAP_OBS_12_observe_1(plugtest: Plugtest) -> None:
    await plugtest.notified("obs", await plugtest.observes("obs"))
    plain = await plugtest.client.asks(Code.GET, b"t", path="obs", observe=1)
    assert (plain.code, plain.opt.observe) == (Code.CONTENT, None)
    plugtest.resources.step()
    await plugtest.client.hears_nothing()
    assert plugtest.resources.observed[("obs",)].observers == 0


async def test_TD_COAP_OBS_13_large(plugtest: Plugtest) -> None:
    news = await plugtest.observes("obs-large")
    for version in range(3):
        assert news.opt.block2 == (0, True, 6)
        assert await plugtest.rest(news, "obs-large") == b"%05d " % version + _LARGE
        news = await plugtest.notified("obs-large", news)


async def test_TD_COAP_OBS_14_large_at_times(plugtest: Plugtest) -> None:
    news = await plugtest.observes("obs-pumping")
    for version in range(4):
        if version % 2:
            assert await plugtest.rest(news, "obs-pumping") == _LARGE
        else:
            assert (news.opt.block2, news.payload) == (None, b"short")
        news = await plugtest.notified("obs-pumping", news)


# Clients that are not ours --------------------------------------------------------------------------------------------


async def test_aiocoaps_client_moves_64_KiB_and_observes(plugtest: Plugtest) -> None:
    context = await aiocoap.Context.create_client_context()
    base = f"coap://127.0.0.1:{plugtest.port}"
    try:
        got = await context.request(aiocoap.Message(code=Code.GET, uri=f"{base}/large-64k")).response
        assert got.payload == _LARGE_64K
        post = aiocoap.Message(code=Code.POST, uri=f"{base}/large-post", payload=_LARGE_64K, content_format=TEXT)
        echoed = await context.request(post).response
        assert (echoed.code, echoed.payload) == (Code.CHANGED, _LARGE_64K.upper())
        asked = context.request(aiocoap.Message(code=Code.GET, uri=f"{base}/obs", observe=0))
        assert (await asked.response).payload == b"state 0"
        news = aiter(asked.observation)
        for version in (1, 2, 3):
            plugtest.resources.step()
            assert (await asyncio.wait_for(anext(news), 20)).payload == b"state %d" % version
    finally:
        await context.shutdown()


@pytest.mark.parametrize("client", ["coap-client-openssl", "coap-client-gnutls"])
async def test_libcoaps_clients_over_coap_and_coaps(client: str, tmp_path: Path) -> None:
    """The documented command itself, and 64 KiB both ways over DTLS with a pre-shared key."""
    program = shutil.which(client)
    if program is None:
        pytest.skip(f"{client} is not installed; tests/parts.sh installs it")
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.coap_plugtest_server", "--port", "0", "--coaps-port", "0"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert server.stdout is not None
        ready = json.loads(await asyncio.wait_for(server.stdout.readline(), 30))["ready"]
        plain, secure = (f"{scheme}://127.0.0.1:{ready[scheme]}" for scheme in ("coap", "coaps"))
        secret = ("-u", "password", "-k", "sesame")
        sent, back = tmp_path / "sent", tmp_path / "back"
        sent.write_bytes(_LARGE_64K)
        assert b"</link1>" in await _run(program, "-m", "get", f"{plain}/.well-known/core")
        assert b"nobody listens" in await _run(program, "-m", "get", *secret, f"{secure}/secure")
        upload = ("-m", "post", "-b", "1024", "-t", "0", "-f", str(sent), "-o", str(back))
        await _run(program, *upload, *secret, f"{secure}/large-post")
        assert back.read_bytes() == _LARGE_64K.upper()
    finally:
        server.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(server.wait(), 20) == 0


async def _run(*command: str) -> bytes:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    return output
