"""The prediction cache in the path of requests: right, fresh, computed once, nobody's to spoil."""

import asyncio
import contextlib
import itertools
import random
import threading

import cachetools
import numpy as np
import pytest
import torch
from torch import nn

from flserving import ModelCache, ModelServer, PredictionCache, ServingConfig
from flserving.errors import (
    DeadlineExceededError,
    ModelExecutionError,
    OverloadedError,
    ServerClosedError,
)
from flserving.serving.cache import Lease
from serving_models import (
    POISON,
    Constant,
    Gated,
    Poison,
    Probe,
    Tagged,
    Threads,
    row,
    serving,
    wait_until,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def serve():
    made = []

    def make(*args, **kwargs):
        made.append(
            serving(*args, **{"prediction_cache_bytes": 1 << 20, "warmup_samples": 0, **kwargs})
        )
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def gated(serve):
    """A server with one worker whose model is held back, and its probe."""
    probe = Probe()
    server = serve(Poison(probe, "raise"), num_workers=1)
    server.engines["v1.0"].typical_s = 1e9
    probe.shut()
    return server, probe


def cache_stats(server):
    return server.get_all_stats()["prediction_cache"]


def followers(server, count):
    """Wait until that many requests wait for another one's computation."""
    wait_until(lambda: cache_stats(server)["shared"] >= count, "the followers")


# Right


def test_a_hit_equals_what_was_computed():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = np.random.default_rng(0).standard_normal((20, 8), dtype=np.float32)
    with (
        ModelServer() as plain,
        ModelServer(ServingConfig(prediction_cache_bytes=1 << 20)) as caching,
    ):
        for server in (plain, caching):
            server.load_model("v1", module, {"mean": x.mean(0), "std": x.std(0)}, threshold=0.5)
        for rows in (x[:1], x[1:6], x[0], x[5:1:-1]):
            first, again = caching.predict(rows), caching.predict(rows, stages=True)
            wanted = plain.predict(rows)
            for key in (
                "predictions",
                "confidences",
                "probabilities",
                "model_version",
                "model_type",
            ):
                assert first[key] == again[key] == wanted[key]
            assert again["stages_ms"]["infer"] == again["stages_ms"]["preprocess"] == 0, (
                "no model ran"
            )
            assert sum(again["stages_ms"].values()) == pytest.approx(again["latency_ms"], abs=1e-9)
        assert (cache_stats(caching)["hits"], cache_stats(caching)["misses"]) == (5, 3), (
            "x[0] and x[:1] are one input"
        )
        assert cache_stats(plain) is None, "it is off by default"
        assert caching.get_all_stats()["server"]["executions"] == 3


@pytest.mark.parametrize("first", ["sync", "async", "batch"])
def test_answers_belong_to_their_callers(serve, first):
    """Whoever writes into an answer changes nobody else's, neither of its own batch nor from the
    cache."""
    server = serve(Tagged())

    async def both():
        return await asyncio.gather(server.apredict(row(1)), server.apredict(row(2)))

    ways = {
        "sync": lambda: [server.predict(row(1))],
        "async": lambda: asyncio.run(both())[:1],
        "batch": lambda: server.batch_predict([row(1)]),
    }
    for _ in range(3):
        (answer,) = ways[first]()
        assert answer["predictions"] == [[1, 1]]
        answer["predictions"][0][0] = 666
        answer["predictions"].append("mine")
    assert server.predict(row(1))["predictions"] == [[1, 1]]
    assert server.get_all_stats()["server"]["executions"] == 1


@pytest.mark.parametrize("door", ["sync", "async"])
def test_an_array_that_changes_while_it_waits_spoils_nothing(gated, door):
    server, probe = gated
    callers, mine = Threads(), row(5)
    callers.start(server.predict, row(0))
    probe.wait_inside(1)
    ask = (
        (lambda: server.predict(mine))
        if door == "sync"
        else (lambda: asyncio.run(server.apredict(mine)))
    )
    callers.start(ask)
    wait_until(lambda: server._batcher.queue.rows == 1)
    mine[:] = 6
    probe.release()
    _, answer = callers.results()
    assert answer["predictions"] == [[5, 5]], "what was sent is what was answered"
    assert server.predict(row(5))["predictions"] == [[5, 5]]
    assert server.predict(row(6))["predictions"] == [[6, 6]]
    assert probe.seen == [0, 5, 6]


def test_nothing_is_shared_that_may_differ(serve):
    """Equal weights under other code, thresholds a hair apart, other statistics, other outputs:
    each its own entry."""
    torch.manual_seed(0)
    linear = nn.Linear(2, 2)
    x = np.array([[0.3, -0.2]], np.float32)
    confidence = float(torch.softmax(linear(torch.from_numpy(x)).detach(), 1).max())
    below, above = confidence * (1 - 1e-6), confidence * (1 + 1e-6)
    versions = {
        "plain": (linear, {}),
        "relu": (nn.Sequential(linear, nn.ReLU()), {}),
        "tanh": (nn.Sequential(linear, nn.Tanh()), {}),
        "below": (linear, {"threshold": below}),
        "above": (linear, {"threshold": above}),
        "centred": (linear, {"feature_stats": {"mean": [1, 1], "std": [1, 1]}}),
        "scaled": (linear, {"feature_stats": {"mean": [1, 1], "std": [2, 2]}}),
        "values": (linear, {"output_type": "regression"}),
        "other": (nn.Linear(2, 2), {}),
    }
    server, wanted = serve(), {}
    for version, (module, options) in versions.items():
        server.load_model(version, module, **options)
        with ModelServer() as alone:
            alone.load_model("alone", module, **options)
            wanted[version] = alone.predict(x)
    for _ in range(2):
        for version in versions:
            answer = server.predict(x, version)
            for key in ("predictions", "confidences", "probabilities"):
                assert answer.get(key) == wanted[version].get(key), version
    assert (wanted["below"]["predictions"], wanted["above"]["predictions"]) != ([-1], [-1])
    assert wanted["above"]["predictions"] == [-1]
    assert (cache_stats(server)["misses"], cache_stats(server)["hits"]) == (9, 9)


def test_a_thousand_promotions_never_give_a_stale_answer(serve):
    server = serve(Constant(0), "v0")
    for value in (1, 2):
        server.load_model(f"v{value}", Constant(value), output_type="regression", num_features=2)

    async def ask():
        return await server.apredict(row(0))

    with asyncio.Runner() as runner:
        for promotion in range(1000):
            value = promotion % 3
            server.set_default(f"v{value}")
            answer = server.predict(row(0)) if promotion % 2 else runner.run(ask())
            assert (answer["predictions"], answer["model_version"]) == ([value], f"v{value}")
    assert (cache_stats(server)["hits"], cache_stats(server)["misses"]) == (997, 3)


def test_promotions_under_traffic_never_give_a_stale_answer(serve):
    """Threads that hit, miss and follow, while the default moves: the value always fits the
    version, and the mover always gets what it has just promoted."""
    server, done = serve(Constant(0), "v0"), threading.Event()
    server.load_model("v1", Constant(1), output_type="regression", num_features=2)

    def check(answer):
        assert answer["predictions"] == [int(answer["model_version"][1:])]
        return answer["predictions"][0]

    def thread(seed):
        rng = random.Random(seed)
        while not done.is_set():
            check(server.predict(row(rng.randrange(300))))

    callers = Threads()
    for seed in range(6):
        callers.start(thread, seed)
    for promotion in range(300):
        server.set_default(f"v{promotion % 2}")
        assert check(server.predict(row(promotion))) == promotion % 2
    done.set()
    callers.results()
    assert server.get_all_stats()["server"]["failed"] == 0


def test_an_evicted_model_comes_back_to_its_entries(serve):
    server = serve(Constant(1), "v1", cache_size=1)
    assert server.predict(row(0), "v1")["predictions"] == [1.0]
    server.load_model("v2", Constant(2), output_type="regression", num_features=2)
    assert server.predict(row(0), "v2")["predictions"] == [2.0]
    assert server.predict(row(0), "v1")["predictions"] == [1.0]
    assert cache_stats(server)["hits"] == 1 and server.get_all_stats()["model_cache"]["loads"] == 3


@pytest.mark.parametrize("skew", [0.7, 1.1])
def test_the_hit_ratio_is_that_of_a_reference_lru(serve, skew):
    """A Zipf trace of single rows, whose entries have equal sizes: cachetools' LRU of as many
    entries hits as often."""
    entries, rows = 40, 400
    nbytes = 2 * np.float32().nbytes + PredictionCache.OVERHEAD
    server = serve(Tagged(), prediction_cache_bytes=entries * nbytes + nbytes - 1)
    popularity = np.arange(1, rows + 1) ** -skew
    trace = np.random.default_rng(0).choice(rows, 4_000, p=popularity / popularity.sum())
    reference, hits = cachetools.LRUCache(entries), 0
    for first in trace.tolist():
        hits += first in reference
        reference[first] = reference.get(first, first)
        assert server.predict(row(first))["predictions"] == [[first, first]]
    stats = cache_stats(server)
    assert (stats["hits"], stats["misses"]) == (hits, len(trace) - hits)
    assert stats["size"] == entries and stats["evictions"] == len(trace) - hits - entries
    assert 0.1 < hits / len(trace) < 0.9, "the trace tells them apart"


# Computed once


@pytest.mark.parametrize(("threads", "tasks"), [(8, 0), (0, 8), (5, 6)])
def test_identical_requests_at_once_are_computed_once(gated, threads, tasks):
    server, probe = gated
    callers = Threads()
    for _ in range(threads):
        callers.start(server.predict, row(1))

    async def together():
        return await asyncio.gather(*(server.apredict(row(1)) for _ in range(tasks)))

    if tasks:
        callers.start(lambda: asyncio.run(together()))
    probe.wait_inside(1)
    followers(server, threads + tasks - 1)
    probe.release()
    answers = list(itertools.chain(*(a if isinstance(a, list) else [a] for a in callers.results())))
    assert [answer["predictions"] for answer in answers] == [[[1, 1]]] * (threads + tasks)
    assert probe.calls == 1
    assert server.get_all_stats()["server"]["succeeded"] == threads + tasks


def lead(server, callers, door, **kwargs):
    """Start the request that will lead, from a thread or as a task of a loop in one."""
    if door == "sync":
        callers.start(server.predict, row(1), **kwargs)
    else:
        callers.start(lambda: asyncio.run(server.apredict(row(1), **kwargs)))


@pytest.mark.parametrize("leader", ["sync", "async"])
def test_when_the_leader_runs_out_of_time_a_follower_takes_over(gated, leader):
    server, probe = gated
    blocker, leading, callers = Threads(), Threads(), Threads()
    blocker.start(server.predict, row(0))
    probe.wait_inside(1)
    lead(server, leading, leader, timeout_ms=2000)  # until then the others have come
    wait_until(lambda: server._batcher.queue.rows == 1)
    for door in ("sync", "async", "sync", "async"):
        lead(server, callers, door)
    followers(server, 4)
    (error,) = leading.outcomes()
    assert isinstance(error, DeadlineExceededError)
    probe.release()
    assert [answer["predictions"] for answer in callers.results()] == [[[1, 1]]] * 4
    assert probe.seen == [0, 1], "the leader never ran, one follower did"
    blocker.results()


@pytest.mark.parametrize("when", ["queued", "running"])
def test_when_the_leader_is_cancelled_a_follower_takes_over(gated, when):
    server, probe = gated
    callers, blocker = Threads(), Threads()

    async def main():
        if when == "queued":
            blocker.start(server.predict, row(0))
            await asyncio.to_thread(probe.wait_inside, 1)
        leader = asyncio.create_task(server.apredict(row(1)))
        await asyncio.sleep(0)
        if when == "running":
            await asyncio.to_thread(probe.wait_inside, 1)
        followed = [asyncio.create_task(server.apredict(row(1))) for _ in range(3)]
        await asyncio.sleep(0)
        for door in ("sync", "async"):
            lead(server, callers, door)
        await asyncio.to_thread(followers, server, 5)
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        probe.release()
        return await asyncio.gather(*followed)

    answers = asyncio.run(main()) + callers.results()
    assert [answer["predictions"] for answer in answers] == [[[1, 1]]] * 5
    assert probe.seen == ([0, 1] if when == "queued" else [1, 1])
    blocker.results()
    assert not server.prediction_cache._flights


@pytest.mark.parametrize("door", ["sync", "async"])
def test_when_the_leader_is_refused_a_follower_takes_over(serve, monkeypatch, door):
    server, callers, refused = serve(Tagged()), Threads(), []
    compute = server._compute

    def refuse_once(request):
        if not refused:
            refused.append(request)
            followers(server, 3)
            raise OverloadedError("full")
        return compute(request)

    monkeypatch.setattr(server, "_compute", refuse_once)
    callers.start(server.predict, row(1))
    wait_until(lambda: refused)
    for _ in range(3):
        lead(server, callers, door)
    error, *answers = callers.outcomes()
    assert isinstance(error, OverloadedError)
    assert [answer["predictions"] for answer in answers] == [[[1, 1]]] * 3


def test_the_models_error_goes_to_all_and_is_not_kept(gated):
    server, probe = gated
    callers = Threads()

    async def ask():
        return await server.apredict(row(POISON))

    callers.start(server.predict, row(POISON))
    probe.wait_inside(1)
    for number in range(6):
        callers.start(server.predict, row(POISON)) if number % 2 else callers.start(
            lambda: asyncio.run(ask())
        )
    followers(server, 6)
    probe.release()
    outcomes = callers.outcomes()
    assert [type(outcome) for outcome in outcomes] == [ModelExecutionError] * 7
    assert probe.calls == 1
    with pytest.raises(ModelExecutionError):
        server.predict(row(POISON))
    assert probe.calls == 2, "an error is not an answer to keep"
    assert server.get_all_stats()["server"]["failed_by_reason"] == {"ModelExecution": 8}


@pytest.mark.parametrize("door", ["sync", "async"])
def test_a_follower_keeps_its_own_deadline_and_leaves_the_leader_alone(gated, door):
    server, probe = gated
    callers, late = Threads(), Threads()
    callers.start(server.predict, row(1))
    probe.wait_inside(1)
    lead(server, late, door, timeout_ms=50)
    (error,) = late.outcomes()
    assert isinstance(error, DeadlineExceededError) and "timeout_ms" in str(error)
    assert probe.inside_now == 1, "the leader is still at it"

    async def cancelled():
        follower = asyncio.create_task(server.apredict(row(1)))
        await asyncio.sleep(0)
        follower.cancel()
        with pytest.raises(asyncio.CancelledError):
            await follower

    asyncio.run(cancelled())
    probe.release()
    assert callers.results()[0]["predictions"] == [[1, 1]]
    assert server.predict(row(1))["predictions"] == [[1, 1]] and probe.calls == 1


def test_a_follower_whose_loop_is_closed_disturbs_nobody(gated, caplog):
    server, probe = gated
    callers, loop = Threads(), asyncio.new_event_loop()
    callers.start(server.predict, row(1))
    probe.wait_inside(1)
    follower = loop.create_task(server.apredict(row(1)))
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(asyncio.sleep(0))
    followers(server, 1)
    loop.close()
    probe.release()
    assert callers.results()[0]["predictions"] == [[1, 1]]
    follower._log_destroy_pending = False
    follower.get_coro().close()
    assert not caplog.records
    assert server.get_all_stats()["server"]["failed_by_reason"] == {"Cancelled": 1}


def test_followers_of_a_request_that_the_close_failed_are_told(serve):
    probe = Probe()
    server = serve(Gated(probe), num_workers=1)
    callers, blocker = Threads(), Threads()
    probe.shut()
    blocker.start(server.predict, row(0))
    probe.wait_inside(1)
    for _ in range(3):
        callers.start(server.predict, row(1))
    followers(server, 2)
    wait_until(lambda: server._batcher.queue.rows == 1)
    server.close(drain_s=0.02)
    assert [type(outcome) for outcome in callers.outcomes()] == [ServerClosedError] * 3
    probe.release()
    assert blocker.results()[0]["predictions"] == [[0, 0]]


def test_a_crowd_over_few_rows_gets_right_answers_and_leaves_no_flight(serve):
    """Hits, misses, followers, short deadlines and cancellations at once, over a cache that evicts
    all the time.

    A deadline of 10 us passes, or is refused at once where others wait already; one of 9 s is kept.
    """
    server = serve(
        Tagged(), num_workers=2, prediction_cache_bytes=8 * (PredictionCache.OVERHEAD + 8)
    )
    sent = []

    def missed(timeout_ms):
        return (DeadlineExceededError, OverloadedError) if timeout_ms < 1 else ()

    def thread(seed):
        rng = random.Random(seed)
        for _ in range(150):
            first = rng.randrange(20)
            sent.append(1)
            timeout_ms = rng.choice([0.01, 9e3])
            with contextlib.suppress(*missed(timeout_ms)):
                assert server.predict(row(first), timeout_ms=timeout_ms)["predictions"] == [
                    [first, first]
                ]

    async def task(seed):
        rng = random.Random(seed)
        for _ in range(60):
            first = rng.randrange(20)
            sent.append(1)
            timeout_ms = rng.choice([0.01, 9e3])
            call = asyncio.create_task(server.apredict(row(first), timeout_ms=timeout_ms))
            await asyncio.sleep(0)
            if rng.random() < 0.1:
                call.cancel()
            with contextlib.suppress(asyncio.CancelledError, *missed(timeout_ms)):
                assert (await call)["predictions"] == [[first, first]]

    async def tasks(seed):
        await asyncio.gather(*(task(seed + i) for i in range(8)))

    callers = Threads()
    for seed in range(4):
        callers.start(thread, seed)
    for seed in (100, 200):
        callers.start(lambda seed=seed: asyncio.run(tasks(seed)))
    callers.results()
    assert not server.prediction_cache._flights
    stats = server.get_all_stats()
    assert stats["server"]["requests"] == len(sent)
    assert stats["prediction_cache"]["nbytes"] <= stats["prediction_cache"]["max_bytes"]
    assert stats["server"]["failed_by_reason"].keys() <= {
        "DeadlineExceeded",
        "Overloaded",
        "Cancelled",
    }


# Whose


def test_no_caller_finds_what_another_one_asked(serve):
    """Callers by credential, clients, and those without a name (who are one): the same rows from
    each, in any order. A hit is told by the count of hits and of executions, not by the clock."""
    server = serve(Tagged())
    names = [{"caller": "token a"}, {"caller": "token b"}, {"client": "c-1"}, {"client": "c-2"}, {}]
    asked, rng = set(), random.Random(0)
    for _ in range(200):
        who, first = rng.randrange(len(names)), rng.randrange(6)
        hits = cache_stats(server)["hits"]
        assert server.predict(row(first), **names[who])["predictions"] == [[first, first]]
        assert cache_stats(server)["hits"] - hits == ((who, first) in asked)
        asked.add((who, first))
    assert server.get_all_stats()["server"]["executions"] == len(asked)
    assert server.predict(row(0), client="c-1", caller="client c-1") and len(asked) == 30


def test_one_callers_inputs_do_not_push_out_anothers(serve):
    nbytes = 2 * np.float32().nbytes + PredictionCache.OVERHEAD
    server = serve(Tagged(), prediction_cache_bytes=40 * nbytes)
    for first in range(10):
        server.predict(row(first), caller="quiet")
    for first in range(500):
        server.predict(row(first), caller="flood")
    hits = cache_stats(server)["hits"]
    for first in range(10):
        server.predict(row(first), caller="quiet")
    assert cache_stats(server)["hits"] - hits == 10


# -------------------------------------------------------- what an experimenter may put in its place


def test_another_key_can_be_tried_by_overriding_cache_key():
    """One that forgets the input gives everybody the first answer: so it is the override that is
    asked."""

    class Forgetful(ModelServer):
        def cache_key(self, request):
            return request.key, request.rows.shape

    with Forgetful(ServingConfig(prediction_cache_bytes=1 << 20)) as server:
        server.load_model("v1.0", nn.Linear(2, 3))
        first = server.predict([0.5, -1.5])
        assert server.predict([7.0, 3.0])["probabilities"] == first["probabilities"]
        assert cache_stats(server)["hits"] == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_models_are_kept_in_the_cache_that_a_server_is_given(asynchronous):
    """One with three methods of its own is enough to answer."""
    acquired, released = [], []

    class Kept(ModelCache):
        def acquire(self, key):
            acquired.append(key)

        def load(self, key, load, timeout_s=60, size=None):
            return Lease(load(), 0)

        def release(self, entry):
            released.append(entry)

    with ModelServer(ServingConfig(cache_size=7), model_cache=Kept(2)) as server:
        server.load_model("v1.0", nn.Linear(2, 3))
        came = len(acquired)
        answer = (
            asyncio.run(server.apredict([1.0, 2.0])) if asynchronous else server.predict([1.0, 2.0])
        )
        assert answer["model_version"] == "v1.0"
        assert acquired[came:] == [("local", "v1.0")] and len(released) == len(acquired)
        assert server.model_cache.max_size == 2
