"""The course as a book: what a reader without kernel and without network gets."""

import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup

from flserving.errors import ConfigError
from flserving.lab.pages import book
from flserving.lab.pages.formula import formula

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CHOSEN = (
    "08_personalization_heads.ipynb",
    "09_model_optimization.ipynb",
)  # formulas, hints, widgets, exercises, folded cells
# attributes that make a browser ask for something
LOADS = ("src", "srcset", "poster", "data", "action")


@pytest.fixture(scope="module", params=["student", "instructor"])
def pages(request, tmp_path_factory):
    """Address -> page, of a book with two notebooks."""
    folder, out = tmp_path_factory.mktemp("course"), tmp_path_factory.mktemp("book")
    for name in (*CHOSEN, "README.md", "glossary.md", "references.md", "concept_map.svg"):
        shutil.copy(NOTEBOOKS / name, folder)
    shutil.copytree(NOTEBOOKS / "instructor", folder / "instructor")
    options = ["--instructor"] if request.param == "instructor" else []
    assert book.main([str(out), "--notebooks", str(folder), *options]) == 0
    found = {
        path.relative_to(out).as_posix(): path.read_text("utf-8") for path in out.rglob("*.html")
    }
    assert len(found) == (
        5 if request.param == "student" else 5 + len(list((folder / "instructor").iterdir()))
    )
    return {"book.css": (out / "book.css").read_text("utf-8")} | found


def soups(pages):
    return {
        name: BeautifulSoup(text, "html.parser")
        for name, text in pages.items()
        if name.endswith(".html")
    }


def test_nothing_is_asked_of_the_network_or_of_another_file(pages):
    """A page and the style sheet are all that a browser reads; links of the references may be
    followed."""
    for name, soup in soups(pages).items():
        assert not soup.find_all(["script", "iframe", "object", "embed"]), name
        loads = [tag[key] for tag in soup.find_all(True) for key in LOADS if tag.has_attr(key)]
        assert all(load.startswith("data:") for load in loads), name
        assert [Path(tag["href"]).name for tag in soup.find_all("link")] == ["book.css"]
        styles = " ".join([*(tag.text for tag in soup.find_all("style")), pages["book.css"]])
        assert not re.search(r"url\(|@import|expression\(", styles), name


def test_every_link_leads_somewhere(pages):
    found = soups(pages)
    for name, soup in found.items():
        for link in soup.find_all("a", href=True):
            file, _, part = link["href"].partition("#")
            if "://" in file:
                continue
            target = (
                str((Path("/") / name).parent.joinpath(unquote(file)).resolve())[1:]
                if file
                else name
            )
            assert target in found, f"{name} links to {link['href']}"
            assert not part or found[target].find(id=unquote(part)), (
                f"{name} links to {link['href']}"
            )


def test_one_can_turn_the_pages_from_the_first_to_the_last(pages):
    found = soups(pages)
    seen = ["index.html"]
    while following := found[seen[-1]].find("a", rel="next"):
        target = str((Path("/") / seen[-1]).parent.joinpath(following["href"]).resolve())[1:]
        back = found[target].find("a", rel="prev")["href"]
        assert str((Path("/") / target).parent.joinpath(back).resolve())[1:] == seen[-1]
        seen.append(target)
    assert sorted(seen) == sorted(found)
    for name, soup in found.items():
        (here,) = soup.find_all(attrs={"aria-current": "page"})
        assert here.text == soup.h1.get_text().removesuffix("#"), name
        assert len(here.parent.find_all("a")) == 1 + len(soup.main.find_all("h2"))


def test_pictures_and_formulas_have_words(pages):
    for name, soup in soups(pages).items():
        for picture in soup.find_all("img"):
            assert picture.get("alt", "").strip() and "No description" not in picture["alt"], name
        for drawn in soup.find_all("svg"):
            assert drawn["role"] == "img" and drawn["aria-label"].strip(), name
        for code in soup.find_all(["pre", "code"]):
            code.decompose()
        assert "$" not in soup.main.get_text(), f"{name}: a formula is not drawn"


def test_solutions_are_in_the_instructors_book_alone_and_hints_are_folded(pages):
    soup = soups(pages)["08_personalization_heads.html"]
    stubs = soup.main.get_text().count("replace this line with your code")
    for_teachers = any(name.startswith("instructor/") for name in pages)
    assert (stubs == 0) == for_teachers and (
        "BEGIN SOLUTION" in soup.main.get_text()
    ) == for_teachers
    hints = [box for box in soup.find_all("details") if box.summary.get_text().startswith("Hint")]
    assert hints and all(len(hint.get_text()) > 40 for hint in hints)


def test_a_folded_cell_can_be_opened(pages):
    folded = soups(pages)["09_model_optimization.html"].find_all(
        "summary", string="Code of what is shown below"
    )
    assert folded and all(summary.parent.find("pre") for summary in folded)


def test_every_formula_of_the_course_can_be_drawn():
    """Of all notebooks and guides: the book is not written at all if one cannot."""
    text = "\n\n".join(path.read_text("utf-8") for path in sorted(NOTEBOOKS.rglob("*.md")))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        text += "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    found = {
        one or line for one, line in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text, re.DOTALL)
    }
    assert len(found) > 80
    for tex in found:
        formula(tex)


def test_a_formula_stands_on_the_line_in_the_size_of_the_text():
    """x rests on the line; j goes below it; a fraction is taller than both."""
    place = re.compile(r"height: ([\d.]+)em; vertical-align: (-?[\d.]+)em")
    drawn = [place.search(formula(tex)) for tex in ("x", "j", r"\frac{1}{n}")]
    x, j, fraction = ([float(number) for number in found.groups()] for found in drawn)
    assert x[0] < j[0] < fraction[0] and abs(x[1]) < 0.05 and j[1] < -0.1 and fraction[1] < -0.2
    assert 'aria-label="a &lt; b"' in formula("a <\n b")
    with pytest.raises(
        ConfigError, match=r"the formula \$\\nosuch\$ cannot be drawn: .*Unknown symbol"
    ):
        formula(r"\nosuch")


def test_a_folder_without_notebooks_is_refused_and_nothing_is_written(tmp_path, capsys):
    assert book.main([str(tmp_path / "book"), "--notebooks", str(tmp_path)]) == 1
    assert "no notebooks in" in capsys.readouterr().err and not (tmp_path / "book").exists()
