"""``flserving serve`` and ``flserving demo`` as an operator runs them: real processes, signals,
messages."""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import fields

import httpx
import psutil
import pytest

from flserving import Registry, ServingConfig
from flserving.api import cli
from flserving.api.client import Client
from flserving.api.client.retries import Retries
from flserving.api.commands import registry
from flserving.api.options import ApiOptions
from flserving.api.processes import Plan, _serve
from flserving.errors import ConfigError, NotFoundError
from serving_models import PATIENCE_S, wait_until
from serving_processes import Load, X, kill_one, listens, running, two_versions


@pytest.fixture(scope="module")
def registry_root(tmp_path_factory):
    return two_versions(tmp_path_factory.mktemp("serve") / "registry")


def test_ctrl_c_reaches_the_group_and_still_drains(registry_root):
    with running(registry_root, FLSERVING_TOKEN="from-the-environment") as served:
        workers = served.workers()
        assert served.token == "the" and "from-the-environment" not in served.url
        with Client(served.url, "from-the-environment") as client:
            assert client.predict(X)["model_version"] in {"1", "2"}
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        assert served.end(signal.SIGINT) == 0 and served.stderr == ""


def test_workers_end_when_their_supervisor_is_killed(registry_root):
    with running(registry_root) as served:
        workers = served.workers()
        served.process.kill()
        psutil.wait_procs(workers, timeout=PATIENCE_S)
        assert not any(worker.is_running() for worker in workers)


def test_sigterm_while_a_worker_is_forked_lets_the_others_finish(registry_root):
    """A replacement that has no handlers of its own yet must not pass the order on as if the
    supervisor got a second one: the healthy worker answers what it admitted, and nobody has to be
    killed."""
    options = ["--workers", 2, "--num-workers", 8, "--max-batch-size", 1]
    with running(
        registry_root, *options, program="late_worker.py", LATE_S="2", SLOW_S="2"
    ) as served:
        victim, _ = served.workers()
        victim.kill()
        # from now on it sleeps: all calls reach the other one
        assert served.process.stdout.readline() == "forked\n"
        with Load(
            lambda n: served.client(0, retries=Retries(attempts=1)), threads=8, calls=1
        ) as load:
            metrics = {
                "url": f"{served.url}/metrics",
                "headers": {"authorization": f"Bearer {served.token}"},
            }
            wait_until(lambda: "flserving_executions_running 8.0" in httpx.get(**metrics).text)
            assert served.end(signal.SIGTERM) == 0, served.stderr
    assert load.errors == [] and len(load.answers) == 8


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="nothing stops a process here")
def test_a_worker_that_hangs_is_replaced_and_so_is_a_replacement_that_does_not_start(registry_root):
    with running(registry_root, "--workers", 2, program="hung_worker.py") as served:
        hung = served.workers()[0]
        hung.send_signal(signal.SIGSTOP)

        def replaced():
            workers = served.workers()
            return len(workers) == 2 and hung not in workers and all(map(listens, workers))

        wait_until(replaced, "the second replacement")
        with served.client(0) as client:
            assert client.predict(X)["predictions"]
        served.end()
        assert f"(pid {hung.pid}) has not answered for 3 s: it is killed" in served.stderr
        assert "did not start for 5 s: it is killed" in served.stderr


def test_a_killed_process_leaves_nothing_in_the_temporary_folder(registry_root, tmp_path):
    with running(registry_root, "--workers", 2, TMPDIR=str(tmp_path)) as served:
        for _ in range(2):
            kill_one(served)
        assert len(list(tmp_path.iterdir())) == 1, "the supervisor's own"
        workers = served.workers()
        served.process.kill()
        psutil.wait_procs(workers, timeout=PATIENCE_S)
        assert not list(tmp_path.iterdir())


EARLY = """
import os, signal, sys
from flserving.api.cli import main

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())
sys.exit(main(sys.argv[1:]))
"""


def test_sigterm_while_torch_is_loaded_is_an_order_to_stop(registry_root, tmp_path):
    command = [
        sys.executable,
        "-c",
        EARLY,
        "serve",
        "--registry",
        str(registry_root),
        "--port",
        "0",
        "--no-grpc",
    ]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "it never answered"
    assert not list(tmp_path.iterdir())


STOPPED_IN_A_CALLBACK = """
import multiprocessing, os, signal, weakref

class Thing:
    pass

thing = Thing()
reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
if multiprocessing.parent_process() is not None:
    del thing
"""


def test_a_worker_that_is_told_to_stop_where_errors_are_swallowed_stops(registry_root, tmp_path):
    """Python swallows what is raised in the callback of a weak reference, and torch's import runs
    many of them."""
    (tmp_path / "own.py").write_text(STOPPED_IN_A_CALLBACK)
    options = ["--registry", str(registry_root), "--import", "own", "--port", "0", "--no-grpc"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "flserving", "serve", *options],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "ended before it could say why" in done.stderr, "it did not go on to serve"


def test_a_second_signal_kills_at_once(registry_root):
    with running(registry_root, "--notice-s", 15) as served:
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{served.url}/v2/health/ready").status_code == 503)
        assert served.end(signal.SIGTERM) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "{taken}"], "is in use: stop what listens there"),
        (["--certificate", "{missing}", "--key", "{missing}"], "cannot be read"),
        (["--admin", "--workers", "2"], "admin with 2 workers"),
        (["--workers", "0"], "workers is 0"),
        (["--max-batch-size", "0"], "max_batch_size is 0"),
        (["--grace-s", "-1"], "grace-s is -1"),
        (["--token-file", "{missing}"], "cannot read the tokens"),
        (["--no-token", "--token-file", "{missing}"], "--no-token beside a token"),
        (["--origin", "*"], "name each one"),
        (["--outputs", "infer=labels"], "no policy 'labels': choose full, label, top-K"),
        (["--outputs", "guest=label"], "no role 'guest'"),
    ],
    ids=lambda value: (
        "-".join(value).replace("{", "").replace("}", "") if isinstance(value, list) else ""
    ),
)
def test_what_cannot_be_served_says_why(registry_root, tmp_path, capsys, options, says):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"missing": tmp_path / "none", "taken": taken.getsockname()[1]}
        filled = [option.format(**places) for option in options]
        assert (
            cli.main(
                [
                    "serve",
                    "--registry",
                    str(registry_root),
                    "--port",
                    "0",
                    "--grpc-port",
                    "0",
                    *filled,
                ]
            )
            == 1
        )
    shown = capsys.readouterr()
    assert shown.out == "" and re.fullmatch(r"flserving: [^\n]*\n", shown.err) and says in shown.err


def test_a_worker_that_cannot_start_says_why(tmp_path):
    command = [sys.executable, "-m", "flserving", "serve", "--port", "0", "--grpc-port", "0"]
    command += ["--registry", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"flserving: no registry in [^\n]*\n", done.stderr)
    assert not (tmp_path / "none").exists(), "a wrong folder is not made into a registry"


def test_a_worker_refuses_an_empty_registry_and_a_model_that_nobody_published(
    registry_root, tmp_path
):
    Registry(tmp_path / "empty").close()
    told, tell = multiprocessing.Pipe(duplex=False)
    with told, tell:
        with pytest.raises(ConfigError, match="is empty: publish a version first"):
            _serve(Plan(registry=str(tmp_path / "empty")), 0, tell, told)
        with pytest.raises(NotFoundError, match="no version of 'nothing'"):
            _serve(Plan(registry=str(registry_root), model="nothing"), 0, tell, told)
        assert not told.poll()


def test_every_setting_of_the_server_is_an_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    for field in (*fields(ServingConfig), *fields(ApiOptions)):
        if field.name not in {"tokens", "origins", "hosts"}:  # --token-file, --origin, --allow-host
            assert f"--{field.name.replace('_', '-')} " in shown


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_path_on_the_command_line_may_begin_at_home(command, monkeypatch, tmp_path):
    """Shells leave ``~`` alone in ``--registry=~/models``: a folder called ``~`` is what nobody
    means."""
    monkeypatch.setenv("HOME", str(tmp_path))
    cli.COMMANDS[command].options(parser := argparse.ArgumentParser())
    if command == "registry":
        registry.COMMANDS["list"].options(parser)
    paths = [action for action in parser._actions if action.metavar in ("DIR", "FILE")]
    assert paths or command in ("doctor", "lab"), "the words of lab go on to JupyterLab"
    for action in paths:
        assert action.type("~/a") == str(tmp_path / "a"), f"{command} {action.option_strings}"


def test_a_plan_and_the_options_of_an_endpoint_may_begin_at_home(
    registry_root, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(registry_root.parent))
    told, tell = multiprocessing.Pipe(duplex=False)
    with told, tell, pytest.raises(NotFoundError, match="no version of 'nothing'"):
        _serve(Plan(registry=f"~/{registry_root.name}", model="nothing"), 0, tell, told)
    with pytest.raises(
        ConfigError, match=f"certificate '{registry_root.parent}/none.pem' cannot be read"
    ):
        ApiOptions(certificate="~/none.pem", key="~/none.pem")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_lines_of_the_demo_work_as_printed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "flserving", "demo", "--rounds", "1", "--directory", str(tmp_path)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("Ctrl-C"):
                break
        curls = [line for line in lines if line.startswith("curl")]
        assert len(curls) == 4
        ready, metadata, answer, metrics = (
            subprocess.run(
                curl, shell=True, capture_output=True, text=True, timeout=PATIENCE_S, check=True
            ).stdout
            for curl in curls
        )
        assert json.loads(ready)["ready"] and json.loads(metadata)["name"] == "digits"
        assert [output["name"] for output in json.loads(answer)["outputs"]][:1] == ["predictions"]
        assert "flserving_requests_total" in metrics
        assert any(line.startswith("promoted version 1") for line in lines)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0 and (tmp_path / "registry").is_dir()
    finally:
        process.kill()
        process.communicate()
