"""The registry's index: which versions exist, where each alias points and every move it made, which
experiments run.

A version exists once its row is committed. An alias has no row of its own: it points where its last
move points, so that the log and the state cannot disagree. Rows are only ever added; only
:meth:`Registry.forget` changes any.

First the verbs, each with its SQL; below them how SQLite is used: one writer and one reader, in WAL
mode.
"""

import operator
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec

from flserving import forks
from flserving.errors import (
    ConfigError,
    ConflictError,
    FlservingError,
    InvalidInputError,
    InvalidModelError,
    NotFoundError,
    OverloadedError,
    ServerClosedError,
)
from flserving.extras import of_extra
from flserving.registry.experiment import Experiment
from flserving.registry.forget import GAP, Forgotten, connected, kept_key, pseudonym, scrub, typed
from flserving.registry.manifest import MAX_VERSION, check_name

if TYPE_CHECKING:
    import pandas as pd

FILE_NAME = "registry.sqlite3"
DEFAULT_ALIAS = "default"

# one spelling of each: the server's routes know no other
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
_LOOKS = 10  # at files that others open and close, before they are taken to be a dead writer's
# free space of a full disk, where a write that failed may look like somebody else's lock
_FULL_NBYTES = 1 << 16
_LAYOUT = 3  # 2: experiments, 3: forgotten clients; an older registry gets them when it is opened
_READABLE = 2
_SCHEMA = """
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
_FORGOTTEN = """
CREATE {kind} IF NOT EXISTS forgotten (
    id INTEGER PRIMARY KEY,
    pseudonym BLOB NOT NULL,  -- a keyed hash of the client's id, which stands nowhere
    report TEXT NOT NULL,  -- a Forgotten, as JSON
    at TEXT NOT NULL
) STRICT;
"""
_CONTENT = "CAST(content AS BLOB)"  # as text, one damaged byte would fail the query for all rows


@dataclass(frozen=True, slots=True)
class Entry:
    """What the log keeps of a change: to which alias of which model, by whom, why and when (one
    time a transaction)."""

    name: str
    alias: str
    who: str
    why: str
    at: str


class _Move(NamedTuple):
    """The last move of an alias; the defaults are those of one that never moved."""

    id: int | None = None
    to_version: int | None = None
    back: int | None = None


class Index:
    """Names x integer versions x aliases, in one SQLite file. :class:`flserving.registry.Registry`
    adds the files.

    Readers in this process never wait for its writer. For threads, not for forks.

    Args:
        root: The registry's folder; the database is ``registry.sqlite3`` inside.
        busy_timeout_s: How long a writer waits for the writers before it.
        now: Gives the time of a transaction, UTC.
        read_only: Why nothing can be written to the folder; then there is a reader only.
    """

    def __init__(
        self,
        root: str,
        busy_timeout_s: float,
        now: Callable[[], datetime],
        read_only: str | None = None,
    ) -> None:
        self.root = root
        self.read_only = read_only
        self._path = f"{root}/{FILE_NAME}"
        self._timeout_s = busy_timeout_s
        self._now = now
        self._pid = os.getpid()
        self._commits = 0
        self._closed = False
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()
        forks.fresh_locks_in_child(self, "_read_lock", "_write_lock")
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        try:
            with self._typed_errors():
                if read_only is None:
                    _make_private(self._path)
                    self._writer = connected(self._connect, busy_timeout_s)
                    self._reader = connected(self._connect, busy_timeout_s)
                else:
                    self._query_unwritable("SELECT 1", ())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both connections, after the calls that are using them. Idempotent; what was read
        stays valid."""
        with self._write_lock, self._read_lock:
            self._closed = True
            for connection in (self._reader, self._writer):
                if connection is not None:
                    connection.close()
            self._reader = None
            self._writer = None

    # Versions

    def models(self) -> list[str]:
        """Names with at least one version, sorted."""
        return [
            str(name) for (name,) in self._query("SELECT DISTINCT name FROM versions ORDER BY name")
        ]

    def models_by_promotion(self) -> list[str]:
        """:meth:`models`, those with a default version first, and among them the one that had one
        first."""
        sql = (
            "SELECT name FROM moves AS m WHERE alias = ? GROUP BY name HAVING "
            "(SELECT to_version FROM moves WHERE name = m.name AND alias = ? ORDER BY id DESC LIMIT 1) IS NOT NULL "
            "ORDER BY min(id)"
        )
        promoted = [str(name) for (name,) in self._query(sql, DEFAULT_ALIAS, DEFAULT_ALIAS)]
        return list(dict.fromkeys([*promoted, *self.models()]))

    def version_numbers(self, name: str) -> list[int]:
        """Versions of ``name``, oldest first: 1, 2, ... without gaps. Empty if there is no such
        name."""
        check_name("model name", name)
        rows = self._query("SELECT version FROM versions WHERE name = ? ORDER BY version", name)
        return [version for (version,) in rows]

    def resolve(self, name: str, ref: int | str | None = None) -> int:
        """The version that ``ref`` means: a number (3 or "3", not "03"), an alias, or None for the
        alias "default".

        Raises:
            NotFoundError: There is none.
            InvalidInputError: ``ref`` is neither a number, a string nor None.
        """
        check_name("model name", name)
        if ref is None:
            ref = DEFAULT_ALIAS
        sql = "SELECT version FROM versions WHERE name = ? AND version = ?"
        wanted = ref
        if not isinstance(ref, str):
            wanted = checked_version(name, ref)
        elif _NUMBER.fullmatch(ref):
            wanted = checked_version(name, int(ref))
        else:
            sql = (
                "SELECT to_version FROM moves WHERE name = ? AND alias = ? ORDER BY id DESC LIMIT 1"
            )
        for (version,) in self._query(sql, name, wanted):
            if version is not None:
                return int(version)
        raise self._missing(name, str(ref))

    def _manifest_sha256(self, name: str, version: int) -> str:
        check_name("model name", name)
        sql = "SELECT manifest_sha256 FROM versions WHERE name = ? AND version = ?"
        for (digest,) in self._query(sql, name, version):
            return str(digest)
        raise self._missing(name, str(version))

    def _next_version(self, name: str) -> int:
        """The number that a transaction may give to a new version of ``name``."""
        ((latest,),) = self._fetch(
            "SELECT coalesce(max(version), 0) FROM versions WHERE name = ?", name
        )
        return int(latest) + 1

    def _add_version(self, name: str, version: int, manifest_sha256: str) -> None:
        sql = "INSERT INTO versions (name, version, manifest_sha256) VALUES (?, ?, ?)"
        self._fetch(sql, name, version, manifest_sha256)

    def _missing(self, name: str, ref: str) -> NotFoundError:
        numbers = self.version_numbers(name)
        if not numbers:
            return NotFoundError(
                f"no model {name!r}; known: {_some(self.models()) or 'none yet, publish one'}"
            )
        known = f"versions 1 to {numbers[-1]}, aliases {_some(self.aliases(name)) or 'none'}"
        return NotFoundError(f"{name!r} has no version or alias {ref[:80]!r}: it has {known}")

    # Aliases

    def aliases(self, name: str) -> dict[str, int]:
        """Every alias of ``name`` and the version that it points at, sorted. Empty if there is
        none."""
        check_name("model name", name)
        last = "SELECT max(id) FROM moves WHERE name = ? GROUP BY alias"
        rows = self._query(
            f"SELECT alias, to_version FROM moves WHERE id IN ({last}) ORDER BY alias", name
        )
        return {alias: version for alias, version in rows if version is not None}

    def rolled_back(self, name: str, alias: str = DEFAULT_ALIAS) -> list[int]:
        """The versions from which :meth:`rollback` ever took an alias back."""
        sql = "SELECT DISTINCT from_version FROM moves WHERE name = ? AND alias = ? AND action = 'rollback'"
        return [int(version) for (version,) in self._query(sql, name, alias) if version is not None]

    def set_alias(
        self, name: str, alias: str, version: int, *, who: str, why: str, if_at: int | None = None
    ) -> int | None:
        """Point an alias at an existing version, atomically; returns where it pointed before (None:
        nowhere).

        A move to where it points already changes nothing and is not logged. NotFoundError: no such
        version. ConflictError: it is in an experiment, or no longer points at version ``if_at`` (0:
        nowhere).

        Example: ``registry.set_alias("digits", "default", 3, who="ada", why="fairer")`` gives 2,
        where it pointed.
        """
        # versions are never removed: no race
        wanted = self.resolve(name, checked_version(name, version))
        with self._change(name, alias, who, why) as entry:
            now = self._last_move(entry).to_version or 0
            if if_at not in (None, now):
                raise ConflictError(
                    f"alias {alias!r} of {name!r} points at {now or 'nothing'}, not at {if_at}: look again"
                )
            return self._point(entry, wanted)

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS, *, who: str, why: str) -> int:
        """Undo the alias's last move; returns the version that it points at again.

        It works like undo in an editor. Twice goes back two moves, not forth again; a new
        ``set_alias`` continues from where the rollbacks led. A removed alias comes back; one that
        was set again after its removal goes back no further than that. The log keeps every move,
        rollbacks included. NotFoundError: nothing (left) to undo.
        """
        with self._change(name, alias, who, why) as entry:
            last = self._last_move(entry)
            if last.id is None:
                raise NotFoundError(f"{name!r} has no alias {alias!r}: set_alias makes one")
            if last.back is None:
                raise NotFoundError(
                    f"alias {alias!r} of {name!r} points at version {last.to_version} and has no earlier one to go "
                    "back to: move it with set_alias"
                )
            ((version, back),) = self._fetch(
                "SELECT to_version, back FROM moves WHERE id = ?", last.back
            )
            self._log_move(entry, "rollback", old=last.to_version, new=version, back=back)
            return int(version)

    def remove_alias(self, name: str, alias: str, *, who: str, why: str) -> int:
        """Make an alias point nowhere; returns where it pointed. NotFoundError: no such alias."""
        with self._change(name, alias, who, why) as entry:
            last = self._last_move(entry)
            if last.to_version is None:
                raise NotFoundError(f"{name!r} has no alias {alias!r}: there is nothing to remove")
            self._log_move(entry, "remove", old=last.to_version, new=None, back=last.id)
            return last.to_version

    def _point(self, entry: Entry, version: int) -> int | None:
        """Point an alias at an existing version, unless it does already; returns where it
        pointed."""
        last = self._last_move(entry)
        if last.to_version is None:  # a removed alias starts afresh
            last = _Move()
        if last.to_version != version:
            self._log_move(entry, "set", old=last.to_version, new=version, back=last.id)
        return last.to_version

    def _last_move(self, entry: Entry) -> _Move:
        sql = "SELECT id, to_version, back FROM moves WHERE name = ? AND alias = ? ORDER BY id DESC LIMIT 1"
        for row in self._fetch(sql, entry.name, entry.alias):
            return _Move(*row)
        return _Move()

    def _log_move(
        self, entry: Entry, action: str, *, old: int | None, new: int | None, back: int | None
    ) -> None:
        if self._running(entry) is not None:
            raise ConflictError(
                f"alias {entry.alias!r} of {entry.name!r} is in an experiment: conclude_experiment ends it"
            )
        self._fetch(
            "INSERT INTO moves (name, alias, action, from_version, to_version, back, who, why, at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(entry.name, entry.alias, action, old, new, back, entry.who, entry.why, entry.at),
        )

    # Experiments

    def experiments(self, name: str) -> dict[str, Experiment]:
        """The running experiments of ``name``, by the alias that each is on; those that can be read
        here."""
        return {
            alias: it for alias, it in self._experiments(name).items() if isinstance(it, Experiment)
        }

    def unread_experiments(self, name: str) -> dict[str, str]:
        """Aliases of ``name`` whose experiment cannot be read here, and why: a newer flserving
        started it, or it is damaged. The alias's own version answers there;
        :meth:`conclude_experiment` ends it."""
        return {alias: it for alias, it in self._experiments(name).items() if isinstance(it, str)}

    def _experiments(self, name: str) -> dict[str, Experiment | str]:
        check_name("model name", name)
        last = "SELECT max(id) FROM experiments WHERE name = ? GROUP BY alias"
        rows = self._query(
            f"SELECT alias, {_CONTENT} FROM experiments WHERE id IN ({last}) ORDER BY alias", name
        )
        return {alias: _read(content) for alias, content in rows if content is not None}

    def start_experiment(
        self, name: str, experiment: Experiment, alias: str = DEFAULT_ALIAS, *, who: str, why: str
    ) -> Experiment:
        """Let the versions of ``experiment`` share the requests of an alias; every server follows
        within a second.

        Started again under the same id, it goes on with other weights, another policy or shadow:
        its evidence stays. While it runs the alias cannot be moved. Returns it with its ``run`` and
        ``key``.

        Raises:
            ConfigError: Weights that do not sum to one, an empty arm, a policy that does not fit.
            NotFoundError: No such version or alias.
            ConflictError: The alias is in another experiment, or in one that cannot be read, or
                this one runs with other arms. Nothing has changed then.
        """
        experiment.check()
        for version in experiment.versions:
            self.resolve(name, checked_version(name, version))
        with self._change(name, alias, who, why) as entry:
            target = self._last_move(entry).to_version
            if target is None:
                raise NotFoundError(f"{name!r} has no alias {alias!r}: set_alias makes one")
            if experiment.policy is not None and all(
                arm.version != target for arm in experiment.arms.values()
            ):
                raise ConfigError(
                    f"no arm of {experiment.id!r} has version {target}, where {alias!r} points: name it"
                )
            running = self._running(entry)
            run = secrets.token_hex(8)
            key = secrets.token_hex(16)
            if running is not None:
                run, key = _continued(running, experiment, entry)
            experiment = msgspec.structs.replace(experiment, run=run, key=key)
            content = msgspec.json.encode(experiment)
            if content != running:
                self._log_experiment(entry, content.decode())
        return experiment

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
        """End the experiment on an alias and, in the same transaction, point the alias at
        ``version`` (None: it stays).

        Returns what ended; None where that cannot be read here.

        Raises:
            NotFoundError: No experiment there, or no such version.
            ConflictError: It is another ``run`` than the one meant, or it cannot be told. Nothing
                has changed then.
        """
        wanted = None
        if version is not None:
            wanted = self.resolve(name, checked_version(name, version))
        with self._change(name, alias, who, why) as entry:
            running = self._running(entry)
            if running is None:
                raise NotFoundError(
                    f"alias {alias!r} of {name!r} is in no experiment: there is nothing to conclude"
                )
            ended = _read(running)
            if run is not None and run != getattr(ended, "run", None):
                what = getattr(ended, "id", ended)
                raise ConflictError(
                    f"another experiment has begun on alias {alias!r} of {name!r}: {what!r}"
                )
            self._log_experiment(entry, None)
            if wanted is not None:
                self._point(entry, wanted)
        if isinstance(ended, str):
            return None
        return ended

    def experiment_age_s(self, name: str, alias: str = DEFAULT_ALIAS) -> float:
        """Seconds since the running experiment on an alias was first started, by the registry's
        clock; 0 if none is."""
        ends = "SELECT max(id) FROM experiments WHERE name = ? AND alias = ? AND content IS NULL"
        sql = f"SELECT at FROM experiments WHERE name = ? AND alias = ? AND id > coalesce(({ends}), 0) ORDER BY id"
        for (at,) in self._query(f"{sql} LIMIT 1", name, alias, name, alias):
            return (self._now().astimezone(UTC) - datetime.fromisoformat(at)).total_seconds()
        return 0.0

    def _running(self, entry: Entry) -> bytes | None:
        """The experiment that the alias is in, as JSON."""
        sql = f"SELECT {_CONTENT} FROM experiments WHERE name = ? AND alias = ? ORDER BY id DESC LIMIT 1"
        for (content,) in self._fetch(sql, entry.name, entry.alias):
            return content  # type: ignore[no-any-return]
        return None

    def _log_experiment(self, entry: Entry, content: str | None) -> None:
        """Let an experiment begin, go on changed, or end (None)."""
        sql = (
            "INSERT INTO experiments (name, alias, content, who, why, at) VALUES (?, ?, ?, ?, ?, ?)"
        )
        self._fetch(sql, entry.name, entry.alias, content, entry.who, entry.why, entry.at)

    # The log

    @property
    def local_changes(self) -> int:
        """How many changes were committed through this very object. Free: look here before
        :meth:`change_token`."""
        return self._commits

    def change_token(self) -> int:
        """A number that grows whenever any process publishes, moves an alias, starts, changes or
        ends an experiment, or forgets a client. Cost: about 10 us, so poll it."""
        tables = ("versions", "moves", "experiments", "forgotten")
        ids = (f"(SELECT coalesce(max(id), 0) FROM {table})" for table in tables)
        return int(self._query(f"SELECT {' + '.join(ids)}")[0][0])

    def history(self, name: str, alias: str | None = None) -> "pd.DataFrame":
        """Every move, oldest first: when, alias, action, from, to, who, why. NotFoundError: no such
        name."""
        with of_extra("course"):
            from flserving.registry import tables

        if alias is not None:
            check_name("alias", alias)
        if not self.version_numbers(name):
            raise self._missing(name, "any")
        sql = (
            "SELECT at, alias, action, from_version, to_version, who, why FROM moves WHERE name = ?"
        )
        return tables.history(
            self._query(f"{sql} AND (? IS NULL OR alias = ?) ORDER BY id", name, alias, alias)
        )

    def experiment_log(self, name: str) -> list[dict[str, Any]]:
        """Every start, change and end, oldest first: at, alias, experiment (None: it ended; where
        it cannot be read, why), who, why."""
        check_name("model name", name)
        rows = self._query(
            f"SELECT at, alias, {_CONTENT}, who, why FROM experiments WHERE name = ? ORDER BY id",
            name,
        )
        return [
            {
                "at": at,
                "alias": alias,
                "experiment": content and _read(content),
                "who": who,
                "why": why,
            }
            for at, alias, content, who, why in rows
        ]

    # Forgotten clients

    def forgets(self) -> int:
        """How many times a client was forgotten."""
        return int(self._query("SELECT coalesce(max(id), 0) FROM forgotten")[0][0])

    def forget_log(self) -> list[dict[str, Any]]:
        """Every forgetting, oldest first: at, pseudonym (hex; nobody can tell whose without the
        key), report (see :class:`Forgotten`)."""
        rows = self._query("SELECT at, pseudonym, report FROM forgotten ORDER BY id")
        return [
            {"at": at, "pseudonym": who.hex(), "report": msgspec.json.decode(said)}
            for at, who, said in rows
        ]

    def forgotten(self, client: str) -> tuple[int, float, Forgotten | None]:
        """The client's last forgetting: its number, its time (Unix seconds), its report; (0, 0,
        None) without one."""
        if self.forgets():  # else there may be no key yet, and a read-only folder would not get one
            sql = (
                "SELECT id, at, report FROM forgotten WHERE pseudonym = ? ORDER BY id DESC LIMIT 1"
            )
            for number, at, report in self._query(sql, self._pseudonym(client)):
                return (
                    number,
                    datetime.fromisoformat(at).timestamp(),
                    msgspec.json.decode(report, type=Forgotten),
                )
        return 0, 0.0, None

    def _pseudonym(self, client: str) -> bytes:
        return pseudonym(kept_key(self.root), client, b"fls-forgotten")

    def _log_forgotten(self, client: str, report: Forgotten, at: str) -> None:
        sql = "INSERT INTO forgotten (pseudonym, report, at) VALUES (?, ?, ?)"
        self._fetch(sql, self._pseudonym(client), msgspec.json.encode(report).decode(), at)

    def _change_version(self, name: str, version: int, manifest_sha256: str) -> None:
        sql = "UPDATE versions SET manifest_sha256 = ? WHERE name = ? AND version = ?"
        self._fetch(sql, manifest_sha256, name, version)

    def _without_names(self, names: re.Pattern[str]) -> tuple[int, list[str]]:
        """Take names out of what the logs say; how many entries named one, and where one must
        stay."""
        changed = 0
        left = set[str]()
        for table, *fixed in (("moves", "alias"), ("experiments", "alias", "content")):
            for row in self._fetch(f"SELECT id, who, why, {', '.join(fixed)} FROM {table}"):
                said = row[1:3]
                rest = tuple(names.sub(GAP, text) for text in said)
                if rest != said:
                    changed += 1
                    self._fetch(f"UPDATE {table} SET who = ?, why = ? WHERE id = ?", *rest, row[0])
                left.update(
                    f"{table}: {text[:80]}" for text in row[3:] if text and names.search(text)
                )
        return changed, sorted(left)

    def _scrub(self) -> None:
        """See :func:`scrub`. OverloadedError, FlservingError: It cannot be done now."""
        with self._write_lock, self._typed_errors():
            scrub(self._writable())

    # --- Details: how SQLite is used ---

    def _query(self, sql: str, *values: str | int | bytes | None) -> list[Any]:
        """Rows of one SELECT, in a snapshot of its own. Cost: about 5 us; 150 us where the folder
        is unwritable."""
        with self._read_lock, self._typed_errors():
            if self.read_only is not None and not self._closed:
                return self._query_unwritable(sql, values)
            return self._usable(self._reader).execute(sql, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[str]:
        """The one writer of all processes, until the block ends: committed and on disk, or as if it
        never was.

        Gives the time of all that happens inside, ISO 8601, taken under the lock. Text order is
        time order.

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
                    yield self._now().astimezone(UTC).isoformat(timespec="microseconds")
                    connection.execute("COMMIT")
                    self._commits += 1
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
        finally:
            self._write_lock.release()

    def _fetch(self, sql: str, *values: str | int | bytes | None) -> list[Any]:
        """Run a statement inside the transaction."""
        return self._writable().execute(sql, values).fetchall()

    @contextmanager
    def _change(self, name: str, alias: str, who: str, why: str) -> Iterator[Entry]:
        check_name("model name", name)
        check_move(alias, who, why)
        with self._transaction() as at:
            yield Entry(name, alias, who, why, at)

    def _writable(self) -> sqlite3.Connection:
        if self.read_only is not None and not self._closed:
            raise FlservingError(
                f"the registry is read-only ({self.read_only}): change it where its folder can be written"
            )
        return self._usable(self._writer)

    def _usable(self, connection: sqlite3.Connection | None) -> sqlite3.Connection:
        if connection is None:
            raise ServerClosedError(
                "the registry is closed: open another Registry on the same folder"
            )
        if os.getpid() != self._pid:  # a connection that a child uses, too, may damage the file
            raise ServerClosedError(
                "the registry was opened before a fork: open another Registry in the new process"
            )
        return connection

    def _open(self, uri: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            uri, timeout=self._timeout_s, isolation_level=None, check_same_thread=False, uri=True
        )
        connection.execute("PRAGMA trusted_schema = OFF").fetchall()
        return connection

    def _connect(self) -> sqlite3.Connection:
        connection = self._open(Path(self._path).as_uri())
        try:
            for setting in ("foreign_keys = ON", "synchronous = FULL", "journal_mode = WAL"):
                connection.execute(f"PRAGMA {setting}").fetchall()
            # two processes may both come here: the second finds everything in place
            if _layout(connection) < _LAYOUT:
                tables = _SCHEMA + _FORGOTTEN.format(kind="TABLE")
                connection.executescript(
                    f"BEGIN IMMEDIATE; {tables} PRAGMA user_version = {_LAYOUT}; COMMIT;"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def _files(self) -> tuple[str, object]:
        """How SQLite opens the files of an unwritable folder, and what they are: they must be the
        same afterwards.

        While somebody who can write has the database open, its log and its shared memory lie beside
        it, and SQLite reads all three. Without them it wants to make them, unless ``immutable``
        says that nothing ever changes.
        """
        for _ in range(_LOOKS):
            with _opening():
                log = self._log_nbytes()
                shared = os.path.exists(f"{self._path}-shm")
                status = os.stat(self._path)
            if not log:
                return "mode=ro&immutable=1", (status.st_ino, status.st_mtime_ns, status.st_size)
            if shared:
                return "mode=ro", status.st_ino
            # a writer that closes takes both away, and the next one makes both: look again
            time.sleep(0.02)
        raise FlservingError(
            f"{FILE_NAME} was not closed by who wrote it: open it once where it can be written"
        )

    def _log_nbytes(self) -> int:
        """Size of SQLite's log; 0 where there is none."""
        with suppress(FileNotFoundError):
            return os.stat(f"{self._path}-wal").st_size
        return 0

    def _query_unwritable(
        self, sql: str, values: tuple[str | int | bytes | None, ...]
    ) -> list[Any]:
        """The rows, read while the files stayed what they were."""
        until_s = time.monotonic() + self._timeout_s
        while True:
            files = self._files()
            rows = None
            failure: Exception = _busy()
            try:
                with closing(self._open(f"{Path(self._path).as_uri()}?{files[0]}")) as connection:
                    layout = _layout(connection)
                    if layout < _READABLE:
                        raise ConfigError(
                            f"{FILE_NAME} has the old layout {layout}: open it once where it can be written"
                        )
                    if layout < _LAYOUT:  # nobody was forgotten
                        connection.executescript(_FORGOTTEN.format(kind="TEMP TABLE"))
                    rows = connection.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                failure = error
            same = self._files() == files
            if same and rows is not None:
                return rows
            if (same and rows is None) or time.monotonic() > until_s:
                raise failure

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            found = typed(error, FILE_NAME, "restore it from a backup")
            if isinstance(found, OverloadedError):
                found = _busy()
                if shutil.disk_usage(self.root).free < _FULL_NBYTES:
                    found = FlservingError(
                        f"{FILE_NAME} cannot be written (the disk is full): free space"
                    )
            raise found from error


def _read(content: bytes) -> Experiment | str:
    """An experiment, or why it cannot be run here."""
    try:
        experiment = msgspec.json.decode(content, type=Experiment)
        experiment.check()
        if experiment.arms:
            experiment.arm_of("")  # its key is one
    except (
        msgspec.MsgspecError,
        FlservingError,
        UnicodeDecodeError,
        ValueError,
        RecursionError,
    ) as error:
        return f"which cannot be read here ({error})"
    return experiment


def _continued(running: bytes, experiment: Experiment, entry: Entry) -> tuple[str, str]:
    """Run and key of the experiment that ``experiment`` continues on the alias. ConflictError: it
    is another one."""
    old = _read(running)
    where = f"alias {entry.alias!r} of {entry.name!r}"
    if isinstance(old, str):
        raise ConflictError(f"{where} is in an experiment, {old}: conclude that first")
    if old.id != experiment.id:
        raise ConflictError(f"{where} is in experiment {old.id!r}: conclude that first")
    if _shape(old) != _shape(experiment):
        raise ConflictError(
            f"experiment {old.id!r} runs with other arms: conclude it, or take another id"
        )
    return old.run, old.key


def _shape(experiment: Experiment) -> object:
    """What evidence depends on: it must not change while an experiment runs."""
    return experiment.rule, [(name, arm.version) for name, arm in experiment.arms.items()]


def _some(names: Iterable[str]) -> str:
    """The first ten names, so that a message stays one."""
    listed = list(map(str, names))
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")


def check_move(alias: str, who: str, why: str) -> None:
    """Raise InvalidModelError unless ``alias`` may be one, and the log gets to know who moved it
    and why."""
    if check_name("alias", alias).isdigit():
        raise InvalidModelError(f"alias {alias!r} looks like a version number: put a letter in it")
    for field, value, most in (("who", who, 200), ("why", why, 2000)):
        if (
            not isinstance(value, str)
            or not 0 < len(value.strip()) <= most
            or not value.isprintable()
        ):
            raise InvalidModelError(
                f"{field} is {str(value)[:80]!r}: the log needs a line of 1 to {most} characters"
            )


def checked_version(name: str, version: object) -> int:
    """``version`` as an int that may exist. InvalidInputError: not an integer. NotFoundError: out
    of range."""
    try:
        number = operator.index(version)  # type: ignore[arg-type]  # NumPy's integers too: they come out of DataFrames
    except TypeError:
        number = None
    if number is None or isinstance(version, bool):
        raise InvalidInputError(
            f"version {version!r} of {name!r}: give an integer (resolve takes aliases too)"
        )
    if not 0 < number <= MAX_VERSION:
        raise NotFoundError(f"{name!r} has no version {str(number)[:80]}: versions start at 1")
    return number


def _busy() -> OverloadedError:
    return OverloadedError(
        "other processes keep writing to the registry: try again, or raise busy_timeout_s"
    )


def _layout(connection: sqlite3.Connection) -> int:
    """Raises ConfigError for one of a later flserving."""
    ((layout,),) = connection.execute("PRAGMA user_version").fetchall()
    if layout > _LAYOUT:
        raise ConfigError(
            f"{FILE_NAME} has layout {layout}, this flserving reads {_LAYOUT}: install the version that made it"
        )
    return int(layout)


def _make_private(path: str) -> None:
    """Make a file that only its owner reads, whatever the umask; SQLite gives those beside it the
    same mode.

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
