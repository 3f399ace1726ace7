"""The batcher with real threads and event loops, over a lane without torch that blocks until the
test releases it."""

import asyncio
import contextlib
import functools
import gc
import math
import os
import random
import threading
import time
import weakref
from types import SimpleNamespace

import psutil
import pytest

from flserving.errors import (
    DeadlineExceededError,
    ModelExecutionError,
    OverloadedError,
    ServerClosedError,
)
from flserving.serving.batching import workers
from flserving.serving.batching.policy import QueuedRequest
from flserving.serving.batching.workers import Batcher
from flserving.serving.config import ServingConfig
from serving_models import PATIENCE_S, POISON, Probe, Threads, flserving_threads, wait_until

pytestmark = pytest.mark.timeout(60)
# deadlines: on a machine that is busy elsewhere the first may pass in the queue
REACHES_THE_MODEL_S = (0.05, 0.5, 5.0)


class Lane:
    """Answers every payload with itself, tagged; fails as a whole where one payload is
    ``POISON``."""

    def __init__(self, name="lane", typical_s=0.0, error=RuntimeError):
        self.name, self.typical_s, self.error, self.probe = name, typical_s, error, Probe()
        self.runners = []  # names of the threads that ran it

    def execute(self, payloads):
        with self.probe.inside(payloads):
            self.runners.append(threading.current_thread().name)
            if POISON in payloads:
                raise self.error("poison")
            return [(self.name, payload) for payload in payloads]


class Harness:
    """A batcher and how tests call it."""

    def __init__(self, **settings):
        self.executions = []
        self.batcher = Batcher(
            ServingConfig(**settings), lambda lane, rows, _: self.executions.append((rows, lane))
        )
        self.threads = Threads()

    def arguments(self, lane, payload, rows=1, timeout_s=PATIENCE_S):
        now_s = time.perf_counter()
        return lane, payload, rows, now_s, now_s + timeout_s

    def run(self, *args, **kwargs):
        return self.batcher.run(*self.arguments(*args, **kwargs))

    async def arun(self, *args, **kwargs):
        return await self.batcher.arun(*self.arguments(*args, **kwargs))

    def start(self, *args, **kwargs):
        return self.threads.start(self.run, *args, **kwargs)

    def queue_up(self, lane, payloads, **kwargs):
        """One blocked caller a payload, in the order of the payloads."""
        for payload in payloads:
            waiting = self.batcher.queue.rows
            self.start(lane, payload, **kwargs)
            wait_until(
                lambda waiting=waiting: self.batcher.queue.rows > waiting, "the caller in the queue"
            )

    def assert_idle(self):
        """Nothing is left of any request."""
        wait_until(lambda: self.batcher.busy == 0, "the end of all executions")
        assert self.batcher.queue.rows == 0 and not self.batcher.queue._lines


@pytest.fixture
def harness():
    made = []

    def make(**settings):
        made.append(Harness(**settings))
        return made[-1]

    yield make
    for each in made:
        each.batcher.close(drain_s=5)
        assert not each.batcher._threads, "a worker outlived its batcher"


@pytest.fixture
def short_idle(monkeypatch):
    monkeypatch.setattr(workers, "IDLE_S", 0.02)


# Who runs what


def test_a_lone_caller_runs_its_own_request(harness):
    h, lane = harness(), Lane()
    assert [h.run(lane, i) for i in range(5)] == [("lane", i) for i in range(5)]
    assert set(lane.runners) == {threading.current_thread().name}
    assert not h.batcher._threads, "no worker was needed, none was started"


def test_what_a_run_on_the_callers_thread_took_is_learned_and_of_one_that_failed_nothing(harness):
    h, lane, broken = harness(), Lane(), Lane()
    h.run(lane, 1)
    with pytest.raises(RuntimeError, match="poison"):
        h.run(broken, POISON)
    assert h.batcher._costs.usual_s(lane, 1) > 0 and not h.batcher._costs.usual_s(broken, 1)


def test_who_is_held_when_it_closes_is_refused(harness):
    h, lane = (
        harness(
            num_workers=1, max_batch_size=2, batching="hold_until_full", max_wait_time_ms=60_000
        ),
        Lane(),
    )
    lane.probe.shut()
    h.queue_up(lane, [0])
    h.start(lane, 1)
    lane.probe.wait_inside(1)
    h.queue_up(lane, [2])
    h.batcher.close(drain_s=0)
    lane.probe.release()
    *answered, refused = h.threads.outcomes()
    assert answered == [("lane", 0), ("lane", 1)] and isinstance(refused, ServerClosedError)


def test_a_batcher_is_loaded_where_another_request_would_wait(harness):
    busy, holding, lane = (
        harness(num_workers=1),
        harness(batching="hold_until_full", max_wait_time_ms=60_000),
        Lane(),
    )
    assert not busy.batcher.loaded() and not holding.batcher.loaded()
    lane.probe.shut()
    busy.start(lane, 1)
    lane.probe.wait_inside(1)
    holding.queue_up(lane, [2])
    assert busy.batcher.loaded() and not busy.batcher.queue, "all workers are at work"
    assert holding.batcher.loaded() and not holding.batcher.busy, "somebody waits already"
    lane.probe.release()


def test_a_lone_coroutine_runs_on_its_loop(harness):
    h, lane = harness(), Lane()
    assert asyncio.run(h.arun(lane, 1)) == ("lane", 1)
    assert lane.runners == [threading.current_thread().name] and not h.batcher._threads


def test_callers_of_one_turn_of_the_loop_share_batches(harness):
    h, lane = harness(max_batch_size=8), Lane()

    async def main():
        return await asyncio.gather(*(h.arun(lane, i) for i in range(20)))

    assert asyncio.run(main()) == [("lane", i) for i in range(20)]
    assert lane.probe.batches == [8, 8, 4], "in order of arrival, as full as they can be"
    assert [rows for rows, _ in h.executions] == [8, 8, 4]


@pytest.mark.parametrize("typical_s", [workers.INLINE_S * 1.01, math.inf])
def test_a_slow_lane_runs_on_a_worker_and_the_loop_goes_on(harness, typical_s):
    h, lane = harness(), Lane(typical_s=typical_s)
    lane.probe.shut()

    async def main():
        calls = [asyncio.create_task(h.arun(lane, i)) for i in range(3)]
        await asyncio.to_thread(lane.probe.wait_inside, 1)
        turns = 0
        for _ in range(100):  # the model blocks now; a loop that it held would not come this far
            await asyncio.sleep(0)
            turns += 1
        assert not any(call.done() for call in calls)
        lane.probe.release()
        assert await asyncio.gather(*calls) == [("lane", i) for i in range(3)]
        return turns

    assert asyncio.run(main()) == 100
    assert set(lane.runners) == {"flserving-worker"} and lane.probe.batches == [3]


def test_a_request_that_needs_many_batches_does_not_run_on_the_loop(harness):
    h, lane = harness(max_batch_size=4), Lane(typical_s=workers.INLINE_S / 10)
    asyncio.run(h.arun(lane, 1, rows=40))
    asyncio.run(h.arun(lane, 2, rows=41))
    assert lane.runners == [threading.current_thread().name, "flserving-worker"]


def test_who_arrives_while_all_workers_are_busy_forms_the_next_batch(harness):
    h, lane = harness(num_workers=1, max_batch_size=4), Lane()
    lane.probe.shut()
    h.start(lane, 100)
    lane.probe.wait_inside(1)
    h.queue_up(lane, range(6))
    assert lane.probe.batches == [1]
    lane.probe.release()
    assert h.threads.results() == [("lane", i) for i in (100, *range(6))]
    assert lane.probe.batches == [1, 4, 2]
    assert lane.probe.seen == [100, *range(6)], "first in, first out"
    h.assert_idle()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_never_more_executions_than_workers_and_as_many_as_there_is_work_for(harness, num_workers):
    h, lane = harness(num_workers=num_workers, max_batch_size=1), Lane()
    lane.probe.shut()
    for i in range(num_workers):
        h.start(lane, i)
    lane.probe.wait_inside(num_workers)
    h.queue_up(lane, range(100, 110))
    assert lane.probe.inside_now == num_workers
    for done in range(10):
        lane.probe.release(1)
        wait_until(
            lambda done=done: lane.probe.calls == num_workers + 1 + done, "the next execution"
        )
        assert lane.probe.inside_now == num_workers, "no worker is idle while a request waits"
    lane.probe.release()
    assert len(h.threads.results()) == num_workers + 10
    assert lane.probe.most_inside == num_workers
    h.assert_idle()


def test_several_lanes_run_at_once_when_several_workers_are_idle(harness):
    """Coroutines fill three lanes in one turn; three workers run them side by side, each alone."""
    h, lanes = harness(num_workers=3), [Lane(name, typical_s=1.0) for name in "abc"]
    for lane in lanes:
        lane.probe.shut()

    async def main():
        calls = [asyncio.create_task(h.arun(lane, i)) for i in range(4) for lane in lanes]
        for lane in lanes:
            await asyncio.to_thread(lane.probe.wait_inside, 1)
        for lane in lanes:
            lane.probe.release()
        return await asyncio.gather(*calls)

    assert asyncio.run(main()) == [(name, i) for i in range(4) for name in "abc"]
    assert all(lane.probe.batches == [4] for lane in lanes)


def test_hold_until_full_waits_for_the_batch_or_for_the_limit(harness):
    h, lane = harness(batching="hold_until_full", max_batch_size=3, max_wait_time_ms=60_000), Lane()
    h.queue_up(lane, [0, 1])
    assert lane.probe.calls == 0
    h.start(lane, 2)
    assert h.threads.results() == [("lane", i) for i in range(3)]
    assert lane.probe.batches == [3]
    brief = harness(batching="hold_until_full", max_batch_size=3, max_wait_time_ms=50)
    began_s = time.perf_counter()
    assert brief.run(lane, 7) == ("lane", 7)
    assert time.perf_counter() - began_s >= 0.05
    assert asyncio.run(brief.arun(lane, 8)) == ("lane", 8)


@pytest.mark.parametrize("door", ["sync", "async"])
def test_hold_until_full_holds_nobody_past_the_deadline(harness, door):
    """An idle server with a hold that is longer than the caller's patience: nothing can come of
    holding on."""
    h, lane = harness(batching="hold_until_full", max_batch_size=3, max_wait_time_ms=60_000), Lane()
    for i in range(3):
        answer = (
            h.run(lane, i, timeout_s=1)
            if door == "sync"
            else asyncio.run(h.arun(lane, i, timeout_s=1))
        )
        assert answer == ("lane", i)


def test_a_thread_hears_of_its_deadline_while_the_model_runs_on(harness):
    """Nobody can call a thread back from a model, so only one that is known to be quick enough runs
    on it."""
    h, lane = harness(), Lane()
    lane.probe.shut()
    for timeout_s in REACHES_THE_MODEL_S:
        lane.typical_s = 0.6 * timeout_s  # in time, but not surely
        with pytest.raises(
            DeadlineExceededError, match=rf"the deadline was {timeout_s * 1e3:g} ms: .*timeout_ms"
        ):
            h.run(lane, "slow", timeout_s=timeout_s)
        if lane.probe.inside_now:
            break
    assert lane.probe.inside_now == 1, "it came back before the model did"
    lane.probe.release()
    h.assert_idle()
    assert h.run(lane, "quick", timeout_s=PATIENCE_S) == ("lane", "quick")
    assert lane.runners == ["flserving-worker", threading.current_thread().name]


def test_an_unknown_model_does_not_run_on_a_callers_thread_until_it_is_known(harness):
    h, lane = harness(), Lane(typical_s=math.inf)
    assert [h.run(lane, i) for i in range(3)] == [("lane", i) for i in range(3)]
    assert lane.runners == ["flserving-worker", *[threading.current_thread().name] * 2]


# Failures


@pytest.mark.parametrize("door", ["sync", "async"])
@pytest.mark.parametrize("place", [0, 15, 31])
def test_one_poisonous_request_fails_alone(harness, door, place):
    h, lane = harness(num_workers=1, max_batch_size=32), Lane(typical_s=1.0)
    payloads = [POISON if i == place else 100 + i for i in range(32)]
    lane.probe.shut()
    if door == "sync":
        h.start(lane, 0)
        lane.probe.wait_inside(1)
        h.queue_up(lane, payloads)
        lane.probe.release()
        outcomes = h.threads.outcomes()[1:]
    else:

        async def main():
            return await asyncio.gather(
                *(h.arun(lane, payload) for payload in payloads), return_exceptions=True
            )

        lane.probe.release()
        outcomes = asyncio.run(main())
    assert isinstance(outcomes.pop(place), RuntimeError)
    assert outcomes == [("lane", payload) for payload in payloads if payload != POISON]
    assert lane.probe.calls <= (door == "sync") + 1 + 2 * 5, "halving: two executions a level"
    h.assert_idle()


def test_a_lane_that_always_fails_costs_less_than_two_executions_a_request(harness):
    h, lane = harness(num_workers=1), Lane(typical_s=1.0)

    async def main():
        return await asyncio.gather(
            *(h.arun(lane, POISON) for _ in range(32)), return_exceptions=True
        )

    assert [type(outcome) for outcome in asyncio.run(main())] == [RuntimeError] * 32
    assert lane.probe.calls == 63


def test_a_retry_leaves_out_who_is_late_by_then(harness):
    """Half of the batch is past its deadline when the failed batch is retried: only the rest
    reaches the model."""
    h, lane = harness(num_workers=1, max_batch_size=4), Lane()
    lane.probe.shut()
    h.start(lane, 0)
    lane.probe.wait_inside(1)
    h.queue_up(lane, [POISON, 1], timeout_s=PATIENCE_S)
    h.queue_up(lane, [2, 3], timeout_s=1)  # long enough for the batch of four to begin
    lane.probe.release(1)
    wait_until(lambda: lane.probe.calls == 2, "the batch of four")
    wait_until(
        lambda: sum(isinstance(each, DeadlineExceededError) for each in h.threads._outcomes) == 2
    )
    lane.probe.release()
    first, poisoned, second, *late = h.threads.outcomes()
    assert (first, second) == (("lane", 0), ("lane", 1)) and isinstance(poisoned, RuntimeError)
    assert {type(error) for error in late} == {DeadlineExceededError}
    assert lane.probe.batches == [1, 4, 2, 1, 1]
    assert lane.probe.seen == [0, POISON, 1, 2, 3, POISON, 1, POISON, 1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_callers_thread_is_the_callers(harness, error):
    h, lane = harness(num_workers=1), Lane(error=error)
    with pytest.raises(error):
        h.run(lane, POISON)
    assert h.run(lane, 1) == ("lane", 1), "the slot came back"
    h.assert_idle()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_worker_reaches_every_caller_and_the_worker_goes_on(harness, error):
    h, lane = harness(num_workers=1), Lane(error=error, typical_s=1.0)
    lane.probe.shut()
    h.start(lane, 0)
    lane.probe.wait_inside(1)
    h.queue_up(lane, [1, POISON, 2])
    lane.probe.release()
    first, *rest = h.threads.outcomes()
    assert first == ("lane", 0)
    assert all(isinstance(outcome, ModelExecutionError) for outcome in rest), rest
    assert error.__name__ in str(rest[0])
    assert asyncio.run(h.arun(lane, 5)) == ("lane", 5), "a worker still serves"
    h.assert_idle()


def test_an_interrupt_on_the_loop_leaves_nobody_waiting(harness):
    """Ctrl-C lands in a batch that the event loop runs, while a thread's request waits for its
    turn."""
    h, lane, other = harness(num_workers=1), Lane(error=KeyboardInterrupt), Lane("other")
    outcomes = []

    async def caller(payload):
        try:
            return await h.arun(lane, payload)
        except BaseException as error:
            outcomes.append(type(error))
            raise

    async def main():
        lane.probe.shut()
        calls = [asyncio.create_task(caller(payload)) for payload in (1, POISON)]

        def meanwhile():
            lane.probe.wait_inside(1)
            h.queue_up(other, ["thread"])
            lane.probe.release()

        asyncio.get_running_loop().run_in_executor(None, meanwhile)
        await asyncio.gather(*calls)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert h.threads.results() == [("other", "thread")]
    assert len(outcomes) == 2
    h.assert_idle()


def test_an_interrupted_waiter_does_not_run(harness, monkeypatch):
    """Ctrl-C while a thread waits in the queue: its request leaves the queue with it."""
    h, lane = harness(num_workers=1), Lane()
    lane.probe.shut()
    h.start(lane, 0)
    lane.probe.wait_inside(1)

    class Interrupted:
        def acquire(self, timeout=None):
            if timeout is not None:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(
            workers, "threading", SimpleNamespace(**{**vars(threading), "Lock": Interrupted})
        )
        with pytest.raises(KeyboardInterrupt):
            h.run(lane, 1)
    assert h.batcher.queue.rows == 0
    lane.probe.release()
    assert h.threads.results() == [("lane", 0)] and lane.probe.seen == [0]


def test_an_answer_that_came_with_the_deadline_is_an_answer(harness, monkeypatch):
    """The wait ends without the lock, yet the worker is done by then: the result is there, and
    nobody says too late."""
    h, lane, lock = harness(num_workers=1), Lane(), threading.Lock

    class JustMissed:
        def __init__(self):
            self.lock = lock()
            self.release = self.lock.release

        def acquire(self, timeout=None):
            self.lock.acquire()
            return timeout is None

    lane.probe.shut()
    h.start(lane, 0)
    lane.probe.wait_inside(1)
    monkeypatch.setattr(
        workers, "threading", SimpleNamespace(**{**vars(threading), "Lock": JustMissed})
    )
    h.queue_up(lane, [1])
    monkeypatch.undo()
    lane.probe.release()
    assert h.threads.results() == [("lane", 0), ("lane", 1)]


# Deadlines, overload, cancellation


@pytest.mark.parametrize(
    ("arrival_s", "error", "told"),
    [
        (9.0, OverloadedError, "usually takes 500 ms, the deadline leaves 250 ms: try again"),
        (9.75, OverloadedError, "usually takes 500 ms, the deadline leaves 250 ms: try again"),
        (
            10.0,
            DeadlineExceededError,
            "usually takes 500 ms, the deadline was 250 ms: raise timeout_ms",
        ),
    ],
    ids=["it waited too long", "it could just have", "it never could"],
)
def test_who_cannot_end_in_time_is_told_the_two_numbers(harness, arrival_s, error, told):
    h, lane = harness(), Lane()
    h.batcher.queue.learn(lane, 1, 9.0, 9.5)
    said = h.batcher._hopeless(QueuedRequest(lane, 1, 1, arrival_s, 10.25), 10.0)
    assert type(said) is error and told in str(said)


def usually_takes(h, lane, seconds):
    now_s = time.perf_counter()
    h.batcher.queue.learn(lane, 1, now_s - seconds, now_s)


@pytest.mark.parametrize(("timeout_s", "by_worker"), [(19, True), (25, False)])
def test_a_caller_runs_what_surely_ends_in_time_itself(harness, timeout_s, by_worker):
    """Twice the usual time, of ten seconds here, is sure: nobody can be called back from a
    model."""
    h, lane = harness(), Lane()
    usually_takes(h, lane, 10)
    assert h.run(lane, 1, timeout_s=timeout_s) == ("lane", 1)
    assert (lane.runners != [threading.current_thread().name]) is by_worker


def test_who_could_end_only_after_what_runs_now_is_refused_at_once(harness):
    h, lane = harness(num_workers=1), Lane()
    usually_takes(h, lane, 100)
    lane.probe.shut()
    h.start(lane, 0, timeout_s=150)
    lane.probe.wait_inside(1)
    with pytest.raises(
        OverloadedError, match=r"the answer would take about .* the deadline leaves"
    ):
        h.run(lane, 1, timeout_s=150)
    lane.probe.release()
    assert h.threads.results() == [("lane", 0)]


def test_who_cannot_end_in_time_any_more_hears_of_it_when_its_turn_comes(harness):
    """Not at its deadline, which is far."""
    h, blocker, lane = harness(num_workers=1), Lane("blocker"), Lane()
    blocker.probe.shut()
    h.start(blocker, 0)
    blocker.probe.wait_inside(1)
    h.queue_up(lane, [1], timeout_s=1000)
    usually_takes(h, lane, 10_000)
    blocker.probe.release()
    _, late = h.threads.outcomes()
    assert (
        isinstance(late, DeadlineExceededError)
        and "usually takes" in str(late)
        and not lane.runners
    )


@pytest.mark.parametrize("payloads", [[POISON], [1, POISON, 2]], ids=["alone", "among others"])
def test_of_a_batch_that_failed_nothing_is_learned(harness, payloads):
    h, blocker, lane = harness(num_workers=1), Lane("blocker"), Lane()
    blocker.probe.shut()
    h.start(blocker, 0)
    blocker.probe.wait_inside(1)
    h.queue_up(lane, payloads)
    blocker.probe.release()
    h.threads.outcomes()
    h.assert_idle()
    assert not any(h.batcher._costs.usual_s(lane, rows) for rows in (1, 2, 3))


async def test_who_makes_room_for_another_client_hears_of_it_at_once(harness):
    h, lane, threads = harness(num_workers=1, max_queue_rows=4), Lane(), Threads()
    lane.probe.shut()
    threads.start(h.run, lane, 0)
    lane.probe.wait_inside(1)
    ask = functools.partial(h.batcher.arun, *h.arguments(lane, 1))
    flood = [asyncio.create_task(ask(client="flood")) for _ in range(4)]
    await asyncio.sleep(0)
    quiet = asyncio.create_task(ask(client="quiet"))
    with pytest.raises(OverloadedError):
        await flood[3]
    lane.probe.release()
    assert await asyncio.gather(quiet, *flood[:3]) == [("lane", 1)] * 4


@pytest.mark.parametrize("door", ["sync", "async"])
def test_an_expired_request_never_reaches_the_model(harness, door):
    h, lane = harness(num_workers=1), Lane(typical_s=1.0)
    lane.probe.shut()
    h.start(lane, 0)
    lane.probe.wait_inside(1)
    began_s = time.perf_counter()
    with pytest.raises(
        DeadlineExceededError,
        match=r"no answer after \d{2,5} ms, the deadline was 50 ms: .*timeout_ms",
    ):
        if door == "sync":
            h.run(lane, 1, timeout_s=0.05)
        else:
            asyncio.run(h.arun(lane, 1, timeout_s=0.05))
    assert time.perf_counter() - began_s >= 0.05, "told at the deadline, not before"
    assert lane.probe.inside_now == 1, "and not only when the model is free"
    for late in (0.0, -1.0):
        with pytest.raises(DeadlineExceededError):
            h.run(lane, 2, timeout_s=late)
    lane.probe.release()
    assert h.threads.results() == [("lane", 0)]
    h.assert_idle()
    assert lane.probe.seen == [0]


def test_the_loop_tells_each_its_own_deadline(harness):
    """Later requests with earlier deadlines: one timer serves them all, and rings for the
    earliest."""
    h, lane = harness(num_workers=1), Lane(typical_s=1.0)
    lane.probe.shut()
    told = []

    async def caller(name, timeout_s):
        with contextlib.suppress(DeadlineExceededError):
            await h.arun(lane, name, timeout_s=timeout_s)
            return
        told.append(name)

    async def main():
        first = asyncio.create_task(h.arun(lane, "answered"))
        await asyncio.to_thread(lane.probe.wait_inside, 1)
        calls = [
            caller("last", 0.25),
            caller("middle", 0.15),
            caller("first", 0.05),
            caller("waits", PATIENCE_S),
        ]
        calls = [asyncio.create_task(call) for call in calls]
        await asyncio.wait(calls[:3])
        lane.probe.release()
        await asyncio.wait(calls[3:])
        return await first

    assert asyncio.run(main()) == ("lane", "answered")
    assert told == ["first", "middle", "last"]
    assert lane.probe.seen == ["answered", "waits"]
    h.assert_idle()


def test_a_running_request_is_told_its_deadline_while_the_model_runs(harness):
    h, lane = harness(num_workers=1), Lane(typical_s=1.0)
    lane.probe.shut()

    async def main():
        for timeout_s in REACHES_THE_MODEL_S:
            with pytest.raises(DeadlineExceededError):
                await h.arun(lane, 1, timeout_s=timeout_s)
            if lane.probe.inside_now:
                break
        assert lane.probe.inside_now == 1
        lane.probe.release()
        return await h.arun(lane, 2)

    assert asyncio.run(main()) == ("lane", 2)
    h.assert_idle()


def test_overload_is_refused_at_once_and_the_admitted_are_answered(harness):
    h, lane = harness(num_workers=1, max_queue_rows=8, max_batch_size=4), Lane()
    lane.probe.shut()
    h.start(lane, 0)
    lane.probe.wait_inside(1)
    h.queue_up(lane, range(1, 9))
    for _ in range(20):
        began_s = time.perf_counter()
        with pytest.raises(OverloadedError, match="8 rows wait already, the limit is 8"):
            h.run(lane, 99)
        with pytest.raises(OverloadedError):
            asyncio.run(h.arun(lane, 99))
        assert time.perf_counter() - began_s < PATIENCE_S / 2, "it did not wait for the model"
    assert lane.probe.calls == 1
    lane.probe.release()
    assert h.threads.results() == [("lane", i) for i in range(9)]
    assert h.run(lane, 10) == ("lane", 10), "and the server recovers"
    h.assert_idle()


@pytest.mark.parametrize("when", ["before its turn ends", "in the queue", "while it runs"])
def test_a_cancelled_coroutine_leaves_nothing(harness, when):
    h, lane = harness(num_workers=1), Lane(typical_s=1.0)
    lane.probe.shut()

    async def main():
        first = None
        if when == "in the queue":
            first = asyncio.create_task(h.arun(lane, "first"))
            await asyncio.to_thread(lane.probe.wait_inside, 1)
        call = asyncio.create_task(h.arun(lane, "cancelled"))
        await asyncio.sleep(0)
        if when == "in the queue":
            await asyncio.sleep(0)
            assert h.batcher.queue.rows == 1
        if when == "while it runs":
            await asyncio.to_thread(lane.probe.wait_inside, 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert h.batcher.queue.rows == 0, "it left the queue at once"
        lane.probe.release()
        assert first is None or await first == ("lane", "first")
        assert await h.arun(lane, "next") == ("lane", "next")

    asyncio.run(main())
    h.assert_idle()
    assert not h.batcher._here.side.waiting
    ran = {
        # it may end before the coroutine hears of it
        "before its turn ends": [["next"], ["cancelled", "next"]],
        "in the queue": [["first", "next"]],
        "while it runs": [["cancelled", "next"]],
    }
    assert lane.probe.seen in ran[when]


def abandon(tasks):
    """Drop tasks of a closed loop, as the garbage collector does, without its complaint about
    them."""
    for task in tasks:
        task._log_destroy_pending = False
        task.get_coro().close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_loop_that_closes_early_harms_nobody_else(harness, fails):
    """Its requests are in one batch with those of a thread: their answers go nowhere, the thread's
    arrive."""
    h, lane = harness(num_workers=1), Lane(typical_s=1.0)
    lane.probe.shut()
    loop = asyncio.new_event_loop()
    running, queued = (
        loop.create_task(h.arun(lane, payload))
        for payload in ("running", POISON if fails else "queued")
    )

    async def until_it_runs():
        await asyncio.to_thread(lane.probe.wait_inside, 1)

    loop.run_until_complete(until_it_runs())
    late = loop.create_task(h.arun(lane, "late"))
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    h.queue_up(lane, ["thread"])
    lane.probe.release()
    assert h.threads.results() == [("lane", "thread")]
    assert lane.probe.batches == [2, *[1, 1] * fails, 2], (
        "running and queued (halved if it fails); late and thread"
    )
    h.assert_idle()
    abandon([running, queued, late])


def test_requests_of_a_dead_loop_do_not_fill_the_queue_for_ever(harness):
    """A loop is closed under tasks that nobody cancels: their requests wait, and nobody was to look
    at them again."""
    h, lane = harness(num_workers=1, max_queue_rows=4), Lane()
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(h.arun(lane, i)) for i in range(4)]
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    assert h.batcher.queue.rows == 4 and not any(task.done() for task in tasks)

    def answered():
        with contextlib.suppress(OverloadedError):
            return asyncio.run(h.arun(lane, "new")) == ("lane", "new")
        return False

    wait_until(answered, "an answer")
    h.assert_idle()
    abandon(tasks)


# Threads come and go


def test_workers_leave_when_idle_and_come_back(harness, short_idle):
    h, lane = harness(num_workers=2), Lane(typical_s=1.0)
    for attempt in range(5):
        assert asyncio.run(h.arun(lane, attempt)) == ("lane", attempt)
        assert h.batcher._threads or attempt
        wait_until(lambda: not h.batcher._threads, "the workers' leave")
    assert set(lane.runners) == {"flserving-worker"}


def test_work_that_arrives_as_a_worker_leaves_is_done(harness, monkeypatch):
    monkeypatch.setattr(workers, "IDLE_S", 0.0005)
    h, lane = harness(num_workers=2), Lane(typical_s=1.0)
    rng = random.Random(0)

    async def main():
        for i in range(300):
            assert await h.arun(lane, i) == ("lane", i)
            await asyncio.sleep(rng.choice([0, 0.0004, 0.0006]))

    asyncio.run(main())


def test_a_hundred_batchers_leave_no_thread_and_no_file():
    process, before = psutil.Process(), None
    for cycle in range(100):
        h, lane = Harness(num_workers=2), Lane(typical_s=1.0)
        assert asyncio.run(h.arun(lane, cycle)) == ("lane", cycle)
        h.batcher.close()
        h.batcher.close()
        if cycle == 10:
            before = (
                process.num_threads(),
                len(os.listdir("/proc/self/fd")) if os.path.exists("/proc") else 0,
            )
    assert not flserving_threads()
    # a thread that was joined is one of the system's for a moment more
    wait_until(lambda: process.num_threads() <= before[0], "the end of every thread")
    assert (len(os.listdir("/proc/self/fd")) if os.path.exists("/proc") else 0) <= before[1]


def test_a_forgotten_batcher_is_collected_once_its_workers_left(short_idle):
    h, lane = Harness(num_workers=2), Lane(typical_s=1.0)
    asyncio.run(h.arun(lane, 1))
    forgotten = weakref.ref(h.batcher)
    h.batcher._here.side = None  # the harness's own thread lives on
    del h

    def gone():
        gc.collect()
        return forgotten() is None

    wait_until(gone, "its collection")


# Closing


@pytest.mark.parametrize("held_by", ["a caller", "a worker"])
def test_close_drains_the_admitted_and_refuses_the_new(harness, held_by):
    h, lane = harness(num_workers=1, max_batch_size=2), Lane(typical_s=1.0)
    lane.probe.shut()
    if held_by == "a caller":
        h.start(lane, 0)
    else:
        loop_thread = Threads()
        loop_thread.start(lambda: asyncio.run(h.arun(lane, 0)))
    lane.probe.wait_inside(1)
    h.queue_up(lane, [1, 2, 3])
    closing = Threads()
    closing.start(h.batcher.close)
    wait_until(lambda: h.batcher.closed)
    for call in (lambda: h.run(lane, 9), lambda: asyncio.run(h.arun(lane, 9))):
        with pytest.raises(ServerClosedError, match="closed"):
            call()
    lane.probe.release()
    closing.results()
    assert h.threads.results()[-3:] == [("lane", i) for i in (1, 2, 3)]
    assert lane.probe.seen == [0, 1, 2, 3]
    assert not h.batcher._threads
    h.assert_idle()


def test_close_fails_what_could_not_be_drained_in_time(harness):
    h, lane = harness(num_workers=1), Lane(typical_s=1.0)
    lane.probe.shut()

    async def main():
        call = asyncio.create_task(h.arun(lane, "running"))
        await asyncio.to_thread(lane.probe.wait_inside, 1)
        queued = asyncio.create_task(h.arun(lane, "queued"))
        await asyncio.sleep(0)
        h.queue_up(lane, ["thread"])
        h.batcher.close(drain_s=0.05)  # on the loop itself
        with pytest.raises(ServerClosedError, match="before this request ran"):
            await queued
        lane.probe.release()
        assert await call == ("lane", "running"), "what runs is finished"

    asyncio.run(main())
    (error,) = h.threads.outcomes()
    assert isinstance(error, ServerClosedError)
    assert lane.probe.seen == ["running"]
    wait_until(lambda: not h.batcher._threads, "the worker's leave")


def test_close_on_the_loop_answers_what_waits_there(harness):
    """Coroutines whose turn has not ended when their loop closes the batcher: a worker answers
    them."""
    h, lane = harness(num_workers=1), Lane()

    async def main():
        calls = [asyncio.create_task(h.arun(lane, i)) for i in range(3)]
        # runs before the end of their turn does
        asyncio.get_running_loop().call_soon(h.batcher.close)
        return await asyncio.gather(*calls)

    assert asyncio.run(main()) == [("lane", i) for i in range(3)]


def test_close_is_quick_when_workers_wait_for_a_slot(harness, monkeypatch):
    """Callers hold both slots and both workers sleep: one runs what waits, and neither sleeps on
    after that."""
    monkeypatch.setattr(workers, "IDLE_S", 10 * PATIENCE_S)
    h, lane = harness(num_workers=2, max_batch_size=1), Lane(typical_s=1.0)
    lane.probe.shut()

    async def two():
        calls = [asyncio.create_task(h.arun(lane, i)) for i in range(2)]
        await asyncio.to_thread(lane.probe.wait_inside, 2)
        lane.probe.release(2)
        await asyncio.gather(*calls)

    asyncio.run(two())
    wait_until(lambda: h.batcher._sleeping == 2, "two idle workers")
    for i in range(2):
        h.start(lane, i)
    lane.probe.wait_inside(2)
    h.queue_up(lane, [2])
    closing, began_s = Threads(), time.perf_counter()
    closing.start(h.batcher.close, drain_s=PATIENCE_S)
    wait_until(lambda: h.batcher.closed)
    lane.probe.release()
    closing.results()
    assert time.perf_counter() - began_s < PATIENCE_S
    assert h.threads.results() == [("lane", i) for i in range(3)]


def test_close_waits_for_a_worker_that_started_meanwhile(harness):
    """Callers hold both slots; each that comes free while the batcher drains gets a worker, and
    close knows both."""
    h, held, first, second = harness(num_workers=2), Lane("held"), Lane("first"), Lane("second")
    for lane in (held, first, second):
        lane.probe.shut()
    for _ in range(2):
        h.start(held, 0)
    held.probe.wait_inside(2)
    h.queue_up(first, [1])
    h.queue_up(second, [2])
    closing = Threads()
    thread = closing.start(h.batcher.close, drain_s=PATIENCE_S)
    wait_until(lambda: h.batcher.closed)
    for lane in (first, second):
        held.probe.release(1)
        lane.probe.wait_inside(1)
    first.probe.release()
    wait_until(lambda: len(h.batcher._threads) == 1, "the first worker's leave")
    thread.join(0.05)
    assert thread.is_alive(), "one request still runs"
    second.probe.release()
    closing.results()
    assert h.threads.results()[2:] == [("first", 1), ("second", 2)]


def test_a_mixed_crowd_gets_its_own_answers(harness, short_idle):
    """Threads and coroutines, three lanes, random sizes, cancellations and short deadlines: nothing
    lost or swapped."""
    h = harness(num_workers=2, max_batch_size=5, max_queue_rows=200)
    lanes = [Lane("fast"), Lane("slow", typical_s=1.0), Lane("edge", typical_s=workers.INLINE_S)]
    answered, failed = [], []

    def check(lane, payload, answer):
        assert answer == (lane.name, payload)
        answered.append(payload)

    def thread(seed):
        rng = random.Random(seed)
        for i in range(100):
            lane, payload = rng.choice(lanes), (seed, i)
            try:
                check(
                    lane,
                    payload,
                    h.run(lane, payload, rows=rng.randint(1, 7), timeout_s=rng.choice([0.001, 9])),
                )
            except (DeadlineExceededError, OverloadedError) as error:
                failed.append(error)

    async def task(seed):
        rng = random.Random(seed)
        for i in range(100):
            lane, payload = rng.choice(lanes), (seed, i)
            call = asyncio.create_task(
                h.arun(lane, payload, rng.randint(1, 7), rng.choice([0.001, 9]))
            )
            if rng.random() < 0.1:
                await asyncio.sleep(0)
                call.cancel()
            try:
                check(lane, payload, await call)
            except (DeadlineExceededError, OverloadedError, asyncio.CancelledError) as error:
                failed.append(error)

    async def tasks(seeds):
        await asyncio.gather(*map(task, seeds))

    callers = Threads()
    for seed in range(6):
        callers.start(thread, seed)
    for loop in range(2):
        callers.start(lambda loop=loop: asyncio.run(tasks(range(10 + 10 * loop, 20 + 10 * loop))))
    callers.results()
    assert len(answered) + len(failed) == 2600 and len(set(answered)) == len(answered)
    h.assert_idle()
    assert sum(lane.probe.calls for lane in lanes) == len(h.executions)
    ran = [payload for lane in lanes for payload in lane.probe.seen]
    assert len(set(ran)) == len(ran), "no request ran twice"


def test_a_worker_with_a_dead_threads_number_is_not_on_its_loop(harness):
    """The system gives a thread's number to the next one: who once ran a loop is told apart by the
    loop."""
    lane, tasks = Lane(typical_s=1.0), []

    def die(h):
        loop = asyncio.new_event_loop()
        tasks.append(loop.create_task(h.arun(lane, "zombie")))
        loop.call_soon(loop.stop)
        loop.run_forever()
        loop.close()

    for attempt in range(10):
        h, dying = harness(num_workers=1), Threads()
        dying.start(die, h)
        dying.results()
        assert h.batcher.queue.rows == 1
        h.start(lane, attempt)
        assert h.threads.results() == [("lane", attempt)]
    abandon(tasks)
