"""A retry storm in virtual time: callers that ask again, and a server that stood still for a
moment.

Nothing here sleeps. The waits and the budget are the real ones of our client
(``flserving.api.client.retries``), or those of a student's ``policy``.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from flserving.api.client.retries import Attempts, Refused, Retries
from flserving.errors import FlservingError, ServerClosedError
from flserving.lab.queueing.arrivals import Floats


@dataclass(frozen=True)
class Storm:
    """What happened, times in seconds: when each try reached the server, when each call was first
    made, and its end.

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
        made = np.histogram(self.call_s, edges)[0]
        good = np.histogram(self.call_s[self.answered], edges)[0]
        return np.asarray(good / np.maximum(made, 1), np.float64)


class _Suspended(BaseException):
    """Unwinds a policy that waits for an answer; no Exception, so that no ``except Exception``
    catches it."""


class _PolicyCall:
    """One call by a function that blocks, in virtual time.

    The function is run again from its start for each try, through what it has seen so far, and
    stopped where it would wait for the next answer. What it draws from ``random`` and what its
    budget says is the same in each run.
    """

    def __init__(
        self, policy: Callable[..., Any], deadline_s: float, budget: Any, began_s: float, seed: int
    ) -> None:
        self._policy = policy
        self._deadline_s = deadline_s
        self._budget = budget
        self._began_s = began_s
        self._seed = seed
        self._ends: list[tuple[float, bool]] = []  # of each try: when, and whether it was answered
        self._said: list[object] = []  # by the budget
        self._now_s = began_s
        self.timeout_s = deadline_s

    def begin(self) -> float | None:
        """When the first try is sent."""
        return self._run()

    def failed(self, now_s: float) -> float | None:
        """When the next try is sent; None: there is none."""
        self._ends.append((now_s, False))
        return self._run()

    def succeeded(self, now_s: float) -> None:
        self._ends.append((now_s, True))
        self._run()

    def may_retry(self) -> object:
        return self._once(self._budget.may_retry)

    def answered(self) -> object:
        return self._once(self._budget.answered)

    def _once(self, ask: Callable[[], object]) -> object:
        """What the budget said when it was asked for the first time."""
        said = next(self._said_before, self)
        if said is self:
            said = ask()
            self._said.append(said)
        return said

    def _run(self) -> float | None:
        self._now_s = self._began_s
        self._ends_before = iter(tuple(self._ends))
        self._said_before: Iterator[object] = iter(tuple(self._said))
        random.seed(self._seed)
        try:
            self._policy(self._send, self._deadline_s, self, self._clock, self._sleep)
        except _Suspended:
            return self._now_s
        except FlservingError:
            pass  # the caller is told
        return None

    def _clock(self) -> float:
        return self._now_s

    def _sleep(self, seconds: float) -> None:
        self._now_s += seconds

    def _send(self, timeout_s: float) -> str:
        end = next(self._ends_before, None)
        if end is None:
            self.timeout_s = timeout_s
            raise _Suspended
        self._now_s, answered = end
        if answered:
            return "an answer"
        error = ServerClosedError("no answer")
        error.retry_after_s = 0.0  # type: ignore[attr-defined]
        raise error


class _ClientCall:
    """One call by our own client."""

    timeout_s = np.inf

    def __init__(self, retries: Retries, began_s: float) -> None:
        self._began_s = began_s
        self._attempts = Attempts(retries, 1e9, lambda: began_s)

    def begin(self) -> float | None:
        return self._began_s

    def failed(self, now_s: float) -> float | None:
        try:
            return now_s + self._attempts.failed(
                Refused(ServerClosedError("no answer"), again=True)
            )
        except FlservingError:
            return None

    def succeeded(self, now_s: float) -> None:
        self._attempts.succeeded()


def simulate_storm(
    *,
    attempts: int = 4,
    budget: float | None = None,
    policy: Callable[..., Any] | None = None,
    make_budget: Callable[[], Any] | None = None,
    deadline_s: float = 4.0,
    drops_late: bool = False,
    rate_per_s: float = 300,
    capacity_per_s: float = 500,
    stands_still_s: tuple[float, float] = (5, 8),
    timeout_s: float = 1.0,
    seconds: int = 30,
    clients: int = 50,
    seed: int = 5,
) -> Storm:
    """Poisson calls of ``clients`` to one server that works in the order of arrival, and stands
    still once.

    Args:
        attempts: Most tries of a call; 1 never asks again. A try that has no answer after
            ``timeout_s`` has failed.
        budget: Of each client, see :class:`Retries`; None for no bound at all.
        policy: Who calls, instead of our client: ``policy(send, deadline_s, budget, clock, sleep)``
            as in notebook 05. A try that failed raises an error of status 503.
        make_budget: Called once for each client: the budget that its calls by ``policy`` share.
        deadline_s: Of a whole call by ``policy``.
        drops_late: Whether the server knows until when a try is waited for, and spends no time on a
            later one.
    """
    rng = np.random.default_rng(seed)

    def draw(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    most = 1e12 if budget is None else budget
    retries = [Retries(attempts=attempts, budget=most, draw=draw) for _ in range(clients)]
    budgets = [make_budget() if make_budget else None for _ in range(clients)]
    call_s = np.sort(rng.uniform(0, seconds, rng.poisson(rate_per_s * seconds)))
    order = itertools.count()
    events: list[tuple[float, int, str, int]] = []
    calls: list[_PolicyCall | _ClientCall] = []
    before = random.getstate()  # a policy draws from it

    def later(at_s: float | None, event: str, call: int) -> None:
        if at_s is not None:
            heapq.heappush(events, (at_s, next(order), event, call))

    try:
        for call, at_s in enumerate(call_s.tolist()):
            client = call % clients
            calls.append(
                _ClientCall(retries[client], at_s)
                if policy is None
                else _PolicyCall(policy, deadline_s, budgets[client], at_s, seed=call)
            )
            later(calls[call].begin(), "try", call)
        answered = np.zeros(len(call_s), np.bool_)
        try_s = list[float]()
        free_s = 0.0
        while events:
            now_s, _, event, call = heapq.heappop(events)
            if event == "answer":
                calls[call].succeeded(now_s)
                answered[call] = True
            elif event == "fail":
                later(calls[call].failed(now_s), "try", call)
            elif now_s < seconds:
                try_s.append(now_s)
                begin_s = max(now_s, free_s)
                if stands_still_s[0] <= begin_s < stands_still_s[1]:
                    begin_s = stands_still_s[1]
                end_s = begin_s + 1 / capacity_per_s
                late_s = now_s + min(timeout_s, calls[call].timeout_s)
                if not (drops_late and end_s > late_s):
                    free_s = end_s
                if end_s <= late_s:
                    later(end_s, "answer", call)
                else:
                    later(late_s, "fail", call)
    finally:
        random.setstate(before)
    return Storm(np.array(try_s), call_s, answered, seconds)


SCENARIOS: dict[str, dict[str, object]] = {
    "nobody asks again": {"attempts": 1},
    "up to 4 tries": {},
    "up to 4 tries, with a budget": {"budget": 10},
    "up to 4 tries, late ones dropped": {"drops_late": True},
}
"""What notebook 05 compares."""
