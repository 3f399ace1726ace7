"""The Model Registry: publish weights as an immutable version, read them back verified.

A version is a folder, ``models/<name>/<version>``: ``manifest.json``, ``weights.safetensors``, and
``heads.bin`` where clients have personal heads. It is made in ``staging`` and waited for until the
disk has it; then, in one transaction, it gets the next number, moves to its place and gets its row.
Killed anywhere before the commit, it leaves no version and no gap, only leftovers that the next
publisher removes. Reading verifies every byte against the manifest, and that against the index.

Versions and the log of moves never change, but where :meth:`Registry.forget` takes a client out of
them. The alphabet of names keeps every path inside ``root``. Names, aliases and experiments are in
:class:`flserving.registry.index.Index`, from which Registry has those verbs.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Unpack

import msgspec

from flserving.errors import (
    ConfigError,
    CorruptArtifactError,
    FlservingError,
    InvalidInputError,
    InvalidModelError,
    ModelTooLargeError,
    NotFoundError,
    check_number,
)
from flserving.extras import of_extra
from flserving.models import weights
from flserving.registry import storage, validation
from flserving.registry.experiment import Experiment
from flserving.registry.forget import Forgotten, feedback_of, kept_key, naming, pseudonym, without
from flserving.registry.headfile import MAX_CLIENT_CHARS, HeadFile
from flserving.registry.heads import FILE_NAME as HEADS
from flserving.registry.heads import HeadSet, HeadStore, neutral_head, trained_on
from flserving.registry.index import (
    DEFAULT_ALIAS,
    FILE_NAME,
    Entry,
    Index,
    check_move,
    checked_version,
)
from flserving.registry.manifest import (
    MAX_MANIFEST_NBYTES,
    Digests,
    HeadsEntry,
    Lineage,
    Manifest,
    check_name,
    decode,
    encode,
    is_name,
    sha256,
)

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

WEIGHTS = "weights.safetensors"
MANIFEST = "manifest.json"
NOT_FOR_MODELS = frozenset({"stats"})
"""Names that a route of REST has where others have the model's; older registries may hold such
models."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """A verified version: its manifest, and its tensors by name; nobody else holds them.

    ``arrays`` is how NumPy sees them; bfloat16, which it does not know, as two bytes each (dtype
    V2).
    """

    manifest: Manifest
    arrays: dict[str, weights.Array]
    heads: HeadStore | None = None

    @cached_property
    def tensors(self) -> "dict[str, Tensor]":
        """The same memory as torch's tensors."""
        return weights.as_tensors(self.arrays)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Registry(Index):
    """Versions of models in a folder. For several threads and several processes; not to be carried
    over a fork.

    A copy, and what pickle makes of one in another process, is a new Registry of the same folder
    and settings: send it through a queue, or to a process that is spawned.

    Example::

        with Registry("~/models") as registry:
            model = models.build("digits_mlp")
            manifest = registry.publish("digits", model, architecture="digits_mlp")
            artifact = registry.read("digits", manifest.version)

    Args:
        root: The folder; made if it is missing, for its owner alone; ``~`` is your home. Use a
            local disk: SQLite's WAL needs shared memory. One that cannot be written is read, and
            followed while others write to it.
        max_artifact_bytes: Largest weights file that is written or read.
        busy_timeout_s: How long a change waits for other writers.
        now: UTC clock of the log, and of when personal heads expire.

    Attributes:
        read_only: Why nothing can be written: its file system is read-only, or its folder another
            user's. None: it can.

    Close it, or use it as a context manager. After :meth:`close` every call raises
    ServerClosedError.

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
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        check_number("max_artifact_bytes", max_artifact_bytes, 1, math.inf, whole=True)
        check_number("busy_timeout_s", busy_timeout_s, 0, 3600)
        self.max_artifact_bytes = max_artifact_bytes
        try:
            folder = os.path.realpath(storage.user_path(root))
            self._models = f"{folder}/models"
            self._staging = f"{folder}/staging"
            read_only = self._make_folders(folder)
            orphaned = bool(os.listdir(self._models)) and not os.path.lexists(
                f"{folder}/{FILE_NAME}"
            )
        except (OSError, TypeError, ValueError) as error:  # ValueError: a NUL inside
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"{root!r} cannot hold a registry ({reason}): choose a folder"
            ) from error
        if orphaned:  # with a new index, the next publish would take their numbers
            raise CorruptArtifactError(
                f"{FILE_NAME} is missing beside published versions: restore it from a backup"
            )
        super().__init__(folder, busy_timeout_s, now, read_only)

    def __reduce__(self) -> tuple[Any, ...]:
        again = partial(
            type(self),
            max_artifact_bytes=self.max_artifact_bytes,
            busy_timeout_s=self._timeout_s,
            now=self._now,
        )
        return again, (self.root,)

    def _make_folders(self, root: str) -> str | None:
        """Make what is missing. Returns why nothing can be written to a registry that is there,
        None where it can."""
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
        model: "nn.Module | Mapping[str, weights.AnyTensor]",
        *,
        alias: str | None = None,
        who: str = "publish",
        why: str = "",
        **options: Unpack[validation.Options],
    ) -> Manifest:
        """Store weights as the next version of ``name``; returns its manifest. On return it is on
        the disk.

        Args:
            model: A module or its state dict; read once, into a copy, so it may go on training.
            alias: Also pointed at the new version, in the same transaction; ``who`` and ``why`` go
                to the log.
            architecture: A registered one, which with ``parameters`` must build a module of exactly
                these tensors. A plain ``nn.Sequential`` over feature rows needs none: it is stored
                as ``sequential``.
            preprocessing: ``mean`` and ``std`` of the training data, one number per feature.
            lineage: The federated round; a ``parent_version`` must exist.
            metrics: Finite numbers; the course's are global_accuracy, mean_client_accuracy,
                worst_client_accuracy. Only these go to devices.
            output_type: "classification" (the default) or "regression".
            note: A line for people.
            heads: Personal heads of its clients; they and the weights are one version.
            engine: "numpy": checked without torch, for a device that has none; only what NumPy runs
                passes.

        Raises:
            InvalidModelError: Weights that do not fit, are not finite, or are too large; an invalid
                manifest entry; a model that does not run, whose rows see each other, or, with an
                alias, that does not answer a row of zeros. Nothing is stored then, and the alias
                stays where it was.
            ConfigError: Invalid preprocessing statistics.
            NotFoundError: An unknown architecture.

        Example: ``registry.publish("digits", module, architecture="digits_mlp", lineage={"round":
        3})``

        Cost: one copy and two hashes of the weights beside one write to the disk, and four waits
        for small writes.
        """
        if check_name("model name", name) in NOT_FOR_MODELS:
            raise InvalidModelError(
                f"model name {name!r} is a route of REST, /v2/models/{name}: choose another"
            )
        if alias is not None:
            check_move(alias, who, why or "published")
        self._writable()
        content = validation.Content(name=name, model=model, **options)
        draft = validation.check(content, self.max_artifact_bytes, answers=alias is not None)
        try:
            with storage.staging(self._staging) as folder:
                manifest = _write(folder, draft, content.heads)
                return self._commit(manifest, folder, alias, who, why)
        except OSError as error:
            advice = (
                "permissions" if error.errno in storage.READ_ONLY else "free space and permissions"
            )
            raise FlservingError(
                f"{name!r} was not published ({error.strerror}): check the registry's {advice}"
            ) from error

    def _commit(
        self, manifest: Manifest, folder: str, alias: str | None, who: str, why: str
    ) -> Manifest:
        """Take the next number and make it visible: the only part of a publish that other writers
        wait for."""
        name = manifest.name
        with self._transaction() as at:
            version = self._free(name)
            if manifest.lineage is not None and (manifest.lineage.parent_version or 0) >= version:
                parent = manifest.lineage.parent_version
                raise InvalidModelError(
                    f"lineage names parent version {parent}: {name!r} has only {version - 1}"
                )
            manifest = msgspec.structs.replace(manifest, version=version, created_at=at)
            data = encode(manifest)
            storage.write_file(f"{folder}/{MANIFEST}", data)
            storage.sync_directory(folder)
            storage.install(folder, f"{self._models}/{name}/{version}")
            self._add_version(name, version, sha256(data))
            if alias is not None:
                self._point(
                    Entry(name, alias, who, why or f"published version {version}", at), version
                )
        return manifest

    def _free(self, name: str) -> int:
        """The next version of ``name``, inside a transaction: what lies in its place is a dead
        publisher's."""
        version = self._next_version(name)
        # a dead publisher leaves one, not two
        if os.path.lexists(f"{self._models}/{name}/{version + 1}"):
            raise CorruptArtifactError(
                f"{FILE_NAME} ends {name!r} at version {version - 1}, the folder goes on: restore the latest index"
            )
        return version

    def conclude_experiment(
        self,
        name: str,
        alias: str = DEFAULT_ALIAS,
        version: int | None = None,
        *,
        who: str,
        why: str,
        run: str | None = None,
    ) -> Experiment | None:
        """:meth:`Index.conclude_experiment`, of a version that can be read. CorruptArtifactError:
        It is gone."""
        if version is not None:
            self.read(name, version)
        return super().conclude_experiment(name, alias, version, who=who, why=why, run=run)

    # Read

    def manifest(self, name: str, version: int) -> Manifest:
        """The manifest of a version, read from disk and verified against the index. Cost: about 40
        us.

        Raises:
            NotFoundError: No such version.
            CorruptArtifactError: The file is not what was published.

        Example: ``registry.manifest("digits", 3).metrics["worst_client_accuracy"]``
        """
        check_name("model name", name)
        number = checked_version(name, version)
        expected = self._manifest_sha256(name, number)

        def verified(path: str) -> Manifest:
            data = storage.read_file(self._models, path, MAX_MANIFEST_NBYTES)
            if sha256(data) != expected:
                raise _changed(path)
            return decode(data, path)

        try:
            return storage.replaced(f"{name}/{number}/{MANIFEST}", expected, verified)
        except CorruptArtifactError:
            if self._manifest_sha256(name, number) == expected:
                raise
        return self.manifest(name, number)  # a client of it was forgotten meanwhile

    def read(self, name: str, version: int) -> Artifact:
        """A whole version, read once and verified before it is parsed. The caller may keep and
        change the tensors.

        Personal heads stay on the disk: their index is verified here, each of them when its client
        comes.

        Raises:
            NotFoundError: No such version.
            CorruptArtifactError: A file is not what was published.
            ModelTooLargeError: The weights are larger than ``max_artifact_bytes``.

        Example: ``registry.read("digits", registry.resolve("digits", "canary")).tensors``

        Cost: one read, one sha256 of the file and one copy.
        """
        manifest = self.manifest(name, version)
        number = manifest.version
        folder = f"{name}/{number}"
        path = f"{folder}/{WEIGHTS}"
        nbytes = manifest.weights_nbytes
        if nbytes > self.max_artifact_bytes:
            raise ModelTooLargeError(
                f"{path} has {nbytes:,} bytes, max_artifact_bytes is {self.max_artifact_bytes:,}: raise it"
            )
        image = storage.read_file(self._models, path, nbytes)
        if sha256(image) != manifest.digests.weights:
            raise _changed(path)
        arrays = weights.unpack(image, path)
        heads = None
        if manifest.heads is not None:
            try:
                index = manifest.heads.index_sha256
                heads = storage.replaced(
                    f"{folder}/{HEADS}", index, lambda place: self._heads(place, manifest, arrays)
                )
            except CorruptArtifactError:
                if self.manifest(name, number) == manifest:
                    raise
                return self.read(name, number)  # a client of it was forgotten meanwhile
        return Artifact(manifest, arrays, heads)

    def _heads(
        self, path: str, manifest: Manifest, arrays: Mapping[str, weights.Array]
    ) -> HeadStore:
        entry = manifest.heads
        assert entry is not None
        now = self._now  # the store must not hold the registry
        current = trained_on(entry.layout, manifest.digests)
        neutral = neutral_head(entry.layout, arrays)
        return HeadStore(self._models, path, entry, current, neutral, lambda: now().timestamp())

    # Look

    def versions(self, name: str) -> "pd.DataFrame":
        """One row per version: see :func:`flserving.registry.tables.versions`. NotFoundError: no
        such name."""
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
        """Two versions (numbers or aliases) side by side: see ``tables.compare``. Reads both
        whole."""
        with of_extra("course"):
            from flserving.registry import tables

        first = self.read(name, self.resolve(name, a))
        second = self.read(name, self.resolve(name, b))
        return tables.compare((first.manifest, first.tensors), (second.manifest, second.tensors))

    # Forget

    def forget(self, client: str) -> Forgotten:
        """Remove a client's heads from every version, and its name from all that is written here;
        see :class:`Forgotten` for what stays.

        Versions keep their numbers and weights. Their manifests and heads are written anew, beside
        the old ones, and become valid in one transaction: whoever reads gets a whole version, of
        before or of after it. Killed anywhere, nothing or all of it has happened, and to forget the
        same client again removes what then lies there. Servers follow within a second, the client's
        device with its next pull. The log keeps a keyed pseudonym.

        The client is unknown from then on, and may take part in later trainings. Not reached:
        backups, publishes that are under way, blocks of the disk that its file system has given
        back, names inside of longer words.

        Raises:
            NotFoundError: Nothing here is of this client, nor was.
            InvalidInputError: It is no id.
            CorruptArtifactError: Nothing that can be read is of this client, and a version cannot
                be read. After an error nothing has changed, unless its message says so.

        Example: ``print(registry.forget("client-07"))``

        Cost: one write of the heads of each version that has one of the client; other writers wait
        meanwhile.
        """
        if not isinstance(client, str) or not 0 < len(client) <= MAX_CLIENT_CHARS:
            raise InvalidInputError(
                f"client {repr(client)[:80]}: give an id of 1 to {MAX_CLIENT_CHARS} characters"
            )
        self._writable()
        who = pseudonym(kept_key(self.root), client)
        try:
            with self._transaction() as at:
                self._settle()
                found = self._without(client, who.hex())
                rewards = feedback_of(self.root, client, who, remove=False)
                found = msgspec.structs.replace(found, rewards=rewards)
                if found.documents or found.rewards:
                    kept = msgspec.structs.replace(found, left=[], unread=[])
                    self._log_forgotten(client, kept, at)
                else:
                    found = self._forgotten_before(client, found)
        except BaseException as error:
            with suppress(Exception), self._transaction():
                self._settle()
            if isinstance(error, OSError) and not isinstance(error, FlservingError):
                raise FlservingError(
                    f"nothing was forgotten ({error.strerror}): check the registry's free space and permissions"
                ) from error
            raise
        try:
            with self._transaction():
                self._settle()
            feedback_of(self.root, client, who, remove=True)
            self._scrub()
        except (OSError, FlservingError) as error:
            raise FlservingError(
                f"forgotten, but not all has left the disk yet ({error}): forget again"
            ) from error
        return found

    def _forgotten_before(self, client: str, found: Forgotten) -> Forgotten:
        """The report of an earlier forgetting, long ago or by who did not come to the end, where
        nothing of the client was found."""
        _, _, before = self.forgotten(client)
        if before is not None:
            return msgspec.structs.replace(before, left=found.left, unread=found.unread)
        if found.unread:
            raise CorruptArtifactError(f"nobody knows whose heads it has: {found.unread[0]}")
        raise NotFoundError(f"nothing here is of client {client[:80]!r}: check its id")

    def unreadable(self) -> dict[str, str]:
        """The folders of versions whose manifest or heads cannot be read -> why; so nobody knows
        whose heads these are.

        Cost: a read of all manifests and of the index of all heads.
        """
        return self._survey()[1]

    def _survey(self) -> tuple[list[Manifest], dict[str, str]]:
        """The manifests of what can be read, and :meth:`unreadable`."""
        manifests = list[Manifest]()
        unreadable = {}
        for name, number in self._numbers():
            folder = f"{name}/{number}"
            try:
                manifest = self.manifest(name, number)
                if manifest.heads is not None:
                    self._open_heads(f"{folder}/{HEADS}", manifest.heads)
                manifests.append(manifest)
            except CorruptArtifactError as error:
                unreadable[folder] = str(error)
        return manifests, unreadable

    def _without(self, client: str, pseudonym: str) -> Forgotten:
        """Write whatever tells of a client anew: files beside what is there, which are valid with
        the transaction."""
        manifests, unreadable = self._survey()
        others = {
            one
            for manifest in manifests
            if manifest.lineage
            for one in manifest.lineage.clients or ()
        }
        names = naming(client, pseudonym, others=others)
        documents, left = self._without_names(names)
        left += [f"model {name}" for name in self.models() if names.search(name)]
        found = Forgotten(
            heads={}, documents=0, rewards=0, learned={}, unknown={}, unread=[*unreadable.values()]
        )
        for manifest in manifests:
            new = self._manifest_without(manifest, client, names, found)
            data = encode(new)
            folder = f"{self._models}/{manifest.name}/{manifest.version}"
            if new != manifest:
                documents += 1
                storage.write_file(f"{folder}/{sha256(data)}", data)
                storage.sync_directory(folder)
                self._change_version(manifest.name, manifest.version, sha256(data))
            if names.search(data.decode()):
                left.append(f"the manifest of {manifest.name}/{manifest.version}")
        return msgspec.structs.replace(found, documents=documents, left=left)

    def _manifest_without(
        self, manifest: Manifest, client: str, names: re.Pattern[str], found: Forgotten
    ) -> Manifest:
        """The manifest of a version without the client, whose heads are written anew; ``found``
        learns what there was."""
        name = manifest.name
        number = manifest.version
        entry = manifest.heads
        slot = -1
        if entry is not None:
            file = self._open_heads(f"{name}/{number}/{HEADS}", entry)
            slot = file.find(client)
        lineage = manifest.lineage or Lineage()
        if slot >= 0 or client in (lineage.clients or ()):
            found.learned.setdefault(name, []).append(manifest.round or number)
        elif manifest.round is not None and lineage.clients is None:
            found.unknown.setdefault(name, []).append(manifest.round)
        new = without(manifest, client, names, took_part=slot >= 0)
        if entry is None or slot < 0:
            return new
        found.heads.setdefault(name, []).append(number)
        others = None
        if entry.num_heads > 1:
            others = file.without(slot, entry, f"{self._models}/{name}/{number}")
        return msgspec.structs.replace(new, heads=others)

    def _open_heads(self, path: str, entry: HeadsEntry) -> HeadFile:
        return storage.replaced(
            path, entry.index_sha256, lambda place: HeadFile(self._models, place, entry, "")
        )

    def _settle(self) -> None:
        """Put in place what a forgetting has made valid, and remove what any writer left who died:
        inside a transaction."""
        storage.sweep(self._staging)
        for path in self._left():
            storage.remove(path)
            storage.sync_directory(os.path.dirname(path))
        for folder, files in self._replaceable():
            storage.settle(folder, files)

    def _left(self) -> list[str]:
        """The paths in ``models`` that belong to no version: inside a transaction."""
        taken = [
            f"{self._models}/{name}/{self._free(name)}"
            for name in filter(is_name, os.listdir(self._models))
        ]
        left = [path for path in taken if os.path.lexists(path)]
        for folder, files in self._replaceable():
            gone = () if HEADS in files.values() else (HEADS,)
            left += storage.unsettled(folder, files, gone)
        return left

    def _replaceable(self) -> Iterator[tuple[str, dict[str, str]]]:
        """The folders of versions, and which of their files a forgetting may write anew: digest ->
        name. What lies in that of a version whose manifest cannot be read is nobody's to judge."""
        for name, number in self._numbers():
            try:
                heads = self.manifest(name, number).heads
            except CorruptArtifactError:
                continue
            files = {self._manifest_sha256(name, number): MANIFEST}
            if heads is not None:
                files[heads.index_sha256] = HEADS
            yield f"{self._models}/{name}/{number}", files

    def gc(self, *, dry_run: bool = False) -> dict[str, int]:
        """Remove what writers left here who died: publishes that never became versions, files that
        a forgetting has replaced. Versions stay. Returns path below ``root`` -> bytes of what went,
        or with ``dry_run`` would go.
        """
        self._writable()
        with self._transaction():
            left = [*storage.abandoned(self._staging), *self._left()]
            found = {os.path.relpath(path, self.root): storage.nbytes(path) for path in left}
            if not dry_run:
                self._settle()
        return found

    def _numbers(self) -> list[tuple[str, int]]:
        return [(name, number) for name in self.models() for number in self.version_numbers(name)]


def _write(folder: str, draft: validation.Draft, heads: HeadSet | None) -> Manifest:
    """Write weights and heads, and hash them while the disk is waited for; returns the manifest
    with their digests."""
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
