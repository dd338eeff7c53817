"""The device of test_coap_clients.py over any of the DTLS clients of dtls.py, which it is given. Prints JSON lines."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from random import Random
from typing import Any

from aiocoap.numbers.codes import Code

from tests.interop.coap_clients.client import CoapClient, Ended, connected
from tests.interop.coap_clients.dtls import Certificate, Dtls, Psk

SECONDS = 20
Make = Callable[[Psk | Certificate | None, Path | None], Dtls]
"""A client for a holder of something, or of nothing; without a PSK also the file of the CA that signed the server's
certificate."""


def play(make: Make) -> None:
    """One step of its life, as the argument says."""
    asked = json.loads(sys.argv[1])
    asyncio.run({"provision": provision, "live": live, "commands": commands}[asked["step"]](asked, make))


def device(asked: dict[str, Any], make: Make) -> AbstractAsyncContextManager[CoapClient]:
    def dtls() -> Dtls:
        if "identity" in asked:
            return make(Psk(asked["identity"], bytes.fromhex(asked["key"])), None)
        return make(Certificate(Path(asked["pem"])) if "pem" in asked else None, Path(asked["ca"]))

    return connected(dtls, asked["port"], Random(1), seconds=SECONDS)


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


async def provision(asked: dict[str, Any], make: Make) -> None:
    async with device(asked, make) as client:
        answer = await client.post("provision", asked["request"], 60)
        say(code=answer.code, answer=answer.value)


async def live(asked: dict[str, Any], make: Make) -> None:
    async with device(asked, make) as client:
        answers = [await client.post("telemetry", {"n": 1}), await client.post("telemetry", {"n": 2}, 60)]
        say(telemetry=[answer.code for answer in answers])
        async with client.observed("config", accept=60) as queue:
            while (seen := await asyncio.wait_for(queue.get(), SECONDS)) is not None:
                say(config=seen.value if seen.payload else None, code=seen.code)
        say(closed=await client.until_ended(SECONDS))
        try:
            client.call_out("telemetry", {"n": 3})
            say(called_out=True)
        except ConnectionError:
            say(called_out=False)
    try:
        async with device(asked, make) as client:
            say(answered=(await client.request(Code.GET, "time")).code)
            say(closed=await client.until_ended(SECONDS))
    except (Ended, TimeoutError) as refused:
        say(refused=str(refused))


async def commands(asked: dict[str, Any], make: Make) -> None:
    async with device(asked, make) as client, client.observed("commands") as queue:
        for _ in range(asked["count"]):
            seen = await asyncio.wait_for(queue.get(), SECONDS)
            assert seen is not None
            say(command=seen.value)
