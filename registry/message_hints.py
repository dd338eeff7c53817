"""Hints between nodes that messaging has something for them: what is in the tables is the truth, these only hurry.

    something for a node ─► gathered for some milliseconds ─► one NOTIFY: [sender, node, …] or [sender, "*"]
    a NOTIFY of another node ─► heard ─► for us: wake

A NOTIFY takes a lock that all notifying commits share, so it is sent apart from the transactions, and several become
one. A hint that is lost, with the connection that listens or otherwise, costs a second: everybody looks that often.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from uuid import UUID

from registry.errors import Unavailable
from registry.model import NodeId
from registry.storage.database import Database, is_away

log = logging.getLogger(__name__)

CHANNEL = "gatehouse_messaging"
_GATHER_SECONDS = 0.002
_EVERY_NODE = "*"
_PAYLOAD_BYTES = 7_000
"""PostgreSQL takes 8,000 in a NOTIFY."""


class MessageHints:
    """Those of one node's process. `run` it to hear the others'."""

    def __init__(
        self,
        database: Database,
        node_id: NodeId,
        incarnation: UUID,
        *,
        wake: Callable[[], None],
        heard: Callable[[], None],
    ) -> None:
        """`heard` is called for every hint of another process, `wake` for those that concern this node."""
        self._database = database
        self._node_id = node_id
        self._sender = str(incarnation)
        self._wake = wake
        self._heard = heard
        self._gathered: set[str] = set()
        self._sending: set[asyncio.Task[None]] = set()

    def everybody(self) -> None:
        """Other nodes are to look soon."""
        self._send_soon({_EVERY_NODE})

    def these(self, nodes: set[NodeId]) -> None:
        """These are to look soon, this one among them."""
        if self._node_id in nodes:
            self._wake()
        self._send_soon({node for node in nodes if node != self._node_id})

    async def settled(self) -> None:
        """Wait until nothing is being sent."""
        while self._sending:
            await asyncio.wait(self._sending)

    async def run(self) -> None:
        """Listen, for ever; survives the loss of the database."""
        while True:
            try:
                connection = await self._database.dedicated()
            except Unavailable:
                await asyncio.sleep(1.0)
                continue
            closed = asyncio.Event()
            try:
                connection.add_termination_listener(lambda *_, closed=closed: closed.set())
                await connection.add_listener(CHANNEL, self._on_notify)
                self._wake()
                await closed.wait()
            except Exception as error:
                if not is_away(error):
                    raise
            finally:
                connection.terminate()
            await asyncio.sleep(0.1)

    def _send_soon(self, names: set[str]) -> None:
        if not names:
            return
        before, self._gathered = self._gathered, self._gathered | names
        if not before:
            task = asyncio.get_running_loop().create_task(self._send(), name="messaging hint")
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self) -> None:
        await asyncio.sleep(_GATHER_SECONDS)
        names, self._gathered = sorted(self._gathered), set()
        payload = json.dumps([self._sender, *names])
        if len(payload) > _PAYLOAD_BYTES:
            payload = json.dumps([self._sender, _EVERY_NODE])
        try:
            async with self._database.connection() as connection:
                await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, payload)
        except Unavailable:
            log.info("messaging.hint_lost", extra={"fields": {"node": self._node_id}})

    def _on_notify(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        try:
            sender, *names = json.loads(str(payload))
        except ValueError:
            return
        if sender == self._sender:
            return
        self._heard()
        if self._node_id in names or _EVERY_NODE in names:
            self._wake()
