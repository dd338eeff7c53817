"""A pytest plugin: says at the end which third-party programs were missing, so that a green run does not hide it.

`tests/parts.sh` finds and installs them; `make` hands its answer over in `MISSING_PARTS`, separated by spaces. Tests
that need a program look it up themselves (`shutil.which`) and skip with its name as the reason.
"""

from __future__ import annotations

import os

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was missing, loudly."""
    missing = os.environ.get("MISSING_PARTS", "").split()
    if not missing:
        return
    terminalreporter.section("missing parts", red=True, bold=True)
    for part in missing:
        terminalreporter.line(f"{part}: tests that need it did not run (tests/parts.sh says which)")
