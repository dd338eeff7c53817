"""Whole answers as bytes: those of the hot path, and the refusals made below the application.

Theory
------
A value here is complete before its first byte leaves, so it always has a Content-Length and one write. A refusal always
ends its connection: after malformed or oversized input nobody can say where the next request would begin.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from enum import Enum
from http import HTTPStatus
from typing import Final

import msgspec

HeaderList = tuple[tuple[bytes, bytes], ...]

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES: Final = {status: _status_line(status) for status in range(200, 600)}


class Code(Enum):
    """The error codes that are used below the application."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A complete response. `body` is JSON unless `headers` names another content-type.

    `headers` must be lower case and without framing (content-length, connection, transfer-encoding, date).
    """

    status: int
    body: bytes = b""
    headers: HeaderList = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that ends the connection. `message` says what was and what is allowed, and quotes no input; `headers`
    are as an `Answer`'s."""

    status: int
    code: Code
    message: str
    retry_after: int | None = None
    headers: HeaderList = ()

    def answer(self, correlation_id: str) -> Answer:
        """The refusal in the shape that every error of the API has."""
        document = {"code": self.code.value, "message": self.message, "correlation_id": correlation_id}
        headers = self.headers
        if self.retry_after is not None:
            headers = (*headers, (b"retry-after", str(self.retry_after).encode()))
        return Answer(self.status, json.dumps(document).encode(), headers)


class DateLine:
    """The Date header line, made once a second (RFC 9110 §6.6.1). `wall_clock` gives Unix seconds."""

    __slots__ = ("_clock", "_line", "_second")

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._clock = wall_clock
        self._second = -1
        self._line = b""

    def __call__(self) -> bytes:
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._line = b"date: " + formatdate(second, usegmt=True).encode() + b"\r\n"
        return self._line


def render(answer: Answer, date_line: bytes, *, keep_alive: bool, head_only: bool = False) -> bytes:
    """The answer on the wire. `head_only` leaves the body out, as HEAD asks."""
    body = answer.body
    parts = [STATUS_LINES[answer.status], date_line]
    typed = not body
    for name, value in answer.headers:
        typed = typed or name == b"content-type"
        parts += (name, b": ", value, b"\r\n")
    if not typed:
        parts.append(b"content-type: application/json\r\n")
    if answer.status != 204:  # RFC 9110 §8.6: no Content-Length with 204
        parts.append(b"content-length: %d\r\n" % len(body))
    parts.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
    if not head_only:
        parts.append(body)
    return b"".join(parts)
