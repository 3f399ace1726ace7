"""The gate: what a version must show before an alias moves to it, and a callback that lets a
training promote itself.

It judges a version as it would be served, on held-out rows with known answers. It sees the mean
that the server made of a round and not the clients' updates: single updates that are no numbers
were left out before (``aggregation.fault``). It cannot see what these rows do not show: a backdoor
answers them well until somebody shows it its trigger, and a small poisoning hides in the tolerance.
Many rounds judged on the same rows also wear these out: renew them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import NormalDist, median
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flserving.errors import (
    ConfigError,
    ConflictError,
    ModelExecutionError,
    NotSupportedError,
    check_number,
)
from flserving.extras import need
from flserving.federated.aggregation import State
from flserving.federated.data import Client, Features, Labels, check_clients
from flserving.federated.rounds import Round, publish_rounds
from flserving.models.weights import first_non_finite
from flserving.registry import Registry
from flserving.registry.index import DEFAULT_ALIAS
from flserving.registry.manifest import Manifest
from flserving.registry.registry import Artifact
from flserving.serving.config import ServingConfig
from flserving.serving.loader import RegistrySource, load_engine

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CHECKS", "Check", "Gate", "Verdict", "gated", "golden_rows"]

CHECKS = ("finite", "form", "clients", "norm", "accuracy", "worst client", "agreement", "golden")
# these need a version to compare with
_COMPARED = ("norm", "accuracy", "worst client", "agreement")
_WINDOW = 10  # accepted updates that the next one is compared with
_CONFIG = ServingConfig(warmup_samples=0, max_batch_size=512)
_Right = NDArray[np.bool_]  # which rows are answered right


@dataclass(frozen=True, slots=True)
class Check:
    """One row of a verdict: what was measured, against which limit (NaN: there is no number), and
    in words."""

    name: str
    passed: bool
    words: str
    value: float = math.nan
    limit: float = math.nan


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a version, compared with ``against``: the version the alias pointed at
    (None: nowhere)."""

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
        reasons = "; ".join(
            f"{check.name}: {check.words}" for check in self.checks if check.passed == self.passed
        )
        outcome = "passed" if self.passed else "refused"
        return f"version {self.version} {outcome}: {reasons}"

    def to_frame(self) -> "pd.DataFrame":
        """One row a check: passed, value, limit, words."""
        frame: pd.DataFrame = need("pandas", "course").DataFrame(self.checks)
        return frame.rename(columns={"name": "check"}).set_index("check")[
            ["passed", "value", "limit", "words"]
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The checks, and their limits.

    Args:
        clients: Their test splits are the held-out rows. Whoever runs the gate needs them: from
            clients that give some away, or public ones. Known clients are answered by their own
            heads where the version has them.
        golden: Rows float32 [n, D] and the answers int64 [n] that any version must give: see
            :func:`golden_rows`.
        tolerance: The most that accuracy may drop on all held-out rows together. A version has to
            *show* that it stays within: the upper bound of its drop counts, of level ``alpha``,
            from the rows that only one of the two versions answers right. Source: Agresti and Min,
            Statistics in Medicine 24, 2005.
        client_tolerance: The most that it may drop for one client. A client's rows are few, so here
            the *drop* must show: it counts if McNemar's exact test rejects at ``alpha`` over the
            number of clients (Bonferroni).
        agreement: Least share of the held-out rows that both versions answer alike.
        jump: An update (weights minus those that serve now) may be this many times as long as the
            median of the last 10 that were accepted. Bounded norms: Sun et al. 2019 (arXiv
            1911.07963); the median of lengths as their measure, there among the clients of a round:
            FLAME, Nguyen et al. 2022 (arXiv 2101.02281). With fewer than three to compare with, the
            limit is the length of the weights that serve now.
        min_clients: Fewest accepted clients that its lineage must name; by default half of
            ``clients``, rounded up.

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
        check_clients(self.clients)
        check_number("tolerance", self.tolerance, 0, 1)
        check_number("client_tolerance", self.client_tolerance, 0, 1)
        check_number("agreement", self.agreement, 0, 1)
        check_number("jump", self.jump, 0, 1e6)
        check_number("alpha", self.alpha, 1e-9, 0.5)
        if self.min_clients is not None:
            check_number("min_clients", self.min_clients, 0, math.inf, whole=True)
        if self.golden is not None and len(self.golden[0]) != len(self.golden[1]):
            raise ConfigError(
                f"golden has {len(self.golden[0])} rows and {len(self.golden[1])} answers: give as many"
            )

    def check(
        self, registry: Registry, name: str, version: int, alias: str = DEFAULT_ALIAS
    ) -> Verdict:
        """Judge a version against the one that ``alias`` points at; moves nothing.

        Where the alias points nowhere there is nothing to compare with: these checks pass, and say
        so.

        Raises:
            NotFoundError: No such version.
            CorruptArtifactError: Its bytes are not what was published.
            NotSupportedError: A regression.
            InvalidInputError: Held-out or golden rows of another width.

        Cost: loads both versions and answers the held-out rows with each; reads the last 11
        accepted versions.
        """
        new = registry.read(name, version)
        if new.manifest.signature.output_type != "classification":
            raise NotSupportedError(
                f"{name!r} is a regression: the gate compares right and wrong answers"
            )
        old = None
        against = registry.aliases(name).get(alias)
        if against is not None:
            old = registry.read(name, against)
        odd = first_non_finite(new.arrays)
        words = "weights and answers are finite"
        if odd is not None:
            words = f"{odd} holds NaN or infinite values"
        finite = Check("finite", odd is None, words)
        checks = [finite, _form(new, old), self._enough(new)]
        if odd is None and checks[1].passed:
            try:
                checks += self._judged(registry, alias, new, old)
            except ModelExecutionError as error:
                checks[0] = Check("finite", False, str(error))
        for kind in CHECKS[len(checks) :]:
            first = next(check for check in checks if not check.passed)
            checks.append(Check(kind, False, f"not judged: {first.words}"))
        return Verdict(name, new.manifest.version, against, tuple(checks))

    def promote(
        self,
        registry: Registry,
        name: str,
        version: int,
        alias: str = DEFAULT_ALIAS,
        *,
        who: str = "gate",
    ) -> Verdict:
        """Check, and move the alias if the version passed; the verdict is in the log as the reason.

        Raises:
            ConflictError: The alias moved meanwhile, or is in an experiment. As :meth:`check`.
                Nothing has changed.
        """
        verdict = self.check(registry, name, version, alias)
        if verdict.passed:
            why = str(verdict)[:2000]
            registry.set_alias(name, alias, version, who=who, why=why, if_at=verdict.against or 0)
        return verdict

    def _enough(self, new: Artifact) -> Check:
        wanted = self.min_clients
        if wanted is None:
            wanted = math.ceil(len(self.clients) / 2)
        lineage = new.manifest.lineage
        found = None
        if lineage:
            found = lineage.num_clients
        if found is None:
            return Check(
                "clients",
                wanted == 0,
                f"no number of clients in its lineage, at least {wanted} wanted",
            )
        words = f"{found} clients in its lineage, at least {wanted} wanted"
        return Check("clients", found >= wanted, words, found, wanted)

    def _judged(
        self, registry: Registry, alias: str, new: Artifact, old: Artifact | None
    ) -> list[Check]:
        """The checks that need answers, or a version to compare with."""
        given, golden = self._answers(registry, new.manifest)
        right = self._right(given)
        last = self._golden(golden)
        of_all = np.concatenate(right)
        if old is None:
            words = f"no version to compare with (accuracy {of_all.mean():.3f})"
            compared = [Check(kind, True, words) for kind in _COMPARED]
            return [*compared, last]
        earlier, _ = self._answers(registry, old.manifest)
        before = self._right(earlier)
        alike = np.concatenate(given) == np.concatenate(earlier)
        same = float(alike.mean())
        words = f"{same:.3f} of the answers are those of version {old.manifest.version}"
        return [
            self._norm(registry, alias, new, old),
            self._accuracy(np.concatenate(before), of_all),
            self._worst(before, right),
            Check("agreement", same >= self.agreement, words, same, self.agreement),
            last,
        ]

    def _answers(
        self, registry: Registry, manifest: Manifest
    ) -> tuple[list[Labels], Labels | None]:
        """What a version answers to the held-out rows of each client, and to the golden rows."""
        engine = load_engine(
            RegistrySource(registry, manifest.name), str(manifest.version), _CONFIG
        )
        validate = engine.preprocessor.validate
        rows = [validate(client.test_x) for client in self.clients]
        personal = engine.personal
        if personal is None:
            found = engine.execute(rows)
        else:
            payloads = []
            for client, part in zip(self.clients, rows, strict=True):
                slots, _ = personal.choose(client.id, len(part))
                payloads.append((part, slots))
            found = personal.execute(payloads)
        given = [prediction.arrays()["predictions"] for prediction in found]
        if self.golden is None:
            return given, None
        features = validate(self.golden[0])
        (prediction,) = engine.execute([features])
        return given, prediction.arrays()["predictions"]

    def _right(self, given: Sequence[Labels]) -> list[_Right]:
        """Which held-out rows of each client were answered right."""
        return [
            answers == client.test_y for answers, client in zip(given, self.clients, strict=True)
        ]

    def _golden(self, answers: Labels | None) -> Check:
        if self.golden is None or answers is None:
            return Check("golden", True, "no golden rows were given", 0, 0)
        wrong = int((answers != self.golden[1]).sum())
        return Check(
            "golden", wrong == 0, f"{wrong} of {len(answers)} answered differently", wrong, 0
        )

    def _norm(self, registry: Registry, alias: str, new: Artifact, old: Artifact) -> Check:
        length = _distance(new.tensors, old.tensors)
        past = _accepted(registry, new.manifest.name, alias)
        if len(past) < 3:
            limit = _distance(old.tensors)
            words = "the length of the weights that serve now: no history yet"
        else:
            limit = self.jump * median(past)
            words = f"{self.jump:g} times the median of the last {len(past)} accepted"
        words = f"an update of {length:.3g}, at most {limit:.3g}: {words}"
        return Check("norm", length <= limit, words, length, limit)

    def _accuracy(self, before: _Right, now: _Right) -> Check:
        """Source: Agresti and Min 2005: 0.5 is added to each of the four cells, so 2 to the number
        of rows."""
        lost, won = _changed(before, now)
        n = len(now) + 2
        drop = (lost - won) / n
        spread = lost + won + 1 - (lost - won) ** 2 / n
        error = math.sqrt(spread) / n
        z = NormalDist().inv_cdf(1 - self.alpha)
        bound = drop + z * error
        words = (
            f"{now.mean():.3f} after {before.mean():.3f}, {lost} rows lost, {won} won: "
            f"a drop of at most {bound:.3f}"
        )
        return Check("accuracy", bound <= self.tolerance, words, bound, self.tolerance)

    def _worst(self, before: Sequence[_Right], now: Sequence[_Right]) -> Check:
        """McNemar's exact test of each client: as many lost among those that changed, if a fair
        coin decided."""
        worst = 0.0
        who = ""
        for client, old, new in zip(self.clients, before, now, strict=True):
            lost, won = _changed(old, new)
            changed = lost + won
            ways = sum(math.comb(changed, k) for k in range(lost, changed + 1))
            p = ways / 2**changed
            drop = float(old.mean() - new.mean())
            if p * len(self.clients) <= self.alpha and drop > worst:
                worst = drop
                who = f"; {client.id!r} lost {lost} of {len(new)} rows, won {won}"
        least_now = min(part.mean() for part in now)
        least_before = min(part.mean() for part in before)
        words = f"{least_now:.3f} after {least_before:.3f}{who}"
        return Check(
            "worst client", worst <= self.client_tolerance, words, worst, self.client_tolerance
        )


def golden_rows(
    registry: Registry,
    name: str,
    clients: Sequence[Client],
    version: int | str = DEFAULT_ALIAS,
    per_class: int = 2,
) -> tuple[Features, Labels]:
    """Rows that any sound version answers right: of each class those of which ``version`` is
    surest, and right.

    Keep them (``np.savez``): what is golden must not follow the versions that it is to judge.
    """
    number = registry.resolve(name, version)
    engine = load_engine(RegistrySource(registry, name), str(number), _CONFIG)
    rows = np.concatenate([client.test_x for client in clients])
    labels = np.concatenate([client.test_y for client in clients])
    arrays = engine.execute([rows])[0].arrays()
    sure = np.where(arrays["predictions"] == labels, arrays["confidences"], -1.0)
    kept = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        surest_first = np.argsort(np.where(labels == label, -sure, 2.0))
        kept[surest_first[:per_class]] = True
    kept &= sure >= 0
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
    """A callback for ``federated.train(on_round=...)``: publish every round, promote those that
    pass.

    A refused round stays published, and the training goes on from it: the gate protects those who
    are answered, not the training. An alias that cannot move now (an experiment runs) is a refusal
    by the check "alias".
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


def _changed(before: _Right, now: _Right) -> tuple[int, int]:
    """How many rows were answered right only before, and only now."""
    lost = before & ~now
    won = now & ~before
    return int(lost.sum()), int(won.sum())


def _form(new: Artifact, old: Artifact | None) -> Check:
    """Same architecture, shapes and preprocessing: what callers send goes on meaning the same."""
    manifest = new.manifest
    odd = []
    if old is not None:
        for field in ("architecture", "parameters", "signature", "preprocessing"):
            if getattr(manifest, field) != getattr(old.manifest, field):
                odd.append(field)
    if odd:
        return Check("form", False, f"not as before: {', '.join(odd)}")
    inputs = list(manifest.signature.input_shape)
    outputs = list(manifest.signature.output_shape)
    return Check("form", True, f"{manifest.architecture}, {inputs} to {outputs}")


def _distance(a: State, b: State | None = None) -> float:
    """L2 norm of ``a - b`` over all floating-point tensors, in float64."""
    total = 0.0
    for name, tensor in a.items():
        if tensor.is_floating_point():
            difference = tensor.double()
            if b is not None:
                difference = difference - b[name].double()
            total += float(difference.square().sum())
    return math.sqrt(total)


def _accepted(registry: Registry, name: str, alias: str) -> list[float]:
    """Lengths of the last updates that ``alias`` followed, without those that were rolled back,
    oldest first."""
    moves = registry.history(name, alias)
    moves = moves[(moves["action"] == "set") & moves["from"].notna()]
    undone = moves["to"].isin(registry.rolled_back(name, alias))
    moves = moves[~undone].tail(_WINDOW)
    read = cache(partial(registry.read, name))  # most versions stand in two moves
    lengths = []
    for before, after in zip(moves["from"], moves["to"], strict=True):
        old = read(int(before))
        new = read(int(after))
        if _form(new, old).passed:
            lengths.append(_distance(new.tensors, old.tensors))
    return lengths
