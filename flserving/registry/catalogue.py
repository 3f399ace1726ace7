"""The catalogue: what the index alone can answer. Names, version numbers, aliases, and the log of their moves."""

import operator
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

import msgspec

from flserving.errors import (
    ConfigError,
    ConflictError,
    FlservingError,
    InvalidInputError,
    InvalidModelError,
    NotFoundError,
)
from flserving.extras import of_extra
from flserving.registry.experiment import Experiment
from flserving.registry.index import CONTENT, Index, Transaction
from flserving.registry.manifest import MAX_VERSION, check_name, is_name

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_ALIAS = "default"
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")  # one spelling of each: the server's routes know no other


class Catalogue:
    """Names x integer versions x aliases. :class:`flserving.registry.Registry` adds the files."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def close(self) -> None:
        """Close the index. Idempotent; artifacts that were read stay valid."""
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def models(self) -> list[str]:
        """Names with at least one version, sorted."""
        return [str(name) for (name,) in self._index.query("SELECT DISTINCT name FROM versions ORDER BY name")]

    def models_by_promotion(self) -> list[str]:
        """:meth:`models`, those with a default version first, and among them the one that had one first."""
        sql = (
            "SELECT name FROM moves AS m WHERE alias = ?1 GROUP BY name HAVING "
            "(SELECT to_version FROM moves WHERE name = m.name AND alias = ?1 ORDER BY id DESC LIMIT 1) IS NOT NULL "
            "ORDER BY min(id)"
        )
        promoted = [str(name) for (name,) in self._index.query(sql, DEFAULT_ALIAS)]
        return list(dict.fromkeys([*promoted, *self.models()]))

    def version_numbers(self, name: str) -> list[int]:
        """Versions of ``name``, oldest first: 1, 2, ... without gaps. Empty if there is no such name."""
        check_name("model name", name)
        return [v for (v,) in self._index.query("SELECT version FROM versions WHERE name = ? ORDER BY version", name)]

    def resolve(self, name: str, ref: int | str | None = None) -> int:
        """The version that ``ref`` means: a number (3 or "3", not "03"), an alias, or None for the alias "default".

        Raises:
            NotFoundError: There is none. InvalidInputError: ``ref`` is neither a number, a string nor None.
        """
        check_name("model name", name)
        ref = DEFAULT_ALIAS if ref is None else ref
        found = None
        if isinstance(ref, str) and not _NUMBER.fullmatch(ref):
            if is_name(ref):
                sql = "SELECT to_version FROM moves WHERE name = ? AND alias = ? ORDER BY id DESC LIMIT 1"
                found = self._index.query(sql, name, ref)
        else:
            sql = "SELECT version FROM versions WHERE name = ? AND version = ?"
            found = self._index.query(sql, name, checked_version(name, int(ref) if isinstance(ref, str) else ref))
        if not found or found[0][0] is None:
            raise self._missing(name, str(ref))
        return int(found[0][0])

    def aliases(self, name: str) -> dict[str, int]:
        """Every alias of ``name`` and the version that it points at, sorted. Empty if there is none."""
        check_name("model name", name)
        last = "SELECT max(id) FROM moves WHERE name = ? GROUP BY alias"
        rows = self._index.query(f"SELECT alias, to_version FROM moves WHERE id IN ({last}) ORDER BY alias", name)
        return {alias: version for alias, version in rows if version is not None}

    def rolled_back(self, name: str, alias: str = DEFAULT_ALIAS) -> list[int]:
        """The versions from which :meth:`rollback` ever took an alias back."""
        sql = "SELECT DISTINCT from_version FROM moves WHERE name = ? AND alias = ? AND action = 'rollback'"
        return [int(version) for (version,) in self._index.query(sql, name, alias) if version is not None]

    def set_alias(
        self, name: str, alias: str, version: int, *, who: str, why: str, if_at: int | None = None
    ) -> int | None:
        """Point an alias at an existing version, atomically; returns where it pointed before (None: nowhere).

        A move to where it points already changes nothing and is not logged. NotFoundError: no such version.
        ConflictError: it is in an experiment, or no longer points at version ``if_at`` (0: nowhere).
        """
        wanted = self.resolve(name, checked_version(name, version))  # versions are never removed: no race
        with self._move(name, alias, who, why) as transaction:
            if if_at is not None and (now := transaction.target(name, alias) or 0) != if_at:
                raise ConflictError(
                    f"alias {alias!r} of {name!r} points at {now or 'nothing'}, not at {if_at}: look again"
                )
            return transaction.set_alias(name, alias, wanted, who, why)

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS, *, who: str, why: str) -> int:
        """Undo the alias's last move; returns the version that it points at again.

        It works like undo in an editor. Twice goes back two moves, not forth again; a new ``set_alias`` continues from
        where the rollbacks led. A removed alias comes back; one that was set again after its removal goes back no
        further than that. The log keeps every move, rollbacks included. NotFoundError: nothing (left) to undo.
        """
        with self._move(name, alias, who, why) as transaction:
            return transaction.roll_back(name, alias, who, why)

    def remove_alias(self, name: str, alias: str, *, who: str, why: str) -> int:
        """Make an alias point nowhere; returns where it pointed. NotFoundError: no such alias."""
        with self._move(name, alias, who, why) as transaction:
            return transaction.remove_alias(name, alias, who, why)

    def experiments(self, name: str) -> dict[str, Experiment]:
        """The running experiments of ``name``, by the alias that each is on; those that can be read here."""
        return {alias: it for alias, it in self._experiments(name).items() if isinstance(it, Experiment)}

    def unread_experiments(self, name: str) -> dict[str, str]:
        """Aliases of ``name`` whose experiment cannot be read here, and why: a newer flserving started it, or it is
        damaged. The alias's own version answers there; :meth:`conclude_experiment` ends it."""
        return {alias: it for alias, it in self._experiments(name).items() if isinstance(it, str)}

    def _experiments(self, name: str) -> dict[str, Experiment | str]:
        check_name("model name", name)
        last = "SELECT max(id) FROM experiments WHERE name = ? GROUP BY alias"
        sql = f"SELECT alias, {CONTENT} FROM experiments WHERE id IN ({last}) ORDER BY alias"
        return {alias: _read(content) for alias, content in self._index.query(sql, name) if content is not None}

    def start_experiment(
        self, name: str, experiment: Experiment, alias: str = DEFAULT_ALIAS, *, who: str, why: str
    ) -> Experiment:
        """Let the versions of ``experiment`` share the requests of an alias; every server follows within a second.

        Started again under the same id, it goes on with other weights, another policy or shadow: its evidence stays.
        While it runs the alias cannot be moved. Returns it with its ``run`` and ``key``.

        Raises:
            ConfigError: Weights that do not sum to one, an empty arm, a policy that does not fit.
            NotFoundError: No such version or alias. ConflictError: The alias is in another experiment, or in one that
            cannot be read, or this one runs with other arms. Nothing has changed then.
        """
        experiment.check()
        for version in experiment.versions:
            self.resolve(name, checked_version(name, version))
        with self._move(name, alias, who, why) as transaction:
            target, running = transaction.target(name, alias), transaction.experiment(name, alias)
            if target is None:
                raise NotFoundError(f"{name!r} has no alias {alias!r}: set_alias makes one")
            if experiment.policy is not None and all(arm.version != target for arm in experiment.arms.values()):
                raise ConfigError(f"no arm of {experiment.id!r} has version {target}, where {alias!r} points: name it")
            fresh = secrets.token_hex(8), secrets.token_hex(16)
            if running is not None:
                old = _read(running)
                if isinstance(old, str):
                    raise ConflictError(f"alias {alias!r} of {name!r} is in an experiment, {old}: conclude that first")
                if old.id != experiment.id:
                    raise ConflictError(f"alias {alias!r} of {name!r} is in experiment {old.id!r}: conclude that first")
                if _shape(old) != _shape(experiment):
                    raise ConflictError(f"experiment {old.id!r} runs with other arms: conclude it, or take another id")
                fresh = old.run, old.key
            experiment = msgspec.structs.replace(experiment, run=fresh[0], key=fresh[1])
            if (content := msgspec.json.encode(experiment)) != running:
                transaction.set_experiment(name, alias, content.decode(), who, why)
        return experiment

    def conclude_experiment(
        self, name: str, alias: str = DEFAULT_ALIAS, version: int | None = None, *, who: str, why: str,
        run: str | None = None,
    ) -> Experiment | None:  # fmt: skip
        """End the experiment on an alias and, in the same transaction, point the alias at ``version`` (None: it stays).

        Returns what ended; None where that cannot be read here.

        Raises:
            NotFoundError: No experiment there, or no such version. ConflictError: It is another ``run`` than the one
            meant, or it cannot be told. Nothing has changed then.
        """
        wanted = None if version is None else self.resolve(name, checked_version(name, version))
        with self._move(name, alias, who, why) as transaction:
            if (running := transaction.experiment(name, alias)) is None:
                raise NotFoundError(f"alias {alias!r} of {name!r} is in no experiment: there is nothing to conclude")
            found = _read(running)
            ended = found if isinstance(found, Experiment) else None
            if run is not None and (ended is None or run != ended.run):
                what = found if ended is None else ended.id
                raise ConflictError(f"another experiment has begun on alias {alias!r} of {name!r}: {what!r}")
            transaction.set_experiment(name, alias, None, who, why)
            if wanted is not None:
                transaction.set_alias(name, alias, wanted, who, why)
        return ended

    def experiment_age_s(self, name: str, alias: str = DEFAULT_ALIAS) -> float:
        """Seconds since the running experiment on an alias was first started, by the registry's clock; 0 if none is."""
        ends = "SELECT max(id) FROM experiments WHERE name = ?1 AND alias = ?2 AND content IS NULL"
        sql = f"SELECT at FROM experiments WHERE name = ?1 AND alias = ?2 AND id > coalesce(({ends}), 0) ORDER BY id"
        began = self._index.query(f"{sql} LIMIT 1", name, alias)
        now = datetime.fromisoformat(self._index.timestamp())
        return (now - datetime.fromisoformat(began[0][0])).total_seconds() if began else 0.0

    def experiment_log(self, name: str) -> list[dict[str, Any]]:
        """Every start, change and end, oldest first: at, alias, experiment (None: it ended; where it cannot be read,
        why), who, why."""
        check_name("model name", name)
        rows = self._index.query(
            f"SELECT at, alias, {CONTENT}, who, why FROM experiments WHERE name = ? ORDER BY id", name
        )
        return [
            {"at": at, "alias": alias, "experiment": content and _read(content), "who": who, "why": why}
            for at, alias, content, who, why in rows
        ]

    @contextmanager
    def _move(self, name: str, alias: str, who: str, why: str) -> Iterator[Transaction]:
        check_name("model name", name)
        check_move(alias, who, why)
        with self._index.transaction() as transaction:
            yield transaction

    @property
    def local_changes(self) -> int:
        """How many changes were committed through this very object. Free: look here before :meth:`change_token`."""
        return self._index.commits

    def change_token(self) -> int:
        """A number that grows whenever any process publishes, moves an alias, or starts, changes or ends an
        experiment. Cost: about 10 us, so poll it."""
        ids = (f"(SELECT coalesce(max(id), 0) FROM {table})" for table in ("versions", "moves", "experiments"))
        return int(self._index.query(f"SELECT {' + '.join(ids)}")[0][0])

    def history(self, name: str, alias: str | None = None) -> "pd.DataFrame":
        """Every move, oldest first: when, alias, action, from, to, who, why. NotFoundError: no such name."""
        with of_extra("course"):
            from flserving.registry import tables

        if alias is not None:
            check_name("alias", alias)
        if not self.version_numbers(name):
            raise self._missing(name, "any")
        sql = "SELECT at, alias, action, from_version, to_version, who, why FROM moves WHERE name = ?1"
        return tables.history(self._index.query(f"{sql} AND (?2 IS NULL OR alias = ?2) ORDER BY id", name, alias))

    def _missing(self, name: str, ref: str) -> NotFoundError:
        numbers = self.version_numbers(name)
        if not numbers:
            return NotFoundError(f"no model {name!r}; known: {_some(self.models()) or 'none yet, publish one'}")
        known = f"versions 1 to {numbers[-1]}, aliases {_some(self.aliases(name)) or 'none'}"
        return NotFoundError(f"{name!r} has no version or alias {ref[:80]!r}: it has {known}")


def _read(content: bytes) -> Experiment | str:
    """An experiment, or why it cannot be run here."""
    try:
        experiment = msgspec.json.decode(content, type=Experiment)
        experiment.check()
        if experiment.arms:
            experiment.arm_of("")  # its key is one
    except (msgspec.MsgspecError, FlservingError, UnicodeDecodeError, ValueError, RecursionError) as error:
        return f"which cannot be read here ({error})"
    return experiment


def _shape(experiment: Experiment) -> object:
    """What evidence depends on: it must not change while an experiment runs."""
    return experiment.rule, [(name, arm.version) for name, arm in experiment.arms.items()]


def _some(names: Iterable[str]) -> str:
    """The first ten names, so that a message stays one."""
    listed = list(map(str, names))
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")


def check_move(alias: str, who: str, why: str) -> None:
    """Raise InvalidModelError unless ``alias`` may be one, and the log gets to know who moved it and why."""
    if check_name("alias", alias).isdigit():
        raise InvalidModelError(f"alias {alias!r} looks like a version number: put a letter in it")
    for field, value, most in (("who", who, 200), ("why", why, 2000)):
        if not isinstance(value, str) or not 0 < len(value.strip()) <= most or not value.isprintable():
            raise InvalidModelError(f"{field} is {str(value)[:80]!r}: the log needs a line of 1 to {most} characters")


def checked_version(name: str, version: object) -> int:
    """``version`` as an int that may exist. InvalidInputError: not an integer. NotFoundError: out of range."""
    try:
        number = operator.index(version)  # type: ignore[arg-type]  # NumPy's integers too: they come out of DataFrames
    except TypeError:
        number = None
    if number is None or isinstance(version, bool):
        raise InvalidInputError(f"version {version!r} of {name!r}: give an integer (resolve takes aliases too)")
    if not 0 < number <= MAX_VERSION:
        raise NotFoundError(f"{name!r} has no version {str(number)[:80]}: versions start at 1")
    return number
