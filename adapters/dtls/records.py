"""What can be read of DTLS 1.2 without any key: record headers, the ClientHello, and the identity that comes before it
is proved. And the three records that can be written without one.

Theory
------
    datagram = record*      record = type(1) version(2) epoch(2) sequence(6) length(2) fragment     RFC 6347 §4.1
    fragment of type 22, epoch 0 = message fragment*                                               RFC 6347 §4.2.2
    message fragment = type(1) length(3) message_seq(2) offset(3) fragment_length(3) body

Bytes here come from anybody. Nothing raises: what is malformed is not there (`None`, or the end of the list), as the
record layer discards it too (RFC 6347 §4.1.2.7). Nothing is believed beyond its shape: a ClientHello is a ClientHello
whoever sent it, the cookie decides that.
"""

from __future__ import annotations

from struct import unpack_from
from typing import Final

import msgspec

CHANGE_CIPHER_SPEC: Final = 20
ALERT: Final = 21
HANDSHAKE: Final = 22
APPLICATION_DATA: Final = 23

CLIENT_HELLO: Final = 1
CLIENT_KEY_EXCHANGE: Final = 16

RECORD_HEADER: Final = 13
MESSAGE_HEADER: Final = 12

ALERT_BAD_RECORD_MAC: Final = 20  # RFC 5246 §7.2
ALERT_HANDSHAKE_FAILURE: Final = 40
ALERT_ILLEGAL_PARAMETER: Final = 47
ALERT_DECODE_ERROR: Final = 50
ALERT_DECRYPT_ERROR: Final = 51
ALERT_PROTOCOL_VERSION: Final = 70
ALERT_INTERNAL_ERROR: Final = 80

DTLS_12: Final = b"\xfe\xfd"
_DTLS_10: Final = b"\xfe\xff"
_RANDOM: Final = 32
_SESSION_ID: Final = 32
_LAST_HELLO: Final = 2  # the first ClientHello has number 0, the one with the cookie 1, or 2 after a second cookie

# RFC 4279 §2, RFC 5489 §2: suites whose ClientKeyExchange begins with the identity. Of these ours are PSK with
# GCM-128, GCM-256, CCM-128, CCM-128-8, and ECDHE_PSK with ChaCha20.
PSK_SUITES: Final = frozenset({0x00A8, 0x00A9, 0xC0A4, 0xC0A8, 0xCCAC})

_MAX_FRAGMENT_LENGTH: Final = 1
_LAST_SEQUENCE: Final = (1 << 48) - 1

# An identity of 256 bytes, the longest that OpenSSL takes, and the largest curve point, twice over.
_KEY_EXCHANGE_ROOM: Final = 1024


class Record(msgspec.Struct, frozen=True, gc=False):
    """One record's header, and where it lies in its datagram: `start` of the header, `end` of the fragment."""

    content: int
    epoch: int
    sequence: int
    start: int
    end: int


class ClientHello(msgspec.Struct, frozen=True, gc=False):
    """A ClientHello that came whole in the first record of a datagram."""

    record: bytes
    """The record itself, without what followed it."""
    version: int
    """As on the wire: 0xFEFD for DTLS 1.2, larger numbers for older versions."""
    message_seq: int
    random: bytes
    cookie: bytes
    parameters: bytes
    """What a client repeats in its second ClientHello (RFC 6347 §4.2.1): all up to the extensions, but the cookie."""
    extensions: bytes
    """All that follows, unread."""

    @property
    def mark(self) -> bytes:
        """By this it is known again when it comes again."""
        return self.random + self.cookie


class Offer(msgspec.Struct, frozen=True, gc=False):
    """What a ClientHello offers, in the client's order."""

    suites: tuple[int, ...]
    compressions: bytes


def split_records(datagram: bytes) -> list[Record]:
    """The records of a datagram. What does not fit its own length, and all behind it, is left out."""
    records: list[Record] = []
    start, size = 0, len(datagram)
    while start + RECORD_HEADER <= size:
        number = int.from_bytes(datagram[start + 3 : start + RECORD_HEADER], "big")  # epoch, sequence, length
        end = start + RECORD_HEADER + (number & 0xFFFF)
        if end > size:
            break
        records.append(Record(datagram[start], number >> 64, number >> 16 & _LAST_SEQUENCE, start, end))
        start = end
    return records


def is_client_hello(datagram: bytes) -> bool:
    """Whether the first message of the datagram says that it is a ClientHello in the clear."""
    return (
        len(datagram) > RECORD_HEADER + MESSAGE_HEADER
        and datagram[0] == HANDSHAKE
        and datagram[3:5] == b"\0\0"
        and datagram[RECORD_HEADER] == CLIENT_HELLO
    )


def read_client_hello(datagram: bytes) -> ClientHello | None:
    """The ClientHello that a datagram begins with. One in fragments is none: its cookie could not be judged without
    keeping something for a stranger (RFC 6347 §4.2.1)."""
    if not is_client_hello(datagram):
        return None
    end = RECORD_HEADER + (datagram[11] << 8 | datagram[12])
    body = datagram[RECORD_HEADER + MESSAGE_HEADER : end]
    length = int.from_bytes(datagram[RECORD_HEADER + 1 : RECORD_HEADER + 4], "big")
    offset = datagram[RECORD_HEADER + 6 : RECORD_HEADER + 9]
    fragment_length = int.from_bytes(datagram[RECORD_HEADER + 9 : RECORD_HEADER + 12], "big")
    if end > len(datagram) or offset != b"\0\0\0" or not len(body) == length == fragment_length:
        return None
    if datagram[RECORD_HEADER + 4] << 8 | datagram[RECORD_HEADER + 5] > _LAST_HELLO:
        return None
    # RFC 6347 §4.2.1: version, random, session id, cookie, suites, compression methods, extensions.
    session_id = 2 + _RANDOM
    cookie = _skip(body, session_id, 1)
    suites = _skip(body, cookie, 1)
    compressions = _skip(body, suites, 2)
    after = _skip(body, compressions, 1)
    if after is None or cookie is None or suites is None:
        return None
    return ClientHello(
        record=datagram[:end],
        version=body[0] << 8 | body[1],
        message_seq=datagram[RECORD_HEADER + 4] << 8 | datagram[RECORD_HEADER + 5],
        random=body[2:session_id],
        cookie=body[cookie + 1 : suites],
        parameters=body[:cookie] + body[suites:after],
        extensions=body[after:],
    )


def read_offer(hello: ClientHello) -> Offer | None:
    """The suites and compression methods of a ClientHello; None where half a suite is among them, or no method, or its
    session id is longer than any (RFC 5246 §7.4.1.2)."""
    parameters = hello.parameters
    at = 2 + _RANDOM
    if parameters[at] > _SESSION_ID:
        return None
    at += 1 + parameters[at]
    size = parameters[at] << 8 | parameters[at + 1]
    at += 2
    if size % 2 or len(parameters) == at + size + 1:
        return None
    return Offer(unpack_from(f">{size // 2}H", parameters, at), parameters[at + size + 1 :])


def psk_suite(hello: ClientHello) -> int | None:
    """The suite that is agreed on with a client that has a pre-shared key: the first of ours, in the client's order.

    None for a client that offers none of them.
    """
    offer = read_offer(hello)
    if offer is None:
        return None
    return next((suite for suite in offer.suites if suite in PSK_SUITES), None)


def read_extensions(hello: ClientHello) -> dict[int, bytes] | None:
    """The extensions by their types (RFC 5246 §7.4.1.4); None where they do not fit, or one is there twice."""
    data = hello.extensions
    if not data:
        return {}
    end = len(data)
    if end < 2 or (data[0] << 8 | data[1]) != end - 2:
        return None
    found: dict[int, bytes] = {}
    at = 2
    while at + 4 <= end:
        kind, size = data[at] << 8 | data[at + 1], data[at + 2] << 8 | data[at + 3]
        at += 4 + size
        if at > end or kind in found:
            return None
        found[kind] = data[at - size : at]
    return found if at == end else None


def _skip(body: bytes, at: int | None, width: int) -> int | None:
    """Behind the vector at `at`, whose length is written in `width` bytes; None when it is not all there."""
    if at is None or at + width > len(body):
        return None
    after = at + width + int.from_bytes(body[at : at + width], "big")
    return after if after <= len(body) else None


def hello_verify_request(hello: ClientHello, cookie: bytes) -> bytes:
    """The answer to a ClientHello without a good cookie.

    RFC 6347 §4.2.1: it takes its record sequence number from the ClientHello and its message number from nothing, so
    that the server keeps nothing, and says DTLS 1.0 whatever will be negotiated.
    """
    body = _DTLS_10 + bytes((len(cookie),)) + cookie
    length = len(body).to_bytes(3, "big")
    message = b"\x03" + length + b"\0\0" + b"\0\0\0" + length + body
    return bytes((HANDSHAKE,)) + _DTLS_10 + hello.record[3:11] + len(message).to_bytes(2, "big") + message


def handshake_message(kind: int, number: int, body: bytes) -> bytes:
    """A whole message: what is hashed, and what is sent where it fits into one record (RFC 6347 §4.2.2)."""
    length = len(body).to_bytes(3, "big")
    return b"".join((kind.to_bytes(1, "big"), length, number.to_bytes(2, "big"), b"\0\0\0", length, body))


def plaintext_record(content: int, sequence: int, fragment: bytes) -> bytes:
    """Record number `sequence` of epoch 0."""
    return b"".join(
        (content.to_bytes(1, "big"), DTLS_12, sequence.to_bytes(8, "big"), len(fragment).to_bytes(2, "big"), fragment)
    )


def plaintext_alert(description: int, sequence: int) -> bytes:
    """A fatal alert under no key, as record number `sequence` of epoch 0."""
    return plaintext_record(ALERT, sequence, bytes((2, description)))


def chosen_suite(flight: bytes) -> int | None:
    """The cipher suite of the ServerHello that a server's first flight begins with."""
    at = _behind_session_id(flight)
    return int.from_bytes(flight[at : at + 2], "big") if at + 2 <= len(flight) else None


def agreed_fragment(flight: bytes) -> int | None:
    """How many bytes one record may carry, where the ServerHello that a server's first flight begins with says that
    the client has asked for such a limit (RFC 6066 §4); None where it does not."""
    at = _behind_session_id(flight) + 3  # the suite, the compression method
    end = min(RECORD_HEADER + (flight[11] << 8 | flight[12]), len(flight)) if at + 2 <= len(flight) else 0
    at += 2
    while at + 4 <= end:
        kind = flight[at] << 8 | flight[at + 1]
        length = flight[at + 2] << 8 | flight[at + 3]
        at += 4
        if kind == _MAX_FRAGMENT_LENGTH and length == 1 and at < end and 1 <= flight[at] <= 4:
            return 256 << flight[at]
        at += length
    return None


def _behind_session_id(flight: bytes) -> int:
    at = RECORD_HEADER + MESSAGE_HEADER + 2 + _RANDOM
    return at + 1 + flight[at] if len(flight) > at else len(flight)


class IdentityReader:
    """Reads the PSK identity out of a ClientKeyExchange in the clear, whole or in fragments of any order.

    `message_seq` is the number that the message must have: the one behind the ClientHello, since a client shows no
    certificate under a PSK suite. Every fragment must agree with the first one about the length; a whole message counts
    whatever fragments came before it, as with OpenSSL: else a stranger's one fragment would stall a handshake for good.
    """

    __slots__ = ("_body", "_message_seq", "_missing", "complete")

    def __init__(self, message_seq: int) -> None:
        self._message_seq = message_seq.to_bytes(2, "big")
        self._body: bytes | bytearray | None = None
        self._missing: bytearray | None = None
        self.complete = False

    def feed(self, fragment: bytes) -> None:
        """Take the fragment of one record of type handshake and epoch 0."""
        at = 0
        while at + MESSAGE_HEADER <= len(fragment):
            start = at + MESSAGE_HEADER
            at = start + int.from_bytes(fragment[at + 9 : start], "big")
            if at > len(fragment):
                return
            header = fragment[start - MESSAGE_HEADER : start]
            if header[0] == CLIENT_KEY_EXCHANGE and header[4:6] == self._message_seq:
                self._take(int.from_bytes(header[1:4], "big"), int.from_bytes(header[6:9], "big"), fragment[start:at])

    @property
    def body(self) -> bytes:
        """The complete message, without its header."""
        return bytes(self._body or b"")

    def identity(self) -> bytes | None:
        """The identity of a complete message; None when the message does not have that shape."""
        body = self._body
        if body is None or len(body) < 2:
            return None
        end = 2 + (body[0] << 8 | body[1])
        return bytes(body[2:end]) if end <= len(body) else None

    def _take(self, length: int, offset: int, part: bytes) -> None:
        if self.complete or length > _KEY_EXCHANGE_ROOM or offset + len(part) > length:
            return
        if len(part) == length:  # whole; what anybody else said of its length before does not matter any more
            self._body, self.complete = part, True
            return
        if not part:
            return
        if not isinstance(self._body, bytearray) or self._missing is None:
            self._body, self._missing = bytearray(length), bytearray(b"\1" * length)
        if len(self._body) != length:
            return
        self._body[offset : offset + len(part)] = part
        self._missing[offset : offset + len(part)] = bytes(len(part))
        self.complete = 1 not in self._missing
