"""Token buckets against a simple model, and what forgetting a bucket may cost and may not give."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.rate_limits import RateLimiter

SLACK = 0.01  # tokens; more than rounding, less than anything that matters


class ModelBucket:
    """The textbook: tokens drip in, up to the burst."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst, self.tokens, self.at = rate, burst, burst, 0.0

    def available(self, now: float) -> float:
        self.tokens = min(self.burst, self.tokens + (now - self.at) * self.rate)
        self.at = now
        return self.tokens


rates = st.floats(min_value=0.01, max_value=1000)
bursts = st.floats(min_value=1, max_value=500)
steps = st.lists(
    st.tuples(st.integers(0, 5), st.floats(0, 20), st.floats(0.01, 1)),  # key, seconds since the last, share of burst
    min_size=1,
    max_size=80,
)


def test_a_burst_is_admitted_and_then_the_rate() -> None:
    limiter = RateLimiter(rate_per_s=2, burst=3, max_keys=10)
    assert [limiter.take("k", 100.0) for _ in range(3)] == [None, None, None]
    assert limiter.take("k", 100.0) == pytest.approx(0.5)
    assert limiter.take("k", 100.25) == pytest.approx(0.25)
    assert limiter.take("k", 100.5) is None
    assert limiter.take("k", 100.5) == pytest.approx(0.5)
    assert [limiter.take("k", 200.0) for _ in range(4)] == [None, None, None, pytest.approx(0.5)]


def test_keys_do_not_feel_each_other() -> None:
    limiter = RateLimiter(rate_per_s=1, burst=1, max_keys=10)
    assert limiter.take("one", 0.0) is None
    assert limiter.take("one", 0.0) is not None
    assert limiter.take("other", 0.0) is None


def test_a_refusal_takes_nothing() -> None:
    limiter = RateLimiter(rate_per_s=1, burst=1, max_keys=10)
    assert limiter.take("k", 0.0) is None
    for _ in range(100):
        assert limiter.take("k", 0.5) == pytest.approx(0.5)
    assert limiter.take("k", 1.0) is None


def test_a_costly_act_takes_more() -> None:
    limiter = RateLimiter(rate_per_s=10, burst=100, max_keys=10)
    assert limiter.take("k", 0.0, cost=100) is None
    assert limiter.take("k", 0.0, cost=100) == pytest.approx(10.0)
    assert limiter.take("k", 0.0, cost=1) == pytest.approx(0.1)


def test_a_clock_that_steps_back_gives_nothing_away_and_takes_nothing() -> None:
    limiter = RateLimiter(rate_per_s=1, burst=1, max_keys=10)
    assert limiter.take("k", 100.0) is None
    assert limiter.take("k", 50.0) == pytest.approx(1.0)
    assert limiter.take("other", 50.0) is None
    assert limiter.take("k", 101.0) is None


@settings(max_examples=150)
@given(rates, bursts, steps)
def test_with_room_for_every_key_it_is_the_textbook_bucket(
    rate: float, burst: float, steps: list[tuple[int, float, float]]
) -> None:
    limiter = RateLimiter(rate, burst, max_keys=6)
    model = {key: ModelBucket(rate, burst) for key in range(6)}
    now = 0.0
    for key, elapsed, share in steps:
        now += elapsed
        cost = burst * share
        wait = limiter.take(key, now, cost)
        available = model[key].available(now)
        if wait is None:
            assert available >= cost - SLACK
            model[key].tokens -= cost
        else:
            assert available < cost
            assert wait == pytest.approx((cost - available) / rate, abs=SLACK / rate)


@settings(max_examples=150)
@given(rates, bursts, steps)
def test_the_wait_that_is_asked_for_is_enough(rate: float, burst: float, steps: list[tuple[int, float, float]]) -> None:
    limiter = RateLimiter(rate, burst, max_keys=6)
    now = 1_000_000.0  # a machine that is up for days: float rounding shows
    for key, elapsed, share in steps:
        now += elapsed
        wait = limiter.take(key, now, burst * share)
        if wait is None:
            continue
        assert wait > 0
        now += wait
        assert limiter.take(key, now, burst * share) is None


@settings(max_examples=200)
@given(rates, bursts, st.integers(1, 4), steps)
def test_being_forgotten_never_refills_a_bucket(
    rate: float, burst: float, max_keys: int, steps: list[tuple[int, float, float]]
) -> None:
    limiter = RateLimiter(rate, burst, max_keys)
    model = {key: ModelBucket(rate, burst) for key in range(6)}
    now = 0.0
    for key, elapsed, share in steps:
        now += elapsed / 20
        cost = burst * share
        available = model[key].available(now)
        if limiter.take(key, now, cost) is None:
            assert cost <= available + SLACK
            model[key].tokens -= cost
        assert len(limiter) <= max_keys


def test_a_flooder_who_rotates_keys_to_be_forgotten_comes_back_with_its_debt() -> None:
    limiter = RateLimiter(rate_per_s=1, burst=5, max_keys=3)
    for _ in range(5):
        assert limiter.take("flooder", 0.0) is None
    for other in range(3):
        assert limiter.take(other, 0.0) is None
    assert limiter.take("flooder", 0.0) == pytest.approx(1.0)


def test_a_forgotten_bucket_that_was_full_costs_nobody_anything() -> None:
    limiter = RateLimiter(rate_per_s=1, burst=5, max_keys=3)
    for key in range(1000):
        now = key * 10.0
        assert [limiter.take(key, now) for _ in range(5)] == [None] * 5
    assert len(limiter) == 3


def test_a_newcomer_after_a_flood_is_served_at_the_rate_at_once_and_in_full_when_it_is_over() -> None:
    limiter = RateLimiter(rate_per_s=1, burst=5, max_keys=10)
    for key in range(10):
        for _ in range(5):
            assert limiter.take(("flood", key), 0.0) is None
    assert limiter.take("pusher", 0.0) is None  # a flooder with an empty bucket is forgotten for this one
    assert limiter.take("newcomer", 0.0) == pytest.approx(1.0)
    assert limiter.take("newcomer", 1.0) is None
    assert [limiter.take("late", 5.0) for _ in range(6)] == [None] * 5 + [pytest.approx(1.0)]


def test_a_key_with_a_bucket_does_not_feel_a_flood_of_others() -> None:
    limiter = RateLimiter(rate_per_s=1, burst=5, max_keys=10)
    assert limiter.take("steady", 0.0) is None
    for second in range(1, 50):
        for flooder in range(9):
            limiter.take((second, flooder), float(second), cost=5)
        assert limiter.take("steady", float(second)) is None


def test_the_least_recently_asked_for_is_forgotten_first() -> None:
    limiter = RateLimiter(rate_per_s=1, burst=5, max_keys=2)
    assert limiter.take("steady", 0.0) is None
    assert limiter.take("drained", 0.0, cost=5) is None
    assert limiter.take("steady", 0.0) is None
    assert limiter.take("newcomer", 0.0) is None
    assert limiter.take("next", 0.0) == pytest.approx(1.0), "the drained bucket was forgotten, and its debt was not"


def test_refused_newcomers_evict_nobody() -> None:
    limiter = RateLimiter(rate_per_s=1, burst=1, max_keys=2)
    for key in ("a", "b", "c"):
        assert limiter.take(key, 0.0) is None  # the third pushes the first out; from now on newcomers have to wait
    for number in range(1000):
        assert limiter.take(number, 0.0) is not None
    assert limiter.take("b", 0.5) == pytest.approx(0.5)
    assert limiter.take("c", 0.5) == pytest.approx(0.5)
    assert len(limiter) == 2


def test_endless_new_keys_share_what_the_table_may_give() -> None:
    limiter = RateLimiter(rate_per_s=1, burst=5, max_keys=10)
    admitted = sum(limiter.take(key, key / 1000) is None for key in range(10_000))  # 10 s, 1000 new keys a second
    assert admitted <= 10 * (5 + 1 * 10) + 10


@pytest.mark.parametrize("cost", [0.0, -1.0, 5.1, float("inf"), float("nan")])
def test_a_cost_that_no_wait_can_pay_is_our_mistake(cost: float) -> None:
    with pytest.raises(ValueError, match="cost is"):
        RateLimiter(rate_per_s=1, burst=5, max_keys=1).take("k", 0.0, cost)


@pytest.mark.parametrize(
    ("rate", "burst", "max_keys"),
    [(0, 1, 1), (-1, 1, 1), (float("inf"), 1, 1), (float("nan"), 1, 1), (1, 0.5, 1), (1, float("inf"), 1), (1, 1, 0)],
)
def test_a_limit_without_sense_is_a_mistake(rate: float, burst: float, max_keys: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        RateLimiter(rate, burst, max_keys)
