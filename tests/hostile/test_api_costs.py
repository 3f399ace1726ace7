"""What one request may cost all others: bodies that say much in few bytes are counted, and refused
before they are read."""

import gzip
import time

import httpx
import numpy as np
import orjson
import pytest

from flserving.api.grpc import codec
from flserving.api.rest import codec as rest_codec
from flserving.api.rest.codec import MOST_NUMBERS, read_infer, write_infer
from flserving.errors import FlservingError, TooLargeError
from grpc_door import Caller, open_door
from rest_door import INFER, bearer, binary, door, rows, text, two_versions

SIZE = 4 << 20  # bytes of each bomb, as JSON
HEAD = b'{"inputs":[{"name":"features","shape":[1,4],"datatype":"FP32","data":['


def filled(unit, size=SIZE):
    """A request whose data repeat ``unit``."""
    return HEAD + unit * (size // len(unit)) + b"0]}]}"


def names(count):
    return b",".join(b'"%x":1' % i for i in range(count))


BOMBS = {
    "lists": filled(b"[],"),
    "objects": filled(b"{},"),
    "lists in lists": filled(b"[" * 100 + b"]" * 100 + b","),
    "integers": filled(b"1,"),
    "numbers": filled(b"1.5,"),
    "texts": filled(b'"",'),
    "names of parameters": b'{"inputs":[],"parameters":{' + names(SIZE // 10) + b"}}",
    "names": b"{" + names(SIZE // 10) + b"}",
    "escapes": filled(b'"\\u00e9",'),
}
LARGEST = {  # just let in
    "lists": HEAD + b"[]," * (MOST_NUMBERS // 18) + b"0]}]}",
    "lists in lists": filled((b"[" * 100 + b"]" * 100 + b","), 200 * (MOST_NUMBERS // 1700)),
    "integers": b'{"inputs":[{"name":"features","shape":[%d],"datatype":"FP32","data":[' % (MOST_NUMBERS * 9 // 10)
    + b"1," * (MOST_NUMBERS * 9 // 10 - 1) + b"1]}]}",
    "names": b"{" + names(MOST_NUMBERS // 8) + b"}",
    "one text": HEAD + b'"' + b"\\u00e9" * (3 * MOST_NUMBERS) + b'"]}]}',
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_the_parser_sees_it(name, monkeypatch):
    body = BOMBS[name]
    monkeypatch.setattr(rest_codec.orjson, "loads", None, raising=False)
    with pytest.raises(TooLargeError, match=rf"{MOST_NUMBERS} are let in: .*max_numbers"):
        read_infer(body)
    head = orjson.dumps({"inputs": []})
    with pytest.raises(TooLargeError):
        read_infer(body + head, len(body))


@pytest.mark.parametrize("nested", [True, False])
def test_as_many_rows_as_a_server_takes_are_read(nested):
    """8,000 rows of 32 features, as lists of a row or flat, as other clients write them; and a row
    of many."""
    for shape in ([8000, 32], [1, 300_000], [100, 3, 32, 32]):
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        data = x.tolist() if nested else x.ravel().tolist()
        body = orjson.dumps(
            {"inputs": [{"name": "x", "shape": shape, "datatype": "FP32", "data": data}]}
        )
        np.testing.assert_array_equal(read_infer(body).inputs["x"], x)


def test_binary_tensors_have_no_such_limit():
    x = np.zeros((1024, 1024), np.float32)
    request = binary(x)
    length = int(request["headers"]["Inference-Header-Content-Length"])
    assert read_infer(request["content"], length).inputs["features"].shape == x.shape
    message = codec.InferRequest(model_name="m")
    message.inputs.add(name="features", datatype="FP32", shape=x.shape)
    message.raw_input_contents.append(x.tobytes())
    codec.check_cost(message.SerializeToString(), MOST_NUMBERS)


def test_an_answer_of_more_numbers_than_are_read_goes_as_bytes():
    outputs = {"probabilities": np.zeros((1000, 1000), np.float32)}
    asked = read_infer(text())
    with pytest.raises(
        TooLargeError, match=r"the answer has 1000000 numbers, .* binary_data_output"
    ):
        write_infer("m", "1", outputs, {}, asked)
    assert (
        len(write_infer("m", "1", outputs, {}, asked._replace(binary_default=True))[0]) > 4_000_000
    )


@pytest.fixture(scope="module")
def server():
    with two_versions() as server:
        yield server


def test_over_rest_a_bomb_of_16_kib_gets_a_413_and_the_next_request_an_answer(server):
    with (
        door(server) as endpoint,
        httpx.Client(base_url=endpoint.url, headers=bearer("infer")) as http,
    ):
        for name in ("lists", "objects", "lists in lists", "integers"):
            body = gzip.compress(BOMBS[name])
            assert len(body) < 32 << 10
            response = http.post(INFER, content=body, headers={"Content-Encoding": "gzip"})
            assert response.status_code == 413 and "max_numbers" in response.json()["error"]
        assert http.post(INFER, content=text()).status_code == 200
    with door(server, max_numbers=2000) as endpoint, httpx.Client(base_url=endpoint.url) as http:
        many = text(rows(3000))
        assert http.post(INFER, content=many, headers=bearer("infer")).status_code == 413
        request = binary(rows(3000), parameters={"binary_data_output": True})
        headers = request["headers"] | bearer("infer")
        assert http.post(INFER, content=request["content"], headers=headers).status_code == 200


def packed(field, content):
    """A field of a message: tag, length, value."""
    length, size = bytearray(), len(content)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([field << 3 | 2, *length, size]) + content


MESSAGES = {
    "parameters": b"".join(packed(4, packed(1, b"%x" % i)) for i in range(100_000)),
    "inputs": packed(5, b"") * 500_000,
    "outputs": packed(6, b"") * 500_000,
    "raw contents": packed(7, b"") * 500_000,
    "parameters of an input": packed(
        5, b"".join(packed(4, packed(1, b"%x" % i)) for i in range(100_000))
    ),
    "dimensions": packed(5, packed(3, b"\1" * 1_000_000)),
    "integers": packed(5, packed(5, packed(2, b"\1" * 1_000_000))),
    "floats": packed(5, packed(5, packed(6, bytes(4_000_000)))),
    "texts": packed(5, packed(5, packed(8, b"") * 500_000)),
    "unknown fields": packed(15, b"") * 500_000,
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_of_many_parts_is_refused_before_it_is_read(name):
    codec.decode(codec.InferRequest, MESSAGES[name])  # it is one
    with pytest.raises(TooLargeError, match="raw_input_contents over gRPC"):
        codec.check_cost(MESSAGES[name], MOST_NUMBERS)


@pytest.mark.parametrize(
    "body", [b"\x0b" * 100_000, b"\xff" * 100_000, b"\0" * 70_000 + b"\x2a"], ids=repr
)
def test_what_cannot_be_counted_is_not_read(body):
    with pytest.raises(FlservingError, match=r"are not a ModelInferRequest message|let in"):
        codec.check_cost(body, MOST_NUMBERS)


def test_typed_contents_of_many_rows_are_read():
    message = codec.InferRequest(model_name="m")
    message.inputs.add(name="features", datatype="FP32", shape=[8000, 64])
    message.inputs[0].contents.fp32_contents.extend([0.5] * (8000 * 64))
    codec.check_cost(message.SerializeToString(), MOST_NUMBERS)


def test_over_grpc_a_message_of_many_parts_is_refused_and_the_next_one_answered(server):
    with open_door(server) as (_, target, _, _), Caller(target, "infer") as caller:
        for name in ("inputs", "parameters", "dimensions"):
            code, _ = caller.refused("ModelInfer", MESSAGES[name])
            assert code == "RESOURCE_EXHAUSTED"
        assert caller.infer(rows())["predictions"].shape == (1,)


@pytest.mark.bench
@pytest.mark.parametrize("name", LARGEST)
def test_nothing_that_is_let_in_holds_the_loop_for_longer_than_50_ms(name):
    """Seconds of this thread's processor, so that others are not counted."""
    took_s = []
    for _ in range(3):
        start_s = time.thread_time()
        try:
            read_infer(LARGEST[name])
        except TooLargeError:
            pytest.fail("it should have been let in")
        except FlservingError:
            pass
        took_s.append(time.thread_time() - start_s)
    assert min(took_s) < 0.05
