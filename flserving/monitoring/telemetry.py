"""What a server counts and times: histograms with percentiles, requests by outcome, seconds by
stage.

A request is timed by *marks* of one monotonic clock, one mark between two stages,
so the stages of a request add up to its latency exactly, by construction.

Recording appends to a list, which needs no lock; numpy sorts hundreds of records into buckets at
once, when the list is full or somebody reads.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from flserving import forks
from flserving.monitoring.metrics import STAGES, Account, Histogram, Sums, merged

Protocol = Literal["rest", "grpc"]

Observer = Callable[[str, int, tuple[float, ...], str], None]
"""Called for every request on its own thread or task: version, rows, marks (of a failed one start
and end), reason."""


@dataclass(slots=True)
class Exchange:
    """One call over the network: as it came, and, once it has ended, how.

    Attributes:
        method: POST; of gRPC ``package.Service/Method``.
        headers: Pairs of bytes or text. They hold the caller's token: nobody keeps them.
        path: As it was sent, without the query; ``scheme`` and it are of REST only.
        route: The path as the document of REST has it, ``/v2/models/{model}/infer``; "": none was
            found.
        status: 200, or of gRPC OK; "" where the caller left before.
        trace_id: Of its trace, where somebody traces.
    """

    protocol: Protocol
    method: str
    headers: Iterable[tuple[Any, Any]]
    scheme: str = ""
    path: str = ""
    route: str = ""
    status: int | str = ""
    trace_id: str = ""


Watcher = Callable[[Exchange], AbstractContextManager[None]]
"""Is entered when a call comes, and left when it has ended."""

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

_PENDING = 512  # records folded at once: about 0.5 us each instead of 5
_FRESH = 64  # versions with counts that nobody was shown yet
KEEP_S = 10.0
"""How long the counts of a version are kept after it was last held. Several processes add theirs up
under one name: all of them have to see that nobody holds it before the first one forgets what it
counted."""
OTHER = "other"
"""What versions that are not held are called together, in place of their ids."""


class Executions:
    """Runs of a model: how many, over how many rows, how long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        forks.fresh_locks_in_child(self, "_lock")
        self._seconds = Histogram()
        self._rows = 0
        self._requests = 0
        self._pending: list[tuple[int, float, int]] = []

    def add(self, rows: int, seconds: float, requests: int = 1) -> None:
        self._pending.append((rows, seconds, requests))  # atomic under the interpreter lock
        if len(self._pending) >= _PENDING:
            self._fold()

    def summary(self) -> dict[str, Any]:
        """``request_count``, ``rows``, ``executions``, and ``execution``: their durations
        (:meth:`Histogram.summary_ms`), of which ``avg_latency_ms`` is the mean (0 before the
        first)."""
        self._fold()
        with self._lock:
            return {
                "request_count": self._requests,
                "rows": self._rows,
                "executions": self._seconds.count,
                "avg_latency_ms": self._seconds.total_s * 1e3 / max(1, self._seconds.count),
                "execution": self._seconds.summary_ms(),
            }

    def _fold(self) -> None:
        with self._lock:
            taken = np.array(_take(self._pending), np.float64)
            rows, seconds, requests = taken.reshape(-1, 3).T
            self._rows += int(rows.sum())
            self._requests += int(requests.sum())
            self._seconds.add(seconds)


class Telemetry:
    """Counters and stage times of one server.

    Holds by construction: ``succeeded + sum(failed.values()) == requests``; the latency histogram's
    count equals ``succeeded``; the stages' seconds add up to the latency's.

    However many versions are called, memory stays flat: only those that are *held* (in memory, or
    led to) have accounts of their own. Calls of others are counted as the version ``other`` of
    their model. Counts never move from one account to another, which a rate would count twice: what
    was shown under a version's name goes with the name, and a version that comes back starts at
    zero, which monitoring takes as a restart.

    Args:
        clock: The clock of the marks. ``largest_batch``: most rows in one forward of a model.
        held: Gives the versions ("model/version") that have accounts of their own; all, when not
            given.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        largest_batch: int = 1 << 62,
        held: Callable[[], Set[str]] | None = None,
    ) -> None:
        self._clock = clock
        self._largest_batch = largest_batch
        self._held = held
        self.observer: Observer | None = None
        self.watchers: dict[str, Watcher] = {}  # by what they are for; most servers have none
        self._lock = threading.Lock()
        forks.fresh_locks_in_child(self, "_lock")
        self._fresh: dict[str, Account] = {}  # by version: since the last look
        # totals by what is shown: a held version, all others of a model
        self._totals: dict[str, Sums] = {}
        self._seen_s: dict[str, float] = {}  # when each of those was held last
        self._failed: Counter[str] = Counter()
        self.elsewhere: Set[str] = frozenset()  # held by other processes behind the same address
        self._refused: Counter[tuple[str, str]] = Counter()  # (protocol, reason)
        self._counts: dict[str, Counter[str]] = {
            "head": Counter(),
            "path": Counter(),
            "delta": Counter(),
        }
        # protocol -> how many, parse seconds, serialise seconds
        self._codec_sums: dict[str, list[float]] = {}
        self._latency = Histogram()
        self._stages = [Histogram() for _ in STAGES]
        self._runs = 0
        self._run_rows = 0
        self._rows = 0
        self._pending: list[tuple[str, int, tuple[float, ...]]] = []
        self._pending_runs: list[tuple[str, int, tuple[float, float, float, float]]] = []

    def success(self, version: str, rows: int, marks_s: tuple[float, ...]) -> None:
        """Count one answered request. ``marks_s`` are the ``len(STAGES) + 1`` ascending times
        between its stages."""
        self._pending.append((version, rows, marks_s))
        if self.observer is not None:
            self.observer(version, rows, marks_s, "")
        if len(self._pending) >= _PENDING:
            with self._lock:
                self._fold()

    def failure(self, reason: str, version: str = "", seconds: float = 0.0) -> None:
        """Count one request that got an error after ``seconds``.

        ``reason`` is an error class, ``version`` one that the router knows, or "" where the request
        named none of them: so the sets of labels are closed.
        """
        with self._lock:
            self._of(version).add_failure(reason, seconds)
            self._failed[reason] += 1
        if self.observer is not None:
            now_s = self._clock()
            self.observer(version, 0, (now_s - seconds, now_s), reason)

    def execution(self, engine: Any, rows: int, predictions: Sequence[Any]) -> None:
        """Count one run of an :class:`~flserving.serving.engine.InferenceEngine`, which gave these
        predictions."""
        self._pending_runs.append((engine.served_as, rows, predictions[0].execution.marks_s))
        if len(self._pending_runs) >= _PENDING:
            with self._lock:
                self._fold_runs()

    def refusal(self, protocol: Protocol, reason: str) -> None:
        """Count a call that a protocol refused itself: no request came of it. ``reason`` as in
        :meth:`failure`."""
        with self._lock:
            self._refused[protocol, reason] += 1

    @contextmanager
    def watched(self, exchange: Exchange) -> Iterator[None]:
        """Around a call: all ``watchers`` see how it came and how it ended."""
        with ExitStack() as stack:
            for watcher in self.watchers.values():
                stack.enter_context(watcher(exchange))
            yield

    def count(self, what: Literal["head", "path", "delta"], values: Iterable[str]) -> None:
        """Count what answers said of themselves: the ``head`` of each row, the ``path`` of each
        answer; and what became of each ``delta`` that was wanted. Closed sets."""
        with self._lock:
            self._counts[what].update(values)

    def codec(self, protocol: Protocol, parse_s: float, serialise_s: float) -> None:
        """Time what a protocol did around one answered request: bytes to arrays, and arrays to
        bytes."""
        with self._lock:
            sums = self._codec_sums.setdefault(protocol, [0, 0.0, 0.0])
            sums[0] += 1
            sums[1] += parse_s
            sums[2] += serialise_s

    def snapshot(self) -> dict[str, Any]:
        """One consistent copy of everything since the start, durations in milliseconds."""
        with self._lock:
            self._fold_all()
            self._settle()
            succeeded = self._latency.count
            failed = self._failed.total()
            by_version = {name: self._totals[name]["requests"] for name in self._seen_s}
            by_version[OTHER] = succeeded - sum(by_version.values())
            return {
                "requests": succeeded + failed,
                "succeeded": succeeded,
                "failed": failed,
                "failed_by_reason": dict(self._failed),
                "rows": self._rows,
                "executions": self._runs,
                "mean_batch_rows": self._run_rows / max(1, self._runs),
                "requests_by_version": {
                    name: requests for name, requests in by_version.items() if requests
                },
                "latency": self._latency.summary_ms(),
                "stages": {
                    name: h.summary_ms() for name, h in zip(STAGES, self._stages, strict=True)
                },
                "rows_by_head": dict(self._counts["head"]),
                "answers_by_path": dict(self._counts["path"]),
                "stages_total_ms": sum(h.total_s for h in self._stages) * 1e3,
                "latency_total_ms": self._latency.total_s * 1e3,
            }

    def retiring(self) -> bool:
        """Whether something is kept of versions that this server does not hold."""
        with self._lock:
            held = self._names()
            return any(name not in held for name in self._seen_s)

    def totals(self) -> Sums:
        """One consistent copy of the sums behind every statistic: plain numbers that only grow.

        Those of several processes are added by :func:`~flserving.monitoring.metrics.merged`.
        ``named``: the keys of ``versions`` to be shown: versions that are held, and "model/other"
        for all others of a model. Those that only other processes hold (``elsewhere``) are in
        ``versions`` too, as a part of the sum. ``answered`` and ``failed`` (by reason): of all
        versions that ever were. ``versions`` by "model/version": answered ``requests``, their
        ``rows`` and ``seconds``; ``at_most``: how many took at most each of ``BOUNDS_S`` but more
        than the one before, then the rest; ``stages`` and ``cache``: [how many, seconds];
        ``batches`` by rows: [executions, preprocess, infer, postprocess seconds];
        ``last_inference_ms``: the time of day. ``failures`` by version ("": none that is known),
        then reason: [how many, seconds]. ``stages``: ``seconds`` and ``at_most``. ``codec`` by
        protocol: [answers, parse seconds, serialise seconds]. ``refusals`` by protocol, then
        reason. ``counts``: :meth:`count`.
        """
        failures: dict[str, Any] = {}
        refusals: dict[str, Any] = {}
        with self._lock:
            self._fold_all()
            held = self._settle()
            versions = {name: dict(totals) for name, totals in self._totals.items()}
            for name, version in versions.items():
                failed = version.pop("failures")
                if failed:
                    failures[name] = failed
            for (protocol, reason), count in self._refused.items():
                refusals.setdefault(protocol, {})[reason] = count
            named = [name for name in versions if name in held or name not in self._seen_s]
            return {
                "named": dict.fromkeys(named, 1),
                "answered": self._latency.count,
                "failed": dict(self._failed),
                "versions": versions,
                "stages": {
                    name: {"seconds": histogram.total_s, "at_most": histogram.at_most}
                    for name, histogram in zip(STAGES, self._stages, strict=True)
                },
                "failures": failures,
                "codec": {protocol: list(sums) for protocol, sums in self._codec_sums.items()},
                "refusals": refusals,
                "counts": {what: dict(values) for what, values in self._counts.items()},
            }

    # The rest runs under the lock: sort what is pending into the accounts.

    def _fold_all(self) -> None:
        self._fold()
        self._fold_runs()

    def _of(self, version: str) -> Account:
        if version not in self._fresh:
            if len(self._fresh) >= _FRESH:
                self._settle()
            self._fresh[version] = Account()
        return self._fresh[version]

    def _names(self) -> Set[str]:
        if self._held is None:
            return {*self._fresh, *self._seen_s}
        return self._held()

    def _settle(self) -> Set[str]:
        """Give what is fresh its names, forget versions that nobody has held for a while; the
        versions held."""
        held = self._names()
        now_s = self._clock()
        for version, account in self._fresh.items():
            name = version
            if version and version not in held:
                name = f"{version.partition('/')[0]}/{OTHER}"
            if name in held:
                self._seen_s[name] = now_s
            before = self._totals.get(name, {})
            self._totals[name] = merged([before, account.totals()])
        self._fresh.clear()
        for name, seen_s in list(self._seen_s.items()):
            if name in held or name in self.elsewhere:
                self._seen_s[name] = now_s
            elif now_s - seen_s >= KEEP_S:
                del self._seen_s[name], self._totals[name]
        return held

    def _fold(self) -> None:
        taken = _take(self._pending)
        if not taken:
            return
        marks = np.array([marks_s for _, _, marks_s in taken])  # [n, stages + 1]
        latency = marks[:, -1] - marks[:, 0]
        spent = np.column_stack([np.diff(marks), latency])  # [n, stages and the whole]
        entered = spent > 0  # a stage that was not entered takes no time and is not counted
        entered[:, -1] = True
        for stage, histogram in enumerate([*self._stages, self._latency]):
            histogram.add(spent[entered[:, stage], stage])
        to_unix_s = time.time() - self._clock()
        versions = [version for version, _, _ in taken]
        for version, places in _places(versions).items():
            rows = sum([taken[place][1] for place in places])
            self._rows += rows
            last_ms = int((marks[places[-1], -1] + to_unix_s) * 1e3)
            self._of(version).add_requests(rows, spent[places], last_ms)

    def _fold_runs(self) -> None:
        taken = _take(self._pending_runs)
        marks = np.array([marks_s for _, _, marks_s in taken])
        spent = np.diff(marks.reshape(-1, 4))
        alike = _places([(version, rows) for version, rows, _ in taken])
        for (version, rows), places in alike.items():
            runs = len(places)
            seconds = spent[places].sum(axis=0)
            self._of(version).add_runs(rows, self._largest_batch, runs, seconds)
            self._runs += runs
            self._run_rows += rows * runs


class Refusals:
    """Counts, under ``protocol``, the error that ends a ``with`` block: no request came of it, or
    its answer was lost.

    It holds no state, so one serves all requests.
    """

    def __init__(self, telemetry: Telemetry, protocol: Protocol) -> None:
        self._telemetry = telemetry
        self._protocol = protocol

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # that caller just left
        if isinstance(error, Exception) and not isinstance(error, ConnectionResetError):
            self._telemetry.refusal(self._protocol, getattr(error, "reason", "Internal"))


def _take(pending: list[T]) -> list[T]:
    """Empty a list to which others may append meanwhile."""
    taken = pending[: len(pending)]
    del pending[: len(taken)]
    return taken


def _places(keys: Sequence[K]) -> dict[K, list[int]]:
    """Where each key stands."""
    if keys and keys.count(keys[0]) == len(keys):  # the usual case, five times faster
        return {keys[0]: list(range(len(keys)))}
    places: dict[K, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places
