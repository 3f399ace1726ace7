"""The flserving command and its doctor: every line is ok or says what to do."""

import io
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flserving.api import cli, doctor


def lines_of(checks, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", checks)
    out = io.StringIO()
    return doctor.report(out), out.getvalue().splitlines()


@pytest.mark.full
def test_this_installation_is_healthy():
    """The real command: all checks, one real prediction."""
    result = subprocess.run(
        [sys.executable, "-m", "flserving", "doctor"], capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(doctor.CHECKS)
    assert all(line.startswith("ok ") for line in lines if not line.startswith("-- chromium"))
    assert "prediction: v1.0 answered in" in result.stdout
    assert "python 3." in lines[0] and "torch 2." in lines[1]


def test_a_need_that_is_not_met_makes_the_exit_code_1_and_an_optional_one_does_not(monkeypatch):
    good, bad = doctor.Check(True, "fine"), doctor.Check(False, "broken: mend it")
    optional = doctor.Check(False, "absent: install it", needed=False)
    assert lines_of([lambda: good, lambda: optional], monkeypatch) == (
        0,
        ["ok fine", "-- absent: install it"],
    )
    assert lines_of([lambda: bad, lambda: good], monkeypatch) == (
        1,
        ["-- broken: mend it", "ok fine"],
    )


def test_a_check_that_breaks_is_a_line_and_not_the_end(monkeypatch):
    def check_moon():
        raise OSError("no moon tonight")

    code, lines = lines_of([check_moon, lambda: doctor.Check(True, "fine")], monkeypatch)
    assert code == 1
    assert lines[0].startswith("-- moon: OSError: no moon tonight; in the project's folder run")
    assert lines[1] == "ok fine"


def test_packages_that_are_missing_or_too_old_are_named(monkeypatch):
    versions = {"torch": "2.5.1", "numpy": "2.4.0"}

    def version(name):
        if name not in versions:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    needed = ["torch>=2.6,<2.14", "numpy>=2.0", "pandas>=2.2", 'nbgrader>=0.9; extra == "grading"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    check = doctor.check_packages()
    assert not check.ok
    assert "torch is 2.5.1, needed" in check.text and "pandas is missing" in check.text
    assert "numpy" not in check.text and "nbgrader" not in check.text
    assert "python -m pip install -e ." in check.text


def test_the_course_is_a_line_of_its_own_and_no_server_needs_it(monkeypatch):
    """Where JupyterLab is, all of the course must be; where it is not, nobody meant to open
    notebooks there."""
    needed = [
        "torch>=2.6",
        'jupyterlab>=4.3; extra == "course"',
        "uvloop>=0.21; platform_system != 'Nowhere'",
    ]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "4.2.0")
    assert doctor.check_course().text.startswith(
        "course: jupyterlab is 4.2.0, needed >=4.3; in the project's folder"
    )
    assert not doctor.check_course().ok and doctor.check_course().needed
    assert doctor.check_packages().text == "torch 4.2.0, uvloop 4.2.0"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    for check in (doctor.check_course(), doctor.check_kernel()):
        assert not check.ok and not check.needed
    assert 'pip install "flserving[course]"' in doctor.check_course().text


def test_an_old_python_is_told(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 1))
    check = doctor.check_python()
    assert not check.ok and "needs 3.11 or newer" in check.text


@pytest.mark.parametrize(
    ("program", "ok"),
    [("python", True), (sys.executable, True), ("/elsewhere/bin/python3", False)],
)
def test_a_kernel_of_another_python_is_noticed(monkeypatch, program, ok):
    from jupyter_client.kernelspec import KernelSpecManager

    monkeypatch.setattr(
        KernelSpecManager, "get_kernel_spec", lambda self, name: SimpleNamespace(argv=[program])
    )
    check = doctor.check_kernel()
    assert check.ok is ok
    assert ok or "python run.py lab" in check.text


def test_a_missing_kernel_is_told(monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    def none(self, name):
        raise NoSuchKernel(name)

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", none)
    assert "not installed" in doctor.check_kernel().text


def test_a_server_that_answers_nonsense_is_noticed(monkeypatch):
    from flserving import serving

    closed = []
    server = SimpleNamespace(
        predict=lambda rows: {
            "probabilities": [[0.5, 0.2]],
            "model_version": "v1.0",
            "latency_ms": 1.0,
        },
        close=lambda: closed.append(True),
    )
    monkeypatch.setattr(serving, "create_serving_pipeline", lambda model: server)
    check = doctor.check_prediction()
    assert not check.ok and "add up to 0.7" in check.text
    assert closed == [True]


def test_a_free_port_can_really_be_opened():
    port = int(doctor.check_port().text.rpartition(": ")[2])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))


def test_a_closed_loopback_is_told(monkeypatch):
    def refuse(self, address):
        raise PermissionError("not allowed")

    monkeypatch.setattr(doctor.socket.socket, "bind", refuse)
    check = doctor.check_port()
    assert not check.ok and "not allowed" in check.text and "firewall" in check.text


def test_a_disk_that_cannot_be_written_or_is_full_is_told(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    assert not doctor.check_disk().ok and "0.0 GB free: free some space" in doctor.check_disk().text

    def refuse():
        raise PermissionError("read-only")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert "cannot be written (read-only)" in doctor.check_disk().text


def test_chromium_is_found_by_variable_path_or_place(monkeypatch, tmp_path):
    program = tmp_path / "chromium"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.delenv("FLSERVING_CHROMIUM", raising=False)
    monkeypatch.setattr(doctor, "CHROMIUM_PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.find_chromium() == str(program)
    monkeypatch.setenv("PATH", "")
    assert doctor.find_chromium() is None
    assert not doctor.check_chromium().ok and not doctor.check_chromium().needed
    monkeypatch.setattr(doctor, "CHROMIUM_PLACES", (str(program),))
    assert doctor.find_chromium() == str(program)
    monkeypatch.setenv("FLSERVING_CHROMIUM", str(tmp_path / "gone"))
    assert doctor.find_chromium() is None, "a wrong path must not be replaced by another browser"


@pytest.mark.parametrize("argv", [[], ["cure"], ["doctor", "--loud"]])
def test_a_wrong_command_line_ends_in_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert "usage: flserving" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown and command.help in shown for name, command in cli.COMMANDS.items())


def test_the_command_returns_the_doctors_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", [lambda: doctor.Check(False, "ill: rest")])
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out == "-- ill: rest\n"


def test_ctrl_c_while_a_command_starts_ends_in_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.COMMANDS["doctor"]._replace(run=interrupted))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "flserving: interrupted\n"
