"""With the real Ray, in an environment of its own:

python -m venv .ray && .ray/bin/python -m pip install -e ".[ray,test]"
.ray/bin/python -m pytest -m ray tests/integrations/test_ray.py
"""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from flserving import ModelServer, Registry, federated
from flserving.api.auth import Tokens
from flserving.api.client import Client
from flserving.api.options import ApiOptions
from flserving.api.processes import Plan
from flserving.errors import ConfigError, ConflictError, NotFoundError
from flserving.federated.rounds import publish_rounds

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
CLIENTS = [f"client-{number:02d}" for number in range(12)]
BY = {"who": "test", "why": "to see it followed"}


@pytest.fixture(scope="module")
def run():
    """A registry with heads of 12 clients, in three versions."""
    return federated.train(
        strategy="fedper", rounds=3, num_clients=12, permute_labels=True, progress=False
    )


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    with Registry(folder) as registry:
        for result in run.rounds:
            publish_rounds(registry, "m")(result)
        registry.set_alias("m", "default", 1, **BY)
    return folder


@pytest.fixture(scope="module")
def url(folder):
    if importlib.util.find_spec("ray") is None:
        pytest.skip(f"this Python has no ray: {__doc__}")
    from flserving.integrations import ray

    tokens = Tokens()
    for client in CLIENTS:
        tokens.add(f"token-of-{client}", client=client)
    tokens.add("token-of-nobody")
    plan = Plan(registry=str(folder), options=ApiOptions(tokens=tokens))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ray.running(plan, ray.Scale(min_replicas=2)) as url:
            yield url


def infer(url, client, rows, **parameters):
    """The answer of the protocol, as it came."""
    tensor = {
        "name": "features",
        "datatype": "FP32",
        "shape": list(rows.shape),
        "data": rows.ravel().tolist(),
    }
    headers = {"Authorization": f"Bearer token-of-{client}"}
    body = {"inputs": [tensor], "parameters": parameters}
    return httpx.post(f"{url}/v2/models/m/infer", json=body, headers=headers, timeout=60)


def test_who_sends_no_credential_or_an_unknown_one_is_refused(url):
    assert httpx.get(f"{url}/v2/models").status_code == 401
    assert infer(url, "a-stranger", np.zeros((1, 64))).status_code == 401
    nobody = infer(url, "nobody", np.zeros((1, 64)), personal=True)
    assert nobody.status_code == 403 and "credential of a client" in nobody.json()["error"]


def test_every_client_is_answered_by_its_own_head_as_in_process(url, run, folder):
    with Registry(folder) as registry, ModelServer(registry=registry, model="m") as server:
        for client in run.clients:
            rows = client.test_x[:3]
            answer = infer(url, client.id, rows, personal=True).json()
            data = {output["name"]: output["data"] for output in answer["outputs"]}
            expected = server.predict(rows, client=client.id)
            assert answer["parameters"]["head"] == expected["head"] == "own"
            assert data["predictions"] == expected["predictions"]
            assert np.allclose(
                data["probabilities"], np.ravel(expected["probabilities"]), atol=1e-6
            )


def test_a_client_stays_at_one_replica_and_both_replicas_have_clients(url, run):
    """By hashes of the credentials: twelve clients at one of two replicas by chance are one run in
    2,048."""
    places = {
        client.id: {
            infer(url, client.id, client.test_x[:1]).headers["x-served-by"] for _ in range(6)
        }
        for client in run.clients
    }
    assert all(len(place) == 1 for place in places.values())
    assert len(set.union(*places.values())) == 2


def test_who_sends_no_credential_is_dealt_out(url):
    served = Counter(httpx.get(f"{url}/v2/health/live").headers["x-served-by"] for _ in range(40))
    assert len(served) == 2


def test_metrics_are_those_of_all_replicas(url):
    text = httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer token-of-nobody"}).text
    assert "flserving_processes 2.0" in text


def test_a_promotion_under_load_fails_no_request_and_reaches_every_replica(url, run, folder):
    stop = threading.Event()

    def ask(client):
        seen = []
        while not stop.is_set():
            answer = infer(url, client.id, client.test_x[:1], personal=True)
            seen.append((answer.status_code, answer.json().get("model_version")))
        return seen

    with ThreadPoolExecutor(len(run.clients)) as pool, Registry(folder) as registry:
        asking = [pool.submit(ask, client) for client in run.clients]
        for version in (2, 3, 1, 2):
            registry.set_alias("m", "default", version, **BY)
            stop.wait(2)
        stop.set()
        seen = [one for task in asking for one in task.result()]
    assert {status for status, _ in seen} == {200}
    assert {version for _, version in seen} == {"1", "2", "3"}
    latest = {
        infer(url, client.id, client.test_x[:1]).json()["model_version"] for client in run.clients
    }
    assert latest == {"2"}


def test_what_is_wrong_is_said_before_ray_starts(url, folder, tmp_path):
    from flserving.integrations import ray

    port = int(url.rpartition(":")[2])
    for wrong, kind, words in (
        (Plan(registry=str(tmp_path)), ConfigError, "no registry in"),
        (Plan(registry=str(folder), model="n"), NotFoundError, "n"),
        (
            Plan(registry=str(folder), options=ApiOptions(admin=True)),
            ConfigError,
            "one of them only",
        ),
        (Plan(registry=str(folder), options=ApiOptions(port=port)), ConflictError, "is in use"),
    ):
        with pytest.raises(kind, match=words), ray.running(wrong, ray.Scale()):
            pass


@pytest.fixture
def short():
    """A folder whose name leaves room for the names of Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_the_command_starts_answers_and_ends_at_sigterm(folder, short):
    if importlib.util.find_spec("ray") is None:
        pytest.skip(f"this Python has no ray: {__doc__}")
    command = [
        sys.executable,
        "-m",
        "flserving.integrations.ray",
        "--registry",
        str(folder),
        "--port",
        "0",
    ]
    environment = os.environ | {"TMPDIR": str(short)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        shown = dict(line.split(None, 1) for line in (process.stdout.readline() for _ in range(2)))
        rows = np.zeros((1, 64)).tolist()
        with Client(shown["REST"].strip(), shown["token"].strip()) as client:
            assert len(client.predict(rows, model="m")["predictions"]) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert list(short.iterdir()) == []
