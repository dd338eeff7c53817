"""What goes down to a device and what comes up, as JSON (CONTRACT §2): the command, and the answer to it.

Pure. A command's `params` and an answer's `result` stay the text that was given. `response_from` raises InvalidArgument
for what is no answer, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from registry import fields
from registry.errors import InvalidArgument
from registry.payloads import Payload
from registry.storage.commands import Command, CommandError

MAX_ERROR_CODE: Final = 64
MAX_ERROR_MESSAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class Succeeded:
    """A device's good answer: JSON text that keeps a `Payload`'s promises."""

    result: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A device's bad answer."""

    error: CommandError


CommandResponse = Succeeded | Failed


def encode_command(command: Command) -> bytes:
    """What goes down to a device, as JSON: `{command_id, method, params, expires_at}` (CONTRACT §2)."""
    return msgspec.json.encode(
        _Down(
            command_id=str(command.command_id),
            method=command.method,
            params=msgspec.Raw(command.params.encode()),
            expires_at=command.expires_at,
        )
    )


def response_from(payload: Payload) -> CommandResponse:
    """The answer in a payload: `{"result": …}` or `{"error": {"code", "message"}}`. Raises InvalidArgument.

    `code` is a text of 1 to 64 characters or an integer, `message` a text of up to 4,096.
    """
    try:
        read = _RESPONSE.decode(payload.text)
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"the response is refused: {error}", field="response") from None
    result = bytes(read.result)
    if bool(result) == (read.error is not UNSET):
        raise InvalidArgument("a response has either a result or an error", field="response")
    if isinstance(read.error, UnsetType):
        return Succeeded(result.decode())
    code = fields.text("error.code", str(read.error.code), MAX_ERROR_CODE)
    return Failed(CommandError(code, fields.prose("error.message", read.error.message, MAX_ERROR_MESSAGE)))


class _Down(msgspec.Struct, frozen=True):
    command_id: str
    method: str
    params: msgspec.Raw
    expires_at: datetime


class _ErrorPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    code: str | int
    message: str = ""


class _Response(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    result: msgspec.Raw = msgspec.Raw(b"")
    error: _ErrorPart | UnsetType = UNSET


_RESPONSE: Final = msgspec.json.Decoder(_Response)
