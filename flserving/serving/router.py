"""Which version answers whom: aliases to versions, swapped as one reference, followed from
registries.

Readers take no lock: they read one immutable :class:`Routes`. A version takes over only after it
has been loaded and is warm (availability-preserving, as TensorFlow Serving calls it: Olston et al.
2017).

Within one model a name means one thing: no version id equals an alias, and "default" is always the
alias.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from flserving import forks
from flserving.errors import ConflictError, DeadlineExceededError, ModelUnloadedError, NotFoundError
from flserving.registry.experiment import Experiment, TrafficSplit

if TYPE_CHECKING:
    from flserving.registry.index import Index

Key = tuple[str, str]
"""(model, version)."""
DEFAULT = "default"
"""The alias that answers who names no version."""
MOST_MODELS = 1000
"""Models that are followed without being named; each costs a place in the table and a look at every
change."""
_NEW_MODELS_PER_LOOK = 16  # others wait for a change of routes while these are loaded


@dataclass(frozen=True, slots=True)
class Served:
    """What is known of one model."""

    versions: tuple[str, ...] = ()  # oldest first
    aliases: Mapping[str, str] = field(default_factory=dict)  # alias -> version
    experiments: Mapping[str, Experiment] = field(default_factory=dict)  # by alias
    withdrawn: bool = False  # an operator took it out of service
    promoted: bool = False  # its alias "default" has led somewhere, though it may not have loaded

    def targets(self, name: str) -> dict[tuple[str, str], Key]:
        """Where each version id and alias leads."""
        if self.withdrawn:
            return {}
        targets: dict[tuple[str, str], Key] = {
            (name, version): (name, version) for version in self.versions
        }
        for alias, version in self.aliases.items():
            key = (name, version)
            experiment = self.experiments.get(alias)
            targets[name, alias] = (
                key if experiment is None else TrafficSplit.at(key, alias, experiment)
            )
        return targets


@dataclass(frozen=True, slots=True)
class Routes:
    """One state of the table; never changed, only replaced."""

    models: Mapping[str, Served] = field(default_factory=dict)
    # (model, version or alias) -> key
    targets: Mapping[tuple[str, str], Key] = field(default_factory=dict)
    # answers who names none: the first that was promoted, whatever the alphabet says
    model: str | None = None

    def of(self, name: str | None) -> Served:
        """What is known of a model; nothing of an unknown one."""
        return self.models.get(name or "", Served())

    @property
    def experiments(self) -> dict[tuple[str, str], Experiment]:
        """Those that run, by (model, alias)."""
        return {
            (name, alias): experiment
            for name, served in self.models.items()
            for alias, experiment in served.experiments.items()
        }


class Router:
    """The table of routes and its changes. ``preload`` loads a version before a default route moves
    to it, and every version of an experiment before that begins. ``on_look`` is called whenever the
    registries were looked at, ``on_experiments`` before routes with experiments of a registry are
    followed; neither may wait. ``on_read`` is called when a model's registry has changed, before
    its routes follow.

    A version that cannot be loaded does not take over: what answered before goes on, ``problems``
    says why, and the load is tried again now and then. A registry that cannot be read leaves its
    routes as they are.
    """

    WATCH_S = 0.25  # how soon changes by other processes are seen
    # a version that could not be loaded is tried again at every such look of the watcher
    RETRY_LOOKS = 20

    def __init__(self, preload: Callable[[Key], object]) -> None:
        self.routes = Routes()
        self._preload = preload
        self.problems: dict[str, str] = {}
        self.on_look: Callable[[], object] = tuple
        self.on_experiments: Callable[[Index], object] = id
        self.on_read: Callable[[str, Index], object] = lambda name, registry: None
        self._followed: dict[str, _Followed] = {}  # by model
        self._whole: list[_WholeRegistry] = []
        self._admin = threading.RLock()  # one change at a time; readers never take it
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        forks.in_child(self, Router._begin_anew)

    # Readers

    def find(self, version: str | int | None, model: str | None) -> Key | None:
        """The key that a version id or an alias leads to (``default`` when None); None when
        :meth:`refresh` might know more."""
        name = (self.routes.model or "") if model is None else str(model)
        # before the routes: those may be newer than this, never older
        followed = self._followed.get(name)
        if followed is not None and followed.registry.local_changes != followed.local_changes:
            return None  # this process moved an alias just now: do not wait for the watcher
        return self.routes.targets.get((name, DEFAULT if version is None else str(version)))

    def require(self, version: str | int | None, model: str | None) -> Key:
        """:meth:`find`, or a NotFoundError that names what there is."""
        routes = self.routes
        name = routes.model if model is None else str(model)
        if name is None:
            raise NotFoundError("no model is served: call load_model or serve first")
        ref = DEFAULT if version is None else str(version)
        key = routes.targets.get((name, ref))
        if key is not None:
            return key
        self.known(name)
        served = routes.of(name)
        if served.withdrawn:
            raise ModelUnloadedError(f"model {name!r} was unloaded: load it again")
        known = f"versions {', '.join(served.versions[-10:]) or 'none'}, aliases {', '.join(served.aliases) or 'none'}"
        problem = self.problems.get(f"{name}/{ref}")
        why = "" if problem is None else f" ({problem})"
        raise NotFoundError(
            f"model {name!r} has no version or alias {ref[:80]!r}{why}: it has {known}"
        )

    def followed(self, name: str) -> "Index | None":
        """The registry of a model; None for one without."""
        followed = self._followed.get(name)
        return None if followed is None else followed.registry

    # Changes

    def add(self, key: Key) -> None:
        """Make a version known. ConflictError: Its id is an alias of the model."""
        with self._admin:
            name, version = key
            known = self.routes.of(name)
            if version == DEFAULT or version in known.aliases:
                raise ConflictError(
                    f"{version!r} is an alias of {name!r}: give the version another id"
                )
            if version not in known.versions:
                self._replace(name, versions=(*known.versions, version))

    def set_alias(self, key: Key, alias: str = DEFAULT) -> None:
        """Load a version, then let ``alias`` lead to it.

        Raises:
            NotFoundError: No such version.
            ConflictError: The model's aliases belong to its registry, or ``alias`` is the id of a
                version. Whatever the load raises.
        """
        with self._admin:
            name, version = key
            if name in self._followed:
                raise ConflictError(
                    f"the aliases of {name!r} live in its registry: call registry.set_alias({name!r}, "
                    f"{alias!r}, {version!r}, ...)"
                )
            if alias in self.routes.of(name).versions:
                raise ConflictError(
                    f"{alias!r} is a version of {name!r}: give the alias another name"
                )
            version = self.require(version, name)[1]
            self._preload((name, version))
            known = self.routes.of(name)
            promoted = known.promoted or alias == DEFAULT
            self._replace(name, aliases={**known.aliases, alias: version}, promoted=promoted)

    def withdraw(self, name: str) -> None:
        """Let no request reach ``name`` until :meth:`restore`. Raises NotFoundError."""
        with self._admin:
            self.known(name)
            self._replace(name, withdrawn=True)

    def restore(self, name: str) -> None:
        """Read the registry again, load the default version, then answer. Raises NotFoundError, or
        what the load raises: then ``name`` stays as it was."""
        with self._admin:
            self.known(name)
            self.refresh(retry=True)
            version = self.routes.of(name).aliases.get(DEFAULT)
            if version is not None:
                self._preload((name, version))
            self._replace(name, withdrawn=False)

    def follow(self, registry: "Index", name: str) -> None:
        """Serve every version of ``name`` and follow its aliases, also those that other processes
        move."""
        with self._admin:
            if not registry.version_numbers(name):
                raise NotFoundError(f"the registry has no version of {name!r}: publish one first")
            followed = _Followed.now(registry)
            self._read(name, registry)
            self._followed[name] = followed
            self._start_watcher()

    def follow_all(self, registry: "Index", serve: Callable[[str], object]) -> None:
        """Let every model of ``registry`` be served, also those that are published later, up to
        ``MOST_MODELS``.

        ``serve`` is called with each new name: its part is to call :meth:`follow`.
        """
        with self._admin:
            whole = _WholeRegistry(registry, serve)
            for name in self._new_models(whole):
                serve(name)
            self._whole.append(whole)
            self._start_watcher()

    def _new_models(self, whole: "_WholeRegistry") -> list[str]:
        """Names that are not followed yet and have not failed, as many as there is room for."""
        names = whole.registry.models_by_promotion()
        new = [name for name in names if name not in self._followed and name not in whole.failed]
        room = max(0, MOST_MODELS - len(self._followed))
        if len(new) > room:
            self.problems[_WHOLE] = (
                f"{len(new) - room} models are not served, the most is {MOST_MODELS}: load them"
            )
        else:
            self.problems.pop(_WHOLE, None)
        return new[:room]

    def _look_for_models(self, whole: "_WholeRegistry", token: Hashable, retry: bool) -> None:
        if retry and whole.failed:
            whole.failed.clear()
            whole.seen = None
        if token == whole.seen:
            return
        new = self._new_models(whole)
        for name in new[:_NEW_MODELS_PER_LOOK]:
            try:
                whole.serve(name)
            except (
                Exception
            ) as error:  # one that cannot be served must not stop the others, nor the watch
                self.problems[f"{name}/registry"] = _described(error)
                whole.failed.add(name)
        if len(new) <= _NEW_MODELS_PER_LOOK:
            whole.seen = token

    def _start_watcher(self) -> None:
        if self._watcher is None:
            self._watcher = threading.Thread(
                target=_watch,
                args=(weakref.ref(self), self._closing),
                name="flserving-watcher",
                daemon=True,
            )
            self._watcher.start()

    def refresh(self, wait_s: float = -1, retry: bool = False) -> None:
        """Look at the registries now: new versions are known, aliases lead where they lead there.

        Args:
            wait_s: Longest wait for a change that is under way; without limit when negative.
            retry: Try again to load what could not be loaded.

        Raises:
            DeadlineExceededError: The change under way took longer than ``wait_s``.
        """
        if not self._admin.acquire(timeout=wait_s):
            raise DeadlineExceededError(
                "a change of routes took longer than timeout_ms: try again, or raise it"
            )
        try:
            state_of = cache(_Followed.now)  # one question for all models of a registry
            for whole in self._whole:
                try:
                    self._look_for_models(whole, state_of(whole.registry).token, retry)
                except Exception as error:
                    self.problems[_WHOLE] = _described(error)
            for name, followed in list(self._followed.items()):
                unread = f"{name}/registry"
                try:
                    state = state_of(followed.registry)
                    if state.token != followed.token or (retry and self._troubled(name)):
                        self._read(name, followed.registry)
                except (
                    Exception
                ) as error:  # one that cannot be read now must not stop the others, nor the watch
                    self.problems[unread] = _described(error)
                else:
                    self.problems.pop(unread, None)
                    self._followed[name] = state
        finally:
            self._admin.release()

    def _begin_anew(self) -> None:
        """In a forked child: the routes stay as they are, for registries are not to be carried over
        a fork."""
        self._admin = threading.RLock()
        self._closing = threading.Event()
        self._watcher = None
        if self._followed or self._whole:
            self.problems["registries"] = (
                "this server was made before a fork: it does not see new versions and aliases; make another one in the "
                "new process"
            )

    def close(self) -> None:
        self._closing.set()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()

    def _read(self, name: str, registry: "Index") -> None:
        # an alias and its experiment change in one transaction: see both before it, or both after
        while True:
            token = registry.change_token()
            versions = tuple(map(str, registry.version_numbers(name)))
            aliases = {alias: str(number) for alias, number in registry.aliases(name).items()}
            experiments = dict(registry.experiments(name))
            unread = registry.unread_experiments(name)
            if token == registry.change_token():
                break
        self.on_read(name, registry)
        before = self.routes.of(name)
        default = aliases.get(DEFAULT)
        self._replace(name, versions=versions, promoted=before.promoted or default is not None)
        fresh = [] if default is None or default == before.aliases.get(DEFAULT) else [default]
        if not self._loads(name, fresh, DEFAULT, f"version {default} does not answer"):
            del aliases[DEFAULT]
            if DEFAULT in before.aliases:
                aliases[DEFAULT] = before.aliases[DEFAULT]
        for old in [
            old
            for old in self.problems
            if old.startswith(f"{name}/") and old.endswith(" experiment")
        ]:
            del self.problems[old]
        for alias, why in unread.items():
            self.problems[f"{name}/{alias} experiment"] = (
                f"{alias!r} is in an experiment {why}: conclude it, or update"
            )
        for alias, experiment in list(experiments.items()):
            numbers = map(str, experiment.versions)
            if not self._loads(
                name, numbers, f"{alias} experiment", f"{experiment.id} does not run"
            ):
                del experiments[alias]
                if alias in before.experiments:
                    experiments[alias] = before.experiments[alias]
        if experiments:
            self.on_experiments(registry)
        self._replace(name, aliases=aliases, experiments=experiments)

    def _loads(self, name: str, versions: Iterable[str], what: str, consequence: str) -> bool:
        """Load versions; where one cannot be loaded, ``problems`` says why."""
        try:
            for version in versions:
                self._preload((name, version))
        except Exception as error:
            self.problems[f"{name}/{what}"] = f"{consequence}: {error}"
            return False
        self.problems.pop(f"{name}/{what}", None)
        return True

    def _troubled(self, name: str) -> bool:
        return any(problem.startswith(f"{name}/") for problem in self.problems)

    def known(self, name: str) -> None:
        """Raise NotFoundError unless there is such a model."""
        if name not in self.routes.models:
            raise NotFoundError(
                f"no model {name[:80]!r}: served are {', '.join(self.routes.models) or 'none'}"
            )

    def _replace(self, name: str, **changes: Any) -> None:
        """Change what is known of one model, by swapping the reference: readers see the old table
        or the new one."""
        old = self.routes
        served = replace(old.of(name), **changes)
        if name in old.models and served == old.of(name):
            return
        others = {key: target for key, target in old.targets.items() if key[0] != name}
        model = old.model or name
        if served.promoted and not old.of(model).promoted:
            model = name
        self.routes = Routes({**old.models, name: served}, others | served.targets(name), model)


@dataclass(frozen=True, slots=True)
class _Followed:
    """The registry of a model, and its state when it was read last."""

    registry: "Index"
    local_changes: int  # by this process
    token: Hashable  # changes with every change, by whatever process

    @classmethod
    def now(cls, registry: "Index") -> Self:
        """The state before a reading. The count comes first: a change between the two is looked at
        again."""
        local_changes = registry.local_changes
        return cls(registry, local_changes, registry.change_token())


@dataclass(slots=True, eq=False)
class _WholeRegistry:
    """A registry of which every model is followed."""

    registry: "Index"
    serve: Callable[[str], object]
    seen: Hashable = None  # its token when all its models were known
    failed: set[str] = field(default_factory=set)  # could not be served


_WHOLE = "registry"
"""The problem of a registry as a whole; those of its models begin with their names."""


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _watch(router: "weakref.ref[Router]", closing: threading.Event) -> None:
    """Poll the registries. Holds no reference between looks, so that a forgotten server can be
    collected."""
    for look in itertools.count(1):
        if closing.wait(Router.WATCH_S) or (alive := router()) is None:
            return
        alive.refresh(retry=look % Router.RETRY_LOOKS == 0)
        alive.on_look()
        del alive
