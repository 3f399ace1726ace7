"""Run notebooks top to bottom and store them as the gates want them: outputs and counts, no widget
state.

python tests/support/store_notebooks.py notebooks/03_caching.ipynb [...]      # none named: all
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from notebook_gates import problems
from slideshow import with_slides

VIEW = "application/vnd.jupyter.widget-view+json"


def stored(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook, executed in ``folder`` by this interpreter's kernel, without what only a live
    page can show.

    Each cell's metadata say what it is in a talk.
    """
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    notebook.metadata.pop("widgets", None)
    # not the patch version of whoever ran it last
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            for output in cell.outputs:
                # a question, which can be read without its buttons
                if "text/markdown" in output.get("data", {}):
                    output.data.pop(VIEW, None)
            cell.outputs = [output for output in cell.outputs if VIEW not in output.get("data", {})]
    return with_slides(notebook)


def main() -> int:
    os.environ["FLSERVING_STATIC"] = "1"  # each picture once, and no widgets
    root = Path(__file__).resolve().parents[2]
    paths = [Path(argument) for argument in sys.argv[1:]] or sorted(
        (root / "notebooks").glob("*.ipynb")
    )
    found = 0
    for path in paths:
        began_s = time.monotonic()
        # as for a student: no part was kept before, and no guess made
        with tempfile.TemporaryDirectory() as empty:
            notebook = stored(nbformat.read(path, as_version=4), Path(empty))
        nbformat.write(notebook, path)
        wrong = problems(notebook, name=path.name, nbytes=path.stat().st_size)
        found += len(wrong)
        print(
            f"{path.name}: {time.monotonic() - began_s:.0f} s, {path.stat().st_size // 1000} kB",
            *wrong,
            sep="\n  ",
        )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
