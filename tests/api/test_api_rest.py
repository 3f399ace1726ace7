"""The REST door with real clients: every form of a request and of an answer."""

import asyncio
import gzip
import zlib
from itertools import product

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio

from flserving.monitoring.telemetry import STAGES
from rest_door import (
    CLASSES,
    WIDTH,
    bearer,
    binary,
    door,
    outputs_of,
    rows,
    tensor,
    text,
    two_versions,
)

INFER = "/v2/models/local/infer"


@pytest.fixture(scope="module")
def server():
    with two_versions() as server:
        yield server


@pytest.fixture(scope="module")
def endpoint(server):
    with door(server) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def http(endpoint):
    with httpx.Client(base_url=endpoint.url, headers=bearer("infer")) as client:
        yield client


def same(outputs, expected):
    """Bit for bit: a float32 survives JSON in its shortest decimal form."""
    for name in ("predictions", "confidences", "probabilities"):
        np.testing.assert_array_equal(outputs[name], np.array(expected[name], outputs[name].dtype))


# Forms of a request and of an answer


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("form", ["flat", "nested", "binary", "raw", "float64", "int"])
def test_every_form_of_a_request_gets_the_answer_of_the_server_itself(server, http, form, n):
    x = rows(n, seed=n)
    if form == "raw":
        x = x[:1]
        response = http.post(
            INFER, content=x.tobytes(), headers={"Inference-Header-Content-Length": "0"}
        )
        assert b'"data"' not in response.content
    elif form == "binary":
        response = http.post(INFER, **binary(x))
    elif form == "float64":
        response = http.post(INFER, **binary(x.astype(np.float64), "FP64"))
    elif form == "int":
        x = np.round(x * 10)
        data = x.astype(int).tolist()
        response = http.post(
            INFER, json={"inputs": [{**tensor(x), "datatype": "INT16", "data": data}]}
        )
    else:
        data = x.tolist() if form == "nested" else x.ravel().tolist()
        response = http.post(INFER, json={"inputs": [{**tensor(x), "data": data}], "id": "a-7"})
        assert (
            response.json()["id"] == "a-7"
            and response.headers["content-type"] == "application/json"
        )
    message, outputs = outputs_of(response)
    assert response.status_code == 200, message
    assert (message["model_name"], message["model_version"]) == ("local", "v1")
    assert (
        message["parameters"]["model_type"] == "global" and message["parameters"]["latency_us"] > 0
    )
    same(outputs, server.predict(x))
    assert outputs["probabilities"].shape == (len(x), CLASSES)


@pytest.mark.parametrize(("datatype", "dtype"), [("FP16", "<f2"), ("BF16", None), ("BOOL", "?"), ("UINT8", "u1"),
                                                 ("INT8", "i1"), ("UINT64", "<u8"), ("INT64", "<i8")])  # fmt: skip
def test_every_datatype_arrives_as_its_number(server, http, datatype, dtype):
    x = np.array([[0, 1, 1, 0, 1, 0]], np.float32)
    raw = (
        (x.view("<u4") >> 16).astype("<u2").tobytes()
        if dtype is None
        else x.astype(dtype).tobytes()
    )
    same(outputs_of(http.post(INFER, **binary(x, datatype, raw)))[1], server.predict(x))


def test_each_output_goes_back_in_the_form_that_it_was_asked_for(server, http):
    wanted = [
        {"name": "probabilities", "parameters": {"binary_data": True}},
        {"name": "predictions"},
    ]
    response = http.post(INFER, content=text(rows(3), outputs=wanted))
    message, outputs = outputs_of(response)
    assert response.headers["content-type"] == "application/octet-stream"
    assert [("data" in one, one["name"]) for one in message["outputs"]] == [
        (False, "probabilities"),
        (True, "predictions"),
    ]
    np.testing.assert_array_equal(
        outputs["probabilities"], np.array(server.predict(rows(3))["probabilities"], "f4")
    )
    parameters = {"binary_data_output": True}
    wanted = [
        {"name": "predictions", "parameters": {"binary_data": False}},
        {"name": "confidences"},
    ]
    message, _ = outputs_of(
        http.post(INFER, content=text(rows(3), outputs=wanted, parameters=parameters))
    )
    assert [("data" in one, one["name"]) for one in message["outputs"]] == [
        (True, "predictions"),
        (False, "confidences"),
    ]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_bodies_are_read_and_written_compressed(server, http, coding):
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[coding]
    request = binary(rows(200), parameters={"binary_data_output": True})
    headers = request["headers"] | {"Content-Encoding": coding, "Accept-Encoding": coding}
    response = http.post(INFER, content=pack(request["content"]), headers=headers)
    assert response.headers["content-encoding"] == coding
    assert int(response.headers["content-length"]) < len(response.content)  # httpx inflated it
    same(outputs_of(response)[1], server.predict(rows(200)))
    small = http.post(INFER, content=text(), headers={"Accept-Encoding": coding})
    assert "content-encoding" not in small.headers and small.status_code == 200
    refused = http.post(
        INFER, content=text(rows(200)), headers={"Accept-Encoding": f"{coding};q=0, identity"}
    )
    assert "content-encoding" not in refused.headers and refused.status_code == 200


@pytest.mark.parametrize("kind", [None, "application/json", "application/json; charset=utf-8", "Application/JSON",
                                  "application/octet-stream", "application/x-www-form-urlencoded"])  # fmt: skip
def test_json_is_read_however_an_honest_client_labels_it(http, kind):
    response = http.post(
        INFER, content=text(), headers={} if kind is None else {"Content-Type": kind}
    )
    assert response.status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-python-pickle",
                                  "application/vnd.bentoml+pickle", "application/xml", "jso\u00e9n"])  # fmt: skip
def test_another_content_type_chooses_no_decoder(http, kind):
    response = http.post(INFER, content=text(), headers={"Content-Type": kind.encode("latin-1")})
    assert response.status_code == 415 and "application/json" in response.json()["error"]


def test_a_version_an_alias_and_the_stages_are_asked_by_path_and_parameter(server, http):
    second = server.predict(rows(), "v2")
    message, outputs = outputs_of(http.post("/v2/models/local/versions/v2/infer", content=text()))
    assert message["model_version"] == "v2"
    same(outputs, second)
    response = http.post(INFER, content=text(parameters={"alias": "default", "stages": True}))
    message, spans = response.json(), response.headers["server-timing"].split(", ")
    assert [span.split(";dur=")[0] for span in spans] == ["parse", *STAGES, "serialise"]
    assert all(float(span.split(";dur=")[1]) >= 0 for span in spans)
    assert message["model_version"] == "v1" and message["parameters"]["stage_infer_us"] >= 0


def test_client_identity_comes_from_the_credential(http):
    body = text(parameters={"personal": True})
    assert http.post(INFER, content=body).status_code == 403
    assert http.post(INFER, content=body, headers=bearer("client")).status_code == 200


# Real clients


def test_tritonclient_http_finds_everything_that_it_knows(endpoint, server):
    headers = bearer("admin")
    client = triton.InferenceServerClient(endpoint.url.removeprefix("http://"))
    assert client.is_server_live(headers) and client.is_server_ready(headers)
    assert client.is_model_ready("local", headers=headers) and not client.is_model_ready(
        "none", headers=headers
    )
    assert "binary_tensor_data" in client.get_server_metadata(headers)["extensions"]
    metadata = client.get_model_metadata("local", headers=headers)
    assert metadata["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, WIDTH]}]
    assert client.get_model_config("local", headers=headers)["max_batch_size"] > 0
    assert {(row["name"], row["state"]) for row in client.get_model_repository_index(headers)} == {
        ("local", "READY")
    }
    x = rows(5)
    for as_bytes, compress in product([True, False], [None, "gzip", "deflate"]):
        one = triton.InferInput("features", x.shape, "FP32")
        one.set_data_from_numpy(x, binary_data=as_bytes)
        names = ("predictions", "confidences", "probabilities")
        for wanted in (
            None,
            [triton.InferRequestedOutput(name, binary_data=as_bytes) for name in names],
        ):
            coding = {
                "request_compression_algorithm": compress,
                "response_compression_algorithm": compress,
            }
            result = client.infer(
                "local", [one], outputs=wanted, headers=dict(headers), request_id="7", **coding
            )
            same({name: result.as_numpy(name) for name in names}, server.predict(x))
    statistics = client.get_inference_statistics("local", headers=headers)["model_stats"]
    assert {"success", "fail", "queue", "cache_hit", "cache_miss"} <= statistics[0][
        "inference_stats"
    ].keys()
    with pytest.raises(triton.InferenceServerException, match="none"):
        client.infer("none", [one], headers=headers)
    client.unload_model("local", headers)
    try:
        with pytest.raises(triton.InferenceServerException):
            client.infer("local", [one], headers=headers)
    finally:
        client.load_model("local", headers)
    assert client.infer("local", [one], headers=headers).as_numpy("predictions").shape == (5,)
    client.close()
    # its __del__ closes again, in whichever thread collects it: gevent refuses that
    client.close = lambda: None


async def test_tritonclient_http_aio_infers(endpoint, server):
    x = rows(4)
    async with triton_aio.InferenceServerClient(endpoint.url.removeprefix("http://")) as client:
        one = triton.InferInput("features", x.shape, "FP32").set_data_from_numpy(x)
        results = await asyncio.gather(
            *(client.infer("local", [one], headers=bearer("infer")) for _ in range(20))
        )
        assert await client.is_server_ready()
    for result in results:
        np.testing.assert_allclose(
            result.as_numpy("probabilities"), server.predict(x)["probabilities"], atol=1e-6
        )
