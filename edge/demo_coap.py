"""A CoAP device for the demo: one PSK, one association, one request at a time (RFC 7252, DTLS 1.2).

    connect ─► handshake ─► ask, acknowledged or repeated ─► … ─► close_notify

It blocks, as the demo's other clients do, and knows no blocks and no observation. The datagrams are made and read by
the product's codec; what independent clients make of the server is in the tests.

What can be lost: any datagram. A request is repeated with its message id until it is answered, so it is carried out
once (RFC 7252 §4.5); a flight of the handshake is repeated by OpenSSL's timer (RFC 6347 §4.2.4).
"""

from __future__ import annotations

import os
import socket
import time
from types import TracebackType
from typing import Final

import cbor2
from aiocoap.numbers.codes import Code
from aiocoap.numbers.types import Type
from OpenSSL import SSL

from adapters.coap.codec import decode, encode
from adapters.coap.messages import Message
from adapters.dtls.psk_binding import forget_errors, present_psk

AGAIN: Final = 2.0
"""Seconds after which a request is repeated (RFC 7252 §4.8)."""
GIVE_UP: Final = 10.0
_CBOR: Final = 60
_DATAGRAM: Final = 16_384
_MTU: Final = 1_200


class HandshakeFailed(Exception):
    """The server did not take the key."""


class CoapDevice:
    """One association. Raises HandshakeFailed when it is made, TimeoutError where nobody answers."""

    def __init__(self, host: str, port: int, identity: str, key: bytes) -> None:
        context = SSL.Context(SSL.DTLS_CLIENT_METHOD)
        context.set_cipher_list(b"PSK-AES128-CCM8:PSK-AES128-GCM-SHA256:@SECLEVEL=0")
        context.set_options(SSL.OP_NO_QUERY_MTU | SSL.OP_NO_TICKET)
        self._psk = present_psk(context, identity.encode(), key)
        self._connection = SSL.Connection(context)
        self._connection.set_connect_state()
        self._connection.set_ciphertext_mtu(_MTU)
        self._message_id = int.from_bytes(os.urandom(2), "big")
        self.closed = False
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        self._socket = socket.socket(family, kind, protocol)
        try:
            self._socket.connect(address)
            self._shake_hands()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> CoapDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, method: Code, path: str, value: object = None) -> tuple[Code, object]:
        """One confirmable request in CBOR; the response's code and value (None where it has none)."""
        self._message_id = (self._message_id + 1) % 0x10000
        token = os.urandom(2)
        options = [(11, segment.encode()) for segment in path.strip("/").split("/")]
        payload = b""
        if value is not None:
            options.append((12, bytes((_CBOR,))))
            payload = cbor2.dumps(value)
        options.append((17, bytes((_CBOR,))))
        asked = encode(Message(Type.CON, method, self._message_id, token, tuple(options), payload))
        deadline = time.monotonic() + GIVE_UP
        while time.monotonic() < deadline and not self.closed:
            self._connection.send(asked)
            self._flush()
            answer = self._answer(token, min(deadline, time.monotonic() + AGAIN))
            if answer is not None:
                return answer.code, cbor2.loads(answer.payload) if answer.payload else None
        raise TimeoutError(f"no answer to {method.name} {path}")

    def closed_by_server(self, seconds: float) -> float | None:
        """Milliseconds until the server said close_notify; None if it did not within `seconds`."""
        since = time.monotonic()
        while not self.closed and time.monotonic() < since + seconds:
            self._receive(since + seconds)
        return 1000 * (time.monotonic() - since) if self.closed else None

    def _answer(self, token: bytes, deadline: float) -> Message | None:
        while time.monotonic() < deadline and not self.closed:
            for datagram in self._receive(deadline):
                message = decode(datagram)
                if message.type is Type.CON:
                    empty = Message(Type.ACK, Code.EMPTY, message.message_id)
                    self._connection.send(encode(empty))
                    self._flush()
                if message.token == token and message.code.is_response():
                    return message
        return None

    def _shake_hands(self) -> None:
        deadline = time.monotonic() + GIVE_UP
        while time.monotonic() < deadline:
            try:
                self._connection.do_handshake()
                self._flush()
                return
            except SSL.WantReadError:
                self._flush()
            except SSL.Error as error:
                forget_errors()
                raise HandshakeFailed("the server did not take the key") from error
            if not self._wait(min(deadline, time.monotonic() + 1.0)):
                try:
                    self._connection.DTLSv1_handle_timeout()
                except SSL.Error as error:
                    raise HandshakeFailed("the handshake was given up") from error
                self._flush()
        raise TimeoutError("no answer to the handshake")

    def _receive(self, deadline: float) -> list[bytes]:
        """What one datagram from the server holds; nothing where none came."""
        if not self._wait(deadline):
            return []
        received: list[bytes] = []
        try:
            while True:
                received.append(self._connection.recv(_DATAGRAM))
        except SSL.WantReadError:
            pass
        except (SSL.ZeroReturnError, SSL.Error):
            forget_errors()
            self.closed = True
        return received

    def _wait(self, deadline: float) -> bool:
        """Feed the next datagram to DTLS; whether one came."""
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            datagram = self._socket.recv(_DATAGRAM)
        except TimeoutError:
            return False
        self._connection.bio_write(datagram)
        return True

    def _flush(self) -> None:
        """Send what DTLS has to say: its records, each in a datagram of its own."""
        try:
            written = self._connection.bio_read(4 * _DATAGRAM)
        except SSL.WantReadError:
            return
        while written:
            end = 13 + int.from_bytes(written[11:13], "big")  # RFC 6347 §4.1: the header, and the length at its end
            self._socket.send(written[:end])
            written = written[end:]
