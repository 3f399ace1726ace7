"""A circuit breaker: who keeps failing is left alone for a while.

Source: M. Nygard, "Release It!", 2007, chapter 5.
"""

import math
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from flserving.errors import check_number

State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Opens after ``failures`` failures in a row; then lets one call through every ``pause_s``; a
    success closes it.

    Before a call ask :meth:`allow`; after it say how it went with :meth:`record`. A probe that
    nobody reports on is followed by the next one a pause later, so that a cancelled caller cannot
    keep it open. Thread-safe.

    Args:
        clock: Monotonic seconds.

    Raises:
        ConfigError: ``failures`` is no integer of at least 1, or ``pause_s`` no number of at least
            0.001.
    """

    def __init__(
        self, failures: int = 5, pause_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        check_number("failures", failures, 1, math.inf, whole=True)
        check_number("pause_s", pause_s, 1e-3, 86_400)
        self._most = failures
        self._pause_s = pause_s
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._probe_at_s = 0.0
        self._opened = 0
        self._refused = 0

    @property
    def state(self) -> State:
        """``half_open``: the next call is let through, to see; ``open``: none is."""
        if self._in_a_row < self._most:
            return "closed"
        return "open" if self._clock() < self._probe_at_s else "half_open"

    def allow(self) -> bool:
        """Whether to make a call now."""
        with self._lock:
            state = self.state
            if state == "half_open":
                self._probe_at_s = self._clock() + self._pause_s
            self._refused += state == "open"
            return state != "open"

    def record(self, succeeded: bool) -> None:
        """How a call went that was allowed."""
        with self._lock:
            self._in_a_row = 0 if succeeded else self._in_a_row + 1
            if self._in_a_row == self._most:
                self._opened += 1
                self._probe_at_s = self._clock() + self._pause_s

    def stats(self) -> dict[str, Any]:
        """``state``, ``failures_in_a_row``, and how often it ``opened`` and ``refused`` since the
        start."""
        with self._lock:
            return {
                "state": self.state,
                "failures_in_a_row": self._in_a_row,
                "opened": self._opened,
                "refused": self._refused,
            }
