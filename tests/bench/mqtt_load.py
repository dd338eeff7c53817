"""MQTT clients by the hundred in one process, as cheap as Python can make them: the same for every server.

    python -m tests.bench.mqtt_load < orders

Orders come as lines of JSON on standard input, answers leave as lines on standard output: `Publishing`, `Connecting`
or `Idling` first; clients that publish or idle then connect and say `ready`, and begin, or leave, when a line comes.

What makes it cheap: one epoll for all connections; packets are encoded before the clock starts. A client's packet ids
go round in a ring as long as its window. All its PUBLISH packets have one length, so what is due is always one slice of
the ring, written at once; what is answered has to be, byte for byte, the next slice of the ring of PUBACKs, which both
checks every acknowledgement (MQTT 5.0 §4.6: in order; reason 0) and costs one comparison.

MQTT 5, TLS 1.3, QoS 1; the window is the server's Receive Maximum or `window`, whichever is less.
"""

from __future__ import annotations

import resource
import select
import socket
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

_READ: Final = 65_536
_EVENTS: Final = 512
_PUBACK: Final = 4  # bytes of one with reason 0, MQTT 5.0 §3.4.2.1
_RECEIVE_MAXIMUM: Final = 0x21
_PROPERTY_BYTES: Final = {0x11: 4, 0x13: 2, 0x21: 2, 0x22: 2, 0x24: 1, 0x25: 1, 0x27: 4, 0x28: 1, 0x29: 1, 0x2A: 1}
"""CONNACK's properties of a fixed size, MQTT 5.0 §2.2.2.2; the others are texts."""


class Client(msgspec.Struct, frozen=True):
    """Who connects: its client id, the PEM file of its certificate and key, and the topic that it publishes on."""

    client_id: str
    pem: str
    topic: str


class Publishing(msgspec.Struct, frozen=True, tag=True):
    """Publish for `seconds` with `window` messages in flight on each connection."""

    port: int
    ca: str
    clients: list[Client]
    payload: str
    window: int
    seconds: float


class Connecting(msgspec.Struct, frozen=True, tag=True):
    """Connect, by a full handshake, up to CONNACK, and disconnect, for `seconds`, with `at_once` under way."""

    port: int
    ca: str
    clients: list[Client]
    at_once: int
    seconds: float


class Idling(msgspec.Struct, frozen=True, tag=True):
    """Connect with `at_once` under way, and stay."""

    port: int
    ca: str
    clients: list[Client]
    at_once: int


class Published(msgspec.Struct, frozen=True):
    """What `Publishing` saw. `times` are the seconds of single messages, ascending, for a window of one."""

    acknowledged: int
    seconds: float
    cpu: float
    window: int
    times: list[float]


class Connected(msgspec.Struct, frozen=True):
    """What `Connecting` saw; `times` are seconds from the first SYN to CONNACK, ascending."""

    connects: int
    seconds: float
    cpu: float
    times: list[float]


class Broken(Exception):
    """The server did what no server of these figures may."""


class Link:
    """One connection, non-blocking. `receive_maximum` is the server's."""

    __slots__ = ("_client", "began", "receive_maximum", "shaken", "stream", "writes")

    def __init__(self, port: int, context: ssl.SSLContext, client: Client) -> None:
        self.began = time.perf_counter()
        self._client = client
        self.shaken = False
        """Whether the handshake is done and CONNECT sent."""
        self.receive_maximum = 0xFFFF
        self.writes = True
        """Whether it waits to write, not to read."""
        plain = socket.create_connection(("127.0.0.1", port), timeout=20)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setblocking(False)
        self.stream = context.wrap_socket(plain, server_hostname="localhost", do_handshake_on_connect=False)

    def go_on(self) -> bool:
        """Whether CONNACK is there. Raises Broken for a refusal, OSError."""
        try:
            if not self.shaken:
                self.stream.do_handshake()
                self.shaken = True
                self.stream.send(connect_packet(self._client.client_id))
            answer = self.stream.recv(_READ)
        except ssl.SSLWantReadError:
            self.writes = False
            return False
        except ssl.SSLWantWriteError:
            self.writes = True
            return False
        if len(answer) < 5 or answer[0] != 0x20 or answer[3] != 0:
            raise Broken(f"CONNACK {answer[:16].hex() or 'missing'}")
        self.receive_maximum = _receive_maximum(answer)
        return True

    def leave(self) -> None:
        """DISCONNECT, and close."""
        try:
            self.stream.send(b"\xe0\x00")
        except OSError:
            pass
        self.stream.close()


class Sender:
    """A connected client that keeps its window full."""

    __slots__ = ("_acks", "_answered", "_due", "_length", "_ring", "_sent", "_size", "began", "stream", "window")

    def __init__(self, link: Link, client: Client, payload: bytes, window: int) -> None:
        self.stream = link.stream
        self.window = window = min(window, link.receive_maximum)
        packets = [publish_packet(client.topic, number, payload) for number in range(1, window + 1)]
        self._size = len(packets[0])
        self._length = self._size * window
        self._ring = memoryview(b"".join(packets) * 2)
        self._acks = b"".join(b"\x40\x02" + number.to_bytes(2, "big") for number in range(1, window + 1)) * 2
        self._sent = 0  # bytes of the ring, modulo its length
        self._due = self._length  # bytes to be written
        self._answered = 0  # bytes of PUBACKs, modulo their ring
        self.began = 0.0

    def send(self) -> bool:
        """Write what is due; whether everything left."""
        try:
            while self._due:
                wrote = self.stream.send(self._ring[self._sent : self._sent + self._due])
                self._sent = (self._sent + wrote) % self._length
                self._due -= wrote
        except ssl.SSLWantWriteError:
            return False
        return True

    def receive(self) -> int:
        """How many messages were acknowledged; they are due again. Raises Broken for any other answer, OSError."""
        done = 0
        while True:
            try:
                data = self.stream.recv(_READ)
            except ssl.SSLWantReadError:
                break
            if not data or not self._acks.startswith(data, self._answered):
                raise Broken(f"an answer that is no PUBACK in its turn: {data[:16].hex() or 'the end'}")
            before = self._answered
            after = before + len(data)
            done += after // _PUBACK - before // _PUBACK
            self._answered = after % (self.window * _PUBACK)
            if not self.stream.pending():
                break
        self._due += done * self._size
        return done


def connect_packet(client_id: str) -> bytes:
    """CONNECT of MQTT 5.0 with clean start and a keep-alive of ten minutes."""
    name = client_id.encode()
    body = b"\x00\x04MQTT\x05\x02\x02\x58\x00" + len(name).to_bytes(2, "big") + name
    return b"\x10" + _variable(len(body)) + body


def publish_packet(topic: str, packet_id: int, payload: bytes) -> bytes:
    """PUBLISH of MQTT 5.0 with QoS 1 and no properties."""
    name = topic.encode()
    body = len(name).to_bytes(2, "big") + name + packet_id.to_bytes(2, "big") + b"\x00" + payload
    return b"\x32" + _variable(len(body)) + body


def publish(orders: Publishing) -> Published:
    """Connect, wait for the line that begins it, and publish."""
    links = _connected(orders.port, orders.ca, orders.clients, 32)
    senders = {
        link.stream.fileno(): Sender(link, client, orders.payload.encode(), orders.window)
        for link, client in zip(links, orders.clients, strict=True)
    }
    poll = select.epoll()
    for number in senders:
        poll.register(number, select.EPOLLIN)
    _say("ready")
    sys.stdin.readline()
    before = _cpu()
    acknowledged = 0
    times: list[float] = []
    single = orders.window == 1
    clock = time.perf_counter
    started = clock()
    end = started + orders.seconds
    blocked: set[int] = set()
    for number, sender in senders.items():
        sender.began = clock()
        if not sender.send():
            blocked.add(number)
            poll.modify(number, select.EPOLLIN | select.EPOLLOUT)
    while (now := clock()) < end:
        for number, _ in poll.poll(end - now, _EVENTS):
            sender = senders[number]
            done = sender.receive()
            acknowledged += done
            if single and done:
                at = clock()
                times.append(at - sender.began)
                sender.began = at
            if not sender.send():
                if number not in blocked:
                    blocked.add(number)
                    poll.modify(number, select.EPOLLIN | select.EPOLLOUT)
            elif number in blocked:
                blocked.discard(number)
                poll.modify(number, select.EPOLLIN)
    took = clock() - started
    spent = _cpu() - before
    for sender in senders.values():
        sender.stream.close()
    window = min(sender.window for sender in senders.values())
    return Published(acknowledged, took, spent, window, sorted(times))


def connect(orders: Connecting) -> Connected:
    """Connect and disconnect, the clients in turns."""
    contexts = [_context(orders.ca, client) for client in orders.clients]
    before = _cpu()
    started = time.perf_counter()
    times: list[float] = []

    def endless() -> Iterator[tuple[ssl.SSLContext, Client]]:
        while time.perf_counter() - started < orders.seconds:
            yield from zip(contexts, orders.clients, strict=True)

    for link in _connecting(orders.port, endless(), orders.at_once):
        now = time.perf_counter()
        if now - started <= orders.seconds:
            times.append(now - link.began)
        link.leave()
        if now - started > orders.seconds:
            break
    return Connected(len(times), orders.seconds, _cpu() - before, sorted(times))


def idle(orders: Idling) -> None:
    """Connect and stay until a line comes."""
    links = _connected(orders.port, orders.ca, orders.clients, orders.at_once)
    _say("ready")
    sys.stdin.readline()
    for link in links:
        link.stream.close()


def _connected(port: int, ca: str, clients: Sequence[Client], at_once: int) -> list[Link]:
    """All of them, in their order."""
    contexts = ((_context(ca, client), client) for client in clients)
    found = {link._client.client_id: link for link in _connecting(port, contexts, at_once)}
    return [found[client.client_id] for client in clients]


def _connecting(port: int, wanted: Iterator[tuple[ssl.SSLContext, Client]], at_once: int) -> Iterator[Link]:
    """Links as they have their CONNACKs, with `at_once` under way."""
    poll = select.epoll()
    under_way: dict[int, Link] = {}
    while True:
        while len(under_way) < at_once and (next_one := next(wanted, None)) is not None:
            link = Link(port, *next_one)
            if link.go_on():  # on a busy machine everything may be there at once
                yield link
                continue
            under_way[link.stream.fileno()] = link
            poll.register(link.stream.fileno(), select.EPOLLOUT if link.writes else select.EPOLLIN)
        if not under_way:
            poll.close()
            return
        ready = poll.poll(30, _EVENTS)
        if not ready:
            shaken = sum(link.shaken for link in under_way.values())
            raise Broken(f"{len(under_way)} connections wait for 30 seconds, {shaken} of them for CONNACK")
        for number, _ in ready:
            link = under_way[number]
            if link.go_on():
                poll.unregister(number)
                del under_way[number]
                yield link
            else:
                poll.modify(number, select.EPOLLOUT if link.writes else select.EPOLLIN)


def _context(ca: str, client: Client) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(client.pem)
    return context


def _receive_maximum(connack: bytes) -> int:
    """From CONNACK, MQTT 5.0 §3.2.2.3.3."""
    at, end = 5, 5 + connack[4]
    while at < end:
        name = connack[at]
        if name == _RECEIVE_MAXIMUM:
            return int.from_bytes(connack[at + 1 : at + 3], "big")
        fixed = _PROPERTY_BYTES.get(name)
        at += 1 + (2 + int.from_bytes(connack[at + 1 : at + 3], "big") if fixed is None else fixed)
    return 0xFFFF


def _variable(number: int) -> bytes:
    """A Variable Byte Integer, MQTT 5.0 §1.5.5."""
    out = bytearray()
    while True:
        number, low = divmod(number, 128)
        out.append(low | (128 if number else 0))
        if not number:
            return bytes(out)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """One order, and its answer."""
    orders = msgspec.json.decode(sys.stdin.readline(), type=Publishing | Connecting | Idling)
    match orders:
        case Publishing():
            _say(msgspec.json.encode(publish(orders)).decode())
        case Connecting():
            _say(msgspec.json.encode(connect(orders)).decode())
        case Idling():
            idle(orders)


if __name__ == "__main__":
    main()
