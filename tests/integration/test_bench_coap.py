"""The load of CoAP's benchmark counts what happened: it cannot be fast by not doing its work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.bench.coap_client import ProtocolError, PskClient
from tests.bench.coap_load import CertificateSide, Psk, PskSide, Task, establish, handshakes, requests
from tests.coap_server import CoapDevice, Running, serving_coap
from tests.dtls_peers import KEY, Echo, make_client_certificate, serving
from tests.http_api import Api, api  # noqa: F401
from tests.tls_peers import make_certificate

DEVICE = Psk("device-1", KEY)


@pytest.fixture
async def coap(api: Api) -> AsyncIterator[Running]:  # noqa: F811
    async with serving_coap(api) as running:
        yield running


async def test_each_handshake_that_it_counts_was_one_and_is_closed_again() -> None:
    async with serving() as listener:
        task = Task("handshakes", listener.port, [DEVICE], seconds=0.4, at_once=3)
        seen = await asyncio.to_thread(handshakes, task, [PskSide(DEVICE) for _ in range(3)])
        await asyncio.sleep(0)
    counters = listener.counters
    assert seen.count > 0
    assert 0 <= counters.established - seen.count <= 3 + seen.stalled  # those under way at the end
    assert counters.psk == counters.established
    assert counters.established - counters.closed_by_peer <= 3 + seen.stalled
    assert counters.challenged >= seen.count


async def test_handshakes_by_certificate_show_one() -> None:
    async with serving(credentials=make_certificate().credentials()) as listener:
        task = Task("handshakes", listener.port, [], seconds=0.4, at_once=2)
        holder = make_client_certificate()
        seen = await asyncio.to_thread(handshakes, task, [CertificateSide(holder) for _ in range(2)])
    assert seen.count > 0
    assert listener.counters.client_certificates == listener.counters.established >= seen.count


async def test_idle_sessions_stay_until_they_say_goodbye() -> None:
    async with serving() as listener:
        task = Task("idle", listener.port, [DEVICE], sessions=40)
        wires = await asyncio.to_thread(establish, task, [PskSide(DEVICE) for _ in range(40)])
        assert listener.counters.open == 40
        for wire in wires:
            wire.say(wire.side.goodbye())
            wire.socket.close()
        async with asyncio.timeout(20):
            while listener.counters.open:
                await asyncio.sleep(0.005)


async def test_every_request_that_it_counts_is_stored(coap: Running) -> None:
    devices = [await coap.device(f"HW-{number}") for number in range(2)]
    task = Task("requests", coap.port, _keys(devices), seconds=0.4, at_once=2, most=2_000)
    seen = await asyncio.to_thread(requests, task)
    assert seen.count > 0
    assert 0 <= coap.server.counters.stored - (seen.count + seen.before) <= seen.stalled
    assert coap.server.coap_counters.duplicates == 0


async def test_an_answer_that_is_no_success_fails_the_load(coap: Running) -> None:
    task = Task("requests", coap.port, _keys([await coap.device()]), seconds=0.2, at_once=1, most=10, path="nothing")
    with pytest.raises(AssertionError):
        await asyncio.to_thread(requests, task)


async def test_a_wrong_key_is_an_error_and_not_a_fast_handshake() -> None:
    async with serving(Echo()) as listener:
        task = Task("idle", listener.port, [], sessions=1)
        with pytest.raises(ProtocolError, match="alert 20"):
            await asyncio.to_thread(establish, task, [PskSide(Psk("device-1", bytes(32)))])


def test_a_server_that_speaks_out_of_turn_is_an_error() -> None:
    client = PskClient(b"device-1", KEY)
    client.hello()
    certificate = b"\x0b" + bytes(11)  # a message of type Certificate, empty
    with pytest.raises(ProtocolError, match="message 11 at HELLO"):
        client.receive(b"\x16\xfe\xfd" + bytes(9) + bytes((len(certificate),)) + certificate)


def _keys(devices: list[CoapDevice]) -> list[Psk]:
    return [Psk(device.identity, device.key) for device in devices]
