"""Errors as CoAP tells them: the one place that maps the core's codes to response codes (RFC 7252 §5.9, §12.1.2).

    INVALID_ARGUMENT, FAILED_PRECONDITION 4.00   UNAUTHENTICATED 4.01   PERMISSION_DENIED 4.03   NOT_FOUND 4.04
    payload too large 4.13 with Size1            ALREADY_EXISTS 4.09 (RFC 8132 §2.3.2.1)        INTERNAL 5.00
    RESOURCE_EXHAUSTED 4.29 (RFC 8516), UNAVAILABLE 5.03 (RFC 7252 §5.9.3.4): with Max-Age, when to try again

The diagnostic payload (§5.5.2) is the core's message, which may be shown to anybody, and the correlation id, by which
the operator finds the exact reason. 4.12 is for If-Match alone, so a failed precondition of the core is 4.00, as it is
400 over HTTP.
"""

from __future__ import annotations

from math import ceil
from typing import Final

from aiocoap.numbers.codes import Code

from adapters.coap.ports import Response
from registry.errors import ErrorCode, RegistryError
from registry.payloads import PayloadTooLarge

TRY_AGAIN_SECONDS: Final = 5.0
"""What Max-Age says where the core knows no time: the message layer's own for a burst."""
MAX_DIAGNOSTIC: Final = 512
"""Bytes of a diagnostic payload: it fits one datagram of any network, and nobody needs more to understand."""

_CODES: Final = {
    ErrorCode.INVALID_ARGUMENT: Code.BAD_REQUEST,
    ErrorCode.FAILED_PRECONDITION: Code.BAD_REQUEST,
    ErrorCode.UNAUTHENTICATED: Code.UNAUTHORIZED,
    ErrorCode.PERMISSION_DENIED: Code.FORBIDDEN,
    ErrorCode.NOT_FOUND: Code.NOT_FOUND,
    ErrorCode.ALREADY_EXISTS: Code.CONFLICT,
    ErrorCode.RESOURCE_EXHAUSTED: Code.TOO_MANY_REQUESTS,
    ErrorCode.UNAVAILABLE: Code.SERVICE_UNAVAILABLE,
    ErrorCode.INTERNAL: Code.INTERNAL_SERVER_ERROR,
}
_LATER: Final = frozenset({ErrorCode.RESOURCE_EXHAUSTED, ErrorCode.UNAVAILABLE})


class Unserved(Exception):
    """A request that CoAP itself refuses before the core is asked: its method, its format, its path."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def not_found() -> Unserved:
    """No resource of this path."""
    return Unserved(Code.NOT_FOUND, "no such resource; /.well-known/core lists those that there are")


def error_response(error: RegistryError | Unserved, correlation_id: str) -> Response:
    """The answer to a request that failed."""
    if isinstance(error, Unserved):
        return Response(error.code, _diagnostic(error.message, correlation_id))
    if isinstance(error, PayloadTooLarge):
        told = _diagnostic(error.message, correlation_id)
        return Response(Code.REQUEST_ENTITY_TOO_LARGE, told, size1=error.limit)  # RFC 7959 §2.9.3
    max_age = None
    if error.code in _LATER:
        max_age = max(1, ceil(TRY_AGAIN_SECONDS if error.retry_after is None else error.retry_after))
    return Response(_CODES[error.code], _diagnostic(error.message, correlation_id), max_age=max_age)


def _diagnostic(message: str, correlation_id: str) -> bytes:
    told = message.encode()[: MAX_DIAGNOSTIC - len(correlation_id) - 3].decode(errors="ignore")
    return f"{told} ({correlation_id})".encode()
