"""PEM: the textual envelope of RFC 7468, read strictly enough that two readers cannot disagree about what is inside.

A PEM text is explanatory lines and blocks. Blocks are `-----BEGIN label-----`, base64 lines, `-----END label-----`.
Explanatory text outside blocks is allowed (RFC 7468 §2; `openssl … -text` writes it) and ignored; inside a block only
base64 is. Every block is returned, in order, so that a caller who wants exactly one can count, and one who must not
receive a private key can say so.

Pure and total: any bytes give blocks or MalformedPem.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

_BOUNDARY = re.compile(r"-----(BEGIN|END) ([A-Z0-9 ]{1,40})-----[ \t]*\r?")
_BLANKS = dict.fromkeys(map(ord, " \t\r\n"))
_LINE = 64  # RFC 7468 §2: generators wrap base64 at 64 characters


class MalformedPem(ValueError):
    """The text is not PEM. The message says why and quotes nothing but labels."""


@dataclass(frozen=True, slots=True)
class PemBlock:
    """One block: its label (`CERTIFICATE`, …) and its decoded contents, which may be secret and are not printed."""

    label: str
    der: bytes

    def __repr__(self) -> str:
        return f"PemBlock({self.label!r}, {len(self.der)} bytes)"

    @property
    def is_private_key(self) -> bool:
        """Whether the label says that these bytes should never have been sent."""
        return self.label.endswith("PRIVATE KEY")


def read_blocks(data: bytes) -> tuple[PemBlock, ...]:
    """All blocks of a PEM text, in order; none for a text without any. The caller caps the size first.

    Raises MalformedPem for text that is not ASCII or UTF-8 without controls, for broken boundaries and base64.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedPem("not a PEM text: neither ASCII nor UTF-8") from None
    if "\x00" in text:
        raise MalformedPem("not a PEM text: it contains a NUL")
    blocks: list[PemBlock] = []
    label: str | None = None
    body: list[str] = []
    for line in text.split("\n"):  # not splitlines(), which knows separators that other readers do not
        boundary = _BOUNDARY.fullmatch(line)
        if boundary is None and ("-----BEGIN" in line or "-----END" in line):
            raise MalformedPem("a PEM boundary that does not stand on a line of its own")
        if boundary is None:
            body.append(line)
            continue
        side, name = boundary.groups()
        if side == "BEGIN" and label is not None:
            raise MalformedPem(f"a block {name!r} begins inside the block {label!r}")
        if side == "END" and label != name:
            raise MalformedPem(f"a block ends as {name!r} where {label!r} was open")
        if side == "END":
            blocks.append(PemBlock(name, _decode("".join(body), name)))
        label = name if side == "BEGIN" else None
        body.clear()
    if label is not None:
        raise MalformedPem(f"the block {label!r} has no end")
    return tuple(blocks)


def write_block(label: str, der: bytes) -> bytes:
    """One PEM block, base64 wrapped at 64 characters."""
    text = base64.b64encode(der)
    lines = [text[at : at + _LINE] for at in range(0, len(text), _LINE)]
    name = label.encode("ascii")
    return b"\n".join((b"-----BEGIN " + name + b"-----", *lines, b"-----END " + name + b"-----", b""))


def decode_base64(text: bytes) -> bytes:
    """Decodes bare base64 with blanks and line breaks, as EST carries requests (RFC 7030 §4, RFC 8951 §3).

    The caller caps the size first. Raises MalformedPem.
    """
    try:
        body = text.decode("ascii")
    except UnicodeDecodeError:
        raise MalformedPem("not base64") from None
    return _decode(body, None)


def _decode(body: str, label: str | None) -> bytes:
    where = f" in the block {label!r}" if label else ""
    packed = body.translate(_BLANKS)
    if ":" in packed or "-" in packed:
        raise MalformedPem(f"headers or a nested boundary{where}; only base64 is allowed")
    try:
        der = base64.b64decode(packed, validate=True)
    except ValueError:  # binascii.Error is one; text beyond ASCII is another
        raise MalformedPem(f"broken base64{where}") from None
    if base64.b64encode(der).decode("ascii") != packed:
        raise MalformedPem(f"base64 that is not the canonical form{where}")
    return der
