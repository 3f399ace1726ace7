"""Architectures of one's own in the commands: ``--import MODULE`` runs a module that registers
them.

What runs is what the operator names on the command line, never what a registry, a manifest or a
request names.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from flserving.errors import ConfigError


def import_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--import`` to a command; the names come as ``imports``."""
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        metavar="MODULE",
        dest="imports",
        help="run this Python module first, which registers architectures of your own (models.register); it is looked "
        "for in the current directory too; may be given more than once",
    )


def import_modules(names: Sequence[str]) -> None:
    """Import modules, from the current directory too. One that is imported already is not run
    again.

    Raises:
        ConfigError: There is no such module, it fails, or it registers no architecture.
    """
    if not names:
        return
    from flserving.models import architectures  # loads torch

    # an installed command has its own folder there
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(
                f"--import {name!r} is no module's name: give it as in an import statement, e.g. mynet"
            )
        known = name in sys.modules
        before = set(architectures.names())
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise ConfigError(
                    f"--import {name} needs a module {error.name!r} that is not installed"
                ) from error
            raise ConfigError(
                f"--import {name}: there is no module {error.name!r}, neither installed nor in {os.getcwd()}"
            ) from error
        except Exception as error:
            raise ConfigError(f"--import {name} failed: {type(error).__name__}: {error}") from error
        if not known and set(architectures.names()) == before:
            raise ConfigError(
                f"--import {name} registers no architecture: decorate yours with flserving.models.register(...)"
            )
