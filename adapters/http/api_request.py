"""A request as the operations see it: its service, its caller, its decoded body and query.

The guard runs before every operation, and before a byte of the body is read: it looks the operation's access up
(access.py), authenticates, spends an allowance, and leaves the caller on the request. An operation that asks for a
caller of the other kind is our bug, and fails loudly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, assert_never, cast

import msgspec
from litestar.connection import ASGIConnection
from litestar.connection import Request as LitestarRequest
from litestar.handlers import BaseRouteHandler
from litestar.response import Response

from adapters.http.access import ACCESS, DeviceOr, Public
from adapters.http.allowances import Allowances
from adapters.http.authentication import (
    Authentication,
    DeviceEvidence,
    Operator,
    Presented,
    enrolment_secret,
    presented,
)
from adapters.http.bodies import decode, decode_query, media_type
from adapters.http.device_sessions import Connection, DeviceSessions
from adapters.http.errors import BasicRequired, BodyTooLarge
from registry.core import Registry
from registry.errors import InvalidArgument, PermissionDenied, Unauthenticated
from registry.model import Contact, RenewalRight, Transport
from registry.permissions import Permission
from registry.secrets import Secret
from registry.sessions import Session

if TYPE_CHECKING:
    from adapters.http.app import HttpApiSettings
    from adapters.http.events import Streams
    from adapters.http.intake import Intake

T = TypeVar("T")

OPERATOR: Final = "gatehouse.operator"
SESSION: Final = "gatehouse.session"
ENROLMENT: Final = "gatehouse.enrolment"
RIGHT: Final = "gatehouse.renewal_right"
CLEANUP: Final = "gatehouse.cleanup"
HEAD: Final = "gatehouse.head"
MAX_BODY: Final = "gatehouse.max_body"

Cleanup = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Service:
    """What the operations work with."""

    registry: Registry
    settings: HttpApiSettings
    allowances: Allowances
    authentication: Authentication
    sessions: DeviceSessions
    intake: Intake
    streams: Streams


class ApiRequest(LitestarRequest[Any, Any, Any]):
    """Litestar's request with the caller and the decoders of this API."""

    @property
    def service(self) -> Service:
        """What the application was made with."""
        return cast(Service, self.app.state["service"])

    @property
    def registry(self) -> Registry:
        """The core."""
        return self.service.registry

    @property
    def correlation_id(self) -> str:
        """Joins this request with its answer, its events and its log lines."""
        return cast(str, self.scope["state"]["correlation_id"])

    @property
    def operator(self) -> Operator:
        """The operator whom the guard has let in."""
        return cast(Operator, cast(Any, self.scope)[OPERATOR])

    @property
    def is_of_operator(self) -> bool:
        """Whether it is an operator whom the guard has let in, where both kinds may call."""
        return OPERATOR in cast(Any, self.scope)

    @property
    def device_session(self) -> Session:
        """The session of the device that the guard has let in."""
        return cast(Session, cast(Any, self.scope)[SESSION])

    @property
    def enrolment_secret(self) -> Secret[str]:
        """The password that came with HTTP Basic; nobody has judged it yet."""
        return cast("Secret[str]", cast(Any, self.scope)[ENROLMENT])

    @property
    def renewal_right(self) -> RenewalRight:
        """What the connection's certificate may ask for."""
        return cast(RenewalRight, cast(Any, self.scope)[RIGHT])

    @property
    def connection(self) -> Connection | None:
        """The TLS connection below, where the server is ours."""
        extensions = self.scope.get("extensions") or {}
        return cast("Connection | None", extensions.get("gatehouse.connection"))

    @property
    def address(self) -> str:
        """The peer's address, without its port."""
        client = self.scope.get("client")
        return client[0] if client else ""

    @property
    def contact(self) -> Contact:
        """Where the request comes from."""
        return Contact(Transport.HTTPS, self.address, self.correlation_id)

    def presented(self) -> Presented | None:
        """The credential that comes with it. Raises Unauthenticated for more than one."""
        connection = self.connection
        return presented(self.scope["headers"], connection.peer_certificate_der if connection is not None else None)

    def on_end(self, cleanup: Cleanup) -> None:
        """Do something when the request is over, however it ends."""
        cast(list[Cleanup], cast(Any, self.scope)[CLEANUP]).append(cleanup)

    async def body(self) -> bytes:
        """The whole body. Raises BodyTooLarge, and InvalidArgument where the peer left before its end."""
        parts: list[bytes] = []
        size, most = 0, cast(Any, self.scope).get(MAX_BODY, self.service.settings.max_body_bytes)
        announced = next((value for name, value in self.scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > most:
            raise self._too_large(most)
        while True:
            message = await self.receive()
            if message["type"] != "http.request":
                raise InvalidArgument("the body ended early")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise self._too_large(most)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self, most: int) -> BodyTooLarge:
        self.service.allowances.counters.body += 1
        return BodyTooLarge(f"the body is larger than the {most} bytes that are allowed")

    @property
    def is_head(self) -> bool:
        """Whether only the head of the answer is wanted; the operation is asked as by GET."""
        return bool(cast(Any, self.scope).get(HEAD))

    async def decoded(self, model: type[T]) -> T:
        """The JSON body. Raises InvalidArgument (400, 415)."""
        media_type(self.scope["headers"])
        return decode(await self.body(), model)

    async def decoded_or(self, default: T) -> T:
        """The JSON body, or `default` where there is none."""
        raw = await self.body()
        if not raw:
            return default
        media_type(self.scope["headers"])
        return decode(raw, type(default))

    def asked(self, model: type[T]) -> T:
        """The query. Raises InvalidArgument."""
        return decode_query(self.scope["query_string"], model)


async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Litestar's guard of every route."""
    request = cast(ApiRequest, connection)
    if request.method == "OPTIONS":
        return  # tells the methods of a path, which the document tells everybody
    operation_id = getattr(handler, "operation_id", None)
    access = ACCESS.get(operation_id) if isinstance(operation_id, str) else None
    if isinstance(access, Public) and access is not Public.DEVICE:
        # Nobody has been recognised before such a body is read, so it costs its sender nothing to begin many.
        cast(Any, request.scope)[MAX_BODY] = request.service.settings.open_body_bytes
    match access:
        case None:
            raise PermissionDenied("no rule allows this operation")
        case Public.OPEN:
            request.service.allowances.spend_open(request.address)
        case Public.CLAIM:
            request.service.allowances.spend_provisioning(request.address)
        case Public.ENROLMENT:
            request.service.allowances.spend_provisioning(request.address)
            _keep_secret(request)
        case Public.RENEWAL:
            try:
                await _keep_right(request)
            except Unauthenticated as refused:
                request.service.allowances.spend_failure(request.address)
                raise BasicRequired(refused.reason) from None
        case Public.DEVICE | Permission() | DeviceOr():
            try:
                await _authenticate(request, access)
            except Unauthenticated:
                request.service.allowances.spend_failure(request.address)
                raise
        case _:
            assert_never(access)


def _keep_secret(request: ApiRequest) -> None:
    try:
        try:
            cast(Any, request.scope)[ENROLMENT] = enrolment_secret(request.scope["headers"])
        except Unauthenticated as refused:
            request.service.authentication.refuse(refused.reason, request.contact)
    except Unauthenticated as refused:
        raise BasicRequired(refused.reason) from None


async def _keep_right(request: ApiRequest) -> None:
    connection = request.connection
    certificate = connection.peer_certificate_der if connection is not None else None
    cast(Any, request.scope)[RIGHT] = await request.service.authentication.renewal_right(certificate, request.contact)


async def _authenticate(request: ApiRequest, access: Public | Permission | DeviceOr) -> None:
    service, contact = request.service, request.contact
    try:
        credential = request.presented()
    except Unauthenticated as refused:
        service.authentication.refuse(refused.reason, contact)
    if isinstance(access, DeviceOr):
        access = Public.DEVICE if isinstance(credential, DeviceEvidence) else access.permission
    if isinstance(access, Permission):
        operator = await service.authentication.operator(credential, access, contact)
        if request.connection is not None:
            request.connection.recognised = True
            request.connection.spare_answer()
        cast(Any, request.scope)[OPERATOR] = operator
        return
    evidence = await service.authentication.device_evidence(credential, contact)
    if request.connection is not None:
        session = await service.sessions.on_connection(request.connection, evidence, contact)
    else:
        session = await service.sessions.for_request(evidence, contact)

        async def end() -> None:
            service.sessions.ended(session)

        request.on_end(end)
    identity = session.identity
    service.allowances.spend(identity.tenant_id, identity.credential_id, asyncio.get_running_loop().time())
    cast(Any, request.scope)[SESSION] = session


def answer(status: int, body: msgspec.Struct) -> Response[bytes]:
    """An answer whose JSON is `body`."""
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")
