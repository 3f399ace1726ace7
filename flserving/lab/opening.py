"""``flserving lab``: a copy of the course to work in, opened in JupyterLab. ``python run.py lab``
ends here, too.

The notebooks come from the clone that this package is run from, else from where the wheel has put
them.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import files
from pathlib import Path
from urllib.parse import quote

from flserving.errors import ConfigError, FlservingError

FIRST = "00_start_here.ipynb"


def course() -> Path:
    """The folder with the notebooks as they are stored, solutions included.

    Raises:
        ConfigError: This installation has none.
    """
    installed = [
        Path(str(file.locate())) for file in files("flserving") or [] if file.name == FIRST
    ]
    for first in (Path(__file__).parents[2] / "notebooks" / FIRST, *installed):
        if first.exists():
            return first.parent
    raise ConfigError(
        "this installation holds no notebooks: install flserving's wheel, or run this in a clone of it"
    )


def prepare(place: Path) -> Path:
    """The notebook to open: ``place``, or the first one of the folder ``place``. A folder gets the
    copies that it lacks, unless it holds a notebook of somebody's own, or the course itself.

    Raises:
        ConfigError: There is no such notebook, neither here nor in the course.
    """
    notebook = place.absolute() if place.suffix == ".ipynb" else place.absolute() / FIRST
    folder = notebook.parent
    stored = course()
    if folder.resolve() != stored.resolve() and (stored / notebook.name).exists():
        if not notebook.exists() or (folder / FIRST).exists():
            _copy_what_is_missing(stored, folder)
    elif not notebook.exists():
        raise ConfigError(
            f"there is no notebook {notebook}: name one of the course, or a folder for your copies"
        )
    return notebook


def _copy_what_is_missing(stored: Path, folder: Path) -> None:
    if all((folder / path.name).exists() for path in stored.glob("[!.]*.*")):
        return
    from flserving.lab.exercises import add_missing_copies  # loads nbformat, which takes a second

    add_missing_copies(stored, folder)


def main(arguments: Sequence[str]) -> int:
    """``[FOLDER or NOTEBOOK] [options of jupyter lab]``; by default the folder student."""
    own = bool(arguments) and not arguments[0].startswith("-")
    try:
        notebook = prepare(Path(arguments[0] if own else "student"))
    except (FlservingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # what the browser opens, and what the terminal shows
    address = f"/lab/tree/{quote(notebook.name)}"
    options = [f"--ServerApp.root_dir={notebook.parent}", f"--LabApp.default_url={address}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0 and "--allow-root" not in arguments:
        # containers and cloud notebooks are root; JupyterLab refuses that by default
        options.append("--allow-root")
    command = [sys.executable, "-m", "jupyterlab", *options, *arguments[own:]]
    if os.name == "nt":
        return subprocess.call(command)
    # in this process's place: signals reach JupyterLab, and torch leaves the memory
    os.execv(command[0], command)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
