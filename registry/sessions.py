"""Live sessions of this node: the table that a revocation closes.

                 open(identity)                              close / expire / sweep
    (nothing) ───────────────► pending ──recheck──► live ───────────────► closing ──► (nothing)
                                  │ refused, or closed meanwhile            ▲
                                  └─────────────────────────────────────────┘ ended() by the adapter: the peer left

Order in `open` closes the race with a concurrent revocation (DESIGN, the funnel, 4): the session stands in the table
*before* its credential is read again. A revocation that commits before that reading refuses it; one that commits after
finds the session in the table, pending or live, and closes it. A session closed while pending is not admitted.

Closing is polite first, under a deadline, then abrupt; all matching sessions at once. Closing changes the table, so
the matches are copied first. The truth about a session is this memory; the database mirror (mirror.py) is for looking.

Limits: sessions in total and per device. Hitting one refuses the newcomer; it never throws out somebody who is in.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from msgspec.structs import replace

from registry.errors import ResourceExhausted, Unauthenticated, Unavailable
from registry.model import (
    ClosedSession,
    Contact,
    CredentialId,
    DeviceId,
    Identity,
    NodeId,
    SessionId,
    TenantId,
    Transport,
)
from registry.observation import NOBODY, AuthOutcome, CloseReason, Limit, Observer
from registry.resolver import Resolver
from registry.storage.identifiers import random_uuid

_SWEPT_AT_ONCE = 2000
_CLOSING_AT_ONCE = 500
"""Sessions closed in one turn of the loop: more would hold up everybody else's traffic."""


_COUNTED_AS = {
    "kicked by an operator": CloseReason.KICKED,
    "credential expired": CloseReason.EXPIRED,
}
"""Reasons of a closing that are not a revocation, as the metrics name them; `ended` has the peer's and the drain's."""


class Closer(Protocol):
    """What an adapter gives with a session: how to end it."""

    async def close(self, reason: str) -> None:
        """End it politely in the protocol's words; returns when the transport is closed. May be cancelled."""

    def abort(self) -> None:
        """End it now. Must not fail, and may be called at any time, more than once."""


class _Gone:
    """The closer of a session that has ended. Who was it holds the session too: that cycle ends here."""

    async def close(self, reason: str) -> None: ...

    def abort(self) -> None: ...


_GONE = _Gone()


@dataclass(slots=True, eq=False)
class Session:
    """One authenticated connection. Adapters hold it and check `closed` before they act for it."""

    session_id: SessionId
    identity: Identity
    contact: Contact
    opened_at: datetime
    closer: Closer
    live: bool = False
    closed: bool = False
    last_active: float = 0.0
    """Loop time of the last request or packet; set by the adapter."""

    @property
    def tenant_id(self) -> TenantId:
        return self.identity.tenant_id

    @property
    def device_id(self) -> DeviceId:
        return self.identity.device_id


@dataclass(frozen=True, slots=True)
class Scope:
    """Which sessions an end concerns: one session, or one credential's, or all of a device's."""

    tenant_id: TenantId
    device_id: DeviceId | None = None
    credential_id: CredentialId | None = None
    session_id: SessionId | None = None


class SessionTable:
    """The sessions of one node."""

    def __init__(
        self,
        node_id: NodeId,
        resolver: Resolver,
        *,
        clock: Callable[[], datetime],
        feed_lost_seconds: Callable[[], float],
        feed_grace_seconds: float = 10.0,
        max_sessions: int = 50_000,
        max_per_device: int = 100,
        polite_seconds: float = 2.0,
        observer: Observer = NOBODY,
    ) -> None:
        """`polite_seconds`: how long a peer may take to let itself be closed, before its transport is aborted."""
        self.node_id = node_id
        self._resolver = resolver
        self._clock = clock
        self._feed_lost_seconds = feed_lost_seconds
        self._feed_grace_seconds = feed_grace_seconds
        self._max_sessions = max_sessions
        self._max_per_device = max_per_device
        self._polite_seconds = polite_seconds
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._by_id: dict[SessionId, Session] = {}
        self._by_device: dict[DeviceId, dict[SessionId, Session]] = {}
        self._expiries: list[tuple[datetime, int, SessionId]] = []
        self._seen: dict[DeviceId, datetime] = {}
        self._seen_taken = 0.0
        self._draining = False

    async def open(self, identity: Identity, contact: Contact, closer: Closer) -> Session:
        """Admit an identity on a connection.

        Raises Unauthenticated (refused by the fresh reading, or revoked meanwhile), ResourceExhausted (a limit),
        Unavailable (the database, or the revocation feed, is away). The caller calls `ended` when the connection ends.
        """
        try:
            session = await self._open(identity, contact, closer)
        except Unavailable:
            self._observer.auth_attempted(contact.transport, AuthOutcome.UNAVAILABLE)
            raise
        self._observer.auth_attempted(contact.transport, AuthOutcome.ADMITTED)
        return session

    def ended(self, session: Session) -> None:
        """The connection is gone, whoever ended it. Idempotent."""
        if session.live:  # nobody closed it here: its peer left, or its listener drains
            reason = CloseReason.DRAIN if self._draining else CloseReason.PEER
            self._observer.session_closed(session.contact.transport, reason)
        session.closed = True
        session.live = False
        session.closer = _GONE
        if self._by_id.pop(session.session_id, None) is None:
            return
        siblings = self._by_device[session.device_id]
        del siblings[session.session_id]
        if not siblings:
            del self._by_device[session.device_id]

    def take_seen(self) -> dict[DeviceId, datetime]:
        """Devices that were active since the last call, and when; at most as many as had sessions."""
        now, loop_now = self._clock(), self._loop.time()
        seen, self._seen = self._seen, {}
        for session in self._by_id.values():
            if session.last_active > self._seen_taken:
                seen[session.device_id] = now
        self._seen_taken = loop_now
        return seen

    def put_back_seen(self, seen: Mapping[DeviceId, datetime]) -> None:
        """What `take_seen` gave and could not be written; the next call gives it again, or what is newer."""
        self._seen = {**seen, **self._seen}

    def all(self) -> list[Session]:
        """A copy of the live ones."""
        return [s for s in self._by_id.values() if s.live]

    def count(self) -> dict[Transport, int]:
        """Live sessions by transport."""
        counts = dict.fromkeys(Transport, 0)
        for session in self._by_id.values():
            counts[session.contact.transport] += session.live
        return counts

    def matching(self, scope: Scope) -> list[Session]:
        """A copy of those that a scope concerns, pending ones included."""
        if scope.session_id is not None:
            session = self._by_id.get(scope.session_id)
            candidates: Iterable[Session] = () if session is None else (session,)
        elif scope.device_id is not None:
            candidates = self._by_device.get(scope.device_id, {}).values()
        else:
            candidates = self._by_id.values()
        return [
            s
            for s in candidates
            if s.tenant_id == scope.tenant_id
            and (scope.credential_id is None or s.identity.credential_id == scope.credential_id)
        ]

    def remaining(self, scope: Scope) -> int:
        """How many of a scope's sessions are still here after all that matched were closed.

        Who entered the table after that and is pending is none of them: the second reading comes after the commit, and
        refuses it.
        """
        return sum(s.live or s.closed for s in self.matching(scope))

    async def close(self, sessions: list[Session], reason: str, *, age_seconds: float = 0.0) -> list[ClosedSession]:
        """Close these sessions concurrently: politely under a deadline, then abruptly.

        Answers each with its time since the revocation's commit. `age_seconds`: how long ago that commit was when this
        node learned of it.
        """
        learned = time.monotonic()  # uvloop's own time has whole milliseconds
        counted_as = _COUNTED_AS.get(reason, CloseReason.REVOKED)
        for session in sessions:  # from here on no adapter acts for them any more
            if session.live:
                self._observer.session_closed(session.contact.transport, counted_as)
            session.closed = True
            session.live = False
        closed: list[ClosedSession] = []
        closing: list[asyncio.Task[float]] = []
        for start in range(0, len(sessions), _CLOSING_AT_ONCE):
            part = sessions[start : start + _CLOSING_AT_ONCE]
            closing += [asyncio.create_task(self._close_one(s, s.closer, reason)) for s in part]
            await asyncio.sleep(0)  # all deadlines run at once, and the others get their turns in between
        for session, task in zip(sessions, closing, strict=True):
            after = age_seconds + max(0.0, await task - learned)
            closed.append(
                ClosedSession(session.session_id, session.contact.transport, self.node_id, round(1000 * after, 3))
            )
        return closed

    async def expire(self) -> list[Session]:
        """Close the sessions whose credential has ended by its own date; call it every second or so."""
        now = self._clock()
        due: list[Session] = []
        while self._expiries and self._expiries[0][0] <= now:
            _, _, session_id = heapq.heappop(self._expiries)
            session = self._by_id.get(session_id)
            if session is None or session.closed:
                continue
            expires_at = session.identity.expires_at
            if expires_at is not None and expires_at <= now:
                due.append(session)
        await self.close(due, "credential expired")
        return due

    async def sweep(self, only: DeviceId | None = None) -> list[Session]:
        """Compare live sessions with the store: close those that it would not admit, take over changed expiries.

        The safety net under the feed, and the way a rotation's overlap reaches open sessions. Raises Unavailable.
        """
        sessions = list(self._by_device.get(only, {}).values()) if only is not None else self.all()
        doomed: list[Session] = []
        for start in range(0, len(sessions), _SWEPT_AT_ONCE):
            doomed += await self._sweep_part(sessions[start : start + _SWEPT_AT_ONCE])
        doomed = [s for s in doomed if not s.closed]  # an end that came meanwhile tells of its own
        await self.close(doomed, "credential no longer valid")
        return doomed

    async def _sweep_part(self, sessions: list[Session]) -> list[Session]:
        states = await self._resolver.states(list({s.identity.credential_id for s in sessions}))
        doomed: list[Session] = []
        for session in sessions:
            state = states.get(session.identity.credential_id)
            if state is None or self._resolver.judge(state) is not None:
                doomed.append(session)
            elif _is_sooner(state.expires_at, session.identity.expires_at):
                session.identity = replace(session.identity, expires_at=state.expires_at)
                self._expect_expiry(session)
        return doomed

    def drain(self) -> None:
        """Admit nobody new: the node is going away."""
        self._draining = True

    # -- the table -------------------------------------------------------------------------------------------------

    async def _open(self, identity: Identity, contact: Contact, closer: Closer) -> Session:
        self._check_room(identity)
        opened_at, active_at = self._clock(), self._loop.time()
        session = Session(SessionId(random_uuid()), identity, contact, opened_at, closer, last_active=active_at)
        self._insert(session)
        try:
            confirmed = await self._resolver.recheck(identity, contact)
            # A sweep may have shortened the pending session's life after this reading: the earlier end holds.
            swept = session.identity.expires_at
            if _is_sooner(swept, confirmed.expires_at):
                confirmed = replace(confirmed, expires_at=swept)
            session.identity = confirmed
            if session.closed:
                raise Unauthenticated("revoked while the session was being opened")
        except BaseException:
            self.ended(session)
            raise
        session.live = True
        self._seen[session.device_id] = session.opened_at
        self._expect_expiry(session)
        return session

    def _check_room(self, identity: Identity) -> None:
        if self._draining:
            raise Unavailable("this node is shutting down")
        if self._feed_lost_seconds() > self._feed_grace_seconds:
            raise Unavailable("this node has lost the database's events and admits nobody until they are back")
        if len(self._by_id) >= self._max_sessions:
            self._observer.limit_hit(Limit.SESSIONS)
            raise ResourceExhausted(f"this node has its {self._max_sessions} sessions", retry_after=5.0)
        if len(self._by_device.get(identity.device_id, ())) >= self._max_per_device:
            self._observer.limit_hit(Limit.SESSIONS_PER_DEVICE)
            raise ResourceExhausted(f"the device has its {self._max_per_device} sessions", retry_after=1.0)

    def _insert(self, session: Session) -> None:
        self._by_id[session.session_id] = session
        self._by_device.setdefault(session.device_id, {})[session.session_id] = session

    def _expect_expiry(self, session: Session) -> None:
        if session.identity.expires_at is None:
            return
        if len(self._expiries) > 2 * len(self._by_id) + 1000:  # entries of sessions that ended early pile up
            self._expiries = [entry for entry in self._expiries if entry[2] in self._by_id]
            heapq.heapify(self._expiries)
        heapq.heappush(self._expiries, (session.identity.expires_at, session.session_id.int, session.session_id))

    async def _close_one(self, session: Session, closer: Closer, reason: str) -> float:
        try:
            async with asyncio.timeout(self._polite_seconds):
                await closer.close(reason)
        except Exception:  # the end of a connection: however the polite way failed, the abrupt one remains
            closer.abort()
        finally:
            self.ended(session)
        return time.monotonic()


def _is_sooner(end: datetime | None, known: datetime | None) -> bool:
    """Whether a credential's end is news beside the known one: ends only come nearer, so the sooner was read later."""
    return end is not None and (known is None or end < known)
