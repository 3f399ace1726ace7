"""Dynamic batching: which waiting requests run together, and when. Pure policy first, then the
threads that follow it.

:class:`BatchQueue` decides and knows no clock and no thread: tests and notebooks drive it in
virtual time. ``Batcher`` (``workers.py``) runs its decisions.

Sources. Batches: adaptive batching as in Clipper (Crankshaw et al., NSDI 2017, section 4.3), made
work-conserving: no server is idle while a request waits (Kleinrock, Queueing Systems II, 1976).
Overload: what cannot end in time is refused as it comes (admission by predicted delay, as in
Breakwater, Cho et al., OSDI 2020, and DAGOR, Zhou et al., SoCC 2018), and what has become hopeless
makes room for what has not (the early drop of Nexus, Shen et al., SOSP 2019, section 6.3). Shares:
self-clocked fair queueing (Golestani, INFOCOM 1994), whose shares are those of deficit round robin
(Shreedhar and Varghese, SIGCOMM 1995) at a logarithmic cost, without a quantum to choose.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Hashable
from operator import attrgetter
from typing import Any, Generic, TypeAlias, TypeVar

from flserving.errors import OverloadedError
from flserving.monitoring.metrics import Costs
from flserving.serving.config import BatchingPolicy

E = TypeVar("E", bound=Hashable)
MARGIN = 1.3
"""A batch is planned to take this many times as long as usual: one that ends a little late is lost
as a whole."""


class QueuedRequest(Generic[E]):
    """One caller's rows on their way through the queue: ``payload`` has ``rows`` rows and must run
    on ``engine``.

    ``client`` is whose share of the queue it uses; all callers without a name share one. ``state``
    goes from "waiting" to "running" to "done"; "dropped" is a request whose caller stopped waiting,
    or was told that nothing comes of it.
    """

    __slots__ = (
        "arrival_s",
        "client",
        "deadline_s",
        "engine",
        "error",
        "payload",
        "result",
        "rows",
        "state",
        "turn",
        "waiter",
    )

    def __init__(
        self,
        engine: E,
        payload: Any,
        rows: int,
        arrival_s: float,
        deadline_s: float,
        client: Hashable = None,
    ) -> None:
        self.engine = engine
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


def in_ms(seconds: float) -> str:
    """``in_ms(0.1)`` is "100 ms", ``in_ms(1e-5)`` "0.01 ms": for messages."""
    return f"{round(seconds * 1e3, 2):g} ms"


Requests: TypeAlias = list[QueuedRequest[E]]


class BatchQueue(Generic[E]):
    """Waiting requests, one line for each engine (a loaded model); a batch never mixes engines, but
    mixes clients.

    Clients take turns by the row: a request's ``turn`` is the number of rows that a client had been
    served when it is, if all who wait had got the same. The line is in order of turns, so the
    requests of one client (or of all, where nobody has a name) are served first in, first out.

    ``work_conserving``: a free worker gets a batch if anything waits: of the client whose turn it
    is; where only one waits, the fullest line's, unless the oldest request of another engine has
    waited ``max_wait_s``. ``hold_until_full``: a line is ready when it holds ``max_batch_size``
    rows, or when one of its requests has waited ``max_wait_s`` or half of the time that its
    deadline leaves.

    By time: where all ``servers`` are at work, a request is refused that could not end before its
    deadline; from who waits nevertheless, :meth:`take` forms the largest batch that ends before the
    deadlines of all in it. Both follow ``costs``; what is not known refuses nobody.

    A request with more rows than ``max_batch_size`` makes a batch of its own, which the engine runs
    in chunks. Not thread-safe: the owner locks, and keeps ``ends_s``, when what runs now should
    end. ``push`` and ``drop`` cost O(log n), ``take`` O(engines + batch), and O(n) when not all can
    be answered.
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
        self._lines: dict[E, Requests[E]] = {}  # of the engines where something waits
        self._engine_rows: dict[E, int] = {}
        self._clients: dict[Hashable, _Client] = {}  # of whom something waits

    def __bool__(self) -> bool:
        return bool(self._lines)

    def push(self, request: QueuedRequest[E], now_s: float | None = None) -> Requests[E]:
        """Put a request into its engine's line at ``now_s`` (its arrival when not given).

        Returns:
            Requests of clients with more than their share, dropped to make room: to be refused.

        Raises:
            OverloadedError: It could not end before its deadline; or more than ``max_rows`` rows
                would wait, and its client has its share of them. A single larger request is let
                into an empty queue.
        """
        self._check_time(request, request.arrival_s if now_s is None else now_s)
        dropped = self._make_room(request)
        client = self._clients.get(request.client)
        if client is None:
            client = self._clients[request.client] = _Client()
        client.turn = max(client.turn, self._turn) + request.rows
        client.rows += request.rows
        request.turn = client.turn
        line = self._lines.setdefault(request.engine, [])
        if line and line[-1].turn > request.turn:
            line.insert(bisect_right(line, request.turn, key=_turn), request)
        else:
            line.append(request)
        self._engine_rows[request.engine] = self._engine_rows.get(request.engine, 0) + request.rows
        self.rows += request.rows
        return dropped

    def drop(self, request: QueuedRequest[E]) -> None:
        """Forget a waiting request whose caller has gone."""
        if request.state == "waiting":
            line = self._lines[request.engine]
            at = line.index(request, bisect_left(line, request.turn, key=_turn))
            self._leave(request, "dropped")
            del line[at]
            self._tidy(request.engine)

    def take(self, now_s: float, draining: bool = False) -> tuple[Requests[E], Requests[E]]:
        """The next batch to run at ``now_s`` ([] when nothing is ready), and the requests found to
        be too late.

        The batch's requests are for one engine, in order of their turns, together at most
        ``max_batch_size`` rows (or one larger request). Too late is who is past its deadline, or
        would be at the end of a batch of its own. ``draining`` ignores the hold of
        ``hold_until_full``.
        """
        late: Requests[E] = []
        while (first := self.first_ready(now_s, draining)) is not None:
            batch = self._fill(first.engine, now_s, late)
            if batch:
                self._turn = max(self._turn, batch[-1].turn)
                return batch, late
        return [], late

    def next_ready_s(self) -> float | None:
        """When the first held-back request becomes ready by waiting alone; None when nothing
        waits."""
        return min(map(self._ready_s, self._lines)) if self._lines else None

    def first_ready(self, now_s: float, draining: bool = False) -> QueuedRequest[E] | None:
        """The request that :meth:`take` would look at first at ``now_s``; None when nothing is
        ready."""
        if not self._lines:
            return None
        held = self.policy == "hold_until_full" and not draining
        if len(self._clients) > 1:
            engines = [
                engine for engine in self._lines if not held or self._is_ready(engine, now_s)
            ]
            return min(map(self._head, engines), key=_turn, default=None)
        oldest = min(self._lines, key=self._ready_s)
        if now_s >= self._ready_s(oldest):
            return self._head(oldest)
        fullest = max(self._engine_rows, key=self._engine_rows.__getitem__)
        if not held or self._engine_rows[fullest] >= self.max_batch_size:
            return self._head(fullest)
        return None

    # Which

    def _fill(self, engine: E, now_s: float, late: Requests[E]) -> Requests[E]:
        """Take the largest batch that ends before the deadlines of all in it, as near as halving
        finds it; who would be late even alone goes to ``late``."""
        line = self._lines[engine]
        size = min(self._engine_rows[engine], self.max_batch_size)
        while True:
            batch, hopeless, rows, seen = self._chosen(line, size, now_s)
            # nobody was passed over
            if 2 * rows > size or size == 1 or len(batch) + len(hopeless) == seen:
                break
            size //= 2
        for request in batch:
            self._leave(request, "running")
        for request in hopeless:
            self._leave(request, "dropped")
        late += hopeless
        line[:seen] = [request for request in line[:seen] if request.state == "waiting"]
        self._tidy(engine)
        return batch

    def _chosen(
        self, line: Requests[E], size: int, now_s: float
    ) -> tuple[Requests[E], Requests[E], int, int]:
        """The first of a line who can wait for a batch of ``size`` rows; who is too late even
        alone; the rows of the batch; how much of the line was looked at."""
        end_s = now_s + MARGIN * self.usual_s(line[0].engine, size, now_s)
        batch: Requests[E] = []
        hopeless: Requests[E] = []
        rows = seen = 0
        for request in line:
            if batch and rows + request.rows > size:
                break
            seen += 1
            alone_s = now_s
            if request.deadline_s <= end_s or request.rows > size:
                alone_s += MARGIN * self.usual_s(request.engine, request.rows, now_s)
            if request.deadline_s <= alone_s:
                hopeless.append(request)
            elif request.deadline_s > end_s:
                batch.append(request)
                rows += request.rows
        return batch, hopeless, rows, seen

    # When

    def _ready_s(self, engine: E) -> float:
        if self.policy == "work_conserving":
            return self._head(engine).arrival_s + self.max_wait_s
        return min(map(self._held_until_s, self._lines[engine]))

    def _is_ready(self, engine: E, now_s: float) -> bool:
        return self._engine_rows[engine] >= self.max_batch_size or now_s >= self._ready_s(engine)

    def _held_until_s(self, request: QueuedRequest[E]) -> float:
        spare_s = (
            request.deadline_s
            - request.arrival_s
            - self.costs.usual_s(request.engine, request.rows)
        )
        return request.arrival_s + min(self.max_wait_s, max(0.0, spare_s / 2))

    # Whether

    def _check_time(self, request: QueuedRequest[E], now_s: float) -> None:
        if len(self.ends_s) < self.servers and not self._lines:
            return  # somebody is idle: to try costs nobody anything
        together = min(self._engine_rows.get(request.engine, 0) + request.rows, self.max_batch_size)
        usual_s = self.usual_s(request.engine, max(together, request.rows), now_s)
        wait_s = self._wait_s(request, now_s)
        if usual_s and now_s + wait_s + MARGIN * usual_s > request.deadline_s:
            raise OverloadedError(
                f"{self.rows} rows wait already: the answer would take about {in_ms(wait_s + usual_s)}, the "
                f"deadline leaves {in_ms(request.deadline_s - now_s)}: try again later, or raise timeout_ms"
            )

    def _wait_s(self, request: QueuedRequest[E], now_s: float) -> float:
        """How long the batches before this request's will keep all servers at work."""
        work_s = 0.0
        for engine, rows in self._engine_rows.items():
            if engine == request.engine:
                # the rest is in its own batch
                rows = rows // self.max_batch_size * self.max_batch_size
            if rows:
                work_s += self.usual_s(engine, rows, now_s)
        known = self._clients.get(request.client)
        turns = len(self._clients) + (known is None)
        mine = request.rows if known is None else known.rows + request.rows
        if turns > 1 and self.rows > turns * mine:  # it waits for its share only
            work_s *= turns * mine / self.rows
        left_s = [max(0.0, end_s - now_s) for end_s in self.ends_s]
        first_s = min(left_s) if len(left_s) >= self.servers else 0.0
        return min(first_s + work_s, max(first_s, (work_s + sum(left_s)) / self.servers))

    def usual_s(self, engine: E, rows: int, now_s: float) -> float:
        """Seconds that so many rows usually take; 0 where that is not known."""
        if rows <= self.max_batch_size:
            return self.costs.usual_s(engine, rows, now_s)
        return rows / self.max_batch_size * self.costs.usual_s(engine, self.max_batch_size, now_s)

    def _make_room(self, request: QueuedRequest[E]) -> Requests[E]:
        """Where ``max_rows`` wait: drop the last requests of who has most, if this one's client has
        less than its share (the longest queue's drop of McKenney, INFOCOM 1990)."""
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
        dropped: Requests[E] = []
        while self.rows + request.rows > self.max_rows:
            name, client = max(self._clients.items(), key=lambda item: item[1].rows)
            theirs = (
                one for line in self._lines.values() for one in reversed(line) if one.client == name
            )
            last = max(theirs, key=_turn)
            client.turn = last.turn - last.rows
            self.drop(last)
            dropped.append(last)
        return dropped

    # Costs

    def learn(self, engine: E, rows: int, start_s: float, end_s: float) -> None:
        """So many rows on an engine took from ``start_s`` to ``end_s``."""
        seconds = end_s - start_s
        if rows > self.max_batch_size:
            seconds *= self.max_batch_size / rows
            rows = self.max_batch_size
        self.costs.add(engine, rows, seconds, end_s)

    def _head(self, engine: E) -> QueuedRequest[E]:
        return self._lines[engine][0]

    def _leave(self, request: QueuedRequest[E], state: str) -> None:
        """All but its place in the line."""
        request.state = state
        self.rows -= request.rows
        self._engine_rows[request.engine] -= request.rows
        client = self._clients[request.client]
        client.rows -= request.rows
        if not client.rows:
            del self._clients[request.client]

    def _tidy(self, engine: E) -> None:
        if not self._lines[engine]:
            del self._lines[engine], self._engine_rows[engine]
