"""Refusals of who only says which device it is: in that device's timeline, unless there is no such device.

Theory. A peer that names a device and proves nothing (an unknown key with a user name over MQTT) is noted without a
tenant. The tenant is looked up when the note is written, behind the answer, of all that wait in one query; a name that
is nobody's leaves nothing. What is held for names is bounded apart from what is held for devices that are known.

A device goes on knocking while its row is being written: each refusal is counted in one row, whether the writing
succeeds, fails or is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest

from registry import refusals as subject
from registry.errors import Unauthenticated, Unavailable
from registry.events import EventKind, NewEvent
from registry.model import ApiKey, Contact, DeviceId, Transport
from registry.refusals import Refusals
from registry.secrets import digest
from registry.storage.database import Connection
from tests.http_api import BASE, Api, api

__all__ = ["api"]

CONTACT = Contact(Transport.MQTT, "192.0.2.9:1", "corr-1")


async def refused(api: Api, device_id: str, key: str = "sk_live_unknown") -> None:
    with pytest.raises(Unauthenticated):
        await api.registry.resolver.admit(ApiKey(digest(key), device_id=device_id), CONTACT)


async def in_timeline(api: Api, device_id: str) -> list[dict[str, Any]]:
    async with api.operator() as operator:
        answer = await operator.get(f"{BASE}/devices/{device_id}/timeline")
    assert answer.status_code == 200
    return [event["data"] for event in answer.json()["events"] if event["kind"] == "auth.refused"]


async def events(api: Api) -> int:
    async with api.database.connection() as connection:
        return int(await connection.fetchval("SELECT count(*) FROM event WHERE kind = 'auth.refused'"))


def note(to: Refusals, named: DeviceId, tenant: Any = None) -> None:
    to.note(
        tenant_id=tenant,
        device_id=named,
        kind=EventKind.AUTH_REFUSED,
        reason="unknown api_key",
        contact=CONTACT,
        detail={},
    )


async def test_an_unknown_key_is_in_the_timeline_of_the_device_that_it_was_presented_for(api: Api) -> None:
    device, other = await api.registered("HW-1"), await api.registered("HW-2")
    for _ in range(3):
        await refused(api, device["device_id"])
    await refused(api, device["device_id"].upper())
    found = await in_timeline(api, device["device_id"])
    assert {each["reason"] for each in found} == {"unknown api_key"}
    assert sum(each["count"] for each in found) == 4
    assert {(each["transport"], each["peer"]) for each in found} == {("mqtt", "192.0.2.9:1")}
    assert await in_timeline(api, other["device_id"]) == []


async def test_names_of_nobody_leave_nothing(api: Api) -> None:
    mine = Refusals(api.database, api.registry.feed)
    for _ in range(5):
        note(mine, DeviceId(uuid4()))
    await mine.flush()
    for name in ("", "pump-1", "' OR 1=1", str(uuid4())):
        await refused(api, name)
    await api.registry.refusals.flush_all()
    assert await events(api) == 0
    assert (mine._held, mine._named, api.registry.refusals._named) == ({}, 0, 0)


async def test_invented_names_take_no_place_from_devices_that_are_known(
    api: Api,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subject, "MAX_NAMED", 4)
    device = DeviceId(UUID((await api.registered())["device_id"]))
    mine = Refusals(api.database, api.registry.feed)
    for _ in range(6):
        note(mine, DeviceId(uuid4()))
    assert (mine.dropped, mine._named) == (2, 4)
    note(mine, device, api.tenant_id)
    assert mine.dropped == 2
    await mine.flush_all()
    assert await events(api) == 1
    note(mine, device)  # there is room again
    await mine.flush_all()
    assert (await events(api), mine.dropped) == (2, 2)


async def test_a_key_of_another_device_is_noted_for_its_owner_alone(api: Api) -> None:
    owner, named = await api.registered("HW-1"), await api.registered("HW-2")
    await refused(api, named["device_id"], owner["api_key"])
    assert [each["reason"] for each in await in_timeline(api, owner["device_id"])] == ["key of another device"]
    assert await in_timeline(api, named["device_id"]) == []


@pytest.mark.parametrize("point", ["before the row is made", "after the row is made"])
@pytest.mark.parametrize("outcome", [None, Unavailable("away"), asyncio.CancelledError()], ids=lambda o: repr(o)[:12])
async def test_what_is_refused_while_a_row_is_written_is_counted_once(
    api: Api, monkeypatch: pytest.MonkeyPatch, point: str, outcome: BaseException | None
) -> None:
    device = (await api.registered())["device_id"]
    mine = Refusals(api.database, api.registry.feed)
    tenants_of, insert_many = subject.admission.tenants_of, subject.events.insert_many
    pending = [3]

    def knock_again() -> None:
        for _ in range(pending.pop() if pending else 0):
            note(mine, DeviceId(UUID(device)))

    async def looked_up(connection: Connection, named: Sequence[DeviceId]) -> dict[Any, Any]:
        if point == "before the row is made":
            knock_again()
        return await tenants_of(connection, named)

    async def inserted(connection: Connection, rows: list[NewEvent]) -> None:
        nonlocal outcome
        failing, outcome = outcome, None
        knock_again()
        if failing is not None:
            raise failing
        await insert_many(connection, rows)

    monkeypatch.setattr(subject.admission, "tenants_of", looked_up)
    monkeypatch.setattr(subject.events, "insert_many", inserted)
    note(mine, DeviceId(UUID(device)))
    expected = type(outcome) if outcome is not None else None
    if expected is None:
        await mine.flush()
    else:
        with pytest.raises(expected):
            await mine.flush()
    await mine.flush_all()
    found = await in_timeline(api, device)
    assert sum(each["count"] for each in found) == 4
    assert all(each["correlation_ids"] == ["corr-1"] * each["count"] for each in found), found
    assert mine._held
    assert not any(held.count for held in mine._held.values())
