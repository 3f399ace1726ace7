"""Signed releases: what a cloud says about the version that devices should run, in a form that
nobody else can write.

A statement is canonical JSON, signed with Ed25519 (RFC 8032) under a label of its kind. The private
key lies in the registry's folder, readable by its owner alone; devices pin the public one. The
``serial`` grows with every change of the registry, so an older statement is known by it; the
``nonce`` is the asker's, so a statement that carries it was made after the question, whatever the
clocks say. A lower version than one that ran before is accepted only where ``undone`` reaches that:
the operator took it back with :meth:`Registry.rollback`. Rounds may start again at 1: a new
training makes new versions.
"""

import hmac
import math
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from flserving.edge import delta
from flserving.errors import CorruptArtifactError, ForbiddenError
from flserving.models import weights
from flserving.registry import storage
from flserving.registry.heads import HeadSet, Layout
from flserving.registry.index import DEFAULT_ALIAS
from flserving.registry.manifest import Count, Digest, Manifest, Version, for_devices, sha256
from flserving.registry.registry import Registry

KEY_FILE = "release.key"
MAX_RELEASE_NBYTES = 1 << 16
VALID_S = 86_400  # how long a statement may be relied on


class Statement(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The version to run. Times are whole seconds since 1970, UTC.

    ``round`` is the lineage's; a version without one counts by its version number. ``int8_sha256``
    is the digest of the version's tensors as :func:`delta.quantised` makes them. ``undone`` is the
    highest version that was ever taken back, 0 where none above this one was: devices that run a
    later one, of which nobody said so, do not go lower. ``rollback`` is the same in rounds. It is
    what devices of before ``undone`` go by, who read no statement with a field that they do not
    know; to them ``undone`` is not said. ``manifest_sha256`` is that of what
    :func:`device_manifest` gives. ``forgotten`` is the number of the last forgetting of the client
    whose token asks, which ``client_sha256`` names: what its device has of its heads must go. Both
    are said where it is asked for them.
    """

    model: str
    version: Version
    round: Count
    serial: Count
    manifest_sha256: Digest
    int8_sha256: Digest
    issued_at: Count
    expires_at: Count
    rollback: Count
    nonce: Annotated[str, Meta(pattern=r"^[0-9a-f]{0,64}$")]
    undone: Count | None = None
    forgotten: Count = 0
    client_sha256: Digest | None = None


class HeadStatement(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One client's head of a version, see :class:`HeadSet`. ``sha256``: of its numbers, float32 of
    ``shape``."""

    model: str
    manifest_sha256: Digest
    client: str
    layout: Layout
    trained_on: Digest
    shape: tuple[Annotated[int, Meta(ge=2)], Annotated[int, Meta(ge=1)]]
    sha256: Digest


class Release(Struct, frozen=True, forbid_unknown_fields=True):
    """A statement as it was signed, byte for byte; signature and public key in hex."""

    statement: str
    signature: Annotated[str, Meta(pattern=r"^[0-9a-f]{128}$")]
    key: Digest


class Head(Struct, frozen=True, forbid_unknown_fields=True):
    """A head as it travels: what is signed, and its numbers."""

    release: Release
    record: bytes


_Kind = TypeVar("_Kind", Statement, HeadStatement)
_Any = TypeVar("_Any", bound=Struct)


class Signer:
    """Signs what a registry releases: the version that its alias ``default`` points at.
    Thread-safe.

    Args:
        now: Seconds since 1970.

    Raises:
        CorruptArtifactError: The key file is not one.
        FlservingError: It can be neither read nor made.
    """

    def __init__(self, registry: Registry, now: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._now = now
        self._key = _private_key(registry.root)
        self.public = self._key.public_key().public_bytes_raw().hex()
        self._known: dict[str, Statement] = {}
        # after a change all devices ask at once: one reads the weights
        self._describing = threading.Lock()

    def release(
        self, model: str, nonce: str = "", by_version: bool = True, client: str | None = None
    ) -> Release:
        """The signed statement of ``model``. NotFoundError: no such model, or nothing is its
        default.

        Args:
            by_version: Say ``undone``. False for who may be a device that does not know it.
            client: Say whether this one, who asks, was forgotten.

        Cost: about 0.1 ms; after a change of the registry, a read of the weights beside it.
        """
        with self._describing:
            known = self._known.get(model)
            # also where it changed meanwhile
            while known is None or known.serial != self._serial():
                known = self._describe(model, self._serial())
                self._known[model] = known
        issued = int(self._now())
        statement = msgspec.structs.replace(
            known, issued_at=issued, expires_at=issued + VALID_S, nonce=nonce
        )
        if not by_version:
            statement = msgspec.structs.replace(statement, undone=None)
        if client is not None:
            forgotten = self._registry.forgotten(client)[0]
            who = client_sha256(client) if forgotten else None
            statement = msgspec.structs.replace(statement, forgotten=forgotten, client_sha256=who)
        return self.sign(statement)

    def pseudonym(self, name: str) -> str:
        """A device by another name, the same for every process of this registry; nobody else can
        tell whose it is."""
        return hmac.digest(
            self._key.private_bytes_raw(), b"flserving device\n" + name.encode(), "sha256"
        )[:12].hex()

    def head(self, model: str, version: int, head: HeadSet) -> Head:
        """The one head of ``head``, signed as part of a version."""
        record = head.weights.astype("<f4").tobytes()
        assert head.trained_on is not None
        statement = HeadStatement(
            model=model,
            manifest_sha256=sha256(device_manifest(self._registry, model, version)),
            client=head.clients[0],
            layout=head.layout,
            trained_on=head.trained_on[0],
            shape=head.weights.shape[1:],
            sha256=sha256(record),
        )
        return Head(self.sign(statement), record)

    def sign(self, statement: Statement | HeadStatement) -> Release:
        text = msgspec.json.encode(statement, order="deterministic")
        signature = self._key.sign(_label(type(statement)) + text)
        return Release(text.decode(), signature.hex(), self.public)

    def _serial(self) -> int:
        """One more than before manifests were made for devices: they take the new one of the same
        version for that."""
        return self._registry.change_token() + 1

    def _describe(self, model: str, serial: int) -> Statement:
        registry = self._registry
        version = registry.resolve(model, DEFAULT_ALIAS)
        artifact = registry.read(model, version)
        number = round_of(artifact.manifest)
        undone = registry.rolled_back(model, DEFAULT_ALIAS)
        back = max((round_of(registry.manifest(model, one)) for one in undone), default=0)
        return Statement(
            model=model,
            version=version,
            round=number,
            serial=serial,
            manifest_sha256=sha256(for_devices(artifact.manifest)),
            int8_sha256=weights.digest(delta.quantised(artifact.arrays)),
            issued_at=0,
            expires_at=0,
            rollback=back if back > number else 0,
            nonce="",
            undone=max((one for one in undone if one > version), default=0),
        )


def client_sha256(client: str) -> str:
    """A client as a statement names it: its id may be no Unicode text."""
    return sha256(client.encode(errors="surrogatepass"))


def device_manifest(registry: Registry, model: str, version: int) -> bytes:
    """What devices get of a version's manifest, byte for byte. Raises as
    :meth:`Registry.manifest`."""
    return for_devices(registry.manifest(model, version))


def round_of(manifest: Manifest) -> int:
    """The federated round of a version; its version number where the lineage tells none."""
    if manifest.round is None:
        return manifest.version
    return manifest.round


def verify(data: bytes, kind: type[_Kind], key: str | None) -> tuple[_Kind, str]:
    """What a release says, and the public key that it was signed with.

    Args:
        key: The only key that is accepted, hex; None accepts any (trust on first use).

    Raises:
        CorruptArtifactError: Not a release of this kind.
        ForbiddenError: Another key, or a signature that is not this key's.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    release = _decoded(data, Release)
    text = release.statement.encode(errors="replace")
    statement = _decoded(text, kind)
    if key is not None and release.key != key:
        raise ForbiddenError(
            f"the release is signed with the key {release.key[:12]}..., this device trusts {key[:12]}...: ask the "
            "cloud's operator, and start in another directory where the key was changed on purpose"
        )
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(release.key))
        public.verify(bytes.fromhex(release.signature), _label(kind) + text)
    except (InvalidSignature, ValueError):
        raise ForbiddenError(
            "the release's signature is not that of its key: it was changed on its way"
        ) from None
    return statement, release.key


def open_head(data: bytes, key: str, model: str, manifest_sha256: str, client: str) -> HeadSet:
    """The head of ``client`` that belongs to a version, verified. Raises as :func:`verify`.

    Raises:
        ForbiddenError: It is another client's, or another version's.
        CorruptArtifactError: Its numbers are not those that were signed.
        InvalidModelError: They make no head.
    """
    head = _decoded(data, Head)
    signed, _ = verify(msgspec.json.encode(head.release), HeadStatement, key)
    if (signed.model, signed.manifest_sha256, signed.client) != (model, manifest_sha256, client):
        raise ForbiddenError(
            f"the head is of {signed.client[:80]!r} and {signed.model!r} {signed.manifest_sha256[:12]}, this device is "
            f"{client!r} and runs {model!r} {manifest_sha256[:12]}"
        )
    if sha256(head.record) != signed.sha256 or len(head.record) != 4 * math.prod(signed.shape):
        raise CorruptArtifactError("the head is not what was signed: download it again")
    numbers = np.frombuffer(head.record, "<f4").reshape(1, *signed.shape)
    return HeadSet(signed.layout, [client], numbers, signed.trained_on)


class Seen(Struct, frozen=True, kw_only=True):
    """What a device has accepted: what comes later must not lie below it. ``version`` is the
    cloud's number."""

    serial: int = 0
    version: int = 0
    round: int = 0
    manifest_sha256: str = ""


def check(statement: Statement, model: str, nonce: str, seen: Seen, now_s: float) -> None:
    """Whether a device may follow a verified statement.

    Clocks decide little: it is the nonce that tells a fresh answer from a recorded one. A device
    whose clock runs ahead of the cloud's by more than the validity refuses what it gets; one whose
    clock was set back is fooled by nothing.

    Raises:
        ForbiddenError: Another model's, an answer to another question, older than one seen before,
            expired, or a lower version that nobody rolled back to (a lower round, where the cloud
            is of before ``Statement.undone``).
    """
    if statement.model != model:
        raise ForbiddenError(
            f"the release is of model {statement.model!r}, this device runs {model!r}"
        )
    if statement.nonce != nonce:
        raise ForbiddenError(
            "the release answers another question: somebody replays what was signed before"
        )
    if statement.serial < seen.serial:
        raise ForbiddenError(
            f"the release has serial {statement.serial}, {seen.serial} was seen before: it is replayed, or the cloud's "
            "registry was restored from a backup"
        )
    if statement.serial == seen.serial and seen.manifest_sha256 not in (
        "",
        statement.manifest_sha256,
    ):
        raise ForbiddenError(
            f"two releases of serial {statement.serial} name different versions: ask the operator"
        )
    late_s = max(now_s, statement.issued_at) - statement.expires_at
    if late_s >= 0:
        raise ForbiddenError(
            f"the release expired {late_s:.0f} s ago: check the clocks of this device and the cloud"
        )
    if statement.undone is None or not seen.version:
        _check_no_way_back("round", statement.round, rolled_back=statement.rollback, ran=seen.round)
    else:
        _check_no_way_back(
            "version", statement.version, rolled_back=statement.undone, ran=seen.version
        )


def _check_no_way_back(kind: str, offered: int, *, rolled_back: int, ran: int) -> None:
    if max(offered, rolled_back) < ran:
        raise ForbiddenError(
            f"the release has {kind} {offered}, {ran} ran here before: a way back must be signed, by "
            "registry.rollback() in the cloud"
        )


def _decoded(data: bytes, kind: type[_Any]) -> _Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptArtifactError(
            f"the release cannot be read ({error}): is this a cloud of flserving?"
        ) from None


def _label(kind: type[Struct]) -> bytes:
    # a signature of one kind is none of another
    return b"flserving %s 1\n" % kind.__name__.encode()


def _private_key(root: str) -> Any:
    """The registry's key; made at the first call of any process."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(storage.kept_secret(root, KEY_FILE))
