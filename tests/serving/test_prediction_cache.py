"""PredictionCache: bounded in bytes that are really there, no older than its age limit, each answer
computed once."""

import contextlib
import gc
import hashlib
import itertools
import random
import threading
import tracemalloc
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cachetools
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flserving import PredictionCache
from flserving.errors import ConfigError, ModelExecutionError
from flserving.models.processing import Outputs

OVERHEAD = PredictionCache.OVERHEAD
SOON_S = 20.0  # how long a thread may take before a test fails; reached only by a failure


@dataclass(eq=False)
class Value:
    nbytes: int = 0


class Watched(PredictionCache[Any]):
    """Notes the most bytes that it ever accounted for."""

    most_bytes = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @nbytes.setter
    def nbytes(self, value: int) -> None:
        self._nbytes, self.most_bytes = value, max(self.most_bytes, value)


def look_up(cache: PredictionCache[Any], key: Any, value: Any) -> Any | None:
    """One caller alone: what the cache had, or None after computing ``value`` and handing it in."""
    found, flight, leads = cache.begin(key)
    if found is not None:
        assert flight is None and not leads
        return found
    assert leads, "alone, so nobody else computes"
    cache.finish(key, flight, value)
    assert flight.result(0) is value
    return None


@given(
    room=st.integers(1, 6),
    trace=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2000)), max_size=80),
)
def test_hits_what_cachetools_hits_within_the_byte_budget(room, trace):
    ours = Watched(room * OVERHEAD)
    oracle = cachetools.LRUCache(room * OVERHEAD, getsizeof=lambda value: value.nbytes + OVERHEAD)
    for key, nbytes in trace:
        value, held = Value(nbytes), oracle.get(key)
        assert look_up(ours, key, value) is held
        if held is None:
            with contextlib.suppress(ValueError):  # too large
                oracle[key] = value
        assert ours.nbytes == oracle.currsize and len(ours) == len(oracle)
    assert ours.most_bytes <= room * OVERHEAD
    assert ours.stats()["hits"] + ours.stats()["misses"] == len(trace)


@given(
    ttl_s=st.integers(1, 10),
    trace=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=80),
)
def test_is_as_forgetful_as_cachetools_with_a_virtual_clock(ttl_s, trace):
    now = [0.0]
    ours = PredictionCache(1 << 40, ttl_s, clock=lambda: now[0])
    oracle = cachetools.TTLCache(1000, ttl_s, timer=lambda: now[0])
    for key, passes_s in trace:
        now[0] += passes_s
        value, held = Value(), oracle.get(key)
        assert look_up(ours, key, value) is held
        if held is None:
            oracle[key] = value


def test_an_entry_ages_from_when_it_was_computed_and_a_hit_does_not_renew_it():
    now = [0.0]
    cache = PredictionCache(1 << 20, ttl_s=10, clock=lambda: now[0])
    _, flight, _ = cache.begin("k")
    now[0] = 5.0  # computing took 5 s
    cache.finish("k", flight, Value())
    now[0] = 14.9
    assert cache.begin("k")[0] is not None
    now[0] = 15.0
    value, flight, leads = cache.begin("k")
    assert value is None and leads
    assert cache.stats() | {"max_bytes": 0} == {
        "size": 0, "hits": 1, "misses": 2, "shared": 0, "evictions": 0, "expirations": 1, "nbytes": 0, "max_bytes": 0,
    }  # fmt: skip


def test_no_age_limit_means_for_ever():
    now = [0.0]
    cache = PredictionCache(1 << 20, clock=lambda: now[0])
    look_up(cache, "k", Value())
    now[0] = 1e9
    assert cache.begin("k")[0] is not None


def test_a_value_too_large_is_passed_on_but_not_kept_and_evicts_nothing():
    cache, small, large = PredictionCache(2 * OVERHEAD), Value(), Value(OVERHEAD + 1)
    look_up(cache, "small", small)
    look_up(cache, "large", large)
    assert cache.begin("small")[0] is small and cache.begin("large")[2], "still a miss"
    assert cache.evictions == 0 and cache.nbytes == OVERHEAD
    look_up(cache, "fits", exactly := Value(OVERHEAD))
    assert (
        cache.begin("fits")[0] is exactly and cache.evictions == 1 and cache.nbytes == 2 * OVERHEAD
    )


def test_concurrent_misses_of_one_key_are_computed_once():
    cache, barrier, computed = PredictionCache(1 << 20), threading.Barrier(16), []
    joined = threading.Semaphore(0)

    def ask(_: int) -> Value:
        barrier.wait(SOON_S)
        value, flight, leads = cache.begin("k")
        joined.release()
        if leads:
            for _ in range(16):
                # everybody has asked before the answer is there
                assert joined.acquire(timeout=SOON_S)
            computed.append(Value())
            cache.finish("k", flight, computed[-1])
            return computed[-1]
        return value if value is not None else flight.result(SOON_S)

    with ThreadPoolExecutor(16) as pool:
        answers = set(pool.map(ask, range(16)))
    assert answers == set(computed) and len(computed) == 1
    assert (cache.misses, cache.shared, cache.hits) == (1, 15, 0)
    assert cache.begin("k")[0] is computed[0]


def test_the_leaders_failure_wakes_the_others_and_is_not_kept():
    cache = PredictionCache(1 << 20)
    _, flight, leads = cache.begin("k")
    _, same, leads_too = cache.begin("k")
    assert same is flight and leads and not leads_too
    error = ModelExecutionError("it raised")
    cache.finish("k", flight, error=error)
    assert same.exception(0) is error
    _, again, leads = cache.begin("k")
    assert leads and again is not flight and (len(cache), cache.nbytes) == (0, 0)


def test_different_keys_are_different_flights_however_much_of_them_is_equal():
    cache = PredictionCache(1 << 20)
    digest = hashlib.blake2b(b"row", digest_size=32).digest()
    base = ("public", "model/preprocessing/policy", (1, 4), digest)
    others = [
        ("client-7", *base[1:]),
        ("public", "model2/preprocessing/policy", *base[2:]),
        (*base[:2], (4, 1), digest),
        (*base[:3], digest[:-1] + b"x"),
    ]
    look_up(cache, base, Value())
    for key in others:
        value, _, leads = cache.begin(key)
        assert value is None and leads, f"{key} was answered with another key's prediction"


def test_keys_that_collide_in_the_hash_table_stay_apart():
    class Colliding(bytes):
        def __hash__(self) -> int:
            return 1

    cache, values = PredictionCache(1 << 20), {Colliding([i]): Value() for i in range(20)}
    for key, value in values.items():
        look_up(cache, key, value)
    assert all(cache.begin(Colliding(key))[0] is value for key, value in values.items())


def test_clear_forgets_entries_but_not_who_computes():
    cache = PredictionCache(1 << 20)
    look_up(cache, "old", Value())
    _, flight, _ = cache.begin("k")
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0) and cache.begin("old")[2]
    assert cache.begin("k") == (None, flight, False)
    cache.finish("k", flight, late := Value())
    assert flight.result(0) is late and cache.begin("k")[0] is late


def test_random_use_by_eight_threads_keeps_the_accounts():
    ticks = itertools.count()  # time passes with every look at the clock
    cache, barrier = (
        Watched(20 * OVERHEAD, ttl_s=30, clock=lambda: float(next(ticks))),
        threading.Barrier(8),
    )

    def work(seed: int) -> int:
        rng, right = random.Random(seed), 0
        barrier.wait(SOON_S)
        for _ in range(500):
            key = rng.randrange(60)
            value, flight, leads = cache.begin(key)
            if leads and rng.random() < 0.1:
                cache.finish(key, flight, error=ModelExecutionError("sometimes"))
                right += 1
                continue
            if leads:
                cache.finish(key, flight, value := Value(key))
            elif value is None:
                try:
                    value = flight.result(SOON_S)
                except ModelExecutionError:
                    right += 1
                    continue
            right += value.nbytes == key
        return right

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 8 * 500
    assert cache.hits + cache.misses + cache.shared == 8 * 500 and not cache._flights
    assert cache.most_bytes <= 20 * OVERHEAD and cache.evictions > 100 and cache.expirations > 0
    assert cache.nbytes == sum(nbytes for _, _, nbytes, _ in cache._entries.values())


@pytest.mark.parametrize(("entries", "classes"), [(100, 10), (800, 2), (300, 300)])
def test_the_accounted_bytes_cover_the_real_ones_also_after_hits(entries, classes):
    """Against tracemalloc, with keys and values as the server makes them."""
    cache, keys = PredictionCache(1 << 30), []
    identity = "model" * 20 + "/preprocessing/policy"

    def answer(i: int) -> Outputs:
        whole = Outputs(
            np.full(1, i), np.full(1, 0.5, np.float32), np.full((1, classes), 0.1, np.float32)
        )
        return whole.copy_rows(0, 1)

    look_up(cache, "warm", answer(0))
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for i in range(entries):
            digest = hashlib.blake2b(i.to_bytes(4, "little"), digest_size=32).digest()
            key = ("public", identity, (1, 32), digest)
            look_up(cache, key, answer(i))
            keys.append(key)
        del key, digest
        for key in keys:
            cache.begin(key)[0].lists()  # what a hit does
        del key
        gc.collect()
        # without this test's list of keys
        real = tracemalloc.get_traced_memory()[0] - before - 8 * entries
    finally:
        tracemalloc.stop()
    accounted = entries * (OVERHEAD + answer(0).nbytes)
    assert 0.5 * accounted < real <= accounted, (
        f"{real / entries:.0f} B an entry, {accounted / entries:.0f} B accounted"
    )


def test_a_kept_answer_cannot_be_changed_by_whom_it_was_given_to():
    whole = Outputs(np.arange(3), np.full(3, 0.5, np.float32), np.full((3, 2), 0.5, np.float32))
    kept = whole.copy_rows(1, 3)
    whole.predictions[:] = 9  # the batch's own arrays may be written to
    first = kept.lists()
    first["predictions"][0] = "changed"
    first["probabilities"][0].append("changed")
    assert kept.lists() == {
        "predictions": [1, 2],
        "confidences": [0.5, 0.5],
        "probabilities": [[0.5, 0.5]] * 2,
    }
    with pytest.raises(ValueError, match="read-only"):
        kept.probabilities[0] = 1


@pytest.mark.parametrize(
    "wrong", [(0,), (-1,), (1.5,), (float("nan"),), ("1",), (1, -1), (1, float("nan")), (1, "1")]
)
def test_absurd_bounds_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"(max_bytes|ttl_s) is .*: use an? (integer|number) in"):
        PredictionCache(*wrong)


def test_a_follower_gets_the_leaders_future_itself():
    cache = PredictionCache(OVERHEAD)
    futures = [cache.begin("k")[1] for _ in range(3)]
    assert all(isinstance(future, Future) and future is futures[0] for future in futures)


def keep(cache: PredictionCache[Any], key: Any, owner: Any, nbytes: int = 0) -> None:
    """One caller alone asks for ``key``, and hands in what it computed on a miss."""
    found, flight, _ = cache.begin(key)
    if found is None:
        cache.finish(key, flight, Value(nbytes), owner=owner)


def test_one_owners_flood_pushes_out_its_own_entries_only():
    cache = PredictionCache(100 * OVERHEAD)
    for i in range(100):
        keep(cache, ("flood", i), "flood")
    for i in range(20):
        keep(cache, ("quiet", i), "quiet")
    for i in range(5000):
        keep(cache, ("flood", 1000 + i), "flood")
    assert all(cache.begin(("quiet", i))[0] is not None for i in range(20)), (
        "within its share, nothing went"
    )
    assert cache.nbytes == 100 * OVERHEAD, "and the flood has the rest"


def test_who_fills_his_share_to_the_last_byte_loses_nothing_to_who_has_more():
    cache = PredictionCache(4 * OVERHEAD)
    for key, owner in (("a1", "a"), ("b1", "b"), ("b2", "b"), ("b3", "b"), ("a2", "a")):
        keep(cache, key, owner)
    assert set(cache._entries) == {"a1", "a2", "b2", "b3"}


@given(
    room=st.integers(1, 12),
    trace=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 5000)), max_size=120
    ),
)
def test_who_stays_within_his_share_loses_nothing_and_the_budget_holds(room, trace):
    cache, kept = Watched(room * OVERHEAD), {owner: {} for owner in range(4)}
    for owner, number, nbytes in trace:
        keep(cache, (owner, number), owner, nbytes)
        kept[owner].setdefault(number, nbytes + OVERHEAD)
        assert cache.nbytes == sum(entry[2] for entry in cache._entries.values())
        assert cache.nbytes == sum(shelf.nbytes for shelf in cache._shelves.values())
        assert all(shelf.keys for shelf in cache._shelves.values())
    for owner, mine in kept.items():
        if sum(mine.values()) <= cache.max_bytes / len(kept):
            assert all((owner, number) in cache._entries for number in mine)
    assert cache.most_bytes <= room * OVERHEAD
