"""Up to where the queues of the sessions that this node serves are known to be in hand.

    front(session, epoch) = n:   every row up to ordinal n has its packet id, and has had it since it was committed
    current:                     n is the last ordinal that was ever given out, so no row waits for its packet id

A message may go to its session at once only where the queue is current; a row that waits for its packet id would be
overtaken otherwise, and what one client publishes must arrive in its order (MQTT 5.0 §4.6). The truth is in the table;
this only saves the question. An owner's rows never lose their packet ids under the same epoch, so what was once known
stays true; what other nodes write moves the last ordinal, and the table is asked again.

What can be lost: anything here, at the price of one question. So it is bounded, and the oldest entry goes.
"""

from __future__ import annotations

from typing import Final

from registry.messaging_values import StoredSessionId
from registry.storage.messaging_sessions import Locked

_KEPT: Final = 20_000
"""As many as a node has connections; some hundred bytes each."""


class QueueFronts:
    """What is known of the queues of this node's sessions."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._fronts: dict[StoredSessionId, tuple[int, int]] = {}

    def current(self, session: Locked) -> bool:
        """Whether it is known that no row waits; of a session whose row is held."""
        return self._fronts.get(session.session_id) == (session.epoch, session.last_ordinal)

    def reached(self, session: Locked) -> None:
        """Every row up to its last ordinal has its packet id, and that is committed."""
        before = self._fronts.pop(session.session_id, (0, 0))
        self._fronts[session.session_id] = max(before, (session.epoch, session.last_ordinal))
        if len(self._fronts) > self._kept:
            del self._fronts[next(iter(self._fronts))]
