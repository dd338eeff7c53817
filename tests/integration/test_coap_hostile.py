"""What clients do wrong, and what people on the path do, to a whole server over real DTLS: they get the declared error.

    interrupted and overlapping uploads      4.08, bounded in bytes and in number, gone with time and with their peer
    bodies up to 64 KiB, and beyond          taken and stored; 4.13 with Size1
    noise inside an association              4.xx, a Reset or nothing; never 5.00, never the association's end
    noise before any handshake               nothing at all
    certificates for something else, old DTLS   refused; and the next handshake from the same port is a good one

The message layer's and the engine's own tests have the details (test_coap_blockwise.py, test_dtls_engine.py).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from aiocoap import Message
from aiocoap.numbers.codes import Code
from aiocoap.numbers.types import Type
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from adapters.coap.limits import CoapLimits
from tests.coap_server import JSON, CoapClient, Running, serving_coap
from tests.dtls_peers import (
    certificate_client_context,
    make_client_certificate,
    plain_socket,
    psk_client_context,
    udp_client,
)
from tests.http_api import Api, api  # noqa: F401
from tests.nodes import until

NOISES = 1_500
SEED = 11


@pytest.fixture
async def coap(api: Api) -> AsyncIterator[Running]:  # noqa: F811
    async with serving_coap(api) as running:
        yield running


async def put(
    client: CoapClient, number: int, more: bool, payload: bytes, path: str = "/events", **more_options: Any
) -> Message:
    """One block of 64 bytes; its answer."""
    options = {"content_format": JSON, "block1": (number, more, 2)} | more_options
    return await client._exchange(Code.POST, path, payload, **options)


def body(size: int) -> bytes:
    """An event of exactly so many bytes."""
    return msgspec.json.encode({"t": "x" * (size - 8)})


async def test_an_upload_of_64_KiB_is_stored_and_one_byte_more_is_refused(coap: Running) -> None:
    device = await coap.device()
    async with coap.client(device) as client:
        whole = body(65_536)
        assert len(whole) == 65_536
        assert (await client.upload("/events", whole)).code is Code.CHANGED
        for exponent in (6, 2):
            refused = await client.upload("/events", body(65_537), exponent=exponent)
            assert (refused.code, refused.size1) == (Code.REQUEST_ENTITY_TOO_LARGE, 65_536)
        told = await put(client, 0, True, b"x" * 64, size1=65_537)
        assert (told.code, told.opt.size1) == (Code.REQUEST_ENTITY_TOO_LARGE, 65_536), "not one block of it is taken"
    [uplink] = await coap.uplinks(device.device_id)
    assert uplink["payload"] == {"t": "x" * 65_528}
    assert coap.server._endpoint._memory.uploads.size == 0


async def test_what_is_large_comes_down_whole(coap: Running) -> None:
    config = {"n": list(range(5_000))}
    device = await coap.device(config=config)
    async with coap.client(device) as client:
        answer = await client.get("/config")
    assert len(answer.payload) > 23_000
    assert answer.value == {"version": 1, "config": config}


async def test_an_interrupted_upload_is_forgotten_and_its_rest_is_incomplete(api: Api) -> None:  # noqa: F811
    async with serving_coap(api, coap_limits=CoapLimits(upload_timeout=0.3)) as coap:
        device = await coap.device()
        uploads = coap.server._endpoint._memory.uploads
        async with coap.client(device) as client:
            for number in (0, 1):
                assert (await put(client, number, True, b" " * 64)).code is Code.CONTINUE
            await until(lambda: uploads.size == 0)
            assert (await put(client, 2, False, b"{}")).code is Code.REQUEST_ENTITY_INCOMPLETE
            assert (await put(client, 0, True, b" " * 64)).code is Code.CONTINUE
        assert await coap.uplinks(device.device_id) == []


async def test_overlapping_uploads_are_told_apart_by_peer_and_tag_and_else_the_later_stands(coap: Running) -> None:
    device, other = await coap.device(), await coap.device("HW-2")
    async with coap.client(device) as client, coap.client(other) as neighbour:
        assert (await put(client, 0, True, b"[1" + b" " * 62)).code is Code.CONTINUE
        assert (await put(neighbour, 0, True, b"[2" + b" " * 62)).code is Code.CONTINUE
        assert (await put(client, 0, True, b"[3" + b" " * 62, request_tag=(b"t",))).code is Code.CONTINUE
        assert (await put(client, 1, True, b" " * 64)).code is Code.CONTINUE
        assert (await put(client, 0, True, b"[4" + b" " * 62)).code is Code.CONTINUE, "without a tag: begun anew"
        late = await put(client, 2, False, b",5]")
        assert late.code is Code.REQUEST_ENTITY_INCOMPLETE, "the rest of what was begun before"
        assert (await put(client, 1, False, b",6]")).code is Code.REQUEST_ENTITY_INCOMPLETE, "that was the end of both"
        assert (await put(neighbour, 1, False, b",7]")).code is Code.CHANGED
        assert (await put(client, 1, False, b",8]", request_tag=(b"t",))).code is Code.CHANGED
    assert [each["payload"] for each in await coap.uplinks(device.device_id)] == [[3, 8]]
    assert [each["payload"] for each in await coap.uplinks(other.device_id)] == [[2, 7]]
    assert coap.server.coap_counters.incomplete == 2


async def test_uploads_that_nobody_finishes_are_bounded_and_go_with_their_peer(coap: Running) -> None:
    device = await coap.device()
    memory, limits = coap.server._endpoint._memory, coap.server._endpoint.limits
    async with coap.client(device) as client:
        for number in range(40):
            begun = await put(client, 0, True, b" " * 1024, request_tag=(b"%d" % number,), block1=(0, True, 6))
            assert begun.code is Code.CONTINUE
            assert len(memory.uploads) <= limits.uploads_per_peer
            assert memory.uploads.size <= limits.upload_bytes_per_peer
        oldest = await put(client, 1, False, b"{}", request_tag=(b"0",), block1=(1, False, 6))
        assert oldest.code is Code.REQUEST_ENTITY_INCOMPLETE, "its own newer ones have taken its place"
        client.socket.client.connection.shutdown()
        client.socket.out(client.socket.client.written())
        await until(lambda: memory.uploads.size == 0)
    assert coap.server.coap_counters.peers == 0


def noise(generator: random.Random) -> bytes:
    """A valid request with something wrong in it, a piece of one, or nothing that ever was one."""
    path = generator.choice(["telemetry", "config", "commands", "time", "provision", ".well-known/core", "uplink"])
    valid = Message(
        code=generator.choice([Code.GET, Code.POST, Code.PUT, Code.DELETE, Code.FETCH]),
        _mid=generator.randrange(65_536),
        _mtype=generator.choice([Type.CON, Type.NON]),
        _token=generator.randbytes(generator.randrange(9)),
        payload=generator.choice([b"", b"{", b"\xa1", b"[[[[", b"\xff" * 20, generator.randbytes(40)]),
    )
    valid.opt.uri_path = tuple(path.split("/"))
    if generator.random() < 0.3:
        valid.opt.observe = generator.choice([0, 1])
    if generator.random() < 0.3:
        valid.opt.block1 = (generator.randrange(100), generator.random() < 0.5, generator.randrange(7))
    if generator.random() < 0.3:
        valid.opt.block2 = (generator.randrange(100), False, generator.randrange(7))
    whole = bytearray(valid.encode())
    fate = generator.random()
    if fate < 0.3:
        return bytes(whole[: generator.randrange(len(whole))])
    if fate < 0.6:
        for _ in range(generator.randrange(1, 4)):
            whole[generator.randrange(len(whole))] = generator.randrange(256)
        return bytes(whole)
    return bytes(whole) if fate < 0.8 else generator.randbytes(generator.randrange(80))


@pytest.mark.parametrize("who", ["device", "claimant", "nobody"])
async def test_noise_inside_an_association_gives_only_declared_errors(coap: Running, who: str) -> None:
    device = await coap.device()
    _, claim = await coap.template()
    generator = random.Random(SEED)
    async with coap.client({"device": device, "claimant": claim, "nobody": None}[who]) as client:
        assert (await client.get("/time")).code is Code.CONTENT
        heard = client.socket.client.plain
        for number in range(NOISES):
            sent = noise(generator)
            if sent:
                client.socket.out(client.socket.client.send(sent))
            if number % 15 == 14:  # in step with the server, so that few are told that it is busy
                client.send(Message(code=Code.EMPTY, _mid=number, _mtype=Type.CON, _token=b""))
                before = len(heard)
                await client.socket.until(lambda before=before: len(heard) > before)
                await until(lambda: coap.server.coap_counters.serving == 0)
        await until(lambda: coap.server.coap_counters.serving == 0)
        codes = {Message.decode(each).code for each in heard}
        assert Code.INTERNAL_SERVER_ERROR not in codes
        assert len(codes) > 7
        assert not client.socket.client.closed
    counters = coap.server.coap_counters
    assert counters.failures == 0
    assert counters.malformed > NOISES / 20
    assert coap.server.dtls_counters.open <= 1
    async with coap.client(device) as client:
        assert (await client.post("/telemetry", {"main.t": 1})).code is Code.CHANGED


async def test_noise_before_any_handshake_is_answered_by_nothing(coap: Running) -> None:
    generator, made = random.Random(SEED), plain_socket(coap.port)
    made.setblocking(False)
    try:
        for number in range(NOISES):
            made.send(
                noise(generator) if number % 2 else b"\x16\xfe\xfd" + generator.randbytes(generator.randrange(90))
            )
            if number % 50 == 49:
                await asyncio.sleep(0)
        device = await coap.device()
        async with coap.client(device) as client:
            assert (await client.get("/time")).code is Code.CONTENT
        with pytest.raises(BlockingIOError):
            made.recv(4096)
    finally:
        made.close()
    assert (coap.server.dtls_counters.started, coap.server.coap_counters.received > 0) == (1, True)


async def test_a_refused_handshake_never_blocks_the_next_from_the_same_port(coap: Running) -> None:
    for_servers = make_client_certificate("device-1", usages=[ExtendedKeyUsageOID.SERVER_AUTH])
    signs_nothing = make_client_certificate("device-1", signing=False)
    expired = make_client_certificate("device-1", expired=True)
    good = make_client_certificate("device-1")
    made = await coap.api.registered()
    path, pem = f"/devices/{made['device_id']}/certs", good.certificate.public_bytes(Encoding.PEM).decode()
    await coap.post(path, {"certificate": pem, "overlap_seconds": 0})
    refused = {
        "certificate for servers": certificate_client_context(for_servers),
        "key that must not sign": certificate_client_context(signs_nothing),
        "DTLS 1.0": psk_client_context(version=0xFEFF, suites=b"ALL"),
        "wrong key": psk_client_context(),
    }
    ours = plain_socket(coap.port)
    local = ours.getsockname()
    ours.close()
    for context in refused.values():
        async with udp_client(coap.port, context, local) as failing:
            with pytest.raises(AssertionError):
                await failing.handshake()
        async with udp_client(coap.port, certificate_client_context(good), local) as socket:
            await socket.handshake()
            client = CoapClient(socket)
            assert (await client.post("/telemetry", {"main.t": 1})).code is Code.CHANGED
            client.stop()
    async with coap.client(certificate_client_context(expired), local=local) as client:
        assert (await client.get("/config")).code is Code.UNAUTHORIZED, "the certificate's time is the application's"
        await client.closed()
    counted = coap.server.dtls_counters.as_dict()
    assert (counted["dropped_certificate"], counted["dropped_wrong_key"]) == (2, 1)
    assert counted["dropped_version"] >= 1  # a ClientHello may come twice
