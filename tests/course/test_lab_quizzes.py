"""Every quiz is one that can be failed and learnt from: five questions, a reason for every answer,
no giveaway."""

import re
from pathlib import Path

import nbformat
import pytest

from flserving.lab.workbook.answers import QUIZZES, questions, quiz

NAMES = sorted(path.stem for path in QUIZZES.iterdir())
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def cells_of(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells


@pytest.mark.parametrize("name", NAMES)
def test_a_quiz_has_five_questions_with_a_reason_for_every_answer(name):
    asked = questions(name)
    assert len(asked) == 5
    for question in asked:
        assert 3 <= len(question.choices()) <= 5, question.text
        assert all(len(choice) <= 90 for choice in question.choices()), (
            f"{question.text}: radio buttons do not wrap"
        )
        for choice in question.choices():
            assert re.fullmatch(r"(Correct|No): .{15,}\.", question.told(choice)), question.told(
                choice
            )
        shown = [question.text, *question.choices(), *map(question.told, question.choices())]
        assert not re.search(r"[`*$]", "".join(shown)), "buttons show no Markdown"


@pytest.mark.parametrize("name", NAMES)
def test_the_correct_answer_is_not_told_by_its_length_or_place(name):
    asked = questions(name)
    places = [question.choices().index(question.answer) for question in asked]
    longest = [question.answer == max(question.choices(), key=len) for question in asked]
    assert max(map(places.count, places)) < 5
    assert sum(longest) <= 2


def test_no_question_is_asked_twice():
    texts = [question.text for name in NAMES for question in questions(name)]
    assert len(texts) == len(set(texts)), "answers are kept by the text of the question"


@pytest.mark.parametrize("name", NAMES)
def test_each_quiz_stands_at_the_end_of_its_notebook(name):
    (cell,) = [cell for cell in cells_of(name)[-3:] if cell.source == f'lab.quiz("{name}")']
    shown = "".join(output.get("data", {}).get("text/markdown", "") for output in cell.outputs)
    assert shown == quiz(name).markdown, "store the notebook anew"


@pytest.mark.parametrize("name", NAMES)
def test_every_guess_is_asked_for_at_the_top_and_revealed_later(name):
    calls = [
        re.findall(r"^lab\.(guess|reveal)\(\s*([^,]+),", cell.source, re.MULTILINE)
        for cell in cells_of(name)
        if cell.cell_type == "code"
    ]
    asked = [what for found in calls[:4] for call, what in found if call == "guess"]
    told = [what for found in calls for call, what in found if call == "reveal"]
    assert asked and sorted(asked) == sorted(told)
