"""Check of the exercise "an interval that may be looked at" (notebook 10): a thousand looks, and
numbers by hand."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flserving.experiments import statistics
from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Rewards = Mapping[str, tuple[int, float]]
_ALPHA = 0.05
_EFFECT = 0.05
_TESTS = 400
_LOOKS = 60
_OLD = {"anna": (40, 38.0), "ben": (10, 4.0), "carla": (30, 27.0), "dan": (20, 11.0)}
_NEW = {"eve": (50, 20.0), "finn": (25, 20.0), "gina": (25, 5.0)}


def check_always_valid(test_class: Callable[..., Any]) -> None:
    """Check ``test_class(alpha, effect)`` with ``half_width(variance)``, ``mean(rewards)`` and
    ``interval(old, new)``.

    Right is: the normal mixture's half width; the mean of all rewards with the variance of a ratio
    of client sums; the interval around new minus old.

    Raises:
        AssertionError: Says which false alarms, or which losses, the mistake brings.
    """
    judge(
        "always-valid",
        test_class,
        Part(
            "may be looked at as often as one likes",
            _looked_at,
            (
                "The formula above this cell: V (1 + V / tau^2), then the evidence, then the root of both.",
                "tau is self.effect. np.log takes arrays, math.log does not.",
            ),
        ),
        Part(
            "is no wider than it must be",
            _formula,
            (
                "Set ratio = variance / self.effect**2 and compare each factor with the formula.",
                "np.sqrt(variance * (1 + ratio) * (2 * np.log(1 / self.alpha) + np.log(1 + 1 / ratio)))",
            ),
        ),
        Part(
            "counts clients, not requests",
            _by_client,
            (
                "counts, sums = np.array(list(rewards.values()), float).T gives two arrays, one place a client.",
                "residuals = sums - mean * counts: what a client has above or below the mean.",
                "max((residuals**2).sum(), 2) / counts.sum() ** 2 * clients / (clients - 1)",
            ),
        ),
        Part(
            "puts the interval around new minus old",
            _interval,
            (
                "The variance of a difference of two arms is the sum of their variances.",
                "Return gain - half, gain + half, with gain = mean of new - mean of old.",
            ),
        ),
    )


def _made(test_class: Callable[..., Any]) -> Any:
    return ask(f"AlwaysValid(alpha={_ALPHA}, effect={_EFFECT})", test_class, _ALPHA, _EFFECT)


def _half(test: Any, variance: Any) -> Any:
    told = f"half_width of {np.size(variance)} variances"
    got = ask(told, test.half_width, variance)
    assert got is not None, f"{told} returned None: return the number"
    assert np.shape(got) == np.shape(variance), (
        f"{told} has the shape {np.shape(got)}: one for each"
    )
    return got


def _two(got: Any) -> bool:
    return isinstance(got, tuple | list) and len(got) == 2


@functools.cache
def _equals() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Differences of two equal versions and their variances, [tests, looks]."""
    rng = np.random.default_rng(10)
    each = 50
    counts = each * np.arange(1, _LOOKS + 1)
    a, b = (rng.binomial(each, 0.9, (_TESTS, _LOOKS)).cumsum(axis=1) / counts for _ in "ab")
    variance = np.maximum(a * (1 - a) + b * (1 - b), 2 / counts) / counts
    return b - a, variance


def _looked_at(test_class: Callable[..., Any]) -> None:
    gap, variance = _equals()
    half = np.asarray(_half(_made(test_class), variance.copy()), float)
    strange = half[~(np.isfinite(half) & (half > 0))]
    assert not strange.size, (
        f"half_width gives {strange[0]!r} for a variance above 0: it must be a number above 0"
    )
    alarms = (np.abs(gap) > half).any(axis=1).mean()
    alike = np.allclose(half, 1.96 * np.sqrt(variance), rtol=0.01)
    why = " (that is the interval for one look, 1.96 deviations)" if alike else ""
    assert alarms <= _ALPHA + 4 * math.sqrt(_ALPHA / _TESTS), (
        f"of {_TESTS} tests of two EQUAL versions, looked at {_LOOKS} times, {alarms:.0%} found a difference at some "
        f"look, {_ALPHA:.0%} may{why}: a team that peeks would announce winners that are none"
    )


def _formula(test_class: Callable[..., Any]) -> None:
    test = _made(test_class)
    for variance in (7e-3, 4e-4, 1e-5):
        got = float(_half(test, variance))
        wanted = float(statistics.half_width(variance, _ALPHA, _EFFECT))
        ratio = variance / _EFFECT**2
        of_alpha = 2 * math.log(1 / _ALPHA)
        of_tau = math.log1p(1 / ratio)
        evidence = of_alpha + of_tau
        right = (1 + ratio) * evidence
        told = f"half_width({variance:g}) is {got:.5g}, not {wanted:.5g}"
        for wrong, why in {  # of the square over the variance
            1.96**2: "that is the interval for one look",
            right**2 * variance: "take the root",
            4 * right: "half of the interval, not all of it",
            evidence: "the factor 1 + V / tau^2 is missing",
            (1 + variance / _EFFECT) * evidence: "tau is squared in 1 + V / tau^2",
            (1 + 1 / ratio) * evidence: "V and tau^2 are the other way round in 1 + V / tau^2",
            (1 + ratio)
            * (
                of_alpha + math.log1p(ratio)
            ): "the evidence grows as the variance falls, tau^2 / V is in it",
            (1 + ratio) * (of_alpha / 2 + of_tau): "it is 2 ln(1 / alpha)",
            right / math.log(10): "ln is the natural logarithm, np.log",
            (1 + ratio)
            * (evidence + 2 * math.log(2)): "it is ln(1 / alpha), both sides are in it already",
        }.items():
            assert abs(got**2 / variance - wrong) > 1e-6 * wrong, f"{told}: {why}"
        assert abs(got - wanted) < 1e-9, f"{told}: " + (
            "every test would take longer than it must"
            if got > wanted
            else "compare with the formula"
        )


def _by_client(test_class: Callable[..., Any]) -> None:
    counts, sums = np.array(list(_OLD.values())).T
    n = counts.sum()
    k = len(counts)
    mean, variance = statistics.mean_of(_OLD)
    got = ask("mean(rewards)", _made(test_class).mean, dict(_OLD))
    assert _two(got), (
        f"mean(rewards) returned {got!r:.80}: return two numbers, the mean and the variance of that mean"
    )
    assert abs(got[0] - (sums / counts).mean()) > 1e-6, (
        f"the mean is {got[0]:.4f}, each client's own mean with equal weight; the arm's mean is all rewards over all "
        f"requests, {mean:.4f}"
    )
    assert abs(got[0] - mean) < 1e-9, (
        f"the mean is {got[0]:.4f}: {sums.sum():g} of {n:g} rewards are {mean:.4f}"
    )
    plain = ((sums - mean * counts) ** 2).sum() / n**2
    for wrong, why in (
        (
            mean * (1 - mean) / n,
            "that counts requests: 100 answers to 4 clients are not 100 independent trials, and "
            "every second test of equals would find a winner",
        ),
        (plain, "the factor k / (k - 1) is missing: with few clients the interval is too narrow"),
        (math.sqrt(variance), "that is the deviation, its square is the variance"),
        (variance * n, "divide by the square of the number of rewards"),
        (
            ((sums - sums.mean()) ** 2).sum() / n**2 * k / (k - 1),
            "compare a client's sum with mean * its count, not "
            "with the mean sum: a client that asks more has more right answers",
        ),
    ):
        assert abs(got[1] - wrong) > 1e-9, (
            f"the variance of the mean is {got[1]:.3g}, not {variance:.3g}: {why}"
        )
    assert abs(got[1] - variance) < 1e-9, (
        f"the variance of the mean is {got[1]:.3g}, not {variance:.3g}: sum of (sum - mean * count)^2 over n^2, times "
        "k / (k - 1), for k clients with n rewards"
    )
    alike = {f"c-{i}": (5, 5.0) for i in range(6)}
    got = ask("mean(rewards)", _made(test_class).mean, dict(alike))[1]
    assert abs(got - statistics.mean_of(alike)[1]) < 1e-9, (
        f"6 clients were right 5 times of 5 each, and the variance is {got:.3g}: nobody is that certain after 30 "
        "rewards; let the sum of squares be at least 2"
    )


def _interval(test_class: Callable[..., Any]) -> None:
    test = _made(test_class)
    got = ask("interval(old, new)", test.interval, dict(_OLD), dict(_NEW))
    assert _two(got), f"interval(old, new) returned {got!r:.80}: return its two ends, low and high"
    low, high = (float(end) for end in got)
    assert low < high, f"the interval goes from {low:.3f} to {high:.3f}: return the low end first"
    old, old_variance = test.mean(dict(_OLD))
    new, new_variance = test.mean(dict(_NEW))
    middle = (low + high) / 2
    half = (high - low) / 2
    wanted = float(test.half_width(old_variance + new_variance))
    told = f"the old version is right in {old:.0%}, the new in {new:.0%}; the middle of the interval is {middle:+.3f}"
    assert abs(middle - (old - new)) > 1e-6, (
        f"{told}: that is old minus new, and a loss would look like a gain"
    )
    assert abs(middle - (new - old)) < 1e-6, f"{told}: it must be {new - old:+.3f}, new minus old"
    for wrong, why in (
        (
            test.half_width(abs(old_variance - new_variance)),
            "the variances are subtracted, they add",
        ),
        (
            test.half_width(old_variance) + test.half_width(new_variance),
            "that adds two half widths",
        ),
        (
            test.half_width(new_variance),
            "only the new version's variance is in it; the old mean is estimated, too",
        ),
        (wanted / 2, "half_width is half of the interval already"),
        (2 * wanted, "half_width is half of the interval already"),
    ):
        assert abs(half - wrong) > 1e-6, f"half of the interval is {half:.3f}: {why}"
    assert abs(half - wanted) < 1e-6, (
        f"half of the interval is {half:.3f}, not {wanted:.3f}: half_width of the sum of both variances"
    )
