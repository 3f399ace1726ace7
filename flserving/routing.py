"""Which version answers whom: aliases to versions, swapped as one reference, followed from registries.

Readers take no lock: they read one immutable :class:`Routes`. A version takes over only after it has been loaded and
is warm (availability-preserving, as TensorFlow Serving calls it: Olston et al. 2017). Imports ``errors`` and ``split``.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from flserving.errors import ConflictError, DeadlineExceededError, ModelUnloadedError, NotFoundError
from flserving.split import Crossroads, Experiment

Key = tuple[str, str]
"""(model, version)."""


class Followed(Protocol):
    """What is asked of a registry."""

    @property
    def local_changes(self) -> int: ...
    def change_token(self) -> Hashable: ...
    def version_numbers(self, name: str) -> list[int]: ...
    def aliases(self, name: str) -> Mapping[str, int]: ...
    def experiments(self, name: str) -> Mapping[str, Experiment]: ...


@dataclass(frozen=True, slots=True)
class Routes:
    """One state of the table; never changed, only replaced."""

    versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # model -> its versions, oldest first
    targets: Mapping[tuple[str, str], Key] = field(default_factory=dict)  # (model, version or alias) -> key
    aliases: Mapping[tuple[str, str], str] = field(default_factory=dict)  # (model, alias) -> version
    experiments: Mapping[tuple[str, str], Experiment] = field(default_factory=dict)  # by (model, alias)
    model: str | None = None  # answers when the caller names none
    withdrawn: frozenset[str] = frozenset()  # models that an operator took out of service


class Router:
    """The table of routes and its changes. ``preload`` loads a version before a default route moves to it, and every
    version of an experiment before that begins. ``on_look`` is called whenever the registries were looked at.

    A version that cannot be loaded does not take over: what answered before goes on, ``problems`` says why, and the
    load is tried again now and then. A registry that cannot be read leaves its routes as they are.
    """

    WATCH_S = 0.25  # how soon changes by other processes are seen
    RETRY_LOOKS = 20  # a version that could not be loaded is tried again at every such look of the watcher

    def __init__(self, preload: Callable[[Key], object]) -> None:
        self.routes, self._preload = Routes(), preload
        self.problems: dict[str, str] = {}
        self.on_look: Callable[[], object] = tuple
        self._followed: dict[str, tuple[Followed, int, Hashable]] = {}  # its local_changes and token when last read
        self._admin = threading.RLock()  # one change at a time; readers never take it
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None

    # Readers

    def find(self, version: str | int | None, model: str | None) -> Key | None:
        """The key that a version id or an alias leads to (``default`` when None); None when :meth:`refresh`
        might know more."""
        routes = self.routes
        name = routes.model or "" if model is None else str(model)
        if (followed := self._followed.get(name)) is not None and followed[0].local_changes != followed[1]:
            return None  # this process moved an alias just now: do not wait for the watcher
        return routes.targets.get((name, "default" if version is None else str(version)))

    def require(self, version: str | int | None, model: str | None) -> Key:
        """:meth:`find`, or a NotFoundError that names what there is."""
        routes = self.routes
        if (name := routes.model if model is None else str(model)) is None:
            raise NotFoundError("no model is served: call load_model or serve first")
        ref = "default" if version is None else str(version)
        if (key := routes.targets.get((name, ref))) is not None:
            return key
        if name in routes.withdrawn:
            raise ModelUnloadedError(f"model {name!r} was unloaded: load it again")
        self.known(name)
        known = f"versions {', '.join(routes.versions[name][-10:]) or 'none'}"
        known += f", aliases {', '.join(self._aliases_of(name)) or 'none'}"
        why = f" ({self.problems[problem]})" if (problem := f"{name}/{ref}") in self.problems else ""
        raise NotFoundError(f"model {name!r} has no version or alias {ref[:80]!r}{why}: it has {known}")

    def followed(self, name: str) -> Followed | None:
        """The registry of a model; None for one without."""
        return self._followed[name][0] if name in self._followed else None

    # Changes

    def add(self, key: Key) -> None:
        """Make a version known; the first model becomes the one that answers who names none."""
        with self._admin:
            name, version = key
            known = self.routes.versions.get(name, ())
            if version not in known:
                self._replace(name, (*known, version))

    def set_alias(self, key: Key, alias: str = "default") -> None:
        """Load a version, then let ``alias`` lead to it.

        Raises:
            NotFoundError: No such version. ConflictError: The model's aliases belong to its registry. Whatever the
            load raises.
        """
        with self._admin:
            name, version = key
            if name in self._followed:
                raise ConflictError(
                    f"the aliases of {name!r} live in its registry: call registry.set_alias({name!r}, "
                    f"{alias!r}, {version!r}, ...)"
                )
            version = self.require(version, name)[1]
            self._preload((name, version))
            self._replace(name, aliases=self._aliases_of(name) | {alias: version})

    def withdraw(self, name: str) -> None:
        """Let no request reach ``name`` until :meth:`restore`. Raises NotFoundError."""
        with self._admin:
            self.known(name)
            self._replace(name, withdrawn=self.routes.withdrawn | {name})

    def restore(self, name: str) -> None:
        """Read the registry again, load the default version, then answer. Raises NotFoundError, or what the load
        raises: then ``name`` stays as it was."""
        with self._admin:
            self.known(name)
            self.refresh(retry=True)
            if (version := self.routes.aliases.get((name, "default"))) is not None:
                self._preload((name, version))
            self._replace(name, withdrawn=self.routes.withdrawn - {name})

    def follow(self, registry: Followed, name: str) -> None:
        """Serve every version of ``name`` and follow its aliases, also those that other processes move."""
        with self._admin:
            if name in self.routes.versions:
                raise ConflictError(f"model {name!r} is served already: use another server for another registry")
            if not registry.version_numbers(name):
                raise NotFoundError(f"the registry has no version of {name!r}: publish one first")
            changes, token = registry.local_changes, registry.change_token()
            self._read(name, registry)
            self._followed[name] = (registry, changes, token)
            if self._watcher is None:
                self._watcher = threading.Thread(
                    target=_watch, args=(weakref.ref(self), self._closing), name="flserving-watcher", daemon=True
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
            raise DeadlineExceededError("a change of routes took longer than timeout_ms: try again, or raise it")
        try:
            for name, (registry, _, seen) in list(self._followed.items()):
                unread = f"{name}/registry"
                try:
                    changes, token = registry.local_changes, registry.change_token()
                    if token != seen or (retry and self._troubled(name)):
                        self._read(name, registry)
                except Exception as error:  # one that cannot be read now must not stop the others, nor the watch
                    self.problems[unread] = f"{type(error).__name__}: {error}"
                else:
                    self.problems.pop(unread, None)
                    self._followed[name] = (registry, changes, token)
        finally:
            self._admin.release()

    def close(self) -> None:
        self._closing.set()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()

    def _read(self, name: str, registry: Followed) -> None:
        while True:  # an alias and its experiment change in one transaction: see both before it, or both after
            token = registry.change_token()
            versions = tuple(map(str, registry.version_numbers(name)))
            aliases = {alias: str(number) for alias, number in registry.aliases(name).items()}
            experiments = dict(registry.experiments(name))
            if token == registry.change_token():
                break
        before, problem = self._aliases_of(name), f"{name}/default"
        self._replace(name, versions)
        problems = ""
        if (wanted := aliases.get("default")) not in (None, before.get("default")):
            try:
                self._preload((name, str(wanted)))
            except Exception as error:
                problems = f"version {wanted} does not answer: {error}"
                del aliases["default"]
                aliases |= {alias: version for alias, version in before.items() if alias == "default"}
        for old in [old for old in self.problems if old.startswith(f"{name}/") and old.endswith(" experiment")]:
            del self.problems[old]
        for alias, experiment in list(experiments.items()):
            try:
                for number in experiment.versions:
                    self._preload((name, str(number)))
            except Exception as error:
                self.problems[f"{name}/{alias} experiment"] = f"{experiment.id} does not run: {error}"
                if (running := self.routes.experiments.get((name, alias))) is None:
                    del experiments[alias]
                else:
                    experiments[alias] = running
        self._replace(name, versions, aliases, experiments=experiments)
        if problems:
            self.problems[problem] = problems
        else:
            self.problems.pop(problem, None)

    def _aliases_of(self, name: str) -> dict[str, str]:
        return {alias: version for (model, alias), version in self.routes.aliases.items() if model == name}

    def _troubled(self, name: str) -> bool:
        return any(problem.startswith(f"{name}/") for problem in self.problems)

    def known(self, name: str) -> None:
        """Raise NotFoundError unless there is such a model."""
        if name not in self.routes.versions:
            raise NotFoundError(f"no model {name[:80]!r}: served are {', '.join(self.routes.versions) or 'none'}")

    def _replace(
        self, name: str, versions: tuple[str, ...] | None = None, aliases: Mapping[str, str] | None = None,
        withdrawn: frozenset[str] | None = None, experiments: Mapping[str, Experiment] | None = None,
    ) -> None:  # fmt: skip
        """Swap the reference: a reader sees the old table or the new one. What is not given stays."""
        old = self.routes
        versions = old.versions[name] if versions is None else versions
        aliases = self._aliases_of(name) if aliases is None else aliases
        withdrawn = old.withdrawn if withdrawn is None else withdrawn
        running = {alias: experiment for (model, alias), experiment in old.experiments.items() if model == name}
        running = running if experiments is None else dict(experiments)
        others = {key: version for key, version in old.aliases.items() if key[0] != name}
        targets = {key: target for key, target in old.targets.items() if key[0] != name}
        if name not in withdrawn:
            own = [*zip(versions, versions, strict=True), *aliases.items()]
            targets |= {(name, ref): (name, version) for ref, version in own}
            targets |= {
                (name, alias): Crossroads.at((name, aliases[alias]), alias, experiment)
                for alias, experiment in running.items()
                if alias in aliases
            }
        self.routes = replace(
            old, withdrawn=withdrawn, model=old.model or name, targets=targets,
            versions={**old.versions, name: versions},
            aliases=others | {(name, alias): version for alias, version in aliases.items()},
            experiments={key: experiment for key, experiment in old.experiments.items() if key[0] != name}
            | {(name, alias): experiment for alias, experiment in running.items()},
        )  # fmt: skip


def _watch(router: "weakref.ref[Router]", closing: threading.Event) -> None:
    """Poll the registries. Holds no reference between looks, so that a forgotten server can be collected."""
    for look in itertools.count(1):
        if closing.wait(Router.WATCH_S) or (alive := router()) is None:
            return
        alive.refresh(retry=look % Router.RETRY_LOOKS == 0)
        alive.on_look()
        del alive
