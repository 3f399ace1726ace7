"""What a notebook of the course must be before it is committed, judged from the file alone."""

import itertools
import re
from collections.abc import Iterator

from nbformat import NotebookNode

MAX_NBYTES = 300_000
CELLS = (20, 85)
CELLS_OF_00 = (10, 45)
MAX_CODE_LINES, MAX_EXERCISE_LINES = 25, 30
MAX_WORDS, MAX_COLUMNS, MIN_POINTS = 90, 88, 10
FONT_SIZE = re.compile(r"(?:font|label)size[\"']?\s*[=:]\s*([\d.]+)")
OPENING = ("**You build**", "**You can then**", "**You need**", "**Time**", "**Guess first")
SHOWS_WIDGET = re.compile(r"\b(explore|Player|interact|interactive)\(")
# A path of the machine that somebody worked on; what a web address or a longer path ends in is none
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(work|farm|root|opt|tmp|home|Users|var/folders)/\w")


def problems(notebook: NotebookNode, *, name: str, nbytes: int) -> list[str]:
    """Everything that is wrong with a stored notebook; an empty list is the aim."""
    whole = _whole(notebook, name, nbytes)
    return [
        *whole,
        *_execution(notebook),
        *_cells(notebook),
        *_sizes(notebook),
        *_widgets(notebook),
    ]


def code_cells(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """Position in the notebook and cell, of every code cell that holds something."""
    return [
        (i, c) for i, c in enumerate(notebook.cells) if c.cell_type == "code" and c.source.strip()
    ]


def tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _whole(notebook: NotebookNode, name: str, nbytes: int) -> Iterator[str]:
    if nbytes >= MAX_NBYTES:
        yield f"{nbytes:,} bytes, fewer than {MAX_NBYTES:,} are allowed: draw smaller figures"
    low, high = CELLS_OF_00 if name.startswith("00") else CELLS
    if not low <= len(notebook.cells) <= high:
        yield f"{len(notebook.cells)} cells, {low} to {high} are wanted"
    if "widgets" in notebook.metadata:
        yield "metadata.widgets is stored: strip it"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "no kernelspec python3 in the metadata: JupyterLab would ask which kernel to use, and wait"
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell is not Markdown with a title"
    else:
        cells = itertools.takewhile(lambda cell: cell.cell_type == "markdown", notebook.cells)
        opening = "\n".join(cell.source for cell in cells)
        yield from (f"the opening lacks {part}" for part in OPENING if part not in opening)


def _execution(notebook: NotebookNode) -> Iterator[str]:
    cells = [cell for _, cell in code_cells(notebook)]
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        yield f"not executed top to bottom: the cells are numbered {counts}"
    if 3 * sum(bool(cell.outputs) for cell in cells) < len(cells):
        yield "fewer than a third of the code cells show an output: run the notebook and keep its outputs"
    for index, cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                yield f"cell {index} stores an error: {output.ename}"
            if output.get("name") == "stderr" and "Warning" in output.text:
                yield f"cell {index} stores a warning: {output.text.strip()[:100]!r}"


def _cells(notebook: NotebookNode) -> Iterator[str]:
    for index, cell in enumerate(notebook.cells):
        found = MACHINE_PATH.search(str(cell.get("outputs", "")) + cell.source)
        if found:
            yield f"cell {index} names a path of a machine: {found[0]!r}"
        if cell.cell_type == "code":
            lines = [
                line
                for line in cell.source.splitlines()
                if line.strip() and not line.strip().startswith("#")
            ]
            limit = MAX_EXERCISE_LINES if "nbgrader" in cell.metadata else MAX_CODE_LINES
            if len(lines) > limit:
                yield f"cell {index} has {len(lines)} lines of code, at most {limit}: split it"


def _sizes(notebook: NotebookNode) -> Iterator[str]:
    """One idea a cell, which fits on the page."""
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            words = len(cell.source.split())
            if words > MAX_WORDS:
                yield f"cell {index} has {words} words, at most {MAX_WORDS}: say it shorter, or make two ideas of it"
            if re.search(r"\n#+ ", cell.source):
                yield f"cell {index} has a heading below its first line: begin a cell with it"
        elif cell.cell_type == "code":
            width = max(map(len, cell.source.splitlines()), default=0)
            if width > MAX_COLUMNS:
                yield f"cell {index} has a line of {width} characters, at most {MAX_COLUMNS}: break it"
            sizes = [float(points) for points in FONT_SIZE.findall(cell.source)]
            if min(sizes, default=MIN_POINTS) < MIN_POINTS:
                yield f"cell {index} writes in {min(sizes):g} points, at least {MIN_POINTS}: draw less, or larger"


def _widgets(notebook: NotebookNode) -> Iterator[str]:
    shown: NotebookNode | None = None  # the code cell before
    for index, cell in code_cells(notebook):
        if "widget" in tags(cell):
            pictures = (
                [o for o in shown.outputs if "image/png" in o.get("data", {})]
                if shown is not None
                else []
            )
            if not pictures:
                yield f"cell {index} shows a widget and the code cell before stores no picture: add the static figure"
            if "nbval-ignore-output" not in tags(cell):
                yield f"cell {index} shows a widget: tag it nbval-ignore-output too"
        elif SHOWS_WIDGET.search(cell.source):
            yield f"cell {index} shows a widget and is not tagged widget: the browser tests would pass it by"
        shown = cell
