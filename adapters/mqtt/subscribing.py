"""What one device subscribes to: judged by the topics that are its own and by its grants, written down, then granted.

    SUBSCRIBE ─► filter ─► own, or a child's? ─► commands and configuration attached | broker's table | 0x80, 0x87

What is only for this connection is answered at once; what has to be asked or stored, when that is done. A grant that is
taken away while its subscription is being written down takes the subscription with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, assert_never

from adapters.mqtt.authorization import Brokered, Downlink, may_subscribe, subscribe_target
from adapters.mqtt.refusals import note_refusal
from adapters.mqtt.session_values import Subscription
from adapters.mqtt.subscription_requests import Granted
from adapters.mqtt.topics import Filter, parse_filter
from adapters.mqtt.wire_packets import QoS, SubscriptionRequest
from adapters.mqtt.wire_reasons import ReasonCode
from registry.errors import RegistryError
from registry.messaging_values import SessionLost

if TYPE_CHECKING:
    from adapters.mqtt.device import DeviceRole
    from adapters.mqtt.peer import Peer


class Subscribing:
    """One connection's."""

    __slots__ = ("_peer", "_role", "_server", "_session")

    def __init__(self, role: DeviceRole) -> None:
        self._role = role
        self._peer = role.peer
        self._server = role.server
        self._session = role.session

    def subscribe(
        self, packet_id: int, requests: Sequence[SubscriptionRequest], identifier: int | None, now: float
    ) -> None:
        """A SUBSCRIBE: it is answered when it is judged and stands, now or later."""
        filters = [_filter(self._peer, request) for request in requests]
        targets = [subscribe_target(each, self._role.own) for each in filters]
        if self._role.ownership is None and all(t is None or self._at_once(t) for t in targets):
            self._subscribed(packet_id, requests, targets, now)
            return
        self._peer.start(self._subscribe_later(packet_id, requests, filters, targets, identifier))

    def unsubscribe(self, packet_id: int, subscriptions: Sequence[Subscription], now: float) -> None:
        """An UNSUBSCRIBE, of these that stand: likewise."""
        for subscription in subscriptions:
            target = subscribe_target(subscription.filter, self._role.own)
            if isinstance(target, Downlink):
                self._role.downlinks.closed(target)
        if self._role.ownership is None and not any(each.filter.text in self._role.brokered for each in subscriptions):
            self._peer.machine.unsubscribed(packet_id, now)
            return
        self._peer.start(self._unsubscribe_later(packet_id, subscriptions))

    async def may_have(self, target: Downlink | Brokered, topic_filter: Filter) -> bool:
        """Whether the grants of now, or the children, allow a filter. Raises Unavailable."""
        match target:
            case Brokered():
                return may_subscribe(self._role.grants, topic_filter.levels, self._role.own)
            case Downlink(device_id):
                return await self._role.owner.speaks_for(self._session, device_id)
            case _:
                assert_never(target)

    def _at_once(self, target: Downlink | Brokered) -> bool:
        return isinstance(target, Downlink) and target.device_id == self._role.own

    async def _subscribe_later(
        self,
        packet_id: int,
        requests: Sequence[SubscriptionRequest],
        filters: Sequence[Filter],
        targets: Sequence[Downlink | Brokered | None],
        identifier: int | None,
    ) -> None:
        judged: list[Downlink | Brokered | None] = []
        granted: list[Subscription] = []
        try:
            for request, topic_filter, target in zip(requests, filters, targets, strict=True):
                if target is None or not await self.may_have(target, topic_filter):
                    judged.append(None)
                    continue
                judged.append(target)
                granted.append(_subscription(request, topic_filter, target, identifier))
            if granted:
                await self._role.broker.subscribe(self._role, granted)
            judged = [await self._still_granted(each, target) for each, target in zip(filters, judged, strict=True)]
        except SessionLost:
            self._peer.end(ReasonCode.SESSION_TAKEN_OVER, publish_will=True)
            return
        except RegistryError:  # what stands is not known; the client asks again
            self._peer.end(ReasonCode.SERVER_BUSY, publish_will=True)
            return
        self._subscribed(packet_id, requests, judged, self._server.now())

    async def _still_granted(
        self, topic_filter: Filter, target: Downlink | Brokered | None
    ) -> Downlink | Brokered | None:
        """The target, unless its grant was taken away while it was being written down. Raises as `judge`."""
        if not isinstance(target, Brokered):
            return target
        added = self._role.brokered.get(topic_filter.text)
        if added is None or may_subscribe(self._role.grants, topic_filter.levels, self._role.own):
            return None if added is None else target
        await self._role.broker.unsubscribe(self._role, (added,))
        return None

    def _subscribed(
        self,
        packet_id: int,
        requests: Sequence[SubscriptionRequest],
        targets: Sequence[Downlink | Brokered | None],
        now: float,
    ) -> None:
        reasons: list[ReasonCode] = []
        for request, target in zip(requests, targets, strict=True):
            if target is None:
                note_refusal(self._server, self._session, "subscription outside the device's topics")
                self._server.counters.forbidden += 1
                reasons.append(ReasonCode.NOT_AUTHORIZED)
            else:
                reasons.append(ReasonCode(_granted_qos(request, target)))
        by_filter = {request.filter: target for request, target in zip(requests, targets, strict=True)}
        for granted in self._peer.machine.subscribed(packet_id, reasons, now):
            self._granted(granted, by_filter[granted.subscription.filter.text])

    def _granted(self, granted: Granted, target: Downlink | Brokered | None) -> None:
        if isinstance(target, Downlink):
            self._role.downlinks.opened(target, granted.subscription)
        elif isinstance(target, Brokered) and granted.send_retained:
            self._role.retained.owe(granted.subscription)

    async def _unsubscribe_later(self, packet_id: int, subscriptions: Sequence[Subscription]) -> None:
        try:
            await self._role.broker.unsubscribe(self._role, subscriptions)
        except RegistryError:
            self._peer.end(ReasonCode.SERVER_BUSY, publish_will=True)
            return
        self._peer.machine.unsubscribed(packet_id, self._server.now())


def _subscription(
    request: SubscriptionRequest, topic_filter: Filter, target: Downlink | Brokered, identifier: int | None
) -> Subscription:
    return Subscription(
        topic_filter,
        _granted_qos(request, target),
        request.no_local,
        request.retain_as_published,
        request.retain_handling,
        identifier,
    )


def _granted_qos(request: SubscriptionRequest, target: Downlink | Brokered) -> QoS:
    """As it was asked for; what comes down from the core has QoS 1 at most."""
    return min(request.qos, QoS.AT_LEAST_ONCE) if isinstance(target, Downlink) else request.qos


def _filter(peer: Peer, request: SubscriptionRequest) -> Filter:
    limits = peer.machine.limits
    return parse_filter(request.filter, max_bytes=limits.topic_bytes, max_levels=limits.topic_levels)
