"""Operations: what the API offers, said once, for the router and for the OpenAPI document alike.

An `Operation` names its path, its bodies and its answers; `operation(...)` makes Litestar's route of a function and
hangs the `Operation` on it. Who may call it stands in access.py under its `operation_id`; one without a line there is
refused. The document (openapi.py) is written from these values, and the bodies are decoded by the very types that the
document describes, so the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from litestar.handlers import HTTPRouteHandler

from registry.model import Json

BASE: Final = "/api/v1"

Method = Literal["GET", "POST", "PUT", "DELETE"]
Handler = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Media:
    """A body that is not JSON of a declared type."""

    media_type: str
    schema: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Reply:
    """A successful answer. `body` is the type of its JSON, a `Media`, or None for an empty one."""

    description: str
    body: Any = None
    example: Json = None
    other_bodies: tuple[Media, ...] = ()
    """Other types of the same answer, for who accepts them."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that can be asked of the API."""

    method: Method
    path: str
    """Below `base`, with `{names}` for its parameters."""
    operation_id: str
    summary: str
    tag: str
    replies: Mapping[int, Reply]
    body: type | Media | None = None
    """The type that the request's JSON is decoded by; None for a request without a body."""
    body_media: tuple[str, ...] = ("application/json",)
    other_bodies: tuple[Media, ...] = ()
    """Bodies that are taken instead of `body`."""
    body_required: bool = True
    body_example: Json = None
    query: type | None = None
    """A Struct of the query's parameters."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Request headers that it looks at, beside those of authentication, with what they mean."""
    refusals: tuple[int, ...] = ()
    """Statuses of errors beside those that follow from its kind: 409, or 403 of an open route."""
    description: str = ""
    base: str = BASE
    """What the path stands below."""


def operation(operation: Operation) -> Callable[[Handler], HTTPRouteHandler]:
    """Make a route of a function. It takes the `request` and the path's parameters by name, as text."""
    path = operation.path
    for name in path_parameters(path):
        path = path.replace(f"{{{name}}}", f"{{{name}:str}}")
    return HTTPRouteHandler(
        path,
        http_method=operation.method,
        status_code=min(operation.replies),
        operation_id=operation.operation_id,
        opt={"operation": operation},
        include_in_schema=False,
    )


def path_parameters(path: str) -> list[str]:
    """The names in a path."""
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]
