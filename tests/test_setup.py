"""The set-up files agree with each other and with what they promise."""

import ast
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
    lines = [
        line
        for line in ENVIRONMENT["dependencies"]
        if isinstance(line, str) and line[:7] != "python="
    ]
    parts = [re.fullmatch(r"([\w.-]+)\s*(.*)", line) for line in lines]
    return {part[1]: SpecifierSet(part[2]) for part in parts if part}


def test_conda_and_pip_ask_for_the_same():
    both = map(Requirement, PROJECT["dependencies"] + EXTRAS["course"])
    # The others come by pip: conda-forge has new releases of grpcio months later, and the bound is
    # a recent one.
    everywhere = [r for r in both if not r.marker and r.name != "grpcio"]
    wanted = {CONDA_NAME.get(r.name, r.name): r.specifier for r in everywhere}
    wanted["pip"] = SpecifierSet()  # it reads the file's last section
    assert conda_requirements() == wanted


def test_binder_gets_a_python_that_it_has_and_that_the_project_takes():
    """repo2docker reads "python=3.11" and understands no bounds: it would install its default,
    3.10."""
    (python,) = [line for line in ENVIRONMENT["dependencies"] if str(line).startswith("python")]
    found = re.fullmatch(r"python=(3\.\d+)", python)
    assert found and f"{found[1]}.0" in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.skipif(os.name == "nt", reason="Binder's images are Linux")
def test_binder_finds_the_students_copies(tmp_path):
    """repo2docker runs postBuild in the repository, once environment.yml is installed."""
    (tmp_path / "notebooks").mkdir()
    name = "00_start_here.ipynb"
    (tmp_path / "notebooks" / name).write_bytes((ROOT / "notebooks" / name).read_bytes())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    subprocess.run([ROOT / "postBuild"], cwd=tmp_path, env=variables, check=True, timeout=300)
    assert (tmp_path / "student" / name).exists()


def test_conda_uses_one_channel_and_installs_the_project_by_pip():
    assert ENVIRONMENT["channels"] == ["conda-forge"]
    assert [line for line in ENVIRONMENT["dependencies"] if isinstance(line, dict)] == [
        {"pip": ["-e .[course,onnx,test]"]}
    ]


def test_torch_is_bounded_so_that_pip_finds_a_build_that_was_tried():
    torch = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")
    assert torch.specifier == SpecifierSet(">=2.8,<2.14")


def locked(name: str) -> list[str]:
    """The lines of one file of requirements/, a requirement and its hashes on one."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.replace("\\\n", " ").splitlines() if not line.startswith("#")]


def test_what_is_locked_fits_pyproject_on_every_python():
    """`python run.py lock` brings the two together again."""
    server, course, tests, torch = ({}, {}, {}, {})
    for name, found in (("server", server), ("course", course), ("test", tests), ("torch", torch)):
        for line in locked(name):
            requirement = Requirement(line.partition("--hash")[0])
            found.setdefault(requirement.name, []).append(requirement)
    everything = server | course | tests | torch
    assert len(everything) == len(server) + len(course) + len(tests) + len(torch), (
        "each package is in one file"
    )
    for lines, files in (
        (
            PROJECT["dependencies"] + tomllib.loads(PYPROJECT)["build-system"]["requires"],
            server | torch,
        ),
        (EXTRAS["course"] + EXTRAS["onnx"], server | course),
        (EXTRAS["test"], server | course | tests),
    ):
        for wanted in map(Requirement, lines):
            versions = [next(iter(pin.specifier)).version for pin in files[wanted.name]]
            assert all(version in wanted.specifier for version in versions), (
                f"{wanted}: locked are {versions}"
            )


@pytest.mark.parametrize("name", ["server", "course", "test", "torch"])
def test_what_is_locked_has_hashes_and_names_no_index(name):
    for line in locked(name):
        assert re.match(r"[a-z0-9-]+==[\w.]+( ;.*?)? +--hash=sha256:[0-9a-f]{64}", line), line[:200]
        assert (
            "://" not in line
            and " @ " not in line
            and "index" not in line.partition("--hash")[0].split("==")[1]
        )


@pytest.mark.parametrize(
    ("name", "broken", "why"),
    [
        ("starlette", "1.0.0", "CVE-2026-48710"),
        ("orjson", "3.11.5", "CVE-2025-67221"),
        ("cryptography", "46.0.4", "CVE-2026-26007"),
        ("protobuf", "6.33.4", "CVE-2026-0994"),
        ("httpcore", "1.0.8", "admits h11 without the fix of CVE-2025-43859"),
        ("uvicorn", "0.46.0", "has no ssl_context_factory"),
    ],
)
def test_a_release_that_is_known_to_be_broken_is_out_of_bounds(name, broken, why):
    requirement = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == name)
    assert broken not in requirement.specifier, why


def test_every_dependency_says_why_and_from_which_version_on():
    for requirement in [
        *PROJECT["dependencies"],
        *(line for lines in EXTRAS.values() for line in lines),
    ]:
        entry = re.search(rf'^    "{re.escape(requirement)}",\s+# \S.+$', PYPROJECT, re.MULTILINE)
        assert entry, f"{requirement}: say in a comment on its line why it is there"
        assert ">=" in requirement, f"{requirement}: no lower bound"
    assert set(EXTRAS) == {"course", "test", "onnx", "flower", "ray", "otel", "grading"}


def test_every_data_file_of_the_package_is_installed_with_it():
    patterns = tomllib.loads(PYPROJECT)["tool"]["setuptools"]["package-data"]
    for path in (ROOT / "flserving").rglob("*"):
        if path.is_file() and path.suffix not in {".py", ".pyc"}:
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(path.match(pattern) for pattern in patterns.get(package, [])), (
                f"{path} is not in package-data"
            )


def test_no_call_is_deprecated_on_a_newer_python_than_this():
    """Python 3.13 warns of more than one argument by place to sqlite3.connect, and 3.15 refuses
    it."""
    for path in (ROOT / "flserving").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "sqlite3.connect":
                assert len(node.args) == 1, f"{path}:{node.lineno}: name its settings"


def test_the_licence_is_the_apache_licence_2():
    text = (ROOT / "LICENSE").read_bytes().replace(b"\r\n", b"\n")
    assert (
        hashlib.sha256(text).hexdigest()
        == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    )
    assert PROJECT["license"] == "Apache-2.0"


def test_ruff_finds_nothing():
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.full
def test_mypy_finds_nothing():
    """About 20 s the first time, under 1 s once .mypy_cache is there."""
    result = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_committed_file_names_a_path_of_a_machine_or_puts_work_off():
    for path in tracked_files():
        if path.suffix in {".py", ".md", ".toml", ".yml", ".cfg", ".ipynb", ".js", ".css", ""}:
            text = path.read_text(encoding="utf-8")
            found = MACHINE_PATH.search(text)
            assert found is None, f"{path}: {text[found.start() : found.start() + 60]!r}"
            if path.is_relative_to(ROOT / "flserving"):
                assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), (
                    f"{path}: put into an issue what is left to do"
                )


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


@pytest.mark.skipif(
    os.name == "nt", reason="CI is Linux: Windows has neither bash nor executable bits"
)
def test_ci_runs_the_same_command_as_everybody():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "not executable"
    text = script.read_text(encoding="utf-8")
    assert "python3.11 run.py test --all" in text and "torch.version.cuda" in text
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
