"""Group work without a timer: while one batch is under way the next one fills.

    submit(item) ──► queue (bounded) ──► runner: take what is there, up to max_items ──► process(items) ──► results

Invariants: every submitted item gets exactly one outcome, its own result or an exception; nothing is dropped, not even
when the runner is stopped (the rest is failed with Unavailable). A full queue refuses at once with Unavailable, so that
the caller can answer "later" instead of holding memory. Under a light load a batch has one item and waits for nobody;
under a heavy one the batches grow by themselves, which is where the throughput comes from.

A caller that is cancelled leaves its item in the batch: the work may already be under way, and its result is dropped.
"""

from __future__ import annotations

import asyncio
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
    ) -> None:
        """`observe(items, seconds)` is told of each finished batch."""
        self._name = name
        self._process = process
        self._max_items = max_items
        self._max_queued = max_queued
        self._max_runners = runners
        self._observe = observe
        self._queue: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._stopped = False

    @property
    def queued(self) -> int:
        """Items that wait for a batch."""
        return len(self._queue)

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Queue one item; the future has its outcome. Raises Unavailable when the queue is full or stopped."""
        if self._stopped:
            raise Unavailable(f"{self._name} is stopping")
        if len(self._queue) >= self._max_queued:
            raise Unavailable(f"{self._name} is at its limit of {self._max_queued} waiting items")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._queue.append((item, future))
        if len(self._running) < self._max_runners:
            task = loop.create_task(self._run(), name=f"batcher {self._name}")
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return future

    async def stop(self) -> None:
        """Take nothing new, finish what is queued. The futures of all items are done afterwards."""
        self._stopped = True
        while self._running:
            await asyncio.wait(self._running)

    async def _run(self) -> None:
        # One turn of the loop lets everything that became ready together join the first batch.
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(self._max_items, len(self._queue)))]
            started = loop.time()
            await self._settle(batch)
            if self._observe is not None:
                self._observe(len(batch), loop.time() - started)

    async def _settle(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            outcomes = await self._process([item for item, _ in batch])
        except BaseException as error:
            failure = Unavailable(f"{self._name} was stopped") if isinstance(error, asyncio.CancelledError) else error
            for _, future in batch:
                if not future.done():
                    future.set_exception(failure)
                    future.exception()  # a caller that went away does not make this an unseen error
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if future.done():
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
                future.exception()
            else:
                future.set_result(outcome)
