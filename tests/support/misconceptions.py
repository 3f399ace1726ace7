"""Write the section "Misconceptions" of every instructor guide from the wrong solutions of the
tests.

``python tests/support/misconceptions.py`` writes it into notebooks/instructor/NN_*.md, between two
marker comments; ``--check`` changes nothing, names the guides that differ and ends with 1. The
wrong solutions are plausible ones, and a test runs each of them against its check. So what a guide
says about a mistake is what a student will read.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "course"))

from flserving.lab.exercises import Exercise, find_exercises  # noqa: E402
from wrong_solutions import WRONG, Wrong  # noqa: E402

NOTEBOOKS = ROOT / "notebooks"
GUIDES = NOTEBOOKS / "instructor"
BEGIN = "<!-- misconceptions: written by tests/support/misconceptions.py, do not edit -->"
END = "<!-- end of misconceptions -->"


@cache
def exercises_of(notebook: Path) -> list[Exercise]:
    return find_exercises(nbformat.read(notebook, as_version=4))


def section(notebook: Path) -> str:
    """What stands between the markers, which belong to it."""
    return "\n".join([BEGIN, *_paragraphs(notebook), END])


def _paragraphs(notebook: Path) -> Iterator[str]:
    for exercise in exercises_of(notebook):
        told = "; ".join(
            f"**{name}** ({said(wrong)})" for name, wrong in WRONG[exercise.grade_id].items()
        )
        text = f"- `{exercise.grade_id}`: {told}."
        yield textwrap.fill(
            text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )


def said(wrong: Wrong) -> str:
    """The message of a wrong solution: the pattern that the tests look for, as a person reads
    it."""
    text = re.sub(
        r"(?<!\\)\((\w+(?:\|\w+)+)(?<!\\)\)",
        lambda group: group[1].replace("|", " or "),
        wrong.message,
    )
    either = re.split(r"(?<!\\)\|", text)
    return " or ".join(f'"{_readable(each)}"' for each in either)


def _readable(pattern: str) -> str:
    text = re.sub(r"(?<!\\)\((\.\*)(?<!\\)\)|\.[*+]", "...", pattern)
    text = re.sub(r"\\d(?:\+|\{\d+\})?", "N", text)
    text = re.sub(r"\\(\W)", r"\1", text)
    return re.sub(r"([*<`])", r"\\\1", text)  # these would mean something in Markdown


def rewritten(guide: str, notebook: Path) -> str:
    """The guide with the section of today."""
    begin, end = guide.find(BEGIN), guide.find(END)
    if begin < 0 or end < begin:
        raise ValueError(
            f"the guide of {notebook.name} lacks the lines\n{BEGIN}\n{END}\nadd them, in this order"
        )
    return guide[:begin] + section(notebook) + guide[end + len(END) :]


def guides() -> Iterator[tuple[Path, str, str]]:
    """Each guide of a notebook with exercises: its path, its text, and the text that it should
    have."""
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        path = GUIDES / f"{notebook.stem}.md"
        if exercises_of(notebook) and path.exists():
            text = path.read_text(encoding="utf-8")
            yield path, text, rewritten(text, notebook)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write the misconceptions of the instructor guides."
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; end with 1 if a guide differs"
    )
    check = parser.parse_args(arguments).check
    differ = [(path, wanted) for path, text, wanted in guides() if text != wanted]
    for path, wanted in differ:
        print(
            f"{path.relative_to(ROOT)}: {'differs from the wrong solutions' if check else 'written'}"
        )
        if not check:
            path.write_text(wanted, encoding="utf-8", newline="\n")
    return 1 if check and differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
