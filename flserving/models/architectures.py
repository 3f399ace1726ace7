"""Architectures: code by name, never code from data.

A published version names its architecture and parameters in a manifest (plain JSON); only what was
registered here, in code, can be built from it. Every built-in takes float32 [N, D] and returns
logits float32 [N, C], and is split into ``body`` (shared by all clients) and ``head`` (the last
linear layer, which a client may own).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from flserving.errors import ConflictError, InvalidModelError, NotFoundError, NotSupportedError
from flserving.models.plain import JSON, MAX_LAYERS, SIZES, Parameters, Shape, check_sizes
from flserving.models.weights import nbytes_of

Shapes: TypeAlias = Shape | Callable[..., Shape]
"""The shape of a row, or what makes it of the parameters."""
Factory = TypeVar("Factory", bound=Callable[..., nn.Module])

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MAX_PARAMETERS_CHARS = 65_536  # of JSON: a manifest is a page, not a book


# eq=False: two definitions of one name stay two keys of a cache
@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """A registered architecture: how to build it, and the shapes of one row in and out."""

    name: str
    factory: Callable[..., nn.Module]
    input_shape: Shapes
    output_shape: Shapes
    max_values: int


_known: dict[str, Architecture] = {}


def register(
    name: str,
    *,
    input_shape: Shapes,
    output_shape: Shapes,
    max_values: int = 1 << 28,
) -> Callable[[Factory], Factory]:
    """Decorator: put an architecture of your own on the allow-list, so that the registry can store
    and rebuild it.

    ::

        @register("wide_mlp", input_shape=(64,), output_shape=(10,))
        class WideMLP(nn.Module):
            def __init__(self, width: int = 256): ...

    Args:
        name: Lower-case letters, digits, ``. _ -``; at most 64 characters. Running the same
            definition again (a notebook cell) replaces it; a different function or class under a
            taken name is refused.
        input_shape: Shape of one row without the batch, e.g. ``(64,)``; or a function of the
            parameters.
        output_shape: The same for one row of the output.
        max_values: Most numbers (weights and buffers) in a built module, so that a hostile manifest
            cannot fill the memory. The default, 2**28, is 1 GiB of float32.

    Registering is running code, so every process that serves it does so: import the module in a
    notebook, and name it to the commands: ``flserving serve --import mynet`` and ``flserving edge
    --import mynet``.

    The decorated factory gets the manifest's parameters as keyword arguments. It must make its
    tensors through torch, and must not read its tensors' values, because sizes are checked on
    torch's "meta" device first.

    Raises:
        InvalidModelError: A name outside the alphabet.
        ConflictError: The name is taken by another definition.
    """
    if not _NAME.fullmatch(name):
        raise InvalidModelError(
            f"architecture name {name!r}: use 1 to 64 lower-case letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )

    def add(factory: Factory) -> Factory:
        taken = _known.get(name)
        if taken is not None and _home(taken.factory) != _home(factory):
            raise ConflictError(
                f"architecture {name!r} is taken by {_home(taken.factory)}: choose another name"
            )
        _known[name] = Architecture(name, factory, input_shape, output_shape, max_values)
        return factory

    return add


def names() -> list[str]:
    """Names of all registered architectures, sorted."""
    return sorted(_known)


def build(architecture: str, parameters: Parameters | None = None) -> nn.Module:
    """Build a freshly initialised module. Cheap under ``torch.device("meta")``, where no memory is
    taken.

    Args:
        architecture: A registered name.
        parameters: Keyword arguments of the factory, plain JSON. E.g. ``{"sizes": [784, 512, 512,
            10]}`` for ``mlp``.

    Raises:
        NotFoundError: The name is not registered; the message lists those that are.
        InvalidModelError: The parameters are not JSON, do not fit the factory, or ask for too large
            a module.

    Cost: a first dry run on the meta device per (architecture, parameters), remembered; then the
    build itself.
    """
    entry = _find(architecture)
    text = _canonical(architecture, parameters)
    _dry_run(entry, text)
    return _call(entry, entry.factory, text)


def restore(
    architecture: str, parameters: Parameters, tensors: Mapping[str, Tensor], *, nbytes: int
) -> nn.Module:
    """The module that holds these very tensors. ``nbytes``: their size; a large module is built
    without memory first, where initialising it would cost more.

    Raises:
        RuntimeError: They do not fit. What :func:`build` raises.
    """
    module = None
    if nbytes >= 1 << 18:
        with torch.device("meta"):
            module = build(architecture, parameters)
        if any(part._non_persistent_buffers_set or _has_tensor(part) for part in module.modules()):
            module = None  # no file holds the values of these
    if module is None:
        module = build(architecture, parameters)
    module.load_state_dict(tensors, strict=True, assign=True)
    return module


def _has_tensor(part: nn.Module) -> bool:
    """Whether a tensor that is neither parameter nor buffer is an attribute."""
    return any(isinstance(value, Tensor) for value in vars(part).values())


def definition(architecture: str) -> object:
    """What stands for the code of an architecture: another object as soon as the name is registered
    anew."""
    return _find(architecture)


def signature(architecture: str, parameters: Parameters | None = None) -> tuple[Shape, Shape]:
    """Shapes of one row in and one row out, without the batch: ``((64,), (10,))``. Raises as
    ``build``."""
    inputs, outputs, _ = _dry_run(_find(architecture), _canonical(architecture, parameters))
    return inputs, outputs


def nbytes(architecture: str, parameters: Parameters | None = None) -> int:
    """Bytes that a built module will hold, see :func:`nbytes_of`. Raises as ``build``."""
    return _dry_run(_find(architecture), _canonical(architecture, parameters))[2]


def _home(factory: Callable[..., nn.Module]) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"


def _find(architecture: str) -> Architecture:
    try:
        return _known[architecture]
    except (KeyError, TypeError):  # TypeError: not even a string
        raise NotFoundError(
            f"no architecture {architecture!r}; known: {', '.join(names())}. Add yours with models.register(name, ...) "
            "(a command runs the module that does so with --import MODULE)"
        ) from None


def _canonical(architecture: str, parameters: Parameters | None) -> str:
    try:
        text = json.dumps(dict(parameters or {}), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidModelError(
            f"parameters of {architecture!r} must be plain JSON: {error}"
        ) from error
    if len(text) > _MAX_PARAMETERS_CHARS:
        raise InvalidModelError(
            f"parameters of {architecture!r} are {len(text)} characters of JSON: the most is {_MAX_PARAMETERS_CHARS}"
        )
    return text


T = TypeVar("T")


def _call(entry: Architecture, function: Callable[..., T], text: str) -> T:
    """Call with parameters from outside: whatever goes wrong is a typed error about them."""
    parameters = json.loads(text)
    try:
        return function(**parameters)
    except (InvalidModelError, NotSupportedError):
        raise
    except Exception as error:
        raise InvalidModelError(
            f"architecture {entry.name!r} does not accept the parameters {text[:200]}: {error}"
        ) from error


@lru_cache(maxsize=1024)
def _dry_run(entry: Architecture, text: str) -> tuple[Shape, Shape, int]:
    """Dry run without memory: does it build, is it small enough, what shapes does it declare, how
    many bytes has it?"""
    with torch.device("meta"):
        module = _call(entry, entry.factory, text)
    if not isinstance(module, nn.Module):
        raise InvalidModelError(
            f"architecture {entry.name!r} built a {type(module).__name__}: it must be an nn.Module"
        )
    values = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
    if values > entry.max_values:
        raise InvalidModelError(
            f"architecture {entry.name!r} with {text[:200]} has {values:,} values: the most is {entry.max_values:,} "
            "(register(..., max_values=) raises it)"
        )
    return (
        _shape(entry, entry.input_shape, text),
        _shape(entry, entry.output_shape, text),
        nbytes_of(module),
    )


def _shape(entry: Architecture, declared: Shapes, text: str) -> Shape:
    shape = _call(entry, declared, text) if callable(declared) else declared
    if not isinstance(shape, tuple) or not all(type(size) is int and size > 0 for size in shape):
        raise InvalidModelError(
            f"architecture {entry.name!r} declares the shape {shape!r}: use a tuple of ints > 0"
        )
    return shape


class SplitModel(nn.Module):
    """``head(body(x))``: float32 [N, D] -> logits float32 [N, C] (no softmax)."""

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def as_split(module: nn.Module) -> SplitModel:
    """``module``, where ``head(body(x))`` is all that it computes: a personal head then stands in
    for ``head``.

    Raises:
        InvalidModelError: It is something else, or a subclass with a forward of its own.
    """
    if (
        isinstance(module, SplitModel)
        and type(module).forward is SplitModel.forward
        and type(module.head) is nn.Linear
    ):
        return module
    raise InvalidModelError(
        f"a {type(module).__name__} is not a models.SplitModel as it stands (its forward, a linear head): personal "
        "heads need one"
    )


@register("mlp", input_shape=lambda sizes: (sizes[0],), output_shape=lambda sizes: (sizes[-1],))
def mlp(sizes: Sequence[int]) -> SplitModel:
    """Linear layers with ReLU between: ``sizes = [D, hidden..., C]``; with two sizes the body is
    empty."""
    check_sizes(sizes)
    body = nn.Sequential()
    for inputs, outputs in pairwise(sizes[:-1]):
        # in place: one allocation less per layer
        body.extend((nn.Linear(inputs, outputs), nn.ReLU(inplace=True)))
    return SplitModel(body, nn.Linear(sizes[-2], sizes[-1]))


@register("tutorial_mlp", input_shape=(32,), output_shape=(10,))
def tutorial_mlp() -> SplitModel:
    """The tutorial's model: 32-64-10."""
    return mlp(SIZES["tutorial_mlp"])


@register("digits_mlp", input_shape=(64,), output_shape=(10,))
def digits_mlp() -> SplitModel:
    """For 8x8 digits, flattened: 64-64-10."""
    return mlp(SIZES["digits_mlp"])


@register("digits_cnn", input_shape=(64,), output_shape=(10,))
def digits_cnn() -> SplitModel:
    """A small CNN for 8x8 digits: takes them flattened, [N, 64], and gives them their shape back
    inside."""
    body = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    return SplitModel(body, nn.Linear(32 * 2 * 2, 10))


_LAYERS = {  # what a sequential may hold: the layer's arguments, which are also its attributes
    "Linear": ("in_features", "out_features", "bias"),
    "BatchNorm1d": ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    "LayerNorm": ("normalized_shape", "eps", "elementwise_affine"),
    "Dropout": ("p",),
    "ELU": ("alpha",),
    "GELU": ("approximate",),
    "Identity": (),
    "LeakyReLU": ("negative_slope",),
    "ReLU": (),
    "SiLU": (),
    "Sigmoid": (),
    "Tanh": (),
}


def _features(layers: Sequence[Parameters], which: int, name: str) -> Shape:
    sizes = [layer[name] for layer in layers if layer["layer"] == "Linear"]
    return (sizes[which],)  # type: ignore[return-value]


@register(
    "sequential",
    input_shape=lambda layers: _features(layers, 0, "in_features"),
    output_shape=lambda layers: _features(layers, -1, "out_features"),
)
def sequential(layers: Sequence[Parameters]) -> nn.Sequential:
    """A plain ``nn.Sequential`` over feature rows: ``[{"layer": "Linear", ...}, ...]``, see
    :func:`describe`."""
    if not isinstance(layers, (list, tuple)) or not 1 <= len(layers) <= MAX_LAYERS:
        raise InvalidModelError(
            f"layers of a sequential are {str(layers)[:80]}: give 1 to {MAX_LAYERS} of them"
        )
    modules = []
    for arguments in map(dict, layers):
        kind = arguments.pop("layer", None)
        if kind not in _LAYERS:
            raise InvalidModelError(
                f"layer {str(kind)[:40]!r} is not on the list: {', '.join(_LAYERS)}"
            )
        modules.append(getattr(nn, str(kind))(**arguments))
    return nn.Sequential(*modules)


def describe(module: nn.Module) -> tuple[str, dict[str, JSON]]:
    """The architecture and the parameters that build ``module`` anew, where it is a plain
    ``nn.Sequential``.

    Raises:
        InvalidModelError: It is something else, or holds a layer that is not on the list.
    """
    layers: list[JSON] = []
    if type(module) is not nn.Sequential or not any(type(layer) is nn.Linear for layer in module):
        raise InvalidModelError(
            f"a {type(module).__name__} does not say how it is built: give architecture=, a registered name "
            "(models.register puts your own class on the list); only an nn.Sequential with linear layers needs none"
        )
    for layer in module:
        kind = type(layer).__name__
        if type(layer) is not getattr(nn, kind, None) or kind not in _LAYERS:
            raise InvalidModelError(
                f"a {kind} is not on the list of a plain nn.Sequential: {', '.join(_LAYERS)}"
            )
        values = {name: getattr(layer, name) for name in _LAYERS[kind]}
        if "bias" in values:
            values["bias"] = values["bias"] is not None
        layers.append({"layer": kind, **values})
    return "sequential", {"layers": layers}
