"""The shell of CoAP: peers of fake associations, real tasks, and a clock that the test moves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiocoap
import pytest
import pytest_asyncio
from aiocoap.numbers.codes import Code

from adapters.coap.endpoint import CoapEndpoint, EndpointPeer
from adapters.coap.limits import CoapLimits
from adapters.coap.messages import LocalProtocolError
from adapters.coap.ports import Observation, Peer, Promise, Request, Response
from tests.coap_peers import ACK, CON, message


class Wire:
    """An association that remembers what was sent."""

    room = 1_280
    address = "192.0.2.1"

    def __init__(self, name: str) -> None:
        self.association_id = name
        self.sent: list[aiocoap.Message] = []

    def send(self, datagram: bytes) -> None:
        self.sent.append(aiocoap.Message.decode(datagram))

    def codes(self) -> list[str]:
        codes = [sent.code.dotted for sent in self.sent]
        self.sent.clear()
        return codes


class Scripted:
    """A handler that does what the test tells it to."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.peers: list[Peer] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.raises: Exception | None = None
        self.response = Response(Code.CHANGED)
        self.observations: list[Observation] = []
        self.cancelled = 0
        self.finished = 0

    async def handle(self, peer: Peer, request: Request, observation: Observation | None) -> Response:
        self.requests.append(request)
        self.peers.append(peer)
        if observation is not None:
            observation.accept(self._cancel)
            self.observations.append(observation)
        await self.gate.wait()
        self.finished += 1
        if self.raises is not None:
            raise self.raises
        return self.response

    def _cancel(self) -> None:
        self.cancelled += 1


class Bench:
    def __init__(self, limits: CoapLimits) -> None:
        self.now = 0.0
        self.handler = Scripted()
        self.endpoint = CoapEndpoint(self.handler, limits, now=lambda: self.now)
        self._ids = 0

    def open(self, name: str = "a", held: bool = False) -> tuple[Wire, EndpointPeer]:
        wire = Wire(name)
        return wire, self.endpoint.open(wire, held=held)

    def asks(self, wire: Wire, code: Code = Code.POST, **more: Any) -> int:
        self._ids += 1
        self.endpoint.received(wire, message(CON, code, self._ids, b"t", path="x", **more))
        return self._ids

    async def settles(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench(CoapLimits(requests=3, requests_per_peer=2, held_requests=2))
    yield made
    made.handler.gate.set()
    await made.settles()
    await made.endpoint.drain(0.0)
    assert (made.endpoint.counters.peers, made.endpoint.counters.serving, made.endpoint.counters.observations) == (
        0,
    ) * 3


async def test_a_request_is_handled_and_answered(bench: Bench) -> None:
    wire, peer = bench.open()
    peer.context = "mine"
    bench.asks(wire, payload=b"{}")
    await bench.settles()
    assert wire.codes() == ["2.04"]
    assert bench.handler.requests == [Request(Code.POST, ("x",), payload=b"{}")]
    assert (bench.handler.peers[0].context, bench.handler.peers[0].peer_id) == ("mine", "a")
    assert (bench.endpoint.peer("a"), bench.endpoint.peer("b")) == (peer, None)


async def test_what_a_handler_raises_is_told_by_a_correlation_id_only(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    wire, _ = bench.open()
    bench.handler.raises = RuntimeError("a secret that nobody may see")
    with caplog.at_level(logging.ERROR):
        bench.asks(wire)
        await bench.settles()
    (answer,) = wire.sent
    assert answer.code == Code.INTERNAL_SERVER_ERROR
    correlation_id = answer.payload.decode().removeprefix("correlation id ")
    (record,) = caplog.records
    assert (record.message, record.__dict__["fields"]["correlation_id"]) == ("coap.handler_failed", correlation_id)
    assert bench.endpoint.counters.failures == 1


async def test_a_response_that_cannot_be_written_is_a_failure_too(bench: Bench) -> None:
    wire, _ = bench.open()
    bench.handler.response = Response(Code.CONTENT, content_format=-1)
    bench.asks(wire)
    await bench.settles()
    assert wire.codes() == ["5.00"]


async def test_requests_beyond_the_bounds_are_told_to_wait(bench: Bench) -> None:
    bench.handler.gate.clear()
    one, two = bench.open("a")[0], bench.open("b")[0]
    for _ in range(3):
        bench.asks(one)
    assert [(sent.code, sent.opt.max_age) for sent in one.sent] == [(Code.SERVICE_UNAVAILABLE, 5)]  # per peer
    bench.asks(two)
    bench.asks(two)
    assert two.codes() == ["5.03"]  # over all
    assert bench.endpoint.counters.serving == 3
    bench.handler.gate.set()
    await bench.settles()
    assert (one.codes(), two.codes()) == (["5.03", "2.04", "2.04"], ["2.04"])
    bench.asks(two)
    await bench.settles()
    assert two.codes() == ["2.04"]


async def test_a_held_peers_requests_wait_for_admission(bench: Bench) -> None:
    wire, peer = bench.open(held=True)
    bench.asks(wire)
    bench.asks(wire)
    await bench.settles()
    assert (bench.handler.requests, wire.codes()) == ([], [])
    bench.endpoint.admit(peer.peer_id)
    bench.asks(wire)  # still two in flight
    await bench.settles()
    assert wire.codes() == ["5.03", "2.04", "2.04"]
    bench.asks(wire)
    await bench.settles()
    assert wire.codes() == ["2.04"]
    bench.endpoint.refuse(peer.peer_id, Response(Code.UNAUTHORIZED))  # too late, and no matter
    bench.asks(wire)
    await bench.settles()
    assert wire.codes() == ["2.04"]


async def test_a_refused_peer_is_told_so_whatever_it_asks(bench: Bench) -> None:
    wire, peer = bench.open(held=True)
    bench.asks(wire)
    bench.endpoint.refuse(peer.peer_id, Response(Code.UNAUTHORIZED))
    bench.asks(wire, Code.GET, observe=0)
    await bench.settles()
    assert wire.codes() == ["4.01", "4.01"]
    assert bench.handler.requests == []


async def test_more_than_a_held_peer_may_ask_is_told_to_wait() -> None:
    bench = Bench(CoapLimits(held_requests=2))
    wire, peer = bench.open(held=True)
    for _ in range(3):
        bench.asks(wire)
    assert wire.codes() == ["5.03"]
    bench.endpoint.close("a")
    bench.endpoint.admit(peer.peer_id)  # gone meanwhile
    await bench.settles()
    assert bench.handler.requests == []
    await bench.endpoint.drain(0)


async def test_what_a_closed_peer_has_sent_is_still_handled_and_not_answered(bench: Bench) -> None:
    bench.handler.gate.clear()
    wire, _ = bench.open()
    bench.asks(wire)
    await bench.settles()
    bench.endpoint.close("a")
    bench.endpoint.close("a")
    bench.asks(wire)  # a datagram that was on its way
    bench.handler.gate.set()
    await bench.settles()
    assert (bench.handler.finished, len(bench.handler.requests), wire.codes()) == (1, 1, [])


async def test_drain_waits_and_then_cancels() -> None:
    bench = Bench(CoapLimits())
    wire, _ = bench.open()
    bench.handler.gate.clear()
    bench.asks(wire)
    await bench.settles()
    asyncio.get_running_loop().call_soon(bench.handler.gate.set)
    await bench.endpoint.drain(5.0)
    assert (bench.handler.finished, wire.codes()) == (1, ["2.04"])
    bench = Bench(CoapLimits())
    wire, _ = bench.open()
    bench.handler.gate.clear()
    bench.asks(wire)
    await bench.settles()
    await bench.endpoint.drain(0.01)
    assert (bench.handler.finished, wire.codes(), bench.endpoint.counters.serving) == (0, [], 0)


async def test_while_it_drains_a_further_request_is_told_to_come_back() -> None:
    bench = Bench(CoapLimits())
    wire, _ = bench.open()
    bench.handler.gate.clear()
    bench.asks(wire)
    draining = asyncio.create_task(bench.endpoint.drain(20.0))
    await bench.settles()
    bench.asks(wire)
    (refused,) = wire.sent
    assert (refused.code, refused.opt.max_age) == (Code.SERVICE_UNAVAILABLE, CoapLimits().busy_max_age)
    wire.sent.clear()
    bench.handler.gate.set()
    await draining
    assert (wire.codes(), len(bench.handler.requests)) == (["2.04"], 1)


async def test_drain_waits_for_the_acknowledgement_of_a_separate_response() -> None:
    bench = Bench(CoapLimits())
    wire, _ = bench.open()
    silent, _ = bench.open("b")
    bench.handler.gate.clear()
    bench.asks(wire)
    bench.now += 1.5
    bench.endpoint._wake()  # the empty ACK: the answer will be a CON of ours
    assert wire.codes() == ["0.00"]
    draining = asyncio.create_task(bench.endpoint.drain(20.0))
    bench.handler.gate.set()
    for _ in range(4):
        await bench.settles()
    (answer,) = wire.sent
    assert (answer.code, answer.mtype) == (Code.CHANGED, CON)
    assert not draining.done()
    bench.endpoint.received(wire, message(ACK, Code.EMPTY, answer.mid))
    async with asyncio.timeout(10):  # half of what it would wait for one that stays silent
        await draining
    assert silent.sent == []


async def test_drain_does_not_wait_for_ever_for_an_acknowledgement() -> None:
    bench = Bench(CoapLimits())
    wire, _ = bench.open()
    bench.handler.gate.clear()
    bench.asks(wire)
    bench.now += 1.5
    bench.endpoint._wake()
    bench.handler.gate.set()
    await bench.settles()
    assert wire.codes() == ["0.00", "2.04"]
    async with asyncio.timeout(20):
        await bench.endpoint.drain(0.01)
    assert bench.endpoint.counters.peers == 0


async def test_a_prompt_answers_at_once_or_by_a_future_and_leaves_the_rest_to_the_handler() -> None:
    promised: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    prompted: list[Request] = []

    def prompt(peer: Peer, request: Request) -> Promise | Response | None:
        prompted.append(request)
        match request.payload:
            case b"now":
                return Response(Code.VALID)
            case b"later":
                return Promise(promised, lambda future: Response(Code.CONTENT, b"%d" % future.result()))
            case b"broken":
                raise RuntimeError("a bug")
            case _:
                return None

    handler = Scripted()
    endpoint = CoapEndpoint(handler, CoapLimits(requests=1), prompt=prompt)
    wire = Wire("a")
    endpoint.open(wire)
    for number, payload in enumerate((b"now", b"broken", b"later", b"one too many")):
        endpoint.received(wire, message(CON, Code.POST, number, b"t", path="x", payload=payload))
    assert wire.codes() == ["2.03", "5.00", "5.03"]
    assert (endpoint.counters.serving, endpoint.counters.failures, endpoint.counters.busy) == (1, 1, 1)
    promised.set_result(7)
    await asyncio.sleep(0)
    assert [(sent.code, sent.payload) for sent in wire.sent] == [(Code.CONTENT, b"7")]
    wire.sent.clear()
    for number, more in enumerate(({"observe": 0}, {}), 9):
        endpoint.received(wire, message(CON, Code.GET, number, b"o%d" % number, path="x", **more))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert [request.payload for request in prompted] == [b"now", b"broken", b"later", b""]  # not the offer
    assert (endpoint.counters.serving, len(handler.requests)) == (0, 2)
    await endpoint.drain(0)


async def test_an_observer_is_told_and_its_end_is_told_once(bench: Bench) -> None:
    wire, _ = bench.open()
    bench.handler.response = Response(Code.CONTENT, b"0")
    bench.asks(wire, Code.GET, observe=0)
    await bench.settles()
    (observation,) = bench.handler.observations
    delivered: list[int] = []
    observation.notify(Response(Code.CONTENT, b"1"), lambda: delivered.append(1))
    first, news = wire.sent
    assert (first.opt.observe, news.opt.observe, news.payload, delivered) == (1, 2, b"1", [])
    bench.endpoint.received(wire, message(ACK, Code.EMPTY, news.mid))
    assert delivered == [1]
    with pytest.raises(LocalProtocolError):
        observation.accept(lambda: None)
    bench.endpoint.close("a")
    bench.endpoint.close("a")
    observation.notify(Response(Code.CONTENT, b"2"))
    observation.end()
    assert (bench.handler.cancelled, len(wire.sent)) == (1, 2)


async def test_an_observation_that_the_handler_ends_is_not_cancelled(bench: Bench) -> None:
    wire, _ = bench.open()
    bench.handler.response = Response(Code.CONTENT, b"0")
    for end in (lambda seen: seen.end(), lambda seen: seen.notify(Response(Code.NOT_FOUND))):
        bench.asks(wire, Code.GET, observe=0)
        await bench.settles()
        end(bench.handler.observations[-1])
    assert (bench.handler.cancelled, wire.codes()) == (0, ["2.05", "2.05", "4.04"])


async def test_accepting_after_the_client_has_gone_cancels_at_once() -> None:
    bench = Bench(CoapLimits())
    wire, _ = bench.open()
    bench.asks(wire, Code.GET, observe=0)
    bench.endpoint.close("a")  # before the handler's task has begun
    await bench.settles()
    assert bench.handler.cancelled == 1
    await bench.endpoint.drain(0)


async def test_a_callback_that_raises_disturbs_nobody(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    wire, _ = bench.open()
    bench.handler.response = Response(Code.CONTENT, b"0")
    bench.asks(wire, Code.GET, observe=0)
    await bench.settles()

    def broken() -> None:
        raise RuntimeError("a bug of the handler")

    with caplog.at_level(logging.ERROR):
        bench.handler.observations[0].notify(Response(Code.CONTENT, b"1"), broken)
        bench.endpoint.received(wire, message(ACK, Code.EMPTY, wire.sent[-1].mid))
    assert [record.message for record in caplog.records] == ["coap.callback_failed"]
    wire.codes()
    bench.asks(wire)
    await bench.settles()
    assert wire.codes() == ["2.05"]


async def test_timers_acknowledge_repeat_and_let_go() -> None:
    """On the loop's own clock, with short times: an empty ACK, repetitions, and memory given back."""
    handler = Scripted()
    limits = CoapLimits(ack_delay=0.01, ack_timeout=0.02, max_retransmit=2, exchange_lifetime=0.2)
    endpoint = CoapEndpoint(handler, limits)
    wire, silent = Wire("a"), Wire("b")
    handler.gate.clear()
    for each in (wire, silent):
        endpoint.open(each)
        endpoint.received(each, message(CON, Code.GET, 1, b"t", path="x"))
    async with asyncio.timeout(20):
        while not (wire.sent and silent.sent):
            await asyncio.sleep(0.005)
        handler.gate.set()
        while endpoint.counters.given_up < 2 or len(endpoint._memory.duplicates):
            await asyncio.sleep(0.01)
    assert wire.codes() == silent.codes() == ["0.00", "2.04", "2.04", "2.04"]
    assert endpoint.counters.retransmissions == 4
    await endpoint.drain(0)


class Alarms:
    """The loop's timers, on the clock of the bench."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._loop = asyncio.get_running_loop()
        self._set: list[_Alarm] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> _Alarm:
        self._set.append(_Alarm(self._bench.now + delay, callback))
        return self._set[-1]

    def create_task(self, work: Any) -> asyncio.Task[Any]:
        return self._loop.create_task(work)

    def passes(self, until: float) -> None:
        """Let the time pass, alarm by alarm."""
        while due := [each for each in self._set if not each.cancelled and each.at <= until]:
            first = min(due, key=lambda each: each.at)
            self._set.remove(first)
            self._bench.now = first.at
            first.callback()
        self._bench.now = until


@dataclass
class _Alarm:
    at: float
    callback: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


async def test_what_one_peers_timer_arms_makes_no_others_late(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(CoapLimits(ack_delay=1.0, ack_timeout=2.0, ack_random_factor=1.0))
    alarms = Alarms(bench)
    with monkeypatch.context() as patched:
        patched.setattr(bench.endpoint, "_loop", alarms)
        bench.handler.gate.clear()
        silent, other = bench.open("a")[0], bench.open("b")[0]
        bench.asks(silent)
        alarms.passes(1.0)
        bench.handler.gate.set()
        await bench.settles()
        assert silent.codes() == ["0.00", "2.04"], "a separate response, which is not acknowledged"
        bench.handler.gate.clear()
        alarms.passes(2.5)
        bench.asks(other)
        alarms.passes(3.0)
        assert (silent.codes(), other.codes()) == (["2.04"], []), "again, and once more at 7"
        alarms.passes(3.5)
        assert other.codes() == ["0.00"], "at its time, a second after it asked"
    bench.handler.gate.set()
    await bench.settles()
    await bench.endpoint.drain(0.0)
