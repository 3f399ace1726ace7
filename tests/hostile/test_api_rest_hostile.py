"""Clients that are broken, hostile or slow: each gets a reason, none gets a 5xx, and the server
goes on."""

import gzip
import json
import sys
from pathlib import Path

import httpx
import orjson
import psutil
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from budget import examples
from rest_corpus import CORPUS, MOST
from rest_door import WIDTH, bearer, binary, door, rows, tensor, text, two_versions
from serving_models import PATIENCE_S

INFER = "/v2/models/local/infer"


@pytest.fixture(scope="module")
def endpoint():
    with two_versions() as server, door(server, max_body_bytes=MOST) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def http(endpoint):
    with httpx.Client(base_url=endpoint.url, headers=bearer("admin"), timeout=PATIENCE_S) as client:
        yield client


def refused(response):
    """Whether it is the caller who is told to do something else."""
    return (
        400 <= response.status_code < 500
        and response.headers["content-type"] == "application/json"
        and bool(orjson.loads(response.content)["error"])
    )


def test_the_whole_corpus_is_refused_with_a_reason_and_costs_no_memory(http):
    assert len(CORPUS) >= 300
    process = psutil.Process()
    for repeat in range(3):
        accepted = []
        for name, request in CORPUS.items():
            response = http.post(INFER, **request)
            if not refused(response):
                accepted.append((name, response.status_code, response.text[:80]))
        assert not accepted
        if repeat == 0:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 20 << 20
    assert http.get("/v2/health/ready").status_code == 200
    assert http.post(INFER, content=text()).status_code == 200


@pytest.mark.parametrize("name", ["sequence_id", "sequence_start", "priority", "classification"])
def test_what_the_protocol_knows_and_this_server_does_not_offer_is_told_apart(http, name):
    body = {
        "inputs": [tensor(rows())],
        "parameters": {name: True if name == "sequence_start" else 3},
    }
    if name == "classification":  # a parameter of an output
        body = {
            "inputs": [tensor(rows())],
            "outputs": [{"name": "predictions", "parameters": {name: 3}}],
        }
    response = http.post(INFER, json=body)
    assert response.status_code == 501 and name in response.json()["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_bomb_is_refused_without_being_unpacked(http):
    """The peak of memory, not what is left of it: what a bomb would unpack to is 1,000 times the
    limit."""

    def peak_kib():
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        return int(status["VmHWM"].split()[0])

    bomb = gzip.compress(b" " * (1000 * MOST))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again, see proc(5)
    before = peak_kib()
    for _ in range(5):
        response = http.post(INFER, content=bomb, headers={"Content-Encoding": "gzip"})
        assert response.status_code == 413
    assert peak_kib() - before < 20 << 10


QUIET = examples(150, suppress_health_check=list(HealthCheck))


@QUIET
@given(body=st.binary(max_size=200))
def test_no_bytes_cause_a_5xx(http, body):
    assert refused(http.post(INFER, content=body))


@QUIET
@given(length=st.integers(-10, 500), size=st.integers(-10, 100), cut=st.integers(0, 60))
def test_no_lengths_cause_a_5xx(http, length, size, cut):
    request = binary(rows(), raw=(rows().tobytes() * 3)[:cut], size=size)
    right = int(request["headers"]["Inference-Header-Content-Length"])
    response = http.post(
        INFER, **request | {"headers": {"Inference-Header-Content-Length": str(length)}}
    )
    if length == right and size == cut == 4 * WIDTH:
        assert response.status_code == 200
    elif length:  # 0 takes the whole body as numbers: chance decides about their number
        assert refused(response)


FIELDS = st.sampled_from(["name", "shape", "datatype", "data", "parameters"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner),
)


@QUIET
@given(key=FIELDS, value=JUNK)
def test_no_junk_in_a_field_causes_a_5xx(http, key, value):
    response = http.post(
        INFER, content=json.dumps({"inputs": [tensor(rows()) | {key: value}]}).encode()
    )
    assert refused(response) or (key == "parameters" and response.status_code == 200)


@QUIET
@given(path=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40))
def test_no_path_causes_a_5xx(http, path):
    response = http.post(
        "/v2/models/" + path.replace("?", "").replace("#", "") + "/infer", content=text()
    )
    assert refused(response) or path == "local"
