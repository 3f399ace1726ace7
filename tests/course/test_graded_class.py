"""The made-up class: who hands in what, what a teacher must look into; once, from nothing to
marks."""

import csv

import nbformat
import pytest

import graded_class
from graded_class import ROOT, SOLUTION, STUB, Mark
from wrong_solutions import WRONG

NOTEBOOK = ROOT / "notebooks" / "02_the_serving_stack.ipynb"


def test_the_first_hands_in_stubs_the_second_solutions_and_the_others_a_mixture():
    exercises = ["lru", "batcher", "fedavg"]
    handed_in = graded_class.submissions(exercises, 30, seed=0)
    first, second, *others = handed_in.values()
    assert set(first.values()) == {STUB} and set(second.values()) == {SOLUTION}
    assert len(handed_in) == 30 and handed_in == graded_class.submissions(exercises, 30, seed=0)
    assert handed_in != graded_class.submissions(exercises, 30, seed=1)
    kinds = {exercise: {each[exercise] for each in others} for exercise in exercises}
    assert {STUB, SOLUTION} < set().union(*kinds.values())
    assert all(kinds[exercise] <= {STUB, SOLUTION, *WRONG[exercise]} for exercise in exercises)


def test_an_assignment_holds_the_exercises_and_what_they_need():
    whole = nbformat.read(NOTEBOOK, as_version=4)
    everything = len(whole.cells)
    short = graded_class.assignment_of(whole, whole=False)
    ids = [
        cell.metadata["nbgrader"]["grade_id"] for cell in short.cells if "nbgrader" in cell.metadata
    ]
    assert ids == ["stage-timer", "stage-timer-check", "by-hand", "by-hand-check",
                   "admission", "admission-check", "latency-budget", "latency-budget-check"]  # fmt: skip
    assert len(short.cells) < everything / 2


@pytest.mark.parametrize(
    ("mark", "told"),
    [
        (Mark("lru", STUB, 0, 2), ""),
        (Mark("lru", SOLUTION, 2, 2), ""),
        (Mark("lru", "FIFO", 1, 2), ""),
        (Mark("lru", STUB, 0.5, 2), "the stub of lru got 0.5 points"),
        (Mark("lru", SOLUTION, 1.5, 2), "the solution of lru got 1.5 of 2 points"),
        (Mark("lru", "FIFO", 2, 2), "the wrong solution 'FIFO' of lru got all points"),
    ],
)
def test_what_a_teacher_must_look_into(mark, told):
    assert mark.surprise == told


def test_the_command_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graded_class, "find_spec", lambda name: None)
    assert graded_class.main([str(NOTEBOOK)]) == 1
    assert "nbgrader is not installed: pip install" in capsys.readouterr().err
    monkeypatch.setattr(graded_class, "find_spec", lambda name: name)
    (tmp_path / "marks.csv").write_text("of last week")
    assert graded_class.main([str(NOTEBOOK), "--out", str(tmp_path)]) == 1
    assert "is not empty: name a new folder" in capsys.readouterr().err
    without = NOTEBOOK.with_name("00_start_here.ipynb")
    assert graded_class.main([str(without), "--out", str(tmp_path / "new")]) == 1
    assert "has no exercises" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        graded_class.main([str(NOTEBOOK), "--students", "1"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_nothing_to_a_graded_class(tmp_path, capsys):
    pytest.importorskip("nbgrader", reason='needs the extra grading: pip install -e ".[grading]"')
    out = tmp_path / "graded"
    assert graded_class.main([str(NOTEBOOK), "--students", "4", "--out", str(out)]) == 0
    assert (
        "every stub got 0 points, every solution all, every wrong solution less"
        in capsys.readouterr().out
    )
    with (out / "marks.csv").open(newline="") as file:
        marks = {
            row["student"]: float(row["points"]) / float(row["of"]) for row in csv.DictReader(file)
        }
    assert (len(marks), marks["student-01"], marks["student-02"]) == (4, 0, 1)
    for student in marks:
        feedback = out / "feedback" / student / "week" / f"{NOTEBOOK.stem}.html"
        assert "stage-timer-check" in feedback.read_text(encoding="utf-8")
