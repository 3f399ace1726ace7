"""Check of the exercise "fit a head" (notebook 08): gradient descent on frozen features, pulled to
the shared head."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Fit = Callable[..., Tensor]
_ROWS = 12
_INPUTS = 5
_CLASSES = 4
_RATE = 0.2
_STEPS = 3


def check_fit_head(fit_head: Fit) -> None:
    """Check ``fit_head(features, labels, shared, pull, rate, steps)``.

    Right is: from the shared head, ``steps`` steps of ``rate`` against the gradient of the mean
    cross entropy plus ``pull / 2`` times the squared distance to the shared head; the bias is the
    last row.

    Raises:
        AssertionError: Recognises the usual mistakes by the head that they lead to.
    """
    judge(
        "fit-head",
        fit_head,
        Part(
            "begins at the shared head",
            _begins_at_the_shared_head,
            ("`head = shared.clone()`, and the loop runs `steps` times.",),
        ),
        Part(
            "leaves what it was given",
            _leaves_its_arguments,
            ("`head -= ...` changes head: begin with a clone.",),
        ),
        Part(
            "goes down the cross entropy",
            partial(_descends, pull=0.0, steps=1),
            (
                "Append a 1 to every row: `torch.cat([features, torch.ones(len(features), 1)], dim=1)`.",
                "P: `torch.softmax(x @ head, dim=1)`. Y: `torch.nn.functional.one_hot(labels, shared.shape[1])`.",
                "`head -= rate * (x.T @ (P - Y) / len(labels))`",
            ),
        ),
        Part(
            "step after step",
            partial(_descends, pull=0.0, steps=_STEPS),
            ("The probabilities change with the head: compute them anew in every step.",),
        ),
        Part(
            "is pulled to the shared head",
            partial(_descends, pull=0.7, steps=_STEPS),
            (
                "The second term of the gradient is `pull * (head - shared)`; "
                "it is 0 in the first step, and not later.",
            ),
        ),
        Part(
            "a client without samples",
            _bears_no_samples,
            ("A mean over no samples is 0 / 0: return the shared head before that.",),
        ),
    )


def _samples(rows: int = _ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels (class 1 has none), and a shared head."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(_ROWS, _INPUTS, generator=generator).abs()
    shared = torch.randn(_INPUTS + 1, _CLASSES, generator=generator)
    labels = torch.tensor([0, 2, 3]).repeat(_ROWS // 3)
    return features[:rows], labels[:rows], shared


def _fitted(fit_head: Fit, *, rows: int = _ROWS, pull: float = 0.0, steps: int = _STEPS) -> Tensor:
    features, labels, shared = _samples(rows)
    got = ask(
        f"fit_head(..., pull={pull}, rate={_RATE}, steps={steps})",
        fit_head,
        features,
        labels,
        shared,
        pull,
        _RATE,
        steps,
    )
    assert isinstance(got, Tensor), (
        f"fit_head returned {type(got).__name__}: return the head, a tensor"
    )
    shape = (_INPUTS + 1, _CLASSES)
    assert tuple(got.shape) == shape, (
        f"fit_head returned the shape {tuple(got.shape)}, the shared head has {shape}"
    )
    return got.detach()


def _begins_at_the_shared_head(fit_head: Fit) -> None:
    got = _fitted(fit_head, steps=0, pull=0.3)
    assert not torch.equal(got, torch.zeros_like(got)), (
        "without a step the head is all zeros: begin at the shared head, else a client with few samples forgets what "
        "all the others know"
    )
    assert torch.allclose(got, _samples()[2]), (
        "with steps=0 the head must be the shared one: begin there"
    )


def _descends(fit_head: Fit, *, pull: float, steps: int) -> None:
    got = _fitted(fit_head, pull=pull, steps=steps)
    right = _expected(pull, steps)
    if torch.allclose(got, right, atol=1e-5):
        return
    for why, mistake in _MISTAKES.items():
        wrong = _expected(pull, steps, **mistake)
        same_as_right = torch.allclose(wrong, right, atol=1e-5)
        assert same_as_right or not torch.allclose(got, wrong, atol=1e-5), why
    assert torch.isfinite(got).all(), "the head holds NaN: use torch.softmax, exp(large) overflows"
    off = float((got - right).abs().max())
    row, column = divmod(int((got - right).abs().argmax()), _CLASSES)
    raise AssertionError(
        f"after {steps} steps with pull {pull:g} the head differs by up to {off:.2g}; entry [{row}, {column}] is "
        f"{float(got[row, column]):.4f}, not {float(right[row, column]):.4f}"
    )


def _bears_no_samples(fit_head: Fit) -> None:
    got = _fitted(fit_head, rows=0, pull=0.1)
    assert torch.isfinite(got).all(), (
        "for a client without samples the head holds NaN: whoever asks with it gets no answer; return the shared head"
    )
    assert torch.allclose(got, _samples()[2]), (
        "a client without samples gets the shared head, as it is"
    )


def _leaves_its_arguments(fit_head: Fit) -> None:
    given = _samples()
    ask("fit_head(...)", fit_head, *given, 0.1, _RATE, _STEPS)
    for name, now, before in zip(("features", "labels", "shared"), given, _samples(), strict=True):
        assert torch.equal(now, before), (
            f"fit_head changed {name}: the next client is fitted from what this one has left"
        )


def _expected(pull: float, steps: int, **mistake: Any) -> Tensor:
    """The head by the formula, or by one with a mistake in it."""
    features, labels, shared = _samples()
    kind = mistake.get("kind")
    x = torch.cat([features, torch.ones(_ROWS, 1)], dim=1)
    if kind == "bias first":
        x = x.roll(1, dims=1)
    if kind == "no bias":
        x[:, -1] = 0
    wanted = torch.nn.functional.one_hot(labels, _CLASSES).float()
    head = shared.clone()
    anchor = torch.zeros_like(shared) if kind == "to zero" else shared
    for number in range(steps):
        error = torch.softmax(x @ head, dim=0 if kind == "over rows" else 1) - wanted
        if kind == "logits":
            error = x @ head - wanted
        if kind == "once" and number:
            break
        gradient = x.T @ error / mistake.get("divide", _ROWS)
        bound = pull * mistake.get("times", 1.0) * (head - anchor)
        head = (
            head
            - _RATE * mistake.get("sign", 1.0) * gradient
            - _RATE * mistake.get("away", 1.0) * bound
        )
    return head


_MISTAKES: dict[str, dict[str, Any]] = {
    "the head went up the hill: step against the gradient, `head -= rate * gradient`": {
        "sign": -1.0,
        "away": -1.0,
    },
    "the head does not move: is the gradient subtracted from it?": {"sign": 0.0, "times": 0.0},
    "only one step was made: the loop runs `steps` times": {"kind": "once"},
    "the gradient is a sum over the samples: divide by their number, else a client with many makes giant steps": {
        "divide": 1
    },
    "the gradient is divided by samples times classes: the loss is a mean over samples": {
        "divide": _ROWS * _CLASSES
    },
    "the bias never moves: append a 1 to the features": {"kind": "no bias"},
    "the 1 for the bias stands first: the bias is the last row of the head": {"kind": "bias first"},
    "softmax went over the rows: a client's samples are no alternatives, its classes are; take dim=1": {
        "kind": "over rows"
    },
    "the error was taken of the logits: softmax makes probabilities of them first": {
        "kind": "logits"
    },
    "the head is not pulled at all: add pull * (head - shared)": {"times": 0.0},
    "the head is pulled to zero: a client with few samples forgets what all others know; pull it to the shared head": {
        "kind": "to zero"
    },
    "the head is pushed away from the shared one: its gradient is pull * (head - shared)": {
        "times": -1.0
    },
    "the pull is twice as strong: pull / 2 times the square has the gradient pull * (head - shared)": {
        "times": 2.0
    },
    "the pull is half as strong: pull / 2 times the square has the gradient pull * (head - shared)": {
        "times": 0.5
    },
    "the pull was divided by the number of samples: it does not belong to the mean": {
        "times": 1 / _ROWS
    },
}
