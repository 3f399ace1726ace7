"""What a server counts and times: histograms with percentiles, requests by outcome, seconds by stage.

Imports nothing of the package. A request is timed by *marks* of one monotonic clock, one mark between two stages,
so the stages of a request add up to its latency exactly, by construction.

Recording appends to a list, which needs no lock; numpy sorts hundreds of records into buckets at once, when the list is
full or somebody reads.
"""

import math
import threading
from collections import Counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

STAGES = ("validate", "cache", "queue", "preprocess", "infer", "postprocess", "respond")
"""The way of a request, in order. ``validate`` includes the route and the pin on the model (a cold start shows here),
``queue`` the hand-over to a worker, ``respond`` everything from the end of the execution to the answer object."""

Protocol = Literal["rest", "grpc"]

_LOWEST_S, _GROWTH = 1e-6, 1.05
_PER_LOG = 1.0 / math.log(_GROWTH)
_LAST = math.ceil(math.log(1e3 / _LOWEST_S) * _PER_LOG)  # about 1,000 s
_PENDING = 512  # records folded at once: about 0.5 us each instead of 5


class Histogram:
    """Durations in log-spaced buckets: a percentile is right to 2.5 % from 1 us to 1,000 s, however many the samples.

    Memory is constant (about 430 counters). Not locked: the owner locks. Source: the idea of HdrHistogram (Gil Tene).
    """

    def __init__(self) -> None:
        self.counts = np.zeros(_LAST + 1, np.int64)
        self.count, self.total_s, self.highest_s = 0, 0.0, 0.0

    def record(self, seconds: NDArray[np.float64]) -> None:
        """Add durations, float64 [N], in seconds."""
        if seconds.size:
            buckets = np.log(np.maximum(seconds, _LOWEST_S) / _LOWEST_S) * _PER_LOG
            self.counts += np.bincount(np.minimum(buckets, _LAST).astype(np.int64), minlength=_LAST + 1)
            self.count += seconds.size
            self.total_s += float(seconds.sum())
            self.highest_s = max(self.highest_s, float(seconds.max()))

    def percentile_s(self, q: float) -> float:
        """Seconds that a share ``q`` of [0, 1] of the samples does not exceed (nearest rank); NaN if empty."""
        if not self.count:
            return math.nan
        rank = max(1, math.ceil(q * self.count))
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return float(min(_LOWEST_S * _GROWTH ** (bucket + 0.5), self.highest_s))

    def summary_ms(self) -> dict[str, float]:
        """``count``, ``mean_ms``, ``p50_ms``, ``p95_ms``, ``p99_ms`` and ``max_ms``; NaN where nothing was recorded."""
        percentiles = {f"p{q}_ms": self.percentile_s(q / 100) * 1e3 for q in (50, 95, 99)}
        mean = self.total_s / self.count * 1e3 if self.count else math.nan
        return {"count": self.count, "mean_ms": mean, **percentiles, "max_ms": self.highest_s * 1e3}


class Executions:
    """Runs of a model: how many, over how many rows, how long."""

    def __init__(self) -> None:
        self._lock, self._seconds, self._rows = threading.Lock(), Histogram(), 0
        self._pending: list[tuple[int, float]] = []

    def add(self, rows: int, seconds: float) -> None:
        self._pending.append((rows, seconds))  # atomic under the interpreter lock
        if len(self._pending) >= _PENDING:
            self._fold()

    def summary(self) -> dict[str, Any]:
        """``rows``, ``executions``, and ``execution``: their durations (:meth:`Histogram.summary_ms`)."""
        self._fold()
        with self._lock:
            seconds = self._seconds.summary_ms()
            return {"rows": self._rows, "executions": self._seconds.count, "execution": seconds}

    def _fold(self) -> None:
        with self._lock:
            n = len(self._pending)
            taken = np.array(self._pending[:n], np.float64).reshape(n, 2)
            del self._pending[:n]
            self._rows += int(taken[:, 0].sum())
            self._seconds.record(taken[:, 1])


class Telemetry:
    """Counters and stage times of one server.

    Holds by construction: ``succeeded + sum(failed.values()) == requests``; the latency histogram's count equals
    ``succeeded``; the stages' seconds add up to the latency's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows = 0
        self._failed: Counter[str] = Counter()
        self._by_version: Counter[str] = Counter()
        self._latency = Histogram()
        self._stages = [Histogram() for _ in STAGES]
        self._pending: list[tuple[str, int, tuple[float, ...]]] = []
        self._refused: Counter[tuple[str, str]] = Counter()
        self._doors: list[tuple[str, float, float]] = []
        self.executions = Executions()

    def success(self, version: str, rows: int, marks_s: tuple[float, ...]) -> None:
        """Count one answered request. ``marks_s`` are the ``len(STAGES) + 1`` ascending times between its stages."""
        self._pending.append((version, rows, marks_s))
        if len(self._pending) >= _PENDING:
            with self._lock:
                self._fold()

    def failure(self, reason: str) -> None:
        """Count one request that got an error; ``reason`` is an error class, so the set of labels is closed."""
        with self._lock:
            self._failed[reason] += 1

    def refusal(self, protocol: Protocol, reason: str) -> None:
        """Count one call that a door refused itself, so that no request came of it; ``reason`` as in :meth:`failure`."""
        with self._lock:
            self._refused[protocol, reason] += 1

    def door(self, protocol: Protocol, parse_s: float, serialise_s: float) -> None:
        """Time what a door did around one answered request: bytes to arrays, and arrays to bytes."""
        self._doors.append((protocol, parse_s, serialise_s))

    def snapshot(self) -> dict[str, Any]:
        """One consistent copy of everything, durations in milliseconds."""
        executions = self.executions.summary()
        with self._lock:
            self._fold()
            succeeded, failed = self._latency.count, sum(self._failed.values())
            return {
                "requests": succeeded + failed,
                "succeeded": succeeded,
                "failed": failed,
                "failed_by_reason": dict(self._failed),
                "rows": self._rows,
                "executions": executions["executions"],
                "mean_batch_rows": executions["rows"] / max(1, executions["executions"]),
                "requests_by_version": dict(self._by_version),
                "latency": self._latency.summary_ms(),
                "stages": {name: h.summary_ms() for name, h in zip(STAGES, self._stages, strict=True)},
                "stages_total_ms": sum(h.total_s for h in self._stages) * 1e3,
                "latency_total_ms": self._latency.total_s * 1e3,
            }

    def _fold(self) -> None:
        """Under the lock: sort what is pending into the histograms."""
        n = len(self._pending)
        taken = self._pending[:n]
        del self._pending[:n]
        if not taken:
            return
        marks = np.array([marks_s for _, _, marks_s in taken])  # [n, stages + 1]
        self._rows += sum(rows for _, rows, _ in taken)
        self._by_version.update(version for version, _, _ in taken)
        self._latency.record(marks[:, -1] - marks[:, 0])
        for histogram, seconds in zip(self._stages, np.diff(marks).T, strict=True):
            histogram.record(seconds[seconds > 0])  # a stage that was not entered takes no time and is not counted
