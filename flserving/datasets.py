"""Clients and their data: real digits, dealt out unevenly. Imports ``errors`` only.

Features stay as they were measured (digits: grey levels 0 to 16); training and serving standardise them with the
statistics that the clients computed together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from flserving.errors import ConfigError, InvalidInputError

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Indices = NDArray[np.int64]

HELD_OUT_SHARE = 0.3  # of each client's own samples
MIN_SAMPLES = 10  # of a client, both splits together


@dataclass(frozen=True, slots=True, eq=False)
class Client:
    """One client and its own samples: features float32 [n, D], labels int64 [n]; the test split is held out.

    Raises:
        InvalidInputError: An array with another shape or dtype, no samples, a negative label, NaN or infinity.
    """

    id: str
    train_x: Features
    train_y: Labels
    test_x: Features
    test_y: Labels

    def __post_init__(self) -> None:
        for split, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            where = f"{split} split of client {self.id!r}"
            if x.ndim != 2 or x.dtype != np.float32 or not x.size or not np.isfinite(x).all():
                raise InvalidInputError(
                    f"{where}: features are {x.dtype} {x.shape}; use finite float32 [n, D] with n, D >= 1"
                )
            if y.shape != x.shape[:1] or y.dtype != np.int64 or y.min() < 0:
                raise InvalidInputError(f"{where}: labels are {y.dtype} {y.shape}; use int64 [{len(x)}], all >= 0")
        if self.train_x.shape[1] != self.test_x.shape[1]:
            raise InvalidInputError(
                f"client {self.id!r} trains on {self.train_x.shape[1]} features and tests on {self.test_x.shape[1]}"
            )


@lru_cache(maxsize=1)
def digits() -> tuple[Features, Labels]:
    """scikit-learn's handwritten digits: grey levels 0 to 16, float32 [1797, 64], and labels 0 to 9. Read-only.

    Ships inside scikit-learn, so nothing is downloaded. Source: Alpaydin and Kaynak, UCI repository, 1998 (test part).
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    features, labels = x.astype(np.float32), y.astype(np.int64)
    features.flags.writeable = labels.flags.writeable = False
    return features, labels


def dirichlet_partition(labels: Labels, num_clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    """Deal samples out to clients with label skew: each class is split in shares drawn from Dirichlet(alpha).

    With alpha = 0.1 most clients hold few classes, with alpha = 100 all hold nearly the same mixture. A client that
    got less than ``MIN_SAMPLES`` is given single samples of whoever then holds the most.

    Returns:
        Indices into ``labels`` for each client, ascending; every index is in exactly one of them.

    Raises:
        ConfigError: alpha outside [0.001, 1e6]; less than 1 client, or more than there are samples for.

    Source: Yurochkin et al., ICML 2019 (arXiv 1905.12022), split by class; Hsu et al. 2019 (arXiv 1909.06335).
    """
    _check(num_clients, alpha, len(labels))
    owner = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1] * len(members)
        for client, part in enumerate(np.split(members, np.rint(cuts).astype(np.int64))):
            owner[part] = client
    counts = np.bincount(owner, minlength=num_clients)
    while counts.min() < MIN_SAMPLES:
        poorest, richest = counts.argmin(), counts.argmax()
        owner[rng.choice(np.flatnonzero(owner == richest))] = poorest
        counts[poorest] += 1
        counts[richest] -= 1
    return [np.flatnonzero(owner == client) for client in range(num_clients)]


def _check(num_clients: int, alpha: float, num_samples: int) -> None:
    most = num_samples // MIN_SAMPLES
    if isinstance(num_clients, bool) or not isinstance(num_clients, int) or not 1 <= num_clients <= most:
        raise ConfigError(
            f"num_clients is {num_clients!r}: use an integer in [1, {most}], "
            f"so that each of them gets {MIN_SAMPLES} of the {num_samples} samples"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 1e-3 <= alpha <= 1e6:
        raise ConfigError(f"alpha is {alpha!r}: use a number in [0.001, 1e6]; 0.1 is very uneven, 100 nearly even")


def make_clients(
    features: Features,
    labels: Labels,
    *,
    num_clients: int = 20,
    alpha: float = 0.1,
    permute_labels: bool = False,
    seed: int = 0,
) -> tuple[Client, ...]:
    """Partition a data set by ``dirichlet_partition``; 30 % of each class that a client holds are held out.

    Args:
        features: float32 [N, D]. ``labels``: int64 [N], 0 to C - 1.
        permute_labels: Every client names the classes in its own way: concept shift, under which no single model can
            be right for all clients. Who holds which samples stays the same.
        seed: Same seed, same clients.

    Raises:
        ConfigError: A setting out of range. InvalidInputError: Features or labels that a client cannot hold.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed is {seed!r}: use an integer >= 0")
    rng, naming_rng = np.random.default_rng(seed).spawn(2)  # two, so that naming does not change who holds what
    classes = int(labels.max()) + 1
    naming = _namings(classes, naming_rng)
    clients = []
    for number, indices in enumerate(dirichlet_partition(labels, num_clients, alpha, rng)):
        name = next(naming) if permute_labels else np.arange(classes)
        train, test = _hold_out(rng.permutation(indices), labels)
        clients.append(
            Client(f"client-{number:02d}", features[train], name[labels[train]], features[test], name[labels[test]])
        )
    return tuple(clients)


def _hold_out(indices: Indices, labels: Labels) -> tuple[Indices, Indices]:
    """Split one client's shuffled samples into train and test, class by class: a class that it holds once is trained
    on, so that no small client is tested on what it could not learn."""
    position = np.empty(len(indices), dtype=np.int64)  # of a sample among those of its class
    held_out = np.empty(len(indices), dtype=np.int64)
    for label in np.unique(labels[indices]):
        members = labels[indices] == label
        position[members] = np.arange(members.sum())
        held_out[members] = int(HELD_OUT_SHARE * members.sum() + 0.5)
    test = position < held_out
    test[0] |= not test.any()  # every class only once: test on one sample all the same
    return indices[~test], indices[test]


def _namings(classes: int, rng: np.random.Generator) -> Iterator[Labels]:
    """Endless permutations of the labels, balanced: in each block of ``classes`` of them, every class gets every name
    once (a random Latin square). With independent ones, how right one model is for all would be the luck of the draw.
    """
    while True:
        rows, names = rng.permutation(classes), rng.permutation(classes)
        for shift in range(classes):
            yield names[(rows + shift) % classes]


def federated_statistics(clients: Sequence[Client], min_std: float = 1.0) -> dict[str, list[float]]:
    """Mean and standard deviation of each feature over all training splits: ``{"mean": [D], "std": [D]}``.

    A client sends three sums (samples, x, x squared: 2 D + 1 numbers) and no sample; the server adds them up. What it
    gets equals the statistics of the pooled data. The answer fits ``Registry.publish(preprocessing=...)`` and
    ``create_serving_pipeline(feature_stats=...)``.

    Args:
        min_std: Floor of every standard deviation. A pixel that is black but for one sample has a tiny one: divided by
            it, the next stray dot would be 100 sigma. The default, 1, is one grey level of the digits.

    Raises:
        ConfigError: min_std is not a number > 0. InvalidInputError: No clients, or clients with different features.
    """
    if not (isinstance(min_std, int | float) and isfinite(min_std) and min_std > 0):
        raise ConfigError(f"min_std is {min_std!r}: use a number > 0")
    widths = {client.train_x.shape[1] for client in clients}
    if len(widths) != 1:
        raise InvalidInputError(
            f"clients have rows of {sorted(widths)} features: give at least one client, and all the same"
        )
    count, (width,) = 0, widths
    total, squares = np.zeros(width), np.zeros(width)
    for client in clients:
        x = client.train_x.astype(np.float64)  # in float32 the difference below would cancel
        count, total, squares = count + len(x), total + x.sum(axis=0), squares + (x * x).sum(axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean * mean, 0.0))
    return {"mean": mean.tolist(), "std": np.maximum(std, min_std).tolist()}
