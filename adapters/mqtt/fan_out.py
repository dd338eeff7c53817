"""What is handed out from memory alone, tenant by tenant, so that one tenant's crowd does not stop the loop.

    put ─► the tenant's line ─► one message after the other, a turn of the loop for everybody after some steps ─► done

Invariants: of one tenant, messages are handed out in the order in which they were put here. While its line is `busy`,
whoever hands out by itself overtakes. The line is as long as publishers may have messages unanswered; it is gone when
it is empty. What can be lost: QoS 0, when the process ends.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterator

from registry.model import TenantId
from registry.pacing import Pace

log = logging.getLogger(__name__)

_Line = deque[tuple[Iterator[None], Callable[[], None]]]


class FanOut:
    """Hands out messages in steps. `start` runs a task to its end."""

    def __init__(self, start: Callable[[Coroutine[object, object, None]], None]) -> None:
        self._start = start
        self._lines: dict[TenantId, _Line] = {}

    def busy(self, tenant_id: TenantId) -> bool:
        """Whether something of the tenant is handed out now."""
        return tenant_id in self._lines

    def put(self, tenant_id: TenantId, steps: Iterator[None], done: Callable[[], None]) -> None:
        """Take these steps behind what the tenant has here, then call `done`."""
        line = self._lines.get(tenant_id)
        if line is not None:
            line.append((steps, done))
            return
        self._lines[tenant_id] = line = deque([(steps, done)])
        self._start(self._run(tenant_id, line))

    async def _run(self, tenant_id: TenantId, line: _Line) -> None:
        pace = Pace()
        while line:
            steps, done = line.popleft()
            try:
                try:
                    await pace.through(steps)
                finally:
                    done()  # in any case: its publisher may only have so many on their way
            except Exception:  # one message that cannot be handled: those behind it are not to blame
                log.exception("mqtt.not_delivered")
        del self._lines[tenant_id]
        pace.end()
