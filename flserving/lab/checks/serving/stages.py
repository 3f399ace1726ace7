"""Checks of the exercises "a stage timer" and "the answer by hand" (notebook 02)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flserving.lab.checks.asking import ask, equal
from flserving.lab.checks.parts import Part, judge
from flserving.lab.queueing.arrivals import Floats

MakeTimer = Callable[[Callable[[], float]], Any]
ByHand = Callable[..., Mapping[str, Any]]

STAGES = ("preprocess", "infer", "postprocess")
KEYS = ("predictions", "confidences", "probabilities")


class _Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def check_stage_timer(StageTimer: MakeTimer) -> None:
    """Check ``StageTimer(clock)``: ``with timer.stage(name): ...`` adds the block's time to
    ``timer.stages_ms[name]``.

    ``clock()`` gives seconds. A stage that is entered twice counts both times; a block that raises
    counts, and its error goes on to the caller.

    Raises:
        AssertionError: Says which block was timed wrongly.
    """
    judge(
        "stage-timer",
        StageTimer,
        Part(
            "keeps its numbers to itself",
            _keeps_to_itself,
            (
                "A dict in the class body belongs to all timers.",
                "Make it in __init__: `self.stages_ms = {}`.",
            ),
        ),
        Part(
            "times a block in milliseconds",
            _times_a_block,
            (
                "Read `self.clock()` before `yield` and after it; the difference is in seconds.",
                "`began_s = self.clock()`, `yield`, `self.stages_ms[name] = (self.clock() - began_s) * 1e3`.",
            ),
        ),
        Part(
            "adds up what a stage took",
            _adds_up,
            (
                "A stage may be entered twice: add to the number that is there, 0 where there is none.",
                "`self.stages_ms[name] = self.stages_ms.get(name, 0.0) + took_ms`.",
            ),
        ),
        Part(
            "counts a block that raises",
            _counts_errors,
            (
                "When the block raises, the error comes out of `yield`, and the lines after it do not run.",
                "`try:` around `yield`, and `finally:` around what stands after it; no `except`.",
            ),
        ),
    )


def check_by_hand(by_hand: ByHand) -> None:
    """Check ``by_hand(rows, network, mean, std, timer)``: what a server answers, in three timed
    stages.

    ``rows`` is float32 [N, D]; ``mean`` and ``std`` are lists of D numbers. Right is a dict of
    lists, equal to the server's answer to 1e-6: ``predictions``, ``confidences`` and
    ``probabilities``.

    Raises:
        AssertionError: Recognises the usual mistakes by the probabilities that they give.
    """
    judge(
        "by-hand",
        by_hand,
        Part(
            "in three timed stages",
            _in_three_stages,
            (
                "Three blocks, one below the other: `with timer.stage(...):` for preprocess, infer and postprocess.",
                'The network runs once in `with timer.stage("infer"), torch.inference_mode():`.',
            ),
        ),
        Part(
            "answers with plain lists",
            _plain_lists,
            (
                "A dict with the keys predictions, confidences and probabilities; each tensor becomes a list.",
                '`{"probabilities": probabilities.tolist(), ...}`.',
            ),
        ),
        Part(
            "softmax of standardised rows",
            _softmax_of_standardised_rows,
            (
                "Look at what goes into the network first, then at what you make of its logits.",
                "`standard = (rows - np.array(mean)) / np.array(std)`, as float32.",
                "`torch.softmax(logits, dim=1)`: over the classes, and it does not overflow.",
            ),
        ),
        Part(
            "the most probable class and its confidence",
            _most_probable_class,
            (
                "Both come from the probabilities, row by row: `dim=1`.",
                "`confidences, classes = probabilities.max(dim=1)`, then `.tolist()` of each.",
            ),
        ),
        Part(
            "equal to the server's answer",
            _equal_to_the_servers,
            ("The server computes in float32.", "`torch.from_numpy(standard.astype(np.float32))`."),
        ),
    )


class _Case:
    """Seven rows, a network that watches, and what by_hand makes of them."""

    def __init__(self, by_hand: ByHand) -> None:
        rng = np.random.default_rng(2)
        self.mean = [4.0, 0.0, -2.0, 9.0, 1.0]
        self.std = [2.0, 0.5, 3.0, 1.5, 4.0]
        self.rows = np.float32(
            np.array(self.mean) + np.array(self.std) * rng.standard_normal((7, 5))
        )
        self.network = _Network()
        self.timer = self.network.timer
        before = self.rows.copy()
        arguments = self.rows, self.network, self.mean, self.std, self.timer
        self.got = ask("by_hand(rows, network, mean, std, timer)", by_hand, *arguments)
        assert np.array_equal(self.rows, before), (
            "by_hand changed the rows that it was given: they are the caller's"
        )


def _times_a_block(StageTimer: MakeTimer) -> None:
    clock = _Clock()
    timer = ask("StageTimer(clock)", StageTimer, clock)
    _run(timer, clock, "load", 0.25)
    _first(getattr(timer, "stages_ms", None))


def _adds_up(StageTimer: MakeTimer) -> None:
    clock = _Clock()
    timer = ask("StageTimer(clock)", StageTimer, clock)
    _run(timer, clock, "load", 0.25)
    clock.now_s += 5
    _run(timer, clock, "infer", 0.5)
    _expect(
        timer,
        {"load": 250, "infer": 500},
        "after 'load' (250 ms), 5 s of something else, and 'infer' (500 ms)",
    )
    _run(timer, clock, "load", 0.125)
    _expect(
        timer,
        {"load": 375, "infer": 500},
        "'load' was entered again for 125 ms; both times count, the sum is 375:",
    )


def _keeps_to_itself(StageTimer: MakeTimer) -> None:
    clock = _Clock()
    timer = ask("StageTimer(clock)", StageTimer, clock)
    _run(timer, clock, "load", 0.25)
    other = ask("StageTimer(clock)", StageTimer, clock)
    assert other is not timer and not getattr(other, "stages_ms", None), (
        "a second timer begins with the stages of the first: give each its own dict, made in __init__"
    )


def _run(timer: Any, clock: _Clock, name: str, seconds: float) -> None:
    def block() -> None:
        with timer.stage(name):
            clock.now_s += seconds

    ask(f"with timer.stage({name!r})", block)


def _first(stages_ms: Any) -> None:
    assert isinstance(stages_ms, dict), (
        f"timer.stages_ms is {stages_ms!r}: it is a dict, name -> milliseconds"
    )
    assert list(stages_ms) == ["load"], (
        f"after the stage 'load' stages_ms is {stages_ms}: its key is the stage's name"
    )
    mistakes = {
        0.25: "seconds: a second has 1000 ms",
        250_000: "microseconds: a second has 1000 ms",
        -250: "negative: the end minus the beginning",
        1_000_250: "a reading of the clock: a stage is the difference of two readings",
        1_000_000: "a reading of the clock: a stage is the difference of two readings",
        0: "no time at all: read the clock before `yield`, and again after it",
    }
    for wrong, why in mistakes.items():
        assert not equal(stages_ms["load"], wrong), (
            f"'load' took 250 ms by the clock, stages_ms says {wrong:g}, {why}"
        )
    assert equal(stages_ms["load"], 250), (
        f"'load' took 250 ms by the clock that the timer was given, stages_ms says {stages_ms['load']!r}: "
        "does it read another clock?"
    )


def _expect(timer: Any, wanted: Mapping[str, float], told: str) -> None:
    got = dict(timer.stages_ms)
    assert list(got) == list(wanted), f"{told} stages_ms has the keys {list(got)}"
    for name, ms in wanted.items():
        assert equal(got[name], ms), f"{told} stages_ms has {got[name]!r} for {name!r}, not {ms:g}"


def _counts_errors(StageTimer: MakeTimer) -> None:
    clock = _Clock()
    timer = ask("StageTimer(clock)", StageTimer, clock)
    problem = ValueError("a row with 63 features")
    try:
        with timer.stage("validate"):
            clock.now_s += 0.0625
            raise problem
    except ValueError as error:
        assert error is problem, (
            f"the block raised ValueError({problem}), the timer made it {error!r}: let it through"
        )
    except RuntimeError as error:
        raise AssertionError(
            f"a block raised an error and the timer answered with {error!r}: use try/finally"
        ) from error
    else:
        raise AssertionError(
            "the block raised an error, and the timer swallowed it: the caller takes that for an answer"
        )
    assert equal(timer.stages_ms.get("validate"), 62.5), (
        f"a block raised after 62.5 ms and stages_ms says {timer.stages_ms.get('validate')}: slow failures cost time "
        "too; count it in `finally`"
    )


class _Stages:
    """A timer that notes which stage is open."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.open: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.seen.append(name)
        self.open.append(name)
        try:
            yield
        finally:
            self.open.remove(name)


class _Network(nn.Module):
    """Five features, four classes; notes in which stage it ran, and whether for gradients."""

    def __init__(self) -> None:
        super().__init__()
        weight = np.random.default_rng(9).standard_normal((4, 5))
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32))
        self.timer = _Stages()
        self.ran: list[tuple[str, bool]] = []

    def forward(self, features: Tensor) -> Tensor:
        self.ran.append(("".join(self.timer.open), torch.is_grad_enabled()))
        return features @ self.weight.T

    def __deepcopy__(self, _: object) -> "_Network":
        return self


def _in_three_stages(by_hand: ByHand) -> None:
    case = _Case(by_hand)
    timer = case.timer
    network = case.network
    assert timer.seen == list(STAGES), (
        f"the timer saw the stages {timer.seen}: enter each of {list(STAGES)} once"
    )
    assert len(network.ran) == 1, (
        f"the network ran {len(network.ran)} times: once, for all rows together"
    )
    stage, with_gradients = network.ran[0]
    assert stage == "infer", f"the network ran in the stage {stage!r}: its time belongs to 'infer'"
    assert not with_gradients, (
        "the network ran with gradients: it keeps every layer's values for a training that never comes; use "
        "torch.inference_mode()"
    )


def _plain_lists(by_hand: ByHand) -> _Case:
    case = _Case(by_hand)
    got = case.got
    assert isinstance(got, Mapping) and set(KEYS) <= got.keys(), (
        f"by_hand returned {type(got).__name__}: return a dict with the keys {', '.join(KEYS)}"
    )
    for name in KEYS:
        assert isinstance(got[name], list), (
            f"{name} is a {type(got[name]).__name__}: JSON knows lists and plain numbers, use .tolist()"
        )
    shape = np.shape(got["probabilities"])
    assert shape == (7, 4), f"probabilities has the shape {shape} for 7 rows and 4 classes"
    assert len(got["predictions"]) == len(got["confidences"]) == 7, (
        "predictions and confidences have one entry a row"
    )
    return case


def _softmax(logits: Floats, axis: int = 1) -> Floats:
    powers = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True), np.float64)


def _softmax_of_standardised_rows(by_hand: ByHand) -> None:
    case = _plain_lists(by_hand)
    found = np.array(case.got["probabilities"], np.float64)
    x = case.rows.astype(np.float64)
    mean = np.array(case.mean)
    std = np.array(case.std)
    weight = case.network.weight.detach().numpy().astype(np.float64)
    right = ((x - mean) / std) @ weight.T
    mistakes = {
        "the logits: softmax makes probabilities of them": right,
        "the logarithms of the probabilities": np.log(_softmax(right)),
        "a sigmoid of each logit: their sum is not 1; classes exclude each other, use softmax": 1
        / (1 + np.exp(-right)),
        "a softmax over the rows: one caller's answer depends on the others; take dim=1, the classes": (
            _softmax(right, axis=0)
        ),
        "logits divided by their sum: use softmax": right / right.sum(axis=1, keepdims=True),
        "those of raw rows: the network was trained on standardised ones": _softmax(x @ weight.T),
        "divided by the variance: std is already its root": _softmax(
            ((x - mean) / std**2) @ weight.T
        ),
        "multiplied by std: divide": _softmax(((x - mean) * std) @ weight.T),
        "without the division by std": _softmax((x - mean) @ weight.T),
        "without the subtraction of mean": _softmax((x / std) @ weight.T),
        "rows / std - mean: subtract first, then divide": _softmax((x / std - mean) @ weight.T),
        "standardised by the mean and std of these seven rows: the statistics of the training travel with the model": (
            _softmax(((x - x.mean(axis=0)) / x.std(axis=0)) @ weight.T)
        ),
    }
    for why, wrong in mistakes.items():
        assert not np.allclose(found, wrong, atol=1e-5), f"the probabilities are {why}"
    off = np.abs(found - _softmax(right)).max()
    assert off < 1e-5, (
        f"the probabilities differ from softmax(network((rows - mean) / std)) by up to {off:.2g}"
    )
    far = np.full((1, 5), 3000, np.float32)
    wide = ask(
        "by_hand(one row of 3000, ...)", by_hand, far, case.network, case.mean, case.std, _Stages()
    )
    assert np.isfinite(wide["probabilities"]).all(), (
        "a row far from the training data gives NaN: exp(large) overflows; subtract the row's largest logit first, as "
        "torch.softmax does"
    )


def _most_probable_class(by_hand: ByHand) -> None:
    got = _plain_lists(by_hand).got
    table = np.array(got["probabilities"])
    predicted, confident = got["predictions"], got["confidences"]
    assert all(type(one) is int for one in predicted), (
        f"predictions are {predicted}: whole numbers, the classes"
    )
    wanted = table.argmax(axis=1).tolist()
    assert predicted == wanted, (
        f"predictions are {predicted}: of each row the class with the highest probability, {wanted}"
    )
    assert np.allclose(confident, table.max(axis=1), atol=1e-6), (
        f"confidences begin with {confident[0]!r}: of each row the highest probability, here {table[0].max():.4f}"
    )


def _equal_to_the_servers(by_hand: ByHand) -> None:
    from flserving import create_serving_pipeline

    case = _plain_lists(by_hand)
    with create_serving_pipeline(case.network, {"mean": case.mean, "std": case.std}) as server:
        served = server.predict(case.rows)
    for name in KEYS:
        off = np.abs(np.array(case.got[name]) - np.array(served[name])).max()
        assert off < 1e-6, (
            f"{name} differ from the server's by {off:.1g}: compute in float32, as the server does"
        )
