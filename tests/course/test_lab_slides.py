"""Slides of a notebook: what a lecturer shows and says, without kernel and without network."""

import subprocess
import tarfile
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from flserving.lab.pages import slides
from slideshow import NOTEBOOKS, slide_type, with_slides

NAME = "08_personalization_heads"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture(scope="module")
def notebook():
    return with_slides(nbformat.read(NOTEBOOKS / f"{NAME}.ipynb", as_version=4))


@pytest.fixture(scope="module")
def course(notebook, tmp_path_factory):
    """A folder of one notebook, and beside it what stands in reveal.js's archive."""
    folder = tmp_path_factory.mktemp("course")
    nbformat.write(notebook, folder / f"{NAME}.ipynb")
    for name in (
        "LICENSE",
        "dist/reveal.js",
        "dist/reveal.css",
        "plugin/notes/notes.js",
        "plugin/math/math.js",
    ):
        (folder / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "package" / name).write_text(name)
    return folder


def call(course, out, *options):
    return slides.main(["08", "--notebooks", str(course), "--out", str(out), *options])


@pytest.fixture(scope="module")
def talk(course, tmp_path_factory):
    """The page and its folder."""
    out = tmp_path_factory.mktemp("slides")
    assert call(course, out, "--reveal", str(course / "package")) == 0
    return BeautifulSoup((out / f"{NAME}.html").read_text("utf-8"), "html.parser"), out


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_metadata_of_the_notebooks_are_current(path):
    """If this fails: python tests/support/slideshow.py"""
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.metadata.get("slideshow", {}).get("slide_type") for cell in cells] == list(
        map(slide_type, cells)
    )


def test_the_rule():
    shows = {"outputs": [new_output("stream", text="5 ms")]}
    exercise = {"metadata": {"nbgrader": {"solution": True}}}
    expected = [
        (new_markdown_cell("# 03 Caching"), "slide"),
        (new_markdown_cell("## 1 Why\n\nText."), "slide"),
        (new_markdown_cell("### Exercise"), "subslide"),
        (new_markdown_cell("#tag and text"), "notes"),
        (new_code_cell("ask()", **shows), "subslide"),
        (new_code_cell("def ask(): ..."), "skip"),
        (new_code_cell("lab.quiz('03')", **shows), "skip"),
        (new_code_cell("def lru(): ...", **exercise, **shows), "skip"),
        (new_code_cell("explore()", metadata={"tags": ["widget"]}, **shows), "skip"),
    ]
    assert [slide_type(cell) for cell, _ in expected] == [word for _, word in expected]


def test_a_section_is_a_slide_and_what_it_shows_lies_below(notebook, talk):
    kinds = [slide_type(cell) for cell in notebook.cells]
    across = talk[0].select(".slides > section")
    assert len(across) == kinds.count("slide") > 8
    assert sum(len(slide.find_all("section")) for slide in across) == kinds.count(
        "slide"
    ) + kinds.count("subslide")
    assert len(talk[0].select("aside.notes")) == kinds.count("notes") > 5
    assert all(slide.find("section").find(["h1", "h2"]) for slide in across)


def test_no_solution_is_shown_and_every_picture_has_words(notebook, talk):
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            assert "BEGIN SOLUTION" in cell.source
    assert "SOLUTION" not in talk[0].get_text()
    pictures = talk[0].find_all("img")
    assert len(pictures) >= 5 and all(picture["alt"].strip() for picture in pictures)
    assert all(drawn["aria-label"] for drawn in talk[0].find_all("svg"))


def test_folded_code_is_not_shown(tmp_path, course):
    """The talk shows the figure, not how it is drawn."""
    shows = {"outputs": [new_output("stream", text="5 ms")]}
    cells = [
        new_code_cell("folded()", metadata={"jupyter": {"source_hidden": True}}, **shows),
        new_code_cell("open()", **shows),
    ]
    content = nbformat.v4.new_notebook(cells=[new_markdown_cell("# 12"), *cells])
    nbformat.write(with_slides(content), tmp_path / "12.ipynb")
    page = slides.write_slides(
        tmp_path / "12.ipynb", tmp_path, reveal=course / "package"
    ).read_text("utf-8")
    assert page.count("5 ms") == 2 and "folded" not in page and "open" in page


def test_all_that_the_page_asks_for_lies_beside_it(talk):
    page, out = talk
    asked = [
        tag.get("src") or tag.get("href") for tag in page.find_all(["script", "link"]) if tag.attrs
    ]
    assert len(asked) == 4 and all((out / name).is_file() for name in asked)
    assert all(picture["src"].startswith("data:") for picture in page.find_all("img"))
    assert not (out / slides.REVEAL / "plugin" / "math").exists(), "it is not needed"


def test_reveal_is_fetched_once_by_npm(course, tmp_path, monkeypatch):
    calls = []

    def npm(command, **_):
        calls.append(command)
        with tarfile.open(Path(command[-1]) / "reveal.js-5.2.1.tgz", "w:gz") as archive:
            archive.add(course / "package", "package")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(slides.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(slides.subprocess, "run", npm)
    assert call(course, tmp_path) == call(course, tmp_path) == 0
    assert [command[:3] for command in calls] == [["/bin/npm", "pack", "reveal.js@5.2.1"]]
    assert (
        tmp_path / slides.REVEAL / "plugin" / "notes" / "notes.js"
    ).read_text() == "plugin/notes/notes.js"


def test_without_npm_without_network_and_with_a_wrong_folder_it_says_what_to_do(
    course, tmp_path, monkeypatch, capsys
):
    def says(*options):
        assert call(course, tmp_path, *options) == 1
        return capsys.readouterr().err

    monkeypatch.setattr(slides.shutil, "which", lambda name: None)
    assert (
        "there is no npm: install it, or unpack https://registry.npmjs.org/reveal.js/-/reveal.js-5.2.1.tgz"
        in says()
    )
    failed = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\n")
    monkeypatch.setattr(slides.shutil, "which", lambda name: name)
    monkeypatch.setattr(slides.subprocess, "run", lambda *_, **__: failed)
    assert (
        "npm could not fetch reveal.js-5.2.1 (npm error code ENOTFOUND): check the network, or unpack"
        in says()
    )
    assert f"{tmp_path} lacks dist: unpack" in says("--reveal", str(tmp_path))
    assert slides.main(["0", "--notebooks", str(NOTEBOOKS), "--out", str(tmp_path)]) == 1
    assert (
        f"{len([path for path in PATHS if path.name[0] == '0'])} notebooks of"
        in capsys.readouterr().err
    )
