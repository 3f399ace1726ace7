"""ModelCache: the same models as cachetools keeps, never above budget, nothing evicted in use, one
load per key."""

import contextlib
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cachetools
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flserving import ModelCache, ServingConfig, models
from flserving.errors import (
    ConfigError,
    CorruptArtifactError,
    DeadlineExceededError,
    ModelTooLargeError,
    OverloadedError,
)
from flserving.models.processing import Postprocessor, Preprocessor
from flserving.models.weights import nbytes_of
from flserving.serving.cache import Lease
from flserving.serving.loader import ModuleStore, load_engine

SOON_S = 100.0  # how long a thread may take before a test fails; reached only by a failure


@dataclass(eq=False)
class Model:
    nbytes: int = 1


class Watched(ModelCache):
    """Notes the most that the cache ever held (whatever is held changes ``nbytes``), and every look
    for room."""

    most_bytes = most_models = looks_for_room = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @nbytes.setter
    def nbytes(self, value: int) -> None:
        self._nbytes = value
        self.most_bytes = max(self.most_bytes, value)
        self.most_models = max(
            self.most_models, len(self._entries) + len(self._leaving) + len(self._arriving)
        )

    def _make_room(self, key: Any, place: Lease, nbytes: int) -> bool:
        self.looks_for_room += 1
        return super()._make_room(key, place, nbytes)


def waiters(cache: ModelCache) -> int:
    """How many wait for room."""
    return len(cache._released._waiters)


def keys(cache: ModelCache) -> list[Any]:
    return [key for key, _ in cache.items()]


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for another thread to get there."""
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.001)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def never() -> Any:
    raise AssertionError("must not be loaded")


class Oracle(cachetools.LRUCache):
    """cachetools' LRU by bytes; the count is held by dropping its coldest first."""

    evictions = 0

    def popitem(self):
        self.evictions += 1
        return super().popitem()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["get", "lease", "put", "put", "clear"]),
        st.integers(0, 6),
        st.integers(1, 12),
    ),
    max_size=60,
)


@given(max_size=st.integers(1, 5), max_bytes=st.none() | st.integers(1, 30), steps=STEPS)
def test_holds_the_same_models_in_the_same_order_as_cachetools(max_size, max_bytes, steps):
    ours, oracle = (
        Watched(max_size, max_bytes),
        Oracle(max_bytes or 10**9, getsizeof=lambda model: model.nbytes),
    )
    hits = misses = 0

    def stored(key: int, model: Model) -> bool:
        """Put it into the oracle; False if it is too large."""
        if model.nbytes > oracle.maxsize:
            return False
        # cachetools makes room beside the old value of a key; here it leaves first
        oracle.pop(key, None)
        while len(oracle) >= max_size:
            oracle.popitem()
        oracle[key] = model
        return True

    for kind, key, nbytes in steps:
        model = Model(nbytes)
        if kind == "clear":
            ours.clear()
            for held in list(oracle):
                del oracle[held]
        elif kind == "put":
            with (
                contextlib.nullcontext()
                if stored(key, model)
                else pytest.raises(ModelTooLargeError)
            ):
                ours.put(key, model)
        else:
            held = oracle.get(key)
            hits, misses = hits + (held is not None), misses + (held is None)
            if kind == "get":
                assert ours.get(key) is held
            else:
                fits = held or stored(key, model)
                expected = contextlib.nullcontext() if fits else pytest.raises(ModelTooLargeError)
                with expected:  # noqa: SIM117
                    with ours.lease(key, lambda: model, size=lambda: model.nbytes) as got:  # noqa: B023
                        assert got is (held or model)
        assert set(keys(ours)) == set(oracle) and all(key in ours for key in oracle)
        assert len(ours) == len(oracle) and ours.nbytes == oracle.currsize
    assert (ours.hits, ours.misses, ours.evictions) == (hits, misses, oracle.evictions)
    assert ours.most_models <= max_size and ours.most_bytes <= (max_bytes or 10**9)
    assert keys(ours) == [oracle.popitem()[0] for _ in range(len(oracle))]


@pytest.mark.parametrize("disturbed", [False, True], ids=["leases", "leases, puts and clears"])
def test_is_never_above_budget_and_never_evicts_what_is_in_use_under_eight_threads(
    disturbed, threads
):
    cache = Watched(max_size=4, max_bytes=100)
    # 5 ... 68 bytes: sometimes one fits, sometimes four
    sizes = {key: 5 + 7 * key for key in range(10)}
    barrier = threading.Barrier(8)

    def work(seed: int) -> int:
        rng, answered = random.Random(seed), 0
        barrier.wait(SOON_S)
        for _ in range(300):
            key = rng.randrange(10)
            if disturbed and rng.random() < 0.05:
                cache.clear()
            if disturbed and rng.random() < 0.1:
                cache.put(key, Model(sizes[key]), SOON_S)
            with cache.lease(key, lambda: Model(sizes[key]), SOON_S) as model:  # noqa: B023
                time.sleep(0)  # let somebody else run while this one is pinned
                assert model.nbytes == sizes[key]
                assert disturbed or any(held is model for _, held in cache.items()), (
                    "evicted while in use"
                )
                answered += 1
        return answered

    assert sum(threads.map(work, range(8))) == 8 * 300
    assert cache.most_bytes <= 100 and cache.most_models <= 4
    assert cache.evictions > 100, "the test must press"
    assert cache.nbytes == sum(model.nbytes for _, model in cache.items()) and not cache._leaving
    assert all(entry.pins == 0 for entry in cache._entries.values())
    assert cache.hits + cache.misses == 8 * 300
    cache.clear()
    assert (cache.nbytes, len(cache)) == (0, 0)


def test_a_pinned_model_stays_and_the_coldest_unpinned_one_goes():
    cache = ModelCache(2)
    cache.put("old", Model())
    with cache.lease("old", never):
        cache.put("a", Model())
        cache.put("b", Model())  # "old" is the coldest, but in use
        assert keys(cache) == ["old", "b"]
    cache.put("c", Model())
    assert keys(cache) == ["b", "c"]


def test_a_cache_of_which_nothing_is_said_holds_five_models_of_any_size():
    cache = ModelCache()
    for number in range(7):
        cache.put(number, Model(1 << 40))
    assert keys(cache) == [2, 3, 4, 5, 6]


def test_a_model_leased_twice_stays_until_both_are_done():
    cache = ModelCache(1)
    first = cache.load("a", Model)
    second = cache.acquire("a")
    cache.release(first)
    with pytest.raises(OverloadedError):
        cache.put("b", Model())
    cache.release(second)
    cache.put("b", Model())
    assert keys(cache) == ["b"]


def test_who_needs_room_waits_for_it_and_gets_it(threads):
    cache = Watched(3, max_bytes=10)
    held = cache.load("a", lambda: Model(6)), cache.load("b", lambda: Model(4))
    waiting = threads.submit(lambda: cache.load("c", lambda: Model(5), SOON_S))
    eventually(lambda: waiters(cache) == 1)
    looks = cache.looks_for_room
    cache.release(held[1])  # 4 bytes are not enough
    eventually(lambda: cache.looks_for_room > looks and waiters(cache) == 1)
    assert not waiting.done() and "b" in cache, "what does not help is not evicted"
    cache.release(held[0])
    assert waiting.result(SOON_S).value.nbytes == 5
    assert keys(cache) == ["b", "c"] and cache.most_bytes <= 10


def test_who_gets_no_room_in_time_is_told_and_nothing_is_lost():
    cache = Watched(3, max_bytes=10)
    cache.put("cold", Model(2))
    with cache.lease("hot", lambda: Model(8)):
        started = time.monotonic()
        with pytest.raises(
            OverloadedError,
            match=r"no room for 'new': 10 B in memory, too many of them in use: raise cache_size",
        ):
            cache.load("new", lambda: Model(3), timeout_s=0.05)
        assert 0.04 < time.monotonic() - started < SOON_S
        with pytest.raises(OverloadedError):
            cache.put("new", Model(3))  # at once
        with pytest.raises(OverloadedError):
            cache.put("hot", Model(9))  # the new one beside the old one, which is in use
        assert keys(cache) == ["cold", "hot"], "evicting the cold one would not have made room"
        assert cache.get("hot").nbytes == 8
    assert cache.stats() | {"hits": 0, "misses": 0} == {
        "size": 2, "max_size": 3, "max_bytes": 10, "nbytes": 10, "hits": 0, "misses": 0, "evictions": 0,
        "loads": 1, "failed_loads": 1,
    }  # fmt: skip


def test_a_model_in_use_takes_new_users_while_somebody_waits_for_room(threads):
    cache = Watched(1)
    first = cache.load("a", Model)
    waiting = threads.submit(lambda: cache.load("b", Model, 0.2))
    eventually(lambda: waiters(cache) == 1)
    second = cache.acquire("a")
    assert second is first and first.pins == 2
    with pytest.raises(OverloadedError):
        waiting.result(SOON_S)
    cache.release(first), cache.release(second)
    assert keys(cache) == ["a"] and cache.evictions == 0


def test_who_fits_does_not_wait_for_who_does_not(threads):
    cache = Watched(2, max_bytes=10)
    lease = cache.load("a", lambda: Model(6))
    large = threads.submit(cache.load, "large", lambda: Model(9), 0.5)
    eventually(lambda: waiters(cache) == 1)
    assert cache.load("small", lambda: Model(4), SOON_S).value.nbytes == 4
    with pytest.raises(OverloadedError):
        large.result(SOON_S)
    assert lease.value.nbytes == 6 and cache.nbytes == 10


def test_concurrent_misses_of_one_key_load_once(threads):
    cache, barrier, calls = ModelCache(2), threading.Barrier(16), []

    def load() -> Model:
        calls.append(None)
        time.sleep(0.02)  # the others find it under way
        return Model()

    def ask(_: int) -> Model:
        barrier.wait(SOON_S)
        with cache.lease("k", load, SOON_S) as model:
            return model

    answers = set(threads.map(ask, range(16)))
    assert len(answers) == len(calls) == cache.loads == 1


def test_different_keys_load_side_by_side(threads):
    cache, barrier = ModelCache(8), threading.Barrier(8)

    def load() -> Model:
        barrier.wait(SOON_S)  # broken unless all eight load at the same time
        return Model()

    loading = [threads.submit(cache.load, key, load, SOON_S) for key in range(8)]
    assert len({id(each.result(SOON_S).value) for each in loading}) == len(cache) == 8


def followers_of(
    cache: ModelCache, leader: Callable[[], Any], threads: ThreadPoolExecutor, count: int = 5
) -> list[Any]:
    """Outcomes of callers who wait for one load: the leader's first. ``leader`` runs once all
    wait."""
    gate, inside = threading.Event(), threading.Event()

    def held() -> Any:
        inside.set()
        assert gate.wait(SOON_S)
        return leader()

    def ask(load: Callable[[], Any]) -> Any:
        try:
            return cache.load("k", load, SOON_S).value
        except BaseException as error:
            return error

    first = threads.submit(ask, held)
    assert inside.wait(SOON_S)
    others = [threads.submit(ask, lambda: Model(7)) for _ in range(count)]
    eventually(lambda: len(cache._loading["k"]._condition._waiters) == count)
    gate.set()
    return [first.result(SOON_S), *(other.result(SOON_S) for other in others)]


def test_a_failed_load_tells_everyone_who_waited_and_is_not_remembered(threads):
    cache = ModelCache(2)
    cache.put("kept", Model())

    def fail() -> Any:
        raise CorruptArtifactError("torn")

    outcomes = followers_of(cache, fail, threads)
    assert isinstance(outcomes[0], CorruptArtifactError) and all(
        outcome is outcomes[0] for outcome in outcomes
    )
    assert keys(cache) == ["kept"] and (cache.failed_loads, cache.loads) == (1, 0)
    with cache.lease("k", lambda: Model(3)) as model:
        assert model.nbytes == 3 and cache.loads == 1


def in_flight(
    cache: ModelCache, threads: ThreadPoolExecutor, sizes: list[int], told: bool
) -> tuple[int, list[Any]]:
    """Ask for a version of each size at once; how many loads began while none ended, and what came
    of all."""
    gate, began = threading.Event(), []

    def load(nbytes: int) -> Model:
        began.append(nbytes)
        assert gate.wait(SOON_S)
        return Model(nbytes)

    def ask(place: int, nbytes: int) -> int:
        size = (lambda: nbytes) if told else None
        with cache.lease(place, lambda: load(nbytes), SOON_S, size) as model:
            return model.nbytes

    asked = [threads.submit(ask, place, nbytes) for place, nbytes in enumerate(sizes)]
    eventually(lambda: len(began) + waiters(cache) == len(sizes))
    early = len(began)
    gate.set()
    return early, [each.result(SOON_S) for each in asked]


@pytest.mark.parametrize("told", [True, False], ids=["sizes known", "sizes unknown"])
def test_loads_under_way_count_as_models(told, threads):
    cache = Watched(5)
    assert in_flight(cache, threads, [1] * 12, told) == (5, [1] * 12)
    assert cache.most_models == 5 and cache.loads == 12 and not cache._arriving


def test_the_bytes_of_loads_under_way_count_before_they_are_read(threads):
    cache = Watched(100, max_bytes=25)
    assert in_flight(cache, threads, [6] * 12, told=True) == (4, [6] * 12)
    assert cache.most_bytes == 24 and cache.nbytes == sum(
        model.nbytes for _, model in cache.items()
    )


def test_what_can_never_fit_is_refused_before_it_is_read():
    cache = ModelCache(2, max_bytes=10)
    cache.put("kept", Model(10))
    for _ in range(2):
        with pytest.raises(ModelTooLargeError, match="needs 11 B of 10 B in all"):
            cache.load("large", never, size=lambda: 11)
    assert keys(cache) == ["kept"] and cache.nbytes == 10


@pytest.mark.parametrize(
    ("told", "came"), [(3, 8), (8, 3), (0, 8)], ids=["too few", "too many", "unknown"]
)
def test_what_came_counts_and_not_what_was_told(told, came):
    cache = Watched(3, max_bytes=10)
    cache.put("cold", Model(2))
    with cache.lease("k", lambda: Model(came), size=lambda: told):
        assert cache.nbytes == 2 + came
    with cache.lease("j", lambda: Model(10), size=lambda: 1):
        assert keys(cache) == ["j"] and cache.nbytes == 10 and cache.most_bytes <= 10


def test_a_load_that_turns_out_smaller_wakes_who_waits_for_the_rest(threads):
    cache, read = Watched(3, max_bytes=10), threading.Event()
    first = threads.submit(
        cache.load, "a", lambda: Model(read.wait(SOON_S) and 4), SOON_S, lambda: 8
    )
    eventually(lambda: cache.nbytes == 8)
    second = threads.submit(cache.load, "b", lambda: Model(6), 2 * SOON_S, lambda: 6)
    eventually(lambda: waiters(cache) == 1)
    read.set()
    assert first.result(SOON_S).pins == 1, "it stays in use: nothing but its arrival frees the room"
    assert second.result(SOON_S).nbytes == 6


def test_a_load_that_turns_out_larger_waits_for_nobody_who_waits_for_it(threads):
    """One place: somebody waits for the load under way, which needs more bytes than it was told."""
    cache, gate = Watched(1, max_bytes=10), threading.Event()
    first = threads.submit(
        cache.load, "a", lambda: gate.wait(SOON_S) and Model(9), SOON_S, lambda: 1
    )
    eventually(lambda: bool(cache._arriving))
    second = threads.submit(cache.load, "b", Model, SOON_S, lambda: 1)
    eventually(lambda: waiters(cache) == 1)
    gate.set()
    cache.release(first.result(SOON_S))
    assert second.result(SOON_S).value.nbytes == 1 and keys(cache) == ["b"]


@pytest.mark.parametrize(
    "error", [CorruptArtifactError("torn"), KeyboardInterrupt()], ids=["torn", "interrupted"]
)
@pytest.mark.parametrize("where", ["size", "load"])
def test_a_load_that_fails_gives_its_room_back(error, where):
    cache = Watched(1, max_bytes=10)

    def fail() -> Any:
        raise error

    with pytest.raises(type(error)):
        cache.load("k", fail, size=fail if where == "size" else lambda: 10)
    assert (cache.nbytes, len(cache), cache._arriving) == (0, 0, set())
    cache.put("next", Model(10))


def test_an_interrupted_load_interrupts_only_its_own_caller(threads):
    def interrupt() -> Any:
        raise KeyboardInterrupt

    outcomes = followers_of(ModelCache(1), interrupt, threads)
    assert isinstance(outcomes[0], KeyboardInterrupt)
    assert {type(outcome) for outcome in outcomes[1:]} == {
        OverloadedError
    } and "interrupted" in str(outcomes[1])


def test_a_load_that_ran_into_its_callers_deadline_is_tried_again_by_those_who_have_time(threads):
    cache = ModelCache(1)

    def late() -> Any:
        raise DeadlineExceededError("the caller's deadline")

    outcomes = followers_of(cache, late, threads)
    assert isinstance(outcomes[0], DeadlineExceededError)
    assert {outcome.nbytes for outcome in outcomes[1:]} == {7} and len(
        {id(o) for o in outcomes[1:]}
    ) == 1
    assert (cache.loads, cache.failed_loads) == (1, 1)


def test_who_waits_for_a_load_waits_no_longer_than_asked(threads):
    cache, gate = ModelCache(1), threading.Event()
    leader = threads.submit(cache.load, "k", lambda: gate.wait(SOON_S) and Model())
    eventually(lambda: "k" in cache._loading)
    with pytest.raises(
        DeadlineExceededError, match="loading 'k' took longer than 20 ms: try again"
    ):
        cache.load("k", never, 0.02)
    gate.set()
    assert leader.result(SOON_S).value is cache.get("k"), "the load itself went on"


def test_a_model_cleared_while_in_use_goes_when_it_is_released(threads):
    cache = Watched(2, max_bytes=10)
    lease = cache.load("a", lambda: Model(6))
    cache.put("b", Model(4))
    cache.clear()
    assert (len(cache), cache.nbytes, cache.get("a")) == (0, 6, None), (
        "still in memory, so still counted"
    )
    assert lease.value.nbytes == 6
    waiting = threads.submit(lambda: cache.load("c", lambda: Model(5), SOON_S))
    eventually(lambda: waiters(cache) == 1)
    cache.release(lease)
    assert waiting.result(SOON_S) and cache.nbytes == 5 and cache.most_bytes <= 10


def test_a_key_replaced_while_in_use_counts_both_until_the_old_one_is_released():
    cache = Watched(3, max_bytes=10)
    old, new = Model(6), Model(4)
    with cache.lease("k", lambda: old) as leased:
        cache.put("k", new)
        assert leased is old and cache.get("k") is new
        assert (len(cache), cache.nbytes, cache.most_models) == (1, 10, 2)
    assert (cache.nbytes, cache.evictions) == (4, 0)
    cache.put("k", Model(9))
    assert (cache.nbytes, cache.evictions) == (9, 0), (
        "the old value leaves first: 4 + 9 would not fit"
    )


def test_a_model_put_by_somebody_else_during_a_load_is_replaced():
    cache = Watched(2, max_bytes=10)
    mine = Model(5)

    def load() -> Model:
        cache.put("k", Model(5))
        return mine

    with cache.lease("k", load) as model:
        assert model is mine is cache.get("k")
    assert cache.nbytes == 5


def test_a_model_larger_than_the_budget_is_refused_and_evicts_nothing():
    cache = ModelCache(5, max_bytes=10)
    cache.put("a", Model(10))
    for refused in (
        lambda: cache.put("b", Model(11)),
        lambda: cache.load("b", lambda: Model(11)),
        lambda: cache.put("a", Model(11)),
    ):
        with pytest.raises(
            ModelTooLargeError, match=r"needs 11 B of 10 B in all: raise cache_bytes"
        ):
            refused()
    assert cache.get("a").nbytes == 10 and cache.evictions == 0


@pytest.mark.parametrize("name", ["parameters", "buffers"])
def test_what_has_no_size_is_refused_with_words(name):
    half_a_module = type("Odd", (), {name: lambda self: ()})()
    with pytest.raises(ConfigError, match="cannot tell the size of a Odd"):
        ModelCache().put("odd", half_a_module)


def test_modules_are_measured_by_parameters_and_buffers_each_once():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tied = nn.Linear(4, 4)
    twice = nn.ModuleList([tied, tied])
    assert (
        nbytes_of(module)
        == sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
        == 4 * 16 + 4 * 16 + 8
    )
    assert nbytes_of(twice) == 4 * 20
    assert nbytes_of(torch.zeros(5)) == 20
    cache = ModelCache(5, max_bytes=200)
    cache.put("m", module)
    assert cache.nbytes == nbytes_of(module)
    with pytest.raises(ConfigError, match="size of a str: give it an nbytes"):
        cache.put("x", "no model")


@pytest.mark.parametrize(
    "wrong", [(0,), (-1,), (1, 0), (1, -5), (2.5,), ("3",), (True,), (float("nan"),), (1, 1e9)]
)
def test_absurd_bounds_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"max_(size|bytes) is .*: use an integer in"):
        ModelCache(*wrong)


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_model_that_found_no_room_is_freed_with_the_error(no_gc, threads):
    cache, loaded = ModelCache(2, max_bytes=1), weakref.WeakSet()

    def load() -> Model:
        loaded.add(model := Model())
        eventually(lambda: bool(cache._loading["b"]._condition._waiters))
        return model

    def refused(timeout_s: float) -> bool:
        with pytest.raises(OverloadedError):
            cache.load("b", load, timeout_s)
        return True

    with cache.lease("a", Model):
        leader = threads.submit(refused, 0.05)
        eventually(lambda: "b" in cache._loading)
        assert refused(SOON_S) and leader.result(SOON_S) and cache.failed_loads == 1
    # circles of references would keep it until the garbage collector
    eventually(lambda: not loaded)


def test_evicted_engines_are_freed_and_memory_stays_flat_over_a_thousand_cycles(no_gc):
    config, store = ServingConfig(warmup_samples=1, max_batch_size=2), ModuleStore()
    for i in range(3):
        torch.manual_seed(i)
        module = models.build("mlp", {"sizes": [64, 1024, 10]})
        store.add(f"v{i}", module, Preprocessor(), Postprocessor())
    nbytes = nbytes_of(module)
    cache, alive, process = Watched(2, max_bytes=2 * nbytes), weakref.WeakSet(), psutil.Process()
    after = {}
    for cycle in range(1, 1001):
        version = f"v{cycle % 3}"  # the worst order for an LRU of two: every look-up misses
        with cache.lease(version, lambda: load_engine(store, version, config)) as engine:  # noqa: B023
            alive.add(engine)
            assert len(alive) <= 2, "an evicted engine is still in memory"
        after[cycle] = process.memory_info().rss
    assert (cache.loads, cache.evictions) == (1000, 998) and cache.most_bytes == 2 * nbytes
    grown, churned = after[1000] - after[200], 800 * nbytes
    assert grown < 0.01 * churned, (
        f"{grown / 1e6:.1f} MB kept of {churned / 1e6:.0f} MB loaded and evicted"
    )
    del engine
    cache.clear()
    assert len(alive) == 0
