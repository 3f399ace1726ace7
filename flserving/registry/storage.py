"""Files that survive a crash: durable writes, staging that outlives nobody, reads that trust
nothing.

Relative paths in messages: where a registry lies on the disk is nobody's business.
"""

import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeVar

from flserving.errors import CorruptArtifactError, FlservingError, ForbiddenError

T = TypeVar("T")
_DIGEST = re.compile("[0-9a-f]{64}")
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO must not hang
_BINARY = getattr(os, "O_BINARY", 0)  # only on Windows

PRIVATE = 0o600
"""Mode of files that only their owner reads: a umask can only take more away."""
LEFT_AFTER_S = 3600.0
"""A publish that has written nothing for so long is no longer running."""
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

if sys.platform == "win32":
    _seeking = threading.Lock()

    def read_at(fd: int, nbytes: int, at: int) -> bytes:
        """``os.pread``, which Windows lacks."""
        with _seeking:
            os.lseek(fd, at, os.SEEK_SET)
            return os.read(fd, nbytes)

else:
    read_at = os.pread


def user_path(path: str | os.PathLike[str]) -> str:
    """A path as its user means it: ``~`` is the home folder. (Shells leave it alone in
    ``--registry=~/models``.)"""
    return os.path.expanduser(os.fspath(path))


def why_unwritable(folder: str) -> str | None:
    """Why nobody here may write to a folder: its file system is read-only, or it is another user's.

    None where it may be written, though its disk may be full.
    """
    path = f"{folder}/.{secrets.token_hex(8)}"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NOFOLLOW, PRIVATE))
        os.unlink(path)
    except OSError as error:
        return error.strerror if error.errno in READ_ONLY else None
    return None


def own_folder(owner: object, prefix: str) -> tuple[str, "weakref.finalize[..., object]"]:
    """A temporary folder, and what removes it: when called, when ``owner`` is forgotten, and at
    exit. Only the process that made it removes it: a forked child that ends must not take its
    parent's files along."""
    folder = tempfile.mkdtemp(prefix=prefix)
    return folder, weakref.finalize(owner, _remove, folder, os.getpid())


def _remove(folder: str, maker: int) -> None:
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)


def write_file(path: str, data: bytes | memoryview, mode: int = 0o644) -> None:
    """Create ``path``, write it whole and wait until the disk has it. OSError if it exists, or on a
    full disk."""
    write_parts(path, [data], mode)


def write_parts(path: str, parts: Iterable[bytes | memoryview], mode: int = 0o644) -> int:
    """:func:`write_file` part by part, for what does not fit into memory at once. Returns the
    number of bytes."""
    nbytes = 0
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NOFOLLOW | _BINARY, mode)
    try:
        for part in parts:
            rest = memoryview(part)
            nbytes += len(rest)
            while rest:  # one write takes at most 2 GiB
                rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    return nbytes


def kept_secret(root: str, name: str) -> bytes:
    """32 random bytes that only this folder's owner knows, made by the first call of any process: a
    file of hex digits.

    Raises:
        ForbiddenError: Other users can read it.
        CorruptArtifactError: It is no such secret.
        FlservingError: It cannot be read, or not be made.
    """
    path = f"{root}/{name}"
    try:
        if not os.path.lexists(path):
            fresh = f"{path}.{secrets.token_hex(8)}"
            try:
                write_file(fresh, secrets.token_hex(32).encode(), PRIVATE)
                with suppress(FileExistsError):
                    # unlike a rename it never replaces the secret of another process
                    os.link(fresh, path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(fresh)
        if os.name == "posix" and os.stat(path).st_mode & 0o077:
            raise ForbiddenError(
                f"{name} can be read by other users: chmod 600, and think about a new key"
            )
        with open(path, "rb") as opened:
            secret = bytes.fromhex(opened.read(65).decode())
    except ValueError:
        secret = b""
    except OSError as error:
        raise FlservingError(
            f"{name} cannot be used ({error.strerror}): check the folder"
        ) from error
    if len(secret) != 32:
        raise CorruptArtifactError(f"{name} is not a key: restore it from a backup")
    return secret


def sync_directory(path: str) -> None:
    """Wait until the disk has the names in a directory. Windows has no such call, and journals its
    names itself."""
    if sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_file(root: str, relative: str) -> tuple[int, int]:
    """Open a file of a registry for reading: its descriptor, and its size in bytes.

    Nothing but a regular file is opened: a symbolic link, a FIFO or a device is refused.

    Raises:
        CorruptArtifactError: It is missing, or of another kind.
        FlservingError: No file may be opened at the moment, or not this one.
    """
    try:
        fd = os.open(f"{root}/{relative}", os.O_RDONLY | _NOFOLLOW | _NONBLOCK | _BINARY)
    except OSError as error:
        # the file may be as sound as ever
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.EACCES):
            raise FlservingError(
                f"{relative} cannot be opened ({error.strerror}): check limits and permissions"
            ) from None
        raise _corrupt(relative, f"cannot be opened ({error.strerror})") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise _corrupt(relative, "is not a regular file")
    return fd, status.st_size


def read_file(root: str, relative: str, max_nbytes: int) -> bytes:
    """Read a file of a registry once, whole. Memory is taken only after the size was checked.

    Raises:
        CorruptArtifactError: As :func:`open_file`, or it is empty or larger than ``max_nbytes``.
        FlservingError: As :func:`open_file`.
    """
    fd, size = open_file(root, relative)
    with open(fd, "rb") as file:
        if not 0 < size <= max_nbytes:
            raise _corrupt(relative, f"has {size:,} bytes, expected 1 to {max_nbytes:,}")
        data = file.read(size)
    if len(data) < size:
        raise _corrupt(relative, f"ended {size - len(data):,} bytes early")
    return data


def replaced(path: str, digest: str, read: Callable[[str], T]) -> T:
    """``read`` of a file that may be about to be replaced by the one that lies beside it, named by
    its digest."""
    try:
        return read(path)
    except CorruptArtifactError:
        # the second: it was put in place meanwhile
        for place in (f"{os.path.dirname(path)}/{digest}", path):
            with suppress(CorruptArtifactError):
                return read(place)
        raise


def settle(folder: str, files: Mapping[str, str]) -> None:
    """Put files in place that lie in a folder named by their digests: digest -> name. Call this
    under the lock under which such files are made."""
    found = files.keys() & os.listdir(folder)
    for name in found:
        os.replace(f"{folder}/{name}", f"{folder}/{files[name]}")
    if found:
        sync_directory(folder)


def unsettled(folder: str, files: Mapping[str, str], gone: Iterable[str] = ()) -> list[str]:
    """The paths of others named by a digest, which somebody left who died, and of those in
    ``gone``."""
    found = [
        name
        for name in os.listdir(folder)
        if name in gone or (_DIGEST.fullmatch(name) and name not in files)
    ]
    return [f"{folder}/{name}" for name in found]


def _corrupt(relative: str, why: str) -> CorruptArtifactError:
    return CorruptArtifactError(f"{relative} {why}: restore it from a backup, or publish again")


def install(staged: str, target: str) -> None:
    """Move a staged directory to its final place, durably and in one step.

    Whatever is at ``target`` is the leftover of a publisher that died before it was visible, and
    goes first. So call this only under the lock that gives out ``target``.
    """
    parent = os.path.dirname(target)
    if not os.path.isdir(parent):
        os.mkdir(parent)
        sync_directory(os.path.dirname(parent))
    remove(target)
    os.rename(staged, target)
    sync_directory(parent)


def remove(target: str) -> None:
    """Remove what is there, if anything is."""
    if os.path.islink(target) or os.path.isfile(target):
        os.unlink(target)
    elif os.path.isdir(target):
        shutil.rmtree(target)


def nbytes(path: str) -> int:
    """The bytes of a file, or of all files in a folder."""
    inside = [f"{folder}/{name}" for folder, _, names in os.walk(path) for name in names]
    if os.path.isdir(path):
        return sum(os.lstat(file).st_size for file in inside)
    return os.lstat(path).st_size


def abandoned(folder: str) -> list[str]:
    """What publishers left in staging who died more than ``LEFT_AFTER_S`` ago."""
    found = []
    for left in os.scandir(folder):
        with suppress(FileNotFoundError):  # its publisher was faster
            if time.time() - left.stat().st_mtime >= LEFT_AFTER_S:
                found.append(left.path)
    return found


def sweep(folder: str) -> None:
    """Remove what is :func:`abandoned`."""
    for path in abandoned(folder):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def staging(folder: str) -> Iterator[str]:
    """A private directory for one publish, gone afterwards, whatever happens; so is what publishers
    left there who died more than ``LEFT_AFTER_S`` ago."""
    sweep(folder)
    path = f"{folder}/{secrets.token_hex(8)}"
    try:
        os.mkdir(path)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
