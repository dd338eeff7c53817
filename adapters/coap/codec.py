"""Bytes to message and back (RFC 7252 §3). Sans-IO; `decode` raises RemoteProtocolError and nothing else.

     0                   1                   2                   3
    |Ver| T |  TKL  |      Code     |          Message ID           | Token | Options | 0xFF | Payload

Why not aiocoap's codec, whose numbers this stands on: it takes what §3 forbids (token lengths 9 to 15, tokens that are
cut off, a payload marker without payload, anything after an Empty message), lets UnicodeDecodeError out, and its
enumerations keep every unknown Content-Format that a stranger ever sent, of any size, for the life of the process.
The tests hold the two against each other on everything that both take. It is also some three times faster.

Options stay bytes. Their number, and so the work for one datagram, is capped.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from aiocoap.numbers.codes import Code
from aiocoap.numbers.types import Type

from adapters.coap.messages import Head, Header, LocalProtocolError, Message, RemoteProtocolError

MAX_OPTIONS: Final = 128
"""Of one message. A path of 255 segments is nobody's; without a cap 64 KiB of zeros would be 65,000 options."""

MAX_TOKEN: Final = 8  # RFC 7252 §3
_VERSION: Final = 1
_HEADER: Final = Struct(">BBH")
_MARKER: Final = 0xFF
_TYPES: Final = tuple(Type(number) for number in range(4))
_CODES: Final = tuple(Code(number) for number in range(256))
_MAX_NUMBER: Final = 0xFFFF  # option numbers are 16 bits, RFC 7252 §12.2


def decode(datagram: bytes, known: Head | None = None) -> Message:
    """The message in a datagram. `known` are options that are expected, since a device asks for the same again and
    again; if they are there byte for byte, the message has these very ones, and nothing is taken apart.

    Raises RemoteProtocolError when it is none; the error has the header when a Reset can be made from it.
    """
    size = len(datagram)
    if size < 4:
        raise RemoteProtocolError(f"{size} bytes; a message has at least 4")
    first = datagram[0]
    if first >> 6 != _VERSION:
        raise RemoteProtocolError(f"version {first >> 6}; only 1 is known")  # silently ignored, §3
    kind = _TYPES[(first >> 4) & 3]
    message_id = datagram[2] << 8 | datagram[3]
    code = datagram[1]
    if code == 0:
        if size != 4 or first & 0x0F:
            raise _broken(kind, message_id, "an Empty message that is not empty")  # §4.1
        return Message(kind, Code.EMPTY, message_id)
    at = 4 + (first & 0x0F)
    if at > 4 + MAX_TOKEN:
        raise _broken(kind, message_id, f"a token length of {at - 4}; up to {MAX_TOKEN} is allowed")
    if at > size:
        raise _broken(kind, message_id, "a token that is cut off")
    token = datagram[4:at]
    if known is not None and datagram.startswith(known.raw, at):
        end = at + len(known.raw)
        if end == size:
            return Message(kind, _CODES[code], message_id, token, known.options)
        if datagram[end] == _MARKER and end + 1 < size:
            return Message(kind, _CODES[code], message_id, token, known.options, datagram[end + 1 :])
    payload = b""
    options: list[tuple[int, bytes]] = []
    number = 0
    while at < size:
        byte = datagram[at]
        at += 1
        if byte == _MARKER:
            if at == size:
                raise _broken(kind, message_id, "a payload marker without payload")  # §3
            payload = datagram[at:]
            break
        delta = byte >> 4
        length = byte & 0x0F
        if delta > 12:
            delta, at = _extended(datagram, at, delta, kind, message_id)
        if length > 12:
            length, at = _extended(datagram, at, length, kind, message_id)
        number += delta
        end = at + length
        if end > size:
            raise _broken(kind, message_id, f"option {number} is cut off")
        options.append((number, datagram[at:end]))
        at = end
    if number > _MAX_NUMBER:
        raise _broken(kind, message_id, f"option number {number}; numbers end at {_MAX_NUMBER}")
    if len(options) > MAX_OPTIONS:
        raise _broken(kind, message_id, f"{len(options)} options; {MAX_OPTIONS} are allowed")
    return Message(kind, _CODES[code], message_id, token, tuple(options), payload)


def head_of(datagram: bytes, message: Message) -> Head:
    """The options of a message that was decoded from this datagram."""
    start = 4 + len(message.token)
    end = len(datagram) - len(message.payload) - 1 if message.payload else len(datagram)
    return Head(datagram[start:end], message.options)


def encode(message: Message) -> bytes:
    """The datagram of a message. Raises LocalProtocolError for one that cannot be written."""
    if len(message.token) > MAX_TOKEN or not 0 <= message.message_id <= 0xFFFF:
        raise LocalProtocolError(f"a token of {len(message.token)} bytes, message id {message.message_id}")
    if message.code == 0 and (message.token or message.options or message.payload):
        raise LocalProtocolError("an Empty message with content")
    first = _VERSION << 6 | message.type << 4 | len(message.token)
    head = _HEADER.pack(first, message.code, message.message_id) + message.token
    if not message.options and not message.payload:
        return head  # nearly all answers to what a device sends
    out = bytearray(head)
    last = 0
    for number, value in message.options:
        delta = number - last
        length = len(value)
        if delta < 0:
            raise LocalProtocolError(f"option {number} after option {last}")
        if delta < 13 and length < 13:
            out.append(delta << 4 | length)
        else:
            short, tail = _extend(delta)
            short_length, length_tail = _extend(length)
            out.append(short << 4 | short_length)
            out += tail
            out += length_tail
        out += value
        last = number
    if message.payload:
        out.append(_MARKER)
        out += message.payload
    return bytes(out)


def _extended(datagram: bytes, at: int, nibble: int, kind: Type, message_id: int) -> tuple[int, int]:
    """An option delta or length of more than 12, and where it ends (RFC 7252 §3.1)."""
    if nibble == 13:
        if at < len(datagram):
            return datagram[at] + 13, at + 1
    elif nibble == 14:
        if at + 2 <= len(datagram):
            return (datagram[at] << 8 | datagram[at + 1]) + 269, at + 2
    else:
        raise _broken(kind, message_id, "an option delta or length of 15, which is reserved")
    raise _broken(kind, message_id, "an option header that is cut off")


def _extend(value: int) -> tuple[int, bytes]:
    if value < 13:
        return value, b""
    if value < 269:
        return 13, bytes((value - 13,))
    if value < 65_805:
        return 14, (value - 269).to_bytes(2, "big")
    raise LocalProtocolError(f"an option delta or length of {value}")


def _broken(kind: Type, message_id: int, text: str) -> RemoteProtocolError:
    return RemoteProtocolError(text, Header(kind, message_id))
