"""The registry's index: which versions exist, where each alias points, and every move it ever made. SQLite, WAL.

A version exists once its row is committed. An alias has no row of its own: it points where its last move points, so
that the log and the state cannot disagree. Triggers refuse to change or delete what is in the tables. Imports
``errors`` only.
"""

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from flserving import forks
from flserving.errors import (
    ConfigError,
    ConflictError,
    CorruptArtifactError,
    FlservingError,
    NotFoundError,
    OverloadedError,
    ServerClosedError,
)

FILE_NAME, LOCK_NAME = "registry.sqlite3", "publishing.sqlite3"
_FULL_NBYTES = 1 << 16  # free space of a full disk, where a write that failed may look like somebody else's lock
_LAYOUT = 2  # 2: experiments; a registry of layout 1 gets them when it is opened

_TABLES = """
CREATE TABLE IF NOT EXISTS versions (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    version INTEGER NOT NULL CHECK (version > 0),
    manifest_sha256 TEXT NOT NULL,
    UNIQUE (name, version)
) STRICT;
CREATE TABLE IF NOT EXISTS moves (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    alias TEXT NOT NULL,
    action TEXT NOT NULL CHECK (action IN ('set', 'rollback', 'remove')),
    from_version INTEGER,
    to_version INTEGER CHECK ((to_version IS NULL) = (action = 'remove')),
    back INTEGER REFERENCES moves (id),  -- the move whose outcome a rollback brings back
    who TEXT NOT NULL,
    why TEXT NOT NULL,
    at TEXT NOT NULL,
    FOREIGN KEY (name, to_version) REFERENCES versions (name, version)
) STRICT;
CREATE INDEX IF NOT EXISTS moves_of_alias ON moves (name, alias, id);
CREATE TABLE IF NOT EXISTS experiments (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    alias TEXT NOT NULL,
    content TEXT,  -- the experiment from now on, as JSON; NULL: it is over
    who TEXT NOT NULL,
    why TEXT NOT NULL,
    at TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS experiments_of_alias ON experiments (name, alias, id);
"""
_APPEND_ONLY = """
CREATE TRIGGER IF NOT EXISTS {0}_no_update BEFORE UPDATE ON {0}
BEGIN SELECT RAISE(ABORT, '{0} is append-only'); END;
CREATE TRIGGER IF NOT EXISTS {0}_no_delete BEFORE DELETE ON {0}
BEGIN SELECT RAISE(ABORT, '{0} is append-only'); END;
-- INSERT OR REPLACE deletes the old row without asking the trigger above
CREATE TRIGGER IF NOT EXISTS {0}_no_replace BEFORE INSERT ON {0}
WHEN EXISTS (SELECT 1 FROM {0} WHERE {1})
BEGIN SELECT RAISE(ABORT, '{0} is append-only'); END;
"""
_SCHEMA = (
    _TABLES
    + _APPEND_ONLY.format("versions", "id = NEW.id OR (name = NEW.name AND version = NEW.version)")
    + _APPEND_ONLY.format("moves", "id = NEW.id")
    + _APPEND_ONLY.format("experiments", "id = NEW.id")
)


CONTENT = "CAST(content AS BLOB)"  # as text, one damaged byte would fail the query for all rows


class Transaction:
    """What may be written, all or nothing. Made by :meth:`Index.transaction`, valid inside its ``with`` block."""

    def __init__(self, connection: sqlite3.Connection, at: str) -> None:
        self._connection, self.at = connection, at  # one time for all that happens inside, taken under the lock

    def latest_version(self, name: str) -> int:
        """The highest version of ``name``; 0 if it has none."""
        rows = self._fetch("SELECT coalesce(max(version), 0) FROM versions WHERE name = ?", name)
        return int(rows[0][0])

    def add_version(self, name: str, version: int, manifest_sha256: str) -> None:
        """Make a version exist."""
        sql = "INSERT INTO versions (name, version, manifest_sha256) VALUES (?, ?, ?)"
        self._fetch(sql, name, version, manifest_sha256)

    def set_alias(self, name: str, alias: str, version: int, who: str, why: str) -> int | None:
        """Point an alias at an existing version, unless it does already; returns where it pointed."""
        last = self._last_move(name, alias)
        before = last[1] if last else None
        if before != version:
            back = last[0] if last and before is not None else None  # a removed alias starts afresh
            self._log(name, alias, "set", before, version, back, who, why)
        return before

    def roll_back(self, name: str, alias: str, who: str, why: str) -> int:
        """Undo the alias's last move that is not undone yet; returns the version that it points at again."""
        last = self._last_move(name, alias)
        if last is None:
            raise NotFoundError(f"{name!r} has no alias {alias!r}: set_alias makes one")
        if last[2] is None:
            raise NotFoundError(
                f"alias {alias!r} of {name!r} points at version {last[1]} and has no earlier one to go back to: "
                "move it with set_alias"
            )
        ((version, back),) = self._fetch("SELECT to_version, back FROM moves WHERE id = ?", last[2])
        self._log(name, alias, "rollback", last[1], version, back, who, why)
        return int(version)

    def remove_alias(self, name: str, alias: str, who: str, why: str) -> int:
        """Make an alias point nowhere; returns where it pointed."""
        last = self._last_move(name, alias)
        if last is None or last[1] is None:
            raise NotFoundError(f"{name!r} has no alias {alias!r}: there is nothing to remove")
        self._log(name, alias, "remove", last[1], None, last[0], who, why)
        return last[1]

    def target(self, name: str, alias: str) -> int | None:
        """Where an alias points."""
        last = self._last_move(name, alias)
        return last[1] if last else None

    def experiment(self, name: str, alias: str) -> bytes | None:
        """The experiment that the alias is in, as JSON."""
        sql = f"SELECT {CONTENT} FROM experiments WHERE name = ? AND alias = ? ORDER BY id DESC LIMIT 1"
        rows = self._fetch(sql, name, alias)
        return rows[0][0] if rows else None

    def set_experiment(self, name: str, alias: str, content: str | None, who: str, why: str) -> None:
        """Let an experiment begin, go on changed, or end (None)."""
        sql = "INSERT INTO experiments (name, alias, content, who, why, at) VALUES (?, ?, ?, ?, ?, ?)"
        self._fetch(sql, name, alias, content, who, why, self.at)

    def _last_move(self, name: str, alias: str) -> tuple[int, int | None, int | None] | None:
        rows = self._fetch(
            "SELECT id, to_version, back FROM moves WHERE name = ? AND alias = ? ORDER BY id DESC LIMIT 1", name, alias
        )
        return rows[0] if rows else None

    def _log(
        self, name: str, alias: str, action: str, old: int | None, new: int | None, back: int | None, who: str, why: str
    ) -> None:
        if self.experiment(name, alias) is not None:
            raise ConflictError(f"alias {alias!r} of {name!r} is in an experiment: conclude_experiment ends it")
        self._fetch(
            "INSERT INTO moves (name, alias, action, from_version, to_version, back, who, why, at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(name, alias, action, old, new, back, who, why, self.at),
        )

    def _fetch(self, sql: str, *values: str | int | None) -> list[Any]:
        return self._connection.execute(sql, values).fetchall()


class Index:
    """Two kept connections, so that a reader in this process never waits for a writer. For threads, not for forks.

    Args:
        root: The registry's folder; the database is ``registry.sqlite3`` inside.
        busy_timeout_s: How long a writer waits for the writers before it.
        timestamp: Gives the time of a transaction, UTC, ISO 8601.
        unwritable: Why nothing can be written to the folder; then there is a reader only.
    """

    def __init__(
        self, root: str, busy_timeout_s: float, timestamp: Callable[[], str], unwritable: str | None = None
    ) -> None:
        self._root = root
        self._path = f"{root}/{FILE_NAME}"
        self._timeout_s = busy_timeout_s
        self.timestamp = timestamp
        self.unwritable = unwritable
        self._pid, self.commits = os.getpid(), 0
        self._read_lock, self._write_lock = threading.Lock(), threading.Lock()
        forks.fresh_locks_in_child(self, "_read_lock", "_write_lock")
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._seen: object = None  # the files as they were when the reader of an unwritable folder opened them
        if os.path.islink(self._path):
            raise CorruptArtifactError(f"{FILE_NAME} is a symbolic link: put the registry's own file there")
        try:
            with self._typed_errors():
                if unwritable is None:
                    _make_private(self._path)
                    self._writer = self._connect_in_time()
                    self._reader = self._connect_in_time()
                else:
                    self._follow_files()
        except BaseException:
            self.close()
            raise

    def _connect_in_time(self) -> sqlite3.Connection:
        """The change to WAL answers "busy" at once, whatever the timeout, where several processes open a new file."""
        until_s = time.monotonic() + self._timeout_s
        while True:
            try:
                return self._connect()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until_s:
                    raise
            time.sleep(0.01)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=self._timeout_s, isolation_level=None, check_same_thread=False)
        try:
            for setting in ("foreign_keys = ON", "trusted_schema = OFF", "synchronous = FULL", "journal_mode = WAL"):
                connection.execute(f"PRAGMA {setting}").fetchall()
            if _layout(connection) < _LAYOUT:  # two processes may both come here: the second finds everything in place
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_LAYOUT}; COMMIT;")
        except BaseException:
            connection.close()
            raise
        return connection

    def _follow_files(self) -> object:
        """Open the reader of an unwritable folder anew if its files have changed; returns what they are.

        While somebody who can write has the database open, its log and its shared memory lie beside it, and SQLite
        reads all three. Without them it wants to make them, unless it is told that nothing will ever change: so it is
        told that, and whether it holds is looked after here.
        """
        with _opening():
            log = os.path.exists(f"{self._path}-wal") and os.path.getsize(f"{self._path}-wal") > 0
            shared = os.path.exists(f"{self._path}-shm")
            status = os.stat(self._path)
        seen: object = (status.st_ino, status.st_mtime_ns, status.st_size)
        if log and shared:
            seen = (status.st_ino, "with its log")
        elif log:
            raise FlservingError(f"{FILE_NAME} was not closed by who wrote it: open it once where it can be written")
        if self._reader is None or seen != self._seen:
            uri = Path(self._path).as_uri() + "?mode=ro" + ("" if log else "&immutable=1")
            connection = sqlite3.connect(
                uri, timeout=self._timeout_s, isolation_level=None, check_same_thread=False, uri=True
            )
            try:
                connection.execute("PRAGMA trusted_schema = OFF").fetchall()
                if (layout := _layout(connection)) < _LAYOUT:
                    raise ConfigError(f"{FILE_NAME} has the old layout {layout}: open it once where it can be written")
            except BaseException:
                connection.close()
                raise
            if self._reader is not None:
                self._reader.close()
            self._reader = connection
            self._seen = seen
        return seen

    def query(self, sql: str, *values: str | int | None) -> list[Any]:
        """Rows of one SELECT, in a snapshot of its own. Cost: about 5 us; 20 us where the folder is unwritable."""
        with self._read_lock, self._typed_errors():
            reader = self._usable(self._reader)
            if self.unwritable is None:
                return reader.execute(sql, values).fetchall()
            return self._query_unwritable(sql, values)

    def _query_unwritable(self, sql: str, values: tuple[str | int | None, ...]) -> list[Any]:
        """The rows, read while the files stayed what they were."""
        until_s = time.monotonic() + self._timeout_s
        while True:
            before = self._follow_files()
            assert self._reader is not None
            rows, failure = None, None
            try:
                rows = self._reader.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                failure = error
            same = self._follow_files() == before
            if same and rows is not None:
                return rows
            if failure is not None and (same or time.monotonic() > until_s):
                raise failure
            if time.monotonic() > until_s:
                raise _busy()

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """The one writer of all processes, until the block ends: committed and on disk, or as if it never was.

        Raises:
            OverloadedError: Other writers kept the lock for ``busy_timeout_s``.
        """
        if not self._write_lock.acquire(timeout=self._timeout_s):
            raise _busy()
        try:
            connection = self._writable()
            with self._typed_errors():
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield Transaction(connection, self.timestamp())
                    connection.execute("COMMIT")
                    self.commits += 1
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
        finally:
            self._write_lock.release()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """One publisher of all processes at a time; one that dies lets go. Raises as :meth:`transaction`, for whose
        writers nobody waits here: the lock is that of a second, empty database."""
        self._writable()
        with self._typed_errors():
            _make_private(f"{self._root}/{LOCK_NAME}")
            connection = sqlite3.connect(f"{self._root}/{LOCK_NAME}", timeout=self._timeout_s, isolation_level=None)
        with closing(connection):
            with self._typed_errors():
                connection.execute("BEGIN EXCLUSIVE")
            yield

    def _writable(self) -> sqlite3.Connection:
        if self.unwritable is not None and self._reader is not None:
            raise FlservingError(
                f"the registry is read-only ({self.unwritable}): change it where its folder can be written"
            )
        return self._usable(self._writer)

    def _usable(self, connection: sqlite3.Connection | None) -> sqlite3.Connection:
        if connection is None:
            raise ServerClosedError("the registry is closed: open another Registry on the same folder")
        if os.getpid() != self._pid:  # SQLite's locks do not survive a fork
            raise ServerClosedError("the registry was opened before a fork: open another Registry in the new process")
        return connection

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:  # damage may reach the text of SQLite's own messages
            raise CorruptArtifactError(f"{FILE_NAME} is damaged: restore it from a backup") from error
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", None)
            primary = code & 0xFF if code is not None else None
            if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                if shutil.disk_usage(self._root).free < _FULL_NBYTES:
                    raise FlservingError(f"{FILE_NAME} cannot be written (the disk is full): free space") from error
                raise _busy() from error
            if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or primary == sqlite3.SQLITE_ERROR:
                raise CorruptArtifactError(f"{FILE_NAME} is damaged ({error}): restore it from a backup") from error
            advice = "check free space and permissions"
            if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
                advice = "check permissions"
            if primary == sqlite3.SQLITE_FULL:
                advice = "free space"
            raise FlservingError(f"{FILE_NAME} cannot be used ({error}): {advice}") from error

    def close(self) -> None:
        """Close both connections, after the calls that are using them. Idempotent."""
        with self._write_lock, self._read_lock:
            for connection in (self._reader, self._writer):
                if connection is not None:
                    connection.close()
            self._reader = self._writer = None


def _busy() -> OverloadedError:
    return OverloadedError("other processes keep writing to the registry: try again, or raise busy_timeout_s")


def _layout(connection: sqlite3.Connection) -> int:
    """Raises ConfigError for one of a later flserving."""
    ((layout,),) = connection.execute("PRAGMA user_version").fetchall()
    if layout > _LAYOUT:
        raise ConfigError(
            f"{FILE_NAME} has layout {layout}, this flserving reads {_LAYOUT}: install the version that made it"
        )
    return int(layout)


def _make_private(path: str) -> None:
    """Make a file that only its owner reads, whatever the umask; SQLite gives those beside it the same mode.

    One that is there keeps its mode: its operator may share it with a group.
    """
    with _opening():
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


@contextmanager
def _opening() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FlservingError(
            f"{FILE_NAME} cannot be opened ({error.strerror}): check free space and permissions"
        ) from error
