"""What a command shows: tables for people, JSON for programs, one line for an error.

Theory. Names, tags and errors may hold text that a device chose. `plain` makes such a text safe to show: no character
in it can move the cursor, colour the rest, or reverse a line. Tables go through rich with its markup language off, so
that "[red]" in a name is six characters. JSON is ASCII, so that it can hold no control character either.

A terminal gets tables as wide as it is. A pipe or a file gets them unfolded, one row on one line, without colour.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from registry.model import Json

UNFOLDED = 4000
"""Columns of output that is not a terminal: wider than any row."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. What is `whole` (an id, to be copied) stays on its line; the others give way and fold."""

    title: str
    whole: bool = False


def console() -> Console:
    """A rich console on the present standard output that takes no markup and changes no text."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else UNFOLDED
    return Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)


def show_table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
    """A table of `rows`; every cell is made safe."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[cell(value) for value in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, show_edge=False)
    for position, column in enumerate(columns):
        widest = max((len(row[position]) for row in cells), default=0) if column.whole else None
        table.add_column(column.title, no_wrap=column.whole, overflow="fold", min_width=widest)
    for row in cells:
        table.add_row(*(Text(text) for text in row))
    console().print(table)


def show_fields(fields: Iterable[tuple[str, object]]) -> None:
    """One thing: a line for each of its fields."""
    pairs = [(name, cell(value)) for name, value in fields]
    widest = max((len(name) for name, _ in pairs), default=0)
    show_text("\n".join(f"{name:<{widest}}  {value}" for name, value in pairs))


def show_text(text: str) -> None:
    """Lines that are safe already."""
    sys.stdout.write(text + "\n")


def show_json(document: Json) -> None:
    """A JSON document in ASCII: indented on a terminal, on one line elsewhere."""
    sys.stdout.write(json.dumps(document, indent=2 if sys.stdout.isatty() else None) + "\n")


def complain(message: str) -> None:
    """One line on standard error; further lines only where the message has them, as PostgreSQL's last words do."""
    lines = [plain(line) for line in message.strip().splitlines() if line.strip()] or ["failed"]
    sys.stderr.write("gatehouse: " + "\n    ".join(lines) + "\n")


def cell(value: object) -> str:
    """A value as a cell or a line of a list; nothing is a dash."""
    match value:
        case None | "" | []:
            return "-"
        case dict() if not value:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(cell(each) for each in value)
        case dict():
            return ", ".join(f"{plain(str(key))}={_inner(each)}" for key, each in value.items())
        case _:
            return plain(str(value))


def plain(text: str) -> str:
    """`text` on one line, with every character that could do more than be seen written as an escape."""
    from registry.fields import unsafe

    return "".join(_escape(character) if unsafe(character) else character for character in text)


def _inner(value: Any) -> str:
    return plain(value if isinstance(value, str) else json.dumps(value))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
