"""What ``pip install flserving`` gives: wheel and sdist, in an environment that has the server's
packages and no more.

The wheel is built from the sdist, so that neither lacks a file, and installed by pip. The packages
that it asks for are links to those of this environment: the real ones, without a download. Nothing
of the course can be imported there.
"""

import email
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from packaging.requirements import Requirement

from flserving.api.client import Client
from flserving.federated import data
from serving_models import PATIENCE_S, wait_until
from serving_processes import running

ROOT = Path(__file__).parents[1]
COURSE = (
    "jupyterlab",
    "pandas",
    "sklearn",
    "matplotlib",
    "ipywidgets",
    "anywidget",
    "scipy",
    "nbformat",
    "tqdm",
)
X = data.digits()[0][:3]

pytestmark = [
    pytest.mark.skipif(
        os.name == "nt", reason="links files, and ends servers by SIGTERM and SIGINT"
    ),
    pytest.mark.timeout(300),
]


def needed(name, extra="", found=None):
    """Distributions that an installed one asks for, and so on."""
    found = {} if found is None else found
    for line in importlib.metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            if requirement.name not in found:
                found[requirement.name] = importlib.metadata.distribution(requirement.name)
                needed(requirement.name, found=found)
            for more in requirement.extras:
                needed(requirement.name, more, found)
    return found


def link(distributions, site):
    """Make the distributions importable from another folder of packages."""
    for distribution in distributions:
        names = {
            file.parts[0]
            for file in distribution.files or []
            if file.parts[0] not in ("..", "__pycache__")
        }
        for name in names:
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))


def build(folder, what):
    """Build an sdist or a wheel of the project in ``folder`` into its folder dist; return the
    file."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}('dist'))"
    made = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder / "dist" / made.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """``(sdist, wheel)``; the wheel is made of what lies in the sdist."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip(
            "this environment was not made by run.py: pyproject.toml needs setuptools 77 or newer"
        )
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    shutil.copytree(
        ROOT / "flserving", source / "flserving", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(
        ROOT / "notebooks", source / "notebooks", ignore=shutil.ignore_patterns(".*", "my_stack")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    sdist = build(source, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build(unpacked, "wheel")


@pytest.fixture(scope="module")
def server_only(built, tmp_path_factory):
    """The folder of programs of an environment with the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("server") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder,
        "install",
        "--no-deps",
        "--no-index",
        built[1],
    ]
    installed = subprocess.run(pip, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    (site,) = (folder / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(built[1]) as wheel:
        metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        lines = wheel.read(metadata).decode().splitlines()
    asked = [
        Requirement(line.removeprefix("Requires-Dist: "))
        for line in lines
        if line.startswith("Requires-Dist: ")
    ]
    found = {}
    for requirement in asked:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[requirement.name] = importlib.metadata.distribution(requirement.name)
            for extra in ("", *requirement.extras):
                needed(requirement.name, extra, found)
    link(found.values(), site)
    return folder / "bin"


def run(programs, program, *arguments, timeout_s=PATIENCE_S * 4):
    """Run one of an environment's programs, away from the sources."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [programs / program, *arguments],
        capture_output=True, text=True, timeout=timeout_s, cwd=programs, env=environment,
    )  # fmt: skip


def test_sdist_and_wheel_hold_every_file_of_the_package(built):
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "flserving").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    course = {
        f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.*") if path.name[0] != "."
    }
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= wanted | course | {"LICENSE", "README.md"}
    assert not any(name.startswith("tests") for name in names), (
        "they need the clone: half of them would only fail"
    )
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.startswith("flserving/")} == wanted
    data = [name.partition(".data/data/")[2] for name in names if ".data/" in name]
    assert set(data) == {f"share/flserving/{name}" for name in course}
    assert built[1].stat().st_size < 4e6, "the notebooks were 1.5 MB of it"


def test_the_metadata_say_who_made_it_how_far_it_is_and_name_no_private_address(built):
    with zipfile.ZipFile(built[1]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Author"] and metadata["License-Expression"] == "Apache-2.0"
    assert [
        line for line in metadata.get_all("Classifier") if line.startswith("Development Status :: ")
    ]
    assert all(".org/" in url or ".com/" in url for url in metadata.get_all("Project-URL") or [])


def test_the_notebooks_of_the_wheel_are_found_where_pip_has_put_them(server_only):
    code = (
        "import importlib.metadata as m; from pathlib import Path\n"
        "print(next(f.locate() for f in m.files('flserving') if f.name == '00_start_here.ipynb').resolve())"
    )
    found = Path(run(server_only, "python", "-c", code).stdout.strip())
    assert found.read_bytes() == (ROOT / "notebooks" / "00_start_here.ipynb").read_bytes()
    assert found.parent == server_only.parent / "share" / "flserving" / "notebooks"


def test_the_package_imports_without_the_course(server_only):
    code = (
        "import json, sys; from importlib.util import find_spec; import flserving; from flserving import *\n"
        f"print(json.dumps([flserving.__file__, [name for name in {COURSE!r} if find_spec(name)]]))"
    )
    result = run(server_only, "python", "-c", code)
    assert result.returncode == 0, result.stderr
    where, found = json.loads(result.stdout)
    assert Path(where).is_relative_to(server_only.parent) and found == []


@pytest.mark.parametrize(
    ("code", "package"),
    [
        ("import flserving; flserving.Registry('r').history('m')", "pandas"),
        ("import flserving.lab", "tqdm|matplotlib|scipy|pandas|ipywidgets|IPython"),
        (
            "from flserving.models import onnx; onnx.check(b'', 4, 3)",
            "onnx",
        ),
    ],
)
def test_what_needs_an_extra_says_so(server_only, tmp_path, code, package):
    """A typed error that names the package and the command, not a ModuleNotFoundError of somewhere
    inside."""
    result = run(server_only, "python", "-c", f"import os; os.chdir({str(tmp_path)!r}); {code}")
    last = result.stderr.splitlines()[-1]
    extra = "onnx" if package == "onnx" else "course"
    assert last.startswith("flserving.errors.NotSupportedError: ")
    assert last.endswith(f' is not installed: pip install "flserving[{extra}]"')
    assert last.split()[1] in package.split("|")


def test_the_doctor_finds_a_server_healthy(server_only):
    result = run(server_only, "flserving", "doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        '-- course: not installed; its notebooks need `pip install "flserving[course]"`'
        in result.stdout
    )
    assert "ok prediction" in result.stdout and "ok torch" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pip_installs_the_wheel_with_all_that_it_asks_for(built, tmp_path):
    """The same without links: pip downloads the server's packages, and nothing of the course comes
    with them."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    programs = tmp_path / "venv" / "bin"
    # this one is here already
    (tmp_path / "torch.txt").write_text(f"torch=={importlib.metadata.version('torch')}\n")
    installed = run(
        programs, "pip", "install", built[1], "--constraint", tmp_path / "torch.txt", timeout_s=1000
    )
    assert installed.returncode == 0, installed.stdout + installed.stderr
    listed = run(programs, "pip", "list", "--format", "json")
    assert not {package["name"].lower() for package in json.loads(listed.stdout)} & {
        *COURSE,
        "scikit-learn",
    }
    assert run(programs, "pip", "check").returncode == 0
    doctor = run(programs, "flserving", "doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr


def test_the_demo_trains_serves_and_ends_by_ctrl_c(server_only, tmp_path, monkeypatch):
    """The model of the demo is then served to tritonclient, and to a device: three commands in a
    row."""
    monkeypatch.setenv("PYTHONPATH", "")
    command = [
        server_only / "flserving",
        "demo",
        "--rounds",
        "1",
        "--directory",
        tmp_path / "cloud",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as demo:
        try:
            printed = []
            while "Ctrl-C ends it" not in (line := demo.stdout.readline()):
                assert line, f"the demo ended: {printed}"
                printed.append(line)
            address = next(line.split()[-1] for line in printed if "/v2/health/ready" in line)
            with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
                assert answer.status == 200
            demo.send_signal(signal.SIGINT)
            assert demo.wait(PATIENCE_S) == 0
        finally:
            demo.kill()

    with running(
        tmp_path / "cloud" / "registry",
        "--artifacts",
        "--workers",
        "2",
        prefix=[server_only / "flserving"],
        PYTHONPATH="",
    ) as cloud:
        rows = triton.InferInput("features", list(X.shape), "FP32")
        rows.set_data_from_numpy(X)
        with triton.InferenceServerClient(cloud.url.removeprefix("http://")) as client:
            headers = {"authorization": f"Bearer {cloud.token}"}
            answer = client.infer("digits", [rows], headers=headers).as_numpy("predictions")

        options = [
            "--client",
            "c-1",
            "--poll-s",
            "0.2",
            "--directory",
            tmp_path / "device",
            "--port",
            "0",
        ]
        command = [server_only / "flserving", "edge", "--cloud", cloud.url, *options]
        environment = {**os.environ, "FLSERVING_CLOUD_TOKEN": cloud.token}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
        ) as device:
            try:
                lines = {
                    words[0]: words[1]
                    for words in (device.stdout.readline().split() for _ in range(3))
                }
                with Client(lines["REST"], lines["token"]) as client:
                    wait_until(lambda: client.ready(), "the device's first release")
                    assert np.array_equal(client.predict(X)["predictions"], answer)
                device.send_signal(signal.SIGTERM)
                assert device.wait(PATIENCE_S) == 0
            finally:
                device.kill()
        assert cloud.end() == 0
