"""flserving in a few commands. Nothing but Python 3.11 or newer is needed; the same on Linux, macOS
and Windows.

    python run.py lab  [NOTEBOOK] [options of jupyter lab]   your copy of the course in JupyterLab
    python run.py lab  --solutions                           the teacher's, with the solutions
    python run.py test [options of pytest]       the quick tests, or those that the options name
    python run.py test --all                     what CI runs: every notebook, and a real browser
    python run.py test --fuzz                    the property tests with new and more examples
    python run.py book [FOLDER] [--instructor]   the course as a book in HTML, in the folder book
    python run.py slides NN                      a notebook as slides, in the folder slides

All keep everything that they install in the folder .venv next to this file; the first call takes a
few minutes, later calls install again only after pyproject.toml or requirements/ has changed. What
is installed are the versions in requirements/, with which the course was tested, checked by their
hashes.

Your copy of the course is the folder student: the notebooks with their exercises unsolved, for you
to work in. lab makes it and adds notebooks that are new; it never changes what is there. To begin a
notebook anew, move your copy of it away. Examples:

    python run.py lab student/03_caching.ipynb --no-browser
    python run.py test tests/registry/test_registry.py -k alias

Options of run.py itself:

    --cuda             on Linux: the CUDA build of torch (2.7 GB to download), not the CPU build
    --venv FOLDER      another folder than .venv, for example for another Python

For those who change flserving:

    python run.py test --latest   with the newest versions that are allowed, in .venv-latest
    python run.py test --lowest   the core's tests with the oldest ones, in .venv-lowest
    python run.py lock            write requirements/ anew, with the newest versions
"""

# This file must parse on every Python that people still have, so that the refusal below can be
# printed: no f-strings, no annotations, nothing newer than Python 2.7's grammar.
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
import re
import signal
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent
ON_LINUX = sys.platform == "linux"
LOCKED = ROOT / "requirements"
# PyTorch's own; for Linux pip's index has CUDA builds only
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
# in the environment: what was installed there, and from which files
STAMP = "flserving-install.json"
SOLVED = ROOT / "notebooks"  # the teacher's
COPIES = ROOT / "student"
FIRST_NOTEBOOK = "00_start_here.ipynb"
PYTEST_OPTIONS = [  # three workers for two cores: a fifth of what a test takes it waits
    # a notebook's cells must stay on one worker: they share a kernel
    "-n", "3", "--dist", "loadscope",
    # in the order collected: the browser's few long tests first, not last and alone
    "--no-loadscope-reorder",
    "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "500",
    "--nbval-sanitize-with", os.path.join("tests", "nbval_sanitize.cfg"),
]  # fmt: skip
CORE_OPTIONS = [
    "-n",
    "2",
    "--dist",
    "loadscope",
    "--ignore=tests/browser",
    "--ignore-glob=*/test_lab_*",
]
OWN_ENVIRONMENT = {"--latest": ".venv-latest", "--lowest": ".venv-lowest"}
TORCH = re.compile("(torch|triton|nvidia-.*|cuda-.*)$")  # torch and what only its CUDA build needs
LOCK_HEADS = {
    "server": "The server alone, without torch.",
    "course": "What the extras course and onnx add.",
    "test": "What the extra test adds.",
    "torch": "The builds of pip's own index: CUDA on Linux, CPU elsewhere.",
}
FUZZ_OPTIONS = ["--hypothesis-profile=fuzz", "--timeout=3600", "-m", "hypothesis"]


class Failure(Exception):
    """Something that the user can mend; the message says what and how."""


class Venv:
    """A virtual environment of this folder, and what is installed in it."""

    def __init__(self, name, cuda=False):
        self.folder = ROOT / name
        self.cuda = cuda

    def python(self):
        """Its interpreter: Windows and the others put it in different places."""
        return (
            self.folder / "Scripts" / "python.exe"
            if os.name == "nt"
            else self.folder / "bin" / "python"
        )

    def call(self, command, **variables):
        """Run a command in its environment, pass Ctrl-C and SIGTERM on to it, return its exit
        code."""
        environment = dict(os.environ, **variables)
        environment["PATH"] = str(self.python().parent) + os.pathsep + environment.get("PATH", "")
        environment["VIRTUAL_ENV"] = str(self.folder)
        # else a python3 kernel of another installation may win
        environment["JUPYTER_PREFER_ENV_PATH"] = "1"
        environment.pop("PYTHONHOME", None)
        # Ctrl-C reaches the child as well, which decides (JupyterLab asks first): here it must only
        # not end the wait
        signal.signal(signal.SIGINT, lambda *_: None)
        process = subprocess.Popen([str(part) for part in command], cwd=str(ROOT), env=environment)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()

    def run(self, module, *arguments, **variables):
        """Run a module with its Python, return the exit code."""
        return self.call([self.python(), "-m", module] + list(arguments), **variables)  # noqa: RUF005 (old grammar)

    def pip(self, *arguments):
        """Install something; raise Failure if that does not work."""
        code = self.run("pip", "install", "--disable-pip-version-check", *arguments)
        if code:
            raise Failure(
                "pip could not install flserving (its own lines are above; exit code %d). Check the network and that "
                "3 GB of disk are free (9 GB for a CUDA build of torch), then run this again."
                % code
            )

    def make(self):
        """Make it if it is missing; refuse one whose Python is missing or too old."""
        if not self.folder.exists():
            sys.stderr.write(
                "Making %s with Python %s ...\n" % (self.folder.name, sys.version.split()[0])
            )
            if subprocess.call([sys.executable, "-m", "venv", str(self.folder)]):
                raise Failure(
                    "Python could not make the virtual environment (its own lines are above). On Debian and Ubuntu "
                    "install the package python%d.%d-venv, then delete %s and run this again."
                    % (tuple(sys.version_info[:2]) + (self.folder.name,))  # noqa: RUF005 (old grammar)
                )
        question = "import sys; sys.exit(sys.version_info < (3, 11))"
        if not self.python().exists() or subprocess.call([str(self.python()), "-c", question]):
            raise Failure(
                "%s does not hold a working Python 3.11 or newer: delete that folder and run this again."
                % self.folder
            )

    def installed(self):
        """What the stamp says; {} where nothing, or half of an installation, is there."""
        try:
            return json.loads((self.folder / STAMP).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def prepare(self, extras, install):
        """Make it hold the project with at least ``extras``, put there by ``install(venv,
        extras)``."""
        self.make()
        # the folder is part of it: an installation in editable mode points back at its folder,
        # which may be moved
        read = [ROOT / "pyproject.toml"] + sorted(LOCKED.glob("*.txt"))  # noqa: RUF005 (old grammar)
        content = b"".join(path.read_bytes() for path in read) + str(ROOT).encode()
        stamp = {"fingerprint": hashlib.sha256(content).hexdigest()}
        found = self.installed()
        if found.get("fingerprint") == stamp["fingerprint"]:
            extras = extras.union(found["extras"])
        # who asked for CUDA once need not say it each time
        self.cuda = self.cuda or found.get("cuda", False)
        stamp["extras"] = sorted(extras)
        stamp["cuda"] = self.cuda
        if stamp == found:
            return
        sys.stderr.write(
            "Installing flserving into %s (minutes the first time) ...\n" % self.folder.name
        )
        install(self, stamp["extras"])
        (self.folder / STAMP).write_text(json.dumps(stamp), encoding="utf-8")


def install_locked(venv, extras):
    """The versions of requirements/, each file checked by its hash (torch's CPU build excepted: see
    install_torch)."""
    files = ["server", "course"] + ["test"] * ("test" in extras)
    named = [word for name in files for word in ("-r", str(LOCKED / (name + ".txt")))]
    venv.pip("--require-hashes", "--no-deps", *named)
    install_torch(venv, locked_torch())
    # setuptools is among the locked ones
    venv.pip("--no-deps", "--no-build-isolation", "--editable", ".")


def install_latest(venv, extras):
    """The newest versions that pyproject.toml allows; of torch the locked one, whose bound is
    raised by hand."""
    install_torch(venv, locked_torch())
    pins = venv.folder / "torch.txt"
    pins.write_text("torch==%s\n" % locked_torch(), encoding="utf-8")
    eagerly = ["--upgrade", "--upgrade-strategy", "eager", "--constraint", str(pins)]
    venv.pip(*(eagerly + ["--editable", ".[%s]" % ",".join(extras)]))  # noqa: RUF005 (old grammar)


def install_lowest(venv, extras):
    """The lower bounds of pyproject.toml for all that runs; the tools of the tests are as new as
    they can be beside."""
    bounds = lowest()
    install_torch(venv, bounds["torch"])
    pins = venv.folder / "lowest.txt"
    pins.write_text("".join("%s==%s\n" % pin for pin in sorted(bounds.items())), encoding="utf-8")
    venv.pip("--constraint", str(pins), "--editable", ".[%s]" % ",".join(extras))


def lowest():
    """name -> lower bound, of everything in pyproject.toml but the tools of the tests."""
    import tomllib  # Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["course"] + extras["onnx"]
    return dict(re.match(r"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)", line).groups() for line in lines)


def locked_torch():
    """The version of torch in requirements/torch.txt."""
    return re.search(
        r"^torch==([\w.]+)", (LOCKED / "torch.txt").read_text(encoding="utf-8"), re.MULTILINE
    ).group(1)


def install_torch(venv, version):
    """torch: on Linux the CPU build, unless CUDA is asked for; elsewhere there is only one build.

    The CPU builds of Linux are not in pip's own index, which knows no hashes of them: they are
    taken by version, from where pip is told to look (a folder of wheels, an index of one's own) or
    from PyTorch's own address.
    """
    if ON_LINUX and not venv.cuda:
        build = [
            "--no-deps",
            "torch==%s+cpu" % version,
            "--extra-index-url",
            CPU_BUILDS,
            "--retries",
            "2",
        ]
        if venv.run("pip", "install", "--disable-pip-version-check", *build) == 0:
            sys.stderr.write("torch is the CPU build; for CUDA add --cuda.\n")
            return
        sys.stderr.write(
            "No CPU build of torch %s can be had, neither from pip's index nor from %s: this takes the CUDA build, "
            "some GB; it works as well.\n" % (version, CPU_BUILDS)
        )
    if any(venv.folder.rglob("torch-*+cpu.dist-info")):  # pip would take it for the same version
        venv.run("pip", "uninstall", "--yes", "torch")
    if version == locked_torch():
        venv.pip("--require-hashes", "--no-deps", "-r", str(LOCKED / "torch.txt"))
    else:
        venv.pip("torch==%s" % version)


def lab(arguments, venv):
    """Open the named notebook, or the first one, in JupyterLab; its folder is what the file browser
    shows.

    A notebook of the course is opened in the student's copy, with --solutions in the teacher's
    folder.
    """
    course = SOLVED if "--solutions" in arguments else COPIES
    arguments = [word for word in arguments if word != "--solutions"]
    notebook = SOLVED / FIRST_NOTEBOOK
    if arguments and not arguments[0].startswith("-"):
        notebook = pathlib.Path(arguments[0]).resolve()
        arguments = arguments[1:]
    of_course = (SOLVED / notebook.name).exists()
    if of_course and (notebook.parent in (SOLVED, COPIES) or not notebook.exists()):
        notebook = course / notebook.name
    elif not notebook.exists():
        raise Failure("There is no notebook %s: name one of the folder notebooks/." % notebook)
    venv.prepare({"course", "onnx"}, install_locked)  # notebook 09 exports models
    return venv.run("flserving.lab.opening", notebook, *arguments)


def book(arguments, venv):
    """Write the course as static pages; the arguments are those of flserving.lab.pages.book."""
    venv.prepare({"course", "onnx"}, install_locked)
    return venv.run("flserving.lab.pages.book", *arguments)


def slides(arguments, venv):
    """Write notebooks as slides; the arguments are those of flserving.lab.pages.slides."""
    venv.prepare({"course", "onnx"}, install_locked)
    return venv.run("flserving.lab.pages.slides", *arguments)


def test(arguments, venv):
    """Run pytest: the quick tier if nothing is named (see tests/conftest.py); the arguments come
    last and so win."""
    if "--all" in arguments:  # what is named runs, and these two folders hold everything
        arguments = ["tests", "notebooks"] + [word for word in arguments if word != "--all"]
    if "--fuzz" in arguments:  # Hypothesis marks its tests
        arguments = FUZZ_OPTIONS + [word for word in arguments if word != "--fuzz"]
    install = install_locked
    options = PYTEST_OPTIONS
    if "--latest" in arguments:
        install = install_latest
        # what is newest today is not known from last time
        (venv.folder / STAMP).unlink(missing_ok=True)
    if "--lowest" in arguments:
        install = install_lowest
        options = CORE_OPTIONS
    venv.prepare({"course", "onnx", "test"}, install)
    arguments = [word for word in arguments if word not in OWN_ENVIRONMENT]
    # in nbval's runs a widget draws every corner of its sliders
    return venv.run("pytest", *(options + arguments), FLSERVING_STATIC="1")


def lock(arguments, venv):
    """Write requirements/ anew: the newest versions that fit pyproject.toml, for every Python and
    system, with hashes.

    uv resolves for all systems at once, and course and tests together: the course alone would take
    a protobuf beside which only an old tritonclient fits, whose parts must be compiled on Python
    3.12 and newer.
    """
    if arguments:
        raise Failure("lock takes no arguments, got %s." % " ".join(arguments))
    venv.make()
    venv.pip("--upgrade", "uv")
    LOCKED.mkdir(exist_ok=True)
    everything = resolve(venv, {"course", "onnx", "test"}, {})
    torch = {name: text for name, text in everything.items() if TORCH.match(name)}
    write_lock("torch", torch)
    written = set(torch)
    server = resolve(venv, set(), everything)
    course = resolve(venv, {"course", "onnx"}, everything)
    for name, found in (("server", server), ("course", course), ("test", everything)):
        write_lock(name, {key: everything[key] for key in found if key not in written})
        written.update(found)
    return 0


def resolve(venv, extras, known):
    """name -> its lines in a requirements file with hashes, for ``extras`` beside the versions of
    ``known``."""
    made = venv.folder / "lock.txt"
    pins = venv.folder / "known.txt"
    build = venv.folder / "build.txt"
    pins.write_text("".join(known.values()), encoding="utf-8")
    # builds the project itself: see pyproject.toml
    build.write_text("setuptools>=77\n", encoding="utf-8")
    command = [
        "pip",
        "compile",
        "pyproject.toml",
        str(build),
        "--constraints",
        str(pins),
        "--universal",
    ]
    command += [
        "--python-version",
        "3.11",
        "--generate-hashes",
        "--no-annotate",
        "--no-header",
        "--upgrade",
        "--quiet",
    ]
    command += [word for extra in sorted(extras) for word in ("--extra", extra)]
    if venv.run("uv", *(command + ["--output-file", str(made)])):  # noqa: RUF005 (old grammar)
        raise Failure(
            "uv found no set of versions (its own lines are above): mend the bounds in pyproject.toml."
        )
    blocks = {}
    for block in re.split(
        r"^(?=[A-Za-z0-9])", made.read_text(encoding="utf-8"), flags=re.MULTILINE
    )[1:]:
        name = block.split("==")[0]
        # one name may stand there twice, for different Pythons
        blocks[name] = blocks.get(name, "") + block
    return blocks


def write_lock(name, blocks):
    """One file of requirements/."""
    head = (
        "# Made by `python run.py lock`: the versions that the course was tested with. %s\n"
        % LOCK_HEADS[name]
    )
    (LOCKED / (name + ".txt")).write_text(
        head + "".join(blocks[key] for key in sorted(blocks)), encoding="utf-8"
    )


def main(arguments):
    """Return the exit code: the job's own, 1 for something to mend here, 2 for a command line that
    names no job."""
    jobs = {"lab": lab, "test": test, "book": book, "slides": slides, "lock": lock}
    if arguments and (arguments[0] in ("-h", "--help") or arguments[1:] in (["-h"], ["--help"])):
        sys.stdout.write(__doc__)
        return 0
    if not arguments or arguments[0] not in jobs:
        sys.stderr.write(__doc__ + "\nrun.py: name a command, lab, test, book, slides or lock.\n")
        return 2
    job = arguments[0]
    arguments = arguments[1:]
    folder = ".venv-lock" if job == "lock" else ".venv"
    try:
        if job == "test":
            folder = next(
                (OWN_ENVIRONMENT[word] for word in arguments if word in OWN_ENVIRONMENT), folder
            )
        if "--venv" in arguments:
            place = arguments.index("--venv")
            if place + 1 == len(arguments):
                raise Failure("--venv needs the name of a folder: for example --venv .venv-3.12")
            folder = arguments[place + 1]
            arguments = arguments[:place] + arguments[place + 2 :]
        venv = Venv(folder, cuda="--cuda" in arguments)
        return jobs[job]([word for word in arguments if word != "--cuda"], venv)
    except Failure as failure:
        sys.stderr.write("run.py: %s\n" % failure)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
