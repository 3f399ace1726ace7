"""What the READMEs say is true: code runs, commands exist, links lead somewhere, the table is the
course."""

import ast
import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [
    *sorted(path.parent for path in ROOT.glob("flserving/*/README.md")),
    ROOT / "requirements",
    ROOT / "tests",
]
PAGES = [folder / "README.md" for folder in [ROOT, *FOLDERS]]
"""The top one first: what it publishes, the others serve. Those of the course:
tests/course/test_front_matter.py."""
README, *_ = TEXTS = [page.read_text(encoding="utf-8") for page in PAGES]
MEASURED = (ROOT / "tests" / "benchmarks" / "MEASURED.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", "".join(TEXTS), re.DOTALL | re.MULTILINE)
PYTHON_BLOCKS = [  # with what each prints; the one with flwr is in test_flower
    (code, shown)
    for (language, code), (_, shown) in pairwise(BLOCKS)
    if language == "python" and "flwr" not in code
]
LINES = [
    line.partition("  #")[0].strip()
    for kind, code in BLOCKS
    if kind == "sh"
    for line in code.splitlines()
]
COMMANDS = list(
    dict.fromkeys(
        re.sub(r"^\.(venv|flower|ray)/bin/python", "python", line) for line in LINES if line
    )
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ROWS = re.findall(r"^\| \[(\d\d) (.+?)\]\((.+?)\) \| .+? \| (\d+) \|$", README, re.MULTILINE)


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@functools.cache
def help_of(*program: str) -> str:
    """What a program says to --help; our own run in this process, which has imported what they
    need."""
    if program[:2] in {("-m", "pip"), ("-m", "jupyterlab")}:
        shown = run_python(*program, "--help")
        assert shown.returncode == 0, shown.stderr
        return shown.stdout
    kept, told = (sys.argv, sys.path[:]), io.StringIO()
    sys.argv = [program[-1], *program[2:], "--help"]
    try:
        with (
            contextlib.redirect_stdout(told),
            warnings.catch_warnings(),
            pytest.raises(SystemExit) as ended,
        ):
            warnings.filterwarnings(
                "ignore", message=".*found in sys.modules", category=RuntimeWarning
            )
            if program[0] == "-m":
                runpy.run_module(program[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / program[0]), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = kept
    assert not ended.value.code, f"{program} ends with {ended.value.code}"
    return told.getvalue()


def test_there_is_something_to_check():
    assert len(PYTHON_BLOCKS) == 4 and len(COMMANDS) >= 30 and len(PAGES) == 9
    assert {language for language, _ in BLOCKS} == {"python", "sh", "text", "toml"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each block prints, run in a process of its own, in the folder where those before it
    ran."""
    folder = tmp_path_factory.mktemp("reader")
    outputs = []
    for code, _ in PYTHON_BLOCKS:
        result = run_python("-W", "error", "-c", code, cwd=folder)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    return outputs


def without_numbers(text: str) -> str:
    """Floats differ in their last digits between processors, ports and answers between runs: the
    words stay."""
    return (
        re.sub(r"\d+(\.\d+)?", "0", text).replace("control", "ARM").replace("canary", "ARM").strip()
    )


@pytest.mark.full
def test_each_block_runs_by_itself_and_prints_what_stands_below_it(printed):
    for (_, shown), output in zip(PYTHON_BLOCKS, printed, strict=True):
        assert without_numbers(output) == without_numbers(shown)


@pytest.mark.full
def test_what_the_blocks_print_says_what_the_text_says(printed):
    first, over_http, _, heads = printed
    predictions = first.partition("]")[0] + "]"
    assert over_http.startswith(predictions), "the same answers over the network"
    assert float(re.search(r"right on ([\d.]+)%", first)[1]) > 75
    found, accuracy = heads.splitlines()
    measured = ast.literal_eval(accuracy)
    assert found == "own" and measured["own_heads"] == 20
    assert (
        measured["global_accuracy"]
        < 0.5
        < measured["worst_client_accuracy"]
        < measured["mean_client_accuracy"]
    )


@pytest.mark.full
def test_the_blocks_run_in_a_row(tmp_path):
    """As one program: what a reader types into one session."""
    result = run_python(
        "-W", "error", "-c", "\n".join(code for code, _ in PYTHON_BLOCKS), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_exists(line):
    """run.py, our modules and scripts answer --help; of everything else the files that it names are
    there."""
    words = shlex.split(line)
    assert words[0] in {"python", "conda"}, f"no rule for {words[0]!r}: add one"
    for word in words[1:]:
        named_file = re.fullmatch(r"[\w./-]+\.(py|yml|ipynb)", word)
        if named_file and word.startswith("student/"):
            word = word.replace("student/", "notebooks/")  # a student copy has its source's name
        if named_file and (NOTEBOOKS or not word.endswith(".ipynb")):
            assert (ROOT / word).is_file(), f"{word} does not exist"
    if words[1] == "run.py":
        assert runpy.run_path(str(ROOT / "run.py"))["main"]([words[2], "--help"]) == 0
    elif words[0] == "python":
        program = words[1:3] if words[1] == "-m" else words[1:2]
        subcommand = words[3:4] if program[-1] in ("pip", "flserving") else []
        told = help_of(*program, *subcommand)
        assert all(word in told for word in words if word.startswith("--"))


def anchors(text: str) -> set[str]:
    """The headings as GitHub links to them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, section = link.partition("#")
        if not link.startswith("http") and (NOTEBOOKS or not name.endswith(".ipynb")):
            target = page.parent / name
            assert target.exists(), f"{page} links to {name}"
            assert not section or section in anchors(target.read_text(encoding="utf-8")), (
                f"{page} links to {link}"
            )
    code = re.findall(
        r"`([\w./]+)`", re.sub(r"^## Measured.*?^## ", "", text, flags=re.DOTALL | re.MULTILINE)
    )
    for name in code:
        if "/" in name or name.endswith((".py", ".toml", ".yml")):
            assert (ROOT / name).exists(), f"{page} names {name}"


def test_the_top_readme_is_short_and_leads_to_each_of_the_others():
    assert len(README.split()) <= 2_300
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT).as_posix()}" in README


def test_what_is_measured_names_its_script():
    """In README by the script's name, in the whole tables by the command."""
    for text, pattern in (
        (README, r"`(\w+\.py)[^`]*` \|$"),
        (MEASURED, r"tests/benchmarks/(\w+\.py)"),
    ):
        scripts = set(re.findall(pattern, text, re.MULTILINE))
        assert len(scripts) >= 4, scripts
        assert all((ROOT / "tests" / "benchmarks" / name).is_file() for name in scripts), scripts


@pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks yet")
def test_the_table_is_the_course():
    assert [row[2] for row in ROWS] == [path.relative_to(ROOT).as_posix() for path in NOTEBOOKS]
    for number, title, link, minutes in ROWS:
        opening = "\n".join(
            cell.source for cell in nbformat.read(ROOT / link, as_version=4).cells[:3]
        )
        assert opening.startswith(f"# {number} "), f"{link}: the table says {number} {title}"
        told = re.search(r"\*\*Time\*\*\D*(\d+) min", opening)
        assert told, f"{link}: the opening says no minutes after **Time**"
        assert told[1] == minutes, f"{link}: {told[1]} min in the notebook, {minutes} in the README"
