"""The threads behind the batch queue: who runs a batch, who waits for it, and what happens when it
fails.

A caller whose server is idle runs its own request, on its own thread (handing it over and back
costs about 75 us), where the model is known to be done well before the deadline: nobody can call a
thread back from a model. Callers on an event loop share one batch a turn of the loop; it runs on
the loop while that is short (``INLINE_S``), else on a worker. Everything else waits in the
``BatchQueue`` (``policy.py``) for a worker thread. Workers start when needed and leave when idle.

A request's ``waiter`` is a held lock (its thread waits to take it), or a :class:`LoopSide` and a
future, or None where the caller runs the request itself.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

from flserving import forks
from flserving.errors import (
    DeadlineExceededError,
    FlservingError,
    ModelExecutionError,
    OverloadedError,
    ServerClosedError,
)
from flserving.monitoring.metrics import Costs
from flserving.serving.batching.policy import BatchQueue, QueuedRequest, in_ms
from flserving.serving.config import ServingConfig

# an event loop may be held this long: under the 5 ms that a thread waits for the interpreter lock
INLINE_S = 2e-3
IDLE_S = 5.0  # a worker with nothing to do leaves after this long
# a thread runs its own request where this many times the usual duration fits before the deadline
SURE = 2.0


class Engine(Hashable, Protocol):
    """What a batch runs on: a loaded model."""

    typical_s: float  # seconds of a usual execution; infinite while unknown

    def execute(self, payloads: Sequence[Any]) -> Sequence[Any]:
        """One result per payload, in their order; raises if any of them makes the model fail."""


Queued: TypeAlias = QueuedRequest[Engine]


class Run(NamedTuple):
    """A slot in use: what runs in it, since when, and until when it usually would."""

    engine: Engine
    rows: int
    start_s: float
    end_s: float


class LoopSide:
    """What a batcher knows of one event loop: who waits there, and when its next alarm rings."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.turn_ends = False  # whether the end of this turn of the loop will look at the queue
        self.waiting = set[QueuedRequest[Any]]()
        self.alarm: asyncio.TimerHandle | None = None
        self.alarm_s = 0.0

    def call(self, callback: Callable[[], object]) -> None:
        """Run ``callback`` on the loop, from another thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits there any more
            self.loop.call_soon_threadsafe(callback)


class Batcher:
    """Runs requests in batches, at most ``num_workers`` at a time. Callers block (:meth:`run`) or
    await (:meth:`arun`).

    Guarantees: a request that is past its deadline never reaches the model; a batch that fails is
    retried by halves until the request at fault fails alone; every request gets its own result or
    one typed error.

    A thread hears of its deadline when it is there, whatever the model does: only a model whose
    usual duration fits into it twice runs on the caller's own thread, which returns when the model
    does.
    """

    def __init__(
        self,
        config: ServingConfig,
        on_execution: Callable[[Any, int, Sequence[Any]], None] = lambda engine, rows, results: (
            None
        ),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self._on_execution = on_execution
        self._clock = clock
        self._costs = Costs()
        self.closed = False
        self._begin()
        forks.in_child(self, Batcher._begin)

    def _begin(self) -> None:
        """Nobody waits and nobody works: at the start, and in a forked child, which has none of
        these threads."""
        config = self.config
        self.queue: BatchQueue[Any] = BatchQueue(
            config.max_batch_size,
            max_wait_s=config.max_wait_time_ms / 1e3,
            max_rows=config.max_queue_rows,
            policy=config.batching,
            servers=config.num_workers,
            costs=self._costs,
        )
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._threads: set[threading.Thread] = set()
        self.busy = 0  # executions under way
        self._sleeping = 0  # workers that wait for work
        self._here = threading.local()  # .side: this batcher's side of the thread's event loop

    def loaded(self) -> bool:
        """Whether another request would have to wait."""
        return bool(self.queue) or self.busy >= self.config.num_workers

    # Callers that block

    def run(
        self,
        engine: Engine,
        payload: Any,
        rows: int,
        arrival_s: float,
        deadline_s: float,
        client: Hashable = None,
    ) -> Any:
        """Run one request and return its result. ``client`` is whose share of the queue it uses.

        Raises:
            OverloadedError, DeadlineExceededError, ServerClosedError, or what the model raised for
                this request.
        """
        with self._lock:
            now_s = self._admit(arrival_s, deadline_s)
            idle = self.busy < self.config.num_workers and not self.queue
            inline = idle and self.config.batching == "work_conserving"
            if inline and now_s + SURE * (usual_s := self._usual_s(engine, rows)) <= deadline_s:
                slot = self._take_slot(engine, rows, now_s, usual_s)
            else:
                inline = False
                request: Queued = QueuedRequest(
                    engine, payload, rows, arrival_s, deadline_s, client
                )
                request.waiter = threading.Lock()
                request.waiter.acquire()
                dropped = self._enqueue(request, now_s)
                self._call_worker()
        if inline:
            ran = False
            try:
                result = self._run_on_engine(engine, (payload,), rows)[0]
                ran = True
                return result
            finally:
                self._give_back_slot(slot, ran)
        self._refuse_dropped(dropped)
        return self._wait(request)

    def _wait(self, request: Queued) -> Any:
        """Block until a worker has run the request, or its time is over."""
        answered = False
        try:
            answered = request.waiter.acquire(timeout=max(0.0, request.deadline_s - self._clock()))
        finally:
            if not answered:  # too late, or interrupted
                with self._lock:
                    self.queue.drop(request)
                    if request.state != "done":
                        request.state = "dropped"
                        request.error = self._too_late(request.arrival_s, request.deadline_s)
        try:
            if request.error is not None:
                raise request.error
            return request.result
        finally:
            # an error's frames must not hold what holds the error: it would keep models alive
            request.error = None

    # Callers that await

    async def arun(
        self,
        engine: Engine,
        payload: Any,
        rows: int,
        arrival_s: float,
        deadline_s: float,
        client: Hashable = None,
    ) -> Any:
        """:meth:`run` for coroutines: whoever arrives in one turn of the event loop shares a
        batch."""
        request: Queued = QueuedRequest(engine, payload, rows, arrival_s, deadline_s, client)
        loop = asyncio.get_running_loop()
        here: LoopSide | None = getattr(self._here, "side", None)
        if here is None or here.loop is not loop:
            here = LoopSide(loop)
            self._here.side = here
        future = loop.create_future()
        request.waiter = (here, future)
        with self._lock:
            dropped = self._enqueue(request, self._admit(arrival_s, deadline_s))
            if self.config.batching == "hold_until_full":
                self._call_worker()
        self._refuse_dropped(dropped)
        here.waiting.add(request)
        if not here.turn_ends and self.config.batching == "work_conserving":
            here.turn_ends = True
            loop.call_soon(self._end_of_turn, here)
        if here.alarm is None or deadline_s < here.alarm_s:
            self._set_alarm(here, deadline_s)
        try:
            return await future
        finally:
            here.waiting.discard(request)
            if request.state == "waiting":  # cancelled
                with self._lock:
                    self.queue.drop(request)
            request.waiter = None
            request.error = None  # as in run
            del future

    def _end_of_turn(self, here: LoopSide) -> None:
        """Everybody who arrived in this turn waits in the queue: run one batch, and leave the rest
        to the next turn."""
        here.turn_ends = False
        with self._lock:
            if self.busy >= self.config.num_workers:
                return  # whoever finishes next will look into the queue
            now_s = self._clock()
            first = self.queue.first_ready(now_s)
            if first is None:
                return
            chunks = max(1.0, first.rows / self.config.max_batch_size)
            if first.engine.typical_s * chunks > INLINE_S:
                self._call_worker()
                return
            batch, expired, slot = self._take_batch(now_s)
        self._settle_late(expired)
        if batch:
            self._execute(batch, slot)
        if self.queue and not here.turn_ends:
            here.turn_ends = True
            here.loop.call_soon(self._end_of_turn, here)

    def _set_alarm(self, here: LoopSide, at_s: float) -> None:
        if here.alarm is not None:
            here.alarm.cancel()
        here.alarm_s = at_s
        here.alarm = here.loop.call_later(max(0.0, at_s - self._clock()) + 1e-4, self._ring, here)

    def _ring(self, here: LoopSide) -> None:
        """One timer a loop, not one a request: fail who is past the deadline, set the alarm for who
        comes next."""
        here.alarm = None
        now_s = self._clock()
        late = [request for request in here.waiting if request.deadline_s <= now_s]
        with self._lock:
            for request in late:
                self.queue.drop(request)
        for request in late:
            refuse(request, self._too_late(request.arrival_s, request.deadline_s))
            here.waiting.discard(request)
        if here.waiting:
            self._set_alarm(here, min(request.deadline_s for request in here.waiting))

    # Workers

    def _admit(self, arrival_s: float, deadline_s: float) -> float:
        """The time. Raises where it is too late."""
        if self.closed:
            raise ServerClosedError("the server was closed: open a new one")
        now_s = self._clock()
        if deadline_s <= now_s:
            raise self._too_late(arrival_s, deadline_s)
        return now_s

    def _usual_s(self, engine: Engine, rows: int) -> float:
        """Seconds that so many rows take: as they did, however long ago, else as in the warm-up;
        else infinite."""
        largest = self.config.max_batch_size
        if rows <= largest:
            return self._costs.usual_s(engine, rows) or engine.typical_s
        return (self._costs.usual_s(engine, largest) or engine.typical_s) * rows / largest

    def _enqueue(self, request: Queued, now_s: float) -> list[Queued]:
        """Put it into the queue; who had to make room comes back."""
        try:
            return self.queue.push(request, now_s)
        except OverloadedError:
            # who was to look at the queue may be gone: an event loop that was closed
            self._call_worker()
            raise

    def _refuse_dropped(self, dropped: Sequence[Queued]) -> None:
        for request in dropped:
            refuse(
                request,
                OverloadedError(
                    "the queue is full of your requests, and others have a share: try later"
                ),
            )

    def _call_worker(self) -> None:
        """Under the lock: make sure that somebody looks at the queue. A busy worker looks when it
        is done."""
        if self._sleeping:
            self._work.notify()
        elif len(self._threads) < self.config.num_workers and (
            self.closed or self.busy < self.config.num_workers
        ):
            thread = threading.Thread(target=self._worker, name="flserving-worker", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _worker(self) -> None:
        while True:
            batch: list[Queued] = []
            expired: list[Queued] = []
            ready_s = None
            with self._lock:
                if self.busy < self.config.num_workers:
                    batch, expired, slot = self._take_batch(self._clock())
                    ready_s = self.queue.next_ready_s()
                    if batch and self.queue and ready_s is not None:
                        self._call_worker()
                if not batch and not expired:
                    if self.closed and not self.queue:
                        self._threads.discard(threading.current_thread())
                        self._work.notify_all()  # who waits for a slot need not wait any longer
                        return
                    self._sleeping += 1
                    wait_s = IDLE_S
                    if ready_s is not None:
                        wait_s = max(0.0, min(IDLE_S, ready_s - self._clock()))
                    woken = self._work.wait(wait_s)
                    self._sleeping -= 1
                    if not woken and ready_s is None and not self.queue:
                        self._threads.discard(threading.current_thread())
                        return
            self._settle_late(expired)
            if batch:
                # its callers know; a thread that ends here would be missed
                with contextlib.suppress(BaseException):
                    self._execute(batch, slot)

    def _execute(self, batch: list[Queued], slot: Run) -> None:
        """Run a batch whose slot is taken already, and give the slot back. The caller then looks at
        the queue."""
        interrupted = False
        ran = False
        try:
            ran = self._run_or_halve(batch)
        except BaseException as error:  # an interrupt: nobody may be left waiting
            interrupted = True
            interruption = ModelExecutionError(
                f"the execution was interrupted by {type(error).__name__}: try again"
            )
            for request in batch:
                if request.state == "running":
                    refuse(request, interruption)
            raise
        finally:
            self._give_back_slot(slot, ran, hand_over=interrupted)

    def _take_batch(self, now_s: float) -> tuple[list[Queued], list[Queued], Any]:
        """Under the lock: the next batch, who is too late, and the slot of the batch (None where
        there is none)."""
        batch, expired = self.queue.take(now_s, self.closed)
        slot: Run | None = None
        if batch:
            slot = self._take_slot(batch[0].engine, sum(request.rows for request in batch), now_s)
        return batch, expired, slot

    def _take_slot(
        self, engine: Engine, rows: int, now_s: float, usual_s: float | None = None
    ) -> Run:
        """Under the lock."""
        self.busy += 1
        if usual_s is None:
            usual_s = self.queue.usual_s(engine, rows, now_s)
        end_s = now_s + usual_s
        self.queue.ends_s.append(end_s)
        return Run(engine, rows, now_s, end_s)

    def _give_back_slot(self, slot: Run, ran: bool, hand_over: bool = True) -> None:
        """``ran``: whether it was one execution, which tells how long such a one takes."""
        queue = self.queue
        with self._lock:
            self.busy -= 1
            queue.ends_s.remove(slot.end_s)
            if ran:
                queue.learn(slot.engine, slot.rows, slot.start_s, self._clock())
            if hand_over and queue:
                self._call_worker()

    def _run_on_engine(self, engine: Engine, payloads: Sequence[Any], rows: int) -> Sequence[Any]:
        results = engine.execute(payloads)
        self._on_execution(engine, rows, results)
        return results

    def _run_or_halve(self, batch: Sequence[QueuedRequest[Engine]]) -> bool:
        """Whether one execution answered all."""
        try:
            rows = sum(request.rows for request in batch)
            results = self._run_on_engine(
                batch[0].engine, [request.payload for request in batch], rows
            )
        except Exception as error:
            if len(batch) == 1:
                refuse(batch[0], error)
                return False
            # at worst 2n - 1 executions, log2(n) deep: Triton and Clipper fail the whole batch
            # instead
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                # failing took time: who is late or gone by now does not reach the model again
                now_s = self._clock()
                self._settle_late([request for request in half if request.deadline_s <= now_s])
                rest = [
                    request
                    for request in half
                    if request.state == "running" and request.deadline_s > now_s
                ]
                if rest:
                    self._run_or_halve(rest)
            return False
        answer(batch, results)
        return True

    def _settle_late(self, requests: Sequence[Queued]) -> None:
        """Who is past its deadline, or could not keep it any more."""
        now_s = self._clock()
        for request in requests:
            if request.deadline_s <= now_s:
                refuse(request, self._too_late(request.arrival_s, request.deadline_s))
            else:
                refuse(request, self._hopeless(request, now_s))

    def _hopeless(self, request: Queued, now_s: float) -> FlservingError:
        usual_s = self.queue.usual_s(request.engine, request.rows, now_s)
        left = f"an answer usually takes {in_ms(usual_s)}"
        allowed_s = request.deadline_s - request.arrival_s
        if allowed_s < usual_s:  # whatever waits besides
            return DeadlineExceededError(
                f"{left}, the deadline was {in_ms(allowed_s)}: raise timeout_ms"
            )
        left_s = request.deadline_s - now_s
        return OverloadedError(
            f"{left}, the deadline leaves {in_ms(left_s)}: try again later, or raise timeout_ms"
        )

    def _too_late(self, arrival_s: float, deadline_s: float) -> DeadlineExceededError:
        waited_s = self._clock() - arrival_s
        allowed_s = deadline_s - arrival_s
        return DeadlineExceededError(
            f"no answer after {waited_s * 1e3:.0f} ms, the deadline was {in_ms(allowed_s)}: "
            "send less, or raise timeout_ms"
        )

    def close(self, drain_s: float = 5.0) -> None:
        """Refuse new requests, let the waiting ones finish for ``drain_s`` seconds, fail the rest.
        Idempotent."""
        with self._lock:
            self.closed = True
            self._work.notify_all()
            if self.queue:
                self._call_worker()
        until_s = time.monotonic() + drain_s
        joined = {threading.current_thread()}
        # while it drains, a caller who gives its slot back may start one
        while threads := self._threads - joined:
            for thread in threads:
                thread.join(max(0.0, until_s - time.monotonic()))
            joined |= threads
        left: list[Queued] = []
        with self._lock:
            while (taken := self.queue.take(-math.inf, draining=True))[0]:
                left += taken[0]
        for request in left:
            refuse(
                request,
                ServerClosedError(
                    "the server was closed before this request ran: send it elsewhere"
                ),
            )


def answer(batch: Sequence[QueuedRequest[Any]], results: Iterable[Any]) -> None:
    """Give every request of a batch its result."""
    for request, result in zip(batch, results, strict=True):
        request.result = result
    _wake_all(batch)


def refuse(request: QueuedRequest[Any], error: BaseException) -> None:
    """Give one request an error."""
    request.error = error
    _wake_all((request,))


def _wake_all(requests: Iterable[QueuedRequest[Any]]) -> None:
    """One call an event loop, not one a request."""
    elsewhere: defaultdict[LoopSide, list[QueuedRequest[Any]]] = defaultdict(list)
    here = asyncio._get_running_loop()  # None in a worker
    for request in requests:
        waiter = request.waiter
        if isinstance(waiter, tuple) and waiter[0].loop is not here:
            elsewhere[waiter[0]].append(request)
        else:
            _wake(request)
    for side, those in elsewhere.items():
        side.call(partial(_wake_all, those))


def _wake(request: QueuedRequest[Any]) -> None:
    waiter = request.waiter
    request.state = "done"
    if isinstance(waiter, tuple):
        future = waiter[1]
        if future.done():
            return
        if request.error is None:
            future.set_result(request.result)
        else:
            future.set_exception(request.error)
    elif waiter is not None:
        waiter.release()
