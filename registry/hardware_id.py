"""Hardware identifiers and the patterns that restrict them.

Theory. A hardware_id comes from a stranger; a pattern comes from an operator, who may be careless or hostile to the
other tenants of the node. Both are parsed once into a type, and only parsed values meet. Identifiers are printable
ASCII without spaces, so neither can forge a log line, a CSV cell boundary or a second identifier that looks the same.

Matching is RE2's: the time is linear in the identifier (at most 128 characters) whatever the pattern, and program and
matching tables live within `PATTERN_MEMORY`. Where a pattern would need more, either compiling it fails, which is the
operator's clear error, or RE2 leaves its table-driven matcher for a slower one that is still linear. Back-references
and look-around cannot be matched in linear time; RE2 refuses them, and so do we. A pattern must match the whole
identifier: `AA:.*` does not admit `xAA:1`.

Patterns and identifiers are values. `PatternCache` is the only state: compiled patterns by their text, least recently
used first out. It belongs to one event loop; losing an entry costs a compilation and nothing else.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final, NewType

import re2

from registry import secrets
from registry.errors import InvalidArgument

HardwareId = NewType("HardwareId", str)
"""1–128 printable ASCII characters without spaces (CONTRACT §2). Made by `parse_hardware_id` only."""

MAX_HARDWARE_ID: Final = 128
"""Characters. Serial numbers, MACs, IMEIs, UUIDs and URNs of them all stay far below."""

MAX_PATTERN: Final = 256
"""Characters. A pattern names a batch or a make; a list of serial numbers belongs into an import."""

PATTERN_MEMORY: Final = 256 * 1024
"""Bytes for the program and the tables of one pattern. `[0-9A-F]{2}(:[0-9A-F]{2}){5}` needs some 2 KiB."""

MAX_CACHED_PATTERNS: Final = 256
"""Compiled patterns kept by default: at the very worst 64 MiB, in practice well below 1 MiB."""

_SHOWN: Final = 64
"""Characters of a refused text that a message repeats."""

_HARDWARE_ID = re.compile(rf"[\x21-\x7e]{{1,{MAX_HARDWARE_ID}}}")
_PATTERN = re.compile(rf"[\x20-\x7e]{{1,{MAX_PATTERN}}}")


def parse_hardware_id(text: str) -> HardwareId:
    """`text` as a hardware_id, unchanged; InvalidArgument (field `hardware_id`) when it is none."""
    if not text:
        raise InvalidArgument("hardware_id is required", field="hardware_id")
    if _HARDWARE_ID.fullmatch(text) is None:
        raise InvalidArgument(
            f"hardware_id {_shown(text)} is not accepted: "
            f"it takes 1 to {MAX_HARDWARE_ID} printable ASCII characters without spaces",
            field="hardware_id",
        )
    if secrets.holds_one(text):
        raise InvalidArgument("hardware_id is not accepted: it contains a key, which is a secret", field="hardware_id")
    return HardwareId(text)


class HardwareIdPattern:
    """A compiled pattern over hardware_ids. Equal when the texts are equal."""

    __slots__ = ("_compiled", "text")

    text: Final[str]
    """The pattern as the operator wrote it, in RE2's syntax."""

    def __init__(self, text: str) -> None:
        """Compile `text`; InvalidArgument (field `hardware_id_pattern`) when it is no pattern, or one too large."""
        if not text:
            raise _refused(text, "an empty pattern would admit nothing; leave it out to admit every hardware_id")
        if len(text) > MAX_PATTERN:
            raise _refused(text, f"it has {len(text)} characters, {MAX_PATTERN} are allowed")
        if _PATTERN.fullmatch(text) is None:
            raise _refused(text, "it takes printable ASCII only, as hardware_ids do")
        try:
            compiled = re2.compile(text.encode("ascii"), _options())
        except re2.error as error:
            raise _refused(text, f"{_words(error)} (RE2 syntax: no back-references and no look-around)") from None
        self._compiled = compiled
        self.text = text

    def matches(self, hardware_id: HardwareId) -> bool:
        """Whether the whole of `hardware_id` matches. At most a few milliseconds for the worst pattern."""
        return self._compiled.fullmatch(hardware_id.encode("ascii")) is not None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HardwareIdPattern):
            return NotImplemented
        return self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"HardwareIdPattern({self.text!r})"


class PatternCache:
    """Compiled patterns by text, at most `max_patterns` of them, least recently used first out.

    Refusals are not kept: they happen once, when a template is saved.
    """

    __slots__ = ("_max_patterns", "_patterns")

    def __init__(self, max_patterns: int = MAX_CACHED_PATTERNS) -> None:
        if max_patterns < 1:
            raise ValueError(f"max_patterns is {max_patterns}, must be at least 1")
        self._max_patterns = max_patterns
        self._patterns: OrderedDict[str, HardwareIdPattern] = OrderedDict()

    def compile(self, text: str) -> HardwareIdPattern:
        """The pattern `text`, compiled now or before; InvalidArgument as for `HardwareIdPattern`."""
        known = self._patterns.get(text)
        if known is not None:
            self._patterns.move_to_end(text)
            return known
        compiled = HardwareIdPattern(text)
        self._patterns[text] = compiled
        if len(self._patterns) > self._max_patterns:
            self._patterns.popitem(last=False)
        return compiled

    def __len__(self) -> int:
        return len(self._patterns)


def _options() -> re2.Options:
    options = re2.Options()
    options.max_mem = PATTERN_MEMORY
    options.log_errors = False  # RE2 would write the pattern to stderr, past our log
    options.never_capture = True  # the answer is yes or no; groups only cost memory
    options.encoding = re2.Options.Encoding.LATIN1  # ASCII on both sides: bytes are characters
    return options


def _refused(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"hardware_id pattern {_shown(text)} is not accepted: {why}", field="hardware_id_pattern")


def _words(error: re2.error) -> str:
    """RE2's own words, which are short and quote the offending part of the (printable ASCII) pattern."""
    words = error.args[0] if error.args else b"not a pattern"
    return words.decode("ascii", "backslashreplace") if isinstance(words, bytes) else str(words)


def _shown(text: str) -> str:
    """`text` for a message: quoted, every control and non-ASCII character escaped, cut."""
    return ascii(text) if len(text) <= _SHOWN else ascii(text[:_SHOWN]) + "…"
