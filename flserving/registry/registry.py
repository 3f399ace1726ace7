"""The Model Registry: publish weights as an immutable version, read them back verified.

A version is a folder, ``models/<name>/<version>``: ``manifest.json``, ``weights.safetensors``, and ``heads.bin`` where
clients have personal heads. It is made in ``staging`` and waited for until the disk has it; then, in one transaction,
it gets the next number, moves to its place and gets its row. Killed anywhere before the commit, it leaves no version
and no gap, only leftovers that the next publisher removes. Reading verifies every byte against the manifest, and that
against the index.

Versions and the log of moves never change. The alphabet of names keeps every path inside ``root``. Names, aliases and
experiments are in :class:`flserving.registry.index.Index`, from which Registry has those verbs.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Unpack

import msgspec
from torch import Tensor, nn

from flserving.errors import ConfigError, CorruptArtifactError, FlservingError, InvalidModelError, ModelTooLargeError
from flserving.extras import of_extra
from flserving.models import weights
from flserving.registry import storage, validation
from flserving.registry.experiment import Experiment
from flserving.registry.heads import FILE_NAME as HEADS
from flserving.registry.heads import HeadSet, HeadStore, neutral_head, trained_on
from flserving.registry.index import DEFAULT_ALIAS, FILE_NAME, Entry, Index, check_move, checked_version
from flserving.registry.manifest import (
    MAX_MANIFEST_NBYTES,
    Digests,
    Manifest,
    check_name,
    decode,
    encode,
    sha256,
)

if TYPE_CHECKING:
    import pandas as pd

WEIGHTS = "weights.safetensors"
MANIFEST = "manifest.json"
NOT_FOR_MODELS = frozenset({"stats"})
"""Names that a route of REST has where others have the model's; older registries may hold such models."""


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A verified version: its manifest, and its tensors by name, on the CPU; nobody else holds them."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    heads: HeadStore | None = None


class Registry(Index):
    """Versions of models in a folder. For several threads and several processes; not to be carried over a fork.

    Example::

        with Registry("~/models") as registry:
            manifest = registry.publish("digits", module, architecture="digits_mlp", alias="default")
            artifact = registry.read("digits", manifest.version)

    Args:
        root: The folder; made if it is missing, for its owner alone; ``~`` is your home. Use a local disk: SQLite's WAL
            needs shared memory. One that cannot be written is read, and followed while others write to it.
        max_artifact_bytes: Largest weights file that is written or read.
        busy_timeout_s: How long a change waits for other writers.
        now: UTC clock of the log, and of when personal heads expire.

    Attributes:
        read_only: Why nothing can be written: its file system is read-only, or its folder another user's. None: it can.

    Close it, or use it as a context manager. After :meth:`close` every call raises ServerClosedError.

    Raises (all methods):
        InvalidModelError: A model name or alias outside the alphabet.
        CorruptArtifactError: The index or a file is not what was written.
        OverloadedError: Other writers kept a change waiting for ``busy_timeout_s``.
        FlservingError: The disk is full, or the folder cannot be written (``read_only`` says why).
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        max_artifact_bytes: int = 2 << 30,
        busy_timeout_s: float = 30.0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if type(max_artifact_bytes) is not int or max_artifact_bytes < 1:
            raise ConfigError(f"max_artifact_bytes is {max_artifact_bytes!r}: it must be an integer >= 1")
        if type(busy_timeout_s) not in (int, float) or not 0 <= busy_timeout_s <= 3600:
            raise ConfigError(f"busy_timeout_s is {busy_timeout_s!r}: it must be a number in [0, 3600]")
        self.max_artifact_bytes = max_artifact_bytes
        try:
            folder = os.path.realpath(storage.user_path(root))
            self._models = f"{folder}/models"
            self._staging = f"{folder}/staging"
            read_only = self._make_folders(folder)
            orphaned = bool(os.listdir(self._models)) and not os.path.lexists(f"{folder}/{FILE_NAME}")
        except (OSError, TypeError, ValueError) as error:  # ValueError: a NUL inside
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{root!r} cannot hold a registry ({reason}): choose a folder") from error
        if orphaned:  # with a new index, the next publish would take their numbers
            raise CorruptArtifactError(f"{FILE_NAME} is missing beside published versions: restore it from a backup")
        super().__init__(folder, busy_timeout_s, now, read_only)

    def _make_folders(self, root: str) -> str | None:
        """Make what is missing. Returns why nothing can be written to a registry that is there, None where it can."""
        if os.path.isfile(f"{root}/{FILE_NAME}") and os.path.isdir(self._models):
            reason = storage.why_unwritable(root)
            if reason is not None:
                return reason
        os.makedirs(root, mode=0o700, exist_ok=True)
        for folder in (self._models, self._staging):
            os.makedirs(folder, exist_ok=True)
        return None

    # Publish

    def publish(
        self,
        name: str,
        model: nn.Module | Mapping[str, Tensor],
        *,
        alias: str | None = None,
        who: str = "publish",
        why: str = "",
        **options: Unpack[validation.Options],
    ) -> Manifest:
        """Store weights as the next version of ``name``; returns its manifest. On return it is on the disk.

        Args:
            model: A module or its state dict; read once, into a copy, so it may go on training.
            alias: Also pointed at the new version, in the same transaction; ``who`` and ``why`` go to the log.
            architecture: A registered one, which with ``parameters`` must build a module of exactly these tensors. A
                plain ``nn.Sequential`` over feature rows needs none: it is stored as ``sequential``.
            preprocessing: ``mean`` and ``std`` of the training data, one number per feature.
            lineage: The federated round; a ``parent_version`` must exist.
            metrics: Finite numbers; the course's are global_accuracy, mean_client_accuracy, worst_client_accuracy.
            output_type: "classification" (the default) or "regression".
            note: A line for people.
            heads: Personal heads of its clients; they and the weights are one version.

        Raises:
            InvalidModelError: Weights that do not fit, are not finite, or are too large; an invalid manifest entry; a
                model that does not run, whose rows see each other, or, with an alias, that does not answer a row of
                zeros. Nothing is stored then, and the alias stays where it was.
            ConfigError: Invalid preprocessing statistics. NotFoundError: An unknown architecture.

        Example: ``registry.publish("digits", module, architecture="digits_mlp", lineage={"round": 3})``

        Cost: one copy and two hashes of the weights beside one write to the disk, and four waits for small writes.
        """
        if check_name("model name", name) in NOT_FOR_MODELS:
            raise InvalidModelError(f"model name {name!r} is a route of REST, /v2/models/{name}: choose another")
        if alias is not None:
            check_move(alias, who, why or "published")
        content = validation.Content(name=name, model=model, **options)
        draft = validation.check(content, self.max_artifact_bytes, answers=alias is not None)
        try:
            with self._publishing(), storage.staging(self._staging) as folder:
                manifest = _write(folder, draft, content.heads)
                return self._commit(manifest, folder, alias, who, why)
        except OSError as error:
            advice = "permissions" if error.errno in storage.READ_ONLY else "free space and permissions"
            raise FlservingError(
                f"{name!r} was not published ({error.strerror}): check the registry's {advice}"
            ) from error

    def _commit(self, manifest: Manifest, folder: str, alias: str | None, who: str, why: str) -> Manifest:
        """Take the next number and make it visible: the only part of a publish that other writers wait for."""
        name = manifest.name
        with self._transaction() as at:
            version = self._next_version(name)
            if os.path.lexists(f"{self._models}/{name}/{version + 1}"):  # a dead publisher leaves one, not two
                raise CorruptArtifactError(
                    f"{FILE_NAME} ends {name!r} at version {version - 1}, the folder goes on: restore the latest index"
                )
            if manifest.lineage is not None and (manifest.lineage.parent_version or 0) >= version:
                parent = manifest.lineage.parent_version
                raise InvalidModelError(f"lineage names parent version {parent}: {name!r} has only {version - 1}")
            manifest = msgspec.structs.replace(manifest, version=version, created_at=at)
            data = encode(manifest)
            storage.write_file(f"{folder}/{MANIFEST}", data)
            storage.sync_directory(folder)
            storage.install(folder, f"{self._models}/{name}/{version}")
            self._add_version(name, version, sha256(data))
            if alias is not None:
                self._point(Entry(name, alias, who, why or f"published version {version}", at), version)
        return manifest

    def conclude_experiment(
        self, name: str, alias: str = DEFAULT_ALIAS, version: int | None = None, *, who: str, why: str,
        run: str | None = None,
    ) -> Experiment | None:  # fmt: skip
        """:meth:`Index.conclude_experiment`, of a version that can be read. CorruptArtifactError: It is gone."""
        if version is not None:
            self.read(name, version)
        return super().conclude_experiment(name, alias, version, who=who, why=why, run=run)

    # Read

    def manifest(self, name: str, version: int) -> Manifest:
        """The manifest of a version, read from disk and verified against the index. Cost: about 40 us.

        Raises:
            NotFoundError: No such version. CorruptArtifactError: The file is not what was published.

        Example: ``registry.manifest("digits", 3).metrics["worst_client_accuracy"]``
        """
        check_name("model name", name)
        number = checked_version(name, version)
        expected = self._manifest_sha256(name, number)
        path = f"{name}/{number}/{MANIFEST}"
        storage.check_folders(self._models, name, f"{name}/{number}")
        data = storage.read_file(self._models, path, MAX_MANIFEST_NBYTES)
        if sha256(data) != expected:
            raise _changed(path)
        return decode(data, path)

    def read(self, name: str, version: int) -> Artifact:
        """A whole version, read once and verified before it is parsed. The caller may keep and change the tensors.

        Personal heads stay on the disk: their index is verified here, each of them when its client comes.

        Raises:
            NotFoundError: No such version. CorruptArtifactError: A file is not what was published.
            ModelTooLargeError: The weights are larger than ``max_artifact_bytes``.

        Example: ``registry.read("digits", registry.resolve("digits", "canary")).tensors``

        Cost: one read, one sha256 of the file and one copy.
        """
        manifest = self.manifest(name, version)
        folder = f"{name}/{manifest.version}"
        path = f"{folder}/{WEIGHTS}"
        nbytes = manifest.weights_nbytes
        if nbytes > self.max_artifact_bytes:
            raise ModelTooLargeError(
                f"{path} has {nbytes:,} bytes, max_artifact_bytes is {self.max_artifact_bytes:,}: raise it"
            )
        image = storage.read_file(self._models, path, nbytes)
        if sha256(image) != manifest.digests.weights:
            raise _changed(path)
        tensors = weights.unpack(image, path)
        heads = None
        if manifest.heads is not None:
            heads = self._heads(f"{folder}/{HEADS}", manifest, tensors)
        return Artifact(manifest, tensors, heads)

    def _heads(self, path: str, manifest: Manifest, tensors: Mapping[str, Tensor]) -> HeadStore:
        entry = manifest.heads
        assert entry is not None
        now = self._now  # the store must not hold the registry
        current = trained_on(entry.layout, manifest.digests)
        neutral = neutral_head(entry.layout, tensors)
        return HeadStore(self._models, path, entry, current, neutral, lambda: now().timestamp())

    # Look

    def versions(self, name: str) -> "pd.DataFrame":
        """One row per version: see :func:`flserving.registry.tables.versions`. NotFoundError: no such name."""
        with of_extra("course"):
            from flserving.registry import tables

        numbers = self.version_numbers(name)
        if not numbers:
            raise self._missing(name, "any")
        entries: dict[int, Manifest | str] = {}
        for number in numbers:
            try:
                entries[number] = self.manifest(name, number)
            except CorruptArtifactError as error:  # one broken version must not hide the others
                entries[number] = str(error)
        return tables.versions(entries, self.aliases(name))

    def compare(self, name: str, a: int | str, b: int | str) -> "pd.DataFrame":
        """Two versions (numbers or aliases) side by side: see ``tables.compare``. Reads both whole."""
        with of_extra("course"):
            from flserving.registry import tables

        first = self.read(name, self.resolve(name, a))
        second = self.read(name, self.resolve(name, b))
        return tables.compare((first.manifest, first.tensors), (second.manifest, second.tensors))


def _write(folder: str, draft: validation.Draft, heads: HeadSet | None) -> Manifest:
    """Write weights and heads, and hash them while the disk is waited for; returns the manifest with their digests."""
    with ThreadPoolExecutor(2) as beside:
        file = beside.submit(sha256, draft.image)
        parts = beside.submit(weights.part_digests, draft.tensors)
        storage.write_file(f"{folder}/{WEIGHTS}", draft.image)
        digests = Digests(file.result(), *parts.result(), draft.manifest.digests.preprocessing)
    entry = None
    if heads is not None:
        entry = heads.write(f"{folder}/{HEADS}", trained_on(heads.layout, digests))
    return msgspec.structs.replace(draft.manifest, digests=digests, heads=entry)


def _changed(path: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{path} is not what was published (sha256 differs): restore it from a backup, or publish again"
    )
