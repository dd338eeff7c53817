"""How memory that many peers share is shared: who holds most of it is known at once, and is the one to give way.

    charge(share, extra) ──► its bytes, and all bytes ──► its rank: its bytes in steps of `STEP`
    greediest() ──► one of the highest rank there is, each of them in turn

Whoever takes more than the others thus loses its own, however many datagrams it sends; who takes little loses nothing
before all others have been cut down to as little. Peers within one step of each other count as equal.

Invariants: a share is in exactly the rank that its bytes give, and in none while it holds nothing; `bytes` is the sum
of all that are charged here; no rank above `_highest` has anybody. Both calls take constant time: what is charged at
once is small, so that `_highest` comes down by few steps for each one up. Nothing can race; nothing is lost here, the
owner decides what of a share goes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Generic, TypeVar

STEP: Final = 2_048
"""Bytes of one rank: four remembered requests, or a block. So little that 20,000 peers of the lowest rank cannot fill
64 MiB; so much that most requests, of 400 bytes, move no share."""


class Share:
    """What one peer holds. Only `Shares` writes to it."""

    __slots__ = ("bytes", "rank")

    def __init__(self) -> None:
        self.bytes = 0
        self.rank = 0


S = TypeVar("S", bound=Share)


class Shares(Generic[S]):
    """The shares of all peers in one memory of `limit` bytes. The limit is the owner's to keep."""

    __slots__ = ("_highest", "_ranks", "bytes", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._ranks: dict[int, OrderedDict[S, None]] = {}
        self._highest = 0

    def charge(self, share: S, extra: int) -> None:
        """Add `extra` bytes to a share; negative gives back."""
        self.bytes += extra
        share.bytes += extra
        rank = -(-share.bytes // STEP)
        if rank != share.rank:
            self._move(share, rank)

    def hand_over(self, share: S, other: Shares[S]) -> None:
        """Make a share one of another memory, with all that it holds."""
        held = share.bytes
        self.charge(share, -held)
        other.charge(share, held)

    def greediest(self) -> S | None:
        """One of those who hold most; None when nobody holds anything. Of equals another one each time."""
        if not self._highest:
            return None
        equals = self._ranks[self._highest]
        share = next(iter(equals))
        equals.move_to_end(share)
        return share

    def _move(self, share: S, rank: int) -> None:
        if share.rank:
            equals = self._ranks[share.rank]
            del equals[share]
            if not equals:
                del self._ranks[share.rank]
        share.rank = rank
        if rank:
            self._ranks.setdefault(rank, OrderedDict())[share] = None
            self._highest = max(self._highest, rank)
        while self._highest and self._highest not in self._ranks:
            self._highest -= 1
