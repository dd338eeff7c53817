"""Two thousand exchanges through a bad network, in virtual time: all complete, each handled exactly once.

The client is a model of RFC 7252's own: one confirmable request at a time, repeated with back-off, separate answers
acknowledged (and reset when they are not expected), its message ids consecutive, now and then a body in blocks. It
repeats six times where RFC 7252 has four, so that chance alone hardly ever ends an exchange, and within the lifetime of
one. Between it and the machine datagrams are lost, doubled, held back and overtaken, both ways, by a seeded chance.

In the suite it is 2,000 exchanges of 20 peers; more, and other seeds, by hand:

    GATEHOUSE_COAP_EXCHANGES=20000 GATEHOUSE_COAP_SEED=7 pytest tests/unit/test_coap_message_network.py
"""

from __future__ import annotations

import heapq
import os
from collections import Counter
from itertools import count
from random import Random

import aiocoap
import pytest
from aiocoap.numbers.codes import Code

from adapters.coap.exchanges import NotificationArrived, ObservationEnded, RequestReceived
from adapters.coap.limits import CoapCounters, CoapLimits
from adapters.coap.memory import Memory
from adapters.coap.peer import PeerMachine
from adapters.coap.ports import Response
from tests.coap_peers import ACK, CON, RST, message

EXCHANGES = int(os.environ.get("GATEHOUSE_COAP_EXCHANGES", "2000"))
SEED = int(os.environ.get("GATEHOUSE_COAP_SEED", "1"))
PEERS = 20


class World:
    """Virtual time and a bad network. Everything that will happen is in one heap."""

    def __init__(self, seed: int, loss: float, copies: float) -> None:
        self.random = Random(seed)
        self.loss = loss
        self.copies = copies
        self.now = 1_000.0
        self.handled: Counter[bytes] = Counter()
        self._order = count()
        self._agenda: list[tuple[float, int, object, tuple[object, ...]]] = []

    def at(self, when: float, what: object, *arguments: object) -> None:
        heapq.heappush(self._agenda, (when, next(self._order), what, arguments))

    def carry(self, receive: object, datagram: bytes) -> None:
        for _ in range(2 if self.random.random() < self.copies else 1):
            if self.random.random() >= self.loss:
                # mostly soon, at times so late that much has overtaken it
                delay = self.random.uniform(0.01, 0.3) * (20 if self.random.random() < 0.05 else 1)
                self.at(self.now + delay, receive, datagram)

    def run(self) -> None:
        while self._agenda:
            self.now, _, what, arguments = heapq.heappop(self._agenda)
            what(*arguments)  # type: ignore[operator]


class Server:
    """A machine and a handler that takes its time, more than `ack_delay` in one of four."""

    def __init__(self, world: World, memory: Memory, key: int) -> None:
        self.world = world
        self.machine = PeerMachine(key, memory, Random(key), 600)
        self.client: Client | None = None
        self._timer = 0.0

    def receive(self, datagram: bytes) -> None:
        self.machine.receive(datagram, self.world.now)
        self.work()

    def work(self) -> None:
        world, machine = self.world, self.machine
        while (event := machine.next_event()) is not None:
            match event:
                case RequestReceived(exchange, request):
                    world.handled[request.payload] += 1
                    slow = world.random.random() < 0.25
                    world.at(world.now + (world.random.uniform(1, 9) if slow else 0.01), self.answer, exchange, request)
                case NotificationArrived() | ObservationEnded():
                    pytest.fail("nobody observes here")
        assert self.client is not None
        for datagram in machine.datagrams_to_send():
            assert len(datagram) <= 600
            world.carry(self.client.receive, datagram)
        due = machine.next_timer()
        if due is not None and not world.now <= self._timer <= due:
            self._timer = due
            world.at(due, self.tick)

    def tick(self) -> None:
        self.machine.tick(self.world.now)
        self._timer = 0.0
        self.work()

    def answer(self, exchange: int, request: object) -> None:
        payload = request.payload  # type: ignore[attr-defined]
        self.machine.respond(exchange, Response(Code.CHANGED, payload[:8]), self.world.now)
        self.work()


class Client:
    """RFC 7252's requester. `wanted` exchanges, one after the other; `done` counts those with the right answer."""

    def __init__(self, world: World, server: Server, name: int, wanted: int) -> None:
        self.world = world
        self.server = server
        self.name = name
        self.wanted = wanted
        self.done = 0
        self.given_up = 0
        self._mid = world.random.randrange(0x10000)
        self._serial = 0
        self._body = b""
        self._block = 0
        self._outstanding: tuple[int, bytes, bytes] | None = None  # message id, token, datagram
        self._acknowledged = False
        self._attempts = 0
        world.at(world.now + name / 7, self.begin)

    def begin(self) -> None:
        if self._serial >= self.wanted:
            return
        self._serial += 1
        self._block = 0
        large = self.world.random.random() < 0.1
        self._body = b"%02d:%05d " % (self.name, self._serial) + b"x" * (700 if large else 20)
        self.send()

    def send(self) -> None:
        self._mid = (self._mid + 1) & 0xFFFF
        token = b"%d.%d" % (self._serial % 1000, self._block)
        start, size = self._block * 256, 256
        more = start + size < len(self._body)
        block = (self._block, more, 4) if len(self._body) > size else None
        payload = self._body[start : start + size] if block else self._body
        datagram = message(CON, Code.POST, self._mid, token, path="telemetry", payload=payload, block1=block)
        self._outstanding = (self._mid, token, datagram)
        self._acknowledged = False
        self._attempts = 0
        self.transmit(self._mid, self.world.random.uniform(2, 3))

    def transmit(self, mid: int, timeout: float) -> None:
        if self._outstanding is None or self._outstanding[0] != mid or self._acknowledged:
            return
        if self._attempts > 6:
            self.given_up += 1
            self._outstanding = None
            self.begin()
            return
        self._attempts += 1
        self.world.carry(self.server.receive, self._outstanding[2])
        self.world.at(self.world.now + timeout, self.transmit, mid, timeout * 2)

    def receive(self, datagram: bytes) -> None:
        got = aiocoap.Message.decode(datagram)
        outstanding = self._outstanding
        if got.mtype == ACK and got.code == Code.EMPTY:
            if outstanding is not None and outstanding[0] == got.mid and not self._acknowledged:
                self._acknowledged = True
                # RFC 7252 leaves this wait to the client: if the answer is lost for good, it gives up
                self.world.at(self.world.now + 200, self.forget, got.mid)
            return
        if got.mtype == CON:
            known = outstanding is not None and outstanding[1] == got.token
            kind = ACK if known or self.world.random.random() < 0.5 else RST  # a copy, or news of what is over
            self.world.carry(self.server.receive, message(kind, Code.EMPTY, got.mid))
            if not known:
                return
        elif got.mtype == RST or outstanding is None or outstanding[:2] != (got.mid, got.token):
            return
        self._outstanding = None
        if got.code == Code.CONTINUE:
            self._block += 1
            self.send()
            return
        if got.code == Code.REQUEST_ENTITY_INCOMPLETE:  # a block took longer than the server keeps an upload
            self.given_up += 1
            self.begin()
            return
        assert got.code == Code.CHANGED, got
        assert got.payload == self._body[:8]
        self.done += 1
        self.world.at(self.world.now + self.world.random.uniform(0, 1), self.begin)

    def forget(self, mid: int) -> None:
        if self._outstanding is not None and self._outstanding[0] == mid:
            self.given_up += 1
            self._outstanding = None
            self.begin()


def _run(seed: int, loss: float) -> tuple[World, Memory, list[Client]]:
    world = World(seed, loss, copies=0.1)
    limits = CoapLimits()
    memory = Memory(limits, CoapCounters())
    clients = []
    for key in range(PEERS):
        server = Server(world, memory, key)
        server.client = Client(world, server, key, EXCHANGES // PEERS)
        clients.append(server.client)
    world.run()
    return world, memory, clients


def test_two_thousand_exchanges_complete_and_each_is_handled_once() -> None:
    world, memory, clients = _run(SEED, loss=0.1)
    assert sum(client.done for client in clients) == EXCHANGES // PEERS * PEERS
    assert sum(client.given_up for client in clients) == 0
    assert len(world.handled) == EXCHANGES // PEERS * PEERS
    assert set(world.handled.values()) == {1}
    counters = memory.counters
    assert counters.duplicates > EXCHANGES / 10
    assert counters.retransmissions > EXCHANGES / 50
    assert (counters.malformed, counters.busy, counters.duplicates_forgotten) == (0, 0, 0)


def test_what_is_lost_for_good_was_still_handled_once_at_most() -> None:
    world, _, clients = _run(SEED + 1, loss=0.5)
    assert sum(client.done + client.given_up for client in clients) == EXCHANGES // PEERS * PEERS
    assert sum(client.given_up for client in clients) > 0
    assert max(world.handled.values()) == 1


def test_noise_between_good_datagrams_changes_nothing() -> None:
    random = Random(SEED)
    memory = Memory(CoapLimits(), CoapCounters())
    machine = PeerMachine(1, memory, random, 1_280)
    now, answered = 0.0, 0
    for serial in range(1_500):
        good = message(CON, Code.POST, serial, b"good", path="telemetry", payload=b"%d" % serial)
        cut = good[: random.randrange(len(good))]
        header = bytes((0x50 | random.randrange(9), random.randrange(256), 0xFF))
        noises = (
            random.randbytes(random.randrange(60)),
            header + random.randbytes(20),
            cut[:2] + b"\xff\xfe" + cut[4:],
        )
        for noise in noises:
            machine.receive(noise, now)
            while (event := machine.next_event()) is not None:
                if isinstance(event, RequestReceived):  # noise can be a request, too
                    machine.respond(event.exchange, Response(Code.NOT_FOUND), now)
            for said in machine.datagrams_to_send():
                assert len(said) <= 200
        machine.receive(good, now)
        event = machine.next_event()
        if isinstance(event, RequestReceived):
            assert event.request.payload == b"%d" % serial
            machine.respond(event.exchange, Response(Code.CHANGED), now)
            answered += 1
        machine.datagrams_to_send()
        now += 0.5
        machine.tick(now)
        memory.expire(now)
    assert answered > 1_450  # a noise of the same message id came before the others
    assert memory.duplicates.size < 2_000_000
