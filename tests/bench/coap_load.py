"""Load for a CoAP server over DTLS, as a process of its own: handshakes, requests on established sessions, idle ones.

    python -m tests.bench.coap_load < task.json     a task as below; one line of JSON for each thing that it found

Theory
------
One thread, one epoll, one connected UDP socket per device. Whatever can be made before the clock starts is made before:
requests are sealed beforehand, answers are kept and opened afterwards, so that in between there are only send and
recv. Each device has one request or handshake under way, as NSTART asks (RFC 7252 §4.7). Handshakes are closed with
close_notify as soon as they are through, and begin again on the same socket, so a server that does not let go shows it.

Nothing is sent again. On a loopback network only a full socket buffer loses; a device that hears nothing for a second
is counted as `stalled` and begins anew with another socket. One whose answer takes a second, so that the server
acknowledges the request by itself, is counted as well and sends no more: what it would have to say is not sealed yet.

Certificates are OpenSSL's work on both sides (`tests.dtls_peers.Client`), so there the generator costs as much as the
server, and only the server's CPU time compares.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.bench.coap_client import APPLICATION_DATA, PskClient, Stage
from tests.dtls_peers import Client, certificate_client_context
from tests.tls_peers import Holder

SUITE: Final = b"ECDHE-ECDSA-AES128-GCM-SHA256"
_DATAGRAM: Final = 4_096
_PATIENCE: Final = 1.0
_EMPTY: Final = 13 + 8 + 4 + 16
"""Bytes of a record with an Empty message: the server needs more than a second, and its answer comes as a CON."""
_CON, _CHANGED = 0x40, 0x44
_TOKEN: Final = b"\xca\xfe"


class Psk(msgspec.Struct, frozen=True):
    """A device's identity and key."""

    identity: str
    key: bytes


class Task(msgspec.Struct, frozen=True):
    """What to do. `handshakes`: for so long, at most one per device at once. `requests`: the same on sessions that are
    made before. `idle`: so many sessions, kept until standard input ends. With `certificate` (PEM with its key) by
    that instead of `devices`."""

    kind: str
    port: int
    devices: list[Psk]
    seconds: float = 0.0
    at_once: int = 32
    sessions: int = 0
    most: int = 0
    """Requests of one device, which are made before the clock starts."""
    method: int = 2
    path: str = "telemetry"
    certificate: str | None = None


class Seen(msgspec.Struct, frozen=True):
    """What was counted. `cpu` are this process's own seconds of CPU while the clock ran."""

    count: int
    seconds: float
    stalled: int
    cpu: float
    before: int = 0
    """Requests that were answered before the clock started."""

    @property
    def rate(self) -> float:
        """Per second."""
        return self.count / self.seconds


class Side(Protocol):
    """A client's end of one handshake."""

    def hello(self) -> Sequence[bytes]: ...
    def receive(self, datagram: bytes) -> Sequence[bytes]: ...
    def goodbye(self) -> Sequence[bytes]: ...

    @property
    def done(self) -> bool: ...


class PskSide:
    """With a key."""

    def __init__(self, device: Psk) -> None:
        self.client = PskClient(device.identity.encode(), device.key)

    def hello(self) -> Sequence[bytes]:
        return (self.client.hello(),)

    def receive(self, datagram: bytes) -> Sequence[bytes]:
        answer = self.client.receive(datagram)
        return () if answer is None else (answer,)

    def goodbye(self) -> Sequence[bytes]:
        return (self.client.close_notify(),)

    @property
    def done(self) -> bool:
        return self.client.stage is Stage.OPEN


class CertificateSide:
    """With a certificate, by OpenSSL."""

    def __init__(self, holder: Holder) -> None:
        self._context = certificate_client_context(holder, SUITE)

    def hello(self) -> Sequence[bytes]:
        self.client = Client(self._context)
        return self.client.step()

    def receive(self, datagram: bytes) -> Sequence[bytes]:
        answer = self.client.feed(datagram)
        assert self.client.error is None, self.client.error
        return answer

    def goodbye(self) -> Sequence[bytes]:
        self.client.connection.shutdown()
        return self.client.written()

    @property
    def done(self) -> bool:
        return self.client.done


class Wire:
    """A device's socket and its side."""

    __slots__ = ("heard", "number", "port", "side", "socket")

    def __init__(self, port: int, number: int, side: Side) -> None:
        self.port = port
        self.number = number
        self.side = side
        self.renew()

    def renew(self) -> None:
        """A new socket, and so a new port."""
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        # An address for every thousand: a server counts associations by address.
        self.socket.bind((f"127.0.{self.number // 1000}.1", 0))
        self.socket.connect(("127.0.0.1", self.port))
        self.heard = time.perf_counter()

    def say(self, datagrams: Sequence[bytes]) -> None:
        for datagram in datagrams:
            self.socket.send(datagram)


def handshakes(task: Task, sides: Sequence[Side]) -> Seen:
    """Closed loops of handshakes, one on each of `at_once` sockets."""
    wires: dict[int, Wire] = {}
    for number, side in enumerate(sides[: task.at_once]):
        wire = Wire(task.port, number, side)
        wires[wire.socket.fileno()] = wire
    try:
        with select.epoll() as poll:
            return _handshakes(task, wires, poll)
    finally:
        _close(wires.values())


def _handshakes(task: Task, wires: dict[int, Wire], poll: select.epoll) -> Seen:
    for fd in wires:
        poll.register(fd, select.EPOLLIN)
    done = stalled = 0
    spent, began = _cpu(), time.perf_counter()
    end, checked = began + task.seconds, began
    for wire in wires.values():
        wire.say(wire.side.hello())
    while (now := time.perf_counter()) < end:
        for fd, _ in poll.poll(0.2):
            wire = wires[fd]
            wire.heard = now
            side = wire.side
            wire.say(side.receive(wire.socket.recv(_DATAGRAM)))
            if side.done:
                done += 1
                wire.say(side.goodbye())
                wire.say(side.hello())
        if now - checked > _PATIENCE / 4:
            checked = now
            for fd, wire in [each for each in wires.items() if now - each[1].heard > _PATIENCE]:
                stalled += 1
                poll.unregister(fd)
                del wires[fd]
                wire.socket.close()
                wire.renew()
                wires[wire.socket.fileno()] = wire
                poll.register(wire.socket.fileno(), select.EPOLLIN)
                wire.say(wire.side.hello())
    seen = Seen(done, time.perf_counter() - began, stalled, _cpu() - spent)
    _finish(wires, poll)
    return seen


def _finish(wires: dict[int, Wire], poll: select.epoll) -> None:
    """Let what is under way come to its end: libcoap has room for 100 half-open handshakes and keeps them for 30 s."""
    while wires and (ready := poll.poll(_PATIENCE)):
        for fd, _ in ready:
            wire = wires[fd]
            wire.say(wire.side.receive(wire.socket.recv(_DATAGRAM)))
            if wire.side.done:
                wire.say(wire.side.goodbye())
                poll.unregister(fd)
                wires.pop(fd).socket.close()


def establish(task: Task, sides: Sequence[Side], at_once: int = 32) -> list[Wire]:
    """A session for each side. Raises TimeoutError when one does not come about, ProtocolError when one is refused."""
    wires = [Wire(task.port, number, side) for number, side in enumerate(sides)]
    try:
        with select.epoll() as poll:
            _establish(wires, poll, at_once)
    except BaseException:
        _close(wires)
        raise
    return wires


def _establish(wires: Sequence[Wire], poll: select.epoll, at_once: int) -> None:
    waiting = iter(wires)
    under_way: dict[int, Wire] = {}

    def begin() -> None:
        for wire in waiting:
            under_way[wire.socket.fileno()] = wire
            poll.register(wire.socket.fileno(), select.EPOLLIN)
            wire.say(wire.side.hello())
            return

    for _ in range(at_once):
        begin()
    attempts = 3
    while under_way:
        ready = poll.poll(2 * _PATIENCE)
        if not ready:
            attempts -= 1
            if not attempts:
                raise TimeoutError(f"{len(under_way)} handshakes were not answered")
            again = list(under_way.values())
            under_way.clear()
            for wire in again:
                wire.socket.close()
                wire.renew()
                under_way[wire.socket.fileno()] = wire
                poll.register(wire.socket.fileno(), select.EPOLLIN)
                wire.say(wire.side.hello())
        for fd, _ in ready:
            wire = under_way[fd]
            wire.say(wire.side.receive(wire.socket.recv(_DATAGRAM)))
            if wire.side.done:
                poll.unregister(fd)
                del under_way[fd]
                begin()


def requests(task: Task) -> Seen:
    """Closed loops of confirmable requests on established sessions. Raises AssertionError for an answer but 2.04."""
    sides = [PskSide(device) for device in task.devices[: task.at_once]]
    wires = establish(task, sides)
    try:
        return _requests(task, sides, wires)
    finally:
        for wire in wires:
            wire.say(wire.side.goodbye())
        _close(wires)


def _requests(task: Task, sides: Sequence[PskSide], wires: Sequence[Wire]) -> Seen:
    first = [[side.client.seal(request(task, task.most))] for side in sides]
    warm, welcome = exchange(wires, first, 5.0)  # the server admits each
    ready = [number for number, answers in enumerate(welcome) if answers]
    sealed = [[sides[place].client.seal(request(task, number)) for number in range(task.most)] for place in ready]
    seen, answers = exchange([wires[place] for place in ready], sealed, task.seconds)
    for place, got in zip(ready, answers, strict=True):
        sides[place].client.open(welcome[place][0])  # libcoap's first is 2.01
        for number, datagram in enumerate(got):
            expected = bytes((0x60 | len(_TOKEN), _CHANGED)) + number.to_bytes(2, "big") + _TOKEN
            plain = sides[place].client.open(datagram)
            assert plain is not None
            assert plain.startswith(expected), plain
    return Seen(seen.count, seen.seconds, seen.stalled + warm.stalled, seen.cpu, before=len(ready))


def exchange(
    wires: Sequence[Wire], sealed: Sequence[Sequence[bytes]], seconds: float
) -> tuple[Seen, list[list[bytes]]]:
    """Send each wire's requests one after another; ends when all are sent or the time is up and all are answered."""
    with select.epoll() as poll:
        return _exchange(wires, sealed, seconds, poll)


def _exchange(
    wires: Sequence[Wire], sealed: Sequence[Sequence[bytes]], seconds: float, poll: select.epoll
) -> tuple[Seen, list[list[bytes]]]:
    answers: list[list[bytes]] = [[] for _ in wires]
    turns: dict[int, tuple[Callable[[int], bytes], Callable[[bytes], int], list[bytes], Sequence[bytes]]] = {}
    for wire, out, got in zip(wires, sealed, answers, strict=True):
        fd = wire.socket.fileno()
        turns[fd] = (wire.socket.recv, wire.socket.send, got, out)
        poll.register(fd, select.EPOLLIN)
    spent, began = _cpu(), time.perf_counter()
    end = began + seconds
    waiting, stalled = len(wires), 0
    for _, send, _, out in turns.values():
        send(out[0])
    going_on = True
    while waiting:
        ready = poll.poll(2 * _PATIENCE)
        if not ready:
            break
        going_on = going_on and time.perf_counter() < end
        for fd, _ in ready:
            recv, send, got, out = turns[fd]
            datagram = recv(_DATAGRAM)
            if datagram[0] != APPLICATION_DATA:
                continue
            if len(datagram) == _EMPTY:
                stalled += 1
                waiting -= 1
                poll.unregister(fd)
                continue
            got.append(datagram)
            if going_on and len(got) < len(out):
                send(out[len(got)])
            else:
                waiting -= 1
    taken = time.perf_counter() - began
    return Seen(sum(map(len, answers)), taken, waiting + stalled, _cpu() - spent), answers


def request(task: Task, number: int) -> bytes:
    """A CON with one reading in JSON."""
    path = task.path.encode()
    assert len(path) < 13
    head = bytes((_CON | len(_TOKEN), task.method)) + number.to_bytes(2, "big") + _TOKEN
    # Uri-Path is option 11, Content-Format 12: 50 is JSON
    return head + bytes((0xB0 | len(path),)) + path + b"\x11\x32\xff" + b'{"env.temperature": 21.5}'


def sides_of(task: Task, count: int) -> Sequence[Side]:
    """By certificate if there is one, else by the devices' keys in turn."""
    if task.certificate is not None:
        pem = Path(task.certificate).read_bytes()
        key = load_pem_private_key(pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        holder = Holder(x509.load_pem_x509_certificate(pem), key)
        return [CertificateSide(holder) for _ in range(count)]
    return [PskSide(task.devices[number % len(task.devices)]) for number in range(count)]


def _close(wires: Iterable[Wire]) -> None:
    for wire in wires:
        wire.socket.close()


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _say(what: object) -> None:
    os.write(1, msgspec.json.encode(what) + b"\n")


def main() -> None:
    """Do what standard input's first line says."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
    task = msgspec.json.decode(sys.stdin.readline(), type=Task)
    match task.kind:
        case "handshakes":
            _say(handshakes(task, sides_of(task, task.at_once)))
        case "requests":
            _say(requests(task))
        case "idle":
            wires = establish(task, sides_of(task, task.sessions))
            _say({"established": len(wires)})
            sys.stdin.read()
            for wire in wires:
                wire.say(wire.side.goodbye())
            _close(wires)
        case other:
            raise AssertionError(other)


if __name__ == "__main__":
    main()
