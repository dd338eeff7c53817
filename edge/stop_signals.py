"""SIGTERM and SIGINT: the first asks to stop, a later one hurries, and one that comes too late changes nothing.

Somebody impatient presses Ctrl-C three times, a service manager may send SIGTERM twice. Between the last line of the
work and the end of the process nobody listens any more, and the default action of either signal would make a stop that
went well look like a crash (an exit code of 130 or -2). So the handlers are not taken away but replaced by "ignore",
with both signals held back meanwhile: there is no moment at which the default action applies.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Listens from `listen` on; `asked` is set by the first signal, `hurry` is called by every later one."""

    def __init__(self, hurry: Callable[[], None]) -> None:
        self.asked = asyncio.Event()
        self._hurry = hurry

    def listen(self) -> None:
        """Take both signals over, in the main thread and its running loop."""
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._came)

    def ignore(self) -> None:
        """What comes from now on must not change the exit code: call it when the work is done."""
        held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for number in STOP_SIGNALS:
                asyncio.get_running_loop().remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def _came(self) -> None:
        if self.asked.is_set():
            self._hurry()
        self.asked.set()
