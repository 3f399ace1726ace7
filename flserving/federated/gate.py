"""The gate: what a version must show before an alias moves to it, and a callback that lets a training promote itself.

It judges a version as it would be served, on held-out rows with known answers. It sees the mean that the server made of
a round and not the clients' updates: single updates that are no numbers were left out before (``aggregation.fault``).
It cannot see what these rows do not show: a backdoor answers them well until somebody shows it its trigger, and a small
poisoning hides in the tolerance. Many rounds judged on the same rows also wear these out: renew them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flserving.errors import ConfigError, ConflictError, ModelExecutionError, NotFoundError, NotSupportedError
from flserving.extras import of_extra
from flserving.federated.aggregation import State
from flserving.federated.data import Client, Features, Labels
from flserving.federated.rounds import Round, publish_rounds
from flserving.models.weights import first_non_finite
from flserving.registry import Registry
from flserving.registry.index import DEFAULT_ALIAS
from flserving.registry.manifest import Manifest
from flserving.serving.config import ServingConfig
from flserving.serving.engine import Prediction
from flserving.serving.loader import RegistrySource, load_engine

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CHECKS", "Check", "Gate", "Verdict", "gated", "golden_rows"]

CHECKS = ("finite", "form", "clients", "norm", "accuracy", "worst client", "agreement", "golden")
_WINDOW = 10  # accepted updates that the next one is compared with
_CONFIG = ServingConfig(warmup_samples=0, max_batch_size=512)


@dataclass(frozen=True, slots=True)
class Check:
    """One row of a verdict: what was measured, against which limit (NaN: there is no number), and in words."""

    name: str
    passed: bool
    words: str
    value: float = math.nan
    limit: float = math.nan


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a version, compared with ``against``: the version the alias pointed at (None: nowhere)."""

    model: str
    version: int
    against: int | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that were not passed."""
        return tuple(check.name for check in self.checks if not check.passed)

    def __str__(self) -> str:
        reasons = "; ".join(f"{check.name}: {check.words}" for check in self.checks if check.passed == self.passed)
        outcome = "passed" if self.passed else "refused"
        return f"version {self.version} {outcome}: {reasons}"

    def to_frame(self) -> "pd.DataFrame":
        """One row a check: passed, value, limit, words."""
        with of_extra("course"):
            import pandas as pd

        rows = [(c.name, c.passed, c.value, c.limit, c.words) for c in self.checks]
        return pd.DataFrame(rows, columns=["check", "passed", "value", "limit", "words"]).set_index("check")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The checks, and their limits.

    Args:
        clients: Their test splits are the held-out rows. Whoever runs the gate needs them: from clients that give some
            away, or public ones. Known clients are answered by their own heads where the version has them.
        golden: Rows float32 [n, D] and the answers int64 [n] that any version must give: see :func:`golden_rows`.
        tolerance: The most that accuracy may drop on all held-out rows together. A version has to *show* that it
            stays within: the upper bound of its drop counts, of level ``alpha``, from the rows that only one of the
            two versions answers right. Source: Agresti and Min, Statistics in Medicine 24, 2005.
        client_tolerance: The most that it may drop for one client. A client's rows are few, so here the *drop* must
            show: it counts if McNemar's exact test rejects at ``alpha`` over the number of clients (Bonferroni).
        agreement: Least share of the held-out rows that both versions answer alike.
        jump: An update (weights minus those that serve now) may be this many times as long as the median of the last
            10 that were accepted. Bounded norms: Sun et al. 2019 (arXiv 1911.07963); the median of lengths as their
            measure, there among the clients of a round: FLAME, Nguyen et al. 2022 (arXiv 2101.02281). With fewer than
            three to compare with, the limit is the length of the weights that serve now.
        min_clients: Fewest accepted clients that its lineage must name; by default half of ``clients``, rounded up.

    Raises:
        ConfigError: A limit out of range, or no clients.
    """

    clients: Sequence[Client]
    golden: tuple[Features, Labels] | None = None
    tolerance: float = 0.02
    client_tolerance: float = 0.1
    agreement: float = 0.7
    jump: float = 2.0
    alpha: float = 0.05
    min_clients: int | None = None

    def __post_init__(self) -> None:
        if not self.clients or len({client.id for client in self.clients}) < len(self.clients):
            raise ConfigError(f"clients are {[c.id for c in self.clients][:5]}: give at least one, with unique ids")
        bounds = {"tolerance": 1.0, "client_tolerance": 1.0, "agreement": 1.0, "jump": 1e6, "alpha": 0.5}
        for name, most in bounds.items():
            value = getattr(self, name)
            low = 1e-9 if name == "alpha" else 0
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= most:
                raise ConfigError(f"{name} is {value!r}: use a number in [{low:g}, {most:g}]")
        if self.min_clients is not None and (type(self.min_clients) is not int or self.min_clients < 0):
            raise ConfigError(f"min_clients is {self.min_clients!r}: use an integer >= 0")
        if self.golden is not None and len(self.golden[0]) != len(self.golden[1]):
            raise ConfigError(f"golden has {len(self.golden[0])} rows and {len(self.golden[1])} answers: give as many")

    def check(self, registry: Registry, name: str, version: int, alias: str = DEFAULT_ALIAS) -> Verdict:
        """Judge a version against the one that ``alias`` points at; moves nothing.

        Where the alias points nowhere there is nothing to compare with: these checks pass, and say so.

        Raises:
            NotFoundError: No such version. CorruptArtifactError: Its bytes are not what was published.
            NotSupportedError: A regression. InvalidInputError: Held-out or golden rows of another width.

        Cost: loads both versions and answers the held-out rows with each; reads the last 11 accepted versions.
        """
        new, tensors = _read(registry, name, version)
        if new.signature.output_type != "classification":
            raise NotSupportedError(f"{name!r} is a regression: the gate compares right and wrong answers")
        try:
            against: int | None = registry.resolve(name, alias)
        except NotFoundError:
            against = None
        old, serving = _read(registry, name, against) if against is not None else (None, {})
        odd = first_non_finite(tensors)
        words = "weights and answers are finite" if odd is None else f"{odd} holds NaN or infinite values"
        checks = [Check("finite", odd is None, words), _form(new, old), self._enough(new)]
        if checks[0].passed and checks[1].passed:
            try:
                checks += self._judged(registry, name, version, alias, against, tensors, serving)
            except ModelExecutionError as error:
                checks[0] = Check("finite", False, str(error))
        words = f"not judged: {checks[0].words if not checks[0].passed else checks[1].words}"
        checks += [Check(kind, False, words) for kind in CHECKS[len(checks) :]]
        return Verdict(name, int(version), against, tuple(checks))

    def promote(
        self, registry: Registry, name: str, version: int, alias: str = DEFAULT_ALIAS, *, who: str = "gate"
    ) -> Verdict:
        """Check, and move the alias if the version passed; the verdict is in the log as the reason.

        Raises:
            ConflictError: The alias moved meanwhile, or is in an experiment. As :meth:`check`. Nothing has changed.
        """
        verdict = self.check(registry, name, version, alias)
        if verdict.passed:
            why = str(verdict)[:2000]
            registry.set_alias(name, alias, version, who=who, why=why, if_at=verdict.against or 0)
        return verdict

    def _enough(self, new: Manifest) -> Check:
        wanted = (len(self.clients) + 1) // 2 if self.min_clients is None else self.min_clients
        found = new.lineage.num_clients if new.lineage else None
        words = f"{'no number of' if found is None else found} clients in its lineage, at least {wanted} wanted"
        return Check("clients", (found or 0) >= wanted, words, math.nan if found is None else found, wanted)

    def _judged(
        self,
        registry: Registry,
        name: str,
        version: int,
        alias: str,
        against: int | None,
        tensors: State,
        serving: State,
    ) -> list[Check]:
        """All that needs answers, or a version to compare with."""
        right, given, golden = self._answers(registry, name, version)
        wrong = 0 if self.golden is None else int((golden != self.golden[1]).sum())
        words = "no golden rows were given" if self.golden is None else f"{wrong} of {len(golden)} answered differently"
        last = Check("golden", wrong == 0, words, wrong, 0)
        if against is None:
            words = f"no version to compare with (accuracy {np.concatenate(right).mean():.3f})"
            return [*(Check(kind, True, words) for kind in CHECKS[3:7]), last]
        before, alike, _ = self._answers(registry, name, against)
        same = float((np.concatenate(given) == np.concatenate(alike)).mean())
        words = f"{same:.3f} of the answers are those of version {against}"
        return [
            self._norm(registry, name, alias, tensors, serving),
            self._accuracy(np.concatenate(before), np.concatenate(right)),
            self._worst(before, right),
            Check("agreement", same >= self.agreement, words, same, self.agreement),
            last,
        ]

    def _answers(self, registry: Registry, name: str, version: int) -> tuple[list[Any], list[Any], NDArray[Any]]:
        """By client: which held-out rows it answers right, and what; and what it answers to the golden rows."""
        engine = load_engine(RegistrySource(registry, name), str(version), _CONFIG)
        rows = [engine.preprocessor.validate(client.test_x) for client in self.clients]
        if (personal := engine.personal) is None:
            found = engine.execute(rows)
        else:
            slots = [personal.choose(client.id, len(client.test_x))[0] for client in self.clients]
            found = personal.execute(list(zip(rows, slots, strict=True)))
        golden: Labels = np.empty(0, dtype=np.int64)
        if self.golden is not None:
            golden = _predictions(engine.execute([engine.preprocessor.validate(self.golden[0])])[0])
        given = [_predictions(prediction) for prediction in found]
        return [answer == c.test_y for answer, c in zip(given, self.clients, strict=True)], given, golden

    def _norm(self, registry: Registry, name: str, alias: str, tensors: State, serving: State) -> Check:
        value = _distance(tensors, serving)
        past = _accepted(registry, name, alias)
        limit = _distance(serving)
        words = "the length of the weights that serve now: no history yet"
        if len(past) >= 3:
            limit = self.jump * median(past)
            words = f"{self.jump:g} times the median of the last {len(past)} accepted"
        words = f"an update of {value:.3g}, at most {limit:.3g}: {words}"
        return Check("norm", value <= limit, words, value, limit)

    def _accuracy(self, before: NDArray[Any], now: NDArray[Any]) -> Check:
        lost, won, n = int((before & ~now).sum()), int((now & ~before).sum()), len(now) + 2  # 0.5 in each of 4 cells
        error = math.sqrt(lost + won + 1 - (lost - won) ** 2 / n) / n
        bound = (lost - won) / n + NormalDist().inv_cdf(1 - self.alpha) * error
        words = (
            f"{now.mean():.3f} after {before.mean():.3f}, {lost} rows lost, {won} won: a drop of at most {bound:.3f}"
        )
        return Check("accuracy", bound <= self.tolerance, words, bound, self.tolerance)

    def _worst(self, before: Sequence[NDArray[Any]], now: Sequence[NDArray[Any]]) -> Check:
        drop = 0.0
        who = ""
        for client, old, new in zip(self.clients, before, now, strict=True):
            lost = int((old & ~new).sum())
            won = int((new & ~old).sum())
            p = sum(math.comb(lost + won, k) for k in range(lost, lost + won + 1)) / 2 ** (lost + won)
            if p * len(self.clients) <= self.alpha and old.mean() - new.mean() > drop:
                drop = float(old.mean() - new.mean())
                who = f"; {client.id!r} lost {lost} of {len(new)} rows, won {won}"
        worst = f"{min(part.mean() for part in now):.3f} after {min(part.mean() for part in before):.3f}{who}"
        return Check("worst client", drop <= self.client_tolerance, worst, drop, self.client_tolerance)


def golden_rows(
    registry: Registry, name: str, clients: Sequence[Client], version: int | str = DEFAULT_ALIAS, per_class: int = 2
) -> tuple[Features, Labels]:
    """Rows that any sound version answers right: of each class those of which ``version`` is surest, and right.

    Keep them (``np.savez``): what is golden must not follow the versions that it is to judge.
    """
    engine = load_engine(RegistrySource(registry, name), str(registry.resolve(name, version)), _CONFIG)
    rows, labels = (np.concatenate([getattr(c, field) for c in clients]) for field in ("test_x", "test_y"))
    arrays = engine.execute([rows])[0].arrays()
    sure = np.where(arrays["predictions"] == labels, arrays["confidences"], -1.0)
    chosen = [i for k in np.unique(labels) for i in np.argsort(np.where(labels == k, -sure, 2.0))[:per_class]]
    kept = np.unique(np.array([i for i in chosen if sure[i] >= 0], dtype=np.int64))
    return rows[kept], labels[kept]


def gated(
    registry: Registry,
    name: str,
    gate: Gate,
    *,
    alias: str = DEFAULT_ALIAS,
    who: str = "gate",
    on_verdict: Callable[[Verdict], object] | None = None,
) -> Callable[[Round], Verdict]:
    """A callback for ``federated.train(on_round=...)``: publish every round, promote those that pass.

    A refused round stays published, and the training goes on from it: the gate protects those who are answered, not
    the training. An alias that cannot move now (an experiment runs) is a refusal by the check "alias".
    """
    publish = publish_rounds(registry, name)

    def judge(result: Round) -> Verdict:
        version = publish(result).version
        try:
            verdict = gate.promote(registry, name, version, alias, who=who)
        except ConflictError as error:
            verdict = gate.check(registry, name, version, alias)
            stuck = Check("alias", False, str(error))
            verdict = Verdict(name, version, verdict.against, (*verdict.checks, stuck))
        if on_verdict is not None:
            on_verdict(verdict)
        return verdict

    return judge


def _read(registry: Registry, name: str, version: int) -> tuple[Manifest, State]:
    artifact = registry.read(name, version)
    return artifact.manifest, artifact.tensors


def _predictions(prediction: Prediction) -> Labels:
    labels: Labels = prediction.arrays()["predictions"]
    return labels


def _form(new: Manifest, old: Manifest | None) -> Check:
    """Same architecture, shapes and preprocessing: what callers send goes on meaning the same."""
    fields = ("architecture", "parameters", "signature", "preprocessing")
    odd = [field for field in fields if old is not None and getattr(new, field) != getattr(old, field)]
    shape = f"{new.architecture}, {list(new.signature.input_shape)} to {list(new.signature.output_shape)}"
    return Check("form", not odd, f"not as before: {', '.join(odd)}" if odd else shape)


def _distance(a: State, b: State | None = None) -> float:
    """L2 norm of ``a - b`` over all floating-point tensors, in float64."""
    parts = [(v.double() if b is None else v.double() - b[k].double()) for k, v in a.items() if v.is_floating_point()]
    return math.sqrt(sum(float((part * part).sum()) for part in parts))


def _accepted(registry: Registry, name: str, alias: str) -> list[float]:
    """Lengths of the last updates that ``alias`` followed, without those that were rolled back, oldest first."""
    moves = registry.history(name, alias)
    moves = moves[(moves["action"] == "set") & moves["from"].notna()]
    moves = moves[~moves["to"].isin(registry.rolled_back(name, alias))]
    pairs = [(int(old), int(new)) for old, new in zip(moves["from"], moves["to"], strict=True)][-_WINDOW:]
    read = {version: _read(registry, name, version) for version in {version for pair in pairs for version in pair}}
    pairs = [(old, new) for old, new in pairs if _form(read[new][0], read[old][0]).passed]
    return [_distance(read[new][1], read[old][1]) for old, new in pairs]
