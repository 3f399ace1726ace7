"""Personal heads: what a version may carry beside its weights, and the store of a loaded version's
heads.

On disk they are one file (``headfile.py``); in memory is its index, and the heads that were used if
all of them may be.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import msgspec
import numpy as np
from numpy.typing import NDArray

from flserving.errors import InvalidModelError
from flserving.models import weights
from flserving.models.plain import NumpyModel
from flserving.models.processing import Floats
from flserving.models.weights import Tensors, as_float32
from flserving.registry import storage
from flserving.registry.headfile import (
    ALIGNMENT,
    FILE_NAME,
    LAYOUTS,
    MAX_CLIENT_CHARS,
    HeadFile,
    Layout,
    checksums,
    header,
    key_of,
    stride,
)
from flserving.registry.manifest import Digests, HeadsEntry, is_digest, sha256

__all__ = [
    "EXPIRED",
    "FILE_NAME",
    "STALE",
    "UNKNOWN",
    "HeadSet",
    "HeadStore",
    "Layout",
    "neutral_head",
    "trained_on",
]

UNKNOWN = -1
STALE = -2
EXPIRED = -3
"""Slots that mean: the global head answers, because there is no head, one that was trained on
something else, or one whose time is over."""

_CHUNK = 4096  # heads written at a time


def trained_on(layout: str, digests: Digests) -> str:
    """Digest of what a head of this layout depends on: the body; the generic head too where it
    works on the logits."""
    if layout == "head":
        return digests.body
    return sha256(f"{digests.body} {digests.head}".encode())


def trained_on_state(layout: str, tensors: Tensors) -> str:
    """:func:`trained_on` of weights that no version holds yet."""
    return trained_on(layout, Digests("", *weights.part_digests(tensors), ""))


def neutral_head(layout: str, tensors: Tensors) -> Floats:
    """The head that gives the global model's answer: float32 [inputs + 1, outputs]. ``tensors``:
    the version's."""
    generic = _as_matrix(tensors)
    if layout == "adapter":
        outputs = generic.shape[1]
        return np.eye(outputs + 1, outputs, dtype=np.float32)
    if layout == "additive":
        return np.zeros_like(generic)
    return generic


class HeadSet:
    """Heads to be published with a version.

    Args:
        layout: ``head``: logits = x W + b on the body's features x. ``additive``: generic logits +
            x W + b (FedROD, Chen and Chao, ICLR 2022). ``adapter``: z W + b on the generic logits
            z.
        clients: Ids, all different, of 1 to 256 characters.
        weights: float32 [K, inputs + 1, outputs]; the last row is the bias. May be an
            ``np.memmap``: publishing reads it once, in chunks.
        trained_on: Digest of what each head was trained on (see :func:`trained_on`), or one for
            all; None is the version that they are published with.
        expires_at: From then on they answer no more: a datetime with a time zone, or ISO 8601 text
            of one; None: never. It is kept in the manifest, in UTC, and goes with a head to its
            device.

    Raises:
        InvalidModelError: Another shape or dtype, ids twice, too long or not text, no such time.
            (Values are checked at publish.)
    """

    def __init__(
        self,
        layout: Layout,
        clients: Sequence[str],
        weights: Floats,
        trained_on: str | Sequence[str] | None = None,
        expires_at: datetime | str | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise InvalidModelError(f"layout is {layout!r}: choose one of {', '.join(LAYOUTS)}")
        floats = weights.ndim == 3 and weights.dtype == np.float32
        if not floats or not weights.size or weights.shape[1] < 2:
            raise InvalidModelError(
                f"heads are {weights.dtype} {weights.shape}: give float32 [clients, inputs + 1, outputs]"
            )
        if layout == "adapter" and weights.shape[1] != weights.shape[2] + 1:
            raise InvalidModelError(
                f"adapters are {weights.shape}: give [clients, outputs + 1, outputs]"
            )
        if len(clients) != len(weights):
            raise InvalidModelError(
                f"{len(clients):,} clients, {len(weights):,} heads: give one head each"
            )
        for client in clients:
            if not isinstance(client, str) or not 0 < len(client) <= MAX_CLIENT_CHARS:
                raise InvalidModelError(
                    f"client {repr(client)[:80]}: use text of 1 to {MAX_CLIENT_CHARS} characters"
                )
        if isinstance(trained_on, str):
            trained_on = [trained_on]
        if trained_on is not None:
            count = len(trained_on)
            if count not in (1, len(clients)) or not all(map(is_digest, trained_on)):
                raise InvalidModelError(
                    f"trained_on has {count} entries: give a sha256 for all heads, or one each"
                )
        self.layout = layout
        self.clients = clients
        self.weights = weights
        self.trained_on = trained_on
        self.expires_at = _in_utc(expires_at)
        words = np.frombuffer(b"".join(map(key_of, clients)), ">u8")
        keys = words.reshape(-1, 2).astype(np.uint64)
        self._order = np.lexsort((keys[:, 1], keys[:, 0]))
        self._keys = keys[self._order]
        same = (self._keys[1:] == self._keys[:-1]).all(axis=1)
        if same.any():
            client = clients[int(self._order[same.argmax()])]
            raise InvalidModelError(f"client {client!r} has two heads: give it one")

    @classmethod
    def from_states(
        cls,
        personal: Mapping[str, Tensors],
        layout: Layout = "head",
        trained_on: str | Sequence[str] | None = None,
        expires_at: datetime | str | None = None,
    ) -> "HeadSet":
        """From state dicts: client id -> {"head.weight": [out, in], "head.bias": [out]} (a missing
        bias is zero)."""
        try:
            heads = [_as_matrix(state) for state in personal.values()]
            return cls(layout, list(personal), np.stack(heads), trained_on, expires_at)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, InvalidModelError):
                raise
            raise InvalidModelError(
                f"the heads do not fit together ({error}): give weights of one shape"
            ) from error

    def __len__(self) -> int:
        return len(self.clients)

    def write(self, path: str, digest: str) -> HeadsEntry:
        """Write the file, wait until the disk has it, and say what was written. ``digest``: what
        "this version" is.

        Raises:
            InvalidModelError: A head holds NaN or infinities.
            OSError: As :func:`storage.write_parts`.

        Cost: one pass over the weights, about 1 s per GB beside the disk.
        """
        num_heads, rows, outputs = self.weights.shape
        entry = HeadsEntry(self.layout, num_heads, rows - 1, outputs, 1, "0" * 64)
        table, numbers = np.unique(self.trained_on or [digest], return_inverse=True)
        numbers = np.broadcast_to(numbers, num_heads)[self._order]
        first = header(entry)
        sha = hashlib.sha256(first)
        checks = np.empty(num_heads, np.uint64)  # filled while the records are written
        columns = (self._keys.T, checks, numbers.astype(np.uint32))
        digests = bytes.fromhex("".join(table))

        def parts() -> Iterator[bytes | memoryview]:
            yield first
            for start in range(0, num_heads, _CHUNK):
                order = self._order[start : start + _CHUNK]
                heads = self.weights[order]
                records = np.zeros((len(order), stride(entry) // 4), np.float32)
                records[:, : rows * outputs] = heads.reshape(len(order), -1)
                finite = np.isfinite(records).all(axis=1)
                if not finite.all():
                    client = self.clients[int(order[finite.argmin()])]
                    raise InvalidModelError(
                        f"the head of {client!r} holds NaN or infinite values: train it again"
                    )
                checks[start : start + _CHUNK] = checksums(records)
                yield records.data.cast("B")
            for data in (*(column.tobytes() for column in columns), digests):
                sha.update(data)
                yield data

        nbytes = storage.write_parts(path, parts(), storage.PRIVATE)
        return msgspec.structs.replace(
            entry, nbytes=nbytes, index_sha256=sha.hexdigest(), expires_at=self.expires_at
        )


def _in_utc(at: datetime | str | None) -> str | None:
    """ISO 8601 with the offset +00:00."""
    if at is None:
        return None
    try:
        given = datetime.fromisoformat(at) if isinstance(at, str) else at
        if given.tzinfo is None:
            raise ValueError("it has no time zone")
        return given.astimezone(UTC).isoformat()
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InvalidModelError(
            f"expires_at is {str(at)[:80]!r} ({error}): give a time such as 2027-01-31T12:00:00+00:00"
        ) from error


def _as_matrix(state: Tensors) -> Floats:
    """The weight transposed, and the bias below it."""
    weight = as_float32(state["head.weight"])
    bias = as_float32(state.get("head.bias", np.zeros(len(weight))))
    return np.ascontiguousarray(np.concatenate([weight.T, bias[None]]))


class HeadStore:
    """An opened file of heads: the index in memory; the heads too if they fit the budget, else each
    is read when its client comes. Thread-safe.

    Args:
        root, relative: The file; messages name the latter only.
        entry: What the manifest says of it. ``digest``: what its heads must be trained on not to be
            stale.
        neutral: float32 [inputs + 1, outputs]: what stands in where no head answers.
        wall: Seconds since 1970: decides when heads are expired.

    Raises:
        CorruptArtifactError: The file or its index is not what was published.

    Closed when it is forgotten, and not before: the number of a closed file is soon another file's.
    """

    def __init__(
        self,
        root: str,
        relative: str,
        entry: HeadsEntry,
        digest: str,
        neutral: Floats,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.wall = wall
        self.expires_at = entry.expires_at
        self._expires_s = math.inf
        if entry.expires_at is not None:
            self._expires_s = datetime.fromisoformat(entry.expires_at).timestamp()
        self.layout = entry.layout
        self.num_heads = entry.num_heads
        self.digest = entry.index_sha256
        self.inputs = entry.inputs
        self.outputs = entry.outputs
        self._width = neutral.size
        self._file = HeadFile(root, relative, entry, digest)
        self._neutral = np.zeros(self._file.stride // 4, np.float32)
        self._neutral[: self._width] = neutral.reshape(-1)
        self._rows: Floats | None = None
        self.resize(256 << 20)

    def resize(self, budget_nbytes: int) -> None:
        """Keep heads in memory if all of them fit into so many bytes; call it before the first
        use."""
        self._rows = None
        self.nbytes = self._file.nbytes
        nbytes = _rows_nbytes(self.num_heads, self._file.stride)
        if nbytes <= budget_nbytes:
            # Virtual memory until it is written. The last three rows are the slots EXPIRED, STALE
            # and UNKNOWN.
            self._rows = np.empty((self.num_heads + 3, self._file.stride // 4), np.float32)
            self._rows[-3:] = self._neutral
            self._here = np.zeros(self.num_heads + 3, bool)
            self._here[-3:] = True
            self.nbytes += nbytes

    @staticmethod
    def nbytes_of(entry: HeadsEntry, budget_nbytes: int) -> int:
        """What ``nbytes`` of a store will be after :meth:`resize`, from its manifest entry
        alone."""
        fits = entry.num_heads
        nbytes = entry.nbytes - ALIGNMENT - entry.num_heads * stride(entry) + fits
        rows = _rows_nbytes(entry.num_heads, stride(entry))
        if rows <= budget_nbytes:
            nbytes += rows
        return nbytes

    def find(self, client: str) -> int:
        """The slot of a client's head; UNKNOWN, STALE or EXPIRED where the global head answers. A
        binary search."""
        slot = self._file.find(client)
        if slot < 0:
            return slot
        if self.expired:
            return EXPIRED
        if not self._file.fits[slot]:
            return STALE
        return slot

    @property
    def expired(self) -> bool:
        """Whether the time of these heads is over. All heads of a version have the same."""
        return self._expires_s != math.inf and self.wall() >= self._expires_s

    def take(self, client: str) -> HeadSet | None:
        """One client's head alone, with what it was trained on, also a stale one: to publish it
        again, or to send it.

        Raises:
            CorruptArtifactError: The record is not what was published.
        """
        slot = self._file.find(client)
        if slot < 0:
            return None
        record = self._file.load(np.array([slot]))[:, : self._width]
        head = record.reshape(1, self.inputs + 1, self.outputs)
        return HeadSet(self.layout, [client], head, self._file.trained_on(slot), self.expires_at)

    def gather(
        self,
        slots: NDArray[np.int64],
        empty: Callable[[tuple[int, ...]], Floats] = NumpyModel.empty,
    ) -> Floats:
        """Heads by slot: float32 [N, inputs + 1, outputs], in memory of their own. Negative slots
        give the neutral.

        Args:
            empty: Makes the memory, of a given shape.

        Raises:
            CorruptArtifactError: A record is not what was published.
        """
        heads = empty((len(slots), self._file.stride // 4))
        if self._rows is None:
            heads[:] = self._neutral
            own = np.flatnonzero(slots >= 0)
            if own.size:
                heads[own] = self._file.load(slots[own])
        else:
            here = self._here[slots]
            if not here.all():  # two threads may both read a head: they write the same
                missing = np.array(sorted({*slots[~here].tolist()}))
                self._rows[missing] = self._file.load(missing)
                self._here[missing] = True
            self._rows.take(slots, axis=0, out=heads, mode="wrap")
        return heads[:, : self._width].reshape(len(slots), self.inputs + 1, self.outputs)


def _rows_nbytes(num_heads: int, stride: int) -> int:
    # a row and a flag each; the last three are the neutral head
    return (num_heads + 3) * (stride + 1)
