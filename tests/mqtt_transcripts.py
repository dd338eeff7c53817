"""A client of the MQTT connection machine: packets go in and come out, with events in between, and no socket."""

from __future__ import annotations

import pytest

from adapters.mqtt.connection import Connection
from adapters.mqtt.machine_events import ConnectRequested, Ended, Event, PublishReceived
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.session import Session
from adapters.mqtt.session_values import Delivery, Message, Subscription
from adapters.mqtt.topics import parse_filter
from adapters.mqtt.wire import decode, encode
from adapters.mqtt.wire_framing import Framer
from adapters.mqtt.wire_packets import Ack, Connack, Connect, Disconnect, Packet, Ping, QoS, Will
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version

V311, V5 = Version.V311, Version.V5
Q0, Q1, Q2 = QoS
R = ReasonCode
LIMITS = MqttLimits()
BOTH = pytest.mark.parametrize("version", Version)


def puback(packet_id: int, reason: R = R.SUCCESS, text: str = "") -> Ack:
    return Ack(PacketType.PUBACK, packet_id, reason, Properties(reason_string=text) if text else NO_PROPERTIES)


def pubrec(packet_id: int, reason: R = R.SUCCESS) -> Ack:
    return Ack(PacketType.PUBREC, packet_id, reason)


def pubrel(packet_id: int, reason: R = R.SUCCESS) -> Ack:
    return Ack(PacketType.PUBREL, packet_id, reason)


def pubcomp(packet_id: int, reason: R = R.SUCCESS) -> Ack:
    return Ack(PacketType.PUBCOMP, packet_id, reason)


PINGREQ, PINGRESP = Ping(PacketType.PINGREQ), Ping(PacketType.PINGRESP)


class Peer:
    """A client's end: what it sends goes in, what it gets comes out as packets, and the events in between."""

    def __init__(self, version: Version = V5, limits: MqttLimits = LIMITS, now: float = 0.0) -> None:
        self.version = version
        self.now = now
        self.connection = Connection(limits, now)
        self.limits = limits
        self._framer = Framer(268_435_460)

    def sends(self, *packets: Packet) -> list[Event]:
        return self.sends_bytes(b"".join(encode(packet, self.version) for packet in packets))

    def sends_bytes(self, data: bytes) -> list[Event]:
        self.connection.receive(data, self.now)
        return self.events()

    def events(self) -> list[Event]:
        events = []
        while (event := self.connection.next_event(self.now)) is not None:
            events.append(event)
        return events

    def gets(self) -> list[Packet]:
        while data := self.connection.data_to_send(self.now):
            self._framer.feed(data)
        packets = []
        while (frame := self._framer.next()) is not None:
            packets.append(decode(*frame, self.version))
        return packets

    def connects(
        self,
        session: Session | None = None,
        *,
        clean: bool = False,
        client_id: str = "c",
        present: bool | None = None,
        will: Will | None = None,
        keep_alive: int = 0,
        properties: Properties | None = None,
    ) -> Session:
        if properties is None:
            properties = Properties(session_expiry_interval=600) if self.version is V5 else NO_PROPERTIES
        packet = Connect(self.version, client_id, clean, keep_alive, will, properties=properties)
        assert self.sends(packet) == [ConnectRequested(packet)]
        present = session is not None if present is None else present
        session = session or Session(self.limits)
        self.connection.accept(session, session_present=present, now=self.now)
        (connack,) = self.gets_first()
        assert isinstance(connack, Connack)
        assert connack.reason is R.SUCCESS
        assert connack.session_present is present
        return session

    def gets_first(self) -> list[Packet]:
        packets = self.gets()
        self.early = packets[1:]
        return packets[:1]

    @property
    def reason(self) -> R:
        """Of the DISCONNECT or CONNACK that it got last, in 5.0; in 3.1.1 there is none."""
        last = self.gets()[-1]
        assert isinstance(last, Disconnect | Connack)
        return last.reason


def published(events: list[Event]) -> list[PublishReceived]:
    assert all(isinstance(event, PublishReceived) for event in events)
    return [event for event in events if isinstance(event, PublishReceived)]


def ended(events: list[Event]) -> Ended:
    last = events[-1]
    assert isinstance(last, Ended)
    return last


def message(topic: str = "a", payload: bytes = b"x", qos: QoS = Q2, **more: object) -> Message:
    return Message(topic, payload, qos, **more)  # type: ignore[arg-type]


def to_send(qos: QoS, key: int = 0, payload: bytes = b"x", topic: str = "a") -> Delivery:
    return Delivery(message(topic, payload), qos, key=key)


def subscription(text: str = "a", qos: QoS = Q1, **more: object) -> Subscription:
    return Subscription(parse_filter(text), qos, **more)  # type: ignore[arg-type]
