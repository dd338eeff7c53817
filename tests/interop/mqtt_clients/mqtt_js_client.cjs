// The device of test_mqtt_clients.py, played by MQTT.js. Takes a JSON object, prints JSON lines.
"use strict";
const fs = require("node:fs");
const mqtt = require("mqtt");

const asked = JSON.parse(process.argv[2]);
const say = (told) => console.log(JSON.stringify(told));
const fail = (error) => {
  console.error(error);
  process.exit(1);
};
setTimeout(() => fail("took too long"), 30_000).unref();

function connect() {
  const options = {
    clientId: "mqtt-js",
    ca: fs.readFileSync(asked.ca),
    protocolVersion: asked.version,
    reconnectPeriod: 0,
    username: asked.user || undefined,
  };
  if (asked.pem) {
    options.cert = fs.readFileSync(asked.pem);
    options.key = fs.readFileSync(asked.pem);
  }
  if (asked.ws) {
    return mqtt.connect(`wss://localhost:${asked.ws}/mqtt`, options);
  }
  return mqtt.connect(`mqtts://localhost:${asked.port}`, options);
}

const once = (emitter, event) => new Promise((resolve) => emitter.once(event, (...values) => resolve(values)));

async function provision() {
  const client = connect();
  client.on("error", fail);
  await once(client, "connect");
  await client.subscribeAsync("provision/response", { qos: 1 });
  const heard = once(client, "message");
  const properties = { responseTopic: "provision/response", correlationData: Buffer.from("js") };
  await client.publishAsync("provision/request", JSON.stringify(asked.request), {
    qos: 1,
    properties: asked.version === 5 ? properties : undefined,
  });
  const [, payload, packet] = await heard;
  if (asked.version === 5 && packet.properties.correlationData.toString() !== "js") fail("other correlation data");
  say({ answer: JSON.parse(payload) });
  await client.endAsync();
}

async function live() {
  const client = connect();
  client.on("error", (error) => say({ error: String(error) }));
  await once(client, "connect");
  await client.subscribeAsync("devices/me/commands", { qos: 1 });
  const heard = once(client, "message");
  for (const qos of [0, 1, 2]) await client.publishAsync("devices/me/telemetry", JSON.stringify({ n: qos }), { qos });
  let reason = 0;
  client.on("disconnect", (packet) => (reason = packet.reasonCode));
  const closed = once(client, "close");
  say({ ready: true });
  const command = JSON.parse((await heard)[1]);
  await client.publishAsync(`devices/me/commands/${command.command_id}/response`, '{"result": "js"}', { qos: 1 });
  say({ answered: command.method });
  await closed;
  say({ closed: reason });
  const again = connect();
  const [error] = await once(again, "error");
  say({ refused: error.code });
  again.end(true);
  client.end(true);
}

({ provision, live })[asked.step]().catch(fail);
