"""Checks of the exercises "encode a delta" and "decode a delta" (notebook 07): int8, one scale a
tensor."""

import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

State = dict[str, Tensor]
Encode = Callable[[State, State], bytes]
Decode = Callable[[bytes, State], tuple[State, Mapping[str, float]]]
# as in a file: in no order
_SHAPES = {"head.weight": (3, 5), "body.0.bias": (5,), "body.0.weight": (5, 4)}
_SCALE_NBYTES = 4


def check_encode_delta(encode_delta: Encode) -> None:
    """Check ``encode_delta(new, old)``: zlib of scale (float32) and codes (int8), for each name in
    sorted order.

    The scale is the largest change of the tensor over 127; a code is its weight's change in scales,
    rounded.

    Raises:
        AssertionError: Recognises the usual mistakes by the scales and codes that they give.
    """
    judge(
        "encode-delta",
        encode_delta,
        Part(
            "a byte for each weight and a scale for each tensor",
            _is_as_long_as_it_should_be,
            (
                "Before zlib, a tensor of n weights takes 4 + n bytes: np.float32(...).tobytes(), then the codes'.",
                'Collect the parts in a list, `zlib.compress(b"".join(parts))` at the end.',
            ),
        ),
        Part(
            "the scale of the largest change",
            _has_the_right_scales,
            (
                "What changed is `new[name] - old[name]`; a weight that fell changed as well.",
                "`scale = np.float32(np.abs(change).max() / 127)`",
            ),
        ),
        Part(
            "the nearest code",
            _rounds_to_the_nearest,
            (
                "A code says how many scales a weight has changed by, as a whole number.",
                "`np.rint(change / scale).astype(np.int8)`",
            ),
        ),
        Part(
            "a tensor that stayed as it was",
            _bears_no_change,
            (
                "Its largest change is 0, and so is its scale: nothing can be divided by that.",
                "`codes = np.rint(change / scale) if scale > 0 else np.zeros_like(change)`",
            ),
        ),
        Part(
            "leaves both versions as they are",
            _leaves_both,
            ("Work on the difference, which is a tensor of yours.",),
        ),
    )


def check_decode_delta(decode_delta: Decode) -> None:
    """Check ``decode_delta(data, old)``: the version that the bytes lead to, and how far off its
    weights may be.

    Right is ``old`` plus scale times code for every weight, and half a scale as the bound of each
    tensor.

    Raises:
        AssertionError: Recognises the usual mistakes by the weights that they give.
    """
    judge(
        "decode-delta",
        decode_delta,
        Part(
            "a state and its bounds",
            _answers_a_state,
            (
                "Return two dicts, `state, bound`, both with the names of `old`.",
                "`torch.from_numpy(change).reshape(old[name].shape)` has the shape again.",
            ),
        ),
        Part(
            "finds every weight's change",
            _finds_every_change,
            (
                "The names come in sorted order; each takes 4 bytes of scale and one byte a weight.",
                "`scale = np.frombuffer(plain, np.float32, 1, at)[0]`, then the codes at `at + 4`, then move `at` on.",
                "`state[name] = old[name] + ...`: the delta says what changed, not what there is.",
            ),
        ),
        Part(
            "says how far off it may be",
            _bounds_the_error,
            (
                "A change was rounded to the nearest multiple of the scale.",
                "Between two multiples nothing is farther from the nearest than half a scale.",
            ),
        ),
        Part(
            "leaves the old version as it is",
            _leaves_the_old,
            ("`a + b` is a new tensor, `a += b` changes a.",),
        ),
    )


def _versions() -> tuple[State, State]:
    """A version and the next; every tensor changes on another scale, and the largest change is a
    fall."""
    generator = torch.Generator().manual_seed(7)
    old = {name: torch.randn(shape, generator=generator) for name, shape in _SHAPES.items()}
    new = {}
    for name, size in zip(_SHAPES, (0.2, 0.01, 0.05), strict=True):
        change = size * (2 * torch.rand(_SHAPES[name], generator=generator) - 1)
        change.view(-1)[:2] = torch.tensor([0.9, -1.3]) * size
        new[name] = old[name] + change
    return new, old


def _changes() -> dict[str, Any]:
    new, old = _versions()
    return {name: (new[name] - old[name]).numpy().ravel() for name in sorted(new)}


def _encoded(encode_delta: Encode, new: State, old: State) -> bytes:
    """What was encoded, before zlib; as long as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a division by zero a sentence tells
        data = ask("encode_delta(new, old)", encode_delta, new, old)
    assert isinstance(data, bytes), (
        f"encode_delta returned {type(data).__name__}: return the bytes that travel"
    )
    try:
        plain = zlib.decompress(data)
    except zlib.error:
        raise AssertionError(
            f"the {len(data)} bytes are not what zlib.compress makes: the device cannot read them"
        ) from None
    weights = sum(tensor.numel() for tensor in new.values())
    wanted = weights + _SCALE_NBYTES * len(new)
    got = len(plain)
    mistakes = {
        weights: "there is no scale: nobody knows what a code of 1 means",
        wanted
        + 3 * weights: "four bytes for each weight are as long as the weights: .astype(np.int8)",
        wanted
        + 7 * weights: "eight bytes for each weight are longer than the weights: .astype(np.int8)",
        wanted + weights: "two bytes for each weight: .astype(np.int8) has one",
        wanted + _SCALE_NBYTES * len(new): "a scale has eight bytes: make it an np.float32",
        weights
        + _SCALE_NBYTES: "there is one scale for all: a tensor that hardly changes would get no steps",
        5
        * weights: "there is a scale for each weight: that is the difference itself, in four bytes",
    }
    assert got == wanted, (
        f"before zlib there are {got} bytes for {weights} weights in {len(new)} tensors, {wanted} are right: "
        f"{mistakes.get(got, 'four bytes of scale and one byte for each weight, tensor after tensor')}"
    )
    return plain


def _parsed(plain: bytes, like: State, names: Iterable[str]) -> dict[str, tuple[float, Any]]:
    """Scale and codes by name, where the tensors stand in the order of the names."""
    found = {}
    at = 0
    for name in names:
        count = like[name].numel()
        scale = np.frombuffer(plain, np.float32, 1, at)[0]
        found[name] = float(scale), np.frombuffer(plain, np.int8, count, at + _SCALE_NBYTES)
        at += _SCALE_NBYTES + count
    return found


def _is_as_long_as_it_should_be(encode_delta: Encode) -> None:
    _encoded(encode_delta, *_versions())


def _has_the_right_scales(encode_delta: Encode) -> None:
    new, old = _versions()
    plain = _encoded(encode_delta, new, old)
    got = [scale for scale, _ in _parsed(plain, new, sorted(new)).values()]
    changes = list(_changes().values())
    largest = [float(np.abs(change).max()) for change in changes]
    unsorted = [scale for scale, _ in _parsed(plain, new, new).values()]
    assert not np.allclose(sorted(unsorted), sorted(one / 127 for one in largest)), (
        "the tensors stand in the order of the dict: the device reads them in the order of the sorted names"
    )
    weights = [tensor.numpy() for _, tensor in sorted(_versions()[0].items())]
    mistakes: dict[str, list[float]] = {
        "the largest change itself: one step of that size is all there would be; divide by 127": largest,
        "the largest change over 128: its code would be 128, and int8 ends at 127": [
            one / 128 for one in largest
        ],
        "the largest change over 255 or 256: codes have a sign, so 127 steps must reach the largest": [
            one / 255 for one in largest
        ],
        "of the largest rise: a weight that falls by more does not fit into 127 steps; take np.abs first": [
            float(change.max()) / 127 for change in changes
        ],
        "of the new weights, not of what changed: the steps would be far too large": [
            float(np.abs(each).max()) / 127 for each in weights
        ],
        "of the mean change: what changes by more does not fit into 127 steps": [
            float(np.abs(change).mean()) / 127 for change in changes
        ],
        "one for all tensors: one that hardly changes gets no steps": [max(largest) / 127]
        * len(changes),
        "127 over the largest change: what is sent is the size of a step": [
            127 / one for one in largest
        ],
    }
    for why, wrong in mistakes.items():
        assert not np.allclose(got, wrong, rtol=1e-3), f"the scales are {why}"
    wanted = [one / 127 for one in largest]
    told = [f"{one:.3g}" for one in (got[0], wanted[0])]
    assert np.allclose(got, wanted, rtol=1e-3), (
        f"the scale of {next(iter(_changes()))!r} is {told[0]}; its largest change over 127 is {told[1]}"
    )


def _rounds_to_the_nearest(encode_delta: Encode) -> None:
    new, old = _versions()
    got = _parsed(_encoded(encode_delta, new, old), new, sorted(new))
    for name, change in _changes().items():
        steps = change / (np.abs(change).max() / 127)
        codes = got[name][1].astype(float)
        mistakes = {
            "cut off behind the point, so all of them are too near to zero: round to the nearest": np.trunc(
                steps
            ),
            "rounded down, so all weights drift downwards, round after round: round to the nearest": np.floor(
                steps
            ),
            "of old minus new: the device would go the other way": -np.rint(steps),
            "without a sign: a weight that falls would rise": np.abs(np.rint(steps)),
            "all 0 or 1 or -1: divide by the scale first, then round": np.rint(change),
        }
        for why, wrong in mistakes.items():
            assert np.abs(codes - wrong).max() > 0 or np.array_equal(wrong, np.rint(steps)), (
                f"the codes are {why}"
            )
        off = np.abs(codes - steps)
        worst = int(off.argmax())
        assert off[worst] <= 0.51, (
            f"a weight of {name!r} changed by {steps[worst]:.2f} scales and got the code {codes[worst]:.0f}: "
            "the nearest whole number"
        )


def _bears_no_change(encode_delta: Encode) -> None:
    new, old = _versions()
    new["body.0.bias"] = old["body.0.bias"].clone()
    scale, codes = _parsed(_encoded(encode_delta, new, old), new, sorted(new))["body.0.bias"]
    assert np.isfinite(scale) and not codes.any(), (
        "a tensor that is the same in both versions got codes that are not 0: change / scale is 0 / 0 there; "
        "a layer that is not trained is such a tensor"
    )
    assert abs(scale) < 1e-30, (
        f"a tensor that is the same in both versions got the scale {scale:.3g}: its change is 0"
    )


def _leaves_both(encode_delta: Encode) -> None:
    new, old = _versions()
    ask("encode_delta(new, old)", encode_delta, new, old)
    for told, now, before in zip(("new", "old"), (new, old), _versions(), strict=True):
        same = all(torch.equal(now[name], before[name]) for name in before)
        assert same, (
            f"encode_delta changed {told}: the server goes on with it, and the next device gets nonsense"
        )


# ----------------------------------------------------------------------------------------- decoding


def _data() -> tuple[bytes, State, dict[str, tuple[float, Any]]]:
    """Bytes, the old version, and scale and codes by name; no code is its own negative or its
    neighbour's."""
    _, old = _versions()
    rng = np.random.default_rng(3)
    found = {}
    parts = []
    for name, scale in zip(sorted(old), (0.5, 0.002, 0.03), strict=True):
        codes = rng.integers(-127, 128, old[name].numel()).astype(np.int8)
        codes[0] = -127
        parts += [np.float32(scale).tobytes(), codes.tobytes()]
        found[name] = scale, codes
    return zlib.compress(b"".join(parts)), old, found


def _decoded(decode_delta: Decode) -> tuple[State, Mapping[str, float]]:
    data, old, _ = _data()
    got = ask("decode_delta(data, old)", decode_delta, data, old)
    assert isinstance(got, tuple) and len(got) == 2, (
        f"decode_delta returned {type(got).__name__}: return two dicts, state and bound"
    )
    state, bound = got
    for told, each in (("state", state), ("bound", bound)):
        assert isinstance(each, Mapping) and set(each) == set(old), (
            f"{told} must be a dict with the names of old, {sorted(old)}, it is {str(each)[:80]}"
        )
    for name, tensor in old.items():
        its = state[name]
        assert isinstance(its, Tensor), (
            f"state[{name!r}] is a {type(its).__name__}: a server loads tensors"
        )
        assert its.shape == tensor.shape, (
            f"state[{name!r}] has the shape {tuple(its.shape)}, old has {tuple(tensor.shape)}: reshape what you read"
        )
        assert its.dtype == torch.float32, (
            f"state[{name!r}] is {its.dtype}: the server takes torch.float32"
        )
    return state, bound


def _answers_a_state(decode_delta: Decode) -> None:
    _decoded(decode_delta)


def _finds_every_change(decode_delta: Decode) -> None:
    state, _ = _decoded(decode_delta)
    data, old, found = _data()
    names = sorted(old)
    unsorted = _parsed(zlib.decompress(data), old, old)
    before = np.concatenate([old[name].numpy().ravel() for name in names])
    got = np.concatenate([state[name].numpy().ravel() for name in names])
    codes = np.concatenate([found[name][1] for name in names])
    scales = np.concatenate([np.full(old[name].numel(), found[name][0]) for name in names])
    mistakes = {
        "the old weights alone: add what changed": before,
        "what changed alone: a delta starts from the old weights, add them": scales * codes,
        "old minus the change: the device would go away from the new version": before
        - scales * codes,
        "old plus the codes: a code counts scales, multiply": before + codes,
        "old plus code / 127: multiply by the tensor's own scale": before + codes / 127,
        "read without a sign: a code of -1 became 255; read np.int8": before
        + scales * codes.view(np.uint8),
    }
    for why, wrong in mistakes.items():
        assert not np.allclose(got, wrong, atol=1e-5), f"the weights are {why}"
    read = np.concatenate([np.float32(unsorted[name][0]) * unsorted[name][1] for name in names])
    assert not np.allclose(got, before + read), (
        "you read the tensors in the order of the dict: they come sorted by name"
    )
    wanted = before + scales * codes
    worst = int(np.abs(got - wanted).argmax())
    first = old[names[0]].numel()
    assert np.allclose(got[:first], wanted[:first], atol=1e-5), (
        f"the first weight of {names[0]!r} is {got[0]:.4f}, not {wanted[0]:.4f}: zlib.decompress first; "
        "then four bytes are its scale, and the codes come next"
    )
    assert np.allclose(got, wanted, atol=1e-5), (
        f"the weights of {names[0]!r} are right, one that follows is {got[worst]:.4f}, not {wanted[worst]:.4f}; "
        "each begins where the one before has ended"
    )


def _bounds_the_error(decode_delta: Decode) -> None:
    _, bound = _decoded(decode_delta)
    for name, (scale, codes) in _data()[2].items():
        wanted = scale / 2
        mistakes = {
            "a whole scale: what lies between two steps is at most half a step from the nearest": scale,
            "the largest change: rounding is off by half a step of it": float(np.abs(codes).max())
            * scale,
            "half of the largest change: a step is a 127th of that": float(np.abs(codes).max())
            * scale
            / 2,
            "zero: 127 steps do not hit every change": 0.0,
        }
        got = float(bound[name])
        for why, wrong in mistakes.items():
            assert not np.isclose(got, wrong, rtol=1e-3, atol=1e-12), (
                f"bound[{name!r}] is {got:.3g}, {why}"
            )
        assert np.isclose(got, wanted, rtol=1e-3), (
            f"bound[{name!r}] is {got:.3g}: a weight of scale {scale:g} is at most {wanted:.3g} off"
        )


def _leaves_the_old(decode_delta: Decode) -> None:
    data, old, _ = _data()
    before = {name: tensor.clone() for name, tensor in old.items()}
    ask("decode_delta(data, old)", decode_delta, data, old)
    same = all(torch.equal(old[name], tensor) for name, tensor in before.items())
    assert same, (
        "decode_delta changed old: the device still answers with it, in the middle of a request"
    )
