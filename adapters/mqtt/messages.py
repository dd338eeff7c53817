"""Messages, subscriptions and sessions between the machines' values and those of the messaging store.

The store knows bytes and numbers only; what MQTT 5 sends along with a message (its forwarded properties) is packed
into bytes that come back as they were. Pure.

What is kept outlives this process and is read by other nodes, so its times are the wall clock's; the machines have one
that never jumps (server.py). `ahead` is by how many seconds the wall clock is ahead of that one now.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import msgspec

from adapters.mqtt.properties import NO_PROPERTIES, Properties, UserProperties
from adapters.mqtt.session_values import Delivery, Message, Outgoing, Phase, Snapshot, Subscription
from adapters.mqtt.topics import Filter, parse_filter
from adapters.mqtt.wire_packets import QoS, RetainHandling, Will
from registry import messaging_values as stored


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    payload_format_indicator: int | None
    content_type: str | None
    response_topic: str | None
    correlation_data: bytes | None
    user_properties: UserProperties


_UNPACK: Final = msgspec.msgpack.Decoder(_Packed)


def to_store(message: Message, ahead: float) -> stored.Message:
    """A message as it is kept."""
    return stored.Message(
        message.topic,
        message.payload,
        message.qos,
        message.retain,
        _packed(message.properties),
        None if message.expires_at is None else message.expires_at + ahead,
    )


def from_store(message: stored.Message, ahead: float) -> Message:
    """A kept message as it is sent."""
    return Message(
        message.topic,
        message.payload,
        QoS(message.qos),
        message.retain,
        _unpacked(message.properties),
        None if message.expires_at is None else message.expires_at - ahead,
    )


def will_to_store(will: Will) -> stored.StoredWill:
    """A will as it is kept; its times in seconds."""
    message = stored.Message(will.topic, will.payload, will.qos, will.retain, _packed(_forwarded(will.properties)))
    expiry = will.properties.message_expiry_interval
    return stored.StoredWill(
        message, float(will.properties.will_delay_interval or 0), None if expiry is None else float(expiry)
    )


def subscription_to_store(subscription: Subscription) -> stored.StoredSubscription:
    """A granted subscription as it is kept."""
    return stored.StoredSubscription(
        subscription.filter.text,
        subscription.qos,
        subscription.no_local,
        subscription.retain_as_published,
        subscription.retain_handling,
        subscription.identifier,
    )


def subscription_from_store(kept: stored.StoredSubscription) -> Subscription:
    """A kept subscription as the session has it."""
    return Subscription(
        filter_of(kept.filter),
        QoS(kept.qos),
        kept.no_local,
        kept.retain_as_published,
        RetainHandling(kept.retain_handling),
        kept.identifier,
    )


@lru_cache(maxsize=8_192)
def filter_of(text: str) -> Filter:
    """A filter that was parsed and granted before."""
    return parse_filter(text)


def delivery_of_queued(queued: stored.QueuedMessage, ahead: float) -> Delivery:
    """A row of a session's queue as a delivery, named by its ordinal."""
    return Delivery(
        from_store(queued.message, ahead),
        QoS(queued.qos),
        queued.retain,
        queued.subscription_identifiers,
        queued.ordinal,
    )


def snapshot_of(kept: stored.StoredSession, ahead: float) -> Snapshot:
    """A kept session as the machine continues it."""
    return Snapshot(
        tuple(subscription_from_store(each) for each in kept.subscriptions),
        kept.incoming,
        tuple(Outgoing(each.packet_id, delivery_of_queued(each, ahead), _phase(each)) for each in kept.outgoing),
        kept.expiry,
    )


def _phase(queued: stored.QueuedMessage) -> Phase:
    if queued.released:
        return Phase.RELEASED
    return Phase.QUEUED if queued.fresh else Phase.PUBLISHED


def _forwarded(properties: Properties) -> Properties:
    return Properties(
        payload_format_indicator=properties.payload_format_indicator,
        content_type=properties.content_type,
        response_topic=properties.response_topic,
        correlation_data=properties.correlation_data,
        user_properties=properties.user_properties,
    )


def _packed(properties: Properties) -> bytes:
    if properties == NO_PROPERTIES:
        return b""
    return msgspec.msgpack.encode(
        _Packed(
            properties.payload_format_indicator,
            properties.content_type,
            properties.response_topic,
            properties.correlation_data,
            properties.user_properties,
        )
    )


def _unpacked(packed: bytes) -> Properties:
    if not packed:
        return NO_PROPERTIES
    read = _UNPACK.decode(packed)
    return Properties(
        payload_format_indicator=read.payload_format_indicator,
        content_type=read.content_type,
        response_topic=read.response_topic,
        correlation_data=read.correlation_data,
        user_properties=read.user_properties,
    )
