"""Distinguished names (RFC 5280 §4.1.2.4) as plain values, and as text that is safe to show.

Names in requests and foreign certificates are somebody else's text, in any of ASN.1's string types. Reading is
tolerant, since a name decides nothing here; writing escapes controls, invisible characters and separators, and cuts.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from certs import der
from certs.der import Element, MalformedDer, dotted

DistinguishedName: TypeAlias = tuple[tuple[tuple[str, str], ...], ...]
"""The relative names in the order of their encoding, each a tuple of (dotted attribute type, text)."""

COMMON_NAME: Final = "2.5.4.3"
MAXIMUM_TEXT_CHARACTERS: Final = 256

# RFC 4514 §3, and the two that device certificates use beside them.
_SHORT = {
    COMMON_NAME: "CN",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.6": "C",
    "2.5.4.9": "STREET",
    "0.9.2342.19200300.100.1.25": "DC",
    "0.9.2342.19200300.100.1.1": "UID",
    "2.5.4.5": "serialNumber",
    "1.2.840.113549.1.9.1": "emailAddress",
}
_ENCODINGS = {
    der.UTF8_STRING: "utf-8",
    der.PRINTABLE_STRING: "ascii",
    der.IA5_STRING: "ascii",
    0x12: "ascii",  # NumericString
    0x1A: "ascii",  # VisibleString
    0x14: "latin-1",  # TeletexString, as everybody reads it
    0x1E: "utf-16-be",  # BMPString
    0x1C: "utf-32-be",  # UniversalString
}
_SEPARATORS = frozenset(',+"\\<>;=')


def read_name(element: Element) -> DistinguishedName:
    """Reads a Name. Values of types that are no text become `#` and the hex of their encoding (RFC 4514 §2.4).

    Raises MalformedDer for what has not the structure of a Name.
    """
    if element.tag != der.SEQUENCE:
        raise MalformedDer("a name is not a sequence of relative names")
    relatives: list[tuple[tuple[str, str], ...]] = []
    for relative in element.parts:
        if relative.tag != der.SET or not relative.parts:
            raise MalformedDer("a relative name is not a set of attributes")
        relatives.append(tuple(_read_attribute(part) for part in relative.parts))
    return tuple(relatives)


def name_text(name: DistinguishedName) -> str:
    """One printable line in the manner of RFC 4514, most specific first, at most 256 characters."""
    relatives = (
        "+".join(f"{_SHORT.get(kind, kind)}={_escape(text)}" for kind, text in part) for part in reversed(name)
    )
    text = ",".join(relatives)
    return text if len(text) <= MAXIMUM_TEXT_CHARACTERS else f"{text[: MAXIMUM_TEXT_CHARACTERS - 1]}…"


def _read_attribute(attribute: Element) -> tuple[str, str]:
    parts = attribute.parts
    if attribute.tag != der.SEQUENCE or len(parts) != 2 or parts[0].tag != der.OBJECT_IDENTIFIER:
        raise MalformedDer("an attribute of a name is not a type and a value")
    kind, value = parts
    encoding = _ENCODINGS.get(value.tag)
    if encoding is None:
        return dotted(kind), f"#{value.encoding.hex()}"
    try:
        return dotted(kind), value.contents.decode(encoding)
    except UnicodeDecodeError:
        return dotted(kind), f"#{value.encoding.hex()}"


def _escape(text: str) -> str:
    return "".join(_escape_character(character) for character in text[:MAXIMUM_TEXT_CHARACTERS])


def _escape_character(character: str) -> str:
    if character in _SEPARATORS:
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\{octet:02X}" for octet in character.encode("utf-8", "surrogatepass"))
