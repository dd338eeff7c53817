"""Nodes for tests: the admission core of one node on a database, as many as a test wants, with closers it can watch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import uuid4

from registry import secrets
from registry.events import EventKind, NewEvent
from registry.feed import Feed
from registry.model import (
    Actor,
    ApiKey,
    Contact,
    CredentialId,
    CredentialKind,
    DeviceId,
    NodeId,
    Receipt,
    TenantId,
    Transport,
)
from registry.node import Node
from registry.ports import Ended
from registry.refusals import Refusals
from registry.resolver import Resolver
from registry.revocation import Teardown
from registry.sealing import KeyRing
from registry.secrets import Secret, SecretKind
from registry.sessions import Session, SessionTable
from registry.storage import credentials, events
from registry.storage.database import Database

ACTOR = Actor("operator:test", "c0")


@dataclass(eq=False)
class WatchedCloser:
    """A connection that a test holds. `stubborn` never closes politely."""

    stubborn: bool = False
    reasons: list[str] = field(default_factory=list)
    aborted: bool = False

    async def close(self, reason: str) -> None:
        self.reasons.append(reason)
        if self.stubborn:
            await asyncio.Event().wait()

    def abort(self) -> None:
        self.aborted = True


@dataclass
class TestNode:
    """One node's admission core, running."""

    __test__ = False

    database: Database
    feed: Feed
    refusals: Refusals
    resolver: Resolver
    sessions: SessionTable
    teardown: Teardown
    node: Node

    def contact(self) -> Contact:
        return Contact(Transport.HTTPS, "127.0.0.1:1", uuid4().hex)

    async def connect(self, key: Secret[str], closer: WatchedCloser | None = None) -> tuple[Session, WatchedCloser]:
        """Admit a key and open a session, as an adapter does."""
        closer = closer or WatchedCloser()
        contact = self.contact()
        identity = await self.resolver.admit(ApiKey(secrets.digest(key.reveal())), contact)
        return await self.sessions.open(identity, contact, closer), closer


@asynccontextmanager
async def running_node(
    dsn: str,
    name: str,
    ring: KeyRing,
    *,
    polite_seconds: float = 0.2,
    run: bool = True,
    cache_entries: int = 1000,
    sweep_seconds: float = 30.0,
) -> AsyncIterator[TestNode]:
    """A node that follows the feed and beats until the block ends."""
    database = await Database.open(dsn, size=4)
    feed = Feed(database, NodeId(name))
    refusals = Refusals(database, feed)
    resolver = Resolver(
        database,
        ring,
        refusals,
        clock=now,
        random=os.urandom,
        feed_trusted=lambda: feed.trusted,
        hint=feed.hint,
        cache_entries=cache_entries,
    )
    sessions = SessionTable(
        NodeId(name), resolver, clock=now, feed_lost_seconds=feed.lost_seconds, polite_seconds=polite_seconds
    )
    teardown = Teardown(database, feed, sessions, resolver, clock=now)
    feed.add_follower(teardown)
    node = Node(database, sessions, teardown, clock=now, sweep_seconds=sweep_seconds)
    await feed.start()
    await node.join()
    tasks = [asyncio.create_task(feed.run()), asyncio.create_task(node.run())] if run else []
    try:
        yield TestNode(database, feed, refusals, resolver, sessions, teardown, node)
    finally:
        await teardown.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await resolver.stop()
        await node.leave()
        await feed.close()
        await database.close()


async def issue_key(database: Database, tenant_id: TenantId, device_id: DeviceId) -> tuple[CredentialId, Secret[str]]:
    """An API key for a device, below the services."""
    key = secrets.generate(SecretKind.API_KEY, os.urandom)
    credential_id = CredentialId(uuid4())
    async with database.transaction() as connection:
        await credentials.insert(
            connection,
            credentials.NewCredential(
                tenant_id, device_id, credential_id, CredentialKind.API_KEY, secrets.digest(key.reveal()), now()
            ),
        )
    return credential_id, key


async def revoke(database: Database, tenant_id: TenantId, credential_id: CredentialId) -> Ended:
    """Commit a revocation; carrying it out is the caller's."""
    revoked_at = now()
    async with database.transaction() as connection:
        credential = await credentials.get(connection, tenant_id, credential_id)
        assert credential is not None
        seq = await credentials.revoke(connection, credential, revoked_at, "test", ACTOR)
    assert seq is not None
    return Ended(seq, tenant_id, revoked_at, device_id=credential.device_id, credential_id=credential_id)


async def note_event(database: Database, tenant_id: TenantId, device_id: DeviceId) -> int:
    """Any event of a device."""
    async with database.transaction() as connection:
        return await events.insert(
            connection, NewEvent(EventKind.DEVICE_UPDATED, tenant_id, ACTOR, device_id=device_id)
        )


def closed_sessions(receipt: Receipt) -> set[str]:
    """The ids in a receipt."""
    return {str(s.session_id) for s in receipt.sessions}


def now() -> datetime:
    return datetime.now(UTC)


async def until(condition: object, *, seconds: float = 20.0) -> None:
    """Wait until `condition()` holds; fail after `seconds`."""
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
