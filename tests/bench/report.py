"""The table of one run: lines under headings, each a name, a value, and what to compare it with."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Line(msgspec.Struct, frozen=True):
    """One figure. `value` is in `unit`; `note` says what it is compared with or how it came about."""

    section: str
    name: str
    value: float
    unit: str
    note: str = ""


class Report(msgspec.Struct):
    """One run."""

    context: dict[str, str]
    lines: list[Line]

    def add(self, section: str, name: str, value: float, unit: str, note: str = "") -> None:
        """One more line."""
        self.lines.append(Line(section, name, value, unit, note))

    def json(self) -> str:
        """Everything, for programs."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def show(self, console: Console) -> None:
        """Everything, for people."""
        facts = Table.grid(padding=(0, 2))
        for name, text in self.context.items():
            facts.add_row(Text(name, style="bold"), Text(text))
        console.print(facts)
        console.print()
        table = Table(box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("", style="dim")
        for section in _sections(self.lines):
            table.add_row(Text(f"\n{section}", style="bold"))
            for line in self.lines:
                if line.section == section:
                    table.add_row(f"  {line.name}", f"{_number(line.value)} {line.unit}".rstrip(), Text(line.note))
        console.print(table)


def _sections(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line.section for line in lines))


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
