"""Who answers a request of a hybrid server, the device or the cloud: the policies, and the steps they are made of."""

import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flserving.errors import (
    CorruptArtifactError,
    DeadlineExceededError,
    FlservingError,
    ForbiddenError,
    ModelExecutionError,
    ModelTooLargeError,
    NotFoundError,
    OverloadedError,
    StaleModelError,
)
from flserving.models.processing import Preprocessor
from flserving.serving.doors import Door

if TYPE_CHECKING:
    from flserving.edge.hybrid import HybridServer

_NO_CONSENT = "nothing leaves this device without consent: set consent=True"
T = TypeVar("T")
Answered = dict[str, Any]
# what keeps the device from answering, and need not keep the cloud
_MENDABLE = (
    StaleModelError, NotFoundError, OverloadedError, DeadlineExceededError, ModelExecutionError, CorruptArtifactError,
    ModelTooLargeError,
)  # fmt: skip
_SAID = ("model_version", "model_type", "head", "round", "age_s", "degraded")


class Turn:
    """One request on its way: what a policy may do with it, and the time that it has."""

    def __init__(
        self, server: "HybridServer", features: Any, timeout_s: float, stages: bool, arrays: bool,
        client: str | Sequence[str] | None, caller: str | None, door: Door,
    ) -> None:  # fmt: skip
        self.server, self.clock, self.door = server, server._clock, door
        self.problem: FlservingError | None = None  # why the device did not answer
        self._features, self._client, self._stages, self._arrays = features, client, stages, arrays
        self._caller = caller
        self._cloud_s = timeout_s * (server.cloud_share if server.consent else 0.0)
        self._local_s, self.started_s = timeout_s - self._cloud_s, self.clock()
        self.ends_s = self.started_s + timeout_s

    async def local(self, door: Door | None = None) -> Answered | None:
        """The device's answer, in its part of the time; None where it has none that the cloud could not mend."""
        try:
            return await self.server.edge._local(
                self._features, None, None, self._local_s * 1e3, self._stages, self._arrays, self._client,
                self._caller, door or self.door,
            )  # fmt: skip
        except _MENDABLE as error:
            self.problem = error
            return None

    def trusts(self, answer: Answered) -> bool:
        """Whether each row's confidence reaches the threshold (a regression has none: it is trusted), and the model is
        fresh."""
        confidences = answer.get("confidences", ())
        return not answer["degraded"] and (len(confidences) == 0 or min(confidences) >= self.server.threshold)

    async def remote(self, door: Door | None = None) -> Answered | None:
        """What the cloud said of these rows, or says now, in its part of the time; None where it cannot be had.

        Raises:
            InvalidInputError: The features are not rows of finite numbers.
        """
        server, door = self.server, door or self.door
        rows = self._rows().copy()  # what is hashed is what is sent
        scope = self._client if self._client is None or isinstance(self._client, str) else tuple(self._client)
        route = server._router.routes.targets.get((server.model, "default"))
        key = (scope, route, rows.shape, hashlib.blake2b(rows.data, digest_size=32).digest())
        kept, flight, leads = server.cloud_cache.begin(key)
        path = "cloud" if kept is None else "cache"
        try:
            if flight is not None and leads:
                try:
                    kept = await self._ask(rows, door)
                except BaseException as error:
                    cancelled = OverloadedError("the request that asked the cloud was cancelled: try again")
                    server.cloud_cache.finish(key, flight, error=error if isinstance(error, Exception) else cancelled)
                    raise
                server.cloud_cache.finish(key, flight, kept)
            elif flight is not None:  # somebody asks the same just now
                if not await door.follow(flight, self._until_s()):
                    raise DeadlineExceededError("an identical request to the cloud took too long: raise timeout_ms")
                kept = flight.result()
        except FlservingError as error:
            server._refused(error.reason)
            return None
        finally:
            del flight  # as in ModelServer: an error's frames must not hold what holds the error
        assert kept is not None
        return kept.answer(path, self)

    def _rows(self) -> NDArray[np.float32]:
        """The request's rows, flat: what shape a row has, the device's model tells."""
        shape = None
        with suppress(FlservingError):  # there may be no model yet
            shape = self.server.edge.signature(self.server.edge.resolve()).input_shape
        return Preprocessor(input_shape=None if shape is None or len(shape) == 1 else shape).validate(self._features)

    def degraded(self, local: Answered | None) -> Answered:
        """The device's answer where a better one was wanted. Raises why the device gave none, if it did not."""
        if local is None:
            raise self.problem or DeadlineExceededError("neither the device nor the cloud answered: raise timeout_ms")
        return local | {"path": "degraded", "degraded": True}

    def _until_s(self) -> float:
        return min(self.ends_s, self.clock() + self._cloud_s)

    async def _ask(self, rows: NDArray[np.float32], door: Door) -> "Kept":
        server = self.server
        if not server.consent:
            raise ForbiddenError(_NO_CONSENT)
        if not server.breaker.allow():
            raise OverloadedError("the cloud failed several times in a row: it is left alone for a while")
        try:
            call = server._calls.submit(self._call, rows, until_s := self._until_s())
            if not await door.follow(call, until_s):
                call.cancel()
                raise DeadlineExceededError(f"no answer from the cloud in its {self._cloud_s * 1e3:.0f} ms")
            kept = Kept(call.result(), len(rows), self.clock())
        except Exception as error:  # whatever it is, the device goes on
            known = error if isinstance(error, FlservingError) else FlservingError(f"the cloud's answer: {error!r}")
            server.breaker.record(known.http_status < 500 and known.http_status != 429)  # refusing me, it is alive
            raise known from error
        server.breaker.record(True)
        server._heard(str(kept.said["model_version"]))
        return kept

    def _call(self, rows: NDArray[np.float32], until_s: float) -> Answered:
        """Ask the cloud, in a thread that may have become free only now. The credential is that of the device's client:
        for anybody else the cloud's global model answers."""
        server = self.server
        if not server.consent:  # withdrawn meanwhile
            raise ForbiddenError(_NO_CONSENT)
        options = {"personal": True} if server.personal and self._client in (None, server.edge.client) else {}
        left_ms = max(1e-3, (until_s - self.clock()) * 1e3)
        model = server.cloud_model or server.edge.model
        return server.cloud.predict(rows, model=model, arrays=True, timeout_ms=left_ms, **options)

    def apart(self, step: Callable[[Door], Coroutine[Any, Any, T]], far: bool = False) -> "Future[T]":
        """Run a step of this turn in a thread, beside what else happens; ``far``: one that may wait for the cloud, and
        must not keep a thread from the device."""
        return self.server._hedges[far].submit(_run, step, self.server._blocking)

    async def first_of(self, *flights: "Future[Any]") -> None:
        """Wait until one of them is done, or the time is over."""
        either: Future[None] = Future()

        def tell(_: object) -> None:
            with suppress(InvalidStateError):
                either.set_result(None)

        for flight in flights:
            flight.add_done_callback(tell)
        await self.door.follow(either, self.ends_s)


def _run(step: Callable[[Door], Coroutine[Any, Any, T]], door: Door) -> T:
    try:  # with the blocking door a coroutine never suspends
        step(door).send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("a blocking step suspended")


class Kept:
    """What the cloud said of some rows, in arrays that nobody may write to."""

    def __init__(self, answer: Mapping[str, Any], rows: int, at_s: float) -> None:
        names = ("predictions", "confidences", "probabilities")
        self.outputs = {name: np.array(answer[name]) for name in names if answer.get(name) is not None}
        self.said, self.at_s = {name: answer[name] for name in _SAID if name in answer}, at_s
        self._age_s = float(answer.get("age_s") or 0.0)
        whole = {len(output) for output in self.outputs.values()} == {rows} and "predictions" in self.outputs
        whole &= all(output.dtype.kind in "fiu" for output in self.outputs.values())
        if not whole or not 0 <= self._age_s < inf or not isinstance(self.said.get("model_version"), str):
            raise FlservingError(f"the cloud's answer to {rows} rows is not one: is that a server of flserving?")
        for output in self.outputs.values():
            output.setflags(write=False)
        self.nbytes = sum(output.nbytes for output in self.outputs.values())

    def answer(self, path: str, turn: Turn) -> Answered:
        now_s = turn.clock()
        age_s = self._age_s + (now_s - self.at_s if path == "cache" else 0.0)
        outputs = {name: value if turn._arrays else value.tolist() for name, value in self.outputs.items()}
        said = {"model_type": "global", "round": None, "degraded": False} | self.said
        stages = {"stages_ms": {path: (now_s - turn.started_s) * 1e3}} if turn._stages else {}
        return outputs | said | stages | {"path": path, "age_s": age_s}


# Policies


async def local_first(turn: Turn) -> Answered:
    """The device answers when it is sure and fresh; else the cache, else the cloud, else the device, flagged."""
    local = await turn.local()
    if local is not None and turn.trusts(local):
        return local
    return await turn.remote() or turn.degraded(local)


async def as_drawn(turn: Turn) -> Answered:
    """The drawing: local head -> cache hit? -> else the cloud's model.

    Where the client has a head of its own that fits the device's body, it answers, sure or not, up to the hard limit of
    its age. Who has none is answered from the cache or by the cloud. The drawing does not show a cloud that is away:
    then the device's global model answers, flagged.
    """
    local = await turn.local()
    if local is not None and local["model_type"] == "personal":
        return local
    return await turn.remote() or turn.degraded(local)


async def hedged(turn: Turn) -> Answered:
    """:func:`local_first`, but when the device has not answered after ``hedge_ms``, the cloud is asked as well, and
    what comes first and is good is the answer. Source: J. Dean and L. A. Barroso, "The Tail at Scale", CACM 2013."""
    mine, theirs = turn.apart(turn.local), None
    if not await turn.door.follow(mine, turn.started_s + (turn.server.hedge_ms or 0.0) / 1e3):
        theirs = turn.apart(turn.remote, far=True)
        await turn.first_of(mine, theirs)
        if theirs.done() and (answer := theirs.result()) is not None:
            return answer
    local = mine.result() if await turn.door.follow(mine, turn.ends_s) else None
    if local is not None and turn.trusts(local):
        return local
    if theirs is None:
        return await turn.remote() or turn.degraded(local)
    return (theirs.result() if await turn.door.follow(theirs, turn.ends_s) else None) or turn.degraded(local)


POLICIES: dict[str, Callable[[Turn], Awaitable[Answered]]] = {"local_first": local_first, "as_drawn": as_drawn}
