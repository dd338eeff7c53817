"""The HTTPS API as one ASGI application, and the hot handler beside it.

    server ─► HttpApi.asgi ── correlation id, HEAD, common headers, clean-up ──► Litestar ─► guard ─► operation
          └─► HttpApi.hot (intake.py): POSTs of uplinks and telemetry, past the router

Litestar routes, guards and maps exceptions (errors.py). Bodies, queries and the OpenAPI document are of one set of
types (operations.py). The application has no state but what it is given: limits, open streams, sessions on connections.

What can race is said where it happens: device_sessions.py, events.py, intake.py. A request whose peer is gone finishes
what it has begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, cast

from litestar import Litestar, Router
from litestar.datastructures import State
from litestar.handlers import HTTPRouteHandler
from litestar.response import Response

from adapters.http import (
    audit,
    ca,
    certificates,
    children,
    commands,
    credentials,
    device_config,
    devices,
    docs,
    est,
    events,
    profiles,
    provision,
    registration_tokens,
    sessions,
    templates,
    uplinks,
)
from adapters.http.allowances import LOOK_UPS_PER_FAILURE, Allowances
from adapters.http.api_request import CLEANUP, HEAD, ApiRequest, Cleanup, Service, guard
from adapters.http.authentication import Authentication
from adapters.http.device_sessions import DeviceSessions
from adapters.http.errors import allowed, handle
from adapters.http.events import Streams
from adapters.http.exchange import AsgiApp, Message, Scope
from adapters.http.intake import Intake, Observer
from adapters.http.openapi import document
from adapters.http.operations import BASE, Operation
from adapters.http.tracing import COMMON_HEADERS, HEADER, correlation_id_of
from adapters.provisioning import Endpoint
from registry.core import Registry
from registry.payloads import MAX_PAYLOAD_BYTES
from registry.rate_limits import RateLimiter

_ROUTES: Final[tuple[HTTPRouteHandler, ...]] = (
    *provision.ROUTES,
    *templates.ROUTES,
    *profiles.ROUTES,
    *devices.ROUTES,
    *credentials.ROUTES,
    *registration_tokens.ROUTES,
    *certificates.ROUTES,
    *uplinks.ROUTES,
    *commands.ROUTES,
    *device_config.ROUTES,
    *children.ROUTES,
    *sessions.ROUTES,
    *events.ROUTES,
    *audit.ROUTES,
    *ca.ROUTES,
)
_EST_ROUTES: Final[tuple[HTTPRouteHandler, ...]] = est.ROUTES
_MQTT: Final = Endpoint("localhost", 8883)
_COAP: Final = Endpoint("localhost", 5684)


@dataclass(frozen=True, slots=True)
class HttpApiSettings:
    """The API's own limits; edge/config.py gives their reasons. Rates are per second and per node."""

    tenant_requests_per_second: float = 10_000.0
    tenant_requests_burst: float = 20_000
    key_requests_per_second: float = 2_000.0
    key_requests_burst: float = 10_000
    provisioning_attempts_per_second: float = 100.0
    provisioning_attempts_burst: float = 1_000
    open_requests_per_second: float = 100.0
    """Requests without a credential from one address: the document, its page, and the CA's chain."""
    open_requests_burst: float = 2_000
    failed_authentications_per_second: float = 10.0
    """From one address; beyond it failures are told to slow down. Good credentials are not held up."""
    failed_authentications_burst: float = 500
    """A whole site whose keys have just been revoked comes back at once, and is told the truth."""
    sse_streams: int = 1_000
    sse_streams_per_tenant: int = 100
    rotation_overlap_seconds: int = 86_400
    max_body_bytes: int = 1_048_576
    open_body_bytes: int = 32_768
    """Of operations that need no credential before their body: claims, tokens, enrolment."""
    uplink_payload_bytes: int = MAX_PAYLOAD_BYTES
    mqtt: Endpoint = _MQTT
    coap: Endpoint = _COAP


@dataclass(frozen=True, slots=True)
class HttpApi:
    """What the server is given: the application, and the hot handler."""

    asgi: AsgiApp
    hot: Intake
    service: Service


class _NobodyWatches:
    """The observer of an application that is not watched."""

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        del route, method, status, seconds


def create_app(registry: Registry, settings: HttpApiSettings, observer: Observer | None = None) -> HttpApi:
    """The application over a registry. Belongs to the event loop that it is used on."""
    observer = observer or _NobodyWatches()
    look_ups = LOOK_UPS_PER_FAILURE * settings.failed_authentications_per_second
    allowances = Allowances(
        tenant=RateLimiter(settings.tenant_requests_per_second, settings.tenant_requests_burst),
        credential=RateLimiter(settings.key_requests_per_second, settings.key_requests_burst),
        operator_tenant=RateLimiter(settings.tenant_requests_per_second, settings.tenant_requests_burst),
        operator=RateLimiter(settings.key_requests_per_second, settings.key_requests_burst),
        provisioning=RateLimiter(settings.provisioning_attempts_per_second, settings.provisioning_attempts_burst),
        address=RateLimiter(settings.open_requests_per_second, settings.open_requests_burst),
        failures=RateLimiter(settings.failed_authentications_per_second, settings.failed_authentications_burst),
        look_ups=RateLimiter(look_ups, max(1.0, look_ups)),
    )
    authentication = Authentication(registry, allowances)
    device_sessions = DeviceSessions(registry, authentication)
    intake = Intake(
        registry,
        device_sessions,
        authentication,
        allowances,
        observer,
        max_payload_bytes=settings.uplink_payload_bytes,
    )
    service = Service(
        registry=registry,
        settings=settings,
        allowances=allowances,
        authentication=authentication,
        sessions=device_sessions,
        intake=intake,
        streams=Streams(total=settings.sse_streams, per_tenant=settings.sse_streams_per_tenant),
    )
    pages = docs.routes(document(operations()))
    litestar = Litestar(
        route_handlers=[
            Router(BASE, route_handlers=[*_options(_ROUTES), *_ROUTES]),
            Router(est.BASE, route_handlers=[*_options(_EST_ROUTES), *_EST_ROUTES]),
            *_options(pages),
            *pages,
        ],
        request_class=ApiRequest,
        guards=[guard],
        exception_handlers={Exception: handle},
        openapi_config=None,
        logging_config=None,
        debug=False,
        pdb_on_exception=False,
        request_max_body_size=None,
        state=State({"service": service}, deep_copy=False),
    )
    return HttpApi(_Front(cast(AsgiApp, litestar), observer), intake, service)


def operations() -> list[Operation]:
    """Every operation, in the order of the document."""
    return [cast(Operation, route.opt["operation"]) for route in (*_ROUTES, *_EST_ROUTES)]


def _options(routes: Iterable[HTTPRouteHandler]) -> list[HTTPRouteHandler]:
    """What answers OPTIONS on the paths of `routes`. Litestar's own would tell the first method of each path only."""
    methods: dict[str, set[str]] = {}
    for route in routes:
        for path in route.paths:
            methods.setdefault(path, set()).update(route.http_methods)
    return [_options_of(path, allowed(served)) for path, served in methods.items()]


def _options_of(path: str, methods: str) -> HTTPRouteHandler:
    @HTTPRouteHandler(path, http_method="OPTIONS", include_in_schema=False, sync_to_thread=False)
    def options() -> Response[None]:
        return Response(None, status_code=204, headers={"allow": methods})

    return options


class _Front:
    """What happens to every request, whichever operation it asks for."""

    def __init__(self, app: AsgiApp, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        method = scope["method"]
        cleanup: list[Cleanup] = []
        correlation_id = correlation_id_of(scope["headers"])
        scope.setdefault("state", {})["correlation_id"] = correlation_id
        scope[CLEANUP] = cleanup
        if method == "HEAD":  # RFC 9110 §9.3.2: as GET, without the body
            scope["method"], scope[HEAD] = "GET", True
        outgoing = _Outgoing(send, correlation_id, without_body=method == "HEAD")
        try:
            await self._app(scope, receive, outgoing)
        finally:
            for each in cleanup:
                await each()
            route = scope.get("path_template") or ""
            self._observer.http_answered(route, method, outgoing.status, loop.time() - began)


class _Outgoing:
    """Adds to an answer's head what every answer has, and keeps its status."""

    __slots__ = ("_correlation_id", "_send", "_without_body", "status")

    def __init__(self, send: Callable[[Message], Awaitable[None]], correlation_id: str, *, without_body: bool) -> None:
        self._send = send
        self._correlation_id = correlation_id
        self._without_body = without_body
        self.status = 0
        """0 until an answer has begun."""

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (HEADER, self._correlation_id.encode())]
            named = {name.lower() for name, _ in headers}
            headers += [header for header in COMMON_HEADERS if header[0] not in named]
            message = {**message, "headers": headers}
        elif self._without_body:
            message = {**message, "body": b""}
        await self._send(message)
