"""Check of the exercise "a load generator that does not omit" (notebook 06), in virtual time."""

import asyncio
import math
import selectors
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from flserving.lab.checks.asking import equal
from flserving.lab.checks.limits import TooLongError, elsewhere
from flserving.lab.checks.parts import Part, judge

Generator = Callable[..., Awaitable[Sequence[float]]]
_TURNS = 1000  # of the event loop: more than any run here needs


def check_open_loop(open_loop: Generator) -> None:
    """Check ``await open_loop(ask, plan_s, clock) -> latencies_ms``.

    ``await ask()`` is one request, and may raise; ``plan_s`` says when each is due, in seconds from
    the start; ``clock()`` gives seconds. Right is: each is sent when it is due, whatever the others
    do; its latency counts from when it was due, in the order of the plan; NaN where it failed.

    Raises:
        CheckError: Says which users' bad moments are not in the numbers.
    """
    judge(
        "open-loop",
        open_loop,
        Part(
            "keeps to the plan",
            _keeps_to_the_plan,
            (
                "When is a request due? At the start plus its planned time. Sleep until then, not for a gap.",
                "`await asyncio.sleep(start_s + due_s - clock())`; a negative sleep is none.",
            ),
        ),
        Part(
            "waits for no answer",
            _waits_for_no_answer,
            (
                "Each request needs a task of its own, which sleeps until it is due, asks, and reads the clock.",
                "`async with asyncio.TaskGroup() as group:`, inside it `group.create_task(one(due_s))` for each.",
            ),
        ),
        Part(
            "counts from the plan",
            _counts_from_the_plan,
            (
                "A request that was sent late had a user who waited: its latency is now - (start_s + due_s).",
            ),
        ),
        Part(
            "bears a request that fails",
            _bears_failures,
            (
                "One exception in a TaskGroup cancels all the others.",
                'Inside the task: `try: await ask()`, `except Exception: return float("nan")`.',
            ),
        ),
    )


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that jumps to its next timer instead of waiting."""

    def __init__(self) -> None:
        self.now_s = 500.0
        self.turns = 0
        selector = selectors.SelectSelector()
        super().__init__(selector)
        select = selector.select

        def jump(timeout: float | None = None) -> Any:
            assert timeout is not None, "open_loop waits for something that never comes"
            self.turns += 1
            assert self.turns < _TURNS, (
                "open_loop asks the clock again and again: sleep until the next request is due"
            )
            self.now_s += max(0.0, timeout)
            return select(0)

        selector.select = jump  # type: ignore[method-assign]

    def time(self) -> float:
        return self.now_s


class _Server:
    """Answers request n after ``takes_s[n]``, else 5 ms; ``blocks_s[n]`` is time in which nothing
    else runs at all."""

    def __init__(
        self, takes_s: dict[int, float], blocks_s: dict[int, float], fails: Sequence[int] = ()
    ) -> None:
        self.takes_s = takes_s
        self.blocks_s = blocks_s
        self.fails = fails
        self.loop = _Loop()
        self.sent_s: list[float] = []

    async def ask(self) -> str:
        number = len(self.sent_s)
        self.sent_s.append(self.loop.now_s)
        self.loop.now_s += self.blocks_s.get(number, 0.0)
        await asyncio.sleep(self.takes_s.get(number, 0.005))
        if number in self.fails:
            raise ConnectionError("the server hung up")
        return "an answer"


def _latencies(open_loop: Generator, server: _Server, plan_s: Sequence[float]) -> list[float]:
    """What it reports; in a thread, because a notebook's own event loop runs in this one."""

    def run() -> Any:
        made = open_loop(server.ask, list(plan_s), server.loop.time)
        assert asyncio.iscoroutine(made), (
            f"open_loop returned {type(made).__name__} at once: begin with `async def`"
        )
        try:
            return server.loop.run_until_complete(made)
        finally:
            left = asyncio.all_tasks(server.loop)
            for task in left:
                task.cancel()
            server.loop.turns = 0
            if left:
                server.loop.run_until_complete(asyncio.wait(left))

    try:
        got = elsewhere(run)
    except (AssertionError, NotImplementedError):
        raise
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
        if isinstance(first, NotImplementedError | AssertionError | TooLongError):
            raise first from None
        raise AssertionError(
            f"one request raised {type(first).__name__}, and that ended the run: the other users' latencies are lost"
        ) from first
    except Exception as error:
        raise AssertionError(
            f"open_loop(ask, plan_s, clock) raised {type(error).__name__}: {error}"
        ) from error
    finally:
        # else its thread was left behind, in a call that nothing interrupts
        if not server.loop.is_running():
            server.loop.close()
    assert got is not None, "open_loop returned None: return the latencies in ms, a list"
    numbers = cast("list[float]", list(got))
    assert len(numbers) == len(plan_s), (
        f"{len(plan_s)} requests were planned, {len(numbers)} latencies came back"
    )
    return [float(number) for number in numbers]


def _keeps_to_the_plan(open_loop: Generator) -> None:
    plan_s = [0.1, 0.15, 0.4, 0.45, 0.9]
    server = _Server({}, {})
    got = _latencies(open_loop, server, plan_s)
    sent = [round(at_s - 500, 6) for at_s in server.sent_s]
    told = f"planned were {plan_s} s, sent was at {sent} s"
    assert len(sent) == len(plan_s), f"{told}: each request is sent once"
    assert max(sent) > 0.11, f"{told}: all at once; each waits until it is due"
    assert sent != [0.1, 0.25, 0.65, 1.1, 2.0] and max(sent) < 2, (
        f"{told}: the planned times count from the start, not from the request before"
    )
    assert max(abs(at_s - due_s) for at_s, due_s in zip(sent, plan_s, strict=True)) < 1e-5, (
        f"{told}: send when it is due; what the sending takes must not add up from request to request"
    )
    assert not equal(got[0], 0.005), (
        "a latency of 5 ms came back as 0.005: seconds; a second has 1000 ms"
    )
    assert all(abs(ms - 5) < 1e-3 for ms in got), (
        f"each answer took 5 ms, the latencies are {_told(got)} ms"
    )


def _waits_for_no_answer(open_loop: Generator) -> None:
    plan_s = [0.02 * number for number in range(1, 31)]
    server = _Server({4: 0.3}, {})
    got = _latencies(open_loop, server, plan_s)
    late = [
        number for number, at_s in enumerate(server.sent_s) if at_s - 500 - plan_s[number] > 1e-3
    ]
    assert not late, (
        f"request 5 was answered after 300 ms, and {len(late)} requests behind it were sent late: users do not wait "
        "for each other; the server was spared exactly while it was slow"
    )
    slow = [number for number, ms in enumerate(got, start=1) if ms > 100]
    assert slow, "request 5 was answered after 300 ms, and no latency is above 100 ms"
    assert slow == [5], (
        f"request 5 was slow, by the list it was request {slow[0]}: keep the order of the plan"
    )


def _counts_from_the_plan(open_loop: Generator) -> None:
    plan_s = [0.02 * number for number in range(1, 31)]
    server = _Server({}, {4: 0.3})  # the machine does nothing else for 300 ms: some are sent late
    got = _latencies(open_loop, server, plan_s)
    slow = sum(ms > 20 for ms in got)
    assert slow >= 10, (
        f"the machine stood still for 300 ms, in which 15 requests were due, and {slow} latencies show it: count from "
        "when a request was due, not from when it was sent; its user waited all that time"
    )
    assert abs(got[5] - 285) < 1, (
        f"a request was due 20 ms into a stall of 300 ms and took 5 ms: 285 ms, not {got[5]:.0f}"
    )


def _bears_failures(open_loop: Generator) -> None:
    plan_s = [0.02 * number for number in range(1, 11)]
    got = _latencies(open_loop, _Server({7: 0.1}, {}, fails=(3,)), plan_s)
    failed = [number for number, ms in enumerate(got) if math.isnan(ms)]
    assert failed, (
        f"request 4 failed and has the latency {got[3]:.0f} ms: a quick refusal is no quick answer; NaN where it failed"
    )
    assert failed == [3], f"request 4 of 10 failed, NaN are the places {failed}, counted from 0"
    assert got[7] > 99, (
        f"request 8 took 100 ms after request 4 had failed, by the list {got[7]:.0f} ms"
    )


def _told(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.3g}" for number in numbers)
