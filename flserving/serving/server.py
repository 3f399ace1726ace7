"""The model server: the one place that answers a request. REST, gRPC, notebooks and edge devices all come through it.

The way of a request: deadline -> route (alias -> version) -> pin the model (loading it on a miss) -> validate ->
prediction cache -> queue and batch -> preprocess -> infer -> postprocess -> respond. The route comes before the cache
because the cache's key holds the model's digest: an alias that moved asks under another key, so nothing stale can be
found.
"""

import asyncio
import hashlib
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from flserving import models
from flserving.errors import DeadlineExceededError, FlservingError, NotFoundError, OverloadedError
from flserving.experiments import Experiments
from flserving.models.processing import Floats, Outputs, Several, ids_of
from flserving.monitoring.fleet import Fleet
from flserving.monitoring.metrics import STAGES
from flserving.monitoring.telemetry import Telemetry
from flserving.registry.experiment import Crossroads
from flserving.serving.batching.workers import Batcher
from flserving.serving.cache import PredictionCache
from flserving.serving.config import ServingConfig, deadline_s
from flserving.serving.doors import Awaiting, Blocking, Door
from flserving.serving.engine import Execution, InferenceEngine, Prediction, each
from flserving.serving.repository import ModelHost
from flserving.serving.synonyms import version_id_too

if TYPE_CHECKING:
    from flserving.registry import Registry


class ModelServer(ModelHost):
    """Serves several models, several versions of each at once, from one cache of loaded models and one pool of workers.

    Args:
        config: Settings; the defaults of :class:`ServingConfig` when not given.
        registry: Where durable versions come from; ``model`` is the one name to serve; when not given all of them, also
            those that are published later.
        clock: Monotonic seconds.

    Sets torch to one intra-op thread for the whole process: faster for small models, and workers never
    oversubscribe the cores. Use as a context manager, or call :meth:`close`. Thread-safe.
    """

    def __init__(
        self,
        config: ServingConfig | None = None,
        registry: "Registry | None" = None,
        model: str | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        torch.set_num_threads(1)
        super().__init__(config, clock=clock)
        budget = self.config.prediction_cache_bytes
        self.prediction_cache: PredictionCache[Outputs] | None = (
            PredictionCache(budget, self.config.prediction_cache_ttl_s, clock) if budget else None
        )
        held = weakref.WeakMethod(self._held)  # threads know the telemetry: they must not keep a forgotten server

        def names() -> set[str]:
            alive = held()
            return set() if alive is None else alive()

        self.telemetry = Telemetry(clock, self.config.max_batch_size, names)
        self.fleet = Fleet()
        self._batcher = Batcher(self.config, self.telemetry.execution, clock)
        self._blocking, self._awaiting = Blocking(self), Awaiting(self)
        self.experiments = Experiments(self._router, self.lease, self._personal, self._batcher.loaded)
        if registry is not None and model is None:
            self.serve_all(registry)
        elif registry is not None and model is not None:
            self.serve(registry, model)

    # Requests

    @version_id_too
    def predict(self, features: Any, version: str | int | None = None, *, model: str | None = None,
                timeout_ms: float | None = None, stages: bool = False, arrays: bool = False,
                client: str | Sequence[str] | None = None, caller: str | None = None) -> dict[str, Any]:  # fmt: skip
        """Answer one request: a row [D] or rows [N, D]; or of the shape that the model takes, as [N, 3, 32, 32].

        Args:
            version: A version id or an alias; the alias ``default`` when not given. Also by the name ``version_id``.
            model: Name of the model; the first one served when not given.
            timeout_ms: Deadline, from now to the answer; the config's ``timeout_ms`` when not given.
            stages: Add ``stages_ms``, where the time of this request went.
            arrays: Give numpy arrays, views of the whole batch's and only to be read, in place of lists.
            client: Who asks, by its credential: it gets its personal head where the version has one, and its cached
                predictions are its own. One id a row lets rows of many clients share a batch.
            caller: Whose share of the queue and of the prediction cache this uses; the one ``client``'s when not given.
                Callers without a name share one.

        Returns:
            ``predictions`` [N], ``confidences`` [N] and ``probabilities`` [N][C] (classification only) as lists,
            ``latency_ms``, ``model_version``, ``model_type`` ("global"; "personal" where every row got its client's
            head; "mixed"). Where a client was given, ``head``: "own", or why the global head answered: "unknown" (no
            head of this client), "stale" (its head was trained on another body), "expired" (the time that it was
            published for is over), "none" (the version has no heads);
            a list of them for one id a row. Where its lineage tells it, the federated ``round`` of the version. Where
            the alias is in an experiment and one client asks: ``arm``, and the ``receipt`` with which that client may
            give feedback (``experiments.feedback``).

        Raises:
            InvalidInputError, NotFoundError (also an unknown client, where ``unknown_client`` is "refuse"),
            OverloadedError, DeadlineExceededError, ModelExecutionError,
            CorruptArtifactError, ServerClosedError: Each counted under its reason in the statistics.
        """
        try:  # the blocking door never suspends, so one step runs the whole coroutine
            door = self._blocking
            self._answer(features, version, model, timeout_ms, stages, arrays, client, caller, door).send(None)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        raise AssertionError("a blocking request suspended")

    @version_id_too
    async def apredict(self, features: Any, version: str | int | None = None, *, model: str | None = None,
                       timeout_ms: float | None = None, stages: bool = False, arrays: bool = False,
                       client: str | Sequence[str] | None = None,
                       caller: str | None = None) -> dict[str, Any]:  # fmt: skip
        """:meth:`predict` for coroutines: callers of one turn of the event loop share a batch."""
        return await self._answer(features, version, model, timeout_ms, stages, arrays, client, caller, self._awaiting)

    @version_id_too
    def batch_predict(self, batch: Iterable[Any], version: str | int | None = None, *, model: str | None = None,
                      timeout_ms: float | None = None) -> list[dict[str, Any]]:  # fmt: skip
        """Answer several requests, each a row or rows, as one: they are admitted, run and fail together.

        Returns:
            One answer per request, in their order; their ``latency_ms`` is that of the whole.
        """
        several = Several(batch)
        answer = self.predict(several, version=version, model=model, timeout_ms=timeout_ms)
        lists = {name: value for name, value in answer.items() if isinstance(value, list)}
        answers, start = [], 0
        for length in several.lengths:
            stop = start + length
            answers.append(answer | {name: values[start:stop] for name, values in lists.items()})
            start = stop
        return answers

    async def _answer(
        self, features: Any, version: str | int | None, model: str | None, timeout_ms: float | None,
        stages: bool, arrays: bool, client: str | Sequence[str] | None, caller: str | None, door: Door,
    ) -> dict[str, Any]:  # fmt: skip
        """The one path. ``door`` knows how to wait: blocking or awaiting."""
        started_s, key, found, chosen = self._clock(), None, None, None
        try:
            deadline_s = started_s + self._timeout_s(timeout_ms)
            key = self._router.find(version, model) or await door.find(version, model, deadline_s)
            if isinstance(key, Crossroads):
                key, chosen = self.experiments.choose(key, client)
            entry = self.model_cache.acquire(key) or await door.load(key, deadline_s)
            try:
                engine: InferenceEngine = entry.value
                rows = engine.preprocessor.validate(features, self.config.max_request_rows)
                lane, slots = engine, None
                if client is not None:
                    lane, slots, found = self._personal(engine, client := ids_of(client, len(rows)), len(rows))
                if caller is None and isinstance(client, str):
                    caller = f"client {client}"
                validated_s = looked_up_s = self._clock()
                if self.prediction_cache is None:
                    payload = rows if slots is None else (rows, slots)
                    prediction = await door.run(lane, payload, len(rows), started_s, deadline_s, caller)
                else:
                    prediction, looked_up_s = await self._through_cache(
                        self.prediction_cache, door, lane, rows, slots, started_s, deadline_s, client, caller
                    )
                answer: dict[str, Any] = prediction.arrays() if arrays else prediction.lists()
            finally:
                self.model_cache.release(entry)
            answered_s = self._clock()
            if answered_s > deadline_s:
                raise DeadlineExceededError(
                    f"the answer took {(answered_s - started_s) * 1e3:.1f} ms, the deadline was "
                    f"{(deadline_s - started_s) * 1e3:.0f} ms: raise timeout_ms"
                )
            marks = (started_s, validated_s, looked_up_s, *prediction.execution.marks_s, answered_s)
            self.telemetry.success("/".join(key), len(rows), marks)
            if found is not None:
                self.telemetry.told("head", [found] * len(rows) if isinstance(found, str) else found)
        except BaseException as error:
            gone = isinstance(error, asyncio.CancelledError | GeneratorExit)
            reason = error.reason if isinstance(error, FlservingError) else "Cancelled" if gone else "Internal"
            self.telemetry.failure(reason, "/".join(key or ()), self._clock() - started_s)
            if chosen is not None:
                self.experiments.failed(chosen, reason)
            raise
        answer["latency_ms"] = (answered_s - started_s) * 1e3
        answer["model_version"], answer["model_type"] = key[1], "global"
        if engine.round is not None:
            answer["round"] = engine.round
        if found is not None:
            answer["head"] = found
            if slots is not None:
                answer["model_type"] = "personal" if set(each(found)) == {"own"} else "mixed"
        if chosen is not None:
            answer |= self.experiments.answered(chosen, key[1], rows, prediction)
        if stages:
            answer["stages_ms"] = {name: (b - a) * 1e3 for name, (a, b) in zip(STAGES, pairwise(marks), strict=True)}
        return answer

    def _personal(
        self, engine: InferenceEngine, client: str | tuple[str, ...], rows: int
    ) -> tuple[Any, NDArray[np.int64] | None, str | list[str]]:
        """Where a client's rows run: the lane, the slots of their heads (None: on the global model), what was found."""
        if engine.personal is None:
            slots, found = None, "none" if isinstance(client, str) else ["none"] * rows
        else:
            slots, found = engine.personal.choose(client, rows)
        if self.config.unknown_client == "refuse" and any(one in ("unknown", "expired", "none") for one in each(found)):
            raise NotFoundError("no personal head here for this client: train one, or let the global head answer")
        if slots is None or (slots < 0).all():
            return engine, None, found
        return engine.personal, slots, found

    async def _through_cache(
        self, cache: PredictionCache[Outputs], door: Door, lane: Any, rows: Floats, slots: NDArray[np.int64] | None,
        started_s: float, deadline_s: float, client: str | tuple[str, ...] | None, caller: str | None,
    ) -> tuple[Prediction, float]:  # fmt: skip
        """The prediction, and when the look-up ended. Who may find it again is in its key: the client of a personal
        answer; and the caller, but where the setting says that all share (no name: all without one)."""
        rows = rows.copy()  # what was hashed is what runs, whatever the caller does to its array meanwhile
        payload = rows if slots is None else (rows, slots)
        content = hashlib.blake2b(rows.data, digest_size=32)
        apart = self.config.prediction_cache_scope == "caller"
        scope = (client if apart or slots is not None else None, caller if apart else None)
        if scope != (None, None):  # in the hash, as the key's size does not count in the cache's budget
            content.update(repr(scope).encode())
        key = (lane.identity, rows.shape, content.digest())
        while True:
            value, flight, leads = cache.begin(key)
            looked_up_s = self._clock()
            try:
                if flight is not None and leads:
                    try:
                        prediction = await door.run(lane, payload, len(rows), started_s, deadline_s, caller)
                        value = prediction.execution.outputs.copy_rows(prediction.start, prediction.stop)
                    except BaseException as error:
                        cancelled = OverloadedError("the request that computed this was cancelled: try again")
                        cache.finish(key, flight, error=error if isinstance(error, Exception) else cancelled)
                        raise
                    # a name of any length is held as a digest: it does not count in the cache's budget either
                    owner = None if caller is None else hashlib.blake2b(repr(caller).encode(), digest_size=16).digest()
                    cache.finish(key, flight, value, owner=owner)
                    return prediction, looked_up_s
                if flight is not None:
                    if not await door.follow(flight, deadline_s):
                        raise DeadlineExceededError("an identical request took longer than timeout_ms: raise it")
                    if isinstance(flight.exception(), OverloadedError | DeadlineExceededError):
                        continue  # the leader's own bad luck: look again, and lead
                    value = flight.result()
            finally:
                del flight  # an error's frames must not hold what holds the error: it would keep models alive
            assert value is not None
            return Prediction(Execution(value, (self._clock(),) * 4), 0, len(rows)), looked_up_s

    def _timeout_s(self, timeout_ms: float | None) -> float:
        self._check_open()
        return self.config.timeout_ms / 1e3 if timeout_ms is None else deadline_s(timeout_ms)

    # What operators see

    def get_all_stats(self) -> dict[str, Any]:
        """Counters and durations of the server, its queue, its caches, the engines in memory, and, by model, what the
        devices of its ``fleet`` run.

        An engine of the default model is also found by its version alone: ``stats["v1.0"]["request_count"]``. It
        counts what it ran; what a cache answered or a check refused is in ``server``.
        """
        loaded = dict(self.model_cache.items())
        engines = {"/".join(key): engine.get_stats() for key, engine in loaded.items()}
        queue = {
            "waiting_rows": self._batcher.queue.rows,
            "running": self._batcher.busy,
            "max_queue_rows": self.config.max_queue_rows,
        }
        predictions = None if self.prediction_cache is None else self.prediction_cache.stats()
        model = self._router.routes.model
        by_version = {key[1]: engines["/".join(key)] for key in loaded if key[0] == model}
        return by_version | {
            "server": self.telemetry.snapshot(),
            "queue": queue,
            "model_cache": self.model_cache.stats(),
            "prediction_cache": predictions,
            "engines": engines,
            "fleet": {name: skew.summary() for name, skew in self.fleet.skew().items()},
        }

    def close(self, drain_s: float = 5.0) -> None:
        """Refuse new requests, finish the admitted ones, end threads, delete the temporary store. Idempotent."""
        self._closed = True
        self._batcher.close(drain_s)
        super().close()
        self.experiments.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# The tutorial's entrance


def create_serving_pipeline(
    model: nn.Module,
    feature_stats: Mapping[str, ArrayLike] | None = None,
    config: ServingConfig | None = None,
    **options: Any,
) -> ModelServer:
    """The one-call set-up: a server whose default is ``model``, as version "v1.0".

    ``options`` go to :meth:`ModelServer.load_model`.
    """
    server = ModelServer(config)
    try:
        server.load_model("v1.0", model, feature_stats, **options)
    except BaseException:
        server.close()
        raise
    return server


def demo_serving(requests: int = 100) -> tuple[ModelServer, list[dict[str, Any]]]:
    """Serve the tutorial's 32-64-10 model (random weights) and send it ``requests`` random rows, one at a time.

    Prints how many were answered, the server's health and statistics, and the mean latency.

    Returns:
        The server, still open (close it, or leave it to the end of the process), and its answers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.build("tutorial_mlp")
    rows = np.random.default_rng(0).standard_normal((requests, 32), dtype=np.float32)
    server = create_serving_pipeline(model)
    results = [server.predict(row) for row in rows]
    health = server.health_check()
    stats = server.get_all_stats()["v1.0"]
    mean_ms = sum(result["latency_ms"] for result in results) / max(1, len(results))
    print(f"answered {len(results)} requests with version {health['default_version']}")
    print(f"health: {health['status']}, loaded: {', '.join(health['loaded_models'])}")
    print(f"the engine: {stats['request_count']} requests, {stats['avg_latency_ms']:.3f} ms each")
    print(f"mean latency: {mean_ms:.3f} ms")
    return server, results
