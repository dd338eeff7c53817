"""How often Python looks for cyclic garbage: as rarely as this server makes any.

What a message takes (its packet, its uplink, the future of its commit) is freed by reference counts; a load of uplinks
leaves no cycle behind. A connection that ends leaves about twenty small objects in cycles (a device's role and what
serves it name each other), its TLS buffers not among them. The collector does not know this: by default it looks after
every 700 objects that are more than before, and finds the ten thousand messages that wait for their commit, again and
again, and behind them every object that the modules made when they were loaded.

So what the start has made is put aside for good (`gc.freeze`): it lives as long as the process, and a full collection
took 95 ms of a core with it, 20 to 70 without. And the collector looks after 30,000 objects instead of 700: some
20 ms for a look under the heaviest load, some MB of garbage between two looks. docs/decisions.md has the figures.
"""

from __future__ import annotations

import gc
from typing import Final

THRESHOLDS: Final = (30_000, 10, 10)
"""Objects more than at the last look before the young are looked at, such looks before the middle-aged are, and of
these before all are (Python asks for a quarter more objects as well)."""


def settle() -> None:
    """The start is over: put aside what it made, and look rarely from now on. For the process that serves only."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
