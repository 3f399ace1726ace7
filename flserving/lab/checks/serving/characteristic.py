"""Check of the exercise "how long does a version survive?" (notebook 03): Che's characteristic
time."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import numpy as np

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge
from flserving.lab.queueing import theory
from flserving.lab.queueing.arrivals import Floats, Zipf

Solve = Callable[[Floats, int], float]
_MOST_LINES = 30_000  # of the student's code in one call; halving an interval takes some 300


def check_characteristic_time(solve: Solve) -> None:
    """Check ``solve(shares, cache_size)``: the T with sum(1 - exp(-shares T)) = cache_size, in
    requests.

    ``shares`` is float64 [versions], positive, with the sum 1. Right is T to a relative 1e-6, and
    ``math.inf`` where all versions fit.

    Raises:
        AssertionError: Recognises the usual mistakes by the number that they give.
    """
    judge(
        "characteristic-time",
        solve,
        Part(
            "solves the equation",
            partial(_solves, cases=((20, 1.0, 5), (20, 1.0, 1), (50, 0.5, 12))),
            (
                "Write the left sum as a function of T. It grows with T: where it is less than C, T is too small.",
                "Halve an interval: while low and high differ, look at the sum in the middle and keep the half with T.",
                "`middle = (low + high) / 2`; if `(1 - np.exp(-shares * middle)).sum() < cache_size`, then "
                "`low = middle`, else `high = middle`.",
            ),
        ),
        Part(
            "finds a long time, too",
            partial(_solves, cases=((1000, 1.0, 900), (20, 2.0, 19), (1000, 1.5, 990))),
            (
                "Nobody knows beforehand how large T is: look for an upper end before you halve.",
                "Begin with `high = 1.0`, and `high *= 2` while the sum at `high` is less than cache_size.",
            ),
        ),
        Part(
            "knows when everything fits",
            _knows_when_everything_fits,
            (
                "With as many places as versions nothing is evicted: no T is long enough.",
                "First of all: `if cache_size >= len(shares): return math.inf`.",
            ),
        ),
    )


def _solves(solve: Solve, cases: Iterable[tuple[int, float, int]]) -> None:
    """Of so many versions, with this skew, so many fit."""
    for versions, skew, cache_size in cases:
        shares = Zipf(versions, skew).probabilities
        before = shares.copy()
        got, wanted, told = _asked(solve, shares, cache_size)
        assert np.array_equal(shares, before), (
            "the function changed the shares that it was given: they are its caller's"
        )
        if math.isclose(got, wanted, rel_tol=1e-6):
            continue
        for wrong, why in _mistakes(shares, cache_size, wanted):
            assert not math.isclose(got, wrong, rel_tol=1e-6), f"T = {got:.6g} for {told} is {why}"
        assert not math.isclose(got, wanted, rel_tol=1e-2), (
            f"T = {got:.6g} for {told} is near, and {wanted:.6g} is right: the search ends too early; "
            "go on until low and high agree in their first nine digits"
        )
        reached = float(0 - np.expm1(-shares * got).sum())
        raise AssertionError(
            f"T = {got:.4g} for {told}: within so many requests {reached:.2f} different versions are expected, and "
            f"{cache_size} fill the cache: T is too {'small' if reached < cache_size else 'large'}"
        )


def _knows_when_everything_fits(solve: Solve) -> None:
    for cache_size in (20, 25):
        got, _, told = _asked(solve, Zipf(20, 1.0).probabilities, cache_size)
        assert got == math.inf, (
            f"T = {got:.4g} for {told}: all of them fit, none is ever evicted, so T is math.inf; any other number "
            "promises misses that never come"
        )


def _asked(solve: Solve, shares: Floats, cache_size: int) -> tuple[float, float, str]:
    """What the student's function returns, if that is a number and comes in time; what is right;
    what was asked."""
    told = f"{len(shares)} versions and {cache_size} {'place' if cache_size == 1 else 'places'}"
    lines = 0
    file = getattr(getattr(solve, "__code__", None), "co_filename", None)

    def count(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        lines += event == "line"
        assert lines < _MOST_LINES, (
            f"for {told} the search ran {_MOST_LINES:,} lines without an end: what it waits for never comes (is the "
            "sum the number of different versions, which grows to all of them?), or its steps are too small"
        )
        return count if frame.f_code.co_filename == file else None

    before = sys.gettrace()
    sys.settrace(count)
    try:
        got = ask(f"characteristic_time for {told}", solve, shares, cache_size)
    finally:
        sys.settrace(before)
    assert isinstance(got, int | float) and not math.isnan(got), (
        f"characteristic_time returned {got!r} for {told}: it must be a number, T in requests"
    )
    return float(got), theory.characteristic_time(shares, cache_size), told


def _mistakes(shares: Floats, cache_size: int, wanted: float) -> Iterator[tuple[float, str]]:
    """Numbers that a wrong idea gives, and the idea."""
    yield (
        cache_size,
        "the cache size: popular versions come again, so it takes more requests to fill the cache",
    )
    yield (
        theory.lru_hit_rate(shares, cache_size),
        "the hit rate: return T, and the hit rate follows from it",
    )
    yield -wanted, "negative: the exponent is -p T, and T counts requests"
    yield (
        -len(shares) * math.log1p(-cache_size / len(shares)),
        ("what equally popular versions would give: each version has its own share in the sum"),
    )
    yield (
        math.ceil(wanted),
        "a whole number: T is a mean, so the search must not step from request to request",
    )
    for other in {cache_size + 1, max(1, cache_size - 1)} - {cache_size}:
        yield (
            theory.characteristic_time(shares, other),
            f"solved for {other} places: the sum is to be C itself",
        )
