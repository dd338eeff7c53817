"""The audit over HTTP: who changed what, newest first."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from litestar.response import Response

from adapters.http.api_request import ApiRequest, answer
from adapters.http.models import Answer, PageQuery, utc
from adapters.http.operations import Operation, Reply, operation
from registry.model import Json


class AuditEntry(Answer, frozen=True, kw_only=True):
    """One change."""

    at: datetime
    actor: str
    action: str
    object_type: str
    object_id: str
    correlation_id: str
    detail: dict[str, Json]


class AuditBody(Answer, frozen=True, kw_only=True):
    """A page of changes, newest first."""

    audit: list[AuditEntry]
    next_cursor: str | None


@operation(
    Operation(
        "GET",
        "/audit",
        "ListAudit",
        "List changes, newest first",
        "Events",
        {200: Reply("A page of changes", AuditBody)},
        query=PageQuery,
    )
)
async def list_audit(request: ApiRequest) -> Response[bytes]:
    """GET /audit"""
    found = await request.registry.event_log.audit(request.operator.tenant_id, request.asked(PageQuery).page())
    entries = [
        AuditEntry(
            at=utc(row.at),
            actor=row.actor,
            action=row.action,
            object_type=row.object_type,
            object_id=row.object_id,
            correlation_id=row.correlation_id,
            detail=dict(row.detail),
        )
        for row in found.items
    ]
    return answer(200, AuditBody(audit=entries, next_cursor=found.next_cursor))


ROUTES: Final = (list_audit,)
