"""From a message on one of a device's own topics to an uplink of the core.

JSON or CBOR: the Content Type of MQTT 5 says which (`application/json`, `application/cbor`); without one of these the
first byte does (adapters/uplink_payloads.py).

A message id makes an uplink idempotent: in the envelope of `…/uplink`, or as the user property `message_id` of MQTT 5
on any of the topics. A QoS 1 message that is sent again with DUP and without such an id is stored again: MQTT says at
least once, and the DUP flag does not say that the first one arrived (5.0 §3.3.1.1).

Pure; one error: InvalidArgument.
"""

from __future__ import annotations

from typing import Final

from adapters.mqtt.authorization import UplinkTopic
from adapters.mqtt.session_values import Message
from adapters.uplink_payloads import enveloped, looks_like_cbor, payload_in
from registry.model import DeviceId, Transport
from registry.payloads import TELEMETRY, NewUplink, Payload, Source, telemetry_from, uplink_from
from registry.sessions import Session as RegistrySession

MESSAGE_ID: Final = "message_id"


def uplink_of(topic: UplinkTopic, message: Message, source: Source, *, max_bytes: int) -> NewUplink:
    """The uplink in a message. `max_bytes` bounds its payload as JSON. Raises InvalidArgument."""
    message_id = _message_id(message)
    if topic.kind is None:
        return enveloped(message.payload, source, cbor=is_cbor(message), max_bytes=max_bytes, message_id=message_id)
    payload = payload_of(message, max_bytes=max_bytes)
    if topic.kind == TELEMETRY:
        return telemetry_from(source, payload, message_id=message_id)
    return uplink_from(source, payload, kind=topic.kind, message_id=message_id)


def source_of(session: RegistrySession, device_id: DeviceId) -> Source:
    """Whose uplink it is: the device's own, or a child's that it sends for."""
    if device_id == session.device_id:
        return Source.of(session.identity, Transport.MQTT)
    return Source(session.tenant_id, device_id, Transport.MQTT, via=session.device_id)


def payload_of(message: Message, *, max_bytes: int) -> Payload:
    """A message's payload, JSON or CBOR. Raises InvalidArgument."""
    return payload_in(message.payload, cbor=is_cbor(message), max_bytes=max_bytes)


def is_cbor(message: Message) -> bool:
    """Whether a payload is CBOR, by its content type or its first byte."""
    match message.properties.content_type:
        case "application/cbor":
            return True
        case "application/json":
            return False
        case _:
            return looks_like_cbor(message.payload)


def _message_id(message: Message) -> str | None:
    if not message.properties.user_properties:
        return None
    return next((value for name, value in message.properties.user_properties if name == MESSAGE_ID), None)
