"""A request between its datagram and its answer, and what a peer's machine tells its shell (peer.py has the theory).

    RequestReceived ─► Exchange, open until `respond` ─► an ACK, or a message of ours

Values and a record; the machine alone changes it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, TypeAlias

import msgspec
from aiocoap.numbers.codes import Code
from aiocoap.numbers.types import Type

from adapters.coap.duplicates import Entry
from adapters.coap.messages import Message
from adapters.coap.observations import EndCause, Observation
from adapters.coap.options import Block, RequestOptions
from adapters.coap.ports import Request

_CON: Final = Type.CON


class RequestReceived(msgspec.Struct, frozen=True, gc=False):
    """A whole request. Owed: `respond(exchange, …)`. `observation`: its number, if the client offers one."""

    exchange: int
    request: Request
    observation: int | None


class NotificationArrived(msgspec.Struct, frozen=True):
    """The client has acknowledged the notification that was given with this receipt."""

    observation: int
    receipt: Hashable


class ObservationEnded(msgspec.Struct, frozen=True):
    """An accepted observation ended, not by the caller."""

    observation: int
    cause: EndCause


Event: TypeAlias = RequestReceived | NotificationArrived | ObservationEnded


class Exchange(msgspec.Struct, eq=False):
    """One request on its way through: how it came, and what its answer has to repeat or respect."""

    number: int
    method: Code
    confirmable: bool
    message_id: int
    token: bytes
    options: RequestOptions
    entry: Entry
    ack_due: float
    acknowledged: bool = False
    block1: Block | None = None
    """To be repeated in the answer."""
    observation: Observation | None = None

    @classmethod
    def of(cls, number: int, message: Message, options: RequestOptions, entry: Entry, ack_due: float) -> Exchange:
        """The exchange that a request begins."""
        return cls(
            number,
            message.code,
            message.type is _CON,
            message.message_id,
            message.token,
            options,
            entry,
            ack_due,
        )
