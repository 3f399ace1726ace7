"""Experiments under way: who gets which arm, what is learned of it, and when a canary is promoted or rolled back.

The configuration lives in the registry (``split.py``), rewards and failures of all processes in the store beside it
(``feedback.py``): every process follows both, and a canary's end is one transaction, whichever process sees it first.
"""

import contextlib
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

from numpy.typing import NDArray

from flserving import sequential
from flserving.bandit import Thompson
from flserving.engine import Prediction
from flserving.errors import ConflictError, CorruptArtifactError, ForbiddenError, NotFoundError
from flserving.feedback import FeedbackStore
from flserving.personalization import ids_of
from flserving.routing import Key, Router
from flserving.sequential import Rewards
from flserving.shadow import Shadow
from flserving.split import Crossroads, Policy
from flserving.transforms import Floats

CALLER: ContextVar[str | None] = ContextVar("flserving-caller", default=None)
"""The client of a request's credential, where it did not ask for private answers: it still decides the arm."""
OF_THE_MODEL = ("ModelExecution", "CorruptArtifact", "ModelTooLarge", "Internal")
JUDGE_S = 1.0


class Chosen(NamedTuple):
    """What was decided for one request, by one configuration."""

    road: Crossroads
    arm: str | None
    who: str  # whose arm it is
    asked: str | Sequence[str] | None  # whose personal answers were asked for


class Verdict(NamedTuple):
    decision: Literal["wait", "promote", "rollback"]
    why: str


def judge(
    policy: Policy, control: Rewards, canary: Rewards, requests: int = 0, failed: int = 0, age_s: float = 0.0
) -> Verdict:
    """What the evidence says of a canary. May be asked after every reward.

    It is rolled back once it is shown that its requests fail more often than ``max_failures``, that a client of it is
    ``worst_margin`` below the control's worst one (each with ``alpha / 4``, the clients sharing theirs), or that it
    loses anything in the mean (``alpha / 2``); and when the stated sample is used up without a proof that it loses less
    than ``effect``. It is promoted once there is that proof (``alpha / 2``) and its worst client is not below.

    Args:
        requests, failed: Of the canary: answered or failed in the model, and failed in the model; without the failures
            of the client that has the most, whose input may be to blame: nobody decides alone.
        age_s: Since the canary began; after the policy's ``most_s`` it is rolled back rather than waited for.
    """
    verdict = _judge(policy, control, canary, requests, failed)
    if verdict.decision == "wait" and age_s > policy.most_s:
        return Verdict("rollback", f"no verdict within {policy.most_s:g} s: {verdict.why}")
    return verdict


def _judge(policy: Policy, control: Rewards, canary: Rewards, requests: int, failed: int) -> Verdict:
    if sequential.exceeds(requests, failed, policy.max_failures, policy.alpha / 4):
        return Verdict("rollback", f"{failed} of {requests} requests failed in the model")
    lowest = min(_means(policy, control).values(), default=0.0)
    floor, means = lowest - policy.worst_margin, _means(policy, canary)
    for client in means if floor > 0 else ():
        n, total = canary[client]
        if sequential.exceeds(n, n - total, 1 - floor, policy.alpha / 4 / len(canary)):
            return Verdict("rollback", f"client {client!r} gets {total / n:.3f}, the control's worst {lowest:.3f}")
    if min(len(control), len(canary)) < policy.min_clients:
        return Verdict("wait", f"{len(canary)} and {len(control)} clients gave rewards: {policy.min_clients} decide")
    (old, old_variance), (new, new_variance) = sequential.mean_of(control), sequential.mean_of(canary)
    variance, gain = old_variance + new_variance, new - old
    half = sequential.half_width(variance, policy.alpha, policy.effect)
    said = f"mean reward {new:.4f} against {old:.4f}: {gain:+.4f} +- {half:.4f}"
    if gain + half < 0:
        return Verdict("rollback", said)
    worst = min(means.values(), default=1.0)
    if gain - half > -policy.effect and worst >= floor:
        return Verdict("promote", said)
    if 1 / variance >= sequential.information(policy.effect, policy.alpha, policy.power):
        return Verdict("rollback", f"{said}, the worst client {worst:.3f}: no proof within the stated sample")
    return Verdict("wait", said)


def _means(policy: Policy, rewards: Rewards) -> dict[str, float]:
    return {client: total / n for client, (n, total) in rewards.items() if n >= policy.client_rewards}


class Experiments:
    """What one server does with the experiments that its routes name.

    Args:
        lease: Pins a version: ``(version, model)``. ``personal``: where a client's rows run on an engine.
        busy: Whether callers wait.
    """

    def __init__(
        self, router: Router, lease: Callable[..., AbstractContextManager[Any]], personal: Callable[..., Any],
        busy: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._router, self._lease, self._personal = router, lease, personal
        self.shadow = Shadow(self._shadowed, busy)
        self._lock, self._judged_s = threading.Lock(), 0.0
        self._stores: dict[str, FeedbackStore] = {}  # by the registry's folder
        self._bandits: dict[str, Thompson] = {}  # by run, as the next one
        self._seen: dict[str, Counter[tuple[str, str | None]]] = {}  # by run: arm and who got an error, not stored yet
        router.on_look = self.look

    # The way of a request

    def choose(self, road: Crossroads, client: str | Sequence[str] | None) -> tuple[Key, Chosen]:
        """Which version answers ``client`` (None: who the credential names), by the configuration of ``road``."""
        who, experiment = CALLER.get() if client is None else client, road.experiment
        if not isinstance(who, str) or not experiment.arms:  # no client, or several in one request
            return road, Chosen(road, None, "", client)
        self._store(self._registry(road[0]))  # what can fail fails before the answer is made
        arm = experiment.arm_of(who) if experiment.rule == "sticky" else self._bandit(road).choose()
        return (road[0], str(experiment.arms[arm].version)), Chosen(road, arm, who, client)

    def answered(self, chosen: Chosen, version: str, rows: Floats, prediction: Prediction) -> dict[str, str]:
        """What the answer says of it: ``arm`` and ``receipt``. Sends a copy to the shadow."""
        (model, _), experiment = chosen.road, chosen.road.experiment
        if (shadow := experiment.shadow) is not None and str(shadow) != version:
            self.shadow.offer((model, str(shadow)), rows, chosen.asked, prediction.arrays()["predictions"])
        if chosen.arm is None:
            return {}
        self._see(chosen, None)
        receipt = self._store(self._registry(model)).receipt(experiment.run, chosen.arm, chosen.who)
        return {"arm": chosen.arm, "receipt": receipt}

    def failed(self, chosen: Chosen, reason: str) -> None:
        """The request got an error: it counts against its arm where the model is to blame."""
        if reason in OF_THE_MODEL:
            self._see(chosen, chosen.who)

    def _see(self, chosen: Chosen, failed: str | None) -> None:
        if chosen.arm is not None:
            with self._lock:
                self._seen.setdefault(chosen.road.experiment.run, Counter())[chosen.arm, failed] += 1

    def feedback(self, model: str, receipt: str, reward: float | None, client: str | None) -> None:
        """Count the reward in [0, 1] that ``client`` gives the answer whose receipt this is.

        Raises:
            ForbiddenError: No client, a forged receipt, somebody else's, or this client has given too many.
            ConflictError: Given already, too late, or the experiment is over. InvalidInputError: No such reward.
            NotFoundError: No such model. Nothing has changed then.
        """
        if not client:
            raise ForbiddenError("feedback needs a client: ask for a credential that names you")
        self._router.known(model)
        registry = self._registry(model)
        said = self._store(registry).read(receipt, client)
        if all(running.run != said.run for running in registry.experiments(model).values()):
            raise ConflictError("the experiment of this answer is over: its feedback decides nothing any more")
        self._store(registry).add(said, reward)

    # What is learned

    def look(self) -> None:
        """Called by the watcher: let bandits learn, and canaries be promoted or rolled back."""
        running = self._router.routes.experiments
        runs = {experiment.run for experiment in running.values()}
        with self._lock:
            for kept in (self._bandits, self._seen):
                for run in kept.keys() - runs:
                    del kept[run]
        judges = time.monotonic() - self._judged_s >= JUDGE_S
        self._judged_s = time.monotonic() if judges else self._judged_s
        problems, of = self._router.problems, {key: f"{'/'.join(key)} verdict" for key in running}
        for over in [it for it in list(problems) if it.endswith(" verdict") and it not in of.values()]:
            problems.pop(over, None)
        for (model, alias), experiment in running.items():
            if experiment.rule != "bandit" and not judges:
                continue
            try:
                if experiment.rule == "bandit":
                    self._bandit(Crossroads.at((model, ""), alias, experiment), learn=True)
                elif experiment.policy is not None:
                    self.decide(model, alias)
                elif experiment.arms:
                    self._outcomes(self._registry(model), experiment.run)
                problems.pop(of[model, alias], None)
            except Exception as error:  # the watch goes on
                problems[of[model, alias]] = f"{type(error).__name__}: {error}"

    def decide(self, model: str, alias: str = "default") -> Verdict:
        """Judge the canary on an alias now, and promote it or roll it back. NotFoundError: None runs there."""
        routes = self._router.routes
        experiment = routes.experiments.get((model, alias))
        if experiment is None or (policy := experiment.policy) is None:
            raise NotFoundError(f"alias {alias!r} of {model[:80]!r} has no canary with a policy: start one")
        registry, control = self._registry(model), routes.of(model).aliases[alias]
        roles = {str(arm.version) == control: (name, arm.version) for name, arm in experiment.arms.items()}
        (old, _), (new, version) = roles[True], roles[False]
        rewards = self._store(registry).rewards(experiment.run)
        requests, failed, alone = self._outcomes(registry, experiment.run).get(new, (0, 0, 0))
        age_s = registry.experiment_age_s(model, alias)
        verdict = judge(policy, rewards.get(old, {}), rewards.get(new, {}), requests - alone, failed - alone, age_s)
        end = functools.partial(registry.conclude_experiment, model, alias, who=experiment.id, run=experiment.run)
        with contextlib.suppress(ConflictError, NotFoundError):  # another process was first
            if verdict.decision == "promote":
                try:
                    end(version, why=f"promote: {verdict.why}")
                except CorruptArtifactError as error:  # it answers from memory, and nowhere else any more
                    verdict = Verdict("rollback", f"{verdict.why}, but {error}")
            if verdict.decision == "rollback":
                end(why=f"rollback: {verdict.why}")
        return verdict

    def report(self, model: str, alias: str = "default") -> dict[str, Any]:
        """The running experiment on an alias: ``id``, ``arms`` (each with its version, weight, answers, failures of the
        model, rewards, mean, clients, worst client), ``shadow`` (its copies here). Empty where there is none."""
        if (experiment := self._router.routes.experiments.get((model, alias))) is None:
            return {}
        registry, arms = self._registry(model), {}
        outcomes, rewards = self._outcomes(registry, experiment.run), self._store(registry).rewards(experiment.run)
        for name, arm in experiment.arms.items():
            given = rewards.get(name, {})
            requests, failed, _ = outcomes.get(name, (0, 0, 0))
            count, total = (sum(column) for column in zip(*given.values(), strict=True)) if given else (0, 0.0)
            arms[name] = {
                "version": arm.version, "weight": arm.weight, "clients": len(given), "rewards": count,
                "answers": requests - failed, "failed": failed,
                "mean": total / count if count else None,
                "worst": min((got / n for n, got in given.values()), default=None),
            }  # fmt: skip
        shadow = None if experiment.shadow is None else self.shadow.stats((model, str(experiment.shadow)))
        return {"id": experiment.id, "arms": arms, "shadow": shadow}

    def close(self) -> None:
        """Idempotent."""
        self.shadow.close()
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

    def _bandit(self, road: Crossroads, learn: bool = False) -> Thompson:
        """With ``learn`` it follows the rewards, and the failures of the models, which are rewards of 0."""
        experiment, bandit = road.experiment, self._bandits.get(road.experiment.run)
        if bandit is None or learn:
            registry = self._registry(road[0])
            sums, outcomes = self._store(registry).sums(experiment.run), self._outcomes(registry, experiment.run)
            with self._lock:
                bandit = self._bandits.setdefault(experiment.run, Thompson(experiment.arms))
            known = {}
            for name in experiment.arms:
                n, total = sums.get(name, (0, 0.0))
                known[name] = n + outcomes.get(name, (0, 0, 0))[1], total
            bandit.learn(known)
        return bandit

    def _shadowed(self, key: Key, rows: Floats, client: str | Sequence[str] | None) -> NDArray[Any]:
        with self._lease(key[1], key[0]) as engine:
            checked, lane, slots = engine.preprocessor.validate(rows), engine, None
            if client is not None:
                lane, slots, _ = self._personal(engine, ids_of(client, len(rows)), len(rows))
            (prediction,) = lane.execute([checked if slots is None else (checked, slots)])
            predictions: NDArray[Any] = prediction.arrays()["predictions"]
            return predictions

    def _registry(self, model: str) -> Any:
        if (registry := self._router.followed(model)) is None:
            raise ConflictError(f"model {model[:80]!r} comes from no registry: it can be in no experiment")
        return registry

    def _store(self, registry: Any) -> FeedbackStore:
        if (store := self._stores.get(registry.root)) is None:
            with self._lock:
                if (store := self._stores.get(registry.root)) is None:
                    store = self._stores[registry.root] = FeedbackStore(registry.root)
        return store
