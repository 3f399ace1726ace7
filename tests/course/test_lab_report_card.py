"""The report to hand in: it tells what was done, adds up the points, and bears whatever the files
hold."""

import json
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from flserving.lab import report_card
from flserving.lab.exercises import check_cell, solution_cell, student_copy

SOLUTION = "def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"
ANSWERS = {
    "guesses": {"hit rate": {"guess": "25 %", "choices": ["25 %", "48 %"], "measured": "48 %"}},
    "quizzes": {
        "Why <so>?": {"first": "a", "last": "b", "correct": False},
        "And why?": {"first": "c", "last": "c", "correct": True},
    },
    "checks": {
        "lru": {"right": 3, "parts": 4, "tries": 2},
        "of another notebook": {"right": 1, "parts": 1, "tries": 1},
    },
}


@pytest.fixture
def student(tmp_path):
    """A student's folder: one notebook, and what was answered in it."""
    drawn = new_output("display_data", {"image/png": "aGVsbG8=\n"})
    cells = [
        new_code_cell("given()", outputs=[drawn]),
        *(solution_cell("lru", SOLUTION), check_cell("lru", "check(f)", 2)),
        *(solution_cell("che", SOLUTION.replace("f()", "g()")), check_cell("che", "check(g)", 3)),
        new_code_cell("own()", metadata={"tags": ["needs-solution"]}),
    ]
    copy = student_copy(new_notebook(cells=cells))
    copy.cells[-1].outputs = [drawn]
    nbformat.write(copy, tmp_path / "03_caching.ipynb")
    (tmp_path / "my_stack" / "answers").mkdir(parents=True)
    (tmp_path / "my_stack" / "answers" / "03_caching.json").write_text(json.dumps(ANSWERS))
    return tmp_path


def page(student):
    return (student / "my_stack" / "report.html").read_text(encoding="utf-8")


def test_the_report_tells_guesses_answers_points_and_the_students_own_figures(student, capsys):
    assert report_card.main(["--folder", str(student), "--name", "Ada <3"]) == 0
    assert capsys.readouterr().out.startswith("1.5 of 5 points. The report to hand in is ")
    text = page(student)
    assert "<h1>Report of Ada &lt;3</h1>" in text
    assert "<td>hit rate</td><td>25 %</td><td>48 %</td>" in text
    assert "<td>Why &lt;so&gt;?</td><td>a</td><td>no</td><td>b</td>" in text
    assert "<td>lru</td><td>3 of 4</td><td>2</td><td>1.5 of 2</td>" in text
    assert "<td>che</td><td>-</td><td>0</td><td>0 of 3</td>" in text
    assert "<td>03_caching</td><td>1</td><td>1 of 2</td><td>1.5 of 5</td>" in text
    assert text.count("data:image/png;base64,aGVsbG8=") == 1, "not the figure that was given"
    assert "of another notebook" not in text


def test_answers_of_a_notebook_that_was_renamed_are_told_too(student):
    (student / "03_caching.ipynb").rename(student / "03 mine.ipynb")
    assert [chapter.name for chapter in report_card.chapters(student)] == ["03 mine", "03_caching"]


@pytest.mark.parametrize(
    "text",
    [
        "{ half a fi",
        "[]",
        '{"guesses": 3, "quizzes": {"a": 1}, "checks": {"lru": {"right": "all", "parts": null}}}',
        '{"checks": {"lru": {"right": 3, "parts": 0}}}',
        '{"checks": {"lru": []}}',
    ],
)
def test_answers_that_somebody_edited_are_no_reason_to_stop(student, text):
    (student / "my_stack" / "answers" / "03_caching.json").write_text(text)
    assert "0 of 5" in repr(report_card.report_card(folder=student))
    assert ("03_caching.json cannot be read" in page(student)) == (text[:2] == "{ ")


def test_a_notebook_that_is_damaged_is_named(student):
    (student / "04_batching.ipynb").write_text("{ half a notebook")
    report_card.report_card(folder=student)
    assert "04_batching.ipynb is no notebook that can be read" in page(student)


def test_an_empty_folder_gives_a_report_that_says_so(tmp_path):
    report_card.report_card(folder=tmp_path)
    assert "Nothing was guessed" in page(tmp_path)


def test_a_folder_that_is_not_there_or_cannot_be_written_is_told(student, capsys, monkeypatch):
    assert report_card.main(["--folder", str(student / "nowhere")]) == 1
    assert "there is no folder" in capsys.readouterr().err

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("flserving.lab.report_card.replace_file", refuse)
    assert report_card.main(["--folder", str(student)]) == 1
    assert "the report cannot be written: [Errno 13]" in capsys.readouterr().err


@pytest.mark.full
def test_module_runs_as_a_command_without_a_warning(student):
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "flserving.lab.report_card",
        "--folder",
        str(student),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
