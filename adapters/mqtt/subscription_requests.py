"""SUBSCRIBE and UNSUBSCRIBE of one connection: what is asked of the server, what then stands, what the client is told.

    SUBSCRIBE ─► filters parsed ─► as many as there is room for: asked ─► judged ─┬─► more to ask
                      │ above a limit of ours                                     └─► SUBACK
    UNSUBSCRIBE ─► asked ─► gone from the table ─► UNSUBACK

One at a time: nothing else is read while one is judged, so they take effect in their order. `subscriptions` is the
session's, by the text of the filter; it is changed here only by what was granted.

Pure. The peer's faults raise RemoteProtocolError, the caller's LocalProtocolError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from adapters.mqtt.machine_events import SubscribeRequested, UnsubscribeRequested
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.session_values import Subscription
from adapters.mqtt.topics import Filter, InvalidTopic, TopicTooLong, parse_filter
from adapters.mqtt.wire_packets import (
    QoS,
    RetainHandling,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Unsuback,
    Unsubscribe,
)
from adapters.mqtt.wire_reasons import LocalProtocolError, ReasonCode, RemoteProtocolError, violation

_Request = tuple[SubscriptionRequest, Filter | None, ReasonCode | None]


@dataclass(frozen=True, slots=True)
class Granted:
    """A subscription that now stands. `send_retained`: the matching retained messages are owed, after the SUBACK."""

    subscription: Subscription
    replaced: Subscription | None
    send_retained: bool


@dataclass(frozen=True, slots=True)
class _Subscribing:
    """A SUBSCRIBE under way. Its filters count as if they came one after the other [MQTT-3.8.4-5], so one for which
    there is no room waits for those before it, which may be refused; `asked` are places in `requests`."""

    packet_id: int
    requests: tuple[_Request, ...]
    asked: tuple[int, ...]
    identifier: int | None


@dataclass(frozen=True, slots=True)
class _Unsubscribing:
    packet_id: int
    filters: tuple[str, ...]


class SubscriptionRequests:
    """One connection's."""

    __slots__ = ("full", "judging", "too_long")

    def __init__(self) -> None:
        self.judging: _Subscribing | _Unsubscribing | None = None
        """The one that is under way."""
        self.full = 0
        """Filters that were refused because the session had no room, since the caller looked and set it to 0."""
        self.too_long = 0
        """Filters above a limit of ours, likewise."""

    def clear(self) -> None:
        """Nobody waits for an answer any more."""
        self.judging = None

    def subscribe(
        self, packet: Subscribe, subscriptions: Mapping[str, Subscription], limits: MqttLimits
    ) -> SubscribeRequested | Suback:
        """What is to be asked, or the answer where there is nothing to ask."""
        identifiers = packet.properties.subscription_identifiers
        requests: list[_Request] = []
        for request in packet.requests:
            topic_filter = self._filter(request.filter, limits)
            if topic_filter is None:
                requests.append((request, None, ReasonCode.TOPIC_FILTER_INVALID))
                continue
            if request.no_local and topic_filter.group is not None:
                raise violation("no local on a shared subscription")  # [MQTT-3.8.3-4]
            requests.append((request, topic_filter, None))
        identifier = identifiers[0] if identifiers else None
        return self._ask_for(packet.packet_id, requests, identifier, subscriptions, limits)

    def subscribed(
        self,
        packet_id: int,
        reasons: Sequence[ReasonCode],
        subscriptions: MutableMapping[str, Subscription],
        limits: MqttLimits,
    ) -> tuple[tuple[Granted, ...], SubscribeRequested | Suback]:
        """One reason for each request that was asked: what stands now, and what is to be asked or answered next."""
        judging = self.judging
        if not isinstance(judging, _Subscribing) or judging.packet_id != packet_id:
            raise LocalProtocolError(f"no SUBSCRIBE {packet_id} waits for an answer")
        if len(reasons) != len(judging.asked):
            raise LocalProtocolError("one reason for each request")
        granted: list[Granted] = []
        requests = list(judging.requests)
        for at, reason in zip(judging.asked, reasons, strict=True):
            request, topic_filter, _ = requests[at]
            requests[at] = request, topic_filter, reason
            if not reason.failed and topic_filter is not None:
                granted.append(_grant(subscriptions, request, topic_filter, reason, judging.identifier))
        return tuple(granted), self._ask_for(packet_id, requests, judging.identifier, subscriptions, limits)

    def unsubscribe(
        self, packet: Unsubscribe, subscriptions: Mapping[str, Subscription], limits: MqttLimits
    ) -> UnsubscribeRequested:
        """Which of these stand, and are to end."""
        for text in packet.filters:
            self._filter(text, limits)
        ending = tuple(subscriptions[text] for text in dict.fromkeys(packet.filters) if text in subscriptions)
        self.judging = _Unsubscribing(packet.packet_id, packet.filters)
        return UnsubscribeRequested(packet.packet_id, ending)

    def unsubscribed(self, packet_id: int, remove: Callable[[str], Subscription | None]) -> Unsuback:
        """They are gone from the server's table. `remove` takes one from the session's."""
        judging = self.judging
        if not isinstance(judging, _Unsubscribing) or judging.packet_id != packet_id:
            raise LocalProtocolError(f"no UNSUBSCRIBE {packet_id} waits for an answer")
        self.judging = None
        reasons = tuple(
            ReasonCode.NO_SUBSCRIPTION_EXISTED if remove(text) is None else ReasonCode.SUCCESS
            for text in judging.filters
        )
        return Unsuback(packet_id, reasons)  # also where nothing was deleted [MQTT-3.10.4-5]

    def _ask_for(
        self,
        packet_id: int,
        requests: list[_Request],
        identifier: int | None,
        subscriptions: Mapping[str, Subscription],
        limits: MqttLimits,
    ) -> SubscribeRequested | Suback:
        """Ask for as many as there is room for; with nothing left to ask, SUBACK."""
        known = set(subscriptions)
        asked: list[int] = []
        for at, (request, topic_filter, reason) in enumerate(requests):
            if reason is not None:
                continue
            if request.filter in known or len(known) < limits.subscriptions:
                known.add(request.filter)
                asked.append(at)
            elif asked:
                break  # these may be refused, and leave their room
            else:
                requests[at] = request, topic_filter, ReasonCode.QUOTA_EXCEEDED
                self.full += 1
        if asked:
            self.judging = _Subscribing(packet_id, tuple(requests), tuple(asked), identifier)
            return SubscribeRequested(packet_id, tuple(requests[at][0] for at in asked), identifier)
        self.judging = None
        return Suback(packet_id, tuple(reason for _, _, reason in requests if reason is not None))

    def _filter(self, text: str, limits: MqttLimits) -> Filter | None:
        """The parsed filter; None when it is one, and above a limit of ours."""
        try:
            return parse_filter(text, max_bytes=limits.topic_bytes, max_levels=limits.topic_levels)
        except TopicTooLong:
            self.too_long += 1
            return None
        except InvalidTopic as error:
            raise RemoteProtocolError(ReasonCode.TOPIC_FILTER_INVALID, str(error)) from None


def _grant(
    subscriptions: MutableMapping[str, Subscription],
    request: SubscriptionRequest,
    topic_filter: Filter,
    reason: ReasonCode,
    identifier: int | None,
) -> Granted:
    if reason > request.qos:
        raise LocalProtocolError(f"QoS {reason:d} granted; {request.qos:d} was asked for")
    subscription = Subscription(
        topic_filter,
        QoS(reason),
        request.no_local,
        request.retain_as_published,
        request.retain_handling,
        identifier,
    )
    replaced = subscriptions.get(request.filter)
    subscriptions[request.filter] = subscription  # [MQTT-3.8.4-3]
    wanted = request.retain_handling is RetainHandling.SEND or (
        request.retain_handling is RetainHandling.SEND_IF_NEW and replaced is None
    )
    return Granted(subscription, replaced, wanted and topic_filter.group is None)  # 5.0 §4.8.2: not for shared
