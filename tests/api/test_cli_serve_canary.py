"""Experiments in ``flserving serve --workers 2``: one arm in every process, one verdict on what all
saw."""

import json
import time

import psutil
import pytest

from experiment_models import LOUD, publish, published
from flserving import Registry
from flserving.api.client import Client
from flserving.api.client.retries import Retries
from flserving.errors import ModelExecutionError
from flserving.registry.experiment import Experiment
from serving_models import PATIENCE_S, wait_until
from serving_processes import running

NAMES = [f"c-{i}" for i in range(12)]
LOG = {"who": "test", "why": "to see"}


@pytest.fixture
def root(tmp_path):
    with published(tmp_path / "registry") as registry:
        publish(registry, 4, fragile=True)
    tokens = tmp_path / "tokens.json"
    tokens.touch(0o600)
    tokens.write_text(json.dumps([{"token": name, "client": name} for name in NAMES]))
    return tmp_path / "registry"


def connections(worker, port):
    return sum(
        c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED
        for c in worker.net_connections("inet")
    )


@pytest.fixture
def clients():
    """A list of clients; they are closed whatever becomes of the test."""
    opened = []
    yield opened
    for one in opened:
        one.close()


def test_workers_agree_on_arms_and_roll_a_failing_canary_back_together(root, clients):
    with (
        running(root, "--workers", 2, "--token-file", root.parent / "tokens.json") as served,
        Registry(root) as registry,
    ):

        def client(place):
            return Client(
                (served.url, f"grpc://{served.grpc_url}")[place % 2],
                NAMES[place],
                retries=Retries(attempts=1),
            )

        clients += [client(place) for place in range(len(NAMES))]
        port = int(served.url.rpartition(":")[2])

        def asked():
            return [one.predict(LOUD) for one in clients]

        ab = registry.start_experiment(
            "m", Experiment.of("ab", {"a": (1, 0.5), "b": (2, 0.5)}), **LOG
        )
        wanted = [ab.arm_of(name) for name in NAMES]
        for _ in range(20):
            wait_until(
                lambda: all("arm" in answer for answer in asked()),
                "the experiment in the workers that answer",
            )
            assert [answer["arm"] for answer in asked()] == wanted and set(wanted) == {"a", "b"}
            if all(connections(worker, port) for worker in served.workers()):
                break
            for one in clients[::2]:
                one.close()
            clients[::2] = [client(place) for place in range(0, len(NAMES), 2)]
        assert all(connections(worker, port) for worker in served.workers()), "both have answered"
        registry.conclude_experiment("m", **LOG)

        canary = registry.start_experiment(
            "m", Experiment.canary("round-4", 1, 4, share=0.5), **LOG
        )
        arms, failed = [canary.arm_of(name) for name in NAMES], 0
        until_s = time.monotonic() + PATIENCE_S
        while registry.experiments("m") and time.monotonic() < until_s:
            for one, arm in zip(clients, arms, strict=True):
                try:
                    one.predict(LOUD)
                except ModelExecutionError:
                    failed += 1
                    assert arm == "canary"
        last = registry.experiment_log("m")[-1]
        assert last["experiment"] is None and last["who"] == "round-4" and failed > 1
        assert "requests failed in the model" in last["why"]

        def all_answer_by_the_old_one():
            try:
                return {answer["model_version"] for answer in asked()} == {"1"}
            except ModelExecutionError:  # a worker that has not looked yet
                return False

        wait_until(all_answer_by_the_old_one, "every worker's next look")
        for _ in range(20):
            assert {answer["model_version"] for answer in asked()} == {"1"}
        for one in clients:
            one.close()
        assert served.end() == 0 and served.stderr == ""
