"""Check of the exercise "a quantile from buckets" (notebook 11), by the rules of Prometheus'
histogram_quantile."""

import math
import random
from collections.abc import Callable, Mapping

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge
from flserving.lab.measuring import slo

Quantile = Callable[[float, Mapping[float, float]], float]
_BUCKETS = {0.01: 10.0, 0.02: 40.0, 0.05: 90.0, 0.1: 96.0, math.inf: 100.0}


def check_quantile(quantile: Quantile) -> None:
    """Check ``quantile(q, buckets)``; ``buckets`` maps the upper bounds, the last infinite, to
    cumulative counts.

    Right is what Prometheus answers: linear in the bucket that holds the rank ``q * count``, from 0
    in the first one; the largest finite bound for a rank in the last one; NaN without requests.

    Raises:
        AssertionError: Says which rule was broken, and what somebody would read off the dashboard.
    """
    judge(
        "quantile",
        quantile,
        Part(
            "goes along the line inside a bucket",
            _inside,
            (
                "rank = q * counts[-1]; the bucket is the first one whose count reaches it.",
                "The bucket's own count is its cumulative count less that of the bucket before.",
                "low + (high - low) * (rank - below) / (count - below)",
            ),
        ),
        Part(
            "begins the first bucket at 0",
            _first,
            ("The first bucket has none before it: low = 0 and below = 0.",),
        ),
        Part(
            "does not guess beyond the last bound",
            _beyond,
            ("If the bucket found is the last one, return bounds[-2].",),
        ),
        Part(
            "bears any order, and no requests",
            _odd,
            ("bounds = sorted(buckets) are numbers in order.", "Without requests return math.nan."),
        ),
    )


def _ask(quantile: Quantile, q: float, buckets: Mapping[float, float]) -> float:
    got = ask(f"quantile({q}, {_told(buckets)})", quantile, q, dict(buckets))
    number = isinstance(got, int | float)
    assert number, (
        f"quantile({q}, {_told(buckets)}) returned {got!r:.60}: return a number of seconds"
    )
    return float(got)


def _told(buckets: Mapping[float, float]) -> str:
    return "{" + ", ".join(f"{bound:g}: {count:g}" for bound, count in buckets.items()) + "}"


def _inside(quantile: Quantile) -> None:
    got = _ask(quantile, 0.8, _BUCKETS)
    told = f"quantile(0.8, {_told(_BUCKETS)}) is {got:.5g}, not 0.044"
    for wrong, why in (
        (0.05, "that is the upper end of the bucket: a p80 just above 20 ms would look like 50 ms"),
        (0.02, "that is the lower end of the bucket"),
        (0.035, "that is its middle, wherever the rank lies in it"),
        (
            0.02 + 0.03 * 80 / 90,
            "begin to count at the bucket's lower end: rank less the 40 requests before it",
        ),
        (0.03 * 0.8, "the line begins at the lower end of the bucket, add it"),
        (0.02 + 0.03 * 40 / 90, "divide by the 50 requests of this bucket; counts are cumulative"),
        (0.0008, "q is a share, 0.8, and not a percentage"),
    ):
        assert abs(got - wrong) > 1e-9, f"{told}: {why}"
    assert abs(got - 0.044) < 1e-9, (
        f"{told}: rank 80 is the 40th of 50 in the bucket from 0.02 to 0.05"
    )
    gap = {**_BUCKETS, 0.1: 90.0}
    got = _ask(quantile, 0.9, gap)
    assert abs(got - 0.05) < 1e-9, (
        f"quantile(0.9, {_told(gap)}) is {got:.5g}, not 0.05: rank 90 is reached there, and nobody took 0.05 to 0.1; "
        "take the first bucket whose count is at least the rank"
    )


def _first(quantile: Quantile) -> None:
    got = _ask(quantile, 0.05, _BUCKETS)
    assert abs(got - 0.005) < 1e-9, (
        f"quantile(0.05, {_told(_BUCKETS)}) is {got:.5g}, not 0.005: rank 5 is half of the first bucket, which begins "
        "at 0; in Python bounds[-1] is the last one"
    )


def _beyond(quantile: Quantile) -> None:
    got = _ask(quantile, 0.99, _BUCKETS)
    assert math.isfinite(got), (
        f"quantile(0.99, {_told(_BUCKETS)}) is {got}: nobody knows how long the last 4 requests took; say the largest "
        "finite bound, 0.1, and a dashboard can draw it"
    )
    assert abs(got - 0.1) < 1e-9, (
        f"quantile(0.99, {_told(_BUCKETS)}) is {got:.5g}: say the largest finite bound, 0.1"
    )


def _odd(quantile: Quantile) -> None:
    turned = dict(reversed(_BUCKETS.items()))
    got = _ask(quantile, 0.8, turned)
    assert abs(got - 0.044) < 1e-9, (
        f"with the same buckets in another order it is {got:.5g}: sort the bounds"
    )
    got = _ask(quantile, 0.5, dict.fromkeys(_BUCKETS, 0.0))
    assert math.isnan(got), (
        f"without a request the quantile is {got}: it is not known, NaN; 0 s would look like a very fast server"
    )
    rng = random.Random(11)
    for _ in range(200):
        bounds = [*sorted(rng.sample(range(1, 100), rng.randint(1, 6))), math.inf]
        counts = sorted(rng.randint(0, 50) for _ in bounds)
        buckets = dict(zip(bounds, [*counts[:-1], counts[-1] + 1], strict=True))
        q = rng.randint(1, 99) / 100
        got = _ask(quantile, q, buckets)
        wanted = slo.histogram_quantile(q, buckets)
        assert abs(got - wanted) < 1e-9, (
            f"quantile({q}, {_told(buckets)}) is {got:.5g}, Prometheus says {wanted:.5g}"
        )
