"""Uplinks on a real PostgreSQL: what is acknowledged is stored, once, and no uplink harms another.

A `Wire` stands between a pool and the server where a test has to lose an answer at one exact moment.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from registry.errors import InvalidArgument, RegistryError, Unavailable
from registry.model import DeviceId, TenantId, Transport
from registry.paging import Page
from registry.payloads import NewUplink, Source, payload_from_json, telemetry_from, uplink_from
from registry.storage import uplinks as storage
from registry.storage.database import Database
from registry.storage.uplinks import new_ids
from registry.uplinks import StoredUplink, UplinkLimits, Uplinks

NO_PAUSES = (0.0, 0.0, 0.0, 0.0)
PATIENCE = 20.0
"""Seconds for what should take milliseconds; more than the pool waits for a connection."""


@pytest.fixture
def source(tenant_id: TenantId, device_id: DeviceId) -> Source:
    return Source(tenant_id, device_id, Transport.HTTPS)


@pytest.fixture
def uplinks(database: Database) -> Uplinks:
    return Uplinks(database, retry_pauses=NO_PAUSES)


def event(source: Source, text: str = "{}", message_id: str | None = None) -> NewUplink:
    return uplink_from(source, payload_from_json(text.encode()), kind="event", message_id=message_id)


def telemetry(source: Source, text: str, message_id: str | None = None) -> NewUplink:
    return telemetry_from(source, payload_from_json(text.encode()), message_id=message_id)


async def count(database: Database, table: str) -> int:
    async with database.connection() as connection:
        number: int = await connection.fetchval(f"SELECT count(*) FROM {table}")
        return number


async def settle(futures: list[asyncio.Future[StoredUplink]]) -> list[StoredUplink | BaseException]:
    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*futures, return_exceptions=True)


async def test_an_uplink_is_committed_before_it_is_acknowledged_and_reads_back_unchanged(
    uplinks: Uplinks, database: Database, source: Source, make_device: Any
) -> None:
    gateway = await make_device(source.tenant_id)
    text = '{ "b": 1.50, "a": [null, "\\u00e9\\ud83d\\ude00é"], "b": 1e2 }'
    uplink = uplink_from(
        replace(source, via=gateway, transport=Transport.MQTT),
        payload_from_json(text.encode()),
        kind="event",
        message_id="m-1",
        observed_at="2026-05-29T14:00:00.123456+02:00",
    )
    stored = await uplinks.submit(uplink)
    (shown,) = (await uplinks.list_uplinks(source.tenant_id, source.device_id, Page())).items
    assert shown.uplink_id == stored.uplink_id
    assert not stored.duplicate
    assert (shown.kind, shown.payload, shown.message_id) == ("event", text, "m-1")
    assert shown.observed_at == datetime(2026, 5, 29, 12, 0, 0, 123456, tzinfo=UTC)
    assert (shown.transport, shown.via) == (Transport.MQTT, gateway)
    async with database.connection() as connection:
        assert abs(shown.received_at - await connection.fetchval("SELECT now()")) < timedelta(minutes=1)


async def test_telemetry_writes_its_readings_with_it(uplinks: Uplinks, source: Source) -> None:
    text = '[{"env.t": 21.5, "n": -9223372036854775808}, {"observed_at": "2026-05-29T12:00:00Z", "values": {"ok": false, "s": "idle"}}]'  # noqa: E501
    stored = await uplinks.submit(telemetry(source, text))
    readings = (await uplinks.list_readings(source.tenant_id, source.device_id, Page())).items
    assert [(r.component, r.sensor, r.value, type(r.value)) for r in readings] == [
        ("main", "n", -(2**63), int),
        ("env", "t", 21.5, float),
        ("main", "s", "idle", str),
        ("main", "ok", False, bool),
    ]
    assert {r.uplink_id for r in readings} == {stored.uplink_id}
    assert [r.observed_at == r.received_at for r in readings] == [True, True, False, False]


async def test_the_time_of_an_uplink_dates_the_readings_that_have_none(uplinks: Uplinks, source: Source) -> None:
    payload = payload_from_json(b'[{"a": 1}, {"observed_at": "2026-01-02T00:00:00Z", "values": {"b": 2}}]')
    await uplinks.submit(telemetry_from(source, payload, observed_at="2026-01-01T00:00:00Z"))
    readings = (await uplinks.list_readings(source.tenant_id, source.device_id, Page())).items
    assert [(r.sensor, r.observed_at.day) for r in readings] == [("b", 2), ("a", 1)]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_every_row_of_a_batch_has_its_own_values(database: Database, data: st.DataObject) -> None:
    # A column that is the same throughout goes as one value; what differs must not be taken for it.
    uplinks = Uplinks(database)
    owners = [(TenantId(uuid4()), DeviceId(uuid4())) for _ in range(2)]
    drawn = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(owners),
                st.sampled_from((Transport.MQTT, Transport.COAP)),
                st.sampled_from(("telemetry", "event")),
                st.booleans(),
                st.dictionaries(
                    st.sampled_from(("a", "b", "c.a", "c.b")), st.sampled_from((1, 2.5, True, "x")), min_size=1
                ),
            ),
            min_size=1,
            max_size=6,
        )
    )
    batch = [
        uplink_from(
            Source(*owner, transport),
            payload_from_json(json.dumps(values).encode()),
            kind=kind,
            message_id=f"m{uuid4().hex}" if named else None,
        )
        for owner, transport, kind, named, values in drawn
    ]
    stored = await settle([uplinks.submit(uplink) for uplink in batch])
    ids = [each.uplink_id for each in stored if isinstance(each, StoredUplink)]
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT * FROM uplink WHERE uplink_id = ANY($1)", ids)
        readings = await connection.fetch("SELECT * FROM reading WHERE uplink_id = ANY($1) ORDER BY ordinal", ids)
    kept = {row["uplink_id"]: row for row in rows}
    for uplink_id, uplink in zip(ids, batch, strict=True):
        row = kept[uplink_id]
        assert (row["tenant_id"], row["device_id"]) == (uplink.tenant_id, uplink.device_id)
        assert (row["transport"], row["kind"]) == (uplink.transport.value, uplink.kind)
        assert (row["payload"], row["message_id"]) == (json.loads(uplink.payload), uplink.message_id)
        its = [row for row in readings if row["uplink_id"] == uplink_id]
        assert [(row["component"], row["sensor"]) for row in its] == [(r.component, r.sensor) for r in uplink.readings]
        assert [row["ordinal"] for row in its] == list(range(len(its)))
        assert {(row["tenant_id"], row["device_id"]) for row in its} <= {(uplink.tenant_id, uplink.device_id)}
        columns = {float: "number", int: "integer", bool: "boolean", str: "text"}
        assert [row[columns[type(r.value)]] for row, r in zip(its, uplink.readings, strict=True)] == [
            r.value for r in uplink.readings
        ]


# The same message again.


async def test_a_message_that_comes_again_is_answered_with_the_first_and_stored_once(
    uplinks: Uplinks, database: Database, source: Source
) -> None:
    first = await uplinks.submit(telemetry(source, '{"t": 1}', "m"))
    again = await uplinks.submit(telemetry(source, '{"t": 2}', "m"))
    assert again == StoredUplink(first.uplink_id, duplicate=True)
    assert await count(database, "uplink") == 1
    assert [r.value for r in (await uplinks.list_readings(source.tenant_id, source.device_id, Page())).items] == [1]


async def test_within_one_batch_the_first_submitted_wins(uplinks: Uplinks, database: Database, source: Source) -> None:
    batch = [telemetry(source, f'{{"t": {n}}}', f"m{n % 3}") for n in range(9)] + [telemetry(source, '{"t": 9}')]
    outcomes = await settle([uplinks.submit(uplink) for uplink in batch])
    stored = [outcome for outcome in outcomes if isinstance(outcome, StoredUplink)]
    assert [s.duplicate for s in stored] == [False] * 3 + [True] * 6 + [False]
    assert [s.uplink_id for s in stored[3:9]] == [s.uplink_id for s in stored[:3]] * 2
    values = [r.value for r in (await uplinks.list_readings(source.tenant_id, source.device_id, Page())).items]
    assert sorted(values) == [0, 1, 2, 9]
    assert await count(database, "uplink") == 4


async def test_message_ids_belong_to_their_device(uplinks: Uplinks, source: Source, make_device: Any) -> None:
    other = replace(source, device_id=await make_device(source.tenant_id))
    one, two = await uplinks.submit(event(source, "1", "m")), await uplinks.submit(event(other, "2", "m"))
    assert not one.duplicate
    assert not two.duplicate
    assert one.uplink_id != two.uplink_id


async def test_nodes_that_get_the_same_messages_at_once_store_each_once(
    dsn: str, database: Database, source: Source, make_device: Any
) -> None:
    sources = [replace(source, device_id=await make_device(source.tenant_id)) for _ in range(5)]
    second = await Database.open(dsn)
    try:
        nodes = [Uplinks(node, limits=UplinkLimits(batch=20), retry_pauses=NO_PAUSES) for node in (database, second)]
        keys = [(s, f"m{n}") for n in range(40) for s in sources]
        # One node in the opposite order of the other: unsorted, their batches would lock each other out.
        submitted = [nodes[0].submit(event(s, "1", m)) for s, m in keys]
        submitted += [nodes[1].submit(event(s, "1", m)) for s, m in reversed(keys)]
        outcomes = await settle(submitted)
    finally:
        await second.close()
    assert all(isinstance(outcome, StoredUplink) for outcome in outcomes)
    stored = [outcome for outcome in outcomes if isinstance(outcome, StoredUplink)]
    assert sum(not s.duplicate for s in stored) == len(keys)
    assert [s.uplink_id for s in stored[: len(keys)]] == [s.uplink_id for s in reversed(stored[len(keys) :])]
    assert await count(database, "uplink") == await count(database, "uplink_message") == len(keys)


@pytest.mark.parametrize("commits", [True, False])
async def test_a_message_waits_for_a_transaction_that_holds_its_key(
    uplinks: Uplinks, database: Database, source: Source, commits: bool
) -> None:
    winner = uuid4()
    async with database.connection() as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("INSERT INTO uplink_message VALUES ($1, 'm', $2, now())", source.device_id, winner)
        future = uplinks.submit(event(source, "1", "m"))
        await until_blocked(database)
        assert not future.done()
        await (transaction.commit() if commits else transaction.rollback())
    async with asyncio.timeout(PATIENCE):
        stored = await future
    assert stored.duplicate is commits
    assert (stored.uplink_id == winner) is commits
    assert await count(database, "uplink") == (0 if commits else 1)


async def test_a_key_that_is_deleted_while_its_loser_looks_for_it_is_stored_anew(
    uplinks: Uplinks, database: Database, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await uplinks.submit(event(source, "1", "m"))
    find = uplinks._find_winners

    async def delete_then_find(*arguments: Any) -> Any:
        monkeypatch.undo()
        async with database.connection() as connection:
            await connection.execute("DELETE FROM uplink_message")
        return await find(*arguments)

    monkeypatch.setattr(uplinks, "_find_winners", delete_then_find)
    again = await uplinks.submit(event(source, "2", "m"))
    assert not again.duplicate
    assert again.uplink_id != first.uplink_id


# A poisoned row.


@pytest.mark.parametrize(
    "poison",
    [{"payload": "{"}, {"payload": '"\0"'}, {"payload": '"\ud800"'}, {"kind": None}, {"observed_at": "now"}],
    ids=["no json", "nul", "surrogate", "null", "type"],
)
@pytest.mark.parametrize("size", [1, 2, 33])
async def test_only_the_culprit_of_a_refused_batch_is_refused(
    uplinks: Uplinks, database: Database, source: Source, poison: dict[str, Any], size: int
) -> None:
    batch = [event(source, str(n), f"m{n}" if n % 2 else None) for n in range(size)]
    culprit = size // 2
    batch[culprit] = replace(batch[culprit], **poison)  # below the check
    outcomes = await settle([uplinks.submit(uplink) for uplink in batch])
    assert [isinstance(outcome, StoredUplink) for outcome in outcomes] == [n != culprit for n in range(size)]
    refused = outcomes[culprit]
    assert isinstance(refused, InvalidArgument)
    assert "database cannot store" in refused.message
    assert await count(database, "uplink") == size - 1


json_texts = st.text(
    alphabet=st.sampled_from('[]{}",:\\ue0123456789dDabfnrtlsE+-. \n\t\r\x00\x1f\x7f/é\u2028\ufeff\U0001f600'),
    max_size=24,
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(alphabet=st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_whatever_passes_the_check_is_taken_by_postgresql(database: Database, data: st.DataObject) -> None:
    texts = data.draw(
        st.lists(json_texts | st.builds(json.dumps, json_values, ensure_ascii=st.booleans()), max_size=80)
    )
    texts += ["[" * 64 + "]" * 64, "-0", "1" * 4000, "1e308", "0." + "1" * 5000, '"\\/\\b\\f\\n\\r\\t\\ud83d\\ude00"']
    passed = []
    for text in texts:
        try:
            passed.append(payload_from_json(text.encode(errors="surrogatepass")).text)
        except InvalidArgument:
            continue
    async with database.connection() as connection:
        # jsonb too: it refuses what a query with ->> would stumble over.
        kept = await connection.fetch("SELECT t::json::text AS t, t::jsonb AS b FROM unnest($1::text[]) AS t", passed)
    assert [row["t"] for row in kept] == passed


# Lost connections, lost partitions, deadlocks.


class Wire:
    """A relay between a pool and PostgreSQL's socket that can lose the answer to one statement."""

    def __init__(self, server_path: str) -> None:
        self._server_path = server_path
        self._marker = b""
        self.lost = 0

    def lose_the_answer_to(self, marker: bytes) -> None:
        """Once a client has sent `marker`, its connection is cut when PostgreSQL has answered, unseen."""
        self._marker = marker

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(self._server_path)
        cut = asyncio.Event()

        async def upwards() -> None:
            while data := await reader.read(65536):
                if self._marker and self._marker in data:
                    self._marker = b""
                    cut.set()
                server_writer.write(data)
            server_writer.close()

        async def downwards() -> None:
            while data := await server_reader.read(65536):
                if cut.is_set() and data.endswith(b"Z\x00\x00\x00\x05I"):  # ReadyForQuery, idle: it is committed
                    self.lost += 1
                    break
                writer.write(data)
            writer.close()

        up = asyncio.create_task(upwards())
        try:
            await downwards()
        finally:
            up.cancel()
            await asyncio.wait([up])
            server_writer.close()


@asynccontextmanager
async def wired(dsn: str, tmp_path: Path) -> AsyncIterator[tuple[Wire, Database]]:
    address = urlsplit(dsn)
    host = parse_qs(address.query)["host"][0]
    wire = Wire(f"{host}/.s.PGSQL.5432")
    server = await asyncio.start_unix_server(wire.relay, tmp_path / ".s.PGSQL.5432")
    database = await Database.open(urlunsplit(address._replace(query=f"host={quote(str(tmp_path))}&port=5432")), size=2)
    try:
        yield wire, database
    finally:
        await database.close()
        server.close()


async def until_blocked(database: Database) -> None:
    """Return when some backend waits for a lock."""
    async with asyncio.timeout(PATIENCE):
        while True:
            async with database.connection() as connection:
                if await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    return


async def test_a_lost_answer_is_asked_for_again_by_message_id_and_left_open_without(
    dsn: str, database: Database, source: Source, tmp_path: Path
) -> None:
    async with wired(dsn, tmp_path) as (wire, through):
        uplinks = Uplinks(through, retry_pauses=NO_PAUSES)
        taken = await uplinks.submit(event(source, "0", "taken"))
        wire.lose_the_answer_to(b"the marked one")
        outcomes = await settle(
            [
                uplinks.submit(event(source, '"the marked one"', "named")),
                uplinks.submit(event(source, "1")),
                uplinks.submit(event(source, "2", "taken")),
                uplinks.submit(event(source, "3", "named")),
            ]
        )
        assert wire.lost == 1
    named, unnamed, duplicate, second = outcomes
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT uplink_id, payload::text AS p FROM uplink ORDER BY uplink_id")
    by_payload = {row["p"]: row["uplink_id"] for row in rows}
    # The first try was committed: it is recognised as our own, not taken for somebody else's.
    assert named == StoredUplink(by_payload['"the marked one"'], duplicate=False)
    assert isinstance(unnamed, Unavailable)
    assert duplicate == StoredUplink(taken.uplink_id, duplicate=True)
    assert second == StoredUplink(by_payload['"the marked one"'], duplicate=True)
    assert sorted(by_payload) == ['"the marked one"', "0", "1"]


async def test_a_backend_killed_before_its_commit_stores_nothing_unacknowledged(
    uplinks: Uplinks, database: Database, source: Source
) -> None:
    async with database.connection() as blocker:
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("INSERT INTO uplink_message VALUES ($1, 'named', $2, now())", source.device_id, uuid4())
        futures = [uplinks.submit(event(source, "1", "named")), uplinks.submit(event(source, "2"))]
        await until_blocked(database)
        killed = await blocker.fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"
        )
        assert killed == 1
        await transaction.rollback()
    named, unnamed = await settle(futures)
    assert isinstance(named, StoredUplink)
    assert not named.duplicate
    assert isinstance(unnamed, Unavailable)
    items = (await uplinks.list_uplinks(source.tenant_id, source.device_id, Page())).items
    assert [(u.uplink_id, u.payload) for u in items] == [(named.uplink_id, "1")]


async def test_a_database_that_stays_away_is_unavailable_to_all_and_back_later(
    dsn: str, database: Database, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uplinks = Uplinks(database, retry_pauses=NO_PAUSES)

    @asynccontextmanager
    async def away() -> AsyncIterator[None]:
        raise Unavailable("the database is not available")
        yield

    monkeypatch.setattr(database, "connection", away)
    outcomes = await settle([uplinks.submit(event(source, "1", "named")), uplinks.submit(event(source, "2"))])
    assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
    assert outcomes[0] is not outcomes[1]
    monkeypatch.undo()
    assert not (await uplinks.submit(event(source, "1", "named"))).duplicate


async def test_a_day_without_a_partition_gets_one_and_nothing_is_lost(
    uplinks: Uplinks, database: Database, source: Source
) -> None:
    async with database.connection() as connection:
        for row in await connection.fetch("SELECT relname FROM pg_class WHERE relname ~ '^(uplink|reading)_[0-9]{8}$'"):
            await connection.execute(f"DROP TABLE {row['relname']}")
    outcomes = await settle(
        [uplinks.submit(telemetry(source, '{"t": 1}', "m")), uplinks.submit(telemetry(source, '{"t": 2}'))]
    )
    assert all(isinstance(outcome, StoredUplink) and not outcome.duplicate for outcome in outcomes)
    assert await count(database, "reading") == 2


async def test_a_missing_partition_of_readings_alone_is_made_too(
    uplinks: Uplinks, database: Database, source: Source
) -> None:
    async with database.connection() as connection:
        for row in await connection.fetch("SELECT relname FROM pg_class WHERE relname ~ '^reading_[0-9]{8}$'"):
            await connection.execute(f"DROP TABLE {row['relname']}")
    await uplinks.submit(telemetry(source, '{"t": 1}', "m"))
    assert await count(database, "reading") == await count(database, "uplink") == 1


async def test_a_batch_that_loses_a_deadlock_is_tried_again_whole(
    uplinks: Uplinks, database: Database, source: Source
) -> None:
    # The rival holds "b" and then wants "a", against the order of the batch; the batch is the one to give way.
    async with database.connection() as rival:
        await rival.execute("SET deadlock_timeout = '60s'")  # the batch looks after the default of one second
        transaction = rival.transaction()
        await transaction.start()
        await rival.execute("INSERT INTO uplink_message VALUES ($1, 'b', $2, now())", source.device_id, uuid4())
        futures = [uplinks.submit(event(source, "1", m)) for m in ("a", "b", None)]
        await until_blocked(database)
        await rival.execute("INSERT INTO uplink_message VALUES ($1, 'a', $2, now())", source.device_id, uuid4())
        await transaction.commit()
    outcomes = await settle(futures)
    assert [o.duplicate for o in outcomes if isinstance(o, StoredUplink)] == [True, True, False]
    assert await count(database, "uplink") == 1


# The queue.


async def test_a_full_queue_answers_at_once_and_keeps_what_it_took(database: Database, source: Source) -> None:
    uplinks = Uplinks(database, limits=UplinkLimits(queue=5))
    futures = [uplinks.submit(event(source)) for _ in range(5)]
    with pytest.raises(Unavailable) as refusal:
        uplinks.submit(event(source))
    assert refusal.value.retry_after
    assert uplinks.queued == 5
    assert all(isinstance(outcome, StoredUplink) for outcome in await settle(futures))
    assert await count(database, "uplink") == 5


async def test_stop_stores_what_is_queued(database: Database, source: Source) -> None:
    uplinks = Uplinks(database, limits=UplinkLimits(batch=2))
    futures = [uplinks.submit(event(source)) for _ in range(7)]
    await uplinks.stop()
    assert all(future.done() for future in futures)
    assert await count(database, "uplink") == 7
    with pytest.raises(RegistryError, match="stopping"):
        uplinks.submit(event(source))


# Reading back.


async def test_lists_are_walked_newest_first_each_item_once(uplinks: Uplinks, source: Source) -> None:
    sent = [(await uplinks.submit(telemetry(source, f'{{"a.t": {n}, "b.t": {n}}}'))).uplink_id for n in range(7)]
    for limit in (1, 2, 3, 7, 8):
        seen: list[UUID] = []
        values: list[object] = []
        page: Page | None = Page(limit)
        while page is not None:
            listing = await uplinks.list_uplinks(source.tenant_id, source.device_id, page)
            seen += [item.uplink_id for item in listing.items]
            page = Page(limit, listing.next_cursor) if listing.next_cursor else None
        page = Page(limit)
        while page is not None:
            found = await uplinks.list_readings(source.tenant_id, source.device_id, page)
            values += [(item.value, item.component) for item in found.items]
            page = Page(limit, found.next_cursor) if found.next_cursor else None
        assert seen == sent[::-1]
        assert values == [(n, component) for n in range(6, -1, -1) for component in ("b", "a")]


async def test_uplinks_of_one_batch_are_listed_in_the_order_they_came(uplinks: Uplinks, source: Source) -> None:
    await settle([uplinks.submit(event(source, str(n))) for n in range(50)])
    items = (await uplinks.list_uplinks(source.tenant_id, source.device_id, Page())).items
    assert [int(item.payload) for item in items] == list(range(49, -1, -1))


async def test_lists_are_filtered(uplinks: Uplinks, source: Source) -> None:
    def at(day: int, text: str) -> NewUplink:
        return telemetry_from(source, payload_from_json(text.encode()), observed_at=f"2026-01-{day:02}T00:00:00Z")

    await uplinks.submit(event(source, "1"))
    for day in (1, 2, 3):
        await uplinks.submit(at(day, f'{{"a.t": {day}, "a.h": {day}, "b.t": {day}}}'))
    tenant, device = source.tenant_id, source.device_id
    (only,) = (await uplinks.list_uplinks(tenant, device, Page(), kind="event")).items
    assert only.payload == "1"
    everything = (await uplinks.list_uplinks(tenant, device, Page())).items
    cut = everything[1].received_at
    assert len((await uplinks.list_uplinks(tenant, device, Page(), since=cut)).items) == 2
    assert len((await uplinks.list_uplinks(tenant, device, Page(), until=cut)).items) == 2

    async def values(**filters: Any) -> list[object]:
        found = await uplinks.list_readings(tenant, device, Page(), **filters)
        return [(r.component, r.sensor, r.value) for r in found.items]

    assert await values(component="a", sensor="t") == [("a", "t", 3), ("a", "t", 2), ("a", "t", 1)]
    assert await values(sensor="h") == [("a", "h", 3), ("a", "h", 2), ("a", "h", 1)]
    assert len(await values(component="a")) == 6
    since, until = datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 3, tzinfo=UTC)
    assert await values(component="b", sensor="t", since=since, until=until) == [("b", "t", 2)]
    assert await values(since=datetime.min.replace(tzinfo=UTC), until=datetime.max.replace(tzinfo=UTC), sensor="h")


async def test_another_tenant_sees_nothing(uplinks: Uplinks, source: Source, make_tenant: Any) -> None:
    await uplinks.submit(telemetry(source, '{"t": 1}'))
    stranger = await make_tenant()
    assert (await uplinks.list_uplinks(stranger, source.device_id, Page())).items == []
    assert (await uplinks.list_readings(stranger, source.device_id, Page())).items == []


async def test_a_foreign_cursor_is_refused(uplinks: Uplinks, source: Source) -> None:
    await settle([uplinks.submit(telemetry(source, '{"t": 1}')) for _ in range(2)])
    cursor = (await uplinks.list_uplinks(source.tenant_id, source.device_id, Page(1))).next_cursor
    assert cursor is not None
    for forged in ("", "x", cursor[:-2], cursor + "A"):
        with pytest.raises(InvalidArgument):
            await uplinks.list_uplinks(source.tenant_id, source.device_id, Page(1, forged))
    with pytest.raises(InvalidArgument):
        await uplinks.list_readings(source.tenant_id, source.device_id, Page(1, cursor))


def test_ids_are_version_7_distinct_and_ascending() -> None:
    ids = new_ids(4096, 1_780_056_000_123, lambda n: bytes(n))
    assert [i.version for i in ids[:2]] == [7, 7]
    assert ids[0].variant == "specified in RFC 4122"
    assert int.from_bytes(ids[0].bytes[:6], "big") == 1_780_056_000_123
    assert ids == sorted(set(ids))
    assert len(ids) == 4096


async def test_the_statement_looks_winners_up_by_hash(database: Database) -> None:
    # With a nested loop a full batch of named uplinks would take the square of its size.
    async with database.connection() as connection:
        types = "uuid[],uuid[],uuid[],text[],text[],text[],timestamptz[],text[],uuid[],uuid[],text[],uuid[],smallint[],boolean[],smallint[],text[],text[],timestamptz[],float8[],bigint[],boolean[],text[]"  # noqa: E501
        await connection.execute(f"PREPARE batch ({types}) AS {storage._INSERT}")
        await connection.execute("SET plan_cache_mode = force_generic_plan")
        rows = await connection.fetch(f"EXPLAIN EXECUTE batch ({', '.join(['NULL'] * 22)})")
    plan = "\n".join(row[0] for row in rows)
    assert plan.count("hashed SubPlan") == 2
    assert "Nested Loop" not in plan


def test_asyncpg_calls_an_unencodable_value_a_value_error() -> None:
    # storage.uplinks.insert relies on it to blame the row and not the connection.
    assert issubclass(asyncpg.exceptions._base.DataError, ValueError)
