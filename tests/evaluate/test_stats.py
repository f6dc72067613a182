"""Statistics against closed forms, and what must hold for any data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool.evaluate import stats

VALUES = st.lists(st.floats(-5, 5), min_size=2, max_size=30)


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(400)
    found = stats.mean(values, range(400))
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean()) and found.n == 400
    assert found.low == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.12 * half)


def test_copies_of_a_prompt_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(1).standard_normal(50)
    once = stats.mean(values, range(50))
    copies = stats.mean(np.repeat(values, 8), np.repeat(np.arange(50), 8))
    naive = stats.mean(np.repeat(values, 8), range(400))
    assert (copies.low, copies.high, copies.n) == (pytest.approx(once.low), pytest.approx(once.high), 50)
    assert naive.high - naive.low < 0.5 * (once.high - once.low), "the control: drawn clip by clip it does"


@settings(max_examples=25, deadline=None)
@given(VALUES)
def test_an_interval_holds_its_estimate_and_is_the_same_each_time(values: list[float]) -> None:
    found = stats.mean(values, range(len(values)), resamples=200)
    again = stats.mean(values, range(len(values)), resamples=200)
    assert found == again
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert stats.mean([*values, math.nan], range(len(values) + 1), resamples=200) == found


def test_a_ratio_is_one_of_sums() -> None:
    found = stats.ratio([1.0, 9.0, math.nan, 5.0], [2.0, 3.0, 100.0, math.nan], range(4))
    assert found.value == 2.0 and found.n == 2
    same = stats.ratio([3.0, 1.0, 7.0], [6.0, 2.0, 14.0], range(3))
    assert same.value == same.low == same.high == 0.5, "a share that all prompts have is certain"
    assert stats.ratio([1.0], [0.0], [0]) == stats.NOTHING and stats.mean([], []) == stats.NOTHING


def test_differences_of_the_same_clips_are_paired() -> None:
    rng = np.random.default_rng(2)
    a = rng.standard_normal(60) * 10
    found = stats.paired_difference(a + 0.5, a, range(60))
    assert found.value == pytest.approx(0.5) and found.high - found.low < 1e-9
    shares = stats.share_difference((a + 20.5, np.full(60, 2.0)), (a + 20, np.full(60, 2.0)), range(60))
    assert shares.value == pytest.approx(0.25) and shares.high - shares.low < 1e-9
    apart = stats.independent_difference((a + 0.5, np.ones(60), range(60)), (a, np.ones(60), range(60)))
    assert apart.value == pytest.approx(0.5)
    error = 1.96 * a.std() * math.sqrt(2 / 60)
    assert apart.high - apart.value == pytest.approx(error, rel=0.15)


@pytest.mark.parametrize(("successes", "trials"), [(10, 10), (0, 10), (50, 100), (58, 64), (1, 2)])
def test_wilson_holds_the_shares_that_the_trials_do_not_rule_out(successes: int, trials: int) -> None:
    """Its bounds are the shares p from which the observed one is 1.96 of their own standard errors away."""
    found = stats.wilson(successes, trials)
    for bound in (found.low, found.high):
        error = math.sqrt(bound * (1 - bound) / trials)
        assert abs(found.value - bound) == pytest.approx(1.959964 * error, abs=1e-6)
    assert found.low <= found.value <= found.high and found.low < found.high
    mirrored = stats.wilson(trials - successes, trials)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low))


def test_wilson_refuses_more_successes_than_trials() -> None:
    with pytest.raises(ValueError, match="expected 0 <= successes <= trials"):
        stats.wilson(3, 2)
    assert stats.wilson(0, 0) == stats.NOTHING


def test_quantiles_count_what_never_came() -> None:
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, math.inf, math.inf]
    assert stats.quantile(values, range(10), 0.5).value == 0.5
    assert stats.quantile(values, range(10), 0.8).value == 0.8
    worst = stats.quantile(values, range(10), 0.9)
    assert worst.value == math.inf and worst.high == math.inf
    assert stats.quantile([math.nan, 1.0], [0, 1], 0.5).value == 1.0
    with pytest.raises(ValueError, match="expected a share between 0 and 1"):
        stats.quantile(values, range(10), 1.0)


@settings(max_examples=25, deadline=None)
@given(VALUES, st.floats(0.05, 0.95))
def test_a_quantile_is_the_order_statistic(values: list[float], share: float) -> None:
    found = stats.quantile(values, range(len(values)), share, resamples=100).value
    assert found == float(np.quantile(values, share, method="inverted_cdf"))


def test_kaplan_meier_by_hand() -> None:
    """Six patients: ends at 1, 3, 3, 6; two are lost at 2 and 5."""
    found = stats.kaplan_meier([1, 2, 3, 3, 5, 6], [True, False, True, True, False, True])
    assert found.times == (1, 3, 6)
    assert found.alive == pytest.approx((5 / 6, 5 / 6 * 2 / 4, 0.0))
    assert found.quantile(0.5) == 3 and found.quantile(0.9) == 6
    assert stats.kaplan_meier([4.0, 4.0], [False, False]).quantile(0.5) == math.inf
    with pytest.raises(ValueError, match="no NaN"):
        stats.kaplan_meier([math.nan], [True])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 9).map(float), st.just(math.inf)), min_size=1, max_size=20))
def test_censored_at_one_horizon_is_the_same_as_infinite(delays: list[float]) -> None:
    life = stats.kaplan_meier([min(d, 10.0) for d in delays], [math.isfinite(d) for d in delays])
    for share in (0.5, 0.9):
        assert life.quantile(share) == stats.quantile(delays, range(len(delays)), share, resamples=100).value
