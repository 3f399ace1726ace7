"""Personal heads for a finished training: fitted on the frozen global model, each with its client's
own samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flserving import models
from flserving.errors import InvalidInputError, check_number
from flserving.federated.data import Client, check_clients
from flserving.federated.rounds import Recipe, Round, Run
from flserving.federated.training import seed_of
from flserving.models import SplitModel, as_split
from flserving.models.processing import Preprocessor
from flserving.registry.heads import HeadSet, Layout, neutral_head, trained_on_state


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """Heads, and what they are worth: held-out accuracy by client id, with its own head and with
    the global one."""

    heads: HeadSet
    accuracy: Mapping[str, float]
    global_accuracy: Mapping[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """``mean_client_accuracy`` and ``worst_client_accuracy`` with the heads, for
        ``Registry.publish``."""
        values = list(self.accuracy.values())
        return {
            "mean_client_accuracy": sum(values) / len(values),
            "worst_client_accuracy": min(values),
        }


def fit_heads(
    trained: Run | Round,
    layout: Layout = "head",
    *,
    clients: Sequence[Client] | None = None,
    epochs: int = 20,
    learning_rate: float | None = None,
    seed: int | None = None,
) -> Fitted:
    """Fit one head per client; the global model stays as it is.

    ``head`` starts at the global head (fine-tuning: the base line of Collins et al., ICML 2021).
    ``additive`` starts at zero and is added to the generic logits (the personal part of FedROD,
    Chen and Chao, ICLR 2022, fitted afterwards instead of along with the body). ``adapter`` is an
    affine map of the generic logits that starts at the identity (matrix scaling, Guo et al., ICML
    2017). So with 0 epochs every layout answers as the global model does, and at any time
    ``additive`` as ``head`` does: it holds the difference.

    Args:
        trained: A run (its last round), or a round; then ``clients`` must be given.
        clients: Those who get a head; they may have taken no part in the training.
        learning_rate, seed: The training's own where not given, as is the batch size; another
            framework's round has none of them, and gets the defaults of ``Recipe``.

    Raises:
        ConfigError: No clients, the same one twice, or a setting out of range.
        InvalidModelError: The model has no body and linear head.
        InvalidInputError: Samples that the model does not take.

    Cost: mini-batch SGD on a linear layer over features that are computed once: about 3 ms a client
    on digits.
    """
    if isinstance(trained, Run):
        clients = trained.clients if clients is None else clients
        trained = trained.final
    clients = clients or ()
    check_clients(clients)
    check_number("epochs", epochs, 0, 1_000, whole=True)
    recipe = trained.recipe if isinstance(trained.recipe, Recipe) else Recipe()
    if learning_rate is not None:
        recipe = replace(recipe, learning_rate=learning_rate)
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    model = as_split(trained.model())
    shape, _ = models.signature(trained.recipe.architecture, trained.recipe.parameters)
    standardise = Preprocessor(
        mean=trained.preprocessing["mean"],
        std=trained.preprocessing["std"],
        input_shape=shape,
    )
    start = torch.from_numpy(neutral_head(layout, trained.state))
    heads = []
    own = {}
    generic = {}
    with torch.inference_mode():
        for number, client in enumerate(clients):
            train_y = torch.from_numpy(client.train_y)
            test_y = torch.from_numpy(client.test_y)
            if max(train_y.max(), test_y.max()) >= start.shape[1]:
                raise InvalidInputError(
                    f"client {client.id!r} has labels over {start.shape[1] - 1}: the model has none"
                )
            order = torch.Generator().manual_seed(seed_of(recipe.seed, number))
            inputs, offset, _ = _views(model, layout, standardise(client.train_x))
            head = start.clone()
            for _ in range(epochs):
                shuffled = torch.randperm(len(train_y), generator=order)
                for batch in torch.split(shuffled, recipe.batch_size):
                    _descend(
                        head, inputs[batch], offset[batch], train_y[batch], recipe.learning_rate
                    )
            heads.append(head.numpy())
            inputs, offset, logits = _views(model, layout, standardise(client.test_x))
            own[client.id] = _accuracy(inputs @ head + offset, test_y)
            generic[client.id] = _accuracy(logits, test_y)
    digest = trained_on_state(layout, trained.state)
    named = HeadSet(layout, list(own), np.stack(heads), digest)
    return Fitted(named, own, generic)


def _views(model: SplitModel, layout: Layout, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a head multiplies (with a one for the bias), what is added to that, and the generic
    logits."""
    features = model.body(rows)
    logits = model.head(features)
    inputs = features
    offset = torch.zeros_like(logits)
    if layout == "adapter":
        inputs = logits
    if layout == "additive":
        offset = logits
    ones = torch.ones(len(rows), 1)
    return torch.cat([inputs, ones], dim=1), offset, logits


def _descend(head: Tensor, x: Tensor, offset: Tensor, y: Tensor, rate: float) -> None:
    """A step on the cross entropy of ``x W + offset``, in place: its gradient is x' (softmax -
    one-hot) / n."""
    error = torch.softmax(x @ head + offset, dim=1)
    error[torch.arange(len(y)), y] -= 1
    head.addmm_(x.T, error, alpha=-rate / len(y))


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    right = logits.argmax(dim=1) == labels
    return float(right.float().mean())
