"""Rewards for answers: who may give one, that it is given once, and what each arm has got. SQLite,
beside the registry.

An answer of an experiment carries a *receipt*: the request's random id, the experiment's run, the
arm, the client and the time, under an HMAC-SHA256 with a key that only the servers of this registry
hold. A reward counts when its receipt is genuine, its client's own, not too old, and new. The store
is shared by all processes; a reward that counts and the mark that its receipt was used are one
transaction. How many requests each arm answered and failed is added up here too.

Clients are kept under pseudonyms, a keyed hash of their id: the file alone tells nobody who they
are, not even by trying names. The key is a file of its own, so that a receipt needs no database:
issuing one waits for nothing.
"""

import base64
import binascii
import contextlib
import hmac
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from flserving import forks
from flserving.errors import (
    ConflictError,
    ForbiddenError,
    InvalidInputError,
    ServerClosedError,
)
from flserving.registry.forget import FEEDBACK_FILE, LOST, connected, kept_key, pseudonym, typed

FILE_NAME = FEEDBACK_FILE
RECEIPT_S = 3600.0
MOST_PER_CLIENT = 1000
BUSY_S = 2.0  # longest wait for other writers
_LAYOUT = 1  # 1: pseudonyms; a store of layout 0 gets them when it is opened
_TABLES = """
CREATE TABLE IF NOT EXISTS used (request BLOB PRIMARY KEY, until_s REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS used_until ON used (until_s);
CREATE TABLE IF NOT EXISTS rewards (
    run TEXT, arm TEXT, client BLOB, n INTEGER NOT NULL, total REAL NOT NULL, PRIMARY KEY (run, arm, client)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outcomes (
    run TEXT, arm TEXT, requests INTEGER NOT NULL, PRIMARY KEY (run, arm)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (
    run TEXT, arm TEXT, client BLOB, n INTEGER NOT NULL, PRIMARY KEY (run, arm, client)
) WITHOUT ROWID;
"""


class Receipt(msgspec.Struct, frozen=True, array_like=True):
    request: bytes
    run: str
    arm: str
    client: bytes  # its pseudonym
    at_s: float


class FeedbackStore:
    """The receipts and rewards of one registry. For threads and processes.

    Only the key is read here: the database is opened by the first call that needs it, and again by
    the first one after it failed or its file was replaced. ``problem`` says why it could not be
    used when it was last tried.

    Args:
        root: The registry's folder. Key and database are readable by their owner only.
        receipt_s: How long after the answer a reward may come; so long its id is remembered.
        most_per_client: A client's rewards in one run beyond this are refused: nobody decides
            alone.
        clock: Seconds since 1970.

    Raises (all methods but ``receipt``, ``read`` and ``pseudonym``):
        OverloadedError: Other writers kept the store for ``BUSY_S``. CorruptArtifactError: It is no
        store of feedback. FlservingError: It cannot be written: a full disk, permissions.
    """

    def __init__(
        self,
        root: str,
        *,
        receipt_s: float = RECEIPT_S,
        most_per_client: int = MOST_PER_CLIENT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.receipt_s = receipt_s
        self.most_per_client = most_per_client
        self._clock = clock
        self._path = f"{root}/{FILE_NAME}"
        self._key = kept_key(root)
        self._lock = threading.Lock()
        forks.fresh_locks_in_child(self, "_lock")
        self._database: sqlite3.Connection | None = None
        self._opened: list[tuple[int, int]] | None = None
        self._closed = False
        self._unwritable = False
        self.problem: str | None = None

    # Receipts: they need the key alone

    def pseudonym(self, client: str) -> bytes:
        """What stands for a client in the store: 16 bytes. Cost: about 2 us."""
        return pseudonym(self._key, client)

    def receipt(self, run: str, arm: str, client: str) -> str:
        """What the answer to ``client`` carries. Cost: about 7 us."""
        made = Receipt(secrets.token_bytes(12), run, arm, self.pseudonym(client), self._clock())
        body = msgspec.msgpack.encode(made)
        return base64.urlsafe_b64encode(hmac.digest(self._key, body, "sha256") + body).decode()

    def read(self, receipt: str, client: str) -> Receipt:
        """Raises ForbiddenError: Not issued here, or to somebody else. ConflictError: Too late."""
        try:
            sent = base64.b64decode(receipt.encode("ascii"), altchars=b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError, ValueError):
            sent = b""
        genuine = hmac.compare_digest(sent[:32], hmac.digest(self._key, sent[32:], "sha256"))
        found = msgspec.msgpack.decode(sent[32:], type=Receipt) if genuine else None
        if found is None or found.client != self.pseudonym(client):  # the same words for both
            raise ForbiddenError(
                "this receipt was not issued to this client: send the one of your own answer"
            )
        age_s = self._clock() - found.at_s
        if age_s > self.receipt_s:
            raise ConflictError(
                f"the answer is {age_s:.0f} s old: feedback is taken for {self.receipt_s:.0f} s"
            )
        return found

    # Rewards

    def add(self, receipt: Receipt, reward: float | None) -> None:
        """Count a reward in [0, 1], once.

        Raises:
            InvalidInputError: Not in [0, 1].
            ConflictError: Given already.
            ForbiddenError: The client has given ``most_per_client``. Nothing has changed then.
        """
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not 0 <= reward <= 1:
            raise InvalidInputError(f"reward is {reward!r:.64}: send a number in [0, 1]")
        with self._writing() as database:
            database.execute("DELETE FROM used WHERE until_s < ?", (self._clock() - 1,))
            marked = database.execute(
                "INSERT OR IGNORE INTO used VALUES (?, ?)",
                (receipt.request, receipt.at_s + self.receipt_s),
            )
            if not marked.rowcount:
                raise ConflictError(
                    "there is feedback for this answer already: one reward an answer"
                )
            sql = "SELECT coalesce(sum(n), 0) FROM rewards WHERE run = ? AND client = ?"
            if (
                database.execute(sql, (receipt.run, receipt.client)).fetchone()[0]
                >= self.most_per_client
            ):
                raise ForbiddenError(
                    f"this client has given its {self.most_per_client} rewards: others decide now"
                )
            database.execute(
                "INSERT INTO rewards VALUES (?, ?, ?, 1, ?) "
                "ON CONFLICT DO UPDATE SET n = n + 1, total = total + excluded.total",
                (receipt.run, receipt.arm, receipt.client, float(reward)),
            )

    def rewards(self, run: str) -> dict[str, dict[str, tuple[int, float]]]:
        """arm -> pseudonym of a client, hex -> (how many rewards, their sum)."""
        found: dict[str, dict[str, tuple[int, float]]] = {}
        for arm, client, n, total in self._query(
            "SELECT arm, client, n, total FROM rewards WHERE run = ?", run
        ):
            found.setdefault(arm, {})[client.hex()] = n, total
        return found

    def sums(self, run: str) -> Mapping[str, tuple[int, float]]:
        """arm -> (how many rewards, their sum)."""
        rows = self._query(
            "SELECT arm, sum(n), sum(total) FROM rewards WHERE run = ? GROUP BY arm", run
        )
        return {arm: (n, total) for arm, n, total in rows}

    def count(self, run: str, seen: Mapping[tuple[str, str | None], int]) -> None:
        """Add how many requests each arm answered (None), or failed of which client."""
        failed = [
            (arm, self.pseudonym(who), n) for (arm, who), n in seen.items() if who is not None
        ]
        with self._writing() as database:
            sql = "INSERT INTO outcomes VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "
            sql += "requests = requests + excluded.requests"
            database.executemany(sql, [(run, arm, n) for (arm, _), n in seen.items()])
            sql = "INSERT INTO failures VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n"
            database.executemany(sql, [(run, *each) for each in failed])

    def outcomes(self, run: str) -> dict[str, tuple[int, int, int]]:
        """arm -> (how many requests, how many of them failed in the model, how many of those are
        one client's)."""
        sql = "SELECT arm, requests, coalesce(sum(n), 0), coalesce(max(n), 0) FROM outcomes LEFT JOIN failures "
        rows = self._query(sql + "USING (run, arm) WHERE run = ? GROUP BY arm", run)
        return {arm: (requests, failed, most) for arm, requests, failed, most in rows}

    # The database

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all that happens inside, or nothing."""
        with self._using(writes=True) as database, database:
            database.execute("BEGIN IMMEDIATE")
            yield database

    def _query(self, sql: str, *values: str) -> list[Any]:
        with self._using() as database:
            return database.execute(sql, values).fetchall()

    @contextmanager
    def _using(self, writes: bool = False) -> Iterator[sqlite3.Connection]:
        """The database, for one thread at a time. What SQLite raises becomes typed, and
        ``problem``."""
        with self._lock:
            try:
                yield self._current()
            except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
                found = typed(error, FILE_NAME, LOST)
                self.problem = str(found)
                self._unwritable = self._unwritable or writes
                raise found from error
            if writes or not self._unwritable:  # that it can be read shows nothing of that
                self.problem = None
                self._unwritable = False

    def _current(self) -> sqlite3.Connection:
        if self._closed:
            raise ServerClosedError(
                "the feedback store is closed: open another one on the same folder"
            )
        if self._database is not None and (
            self.problem is not None or _identity(self._path) != self._opened
        ):
            self._database.close()  # it failed, or its file was removed or replaced
            self._database = None
        if self._database is None:
            self._database = connected(self._connect, BUSY_S)
            self._opened = _identity(self._path)
        return self._database

    def _connect(self) -> sqlite3.Connection:
        # not opened again: closing it would drop this process's locks on it
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        database = sqlite3.connect(
            self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            # NORMAL: a power cut may take the last rewards along with the marks of their receipts,
            # never one alone
            for setting in ("journal_mode = WAL", "synchronous = NORMAL", "secure_delete = ON"):
                database.execute(f"PRAGMA {setting}").fetchall()
            self._lay_out(database)
        except BaseException:
            database.close()
            raise
        return database

    def _lay_out(self, database: sqlite3.Connection) -> None:
        """Make the tables; in a store of layout 0, put pseudonyms in place of ids, and forget the
        key that it held."""
        if database.execute("PRAGMA user_version").fetchone()[0] >= _LAYOUT:
            return
        with database:
            database.execute("BEGIN IMMEDIATE")
            if database.execute("PRAGMA user_version").fetchone()[0] < _LAYOUT:  # nobody was faster
                for statement in filter(str.strip, _TABLES.split(";")):
                    database.execute(statement)
                database.create_function("pseudonym", 1, self._pseudonym_of, deterministic=True)
                for table in ("rewards", "failures"):
                    database.execute(f"UPDATE {table} SET client = pseudonym(CAST(client AS BLOB))")
                database.execute("DROP TABLE IF EXISTS secret")
                database.execute(f"PRAGMA user_version = {_LAYOUT}")
        with contextlib.suppress(sqlite3.OperationalError):  # the log held ids as well
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _pseudonym_of(self, client: bytes) -> bytes:
        return self.pseudonym(client.decode(errors="surrogatepass"))

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._closed = True
            if self._database is not None:
                self._database.close()
                self._database = None


def _identity(path: str) -> list[tuple[int, int]] | None:
    """Which files lie there: the database and its log, which stays as long as the database is open;
    None: they do not.

    SQLite does not notice when they go, and writes on into files that nobody else will ever see.
    """
    try:
        found = [os.stat(path), os.stat(f"{path}-wal")]
    except OSError:
        return None
    return [(status.st_dev, status.st_ino) for status in found]
