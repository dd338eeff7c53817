"""Bytes and texts of a request into declared types, strictly, before anything else looks at them.

The types' constraints are those of the OpenAPI document. Beyond them, refused everywhere: invalid UTF-8, lone
surrogates, U+0000 (PostgreSQL cannot keep it), nesting that exhausts the decoder, numbers beyond a double, unknown
fields and parameters (`tenant_id` among them: the tenant is the credential's), one query parameter twice. Of two
members with one name in a JSON object the last counts, as JSON's usual practice is (RFC 8259 §4).

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from functools import lru_cache
from typing import Any, Final, TypeVar, cast
from urllib.parse import parse_qsl
from uuid import UUID

import msgspec

from adapters.http.errors import UnsupportedMediaType, invalid_json, invalid_value
from registry.errors import InvalidArgument, NotFound

T = TypeVar("T")

JSON: Final = b"application/json"
CBOR: Final = b"application/cbor"

MAX_PARAMETERS: Final = 32
"""Of one query. The longest list of filters has ten."""

_INTEGERS: Final = frozenset({"limit", "wait"})
"""The parameters that are numbers. The converter's own coercion would take `0.5` for a time, and `5.0` for 5."""
_INTEGER: Final = re.compile(r"(?:0|[1-9][0-9]{0,8})")
_NUL_ESCAPE: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_UUID: Final = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


def decode(raw: bytes, model: type[T]) -> T:
    """The value of a JSON body. Raises InvalidArgument."""
    if not raw:
        raise InvalidArgument("a JSON body is required and there is none")
    refuse_nul(raw)
    try:
        return cast(T, _decoder(cast(Hashable, model)).decode(raw))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise invalid_json(error) from None


def refuse_nul(raw: bytes) -> None:
    """Raises InvalidArgument if a JSON text escapes U+0000; unescaped it is no JSON anyway."""
    if b"\\u0000" in raw and _NUL_ESCAPE.search(raw) is not None:
        raise InvalidArgument("the body contains U+0000, which cannot be stored")


def decode_query(raw: bytes, model: type[T]) -> T:
    """The value of a query string, by name. Raises InvalidArgument."""
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise InvalidArgument(
            f"the query is not percent-encoded UTF-8 of at most {MAX_PARAMETERS} parameters"
        ) from None
    values: dict[str, str | int] = {}
    for name, value in pairs:
        if name in values:
            raise InvalidArgument(f"the query names {name[:100]} twice", field=name)
        if "\0" in value or "\0" in name:
            raise InvalidArgument("the query contains U+0000", field=name)
        values[name] = int(value) if name in _INTEGERS and _INTEGER.fullmatch(value) else value
    try:
        return msgspec.convert(values, model)
    except msgspec.ValidationError as error:
        raise invalid_value(error, "the query") from None


def media_type(headers: Iterable[tuple[bytes, bytes]], allowed: tuple[bytes, ...] = (JSON,)) -> bytes:
    """The media type of the body; the first of `allowed` where none is named. Raises UnsupportedMediaType (415)."""
    found = allowed[0]
    for name, value in headers:
        if name == b"content-type":
            found = value.partition(b";")[0].strip().lower()
        elif name == b"content-encoding" and value.strip().lower() != b"identity":
            raise UnsupportedMediaType("the body has a content coding; only plain bodies are read")
    if found not in allowed:
        names = b" and ".join(allowed).decode()
        raise UnsupportedMediaType(f"the body's type is not served here; allowed: {names}")
    return found


def uuid_in_path(text: str, what: str) -> UUID:
    """The id in a path. What is no UUID names nothing: NotFound, the same answer as for an unknown one."""
    if _UUID.fullmatch(text) is None:
        raise NotFound(f"no such {what} in this tenant")
    return UUID(text)


@lru_cache(maxsize=64)
def _decoder(model: Hashable) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(model)
