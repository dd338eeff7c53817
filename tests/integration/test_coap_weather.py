"""A whole server with its database behind a bad network: every handshake and every exchange completes, stored once.

    aiocoap on OpenSSL's DTLS ─┐
    coap-client-openssl ───────┴─► coap_weather.BadPath ─► CoapServer ─► the core ─► PostgreSQL

One datagram in ten is lost, one in ten doubled, each held back by up to 50 ms, one in twenty by up to half a second and
so overtaken by others, none of more than 600 bytes gets through; both ways, by a seed. What must hold then: no
handshake fails, with a PSK or with a certificate; no exchange fails; and of each uplink the database has one row,
though its message was sent several times where its answer was lost. The server runs on its defaults.

libcoap's client with GnuTLS is not among the clients: where its last flight is lost it waits for 5 s, sends nothing
again whatever the server repeats, and gives up. That is its own doing.

In the suite there are few devices. What issue 5 asks for, 200 handshakes and 2,000 exchanges, 600 bodies in blocks too:

    GATEHOUSE_COAP_DEVICES=200 pytest tests/integration/test_coap_weather.py -s
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import pytest
from aiocoap.numbers.codes import Code
from cryptography.hazmat.primitives.serialization import Encoding

from tests.coap_server import CBOR, JSON, Running, serving_coap
from tests.coap_weather import BadPath, bad_path, coap_through_dtls
from tests.dtls_peers import Weather, certificate_client_context, make_client_certificate
from tests.http_api import Api, api  # noqa: F401

DEVICES = int(os.environ.get("GATEHOUSE_COAP_DEVICES", "8"))
SEED = int(os.environ.get("GATEHOUSE_COAP_SEED", "1"))
EACH = 10  # telemetry messages of one device
BAD = Weather(loss=0.1, duplication=0.1, longest_delay=0.05, mtu=600)
LONG = "0123456789abcdef" * 96  # 1,536 bytes: four blocks of 512 with what is around it


@pytest.fixture
async def coap(api: Api) -> AsyncIterator[Running]:  # noqa: F811
    async with serving_coap(api) as running:
        yield running


async def registered(coap: Running, number: int) -> tuple[str, Any]:
    """A device and its client's context: every second one with a certificate of its own authority."""
    config = {"number": number, "text": LONG}
    if number % 2 == 0:
        device = await coap.device(f"HW-{number}", config=config)
        return device.device_id, device.context()
    holder = make_client_certificate(f"HW-{number}")
    made = await coap.api.registered(f"HW-{number}", config=config)
    pem = holder.certificate.public_bytes(Encoding.PEM).decode()
    await coap.post(f"/devices/{made['device_id']}/certs", {"certificate": pem, "overlap_seconds": 0})
    return made["device_id"], certificate_client_context(holder)


async def life(coap: Running, path: BadPath, number: int, device_id: str, context: Any) -> None:
    """What one device does: it tells, sends and fetches what is large, and answers a command."""
    async with coap_through_dtls(path.port, context, mtu=600, exponent=5) as client:
        for each in range(EACH):
            value = {f"main.n{each}": number}
            payload, kind = (cbor2.dumps(value), CBOR) if each % 2 else (msgspec.json.encode(value), JSON)
            answer = await client.ask(Code.POST, "telemetry", payload, content_format=kind)
            assert answer.code == Code.CHANGED, answer
        large = msgspec.json.encode({"number": number, "text": LONG})
        assert (await client.ask(Code.POST, "events", large, content_format=JSON)).code == Code.CHANGED
        config = await client.ask(Code.GET, "config", accept=CBOR)
        assert cbor2.loads(config.payload)["config"] == {"number": number, "text": LONG}
        command = msgspec.json.decode((await client.ask(Code.GET, "commands")).payload)
        assert command["params"] == {"text": LONG}
        response = msgspec.json.encode({"result": {"number": number}})
        done = await client.ask(Code.POST, f"commands/{command['command_id']}", response, content_format=JSON)
        assert done.code == Code.CHANGED


@pytest.mark.timeout(600)
async def test_every_handshake_and_exchange_comes_through_bad_weather_and_is_stored_once(coap: Running) -> None:
    known = [await registered(coap, number) for number in range(DEVICES)]
    for device_id, _ in known:
        await coap.post(f"/devices/{device_id}/commands", {"method": "write", "params": {"text": LONG}})
    begun = time.monotonic()
    async with bad_path(coap.port, BAD, SEED) as path:
        lives = (life(coap, path, number, *each) for number, each in enumerate(known))
        ended = await asyncio.gather(*lives, return_exceptions=True)
    failed = [each for each in ended if each is not None]
    assert not failed, f"{len(failed)} of {DEVICES} devices failed, the first with {failed[0]!r}"
    messages, dtls = coap.server.coap_counters, coap.server.dtls_counters
    print(
        f"\n{DEVICES} handshakes, {DEVICES * EACH} telemetry exchanges and {DEVICES * 4} others "
        f"in {time.monotonic() - begun:.1f} s; datagrams: {path.carried} carried, {path.lost} lost, "
        f"{path.doubled} doubled, {path.overtaken} overtaken, {path.oversized} too large; "
        f"requests {messages.requests}, known again {messages.duplicates}; "
        f"{ {name: count for name, count in dtls.as_dict().items() if count} }"
    )

    stored = await rows(coap)
    expected = {
        (device_id, f"main.n{each}", number): 1 for number, (device_id, _) in enumerate(known) for each in range(EACH)
    }
    assert stored == Counter(expected) + Counter({(device_id, "event", n): 1 for n, (device_id, _) in enumerate(known)})
    for device_id, _ in known:
        [command] = (await coap.get(f"/devices/{device_id}/commands"))["commands"]
        assert command["status"] == "succeeded"
    assert dtls.established == DEVICES
    assert messages.duplicates > DEVICES, "answers were lost, so requests came again"
    assert messages.failures == 0
    for name in ("lost", "doubled", "overtaken"):
        assert getattr(path, name) > DEVICES // 2, f"the weather was too good: {name}"
    assert path.oversized > 0, "flights with certificates are larger than the path at first"


async def rows(coap: Running) -> Counter[tuple[str, str, int]]:
    """How often each uplink is in the database."""
    async with coap.api.database.connection() as connection:
        found = await connection.fetch("SELECT device_id, kind, payload::text AS payload FROM uplink")
    counted: Counter[tuple[str, str, int]] = Counter()
    for row in found:
        payload = msgspec.json.decode(row["payload"])
        if row["kind"] == "event":
            assert payload["text"] == LONG
            counted[str(row["device_id"]), "event", payload["number"]] += 1
        else:
            [(name, value)] = payload.items()
            counted[str(row["device_id"]), name, value] += 1
    return counted


@pytest.mark.timeout(600)
async def test_a_client_that_knows_nothing_of_the_narrow_path_gets_what_is_large(coap: Running) -> None:
    """It asks for no block size, and what is large never arrives as the server would send it; with a PSK the handshake
    has nothing large that could have told it."""
    _, context = await registered(coap, 0)
    async with bad_path(coap.port, Weather(mtu=600), SEED) as path:
        async with coap_through_dtls(path.port, context) as client:
            for _ in range(2):
                config = await client.ask(Code.GET, "config")
                assert msgspec.json.decode(config.payload)["config"] == {"number": 0, "text": LONG}
        assert path.oversized == 2, "it was learned once"
    assert coap.server.coap_counters.narrowed == 1


@pytest.mark.timeout(600)
async def test_libcoaps_client_comes_through_bad_weather(coap: Running) -> None:
    """It gives a handshake up after its fourth timeout, whatever came between: then it is started again, as a device
    would begin again. The message id keeps what was stored before from being stored twice."""
    program = shutil.which("coap-client-openssl")
    if program is None:
        pytest.skip("coap-client-openssl is not installed; tests/parts.sh installs it")
    key = "fedcba9876543210fedcba9876543210"  # libcoap takes it as text
    known: list[str] = []
    for number in range(max(4, DEVICES // 10)):
        psk = {"identity": f"meter-{number}", "key": base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")}
        made = await coap.api.registered(f"HW-{number}", credential_type="psk", psk=psk)
        known.append(made["device_id"])

    async def once(path: BadPath, number: int) -> None:
        address = f"coaps://127.0.0.1:{path.port}/telemetry?message_id=first"
        options = ("-B", "90", "-u", f"meter-{number}", "-k", key, "-m", "post", "-t", "50", "-v", "0")
        process = await asyncio.create_subprocess_exec(program, *options, "-e", f'{{"main.r": {number}}}', address)
        try:
            await asyncio.wait_for(process.wait(), 120)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    expected = Counter({(device_id, "main.r", number): 1 for number, device_id in enumerate(known)})
    rounds, missing = 0, expected
    async with bad_path(coap.port, BAD, SEED) as path:
        while missing and rounds < 5:
            await asyncio.gather(*(once(path, number) for _, _, number in missing))
            missing, rounds = expected - await rows(coap), rounds + 1
    print(f"\n{len(known)} runs of {Path(program).name}, {rounds} rounds; {path.lost} datagrams lost")
    assert await rows(coap) == expected
    assert path.lost > 0
