"""Commands over HTTP: queued, watched and cancelled by operators; fetched by polls and answered by devices.

    device:  GET …/commands/next?wait=30 ──► 200 with the command, or 204 ──► does it ──► POST …/{command_id}/response

A poll that waits is woken by the core (registry/commands.py). It ends at once when its connection does, which is what a
revocation, a kick and the peer itself end it by, and when the node drains. While it waits it costs memory and no work,
so it is not counted among the requests in flight, but by the core, per session and per node. A command that was marked
as delivered for a poll whose answer is lost comes again with the next poll.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Final
from uuid import UUID

import msgspec
from litestar.params import FromPath
from litestar.response import Response
from msgspec import UNSET, Meta, UnsetType, field

from adapters.http.api_request import ApiRequest, answer
from adapters.http.bodies import uuid_in_path
from adapters.http.devices import device_id_in
from adapters.http.models import Answer, Instant, PageQuery, Request, given, utc, utc_or_none
from adapters.http.operations import Media, Operation, Reply, operation
from registry.commands import (
    MAX_ERROR_CODE,
    MAX_ERROR_MESSAGE,
    MAX_TTL,
    MAX_WAIT_SECONDS,
    METHOD,
    Command,
    CommandFilter,
    CommandStatus,
    NewCommand,
    encode_command,
    response_from,
)
from registry.errors import Unauthenticated
from registry.model import CommandId, Json
from registry.payloads import payload_from_json

Method = Annotated[str, Meta(pattern=f"^{METHOD}$", examples=["reboot"])]


class CommandRequest(Request, frozen=True, kw_only=True):
    """A command to be queued. It ends at `expires_at`, or after `ttl_seconds`, or after a day."""

    method: Method
    params: Annotated[msgspec.Raw, Meta(description="Any JSON of at most 32 KiB; handed down as it is")] = field(
        default_factory=lambda: msgspec.Raw(b"{}")
    )
    expires_at: Instant | None = None
    ttl_seconds: Annotated[int, Meta(ge=1, le=int(MAX_TTL.total_seconds()))] | None = None


class CommandsQuery(PageQuery, frozen=True, kw_only=True):
    """Which commands."""

    status: CommandStatus | UnsetType = UNSET
    method: Method | UnsetType = UNSET


class NextQuery(Request, frozen=True, kw_only=True):
    """How long to wait, and behind which command to look."""

    wait: Annotated[int, Meta(ge=0, le=int(MAX_WAIT_SECONDS), description="Seconds to wait for a command")] = 0
    after: (
        Annotated[UUID, Meta(description="The first unfinished command behind this one, answered or not")] | UnsetType
    ) = UNSET


class CommandErrorBody(Answer, frozen=True, kw_only=True):
    """What the device says went wrong."""

    code: str
    message: str


class CommandBody(Answer, frozen=True, kw_only=True):
    """A command and what became of it. `answered_by` is the device itself, or its gateway."""

    command_id: UUID
    device_id: UUID
    method: str
    params: msgspec.Raw
    status: CommandStatus
    created_by: str
    created_at: datetime
    expires_at: datetime
    delivered_at: datetime | None
    deliveries: int
    finished_at: datetime | None
    result: msgspec.Raw
    error: CommandErrorBody | None
    answered_by: UUID | None


class CommandsBody(Answer, frozen=True, kw_only=True):
    """A page of commands, newest first."""

    commands: list[CommandBody]
    next_cursor: str | None


class CommandDown(Answer, frozen=True, kw_only=True):
    """A command as a device gets it."""

    command_id: UUID
    method: str
    params: msgspec.Raw
    expires_at: datetime


class CommandAnswered(Answer, frozen=True, kw_only=True):
    """The status that stands: the first answer's."""

    command_id: UUID
    status: CommandStatus


_ERROR: Final[Mapping[str, Json]] = {
    "type": "object",
    "required": ["code"],
    "properties": {
        "code": {
            "anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_ERROR_CODE}, {"type": "integer"}],
        },
        "message": {"type": "string", "maxLength": MAX_ERROR_MESSAGE},
    },
    "additionalProperties": False,
}
_RESPONSE: Final[Mapping[str, Json]] = {
    "title": "CommandResponse",
    "anyOf": [
        {"type": "object", "required": ["result"], "properties": {"result": {}}, "additionalProperties": False},
        {"type": "object", "required": ["error"], "properties": {"error": _ERROR}, "additionalProperties": False},
    ],
}
_EXAMPLE_DOWN: Final = {
    "command_id": "0b1f7a52-7d57-4a43-8a6a-2f1d6a6f2c11",
    "method": "reboot",
    "params": {"delay_s": 5},
    "expires_at": "2026-05-30T10:15:00Z",
}


def command_id_in(text: str) -> CommandId:
    """The command id in a path. Raises NotFound for what is no UUID."""
    return CommandId(uuid_in_path(text, "command"))


def command_body(command: Command) -> CommandBody:
    """A command as operators see it."""
    error = command.error
    return CommandBody(
        command_id=command.command_id,
        device_id=command.device_id,
        method=command.method,
        params=msgspec.Raw(command.params.encode()),
        status=command.status,
        created_by=command.created_by,
        created_at=utc(command.created_at),
        expires_at=utc(command.expires_at),
        delivered_at=utc_or_none(command.delivered_at),
        deliveries=command.deliveries,
        finished_at=utc_or_none(command.finished_at),
        result=msgspec.Raw((command.result or "null").encode()),
        error=None if error is None else CommandErrorBody(code=error.code, message=error.message),
        answered_by=command.answered_by,
    )


@operation(
    Operation(
        "POST",
        "/devices/{device_id}/commands",
        "QueueCommand",
        "Send a command to a device",
        "Commands",
        {201: Reply("It is queued", CommandBody)},
        body=CommandRequest,
        body_example={"method": "reboot", "params": {"delay_s": 5}, "ttl_seconds": 3600},
        description="Stored until it is answered, cancelled or expired, and delivered in the order of queueing, again "
        "whenever the device comes back before it has answered.",
    )
)
async def queue_command(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """POST /devices/{device_id}/commands"""
    key, operator, commands = device_id_in(device_id), request.operator, request.registry.commands
    read = await request.decoded(CommandRequest)
    new = NewCommand(
        read.method,
        payload_from_json(bytes(read.params), max_bytes=request.service.settings.max_body_bytes),
        expires_at=read.expires_at,
        ttl_seconds=read.ttl_seconds,
    )
    return answer(201, command_body(await commands.queue(operator.tenant_id, key, new, operator.actor)))


@operation(
    Operation(
        "GET",
        "/devices/{device_id}/commands",
        "ListCommands",
        "List a device's commands, newest first",
        "Commands",
        {200: Reply("A page of commands", CommandsBody)},
        query=CommandsQuery,
    )
)
async def list_commands(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """GET /devices/{device_id}/commands"""
    query = request.asked(CommandsQuery)
    wanted = CommandFilter(given(query.status), given(query.method))
    found = await request.registry.commands.list(
        request.operator.tenant_id, device_id_in(device_id), wanted, query.page()
    )
    return answer(200, CommandsBody(commands=[command_body(c) for c in found.items], next_cursor=found.next_cursor))


@operation(
    Operation(
        "GET",
        "/devices/{device_id}/commands/{command_id}",
        "GetCommand",
        "Read a command and what became of it",
        "Commands",
        {200: Reply("The command", CommandBody)},
    )
)
async def get_command(request: ApiRequest, device_id: FromPath[str], command_id: FromPath[str]) -> Response[bytes]:
    """GET /devices/{device_id}/commands/{command_id}"""
    found = await request.registry.commands.get(
        request.operator.tenant_id, device_id_in(device_id), command_id_in(command_id)
    )
    return answer(200, command_body(found))


@operation(
    Operation(
        "DELETE",
        "/devices/{device_id}/commands/{command_id}",
        "CancelCommand",
        "Cancel a command that is not finished",
        "Commands",
        {200: Reply("It is cancelled", CommandBody)},
        description="FAILED_PRECONDITION (400) when it is finished. A device that has it already may still execute it; "
        "its answer is then refused.",
    )
)
async def cancel_command(request: ApiRequest, device_id: FromPath[str], command_id: FromPath[str]) -> Response[bytes]:
    """DELETE /devices/{device_id}/commands/{command_id}"""
    operator = request.operator
    cancelled = await request.registry.commands.cancel(
        operator.tenant_id, device_id_in(device_id), command_id_in(command_id), operator.actor
    )
    return answer(200, command_body(cancelled))


@operation(
    Operation(
        "GET",
        "/devices/{device_id}/commands/next",
        "NextCommand",
        "Fetch the next command, for oneself or for a child; wait for it if there is none",
        "Commands",
        {200: Reply("A command", CommandDown, _EXAMPLE_DOWN), 204: Reply("There is none, or the wait was ended")},
        query=NextQuery,
        description="The first command that is not answered; until it is, the same one comes again. One waiting "
        "request for each session.",
    )
)
async def next_command(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """GET /devices/{device_id}/commands/next"""
    session = request.device_session
    source = await request.service.intake.source(session, device_id)
    query = request.asked(NextQuery)
    after = given(query.after)
    if request.is_head:
        return _nothing()  # it would be marked as delivered, and is not
    polling = asyncio.ensure_future(
        request.registry.commands.next(
            source.tenant_id,
            source.device_id,
            session.session_id,
            wait_seconds=query.wait,
            after=None if after is None else CommandId(after),
            via=source.via,
        )
    )
    await _while_connected(request, polling)
    if polling.cancelled():
        return _nothing()
    command = polling.result()
    if session.closed:
        raise Unauthenticated("the session was closed while it waited for a command")
    if command is None:
        return _nothing()
    return Response(encode_command(command), status_code=200, media_type="application/json")


@operation(
    Operation(
        "POST",
        "/devices/{device_id}/commands/{command_id}/response",
        "AnswerCommand",
        "Answer a command, for oneself or for a child",
        "Commands",
        {200: Reply("It is stored; the first answer stands", CommandAnswered)},
        body=Media("application/json", _RESPONSE),
        body_media=("application/json", "application/cbor"),
        body_example={"result": {"uptime_s": 5}},
        description="Safe to repeat. FAILED_PRECONDITION (400) for a command that has expired or was cancelled.",
    )
)
async def answer_command(request: ApiRequest, device_id: FromPath[str], command_id: FromPath[str]) -> Response[bytes]:
    """POST /devices/{device_id}/commands/{command_id}/response"""
    intake = request.service.intake
    source = await intake.source(request.device_session, device_id)
    response = response_from(intake.payload(request.scope["headers"], await request.body()))
    command = await request.registry.commands.answer(
        source, command_id_in(command_id), response, request.correlation_id
    )
    return answer(200, CommandAnswered(command_id=command.command_id, status=command.status))


async def _while_connected(request: ApiRequest, polling: asyncio.Future[Command | None]) -> None:
    """Wait until `polling` is done; cancel it when the peer leaves, or when this request is cancelled."""
    if request.connection is not None:
        request.connection.rest()
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((polling, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not polling.done():
            polling.cancel()
        await asyncio.wait((polling, leaving))


async def _left(request: ApiRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _nothing() -> Response[bytes]:
    return Response(b"", status_code=204, media_type="application/json")


ROUTES: Final = (queue_command, list_commands, next_command, get_command, cancel_command, answer_command)
