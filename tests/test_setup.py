"""The set-up files agree with each other and with what they promise."""

import hashlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from notebook_gates import MACHINE_PATH

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
# where conda-forge has another name than PyPI
CONDA_NAME = {"torch": "pytorch-cpu", "prometheus-client": "prometheus_client"}


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def conda_requirements() -> dict[str, SpecifierSet]:
    lines = [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]
    parts = [re.fullmatch(r"([\w.-]+)\s*(.*)", line) for line in lines]
    return {part[1]: SpecifierSet(part[2]) for part in parts if part}


def test_conda_and_pip_ask_for_the_same():
    everywhere = [
        r for r in map(Requirement, PROJECT["dependencies"] + EXTRAS["course"]) if not r.marker
    ]  # the others come by pip
    wanted = {CONDA_NAME.get(r.name, r.name): r.specifier for r in everywhere}
    wanted["python"] = SpecifierSet(PROJECT["requires-python"])
    wanted["pip"] = SpecifierSet()  # it reads the file's last section
    assert conda_requirements() == wanted


def test_conda_uses_one_channel_and_installs_the_project_by_pip():
    assert ENVIRONMENT["channels"] == ["conda-forge"]
    assert [line for line in ENVIRONMENT["dependencies"] if isinstance(line, dict)] == [
        {"pip": ["-e .[course,onnx,test]"]}
    ]


def test_torch_is_bounded_so_that_pip_finds_a_build_that_was_tried():
    torch = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")
    assert torch.specifier == SpecifierSet(">=2.8,<2.14")


def test_every_dependency_says_why_and_from_which_version_on():
    for requirement in [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]:
        entry = re.search(rf'^    "{re.escape(requirement)}",\s+# \S.+$', PYPROJECT, re.MULTILINE)
        assert entry, f"{requirement}: say in a comment on its line why it is there"
        assert ">=" in requirement, f"{requirement}: no lower bound"
    assert set(EXTRAS) == {"course", "test", "onnx", "flower", "otel", "grading"}


def test_every_data_file_of_the_package_is_installed_with_it():
    patterns = tomllib.loads(PYPROJECT)["tool"]["setuptools"]["package-data"]
    for path in (ROOT / "flserving").rglob("*"):
        if path.is_file() and path.suffix not in {".py", ".pyc"}:
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(path.match(pattern) for pattern in patterns.get(package, [])), f"{path} is not in package-data"


def test_the_licence_is_the_apache_licence_2():
    text = (ROOT / "LICENSE").read_bytes().replace(b"\r\n", b"\n")
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert PROJECT["license"] == "Apache-2.0"


def test_ruff_finds_nothing():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_mypy_finds_nothing():
    """About 20 s the first time, under 1 s once .mypy_cache is there."""
    result = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_committed_file_names_a_path_of_a_machine_or_puts_work_off():
    for path in tracked_files():
        if path.suffix in {".py", ".md", ".toml", ".yml", ".cfg", ".ipynb", ".js", ".css", ""}:
            text = path.read_text(encoding="utf-8")
            found = MACHINE_PATH.search(text)
            assert found is None, f"{path}: {text[found.start() : found.start() + 60]!r}"
            if path.is_relative_to(ROOT / "flserving"):
                assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), f"{path}: put into an issue what is left to do"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("open('/" + "home/ada/model.bin')", True),
        ("/" + "work/main", True),
        ("https://example.org/home/ada/x", False),
        ("POST /v2/models", False),
        (".venv/bin/python", False),
    ],
)
def test_the_search_for_machine_paths_finds_them(text, found):
    assert bool(MACHINE_PATH.search(text)) is found


@pytest.mark.skipif(os.name == "nt", reason="CI is Linux: Windows has neither bash nor executable bits")
def test_ci_runs_the_same_command_as_everybody():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "not executable"
    text = script.read_text(encoding="utf-8")
    assert "python3.11 run.py test --all" in text and "torch.version.cuda" in text
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
