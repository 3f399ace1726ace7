"""Shadow traffic: a copy of a request runs on another version, is compared with the answer given, and is thrown away.

One thread, a bounded queue, at most about 1,000 copies a second. A copy that finds the queue full, or the server busy
when its turn comes, is dropped: callers' own requests go first. Nothing that happens here reaches an answer.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flserving import forks

Key = tuple[str, str]
Run = Callable[[Key, NDArray[Any], Any], NDArray[Any]]
"""The predictions of a version for the rows of a client."""
IDLE_S = 1.0
MOST_NBYTES = 1 << 20  # a larger request is not copied
PAUSE_S = 1e-3  # between two copies: a thread that never rests keeps the interpreter lock from callers for up to 5 ms


class Shadow:
    """Args: ``run`` runs a version, ``busy`` says that callers wait; ``capacity``: most copies that wait."""

    def __init__(self, run: Run, busy: Callable[[], bool], capacity: int = 64) -> None:
        self._run = run
        self._busy = busy
        self._capacity = capacity
        self._counts: dict[Key, dict[str, float]] = {}
        self._begin()
        forks.in_child(self, Shadow._begin)

    def _begin(self) -> None:
        """Nothing waits and nobody works: at the start, and in a forked child."""
        self._waiting: queue.Queue[tuple[Key, NDArray[Any], Any, NDArray[Any]]] = queue.Queue(self._capacity)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def offer(self, key: Key, rows: NDArray[Any], client: Any, given: NDArray[Any]) -> None:
        """Take a copy of a request and of the predictions that it was answered with. Never waits."""
        if self._closed.is_set():
            return
        try:
            if rows.nbytes > MOST_NBYTES or self._waiting.full():
                raise queue.Full
            self._waiting.put_nowait((key, rows.copy(), client, given.copy()))
        except queue.Full:
            return self._count(key, dropped=1)
        with self._lock, contextlib.suppress(RuntimeError):  # no thread to be had: what waits stays, and is bounded
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="flserving-shadow", daemon=True)
                thread.start()
                self._thread = thread

    def stats(self, key: Key) -> dict[str, float]:
        """``ran``, ``dropped``, ``failed``, ``rows``, ``agreeing`` rows, ``seconds`` of those that ran."""
        with self._lock:
            return dict.fromkeys(("ran", "dropped", "failed", "rows", "agreeing", "seconds"), 0) | self._counts.get(
                key, {}
            )

    def close(self) -> None:
        """Drop what waits and join. Idempotent."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        if (thread := self._thread) is not None:
            thread.join()

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                copy = self._waiting.get(timeout=IDLE_S)
            except queue.Empty:  # leave, so that a forgotten server can be collected
                with self._lock:
                    if self._waiting.empty():
                        self._thread = None
                        return
                continue
            self._compare(*copy)
            del copy
            self._closed.wait(PAUSE_S)

    def _compare(self, key: Key, rows: NDArray[Any], client: Any, given: NDArray[Any]) -> None:
        if self._busy():
            return self._count(key, dropped=1)
        began_s = time.perf_counter()
        try:
            said = self._run(key, rows, client)
        except Exception:  # the shadow's own trouble: counted, and no caller's
            return self._count(key, failed=1)
        seconds = time.perf_counter() - began_s
        same = said.shape == given.shape and np.isclose(said, given, rtol=1e-4, atol=1e-6).reshape(len(rows), -1)
        agreeing = int(np.all(same, axis=1).sum()) if same is not False else 0
        self._count(key, ran=1, rows=len(rows), agreeing=agreeing, seconds=seconds)

    def _count(self, key: Key, **more: float) -> None:
        with self._lock:
            counts = self._counts.setdefault(key, {})
            for name, value in more.items():
                counts[name] = counts.get(name, 0) + value
