"""Rewards for answers: who may give one, that it is given once, and what each arm has got. SQLite, beside the registry.

An answer of an experiment carries a *receipt*: the request's random id, the experiment's run, the arm, the client and
the time, under an HMAC-SHA256 with a key that only the servers of this registry hold. A reward counts when its receipt
is genuine, its client's own, not too old, and new. The store is shared by all processes; a reward that counts and the
mark that its receipt was used are one transaction. How many requests each arm answered and failed is added up here too.
"""

import base64
import binascii
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

from flserving.errors import ConflictError, ForbiddenError, InvalidInputError, OverloadedError

FILE_NAME = "feedback.sqlite3"
RECEIPT_S = 3600.0
MOST_PER_CLIENT = 1000
_TABLES = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS secret (id INTEGER PRIMARY KEY CHECK (id = 1), key BLOB NOT NULL);
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
COMMIT;
"""


class Receipt(msgspec.Struct, frozen=True, array_like=True):
    request: bytes
    run: str
    arm: str
    client: bytes  # of ids that are no Unicode text, too, which neither msgpack nor SQLite take as text
    at_s: float


class FeedbackStore:
    """The receipts and rewards of one registry. For threads and processes.

    Args:
        root: The registry's folder. The file is readable by its owner only: it holds the key.
        receipt_s: How long after the answer a reward may come; so long its id is remembered.
        most_per_client: A client's rewards in one run beyond this are refused: nobody decides alone.
        clock: Seconds since 1970.
    """

    def __init__(self, root: str, *, receipt_s: float = RECEIPT_S, most_per_client: int = MOST_PER_CLIENT,
                 clock: Callable[[], float] = time.time) -> None:  # fmt: skip
        self.receipt_s, self.most_per_client, self._clock = receipt_s, most_per_client, clock
        self._lock, path = threading.Lock(), f"{root}/{FILE_NAME}"
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._db = sqlite3.connect(path, 30.0, isolation_level=None, check_same_thread=False)
        # NORMAL: a power cut may take the last rewards along with the marks of their receipts, never one of them alone
        for setting in ("journal_mode = WAL", "synchronous = NORMAL"):
            self._db.execute(f"PRAGMA {setting}").fetchall()
        self._db.executescript(_TABLES)
        self._db.execute("INSERT OR IGNORE INTO secret VALUES (1, ?)", (secrets.token_bytes(32),))
        ((self._key,),) = self._db.execute("SELECT key FROM secret").fetchall()

    def receipt(self, run: str, arm: str, client: str) -> str:
        """What the answer to ``client`` carries. Cost: about 5 us."""
        body = msgspec.msgpack.encode(Receipt(secrets.token_bytes(12), run, arm, _bytes(client), self._clock()))
        return base64.urlsafe_b64encode(hmac.digest(self._key, body, "sha256") + body).decode()

    def read(self, receipt: str, client: str) -> Receipt:
        """Raises ForbiddenError: Not issued here, or to somebody else. ConflictError: Too late."""
        try:
            sent = base64.b64decode(receipt.encode("ascii"), altchars=b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError, ValueError):
            sent = b""
        genuine = hmac.compare_digest(sent[:32], hmac.digest(self._key, sent[32:], "sha256"))
        found = msgspec.msgpack.decode(sent[32:], type=Receipt) if genuine else None
        if found is None or found.client != _bytes(client):  # the same words for both
            raise ForbiddenError("this receipt was not issued to this client: send the one of your own answer")
        if (age_s := self._clock() - found.at_s) > self.receipt_s:
            raise ConflictError(f"the answer is {age_s:.0f} s old: feedback is taken for {self.receipt_s:.0f} s")
        return found

    def add(self, receipt: Receipt, reward: float | None) -> None:
        """Count a reward in [0, 1], once.

        Raises:
            InvalidInputError: Not in [0, 1]. ConflictError: Given already. ForbiddenError: The client has given
            ``most_per_client``. OverloadedError: Other writers kept the store. Nothing has changed then.
        """
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not 0 <= reward <= 1:
            raise InvalidInputError(f"reward is {reward!r:.64}: send a number in [0, 1]")
        run, arm, client = receipt.run, receipt.arm, receipt.client
        with self._writing():
            self._db.execute("DELETE FROM used WHERE until_s < ?", (self._clock() - 1,))
            marked = self._db.execute(
                "INSERT OR IGNORE INTO used VALUES (?, ?)", (receipt.request, receipt.at_s + self.receipt_s)
            )
            if not marked.rowcount:
                raise ConflictError("there is feedback for this answer already: one reward an answer")
            sql = "SELECT coalesce(sum(n), 0) FROM rewards WHERE run = ? AND client = ?"
            if self._db.execute(sql, (run, client)).fetchone()[0] >= self.most_per_client:
                raise ForbiddenError(f"this client has given its {self.most_per_client} rewards: others decide now")
            self._db.execute(
                "INSERT INTO rewards VALUES (?, ?, ?, 1, ?) "
                "ON CONFLICT DO UPDATE SET n = n + 1, total = total + excluded.total",
                (run, arm, client, float(reward)),
            )

    def rewards(self, run: str) -> dict[str, dict[str, tuple[int, float]]]:
        """arm -> client -> (how many rewards, their sum)."""
        found: dict[str, dict[str, tuple[int, float]]] = {}
        sql = "SELECT arm, CAST(client AS BLOB), n, total FROM rewards WHERE run = ?"  # older stores hold text
        for arm, client, n, total in self._query(sql, run):
            found.setdefault(arm, {})[client.decode(errors="surrogatepass")] = n, total
        return found

    def sums(self, run: str) -> Mapping[str, tuple[int, float]]:
        """arm -> (how many rewards, their sum)."""
        rows = self._query("SELECT arm, sum(n), sum(total) FROM rewards WHERE run = ? GROUP BY arm", run)
        return {arm: (n, total) for arm, n, total in rows}

    def count(self, run: str, seen: Mapping[tuple[str, str | None], int]) -> None:
        """Add how many requests each arm answered (None), or failed of which client. OverloadedError: As above."""
        failed = [(arm, _bytes(who), n) for (arm, who), n in seen.items() if who is not None]
        with self._writing():
            sql = "INSERT INTO outcomes VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + ?3"
            self._db.executemany(sql, [(run, arm, n) for (arm, _), n in seen.items()])
            sql = "INSERT INTO failures VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n"
            self._db.executemany(sql, [(run, *each) for each in failed])

    def outcomes(self, run: str) -> dict[str, tuple[int, int, int]]:
        """arm -> (how many requests, how many of them failed in the model, how many of those are one client's)."""
        sql = "SELECT arm, requests, coalesce(sum(n), 0), coalesce(max(n), 0) FROM outcomes LEFT JOIN failures "
        rows = self._query(sql + "USING (run, arm) WHERE run = ? GROUP BY arm", run)
        return {arm: (requests, failed, most) for arm, requests, failed, most in rows}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction: all that happens inside, or nothing."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise OverloadedError(f"the feedback store is busy ({error}): try again") from error
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _query(self, sql: str, *values: str) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._db.close()


def _bytes(client: str) -> bytes:
    return client.encode(errors="surrogatepass")
