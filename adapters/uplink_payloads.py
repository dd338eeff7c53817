"""Payloads of uplinks in messages (CONTRACT §2, "the same on every transport"): bytes, JSON or CBOR, to what is stored.

Where nothing says which of the two it is, the first byte does: CBOR's maps and arrays, and its self-described tag,
begin with a byte from 0x80 on (RFC 8949 §3), and no JSON text does (RFC 8259 §8.1, UTF-8 without a byte order mark).

For transports whose uplinks are messages: MQTT and CoAP. HTTP has typed models for the document of its operations.
Pure; one error: InvalidArgument.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from adapters.cbor import decode_cbor
from registry.errors import InvalidArgument
from registry.model import Json
from registry.payloads import (
    NewUplink,
    Payload,
    PayloadTooLarge,
    Source,
    payload_from_json,
    payload_from_value,
    uplink_from,
)

_MAX_MESSAGE: Final = 300


def looks_like_cbor(raw: bytes) -> bool:
    """What the first byte says of a payload that says nothing else."""
    return raw[:1] >= b"\x80"


def payload_in(raw: bytes, *, cbor: bool, max_bytes: int) -> Payload:
    """A payload that keeps the core's promises. Raises InvalidArgument.

    `max_bytes` bounds it as it came, and as JSON.
    """
    if cbor:
        return payload_from_value(_decoded(raw, max_bytes), max_bytes=max_bytes)
    return payload_from_json(raw, max_bytes=max_bytes)


def enveloped(raw: bytes, source: Source, *, cbor: bool, max_bytes: int, message_id: str | None = None) -> NewUplink:
    """An uplink of any kind: `{kind, payload, message_id?, observed_at?}`. Raises InvalidArgument.

    `message_id` is the one that the message has outside of its payload; the envelope's own goes before it.
    """
    read: _Envelope | _CborEnvelope
    try:
        if cbor:
            read = msgspec.convert(_decoded(raw, max_bytes), _CborEnvelope)
            payload = payload_from_value(read.payload, max_bytes=max_bytes)
        else:
            read = _ENVELOPE.decode(raw)
            payload = payload_from_json(bytes(read.payload), max_bytes=max_bytes)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"the uplink is refused: {str(error)[:_MAX_MESSAGE]}", field="uplink") from None
    named = message_id if read.message_id is None else read.message_id
    return uplink_from(source, payload, kind=read.kind, message_id=named, observed_at=read.observed_at)


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


def _decoded(raw: bytes, max_bytes: int) -> Json:
    if len(raw) > max_bytes:
        raise PayloadTooLarge(
            f"payload has {len(raw)} bytes; allowed are up to {max_bytes}", limit=max_bytes, field="payload"
        )
    return decode_cbor(raw)
