"""How a check calls a student's code, and compares: an exception becomes a sentence that says which
call raised it."""

import threading
import time
from collections.abc import Callable
from typing import Any


def ask(call: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``; what it raises is reported as a failure of ``call``, a stub's own
    error passes."""
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


def together(call: Callable[[int], Any], callers: int, patience_s: float) -> list[Any]:
    """What threads that begin at the same moment return or raise, of those that end in time."""
    gate = threading.Barrier(callers)
    ends = list[Any]()

    def caller(number: int) -> None:
        gate.wait()
        try:
            ends.append(call(number))
        except BaseException as error:
            ends.append(error)

    threads = [
        threading.Thread(target=caller, args=(number,), daemon=True) for number in range(callers)
    ]
    for thread in threads:
        thread.start()
    ends_s = time.monotonic() + patience_s
    for thread in threads:
        thread.join(max(0.0, ends_s - time.monotonic()))
    return list(ends)
