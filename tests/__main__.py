"""`python -m tests unit integration -- -k revoked`: runs the tests, tier by tier; `make` calls it.

    unit           neither network nor database; a worker for each processor
    integration    everything else, in two parts: one worker more than there are processors, because most of these
                   tests wait for somebody else, each with a PostgreSQL of its own; then, one after the other in one
                   process, the tests marked `alone`, whose verdict needs the machine to itself

A worker is a process that pytest-xdist gives one file of tests after the other.

What follows `--` is pytest's, and goes to every part. If it names places (tests/…), these are run in one process, so
that -s and --pdb work as ever; `-n 0` runs everything in one process.

Invariants
- The exit status is pytest's worst. "Nothing collected" is one only if no part has collected anything.
- Both parts of a tier are run, whatever the first one says (but with -x); a tier that fails is the last one.
- Ctrl-C and SIGTERM let pytest tidy up, and nothing else is begun. Workers whose test would not end are killed by
  execnet after some seconds, and one whose test takes too long ends itself (pytest-timeout): what such a worker has
  started is found by a mark in its environment, and killed. Where no test was interrupted and none failed, something
  left running is a failure, too: a test has not tidied up.
- What tests/parts.sh did not find (`MISSING_PARTS`) is said at the very end: a green run does not hide it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from uuid import uuid4

import psutil

INTEGRATION = ("tests", "--ignore=tests/unit", "--ignore=tests/bench")
INTERRUPTED, NOTHING_COLLECTED = 2, 5
"""Of pytest's exit codes."""
MARK = "TEST_RUN"
"""The variable in the environment of everything that a run starts; servers under test do not inherit GATEHOUSE_…"""
MOST_WORKERS = 6  # each has a PostgreSQL, and a few servers: half a gigabyte
GRACE = 10.0  # seconds for what is ending anyway, once pytest has ended
RED, PLAIN = ("\x1b[31;1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")


@dataclass(frozen=True, slots=True)
class Part:
    """One call of pytest."""

    name: str
    arguments: tuple[str, ...]


def plan(tier: str, arguments: Sequence[str], processors: int) -> tuple[Part, ...]:
    """The parts of a tier. Raises ValueError if there is no such tier."""
    if tier == "unit":
        beside = ("-n", str(min(MOST_WORKERS, processors)), "--dist", "loadfile")
        return (Part("unit", ("tests/unit", *beside, *arguments)),)
    if tier != "integration":
        raise ValueError(f"{tier!r} is neither unit nor integration")
    workers = str(min(MOST_WORKERS, processors + 1))
    beside = ("-m", "not alone", "-n", workers, "--dist", "loadfile", "--no-loadscope-reorder")
    return (
        Part("integration", (*INTEGRATION, *beside, *arguments)),
        Part("integration, alone", (*INTEGRATION, "-m", "alone", *arguments)),
    )


def tiers_of(names: Sequence[str], arguments: Sequence[str], processors: int) -> list[tuple[Part, ...]]:
    """What is to be run, tier by tier. Raises ValueError for an unknown tier."""
    tiers = [plan(name, arguments, processors) for name in names]
    if any(argument.startswith("tests/") for argument in arguments):
        return [(Part("the tests named", tuple(arguments)),)]
    return tiers


def worst(statuses: Sequence[int]) -> int:
    """The exit status of a run whose parts ended with these."""
    collected = [status for status in statuses if status != NOTHING_COLLECTED]
    return max(collected, default=NOTHING_COLLECTED)


class Run:
    """Parts of a run, one after the other."""

    def __init__(self) -> None:
        self._mark = uuid4().hex
        self._child: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.ended: list[tuple[Part, int, float]] = []

    @property
    def status(self) -> int:
        """The exit status of what has ended."""
        if self.stopped:
            return 128 + signal.SIGINT
        return worst([status for _, status, _ in self.ended])

    def part(self, part: Part) -> None:
        """Run it to its end, and what it leaves behind too."""
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", *part.arguments]
        self._child = subprocess.Popen(command, env={**os.environ, MARK: self._mark})
        if self.stopped:  # meanwhile
            self.interrupt(signal.SIGTERM, None)
        status = self._child.wait()
        self.stopped = self.stopped or status == INTERRUPTED
        left = self._sweep()
        if left:
            print(f"{RED}*** left running, killed now:{PLAIN}", *left, sep="\n    ", flush=True)
        if status < 0:
            status = 128 - status
        self.ended.append((part, status or int(bool(left)), time.monotonic() - began))

    def interrupt(self, number: int, _frame: object) -> None:
        """Ctrl-C reaches pytest and its workers without us. SIGTERM comes to us alone, and is theirs as Ctrl-C is."""
        self.stopped = True
        if number == signal.SIGINT or self._child is None or self._child.poll() is not None:
            return
        with suppress(psutil.NoSuchProcess):  # it ends meanwhile
            child = psutil.Process(self._child.pid)
            for process in (child, *child.children()):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGINT)

    def _sweep(self) -> list[str]:
        """Kill what carries our mark and does not end by itself; the command lines."""
        patient_until = time.monotonic() + (0.0 if self.stopped else GRACE)
        while (left := self._marked()) and time.monotonic() < patient_until:
            time.sleep(0.1)
        names = [_command_line(process) for process in left]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=GRACE)
        return names

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(MARK) == self._mark:
                    found.append(process)
            except (psutil.Error, OSError):  # gone, if only to be a zombie, or not ours to look at
                continue
        return found


def _command_line(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"{process.pid}: gone"


def say_what_is_missing() -> None:
    """Name it, loudly."""
    missing = os.environ.get("MISSING_PARTS", "").split()
    if missing:
        print(f"{RED}{' missing parts ':=^120}{PLAIN}")
    for part in missing:
        print(f"{part}: tests that need it did not run (tests/parts.sh says which)")


def main(words: Sequence[str]) -> int:
    """Run the tiers that `words` name; the exit status."""
    separator = words.index("--") if "--" in words else len(words)
    names, arguments = words[:separator], words[separator + 1 :]
    try:
        tiers = tiers_of(names, arguments, os.cpu_count() or 1)
    except ValueError as error:
        print(f"{error}; usage: python -m tests unit|integration … [-- ARGUMENTS OF PYTEST]", file=sys.stderr)
        return 2
    run = Run()
    signal.signal(signal.SIGINT, run.interrupt)
    signal.signal(signal.SIGTERM, run.interrupt)
    first_failure_ends = "-x" in arguments or "--exitfirst" in arguments
    for tier in tiers:
        for part in tier:
            if not run.stopped and not (first_failure_ends and _failed(run)):
                run.part(part)
        if run.stopped or _failed(run):
            break
    for part, status, seconds in run.ended:
        print(f"{part.name}: pytest's exit status {status}, {seconds:.0f} s")
    say_what_is_missing()
    return run.status


def _failed(run: Run) -> bool:
    return run.status not in (0, NOTHING_COLLECTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
