// The device of test_coap_clients.py, played by node-coap-client over node-dtls-client: DTLS and CoAP in JavaScript.
// Takes a JSON object, prints JSON lines. The library says Content-Format JSON on every request and cannot be told
// otherwise, so for the one request in CBOR the number behind that name is changed.
"use strict";
const { CoapClient } = require("node-coap-client");
const { ContentFormats } = require("node-coap-client/build/ContentFormats");

const asked = JSON.parse(process.argv[2]);
const base = `coaps://127.0.0.1:${asked.port}`;
const say = (told) => console.log(JSON.stringify(told));
const fail = (error) => {
  console.error(error);
  process.exit(1);
};
setTimeout(() => fail("took too long"), 60_000).unref();

const dotted = (code) => `${code.major}.${String(code.minor).padStart(2, "0")}`;
const post = (path, payload) => CoapClient.request(`${base}/${path}`, "post", payload);

async function provision() {
  const answer = await post("provision", Buffer.from(JSON.stringify(asked.request)));
  say({ code: dotted(answer.code), answer: JSON.parse(answer.payload) });
  CoapClient.reset();
}

async function live() {
  const codes = [dotted((await post("telemetry", Buffer.from('{"n": 1}'))).code)];
  const json = ContentFormats.application_json;
  ContentFormats.application_json = 60;
  codes.push(dotted((await post("telemetry", Buffer.from([0xa1, 0x61, 0x6e, 0x02]))).code)); // {"n": 2}
  ContentFormats.application_json = json;
  say({ telemetry: codes });
  const [connection] = CoapClient.connections.values();
  const closed = new Promise((resolve) => {
    connection.socket.on("close", () => resolve("close"));
    connection.socket.on("error", (error) => resolve(String(error)));
  });
  await CoapClient.observe(`${base}/config`, "get", (answer) => {
    say({ config: answer.payload.length ? JSON.parse(answer.payload) : null, code: dotted(answer.code) });
  });
  say({ closed: await closed });
  CoapClient.connections.clear(); // it keeps a connection that the peer has closed, and reset() cannot close that again
  const connected = await CoapClient.tryToConnect(base, 1, 10_000);
  say(connected === true ? { answered: "connected" } : { refused: String(connected) });
}

async function commands() {
  await new Promise((resolve, reject) => {
    let left = asked.count;
    CoapClient.observe(`${base}/commands`, "get", (answer) => {
      say({ command: JSON.parse(answer.payload) });
      if (--left === 0) resolve();
    }).catch(reject);
  });
  CoapClient.reset();
}

CoapClient.setSecurityParams("127.0.0.1", { psk: { [asked.identity]: Buffer.from(asked.key, "hex") } });
({ provision, live, commands })[asked.step]().then(() => process.exit(0), fail);
