"""nbgrader reads the course: 0 points for an untouched copy, all for the solved notebook, and marks
for parts.

Needs the extra ``grading``; skipped without it. About a minute a notebook.
"""

import csv
import shutil
from pathlib import Path

import nbformat
import pytest

from flserving.lab import exercises
from graded_class import CONFIG, nbgrader
from wrong_solutions import CHECKS, SOLUTIONS, WRONG

pytestmark = pytest.mark.slow
pytest.importorskip("nbgrader", reason='needs the extra grading: pip install -e ".[grading]"')

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
WITH_EXERCISES = [
    path
    for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    if exercises.find_exercises(nbformat.read(path, as_version=4))
]


def graded(course: Path) -> dict[str, float]:
    """Student -> points of the assignment "week", as nbgrader finds them."""
    (course / "nbgrader_config.py").write_text(CONFIG)
    nbgrader(course, "generate_assignment", "week", "--create")
    nbgrader(course, "autograde", "week", "--create")
    nbgrader(course, "export", "--to", str(course / "grades.csv"))
    with (course / "grades.csv").open(newline="") as file:
        return {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda path: path.stem)
def test_nbgrader_gives_nothing_for_a_stub_and_everything_for_the_solution(path, tmp_path):
    source = tmp_path / "source" / "week"
    source.mkdir(parents=True)
    shutil.copy(path, source)
    exercises.write_student_copies(source, tmp_path / "submitted" / "blank" / "week")
    shutil.copytree(source, tmp_path / "submitted" / "solved" / "week")
    score = graded(tmp_path)
    points = sum(
        exercise.points for exercise in exercises.find_exercises(nbformat.read(path, as_version=4))
    )
    assert score == {"blank": 0, "solved": points}


def test_a_solution_that_is_right_in_some_parts_gets_their_share(tmp_path):
    """FIFO does two of the four things that an LRU cache does."""
    submitted = {"blank": None, "fifo": WRONG["lru"]["FIFO"].source, "solved": SOLUTIONS["lru"]}
    source = nbformat.v4.new_notebook(
        cells=[
            exercises.solution_cell("lru", SOLUTIONS["lru"]),
            exercises.check_cell("lru", CHECKS["lru"], 3),
        ]
    )
    (tmp_path / "source" / "week").mkdir(parents=True)
    nbformat.write(source, tmp_path / "source" / "week" / "03.ipynb")
    for student, solution in submitted.items():
        copy = exercises.student_copy(source)
        copy.cells[0].source = solution or copy.cells[0].source
        folder = tmp_path / "submitted" / student / "week"
        folder.mkdir(parents=True)
        nbformat.write(copy, folder / "03.ipynb")
    assert graded(tmp_path) == {"blank": 0, "fifo": 1.5, "solved": 3}
