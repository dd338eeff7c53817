"""The collector's settings are the process's own, so they are tried in another one."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
from edge import garbage

class Node:
    pass

before = Node()
before.me = before
garbage.settle()
frozen = gc.get_freeze_count()
after = Node()
after.me = after
del before, after
print(frozen > 1_000, gc.get_threshold() == garbage.THRESHOLDS, gc.isenabled(), gc.collect() > 0)
"""


def test_what_the_start_made_is_put_aside_and_what_comes_later_is_still_collected() -> None:
    told = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.split() == ["True", "True", "True", "True"], told.stdout + told.stderr
