"""`make test`'s own rules: which parts there are, what their exit statuses come to, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.__main__ import NOTHING_COLLECTED, Part, Run, tiers_of, worst

ROOT = Path(__file__).resolve().parents[2]


def test_integration_is_run_beside_each_other_and_then_alone() -> None:
    (unit,), (beside, alone) = tiers_of(["unit", "integration"], ["-q"], 2)
    assert unit.arguments == ("tests/unit", "-n", "2", "--dist", "loadfile", "-q")
    assert beside.arguments[3:9] == ("-m", "not alone", "-n", "3", "--dist", "loadfile")
    assert beside.arguments[-1] == "-q"
    assert alone.arguments[-3:] == ("-m", "alone", "-q")
    assert "-n" not in alone.arguments
    for part in (beside, alone):
        assert part.arguments[:3] == ("tests", "--ignore=tests/unit", "--ignore=tests/bench")


def test_places_are_run_once_as_they_are_named_whatever_the_tiers() -> None:
    arguments = ["-s", "tests/integration/test_kills.py::test_a"]
    ((part,),) = tiers_of(["unit", "integration"], arguments, 2)
    assert list(part.arguments) == arguments


def test_other_tiers_there_are_none() -> None:
    with pytest.raises(ValueError, match="'units' is neither"):
        tiers_of(["units"], [], 2)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([0, 0, 0], 0),
        ([0, 1, 0], 1),
        ([1, 137], 137),
        ([NOTHING_COLLECTED, 0], 0),  # -k names a test of one part
        ([NOTHING_COLLECTED, 1], 1),
        ([NOTHING_COLLECTED, NOTHING_COLLECTED], NOTHING_COLLECTED),  # a name that nobody has
        ([], NOTHING_COLLECTED),
    ],
)
def test_the_exit_status_is_the_worst(statuses: list[int], expected: int) -> None:
    assert worst(statuses) == expected


def gone(pid: int) -> bool:
    """Whether it has ended, or is about to: it may be a zombie that nobody waits for."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


LEAVES_A_PROCESS = """
import os, subprocess, sys

def started():
    command = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(300)"]
    subprocess.Popen(command, stdout=subprocess.PIPE).stdout.readline()

def test_that_does_not_tidy_up():
    started()
"""
ENDS_ITS_WORKER = """
def test_that_ends_its_worker():
    started()
    os._exit(1)  # as pytest-timeout does it
"""


@pytest.mark.parametrize(
    ("tests", "how", "number"), [(LEAVES_A_PROCESS, (), 1), (LEAVES_A_PROCESS + ENDS_ITS_WORKER, ("-n", "1"), 2)]
)
def test_what_a_test_leaves_running_is_killed_and_is_a_failure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tests: str,
    how: tuple[str, ...],
    number: int,
) -> None:
    monkeypatch.setattr("tests.__main__.GRACE", 0.1)
    (tmp_path / "test_one.py").write_text(tests)
    run = Run()
    run.part(Part("one", (str(tmp_path), "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *how)))
    assert run.status == 1
    said = capsys.readouterr().out
    assert "left running" in said
    left = [int(line.split(":")[0]) for line in said.split("left running")[1].splitlines()[1:]]
    assert len(left) == number
    assert all(gone(pid) for pid in left)


def test_a_signal_in_the_moment_in_which_pytest_ends_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    run._child = subprocess.Popen([sys.executable, "-c", ""])
    run._child.wait()
    monkeypatch.setattr(run._child, "poll", lambda: None)  # as it was just before
    run.interrupt(signal.SIGTERM, None)
    assert run.status == 128 + signal.SIGINT


def test_a_signal_while_pytest_is_being_started_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_one.py").write_text("import time\ndef test_that_waits():\n    time.sleep(300)\n")
    run, popen = Run(), subprocess.Popen

    def interrupted(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        child = popen(*arguments, **more)
        run.interrupt(signal.SIGTERM, None)
        return child

    monkeypatch.setattr("tests.__main__.subprocess.Popen", interrupted)
    run.part(Part("one", (str(tmp_path), "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path))))
    assert run.status == 128 + signal.SIGINT


INTERRUPTED = """
import subprocess, sys
def test_that_waits(tmp_path):
    server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    open({started!r}, "w").write(str(server.pid))
    server.wait()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_nothing_running(tmp_path: Path, signum: signal.Signals) -> None:
    """As Ctrl-C does it: the signal goes to the whole process group, SIGTERM to the run alone."""
    started = tmp_path / "started"
    os.mkfifo(started)
    (tmp_path / "test_one.py").write_text(INTERRUPTED.format(started=str(started)))
    place = f"tests/{os.path.relpath(tmp_path, ROOT / 'tests')}"
    command = [sys.executable, "-m", "tests", "unit", "integration", "--", place, "-p", "no:cacheprovider"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        pid = int(started.read_text())
        if signum is signal.SIGINT:
            os.killpg(run.pid, signum)
        else:
            run.send_signal(signum)
        said = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + signal.SIGINT, said
    assert gone(pid)
