"""The server as a whole under threads and event loops: right answers, swaps, bounds, deadlines, and
a clean end."""

import asyncio
import gc
import random
import threading
import time
import tracemalloc
import warnings
import weakref
from statistics import median

import numpy as np
import psutil
import pytest
import torch

from flserving import ModelServer, ServingConfig, create_serving_pipeline, models
from flserving.errors import (
    ConflictError,
    CorruptArtifactError,
    DeadlineExceededError,
    ModelExecutionError,
    NotFoundError,
    OverloadedError,
    ServerClosedError,
)
from flserving.serving import repository
from flserving.serving.batching import workers
from flserving.serving.request import Request
from serving_models import (
    PATIENCE_S,
    POISON,
    Constant,
    Gated,
    Poison,
    Probe,
    Tagged,
    Threads,
    collected,
    flserving_threads,
    row,
    serving,
    wait_until,
)

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def serve():
    made = []

    def make(*args, **kwargs):
        made.append(serving(*args, **kwargs))
        return made[-1]

    yield make
    for server in made:
        server.close()


def pins(server):
    return sum(entry.pins for entry in server.model_cache._entries.values())


def assert_nothing_left(server):
    wait_until(lambda: server._batcher.busy == 0, "the end of all executions")
    assert server._batcher.queue.rows == 0 and not server._batcher.queue._lines
    wait_until(lambda: pins(server) == 0, "the return of every pin")
    assert not server.model_cache._leaving


def slow(server, version="v1.0"):
    """Make the server take a version for a slow one: its batches run on workers."""
    server.engines[version].typical_s = 1e9


@pytest.fixture
def gated_loads(monkeypatch):
    """Loads that wait until the test releases them: ``gated_loads.shut()``."""
    probe, real = Probe(), repository.load_engine

    def load_engine(source, version, config):
        with probe.inside([version]):
            return real(source, version, config)

    monkeypatch.setattr(repository, "load_engine", load_engine)
    return probe


# Right answers


def test_the_four_ways_to_ask_give_one_answer(serve):
    torch.manual_seed(0)
    module = models.build("tutorial_mlp")
    x = np.random.default_rng(0).standard_normal((60, 32), dtype=np.float32)
    with torch.inference_mode():
        wanted = torch.softmax(module(torch.from_numpy(x)), 1)
    with create_serving_pipeline(module) as server:
        requests = random_requests(x)

        async def together():
            return await asyncio.gather(*map(server.apredict, requests))

        ways = [
            list(map(server.predict, requests)),
            asyncio.run(together()),
            server.batch_predict(requests),
        ]
        ways += [server.engines["v1.0"].batch_predict(requests)]
        for answers in ways:
            start = 0
            for request, answer in zip(requests, answers, strict=True):
                rows = slice(start, start + len(request))
                start = rows.stop
                np.testing.assert_allclose(answer["probabilities"], wanted[rows], atol=1e-6)
                assert answer["predictions"] == wanted[rows].argmax(1).tolist()
                np.testing.assert_allclose(answer["confidences"], wanted[rows].amax(1), atol=1e-6)
                assert (answer["model_version"], answer["model_type"]) == ("v1.0", "global")
                assert answer["latency_ms"] > 0


def crowd(server, requests, *, threads=4, loops=2):
    """Send every request once, from threads and tasks in random order; returns the answers in the
    requests' order."""
    order = random.Random(1).sample(range(len(requests)), len(requests))
    answers = [None] * len(requests)
    shares = [order[i :: threads + loops] for i in range(threads + loops)]

    def thread(share):
        for i in share:
            answers[i] = server.predict(requests[i])

    async def loop(share):
        async def task(part):
            for i in part:
                answers[i] = await server.apredict(requests[i])

        await asyncio.gather(*(task(share[i::16]) for i in range(16)))

    callers = Threads()
    for share in shares[:threads]:
        callers.start(thread, share)
    for share in shares[threads:]:
        callers.start(lambda share=share: asyncio.run(loop(share)))
    callers.results()
    return answers


def random_requests(x, seed=0):
    """Cut rows into requests of 1 to 6 rows."""
    rng, start = random.Random(seed), 0
    requests = []
    while start < len(x):
        requests.append(x[start : start + rng.randint(1, 6)])
        start += len(requests[-1])
    return requests


def test_ten_thousand_rows_are_never_swapped(serve):
    """Every row carries its own number through an identity model: an answer to another caller
    cannot go unnoticed."""
    server = serve(Tagged())
    x = np.arange(20_000, dtype=np.float32).reshape(10_000, 2)
    requests = random_requests(x)
    answers = crowd(server, requests)
    for request, answer in zip(requests, answers, strict=True):
        assert answer["predictions"] == request.tolist()
    counts = server.get_all_stats()["server"]
    assert counts["rows"] == 10_000 and counts["requests"] == counts["succeeded"] == len(requests)
    assert counts["executions"] < 0.9 * len(requests), "there were batches"
    assert_nothing_left(server)


def test_ten_thousand_rows_batched_equal_unbatched(serve):
    torch.manual_seed(0)
    module = models.build("tutorial_mlp")
    x = np.random.default_rng(1).standard_normal((10_000, 32), dtype=np.float32)
    with torch.inference_mode():
        alone = np.concatenate(
            [torch.softmax(module(torch.from_numpy(each)), 1) for each in x[:, None]]
        )
    with create_serving_pipeline(module) as server:
        requests = random_requests(x, seed=2)
        answers = crowd(server, requests)
        together = np.concatenate([answer["probabilities"] for answer in answers])
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
        assert server.get_all_stats()["server"]["mean_batch_rows"] > 4


@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize("door", ["sync", "async"])
def test_one_poisonous_row_in_a_batch_of_32_fails_alone(serve, how, door):
    probe = Probe()
    server = serve(Poison(probe, how), num_workers=1, max_batch_size=32)
    slow(server)
    firsts = [*range(11), POISON, *range(11, 31)]
    probe.shut()
    callers = Threads()
    callers.start(server.predict, row(1000))
    probe.wait_inside(1)
    if door == "sync":
        for place, first in enumerate(firsts):
            callers.start(server.predict, row(first))
            wait_until(lambda place=place: server._batcher.queue.rows == place + 1)
        probe.release()
        _, *outcomes = callers.outcomes()
    else:

        async def together():
            calls = [asyncio.create_task(server.apredict(row(first))) for first in firsts]
            while server._batcher.queue.rows < 32:
                await asyncio.sleep(0)
            probe.release()
            return await asyncio.gather(*calls, return_exceptions=True)

        outcomes = asyncio.run(together())
        callers.results()
    poisoned = outcomes.pop(11)
    assert isinstance(poisoned, ModelExecutionError), poisoned
    assert [answer["predictions"] for answer in outcomes] == [
        [[first, first]] for first in firsts if first != POISON
    ]
    assert probe.batches[:2] == [1, 32], "they were one batch"
    counts = server.get_all_stats()["server"]
    assert counts["failed_by_reason"] == {"ModelExecution": 1} and counts["succeeded"] == 32
    assert_nothing_left(server)


def test_ctrl_c_in_a_prediction_is_the_callers_and_the_server_goes_on(serve):
    probe = Probe()
    server = serve(Poison(probe, "interrupt"), num_workers=1)
    with pytest.raises(KeyboardInterrupt):
        server.predict(row(POISON))
    assert server.predict(row(1))["predictions"] == [[1, 1]]
    assert server.get_all_stats()["server"]["failed_by_reason"] == {"Internal": 1}
    assert_nothing_left(server)


# Overload, deadlines, cancellation


def test_ten_times_overload_is_refused_at_once_and_the_admitted_keep_their_deadline(serve):
    probe = Probe()
    server = serve(
        Gated(probe), num_workers=1, max_batch_size=4, max_queue_rows=16, timeout_ms=10_000
    )
    probe.shut()
    admitted = Threads()
    admitted.start(server.predict, row(0))
    probe.wait_inside(1)
    for place in range(16):
        admitted.start(server.predict, row(1 + place))
        wait_until(lambda place=place: server._batcher.queue.rows == place + 1)
    refusal_s = []  # of this thread's own work: what else runs on the machine does not count
    for attempt in range(160):
        began_s = time.thread_time()
        with pytest.raises(OverloadedError, match=r"16 rows wait already.*max_queue_rows"):
            if attempt % 2:
                server.predict(row(99))
            else:
                asyncio.run(server.apredict(row(99)))
        refusal_s.append(time.thread_time() - began_s)
    assert median(refusal_s) < 0.01
    assert probe.calls == 1, "none of them reached the model"
    probe.release()
    answers = admitted.results()
    assert [answer["predictions"][0][0] for answer in answers] == list(range(17))
    assert all(answer["latency_ms"] <= 10_000 for answer in answers)
    counts = server.get_all_stats()["server"]
    assert counts["failed_by_reason"] == {"Overloaded": 160} and counts["succeeded"] == 17
    assert server.predict(row(5))["predictions"] == [[5, 5]], "and the server recovers"


def test_a_storm_of_coroutines_is_answered_or_refused(serve):
    server = serve(Tagged(), max_batch_size=4, max_queue_rows=16, timeout_ms=5_000)
    outcomes = []

    async def caller(first):
        for _ in range(10):
            try:
                answer = await server.apredict(row(first))
                assert answer["predictions"] == [[first, first]] and answer["latency_ms"] <= 5_000
                outcomes.append("answered")
            except OverloadedError:
                outcomes.append("refused")
                await asyncio.sleep(0)

    async def storm():
        await asyncio.gather(*map(caller, range(160)))

    asyncio.run(storm())
    assert (
        len(outcomes) == 1600 and outcomes.count("answered") >= 16 and outcomes.count("refused") > 0
    )
    counts = server.get_all_stats()["server"]
    assert counts["succeeded"] == outcomes.count("answered")
    assert counts["failed_by_reason"] == {"Overloaded": outcomes.count("refused")}
    assert_nothing_left(server)


@pytest.mark.parametrize("door", ["sync", "async"])
def test_an_expired_request_never_reaches_the_model(serve, door):
    probe = Probe()
    server = serve(Gated(probe), num_workers=1)
    slow(server)
    probe.shut()
    first = Threads()
    first.start(server.predict, row(0))
    probe.wait_inside(1)

    def ask(timeout_ms):
        if door == "sync":
            return server.predict(row(1), timeout_ms=timeout_ms)
        return asyncio.run(server.apredict(row(1), timeout_ms=timeout_ms))

    began_s = time.perf_counter()
    with pytest.raises(DeadlineExceededError, match="timeout_ms"):
        ask(60)
    assert 0.06 <= time.perf_counter() - began_s < PATIENCE_S / 2, (
        "at its deadline, while the model still runs"
    )
    with pytest.raises(DeadlineExceededError):
        ask(1e-6)
    probe.release()
    first.results()
    assert server.predict(row(2))["predictions"] == [[2, 2]]
    assert probe.seen == [0, 2]
    assert server.get_all_stats()["server"]["failed_by_reason"] == {"DeadlineExceeded": 2}
    assert_nothing_left(server)


def test_nobody_outlives_the_deadline_by_more_than_one_execution(serve):
    """A lone request runs on its caller's thread: it is told right after its own execution."""
    probe = Probe()
    server = serve(Gated(probe), num_workers=1)
    probe.shut()
    caller = Threads()
    caller.start(server.predict, row(0), timeout_ms=30)
    probe.wait_inside(1)
    time.sleep(0.04)  # the deadline passes while the model runs
    probe.release()
    (error,) = caller.outcomes()
    assert isinstance(error, DeadlineExceededError) and "the deadline was 30 ms" in str(error)
    assert probe.calls == 1


def test_a_cancelled_coroutine_never_reaches_the_model_and_gives_its_pin_back(serve):
    probe = Probe()
    server = serve(Gated(probe), num_workers=1)
    slow(server)
    probe.shut()

    async def main():
        first = asyncio.create_task(server.apredict(row(0)))
        await asyncio.to_thread(probe.wait_inside, 1)
        calls = [asyncio.create_task(server.apredict(row(1))) for _ in range(20)]
        while server._batcher.queue.rows < 20:
            await asyncio.sleep(0)
        assert pins(server) == 21
        for call in calls:
            call.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        assert pins(server) == 1 and server._batcher.queue.rows == 0
        probe.release()
        await first

    asyncio.run(main())
    assert probe.seen == [0]
    assert server.get_all_stats()["server"]["failed_by_reason"] == {"Cancelled": 20}
    assert_nothing_left(server)


# Cold versions


@pytest.fixture
def cold(serve, gated_loads):
    """A server whose version "cold" is known but not in memory, with room for one model; loads are
    gated."""
    server = serve(Tagged(), "warm", cache_size=1)
    server.load_model("cold", Constant(7), output_type="regression", num_features=2)
    server.predict(row(0), "warm")
    assert server.health_check()["in_memory"] == ["local/warm"]
    gated_loads.shut()
    return server


def test_a_cold_version_is_loaded_once_for_all_who_wait(cold, gated_loads):
    callers = Threads()
    for _ in range(8):
        callers.start(cold.predict, row(0), "cold")

    async def together():
        return await asyncio.gather(*(cold.apredict(row(0), "cold") for _ in range(8)))

    callers.start(lambda: asyncio.run(together()))
    gated_loads.wait_inside(1)
    gated_loads.release()
    *answers, more = callers.results()
    assert [answer["predictions"] for answer in answers + more] == [[7.0]] * 16
    assert gated_loads.seen == ["cold"]
    assert_nothing_left(cold)


def test_a_coroutine_that_waits_for_a_load_is_told_its_deadline(cold, gated_loads):
    async def main():
        with pytest.raises(DeadlineExceededError, match="timeout_ms"):
            await cold.apredict(row(0), "cold", timeout_ms=50)
        assert gated_loads.inside_now == 1, "while the load still runs"
        gated_loads.release()
        return await cold.apredict(row(0), "cold")

    assert asyncio.run(main())["predictions"] == [7.0]
    assert gated_loads.seen == ["cold"], "the load went on for those who came later"
    assert cold.health_check()["status"] == "healthy", (
        "a short deadline says nothing of the version"
    )
    assert_nothing_left(cold)


@pytest.mark.parametrize("end", ["cancel", "close the loop"])
def test_who_leaves_while_a_version_loads_leaves_no_pin(cold, gated_loads, end):
    loop = asyncio.new_event_loop()
    call = loop.create_task(cold.apredict(row(0), "cold"))
    while not gated_loads.inside_now:
        loop.run_until_complete(asyncio.sleep(0.001))
    if end == "cancel":
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(call)
        loop.close()
    else:
        loop.close()
        call._log_destroy_pending = False
        call.get_coro().close()
    gated_loads.release()
    wait_until(lambda: "local/cold" in cold.health_check()["in_memory"], "the load")
    wait_until(lambda: pins(cold) == 0, "the pin's return")
    assert cold.predict(row(3), "warm")["predictions"] == [[3, 3]], "there is room again"
    assert cold.get_all_stats()["server"]["failed_by_reason"] == {"Cancelled": 1}


def test_a_load_that_nobody_waits_for_any_more_does_not_start(cold, gated_loads):
    """Two loader threads are busy; the third load is still in the line when its caller is
    cancelled."""
    cold.model_cache.max_size = 2  # a load has its room before it begins
    for version in "ab":
        cold._store.add(version, Constant(1), *_transforms(cold))
        cold._router.add(("local", version))
    gated_loads.shut()

    async def main():
        calls = [
            asyncio.create_task(cold.apredict(row(0), version)) for version in ("a", "b", "cold")
        ]
        await asyncio.to_thread(gated_loads.wait_inside, 2)
        calls[2].cancel()
        await asyncio.wait([calls[2]])
        gated_loads.release()
        await asyncio.gather(*calls[:2])

    asyncio.run(main())
    assert sorted(gated_loads.seen) == ["a", "b"]
    assert_nothing_left(cold)


def _transforms(server):
    parts = server._store.parts("cold")
    return parts.preprocessor, parts.postprocessor


def test_a_failed_load_says_why_and_recovers(cold, gated_loads, monkeypatch):
    gated_loads.release()
    parts = cold._store.parts

    def torn(version):
        if version == "cold":
            raise CorruptArtifactError(f"version {version!r} is torn")
        return parts(version)

    monkeypatch.setattr(cold._store, "parts", torn)
    for ask in (
        lambda: cold.predict(row(0), "cold"),
        lambda: asyncio.run(cold.apredict(row(0), "cold")),
    ):
        with pytest.raises(CorruptArtifactError, match="'cold'"):
            ask()
    health = cold.health_check()
    assert (health["status"], health["ready"]) == ("degraded", True) and "cold" in health[
        "problems"
    ]["local/cold"]
    assert cold.predict(row(4))["predictions"] == [[4, 4]], "what served before serves on"
    with pytest.raises(CorruptArtifactError):
        cold.set_default("cold")
    assert cold.predict(row(4))["model_version"] == "warm"
    monkeypatch.undo()
    assert cold.predict(row(0), "cold")["predictions"] == [7.0]
    assert cold.health_check()["status"] == "healthy"
    assert_nothing_left(cold)


# Many versions


@pytest.mark.parametrize("requests", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_hot_swaps_under_sixteen_threads_answer_with_exactly_one_of_the_two(serve, requests):
    server = serve(Constant(1), "one")
    server.load_model("two", Constant(2), output_type="regression", num_features=2)
    swapped, counts = threading.Event(), [0, 0]

    def check(answer):
        assert (answer["model_version"], answer["predictions"]) in (("one", [1.0]), ("two", [2.0]))
        counts[answer["model_version"] == "two"] += 1

    def thread():
        while not swapped.is_set():
            check(server.predict(row(0)))

    async def tasks():
        async def task():
            while not swapped.is_set():
                check(await server.apredict(row(0)))

        await asyncio.gather(*(task() for _ in range(4)))

    callers = Threads()
    for _ in range(14):
        callers.start(thread)
    for _ in range(2):
        callers.start(lambda: asyncio.run(tasks()))
    for swap in range(200):
        server.set_default("two" if swap % 2 == 0 else "one")
        version = server.predict(row(0))["model_version"]
        assert version == ("two" if swap % 2 == 0 else "one"), "who moved it sees it at once"
        until = (swap + 1) * requests // 200
        wait_until(lambda until=until: sum(counts) >= until, "traffic between the swaps")
    swapped.set()
    callers.results()
    assert min(counts) > 100, counts
    stats = server.get_all_stats()["server"]
    assert stats["failed"] == 0 and stats["requests"] == sum(counts) + 200 >= requests
    assert stats["requests_by_version"].keys() == {"local/one", "local/two"}
    assert_nothing_left(server)


@pytest.mark.parametrize("cache_size", [1, 5])
def test_more_versions_than_memory_all_answer_right(serve, cache_size):
    """20 versions, 5 in memory, threads and tasks at once: no deadlock, no wrong answer, never more
    than 5."""
    server = serve(cache_size=cache_size, num_workers=2)
    for value in range(20):
        server.load_model(f"v{value}", Constant(value), output_type="regression", num_features=2)
    done, most = threading.Event(), []

    def watch():
        while not done.is_set():
            most.append(len(server.model_cache) + len(server.model_cache._leaving))
            time.sleep(0.0005)

    def check(value, answer):
        assert (answer["model_version"], answer["predictions"]) == (f"v{value}", [value])

    def thread(seed):
        rng = random.Random(seed)
        for _ in range(25):
            value = rng.randrange(20)
            check(value, server.predict(row(0), f"v{value}"))

    async def tasks(seed):
        async def task(seed):
            rng = random.Random(seed)
            for _ in range(10):
                value = rng.randrange(20)
                check(value, await server.apredict(row(0), f"v{value}"))

        await asyncio.gather(*(task(seed + i) for i in range(8)))

    callers, watcher = Threads(), Threads()
    watcher.start(watch)
    for seed in range(4):
        callers.start(thread, seed)
        callers.start(lambda seed=seed: asyncio.run(tasks(100 * seed)))
    callers.results()
    done.set()
    watcher.results()
    assert max(most) == cache_size
    stats = server.get_all_stats()
    assert stats["model_cache"]["size"] == len(server.health_check()["in_memory"]) == cache_size
    assert stats["model_cache"]["evictions"] > 20 and stats["server"]["failed"] == 0
    assert len(stats["engines"]) == cache_size
    assert_nothing_left(server)


def test_the_loop_is_free_while_a_slow_model_runs(serve):
    """The warm-up measures the model; a slow one runs on a worker while the loop turns."""
    probe = Probe()

    class Slow(Gated):
        def forward(self, x):
            time.sleep(workers.INLINE_S * 2)  # its work
            return super().forward(x)

    server = serve(Slow(probe))
    assert server.engines["v1.0"].typical_s > workers.INLINE_S
    probe.shut()

    async def main():
        call = asyncio.create_task(server.apredict(row(1)))
        await asyncio.to_thread(probe.wait_inside, 1)
        turns = 0
        for _ in range(200):
            await asyncio.sleep(0)
            turns += 1
        assert turns == 200 and not call.done() and probe.inside_now == 1
        probe.release()
        return await call

    assert asyncio.run(main())["predictions"] == [[1, 1]]


# Administration


def test_many_threads_may_load_models_at_once(serve):
    server = serve(cache_size=3)
    callers = Threads()
    for value in range(12):
        callers.start(
            server.load_model,
            f"v{value}",
            Constant(value),
            output_type="regression",
            num_features=2,
        )
    callers.results()
    for value in range(12):
        assert server.predict(row(0), f"v{value}")["predictions"] == [value]
    assert len(server.health_check()["models"]["local"]["versions"]) == 12


def test_a_version_never_changes(serve):
    server = serve(Constant(1))
    # the same again is fine
    server.load_model("v1.0", Constant(1), output_type="regression", num_features=2)
    with pytest.raises(ConflictError, match=r"'v1\.0'"):
        server.load_model("v1.0", Constant(2), output_type="regression", num_features=2)
    assert server.predict(row(0))["predictions"] == [1.0]


def test_engines_are_those_in_memory_and_load_what_is_looked_up(serve):
    server = serve(Constant(1), "a", cache_size=1)
    server.load_model("b", Constant(2), output_type="regression", num_features=2)
    assert (
        list(server.engines) == ["b"]
        and server.engines["a"].version == "a"
        and list(server.engines) == ["a"]
    )
    with pytest.raises(NotFoundError, match=r"'c'.*a, b"):
        server.engines["c"]


def test_a_lease_keeps_its_model_in_memory(serve):
    server = serve(Constant(1), "a", cache_size=1)
    server._store.add("b", Constant(2), *_lease_transforms(server))
    server._router.add(("local", "b"))
    with server.lease("a") as engine:
        assert engine.version == "a"
        with pytest.raises(OverloadedError, match="cache_size"):
            server.predict(row(0), "b", timeout_ms=50)
        assert server.health_check()["status"] == "healthy", (
            "want of room is not the version's fault"
        )
        assert server.predict(row(0), "a")["predictions"] == [1.0]
    assert server.predict(row(0), "b")["predictions"] == [2.0]
    assert_nothing_left(server)


def _lease_transforms(server):
    parts = server._store.parts("a")
    return parts.preprocessor, parts.postprocessor


# The end


def public_calls(server):
    """Every public method that answers or changes something."""
    return {
        "predict": lambda: server.predict(row(0)),
        "apredict": lambda: asyncio.run(server.apredict(row(0))),
        "handle": lambda: server.handle(Request(row(0))),
        "ahandle": lambda: asyncio.run(server.ahandle(Request(row(0)))),
        "batch_predict": lambda: server.batch_predict([row(0)]),
        "load_model": lambda: server.load_model(
            "v2", Tagged(), output_type="regression", num_features=2
        ),
        "serve": lambda: server.serve(None, "digits"),
        "serve_all": lambda: server.serve_all(None),
        "set_default": lambda: server.set_default("v1.0"),
        "refresh": lambda: server.refresh(),
        "lease": lambda: server.lease("v1.0").__enter__(),
        "resolve": lambda: server.resolve(),
        "signature": lambda: server.signature(("local", "v1.0")),
        "published_metrics": lambda: server.published_metrics(("local", "v1.0")),
        "unload": lambda: server.unload("local"),
        "reload": lambda: server.reload("local"),
        "engines": lambda: server.engines["v1.0"],
        "unknown version": lambda: server.predict(row(0), "nope"),
    }


def test_a_closed_server_says_so_in_every_method(serve):
    server = serve(Tagged())
    server.close()
    for name, call in public_calls(server).items():
        with pytest.raises(ServerClosedError, match="closed"):
            call()
            pytest.fail(f"{name} answered")
    health = server.health_check()
    assert (health["status"], health["ready"], health["in_memory"]) == ("unavailable", False, [])
    assert server.get_all_stats()["server"]["failed_by_reason"] == {"ServerClosed": 6}
    public = {
        name
        for name in dir(server)
        if not name.startswith("_") and callable(getattr(ModelServer, name, None))
    }
    assert public - public_calls(server).keys() == {
        "cache_key",
        "close",
        "get_all_stats",
        "health_check",
    }, "a new method: try it here"


def test_close_is_idempotent(serve):
    with serve(Tagged()) as server:
        server.close()
        server.close()


def test_close_drains_the_admitted_and_refuses_the_new(serve):
    probe = Probe()
    server = serve(Gated(probe), num_workers=1)
    probe.shut()
    callers, closing = Threads(), Threads()
    callers.start(server.predict, row(0))
    probe.wait_inside(1)
    callers.start(server.predict, row(1))
    wait_until(lambda: server._batcher.queue.rows == 1)
    closing.start(server.close)
    wait_until(lambda: server._closed)
    with pytest.raises(ServerClosedError):
        server.predict(row(2))
    probe.release()
    closing.results()
    assert [answer["predictions"] for answer in callers.results()] == [[[0, 0]], [[1, 1]]]
    assert probe.seen == [0, 1]


def test_close_on_the_event_loop_with_requests_under_way(serve):
    server = serve(Tagged())

    async def main():
        calls = [asyncio.create_task(server.apredict(row(i))) for i in range(5)]
        await asyncio.sleep(0)
        server.close()
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(main())
    assert [outcome["predictions"] for outcome in outcomes] == [[[i, i]] for i in range(5)]


@pytest.mark.parametrize("door", ["sync", "async"])
def test_who_waits_for_a_load_when_the_server_closes_is_told_so(cold, gated_loads, door):
    callers, closing = Threads(), Threads()
    if door == "sync":
        callers.start(cold.predict, row(0), "cold")
    else:
        callers.start(lambda: asyncio.run(cold.apredict(row(0), "cold")))
    gated_loads.wait_inside(1)
    closing.start(cold.close)
    wait_until(lambda: cold._closed)
    if door == "sync":
        closing.results()  # its files go while the caller still loads
    gated_loads.release()
    closing.results()
    (error,) = callers.outcomes()
    assert isinstance(error, ServerClosedError), error
    assert_nothing_left(cold)


@pytest.mark.parametrize("version", ["cold", "unknown"])
def test_a_coroutine_that_meets_the_close_half_way_is_told_so(cold, monkeypatch, version):
    """It was let in, the server closes, and then it asks the loader threads: no error of an
    executor escapes."""
    submit = cold._loaders.submit
    monkeypatch.setattr(cold._loaders, "submit", lambda *call: (cold.close(), submit(*call)))
    with pytest.raises(ServerClosedError):
        asyncio.run(cold.apredict(row(0), version))


def test_a_hundred_servers_leave_no_thread_and_no_file():
    process, module = psutil.Process(), Tagged()

    def handles():
        return process.num_threads(), process.num_fds() if hasattr(process, "num_fds") else 0

    before = None
    for cycle in range(100):
        with serving(module) as server:
            if cycle % 10 == 0:
                slow(server)
                asyncio.run(server.apredict(row(cycle)))
            else:
                server.predict(row(cycle))
        if cycle == 20:
            before = handles()
    assert not flserving_threads()
    after = handles()
    assert after[0] <= before[0] and after[1] <= before[1]


def test_a_forgotten_server_is_collected_without_a_word():
    """Nobody called close: no warning, and no thread that holds it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        server = serving(Tagged())
        slow(server)
        asyncio.run(server.apredict(row(1)))
        server.predict(row(1))
        forgotten = weakref.ref(server)
        del server
        assert collected(forgotten)
    assert not said


def test_memory_is_flat_over_many_requests(serve):
    server = serve(Tagged(), num_workers=2)

    async def some():
        await asyncio.gather(*(server.apredict(row(i)) for i in range(32)))

    def work():
        for _ in range(15):
            asyncio.run(some())
            for i in range(32):
                server.predict(row(i))

    work()
    server.get_all_stats()
    tracemalloc.start()
    try:
        work()
        server.get_all_stats()
        first, _ = tracemalloc.get_traced_memory()
        for _ in range(3):
            work()
        server.get_all_stats()
        assert collected(lambda: None)
        last, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert last - first < 64 * 1024, "2,880 requests later"


@pytest.mark.parametrize("cached", [0, 1 << 20])
@pytest.mark.parametrize("way", ["inline", "queued", "on the loop", "on a worker"])
@pytest.mark.full
def test_an_error_keeps_no_model_in_memory(way, cached):
    """Nobody collects garbage here: an error in a circle with the frames of its traceback would
    hold the model."""
    probe, callers = Probe(), Threads()

    def ask(server):
        with pytest.raises(ModelExecutionError):
            server.predict(row(POISON))

    async def aask(server):
        calls = (server.apredict(row(POISON)) for _ in range(2))
        assert {type(each) for each in await asyncio.gather(*calls, return_exceptions=True)} == {
            ModelExecutionError
        }

    gc.collect()
    gc.disable()
    try:
        with serving(
            Poison(probe, "raise"), cache_size=1, num_workers=1, prediction_cache_bytes=cached
        ) as server:
            if way == "inline":
                ask(server)
            elif way == "queued":
                probe.shut()
                callers.start(server.predict, row(1))
                probe.wait_inside(1)
                for _ in range(2):
                    callers.start(ask, server)
                wait_until(lambda: server._batcher.queue.rows == (1 if cached else 2))
                probe.release()
                callers.results()
            else:
                if way == "on a worker":
                    slow(server)
                asyncio.run(aask(server))
            failed = weakref.ref(server.engines["v1.0"])
            assert failed() is not None
            server.load_model("other", Constant(1), output_type="regression", num_features=2)
            wait_until(lambda: failed() is None, "the end of the evicted model")
    finally:
        gc.enable()


def test_settings_of_the_process_are_stated(serve):
    serve(Tagged())
    assert torch.get_num_threads() == 1
    assert ModelServer().config == ServingConfig()
