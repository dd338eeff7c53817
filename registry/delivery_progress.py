"""How far deliveries have come: what subscribers acknowledged, and what senders released, written in groups.

    delivered: the row goes, and its body with the last row
    received:  from the commit on only PUBREL is sent for it, in the order in which these came
    released:  the incoming QoS 2 id is forgotten; the sender may use it again

Each is written only by the session's present owner, and does no harm twice: so a commit whose answer was lost is simply
tried again. What can be lost, if the database stays away: a `delivered`; the message is then delivered again by the
session's next owner, as after a crash. An owner that goes on meanwhile may give its packet id to another message; the
loader knows that the older of two such rows is done (storage/messaging_sessions.load).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from registry.batching import Batcher
from registry.errors import Unavailable
from registry.message_routes import RETRY_PAUSES
from registry.messaging_values import OutcomeOpen, Ownership, SessionLost, StoredSessionId
from registry.model import NodeId
from registry.queue_fronts import QueueFronts
from registry.storage import messaging as storage
from registry.storage import messaging_sessions as sessions
from registry.storage.commits import certain_transaction
from registry.storage.database import Database

_BATCH = 1_000
_QUEUE = 1_000_000
"""Each step answers a message that stands in a bounded queue, so this bound is only a backstop."""


class Kind(Enum):
    """What happened."""

    DELIVERED = auto()
    RECEIVED = auto()
    RELEASED = auto()


@dataclass(frozen=True, slots=True)
class Step:
    """`number` is an ordinal of the queue, or for RELEASED the incoming packet id."""

    kind: Kind
    ownership: Ownership
    number: int


class DeliveryProgress:
    """Writes the steps of this node's sessions."""

    def __init__(
        self,
        database: Database,
        node_id: NodeId,
        *,
        freed: Callable[[set[StoredSessionId]], None],
        fronts: QueueFronts,
    ) -> None:
        """`freed` is told of sessions whose queues have become shorter; places move the `fronts` that are known."""
        self._database = database
        self._node_id = node_id
        self._freed = freed
        self._fronts = fronts
        self._batcher: Batcher[Step, None] = Batcher(
            "delivery progress", self._process, max_items=_BATCH, max_queued=_QUEUE
        )

    async def stop(self) -> None:
        """Write what is queued."""
        await self._batcher.stop()

    def submit(self, step: Step) -> asyncio.Future[None]:
        """Done when committed. The future raises SessionLost, Unavailable."""
        return self._batcher.submit(step)

    async def _process(self, steps: Sequence[Step]) -> Sequence[BaseException | None]:
        for pause in RETRY_PAUSES:
            try:
                return await self._write(steps)
            except (OutcomeOpen, Unavailable):
                await asyncio.sleep(pause)
        return await self._write(steps)

    async def _write(self, steps: Sequence[Step]) -> list[BaseException | None]:
        async with certain_transaction(self._database) as connection:
            held = await sessions.lock(connection, {step.ownership.session_id for step in steps})
            outcomes: list[BaseException | None] = []
            owned: list[Step] = []
            for step in steps:
                session = held.get(step.ownership.session_id)
                if session is None or session.epoch != step.ownership.epoch or session.node_id != self._node_id:
                    outcomes.append(SessionLost())
                    continue
                outcomes.append(None)
                owned.append(step)
            received = [s for s in owned if s.kind is Kind.RECEIVED]
            released = [(s.ownership.session_id, s.number) for s in owned if s.kind is Kind.RELEASED]
            delivered = [(s.ownership.session_id, s.number) for s in owned if s.kind is Kind.DELIVERED]
            current = [held[i] for i in {s.ownership.session_id for s in received} if self._fronts.current(held[i])]
            if received:
                places = []
                for step in received:
                    session = held[step.ownership.session_id]
                    session.last_ordinal += 1
                    places.append((session.session_id, step.number, session.last_ordinal))
                await storage.record_releases(connection, places)
                await storage.write_last_ordinals(connection, [held[i] for i in {i for i, _, _ in places}])
            if released:
                await storage.forget_incoming(connection, released)
            if delivered:
                await sessions.remove_rows(connection, delivered)
        for session in current:  # a place is an ordinal without a row
            self._fronts.reached(session)
        if delivered:
            self._freed({session_id for session_id, _ in delivered})
        return outcomes
