"""What a federated server does with the updates that arrive: it refuses the faulty ones and
averages the others."""

from collections.abc import Mapping, Sequence, Set
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]
"""The tensors of a model by name, as ``module.state_dict()`` gives them."""


def aggregate(
    updates: Sequence[State],
    weights: Sequence[float],
) -> State:
    """Federated averaging: the weighted mean of every tensor.

    Args:
        updates: One state of each client, at least one; all have the same names and shapes (see
            :func:`fault`).
        weights: One number >= 0 of each client, usually its number of training samples; their sum
            is > 0.

    Returns:
        The mean state. Each tensor has the dtype of the first update; means of integers, such as
        the step counters of a layer, are rounded.

    Raises:
        ValueError: ``updates`` and ``weights`` differ in length.

    Example:
        >>> one = {"weight": torch.tensor([0.0, 1.0])}
        >>> other = {"weight": torch.tensor([4.0, 5.0])}
        >>> aggregate([one, other], weights=[30, 10])
        {'weight': tensor([1., 2.])}

    Cost: one pass over every tensor; sums are kept in float64.
    Source: McMahan et al., AISTATS 2017 (arXiv 1602.05629), algorithm 1: w <- sum_k (n_k / n) w_k.
    """
    total = float(sum(weights))
    means: State = {}
    for name, first in updates[0].items():
        mean = torch.zeros_like(first, dtype=torch.float64)
        for update, weight in zip(updates, weights, strict=True):
            share = weight / total
            tensor = update[name].detach()
            mean += share * tensor.double()
        if not first.is_floating_point():
            mean = mean.round()
        means[name] = mean.to(first.dtype)
    return means


def fault(
    update: object,
    expected: State,
) -> str | None:
    """Say why an update cannot be averaged, or None if it can.

    A sound update has the tensors of ``expected``: the same names, dtypes, shapes, layouts and
    devices. All its numbers are finite. The reason is short whatever arrived, because it goes into
    the lineage of a version.

    Example:
        >>> expected = {"weight": torch.zeros(2)}
        >>> fault({"weight": torch.ones(2)}, expected)
        >>> fault({"weight": torch.ones(3)}, expected)
        'weight is float32 [3] strided on cpu, expected float32 [2] strided on cpu'
        >>> fault({"weight": torch.tensor([1.0, float("nan")])}, expected)
        'weight holds NaN or infinite values'
    """
    if not isinstance(update, Mapping):
        return f"no state dict arrived, but {type(update).__name__}"
    names = update.keys()
    if names != expected.keys():
        missing = _some(expected.keys() - names)
        unknown = _some(names - expected.keys())
        return f"missing tensors {missing}, unknown {unknown}"
    for name, wanted in expected.items():
        tensor = update[name]
        if not isinstance(tensor, Tensor):
            return f"{name} is a {type(tensor).__name__}, not a tensor"
        kind = _kind(tensor)
        right = _kind(wanted)
        if kind != right:
            return f"{name} is {kind}, expected {right}"
        if not tensor.isfinite().all():
            return f"{name} holds NaN or infinite values"
    return None


def _some(names: Set[object]) -> list[str]:
    """Three names at most, 40 characters of each."""
    short = sorted(str(name)[:40] for name in names)
    return short[:3]


def _kind(tensor: Tensor) -> str:
    shape = list(tensor.shape)
    text = f"{tensor.dtype} {shape} {tensor.layout} on {tensor.device}"
    return text.replace("torch.", "")
