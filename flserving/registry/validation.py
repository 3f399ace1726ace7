"""A version before it is published: everything about it that can be checked before the disk is
touched."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import msgspec
import numpy as np

from flserving import models
from flserving.errors import InvalidModelError
from flserving.models import weights
from flserving.models.processing import ONE_OUTPUT, Postprocessor, Preprocessor
from flserving.models.weights import Tensors
from flserving.registry.heads import HeadSet
from flserving.registry.manifest import Digests, Lineage, Manifest, Preprocessing, Signature

if TYPE_CHECKING:
    from torch import nn

Statistics = Preprocessing | Mapping[str, Sequence[float]]
_PENDING = Digests("0" * 64, "0" * 64, None, "0" * 64)  # stands in until the weights are hashed
_UNKNOWN_TIME = "1970-01-01T00:00:00+00:00"  # until it is published


class Options(TypedDict, total=False):
    """The fields of :class:`Content` that ``Registry.publish`` takes as keywords."""

    architecture: str | None
    parameters: models.Parameters | None
    preprocessing: Statistics | None
    lineage: Lineage | Mapping[str, Any] | None
    metrics: Mapping[str, float] | None
    output_type: Literal["classification", "regression"]
    note: str
    heads: HeadSet | None
    engine: models.EngineName


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Content:
    """What :meth:`Registry.publish` was given; the fields are described there."""

    name: str
    model: "nn.Module | Tensors"
    architecture: str | None = None
    parameters: models.Parameters | None = None
    preprocessing: Statistics | None = None
    lineage: Lineage | Mapping[str, Any] | None = None
    metrics: Mapping[str, float] | None = None
    output_type: Literal["classification", "regression"] = "classification"
    note: str = ""
    heads: HeadSet | None = None
    engine: models.EngineName = "torch"


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """Checked content of a version. ``image`` is its weights file; ``manifest`` still lacks the
    version number, the time, and the digests of weights and heads."""

    manifest: Manifest
    image: bytes
    tensors: dict[str, weights.Array]


def check(content: Content, max_artifact_bytes: int, answers: bool = False) -> Draft:
    """Check and freeze what :meth:`Registry.publish` was given; its errors are described there.

    Args:
        max_artifact_bytes: Largest weights file.
        answers: An alias is to lead to it, so a row of zeros must get an answer.

    Cost: two copies of the weights, one pass for finiteness, building the architecture, and a few
    forwards of a few rows (see :func:`flserving.models.probing.check_rows`).
    """
    name = content.name
    architecture, parameters = _architecture(content)
    plan = models.blueprint(content.engine, architecture, parameters)
    shapes = plan.shapes
    tensors = weights.frozen(_state(content.model))
    image = weights.pack(tensors)
    if len(image) > max_artifact_bytes:
        raise InvalidModelError(
            f"the weights of {name!r} take {len(image):,} bytes: raise max_artifact_bytes = {max_artifact_bytes:,}"
        )
    _check_fit(architecture, plan.like, tensors)
    bad = weights.first_non_finite(tensors)
    if bad is not None:
        raise InvalidModelError(
            f"{bad} holds NaN or infinite values: publish a model that trained without overflow"
        )
    if content.heads is not None:
        _check_heads(plan, content.heads)
    statistics, digest = _statistics(content.preprocessing, shapes[0])
    if content.output_type == "classification" and shapes[1] == (1,):
        raise InvalidModelError(f"{architecture!r} has outputs of shape [1]: {ONE_OUTPUT}")
    signature = {
        "input_shape": shapes[0],
        "output_shape": shapes[1],
        "output_type": content.output_type,
    }
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
    except (
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ) as error:  # msgspec's are ValueErrors
        raise InvalidModelError(f"lineage or metrics of {name!r} are not valid: {error}") from error
    postprocessor = Postprocessor(content.output_type) if answers else None
    _check_service(architecture, plan, tensors, postprocessor)
    return Draft(manifest, image, tensors)


def _architecture(content: Content) -> tuple[str, models.Parameters]:
    """Name and parameters of what builds the module: given, or read off the module itself."""
    parameters = content.parameters or {}
    if content.architecture is not None:
        return content.architecture, parameters
    if isinstance(content.model, Mapping) or parameters:
        raise InvalidModelError(
            "a state dict does not say how its module is built: give architecture="
        )
    return models.describe(content.model)


def _state(model: Any) -> Tensors:
    if isinstance(model, Mapping):
        return model
    if not hasattr(model, "state_dict"):
        raise InvalidModelError(
            f"model is a {type(model).__name__}: pass a torch.nn.Module or a state dict"
        )
    state: Tensors = model.state_dict()
    return state


def _lineage(given: Lineage | Mapping[str, Any] | None) -> Lineage | None:
    if given is None:
        return None
    return msgspec.convert(_plain(given), Lineage)


def _plain(value: Any) -> Any:
    """Built-in types in place of structs, of NumPy's and torch's numbers and arrays."""
    return msgspec.to_builtins(value, enc_hook=lambda number: number.tolist())


def _check_fit(
    architecture: str, wanted: Mapping[str, weights.Array], tensors: Mapping[str, weights.Array]
) -> None:
    """The architecture asks for exactly these tensors: names, shapes, dtypes."""
    wrong = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    wrong += [f"{name} is unexpected" for name in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        found = weights.described(tensors[name])
        asked = weights.described(wanted[name])
        if found != asked:
            wrong.append(f"{name} is {found}, not {asked}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InvalidModelError(
            f"the weights do not fit {architecture!r}: {'; '.join(sorted(wrong)[:5])}{more}"
        )


def _check_service(
    architecture: str, plan: models.Blueprint, tensors: Tensors, postprocessor: Postprocessor | None
) -> None:
    """What holds of every model that may serve."""
    try:
        plan.check(weights.frozen(tensors), postprocessor)
    except InvalidModelError as error:
        raise InvalidModelError(f"a model of {architecture!r} cannot be served: {error}") from error


def _check_heads(plan: models.Blueprint, heads: HeadSet) -> None:
    """Heads go on the input of the last linear layer, adapters on its output."""
    if not isinstance(heads, HeadSet):
        raise InvalidModelError(
            f"heads are a {type(heads).__name__}: give a HeadSet, as HeadSet.from_states makes"
        )
    inputs, outputs = plan.head()
    if heads.layout == "adapter":
        inputs = outputs
    wanted = (inputs + 1, outputs)
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
        raise InvalidModelError(
            f"preprocessing has {sorted(map(str, entries))}: give 'mean' and 'std'"
        )
    digest = Preprocessor(mean=entries["mean"], std=entries["std"], input_shape=inputs).digest
    flat = []
    for name in ("mean", "std"):
        values = np.asarray(entries[name], dtype=np.float64)
        if values.ndim != 1:
            values = np.broadcast_to(values, inputs).ravel()
        flat.append(tuple(values.tolist()))
    return Preprocessing(*flat), digest
