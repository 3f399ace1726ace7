"""Who keeps the books: one thread for what may block, and a bounded number of jobs that wait for it.

A disk may be locked, full or gone; an answer must not wait for it. So whatever writes down what answers were given, and
draws conclusions from it, is a job for a clerk.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from flserving.errors import OverloadedError, ServerClosedError

T = TypeVar("T")


class Clerk:
    """A thread that does one job after the other; it starts with the first. For any thread, event loops too: nothing
    here waits, but :meth:`close`.

    Args:
        capacity: Most jobs that wait or run; further ones are refused.
    """

    def __init__(self, capacity: int = 256) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flserving-clerk")  # ends when it is forgotten
        self._places = threading.BoundedSemaphore(capacity)
        self._routine: Future[Any] | None = None

    def do(self, job: Callable[..., T], *args: Any) -> Future[T]:
        """Queue a job. Raises OverloadedError: Too many wait. ServerClosedError."""
        if not self._places.acquire(blocking=False):
            raise OverloadedError("the books of experiments are behind: try again later")
        try:
            future = self._pool.submit(job, *args)
        except RuntimeError:
            self._places.release()
            raise ServerClosedError("the server was closed: open a new one") from None
        future.add_done_callback(lambda _: self._places.release())
        return future

    def routine(self, job: Callable[[], object]) -> None:
        """Do ``job`` soon, unless the last one is not over yet: who calls this again and again piles nothing up."""
        if self._routine is None or self._routine.done():
            with suppress(OverloadedError, ServerClosedError):  # the next call comes
                self._routine = self.do(job)

    def close(self) -> None:
        """Drop what waits, and wait for what runs. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
