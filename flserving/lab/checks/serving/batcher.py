"""Check of the exercise "write a dynamic batcher" (notebook 04), in virtual time: nothing sleeps,
nothing is random."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Request = tuple[str, int]  # id, row


def check_batcher(batcher_class: Callable[[int], Any]) -> None:
    """Check ``batcher_class(max_batch_size)`` with the three verbs of a work-conserving dynamic
    batcher.

    * ``submit(request_id, row)``: a request joins the queue.
    * ``next_batch(idle_workers) -> [(request_id, row), ...]``: what one idle worker should run now,
      oldest first, at most ``max_batch_size``; an empty list or None if no worker is idle or
      nothing waits.
    * ``run_batch(batch, model) -> {request_id: output}``: ``model(rows)`` takes a list of rows and
      returns a list of outputs in the same order, or raises for all of them. A batch that fails is
      retried by halves, so that only the request at fault gets the exception as its output.

    Raises:
        AssertionError: Says at which moment which rule was broken.
    """
    judge(
        "batcher",
        batcher_class,
        Part(
            "starts at once",
            _starts_at_once,
            (
                "There is no minimum and no timer: what decides is whether a worker is idle.",
                "`if idle_workers == 0: return []`; otherwise take what is there.",
            ),
        ),
        Part(
            "fills a batch from a backlog",
            _fills_a_batch_from_a_backlog,
            (
                "Two slices of the queue: what runs now, and what stays.",
                "`batch = self.queue[: self.max_batch_size]`, and the queue is the rest.",
            ),
        ),
        Part(
            "serves a rush",
            _serves_rushes,
            ("Play it on paper: five arrivals, two workers, batches of two.",),
        ),
        Part(
            "answers everyone",
            _answers_everyone,
            (
                "Call the model once, with the rows of all; output k belongs to request k.",
                "`zip(batch, outputs, strict=True)` pairs them; make a dict from request_id to output.",
            ),
        ),
        Part(
            "one bad row fails alone",
            _one_bad_row_fails_alone,
            (
                "A batch that raised is two smaller batches, and run_batch knows what to do with a batch.",
                "A batch of one that raised: `return {batch[0][0]: error}`.",
                "`self.run_batch(batch[:half], model) | self.run_batch(batch[half:], model)` joins two dicts.",
            ),
        ),
    )


class _Desk:
    """A batcher under observation: knows who waits, in which order, and judges every batch that
    comes out."""

    def __init__(self, batcher_class: Callable[[int], Any], max_batch_size: int) -> None:
        self.batcher = ask(
            f"creating a batcher with max_batch_size {max_batch_size}",
            batcher_class,
            max_batch_size,
        )
        self.max_batch_size = max_batch_size
        self.waiting = list[Request]()
        self.gone = set[str]()

    def submit(self, requests: Iterable[Request]) -> None:
        for request in requests:
            ask(f"submit{request}", self.batcher.submit, *request)
            self.waiting.append(request)

    def next_batch(self, idle_workers: int, when: str) -> list[Request]:
        batch = list(
            ask(f"next_batch({idle_workers}) {when}", self.batcher.next_batch, idle_workers) or []
        )
        if idle_workers == 0:
            assert not batch, (
                f"{when}, no worker is idle, but next_batch(0) started {_ids(batch)}: leave them in the queue"
            )
            return []
        if not batch and self.waiting:
            self._explain_nothing(when)
        self._judge(batch, when)
        self.waiting = self.waiting[len(batch) :]
        self.gone |= {request_id for request_id, _ in batch}
        return batch

    def _explain_nothing(self, when: str) -> None:
        later = self._what_still_comes()
        assert not later.intersection(self.waiting), (
            f"{when}, a worker is idle while {_ids(self.waiting)} waits: next_batch held back for a fuller batch. "
            "Work-conserving means: an idle worker takes whatever waits, at once"
        )
        raise AssertionError(
            f"{when}, {_ids(self.waiting)} never came out of next_batch: a request was lost"
        )

    def _what_still_comes(self) -> set[Request]:
        """Push with one more full batch of requests: who was held back comes out now, who is lost
        does not."""
        for i in range(self.max_batch_size):
            self.batcher.submit(f"more-{i}", 0)
        return {
            tuple(request)
            for _ in range(3 + len(self.waiting))
            for request in (self.batcher.next_batch(1) or [])
        }

    def _judge(self, batch: list[Request], when: str) -> None:
        told = f"{when} ({_ids(self.waiting)} waiting, max_batch_size {self.max_batch_size}), next_batch gave"
        assert all(
            isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str)
            for one in batch
        ), f"{told} {batch!r}: a batch is a list of (request_id, row) pairs"
        names = [entry[0] for entry in batch]
        expected = self.waiting[: self.max_batch_size]
        assert len(batch) <= self.max_batch_size, (
            f"{told} {len(batch)} requests: that is more than the model may get"
        )
        again = sorted(self.gone.intersection(names)) or [
            name for name in names if names.count(name) > 1
        ]
        assert not again, (
            f"{told} {again[0]} a second time: a request leaves the queue with its batch"
        )
        rows = dict(self.waiting)
        for name, row in batch:
            assert name in rows, f"{told} {name!r}, which nobody submitted"
            assert row == rows[name], (
                f"{told} {name} the row {row!r}, but it was submitted with {rows[name]!r}"
            )
        if names and names[0] != expected[0][0]:
            oldest = expected[0]
            lost = oldest not in batch and oldest not in self._what_still_comes()
            assert not lost, f"{told} {names}, and {oldest[0]} never came out: a request was lost"
            raise AssertionError(
                f"{told} {names}: {oldest[0]} has waited longest and must go first, or it starves"
            )
        assert names == [name for name, _ in expected[: len(names)]], (
            f"{told} {names}: keep the order of arrival"
        )
        assert len(batch) == len(expected), (
            f"{told} only {names}: {len(expected)} fit, and running {len(expected)} rows costs hardly more than one"
        )


def _starts_at_once(batcher_class: Callable[[int], Any]) -> None:
    desk = _Desk(batcher_class, 4)
    desk.next_batch(1, "before anything was submitted")
    desk.submit([("r0", 10)])
    desk.next_batch(0, "after one request")
    desk.next_batch(2, "after one request")
    other = _Desk(batcher_class, 4)
    desk.submit([("r1", 11)])
    leaked = ask("next_batch(1) of another batcher", other.batcher.next_batch, 1)
    assert not leaked, (
        "a second batcher hands out the first one's request: create the queue in __init__"
    )


def _fills_a_batch_from_a_backlog(batcher_class: Callable[[int], Any]) -> None:
    desk = _Desk(batcher_class, 4)
    desk.submit((f"r{i}", 10 + i) for i in range(6))
    desk.next_batch(0, "with six requests waiting and every worker busy")
    first = ask("next_batch(1)", desk.batcher.next_batch, 1)
    kept = list(first or [])
    desk.batcher.submit("late", 99)
    assert list(first or []) == kept, (
        "a batch changed after next_batch returned it: return a new list, not the queue itself"
    )
    desk = _Desk(batcher_class, 4)
    desk.submit((f"r{i}", 10 + i) for i in range(6))
    desk.next_batch(1, "with a backlog of six")
    desk.next_batch(1, "after the first four of six")
    desk.next_batch(1, "after all six")


def _serves_rushes(batcher_class: Callable[[int], Any]) -> None:
    for seed in range(30):
        _serves_a_rush(batcher_class, seed)


def _serves_a_rush(batcher_class: Callable[[int], Any], seed: int) -> None:
    """Two workers, a batch of n takes 3 + n ticks, some 40 requests in bursts; every tick is a
    moment to judge."""
    rng = random.Random(seed)
    desk = _Desk(batcher_class, rng.randint(1, 5))
    busy_until = [0, 0]
    number = 0
    for tick in range(200):
        if tick < 60:
            arrivals = rng.choice([0, 0, 0, 1, 1, 3])
            desk.submit((f"r{number + i}", rng.randrange(1000)) for i in range(arrivals))
            number += arrivals
        while True:
            idle = sum(end <= tick for end in busy_until)
            batch = desk.next_batch(idle, f"at tick {tick} with {idle} of 2 workers idle")
            if not batch:
                break
            busy_until[busy_until.index(min(busy_until))] = tick + 3 + len(batch)
    assert not desk.waiting, f"at the end {_ids(desk.waiting)} was never served"


def _answers_everyone(batcher_class: Callable[[int], Any]) -> None:
    batch = [("zoe", 3), ("adam", 1), ("mia", 2), ("bob", 1)]  # not sorted, and two equal rows
    calls: list[list[int]] = []

    def model(rows: Sequence[int]) -> list[str]:
        calls.append(list(rows))
        return [f"answer to {row}" for row in rows]

    answers = _run(batcher_class, batch, model)
    assert len(calls) == 1, (
        f"a healthy batch of 4 ran the model {len(calls)} times: run it once, with all rows"
    )
    for request_id, row in batch:
        assert answers[request_id] == f"answer to {row}", (
            f"{request_id} sent {row} and got {answers[request_id]!r}: answers were swapped between callers; "
            "output k belongs to request k of the batch"
        )
    assert _run(batcher_class, batch[:1], model) == {"zoe": "answer to 3"}, (
        "a batch of one got a wrong answer"
    )


def _one_bad_row_fails_alone(batcher_class: Callable[[int], Any]) -> None:
    def model(rows: Sequence[int]) -> list[int]:
        if bad := [row for row in rows if row < 0]:
            raise ValueError(f"row {bad[0]} is negative")
        return [10 * row for row in rows]

    for size in (1, 2, 5, 8):
        for bad in [{i} for i in range(size)] + [{0, size - 1}, set(range(size))]:
            batch = [(f"r{i}", -i - 1 if i in bad else i + 1) for i in range(size)]
            told = f"a batch of {size} in which {_ids([batch[i] for i in sorted(bad)])} makes the model raise:"
            try:
                answers = _run(batcher_class, batch, model, told)
            except ValueError as error:
                raise AssertionError(
                    f"{told} run_batch raised {error!r}: catch it, retry by halves, "
                    "and give the exception as the output of the row at fault"
                ) from error
            for i, (request_id, row) in enumerate(batch):
                got = answers[request_id]
                if i in bad:
                    assert isinstance(got, Exception), (
                        f"{told} {request_id} got {got!r}: its output must be the exception"
                    )
                    assert f"row {row} " in str(got), (
                        f"{told} {request_id} got {got!r}, somebody else's error"
                    )
                else:
                    assert not isinstance(got, Exception), (
                        f"{told} {request_id} failed too: only the bad row may fail"
                    )
                    assert got == 10 * row, (
                        f"{told} {request_id} sent {row} and got {got!r}, {10 * row} is right"
                    )


def _run(
    batcher_class: Callable[[int], Any],
    batch: list[Request],
    model: Callable[..., Any],
    told: str = "",
) -> dict[str, Any]:
    told = told or f"a batch of {_ids(batch)}:"
    try:
        answers = batcher_class(8).run_batch(list(batch), model)
    except (NotImplementedError, ValueError):
        raise
    except Exception as error:
        raise AssertionError(f"{told} run_batch raised {type(error).__name__}: {error}") from error
    assert isinstance(answers, dict), (
        f"{told} run_batch returned {answers!r}: return a dict request_id -> output"
    )
    missing = [request_id for request_id, _ in batch if request_id not in answers]
    assert not missing, (
        f"{told} {missing[0]} got no answer: every request of the batch gets an output or an exception"
    )
    assert len(answers) == len(batch), (
        f"{told} run_batch answered {sorted(answers)}, more than were asked"
    )
    return answers


def _ids(batch: Sequence[Request]) -> str:
    return ", ".join(str(request[0]) for request in batch) or "nobody"
