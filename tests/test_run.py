"""run.py: the two commands that work before anything is installed. Here nothing is: the calls are recorded."""

import ast
import json
import os
import runpy
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "run.py").read_text(encoding="utf-8")


class Sandbox:
    """run.py in a folder of its own; what it would have run is in ``calls``, each answered with ``exit_code``."""

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()
        self.folder, self.calls, self.variables, self.exit_code = folder, [], {}, 0
        (folder / "pyproject.toml").write_text("[project]\n")
        (folder / "notebooks").mkdir()
        (folder / "notebooks" / "00_start_here.ipynb").write_text("{}")
        (folder / "run.py").write_text(SOURCE)
        script = runpy.run_path(str(folder / "run.py"))
        self.main = script["main"]
        self.globals = self.main.__globals__
        self.globals["call"] = self._record

    def _record(self, command, **variables):
        self.calls.append([str(part) for part in command[1:]])
        self.variables = variables
        return self.exit_code

    def venv(self) -> None:
        """A virtual environment without pip, in a fraction of a second."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.folder / ".venv"], check=True)


@pytest.fixture
def sandbox(tmp_path):
    box = Sandbox(tmp_path)
    box.venv()
    return box


def lab_options(notebook: Path) -> list[str]:
    return [f"--ServerApp.root_dir={notebook.parent}", f"--LabApp.default_url=/lab/tree/{notebook.name}"]


INSTALL = ["-m", "pip", "install", "--disable-pip-version-check", "--editable"]


def test_lab_installs_and_opens_the_first_notebook(sandbox):
    assert sandbox.main(["lab", "--no-browser"]) == 0
    first = lab_options(sandbox.folder / "notebooks" / "00_start_here.ipynb")
    assert sandbox.calls == [[*INSTALL, ".[onnx]"], ["-m", "jupyterlab", *first, "--no-browser"]]


def test_lab_opens_a_named_notebook_from_where_the_user_stands(sandbox, monkeypatch):
    (sandbox.folder / "student").mkdir()
    (sandbox.folder / "student" / "03 mine.ipynb").write_text("{}")
    monkeypatch.chdir(sandbox.folder / "student")
    assert sandbox.main(["lab", "03 mine.ipynb"]) == 0
    assert sandbox.calls[-1][2:] == lab_options(sandbox.folder / "student" / "03%20mine.ipynb")


def test_lab_names_a_notebook_that_is_not_there_before_it_installs(sandbox, capsys):
    assert sandbox.main(["lab", "04.ipynb"]) == 1
    assert "There is no notebook" in capsys.readouterr().err
    assert sandbox.calls == []


def test_test_installs_the_test_extra_and_hands_arguments_and_exit_code_on(sandbox):
    assert sandbox.main(["test"]) == 0
    sandbox.exit_code = 5
    assert sandbox.main(["test", "tests/test_cache.py", "-k", "lru"]) == 5
    assert sandbox.calls[0] == [*INSTALL, ".[onnx,test]"]
    assert sandbox.calls[-1][:2] == ["-m", "pytest"]
    assert sandbox.calls[-1][-3:] == ["tests/test_cache.py", "-k", "lru"]
    assert "--nbval" in sandbox.calls[-1] and sandbox.variables == {"FLSERVING_STATIC": "1"}


def installs(box: Sandbox) -> list[str]:
    return [call[-1] for call in box.calls if "pip" in call]


def test_it_installs_again_only_when_pyproject_or_the_wish_changes(sandbox):
    for command in ("test", "test", "lab"):
        sandbox.main([command])
    assert installs(sandbox) == [".[onnx,test]"]
    (sandbox.folder / "pyproject.toml").write_text("[project]\nname = 'more'\n")
    sandbox.main(["lab"])
    assert installs(sandbox) == [".[onnx,test]", ".[onnx]"]
    sandbox.main(["lab"])
    sandbox.main(["test"])
    assert installs(sandbox) == [".[onnx,test]", ".[onnx]", ".[onnx,test]"]


def test_a_folder_that_was_moved_is_installed_again(sandbox):
    sandbox.main(["lab"])
    stamp = sandbox.globals["STAMP"]
    content = json.loads(stamp.read_text())
    stamp.write_text(json.dumps({**content, "fingerprint": "of another folder"}))
    sandbox.main(["lab"])
    stamp.write_text("{ half a file")
    sandbox.main(["lab"])
    assert installs(sandbox) == [".[onnx]"] * 3


def test_a_failed_installation_is_told_and_tried_again(sandbox, capsys):
    sandbox.exit_code = 1
    assert sandbox.main(["test"]) == 1
    assert "pip could not install flserving" in capsys.readouterr().err
    sandbox.exit_code = 0
    assert sandbox.main(["test"]) == 0
    assert installs(sandbox) == [".[onnx,test]"] * 2


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


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["lab", "--help"], 0), ([], 2), (["start"], 2)])
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
    assert message.startswith(f"flserving needs Python 3.11 or newer and this is Python {version[0]}.{version[1]}:")
    assert message.count("\n") == 0


def test_it_parses_on_old_pythons():
    """Grammar that came after Python 2.7 would end in a SyntaxError instead of the refusal."""
    newer = (ast.JoinedStr, ast.NamedExpr, ast.AnnAssign, ast.AsyncFunctionDef, ast.Match, ast.Nonlocal, ast.YieldFrom)
    for node in ast.walk(ast.parse(SOURCE)):
        assert not isinstance(node, newer), f"line {node.lineno}: {type(node).__name__}"
        if isinstance(node, ast.FunctionDef):
            assert not node.args.kwonlyargs and not node.args.posonlyargs and node.returns is None
            assert all(argument.annotation is None for argument in node.args.args)
        if isinstance(node, ast.List | ast.Tuple):
            assert not any(isinstance(element, ast.Starred) for element in node.elts), f"line {node.lineno}: [*x]"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "print", "print(..., file=...) is a SyntaxError in Python 2"
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
    code = f"import run, sys; sys.exit(run.call([sys.executable, '-c', {job!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=sandbox.folder, stdout=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    with process:
        assert process.stdout.readline() == "ready\n"
        # Ctrl-C in a terminal goes to the whole group, SIGTERM to the one process that was named
        os.killpg(process.pid, sent) if sent == signal.SIGINT else process.terminate()
        assert process.wait(20) == expected


def test_the_job_sees_the_environment_of_the_venv(sandbox):
    code = "import os; print(os.environ['JUPYTER_PREFER_ENV_PATH'], os.environ['PATH'].split(os.pathsep)[0])"
    command = f"import run, sys; sys.exit(run.call([run.venv_python(), '-c', {code!r}]))"
    result = subprocess.run(
        [sys.executable, "-c", command], cwd=sandbox.folder, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.split() == ["1", str(sandbox.globals["venv_python"]().parent)], result.stderr
