"""From a stored version to an engine that is ready: read, verify, build, load strictly, check,
freeze, warm up.

Two sources, one way to load: :class:`RegistrySource` (durable versions of a registry) and
:class:`ModuleStore` (any module that a notebook hands to a server: a copy is kept, so that it too
can be evicted and come back).
"""

import hashlib
import json
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from flserving import forks, models
from flserving.errors import (
    ConflictError,
    CorruptArtifactError,
    InvalidModelError,
    ModelExecutionError,
    NotFoundError,
)
from flserving.models.processing import Postprocessor, Preprocessor
from flserving.models.weights import Tensors, as_bytes, first_non_finite, nbytes_of
from flserving.registry.heads import HeadStore
from flserving.registry.manifest import Signature
from flserving.serving.config import ServingConfig
from flserving.serving.engine import InferenceEngine, PersonalEngine
from flserving.serving.router import DEFAULT

if TYPE_CHECKING:
    from torch import nn

    from flserving.registry import Registry

_VERSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a source knows of one version: a model of its own, the tensors that must be finite, its
    transforms.

    ``module`` is torch's, or a :class:`flserving.models.plain.NumpyModel`. ``digest`` names the
    weights and the code that runs them: equal digests, equal answers.
    """

    module: Any
    tensors: Tensors
    preprocessor: Preprocessor
    postprocessor: Postprocessor
    digest: str
    heads: HeadStore | None = None
    round: int | None = None  # of the federated training
    probed: bool = False  # whether its rows were seen not to see each other
    code: object = None  # the architecture's definition, where ``digest`` names all of the rest


def load_engine(source: "Source", version: str, config: ServingConfig) -> InferenceEngine:
    """Make ``version`` ready to serve: nothing of it answers before all of it is right.

    Raises:
        NotFoundError: No such version.
        CorruptArtifactError: Its bytes or its weights are not whole.
        ModelExecutionError: It does not answer a row of its own input shape, or its rows see each
            other (see :func:`flserving.models.probing.check_rows`).

    Example::

        engine = load_engine(RegistrySource(registry, "digits"), "3", ServingConfig())
        engine.predict(rows)["predictions"]

    Cost: one pass over the weights for the digest and one for finiteness, then ``warmup_samples`` +
    1 forwards; six more when a process loads it for the first time.
    """
    return ready_engine(source.parts(version), version, config)


def ready_engine(parts: Parts, version: str, config: ServingConfig) -> InferenceEngine:
    """What :func:`load_engine` does with the parts of a version."""
    odd = first_non_finite(parts.tensors)
    if odd is not None:
        raise CorruptArtifactError(
            f"version {version!r}: weights {odd!r} are not finite: publish a sound version"
        )
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


_probed: set[tuple[object, str]] = set()
"""What was found sound in this process: the same code over the same weights need not be probed at
every load."""
_MOST_PROBED = 4096


def _probe(parts: Parts, engine: InferenceEngine) -> None:
    key = (parts.code, parts.digest)
    if parts.probed or key in _probed:
        return
    from flserving.models.probing import check_rows, tolerance_of  # loads torch

    try:
        check_rows(engine.model, engine.preprocessor.row_shape, tolerance_of(engine.model))
    except InvalidModelError as error:
        raise ModelExecutionError(f"version {engine.version!r}: {error}") from error
    if parts.code is not None:
        if len(_probed) >= _MOST_PROBED:
            _probed.clear()
        _probed.add(key)


class RegistrySource:
    """The versions of one name in a registry. ``parts`` reads and verifies one; ``signature``,
    ``metrics`` and ``nbytes`` tell of it without loading it: all raise NotFoundError,
    CorruptArtifactError.
    """

    def __init__(
        self,
        registry: "Registry",
        name: str,
        threshold: float = 0.0,
        engine: models.EngineName = "torch",
    ) -> None:
        self.engine: models.EngineName = engine
        self.registry = registry
        self.name = name
        self.threshold = threshold

    def versions(self) -> list[str]:
        return [str(number) for number in self.registry.version_numbers(self.name)]

    def parts(self, version: str) -> Parts:
        artifact = self.registry.read(self.name, int(version))
        manifest = artifact.manifest
        plan = models.blueprint(self.engine, manifest.architecture, manifest.parameters)
        try:
            module = plan.restore(artifact.arrays)
        except RuntimeError as error:
            raise CorruptArtifactError(
                f"{self.name} version {version} does not fit its architecture {manifest.architecture!r}: {error}"
            ) from None
        statistics = manifest.preprocessing
        preprocessor = Preprocessor(
            mean=getattr(statistics, "mean", None),
            std=getattr(statistics, "std", None),
            input_shape=manifest.signature.input_shape,
        )
        code = f"{self.engine} {manifest.architecture} {json.dumps(manifest.parameters, sort_keys=True)}"
        digest = hashlib.sha256(f"{code} {manifest.digests.weights}".encode()).hexdigest()
        return Parts(
            module,
            artifact.arrays,
            preprocessor=preprocessor,
            postprocessor=Postprocessor(manifest.signature.output_type, self.threshold),
            digest=digest,
            heads=artifact.heads,
            round=manifest.round,
            probed=plan.probed,
            code=plan.code,
        )

    def nbytes(self, version: str, head_cache_bytes: int) -> int:
        """Bytes that the loaded version will hold, from its manifest alone. Raises as
        :meth:`signature`."""
        manifest = self.registry.manifest(self.name, int(version))
        try:
            nbytes = models.blueprint(
                self.engine, manifest.architecture, manifest.parameters
            ).nbytes
        except (
            Exception
        ):  # one that cannot be built without memory; whatever else is wrong, the load tells
            nbytes = manifest.weights_nbytes
        if manifest.heads is not None:
            nbytes += HeadStore.nbytes_of(manifest.heads, head_cache_bytes)
        return nbytes

    def signature(self, version: str) -> Signature:
        return self.registry.manifest(self.name, int(version)).signature

    def metrics(self, version: str) -> Mapping[str, float]:
        return self.registry.manifest(self.name, int(version)).metrics


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    module: "nn.Module"  # a copy of our own
    preprocessor: Preprocessor
    postprocessor: Postprocessor
    content: tuple[Any, ...]  # all that its answers depend on, to be compared
    digest: str
    signature: Signature | None = None  # None: it has not answered a row yet

    def parts(self) -> Parts:
        from flserving.models.modules import copy_of

        module = copy_of(self.module)
        return Parts(
            module,
            dict(module.named_parameters()),  # a buffer may be a mask of minus infinities
            preprocessor=self.preprocessor,
            postprocessor=self.postprocessor,
            digest=self.digest,
            probed=self.signature is not None,
        )


class ModuleStore:
    """Versions of any ``nn.Module``, without a registry: a copy of each, from which engines are
    made.

    Its content lives as long as the store; a durable version needs an allow-listed architecture and
    a registry.
    """

    def __init__(self) -> None:
        self._stored: dict[str, _Stored] = {}
        self._adding = threading.Lock()
        forks.fresh_locks_in_child(self, "_adding")

    def versions(self) -> list[str]:
        return list(self._stored)

    def add(
        self,
        version: str,
        module: "nn.Module",
        preprocessor: Preprocessor,
        postprocessor: Postprocessor,
    ) -> None:
        """Store a copy of a module under a new version id. The module is read, never changed.

        Raises:
            InvalidModelError: Not a module, an id outside ``[A-Za-z0-9._-]`` or "default", an
                unknown input width, it fails on one row, or its rows see each other.
            ConflictError: The id is taken by another model (a version never changes); the same
                again is fine.

        Example: ``store.add("v1", nn.Linear(8, 3), Preprocessor(num_features=8), Postprocessor())``
        """
        from torch import nn

        if not isinstance(module, nn.Module):
            raise InvalidModelError(f"model is a {type(module).__name__}: pass a torch.nn.Module")
        _check_id(version)
        if preprocessor.num_features is None:
            preprocessor = Preprocessor(num_features=input_width(module))
        stored = _stored(module, preprocessor, postprocessor)
        with self._adding:
            held = self._stored.get(version)
            if held is not None:
                if held.content == stored.content:
                    return
                raise ConflictError(
                    f"version {version!r} exists and versions do not change: choose another id"
                )
            try:  # one row through a copy: a wrong width fails here and not at the first request
                engine = ready_engine(
                    stored.parts(), version, ServingConfig(warmup_samples=1, max_batch_size=1)
                )
                signature = _signature_of(engine)
            except Exception as error:
                raise _unfit(module, preprocessor, error) from error
            self._stored[version] = replace(stored, signature=signature)

    def nbytes(self, version: str, head_cache_bytes: int) -> int:
        """As :meth:`RegistrySource.nbytes`."""
        return nbytes_of(self._find(version).module)

    def signature(self, version: str) -> Signature:
        signature = self._find(version).signature
        assert signature is not None
        return signature

    def metrics(self, version: str) -> Mapping[str, float]:
        self._find(version)
        return {}

    def parts(self, version: str) -> Parts:
        return self._find(version).parts()

    def _find(self, version: str) -> _Stored:
        stored = self._stored.get(version)
        if stored is None:
            raise NotFoundError(
                f"no version {version!r}: loaded are {', '.join(self._stored) or 'none'}"
            )
        return stored


def _check_id(version: object) -> None:
    if not isinstance(version, str) or not _VERSION_ID.fullmatch(version) or ".." in version:
        raise InvalidModelError(
            f"version id {version!r}: use up to 64 letters, digits and . _ -, starting with a letter or digit"
        )
    if version == DEFAULT:
        raise InvalidModelError(
            f"version id {version!r} is the alias of the version that answers: choose another"
        )


def _stored(module: "nn.Module", before: Preprocessor, after: Postprocessor) -> _Stored:
    from flserving.models.modules import copy_of

    try:
        content = (
            _weights_digest(module),
            _code(module),
            before.digest,
            before.row_shape,
            after.policy,
        )
        copy = copy_of(module)
    except Exception as error:
        raise InvalidModelError(f"cannot store the {type(module).__name__}: {error}") from error
    digest = secrets.token_hex(32)  # no text tells all of a module's code: never shared
    return _Stored(copy, before, after, content, digest)


def _unfit(module: "nn.Module", preprocessor: Preprocessor, error: Exception) -> InvalidModelError:
    """Why a module that was just stored cannot be served."""
    name = type(module).__name__
    if isinstance(error.__cause__, InvalidModelError):  # the probe's: it does answer a row
        return InvalidModelError(f"the {name} cannot be served: {error.__cause__}")
    shape = ", ".join(map(str, preprocessor.row_shape))
    return InvalidModelError(
        f"the {name} does not answer a row of {preprocessor.num_features} features ({error.__cause__ or error}): it "
        f"must take float32 [N, {shape}]; pass num_features or input_shape where that is wrong"
    )


Source: TypeAlias = RegistrySource | ModuleStore
"""Where the versions of one model come from."""


def _signature_of(engine: InferenceEngine) -> Signature:
    """What a row of zeros shows of a module that no registry describes."""
    row = np.zeros((1, engine.preprocessor.num_features or 0), np.float32)
    outputs = engine.execute([row])[0].arrays()
    seen = outputs.get("probabilities", outputs["predictions"])
    return Signature(
        engine.preprocessor.row_shape, seen.shape[1:], output_type=engine.postprocessor.output_type
    )


def input_width(module: "nn.Module") -> int:
    """Number of features that ``module`` takes, where its first layer with weights is linear.

    Raises:
        InvalidModelError: Its first layer is of another kind: only the caller can know the width.
    """
    from torch import nn

    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if next(layer.parameters(recurse=False), None) is not None:
            break
    raise InvalidModelError(
        f"the input width of {type(module).__name__} cannot be told from its first layer: pass num_features (or "
        "input_shape, e.g. (3, 32, 32))"
    )


def _weights_digest(module: "nn.Module") -> str:
    """sha256 of every parameter and buffer, also of those that ``state_dict`` leaves out."""
    sha = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        values = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
        sha.update(as_bytes(values))
    return sha.hexdigest()


def _code(module: "nn.Module") -> list[Any]:
    """What runs the weights, to be compared: the class of every part (a class defined anew is
    another), its attributes and hooks."""
    tensors = ("_parameters", "_buffers", "_modules", "training")
    return [
        (
            name,
            type(part),
            {key: repr(value) for key, value in vars(part).items() if key not in tensors},
        )
        for name, part in module.named_modules()
    ]
