"""Long-running work that must not stop: a loop that fails is logged and started again, with a growing pause.

A loop that returns is a mistake of the program and treated like a failure. What is cancelled stays down: that is how
the process ends. The count of restarts is visible in the metrics, so a loop that keeps failing does not hide.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 30.0
STEADY_SECONDS = 60.0
"""A loop that ran this long starts with the first pause again."""
AGAIN_SECONDS = 1.0
"""A loop that was cancelled and goes on is cancelled again after this long."""


class Supervisor:
    """Holds the process's loops."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self.restarts = 0

    def keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` until `stop`, again and again if it ends."""
        self._tasks.append(asyncio.get_running_loop().create_task(self._keep(name, work), name=name))

    async def stop(self) -> None:
        """Cancel all loops and wait for them, the last one started first."""
        while self._tasks:
            task = self._tasks.pop()
            while not task.done():  # one that fails just then has heard its failure only, and starts again
                task.cancel()
                await asyncio.wait([task], timeout=AGAIN_SECONDS)

    async def _keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE
        while True:
            since = loop.time()
            try:
                await work()
                log.error("supervisor.loop_returned", extra={"fields": {"loop": name}})
            except Exception:  # the supervisor: whatever it was, the loop must go on
                log.exception("supervisor.loop_failed", extra={"fields": {"loop": name}})
            self.restarts += 1
            pause = FIRST_PAUSE if loop.time() - since > STEADY_SECONDS else min(LONGEST_PAUSE, pause * 2)
            await asyncio.sleep(pause)
