"""Who gains from a head of its own: trainings over data, clients and samples, measured once and
kept as a table.

The table lies beside this module; ``python -m flserving.lab.federated.who_gains`` measures it again
(about a quarter of an hour). Source of the question: Matsuda et al. 2022 (arXiv 2206.13190), whose
benchmark over data sets and client settings found no champion among personalised methods, and
averaging with fine-tuning often better than they.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from flserving.federated import data, training
from flserving.federated.data import Client, Labels
from flserving.federated.rounds import Round, Run
from flserving.lab.queueing.arrivals import Floats
from flserving.models.processing import Floats as Floats32
from flserving.models.processing import Preprocessor
from flserving.registry.heads import HeadSet

if TYPE_CHECKING:
    import pandas as pd

Bools = NDArray[np.bool_]
TABLE = Path(__file__).with_suffix(".csv")
ALPHAS = (0.1, 0.3, 1, 3, 100)
CLIENTS = (5, 20, 5)  # low, high, step, as a slider takes it
SAMPLES = (20, 80, 20)  # of a client on average, both splits together
# where the sliders stand first
START = {"alpha": 0.3, "clients": 10, "samples": 40, "private": False}
SETTING = ["alpha", "clients", "samples", "private"]
GLOBAL = "shared model"
METHODS = {
    "fedavg_ft": "fine-tuned head",
    "fedper": "FedPer",
    "fedrep": "FedRep",
    "local": "local only",
}
NAMES = [GLOBAL, *METHODS.values()]
COLUMNS = ("mean", "worst", "gain", "lose")
"""Mean and worst accuracy over clients on their held-out samples; share of the clients that do
better, and worse, than with the global model."""


def measure(
    alpha: float,
    clients: int,
    samples: int,
    private: bool,
    *,
    seeds: Sequence[int] = range(5),
    rounds: int = 10,
) -> "pd.DataFrame":
    """Train by each method on fresh partitions and compare the clients' accuracies; means over the
    seeds.

    Args:
        alpha: Evenness of the labels over clients (Dirichlet). ``clients``: how many. ``samples``:
            of each on average.
        private: Every client names the classes in its own way.

    Returns:
        Index: ``GLOBAL`` and the methods' names; columns ``COLUMNS``, each in [0, 1].

    Cost: four trainings a seed, 0.1 to 3 s together.
    """
    import pandas as pd

    x, y = data.digits()
    taken = []
    for seed in seeds:
        chosen = np.random.default_rng(seed).permutation(len(y))[: clients * samples]
        parts = data.make_clients(
            x[chosen],
            y[chosen],
            num_clients=clients,
            alpha=alpha,
            permute_labels=private,
            seed=seed,
        )
        runs = {
            name: training.train(name, rounds=rounds, clients=parts, seed=seed, progress=False)
            for name in METHODS
        }
        # fine-tuning leaves the global model alone: it is FedAvg's
        shared = global_accuracy(runs["fedavg_ft"])
        rows = {GLOBAL: _row(shared, shared)}
        for name, run in runs.items():
            rows[METHODS[name]] = _row(own_accuracy(run), shared)
        taken.append(pd.DataFrame(rows, COLUMNS).T)
    mean: pd.DataFrame = sum(taken[1:], taken[0]) / len(taken)
    return mean


def _row(own: Floats, shared: Floats) -> list[float]:
    """The ``COLUMNS``, of accuracies by client."""
    gain = (own > shared).mean()
    lose = (own < shared).mean()
    return [own.mean(), own.min(), gain, lose]


def looked_up(alpha: float, clients: int, samples: int, private: bool) -> "pd.DataFrame":
    """The same from the table, at once; KeyError for a setting that is not in it."""
    import pandas as pd

    row = _table().loc[(alpha, clients, samples, private)]  # type: ignore[index]  # the stubs know no numbers
    values = row.to_numpy(float).reshape(len(NAMES), -1)
    return pd.DataFrame(values, NAMES, list(COLUMNS))


@lru_cache(maxsize=1)
def _table() -> "pd.DataFrame":
    import pandas as pd

    return pd.read_csv(TABLE, index_col=SETTING)


def own_accuracy(run: Run) -> Floats:
    """Accuracy of each client with the model that serves it after the last round, on its held-out
    samples, [K]."""
    return np.array([run.final.client_accuracy[client.id] for client in run.clients])


def global_accuracy(run: Run) -> Floats:
    """Accuracy of each client with the last round's global model, on its held-out samples, [K]."""
    body, head = _body_and_head(run.final)
    with torch.inference_mode():
        right = [_answers(head(body(client.test_x))) == client.test_y for client in run.clients]
    return np.array([each.mean() for each in right])


def head_matrix(last: Round, clients: Sequence[Client]) -> Floats:
    """Accuracy of client i's held-out samples with client j's head, [K, K]. Cost: one body pass a
    client."""
    body, _ = _body_and_head(last)
    personal = {client.id: last.personal[client.id] for client in clients}
    heads = torch.from_numpy(HeadSet.from_states(personal).weights)
    table = []
    with torch.inference_mode():
        for client in clients:
            logits = body(client.test_x) @ heads[:, :-1] + heads[:, -1:]  # [K, n, C]
            right = _answers(logits) == client.test_y
            table.append(right.mean(axis=1))
    return np.array(table)


def own_and_others(matrix: Floats) -> dict[str, float]:
    """Mean accuracy with the own head, with the neighbour's, and with anybody else's."""
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    neighbour = np.roll(matrix, -1, axis=1).diagonal()
    return {
        "own head": matrix.diagonal().mean(),
        "the neighbour's": neighbour.mean(),
        "anybody's": others.mean(),
    }


def right_answers(
    last: Round,
    clients: Sequence[Client],
    heads: HeadSet,
) -> dict[str, dict[str, dict[str, Bools]]]:
    """Whether each sample is answered right: client -> split -> "own" (its head of ``heads``) or
    "shared" -> bool [n].

    Splits: "train"; "held_out" and "later", which are the two halves of the held-out samples.
    """
    body, shared = _body_and_head(last)
    found: dict[str, dict[str, dict[str, Bools]]] = {}
    with torch.inference_mode():
        for client, own in zip(clients, torch.from_numpy(heads.weights), strict=True):
            splits = {
                "train": (client.train_x, client.train_y),
                "held_out": (client.test_x[::2], client.test_y[::2]),
                "later": (client.test_x[1::2], client.test_y[1::2]),
            }
            found[client.id] = {}
            for split, (x, y) in splits.items():
                if len(y):
                    features = body(x)
                    found[client.id][split] = {
                        "own": _answers(features @ own[:-1] + own[-1]) == y,
                        "shared": _answers(shared(features)) == y,
                    }
    return found


def _answers(logits: Tensor) -> Labels:
    labels: Labels = logits.argmax(dim=-1).numpy()
    return labels


def _body_and_head(last: Round) -> tuple[Callable[[Floats32], Tensor], Module]:
    """Of the global model; the body standardises its rows."""
    model = last.model()
    body = model.get_submodule("body")
    standardise = Preprocessor(
        mean=last.preprocessing["mean"],
        std=last.preprocessing["std"],
    )
    return lambda rows: body(standardise(rows)), model.get_submodule("head")


def main() -> None:
    """Measure every setting and write the table."""
    import pandas as pd
    from tqdm import tqdm

    low, high, step = CLIENTS
    few, many, by = SAMPLES
    settings = itertools.product(
        ALPHAS,
        range(low, high + 1, step),
        range(few, many + 1, by),
        (False, True),
    )
    rows = {setting: measure(*setting).to_numpy().ravel() for setting in tqdm(list(settings))}
    columns = [f"{name}: {what}" for name in NAMES for what in COLUMNS]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    frame.index = pd.MultiIndex.from_tuples(rows, names=SETTING)
    frame.to_csv(TABLE, float_format="%.3f")


if __name__ == "__main__":
    main()
