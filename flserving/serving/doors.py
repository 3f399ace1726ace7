"""How the one path of a request waits: a thread blocks, a coroutine awaits. Everything else they share.

The path (``ModelServer._answer``) is a coroutine that waits only through a door. With the blocking door it never
suspends, so a
synchronous caller runs it with a single ``send(None)`` and needs no event loop. Source of the pattern: sans-I/O (C.
Benfield, 2016).
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from flserving.errors import DeadlineExceededError, OverloadedError
from flserving.monitoring.metrics import Costs
from flserving.serving.batching.policy import MARGIN
from flserving.serving.cache import Lease
from flserving.serving.engine import Prediction
from flserving.serving.router import Key

if TYPE_CHECKING:
    from flserving.serving.server import ModelServer

T = TypeVar("T")
_AT_ONCE_S = 5e-3  # a job that starts within this has not waited for a loader


class Blocking:
    """How a thread waits. Its coroutines never suspend.

    A request may have to wait in four places. ``run``: for its turn in the queue (arguments of :meth:`Batcher.run`).
    ``find``: for a look at the registries, where its version is not known yet; raises NotFoundError. ``load``: for a
    version that is not in memory; it is pinned. ``follow``: for another request's identical computation; False when
    the deadline came first.
    """

    def __init__(self, server: "ModelServer") -> None:
        self._server, self._run = server, server._batcher.run

    async def run(self, *request: Any) -> Prediction:
        return self._run(*request)  # type: ignore[no-any-return]

    async def find(self, version: str | int | None, model: str | None, deadline_s: float) -> Key:
        self._server._refresh(deadline_s)
        return self._server._router.require(version, model)

    async def load(self, key: Key, deadline_s: float) -> Lease:
        return self._server._load(key, deadline_s)

    async def follow(self, flight: Future[Any], deadline_s: float) -> bool:
        return bool(wait([flight], max(0.0, deadline_s - self._server._clock())).done)


class Awaiting:
    """:class:`Blocking` for coroutines: whatever may block goes to a thread, and the event loop stays free."""

    def __init__(self, server: "ModelServer") -> None:
        self._server, self.run = server, server._batcher.arun
        self._costs, self._lock = Costs(), threading.Lock()

    async def find(self, version: str | int | None, model: str | None, deadline_s: float) -> Key:
        await self._in_thread(deadline_s, lambda nothing: None, self._server._refresh, deadline_s)
        return self._server._router.require(version, model)

    async def load(self, key: Key, deadline_s: float) -> Lease:
        came_s = self._server._clock()
        release = self._server.model_cache.release
        return await self._in_thread(deadline_s, release, self._load_in_time, key, came_s, deadline_s)

    def _load_in_time(self, key: Key, came_s: float, deadline_s: float) -> Lease:
        """Load a version, but not for who has waited for a loader until it cannot end in time any more: under more
        loads than can be done each would come too late. (The rule of :meth:`BatchQueue.take`, for loads.)"""
        server, source = self._server, self._server._sources.get(key[0])
        start_s = server._clock()
        with self._lock:
            usual_s = self._costs.usual_s(source, 1, start_s)
        if start_s - came_s > _AT_ONCE_S and start_s + MARGIN * usual_s > deadline_s:
            raise OverloadedError(
                f"other loads came first: one usually takes {usual_s * 1e3:.0f} ms, the deadline leaves "
                f"{(deadline_s - start_s) * 1e3:.0f} ms: try again later, or raise timeout_ms"
            )
        cold = key not in server.model_cache
        lease = server._load(key, deadline_s)
        if cold and source is not None:
            end_s = server._clock()
            with self._lock:
                self._costs.add(source, 1, end_s - start_s, end_s)
        return lease

    async def follow(self, flight: Future[Any], deadline_s: float) -> bool:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def tell(_: object) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(done.set)

        flight.add_done_callback(tell)  # not asyncio.wrap_future: a cancelled follower must not cancel the leader's
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s - self._server._clock()):
                await done.wait()
        return flight.done()

    async def _in_thread(self, deadline_s: float, undo: Callable[[T], object], call: Callable[..., T], *args: Any) -> T:
        """``call(*args)`` on a loader thread; who is cancelled or late leaves what it brings to ``undo``."""
        try:
            job = self._server._loaders.submit(call, *args)
        except RuntimeError:  # shut down since the request was let in
            self._server._check_open()
            raise
        waited = False
        try:
            if not await self.follow(job, deadline_s):
                raise DeadlineExceededError("a load took longer than timeout_ms: try again, or raise it")
            waited = True
        finally:
            if not waited and not job.cancel():
                job.add_done_callback(lambda late: late.exception() or undo(late.result()))
        return job.result()


Door: TypeAlias = Blocking | Awaiting
