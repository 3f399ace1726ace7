"""Membership inference: whether a row was trained on, guessed from the answers that a server gives
to its callers.

The attacker knows a row and its true label, asks the server, and guesses "member" where the answer
is surer of that label than a threshold. Where only labels are shown, "member" is where the label is
right: the *gap attack*, as good as the gap between the accuracy on members and on others.

Sources: the attack, Shokri et al., IEEE S&P 2017 (arXiv 1610.05820); a threshold in place of shadow
models, Salem et al., NDSS 2019 (arXiv 1806.01246); the gap, Yeom et al., CSF 2018 (arXiv
1709.01604), and its name, Choquette-Choo et al., ICML 2021 (arXiv 2007.14321), where weight decay
helps and masking does not.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flserving import ModelServer, ServingConfig, api, models
from flserving.api.auth import Tokens
from flserving.api.client import Client
from flserving.federated.data import Features, Labels, digits
from flserving.lab.style import COLOURS, figure, styled

if TYPE_CHECKING:
    import pandas as pd

POLICIES = ("full", "top-3", "top-1", "rounded-2", "rounded-1", "label")
# grey levels of 16: digits that a bad camera has seen, so that there is something to learn by heart
NOISE = 6.0


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A model that was trained on the first half of these rows, its ``members``, and has never seen
    the others."""

    model: torch.nn.Module
    statistics: Mapping[str, Features]
    x: Features
    y: Labels

    @property
    def members(self) -> NDArray[np.bool_]:
        """Whether each row was trained on."""
        return np.arange(len(self.y)) < len(self.y) // 2


def trained(weight_decay: float, *, members: int = 600, epochs: int = 150, seed: int = 0) -> Target:
    """A classifier of noisy digits. Without weight decay it learns its members by heart. Cost:
    about a second."""
    x, y = digits()
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(x))[: 2 * members]
    clean = x[chosen]
    noise = rng.standard_normal(clean.shape, dtype=np.float32)
    rows = clean + np.float32(NOISE) * noise
    mine = rows[:members]
    mean = mine.mean(0)
    std = mine.std(0)
    statistics = {"mean": mean, "std": std}
    inputs = torch.from_numpy((mine - mean) / std)
    labels = torch.from_numpy(y[chosen][:members])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.build("mlp", {"sizes": [64, 128, 10]})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=weight_decay)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Target(model, statistics, rows, y[chosen])


def evidence(answer: Mapping[str, Any], y: Labels) -> NDArray[np.float64]:
    """How much an answer speaks for each row's true label: its probability; 1 or 0 where labels
    alone are shown."""
    if "probabilities" in answer:
        rows = np.arange(len(y))
        shown = answer["probabilities"][rows, y]
    else:
        shown = answer["predictions"] == y
    return np.asarray(shown, float)


def threshold_attack(found: NDArray[np.float64], members: NDArray[np.bool_]) -> float:
    """Share of the rows that are guessed right with a threshold on their evidence.

    The threshold is the best one for every second row, of which the attacker knows whether they are
    members; the guesses are about the rows between them. On the evidence of labels it is the gap
    attack.
    """
    known = np.arange(len(found)) % 2 == 0
    cuts = np.unique(found[known])
    theirs = np.sort(found[known & members])
    others = np.sort(found[known & ~members])
    caught = len(theirs) - np.searchsorted(theirs, cuts)
    spared = np.searchsorted(others, cuts)
    best = cuts[int(np.argmax(caught + spared))]
    guesses = found[~known] >= best
    right = guesses == members[~known]
    return float(right.mean())


def asked(target: Target, policies: Sequence[str] = POLICIES) -> dict[str, dict[str, Any]]:
    """What a server answers to all rows over REST, by policy: each is that of one credential."""
    tokens = Tokens()
    secret = {policy: secrets.token_urlsafe() for policy in policies}
    for policy, token in secret.items():
        tokens.add(token, outputs=policy)
    answers = {}
    with (
        ModelServer(ServingConfig(warmup_samples=0, timeout_ms=60_000)) as server,
        api.serve(server, tokens=tokens, grpc_port=None) as endpoint,
    ):
        server.load_model("v1", target.model, target.statistics)
        for policy, token in secret.items():
            with Client(endpoint.url, token, timeout_ms=60_000) as client:
                answers[policy] = client.predict(target.x, arrays=True)
    return answers


def membership_table(
    weight_decays: Sequence[float] = (0.0, 0.1),
    policies: Sequence[str] = POLICIES,
    seeds: Iterable[int] = range(3),
    **training: Any,
) -> "pd.DataFrame":
    """The attack on the answers of a real server, in percent, as means over the seeds.

    Returns:
        One row per weight decay and policy: ``attack`` (rows guessed right; 50 is what a coin
        gives), and what the model is worth: ``members`` and ``others``, the rows of each that it
        labels right.

    Cost: about two seconds a seed for each weight decay.
    """
    import pandas as pd

    found = []
    for seed in seeds:
        for weight_decay in weight_decays:
            target = trained(weight_decay, seed=seed, **training)
            members = target.members
            for policy, answer in asked(target, policies).items():
                right = answer["predictions"] == target.y
                guessed = threshold_attack(evidence(answer, target.y), members)
                row = {
                    "weight decay": weight_decay,
                    "policy": policy,
                    "attack": 100 * guessed,
                    "members": 100 * right[members].mean(),
                    "others": 100 * right[~members].mean(),
                }
                found.append(row)
    table = pd.DataFrame(found)
    return table.groupby(["weight decay", "policy"], sort=False).mean()


def membership_figure(table: "pd.DataFrame") -> Figure:
    """How often the attack is right, for each policy and model. ``table``: of
    :func:`membership_table`."""
    groups = list(table.groupby(level=0, sort=False))
    policies = [*dict.fromkeys(table.index.get_level_values(1))]
    fig, (ax,) = figure(height_in=1.8 + 0.4 * len(policies))
    with styled():
        thick = 0.8 / len(groups)
        for number, (weight_decay, rows) in enumerate(groups):
            aside = thick * (number - (len(groups) - 1) / 2)
            places = np.arange(len(policies)) + aside
            percent = rows["others"].mean()
            label = f"weight decay {weight_decay:g} ({percent:.0f} % of new rows right)"
            bars = ax.barh(places, rows["attack"], thick * 0.92, color=COLOURS[number], label=label)
            ax.bar_label(bars, fmt="%.0f", padding=3)
        ax.axvline(50, color="#333333", linestyle="--", linewidth=1.2, label="a coin")
        ax.set_yticks(range(len(policies)), policies)
        ax.invert_yaxis()
        ax.set(
            xlim=(0, 100),
            xlabel="members and others that the attacker tells apart (%)",
            ylabel="outputs",
        )
        fig.legend(loc="outside upper center", ncols=len(groups) + 1)
    return fig
