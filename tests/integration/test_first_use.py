"""First uses: recorded once, a few at a time, however many devices wake up together; what fails, fails alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from registry.model import CredentialId, DeviceId, TenantId
from registry.sealing import KeyRing
from registry.storage import credentials
from registry.storage.database import Connection, Database
from tests.conftest import MakeDevice
from tests.nodes import issue_key, running_node

RING = KeyRing.generate()


class Watched:
    """Counts the transactions of a database, and how many were open at once."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all = self.open = self.most = 0
        opened = database.transaction

        @asynccontextmanager
        async def transaction() -> AsyncIterator[Connection]:
            self.all += 1
            self.open += 1
            self.most = max(self.most, self.open)
            try:
                async with opened() as connection:
                    yield connection
            finally:
                self.open -= 1

        monkeypatch.setattr(database, "transaction", transaction)


async def first_uses(database: Database) -> list[CredentialId]:
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT credential_id FROM credential WHERE first_used_at IS NOT NULL")
    return [row["credential_id"] for row in rows]


async def test_many_at_once_leave_the_pool_to_others(
    dsn: str, database: Database, tenant_id: TenantId, make_device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet is switched on, and one of its devices opens two hundred connections."""
    issued = [await issue_key(database, tenant_id, await make_device(tenant_id)) for _ in range(50)]
    keys = [key for _, key in issued] + [issued[0][1]] * 200
    async with running_node(dsn, "a", RING, run=False) as a:
        a.sessions._max_per_device = 1000
        watched = Watched(a.database, monkeypatch)
        await asyncio.gather(*(a.connect(key) for key in keys))
        assert watched.most <= 2
        assert watched.all < 100
    assert sorted(await first_uses(database)) == sorted(credential_id for credential_id, _ in issued)


async def test_one_that_cannot_be_recorded_does_not_keep_out_the_others(
    dsn: str, database: Database, tenant_id: TenantId, make_device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [await make_device(tenant_id) for _ in range(10)]
    issued = [await issue_key(database, tenant_id, device_id) for device_id in devices]
    recorded = credentials.mark_first_use

    async def mark(connection: Connection, tenant: TenantId, device_id: DeviceId, *rest: object) -> None:
        if device_id == devices[3]:
            raise RuntimeError("nobody has thought of this")
        await recorded(connection, tenant, device_id, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(credentials, "mark_first_use", mark)
    async with running_node(dsn, "a", RING, run=False) as a:
        outcomes = await asyncio.gather(*(a.connect(key) for _, key in issued), return_exceptions=True)
        assert [type(each) for each in outcomes].count(tuple) == 9
        assert isinstance(outcomes[3], RuntimeError)
        assert len(a.sessions.all()) == 9
