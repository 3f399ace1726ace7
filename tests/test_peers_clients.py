"""Other people's clients, unchanged. They pin versions that ours does not, so each lives in an environment of its own:

python -m venv A && A/bin/pip install kserve; python -m venv B && B/bin/pip install mlserver "uvloop<0.22"
FLSERVING_PEERS=A/bin/python:B/bin/python python run.py test -m peers
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import flserving
from flserving import ModelServer, Registry, models

pytestmark = pytest.mark.peers
PYTHONS = [Path(path) for path in os.environ.get("FLSERVING_PEERS", "").split(os.pathsep) if path]
X = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)

KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

url, grpc_url, token = sys.argv[1:]
x = np.array(json.load(sys.stdin), np.float32)


def request(binary):
    tensor = InferInput("features", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    return InferRequest("digits", [tensor], request_id="7")


def headers():  # a new one each time: the client keeps its own headers in it
    return {"Authorization": f"Bearer {token}"}


async def main():
    rest = InferenceRESTClient(RESTConfig(protocol="v2", retries=1))
    assert await rest.is_server_live(url) and await rest.is_server_ready(url)
    assert await rest.is_model_ready(url, "digits", headers=headers())
    rows = [await rest.infer(url, request(b), headers=headers(), model_name="digits") for b in (False, True)]
    try:
        await rest.infer(url, InferRequest("digits", []), headers=headers(), model_name="digits")
    except Exception as error:
        refused = str(error)
    await rest.close()
    rpc = InferenceGRPCClient(grpc_url)
    metadata = (("authorization", f"Bearer {token}"),)
    assert await rpc.is_server_ready() and await rpc.is_model_ready("digits", headers=metadata)
    rows.append(await rpc.infer(request(True), headers=metadata))
    seen = [{output.name: output.as_numpy().tolist() for output in answer.outputs} for answer in rows]
    print(json.dumps({"answers": seen, "refused": refused}))


asyncio.run(main())
"""


def python_with(module: str) -> Path:
    for python in PYTHONS:
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0:
            return python
    pytest.skip(f"FLSERVING_PEERS names no Python with {module}")


@pytest.fixture
def endpoint(tmp_path):
    torch.manual_seed(0)
    with Registry(tmp_path) as registry:
        registry.publish("digits", models.build("digits_mlp"), architecture="digits_mlp", alias="default")
        with ModelServer(registry=registry) as server, flserving.serve(server, grpc_port=0) as endpoint:
            endpoint.expected = server.predict(X)
            yield endpoint


def test_kserves_clients(endpoint):
    command = [python_with("kserve"), "-c", KSERVE, endpoint.url, endpoint.grpc_url, endpoint.token]
    result = subprocess.run(command, input=json.dumps(X.tolist()), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert len(said["answers"]) == 3 and "inputs" in said["refused"]
    for answer in said["answers"]:
        assert answer["predictions"] == endpoint.expected["predictions"]
        assert np.allclose(answer["probabilities"], endpoint.expected["probabilities"], atol=1e-6)


@pytest.mark.parametrize("binary", [False, True])
def test_mlservers_batch_client(endpoint, tmp_path, binary):
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    tensors = [{"name": "features", "shape": [1, 64], "datatype": "FP32", "data": row.tolist()} for row in X]
    asked.write_text("\n".join(json.dumps({"inputs": [tensor]}) for tensor in tensors))
    command = [python_with("mlserver").parent / "mlserver", "infer", "-u", endpoint.url.removeprefix("http://")]
    command += ["-m", "digits", "-i", asked, "-o", answered, "-s", "2", "-H", f"Authorization: Bearer {endpoint.token}"]
    result = subprocess.run([*command, *(["-b"] if binary else [])], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    predictions = {}
    for line in answered.read_text().splitlines():
        answer = json.loads(line)
        outputs = {output["name"]: output["data"] for output in answer["outputs"]}
        predictions[answer["parameters"]["batch_index"]] = outputs["predictions"][0]
    assert [predictions[index] for index in range(len(X))] == endpoint.expected["predictions"]
