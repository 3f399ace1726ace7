"""Errors that a student should read as one sentence: in a notebook they show their text, and no
traceback.

The error itself stays an error: ``pytest``, ``nbclient`` and ``nbgrader`` see it fail.
"""

import linecache
import re
import sys
import textwrap
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from IPython import get_ipython

# how the line ends that stands where a solution will stand
STUB = "replace this line with your code"
_CHECK = re.compile(r"^\s*check_\w+\(", re.MULTILINE)


def wrapped(text: str) -> str:
    """A text in lines that fit a cell beside the file browser: a front end breaks longer ones
    within a word."""
    return "\n".join(
        textwrap.fill(line, 88, break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )


class SentenceError(Exception):
    """Something that the student can mend; the text says what and how."""

    def _render_traceback_(self) -> list[str]:
        return [wrapped(str(self))]


def install() -> None:
    """Inside IPython: an exercise that waits for its code, and a check before its exercise, are
    told in a sentence.

    An error that came through the package is shown with the lines of the student's cells, and no
    others.
    """
    shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc((Exception, KeyboardInterrupt), _show)


def in_one_sentence(error: BaseException, cell: str) -> str | None:
    """What to tell instead of the traceback of an error in this cell; None if the traceback says
    more."""
    if isinstance(error, NotImplementedError) and str(error).endswith(STUB):
        exercise = str(error).partition(":")[0]
        return (
            f"The exercise {exercise!r} waits for your code: in its cell, replace the line that raises "
            "NotImplementedError, run that cell, then this one again."
        )
    if type(error) is NameError and _asked_by_the_cell(error, cell):
        return (
            f"{error.name} is not there yet: first run the cells above, up to the one that defines it, "
            "then this one again. If none defines it, look at its spelling."
        )
    if hasattr(error, "_render_traceback_") or not _through_the_package(error):
        return None
    what = (
        "Interrupted"
        if isinstance(error, KeyboardInterrupt)
        else f"{type(error).__name__}: {error}"
    )
    lines = [f"  line {number} of a cell: {source}" for number, source in students_lines(error)]
    notes = getattr(error, "__notes__", ())
    return "\n".join(
        [what, *notes, "It came through", *lines, "(%tb shows the lines of the package, too)"]
    )


def students_lines(error: BaseException | None) -> Iterator[tuple[int, str]]:
    """The lines of cells that an error came through, with their numbers in the cell, the innermost
    last."""
    for trace in _traces(error):
        if trace.tb_frame.f_globals.get("__name__") == "__main__":
            yield (
                trace.tb_lineno,
                linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip(),
            )


def _asked_by_the_cell(error: NameError, cell: str) -> bool:
    """Whether the cell itself misses a name, not a function in it; or it calls a check with it."""
    *_, last = _traces(error)
    itself = (
        last.tb_frame.f_code.co_name == "<module>"
        and last.tb_frame.f_globals.get("__name__") == "__main__"
    )
    return itself or bool(error.name and _CHECK.search(cell) and error.name in cell)


def _traces(error: BaseException | None) -> Iterator[TracebackType]:
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _through_the_package(error: BaseException) -> bool:
    package = __name__.partition(".")[0]
    return any(
        str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] == package
        for trace in _traces(error)
    )


def _show(
    shell: Any,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType,
    tb_offset: Any = 0,
) -> None:
    history = shell.user_ns.get("In") or [""]
    told = in_one_sentence(error, str(history[-1]))
    if told is None:
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
    else:
        sys.last_type, sys.last_value, sys.last_traceback = kind, error, trace  # for %tb
        shell._showtraceback(kind, error, [wrapped(told)])
