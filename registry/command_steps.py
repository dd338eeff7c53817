"""The life of one command as a table: which step leads from which status to which, and what is told of it.

                 DELIVER           SUCCEED / FAIL
      queued ───────────► delivered ─────────────► succeeded | failed
        │  └─ SUCCEED / FAIL ─┼────────────────────►   (the mark of a delivery may be lost; an answer proves it)
        │                     ├─ DELIVER ─► delivered  (again, on the next connection or poll)
        └──── EXPIRE, CANCEL ─┴───────────► expired | cancelled

`STEPS` says the same; what has no entry is refused. Values only: who locks, writes and tells is in commands.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from enum import Enum, auto
from types import MappingProxyType
from typing import Final

from registry.events import EventKind, NewEvent
from registry.model import Actor, Json
from registry.storage.commands import Command, CommandStatus


class Step(Enum):
    """What may happen to a command."""

    DELIVER = auto()
    SUCCEED = auto()
    FAIL = auto()
    EXPIRE = auto()
    CANCEL = auto()


STEPS: Final[Mapping[tuple[CommandStatus, Step], CommandStatus]] = MappingProxyType(
    {
        (CommandStatus.QUEUED, Step.DELIVER): CommandStatus.DELIVERED,
        (CommandStatus.QUEUED, Step.SUCCEED): CommandStatus.SUCCEEDED,
        (CommandStatus.QUEUED, Step.FAIL): CommandStatus.FAILED,
        (CommandStatus.QUEUED, Step.EXPIRE): CommandStatus.EXPIRED,
        (CommandStatus.QUEUED, Step.CANCEL): CommandStatus.CANCELLED,
        (CommandStatus.DELIVERED, Step.DELIVER): CommandStatus.DELIVERED,
        (CommandStatus.DELIVERED, Step.SUCCEED): CommandStatus.SUCCEEDED,
        (CommandStatus.DELIVERED, Step.FAIL): CommandStatus.FAILED,
        (CommandStatus.DELIVERED, Step.EXPIRE): CommandStatus.EXPIRED,
        (CommandStatus.DELIVERED, Step.CANCEL): CommandStatus.CANCELLED,
    }
)

_EVENT: Final[Mapping[CommandStatus, EventKind]] = MappingProxyType(
    {
        CommandStatus.QUEUED: EventKind.COMMAND_QUEUED,
        CommandStatus.DELIVERED: EventKind.COMMAND_DELIVERED,
        CommandStatus.SUCCEEDED: EventKind.COMMAND_FINISHED,
        CommandStatus.FAILED: EventKind.COMMAND_FINISHED,
        CommandStatus.EXPIRED: EventKind.COMMAND_EXPIRED,
        CommandStatus.CANCELLED: EventKind.COMMAND_CANCELLED,
    }
)
"""What is told when a command comes into a status."""


def stepped(command: Command, step: Step, now: datetime) -> Command:
    """The command after a legal step."""
    status = STEPS[command.status, step]
    if step is Step.DELIVER:
        first = command.delivered_at or now
        return replace(command, status=status, delivered_at=first, deliveries=command.deliveries + 1)
    return replace(command, status=status, finished_at=now)


def event_of(command: Command, actor: Actor) -> NewEvent:
    """What is told of a command in its present status."""
    data: dict[str, Json] = {
        "command_id": str(command.command_id),
        "method": command.method,
        "status": command.status.value,
    }
    if command.error is not None:
        data["error"] = {"code": command.error.code, "message": command.error.message}
    return NewEvent(_EVENT[command.status], command.tenant_id, actor, device_id=command.device_id, data=data)
