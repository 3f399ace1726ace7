"""Checks judge part by part: the first failure is told, the rest is counted, and hints grow with
the tries."""

import pytest

from flserving.lab.checks.parts import CheckError, Part, judge
from flserving.lab.workbook import answers


def _is_even(number):
    if number % 2:  # no bare assert: pytest would add to its text
        raise AssertionError(f"{number} is odd")


def _is_large(number):
    if number <= 10:
        raise AssertionError(f"{number} is small")


PARTS = (Part("is even", _is_even, ("Divide by two.", "Use % 2.")), Part("is large", _is_large))


@pytest.fixture
def exercise(request):
    return request.node.name  # tries are counted by exercise


def tell(exercise, solution):
    with pytest.raises(CheckError) as caught:
        judge(exercise, solution, *PARTS)
    return caught.value


def test_a_right_solution_passes_and_its_marks_are_kept(exercise, capsys):
    judge(exercise, 12, *PARTS)
    assert capsys.readouterr().out == "Right: is even, is large.\n"
    assert answers.recorded("checks")[exercise] == {"right": 2, "parts": 2, "tries": 1}


def test_the_first_failure_is_told_and_every_part_is_judged(exercise):
    error = tell(exercise, 13)
    assert str(error) == "13 is odd"
    assert error.marks == "1 of 2 parts are right:\n  not yet  is even\n  done     is large"
    assert answers.recorded("checks")[exercise] == {"right": 1, "parts": 2, "tries": 1}
    assert str(tell(exercise, 4)) == "4 is small"
    assert answers.recorded("checks")[exercise]["tries"] == 2


def test_hints_grow_with_the_tries_that_fail_at_the_same_part(exercise):
    assert [tell(exercise, 13).hints for _ in range(4)] == [
        (), ("Divide by two.",), ("Divide by two.", "Use % 2."), ("Divide by two.", "Use % 2."),
    ]  # fmt: skip
    judge(exercise, 12, *PARTS)
    assert tell(exercise, 13).hints == (), "who has solved it once begins anew"


def test_a_notebook_shows_sentence_hint_and_marks_and_no_traceback(exercise):
    tell(exercise, 13)
    assert tell(exercise, 13)._render_traceback_() == [
        "13 is odd",
        "Hint 1: Divide by two.",
        "1 of 2 parts are right:\n  not yet  is even\n  done     is large",
    ]


def test_a_long_sentence_is_broken_between_words_and_keeps_its_own_lines(exercise):
    def tells(_):
        raise AssertionError("word " * 40 + "end\nof two lines")

    with pytest.raises(CheckError) as caught:
        judge(exercise, None, Part("says much", tells))
    lines = caught.value._render_traceback_()[0].split("\n")
    assert len(lines) == 4 and max(map(len, lines)) <= 88
    assert " ".join(lines[:3]) == "word " * 40 + "end" and lines[3] == "of two lines"


def test_an_error_of_the_students_code_is_shown_with_its_line(exercise, tmp_path):
    cell = tmp_path / "cell.py"
    cell.write_text("def solve():\n    return [][3]\n")
    names = {"__name__": "__main__"}
    exec(compile(cell.read_text(), str(cell), "exec"), names)

    def ask(solution):
        try:
            solution()
        except IndexError as error:
            raise AssertionError("solve() raised IndexError") from error

    with pytest.raises(CheckError) as caught:
        judge(exercise, names["solve"], Part("runs", ask))
    assert isinstance(caught.value.__cause__, IndexError)
    assert caught.value._render_traceback_()[1] == "It came from line 2 of your cell: return [][3]"


def test_a_part_that_stumbles_over_an_earlier_mistake_counts_as_not_yet(exercise):
    """Parts are judged one by one: the first has told that there is no list, the second may trip
    over it."""

    def is_a_list(numbers):
        if not isinstance(numbers, list):
            raise AssertionError("return a list")

    parts = Part("is a list", is_a_list), Part("is sorted", lambda numbers: sorted(numbers))
    with pytest.raises(CheckError, match="return a list") as caught:
        judge(exercise, None, *parts)
    assert (
        caught.value.marks == "0 of 2 parts are right:\n  not yet  is a list\n  not yet  is sorted"
    )
    with pytest.raises(CheckError, match="is sorted: not yet; TypeError"):
        judge(exercise, None, parts[1])


def test_a_stub_is_no_try(exercise):
    def waits(_):
        raise NotImplementedError("double: replace this line with your code")

    with pytest.raises(NotImplementedError):
        judge(exercise, None, Part("runs", waits))
    assert exercise not in answers.recorded("checks")
