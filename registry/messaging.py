"""Skeleton: the public face of brokered messaging. Being filled; the signatures stand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from registry.messaging_values import (
    Message,
    Opening,
    Ownership,
    Publication,
    Published,
    Relay,
    Retained,
    Router,
    Routing,
    StoredSession,
    StoredSessionId,
    StoredSubscription,
    Taken,
)
from registry.model import DeviceId, NodeId, ProfileId, TenantId
from registry.storage.database import Database


@dataclass(frozen=True, slots=True)
class MessagingLimits:
    """How much the broker keeps."""

    queued_messages: int = 1_000
    queued_bytes: int = 1_048_576


class Messaging:
    """Brokered messaging of one node."""

    def __init__(
        self,
        database: Database,
        node_id: NodeId,
        *,
        clock: Callable[[], float],
        random: Callable[[int], bytes],
        limits: MessagingLimits = MessagingLimits(),  # frozen
    ) -> None:
        raise NotImplementedError

    # Life of the service.
    async def start(self, router: Router) -> None:
        """Join: what an earlier process of this node held is let go. Raises Unavailable."""
        raise NotImplementedError

    async def run(self) -> None:
        """Follow routes, relays, queues and evictions; wills, expiries, dead nodes. Cancel it to stop."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Finish what is queued, then leave."""
        raise NotImplementedError

    # Sessions.
    async def take(self, opening: Opening) -> Taken:
        """Begin or resume a session. Raises Unavailable, ResourceExhausted (sessions of the device)."""
        raise NotImplementedError

    async def release(
        self, ownership: Ownership, *, publish_will: bool, expiry: float | None = None, unsent: Sequence[int] = ()
    ) -> None:
        """The connection is gone; expiry and will delay begin to run. `unsent`: ordinals that were never sent."""
        raise NotImplementedError

    async def end(self, ownership: Ownership, *, publish_will: bool = False) -> None:
        """The session is over: subscriptions, queue and incoming ids go."""
        raise NotImplementedError

    async def subscribe(self, ownership: Ownership, subscriptions: Sequence[StoredSubscription]) -> None:
        """Add or replace; when it returns every node's next publication finds them. Raises SessionLost, Unavailable."""
        raise NotImplementedError

    async def unsubscribe(self, ownership: Ownership, filters: Sequence[str]) -> None:
        """Likewise."""
        raise NotImplementedError

    async def watch(self, tenant_id: TenantId, filter_text: str, *, stored: bool, qos: int) -> None:
        """A session that lives here has this subscription; counted, one call for each. Raises Unavailable."""
        raise NotImplementedError

    async def unwatch(self, tenant_id: TenantId, filter_text: str, *, stored: bool, qos: int) -> None:
        """Its opposite; never raises."""
        raise NotImplementedError

    # Messages in.
    def publish(self, publication: Publication) -> asyncio.Future[Published]:
        """Route and store; done when committed. Every QoS 1 and 2 message and every retained one goes this way."""
        raise NotImplementedError

    def enqueue(self, publication: Publication, routing: Routing) -> asyncio.Future[Published]:
        """Store for exactly these recipients (a retained message for a new subscription); retains nothing."""
        raise NotImplementedError

    def relay(self, publication: Publication, relays: Sequence[Relay]) -> bool:
        """Send a QoS 0 message to other nodes, best effort. False: no room, dropped."""
        raise NotImplementedError

    # Messages out: each future raises SessionLost or Unavailable.
    def delivered(self, ownership: Ownership, ordinal: int) -> asyncio.Future[None]:
        """The subscriber has it (or it was discarded): the row goes."""
        raise NotImplementedError

    def received(self, ownership: Ownership, ordinal: int) -> asyncio.Future[None]:
        """PUBREC came: from the commit on only PUBREL is sent."""
        raise NotImplementedError

    def released(self, ownership: Ownership, packet_id: int) -> asyncio.Future[None]:
        """PUBREL came: the incoming id is forgotten."""
        raise NotImplementedError

    # Retained.
    async def retained_topics(self, tenant_id: TenantId, prefix: str) -> list[str]:
        """Topics of living retained messages that begin with `prefix` (the filter up to its first wildcard)."""
        raise NotImplementedError

    async def retained(self, tenant_id: TenantId, topics: Sequence[str]) -> list[Retained]:
        """The messages of these topics that there are."""
        raise NotImplementedError

    async def forget_retained(self, tenant_id: TenantId, topics: Sequence[str]) -> int:
        """Remove, as when the grant is gone; how many went."""
        raise NotImplementedError
