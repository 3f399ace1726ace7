"""Dynamic batching: which waiting requests run together, and when. Pure policy first, then the threads that follow it.

:class:`BatchQueue` decides and knows no clock and no thread: tests and notebooks drive it in virtual time.
``Batcher`` (``workers.py``) runs its decisions.

Sources. Batches: adaptive batching as in Clipper (Crankshaw et al., NSDI 2017, section 4.3), made work-conserving: no
server is idle while a request waits (Kleinrock, Queueing Systems II, 1976). Overload: what cannot end in time is
refused as it comes (admission by predicted delay, as in Breakwater, Cho et al., OSDI 2020, and DAGOR, Zhou et al., SoCC
2018), and what has become hopeless makes room for what has not (the early drop of Nexus, Shen et al., SOSP 2019,
section 6.3). Shares: self-clocked fair queueing (Golestani, INFOCOM 1994), whose shares are those of deficit round
robin (Shreedhar and Varghese, SIGCOMM 1995) at a logarithmic cost, without a quantum to choose.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Hashable
from operator import attrgetter
from typing import Any, Generic, TypeVar

from flserving.errors import OverloadedError
from flserving.monitoring.metrics import Costs
from flserving.serving.config import BatchingPolicy

L = TypeVar("L", bound=Hashable)
MARGIN = 1.3
"""A batch is planned to take this many times as long as usual: one that ends a little late is lost as a whole."""


class Request(Generic[L]):
    """One caller's rows on their way through the queue: ``payload`` has ``rows`` rows and must run on ``lane``.

    ``client`` is whose share of the queue it uses; all callers without a name share one. ``state`` goes from "waiting"
    to "running" to "done"; "dropped" is a request whose caller stopped waiting, or was told that nothing comes of it.
    """

    __slots__ = (
        *("arrival_s", "client", "deadline_s", "error", "lane", "payload", "result", "rows", "state", "turn", "waiter"),
    )

    def __init__(
        self, lane: L, payload: Any, rows: int, arrival_s: float, deadline_s: float, client: Hashable = None
    ) -> None:
        self.lane = lane
        self.payload = payload
        self.rows = rows
        self.arrival_s = arrival_s
        self.deadline_s = deadline_s
        self.client = client
        self.turn = 0  # its place in the line, see BatchQueue
        self.state = "waiting"
        self.result: Any = None
        self.error: BaseException | None = None
        self.waiter: Any = None


_turn = attrgetter("turn")


class _Client:
    """What waits of one client."""

    __slots__ = ("rows", "turn")

    def __init__(self) -> None:
        self.rows = 0
        self.turn = 0  # of its last request


class BatchQueue(Generic[L]):
    """Waiting requests in one line a *lane* (a loaded model); a batch never mixes lanes, but mixes clients.

    Clients take turns by the row: a request's ``turn`` is the number of rows that a client had been served when it is,
    if all who wait had got the same. The line is in order of turns, so the requests of one client (or of all, where
    nobody has a name) are served first in, first out.

    ``work_conserving``: whoever asks gets a batch if anything waits: of the client whose turn it is; where only one
    waits, the fullest lane's, unless the oldest request of another lane has waited ``max_wait_s``. ``hold_until_full``:
    a lane is ready when it holds ``max_batch_size`` rows or one of its requests has waited ``max_wait_s``, or half of
    the time that its deadline leaves.

    By time: where all ``servers`` are at work, a request is refused that could not end before its deadline; from who
    waits nevertheless, :meth:`take` forms the largest batch that ends before the deadlines of all in it. Both follow
    ``costs``; what is not known refuses nobody.

    A request with more rows than ``max_batch_size`` makes a batch of its own, which the engine runs in chunks.
    Not thread-safe: the owner locks, and keeps ``ends_s``, when what runs now should end. ``push`` and ``drop`` cost
    O(log n), ``take`` O(lanes + batch), and O(n) when not all can be answered.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_wait_s: float,
        max_rows: int,
        policy: BatchingPolicy = "work_conserving",
        *,
        servers: int = 1,
        costs: Costs | None = None,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_wait_s = max_wait_s
        self.max_rows = max_rows
        self.policy = policy
        self.servers = servers
        self.costs = Costs() if costs is None else costs
        self.ends_s: list[float] = []
        self.rows = 0
        self._turn = 0  # the latest turn that was served
        self._lines: dict[L, list[Request[L]]] = {}  # of the lanes where something waits
        self._lane_rows: dict[L, int] = {}
        self._clients: dict[Hashable, _Client] = {}  # of whom something waits

    def __bool__(self) -> bool:
        return bool(self._lines)

    def push(self, request: Request[L], now_s: float | None = None) -> list[Request[L]]:
        """Put a request into its lane's line at ``now_s`` (its arrival when not given).

        Returns:
            Requests of clients with more than their share, dropped to make room: to be refused.

        Raises:
            OverloadedError: It could not end before its deadline; or more than ``max_rows`` rows would wait, and its
            client has its share of them. A single larger request is let into an empty queue.
        """
        self._check_time(request, request.arrival_s if now_s is None else now_s)
        dropped = self._make_room(request)
        client = self._clients.setdefault(request.client, _Client())
        client.turn = max(client.turn, self._turn) + request.rows
        client.rows += request.rows
        request.turn = client.turn
        line = self._lines.setdefault(request.lane, [])
        if line and line[-1].turn > request.turn:
            line.insert(bisect_right(line, request.turn, key=_turn), request)
        else:
            line.append(request)
        self._lane_rows[request.lane] = self._lane_rows.get(request.lane, 0) + request.rows
        self.rows += request.rows
        return dropped

    def drop(self, request: Request[L]) -> None:
        """Forget a waiting request whose caller has gone."""
        if request.state == "waiting":
            line = self._lines[request.lane]
            at = line.index(request, bisect_left(line, request.turn, key=_turn))
            self._leave(request, "dropped")
            del line[at]
            self._tidy(request.lane)

    def take(self, now_s: float, draining: bool = False) -> tuple[list[Request[L]], list[Request[L]]]:
        """The next batch to run at ``now_s`` ([] when nothing is ready), and the requests found to be too late.

        The batch's requests are of one lane, in order of their turns, together at most ``max_batch_size`` rows (or one
        larger request). Too late is who is past its deadline, or would be at the end of a batch of its own.
        ``draining`` ignores the hold of ``hold_until_full``.
        """
        late: list[Request[L]] = []
        while (first := self.first_ready(now_s, draining)) is not None:
            batch = self._fill(first.lane, now_s, late)
            if batch:
                self._turn = max(self._turn, batch[-1].turn)
                return batch, late
        return [], late

    def next_ready_s(self) -> float | None:
        """When the first held-back request becomes ready by waiting alone; None when nothing waits."""
        return min(map(self._ready_s, self._lines)) if self._lines else None

    def first_ready(self, now_s: float, draining: bool = False) -> Request[L] | None:
        """The request that :meth:`take` would look at first at ``now_s``; None when nothing is ready."""
        if not self._lines:
            return None
        held = self.policy == "hold_until_full" and not draining
        if len(self._clients) > 1:
            lanes = [lane for lane in self._lines if not held or self._is_ready(lane, now_s)]
            return min(map(self._head, lanes), key=_turn, default=None)
        oldest = min(self._lines, key=self._ready_s)
        if now_s >= self._ready_s(oldest):
            return self._head(oldest)
        fullest = max(self._lane_rows, key=self._lane_rows.__getitem__)
        if not held or self._lane_rows[fullest] >= self.max_batch_size:
            return self._head(fullest)
        return None

    # Which

    def _fill(self, lane: L, now_s: float, late: list[Request[L]]) -> list[Request[L]]:
        """Take the largest batch that ends before the deadlines of all in it, as near as halving finds it; who would be
        late even alone goes to ``late``."""
        line = self._lines[lane]
        size = min(self._lane_rows[lane], self.max_batch_size)
        while True:
            batch, hopeless, rows, seen = self._chosen(line, size, now_s)
            if 2 * rows > size or size == 1 or len(batch) + len(hopeless) == seen:  # nobody was passed over
                break
            size //= 2
        for request in batch:
            self._leave(request, "running")
        for request in hopeless:
            self._leave(request, "dropped")
        late += hopeless
        line[:seen] = [request for request in line[:seen] if request.state == "waiting"]
        self._tidy(lane)
        return batch

    def _chosen(
        self, line: list[Request[L]], size: int, now_s: float
    ) -> tuple[list[Request[L]], list[Request[L]], int, int]:
        """The first of a line who can wait for a batch of ``size`` rows; who is too late even alone; the rows of the
        batch; how much of the line was looked at."""
        end_s = now_s + MARGIN * self.usual_s(line[0].lane, size, now_s)
        batch: list[Request[L]] = []
        hopeless: list[Request[L]] = []
        rows = seen = 0
        for request in line:
            if batch and rows + request.rows > size:
                break
            seen += 1
            alone_s = now_s
            if request.deadline_s <= end_s or request.rows > size:
                alone_s += MARGIN * self.usual_s(request.lane, request.rows, now_s)
            if request.deadline_s <= alone_s:
                hopeless.append(request)
            elif request.deadline_s > end_s:
                batch.append(request)
                rows += request.rows
        return batch, hopeless, rows, seen

    # When

    def _ready_s(self, lane: L) -> float:
        if self.policy == "work_conserving":
            return self._head(lane).arrival_s + self.max_wait_s
        return min(map(self._held_until_s, self._lines[lane]))

    def _is_ready(self, lane: L, now_s: float) -> bool:
        return self._lane_rows[lane] >= self.max_batch_size or now_s >= self._ready_s(lane)

    def _held_until_s(self, request: Request[L]) -> float:
        spare_s = request.deadline_s - request.arrival_s - self.costs.usual_s(request.lane, request.rows)
        return request.arrival_s + min(self.max_wait_s, max(0.0, spare_s / 2))

    # Whether

    def _check_time(self, request: Request[L], now_s: float) -> None:
        if len(self.ends_s) < self.servers and not self._lines:
            return  # somebody is idle: to try costs nobody anything
        together = min(self._lane_rows.get(request.lane, 0) + request.rows, self.max_batch_size)
        usual_s = self.usual_s(request.lane, max(together, request.rows), now_s)
        wait_s = self._wait_s(request, now_s)
        if usual_s and now_s + wait_s + MARGIN * usual_s > request.deadline_s:
            raise OverloadedError(
                f"{self.rows} rows wait already: the answer would take about {(wait_s + usual_s) * 1e3:.0f} ms, the "
                f"deadline leaves {(request.deadline_s - now_s) * 1e3:.0f} ms: try again later, or raise timeout_ms"
            )

    def _wait_s(self, request: Request[L], now_s: float) -> float:
        """How long the batches before this request's will keep all servers at work."""
        work_s = 0.0
        for lane, rows in self._lane_rows.items():
            if lane == request.lane:
                rows = rows // self.max_batch_size * self.max_batch_size  # the rest is in its own batch
            if rows:
                work_s += self.usual_s(lane, rows, now_s)
        known = self._clients.get(request.client)
        turns = len(self._clients) + (known is None)
        mine = request.rows if known is None else known.rows + request.rows
        if turns > 1 and self.rows > turns * mine:  # it waits for its share only
            work_s *= turns * mine / self.rows
        left_s = [max(0.0, end_s - now_s) for end_s in self.ends_s]
        first_s = min(left_s) if len(left_s) >= self.servers else 0.0
        return min(first_s + work_s, max(first_s, (work_s + sum(left_s)) / self.servers))

    def usual_s(self, lane: L, rows: int, now_s: float) -> float:
        """Seconds that so many rows usually take; 0 where that is not known."""
        if rows <= self.max_batch_size:
            return self.costs.usual_s(lane, rows, now_s)
        return rows / self.max_batch_size * self.costs.usual_s(lane, self.max_batch_size, now_s)

    def _make_room(self, request: Request[L]) -> list[Request[L]]:
        """Where ``max_rows`` wait: drop the last requests of who has most, if this one's client has less than its share
        (the longest queue's drop of McKenney, INFOCOM 1990)."""
        over = self.rows + request.rows - self.max_rows
        if not self.rows or over <= 0:
            return []
        known = self._clients.get(request.client)
        turns = len(self._clients) + (known is None)
        mine = request.rows if known is None else known.rows + request.rows
        if turns == 1 or mine > self.max_rows / turns:
            raise OverloadedError(
                f"{self.rows} rows wait already, the limit is {self.max_rows}: try again later, or raise max_queue_rows"
            )
        dropped: list[Request[L]] = []
        while self.rows + request.rows > self.max_rows:
            name, client = max(self._clients.items(), key=lambda item: item[1].rows)
            theirs = (one for line in self._lines.values() for one in reversed(line) if one.client == name)
            last = max(theirs, key=_turn)
            client.turn = last.turn - last.rows
            self.drop(last)
            dropped.append(last)
        return dropped

    # Accounts

    def learn(self, lane: L, rows: int, start_s: float, end_s: float) -> None:
        """So many rows of a lane took from ``start_s`` to ``end_s``."""
        seconds = end_s - start_s
        if rows > self.max_batch_size:
            seconds *= self.max_batch_size / rows
            rows = self.max_batch_size
        self.costs.add(lane, rows, seconds, end_s)

    def _head(self, lane: L) -> Request[L]:
        return self._lines[lane][0]

    def _leave(self, request: Request[L], state: str) -> None:
        """All but its place in the line."""
        request.state = state
        self.rows -= request.rows
        self._lane_rows[request.lane] -= request.rows
        client = self._clients[request.client]
        client.rows -= request.rows
        if not client.rows:
            del self._clients[request.client]

    def _tidy(self, lane: L) -> None:
        if not self._lines[lane]:
            del self._lines[lane], self._lane_rows[lane]
