"""run.py: the commands that work before anything is installed. Here nothing is: the calls are
recorded."""

import ast
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "run.py").read_text(encoding="utf-8")
PYPROJECT = """
[project]
dependencies = ["torch>=2.6,<2.14", "httpcore[asyncio]>=1.0", "uvloop>=0.21; platform_system != 'Windows'"]
[project.optional-dependencies]
course = ["jupyterlab>=4.3"]
onnx = ["onnx>=1.18"]
test = ["pytest>=8.3"]
"""


class Sandbox:
    """run.py in a folder of its own; what it would have run is in ``calls``, each answered with
    ``exit_code``."""

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()
        self.folder = folder
        self.calls = []
        self.variables = {}
        self.exit_code = 0
        self.refused = ()  # a call that holds one of these words fails
        (folder / "pyproject.toml").write_text(PYPROJECT)
        (folder / "requirements").mkdir()
        (folder / "requirements" / "torch.txt").write_text(
            "# made\ntorch==2.13.0 \\\n    --hash=sha256:00\n"
        )
        (folder / "notebooks").mkdir()
        (folder / "notebooks" / "00_start_here.ipynb").write_text("{}")
        (folder / "run.py").write_text(SOURCE)
        script = runpy.run_path(str(folder / "run.py"))
        self.main = script["main"]
        self.globals = self.main.__globals__
        self.globals["ON_LINUX"] = True
        script["Venv"].call = lambda venv, command, **variables: self._record(
            venv, command, variables
        )

    def _record(self, venv, command, variables):
        words = [str(part).replace(str(self.folder), "ROOT") for part in command]
        assert words[0].startswith(f"ROOT/{venv.folder.name}/")
        self.calls.append(words[1:])
        self.variables = variables
        return 1 if any(word in " ".join(words) for word in self.refused) else self.exit_code

    def venv(self, name=".venv") -> None:
        """A virtual environment without pip, in a fraction of a second."""
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", self.folder / name], check=True
        )

    def jobs(self) -> list[list[str]]:
        """The calls that are no installation."""
        return [call for call in self.calls if call[1] != "pip"]

    def installed(self) -> list[str]:
        """What pip was asked for, without what all of its calls say."""
        return [" ".join(call[4:]) for call in self.calls if call[:2] == ["-m", "pip"]]


@pytest.fixture
def sandbox(tmp_path):
    box = Sandbox(tmp_path)
    box.venv()
    return box


def opened(folder: str, notebook: str) -> list[str]:
    return ["-m", "flserving.lab.opening", f"ROOT/{folder}/{notebook}"]


COURSE = (
    "--require-hashes --no-deps -r ROOT/requirements/server.txt -r ROOT/requirements/course.txt"
)
TESTS = f"{COURSE} -r ROOT/requirements/test.txt"
BUILDS = "--extra-index-url https://download.pytorch.org/whl/cpu --retries 2"
CPU = f"--no-deps torch==2.13.0+cpu {BUILDS}"
ANY_TORCH = "--require-hashes --no-deps -r ROOT/requirements/torch.txt"
PROJECT = "--no-deps --no-build-isolation --editable ."


def test_lab_installs_and_opens_the_students_first_notebook(sandbox):
    assert sandbox.main(["lab", "--no-browser"]) == 0
    assert sandbox.installed() == [COURSE, CPU, PROJECT]
    assert sandbox.jobs() == [[*opened("student", "00_start_here.ipynb"), "--no-browser"]]


def test_on_linux_torch_is_the_cpu_build_of_wherever_pip_looks_or_of_pytorch_else_any(
    sandbox, capsys
):
    """The CPU build needs no word from the user; where it cannot be had, a sentence says so."""
    sandbox.refused = [CPU]
    assert sandbox.main(["lab"]) == 0
    assert sandbox.installed() == [COURSE, CPU, ANY_TORCH, PROJECT]
    assert "this takes the CUDA build" in capsys.readouterr().err


@pytest.mark.parametrize(("linux", "options"), [(False, []), (True, ["--cuda"])])
def test_elsewhere_and_with_cuda_torch_is_the_build_of_pips_index(sandbox, linux, options):
    sandbox.globals["ON_LINUX"] = linux
    assert sandbox.main(["lab", *options, "--no-browser"]) == 0
    assert sandbox.installed() == [COURSE, ANY_TORCH, PROJECT]
    assert "--cuda" not in sandbox.calls[-1]


def test_who_asked_for_cuda_once_keeps_it_and_replaces_the_cpu_build(sandbox):
    sandbox.main(["lab"])
    found = sandbox.folder / ".venv" / "lib" / "torch-2.13.0+cpu.dist-info"
    found.mkdir()
    sandbox.calls.clear()
    sandbox.main(["lab", "--cuda"])
    assert sandbox.installed()[1:3] == ["torch", ANY_TORCH] and "uninstall" in sandbox.calls[1]
    found.rmdir()
    sandbox.calls.clear()
    sandbox.main(["lab"])
    assert sandbox.installed() == []
    sandbox.main(["test"])
    assert sandbox.installed() == [TESTS, ANY_TORCH, PROJECT]


@pytest.mark.parametrize(
    "command", [["book", "pages", "--instructor"], ["slides", "03", "--out", "talk"]]
)
def test_book_and_slides_install_the_course_and_pass_on_what_is_wanted(sandbox, command):
    assert sandbox.main(command) == 0
    assert sandbox.installed() == [COURSE, CPU, PROJECT]
    assert sandbox.jobs() == [["-m", f"flserving.lab.pages.{command[0]}", *command[1:]]]


def test_another_environment_can_be_named(sandbox, capsys):
    sandbox.venv(".venv-3.12")
    assert sandbox.main(["test", "--venv", ".venv-3.12", "tests/test_errors.py"]) == 0
    assert sandbox.calls[-1][-1] == "tests/test_errors.py" and "--venv" not in sandbox.calls[-1]
    assert (sandbox.folder / ".venv-3.12" / "flserving-install.json").exists()
    assert sandbox.main(["test", "--venv"]) == 1
    assert "needs the name of a folder" in capsys.readouterr().err


def test_latest_takes_the_newest_each_time_in_an_environment_of_its_own(sandbox):
    sandbox.venv(".venv-latest")
    newest = (
        "--upgrade --upgrade-strategy eager --constraint ROOT/.venv-latest/torch.txt "
        "--editable .[course,onnx,test]"
    )
    for _ in range(2):
        sandbox.calls.clear()
        assert sandbox.main(["test", "--latest", "-k", "lru"]) == 0
        assert sandbox.installed() == [CPU, newest]
        assert sandbox.calls[-1][-2:] == ["-k", "lru"] and "--latest" not in sandbox.calls[-1]
    assert (sandbox.folder / ".venv-latest" / "torch.txt").read_text() == "torch==2.13.0\n"


def test_lowest_takes_the_lower_bounds_and_runs_the_cores_tests(sandbox):
    sandbox.venv(".venv-lowest")
    assert sandbox.main(["test", "--lowest"]) == 0
    oldest = "--constraint ROOT/.venv-lowest/lowest.txt --editable .[course,onnx,test]"
    assert sandbox.installed() == [f"--no-deps torch==2.6+cpu {BUILDS}", oldest]
    pins = (sandbox.folder / ".venv-lowest" / "lowest.txt").read_text().splitlines()
    assert pins == [
        "httpcore==1.0",
        "jupyterlab==4.3",
        "onnx==1.18",
        "torch==2.6",
        "uvloop==0.21",
    ], "not pytest"
    assert "--nbval" not in sandbox.calls[-1] and "--ignore=tests/browser" in sandbox.calls[-1]
    sandbox.refused = ["torch==2.6+cpu"]
    (sandbox.folder / ".venv-lowest" / "flserving-install.json").unlink()
    sandbox.calls.clear()
    assert sandbox.main(["test", "--lowest"]) == 0
    assert sandbox.installed()[1] == "torch==2.6", "without hashes: those are of the locked one"


def test_lab_opens_a_named_notebook_from_where_the_user_stands(sandbox, monkeypatch):
    (sandbox.folder / "student").mkdir()
    (sandbox.folder / "student" / "03 mine.ipynb").write_text("{}")
    monkeypatch.chdir(sandbox.folder / "student")
    assert sandbox.main(["lab", "03 mine.ipynb"]) == 0
    assert sandbox.calls[-1] == opened("student", "03 mine.ipynb")


def test_lab_with_solutions_opens_the_teachers_notebooks(sandbox, monkeypatch):
    monkeypatch.chdir(sandbox.folder)
    for words in (["--solutions"], ["notebooks/00_start_here.ipynb", "--solutions"]):
        sandbox.calls.clear()
        assert sandbox.main(["lab", *words]) == 0
        assert sandbox.jobs() == [opened("notebooks", "00_start_here.ipynb")]


@pytest.mark.parametrize(
    "named", ["03_caching.ipynb", "notebooks/03_caching.ipynb", "student/03_caching.ipynb"]
)
def test_lab_opens_the_students_copy_of_a_notebook_of_the_course(sandbox, monkeypatch, named):
    monkeypatch.chdir(sandbox.folder)
    (sandbox.folder / "notebooks" / "03_caching.ipynb").write_text("{}")
    assert sandbox.main(["lab", named]) == 0
    assert sandbox.jobs() == [opened("student", "03_caching.ipynb")]


def test_lab_names_a_notebook_that_is_not_there_before_it_installs(sandbox, capsys):
    assert sandbox.main(["lab", "04.ipynb"]) == 1
    assert "There is no notebook" in capsys.readouterr().err
    assert sandbox.calls == []


def test_test_installs_the_test_extra_and_hands_arguments_and_exit_code_on(sandbox):
    assert sandbox.main(["test"]) == 0
    sandbox.exit_code = 5
    assert sandbox.main(["test", "tests/test_cache.py", "-k", "lru"]) == 5
    assert sandbox.installed() == [TESTS, CPU, PROJECT]
    assert sandbox.calls[-1][:2] == ["-m", "pytest"]
    assert sandbox.calls[-1][-3:] == ["tests/test_cache.py", "-k", "lru"]
    assert "--nbval" in sandbox.calls[-1] and sandbox.variables == {"FLSERVING_STATIC": "1"}


def test_all_names_both_folders_and_fuzz_the_property_tests(sandbox):
    def asked(*arguments):
        assert sandbox.main(["test", *arguments]) == 0
        return sandbox.calls[-1][
            sandbox.calls[-1].index(sandbox.globals["PYTEST_OPTIONS"][-1]) + 1 :
        ]

    assert asked("--all", "-x") == ["tests", "notebooks", "-x"]
    assert asked("-x", "--fuzz") == [
        "--hypothesis-profile=fuzz",
        "--timeout=3600",
        "-m",
        "hypothesis",
        "-x",
    ]


def test_lock_writes_four_files_with_each_package_in_one_of_them(sandbox):
    """torch and what its CUDA build needs apart: the CPU build must not pull gigabytes, nor be
    refused for its hash."""
    sandbox.venv(".venv-lock")
    made = "{0}==1.0 ; sys_platform == 'linux' \\\n    --hash=sha256:{0}\n"
    asked = []

    def answer(venv, command):
        if command[2] == "uv":
            extras = [
                word
                for word, before in zip(command[1:], command[:-1], strict=True)
                if before == "--extra"
            ]
            known = Path(command[command.index("--constraints") + 1]).read_text().count("--hash")
            asked.append((extras, known))
            of_extra = {"tritonclient": "test", "pandas": "course"}
            names = [
                "numpy",
                "nvidia-cudnn-cu13",
                "pandas",
                "torch",
                "triton",
                "tritonclient",
                "cuda-toolkit",
            ]
            kept = [name for name in names if name not in of_extra or of_extra[name] in extras]
            text = "".join(made.format(name) for name in kept) + made.format("numpy").replace(
                "1.0", "2.0"
            )
            Path(command[-1]).write_text(text)
        return 0

    sandbox.globals["Venv"].call = answer
    assert sandbox.main(["lock"]) == 0
    assert asked == [(["course", "onnx", "test"], 0), ([], 8), (["course", "onnx"], 8)]
    files = {path.stem: path.read_text() for path in (sandbox.folder / "requirements").iterdir()}
    assert files.keys() == {"server", "course", "test", "torch"}
    names = {stem: re.findall(r"^[a-z][\w-]+", text, re.MULTILINE) for stem, text in files.items()}
    cuda = ["cuda-toolkit", "nvidia-cudnn-cu13", "torch", "triton"]
    assert names == {
        "server": ["numpy", "numpy"],
        "course": ["pandas"],
        "test": ["tritonclient"],
        "torch": cuda,
    }
    assert files["test"].endswith(made.format("tritonclient"))
    assert "python run.py lock" in files["course"]
    assert sandbox.main(["lock", "now"]) == 1


def test_it_installs_again_only_when_pyproject_or_the_wish_changes(sandbox):
    for command in ("test", "test", "lab"):
        sandbox.main([command])
    assert sandbox.installed() == [TESTS, CPU, PROJECT]
    for changed in ("pyproject.toml", "requirements/torch.txt"):
        sandbox.calls.clear()
        with (sandbox.folder / changed).open("a") as file:
            file.write("# more\n")
        for command in ("lab", "lab", "test"):
            sandbox.main([command])
        assert sandbox.installed() == [COURSE, CPU, PROJECT, TESTS, CPU, PROJECT]


def test_a_folder_that_was_moved_is_installed_again(sandbox):
    sandbox.main(["lab"])
    stamp = sandbox.folder / ".venv" / sandbox.globals["STAMP"]
    content = json.loads(stamp.read_text())
    stamp.write_text(json.dumps({**content, "fingerprint": "of another folder"}))
    sandbox.main(["lab"])
    stamp.write_text("{ half a file")
    sandbox.main(["lab"])
    assert sandbox.installed() == [COURSE, CPU, PROJECT] * 3


def test_a_failed_installation_is_told_and_tried_again(sandbox, capsys):
    sandbox.exit_code = 1
    assert sandbox.main(["test"]) == 1
    assert "pip could not install flserving" in capsys.readouterr().err
    sandbox.exit_code = 0
    assert sandbox.main(["test"]) == 0
    assert sandbox.installed() == [TESTS, TESTS, CPU, PROJECT]


def test_it_makes_the_environment(tmp_path, monkeypatch):
    box = Sandbox(tmp_path)
    made = []
    original = subprocess.call

    def fast_venv(command):
        if "venv" in command:
            made.append(command[-1])
            box.venv()
            return 0
        return original(command)

    monkeypatch.setattr(subprocess, "call", fast_venv)
    assert box.main(["lab"]) == 0
    assert made == [str(tmp_path / ".venv")]


def test_an_environment_that_cannot_be_made_or_used_is_told(tmp_path, monkeypatch, capsys):
    box = Sandbox(tmp_path)
    monkeypatch.setattr(subprocess, "call", lambda command: 1)
    assert box.main(["lab"]) == 1
    assert "could not make the virtual environment" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / ".venv").mkdir()
    assert box.main(["lab"]) == 1
    assert "delete that folder and run this again" in capsys.readouterr().err
    assert box.calls == []


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["lab", "--help"], 0), ([], 2), (["start"], 2)]
)
def test_help_and_wrong_command_lines(sandbox, capsys, arguments, code):
    assert sandbox.main(arguments) == code
    shown = capsys.readouterr()
    assert "python run.py lab" in (shown.err if code else shown.out)
    assert sandbox.calls == []


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 6, 15), (3, 10, 13)])
def test_an_old_python_is_refused_in_one_sentence(monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit) as refusal:
        exec(compile(SOURCE, "run.py", "exec"), {"__name__": "__main__"})
    message = refusal.value.code
    assert message.startswith(
        f"flserving needs Python 3.11 or newer and this is Python {version[0]}.{version[1]}:"
    )
    assert message.count("\n") == 0


def test_it_parses_on_old_pythons():
    """Grammar that came after Python 2.7 would end in a SyntaxError instead of the refusal."""
    newer = (
        ast.JoinedStr,
        ast.NamedExpr,
        ast.AnnAssign,
        ast.AsyncFunctionDef,
        ast.Match,
        ast.Nonlocal,
        ast.YieldFrom,
    )
    for node in ast.walk(ast.parse(SOURCE)):
        assert not isinstance(node, newer), f"line {node.lineno}: {type(node).__name__}"
        if isinstance(node, ast.FunctionDef):
            assert not node.args.kwonlyargs and not node.args.posonlyargs and node.returns is None
            assert all(argument.annotation is None for argument in node.args.args)
        if isinstance(node, ast.List | ast.Tuple):
            assert not any(isinstance(element, ast.Starred) for element in node.elts), (
                f"line {node.lineno}: [*x]"
            )
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "print", (
                "print(..., file=...) is a SyntaxError in Python 2"
            )
    assert SOURCE.isascii(), "Python 2 refuses other characters without a declaration"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 7), (signal.SIGTERM, 8)])
def test_signals_reach_the_job_and_its_exit_code_comes_back(sandbox, sent, expected):
    """The job ends in its own way (7, 8); run.py waits for it and passes its exit code on."""
    job = textwrap.dedent("""
        import signal, sys, time
        signal.signal(signal.SIGINT, lambda *_: sys.exit(7))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(8))
        print("ready", flush=True)
        time.sleep(60)
    """)
    code = f"import run, sys; sys.exit(run.Venv('.venv').call([sys.executable, '-c', {job!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=sandbox.folder, stdout=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    with process:
        assert process.stdout.readline() == "ready\n"
        # Ctrl-C in a terminal goes to the whole group, SIGTERM to the one process that was named
        os.killpg(process.pid, sent) if sent == signal.SIGINT else process.terminate()
        assert process.wait(100) == expected


def test_the_job_sees_the_environment_of_the_venv(sandbox):
    code = "import os; print(os.environ['JUPYTER_PREFER_ENV_PATH'], os.environ['PATH'].split(os.pathsep)[0])"
    command = f"import run, sys; venv = run.Venv('.venv'); sys.exit(venv.call([venv.python(), '-c', {code!r}]))"
    result = subprocess.run(
        [sys.executable, "-c", command],
        cwd=sandbox.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.split() == ["1", str(sandbox.globals["Venv"](".venv").python().parent)], (
        result.stderr
    )
