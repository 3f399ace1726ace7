"""A notebook as slides, for a lecture: ``python run.py slides 03`` writes them; no kernel and no
network are needed.

Each cell's metadata say what it is in the talk, as JupyterLab's property inspector shows them: a
section begins a slide, what is shown lies below it, the text beside it is the speaker's notes (key
S). Solutions are on no slide.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter

from flserving.errors import ConfigError, FlservingError
from flserving.lab.pages.book import Pages, style_sheet
from flserving.lab.workbook.answers import replace_file

REVEAL = "reveal.js-5.2.1"
_NEEDED = ("package/dist/", "package/plugin/notes/", "package/LICENSE")  # of its archive


class Slides(Pages, SlidesExporter):
    """nbconvert's slides in a template of the lab, which loads reveal.js from the folder beside
    it."""


def write_slides(notebook: Path, out: Path, *, reveal: Path | None = None) -> Path:
    """Write the slides of a notebook, and reveal.js beside them if it is not there; return their
    page.

    Args:
        reveal: A folder with reveal.js unpacked; without it npm fetches it.

    Raises:
        ConfigError: reveal.js cannot be had.
    """
    content = nbformat.read(notebook, as_version=4)  # type: ignore[no-untyped-call]
    html, _ = Slides("slides.html.j2").from_notebook_node(
        content, {"metadata": {"path": str(notebook.parent), "name": notebook.stem}}
    )
    out.mkdir(parents=True, exist_ok=True)
    if not (out / REVEAL / "dist").is_dir():
        _fetch(out / REVEAL) if reveal is None else _copy(reveal, out / REVEAL)
    target = out / f"{notebook.stem}.html"
    replace_file(out / "slides.css", style_sheet("slides.css"))
    replace_file(target, html)
    return target


def _copy(reveal: Path, target: Path) -> None:
    for part in (Path(name).relative_to("package") for name in _NEEDED):
        source = reveal / part
        if not source.exists():
            raise ConfigError(
                f"{reveal} lacks {part}: unpack the archive of {REVEAL}, and name its folder package"
            )
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target / part) if source.is_dir() else shutil.copy(
            source, target / part
        )


def _fetch(target: Path) -> None:
    npm = shutil.which("npm")
    address = f"https://registry.npmjs.org/reveal.js/-/{REVEAL}.tgz"
    otherwise = f"or unpack {address} and name its folder package with --reveal"
    if npm is None:
        raise ConfigError(
            f"the slides need {REVEAL}, which npm fetches, and there is no npm: install it, {otherwise}"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", REVEAL.replace("-", "@"), "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
            raise ConfigError(
                f"npm could not fetch {REVEAL} ({last}): check the network, {otherwise}"
            )
        with tarfile.open(Path(folder) / f"{REVEAL}.tgz") as archive:
            archive.extractall(folder, filter="data")
        _copy(Path(folder) / "package", target)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m flserving.lab.pages.slides``: 0 when the slides are written, 1 with the reason
    when not."""
    parser = argparse.ArgumentParser(
        "python -m flserving.lab.pages.slides", description="Write notebooks as slides."
    )
    parser.add_argument("numbers", nargs="+", help="which notebooks: 03")
    parser.add_argument(
        "--notebooks", type=Path, default=Path("notebooks"), help="folder of the course (notebooks)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("slides"), help="folder for the slides (slides)"
    )
    parser.add_argument(
        "--reveal", type=Path, help=f"folder with {REVEAL} unpacked (without it npm fetches it)"
    )
    options = parser.parse_args(arguments)
    try:
        for number in options.numbers:
            found = sorted(options.notebooks.glob(f"{number}*.ipynb"))
            if len(found) != 1:
                raise ConfigError(
                    f"{len(found)} notebooks of {options.notebooks} begin with {number}: name one, as 03"
                )
            print(f"open {write_slides(found[0], options.out, reveal=options.reveal)}")
    except (FlservingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
