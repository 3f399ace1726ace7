"""Who keeps the books: one thread for what may block, and a bounded number of jobs that wait for
it.

A disk may be locked, full or gone; an answer must not wait for it. So whatever writes down what
answers were given, and draws conclusions from it, is a job for a clerk.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from flserving.errors import OverloadedError, ServerClosedError

T = TypeVar("T")


class Clerk:
    """A thread that does one job after the other; it starts with the first. For any thread, event
    loops too: nothing here waits, but :meth:`close`.

    Args:
        capacity: Most jobs that wait or run; further ones are refused.
    """

    def __init__(self, capacity: int = 256) -> None:
        self._pool = _pool()
        self._closed = False
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(capacity)
        self._routine: Future[Any] | None = None

    def do(self, job: Callable[..., T], *args: Any) -> Future[T]:
        """Queue a job. Raises OverloadedError: Too many wait. ServerClosedError."""
        with self._lock:
            if self._closed:
                raise ServerClosedError("the server was closed: open a new one")
            if not self._places.acquire(blocking=False):
                raise OverloadedError("the books of experiments are behind: try again later")
            try:
                future = self._pool.submit(job, *args)
            except RuntimeError:
                # No thread could start, but the pool keeps the job. It has no thread, so it holds
                # refused jobs only.
                self._pool = _pool()
                self._places.release()
                raise OverloadedError(
                    "no thread can start for the books of experiments: try again later"
                ) from None
        future.add_done_callback(lambda _: self._places.release())
        return future

    def routine(self, job: Callable[..., object], *args: Any) -> None:
        """Do ``job`` soon, unless the last one is not over yet: who calls this again and again
        piles nothing up."""
        if self._routine is None or self._routine.done():
            with suppress(OverloadedError, ServerClosedError):  # the next call comes
                self._routine = self.do(job, *args)

    def close(self) -> None:
        """Drop what waits, and wait for what runs. Idempotent."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)


def _pool() -> ThreadPoolExecutor:
    """One thread, which starts with the first job and ends when nobody holds the pool any more."""
    return ThreadPoolExecutor(1, thread_name_prefix="flserving-clerk")
