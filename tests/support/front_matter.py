"""What is said about the course as a whole, made from the notebooks: the syllabus' tables, the
concept map, the stack.

``python tests/support/front_matter.py`` writes them anew into ``notebooks/`` and sorts the
glossary; a test holds them equal to the notebooks.
"""

import base64
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import nbformat
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
# how the notebooks' minutes are estimated
WORDS_PER_MIN, LINES_PER_MIN, WIDGET_MIN, SOLUTION_LINE_MIN = 110, 8, 5, 3
WEEKS = 12

# Which sections a workshop of two days does; of the other sections the cells are run, and nothing
# is read.
WORKSHOP: tuple[dict[str, tuple[int, ...]], ...] = (
    # () is all sections
    {"00": (), "01": (1, 3, 5, 6), "02": (1, 2, 3, 7), "03": (1, 2, 5, 6), "04": (1, 2, 3)},
    {
        "05": (1, 2, 5),
        "06": (2, 3),
        "07": (1, 2, 3, 4, 6),
        "08": (1, 2, 3),
        "09": (1, 2, 3, 6),
        "10": (1, 4, 6),
        "11": (1, 5),
    },
)

# Where a notebook stands in the concept map (row, column), and the ideas that it adds, in the words
# of the glossary.
PLACES: dict[str, tuple[int, float, tuple[str, ...]]] = {
    "00": (0, 1.5, ("serving", "inference engine", "p99")),
    "01": (1, 1.5, ("round", "version", "lineage", "worst client")),
    "10": (2, 0.5, ("gate", "canary", "sequential test", "bandit")),
    "02": (2, 2.0, ("stage", "deadline", "overload", "percentile")),
    "11": (3, 0.0, ("counter", "histogram", "error budget", "burn rate")),
    "03": (3, 1.0, ("LRU", "hit rate", "client scope", "single flight")),
    "04": (3, 2.0, ("work-conserving", "M/D/1", "knee", "Little's law")),
    "05": (3, 3.0, ("REST", "gRPC", "idempotent", "retry budget")),
    "08": (4, 0.0, ("personal head", "body", "gathered product")),
    "09": (4, 1.0, ("int8", "pruning", "distillation", "roofline")),
    "06": (4, 2.0, ("Amdahl's law", "open loop", "coordinated omission")),
    "07": (4, 3.0, ("hybrid", "delta", "degraded", "circuit breaker")),
}


@dataclass(frozen=True)
class Section:
    number: int
    title: str
    minutes: float


@dataclass(frozen=True)
class Chapter:
    """One notebook as the syllabus sees it."""

    number: str
    title: str
    file: str
    builds: str  # the first sentence of its opening
    minutes: int
    needs: tuple[str, ...]  # earlier notebooks that its opening names
    kept: tuple[str, ...]  # parts that go into my_stack
    sections: tuple[Section, ...]
    text: str  # all its Markdown


def chapters(folder: Path = NOTEBOOKS) -> list[Chapter]:
    """The course, read from its notebooks."""
    return [_chapter(path) for path in sorted(folder.glob("*.ipynb"))]


def _chapter(path: Path) -> Chapter:
    cells = nbformat.read(path, as_version=4).cells
    opening = "\n\n".join(
        cell.source for cell in itertools.takewhile(lambda it: it.cell_type == "markdown", cells)
    )
    paragraphs = [" ".join(paragraph.split()) for paragraph in opening.split("\n\n")]
    heading = re.fullmatch(r"# (\d\d) ([^:]+?)(?:: .+)?", paragraphs[0])
    assert heading, f"{path.name}: its title is not '# NN Title: subtitle'"
    number = heading[1]
    told = {
        name: text
        for name, _, text in (p.removeprefix("**").partition("** ") for p in paragraphs[1:])
    }
    minutes = int(re.search(r"\d+", told["Time"])[0])  # type: ignore[index]
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    kept = [
        name.strip()
        for names in re.findall(r"lab\.keep\(([\w, ]+)\)", code)
        for name in names.split(",")
    ]
    return Chapter(
        number=number,
        title=heading[2],
        file=path.name,
        builds=re.split(r"(?<=\w)\. (?=[A-Z])", told["You build"])[0].rstrip("."),
        minutes=minutes,
        needs=tuple(
            sorted({other for other in re.findall(r"\b\d\d\b", told["You need"]) if other < number})
        ),
        kept=tuple(kept),
        sections=tuple(_sections(cells, minutes)),
        text="\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown"),
    )


def _sections(cells: Sequence[NotebookNode], minutes: int) -> Iterator[Section]:
    """The numbered sections; the opening counts to the first, the summary to the last, their
    minutes sum to all."""
    found: list[tuple[int, str, float]] = []
    waiting = 0.0
    for cell in cells:
        heading = (
            re.search(r"^## (\d+) (.+)$", cell.source, re.MULTILINE)
            if cell.cell_type == "markdown"
            else None
        )
        if heading:
            found.append((int(heading[1]), heading[2], waiting))
            waiting = 0.0
        if found:
            number, title, so_far = found.pop()
            found.append((number, title, so_far + _minutes(cell)))
        else:
            waiting += _minutes(cell)
    total = sum(estimate for *_, estimate in found)
    for number, title, estimate in found:
        yield Section(number, title, minutes * estimate / total)


def _minutes(cell: NotebookNode) -> float:
    if cell.cell_type == "markdown":
        return len(cell.source.split()) / WORDS_PER_MIN
    if "widget" in cell.metadata.get("tags", []):
        return WIDGET_MIN
    if cell.metadata.get("jupyter", {}).get("source_hidden"):
        return 0.0  # how a figure is drawn: folded, to be looked up
    before, _, rest = cell.source.partition("### BEGIN SOLUTION")
    solution, _, after = rest.partition("### END SOLUTION")
    return (_lines(before) + _lines(after)) / LINES_PER_MIN + _lines(solution) * SOLUTION_LINE_MIN


def _lines(code: str) -> int:
    return sum(bool(line.strip()) for line in code.splitlines())


# The tables of the syllabus


def syllabus(course: Iterable[Chapter]) -> str:
    rows = [
        "| notebook | you build | parts you keep | minutes | needs |",
        "| --- | --- | --- | --- | --- |",
    ]
    total = 0
    for chapter in course:
        kept = ", ".join(f"`{name}`" for name in chapter.kept) or "-"
        needs = ", ".join(chapter.needs) or "-"
        link = f"[{chapter.number} {chapter.title}]({chapter.file})"
        rows.append(f"| {link} | {chapter.builds} | {kept} | {chapter.minutes} | {needs} |")
        total += chapter.minutes
    return "\n".join([*rows, f"| together | | | {total} ({total / 60:.0f} h) | |"])


def workshop(course: Sequence[Chapter]) -> str:
    by_number = {chapter.number: chapter for chapter in course}
    rows = ["| day | notebook | sections | minutes |", "| --- | --- | --- | --- |"]
    for day, picks in enumerate(WORKSHOP, start=1):
        total = 0.0
        for number, wanted in picks.items():
            chapter = by_number[number]
            taken = [
                section for section in chapter.sections if section.number in wanted or not wanted
            ]
            assert len(taken) == len(wanted or chapter.sections), (
                f"{chapter.file} has no section of {wanted}"
            )
            minutes = sum(section.minutes for section in taken)
            total += minutes
            rows.append(f"| {day} | {_link(chapter)} | {_told(taken, chapter)} | {minutes:.0f} |")
        rows.append(f"| | together | | {total:.0f} |")
    return "\n".join(rows)


def semester(course: Iterable[Chapter]) -> str:
    rows = ["| week | notebooks and sections | minutes |", "| --- | --- | --- |"]
    for week, taken in enumerate(weeks(list(course)), start=1):
        parts = []
        for chapter, group in itertools.groupby(taken, key=lambda pair: pair[0]):
            parts.append(f"{_link(chapter)}: {_told([section for _, section in group], chapter)}")
        minutes = sum(section.minutes for _, section in taken)
        rows.append(f"| {week} | {'; '.join(parts)} | {minutes:.0f} |")
    return "\n".join(rows)


def weeks(course: Sequence[Chapter], count: int = WEEKS) -> list[list[tuple[Chapter, Section]]]:
    """All sections in their order, in weeks of about the same length that end with a notebook where
    they can."""
    steps = [(chapter, section) for chapter in course for section in chapter.sections]
    ends = [0, *itertools.accumulate(section.minutes for _, section in steps)]
    aim = ends[-1] / count
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,))] + [(float("inf"), ())] * len(steps)
    for _ in range(count):  # the best way to fill one week more, for every last section
        cuts = [
            not at or at == len(steps) or steps[at - 1][0] != steps[at][0]
            for at in range(len(steps) + 1)
        ]
        best = [
            min(
                (
                    cost + (ends[at] - ends[start] - aim) ** 2 + (0 if cuts[at] else 20**2),
                    (*path, at),
                )
                for start, (cost, path) in enumerate(best[: at + 1])
            )
            for at in range(len(steps) + 1)
        ]
    return [steps[start:end] for start, end in itertools.pairwise(best[-1][1])]


def _link(chapter: Chapter) -> str:
    return f"[{chapter.number} {chapter.title}]({chapter.file})"


def _told(taken: Sequence[Section], chapter: Chapter) -> str:
    """'all', '3', '1 to 4' or '1, 3, 5'."""
    numbers = [section.number for section in taken]
    if len(numbers) == len(chapter.sections):
        return "all"
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def with_tables(text: str, course: Sequence[Chapter]) -> str:
    """The syllabus' text with its tables made anew; a table stands between <!-- name --> and <!--
    end -->."""
    for name, make in (("syllabus", syllabus), ("workshop", workshop), ("semester", semester)):
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        made = f"\n{make(course)}\n"
        text, found = re.subn(pattern, lambda m: m[1] + made + m[2], text, flags=re.DOTALL)  # noqa: B023
        assert found == 1, f"<!-- {name} --> ... <!-- end --> is there {found} times"
    return text


# The concept map

# boxes bring their paper along: any theme
INK, PAPER, EDGE, LINE = "#1b2733", "#eef3f8", "#44617d", "#7a8793"
# 14 px are 10.5 pt
TEXT_PX, LINE_PX, WIDTH_PX, BOX_PX, GAP_PX, DROP_PX, PAD_PX = 14, 18, 880, 206, 16, 44, 6

BOLD = ' font-weight="bold"'


def concept_map(course: Sequence[Chapter]) -> str:
    """The course as boxes, and arrows from what a notebook needs; what is needed by way of another
    is left out."""
    missing = {chapter.number for chapter in course} ^ set(PLACES)
    assert not missing, f"PLACES in front_matter.py and the notebooks differ in {sorted(missing)}"
    arrows = [
        (other, chapter.number) for chapter in course for other in direct_needs(chapter, course)
    ]
    leads = {start: [end for other, end in arrows if other == start] for start, _ in arrows}
    told = ". ".join(f"{start} leads to {', '.join(ends)}" for start, ends in leads.items())
    tops = _tops(course)
    boxes = {chapter.number: _box(chapter, tops[PLACES[chapter.number][0]]) for chapter in course}
    height = max(y + tall for _, y, tall, _ in boxes.values()) + PAD_PX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {height}" width="{WIDTH_PX}" '
        f'height="{height}" role="img" aria-labelledby="title desc" font-family="sans-serif" font-size="{TEXT_PX}">',
        '<title id="title">Concept map of the course</title>',
        f'<desc id="desc">{len(boxes)} boxes, one a notebook with the ideas that it adds; an arrow leads from a '
        f"notebook to one that needs it. {told}.</desc>",
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 10 5 0 10z" fill="{LINE}"/></marker></defs>',
    ]
    for start, end in arrows:
        (x0, y0, tall, _), (x1, y1, _, _) = boxes[start], boxes[end]
        at_x, to_x, at_y, to_y = x0 + BOX_PX / 2, x1 + BOX_PX / 2, y0 + tall, y1 - 2
        bend = (at_y + to_y) / 2
        parts.append(
            f'<path d="M{at_x:g} {at_y:g}C{at_x:g} {bend:g} {to_x:g} {bend:g} {to_x:g} {to_y:g}" fill="none" '
            f'stroke="{LINE}" stroke-width="2" marker-end="url(#tip)"/>'
        )
    parts.extend(drawn for *_, drawn in boxes.values())
    return "\n".join([*parts, "</svg>", ""])


def direct_needs(chapter: Chapter, course: Sequence[Chapter]) -> list[str]:
    """What a notebook needs and does not get by way of another that it needs."""
    needs = {other.number: set(other.needs) for other in course}

    def all_of(number: str) -> set[str]:
        return needs[number].union(*map(all_of, needs[number])) if needs[number] else set()

    return [
        number
        for number in chapter.needs
        if not any(number in all_of(other) for other in chapter.needs)
    ]


def _lines_of(chapter: Chapter) -> list[str]:
    """What stands in a notebook's box: its title, then its ideas."""
    return textwrap.wrap(f"{chapter.number} {chapter.title}", width=23) + list(
        PLACES[chapter.number][2]
    )


def _height(chapter: Chapter) -> int:
    return LINE_PX * len(_lines_of(chapter)) + 14


def _tops(course: Sequence[Chapter]) -> list[int]:
    """Where each row begins: a row is as high as its tallest box."""
    rows = [max(map(_height, group)) for group in _rows(course)]
    return [PAD_PX + sum(rows[:row]) + DROP_PX * row for row in range(len(rows))]


def _rows(course: Sequence[Chapter]) -> list[list[Chapter]]:
    count = 1 + max(row for row, *_ in PLACES.values())
    return [
        [chapter for chapter in course if PLACES[chapter.number][0] == row] for row in range(count)
    ]


def _box(chapter: Chapter, top: int) -> tuple[float, int, int, str]:
    """Left, top and height of a notebook's box, and its drawing."""
    _, column, ideas = PLACES[chapter.number]
    left, tall, lines = PAD_PX + column * (BOX_PX + GAP_PX), _height(chapter), _lines_of(chapter)
    rows = "".join(
        f'<text x="{left + 10:g}" y="{top + 20 + LINE_PX * i}" fill="{INK}"'
        f"{BOLD if i < len(lines) - len(ideas) else ''}>{escape(text)}</text>"
        for i, text in enumerate(lines)
    )
    frame = f'fill="{PAPER}" stroke="{EDGE}" stroke-width="1.5"'
    return (
        left,
        top,
        tall,
        f'<rect x="{left:g}" y="{top}" width="{BOX_PX}" height="{tall}" rx="6" {frame}/>{rows}',
    )


def sorted_glossary(text: str) -> str:
    """The glossary with its terms in order, whatever line a new one was put on."""
    head, *entries = re.split(r"^(?=- \*\*)", text.rstrip("\n") + "\n", flags=re.MULTILINE)
    return head + "".join(
        sorted(entries, key=lambda line: line.split("**")[1].strip("`").casefold())
    )


def stack_picture(folder: Path = NOTEBOOKS) -> bytes:
    """The picture of the stack as notebook 00 stores it; the top README shows it, too."""
    cells = nbformat.read(folder / "00_start_here.ipynb", as_version=4).cells
    for output in itertools.chain.from_iterable(cell.get("outputs", ()) for cell in cells):
        if "How a version gets into memory" in output.get("metadata", {}).get("image/png", {}).get(
            "alt", ""
        ):
            return base64.b64decode(output.data["image/png"])
    raise LookupError("notebook 00 stores no picture of the stack: run it and store its outputs")


def main() -> None:
    course = chapters()
    glossary = NOTEBOOKS / "glossary.md"
    glossary.write_text(sorted_glossary(glossary.read_text(encoding="utf-8")), encoding="utf-8")
    page = NOTEBOOKS / "README.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8"), course), encoding="utf-8")
    (NOTEBOOKS / "stack.png").write_bytes(stack_picture())
    (NOTEBOOKS / "concept_map.svg").write_text(concept_map(course), encoding="utf-8")


if __name__ == "__main__":
    main()
