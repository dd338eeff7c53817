"""Group work without a timer: while one batch is under way the next one fills.

    submit(item) ──► queue (bounded) ──► runner: take what is there, up to a batch ──► process(items) ──► results

Invariants: every submitted item gets exactly one outcome, its own result or an exception; nothing is dropped, not even
when a runner is cancelled (what then waits is failed with Unavailable). A full queue refuses at once with Unavailable,
so that the caller can answer "later" instead of holding memory. Under a light load a batch has one item and waits for
nobody; under a heavy one the batches grow by themselves, which is where the throughput comes from.

Whether a runner is at work is known without delay: it leaves the table in the same step in which it finds the queue
empty. A task that has returned counts as running until the loop has called its callbacks, and an item that is
submitted in that gap would wait for nobody.

A caller that is cancelled leaves its item in the batch: the work may already be under way, and its result is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from registry.errors import Unavailable

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Feeds single items to `process` in batches.

    `process` answers one entry per item, in order: a result, or an exception for that item alone. If it raises, every
    item of the batch gets that exception.
    """

    def __init__(
        self,
        name: str,
        process: Callable[[Sequence[Item]], Awaitable[Sequence[Result | BaseException]]],
        *,
        max_items: int,
        max_queued: int,
        runners: int = 1,
        observe: Callable[[int, float], None] | None = None,
        weigh: Callable[[Item], int] | None = None,
        max_weight: int = 0,
        max_queued_weight: int = 0,
    ) -> None:
        """`observe(items, seconds)` is told of each finished batch.

        With `weigh` (in bytes, or any unit), a batch takes items up to `max_weight`, but at least one, and the queue
        refuses what would bring it above `max_queued_weight`, unless it is empty.
        """
        self._loop: asyncio.AbstractEventLoop | None = None  # of the first item: to look it up takes a system call
        self._name = name
        self._process = process
        self._max_items = max_items
        self._max_queued = max_queued
        self._max_runners = runners
        self._observe = observe
        self._weigh = weigh
        self._max_weight = max_weight
        self._max_queued_weight = max_queued_weight
        self._queue: deque[tuple[Item, asyncio.Future[Result], int]] = deque()
        self._queued_weight = 0
        self._running: set[asyncio.Task[None]] = set()
        self._stopped = False
        self.turned_away = 0
        """Items for which there was no room, for the metrics."""

    @property
    def queued(self) -> int:
        """Items that wait for a batch."""
        return len(self._queue)

    @property
    def queued_weight(self) -> int:
        """What the waiting items weigh together."""
        return self._queued_weight

    @property
    def crowded(self) -> bool:
        """Whether half of the room is taken: who can, should send less for a moment, so that nobody is turned away."""
        heavy = self._weigh is not None and 2 * self._queued_weight >= self._max_queued_weight
        return heavy or 2 * len(self._queue) >= self._max_queued

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Queue one item; the future has its outcome. Raises Unavailable when the queue is full or stopped."""
        if self._stopped:
            raise Unavailable(f"{self._name} is stopping")
        if len(self._queue) >= self._max_queued:
            self.turned_away += 1
            raise Unavailable(f"{self._name} is at its limit of {self._max_queued} waiting items")
        weight = 0
        if self._weigh is not None:
            weight = self._weigh(item)
            if self._queue and self._queued_weight + weight > self._max_queued_weight:
                self.turned_away += 1
                raise Unavailable(f"{self._name} is at its limit of {self._max_queued_weight} waiting bytes")
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._queue.append((item, future, weight))
        self._queued_weight += weight
        if len(self._running) < self._max_runners:
            task = loop.create_task(self._run(), name=f"batcher {self._name}")
            self._running.add(task)
            task.add_done_callback(self._ended)
        return future

    async def stop(self) -> None:
        """Take nothing new, finish what is queued. The futures of all items are done afterwards."""
        self._stopped = True
        while self._running:
            await asyncio.wait(self._running)

    async def _run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            # One turn of the loop lets everything that became ready together join the first batch.
            await asyncio.sleep(0)
            while self._queue:
                batch = self._take()
                started = time.monotonic()
                await self._settle(batch)
                if self._observe is not None:
                    self._observe(len(batch), time.monotonic() - started)
        finally:
            self._running.discard(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        # One that was cancelled before its first step has not left the table by itself.
        self._running.discard(task)
        if task.cancelled() and not self._running:
            self._fail_queued()

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        taken = 0
        queue = self._queue
        while queue and len(batch) < self._max_items:
            item, future, weight = queue[0]
            if batch and self._weigh is not None and taken + weight > self._max_weight:
                break
            queue.popleft()
            batch.append((item, future))
            taken += weight
        self._queued_weight -= taken
        return batch

    async def _settle(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            outcomes = await self._process([item for item, _ in batch])
            if len(outcomes) != len(batch):
                raise RuntimeError(f"{self._name} answered {len(outcomes)} outcomes for {len(batch)} items")
        except BaseException as error:
            failure = Unavailable(f"{self._name} was stopped") if isinstance(error, asyncio.CancelledError) else error
            for _, future in batch:
                _fail(future, failure)
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                _fail(future, outcome)
            elif not future.done():
                future.set_result(outcome)

    def _fail_queued(self) -> None:
        while self._queue:
            _, future, _ = self._queue.popleft()
            _fail(future, Unavailable(f"{self._name} was stopped"))
        self._queued_weight = 0


def _fail(future: asyncio.Future[Result], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # a caller that went away does not make this an unseen error
