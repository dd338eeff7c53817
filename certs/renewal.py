"""When a certificate is due: the window advised for renewing it, and the grace after its end.

    not_before ───────────────── 2/3 of life ─┬─ jitter ─┬──────────── not_after ──── grace ────▶
    NOT_YET │ VALID                           opens      (latest)      │ GRACE: re-enrol only │ EXPIRED

A fleet that is enrolled in one afternoon must not renew in one afternoon: each certificate's window opens at two
thirds of its life plus a random part of the next sixth. A certificate that is not yet valid is never in grace.

Pure functions of dates; `jitter` is a number from 0 to 1 (or made from given random bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Final

from certs.keys import RandomBytes

GRACE: Final = timedelta(days=7)
"""How long an expired certificate may still ask for its successor, by default."""
_OPENS_AFTER = 2 / 3
_SPREAD = 1 / 6
_JITTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class RenewalWindow:
    """Advice for one certificate: renew at `opens_at` or soon after, before `closes_at`."""

    opens_at: datetime
    closes_at: datetime


class ValidityState(Enum):
    """Where a moment lies in the life of a certificate."""

    NOT_YET = "not_yet"
    VALID = "valid"
    GRACE = "grace"
    """Expired, but recently: the certificate may re-enrol and nothing else."""
    EXPIRED = "expired"


def renewal_window(not_before: datetime, not_after: datetime, random: RandomBytes) -> RenewalWindow:
    """The advised window, drawn once for a certificate and then kept with it."""
    jitter = int.from_bytes(random(_JITTER_BYTES), "big") / 2 ** (8 * _JITTER_BYTES)
    return RenewalWindow(_due_at(not_before, not_after, jitter), not_after)


def needs_renewal(not_before: datetime, not_after: datetime, now: datetime, jitter: float = 0.0) -> bool:
    """Whether a certificate is due at `now`. `jitter` from 0 to 1 delays it by up to a sixth of its life."""
    if not 0.0 <= jitter <= 1.0:
        raise ValueError("jitter is a number from 0 to 1")
    return now >= _due_at(not_before, not_after, jitter)


def expired_for(not_after: datetime, now: datetime) -> timedelta:
    """How long ago a certificate ended; zero while it lasts. `not_after` itself is the last valid instant."""
    return max(now - not_after, timedelta())


def validity_state(not_before: datetime, not_after: datetime, now: datetime, grace: timedelta = GRACE) -> ValidityState:
    """Where `now` lies, both ends of the validity included (RFC 5280 §4.1.2.5)."""
    if now < not_before:
        return ValidityState.NOT_YET
    # The encoded end has whole seconds and names the last one that is valid, fractions of it included.
    expired = expired_for(not_after, now.replace(microsecond=0))
    if not expired:
        return ValidityState.VALID
    return ValidityState.GRACE if expired <= grace else ValidityState.EXPIRED


def _due_at(not_before: datetime, not_after: datetime, jitter: float) -> datetime:
    return not_before + (not_after - not_before) * (_OPENS_AFTER + _SPREAD * jitter)
