"""Check of the exercise "find the bottleneck" (notebook 06)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flserving.lab.checks.asking import ask, equal
from flserving.lab.checks.parts import Part, judge
from flserving.lab.queueing.arrivals import Floats

NAMES = ("wire", "queue", "infer", "serialise")


def check_bottleneck(
    bottleneck: Callable[[Floats, Sequence[str], float], Mapping[str, Any]],
) -> None:
    """Check ``bottleneck(marks_s, names, times_faster) -> {"mean_ms", "p99_ms", "worst",
    "speed_up"}``.

    ``marks_s`` float64 [N, S + 1] holds in row i the moments, in seconds, between which the S
    stages ``names`` of request i lie. Right is: ``mean_ms`` each stage's mean in ms, ``p99_ms`` the
    99th percentile of a request's total, ``worst`` the stage with most of the time, ``speed_up``
    the mean total now over that once ``worst`` is ``times_faster``.

    Raises:
        AssertionError: Recognises the usual mistakes by the number that they give.
    """
    judge(
        "bottleneck",
        bottleneck,
        Part(
            "returns the four",
            _four,
            ("A dict with the keys mean_ms, p99_ms, worst and speed_up.",),
        ),
        Part(
            "the mean of each stage",
            lambda solution: _mean(_found(solution)["mean_ms"], np.diff(_marks()) * 1e3, _marks()),
            (
                "A stage lasts from its mark to the next: differences along a row.",
                "`times_ms = np.diff(marks_s, axis=1) * 1e3`, its `.mean(axis=0)`, and a dict of that with names.",
            ),
        ),
        Part(
            "the p99 of a request",
            lambda solution: _p99(_found(solution)["p99_ms"], np.diff(_marks()) * 1e3),
            (
                "First the total of each request, then the percentile.",
                "`np.percentile(times_ms.sum(axis=1), 99)`",
            ),
        ),
        Part(
            "the worst stage",
            lambda solution: _worst(_found(solution)["worst"], np.diff(_marks()) * 1e3),
            ("Most of the time, not the longest single time.", "`names[mean_ms.argmax()]`"),
        ),
        Part(
            "what a faster one gives",
            _gain,
            (
                "You wrote this law above, for one request; here the parts are the mean times.",
                "`1 / ((1 - share) + share / times_faster)`, where share is the worst mean over the sum of all.",
            ),
        ),
    )


def _found(bottleneck: Callable[..., Any], times_faster: float = 4) -> Mapping[str, Any]:
    marks_s = _marks()
    got = ask(
        f"bottleneck(marks_s, names, {times_faster:g})", bottleneck, marks_s, NAMES, times_faster
    )
    assert np.array_equal(marks_s, _marks()), (
        "bottleneck changed the array that it was given: work on a copy"
    )
    wanted = {"mean_ms", "p99_ms", "worst", "speed_up"}
    assert isinstance(got, Mapping) and wanted <= got.keys(), (
        f"bottleneck returned {got!r}: return a dict with the keys mean_ms, p99_ms, worst and speed_up"
    )
    return got


def _four(bottleneck: Callable[..., Any]) -> None:
    _found(bottleneck)


def _gain(bottleneck: Callable[..., Any]) -> None:
    marks_s = _marks()
    _speed_up(_found(bottleneck)["speed_up"], np.diff(marks_s) * 1e3, marks_s, 4)
    again = _found(bottleneck, 1)["speed_up"]
    assert equal(again, 1), f"speed_up is {again!r} for times_faster=1: nothing changed, so 1"


def _marks() -> Floats:
    # Whole milliseconds. 1,001 requests, so that the 99th percentile is one of them, interpolated
    # or not. Inference has most of the time; the queue, seldom entered, has the largest p99; the
    # requests overlap, so the whole run is much shorter than the sum of its requests.
    rng = np.random.default_rng(6)
    wire = rng.integers(3, 8, 1001)
    infer = rng.integers(14, 25, 1001)
    queue = np.zeros(1001, np.int64)
    serialise = rng.integers(1, 4, 1001)
    queue[rng.permutation(1001)[:150]] += rng.integers(20, 90, 150)
    wire[rng.permutation(1001)[:25]] += rng.integers(20, 60, 25)
    arrival = np.sort(rng.integers(0, 5000, 1001)) + 7000
    return (
        np.asarray(np.cumsum([arrival, wire, queue, infer, serialise], axis=0).T, np.float64) / 1e3
    )


def _mean(got: Any, times_ms: Floats, marks_s: Floats) -> None:
    assert isinstance(got, Mapping) and list(got) == list(NAMES), (
        f"mean_ms is {got!r}: it must be a dict with one number per stage, {list(NAMES)}, in this order"
    )
    since_ms = (marks_s[:, 1:] - marks_s[:, :1]) * 1e3
    mistakes: dict[str, Floats] = {
        "in seconds: a second has 1000 ms": times_ms.mean(axis=0) / 1e3,
        "too large by 1000: seconds times 1000 are milliseconds": times_ms.mean(axis=0) * 1e3,
        "times since the arrival: they count every earlier stage again; a stage lasts from its mark to the next": (
            since_ms.mean(axis=0)
        ),
        "readings of the clock: a stage lasts from its mark to the next, take differences": marks_s[
            :, 1:
        ].mean(0)
        * 1e3,
        "negative: a stage lasts from its mark to the next, not the other way round": -times_ms.mean(
            axis=0
        ),
        "medians: they do not add up to anything that a request took; take means": np.median(
            times_ms, axis=0
        ),
        "sums over all requests: divide by their number": times_ms.sum(axis=0),
    }
    for mistake, values in mistakes.items():
        assert not all(equal(got[name], v) for name, v in zip(NAMES, values, strict=True)), (
            f"mean_ms are {mistake}"
        )
    entered = times_ms[:, 1][times_ms[:, 1] > 0].mean()
    assert not equal(got["queue"], entered), (
        f"mean_ms of the queue is {entered:.1f}, the mean of those who waited: who did not wait counts too, with 0 ms"
    )
    for name, wanted in zip(NAMES, times_ms.mean(axis=0), strict=True):
        assert equal(got[name], wanted), (
            f"mean_ms of {name} is {got[name]!r}, its requests spent {wanted:.4f} ms there"
        )


def _p99(got: Any, times_ms: Floats) -> None:
    total_ms = times_ms.sum(axis=1)
    mistakes = {
        "the sum of the stages' own p99, as if they added up: the request that waits is not the one with the slow "
        "wire; add up each request first, then take the percentile": np.percentile(
            times_ms, 99, axis=0
        ).sum(),
        "the mean: half of the users may see worse": total_ms.mean(),
        "the median: half of the users see worse": np.median(total_ms),
        "the maximum: one request of 1001 decides it": total_ms.max(),
        "the p99 without the queue: a user waits there too": np.percentile(
            total_ms - times_ms[:, 1], 99
        ),
        "the p99 of single stage times: add up each request first": np.percentile(times_ms, 99),
        "the 0.99th percentile: np.percentile counts to 100, ask for 99": np.percentile(
            total_ms, 0.99
        ),
        "the mean and 2.33 standard deviations: latencies have no bell curve, use np.percentile": (
            total_ms.mean() + 2.33 * total_ms.std()
        ),
        "in seconds: a second has 1000 ms": np.percentile(total_ms, 99) / 1e3,
    }
    for mistake, value in mistakes.items():
        assert not equal(got, value), f"p99_ms is {float(got):g}, which is {mistake}"
    wanted = np.percentile(total_ms, 99)
    assert equal(got, wanted), (
        f"p99_ms is {got!r}, the 99th percentile of the requests' totals is {wanted:g} ms"
    )


def _worst(got: Any, times_ms: Floats) -> None:
    assert got != "queue", (
        "worst is 'queue': its p99 and its maximum are the largest, but most requests never wait; the stage with most "
        "of the time has the largest mean"
    )
    assert not isinstance(got, int | np.integer), (
        f"worst is {got!r}, a position: return the name, {NAMES[2]!r}"
    )
    wanted = NAMES[int(times_ms.mean(axis=0).argmax())]
    assert got == wanted, f"worst is {got!r}: {wanted!r} has the largest mean"


def _speed_up(got: Any, times_ms: Floats, marks_s: Floats, k: float) -> None:
    total_ms = times_ms.sum(axis=1)
    infer_ms = times_ms[:, 2]
    share = infer_ms.sum() / total_ms.sum()
    of_run = infer_ms.sum() / (np.ptp(marks_s) * 1e3)
    without_queue = infer_ms.sum() / (total_ms - times_ms[:, 1]).sum()
    mistakes = {
        "times_faster itself: only the worst stage gets faster, the others take as long as before": k,
        "the share of the time that is saved: the speed-up is old time over new time": share
        * (1 - 1 / k),
        "new time over old time: turn it round": 1 - share * (1 - 1 / k),
        "that of a worst stage that takes no time at all: it still takes 1/times_faster": 1
        / (1 - share),
        "that of a stage times_faster as slow: its time is divided by times_faster": 1
        / (1 - share + share * k),
        "share times times_faster: the new time is (1 - share) + share / times_faster": share * k,
        "wrong by its total: the queue is part of a request's time": 1
        / (1 - without_queue + without_queue / k),
        "the mean of each request's own speed-up: compare the mean total before with the mean total after": (
            (total_ms / (total_ms - infer_ms * (1 - 1 / k))).mean()
        ),
        "wrong by its total: the length of the run is not the time of its requests, which overlap; a share of it "
        "counts concurrent stages twice": 1 / (1 - of_run + of_run / k),
        "that of the median request: the speed-up here is of the mean": (
            np.median(total_ms) / np.median(total_ms - infer_ms * (1 - 1 / k))
        ),
    }
    for mistake, value in mistakes.items():
        assert not equal(got, value), f"speed_up is {float(got):.3g}, {mistake}"
    wanted = 1 / (1 - share + share / k)
    assert equal(got, wanted), (
        f"speed_up is {got!r}: infer is {share:.4f} of the time, so the new time is 1 - {share:.4f} + {share:.4f} / "
        f"{k} of the old one, and the speed-up {wanted:.4f}"
    )
