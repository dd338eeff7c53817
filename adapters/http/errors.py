"""The one place where whatever went wrong becomes an answer: `{"code", "message", "correlation_id"}`.

    RegistryError ──┐
    Litestar's own ─┼─► problem_of ─► Problem ─► answer (status, headers, body)
    anything else ──┘                  └ 500 without detail; the traceback goes to the log under the correlation id

Statuses are gRPC's HTTP mapping of the codes (CONTRACT §2). Some statuses say more than a code can and keep it beside
them: 405 (with Allow), 408, 413 and 415 are INVALID_ARGUMENT. A path without a route is NOT_FOUND. The caller of an
unauthenticated request learns nothing but that; the reason is in the log and in the device's timeline.

Pure, but for the log of what nobody expected. Nothing secret is in a RegistryError's message (registry/errors.py), and
texts of the peer that a message repeats are cut and leave as JSON, which escapes what could break a line.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import msgspec
from litestar.exceptions import HTTPException
from litestar.response import Response

from adapters.http.answer import Answer, HeaderList
from registry.errors import ErrorCode, FailedPrecondition, InvalidArgument, RegistryError, Unauthenticated

log = logging.getLogger(__name__)

STATUS: Final[Mapping[ErrorCode, int]] = MappingProxyType(
    {
        ErrorCode.INVALID_ARGUMENT: 400,
        ErrorCode.FAILED_PRECONDITION: 400,
        ErrorCode.UNAUTHENTICATED: 401,
        ErrorCode.PERMISSION_DENIED: 403,
        ErrorCode.NOT_FOUND: 404,
        ErrorCode.ALREADY_EXISTS: 409,
        ErrorCode.RESOURCE_EXHAUSTED: 429,
        ErrorCode.INTERNAL: 500,
        ErrorCode.UNAVAILABLE: 503,
    }
)

MAX_MESSAGE: Final = 1000
"""Characters. Longer ones repeat a text of the peer's."""
_LATER_SECONDS: Final = 60.0
"""Retry-After where nobody knows: a full quota is emptied by people, not by waiting a second."""


class UnsupportedMediaType(InvalidArgument):
    """The body's type or coding is not one that the operation takes."""


class BasicRequired(Unauthenticated):
    """Nobody was recognised, where HTTP Basic is the way to say who one is (RFC 7030 §3.2.3)."""


class BodyTooLarge(InvalidArgument):
    """The body is larger than is served."""


class NoMatch(FailedPrecondition):
    """If-Match names another version than there is (RFC 9110 §13.1.1)."""


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What every refusal looks like. `correlation_id` finds the request in the logs, the events and the timeline."""

    code: ErrorCode
    message: str
    correlation_id: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A refusal before it has its correlation id."""

    status: int
    code: ErrorCode
    message: str
    headers: HeaderList = ()


def problem_of(error: Exception) -> Problem:
    """What to tell the caller about any exception."""
    match error:
        case UnsupportedMediaType():
            return Problem(415, error.code, _cut(error.message))
        case NoMatch():
            return Problem(412, error.code, _cut(error.message))
        case BodyTooLarge():
            return Problem(413, error.code, _cut(error.message))
        case RegistryError(code=ErrorCode.INTERNAL):
            return _INTERNAL
        case RegistryError():
            return Problem(STATUS[error.code], error.code, _cut(error.message), _headers(error))
        case HTTPException():
            return _of_litestar(error)
        case _:
            return _INTERNAL


def answer_of(error: Exception, correlation_id: str) -> Answer:
    """The whole answer to a request that failed."""
    problem = problem_of(error)
    if problem.status == 500:
        log.error("http.failed", extra={"fields": {"correlation_id": correlation_id}}, exc_info=error)
    body = ErrorBody(code=problem.code, message=problem.message, correlation_id=correlation_id)
    return Answer(problem.status, msgspec.json.encode(body), problem.headers)


def handle(request: Any, error: Exception) -> Response[bytes]:
    """Litestar's exception handler for everything."""
    answer = answer_of(error, request.scope["state"]["correlation_id"])
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    return Response(answer.body, status_code=answer.status, media_type="application/json", headers=headers)


def allowed(methods: Iterable[str]) -> str:
    """The Allow header of a path that serves `methods`: OPTIONS is served everywhere, HEAD wherever GET is."""
    named = {method for method in methods if method} | {"OPTIONS"}
    return ", ".join(sorted(named | {"HEAD"} if "GET" in named else named))


def invalid_json(error: Exception) -> InvalidArgument:
    """What msgspec, or Python's decoder, has against a body, in a sentence for the caller."""
    match error:
        case RecursionError():
            return InvalidArgument("the body is nested too deep")
        case UnicodeDecodeError():
            return InvalidArgument("the body is not UTF-8")
        case msgspec.ValidationError():
            return invalid_value(error)
        case _:
            return InvalidArgument("the body is not JSON; one JSON value in UTF-8 is allowed")


def invalid_value(error: msgspec.ValidationError, what: str = "the body") -> InvalidArgument:
    """A value that is well-formed and not what the operation takes; names the place."""
    text = str(error)
    unknown = _UNKNOWN_FIELD.match(text)
    if unknown is not None:
        name = _cut(unknown["name"], 100)
        return InvalidArgument(f'{what} has the unknown field "{name}"{unknown["where"]}', field=name)
    place = _PLACE.search(text)
    if place is None:
        return InvalidArgument(f"{what} is refused: {_cut(text)}")
    message, field = text[: place.start()], place["path"]
    return InvalidArgument(f"{_cut(field, 100)} is refused: {_cut(message)}", field=field)


_INTERNAL: Final = Problem(500, ErrorCode.INTERNAL, "internal error")
_UNKNOWN_FIELD: Final = re.compile(
    r"Object contains unknown field `(?P<name>.*?)`(?P<where>(?: - at `.*`)?)\Z", re.DOTALL
)
_PLACE: Final = re.compile(r" - at `(?:key in )?\$\.?(?P<path>.*)`\Z", re.DOTALL)

_BY_STATUS: Final[Mapping[int, ErrorCode]] = MappingProxyType(
    {
        401: ErrorCode.UNAUTHENTICATED,
        403: ErrorCode.PERMISSION_DENIED,
        404: ErrorCode.NOT_FOUND,
        409: ErrorCode.ALREADY_EXISTS,
        429: ErrorCode.RESOURCE_EXHAUSTED,
        503: ErrorCode.UNAVAILABLE,
    }
)


def _of_litestar(error: HTTPException) -> Problem:
    status = error.status_code
    if status >= 500 and status != 503:
        return _INTERNAL
    code = _BY_STATUS.get(status, ErrorCode.INVALID_ARGUMENT)
    match status:
        case 404:
            return Problem(404, code, "there is nothing at this path")
        case 405:
            methods = allowed((error.headers or {}).get("allow", "").split(", "))
            # RFC 9110 §15.5.6: a 405 names what is allowed.
            return Problem(
                405, code, f"the method is not served here; allowed are {methods}", ((b"allow", methods.encode()),)
            )
        case 413:
            return Problem(413, code, "the body is larger than is served")
        case _:
            return Problem(status, code, _cut(error.detail or "the request is not understood"))


def _headers(error: RegistryError) -> HeaderList:
    match error.code:
        case ErrorCode.UNAUTHENTICATED if isinstance(error, BasicRequired):
            return ((b"www-authenticate", b'Basic realm="gatehouse", charset="UTF-8"'),)  # RFC 7617 §2
        case ErrorCode.UNAUTHENTICATED:
            return ((b"www-authenticate", b'Bearer realm="gatehouse"'),)  # RFC 9110 §11.6.1
        case ErrorCode.RESOURCE_EXHAUSTED | ErrorCode.UNAVAILABLE:
            after = _LATER_SECONDS if error.retry_after is None else error.retry_after
            return ((b"retry-after", str(max(1, math.ceil(after))).encode()),)
        case _:
            return ()


def _cut(text: str, most: int = MAX_MESSAGE) -> str:
    return text if len(text) <= most else text[:most] + "…"
