"""What a peer hands in, checked before it is queued: payloads that PostgreSQL will take, and the uplinks made of them.

    bytes ──payload_from_json──┐                   ┌─uplink_from────► NewUplink   any kind; readings if it is telemetry
                               ├──► Payload + Source ┤
    value ──payload_from_value─┘                   └─telemetry_from─► NewUplink   telemetry, or refused

Uplinks of many devices share one statement, so no payload may be able to fail it. A `Payload` therefore keeps these
promises, and only the two functions make one:

- its text is valid UTF-8 and valid JSON (RFC 8259) as PostgreSQL's `json` type understands it;
- no text in it holds NUL (`\\u0000`) or half of a surrogate pair: `json` would take them, but every query that later
  asks for that member would fail;
- its numbers fit a double or are integers, so that every reader can decode it;
- arrays and objects are nested at most 64 deep, far below where anybody's parser runs out of stack;
- it is no larger than the limit.

The text is kept as it came: member order, duplicates, spelling of numbers. Pure: no I/O, no clock.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from datetime import datetime

import msgspec

from registry.errors import InvalidArgument
from registry.messaging_values import Incoming
from registry.model import DeviceId, Identity, Json, TenantId, Transport
from registry.telemetry import Reading, parse_telemetry, parse_time, shown

TELEMETRY = "telemetry"
"""The kind whose payloads become readings."""
MAX_PAYLOAD_BYTES = 262_144
"""Bytes of JSON in one payload, unless the configuration says otherwise."""
MAX_DEPTH = 64
"""Levels of arrays and objects; no device nests deeper than a handful."""

_KIND = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
_MESSAGE_ID = re.compile(r"[!-~]{1,128}")
"""Printable ASCII without spaces, as hardware_ids: it must survive logs, topics and an operator's copying."""


# These are made for every uplink, and what they hold forms no cycle: `gc=False` spares the collector the look.
class Payload(msgspec.Struct, frozen=True, gc=False):
    """A payload that keeps the promises above: its JSON text, and what it decodes to."""

    text: str
    value: Json


class Source(msgspec.Struct, frozen=True, gc=False):
    """Whose uplink it is and how it came. The caller has checked that `via` may speak for the device."""

    tenant_id: TenantId
    device_id: DeviceId
    transport: Transport
    via: DeviceId | None = None
    """The gateway that sent it for the device, which is its child."""

    @classmethod
    def of(cls, identity: Identity, transport: Transport) -> Source:
        """A device that speaks for itself."""
        return cls(identity.tenant_id, identity.device_id, transport)


class NewUplink(msgspec.Struct, frozen=True, gc=False):
    """An uplink to be stored. Made by `uplink_from` or `telemetry_from`, which check it."""

    tenant_id: TenantId
    device_id: DeviceId
    kind: str
    payload: str
    """JSON text as a `Payload` has it."""
    message_id: str | None
    observed_at: datetime | None
    transport: Transport
    via: DeviceId | None
    readings: list[Reading]
    origin: Incoming | None = None
    """The QoS 2 packet id that it came under, of a stored session: the id is stored with it, and the two once."""


class PayloadTooLarge(InvalidArgument):
    """The payload is larger than one may be; told apart from the other refusals to be counted.

    `limit` is what it may have, in bytes as they are sent; None where it is another size that exceeded one.
    """

    def __init__(self, message: str, *, limit: int | None = None, field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.limit = limit


def payload_from_json(raw: bytes, *, max_bytes: int = MAX_PAYLOAD_BYTES) -> Payload:
    """The payload in these bytes of JSON. Raises InvalidArgument."""
    if len(raw) > max_bytes:
        raise PayloadTooLarge(
            f"payload has {len(raw)} bytes; allowed are up to {max_bytes}", limit=max_bytes, field="payload"
        )
    try:
        text = raw.decode()
        value = msgspec.json.decode(text)
    except UnicodeDecodeError as error:
        raise _refused(f"payload is no UTF-8 at byte {error.start}; allowed is JSON in UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except msgspec.MsgspecError as error:
        raise _refused(f"payload is no JSON: {error}") from None
    # Only a text with many brackets can be nested deep, and only one with this escape can hold NUL.
    if len(text) > MAX_DEPTH and text.count("[") + text.count("{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
        raise _too_deep()
    if "\\u0000" in text and any("\0" in part for part in _texts(value)):
        raise _refused("payload has a NUL character (\\u0000), which cannot be stored")
    return Payload(text, value)


def payload_from_value(value: Json, *, max_bytes: int = MAX_PAYLOAD_BYTES) -> Payload:
    """The payload that a decoded value (from CBOR) is in JSON. Raises InvalidArgument.

    Byte strings become base64 text, times RFC 3339 text. NaN and infinities, which JSON does not have, are refused.
    """
    try:
        raw = msgspec.json.encode(value)
    except RecursionError:
        raise _too_deep() from None
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
        raise _refused("payload has a value that JSON cannot express; allowed are CBOR's JSON-like types") from None
    if len(raw) > max_bytes:
        raise PayloadTooLarge(
            f"payload has {len(raw)} bytes when it is written as JSON; allowed are up to {max_bytes}", field="payload"
        )
    # The encoder writes what is not finite as null; to store that would be to lose it without a word.
    if b"null" in raw and (culprit := _not_finite(value)) is not None:
        raise _refused(f"{culprit} is NaN or infinite; allowed are finite numbers, and null where there is none")
    return Payload(payload_from_json(raw, max_bytes=max_bytes).text, value)


def uplink_from(
    source: Source,
    payload: Payload,
    *,
    kind: str,
    message_id: str | None = None,
    observed_at: str | datetime | None = None,
) -> NewUplink:
    """An uplink of any kind. Telemetry that cannot be read as such is kept without readings. Raises InvalidArgument.

    `kind` is 1–64 of a-z, 0-9, `_`, `.` and `-`, beginning with a letter; `message_id` 1–128 printable ASCII characters
    without spaces; `observed_at` an RFC 3339 time.
    """
    if not _KIND.fullmatch(kind):
        raise InvalidArgument(
            f"kind is {shown(kind)}; allowed are 1 to 64 of a-z, 0-9, '_', '.' and '-', beginning with a letter",
            field="kind",
        )
    readings: list[Reading] = []
    if kind == TELEMETRY:
        try:
            readings = parse_telemetry(payload.value)
        except InvalidArgument:
            pass  # the uplink is the record, the readings are a view of it
    return _uplink(source, payload, kind, message_id, observed_at, readings)


def telemetry_from(
    source: Source, payload: Payload, *, message_id: str | None = None, observed_at: str | datetime | None = None
) -> NewUplink:
    """An uplink of kind telemetry, whose payload must be readable as such. Raises InvalidArgument."""
    return _uplink(source, payload, TELEMETRY, message_id, observed_at, parse_telemetry(payload.value))


def _uplink(
    source: Source,
    payload: Payload,
    kind: str,
    message_id: str | None,
    observed_at: str | datetime | None,
    readings: list[Reading],
) -> NewUplink:
    if message_id is not None and not _MESSAGE_ID.fullmatch(message_id):
        raise InvalidArgument(
            f"message_id is {shown(message_id)}; allowed are 1 to 128 printable ASCII characters without spaces",
            field="message_id",
        )
    return NewUplink(
        source.tenant_id,
        source.device_id,
        kind,
        payload.text,
        message_id,
        None if observed_at is None else parse_time(observed_at, "observed_at"),
        source.transport,
        source.via,
        readings,
    )


def _depth_exceeds(value: Json, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [part for whole in level for part in _parts(whole) if type(part) is list or type(part) is dict]
        if not level:
            return False
    return True


def _not_finite(value: Json) -> str | None:
    """Where a float stands that is none of the numbers of JSON; None where there is no such."""
    waiting: list[tuple[str, Json]] = [("payload", value)]
    while waiting:
        where, part = waiting.pop()
        if type(part) is float and not math.isfinite(part):
            return where
        if type(part) is dict:
            waiting.extend((shown(name), each) for name, each in part.items())
        elif type(part) is list:
            waiting.extend((where, each) for each in part)
    return None


def _texts(value: Json) -> Iterator[str]:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if type(part) is str:
            yield part
        elif type(part) is dict:
            yield from part
        waiting.extend(_parts(part))


def _parts(value: Json) -> list[Json]:
    if type(value) is list:
        return value
    return list(value.values()) if type(value) is dict else []


def _too_deep() -> InvalidArgument:
    return _refused(f"payload is nested too deep; allowed are {MAX_DEPTH} levels of arrays and objects")


def _refused(message: str) -> InvalidArgument:
    return InvalidArgument(message, field="payload")
