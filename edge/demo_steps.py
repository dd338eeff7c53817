"""The steps of the demo: what devices and operators do, and what they may rely on.

Each step is a function of the `Story`: it does a few requests, checks every answer, and says in a line what came back.
A later step may use what an earlier one left in `story.devices`. New protocols add steps to `STEPS`.
"""

from __future__ import annotations

import base64
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from aiocoap.numbers.codes import Code
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from adapters.mqtt.wire_reasons import ReasonCode
from edge.api_client import BASE, Answer, ApiClient
from edge.demo_coap import CoapDevice, HandshakeFailed
from edge.demo_mqtt import MqttDevice, NotConnected

CLOSE_SECONDS = 10.0
"""How long the demo waits for a revoked connection to be closed; it is closed in milliseconds."""
UPLINKS = 20
TOLD_AT_THE_END = ("credential.revoked", "session.closed", "auth.refused")
"""The kinds of events that explain to the operator what the device was not told."""


class Unexpected(Exception):
    """Something else happened than the story says; the message tells what."""


class Narrator(Protocol):
    """Where the story is told."""

    def step(self, number: int, title: str) -> None:
        """A new step begins."""

    def exchange(self, what: str, outcome: str, milliseconds: float | None) -> None:
        """Something was asked and answered."""

    def note(self, text: str) -> None:
        """What it means."""


class Listener(NamedTuple):
    """Where a protocol other than HTTPS is reached."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Site:
    """Where the server is, and who we are there."""

    host: str
    port: int
    mqtt: Listener
    coap: Listener
    ca_chain: Path
    operator_token: str = field(repr=False)

    @property
    def base(self) -> str:
        """The address of the API."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}{BASE}"


@dataclass(frozen=True, slots=True)
class Held:
    """A device and the key it holds."""

    device_id: str
    hardware_id: str
    api_key: str = field(repr=False)


class Story:
    """One telling: the site, what was made so far, and who listens. `run_id` keeps hardware ids of two runs apart."""

    def __init__(self, site: Site, narrator: Narrator, run_id: str) -> None:
        self.site = site
        self.narrator = narrator
        self.run_id = run_id
        self.devices: dict[str, Held] = {}
        self.operator = self.connect()
        self.provision_key = ""

    def tell(self) -> None:
        """All steps. Raises Unexpected, ConnectionClosed, OSError."""
        with self.operator:
            for number, step in enumerate(STEPS, 1):
                self.narrator.step(number, step.title)
                step.take(self)

    def connect(self, certificate: Path | None = None) -> ApiClient:
        """A client with a connection of its own; with a certificate and its key (PEM) if they are given."""
        return ApiClient(self.site.host, self.site.port, self.site.ca_chain, certificate=certificate)

    def ask(self, method: str, path: str, body: object = None, *, expect: int) -> Any:
        """A request of the operator; the body of the answer."""
        return self.exchange(self.operator, method, path, body, bearer=self.site.operator_token, expect=expect).body

    def exchange(
        self,
        client: ApiClient,
        method: str,
        path: str,
        body: object = None,
        *,
        bearer: str | None = None,
        expect: int,
    ) -> Answer:
        """A request, told with its answer, which must have the expected status."""
        answer = checked(client.request(method, path, body, bearer=bearer), method, path, expect)
        code = answer.body.get("code", "") if isinstance(answer.body, dict) and answer.status >= 400 else ""
        self.narrator.exchange(f"{method} {shown_path(path)}", f"{answer.status} {code}".strip(), answer.milliseconds)
        return answer

    def note(self, text: str) -> None:
        """What the last answer means."""
        self.narrator.note(text)


@dataclass(frozen=True, slots=True)
class Step:
    """A chapter of the story."""

    title: str
    take: Callable[[Story], None]


def checked(answer: Answer, method: str, path: str, expect: int) -> Answer:
    """The answer, if it has the expected status. Raises Unexpected."""
    if answer.status != expect:
        said = answer.body if isinstance(answer.body, dict) else {}
        raise Unexpected(
            f"{method} {path} was answered {answer.status} {said.get('code', '')} {said.get('message', '')}; "
            f"{expect} was expected"
        )
    return answer


def require(holds: bool, otherwise: str) -> None:
    """Go on only if what the story is about to say holds. Raises Unexpected."""
    if not holds:
        raise Unexpected(otherwise)


def shown_path(path: str) -> str:
    """A path with its long ids and fingerprints cut, to fit a line."""
    parts = path.split("/")
    return "/".join(f"{part[:8]}…" if len(part) == 64 or part.count("-") == 4 else part for part in parts)


def shown_secret(secret: str) -> str:
    """The beginning of a secret."""
    return f"{secret[:14]}…"


def own_key() -> tuple[str, str]:
    """A private key that its device has just made, and a request for a certificate; both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private.decode(), csr.public_bytes(Encoding.PEM).decode()


def keep_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read. Raises OSError."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="ascii") as file:
        file.write(text)


# -- the steps ---------------------------------------------------------------------------------------------------------


def register_by_hand(story: Story) -> None:
    """Seed 002: an operator registers one device and hands it its key."""
    hardware_id = f"HW-LAB-{story.run_id}"
    body = {
        "name": "Lab Bench Thermometer",
        "hardware_id": hardware_id,
        "groups": ["lab", "floor-3"],
        "tags": {"region": "eu", "owner": "qa"},
    }
    device = story.ask("POST", "/devices", body, expect=201)
    require(device["status"] == "registered", f"the new device's status is {device['status']}, not registered")
    require(device["api_key"].startswith("sk_live_"), "the new device got no API key")
    story.devices["thermometer"] = Held(device["device_id"], hardware_id, device["api_key"])
    story.note(f"device {device['device_id']} is registered; its key is shown once: {shown_secret(device['api_key'])}")

    again = story.ask("POST", "/devices", body, expect=409)
    require(again["code"] == "ALREADY_EXISTS", f"the second registration was refused as {again['code']}")
    story.note(again["message"])


def claim_with_the_batch_key(story: Story) -> None:
    """Seed 001: a template's key is burned into a batch; a device makes itself known with it."""
    template = story.ask(
        "POST",
        "/provisioning/templates",
        {
            "name": f"Cold store sensors {story.run_id}",
            "hardware_id_pattern": "CS-[0-9A-F]+-[0-9]+",
            "default_groups": ["cold-store"],
        },
        expect=201,
    )
    story.provision_key = template["provision_key"]
    story.note(f"the batch's key is shown once: {shown_secret(story.provision_key)}")
    hardware_id = f"CS-{story.run_id}-1"
    request = {
        "provision_key": story.provision_key,
        "device_name": "Cold Store Sensor 014",
        "hardware_id": hardware_id,
    }
    with story.connect() as device:
        claimed = story.exchange(device, "POST", "/provision", request, expect=201).body
        require(claimed["api_key"].startswith("sk_live_"), "the claim gave no API key")
        story.devices["sensor"] = Held(claimed["device_id"], hardware_id, claimed["api_key"])
        story.note(f"device {claimed['device_id']} claimed itself: key {shown_secret(claimed['api_key'])}")

        again = story.exchange(device, "POST", "/provision", request, expect=200).body
        same = again["device_id"] == claimed["device_id"] and again["api_key"] == ""
        require(same, "the second claim was not answered with the same device and an empty key")
        story.note('claimed again: the same device_id and api_key "" - it is known and keeps its key')

        wrong = {**request, "provision_key": f"pk_{'A' * 43}"}
        refused = story.exchange(device, "POST", "/provision", wrong, expect=403).body
        story.note(f'a wrong key: "{refused["message"]}" - the same words whatever the reason')


def lose_an_answer(story: Story) -> None:
    """A claim whose answer is lost is repeated with its nonce and gives the same key."""
    hardware_id = f"CS-{story.run_id}-2"
    request = {
        "provision_key": story.provision_key,
        "device_name": "Cold Store Sensor 015",
        "hardware_id": hardware_id,
        "nonce": f"first-boot-{story.run_id}-2",
    }
    with story.connect() as device:
        device.send_and_vanish("POST", "/provision", request)
        story.narrator.exchange("POST /provision (with a nonce)", "answer lost", None)
        second = story.exchange(device, "POST", "/provision", request, expect=200).body
        third = story.exchange(device, "POST", "/provision", request, expect=200).body
    require(second["api_key"].startswith("sk_live_"), "the repeated claim gave no key")
    require(second["api_key"] == third["api_key"], "two repetitions gave two keys")
    story.devices["second sensor"] = Held(second["device_id"], hardware_id, second["api_key"])
    story.note(f"repeated with the same nonce: the key that was lost, {shown_secret(second['api_key'])}, and again")


def report(story: Story) -> None:
    """Uplinks and telemetry over one keep-alive connection; 202 means stored."""
    sensor = story.devices["sensor"]
    path = f"/devices/{sensor.device_id}/uplink"
    with story.connect() as device:
        took: list[float] = []
        uplink_ids: set[str] = set()
        for number in range(UPLINKS):
            message = {"kind": "event", "payload": {"door": number % 2}, "message_id": f"{story.run_id}-{number}"}
            answer = checked(device.post(path, message, bearer=sensor.api_key), "POST", path, 202)
            uplink_ids.add(answer.body["uplink_id"])
            took.append(answer.milliseconds)
        require(len(uplink_ids) == UPLINKS, "two uplinks have one id")
        median = sorted(took)[len(took) // 2]
        story.narrator.exchange(f"POST {shown_path(path)} x {UPLINKS}", "202", median)
        repeated = {"kind": "event", "payload": {"door": 0}, "message_id": f"{story.run_id}-0"}
        again = story.exchange(device, "POST", path, repeated, bearer=sensor.api_key, expect=202).body
        require(again["uplink_id"] in uplink_ids, "a repeated message_id was stored twice")
        story.note("a message_id sent twice is stored once: the same uplink_id came back")
        story.exchange(
            device, "POST", "/telemetry", {"env.temperature": 4.5, "battery": 87}, bearer=sensor.api_key, expect=202
        )
        sessions = _sessions_of(story, sensor)
        require(len(sessions) == 1, f"the device has {len(sessions)} sessions instead of 1")
    stored = story.ask("GET", f"/devices/{sensor.device_id}/uplinks?limit=100", expect=200)["uplinks"]
    require(len(stored) == UPLINKS + 1, f"{len(stored)} uplinks are stored instead of {UPLINKS + 1}")
    readings = story.ask("GET", f"/devices/{sensor.device_id}/readings", expect=200)["readings"]
    values = {f"{each['component']}.{each['sensor']}": each["value"] for each in readings}
    require(values == {"env.temperature": 4.5, "main.battery": 87}, f"the readings are {values}")
    story.note(f"one connection, {len(stored)} uplinks stored; readings: env.temperature 4.5, main.battery 87")


def rotate(story: Story) -> None:
    """A rotation with an overlap: the device may switch when it comes round to it."""
    thermometer = story.devices["thermometer"]
    rotated = story.ask(
        "POST", f"/devices/{thermometer.device_id}/credentials/rotate", {"overlap_seconds": 3600}, expect=201
    )
    new_key = rotated["api_key"]
    require(new_key.startswith("sk_live_") and new_key != thermometer.api_key, "the rotation gave no new key")
    for which, key in (("old", thermometer.api_key), ("new", new_key)):
        with story.connect() as device:
            answer = checked(device.post("/telemetry", {"temperature": 21.5}, bearer=key), "POST", "/telemetry", 202)
            story.narrator.exchange(f"POST /telemetry with the {which} key", "202", answer.milliseconds)
    story.devices["thermometer"] = Held(thermometer.device_id, thermometer.hardware_id, new_key)
    story.note(f"both keys work for an hour; the new one is {shown_secret(new_key)}")


def revoke(story: Story) -> None:
    """A key is revoked while its connection is open: the connection ends, and the next one is not let in."""
    sensor = story.devices.pop("sensor")
    credentials = story.ask("GET", f"/devices/{sensor.device_id}/credentials", expect=200)["credentials"]
    credential_id = next(each["credential_id"] for each in credentials if each["revoked_at"] is None)
    with story.connect() as device:
        answer = checked(device.post("/telemetry", {"battery": 86}, bearer=sensor.api_key), "POST", "/telemetry", 202)
        story.narrator.exchange("POST /telemetry", "202", answer.milliseconds)
        require(device.connected, "the server closed the connection too early")
        story.note("the device's connection stays open, waiting ...")
        seen: list[float | None] = []
        watcher = threading.Thread(target=lambda: seen.append(device.closed_by_server(CLOSE_SECONDS)), daemon=True)
        watcher.start()
        receipt = story.ask("DELETE", f"/devices/{sensor.device_id}/credentials/{credential_id}", expect=200)
        watcher.join(CLOSE_SECONDS + 1)
        require(bool(seen) and seen[0] is not None, "the open connection was not closed")
        require(len(receipt["sessions"]) == 1, f"the receipt names {len(receipt['sessions'])} sessions instead of 1")
        require(receipt["remaining"] == 0, f"{receipt['remaining']} sessions remain")
        closed = receipt["sessions"][0]
        story.note(
            f"receipt: session on {closed['transport']} closed {closed['closed_after_ms']:.1f} ms "
            f"after the revocation, remaining {receipt['remaining']}"
        )
        story.note(f"seen from the device: end of stream {seen[0]:.1f} ms after the operator asked")
        refused = story.exchange(device, "POST", "/telemetry", {"battery": 85}, bearer=sensor.api_key, expect=401).body
        require(refused["code"] == "UNAUTHENTICATED", f"the next request was refused as {refused['code']}")
    _explain(story, sensor)


def come_with_an_own_key(story: Story) -> None:
    """Seed 004: a token, a key that never leaves the device, a certificate; and its end by fingerprint."""
    token = story.ask(
        "POST", "/devices/registration/tokens", {"name": "Pump 7", "hardware_id": f"PUMP-{story.run_id}"}, expect=201
    )
    require(token["status"] == "pending", f"the new device's status is {token['status']}, not pending")
    story.note(f"device {token['device_id']} is pending; its one-time token: {shown_secret(token['token'])}")
    key, csr = own_key()
    request = {"token": token["token"], "csr": csr}
    with story.connect() as device:
        given = story.exchange(device, "POST", "/devices/provision", request, expect=201).body
        again = story.exchange(device, "POST", "/devices/provision", request, expect=200).body
    require(given["certificate"] == again["certificate"], "the same token and key gave another certificate")
    story.note(
        f"a certificate until {given['not_after'][:10]}, SHA-256 {given['fingerprint'][:16]}…; asked again: the same"
    )
    with tempfile.TemporaryDirectory() as directory:
        own = Path(directory) / "pump.pem"
        keep_private(own, given["certificate"] + key)
        with story.connect(own) as device:
            path = f"/devices/{token['device_id']}/uplink"
            message = {"kind": "event", "payload": {"pressure": 2.4}}
            story.exchange(device, "POST", path, message, expect=202)
            story.note("over mutual TLS: no key in any header, the handshake has proved who it is")
            receipt = story.ask("DELETE", f"/devices/certs/{given['fingerprint']}", expect=200)
            require(len(receipt["sessions"]) == 1, f"the receipt names {len(receipt['sessions'])} sessions, not 1")
            require(receipt["remaining"] == 0, f"{receipt['remaining']} sessions remain")
            require(device.closed_by_server(CLOSE_SECONDS) is not None, "the open connection was not closed")
            story.note(f"revoked by fingerprint: closed {receipt['sessions'][0]['closed_after_ms']:.1f} ms later")
            refused = story.exchange(device, "POST", path, message, expect=401).body
            require(refused["code"] == "UNAUTHENTICATED", f"the next request was refused as {refused['code']}")
    _explain(story, Held(token["device_id"], f"PUMP-{story.run_id}", ""))


def live_over_mqtt(story: Story) -> None:
    """A gateway provisions itself over the topic, comes back with its certificate, is told, and is thrown out."""
    body = {"name": "Cabinet gateway", "hardware_id": f"GW-{story.run_id}"}
    token = story.ask("POST", "/devices/registration/tokens", body, expect=201)
    device_id = token["device_id"]
    key, csr = own_key()

    def connect(certificate: Path | None, whom: str) -> MqttDevice:
        site, since = story.site, time.perf_counter()
        try:
            device = MqttDevice(*site.mqtt, site.ca_chain, client_id="gateway", certificate=certificate)
        except NotConnected as refusal:
            told(f"CONNECT {whom}", refusal.reason, since)
            raise
        told(f"CONNECT {whom}", ReasonCode.SUCCESS, since)
        return device

    def told(what: str, reason: ReasonCode | None, since: float) -> None:
        outcome = "closed" if reason is None else f"{reason.name} {reason:#04x}"
        story.narrator.exchange(f"MQTT {what}", outcome, 1000 * (time.perf_counter() - since))

    def publish(device: MqttDevice, topic: str, value: object) -> None:
        since = time.perf_counter()
        reason = device.publish(topic, value)
        require(not reason.failed, f"PUBLISH {topic} was answered {reason.name}")
        told(f"PUBLISH {shown_path(topic)}", reason, since)

    with tempfile.TemporaryDirectory() as directory:
        own = Path(directory) / "gateway.pem"
        with connect(None, "as provision") as newcomer:
            publish(newcomer, "provision/request", {"token": token["token"], "csr": csr})
            _, given = newcomer.message()
        require(given["status"] == "ok", f"the request was answered {given}")
        keep_private(own, given["certificate"] + key)
        story.note("its certificate came on provision/response, to this connection alone")
        with connect(own, "with the certificate") as device:
            since = time.perf_counter()
            reason = device.subscribe("devices/me/commands")
            require(reason is ReasonCode.GRANTED_QOS_1, f"SUBSCRIBE was answered {reason.name}")
            told("SUBSCRIBE devices/me/commands", reason, since)
            publish(device, "devices/me/telemetry", {"cabinet.temperature": 31.5})
            readings = story.ask("GET", f"/devices/{device_id}/readings", expect=200)["readings"]
            require([each["value"] for each in readings] == [31.5], "the reading is not stored")
            story.note("the acknowledgement means stored, as 202 does")
            sent = story.ask("POST", f"/devices/{device_id}/commands", {"method": "fan.on"}, expect=201)
            _, command = device.message()
            require(command["command_id"] == sent["command_id"], f"another command came: {command['method']}")
            publish(device, f"devices/me/commands/{command['command_id']}/response", {"result": {"rpm": 1200}})
            done = story.ask("GET", f"/devices/{device_id}/commands/{sent['command_id']}", expect=200)
            require(done["result"] == {"rpm": 1200}, f"the command is {done['status']}")
            story.note(f"the command {command['method']} came down and was answered: {done['status']}")
            receipt = story.ask("DELETE", f"/devices/certs/{given['fingerprint']}", expect=200)
            require(len(receipt["sessions"]) == 1, f"the receipt names {len(receipt['sessions'])} sessions, not 1")
            require(receipt["remaining"] == 0, f"{receipt['remaining']} sessions remain")
            end = device.ended()
            require(end is ReasonCode.ADMINISTRATIVE_ACTION, f"the connection was ended with {end}")
            took = receipt["sessions"][0]["closed_after_ms"]
            story.note(f"revoked while connected: DISCONNECT {end:#04x}, {took:.1f} ms later")
        try:
            connect(own, "with the certificate").close()
        except NotConnected as refusal:
            require(refusal.reason is ReasonCode.NOT_AUTHORIZED, f"it was refused with {refusal}")
        else:
            raise Unexpected("a revoked certificate was taken")
    _explain(story, Held(device_id, body["hardware_id"], ""))


def live_over_coap(story: Story) -> None:
    """A constrained device: a PSK, CBOR, datagrams; and its end while it is connected."""
    hardware_id = f"METER-{story.run_id}"
    body = {"name": "Heat meter", "hardware_id": hardware_id, "credential_type": "psk", "config": {"interval_s": 60}}
    made = story.ask("POST", "/devices", body, expect=201)
    psk, device_id = made["psk"], made["device_id"]
    key = base64.urlsafe_b64decode(psk["key"] + "=")
    story.note(f"identity {psk['identity']}, a key of {len(key)} bytes, shown once")
    with CoapDevice(*story.site.coap, psk["identity"], key) as device:

        def ask(method: Code, path: str, value: object, expect: Code) -> Any:
            since = time.perf_counter()
            code, answer = device.ask(method, path, value)
            require(code is expect, f"{method.name} {path} was answered {code.dotted}, not {expect.dotted}")
            story.narrator.exchange(
                f"CoAP {method.name} {path}", f"{code.dotted}", 1000 * (time.perf_counter() - since)
            )
            return answer

        ask(Code.POST, "/telemetry", {"flow": 0.42}, Code.CHANGED)
        config = ask(Code.GET, "/config", None, Code.CONTENT)
        require(config["config"] == {"interval_s": 60}, f"the configuration is {config}")
        readings = story.ask("GET", f"/devices/{device_id}/readings", expect=200)["readings"]
        require([each["value"] for each in readings] == [0.42], "the reading is not stored")
        story.note("over DTLS with a PSK; 2.04 means stored")
        path = f"/devices/{device_id}/credentials/{made['credential_id']}"
        receipt = story.ask("DELETE", path, expect=200)
        require(len(receipt["sessions"]) == 1, f"the receipt names {len(receipt['sessions'])} sessions, not 1")
        require(receipt["remaining"] == 0, f"{receipt['remaining']} sessions remain")
        require(device.closed_by_server(CLOSE_SECONDS) is not None, "the association was not closed")
        story.note(f"revoked: close_notify {receipt['sessions'][0]['closed_after_ms']:.1f} ms later")
    try:
        CoapDevice(*story.site.coap, psk["identity"], key).__exit__(None, None, None)
    except HandshakeFailed:
        story.note("its next handshake fails, exactly as with a wrong key")
    else:
        raise Unexpected("a revoked key was taken")
    _explain(story, Held(device_id, hardware_id, ""))


def _explain(story: Story, device: Held) -> None:
    """The device learned nothing; the operator sees why. Closed sessions are recorded just after they are closed."""
    deadline = time.monotonic() + CLOSE_SECONDS
    while True:
        events = story.ask("GET", f"/devices/{device.device_id}/timeline", expect=200)["events"]
        kinds = [each["kind"] for each in events]
        if set(TOLD_AT_THE_END) <= set(kinds) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for kind in TOLD_AT_THE_END:
        require(kind in kinds, f"the timeline has no {kind}; it has {', '.join(kinds)}")
    for event in reversed([each for each in events if each["kind"] in TOLD_AT_THE_END]):
        reason = event["data"].get("reason", "")
        story.note(f"timeline: {event['kind']}{f' ({reason})' if reason else ''}, by {event['actor']}")


def _sessions_of(story: Story, device: Held) -> list[Any]:
    sessions = story.ask("GET", "/sessions?limit=1000", expect=200)["sessions"]
    return [each for each in sessions if each["device_id"] == device.device_id]


STEPS: tuple[Step, ...] = (
    Step("An operator registers a device by hand", register_by_hand),
    Step("A device off the line claims itself with its batch's key", claim_with_the_batch_key),
    Step("The answer to a claim is lost; the device repeats it", lose_an_answer),
    Step("The device reports; 202 means stored", report),
    Step("A key is rotated with an overlap", rotate),
    Step("A key is revoked while the device is connected", revoke),
    Step("A device makes its own key and gets a certificate with a token", come_with_an_own_key),
    Step("A gateway comes over MQTT and gets its certificate there", live_over_mqtt),
    Step("A constrained device comes over CoAP with a PSK", live_over_coap),
)
"""In the order of the telling."""
