"""Which models a server has, and how they get into memory: sources, routes, the model cache, and
who loads.

``ModelServer`` (``server.py``) adds the way of a request.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import ArrayLike

from flserving import forks
from flserving.errors import (
    ConfigError,
    ConflictError,
    DeadlineExceededError,
    FlservingError,
    NotSupportedError,
    OverloadedError,
    ServerClosedError,
)
from flserving.models.processing import OutputType, Postprocessor, Preprocessor
from flserving.monitoring.metrics import Costs
from flserving.registry.manifest import Signature, is_name
from flserving.serving.batching.policy import MARGIN
from flserving.serving.cache import Lease, ModelCache
from flserving.serving.config import ServingConfig, checked
from flserving.serving.engine import InferenceEngine
from flserving.serving.loader import ModuleStore, RegistrySource, Source, load_engine
from flserving.serving.request import finished
from flserving.serving.router import Key, Router
from flserving.serving.synonyms import version_id_too

if TYPE_CHECKING:
    from torch import nn

    from flserving.registry import Registry

T = TypeVar("T")
_AT_ONCE_S = 5e-3  # a load that begins within this has not waited for a loader
_PROBLEMS = 32  # versions of which health_check says why they could not be loaded
LOCAL = "local"
"""Name of the model whose versions come from :meth:`ModelServer.load_model`."""


class ModelHost:
    """Models by name, their versions and aliases, and the few of them that are in memory."""

    def __init__(
        self,
        config: ServingConfig | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        model_cache: ModelCache | None = None,
    ) -> None:
        self.config = checked(config)
        self._clock = clock
        if model_cache is None:
            model_cache = ModelCache(self.config.cache_size, self.config.cache_bytes, clock)
        self.model_cache = model_cache
        self._store = ModuleStore()
        self._sources: dict[str, Source] = {}
        self._registries: dict[Registry, None] = {}  # in the order in which they were given
        self._router = Router(self._preload)
        # why a version could not be loaded when it was last tried
        self._load_problems: dict[str, str] = {}
        # starts no thread until used
        self._loaders = ThreadPoolExecutor(2, thread_name_prefix="flserving-loader")
        self._load_costs = Costs()  # by source
        self._costs_lock = threading.Lock()
        self._closed = False
        self._started_s = clock()
        forks.in_child(self, ModelHost._begin_anew)

    @version_id_too
    def load_model(
        self,
        version: str,
        model: "nn.Module",
        preprocessor: Preprocessor | Mapping[str, ArrayLike] | None = None,
        postprocessor: Postprocessor | None = None,
        *,
        feature_stats: Mapping[str, ArrayLike] | None = None,
        output_type: OutputType | None = None,
        threshold: float | None = None,
        num_features: int | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> InferenceEngine:
        """Serve any module under the id ``version``, without a registry; the first one becomes the
        default.

        It is copied to the server's temporary store, so it can be evicted and come back.

        Args:
            preprocessor: What happens to the features first; or the ``feature_stats`` from which it
                is made: ``{"mean": [D], "std": [D]}`` of the training data.
            postprocessor: What happens to the outputs; made from ``output_type`` and ``threshold``
                when not given.
            num_features: D, where it cannot be told from the first layer.
            input_shape: Shape of a row, where it is not [D]: e.g. (3, 32, 32).

        Raises:
            InvalidModelError, ConfigError, ConflictError: See :meth:`ModuleStore.add` and
                ``transforms``.
            ConfigError: Also a part that is given twice, as an object and by its settings.
            ConflictError: Also where a registry's model has the name "local".
            NotSupportedError: The configuration's engine is not torch.
        """
        self._check_open()
        if self.config.engine != "torch":
            raise NotSupportedError(
                f"load_model takes modules of torch, the engine is {self.config.engine!r}: publish to a registry"
            )
        if self._sources.setdefault(LOCAL, self._store) is not self._store:
            raise ConflictError(
                f"model {LOCAL!r} comes from a registry here: use another server for load_model"
            )
        before = _preprocessor(preprocessor, feature_stats, num_features, input_shape)
        if postprocessor is None:
            postprocessor = Postprocessor(
                output_type or "classification", 0.0 if threshold is None else threshold
            )
        elif not isinstance(postprocessor, Postprocessor):
            raise ConfigError(
                f"postprocessor is a {type(postprocessor).__name__}: pass a Postprocessor"
            )
        elif output_type is not None or threshold is not None:
            raise ConfigError(
                "output_type and threshold are the postprocessor's own: give them or it, not both"
            )
        self._store.add(version, model, before, postprocessor)
        self._router.add((LOCAL, version))
        if "default" not in self._router.routes.of(LOCAL).aliases:
            self._router.set_alias((LOCAL, version))
        with self._pinned((LOCAL, version)) as engine:
            return engine

    def serve(self, registry: "Registry", name: str, threshold: float = 0.0) -> None:
        """Serve every version of ``name`` in ``registry`` and follow its aliases, also those that
        other processes move.

        Raises:
            NotFoundError: It has no version.
            ConflictError: The name is taken by another registry or ``load_model``.
        """
        self._check_open()
        source = RegistrySource(registry, name, threshold, self.config.engine)
        held = self._sources.setdefault(name, source)
        if not (
            isinstance(held, RegistrySource)
            and held.registry is registry
            and held.threshold == threshold
        ):
            raise ConflictError(
                f"model {name!r} is served already: use another server for another registry"
            )
        try:
            self._router.follow(registry, name)
        except BaseException:
            if held is source:
                del self._sources[name]
            raise
        self._registries[registry] = None

    def serve_all(self, registry: "Registry") -> None:
        """Serve every model of ``registry``, also those that are published later (up to
        ``routing.MOST_MODELS``)."""
        self._check_open()
        self._registries[registry] = None
        self._router.follow_all(registry, functools.partial(self.serve, registry))

    @version_id_too
    def set_default(self, version: str | int, model: str | None = None) -> None:
        """Let ``version`` answer who names no version. It is loaded and warm before the route
        moves.

        Raises:
            NotFoundError: No such version.
            ConflictError: The model's aliases belong to its registry.
        """
        self._check_open()
        if model is None:
            model = self._router.routes.model or LOCAL
        self._router.set_alias((model, str(version)))

    def resolve(self, version: str | int | None = None, model: str | None = None) -> Key:
        """The (model, version) that a version id or alias leads to now. Raises NotFoundError,
        ModelUnloadedError."""
        self._check_open()
        return self._router.require(version, model)

    def signature(self, key: Key) -> Signature:
        """What a version takes and gives, without loading it. Raises NotFoundError,
        CorruptArtifactError."""
        self._check_open()
        return self._sources[key[0]].signature(key[1])

    def published_metrics(self, key: Key) -> Mapping[str, float]:
        """What was measured of a version when it was published. Raises as :meth:`signature`."""
        self._check_open()
        return self._sources[key[0]].metrics(key[1])

    @property
    def unloaded(self) -> frozenset[str]:
        """Models that :meth:`unload` took out of service."""
        return frozenset(
            name for name, served in self._router.routes.models.items() if served.withdrawn
        )

    def unload(self, model: str) -> None:
        """Take a model out of service and out of memory: who asks it gets ModelUnloadedError,
        requests that run finish. Raises NotFoundError."""
        self._check_open()
        self._router.withdraw(model)
        self.model_cache.clear([key for key, _ in self.model_cache.items() if key[0] == model])

    def reload(self, model: str) -> None:
        """Read its registry again, load its default version, and put a model (back) into service; a
        new one, too.

        Raises:
            NotFoundError, CorruptArtifactError, OverloadedError: It stays as it was.
        """
        self._check_open()
        if model not in self._sources and is_name(model):
            for registry in list(self._registries):
                if registry.version_numbers(model):
                    self.serve(registry, model)
                    break
        self._router.restore(model)

    def refresh(self) -> None:
        """See now what other processes changed in the registries (the watcher does so four times a
        second)."""
        self._check_open()
        self._router.refresh(retry=True)

    def _refresh(self, deadline_s: float) -> None:
        self._check_open()
        self._router.refresh(max(0.0, deadline_s - self._clock()))

    def lease(
        self, version: str | int | None = None, model: str | None = None
    ) -> AbstractContextManager[InferenceEngine]:
        """The loaded engine of a version, pinned in memory for the ``with`` block."""
        return self._pinned(self.resolve(version, model))

    @contextmanager
    def _pinned(self, key: Key) -> Iterator[InferenceEngine]:
        lease = self.model_cache.acquire(key) or self._load_lease(
            key, self._clock() + self.config.timeout_ms / 1e3
        )
        try:
            yield lease.value
        finally:
            self.model_cache.release(lease)

    @property
    def engines(self) -> dict[str, InferenceEngine]:
        """The versions of the default model that are in memory, by id; looking up another one loads
        it."""
        self._check_open()
        model = self._router.routes.model
        return _Engines(
            self.lease,
            {key[1]: engine for key, engine in self.model_cache.items() if key[0] == model},
        )

    def _held(self) -> set[str]:
        """The versions ("model/version") that are in memory, or that an alias or an experiment
        leads to."""
        keys = {key for key, _ in self.model_cache.items()}
        for name, served in self._router.routes.models.items():
            keys.update((name, version) for version in served.aliases.values())
            for experiment in served.experiments.values():
                keys.update((name, str(number)) for number in experiment.versions)
        return set(map("/".join, keys))

    @property
    def cache(self) -> ModelCache:
        """The cache of loaded models: ``model_cache``."""
        return self.model_cache

    @property
    def default_version(self) -> str | None:
        """The version that answers who names none; None before there is one."""
        routes = self._router.routes
        return routes.of(routes.model).aliases.get("default")

    @property
    def ready(self) -> bool:
        """Whether the default model can answer."""
        routes = self._router.routes
        return not self._closed and (routes.model, "default") in routes.targets

    def health_check(self) -> dict[str, Any]:
        """``status`` ("healthy"; "degraded": it answers, but ``problems`` need a look;
        "unavailable"), ``ready`` (the default model can answer), models with their versions and
        aliases, the versions in memory, the uptime. Of the default model alone:
        ``default_version``, and ``loaded_models``, its versions in memory."""
        routes = self._router.routes
        problems = {**self._load_problems, **self._router.problems}
        models = {}
        for name, served in routes.models.items():
            models[name] = {"versions": list(served.versions), "aliases": dict(served.aliases)}
        in_memory = [key for key, _ in self.model_cache.items()]
        ready = self.ready
        status = "healthy"
        if not ready:
            status = "unavailable"
        elif problems:
            status = "degraded"
        return {
            "status": status,
            "ready": ready,
            "default_model": routes.model,
            "models": models,
            "default_version": self.default_version,
            "loaded_models": [version for model, version in in_memory if model == routes.model],
            "in_memory": ["/".join(key) for key in in_memory],
            "problems": problems,
            "uptime_s": self._clock() - self._started_s,
        }

    def _begin_anew(self) -> None:
        """In a forked child: threads that load."""
        self._loaders = ThreadPoolExecutor(2, thread_name_prefix="flserving-loader")
        self._costs_lock = threading.Lock()

    def _check_open(self) -> None:
        if self._closed:
            raise ServerClosedError("the server was closed: open a new one")

    def _load_lease(self, key: Key, deadline_s: float) -> Lease:
        """Load a version that is not in memory, and pin it."""
        problem = "/".join(key)
        self._check_open()
        try:
            lease = self.model_cache.load(
                key,
                lambda: self._build(key),
                deadline_s - self._clock(),
                size=lambda: self._size(key),
            )
        except FlservingError as error:
            self._check_open()  # its files went while it loaded
            # those say nothing of the version
            if not isinstance(error, OverloadedError | DeadlineExceededError):
                self._load_problems[problem] = str(error)
                for oldest in list(self._load_problems)[:-_PROBLEMS]:
                    self._load_problems.pop(oldest, None)
            raise
        self._load_problems.pop(problem, None)
        return lease

    def _load_in_time(self, key: Key, came_s: float, deadline_s: float) -> Lease:
        """Load a version, but not for a caller who has waited for a loader until it cannot end in
        time any more: under more loads than can be done each would come too late. (The rule of
        :meth:`BatchQueue.take`, for loads.)"""
        source = self._sources.get(key[0])
        start_s = self._clock()
        with self._costs_lock:
            usual_s = self._load_costs.usual_s(source, 1, start_s)
        if start_s - came_s > _AT_ONCE_S and start_s + MARGIN * usual_s > deadline_s:
            raise OverloadedError(
                f"other loads came first: one usually takes {usual_s * 1e3:.0f} ms, the deadline leaves "
                f"{(deadline_s - start_s) * 1e3:.0f} ms: try again later, or raise timeout_ms"
            )
        cold = key not in self.model_cache
        lease = self._load_lease(key, deadline_s)
        if cold and source is not None:
            end_s = self._clock()
            with self._costs_lock:
                self._load_costs.add(source, 1, end_s - start_s, end_s)
        return lease

    async def _on_loader(
        self, deadline_s: float, undo: Callable[[T], object], call: Callable[..., T], *args: Any
    ) -> T:
        """``call(*args)`` on a loader thread. Where its caller is cancelled or late, ``undo`` gets
        what it returns."""
        try:
            job = self._loaders.submit(call, *args)
        except RuntimeError:  # shut down since the request was let in
            self._check_open()
            raise
        waited = False
        try:
            if not await finished(job, deadline_s - self._clock()):
                raise DeadlineExceededError(
                    "a load took longer than timeout_ms: try again, or raise it"
                )
            waited = True
        finally:
            if not waited and not job.cancel():
                job.add_done_callback(lambda late: late.exception() or undo(late.result()))
        try:
            return job.result()
        finally:
            # an error's frames must not hold what holds the error: it would keep models alive
            del job

    def _size(self, key: Key) -> int:
        return self._sources[key[0]].nbytes(key[1], self.config.head_cache_bytes)

    def _build(self, key: Key) -> InferenceEngine:
        engine = load_engine(self._sources[key[0]], key[1], self.config)
        for one in filter(None, (engine, engine.personal)):
            one.served_as = "/".join(key)
        return engine

    def _preload(self, key: Key) -> None:
        with self._pinned(key):
            pass

    def __reduce__(self) -> tuple[Any, ...]:
        """Its threads and loaded models cannot be copied, nor sent to another process. Raises
        NotSupportedError."""
        registries = (
            " or ".join(f"Registry({registry.root!r})" for registry in self._registries)
            or "the same models"
        )
        raise NotSupportedError(
            f"a {type(self).__name__} cannot leave its process: make one in the other process, of its config and "
            f"{registries}; both of these can be sent there"
        )

    def close(self) -> None:
        """Forget the models. Idempotent."""
        self._closed = True
        self._router.close()
        self._loaders.shutdown(wait=True)
        self.model_cache.clear()


def _preprocessor(
    given: Preprocessor | Mapping[str, ArrayLike] | None,
    feature_stats: Mapping[str, ArrayLike] | None,
    num_features: int | None,
    input_shape: Sequence[int] | None,
) -> Preprocessor:
    """The one that was given, or one made from statistics. Raises ConfigError."""
    if isinstance(given, Preprocessor):
        if feature_stats is not None or num_features is not None or input_shape is not None:
            raise ConfigError(
                "feature_stats, num_features and input_shape are the preprocessor's own: give them or it, not both"
            )
        return given
    if given is not None and feature_stats is not None:
        raise ConfigError("statistics are given twice: as the third argument and as feature_stats")
    statistics = feature_stats if given is None else given
    if statistics is None:
        statistics = {}
    if not isinstance(statistics, Mapping):
        raise ConfigError(
            f"preprocessor is a {type(statistics).__name__}: pass a Preprocessor, or its mean and std"
        )
    if unknown := set(statistics) - {"mean", "std"}:
        raise ConfigError(
            f"feature_stats has {', '.join(sorted(map(str, unknown)))}: it takes mean and std"
        )
    return Preprocessor(
        mean=statistics.get("mean"),
        std=statistics.get("std"),
        num_features=num_features,
        input_shape=input_shape,
    )


class _Engines(dict[str, InferenceEngine]):
    """Nobody holds one for long: it is made for each look at :attr:`ModelHost.engines`."""

    def __init__(
        self,
        lease: Callable[[str], AbstractContextManager[InferenceEngine]],
        loaded: Mapping[str, InferenceEngine],
    ) -> None:
        super().__init__(loaded)
        self._lease = lease

    def __missing__(self, version: str) -> InferenceEngine:
        with self._lease(version) as engine:
            return engine
