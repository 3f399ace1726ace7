"""Checks of the exercises "batch the heads" and "own head or shared" (notebook 08). Work is
counted, not timed."""

import gc
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Batched = Callable[[Tensor, Tensor, Tensor], Tensor]
Right = Mapping[str, Mapping[str, Mapping[str, Any]]]
Choose = Callable[[Right], dict[str, str]]
_INPUTS = 6
_CLASSES = 4
_COMPOSITIONS = {
    "one row": [3],
    "five rows of five clients": [4, 0, 6, 2, 5],
    "seven rows, some of the same client": [5, 1, 5, 0, 1, 5, 2],
    "four rows of one client": [6, 6, 6, 6],
    "a row of every client, in reverse": [6, 5, 4, 3, 2, 1, 0],
}


def check_heads(batched_heads: Batched) -> None:
    """Check ``batched_heads(features, weights, slots) -> logits``.

    ``features`` is float32 [N, D], ``weights`` float32 [K, D + 1, C] with the bias as the last row,
    ``slots`` int64 [N]: whose head a row gets. Right is what a loop over ``nn.Linear`` gives,
    float32 [N, C], from a number of operations that does not grow with the rows, without touching
    heads that nobody in the batch asked for.

    Raises:
        AssertionError: Names the mistake, and the batch that showed it.
    """
    compositions = list(_COMPOSITIONS.items())
    judge(
        "batch-heads",
        batched_heads,
        Part(
            "every row through its own head",
            partial(_compares, compositions[:2]),
            (
                "Row k gets the head number slots[k]; `weights[slots]` has one head for each row.",
                "A row times its matrix: `torch.bmm(features[:, None], own[:, :-1])[:, 0]`, or an einsum over d.",
                "The last row of a head is its bias: add `own[:, -1]`.",
            ),
        ),
        Part(
            "the same client several times, in any order",
            partial(_compares, compositions[2:]),
            ("Answer k belongs to row k: sort nothing, and take no client only once.",),
        ),
        Part(
            "one product, whatever the batch",
            _counts_work,
            (
                "Which of your lines runs more often when there are more rows, or more heads?",
                "Gather with `weights[slots]` first, so that no later step sees another head.",
            ),
        ),
    )


def _batch(slots: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(len(slots), _INPUTS, generator=generator)
    return features, torch.randn(heads, _INPUTS + 1, _CLASSES, generator=generator), slots


def _one_by_one(features: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    return torch.stack(
        [
            row @ weights[slot, :-1] + weights[slot, -1]
            for row, slot in zip(features, slots, strict=True)
        ]
    )


def _compares(compositions: Sequence[tuple[str, list[int]]], batched_heads: Batched) -> None:
    for told, slots in compositions:
        _compare(batched_heads, told, *_batch(torch.tensor(slots), 7))


def _compare(
    batched_heads: Batched, told: str, features: Tensor, weights: Tensor, slots: Tensor
) -> None:
    before = [features.clone(), weights.clone(), slots.clone()]
    got = ask(f"batched_heads with {told}", batched_heads, features, weights, slots)
    for name, old, new in zip(
        ("features", "weights", "slots"), before, (features, weights, slots), strict=True
    ):
        assert torch.equal(old, new), (
            f"batched_heads changed {name}: they belong to the caller, and to the next batch"
        )
    right = _one_by_one(features, weights, slots)
    assert got is not None, f"batched_heads returned None for {told}: return the logits"
    got = torch.as_tensor(got).detach()
    shape = tuple(got.shape)
    assert shape == tuple(right.shape), (
        f"for {told}, batched_heads returned the shape {shape}: one row of {_CLASSES} logits for each row of the "
        f"batch is {tuple(right.shape)}"
    )
    if torch.allclose(got.float(), right, atol=1e-4):
        return
    row = int((got - right).abs().amax(dim=1).argmax())
    bias = weights[slots, -1]
    count = len(slots)
    order = torch.argsort(slots)
    every = torch.arange(count)
    guesses = {
        "the bias is missing: add the last row of each head": right - bias,
        "the first row of a head was taken for its bias: the bias is the last row": (
            features[:, None] @ weights[slots, 1:] + weights[slots, :1]
        )[:, 0],
        "row k got head number k: it must get head number slots[k]": _one_by_one(
            features, weights, every
        ),
        "every row got the head of the first row: each has its own": _one_by_one(
            features, weights, slots[:1].repeat(count)
        ),
        "the heads were averaged: an average of heads is nobody's head": _one_by_one(
            features,
            weights[slots].mean(dim=0, keepdim=True),
            torch.zeros(count, dtype=torch.int64),
        ),
        "softmax was applied: return the logits, the server's postprocessor does the rest": (
            right.softmax(dim=1)
        ),
        "the answers come in the order of the slots: answer k belongs to row k": right[order],
        "the biases belong to other rows: take the bias with the same index as the weights": right
        - bias
        + bias[:1],
    }
    for guess, value in guesses.items():
        assert not torch.allclose(got.float(), value, atol=1e-4), f"for {told}, {guess}"
    raise AssertionError(
        f"for {told} (slots {slots.tolist()}), row {row} got {_told(got[row])}: its own head, number "
        f"{int(slots[row])}, gives {_told(right[row])}"
    )


def _counts_work(batched_heads: Batched) -> None:
    """Steps of Python, and tensors that torch makes: neither may grow with the rows or with the
    heads."""
    few = torch.arange(8)
    many = torch.arange(64)
    alike = torch.zeros(64, dtype=torch.int64)
    batches = {
        "few": _batch(few, 100),
        "many": _batch(many, 100),
        "alike": _batch(alike, 100),
        "heads": _batch(few, 800),
    }
    work = {name: _work(batched_heads, batch) for name, batch in batches.items()}
    (few_steps, few_calls), (steps, calls) = work["few"][:2], work["many"][:2]
    told = f"64 rows take {calls} calls of torch and {steps} steps of Python, 8 rows {few_calls} and {few_steps}"
    if steps > few_steps + 28 or calls > few_calls + 28:
        alike_steps, alike_calls = work["alike"][:2]
        assert steps <= alike_steps + 28 and calls <= alike_calls + 28, (
            f"{told}, if all are different clients: a loop over the clients of a batch is a loop over its rows; "
            "gather the heads with weights[slots]"
        )
        raise AssertionError(
            f"{told}: that is a loop over the rows; gather the heads with weights[slots], then multiply once"
        )
    assert work["heads"][0] <= few_steps + 350 and work["heads"][1] <= few_calls + 350, (
        "with 800 heads in the table instead of 100 the same 8 rows take longer: that is a loop over all heads"
    )
    largest = work["heads"][2]
    fair = 8 * (_INPUTS + 1) * _CLASSES
    assert largest <= 4 * fair, (
        f"for 8 rows and 800 heads a tensor of {largest:,} numbers was made: the 8 heads that are wanted have {fair}; "
        "gather first, with weights[slots], then compute"
    )


def _work(batched_heads: Batched, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[int, int, int]:
    """Lines of Python that were run, calls of torch, numbers in the largest new tensor."""
    # what happens only once has happened
    ask(f"batched_heads with {len(batch[0])} rows", batched_heads, *batch)
    with _Calls() as calls:
        batched_heads(*batch)
    steps = 0
    kept = sys.gettrace()
    collects = gc.isenabled()

    def trace(_: object, event: str, __: object) -> Any:
        nonlocal steps
        steps += event == "line"  # a comprehension gives one for each turn
        return trace

    gc.disable()  # its finalizers would be counted too
    sys.settrace(trace)
    try:
        batched_heads(*batch)
    finally:
        sys.settrace(kept)
        if collects:
            gc.enable()
    return steps, calls.count, calls.largest


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what reaches torch's kernels, from Python or not; views make no new numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.largest = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here. Else torch imports its compiler and sympy, 2 s, at the first
        call."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, self.count = func(*args, **(kwargs or {})), self.count + 1
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, value.numel())
        return made


def check_head_choice(choose_heads: Choose) -> None:
    """Check ``choose_heads(right) -> {client: "own" or "shared"}``.

    ``right[client][split][head]``: whether each sample was answered right, bool [n]; splits "train"
    and "held_out", heads "own" and "shared". Right is "own" where it is right on more of the
    held-out samples, else "shared".

    Raises:
        AssertionError: Names the client that is served by the wrong head, and why it is wrong.
    """
    judge(
        "choose-head",
        choose_heads,
        Part(
            "a choice for every client",
            _chooses_for_all,
            (
                "Begin with `choice = {}`, and give every client of `right` an entry: 'own' or 'shared'.",
            ),
        ),
        Part(
            "by the samples that nobody trained on",
            _chooses_by_held_out,
            (
                "What does an array of training samples say about a head that was fitted to them?",
                '`splits["held_out"]["own"].sum()` counts.',
            ),
        ),
        Part(
            "shared where both are equally good",
            _chooses_where_equal,
            ("Own must be *more* often right: `>`.",),
        ),
        Part(
            "shared where nothing can be said",
            _chooses_without_samples,
            ("The sum of an empty array is 0, for both heads; its mean is NaN.",),
        ),
        Part(
            "the better head",
            _chooses_the_better,
            ("Compare the two sums of each client by themselves.",),
        ),
    )


def _clients() -> dict[str, Any]:
    return {
        "ada": _client((10, 8), (4, 3), 5),
        "bob": _client((10, 6), (3, 4), 5),
        "cem": _client((9, 9), (4, 4), 5),
        "dee": _client((10, 5), (4, 0), 5),
        "eva": _client((7, 10), (19, 17), 20),
        "fay": _client((10, 3), (0, 0), 0),
        "gil": _client((10, 8), (5, 18), 20),
    }


def _choices(choose_heads: Choose) -> dict[str, str]:
    """What was chosen for each client."""
    right = _clients()
    with warnings.catch_warnings():
        # the mean of no samples is NaN, and no larger than another
        warnings.simplefilter("ignore", RuntimeWarning)
        got = ask("choose_heads", choose_heads, right)
    assert isinstance(got, dict), (
        f"choose_heads returned {got!r}: return a dict client -> 'own' or 'shared'"
    )
    missing = [client for client in right if client not in got]
    assert not missing, (
        f"choose_heads chose nothing for {missing[0]!r}: whoever has no held-out samples is served too"
    )
    odd = next((value for value in got.values() if value not in ("own", "shared")), None)
    assert odd is None, f"choose_heads chose {odd!r}: choose 'own' or 'shared'"
    return got


def _chooses_for_all(choose_heads: Choose) -> None:
    got = _choices(choose_heads)
    assert len(set(got.values())) > 1, (
        f"everybody got {got['ada']!r}: some clients gain from a head of their own and some lose, decide for each"
    )


def _chooses_by_held_out(choose_heads: Choose) -> None:
    got = _choices(choose_heads)
    right = _clients()
    wanted = _by_hits(right, "held_out")
    turned = {client: "shared" if choice == "own" else "own" for client, choice in wanted.items()}
    guesses = [
        (
            _by_hits(right, "train"),
            "a head wins on the samples that it was trained on: use the held-out ones",
        ),
        (_by_hits(right, "train", "held_out"), "leave the training samples out, also of a sum"),
        (
            turned | {"cem": got["cem"], "fay": got["fay"]},
            "that is the head that is right less often",
        ),
    ]
    for guess, why in guesses:
        client = next((client for client in guess if guess[client] != wanted[client]), "")
        assert got != guess, (
            f"{client} got {got[client]!r} where {wanted[client]!r} is right: {why}"
        )


def _chooses_where_equal(choose_heads: Choose) -> None:
    got = _choices(choose_heads)
    assert got["cem"] == "shared", (
        "cem's heads are equally good on held-out samples: then shared, it needs no care"
    )


def _chooses_without_samples(choose_heads: Choose) -> None:
    got = _choices(choose_heads)
    assert got["fay"] == "shared", (
        "fay has no held-out samples, so nothing says that its own head is better: shared"
    )


def _chooses_the_better(choose_heads: Choose) -> None:
    got = _choices(choose_heads)
    right = _clients()
    for client, choice in _by_hits(right, "held_out").items():
        held = right[client]["held_out"]
        own = held["own"].sum()
        shared = held["shared"].sum()
        count = len(held["own"])
        assert got[client] == choice, (
            f"{client} got {got[client]!r}: of {count} held-out samples its own head gets {own} right, the shared one "
            f"{shared}"
        )


def _by_hits(right: Right, *splits: str) -> dict[str, str]:
    """The choice by these samples."""
    hits = {
        client: [sum(int(of[split][head].sum()) for split in splits) for head in ("own", "shared")]
        for client, of in right.items()
    }
    return {client: "own" if own > shared else "shared" for client, (own, shared) in hits.items()}


def _client(
    train: tuple[int, int], held_out: tuple[int, int], count: int
) -> dict[str, dict[str, Any]]:
    """So many right by the own and by the shared head, of 10 training samples and of ``count``
    held-out ones."""
    return {
        split: {
            head: np.arange(n) < hits for head, hits in zip(("own", "shared"), both, strict=True)
        }
        for split, both, n in (("train", train, 10), ("held_out", held_out, count))
    }


def _told(numbers: Tensor) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in numbers.tolist()) + "]"
