"""From nothing to a graded class: an assignment of one notebook, made-up submissions, marks and
feedback by nbgrader.

    python tests/support/graded_class.py notebooks/03_caching.ipynb --students 30 --out graded

The first student hands in stubs, the second the solutions; every other one hands in, exercise by
exercise, a solution, a stub, or one of the wrong solutions of the tests. It needs the extra
``grading``. The assignment holds the exercises, their checks and the cells that these need, so that
a class is graded in minutes; ``--whole`` takes the whole notebook, as a teacher would.
"""

import argparse
import csv
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "course"))

from cell_needs import needed_cells  # noqa: E402
from flserving.lab.exercises import find_exercises, student_copy  # noqa: E402
from wrong_solutions import SOLUTIONS, WRONG  # noqa: E402

ASSIGNMENT = "week"
CONFIG = 'get_config().Autograde.autograde_preprocessors.insert(1, "flserving.lab.exercises.part_marks")\n'
STUB, SOLUTION = "stub", "solution"
HANDED_IN = {SOLUTION: 0.5, STUB: 0.1, "wrong": 0.4}


class Mark(NamedTuple):
    """Of one exercise: what a student handed in, and the points that it got."""

    exercise: str
    handed_in: str
    points: float
    worth: float

    @property
    def surprise(self) -> str:
        """What a teacher would have to look into, or nothing."""
        if self.handed_in == STUB and self.points:
            return f"the stub of {self.exercise} got {self.points:g} points"
        if self.handed_in == SOLUTION and self.points != self.worth:
            return f"the solution of {self.exercise} got {self.points:g} of {self.worth:g} points"
        if self.handed_in not in {STUB, SOLUTION} and self.points >= self.worth:
            return f"the wrong solution {self.handed_in!r} of {self.exercise} got all points"
        return ""


def assignment_of(notebook: NotebookNode, whole: bool) -> NotebookNode:
    """The notebook to hand out: all of it, or its exercises and what these need."""
    if not whole:
        asked = {
            place
            for exercise in find_exercises(notebook)
            for place in (exercise.solution, exercise.check)
        }
        notebook.cells = [
            notebook.cells[place] for place in sorted(asked | set(needed_cells(notebook, asked)))
        ]
    return notebook


def submissions(exercises: Sequence[str], students: int, seed: int) -> dict[str, dict[str, str]]:
    """Student -> exercise -> "stub", "solution" or the name of a wrong solution."""
    rng, handed_in = random.Random(seed), dict[str, dict[str, str]]()
    for number in range(1, students + 1):
        kinds = rng.choices(list(HANDED_IN), list(HANDED_IN.values()), k=len(exercises))
        if number <= 2:
            kinds = [(STUB, SOLUTION)[number - 1]] * len(exercises)
        handed_in[f"student-{number:02}"] = {
            exercise: rng.choice(list(WRONG[exercise])) if kind == "wrong" else kind
            for exercise, kind in zip(exercises, kinds, strict=True)
        }
    return handed_in


def write_course(out: Path, path: Path, handed_in: dict[str, dict[str, str]], whole: bool) -> None:
    """The folders that nbgrader wants: its configuration, the source of the assignment, and what
    was handed in."""
    source = assignment_of(nbformat.read(path, as_version=4), whole)
    folder = out / "source" / ASSIGNMENT
    folder.mkdir(parents=True)
    (out / "nbgrader_config.py").write_text(CONFIG)
    nbformat.write(source, folder / path.name)
    for student, solutions in handed_in.items():
        copy = student_copy(source)
        for exercise in find_exercises(source):
            kind = solutions[exercise.grade_id]
            if kind != STUB:
                wrong = WRONG[exercise.grade_id]
                code = SOLUTIONS[exercise.grade_id] if kind == SOLUTION else wrong[kind].source
                copy.cells[exercise.solution].source = code
        folder = out / "submitted" / student / ASSIGNMENT
        folder.mkdir(parents=True)
        nbformat.write(copy, folder / path.name)


def nbgrader(course: Path, *arguments: str) -> None:
    """Its commands start each other by name, so its folder must be on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    options = (
        f"--CourseDirectory.root={course}",
        "--ExecutePreprocessor.timeout=300",
        # then a cell that hangs is one that fails
        "--ExecutePreprocessor.interrupt_on_timeout=True",
    )
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments, *options],
        cwd=course, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"nbgrader {arguments[0]} failed:\n{done.stderr[-3000:]}")


def marks_of(course: Path, handed_in: dict[str, dict[str, str]]) -> dict[str, list[Mark]]:
    """What nbgrader's gradebook says."""
    from nbgrader.api import Gradebook

    marks = dict[str, list[Mark]]()
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        for student, solutions in handed_in.items():
            graded = {grade.name: grade for each in book.find_submission(ASSIGNMENT, student).notebooks
                      for grade in each.grades}  # fmt: skip
            marks[student] = [
                Mark(
                    exercise,
                    kind,
                    graded[f"{exercise}-check"].score,
                    graded[f"{exercise}-check"].max_score,
                )
                for exercise, kind in solutions.items()
            ]
    return marks


def write_marks(path: Path, marks: dict[str, list[Mark]]) -> None:
    """A line a student: the sum, and for each exercise what was handed in and what it got."""
    exercises = [mark.exercise for mark in next(iter(marks.values()))]
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                "student",
                "points",
                "of",
                *(f"{name}{end}" for name in exercises for end in ("", ": points")),
            ]
        )
        for student, own in marks.items():
            points = round(sum(mark.points for mark in own), 2)
            each = [value for mark in own for value in (mark.handed_in, round(mark.points, 2))]
            rows.writerow([student, points, sum(mark.worth for mark in own), *each])


def graded_class(
    path: Path, out: Path, students: int, seed: int = 0, whole: bool = False
) -> dict[str, list[Mark]]:
    """Student -> marks; in ``out`` also ``marks.csv`` and, for every student,
    ``feedback/STUDENT/week/*.html``."""
    exercises = [
        exercise.grade_id for exercise in find_exercises(nbformat.read(path, as_version=4))
    ]
    if not exercises:
        raise ValueError(f"{path} has no exercises: choose another notebook")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name a new folder with --out")
    handed_in, out = submissions(exercises, students, seed), out.resolve()
    write_course(out, path, handed_in, whole)
    nbgrader(out, "generate_assignment", ASSIGNMENT, "--create")
    nbgrader(out, "autograde", ASSIGNMENT, "--create")
    nbgrader(out, "generate_feedback", ASSIGNMENT)
    marks = marks_of(out, handed_in)
    write_marks(out / "marks.csv", marks)
    return marks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make up a class, and grade it with nbgrader.")
    parser.add_argument(
        "notebook", type=Path, help="with the solutions, for example notebooks/03_caching.ipynb"
    )
    parser.add_argument("--students", type=int, default=30, help="at least 2 (30)")
    parser.add_argument("--out", type=Path, default=Path("graded"), help="a new folder (graded)")
    parser.add_argument(
        "--seed", type=int, default=0, help="another one makes up another class (0)"
    )
    parser.add_argument(
        "--whole", action="store_true", help="run the whole notebook for each student"
    )
    options = parser.parse_args(arguments)
    if options.students < 2:
        parser.error("--students must be 2 or more: one hands in stubs, one the solutions")
    if find_spec("nbgrader") is None:
        print('error: nbgrader is not installed: pip install -e ".[grading]"', file=sys.stderr)
        return 1
    began_s = time.monotonic()
    try:
        marks = graded_class(
            options.notebook, options.out, options.students, options.seed, options.whole
        )
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for student, own in marks.items():
        told = ", ".join(
            f"{mark.exercise} {mark.points:g}/{mark.worth:g} ({mark.handed_in})" for mark in own
        )
        print(f"{student}: {sum(mark.points for mark in own):g} points: {told}")
    surprises = [
        f"{student}: {mark.surprise}"
        for student, own in marks.items()
        for mark in own
        if mark.surprise
    ]
    print(
        f"{len(marks)} students in {time.monotonic() - began_s:.0f} s; the table is {options.out / 'marks.csv'}"
    )
    print(
        *(surprises or ["every stub got 0 points, every solution all, every wrong solution less"]),
        sep="\n",
    )
    return 1 if surprises else 0


if __name__ == "__main__":
    raise SystemExit(main())
