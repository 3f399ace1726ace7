"""Exercises in notebooks: nbgrader's cell format, its validation, and the copies that students get.

A source notebook holds the solutions, between ``### BEGIN SOLUTION`` and ``### END SOLUTION``, and
passes its checks. ``python -m flserving.lab.exercises --out student`` writes the copies without
them, and ``python run.py lab`` opens such a copy. The format is nbgrader's (schema 3), so that
``nbgrader generate_assignment`` and ``autograde`` read the same notebooks; nbgrader itself is not
needed here.
"""

import argparse
import ast
import copy
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from flserving.errors import ConfigError, FlservingError
from flserving.lab.style import picture_tag
from flserving.lab.workbook.answers import replace_file

BEGIN = "### BEGIN SOLUTION"
END = "### END SOLUTION"
NEEDS_SOLUTION = "needs-solution"
"""The tag of a cell that plugs a student's part into the stack: with a stub it says so, and no
other cell needs it."""
_REGION = re.compile(rf"^([ \t]*){BEGIN}[ \t]*\n(.*?)^[ \t]*{END}[ \t]*$", re.DOTALL | re.MULTILINE)

_KEEPS = re.compile(r"\bkeep\(")
# as checks.parts.judge tells them
_PARTS = re.compile(r"^(\d+) of (\d+) parts are right", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Exercise:
    """One exercise: where its solution and its check stand (cell numbers from 0), and what it is
    worth."""

    grade_id: str
    solution: int
    check: int
    points: float


def solution_cell(grade_id: str, source: str) -> NotebookNode:
    """A code cell with one or more solution regions; students get the rest of it."""
    return _code_cell(source, grade_id=grade_id, solution=True, grade=False, locked=False)


def check_cell(grade_id: str, source: str, points: float) -> NotebookNode:
    """The check of exercise ``grade_id``: visible, locked, worth ``points``. It must fail on the
    stub."""
    return _code_cell(
        source, grade_id=f"{grade_id}-check", solution=False, grade=True, locked=True, points=points
    )


def find_exercises(notebook: NotebookNode) -> list[Exercise]:
    """The exercises of a notebook, in order, once everything about them is right.

    Raises:
        ConfigError: A grade_id is missing or used twice, markers are unbalanced or outside a
            solution cell, a region is empty or not inside a function, points are not positive, or a
            solution has no check after it (or a check no solution before it).
    """
    exercises: list[Exercise] = []
    seen: set[str] = set()
    open_solution: tuple[str, int] | None = None
    for number, cell in enumerate(notebook.cells):
        grading = cell.metadata.get("nbgrader", {})
        if not grading.get("solution"):
            leaks = BEGIN in cell.source or END in cell.source
            _require(
                not leaks,
                f"cell {number} holds a solution that students would get: make it with solution_cell(...)",
            )
        if not (grading.get("solution") or grading.get("grade")):
            continue
        grade_id = str(grading.get("grade_id") or "")
        _require(grade_id, f"cell {number} has no grade_id: give it one")
        _require(grade_id not in seen, f"grade_id {grade_id!r} is used twice: each needs its own")
        _require(
            cell.cell_type == "code",
            f"exercise cell {grade_id!r} is {cell.cell_type}: only code can be checked",
        )
        seen.add(grade_id)
        if grading.get("solution"):
            _require(
                open_solution is None,
                f"{grade_id!r} comes before the check of {open_solution}: add check_cell(...)",
            )
            _stub(cell.source, grade_id)
            open_solution = (grade_id, number)
            continue
        if open_solution is None or grade_id != f"{open_solution[0]}-check":
            raise ConfigError(
                f"check {grade_id!r} does not follow its solution: that must be the exercise cell before it"
            )
        points = grading.get("points", 0)
        _require(points > 0, f"check {grade_id!r} is worth {points!r} points: give it more than 0")
        exercises.append(Exercise(open_solution[0], open_solution[1], number, points))
        open_solution = None
    _require(
        open_solution is None,
        f"solution {open_solution} has no check after it: add check_cell(...)",
    )
    return exercises


def student_copy(notebook: NotebookNode) -> NotebookNode:
    """The notebook as students get it: stubs for solutions, no cell numbers, and the outputs that
    they too will see.

    So a figure can be looked at before anything has run, as HTML too (see
    :class:`flserving.lab.style.LabFigure`). The outputs of exercises, of their checks and of cells
    that use a solution or keep it go: they would speak of code that is not there yet.
    """
    exercises = find_exercises(notebook)
    student = copy.deepcopy(notebook)
    student.metadata.pop("widgets", None)
    own = set()
    for exercise in exercises:
        own |= {exercise.solution, exercise.check}
        cell = student.cells[exercise.solution]
        cell.source = _stub(cell.source, exercise.grade_id)
        student.cells[exercise.check].metadata.update(editable=False, deletable=False)
    for number, cell in enumerate(student.cells):
        if cell.cell_type == "code":
            cell.execution_count = None
            plugs_in = NEEDS_SOLUTION in cell.metadata.get("tags", [])
            if number in own or plugs_in or _KEEPS.search(cell.source):
                cell.outputs = []
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
                alt = output.get("metadata", {}).get("image/png", {}).get("alt")
                if alt:  # JupyterLab shows this, and reads it out; the PNG is for what cannot
                    output.data["text/html"] = picture_tag(output.data["image/png"], alt)
    return student


def part_marks(notebook: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
    """A step of nbgrader's autograde: a check that fails in one part of four gives three quarters
    of its points.

    nbgrader gives 0 points for an error, unless a number stands before it: that it takes for the
    points. For it to run, nbgrader_config.py says ``c.Autograde.autograde_preprocessors.insert(1,
    "flserving.lab.exercises.part_marks")``.
    """
    for cell in notebook.cells:
        grading = cell.metadata.get("nbgrader", {})
        if not grading.get("grade"):
            continue
        for output in list(cell.get("outputs", [])):
            if output.get("ename") != "CheckError":
                continue
            found = _PARTS.search("\n".join(output.traceback))
            if found:
                points = grading["points"] * int(found[1]) / int(found[2])
                told = {"text/plain": f"{points:.2f}"}
                cell.outputs.insert(0, nbformat.v4.new_output("execute_result", told))  # type: ignore[no-untyped-call]
    return notebook, resources


def write_student_copies(
    notebooks: Path, out: Path, *, force: bool = False
) -> dict[Path, list[Exercise]]:
    """Write the student copy of every notebook in a folder; all are checked before the first is
    written.

    Raises:
        ConfigError: No notebooks there, ``out`` is the same folder, a copy exists (somebody may
            have worked in it) and ``force`` is off, or an exercise is malformed; the message names
            the notebook.
    """
    sources = _sources(notebooks, out)
    for source in sources:
        target = out / source.name
        _require(
            force or not target.exists(),
            f"{target} exists and may hold somebody's work: move it, or use --force",
        )
    return _write(sources, out)


def add_missing_copies(notebooks: Path, out: Path) -> dict[Path, list[Exercise]]:
    """Write the student copies that are not there yet, and the files beside the notebooks; what is
    there stays."""
    missing = [source for source in _sources(notebooks, out) if not (out / source.name).exists()]
    written = _write(missing, out)
    for beside in notebooks.iterdir():  # pictures and texts that the notebooks refer to
        target = out / beside.name
        if not beside.is_file() or beside.suffix == ".ipynb" or beside.name.startswith("."):
            continue
        if not target.exists():
            replace_file(target, beside.read_bytes())
    return written


def _sources(notebooks: Path, out: Path) -> list[Path]:
    sources = sorted(notebooks.glob("*.ipynb"))
    _require(sources, f"no notebooks in {notebooks}: give the folder with --notebooks")
    _require(
        notebooks.resolve() != out.resolve(),
        f"{out} holds the sources: write the student copies to another folder",
    )
    return sources


def _write(sources: Sequence[Path], out: Path) -> dict[Path, list[Exercise]]:
    copies: dict[Path, tuple[str, list[Exercise]]] = {}
    for source in sources:
        notebook = nbformat.read(source, as_version=4)  # type: ignore[no-untyped-call]
        try:
            text = nbformat.writes(student_copy(notebook))  # type: ignore[no-untyped-call]
            copies[out / source.name] = text, find_exercises(notebook)
        except ConfigError as error:
            raise ConfigError(f"{source.name}: {error}") from None
    out.mkdir(parents=True, exist_ok=True)
    for target, (text, _) in copies.items():
        replace_file(target, f"{text}\n")  # whole or not there: a half copy would be taken for work
    return {target: exercises for target, (_, exercises) in copies.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m flserving.lab.exercises``: 0 when the copies are written, 1 with the reason when
    not."""
    parser = argparse.ArgumentParser(
        "python -m flserving.lab.exercises", description="Write the students' notebooks."
    )
    parser.add_argument(
        "--notebooks",
        type=Path,
        default=Path("notebooks"),
        help="folder with the sources (notebooks)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("student"), help="folder for the copies (student)"
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--force", action="store_true", help="overwrite copies that exist")
    choice.add_argument(
        "--missing",
        action="store_true",
        help="leave copies that exist as they are, write the others",
    )
    options = parser.parse_args(arguments)
    try:
        if options.missing:
            written = add_missing_copies(options.notebooks, options.out)
        else:
            written = write_student_copies(options.notebooks, options.out, force=options.force)
    except (FlservingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for target, exercises in written.items():
        told = ", ".join(
            f"{exercise.grade_id} ({exercise.points:g} points)" for exercise in exercises
        )
        print(f"{target}: {told or 'no exercise'}")
    return 0


def _code_cell(source: str, **grading: Any) -> NotebookNode:
    cell: NotebookNode = nbformat.v4.new_code_cell(source)  # type: ignore[no-untyped-call]
    cell.metadata["nbgrader"] = {"schema_version": 3, "task": False, **grading}
    return cell


def _stub(source: str, grade_id: str) -> str:
    """The source with each solution region replaced by a line that raises when it is called, not
    when it is defined."""
    regions = _REGION.findall(source)
    paired = source.count(BEGIN) == source.count(END) == len(regions)
    _require(
        regions and paired, f"solution {grade_id!r} needs pairs of the lines '{BEGIN}' and '{END}'"
    )
    _require(all(body.strip() for _, body in regions), f"solution {grade_id!r} has an empty region")
    line = f'raise NotImplementedError("{grade_id}: replace this line with your code")'
    stub = _REGION.sub(lambda region: region[1] + line, source)
    try:
        tree = ast.parse(stub)
    except SyntaxError as error:
        raise ConfigError(
            f"the stub of {grade_id!r} is no Python ({error}): mark whole statements"
        ) from None
    inside = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for number, text in enumerate(stub.splitlines(), start=1):
        held_back = any(node.lineno < number <= (node.end_lineno or 0) for node in inside)
        _require(
            text.strip() != line or held_back,
            f"{grade_id!r} has a region outside a function: a stub there raises",
        )
    return stub


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ConfigError(message)


if __name__ == "__main__":
    raise SystemExit(main())
