"""What may stand in the fields of devices, profiles and templates: pure checks, the same for every adapter and for
the bulk import.

Each check takes the field's name and a value, and answers the value to be stored or raises InvalidArgument with that
name, what was, and what is allowed. The texts come from operators and from devices that nobody knows yet. So they are
bounded, and no character in them can break a line, reverse it, or end it early: control characters, line separators,
bidirectional overrides (Unicode UAX #9 explicit formatting) and lone surrogates are refused. NUL and lone surrogates
are also what PostgreSQL cannot store in text or jsonb.

Bounds are for the honest worst case with room to spare; together they keep a device record below about 150 KiB.
"""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final
from uuid import UUID

import msgspec

from registry import secrets
from registry.errors import InvalidArgument
from registry.model import Json
from registry.secrets import RandomBytes

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_NAME: Final = 256
MAX_LABEL: Final = 128
MAX_DESCRIPTION: Final = 4096
MAX_FIRMWARE: Final = 128
MAX_GROUPS: Final = 64
MAX_GROUP: Final = 128
MAX_TAGS: Final = 64
MAX_TAG_KEY: Final = 128
MAX_TAG_BYTES: Final = 1024
MAX_JSON_BYTES: Final = 32 * 1024
MAX_JSON_DEPTH: Final = 32
"""Levels of objects and arrays. People nest settings four or five deep; 32 keeps every reader's stack safe."""

_IDENTIFIER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SHOWN: Final = 64
"""Characters of a refused text that a message repeats."""
_OVERRIDES: Final = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNPRINTABLE: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
_INTEGERS: Final = range(-(2**63), 2**64)


def text(field: str, value: str, most: int, *, least: int = 1, what: str | None = None) -> str:
    """`value`, of `least` to `most` characters, on one line; a text that must not be empty is not blank either.

    `what` is said in the message where the field alone does not tell.
    """
    said = what or field
    if not least <= len(value) <= most:
        raise InvalidArgument(f"{said} has {len(value)} characters; {least} to {most} are allowed", field=field)
    for character in value:
        if unsafe(character):
            raise InvalidArgument(
                f"{said} contains U+{ord(character):04X}; control characters, line separators and bidirectional "
                "overrides are not allowed",
                field=field,
            )
    if least and not value.strip():
        raise InvalidArgument(f"{said} is blank", field=field)
    _no_secret(said, field, value)
    return value


def unsafe(character: str) -> bool:
    """Whether a character could make a line read as something else, or could not be stored."""
    if character.isascii():
        return not character.isprintable()
    return unicodedata.category(character) in _UNPRINTABLE or character in _OVERRIDES


def prose(field: str, value: str, most: int) -> str:
    """`value`, of 0 to `most` characters; line breaks and tabs are allowed here."""
    text(field, value.replace("\n", " ").replace("\r", " ").replace("\t", " "), most, least=0)
    return value


def _no_secret(said: str, field: str, value: str) -> None:
    if secrets.holds_one(value):
        raise InvalidArgument(f"{said} contains a key, which is a secret and does not belong here", field=field)


def identifier(field: str, value: str) -> str:
    """`value`, of 1 to 64 characters of A–Z a–z 0–9 _ . -"""
    if _IDENTIFIER.fullmatch(value) is None:
        raise InvalidArgument(
            f"{field} {shown(value)} is not accepted: it takes 1 to 64 characters of A-Z a-z 0-9 _ . -", field=field
        )
    _no_secret(field, field, value)
    return value


def names(field: str, values: Sequence[str], *, most: int = MAX_GROUPS, longest: int = MAX_GROUP) -> list[str]:
    """`values` without repetitions, in their order: at most `most`, each a text of 1 to `longest` characters."""
    if len(values) > most:
        raise InvalidArgument(f"{field} has {len(values)} entries; {most} are allowed", field=field)
    return list(dict.fromkeys(text(field, value, longest, what=f"an entry of {field}") for value in values))


def tags(field: str, values: Mapping[str, str]) -> dict[str, str]:
    """At most 64 tags; keys of 1–128 characters without `=`, values of up to 1 KiB (UTF-8), both on one line."""
    if len(values) > MAX_TAGS:
        raise InvalidArgument(f"{field} has {len(values)} entries; {MAX_TAGS} are allowed", field=field)
    for key, value in values.items():
        text(field, key, MAX_TAG_KEY, what=f"{field}: a key")
        if "=" in key:
            raise InvalidArgument(
                f"{field}: the key {shown(key)} contains '=', which ends a key in filters", field=field
            )
        text(field, value, MAX_TAG_BYTES, least=0, what=f"{field}: the value of {shown(key)}")
        if len(value.encode()) > MAX_TAG_BYTES:
            raise InvalidArgument(
                f"{field}: the value of {shown(key)} has {len(value.encode())} bytes; {MAX_TAG_BYTES} are allowed",
                field=field,
            )
    return dict(values)


def document(field: str, value: Mapping[str, Json]) -> dict[str, Json]:
    """A JSON object of at most 32 KiB and 32 levels that PostgreSQL's jsonb can hold."""
    _check_json(field, value, 1)
    kept = dict(value)
    _check_size(field, kept)
    return kept


def array(field: str, value: Sequence[Json], *, most: int = 64) -> list[Json]:
    """A JSON array of at most `most` entries, 32 KiB and 32 levels that PostgreSQL's jsonb can hold."""
    if len(value) > most:
        raise InvalidArgument(f"{field} has {len(value)} entries; {most} are allowed", field=field)
    _check_json(field, value, 1)
    kept = list(value)
    _check_size(field, kept)
    return kept


def instant(field: str, value: datetime) -> datetime:
    """`value` in UTC; it must name its offset."""
    if value.tzinfo is None:
        raise InvalidArgument(f"{field} names no offset from UTC; 2030-01-01T00:00:00Z is how it looks", field=field)
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise InvalidArgument(f"{field} is outside the years 1 to 9999", field=field) from None


def future(field: str, value: datetime, now: datetime) -> datetime:
    """`value` in UTC; it must be later than `now`."""
    at = instant(field, value)
    if at <= now:
        raise InvalidArgument(f"{field} is {at.isoformat()}, which is past; it is now {now.isoformat()}", field=field)
    return at


def shown(value: str) -> str:
    """`value` for a message: quoted, every control and non-ASCII character escaped, cut."""
    return ascii(value) if len(value) <= _SHOWN else ascii(value[:_SHOWN]) + "…"


def differing(before: DataclassInstance, after: DataclassInstance) -> list[str]:
    """The names of the fields in which two values of one dataclass differ, for the audit."""
    every = [each.name for each in dataclasses.fields(before) if each.name != "updated_at"]
    return [name for name in every if getattr(before, name) != getattr(after, name)]


def fresh_uuid(random: RandomBytes) -> UUID:
    """A random UUID (RFC 9562 §5.4) from `random`."""
    return UUID(bytes=random(16), version=4)


def _check_json(field: str, value: Json, depth: int) -> None:
    match value:
        case None | bool():
            return
        case str():
            _check_json_text(field, value)
        case int():
            if value not in _INTEGERS:
                raise InvalidArgument(f"{field} contains an integer outside -2^63 … 2^64-1", field=field)
        case float():
            if not math.isfinite(value):
                raise InvalidArgument(f"{field} contains a number that is not finite", field=field)
        case Mapping():
            _check_depth(field, depth)
            for key, each in value.items():
                if not isinstance(key, str):
                    raise InvalidArgument(f"{field} contains a key that is no text", field=field)
                _check_json_text(field, key)
                _check_json(field, each, depth + 1)
        case list() | tuple():
            _check_depth(field, depth)
            for each in value:
                _check_json(field, each, depth + 1)
        case _:
            raise InvalidArgument(f"{field} contains a {type(value).__name__}; JSON has none", field=field)


def _check_depth(field: str, depth: int) -> None:
    if depth > MAX_JSON_DEPTH:
        raise InvalidArgument(f"{field} is nested deeper than {MAX_JSON_DEPTH} levels", field=field)


def _check_json_text(field: str, value: str) -> None:
    if "\x00" in value:
        raise InvalidArgument(f"{field} contains U+0000, which cannot be stored", field=field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{field} contains a lone surrogate, which cannot be stored", field=field) from None


def _check_size(field: str, value: Json) -> None:
    size = len(msgspec.json.encode(value))
    if size > MAX_JSON_BYTES:
        raise InvalidArgument(f"{field} has {size} bytes as JSON; {MAX_JSON_BYTES} are allowed", field=field)
