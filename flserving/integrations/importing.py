"""A file of another tool as a version: which architecture it fits, the casts that it needs, and
where it came from."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Unpack

import msgspec
import torch
from torch import Tensor

from flserving import models
from flserving.errors import FlservingError, InvalidModelError
from flserving.integrations.files import MOST_NBYTES, ModelFile, read_file
from flserving.models import weights
from flserving.registry import Registry, validation
from flserving.registry.manifest import Manifest

# their parameters tell all there is: never found by shapes
_SELF_DESCRIBED = {"onnx", "sequential"}
Tensors = Mapping[str, Tensor]
Found = tuple[str, models.Parameters]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ImportedModel:
    """A model that was read from a file and checked as ``Registry.publish`` checks it.

    Args:
        content: What :meth:`publish` hands on. ``notes``: what was found out and changed, for
            people.
    """

    content: validation.Content
    notes: tuple[str, ...]

    def publish(self, registry: Registry, *, alias: str | None = None, why: str = "") -> Manifest:
        """Store it as the next version of its name, as :meth:`Registry.publish` does."""
        names = [field.name for field in dataclasses.fields(self.content)]
        options = {name: getattr(self.content, name) for name in names}
        return registry.publish(**options, alias=alias, who="import", why=why)


def read_model(
    path: str | os.PathLike[str],
    name: str,
    *,
    answers: bool = False,
    most_nbytes: int = MOST_NBYTES,
    **options: Unpack[validation.Options],
) -> ImportedModel:
    """Read a model that another tool saved, and check it as the next version of ``name``.

    ::

        read_model("round-3-weights.npz", "digits").publish(registry)

    Args:
        path: A file: see :func:`flserving.integrations.files.read_file`.
        answers: An alias is to lead to it, so a row of zeros must get an answer.
        options: As of ``Registry.publish``. Without ``architecture`` the one registered
            architecture is taken that has tensors of these names and shapes (of these shapes, in
            this order, where the file has no names). ``lineage`` gets what the file tells: its
            name, its sha256, its format, its tool and its round.

    Raises:
        InvalidModelError: What ``read_file`` and ``Registry.publish`` raise; none or several
            architectures fit.

    Numbers are cast to the types that the architecture has, float64 to float32 say; ``notes`` tells
    it.
    """
    file = read_file(path, most_nbytes)
    notes = []
    architecture = options.get("architecture")
    parameters = options.get("parameters") or {}
    if file.architecture is not None:
        if architecture not in (None, file.architecture[0]):
            raise InvalidModelError(
                f"{file.name} is {file.format}: it needs no architecture, {architecture!r} was given"
            )
        architecture, parameters = file.architecture
    elif architecture is None:
        if parameters:
            raise InvalidModelError("parameters belong to an architecture: name that, too")
        architecture, parameters = _fitting(file)
        what = "names and shapes" if file.named else "shapes, in their order,"
        notes.append(
            f"found by the {what} of its {len(file.tensors)} tensors; no file tells its activations"
        )
    wanted = _wanted(architecture, parameters)
    tensors = file.tensors
    if not file.named:
        if len(tensors) != len(wanted):
            raise InvalidModelError(
                f"{file.name} has {len(tensors)} arrays without names, {architecture!r} has {len(wanted)} tensors "
                f"({', '.join(wanted):.300}): save all of model.state_dict(), in its order"
            )
        tensors = dict(zip(wanted, tensors.values(), strict=True))
    cast = weights.cast(tensors, wanted)
    casts: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
    for key, tensor in cast.items():
        old = tensors[key].dtype
        if tensor.dtype != old:
            casts[old, tensor.dtype] += 1
    for (old, new), count in casts.items():
        note = f"{count} tensors cast from {old} to {new}"
        notes.append(note.replace("torch.", ""))
    given = options.get("lineage") or {}
    lineage = dict(given) if isinstance(given, Mapping) else msgspec.structs.asdict(given)
    facts = {
        "tool": file.tool,
        "file": file.name,
        "file_sha256": file.sha256,
        "format": file.format,
    }
    known = {key: value for key, value in facts.items() if value}
    lineage["extra"] = known | dict(lineage.get("extra", {}))
    if lineage.get("round") is None:
        lineage["round"] = file.round
    options |= {"architecture": architecture, "parameters": parameters, "lineage": lineage}
    content = validation.Content(name=name, model=cast, **options)
    validation.check(content, most_nbytes, answers)
    return ImportedModel(content, tuple(notes))


def _wanted(architecture: str, parameters: models.Parameters) -> dict[str, Tensor]:
    with torch.device("meta"):
        return models.build(architecture, parameters).state_dict()


def _fitting(file: ModelFile) -> Found:
    """The one registered architecture with these tensors: one without parameters, or else an mlp of
    these sizes."""
    candidates: list[Found] = [(name, {}) for name in models.names() if name not in _SELF_DESCRIBED]
    fitting = [found for found in candidates if _fits(file, found)]
    # body.2 before body.10 before head; safetensors tells no order
    names = sorted(file.tensors, key=_natural)
    layers = [file.tensors[name].shape for name in names if file.tensors[name].dim() == 2]
    if not fitting and layers:
        outputs = [shape[0] for shape in layers]
        mlp = ("mlp", {"sizes": [layers[0][1], *outputs]})
        if _fits(file, mlp):
            fitting = [mlp]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InvalidModelError(
            f"{file.name} fits {' and '.join(name for name, _ in fitting)}: choose one with architecture"
        )
    held = [f"{name} {list(tensor.shape)}" for name, tensor in file.tensors.items()]
    shown = ", ".join(held[:6])
    if len(held) > 6:
        shown += ", ..."
    raise InvalidModelError(
        f"{file.name} holds {len(held)} tensors ({shown}), and no "
        f"registered architecture ({', '.join(models.names())}) has just these: register yours with models.register "
        "and name its module with --import; layers of a plain nn.Sequential are named by architecture 'sequential' and "
        'parameters {"layers": [{"layer": "Linear", ...}, ...]}, for a state dict does not tell what lies between them'
    )


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _fits(file: ModelFile, found: Found) -> bool:
    try:
        wanted = _wanted(*found)
    except FlservingError:  # it needs parameters
        return False
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    have = {name: tensor.shape for name, tensor in file.tensors.items()}
    if file.named:
        return shapes == have
    return list(shapes.values()) == list(have.values())
