"""The registry's services on a test's own database, with a clock that stands still and ports that remember.

`Bell`, `Doors` and `Book` stand in for the feed, the teardown and the refusal log: they record what they were told.
What the real ones do is tested where they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from registry.credentials import Credentials
from registry.devices import Devices
from registry.events import EventKind
from registry.hardware_id import PatternCache
from registry.key_claim import KeyClaim
from registry.model import Actor, Contact, DeviceId, Receipt, TenantId, Transport
from registry.ports import Ended
from registry.profiles import Profiles
from registry.sealing import KeyRing
from registry.storage.database import Database
from registry.templates import Templates
from registry.tenants import Tenants

OPERATOR = Actor("operator:ada", "corr-1")
CONTACT = Contact(Transport.HTTPS, "192.0.2.7:40000", "corr-2")
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


@dataclass(slots=True)
class Clock:
    """Stands at `now` until it is moved."""

    now: datetime = NOON

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **parts: float) -> datetime:
        self.now += timedelta(**parts)
        return self.now


@dataclass(slots=True)
class Bell:
    """Counts the hints."""

    rung: int = 0

    def hint(self) -> None:
        self.rung += 1


@dataclass(slots=True)
class Doors:
    """Remembers what ended; answers a receipt without sessions."""

    ended: list[Ended] = field(default_factory=list)

    async def complete(self, ended: Ended) -> Receipt:
        self.ended.append(ended)
        return Receipt(ended.credential_id, ended.device_id, ended.revoked_at)

    async def remaining(self, ended: Ended) -> int:
        return 0


@dataclass(slots=True)
class Book:
    """Remembers the refusals: (tenant, reason, detail)."""

    refusals: list[tuple[TenantId | None, str, Mapping[str, str]]] = field(default_factory=list)

    def note(
        self,
        *,
        tenant_id: TenantId | None,
        device_id: DeviceId | None,
        kind: EventKind,
        reason: str,
        contact: Contact,
        detail: Mapping[str, str],
    ) -> None:
        assert kind is EventKind.PROVISIONING_REFUSED
        self.refusals.append((tenant_id, reason, detail))

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason, _ in self.refusals]


class Services:
    """All of them, wired to one database."""

    def __init__(self, database: Database, ring: KeyRing | None = None) -> None:
        self.database = database
        self.ring = ring or KeyRing.generate()
        self.clock, self.bell, self.doors, self.book = Clock(), Bell(), Doors(), Book()
        told: dict[str, Any] = {"clock": self.clock, "random": os.urandom}
        ending: dict[str, Any] = {"key_ring": self.ring, "feed": self.bell, "teardown": self.doors, **told}
        patterns = PatternCache()
        self.tenants = Tenants(database, **told)
        self.profiles = Profiles(database, feed=self.bell, **told)
        self.devices = Devices(database, **ending)
        self.credentials = Credentials(database, **ending)
        self.templates = Templates(database, patterns=patterns, **ending)
        self.key_claim = KeyClaim(
            database, key_ring=self.ring, feed=self.bell, refusals=self.book, patterns=patterns, **told
        )

    async def rows(self, sql: str, *arguments: Any) -> list[Any]:
        """What a query answers."""
        async with self.database.connection() as connection:
            rows: list[Any] = await connection.fetch(sql, *arguments)
            return rows

    async def kinds(self, tenant_id: TenantId) -> list[str]:
        """The kinds of the tenant's events, in their order."""
        return [
            r["kind"] for r in await self.rows("SELECT kind FROM event WHERE tenant_id = $1 ORDER BY seq", tenant_id)
        ]

    async def audited(self, tenant_id: TenantId) -> list[str]:
        """The tenant's audit as `action object_type`, in its order."""
        rows = await self.rows("SELECT action, object_type FROM audit WHERE tenant_id = $1 ORDER BY seq", tenant_id)
        return [f"{r['action']} {r['object_type']}" for r in rows]
