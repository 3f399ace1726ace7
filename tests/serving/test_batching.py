"""The batch queue in virtual time, beside a reference that keeps one flat list and searches it."""

import itertools
import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from budget import examples
from flserving.errors import OverloadedError
from flserving.lab.queueing.simulate import simulate_batching
from flserving.serving.batching.policy import MARGIN, BatchQueue, QueuedRequest

POLICIES = ("work_conserving", "hold_until_full")
# not exact in binary: sums and differences round
TENTHS = st.integers(0, 30).map(lambda tenths: tenths / 10)


class Server:
    """A lane with a name of its own; figures of cost are kept by lane."""


class Reference:
    """What the queue promises, in the simplest form: one list of waiting requests, in order of
    arrival."""

    def __init__(self, max_batch_size, max_wait_s, max_rows, policy):
        self.max_batch_size, self.max_wait_s, self.max_rows, self.policy = (
            max_batch_size,
            max_wait_s,
            max_rows,
            policy,
        )
        self.waiting = []

    @property
    def rows(self):
        return sum(request.rows for request in self.waiting)

    def line(self, lane):
        return [request for request in self.waiting if request.engine == lane]

    def due_s(self, lane):
        """When a lane is ready by waiting alone; held back on purpose, nobody waits for more than
        half of his time."""
        if self.policy == "work_conserving":
            return self.line(lane)[0].arrival_s + self.max_wait_s
        return min(
            request.arrival_s
            + min(self.max_wait_s, max(0.0, (request.deadline_s - request.arrival_s) / 2))
            for request in self.line(lane)
        )

    def ready(self, now_s, draining):
        """Lanes of which the queue may serve any."""
        lanes = {request.engine for request in self.waiting}
        due_s = {lane: self.due_s(lane) for lane in lanes}
        rows = {lane: sum(request.rows for request in self.line(lane)) for lane in lanes}
        overdue = {lane for lane in lanes if now_s >= due_s[lane]}
        if overdue:
            return {lane for lane in overdue if due_s[lane] == min(due_s.values())}
        fullest = {lane for lane in lanes if rows[lane] == max(rows.values())}
        if self.policy == "work_conserving" or draining:
            return fullest
        return {lane for lane in fullest if rows[lane] >= self.max_batch_size}

    def check_take(self, now_s, draining, batch, expired):
        """Replay one ``take``: remove what it answered, and fail where it broke a promise."""
        expired, batch = deque(expired), list(batch)
        while ready := self.ready(now_s, draining):
            assert expired or batch, f"{ready} are ready, and take answered nothing"
            lane = expired[0].engine if expired else batch[0].engine
            assert lane in ready, f"served lane {lane}, ready were {ready}"
            fit, late, rows = [], [], 0
            for request in self.line(lane):
                if fit and rows + request.rows > self.max_batch_size:
                    break
                if request.deadline_s <= now_s:
                    late.append(request)
                else:
                    fit.append(request)
                    rows += request.rows
            assert [expired.popleft() for _ in late] == late
            self.waiting = [
                request for request in self.waiting if request not in fit and request not in late
            ]
            if fit:
                assert batch == fit
                batch.clear()
                break
        assert not batch and not expired, "take answered something that was not ready"


class QueueMachine(RuleBasedStateMachine):
    """Any order of arrivals, departures, batches and time: the queue and the reference agree after
    every step."""

    @initialize(
        max_batch_size=st.integers(1, 6),
        max_wait_s=TENTHS,
        max_rows=st.integers(1, 30),
        policy=st.sampled_from(POLICIES),
    )
    def start(self, max_batch_size, max_wait_s, max_rows, policy):
        self.queue = BatchQueue(max_batch_size, max_wait_s, max_rows, policy)
        self.reference = Reference(max_batch_size, max_wait_s, max_rows, policy)
        self.now_s = 7.0
        self.ended = set()

    def request(self, lane, rows, age_s, patience_s):
        return QueuedRequest(lane, None, rows, self.now_s - age_s, self.now_s + patience_s)

    @rule(
        lane=st.sampled_from("abc"), rows=st.integers(1, 4), age_s=st.sampled_from([0.0, 0.0, 0.3]),
        patience_s=st.sampled_from([0.1, 0.7, 100.0]),
    )  # fmt: skip
    def push(self, lane, rows, age_s, patience_s):
        request, waiting = self.request(lane, rows, age_s, patience_s), self.reference.rows
        if waiting and waiting + rows > self.reference.max_rows:
            with pytest.raises(OverloadedError, match=f"{waiting} rows wait already, the limit is"):
                self.queue.push(request)
        else:
            self.queue.push(request)
            self.reference.waiting.append(request)

    @rule(lane=st.sampled_from("abc"), rows=st.integers(5, 50))
    def push_large(self, lane, rows):
        """A request above the batch size, and maybe above the bound: let into an empty queue
        alone."""
        request = self.request(lane, rows, 0, 100)
        if self.reference.waiting and self.reference.rows + rows > self.reference.max_rows:
            with pytest.raises(OverloadedError):
                self.queue.push(request)
        else:
            self.queue.push(request)
            self.reference.waiting.append(request)

    @precondition(lambda self: self.reference.waiting)
    @rule(data=st.data())
    def drop(self, data):
        request = data.draw(st.sampled_from(self.reference.waiting))
        self.queue.drop(request)
        self.queue.drop(request)  # a second time changes nothing
        assert request.state == "dropped"
        self.reference.waiting.remove(request)
        self.end([request])

    @rule(seconds=TENTHS)
    def pass_time(self, seconds):
        self.now_s += seconds

    @precondition(lambda self: self.reference.waiting)
    @rule()
    def wait_until_ready(self):
        """At ``next_ready_s`` something is ready; a moment earlier only what is full (or anything,
        unless held)."""
        at_s = self.queue.next_ready_s()
        assert at_s == min(
            self.reference.due_s(lane) for lane in {r.engine for r in self.reference.waiting}
        )
        self.now_s = max(self.now_s, at_s)
        assert self.queue.first_ready(self.now_s) is not None
        assert (self.queue.first_ready(math.nextafter(at_s, -math.inf)) is not None) == bool(
            self.reference.ready(math.nextafter(at_s, -math.inf), False)
        )

    @rule(draining=st.booleans())
    def take(self, draining):
        first = self.queue.first_ready(self.now_s, draining)
        batch, expired = self.queue.take(self.now_s, draining)
        self.reference.check_take(self.now_s, draining, batch, expired)
        assert {r.state for r in batch} <= {"running"} and {r.state for r in expired} <= {"dropped"}
        if batch and not expired:
            assert batch[0] is first
        for request in batch:
            self.queue.drop(request)  # too late: it runs
            assert request.state == "running"
        self.end([*batch, *expired])

    def end(self, requests):
        for request in requests:
            assert request not in self.ended, "one request left the queue twice"
            self.ended.add(request)

    @invariant()
    def accounts_agree(self):
        assert self.queue.rows == self.reference.rows >= 0
        assert bool(self.queue) == bool(self.reference.waiting)
        assert (self.queue.next_ready_s() is None) == (not self.reference.waiting)
        assert all(request.state == "waiting" for request in self.reference.waiting)

    def teardown(self):
        if not hasattr(self, "queue"):
            return
        while self.reference.waiting:  # nothing is lost: whoever drains gets all of it
            batch, expired = self.queue.take(self.now_s, draining=True)
            self.reference.check_take(self.now_s, True, batch, expired)
        assert not self.queue and self.queue.take(self.now_s, draining=True) == ([], [])


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = examples(150, stateful_step_count=40)


def test_a_taken_or_dropped_request_is_not_kept():
    """A queue that nobody takes from holds the waiting ones and nothing else, however many came and
    went."""
    queue = BatchQueue(4, 1.0, 1000)
    head = QueuedRequest("a", None, 1, 0.0, 100.0)
    queue.push(head)
    for _ in range(500):
        gone = QueuedRequest("a", None, 1, 0.0, 0.1)
        queue.push(gone)
        queue.drop(gone)
    assert queue.rows == 1
    assert sum(len(line) for line in queue._lines.values()) == 1
    assert queue.take(5.0) == ([head], [])
    assert not queue._lines and not queue._engine_rows


def test_a_dropped_request_leaves_its_place_to_the_next():
    queue = BatchQueue(4, 1.0, 100)
    first, gone, last = (QueuedRequest("a", None, rows, 0.0, 9.0) for rows in (2, 3, 2))
    for request in (first, gone, last):
        queue.push(request)
    queue.drop(gone)
    assert queue.take(0.0) == ([first, last], [])


def of(client, deadline_s=1e9, lane="a"):
    return QueuedRequest(lane, None, 1, 0.0, deadline_s, client)


class SecondsABatch:
    """Costs of an engine of which every batch takes a second."""

    def usual_s(self, engine, rows, now_s=None):
        return 1.0


def test_a_client_waits_for_its_share_of_the_queue_only():
    """With 30 rows of a flood and its own 2 before it, a client's third row is served sixth."""
    queue = BatchQueue(1, 1.0, 1000, costs=SecondsABatch())
    queue.ends_s = [0.0]
    for client in ("flood",) * 30 + ("quiet",) * 2:
        queue.push(of(client))
    in_time_s = 6 + MARGIN  # after 6 s of work, and its own run
    with pytest.raises(
        OverloadedError, match="32 rows wait already: the answer would take about 7"
    ):
        queue.push(of("quiet", in_time_s - 0.01))
    queue.push(of("quiet", in_time_s + 0.01))


def test_the_share_never_makes_the_wait_longer_than_the_queue():
    queue = BatchQueue(1, 1.0, 1000, costs=SecondsABatch())
    queue.ends_s = [0.0]
    for client in ("flood",) + ("quiet",) * 3:
        queue.push(of(client))
    queue.push(of("quiet", 4 + MARGIN + 0.01))


def test_who_finds_room_in_the_next_batch_does_not_wait_for_another():
    queue = BatchQueue(4, 1.0, 1000, costs=SecondsABatch())
    queue.ends_s = [0.0]
    for _ in range(3):
        queue.push(of("a"))
    queue.push(of("a", MARGIN + 0.01))
    with pytest.raises(OverloadedError):
        queue.push(of("a", MARGIN + 0.01))  # the fifth


def test_a_request_above_the_batch_size_tells_what_a_full_batch_takes():
    """The engine runs it in chunks."""
    queue, lane = BatchQueue(4, 1.0, 1000), Server()
    queue.learn(lane, 8, 10.0, 18.0)
    assert queue.costs.usual_s(lane, 4, 18.0) == 4.0 and queue.usual_s(lane, 8, 18.0) == 8.0


def test_who_made_room_has_its_turn_back():
    """What was dropped was not served: it costs its client nothing."""
    queue = BatchQueue(8, 1.0, 10)
    for _ in range(10):
        queue.push(of("flood"))
    (dropped,) = queue.push(of("quiet"))
    assert (dropped.client, dropped.turn) == ("flood", 10)
    batch, _ = queue.take(0.0)
    assert [request.client for request in batch].count("quiet") == 1 and len(batch) == 8
    again = of("flood")
    queue.push(again)
    assert again.turn == 10


def test_requests_of_several_clients_are_held_until_their_batch_is_full_or_their_wait_is_over():
    queue = BatchQueue(2, 1.0, 100, "hold_until_full")
    first, second, third = of("a"), of("b", lane="other"), of("b")
    queue.push(first)
    queue.push(second)
    assert queue.take(0.5) == ([], [])
    queue.push(third)
    assert queue.take(0.5) == ([first, third], []), "full"
    queue.push(of("a"))
    assert queue.take(0.9) == ([], [])
    assert queue.take(1.0)[0], "its second is over"


def test_nobody_is_passed_over_longer_than_max_wait():
    """A crowded lane wins until a lonely request has waited ``max_wait_s``; then the lonely one is
    served first."""
    queue = BatchQueue(4, max_wait_s=0.5, max_rows=1000)
    lonely = QueuedRequest("lonely", None, 1, 10.0, 99.0)
    queue.push(lonely)
    served = []
    for turn in range(8):  # the crowd refills its lane before every batch, one batch each 0.1 s
        now_s = 10.0 + turn / 10
        for _ in range(4):
            queue.push(QueuedRequest("crowd", None, 1, now_s, 99.0))
        served.append(queue.take(now_s)[0][0].engine)
    assert served == ["crowd"] * 5 + ["lonely"] + ["crowd"] * 2


@pytest.mark.parametrize("max_rows", [1, 8])
def test_one_request_above_the_bound_enters_an_empty_queue_only(max_rows):
    queue = BatchQueue(4, 1.0, max_rows)
    queue.push(QueuedRequest("a", None, 500, 0.0, 9.0))
    with pytest.raises(
        OverloadedError, match=f"500 rows wait already, the limit is {max_rows}: .*max_queue_rows"
    ):
        queue.push(QueuedRequest("b", None, 1, 0.0, 9.0))
    (large,), _ = queue.take(0.0)
    assert large.rows == 500, "it runs alone, whatever the batch size"
    queue.push(QueuedRequest("b", None, 1, 0.0, 9.0))


@pytest.mark.parametrize(
    ("usual_s", "held_until_s"), [(None, 10.025), (0.02, 10.015), (0.06, 10.0)]
)
def test_nobody_is_held_past_half_of_what_the_deadline_leaves(usual_s, held_until_s):
    """A hold of 100 ms, a deadline in 50: what is left after the usual duration of the model is
    halved."""
    queue = BatchQueue(4, 0.1, 100, "hold_until_full")
    lane = Server()
    if usual_s is not None:
        queue.learn(lane, 1, 3.0, 3.0 + usual_s)  # long ago
    patient, hasty = (
        QueuedRequest(lane, None, 1, 9.99, 99.0),
        QueuedRequest(lane, None, 1, 10.0, 10.05),
    )
    queue.push(patient)
    queue.push(hasty)
    assert queue.next_ready_s() == pytest.approx(held_until_s)
    assert queue.take(held_until_s - 1e-6) == ([], [])
    assert queue.take(held_until_s + 1e-6) == ([patient, hasty], [])


def run_in_virtual_time(queue, arrivals_s, service_s, workers):
    """Drive the queue as the batcher does; returns the number of the batch of each request, and the
    batches' starts."""
    requests = [QueuedRequest("model", None, 1, arrival_s, math.inf) for arrival_s in arrivals_s]
    coming, free_s, batch_of, starts_s = deque(requests), [-math.inf] * workers, {}, []
    now_s = arrivals_s[0]
    while coming or queue:
        while coming and coming[0].arrival_s <= now_s:
            queue.push(coming.popleft())
        idle = [worker for worker in range(workers) if free_s[worker] <= now_s]
        batch, _ = queue.take(now_s) if idle else ([], [])
        if batch:
            batch_of |= dict.fromkeys(batch, len(starts_s))
            starts_s.append(now_s)
            free_s[idle[0]] = now_s + service_s(len(batch))
            continue
        events_s = [coming[0].arrival_s] if coming else []
        if queue:
            events_s += [queue.next_ready_s()] if idle else []
            events_s += [t for t in free_s if t > now_s]
        # an event that stands still would be a lost wake-up
        now_s = min(t for t in events_s if t > now_s)
    return [batch_of[request] for request in requests], starts_s


@pytest.mark.parametrize(("policy", "workers"), list(itertools.product(POLICIES, (1, 3))))
@examples(40)
@given(
    gaps=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    max_batch_size=st.integers(1, 5),
    wait=st.integers(0, 20),
    cost=st.integers(1, 8),
)
def test_runs_the_batches_of_the_simulator(policy, workers, gaps, max_batch_size, wait, cost):
    """The teaching simulator is written independently, without a queue: same arrivals, same
    batches.

    All times are multiples of 1/64 s, so that every sum is exact and both see the same instants.
    """
    arrivals_s = np.cumsum(gaps) / 64
    max_wait_s, service_s = wait / 64, lambda rows: (cost + rows) / 64
    queue = BatchQueue(max_batch_size, max_wait_s, 10_000, policy)
    ours, starts_s = run_in_virtual_time(queue, arrivals_s.tolist(), service_s, workers)
    trace = simulate_batching(
        arrivals_s,
        service_s,
        max_batch_size=max_batch_size,
        workers=workers,
        policy=policy,
        max_wait_s=max_wait_s,
    )
    assert ours == trace.batch.tolist()
    assert starts_s == trace.batch_start_s.tolist()


def test_who_is_late_leaves_with_the_batch_that_he_would_have_filled():
    """One row fits and one is past its deadline: a smaller batch would help nobody, and leave the
    late one waiting."""
    queue = BatchQueue(2, 0.0, 10)
    fits, late = QueuedRequest("a", None, 1, 7.0, 7.7), QueuedRequest("a", None, 1, 7.0, 7.1)
    queue.push(fits)
    queue.push(late)
    assert queue.take(7.1) == ([fits], [late])
    assert not queue
