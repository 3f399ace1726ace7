"""Personal heads for a finished training: fitted on the frozen global model, each with its client's own samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flserving import models
from flserving.errors import ConfigError, InvalidInputError
from flserving.federated.data import Client
from flserving.federated.rounds import Recipe, Round, Run
from flserving.models import as_split
from flserving.models.processing import Preprocessor
from flserving.registry.heads import HeadSet, Layout, neutral_head, trained_on_state


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """Heads, and what they are worth: held-out accuracy by client id, with its own head and with the global one."""

    heads: HeadSet
    accuracy: Mapping[str, float]
    global_accuracy: Mapping[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """``mean_client_accuracy`` and ``worst_client_accuracy`` with the heads, for ``Registry.publish``."""
        values = list(self.accuracy.values())
        return {"mean_client_accuracy": sum(values) / len(values), "worst_client_accuracy": min(values)}


def fit_heads(
    trained: Run | Round, layout: Layout = "head", *, clients: Sequence[Client] | None = None,
    epochs: int = 20, learning_rate: float | None = None, seed: int | None = None,
) -> Fitted:  # fmt: skip
    """Fit one head per client; the global model stays as it is.

    ``head`` starts at the global head (fine-tuning: the base line of Collins et al., ICML 2021). ``additive`` starts at
    zero and is added to the generic logits (the personal part of FedROD, Chen and Chao, ICLR 2022, fitted afterwards
    instead of along with the body). ``adapter`` is an affine map of the generic logits that starts at the identity
    (matrix scaling, Guo et al., ICML 2017). So with 0 epochs every layout answers as the global model does,
    and at any time ``additive`` as ``head`` does: it holds the difference.

    Args:
        trained: A run (its last round), or a round; then ``clients`` must be given.
        clients: Who gets a head: also clients that took no part in the training.
        learning_rate, seed: The training's own where not given, as is the batch size; another framework's round has
            none of them, and gets the defaults of ``Recipe``.

    Raises:
        ConfigError: No clients, the same one twice, or a setting out of range. InvalidModelError: The model has no body
        and linear head. InvalidInputError: Samples that the model does not take.

    Cost: mini-batch SGD on a linear layer over features that are computed once: about 3 ms a client on digits.
    """
    last = trained.final if isinstance(trained, Run) else trained
    if clients is None:
        clients = trained.clients if isinstance(trained, Run) else ()
    if not clients or len({client.id for client in clients}) < len(clients):
        raise ConfigError(f"clients are {[client.id for client in clients][:5]}: give at least one, with unique ids")
    recipe = last.recipe if isinstance(last.recipe, Recipe) else Recipe()
    rate = recipe.learning_rate if learning_rate is None else learning_rate
    if type(epochs) is not int or not 0 <= epochs <= 1000 or not _is_rate(rate):
        raise ConfigError(f"epochs is {epochs!r}, learning_rate {rate!r}: use 0 to 1000 epochs, a rate in (0, 1000]")
    model = as_split(last.model())
    start = neutral_head(layout, last.state)
    shape, _ = models.signature(last.recipe.architecture, last.recipe.parameters)
    standardise = Preprocessor(mean=last.preprocessing["mean"], std=last.preprocessing["std"], input_shape=shape)
    heads = []
    own = {}
    generic = {}

    def views(x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> tuple[Tensor, Tensor, Tensor]:
        """What a head multiplies (a one for the bias included), what is added, and the generic logits."""
        features = model.body(standardise(x))
        logits = model.head(features)
        inputs = logits if layout == "adapter" else features
        offset = logits if layout == "additive" else torch.zeros(())
        return torch.cat([inputs, torch.ones(len(x), 1)], dim=1), offset, logits

    with torch.inference_mode():
        for number, client in enumerate(clients):
            if max(client.train_y.max(), client.test_y.max()) >= start.shape[1]:
                raise InvalidInputError(
                    f"client {client.id!r} has labels over {start.shape[1] - 1}: the model has none"
                )
            x, offset, _ = views(client.train_x)
            order = torch.Generator().manual_seed(
                int(np.random.SeedSequence([recipe.seed if seed is None else seed, number]).generate_state(1)[0])
            )
            head = _descend(x, offset, torch.from_numpy(client.train_y), start, epochs, rate, recipe.batch_size, order)
            heads.append(head.numpy())
            x, offset, logits = views(client.test_x)
            labels = torch.from_numpy(client.test_y)
            own[client.id] = _accuracy(x @ head + offset, labels)
            generic[client.id] = _accuracy(logits, labels)
    named = HeadSet(layout, list(own), np.stack(heads), trained_on_state(layout, last.state))
    return Fitted(named, own, generic)


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value <= 1e3


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).float().mean())


def _descend(
    x: Tensor, offset: Tensor, y: Tensor, start: Tensor, epochs: int, rate: float, size: int, order: torch.Generator
) -> Tensor:
    """Mini-batch SGD on the cross entropy of ``x W + offset``: its gradient is x' (softmax - one-hot) / n."""
    head = start.clone()
    offset = offset.expand(len(y), start.shape[1])
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(y), generator=order), size):
            error = torch.softmax(x[batch] @ head + offset[batch], dim=1)
            error[torch.arange(len(batch)), y[batch]] -= 1
            head.addmm_(x[batch].T, error, alpha=-rate / len(batch))
    return head
