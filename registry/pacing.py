"""Long hand-outs in short steps, so that one message for thousands of receivers does not stop the loop for everybody.

    step ─► step ─► … ─► TURN steps: everybody else has a turn of the loop ─► step ─► …

Who paces keeps its own order: it begins nothing else before it is through. Between the turns anything may change, so
each step looks for itself at whether its receiver is still there.

A cancellation must not lose the rest of what is to be handed out: from then on there are no turns for others, and
`end` raises it behind the last step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Final

TURN: Final = 200
"""Steps in one turn of the loop. One takes some ten microseconds, here and again when its connection writes."""


class Pace:
    """Counts the steps of one piece of work."""

    __slots__ = ("_cancelled", "_steps")

    def __init__(self) -> None:
        self._steps = 0
        self._cancelled: asyncio.CancelledError | None = None

    async def through(self, steps: Iterable[object]) -> None:
        """Take all of them. Raises what a step raises, and no CancelledError."""
        for _ in steps:
            self._steps += 1
            if self._steps >= TURN and self._cancelled is None:
                self._steps = 0
                await self.behind(asyncio.sleep(0))

    async def behind(self, event: Awaitable[None]) -> None:
        """Wait for something before the next step; not if it is cancelled."""
        try:
            await event
        except asyncio.CancelledError as error:
            self._cancelled = error

    def end(self) -> None:
        """Behind the last step. Raises CancelledError if it came meanwhile."""
        if self._cancelled is not None:
            raise self._cancelled
