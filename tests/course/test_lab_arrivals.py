"""Arrival processes and popularity against the distributions that they claim to have (fixed
seeds)."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flserving.errors import ConfigError
from flserving.lab.queueing.arrivals import Bursty, Poisson, Zipf, arrival_times_s


def gaps(process, count, seed=0):
    return np.array(list(itertools.islice(process.gaps_s(np.random.default_rng(seed)), count)))


def dispersion(times_s, window_s):
    """Variance over mean of the counts per window: 1 for Poisson, more for bursts."""
    counts = np.bincount((times_s / window_s).astype(int))[:-1]
    return counts.var() / counts.mean()


@pytest.mark.parametrize("seed", range(5))
def test_poisson_gaps_are_exponential_and_independent(seed):
    drawn = gaps(Poisson(200), 5000, seed)
    assert stats.kstest(drawn, "expon", args=(0, 1 / 200)).pvalue > 0.01
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 3 / math.sqrt(len(drawn))
    # the test can tell 10 % apart
    assert stats.kstest(drawn, "expon", args=(0, 1 / 220)).pvalue < 1e-3


def test_poisson_counts_have_dispersion_one():
    assert dispersion(gaps(Poisson(50), 40_000).cumsum(), 1.0) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("seed", range(3))
def test_bursty_with_equal_rates_is_poisson(seed):
    assert (
        stats.kstest(gaps(Bursty(80, 80, 0.3, 0.1), 5000, seed), "expon", args=(0, 1 / 80)).pvalue
        > 0.01
    )


@pytest.mark.parametrize("process", [Bursty(20, 300, 0.4, 0.1), Bursty(0, 500, 0.9, 0.1)])
def test_bursty_has_the_stated_rate_and_the_dispersion_of_the_cookbook(process):
    times_s = gaps(process, 150_000).cumsum()
    # index of dispersion of the counts in a window, Fischer and Meier-Hellstern 1993
    leave_quiet, leave_burst = 1 / process.quiet_s, 1 / process.burst_s
    low, high, both = process.quiet_per_s, process.burst_per_s, leave_quiet + leave_burst
    limit = (
        2
        * leave_quiet
        * leave_burst
        * (high - low) ** 2
        / (both**2 * (low * leave_burst + high * leave_quiet))
    )
    window_s = 20 / both
    index = 1 + limit * (1 - (1 - math.exp(-20)) / 20)
    rate_noise, index_noise = math.sqrt(limit / len(times_s)), math.sqrt(2 * window_s / times_s[-1])
    assert len(times_s) / times_s[-1] == pytest.approx(process.rate_per_s, rel=3 * rate_noise)
    assert dispersion(times_s, window_s) == pytest.approx(index, rel=4 * index_noise)
    # far from Poisson, and measured well enough
    assert index > 5 and rate_noise < 0.03 and index_noise < 0.05


def test_on_off_is_silent_when_off():
    drawn = gaps(Bursty(0, 1000, 10.0, 1.0), 20_000)
    assert np.median(drawn) == pytest.approx(math.log(2) / 1001, rel=0.05)
    # half of the silences are longer than 5 s, about one in 1,000 gaps is a silence
    assert (drawn > 1).mean() == pytest.approx(math.exp(-0.1) / 1001, rel=0.4)


def test_first_arrival_of_bursty_starts_in_the_steady_state():
    starts = [gaps(Bursty(0, 1e9, 3.0, 1.0), 1, seed)[0] < 1e-6 for seed in range(800)]
    assert stats.binomtest(sum(starts), 800, 0.25).pvalue > 0.01


@pytest.mark.parametrize("skew", [0, 0.6, 1.0, 1.8])
def test_zipf_draws_follow_the_law(skew):
    zipf = Zipf(30, skew)
    drawn = zipf.draw(np.random.default_rng(1), 30_000)
    counts = np.bincount(drawn, minlength=30)
    law = np.array([1 / (k + 1) ** skew for k in range(30)])
    assert stats.chisquare(counts, 30_000 * law / law.sum()).pvalue > 0.01
    assert drawn.dtype == np.int64
    wrong = np.array([1 / (k + 1) ** (skew + 0.1) for k in range(30)])
    assert stats.chisquare(counts, 30_000 * wrong / wrong.sum()).pvalue < 1e-6


@given(st.integers(1, 2000), st.floats(0, 5), st.integers(0, 2**32 - 1))
def test_zipf_probabilities_and_range(items, skew, seed):
    zipf = Zipf(items, skew)
    share = zipf.probabilities
    assert (
        share.shape == (items,) and share.sum() == pytest.approx(1) and (np.diff(share) <= 0).all()
    )
    drawn = zipf.draw(np.random.default_rng(seed), 50)
    assert drawn.min() >= 0 and drawn.max() < items


def test_arrival_times_end_at_the_first_bound():
    rng = np.random.default_rng
    many = arrival_times_s(Poisson(100), rng(3), requests=500)
    assert len(many) == 500 and (np.diff(many) > 0).all()
    short = arrival_times_s(Poisson(100), rng(3), seconds=2.0)
    assert (short == many[: len(short)]).all() and short[-1] < 2.0 <= many[len(short)]
    assert len(arrival_times_s(Poisson(100), rng(3), requests=7, seconds=2.0)) == 7
    assert len(arrival_times_s(Poisson(0.001), rng(3), seconds=0.001)) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Poisson(0), "rate_per_s is 0: it must be a finite number above 0"),
        (lambda: Poisson(math.nan), "rate_per_s is nan"),
        (lambda: Bursty(-1, 2, 1, 1), "quiet_per_s is -1: it must be a finite number at least 0"),
        (lambda: Bursty(0, 2, math.inf, 1), "quiet_s is inf"),
        (lambda: Bursty(5, 2, 1, 1), "burst_per_s is 2, below quiet_per_s 5: swap"),
        (lambda: Zipf(0), "items is 0"),
        (lambda: Zipf(2.5), "items is 2.5"),
        (lambda: Zipf(3, -1), "skew is -1"),
        (lambda: Zipf(3, math.nan), "skew is nan"),
        (lambda: arrival_times_s(Poisson(1), np.random.default_rng()), "no end"),
        (lambda: arrival_times_s(Poisson(1), np.random.default_rng(), requests=0), "requests is 0"),
        (
            lambda: arrival_times_s(Poisson(1), np.random.default_rng(), requests=True),
            "requests is True",
        ),
        (lambda: arrival_times_s(Poisson(1), np.random.default_rng(), seconds=-1), "seconds is -1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
