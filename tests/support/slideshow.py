"""What each cell of a notebook is in a talk, by rule: JupyterLab and ``run.py slides`` read it from
the metadata.

``python tests/support/slideshow.py`` writes it into all notebooks; a test holds it current. A
lecturer of 50 minutes goes from section to section (right), and down into a section for what is
shown there:

* a title or a section begins a slide, with its text; a heading of the third order lies below;
* what a cell shows lies below with its code, and so does a question;
* text between is what the speaker says: notes;
* code that shows nothing, exercises and their checks, widgets and quizzes are left to the notebook:
  they need a kernel.
"""

from pathlib import Path

import nbformat
from nbformat import NotebookNode

from notebook_gates import tags

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def slide_type(cell: NotebookNode) -> str:
    """In the words of nbconvert: slide, subslide, notes or skip."""
    if cell.cell_type == "markdown":
        marks, _, _ = cell.source.partition(" ")
        return {"#": "slide", "##": "slide", "###": "subslide"}.get(marks, "notes")
    aside = (
        "nbgrader" in cell.metadata or "widget" in tags(cell) or cell.source.startswith("lab.quiz(")
    )
    return "subslide" if cell.outputs and not aside else "skip"


def with_slides(notebook: NotebookNode) -> NotebookNode:
    """The same notebook, each cell's metadata with what the rule says."""
    for cell in notebook.cells:
        cell.metadata["slideshow"] = {"slide_type": slide_type(cell)}
    return notebook


def main() -> None:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        nbformat.write(with_slides(nbformat.read(path, as_version=4)), path)


if __name__ == "__main__":
    main()
