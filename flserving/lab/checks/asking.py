"""How a check calls a student's code, and compares: an exception becomes a sentence that says which call raised it."""

from collections.abc import Callable
from typing import Any


def ask(call: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``; what it raises is reported as a failure of ``call``, a stub's own error passes."""
    try:
        return function(*arguments)
    except (NotImplementedError, AssertionError):
        raise
    except Exception as error:
        raise AssertionError(f"{call} raised {type(error).__name__}: {error}") from error


def equal(got: Any, wanted: Any) -> bool:
    """Whether a student's number is this one; what is no number is not."""
    try:
        return bool(abs(float(got) - float(wanted)) < 1e-6)
    except (TypeError, ValueError):
        return False
