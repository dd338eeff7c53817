"""The application's start and stop, by ASGI's lifespan protocol.

Theory
------
    QUIET ──start()──▶ asked ──startup.complete──▶ RUNNING ──stop()──▶ asked ──shutdown.complete──▶ STOPPED
                         └─ the application raises before it has received anything: it has no lifespan, and needs none
An application that raises after it has heard `lifespan.startup` has failed to start, and the server must not.
"""

from __future__ import annotations

import asyncio
from typing import Any

from adapters.http.exchange import AsgiApp, Message


class LifespanFailed(Exception):
    """The application could not start or stop; the message is its own."""


class Lifespan:
    """Runs the lifespan task of `app`. `state` is what the application shares with its requests."""

    def __init__(self, app: AsgiApp) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._outbox: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._heard = False

    async def start(self) -> None:
        """Start the application. Raises LifespanFailed when it says or shows that it cannot."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        self._task = asyncio.create_task(self._run(scope))
        await self._ask("lifespan.startup", "lifespan.startup.complete")

    async def stop(self) -> None:
        """Stop the application, if it started and has a lifespan. Raises LifespanFailed when it says it failed."""
        if self._task is None or self._task.done():
            return
        await self._ask("lifespan.shutdown", "lifespan.shutdown.complete")
        await self._task

    async def _run(self, scope: dict[str, Any]) -> None:
        await self._app(scope, self._receive, self._send)

    async def _ask(self, question: str, expected: str) -> None:
        assert self._task is not None
        self._inbox.put_nowait({"type": question})
        answer = asyncio.ensure_future(self._outbox.get())
        try:
            await asyncio.wait((answer, self._task), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                message = answer.result()
                if message["type"] != expected:
                    raise LifespanFailed(f"{message['type']}: {message.get('message', '')}")
                return
        finally:
            answer.cancel()
        error = self._task.exception()
        if error is not None and self._heard:
            raise LifespanFailed(f"the application raised on {question}") from error

    async def _receive(self) -> Message:
        self._heard = True
        return await self._inbox.get()

    async def _send(self, message: Message) -> None:
        self._outbox.put_nowait(message)
