"""A disk with six calls: a real folder, and one in memory that loses power in the middle of the
work.

What is written reaches a disk only when it is synced, and so do the names of files. Until then a
loss of power may keep nothing of it, half of it, or all. The exercises ``publish`` and ``promote``
of notebook 01 run on both.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from flserving.registry.storage import sync_directory


class Disk(Protocol):
    """Files by name, in one folder."""

    def names(self) -> list[str]:
        """The names of all files."""

    def read(self, name: str) -> bytes:
        """What a file holds. FileNotFoundError: there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Make a file, or overwrite it in place."""

    def sync(self, name: str) -> None:
        """Wait until the disk has what was written to a file."""

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in one step; a file that had this name is gone."""

    def sync_names(self) -> None:
        """Wait until the disk has the names as they are now."""


class Folder:
    """A folder of the real disk, which must exist."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self.path / name).write_bytes(data)

    def sync(self, name: str) -> None:
        with open(self.path / name, "rb+") as file:
            os.fsync(file.fileno())

    def rename(self, old: str, new: str) -> None:
        os.replace(self.path / old, self.path / new)

    def sync_names(self) -> None:
        sync_directory(str(self.path))


class PowerCut(BaseException):
    """The process ended here. Not an Exception: nothing that catches errors may go on after it."""


class _File:
    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.safe = data


class FragileDisk:
    """A disk in memory whose power fails at the ``cut_at``-th change (1 for the first; None: it
    never fails).

    Args:
        files: What is on it, safely.
        cut_at: Changes are write, sync, rename and sync_names. The one that fails has not happened;
            of a write, half.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None, cut_at: int | None = None) -> None:
        self._files = {name: _File(data) for name, data in (files or {}).items()}
        # the names that the disk has, then those after each change
        self._names_since = [dict(self._files)]
        self._cut_at = cut_at
        self.done: list[str] = []

    def names(self) -> list[str]:
        return sorted(self._files)

    def read(self, name: str) -> bytes:
        return self._file(name).data

    def write(self, name: str, data: bytes) -> None:
        cut = self._is_cut()
        if name not in self._files:
            self._files[name] = _File()
            self._names_since.append(dict(self._files))
        written = bytes(data)
        if cut:
            written = written[: len(data) // 2]
        self._files[name].data = written
        self._change(f"write({name!r})", cut)

    def sync(self, name: str) -> None:
        file = self._file(name)
        self._change(f"sync({name!r})", self._is_cut())
        file.safe = file.data

    def rename(self, old: str, new: str) -> None:
        file = self._file(old)
        self._change(f"rename({old!r}, {new!r})", self._is_cut())
        del self._files[old]
        self._files[new] = file
        self._names_since.append(dict(self._files))

    def sync_names(self) -> None:
        self._change("sync_names()", self._is_cut())
        self._names_since = [dict(self._files)]

    def after_a_cut(self) -> Iterator[dict[str, bytes]]:
        """Everything that may be on the disk when the power comes back."""
        for names in self._names_since:
            for kept in ("nothing", "half", "all"):
                yield {name: _kept(file, kept) for name, file in names.items()}

    def _file(self, name: str) -> _File:
        if name not in self._files:
            raise FileNotFoundError(f"there is no file {name!r} on the disk")
        return self._files[name]

    def _is_cut(self) -> bool:
        return self._cut_at is not None and len(self.done) + 1 >= self._cut_at

    def _change(self, call: str, cut: bool) -> None:
        self.done.append(call)
        if cut:
            raise PowerCut(call)


def _kept(file: _File, kept: str) -> bytes:
    if kept == "all" or file.data == file.safe:
        return file.data
    if kept == "nothing":
        return file.safe
    half = len(file.data) // 2
    return file.data[:half]
