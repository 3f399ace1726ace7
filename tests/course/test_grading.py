"""nbgrader reads the course: it grades a student's untouched copy 0, and the solved notebook with all points.

Needs the extra ``grading``; skipped without it. About a minute a notebook.
"""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from flserving.lab import exercises

pytestmark = pytest.mark.slow
pytest.importorskip("nbgrader", reason='needs the extra grading: pip install -e ".[grading]"')

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
WITH_EXERCISES = [
    path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if exercises.find_exercises(nbformat.read(path, as_version=4))
]


def nbgrader(course: Path, *arguments: str) -> None:
    """Its commands start each other by name, so its folder must be on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    options = (f"--CourseDirectory.root={course}", "--ExecutePreprocessor.timeout=300")
    result = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments, *options],
        cwd=course, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda path: path.stem)
def test_nbgrader_gives_nothing_for_a_stub_and_everything_for_the_solution(path, tmp_path):
    source = tmp_path / "source" / "week"
    source.mkdir(parents=True)
    shutil.copy(path, source)
    exercises.write_student_copies(source, tmp_path / "submitted" / "blank" / "week")
    shutil.copytree(source, tmp_path / "submitted" / "solved" / "week")
    nbgrader(tmp_path, "generate_assignment", "week", "--create")
    nbgrader(tmp_path, "autograde", "week", "--create")
    nbgrader(tmp_path, "export", "--to", str(tmp_path / "grades.csv"))
    with (tmp_path / "grades.csv").open(newline="") as file:
        score = {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}
    points = sum(exercise.points for exercise in exercises.find_exercises(nbformat.read(path, as_version=4)))
    assert score == {"blank": 0, "solved": points}
