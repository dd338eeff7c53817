"""Token buckets: how often one key (a tenant, an API key, an address) may do something.

Theory. A bucket holds `burst` tokens and regains `rate_per_s` of them each second; an act takes some, or is refused
when there are not enough. We keep the *debt* (tokens missing from a full bucket) and the time at which that was so;
the debt at a later time follows, so no timer runs and a bucket out of debt need not exist at all.

    debt(t) = max(0, debt - (t - at) * rate)        admitted while debt(t) + cost <= burst

Memory is bounded: at most `max_keys` buckets, the least recently asked-for leaves first. That one has most likely paid
its debt, and then forgetting it is exact. When it has not, more than `max_keys` keys were busy within
`burst / rate_per_s` seconds, which is a flood from many keys, and a fresh full bucket for everyone who was forgotten
would be what such a flood wants. So its debt goes into the *floor*, the largest debt ever forgotten, which is paid off
like any other; a key without a bucket starts with the floor as its debt.

Invariants.
- No key ever gets more than `burst + rate_per_s * t` tokens within any t seconds, forgotten in between or not: whatever
  debt a key is forgotten with, it comes back with at least that much (the floor only rises by eviction and falls at
  the rate at which the key's own debt would have fallen).
- A key that has a bucket does not feel the floor. A newcomer during a flood may begin with less than a full burst, at
  worst with an empty bucket, and is at its full rate from then on: being refused for a moment, never locked out by one
  flooder. Refused newcomers get no bucket, so a flood of refusals evicts nobody.

All of it is O(1), without I/O, and belongs to one event loop. It is lost on restart, which refills every bucket once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, TypeAlias

DEFAULT_MAX_KEYS: Final = 65_536
"""Buckets kept; some 250 bytes each, so about 16 MiB when full."""

_SLACK: Final = 1e-3
"""Tokens by which a bucket may be overdrawn, so that float rounding cannot refuse the retry that we asked for.
It does not add up: the overdraft stays in the debt."""


_Debt: TypeAlias = "tuple[float, float]"
"""Tokens missing from a full bucket, and when that was so (monotonic seconds). A plain tuple: two for each request."""


class RateLimiter:
    """One rule (`rate_per_s` tokens a second, `burst` at once) applied to each key separately."""

    __slots__ = ("_buckets", "_burst", "_floor", "_max_keys", "_now", "_rate")

    def __init__(self, rate_per_s: float, burst: float, max_keys: int = DEFAULT_MAX_KEYS) -> None:
        """`rate_per_s` > 0 tokens per second, `burst` >= 1 tokens, `max_keys` >= 1; ValueError otherwise."""
        if not 0 < rate_per_s < float("inf"):
            raise ValueError(f"rate_per_s is {rate_per_s}, must be positive and finite")
        if not 1 <= burst < float("inf"):
            raise ValueError(f"burst is {burst}, must be at least 1 and finite")
        if max_keys < 1:
            raise ValueError(f"max_keys is {max_keys}, must be at least 1")
        self._rate = rate_per_s
        self._burst = burst
        self._max_keys = max_keys
        self._buckets: OrderedDict[Hashable, _Debt] = OrderedDict()
        self._floor: _Debt = 0.0, float("-inf")
        self._now = float("-inf")

    def take(self, key: Hashable, now: float, cost: float = 1.0) -> float | None:
        """Take `cost` tokens for `key`: None when admitted, else the seconds until a retry is worth it (> 0).

        `now` is in seconds of a monotonic clock; a `now` before an earlier one counts as that one. `cost` is more than
        0 and at most `burst`, or no wait would ever be long enough: ValueError. A refusal takes nothing.
        """
        if not 0 < cost <= self._burst:
            raise ValueError(f"cost is {cost}, must be more than 0 and at most the burst of {self._burst}")
        if now < self._now:
            now = self._now
        self._now = now
        buckets = self._buckets
        known = buckets.get(key)
        if known is None:
            debt = self._remaining(self._floor, now)
        else:
            tokens, at = known
            debt = tokens - (now - at) * self._rate
            if debt < 0.0:
                debt = 0.0
            buckets.move_to_end(key)
        excess = debt + cost - self._burst
        if excess > _SLACK:
            return excess / self._rate
        buckets[key] = debt + cost, now
        if len(buckets) > self._max_keys:
            self._forget_oldest(now)
        return None

    def wait(self, key: Hashable, now: float) -> float | None:
        """What `take` would answer for one token; nothing is taken."""
        known = self._buckets.get(key)
        excess = self._remaining(self._floor if known is None else known, max(now, self._now)) + 1.0 - self._burst
        return excess / self._rate if excess > _SLACK else None

    def give_back(self, key: Hashable, cost: float = 1.0) -> None:
        """Undo a `take` that was just admitted, because the act was refused for another reason."""
        known = self._buckets.get(key)
        if known is not None:
            tokens, at = known
            self._buckets[key] = max(0.0, tokens - cost), at

    def __len__(self) -> int:
        """How many keys have a bucket now."""
        return len(self._buckets)

    def _remaining(self, debt: _Debt, now: float) -> float:
        tokens, at = debt
        left = tokens - (now - at) * self._rate if tokens else 0.0  # at may be minus infinity then
        return left if left > 0.0 else 0.0

    def _forget_oldest(self, now: float) -> None:
        _, forgotten = self._buckets.popitem(last=False)
        owed = max(self._remaining(forgotten, now), self._remaining(self._floor, now))
        self._floor = owed, now
