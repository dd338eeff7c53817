"""The id that joins a request with its answer, its events, its audit rows and its log lines; what every answer says.

A client may bring its own id as `X-Correlation-ID`: 8 to 64 of A–Z a–z 0–9 _ and -, anything else is ignored, and so
is a secret of ours, because the id goes into logs and events. Otherwise it is 16 random bytes as 32 hexadecimal digits.
It comes back in the header of that name and in every error's body.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Final

from registry import secrets

HEADER: Final = b"x-correlation-id"

COMMON_HEADERS: Final[tuple[tuple[bytes, bytes], ...]] = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
)
"""Answers are about one caller, some hold a secret that is shown once, and none is to be taken for another type."""

_OWN: Final = re.compile(rb"[A-Za-z0-9_-]{8,64}")


def correlation_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's id if it has an acceptable one, or a new one."""
    return own_correlation_id(headers) or new_correlation_id()


def own_correlation_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The client's id if it has an acceptable one."""
    for name, value in headers:
        if name == HEADER and _OWN.fullmatch(value) is not None and not secrets.holds_one(value.decode()):
            return value.decode()
    return None


def new_correlation_id() -> str:
    """One that nobody else has."""
    return os.urandom(16).hex()
