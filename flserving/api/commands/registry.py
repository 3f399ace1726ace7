"""``flserving registry``: what is in a registry, which version an alias leads to, and what may
go."""

import argparse
import getpass
import os
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from flserving.api.commands.parser import Command
from flserving.errors import ConfigError, CorruptArtifactError
from flserving.registry import Registry
from flserving.registry.index import DEFAULT_ALIAS

_WIDEST = 100  # characters of a value in a table; --json shows all

Answer = Callable[[Registry, argparse.Namespace], Any]
"""Does what a command is for, and returns what there is to say: a mapping, a list of them, or what
``str`` makes text of."""
Argument = tuple[str, dict[str, Any]]
"""A name, and what else ``add_argument`` takes."""


def _list(registry: Registry, arguments: argparse.Namespace) -> Any:
    if arguments.model is None:
        return [_model(registry, name) for name in registry.models()]
    model = arguments.model
    registry.resolve(model, 1)  # NotFoundError, where there is no such model
    aliases = registry.aliases(model)
    return [
        _version(registry, model, number, aliases) for number in registry.version_numbers(model)
    ]


def _model(registry: Registry, name: str) -> dict[str, Any]:
    return {
        "model": name,
        "versions": registry.version_numbers(name)[-1],
        "aliases": registry.aliases(name),
    }


def _version(
    registry: Registry, model: str, number: int, aliases: Mapping[str, int]
) -> dict[str, Any]:
    row: dict[str, Any] = {"version": number, "aliases": _leading_to(number, aliases)}
    try:
        manifest = registry.manifest(model, number)
    except CorruptArtifactError as error:  # one broken version must not hide the others
        return row | {"problem": str(error)}
    shown = ("created_at", "round", "architecture", "weights_nbytes", "metrics", "note")
    return row | {name: getattr(manifest, name) for name in shown}


def _leading_to(number: int, aliases: Mapping[str, int]) -> list[str]:
    return [name for name, at in aliases.items() if at == number]


def _show(registry: Registry, arguments: argparse.Namespace) -> Any:
    number = registry.resolve(arguments.model, arguments.version)
    aliases = _leading_to(number, registry.aliases(arguments.model))
    return {"aliases": aliases, **msgspec.to_builtins(registry.manifest(arguments.model, number))}


def _promote(registry: Registry, arguments: argparse.Namespace) -> Any:
    model = arguments.model
    number = registry.resolve(model, arguments.version)
    expected = arguments.if_at
    if expected is None:  # as it is now: a move that somebody makes meanwhile is not undone
        expected = registry.aliases(model).get(arguments.alias, 0)
    before = registry.set_alias(
        model,
        arguments.alias,
        number,
        who=arguments.who,
        why=arguments.why,
        if_at=expected,
    )
    return {"model": model, "alias": arguments.alias, "before": before, "version": number}


def _rollback(registry: Registry, arguments: argparse.Namespace) -> Any:
    before = registry.aliases(arguments.model).get(arguments.alias)
    number = registry.rollback(
        arguments.model, arguments.alias, who=arguments.who, why=arguments.why
    )
    return {"model": arguments.model, "alias": arguments.alias, "before": before, "version": number}


def _compare(registry: Registry, arguments: argparse.Namespace) -> Any:
    table = registry.compare(arguments.model, arguments.a, arguments.b).reset_index()
    return msgspec.json.decode(table.to_json(orient="records"))  # NaN becomes null


def _gc(registry: Registry, arguments: argparse.Namespace) -> Any:
    left = registry.gc(dry_run=arguments.dry_run)
    removed = not arguments.dry_run
    return [{"path": path, "nbytes": nbytes, "removed": removed} for path, nbytes in left.items()]


def _forget(registry: Registry, arguments: argparse.Namespace) -> Any:
    return registry.forget(arguments.client)


# Arguments


def _argument(name: str, text: str, **more: Any) -> Argument:
    return name, {"help": text, **more}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


_MODEL = _argument("model", "its name", metavar="MODEL")
_ONE_MODEL = _argument(
    "model", "list its versions; without it, all models", metavar="MODEL", nargs="?"
)
_VERSION = _argument("version", "a number or another alias", metavar="VERSION")
_ONE_VERSION = _argument(
    "version",
    f"a number or an alias (default {DEFAULT_ALIAS})",
    metavar="VERSION",
    nargs="?",
)
_A = _argument("a", "a number or an alias", metavar="A")
_B = _argument("b", "a number or an alias", metavar="B")
_ALIAS = _argument("--alias", "the alias that moves", default=DEFAULT_ALIAS)
_WHY = _argument("--why", "the reason, for the log", required=True, metavar="TEXT")
_WHO = _argument("--who", "who moves it, for the log", default=_user(), metavar="NAME")
_IF_AT = _argument(
    "--if-at",
    "only if the alias points at version N; 0: if it points nowhere",
    type=int,
    metavar="N",
)
_DRY_RUN = _argument("--dry-run", "only list what would go", action="store_true")
_CLIENT = _argument("client", "its id, as in its credential", metavar="CLIENT")
_REGISTRY = _argument(
    "--registry", "the registry's folder", required=True, metavar="DIR", type=os.path.expanduser
)
_JSON = _argument("--json", "answer in JSON", action="store_true")


# Answers


def _command(text: str, answer: Answer, *own: Argument) -> Command:
    """A command on the registry in ``--registry``, which answers in text or in JSON."""

    def fill(parser: argparse.ArgumentParser) -> None:
        for name, settings in (_REGISTRY, _JSON, *own):
            parser.add_argument(name, **settings)

    def run(arguments: argparse.Namespace) -> int:
        folder = arguments.registry
        if not Path(folder, "registry.sqlite3").is_file():  # a wrong path must not make a new one
            raise ConfigError(
                f"{folder} holds no registry: give the folder that versions were published to"
            )
        with Registry(folder) as registry:
            found = answer(registry, arguments)
        text = msgspec.json.encode(found).decode() if arguments.json else _text(found)
        print(text)
        return 0

    return Command(text, run, fill)


def _text(answer: Any) -> str:
    """Lines for people: a table of a list, a line for each entry of a mapping."""
    if isinstance(answer, dict):
        width = max(map(len, answer))
        return "\n".join(f"{name:{width}}  {_cell(value)}" for name, value in answer.items())
    if not isinstance(answer, list):
        return str(answer)
    if not answer:
        return "none"
    names = list(dict.fromkeys(chain(*answer)))
    rows = [names]
    for row in answer:
        rows.append([_cell(row.get(name)) for name in names])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = map(str.ljust, row, widths)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name}={_cell(each)}" for name, each in value.items()]
    if isinstance(value, list | tuple):
        value = ", ".join(map(_cell, value))
    if isinstance(value, float):
        value = f"{value:.6g}"
    if value is None:
        return ""
    text = "".join(char if char.isprintable() else "?" for char in str(value))
    if len(text) > _WIDEST:
        text = f"{text[: _WIDEST - 1]}…"
    return text


_MOVE = (_ALIAS, _WHY, _WHO)
COMMANDS = {
    "list": _command("the models, or the versions of one", _list, _ONE_MODEL),
    "show": _command("all that a version says of itself", _show, _MODEL, _ONE_VERSION),
    "compare": _command(
        "two versions side by side: metrics, digests, norms of tensors", _compare, _MODEL, _A, _B
    ),
    "promote": _command("point an alias at a version", _promote, _MODEL, _VERSION, *_MOVE, _IF_AT),
    "rollback": _command("undo the last move of an alias", _rollback, _MODEL, *_MOVE),
    "gc": _command("remove what publishers left who died", _gc, _DRY_RUN),
    "forget": _command(
        "remove a client's heads, feedback and name, and say what stays", _forget, _CLIENT
    ),
}
