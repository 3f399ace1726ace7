"""The instructor guides: one a notebook, plans that add up, every exercise discussed,
misconceptions as they are."""

import re
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

import misconceptions
from flserving.lab.exercises import find_exercises
from graded_class import CONFIG
from wrong_solutions import WRONG, Wrong

NOTEBOOKS = sorted(misconceptions.NOTEBOOKS.glob("*.ipynb"))
MOST_LINES = 120


def guide_of(notebook: Path) -> str:
    return (misconceptions.GUIDES / f"{notebook.stem}.md").read_text(encoding="utf-8")


def part(guide: str, heading: str) -> str:
    """The text below a heading, up to the next one of its rank."""
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", guide, re.DOTALL | re.MULTILINE
    )
    assert found, f"no heading '## {heading}'"
    return found[1]


def test_every_guide_belongs_to_a_notebook():
    assert {path.stem for path in misconceptions.GUIDES.glob("[0-9]*.md")} == {
        path.stem for path in NOTEBOOKS
    }


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("minutes", [90, 50])
def test_the_minutes_of_a_plan_add_up(notebook, minutes):
    rows = re.findall(r"^\| (\d+) \|", part(guide_of(notebook), f"{minutes} minutes"), re.MULTILINE)
    assert sum(map(int, rows)) == minutes


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_plan_names_sections_and_exercises_that_the_notebook_has(notebook):
    book = nbformat.read(notebook, as_version=4)
    headings = re.findall(
        r"^## (\d+) ", "\n".join(cell.source for cell in book.cells), re.MULTILINE
    )
    exercises = {exercise.grade_id for exercise in find_exercises(book)}
    for minutes in (90, 50):
        plan = part(guide_of(notebook), f"{minutes} minutes")
        cited = set(re.findall(r"\d+", " ".join(re.findall(r"[Ss]ections? ([\d, and]+)", plan))))
        assert cited and cited <= set(headings), (
            f"sections {sorted(cited - set(headings))} are not in the notebook"
        )
        assert not exercises or exercises & set(re.findall(r"`([\w-]+)`", plan)), (
            "no exercise in the plan"
        )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_three_questions_with_what_to_hear(notebook):
    questions = part(guide_of(notebook), "Three questions")
    assert re.findall(r"^(\d)\. ", questions, re.MULTILINE) == ["1", "2", "3"]
    assert questions.count("*Hear:*") == 3


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_exercise_is_discussed(notebook):
    discussed = re.findall(
        r"^- \*\*`([\w-]+)`\*\*", part(guide_of(notebook), "Exercises"), re.MULTILINE
    )
    assert discussed == [exercise.grade_id for exercise in misconceptions.exercises_of(notebook)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_misconceptions_are_those_of_the_wrong_solutions(notebook):
    guide = guide_of(notebook)
    if misconceptions.exercises_of(notebook):
        rewritten = misconceptions.rewritten(guide, notebook)
        assert guide == rewritten, "run: python tests/support/misconceptions.py"
    assert len(guide.splitlines()) <= MOST_LINES


def test_a_pattern_becomes_a_sentence():
    patterns = {
        r"choose_version\(\[\], floor=0.5\) raised": '"choose_version([], floor=0.5) raised"',
        r"was tried \d+ times": '"was tried N times"',
        r"has 4,\d{3} bytes": '"has 4,N bytes"',
        r"was sure (.*) and fresh": '"was sure ... and fresh"',
        "chose (True|False|np)": '"chose True or False or np"',
        r"not sure .*, and|the best": '"not sure ..., and" or "the best"',
        "T * T": r'"T \* T"',
    }
    for pattern, sentence in patterns.items():
        assert misconceptions.said(Wrong("", pattern)) == sentence


def test_no_message_still_looks_like_a_pattern():
    for wrongs in WRONG.values():
        for wrong in wrongs.values():
            assert not re.search(r"\\[^*<`]|\.\*|\(\?", misconceptions.said(wrong))


def test_the_command_writes_what_differs_and_checks(tmp_path, monkeypatch, capsys):
    notebook = next(path for path in NOTEBOOKS if misconceptions.exercises_of(path))
    monkeypatch.setattr(misconceptions, "GUIDES", tmp_path)
    monkeypatch.setattr(misconceptions, "ROOT", tmp_path)
    guide = tmp_path / f"{notebook.stem}.md"
    guide.write_text(f"before\n{misconceptions.BEGIN}\nyesterday\n{misconceptions.END}\nafter\n")
    assert misconceptions.main(["--check"]) == 1
    assert "differs" in capsys.readouterr().out and "yesterday" in guide.read_text()
    assert misconceptions.main([]) == 0 and misconceptions.main(["--check"]) == 0
    text = guide.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "yesterday" not in text
    guide.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the lines"):
        misconceptions.main(["--check"])


def test_the_commands_of_the_readme_are_there():
    told = (misconceptions.GUIDES / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"python ((?:tests|notebooks)/\S+\.\w+)", told):
        assert (misconceptions.ROOT / path).exists()
    for module in re.findall(r"python -m (flserving\.[\w.]+)", told):
        assert find_spec(module)
    assert CONFIG.strip() in told, (
        "the line of nbgrader_config.py that the made-up class is graded with"
    )
    shares = re.findall(r"^\| (\d+) % \|", told, re.MULTILINE)
    assert sum(map(int, shares)) == 100
