"""What NumPy runs without torch, for a device that has no room for it: linear layers and ReLU.

An architecture is read as a list of layers, so that nothing but numbers comes from a manifest. Each
layer answers a row by itself: rows cannot see each other, so nothing has to look for that as
``probing`` does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from flserving.errors import InvalidModelError, NotSupportedError
from flserving.models.processing import Floats, Postprocessor
from flserving.models.weights import Array, Tensors, as_array, kinds

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Parameters: TypeAlias = Mapping[str, JSON]
"""Of an architecture, by name."""
Shape: TypeAlias = tuple[int, ...]
EngineName = Literal["torch", "numpy"]
Steps: TypeAlias = list[tuple[Callable[..., Any], tuple[Any, ...]]]

SIZES = {"tutorial_mlp": (32, 64, 10), "digits_mlp": (64, 64, 10)}
MAX_LAYERS = 64
_MAX_WIDTH = 1 << 20


def check_sizes(sizes: Any) -> None:
    """Raise InvalidModelError where they are no sizes of an mlp: [D, hidden..., C]."""
    whole = isinstance(sizes, (list, tuple)) and all(type(size) is int for size in sizes)
    if (
        not whole
        or not 2 <= len(sizes) <= MAX_LAYERS
        or not all(1 <= size <= _MAX_WIDTH for size in sizes)
    ):
        raise InvalidModelError(
            f"sizes of an mlp are {str(sizes)[:80]}: use 2 to {MAX_LAYERS} integers in [1, {_MAX_WIDTH}], "
            "e.g. [784, 512, 512, 10]"
        )


# The layers. Arguments, names and shapes of tensors, and the numbers in evaluation are those of
# torch.nn.


@dataclass(frozen=True)
class Linear:
    """x W^T + b."""

    in_features: int
    out_features: int
    bias: bool = True

    @property
    def widths(self) -> tuple[int, int]:
        """In and out."""
        return self.in_features, self.out_features

    def shapes(self) -> dict[str, Shape]:
        """Its tensors, float32."""
        shapes: dict[str, Shape] = {"weight": (self.out_features, self.in_features)}
        if self.bias:
            shapes["bias"] = (self.out_features,)
        return shapes

    def steps(self, weight: Floats, bias: Floats | None = None) -> Steps:
        """What it does to rows [N, in]."""
        steps: Steps = [(np.matmul, (weight.T,))]
        if bias is not None:
            steps.append((np.add, (bias,)))
        return steps


@dataclass(frozen=True)
class BatchNorm1d:
    """(x - mean) / sqrt(var + eps) * weight + bias, by the statistics of the training: a factor and
    a shift."""

    num_features: int
    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True
    track_running_stats: bool = True

    @property
    def widths(self) -> tuple[int, int]:
        return self.num_features, self.num_features

    def shapes(self) -> dict[str, Shape]:
        math.sqrt(self.eps)  # raises for what is no such number
        if self.track_running_stats is not True:
            raise InvalidModelError(
                "a BatchNorm1d without running statistics lets rows see each other: track them"
            )
        names = ["running_mean", "running_var"]
        if self.affine:
            names = ["weight", "bias", *names]
        shapes: dict[str, Shape] = dict.fromkeys(names, (self.num_features,))
        shapes["num_batches_tracked"] = ()
        return shapes

    def steps(
        self,
        running_mean: Floats,
        running_var: Floats,
        num_batches_tracked: Array,
        weight: float | Floats = 1.0,
        bias: float | Floats = 0.0,
    ) -> Steps:
        # Rounded where torch rounds, which multiplies and adds in one step: where means are large,
        # it shows.
        std = np.sqrt(running_var + np.float32(self.eps))
        factor = (np.float32(1) / std * np.float32(weight)).astype(np.float64)
        shift = np.float32(bias - running_mean * factor).astype(np.float64)
        return [
            (np.multiply, (factor,)),
            (np.add, (shift,)),
            (np.ndarray.astype, (np.float32,)),
        ]


@dataclass(frozen=True)
class ReLU:
    """max(x, 0)."""

    widths: ClassVar[None] = None

    def shapes(self) -> dict[str, Shape]:
        return {}

    def steps(self) -> Steps:
        return [(np.maximum, (np.float32(0),))]


@dataclass(frozen=True)
class Identity(ReLU):
    """x."""

    def steps(self) -> Steps:
        return []


@dataclass(frozen=True)
class Dropout(Identity):
    """Nothing, once the training is over."""

    p: float = 0.5


_LAYERS = {layer.__name__: layer for layer in (Linear, ReLU, BatchNorm1d, Dropout, Identity)}
_RUNS = (
    f"NumPy runs mlp, {', '.join(SIZES)}, and a sequential of {', '.join(_LAYERS)}: publish one of them, or choose the "
    "engine torch (flserving edge --engine torch)"
)


def _of_mlp(sizes: Sequence[int]) -> dict[str, Any]:
    check_sizes(sizes)
    layers: dict[str, Any] = {}
    for place, (inputs, outputs) in enumerate(pairwise(sizes[:-1])):
        layers[f"body.{2 * place}"] = Linear(inputs, outputs)
        layers[f"body.{2 * place + 1}"] = ReLU()
    return layers | {"head": Linear(sizes[-2], sizes[-1])}


def _of_sequential(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for place, arguments in enumerate(map(dict, layers[: MAX_LAYERS + 1])):
        name = arguments.pop("layer")
        if name not in _LAYERS:
            raise NotSupportedError(f"the layer {str(name)[:40]!r} needs torch. {_RUNS}")
        found[str(place)] = _LAYERS[name](**arguments)
    return found


_ARCHITECTURES: dict[str, Callable[..., dict[str, Any]]] = {
    "mlp": _of_mlp,
    "sequential": _of_sequential,
    **{name: partial(_of_mlp, sizes) for name, sizes in SIZES.items()},
}


class Blueprint:
    """An architecture as NumPy runs it: see :class:`flserving.models.modules.Blueprint`.

    Raises:
        NotSupportedError: Only torch can run it; the message names what NumPy can.
        InvalidModelError: The parameters do not fit the architecture.
    """

    code = None
    probed = True  # a row never sees another

    def __init__(self, architecture: str, parameters: Parameters) -> None:
        if architecture not in _ARCHITECTURES:
            raise NotSupportedError(
                f"the architecture {str(architecture)[:80]!r} needs torch. {_RUNS}"
            )
        self.architecture = architecture
        self.like: dict[str, Array] = {}
        widths = list[int]()
        try:
            self.layers = _ARCHITECTURES[architecture](**parameters)
            for name, layer in self.layers.items():
                for tensor, shape in layer.shapes().items():
                    zero = np.float32(0) if shape else np.int64(0)  # all but the number of batches
                    self.like[f"{name}.{tensor}"] = np.broadcast_to(zero, shape)  # takes no memory
                widths += layer.widths or ()
        except (InvalidModelError, NotSupportedError):
            raise
        except Exception as error:
            raise self._odd(
                f"does not accept the parameters {str(parameters)[:200]}: {error}"
            ) from error
        whole = all(type(width) is int and 1 <= width <= _MAX_WIDTH for width in widths)
        fit = widths[1:-1:2] == widths[2::2]
        if not widths or not whole or not fit or len(self.layers) > MAX_LAYERS:
            raise self._odd(
                f"has layers of widths {str(widths)[:200]}: each takes what the one before it gives"
            )
        self.shapes: tuple[Shape, Shape] = (widths[0],), (widths[-1],)

    @property
    def nbytes(self) -> int:
        """Bytes that the model will hold."""
        return sum(array.nbytes for array in self.like.values())

    def head(self) -> tuple[int, int]:
        """Widths of the head that a client may own. Raises InvalidModelError: There is none."""
        if "head" not in self.layers:
            raise self._odd("has no part of the name head: personal heads need an mlp")
        widths: tuple[int, int] = self.layers["head"].widths
        return widths

    def restore(self, tensors: Tensors) -> "NumpyModel":
        """The model that holds these very numbers. Raises RuntimeError: They do not fit."""
        arrays = {name: as_array(tensor) for name, tensor in tensors.items()}
        if kinds(arrays) != kinds(self.like):
            raise RuntimeError(f"its tensors are {', '.join(arrays)[:200]}, or of other shapes")
        return NumpyModel(self.layers, arrays)

    def check(self, tensors: Tensors, postprocessor: Postprocessor | None) -> None:
        """Answer a row of zeros as a server would. Raises ModelExecutionError."""
        model = self.restore(tensors)
        with model.scope():
            values = model(np.zeros((1, *self.shapes[0]), np.float32))
        if postprocessor is not None:
            postprocessor(values)

    def _odd(self, what: str) -> InvalidModelError:
        return InvalidModelError(f"architecture {self.architecture!r} {what}")


class NumpyModel:
    """A chain of layers with their weights: float32 [N, D] -> outputs [N, C]. It is its own
    :class:`flserving.models.modules.Runner`."""

    def __init__(self, layers: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        self.nbytes = sum(array.nbytes for array in arrays.values())
        self.model = self
        self.body: Steps = []
        self.head: Steps = []
        with self.scope():
            for name, layer in layers.items():
                own = {tensor: arrays[f"{name}.{tensor}"] for tensor in layer.shapes()}
                part = self.head if name == "head" else self.body
                part += layer.steps(**own)
        self.steps = self.body + self.head

    def __call__(self, values: Floats) -> Floats:
        for step, arguments in self.steps:
            values = step(values, *arguments)
        return values

    @staticmethod
    def scope() -> np.errstate:
        """What is not finite is found in the outputs."""
        return np.errstate(all="ignore")

    @staticmethod
    def empty(shape: Shape) -> Floats:
        """Memory for heads."""
        return np.empty(shape, np.float32)

    @staticmethod
    def tensor(rows: Floats) -> Floats:
        """What the steps take."""
        return rows

    @staticmethod
    def apply_heads(inputs: Floats, heads: Floats, generic: Floats | None) -> Floats:
        """Row by row, inputs [N, F] times heads [N, F + 1, C], whose last rows are biases; added to
        ``generic``."""
        outputs: Floats = (inputs[:, None] @ heads[:, :-1])[:, 0] + heads[:, -1]
        return outputs if generic is None else generic + outputs
