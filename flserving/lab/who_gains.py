"""Who gains from a head of its own: trainings over data, clients and samples, measured once and kept as a table.

The table lies beside this module; ``python -m flserving.lab.who_gains`` measures it again (about a quarter of an hour).
Source of the question: Matsuda et al. 2022 (arXiv 2206.13190), whose benchmark over data sets and client settings found
no champion among personalised methods, and averaging with fine-tuning often better than they.
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

from flserving.federated import data, training
from flserving.federated.data import Client
from flserving.federated.rounds import Round
from flserving.lab.arrivals import Floats
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
ROUNDS, SEEDS = 10, range(5)
GLOBAL = "shared model"
METHODS = {"fedavg_ft": "fine-tuned head", "fedper": "FedPer", "fedrep": "FedRep", "local": "local only"}
COLUMNS = ("mean", "worst", "gain", "lose")
"""Mean and worst accuracy over clients on their held-out samples; share of the clients that do better, and worse, than
with the global model."""


def measure(
    alpha: float, clients: int, samples: int, private: bool, *, seeds: Sequence[int] = SEEDS, rounds: int = ROUNDS
) -> "pd.DataFrame":
    """Train by each method on fresh partitions and compare the clients' accuracies; means over the seeds.

    Args:
        alpha: Evenness of the labels over clients (Dirichlet). ``clients``: how many. ``samples``: of each on average.
        private: Every client names the classes in its own way.

    Returns:
        Index: ``GLOBAL`` and the methods' names; columns ``COLUMNS``, each in [0, 1].

    Cost: four trainings a seed, 0.1 to 3 s together.
    """
    import pandas as pd

    taken = [pd.DataFrame(_once(alpha, clients, samples, private, seed, rounds), COLUMNS).T for seed in seeds]
    mean: pd.DataFrame = sum(taken[1:], taken[0]) / len(taken)
    return mean


def looked_up(alpha: float, clients: int, samples: int, private: bool) -> "pd.DataFrame":
    """The same from the table, at once; KeyError for a setting that is not in it."""
    import pandas as pd

    row = _table().loc[(alpha, clients, samples, private)]  # type: ignore[index]  # the stubs know no numbers
    names = [GLOBAL, *METHODS.values()]
    return pd.DataFrame(row.to_numpy(float).reshape(len(names), len(COLUMNS)), names, list(COLUMNS))


@lru_cache(maxsize=1)
def _table() -> "pd.DataFrame":
    import pandas as pd

    return pd.read_csv(TABLE, index_col=["alpha", "clients", "samples", "private"])


def _once(
    alpha: float, clients: int, samples: int, private: bool, seed: int, rounds: int
) -> dict[str, tuple[float, ...]]:
    x, y = data.digits()
    chosen = np.random.default_rng(seed).permutation(len(y))[: clients * samples]
    parts = data.make_clients(x[chosen], y[chosen], num_clients=clients, alpha=alpha, permute_labels=private, seed=seed)
    runs = {name: training.train(name, rounds=rounds, clients=parts, seed=seed, progress=False) for name in METHODS}
    shared = global_accuracy(runs["fedavg_ft"])  # fine-tuning leaves the global model alone: it is FedAvg's
    found: dict[str, tuple[float, ...]] = {GLOBAL: (shared.mean(), shared.min(), 0.0, 0.0)}
    for name, run in runs.items():
        own = own_accuracy(run)
        found[METHODS[name]] = (own.mean(), own.min(), (own > shared).mean(), (own < shared).mean())
    return found


def own_accuracy(run: training.Run) -> Floats:
    """Accuracy of each client with the model that serves it after the last round, on its held-out samples, [K]."""
    return np.array([run.final.client_accuracy[client.id] for client in run.clients])


def global_accuracy(run: training.Run) -> Floats:
    """Accuracy of each client with the last round's global model, on its held-out samples, [K]."""
    body, head = _standardised_body(run.final), run.final.model().get_submodule("head")
    with torch.inference_mode():
        answers = [head(body(client.test_x)).argmax(dim=1).numpy() for client in run.clients]
    return np.array([(got == client.test_y).mean() for got, client in zip(answers, run.clients, strict=True)])


def head_matrix(last: Round, clients: Sequence[Client]) -> Floats:
    """Accuracy of client i's held-out samples with client j's head, [K, K]. Cost: one body pass a client."""
    body = _standardised_body(last)
    heads = torch.from_numpy(HeadSet.from_states({client.id: last.personal[client.id] for client in clients}).weights)
    table = []
    with torch.inference_mode():
        for client in clients:
            logits = body(client.test_x) @ heads[:, :-1] + heads[:, -1:]  # [K, n, C]
            table.append((logits.argmax(dim=2).numpy() == client.test_y).mean(axis=1))
    return np.array(table)


def own_and_others(matrix: Floats) -> dict[str, float]:
    """Mean accuracy with the own head, with the neighbour's, and with anybody else's."""
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    neighbour = np.diagonal(np.roll(matrix, -1, axis=1))
    return {"own head": matrix.diagonal().mean(), "the neighbour's": neighbour.mean(), "anybody's": others.mean()}


def right_answers(last: Round, clients: Sequence[Client], heads: HeadSet) -> dict[str, dict[str, dict[str, Bools]]]:
    """Whether each sample is answered right: client -> split -> "own" (its head of ``heads``) or "shared" -> bool [n].

    Splits: "train"; "held_out" and "later", which are the two halves of the held-out samples.
    """
    body, shared = _standardised_body(last), last.model().get_submodule("head")
    found = {}
    with torch.inference_mode():
        for client, own in zip(clients, torch.from_numpy(heads.weights), strict=True):
            splits = {"train": (client.train_x, client.train_y)}
            splits |= {name: (client.test_x[i::2], client.test_y[i::2]) for i, name in enumerate(("held_out", "later"))}
            found[client.id] = {
                split: {
                    "own": (features @ own[:-1] + own[-1]).argmax(dim=1).numpy() == y,
                    "shared": shared(features).argmax(dim=1).numpy() == y,
                }
                for split, (features, y) in ((name, (body(x), y)) for name, (x, y) in splits.items() if len(y))
            }
    return found


def _standardised_body(last: Round) -> Callable[[Floats32], Tensor]:
    statistics, body = last.preprocessing, last.model().get_submodule("body")
    standardise = Preprocessor(mean=statistics["mean"], std=statistics["std"])
    return lambda rows: body(standardise(rows))


def main() -> None:
    """Measure every setting and write the table."""
    import pandas as pd
    from tqdm import tqdm

    low, high, step = CLIENTS
    few, many, by = SAMPLES
    settings = itertools.product(ALPHAS, range(low, high + 1, step), range(few, many + 1, by), (False, True))
    rows = {}
    for setting in tqdm(list(settings)):
        found = measure(*setting)
        rows[setting] = {f"{name}: {what}": found.loc[name, what] for name in found.index for what in COLUMNS}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(rows, names=["alpha", "clients", "samples", "private"])
    frame.to_csv(TABLE, float_format="%.3f")


if __name__ == "__main__":
    main()
