"""The README is true: its code runs, its commands exist, its links lead somewhere, its table is the course."""

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
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PYTHON_BLOCKS = [code for language, code in BLOCKS if language == "python" and "flwr" not in code]  # see test_flower
LINES = [line.partition("  #")[0].strip() for kind, code in BLOCKS if kind == "sh" for line in code.splitlines()]
COMMANDS = list(dict.fromkeys(re.sub(r"^\.(venv|flower)/bin/python", "python", line) for line in LINES if line))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ROWS = re.findall(r"^\| \[(\d\d) (.+?)\]\((.+?)\) \| .+? \| (\d+) \|$", README, re.MULTILINE)


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@functools.cache
def help_of(*program: str) -> str:
    """What a program says to --help; our own run in this process, which has imported what they need."""
    if program[:2] in {("-m", "pip"), ("-m", "jupyterlab")}:
        shown = run_python(*program, "--help")
        assert shown.returncode == 0, shown.stderr
        return shown.stdout
    kept, told = (sys.argv, sys.path[:]), io.StringIO()
    sys.argv = [program[-1], *program[2:], "--help"]
    try:
        with contextlib.redirect_stdout(told), warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
            if program[0] == "-m":
                runpy.run_module(program[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / program[0]), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = kept
    assert not ended.value.code, f"{program} ends with {ended.value.code}"
    return told.getvalue()


def test_there_is_something_to_check():
    assert len(PYTHON_BLOCKS) == 4 and len(COMMANDS) >= 10
    assert {language for language, _ in BLOCKS} == {"python", "sh"}


def test_the_python_code_runs(tmp_path):
    """All blocks as one program: a later one goes on where the one before it ends."""
    result = run_python("-W", "error", "-c", "\n".join(PYTHON_BLOCKS), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    in_process, over_http, head, accuracy, arm = result.stdout.splitlines()[-5:]
    assert re.fullmatch(r"\[\d, \d, \d\] by version 10 expected \[0, 1, 2\]", in_process), result.stdout
    predictions = in_process.partition("]")[0] + "]"
    assert re.fullmatch(re.escape(predictions) + r" http://127\.0\.0\.1:\d+/docs", over_http), result.stdout
    measured = ast.literal_eval(accuracy)
    assert arm in {"control", "canary"}
    assert head == "own" and measured["own_heads"] == 20
    assert measured["global_accuracy"] < 0.5 < measured["worst_client_accuracy"] < measured["mean_client_accuracy"]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_exists(line):
    """run.py, our modules and scripts answer --help; of everything else the files that it names are there."""
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


def test_links_and_names_of_the_layout_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    code = re.findall(r"`([\w./]+)`", README)
    names = [name for name in code if "/" in name or name.endswith((".py", ".toml", ".yml"))]
    assert len(links) > 5 and len(names) > 5
    for name in [*links, *names]:
        if name.endswith(".ipynb") and not NOTEBOOKS:
            continue
        assert (ROOT / name).exists(), f"the README names {name}"


@pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks yet")
def test_the_table_is_the_course():
    assert [row[2] for row in ROWS] == [path.relative_to(ROOT).as_posix() for path in NOTEBOOKS]
    for number, title, link, minutes in ROWS:
        opening = nbformat.read(ROOT / link, as_version=4).cells[0].source
        assert opening.startswith(f"# {number} "), f"{link}: the table says {number} {title}"
        told = re.search(r"\*\*Time\*\*\D*(\d+) min", opening)
        assert told, f"{link}: the opening says no minutes after **Time**"
        assert told[1] == minutes, f"{link}: {told[1]} min in the notebook, {minutes} in the README"


def test_the_picture_is_the_one_that_notebook_00_draws():
    from PIL import Image, ImageChops

    from flserving.lab.figures_00 import stack_figure
    from flserving.lab.style import png

    with Image.open(ROOT / "notebooks" / "stack.png") as stored, Image.open(io.BytesIO(png(stack_figure()))) as drawn:
        assert stored.size == drawn.size
        difference = ImageChops.difference(stored.convert("L"), drawn.convert("L"))
        changed = sum(count for level, count in enumerate(difference.histogram()) if level > 64)
    assert changed < 0.01 * drawn.width * drawn.height, "store stack_figure()._repr_png_() as notebooks/stack.png again"
