"""How a check is judged: part by part, with marks, and with hints that grow with the tries."""

import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flserving.lab.checks import limits
from flserving.lab.workbook.answers import record, recorded
from flserving.lab.workbook.sentences import STUB, students_lines, wrapped

# (exercise, part) -> how often it was the first to fail
_failed_tries: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that a solution must do, judged by itself.

    Args:
        name: What it must do, in a few words: "keeps what was put".
        check: Called with the solution; raises AssertionError with a sentence that says what is
            wrong.
        hints: Shown one more at each further try that fails here: first where to look, at last
            nearly the code.
    """

    name: str
    check: Callable[[Any], object]
    hints: tuple[str, ...] = ()


class CheckError(AssertionError):
    """What is wrong with a solution, in a sentence; a notebook shows it with the marks and hints,
    and no traceback."""

    def __init__(self, message: str, marks: str = "", hints: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.marks = marks
        self.hints = hints

    def _render_traceback_(self) -> list[str]:
        where = _students_line(self.__cause__)
        hints = [f"Hint {number}: {hint}" for number, hint in enumerate(self.hints, start=1)]
        return [line for line in (*map(wrapped, (str(self), where, *hints)), self.marks) if line]


class _InterruptedError(KeyboardInterrupt):
    """The student pressed the stop button: a notebook shows the line where the code was, and no
    traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"The check was interrupted. {_students_line(self.__cause__)}"]


def judge(exercise: str, solution: Any, *parts: Part) -> None:
    """Judge every part of a solution, and keep the marks for the report; say so where all are
    right.

    Raises:
        CheckError: Of the first part that fails; it names the parts that are right.
        NotImplementedError: The stub's own, where nothing is solved yet.
    """
    failures: dict[str, BaseException] = {}
    with limits.few_lines():
        for part in parts:
            if any(isinstance(error.__cause__, limits.TooLongError) for error in failures.values()):
                # it would hang here, too
                failures[part.name] = AssertionError(f"{part.name}: not judged")
            elif failure := _failure(exercise, part, solution):
                failures[part.name] = failure
    before = recorded("checks").get(exercise, {})
    right = len(parts) - len(failures)
    record(
        "checks",
        exercise,
        {"right": right, "parts": len(parts), "tries": before.get("tries", 0) + 1},
    )
    for part in parts:
        if part.name not in failures:
            _failed_tries.pop((exercise, part.name), None)
            continue
        earlier = _failed_tries[exercise, part.name]
        _failed_tries[exercise, part.name] += 1
        marks = [
            f"  {'not yet' if each.name in failures else 'done   '}  {each.name}" for each in parts
        ]
        first = failures[part.name]
        raise CheckError(
            str(first),
            "\n".join([f"{right} of {len(parts)} parts are right:", *marks]),
            part.hints[:earlier],
        ) from first.__cause__
    print(wrapped(f"Right: {', '.join(part.name for part in parts)}."))


def _failure(exercise: str, part: Part, solution: Any) -> BaseException | None:
    """What one part says of a solution, as a sentence with the student's own error as its cause."""
    cause: BaseException
    try:
        with limits.time_limit(limits.LIMIT_S):
            part.check(solution)
        return None
    except AssertionError as error:
        if not callable(solution) and "not callable" in str(error):
            return AssertionError(
                f"the check of {exercise!r} got {reprlib.repr(solution)}, no function and no class: run the cell of "
                "the exercise again, and give its name to the check"
            )
        if str(error) and not _is_students(error):
            return error
        cause = error
        told = f"your code raised AssertionError {error}".rstrip()
    except limits.TooLongError as error:
        cause = error
        told = f"your code was stopped after {limits.LIMIT_S:g} s: it loops or waits for ever"
    except KeyboardInterrupt as error:
        raise _InterruptedError(error) from error
    except NotImplementedError as error:
        if str(error).endswith(STUB):
            raise
        cause = error
        told = (
            f"your code raised NotImplementedError {error}".rstrip() + ": that line waits for code"
        )
    except SystemExit as error:
        cause = error
        told = "your code ends Python (exit, quit or SystemExit): return instead"
    except Exception as error:  # a later part may stumble over what an earlier one has told
        cause = error
        told = f"not yet; {type(error).__name__}: {error}"
    failure = AssertionError(f"{part.name}: {told}")
    failure.__cause__ = cause
    return failure


def _is_students(error: BaseException) -> bool:
    """Whether the line that raised it is in a cell, not in a check."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == "__main__"


def _students_line(error: BaseException | None) -> str:
    """The last line of the student's own code that an error came through."""
    found = ""
    for number, source in students_lines(error):
        found = f"It came from line {number} of your cell: {source}"
    return found
