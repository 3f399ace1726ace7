"""What an installation may lack: packages of an extra, and the words for it."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flserving.errors import NotSupportedError


@contextmanager
def of_extra(extra: str) -> Iterator[None]:
    """Around imports of packages that only ``pip install "flserving[extra]"`` brings.

    Raises:
        NotSupportedError: One of them is not installed; the message names it and the command.
    """
    try:
        yield
    except ImportError as error:
        raise NotSupportedError(
            f'{error.name} is not installed: pip install "flserving[{extra}]"'
        ) from error


def need(package: str, extra: str) -> Any:
    """Import a package of an extra, by its name. Raises NotSupportedError where it is not
    installed."""
    with of_extra(extra):
        return importlib.import_module(package)
