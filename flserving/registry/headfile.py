"""The file that holds a million personal heads: its format, and reading it without trusting it.

::

    header      64 bytes: what it is, layout, shape, number of heads
    records     one a head, in order of the index, each on a 64-byte boundary:
                float32 [inputs + 1, outputs], bias last
    index       128-bit hash of the client id (two columns, sorted), checksum of the record,
                number of its digest
    digests     sha256 of what the heads were trained on: usually one for all

sha256 of header, index and digests is in the manifest and is verified at the opening; a record is
read when its client comes, and verified by its checksum then. So a file of gigabytes opens in the
time that its index takes, and a changed byte is found before it answers. The checksum finds damage;
who may write to the folder is the folder's business.

Records are read with ``pread`` and not mapped. Pages of a map count as this process's memory once
they are touched, and to give them back costs more than it saves (2.1 us a record, ``pread`` 1.2);
and a file that is truncated, or a disk that fails, under a map ends the process with SIGBUS instead
of an error.
"""

import hashlib
import math
import os
import struct
import weakref
from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from flserving.errors import CorruptArtifactError
from flserving.registry import storage
from flserving.registry.manifest import HeadsEntry

Layout = Literal["head", "additive", "adapter"]
LAYOUTS = get_args(Layout)
FILE_NAME = "heads.bin"
MAX_CLIENT_CHARS = 256
ALIGNMENT = 64  # bytes

_COPY_NBYTES = 1 << 24
_HEADER = struct.Struct("<8sIIIQ")
_MAGIC = b"flheads1"
_Words = NDArray[np.uint64]


def key_of(client: str) -> bytes:
    name = client.encode(errors="surrogatepass")
    return hashlib.blake2b(name, digest_size=16, person=b"flserving head").digest()


def header(entry: HeadsEntry) -> bytes:
    code = LAYOUTS.index(entry.layout)
    fields = _HEADER.pack(_MAGIC, code, entry.inputs, entry.outputs, entry.num_heads)
    return fields.ljust(ALIGNMENT, b"\0")


def stride(entry: HeadsEntry) -> int:
    """Bytes from record to record."""
    nbytes = (entry.inputs + 1) * entry.outputs * 4
    lines = math.ceil(nbytes / ALIGNMENT)
    return lines * ALIGNMENT


def checksums(records: NDArray[np.float32]) -> _Words:
    """One number a record [N, W]: a multilinear hash modulo 2**64 (Carter and Wegman 1979; Lemire
    and Kaser 2014).

    The high half of each word is folded into its low half first: times an odd number modulo 2**64,
    two flips of a word's highest bit (the sign of a float) would cancel.
    """
    words = records.view(np.uint64)
    words = words ^ (words >> np.uint64(32))
    return words @ _multipliers(words.shape[1])


@lru_cache(maxsize=64)
def _multipliers(count: int) -> _Words:
    """Odd pseudo-random numbers, the same everywhere: SplitMix64 (Steele et al., OOPSLA 2014)."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


class HeadFile:
    """An opened file: its index in memory, its records on the disk. Thread-safe.

    Args:
        root, relative: The file; messages name the latter only.
        entry: What the manifest says of it.
        digest: What heads must have been trained on to fit: ``fits`` [num_heads] says which do.

    Raises:
        CorruptArtifactError: The file or its index is not what was published.

    Closed when it is forgotten.
    """

    def __init__(self, root: str, relative: str, entry: HeadsEntry, digest: str) -> None:
        self._relative = relative
        self.stride = stride(entry)
        self._fd, size = storage.open_file(root, relative)
        weakref.finalize(self, os.close, self._fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        index_at = ALIGNMENT + entry.num_heads * self.stride
        table_nbytes = entry.nbytes - index_at - 28 * entry.num_heads
        if size != entry.nbytes or table_nbytes <= 0 or table_nbytes % 32:
            raise self._corrupt(f"has {size:,} bytes, expected {entry.nbytes:,}")
        head = self._read(ALIGNMENT, [0])
        index = self._read(size - index_at, [index_at])
        sha = hashlib.sha256(head)
        sha.update(index)
        if sha.hexdigest() != entry.index_sha256 or head != header(entry):
            raise self._corrupt("is not what was published (sha256 of its index differs)")
        ends = np.cumsum([8, 8, 8, 4]) * entry.num_heads
        high, low, checks, numbers, table = np.split(np.frombuffer(index, np.uint8), ends)
        self._high = high.view(np.uint64)
        self._low = low.view(np.uint64)
        self._checks = checks.view(np.uint64)
        self._numbers = numbers.view(np.uint32)
        self._digests: list[str] = [bytes(row).hex() for row in table.reshape(-1, 32)]
        if self._numbers.max() >= len(self._digests):
            raise self._corrupt("names digests that it does not hold")
        known = np.array([one == digest for one in self._digests])
        self.fits = known[self._numbers]
        self.nbytes = len(index) + self.fits.nbytes

    def find(self, client: str) -> int:
        """The number of a client's record, whatever it was trained on; -1 where there is none. A
        binary search."""
        if len(client) > MAX_CLIENT_CHARS:
            return -1
        high, low = struct.unpack(">QQ", key_of(client))
        slot = bisect_left(self._high.data, high)
        while slot < len(self._high) and self._high[slot] == high:
            if self._low[slot] == low:
                return slot
            slot += 1
        return -1

    def without(self, slot: int, entry: HeadsEntry, folder: str) -> HeadsEntry:
        """Write the file anew without one of its heads; returns what the manifest says of it then.

        It goes into ``folder``, named by the digest of its index. The records are copied
        as they are, with their checksums.

        Raises:
            CorruptArtifactError: The file cannot be read.
            OSError: As :func:`storage.write_parts`.
        """
        fewer = msgspec.structs.replace(entry, num_heads=entry.num_heads - 1)
        first = header(fewer)
        index = b""
        for column in (self._high, self._low, self._checks, self._numbers):
            index += np.delete(column, slot).tobytes()
        index += bytes.fromhex("".join(self._digests))
        digest = hashlib.sha256(first + index).hexdigest()
        gone = ALIGNMENT + slot * self.stride
        after = gone + self.stride
        end = ALIGNMENT + entry.num_heads * self.stride

        def parts() -> Iterator[bytes]:
            yield first
            for start, stop in ((ALIGNMENT, gone), (after, end)):
                for at in range(start, stop, _COPY_NBYTES):
                    nbytes = min(_COPY_NBYTES, stop - at)
                    yield self._read(nbytes, [at])
            yield index

        nbytes = storage.write_parts(f"{folder}/{digest}", parts(), storage.PRIVATE)
        return msgspec.structs.replace(fewer, nbytes=nbytes, index_sha256=digest)

    def trained_on(self, slot: int) -> str:
        """Digest of what a record was trained on."""
        return self._digests[int(self._numbers[slot])]

    def load(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read and verify records: float32 [N, stride / 4], read-only.

        Raises:
            CorruptArtifactError: One of them is not what was published, or cannot be read.
        """
        data = self._read(self.stride, (slots * self.stride + ALIGNMENT).tolist())
        records = np.frombuffer(data, np.float32).reshape(len(slots), -1)
        wrong = checksums(records) != self._checks[slots]
        if wrong.any():
            raise self._corrupt(f"has a changed record (number {slots[wrong.argmax()]})")
        return records

    def _read(self, nbytes: int, places: list[int]) -> bytes:
        """So many bytes from each of these places on, joined."""
        read = storage.read_at
        file = self._fd
        try:
            data = b"".join([read(file, nbytes, at) for at in places])
        except OSError as error:
            raise self._corrupt(f"cannot be read ({error.strerror})") from error
        if len(data) != nbytes * len(places):
            raise self._corrupt("was truncated while it was open")
        return data

    def _corrupt(self, why: str) -> CorruptArtifactError:
        return CorruptArtifactError(
            f"{self._relative} {why}: restore it from a backup, or publish again"
        )
