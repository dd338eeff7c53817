"""The short way of the few requests that make most of the traffic: no task, no scope, and a known head is not parsed.

Theory. A hot request is small and came whole; its handler answers at once or promises to. Devices repeat themselves, so
a connection keeps the first few heads of hot requests that came whole in one read. When a read between two requests
begins with the very bytes of such a head and ends with the body that it announces, the parser need not see it: llhttp
keeps nothing from one message to the next, so the same bytes would mean the same again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from adapters.http.answer import Answer
from adapters.http.request import Head

if TYPE_CHECKING:
    from adapters.http.connection import HttpConnection

_KNOWN_HEADS: Final = 4  # on a connection: one for each length of a device's bodies, as these differ by a digit or two
_KNOWN_HEAD_BYTES: Final = 1_024  # a device's head has 300
_END: Final = b"\r\n\r\n"


class Later(msgspec.Struct, frozen=True):
    """An answer that waits for `future`: `answer(future)` makes it, when that is done and not cancelled."""

    future: asyncio.Future[Any]
    answer: Callable[[asyncio.Future[Any]], Answer]


class HotHandler(Protocol):
    """A short way past ASGI for the few requests that make most of the traffic."""

    def accepts(self, method: str, path: str) -> bool:
        """Whether `handle` wants requests of this kind (asked when the head is complete)."""

    def handle(self, connection: HttpConnection, head: Head, body: bytes) -> Answer | Later | Awaitable[Answer]:
        """Answer now, or promise an answer.

        Runs inside the read callback, so it must not block. Header names are lower case. The head may be served again:
        only its `meaning` may be set. An exception becomes a 500. `Later` costs the least, an awaitable a task.
        """


@dataclass(slots=True)
class HotRequest:
    """A complete request for the hot handler."""

    head: Head
    body: bytes


class KnownHeads:
    """Those of one connection, by their bytes."""

    __slots__ = ("_heads",)

    def __init__(self) -> None:
        self._heads: dict[bytes, Head] = {}

    def __len__(self) -> int:
        return len(self._heads)

    @property
    def full(self) -> bool:
        """Whether no further head is kept."""
        return len(self._heads) >= _KNOWN_HEADS

    def keep(self, read: bytes, head: Head) -> None:
        """Know this head again, if what was read is it and its body, and nothing else."""
        end = read.find(_END) + len(_END)
        whole = len(read) - end == head.length
        if whole and end <= _KNOWN_HEAD_BYTES and head.keep_alive and not head.expects_continue:
            self._heads[read[:end]] = head

    def request_in(self, read: bytes) -> HotRequest | None:
        """The whole request that was read, if its head is known and nothing else came with it."""
        end = read.find(_END, 0, _KNOWN_HEAD_BYTES) + len(_END)
        head = self._heads.get(read[:end])
        if head is None or len(read) - end != head.length:
            return None
        return HotRequest(head, read[end:])
