"""The registry: names x integer versions x aliases, on disk, shared by processes, surviving any crash.

::

    root/registry.sqlite3                       which versions exist, where aliases point, the log of moves
    root/models/<name>/<version>/weights.safetensors
                                 heads.bin        where clients have heads of their own
                                 manifest.json
    root/staging/<token>/                       a publish under way, or what a killed one left
    root/publishing.sqlite3                     empty: who publishes holds its lock

Publishing, one at a time, writes the weights to a staging directory and waits for the disk. Then, under the lock of the
one writer, it takes the next number, writes the manifest, moves the directory to its place in one step, waits for the
disk, and commits the row that makes the version exist. Killed anywhere before the commit, it leaves no version and no
gap, only leftovers that the next publisher removes. Reading verifies every byte against the manifest, and that against
the index.

Versions and the log of moves never change. The alphabet of names keeps every path inside ``root``.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from torch import Tensor, nn

from flserving.errors import ConfigError, CorruptArtifactError, FlservingError, InvalidModelError, ModelTooLargeError
from flserving.extras import of_extra
from flserving.models import JSON, weights
from flserving.registry import storage, validation
from flserving.registry.catalogue import DEFAULT_ALIAS, Catalogue, check_move, checked_version
from flserving.registry.experiment import Experiment
from flserving.registry.heads import FILE_NAME as HEADS
from flserving.registry.heads import HeadSet, HeadStore, neutral_head, trained_on
from flserving.registry.index import FILE_NAME, Index
from flserving.registry.manifest import (
    MAX_MANIFEST_NBYTES,
    Digests,
    Lineage,
    Manifest,
    check_name,
    decode,
    encode,
    sha256,
)

if TYPE_CHECKING:
    import pandas as pd

WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
NOT_FOR_MODELS = frozenset({"stats"})
"""Names that a route of REST has where others have the model's; older registries may hold such models."""


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A verified version: its manifest, and its tensors by name (CPU; views of one buffer, nobody else holds them)."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    heads: HeadStore | None = None


class Registry(Catalogue):
    """Versions of models in a folder. For several threads and several processes; not to be carried over a fork.

    Args:
        root: The folder; made if it is missing, for its owner alone; ``~`` is your home. Use a local disk: SQLite's WAL
            needs shared memory. One that cannot be written is read, and followed while others write to it.
        max_artifact_bytes: Largest weights file that is written or read.
        busy_timeout_s: How long a change waits for other writers.
        now: UTC clock of the log, and of when personal heads expire.

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
            self.root = os.path.realpath(storage.user_path(root))
            self._models, self._staging = f"{self.root}/models", f"{self.root}/staging"
            unwritable = self._make_folders()
            orphaned = bool(os.listdir(self._models)) and not os.path.lexists(f"{self.root}/{FILE_NAME}")
        except (OSError, TypeError, ValueError) as error:  # ValueError: a NUL inside
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{root!r} cannot hold a registry ({reason}): choose a folder") from error
        if orphaned:  # with a new index, the next publish would take their numbers
            raise CorruptArtifactError(f"{FILE_NAME} is missing beside published versions: restore it from a backup")
        self._now = now
        super().__init__(Index(self.root, busy_timeout_s, lambda: validation.timestamp(now()), unwritable))

    def _make_folders(self) -> str | None:
        """Make what is missing. Returns why nothing can be written to a registry that is there, None where it can."""
        holds_one = os.path.isfile(f"{self.root}/{FILE_NAME}") and os.path.isdir(self._models)
        if holds_one and (reason := storage.why_unwritable(self.root)) is not None:
            return reason
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        for folder in (self._models, self._staging):
            os.makedirs(folder, exist_ok=True)
        return None

    @property
    def read_only(self) -> str | None:
        """Why nothing can be written: its file system is read-only, or its folder another user's. None: it can."""
        return self._index.unwritable

    def publish(
        self,
        name: str,
        model: nn.Module | Mapping[str, Tensor],
        *,
        architecture: str | None = None,
        parameters: Mapping[str, JSON] | None = None,
        preprocessing: validation.Statistics | None = None,
        lineage: Lineage | Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        output_type: Literal["classification", "regression"] = "classification",
        note: str = "",
        heads: HeadSet | None = None,
        alias: str | None = None,
        who: str = "publish",
        why: str = "",
    ) -> Manifest:
        """Store weights as the next version of ``name``; returns its manifest. On return it is on the disk.

        Args:
            model: A module or its state dict; read once, into a copy, so it may go on training.
            architecture: A registered one, which with ``parameters`` must build a module of exactly these tensors. A
                plain ``nn.Sequential`` over feature rows needs none: it is stored as ``sequential``.
            preprocessing: ``mean`` and ``std`` of the training data, one number per feature.
            lineage: The federated round; a ``parent_version`` must exist.
            metrics: Finite numbers; the course's are global_accuracy, mean_client_accuracy, worst_client_accuracy.
            heads: Personal heads of its clients; they and the weights are one version.
            alias: Also pointed at the new version, in the same transaction; ``who`` and ``why`` go to the log.

        Raises:
            InvalidModelError: Weights that do not fit, are not finite, or are too large; an invalid manifest entry; a
                model that does not run, whose rows see each other, or, with an alias, that does not answer a row of
                zeros. Nothing is stored then, and the alias stays where it was.
            ConfigError: Invalid preprocessing statistics. NotFoundError: An unknown architecture.

        Cost: one copy and two hashes of the weights beside one write to the disk, and four waits for small writes.
        """
        if check_name("model name", name) in NOT_FOR_MODELS:
            raise InvalidModelError(f"model name {name!r} is a route of REST, /v2/models/{name}: choose another")
        if alias is not None:
            check_move(alias, who, why or "published")
        content = validation.prepare(
            name,
            model,
            architecture=architecture,
            parameters=parameters or {},
            preprocessing=preprocessing,
            lineage=lineage,
            metrics=metrics or {},
            output_type=output_type,
            note=note,
            max_artifact_bytes=self.max_artifact_bytes,
            heads=heads,
            answers=alias is not None,
        )
        try:
            with (
                self._index.publishing(),
                storage.staging(self._staging) as folder,
                ThreadPoolExecutor(2) as beside,  # the disk is waited for here
            ):
                image = weights.as_bytes(content.image)
                file, parts = beside.submit(sha256, image), beside.submit(weights.part_digests, content.tensors)
                storage.write_file(f"{folder}/{WEIGHTS}", image)
                digests = Digests(file.result(), *parts.result(), content.manifest.digests.preprocessing)
                entry = heads.write(f"{folder}/{HEADS}", trained_on(heads.layout, digests)) if heads else None
                manifest = msgspec.structs.replace(content.manifest, digests=digests, heads=entry)
                return self._commit(manifest, folder, alias, who, why)
        except OSError as error:
            advice = "permissions" if error.errno in storage.READ_ONLY else "free space and permissions"
            raise FlservingError(
                f"{name!r} was not published ({error.strerror}): check the registry's {advice}"
            ) from error

    def _commit(self, manifest: Manifest, folder: str, alias: str | None, who: str, why: str) -> Manifest:
        """Take the next number and make it visible: the only part of a publish that other writers wait for."""
        name, parent = manifest.name, manifest.lineage.parent_version if manifest.lineage else None
        with self._index.transaction() as transaction:
            version = transaction.latest_version(name) + 1
            if os.path.lexists(f"{self._models}/{name}/{version + 1}"):  # a dead publisher leaves one, not two
                raise CorruptArtifactError(
                    f"{FILE_NAME} ends {name!r} at version {version - 1}, the folder goes on: restore the latest index"
                )
            if parent is not None and parent >= version:
                raise InvalidModelError(f"lineage names parent version {parent}: {name!r} has only {version - 1}")
            manifest = msgspec.structs.replace(manifest, version=version, created_at=transaction.at)
            data = encode(manifest)
            storage.write_file(f"{folder}/{MANIFEST}", data)
            storage.sync_directory(folder)
            storage.install(folder, f"{self._models}/{name}/{version}")
            transaction.add_version(name, version, sha256(data))
            if alias is not None:
                transaction.set_alias(name, alias, version, who, why or f"published version {version}")
        return manifest

    def conclude_experiment(
        self, name: str, alias: str = DEFAULT_ALIAS, version: int | None = None, *, who: str, why: str,
        run: str | None = None,
    ) -> Experiment | None:  # fmt: skip
        """:meth:`Catalogue.conclude_experiment`, of a version that can be read. CorruptArtifactError: It is gone."""
        if version is not None:
            self.read(name, version)
        return super().conclude_experiment(name, alias, version, who=who, why=why, run=run)

    def manifest(self, name: str, version: int) -> Manifest:
        """The manifest of a version, read from disk and verified against the index. Cost: about 40 us.

        Raises:
            NotFoundError: No such version. CorruptArtifactError: The file is not what was published.
        """
        check_name("model name", name)
        number = checked_version(name, version)
        sql = "SELECT manifest_sha256 FROM versions WHERE name = ? AND version = ?"
        found = self._index.query(sql, name, number)
        if not found:
            raise self._missing(name, str(number))
        path = f"{name}/{number}/{MANIFEST}"
        storage.check_folders(self._models, name, f"{name}/{number}")
        data = bytes(weights.as_bytes(storage.read_file(self._models, path, MAX_MANIFEST_NBYTES)))
        if sha256(data) != found[0][0]:
            raise _changed(path)
        return decode(data, path)

    def read(self, name: str, version: int) -> Artifact:
        """A whole version, read once and verified before it is parsed. The caller may keep and change the tensors.

        Personal heads stay on the disk: their index is verified here, each of them when its client comes.

        Raises:
            NotFoundError: No such version. CorruptArtifactError: A file is not what was published.
            ModelTooLargeError: The weights are larger than ``max_artifact_bytes``.

        Cost: one read and one sha256 of the file; no further copy.
        """
        manifest = self.manifest(name, version)
        path, nbytes = f"{name}/{manifest.version}/{WEIGHTS}", manifest.weights_nbytes
        if nbytes > self.max_artifact_bytes:
            raise ModelTooLargeError(
                f"{path} has {nbytes:,} bytes, max_artifact_bytes is {self.max_artifact_bytes:,}: raise it"
            )
        image = storage.read_file(self._models, path, nbytes)
        if sha256(weights.as_bytes(image)) != manifest.digests.weights:
            raise _changed(path)
        tensors, heads = weights.unpack(image, path), None
        if (entry := manifest.heads) is not None:
            now = self._now
            path, current = f"{name}/{manifest.version}/{HEADS}", trained_on(entry.layout, manifest.digests)
            neutral = neutral_head(entry.layout, tensors)
            heads = HeadStore(self._models, path, entry, current, neutral, lambda: now().timestamp())
        return Artifact(manifest, tensors, heads)

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

        first, second = self.read(name, self.resolve(name, a)), self.read(name, self.resolve(name, b))
        return tables.compare((first.manifest, first.tensors), (second.manifest, second.tensors))


def _changed(path: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{path} is not what was published (sha256 differs): restore it from a backup, or publish again"
    )
