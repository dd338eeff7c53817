"""A server around one MQTT connection that answers everything by the toss of a seeded coin, under noise."""

from __future__ import annotations

import random
from typing import assert_never

from adapters.mqtt.connection import Connection
from adapters.mqtt.machine_events import (
    ConnectRequested,
    Delivered,
    Discarded,
    Ended,
    Event,
    PublishReceived,
    ReceiptRecorded,
    ReleaseReceived,
    SessionEnded,
    SubscribeRequested,
    UnsubscribeRequested,
    WillDue,
)
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.session import Session
from adapters.mqtt.session_values import Delivery, Message, Receipt
from adapters.mqtt.wire import encode
from adapters.mqtt.wire_packets import (
    Ack,
    Connect,
    Packet,
    Ping,
    Publish,
    QoS,
    Subscribe,
    SubscriptionRequest,
    Unsubscribe,
)
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version
from tests.fuzz.mqtt_packets import mutants

LIMITS = MqttLimits(receive_maximum=8, unanswered_messages=8, queued_messages=8)


class CoinServer:
    """One connection; `throw` gives it bytes, and raises whatever the machines raise."""

    def __init__(self, version: Version, source: random.Random) -> None:
        self.source = source
        self.now = 0.0
        self.connection = Connection(LIMITS, 0.0)
        self.session = Session(LIMITS, durable=source.random() < 0.5)
        self.waiting: list[Receipt] = []
        self.connection.receive(encode(Connect(version, "c", True), version), 0.0)
        self.drain()

    def throw(self, data: bytes | bytearray) -> bool:
        """False once the connection is over."""
        self.now += self.source.random()
        if self.connection.wants_read:
            self.connection.receive(data, self.now)
        qos = QoS(self.source.randrange(3))
        self.session.deliver(Delivery(Message("a", b"x", qos), qos), self.now)
        self.drain()
        while self.waiting and self.source.random() < 0.8:
            receipt = self.waiting.pop(self.source.randrange(len(self.waiting)))
            if self.source.random() < 0.9:
                self.session.stored(receipt, self.now)
            else:
                self.session.failed(receipt, ReasonCode.QUOTA_EXCEEDED, self.now)
            self.drain()
        self.connection.tick(self.now)
        self.drain()
        assert self.session.queued <= LIMITS.queued_messages
        assert len(self.waiting) <= LIMITS.unanswered_messages
        return not self.connection.closed

    def drain(self) -> None:
        while (event := self.connection.next_event(self.now)) is not None:
            self.answer(event)
        while self.connection.data_to_send(self.now):
            pass

    def answer(self, event: Event) -> None:
        match event:
            case ConnectRequested():
                assigned = None if event.connect.client_id else "assigned"
                self.connection.accept(self.session, session_present=False, now=self.now, client_id=assigned)
            case PublishReceived():
                self.waiting.append(event.receipt)
            case ReleaseReceived():
                self.session.released(event.packet_id)
            case ReceiptRecorded():
                self.session.recorded(event.packet_id)
            case SubscribeRequested():
                reasons = [
                    ReasonCode(request.qos) if self.source.random() < 0.8 else ReasonCode.NOT_AUTHORIZED
                    for request in event.requests
                ]
                self.connection.subscribed(event.packet_id, reasons, self.now)
            case UnsubscribeRequested():
                self.connection.unsubscribed(event.packet_id, self.now)
            case Delivered() | Discarded() | WillDue() | SessionEnded() | Ended():
                pass
            case _:
                assert_never(event)


def noise(seed: int, connections: int) -> tuple[int, int]:
    """Throw proper and mutated packets at that many connections; how many packets, and how many lived through ten."""
    source = random.Random(seed)
    stream = mutants(seed, 1_000_000_000)
    thrown = hardy = 0
    for _ in range(connections):
        version = source.choice(list(Version))
        server = CoinServer(version, source)
        for number in range(40):
            proper = source.random() < 0.93
            data = encode(proper_packet(source), version) if proper else next(stream)[1]
            thrown += 1
            if not server.throw(data):
                break
            hardy += number == 10
    return thrown, hardy


def proper_packet(source: random.Random) -> Packet:
    """Something that a client may send at some time, if not now."""
    packet_id = source.randrange(1, 9)
    match source.randrange(8):
        case 0:
            return Publish("a", b"x")
        case 1:
            return Publish("a", b"x", QoS.AT_LEAST_ONCE, dup=True, packet_id=packet_id)
        case 2 | 3:
            return Publish("a", b"x", QoS.EXACTLY_ONCE, dup=source.random() < 0.5, packet_id=packet_id)
        case 4:
            kind = source.choice((PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP))
            return Ack(kind, packet_id)
        case 5:
            return Subscribe(packet_id, (SubscriptionRequest("a/+"), SubscriptionRequest("$share/g/#", QoS(1))))
        case 6:
            return Unsubscribe(packet_id, ("a/+", "b"))
        case _:
            return Ping(PacketType.PINGREQ)
