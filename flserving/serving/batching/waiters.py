"""Who waits for a request, and how the news reaches them: a blocked thread, or a coroutine on an event loop.

A request's ``waiter`` is a held lock (its thread waits to take it), or a :class:`LoopSide` and a future, or None where
the caller runs the request itself.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from flserving.serving.batching.policy import Request


class LoopSide:
    """What a batcher knows of one event loop: who waits there, and when its next alarm rings."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.turn_ends, self.waiting = loop, False, set[Request[Any]]()
        self.alarm: asyncio.TimerHandle | None = None
        self.alarm_s = 0.0

    def call(self, callback: Callable[[], object]) -> None:
        """Run ``callback`` on the loop, from another thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits there any more
            self.loop.call_soon_threadsafe(callback)


def answer(batch: Sequence[Request[Any]], results: Iterable[Any]) -> None:
    """Give every request of a batch its result."""
    for request, result in zip(batch, results, strict=True):
        request.result = result
    _wake_all(batch)


def refuse(request: Request[Any], error: BaseException) -> None:
    """Give one request an error."""
    request.error = error
    _wake_all((request,))


def _wake_all(requests: Iterable[Request[Any]]) -> None:
    """One call an event loop, not one a request."""
    elsewhere: defaultdict[LoopSide, list[Request[Any]]] = defaultdict(list)
    here = asyncio._get_running_loop()  # None in a worker
    for request in requests:
        waiter = request.waiter
        if isinstance(waiter, tuple) and waiter[0].loop is not here:
            elsewhere[waiter[0]].append(request)
        else:
            _wake(request)
    for side, those in elsewhere.items():
        side.call(partial(_wake_all, those))


def _wake(request: Request[Any]) -> None:
    waiter, request.state = request.waiter, "done"
    if isinstance(waiter, tuple):
        if not waiter[1].done():
            if request.error is None:
                waiter[1].set_result(request.result)
            else:
                waiter[1].set_exception(request.error)
    elif waiter is not None:
        waiter.release()
