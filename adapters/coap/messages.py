"""One CoAP message as a value, and the two blames (RFC 7252 §3).

A message keeps its options as they stood on the wire: numbers and bytes, ascending. What they mean is read in
`options.py`, where the rules for unknown, repeated and ill-sized ones are; a message that merely can be taken apart
is no error here.
"""

from __future__ import annotations

import msgspec
from aiocoap.numbers.codes import Code
from aiocoap.numbers.types import Type

Options = tuple[tuple[int, bytes], ...]


class Message(msgspec.Struct, frozen=True, gc=False):
    """One datagram's worth. `options` are (number, value) pairs in ascending order of number."""

    type: Type
    code: Code
    message_id: int
    token: bytes = b""
    options: Options = ()
    payload: bytes = b""


class Head(msgspec.Struct, frozen=True, gc=False):
    """The options of a message, as bytes between token and payload marker and taken apart."""

    raw: bytes
    options: Options


class Header(msgspec.Struct, frozen=True, gc=False):
    """As much of a broken message as is needed to reject it."""

    type: Type
    message_id: int


class LocalProtocolError(Exception):
    """We were about to break the protocol; our bug."""


class RemoteProtocolError(Exception):
    """A datagram that is no CoAP message. The text names the rule and is safe for logs.

    `header` is there when version, type and message id could be read: a confirmable message is then rejected with a
    Reset (RFC 7252 §4.2), all else is ignored (§3, §4.3).
    """

    def __init__(self, text: str, header: Header | None = None) -> None:
        super().__init__(text)
        self.header = header
