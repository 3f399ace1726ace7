"""Federated rounds in plain torch: short, seeded, and good enough to make models worth serving.

In one round every client trains the model on its own samples; the server checks what arrives and
averages it. The ``STRATEGIES`` differ only in what a client keeps for itself and in what order it
trains.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, TypeAlias, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from flserving import models
from flserving.errors import ConfigError, InvalidModelError, ModelExecutionError
from flserving.federated import data
from flserving.federated.aggregation import State, aggregate, fault
from flserving.federated.data import Client
from flserving.federated.rounds import STRATEGIES, Recipe, Round, Run, Statistics
from flserving.models.processing import Preprocessor

Corrupt: TypeAlias = Callable[[str, int, State], Any]
Average: TypeAlias = Callable[[Sequence[State], Sequence[float]], State]
_PARTITION = {"num_clients": 20, "alpha": 0.1, "permute_labels": False}


class Options(TypedDict, total=False):
    """Settings of :func:`train`: those of :class:`Recipe`, and how ``make_clients`` parts the
    digits."""

    rounds: int
    local_epochs: int
    batch_size: int
    learning_rate: float
    architecture: str
    parameters: models.Parameters | None
    seed: int
    num_clients: int
    alpha: float
    permute_labels: bool


def train(
    strategy: str = "fedavg",
    *,
    clients: Sequence[Client] | None = None,
    preprocessing: Statistics | None = None,
    corrupt: Corrupt | None = None,
    on_round: Callable[[Round], object] | None = None,
    average: Average = aggregate,
    progress: bool = True,
    **options: Unpack[Options],
) -> Run:
    """Train a model over clients, by default on handwritten digits; every client takes part in
    every round.

    Args:
        strategy: One of ``STRATEGIES``. Clients run SGD without momentum on the cross entropy.
        clients: Clients of your own; leave the partition's options (below) as they are then.
        preprocessing: ``{"mean": [D], "std": [D]}`` to standardise with; by default what the
            clients' sums give.
        corrupt: Stands between client and server: ``(client_id, round, update) -> update``. Change
            the update to play a faulty or hostile client, return None to play a silent one. What it
            raises ends the training.
        on_round: Called after each round, e.g. ``publish_rounds(registry, name)``. What it raises
            ends the training.
        average: ``(updates, numbers of samples) -> state``: how the server makes one model of the
            accepted updates.
        progress: Show a progress bar.
        rounds: 10 by default. ``local_epochs`` (5), ``batch_size`` (16), ``learning_rate`` (0.1):
            of each client's SGD.
        architecture: "digits_mlp" by default, with its ``parameters``.
        seed: Same seed (0), same result. The caller's random state and thread count stay as they
            are.
        num_clients: 20 by default; with ``alpha`` (0.1), ``permute_labels`` (False) and ``seed``
            the partition of the digits, see ``data.make_clients``.

    A client whose training raises is left out of the round, and named in ``Round.rejected``; as is
    one whose update cannot be averaged.

    Raises:
        ModelExecutionError: The training of every client raised.
        ConfigError: A setting out of range.
        NotFoundError: No such architecture.
        InvalidModelError: An architecture that does not take these features and labels, or lacks
            the head that the strategy needs.

    Example: ``train("fedper", rounds=5, alpha=0.3, on_round=publish_rounds(registry, "digits"))``

    Cost: with the defaults about 2 s on one core.
    Source: McMahan et al., AISTATS 2017 (arXiv 1602.05629), algorithm 1 with C = 1.
    """
    settings: dict[str, Any] = dict(options)
    settings["parameters"] = dict(settings.get("parameters") or {})
    partition = {name: settings.pop(name, default) for name, default in _PARTITION.items()}
    if clients is None:
        settings["data"] = f"digits, alpha {partition['alpha']}"
        if partition["permute_labels"]:
            settings["data"] += ", labels permuted per client"
    elif partition != _PARTITION:
        raise ConfigError(
            "clients are given: leave num_clients, alpha and permute_labels out, they would do nothing"
        )
    recipe = Recipe(strategy=strategy, **settings)
    if clients is None:
        clients = data.make_clients(*data.digits(), **partition, seed=recipe.seed)
    data.check_clients(clients)
    if not preprocessing:
        preprocessing = data.federated_statistics(clients)
    federation = _Federation(recipe, clients, preprocessing, corrupt, average)
    rounds: list[Round] = []
    with _progress_bar(recipe, progress) as bar:
        for number in range(1, recipe.rounds + 1):
            done = federation.play(number)
            rounds.append(done)
            if bar is not None:
                mean = done.metrics["mean_client_accuracy"]
                bar.set_postfix(mean=f"{mean:.3f}", rejected=len(done.rejected))
                bar.update()
            if on_round is not None:
                on_round(done)
    return Run(recipe, tuple(clients), tuple(rounds))


def _progress_bar(recipe: Recipe, wanted: bool) -> Any:
    """A bar of tqdm, in a context. Without tqdm there is none: no training ends for want of one."""
    if not wanted or find_spec("tqdm") is None:
        return nullcontext()
    from tqdm.auto import tqdm

    return tqdm(total=recipe.rounds, desc=recipe.strategy, unit="round")


class _Federation:
    """A training under way: the global model, what the clients keep, and one module that all of
    them compute with."""

    def __init__(
        self,
        recipe: Recipe,
        clients: Sequence[Client],
        preprocessing: Statistics,
        corrupt: Corrupt | None,
        average: Average,
    ) -> None:
        self.recipe = recipe
        self.strategy = STRATEGIES[recipe.strategy]
        self.corrupt = corrupt
        self.average = average
        if preprocessing.keys() != {"mean", "std"}:
            raise ConfigError(
                f"preprocessing has the keys {sorted(preprocessing)}: give mean and std, nothing else"
            )
        self.preprocessing = {
            name: [float(value) for value in preprocessing[name]] for name in ("mean", "std")
        }
        with isolated():
            _seed(recipe.seed)
            self.module = models.build(recipe.architecture, recipe.parameters)
        shape, _ = models.signature(recipe.architecture, recipe.parameters)
        _check_fit(recipe, self.module, clients)
        mean = self.preprocessing["mean"]
        input_shape = None
        # else the rows do not fit either, and that error says more
        if math.prod(shape) == len(mean):
            input_shape = shape
        standardise = Preprocessor(  # as the server does
            mean=mean,
            std=self.preprocessing["std"],
            input_shape=input_shape,
        )
        self.train = {}
        self.test = {}
        for client in clients:
            self.train[client.id] = (standardise(client.train_x), torch.tensor(client.train_y))
            self.test[client.id] = (standardise(client.test_x), torch.tensor(client.test_y))
        self.state = copied(self.module.state_dict())
        self.kept: dict[str, State] = {}

    def play(self, number: int) -> Round:
        """One round; the clients train one after the other."""
        with isolated():
            rejected: dict[str, str] = {}
            updates = self._updates(number, rejected)
            counts = {client: len(self.train[client][1]) for client in updates}
            if updates:
                self.state = self.average(list(updates.values()), list(counts.values()))
            if self.strategy.keeps is not None:
                for client, update in updates.items():
                    self.kept[client] = _part(update, self.strategy.keeps)
            personal = dict(self.kept)
            if self.strategy.fine_tunes:
                for client in updates:
                    try:
                        personal[client] = self._tuned_head(client, number)
                    except Exception as error:  # the global model serves it
                        rejected[client] = f"its head was not fitted: {_reason(error)}"
            return self._measured(number, personal, counts, rejected)

    def _updates(self, number: int, rejected: dict[str, str]) -> dict[str, State]:
        """The sound updates of all clients; why the others are left out goes into ``rejected``."""
        updates: dict[str, State] = {}
        raised = 0
        for index, client in enumerate(self.train):
            # so that no client's fault changes another's shuffling
            _seed(self.recipe.seed, number, index)
            try:
                update: Any = self._local_update(client)
            except (
                Exception
            ) as error:  # of its data, its memory, its part of the model: the others train on
                raised += 1
                rejected[client] = _reason(error)
                continue
            if self.corrupt is not None:
                update = self.corrupt(client, number, update)
            reason = fault(update, self.state)
            if reason is None:
                updates[client] = update
            else:
                rejected[client] = reason
        if raised == len(self.train):
            client, why = next(iter(rejected.items()))
            raise ModelExecutionError(
                f"round {number}: the training of all {raised} clients failed, that of {client!r} by {why}: "
                "mend the model or the samples"
            )
        return updates

    def _local_update(self, client: str) -> State:
        """What the client does with the global model and its own samples; returns all its
        tensors."""
        self.module.load_state_dict(self.state | self.kept.get(client, {}))
        if self.strategy.head_first:
            self._fit("head", client)
            self._fit("body", client)
        else:
            self._fit("", client)
        return copied(self.module.state_dict())

    def _tuned_head(self, client: str, number: int) -> State:
        _seed(self.recipe.seed, number, len(self.train))
        self.module.load_state_dict(self.state)
        self._fit("head", client)
        return _part(copied(self.module.state_dict()), "head.")

    def _fit(self, part: str, client: str) -> None:
        """Mini-batch SGD on the weights of a submodule ("" is the whole); the others stay."""
        x, y = self.train[client]
        trained = self.module.train().get_submodule(part)
        weights = [weight for weight in trained.parameters() if weight.requires_grad]
        for _ in range(self.recipe.local_epochs):
            for batch in self._batches(len(y)):
                loss = cross_entropy(self.module(x[batch]), y[batch])
                gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
                with torch.no_grad():
                    for weight, gradient in zip(weights, gradients, strict=True):
                        weight.sub_(gradient, alpha=self.recipe.learning_rate)

    def _batches(self, rows: int) -> list[Tensor]:
        """All rows in a new order. Batch statistics of one row are none: where the model takes
        some, a last batch of one row goes into the one before. (To drop it, as
        ``DataLoader(drop_last=True)`` does, would cost a small client a part of what it has.)"""
        shuffled = torch.randperm(rows)
        batches = list(torch.split(shuffled, self.recipe.batch_size))
        takes_statistics = any(isinstance(part, _BatchNorm) for part in self.module.modules())
        if takes_statistics and len(batches) > 1 and len(batches[-1]) == 1:
            last = batches.pop()
            batches[-1] = torch.cat([batches[-1], last])
        return batches

    def _measured(
        self,
        number: int,
        personal: dict[str, State],
        counts: dict[str, int],
        rejected: dict[str, str],
    ) -> Round:
        accuracy = {}
        hits = 0
        rows = 0
        for client, (_, labels) in self.test.items():
            own = self.state | personal.get(client, {})
            accuracy[client] = self._hits(client, own) / len(labels)
            hits += self._hits(client, self.state)
            rows += len(labels)
        metrics = {
            "global_accuracy": hits / rows,
            "mean_client_accuracy": sum(accuracy.values()) / len(accuracy),
            "worst_client_accuracy": min(accuracy.values()),
        }
        return Round(
            number=number,
            recipe=self.recipe,
            preprocessing=self.preprocessing,
            state=copied(self.state),  # a callback may change what it gets
            personal={client: copied(state) for client, state in personal.items()},
            metrics=metrics,
            client_accuracy=accuracy,
            sample_counts=counts,
            rejected=rejected,
        )

    @torch.no_grad()
    def _hits(self, client: str, state: State) -> int:
        x, y = self.test[client]
        logits = functional_call(self.module.eval(), state, (x,))
        right = logits.argmax(dim=1) == y
        return int(right.sum())


def _check_fit(recipe: Recipe, module: nn.Module, clients: Sequence[Client]) -> None:
    """Raise InvalidModelError unless the model takes these samples and has the parts that the
    strategy trains."""
    inputs, outputs = models.signature(recipe.architecture, recipe.parameters)
    width = clients[0].train_x.shape[1]
    highest = max(max(client.train_y.max(), client.test_y.max()) for client in clients)
    classes = max(int(highest) + 1, 2)  # over a single logit there is nothing to learn
    if math.prod(inputs) != width or len(outputs) != 1 or outputs[0] < classes:
        raise InvalidModelError(
            f"{recipe.architecture!r} maps rows {inputs} to {outputs}: the clients' samples need ({width},) to "
            f"({classes},) or more; choose another architecture or other parameters"
        )
    for part in STRATEGIES[recipe.strategy].needs:
        if not any(name.startswith(f"{part}.") for name, _ in module.named_parameters()):
            raise InvalidModelError(
                f"{recipe.architecture!r} has no weights in a submodule {part!r}, which {recipe.strategy!r} trains: "
                "choose another architecture or strategy"
            )


@contextmanager
def isolated() -> Iterator[None]:
    """Random state of our own, gradients on, one thread; the caller's settings come back
    afterwards.

    One thread, because a step on 16 rows is too short to be shared out.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False):
            yield
    finally:
        torch.set_num_threads(threads)


def _reason(error: Exception) -> str:
    """Why a client's training failed, in one short line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:200]


def _seed(*key: int) -> None:
    torch.default_generator.manual_seed(seed_of(*key))


def seed_of(*key: int) -> int:
    """A seed for torch from several numbers: whoever changes one of them gets another one."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def copied(state: Mapping[str, Tensor]) -> State:
    """Copies of the tensors, which nobody else holds."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _part(state: State, prefix: str) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
