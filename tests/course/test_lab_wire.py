"""What a request weighs: bytes that are really those of the wire, and a message taken apart field
by field."""

import json

import numpy as np
import pytest
from google.protobuf import json_format

from flserving.api.grpc.codec import InferRequest, message
from flserving.api.rest.codec import read_infer
from flserving.errors import InvalidInputError
from flserving.lab.network import wire

SHAPES = [(1, 1), (3, 64), (32, 784), (1000, 10)]


def rows_of(shape):
    return np.ascontiguousarray(wire.normal_rows()[: shape[0], : shape[1]])


def small_request():
    request = InferRequest(model_name="digits")
    request.inputs.add(name="features", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(np.array([1, 2.5], "<f4").tobytes())
    return request


@pytest.mark.parametrize("shape", SHAPES)
def test_the_expected_sizes_are_those_of_the_written_bodies(shape):
    assert wire.expected_sizes(*shape) == wire.body_sizes(rows_of(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_is_read_back_as_the_same_rows(shape):
    rows = rows_of(shape)
    for body in (wire.json_body(rows), wire.short_json_body(rows)):
        np.testing.assert_array_equal(read_infer(body).inputs["features"], rows)
    binary = wire.binary_body(rows)
    head = binary[: -rows.nbytes]
    np.testing.assert_array_equal(read_infer(binary, len(head)).inputs["features"], rows)
    assert json.loads(head)["inputs"][0]["parameters"]["binary_data_size"] == rows.nbytes
    request = InferRequest.FromString(wire.grpc_body(rows))
    assert request.raw_input_contents[0] == rows.tobytes() and list(
        request.inputs[0].shape
    ) == list(shape)


def test_the_time_on_the_line_is_bits_over_bandwidth():
    table = wire.transfer(1000, 784, mbit_per_s=10)
    assert table["ms"]["gRPC"] == pytest.approx(table["bytes"]["gRPC"] * 8 / 10e6 * 1000)
    assert list(table.index) == list(wire.FORMS)


def test_the_fields_of_a_message_cover_its_bytes_in_order():
    raw, fields = small_request().SerializeToString(), wire.wire_fields(small_request())
    top = [field for field in fields if field.depth == 0]
    assert [top[0].start, *(field.end for field in top)] == [
        *(field.start for field in top),
        len(raw),
    ]
    assert [(field.path, field.number) for field in fields] == [
        ("model_name", 1), ("inputs", 5), ("inputs.name", 1), ("inputs.datatype", 2), ("inputs.shape", 3),
        ("raw_input_contents", 7),
    ]  # fmt: skip
    text = {field.path: raw[field.content : field.end] for field in fields}
    assert (
        text["model_name"] == b"digits"
        and text["inputs.name"] == b"features"
        and text["inputs.shape"] == b"\1\2"
    )


def test_varints_and_fixed_numbers_have_their_own_wire_types():
    reply = message("inference.ModelInferResponse")()
    json_format.ParseDict(
        {"parameters": {"latency_us": {"int64_param": "300"}, "x": {"double_param": 1.5}}}, reply
    )
    kinds = {
        field.path: (field.wire_type, field.end - field.content)
        for field in wire.wire_fields(reply)
    }
    # 300 takes two groups of seven bits
    assert kinds["parameters.value.int64_param"] == ("VARINT", 2)
    assert kinds["parameters.value.double_param"] == ("I64", 8)


def test_bytes_of_another_message_are_refused():
    with pytest.raises(InvalidInputError, match=r"byte 0 is the key 10: .* has no such field"):
        list(
            wire._fields(b"\x0a\x01a", 0, message("inference.ServerLiveRequest").DESCRIPTOR, "", 0)
        )
