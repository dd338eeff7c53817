"""When certificates are due, and how long after their end they still count for something."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certs.renewal import ValidityState, expired_for, needs_renewal, renewal_window, validity_state

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
END = BEGIN + timedelta(days=90)
SECOND = timedelta(seconds=1)


def test_a_certificate_is_due_at_two_thirds_of_its_life() -> None:
    due = BEGIN + timedelta(days=60)
    assert not needs_renewal(BEGIN, END, due - SECOND)
    assert needs_renewal(BEGIN, END, due)
    assert not needs_renewal(BEGIN, END, due, jitter=0.5)
    assert needs_renewal(BEGIN, END, BEGIN + timedelta(days=75), jitter=1.0)


@pytest.mark.parametrize("jitter", [-0.1, 1.1, float("nan")])
def test_jitter_is_a_fraction(jitter: float) -> None:
    with pytest.raises(ValueError, match="jitter"):
        needs_renewal(BEGIN, END, BEGIN, jitter)


@given(st.binary(min_size=4, max_size=4))
@settings(deadline=None)
def test_the_advised_window_lies_in_the_last_third_and_leaves_room(drawn: bytes) -> None:
    window = renewal_window(BEGIN, END, lambda _: drawn)
    assert BEGIN + timedelta(days=60) <= window.opens_at <= BEGIN + timedelta(days=75)
    assert window.closes_at == END


def test_windows_of_a_fleet_are_spread() -> None:
    opens = {renewal_window(BEGIN, END, lambda _, n=n: n.to_bytes(4, "big")).opens_at for n in range(0, 2**32, 2**28)}
    assert len(opens) == 16


@pytest.mark.parametrize(
    ("now", "state"),
    [
        (BEGIN - SECOND, ValidityState.NOT_YET),
        (BEGIN, ValidityState.VALID),
        (END, ValidityState.VALID),
        (END + timedelta(milliseconds=999), ValidityState.VALID),
        (END + SECOND, ValidityState.GRACE),
        (END + timedelta(days=7), ValidityState.GRACE),
        (END + timedelta(days=7) + SECOND, ValidityState.EXPIRED),
    ],
)
def test_the_states_of_a_life(now: datetime, state: ValidityState) -> None:
    assert validity_state(BEGIN, END, now) is state


def test_without_grace_the_end_is_the_end() -> None:
    assert validity_state(BEGIN, END, END + SECOND, grace=timedelta()) is ValidityState.EXPIRED
    assert expired_for(END, END + timedelta(days=3)) == timedelta(days=3)
    assert expired_for(END, BEGIN) == timedelta()
