"""How a device gets its model: what the cloud releases is downloaded, verified, and only then
published locally.

The order of one pull: ask for the signed statement; check it; if it names another version than the
one that runs, get its manifest (sha256 in the statement), then the weights (sha256 in the manifest)
as a delta to what is here or whole, then the client's own head (signed); then publish all of it in
the device's registry as one version. Killed anywhere, the device starts with the version before or
with the new one, and a download goes on where it ended.

The weights of earlier versions go, but for the newest two and what an alias or an experiment leads
to: what is wanted again is downloaded again. What the device made itself
(:meth:`EdgeModelServer.update_local`) stays.

Where the cloud has forgotten the client, the signed statement says so, and the device forgets it
first.

What the cloud said stays in the version's lineage: ``extra`` has ``cloud_manifest``,
``cloud_version``, ``cloud_form``.
"""

import contextlib
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import msgspec

from flserving import models
from flserving.edge import delta
from flserving.edge.device import UPDATED_AT, EdgeModelServer, current
from flserving.edge.release import (
    MAX_RELEASE_NBYTES,
    Seen,
    Statement,
    check,
    client_sha256,
    open_head,
    round_of,
    verify,
)
from flserving.errors import (
    REASON,
    ConfigError,
    CorruptArtifactError,
    DeadlineExceededError,
    FlservingError,
    ForbiddenError,
    ModelTooLargeError,
    NotFoundError,
    ServerClosedError,
    TooLargeError,
    UnauthorizedError,
    answered,
)
from flserving.models import weights
from flserving.models.weights import Array, Tensors
from flserving.registry import manifest, storage
from flserving.registry.heads import HeadSet, trained_on
from flserving.registry.manifest import Lineage, Manifest, sha256
from flserving.registry.registry import WEIGHTS, Registry

_SLACK_NBYTES = 1 << 20  # a delta of what cannot be compressed is a little longer than the weights
_IDLE_S = 4.0  # a cloud lets go of a connection that was idle for 5 s: be sure to do so first


class _Facts(Seen, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    key: str | None = None  # the cloud's, trusted since the first pull
    device: str = ""  # tells this device from others with the same credential
    seen_s: float = 0.0
    forgotten: int = 0  # the last forgetting of the client that was obeyed


class Memory:
    """What a device must not forget: whom it trusts, what it accepted from there, the latest time
    it saw.

    Args:
        registry: The device's; the facts lie in a file in its folder.
        wall: Unix seconds.

    Raises:
        CorruptArtifactError: The file is not what was written. (It is replaced in one step, so a
            crash is no cause.)
    """

    def __init__(self, registry: Registry, wall: Callable[[], float] = time.time) -> None:
        self.folder = Path(registry.root) / "sync"
        self.facts = _Facts()
        self._wall = wall
        self._path = self.folder / "state.json"
        try:
            self.folder.mkdir(exist_ok=True)
            self.facts = msgspec.json.decode(self._path.read_bytes(), type=_Facts)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be used ({error.strerror}): choose another directory"
            ) from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CorruptArtifactError(
                f"sync/state.json cannot be read ({error}): restore it, or remove it to trust the cloud anew"
            ) from None

    def wall(self) -> float:
        """Unix seconds that never lie before the latest time that was noted, also after a restart:
        for ages."""
        return max(self._wall(), self.facts.seen_s)

    def note(self, **changed: Any) -> None:
        """Change facts, and wait until the disk has them. FlservingError: it cannot."""
        facts = msgspec.structs.replace(self.facts, **{"seen_s": self.wall()} | changed)
        fresh = self._path.with_suffix(f".{secrets.token_hex(4)}")
        with _disk(fresh):
            storage.write_file(str(fresh), msgspec.json.encode(facts))
            fresh.replace(self._path)
            storage.sync_directory(str(self.folder))
        self.facts = facts


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull did. ``version`` is the cloud's number, ``local`` the device's; ``nbytes``:
    received, by kind."""

    changed: bool
    round: int
    version: int
    local: int
    nbytes: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncSettings:
    """How an agent trusts, waits and remembers.

    Args:
        key: The cloud's public key, hex. None trusts the one of the first pull (and remembers it).
        ca: PEM of the authority to trust for https.
        timeout_s: Longest wait for the next bytes. ``limit_s``: for a whole file; what came stays
            for the next pull.
        memory: See :class:`Memory`; None reads that of the device's registry.
        clock: Monotonic seconds. ``wall``: Unix seconds.
    """

    key: str | None = None
    ca: bytes | None = None
    timeout_s: float = 10.0
    limit_s: float = 3600.0
    memory: Memory | None = None
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time


class SyncAgent:
    """Keeps one model of a device's registry at what its cloud releases. Thread-safe; close it.

    Args:
        url: Of the cloud. ``token``: the device's credential there.
        registry: The device's own. ``edge``: the server to update, whose registry it is; or a
            hybrid of it.
        model: Its name; None takes the first that the cloud serves. Remembered.
        client: Whose head to bring along.
        form: ``exact``, or ``int8`` for a quarter of the bytes at some accuracy.
        settings: See :class:`SyncSettings`.

    Raises:
        ConfigError: Another model or key than this directory has, or an authority that is no
            certificate.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        registry: Registry,
        *,
        edge: EdgeModelServer,
        model: str | None = None,
        client: str | None = None,
        form: delta.Form = "exact",
        settings: SyncSettings | None = None,
    ) -> None:
        settings = settings or SyncSettings()
        self.memory = settings.memory or Memory(registry, settings.wall)
        known = self.memory.facts
        for name, given, here in (("model", model, known.model), ("key", settings.key, known.key)):
            if None not in (given, here) and given != here:
                raise ConfigError(
                    f"{name} is {given!r}, this directory holds {here!r}: use another one"
                )
        self._registry = registry
        self._edge: EdgeModelServer = getattr(edge, "edge", edge)
        self._model = model
        self._client = client
        self._form = form
        self._key = settings.key
        self._wall = settings.wall
        self._cloud = _Downloads(url, token, self.memory.folder, settings)
        self._pulling = threading.Lock()
        self._whole = 0

    def pull(self) -> Pulled:
        """Ask once, and bring the device up to date. Where it fails, the model before serves on.

        Raises:
            ServerClosedError, DeadlineExceededError: The cloud does not answer, or stopped. Try
                again later.
            UnauthorizedError, ForbiddenError: The cloud does not know this device; or a statement
                that must not be followed, see :func:`release.check`.
            NotFoundError: The cloud has no such model, or no default of it.
            CorruptArtifactError, TooLargeError, ModelTooLargeError: Something else came than what
                was signed.
            FlservingError: The disk is full.
        """
        try:
            with self._pulling:
                return self._pull()
        except httpx.TimeoutException as error:
            waited = f"{self._cloud.settings.timeout_s:g} s"
            raise DeadlineExceededError(
                f"no answer from {self._cloud.url} within {waited}: try again later"
            ) from error
        except httpx.TransportError as error:
            raise ServerClosedError(
                f"no answer from {self._cloud.url} ({type(error).__name__}: {error})"
            ) from error

    def _pull(self) -> Pulled:
        self._cloud.nbytes = {}
        statement, model = self._ask()
        self._edge.model = model  # a new device may have been opened before it knew
        self._forget(statement)
        local = current(self._registry, model)
        held = self._held(model, statement.manifest_sha256)
        changed = held is None or local is None or held != local.version
        if held is None:
            held = self._update(model, statement, local)
        elif changed:
            with self._edge.lease(held, model):  # it answers, or nothing moves
                pass
            self._registry.set_alias(
                model, "default", held, who="sync", why=f"release {statement.serial}"
            )
        self._edge.refresh()
        self._edge.confirm()
        if (self.memory.facts.version, self.memory.facts.round) != (
            statement.version,
            statement.round,
        ):
            self.memory.note(version=statement.version, round=statement.round)
        self._prune(model)
        return Pulled(changed, statement.round, statement.version, held, self._cloud.nbytes)

    def _forget(self, statement: Statement) -> None:
        """Where the cloud has forgotten the client since the last pull: so does the device, its own
        heads included. Of another client, whose token it may hold, it has none."""
        if self._client is None or statement.client_sha256 != client_sha256(self._client):
            return
        if statement.forgotten > self.memory.facts.forgotten:
            self._edge.forget(self._client)
            self.memory.note(forgotten=statement.forgotten)

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._cloud.close()

    # What the cloud says

    def _ask(self) -> tuple[Statement, str]:
        facts = self.memory.facts
        nonce = secrets.token_hex(16)
        model = self._model or facts.model or self._first_model()
        local = current(self._registry, model)
        path = f"/v2/repository/models/{model}/release?nonce={nonce}&by=version&forgotten=1&{self._report(local)}"
        answer = self._cloud.get(path, MAX_RELEASE_NBYTES, "release")
        statement, key = verify(answer, Statement, self._key or facts.key)
        now_s = self._wall()
        if local is None:
            seen = facts
        else:
            ran = local.extra.get("cloud_version", 0)
            version = max(facts.version, ran if isinstance(ran, int) else 0)
            seen = msgspec.structs.replace(
                facts, version=version, round=max(facts.round, round_of(local))
            )
        check(statement, model, nonce, seen, now_s)
        # It was signed just now: so much later than that it is, or the clock is wrong and was so
        # before.
        facts_now = {"serial": statement.serial, "manifest_sha256": statement.manifest_sha256}
        self.memory.note(model=model, key=key, seen_s=max(now_s, statement.issued_at), **facts_now)
        return statement, model

    def _report(self, local: Manifest | None) -> str:
        """What runs here, for the cloud's picture of its fleet: its version, the round of that, how
        old it is."""
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
            raise NotFoundError(
                "the cloud names no model: publish one there, or say which to run"
            ) from None
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
        """Remove the weights of what came from the cloud, is not among the newest two, and nothing
        leads to."""
        needed = {
            *self._registry.version_numbers(model)[-2:],
            *self._registry.aliases(model).values(),
        }
        needed.update(
            *(experiment.versions for experiment in self._registry.experiments(model).values())
        )
        for path in Path(self._registry.root, "models", model).glob(f"*/{WEIGHTS}"):
            number = int(path.parent.name) if path.parent.name.isdecimal() else 0
            with contextlib.suppress(CorruptArtifactError, NotFoundError, OSError):
                if number not in needed:
                    extra = self._registry.manifest(model, number).extra
                    if "cloud_manifest" in extra and UPDATED_AT not in extra:
                        path.unlink()
                        self._whole = 0

    def _update(self, model: str, statement: Statement, local: Manifest | None) -> int:
        path = f"/v2/repository/models/{model}/versions/{statement.version}"
        content = self._cloud.get(f"{path}/manifest", manifest.MAX_MANIFEST_NBYTES, "manifest")
        if sha256(content) != statement.manifest_sha256:
            raise CorruptArtifactError(
                "the manifest is not the one that was signed (sha256 differs): try again"
            )
        new = manifest.decode(content, "the cloud's manifest")
        if (new.name, new.version, round_of(new)) != (model, statement.version, statement.round):
            raise CorruptArtifactError(
                "the manifest and the statement name different versions: ask the cloud's owner"
            )
        if new.weights_nbytes > self._registry.max_artifact_bytes:
            raise ModelTooLargeError(
                f"the weights have {new.weights_nbytes:,} bytes, this device takes "
                f"{self._registry.max_artifact_bytes:,}: raise max_artifact_bytes"
            )
        tensors = self._tensors(path, new, statement, local)
        head = self._head(path, new, statement)
        lineage = new.lineage or Lineage()
        extra = {
            **lineage.extra,
            "cloud_manifest": statement.manifest_sha256,
            "cloud_version": new.version,
            "cloud_form": self._form,
        }
        published = self._edge.update_global(
            tensors,
            head=head,
            architecture=new.architecture,
            parameters=new.parameters,
            preprocessing=new.preprocessing,
            metrics=new.metrics,
            note=new.note,
            output_type=new.signature.output_type,
            lineage=msgspec.structs.replace(
                lineage, round=statement.round, parent_version=None, extra=extra
            ),
        )
        return published.version

    def _tensors(
        self, path: str, new: Manifest, statement: Statement, local: Manifest | None
    ) -> Tensors:
        """The weights, verified: by a delta from what is here, by one from nothing, or whole."""
        like = models.blueprint(self._edge.config.engine, new.architecture, new.parameters).like
        if sum(tensor.nbytes for tensor in like.values()) > new.weights_nbytes:
            raise CorruptArtifactError(
                "the architecture asks for more weights than the manifest has: ask its owner"
            )
        bases: list[Manifest | None] = []
        if local is not None and local.extra.get("cloud_form") == self._form:
            bases.append(local)
        if self._form == "int8":
            bases.append(None)
        for base in bases:
            try:
                return self._by_delta(path, new, statement, base, like)
            except (
                ServerClosedError,
                DeadlineExceededError,
                UnauthorizedError,
            ):  # the weights would not come either
                raise
            except FlservingError:
                if base is None:  # nothing else would bring this form
                    raise
        image = self._cloud.fetch(
            f"{path}/weights", statement.manifest_sha256[:32], new.weights_nbytes, "weights"
        )
        if sha256(image) != new.digests.weights:
            raise CorruptArtifactError(
                "the weights are not those that were signed (sha256 differs): try again"
            )
        return weights.unpack(image, "the cloud's weights")

    def _by_delta(
        self,
        path: str,
        new: Manifest,
        statement: Statement,
        base: Manifest | None,
        like: Mapping[str, Array],
    ) -> Tensors:
        number = 0
        start = None
        if base is not None:
            number = base.extra["cloud_version"]
            start = self._registry.read(base.name, base.version).arrays
        name = f"{statement.manifest_sha256[:32]}-{number}-{self._form}"
        most = new.weights_nbytes + _SLACK_NBYTES
        image = self._cloud.fetch(
            f"{path}/delta?base={number}&form={self._form}", name, most, "delta"
        )
        tensors = delta.apply(image, start, like, self._form)
        # What was signed are the tensors, not a file that holds them: its bytes depend on who wrote
        # it.
        if self._form == "exact":
            signed = weights.part_digests(tensors) == (new.digests.body, new.digests.head)
        else:
            signed = weights.digest(tensors) == statement.int8_sha256
        if not signed:
            raise CorruptArtifactError(
                "the delta does not lead to the version that was signed: try again"
            )
        return tensors

    def _head(self, path: str, new: Manifest, statement: Statement) -> HeadSet | None:
        """The client's own head, unless the cloud has none, or none for this credential: then the
        global one answers.

        One that was trained on this version's exact form counts for its int8 form too.
        """
        if new.heads is None or self._client is None:
            return None
        try:
            data = self._cloud.get(
                f"{path}/head", 2 * new.weights_nbytes + MAX_RELEASE_NBYTES, "head"
            )
        except (NotFoundError, ForbiddenError):
            return None
        key = self.memory.facts.key
        assert key is not None
        head = open_head(data, key, new.name, statement.manifest_sha256, self._client)
        fits = head.trained_on is not None and head.trained_on[0] == trained_on(
            head.layout, new.digests
        )
        trained = None if fits else head.trained_on
        return HeadSet(head.layout, head.clients, head.weights, trained, new.heads.expires_at)


# Downloads: bounded in bytes and time, and continued where an earlier try was cut


class _Downloads:
    """One cloud, one folder for what is half here. ``nbytes`` counts what was received, by kind.

    Raises (``get`` and ``fetch``):
        httpx.TransportError: No answer, or too slow. DeadlineExceededError: Over ``limit_s``.
        TooLargeError: More bytes than there can be. FlservingError: The disk is full. Any other
        error: what the cloud answered.
    """

    def __init__(self, url: str, token: str | None, folder: Path, settings: SyncSettings) -> None:
        self.nbytes = dict[str, int]()
        self.url = url.rstrip("/")
        self.settings = settings
        self._folder = folder
        try:
            trusted = ssl.create_default_context(
                cadata=None if settings.ca is None else settings.ca.decode()
            )
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"the authority to trust is no PEM certificate ({error}): check the file"
            ) from error
        headers = {"accept-encoding": "identity"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        self._http = httpx.Client(
            headers=headers,
            verify=trusted,
            timeout=settings.timeout_s,
            limits=httpx.Limits(keepalive_expiry=_IDLE_S),
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._http.close()

    def get(self, path: str, most: int, kind: str) -> bytes:
        """A short answer, into memory."""
        until_s = self.settings.clock() + self.settings.limit_s
        data = bytearray()
        with self._stream(path) as response:
            for chunk in self._chunks(response, kind, until_s):
                data += chunk
                if len(data) > most:
                    raise TooLargeError(
                        f"the cloud's {kind} has more than {most:,} bytes: it is not one"
                    )
        return bytes(data)

    def fetch(self, path: str, name: str, most: int, kind: str) -> bytes:
        """A long one, through a file ``name`` in the folder: uint8 [nbytes].

        Goes on where an earlier try ended, as long as each try brings something; the end of the
        file proves nothing, so compare a digest. Other parts in the folder are removed: they are of
        something older.
        """
        target = self._folder / f"{name}.part"
        until_s = self.settings.clock() + self.settings.limit_s
        with _disk(target):
            for other in self._folder.glob("*.part"):
                if other != target:
                    other.unlink()
            have = _size(target)
            while have < most:
                try:
                    if self._go_on(path, target, have, most=most, kind=kind, until_s=until_s):
                        break
                except httpx.TransportError:
                    if _size(target) <= have:
                        raise
                have = _size(target)
            try:
                return storage.read_file(str(self._folder), target.name, most)
            finally:
                target.unlink()

    def _go_on(
        self, path: str, target: Path, have: int, *, most: int, kind: str, until_s: float
    ) -> bool:
        """One try; whether it came to the end."""
        with self._stream(path, have) as response:
            if response.status_code == 416:  # what is here is not the beginning of what is there
                target.unlink(missing_ok=True)
                if not have:
                    raise TooLargeError(
                        f"the cloud has no such range of {kind}, though none was asked for"
                    )
                return False
            start = have if response.status_code == 206 else 0
            length = response.headers.get("content-length", "")
            total = start + int(length) if length.isdecimal() else -1
            begins = response.headers.get("content-range", "bytes 0-")
            if not 0 < total <= most or not begins.startswith(f"bytes {start}-"):
                raise TooLargeError(
                    f"the cloud sends {length or '?'} bytes of {kind} ({begins}): at most {most:,} from {start:,} on "
                    "can be right"
                )
            with open(target, "r+b" if start else "wb") as file:
                file.seek(start)
                for chunk in self._chunks(response, kind, until_s):
                    file.write(chunk)
        return True

    @contextlib.contextmanager
    def _stream(self, path: str, start: int = 0) -> Iterator[httpx.Response]:
        """An answer (200, 206, 416) whose body is still to be read."""
        headers = {"range": f"bytes={start}-"} if start else {}
        with self._http.stream("GET", self.url + path, headers=headers) as response:
            if response.status_code not in (200, 206, 416):
                # a message is short, whatever is sent
                body = b"".join(islice(response.iter_raw(), 4))
                raise answered(response.status_code, body, response.headers.get(REASON, ""))
            yield response

    def _chunks(self, response: httpx.Response, kind: str, until_s: float) -> Iterator[bytes]:
        """The body, counted. Raises DeadlineExceededError after ``until_s``; what came before
        stays."""
        for chunk in response.iter_raw():
            if self.settings.clock() > until_s:
                raise DeadlineExceededError(
                    f"the {kind} took longer than {self.settings.limit_s:g} s"
                )
            self.nbytes[kind] = self.nbytes.get(kind, 0) + len(chunk)
            yield chunk


def _size(path: Path) -> int:
    if not path.exists():
        return 0
    return path.stat().st_size


@contextlib.contextmanager
def _disk(part: Path) -> Iterator[None]:
    """A part that filled the disk goes: others need the space."""
    try:
        yield
    except FlservingError:  # one of them is an OSError too
        raise
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FlservingError(
            f"the device cannot store the update ({error.strerror}): free some space"
        ) from error
