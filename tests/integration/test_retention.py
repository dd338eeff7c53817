"""Partitions are made ahead and dropped whole while others write and read; other tables lose their old rows."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, date, datetime, timedelta
from typing import Any, cast
from uuid import uuid4

import asyncpg
import pytest

from edge import serve
from registry.certificates import Certificates, Tidied
from registry.errors import Unavailable
from registry.model import DeviceId, TenantId, Transport
from registry.paging import Page
from registry.payloads import Source, payload_from_json, telemetry_from
from registry.retention import DAYS_AHEAD, Retention, RetentionSettings
from registry.storage import partitions
from registry.storage.database import Database
from registry.uplinks import Uplinks
from tests.nodes import until

ALL_KEPT = RetentionSettings(retention_days=0, event_days=0, audit_days=0)
PATIENCE = 20.0


@pytest.fixture
async def today(database: Database) -> date:
    async with database.connection() as connection:
        return await partitions.today(connection)


@pytest.fixture
def now(today: date) -> datetime:
    """Noon of the database's today, or a moment before it: both are judged the same."""
    return datetime.combine(today, datetime.min.time(), UTC) + timedelta(days=1)


async def names(database: Database) -> list[str]:
    async with database.connection() as connection:
        return [partition.name for partition in await partitions.listing(connection)]


async def make(database: Database, *days: date) -> None:
    async with database.connection() as connection:
        await partitions.ensure(connection, days)


async def receive(database: Database, device_id: DeviceId, moment: datetime, message_id: str | None = None) -> None:
    """An uplink with a reading that was received then."""
    async with database.transaction() as connection:
        uplink_id, tenant_id = uuid4(), uuid4()
        await connection.execute(
            "INSERT INTO uplink (uplink_id, tenant_id, device_id, kind, payload, received_at, transport) "
            "VALUES ($1, $2, $3, 'telemetry', '{}'::text::json, $4, 'https')",
            uplink_id, tenant_id, device_id, moment,
        )  # fmt: skip
        await connection.execute(
            "INSERT INTO reading (tenant_id, device_id, component, sensor, observed_at, received_at, uplink_id, "
            "ordinal, number) VALUES ($1, $2, 'main', 't', $3, $3, $4, 0, 1)",
            tenant_id, device_id, moment, uplink_id,
        )  # fmt: skip
        if message_id is not None:
            await connection.execute(
                "INSERT INTO uplink_message VALUES ($1, $2, $3, $4)", device_id, message_id, uplink_id, moment
            )


async def count(database: Database, table: str) -> int:
    async with database.connection() as connection:
        number: int = await connection.fetchval(f"SELECT count(*) FROM {table}")
        return number


async def test_a_week_is_made_ahead_once(database: Database, today: date, now: datetime) -> None:
    retention = Retention(database, ALL_KEPT)
    made = (await retention.run_once(now)).made
    days = [today + timedelta(days=n) for n in range(DAYS_AHEAD + 1)]
    assert await names(database) == [f"{parent}_{day:%Y%m%d}" for day in days for parent in ("reading", "uplink")]
    assert set(made) < set(await names(database))  # some were in the template already
    assert (await retention.run_once(now)).made == []


async def test_partitions_have_the_indexes_and_the_check_of_their_parent(database: Database, today: date) -> None:
    await make(database, today + timedelta(days=30))
    async with database.connection() as connection:
        indexed = await connection.fetchval(
            "SELECT count(*) FROM pg_index WHERE indrelid = $1::regclass",
            f"reading_{today + timedelta(days=30):%Y%m%d}",
        )
        assert indexed == 2
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(
                "INSERT INTO reading (tenant_id, device_id, component, sensor, observed_at, received_at, uplink_id, "
                "ordinal) VALUES ($1, $1, 'main', 't', now(), now(), $1, 0)",
                uuid4(),
            )


async def test_nodes_that_start_together_make_each_day_once(dsn: str, database: Database, now: datetime) -> None:
    nodes = [await Database.open(dsn, size=2) for _ in range(4)]
    try:
        async with asyncio.timeout(PATIENCE):
            reports = await asyncio.gather(*[Retention(node, RetentionSettings()).run_once(now) for node in nodes])
    finally:
        for node in nodes:
            await node.close()
    made = [name for report in reports for name in report.made]
    assert len(made) == len(set(made)) > 0
    assert len(await names(database)) == 2 * (DAYS_AHEAD + 1)


async def test_a_day_goes_when_all_of_it_is_past_its_time(
    database: Database, device_id: DeviceId, today: date, now: datetime
) -> None:
    days = [today - timedelta(days=n) for n in (400, 31, 30, 29)]
    await make(database, *days)
    for day in days:
        await receive(database, device_id, partitions.first_moment(day) + timedelta(hours=23), f"m{day}")
    report = await Retention(database, RetentionSettings(retention_days=30)).run_once(
        partitions.first_moment(today) + timedelta(seconds=1)
    )
    gone = [f"{parent}_{day:%Y%m%d}" for day in days[:2] for parent in ("reading", "uplink")]
    assert sorted(report.dropped) == sorted(gone)
    assert not set(gone) & set(await names(database))
    assert await count(database, "uplink") == await count(database, "reading") == 2
    # Message ids go with their day: what is still there is there once.
    assert await count(database, "uplink_message") == 2
    assert report.deleted == {"uplink_message": 2}


async def test_zero_days_keep_everything(database: Database, device_id: DeviceId, today: date, now: datetime) -> None:
    await make(database, today - timedelta(days=4000))
    await receive(database, device_id, partitions.first_moment(today - timedelta(days=4000)), "m")
    report = await Retention(database, ALL_KEPT).run_once(now)
    assert (report.dropped, report.deleted) == ([], {})
    assert await count(database, "uplink") == await count(database, "uplink_message") == 1


async def test_a_node_whose_clock_runs_ahead_deletes_nothing_early(
    database: Database, device_id: DeviceId, today: date
) -> None:
    await make(database, today - timedelta(days=2))
    await receive(database, device_id, partitions.first_moment(today - timedelta(days=2)), "m")
    report = await Retention(database, RetentionSettings(retention_days=30)).run_once(datetime(2150, 1, 1, tzinfo=UTC))
    assert (report.dropped, report.deleted) == ([], {})
    assert await count(database, "uplink") == 1


async def test_a_day_that_is_being_read_waits_for_the_next_run_and_blocks_no_writer(
    database: Database, tenant_id: TenantId, device_id: DeviceId, today: date, now: datetime
) -> None:
    old = today - timedelta(days=100)
    await make(database, old)
    await receive(database, device_id, partitions.first_moment(old))
    uplinks = Uplinks(database)
    retention = Retention(database, RetentionSettings(), lock_seconds=0.3)
    uplink = telemetry_from(Source(tenant_id, device_id, Transport.HTTPS), payload_from_json(b'{"t": 1}'))
    async with database.transaction() as reader:
        await reader.execute("SELECT count(*) FROM uplink")
        running = asyncio.create_task(retention.run_once(now))
        async with asyncio.timeout(PATIENCE):
            while not await waiting(database):
                pass
            assert not running.done()
            await uplinks.submit(uplink)  # while the detach waits for the reader
            report = await running
    assert report.locked == [f"uplink_{old:%Y%m%d}"]
    # What was begun is finished: by now the partition is detached in part.
    report = await retention.run_once(now)
    assert report.dropped == [f"uplink_{old:%Y%m%d}"]
    assert not [name for name in await names(database) if name.endswith(f"{old:%Y%m%d}")]
    assert await count(database, "uplink") == 1


async def waiting(database: Database) -> bool:
    async with database.connection() as connection:
        return bool(await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))


async def test_a_day_that_was_detached_and_not_dropped_is_found_again(
    database: Database, today: date, now: datetime
) -> None:
    old = today - timedelta(days=100)
    await make(database, old)
    async with database.connection() as connection:
        await connection.execute(f"ALTER TABLE uplink DETACH PARTITION uplink_{old:%Y%m%d}")
    report = await Retention(database, RetentionSettings()).run_once(now)
    assert report.dropped == [f"reading_{old:%Y%m%d}", f"uplink_{old:%Y%m%d}"]


async def test_a_day_that_somebodys_view_is_of_keeps_no_other_one(
    database: Database, today: date, now: datetime
) -> None:
    days = [today - timedelta(days=n) for n in (101, 100)]
    await make(database, *days)
    async with database.connection() as connection:
        await connection.execute(f"CREATE VIEW the_night_it_broke AS SELECT payload FROM uplink_{days[0]:%Y%m%d}")
    retention = Retention(database, RetentionSettings())
    report = await retention.run_once(now)
    assert report.locked == [f"uplink_{days[0]:%Y%m%d}"]
    assert len(report.dropped) == 3
    async with database.connection() as connection:
        await connection.execute("DROP VIEW the_night_it_broke")
    assert (await retention.run_once(now)).dropped == report.locked


async def test_while_another_node_drops_this_one_passes(database: Database, today: date, now: datetime) -> None:
    old = today - timedelta(days=100)
    await make(database, old)
    retention = Retention(database, RetentionSettings())
    await retention.make_partitions()
    async with database.connection() as other:
        await other.execute("SELECT pg_advisory_lock($1)", partitions.LOCK)
        assert (await retention.run_once(now)).dropped == []
    assert len((await retention.run_once(now)).dropped) == 2


async def test_making_a_day_gives_up_when_the_lock_is_held(
    database: Database, today: date, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "MAKE_LOCK_SECONDS", 0.05)
    async with database.connection() as other:
        await other.execute("SELECT pg_advisory_lock($1)", partitions.LOCK)
        with pytest.raises(Unavailable):
            await make(database, today + timedelta(days=40))
    await make(database, today + timedelta(days=40))


async def test_a_stranger_table_with_a_similar_name_is_left_alone(database: Database, now: datetime) -> None:
    async with database.connection() as connection:
        await connection.execute("CREATE TABLE uplink_20200101_copy (); CREATE TABLE my_uplink_20200101 ()")
    assert (await Retention(database, RetentionSettings()).run_once(now)).dropped == []


async def test_old_rows_go_in_chunks_and_young_ones_stay(
    database: Database, tenant_id: TenantId, device_id: DeviceId
) -> None:
    async with database.connection() as connection:
        now = await connection.fetchval("SELECT now()")
        for table in ("event", "audit"):
            await _fill(connection, table, tenant_id, [now - timedelta(days=n) for n in (95, 94, 93, 92, 91, 89, 1, 0)])
        await connection.executemany(
            "INSERT INTO teardown_report (event_seq, node_id, reported_at, sessions, remaining) "
            "VALUES ($1, 'n', $2, '[]', 0)",
            [(n, now - timedelta(hours=n)) for n in (26, 25, 23, 0)],
        )
        finished = [now - timedelta(days=n) for n in (95, 94, 91, 89, 1)]
        await connection.executemany(
            "INSERT INTO command (command_id, tenant_id, device_id, method, params, status, created_by, created_at, "
            "expires_at, finished_at) VALUES ($1, $2, $3, $4, '{}', $5, 'a', $6, $6, $7)",
            [(uuid4(), tenant_id, device_id, f"m{n}", "expired", at, at) for n, at in enumerate(finished, 1)]
            + [(uuid4(), tenant_id, device_id, "unfinished", "queued", finished[0], None)],
        )
    settings = RetentionSettings(event_days=90, audit_days=90)
    report = await Retention(database, settings, chunk_rows=2).run_once(now)
    assert report.deleted == {"event": 5, "audit": 5, "teardown_report": 2, "command": 3}
    async with database.connection() as connection:
        left = [row["method"] for row in await connection.fetch("SELECT method FROM command ORDER BY method")]
    assert left == ["m4", "m5", "unfinished"]
    assert [await count(database, table) for table in ("event", "audit", "teardown_report")] == [3, 3, 2]
    assert (await Retention(database, settings, chunk_rows=2).run_once(now)).deleted == {}


async def test_audit_is_kept_for_ever_by_default(database: Database, tenant_id: TenantId) -> None:
    async with database.connection() as connection:
        now = await connection.fetchval("SELECT now()")
        for table in ("event", "audit"):
            await _fill(connection, table, tenant_id, [now - timedelta(days=5000)])
    assert (await Retention(database, RetentionSettings()).run_once(now)).deleted == {"event": 1}


async def _fill(connection: Any, table: str, tenant_id: TenantId, moments: list[datetime]) -> None:
    for moment in moments:
        if table == "event":
            await connection.execute(
                "INSERT INTO event (event_id, tenant_id, kind, at, actor, correlation_id) "
                "VALUES ($1, $2, 'device.registered', $3, 'system:test', 'c')",
                uuid4(), tenant_id, moment,
            )  # fmt: skip
        else:
            await connection.execute(
                "INSERT INTO audit (tenant_id, at, actor, action, object_type, object_id, correlation_id) "
                "VALUES ($1, $2, 'system:test', 'a', 't', 'o', 'c')",
                tenant_id, moment,
            )  # fmt: skip


async def test_uplinks_of_several_days_are_listed_across_their_partitions(
    database: Database, tenant_id: TenantId, device_id: DeviceId, today: date
) -> None:
    days = [today - timedelta(days=n) for n in range(5)]
    await make(database, *days)
    for day in days:
        await receive(database, device_id, partitions.first_moment(day))
    async with database.connection() as connection:
        await connection.execute("UPDATE uplink SET tenant_id = $1", tenant_id)
        await connection.execute("UPDATE reading SET tenant_id = $1", tenant_id)
    uplinks = Uplinks(database)
    first = await uplinks.list_uplinks(tenant_id, device_id, Page(3))
    rest = await uplinks.list_uplinks(tenant_id, device_id, Page(3, first.next_cursor))
    assert [u.received_at.date() for u in first.items + rest.items] == days
    readings = (await uplinks.list_readings(tenant_id, device_id, Page(), component="main", sensor="t")).items
    assert [r.observed_at.date() for r in readings] == days


class Tidying:
    """What `serve` tidies beside the tables, with a database that is away at first."""

    def __init__(self) -> None:
        self.asked = 0

    async def tidy(self) -> Tidied:
        self.asked += 1
        if self.asked == 1:
            raise Unavailable("the database is not available")
        return Tidied(0, 0)


async def test_while_the_database_is_away_the_hours_work_is_put_off_and_no_loop_fails(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Restarts of loops are bugs of ours, which operators have an alert for; an outage of the database is none."""
    monkeypatch.setattr(serve, "FIRST_RETENTION_SECONDS", 0.0)
    certificates = Tidying()
    working = asyncio.create_task(serve._every_hour(Retention(database, ALL_KEPT), cast(Certificates, certificates)))
    try:
        with caplog.at_level(logging.WARNING):
            await until(lambda: certificates.asked == 2 or working.done())
        assert not working.done()
        assert "retention.postponed" in caplog.messages
    finally:
        working.cancel()
