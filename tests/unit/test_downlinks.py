"""Attachments are served together, never twice at once, again after the database was away, and not after they left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from uuid import uuid4

from registry.downlinks import Attachment, Downlinks
from registry.errors import Unavailable
from registry.model import DeviceId, TenantId
from tests.nodes import until


def attachment() -> Attachment:
    return Attachment(TenantId(uuid4()), DeviceId(uuid4()), None)


class Served:
    """Remembers the batches; waits in each until it is let go, and fails as often as it is told."""

    def __init__(self, failures: int = 0, *, hold: bool = False) -> None:
        self.batches: list[list[Attachment]] = []
        self.failures = failures
        self.gate = asyncio.Event()
        if not hold:
            self.gate.set()

    async def __call__(self, attachments: Sequence[Attachment]) -> None:
        self.batches.append(list(attachments))
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise Unavailable("the database is away")


async def test_who_comes_together_is_served_together_in_bounded_batches() -> None:
    served = Served()
    downlinks: Downlinks[Attachment] = Downlinks("test", served, at_once=4)
    everyone = [attachment() for _ in range(10)]
    for each in everyone:
        downlinks.add(each)
    await until(lambda: sum(map(len, served.batches)) == 10)
    assert [len(batch) for batch in served.batches] == [4, 4, 2]
    assert [each for batch in served.batches for each in batch] == everyone
    await downlinks.stop()


async def test_who_is_stirred_while_being_served_is_served_again_afterwards() -> None:
    served = Served(hold=True)
    downlinks: Downlinks[Attachment] = Downlinks("test", served)
    one = attachment()
    downlinks.add(one)
    await until(lambda: len(served.batches) == 1)
    downlinks.stir(one.device_id)
    downlinks.stir(one.device_id)
    await asyncio.sleep(0)
    assert len(served.batches) == 1, "served twice at once"
    served.gate.set()
    await until(lambda: len(served.batches) == 2)
    await downlinks.stop()
    assert served.batches == [[one], [one]]


async def test_a_lost_database_delays_and_loses_nobody() -> None:
    served = Served(failures=3)
    downlinks: Downlinks[Attachment] = Downlinks("test", served, at_once=2, retry_seconds=0.001)
    everyone = [attachment() for _ in range(3)]
    for each in everyone:
        downlinks.add(each)
    await until(lambda: served.failures == 0 and {a for batch in served.batches[3:] for a in batch} == set(everyone))
    await downlinks.stop()


async def test_who_has_left_is_not_served() -> None:
    served = Served()
    downlinks: Downlinks[Attachment] = Downlinks("test", served)
    one, other = attachment(), attachment()
    downlinks.add(one)
    downlinks.add(other)
    downlinks.remove(one)
    downlinks.remove(one)
    downlinks.stir(one.device_id)
    await until(lambda: bool(served.batches))
    await downlinks.stop()
    assert served.batches == [[other]]
    assert not one.live
    assert downlinks.of(one.device_id) == []
    downlinks.stir(other.device_id)  # stopped: nothing begins any more
    assert len(served.batches) == 1
