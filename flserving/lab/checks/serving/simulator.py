"""Check of the exercise "a server in virtual time" (notebook 04)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge
from flserving.lab.queueing.arrivals import Floats, Poisson, arrival_times_s
from flserving.lab.queueing.simulate import simulate_batching

_TURNS = 5_000  # more than any of these stories needs


def check_simulate(simulate: Callable[..., Any]) -> None:
    """Check ``simulate(arrival_s, service_s, batcher, workers) -> (start_s, end_s)``, two arrays
    [N] of seconds.

    ``batcher`` has ``submit(request_id, row)`` and ``next_batch(idle_workers)``, which gives the
    batch that one idle worker runs now, or []. A batch of n takes ``service_s(n)``, asked once a
    batch. Right is what :func:`flserving.lab.simulate_batching` gives.

    Raises:
        AssertionError: Tells the story in which the simulated server went wrong.
    """
    judge(
        "simulate",
        simulate,
        Part(
            "one worker, one request at a time",
            _one_at_a_time,
            (
                "Two things happen in this world: a request arrives, a batch is done. Keep both in one heap of events.",
                "Take the earliest event with heapq.heappop; its time is now. Then ask the batcher what can start.",
                "When a batch starts: `heapq.heappush(events, (now_s + service_s(len(batch)), 'done', 0))`.",
            ),
        ),
        Part(
            "batches",
            _batches,
            (
                "All requests of a batch start together and end together.",
                "Call `took_s = service_s(len(batch))` once, before the loop over the requests of the batch.",
            ),
        ),
        Part(
            "what happens at one moment",
            _one_moment,
            (
                "Before you ask the batcher, everything that happens now must have happened.",
                "`while events and events[0][0] == now_s:` take the next event, too.",
            ),
        ),
        Part(
            "several workers",
            _several_workers,
            (
                "Count the idle workers: one fewer when a batch starts, one more when it is done.",
                "`while batch := batcher.next_batch(idle):` starts batches until no worker is idle or nothing waits.",
            ),
        ),
        Part(
            "the batcher decides",
            _batcher_decides,
            (
                "The number of a request is its id: `batcher.submit(number, None)`. The batch says whose turn it is.",
            ),
        ),
        Part("agrees with lab.simulate_batching", _agrees),
    )


class Line:
    """A batcher that takes the oldest (or the newest) first, and notices a student who asks without
    end."""

    def __init__(self, max_batch_size: int, newest_first: bool = False) -> None:
        self.max_batch_size = max_batch_size
        self.newest_first = newest_first
        self.asked = 0
        self._queue: list[tuple[Any, Any]] = []

    @property
    def queue(self) -> list[tuple[Any, Any]]:
        self.asked += 1
        assert self.asked < _TURNS, (
            "your loop never ends: it asks the batcher again and again, and nothing changes"
        )
        return self._queue

    def submit(self, request_id: Any, row: Any) -> None:
        self._queue.insert(0 if self.newest_first else len(self._queue), (request_id, row))

    def next_batch(self, idle_workers: int) -> list[tuple[Any, Any]]:
        batch = self.queue[: self.max_batch_size if idle_workers > 0 else 0]
        del self._queue[: len(batch)]
        return batch


# what is told, arrivals, service, ...
Story = tuple[str, Sequence[float], Callable[[int], float], Line, int]


def _simulated(simulate: Callable[..., Any], story: Story) -> tuple[Floats, Floats]:
    told, arrival_s, service_s, batcher, workers = story
    got = ask(
        f"simulate: {told}", simulate, np.array(arrival_s, np.float64), service_s, batcher, workers
    )
    assert isinstance(got, tuple | list) and len(got) == 2, (
        f"simulate returned {type(got).__name__}: return two arrays, when each request started and when it ended"
    )
    start_s, end_s = (np.asarray(times, np.float64) for times in got)
    for times in (start_s, end_s):
        assert len(times) == len(arrival_s), (
            f"simulate returned {len(times)} times for {len(arrival_s)} requests"
        )
    return start_s, end_s


def _expect(simulate: Callable[..., Any], story: Story, wanted: Sequence[float], why: str) -> None:
    starts = _simulated(simulate, story)[0].tolist()
    assert starts == list(wanted), (
        f"{story[0]}: they start at {list(wanted)} s, you have {starts}: {why}"
    )


def _takes(seconds: float) -> Callable[[int], float]:
    return lambda rows: seconds


def _one_at_a_time(simulate: Callable[..., Any]) -> None:
    told = "requests at 0, 1, 2 and 20 s, one at a time, each takes 4 s"
    start_s, end_s = _simulated(simulate, (told, [0, 1, 2, 20], _takes(4), Line(1), 1))
    mistakes = {
        (
            0,
            1,
            2,
            20,
        ): "at its arrival, although the only worker was busy: it is idle again when its batch is done",
        (
            0,
            4,
            8,
            12,
        ): "when the one before ended, the last one before it has arrived: an idle worker waits for events",
        (0, 3, 6, 0): "after its wait: start_s is a time, not a duration",
        (0, 0, 0, 0): "at 0: keep the time of the event when its batch starts",
        (
            0,
            20,
            0,
            0,
        ): "when the next request came: that a batch is done is an event, too, at which others may start",
        (4, 8, 12, 24): "when its batch was done: that is end_s",
    }
    why = mistakes.get(tuple(start_s.tolist()))
    assert not why, f"{told}: each started {why}. Right is 0, 4, 8, 20, you have {start_s.tolist()}"
    assert start_s.tolist() == [0, 4, 8, 20], (
        f"{told}: they start at 0, 4, 8, 20, you have {start_s.tolist()}"
    )
    assert end_s.tolist() != start_s.tolist(), (
        f"{told}: each ended as it started: a batch ends service_s(n) later"
    )
    assert set(end_s) != {4}, (
        f"{told}: end_s is {end_s.tolist()}, durations; it is the time of the end"
    )
    assert end_s.tolist() == [4, 8, 12, 24], (
        f"{told}: they end at 4, 8, 12, 24, you have {end_s.tolist()}"
    )


def _batches(simulate: Callable[..., Any]) -> None:
    asked: list[int] = []

    def service_s(rows: int) -> float:
        asked.append(rows)
        return 10 + rows

    told = "a request at 0 s, five more at 1 to 5 s, at most 4 a batch, a batch of n takes 10 + n s"
    _, end_s = _simulated(simulate, (told, [0, 1, 2, 3, 4, 5], service_s, Line(4), 1))
    assert set(asked) != {1}, (
        f"{told}: service_s was asked for one row each time: a batch of 4 takes service_s(4)"
    )
    assert len(asked) < 4, (
        f"{told}: service_s was asked {len(asked)} times for 3 batches: it may be random, ask once a batch"
    )
    assert end_s.tolist() == [11, 25, 25, 25, 25, 36], (
        f"{told}: all of a batch end together, at 11, 25 and 36 s, you have {end_s.tolist()}"
    )


def _one_moment(simulate: Callable[..., Any]) -> None:
    told = "three requests at the same moment, at most 4 a batch"
    why = "they share a batch; let all events of a moment happen before you ask the batcher"
    _expect(simulate, (told, [5, 5, 5], _takes(1), Line(4), 1), [5, 5, 5], why)
    told = "a request arrives when a batch is done, and another one waits"
    _expect(simulate, (told, [0, 1, 2], _takes(2), Line(4), 1), [0, 2, 2], why)


def _several_workers(simulate: Callable[..., Any]) -> None:
    told = "five requests, one every 0.5 s, one at a time on 2 workers, each takes 4 s"
    story: Story = (told, [0, 0.5, 1, 1.5, 2], _takes(4), Line(1), 2)
    start_s, end_s = _simulated(simulate, story)
    running = max(int(((start_s <= now) & (end_s > now)).sum()) for now in start_s)
    assert running <= 2, f"{told}: {running} run at once: a batch that starts makes a worker busy"
    assert start_s.tolist() != [0, 4, 8, 12, 16], (
        f"{told}: only one worker ever works: start with idle = workers"
    )
    assert start_s.tolist() == [0, 0.5, 4, 4.5, 8], (
        f"{told}: they start at 0, 0.5, 4, 4.5 and 8 s, you have {start_s.tolist()}"
    )
    told = "four requests at once, one at a time on 3 idle workers, each takes 4 s"
    why = "three start at once; ask the batcher again while a worker is idle"
    _expect(simulate, (told, [1, 1, 1, 1], _takes(4), Line(1), 3), [1, 1, 1, 5], why)


def _batcher_decides(simulate: Callable[..., Any]) -> None:
    told = "requests at 0, 1, 2 and 3 s, each takes 10 s, by a batcher that takes the newest first"
    why = "the ids in the batch say who starts, not the order of arrival"
    _expect(
        simulate,
        (told, [0, 1, 2, 3], _takes(10), Line(1, newest_first=True), 1),
        [0, 30, 20, 10],
        why,
    )


def _agrees(simulate: Callable[..., Any]) -> None:
    for size, workers in ((1, 1), (4, 1), (1, 3), (8, 2)):
        arrival_s = arrival_times_s(Poisson(200), requests=200, rng=np.random.default_rng(size))
        wanted = simulate_batching(arrival_s, _random(size), max_batch_size=size, workers=workers)
        told = (
            f"200 random arrivals, at most {size} a batch, {workers} workers, random service times"
        )
        start_s, end_s = _simulated(
            simulate, (told, arrival_s.tolist(), _random(size), Line(size), workers)
        )
        for name, off_s in (
            ("start", start_s - arrival_s - wanted.wait_s),
            ("end", end_s - arrival_s - wanted.latency_s),
        ):
            late = int(np.abs(off_s).argmax())
            assert abs(off_s[late]) < 1e-9, (
                f"{told}: request {late} must {name} {-off_s[late]:.4f} s later than yours"
            )


def _random(seed: int) -> Callable[[int], float]:
    rng = np.random.default_rng(seed)
    return lambda rows: float(rng.exponential(0.004 + 0.001 * rows))
