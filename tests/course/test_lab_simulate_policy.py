"""The simulator that the notebooks draw follows the server's own queue: same batches, same start
times."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from budget import examples
from flserving.lab import simulate_batching
from flserving.serving.batching.policy import BatchQueue, QueuedRequest


def through_the_queue(arrival_s, service_s, max_batch_size, workers, policy, max_wait_s):
    """(start, requests) of every batch when the server's BatchQueue is asked at each event, in
    virtual time."""
    queue = BatchQueue(max_batch_size, max_wait_s, max_rows=len(arrival_s) + 1, policy=policy)
    coming, free_s, batches = list(arrival_s), [-math.inf] * workers, []
    now_s = 0.0
    while coming or queue:
        while coming and coming[0] <= now_s:
            at_s = coming.pop(0)
            queue.push(QueuedRequest("model", at_s, 1, at_s, math.inf))
        for worker in range(workers):
            if free_s[worker] <= now_s and (batch := queue.take(now_s)[0]):
                batches.append((now_s, [request.payload for request in batch]))
                free_s[worker] = now_s + service_s
        ends_s = [end_s for end_s in free_s if end_s > now_s]
        ready_s = queue.next_ready_s()
        events = [
            *coming[:1],
            *ends_s,
            *([ready_s] if ready_s is not None and ready_s > now_s else []),
        ]
        now_s = min(events, default=math.inf)
    return batches


@examples(60)
@given(
    seed=st.integers(0, 10_000),
    max_batch_size=st.integers(1, 6),
    workers=st.integers(1, 3),
    policy=st.sampled_from(["work_conserving", "hold_until_full"]),
    load=st.floats(0.2, 3.0),
)
def test_the_simulator_makes_the_batches_that_the_servers_queue_makes(
    seed, max_batch_size, workers, policy, load
):
    service_s, max_wait_s = 0.01, 0.025
    gaps_s = np.random.default_rng(seed).exponential(service_s / (load * workers), size=40)
    arrival_s = np.cumsum(gaps_s)
    trace = simulate_batching(
        arrival_s, lambda n: service_s, max_batch_size=max_batch_size, workers=workers, policy=policy,
        max_wait_s=max_wait_s,
    )  # fmt: skip
    expected = through_the_queue(
        arrival_s.tolist(), service_s, max_batch_size, workers, policy, max_wait_s
    )
    assert trace.batch_size.tolist() == [len(requests) for _, requests in expected]
    assert trace.batch_start_s == pytest.approx([start_s for start_s, _ in expected])
