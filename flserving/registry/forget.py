"""What it takes to forget a client, apart from its heads: under which name it is remembered, where
a document names it, and that nothing stays in the free pages of a database. :meth:`Registry.forget`
puts the steps in order. Also, what the databases of a registry have in common: how they are opened,
and what their errors mean.
"""

import hashlib
import re
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from flserving.errors import CorruptArtifactError, FlservingError, OverloadedError
from flserving.registry import storage
from flserving.registry.manifest import Lineage, Manifest

T = TypeVar("T")
FEEDBACK_FILE = "feedback.sqlite3"
KEY_FILE = "feedback.key"
GAP = "…"  # in place of a name: never longer than that, so that every text stays within its limit

LOST = "remove it, the rewards in it are lost"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_REWARDS = ("rewards", "failures")  # tables of the feedback store with a row for each client
_ENDS = r"(?![^\W_])"  # here a word does
_COMMON = {
    "global",
    "mean",
    "worst",
    "client",
    "clients",
    "accuracy",
    "loss",
    "round",
    "rounds",
    "server",
    "seed",
}
"""Words that documents use themselves, as "mean_client_accuracy" does."""


class Forgotten(msgspec.Struct, frozen=True, kw_only=True):
    """What :meth:`Registry.forget` removed, and what it cannot. The log keeps it, but for ``left``
    and ``unread``.

    Attributes:
        heads: Model -> the versions that had a head of the client.
        documents: How many manifests and entries of the logs named it.
        rewards: How many sums of its rewards and failures were kept.
        learned: Model -> the rounds that it is known to have taken part in. The shared weights of
            these rounds, and of all that were trained from them, have learned from its data and
            still do: only a training without it changes that.
        unknown: Model -> the rounds of which nobody noted who took part.
        left: Where its name still stands, because it belongs to something else: a model's name, an
            alias.
        unread: Versions that cannot be read, and why: nobody knows whose heads they have. They were
            left alone.
    """

    heads: dict[str, list[int]]
    documents: int
    rewards: int
    learned: dict[str, list[int]]
    unknown: dict[str, list[int]]
    left: list[str] = []
    unread: list[str] = []

    def __str__(self) -> str:
        lines = [
            f"removed: {sum(map(len, self.heads.values()))} heads ({_listed(self.heads)}), {self.rewards} sums of "
            f"rewards and failures; {self.documents} documents do not name it any more",
            f"not removed: what the shared weights have learned. It took part in rounds: {_listed(self.learned)}. "
            "These and all rounds after them hold that until a training without this client replaces them",
        ]
        if self.unknown:
            lines.append(f"nobody noted who took part in rounds: {_listed(self.unknown)}")
        if self.left:
            lines.append(f"its name is still part of: {', '.join(self.left)}")
        if self.unread:
            lines.append(
                f"nobody knows whose heads these have: {'; '.join(self.unread)}; then forget the client again"
            )
        return "\n".join(lines)


def _listed(numbers: dict[str, list[int]]) -> str:
    return (
        "; ".join(f"{name} {', '.join(map(str, those))}" for name, those in numbers.items())
        or "none"
    )


# Under which name a client is remembered


def pseudonym(key: bytes, client: str, person: bytes = b"fls-client") -> bytes:
    """A keyed hash: 16 bytes that tell nobody who it is who has not the key. Cost: about 2 us."""
    name = client.encode(errors="surrogatepass")  # ids that are no Unicode text, too
    return hashlib.blake2b(name, digest_size=16, key=key, person=person).digest()


# Documents


def naming(*names: str, others: Iterable[str] = ()) -> re.Pattern[str]:
    """What finds one of these names as a word, but for where it is a part of the name of one of the
    ``others``.

    A bare number, or a word that documents use themselves, is a client's only where the text says
    that it is one: rounds and classes have numbers too.
    """
    words = []
    for plain in names:
        name = re.escape(plain)
        if any(map(str.isalpha, plain)) and plain.lower() not in _COMMON:
            longer = ""
            for other in sorted({*others} - {plain}):
                for found in re.finditer(name, other):
                    start = found.start()
                    longer += (
                        rf"(?!(?<={re.escape(other[:start])}){re.escape(other[start:])}{_ENDS})"
                    )
            words.append(rf"(?<![^\W_]){longer}{name}{_ENDS}")
        else:
            # a metric is the mean_client_accuracy
            joined = "[ -]" if plain.lower() in _COMMON else "[ _-]"
            words.append(rf"(?<=client{joined}){name}{_ENDS}|(?<![\w.-]){name}(?= rejected:)")
    return re.compile("|".join(words))


def without_names(value: Any, names: re.Pattern[str]) -> Any:
    """Plain values, with a gap in place of each name; what is filed under a name goes."""
    if isinstance(value, str):
        return names.sub(GAP, value)
    if isinstance(value, dict):
        return {
            key: without_names(each, names) for key, each in value.items() if not names.search(key)
        }
    return value


def without(manifest: Manifest, client: str, names: re.Pattern[str], took_part: bool) -> Manifest:
    """A manifest that does not tell of a client; its heads are the caller's business.

    The number of clients stays, as the number of the forgotten does. Where ``took_part`` is known,
    but not which of the sample counts is the client's, all of them go.
    """
    lineage = manifest.lineage
    if lineage is not None:
        document = msgspec.to_builtins(lineage)
        document["extra"] = without_names(document["extra"], names)
        if document["strategy"] != client:  # else it is the strategy's own name
            document["strategy"] = without_names(document["strategy"], names)
        counts = lineage.sample_counts
        clients = lineage.clients
        if clients is not None and client in clients:
            others = [place for place, one in enumerate(clients) if one != client]
            document["clients"] = [clients[place] for place in others]
            document["sample_counts"] = counts and [counts[place] for place in others]
            document["forgotten"] += clients.count(client)
        elif took_part and clients is None:
            document["sample_counts"] = None
        lineage = msgspec.convert(document, Lineage)
    metrics = without_names(manifest.metrics, names)
    return msgspec.structs.replace(
        manifest, lineage=lineage, metrics=metrics, note=names.sub(GAP, manifest.note)
    )


# Databases


def connected(connect: Callable[[], T], timeout_s: float) -> T:
    """``connect()``, tried again while others are busy: the change to WAL answers so at once,
    whatever SQLite's own timeout is, where several processes open a new file."""
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            return connect()
        except sqlite3.Error as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > until_s:
                raise
        time.sleep(0.01)


def typed(error: Exception, file: str, advice: str) -> FlservingError:
    """What an error around the database in ``file`` means; ``advice``: what to do where that is
    damaged."""
    code = _code(error)
    if code in _BUSY:
        return OverloadedError(f"other processes keep {file} busy ({error}): try again")
    # damage may reach the text of SQLite's own messages
    if code in _DAMAGED or isinstance(error, UnicodeDecodeError):
        return CorruptArtifactError(f"{file} is damaged ({error}): {advice}")
    reason = error.strerror if isinstance(error, OSError) else error
    return FlservingError(f"{file} cannot be used ({reason}): check free space and permissions")


def _code(error: Exception) -> int:
    """SQLite's; 255 for what Python itself finds wrong, which is no damage."""
    return getattr(error, "sqlite_errorcode", -1) & 0xFF


def scrub(database: sqlite3.Connection) -> None:
    """Write a database anew: what was deleted stays neither in its free pages nor in its log.

    Raises:
        OverloadedError: Somebody reads its log. sqlite3.Error: It cannot be done now.
    """
    database.execute("VACUUM")
    ((busy, *_),) = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    if busy:
        raise OverloadedError("somebody reads what a database's log still holds: try again")


def feedback_of(root: str, client: str, who: bytes, remove: bool) -> int:
    """How many sums the feedback store has of a client; ``who`` is its pseudonym there.

    Raises:
        OverloadedError, CorruptArtifactError, FlservingError: See :func:`typed`.
    """
    path = Path(root, FEEDBACK_FILE)
    found = 0
    if not path.exists():
        return found
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            # a store of layout 0 holds the id itself
            names = (who, client.encode(errors="surrogatepass"))
            known = {
                name
                for (name,) in database.execute(
                    "SELECT name FROM sqlite_schema WHERE type = 'table'"
                )
            }
            for table in known & {*_REWARDS}:
                which = f"FROM {table} WHERE CAST(client AS BLOB) IN (?, ?)"
                found += database.execute(f"SELECT count(*) {which}", names).fetchone()[0]
                if remove:
                    database.execute(f"DELETE {which}", names)
            if remove:
                scrub(database)
    except sqlite3.Error as error:
        raise typed(error, FEEDBACK_FILE, LOST) from error
    return found


def kept_key(root: str) -> bytes:
    """The secret of the pseudonyms. Raises as :func:`storage.kept_secret`."""
    return storage.kept_secret(root, KEY_FILE)
