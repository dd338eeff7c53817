"""CBOR (RFC 8949) as devices may send it: what JSON can say, and byte strings and times beside it.

Theory. The library reads far more than devices should send: shared and repeated values (tags 28, 29, 25, 256) that blow
a small body up to a huge one, regular expressions to be compiled, big numbers. So the heads of all items are walked
first, which is linear and keeps nothing, and every tag but the two of times is refused; then the library decodes with
a bounded depth and without duplicate keys. Pure; one error: InvalidArgument.

What comes out: None, booleans, integers, floats, texts, byte strings, times with their zone, lists, and dictionaries
whose keys are texts. `undefined` is None (RFC 8949 §6.1). Protocol-neutral: HTTP, MQTT and CoAP read the same CBOR.
"""

from __future__ import annotations

from datetime import UTC, datetime
from io import BytesIO
from typing import Final

from cbor2 import CBORDecodeError, CBORDecoder, undefined

from registry.errors import InvalidArgument
from registry.model import Json

MAX_DEPTH: Final = 64
"""Levels of arrays and maps, as in JSON payloads (registry/payloads.py)."""

_SELF_DESCRIBED: Final = b"\xd9\xd9\xf7"
"""The tag 55799 before a whole body: it says that this is CBOR and changes nothing (RFC 8949 §3.4.6)."""
_TIMES: Final = frozenset({0, 1})
"""RFC 8949 §3.4.1 and §3.4.2: a date/time text, and seconds since 1970."""
_ALLOWED: Final = "allowed are numbers, texts, byte strings, true, false, null, arrays, maps with text keys, and times"


def decode_cbor(raw: bytes) -> Json:
    """The one value in these bytes. Raises InvalidArgument."""
    raw = raw.removeprefix(_SELF_DESCRIBED)
    _check_heads(raw)
    try:
        value = CBORDecoder(BytesIO(raw), max_depth=MAX_DEPTH, allow_duplicate_keys=False).decode()
    except (CBORDecodeError, RecursionError, ValueError, OverflowError, TypeError):
        raise _refused("is malformed, nested too deep, or has one key twice") from None
    return _plain(value)


def _check_heads(raw: bytes) -> None:
    """Walk the items' heads (RFC 8949 §3): refuse tags, and bytes behind the one value."""
    size, at = len(raw), 0
    waiting: list[int] = [1]
    """Items still to come at each level; -1 for one of indefinite length."""
    while waiting:
        if waiting[-1] == 0:
            waiting.pop()
            continue
        if at >= size:
            raise _refused("ends early")
        head = raw[at]
        at += 1
        major, info = head >> 5, head & 31
        if head == 0xFF:  # break: the end of an indefinite item
            if waiting[-1] != -1:
                raise _refused("has an end that nothing began")
            waiting.pop()
            continue
        if waiting[-1] > 0:
            waiting[-1] -= 1
        indefinite = info == 31 and major in (2, 3, 4, 5)
        value = 0
        if info < 24:
            value = info
        elif info < 28:
            width = 1 << (info - 24)
            value = int.from_bytes(raw[at : at + width], "big")
            at += width
        elif not indefinite:
            raise _refused("is malformed")
        if indefinite:
            waiting.append(-1)
        elif major in (2, 3):
            at += value
        elif major == 4:
            waiting.append(value)
        elif major == 5:
            waiting.append(2 * value)
        elif major == 6:
            if value not in _TIMES:
                raise _refused(f"has the tag {value}")
            waiting.append(1)
        if len(waiting) > 2 * MAX_DEPTH + 2:
            raise _refused(f"is nested deeper than {MAX_DEPTH} levels")
    if at != size:
        raise _refused("has something behind its one value, or ends early")


def _plain(value: Json) -> Json:
    match value:
        case None | bool() | int() | float() | str() | bytes():
            return value
        case dict():
            for key in value:
                if not isinstance(key, str):
                    raise _refused("has a key that is no text")
            return {key: _plain(each) for key, each in value.items()}
        case list():
            return [_plain(each) for each in value]
        case datetime():
            try:
                return value.astimezone(UTC) if value.tzinfo is not None else value.replace(tzinfo=UTC)
            except OverflowError:
                raise _refused("has a time that is beyond the calendar in UTC") from None
        case _ if value is undefined:
            return None
        case _:
            raise _refused(f"has a {type(value).__name__}")


def _refused(what: str) -> InvalidArgument:
    return InvalidArgument(f"the CBOR body {what}; {_ALLOWED}")
