"""How a device gets its model: what the cloud releases is downloaded, verified, and only then published locally.

The order of one pull: ask for the signed statement; check it; if it names another version than the one that runs, get
its manifest (sha256 in the statement), then the weights (sha256 in the manifest) as a delta to what is here or whole,
then the client's own head (signed); then publish all of it in the device's registry as one version. Killed anywhere,
the device starts with the version before or with the new one, and a download goes on where it ended.

The weights of earlier versions go, but for the newest two and what an alias or an experiment leads to: what is
wanted again is downloaded again. What the device made itself (:meth:`EdgeModelServer.update_local`) stays.

What the cloud said stays in the version's lineage: ``extra`` has ``cloud_manifest``, ``cloud_version``, ``cloud_form``.
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec
import torch
from torch import Tensor

from flserving import models
from flserving.edge import delta
from flserving.edge.device import UPDATED_AT, EdgeModelServer, current
from flserving.edge.downloads import Downloads, disk_full
from flserving.edge.release import MAX_RELEASE_NBYTES, Seen, Statement, check, open_head, round_of, verify
from flserving.errors import (
    ConfigError,
    CorruptArtifactError,
    DeadlineExceededError,
    FlservingError,
    ForbiddenError,
    ModelTooLargeError,
    NotFoundError,
    ServerClosedError,
    UnauthorizedError,
)
from flserving.models import weights
from flserving.registry import manifest, storage
from flserving.registry.heads import HeadSet, trained_on
from flserving.registry.manifest import Lineage, Manifest, sha256
from flserving.registry.registry import WEIGHTS, Registry

_SLACK_NBYTES = 1 << 20  # a delta of what cannot be compressed is a little longer than the weights


class _Facts(Seen, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    key: str | None = None  # the cloud's, trusted since the first pull
    device: str = ""  # tells this device from others with the same credential
    seen_s: float = 0.0


class Memory:
    """What a device must not forget: whom it trusts, what it accepted from there, the latest time it saw.

    Args:
        registry: The device's; the facts lie in a file in its folder.
        wall: Unix seconds.

    Raises:
        CorruptArtifactError: The file is not what was written. (It is replaced in one step, so a crash is no cause.)
    """

    def __init__(self, registry: Registry, wall: Callable[[], float] = time.time) -> None:
        self.folder, self._wall = Path(registry.root) / "sync", wall
        self._path, self.facts = self.folder / "state.json", _Facts()
        try:
            self.folder.mkdir(exist_ok=True)
            self.facts = msgspec.json.decode(self._path.read_bytes(), type=_Facts)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be used ({error.strerror}): choose another directory") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CorruptArtifactError(
                f"sync/state.json cannot be read ({error}): restore it, or remove it to trust the cloud anew"
            ) from None

    def wall(self) -> float:
        """Unix seconds that never lie before the latest time that was noted, also after a restart: for ages."""
        return max(self._wall(), self.facts.seen_s)

    def note(self, **changed: Any) -> None:
        """Change facts, and wait until the disk has them. FlservingError: it cannot."""
        facts = msgspec.structs.replace(self.facts, **{"seen_s": self.wall()} | changed)
        fresh = f"{self._path}.{secrets.token_hex(4)}"
        try:
            storage.write_file(fresh, msgspec.json.encode(facts))
            os.replace(fresh, self._path)
            storage.sync_directory(str(self.folder))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise disk_full(error) from error
        self.facts = facts


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull did. ``version`` is the cloud's number, ``local`` the device's; ``nbytes``: received, by kind."""

    changed: bool
    round: int
    version: int
    local: int
    nbytes: Mapping[str, int]


class SyncAgent:
    """Keeps one model of a device's registry at what its cloud releases. Thread-safe; close it.

    Args:
        url: Of the cloud. ``token``: the device's credential there. ``ca``: PEM of the authority to trust.
        registry: The device's own. ``edge``: the server to update, whose registry it is; or a hybrid of it.
        model: Its name; None takes the first that the cloud serves. Remembered.
        client: Whose head to bring along.
        key: The cloud's public key, hex. None trusts the one of the first pull (and remembers it).
        form: ``exact``, or ``int8`` for a quarter of the bytes at some accuracy.
        timeout_s: Longest wait for the next bytes. ``limit_s``: for a whole file; what came stays for the next pull.
        memory: See :class:`Memory`. ``clock``: monotonic seconds. ``wall``: Unix seconds.
    """

    def __init__(
        self, url: str, token: str | None, registry: Registry, *, edge: EdgeModelServer,
        model: str | None = None, client: str | None = None, key: str | None = None, form: delta.Form = "exact",
        ca: bytes | None = None, timeout_s: float = 10.0, limit_s: float = 3600.0, memory: Memory | None = None,
        clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.memory = memory or Memory(registry, wall)
        for name, given in (("model", model), ("key", key)):
            known = getattr(self.memory.facts, name)
            if None not in (given, known) and given != known:
                raise ConfigError(f"{name} is {given!r}, this directory holds {known!r}: use another one")
        self._registry, self._client, self._form = registry, client, form
        self._edge: EdgeModelServer = getattr(edge, "edge", edge)
        self._model, self._key, self._wall = model, key, wall
        self._cloud = Downloads(url, token, self.memory.folder, ca, timeout_s, limit_s, clock)
        self._pulling, self._whole = threading.Lock(), 0

    def pull(self) -> Pulled:
        """Ask once, and bring the device up to date. Where it fails, the model before serves on.

        Raises:
            ServerClosedError, DeadlineExceededError: The cloud does not answer, or stopped. Try again later.
            UnauthorizedError, ForbiddenError: The cloud does not know this device; or a statement that must not be
            followed, see :func:`release.check`. NotFoundError: The cloud has no such model, or no default of it.
            CorruptArtifactError, TooLargeError, ModelTooLargeError: Something else came than what was signed.
            FlservingError: The disk is full.
        """
        with self._pulling:
            self._cloud.nbytes = {}
            statement, model = self._ask()
            self._edge.model = model  # a new device may have been opened before it knew
            local = current(self._registry, model)
            if (held := self._held(model, statement.manifest_sha256)) is None:
                held, changed = self._update(model, statement, local), True
            elif changed := held != (None if local is None else local.version):
                with self._edge.lease(held, model):  # it answers, or nothing moves
                    pass
                why = f"release {statement.serial}"
                self._registry.set_alias(model, "default", held, who="sync", why=why)
            self._edge.refresh()
            self._edge.confirm()
            if (self.memory.facts.version, self.memory.facts.round) != (statement.version, statement.round):
                self.memory.note(version=statement.version, round=statement.round)
            self._prune(model)
            return Pulled(changed, statement.round, statement.version, held, self._cloud.nbytes)

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._cloud.close()

    # What the cloud says

    def _ask(self) -> tuple[Statement, str]:
        facts, nonce = self.memory.facts, secrets.token_hex(16)
        model = self._model or facts.model or self._first_model()
        local = current(self._registry, model)
        path = f"/v2/repository/models/{model}/release?nonce={nonce}&by=version&{self._report(local)}"
        answer = self._cloud.get(path, MAX_RELEASE_NBYTES, "release")
        statement, key = verify(answer, Statement, self._key or facts.key)
        now_s = self._wall()
        if local is None:
            seen = facts
        else:
            ran = local.extra.get("cloud_version", 0)
            version = max(facts.version, ran if isinstance(ran, int) else 0)
            seen = msgspec.structs.replace(facts, version=version, round=max(facts.round, round_of(local)))
        check(statement, model, nonce, seen, now_s)
        # It was signed just now: so much later than that it is, or the clock is wrong and was so before.
        facts_now = {"serial": statement.serial, "manifest_sha256": statement.manifest_sha256}
        self.memory.note(model=model, key=key, seen_s=max(now_s, statement.issued_at), **facts_now)
        return statement, model

    def _report(self, local: Manifest | None) -> str:
        """What runs here, for the cloud's picture of its fleet: its version, the round of that, how old it is."""
        if not self.memory.facts.device:
            self.memory.note(device=secrets.token_hex(8))
        report: dict[str, Any] = {"device": self.memory.facts.device}
        served = self._edge.get_all_stats()["edge"]
        ran = None if local is None else local.extra.get("cloud_version")
        if local is not None and isinstance(ran, int):
            report |= {"version": ran, "round": round_of(local)}
            if served is not None and served["age_s"] is not None:
                report["age_s"] = f"{served['age_s']:.3f}"
        return urlencode(report)

    def _first_model(self) -> str:
        answer = self._cloud.get("/v2/models", MAX_RELEASE_NBYTES, "release")
        try:
            name = msgspec.json.decode(answer, type=dict[str, list[str]])["models"][0]
        except (msgspec.MsgspecError, KeyError, IndexError, UnicodeDecodeError):
            raise NotFoundError("the cloud names no model: publish one there, or say which to run") from None
        return manifest.check_name("model name", name)

    # What is here

    def _held(self, model: str, manifest_sha256: str) -> int | None:
        """The local version of a cloud's, if there is one that is whole; read once to know that."""
        wanted = {"cloud_manifest": manifest_sha256, "cloud_form": self._form}.items()
        for number in reversed(self._registry.version_numbers(model)):
            with contextlib.suppress(CorruptArtifactError):
                if wanted <= self._registry.manifest(model, number).extra.items():
                    if number != self._whole:
                        self._registry.read(model, number)
                        self._whole = number
                    return number
        return None

    def _prune(self, model: str) -> None:
        """Remove the weights of what came from the cloud, is not among the newest two, and nothing leads to."""
        kept = {*self._registry.version_numbers(model)[-2:], *self._registry.aliases(model).values()}
        kept.update(*(experiment.versions for experiment in self._registry.experiments(model).values()))
        for path in Path(self._registry.root, "models", model).glob(f"*/{WEIGHTS}"):
            number = int(path.parent.name) if path.parent.name.isdecimal() else 0
            with contextlib.suppress(CorruptArtifactError, NotFoundError, OSError):
                if number not in kept:
                    extra = self._registry.manifest(model, number).extra
                    if "cloud_manifest" in extra and UPDATED_AT not in extra:
                        path.unlink()
                        self._whole = 0

    def _update(self, model: str, statement: Statement, local: Manifest | None) -> int:
        path = f"/v2/repository/models/{model}/versions/{statement.version}"
        content = self._cloud.get(f"{path}/manifest", manifest.MAX_MANIFEST_NBYTES, "manifest")
        if sha256(content) != statement.manifest_sha256:
            raise CorruptArtifactError("the manifest is not the one that was signed (sha256 differs): try again")
        new = manifest.decode(content, "the cloud's manifest")
        if (new.name, new.version, round_of(new)) != (model, statement.version, statement.round):
            raise CorruptArtifactError("the manifest and the statement name different versions: ask the cloud's owner")
        if new.weights_nbytes > self._registry.max_artifact_bytes:
            raise ModelTooLargeError(
                f"the weights have {new.weights_nbytes:,} bytes, this device takes "
                f"{self._registry.max_artifact_bytes:,}: raise max_artifact_bytes"
            )
        tensors = self._tensors(path, new, statement, local)
        head = self._head(path, new, statement)
        lineage = new.lineage or Lineage()
        extra = {**lineage.extra, "cloud_manifest": statement.manifest_sha256, "cloud_version": new.version,
                 "cloud_form": self._form}  # fmt: skip
        published: dict[str, Any] = {
            "architecture": new.architecture, "parameters": new.parameters, "preprocessing": new.preprocessing,
            "metrics": new.metrics, "note": new.note, "output_type": new.signature.output_type,
            "lineage": msgspec.structs.replace(lineage, round=statement.round, parent_version=None, extra=extra),
        }  # fmt: skip
        return self._edge.update_global(tensors, head=head, **published).version

    def _tensors(
        self, path: str, new: Manifest, statement: Statement, local: Manifest | None
    ) -> dict[str, Tensor]:  # fmt: skip
        """The weights, verified: by a delta from what is here, by one from nothing, or whole."""
        with torch.device("meta"):
            like = models.build(new.architecture, new.parameters).state_dict()
        if sum(tensor.nbytes for tensor in like.values()) > new.weights_nbytes:
            raise CorruptArtifactError("the architecture asks for more weights than the manifest has: ask its owner")
        extra = {} if local is None else local.extra
        bases = [local] if local is not None and extra.get("cloud_form") == self._form else []
        for base in [*bases, *([None] if self._form == "int8" else [])]:
            number = 0 if base is None else extra["cloud_version"]
            name, most = f"{statement.manifest_sha256[:32]}-{number}-{self._form}", new.weights_nbytes + _SLACK_NBYTES
            try:
                start = None if base is None else self._registry.read(base.name, base.version).tensors
                image = self._cloud.fetch(f"{path}/delta?base={number}&form={self._form}", name, most, "delta")
                tensors = delta.apply(weights.as_bytes(image), start, like, self._form)
                if not self._is_signed(tensors, new, statement):
                    raise CorruptArtifactError("the delta does not lead to the version that was signed: try again")
                return tensors
            except (ServerClosedError, DeadlineExceededError, UnauthorizedError):  # the weights would not come either
                raise
            except FlservingError:
                if base is None:  # nothing else would bring this form
                    raise
        image = self._cloud.fetch(f"{path}/weights", statement.manifest_sha256[:32], new.weights_nbytes, "weights")
        if sha256(weights.as_bytes(image)) != new.digests.weights:
            raise CorruptArtifactError("the weights are not those that were signed (sha256 differs): try again")
        return weights.unpack(image, "the cloud's weights")

    def _is_signed(self, tensors: Mapping[str, Tensor], new: Manifest, statement: Statement) -> bool:
        """Whether these are the tensors that the cloud signed. Of the tensors, not of a file that holds them: the bytes
        of a file depend on who wrote it."""
        if self._form == "exact":
            return weights.part_digests(tensors) == (new.digests.body, new.digests.head)
        return weights.digest(tensors) == statement.int8_sha256

    def _head(self, path: str, new: Manifest, statement: Statement) -> HeadSet | None:
        """The client's own head, unless the cloud has none, or none for this credential: then the global one answers.

        One that was trained on this version's exact form counts for its int8 form too.
        """
        if new.heads is None or self._client is None:
            return None
        try:
            data = self._cloud.get(f"{path}/head", 2 * new.weights_nbytes + MAX_RELEASE_NBYTES, "head")
        except (NotFoundError, ForbiddenError):
            return None
        key = self.memory.facts.key
        assert key is not None
        head = open_head(data, key, new.name, statement.manifest_sha256, self._client)
        fits = head.trained_on is not None and head.trained_on[0] == trained_on(head.layout, new.digests)
        trained = None if fits else head.trained_on
        return HeadSet(head.layout, head.clients, head.weights, trained, new.heads.expires_at)
