"""What one connection has to say to its peer and has not said yet, within what the peer takes.

Packets are added whole and leave in their order. The peer's bounds are its CONNECT's: Maximum Packet Size, Request
Problem Information, Topic Alias Maximum. Aliases live and die with the connection (5.0 §3.3.2.3.4); one is given to
each new topic as long as there are any, and stays with it.

Pure. What does not fit is not added, and the caller is told.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.session_values import Delivery, publish_of
from adapters.mqtt.wire import encode, packet_type
from adapters.mqtt.wire_packets import (
    Ack,
    Connack,
    Disconnect,
    Packet,
    Publish,
    Suback,
    Unsuback,
)
from adapters.mqtt.wire_reasons import LocalProtocolError, PacketType, Version

_UNLIMITED: Final = 268_435_460  # the largest packet that there can be, header included
# What nearly all acknowledgements are, in both versions: without a reason and properties. 5.0 §3.4.2.1, 3.1.1 §3.4.
_BARE_ACKS: Final = {PacketType.PUBACK: b"\x40\x02", PacketType.PUBREC: b"\x50\x02"}
_BARE_ACK_BYTES: Final = 4
_MAY_EXPLAIN: Final = (PacketType.CONNACK, PacketType.DISCONNECT)


class Outgoing:
    """One connection's. Sizes in bytes, headers included."""

    __slots__ = ("_aliases", "_aliases_allowed", "_explain", "_max_packet", "_packets", "size")

    def __init__(self) -> None:
        self._packets: list[bytes] = []
        self.size = 0
        """Of what waits."""
        self._max_packet = _UNLIMITED
        self._explain = True
        self._aliases_allowed = 0
        self._aliases: dict[str, int] = {}

    def allow(self, properties: Properties, most_aliases: int) -> None:
        """Keep to what a CONNECT says; `most_aliases` are ours."""
        self._max_packet = properties.maximum_packet_size or _UNLIMITED
        self._explain = properties.request_problem_information != 0
        self._aliases_allowed = min(properties.topic_alias_maximum or 0, most_aliases)

    def send(self, packet: Packet, version: Version) -> bool:
        """Add anything but PUBLISH, without its texts where they do not fit or are not wanted; False: it is too large
        without them [MQTT-3.1.2-24]."""
        properties = getattr(packet, "properties", NO_PROPERTIES)
        data = encode(packet, version)
        kind = packet_type(data[0])
        told = properties.reason_string is not None or properties.user_properties
        if told and ((not self._explain and kind not in _MAY_EXPLAIN) or len(data) > self._max_packet):
            # [MQTT-3.1.2-29], and for the size [MQTT-3.2.2-19], [MQTT-3.4.2-2] and alike
            bare = replace(properties, reason_string=None, user_properties=())
            data = encode(_with_properties(packet, NO_PROPERTIES if bare == NO_PROPERTIES else bare), version)
        if len(data) > self._max_packet:
            return False
        self._add(data)
        return True

    def acknowledge(self, kind: PacketType, packet_id: int) -> bool:
        """Add PUBACK or PUBREC that says success and nothing else; False: it is too large."""
        if self._max_packet < _BARE_ACK_BYTES:
            return False
        self._add(_BARE_ACKS[kind] + packet_id.to_bytes(2, "big"))
        return True

    def publish(self, delivery: Delivery, packet_id: int, dup: bool, version: Version, now: float) -> bool:
        """Add PUBLISH, with an alias where the peer allows one; False: it is too large."""
        if version is not Version.V5:
            message = delivery.message
            packet = Publish(message.topic, message.payload, delivery.qos, delivery.retain, dup, packet_id)
            self._add(encode(packet, version))
            return True
        packet = publish_of(delivery, packet_id, dup, now)
        topic = packet.topic
        alias = self._aliases.get(topic)
        if alias is not None:
            packet = replace(packet, topic="", properties=replace(packet.properties, topic_alias=alias))
        elif len(self._aliases) < self._aliases_allowed:
            alias = len(self._aliases) + 1
            packet = replace(packet, properties=replace(packet.properties, topic_alias=alias))
        data = encode(packet, version)
        if len(data) > self._max_packet:
            return False
        if alias is not None:
            self._aliases[topic] = alias
        self._add(data)
        return True

    def take(self) -> bytes:
        """What is to be written now; empty for nothing."""
        data = b"".join(self._packets)
        self.clear()
        return data

    def clear(self) -> None:
        """Say nothing of it."""
        self._packets.clear()
        self.size = 0

    def _add(self, data: bytes) -> None:
        self._packets.append(data)
        self.size += len(data)


def reason_string(text: str) -> Properties:
    """The properties that say a text, or nothing."""
    return Properties(reason_string=text) if text else NO_PROPERTIES


def _with_properties(packet: Packet, properties: Properties) -> Packet:
    match packet:
        case Connack() | Ack() | Disconnect() | Suback() | Unsuback():
            return replace(packet, properties=properties)
        case _:
            raise LocalProtocolError("texts in a packet that we do not explain")
