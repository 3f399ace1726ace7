"""Federated rounds in plain torch: short, seeded, and good enough to make models worth serving.

One round: every client trains the model on its own samples; the server checks what arrives, and averages it. In what
a client keeps for itself, and in what order it trains, lies the whole difference between the ``STRATEGIES``.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from flserving.federated.aggregation import State, aggregate, fault, reason_of
from flserving.federated.data import Client
from flserving.federated.rounds import STRATEGIES, Recipe, Round, Run, Statistics, Strategy, publish_rounds
from flserving.models.processing import Preprocessor

__all__ = ["STRATEGIES", "Recipe", "Round", "Run", "Strategy", "aggregate", "fault", "publish_rounds", "train"]

Corrupt: TypeAlias = Callable[[str, int, State], Any]


_PARTITION: Mapping[str, object] = {"num_clients": 20, "alpha": 0.1, "permute_labels": False}


class Options(TypedDict, total=False):
    """Settings of :func:`train`: those of :class:`Recipe`, and how ``make_clients`` parts the digits."""

    rounds: int
    local_epochs: int
    batch_size: int
    learning_rate: float
    architecture: str
    parameters: Mapping[str, models.JSON] | None
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
    progress: bool = True,
    **options: Unpack[Options],
) -> Run:
    """Train a model over clients, by default on handwritten digits; every client takes part in every round.

    Args:
        strategy: One of ``STRATEGIES``. Clients run SGD without momentum on the cross entropy.
        clients: Clients of your own; leave the partition's options (below) as they are then.
        preprocessing: ``{"mean": [D], "std": [D]}`` to standardise with; by default what the clients' sums give.
        corrupt: Stands between client and server: ``(client_id, round, update) -> update``. Change the update to play
            a faulty or hostile client, return None to play a silent one. What it raises ends the training.
        on_round: Called after each round, e.g. ``publish_rounds(registry, name)``. What it raises ends the training.
        progress: Show a progress bar.
        rounds: 10 by default. ``local_epochs`` (5), ``batch_size`` (16), ``learning_rate`` (0.1): of each client's SGD.
        architecture: "digits_mlp" by default, with its ``parameters``.
        seed: Same seed (0), same result. The caller's random state and thread count stay as they are.
        num_clients: 20 by default; with ``alpha`` (0.1), ``permute_labels`` (False) and ``seed`` the partition of the
            digits, see ``data.make_clients``.

    A client whose training raises is left out of the round, and named in ``Round.rejected``; as is one whose update
    cannot be averaged.

    Raises:
        ModelExecutionError: The training of every client raised.
        ConfigError: A setting out of range. NotFoundError: No such architecture.
        InvalidModelError: An architecture that does not take these features and labels, or lacks the head that the
            strategy needs.

    Example: ``train("fedper", rounds=5, alpha=0.3, on_round=publish_rounds(registry, "digits"))``

    Cost: with the defaults about 2 s on one core.
    Source: McMahan et al., AISTATS 2017 (arXiv 1602.05629), algorithm 1 with C = 1.
    """
    settings: dict[str, Any] = dict(options)
    partition = {name: settings.pop(name, default) for name, default in _PARTITION.items()}
    settings["parameters"] = dict(settings.get("parameters") or {})
    told = ""
    if clients is None:
        told = f"digits, alpha {partition['alpha']}"
        if partition["permute_labels"]:
            told += ", labels permuted per client"
    recipe = Recipe(strategy=strategy, data=told, **settings)
    if clients is None:
        clients = data.make_clients(*data.digits(), **partition, seed=recipe.seed)
    elif partition != _PARTITION:
        raise ConfigError("clients are given: leave num_clients, alpha and permute_labels out, they would do nothing")
    if not clients or len({client.id for client in clients}) < len(clients):
        raise ConfigError(f"clients are {[client.id for client in clients][:5]}: give at least one, with unique ids")
    federation = _Federation(recipe, clients, preprocessing or data.federated_statistics(clients), corrupt)
    done: list[Round] = []
    with _progress_bar(strategy, recipe.rounds, progress) as show:
        for number in range(1, recipe.rounds + 1):
            done.append(federation.play(number))
            show(done[-1])
            if on_round is not None:
                on_round(done[-1])
    return Run(recipe, tuple(clients), tuple(done))


@contextmanager
def _progress_bar(strategy: str, rounds: int, wanted: bool) -> Iterator[Callable[[Round], None]]:
    """Takes each round when it is done. Without tqdm there is no bar: no training ends for want of one."""
    if not wanted or find_spec("tqdm") is None:
        yield lambda done: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=rounds, desc=strategy, unit="round") as bar:

        def show(done: Round) -> None:
            bar.set_postfix(mean=f"{done.metrics['mean_client_accuracy']:.3f}", rejected=len(done.rejected))
            bar.update()

        yield show


class _Federation:
    """A training under way: the global model, what the clients keep, and one module that all of them compute with."""

    def __init__(
        self, recipe: Recipe, clients: Sequence[Client], preprocessing: Statistics, corrupt: Corrupt | None
    ) -> None:
        self.recipe = recipe
        self.strategy = STRATEGIES[recipe.strategy]
        self.corrupt = corrupt
        if preprocessing.keys() != {"mean", "std"}:
            raise ConfigError(f"preprocessing has the keys {sorted(preprocessing)}: give mean and std, nothing else")
        self.preprocessing = {name: [float(value) for value in preprocessing[name]] for name in ("mean", "std")}
        mean = self.preprocessing["mean"]
        std = self.preprocessing["std"]
        shape, _ = models.signature(recipe.architecture, recipe.parameters)
        fits = math.prod(shape) == len(mean)  # else _check_fit says what is wrong
        # the server's own: serving sees what training saw
        standardise = Preprocessor(mean=mean, std=std, input_shape=shape if fits else None)
        self.train = {c.id: (standardise(c.train_x), torch.tensor(c.train_y)) for c in clients}
        self.test = {c.id: (standardise(c.test_x), torch.tensor(c.test_y)) for c in clients}
        with _isolated():
            _seed(recipe.seed)
            self.module = models.build(recipe.architecture, recipe.parameters)
        _check_fit(recipe, self.module, clients)
        self.state = _copy(self.module.state_dict())
        self.kept: dict[str, State] = {}

    def play(self, number: int) -> Round:
        """One round; the clients take turns."""
        with _isolated():
            updates: dict[str, State] = {}
            rejected: dict[str, str] = {}
            raised = 0
            for index, client in enumerate(self.train):
                _seed(self.recipe.seed, number, index)  # so that no client's fault changes another's shuffling
                try:
                    update: Any = self._local_update(client)
                except Exception as error:  # of its data, its memory, its part of the model: the others train on
                    raised += 1
                    rejected[client] = reason_of(error)
                    continue
                if self.corrupt is not None:
                    update = self.corrupt(client, number, update)
                if reason := fault(update, self.state):
                    rejected[client] = reason
                else:
                    updates[client] = update
            if raised == len(self.train):
                client, reason = next(iter(rejected.items()))
                raise ModelExecutionError(
                    f"round {number}: the training of all {raised} clients failed, that of {client!r} by {reason}: "
                    "mend the model or the samples"
                )
            counts = {client: len(self.train[client][1]) for client in updates}
            if updates:
                self.state = aggregate(list(updates.values()), list(counts.values()))
            if self.strategy.keeps is not None:
                self.kept |= {client: _part(update, self.strategy.keeps) for client, update in updates.items()}
            tuned: dict[str, State] = {}
            for client in updates if self.strategy.fine_tunes else ():
                try:
                    tuned[client] = self._tuned_head(client, number)
                except Exception as error:  # the global model serves it
                    rejected[client] = f"its head was not fitted: {reason_of(error)}"
            return self._measured(number, self.kept | tuned, counts, rejected)

    def _local_update(self, client: str) -> State:
        """What the client does with the global model and its own samples; returns all its tensors."""
        self.module.load_state_dict(self.state | self.kept.get(client, {}))
        if self.strategy.head_first:
            self._fit("head", client)
            self._fit("body", client)
        else:
            self._fit("", client)
        return _copy(self.module.state_dict())

    def _tuned_head(self, client: str, number: int) -> State:
        _seed(self.recipe.seed, number, len(self.train))
        self.module.load_state_dict(self.state)
        self._fit("head", client)
        return _part(_copy(self.module.state_dict()), "head.")

    def _fit(self, part: str, client: str) -> None:
        """Mini-batch SGD on the weights of a submodule ("" is the whole); the others stay."""
        x, y = self.train[client]
        weights = [w for w in self.module.train().get_submodule(part).parameters() if w.requires_grad]
        for _ in range(self.recipe.local_epochs):
            for batch in self._batches(len(y)):
                loss = cross_entropy(self.module(x[batch]), y[batch])
                gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
                with torch.no_grad():
                    for weight, gradient in zip(weights, gradients, strict=True):
                        weight.sub_(gradient, alpha=self.recipe.learning_rate)

    def _batches(self, rows: int) -> list[Tensor]:
        """All rows in a new order. Batch statistics of one row are none: where the model takes some, a last batch of
        one row goes into the one before. (To drop it, as ``DataLoader(drop_last=True)`` does, would cost a small client
        a part of what it has.)"""
        batches = list(torch.split(torch.randperm(rows), self.recipe.batch_size))
        takes_statistics = any(isinstance(part, _BatchNorm) for part in self.module.modules())
        if takes_statistics and len(batches) > 1 and len(batches[-1]) == 1:
            last = batches.pop()
            batches[-1] = torch.cat([batches[-1], last])
        return batches

    def _measured(
        self, number: int, personal: dict[str, State], counts: dict[str, int], rejected: dict[str, str]
    ) -> Round:
        own = {client: self._hits(client, self.state | personal.get(client, {})) for client in self.test}
        accuracy = {client: hits / len(self.test[client][1]) for client, hits in own.items()}
        of_all = sum(self._hits(client, self.state) for client in self.test)
        metrics = {
            "global_accuracy": of_all / sum(len(y) for _, y in self.test.values()),
            "mean_client_accuracy": sum(accuracy.values()) / len(accuracy),
            "worst_client_accuracy": min(accuracy.values()),
        }
        copies = {client: _copy(state) for client, state in personal.items()}  # a callback may change what it gets
        return Round(
            number, self.recipe, self.preprocessing, _copy(self.state), copies, metrics, accuracy, counts, rejected
        )

    @torch.no_grad()
    def _hits(self, client: str, state: State) -> int:
        x, y = self.test[client]
        return int((functional_call(self.module.eval(), state, (x,)).argmax(dim=1) == y).sum())


def _check_fit(recipe: Recipe, module: nn.Module, clients: Sequence[Client]) -> None:
    """Raise InvalidModelError unless the model takes these samples and has the parts that the strategy trains."""
    inputs, outputs = models.signature(recipe.architecture, recipe.parameters)
    width = clients[0].train_x.shape[1]
    classes = 1 + max(int(max(client.train_y.max(), client.test_y.max())) for client in clients)
    classes = max(classes, 2)  # over a single logit there is nothing to learn
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
def _isolated() -> Iterator[None]:
    """Random state of our own, gradients on, one thread; the caller's settings come back afterwards.

    One thread, because a step on 16 rows is too short to be shared out.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False):
            yield
    finally:
        torch.set_num_threads(threads)


def _seed(*key: int) -> None:
    torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _copy(state: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _part(state: State, prefix: str) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
