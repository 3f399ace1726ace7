"""The report to hand in: what a student guessed, answered and solved in the course, as one HTML
file.

``python -m flserving.lab.report_card --name Ada`` writes it. It tells what ``my_stack/answers``
holds, and shows the figures that the student's own parts drew. These files are the student's:
whoever gives marks that count runs the checks again, with nbgrader.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from flserving.lab.exercises import NEEDS_SOLUTION
from flserving.lab.workbook.answers import FOLDER, Text, replace_file

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { border-bottom: 1px solid #8888; padding: 0.25rem 1rem 0.25rem 0; text-align: left; vertical-align: top; }
img { max-width: 100%; background: white; }
"""


@dataclass(frozen=True, slots=True)
class Exercise:
    """One exercise of a notebook: what it is worth, and what its check said last."""

    name: str
    worth: float
    right: int = 0
    parts: int = 0
    tries: int = 0

    @property
    def points(self) -> float:
        """Its share of the points that it is worth."""
        return self.worth * self.right / self.parts if self.parts else 0.0


@dataclass(frozen=True, slots=True)
class Chapter:
    """What a student did in one notebook; ``problem`` says what could not be read."""

    name: str
    guesses: Mapping[str, Mapping[str, Any]]
    quizzes: Mapping[str, Mapping[str, Any]]
    exercises: Sequence[Exercise]
    figures: Sequence[str]  # PNG, in base64
    problem: str = ""

    @property
    def points(self) -> float:
        """Of all its exercises."""
        return sum(exercise.points for exercise in self.exercises)

    @property
    def worth(self) -> float:
        """All that could be had."""
        return sum(exercise.worth for exercise in self.exercises)

    @property
    def begun(self) -> bool:
        """Whether there is anything to tell."""
        tries = sum(exercise.tries for exercise in self.exercises)
        return bool(self.guesses or self.quizzes or tries or self.figures or self.problem)

    @property
    def correct(self) -> int:
        """Questions whose first answer was correct."""
        return sum(bool(entry.get("correct")) for entry in self.quizzes.values())


def chapters(folder: Path) -> list[Chapter]:
    """What was done in the notebooks of a folder, and in notebooks of other names whose answers are
    there."""
    names = {path.stem for path in folder.glob("*.ipynb")}
    answered = {path.stem for path in (folder / FOLDER / "answers").glob("*.json")}
    return [
        _chapter(folder, name) for name in sorted(names | answered) if not name.endswith(".damaged")
    ]


def report_card(name: str = "", folder: str | Path = ".") -> Text:
    """Write ``my_stack/report.html`` in the folder of the notebooks, and say how many points it
    tells of.

    OSError: The folder cannot be written.
    """
    done = chapters(Path(folder))
    path = Path(folder) / FOLDER / "report.html"
    replace_file(path, as_html(done, name))
    points = sum(chapter.points for chapter in done)
    worth = sum(chapter.worth for chapter in done)
    return Text(f"**{points:g} of {worth:g} points.** The report to hand in is {path.as_posix()}")


def as_html(done: Sequence[Chapter], name: str = "") -> str:
    """The report as a page that needs nothing but itself."""
    title = f"Report of {name}" if name else "Report"
    rows = [
        (
            chapter.name,
            len(chapter.guesses),
            _of(chapter.correct, len(chapter.quizzes)),
            _points(chapter),
        )
        for chapter in done
    ]
    head = ("notebook", "guesses", "right at once, of the questions answered", "points")
    body = (
        "".join(_section(chapter) for chapter in done if chapter.begun)
        or "<p>Nothing was guessed, answered or solved yet.</p>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{_table(head, rows)}{body}</body></html>\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m flserving.lab.report_card``: 0 when the report is written, 1 with the reason when
    not."""
    parser = argparse.ArgumentParser(
        "python -m flserving.lab.report_card", description="Write the report to hand in."
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("student"),
        help="folder of the student's notebooks (student)",
    )
    parser.add_argument("--name", default="", help="whose report it is")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        print(
            f"error: there is no folder {options.folder}: name the student's with --folder",
            file=sys.stderr,
        )
        return 1
    try:
        print(report_card(options.name, options.folder))
    except OSError as error:
        print(f"error: the report cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


def _chapter(folder: Path, name: str) -> Chapter:
    problem = ""
    notebook = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
    path = folder / f"{name}.ipynb"
    try:
        if path.exists():
            notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    except Exception:  # nbformat has many errors for what is no notebook
        problem = f"{path.name} is no notebook that can be read."
    answers: Any = {}
    path = folder / FOLDER / "answers" / f"{name}.json"
    try:
        if path.exists():
            answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        problem = f"{path.name} cannot be read: what was answered in this notebook is not known."
    return Chapter(
        name,
        guesses=_entries(answers, "guesses"),
        quizzes=_entries(answers, "quizzes"),
        exercises=list(_exercises(notebook, _entries(answers, "checks"))),
        figures=list(_figures(notebook)),
        problem=problem,
    )


def _entries(answers: Any, kind: str) -> dict[str, Mapping[str, Any]]:
    found = answers.get(kind) if isinstance(answers, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {str(name): entry for name, entry in found.items() if isinstance(entry, Mapping)}


def _exercises(
    notebook: NotebookNode, checks: Mapping[str, Mapping[str, Any]]
) -> Iterator[Exercise]:
    for cell in notebook.cells:
        grading = cell.metadata.get("nbgrader", {})
        if grading.get("grade"):
            name = str(grading.get("grade_id", "")).removesuffix("-check")
            said = [checks.get(name, {}).get(key) for key in ("right", "parts", "tries")]
            counts = [number if isinstance(number, int) else 0 for number in said]
            yield Exercise(name, float(grading.get("points", 0)), *counts)


def _figures(notebook: NotebookNode) -> Iterator[str]:
    """What cells drew that stand on the student's own code."""
    for cell in notebook.cells:
        if NEEDS_SOLUTION in cell.metadata.get("tags", []):
            for output in cell.get("outputs", []):
                picture = "".join(output.get("data", {}).get("image/png", "")).replace("\n", "")
                if re.fullmatch(r"[\w+/]+=*", picture):
                    yield picture


def _section(chapter: Chapter) -> str:
    guesses = [
        (name, entry.get("guess", ""), entry.get("measured", "not yet"))
        for name, entry in chapter.guesses.items()
    ]
    quizzes = [
        (
            text,
            entry.get("first", ""),
            "yes" if entry.get("correct") else "no",
            entry.get("last", ""),
        )
        for text, entry in chapter.quizzes.items()
    ]
    exercises = [
        (
            exercise.name,
            _of(exercise.right, exercise.parts),
            exercise.tries,
            f"{exercise.points:g} of {exercise.worth:g}",
        )
        for exercise in chapter.exercises
    ]
    drawn = [
        f'<p><img src="data:image/png;base64,{picture}" alt="Figure {number} of {escape(chapter.name)}, '
        f"drawn with the student's own code\"></p>\n"
        for number, picture in enumerate(chapter.figures, start=1)
    ]
    return "".join(
        [
            f"<h2>{escape(chapter.name)}</h2>\n",
            f"<p>{escape(chapter.problem)}</p>\n" if chapter.problem else "",
            _table(("guess of", "guessed", "measured"), guesses),
            _table(("question", "first answer", "correct", "last answer"), quizzes),
            _table(("exercise", "parts right", "tries", "points"), exercises),
            *drawn,
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    lines = [
        f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>\n" for row in rows
    ]
    return f"<table>\n<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>\n{''.join(lines)}</table>\n"


def _of(right: int, parts: int) -> str:
    return f"{right} of {parts}" if parts else "-"


def _points(chapter: Chapter) -> str:
    return f"{chapter.points:g} of {chapter.worth:g}" if chapter.exercises else "-"


if __name__ == "__main__":
    raise SystemExit(main())
