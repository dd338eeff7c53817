"""What the options of a request mean, and how those of a response are written (RFC 7252 §5.4, §5.10).

    options ─► known, of legal length, not repeated beyond its right ─► its field
            ─► else elective: ignored                                    §5.4.1, §5.4.3, §5.4.5
            ─► else critical: BadOption, which the peer machine answers with 4.02 or, for a NON, a Reset
            ─► Proxy-Uri, Proxy-Scheme: ProxyingNotSupported              §5.10.2, 5.05

Uri-Host and Uri-Port are understood and make no difference: there is one server behind this port. Request-Tag
(RFC 9175) tells apart uploads to one path; it is elective. Numbers are aiocoap's, as plain integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec
from aiocoap.numbers.codes import Code
from aiocoap.numbers.optionnumbers import OptionNumber

from adapters.coap.messages import Options
from adapters.coap.ports import Response

IF_MATCH: Final = int(OptionNumber.IF_MATCH)
URI_HOST: Final = int(OptionNumber.URI_HOST)
ETAG: Final = int(OptionNumber.ETAG)
IF_NONE_MATCH: Final = int(OptionNumber.IF_NONE_MATCH)
OBSERVE: Final = int(OptionNumber.OBSERVE)
URI_PORT: Final = int(OptionNumber.URI_PORT)
LOCATION_PATH: Final = int(OptionNumber.LOCATION_PATH)
URI_PATH: Final = int(OptionNumber.URI_PATH)
CONTENT_FORMAT: Final = int(OptionNumber.CONTENT_FORMAT)
MAX_AGE: Final = int(OptionNumber.MAX_AGE)
URI_QUERY: Final = int(OptionNumber.URI_QUERY)
ACCEPT: Final = int(OptionNumber.ACCEPT)
LOCATION_QUERY: Final = int(OptionNumber.LOCATION_QUERY)
BLOCK2: Final = int(OptionNumber.BLOCK2)
BLOCK1: Final = int(OptionNumber.BLOCK1)
SIZE2: Final = int(OptionNumber.SIZE2)
PROXY_URI: Final = int(OptionNumber.PROXY_URI)
PROXY_SCHEME: Final = int(OptionNumber.PROXY_SCHEME)
SIZE1: Final = int(OptionNumber.SIZE1)
NO_RESPONSE: Final = int(OptionNumber.NO_RESPONSE)
REQUEST_TAG: Final = int(OptionNumber.REQUEST_TAG)

_LENGTHS: Final[
    dict[int, tuple[int, int]]
] = {  # RFC 7252 §5.10; RFC 7641 §2; RFC 7959 §2.1, §4; RFC 7967 §2; RFC 9175 §3.2
    IF_MATCH: (0, 8),
    URI_HOST: (1, 255),
    ETAG: (1, 8),
    IF_NONE_MATCH: (0, 0),
    OBSERVE: (0, 3),
    URI_PORT: (0, 2),
    URI_PATH: (0, 255),
    CONTENT_FORMAT: (0, 2),
    URI_QUERY: (0, 255),
    ACCEPT: (0, 2),
    BLOCK2: (0, 3),
    BLOCK1: (0, 3),
    SIZE2: (0, 4),
    PROXY_URI: (1, 1034),
    PROXY_SCHEME: (1, 255),
    SIZE1: (0, 4),
    NO_RESPONSE: (0, 1),
    REQUEST_TAG: (0, 8),
}
_REPEATABLE: Final = frozenset((IF_MATCH, ETAG, URI_PATH, URI_QUERY, REQUEST_TAG))


class OptionError(Exception):
    """Options that decide the answer by themselves. `code` is that answer; the text may be sent."""

    code: Code = Code.BAD_REQUEST


class BadOption(OptionError):
    """A critical option that is unknown, of illegal length, or too many (4.02)."""

    code = Code.BAD_OPTION


class ProxyingNotSupported(OptionError):
    """We are no proxy (5.05)."""

    code = Code.PROXYING_NOT_SUPPORTED


class BadBlock(OptionError):
    """The reserved size exponent 7 (RFC 7959 §2.2: 4.00)."""

    code = Code.BAD_REQUEST


@dataclass(frozen=True, slots=True)
class Block:
    """A Block1 or Block2 option. `exponent` 0 to 6 stands for 16 to 1024 bytes (RFC 7959 §2.2)."""

    number: int
    more: bool
    exponent: int

    @property
    def size(self) -> int:
        return 16 << self.exponent

    @property
    def start(self) -> int:
        """Where the block begins in the body, in bytes."""
        return self.number << (self.exponent + 4)

    def encode(self) -> bytes:
        return encode_uint(self.number << 4 | self.more << 3 | self.exponent)


class RequestOptions(msgspec.Struct, gc=False):
    """The options of one request. Filled here, read only afterwards."""

    path: tuple[str, ...] = ()
    query: tuple[str, ...] = ()
    content_format: int | None = None
    accept: int | None = None
    if_match: tuple[bytes, ...] = ()
    if_none_match: bool = False
    etags: tuple[bytes, ...] = ()
    observe: int | None = None
    block1: Block | None = None
    block2: Block | None = None
    size1: int | None = None
    size2: int | None = None
    no_response: int = 0
    """Bits of the classes of response that the client does not want: 2, 8, 16 for 2.xx, 4.xx, 5.xx (RFC 7967 §2.1)."""
    request_tag: tuple[bytes, ...] = ()


def read_request(options: Options) -> RequestOptions:
    """The meaning of a request's options. Raises OptionError, which has the answer."""
    read = RequestOptions()
    last = -1
    for number, value in options:
        bounds = _LENGTHS.get(number)
        if bounds is None or not bounds[0] <= len(value) <= bounds[1] or (number == last and number not in _REPEATABLE):
            if number & 1:  # critical, §5.4.6
                raise BadOption(f"option {number}")
            last = number
            continue
        last = number
        if number == URI_PATH:
            read.path += (_text(number, value),)
        elif number == CONTENT_FORMAT:
            read.content_format = int.from_bytes(value, "big")
        elif number == URI_QUERY:
            read.query += (_text(number, value),)
        elif number == ACCEPT:
            read.accept = int.from_bytes(value, "big")
        elif number == OBSERVE:
            read.observe = int.from_bytes(value, "big")
        elif number == BLOCK1:
            read.block1 = _block(value)
        elif number == BLOCK2:
            read.block2 = _block(value)
        elif number == SIZE1:
            read.size1 = int.from_bytes(value, "big")
        elif number == SIZE2:
            read.size2 = int.from_bytes(value, "big")
        elif number == ETAG:
            read.etags += (value,)
        elif number == IF_MATCH:
            read.if_match += (value,)
        elif number == IF_NONE_MATCH:
            read.if_none_match = True
        elif number == NO_RESPONSE:
            read.no_response = int.from_bytes(value, "big")
        elif number == REQUEST_TAG:
            read.request_tag += (value,)
        elif number in (PROXY_URI, PROXY_SCHEME):
            raise ProxyingNotSupported("this is no proxy")
    return read


def response_options(response: Response) -> list[tuple[int, bytes]]:
    """What a response says of itself, in ascending order."""
    options: list[tuple[int, bytes]] = []
    if response.etag is not None:
        options.append((ETAG, response.etag))
    for segment in response.location_path:
        options.append((LOCATION_PATH, segment.encode()))
    if response.content_format is not None:
        options.append((CONTENT_FORMAT, encode_uint(response.content_format)))
    if response.max_age is not None:
        options.append((MAX_AGE, encode_uint(response.max_age)))
    for item in response.location_query:
        options.append((LOCATION_QUERY, item.encode()))
    if response.size1 is not None:
        options.append((SIZE1, encode_uint(response.size1)))
    return options


def encode_uint(value: int) -> bytes:
    """The shortest form (RFC 7252 §3.2): nothing at all for 0."""
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def _text(number: int, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadOption(f"option {number} is no UTF-8") from None


def _block(value: bytes) -> Block:
    number = int.from_bytes(value, "big")
    if number & 7 == 7:
        raise BadBlock("a block size exponent of 7, which is reserved")
    return Block(number >> 4, bool(number & 8), number & 7)
