"""Smaller and faster versions: quantised, pruned, distilled, or exported to ONNX. Each is a version
like any other.

What is made goes into the registry under the same name: its parent is the version it was made from,
and its lineage says how (``extra["optimisation"]`` and what follows it). Servers and devices load
it as they load any version; none of its caches is shared with its parent, for the digests differ.
Before it is published it answers sample rows beside its parent, and what answers too differently is
refused: see ``TOLERANCES``. What it is worth, is measured with
``flserving.lab.measuring.optimization.report``. Metrics are not inherited. Personal heads belong to
the body that they were trained on: a version that has some is refused, unless ``heads=None`` says
that its clients shall go without.

``torch.export`` makes the ONNX versions; its own archive (.pt2) is not taken, for loading one
unpickles. ``torch.compile`` makes no version: what it compiles is machine code for one process,
after seconds of compiling at every load, and on these networks it is slower than what it was made
from. ``flserving.lab.measuring.sweep`` measures that.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import msgspec
import torch
from torch import Tensor, nn

from flserving import models
from flserving.errors import ConfigError, InvalidModelError, check_number
from flserving.federated.training import isolated
from flserving.models.modules import copy_of
from flserving.models.onnx import OnnxModel
from flserving.optimize.distil import Data, Lesson, rows_of, taught
from flserving.optimize.export import block_quantised, calibrated, graph_of, sealed
from flserving.registry import Registry
from flserving.registry.manifest import Lineage, Manifest
from flserving.serving.loader import Parts, RegistrySource

Method: TypeAlias = Literal["dynamic", "static", "int4"]
METHODS: tuple[Method, ...] = ("dynamic", "static", "int4")
_PREFIX = "optimisation"
TOLERANCES: Mapping[str, float] = {
    "onnx": 1e-3,
    "quantised": 0.05,
    "pruned": 0.25,
    "distilled": 0.25,
}
"""How far a version's answers may be from its parent's, by technique. For a classifier it is the
mean total variation between their probabilities (half the sum of the differences; 1 where both are
sure, of two classes), which is at least the share of answers that turn from one sure class to
another. For a regression it is the root of the mean squared difference, as a share of the standard
deviation of the parent's answers."""
_SAMPLES = 512  # rows that are compared where no data are given
_MOST_SAMPLES = 4096


def to_onnx(
    registry: Registry, name: str, version: int | str = "default", **published: Any
) -> Manifest:
    """The same model for ONNX Runtime, exported by ``torch.export``, and compared with torch before
    it is published.

    Args:
        version: A version or an alias.
        published: ``metrics``, ``alias``, ``who``, ``why``, ``note`` of :meth:`Registry.publish`,
            or ``heads=None``; ``tolerance``, in place of that in ``TOLERANCES``; ``samples``, the
            data to compare with the parent on (by default the method's own data; without any,
            normal rows where the model expects standardised ones). So everywhere here.

    Raises:
        InvalidModelError: It cannot be exported (its forward depends on values, say), an operator
            is not listed in ``backends``, or the new version's answers are too far from its
            parent's.
        NotSupportedError: onnx is not installed.

    Cost: 1 to 3 s, and 5 s more the first time.
    """
    parent = _parent(registry, name, version, published)
    shapes = _shapes(parent.manifest)
    exported = sealed(graph_of(parent.parts.module, *shapes), *shapes)
    return _publish(registry, parent, _Made(exported, "onnx"), **published)


def quantise(
    registry: Registry,
    name: str,
    version: int | str = "default",
    method: Method = "dynamic",
    data: Data | None = None,
    **published: Any,
) -> Manifest:
    """Weights of few bits, by ONNX Runtime's tools.

    ``dynamic``: int8 weights and int8 activations, scaled as they come, in each row for every 32
    inputs. (Scaled over the whole batch, as is usual, a row's answer would depend on whose rows are
    beside it.) ``int4``: 4 bits a weight with a scale for every 32, computed in float32. Both are
    of linear layers; others stay float32. ``static``: int8 everywhere, one scale a tensor (weights:
    a channel), activations as ``data`` has shown them (Jacob et al., CVPR 2018, arXiv 1712.05877).
    Of the data, the ranges of activations go into the graph and nothing else. The products are
    exact on every processor, so the answers are the same on each; where there are no instructions
    for it (VNNI), that takes more time.

    Raises:
        ConfigError: No such method, or no data for ``static``.
        InvalidModelError: No layer of the kind, or as :func:`to_onnx`.
    """
    if method not in METHODS or (data is None) == (method == "static"):
        raise ConfigError(
            f"method is {method!r}: use one of {', '.join(METHODS)}; give data for static, and only there"
        )
    parent = _parent(registry, name, version, published)
    shapes = _shapes(parent.manifest)
    graph = graph_of(parent.parts.module, *shapes)
    if data is not None:
        rows = torch.cat(rows_of(data, parent.parts.preprocessor))
        graph = calibrated(graph, rows)
    elif method == "dynamic":
        graph = block_quantised(graph, 8)
    else:
        graph = block_quantised(graph, 4)
    made = _Made(sealed(graph, *shapes), f"quantised, {method}", data=data)
    return _publish(registry, parent, made, **published)


def prune(
    registry: Registry,
    name: str,
    version: int | str = "default",
    share: float = 0.5,
    *,
    structured: bool = False,
    data: Data | None = None,
    **options: Any,
) -> Manifest:
    """Take a ``share`` of the weights away, or, ``structured``, of the hidden neurons.

    Unstructured: the smallest magnitudes of all linear and convolutional layers together become
    zero (Han et al., NIPS 2015, arXiv 1506.02626). The file keeps its size and a dense product its
    time: what shrinks is the compressed size. Structured: in each hidden layer of an ``mlp`` the
    neurons go whose incoming and outgoing weights have the smallest product of norms (after Li et
    al., ICLR 2017, arXiv 1608.08710). What is left is a plain smaller ``mlp``.

    Args:
        data: Where given, what is left learns on it to answer as the parent does.
        options: Fields of :class:`Lesson` (``epochs`` is 20 here), and those of :func:`to_onnx`.

    Raises:
        ConfigError: A share outside (0, 1).
        InvalidModelError: No layers of the kind.
    """
    if not isinstance(share, float) or not 0 < share < 1:
        raise ConfigError(f"share is {share!r}: use a number between 0 and 1")
    lesson = _lesson(options, epochs=20)
    parent = _parent(registry, name, version, options)
    masks: dict[str, Tensor] = {}
    technique = "pruned"
    architecture = parent.manifest.architecture
    parameters = dict(parent.manifest.parameters)
    if structured:
        technique = "pruned, structured"
        student = without_neurons(parent.parts.module, share)
        architecture = "mlp"
        parameters = {"sizes": _sizes(student)}
    else:
        student, masks = _without_weights(copy_of(parent.parts.module), share)
    facts = {"share": share, "epochs": 0, "seed": lesson.seed}
    if data is not None:
        student = taught(student, _teacher(parent), data, parent.parts.preprocessor, lesson, masks)
        facts["epochs"] = lesson.epochs
    made = _Made(student, technique, facts, data, architecture, parameters)
    return _publish(registry, parent, made, **options)


def distil(
    registry: Registry,
    name: str,
    data: Data,
    version: int | str = "default",
    *,
    architecture: str = "mlp",
    parameters: models.Parameters,
    **options: Any,
) -> Manifest:
    """Teach a smaller architecture to answer as the parent does.

    The loss is T^2 times the cross entropy to the parent's softmax(logits / T), and ``label_share``
    of the plain one to the labels: Hinton et al. 2015 (arXiv 1503.02531). Rows need no labels.
    Clients learn apart, each on its own rows, and their students are averaged by samples after each
    of ``rounds`` rounds, as federated averaging does.

    Args:
        architecture: With ``parameters``: of the student.
        options: Fields of :class:`Lesson`, and those of :func:`to_onnx`.

    Raises:
        ConfigError: A setting out of range, or labels wanted of bare rows.
        InvalidModelError: The architecture takes or gives other shapes than the parent, or the
            parent is no classifier.

    Cost: ``rounds`` x ``epochs`` passes of Adam, about 0.1 s each on digits with 20 clients.
    """
    lesson = _lesson(options)
    parent = _parent(registry, name, version, options)
    signature = parent.manifest.signature
    shapes = models.signature(architecture, parameters)
    if shapes != (signature.input_shape, signature.output_shape):
        raise InvalidModelError(
            f"{architecture!r} maps {shapes[0]} to {shapes[1]}: the parent does not"
        )
    with isolated():
        torch.manual_seed(lesson.seed)
        student = models.build(architecture, parameters)
    student = taught(student, _teacher(parent), data, parent.parts.preprocessor, lesson)
    facts = asdict(lesson)
    del facts["learning_rate"]
    made = _Made(student, "distilled", facts, data, architecture, parameters)
    return _publish(registry, parent, made, **options)


@dataclass(frozen=True, slots=True)
class _Parent:
    manifest: Manifest
    parts: Parts


@dataclass(frozen=True, slots=True)
class _Made:
    """A version in the making: the technique, what the lineage tells of it, and the data that it
    was made with."""

    model: nn.Module
    technique: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    data: Data | None = None
    architecture: str = "onnx"
    parameters: models.Parameters | None = None


def _lesson(options: dict[str, Any], **defaults: Any) -> Lesson:
    """Takes the fields of a lesson out of ``options``."""
    for setting in fields(Lesson):
        if setting.name in options:
            defaults[setting.name] = options.pop(setting.name)
    return Lesson(**defaults)


def _parent(
    registry: Registry, name: str, version: int | str, published: Mapping[str, Any]
) -> _Parent:
    parent = registry.manifest(name, registry.resolve(name, version))
    if parent.heads is not None and "heads" not in published:
        raise InvalidModelError(
            f"{name!r} version {parent.version} has {parent.heads.num_heads} personal heads, which fit no other body: "
            "pass heads=None, and its clients get the global head of the new version"
        )
    return _Parent(parent, RegistrySource(registry, name).parts(str(parent.version)))


def _shapes(parent: Manifest) -> tuple[models.Shape, int]:
    inputs = parent.signature.input_shape
    outputs = parent.signature.output_shape
    if len(outputs) != 1:
        raise InvalidModelError(
            f"{parent.architecture!r} maps {inputs} to {outputs}: only flat outputs are exported"
        )
    return inputs, outputs[0]


def _teacher(parent: _Parent) -> nn.Module:
    manifest = parent.manifest
    if manifest.signature.output_type != "classification":
        raise InvalidModelError(
            f"{manifest.name!r} version {manifest.version} is no classifier: it cannot teach"
        )
    module: nn.Module = parent.parts.module
    return module


def _publish(
    registry: Registry,
    parent: _Parent,
    made: _Made,
    *,
    tolerance: float | None = None,
    samples: Data | None = None,
    **published: Any,
) -> Manifest:
    """Compare with the parent, then publish.

    Raises:
        ConfigError: ``tolerance`` is no number >= 0.
        InvalidModelError: It is exceeded.
    """
    manifest = parent.manifest
    output_type = manifest.signature.output_type
    most = TOLERANCES[made.technique.split(",")[0]]
    if tolerance is not None:
        most = tolerance
    check_number("tolerance", most, 0, math.inf)
    if samples is None:
        samples = made.data
    rows = _sample(parent, samples)
    distance = _distance(parent.parts.module, made.model, rows, output_type)
    if not distance <= most:
        raise InvalidModelError(
            f"{manifest.name!r} version {manifest.version}, {made.technique}, answers {len(rows)} sample rows "
            f"otherwise than its parent by {distance:.3g}, the tolerance is {most:g} ({output_type}; see "
            "optimization.TOLERANCES): keep the parent, give data or change less, or state another tolerance="
        )
    facts = {**made.facts, "distance": round(distance, 6)}
    before = manifest.lineage or Lineage()
    # the parent's own
    extra = {key: value for key, value in before.extra.items() if not key.startswith(_PREFIX)}
    extra[_PREFIX] = made.technique
    for key, value in facts.items():
        extra[f"{_PREFIX}_{key}"] = value
    parameters = made.parameters
    if isinstance(made.model, OnnxModel):
        parameters = made.model.parameters_of
    return registry.publish(
        manifest.name,
        made.model,
        architecture=made.architecture,
        parameters=parameters,
        preprocessing=manifest.preprocessing,
        output_type=output_type,
        lineage=msgspec.structs.replace(before, parent_version=manifest.version, extra=extra),
        **published,
    )


def _sample(parent: _Parent, data: Data | None) -> Tensor:
    """Standardised rows to compare two versions on."""
    if data is not None:
        rows = torch.cat(rows_of(data, parent.parts.preprocessor))
        count = min(len(rows), _MOST_SAMPLES)
        chosen = torch.linspace(0, len(rows) - 1, count)
        return rows[chosen.long()]
    source = torch.Generator().manual_seed(0)
    return torch.randn(_SAMPLES, *parent.manifest.signature.input_shape, generator=source)


def _distance(parent: nn.Module, model: nn.Module, rows: Tensor, output_type: str) -> float:
    """How far two models' answers to standardised rows are apart, see ``TOLERANCES``."""
    wanted = _answers(parent, rows)
    found = _answers(model, rows)
    if output_type == "classification":
        apart = wanted.softmax(1) - found.softmax(1)
        variation = apart.abs().sum(1) / 2
        return float(variation.mean())
    error = (wanted - found).square().mean().sqrt()
    std = wanted.std(0, correction=0)
    spread = std.square().mean().sqrt()
    return float(error / spread.clamp(min=1e-12))


def _answers(model: nn.Module, rows: Tensor) -> Tensor:
    """In float64, 256 rows at a time."""
    model.eval()
    with torch.inference_mode():
        outputs = [model(part.clone()) for part in torch.split(rows, 256)]
        return torch.cat(outputs).double()


def _linear(module: nn.Module) -> list[nn.Linear]:
    """The layers of an ``mlp``. Raises InvalidModelError: it is none, or it has no hidden layer."""
    parts = [*module.body, module.head] if isinstance(module, models.SplitModel) else []  # type: ignore[misc]
    wanted = [nn.Linear, nn.ReLU] * (len(parts) // 2)
    if len(parts) < 3 or [type(part) for part in parts[:-1]] != wanted:
        raise InvalidModelError(
            f"{type(module).__name__} is no mlp with hidden layers: neurons go from linear layers with ReLU"
        )
    return [part for part in parts if isinstance(part, nn.Linear)]


def _sizes(module: nn.Module) -> list[int]:
    layers = _linear(module)
    sizes = [layer.in_features for layer in layers]
    return [*sizes, layers[-1].out_features]


def without_neurons(module: nn.Module, share: float) -> nn.Module:
    layers = _linear(module)
    state = dict[str, Tensor]()
    kept = torch.arange(layers[0].in_features)
    sizes = [layers[0].in_features]
    for number, (layer, after) in enumerate(pairwise(layers)):
        incoming = torch.cat([layer.weight, layer.bias[:, None]], dim=1)
        score = incoming.norm(dim=1) * after.weight.norm(dim=0)
        stays = score.topk(max(1, round(len(score) * (1 - share)))).indices.sort().values
        state[f"body.{2 * number}.weight"] = layer.weight[stays][:, kept]
        state[f"body.{2 * number}.bias"] = layer.bias[stays]
        kept = stays
        sizes.append(len(stays))
    state |= {"head.weight": layers[-1].weight[:, kept], "head.bias": layers[-1].bias}
    smaller = models.build("mlp", {"sizes": [*sizes, layers[-1].out_features]})
    smaller.load_state_dict(state)
    return smaller


def _without_weights(module: nn.Module, share: float) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module, and what to multiply its weights by so that they stay away."""
    from torch.nn.utils import prune

    layers = {
        name: it for name, it in module.named_modules() if isinstance(it, nn.Linear | nn.Conv2d)
    }
    if not layers:
        raise InvalidModelError(
            f"{type(module).__name__} has no linear or convolutional layer: nothing to prune"
        )
    targets = [(layer, "weight") for layer in layers.values()]
    prune.global_unstructured(targets, pruning_method=prune.L1Unstructured, amount=share)
    masks = {}
    for name, layer in layers.items():
        masks[f"{name}.weight".lstrip(".")] = layer.weight_mask.clone()  # type: ignore[operator]
        prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    return module, masks
