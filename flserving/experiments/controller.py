"""Experiments under way: who gets which arm, what is learned of it, and when a canary is promoted
or rolled back.

The configuration lives in the registry, rewards and failures of all processes in the store beside
it (``feedback.py``): every process follows both, and a canary's end is one transaction, whichever
process sees it first.
"""

import asyncio
import contextlib
import functools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from flserving import forks
from flserving.errors import (
    ConflictError,
    CorruptArtifactError,
    FlservingError,
    ForbiddenError,
    NotFoundError,
    OverloadedError,
)
from flserving.experiments.bandit import Thompson
from flserving.experiments.bookkeeping import Clerk
from flserving.experiments.canary import Verdict, judge
from flserving.experiments.feedback import FeedbackStore
from flserving.experiments.shadow import Key, Shadow
from flserving.models.processing import Floats, ids_of
from flserving.registry.experiment import Experiment, TrafficSplit

OF_THE_MODEL = ("ModelExecution", "CorruptArtifact", "ModelTooLarge", "Internal")
JUDGE_S = 1.0
FEEDBACK_S = 3.0  # longest wait for a reward to be counted
# arms and failing clients of a run that are counted while the store cannot take them
MOST_SEEN = 10_000


class Followed(Protocol):
    """What is needed of the server's router: its routes, and a word when they change."""

    problems: dict[str, str]
    on_look: Callable[[], object]
    on_experiments: Callable[[Any], object]

    @property
    def routes(self) -> Any: ...
    def followed(self, name: str) -> Any: ...
    def known(self, name: str) -> object: ...


class Chosen(NamedTuple):
    """What was decided for one request, by one configuration."""

    split: TrafficSplit
    arm: str | None
    who: str  # whose arm it is
    asked: str | Sequence[str] | None  # whose personal answers were asked for


class Experiments:
    """What one server does with the experiments that its routes name.

    An answer needs memory alone: the arm is computed, what a bandit knows was learned before, and a
    receipt needs a key that was read when the routes were. What may block is done by a clerk, one
    for each registry: counting, learning, judging, taking feedback. While a store cannot be used,
    answers carry no receipt, and ``problems`` says why.

    Args:
        lease: Pins a version: ``(version, model)``. ``personal``: where a client's rows run on an
            engine.
        busy: Whether callers wait.

    Attributes:
        arm_of: The rule ``sticky``: ``(experiment, client)`` -> arm. Every server must be given the
            same one.
        bandit: The rule ``bandit``: makes, of the arms' names, what has the methods ``learn`` and
            ``choose`` of :class:`Thompson`. Set both before the first request.
    """

    def __init__(
        self,
        router: Followed,
        lease: Callable[..., AbstractContextManager[Any]],
        personal: Callable[..., Any],
        busy: Callable[[], bool],
    ) -> None:
        self._router = router
        self._lease = lease
        self._personal = personal
        self.shadow = Shadow(self._shadowed, busy)
        self.arm_of = Experiment.arm_of
        self.bandit: Callable[..., Any] = Thompson
        # of what an answer touches: held for a dictionary's change, never for a disk's
        self._lock = threading.Lock()
        forks.fresh_locks_in_child(self, "_lock")
        self._stores: dict[str, FeedbackStore] = {}  # by the registry's folder
        self._clerks: dict[str, Clerk] = {}  # by the registry's folder
        # by the registry's folder, when its experiments were judged last
        self._judged_s: dict[str, float] = {}
        self._bandits: dict[str, Any] = {}  # by run, as the next one
        # by run: arm and who got an error, not stored yet
        self._seen: dict[str, Counter[tuple[str, str | None]]] = {}
        # by run: what was not counted, because too much waited to be
        self._dropped: Counter[str] = Counter()
        router.on_look = self.wake
        router.on_experiments = self.prepare

    # Called by requests: nothing here may block

    def choose(
        self, split: TrafficSplit, client: str | Sequence[str] | None, identity: str | None
    ) -> tuple[Key, Chosen]:
        """Which version answers ``client`` (None: the credential's ``identity``), by the
        configuration of ``split``."""
        who = identity if client is None else client
        experiment = split.experiment
        if not isinstance(who, str) or not experiment.arms:  # no client, or several in one request
            return split, Chosen(split, None, "", client)
        arm = (
            self.arm_of(experiment, who)
            if experiment.rule == "sticky"
            else self._bandit(experiment).choose()
        )
        version = str(experiment.arms[arm].version)
        return (split[0], version), Chosen(split, arm, who, client)

    def answered(
        self, chosen: Chosen, version: str, rows: Floats, prediction: Any
    ) -> dict[str, str]:
        """What the answer says of it: ``arm`` and, unless feedback cannot be taken now,
        ``receipt``. Sends a copy to the shadow."""
        model, _ = chosen.split
        experiment = chosen.split.experiment
        shadow = experiment.shadow
        if shadow is not None and str(shadow) != version:
            self.shadow.offer(
                (model, str(shadow)), rows, chosen.asked, prediction.arrays()["predictions"]
            )
        if chosen.arm is None:
            return {}
        self._see(chosen, None)
        answer = {"arm": chosen.arm}
        registry = self._router.followed(model)
        if registry is not None:
            store = self._stores.get(registry.root)
            if store is not None and store.problem is None:
                answer["receipt"] = store.receipt(experiment.run, chosen.arm, chosen.who)
        return answer

    def failed(self, chosen: Chosen, reason: str) -> None:
        """The request got an error: it counts against its arm where the model is to blame."""
        if reason in OF_THE_MODEL:
            self._see(chosen, chosen.who)

    def _see(self, chosen: Chosen, failed: str | None) -> None:
        if chosen.arm is None:
            return
        run = chosen.split.experiment.run
        seen = (chosen.arm, failed)
        with self._lock:
            counts = self._seen.setdefault(run, Counter())
            if seen in counts or len(counts) < MOST_SEEN:
                counts[seen] += 1
            else:
                self._dropped[run] += 1

    # Feedback

    def feedback(self, model: str, receipt: str, reward: float | None, client: str | None) -> None:
        """Count the reward in [0, 1] that ``client`` gives the answer whose receipt this is.

        Raises:
            ForbiddenError: No client, a forged receipt, somebody else's, or this client has given
                too many.
            ConflictError: Given already, too late, or the experiment is over.
            InvalidInputError: No such reward.
            NotFoundError: No such model. Nothing has changed then.
            OverloadedError: Too much feedback waits, or the store keeps it waiting.
            CorruptArtifactError, FlservingError: The store cannot be used.
        """
        job = self._give(model, receipt, reward, client)
        try:
            job.result(FEEDBACK_S)
        except TimeoutError:
            job.cancel()
            raise _late() from None

    async def afeedback(
        self, model: str, receipt: str, reward: float | None, client: str | None
    ) -> None:
        """:meth:`feedback` for coroutines."""
        job = self._give(model, receipt, reward, client)
        try:
            await asyncio.wait_for(asyncio.wrap_future(job), FEEDBACK_S)
        except TimeoutError:
            raise _late() from None

    def _give(
        self, model: str, receipt: str, reward: float | None, client: str | None
    ) -> Future[None]:
        if not client:
            raise ForbiddenError("feedback needs a client: ask for a credential that names you")
        self._router.known(model)
        registry = self._registry(model)
        return self._clerk(registry).do(self._count, registry, model, receipt, reward, client)

    def pseudonym(self, model: str, client: str) -> str:
        """Under which name a client's rewards are kept, and told of in verdicts."""
        return self._store(self._registry(model)).pseudonym(client).hex()

    def _count(
        self, registry: Any, model: str, receipt: str, reward: float | None, client: str
    ) -> None:
        store = self._store(registry)
        read = store.read(receipt, client)
        running = registry.experiments(model).values()
        if all(experiment.run != read.run for experiment in running):
            raise ConflictError(
                "the experiment of this answer is over: its feedback decides nothing any more"
            )
        if read.at_s < registry.forgotten(client)[1]:
            raise ConflictError(
                "this client was forgotten after that answer: its receipt counts no more"
            )
        store.add(read, reward)

    # What is learned

    def prepare(self, registry: Any) -> None:
        """Called when routes with experiments of ``registry`` were read, before they are
        followed."""
        with contextlib.suppress(FlservingError):  # the look that follows says why
            self._store(registry)
        self._clerk(registry).routine(self._look_at, registry)

    def wake(self) -> None:
        """Called by the watcher: have the clerks look. Never waits."""
        for registry in self._running():
            self._clerk(registry).routine(self._look_at, registry)

    def look(self) -> None:
        """Let bandits learn, and canaries be promoted or rolled back: what the clerks do. Waits for
        the stores."""
        for registry in self._running():
            self._look_at(registry)

    def _running(self) -> list[Any]:
        """The registries with experiments; what is over is forgotten."""
        running = self._router.routes.experiments
        runs = {experiment.run for experiment in running.values()}
        with self._lock:
            for by_run in (self._bandits, self._seen, self._dropped):
                for run in by_run.keys() - runs:
                    del by_run[run]
        verdicts = {_verdict(*key) for key in running}
        for problem in list(self._router.problems):
            if problem.endswith(" verdict") and problem not in verdicts:
                self._router.problems.pop(problem, None)
        followed = {}
        for model, _ in running:
            registry = self._router.followed(model)
            if registry is not None:
                followed[id(registry)] = registry
        return list(followed.values())

    def _look_at(self, registry: Any) -> None:
        now_s = time.monotonic()
        judges = now_s - self._judged_s.get(registry.root, -math.inf) >= JUDGE_S
        if judges:
            self._judged_s[registry.root] = now_s
        for (model, alias), experiment in self._router.routes.experiments.items():
            learns = experiment.rule == "bandit"
            if self._router.followed(model) is not registry or not (learns or judges):
                continue
            try:
                if learns:
                    self._learn(registry, experiment)
                elif experiment.policy is not None:
                    self.decide(model, alias)
                elif experiment.arms:
                    self._outcomes(registry, experiment.run)
                self._router.problems.pop(_verdict(model, alias), None)
            except Exception as error:  # the next look comes
                self._router.problems[_verdict(model, alias)] = f"{type(error).__name__}: {error}"

    def decide(self, model: str, alias: str = "default") -> Verdict:
        """Judge the canary on an alias now, and promote it or roll it back. NotFoundError: None
        runs there."""
        routes = self._router.routes
        experiment = routes.experiments.get((model, alias))
        if experiment is None or experiment.policy is None:
            raise NotFoundError(
                f"alias {alias!r} of {model[:80]!r} has no canary with a policy: start one"
            )
        registry = self._registry(model)
        served = routes.of(model).aliases[alias]
        control = next(name for name, arm in experiment.arms.items() if str(arm.version) == served)
        canary = next(name for name in experiment.arms if name != control)
        rewards = self._store(registry).rewards(experiment.run)
        requests, failed, alone = self._outcomes(registry, experiment.run).get(canary, (0, 0, 0))
        verdict = judge(
            experiment.policy,
            rewards.get(control, {}),
            rewards.get(canary, {}),
            requests=requests - alone,
            failed=failed - alone,
            age_s=registry.experiment_age_s(model, alias),
        )
        end = functools.partial(
            registry.conclude_experiment, model, alias, who=experiment.id, run=experiment.run
        )
        with contextlib.suppress(ConflictError, NotFoundError):  # another process was first
            if verdict.decision == "promote":
                try:
                    end(experiment.arms[canary].version, why=f"promote: {verdict.why}")
                except (
                    CorruptArtifactError
                ) as error:  # it answers from memory, and nowhere else any more
                    verdict = Verdict("rollback", f"{verdict.why}, but {error}")
            if verdict.decision == "rollback":
                end(why=f"rollback: {verdict.why}")
        return verdict

    def report(self, model: str, alias: str = "default") -> dict[str, Any]:
        """The running experiment on an alias: ``id``, ``arms`` (each with its version, weight,
        answers, failures of the model, rewards, mean, clients, worst client), ``shadow`` (its
        copies here), ``dropped`` (what was not counted here, because the store could not take it).
        Empty where there is none."""
        experiment = self._router.routes.experiments.get((model, alias))
        if experiment is None:
            return {}
        registry = self._registry(model)
        outcomes = self._outcomes(registry, experiment.run)
        rewards = self._store(registry).rewards(experiment.run)
        arms = {}
        for name, arm in experiment.arms.items():
            given = rewards.get(name, {}).values()
            count = sum(n for n, _ in given)
            mean = None
            if count:
                mean = sum(total for _, total in given) / count
            requests, failed, _ = outcomes.get(name, (0, 0, 0))
            arms[name] = {
                "version": arm.version,
                "weight": arm.weight,
                "clients": len(given),
                "rewards": count,
                "answers": requests - failed,
                "failed": failed,
                "mean": mean,
                "worst": min((total / n for n, total in given), default=None),
            }
        shadow = None
        if experiment.shadow is not None:
            shadow = self.shadow.stats((model, str(experiment.shadow)))
        return {
            "id": experiment.id,
            "arms": arms,
            "shadow": shadow,
            "dropped": self._dropped[experiment.run],
        }

    def close(self) -> None:
        """Idempotent."""
        self.shadow.close()
        for clerk in list(self._clerks.values()):
            clerk.close()
        for store in self._stores.values():
            store.close()

    def _outcomes(self, registry: Any, run: str) -> Mapping[str, tuple[int, int, int]]:
        """:meth:`FeedbackStore.outcomes`, of all processes; what is new here is added first."""
        store = self._store(registry)
        with self._lock:
            seen = self._seen.pop(run, None)
        if seen:
            try:
                store.count(run, seen)
            except BaseException:  # nothing was added: it waits for the next look
                with self._lock:
                    self._seen.setdefault(run, Counter()).update(seen)
                raise
        return store.outcomes(run)

    def _bandit(self, experiment: Experiment) -> Any:
        """It knows nothing until the clerk has looked at the store."""
        bandit = self._bandits.get(experiment.run)
        if bandit is None:
            with self._lock:
                bandit = self._bandits.setdefault(experiment.run, self.bandit(experiment.arms))
        return bandit

    def _learn(self, registry: Any, experiment: Experiment) -> None:
        """Follow the rewards, and the failures of the models, which are rewards of 0."""
        sums = self._store(registry).sums(experiment.run)
        outcomes = self._outcomes(registry, experiment.run)
        known = {}
        for name in experiment.arms:
            n, total = sums.get(name, (0, 0.0))
            _, failed, _ = outcomes.get(name, (0, 0, 0))
            known[name] = (n + failed, total)
        self._bandit(experiment).learn(known)

    def _shadowed(self, key: Key, rows: Floats, client: str | Sequence[str] | None) -> NDArray[Any]:
        with self._lease(key[1], key[0]) as engine:
            payload = engine.preprocessor.validate(rows)
            if client is not None:
                who = ids_of(client, len(rows))
                engine, slots, _ = self._personal(engine, who, len(rows))
                if slots is not None:
                    payload = (payload, slots)
            (prediction,) = engine.execute([payload])
            predictions: NDArray[Any] = prediction.arrays()["predictions"]
            return predictions

    def _registry(self, model: str) -> Any:
        registry = self._router.followed(model)
        if registry is None:
            raise ConflictError(
                f"model {model[:80]!r} comes from no registry: it can be in no experiment"
            )
        return registry

    def _store(self, registry: Any) -> FeedbackStore:
        """Reads the key at the first call. Raises as :func:`storage.kept_secret`."""
        store = self._stores.get(registry.root)
        if store is None:
            store = self._stores.setdefault(registry.root, FeedbackStore(registry.root))
        return store

    def _clerk(self, registry: Any) -> Clerk:
        return self._clerks.get(registry.root) or self._clerks.setdefault(registry.root, Clerk())


def _verdict(model: str, alias: str) -> str:
    """The name of a problem."""
    return f"{model}/{alias} verdict"


def _late() -> OverloadedError:
    return OverloadedError(f"the feedback was not counted within {FEEDBACK_S:g} s: try again later")
