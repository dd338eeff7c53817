"""Tenants: made once, found by id and slug."""

from __future__ import annotations

import asyncio

import pytest

from registry.errors import AlreadyExists, InvalidArgument, NotFound
from registry.model import Tenant
from registry.paging import Page
from registry.storage.database import Database
from tests.services import NOON, OPERATOR, Services


@pytest.fixture
def services(database: Database) -> Services:
    return Services(database)


async def test_a_tenant_is_found_by_id_and_slug(services: Services) -> None:
    made = await services.tenants.create("Nordlicht GmbH & Co. KG", None, OPERATOR)

    assert (made.slug, made.name, made.created_at) == ("nordlicht-gmbh-co-kg", "Nordlicht GmbH & Co. KG", NOON)
    for claim in (made.slug, str(made.tenant_id), str(made.tenant_id).upper()):
        assert await services.tenants.find(claim) == made
        assert await services.tenants.find(claim) == made  # remembered
    assert await services.audited(made.tenant_id) == ["create tenant"]


BAD_SLUGS = ["", "-a", "A", "a_b", "ä", "a" * 64, "a\n", "0" * 32, "11111111-1111-1111-1111-111111111111", "a\x00"]
BAD_NAMES = ["", " ", "x" * 257, "a\x00b", "two\nlines", "\u202eevil", "\ud800"]


async def test_slugs_and_names_that_are_refused(services: Services) -> None:
    refusals = [("Tenant", slug, "slug") for slug in BAD_SLUGS] + [(name, "slug", "name") for name in BAD_NAMES]
    for name, slug, field in refusals:
        with pytest.raises(InvalidArgument) as refused:
            await services.tenants.create(name, slug, OPERATOR)
        assert refused.value.field == field, (name, slug)


async def test_a_name_without_ascii_needs_a_slug(services: Services) -> None:
    with pytest.raises(InvalidArgument, match="give a slug"):
        await services.tenants.create("東京", None, OPERATOR)
    assert (await services.tenants.create("東京", "tokyo", OPERATOR)).slug == "tokyo"


async def test_one_of_many_gets_a_slug(services: Services) -> None:
    outcomes = await asyncio.gather(
        *(services.tenants.create("Same", "same", OPERATOR) for _ in range(8)), return_exceptions=True
    )
    assert sorted(type(o).__name__ for o in outcomes) == ["AlreadyExists"] * 7 + ["Tenant"]
    assert {o.message for o in outcomes if isinstance(o, AlreadyExists)} == {'a tenant with slug "same" already exists'}


async def test_what_is_not_found(services: Services) -> None:
    for claim in ("", "nobody", "{11111111-1111-1111-1111-111111111111}", "a\x00", "x" * 10_000, "\ud800"):
        with pytest.raises(NotFound):
            await services.tenants.find(claim)


async def test_what_was_not_found_is_not_remembered(services: Services) -> None:
    with pytest.raises(NotFound):
        await services.tenants.find("later")
    made = await services.tenants.create("Later", "later", OPERATOR)
    assert await services.tenants.find("later") == made


async def test_the_list_is_walked_in_order(services: Services) -> None:
    made: list[Tenant] = []
    for n in range(5):
        made.append(await services.tenants.create(f"Tenant {n}", None, OPERATOR))
        services.clock.advance(seconds=1)

    seen: list[Tenant] = []
    page: Page | None = Page(2)
    while page is not None:
        part = await services.tenants.list(page)
        seen += part.items
        page = Page(2, part.next_cursor) if part.next_cursor else None

    assert seen == made
