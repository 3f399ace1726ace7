"""When a client may ask again, and how long it waits before.

Full jitter: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015. The budget
is that of gRPC's proposal A6 (retry throttling): many clients that all retry would triple the load
of a server that is overloaded.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from flserving.errors import DeadlineExceededError, FlservingError, check_number


class Refused(Exception):
    """An attempt that failed with ``error``. ``again`` says whether another one may do better,
    ``after_s`` when."""

    def __init__(self, error: FlservingError, again: bool, after_s: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.again = again
        self.after_s = after_s


@dataclass(slots=True, kw_only=True)
class Retries:
    """How often and when to try again; shared by all calls of a client.

    Args:
        attempts: Most attempts of one call, the first one included; 1 never tries again.
        base_s: The n-th wait is uniform in [0, base_s * 2^n], at most ``longest_s``.
        budget: Failures in a row after which half of it is left and no call tries again; ten
            answers earn one back.
        draw: Uniform in [a, b].
    """

    attempts: int = 4
    base_s: float = 0.05
    longest_s: float = 2.0
    budget: float = 10.0
    draw: Callable[[float, float], float] = random.uniform
    left: float = field(init=False)

    EARNED = 0.1

    def __post_init__(self) -> None:
        for name, low in (("attempts", 1), ("base_s", 0), ("longest_s", 0), ("budget", 0)):
            check_number(name, getattr(self, name), low, 1e15)
        self.left = self.budget

    def wait_s(self, failures: int) -> float:
        """Seconds before attempt ``failures`` + 1."""
        return self.draw(0.0, min(self.longest_s, self.base_s * 2.0 ** min(failures - 1, 32)))


class Attempts:
    """The attempts of one call. ``left_s`` before each, then ``succeeded`` or ``failed``."""

    def __init__(self, retries: Retries, timeout_s: float, clock: Callable[[], float]) -> None:
        self._retries = retries
        self._clock = clock
        self._failures = 0
        self._timeout_s = timeout_s
        self._deadline_s = clock() + timeout_s

    def left_s(self) -> float:
        """Seconds to the deadline. Raises DeadlineExceededError when there are none."""
        left = self._deadline_s - self._clock()
        if left <= 0:
            raise DeadlineExceededError(
                f"no answer within {self._timeout_s * 1e3:.0f} ms: raise timeout_ms"
            )
        return left

    def succeeded(self) -> None:
        """Count an answer."""
        self._retries.left = min(self._retries.budget, self._retries.left + self._retries.EARNED)

    def failed(self, refused: Refused) -> float:
        """Seconds to wait before the next attempt; raises the error when there must be none."""
        self._failures += 1
        if not refused.again:
            raise refused.error
        self._retries.left = max(0.0, self._retries.left - 1)
        if (
            self._failures >= self._retries.attempts
            or self._retries.left <= self._retries.budget / 2
        ):
            raise refused.error
        wait_s = refused.after_s + self._retries.wait_s(self._failures)
        if self._clock() + wait_s >= self._deadline_s:
            raise refused.error
        return wait_s
