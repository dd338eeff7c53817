"""The life of a device over MQTT, packet by packet: it comes in, reports, hears, is thrown out, and stays out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from adapters.mqtt.device import DeviceRole
from adapters.mqtt.properties import Properties
from adapters.mqtt.wire_packets import Disconnect, Publish, QoS, Will
from adapters.mqtt.wire_reasons import ReasonCode, Version
from registry.model import Actor
from tests.http_api import BASE, Api, api
from tests.mqtt_server import Device, OwnKey, Running, serving_mqtt
from tests.nodes import until
from tests.tls_peers import make_certificate

__all__ = ["api"]

VERSIONS = pytest.mark.parametrize("version", list(Version), ids=["3.1.1", "5.0"])
ACTOR = Actor("operator:test", "c")


@pytest.fixture
async def mqtt(api: Api) -> AsyncIterator[Running]:
    async with serving_mqtt(api) as running:
        yield running


async def revoke_all(mqtt: Running, device_id: str) -> dict[str, Any]:
    """Revoke the device's only credential; the receipt."""
    async with mqtt.api.operator() as operator:
        listed = await operator.get(f"{BASE}/devices/{device_id}/credentials")
        living = [c for c in listed.json()["credentials"] if c["revoked_at"] is None]
        answer = await operator.delete(f"{BASE}/devices/{device_id}/credentials/{living[0]['credential_id']}")
    assert answer.status_code == 200, answer.text
    receipt: dict[str, Any] = answer.json()
    return receipt


async def provisioned(mqtt: Running, folder: Path) -> tuple[str, Path]:
    """A device that came with a registration token over the provisioning topic: its id and its PEM file."""
    async with mqtt.api.operator() as operator:
        token = (await operator.post(f"{BASE}/devices/registration/tokens", json={"name": "Pump"})).json()["token"]
    key = OwnKey.new()
    async with mqtt.client() as client:
        assert (await client.connect(user_name="provision")).reason is ReasonCode.SUCCESS
        await client.subscribe("provision/response")
        await client.publish("provision/request", {"token": token, "csr": key.csr()}, QoS.AT_MOST_ONCE)
        answer = msgspec.json.decode((await client.message()).payload)
    assert answer["status"] == "ok", answer
    return answer["device_id"], key.with_certificate(folder, answer["certificate"])


@VERSIONS
async def test_a_device_provisions_itself_reports_is_revoked_and_cannot_return(
    mqtt: Running, tmp_path: Path, version: Version
) -> None:
    device_id, pem = await provisioned(mqtt, tmp_path)

    async with mqtt.client(pem, version) as client:
        assert (await client.connect()).reason is ReasonCode.SUCCESS
        for qos in QoS:
            await client.publish(f"devices/{device_id}/telemetry", {"temperature": 20 + qos}, qos)
        await until(lambda: mqtt.server.counters.stored == 3)
        stored = await mqtt.uplinks(device_id)
        assert [each["payload"] for each in stored] == [{"temperature": t} for t in (22, 21, 20)]
        assert {each["transport"] for each in stored} == {"mqtt"}

        receipt = await revoke_all(mqtt, device_id)
        assert [s["transport"] for s in receipt["sessions"]] == ["mqtt"]
        assert receipt["remaining"] == 0
        rest = await client.closed()
        if version is Version.V5:
            assert [p.reason for p in rest if isinstance(p, Disconnect)] == [ReasonCode.ADMINISTRATIVE_ACTION]
        else:
            assert rest == []

    async with mqtt.client(pem, version) as client:
        assert (await client.connect()).reason is ReasonCode.NOT_AUTHORIZED
        assert await client.closed() == []


@VERSIONS
async def test_every_refusal_looks_the_same(mqtt: Running, tmp_path: Path, version: Version) -> None:
    device = await mqtt.device()
    other = await mqtt.device("HW-2")
    revoked = await mqtt.device("HW-3")
    await revoke_all(mqtt, revoked.device_id)
    attempts: list[dict[str, Any]] = [
        {},
        {"user_name": device.device_id, "password": "sk_live_nothing"},
        {"user_name": other.device_id, "password": device.api_key},
        {"user_name": "somebody", "password": device.api_key},
        {"device": revoked},
        {"user_name": device.device_id},
    ]
    for attempt in attempts:
        async with mqtt.client(version=version) as client:
            connack = await client.connect(**attempt)
            assert (connack.reason, connack.session_present) == (ReasonCode.NOT_AUTHORIZED, False), attempt
            assert connack.properties.reason_string is None
            assert await client.closed() == []


async def test_a_certificate_of_nobody_and_a_key_of_another_device_are_refused(mqtt: Running, tmp_path: Path) -> None:
    device_id, pem = await provisioned(mqtt, tmp_path)
    other = await mqtt.device()
    stranger = make_certificate("stranger").save(tmp_path)
    async with mqtt.client(stranger) as client:
        assert (await client.connect()).reason is ReasonCode.NOT_AUTHORIZED
    async with mqtt.client(pem) as client:
        assert (await client.connect(other)).reason is ReasonCode.NOT_AUTHORIZED
    async with mqtt.client(stranger) as client:  # a certificate that nobody knows is not in a key's way
        assert (await client.connect(other)).reason is ReasonCode.SUCCESS
    assert device_id != other.device_id


@VERSIONS
async def test_client_ids_are_scoped_to_the_device(mqtt: Running, version: Version) -> None:
    one, other = await mqtt.device("HW-1"), await mqtt.device("HW-2")
    async with mqtt.client(version=version) as first, mqtt.client(version=version) as second:
        await first.connect(one, client_id="same")
        await second.connect(other, client_id="same")
        await first.publish("devices/me/telemetry", {"a": 1})
        async with mqtt.client(version=version) as third:
            assert (await third.connect(one, client_id="same")).reason is ReasonCode.SUCCESS
            rest = await first.closed()
            if version is Version.V5:
                assert [p.reason for p in rest if isinstance(p, Disconnect)] == [ReasonCode.SESSION_TAKEN_OVER]
            await third.publish("devices/me/telemetry", {"a": 2})
            await second.publish("devices/me/telemetry", {"a": 3})
    assert mqtt.server.counters.taken_over == 1


async def test_a_refused_connection_disturbs_nobody(mqtt: Running) -> None:
    device = await mqtt.device()
    async with mqtt.client() as good, mqtt.client() as bad:
        await good.connect(device, client_id="same")
        refused = await bad.connect(client_id="same", user_name=device.device_id, password="wrong")
        assert refused.reason is ReasonCode.NOT_AUTHORIZED
        assert await good.publish("devices/me/events", {"still": "here"}) is ReasonCode.SUCCESS


@VERSIONS
async def test_a_command_goes_down_and_its_answer_comes_up(mqtt: Running, version: Version) -> None:
    device = await mqtt.device()
    async with mqtt.client(version=version) as client, mqtt.api.operator() as operator:
        await client.connect(device)
        assert await client.subscribe("devices/me/commands") == (ReasonCode.GRANTED_QOS_1,)
        made = await operator.post(f"{BASE}/devices/{device.device_id}/commands", json={"method": "reboot"})
        assert made.status_code == 201, made.text
        down = await client.message()
        assert down.topic == "devices/me/commands"
        command = msgspec.json.decode(down.payload)
        assert (command["method"], command["params"]) == ("reboot", {})
        answered = await client.publish(
            f"devices/{device.device_id}/commands/{command['command_id']}/response", {"result": {"ok": True}}
        )
        assert answered is ReasonCode.SUCCESS
        shown = await operator.get(f"{BASE}/devices/{device.device_id}/commands/{command['command_id']}")
        assert (shown.json()["status"], shown.json()["result"]) == ("succeeded", {"ok": True})


async def test_the_configuration_comes_on_subscribing_and_is_reported(mqtt: Running) -> None:
    device = await mqtt.device(config={"interval": 60})
    async with mqtt.client() as client:
        await client.connect(device)
        await client.subscribe(f"devices/{device.device_id}/config")
        down = await client.message()
        assert down.topic == f"devices/{device.device_id}/config"
        assert msgspec.json.decode(down.payload) == {"version": 1, "config": {"interval": 60}}
        assert await client.publish("devices/me/config/reported", {"version": 1}) is ReasonCode.SUCCESS
        assert await client.publish("devices/me/config/reported", {"version": 9}) is ReasonCode.PAYLOAD_FORMAT_INVALID


async def test_provisioning_with_a_key_answers_to_the_response_topic_and_to_nobody_else(mqtt: Running) -> None:
    async with mqtt.api.operator() as operator:
        template = await operator.post(f"{BASE}/provisioning/templates", json={"name": "line 1"})
    key = template.json()["provision_key"]
    async with mqtt.client() as client, mqtt.client() as witness:
        for each in (client, witness):
            await each.connect(user_name="provision", client_id="same")
            assert await each.subscribe("provision/response/#") == (ReasonCode.GRANTED_QOS_1,)
        asked = {"provision_key": key, "device_name": "Sensor", "hardware_id": "AA:01"}
        told = Properties(response_topic="provision/response/7", correlation_data=b"\x01\x02")
        await client.publish("provision/request", asked, QoS.AT_MOST_ONCE, properties=told)
        answer = await client.message()
        assert (answer.topic, answer.properties.correlation_data) == ("provision/response/7", b"\x01\x02")
        first = msgspec.json.decode(answer.payload)
        assert first["status"] == "ok"
        assert first["api_key"].startswith("sk_live_")

        await client.publish("provision/request", asked, QoS.AT_MOST_ONCE)
        again = msgspec.json.decode((await client.message()).payload)
        assert (again["device_id"], again["api_key"]) == (first["device_id"], "")
        errors = []
        for bad in ({**asked, "provision_key": "pk_wrong"}, {"token": "rt_wrong", "csr": OwnKey.new().csr()}):
            await client.publish("provision/request", bad, QoS.AT_MOST_ONCE)
            errors.append(msgspec.json.decode((await client.message()).payload))
        assert {(e["status"], e["code"], e["message"]) for e in errors} == {
            ("error", "PERMISSION_DENIED", "provisioning refused")
        }
        await client.publish("provision/request", b"no json", QoS.AT_MOST_ONCE)
        assert msgspec.json.decode((await client.message()).payload)["code"] == "INVALID_ARGUMENT"
        await witness.goodbye()
        assert await witness.closed() == []

    async with mqtt.client() as client:
        device = Device(first["device_id"], first["api_key"])
        assert (await client.connect(device)).reason is ReasonCode.SUCCESS


async def test_a_certificate_is_renewed_over_the_live_session(mqtt: Running, tmp_path: Path) -> None:
    device_id, pem = await provisioned(mqtt, tmp_path)
    key = OwnKey.new()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "any")])  # it decides nothing
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key.key, hashes.SHA256())
    async with mqtt.client(pem) as client:
        await client.connect()
        await client.subscribe("devices/me/credentials/renew/response")
        await client.publish("devices/me/credentials/renew", csr.public_bytes(Encoding.PEM), QoS.AT_MOST_ONCE)
        answer = await client.message()
        assert answer.topic == "devices/me/credentials/renew/response"
        body = msgspec.json.decode(answer.payload)
        assert (body["status"], body["device_id"]) == ("ok", device_id)
    renewed = key.with_certificate(tmp_path, body["certificate"])
    async with mqtt.client(renewed) as client:
        assert (await client.connect()).reason is ReasonCode.SUCCESS


@VERSIONS
async def test_no_acknowledgement_before_the_commit(mqtt: Running, version: Version) -> None:
    device = await mqtt.device()
    async with mqtt.client(version=version) as client:
        await client.connect(device)
        async with mqtt.api.database.transaction() as connection:
            await connection.execute("LOCK TABLE uplink IN ACCESS EXCLUSIVE MODE")
            waiting = asyncio.create_task(client.publish("devices/me/telemetry", {"a": 1}))
            await until(lambda: mqtt.api.registry.uplinks.queued or any(p.machine.busy for p in mqtt.server.peers))
            await asyncio.sleep(0.1)  # long enough for an acknowledgement that must not come
            assert not waiting.done()
        assert await waiting is ReasonCode.SUCCESS
    assert len(await mqtt.uplinks(device.device_id)) == 1


@VERSIONS
async def test_what_cannot_be_read_is_told_and_never_acknowledged(mqtt: Running, version: Version) -> None:
    device = await mqtt.device()
    async with mqtt.client(version=version) as client:
        await client.connect(device)
        await client.publish("devices/me/telemetry", b"not json", QoS.AT_MOST_ONCE)
        await client.publish("devices/me/telemetry", {"a": 1})
        if version is Version.V5:
            assert await client.publish("devices/me/telemetry", b"no") is ReasonCode.PAYLOAD_FORMAT_INVALID
            assert await client.publish("devices/me/telemetry", b"no", QoS.EXACTLY_ONCE) is (
                ReasonCode.PAYLOAD_FORMAT_INVALID
            )
        else:
            await client.send(Publish("devices/me/telemetry", b"no", QoS.AT_LEAST_ONCE, packet_id=9))
            assert await client.closed() == []
    assert len(await mqtt.uplinks(device.device_id)) == 1


async def test_the_operator_reads_why_a_3_1_1_device_is_closed_that_is_told_nothing(
    mqtt: Running, caplog: pytest.LogCaptureFixture
) -> None:
    device = await mqtt.device()
    with caplog.at_level("INFO", "adapters.mqtt.device"):
        async with mqtt.client(version=Version.V311) as client:
            await client.connect(device)
            await client.send(Publish("devices/me/telemetry", b"{secret", QoS.AT_LEAST_ONCE, packet_id=9))
            assert await client.closed() == []
    await mqtt.api.registry.presence.flush()
    async with mqtt.api.operator() as operator:
        events = (await operator.get(f"/api/v1/devices/{device.device_id}/timeline")).json()["events"]
    (ended,) = (each["data"] for each in events if each["kind"] == "device.disconnected")
    assert ended["reason"] == "violation"
    assert ended["detail"].startswith("payload is no JSON: ")
    (line,) = (record for record in caplog.records if record.message == "mqtt.violation")
    fields = line.__dict__["fields"]
    assert (fields["device"], fields["reason"], fields["detail"]) == (
        device.device_id, "payload_format_invalid", ended["detail"]
    )  # fmt: skip
    assert "secret" not in ended["detail"]


async def test_cbor_envelopes_and_message_ids(mqtt: Running) -> None:
    device = await mqtt.device()
    async with mqtt.client() as client:
        await client.connect(device)
        await client.publish("devices/me/telemetry", cbor2.dumps({"t": 1.5}))
        await client.publish(
            "devices/me/events", cbor2.dumps("door"), properties=Properties(content_type="application/cbor")
        )
        envelope = {"kind": "event", "payload": {"n": 1}, "message_id": "m-1"}
        await client.publish("devices/me/uplink", envelope)
        await client.publish("devices/me/uplink", cbor2.dumps(envelope))
        named = Properties(user_properties=(("message_id", "m-2"),))
        await client.publish("devices/me/health", {"uptime_s": 1}, properties=named)
        await client.publish("devices/me/health", {"uptime_s": 1}, properties=named)
    stored = [(u["kind"], u["payload"]) for u in await mqtt.uplinks(device.device_id)]
    assert stored == [
        ("health", {"uptime_s": 1}), ("event", {"n": 1}), ("event", "door"), ("telemetry", {"t": 1.5})
    ]  # fmt: skip
    assert mqtt.server.counters.duplicate == 2


@VERSIONS
async def test_a_will_is_stored_when_the_device_vanishes_and_dropped_when_it_is_revoked(
    mqtt: Running, version: Version
) -> None:
    device = await mqtt.device()
    will = Will("devices/me/events", b'{"gone": true}', QoS.AT_LEAST_ONCE)
    async with mqtt.client(version=version) as client:
        await client.connect(device, will=will)
        client.drop()
        async with asyncio.timeout(10):
            while not await mqtt.uplinks(device.device_id):
                await asyncio.sleep(0.01)
    async with mqtt.client(version=version) as client:
        await client.connect(device, will=will)
        await client.goodbye()
        await client.closed()
    async with mqtt.client(version=version) as client:
        await client.connect(device, will=will)
        await revoke_all(mqtt, device.device_id)
        await client.closed()
    assert [u["payload"] for u in await mqtt.uplinks(device.device_id)] == [{"gone": True}]
    assert mqtt.server.counters.wills_lost == 0


async def test_a_gateway_attaches_a_child_and_speaks_for_it(mqtt: Running) -> None:
    gateway, stranger = await mqtt.device("GW-1"), await mqtt.device("HW-9")
    async with mqtt.client() as client:
        await client.connect(gateway)
        await client.publish("devices/me/children", {"hardware_id": "CH-1", "name": "Valve"}, QoS.AT_MOST_ONCE)
        attached = msgspec.json.decode((await client.message()).payload)
        assert (attached["status"], attached["created"]) == ("ok", True)
        child = attached["device_id"]
        assert await client.publish(f"devices/{child}/telemetry", {"open": True}) is ReasonCode.SUCCESS
        assert await client.subscribe(f"devices/{child}/commands", f"devices/{stranger.device_id}/commands") == (
            ReasonCode.GRANTED_QOS_1,
            ReasonCode.NOT_AUTHORIZED,
        )
        assert await client.publish(f"devices/{stranger.device_id}/telemetry", {"a": 1}) is ReasonCode.NOT_AUTHORIZED
    assert [u["payload"] for u in await mqtt.uplinks(child)] == [{"open": True}]


async def test_draining_stores_what_was_received_and_says_goodbye(mqtt: Running) -> None:
    device = await mqtt.device()
    async with mqtt.client() as client:
        await client.connect(device)
        async with mqtt.api.database.transaction() as connection:
            await connection.execute("LOCK TABLE uplink IN ACCESS EXCLUSIVE MODE")
            waiting = asyncio.create_task(client.publish("devices/me/telemetry", {"a": 1}))
            await until(lambda: any(p.machine.busy for p in mqtt.server.peers))
            draining = asyncio.create_task(mqtt.server.drain(5.0))
        assert await waiting is ReasonCode.SUCCESS
        rest = await client.closed()
        assert [p.reason for p in rest if isinstance(p, Disconnect)] == [ReasonCode.SERVER_SHUTTING_DOWN]
        await draining


@VERSIONS
async def test_a_session_that_is_closed_as_its_admission_ends_leaves_no_connection_behind(
    mqtt: Running, monkeypatch: pytest.MonkeyPatch, version: Version
) -> None:
    device = await mqtt.device()
    sessions, enter = mqtt.api.registry.sessions, mqtt.server.broker.enter
    closing: list[asyncio.Task[Any]] = []

    async def enter_and_be_closed(role: DeviceRole) -> None:
        await enter(role)
        closing.append(asyncio.create_task(sessions.close([role.session], "credential revoked")))
        await asyncio.sleep(0)  # it is closed, and nobody has been told

    monkeypatch.setattr(mqtt.server.broker, "enter", enter_and_be_closed)
    async with mqtt.client(version=version) as client:
        assert (await client.connect(device)).reason is ReasonCode.NOT_AUTHORIZED
        await client.closed()
    await asyncio.gather(*closing)
    await until(lambda: not mqtt.server.peers and not mqtt.server.tls_counters.open)
