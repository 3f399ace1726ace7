"""From a stored version to an engine that is ready: read, verify, build, load strictly, check, freeze, warm up.

Two sources, one way to load: :class:`RegistrySource` (durable versions of a registry) and :class:`ModuleStore` (any
module that a notebook hands to a server, kept in a temporary directory, so that it too can be evicted and come back).
"""

import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import safetensors.torch
import torch
from torch import nn

from flserving import forks, models
from flserving.errors import (
    ConflictError,
    CorruptArtifactError,
    InvalidModelError,
    ModelExecutionError,
    NotFoundError,
    ServerClosedError,
)
from flserving.models.probing import check_rows, tolerance_of
from flserving.models.processing import Postprocessor, Preprocessor
from flserving.models.weights import first_non_finite
from flserving.registry.heads import HeadStore
from flserving.registry.manifest import Signature
from flserving.registry.storage import own_folder
from flserving.serving.cache import nbytes_of
from flserving.serving.config import ServingConfig
from flserving.serving.engine import InferenceEngine, PersonalEngine, copy_of
from flserving.serving.router import DEFAULT

if TYPE_CHECKING:
    from flserving.registry import Registry

_VERSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a source knows of one version: a module of its own, the tensors that must be finite, its transforms.

    ``digest`` names the weights and the code that runs them: equal digests, equal answers.
    """

    module: nn.Module
    tensors: Mapping[str, torch.Tensor]
    preprocessor: Preprocessor
    postprocessor: Postprocessor
    digest: str
    heads: HeadStore | None = None
    round: int | None = None  # of the federated training
    probed: bool = False  # whether its rows were seen not to see each other
    code: object = None  # the architecture's definition, where ``digest`` names all of the rest


_probed: set[tuple[object, str]] = set()
"""What was found sound in this process: the same code over the same weights need not be probed at every load."""
_MOST_PROBED = 4096


def load_engine(source: "Source", version: str, config: ServingConfig) -> InferenceEngine:
    """Make ``version`` ready to serve: nothing of it answers before all of it is right.

    Raises:
        NotFoundError: No such version. CorruptArtifactError: Its bytes or its weights are not whole.
        ModelExecutionError: It does not answer a row of its own input shape, or its rows see each other (see
        :func:`flserving.models.probing.check_rows`).

    Cost: one pass over the weights for the digest and one for finiteness, then ``warmup_samples`` + 1 forwards; six
    more when a process loads it for the first time.
    """
    parts = source.parts(version)
    if (odd := first_non_finite(parts.tensors)) is not None:
        raise CorruptArtifactError(f"version {version!r}: weights {odd!r} are not finite: publish a sound version")
    engine = InferenceEngine(
        parts.module,
        parts.preprocessor,
        parts.postprocessor,
        config,
        version=version,
        digest=parts.digest,
        owned=True,
    )
    engine.warmup()
    _probe(parts, engine)
    engine.round = parts.round
    if parts.heads is not None:
        parts.heads.resize(config.head_cache_bytes)
        engine.personal = PersonalEngine(engine, parts.heads)
        engine.nbytes += parts.heads.nbytes
    return engine


def _probe(parts: Parts, engine: InferenceEngine) -> None:
    key = (parts.code, parts.digest)
    if parts.probed or key in _probed:
        return
    width = engine.preprocessor.num_features
    shape = engine.preprocessor.input_shape or (() if width is None else (width,))
    try:
        check_rows(engine.model, shape, tolerance_of(engine.model))
    except InvalidModelError as error:
        raise ModelExecutionError(f"version {engine.version!r}: {error}") from error
    if parts.code is not None:
        if len(_probed) >= _MOST_PROBED:
            _probed.clear()
        _probed.add(key)


class RegistrySource:
    """The versions of one name in a registry. ``parts`` reads and verifies one; ``signature``, ``metrics`` and
    ``nbytes`` tell of it without loading it: all raise NotFoundError, CorruptArtifactError.
    """

    def __init__(self, registry: "Registry", name: str, threshold: float = 0.0) -> None:
        self.registry, self.name, self.threshold = registry, name, threshold

    def versions(self) -> list[str]:
        return [str(number) for number in self.registry.version_numbers(self.name)]

    def parts(self, version: str) -> Parts:
        artifact = self.registry.read(self.name, int(version))
        manifest = artifact.manifest
        try:
            module = models.restore(
                manifest.architecture, manifest.parameters, artifact.tensors, nbytes=manifest.weights_nbytes
            )
        except RuntimeError as error:
            raise CorruptArtifactError(
                f"{self.name} version {version} does not fit its architecture {manifest.architecture!r}: {error}"
            ) from None
        statistics = manifest.preprocessing
        preprocessor = Preprocessor(
            mean=statistics.mean if statistics else None,
            std=statistics.std if statistics else None,
            input_shape=manifest.signature.input_shape,
        )
        postprocessor = Postprocessor(manifest.signature.output_type, self.threshold)
        code = f"{manifest.architecture} {json.dumps(manifest.parameters, sort_keys=True)}"
        digest = hashlib.sha256(f"{code} {manifest.digests.weights}".encode()).hexdigest()
        return Parts(
            module, artifact.tensors, preprocessor, postprocessor, digest, artifact.heads, manifest.round,
            code=models.definition(manifest.architecture),
        )  # fmt: skip

    def nbytes(self, version: str, head_cache_bytes: int) -> int:
        """Bytes that the loaded version will hold, from its manifest alone. Raises as :meth:`signature`."""
        manifest = self.registry.manifest(self.name, int(version))
        try:
            with torch.device("meta"):  # no memory is touched
                nbytes = nbytes_of(models.build(manifest.architecture, manifest.parameters))
        except Exception:  # one that cannot be built without memory; whatever else is wrong, the load tells
            nbytes = manifest.weights_nbytes
        return nbytes + (HeadStore.nbytes_of(manifest.heads, head_cache_bytes) if manifest.heads else 0)

    def signature(self, version: str) -> Signature:
        return self.registry.manifest(self.name, int(version)).signature

    def metrics(self, version: str) -> Mapping[str, float]:
        return self.registry.manifest(self.name, int(version)).metrics


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    structure: nn.Module  # on the meta device: layers and attributes, no weights
    code: list[Any]  # see _code
    file: Path
    digest: str
    preprocessor: Preprocessor
    postprocessor: Postprocessor

    def answers_as(self, other: "_Stored") -> bool:
        mine, theirs = (
            (
                it.digest,
                it.code,
                it.preprocessor.digest,
                it.preprocessor.num_features,
                it.preprocessor.input_shape,
                it.postprocessor.policy,
            )
            for it in (self, other)
        )
        return mine == theirs


class ModuleStore:
    """Versions of any ``nn.Module``, without a registry: the structure in memory, the weights in a temporary directory.

    Its content lives as long as the process; a durable version needs an allow-listed architecture and a registry.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None  # made when something is put there: one who is killed leaves none behind
        self._closed = False
        self._remove: Callable[[], object] = tuple
        self._numbers = itertools.count()
        self._stored: dict[str, _Stored] = {}
        self._signatures: dict[str, Signature] = {}
        self._adding = threading.Lock()
        forks.fresh_locks_in_child(self, "_adding")

    def versions(self) -> list[str]:
        return list(self._stored)

    def add(self, version: str, module: nn.Module, preprocessor: Preprocessor, postprocessor: Postprocessor) -> None:
        """Store a module under a new version id. The module is read, never changed.

        Raises:
            InvalidModelError: Not a module, an id outside ``[A-Za-z0-9._-]`` or "default", an unknown input width, it
                fails on one row, or its rows see each other.
            ConflictError: The id is taken by another model (a version never changes); the same again is fine.
        """
        if not isinstance(module, nn.Module):
            raise InvalidModelError(f"model is a {type(module).__name__}: pass a torch.nn.Module")
        if not isinstance(version, str) or not _VERSION_ID.fullmatch(version) or ".." in version:
            raise InvalidModelError(
                f"version id {version!r}: use up to 64 letters, digits and . _ -, starting with a letter or digit"
            )
        if version == DEFAULT:
            raise InvalidModelError(f"version id {version!r} is the alias of the version that answers: choose another")
        if preprocessor.num_features is None:
            preprocessor = Preprocessor(num_features=input_width(module))
        try:
            tensors = _named_tensors(module)
            data = safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in tensors})
            structure = copy_of(module, {id(t): _like(t, t.detach().to("meta")) for _, t in tensors})
        except Exception as error:
            raise InvalidModelError(f"cannot store the {type(module).__name__}: {error}") from error
        file = self._make_folder() / f"{os.getpid()}-{next(self._numbers)}.safetensors"  # a forked child adds here too
        digest = hashlib.sha256(data).hexdigest()
        stored = _Stored(structure, _code(module), file, digest, preprocessor, postprocessor)
        with self._adding:
            if (held := self._stored.get(version)) is not None:
                if held.answers_as(stored):
                    return
                raise ConflictError(f"version {version!r} exists and versions do not change: choose another id")
            try:  # one row through a copy, so that a wrong width is told now and not to the first caller
                file.write_bytes(data)
                self._stored[version] = stored
                engine = load_engine(self, version, ServingConfig(warmup_samples=1, max_batch_size=1))
                self._signatures[version] = _signature_of(engine)
            except BaseException as error:
                self._stored.pop(version, None)
                file.unlink(missing_ok=True)
                if not isinstance(error, Exception):
                    raise
                name, shape = type(module).__name__, preprocessor.input_shape or [preprocessor.num_features]
                if isinstance(error.__cause__, InvalidModelError):  # the probe's: it does answer a row
                    raise InvalidModelError(f"the {name} cannot be served: {error.__cause__}") from error
                raise InvalidModelError(
                    f"the {name} does not answer a row of {preprocessor.num_features} features "
                    f"({error.__cause__ or error}): it must take float32 [N, {', '.join(map(str, shape))}]; pass "
                    "num_features or input_shape where that is wrong"
                ) from error

    def close(self) -> None:
        """Remove the folder, which also happens when the store is forgotten, and at exit. Idempotent."""
        with self._adding:
            self._closed = True
        self._remove()

    def _make_folder(self) -> Path:
        with self._adding:
            if self._folder is None:
                if self._closed:
                    raise ServerClosedError("the store of models was closed: open a new one")
                folder, self._remove = own_folder(self, "flserving-")
                self._folder = Path(folder)
            return self._folder

    def nbytes(self, version: str, head_cache_bytes: int) -> int:
        """As :meth:`RegistrySource.nbytes`."""
        return nbytes_of(self._find(version).structure)

    def signature(self, version: str) -> Signature:
        self._find(version)
        return self._signatures[version]

    def metrics(self, version: str) -> Mapping[str, float]:
        self._find(version)
        return {}

    def parts(self, version: str) -> Parts:
        stored = self._find(version)
        try:
            data = stored.file.read_bytes()
        except OSError as error:
            raise CorruptArtifactError(
                f"version {version!r}: its temporary file is gone ({error.strerror}): load the module again"
            ) from None
        if hashlib.sha256(data).hexdigest() != stored.digest:
            raise CorruptArtifactError(f"version {version!r}: its temporary file was changed: load the module again")
        tensors = safetensors.torch.load(data)
        places = {id(place): _like(place, tensors[name]) for name, place in _named_tensors(stored.structure)}
        module = copy_of(stored.structure, places)
        finite = dict(module.named_parameters())  # a buffer may be a mask of minus infinities
        digest = f"{stored.digest}/{stored.file.stem}"  # no text tells all of a module's code: never shared
        probed = version in self._signatures  # it was added
        return Parts(module, finite, stored.preprocessor, stored.postprocessor, digest, probed=probed)

    def _find(self, version: str) -> _Stored:
        if (stored := self._stored.get(version)) is None:
            raise NotFoundError(f"no version {version!r}: loaded are {', '.join(self._stored) or 'none'}")
        return stored


Source: TypeAlias = RegistrySource | ModuleStore
"""Where the versions of one model come from."""


def _signature_of(engine: InferenceEngine) -> Signature:
    """What a row of zeros shows of a module that no registry describes."""
    width = engine.preprocessor.num_features or 0
    outputs = engine.execute([np.zeros((1, width), np.float32)])[0].arrays()
    seen = outputs.get("probabilities", outputs["predictions"])
    shape = engine.preprocessor.input_shape or (width,)
    return Signature(shape, seen.shape[1:], output_type=engine.postprocessor.output_type)


def input_width(module: nn.Module) -> int:
    """Number of features that ``module`` takes, where its first layer with weights is linear.

    Raises:
        InvalidModelError: Its first layer is of another kind: only the caller can know the width.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if next(layer.parameters(recurse=False), None) is not None:
            break
    raise InvalidModelError(
        f"the input width of {type(module).__name__} cannot be told from its first layer: pass num_features (or "
        "input_shape, e.g. (3, 32, 32))"
    )


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every parameter and buffer, also those that ``state_dict`` leaves out; a shared one under each of its names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _like(original: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``values`` as a frozen parameter where ``original`` is a parameter."""
    return nn.Parameter(values, requires_grad=False) if isinstance(original, nn.Parameter) else values


def _code(module: nn.Module) -> list[Any]:
    """What runs the weights, to be compared: the class of every part (a class defined anew is another), its attributes
    and hooks."""
    tensors = ("_parameters", "_buffers", "_modules", "training")
    return [
        (name, type(part), {key: repr(value) for key, value in vars(part).items() if key not in tensors})
        for name, part in module.named_modules()
    ]
