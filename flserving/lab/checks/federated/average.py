"""Check of the exercise "federated averaging" (notebook 01)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flserving.federated.aggregation import State, aggregate
from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

FedAvg = Callable[[Sequence[State], Sequence[int]], Mapping[str, Tensor]]

_COUNTS = [120, 7, 61, 12, 300, 45, 33]


def check_fedavg(fedavg: FedAvg) -> None:
    """Check ``fedavg(updates, counts) -> state``: each tensor's mean, weighted by the clients'
    samples.

    ``updates`` is a list of states (name -> float32 tensor) and ``counts`` their numbers of
    samples. Right is the answer of :func:`flserving.federated.aggregate`, to the last bit: summed
    in float64, returned as float32.

    Raises:
        AssertionError: Recognises the usual averages that are not this one.
    """
    judge(
        "fedavg",
        fedavg,
        Part(
            "returns a state",
            _returns_a_state,
            (
                "A state is a dict from a tensor's name to the tensor; all updates have the same names.",
                "Begin with `state = {}`; the names are in the first update: `for name, first in updates[0].items():`.",
            ),
        ),
        Part(
            "leaves the updates as they are",
            _leaves_the_updates,
            (
                "`+=` and methods whose names end with `_` change a tensor in place.",
                "Sum into a tensor of your own: `mean = torch.zeros_like(first, dtype=torch.float64)`.",
            ),
        ),
        Part(
            "weights each client by its samples",
            _weights_by_samples,
            (
                "A client's weight is its share of all samples, and the weights add up to 1.",
                "In the loop over the clients: `mean += update[name] * (count / total)`, with `total = sum(counts)`.",
            ),
        ),
        Part(
            "agrees with the framework to the last bit",
            _agrees_to_the_last_bit,
            (
                "Every name of the update must be in the answer, with its own shape and as float32.",
                "float32 keeps 7 digits, and a sum loses some of them: convert each update with `.double()` first.",
                "`mean += update[name].double() * (count / total)`, then `state[name] = mean.to(first.dtype)`.",
            ),
        ),
    )


def _two() -> list[State]:
    return [{"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([8.0, 8.0])}]


def _returns_a_state(fedavg: FedAvg) -> Mapping[str, Tensor]:
    got = ask("fedavg(two updates, [30, 10])", fedavg, _two(), [30, 10])
    assert isinstance(got, Mapping), (
        f"fedavg returned {type(got).__name__}: return a dict, name -> mean tensor"
    )
    assert list(got) == ["w"], (
        f"fedavg returned the names {list(got)}: each update has the one tensor 'w'"
    )
    assert isinstance(got["w"], Tensor), (
        f"got['w'] is a {type(got['w']).__name__}: return tensors, as the updates are"
    )
    return got


def _leaves_the_updates(fedavg: FedAvg) -> None:
    updates = _seven()
    before = _seven()
    ask("fedavg(seven updates, their counts)", fedavg, updates, list(_COUNTS))
    same = all(
        torch.equal(tensor, one[name])
        for one, kept in zip(updates, before, strict=True)
        for name, tensor in kept.items()
    )
    assert same, (
        "fedavg changed an update that it was given: that is a client's own model; sum into a new tensor"
    )


def _weights_by_samples(fedavg: FedAvg) -> None:
    mean = _returns_a_state(fedavg)["w"].detach()
    shown = "the mean of [0, 4] with 30 samples and [8, 8] with 10"
    assert tuple(mean.shape) == (2,), (
        f"{shown} has shape {tuple(mean.shape)}: average over the clients, number by number"
    )
    mistakes = {
        (
            4,
            6,
        ): "the plain mean: a client with 10 samples counts as much as one with 30; weight by counts",
        (
            80,
            200,
        ): "the sum of count times update: divide by all 40 samples, or the model grows with every round",
        (40, 100): "a sum divided by the number of clients: divide by all 40 samples",
        (6, 7): "weighted the wrong way round: the client with FEWER samples counts more",
        (8, 8): "the last update: add the others, do not replace them",
        (0, 4): "the first update: the second client trained for nothing",
        (0, 3): "without the second client: begin with a sum of 0 and add every client's share",
    }
    numbers = tuple(round(number, 6) for number in mean.double().tolist())
    for wrong, why in mistakes.items():
        assert numbers != wrong, f"{shown} came out as {list(wrong)}, {why}"
    assert numbers == (2, 5), f"{shown} came out as {list(numbers)}: it is [2, 5]"


def _seven() -> list[State]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"body.weight": (40, 60), "body.bias": (40,), "head.weight": (10, 40)}
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in _COUNTS
    ]


def _agrees_to_the_last_bit(fedavg: FedAvg) -> None:
    wanted = aggregate(_seven(), _COUNTS)
    got = ask("fedavg(seven updates, their counts)", fedavg, _seven(), list(_COUNTS))
    missing = sorted(wanted.keys() - got.keys())
    assert not missing, (
        f"the mean of an update with {list(wanted)} lacks {missing}: average every tensor"
    )
    for name, tensor in wanted.items():
        mean = got[name]
        assert mean.dtype == torch.float32, (
            f"{name} came back as {mean.dtype}: the model's tensors are float32, convert the mean back"
        )
        assert mean.shape == tensor.shape, (
            f"{name} came back with the shape {list(mean.shape)}, not {list(tensor.shape)}"
        )
        if torch.equal(mean, tensor):
            continue
        off = float((mean - tensor).abs().max())
        assert off > 1e-4, (
            f"{name} is off by {off:.0e}: the digits that float32 loses in a sum; add up in float64 and convert once, "
            "at the end, so that every order of the clients gives the same model"
        )
        raise AssertionError(
            f"{name} is off by {off:.2g}: it must be the mean weighted by {_COUNTS}"
        )
