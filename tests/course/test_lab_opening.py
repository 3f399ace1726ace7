"""``flserving lab``: which notebook is opened, and which copies are made before."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flserving.api import cli
from flserving.lab import opening

FIRST = opening.FIRST


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of two notebooks and a picture; the user stands beside it."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in (FIRST, "03_caching.ipynb"):
        (folder / name).write_text(
            '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
        )
    (folder / "stack.png").write_bytes(b"png")
    monkeypatch.setattr(opening, "course", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def started(monkeypatch):
    """The command lines of JupyterLab, which is not started."""
    found = []

    def execv(program, command):
        assert program == command[0]
        found.append(command)
        raise SystemExit(0)  # the real one does not return either

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(subprocess, "call", lambda command: found.append(command) or 0)
    return found


def lab(*words):
    """Run ``flserving lab`` to its end."""
    with contextlib.suppress(SystemExit):
        cli.main(["lab", *words])


def test_the_copies_go_to_the_folder_student_and_the_first_is_opened(course, started):
    lab()
    student = course.parent / "student"
    assert sorted(path.name for path in student.iterdir()) == [
        FIRST,
        "03_caching.ipynb",
        "stack.png",
    ]
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert command[3:5] == [
        f"--ServerApp.root_dir={student}",
        f"--LabApp.default_url=/lab/tree/{FIRST}",
    ]


def test_a_folder_and_options_of_jupyterlab_may_follow(course, started):
    lab("mine", "--no-browser", "--port=8890")
    assert started[0][-2:] == ["--no-browser", "--port=8890"] and Path("mine", FIRST).exists()


def test_options_of_jupyterlab_need_no_folder_before_them(course, started):
    lab("--no-browser", "--port", "8890")
    assert started[0][-3:] == ["--no-browser", "--port", "8890"] and Path("student", FIRST).exists()


def test_where_nothing_is_missing_nothing_is_loaded_that_makes_copies(course, started):
    lab()
    code = (
        "import sys; from pathlib import Path; from flserving.lab import opening\n"
        "opening.course = lambda: Path('notebooks').absolute(); opening.prepare(Path('student'))\n"
        "assert 'nbformat' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows knows no root")
@pytest.mark.parametrize("user", [0, 1000])
def test_root_is_allowed_and_anybody_else_says_nothing_of_it(course, started, monkeypatch, user):
    """JupyterLab refuses to start as root, which containers and cloud notebooks are."""
    monkeypatch.setattr(os, "geteuid", lambda: user)
    for words in ([], ["student", "--allow-root"]):
        lab(*words)
    assert [command.count("--allow-root") for command in started] == [user == 0, 1]


def test_new_notebooks_are_added_and_what_is_there_stays(course, started):
    Path("student").mkdir()
    Path("student", FIRST).write_text("my work")
    lab("student/03_caching.ipynb")
    assert (
        Path("student", FIRST).read_text() == "my work"
        and Path("student", "03_caching.ipynb").exists()
    )
    assert started[0][4].endswith("/lab/tree/03_caching.ipynb")


def test_a_notebook_of_ones_own_and_the_course_itself_are_opened_without_copies(course, started):
    Path("own").mkdir()
    for name in ("my work.ipynb", "03_caching.ipynb"):
        Path("own", name).write_text("{}")
    for place in ("own/my work.ipynb", "own/03_caching.ipynb", f"notebooks/{FIRST}"):
        lab(place)
    assert started[0][4].endswith("/lab/tree/my%20work.ipynb") and len(started) == 3
    assert len(list(Path("own").iterdir())) == 2 and len(list(course.iterdir())) == 3


def test_a_notebook_that_is_not_there_is_named_and_nothing_is_opened(course, started, capsys):
    assert cli.main(["lab", "13_none.ipynb"]) == 1
    assert "there is no notebook" in capsys.readouterr().err and started == []


def test_without_notebooks_it_says_how_to_get_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        opening, "__file__", str(tmp_path / "site" / "flserving" / "lab" / "opening.py")
    )
    monkeypatch.setattr(opening, "files", lambda name: None)
    assert opening.main([]) == 1
    assert "holds no notebooks" in capsys.readouterr().err
