"""Load generator: closed loop (n callers, each waits for its answer) and open loop (arrivals that
wait for nobody).

**Coordinated omission.** A generator that waits for a slow answer before it sends the next request
sends fewer requests exactly while the server is slow: the worst latencies are never measured. Here
an open-loop request has an *intended* arrival time, drawn before the run; its latency counts from
that time, even if every caller was busy then. Source: Gil Tene, "How NOT to Measure Latency" (talk,
2013-2015), and his wrk2. A closed loop has no intended times: it answers "how much can n callers
get", never "how long do users wait at this rate".
"""

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from flserving.errors import ConfigError
from flserving.lab.measuring.ledger import Clock, Ledger
from flserving.lab.measuring.report import LoadReport
from flserving.lab.queueing.arrivals import Arrivals, Zipf


def closed_loop(
    call: Callable[[int], object],
    *,
    callers: int,
    requests: int | None = None,
    seconds: float | None = None,
    popularity: Zipf | None = None,
    seed: int = 0,
    progress: bool = True,
    clock: Clock = time.perf_counter,
) -> LoadReport:
    """``callers`` threads call ``call(item)`` back to back, without think time.

    Args:
        call: One request; gets the item number (0 without ``popularity``). What it raises is a
            failed request.
        callers: Threads, 1 to 1,000.
        requests, seconds: Where to end, whichever comes first; a call under way is waited for.
        popularity: Which item a request asks for.
        seed: Seed of everything random.
        progress: Show a progress bar.
        clock: Monotonic seconds.

    Raises:
        ConfigError: A setting out of range, or ``call`` is async.

    Cost: about 5 us of Python per request on top of ``call``.
    """
    run = Ledger(requests, seconds, None, popularity, seed, progress, clock)
    return _in_threads(run, call, callers, time.sleep)


def open_loop(
    call: Callable[[int], object],
    arrivals: Arrivals,
    *,
    requests: int | None = None,
    seconds: float | None = None,
    popularity: Zipf | None = None,
    threads: int = 64,
    seed: int = 0,
    progress: bool = True,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> LoadReport:
    """Call ``call(item)`` at the times of an arrival process, however slow the answers are.

    Args:
        call, requests, seconds, popularity, seed, progress, clock: As in ``closed_loop``.
        arrivals: ``Poisson(rate_per_s)`` or ``Bursty(...)``.
        threads: Most calls at the same time, 1 to 1,000. A request that finds all of them busy is
            sent late, and its latency says so; with ``seconds``, what cannot be sent within a
            second after the end fails as "Unsent".
        sleep: How a thread waits for the next arrival; late by about 0.1 ms.
    """
    run = Ledger(requests, seconds, arrivals, popularity, seed, progress, clock)
    return _in_threads(run, call, threads, sleep)


async def closed_loop_async(
    call: Callable[[int], Awaitable[object]],
    *,
    callers: int,
    requests: int | None = None,
    seconds: float | None = None,
    popularity: Zipf | None = None,
    seed: int = 0,
    progress: bool = True,
    clock: Clock = time.perf_counter,
) -> LoadReport:
    """``closed_loop`` for an async ``call``: callers are tasks of this event loop, up to 10,000."""
    run = Ledger(requests, seconds, None, popularity, seed, progress, clock)
    return await _in_tasks(run, call, callers, asyncio.sleep)


async def open_loop_async(
    call: Callable[[int], Awaitable[object]],
    arrivals: Arrivals,
    *,
    requests: int | None = None,
    seconds: float | None = None,
    popularity: Zipf | None = None,
    tasks: int = 1000,
    seed: int = 0,
    progress: bool = True,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> LoadReport:
    """``open_loop`` for an async ``call``; ``tasks`` is the most calls at the same time, up to
    10,000.

    An event loop wakes up to 1 ms late (epoll counts in milliseconds): for answers faster than
    that, read ``late_ms``.
    """
    run = Ledger(requests, seconds, arrivals, popularity, seed, progress, clock)
    return await _in_tasks(run, call, tasks, sleep)


def _in_threads(
    run: Ledger, call: Callable[[int], object], count: int, sleep: Callable[[float], None]
) -> LoadReport:
    _require_count("number of threads", count, 1000)
    if inspect.iscoroutinefunction(call):
        raise ConfigError(
            "call is async: use `await closed_loop_async(...)` or `await open_loop_async(...)`"
        )
    ready = threading.Event()

    def caller() -> None:
        ready.wait()
        while (request := run.take()) is not None:
            number, arrival_s, item = request
            if (early_s := arrival_s - run.now_s()) > 0:
                sleep(early_s)
            start_s = run.now_s()
            try:
                answer = call(item)
            except Exception as error:
                run.fail(number, arrival_s, start_s, item, error)
                continue
            if inspect.iscoroutine(answer):
                answer.close()
                return run.abort(
                    "call returned a coroutine: use the form of this function that ends in _async"
                )
            run.record(number, arrival_s, start_s, item)

    threads = [threading.Thread(target=caller, name=f"load-{i}", daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    run.start()
    try:
        ready.set()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                run.show_progress()
    finally:  # an interrupted cell must not leave callers behind
        run.close()
    return run.report()


async def _in_tasks(
    run: Ledger,
    call: Callable[[int], Awaitable[object]],
    count: int,
    sleep: Callable[[float], Awaitable[None]],
) -> LoadReport:
    _require_count("number of tasks", count, 10_000)

    async def caller() -> None:
        while (request := run.take()) is not None:
            number, arrival_s, item = request
            if (early_s := arrival_s - run.now_s()) > 0:
                await sleep(early_s)
            start_s = run.now_s()
            try:
                answer: Any = call(item)
                if not inspect.isawaitable(answer):
                    return run.abort(
                        f"call returned {type(answer).__name__}, not an awaitable: drop the _async"
                    )
                await answer
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    # the run itself was cancelled; otherwise only the server dropped this request
                    raise
                run.fail(number, arrival_s, start_s, item, error)
            except Exception as error:
                run.fail(number, arrival_s, start_s, item, error)
            else:
                run.record(number, arrival_s, start_s, item)
            run.show_progress()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(caller())
            run.start()  # before the first task gets its turn
    finally:
        run.close()
    return run.report()


def _require_count(name: str, count: int, most: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise ConfigError(f"{name} is {count!r}: it must be an integer in [1, {most}]")
