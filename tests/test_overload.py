"""Overload in virtual time: callers who come whether or not the others were answered, and a model of known speed."""

import heapq
import math
import random

import pytest

from flserving.batching import BatchQueue, Request
from flserving.errors import OverloadedError

DEADLINES_S = (0.06, 0.1, 0.25, 1.0, 5.0)
WARM_S = 1.0  # the first second is not counted: nobody knows the model yet


class Model:
    """A batch of n rows takes ``fixed_s + n * row_s``, give or take a tenth."""

    def __init__(self, fixed_s, row_s, max_batch_size, workers):
        self.fixed_s, self.row_s = fixed_s, row_s
        self.max_batch_size, self.workers = max_batch_size, workers

    @property
    def capacity(self):
        """Rows a second when every batch is full."""
        return self.workers * self.max_batch_size / self.mean_s(self.max_batch_size)

    def mean_s(self, rows):
        return self.fixed_s + self.row_s * rows


class Run:
    """Drives the queue as the batcher does. ``rates``: requests a second of each client."""

    def __init__(self, model, rates, deadline_s, seconds, seed=0, max_rows=4096):
        self.model, self.rng, self.now_s, self.seconds = model, random.Random(seed), 0.0, seconds
        self.queue = BatchQueue(model.max_batch_size, 0.1, max_rows, servers=model.workers)
        self.running = []  # (end, a number against ties, start, batch, planned end)
        self.came, self.answered = dict.fromkeys(rates, 0), dict.fromkeys(rates, 0)
        self.in_time = self.late = self.batches = 0
        self.order = []  # the arrivals of what ran, in order
        coming = [(self.rng.expovariate(rate), client) for client, rate in rates.items()]
        heapq.heapify(coming)
        while coming:
            at_s, client = heapq.heappop(coming)
            self._until(at_s)
            self.now_s = at_s
            self._arrive(client, deadline_s)
            after_s = at_s + self.rng.expovariate(rates[client])
            if after_s < seconds:
                heapq.heappush(coming, (after_s, client))
        self._until(math.inf)
        self.goodput = self.in_time / (seconds - WARM_S)

    def _arrive(self, client, deadline_s):
        self.came[client] += self.now_s > WARM_S
        try:
            self.queue.push(Request(self.model, client, 1, self.now_s, self.now_s + deadline_s, client))
        except OverloadedError:
            return
        self._start()

    def _until(self, at_s):
        while self.running and self.running[0][0] <= at_s:
            self.now_s, _, start_s, batch, planned_s = heapq.heappop(self.running)
            self.queue.ends_s.remove(planned_s)
            self.queue.learn(self.model, len(batch), start_s, self.now_s)
            for request in batch:
                in_time = self.now_s <= request.deadline_s
                self.answered[request.client] += in_time and request.arrival_s > WARM_S
                if WARM_S < self.now_s <= self.seconds:
                    self.in_time += in_time
                    self.late += not in_time
            self._start()

    def _start(self):
        while len(self.running) < self.model.workers and (batch := self.queue.take(self.now_s)[0]):
            self.order += [request.arrival_s for request in batch]
            self.batches += 1
            took_s = self.model.mean_s(len(batch)) * math.exp(self.rng.gauss(0, 0.1))
            planned_s = self.now_s + self.queue.usual_s(self.model, len(batch), self.now_s)
            self.queue.ends_s.append(planned_s)
            heapq.heappush(self.running, (self.now_s + took_s, self.batches, self.now_s, batch, planned_s))


MODELS = [  # seconds a batch, seconds a row, rows a batch, workers
    (0.04, 0.0, 4, 1),
    (0.02, 0.005, 4, 1),
    (0.0, 0.01, 8, 1),
    (0.04, 0.0, 1, 4),
]


@pytest.mark.parametrize(("fixed_s", "row_s", "max_batch_size", "workers"), MODELS)
@pytest.mark.parametrize("deadline_s", DEADLINES_S)
def test_overload_leaves_nine_tenths_of_the_best_goodput(deadline_s, fixed_s, row_s, max_batch_size, workers):
    """Twice and ten times what the model can do: as many are answered in time as at the best load, and few
    are run in vain. First in, first out would answer next to none: it runs who has waited longest, who is late by then.
    """
    model = Model(fixed_s, row_s, max_batch_size, workers)
    seconds = WARM_S + 3
    best = max(Run(model, {None: load * model.capacity}, deadline_s, seconds).goodput for load in (0.7, 1.0))
    for load in (2, 10):
        run = Run(model, {None: load * model.capacity}, deadline_s, seconds)
        assert run.goodput >= 0.9 * min(best, model.capacity), f"{load}x: {run.goodput:.0f} of {best:.0f} a second"
        assert run.late <= 0.2 * run.in_time


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("deadline_s", [0.25, 5.0])
def test_without_overload_all_are_answered_first_in_first_out(deadline_s, workers):
    model = Model(0.01, 0.001, 8, workers)
    run = Run(model, {None: 0.5 * model.capacity}, deadline_s, seconds=5)
    assert run.order == sorted(run.order)
    assert run.answered == run.came


def test_the_goodput_comes_back_as_soon_as_the_model_does():
    """One batch took a hundred times as long as usual: nobody is refused for that in the next second."""
    queue, model = BatchQueue(4, 0.1, 100), Model(0.01, 0.0, 4, 1)
    for start_s in (0.0, 0.1, 0.2):
        queue.learn(model, 1, start_s, start_s + 0.01)
    queue.learn(model, 1, 0.3, 1.3)
    assert queue.usual_s(model, 1, 1.3) <= 0.02


def test_an_estimate_that_nothing_confirms_is_forgotten():
    """A model was slow once, so that its callers' deadline could not be kept: they are not refused for ever."""
    queue, model = BatchQueue(4, 0.1, 100), Model(0.0, 0.0, 4, 1)
    queue.learn(model, 1, 0.0, 0.5)

    def taken(now_s):
        queue.push(request := Request(model, None, 1, now_s, now_s + 0.1))
        return queue.take(now_s) == ([request], [])

    assert not taken(0.6)
    assert not taken(2.0)
    assert taken(4.0)


def test_what_cannot_end_in_time_is_refused_as_it_comes():
    queue, model = BatchQueue(2, 0.1, 100), Model(0.1, 0.0, 2, 1)
    queue.learn(model, 2, 9.0, 9.1)
    queue.ends_s.append(10.1)  # one batch runs
    for _ in range(4):
        queue.push(Request(model, None, 1, 10.0, 11.0))
    with pytest.raises(OverloadedError, match=r"4 rows wait already: .* about 400 ms, the deadline leaves 300 ms"):
        queue.push(Request(model, None, 1, 10.0, 10.3))
    queue.push(Request(model, None, 1, 10.0, 10.5))
    unknown = Model(0.1, 0.0, 2, 1)
    queue.push(Request(unknown, None, 1, 10.0, 10.01))


def test_who_is_too_late_makes_room_and_who_is_not_keeps_his_place():
    """The batch of four ends in 100 ms: the one who cannot wait for that is told now, the others run in order."""
    queue, model = BatchQueue(4, 0.1, 100), Model(0.1, 0.0, 4, 1)
    leaves_s = [0.5, 0.05, 0.4, 0.3, 0.2]
    requests = [Request(model, number, 1, 10.0, 10.0 + left_s) for number, left_s in enumerate(leaves_s)]
    for request in requests:
        queue.push(request)
    queue.learn(model, 1, 9.9, 10.0)  # not known before
    first, late, *others = requests
    assert queue.take(10.0) == ([first, *others], [late])
