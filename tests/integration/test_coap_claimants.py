"""Those who belong to nobody yet: a crowd of them holds no place for long, and keeps neither devices nor keys out."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
from aiocoap.numbers.codes import Code

from adapters.coap.server_limits import ServerLimits
from adapters.dtls.admission import DtlsLimits
from tests.coap_server import CoapClient, serving_coap
from tests.dtls_peers import udp_client
from tests.http_api import Api, api  # noqa: F401
from tests.nodes import until


async def test_those_turned_away_are_let_go_like_those_let_in(api: Api) -> None:  # noqa: F811
    limits = ServerLimits(provisioning_per_address=2, provisioning_seconds=1.0)
    async with serving_coap(api, limits) as coap, AsyncExitStack() as crowd:
        clients = [await crowd.enter_async_context(coap.client()) for _ in range(5)]
        device = await crowd.enter_async_context(coap.client(await coap.device()))
        for client in clients:
            await client.closed()
        await until(lambda: coap.server.admission.claimants == 0)
        assert (await device.get("/config")).code is Code.CONTENT, "a device stays"


async def test_one_whose_end_fails_keeps_nobody_else(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """One timer is for all: it goes on behind a failure."""

    def fails() -> None:
        raise RuntimeError("a bug of ours")

    async with serving_coap(api) as coap, AsyncExitStack() as crowd:
        clients = [await crowd.enter_async_context(coap.client()) for _ in range(3)]
        guests = list(coap.server._guests.values())
        for guest in guests:
            guest.until = 0.0  # long ago
        monkeypatch.setattr(guests[0], "close_now", fails)
        with pytest.raises(RuntimeError):
            coap.server.admission._end_nobodies()
        for client in clients[1:]:
            await client.closed()


async def test_who_has_a_claim_psk_has_room_beside_a_crowd_that_has_nothing(api: Api) -> None:  # noqa: F811
    async with serving_coap(api, ServerLimits(provisioning_per_address=2)) as coap, AsyncExitStack() as crowd:
        _, context = await coap.template()
        answers = [
            (await (await crowd.enter_async_context(coap.client(who))).get("/time")).code
            for who in (None, None, None, context, context, context)
        ]
        room, full = Code.CONTENT, Code.TOO_MANY_REQUESTS
        assert answers == [room, room, full, room, room, full]


async def test_where_all_places_are_taken_the_greediest_address_gives_one_up(api: Api) -> None:  # noqa: F811
    async with serving_coap(api, ServerLimits(provisioning=3)) as coap, AsyncExitStack() as crowd:
        greedy: list[CoapClient] = []
        for _ in range(3):
            greedy.append(await crowd.enter_async_context(coap.client()))
            assert (await greedy[-1].get("/time")).code is Code.CONTENT
        other = await crowd.enter_async_context(coap.client(local=("127.0.0.2", 0)))
        assert (await other.get("/time")).code is Code.CONTENT
        await greedy[0].closed()
        assert (await greedy[1].get("/time")).code is Code.CONTENT
        more = await crowd.enter_async_context(coap.client(local=("127.0.0.2", 0)))
        assert (await more.get("/time")).code is Code.TOO_MANY_REQUESTS, "it would hold as many, then"


async def test_for_whom_there_was_no_room_is_let_go_soon_unless_there_is_when_it_asks_again(api: Api) -> None:  # noqa: F811
    limits = ServerLimits(provisioning_per_address=1, turned_away_linger=2.5)
    async with serving_coap(api, limits) as coap, AsyncExitStack() as crowd:
        first = await crowd.enter_async_context(coap.client())
        assert (await first.get("/time")).code is Code.CONTENT
        patient, idle = [await crowd.enter_async_context(coap.client()) for _ in range(2)]
        for each in (patient, idle):
            assert (await each.get("/time")).code is Code.TOO_MANY_REQUESTS
        first.socket.client.connection.shutdown()
        first.socket.out(first.socket.client.written())
        await until(lambda: coap.server.admission.claimants == 0)
        assert (await patient.get("/time")).code is Code.CONTENT
        await idle.closed()
        assert (await patient.get("/time")).code is Code.CONTENT, "it has the time of those who were let in"
        assert coap.server.dtls_counters.open == 1


async def test_a_full_table_has_room_for_a_device_while_anybody_in_it_is_nobody(api: Api) -> None:  # noqa: F811
    limits, dtls_limits = ServerLimits(provisioning=2), DtlsLimits(associations=6)
    async with serving_coap(api, limits, dtls_limits=dtls_limits) as coap, AsyncExitStack() as crowd:
        devices = [await coap.device(f"HW-{number}") for number in range(7)]
        known = await crowd.enter_async_context(coap.client(devices[0]))
        assert (await known.get("/config")).code is Code.CONTENT
        nobodies = [await crowd.enter_async_context(coap.client()) for _ in range(9)]
        for each in nobodies[:4]:
            await each.closed()  # they were the oldest
        for device in devices[1:6]:
            client = await crowd.enter_async_context(coap.client(device))
            assert (await client.get("/config")).code is Code.CONTENT
        for each in nobodies:
            await each.closed()
        assert (await known.get("/config")).code is Code.CONTENT, "it was there before them all"
        counters = coap.server.dtls_counters.as_dict()
        assert (counters["dropped_displaced"], counters["dropped_association_limit"]) == (9, 0)
        async with udp_client(coap.port, devices[6].context()) as one_too_many:
            one_too_many.out(one_too_many.client.step())
            await until(lambda: coap.server.dtls_counters.as_dict()["dropped_association_limit"] > 0)
        assert (coap.server.dtls_counters.open, coap.server.coap_counters.peers) == (6, 6)


async def test_what_one_address_may_ask_without_a_credential_is_bounded_over_all_its_associations(api: Api) -> None:  # noqa: F811
    limits = ServerLimits(open_requests_per_second=0.001, open_requests_burst=3)
    async with serving_coap(api, limits) as coap, AsyncExitStack() as crowd:
        first, second = [await crowd.enter_async_context(coap.client()) for _ in range(2)]
        paths = ("/time", "/.well-known/core", "/.well-known/est/crts", "/time")
        answers = [await client.get(path) for client, path in zip((first, first, second, second), paths, strict=True)]
        content, full = Code.CONTENT, Code.TOO_MANY_REQUESTS
        assert [answer.code for answer in answers] == [content, content, content, full]
        assert (answers[-1].max_age or 0) > 100
        elsewhere = await crowd.enter_async_context(coap.client(local=("127.0.0.2", 0)))
        assert (await elsewhere.get("/time")).code is Code.CONTENT
        device = await crowd.enter_async_context(coap.client(await coap.device()))
        assert (await device.get("/config")).code is Code.CONTENT, "who has a credential has limits of its own"
        assert coap.server.counters.open_requests == 1


async def test_only_admitted_devices_share_the_devices_memory(api: Api) -> None:  # noqa: F811
    async with serving_coap(api) as coap, AsyncExitStack() as crowd:
        _, claim = await coap.template()
        duplicates = coap.server._endpoint._memory.duplicates
        for who in (None, claim):
            client = await crowd.enter_async_context(coap.client(who))
            assert (await client.get("/time")).code is Code.CONTENT
        strangers = duplicates.size
        assert (duplicates._strangers.bytes, duplicates._devices.bytes) == (strangers, 0)
        device = await crowd.enter_async_context(coap.client(await coap.device()))
        assert (await device.get("/config")).code is Code.CONTENT
        assert duplicates._strangers.bytes == strangers
        assert duplicates._devices.bytes > 0
