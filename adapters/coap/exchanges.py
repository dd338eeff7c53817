"""A request between its datagram and its answer, and what a peer's machine tells its shell (peer.py has the theory).

    RequestReceived ─► Exchange, open until `respond` ─► an ACK, or a message of ours

Values and a record; the machine alone changes it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeAlias

import msgspec
from aiocoap.numbers.types import Type

from adapters.coap.blockwise import Key
from adapters.coap.duplicates import Entry
from adapters.coap.messages import Message
from adapters.coap.observations import EndCause, Observation
from adapters.coap.options import Block
from adapters.coap.ports import Request


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


class Exchange:
    """One request on its way through: how it came, and what its answer has to repeat or respect."""

    __slots__ = (
        "ack_due",
        "acknowledged",
        "block1",
        "block2",
        "confirmable",
        "entry",
        "etags",
        "key",
        "message_id",
        "no_response",
        "number",
        "observation",
        "token",
    )

    def __init__(self, number: int, message: Message, entry: Entry, ack_due: float) -> None:
        self.number = number
        self.confirmable = message.type is Type.CON
        self.message_id = message.message_id
        self.token = message.token
        self.entry = entry
        self.ack_due = ack_due
        self.acknowledged = False
        self.no_response = 0
        self.block1: Block | None = None
        self.block2: Block | None = None
        self.etags: tuple[bytes, ...] = ()
        self.key: Key | None = None
        self.observation: Observation | None = None
