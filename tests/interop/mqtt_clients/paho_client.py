"""The device of test_mqtt_clients.py, played by paho-mqtt. Takes a JSON object, prints JSON lines."""

from __future__ import annotations

import json
import queue
import ssl
import sys
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

SECONDS = 20


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


class Device:
    """One client and what it hears."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked = asked
        self.heard: queue.Queue[tuple[str, Any]] = queue.Queue()
        version = MQTTProtocolVersion.MQTTv5 if asked["version"] == 5 else MQTTProtocolVersion.MQTTv311
        transport = "websockets" if asked.get("ws") else "tcp"
        self.client = client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="paho", protocol=version, transport=transport
        )
        context = ssl.create_default_context(cafile=asked["ca"])
        if asked.get("pem"):
            context.load_cert_chain(asked["pem"])
        client.tls_set_context(context)
        if asked.get("user"):
            client.username_pw_set(asked["user"], asked.get("password"))
        client.on_connect = lambda c, u, flags, reason, properties: self.heard.put(("connack", reason))
        client.on_message = lambda c, u, message: self.heard.put(("message", message))
        client.on_disconnect = lambda c, u, flags, reason, properties: self.heard.put(("closed", reason))
        client.on_subscribe = lambda c, u, mid, reasons, properties: self.heard.put(("suback", reasons))

    def connect(self) -> Any:
        self.client.connect("127.0.0.1", self.asked.get("ws") or self.asked["port"], keepalive=60)
        self.client.loop_start()
        return self.wait("connack")

    def wait(self, kind: str) -> Any:
        while True:
            got, value = self.heard.get(timeout=SECONDS)
            if got == kind:
                return value


def provision(asked: dict[str, Any]) -> None:
    device = Device(asked)
    assert not device.connect().is_failure
    device.client.subscribe("provision/response", 1)
    device.wait("suback")
    properties = None
    if asked["version"] == 5:
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = "provision/response"
        properties.CorrelationData = b"paho"
    device.client.publish("provision/request", json.dumps(asked["request"]), 1, properties=properties)
    message = device.wait("message")
    if asked["version"] == 5:
        assert message.properties.CorrelationData == b"paho"
    say(answer=json.loads(message.payload))
    device.client.disconnect()


def live(asked: dict[str, Any]) -> None:
    device = Device(asked)
    assert not device.connect().is_failure
    device.client.subscribe("devices/me/commands", 1)
    device.wait("suback")
    for qos in (0, 1, 2):
        device.client.publish("devices/me/telemetry", json.dumps({"n": qos}), qos).wait_for_publish(SECONDS)
    say(ready=True)
    command = json.loads(device.wait("message").payload)
    topic = f"devices/me/commands/{command['command_id']}/response"
    device.client.publish(topic, json.dumps({"result": "paho"}), 1).wait_for_publish(SECONDS)
    say(answered=command["method"])
    reason = device.wait("closed")
    device.client.loop_stop()
    say(closed=reason.value)
    again = Device(asked)
    reason = again.connect()
    again.client.loop_stop()
    say(refused=reason.value)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    {"provision": provision, "live": live}[asked["step"]](asked)
