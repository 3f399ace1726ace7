"""A student's copy in the real JupyterLab: an exercise is tried, failed and solved, a guess made,
all of it comes back.

Screenshots of every step: set FLSERVING_SHOTS to a folder.
"""

import json
import re

import nbformat
import pytest

from cell_needs import needed_cells
from flserving.lab import opening

pytestmark = pytest.mark.browser
NOTEBOOK = "03_caching.ipynb"
OTHER = "00_start_here.ipynb"
STUB = '        raise NotImplementedError("lru: replace this line with your code")'
FIRST_IN_FIRST_OUT = (  # a read leaves its key where it was
    "        return self.items.get(key)",
    """\
        if key not in self.items and len(self.items) == self.capacity:
            del self.items[next(iter(self.items))]
        self.items[key] = value""",
)
CORRECT = (
    """\
        if key in self.items:
            self.items[key] = self.items.pop(key)
        return self.items.get(key)""",
    """\
        self.items.pop(key, None)
        if len(self.items) == self.capacity:
            del self.items[next(iter(self.items))]
        self.items[key] = value""",
)


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory):
    """A student's folder, on its first day."""
    folder = tmp_path_factory.mktemp("course") / "student"
    opening.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def cells(served_folder):
    """Of some code cells of the notebook: where they stand."""
    notebook = nbformat.read(served_folder / NOTEBOOK, as_version=4)
    code = {
        index: cell.source for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"
    }
    starts = {
        "guess": "lab.guess(",
        "exercise": "class LRU:",
        "check": "from flserving.lab.checks import check_lru",
    }
    found = {
        name: next(i for i, source in code.items() if source.startswith(start))
        for name, start in starts.items()
    }
    found["reveal"] = next(index for index, source in code.items() if "lab.reveal(" in source)
    needed = sorted(needed_cells(notebook, [found["reveal"]]) - {found["reveal"]})
    return {**found, "first": needed[0], "measure": needed[1:]}


def solved(stub: str, bodies: tuple[str, ...]) -> str:
    for body in bodies:
        assert STUB in stub
        stub = stub.replace(STUB, body, 1)
    return stub


def guess(lab, cells):
    """Choose by the radio buttons, then run what measures, and see both beside each other."""
    assert lab.run_cell(cells["guess"]) == "Guess the hit rate 25 % 48 % 63 % 80 %"
    asked = lab.cell(cells["guess"])
    assert [choice.is_checked() for choice in asked.get_by_role("radio").all()] == [False] * 4
    asked.get_by_label("63 %").check()
    asked.get_by_text("Kept. Read on").wait_for()
    lab.shot("1_guessed", asked)
    for index in cells["measure"]:
        lab.run_cell(index)
    told = lab.run_cell(cells["reveal"])
    lab.shot("2_revealed", lab.cell(cells["reveal"]))
    assert re.search(
        r"hit rate: you guessed 63 %, measured 4\d\.\d% \(other choices: 25 %, 48 %, 80 %\)\.$",
        told,
    )


def solve(lab, cells, stub):
    """Check the stub, a wrong solution twice, and a correct one, which is kept by a cell of one's
    own."""
    exercise, check = cells["exercise"], cells["check"]
    assert lab.run_cell(exercise) == ""
    told = lab.run_cell(check)
    lab.shot("3_stub", lab.cell(exercise))
    assert told.startswith("The exercise 'lru' waits for your code") and "Traceback" not in told

    lab.write(exercise, solved(stub, FIRST_IN_FIRST_OUT))
    assert lab.run_cell(exercise) == ""
    told = lab.run_cell(check)
    assert told.startswith("'a' was read just before 'c' came, and was evicted all the same")
    assert told.endswith(
        "2 of 4 parts are right: done keeps and replaces done holds exactly its capacity "
        "not yet evicts the least recently used not yet agrees with LRU on random traces"
    )
    assert "Hint" not in told and "Traceback" not in told
    told = lab.run_cell(check)
    lab.shot("4_hint", lab.cell(exercise))
    assert "Hint 1: A dict keeps its keys in the order" in told and "Hint 2" not in told

    lab.write(exercise, solved(stub, CORRECT))
    lab.run_cell(exercise)
    told = lab.run_cell(check)
    assert "parts are right" not in told and "Hint" not in told and "Error" not in told
    own = lab.add_cell_below(check, "lab.keep(LRU)  # a cell of my own")
    assert lab.run_cell(own) == "Kept: my_stack/lru.py"
    lab.shot("5_solved", lab.cell(exercise))


def test_a_guess_and_an_exercise_are_there_the_next_day(open_in_lab, served_folder, cells):
    with open_in_lab(NOTEBOOK) as lab:
        lab.run_cell(cells["first"])
        guess(lab, cells)
        stub = lab.source(cells["exercise"])
        solve(lab, cells, stub)
        lab.save()

    work = (served_folder / NOTEBOOK).read_bytes()
    (served_folder / OTHER).unlink()  # so that there is something to add
    opening.prepare(served_folder)
    assert (served_folder / OTHER).exists() and (served_folder / NOTEBOOK).read_bytes() == work

    with open_in_lab(NOTEBOOK) as lab:
        assert lab.source(cells["exercise"]) == solved(stub, CORRECT)
        asked = lab.cell(cells["guess"])
        # no widget before the cell has run
        asked.get_by_text("25 %, 48 %, 63 % or 80 %?").wait_for()
        lab.run_cell(cells["first"])
        lab.run_cell(cells["guess"])
        guessed = asked.get_by_role("radio", name="63 %")
        assert (
            guessed.is_checked()
            and guessed.is_disabled()
            and "this was your guess" in asked.inner_text()
        )
        lab.shot("6_next_day", asked)
        lab.run_cell(cells["exercise"])
        lab.run_cell(cells["check"])
        assert lab.run_cell(cells["check"] + 1) == "Already kept: my_stack/lru.py"
        assert not lab.page_errors
    kept = (served_folder / "my_stack" / "lru.py").read_text()
    assert "self.items[key] = self.items.pop(key)" in kept
    marks = json.loads((served_folder / "my_stack" / "answers" / "03_caching.json").read_text())[
        "checks"
    ]["lru"]
    assert marks == {"right": 4, "parts": 4, "tries": 4}
