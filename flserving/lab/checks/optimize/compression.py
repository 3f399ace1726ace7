"""Checks of the exercises "int8 by hand", "a mask" and "a structured cut" (notebook 09)."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Floats: TypeAlias = NDArray[np.float32]
# weight [out, in] and bias [out], from the first to the last
Layers: TypeAlias = Sequence[tuple[Tensor, Tensor]]
_SPAN = np.array([-25.75, -3.1, 0, 0.2, 7.4, 101.75], np.float32)  # 255 steps of exactly 0.5
_ROWS = np.array([[0.254, -0.1, 0.02], [25.4, 3, -7]], np.float32)


def check_int8(Int8Tensor: Callable[..., Any]) -> None:
    """Check ``Int8Tensor(values, per_row=False, symmetric=False)`` with q, scale, zero_point and
    ``dequantised()``.

    Right is: a range from the smallest to the largest value that has 0 in it, in 255 steps;
    symmetric, from -m to m in 254 steps with the zero point 0. The numbers are rounded and clipped
    to int8.

    Raises:
        CheckError: Recognises the usual mistakes by the scale, the zero point and the values that
            they give.
    """
    judge(
        "int8-by-hand",
        Int8Tensor,
        Part(
            "one scale for all",
            _scale,
            (
                "How many steps lie between -128 and 127? The range, largest minus smallest, is divided into these.",
                "`low, high = min(values.min(), 0), max(values.max(), 0)`, then `scale = (high - low) / 255`.",
            ),
        ),
        Part(
            "the zero point",
            _zero_point,
            (
                "The smallest value shall become -128: -128 = low / scale + zero_point.",
                "`zero_point = np.round(-128 - low / scale)`; before, `low` is made at most 0, and `high` at least 0.",
            ),
        ),
        Part(
            "rounds and clips",
            _rounds_and_clips,
            (
                "astype(np.int8) cuts the fraction off, and what is too large starts again at -128.",
                "`np.clip(np.round(values / scale) + zero_point, -128, 127).astype(np.int8)`.",
            ),
        ),
        Part(
            "symmetric",
            _symmetric,
            (
                "The range goes from -m to m, where m is the largest magnitude; -128 is not used.",
                "`high = np.maximum(high, -low)` and `low = -high` in 254 steps from -127: the zero point is 0.",
            ),
        ),
        Part(
            "a scale for each row",
            _per_row,
            (
                "`values.min(axis=1, keepdims=True)` is a column, one number for each row.",
                "`axis = 1 if per_row else None`, and min and max over that axis with keepdims=True.",
            ),
        ),
        Part(
            "zeros only",
            _zeros,
            ("Where the range is empty, take any scale that is not 0: np.where(...).",),
        ),
    )


def _made(Int8Tensor: Callable[..., Any], values: Floats, **options: bool) -> Any:
    given = values.copy()  # a solution that changes it must not change what the next try gets
    made = ask(f"Int8Tensor(values, **{options})", lambda: Int8Tensor(given, **options))
    assert np.array_equal(values, given), (
        "the values that were given have changed: they are the model's own"
    )
    return made


def _number(found: Any, name: str) -> float:
    numbers = np.asarray(found, np.float64)
    assert numbers.size == 1, (
        f"{name} has the shape {numbers.shape}: without per_row there is one for all values"
    )
    return float(numbers.reshape(()))


def _told(name: str, found: float, right: float, mistakes: Mapping[str, float], of: Floats) -> None:
    for why, value in mistakes.items():
        assert not np.isclose(found, value, rtol=1e-4), (
            f"{name} of {of.tolist()} is {found:.6g}, {why}"
        )
    assert np.isclose(found, right, rtol=1e-5), (
        f"{name} of {of.tolist()} is {found:.6g}, right is {right:g}"
    )


def _scale(Int8Tensor: Callable[..., Any]) -> None:
    found = _number(getattr(_made(Int8Tensor, _SPAN), "scale", np.empty(0)), "scale")
    _told(
        "scale",
        found,
        0.5,
        {
            "the range over 256: 256 numbers have 255 steps between them": 127.5 / 256,
            "the range over 127: without symmetric all of -128 to 127 is there, 255 steps": 127.5
            / 127,
            "the largest magnitude over 127: that is the symmetric one, which wastes what lies below -26": 101.75
            / 127,
            "the largest value over 255: the range begins at the smallest": 101.75 / 255,
            "its reciprocal: scale is what one step is worth": 2,
        },
        _SPAN,
    )


def _zero_point(Int8Tensor: Callable[..., Any]) -> None:
    found = _number(_made(Int8Tensor, _SPAN).zero_point, "zero_point")
    _told(
        "zero_point",
        found,
        -76,
        {
            "with the wrong sign": 76,
            "not rounded: zero must be a whole number, or 0.0 is not kept exactly": -76.5,
            "0: the symmetric one": 0,
            "as for 0 to 255: int8 begins at -128": 52,
            "the value of the range's lower end, not its place": -25.75,
        },
        _SPAN,
    )
    for values in (np.array([2, 3], np.float32), np.array([-9, -4], np.float32)):
        made = _made(Int8Tensor, values)
        zero = _number(made.zero_point, "zero_point")
        assert -128 <= zero <= 127, (
            f"zero_point of {values.tolist()} is {zero:g}, outside int8: a ReLU gives zeros, and they must be kept "
            "exactly; let the range reach 0"
        )


def _rounds_and_clips(Int8Tensor: Callable[..., Any]) -> None:
    made = _made(Int8Tensor, _SPAN)
    assert getattr(made.q, "dtype", None) == np.int8, (
        f"q is of type {getattr(made.q, 'dtype', type(made.q).__name__)}: int8 has one byte a number, that is the point"
    )
    back = np.asarray(ask("dequantised()", made.dequantised))
    assert back.shape == _SPAN.shape, f"dequantised() of 6 values has the shape {back.shape}"
    assert back.dtype == np.float32, (
        f"dequantised() is {back.dtype}: compute with float32, as the model does"
    )
    assert back[-1] > 0, (
        f"101.75 came back as {back[-1]:g}: 128 does not fit into int8 and starts again at -128; clip before astype"
    )
    raw = np.asarray(made.q, np.float32)
    assert not np.allclose(back, raw * 0.5), (
        "dequantised() is q * scale: subtract zero_point from q first"
    )
    assert back[2] == 0, f"0.0 came back as {back[2]:g}: (q - zero_point) * scale gives exactly 0"
    off = np.abs(back - _SPAN)[:-1].max()
    assert off <= 0.26, (
        f"a value came back wrong by {off:g}, half a step is 0.25: round, astype cuts the fraction off"
    )
    rng = np.random.default_rng(9)
    many = rng.normal(3, 2, 4000).astype(np.float32)
    made = _made(Int8Tensor, many)
    off = np.abs(made.dequantised() - many).max() / float(np.asarray(made.scale).reshape(()))
    assert off <= 1.01, (
        f"of 4,000 values one came back wrong by {off:.2f} steps: at most one, at the ends of the range"
    )


def _symmetric(Int8Tensor: Callable[..., Any]) -> None:
    values = np.array([-2.54, -1, 0, 0.3, 1.27], np.float32)
    made = _made(Int8Tensor, values, symmetric=True)
    _told(
        "the symmetric scale",
        _number(made.scale, "scale"),
        0.02,
        {
            "the largest magnitude over 128: then +m would be 128, which int8 has not": 2.54 / 128,
            "the largest value over 127: -2.54 is larger, look at magnitudes": 0.01,
            "the range over 255: that is not symmetric about 0": 3.81 / 255,
            "twice the largest magnitude over 255: without -128 there are 254 steps": 5.08 / 255,
            "twice the largest magnitude over 127: from -127 to 127 there are 254 steps": 0.04,
        },
        values,
    )
    zero = np.asarray(made.zero_point)
    assert not zero.any(), (
        f"the symmetric zero_point is {zero.tolist()}: it is 0, so that a product needs none"
    )
    assert made.q.tolist() == [-127, -50, 0, 15, 64], (
        f"symmetric, {values.tolist()} became {made.q.tolist()}: [-127, -50, 0, 15, 64] is right (63.5 rounds to even)"
    )


def _per_row(Int8Tensor: Callable[..., Any]) -> None:
    made = _made(Int8Tensor, _ROWS, per_row=True, symmetric=True)
    scale = np.asarray(made.scale)
    assert scale.size != 1, (
        "per_row, there is one scale for both rows: the large row decides how the small one rounds"
    )
    assert scale.size != 3, (
        "per_row, there are three scales, one a column: a row of the matrix is one output channel"
    )
    assert scale.shape == (2, 1), (
        f"per_row, scale has the shape {scale.shape}: a column [2, 1], so that it broadcasts"
    )
    off = np.abs(made.dequantised() - _ROWS).max(axis=1)
    assert (off <= [0.0011, 0.11]).all(), (
        f"per_row, the rows came back wrong by {off.tolist()}: each has its own scale"
    )
    rows = np.abs(_ROWS)
    made = _made(Int8Tensor, rows, per_row=True)
    assert np.abs(made.dequantised() - rows).max() <= 0.06, (
        "per_row and not symmetric, values came back wrong by more than a step: each row needs its own zero_point, too"
    )


def _zeros(Int8Tensor: Callable[..., Any]) -> None:
    values = np.zeros((2, 3), np.float32)
    values[1] = 1
    for symmetric in (False, True):
        with np.errstate(all="ignore"):
            made = _made(Int8Tensor, values, per_row=True, symmetric=symmetric)
        assert np.all(np.asarray(made.scale) > 0), (
            "a row of zeros has the scale 0: to divide by it gives no number"
        )
        assert not made.dequantised()[0].any(), (
            f"a row of zeros came back as {made.dequantised()[0].tolist()}"
        )


def check_masks(magnitude_masks: Callable[[Mapping[str, Tensor], float], Any]) -> None:
    """Check ``magnitude_masks(weights, share)``: name -> bool tensor, True where a weight stays.

    Right is: of all weights together, ``round(share * all)`` go, those of the smallest magnitude.

    Raises:
        CheckError: Says which weights went that should have stayed.
    """
    judge(
        "magnitude-mask",
        magnitude_masks,
        Part(
            "the smallest magnitudes go",
            _smallest,
            (
                "Return a dict with the names of `weights`. `tensor.abs()` is the magnitude; False is what goes.",
                "`order = magnitudes.argsort()`; the first places in it are those of the smallest.",
            ),
        ),
        Part(
            "all layers together",
            _together,
            (
                "Put all magnitudes into one long tensor before you compare any.",
                "`torch.cat([w.abs().flatten() for w in weights.values()])`; later `.split(sizes)` and `.view_as(w)`.",
            ),
        ),
        Part(
            "exactly the share",
            _share,
            (
                "Weights of equal magnitude: a threshold takes all of them. Places in an order are unique.",
                "`stays[magnitudes.argsort()[:gone]] = False` with `gone = round(share * len(magnitudes))`.",
            ),
        ),
    )


def _masks(
    magnitude_masks: Callable[..., Any], weights: dict[str, Tensor], share: float
) -> dict[str, Tensor]:
    before = {name: tensor.clone() for name, tensor in weights.items()}
    got = ask(f"magnitude_masks(weights, {share})", magnitude_masks, weights, share)
    for name, tensor in before.items():
        assert torch.equal(tensor, weights[name]), (
            f"{name} has changed: return masks, the weights are the caller's"
        )
    assert isinstance(got, Mapping) and got.keys() == weights.keys(), (
        f"magnitude_masks returned {type(got).__name__}: a dict with the names {', '.join(weights)}"
    )
    for name, mask in got.items():
        assert isinstance(mask, Tensor) and mask.shape == weights[name].shape, (
            f"the mask of {name} has another shape"
        )
        assert mask.dtype == torch.bool, (
            f"the mask of {name} is {mask.dtype}: bool, True where a weight stays"
        )
    return dict(got)


def _layers() -> dict[str, Tensor]:
    return {
        "body": torch.tensor([[0.5, -4.0], [3.0, -0.25]]),
        "head": torch.tensor([[-0.125, 0.375, 0.4375, 1.0]]),
    }


def _smallest(magnitude_masks: Callable[..., Any]) -> None:
    weights = {"w": torch.tensor([0.5, -4.0, 3.0, -0.25])}
    found = _masks(magnitude_masks, weights, 0.5)["w"].tolist()
    shown = "of [0.5, -4, 3, -0.25], half taken away, "
    assert found != [True, False, False, True], f"{shown}the two largest went: True is what stays"
    assert found != [True, False, True, False], (
        f"{shown}the two negative ones went: compare magnitudes, not values"
    )
    assert found == [False, True, True, False], f"{shown}the mask is {found}: -4 and 3 stay"


def _together(magnitude_masks: Callable[..., Any]) -> None:
    found = {
        name: mask.flatten().tolist()
        for name, mask in _masks(magnitude_masks, _layers(), 0.5).items()
    }
    assert sum(map(sum, found.values())) == 4, (
        f"4 of 8 weights go at a share of 0.5, 4 stay: the masks are {found}"
    )
    assert found == {"body": [True, True, True, False], "head": [False, False, False, True]}, (
        f"half of two layers, 4 of 8 weights: the masks are {found}. 0.125, 0.25, 0.375 and 0.4375 are the smallest of "
        "all; was each layer judged by itself?"
    )


def _share(magnitude_masks: Callable[..., Any]) -> None:
    equal = {"a": torch.full((3, 5), 0.5), "b": torch.tensor([-0.5, 0.5, 2.0, 0.5, 0.5])}
    left = sum(int(mask.sum()) for mask in _masks(magnitude_masks, equal, 0.25).values())
    assert left == 15, (
        f"of 20 weights, 19 of the same magnitude, {left} stay at a share of 0.25: 15 do; `<=` a threshold takes all "
        "that are equal, `<` none"
    )
    whole = {"w": torch.arange(1.0, 38.0)}
    for share, wanted in ((0.0, 37), (0.98, 1), (0.7, 11)):
        left = int(_masks(magnitude_masks, whole, share)["w"].sum())
        assert left == wanted, (
            f"of 37 weights {left} stay at a share of {share}: round({share} * 37) go, {wanted} stay"
        )


def check_cut(cut_units: Callable[[Layers, float], Any]) -> None:
    """Check ``cut_units(layers, share)``: the layers without the weakest hidden units.

    ``layers`` is a list of (weight [out, in], bias [out]). Right is: of each hidden layer the units
    stay whose norm of incoming weights and bias, times the norm of outgoing weights, is largest; at
    least one; in their old order.

    Raises:
        CheckError: Says where the smaller network is not the old one with these units at zero.
    """
    judge(
        "cut-units",
        cut_units,
        Part(
            "as many units as it should",
            _count,
            (
                "A hidden layer of n units keeps round(n * (1 - share)), and never none. The outputs all stay.",
                "`score.topk(max(1, round(len(score) * (1 - share)))).indices`.",
            ),
        ),
        Part(
            "answers as the masked network",
            _as_masked,
            (
                "A unit is a row of its layer's weight, an entry of its bias, and a column of the next layer's weight.",
                "`weight[units][:, inputs]` and `bias[units]`; `inputs` are the units that stayed in the layer before.",
                "Begin with `inputs = slice(None)`, set `inputs = units` at the end of each turn, and give the last "
                "layer `weight[:, inputs]`.",
            ),
        ),
        Part(
            "the weakest go",
            _weakest,
            (
                "A unit that nobody listens to is worth nothing, however large its own weights are.",
                "`torch.cat([weight, bias[:, None]], dim=1).norm(dim=1)` times the next `weight.norm(dim=0)`.",
            ),
        ),
    )


def _random_layers(sizes: Sequence[int], seed: int) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(out, into, generator=source), torch.randn(out, generator=source))
        for into, out in pairwise(sizes)
    ]


def _cut(
    cut_units: Callable[..., Any], layers: Layers, share: float
) -> list[tuple[Tensor, Tensor]]:
    before = [tensor.clone() for layer in layers for tensor in layer]
    got = ask(f"cut_units(layers, {share})", cut_units, layers, share)
    same = all(
        torch.equal(a, b)
        for a, b in zip(before, (it for layer in layers for it in layer), strict=True)
    )
    assert same, "the layers that were given have changed: the original is still served"
    found = list(got)
    assert len(found) == len(layers), (
        f"{len(layers)} layers came in and {len(found)} came out: the last one stays, too"
    )
    return found


def _count(cut_units: Callable[..., Any]) -> None:
    for share, wanted in ((0.5, (4, 6)), (0.75, (2, 3)), (0.98, (1, 1)), (0.2, (6, 10))):
        layers = _random_layers((5, 8, 12, 3), 1)
        found = _cut(cut_units, layers, share)
        units = tuple(len(weight) for weight, _ in found[:-1])
        assert len(found[-1][0]) == 3, (
            f"the last layer has {len(found[-1][0])} outputs left: classes are no hidden units"
        )
        assert units == wanted, (
            f"share {share} of 8 and 12 hidden units left {units}, right is {wanted}"
        )


def _as_masked(cut_units: Callable[..., Any]) -> None:
    layers = _random_layers((5, 8, 12, 3), 2)
    # every second unit weighs next to nothing, and goes
    for (weight, bias), (after, _) in pairwise(layers):
        for part in (weight, bias, after.T):
            part[::2] *= 1e-9
    found = _cut(cut_units, layers, 0.5)
    shapes = [tuple(weight.shape) for weight, _ in found]
    assert shapes != [(4, 5), (6, 8), (3, 12)], (
        f"the weights have the shapes {shapes}: a layer has fewer units, and the next one still expects all of them; "
        "take its columns away"
    )
    assert shapes == [(4, 5), (6, 4), (3, 6)], (
        f"the weights have the shapes {shapes}: (4, 5), (6, 4), (3, 6) fit"
    )
    assert [tuple(bias.shape) for _, bias in found] == [(4,), (6,), (3,)], (
        "a bias has not as many entries as its layer has units: they go together"
    )
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(3))
    off = (_answers(layers, rows) - _answers(found, rows)).abs().max()
    assert off < 1e-4, (
        f"the smaller network answers otherwise than the old one with these units at zero, by up to {off:.2g}: rows, "
        "biases and the next layer's columns must be of the same units"
    )


def _answers(layers: Layers, rows: Tensor) -> Tensor:
    for number, (weight, bias) in enumerate(layers):
        rows = (rows.relu() if number else rows) @ weight.T + bias
    return rows


def _weakest(cut_units: Callable[..., Any]) -> None:
    weight = torch.tensor([[9.0], [1.0], [0.25], [2.0]])
    bias = torch.tensor([0.0, 0.0, 6.0, 0.0])
    after = torch.tensor([[0.1, 5.0, 1.5, 2.0]])
    found = _cut(cut_units, [(weight, bias), (after, torch.zeros(1))], 0.5)
    kept = [weight.flatten().tolist().index(one) for one in found[0][0].flatten().tolist()]
    shown = f"units {kept} of four stayed"
    assert kept not in ([0, 2], [0, 3]), (
        f"{shown}: unit 0 has a large weight, but its outgoing weight is 0.1; look at both, and multiply"
    )
    assert kept != [1, 3], (
        f"{shown}: is the outgoing weight all that counts, or was unit 2's bias of 6 forgotten?"
    )
    assert sorted(kept) != [0, 1], f"{shown}: those are not the largest products of the two norms"
    assert kept == sorted(kept), (
        f"{shown}, in this order: sort the places, so that a unit is found again"
    )
    assert kept == [1, 2], f"{shown}: incoming times outgoing norm is 0.9, 5, 9 and 4"
