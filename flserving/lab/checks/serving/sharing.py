"""Check of the exercise "a batcher behind coroutines" (notebook 04), in virtual time."""

import asyncio
import contextlib
import selectors
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flserving.lab.checks.limits import elsewhere
from flserving.lab.checks.parts import Part, judge
from flserving.lab.checks.serving.simulator import Line

_RUN_S = 0.010  # what one execution of the model takes
_TURNS = 5_000  # more than any of these stories needs


def check_async_batcher(batcher_class: Callable[..., Any]) -> None:
    """Check ``batcher_class(batcher, model, max_wait_s)`` with ``await it.predict(row) -> output``.

    ``batcher`` has ``queue``, ``max_batch_size``, ``submit(request_id, row)``,
    ``next_batch(idle_workers)`` and ``run_batch(batch, model) -> {request_id: output or
    exception}``; ``model(rows)`` blocks its thread. A batch starts when it is full, or
    ``max_wait_s`` after its batch task saw that something waits.

    Raises:
        AssertionError: Says who got what, and when.
    """
    judge(
        "async-batcher",
        batcher_class,
        Part(
            "each caller gets its own answer",
            _own_answers,
            (
                "A future is a promise that the batch task keeps: the caller awaits it, the task sets its result.",
                "`future = asyncio.get_running_loop().create_future()`, then `self.batcher.submit(future, row)`.",
                "For each of `answers.items()` call `future.set_result(answer)`; `predict` returns `await future`.",
            ),
        ),
        Part(
            "one batch after the other",
            _one_task,
            (
                "The first caller starts the batch task; while it runs, nobody starts another.",
                "`if self.task is None or self.task.done(): self.task = asyncio.create_task(self.serve())`",
                "`serve` loops `while self.batcher.queue:`, and takes `self.batcher.next_batch(1)` each time.",
            ),
        ),
        Part(
            "the event loop stays free",
            _loop_stays_free,
            ("`answers = await asyncio.to_thread(self.batcher.run_batch, batch, self.model)`",),
        ),
        Part(
            "waits as long as told",
            _waits,
            (
                "A full batch starts at once. Otherwise wait for the next caller, at most until max_wait_s is over.",
                "`async with asyncio.timeout(self.max_wait_s):` raises TimeoutError at its end: use suppress.",
                "Inside: `while len(self.batcher.queue) < self.batcher.max_batch_size:` clear the event, await it.",
            ),
        ),
        Part(
            "an error goes to the caller at fault",
            _errors,
            ("An answer that is an Exception belongs in `future.set_exception(answer)`.",),
        ),
        Part(
            "a caller who gives up harms nobody",
            _cancelled,
            (
                "A cancelled caller's future is done already, and set_result on it raises InvalidStateError.",
                "Before the model runs and before you set a result, ask `future.done()`.",
            ),
        ),
    )


class _Loop(asyncio.SelectorEventLoop):
    """An event loop in virtual time. Another thread's work is done at once, and takes as long as
    the model said."""

    def __init__(self) -> None:
        self.now_s = 500.0
        self.turns = 0
        self.elsewhere = False  # whether a thread other than the event loop's works
        self.works_s = 0.0
        selector = selectors.SelectSelector()
        super().__init__(selector)
        select = selector.select

        def jump(timeout: float | None = None) -> Any:
            self.turns += 1
            assert self.turns < _TURNS, (
                "the batch task never rests: await something that happens, do not ask in a loop"
            )
            self.now_s += max(1e-7, timeout or 0.0)
            return select(0)

        selector.select = jump  # type: ignore[method-assign]

    def time(self) -> float:
        return self.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        async def work() -> Any:
            self.elsewhere = True
            self.works_s = 0.0
            try:
                return func(*args)
            finally:
                self.elsewhere = False
                await asyncio.sleep(self.works_s)

        return self.create_task(work())


class _Batcher(Line):
    """What the first exercise makes. An output that is an exception is the answer to a bad row."""

    def run_batch(
        self, batch: Sequence[tuple[Any, Any]], model: Callable[[list[Any]], list[Any]]
    ) -> dict[Any, Any]:
        assert batch, (
            "run_batch got an empty batch: nothing is left of it when all of its callers gave up"
        )
        return dict(
            zip(
                [request_id for request_id, _ in batch],
                model([row for _, row in batch]),
                strict=True,
            )
        )


class _Run:
    """Callers of a batcher under test: what each of them got and when, and which rows ran when (in
    milliseconds)."""

    def __init__(
        self, batcher_class: Callable[..., Any], max_batch_size: int, max_wait_ms: float
    ) -> None:
        self.loop: Any = asyncio.get_running_loop()  # a _Loop
        self.began_s = self.loop.time()
        self.ran: list[tuple[int, list[str]]] = []
        self.got: dict[str, Any] = {}
        self.raised = set[str]()
        self.blocked = self.overlapped = False
        self.busy_until_s = 0.0
        self.tested = batcher_class(_Batcher(max_batch_size), self._model, max_wait_ms / 1e3)

    def _model(self, rows: list[str]) -> list[Any]:
        self.ran.append((self._now_ms(), list(rows)))
        self.blocked |= not self.loop.elsewhere
        self.overlapped |= self.loop.elsewhere and self.loop.time() < self.busy_until_s - 1e-6
        self.loop.works_s = _RUN_S
        self.busy_until_s = self.loop.time() + _RUN_S
        return [
            ValueError(f"{row} is bad") if row.startswith("bad") else f"answer to {row}"
            for row in rows
        ]

    def _now_ms(self) -> int:
        return round(float(self.loop.time() - self.began_s) * 1e3)

    async def call(self, row: str, at_ms: float) -> None:
        await asyncio.sleep(at_ms / 1e3)
        self.got[row] = "nothing"
        try:
            async with asyncio.timeout(60):
                self.got[row] = await self.tested.predict(row)
        except TimeoutError:
            pass
        except ValueError as error:
            self.got[row] = error
            self.raised.add(row)
        except (AssertionError, NotImplementedError):
            raise
        except Exception as error:
            raise AssertionError(
                f"predict({row!r}) raised {type(error).__name__}: {error}"
            ) from error


def _play(
    batcher_class: Callable[..., Any],
    callers: Mapping[str, float],
    max_batch_size: int = 4,
    max_wait_ms: float = 0,
    gives_up: Mapping[str, float] = MappingProxyType({}),
) -> _Run:
    """Let callers come, each at its millisecond, in an event loop of their own; a notebook's runs
    already."""
    tasks: list[asyncio.Task[Any]] = []

    def create(loop: Any, coroutine: Any, **options: Any) -> "asyncio.Task[Any]":
        tasks.append(asyncio.Task(coroutine, loop=loop, **options))
        return tasks[-1]

    async def story() -> _Run:
        run = _Run(batcher_class, max_batch_size, max_wait_ms)
        calls = {row: asyncio.create_task(run.call(row, at_ms)) for row, at_ms in callers.items()}
        for row, at_ms in gives_up.items():
            run.loop.call_later(at_ms / 1e3, calls[row].cancel)
        await asyncio.wait(calls.values())
        for each in tasks:  # a batch task that died is the reason of all that its callers miss
            if each.done() and not each.cancelled() and (error := each.exception()) is not None:
                raise _death(error)
        return run

    def play() -> _Run:
        loop = _Loop()
        loop.set_task_factory(create)
        loop.set_exception_handler(lambda *_: None)  # it would log what the check tells
        try:
            return loop.run_until_complete(story())
        finally:
            loop.turns = 0
            for each in tasks:
                each.cancel()
            # of a task that does not let itself be cancelled
            with contextlib.suppress(AssertionError):
                loop.run_until_complete(asyncio.wait([*tasks]))
            loop.close()

    return elsewhere(play)


def _death(error: BaseException) -> BaseException:
    if isinstance(error, AssertionError | NotImplementedError):
        return error
    told = f"the batch task died of {type(error).__name__}: {error}; whoever waits for it waits for ever"
    if isinstance(error, asyncio.InvalidStateError):
        told += ". It set a future that was done already: its caller had given up"
    death = AssertionError(told)
    death.__cause__ = error
    return death


def _own_answers(batcher_class: Callable[..., Any]) -> None:
    run = _play(batcher_class, {"zoe": 0, "adam": 0, "mia": 0})
    for row, got in run.got.items():
        assert not asyncio.isfuture(got), (
            f"predict({row!r}) returned a future: await it, the caller wants the answer"
        )
        assert got != "nothing", (
            f"{row} waited a minute for an answer: nobody started a batch task, or nobody set its future's result"
        )
        assert got == f"answer to {row}", (
            f"{row} got {got!r}: each caller waits for the future of its own row"
        )
    run = _play(batcher_class, {"early": 0, "late": 1000})
    assert run.got["late"] == "answer to late", (
        "a caller who came when the first batch was long done got no answer: its batch task has ended, start another"
    )


def _one_task(batcher_class: Callable[..., Any]) -> None:
    run = _play(batcher_class, {f"r{i}": 0 for i in range(10)})
    sizes = [len(rows) for _, rows in run.ran]
    told = "ten callers at once, at most 4 a batch:"
    assert not run.overlapped, (
        f"{told} two executions ran at the same time: one batch task serves all, whoever calls finds it at work"
    )
    assert sizes, (
        f"{told} the model never ran: nobody started a batch task, or it never takes a batch"
    )
    assert max(sizes) > 1, (
        f"{told} {len(sizes)} executions of one row: callers of the same moment share a batch"
    )
    assert sum(sizes) == 10, (
        f"{told} only {sum(sizes)} rows ever ran: the batch task goes on while somebody waits"
    )
    assert sizes == [4, 4, 2], f"{told} the executions had {sizes} rows, not 4, 4 and 2"
    run = _play(batcher_class, {"a": 0, "b": 3, "c": 5, "d": 7})
    assert run.blocked or [rows for _, rows in run.ran[1:]] in ([], [["b", "c", "d"]]), (
        "b, c and d came while the model ran a: they are the next batch. The batches were "
        f"{[rows for _, rows in run.ran]}"
    )


def _loop_stays_free(batcher_class: Callable[..., Any]) -> None:
    run = _play(batcher_class, {"a": 0})
    assert not run.blocked, (
        "the model ran in the thread of the event loop: until it is done no coroutine moves, nobody can even arrive; "
        "run it in another thread"
    )


def _waits(batcher_class: Callable[..., Any]) -> None:
    for wait_ms, callers, when in (
        (0, {"a": 0}, {"a": 0}),
        (30, {"a": 0, "b": 20}, {"a": 30, "b": 30}),
        (50, {"a": 0, "b": 0, "c": 10, "d": 20}, dict.fromkeys("abcd", 20)),
        (50, {"a": 0, "b": 30, "c": 60}, {"a": 50, "b": 50, "c": 110}),
    ):
        run = _play(batcher_class, callers, max_wait_ms=wait_ms)
        began = {row: ms for ms, rows in run.ran for row in rows}
        told = f"max_wait_s {wait_ms / 1e3:g}, at most 4 a batch, callers at {list(callers.values())} ms:"
        for row, ms in when.items():
            assert row in began, f"{told} {row} never reached the model"
            late = began[row] - ms
            assert late < 5000, (
                f"{told} {row} started at {began[row]} ms: max_wait_s is in seconds, like asyncio's times"
            )
            assert late >= -1, (
                f"{told} {row} started at {began[row]} ms, not {ms}: the batch did not wait for others"
            )
            assert late <= 1 or len(callers) < 4, (
                f"{told} the batch was full at 20 ms and started at {began[row]}: who waits for more than a full batch?"
            )
            assert late <= 1 or wait_ms, (
                f"{told} {row} started at {began[row]} ms although the model was idle: nobody told you to wait"
            )
            assert late <= 1, (
                f"{told} {row} started at {began[row]} ms, not {ms}: the wait counts from the first, and every caller "
                "who comes must not begin it anew"
            )


def _errors(batcher_class: Callable[..., Any]) -> None:
    run = _play(batcher_class, {"a": 0, "bad": 0, "c": 0, "d": 40})
    got = run.got["bad"]
    assert got != "nothing", (
        "the caller of the bad row waits for ever: its answer is an exception, hand that on"
    )
    assert "bad" in run.raised, (
        f"the caller of the bad row got {got!r}: an error is an error, not an answer"
    )
    assert "bad is bad" in str(got), (
        f"the caller of the bad row got {got!r}: the error of its own row"
    )
    for row in "ac":
        assert run.got[row] == f"answer to {row}", (
            f"one row of the batch was bad, and {row} got {run.got[row]!r}: run_batch has found who is at fault, "
            "the others have answers"
        )
    assert run.got["d"] == "answer to d", f"after a bad row the next caller got {run.got['d']!r}"


def _cancelled(batcher_class: Callable[..., Any]) -> None:
    run = _play(batcher_class, {"a": 0, "b": 0, "c": 0, "d": 30}, gives_up={"b": 5})
    for row in "acd":
        assert run.got[row] == f"answer to {row}", (
            f"b gave up while its batch ran, and {row} got {run.got[row]!r}: b's future is done, pass it over"
        )
    run = _play(batcher_class, {"a": 0, "b": 2, "c": 4, "d": 30}, gives_up={"b": 6})
    assert "b" not in [row for _, rows in run.ran for row in rows], (
        "b gave up while it waited, and its row ran nevertheless: work for nobody; ask `future.done()` before you run"
    )
    for row in "acd":
        assert run.got[row] == f"answer to {row}", (
            f"b gave up while it waited, and {row} got {run.got[row]!r}"
        )
    run = _play(batcher_class, {"a": 0, "b": 2, "d": 30}, gives_up={"b": 6})
    assert run.got["d"] == "answer to d", (
        f"all of a batch gave up, and the next caller got {run.got['d']!r}"
    )
