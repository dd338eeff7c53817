"""A signal that comes when everything is done must not make a good stop look like a crash."""

import signal
import subprocess
import sys

import pytest

_PROGRAM = """
import asyncio, os, signal, sys
from edge.stop_signals import StopSignals

async def work():
    hurried = asyncio.Event()
    signals = StopSignals(hurried.set)
    signals.listen()
    os.kill(os.getpid(), signal.{name})
    await asyncio.wait_for(signals.asked.wait(), 10)
    os.kill(os.getpid(), signal.{name})
    await asyncio.wait_for(hurried.wait(), 10)
    signals.ignore()
    return 0

code = asyncio.run(work())
os.kill(os.getpid(), signal.{name})
sys.exit(code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_the_second_hurries_and_the_third_changes_nothing(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(name=number.name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
