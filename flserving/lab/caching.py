"""Experiments on the real ``ModelCache``: replayed traces, hit rates beside Che's closed form, a crowd at one key.

Where only the order of requests matters, a model is stood in for by a ``Weightless`` object: the cache is the real one.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flserving.errors import ConfigError
from flserving.lab import theory
from flserving.lab.arrivals import Floats, Ints, Zipf
from flserving.serving.cache import ModelCache

Bools = npt.NDArray[np.bool_]
Step = tuple[str, bool, tuple[str, ...]]


class Weightless:
    """Stands in for a model in a cache that counts models, not bytes."""

    nbytes = 0


_MODEL = Weightless()


def replay(cache: ModelCache, requests: Iterable[Hashable]) -> Bools:
    """Ask ``cache`` for each key, and put it where it is missing; which requests were hits, bool [N]. 3 us each."""
    hits = []
    for key in requests:
        hit = cache.get(key) is not None
        if not hit:
            cache.put(key, _MODEL)
        hits.append(hit)
    return np.array(hits, np.bool_)


def record(cache: ModelCache, requests: Iterable[str]) -> list[Step]:
    """``replay``, step by step: the key asked for, whether it was a hit, the keys held afterwards, coldest first."""
    return [(key, bool(replay(cache, [key])[0]), tuple(str(held) for held, _ in cache.items())) for key in requests]


@dataclass(frozen=True, eq=False)
class HitRates:
    """Che's closed form beside the real cache. Shares in [0, 1]; ``versions`` things, most popular first.

    Args:
        cache_size, skew: The point that was asked for.
        popularity: Share of requests per version, float64 [versions].
        closed: Hit rate by Che at 1, 2, ... versions in memory, float64 [versions].
        sizes, measured: Cache sizes that were tried, int64 [K], and the measured hit rates, float64 [K].
        closed_items, measured_items: Hit rate per version at ``cache_size``, float64 [versions].
    """

    cache_size: int
    skew: float
    popularity: Floats
    closed: Floats
    sizes: Ints
    measured: Floats
    closed_items: Floats
    measured_items: Floats


def hit_rates(
    cache_size: int,
    skew: float,
    *,
    versions: int = 20,
    sizes: Sequence[int] = (1, 2, 3, 5, 8, 12, 16, 20),
    requests: int = 3000,
    seed: int = 0,
) -> HitRates:
    """Measure the hit rate of a ``ModelCache`` under Zipf popularity, and compute it.

    Raises:
        ConfigError: A cache size outside [1, versions].

    Cost: about 3 us per request and size, 0.1 s with the defaults.
    """
    popularity = Zipf(versions, skew)
    shares, tried = popularity.probabilities, np.unique([*sizes, cache_size])
    if not 1 <= tried[0] <= tried[-1] <= versions:
        raise ConfigError(f"cache sizes {tried.tolist()} for {versions} versions: use sizes in [1, {versions}]")
    trace = popularity.draw(np.random.default_rng(seed), requests)
    measured, items = [], np.zeros(versions)
    for size in tried.tolist():
        cache = ModelCache(size)
        replay(cache, reversed(range(versions)))  # starts full, so that a short trace shows the steady state
        hits = replay(cache, trace.tolist())
        measured.append(hits.mean())
        if size == cache_size:
            asked = np.bincount(trace, minlength=versions)
            items = np.bincount(trace, hits, minlength=versions) / np.where(asked, asked, np.nan)
    closed = np.array([theory.lru_hit_rate(shares, size) for size in range(1, versions + 1)])
    return HitRates(cache_size, skew, shares, closed, tried, np.array(measured),
                    theory.lru_item_hit_rates(shares, cache_size), items)  # fmt: skip


def rolling(hits: Bools, window: int) -> Floats:
    """Share of hits among the last ``window`` requests, mean over runs: bool [runs, N] -> float64 [N - window + 1]."""
    return np.convolve(hits.mean(axis=0), np.full(window, 1 / window), mode="valid")


@dataclass(frozen=True, eq=False)
class Stampede:
    """Callers who came at once, in the order of their answers.

    Args:
        start_ms, end_ms: Since the first of them came, float64 [callers].
        loaded: Who had to load, bool [callers].
    """

    start_ms: Floats
    end_ms: Floats
    loaded: Bools


def stampede(get: Callable[[Callable[[], Any]], object], load: Callable[[], Any], callers: int = 32) -> Stampede:
    """Let ``callers`` threads call ``get(load)`` at the same moment; see who had to load. What one raises is raised."""
    gate, times, loaded = threading.Barrier(callers), np.zeros((callers, 2)), np.zeros(callers, np.bool_)
    problems: list[BaseException] = []

    def caller(number: int) -> None:
        def mine() -> Any:
            loaded[number] = True
            return load()

        gate.wait()
        times[number, 0] = time.perf_counter()
        try:
            get(mine)
        except BaseException as error:
            problems.append(error)
        times[number, 1] = time.perf_counter()

    threads = [threading.Thread(target=caller, args=(number,), daemon=True) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    order = np.argsort(times[:, 1])
    start_ms, end_ms = (times[order].T - times.min()) * 1e3
    return Stampede(start_ms, end_ms, loaded[order])
