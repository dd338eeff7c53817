"""Revocation's second half: after the commit, every matching session on every node is closed, and a receipt says so.

    operator's node                                      every other node
    commit (credential row + event row)
    complete(ended) ── hint ───────────────────────────► feed delivers the event (hint, or poll, or catch-up)
      close own sessions                                   close own sessions
      wait for the others' reports, under a deadline ◄──── teardown_report row
      Receipt: sessions, remaining

The commit alone decides: from then on the credential is refused everywhere, whatever happens to this code. The feed
drives the closing on every node, this one included; `complete` only does it sooner here and collects the reports. Both
roads meet in one table of closings by event number, so a session is closed and reported once.

What can be lost: a NOTIFY (the poll finds the event), a report (the receipt then counts what the mirror knows of the
silent node as `remaining`; an operator sees that it is not confirmed), this process (its sessions die with it).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime
from typing import Any

from registry.errors import RegistryError, Unavailable
from registry.events import TEARDOWN, Event, EventKind, NewEvent
from registry.feed import Feed, Seen
from registry.model import Actor, ClosedSession, NodeId, Receipt
from registry.observation import NOBODY, Observer
from registry.ports import Ended
from registry.resolver import Resolver
from registry.sessions import Scope, Session, SessionTable
from registry.storage import events, nodes
from registry.storage.database import Database

log = logging.getLogger(__name__)

RECEIPT_SECONDS = 5.0
"""How long an operator waits for the other nodes' reports; the teardown goes on after it."""
_CLOSINGS_KEPT = 4096
_SESSION_EVENTS_AT_ONCE = 1000

_REASONS = {
    EventKind.CREDENTIAL_REVOKED: "credential revoked",
    EventKind.DEVICE_DEACTIVATED: "device inactive",
    EventKind.DEVICE_DELETED: "device deleted",
    EventKind.SESSION_KICKED: "kicked by an operator",
}

_STALE = frozenset(
    {
        EventKind.DEVICE_UPDATED,
        EventKind.DEVICE_ACTIVATED,
        EventKind.DEVICE_PROVISIONED,
        EventKind.CREDENTIAL_ISSUED,
        EventKind.CREDENTIAL_ROTATED,
    }
)
"""Events that change what the resolver's cache may say of a device."""


class Teardown:
    """Closes what ended. Follows the feed, and serves the services after their commits (ports.Teardown)."""

    def __init__(
        self,
        database: Database,
        feed: Feed,
        sessions: SessionTable,
        resolver: Resolver,
        *,
        clock: Callable[[], datetime],
        observer: Observer = NOBODY,
    ) -> None:
        self._database = database
        self._feed = feed
        self._sessions = sessions
        self._resolver = resolver
        self._clock = clock
        self._closings: OrderedDict[int, asyncio.Task[list[ClosedSession]]] = OrderedDict()
        self._background: set[asyncio.Task[Any]] = set()
        self._observer = observer

    async def complete(self, ended: Ended) -> Receipt:
        """Close the sessions of what a committed transaction ended, on all nodes; bounded by RECEIPT_SECONDS, here and
        for the others."""
        scope = Scope(ended.tenant_id, ended.device_id, ended.credential_id, ended.session_id)
        if ended.device_id is not None:
            self._resolver.forget(ended.device_id)
        age_seconds = max(0.0, (self._clock() - ended.revoked_at).total_seconds())
        closing = self._close_once(ended.event_seq, scope, ended.reason, age_seconds)
        self._feed.hint()
        closed = list(await asyncio.shield(closing))
        remaining = self._sessions.remaining(scope)
        silent: list[NodeId] = []
        try:
            others = await self._others()
            if others:
                reported, silent = await self._collect(ended.event_seq, others)
                closed += reported
            remaining += await self._still_mirrored(scope, [n for n in others if n not in silent])
        except Unavailable as error:
            # The commit stands and the feed goes on closing; only this receipt cannot vouch for the other nodes.
            log.warning(
                "revocation.unconfirmed", extra={"fields": {"event_seq": ended.event_seq, "reason": error.message}}
            )
        if silent:
            log.warning("revocation.silent_nodes", extra={"fields": {"event_seq": ended.event_seq, "nodes": silent}})
        return Receipt(
            credential_id=ended.credential_id,
            device_id=ended.device_id,
            revoked_at=ended.revoked_at,
            sessions=closed,
            remaining=remaining,
        )

    async def remaining(self, ended: Ended) -> int:
        """How many sessions an earlier end has not been seen to close: here, and in the mirror of all other nodes.

        Raises Unavailable.
        """
        scope = Scope(ended.tenant_id, ended.device_id, ended.credential_id, ended.session_id)
        return self._sessions.remaining(scope) + await self._still_mirrored(scope, [])

    # -- the feed's follower ---------------------------------------------------------------------------------------

    async def follow(self, seen: Seen) -> None:
        """Forget, and close, what an event ended."""
        event = seen.event
        if event.device_id is not None and (event.kind in TEARDOWN or event.kind in _STALE):
            self._resolver.forget(event.device_id)
        if event.kind in TEARDOWN:
            reason = _REASONS[event.kind]
            self._spawn(self._follow_end(event, reason, seen.age_seconds), f"teardown {event.position.seq}")
        elif event.kind is EventKind.CREDENTIAL_ROTATED and seen.settled and event.device_id is not None:
            self._spawn(self._sweep(event), f"refresh {event.position.seq}")

    async def restored(self) -> None:
        """The feed was away: nothing remembered may be trusted, and no session either."""
        self._resolver.forget_all()
        self._spawn(self.sweep(), "sweep after a lost feed")

    async def sweep(self) -> None:
        """Compare all live sessions with the store; the periodic safety net."""
        try:
            closed = await self._sessions.sweep()
        except Unavailable:
            return
        await self._record_closed(closed, "credential no longer valid")

    async def expire(self) -> None:
        """Close the sessions whose credential has ended by its own date; call it every second."""
        await self._record_closed(await self._sessions.expire(), "credential expired")

    async def stop(self) -> None:
        """Wait for closings under way."""
        while self._background:
            await asyncio.wait(self._background)

    # -- closing ---------------------------------------------------------------------------------------------------

    def _close_once(
        self, event_seq: int, scope: Scope, reason: str, age_seconds: float
    ) -> asyncio.Task[list[ClosedSession]]:
        task = self._closings.get(event_seq)
        if task is None:
            task = self._spawn(self._close(scope, reason, age_seconds), f"closing {event_seq}")
            self._closings[event_seq] = task
            while len(self._closings) > _CLOSINGS_KEPT:
                self._closings.popitem(last=False)
        return task

    async def _close(self, scope: Scope, reason: str, age_seconds: float) -> list[ClosedSession]:
        started = time.monotonic()
        doomed = self._sessions.matching(scope)
        ended_here = [s for s in doomed if not s.closed]  # another end may be closing some of them, and tells of those
        closed = await self._sessions.close(doomed, reason, age_seconds=age_seconds)
        # Who was admitted before the commit may enter the table meanwhile, to be refused at its second reading. Who is
        # live by now has passed that: its device was let in again, and may come and go for ever.
        while found := [s for s in self._sessions.matching(scope) if not s.live]:
            if time.monotonic() - started >= RECEIPT_SECONDS:
                break
            ended_here += [s for s in found if not s.closed]
            closed += await self._sessions.close(found, reason, age_seconds=age_seconds)
        if closed:
            self._observer.revocation_torn_down(age_seconds + time.monotonic() - started)
            self._spawn(self._record_closed(ended_here, reason), "session events")
        return closed

    async def _follow_end(self, event: Event, reason: str, age_seconds: float) -> None:
        scope = Scope(event.tenant_id, event.device_id, event.credential_id, event.session_id)
        known = event.position.seq in self._closings
        closed = await asyncio.shield(self._close_once(event.position.seq, scope, reason, age_seconds))
        if known:
            return  # `complete` answers the operator itself, or an early delivery was reported already
        remaining = self._sessions.remaining(scope)
        try:
            async with self._database.connection() as connection:
                await nodes.report(connection, event.position.seq, self._sessions.node_id, closed, remaining)
        except RegistryError as error:
            log.warning(
                "revocation.unreported", extra={"fields": {"event_seq": event.position.seq, "reason": error.message}}
            )

    async def _sweep(self, event: Event) -> None:
        try:
            closed = await self._sessions.sweep(event.device_id)
        except Unavailable:
            return  # the periodic sweep comes again
        await self._record_closed(closed, "credential no longer valid")

    async def _record_closed(self, closed: list[Session], reason: str) -> None:
        for start in range(0, len(closed), _SESSION_EVENTS_AT_ONCE):
            part = closed[start : start + _SESSION_EVENTS_AT_ONCE]
            try:
                async with self._database.connection() as connection:
                    await events.insert_many(connection, [_session_closed(s, reason) for s in part])
            except Unavailable:
                log.warning("session.closed_unrecorded", extra={"fields": {"sessions": len(part), "reason": reason}})
            for session in part:
                log.info(
                    "session.closed",
                    extra={
                        "fields": {
                            "session": str(session.session_id),
                            "device": str(session.device_id),
                            "transport": session.contact.transport.value,
                            "reason": reason,
                        }
                    },
                )
        if closed:
            self._feed.hint()

    # -- the other nodes -------------------------------------------------------------------------------------------

    async def _others(self) -> list[NodeId]:
        async with self._database.connection() as connection:
            return await nodes.others(connection, self._sessions.node_id)

    async def _collect(self, event_seq: int, others: list[NodeId]) -> tuple[list[ClosedSession], list[NodeId]]:
        """The reports of the other nodes, and who has not reported when the time is up."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + RECEIPT_SECONDS
        pause = 0.002
        while True:
            async with self._database.connection() as connection:
                reports = await nodes.reports(connection, event_seq)
            silent = [n for n in others if n not in reports]
            if not silent or loop.time() >= deadline:
                return [s for n in others if n in reports for s in reports[n][0]], silent
            await asyncio.sleep(pause)
            pause = min(0.05, pause * 1.5)

    async def _still_mirrored(self, scope: Scope, confirmed: list[NodeId]) -> int:
        """Sessions that the mirror shows on the other nodes, living or not, but the `confirmed` ones."""
        async with self._database.connection() as connection:
            return await nodes.count_mirrored(
                connection,
                scope.tenant_id,
                [self._sessions.node_id, *confirmed],
                scope.device_id,
                scope.credential_id,
                scope.session_id,
            )

    def _spawn(self, work: Any, name: str) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _session_closed(session: Session, reason: str) -> NewEvent:
    return NewEvent(
        EventKind.SESSION_CLOSED,
        session.tenant_id,
        Actor("system:sessions", session.contact.correlation_id),
        device_id=session.device_id,
        credential_id=session.identity.credential_id,
        session_id=session.session_id,
        data={"reason": reason, "transport": session.contact.transport.value, "peer": session.contact.peer},
    )
