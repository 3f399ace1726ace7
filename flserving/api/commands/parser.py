"""How commands take their options: from the command line, else from the environment, else the
default."""

import argparse
import inspect
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

RULE = (
    "Every option can be set by the environment, too: --max-batch-size by FLSERVING_MAX_BATCH_SIZE, a switch by 1 or 0,"
    " one that may be given more than once by its values with commas between them. The command line goes first; an "
    "empty variable counts as none."
)
_SWITCH = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}

# how Kubernetes sets FLSERVING_PORT in every pod beside a Service of the name flserving
_SERVICE_LINK = "tcp://"


class Command(NamedTuple):
    """A subcommand: one line of help, a function that returns the exit code, and its options."""

    help: str
    run: Callable[[argparse.Namespace], int]
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


class _Help(argparse.HelpFormatter):
    """Ends the help of an option with its default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if isinstance(default, bool | None) or default in ([], argparse.SUPPRESS):
            return f"{action.help}"
        return f"{action.help} (default %(default)s)"


class Version(argparse.Action):
    """``--version``, which is looked up only when somebody asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print("flserving", version("flserving"))
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Options are added when a parser is used: the help of ``flserving`` loads nothing of what its
    commands need.

    Attributes of what it returns: ``environment``, option -> the variable whose value it has.
    """

    def __init__(
        self, fill: Callable[[argparse.ArgumentParser], None] = lambda parser: None, **given: Any
    ) -> None:
        super().__init__(formatter_class=_Help, epilog=RULE, **given)
        self._fill = fill

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._fill(self)
        given = dict[str, tuple[str, Any]]()  # option -> its variable, and the value of that
        for action in self._actions:
            name = variable(action)
            text = os.environ.get(name)
            if (
                not text
                or text.startswith(_SERVICE_LINK)
                or (action.nargs == 0 and action.default is not False)
            ):
                continue
            value = self._read(action, name, text)
            given[action.dest] = name, value
            action.required = False
            if not isinstance(value, list):  # to a list the command line would append
                action.default = value
        found, rest = super().parse_known_args(args, namespace)
        used = dict[str, str]()
        for dest, (name, value) in given.items():
            if isinstance(value, list):
                setattr(found, dest, getattr(found, dest) or value)
            if getattr(found, dest) is value:  # else the command line has gone before it
                used[dest] = name
        # of a command that hands its words on: another program knows these
        if rest and hasattr(found, "words"):
            found.words = args
            rest = []
        found.environment = getattr(found, "environment", {}) | used
        return found, rest

    def _read(self, action: argparse.Action, name: str, text: str) -> Any:
        """The value of a variable, as the command line would give it."""
        try:
            if isinstance(action.default, list):
                return [self._get_values(action, [part.strip()]) for part in text.split(",")]
            if action.nargs != 0:
                return self._get_values(action, [text])
            return _SWITCH[text.lower()]
        except argparse.ArgumentError as error:
            self.error(f"{name} is {text!r}: {error.message}")
        except KeyError:
            self.error(f"{name} is {text!r}: it is a switch, set it to 1 or 0")


def variable(action: argparse.Action) -> str:
    """The name of what sets an option from outside; "" for what is no option."""
    return (
        "".join(f"FLSERVING_{flag[2:]}" for flag in action.option_strings[-1:])
        .replace("-", "_")
        .upper()
    )


def described(settings: type) -> dict[str, str]:
    """Field -> what the ``Args`` of the docstring of ``settings`` say of it in their first
    sentence."""
    listed = (inspect.getdoc(settings) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
    return {name: _plain(re.split(r"\.(?:\s+[A-Z]|$)", text)[0]) for name, text in found}


def _plain(text: str) -> str:
    text = re.sub(r":\w+:`~?([\w.]+\.)?(\w+)`", r"\2", text).replace("``", "").replace("%", "%%")
    text = " ".join(text.split())
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def subcommands(parser: argparse.ArgumentParser, dest: str, commands: dict[str, Command]) -> None:
    choices = parser.add_subparsers(
        dest=dest, required=True, metavar="COMMAND", parser_class=Parser
    )
    for name, command in commands.items():
        choices.add_parser(name, help=command.help, description=command.help, fill=command.options)
