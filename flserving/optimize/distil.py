"""A module learns to answer as another one does, on rows or over federated clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flserving.errors import ConfigError, InvalidInputError
from flserving.federated.aggregation import aggregate
from flserving.federated.data import Client
from flserving.federated.training import copied, isolated
from flserving.models.processing import Preprocessor

# of clients the training rows; or rows [n, D] as callers send them
Data: TypeAlias = Sequence[Client] | NDArray[Any]
_BATCH = 32


def rows_of(data: Data, preprocessor: Preprocessor) -> list[Tensor]:
    """Standardised rows, one tensor for each client. Raises InvalidInputError: there are none, or
    of another width."""
    parts = [data] if isinstance(data, np.ndarray) else [client.train_x for client in data]
    if not parts or not all(len(part) for part in parts):
        raise InvalidInputError("data holds no rows: give rows [n, D], or clients with samples")
    return [preprocessor(part) for part in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """How a student learns: ``epochs`` of Adam on each client's rows in each of ``rounds`` rounds.

    Raises:
        ConfigError: A setting out of range.
    """

    temperature: float = 4.0
    label_share: float = 0.0
    rounds: int = 1
    epochs: int = 60
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        sound = (
            0 < self.temperature <= 1e3
            and 0 <= self.label_share <= 1
            and 0 < self.learning_rate <= 1
        )
        for count in (self.rounds, self.epochs):
            sound &= type(count) is int and 1 <= count <= 10_000
        if not sound:
            raise ConfigError(
                f"temperature {self.temperature!r}, label_share {self.label_share!r}, learning_rate "
                f"{self.learning_rate!r}, rounds {self.rounds!r}, epochs {self.epochs!r}: use values in (0, 1000], "
                "[0, 1], (0, 1], and 1 to 10,000 of the last two"
            )


def taught(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    preprocessor: Preprocessor,
    lesson: Lesson,
    masks: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """``student`` after it learnt from ``teacher`` on each client's rows, averaged by samples after
    every round.

    ``masks``: weights by name that are multiplied by zeros and ones after every step.

    Raises:
        ConfigError: Labels wanted of bare rows.
    """
    if lesson.label_share and isinstance(data, np.ndarray):
        raise ConfigError(
            f"label_share is {lesson.label_share}, but bare rows have no labels: give clients, or 0"
        )
    rows = rows_of(data, preprocessor)
    labels: list[Tensor | None] = [None] * len(rows)
    if not isinstance(data, np.ndarray):
        labels = [torch.from_numpy(client.train_y) for client in data]
    with isolated():
        torch.manual_seed(lesson.seed)
        with torch.no_grad():
            teacher.eval()
            soft = [torch.softmax(teacher(x) / lesson.temperature, dim=1) for x in rows]
        student.train().requires_grad_(True)
        state = copied(student.state_dict())
        for _ in range(lesson.rounds):
            updates = []
            for x, answers, y in zip(rows, soft, labels, strict=True):
                student.load_state_dict(state)
                _learn(student, x, answers, y, lesson, masks or {})
                updates.append(copied(student.state_dict()))
            state = aggregate(updates, [len(x) for x in rows])
        student.load_state_dict(state)
    return student


def _learn(
    student: nn.Module,
    x: Tensor,
    soft: Tensor,
    labels: Tensor | None,
    lesson: Lesson,
    masks: Mapping[str, Tensor],
) -> None:
    """Adam on mini-batches. T^2 keeps the soft term's gradients as large as the hard one's (Hinton
    et al., section 2).

    The cross entropy to soft targets differs from their Kullback-Leibler divergence by what no
    weight can change.
    """
    temperature = lesson.temperature
    share = lesson.label_share
    weights = dict(student.named_parameters())
    optimiser = torch.optim.Adam(weights.values(), lesson.learning_rate)
    for _ in range(lesson.epochs):
        for batch in torch.split(torch.randperm(len(x)), _BATCH):
            logits = student(x[batch])
            loss = temperature**2 * cross_entropy(logits / temperature, soft[batch])
            if share and labels is not None:
                loss = (1 - share) * loss + share * cross_entropy(logits, labels[batch])
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight.grad = gradient
            optimiser.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    weights[name].mul_(mask)
