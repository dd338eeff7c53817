"""Live sessions over HTTP: of all nodes, and how to end one."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final
from uuid import UUID

from litestar.params import FromPath
from litestar.response import Response
from msgspec import Meta

from adapters.http.api_request import ApiRequest, answer
from adapters.http.bodies import uuid_in_path
from adapters.http.models import Answer, ReceiptBody, Request, receipt_body, utc
from adapters.http.operations import Operation, Reply, operation
from registry.model import SessionId


class SessionsQuery(Request, frozen=True, kw_only=True):
    """How many to show."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class SessionBody(Answer, frozen=True, kw_only=True):
    """A live session."""

    session_id: UUID
    node_id: str
    device_id: UUID
    credential_id: UUID
    transport: str
    peer: str
    opened_at: datetime


class SessionsBody(Answer, frozen=True, kw_only=True):
    """Live sessions, oldest first. They come and go too fast for pages: `next_cursor` is always null."""

    sessions: list[SessionBody]
    next_cursor: str | None


@operation(
    Operation(
        "GET",
        "/sessions",
        "ListSessions",
        "List live sessions of all nodes, oldest first",
        "Sessions",
        {200: Reply("The sessions", SessionsBody)},
        query=SessionsQuery,
    )
)
async def list_sessions(request: ApiRequest) -> Response[bytes]:
    """GET /sessions"""
    found = await request.registry.node.sessions_of(request.operator.tenant_id, request.asked(SessionsQuery).limit)
    bodies = [
        SessionBody(
            session_id=s.session_id,
            node_id=s.node_id,
            device_id=s.device_id,
            credential_id=s.credential_id,
            transport=s.transport,
            peer=s.peer,
            opened_at=utc(s.opened_at),
        )
        for s in found
    ]
    return answer(200, SessionsBody(sessions=bodies, next_cursor=None))


@operation(
    Operation(
        "DELETE",
        "/sessions/{session_id}",
        "KickSession",
        "End a session; its credential stays good",
        "Sessions",
        {200: Reply("What ended", ReceiptBody)},
    )
)
async def kick_session(request: ApiRequest, session_id: FromPath[str]) -> Response[bytes]:
    """DELETE /sessions/{session_id}"""
    operator = request.operator
    key = SessionId(uuid_in_path(session_id, "live session"))
    return answer(200, receipt_body(await request.registry.kick.session(operator.tenant_id, key, operator.actor)))


ROUTES: Final = (list_sessions, kick_session)
