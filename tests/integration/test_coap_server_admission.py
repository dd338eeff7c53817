"""Admission over CoAP: PSKs and certificates, who is refused and how, and what ends an association."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from aiocoap.numbers.codes import Code
from cryptography.hazmat.primitives.serialization import Encoding

from adapters.coap.admission import Guest
from adapters.coap.server_limits import ServerLimits
from registry.errors import Unavailable
from registry.model import DeviceId
from tests.coap_server import CoapDevice, Gone, Running, key_bytes, serving_coap
from tests.dtls_peers import certificate_client_context, make_client_certificate
from tests.http_api import Api, api  # noqa: F401
from tests.nodes import until


@pytest.fixture
async def coap(api: Api) -> AsyncIterator[Running]:  # noqa: F811
    async with serving_coap(api) as running:
        yield running


async def certified(coap: Running, hardware_id: str = "HW-X") -> tuple[str, Any]:
    """A device that has a certificate of its own authority, and the context of its client."""
    holder = make_client_certificate(hardware_id)
    made = await coap.api.registered(hardware_id)
    pem = holder.certificate.public_bytes(Encoding.PEM).decode()
    body = {"certificate": pem, "overlap_seconds": 0}
    await coap.post(f"/devices/{made['device_id']}/certs", body)
    return made["device_id"], certificate_client_context(holder)


async def test_a_registered_certificate_of_any_authority_admits_until_it_is_revoked(coap: Running) -> None:
    device_id, context = await certified(coap)
    async with coap.client(context) as client:
        assert (await client.post("/telemetry", {"main.t": 1})).code is Code.CHANGED
        assert (await client.observe("/config")).code is Code.CONTENT
        listed = (await coap.get(f"/devices/{device_id}/credentials"))["credentials"]
        [living] = [each["credential_id"] for each in listed if each["revoked_at"] is None]
        await coap.post(f"/devices/{device_id}/credentials/{living}", method="DELETE")
        with pytest.raises(Gone):
            await client.notified()
    async with coap.client(context) as client:
        answer = await client.get("/config")
        assert answer.code is Code.UNAUTHORIZED
        await client.closed()
    assert coap.server.counters.refused == 1
    events = (await coap.get(f"/devices/{device_id}/timeline"))["events"]
    [refused] = [event["data"] for event in events if event["kind"] == "auth.refused"]
    assert refused["reason"] == "credential revoked"
    assert answer.payload.endswith(f"({refused['correlation_ids'][0]})".encode()), "by it the operator finds the reason"


async def test_an_unknown_certificate_is_told_once_and_closed(coap: Running) -> None:
    async with coap.client(certificate_client_context(make_client_certificate("stranger"))) as client:
        for path in ("/time", "/config"):
            assert (await client.get(path)).code is Code.UNAUTHORIZED, "a refused certificate is nobody"
        await client.closed()


async def test_a_psk_is_rotated_with_overlap_and_the_old_one_ends(coap: Running) -> None:
    device = await coap.device()
    rotated = await coap.post(f"/devices/{device.device_id}/credentials/rotate", {"retire_on_use": True})
    fresh = CoapDevice(
        device.device_id, rotated["credential_id"], rotated["psk"]["identity"], key_bytes(rotated["psk"]["key"])
    )
    assert (fresh.identity, fresh.key) != (device.identity, device.key)
    async with coap.client(device) as old:
        assert (await old.get("/config")).code is Code.CONTENT, "within the overlap"
        async with coap.client(fresh) as new:
            assert (await new.get("/config")).code is Code.CONTENT
            await old.closed()
    assert await coap.refuses(device)


async def test_a_wrong_key_an_unknown_identity_and_a_revoked_one_have_one_face(coap: Running) -> None:
    device, revoked = await coap.device(), await coap.device("HW-2")
    await coap.post(f"/devices/{revoked.device_id}/credentials/{revoked.credential_id}", method="DELETE")
    faces = {
        await coap.refuses(CoapDevice("", "", device.identity, b"x" * 32)),
        await coap.refuses(CoapDevice("", "", "nobody", device.key)),
        await coap.refuses(revoked),
    }
    assert len(faces) == 1
    await coap.api.registry.refusals.flush()
    events = (await coap.get(f"/devices/{revoked.device_id}/timeline"))["events"]
    refused = [event["data"]["reason"] for event in events if event["kind"] == "auth.refused"]
    assert refused == ["credential revoked"], "the operator is told why"


async def test_a_wrong_key_of_a_known_device_is_in_its_timeline_and_a_lost_handshake_is_not(coap: Running) -> None:
    device = await coap.device()
    async with coap.client(device) as client:
        assert (await client.get("/time")).code is Code.CONTENT
    assert await coap.refuses(CoapDevice("", "", device.identity, b"x" * 32))
    await until(lambda: coap.api.registry.resolver.counters.refused.get("psk does not verify") == 1)
    await coap.api.registry.refusals.flush()
    events = (await coap.get(f"/devices/{device.device_id}/timeline"))["events"]
    [refused] = [event["data"] for event in events if event["kind"] == "auth.refused"]
    assert (refused["reason"], refused["transport"], refused["count"]) == ("psk does not verify", "coap", 1)
    assert refused["credential_id"] == device.credential_id


async def test_setting_a_device_inactive_and_deleting_it_end_its_association(coap: Running) -> None:
    for number, end in enumerate(("inactive", "delete")):
        device = await coap.device(f"HW-{number}")
        async with coap.client(device) as client:
            assert (await client.get("/config")).code is Code.CONTENT
            path = f"/devices/{device.device_id}"
            if end == "delete":
                await coap.post(path, method="DELETE")
            else:
                await coap.post(path, {"status": "inactive"}, "PUT")
            await client.closed()
        assert await coap.refuses(device)


async def test_of_one_device_the_newest_associations_stay(api: Api) -> None:  # noqa: F811
    async with serving_coap(api, ServerLimits(associations_per_device=2)) as coap:
        device, other = await coap.device(), await coap.device("HW-2")
        async with coap.client(device) as first, coap.client(device) as second, coap.client(other) as foreign:
            for client in (foreign, first, second):
                assert (await client.get("/time")).code is Code.CONTENT
            async with coap.client(device) as third:
                assert (await third.get("/time")).code is Code.CONTENT
                await first.closed()
                for client in (second, foreign):
                    assert (await client.get("/time")).code is Code.CONTENT
        assert coap.server.counters.replaced == 1


async def test_sessions_are_seen_kicked_and_gone_with_their_association(coap: Running) -> None:
    device = await coap.device()
    async with coap.client(device) as client:
        await client.get("/time")
        [session] = coap.api.registry.sessions.all()
        assert session.contact.transport.value == "coap"
        client.socket.client.connection.shutdown()
        client.socket.out(client.socket.client.written())
        await until(lambda: coap.api.registry.sessions.all() == [])
    assert (await coap.get(f"/devices/{device.device_id}"))["status"] == "active", (
        "an association says nothing of its end"
    )


async def test_what_an_association_leaves_behind_needs_no_garbage_collector(coap: Running) -> None:
    """Guest and session name each other, and thousands of them may come and go each second."""
    device = await coap.device()
    gc.disable()
    try:
        async with coap.client(device) as client:
            await client.get("/time")
            [guest] = map(weakref.ref, coap.server._guests.values())
            assert guest() is not None
            client.socket.client.connection.shutdown()
            client.socket.out(client.socket.client.written())
            await until(lambda: guest() is None)
    finally:
        gc.enable()


async def test_requests_wait_for_the_verdict_and_a_passing_failure_is_asked_again(
    coap: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = await coap.device()
    resolver = coap.api.registry.resolver
    confirm, gate, asked = resolver.confirm, asyncio.Event(), 0

    async def slow(*arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            await gate.wait()
            raise Unavailable("the database is away", retry_after=3.0)
        return await confirm(*arguments)

    monkeypatch.setattr(resolver, "confirm", slow)
    async with coap.client(device) as client:
        waiting = asyncio.create_task(client.get("/config"))
        await until(lambda: asked == 1)
        assert not waiting.done()
        monkeypatch.setattr(resolver, "confirm", _away)
        gate.set()
        answer = await waiting
        assert (answer.code, answer.max_age) == (Code.SERVICE_UNAVAILABLE, 3)
        monkeypatch.setattr(resolver, "confirm", confirm)
        assert (await client.get("/config")).code is Code.CONTENT


async def _away(*_: Any) -> Any:
    raise Unavailable("the database is away", retry_after=3.0)


async def test_a_defect_while_it_is_being_judged_is_answered_and_asked_again(
    coap: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = await coap.device()
    resolver, gate = coap.api.registry.resolver, asyncio.Event()
    recheck = resolver.recheck

    async def broken(*_: Any) -> Any:
        await gate.wait()
        raise KeyError("a defect")

    monkeypatch.setattr(resolver, "recheck", broken)
    async with coap.client(device) as client:
        waiting = asyncio.create_task(client.get("/config"))
        [peer] = coap.server._endpoint._peers.values()
        await until(lambda: peer._held)
        gate.set()
        async with asyncio.timeout(10):
            answer = await waiting
        assert answer.code is Code.INTERNAL_SERVER_ERROR
        assert b"defect" not in answer.payload
        failed = [record for record in caplog.records if record.message == "coap.admission_failed"]
        assert failed
        assert all(record.exc_info for record in failed)
        monkeypatch.setattr(resolver, "recheck", recheck)
        assert (await client.get("/config")).code is Code.CONTENT


async def test_nothing_is_served_between_a_revocations_mark_and_the_closing(
    coap: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many sessions that end at once the last are closed some turns of the loop after all have been marked."""
    device = await coap.device()
    sessions, gate, closings = coap.api.registry.sessions, asyncio.Event(), 0
    close = Guest.close

    async def later(guest: Guest, reason: str) -> None:
        nonlocal closings
        closings += 1
        await gate.wait()
        await close(guest, reason)

    monkeypatch.setattr(Guest, "close", later)
    monkeypatch.setattr(sessions, "_polite_seconds", 60.0)
    async with coap.client(device) as client:
        assert (await client.post("/telemetry", {"main.t": 1})).code is Code.CHANGED
        revoking = asyncio.create_task(coap.post(f"/devices/{device.device_id}", {"status": "inactive"}, "PUT"))
        try:
            await until(lambda: closings == 1)
            told = [
                await client.post("/telemetry", {"main.t": 2}),
                await client.post("/events", {"main.t": 3}),
                await client.get("/config"),
                await client.observe("/config"),
                await client.get("/time"),
            ]
            assert {answer.code for answer in told} == {Code.UNAUTHORIZED}
        finally:
            gate.set()
        await client.closed()
        await revoking
    assert [each["payload"] for each in await coap.uplinks(device.device_id)] == [{"main.t": 1}]


async def test_nothing_goes_down_between_a_revocations_mark_and_the_closing(
    coap: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to who asked before the mark and is answered after it, nor to who observes."""
    device = await coap.device()
    commands, configs = coap.api.registry.commands, coap.api.registry.device_configs
    revoked, closing = asyncio.Event(), asyncio.Event()
    closings = 0
    close = Guest.close

    async def later(guest: Guest, reason: str) -> None:
        nonlocal closings
        closings += 1
        await closing.wait()
        await close(guest, reason)

    def slow(read: Any) -> Any:
        async def wait(*arguments: Any, **more: Any) -> Any:
            found = await read(*arguments, **more)
            await revoked.wait()
            return found

        return wait

    monkeypatch.setattr(Guest, "close", later)
    monkeypatch.setattr(coap.api.registry.sessions, "_polite_seconds", 60.0)
    async with coap.client(device) as asking, coap.client(device) as observing:
        assert (await observing.observe("/commands")).payload == b""
        assert (await observing.observe("/config")).code is Code.CONTENT
        monkeypatch.setattr(commands, "next", slow(commands.next))
        monkeypatch.setattr(configs, "get", slow(configs.get))
        asked = [asyncio.create_task(asking.get(path)) for path in ("/commands", "/config")]
        await until(lambda: coap.server.coap_counters.serving == 2)
        revoke = f"/devices/{device.device_id}/credentials/{device.credential_id}"
        revoking = asyncio.create_task(coap.post(revoke, method="DELETE"))
        try:
            await until(lambda: closings == 2)
            await coap.post(f"/devices/{device.device_id}/commands", {"method": "open"})
            revoked.set()
            assert [(await each).code for each in asked] == [Code.UNAUTHORIZED] * 2
            await coap.post(f"/devices/{device.device_id}/config", {"config": {"n": 2}}, "PUT")
            device_id = DeviceId(UUID(device.device_id))
            [orders], [settings] = commands._downlinks.of(device_id), configs._downlinks.of(device_id)
            await until(lambda: orders.unconfirmed and settings.version > 1)  # handed to those who listen
            assert (await observing.get("/time")).code is Code.UNAUTHORIZED
            assert observing.notifications.empty()
        finally:
            revoked.set()
            closing.set()
        await observing.closed()
        await revoking
