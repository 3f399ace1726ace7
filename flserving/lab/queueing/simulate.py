"""A batching server in virtual time: what no closed form covers, computed exactly for given
arrivals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flserving.errors import ConfigError
from flserving.lab.queueing.arrivals import Floats, Ints
from flserving.serving.config import BatchingPolicy


@dataclass(frozen=True, eq=False)
class BatchTrace:
    """Who was answered when, and in which batch. N requests in order of arrival, B batches in order
    of their start.

    Args:
        arrival_s: float64 [N].
        batch: Number of the request's batch, int64 [N], each in [0, B).
        batch_start_s, batch_end_s: When the batch ran, float64 [B].
        worker: Who ran it, int64 [B].
    """

    arrival_s: Floats
    batch: Ints
    batch_start_s: Floats
    batch_end_s: Floats
    worker: Ints

    @property
    def wait_s(self) -> Floats:
        """Seconds from arrival to the start of the batch, float64 [N]."""
        return self.batch_start_s[self.batch] - self.arrival_s

    @property
    def latency_s(self) -> Floats:
        """Seconds from arrival to the end of the batch, float64 [N]."""
        return self.batch_end_s[self.batch] - self.arrival_s

    @property
    def batch_size(self) -> Ints:
        """Requests per batch, int64 [B]."""
        return np.bincount(self.batch, minlength=len(self.worker)).astype(np.int64)


def simulate_batching(
    arrival_s: Floats,
    service_s: Callable[[int], float],
    *,
    max_batch_size: int = 32,
    workers: int = 1,
    policy: BatchingPolicy = "work_conserving",
    max_wait_s: float = 0.1,
) -> BatchTrace:
    """Serve requests first come, first served, in batches.

    ``work_conserving``: an idle worker takes whatever waits, at once. ``hold_until_full``: it waits
    until the batch is full or its oldest request has waited ``max_wait_s``. The same two policies
    as ``ServingConfig.batching``.

    Args:
        arrival_s: Arrival times, float64 [N], ascending.
        service_s: Seconds that a batch of n rows takes; may draw at random, is called once per
            batch.
        max_batch_size, workers: At least 1.
        policy, max_wait_s: See above; ``max_wait_s`` counts under ``hold_until_full`` only.

    Raises:
        ConfigError: Arrivals not ascending, a setting out of range, or ``service_s`` negative or
            not finite.

    Cost: 5 to 10 us per batch.
    """
    arrivals = np.asarray(arrival_s, np.float64)
    if arrivals.ndim != 1 or not np.isfinite(arrivals).all() or (np.diff(arrivals) < 0).any():
        raise ConfigError("arrival_s must be one row of finite times in ascending order: sort it")
    if max_batch_size < 1 or workers < 1 or not max_wait_s >= 0:
        raise ConfigError(
            f"max_batch_size {max_batch_size} and workers {workers} must be at least 1, "
            f"max_wait_s {max_wait_s} at least 0"
        )
    if policy not in ("work_conserving", "hold_until_full"):
        raise ConfigError(f"policy is {policy!r}: choose work_conserving or hold_until_full")
    times = arrivals.tolist()
    free_s = [0.0 if not times else min(0.0, times[0])] * workers
    first = 0
    batches = []
    sizes = []
    while first < len(times):
        ready_s = times[first]
        if policy == "hold_until_full":
            full = first + max_batch_size - 1
            ready_s = min(ready_s + max_wait_s, times[full] if full < len(times) else np.inf)
        worker = min(range(workers), key=lambda w: (max(free_s[w], ready_s), w))
        start_s = max(free_s[worker], ready_s)
        size = min(max_batch_size, int(np.searchsorted(arrivals, start_s, side="right")) - first)
        took_s = service_s(size)
        if not 0 <= took_s < np.inf:
            raise ConfigError(
                f"service_s({size}) is {took_s!r}: it must be a finite number of seconds, at least 0"
            )
        free_s[worker] = start_s + took_s
        batches.append((start_s, free_s[worker], worker))
        sizes.append(size)
        first += size
    start, end, worker_of = zip(*batches, strict=True) if batches else ((), (), ())
    return BatchTrace(
        arrival_s=arrivals,
        batch=np.repeat(np.arange(len(sizes), dtype=np.int64), sizes),
        batch_start_s=np.array(start, np.float64),
        batch_end_s=np.array(end, np.float64),
        worker=np.array(worker_of, np.int64),
    )
