"""The syllabus, the concept map, the glossary and the references say what is in the notebooks and
the package."""

import contextlib
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import front_matter
from contrast import contrast
from front_matter import (
    INK,
    LINE,
    NOTEBOOKS,
    PAPER,
    PLACES,
    WORKSHOP,
    Chapter,
    chapters,
    direct_needs,
    weeks,
)

ROOT = NOTEBOOKS.parent
pytestmark = pytest.mark.skipif(not any(NOTEBOOKS.glob("*.ipynb")), reason="no notebooks yet")
PAGES = ("README.md", "glossary.md", "references.md")
AGAIN = "run python tests/support/front_matter.py"

# Bold for stress, and not because they are terms. Longer phrases, and what ends like a sentence,
# count as stress, too.
STRESSED = {
    *(
        "guess",
        "plug it in",
        "keep it",
        "one",
        "your",
        "every",
        "both",
        "any",
        "nothing",
        "users",
        "wait",
        "evenly",
    ),
    *(
        "at once",
        "in another thread",
        "more than half",
        "sums so far",
        "compares",
        "error",
        "microseconds",
        "99.9 %",
    ),
    *(
        "for the devices",
        "for the centre",
        "reading",
        "multiplying",
        "false alarms",
        "loud attacks",
        "quiet attacks",
    ),
    *("a backdoor is not", "loop over nn.linear", "whole hidden units", "one gathered product"),
}


def page(name: str) -> str:
    return (NOTEBOOKS / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def course() -> list[Chapter]:
    return chapters()


# The syllabus


def test_the_tables_are_those_of_the_notebooks(course):
    assert page("README.md") == front_matter.with_tables(page("README.md"), course), AGAIN


def test_the_minutes_are_those_of_the_top_readme(course):
    top = (ROOT / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| \[(\d\d) .+?\]\(.+?\) \| .+? \| (\d+) \|$", top, re.MULTILINE))
    assert told == {chapter.number: str(chapter.minutes) for chapter in course}


def test_every_notebook_says_what_it_needs_and_its_sections_count_up(course):
    for chapter in course:
        numbers = [section.number for section in chapter.sections]
        assert numbers == list(range(1, len(numbers) + 1)), f"{chapter.file}: sections {numbers}"
        assert sum(section.minutes for section in chapter.sections) == pytest.approx(
            chapter.minutes
        )
        assert chapter.needs or chapter.number == "00", (
            f"{chapter.file}: its opening names no earlier notebook"
        )


def test_the_semester_has_every_section_once_and_no_long_week(course):
    found = weeks(course)
    assert len(found) == front_matter.WEEKS
    assert [pair for week in found for pair in week] == [
        (c, section) for c in course for section in c.sections
    ]
    mean = sum(chapter.minutes for chapter in course) / len(found)
    for number, week in enumerate(found, start=1):
        minutes = sum(section.minutes for _, section in week)
        assert 0.6 * mean < minutes < 1.4 * mean, (
            f"week {number}: {minutes:.0f} min, the mean is {mean:.0f}"
        )


def test_a_day_of_the_workshop_fits_into_a_day(course):
    by_number = {chapter.number: chapter for chapter in course}
    for picks in WORKSHOP:
        taken = [
            section.minutes
            for number, wanted in picks.items()
            for section in by_number[number].sections
            if not wanted or section.number in wanted
        ]
        assert 180 < sum(taken) < 400


def test_the_self_test_has_ten_questions_with_true_answers():
    questions = page("README.md").split("**Test yourself.**")[1].split("**Question ")[1:]
    assert [int(question.split("**")[0]) for question in questions] == list(range(1, 11))
    printed = 0
    for question in questions:
        asked, answer = question.split("<details><summary>Answer</summary>\n")
        assert answer.rstrip().endswith("</details>")
        for code in re.findall(r"```python\n(.*?)```", asked, re.DOTALL):
            told = io.StringIO()
            with contextlib.redirect_stdout(told):
                exec(code, {})
            assert told.getvalue() in re.findall(r"```text\n(.*?)```", answer, re.DOTALL), code
            printed += 1
    assert printed >= 4


# The concept map


def test_the_map_is_that_of_the_notebooks(course):
    assert (NOTEBOOKS / "concept_map.svg").read_text(encoding="utf-8") == front_matter.concept_map(
        course
    ), AGAIN


def test_the_picture_of_the_stack_is_the_one_of_notebook_00():
    assert (NOTEBOOKS / "stack.png").read_bytes() == front_matter.stack_picture(), (
        "run tests/support/front_matter.py"
    )


def test_the_map_is_read_by_people_with_screen_readers_and_on_a_dark_page():
    svg = ElementTree.fromstring((NOTEBOOKS / "concept_map.svg").read_bytes())
    names = {element.tag.rpartition("}")[2]: element for element in svg.iter()}
    assert svg.get("role") == "img"
    assert svg.get("aria-labelledby") == f"{names['title'].get('id')} {names['desc'].get('id')}"
    assert float(svg.get("font-size")) * 72 / 96 >= 10, "text of less than 10 pt"
    assert contrast(INK, PAPER) >= 7
    assert min(contrast(LINE, "#ffffff"), contrast(LINE, "#111111")) >= 3, (
        "the arrows lie on the page itself"
    )


def test_no_box_of_the_map_covers_another_and_none_leaves_the_page():
    svg = ElementTree.fromstring((NOTEBOOKS / "concept_map.svg").read_bytes())
    width, height = (float(svg.get(name)) for name in ("width", "height"))
    boxes = [
        [float(rect.get(name)) for name in ("x", "y", "width", "height")]
        for rect in svg.iter()
        if "rect" in rect.tag
    ]
    assert len(boxes) == len(PLACES)
    for at, (x, y, wide, tall) in enumerate(boxes):
        assert 0 <= x <= x + wide <= width and 0 <= y <= y + tall <= height
        for x2, y2, wide2, tall2 in boxes[:at]:
            assert x + wide < x2 or x2 + wide2 < x or y + tall < y2 or y2 + tall2 < y


def test_the_ideas_of_the_map_are_terms_of_their_notebooks(course):
    terms = {term for term, *_ in glossary()}
    for chapter in course:
        for idea in PLACES[chapter.number][2]:
            assert idea in terms, f"{idea} is not in glossary.md"
            assert idea.casefold() in plain(chapter.text), f"{chapter.file} does not say {idea}"


def test_arrows_leave_out_what_is_needed_by_way_of_another():
    def chapter(number: str, *needs: str) -> Chapter:
        return Chapter(number, "", "", "", 1, needs, (), (), "")

    course = [
        chapter("00"),
        chapter("01", "00"),
        chapter("02", "00", "01"),
        chapter("03", "00", "02"),
    ]
    assert [direct_needs(one, course) for one in course] == [[], ["00"], ["01"], ["02"]]


# The glossary


def glossary() -> list[tuple[str, str, str, str]]:
    """Term, number and file of its notebook, sentence."""
    lines = [line for line in page("glossary.md").splitlines() if line.startswith("- ")]
    found = [re.fullmatch(r"- \*\*(.+?)\*\* \(\[(\d\d)\]\((.+?)\)\): (.+)", line) for line in lines]
    assert all(found), f"not '- **term** ([NN](file)): sentence': {lines[found.index(None)]}"
    return [match.groups() for match in found]


def plain(markdown: str) -> str:
    return " ".join(re.sub(r"[*`]", "", markdown).split()).casefold()


def bare(term: str) -> str:
    """Without backticks and the note in brackets that tells it from another of the same name."""
    return re.sub(r" \(.+\)$", "", term).strip("`").casefold()


def test_terms_are_sorted_unique_and_one_sentence_each():
    terms = [term.strip("`").casefold() for term, *_ in glossary()]
    assert terms == sorted(set(terms)), AGAIN
    for term, _, _, sentence in glossary():
        assert sentence.endswith(".") and not re.search(r"[.] [A-Z]", sentence), (
            f"{term}: one sentence"
        )


def test_a_new_term_may_be_put_on_any_line():
    text = page("glossary.md")
    head, first, rest = re.split(r"^(?=- \*\*)", text, maxsplit=2, flags=re.MULTILINE)
    assert front_matter.sorted_glossary(f"{head}{rest}{first}") == text


def test_each_term_occurs_in_the_notebook_that_it_links_to(course):
    texts = {chapter.number: (chapter.file, plain(chapter.text)) for chapter in course}
    for term, number, file, _ in glossary():
        assert (NOTEBOOKS / file).is_file() and texts[number][0] == file, (
            f"{term}: {number} is not {file}"
        )
        assert bare(term) in texts[number][1], f"{term} does not occur in {file}"


def test_every_bold_term_of_the_notebooks_is_explained(course):
    terms = {(number, bare(term)) for term, number, *_ in glossary()}
    everywhere = {term for _, term in terms}
    for chapter in course:
        opening, _, rest = chapter.text.partition("**Guess first:**")
        assert rest, opening
        for bold in re.findall(r"\*\*(.+?)\*\*", rest, re.DOTALL):
            word = " ".join(bold.split()).strip("`").casefold()
            if word in STRESSED or word[-1] in ".:?" or len(word.split()) > 3:
                continue
            known = {
                word,
                word.removesuffix("s"),
                word.removesuffix("ed"),
                word.removesuffix("d"),
            } & everywhere
            part = any(
                term.startswith(f"{word} ") or term.endswith(f" {word}")
                for n, term in terms
                if n == chapter.number
            )
            assert known or part, (
                f"{chapter.file}: explain **{bold}** in notebooks/glossary.md, or name it in STRESSED if it is no term"
            )


# The references


ARXIV = re.compile(r"arXiv[:\s]+(\d{4}\.\d{4,5})")
DOI = re.compile(r"(?:doi\.org/|DOI )(10\.\d{4,9}/[^\s\]>\"'`]*[^\s\]>\"'`.,;)])")
NAMED = re.compile(
    r"([A-Z][\w-]+)(?:, [A-Z]\w+)*(?: et al\.| and [A-Z][\w-]+)?,? (?:[A-Z]\w+ )?\(?((?:19|20)\d\d)\b"
)
NOT_AUTHORS = {"Wiley"}


def entries() -> list[str]:
    body = page("references.md").split("\n## ", 1)[1]
    return [
        " ".join(entry.split())
        for entry in re.findall(r"^- (.+?)(?=^- |^## |\Z)", body, re.DOTALL | re.MULTILINE)
    ]


def test_numbers_have_the_right_form_and_lead_to_themselves():
    for entry in entries():
        for number, link in re.findall(r"\[arXiv ([^]]+)\]\(([^)]+)\)", entry):
            assert re.fullmatch(r"\d\d(0[1-9]|1[0-2])\.(\d{4}|\d{5})", number), entry
            assert len(number) == (9 if number < "1501" else 10), (
                f"arXiv counts with five digits since 2015: {entry}"
            )
            assert link == f"https://arxiv.org/abs/{number}"
        for number, link in re.findall(r"\[DOI ([^]]+)\]\((\S+)\)(?=\.)", entry):
            assert re.fullmatch(r"10\.\d{4,9}/\S+", number), entry
            assert link == f"https://doi.org/{number}"
        assert entry.count("[DOI ") + entry.count("[arXiv ") <= 1
    numbers = [
        number for entry in entries() for number in re.findall(r"\[(?:arXiv|DOI) ([^]]+)\]", entry)
    ]
    assert len(numbers) == len(set(numbers)) >= 30


def test_every_source_has_a_title_a_year_and_its_use():
    for entry in entries():
        head, _, use = entry.rpartition(". ")
        assert re.search(r'"[^"]+"|protocol', head, re.IGNORECASE), f"no title: {entry}"
        assert re.search(r"\b(19|20)\d\d\b|github\.com", head), f"no year: {entry}"
        assert use.endswith(".") and len(use.split()) >= 3, f"no sentence on its use: {entry}"


def test_sources_stand_under_a_notebook(course):
    headings = re.findall(r"^## (\d\d) (.+)$", page("references.md"), re.MULTILINE)
    assert headings == [(chapter.number, chapter.title) for chapter in course]


def test_every_number_that_package_and_notebooks_cite_is_a_reference(course):
    listed = page("references.md")
    texts = {
        path.relative_to(ROOT): path.read_text(encoding="utf-8")
        for path in (ROOT / "flserving").rglob("*.py")
    }
    texts |= {Path(chapter.file): chapter.text for chapter in course}
    cited = [
        (path, number)
        for path, text in texts.items()
        for number in (*ARXIV.findall(text), *DOI.findall(text))
    ]
    assert len(cited) > 15
    for path, number in cited:
        assert number in listed, f"{path} cites {number}: add it to notebooks/references.md"


def test_every_name_with_a_year_in_the_notebooks_is_a_reference(course):
    listed = entries()
    cited = [
        (chapter.file, *found)
        for chapter in course
        for found in NAMED.findall(plain_text(chapter.text))
    ]
    names = {(name, year) for _, name, year in cited}
    assert {("McMahan", "2017"), ("Che", "2002"), ("Little", "1961")} & names, (
        "the pattern finds nothing"
    )
    for file, name, year in cited:
        assert name in NOT_AUTHORS or any(name in entry and year in entry for entry in listed), (
            f"{file} cites {name} {year}: add it to notebooks/references.md"
        )


def plain_text(markdown: str) -> str:
    return " ".join(re.sub(r"[*`]", "", markdown).split())


# All pages


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(((?:[^()\s]|\([^()]*\))+)\)", page(name))
    assert links
    for link in links:
        if not link.startswith("https://"):
            assert (NOTEBOOKS / link.partition("#")[0]).is_file(), f"{name}: {link}"


@pytest.mark.parametrize("name", PAGES)
def test_the_top_readme_names_the_page(name):
    assert f"(notebooks/{name})" in (ROOT / "README.md").read_text(encoding="utf-8")
