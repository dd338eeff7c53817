"""Every submitted item gets exactly one outcome, whatever happens to the batch, the runner or the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from registry.batching import Batcher
from registry.errors import InvalidArgument, Unavailable

SOON = 2.0
"""Seconds after which a future that should be done is taken for forgotten."""


class Gate:
    """A process that records its batches and holds each until it is let through."""

    def __init__(self, *, open_: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.began = asyncio.Event()
        self._open = asyncio.Event()
        if open_:
            self._open.set()

    def let_through(self) -> None:
        self._open.set()

    async def __call__(self, items: Sequence[int]) -> list[int | BaseException]:
        self.batches.append(list(items))
        self.began.set()
        await self._open.wait()
        return [item * 10 for item in items]


async def test_what_is_ready_together_shares_a_batch_and_what_comes_meanwhile_fills_the_next() -> None:
    gate = Gate()
    batcher: Batcher[int, int] = Batcher("numbers", gate, max_items=100, max_queued=100)
    first = [batcher.submit(n) for n in range(3)]
    await gate.began.wait()
    second = [batcher.submit(n) for n in range(3, 7)]
    gate.let_through()
    assert await asyncio.gather(*first, *second) == [n * 10 for n in range(7)]
    assert gate.batches == [[0, 1, 2], [3, 4, 5, 6]]


async def test_a_caller_that_submits_in_the_step_its_result_arrives_is_served() -> None:
    # The runner has returned by then, but the loop has not yet called the callbacks of its task.
    batcher: Batcher[int, int] = Batcher("numbers", Gate(open_=True), max_items=10, max_queued=10)
    async with asyncio.timeout(SOON):
        assert [await batcher.submit(n) for n in range(50)] == [n * 10 for n in range(50)]


async def test_a_batch_is_never_larger_than_allowed() -> None:
    gate = Gate(open_=True)
    batcher: Batcher[int, int] = Batcher("numbers", gate, max_items=4, max_queued=100)
    await asyncio.gather(*[batcher.submit(n) for n in range(10)])
    assert [len(batch) for batch in gate.batches] == [4, 4, 2]


async def test_weights_bound_the_batch_but_one_heavy_item_goes_alone() -> None:
    gate = Gate(open_=True)
    batcher: Batcher[int, int] = Batcher(
        "numbers", gate, max_items=100, max_queued=100, weigh=lambda n: n, max_weight=10, max_queued_weight=1000
    )
    await asyncio.gather(*[batcher.submit(n) for n in (4, 6, 1, 50, 9, 1)])
    assert gate.batches == [[4, 6], [1], [50], [9, 1]]


async def test_a_full_queue_refuses_at_once_and_keeps_what_it_has() -> None:
    gate = Gate()
    batcher: Batcher[int, int] = Batcher("numbers", gate, max_items=1, max_queued=2)
    running = batcher.submit(1)
    await gate.began.wait()
    waiting = [batcher.submit(2), batcher.submit(3)]
    with pytest.raises(Unavailable, match="limit of 2 waiting items"):
        batcher.submit(4)
    assert batcher.queued == 2
    gate.let_through()
    assert await asyncio.gather(running, *waiting) == [10, 20, 30]


async def test_a_queue_that_is_full_by_weight_refuses_and_takes_again_once_it_is_empty() -> None:
    gate = Gate()
    batcher: Batcher[int, int] = Batcher(
        "numbers", gate, max_items=100, max_queued=100, weigh=lambda n: n, max_weight=100, max_queued_weight=100
    )
    futures = [batcher.submit(1)]
    await gate.began.wait()
    futures.append(batcher.submit(500))  # alone in the queue: larger than its limit, and still possible
    with pytest.raises(Unavailable, match="limit of 100 waiting bytes"):
        batcher.submit(1)
    gate.let_through()
    await asyncio.gather(*futures)
    assert await batcher.submit(100) == 1000


async def test_an_exception_for_one_item_is_that_items_alone() -> None:
    async def process(items: Sequence[int]) -> list[int | BaseException]:
        return [InvalidArgument("odd") if item % 2 else item for item in items]

    batcher: Batcher[int, int] = Batcher("numbers", process, max_items=10, max_queued=10)
    outcomes = await asyncio.gather(*[batcher.submit(n) for n in range(4)], return_exceptions=True)
    assert outcomes[0] == 0
    assert outcomes[2] == 2
    assert isinstance(outcomes[1], InvalidArgument)
    assert isinstance(outcomes[3], InvalidArgument)


async def test_a_failed_batch_fails_its_items_and_the_next_one_works() -> None:
    broken = True

    async def process(items: Sequence[int]) -> list[int | BaseException]:
        if broken:
            raise OSError("no")
        return list(items)

    batcher: Batcher[int, int] = Batcher("numbers", process, max_items=10, max_queued=10)
    outcomes = await asyncio.gather(batcher.submit(1), batcher.submit(2), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [OSError, OSError]
    broken = False
    assert await batcher.submit(3) == 3


async def test_a_process_that_answers_too_few_outcomes_leaves_nobody_waiting() -> None:
    async def process(items: Sequence[int]) -> list[int | BaseException]:
        return [1]

    batcher: Batcher[int, int] = Batcher("numbers", process, max_items=10, max_queued=10)
    futures = [batcher.submit(1), batcher.submit(2)]
    async with asyncio.timeout(SOON):
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [RuntimeError, RuntimeError]


async def test_a_cancelled_caller_takes_no_other_item_with_it() -> None:
    gate = Gate()
    batcher: Batcher[int, int] = Batcher("numbers", gate, max_items=10, max_queued=10)
    gone, stays = batcher.submit(1), batcher.submit(2)
    await gate.began.wait()
    gone.cancel()
    gate.let_through()
    assert await stays == 20
    assert gate.batches == [[1, 2]]


async def test_stop_takes_nothing_new_and_finishes_what_is_queued() -> None:
    gate = Gate()
    batcher: Batcher[int, int] = Batcher("numbers", gate, max_items=1, max_queued=10)
    futures = [batcher.submit(n) for n in range(3)]
    await gate.began.wait()
    stopping = asyncio.create_task(batcher.stop())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="stopping"):
        batcher.submit(9)
    gate.let_through()
    await stopping
    assert [future.result() for future in futures] == [0, 10, 20]


@pytest.mark.parametrize("begun", [True, False], ids=["during a batch", "before its first step"])
async def test_a_cancelled_runner_fails_everything_that_waits_and_a_new_one_takes_over(begun: bool) -> None:
    gate = Gate()
    batcher: Batcher[int, int] = Batcher("numbers", gate, max_items=1, max_queued=10)
    before = asyncio.all_tasks()
    futures = [batcher.submit(n) for n in range(3)]
    (runner,) = asyncio.all_tasks() - before
    if begun:
        await gate.began.wait()
    runner.cancel()
    async with asyncio.timeout(SOON):
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
    gate.let_through()
    assert await batcher.submit(7) == 70
    await batcher.stop()


async def test_two_runners_have_two_batches_under_way() -> None:
    gate = Gate()
    batcher: Batcher[int, int] = Batcher("numbers", gate, max_items=1, max_queued=10, runners=2)
    futures = [batcher.submit(n) for n in range(4)]
    async with asyncio.timeout(SOON):
        while len(gate.batches) < 2:
            await asyncio.sleep(0)
    assert gate.batches == [[0], [1]]
    gate.let_through()
    assert await asyncio.gather(*futures) == [0, 10, 20, 30]


async def test_finished_batches_are_observed() -> None:
    seen: list[int] = []
    batcher: Batcher[int, int] = Batcher(
        "numbers", Gate(open_=True), max_items=2, max_queued=10, observe=lambda items, seconds: seen.append(items)
    )
    futures = [batcher.submit(n) for n in range(3)]
    await batcher.stop()
    assert [future.result() for future in futures] == [0, 10, 20]
    assert seen == [2, 1]


async def test_half_full_is_crowded_by_items_or_by_weight() -> None:
    gate = Gate()
    batcher: Batcher[int, int] = Batcher(
        "numbers",
        gate,
        max_items=1,
        max_queued=4,
        runners=1,
        weigh=lambda item: item,
        max_weight=9,
        max_queued_weight=100,
    )
    futures = [batcher.submit(1)]
    await gate.began.wait()  # one is under way, none waits
    assert not batcher.crowded
    futures.append(batcher.submit(1))
    assert not batcher.crowded
    futures.append(batcher.submit(49))
    assert batcher.crowded
    gate.let_through()
    await asyncio.gather(*futures)
    assert not batcher.crowded
    futures = [batcher.submit(1) for _ in range(3)]
    assert batcher.crowded
    await asyncio.gather(*futures)
