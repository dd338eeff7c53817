"""One client's interest in one resource (RFC 7641).

    OFFERED ──the handler accepts, and answers 2.xx──► ACTIVE ──► ENDED
        └── it does not, or answers with an error ──────────────────►┘

A request with Observe 0 offers an observation; it is known by its peer and token. ACTIVE ends by a Reset to one of its
notifications, by Observe 1 or a new request with its token, by a confirmable notification that nobody acknowledges, by
an error as notification, by the handler, and with its peer. Only the newest state waits to be sent (§4.5): `pending`
is a place, not a queue.

Confirmable or not: the client chooses with the type of its request. To those who asked by NON, each tenth notification
is confirmable, and one after an hour (§4.5), so that an observer that is gone is found out; and whatever the handler
wants to know the arrival of is.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum, auto

from adapters.coap.blockwise import Key
from adapters.coap.ports import Response


class ObservationState(Enum):
    """Where an observation stands."""

    OFFERED = auto()
    ACTIVE = auto()
    ENDED = auto()


class EndCause(Enum):
    """Why an observation ended by something else than its handler's word."""

    RESET = auto()
    DEREGISTERED = auto()
    REPLACED = auto()
    SILENCE = auto()
    REFUSED = auto()  # the handler accepted, and then answered with an error
    PEER_GONE = auto()


@dataclass(frozen=True, slots=True)
class Pending:
    """A state that waits to be sent. `receipt`: what to tell when it has arrived; it makes it confirmable."""

    response: Response
    receipt: Hashable | None = None


class Observation:
    """The machine's record of one. Its `number` is unique among those of its peer."""

    __slots__ = (
        "accepted",
        "confirmable",
        "confirmed_at",
        "exponent",
        "key",
        "number",
        "pending",
        "since_confirmable",
        "state",
        "token",
    )

    def __init__(self, number: int, token: bytes, key: Key, confirmable: bool, exponent: int, now: float) -> None:
        self.number = number
        self.token = token
        self.key = key
        self.confirmable = confirmable
        self.exponent = exponent
        """Of the blocks that the client asked for, or ours."""
        self.state = ObservationState.OFFERED
        self.accepted = False
        self.pending: Pending | None = None
        self.since_confirmable = 0
        self.confirmed_at = now

    def wants_confirmable(self, pending: Pending, every: int, interval: float, now: float) -> bool:
        """Whether the next notification is to be a CON."""
        return (
            self.confirmable
            or pending.receipt is not None
            or not pending.response.code.is_successful()
            or self.since_confirmable + 1 >= every
            or now - self.confirmed_at >= interval
        )

    def sent(self, confirmable: bool, now: float) -> None:
        """Count a notification."""
        if confirmable:
            self.since_confirmable = 0
            self.confirmed_at = now
        else:
            self.since_confirmable += 1
