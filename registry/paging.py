"""Pages of a list, and the cursor that leads to the next one.

Theory. A list is walked by key, not by offset: the cursor holds the sort key of the last item shown, and the next page
begins behind it. Rows that come or go between two pages shift nothing: an item that exists during the whole walk is
shown exactly once.

A cursor is opaque to its holder but no secret and no authority: it says where to go on, never whose rows. Every query
names its tenant itself, so a cursor of another tenant, or a forged one, shows nothing that its holder may not see. It
is checked for its shape and its types all the same, because its values go into SQL parameters: anything that
`encode_cursor` would not have written is an InvalidArgument.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar, overload
from uuid import UUID

import msgspec

from registry.errors import InvalidArgument

T = TypeVar("T")
A = TypeVar("A", str, int, datetime, UUID)
B = TypeVar("B", str, int, datetime, UUID)
C = TypeVar("C", str, int, datetime, UUID)

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1000
"""Items of one page: a thousand devices are a few MiB at most in practice, and a few milliseconds of SQL."""

MAX_CURSOR: Final = 1024
"""Characters. The longest of ours is a time and a text of 128 characters, in base64."""

CursorValue = str | int | datetime | UUID


@dataclass(frozen=True, slots=True)
class Page:
    """What a caller asks for: at most `limit` items (1 … 1,000) behind `cursor`. Raises InvalidArgument."""

    limit: int = DEFAULT_LIMIT
    cursor: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= MAX_LIMIT:
            raise InvalidArgument(f"limit is {self.limit}; 1 to {MAX_LIMIT} are allowed", field="limit")


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """A page of items. `next_cursor` is None when there are no more."""

    items: list[T]
    next_cursor: str | None


def listing(rows: Sequence[T], page: Page, key: Callable[[T], tuple[CursorValue, ...]]) -> Listing[T]:
    """The page made of `rows`, which were asked for with a limit of `page.limit + 1`: the surplus one tells of more."""
    items = list(rows[: page.limit])
    more = len(rows) > page.limit
    return Listing(items, encode_cursor(*key(items[-1])) if more else None)


def encode_cursor(*values: CursorValue) -> str:
    """A cursor that holds the sort key of the last item shown."""
    return base64.urlsafe_b64encode(msgspec.json.encode([_plain(v) for v in values])).rstrip(b"=").decode()


@overload
def decode_cursor(text: str, one: type[A], /) -> tuple[A]: ...
@overload
def decode_cursor(text: str, one: type[A], two: type[B], /) -> tuple[A, B]: ...
@overload
def decode_cursor(text: str, one: type[A], two: type[B], three: type[C], /) -> tuple[A, B, C]: ...
def decode_cursor(text: str, /, *types: Any) -> tuple[Any, ...]:
    """The values of a cursor, which must be of these types (str, int, datetime, UUID). Raises InvalidArgument."""
    if len(text) > MAX_CURSOR or not text.isascii():
        raise _refused()
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        plain = msgspec.json.decode(raw, type=list[str | int])
    except (ValueError, binascii.Error, msgspec.MsgspecError, RecursionError):
        raise _refused() from None
    if len(plain) != len(types):
        raise _refused()
    values = tuple(_typed(value, wanted) for value, wanted in zip(plain, types, strict=True))
    if encode_cursor(*values) != text:
        raise _refused()  # another spelling of the same values: not ours
    return values


def _plain(value: CursorValue) -> str | int:
    match value:
        case datetime():
            return value.astimezone(UTC).isoformat()
        case UUID():
            return value.hex
        case _:
            return value


def _typed(value: str | int, wanted: type) -> CursorValue:
    try:
        if wanted is datetime and isinstance(value, str):
            at = datetime.fromisoformat(value)
            return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
        if wanted is UUID and isinstance(value, str):
            return UUID(value)
    except (ValueError, OverflowError):
        raise _refused() from None
    if wanted is str and isinstance(value, str) and "\x00" not in value:
        return value
    if wanted is int and isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    raise _refused()


def _refused() -> InvalidArgument:
    return InvalidArgument(
        "cursor is not one that this list gave; leave it out to begin at the first page", field="cursor"
    )
