"""Clients and their data: real digits, dealt out unevenly.

Features stay as they were measured (digits: grey levels 0 to 16); training and serving standardise
them with the statistics that the clients computed together.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flserving.errors import ConfigError, InvalidInputError, check_number

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Indices = NDArray[np.int64]

HELD_OUT_SHARE = 0.3  # of each client's own samples
MIN_SAMPLES = 10  # of a client, both splits together


@dataclass(frozen=True, slots=True, eq=False)
class Client:
    """One client and its own samples: features float32 [n, D], labels int64 [n]; the test split is
    held out.

    Args:
        resolution: The smallest step that its features are measured in, if there is one: a spread
            below it means nothing, and is not blown up to 1 by standardising. 1 for the digits: one
            grey level.

    Raises:
        InvalidInputError: An array with another shape or dtype, no samples, a negative label, NaN
            or infinity.
    """

    id: str
    train_x: Features
    train_y: Labels
    test_x: Features
    test_y: Labels
    resolution: float = 0.0

    def __post_init__(self) -> None:
        splits = (
            ("train", self.train_x, self.train_y),
            ("test", self.test_x, self.test_y),
        )
        for split, x, y in splits:
            where = f"{split} split of client {self.id!r}"
            flat = x.ndim == 2 and x.dtype == np.float32
            if not flat or not x.size or not np.isfinite(x).all():
                raise InvalidInputError(
                    f"{where}: features are {x.dtype} {x.shape}; use finite float32 [n, D] with n, D >= 1"
                )
            if y.shape != x.shape[:1] or y.dtype != np.int64 or y.min() < 0:
                raise InvalidInputError(
                    f"{where}: labels are {y.dtype} {y.shape}; use int64 [{len(x)}], all >= 0"
                )
        if self.train_x.shape[1] != self.test_x.shape[1]:
            raise InvalidInputError(
                f"client {self.id!r} trains on {self.train_x.shape[1]} features and tests on {self.test_x.shape[1]}"
            )


def check_clients(clients: Sequence[Client]) -> None:
    """Raise ConfigError unless there is at least one client, and each has an id of its own."""
    ids = [client.id for client in clients]
    if not ids or len(set(ids)) < len(ids):
        raise ConfigError(f"clients are {ids[:5]}: give at least one, with unique ids")


@lru_cache(maxsize=1)
def digits() -> tuple[Features, Labels]:
    """Handwritten digits, 8 x 8 pixels: grey levels 0 to 16, float32 [1797, 64], and labels 0 to 9.
    Read-only.

    The same as scikit-learn's ``load_digits``; they lie in this package, so that nothing is
    downloaded. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI
    Machine Learning Repository, 1998 (test part), https://doi.org/10.24432/C50P49, licence CC BY
    4.0.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        features = stored["features"].astype(np.float32)
        labels = stored["labels"].astype(np.int64)
    features.flags.writeable = False
    labels.flags.writeable = False
    return features, labels


def dirichlet_partition(
    labels: Labels, num_clients: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    """Deal samples out to clients with label skew: each class is split in shares drawn from
    Dirichlet(alpha).

    With alpha = 0.1 most clients hold few classes, with alpha = 100 all hold nearly the same
    mixture. A client that got less than ``MIN_SAMPLES`` is given single samples of whoever then
    holds the most.

    Returns:
        Indices into ``labels`` for each client, ascending; every index is in exactly one of them.

    Raises:
        ConfigError: alpha outside [0.001, 1e6]; less than 1 client, or more than there are samples
            for.

    Source: Yurochkin et al., ICML 2019 (arXiv 1905.12022), split by class; Hsu et al. 2019 (arXiv
    1909.06335).
    """
    check_number("num_clients", num_clients, 1, len(labels) // MIN_SAMPLES, whole=True)
    check_number("alpha", alpha, 1e-3, 1e6)
    owner = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.cumsum(shares)[:-1] * len(members)
        parts = np.split(members, np.rint(cuts).astype(np.int64))
        for client, part in enumerate(parts):
            owner[part] = client
    counts = np.bincount(owner, minlength=num_clients)
    while counts.min() < MIN_SAMPLES:
        poorest = counts.argmin()
        richest = counts.argmax()
        given = rng.choice(np.flatnonzero(owner == richest))
        owner[given] = poorest
        counts[poorest] += 1
        counts[richest] -= 1
    return [np.flatnonzero(owner == client) for client in range(num_clients)]


def make_clients(
    features: Features,
    labels: Labels,
    *,
    num_clients: int = 20,
    alpha: float = 0.1,
    permute_labels: bool = False,
    seed: int = 0,
    resolution: float | None = None,
) -> tuple[Client, ...]:
    """Partition a data set by ``dirichlet_partition``; 30 % of each class that a client holds are
    held out.

    Args:
        features: float32 [N, D]. ``labels``: int64 [N], 0 to C - 1.
        permute_labels: Every client names the classes in its own way: concept shift, under which no
            single model can be right for all clients. Who holds which samples stays the same.
        seed: Same seed, same clients.
        resolution: See :class:`Client`. When not given: one grey level for rows of :func:`digits`,
            else 0.

    Raises:
        ConfigError: A setting out of range.
        InvalidInputError: Features or labels that a client cannot hold.
    """
    check_number("seed", seed, 0, math.inf, whole=True)
    if resolution is None:
        known, _ = digits()
        resolution = 0.0
        if features is known or features.base is known:
            resolution = 1.0
    # two, so that naming does not change who holds what
    rng, naming_rng = np.random.default_rng(seed).spawn(2)
    classes = int(labels.max()) + 1
    naming = _namings(classes, naming_rng)
    clients = []
    for number, indices in enumerate(dirichlet_partition(labels, num_clients, alpha, rng)):
        name = next(naming) if permute_labels else np.arange(classes)
        train, test = _hold_out(rng.permutation(indices), labels)
        clients.append(
            Client(
                id=f"client-{number:02d}",
                train_x=features[train],
                train_y=name[labels[train]],
                test_x=features[test],
                test_y=name[labels[test]],
                resolution=resolution,
            )
        )
    return tuple(clients)


def _hold_out(indices: Indices, labels: Labels) -> tuple[Indices, Indices]:
    """Split one client's shuffled samples into train and test, class by class: a class that it
    holds once is trained on, so that no small client is tested on what it could not learn."""
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
    """Endless permutations of the labels, balanced: in each block of ``classes`` of them, every
    class gets every name once (a random Latin square). With independent ones, how right one model
    is for all would be the luck of the draw.
    """
    while True:
        rows = rng.permutation(classes)
        names = rng.permutation(classes)
        for shift in range(classes):
            yield names[(rows + shift) % classes]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What a client sends of its features, and no sample: their number, their mean, and their
    distance from it.

    Sums of squares would be as short, but ``E[x^2] - E[x]^2`` cancels where the mean is large
    beside the spread. These are exact up to rounding at any offset, and exactly 0 for a constant.

    Args:
        count: Samples. ``mean``: float64 [D]. ``m2``: summed squared deviations from that mean,
            float64 [D].

    Source: Chan, Golub and LeVeque, The American Statistician 37(3), 1983.
    """

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @classmethod
    def of(cls, features: Features) -> "Moments":
        """Those of float32 [n, D], n >= 1, in two passes."""
        x = features.astype(np.float64)  # in which the sum of n equal float32 numbers is exact
        mean = x.mean(axis=0)
        away = x - mean
        off = away.sum(axis=0)  # what the mean is off
        m2 = (away * away).sum(axis=0) - off**2 / len(x)
        return cls(len(x), mean, np.maximum(m2, 0.0))

    def merged(self, other: "Moments") -> "Moments":
        """Those of both clients' samples together."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = apart * apart * (self.count * other.count / count)
        m2 = self.m2 + other.m2 + between
        return Moments(count, mean, m2)

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviations, [D]."""
        return np.sqrt(self.m2 / self.count)

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Which features do not vary, but for rounding, [D]: judged by their own size, so the unit
        does not matter.

        Source: scikit-learn's StandardScaler (``_is_constant_feature``), after the same paper.
        """
        eps = float(np.finfo(np.float64).eps)
        variance = self.m2 / self.count
        rounding = self.count * eps * variance + (self.count * eps * self.mean) ** 2
        tiny = self.std < np.finfo(np.float32).tiny
        return (variance <= rounding) | tiny


def federated_statistics(
    clients: Sequence[Client], min_std: float | None = None
) -> dict[str, list[float]]:
    """Mean and standard deviation of each feature over all training splits: ``{"mean": [D], "std":
    [D]}``.

    A client sends its :class:`Moments` (2 D + 1 numbers) and no sample; the server merges them.
    What it gets equals the statistics of the pooled data. The answer fits
    ``Registry.publish(preprocessing=...)`` and ``create_serving_pipeline(feature_stats=...)``.

    Features may be in any unit. One that is the same everywhere gets 1: it is centred and left
    unscaled, as by scikit-learn's StandardScaler. One that varies at a single client varies.

    Args:
        min_std: Floor of every standard deviation, in the features' unit; the clients'
            ``resolution`` when not given. A pixel that is black but for one sample has a tiny one:
            divided by it, the next stray dot would be 100 sigma.

    Raises:
        ConfigError: min_std is not a number > 0.
        InvalidInputError: No clients, or clients with different features.
    """
    if min_std is not None:
        check_number("min_std", min_std, sys.float_info.min, sys.float_info.max)
    widths = {client.train_x.shape[1] for client in clients}
    if len(widths) != 1:
        raise InvalidInputError(
            f"clients have rows of {sorted(widths)} features: give at least one client, and all the same"
        )
    pooled = reduce(Moments.merged, (Moments.of(client.train_x) for client in clients))
    if min_std is None:
        floor = max(client.resolution for client in clients)
        std = np.maximum(pooled.std, floor)
        std = np.where(pooled.constant, 1.0, std)
    else:
        std = np.maximum(pooled.std, min_std)
    return {"mean": pooled.mean.tolist(), "std": std.tolist()}
