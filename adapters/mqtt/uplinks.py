"""From a message on one of a device's own topics to an uplink of the core.

JSON or CBOR: the Content Type of MQTT 5 says which (`application/json`, `application/cbor`); without one of these the
first byte does. CBOR's maps and arrays, and its self-described tag, begin with a byte from 0x80 on (RFC 8949 §3), and
no JSON text does (RFC 8259 §8.1, UTF-8 without a byte order mark).

A message id makes an uplink idempotent: in the envelope of `…/uplink`, or as the user property `message_id` of MQTT 5
on any of the topics. A QoS 1 message that is sent again with DUP and without such an id is stored again: MQTT says at
least once, and the DUP flag does not say that the first one arrived (5.0 §3.3.1.1).

Pure; one error: InvalidArgument.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from adapters.cbor import decode_cbor
from adapters.mqtt.authorization import UplinkTopic
from adapters.mqtt.session_values import Message
from registry.errors import InvalidArgument
from registry.model import Json
from registry.payloads import (
    TELEMETRY,
    NewUplink,
    Payload,
    Source,
    payload_from_json,
    payload_from_value,
    telemetry_from,
    uplink_from,
)

CBOR: Final = "application/cbor"
JSON: Final = "application/json"
MESSAGE_ID: Final = "message_id"
_MAX_MESSAGE: Final = 300


def uplink_of(topic: UplinkTopic, message: Message, source: Source, *, max_bytes: int) -> NewUplink:
    """The uplink in a message. `max_bytes` bounds its payload as JSON. Raises InvalidArgument."""
    if topic.kind is None:
        return _enveloped(message, source, max_bytes)
    payload = payload_of(message, max_bytes=max_bytes)
    message_id = _message_id(message)
    if topic.kind == TELEMETRY:
        return telemetry_from(source, payload, message_id=message_id)
    return uplink_from(source, payload, kind=topic.kind, message_id=message_id)


def payload_of(message: Message, *, max_bytes: int) -> Payload:
    """A message's payload, JSON or CBOR. Raises InvalidArgument."""
    if is_cbor(message):
        return payload_from_value(_decoded(message, max_bytes), max_bytes=max_bytes)
    return payload_from_json(message.payload, max_bytes=max_bytes)


def is_cbor(message: Message) -> bool:
    """Whether a payload is CBOR, by its content type or its first byte."""
    match message.properties.content_type:
        case "application/cbor":
            return True
        case "application/json":
            return False
        case _:
            return message.payload[:1] >= b"\x80"


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: str
    payload: msgspec.Raw
    message_id: str | None = None
    observed_at: str | None = None


class _CborEnvelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: str
    payload: Any
    message_id: str | None = None
    observed_at: Any = None


_ENVELOPE: Final = msgspec.json.Decoder(_Envelope)


def _enveloped(message: Message, source: Source, max_bytes: int) -> NewUplink:
    read: _Envelope | _CborEnvelope
    try:
        if is_cbor(message):
            read = msgspec.convert(_decoded(message, max_bytes), _CborEnvelope)
            payload = payload_from_value(read.payload, max_bytes=max_bytes)
        else:
            read = _ENVELOPE.decode(message.payload)
            payload = payload_from_json(bytes(read.payload), max_bytes=max_bytes)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"the uplink is refused: {str(error)[:_MAX_MESSAGE]}", field="uplink") from None
    message_id = read.message_id if read.message_id is not None else _message_id(message)
    return uplink_from(source, payload, kind=read.kind, message_id=message_id, observed_at=read.observed_at)


def _decoded(message: Message, max_bytes: int) -> Json:
    if len(message.payload) > max_bytes:
        raise InvalidArgument(
            f"payload has {len(message.payload)} bytes; allowed are up to {max_bytes}", field="payload"
        )
    return decode_cbor(message.payload)


def _message_id(message: Message) -> str | None:
    if not message.properties.user_properties:
        return None
    return next((value for name, value in message.properties.user_properties if name == MESSAGE_ID), None)
