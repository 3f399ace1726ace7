"""What telemetry keeps: histograms of durations, an account of each version; and what batches usually cost. The owner
locks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

STAGES = ("validate", "cache", "queue", "preprocess", "infer", "postprocess", "respond")
"""The way of a request, in order. ``validate`` includes the route and the pin on the model (a cold start shows here),
``queue`` the hand-over to a worker, ``respond`` everything from the end of the execution to the answer object."""

BOUNDS_S = (
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3,
    0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
"""Upper bounds of the exact buckets. 0.05 is the course's target for the 99th percentile: the share of requests within
it is then a quotient of two counters, not an estimate."""

_BOUNDS, _BUCKETS = np.array(BOUNDS_S), len(BOUNDS_S) + 1
_LOWEST_S, _GROWTH = 1e-6, 1.05
_PER_LOG = 1.0 / math.log(_GROWTH)
_LAST = math.ceil(math.log(1e3 / _LOWEST_S) * _PER_LOG)  # about 1,000 s


class Histogram:
    """Durations in log-spaced buckets: a percentile is right to 2.5 % from 1 us to 1,000 s, however many the samples.

    Memory is constant (about 430 counters). Not locked: the owner locks. Source: the idea of HdrHistogram (Gil Tene).
    """

    def __init__(self) -> None:
        self.counts = np.zeros(_LAST + 1, np.int64)
        self.at_most = np.zeros(_BUCKETS, np.int64)  # exact, for Prometheus
        self.count, self.total_s, self.highest_s = 0, 0.0, 0.0

    def percentile_s(self, q: float) -> float:
        """Seconds that a share ``q`` of [0, 1] of the samples does not exceed (nearest rank); NaN if empty."""
        if not self.count:
            return math.nan
        rank = max(1, math.ceil(q * self.count))
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return float(min(_LOWEST_S * _GROWTH ** (bucket + 0.5), self.highest_s))

    def summary_ms(self) -> dict[str, float | None]:
        """``count``, ``mean_ms``, ``p50_ms``, ``p95_ms``, ``p99_ms`` and ``max_ms``. None, which JSON can say, where
        nothing was recorded."""
        if not self.count:
            return {"count": 0, **dict.fromkeys(("mean_ms", "p50_ms", "p95_ms", "p99_ms")), "max_ms": 0.0}
        percentiles = {f"p{q}_ms": self.percentile_s(q / 100) * 1e3 for q in (50, 95, 99)}
        mean = self.total_s / self.count * 1e3
        return {"count": self.count, "mean_ms": mean, **percentiles, "max_ms": self.highest_s * 1e3}


def record(
    histograms: Sequence[Histogram], seconds: NDArray[np.float64], entered: NDArray[np.bool] | None = None
) -> None:
    """Add column i of ``seconds`` [N, k] to histogram i; with ``entered`` [N, k], only where that holds."""
    k = len(histograms)
    columns = np.tile(np.arange(k), len(seconds)) if entered is None else np.nonzero(entered)[1]
    values = seconds.ravel() if entered is None else seconds[entered]
    logs = np.minimum(np.log(np.maximum(values, _LOWEST_S) / _LOWEST_S) * _PER_LOG, _LAST).astype(np.int64)
    counts = np.bincount(columns * (_LAST + 1) + logs, minlength=k * (_LAST + 1)).reshape(k, -1)
    exact = np.searchsorted(_BOUNDS, values)  # side "left": a duration equal to a bound is within it, as in Prometheus
    at_most = np.bincount(columns * _BUCKETS + exact, minlength=k * _BUCKETS).reshape(k, -1)
    sums = at_most.sum(axis=1).tolist(), seconds.sum(axis=0).tolist(), seconds.max(axis=0, initial=0).tolist()
    for i, (histogram, count, total_s, highest_s) in enumerate(zip(histograms, *sums, strict=True)):
        histogram.counts += counts[i]
        histogram.at_most += at_most[i]
        histogram.count, histogram.total_s = histogram.count + count, histogram.total_s + total_s
        histogram.highest_s = max(histogram.highest_s, highest_s)


class Usual(NamedTuple):
    """What batches of one order of size usually are and take."""

    rows: float
    seconds: float
    at_s: float  # when the last one ended


class Costs:
    """What batches usually take, by what they run on and by their size: the figures that admission goes by.

    One running mean for each power of two of rows, and a straight line from one to the next. It falls faster than it
    rises, and one hiccup counts as twice the usual at most: who is refused by a wrong figure is a loss, who is let in
    by one can still be dropped. A figure that nothing confirmed for a while is none, so that an old one refuses nobody
    for ever. The owner locks.
    """

    FRESH_S = 1.0
    RISE, FALL = 0.25, 0.5

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, dict[int, Usual]] = WeakKeyDictionary()
        self._learned = False  # asked at every request: to ask the dictionary costs more

    def add(self, lane: Any, rows: int, seconds: float, now_s: float) -> None:
        """A batch of ``rows`` rows has taken so long, until ``now_s``."""
        figures = self._known.get(lane)
        if figures is None:
            figures = self._known[lane] = {}
            self._learned = True
        size = rows.bit_length()
        before = figures.get(size)
        if before is None or not self._fresh(before, now_s - seconds):
            figures[size] = Usual(rows, seconds, now_s)
            return
        pace = self.FALL if seconds < before.seconds else self.RISE
        seconds = min(seconds, 2 * before.seconds)
        figures[size] = Usual(
            before.rows + pace * (rows - before.rows), before.seconds + pace * (seconds - before.seconds), now_s
        )

    def usual_s(self, lane: Any, rows: int, now_s: float = -math.inf) -> float:
        """Seconds of a usual batch of ``rows`` rows; 0 while unknown at ``now_s`` (not given: however old).

        A size never seen takes as long as the next smaller one, or its part of the next larger one: the least it can.
        """
        figures = self._known.get(lane) if self._learned else None
        if not figures:
            return 0.0
        size = rows.bit_length()
        own = figures.get(size)
        if own is not None and own.rows == rows and self._fresh(own, now_s):
            return own.seconds
        fresh = {size: figure for size, figure in figures.items() if self._fresh(figure, now_s)}
        own = fresh.get(size)
        smaller = fresh[max(sizes)] if (sizes := [other for other in fresh if other < size]) else None
        if own is None:
            if smaller is not None:
                return smaller.seconds
            larger = fresh[min(fresh)] if fresh else Usual(1, 0, now_s)
            return larger.seconds * rows / larger.rows
        if smaller is None:
            return own.seconds
        slope = (own.seconds - smaller.seconds) / (own.rows - smaller.rows)
        return max(smaller.seconds, own.seconds + max(0.0, slope) * (rows - own.rows))

    def _fresh(self, figure: Usual, now_s: float) -> bool:
        return now_s - figure.at_s <= self.FRESH_S + 3 * figure.seconds


class Account:
    """The account of one version."""

    def __init__(self) -> None:
        self.requests = self.rows = self.last_ms = 0
        self.stages = np.zeros((2, len(STAGES) + 1))  # how many entered it, seconds; last, the whole
        self.cache = np.zeros((2, 2))  # hits and misses: how many, seconds
        self.at_most = np.zeros(_BUCKETS, np.int64)
        self.batches: dict[int, NDArray[np.float64]] = {}  # rows -> executions, seconds of their three stages
        self.failures: dict[str, NDArray[np.float64]] = {}  # reason -> how many, seconds

    def add(self, other: "Account") -> None:
        """What ``other`` counted, too."""
        self.requests += other.requests
        self.rows += other.rows
        self.last_ms = max(self.last_ms, other.last_ms)
        self.stages += other.stages
        self.cache += other.cache
        self.at_most += other.at_most
        for size, batch in other.batches.items():
            self.batches[size] = self.batches.get(size, 0) + batch
        for reason, failed in other.failures.items():
            self.failures[reason] = self.failures.get(reason, 0) + failed

    def add_failure(self, reason: str, seconds: float) -> None:
        account = self.failures.setdefault(reason, np.zeros(2))
        account += 1, seconds

    def add_requests(self, rows: int, spent: NDArray[np.float64], last_ms: int) -> None:
        """Answered requests: seconds in each stage and in all [n, stages + 1]; the time of day of the last one."""
        self.requests, self.rows = self.requests + len(spent), self.rows + rows
        self.last_ms = max(self.last_ms, last_ms)
        self.stages += np.count_nonzero(spent, axis=0), spent.sum(axis=0)
        self.at_most += np.bincount(np.searchsorted(_BOUNDS, spent[:, -1]), minlength=_BUCKETS)
        looked_up, ran = spent[:, 1] > 0, spent[:, 4] > 0
        if looked_up.any():
            hits = spent[looked_up & ~ran, 1:3].sum(axis=1)  # a hit may wait for a twin
            misses = spent[looked_up & ran, 1]
            self.cache += (hits.size, misses.size), (hits.sum(), misses.sum())

    def add_runs(self, rows: int, largest: int, runs: int, seconds: NDArray[np.float64]) -> None:
        """Runs of the model over ``rows`` rows each; more than ``largest`` ran in chunks, which share the ``seconds``
        [3] of all runs by their rows."""
        for size, chunks in ((largest, rows // largest), (rows % largest, 1)):
            if size and chunks:
                batch = self.batches.setdefault(size, np.zeros(4))
                batch += runs * chunks, *(seconds * (size * chunks / rows))

    def totals(self) -> dict[str, Any]:
        counts, seconds = self.stages.tolist()
        (hits, misses), (hit_s, miss_s) = self.cache.tolist()
        return {
            "requests": self.requests,
            "rows": self.rows,
            "seconds": seconds[-1],
            "at_most": self.at_most.tolist(),
            "last_inference_ms": self.last_ms,
            "stages": {name: [int(n), s] for name, n, s in zip(STAGES, counts, seconds, strict=False)},
            "cache": {"hit": [int(hits), hit_s], "miss": [int(misses), miss_s]},
            "batches": {
                str(size): [int(batch[0]), *batch[1:].tolist()] for size, batch in sorted(self.batches.items())
            },
        }


def merged(totals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The totals of several servers as one: sums, and the latest of what is ``last_...``."""
    whole: dict[str, Any] = {}
    for key in dict.fromkeys(key for part in totals for key in part):
        values = [part[key] for part in totals if key in part]
        if isinstance(values[0], Mapping):
            whole[key] = merged(values)
        elif isinstance(values[0], list):
            whole[key] = [sum(places) for places in zip(*values, strict=True)]
        else:
            whole[key] = max(values) if key.startswith("last_") else sum(values)
    return whole
