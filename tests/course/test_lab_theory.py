"""Closed forms and the simulator, each against an oracle that was derived or run independently."""

import itertools
import math

import cachetools
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from budget import examples
from flserving.errors import ConfigError
from flserving.lab.queueing import theory
from flserving.lab.queueing.arrivals import Poisson, Zipf, arrival_times_s
from flserving.lab.queueing.simulate import simulate_batching


def measured_hit_rate(zipf, cache_size, requests=60_000, seed=0):
    """An LRU cache of cachetools, warmed up before counting."""
    cache, hits = cachetools.LRUCache(cache_size), 0
    items = zipf.draw(np.random.default_rng(seed), requests).tolist()
    for number, item in enumerate(items):
        if item in cache:
            hits += number >= requests // 3
            cache[item]  # refresh
        else:
            cache[item] = True
    return hits / (requests - requests // 3)


def exact_hit_rate(shares, cache_size):
    """Sum over all ordered cache contents: King, "Analysis of demand paging algorithms", IFIP
    1971."""
    hit_rate = 0.0
    for content in itertools.permutations(range(len(shares)), cache_size):
        chance, left = 1.0, 1.0
        for item in content:
            chance *= shares[item] / left
            left -= shares[item]
        hit_rate += chance * sum(shares[item] for item in content)
    return hit_rate


# --------------------------------------------------------------------------------------- LRU caches


@pytest.mark.parametrize(
    ("items", "skew", "cache_size"), [(50, 1.1, 5), (200, 0.8, 20), (200, 1.2, 50), (20, 0.0, 7)]
)
def test_che_agrees_with_a_simulated_cache(items, skew, cache_size):
    zipf = Zipf(items, skew)
    assert theory.lru_hit_rate(zipf.probabilities, cache_size) == pytest.approx(
        measured_hit_rate(zipf, cache_size), abs=0.01
    )


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("cache_size", [1, 2, 4])
def test_che_is_within_its_stated_error_of_the_exact_sum(skew, cache_size):
    shares = Zipf(8, skew).probabilities
    assert theory.lru_hit_rate(shares, cache_size) == pytest.approx(
        exact_hit_rate(shares, cache_size), abs=0.03
    )


def test_the_error_shrinks_as_the_cache_grows():
    errors = []
    for items, cache_size in ((20, 2), (200, 20)):
        zipf = Zipf(items, 1.0)
        errors.append(
            abs(
                theory.lru_hit_rate(zipf.probabilities, cache_size)
                - measured_hit_rate(zipf, cache_size)
            )
        )
    assert errors[1] < errors[0]


@given(st.integers(2, 300), st.floats(0, 3), st.data())
def test_che_properties(items, skew, data):
    shares = Zipf(items, skew).probabilities
    size = data.draw(st.integers(1, items - 1))
    per_item = theory.lru_item_hit_rates(shares, size)
    # the definition of the characteristic time
    assert per_item.sum() == pytest.approx(size, rel=1e-6)
    assert (np.diff(per_item) <= 1e-12).all()
    assert theory.lru_hit_rate(shares, size) <= theory.lru_hit_rate(shares, size + 1) + 1e-9
    assert theory.lru_hit_rate(shares, size) >= size / items - 1e-9  # skew can only help


def test_everything_fits():
    assert (
        theory.lru_hit_rate(Zipf(5).probabilities, 5)
        == theory.lru_hit_rate(Zipf(5).probabilities, 9)
        == 1.0
    )
    assert theory.characteristic_time(Zipf(5).probabilities, 5) == math.inf


# ------------------------------------------------------------------------------------------- queues


def simulated_wait_s(rate_per_s, service_s, servers, requests=60_000, seed=0):
    rng = np.random.default_rng(seed)
    arrival_s = arrival_times_s(Poisson(rate_per_s), rng, requests=requests)
    return simulate_batching(
        arrival_s, lambda n: service_s(rng), max_batch_size=1, workers=servers
    ).wait_s[2000:]


def test_mm1_md1_and_mmc_against_simulation():
    def exponential(rng):
        return rng.exponential(0.01)

    assert theory.mg1_wait_s(60, 0.01, 1) == pytest.approx(
        simulated_wait_s(60, exponential, 1).mean(), rel=0.06
    )
    assert theory.md1_wait_s(60, 0.01) == pytest.approx(
        simulated_wait_s(60, lambda _: 0.01, 1).mean(), rel=0.06
    )


def test_mg1_with_any_spread_against_simulation():
    # gamma service times with coefficient of variation 0.5: shape 4
    wait_s = simulated_wait_s(70, lambda rng: rng.gamma(4, 0.01 / 4), 1)
    assert theory.mg1_wait_s(70, 0.01, 0.5) == pytest.approx(wait_s.mean(), rel=0.06)


def test_beyond_capacity_the_wait_is_infinite():
    assert theory.mg1_wait_s(100, 0.01, 1) == theory.md1_wait_s(101, 0.01) == math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: theory.lru_hit_rate(np.array([0.5, 0.4]), 1), "no distribution"),
        (lambda: theory.lru_hit_rate(np.array([1.0, 0.0]), 1), "no distribution"),
        (lambda: theory.lru_hit_rate(np.array([]), 1), "no distribution"),
        (lambda: theory.lru_hit_rate(Zipf(5).probabilities, 0), "cache_size is 0"),
        (lambda: theory.md1_wait_s(-1, 0.1), "rate_per_s is -1"),
        (lambda: theory.mg1_wait_s(1, 0.1, math.nan), "service_cv is nan"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---------------------------------------------------------------------------------------- simulator


def slow_batching(arrival_s, service_s, max_batch_size, workers, policy, max_wait_s):
    """The same policies, ticked through whole milliseconds: (start, members) of each batch."""
    waiting, busy_until, batches, now = [], [0] * workers, [], 0
    pending = list(enumerate(arrival_s))
    while pending or waiting:
        while pending and pending[0][1] <= now:
            waiting.append(pending.pop(0))
        while waiting and any(end <= now for end in busy_until):
            due = (
                policy == "work_conserving"
                or len(waiting) >= max_batch_size
                or now >= waiting[0][1] + max_wait_s
            )
            if not due:
                break
            worker = next(w for w, end in enumerate(busy_until) if end <= now)
            members, waiting = waiting[:max_batch_size], waiting[max_batch_size:]
            busy_until[worker] = now + service_s(len(members))
            batches.append((now, worker, [number for number, _ in members]))
        now += 1
    return batches


@examples(300)
@given(
    arrivals=st.lists(st.integers(0, 60), max_size=40).map(sorted),
    work=st.tuples(st.integers(1, 9), st.integers(0, 3)),
    max_batch_size=st.integers(1, 6),
    workers=st.integers(1, 3),
    policy=st.sampled_from(["work_conserving", "hold_until_full"]),
    max_wait=st.integers(0, 12),
)
def test_simulator_equals_a_clock_that_ticks(
    arrivals, work, max_batch_size, workers, policy, max_wait
):
    def service_s(size):
        return work[0] + work[1] * size

    trace = simulate_batching(
        np.array(arrivals, float), service_s, max_batch_size=max_batch_size, workers=workers, policy=policy,
        max_wait_s=max_wait,
    )  # fmt: skip
    slow = slow_batching(arrivals, service_s, max_batch_size, workers, policy, max_wait)
    fast = [
        (trace.batch_start_s[b], trace.worker[b], np.flatnonzero(trace.batch == b).tolist())
        for b in range(len(trace.worker))
    ]
    assert fast == slow
    assert trace.batch_size.tolist() == [len(members) for _, _, members in slow]
    assert (trace.wait_s >= 0).all()
    assert trace.latency_s - trace.wait_s == pytest.approx(
        [service_s(trace.batch_size[b]) for b in trace.batch]
    )


def test_holding_until_full_costs_the_wait_at_low_load_and_nothing_is_gained():
    arrival_s = np.arange(50) * 1.0
    eager = simulate_batching(arrival_s, lambda n: 0.002, max_batch_size=32)
    holding = simulate_batching(
        arrival_s, lambda n: 0.002, max_batch_size=32, policy="hold_until_full", max_wait_s=0.1
    )
    assert eager.latency_s == pytest.approx(np.full(50, 0.002))
    assert holding.latency_s == pytest.approx(np.full(50, 0.102))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": np.array([2.0, 1.0])}, "ascending"),
        ({"arrival_s": np.array([np.nan])}, "finite"),
        ({"arrival_s": np.zeros((2, 2))}, "one row"),
        ({"max_batch_size": 0}, "max_batch_size 0"),
        ({"workers": 0}, "workers 0"),
        ({"max_wait_s": math.nan}, "max_wait_s nan"),
        ({"policy": "lifo"}, "policy is 'lifo'"),
        ({"service_s": lambda n: -1.0}, r"service_s\(1\) is -1.0"),
    ],
)
def test_simulator_refuses_what_it_cannot_simulate(change, message):
    arguments = {"arrival_s": np.array([0.0, 1.0]), "service_s": lambda n: 0.1} | change
    with pytest.raises(ConfigError, match=message):
        simulate_batching(**arguments)
