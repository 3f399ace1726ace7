"""``flserving serve`` in a process of its own, and callers that keep it busy."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch

import flserving
from flserving import Registry, models
from flserving.api.client import Client
from serving_models import PATIENCE_S, wait_until

X = np.random.default_rng(0).standard_normal((1, 64), dtype=np.float32)


def two_versions(root):
    """A registry with two versions of "digits" whose answers differ; the first one is the
    default."""
    with Registry(root) as registry:
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = models.build("digits_mlp").state_dict()
            registry.publish(
                "digits", state, architecture="digits_mlp", alias="default" if seed == 1 else None
            )
    return root


class Running:
    """A command that serves; ``url``, ``grpc_url`` and ``token`` as it printed them."""

    def __init__(self, root, *options, program=None, prefix=None, **environment):
        start = ["-m", "flserving"] if program is None else [str(Path(__file__).parent / program)]
        command = [
            *(prefix or [sys.executable, *start]),
            "serve",
            "--registry",
            str(root),
            "--port",
            "0",
        ]
        self.process = subprocess.Popen(
            [*command, "--grpc-port", "0", *map(str, options)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(flserving.__file__).parents[1]), **environment},
        )  # fmt: skip
        lines = [self.process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith("REST"), (lines, self.process.communicate())
        self.url, self.grpc_url, self.token = (line.split()[1] for line in lines)

    def client(self, place, **options):
        """Every second one over gRPC."""
        return Client((self.url, f"grpc://{self.grpc_url}")[place % 2], self.token, **options)

    def workers(self):
        alive = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    alive.append(child)
        return alive

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        _, self.stderr = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode


@contextlib.contextmanager
def running(root, *options, program=None, **environment):
    """``program``: a script of this folder, in place of flserving's own command line."""
    served = Running(root, *options, program=program, **environment)
    workers = served.workers()
    try:
        yield served
    finally:
        served.process.kill()
        served.process.wait(PATIENCE_S)
        served.process.stdout.close()
        served.process.stderr.close()
        for worker in workers:  # none outlives its supervisor
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.wait(PATIENCE_S)


class Load:
    """Threads that ask until told to stop, each with one client; what they got is in ``answers``
    and ``errors``. ``calls``: after so many each ends by itself."""

    def __init__(self, make_client, threads=4, calls=None):
        self.answers, self.errors, self._stop = [], [], threading.Event()
        self.latest = [None] * threads  # the version that answered each thread last
        self._calls = calls
        self._threads = [
            threading.Thread(target=self._ask, args=(n, make_client(n))) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, number, client):
        with client:
            for _ in itertools.count() if self._calls is None else range(self._calls):
                if self._stop.is_set():
                    break
                try:
                    self.latest[number] = client.predict(X)["model_version"]
                    self.answers.append((time.monotonic(), self.latest[number]))
                except Exception as error:
                    self.errors.append(error)
                    self._stop.wait(0.01)

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # also where the test has failed: its threads would take the others' processor and memory
        self.stop()


def listens(worker):
    """Whether a worker listens on REST and gRPC."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return sum(c.status == psutil.CONN_LISTEN for c in worker.net_connections("inet")) >= 2
    return False


def kill_one(served):
    """Kill the first of two workers and wait for the process in its place; the other one and the
    new one."""
    victim, other = served.workers()
    victim.kill()
    wait_until(lambda: len(set(served.workers()) - {victim, other}) == 1)
    return other, (set(served.workers()) - {victim, other}).pop()
