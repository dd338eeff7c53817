"""Fixtures of every test that needs PostgreSQL (tests/postgres.py); nothing starts for those that do not ask."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings

from registry.model import DeviceId, TenantId
from registry.storage.database import Database
from tests.postgres import CHOICE, PostgresServer, chosen_binaries

# How long an example takes is no verdict: files of tests run beside each other, on machines that are busy.
settings.register_profile("gatehouse", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gatehouse")

MakeTenant = Callable[[], Awaitable[TenantId]]
MakeDevice = Callable[..., Awaitable[DeviceId]]


LONGEST = (
    "test_embedded_postgres.py",
    "test_kills.py",
    "test_two_nodes.py",
    "test_mqtt_wills.py",
    "test_mqtt_clients.py",
    "test_mqtt_mutants.py",
    "test_mqtt_abuse.py",
    "test_cli_quick_start.py",
    "test_hostile_server.py",
    "test_operations.py",
    "test_coap_clients.py",
    "test_demo.py",
    "test_schemathesis.py",
    "test_mqtt_kills.py",
    "test_cli_serve.py",
    "test_openssl_curl.py",
    "test_isolation.py",
)
"""Files that take long, by --durations. Where files are run beside each other these are begun first: one of them begun
last would be waited for by workers that have nothing left to do."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first, for workers only (tests/__main__.py)."""
    if hasattr(config, "workerinput"):
        rank = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


def pytest_report_header() -> str:
    """Say which PostgreSQL is used: a test run on one version says nothing about another."""
    try:
        binaries = chosen_binaries()
    except Exception as error:  # the header must not stop tests that need no database
        return f"postgresql: none ({error})"
    return f"postgresql: {binaries.version}, {binaries.origin} ({CHOICE}=wheel|installed selects)"


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """A program that a test runs in this process may end with its signals ignored, which whatever a later test starts
    would inherit: it would not hear Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """The session's PostgreSQL, started by the first test that needs it."""
    server = PostgresServer(tmp_path_factory.mktemp("postgres"), chosen_binaries())
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def dsn(postgres_server: PostgresServer) -> Iterator[str]:
    """A database of this test's own: migrated, empty, with partitions for today and the next days."""
    address = postgres_server.create_database()
    try:
        yield address
    finally:
        postgres_server.drop_database(address)


@pytest.fixture
def empty_dsn(postgres_server: PostgresServer) -> Iterator[str]:
    """A database without any schema, for tests of migrations."""
    address = postgres_server.create_database(template=None)
    try:
        yield address
    finally:
        postgres_server.drop_database(address)


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """A pool on this test's database. A test that needs a second node opens another `Database` on the same `dsn`."""
    opened = await Database.open(dsn)
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture
def make_tenant(database: Database) -> MakeTenant:
    """Inserts a tenant row and answers its id; below the services, so that their tests do not depend on it."""

    async def make() -> TenantId:
        tenant_id = TenantId(uuid4())
        async with database.connection() as connection:
            await connection.execute(
                "INSERT INTO tenant (tenant_id, slug, name) VALUES ($1, $2, $3)",
                tenant_id,
                f"tenant-{tenant_id.hex[:12]}",
                "A tenant",
            )
        return tenant_id

    return make


@pytest.fixture
async def tenant_id(make_tenant: MakeTenant) -> TenantId:
    """One tenant."""
    return await make_tenant()


@pytest.fixture
def make_device(database: Database) -> MakeDevice:
    """`await make_device(tenant_id, gateway_id=None)`: inserts an active device row and answers its id."""

    async def make(tenant_id: TenantId, gateway_id: DeviceId | None = None) -> DeviceId:
        device_id = DeviceId(uuid4())
        async with database.connection() as connection:
            await connection.execute(
                """
                INSERT INTO device (device_id, tenant_id, hardware_id, name, status, anchor_mode, gateway_id,
                                    credential_type)
                VALUES ($1, $2, $3, $4, 'active', 'ANCHOR_MODE_MERKLE_BATCH', $5, 'api_key')
                """,
                device_id,
                tenant_id,
                f"HW-{device_id.hex[:12]}",
                "A device",
                gateway_id,
            )
        return device_id

    return make


@pytest.fixture
async def device_id(make_device: MakeDevice, tenant_id: TenantId) -> DeviceId:
    """One device of `tenant_id`."""
    return await make_device(tenant_id)
