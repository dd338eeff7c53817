"""Loops that are told to stop, stop: also one whose own failure comes with the cancellation."""

from __future__ import annotations

import asyncio

import pytest

from edge import supervision
from edge.supervision import Supervisor


async def test_a_loop_that_fails_when_it_is_cancelled_stays_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a task group does that has a failed member by then (Python 3.11, 3.12): it raises that, and nothing else."""
    monkeypatch.setattr(supervision, "AGAIN_SECONDS", 0.01)
    started = 0

    async def fails() -> None:
        nonlocal started
        started += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("a defect") from None

    supervisor = Supervisor()
    supervisor.keep("failing", fails)
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await supervisor.stop()
    assert started == 1
