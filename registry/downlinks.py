"""Who wants to hear of a device on this node, and one task that serves those for whom something may be new.

    attach ─► stirred ─┐
    event  ─► stirred ─┼─► task: take some of the stirred ──► serve(them): one query for all ──► their listeners
    feed restored ─────┘         ▲ again, while any is stirred; after a pause where the database was away

Commands and configuration go down this way. An event only says *that* something may be new; what is new is read from
the database, behind what the attachment has had already. So a lost, doubled or early event costs a reading, never a
wrong delivery, and a storm of reconnecting devices costs one query for each few hundred of them.

One task serves, so an attachment is never served twice at once. What can race: an attachment that is removed while it
is being served; whoever serves looks at `live` before each delivery.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from registry.errors import Unavailable
from registry.model import DeviceId, TenantId

SERVED_AT_ONCE = 256
"""Attachments in one query: it stays within some milliseconds."""
RETRY_SECONDS = 0.5
"""The pause after the database was away."""


@dataclass(slots=True, eq=False)
class Attachment:
    """A transport's interest in one device, while a session lives that may hear of it."""

    tenant_id: TenantId
    device_id: DeviceId
    via: DeviceId | None
    """The gateway whose session it is, if it is not the device's own. It is served while the device is its child."""
    live: bool = field(default=True, init=False)


Attached = TypeVar("Attached", bound=Attachment)


class Downlinks(Generic[Attached]):
    """The attachments of one node."""

    def __init__(
        self,
        name: str,
        serve: Callable[[Sequence[Attached]], Awaitable[None]],
        *,
        at_once: int = SERVED_AT_ONCE,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        """`serve` brings these attachments up to date; when it raises Unavailable they are served again."""
        self._name = name
        self._serve = serve
        self._at_once = at_once
        self._retry_seconds = retry_seconds
        self._by_device: dict[DeviceId, list[Attached]] = {}
        self._stirred: dict[Attached, None] = {}
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def add(self, attachment: Attached) -> None:
        """Serve it from now on, beginning at once."""
        self._by_device.setdefault(attachment.device_id, []).append(attachment)
        self.stir_one(attachment)

    def remove(self, attachment: Attached) -> None:
        """Serve it no more. Idempotent."""
        if not attachment.live:
            return
        attachment.live = False
        self._stirred.pop(attachment, None)
        siblings = self._by_device[attachment.device_id]
        siblings.remove(attachment)
        if not siblings:
            del self._by_device[attachment.device_id]

    def of(self, device_id: DeviceId) -> list[Attached]:
        """A copy of a device's attachments."""
        return list(self._by_device.get(device_id, ()))

    def stir(self, device_id: DeviceId) -> None:
        """Something may be new for a device."""
        for attachment in self._by_device.get(device_id, ()):
            self.stir_one(attachment)

    def stir_one(self, attachment: Attached) -> None:
        """Something may be new for an attachment."""
        if self._stopped or not attachment.live:
            return
        self._stirred[attachment] = None
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name=self._name)
            self._task.add_done_callback(self._ended)

    def stir_all(self) -> None:
        """Something may be new for anybody."""
        for attachments in self._by_device.values():
            for attachment in attachments:
                self.stir_one(attachment)

    async def stop(self) -> None:
        """Serve nobody any more; waits for what is under way."""
        self._stopped = True
        self._stirred.clear()
        if self._task is not None:
            await asyncio.wait((self._task,))

    async def _run(self) -> None:
        await asyncio.sleep(0)  # one turn of the loop: who was stirred together is served together
        while self._stirred:
            taken = list(islice(self._stirred, self._at_once))
            for attachment in taken:
                del self._stirred[attachment]
            try:
                await self._serve(taken)
            except Unavailable:
                if self._stopped:
                    return
                self._stirred = dict.fromkeys(a for a in (*taken, *self._stirred) if a.live)
                await asyncio.sleep(self._retry_seconds)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if self._stirred and not task.cancelled():  # stirred after its last look, or it failed: who is left is served
            self.stir_one(next(iter(self._stirred)))
