"""The manifest of a version: what a set of weights is, where it came from, and what its bytes must
hash to.

A manifest is one strict JSON document, written last and never changed. Unknown fields, wrong types,
NaN and infinities are refused, in both directions.
"""

import hashlib
import re
from typing import Annotated, Any, Literal, TypeGuard

import msgspec
from msgspec import Meta, Struct

from flserving.errors import CorruptArtifactError, InvalidModelError

FORMAT: Literal[1] = 1
MAX_MANIFEST_NBYTES = 4 << 20
MAX_VERSION = (1 << 63) - 1  # SQLite's largest integer

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_OF_ALL_CLIENTS = {"global_accuracy", "mean_client_accuracy", "worst_client_accuracy"}
"""The metrics that the course defines; others may be of one client, by its name."""
_ALPHABET = "1 to 64 lower-case letters, digits, '.', '_' or '-', starting with a letter or digit"

Count = Annotated[int, Meta(ge=0)]
Version = Annotated[int, Meta(ge=1, le=MAX_VERSION)]
Shape = tuple[Annotated[int, Meta(ge=1)], ...]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Meta(max_length=10_000)]
Label = Annotated[str, Meta(min_length=1, max_length=64)]
Time = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00$")]  # UTC


class Signature(Struct, frozen=True, forbid_unknown_fields=True):
    """Shapes of one row, without the batch: float32 ``input_shape`` in, float32 ``output_shape``
    out."""

    input_shape: Shape
    output_shape: Shape
    dtype: Literal["float32"] = "float32"
    output_type: Literal["classification", "regression"] = "classification"


class Preprocessing(Struct, frozen=True, forbid_unknown_fields=True):
    """Statistics of the training data, one number per feature: a row is served as ``(x - mean) /
    std``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Lineage(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The federated round that made a version.

    ``sample_counts`` holds the training samples of each of the ``num_clients`` clients, ``clients``
    their ids in the same order, without those of the ``forgotten`` ones. ``parent_version`` is the
    version (of the same name) that the round started from. ``extra`` takes further facts: seed,
    alpha, data set.
    """

    round: Count | None = None
    parent_version: Version | None = None
    num_clients: Count | None = None
    sample_counts: tuple[Count, ...] | None = None
    strategy: Label | None = None
    extra: dict[Label, bool | int | float | Text | None] = {}
    clients: tuple[Text, ...] | None = None
    forgotten: Count = 0

    def __post_init__(self) -> None:
        total = self.num_clients
        if total is None and self.clients is not None:
            total = len(self.clients) + self.forgotten
        for what in ("sample_counts", "clients"):
            listed = getattr(self, what)
            if listed is not None and total is not None and len(listed) + self.forgotten != total:
                raise ValueError(f"{what} has {len(listed)} entries for {total} clients")


class Digests(Struct, frozen=True, forbid_unknown_fields=True):
    """sha256, lower-case hex: of the weights file, of the body's and the head's tensors, of the
    preprocessing.

    ``body`` covers every tensor outside the head; two versions with equal bodies can share their
    heads. ``head`` is None for a model without a head. ``preprocessing`` equals
    ``Preprocessor.digest``.
    """

    weights: Digest
    body: Digest
    head: Digest | None
    preprocessing: Digest


class HeadsEntry(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The personal heads beside the weights (see ``heads.py``): ``num_heads`` of float32 [inputs +
    1, outputs].

    ``index_sha256`` covers the file's header and index, and through the records' checksums the
    rest. From ``expires_at`` on the heads answer no more; where they never expire it is not
    written, as it never was before.
    """

    layout: Literal["head", "additive", "adapter"]
    num_heads: Annotated[int, Meta(ge=1, le=1 << 26)]
    inputs: Annotated[int, Meta(ge=1, le=1 << 20)]
    outputs: Annotated[int, Meta(ge=1, le=1 << 20)]
    nbytes: Annotated[int, Meta(ge=1)]
    index_sha256: Digest
    expires_at: Time | None = None


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One published version. Treat it as read-only, the dictionaries inside too."""

    format: Literal[1] = FORMAT
    name: Annotated[str, Meta(pattern=f"^{_NAME.pattern}$")]
    version: Version
    architecture: Label
    parameters: dict[str, Any]
    signature: Signature
    preprocessing: Preprocessing | None
    lineage: Lineage | None
    metrics: dict[Label, float]
    digests: Digests
    weights_nbytes: Annotated[int, Meta(ge=1)]
    created_at: Time
    note: Text
    heads: HeadsEntry | None = None  # manifests from before there were heads do not have it

    @property
    def round(self) -> int | None:
        """The federated round, where the lineage tells one."""
        return None if self.lineage is None else self.lineage.round

    @property
    def extra(self) -> dict[str, Any]:
        """What else the lineage tells."""
        return {} if self.lineage is None else self.lineage.extra


_decoder = msgspec.json.Decoder(Manifest)


def is_digest(value: object) -> bool:
    """Whether ``value`` is a sha256 in lower-case hex."""
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def is_name(value: object) -> TypeGuard[str]:
    """Whether ``value`` may name a model or an alias: it becomes part of a path, so the alphabet is
    strict.

    ``..`` and a final ``.`` are refused as well (Windows drops the latter, so that two names would
    share a folder).
    """
    return (
        isinstance(value, str)
        and bool(_NAME.fullmatch(value))
        and ".." not in value
        and not value.endswith(".")
    )


def check_name(kind: str, value: object) -> str:
    """Return ``value`` if :func:`is_name`, else raise InvalidModelError; ``kind`` opens the
    message."""
    if not is_name(value):
        raise InvalidModelError(
            f"{kind} {str(value)[:80]!r}: use {_ALPHABET}, without '..' and not ending in '.'"
        )
    return value


def encode(manifest: Manifest) -> bytes:
    """Manifest -> indented JSON, UTF-8.

    Raises:
        InvalidModelError: It would not come back as it is: a value out of range or not finite, or a
            document over ``MAX_MANIFEST_NBYTES``.
    """
    try:
        data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
        # msgspec writes NaN as null: what does not come back, was not valid
        same = _decoder.decode(data) == manifest
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidModelError(
            f"the manifest of {manifest.name!r} is not valid: {error}"
        ) from error
    if not same:
        raise InvalidModelError(
            f"the manifest of {manifest.name!r} does not survive JSON: use plain, finite values"
        )
    if len(data) > MAX_MANIFEST_NBYTES:
        raise InvalidModelError(
            f"the manifest of {manifest.name!r} has {len(data):,} bytes, the most is {MAX_MANIFEST_NBYTES:,}: "
            "shorten its lists or its note"
        )
    return data


def for_devices(manifest: Manifest) -> bytes:
    """What devices may know of a version: a manifest without anything about single clients, as
    JSON.

    Who took part, who was rejected and why, samples of each, notes, further facts and metrics other
    than the course's stay where they are; of the heads, only their kind goes out. So what devices
    get of a version stays the same when a client of it is forgotten. The fields are those of before
    ``Lineage.clients``: older devices read no other.
    """
    document = msgspec.to_builtins(manifest)
    document["note"] = ""
    document["metrics"] = {
        name: document["metrics"][name] for name in _OF_ALL_CLIENTS & manifest.metrics.keys()
    }
    if manifest.lineage is not None:
        shared = ("round", "parent_version", "num_clients", "strategy")
        document["lineage"] = {field: document["lineage"][field] for field in shared}
    if manifest.heads is not None:
        document["heads"] |= {"num_heads": 1, "nbytes": 1, "index_sha256": "0" * 64}
    return msgspec.json.encode(document, order="deterministic")


def decode(data: bytes, source: str) -> Manifest:
    """JSON -> Manifest. ``source`` names the file in messages.

    Raises:
        CorruptArtifactError: Not a manifest, or one of another format.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptArtifactError(
            f"{source} is not a manifest of format {FORMAT} ({error}): restore it from a backup, publish again, or "
            "install the flserving that wrote it"
        ) from None


def sha256(data: bytes | memoryview) -> str:
    """Lower-case hex sha256; releases the GIL for all but tiny inputs. Cost: about 0.6 ms per MB
    with SHA-NI."""
    return hashlib.sha256(data).hexdigest()
