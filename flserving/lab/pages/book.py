"""The course as a book: static pages that need no kernel and no network. ``python run.py book``
writes it.

The notebooks stand there as students get them, beside the syllabus, the glossary and the
references. The instructor's book (``--instructor``) has the solutions and the guides too. Each page
is one file with its figures and formulas in it.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import nbformat
from bs4 import BeautifulSoup
from jinja2 import pass_context
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from flserving.errors import ConfigError, FlservingError
from flserving.lab.exercises import student_copy
from flserving.lab.pages.formula import formula
from flserving.lab.workbook.answers import replace_file

HERE = Path(__file__).parent
_FIRST = "README.md"  # of the pages that are no notebooks
_LAST = ["glossary.md", "references.md"]
_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Page:
    """A file of the course and the page that it becomes; both paths are relative."""

    source: str
    title: str
    notebook: NotebookNode

    @property
    def address(self) -> str:
        """Where it stands in the book."""
        path = PurePosixPath(self.source)
        if path.name == _FIRST:
            return str(path.with_name("index.html"))
        return str(path.with_suffix(".html"))


class _Renderer(IPythonRenderer):
    def block_math(self, body: str) -> str:
        return f'<p class="formula">{formula(body)}</p>'

    def inline_math(self, body: str) -> str:
        return formula(body)

    # nbconvert's own would close at once what a later block ends: <details>
    def block_html(self, html: str) -> str:
        return html


class Pages(HTMLExporter):
    """nbconvert's HTML in a template of the lab, with formulas and pictures in the page itself."""

    def __init__(self, template: str, **traits: Any) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            extra_template_paths=[str(HERE)],
            template_file=template,
            exclude_input_prompt=True,
            exclude_output_prompt=True,
            **traits,
        )

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        """The filter of the templates, for Markdown in cells and in outputs."""
        folder = context["resources"]["metadata"]["path"]
        renderer = _Renderer(escape=False, embed_images=True, path=folder, anchor_link_text="#")
        return str(MarkdownWithMath(renderer=renderer).render(source))


def build(notebooks: Path, out: Path, *, instructor: bool = False) -> list[Path]:
    """Write the book of the notebooks and texts in a folder; return its pages, in order.

    Raises:
        ConfigError: There are no notebooks, or a formula cannot be drawn.

    Cost: about a second a notebook.
    """
    sources = [notebooks / _FIRST, *sorted(notebooks.glob("*.ipynb"))]
    sources += [notebooks / name for name in _LAST]
    if instructor:
        guides = sorted((notebooks / "instructor").glob("*.md"))
        sources += sorted(guides, key=lambda path: path.name != _FIRST)
    pages = [_page(path, notebooks, instructor) for path in sources if path.exists()]
    if not any(page.source.endswith(".ipynb") for page in pages):
        raise ConfigError(f"no notebooks in {notebooks}: give the folder with --notebooks")
    exporter = Pages("book.html.j2")
    for number, page in enumerate(pages):
        around: dict[str, Any] = {"before": None, "page": page, "pages": pages, "after": None}
        if number > 0:
            around["before"] = pages[number - 1]
        if number + 1 < len(pages):
            around["after"] = pages[number + 1]
        around["root"] = "../" * page.source.count("/")
        folder = str((notebooks / page.source).parent)
        resources = {"metadata": {"path": folder}, "book": around}
        html, _ = exporter.from_notebook_node(page.notebook, resources)
        target = out / page.address
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, _linked(html, page, pages))
    replace_file(out / "book.css", style_sheet("book.css"))
    return [out / page.address for page in pages]


def style_sheet(name: str) -> str:
    """Paper and ink, the layout of ``name`` in this folder, and the colours of code: on light and
    on dark paper."""
    sheets = [(HERE / sheet).read_text("utf-8") for sheet in ("paper.css", name)]
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return "\n".join([*sheets, light, f"@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"])


def _page(path: Path, notebooks: Path, instructor: bool) -> Page:
    if path.suffix == ".ipynb":
        notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        notebook = notebook if instructor else student_copy(notebook)
    else:
        cell = nbformat.v4.new_markdown_cell(path.read_text(encoding="utf-8"))  # type: ignore[no-untyped-call]
        notebook = nbformat.v4.new_notebook(cells=[cell])  # type: ignore[no-untyped-call]
    title = path.stem
    heading = _TITLE.search(notebook.cells[0].source)
    if heading is not None:
        title = heading[1]
    return Page(path.relative_to(notebooks).as_posix(), title, notebook)


def _linked(html: str, page: Page, pages: Sequence[Page]) -> str:
    """The page with links to pages of the book, not to files of the course, and its own sections in
    the contents."""
    soup: Any = BeautifulSoup(html, "html.parser")
    here = PurePosixPath(page.source).parent
    address = {each.source: os.path.relpath(each.address, here) for each in pages}
    for link in soup.select(".cell a[href]"):
        file, mark, part = link["href"].partition("#")
        if file and "://" not in file:
            wanted = os.path.normpath(here / file)
            if wanted in address:
                link["href"] = f"{address[wanted]}{mark}{part}"
            else:  # not in this book: a guide, the source text
                link.unwrap()
    contents = soup.find(attrs={"aria-current": "page"}).parent
    sections = soup.new_tag("ul")
    for heading in soup.main.find_all("h2", id=True):
        entry = soup.new_tag("a", href=f"#{heading['id']}")
        entry.string = heading.get_text().removesuffix("#")
        sections.append(soup.new_tag("li"))
        sections.contents[-1].append(entry)
    contents.append(sections)
    return str(soup)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m flserving.lab.pages.book``: 0 when the book is written, 1 with the reason when
    not."""
    parser = argparse.ArgumentParser(
        "python -m flserving.lab.pages.book", description="Write the course as a book in HTML."
    )
    parser.add_argument(
        "out", type=Path, nargs="?", default=Path("book"), help="folder for the pages (book)"
    )
    parser.add_argument(
        "--notebooks", type=Path, default=Path("notebooks"), help="folder of the course (notebooks)"
    )
    parser.add_argument(
        "--instructor", action="store_true", help="with the solutions and the guides for teachers"
    )
    options = parser.parse_args(arguments)
    try:
        pages = build(options.notebooks, options.out, instructor=options.instructor)
    except (FlservingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(pages)} pages; open {pages[0]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
