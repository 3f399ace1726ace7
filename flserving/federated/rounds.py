"""What goes into a federated training and what comes out: strategies, a checked recipe, rounds, and
their publisher.

The training itself is in ``training.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from flserving import models
from flserving.errors import ConfigError, check_number
from flserving.extras import need
from flserving.federated.aggregation import State
from flserving.federated.data import Client
from flserving.registry import Registry
from flserving.registry.heads import HeadSet
from flserving.registry.manifest import Lineage, Manifest

if TYPE_CHECKING:
    import pandas as pd

Statistics: TypeAlias = Mapping[str, Sequence[float]]
Facts: TypeAlias = Mapping[str, bool | int | float | str | None]


@dataclass(frozen=True, slots=True)
class Strategy:
    """What sets one strategy apart from the others.

    Args:
        keeps: Tensors whose names start so stay with the client, which trains on from them in the
            next round; it takes the others from the server. None: it keeps nothing; "": everything.
        head_first: Train the head with the body frozen, then the body with the head frozen; else
            both together.
        fine_tunes: After the aggregation each client trains the head of the new global model on its
            own samples. That head serves it, and is gone in the next round.
    """

    keeps: str | None = None
    head_first: bool = False
    fine_tunes: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Submodules that a model must have for this strategy."""
        if self.head_first:
            return ("body", "head")
        if self.fine_tunes or self.keeps == "head.":
            return ("head",)
        return ()


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "fedavg": Strategy(),  # McMahan et al., AISTATS 2017 (arXiv 1602.05629)
        # the same, with fine-tuned heads: the base line of Collins et al.
        "fedavg_ft": Strategy(fine_tunes=True),
        "fedper": Strategy(keeps="head."),  # Arivazhagan et al. 2019 (arXiv 1912.00818)
        # Collins et al., ICML 2021 (arXiv 2102.07078)
        "fedrep": Strategy(keeps="head.", head_first=True),
        "local": Strategy(keeps=""),  # nobody takes anything: what a federation has to beat
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of a training, as they go into the lineage of its versions. ``data`` describes the
    samples in words.

    Raises:
        ConfigError: A value has the wrong type or lies outside its bounds.
    """

    strategy: str = "fedavg"
    rounds: int = 10
    local_epochs: int = 5
    batch_size: int = 16
    learning_rate: float = 0.1
    architecture: str = "digits_mlp"
    parameters: models.Parameters = field(default_factory=dict)
    seed: int = 0
    data: str = ""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(
                f"strategy is {self.strategy!r}: choose one of {', '.join(STRATEGIES)}"
            )
        check_number("rounds", self.rounds, 1, 10_000, whole=True)
        check_number("local_epochs", self.local_epochs, 1, 1_000, whole=True)
        check_number("batch_size", self.batch_size, 1, 1_000_000, whole=True)
        check_number("learning_rate", self.learning_rate, 1e-9, 1e3)
        check_number("seed", self.seed, 0, 2**63 - 1, whole=True)

    @property
    def facts(self) -> Facts:
        """What goes into ``Lineage.extra``."""
        names = ("data", "seed", "local_epochs", "batch_size", "learning_rate")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What stands in a recipe's place where another framework trained: what its versions say of
    it."""

    strategy: str
    architecture: str
    parameters: models.Parameters
    facts: Facts


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """One federated round: a version in the making.

    Args:
        number: 1 for the first.
        state: The global model: the mean of the accepted updates, weighted by training samples.
            Where clients keep their heads, its head is the mean of theirs, for clients who have
            none.
        personal: Client id -> the tensors in which the model that serves it differs from ``state``.
        metrics: ``global_accuracy``: the global model on all held-out samples together;
            ``mean_client_accuracy``, ``worst_client_accuracy``: over clients, each with its own
            model on its own held-out samples.
        client_accuracy: The latter by client id. ``sample_counts``: training samples of the
            accepted clients.
        rejected: Client id -> why its update was left out: its training raised, or it was faulty.
            If all were, ``state`` is that of the round before.
        preprocessing: ``mean`` and ``std`` that the features were standardised with.
    """

    number: int
    recipe: Recipe | Origin
    preprocessing: Statistics
    state: State
    personal: dict[str, State]
    metrics: dict[str, float]
    client_accuracy: dict[str, float]
    sample_counts: dict[str, int]
    rejected: dict[str, str]

    def model(self, client_id: str | None = None) -> nn.Module:
        """A new module, to be fed standardised features: the one that serves this client, or the
        global one."""
        # a model that is overwritten at once must not cost random numbers
        with torch.random.fork_rng(devices=[]):
            module = models.build(self.recipe.architecture, self.recipe.parameters)
        module.load_state_dict(self.state | self.personal.get(client_id or "", {}))
        return module.eval()


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A finished training: who took part, and every round."""

    recipe: Recipe
    clients: tuple[Client, ...]
    rounds: tuple[Round, ...]

    @property
    def final(self) -> Round:
        """The last round."""
        return self.rounds[-1]

    def to_frame(self) -> "pd.DataFrame":
        """One row per round: its metrics, and how many clients were accepted and rejected."""
        pandas = need("pandas", "course")
        rows = []
        for done in self.rounds:
            counts = {"accepted": len(done.sample_counts), "rejected": len(done.rejected)}
            rows.append({"round": done.number} | done.metrics | counts)
        frame: pd.DataFrame = pandas.DataFrame(rows).set_index("round")
        return frame


def publish_rounds(
    registry: Registry, name: str, *, alias: str | None = None
) -> Callable[[Round], Manifest]:
    """A callback for ``federated.train(on_round=...)``: every round becomes the next version of
    ``name``.

    Each version names the one before as its parent, and carries metrics, statistics and settings.
    ``alias`` is pointed at each new version as it appears; without it nothing moves until somebody
    promotes a version. Where clients have heads of their own (and the rest in common), those go
    with the version.
    """
    parent: int | None = None

    def publish(result: Round) -> Manifest:
        nonlocal parent
        recipe = result.recipe
        lineage = Lineage(
            round=result.number,
            parent_version=parent,
            num_clients=len(result.sample_counts),
            sample_counts=tuple(result.sample_counts.values()),
            strategy=recipe.strategy,
            extra={**recipe.facts, "rejected_clients": len(result.rejected)},
            clients=tuple(result.sample_counts),
        )
        manifest = registry.publish(
            name,
            result.state,
            architecture=recipe.architecture,
            parameters=recipe.parameters,
            preprocessing=result.preprocessing,
            lineage=lineage,
            metrics=result.metrics,
            heads=_heads(result),
            note="; ".join(f"{client} rejected: {why}" for client, why in result.rejected.items())[
                :2000
            ],
            alias=alias,
        )
        parent = manifest.version
        return manifest

    return publish


def _heads(result: Round) -> HeadSet | None:
    """The clients' heads, where these are all that sets their models apart from the global one."""
    own = {
        client: state
        for client, state in result.personal.items()
        if state.keys() <= {"head.weight", "head.bias"}
    }
    return HeadSet.from_states(own) if own else None
