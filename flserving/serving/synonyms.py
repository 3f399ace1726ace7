"""Second names: whoever types ``version_id`` reaches the ``version`` that there is."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from flserving.errors import InvalidInputError

P = ParamSpec("P")
R = TypeVar("R")


def version_id_too(method: Callable[P, R]) -> Callable[P, R]:
    """Let ``method`` take its argument ``version`` also by the name ``version_id``.

    Raises:
        InvalidInputError: From the method, where both names are given.
    """

    @functools.wraps(method)
    def named(*args: Any, **options: Any) -> R:
        if "version_id" in options:
            if "version" in options:
                raise InvalidInputError(
                    "version and version_id are two names of one thing: give one of them"
                )
            options["version"] = options.pop("version_id")
        return method(*args, **options)

    return named
