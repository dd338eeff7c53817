"""What the demo leaves to try by hand: three devices that are not revoked, and commands to paste into a shell.

    lay_out ─► a gateway with its certificate in a file, a meter with its PSK ─┐
    the story's thermometer with its API key ──────────────────────────────────┴► variables, pastes ─► a terminal

Every command works as it stands after the variables are set, in the order in which they are printed, in bash and zsh;
the tests paste them all. They need programs that the demo does not bring along: curl, and for the other protocols
mosquitto's clients and libcoap's. The secrets in them are those of the demo's own devices.
"""

from __future__ import annotations

import base64
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge.demo_steps import Held, Story, checked, keep_private, own_key

GATEWAY_FILE: Final = "demo-gateway.pem"
"""In the data directory: the gateway's certificate and its key."""


@dataclass(frozen=True, slots=True)
class Hands:
    """The devices that are left: one with an API key, one with a certificate, one with a PSK."""

    thermometer: Held
    gateway_id: str
    gateway_file: Path
    meter_id: str
    meter_identity: str
    meter_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Paste:
    """A command to be pasted. `endless`: it goes on until Ctrl-C, and belongs into a terminal of its own."""

    what: str
    command: str
    endless: bool = False


@dataclass(frozen=True, slots=True)
class Chapter:
    """Commands that belong together, in an order that makes sense, and what they need to be installed."""

    title: str
    pastes: Sequence[Paste]


def lay_out(story: Story, data_dir: Path) -> Hands:
    """Make the devices that the story has not left. Raises as `Story.tell`."""
    bearer = story.site.operator_token
    with story.connect() as client:
        body: dict[str, object] = {"name": "Workshop gateway", "hardware_id": f"GW-{story.run_id}-2"}
        path = "/devices/registration/tokens"
        token = checked(client.post(path, body, bearer=bearer), "POST", path, 201).body
        key, csr = own_key()
        path = "/devices/provision"
        given = checked(client.post(path, {"token": token["token"], "csr": csr}), "POST", path, 201).body
        keep_private(data_dir / GATEWAY_FILE, given["certificate"] + key)
        typed = secrets.token_hex(16)  # 32 bytes that can be typed: libcoap's client takes the key as text
        identity = f"meter-{story.run_id}"
        psk = {"identity": identity, "key": base64.urlsafe_b64encode(typed.encode()).decode().rstrip("=")}
        body = {"name": "Workshop meter", "hardware_id": f"METER-{story.run_id}-2", "credential_type": "psk"}
        meter = checked(client.post("/devices", {**body, "psk": psk}, bearer=bearer), "POST", "/devices", 201).body
    return Hands(
        story.devices["thermometer"],
        token["device_id"],
        data_dir / GATEWAY_FILE,
        meter["device_id"],
        identity,
        typed,
    )


def variables(story: Story, hands: Hands) -> Sequence[tuple[str, str]]:
    """What the commands need to know."""
    site = story.site
    coap = f"[{site.coap.host}]" if ":" in site.coap.host else site.coap.host
    return (
        ("API", site.base),
        ("CA", str(site.ca_chain)),
        ("OPERATOR", site.operator_token),
        ("DEVICE_ID", hands.thermometer.device_id),
        ("DEVICE_KEY", hands.thermometer.api_key),
        ("MQTT_HOST", site.mqtt.host),
        ("MQTT_PORT", str(site.mqtt.port)),
        ("GATEWAY_ID", hands.gateway_id),
        ("GATEWAY", str(hands.gateway_file)),
        ("COAP", f"coaps://{coap}:{site.coap.port}"),
        ("METER_ID", hands.meter_id),
        ("METER", hands.meter_identity),
        ("METER_KEY", hands.meter_key),
    )


def chapters(data_dir: Path, gatehouse: str) -> Sequence[Chapter]:
    """Commands to try; they use the variables that `variables` sets. `gatehouse` is how this program is called."""
    curl = "curl -sS -w '\\n' --cacert \"$CA\""
    operator = '-H "Authorization: Bearer $OPERATOR"'
    device = '-H "Authorization: Bearer $DEVICE_KEY"'
    json_body = "-H 'Content-Type: application/json'"
    place = shlex.quote(str(data_dir))
    mqtt = '-h "$MQTT_HOST" -p "$MQTT_PORT" --cafile "$CA" --cert "$GATEWAY" --key "$GATEWAY" -q 1'
    coap = 'coap-client-openssl -B 10 -w -u "$METER" -k "$METER_KEY"'
    https = (
        Paste("the device reports", f"""{curl} {device} {json_body} "$API/telemetry" -d '{{"temperature": 21.5}}'"""),
        Paste("what it reported", f'{curl} {operator} "$API/devices/$DEVICE_ID/readings?limit=3"'),
        Paste(
            "register another device",
            f"""{curl} {operator} {json_body} "$API/devices" """
            """-d '{"name": "Mine", "hardware_id": "HW-'$RANDOM$RANDOM'"}'""",
        ),
        Paste("who is connected", f'{curl} {operator} "$API/sessions"'),
        Paste("all devices, from the command line", f"{gatehouse} device list --data-dir {place}"),
        Paste("throw the device out", f'{gatehouse} device revoke "$DEVICE_ID" --data-dir {place}'),
        Paste("it tries again: 401", f"""{curl} {device} {json_body} "$API/telemetry" -d '{{"temperature": 21.6}}'"""),
        Paste("why?", f'{curl} {operator} "$API/devices/$DEVICE_ID/timeline?limit=5"'),
        Paste("watch what happens", f'{curl} -N {operator} "$API/events/stream"', endless=True),
    )
    gateway = (
        Paste(
            "the gateway reports; it comes back when that is stored",
            f"""mosquitto_pub {mqtt} -t devices/me/telemetry -m '{{"rack.temperature": 24.5}}'""",
        ),
        Paste("what the gateway reported", f'{curl} {operator} "$API/devices/$GATEWAY_ID/readings?limit=3"'),
        Paste(
            "a command for it, waiting",
            f"""{curl} {operator} {json_body} "$API/devices/$GATEWAY_ID/commands" -d '{{"method": "fan.on"}}'""",
        ),
        Paste("the gateway fetches it", f"mosquitto_sub {mqtt} -C 1 -t devices/me/commands"),
        Paste("a foreign topic: refused", f'mosquitto_sub {mqtt} -C 1 -t "devices/$DEVICE_ID/commands"'),
        Paste("throw the gateway out", f'{gatehouse} device revoke "$GATEWAY_ID" --data-dir {place}'),
        Paste("it tries again: not authorised", f"mosquitto_pub {mqtt} -t devices/me/telemetry -m '{{\"x\": 1}}'"),
    )
    meter = (
        Paste(
            "the meter reports",
            f"""{coap} -v 6 -m post -t application/json "$COAP/telemetry" -e '{{"flow": 0.42}}'""",
        ),
        Paste("what the meter reported", f'{curl} {operator} "$API/devices/$METER_ID/readings?limit=3"'),
        Paste("its configuration", f'{coap} "$COAP/config"'),
        Paste("what else it may ask", f'{coap} "$COAP/.well-known/core"'),
        Paste("throw the meter out", f'{gatehouse} device revoke "$METER_ID" --data-dir {place}'),
        Paste("it tries again: no handshake", f'{coap} "$COAP/config"'),
    )
    return (
        Chapter("HTTPS, with curl:", https),
        Chapter("MQTT, with mosquitto's clients (package mosquitto-clients):", gateway),
        Chapter("CoAP, with libcoap's client (package libcoap3-bin):", meter),
    )
