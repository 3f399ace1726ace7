"""The ``flserving`` command: a table of subcommands, each a thin call into the package.

A new subcommand is one more entry in ``COMMANDS``: a function that runs, and one that adds its options to a parser.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flserving.api import commands, edge_process
from flserving.errors import FlservingError


class Command(NamedTuple):
    """A subcommand: one line of help, a function that returns the exit code, and its options."""

    help: str
    run: Callable[[argparse.Namespace], int]
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def _doctor(arguments: argparse.Namespace) -> int:
    from flserving.api import doctor  # not before it is asked for: it loads torch

    return doctor.report(sys.stdout)


COMMANDS = {
    "doctor": Command("check this installation; every line is ok or says what to do", _doctor),
    "serve": Command("serve a registry over REST and gRPC", commands.serve, commands.serve_options),
    "edge": Command("serve on a device, from its own folder", edge_process.run, edge_process.options),
    "demo": Command("train, publish, serve, and print how to call it", commands.demo, commands.demo_options),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 1 with the reason on stderr where it cannot do what was asked, 130
    where Ctrl-C comes before it is under way.

    A wrong command line ends in ``SystemExit(2)`` with the usage.

    Args:
        argv: What follows the program's name; None takes the process's own.
    """
    parser = argparse.ArgumentParser(prog="flserving", description="Serve models that federated learning has trained.")
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.options(choices.add_parser(name, help=command.help, description=command.help))
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command].run(arguments)
    except FlservingError as error:
        print(f"flserving: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # Ctrl-C while it starts; what serves has handlers of its own
        print("flserving: interrupted", file=sys.stderr)
        return 130  # what a shell says of SIGINT
