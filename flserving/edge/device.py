"""The edge: a device that answers by itself, with the global model or with its client's own head.

It is a :class:`ModelServer` over a registry in the device's own folder. What it serves comes in
updates; each one is a version with the weights and the one client's head, so both change as one,
and rollback and crash safety are the registry's. Every answer says which round it came from and how
old that is.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from math import inf
from typing import TYPE_CHECKING, Any

import msgspec

from flserving import models
from flserving.errors import (
    ConfigError,
    CorruptArtifactError,
    InvalidInputError,
    InvalidModelError,
    NotFoundError,
    StaleModelError,
)
from flserving.models.weights import Tensors
from flserving.registry import Registry, storage
from flserving.registry.heads import HeadSet, Layout, trained_on
from flserving.registry.manifest import Lineage, Manifest
from flserving.registry.storage import own_folder
from flserving.serving.config import ServingConfig, checked
from flserving.serving.engine import Answer, InferenceEngine
from flserving.serving.repository import LOCAL
from flserving.serving.request import Request
from flserving.serving.router import Key
from flserving.serving.server import ModelServer
from flserving.serving.synonyms import version_id_too

if TYPE_CHECKING:
    from torch import nn

UPDATED_AT = "updated_at_s"  # in the lineage of a version that brought only a head
_AGES = 16  # versions whose ages are kept
# a clock that was set back by less than this is taken as right: daemons that keep time do so
_SLACK_S = 60.0


class Age:
    """How long ago a model was known to be the current one, by two clocks of which neither is
    trusted alone.

    The wall clock may be set; the monotonic one stands still while a device sleeps and forgets at
    every start. So the larger of the two spans counts: a jump backwards makes nothing look fresh, a
    jump forwards makes it look too old.

    Args:
        since_s: Unix seconds of that moment. ``clock``: monotonic seconds. ``wall``: Unix seconds.
    """

    def __init__(
        self, since_s: float, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self._since_s = since_s
        self._clock = clock
        self._wall = wall
        self._made_s = clock()
        by_wall = wall() - since_s
        self._age_when_made_s = max(0.0, by_wall) if by_wall >= -_SLACK_S else None

    def age_s(self) -> float | None:
        """Seconds; None (older than any limit) as long as the wall clock shows a time before that
        moment, and has since this object was made."""
        by_wall = self._wall() - self._since_s
        if self._age_when_made_s is None:
            return by_wall if by_wall >= 0 else None
        by_clock = self._age_when_made_s + self._clock() - self._made_s
        return max(self._age_when_made_s, by_clock, by_wall)


class EdgeModelServer(ModelServer):
    """Serves the global or the personalised model of one client on its device.

    Args:
        global_model: What to serve from the start; more in :meth:`update_global`. None: what the
            registry holds.
        local_model: A whole model of the client's own, served where ``use_personalized`` asks for
            it. It is a second name in the device's registry (``<model>-local``). A client's *head*
            needs none of this.
        config: See :class:`ModelServer`.
        registry: The device's own; a temporary one when not given. It stays open when the server
            closes.
        model: The one name that is served.
        client: Whose device this is: its head is carried from update to update.
        fresh_s: Soft limit: an answer from an older model says ``degraded``. None: no limit.
        refuse_s: Hard limit: an older model answers no more.
        clock: Monotonic seconds. ``wall``: Unix seconds.

    A model's age counts from its update, or from the last :meth:`confirm`. One that was loaded by
    :meth:`load_model`, or whose age is unknown because the clock went backwards between two starts,
    is past both limits.

    Raises:
        ConfigError: A limit that is no positive number, or a soft one above the hard one.
        NotSupportedError: The registry leads to a version that the engine ``numpy`` cannot run.
    """

    def __init__(
        self,
        global_model: "nn.Module | None" = None,
        local_model: "nn.Module | None" = None,
        config: ServingConfig | None = None,
        registry: Registry | None = None,
        model: str = "model",
        *,
        client: str = "device",
        fresh_s: float | None = None,
        refuse_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        if global_model is not None and not hasattr(global_model, "state_dict"):
            raise ConfigError(
                f"global_model is a {type(global_model).__name__}: pass a module, or config= by its name"
            )
        _check_limits(fresh_s, refuse_s)
        if model == LOCAL or not client:
            raise ConfigError(
                f"model is {model!r}, client is {client!r}: choose another name, and name a client"
            )
        super().__init__(checked(config), clock=clock)
        self._remove_registry: Callable[[], object] | None = None  # where it is temporary
        if registry is None:
            folder, self._remove_registry = own_folder(self, "flserving-edge-")
            registry = Registry(folder)
        self.registry = registry
        self.model = model
        self.client = client
        self.fresh_s = fresh_s
        self.refuse_s = refuse_s
        self._wall = wall
        self._updating = threading.Lock()
        self._ages: dict[Key, tuple[int | None, Age]] = {}  # its round, its age
        self.local_model = f"{model}-local"
        try:
            for name in (self.model, self.local_model):
                now = current(self.registry, name)
                # a device must not start with what cannot answer
                if now is not None and self.config.engine == "numpy":
                    models.blueprint("numpy", now.architecture, now.parameters)
                if self.registry.version_numbers(name):
                    self.serve(self.registry, name)
            if global_model is not None:
                self.update_global(global_model)
            if local_model is not None:
                self.update_local(local_model)
        except BaseException:
            self.close()
            raise

    # Requests

    @version_id_too
    def predict(  # type: ignore[override]
        self,
        features: Any,
        use_personalized: bool = True,
        version: str | int | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a row [D] or rows [N, D] on the device.

        Args:
            use_personalized: With the client's own local model where it has one, else with its own
                head where there is one that fits; False: with the global model.
            version, options: Those of :meth:`ModelServer.predict`; the ``client`` is the device's
                when not given.

        Returns:
            The answer of :meth:`ModelServer.predict`, with ``head`` unless the global model was
            asked for, and with ``path`` ("local"), ``round`` (None where no update named one),
            ``age_s`` (None: unknown) and ``degraded`` (older than ``fresh_s``).

        Raises:
            StaleModelError: Older than ``refuse_s``. What :meth:`ModelServer.predict` raises.
        """
        return self.handle(device_request(features, use_personalized, version, **options))

    def _admit(self, request: Request) -> None:
        """As :meth:`ModelServer._admit`, for the device's own client; a version that is too old
        answers nobody."""
        if not request.personal:
            request.client = None
        elif request.client is None:
            request.client = self.client
        own = (
            request.client == self.client
            and request.version is None
            and request.model in (None, self.model)
        )
        if own and self.local_model in self._sources:
            request.model = self.local_model
            request.client = None  # a whole model of its own has no head to choose
        super()._admit(request)
        if request.key is not None:  # else the route is as new as can be
            self._freshness(request.key)

    def _respond(self, request: Request) -> Answer:
        freshness = self._freshness(request.key)
        answer = super()._respond(request) | freshness
        if request.model == self.local_model:
            answer["model_type"] = "personal"
        if not request.nested:
            self.telemetry.count("path", [answer["path"]])
        return answer

    def _freshness(self, key: Key) -> Answer:
        """What an answer says of the version that gave it. Raises StaleModelError."""
        number, age = (
            self._age_of(key) if key[0] in (self.model, self.local_model) else (None, None)
        )
        age_s = None if age is None else age.age_s()
        if self.refuse_s is not None and (age_s is None or age_s > self.refuse_s):
            raise StaleModelError(
                f"version {key[1]} is {'of unknown age' if age_s is None else f'{age_s:.0f} s old'}, refuse_s is "
                f"{self.refuse_s:g}: let the device reach its cloud, or raise refuse_s"
            )
        degraded = self.fresh_s is not None and (age_s is None or age_s > self.fresh_s)
        return {"path": "local", "round": number, "age_s": age_s, "degraded": degraded}

    def _age_of(self, key: Key) -> tuple[int | None, Age]:
        known = self._ages.get(key)
        if known is None:
            manifest = self.registry.manifest(key[0], int(key[1]))
            known = self._keep_age(key, manifest.round, _updated_at(manifest))
        return known

    def _keep_age(
        self, key: Key, number: int | None, since_s: float | None = None
    ) -> tuple[int | None, Age]:
        """The round and the age of a version, counted from ``since_s`` (Unix seconds; None: from
        now)."""
        if since_s is None:
            since_s = self._wall()
        age = Age(since_s, self._clock, self._wall)
        known = self._ages[key] = (number, age)
        for oldest in list(self._ages)[:-_AGES]:
            if oldest[1] != self._router.routes.of(oldest[0]).aliases.get("default"):
                self._ages.pop(oldest, None)  # what its manifest tells is enough
        return known

    # Updates

    def update_global(
        self,
        state: "nn.Module | Tensors",
        *,
        round: int | None = None,
        head: Tensors | HeadSet | None = None,
        **published: Any,
    ) -> Manifest:
        """Serve other weights from now on; every request sees all of the update or nothing of it.

        The new version is stored, loaded and warm before the alias ``default`` moves to it, in one
        transaction: killed anywhere before that, the device starts again with the model that it
        had.

        Args:
            state: A module or its state dict. A plain ``nn.Sequential`` over feature rows needs no
                architecture.
            round: The federated round that made it.
            head: The client's head for this model: ``{"head.weight": [C, F], "head.bias": [C]}``,
                or a :class:`HeadSet` that holds it. When not given, the one it had is kept; it
                applies again where it was trained on this very body, else answers say ``head``:
                "stale". One of another shape is dropped.
            published: Arguments of :meth:`Registry.publish`. Architecture, parameters,
                preprocessing and output type are those of the model before when not given.

        Raises:
            InvalidModelError: The first update names no architecture, or what
                :meth:`Registry.publish` raises; a model that does not answer a row of zeros raises
                what it raised. The model before serves on.
        """
        with self._updating:
            now = current(self.registry, self.model)
            published = _as_before(now) | published
            if round is not None:
                published["lineage"] = Lineage(round=round)
            if head is not None:
                if not isinstance(head, HeadSet):
                    head = HeadSet.from_states({self.client: head})
                return self._install(state, head, published)
            earlier = None
            # what is broken is replaced, its head with it
            with contextlib.suppress(CorruptArtifactError):
                if now is not None:
                    store = self.registry.read(self.model, now.version).heads
                    if store is not None:
                        earlier = store.take(self.client)
            try:
                return self._install(state, earlier, published)
            except InvalidModelError:
                if earlier is None:
                    raise
                # a narrower body, or none: no head of before can fit it
                return self._install(state, None, published)

    @version_id_too
    def update_local(
        self,
        state: "nn.Module | Tensors",
        *,
        version: str | int | None = None,
        layout: Layout = "head",
    ) -> Manifest:
        """Serve another head of the client on the same weights, or another local model; seen whole
        or not at all, as :meth:`update_global`.

        Args:
            state: The head, ``{"head.weight": [C, F], "head.bias": [C]}``. Or a whole model of the
                client's own: a module, or a state dict of the local model's (before there is one,
                of the global model's) architecture.
            version: The version of this device on whose body it was trained; the current one when
                not given. A head of another body is kept, but it never answers: ``head`` is
                "stale".
            layout: See :class:`HeadSet`.

        Raises:
            NotFoundError: There is no global model yet.
            InvalidModelError: The head is of the wrong shape.
        """
        with self._updating:
            if not isinstance(state, Mapping) or not all(
                name.startswith("head.") for name in state
            ):
                before = current(self.registry, self.local_model) or current(
                    self.registry, self.model
                )
                return self._install(state, None, _as_before(before, state), model=self.local_model)
            artifact = self.registry.read(self.model, self.registry.resolve(self.model))
            now = artifact.manifest
            trained = self.registry.manifest(self.model, self.registry.resolve(self.model, version))
            digest = trained_on(layout, trained.digests)
            heads = HeadSet.from_states({self.client: state}, layout, digest)
            # a new head makes the body no younger, not even after a restart
            lineage = now.lineage or Lineage()
            extra = {**lineage.extra, UPDATED_AT: _updated_at(now)}
            lineage = msgspec.structs.replace(lineage, extra=extra)
            published = _as_before(now) | {
                "metrics": now.metrics,
                "note": now.note,
                "lineage": lineage,
            }
            return self._install(artifact.arrays, heads, published, body=now)

    def forget(self, client: str) -> None:
        """:meth:`Registry.forget` on this device, of whose heads it may have none. Its global and
        local models stay, but for versions that cannot be read: they answer nobody, and may hold
        its head."""
        with self._updating:  # an update carries the head of before along
            for folder in self.registry.unreadable():
                storage.remove(f"{self.registry.root}/models/{folder}")
            # of its head, nothing is here (any more)
            with contextlib.suppress(NotFoundError, CorruptArtifactError):
                self.registry.forget(client)
            self.refresh()

    def confirm(self) -> None:
        """The cloud has just said that nothing newer exists: the model's age counts from now.

        It is not written down: after a restart, ages count from the updates again.
        """
        now = current(self.registry, self.model)
        if now is not None:
            self._keep_age((self.model, str(now.version)), now.round)

    def _install(
        self,
        state: "nn.Module | Tensors",
        heads: HeadSet | None,
        published: Mapping[str, Any],
        *,
        body: Manifest | None = None,
        model: str | None = None,
    ) -> Manifest:
        name = model or self.model
        manifest = self.registry.publish(
            name, state, heads=heads, engine=self.config.engine, **published
        )
        key = (name, str(manifest.version))
        if body is None:
            self._keep_age(key, manifest.round)
        else:  # as old as the version that has the same body
            self._ages[key] = self._age_of((name, str(body.version)))
        if name not in self._sources:
            self.serve(self.registry, name)
        self._preload(key)  # whatever does not answer raises here: no alias leads to it
        self.registry.set_alias(
            name, "default", manifest.version, who="edge", why=f"update to version {key[1]}"
        )
        self.refresh()
        return manifest

    def _build(self, key: Key) -> InferenceEngine:
        engine = super()._build(key)
        # a head's time runs out by the clock that tells the model's age
        if engine.personal is not None:
            engine.personal.store.wall = self._wall
        return engine

    # What operators see

    def get_all_stats(self) -> dict[str, Any]:
        """As :meth:`ModelServer.get_all_stats`; ``edge`` says what is served: version, round,
        age."""
        served = None
        version = self._router.routes.of(self.model).aliases.get("default")
        if version is not None and not self._closed:
            number, age = self._age_of((self.model, version))
            served = {"model_version": version, "round": number, "age_s": age.age_s()}
        return super().get_all_stats() | {"edge": served}

    def close(self, drain_s: float = 5.0) -> None:
        """As :meth:`ModelServer.close`; a temporary registry goes too. Idempotent."""
        super().close(drain_s)
        if self._remove_registry is not None:
            self.registry.close()
            self._remove_registry()


def _check_limits(fresh_s: float | None, refuse_s: float | None) -> None:
    for name, limit in (("fresh_s", fresh_s), ("refuse_s", refuse_s)):
        if limit is not None and (type(limit) not in (int, float) or not 0 < limit < inf):
            raise ConfigError(
                f"{name} is {limit!r}: it must be a number of seconds above 0, or None"
            )
    if fresh_s is not None and refuse_s is not None and fresh_s > refuse_s:
        raise ConfigError(
            f"fresh_s is {fresh_s}, refuse_s is {refuse_s}: flag an answer before refusing it"
        )


def device_request(
    features: Any, use_personalized: bool, version: str | int | None, **options: Any
) -> Request:
    """The arguments of :meth:`EdgeModelServer.predict` as a request. Raises InvalidInputError."""
    if not isinstance(use_personalized, bool):
        raise InvalidInputError(
            f"use_personalized is {use_personalized!r:.64}: True or False; version has a name"
        )
    return Request(features, version, personal=use_personalized, **options)


def current(registry: Registry, model: str) -> Manifest | None:
    """What the alias ``default`` leads to now, also where another process moved it; None where that
    is broken."""
    number = registry.aliases(model).get("default")
    if number is None:
        return None
    with contextlib.suppress(CorruptArtifactError):
        return registry.manifest(model, number)
    return None


def _as_before(now: Manifest | None, state: "nn.Module | Tensors | None" = None) -> dict[str, Any]:
    """What a version is published with where nothing else is said: what the one before it was."""
    if now is None:
        return {}
    before: dict[str, Any] = {
        "preprocessing": now.preprocessing,
        "output_type": now.signature.output_type,
    }
    if state is None or isinstance(state, Mapping):
        before |= {"architecture": now.architecture, "parameters": now.parameters}
    return before


def _updated_at(manifest: Manifest) -> float:
    """When the weights of a version came to the device, Unix seconds."""
    noted_s = manifest.extra.get(UPDATED_AT)
    return (
        noted_s
        if isinstance(noted_s, float)
        else datetime.fromisoformat(manifest.created_at).timestamp()
    )
