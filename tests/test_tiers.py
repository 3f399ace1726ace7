"""The tiers: who names nothing gets the quick one, who names something gets it; examples are the
same each day."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import settings

import budget

HERE = Path(__file__).parent
PLUGINS = (
    *(
        "xdist.plugin",
        "pytest_timeout",
        "pytest_asyncio.plugin",
        "nbval.plugin",
        "_hypothesis_pytestplugin",
    ),
    "no:cacheprovider",
)
DRAWING_PLUGINS = (
    "pytest_timeout",
    "pytest_asyncio.plugin",
    "_hypothesis_pytestplugin",
    "no:cacheprovider",
)
MODULES = {
    "test_quick.py": "def test_quick(): pass\n",
    "test_full.py": "import pytest\npytestmark = pytest.mark.full\ndef test_full(): pass\n",
    "test_slow.py": "import pytest\npytestmark = pytest.mark.full\n@pytest.mark.slow\ndef test_slow(): pass\n",
    "test_drawn.py": """
        from hypothesis import given, settings, strategies as st
        from budget import examples
        @examples(3)
        @given(st.integers())
        def test_drawn(number): print("drew", number)
        @given(st.integers())
        def test_unsaid(number): print("drew", number)
        """,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with this one's settings, and one test of each tier."""
    root = tmp_path_factory.mktemp("project")
    for folder in ("tests", "notebooks"):
        (root / folder).mkdir()
    shutil.copy(HERE.parent / "pyproject.toml", root)
    for name in ("conftest.py", "budget.py"):
        shutil.copy(HERE / name, root / "tests")
    for name, source in MODULES.items():
        (root / "tests" / name).write_text(re.sub(r"^ {8}", "", source, flags=re.MULTILINE))
    for name in ("00_start_here", "05_rest_and_grpc"):
        cells = [nbformat.v4.new_code_cell("1")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), root / "notebooks" / f"{name}.ipynb")
    return root


def pytest_of(plugins):
    """The environment and the options of a pytest with these plugins."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST")
    }
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a second less
    options = [option for plugin in plugins for option in ("-p", plugin)]
    if any("nbval" in plugin for plugin in plugins):
        options += ["--nbval", "--nbval-current-env"]
    return environment, options


def pytest_in(project, *arguments, plugins=PLUGINS):
    environment, options = pytest_of(plugins)
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CHOICES = {
    "nothing": ([], {"quick", "drawn", "00_start_here"}),
    # --all
    "both folders": (
        ["tests", "notebooks"],
        {"quick", "drawn", "full", "00_start_here", "05_rest_and_grpc"},
    ),
    "a path": (["tests/test_full.py"], {"full"}),
    "a word": (["-k", "test_full"], {"full"}),
    "a mark": (["-m", "slow"], {"slow"}),
}


@pytest.fixture(scope="module")
def collected(project):
    """What each choice of arguments collects, by one interpreter: to start five would take five
    times as long."""
    program = """if True:
        import json, sys
        import pytest
        for name, arguments in json.loads(sys.argv[1]).items():
            print("choice", name)
            assert pytest.main(["-q", "--collect-only", *arguments]) == 0
    """
    environment, options = pytest_of(PLUGINS)
    choices = {name: [*options, *arguments] for name, (arguments, _) in CHOICES.items()}
    command = [sys.executable, "-c", program, json.dumps(choices)]
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(part.split("\n", 1) for part in done.stdout.split("choice ")[1:])


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_named_runs_and_nothing_named_is_the_quick_tier(collected, name):
    files = {Path(line.partition("::")[0]) for line in collected[name].splitlines() if "::" in line}
    assert {path.stem.removeprefix("test_") for path in files} == CHOICES[name][1]


def test_workers_run_the_same_tier(project):
    passed = pytest_in(project, "-v", "-n", "1")
    assert "test_quick" in passed and "test_full" not in passed and "05_rest" not in passed


# Hypothesis has defaults of its own where CI is set
@pytest.mark.parametrize("on_ci", [False, True])
def test_property_tests_draw_the_same_each_day_and_more_and_anew_in_the_fuzz_tier(
    project, monkeypatch, on_ci
):
    if on_ci:
        monkeypatch.setenv("CI", "true")
    else:
        monkeypatch.delenv("CI", raising=False)

    def drawn(*options):
        shown = pytest_in(project, "-s", "tests/test_drawn.py", *options, plugins=DRAWING_PLUGINS)
        few, many = (
            re.findall(r"drew (-?\d+)", part)
            for part in shown.split("test_drawn.py")[1].split(".", 2)[:2]
        )
        return few, many

    today, later = drawn(), drawn()
    assert today == later
    assert len(today[0]) == 3 and len(today[1]) == budget.EXAMPLES
    fuzzed = drawn("--hypothesis-profile", "fuzz")
    assert len(fuzzed[0]) == 3 * budget.FUZZ_TIMES
    assert fuzzed != drawn("--hypothesis-profile", "fuzz")


def test_every_name_of_the_full_tier_is_there():
    source = (HERE / "conftest.py").read_text(encoding="utf-8")
    names = re.findall(r'"(test_\w+)"', source)
    assert len(names) > 10 and set(names) <= {path.stem for path in HERE.rglob("test_*.py")}
    notebooks = {path.stem for path in (HERE.parent / "notebooks").glob("*.ipynb")}
    assert set(re.findall(r'"(\d\d_\w+)"', source)) <= notebooks


@pytest.mark.parametrize("count", [0, budget.MOST_EXAMPLES + 1])
def test_the_budget_of_one_test_is_bounded(count):
    with pytest.raises(ValueError, match="in the default suite"):
        budget.examples(count)


def test_no_property_test_goes_round_the_budget():
    for path in sorted(HERE.rglob("*.py")):
        said = re.search(r"max_examples|derandomize|\bdatabase=", path.read_text(encoding="utf-8"))
        assert not said or path.name in {"budget.py", "conftest.py", "test_tiers.py"}, (
            f"{path.name} says {said[0]}: write @examples(count), from budget"
        )
    assert settings.default is not None and settings.default.deadline is None
