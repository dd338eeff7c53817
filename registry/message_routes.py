"""Routes: written in groups, followed by version.

    subscribe, watch ──► batch: lock sessions, raise the tenants' versions, write ──► commit ──► router, other nodes
    publish ──► `refresh` inside its transaction ──► the router has every route committed before ──► route

Invariants
- A subscription that was acknowledged is known to every publication that begins afterwards, on any node: a batch of
  publications reads what is above its versions before it routes. Hints and the poll only keep that small.
- A slice that was read from version v holds everything above v that was committed, in order; so of two slices that
  overlap, each applies what is above the version reached by then, and none leaves a hole.

What can race: a subscription with a publication that is under way; it may or may not get that message. What can be
lost: nothing; interests of a process that dies are removed by its successor, or by whoever finds it dead.

A follower that was away longer than removed routes are kept starts over with all of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from registry.batching import Batcher
from registry.errors import Unavailable
from registry.messaging_values import (
    NodeRoute,
    OutcomeOpen,
    Ownership,
    RouteChange,
    Router,
    SessionLost,
    SessionRoute,
    StoredSessionId,
    StoredSubscription,
)
from registry.model import NodeId, TenantId
from registry.storage import messaging_routes as storage
from registry.storage import messaging_sessions as sessions
from registry.storage.commits import certain_transaction
from registry.storage.database import Connection, Database

KEEP_REMOVED_SECONDS = 3600.0
"""How long a removed route stays for its followers."""
_START_OVER_SECONDS = KEEP_REMOVED_SECONDS / 2
_BATCH = 500
_QUEUE = 20_000
"""Changes that may wait: every session of a node that reconnects brings a few."""
RETRY_PAUSES = (0.05, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class _Subscribe:
    ownership: Ownership
    subscriptions: tuple[StoredSubscription, ...]


@dataclass(frozen=True, slots=True)
class _Unsubscribe:
    ownership: Ownership
    filters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Interest:
    tenant_id: TenantId
    route: NodeRoute


_Change = _Subscribe | _Unsubscribe | _Interest


@dataclass(slots=True)
class _Followed:
    version: int
    read_at: float


class MessageRoutes:
    """The routes of the tenants that this node serves."""

    def __init__(self, database: Database, node_id: NodeId, router: Router, hint_all: Callable[[], None]) -> None:
        self._database = database
        self._node_id = node_id
        self._router = router
        self._hint_all = hint_all
        self._followed: dict[TenantId, _Followed] = {}
        self._watched: Counter[tuple[TenantId, NodeRoute]] = Counter()
        self._written: set[tuple[TenantId, NodeRoute]] = set()
        self._left: set[tuple[TenantId, NodeRoute]] = set()
        """Interests that nobody had any more when the database was away."""
        self._batcher: Batcher[_Change, None] = Batcher(
            "message routes", self._process, max_items=_BATCH, max_queued=_QUEUE
        )

    async def stop(self) -> None:
        """Write what is queued."""
        await self._batcher.stop()

    # Writing ------------------------------------------------------------------------------------------------------

    async def subscribe(self, ownership: Ownership, subscriptions: Sequence[StoredSubscription]) -> None:
        """Add or replace. Raises SessionLost, Unavailable."""
        await self._batcher.submit(_Subscribe(ownership, tuple(subscriptions)))

    async def unsubscribe(self, ownership: Ownership, filters: Sequence[str]) -> None:
        """Remove; what is not there does no harm. Raises SessionLost, Unavailable."""
        await self._batcher.submit(_Unsubscribe(ownership, tuple(filters)))

    async def watch(self, tenant_id: TenantId, route: NodeRoute) -> None:
        """One more session here has this subscription; the first one's is written. Raises Unavailable: not counted."""
        key = (tenant_id, route)
        self._watched[key] += 1
        if key in self._written:
            return
        try:
            await self._batcher.submit(_Interest(tenant_id, route))
        except BaseException:
            self._uncount(key)
            raise

    async def unwatch(self, tenant_id: TenantId, route: NodeRoute) -> None:
        """One less. Never raises: a route that stays until `tidy` costs a message that nobody wants."""
        key = (tenant_id, route)
        self._uncount(key)
        if key in self._watched:
            return
        self._written.discard(key)
        try:
            await self._batcher.submit(_Interest(tenant_id, route))
        except Unavailable:
            self._left.add(key)

    async def tidy(self) -> None:
        """Take away the interests that `unwatch` could not. Raises Unavailable; then it is to be called again."""
        left = list(self._left)
        for start in range(0, len(left), _BATCH):
            part = left[start : start + _BATCH]
            self._left.difference_update(part)
            try:
                await asyncio.gather(*(self._batcher.submit(_Interest(*each)) for each in part))
            except BaseException:
                self._left.update(part)
                raise

    async def write_again(self) -> None:
        """All interests, after this node was taken for dead. Raises Unavailable; then it is to be called again."""
        self._written.clear()
        watched = list(self._watched)
        for start in range(0, len(watched), _BATCH):
            await asyncio.gather(*(self._batcher.submit(_Interest(*each)) for each in watched[start : start + _BATCH]))

    # Following ----------------------------------------------------------------------------------------------------

    def follows(self, tenant_id: TenantId) -> bool:
        """Whether the router has this tenant's routes."""
        return tenant_id in self._followed

    def followed(self) -> list[TenantId]:
        """The tenants whose routes the router has."""
        return list(self._followed)

    def forget(self, tenant_id: TenantId) -> None:
        """Nobody of this tenant is here any more; the router drops its table by itself."""
        self._followed.pop(tenant_id, None)

    async def refresh(
        self, connection: Connection, tenants: Collection[TenantId], *, followed_only: bool = False
    ) -> None:
        """Give the router what is new of these tenants, or all of one that is not followed yet; `followed_only`: of
        those that are not forgotten meanwhile."""
        waiting = set(tenants)
        while waiting:
            now = asyncio.get_running_loop().time()
            after = {tenant_id: self._reached(tenant_id, now) for tenant_id in waiting}
            read = {each.tenant_id: each for each in await storage.read(connection, after, self._node_id)}
            waiting.clear()
            for tenant_id, version in after.items():
                if followed_only and tenant_id not in self._followed:
                    continue
                if (version is None) != (self._reached(tenant_id, now) is None):
                    waiting.add(tenant_id)  # loaded by somebody else meanwhile, or forgotten: what was read is a part
                    continue
                changes = read[tenant_id].changes if tenant_id in read else []
                self._apply(tenant_id, changes, whole=version is None, now=now)

    def _reached(self, tenant_id: TenantId, now: float) -> int | None:
        """The version that the router has, None to start over."""
        known = self._followed.get(tenant_id)
        return None if known is None or now - known.read_at > _START_OVER_SECONDS else known.version

    def _apply(self, tenant_id: TenantId, changes: list[tuple[int, RouteChange]], *, whole: bool, now: float) -> None:
        reached = 0 if whole else self._followed[tenant_id].version if tenant_id in self._followed else 0
        fresh = [change for version, change in changes if version > reached]
        latest = changes[-1][0] if changes else 0
        self._followed[tenant_id] = _Followed(max(reached, latest), now)
        if fresh or whole:
            self._router.changed(tenant_id, fresh, whole=whole)

    # The batch ----------------------------------------------------------------------------------------------------

    async def _process(self, changes: Sequence[_Change]) -> Sequence[BaseException | None]:
        """One outcome for each; tried again while the database is away, which does no harm twice."""
        for pause in (*RETRY_PAUSES, None):
            try:
                outcomes, tenants = await self._write(changes)
                break
            except (OutcomeOpen, Unavailable):
                if pause is None:
                    raise
                await asyncio.sleep(pause)
        try:
            async with self._database.connection() as connection:
                await self.refresh(connection, [t for t in tenants if t in self._followed], followed_only=True)
        except Unavailable:
            pass  # every publication refreshes before it routes
        if tenants:
            self._hint_all()
        return outcomes

    async def _write(self, changes: Sequence[_Change]) -> tuple[list[BaseException | None], set[TenantId]]:
        owned = {c.ownership.session_id for c in changes if not isinstance(c, _Interest)}
        put: dict[tuple[StoredSessionId, str], SessionRoute] = {}
        gone: dict[tuple[StoredSessionId, str], TenantId] = {}
        interests: dict[tuple[TenantId, NodeRoute], bool] = {}
        outcomes: list[BaseException | None] = []
        async with certain_transaction(self._database) as connection:
            held = await sessions.lock(connection, owned) if owned else {}
            for change in changes:
                if isinstance(change, _Interest):
                    interest = (change.tenant_id, change.route)
                    interests[interest] = interest in self._watched  # as it is now, not as it was when it was queued
                    if not interests[interest]:
                        self._written.discard(interest)
                    outcomes.append(None)
                    continue
                session = held.get(change.ownership.session_id)
                if session is None or session.epoch != change.ownership.epoch or session.node_id != self._node_id:
                    outcomes.append(SessionLost())
                    continue
                outcomes.append(None)
                if isinstance(change, _Subscribe):
                    for one in change.subscriptions:
                        put[session.session_id, one.filter] = SessionRoute(session.session_id, session.key, one)
                        gone.pop((session.session_id, one.filter), None)
                else:
                    for text in change.filters:
                        gone[session.session_id, text] = session.key.tenant_id
                        put.pop((session.session_id, text), None)
            tenants = {route.key.tenant_id for route in put.values()} | set(gone.values())
            tenants |= {tenant_id for tenant_id, _ in interests}
            if tenants:
                versions = await storage.raise_versions(connection, tenants)
                await storage.put_sessions(connection, versions, list(put.values()))
                await storage.remove_filters(
                    connection,
                    versions,
                    [(tenant_id, session_id, text) for (session_id, text), tenant_id in gone.items()],
                )
                await storage.put_nodes(connection, versions, [(t, r, there) for (t, r), there in interests.items()])
        self._written.update(interest for interest, there in interests.items() if there)
        return outcomes, tenants

    def _uncount(self, key: tuple[TenantId, NodeRoute]) -> None:
        self._watched[key] -= 1
        if self._watched[key] <= 0:
            del self._watched[key]
