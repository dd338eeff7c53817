"""Tenants: whose everything is.

A tenant is named by its id (a UUID, never changed) or by its slug (a word for people, in addresses and tokens, unique).
No slug looks like a UUID, so a claim in a token names at most one tenant. Tenants are made and never changed or
deleted by this service; that is why `find` may remember what it found for ever, in a bounded cache, while it never
remembers what it did not find.
"""

from __future__ import annotations

import re
import unicodedata
from collections import OrderedDict
from datetime import datetime
from uuid import UUID

from registry import fields
from registry.errors import AlreadyExists, InvalidArgument, NotFound
from registry.model import Actor, Tenant, TenantId
from registry.paging import Listing, Page, decode_cursor, listing
from registry.ports import Clock
from registry.secrets import RandomBytes
from registry.storage import audit, tenants
from registry.storage.database import Database

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_MAX_SLUG = 63
"""Characters: a slug fits a DNS label (RFC 1035 §2.3.4)."""

MAX_CACHED_TENANTS = 1024
"""Tenants remembered by claim; a few hundred bytes each."""


class Tenants:
    """Makes and finds tenants."""

    def __init__(
        self, database: Database, *, clock: Clock, random: RandomBytes, max_cached: int = MAX_CACHED_TENANTS
    ) -> None:
        self._database = database
        self._clock = clock
        self._random = random
        self._max_cached = max_cached
        self._found: OrderedDict[str, Tenant] = OrderedDict()

    async def create(self, name: str, slug: str | None, actor: Actor) -> Tenant:
        """A new tenant. Without `slug` it is made from the name.

        Raises InvalidArgument (name: 1–256 characters; slug: `[a-z0-9][a-z0-9-]{0,62}`, not like a UUID) and
        AlreadyExists (the slug is taken).
        """
        tenant = Tenant(
            tenant_id=TenantId(fields.fresh_uuid(self._random)),
            name=fields.text("name", name, fields.MAX_NAME),
            slug=_checked_slug(slug if slug is not None else slug_from(name)),
            created_at=self._clock(),
        )
        async with self._database.transaction() as connection:
            if not await tenants.insert(connection, tenant):
                raise AlreadyExists(f'a tenant with slug "{tenant.slug}" already exists')
            await audit.insert(
                connection, tenant.tenant_id, actor, "create", "tenant", str(tenant.tenant_id), {"slug": tenant.slug}
            )
        return tenant

    async def find(self, claim: str) -> Tenant:
        """The tenant that a token or a command names by UUID or slug. Raises NotFound."""
        known = self._found.get(claim)
        if known is not None:
            self._found.move_to_end(claim)
            return known
        tenant = await self._look_up(claim)
        if tenant is None:
            raise NotFound("no such tenant")
        self._found[claim] = tenant
        if len(self._found) > self._max_cached:
            self._found.popitem(last=False)
        return tenant

    async def list(self, page: Page) -> Listing[Tenant]:
        """All tenants, oldest first. For platform operators only: nothing here asks who is asking."""
        after = decode_cursor(page.cursor, datetime, UUID) if page.cursor is not None else None
        async with self._database.connection() as connection:
            rows = await tenants.read(connection, after, page.limit + 1)
        return listing(rows, page, lambda tenant: (tenant.created_at, tenant.tenant_id))

    async def _look_up(self, claim: str) -> Tenant | None:
        tenant_id = _as_uuid(claim)
        if tenant_id is None and _SLUG.fullmatch(claim) is None:
            return None
        async with self._database.connection() as connection:
            if tenant_id is not None:
                return await tenants.by_id(connection, TenantId(tenant_id))
            return await tenants.by_slug(connection, claim)


def slug_from(name: str) -> str:
    """A slug made of a name's letters and digits. Raises InvalidArgument when it has none that a slug may have."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:_MAX_SLUG].rstrip("-")
    if not slug:
        raise InvalidArgument("the name has no letter or digit of ASCII to make a slug of; give a slug", field="slug")
    return slug


def _checked_slug(slug: str) -> str:
    if _SLUG.fullmatch(slug) is None:
        raise InvalidArgument(
            f"slug {fields.shown(slug)} is not accepted: it takes 1 to {_MAX_SLUG} characters of a-z 0-9 -, "
            "the first not a dash",
            field="slug",
        )
    if _as_uuid(slug) is not None:
        raise InvalidArgument("slug looks like a UUID; tenants are also named by those", field="slug")
    return slug


def _as_uuid(claim: str) -> UUID | None:
    try:
        parsed = UUID(claim)
    except ValueError:
        return None
    # UUID() also takes braces, underscores and "urn:uuid:", which are no names of ours.
    return parsed if claim.lower() in (str(parsed), parsed.hex) else None
