"""One configuration value: where it came from, what is allowed for it, and the error that says both.

Theory. A value reaches us as TOML (typed) or as environment text (untyped). Text is first turned into the type that the
key declares, then both take the same strict road through msgspec, so that `port = "80"` in the file is refused while
`GATEHOUSE_HTTPS__PORT=80` is not. Every refusal is a `ConfigError` that names the key, the value, what was allowed and
where the value came from; the value of a secret key is never part of it. Nothing here touches a socket or a clock.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta, inspect

from registry.secrets import Secret

MAX_SHOWN = 60
"""Characters of a refused value that its error repeats: enough to recognise it, too few to flood a terminal."""

Seconds = Annotated[float, Meta(ge=0.1, le=86_400)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


class ConfigError(Exception):
    """A configuration that cannot be used: `key` is dotted (`https.port`), `reason` says what was and what may be."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason


class Source(Enum):
    """Who gave a value; later members beat earlier ones."""

    FILE = "file"
    ENVIRONMENT = "environment"
    COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: `name` for the reader of an error, `directory` as the base of a relative path."""

    source: Source
    name: str
    directory: Path


@dataclass(frozen=True, slots=True)
class Key:
    """One key that the configuration knows, as its structure declares it."""

    section: str
    name: str
    hint: Any
    type: inspect.Type
    description: str
    allowed: str
    default: object
    default_text: str | None

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def variable(self) -> str:
        """The environment variable that overrides this key."""
        return "GATEHOUSE_" + "__".join(part.upper() for part in (self.section, self.name) if part)

    @property
    def secret(self) -> bool:
        return _is_custom(self.type, Secret)

    @property
    def path(self) -> bool:
        return _is_custom(self.type, Path)


def keys_of(section: str, structure: type[msgspec.Struct]) -> list[Key]:
    """The keys of one structure in the order of their declaration; nested structures are sections, not keys."""
    described = inspect.type_info(structure)
    assert isinstance(described, inspect.StructType)
    hints = get_type_hints(structure, include_extras=True)
    return [
        _key(section, field, hints[field.name])
        for field in described.fields
        if not isinstance(field.type, inspect.StructType)
    ]


def parse_value(key: Key, raw: object, origin: Origin) -> object:
    """The value of `key` from `raw`, which is text from the environment or a TOML value. Raises `ConfigError`."""
    value = _from_text(key, raw) if origin.source is Source.ENVIRONMENT and isinstance(raw, str) else raw

    def custom(hint: type, inner: object) -> object:
        if not isinstance(inner, str) or not inner.isprintable() or not inner:
            raise ValueError("not text on one line")
        return _absolute(inner, origin) if hint is Path else Secret(inner)

    try:
        parsed: object = msgspec.convert(value, key.hint, strict=True, dec_hook=custom)
    except (msgspec.ValidationError, ValueError, OverflowError, RecursionError):
        raise refused(key, value, origin) from None
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise refused(key, value, origin)
    return parsed


def refused(key: Key, value: object, origin: Origin) -> ConfigError:
    """The error for a value of the wrong type or out of range."""
    was = "the value given (not shown, it may be secret)" if key.secret else _shown(value)
    return ConfigError(key.dotted, f"must be {key.allowed}, not {was} (from {origin.name})")


def unknown(name: str, what: str, allowed: Iterable[str], origin: str) -> ConfigError:
    """The error for a name that is not known, with the nearest known one if there is a near one."""
    choices = sorted(allowed)
    near = difflib.get_close_matches(name.rpartition(".")[2], choices, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(choices)}"
    return ConfigError(_shown(name)[1:-1], f"is no {what} ({_shown(origin)[1:-1]}); {hint}")


def _key(section: str, field: inspect.Field, hint: object) -> Key:
    declared = field.type
    extra: dict[str, Any] = {}
    description = ""
    if isinstance(declared, inspect.Metadata):
        extra = declared.extra or {}
        description = str((declared.extra_json_schema or {}).get("description", ""))
        declared = declared.type
    return Key(
        section=section,
        name=field.name,
        hint=hint,
        type=declared,
        description=description,
        allowed=extra.get("allowed") or _allowed(declared),
        default=field.default,
        default_text=extra.get("default"),
    )


def _allowed(declared: inspect.Type) -> str:
    match declared:
        case inspect.IntType() | inspect.FloatType():
            noun = "a whole number" if isinstance(declared, inspect.IntType) else "a number"
            if declared.ge is None:
                return noun
            return f"{noun} from {declared.ge:,}" + ("" if declared.le is None else f" to {declared.le:,}")
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType():
            return "text"
        case inspect.LiteralType():
            return "one of " + ", ".join(str(value) for value in declared.values)
        case inspect.VarTupleType():
            return "a list of text"
        case inspect.UnionType():
            return next(_allowed(member) for member in declared.types if not isinstance(member, inspect.NoneType))
        case inspect.CustomType() if declared.cls is Path:
            return "a path"
        case _:
            raise TypeError(f"a configuration key cannot have the type {declared!r}")


def _from_text(key: Key, text: str) -> object:
    """Environment text as the type of `key`; text that does not fit stays text and is refused by the conversion."""
    match key.type:
        case inspect.IntType():
            return _attempt(int, text)
        case inspect.FloatType():
            return _attempt(float, text)
        case inspect.BoolType():
            return {"true": True, "1": True, "yes": True, "on": True}.get(
                text.lower(), {"false": False, "0": False, "no": False, "off": False}.get(text.lower(), text)
            )
        case inspect.VarTupleType():
            if text.lstrip().startswith("["):
                return _attempt(json.loads, text)
            return [item.strip() for item in text.split(",") if item.strip()]
        case _:
            return text


def _attempt(parse: Callable[[str], object], text: str) -> object:
    try:
        return parse(text)
    except (ValueError, RecursionError):
        return text


def _absolute(text: str, origin: Origin) -> Path:
    return origin.directory / text


def _is_custom(declared: inspect.Type, cls: type) -> bool:
    members = declared.types if isinstance(declared, inspect.UnionType) else (declared,)
    return any(isinstance(member, inspect.CustomType) and member.cls is cls for member in members)


def _shown(value: object) -> str:
    """A value for an error message: quoted, on one line, short."""
    if isinstance(value, dict):
        return "a table"
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 2] + "…" + text[-1]
