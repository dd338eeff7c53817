"""Sessions whose queue is full: how long each may hold up everybody who publishes to its topics.

    a publication finds no room ─► seen ─┬─ for the first time, or it has come further since: from now on
                                         ├─ not for the grace yet: wait; the sender is told 0x97 and tries again
                                         └─ for the whole grace, and it took nothing: overdue, the session is to end

A publication is stored for all its receivers or for none, so one that takes nothing stops its topics for everybody. It
may be away, broken, or hostile: here that is the same. Either the senders wait for it for ever, or it is passed over
silently, or its session ends. Only the last is said in the protocol: the receiver gets 0x97, and Session Present 0 when
it comes back; until then every message that was acknowledged is in its queue.

How far a session has come is the number of messages that left its queue; it rises with every acknowledgement, and with
every message that expires. A session that is taken up again, with another epoch, gets the whole grace again. So a
receiver that takes anything at all is slowed down to, and never ended.

This is one node's memory of what it met: the nodes judge for themselves, and the database has the last word, as the one
that ends a session looks whether it has moved (stored_sessions.py). What can be lost with a crash: the time so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from registry.messaging_values import StoredSessionId
from registry.storage.messaging_sessions import Locked

_REMEMBERED: Final = 10_000
"""Sessions; beyond it the one that was met first is forgotten, and begins anew."""


@dataclass(frozen=True, slots=True)
class Standstill:
    """Where a session stood while it refused: its epoch, and how many messages had left its queue."""

    session_id: StoredSessionId
    epoch: int
    left: int

    @classmethod
    def of(cls, session: Locked) -> Standstill:
        """Where it stands now. What is queued in the same transaction changes nothing."""
        return cls(session.session_id, session.epoch, session.last_ordinal - session.queued_messages)


class FullQueues:
    """Those that the publications of this node met. Times in seconds, of a clock that nobody sets."""

    def __init__(self, grace: float) -> None:
        """`grace` 0: never is one overdue."""
        self._grace = grace
        self._since: dict[StoredSessionId, tuple[Standstill, float]] = {}

    def seen(self, session: Locked, now: float) -> Standstill | None:
        """A publication found no room in this session's queue; answers where it stands if that is overdue."""
        if not self._grace:
            return None
        here = Standstill.of(session)
        before, since = self._since.get(session.session_id, (None, now))
        if before != here:
            self._since.pop(session.session_id, None)
            if len(self._since) >= _REMEMBERED:
                del self._since[next(iter(self._since))]
            self._since[session.session_id] = here, now
            return None
        return here if now - since >= self._grace else None

    def forget(self, session_id: StoredSessionId) -> None:
        """The session has ended, or is to be met anew."""
        self._since.pop(session_id, None)
