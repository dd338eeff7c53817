"""The device of test_mqtt_clients.py, played by amqtt's client (3.1.1). Takes a JSON object, prints JSON lines."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from amqtt.client import MQTTClient
from amqtt.errors import ClientError, ConnectError

SECONDS = 20


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def client(asked: dict[str, Any]) -> MQTTClient:
    connection = {"cafile": asked["ca"]}
    if asked.get("pem"):
        connection |= {"certfile": asked["pem"], "keyfile": asked["pem"]}
    config = {"auto_reconnect": False, "check_hostname": False, "connection": connection, "plugins": {}}
    return MQTTClient(client_id="amqtt", config=config)


def address(asked: dict[str, Any]) -> str:
    user = f"{asked['user']}:-@" if asked.get("user") else ""
    return f"mqtts://{user}localhost:{asked['port']}/"


async def provision(asked: dict[str, Any]) -> None:
    device = client(asked)
    await device.connect(address(asked), cafile=asked["ca"])
    await device.subscribe([("provision/response", 1)])
    await device.publish("provision/request", json.dumps(asked["request"]).encode(), qos=1)
    message = await asyncio.wait_for(device.deliver_message(), SECONDS)
    say(answer=json.loads(message.data))
    await device.disconnect()


async def live(asked: dict[str, Any]) -> None:
    device = client(asked)
    await device.connect(address(asked), cafile=asked["ca"])
    await device.subscribe([("devices/me/commands", 1)])
    for qos in (0, 1, 2):
        payload = json.dumps({"n": qos}).encode()
        await asyncio.wait_for(device.publish("devices/me/telemetry", payload, qos=qos), SECONDS)
    say(ready=True)
    message = await asyncio.wait_for(device.deliver_message(), SECONDS)
    command = json.loads(message.data)
    topic = f"devices/me/commands/{command['command_id']}/response"
    await asyncio.wait_for(device.publish(topic, b'{"result": "amqtt"}', qos=1), SECONDS)
    say(answered=command["method"])
    try:
        assert await asyncio.wait_for(device.deliver_message(), SECONDS) is None
    except ClientError:
        pass  # either way it says that the connection is gone
    say(closed=0)
    try:
        await client(asked).connect(address(asked), cafile=asked["ca"])
    except ConnectError as refused:
        code = getattr(refused, "return_code", None)
        say(refused=5 if code is None else int(code), said=str(refused))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    asyncio.run({"provision": provision, "live": live}[asked["step"]](asked))
