"""Those who belong to nobody yet: a crowd of them holds no place for long, and keeps neither devices nor keys out."""

from __future__ import annotations

from contextlib import AsyncExitStack

from aiocoap.numbers.codes import Code

from adapters.coap.server_limits import ServerLimits
from tests.coap_server import CoapClient, serving_coap
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
