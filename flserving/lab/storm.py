"""A retry storm in virtual time: callers that ask again, and a server that stood still for a moment.

Nothing here sleeps. The waits and the budget are the real ones of our client (``flserving.api.client.retries``).
"""

import heapq
import itertools
from dataclasses import dataclass

import numpy as np

from flserving.api.client.retries import Attempts, Refused, Retries
from flserving.errors import FlservingError, ServerClosedError
from flserving.lab.arrivals import Floats


@dataclass(frozen=True)
class Storm:
    """What happened, times in seconds: when each try reached the server, when each call was first made, and its end.

    ``try_s`` is float64 [T], ``call_s`` float64 [N], ``answered`` bool [N].
    """

    try_s: Floats
    call_s: Floats
    answered: np.ndarray[tuple[int], np.dtype[np.bool_]]
    seconds: float

    def tries_per_s(self) -> Floats:
        """Tries that reached the server in each second."""
        return np.histogram(self.try_s, np.arange(self.seconds + 1))[0].astype(np.float64)

    def answered_share(self) -> Floats:
        """Of the calls first made in each second, the share that was answered in the end."""
        edges = np.arange(self.seconds + 1)
        made, good = np.histogram(self.call_s, edges)[0], np.histogram(self.call_s[self.answered], edges)[0]
        return np.asarray(good / np.maximum(made, 1), np.float64)


def simulate_storm(
    *,
    attempts: int = 4,
    budget: float | None = None,
    drops_late: bool = False,
    rate_per_s: float = 300,
    capacity_per_s: float = 500,
    stands_still_s: tuple[float, float] = (5, 8),
    timeout_s: float = 1.0,
    seconds: int = 30,
    clients: int = 50,
    seed: int = 5,
) -> Storm:
    """Poisson calls of ``clients`` to one server that works in the order of arrival, and stands still once.

    Args:
        attempts: Most tries of a call; 1 never asks again. A try that has no answer after ``timeout_s`` has failed.
        budget: Of each client, see :class:`Retries`; None for no bound at all.
        drops_late: Whether the server knows until when a try is waited for, and spends no time on a later one.
    """
    rng, now_s = np.random.default_rng(seed), 0.0

    def draw(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    policies = [
        Retries(attempts=attempts, budget=1e12 if budget is None else budget, draw=draw) for _ in range(clients)
    ]
    call_s = np.sort(rng.uniform(0, seconds, rng.poisson(rate_per_s * seconds)))
    calls = [Attempts(policies[i % clients], 1e9, lambda: now_s) for i in range(len(call_s))]
    order = itertools.count()
    events = [(float(at_s), next(order), "try", call) for call, at_s in enumerate(call_s)]
    heapq.heapify(events)
    answered, try_s, free_s = np.zeros(len(call_s), np.bool_), list[float](), 0.0
    while events:
        now_s, _, event, call = heapq.heappop(events)
        if event == "answer":
            calls[call].succeeded()
            answered[call] = True
        elif event == "fail":
            try:
                wait_s = calls[call].failed(Refused(ServerClosedError("no answer"), again=True))
            except FlservingError:
                continue
            heapq.heappush(events, (now_s + wait_s, next(order), "try", call))
        elif now_s < seconds:
            try_s.append(now_s)
            begin_s = max(now_s, free_s)
            if stands_still_s[0] <= begin_s < stands_still_s[1]:
                begin_s = stands_still_s[1]
            end_s, late_s = begin_s + 1 / capacity_per_s, now_s + timeout_s
            if not (drops_late and end_s > late_s):
                free_s = end_s
            heapq.heappush(events, (end_s, next(order), "answer", call) if end_s <= late_s
                           else (late_s, next(order), "fail", call))  # fmt: skip
    return Storm(np.array(try_s), call_s, answered, seconds)


SCENARIOS: dict[str, dict[str, object]] = {
    "nobody asks again": {"attempts": 1},
    "up to 4 tries": {},
    "up to 4 tries, with a budget": {"budget": 10},
    "up to 4 tries, late ones dropped": {"drops_late": True},
}
"""What notebook 05 compares."""
