"""One JupyterLab and one browser for the browser tests of a module.

Not for the whole session: Playwright keeps an event loop running in this thread as long as it lives, and async tests of
other modules could not run theirs.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from flserving.doctor import find_chromium
from lab_server import LabServer, lab_server

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: the folder FLSERVING_SHOTS, or one of pytest's."""
    named = os.environ.get("FLSERVING_SHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("shots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of notebooks/: what a run writes does not reach the stored ones."""
    folder = tmp_path_factory.mktemp("course") / "notebooks"
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return folder


@pytest.fixture(scope="module")
def lab(served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    with lab_server(served_folder, tmp_path_factory.mktemp("jupyter")) as server:
        yield server


@pytest.fixture(scope="module")
def open_in_lab(lab: LabServer, shots: Path) -> Iterator[Callable[[str], AbstractContextManager]]:
    """``with open_in_lab("03_caching.ipynb") as page``: a notebook of the served folder in a real browser."""
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
