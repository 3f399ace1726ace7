"""The model server: the one place that answers a request. REST, gRPC, notebooks and edge devices
all come through it.

A request's way: deadline -> route (alias -> version) -> pin the model (loading it on a miss) ->
validate -> prediction cache -> queue and batch -> preprocess -> infer -> postprocess -> respond ->
count. One :class:`~flserving.serving.request.Request` goes through the steps of
:meth:`ModelServer.handle` and keeps what each of them found; :meth:`ModelServer.ahandle` awaits
where ``handle`` blocks.

The route comes before the cache because the cache's key holds the model's digest: an alias that
moved asks under another key, so nothing stale can be found.
"""

import asyncio
import contextlib
import hashlib
import time
import weakref
from collections.abc import Callable, Coroutine, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flserving import models
from flserving.errors import DeadlineExceededError, FlservingError, NotFoundError, OverloadedError
from flserving.experiments import Experiments
from flserving.models.masking import FULL, OutputPolicy, by_role
from flserving.models.processing import Outputs, Several, ids_of
from flserving.monitoring.fleet import Fleet
from flserving.monitoring.metrics import STAGES
from flserving.monitoring.telemetry import Telemetry
from flserving.registry.experiment import TrafficSplit
from flserving.serving.batching.policy import in_ms
from flserving.serving.batching.workers import Batcher
from flserving.serving.cache import ModelCache, PredictionCache
from flserving.serving.config import ServingConfig, deadline_s
from flserving.serving.engine import (
    Answer,
    Execution,
    InferenceEngine,
    PersonalEngine,
    Prediction,
    each,
)
from flserving.serving.repository import ModelHost
from flserving.serving.request import Request, finished
from flserving.serving.router import Key
from flserving.serving.synonyms import version_id_too

if TYPE_CHECKING:
    from torch import nn

    from flserving.registry import Registry
    from flserving.registry.index import Index


class ModelServer(ModelHost):
    """Serves several models, several versions of each at once, from one cache of loaded models and
    one pool of workers.

    Args:
        config: Settings; the defaults of :class:`ServingConfig` when not given.
        registry: Where durable versions come from; ``model`` is the one name to serve; when not
            given all of them, also those that are published later.
        clock: Monotonic seconds.
        model_cache: Where loaded models are kept; one of ``cache_size`` and ``cache_bytes`` when
            not given.

    Sets torch to one intra-op thread for the whole process: faster for small models, and workers
    never oversubscribe the cores. Use as a context manager, or call :meth:`close`. Thread-safe.
    """

    def __init__(
        self,
        config: ServingConfig | None = None,
        registry: "Registry | None" = None,
        model: str | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        model_cache: ModelCache | None = None,
    ) -> None:
        super().__init__(config, clock=clock, model_cache=model_cache)
        config = self.config
        self._policy = by_role(config.outputs)[""]
        if config.engine == "torch":
            import torch

            torch.set_num_threads(1)
        self.prediction_cache: PredictionCache[Outputs] | None = None
        if config.prediction_cache_bytes:
            self.prediction_cache = PredictionCache(
                config.prediction_cache_bytes, config.prediction_cache_ttl_s, clock
            )
        # threads know the telemetry: they must not keep a forgotten server, which holds nothing
        held = weakref.WeakMethod(self._held)
        self.telemetry = Telemetry(
            clock, largest_batch=config.max_batch_size, held=lambda: (held() or set)()
        )
        self.fleet = Fleet()
        # by model: how often clients had been forgotten when it was looked
        self._forgets: dict[str, int] = {}
        self._router.on_read = self._follow_forgets
        self._batcher = Batcher(config, self.telemetry.execution, clock)
        self.experiments = Experiments(
            self._router, self.lease, self._personal, self._batcher.loaded
        )
        if registry is None:
            return
        if model is None:
            self.serve_all(registry)
        else:
            self.serve(registry, model)

    # Requests

    @version_id_too
    def predict(
        self,
        features: Any,
        version: str | int | None = None,
        *,
        model: str | None = None,
        timeout_ms: float | None = None,
        stages: bool = False,
        arrays: bool = False,
        client: str | Sequence[str] | None = None,
        caller: str | None = None,
        outputs: str | None = None,
    ) -> Answer:
        """Answer one request: a row [D] or rows [N, D]; or of the shape that the model takes, as
        [N, 3, 32, 32].

        Example::

            server = create_serving_pipeline(models.build("tutorial_mlp"))
            server.predict(np.zeros(32))  # {"predictions": [7], "confidences": [0.12], ...}

        Args:
            version: A version id or an alias; the alias ``default`` when not given. Also by the
                name ``version_id``.
            model: Name of the model; the first one served when not given.
            timeout_ms: Deadline, from now to the answer; the config's ``timeout_ms`` when not
                given.
            stages: Add ``stages_ms``, where the time of this request went.
            arrays: Give numpy arrays, views of the whole batch's and only to be read, in place of
                lists.
            client: Who asks, by its credential: it gets its personal head where the version has
                one, and its cached predictions are its own. One id a row lets rows of many clients
                share a batch.
            caller: Whose share of the queue and of the prediction cache this uses; the one
                ``client``'s when not given. Callers without a name share one.
            outputs: Show less than the config's ``outputs`` allow: "label", "top-3", "rounded-2"
                (see :class:`~flserving.models.masking.OutputPolicy`).

        Returns:
            ``predictions`` [N], ``confidences`` [N] and ``probabilities`` [N][C] (classification
            only) as lists, ``latency_ms``, ``model_version``, ``model_type`` ("global"; "personal"
            where every row got its client's head; "mixed"). Where outputs are masked, ``outputs``
            names the policy. Where a client was given, ``head``: "own", or why the global head
            answered: "unknown" (no head of this client), "stale" (its head was trained on another
            body), "expired" (the time that it was published for is over), "none" (the version has
            no heads); a list of them for one id a row. Where its lineage tells it, the federated
            ``round`` of the version. Where the alias is in an experiment and one client asks:
            ``arm``, and the ``receipt`` with which that client may give feedback
            (``experiments.feedback``).

        Raises:
            InvalidInputError, NotFoundError (also an unknown client, where ``unknown_client`` is
                "refuse"), ForbiddenError (``outputs`` that show more than the config allows),
                OverloadedError, DeadlineExceededError, ModelExecutionError, CorruptArtifactError,
                ServerClosedError: Each counted under its reason in the statistics.
        """
        request = Request(
            features,
            version,
            model=model,
            timeout_ms=timeout_ms,
            stages=stages,
            arrays=arrays,
            client=client,
            caller=caller,
            outputs=outputs,
        )
        return self.handle(request)

    @version_id_too
    async def apredict(
        self, features: Any, version: str | int | None = None, **options: Any
    ) -> Answer:
        """:meth:`predict` for coroutines: callers of one turn of the event loop share a batch."""
        return await self.ahandle(Request(features, version, **options))

    @version_id_too
    def batch_predict(
        self,
        batch: Iterable[Any],
        version: str | int | None = None,
        *,
        model: str | None = None,
        timeout_ms: float | None = None,
    ) -> list[Answer]:
        """Answer several requests, each a row or rows, as one: they are admitted, run and fail
        together.

        Returns:
            One answer per request, in their order; their ``latency_ms`` is that of the whole.
        """
        several = Several(batch)
        answer = self.predict(several, version=version, model=model, timeout_ms=timeout_ms)
        return dealt_out(answer, several.lengths)

    # The way of a request, blocking and awaiting

    def handle(self, request: Request) -> Answer:
        """Answer one request, on the caller's thread. Returns and raises what :meth:`predict`
        does."""
        request.started_s = self._clock()
        try:
            self._admit(request)
            if request.lease is None:
                self._load(request)
            self._prepare(request)
            if self.prediction_cache is None:
                request.prediction = self._compute(request)
            else:
                self._find_or_compute(request, self.prediction_cache)
            return self._respond(request)
        except BaseException as error:
            self._count_failure(request, error)
            raise
        finally:
            if request.lease is not None:
                self._release(request)

    async def ahandle(self, request: Request) -> Answer:
        """:meth:`handle` for coroutines: the same steps, and the event loop stays free while one of
        them waits."""
        request.started_s = self._clock()
        try:
            self._admit(request)
            if request.lease is None:
                await self._aload(request)
            self._prepare(request)
            if self.prediction_cache is None:
                request.prediction = await self._acompute(request)
            else:
                await self._afind_or_compute(request, self.prediction_cache)
            return self._respond(request)
        except BaseException as error:
            self._count_failure(request, error)
            raise
        finally:
            if request.lease is not None:
                self._release(request)

    def _admit(self, request: Request) -> None:
        """Deadline, route, and the pin on a model that is in memory: all that takes no time."""
        self._check_open()
        request.policy = self._policy_of(request)
        request.deadline_s = request.started_s + self._timeout_s(request.timeout_ms)
        key = self._router.find(request.version, request.model)
        if key is not None:
            self._follow_route(request, key)

    def _policy_of(self, request: Request) -> OutputPolicy:
        """What the answer may show. Raises ForbiddenError, ConfigError."""
        policy = request.policy or self._policy
        return policy if request.outputs is None else policy.narrowed(request.outputs)

    def _follow_route(self, request: Request, key: Key) -> None:
        if isinstance(key, TrafficSplit):
            key, request.chosen = self.experiments.choose(key, request.client, request.identity)
        request.key = key
        request.lease = self.model_cache.acquire(key)

    def _load(self, request: Request) -> None:
        """Ask the registries for a version that is not known yet, then load what is not in
        memory."""
        if request.key is None:
            self._refresh(request.deadline_s)
            self._follow_route(request, self._router.require(request.version, request.model))
        if request.lease is None:
            request.lease = self._load_lease(request.key, request.deadline_s)

    async def _aload(self, request: Request) -> None:
        deadline_s = request.deadline_s
        if request.key is None:
            await self._on_loader(deadline_s, id, self._refresh, deadline_s)
            self._follow_route(request, self._router.require(request.version, request.model))
        if request.lease is None:
            came_s = self._clock()
            release = self.model_cache.release
            request.lease = await self._on_loader(
                deadline_s, release, self._load_in_time, request.key, came_s, deadline_s
            )

    def _prepare(self, request: Request) -> None:
        """Check the features, choose the heads."""
        engine = request.lease.value
        rows = engine.preprocessor.validate(request.features, self.config.max_request_rows)
        request.engine = engine
        request.rows = rows
        request.runner = engine
        if request.client is not None:
            client = ids_of(request.client, len(rows))
            request.client = client
            request.runner, request.slots, request.head = self._personal(engine, client, len(rows))
            if request.caller is None and isinstance(client, str):
                request.caller = f"client {client}"
        request.prepared_s = self._clock()
        request.looked_up_s = request.prepared_s

    def _personal(
        self, engine: InferenceEngine, client: str | tuple[str, ...], rows: int
    ) -> tuple[InferenceEngine | PersonalEngine, NDArray[np.int64] | None, str | list[str]]:
        """What a client's rows run on, the slots of their heads (None: on the global model), and
        what was found."""
        slots = None
        found: str | list[str] = "none"
        if engine.personal is not None:
            slots, found = engine.personal.choose(client, rows)
        elif not isinstance(client, str):
            found = ["none"] * rows
        if self.config.unknown_client == "refuse" and any(
            one in ("unknown", "expired", "none") for one in each(found)
        ):
            raise NotFoundError(
                "no personal head here for this client: train one, or let the global head answer"
            )
        if engine.personal is None or slots is None or (slots < 0).all():
            return engine, None, found
        return engine.personal, slots, found

    def _compute(self, request: Request) -> Prediction:
        """Queue and batch, preprocess, infer, postprocess."""
        prediction: Prediction = self._batcher.run(
            request.runner,
            request.payload,
            rows=len(request.rows),
            arrival_s=request.started_s,
            deadline_s=request.deadline_s,
            client=request.caller,
        )
        return prediction

    def _acompute(self, request: Request) -> Coroutine[Any, Any, Prediction]:
        return self._batcher.arun(
            request.runner,
            request.payload,
            rows=len(request.rows),
            arrival_s=request.started_s,
            deadline_s=request.deadline_s,
            client=request.caller,
        )

    def _respond(self, request: Request) -> Answer:
        """Make the answer, count the success."""
        prediction = request.prediction
        engine = request.engine
        started_s = request.started_s
        policy = request.policy or FULL
        if policy == FULL:
            answer: Answer = prediction.arrays() if request.arrays else prediction.lists()
        else:
            answer = policy.shown(prediction.arrays(), request.arrays)
        answered_s = self._clock()
        if answered_s > request.deadline_s:
            raise too_late(request, answered_s)
        ran_s = prediction.execution.marks_s
        marks_s = (started_s, request.prepared_s, request.looked_up_s, *ran_s, answered_s)
        self.telemetry.success(engine.served_as, len(request.rows), marks_s)
        answer["latency_ms"] = (answered_s - started_s) * 1e3
        answer["model_version"] = engine.version
        answer["model_type"] = "global"
        if engine.round is not None:
            answer["round"] = engine.round
        if request.head is not None:
            self._say_head(request, answer)
        if request.chosen is not None:
            answer |= self.experiments.answered(
                request.chosen, engine.version, request.rows, prediction
            )
        if request.stages:
            answer["stages_ms"] = stages_ms(marks_s)
        return answer

    def _say_head(self, request: Request, answer: Answer) -> None:
        """Which heads answered a client."""
        head = request.head
        answer["head"] = head
        heads = each(head)
        if request.slots is not None:
            answer["model_type"] = "personal" if set(heads) == {"own"} else "mixed"
        if isinstance(head, str):
            heads = heads * len(request.rows)
        self.telemetry.count("head", heads)

    def _release(self, request: Request) -> None:
        """Unpin the model. The request forgets it first: an evicted one must be gone when its room
        is given away."""
        lease = request.lease
        request.lease = None
        request.engine = None
        request.runner = None
        self.model_cache.release(lease)

    def _count_failure(self, request: Request, error: BaseException) -> None:
        if isinstance(error, FlservingError):
            reason = error.reason
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            reason = "Cancelled"
        else:
            reason = "Internal"
        self.telemetry.failure(
            reason, "/".join(request.key or ()), self._clock() - request.started_s
        )
        if request.chosen is not None:
            self.experiments.failed(request.chosen, reason)

    def _follow_forgets(self, model: str, registry: "Index") -> None:
        """Where a client was forgotten, nothing in memory may know it: heads are loaded anew,
        predictions go."""
        forgets = registry.forgets()
        if self._forgets.setdefault(model, forgets) != forgets:
            keys = [
                key
                for key, engine in self.model_cache.items()
                if key[0] == model and engine.personal is not None
            ]
            self.model_cache.clear(keys)
            if self.prediction_cache is not None:
                self.prediction_cache.clear()
            for key in keys:
                # the next request tries again, and says why
                with contextlib.suppress(FlservingError):
                    self._preload(key)
            self._forgets[model] = forgets

    # The prediction cache: what was computed before is found, and what is asked twice at once is
    # computed once

    def _find_or_compute(self, request: Request, cache: PredictionCache[Outputs]) -> None:
        self._set_key(request)
        while not self._look_up(request, cache):
            if request.leads:
                with self._leading(request, cache):
                    request.prediction = self._compute(request)
                return
            wait([request.flight], max(0.0, request.deadline_s - self._clock()))
            if self._take_from_flight(request):
                return

    async def _afind_or_compute(self, request: Request, cache: PredictionCache[Outputs]) -> None:
        self._set_key(request)
        while not self._look_up(request, cache):
            if request.leads:
                with self._leading(request, cache):
                    request.prediction = await self._acompute(request)
                return
            await finished(request.flight, request.deadline_s - self._clock())
            if self._take_from_flight(request):
                return

    def _set_key(self, request: Request) -> None:
        # what is hashed is what runs, whatever becomes of the caller's array
        request.rows = request.rows.copy()
        request.cache_key = self.cache_key(request)

    def cache_key(self, request: Request) -> Hashable:
        """What determines the prediction, and who may find it again: the client of a personal
        answer; and the caller, but where the setting says that all share (no name: all without
        one). Override it to try another key.

        What is kept is never masked, and every answer is masked on its own. The policy is in the
        key for the time that a hit saves: who may see less must not learn that way what was asked
        by those who may see more.
        """
        scope: object = None
        if self.config.prediction_cache_scope == "caller":
            scope = request.client, request.caller
        elif request.slots is not None:
            scope = request.client
        content = hashlib.blake2b(request.rows.data, digest_size=32)
        scope = (scope, request.policy)
        # in the hash: the key's size does not count in the cache's budget
        content.update(repr(scope).encode())
        return request.runner.identity, request.rows.shape, content.digest()

    def _look_up(self, request: Request, cache: PredictionCache[Outputs]) -> bool:
        """Whether the prediction is there. Else the request leads a flight, or follows another
        one's."""
        outputs, request.flight, request.leads = cache.begin(request.cache_key)
        request.looked_up_s = self._clock()
        if outputs is not None:
            self._found(request, outputs)
        return outputs is not None

    def _found(self, request: Request, outputs: Outputs) -> None:
        execution = Execution(outputs, (self._clock(),) * 4)
        request.prediction = Prediction(execution, start=0, stop=len(request.rows))

    @contextmanager
    def _leading(self, request: Request, cache: PredictionCache[Outputs]) -> Iterator[None]:
        """Whatever comes of the ``with`` block, those who follow hear of it."""
        flight = request.flight
        try:
            yield
            prediction = request.prediction
            outputs = prediction.execution.outputs.copy_rows(prediction.start, prediction.stop)
            owner = None
            # as a digest: its length does not count in the cache's budget either
            if request.caller is not None:
                owner = hashlib.blake2b(repr(request.caller).encode(), digest_size=16).digest()
            cache.finish(request.cache_key, flight, outputs, owner=owner)
        except Exception as error:
            cache.finish(request.cache_key, flight, error=error)
            raise
        except BaseException:
            cancelled = OverloadedError("the request that computed this was cancelled: try again")
            cache.finish(request.cache_key, flight, error=cancelled)
            raise
        finally:
            request.flight = None
            flight = None  # an error's frames must not hold what holds the error

    def _take_from_flight(self, request: Request) -> bool:
        """Whether the leader's prediction is there; False where its deadline or its place in the
        queue was its own bad luck, and somebody else has to lead."""
        flight = request.flight
        request.flight = None
        try:
            if not flight.done():
                raise DeadlineExceededError(
                    "an identical request took longer than timeout_ms: raise it"
                )
            if isinstance(flight.exception(), OverloadedError | DeadlineExceededError):
                return False
            self._found(request, flight.result())
            return True
        finally:
            del flight

    def _timeout_s(self, timeout_ms: float | None) -> float:
        if timeout_ms is None:
            return self.config.timeout_ms / 1e3
        return deadline_s(timeout_ms)

    # What operators see

    def get_all_stats(self) -> dict[str, Any]:
        """Counters and durations of the server, its queue, its caches, the engines in memory, and,
        by model, what the devices of its ``fleet`` run.

        An engine of the default model is also found by its version alone:
        ``stats["v1.0"]["request_count"]``. It counts what it ran; what a cache answered or a check
        refused is in ``server``.
        """
        model = self._router.routes.model
        engines = {}
        by_version = {}
        for key, engine in self.model_cache.items():
            stats = engine.get_stats()
            engines["/".join(key)] = stats
            if key[0] == model:
                by_version[key[1]] = stats
        queue = {
            "waiting_rows": self._batcher.queue.rows,
            "running": self._batcher.busy,
            "max_queue_rows": self.config.max_queue_rows,
        }
        predictions = None
        if self.prediction_cache is not None:
            predictions = self.prediction_cache.stats()
        return by_version | {
            "server": self.telemetry.snapshot(),
            "queue": queue,
            "model_cache": self.model_cache.stats(),
            "prediction_cache": predictions,
            "engines": engines,
            "fleet": {name: skew.summary() for name, skew in self.fleet.skew().items()},
        }

    def close(self, drain_s: float = 5.0) -> None:
        """Refuse new requests, finish the admitted ones, end threads, delete the temporary store.
        Idempotent."""
        self._closed = True
        self._batcher.close(drain_s)
        super().close()
        self.experiments.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def too_late(request: Request, answered_s: float) -> DeadlineExceededError:
    took = in_ms(answered_s - request.started_s)
    allowed = in_ms(request.deadline_s - request.started_s)
    return DeadlineExceededError(
        f"the answer took {took}, the deadline was {allowed}: raise timeout_ms"
    )


def stages_ms(marks_s: Sequence[float]) -> dict[str, float]:
    """Milliseconds of each of ``STAGES``, from the times between which they lie."""
    spent = zip(STAGES, pairwise(marks_s), strict=True)
    return {name: (end_s - start_s) * 1e3 for name, (start_s, end_s) in spent}


def dealt_out(answer: Answer, lengths: Iterable[int]) -> list[Answer]:
    """One answer of several requests of so many rows, as one for each."""
    lists = {name: value for name, value in answer.items() if isinstance(value, list | np.ndarray)}
    answers = []
    start = 0
    for length in lengths:
        stop = start + length
        answers.append(answer | {name: values[start:stop] for name, values in lists.items()})
        start = stop
    return answers


# The tutorial's entrance


def create_serving_pipeline(
    model: "nn.Module",
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


def demo_serving(requests: int = 100) -> tuple[ModelServer, list[Answer]]:
    """Serve the tutorial's 32-64-10 model (random weights) and send it ``requests`` random rows,
    one at a time.

    Prints how many were answered, the server's health and statistics, and the mean latency.

    Returns:
        The server, still open (close it, or leave it to the end of the process), and its answers.
    """
    import torch

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
