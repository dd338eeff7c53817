"""The device of test_coap_clients.py, played by aiocoap's client over tinydtls. Takes a JSON object, prints JSON lines.

tinydtls (through DTLSSocket, which tests/parts.sh builds) knows one suite for PSKs, `TLS_PSK_WITH_AES_128_CCM_8`, and
no certificates. It closes its side when the server says close_notify, as it should; aiocoap 0.4 only logs that, because
it expects the alert's level to be fatal (in RFC 5246 §7.2.1 it may be a warning, and everybody's is), and leaves what
waits on the association waiting. So the end is read from its log here, and the next request comes from a new context.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import aiocoap
import cbor2
from aiocoap.error import Error
from aiocoap.numbers.codes import Code
from aiocoap.numbers.contentformat import ContentFormat

SECONDS = 20


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def value(message: aiocoap.Message) -> Any:
    return cbor2.loads(message.payload) if message.opt.content_format == 60 else json.loads(message.payload)


async def context(asked: dict[str, Any]) -> aiocoap.Context:
    made = await aiocoap.Context.create_client_context(transports=["tinydtls"])
    dtls = {"psk": bytes.fromhex(asked["key"]), "client-identity": asked["identity"].encode()}
    made.client_credentials.load_from_dict({f"{base(asked)}/*": {"dtls": dtls}})
    return made


def base(asked: dict[str, Any]) -> str:
    return f"coaps://127.0.0.1:{asked['port']}"


async def ask(made: aiocoap.Context, message: aiocoap.Message) -> aiocoap.Message:
    return await asyncio.wait_for(made.request(message).response, SECONDS)


async def provision(asked: dict[str, Any]) -> None:
    made = await context(asked)
    payload = cbor2.dumps(asked["request"])
    uri = f"{base(asked)}/provision"
    answer = await ask(
        made, aiocoap.Message(code=Code.POST, uri=uri, payload=payload, content_format=ContentFormat.CBOR)
    )
    say(code=answer.code.dotted, answer=value(answer))
    await made.shutdown()


class Ends(logging.Handler):
    """Hears that the server has said close_notify."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "Unhandled alert level 1 code 0":
            self.seen.set()


async def follow(observation: Any) -> None:
    """Until it is cancelled."""
    async for seen in observation:
        say(config=value(seen), code=seen.code.dotted)


async def live(asked: dict[str, Any]) -> None:
    ends = Ends()
    logging.getLogger("coap").addHandler(ends)
    made = await context(asked)
    uri = f"{base(asked)}/telemetry"
    codes = []
    for chosen, payload in ((ContentFormat.JSON, b'{"n": 1}'), (ContentFormat.CBOR, cbor2.dumps({"n": 2}))):
        message = aiocoap.Message(code=Code.POST, uri=uri, payload=payload, content_format=chosen)
        codes.append((await ask(made, message)).code.dotted)
    say(telemetry=codes)
    request = made.request(
        aiocoap.Message(code=Code.GET, uri=f"{base(asked)}/config", observe=0, accept=ContentFormat.CBOR)
    )
    first = await asyncio.wait_for(request.response, SECONDS)
    say(config=value(first) if first.payload else None, code=first.code.dotted)
    notified = asyncio.ensure_future(follow(request.observation))
    ended = asyncio.ensure_future(ends.seen.wait())
    await asyncio.wait({notified, ended}, timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED)
    for task in (notified, ended):
        task.cancel()
    if ends.seen.is_set():
        say(closed="close_notify")
    await made.shutdown()

    again = await context(asked)
    try:
        answer = await ask(again, aiocoap.Message(code=Code.GET, uri=f"{base(asked)}/time"))
        say(answered=answer.code.dotted)
    except (Error, TimeoutError) as refused:
        say(refused=f"{type(refused).__name__}: {refused.__cause__!r}")
    await again.shutdown()


async def commands(asked: dict[str, Any]) -> None:
    made = await context(asked)
    seen: asyncio.Queue[aiocoap.Message] = asyncio.Queue()
    request = made.request(aiocoap.Message(code=Code.GET, uri=f"{base(asked)}/commands", observe=0))
    request.observation.register_callback(seen.put_nowait)  # iterating would pass over what was replaced meanwhile
    say(command=value(await asyncio.wait_for(request.response, SECONDS)))
    for _ in range(asked["count"] - 1):
        say(command=value(await asyncio.wait_for(seen.get(), SECONDS)))
    await made.shutdown()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    asyncio.run({"provision": provision, "live": live, "commands": commands}[asked["step"]](asked))
