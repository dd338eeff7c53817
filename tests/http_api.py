"""The HTTP API for tests: a running core on a test's database, the application over it, and clients of both kinds.

`api` serves the application through ASGI alone; `https` puts it behind the real server over TLS, with sessions that
live as long as their connections. Import the fixtures that a test file uses.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from adapters.http.app import HttpApi, HttpApiSettings, create_app
from adapters.http.server import HttpsServer
from adapters.tls.context import TlsContext
from registry.certificates import Certificates, ForeignCertificates
from registry.children import Children
from registry.claim_psk import ClaimPsks
from registry.commands import Commands
from registry.core import Registry
from registry.credentials import Credentials
from registry.device_config import DeviceConfigs
from registry.devices import Devices
from registry.enrolment import Enrolment
from registry.event_log import EventLog
from registry.feed import Feed
from registry.hardware_id import PatternCache
from registry.key_claim import KeyClaim
from registry.kick import Kick
from registry.model import Actor, NodeId, TenantId
from registry.node import Node
from registry.operators import IssuerKey, OperatorVerifier, mint
from registry.permissions import Permission, Role
from registry.presence import Presence
from registry.profiles import Profiles
from registry.refusals import Refusals
from registry.registration_tokens import RegistrationTokens
from registry.resolver import Resolver
from registry.revocation import Teardown
from registry.revocation_lists import RevocationLists
from registry.sealing import KeyRing
from registry.sessions import SessionTable
from registry.storage.database import Database
from registry.templates import Templates
from registry.tenants import Tenants
from registry.trust import open_trust
from registry.uplinks import Uplinks
from tests.tls_peers import Holder, client_context, make_certificate

BASE = "/api/v1"


def now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Seen:
    """An observer that remembers what was answered."""

    answers: list[tuple[str, str, int]] = field(default_factory=list)

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.answers.append((route, method, status))


@dataclass
class Api:
    """A core and its API."""

    registry: Registry
    database: Database
    issuer: IssuerKey
    http: HttpApi
    seen: Seen
    tenant_id: TenantId
    slug: str
    ring: KeyRing

    def token(
        self,
        role: Role = Role.TENANT_ADMIN,
        *,
        tenant: str | None = None,
        permissions: frozenset[Permission] = frozenset(),
        ttl: timedelta = timedelta(minutes=10),
        subject: str = "ada",
        at: datetime | None = None,
    ) -> str:
        return mint(
            self.issuer,
            self.issuer.kid,
            subject=subject,
            tenant=tenant or self.slug,
            role=role,
            permissions=permissions,
            ttl=ttl,
            now=at or now(),
        )

    async def another_tenant(self) -> str:
        """The slug of one more tenant."""
        made = await self.registry.tenants.create("Another", f"other-{uuid4().hex[:8]}", Actor("system:test", "c"))
        return made.slug

    def client(self, **headers: str) -> httpx.AsyncClient:
        """A client without a connection: through ASGI."""
        transport = httpx.ASGITransport(app=self.http.asgi, raise_app_exceptions=False, client=("192.0.2.9", 4711))
        return httpx.AsyncClient(transport=transport, base_url="https://gatehouse.test", headers=headers)

    def operator(self, **parts: Any) -> httpx.AsyncClient:
        """An operator's client."""
        return self.client(authorization=f"Bearer {self.token(**parts)}")

    def device(self, api_key: str) -> httpx.AsyncClient:
        """A device's client."""
        return self.client(authorization=f"Bearer {api_key}")

    async def registered(self, hardware_id: str = "HW-1", **more: Any) -> dict[str, Any]:
        """A registered device: the answer of POST /devices."""
        async with self.operator() as operator:
            body = {"name": "A device", "hardware_id": hardware_id} | more
            answer = await operator.post(f"{BASE}/devices", json=body)
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made


@dataclass
class Https:
    """The API behind the real server."""

    api: Api
    server: HttpsServer
    port: int
    holder: Holder

    def client(self, *, certificate: Path | None = None, **headers: str) -> httpx.AsyncClient:
        """A client that keeps one connection; `certificate` is a PEM file of its own."""
        context: ssl.SSLContext = client_context(self.holder, certificate=certificate)
        return httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{self.port}",
            verify=context,
            headers=headers,
            limits=httpx.Limits(max_connections=1),
            timeout=20,
        )

    def device(self, api_key: str) -> httpx.AsyncClient:
        return self.client(authorization=f"Bearer {api_key}")

    def operator(self, **parts: Any) -> httpx.AsyncClient:
        return self.client(authorization=f"Bearer {self.api.token(**parts)}")


@asynccontextmanager
async def running_api(
    dsn: str,
    settings: HttpApiSettings | None = None,
    name: str = "one",
    clock: Callable[[], datetime] = now,
    ring: KeyRing | None = None,
) -> AsyncIterator[Api]:
    """A core with one tenant, running until the block ends. A second node of a database needs the first one's ring."""
    database = await Database.open(dsn, size=8)
    ring = ring or KeyRing.generate()
    issuer = IssuerKey.generate()
    feed = Feed(database, NodeId(name))
    refusals = Refusals(database, feed)
    resolver = Resolver(
        database,
        ring,
        refusals,
        clock=clock,
        random=os.urandom,
        feed_trusted=lambda: feed.trusted,
        hint=feed.hint,
    )
    sessions = SessionTable(NodeId(name), resolver, clock=clock, feed_lost_seconds=feed.lost_seconds)
    teardown = Teardown(database, feed, sessions, resolver, clock=clock)
    feed.add_follower(teardown)
    node = Node(database, sessions, teardown, clock=clock)
    patterns = PatternCache()
    trust = await open_trust(database, ring, clock=clock, random=os.urandom)
    feed.add_follower(trust.live)
    certificates = Certificates(database, trust.live, clock=clock, random=os.urandom)
    shared: dict[str, Any] = {
        "key_ring": ring,
        "clock": clock,
        "random": os.urandom,
        "feed": feed,
        "issuer": certificates,
    }
    credentials = Credentials(database, teardown=teardown, **shared)
    told: dict[str, Any] = {"clock": now, "feed": feed}
    commands = Commands(database, random=os.urandom, **told)
    device_configs = DeviceConfigs(database, **told)
    children = Children(database, random=os.urandom, feed_trusted=lambda: feed.trusted, **told)
    for follower in (commands, device_configs, children):
        feed.add_follower(follower)
    registry = Registry(
        tenants=Tenants(database, clock=clock, random=os.urandom),
        operators=OperatorVerifier({issuer.kid: issuer.public}),
        profiles=Profiles(database, clock=clock, random=os.urandom, feed=feed),
        devices=Devices(database, teardown=teardown, **shared),
        credentials=credentials,
        templates=Templates(
            database, teardown=teardown, patterns=patterns, key_ring=ring, clock=clock, random=os.urandom, feed=feed
        ),
        key_claim=KeyClaim(database, refusals=refusals, patterns=patterns, **shared),
        claim_psks=ClaimPsks(database, ring, refusals, clock=clock, random=os.urandom),
        registration_tokens=RegistrationTokens(
            database, certificates, clock=clock, random=os.urandom, feed=feed, refusals=refusals
        ),
        certificates=certificates,
        foreign_certificates=ForeignCertificates(credentials, trust.live),
        enrolment=Enrolment(database, certificates, clock=clock, feed=feed, refusals=refusals, teardown=teardown),
        revocation_lists=RevocationLists(database, trust.live, clock=clock),
        resolver=resolver,
        sessions=sessions,
        uplinks=Uplinks(database),
        commands=commands,
        device_configs=device_configs,
        children=children,
        presence=Presence(database, NodeId(name), clock=now, feed=feed),
        event_log=EventLog(database, feed, refusals),
        kick=Kick(database, sessions, teardown, clock=clock),
        node=node,
        feed=feed,
        refusals=refusals,
        clock=clock,
    )
    seen = Seen()
    http = create_app(registry, settings or HttpApiSettings(), seen)
    await feed.start()
    await node.join()
    tasks = [asyncio.create_task(each.run()) for each in (feed, node, refusals, commands, registry.presence)]
    slug = f"acme-{uuid4().hex[:8]}"
    tenant = await registry.tenants.create("Acme", slug, Actor("system:test", "c"))
    try:
        yield Api(registry, database, issuer, http, seen, tenant.tenant_id, slug, ring)
    finally:
        await registry.uplinks.stop()
        await teardown.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await commands.stop()
        await device_configs.stop()
        await registry.presence.stop()
        await certificates.stop()
        await registry.revocation_lists.stop()
        await trust.live.stop()
        await resolver.stop()
        await registry.claim_psks.stop()
        await node.leave()
        await feed.close()
        await database.close()


@asynccontextmanager
async def serving(api: Api, *, hot: bool = True, certificate: Holder | None = None) -> AsyncIterator[Https]:
    """The real server over `api`, until the block ends. Without `hot` every request goes through the router."""
    held = certificate or make_certificate()
    context = TlsContext(held.credentials(), alpn=(b"http/1.1",), session_name=b"gatehouse test")
    server = HttpsServer(api.http.asgi, context, hot=api.http.hot if hot else None)
    port = await server.start("127.0.0.1", 0)
    try:
        yield Https(api, server, port, held)
    finally:
        await server.drain(1.0)


@pytest.fixture
async def api(dsn: str) -> AsyncIterator[Api]:
    """The API through ASGI alone."""
    async with running_api(dsn) as running:
        yield running


@pytest.fixture(params=["hot", "router"])
async def https(api: Api, request: pytest.FixtureRequest) -> AsyncIterator[Https]:
    """The API over TLS, once with the hot handler and once without: one behaviour."""
    async with serving(api, hot=request.param == "hot") as running:
        yield running


def is_uuid(text: str) -> bool:
    return str(UUID(text)) == text
