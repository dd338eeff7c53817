"""What the machines of all peers share: remembered message ids, uploads and answers in blocks, one bound for each.

A peer takes from it, and what it may take is bounded by itself and over all (duplicates.py, blockwise.py). Each of the
three keeps devices and strangers apart; a peer is one or the other, and may become known once. It has no clock:
`expire` is owed by the shell at `next_expiry`, since a silent peer's machine is never called.
"""

from __future__ import annotations

from adapters.coap.blockwise import Snapshots, Uploads
from adapters.coap.duplicates import Duplicates
from adapters.coap.limits import CoapCounters, CoapLimits


class Memory:
    """What all peers share: its bounds are over all of them."""

    __slots__ = ("counters", "duplicates", "limits", "snapshots", "uploads")

    def __init__(self, limits: CoapLimits, counters: CoapCounters) -> None:
        self.limits = limits
        self.counters = counters
        self.duplicates = Duplicates(limits, counters)
        self.uploads = Uploads(limits)
        self.snapshots = Snapshots(limits, counters)

    def expire(self, now: float) -> None:
        """Drop what is too old of every peer, the silent ones included."""
        self.duplicates.expire(now)
        self.uploads.expire(now)
        self.snapshots.expire(now)

    def next_expiry(self) -> float | None:
        """When `expire` has something to do."""
        ends = (self.duplicates.next_expiry(), self.uploads.next_expiry(), self.snapshots.next_expiry())
        return min((end for end in ends if end is not None), default=None)
