"""Topic names of what a client publishes: its aliases, and what the levels of a name are.

An alias lives and dies with its connection [MQTT-3.3.2-7], and stands for a name that was checked when it was set.
"""

from __future__ import annotations

from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import Properties
from adapters.mqtt.topics import InvalidTopic, TopicTooLong, parse_name
from adapters.mqtt.wire_packets import Publish
from adapters.mqtt.wire_reasons import ReasonCode, RemoteProtocolError, violation


class IncomingTopics:
    """Those of one connection. What raises, raises RemoteProtocolError."""

    __slots__ = ("_aliases", "_last", "_last_levels", "_limits", "too_long")

    def __init__(self, limits: MqttLimits) -> None:
        self.too_long = 0
        """Names above a limit of ours, since somebody took the count."""
        self._limits = limits
        self._aliases: dict[int, str] = {}
        self._last: str | None = None  # of the last PUBLISH: most clients have one
        self._last_levels: tuple[str, ...] = ()

    def of(self, packet: Publish) -> tuple[str, tuple[str, ...]]:
        """The topic of a PUBLISH and its levels; its response topic is checked too. Raises."""
        topic = self._resolved(packet)
        if topic != self._last:
            self._last_levels = self.levels(topic)
            self._last = topic
        self.check_response(packet.properties)
        return topic, self._last_levels

    def levels(self, topic: str) -> tuple[str, ...]:
        """The levels of a topic name. Raises for one that is none."""
        try:
            return parse_name(topic, max_bytes=self._limits.topic_bytes, max_levels=self._limits.topic_levels)
        except InvalidTopic as error:
            self.too_long += isinstance(error, TopicTooLong)
            raise RemoteProtocolError(ReasonCode.TOPIC_NAME_INVALID, str(error)) from None

    def check_response(self, properties: Properties) -> None:
        """Raises for a response topic that is no topic name [MQTT-3.3.2-14]."""
        if properties.response_topic is not None:
            self.levels(properties.response_topic)

    def _resolved(self, packet: Publish) -> str:
        alias = packet.properties.topic_alias
        if alias is None:
            return packet.topic
        if alias > self._limits.topic_aliases_in:  # [MQTT-3.3.2-9]
            text = f"topic alias {alias}; {self._limits.topic_aliases_in} are allowed"
            raise RemoteProtocolError(ReasonCode.TOPIC_ALIAS_INVALID, text)
        if packet.topic:
            self.levels(packet.topic)  # nothing that is not a topic is kept
            self._aliases[alias] = packet.topic
            return packet.topic
        topic = self._aliases.get(alias)
        if topic is None:
            raise violation("a topic alias that was never set")  # 5.0 §3.3.4
        return topic
