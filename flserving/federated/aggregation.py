"""What a federated server does with the updates that arrive: refuse the faulty ones, average the others."""

from collections.abc import Mapping, Sequence, Set
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]


def aggregate(updates: Sequence[State], weights: Sequence[float]) -> State:
    """The weighted mean of every tensor, summed up in float64; integers (a layer's counters) are rounded.

    Source: McMahan et al. 2017, algorithm 1: w <- sum_k (n_k / n) w_k.
    """
    total = float(sum(weights))
    means: State = {}
    for name, first in updates[0].items():
        mean = torch.zeros_like(first, dtype=torch.float64)
        for update, weight in zip(updates, weights, strict=True):
            mean += update[name].detach().double() * (weight / total)
        means[name] = (mean if first.is_floating_point() else mean.round()).to(first.dtype)
    return means


def fault(update: object, expected: State) -> str | None:
    """Why an update cannot be averaged, or None: it must have the tensors of ``expected``, and finite ones.

    The reason is short whatever arrived, since it goes into a version's lineage.
    """
    if not isinstance(update, Mapping):
        return f"no state dict arrived, but {type(update).__name__}"
    if update.keys() != expected.keys():
        missing = expected.keys() - update.keys()
        unknown = update.keys() - expected.keys()
        return f"missing tensors {_some(missing)}, unknown {_some(unknown)}"
    for name, wanted in expected.items():
        tensor = update[name]
        if not isinstance(tensor, Tensor):
            return f"{name} is a {type(tensor).__name__}, not a tensor"
        if _kind(tensor) != _kind(wanted):
            return f"{name} is {_kind(tensor)}, expected {_kind(wanted)}"
        if not tensor.isfinite().all():
            return f"{name} holds NaN or infinite values"
    return None


def reason_of(error: Exception) -> str:
    """Why a client's training failed, in one short line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[:200]


def _some(names: Set[object]) -> list[str]:
    return sorted(str(name)[:40] for name in names)[:3]


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {tensor.layout} on {tensor.device}".replace("torch.", "")
