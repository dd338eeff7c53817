"""Tenants: whose everything is.

A tenant is named by its id (a UUID, never changed) or by its slug (a word for people, in addresses and tokens, unique).
No slug looks like a UUID, so a claim in a token names at most one tenant. Tenants are made and never changed or
deleted by this service; that is why `find` may remember what it found for ever, in a bounded cache, while it never
remembers what it did not find.
"""

from __future__ import annotations

from registry.model import Actor, Tenant
from registry.paging import Listing, Page
from registry.ports import Clock
from registry.secrets import RandomBytes
from registry.storage.database import Database

MAX_CACHED_TENANTS = 1024
"""Tenants remembered by claim; a few hundred bytes each."""


class Tenants:
    """Makes and finds tenants."""

    def __init__(
        self, database: Database, *, clock: Clock, random: RandomBytes, max_cached: int = MAX_CACHED_TENANTS
    ) -> None: ...

    async def create(self, name: str, slug: str | None, actor: Actor) -> Tenant:
        """A new tenant. Without `slug` it is made from the name.

        Raises InvalidArgument (name: 1–256 characters; slug: `[a-z0-9][a-z0-9-]{0,62}`, not like a UUID) and
        AlreadyExists (the slug is taken).
        """
        raise NotImplementedError

    async def find(self, claim: str) -> Tenant:
        """The tenant that a token or a command names by UUID or slug. Raises NotFound."""
        raise NotImplementedError

    async def list(self, page: Page) -> Listing[Tenant]:
        """All tenants, oldest first. For platform operators only: nothing here asks who is asking."""
        raise NotImplementedError
