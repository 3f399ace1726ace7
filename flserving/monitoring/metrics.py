"""What telemetry keeps: histograms of durations, an account of each version, and what batches
usually cost.

Nothing here is locked: the owner locks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Sums = dict[str, Any]
"""Plain numbers by name, some of them nested: sums that several processes can add up."""
STAGES = ("validate", "cache", "queue", "preprocess", "infer", "postprocess", "respond")
"""What a request passes, in order. ``validate`` includes the route and the pin on the model (a cold
start shows here), ``queue`` the hand-over to a worker, ``respond`` everything from the end of the
execution to the answer object."""

BOUNDS_S = (
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3,
    0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
"""Upper bounds of the exact buckets. 0.05 is the course's target for the 99th percentile: the share
of requests within it is then a quotient of two counters, not an estimate."""

_FINE = [1e-6 * 1.05**step for step in range(426)]  # 1 us to 1,000 s
EDGES = np.array(sorted({*BOUNDS_S, *_FINE}))
# where in the fine buckets the exact ones begin
_AT_MOST = [0, *np.searchsorted(EDGES, BOUNDS_S) + 1]


class Histogram:
    """Durations in log-spaced buckets: a percentile is right to 2.5 % from 1 us to 1,000 s, however
    many the samples.

    Memory is constant (about 450 counters). Source: the idea of HdrHistogram (Gil Tene).
    """

    def __init__(self) -> None:
        # at most each edge, but more than the one before; the rest
        self.counts = np.zeros(len(EDGES) + 1, np.int64)
        self.count = 0
        self.total_s = 0.0
        self.highest_s = 0.0

    def add(self, seconds: Floats) -> None:
        """Add durations [n]. One that equals an edge is within it, as in Prometheus."""
        if seconds.size:
            self.counts += np.bincount(np.searchsorted(EDGES, seconds), minlength=len(self.counts))
            self.count += seconds.size
            self.total_s += float(seconds.sum())
            self.highest_s = max(self.highest_s, float(seconds.max()))

    @property
    def at_most(self) -> list[int]:
        """How many took at most each of ``BOUNDS_S`` but more than the one before, then the rest.
        Exact."""
        counts: list[int] = np.add.reduceat(self.counts, _AT_MOST).tolist()
        return counts

    def percentile_s(self, q: float) -> float:
        """Seconds that a share ``q`` of [0, 1] of the samples does not exceed (nearest rank); NaN
        if empty."""
        if not self.count:
            return math.nan
        rank = max(1, math.ceil(q * self.count))
        bucket = np.searchsorted(np.cumsum(self.counts), rank)
        ends = np.clip([bucket - 1, bucket], 0, len(EDGES) - 1)
        below, above = EDGES[ends]
        middle = math.sqrt(below * above)
        return min(middle, self.highest_s)

    def summary_ms(self) -> dict[str, float | None]:
        """``count``, ``mean_ms``, ``p50_ms``, ``p95_ms``, ``p99_ms`` and ``max_ms``. None, which
        JSON can say, where nothing was recorded."""
        summary: dict[str, float | None] = {"count": self.count}
        summary |= dict.fromkeys(("mean_ms", "p50_ms", "p95_ms", "p99_ms"))
        if self.count:
            summary["mean_ms"] = self.total_s / self.count * 1e3
            for q in (50, 95, 99):
                summary[f"p{q}_ms"] = self.percentile_s(q / 100) * 1e3
        summary["max_ms"] = self.highest_s * 1e3
        return summary


class Usual(NamedTuple):
    """What batches of one order of size usually are and take."""

    rows: float
    seconds: float
    at_s: float  # when the last one ended


class Costs:
    """What batches usually take, by what they run on and by their size: the figures that admission
    goes by.

    One running mean for each power of two of rows, and a straight line from one to the next. It
    falls faster than it rises, and one hiccup counts as twice the usual at most: who is refused by
    a wrong figure is a loss, who is let in by one can still be dropped. A figure that nothing
    confirmed for a while is none, so that an old one refuses nobody for ever. The owner locks.
    """

    FRESH_S = 1.0
    RISE = 0.25
    FALL = 0.5

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, dict[int, Usual]] = WeakKeyDictionary()
        self._learned = False  # read at every request: to look into the dictionary costs more

    def add(self, key: Any, rows: int, seconds: float, now_s: float) -> None:
        """A batch of ``rows`` rows has taken so long, until ``now_s``."""
        figures = self._known.get(key)
        if figures is None:
            figures = self._known[key] = {}
            self._learned = True
        size = rows.bit_length()
        before = figures.get(size)
        if before is None or not self._fresh(before, now_s - seconds):
            figures[size] = Usual(rows, seconds, now_s)
            return
        pace = self.FALL if seconds < before.seconds else self.RISE
        seconds = min(seconds, 2 * before.seconds)
        figures[size] = Usual(
            rows=before.rows + pace * (rows - before.rows),
            seconds=before.seconds + pace * (seconds - before.seconds),
            at_s=now_s,
        )

    def usual_s(self, key: Any, rows: int, now_s: float = -math.inf) -> float:
        """Seconds of a usual batch of ``rows`` rows; 0 while unknown at ``now_s`` (not given:
        however old).

        A size never seen takes as long as the next smaller one, or its part of the next larger one:
        the least it can.
        """
        if not self._learned:
            return 0.0
        figures = self._known.get(key)
        if figures is None:
            return 0.0
        size = rows.bit_length()
        own = figures.get(size)
        if own is not None and own.rows == rows and self._fresh(own, now_s):
            return own.seconds
        fresh = {size: figure for size, figure in figures.items() if self._fresh(figure, now_s)}
        own = fresh.get(size)
        below = [other for other in fresh if other < size]
        smaller = fresh[max(below)] if below else None
        if own is None:
            if smaller is not None:
                return smaller.seconds
            if not fresh:
                return 0.0
            larger = fresh[min(fresh)]
            return larger.seconds * rows / larger.rows
        if smaller is None:
            return own.seconds
        slope = (own.seconds - smaller.seconds) / (own.rows - smaller.rows)
        slope = max(0.0, slope)
        seconds = own.seconds + slope * (rows - own.rows)
        return max(smaller.seconds, seconds)

    def _fresh(self, figure: Usual, now_s: float) -> bool:
        return now_s - figure.at_s <= self.FRESH_S + 3 * figure.seconds


class Account:
    """What one version has answered since somebody looked."""

    def __init__(self) -> None:
        self.latency = Histogram()
        self.rows = 0
        self.last_ms = 0
        self.stages = np.zeros((2, len(STAGES)))  # how many entered it, seconds
        self.cache = np.zeros((2, 2))  # hits and misses: how many, seconds
        self.batches: dict[int, Floats] = {}  # rows -> executions, seconds of their three stages
        self.failures: dict[str, Floats] = {}  # reason -> how many, seconds

    def add_failure(self, reason: str, seconds: float) -> None:
        failed = self.failures.setdefault(reason, np.zeros(2))
        failed += 1, seconds

    def add_requests(self, rows: int, spent: Floats, last_ms: int) -> None:
        """Answered requests: seconds in each stage and in all [n, stages + 1]; the time of day of
        the last one."""
        self.latency.add(spent[:, -1])
        self.rows += rows
        self.last_ms = max(self.last_ms, last_ms)
        stages = spent[:, :-1]
        self.stages += np.count_nonzero(stages, axis=0), stages.sum(axis=0)
        looked_up = spent[:, 1] > 0
        ran = spent[:, 4] > 0
        if looked_up.any():
            hits = spent[looked_up & ~ran, 1:3].sum(axis=1)  # a hit may wait for a twin
            misses = spent[looked_up & ran, 1]
            self.cache[0] += hits.size, misses.size
            self.cache[1] += hits.sum(), misses.sum()

    def add_runs(self, rows: int, largest: int, runs: int, seconds: Floats) -> None:
        """Runs of the model over ``rows`` rows each; more than ``largest`` ran in chunks, which
        share the ``seconds`` [3] of all runs by their rows."""
        whole, rest = divmod(rows, largest)
        for size, chunks in ((largest, whole), (rest, 1)):
            if size and chunks:
                share = size * chunks / rows
                batch = self.batches.setdefault(size, np.zeros(4))
                batch[0] += runs * chunks
                batch[1:] += seconds * share

    def totals(self) -> Sums:
        """Plain numbers, see :meth:`Telemetry.totals`; ``failures`` beside them."""
        counts, seconds = self.stages.tolist()
        (hits, misses), (hit_s, miss_s) = self.cache.tolist()
        stages = {}
        for stage, count, spent_s in zip(STAGES, counts, seconds, strict=True):
            stages[stage] = [int(count), spent_s]
        return {
            "requests": self.latency.count,
            "rows": self.rows,
            "seconds": self.latency.total_s,
            "at_most": self.latency.at_most,
            "last_inference_ms": self.last_ms,
            "stages": stages,
            "cache": {"hit": [int(hits), hit_s], "miss": [int(misses), miss_s]},
            "batches": {str(size): _counted(batch) for size, batch in self.batches.items()},
            "failures": {reason: _counted(failed) for reason, failed in self.failures.items()},
        }


def _counted(sums: Floats) -> list[float]:
    """How many, which is an integer, and their seconds."""
    count, *seconds = sums.tolist()
    return [int(count), *seconds]


def merged(totals: Sequence[Sums]) -> Sums:
    """The totals of several servers as one: sums, and the latest of what is ``last_...``."""
    whole: Sums = {}
    for key in dict.fromkeys(key for part in totals for key in part):
        values = [part[key] for part in totals if key in part]
        if isinstance(values[0], Mapping):
            whole[key] = merged(values)
        elif isinstance(values[0], list):
            whole[key] = [sum(places) for places in zip(*values, strict=True)]
        elif key.startswith("last_"):
            whole[key] = max(values)
        else:
            whole[key] = sum(values)
    return whole
