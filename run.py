"""flserving in two commands. Nothing but Python 3.11 or newer is needed; the same on Linux, macOS and Windows.

    python run.py lab  [NOTEBOOK] [options of jupyter lab]   open the course in JupyterLab
    python run.py test [options of pytest]                   run the default test suite, every notebook included

Both keep everything that they install in the folder .venv next to this file; the first call takes a few minutes, later
calls install again only after pyproject.toml has changed. Examples:

    python run.py lab notebooks/03_caching.ipynb --no-browser
    python run.py test tests/test_registry.py -k alias
"""
# This file must parse on every Python that people still have, so that the refusal below can be printed:
# no f-strings, no annotations, nothing newer than Python 2.7's grammar.
import sys

if sys.version_info < (3, 11):
    sys.exit(
        "flserving needs Python 3.11 or newer and this is Python %d.%d: call run.py with a newer one, "
        "for example `python3.11 run.py lab`." % tuple(sys.version_info[:2])
    )

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "flserving-install.json"  # what was installed here, and from which pyproject.toml
FIRST_NOTEBOOK = ROOT / "notebooks" / "00_start_here.ipynb"
PYTEST_OPTIONS = [
    "-n", "2", "--dist", "loadscope",  # a notebook's cells must stay on one worker: they share a kernel
    "--no-loadscope-reorder",  # in the order collected: the browser's few long tests first, not last and alone
    "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "120",
    "--nbval-sanitize-with", os.path.join("tests", "nbval_sanitize.cfg"),
]  # fmt: skip


class Failure(Exception):
    """Something that the user can mend; the message says what and how."""


def venv_python():
    """The interpreter inside .venv: Windows and the others put it in different places."""
    return VENV / "Scripts" / "python.exe" if os.name == "nt" else VENV / "bin" / "python"


def call(command, **variables):
    """Run a command in .venv's environment, pass Ctrl-C and SIGTERM on to it, return its exit code."""
    environment = dict(os.environ, **variables)
    environment["PATH"] = str(venv_python().parent) + os.pathsep + environment.get("PATH", "")
    environment["VIRTUAL_ENV"] = str(VENV)
    environment["JUPYTER_PREFER_ENV_PATH"] = "1"  # else a python3 kernel of another installation may win
    environment.pop("PYTHONHOME", None)
    # Ctrl-C reaches the child as well, which decides (JupyterLab asks first): here it must only not end the wait
    signal.signal(signal.SIGINT, lambda *_: None)
    process = subprocess.Popen([str(part) for part in command], cwd=str(ROOT), env=environment)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    return process.wait()


def make_venv():
    """Make .venv if it is missing; refuse one whose Python is missing or too old."""
    if not VENV.exists():
        sys.stderr.write("Making .venv with Python %s ...\n" % sys.version.split()[0])
        if subprocess.call([sys.executable, "-m", "venv", str(VENV)]):
            raise Failure(
                "Python could not make the virtual environment (its own lines are above). On Debian and Ubuntu install "
                "the package python%d.%d-venv, then delete .venv and run this again." % tuple(sys.version_info[:2])
            )
    question = "import sys; sys.exit(sys.version_info < (3, 11))"
    if not venv_python().exists() or subprocess.call([str(venv_python()), "-c", question]):
        raise Failure("%s does not hold a working Python 3.11 or newer: delete that folder and run this again." % VENV)


def installed(fingerprint):
    """The extras that .venv holds for this fingerprint; None if the project must be installed (again)."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return set(stamp["extras"]) if stamp["fingerprint"] == fingerprint else None


def prepare(extras):
    """Make .venv hold the project with at least ``extras``, as pyproject.toml asks for it now."""
    make_venv()
    # the folder is part of it: an installation in editable mode points back at its folder, which may be moved
    fingerprint = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode()).hexdigest()
    present = installed(fingerprint)
    if present is not None and extras <= present:
        return
    wanted = sorted(extras | (present or set()))
    target = ".[%s]" % ",".join(wanted) if wanted else "."
    sys.stderr.write("Installing flserving into .venv (minutes the first time) ...\n")
    code = call([venv_python(), "-m", "pip", "install", "--disable-pip-version-check", "--editable", target])
    if code:
        raise Failure(
            "pip could not install flserving (its own lines are above; exit code %d). Check the network and that 3 GB "
            "of disk are free (9 GB for a CUDA build of torch), then run this again." % code
        )
    STAMP.write_text(json.dumps({"fingerprint": fingerprint, "extras": wanted}), encoding="utf-8")


def lab(arguments):
    """Open the named notebook, or the first one, in JupyterLab; its folder is what the file browser shows."""
    notebook = FIRST_NOTEBOOK
    if arguments and not arguments[0].startswith("-"):
        notebook = pathlib.Path(arguments[0]).resolve()
        arguments = arguments[1:]
    if not notebook.exists():
        raise Failure("There is no notebook %s: name one of the folder notebooks/." % notebook)
    prepare({"onnx"})  # notebook 09 exports models
    address = "/lab/tree/" + urllib.parse.quote(notebook.name)  # what the browser opens, and what the terminal shows
    options = ["--ServerApp.root_dir=%s" % notebook.parent, "--LabApp.default_url=" + address]
    return call([venv_python(), "-m", "jupyterlab"] + options + arguments)  # noqa: RUF005 (old grammar)


def test(arguments):
    """Run pytest over tests/ and notebooks/; the arguments come last and so win."""
    prepare({"test", "onnx"})
    command = [venv_python(), "-m", "pytest"] + PYTEST_OPTIONS + arguments  # noqa: RUF005 (old grammar)
    return call(command, FLSERVING_STATIC="1")  # in nbval's runs a widget draws every corner of its sliders


def main(arguments):
    """Return the exit code: the job's own, 1 for something to mend here, 2 for a command line that names no job."""
    jobs = {"lab": lab, "test": test}
    if arguments and (arguments[0] in ("-h", "--help") or arguments[1:] in (["-h"], ["--help"])):
        sys.stdout.write(__doc__)
        return 0
    if not arguments or arguments[0] not in jobs:
        sys.stderr.write(__doc__ + "\nrun.py: name a command, lab or test.\n")
        return 2
    try:
        return jobs[arguments[0]](arguments[1:])
    except Failure as failure:
        sys.stderr.write("run.py: %s\n" % failure)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
