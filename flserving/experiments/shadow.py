"""Shadow traffic: a copy of a request runs on another version, is compared with the answer given,
and is thrown away.

One thread, a bounded queue, at most about 1,000 copies a second. A copy that finds the queue full,
or the server busy when it comes up, is dropped: callers' own requests go first. Nothing that
happens here reaches an answer.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flserving import forks
from flserving.errors import OverloadedError, ServerClosedError
from flserving.experiments.bookkeeping import Clerk

Key = tuple[str, str]
Run = Callable[[Key, NDArray[Any], Any], NDArray[Any]]
"""The predictions of a version for the rows of a client."""
MOST_NBYTES = 1 << 20  # a larger request is not copied
# between two copies: a thread that never rests keeps the interpreter lock from callers for up to 5
# ms
PAUSE_S = 1e-3


class Shadow:
    """Args: ``run`` runs a version, ``busy`` says that callers wait; ``capacity``: most copies that
    wait."""

    def __init__(self, run: Run, busy: Callable[[], bool], capacity: int = 64) -> None:
        self._run = run
        self._busy = busy
        self._capacity = capacity
        self._counts: dict[Key, Counter[str]] = {}
        self._begin()
        forks.in_child(self, Shadow._begin)

    def _begin(self) -> None:
        """Nothing waits and nobody works: at the start, and in a forked child."""
        self._clerk = Clerk(self._capacity + 1)  # one of them runs
        self._lock = threading.Lock()

    def offer(self, key: Key, rows: NDArray[Any], client: Any, given: NDArray[Any]) -> None:
        """Take a copy of a request and of the predictions that it was answered with. Never
        waits."""
        if rows.nbytes > MOST_NBYTES:
            self._count(key, dropped=1)
            return
        try:
            self._clerk.do(self._take_turn, key, rows.copy(), client, given.copy())
        except OverloadedError:
            self._count(key, dropped=1)
        except ServerClosedError:
            return

    def stats(self, key: Key) -> dict[str, float]:
        """``ran``, ``dropped``, ``failed``, ``rows``, ``agreeing`` rows, ``seconds`` of those that
        ran."""
        stats: dict[str, float] = dict.fromkeys(
            ("ran", "dropped", "failed", "rows", "agreeing", "seconds"), 0
        )
        with self._lock:
            return stats | self._counts.get(key, {})

    def close(self) -> None:
        """Drop what waits and join. Idempotent."""
        self._clerk.close()

    def _take_turn(self, *copy: Any) -> None:
        self._compare(*copy)
        time.sleep(PAUSE_S)

    def _compare(self, key: Key, rows: NDArray[Any], client: Any, given: NDArray[Any]) -> None:
        if self._busy():
            self._count(key, dropped=1)
            return
        began_s = time.perf_counter()
        try:
            found = self._run(key, rows, client)
        except Exception:  # the shadow's own trouble: counted, and no caller's
            self._count(key, failed=1)
        else:
            seconds = time.perf_counter() - began_s
            agreeing = 0
            if found.shape == given.shape:
                close = np.isclose(found, given, rtol=1e-4, atol=1e-6).reshape(len(rows), -1)
                agreeing = int(close.all(axis=1).sum())
            self._count(key, ran=1, rows=len(rows), agreeing=agreeing, seconds=seconds)

    def _count(self, key: Key, **more: float) -> None:
        with self._lock:
            self._counts.setdefault(key, Counter()).update(more)
