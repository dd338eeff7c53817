"""An MQTT 5 device for the demo: one TLS connection, one exchange at a time.

    CONNECT, CONNACK ─► publish, subscribe: each waits for its acknowledgement ─► … ─► DISCONNECT, theirs or ours

It blocks, as the demo's other clients do; keeps no session over a connection, sends nothing again, and so loses what
was not acknowledged when its connection goes. Packets are made and read by the product's codec; what independent
clients make of the server is in the tests.

What can race: a message may come before the acknowledgement of the subscription that asked for it (5.0 §3.8.4), or
between any two answers. It waits in `_inbox` until it is asked for.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from adapters.mqtt.wire import decode, encode
from adapters.mqtt.wire_framing import Framer
from adapters.mqtt.wire_packets import (
    Ack,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Publish,
    QoS,
    Suback,
    Subscribe,
    SubscriptionRequest,
)
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, RemoteProtocolError, Version

P = TypeVar("P", Connack, Ack, Suback, Publish)

ANSWER_SECONDS: Final = 10.0
_CHUNK: Final = 65_536
_MAX_PACKET: Final = 1 << 20
PROVISION: Final = "provision"
"""The user name of who has no credential yet (docs/mqtt.md)."""


class NotConnected(Exception):
    """The server refused the connection or has ended it; `reason` is its word, None where it closed without one."""

    def __init__(self, reason: ReasonCode | None) -> None:
        super().__init__("MQTT: closed" if reason is None else f"MQTT: {reason.name} ({reason:#04x})")
        self.reason = reason


class MqttDevice:
    """One connection. Raises NotConnected when it is made, from any call after its end; OSError, TimeoutError."""

    def __init__(self, host: str, port: int, ca_chain: Path, *, client_id: str, certificate: Path | None) -> None:
        """`certificate` is a PEM file with ours and its key; without one we are `provision`."""
        context = ssl.create_default_context(cafile=str(ca_chain))
        if certificate is not None:
            context.load_cert_chain(certificate)
        self._framer = Framer(_MAX_PACKET)
        self._inbox: deque[Publish] = deque()
        self._packet_id = 0
        raw = socket.create_connection((host, port), ANSWER_SECONDS)
        try:
            self._stream = context.wrap_socket(raw, server_hostname=host)
        except BaseException:
            raw.close()
            raise
        try:
            user_name = PROVISION if certificate is None else None
            self._send(Connect(Version.V5, client_id, keep_alive=60, user_name=user_name))
            answer = self._next(Connack)
            if answer.reason is not ReasonCode.SUCCESS:
                raise NotConnected(answer.reason)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye, if anybody is there to hear it."""
        try:
            self._send(Disconnect())
        except OSError:
            pass  # it was ended by the server
        self._stream.close()

    def publish(self, topic: str, value: object) -> ReasonCode:
        """A JSON value with QoS 1; the server's word about it."""
        self._packet_id += 1
        self._send(Publish(topic, json.dumps(value).encode(), QoS.AT_LEAST_ONCE, packet_id=self._packet_id))
        return self._next(Ack).reason

    def subscribe(self, topic_filter: str) -> ReasonCode:
        """With QoS 1; the server's word about it."""
        self._packet_id += 1
        self._send(Subscribe(self._packet_id, (SubscriptionRequest(topic_filter, QoS.AT_LEAST_ONCE),)))
        return self._next(Suback).reasons[0]

    def message(self) -> tuple[str, Any]:
        """The next message's topic and its JSON value; it is acknowledged."""
        got = self._inbox.popleft() if self._inbox else self._next(Publish)
        if got.qos is QoS.AT_LEAST_ONCE:
            self._send(Ack(PacketType.PUBACK, got.packet_id))
        return got.topic, json.loads(got.payload)

    def ended(self) -> ReasonCode | None:
        """Wait until the server ends the connection; the reason that it gives. Raises TimeoutError if it does not."""
        try:
            while True:
                self._inbox.append(self._next(Publish))
        except NotConnected as end:
            return end.reason

    def _send(self, packet: Packet) -> None:
        self._stream.sendall(encode(packet, Version.V5))

    def _next(self, kind: type[P]) -> P:
        """The next packet of a kind; messages that come before it wait."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            packet = self._packet(deadline)
            if isinstance(packet, kind):
                return packet
            if isinstance(packet, Disconnect):
                raise NotConnected(packet.reason)
            if isinstance(packet, Publish):
                self._inbox.append(packet)

    def _packet(self, deadline: float) -> Packet:
        while (cut := self._framer.next()) is None:
            self._stream.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._stream.recv(_CHUNK)
            except TimeoutError:
                raise TimeoutError("MQTT: no answer") from None
            except ConnectionError:
                data = b""
            if not data:
                raise NotConnected(None)
            self._framer.feed(data)
        try:
            return decode(*cut, Version.V5)
        except RemoteProtocolError as error:
            raise OSError(f"MQTT: {error}") from error
