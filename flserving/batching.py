"""Dynamic batching: which waiting requests run together, and when. Pure policy first, then the threads that follow it.

:class:`BatchQueue` decides and knows no clock and no thread: tests and notebooks drive it in virtual time.
:class:`~flserving.workers.Batcher` (``workers.py``) runs its decisions. Imports ``errors`` and ``config``.

Source of the policy: adaptive batching as in Clipper (Crankshaw et al., NSDI 2017, section 4.3), made work-conserving:
no server is idle while a request waits (Kleinrock, Queueing Systems II, 1976).
"""

from collections import OrderedDict
from collections.abc import Hashable
from operator import attrgetter
from typing import Any, Generic, TypeVar

from flserving.config import BatchingPolicy
from flserving.errors import OverloadedError

L = TypeVar("L", bound=Hashable)


class Request(Generic[L]):
    """One caller's rows on their way through the queue: ``payload`` has ``rows`` rows and must run on ``lane``.

    ``state`` goes from "waiting" to "running" to "done"; "dropped" is a request whose caller stopped waiting.
    """

    __slots__ = ("arrival_s", "deadline_s", "error", "lane", "payload", "result", "rows", "state", "waiter")

    def __init__(self, lane: L, payload: Any, rows: int, arrival_s: float, deadline_s: float) -> None:
        self.lane, self.payload, self.rows, self.arrival_s, self.deadline_s = lane, payload, rows, arrival_s, deadline_s
        self.state = "waiting"
        self.result: Any = None
        self.error: BaseException | None = None
        self.waiter: Any = None


_arrival_s = attrgetter("arrival_s")


class BatchQueue(Generic[L]):
    """Waiting requests in one first-in-first-out line a *lane* (a loaded model); a batch never mixes lanes.

    ``work_conserving``: whoever asks gets a batch if anything waits: the fullest lane's, unless the oldest request of
    another lane has waited ``max_wait_s``. ``hold_until_full``: a lane is ready when it holds ``max_batch_size`` rows
    or its oldest request has waited ``max_wait_s``.

    A request with more rows than ``max_batch_size`` makes a batch of its own, which the engine runs in chunks.
    Not thread-safe: the owner locks. ``push`` and ``drop`` cost O(1), ``take`` O(lanes + batch).
    """

    def __init__(
        self, max_batch_size: int, max_wait_s: float, max_rows: int, policy: BatchingPolicy = "work_conserving"
    ) -> None:
        self.max_batch_size, self.max_wait_s, self.max_rows, self.policy = max_batch_size, max_wait_s, max_rows, policy
        self.rows = 0
        self._lines: dict[L, OrderedDict[Request[L], None]] = {}  # of the lanes where something waits
        self._lane_rows: dict[L, int] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def push(self, request: Request[L]) -> None:
        """Append a request to its lane.

        Raises:
            OverloadedError: More than ``max_rows`` rows would wait. A single larger request is let into an empty queue.
        """
        if self.rows and self.rows + request.rows > self.max_rows:
            raise OverloadedError(
                f"{self.rows} rows wait already, the limit is {self.max_rows}: try again later, or raise max_queue_rows"
            )
        lane = request.lane
        if lane not in self._lines:
            self._lines[lane], self._lane_rows[lane] = OrderedDict(), 0
        self._lines[lane][request] = None
        self._lane_rows[lane] += request.rows
        self.rows += request.rows

    def drop(self, request: Request[L]) -> None:
        """Forget a waiting request whose caller has gone."""
        if request.state == "waiting":
            self._remove(request, "dropped")

    def take(self, now_s: float, draining: bool = False) -> tuple[list[Request[L]], list[Request[L]]]:
        """The next batch to run at ``now_s`` ([] when nothing is ready), and the requests found past their deadline.

        The batch's requests are of one lane, in order of arrival, together at most ``max_batch_size`` rows (or one
        larger request). ``draining`` ignores the hold of ``hold_until_full``.
        """
        expired: list[Request[L]] = []
        while (first := self.first_ready(now_s, draining)) is not None:
            line, rows = self._lines[first.lane], 0
            batch: list[Request[L]] = []
            while line and (not batch or rows + next(iter(line)).rows <= self.max_batch_size):
                request = next(iter(line))
                if request.deadline_s <= now_s:
                    self._remove(request, "dropped")
                    expired.append(request)
                else:
                    self._remove(request, "running")
                    batch.append(request)
                    rows += request.rows
            if batch:
                return batch, expired
        return [], expired

    def next_ready_s(self) -> float | None:
        """When the oldest held-back request becomes ready by waiting alone; None when nothing waits."""
        return min(self._head(lane).arrival_s for lane in self._lines) + self.max_wait_s if self._lines else None

    def first_ready(self, now_s: float, draining: bool = False) -> Request[L] | None:
        """The request that :meth:`take` would look at first at ``now_s``; None when nothing is ready."""
        if not self._lines:
            return None
        oldest = min(map(self._head, self._lines), key=_arrival_s)
        if now_s >= oldest.arrival_s + self.max_wait_s:  # written as in next_ready_s: floats round
            return oldest
        fullest = max(self._lane_rows, key=self._lane_rows.__getitem__)
        if self.policy == "work_conserving" or draining or self._lane_rows[fullest] >= self.max_batch_size:
            return self._head(fullest)
        return None

    def _head(self, lane: L) -> Request[L]:
        return next(iter(self._lines[lane]))

    def _remove(self, request: Request[L], state: str) -> None:
        request.state, lane = state, request.lane
        self.rows -= request.rows
        self._lane_rows[lane] -= request.rows
        del self._lines[lane][request]
        if not self._lines[lane]:
            del self._lines[lane], self._lane_rows[lane]
