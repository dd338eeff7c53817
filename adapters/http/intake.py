"""What devices send: uplinks and telemetry, from the bytes of a body to the acknowledgement after the commit.

    hot hook ─┬─ handle, all of it ───────────────┐
              └─ _answered ─► own or child? ──────┼─► payload ─► Uplinks.submit ─► commit ─► 202 {uplink_id}
    Litestar ─── uplink/telemetry ─► own or child? ┘

The hot hook takes every POST to these two paths and answers exactly as Litestar's routes do. A request of a session
that this connection has, for its own device, waits for nothing but the commit, so it has no task: `handle` reads and
submits, and the submitted uplink's future makes the answer. Whatever may have to ask the database first is `_answered`.

A device sends for itself, or for a child whose `gateway_id` it is. For anything else it gets NOT_FOUND, whether the
device exists or not (registry/children.py).

The body is JSON or CBOR. `Idempotency-Key` is the `message_id` of a telemetry body, which has no room for one. Nothing
is acknowledged before it is stored; a full queue is UNAVAILABLE with Retry-After.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final, NamedTuple, Protocol
from uuid import UUID

import msgspec
from msgspec import Meta

from adapters.cbor import decode_cbor
from adapters.http.allowances import Allowances
from adapters.http.answer import Answer
from adapters.http.authentication import Authentication, DeviceEvidence, presented
from adapters.http.bodies import CBOR, JSON, decode, media_type, uuid_in_path
from adapters.http.device_sessions import Connection, DeviceSessions, HeaderLines, credential_lines
from adapters.http.errors import answer_of, invalid_value
from adapters.http.hot import Later
from adapters.http.models import Request
from adapters.http.operations import BASE
from adapters.http.request import Head
from adapters.http.tracing import COMMON_HEADERS, HEADER, new_correlation_id, own_correlation_id
from registry.core import Registry
from registry.errors import RegistryError, Unauthenticated
from registry.model import Contact, DeviceId, Json, Transport
from registry.payloads import (
    NewUplink,
    Payload,
    PayloadTooLarge,
    Source,
    payload_from_json,
    payload_from_value,
    telemetry_from,
    uplink_from,
)
from registry.sessions import Session
from registry.uplinks import StoredUplink

UPLINK: Final = BASE + "/devices/{device_id}/uplink"
TELEMETRY: Final = BASE + "/telemetry"
_UPLINK_PREFIX: Final = BASE + "/devices/"
_UPLINK_SUFFIX: Final = "/uplink"
_UPLINK_LENGTH: Final = len(_UPLINK_PREFIX) + 36 + len(_UPLINK_SUFFIX)
_MEDIA: Final = (JSON, CBOR)


Headers = Iterable[tuple[bytes, bytes]]


class Observer(Protocol):
    """Who is told of every answer."""

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """`route` is the template, or empty where there is none; `seconds` from the request to its answer."""
        ...


class UplinkBody(Request, frozen=True, kw_only=True):
    """An uplink. Repeating a `message_id` answers the first one's id and stores nothing."""

    kind: Annotated[str, Meta(pattern="^[a-z][a-z0-9_.-]{0,63}$", examples=["telemetry"])]
    payload: msgspec.Raw
    message_id: Annotated[str, Meta(pattern="^[!-~]{1,128}$")] | None = None
    observed_at: Annotated[datetime, Meta(tz=True)] | None = None


class _CborUplink(Request, frozen=True, kw_only=True):
    """The same with a decoded payload."""

    kind: str
    payload: Any
    message_id: str | None = None
    observed_at: Any = None
    """A time by its tag, or a text; the core reads it."""


class UplinkAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """It is stored, under this id."""

    uplink_id: UUID


@dataclass(slots=True)
class IntakeCounters:
    """What became of uplinks, for the metrics."""

    stored: int = 0
    duplicate: int = 0
    rejected: int = 0
    too_large: int = 0
    """Of the rejected, those above the limit on one payload."""


_Read = Callable[[Source, bytes, str | None, bytes], NewUplink]
"""Source, media type, Idempotency-Key and body make an uplink."""


class _Asked(msgspec.Struct, frozen=True):
    """What a head means here, read once for as often as it comes."""

    route: str
    device_id: str | None
    """The one in the path; None for telemetry, which is always one's own."""
    media: bytes | None
    """None: one that is not served."""
    key: str | None
    correlation_id: str | None
    credentials: HeaderLines


class _Trace(NamedTuple):
    """What an answer is reported with: `began` in loop time."""

    route: str
    began: float
    correlation_id: str


class Intake:
    """Takes uplinks in. `handle` and `accepts` are the server's hot hook (connection.py)."""

    def __init__(
        self,
        registry: Registry,
        sessions: DeviceSessions,
        authentication: Authentication,
        allowances: Allowances,
        observer: Observer,
        *,
        max_payload_bytes: int,
    ) -> None:
        self._registry = registry
        self._sessions = sessions
        self._authentication = authentication
        self._allowances = allowances
        self._observer = observer
        self._max_payload_bytes = max_payload_bytes
        self.counters = IntakeCounters()

    # -- the hot hook ----------------------------------------------------------------------------------------------

    def accepts(self, method: str, path: str) -> bool:
        """Whether `handle` takes such a request."""
        return method == "POST" and (
            path == TELEMETRY
            or (len(path) == _UPLINK_LENGTH and path.endswith(_UPLINK_SUFFIX) and path.startswith(_UPLINK_PREFIX))
        )

    def handle(self, connection: Connection, head: Head, body: bytes) -> Answer | Later | Awaitable[Answer]:
        """Answer one request."""
        asked = head.meaning
        if asked is None:
            head.meaning = asked = _asked(head)
        session = self._sessions.repeated(connection, asked.credentials)
        if session is None or asked.media is None:
            return self._answered(connection, asked, head.headers, body)
        identity = session.identity
        if asked.device_id is not None and asked.device_id != str(identity.device_id):
            return self._answered(connection, asked, head.headers, body)
        trace = _Trace(asked.route, session.last_active, asked.correlation_id or new_correlation_id())
        try:
            self._allowances.spend(identity.tenant_id, identity.credential_id, session.last_active)
            source = Source(identity.tenant_id, identity.device_id, Transport.HTTPS)
            read = self._read_telemetry if asked.device_id is None else self._read_uplink
            future = self._submit(read, source, asked.media, asked.key, body)
        except Exception as error:  # the end of this request, as Litestar's handlers are for theirs
            return self._finish(trace, answer_of(error, trace.correlation_id))
        return Later(future, partial(self._settled, trace))

    def _settled(self, trace: _Trace, stored: asyncio.Future[StoredUplink]) -> Answer:
        try:
            answer = self._acknowledged(stored)
        except Exception as error:  # as above
            answer = answer_of(error, trace.correlation_id)
        return self._finish(trace, answer)

    async def _answered(self, connection: Connection, asked: _Asked, headers: HeaderLines, body: bytes) -> Answer:
        began = asyncio.get_running_loop().time()
        trace = _Trace(asked.route, began, asked.correlation_id or new_correlation_id())
        try:
            session = await self._session(connection, headers, trace.correlation_id)
            self._sessions.remember(connection, asked.credentials, session)
            if asked.device_id is None:
                answer = await self.telemetry(session, headers, body)
            else:
                answer = await self.uplink(session, asked.device_id, headers, body)
        except Exception as error:  # as above
            answer = answer_of(error, trace.correlation_id)
        return self._finish(trace, answer)

    def _finish(self, trace: _Trace, answer: Answer) -> Answer:
        seconds = asyncio.get_running_loop().time() - trace.began
        self._observer.http_answered(trace.route, "POST", answer.status, seconds)
        own = (HEADER, trace.correlation_id.encode())
        return Answer(answer.status, answer.body, (*answer.headers, own, *COMMON_HEADERS))

    async def _session(self, connection: Connection, headers: HeaderLines, correlation_id: str) -> Session:
        try:
            try:
                credential = presented(headers, connection.peer_certificate_der)
            except Unauthenticated as refused:
                self._authentication.refuse(refused.reason, _contact(connection, correlation_id))
            session = None
            if isinstance(credential, DeviceEvidence):
                session = self._sessions.current(connection, credential.digest)
            if session is None:
                contact = _contact(connection, correlation_id)
                evidence = await self._authentication.device_evidence(credential, contact)
                session = await self._sessions.on_connection(connection, evidence, contact)
        except Unauthenticated:
            self._allowances.spend_failure(connection.peer)
            raise
        identity = session.identity
        self._allowances.spend(identity.tenant_id, identity.credential_id, session.last_active)
        return session

    # -- the operations --------------------------------------------------------------------------------------------

    async def uplink(self, session: Session, device_id: str, headers: Headers, body: bytes) -> Answer:
        """POST /devices/{device_id}/uplink, for an authenticated device. Raises what the caller should be told."""
        try:
            source = await self.source(session, device_id)
        except RegistryError:
            self.counters.rejected += 1
            raise
        return await self._stored(self._submit(self._read_uplink, source, *self._terms(headers), body))

    async def telemetry(self, session: Session, headers: Headers, body: bytes) -> Answer:
        """POST /telemetry, for an authenticated device. Raises what the caller should be told."""
        source = Source.of(session.identity, Transport.HTTPS)
        return await self._stored(self._submit(self._read_telemetry, source, *self._terms(headers), body))

    def _terms(self, headers: Headers) -> tuple[bytes, str | None]:
        try:
            return media_type(headers, _MEDIA), _idempotency_key(headers)
        except RegistryError:
            self.counters.rejected += 1
            raise

    async def _stored(self, future: asyncio.Future[StoredUplink]) -> Answer:
        await asyncio.wait((future,))
        return self._acknowledged(future)

    def _submit(
        self, read: _Read, source: Source, media: bytes, key: str | None, body: bytes
    ) -> asyncio.Future[StoredUplink]:
        try:
            return self._registry.uplinks.submit(read(source, media, key, body))
        except RegistryError as error:
            self.counters.rejected += 1
            self.counters.too_large += isinstance(error, PayloadTooLarge)
            raise

    def _acknowledged(self, done: asyncio.Future[StoredUplink]) -> Answer:
        """The answer to an uplink whose outcome is known. Raises what went wrong."""
        try:
            stored = done.result()
        except RegistryError:
            self.counters.rejected += 1
            raise
        if stored.duplicate:
            self.counters.duplicate += 1
        else:
            self.counters.stored += 1
        return Answer(202, b'{"uplink_id":"%b"}' % str(stored.uplink_id).encode())

    def _read_telemetry(self, source: Source, media: bytes, key: str | None, body: bytes) -> NewUplink:
        return telemetry_from(source, self._payload(media, body), message_id=key)

    def _read_uplink(self, source: Source, media: bytes, _key: str | None, body: bytes) -> NewUplink:
        if media == CBOR:
            cbor = _converted(decode_cbor(body))
            payload = payload_from_value(cbor.payload, max_bytes=self._max_payload_bytes)
            return uplink_from(
                source, payload, kind=cbor.kind, message_id=cbor.message_id, observed_at=cbor.observed_at
            )
        read = decode(body, UplinkBody)
        payload = payload_from_json(bytes(read.payload), max_bytes=self._max_payload_bytes)
        return uplink_from(source, payload, kind=read.kind, message_id=read.message_id, observed_at=read.observed_at)

    def payload(self, headers: Headers, body: bytes) -> Payload:
        """The payload that a body is, in JSON or CBOR. Raises InvalidArgument."""
        return self._payload(media_type(headers, _MEDIA), body)

    def _payload(self, media: bytes, body: bytes) -> Payload:
        if media == CBOR:
            return payload_from_value(decode_cbor(body), max_bytes=self._max_payload_bytes)
        return payload_from_json(body, max_bytes=self._max_payload_bytes)

    async def source(self, session: Session, text: str) -> Source:
        """For whom a device speaks that names this id in its path: itself, or a child. Raises NotFound, Unavailable."""
        identity = session.identity
        if text == str(identity.device_id):
            return Source.of(identity, Transport.HTTPS)
        device_id = DeviceId(uuid_in_path(text, "device"))
        via = await self._registry.children.via(identity, device_id)
        return Source(identity.tenant_id, device_id, Transport.HTTPS, via)


def _converted(value: Json) -> _CborUplink:
    try:
        return msgspec.convert(value, _CborUplink)
    except msgspec.ValidationError as error:
        raise invalid_value(error) from None


def _idempotency_key(headers: Headers) -> str | None:
    for name, value in headers:
        if name == b"idempotency-key":
            return value.decode("latin-1")
    return None


def _contact(connection: Connection, correlation_id: str) -> Contact:
    return Contact(Transport.HTTPS, connection.peer, correlation_id)


def _asked(head: Head) -> _Asked:
    telemetry = head.path == TELEMETRY
    try:
        media = media_type(head.headers, _MEDIA)
    except RegistryError:
        media = None
    return _Asked(
        route=TELEMETRY if telemetry else UPLINK,
        device_id=None if telemetry else head.path[len(_UPLINK_PREFIX) : -len(_UPLINK_SUFFIX)],
        media=media,
        key=_idempotency_key(head.headers),
        correlation_id=own_correlation_id(head.headers),
        credentials=credential_lines(head.headers),
    )
