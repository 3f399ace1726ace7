"""``flserving edge`` as a device runs it: a process of its own, without its cloud, killed at any
instant."""

import contextlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

import budget
from edge_cloud import Between, X, cloud, publish
from flserving import Registry
from flserving.api import cli
from flserving.api.cli import _keep_up, _say
from flserving.api.client import Client
from flserving.edge.sync import Pulled
from flserving.errors import FlservingError, ServerClosedError
from flserving.registry import storage
from serving_models import PATIENCE_S, wait_until

SUPPORT = Path(__file__).parents[1] / "support"


class Device:
    """A command that serves; ``url``, ``grpc_url`` and ``token`` as it printed them."""

    def __init__(self, root, url, *options, token="c-1", **environment):
        command = [sys.executable, "-m", "flserving", "edge", "--cloud", url, "--client", "c-1", "--poll-s", "0.2",
                   "--directory", str(root), *map(str, options)]  # fmt: skip
        env = {**os.environ, "FLSERVING_CLOUD_TOKEN": token, **environment}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={name: value for name, value in env.items() if value is not None},
        )  # fmt: skip
        lines = [self.process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith("REST"), self.process.communicate()
        self.url, self.grpc_url, self.token = (line.split()[1] for line in lines)

    def says(self, what, client, rows=X):
        """One entry of an answer; None where there is no answer yet, or not in time on a busy
        machine."""
        try:
            return client.predict(rows)[what]
        except FlservingError:
            return None

    def round(self, client):
        return self.says("round", client) or 0

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        _, self.stderr = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode


@contextlib.contextmanager
def device(root, url, *options, **environment):
    running = Device(root, url, *options, **environment)
    try:
        with Client(running.url, running.token) as client:
            yield running, client
    finally:
        running.process.kill()
        running.process.communicate(timeout=PATIENCE_S)


def test_a_device_serves_follows_and_outlives_its_cloud(tmp_path):
    with cloud(tmp_path / "cloud", 1, with_heads=True) as (released, endpoint):
        with (
            Between(endpoint.url) as between,
            device(tmp_path / "edge", between.url) as (running, client),
        ):
            wait_until(lambda: running.round(client) == 1)
            answer = client.predict(X)
            assert (answer["path"], answer["head"], answer["model_type"]) == (
                "local",
                "own",
                "personal",
            )
            assert answer["degraded"] is False
            publish(released, 2, with_heads=True)
            wait_until(lambda: running.round(client) == 2)
            with Client(f"grpc://{running.grpc_url}", running.token) as other:
                assert other.predict(X)["round"] == 2
            assert httpx.get(f"{running.url}/v2/models/m").status_code == 401, (
                "loopback asks for the token too"
            )
            said = iter(running.process.stderr.readline, "")
            assert any("round 2 serves" in line for line in said), "after it answers"
            between.close()  # the cloud is gone
            assert client.predict(X)["round"] == 2
            assert running.end() == 0
            assert "round 2" not in running.stderr and "Traceback" not in running.stderr
        with device(tmp_path / "edge", "http://127.0.0.1:9", FLSERVING_TOKEN="mine") as (
            running,
            _,
        ):
            assert running.token == "the"
            with Client(running.url, "mine") as client:
                assert client.predict(X)["round"] == 2, "it serves at once, without the cloud"
            assert "no update (no answer from" in running.process.stderr.readline()
            assert running.end(signal.SIGINT) == 0 and running.stderr == "flserving: stopping\n"


def test_a_device_logs_its_calls_in_json(tmp_path):
    options = ("--no-grpc", "--log-format", "json", "--access-log")
    with device(tmp_path / "edge", "http://127.0.0.1:9", *options) as (running, client):
        assert not client.ready()
        assert running.end() == 0
    lines = [json.loads(line) for line in running.stderr.splitlines()]
    assert "stopping" in [line["message"] for line in lines]
    (call,) = (line for line in lines if line["logger"] == "flserving.access")
    assert (call["method"], call["route"], call["status"]) == ("GET", "/v2/health/ready", 503)


def test_a_policy_asks_the_cloud_where_the_device_is_in_doubt(tmp_path):
    with cloud(tmp_path / "cloud", 1, with_heads=True) as (_, endpoint):
        options = ("--model", "m", "--policy", "local_first", "--threshold", 0.999999, "--no-grpc")
        with device(tmp_path / "edge", endpoint.url, *options) as (running, client):
            assert running.grpc_url == "off"
            wait_until(lambda: running.says("path", client) in ("cloud", "cache"))
            wait_until(client.ready, "the device's own model")
            endpoint.close()
            wait_until(lambda: running.says("path", client, X + 1) == "degraded")
            assert running.end() == 0


def test_a_device_over_tls_trusts_its_authority_only_and_reads_its_token_from_a_file(tmp_path):
    secret, key, certificate = (tmp_path / name for name in ("token", "key.pem", "certificate.pem"))
    secret.write_text("c-1\n", encoding="utf-8-sig")  # as Notepad writes it
    secret.chmod(0o600)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert ssl.create_default_context(cafile=certificate)
    with cloud(tmp_path / "cloud", 1, certificate=certificate, key=key) as (_, endpoint):
        options = ("--no-grpc", "--ca", certificate, "--token-file", secret)
        with device(tmp_path / "edge", endpoint.url, *options, token=None) as (running, client):
            wait_until(lambda: running.round(client) == 1)
        with device(tmp_path / "other", endpoint.url, "--no-grpc") as (running, client):
            line = running.process.stderr.readline()
            assert (
                "no update" in line
                and "CERTIFICATE_VERIFY_FAILED" in line
                and running.round(client) == 0
            )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cloud_that_swallows_every_word_does_not_put_off_the_end(tmp_path, number):
    """Whenever the signal comes, the device ends at once, with 0, and says so."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        hole.settimeout(60)
        url = f"http://127.0.0.1:{hole.getsockname()[1]}"
        with (
            device(tmp_path / "edge", url, "--no-grpc", "--timeout-s", 3600) as (running, client),
            hole.accept()[0],
        ):
            # the first look for an update is under way, and will not end
            assert client.ready() is False and running.end(number) == 0
            assert running.stderr == "flserving: stopping\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cloud", "ftp://x"], "write http"),
        (["--cloud", "http://127.0.0.1:9/path"], "write http"),
        (["--poll-s", "0"], "poll-s is 0"),
        (["--timeout-s", "-1"], "timeout-s is -1"),
        (["--key", "abc"], "64 hex digits"),
        (["--ca", "{none}"], "cannot be read"),
        (["--token-file", "{none}"], "cannot be read"),
        (["--token-file", "{open}"], "chmod 600"),
        (["--token-file", "{words}"], "visible ASCII characters without spaces"),
        (["--fresh-s", "9", "--refuse-s", "3"], "flag an answer before"),
        (["--outputs", "none"], "no policy 'none': choose full, label, top-K"),
        (["--policy", "as_drawn"], "name it with --model"),
        (["--directory", "{file}"], "cannot hold a registry"),
    ],
    ids=lambda value: (
        "-".join(value).replace("{", "").replace("}", "") if isinstance(value, list) else ""
    ),
)
def test_what_cannot_run_says_why(tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.delenv("FLSERVING_CLOUD_TOKEN", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    places = {name: tmp_path / name for name in ("none", "open", "words", "file", "edge")}
    places["open"].write_text("secret")
    places["open"].chmod(0o644)
    places["words"].write_text("two words")
    places["words"].chmod(0o600)
    places["file"].write_text("")
    given = [option.format(**places) for option in options]
    base = [
        "edge",
        "--cloud",
        "http://127.0.0.1:9",
        "--client",
        "c",
        "--directory",
        str(places["edge"]),
    ]
    try:
        assert cli.main([*base, *given]) == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    shown = capsys.readouterr()
    assert shown.out == "" and says in shown.err and "secret" not in shown.err


def test_waits_grow_and_are_spread_and_nothing_ends_the_loop():
    """In virtual time: ``stop`` counts what it is asked to wait."""

    class Stop(threading.Event):
        def __init__(self, turns):
            super().__init__()
            self.turns, self.waits = turns, []

        def wait(self, timeout=None):
            self.waits.append(timeout)
            if len(self.waits) == self.turns:
                self.set()

    class Agent:
        def __init__(self):
            self.turn = 0

        def pull(self):
            self.turn += 1
            if self.turn < 6:
                raise (
                    ServerClosedError("no answer") if self.turn != 3 else ZeroDivisionError("a bug")
                )
            return Pulled(self.turn == 6, 7, 7, 7, {})

    said, stop = [], Stop(9)
    random.seed(0)
    _keep_up(Agent(), 10.0, stop, said.append)
    for got, base in zip(stop.waits, [1, 2, 4, 8, 10, 10, 10, 10, 10], strict=True):
        assert 0.9 * base <= got <= 1.1 * base
    assert len(set(stop.waits)) == 9
    assert said == ["no update (no answer)", "no update (ZeroDivisionError)", "no update (no answer)",
                    "round 7 serves (the cloud's version 7, here 7)"]  # fmt: skip


def test_what_the_cloud_says_does_not_command_the_terminal(caplog):
    caplog.set_level("INFO")
    _say("no update (gone\x1b[2J\r\nround 9 serves)")
    assert caplog.messages == ["no update (gone?[2J??round 9 serves)"]


# kill -9


def kills(tmp_path, count, form, sizes):
    """Kill a device in the midst of ``count`` updates; how often it had the new round, and how
    often the one before."""
    seed = budget.seed()
    with cloud(tmp_path / "cloud") as (released, endpoint):
        publish(released, 1, with_heads=True, sizes=sizes)
        endpoint.v2.server.serve(released, "m")
        command = [
            sys.executable,
            str(SUPPORT / "edge_crash.py"),
            str(tmp_path / "edge"),
            endpoint.url,
            form,
            str(seed),
        ]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found = []
        try:
            for number in range(1, count + 1):
                if number > 1:
                    publish(released, number, with_heads=True, sizes=sizes)
                process.stdin.write(f"{number}\n")
                process.stdin.flush()
                line = process.stdout.readline()
                assert line, f"seed {seed}, kill {number}: {process.communicate()[1]}"
                found.append(int(line) == number)
        finally:
            process.kill()
            process.communicate()
        with Registry(tmp_path / "edge") as registry:
            assert registry.version_numbers("m") == list(
                range(1, len(registry.version_numbers("m")) + 1)
            )
            assert len(list((tmp_path / "edge" / "sync").glob("*.part"))) <= 1
            left = tmp_path / "edge" / "staging"
            assert len(os.listdir(left)) <= count
            for folder in left.iterdir():
                os.utime(folder, (0, 0))  # long ago
            with storage.staging(str(left)):
                assert len(os.listdir(left)) == 1, (
                    "the next update clears away what killed ones left"
                )
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("form", ["exact", "int8"])
def test_kill_9_at_random_instants(tmp_path, form):
    found = kills(tmp_path, 10, form, [8, 24, 3])
    assert len(found) == 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("form", ["exact", "int8"])
def test_kill_9_at_a_hundred_random_instants(tmp_path, form):
    found = kills(tmp_path, 100, form, [8, 24, 3])
    assert 10 < sum(found) < 90, (
        f"the kills hit hardly any update, or all of them: {sum(found)} came through"
    )
