"""``python -m flserving doctor``: is this installation able to run the course? Each line is ``ok``
or what to do."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

LOWEST_PYTHON = (3, 11)
REMEDY = "in the project's folder run `python -m pip install -e .`"
LOWEST_FREE_BYTES = 500_000_000  # room for a registry of the course, many times over
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM_PLACES = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. ``needed`` is False for what only an optional part of the kit
    uses."""

    ok: bool
    text: str
    needed: bool = True

    def __str__(self) -> str:
        return f"{'ok' if self.ok else '--'} {self.text}"


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome: the environment variable FLSERVING_CHROMIUM, the PATH, then the
    usual places."""
    named = os.environ.get("FLSERVING_CHROMIUM")
    candidates = [named] if named else [*CHROMIUM_NAMES, *CHROMIUM_PLACES]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def check_python() -> Check:
    """Python itself."""
    version = f"python {platform.python_version()} ({sys.executable})"
    if sys.version_info < LOWEST_PYTHON:
        return Check(
            False,
            f"{version}: flserving needs 3.11 or newer; make the environment again with a newer Python",
        )
    return Check(True, version)


def _packages(extra: str) -> tuple[list[str], list[str]]:
    """What is installed of an extra ("": of the server), and what is wrong with it, by
    pyproject.toml's bounds."""
    from packaging.requirements import Requirement

    found = []
    wrong = []
    for line in importlib.metadata.requires("flserving") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None and extra:
            continue
        if marker is not None and (
            not marker.evaluate({"extra": extra}) or (extra and marker.evaluate({"extra": ""}))
        ):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, needed {requirement.specifier}")
    return found, wrong


def check_packages() -> Check:
    """Every package of the server is there and within the bounds that pyproject.toml gives."""
    found, wrong = _packages("")
    if wrong:
        return Check(False, f"packages: {'; '.join(wrong)}; {REMEDY}")
    return Check(True, ", ".join(found))


def has_course() -> bool:
    """Whether the notebooks can be opened here; a server needs nothing of that."""
    return importlib.util.find_spec("jupyterlab") is not None


def check_course() -> Check:
    """The same for the packages of the course, where there is a course."""
    if not has_course():
        return Check(
            False,
            'course: not installed; its notebooks need `pip install "flserving[course]"`',
            needed=False,
        )
    found, wrong = _packages("course")
    if wrong:
        return Check(
            False, f"course: {'; '.join(wrong)}; in the project's folder run `python run.py lab`"
        )
    return Check(True, f"course: {', '.join(found)}")


def check_kernel() -> Check:
    """The kernel ``python3``, which the notebooks ask for, is this very Python."""
    if not has_course():
        return Check(False, "kernel python3: only the course uses it", needed=False)
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    remedy = "start JupyterLab with `python run.py lab`, which prefers this environment"
    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return Check(False, f"kernel python3 is not installed: {remedy}")
    # a bare "python" stands for the Python that starts the kernel; python and python3.11 of one
    # folder are the same
    if Path(program).is_absolute() and Path(program).parent != Path(sys.executable).parent:
        return Check(False, f"kernel python3 runs {program}, not this Python: {remedy}")
    return Check(True, "kernel python3 is this Python")


def check_threads() -> Check:
    """Cores, and what torch would use of them by itself; a server always runs one intra-op thread
    per worker."""
    import torch

    cuda = torch.version.cuda
    build = f"CUDA {cuda} build; the CPU build is enough" if cuda else "CPU build"
    return Check(
        True, f"{os.cpu_count()} cores, torch would use {torch.get_num_threads()} of them ({build})"
    )


def check_prediction() -> Check:
    """One real answer through the whole stack: registry-free pipeline, batcher, engine."""
    import numpy as np

    from flserving import models
    from flserving.serving import create_serving_pipeline

    server = create_serving_pipeline(models.build("tutorial_mlp"))
    try:
        answer = server.predict(np.zeros((1, 32), np.float32))
    finally:
        server.close()
    total = sum(answer["probabilities"][0])
    if not abs(total - 1) < 1e-3:
        return Check(
            False,
            f"prediction: the probabilities add up to {total}, not to 1: please report this as a bug",
        )
    return Check(
        True, f"prediction: {answer['model_version']} answered in {answer['latency_ms']:.2f} ms"
    )


def check_port() -> Check:
    """A server and JupyterLab both need a port on the loopback interface."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return Check(True, f"a free port on 127.0.0.1: {listener.getsockname()[1]}")
    except OSError as error:
        return Check(
            False,
            f"no port on 127.0.0.1 can be opened ({error}): allow local connections in the firewall",
        )


def check_disk() -> Check:
    """The folder for temporary files takes a file, and has room."""
    folder = tempfile.gettempdir()
    remedy = "free some space, or set TMPDIR (Windows: TEMP) to another folder"
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"flserving")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check(False, f"disk: {folder} cannot be written ({error}): {remedy}")
    free = shutil.disk_usage(folder).free
    text = f"disk: {folder} is writable, {free / 1e9:.1f} GB free"
    if free < LOWEST_FREE_BYTES:
        return Check(False, f"{text}: {remedy}")
    return Check(True, text)


def check_chromium() -> Check:
    """A browser that the tests can drive; nothing else uses it."""
    path = find_chromium()
    if path is None:
        remedy = "install Chromium, or set FLSERVING_CHROMIUM to its path"
        return Check(
            False, f"chromium: none found; only the browser tests use it: {remedy}", needed=False
        )
    return Check(True, f"chromium: {path}", needed=False)


CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_packages,
    check_course,
    check_kernel,
    check_threads,
    check_prediction,
    check_port,
    check_disk,
    check_chromium,
)


def checks() -> Iterator[Check]:
    """Run every check, in order; a check that itself breaks is a line of the report too."""
    for run in CHECKS:
        try:
            yield run()
        except Exception as error:  # a doctor must not die of the illness; a traceback is no report
            name = run.__name__.removeprefix("check_")
            yield Check(False, f"{name}: {type(error).__name__}: {error}; {REMEDY}")


def report(out: TextIO) -> int:
    """Write one line per check; return 0 if all that is needed is ok, else 1."""
    healthy = True
    for check in checks():
        print(check, file=out, flush=True)
        healthy = healthy and (check.ok or not check.needed)
    return 0 if healthy else 1
