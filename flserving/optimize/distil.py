"""A module learns to answer as another one does, on rows or over federated clients."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flserving.errors import ConfigError, InvalidInputError
from flserving.federated.aggregation import aggregate
from flserving.federated.data import Client
from flserving.federated.training import _isolated
from flserving.models.processing import Preprocessor

Data: TypeAlias = Sequence[Client] | NDArray[Any]  # of clients the training rows; or rows [n, D] as callers send them
_BATCH = 32


def rows_of(data: Data, preprocessor: Preprocessor) -> list[Tensor]:
    """Standardised rows, one tensor for each client. Raises InvalidInputError: there are none, or of another width."""
    parts = [data] if isinstance(data, np.ndarray) else [client.train_x for client in data]
    if not parts or not all(len(part) for part in parts):
        raise InvalidInputError("data holds no rows: give rows [n, D], or clients with samples")
    return [preprocessor(part) for part in parts]


def taught(
    student: nn.Module, teacher: nn.Module, data: Data, preprocessor: Preprocessor, *, epochs: int, rate: float,
    seed: int, temperature: float = 4.0, label_share: float = 0.0, rounds: int = 1,
    masks: Mapping[str, Tensor] | None = None,
) -> nn.Module:  # fmt: skip
    """``student`` after it learnt from ``teacher`` on each client's rows, averaged by samples after every round.

    ``masks``: weights by name that are multiplied by zeros and ones after every step.

    Raises:
        ConfigError: A setting out of range, or labels wanted of bare rows.
    """
    sound = 0 < temperature <= 1e3 and 0 <= label_share <= 1 and 0 < rate <= 1
    if not sound or any(type(n) is not int or not 1 <= n <= 10_000 for n in (rounds, epochs)):
        raise ConfigError(
            f"temperature {temperature!r}, label_share {label_share!r}, learning_rate {rate!r}, rounds {rounds!r}, "
            f"epochs {epochs!r}: use values in (0, 1000], [0, 1], (0, 1], and 1 to 10,000 of the last two"
        )
    if label_share and isinstance(data, np.ndarray):
        raise ConfigError(f"label_share is {label_share}, but bare rows have no labels: give clients, or 0")
    rows = rows_of(data, preprocessor)
    labels = [None] * len(rows) if isinstance(data, np.ndarray) else [torch.from_numpy(it.train_y) for it in data]
    with _isolated():
        torch.manual_seed(seed)
        with torch.no_grad():
            soft = [torch.softmax(teacher.eval()(x) / temperature, dim=1) for x in rows]
        student.train().requires_grad_(True)
        state = {name: value.detach().clone() for name, value in student.state_dict().items()}
        for _ in range(rounds):
            updates = []
            for x, told, y in zip(rows, soft, labels, strict=True):
                student.load_state_dict(state)
                _learn(student, x, told, y, epochs, rate, temperature, label_share, masks or {})
                updates.append({name: value.detach().clone() for name, value in student.state_dict().items()})
            state = aggregate(updates, [len(x) for x in rows])
        student.load_state_dict(state)
    return student


def _learn(
    student: nn.Module, x: Tensor, soft: Tensor, labels: Tensor | None, epochs: int, rate: float, temperature: float,
    label_share: float, masks: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Adam on mini-batches. T^2 keeps the soft term's gradients as large as the hard one's (Hinton et al., section 2).

    The cross entropy to soft targets differs from their Kullback-Leibler divergence by what no weight can change.
    """
    weights = dict(student.named_parameters())
    optimiser = torch.optim.Adam(weights.values(), rate)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(x)), _BATCH):
            logits = student(x[batch])
            loss = temperature**2 * cross_entropy(logits / temperature, soft[batch])
            if label_share and labels is not None:
                loss = (1 - label_share) * loss + label_share * cross_entropy(logits, labels[batch])
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight.grad = gradient
            optimiser.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    weights[name].mul_(mask)
