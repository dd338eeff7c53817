"""One command line: the options that every command takes, the configuration that they lead to, and how it ends.

Theory. `invocation_of` sums up the options of all levels, `configuration_of` reads the configuration once, `finish`
runs the work. What goes wrong is said in one line: a `UsageProblem` for a word of the command line, a configuration
that cannot be used, or one of the failures of `_expected`; anything else is a bug and shows its traceback. Nothing
heavy is imported before it is needed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from edge.terminal import complain

if TYPE_CHECKING:
    from edge.config import Config

Result = TypeVar("Result")
Word = TypeVar("Word")

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The configuration file; else $GATEHOUSE_CONFIG, ./gatehouse.toml or /etc/gatehouse/gatehouse.toml.",
    ),
]
DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help="What this node keeps; beats the configuration.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
TenantOption = Annotated[str | None, typer.Option("--tenant", metavar="SLUG", help="The tenant, by slug or id.")]


@dataclass(frozen=True, slots=True)
class Invocation:
    """What the options of every command said."""

    config: Path | None = None
    data_dir: Path | None = None
    as_json: bool = False

    def nearer(self, config: Path | None, data_dir: Path | None, as_json: bool) -> Invocation:
        """These options with those that stand nearer to the command over them."""
        return Invocation(config or self.config, data_dir or self.data_dir, as_json or self.as_json)

    def load(self) -> Config:
        """The configuration. Raises ConfigError."""
        from edge.config import load

        return load(self.config, self.data_dir, os.environ)


class UsageProblem(Exception):
    """A word of the command line that cannot be used; exit code 2."""


def command_group(help_text: str) -> typer.Typer:
    """Commands that share their first word."""
    return typer.Typer(help=help_text, no_args_is_help=True, rich_markup_mode=None)


def parse_duration(option: str, text: str) -> timedelta:
    """A number and its unit: 90s, 15m, 1h, 7d. Raises UsageProblem."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if found is None:
        raise UsageProblem(f"{option}: {text[:40]!a} is no duration; a number and s, m, h or d is expected, as in 15m")
    number, unit = found.groups()
    return timedelta(seconds=int(number) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[unit])


def parsed(option: str, parse: Callable[[Word], Result], word: Word) -> Result:
    """What a word of the command line means. Raises UsageProblem."""
    from registry.errors import InvalidArgument

    try:
        return parse(word)
    except InvalidArgument as error:
        raise UsageProblem(f"{option}: {error.message}") from None


def parsed_if_given(option: str, parse: Callable[[str], Result], word: str | None) -> Result | None:
    """The same for a word that may be left out."""
    return None if word is None else parsed(option, parse, word)


def invocation_of(context: typer.Context, config: Path | None, data_dir: Path | None, as_json: bool) -> Invocation:
    """What the options of a command say, over those of its group and of the program."""
    above = context.obj if isinstance(context.obj, Invocation) else Invocation()
    return above.nearer(config, data_dir, as_json)


def configuration_of(given: Invocation) -> Config:
    """Ends the program with exit code 2, naming key and reason, if there is none to be had."""
    from edge.config import ConfigError

    try:
        return given.load()
    except ConfigError as error:
        complain(str(error))
        end(WRONG_USAGE)


def finish(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run `work` to its end on uvloop; an expected failure ends the program with its one line."""
    import asyncio
    import logging

    # A library's warning is not part of a command's answer; `serve` sets its own logging up.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(work())
    except BrokenPipeError:
        raise  # our own standard output; see `run`
    except _expected() as error:
        complain(_message(error))
        end(FAILED)


def _loop_factory() -> Callable[[], Any] | None:
    try:
        import uvloop
    except ImportError:  # no wheel and no compiler for this platform: asyncio's own loop serves as well, slower
        return None
    return uvloop.new_event_loop


def _expected() -> tuple[type[BaseException], ...]:
    """Failures that an operator can understand and mend."""
    import asyncpg

    from edge.postgres import DataDirectoryBusy, PostgresUnavailable
    from edge.wiring import OperatorKeysProblem
    from registry.errors import RegistryError
    from registry.sealing import KeyRingError
    from registry.storage.migrate import MigrationError
    from registry.trust import WrongKeyRing

    problems: list[type[BaseException]] = [
        DataDirectoryBusy,
        PostgresUnavailable,
        OperatorKeysProblem,
        RegistryError,
        KeyRingError,
        MigrationError,
        WrongKeyRing,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        OSError,
        TimeoutError,
    ]
    if "edge.serve" in sys.modules:
        problems.append(sys.modules["edge.serve"].StartError)
    return tuple(problems)


def _message(error: BaseException) -> str:
    import asyncpg

    match error:
        case asyncpg.PostgresError() | asyncpg.InterfaceError():
            return f"database: {error}"
        case TimeoutError():
            return "database: no answer in time"
        case OSError() if error.filename is not None:
            return f"{error.filename}: {error.strerror}"
        case OSError():
            return f"database: cannot be reached: {error.strerror or error}"
        case _:
            return str(error) or type(error).__name__


def end(code: int) -> NoReturn:
    """Leave with this exit code."""
    raise typer.Exit(code)
