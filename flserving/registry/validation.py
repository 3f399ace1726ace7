"""A version before it is published: everything about it that can be checked before the disk is touched."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from flserving import models
from flserving.errors import InvalidModelError
from flserving.models import onnx, probing, weights
from flserving.models.processing import ONE_OUTPUT, Postprocessor, Preprocessor
from flserving.registry.heads import HeadSet
from flserving.registry.manifest import Digests, Lineage, Manifest, Preprocessing, Signature

Statistics = Preprocessing | Mapping[str, Sequence[float]]
_PENDING = Digests("0" * 64, "0" * 64, None, "0" * 64)  # stands in until the weights are hashed
_UNKNOWN_TIME = "1970-01-01T00:00:00+00:00"  # until it is published


class Options(TypedDict, total=False):
    """The fields of :class:`Content` that ``Registry.publish`` takes as keywords."""

    architecture: str | None
    parameters: Mapping[str, models.JSON] | None
    preprocessing: Statistics | None
    lineage: Lineage | Mapping[str, Any] | None
    metrics: Mapping[str, float] | None
    output_type: Literal["classification", "regression"]
    note: str
    heads: HeadSet | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Content:
    """What :meth:`Registry.publish` was given; the fields are described there."""

    name: str
    model: nn.Module | Mapping[str, Tensor]
    architecture: str | None = None
    parameters: Mapping[str, models.JSON] | None = None
    preprocessing: Statistics | None = None
    lineage: Lineage | Mapping[str, Any] | None = None
    metrics: Mapping[str, float] | None = None
    output_type: Literal["classification", "regression"] = "classification"
    note: str = ""
    heads: HeadSet | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """Checked content of a version. ``image`` is its weights file; ``manifest`` still lacks the version number, the
    time, and the digests of weights and heads."""

    manifest: Manifest
    image: bytes
    tensors: dict[str, Tensor]


def check(content: Content, max_artifact_bytes: int, answers: bool = False) -> Draft:
    """Check and freeze what :meth:`Registry.publish` was given; its errors are described there.

    Args:
        max_artifact_bytes: Largest weights file.
        answers: An alias is to lead to it, so a row of zeros must get an answer.

    Cost: two copies of the weights, one pass for finiteness, building the architecture, and a few forwards of a few
    rows (see :func:`flserving.models.probing.check_rows`).
    """
    name = content.name
    architecture, parameters = _architecture(content)
    shapes = models.signature(architecture, parameters)
    tensors = weights.frozen(_state(content.model))
    image = weights.pack(tensors)
    if len(image) > max_artifact_bytes:
        raise InvalidModelError(
            f"the weights of {name!r} take {len(image):,} bytes: raise max_artifact_bytes = {max_artifact_bytes:,}"
        )
    module = _check_fit(architecture, parameters, tensors)
    bad = weights.first_non_finite(tensors)
    if bad is not None:
        raise InvalidModelError(f"{bad} holds NaN or infinite values: publish a model that trained without overflow")
    if content.heads is not None:
        _check_heads(module, content.heads)
    statistics, digest = _statistics(content.preprocessing, shapes[0])
    if content.output_type == "classification" and shapes[1] == (1,):
        raise InvalidModelError(f"{architecture!r} has outputs of shape [1]: {ONE_OUTPUT}")
    signature = {"input_shape": shapes[0], "output_shape": shapes[1], "output_type": content.output_type}
    try:
        manifest = Manifest(
            name=name,
            version=1,
            architecture=architecture,
            parameters=json.loads(json.dumps(dict(parameters))),
            signature=msgspec.convert(signature, Signature),
            preprocessing=statistics,
            lineage=_lineage(content.lineage),
            metrics={key: float(value) for key, value in (content.metrics or {}).items()},
            digests=msgspec.structs.replace(_PENDING, preprocessing=digest),
            weights_nbytes=len(image),
            created_at=_UNKNOWN_TIME,
            note=content.note,
        )
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # msgspec's are ValueErrors
        raise InvalidModelError(f"lineage or metrics of {name!r} are not valid: {error}") from error
    postprocessor = Postprocessor(content.output_type) if answers else None
    _check_service(architecture, parameters, tensors, shapes, postprocessor)
    return Draft(manifest, image, tensors)


def _architecture(content: Content) -> tuple[str, Mapping[str, models.JSON]]:
    """Name and parameters of what builds the module: given, or read off the module itself."""
    parameters = content.parameters or {}
    if content.architecture is not None:
        return content.architecture, parameters
    if not isinstance(content.model, nn.Module) or parameters:
        raise InvalidModelError("a state dict does not say how its module is built: give architecture=")
    return models.describe(content.model)


def _state(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(model, nn.Module):
        return model.state_dict()
    if not isinstance(model, Mapping):
        raise InvalidModelError(f"model is a {type(model).__name__}: pass a torch.nn.Module or a state dict")
    return model


def _lineage(given: Lineage | Mapping[str, Any] | None) -> Lineage | None:
    if given is None:
        return None
    return msgspec.convert(_plain(given), Lineage)


def _plain(value: Any) -> Any:
    """Built-in types in place of structs, of NumPy's and torch's numbers and arrays."""
    return msgspec.to_builtins(value, enc_hook=lambda number: number.tolist())


def _check_fit(architecture: str, parameters: Mapping[str, models.JSON], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The architecture asks for exactly these tensors: names, shapes, dtypes. Returns it, on the meta device."""
    with torch.device("meta"):
        module = models.build(architecture, parameters)
    wanted = module.state_dict()
    wrong = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    wrong += [f"{name} is unknown" for name in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        found = tensors[name]
        asked = wanted[name]
        if (found.shape, found.dtype) != (asked.shape, asked.dtype):
            wrong.append(f"{name} is {found.dtype}{list(found.shape)}, not {asked.dtype}{list(asked.shape)}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InvalidModelError(f"the weights do not fit {architecture!r}: {'; '.join(sorted(wrong)[:5])}{more}")
    if isinstance(module, onnx.OnnxModel):
        onnx.check(bytes(weights.as_bytes(tensors["graph"])), module.inputs, module.outputs)
    return module


def _check_service(
    architecture: str,
    parameters: Mapping[str, models.JSON],
    tensors: Mapping[str, Tensor],
    shapes: tuple[models.Shape, models.Shape],
    postprocessor: Postprocessor | None,
) -> None:
    """What holds of every model that may serve: see ``probing``. On a copy, for a forward may change a buffer."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    nbytes = sum(tensor.nbytes for tensor in copies.values())
    module = models.restore(architecture, parameters, copies, nbytes=nbytes).eval().requires_grad_(False)
    try:
        probing.check_answer(module, *shapes, postprocessor)
        probing.check_rows(module, shapes[0], probing.tolerance_of(module))
    except InvalidModelError as error:
        raise InvalidModelError(f"a model of {architecture!r} cannot be served: {error}") from error


def _check_heads(module: nn.Module, heads: HeadSet) -> None:
    """Heads go on the input of the last linear layer, adapters on its output."""
    if not isinstance(heads, HeadSet):
        raise InvalidModelError(f"heads are a {type(heads).__name__}: give a HeadSet, as HeadSet.from_states makes")
    generic = models.as_split(module).head
    inputs = generic.in_features
    if heads.layout == "adapter":
        inputs = generic.out_features
    wanted = (inputs + 1, generic.out_features)
    if heads.weights.shape[1:] != wanted:
        raise InvalidModelError(
            f"heads are {heads.weights.shape[1:]}: layout {heads.layout!r} on this model takes {wanted}"
        )


def _statistics(given: Statistics | None, inputs: models.Shape) -> tuple[Preprocessing | None, str]:
    """What goes into the manifest, and the digest by which caches tell preprocessings apart."""
    if given is None:
        return None, Preprocessor().digest
    entries = msgspec.structs.asdict(given) if isinstance(given, Preprocessing) else dict(given)
    if entries.keys() != {"mean", "std"}:
        raise InvalidModelError(f"preprocessing has {sorted(map(str, entries))}: give 'mean' and 'std'")
    digest = Preprocessor(mean=entries["mean"], std=entries["std"], input_shape=inputs).digest
    mean, std = (np.asarray(entries[key], dtype=np.float64) for key in ("mean", "std"))
    mean, std = (it if it.ndim == 1 else np.broadcast_to(it, inputs).ravel() for it in (mean, std))
    return Preprocessing(tuple(mean.tolist()), tuple(std.tolist())), digest
