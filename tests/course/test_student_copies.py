"""What students get: no solution is left in it, no check passes on it, and everything else in it
runs.

nbval has run the same cells with the solutions in them. Here run the exercises, what stands on a
solution, and what those cells need; every other cell does the same with a stub as with the
solution.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from cell_needs import dependent_cells, needed_cells
from flserving.lab import exercises
from notebook_gates import code_cells, tags

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


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
    """The lines between the markers that say something (``return x`` or ``else:`` may stand
    anywhere)."""
    inside, found = False, set()
    for line in source.splitlines():
        if line.strip() in {exercises.BEGIN, exercises.END}:
            inside = line.strip() == exercises.BEGIN
        elif inside and len(line.strip()) > 20:
            found.add(line.strip())
    return found


def run_as_students(
    copies: dict[str, NotebookNode], checks: dict[str, set[int]]
) -> dict[str, list[str]]:
    """Run copies in one kernel, each in a namespace of its own; of each, what a student should not
    see."""
    chosen = {
        name: _what_a_stub_may_change(student, checks[name]) for name, student in copies.items()
    }
    cells: list[NotebookNode] = []
    for name, places in chosen.items():
        cells += [new_code_cell("%reset -f"), *(copies[name].cells[index] for index in places)]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # two notebooks may use the same one
    everything = new_notebook(cells=cells)
    NotebookClient(everything, timeout=500, kernel_name="python3", allow_errors=True).execute()
    return {
        name: list(_wrong(student, chosen[name], checks[name])) for name, student in copies.items()
    }


def _what_a_stub_may_change(student: NotebookNode, checks: set[int]) -> list[int]:
    stubs = {
        index
        for index, cell in code_cells(student)
        if cell.metadata.get("nbgrader", {}).get("solution")
    }
    return sorted(needed_cells(student, dependent_cells(student, stubs) - checks) | checks)


def _wrong(student: NotebookNode, run: list[int], checks: set[int]) -> Iterator[str]:
    """A check that does not end with the stub's own error; another cell that fails."""
    for index in run:
        cell = student.cells[index]
        error = next((output for output in cell.outputs if output.output_type == "error"), None)
        if index in checks and (error is None or error.ename != "NotImplementedError"):
            ends = f"ends with {error.ename}: {error.evalue}" if error else "passes"
            yield f"the check in cell {index} {ends} before anything is solved: let it call the solution first"
        if index not in checks and error is not None and "raises-exception" not in tags(cell):
            if exercises.NEEDS_SOLUTION in tags(cell) and error.ename == "NotImplementedError":
                continue
            yield f"cell {index} fails with {error.ename} while its exercise is not solved: {cell.source[:60]!r}"


@pytest.mark.skipif(not WITH_EXERCISES, reason="no exercises yet")
def test_the_course_has_exercises_where_it_says(copies):
    assert {path.name for path in copies.iterdir()} == {
        path.name for path in NOTEBOOKS.glob("*.ipynb")
    }
    grade_ids = [exercise.grade_id for path in WITH_EXERCISES for exercise in exercises_in(path)]
    assert len(grade_ids) == len(set(grade_ids))


@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda path: path.stem)
def test_no_solution_is_left(path, copies):
    source = nbformat.read(path, as_version=4)
    student = nbformat.read(copies / path.name, as_version=4)
    nbformat.validate(student)
    secret = set().union(
        *(solution_lines(source.cells[exercise.solution].source) for exercise in exercises_in(path))
    )
    assert secret
    given = {
        line.strip()
        for i, cell in enumerate(source.cells)
        if i not in _solutions(path)
        for line in _lines(cell)
    }
    for index, cell in enumerate(student.cells):
        assert exercises.BEGIN not in cell.source and exercises.END not in cell.source
        leaked = secret & {line.strip() for line in _lines(cell)} - given
        assert not leaked, f"cell {index} still holds {sorted(leaked)}"


def _solutions(path: Path) -> set[int]:
    return {exercise.solution for exercise in exercises_in(path)}


def _lines(cell: nbformat.NotebookNode) -> list[str]:
    return [*cell.source.splitlines(), *str(cell.get("outputs", "")).split("\\n")]


@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda path: path.stem)
def test_every_figure_can_be_looked_at_before_it_is_drawn(path, copies):
    source = nbformat.read(path, as_version=4)
    student = nbformat.read(copies / path.name, as_version=4)
    pictures = {index for index, cell in code_cells(source) if "image/png" in str(cell.outputs)}
    for cell in student.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alt = BeautifulSoup(output.data["text/html"], "html.parser").img["alt"]
                assert alt == output.metadata["image/png"]["alt"], (
                    "JupyterLab would read out nothing"
                )
    lost = {index for index in pictures if "image/png" not in str(student.cells[index].outputs)}
    assert all(exercises.NEEDS_SOLUTION in tags(source.cells[index]) for index in lost)
    assert len(lost) < len(pictures)


@pytest.mark.timeout(1800)
def test_no_check_passes_and_every_other_cell_runs(copies, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    students = {
        path.name: nbformat.read(copies / path.name, as_version=4) for path in WITH_EXERCISES
    }
    checks = {
        path.name: {exercise.check for exercise in exercises_in(path)} for path in WITH_EXERCISES
    }
    wrong = run_as_students(students, checks)
    assert not any(wrong.values()), wrong


def test_the_run_notices_a_useless_check_and_a_cell_that_needs_the_solution(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    solution = "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"
    source = new_notebook(
        cells=[
            new_code_cell("found, six = [], 3"),
            new_code_cell("found.append(six)"),
            new_code_cell("raise OSError('nothing below needs this cell')"),
            exercises.solution_cell("double", solution),
            exercises.check_cell("double", "assert callable(double)", points=1),
            new_code_cell("print(double(found[0]))"),
            new_code_cell("double('x')", metadata={"tags": ["raises-exception"]}),
            new_code_cell("twice = double(six)", metadata={"tags": ["needs-solution"]}),
            new_code_cell("print(twice)", metadata={"tags": ["needs-solution"]}),
            exercises.solution_cell(
                "triple", solution.replace("double", "triple").replace("2", "3")
            ),
            exercises.check_cell("triple", "assert triple(nine) == 9", points=1),
        ]
    )
    student = exercises.student_copy(source)
    wrong = run_as_students(
        {"first": student, "again": copy.deepcopy(student)}, {"first": {4, 10}, "again": {4, 10}}
    )
    assert wrong["first"] == wrong["again"]
    useless, fails, unbound, not_first = wrong["first"]
    assert "the check in cell 4 passes before anything is solved" in useless
    assert "cell 5 fails with NotImplementedError" in fails
    assert "cell 8 fails with NameError" in unbound
    assert "the check in cell 10 ends with NameError" in not_first
