"""What there is: links in the CoRE Link Format, and the filter of `/.well-known/core` (RFC 6690; RFC 7252 §7).

    </config>;rt="gatehouse.config";ct="50 60";obs,</time>;ct=50

Pure. Attributes stand in a fixed order, so that the same resources are the same bytes and one ETag. A filter names an
attribute and what its value is, or begins with when a `*` ends it (§4.1). `rt`, `if` and `ct` hold several values, of
which one has to fit; a filter for an attribute that a link does not have leaves it out. Of several filters all have to
fit.
A result without links is an answer like any other, and empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

LINK_FORMAT: Final = 40
"""The Content-Format of all this (RFC 7252 §12.3)."""

WELL_KNOWN_CORE: Final = (".well-known", "core")

_PATH_SAFE: Final = "!$&'()*+,;=:@"  # pchar without percent-encoding, RFC 3986 §3.3


@dataclass(frozen=True, slots=True)
class Link:
    """One resource. `resource_types`, `interfaces`: without spaces and quotation marks, as RFC 6690 §3.1 and §3.2 ask.

    `size`: of its representation in bytes, where that is large enough to matter (§3.3).
    """

    path: tuple[str, ...]
    resource_types: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    content_formats: tuple[int, ...] = ()
    size: int | None = None
    title: str | None = None
    observable: bool = False

    def target(self) -> str:
        """The link's URI reference: an absolute path."""
        return "/" + "/".join(quote(segment, safe=_PATH_SAFE) for segment in self.path)

    def attributes(self) -> list[tuple[str, tuple[str, ...]]]:
        """Names and values; an attribute that only is there has none."""
        found: list[tuple[str, tuple[str, ...]]] = []
        if self.resource_types:
            found.append(("rt", self.resource_types))
        if self.interfaces:
            found.append(("if", self.interfaces))
        if self.content_formats:
            found.append(("ct", tuple(str(number) for number in self.content_formats)))
        if self.size is not None:
            found.append(("sz", (str(self.size),)))
        if self.title is not None:
            found.append(("title", (self.title,)))
        if self.observable:
            found.append(("obs", ()))  # RFC 7641 §6
        return found


def link_format(links: Iterable[Link], query: Sequence[str] = ()) -> bytes:
    """The links that fit all filters of `query`, each `name=value`, `name=prefix*` or `name`."""
    return ",".join(_written(link) for link in links if all(_fits(link, item) for item in query)).encode()


def _written(link: Link) -> str:
    parts = [f"<{link.target()}>"]
    for name, values in link.attributes():
        if not values:
            parts.append(name)
        elif name in ("ct", "sz") and len(values) == 1:
            parts.append(f"{name}={values[0]}")
        else:
            text = " ".join(values).replace("\\", "\\\\").replace('"', '\\"')
            parts.append(f'{name}="{text}"')
    return ";".join(parts)


def _fits(link: Link, item: str) -> bool:
    name, has_value, pattern = item.partition("=")
    if name == "href":
        values: tuple[str, ...] | None = (link.target(),)
    else:
        values = dict(link.attributes()).get(name)
    if values is None:
        return False
    if not has_value:
        return True
    if pattern.endswith("*"):
        return any(value.startswith(pattern[:-1]) for value in values)
    return pattern in values
