"""One JupyterLab and one browser for the browser tests of a module.

Not for the whole session: Playwright keeps an event loop running in this thread as long as it
lives, and async tests of other modules could not run theirs.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import nbformat
import pytest

from cell_needs import needed_cells
from flserving.api.doctor import find_chromium
from lab_server import LabServer, lab_server
from notebook_gates import code_cells, tags

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def shots() -> Path | None:
    """Where screenshots go: the folder FLSERVING_SHOTS."""
    return Path(os.environ["FLSERVING_SHOTS"]) if "FLSERVING_SHOTS" in os.environ else None


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The notebooks' widgets, with the cells that they need: nbval runs the others, and says what
    they must print."""
    folder = tmp_path_factory.mktemp("course") / "notebooks"
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for path in folder.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        widgets = [index for index, cell in code_cells(notebook) if "widget" in tags(cell)]
        notebook.cells = [
            notebook.cells[index] for index in sorted(needed_cells(notebook, widgets))
        ]
        nbformat.write(notebook, path)
    return folder


@pytest.fixture(scope="module")
def lab(served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    with lab_server(served_folder, tmp_path_factory.mktemp("jupyter")) as server:
        yield server


@pytest.fixture(scope="module")
def open_in_lab(
    lab: LabServer, shots: Path | None
) -> Iterator[Callable[[str], AbstractContextManager]]:
    """``with open_in_lab("03_caching.ipynb") as page``: a notebook of the served folder in a real
    browser."""
    from playwright.sync_api import sync_playwright

    from lab_page import open_notebook

    with contextlib.ExitStack() as stack:
        playwright = stack.enter_context(sync_playwright())
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_FLAGS)
        stack.callback(chromium.close)
        yield lambda name: open_notebook(chromium, lab, name, shots)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a browser these tests skip, and say what to install."""
    if find_chromium() is None:
        reason = "no Chromium: install it (Debian: apt-get install chromium), or set FLSERVING_CHROMIUM to its path"
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason=reason))
