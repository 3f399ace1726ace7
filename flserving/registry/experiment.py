"""An experiment: which versions share an alias's requests, by which rule, and what ends it. Plain
data.

A client's arm is drawn by weighted rendezvous hashing with a secret key (Schindelhauer and
Schomaker, SPAA 2005): the same client gets the same arm in every process. Under one key a client
changes its arm only for one whose weight grew against that of its own: so no more clients move than
must where one of two weights changes, or an arm comes or goes. Who has no client id, and a request
of several clients, is no part of the experiment: the alias's own version answers.
"""

import math
from hashlib import blake2b
from typing import Literal, Self

import msgspec

from flserving.errors import ConfigError
from flserving.registry.manifest import check_name

MOST_ARMS = 8


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    weight: float


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When a canary is promoted or rolled back by itself. See
    :func:`flserving.experiments.canary.judge`.

    Its share is not ramped up meanwhile: rewards pooled over changing shares are biased when
    quality drifts (Simpson's paradox; Kohavi, Tang and Xu, Trustworthy Online Controlled
    Experiments, 2020, ch. 3).

    Attributes:
        effect: A loss of mean reward that matters.
        alpha: The canary is promoted although it loses ``effect`` with at most ``alpha / 2``, or
            although it ruins a client that was checked with at most ``alpha / 2``; rolled back as
            harmful although it is not with at most ``3 * alpha / 4``.
        power: How surely a canary that loses nothing is proven to within the stated sample size;
            one without a proof is rolled back there. More power means a larger sample, and hardly a
            longer wait for a good canary.
        min_clients: Fewer clients than this in an arm decide nothing: its variance is not known
            well enough.
        worst_margin: How far the worst client of the canary may be below the worst one of the
            control.
        ruin: A client that is so far below the worst one of the control is ruined: promotion needs
            a proof, for each client that was checked, that it is not. Less than ``worst_margin``
            counts as that.
        client_rewards: A client with so many rewards was checked; one with fewer is not called the
            worst.
        checked_share: Of the canary's clients that gave rewards, the share that must have been
            checked before it is promoted. The rest may be ruined unseen: lower it only where many
            clients hardly ever give a reward.
        max_failures: Share of requests that may fail in the model itself; one client's failures
            alone decide nothing.
        most_s: A canary without a verdict for so long is rolled back: without feedback it would run
            for ever. The default is a week.
    """

    effect: float = 0.05
    alpha: float = 0.05
    power: float = 0.99
    min_clients: int = 20
    worst_margin: float = 0.1
    ruin: float = 0.2
    client_rewards: int = 20
    checked_share: float = 0.98
    max_failures: float = 0.01
    most_s: float = 7 * 86_400.0

    def check(self) -> None:
        for name in ("effect", "alpha", "power", "worst_margin", "ruin", "max_failures"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ConfigError(f"{name} is {value!r}: it must be a number in (0, 1)")
        if not 0 < self.checked_share <= 1:
            raise ConfigError(
                f"checked_share is {self.checked_share!r}: it must be a number in (0, 1]"
            )
        for name in ("min_clients", "client_rewards"):
            value = getattr(self, name)
            if value < 2:
                raise ConfigError(f"{name} is {value!r}: it must be at least 2")
        if not 0 < self.most_s < math.inf:
            raise ConfigError(f"most_s is {self.most_s!r}: it must be a number of seconds > 0")


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Give it to ``registry.start_experiment``; what comes back has its ``run`` and ``key``.

    Attributes:
        arms: By name; the weights sum to one. None at all where there is only a shadow.
        rule: ``sticky``: by client and weight. ``bandit``: Thompson sampling for each request;
            weights do not count.
        policy: What ends it by itself; with it there are two arms, one of them the alias's own
            version.
        shadow: A version that gets a copy of the requests; its answers are compared and thrown
            away.
    """

    id: str
    arms: dict[str, Arm] = {}
    rule: Literal["sticky", "bandit"] = "sticky"
    policy: Policy | None = None
    shadow: int | None = None
    run: str = ""
    key: str = ""

    @classmethod
    def of(cls, id: str, arms: dict[str, tuple[int, float]], **more: object) -> Self:
        """From ``{"a": (1, 0.5), "b": (2, 0.5)}``: version and weight of each arm."""
        made = {name: Arm(*arm) for name, arm in arms.items()}
        return cls(id=id, arms=made, **more)  # type: ignore[arg-type]

    @classmethod
    def canary(
        cls, id: str, control: int, version: int, share: float = 0.1, policy: Policy | None = None
    ) -> Self:
        """``share`` of the clients get ``version`` until it is promoted or rolled back by
        itself."""
        arms = {
            "control": (control, 1 - share),
            "canary": (version, share),
        }
        return cls.of(id, arms, policy=policy or Policy())

    @property
    def versions(self) -> list[int]:
        versions = [arm.version for arm in self.arms.values()]
        if self.shadow is not None:
            versions.append(self.shadow)
        return versions

    def check(self) -> None:
        """Raise ConfigError unless it can be run, InvalidModelError for names outside the
        alphabet."""
        try:  # nobody could read it again, not even to end it
            msgspec.convert(msgspec.to_builtins(self), Experiment)
        except (msgspec.ValidationError, TypeError) as error:
            raise ConfigError(f"experiment {self.id!r:.64} is none: {error}") from error
        check_name("experiment", self.id)
        for name in self.arms:
            check_name("arm", name)
        if len(self.arms) > MOST_ARMS or (not self.arms and self.shadow is None):
            raise ConfigError(
                f"experiment {self.id!r} has {len(self.arms)} arms: it takes 1 to {MOST_ARMS}"
            )
        for name, arm in self.arms.items():
            if not 0 < arm.weight <= 1:
                raise ConfigError(
                    f"arm {name!r} is empty, its weight is {arm.weight!r}: leave it out, or weigh it"
                )
        total = math.fsum(arm.weight for arm in self.arms.values())
        if self.arms and abs(total - 1) > 1e-9:
            raise ConfigError(
                f"the weights of experiment {self.id!r} sum to {total:.12g}: they must sum to one"
            )
        if self.policy is not None:
            self.policy.check()
            versions = {arm.version for arm in self.arms.values()}
            if self.rule != "sticky" or len(versions) != 2 or len(self.arms) != 2:
                raise ConfigError(
                    f"experiment {self.id!r} has a policy: it takes two sticky arms of two versions"
                )

    def arm_of(self, client: str) -> str:
        """The client's arm under the rule ``sticky``. Cost: about 1 us for each arm."""
        said = client.encode(errors="surrogatepass") + b"\0"  # which no arm's name holds
        started = blake2b(said, digest_size=8, key=bytes.fromhex(self.key))
        best = ""
        least = math.inf
        for name, arm in self.arms.items():
            drawn = started.copy()
            drawn.update(name.encode())
            uniform = (int.from_bytes(drawn.digest()) + 0.5) / 2**64
            score = -math.log(uniform) / arm.weight
            if score < least:
                best = name
                least = score
        return best


class TrafficSplit(tuple[str, str]):
    """The (model, version) that an alias leads to, where an experiment splits its requests among
    versions."""

    alias: str
    experiment: Experiment

    @classmethod
    def at(cls, key: tuple[str, str], alias: str, experiment: Experiment) -> Self:
        split = cls(key)
        split.alias = alias
        split.experiment = experiment
        return split
