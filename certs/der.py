"""A strict DER reader: every octet of untrusted ASN.1 is looked at before a library sees it.

DER is the one-encoding-per-value subset of BER (X.690 §10, §11). A parser that skips over fields it does not know lets
BER through in them; this one descends into every constructed value, so "BER refused" holds for the whole message:

  definite, shortest lengths · low tag numbers · universal types primitive or constructed as DER says
  BOOLEAN 00 or FF · INTEGER shortest · BIT STRING unused bits zero · NULL empty · OID arcs shortest
  SET OF sorted · strings of the alphabet their type names · no octets left over

It does not look inside OCTET STRINGs: their contents are another message, which the caller reads as one.

Pure and total: any bytes give an Element or MalformedDer. Work is linear in the input, depth is capped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

BOOLEAN: Final = 0x01
INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
NULL: Final = 0x05
OBJECT_IDENTIFIER: Final = 0x06
UTF8_STRING: Final = 0x0C
PRINTABLE_STRING: Final = 0x13
IA5_STRING: Final = 0x16
SEQUENCE: Final = 0x30
SET: Final = 0x31
CONTEXT_0: Final = 0xA0

_CONSTRUCTED = 0x20
_CLASS_MASK = 0xC0
_HIGH_TAG_NUMBER = 0x1F
_MAXIMUM_DEPTH = 16
"""A certification request nests nine deep at most (an otherName in a requested SAN); deeper is an attack on a stack."""
_MAXIMUM_OID_BYTES = 64
"""The longest identifiers in use are below 40 octets."""
_PRINTABLE_ALPHABET = frozenset(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 '()+,-./:=?"
)  # X.680 §41.4


class MalformedDer(ValueError):
    """The bytes are not DER. The message says where and why, and quotes nothing."""


@dataclass(frozen=True, slots=True)
class Element:
    """One value: its tag octet, its whole encoding, its contents, and its parts when it is constructed."""

    tag: int
    encoding: bytes
    contents: bytes
    parts: tuple[Element, ...]


def read_der(data: bytes) -> Element:
    """Reads exactly one DER value, descending into all its constructed parts. Raises MalformedDer, nothing else."""
    element, end = _read(data, 0, len(data), 0)
    if end != len(data):
        raise MalformedDer(f"{len(data) - end} octets after the end of the structure")
    return element


def dotted(identifier: Element) -> str:
    """The dotted form of an OBJECT IDENTIFIER element that `read_der` has passed."""
    arcs: list[int] = []
    value = 0
    for octet in identifier.contents:
        value = value << 7 | octet & 0x7F
        if not octet & 0x80:
            arcs.append(value)
            value = 0
    first = min(arcs[0] // 40, 2)  # X.690 §8.19.4
    return ".".join(str(arc) for arc in (first, arcs[0] - 40 * first, *arcs[1:]))


def require_set_order(parts: tuple[Element, ...]) -> None:
    """Raises MalformedDer unless the members of a SET OF stand in DER's order (X.690 §11.6) and none is repeated.

    `read_der` does this for every plain SET; an implicitly tagged one only its reader knows to be a set.
    """
    # §11.6: ascending, the shorter one padded with zero octets. No encoding is the prefix of another one, so plain
    # comparison is the same thing.
    for before, after in pairwise(parts):
        if before.encoding >= after.encoding:
            raise MalformedDer("a set that is not sorted, or repeats a member")


def _read(data: bytes, start: int, limit: int, depth: int) -> tuple[Element, int]:
    if depth > _MAXIMUM_DEPTH:
        raise MalformedDer(f"nested deeper than {_MAXIMUM_DEPTH}")
    if limit - start < 2:
        raise MalformedDer(f"cut off at octet {start}")
    tag = data[start]
    if tag & _HIGH_TAG_NUMBER == _HIGH_TAG_NUMBER:
        raise MalformedDer(f"a high tag number at octet {start}")
    begin, length = _read_length(data, start + 1, limit)
    end = begin + length
    if end > limit:
        raise MalformedDer(f"the length at octet {start + 1} reaches beyond the end")
    contents = data[begin:end]
    parts: tuple[Element, ...] = ()
    if tag & _CONSTRUCTED:
        parts = _read_parts(data, begin, end, depth + 1)
    _check_contents(tag, contents, parts, start)
    return Element(tag, data[start:end], contents, parts), end


def _read_length(data: bytes, at: int, limit: int) -> tuple[int, int]:
    first = data[at]
    if first < 0x80:
        return at + 1, first
    count = first & 0x7F
    if count == 0:
        raise MalformedDer(f"an indefinite length at octet {at}; DER has definite lengths only")
    if count > 4:
        raise MalformedDer(f"a length of {count} octets at octet {at}")
    if at + 1 + count > limit:
        raise MalformedDer(f"cut off in the length at octet {at}")
    length = int.from_bytes(data[at + 1 : at + 1 + count], "big")
    if length < 0x80 or length.bit_length() <= 8 * (count - 1):
        raise MalformedDer(f"a length at octet {at} that is not the shortest form")
    return at + 1 + count, length


def _read_parts(data: bytes, begin: int, end: int, depth: int) -> tuple[Element, ...]:
    parts: list[Element] = []
    at = begin
    while at < end:
        part, at = _read(data, at, end, depth)
        parts.append(part)
    return tuple(parts)


def _check_contents(tag: int, contents: bytes, parts: tuple[Element, ...], at: int) -> None:
    if tag & _CLASS_MASK:
        return  # context-specific and the like: their meaning is the caller's
    number = tag & ~_CONSTRUCTED
    must_be_constructed = number in (SEQUENCE & ~_CONSTRUCTED, SET & ~_CONSTRUCTED)
    if bool(tag & _CONSTRUCTED) != must_be_constructed:
        raise MalformedDer(f"type {number} at octet {at} is not encoded as DER asks")
    if tag == SET:
        require_set_order(parts)
    rule = _RULES.get(tag)
    if rule is not None and not rule(contents):
        raise MalformedDer(f"the value of type {number} at octet {at} is not encoded as DER asks")
    if number == 0:
        raise MalformedDer(f"an end-of-contents mark at octet {at}")


def _is_boolean(contents: bytes) -> bool:
    return contents in (b"\x00", b"\xff")


def _is_integer(contents: bytes) -> bool:
    if len(contents) < 2:
        return len(contents) == 1
    first_nine_bits = contents[0] << 1 | contents[1] >> 7
    return first_nine_bits not in (0x000, 0x1FF)


def _is_bit_string(contents: bytes) -> bool:
    if not contents or contents[0] > 7:
        return False
    if len(contents) == 1:
        return contents[0] == 0
    return contents[-1] & ((1 << contents[0]) - 1) == 0


def _is_null(contents: bytes) -> bool:
    return contents == b""


def _is_object_identifier(contents: bytes) -> bool:
    if not contents or len(contents) > _MAXIMUM_OID_BYTES or contents[-1] & 0x80:
        return False
    starts = (0, *(index + 1 for index, octet in enumerate(contents[:-1]) if not octet & 0x80))
    return all(contents[start] != 0x80 for start in starts)


def _is_utf8(contents: bytes) -> bool:
    try:
        contents.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_printable(contents: bytes) -> bool:
    return _PRINTABLE_ALPHABET.issuperset(contents)


def _is_ia5(contents: bytes) -> bool:
    return contents.isascii()


_RULES: Final[dict[int, Callable[[bytes], bool]]] = {
    BOOLEAN: _is_boolean,
    INTEGER: _is_integer,
    BIT_STRING: _is_bit_string,
    NULL: _is_null,
    OBJECT_IDENTIFIER: _is_object_identifier,
    UTF8_STRING: _is_utf8,
    PRINTABLE_STRING: _is_printable,
    IA5_STRING: _is_ia5,
}
