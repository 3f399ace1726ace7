"""Every notebook of the course: what is stored in it.

nbval runs the notebooks as they are, with every widget at every corner of its sliders (``run.py
test``); tests/browser uses the widgets in a real JupyterLab, tests/course/test_student_copies.py
tries the exercises unsolved.
"""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from notebook_gates import OPENING, code_cells, problems

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
COURSE = [
    "00_start_here",
    "01_from_rounds_to_versions",
    "02_the_serving_stack",
    "03_caching",
    "04_dynamic_batching",
    "05_rest_and_grpc",
    "06_latency_breakdown",
    "07_edge_versus_centralized",
    "08_personalization_heads",
    "09_model_optimization",
    "10_rollouts_and_ab_testing",
    "11_monitoring",
]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks yet")
def test_the_course_is_complete_and_numbered():
    names = [path.stem for path in NOTEBOOKS]
    assert names[: len(COURSE)] == COURSE
    assert [name[:2] for name in names] == [f"{number:02d}" for number in range(len(names))]


@each_notebook
def test_what_is_stored(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    found = problems(notebook, name=path.name, nbytes=path.stat().st_size)
    assert not found, "\n".join(found)


# The gates themselves: a notebook that passes, and for each gate one change that must be noticed.


def good_notebook():
    opening = new_markdown_cell("# 09 Sample\n" + " ...\n".join(OPENING))
    picture = new_output("display_data", data={"image/png": "aGVsbG8="})
    figure = new_code_cell("lab.figure()", outputs=[picture])
    widget = new_code_cell(
        "lab.explore(model, draw)", metadata={"tags": ["widget", "nbval-ignore-output"]}
    )
    two = new_output("execute_result", data={"text/plain": "2"})
    sums = [new_code_cell("1 + 1", outputs=[two.copy()]) for _ in range(8)]
    texts = [new_markdown_cell(f"step {n}") for n in range(10)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(
        cells=[opening, figure, widget, *sums, *texts], metadata={"kernelspec": kernel}
    )
    for number, (_, cell) in enumerate(code_cells(notebook), start=1):
        cell.execution_count = number
    return notebook


def judge(notebook, name="09_sample.ipynb", nbytes=10_000):
    return problems(notebook, name=name, nbytes=nbytes)


def test_the_source_that_is_shown_is_the_packages_own():
    """A notebook that shows a method was stored after the method was last changed."""
    package = NOTEBOOKS[0].parents[1]
    shown = 0
    for path in NOTEBOOKS:
        for _, cell in code_cells(nbformat.read(path, as_version=4)):
            for output in cell.outputs if "lab.show(" in cell.source else ():
                if "data" in output:
                    file, *lines = output.data["text/plain"].splitlines()
                    source = (package / file).read_text("utf-8").splitlines()
                    stale = {line.strip() for line in lines} - {line.strip() for line in source}
                    assert not stale - {""}, f"{path.name}: store it anew"
                    shown += 1
    assert shown >= 6


def test_the_gates_let_a_good_notebook_pass():
    assert judge(good_notebook()) == []


def test_the_opening_may_be_several_cells_before_the_first_code():
    notebook = good_notebook()
    source = notebook.cells[0].source.removesuffix(OPENING[-1])
    notebook.cells[0].source = source
    assert judge(notebook) == [f"the opening lacks {OPENING[-1]}"]
    notebook.cells.insert(1, new_markdown_cell(OPENING[-1]))
    assert judge(notebook) == []


def _no_outputs(notebook):
    for _, cell in code_cells(notebook)[1:]:
        cell.outputs = []


def _error(notebook):
    notebook.cells[3].outputs = [new_output("error", ename="ValueError", evalue="x", traceback=[])]


def _warning(notebook):
    notebook.cells[3].outputs = [
        new_output("stream", name="stderr", text="lib.py:3: FutureWarning: soon")
    ]


def _machine_path(notebook):
    notebook.cells[5].outputs = [
        new_output("execute_result", data={"text/plain": "PosixPath('/" + "tmp/model')"})
    ]


def _long_cell(lines):
    return {"source": "\n".join(f"x{i} = {i}" for i in range(lines))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.cells.extend([new_markdown_cell("more")] * 65), "86 cells, 20 to 85"),
        (lambda n: n.cells.__delitem__(slice(12, None)), "12 cells, 20 to 85"),
        (lambda n: n.metadata.update(widgets={}), "metadata.widgets"),
        (lambda n: n.metadata.pop("kernelspec"), "no kernelspec"),
        (lambda n: n.cells[0].update(source="# 09 Sample"), "the opening lacks **You build**"),
        (lambda n: n.cells[0].update(cell_type="raw"), "the first cell is not Markdown"),
        (lambda n: n.cells[4].update(execution_count=None), "not executed top to bottom"),
        (lambda n: n.cells[4].update(execution_count=9), "not executed top to bottom"),
        (_no_outputs, "fewer than a third"),
        (_error, "cell 3 stores an error: ValueError"),
        (_warning, "cell 3 stores a warning"),
        (_machine_path, "cell 5 names a path of a machine"),
        (lambda n: n.cells[5].update(_long_cell(26)), "cell 5 has 26 lines of code"),
        (lambda n: n.cells[5].update(source="x" * 89), "cell 5 has a line of 89 characters"),
        (
            lambda n: n.cells[5].update(source="ax.text(0, 0, '', fontsize=9.5)"),
            "cell 5 writes in 9.5 points",
        ),
        (lambda n: n.cells[15].update(source="word " * 91), "cell 15 has 91 words"),
        (
            lambda n: n.cells[15].update(source="text\n\n## 2 Next"),
            "cell 15 has a heading below its first line",
        ),
        (lambda n: n.cells[1].update(outputs=[]), "stores no picture"),
        (lambda n: n.cells[2].metadata.update(tags=["widget"]), "tag it nbval-ignore-output too"),
        (lambda n: n.cells[2].metadata.update(tags=[]), "is not tagged widget"),
    ],
)
def test_the_gates_notice(change, message):
    notebook = good_notebook()
    change(notebook)
    assert any(message in problem for problem in judge(notebook)), judge(notebook)


def test_the_gates_notice_a_file_that_is_too_large():
    assert [problem[:13] for problem in judge(good_notebook(), nbytes=300_000)] == ["300,000 bytes"]


def test_the_gates_give_exercises_more_lines_and_the_first_notebook_fewer_cells():
    notebook = good_notebook()
    notebook.cells[5].update(_long_cell(30), metadata={"nbgrader": {}})
    del notebook.cells[13:]
    assert judge(notebook, name="00_sample.ipynb") == []


@pytest.mark.full
def test_an_error_in_a_corner_fails_the_run(tmp_path, monkeypatch):
    """nbval's run can fail there: a slider's end that divides by zero is noticed, although it
    starts elsewhere."""
    from nbclient.exceptions import CellExecutionError

    monkeypatch.setenv("FLSERVING_STATIC", "1")
    monkeypatch.chdir(tmp_path)
    source = (
        "from matplotlib.figure import Figure\nfrom flserving.lab.widgets.explore import explore\n"
        "explore(lambda rate: 1 / rate, lambda number: Figure(), rate=(0, 10, 1))"
    )
    with pytest.raises(CellExecutionError, match=r"ZeroDivisionError(.|\n)*with rate=0"):
        NotebookClient(
            new_notebook(cells=[new_code_cell(source)]), timeout=300, kernel_name="python3"
        ).execute()
    assert os.listdir(tmp_path) == []
