"""Our confirmable messages on their way (RFC 7252 §4.2, §4.7, §4.8).

    queued ──NSTART allows──► sent ──► again after 2–3 s, 4–6 s, 8–12 s, 16–24 s ──► given up after 32–48 s more
                                └── ACK: arrived        └── RST: rejected

NSTART is 1: one is on its way to a peer, the others wait. The first timeout is ACK_TIMEOUT times a random factor of 1
to 1.5 and doubles with each repetition.
"""

from __future__ import annotations

from collections.abc import Hashable

from adapters.coap.limits import CoapLimits
from adapters.coap.observations import Observation, Pending


class Transmission:
    """One CON. `observation` and `state` are there when it is a notification of that state, `receipt` when somebody
    waits for its arrival."""

    __slots__ = ("attempts", "datagram", "due", "message_id", "observation", "receipt", "state", "timeout")

    def __init__(
        self, message_id: int, datagram: bytes, observation: Observation | None = None, state: Pending | None = None
    ) -> None:
        self.message_id = message_id
        self.datagram = datagram
        self.observation = observation
        self.state = state
        self.receipt: Hashable | None = None if state is None else state.receipt
        self.attempts = 0  # repetitions so far
        self.timeout = 0.0
        self.due = 0.0

    def begin(self, limits: CoapLimits, chance: float, now: float) -> None:
        """It is sent for the first time. `chance` is uniform in [0, 1)."""
        self.timeout = limits.ack_timeout * (1 + (limits.ack_random_factor - 1) * chance)
        self.due = now + self.timeout

    def again(self, limits: CoapLimits, now: float) -> bool:
        """The timeout has passed: whether it may be sent again. Its next one is set if so."""
        if self.attempts >= limits.max_retransmit:
            return False
        self.attempts += 1
        self.timeout *= 2
        self.due = now + self.timeout
        return True
