"""Check of the exercise "where does the time go" (notebook 02)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flserving.lab.checks.asking import ask, equal
from flserving.lab.checks.parts import Part, judge
from flserving.lab.queueing.arrivals import Floats

Budget = Callable[[Mapping[str, Floats], float], Mapping[str, Any]]

_BUDGET_MS = 50.0


def check_latency_budget(latency_budget: Budget) -> None:
    """Check ``latency_budget(stages, budget_ms) -> {"p99_ms", "share", "within"}``.

    ``stages`` maps a stage's name to its time in ms per request, float64 [N], the same N requests
    in each. Right is: ``p99_ms`` the 99th percentile of a request's total, ``share`` each stage's
    part of all time spent (a dict that sums to 1), ``within`` the share of the requests whose total
    is at most ``budget_ms``.

    Raises:
        AssertionError: Recognises the usual mistakes by the number that they give.
    """
    judge(
        "latency-budget",
        latency_budget,
        Part(
            "the 99th percentile of the total",
            _p99,
            (
                "A request's total is the sum of its stages: add the arrays first, request by request.",
                "`total_ms = sum(stages.values())` is one array, and `np.percentile(total_ms, 99)` is the number.",
            ),
        ),
        Part(
            "each stage's share of all time",
            _share,
            (
                "All time is the sum of `total_ms`; a stage's part of it is the sum of its own array.",
                "`{name: ms.sum() / total_ms.sum() for name, ms in stages.items()}`.",
            ),
        ),
        Part(
            "the share of requests within the budget",
            _within,
            (
                "A comparison gives an array of booleans; exactly at the budget is inside.",
                "`(total_ms <= budget_ms).mean()`.",
            ),
        ),
    )


def _asked(latency_budget: Budget) -> Mapping[str, Any]:
    got = ask("latency_budget(stages, 50.0)", latency_budget, _stages(), _BUDGET_MS)
    assert isinstance(got, Mapping) and {"p99_ms", "share", "within"} <= got.keys(), (
        f"latency_budget returned {got!r}: return a dict with the keys p99_ms, share and within"
    )
    return got


def _total_ms() -> Floats:
    return np.asarray(np.sum(list(_stages().values()), axis=0), np.float64)


def _stages() -> dict[str, Floats]:
    # Whole milliseconds, so that sums are exact in any order; 1,001 requests, so that the 99th
    # percentile is one of them, interpolated or not. The slow queue and the slow inference hit
    # different requests, as in a real server.
    rng = np.random.default_rng(42)
    queue = rng.integers(0, 12, 1001)
    infer = rng.integers(4, 9, 1001)
    queue[rng.permutation(500)[:30]] += rng.integers(40, 90, 30)
    infer[500 + rng.permutation(500)[:30]] += rng.integers(30, 60, 30)
    infer[-1] += 50 - (queue[-1] + infer[-1] + 2)  # one request exactly at the budget
    stages = {
        "queue": queue,
        "preprocess": np.ones(1001),
        "infer": infer,
        "postprocess": np.ones(1001),
    }
    return {name: np.asarray(times, np.float64) for name, times in stages.items()}


def _p99(latency_budget: Budget) -> None:
    got = _asked(latency_budget)["p99_ms"]
    total_ms = _total_ms()
    times = np.array(list(_stages().values()))  # float64 [stages, N]
    mistakes = {
        "the sum of the stages' own p99: the slow queue and the slow inference are not the same requests; "
        "add the stages per request first, then take the percentile": np.percentile(
            times, 99, axis=1
        ).sum(),
        "the mean: half of the users see worse, and one in a hundred far worse": total_ms.mean(),
        "the maximum: one outlier decides it": total_ms.max(),
        "the median: half of the users see worse": np.median(total_ms),
        "the p99 of single stage times: add the stages per request first": np.percentile(times, 99),
        "the p99 of the slowest stage: a request waits for all of its stages": np.percentile(
            times, 99, axis=1
        ).max(),
        "the 0.99th percentile: np.percentile counts to 100, ask for 99": np.percentile(
            total_ms, 0.99
        ),
    }
    for mistake, value in mistakes.items():
        assert not equal(got, value), f"p99_ms is {float(got):g}, which is {mistake}"
    wanted = np.percentile(total_ms, 99)
    assert equal(got, wanted), (
        f"p99_ms is {got!r}, the 99th percentile of the requests' totals is {wanted:g} ms"
    )


def _share(latency_budget: Budget) -> None:
    got = _asked(latency_budget)["share"]
    stages = _stages()
    total_ms = _total_ms()
    assert isinstance(got, Mapping) and got.keys() == stages.keys(), (
        f"share is {got!r}: it must be a dict with one number per stage, {list(stages)}"
    )
    p99 = {name: np.percentile(times, 99) for name, times in stages.items()}
    mistakes: dict[str, dict[str, Any]] = {
        "milliseconds, not shares: divide by the total time": {
            name: times.mean() for name, times in stages.items()
        },
        "summed milliseconds, not shares: divide by the total time": {
            name: t.sum() for name, t in stages.items()
        },
        "in percent: they must sum to 1": {
            name: 100 * t.sum() / total_ms.sum() for name, t in stages.items()
        },
        "shares of the percentiles: percentiles do not add up to anything that a request ever took": {
            name: value / sum(p99.values()) for name, value in p99.items()
        },
        "the mean of each request's own shares: it counts a 5 ms request as much as a 100 ms one; "
        "divide the summed time of the stage by the summed total": {
            name: (times / total_ms).mean() for name, times in stages.items()
        },
    }
    for mistake, values in mistakes.items():
        assert not all(equal(got[name], values[name]) for name in stages), (
            f"the shares are {mistake}"
        )
    for name, times in stages.items():
        wanted = times.sum() / total_ms.sum()
        assert equal(got[name], wanted), (
            f"the share of {name} is {got[name]!r}, of all time spent it has {wanted:.4f}"
        )


def _within(latency_budget: Budget) -> None:
    got = _asked(latency_budget)["within"]
    total_ms = _total_ms()
    inside = total_ms <= _BUDGET_MS
    assert not equal(got, inside.sum()), (
        f"within is {got}, a number of requests: divide by all {len(total_ms)}"
    )
    assert not equal(got, 1 - inside.mean()), (
        "within is the share of requests OVER the budget: it must be those inside"
    )
    assert not equal(got, (total_ms < _BUDGET_MS).mean()), (
        "within leaves out a request of exactly 50 ms: it is inside"
    )
    assert not equal(got, 100 * inside.mean()), "within is in percent: it must be a share in [0, 1]"
    assert equal(got, inside.mean()), (
        f"within is {got!r}: {inside.mean():.4f} of the requests take at most 50 ms in all"
    )
