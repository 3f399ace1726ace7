"""Errors in a notebook: one sentence where that says all, else the student's own lines, never those
of the package."""

import sys
from types import SimpleNamespace

import pytest

from flserving.errors import InvalidInputError
from flserving.lab.checks import check_fedavg
from flserving.lab.checks.parts import CheckError
from flserving.lab.workbook import sentences
from flserving.lab.workbook.sentences import in_one_sentence


def error_of(cell, tmp_path, **names):
    """What a cell raises when it runs as in a kernel, in ``__main__``."""
    path = tmp_path / "cell.py"
    path.write_text(cell)
    try:
        exec(compile(cell, str(path), "exec"), {"__name__": "__main__", **names})
    except BaseException as error:
        return error
    raise AssertionError("the cell raised nothing")


@pytest.mark.parametrize(
    "cell",
    [
        "mean = fedavg(1)",
        "from flserving.lab.checks import check_fedavg\ncheck_fedavg(fedavg)",
        "lab.keep(fedavg)",
    ],
)
def test_a_cell_that_comes_before_what_it_uses_is_told_so(cell, tmp_path):
    told = in_one_sentence(error_of(cell, tmp_path, lab=SimpleNamespace(keep=print)), cell)
    assert told.startswith("fedavg is not there yet: first run the cells above")


def test_a_name_that_a_function_of_the_student_misses_keeps_its_traceback(tmp_path):
    cell = "def solve():\n    return typpo\nsolve()"
    assert in_one_sentence(error_of(cell, tmp_path), cell) is None


def test_an_error_that_came_through_the_package_shows_the_lines_of_cells(tmp_path):
    cell = "def mine(x):\n    raise InvalidInputError('three rows, two answers')\n\nthrough(mine)"
    names = {"through": through_the_package, "InvalidInputError": InvalidInputError}
    assert in_one_sentence(error_of(cell, tmp_path, **names), cell) == (
        "InvalidInputError: three rows, two answers\n"
        "It came through\n"
        "  line 4 of a cell: through(mine)\n"
        "  line 2 of a cell: raise InvalidInputError('three rows, two answers')\n"
        "(%tb shows the lines of the package, too)"
    )
    interrupted = "def mine(x):\n    raise KeyboardInterrupt\n\nthrough(mine)"
    assert in_one_sentence(error_of(interrupted, tmp_path, **names), interrupted).startswith(
        "Interrupted\n"
    )


def through_the_package(function):
    """Calls a function from a module of the package."""
    exec("function(0)", {"__name__": "flserving.somewhere", "function": function})


def test_an_error_of_the_students_own_lines_keeps_its_traceback(tmp_path):
    assert in_one_sentence(error_of("1 / 0", tmp_path), "1 / 0") is None


def test_a_failed_check_tells_its_own_sentence(tmp_path):
    cell = "check_fedavg(lambda updates, counts: None)"
    error = error_of(cell, tmp_path, check_fedavg=check_fedavg)
    assert isinstance(error, CheckError) and in_one_sentence(error, cell) is None


def test_the_whole_traceback_is_there_for_who_asks(tmp_path, monkeypatch):
    for name in ("last_type", "last_value", "last_traceback"):
        monkeypatch.setattr(sys, name, None, raising=False)
    error, shown = error_of("through(len)", tmp_path, through=through_the_package), []
    shell = SimpleNamespace(
        user_ns={"In": ["", "through(len)"]},
        _showtraceback=lambda kind, value, lines: shown.append(lines),
    )
    sentences._show(shell, type(error), error, error.__traceback__)
    assert "line 1 of a cell: through(len)" in shown[0][0]
    assert sys.last_value is error and sys.last_traceback is error.__traceback__
