"""Events over HTTP: the list by cursor, and the stream (server-sent events, WHATWG HTML §9.2).

The stream first says where it stands (`id:` alone), so that a client that loses it before the first event comes back
without a gap; every event carries its position as `id:`, and `Last-Event-ID` resumes behind it. A comment every
`HEARTBEAT_SECONDS` keeps proxies and NATs from forgetting the connection. The stream ends when the operator's token
does, when the database is away, and when the node drains; the client then reconnects by itself.

Streams are counted per tenant and per node. A slow reader holds one slice of events and its connection, nothing else
(registry/event_log.py); one that does not read at all is cut by the server (limits.py, send_timeout).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Final
from uuid import UUID

import msgspec
from litestar.response import Response, Stream
from msgspec import UNSET, Meta, UnsetType

from adapters.http.api_request import ApiRequest, answer
from adapters.http.models import Answer, Request, given, utc
from adapters.http.operations import Media, Operation, Reply, operation
from registry.errors import InvalidArgument, RegistryError, ResourceExhausted
from registry.event_log import EventLog, parse_position
from registry.events import Event, EventKind
from registry.model import Json, TenantId

HEARTBEAT_SECONDS: Final = 15.0
"""Below the half minute after which common proxies give a silent connection up."""
RETRY_MILLISECONDS: Final = 2000
"""When a client should reconnect: soon, and not all at once with what else it does."""

PositionText = Annotated[str, Meta(pattern="^[0-9]{1,19}-[0-9]{1,19}$", description="The `cursor` of an event")]


class EventsQuery(Request, frozen=True, kw_only=True):
    """Events behind a position; `cursor` is another name for `after`, as other lists call it."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    after: PositionText | UnsetType = UNSET
    cursor: PositionText | UnsetType = UNSET

    def position(self) -> str | None:
        """Where to begin. Raises InvalidArgument for two beginnings."""
        if self.after is not UNSET and self.cursor is not UNSET:
            raise InvalidArgument("after and cursor are one thing; give one of them", field="cursor")
        return given(self.after) if self.after is not UNSET else given(self.cursor)


class StreamQuery(Request, frozen=True, kw_only=True):
    """Where the stream begins; without it, now."""

    after: PositionText | UnsetType = UNSET


class EventBody(Answer, frozen=True, kw_only=True):
    """Something that happened. `correlation_id` joins it with the request or connection that made it happen."""

    cursor: str
    event_id: UUID
    kind: Annotated[str, Meta(description="One of: " + ", ".join(f"`{kind.value}`" for kind in EventKind))]
    at: datetime
    device_id: UUID | None
    credential_id: UUID | None
    session_id: UUID | None
    actor: str
    correlation_id: str
    data: dict[str, Json]


class EventsBody(Answer, frozen=True, kw_only=True):
    """A page of events. `next_cursor` is null at the end; the last event's `cursor` goes on from there later."""

    events: list[EventBody]
    next_cursor: str | None


class Streams:
    """How many event streams are open, and how many may be; and when all of them end."""

    def __init__(self, *, total: int, per_tenant: int) -> None:
        self._total = total
        self._per_tenant = per_tenant
        self._open: dict[TenantId, int] = {}
        self.ended = asyncio.Event()
        """Set when the node drains: a stream has no end of its own, and would hold the drain up to its deadline."""
        self.turned_away = 0
        """Streams for which there was no room, for the metrics."""

    @property
    def open(self) -> int:
        """Streams that are open now."""
        return sum(self._open.values())

    def enter(self, tenant_id: TenantId) -> None:
        """Count one in; the caller counts it out with `leave`. Raises ResourceExhausted."""
        if self._open.get(tenant_id, 0) >= self._per_tenant:
            self.turned_away += 1
            raise ResourceExhausted(f"this tenant has its {self._per_tenant} event streams", retry_after=5.0)
        if self.open >= self._total:
            self.turned_away += 1
            raise ResourceExhausted(f"this node has its {self._total} event streams", retry_after=5.0)
        self._open[tenant_id] = self._open.get(tenant_id, 0) + 1

    def end(self) -> None:
        """End every stream, and those that still come: the node is leaving."""
        self.ended.set()

    def leave(self, tenant_id: TenantId) -> None:
        """Count one out."""
        left = self._open[tenant_id] - 1
        if left:
            self._open[tenant_id] = left
        else:
            del self._open[tenant_id]


def event_body(event: Event) -> EventBody:
    """An event as it is shown."""
    return EventBody(
        cursor=str(event.position),
        event_id=event.event_id,
        kind=event.name,
        at=utc(event.at),
        device_id=event.device_id,
        credential_id=event.credential_id,
        session_id=event.session_id,
        actor=event.actor,
        correlation_id=event.correlation_id,
        data=dict(event.data),
    )


async def stream_of(
    log: EventLog,
    tenant_id: TenantId,
    position: str,
    lasts: timedelta,
    ended: asyncio.Event,
    *,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> AsyncIterator[bytes]:
    """The bytes of a stream that begins behind `position` and ends after `lasts`, or soon after `ended` is set."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + lasts.total_seconds()
    source = log.stream(tenant_id, position)
    reading: asyncio.Task[Sequence[Event]] | None = None
    leaving = loop.create_task(ended.wait(), name="event stream's end")
    try:
        yield f"retry: {RETRY_MILLISECONDS}\nid: {position}\n\n".encode()
        while (left := ends_at - loop.time()) > 0:
            if reading is None:
                reading = loop.create_task(_next(source), name="event stream")
            waiting = (reading, leaving)
            await asyncio.wait(waiting, timeout=min(heartbeat_seconds, left), return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                yield b": this node is leaving; come back with Last-Event-ID\n\n"
                return
            if not reading.done():
                yield b": still here\n\n"
                continue
            done, reading = reading, None
            try:
                events = done.result()
            except RegistryError:
                yield b": the events are away; come back with Last-Event-ID\n\n"
                return
            yield b"".join(_rendered(event) for event in events)
        yield b": the token has expired\n\n"
    finally:
        leaving.cancel()
        if reading is not None:
            reading.cancel()
            await asyncio.wait((reading,))


async def _next(source: AsyncIterator[Sequence[Event]]) -> Sequence[Event]:
    return await anext(source)


def _rendered(event: Event) -> bytes:
    # JSON has no line break outside of its texts and escapes those within, so it is one `data:` line.
    data = msgspec.json.encode(event_body(event))
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (str(event.position).encode(), event.name.encode(), data)


@operation(
    Operation(
        "GET",
        "/events",
        "ListEvents",
        "List events, oldest first",
        "Events",
        {200: Reply("A page of events", EventsBody)},
        query=EventsQuery,
    )
)
async def list_events(request: ApiRequest) -> Response[bytes]:
    """GET /events"""
    query = request.asked(EventsQuery)
    found = await request.registry.event_log.list(request.operator.tenant_id, query.position(), query.limit)
    return answer(200, EventsBody(events=[event_body(e) for e in found.items], next_cursor=found.next_cursor))


@operation(
    Operation(
        "GET",
        "/events/stream",
        "StreamEvents",
        "Follow events as they happen (server-sent events)",
        "Events",
        {
            200: Reply(
                "Events for ever: `id:` is the position, `event:` the kind, `data:` the event as `GET /events` has it",
                Media("text/event-stream", {"type": "string"}),
            )
        },
        query=StreamQuery,
        headers={"Last-Event-ID": "The `id:` of the last event that was received; it wins over `after`."},
    )
)
async def stream_events(request: ApiRequest) -> Response[bytes] | Stream:
    """GET /events/stream"""
    operator, registry, streams = request.operator, request.registry, request.service.streams
    asked = request.asked(StreamQuery)
    position = request.headers.get("last-event-id") or given(asked.after) or str(registry.feed.cursor)
    position = str(parse_position(position))
    lasts = operator.expires_at - registry.clock()
    if request.is_head:
        return Response(b"", status_code=200, media_type="text/event-stream")
    streams.enter(operator.tenant_id)
    content = stream_of(registry.event_log, operator.tenant_id, position, lasts, streams.ended)

    async def leave() -> None:
        streams.leave(operator.tenant_id)
        await content.aclose()  # type: ignore[attr-defined]  # it is a generator

    request.on_end(leave)
    if request.connection is not None:
        request.connection.rest()  # streams have a limit of their own, and hold none of the places of requests
    return Stream(content, media_type="text/event-stream", headers={"x-accel-buffering": "no"})


ROUTES: Final = (list_events, stream_events)
