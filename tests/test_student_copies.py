"""What students get: no solution is left in it, no check passes on it, and everything else in it runs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from flserving.lab import exercises
from notebook_gates import code_cells, tags

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def exercises_in(path: Path) -> list[exercises.Exercise]:
    return exercises.find_exercises(nbformat.read(path, as_version=4))


WITH_EXERCISES = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if exercises_in(path)]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The copies of the whole course, made by the command of the README."""
    out = tmp_path_factory.mktemp("class") / "student"
    assert exercises.main(["--notebooks", str(NOTEBOOKS), "--out", str(out)]) == 0
    return out


def solution_lines(source: str) -> set[str]:
    """The lines between the markers that say something (``return x`` or ``else:`` may stand anywhere)."""
    inside, found = False, set()
    for line in source.splitlines():
        if line.strip() in {exercises.BEGIN, exercises.END}:
            inside = line.strip() == exercises.BEGIN
        elif inside and len(line.strip()) > 20:
            found.add(line.strip())
    return found


def run_as_student(student: nbformat.NotebookNode, checks: set[int]) -> list[str]:
    """Run all, go on after errors; what a student should not see: a check that passes, another cell that fails."""
    NotebookClient(student, timeout=300, kernel_name="python3", allow_errors=True).execute()
    wrong = []
    for index, cell in code_cells(student):
        errors = [output.ename for output in cell.outputs if output.output_type == "error"]
        if index in checks and not errors:
            wrong.append(f"the check in cell {index} passes before anything is solved")
        if index not in checks and errors and "raises-exception" not in tags(cell):
            wrong.append(f"cell {index} fails with {errors[0]} while its exercise is not solved: {cell.source[:60]!r}")
    return wrong


@pytest.mark.skipif(not WITH_EXERCISES, reason="no exercises yet")
def test_the_course_has_exercises_where_it_says(copies):
    assert {path.name for path in copies.iterdir()} == {path.name for path in NOTEBOOKS.glob("*.ipynb")}
    grade_ids = [exercise.grade_id for path in WITH_EXERCISES for exercise in exercises_in(path)]
    assert len(grade_ids) == len(set(grade_ids))


@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda path: path.stem)
def test_no_solution_is_left(path, copies):
    source = nbformat.read(path, as_version=4)
    student = nbformat.read(copies / path.name, as_version=4)
    nbformat.validate(student)
    secret = set().union(*(solution_lines(source.cells[exercise.solution].source) for exercise in exercises_in(path)))
    assert secret
    given = {line.strip() for i, cell in enumerate(source.cells) if i not in _solutions(path) for line in _lines(cell)}
    for index, cell in enumerate(student.cells):
        assert exercises.BEGIN not in cell.source and exercises.END not in cell.source
        leaked = secret & {line.strip() for line in _lines(cell)} - given
        assert not leaked, f"cell {index} still holds {sorted(leaked)}"


def _solutions(path: Path) -> set[int]:
    return {exercise.solution for exercise in exercises_in(path)}


def _lines(cell: nbformat.NotebookNode) -> list[str]:
    return [*cell.source.splitlines(), *str(cell.get("outputs", "")).split("\\n")]


@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda path: path.stem)
@pytest.mark.timeout(600)
def test_no_check_passes_and_every_other_cell_runs(path, copies, tmp_path, monkeypatch):
    """Widgets are drawn at every corner of their sliders on the way."""
    monkeypatch.setenv("FLSERVING_STATIC", "1")
    monkeypatch.chdir(tmp_path)
    student = nbformat.read(copies / path.name, as_version=4)
    wrong = run_as_student(student, {exercise.check for exercise in exercises_in(path)})
    assert not wrong, "\n".join(wrong)


def test_the_run_notices_a_useless_check_and_a_cell_that_needs_the_solution(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    solution = "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"
    source = new_notebook(
        cells=[
            exercises.solution_cell("double", solution),
            exercises.check_cell("double", "assert callable(double)", points=1),
            new_code_cell("print(double(3))"),
            new_code_cell("double('x')", metadata={"tags": ["raises-exception"]}),
        ]
    )
    wrong = run_as_student(exercises.student_copy(source), {1})
    assert len(wrong) == 2
    assert "the check in cell 1 passes before anything is solved" in wrong[0]
    assert "cell 2 fails with NotImplementedError" in wrong[1]
