"""gRPC messages: descriptors are those of the .proto files, tensors keep every number, wrong ones
are refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import flserving.api.grpc.codec as m
from flserving.api.rest.codec import DTYPES
from flserving.errors import InvalidInputError, NotSupportedError

API = Path(m.__file__).parent
TYPED = [name for name in DTYPES if name != "FP16"]


def test_the_descriptor_set_is_the_one_of_the_proto_files(tmp_path):
    pytest.importorskip("grpc_tools")
    command = ["-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={tmp_path / 'made'}"]
    subprocess.run(
        [sys.executable, *command, *(path.name for path in API.glob("*.proto"))],
        cwd=API,
        check=True,
    )
    hint = f"in flserving/api/grpc: python {' '.join(command[:3])} --descriptor_set_out=descriptors.binpb *.proto"
    made, kept = (m.descriptor_pb2.FileDescriptorSet.FromString(p.read_bytes())
                  for p in (tmp_path / "made", API / "descriptors.binpb"))  # fmt: skip
    assert {f.name: f for f in made.file} == {f.name: f for f in kept.file}, hint


def test_field_numbers_and_types_are_those_of_another_implementation():
    """Every message that tritonclient has too: our fields are a subset of its, under the same
    numbers and types."""
    service = pytest.importorskip("tritonclient.grpc").service_pb2
    config = pytest.importorskip("tritonclient.grpc").model_config_pb2
    theirs = {**service.DESCRIPTOR.message_types_by_name, **config.DESCRIPTOR.message_types_by_name}
    compared = 0

    def compare(ours, other):
        nonlocal compared
        for field in ours.fields:
            if field.full_name.endswith("isLoaded") or field.full_name.endswith("isUnloaded"):
                continue  # KServe's, which Triton's answers lack
            if (ours.name, field.name) in {("RepositoryModelLoadResponse", "model_name"),
                                           ("RepositoryModelUnloadResponse", "model_name")}:  # fmt: skip
                continue
            same = other.fields_by_name[field.name]
            assert (same.number, same.type, same.is_repeated) == (
                field.number,
                field.type,
                field.is_repeated,
            ), field
            compared += 1
        for inner in ours.nested_types:
            compare(inner, other.nested_types_by_name[inner.name])

    ours = m.POOL.FindFileByName("inference.proto")
    for name, descriptor in ours.message_types_by_name.items():
        compare(descriptor, theirs[name])
    enum = config.DESCRIPTOR.enum_types_by_name["DataType"]
    assert {v.name: v.number for v in ours.enum_types_by_name["DataType"].values} == {
        v.name: v.number for v in enum.values
    }
    assert compared > 120


def sent(datatype, shape, raw=None, contents=None, name="features"):
    request = m.InferRequest()
    tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
    if contents is not None:
        field, values = contents
        getattr(tensor.contents, field).extend(values)
    if raw is not None:
        request.raw_input_contents.append(raw)
    return request


@given(st.sampled_from(sorted(DTYPES)), st.data())
def test_raw_tensors_keep_every_bit(datatype, data):
    x = data.draw(
        hnp.arrays(
            DTYPES[datatype], hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
        )
    )
    got = m.inputs(sent(datatype, x.shape, raw=x.tobytes()))["features"]
    assert got.dtype == x.dtype and got.shape == x.shape and got.tobytes() == x.tobytes()


@given(st.sampled_from(TYPED), st.data())
def test_typed_tensors_keep_every_number(datatype, data):
    x = data.draw(
        hnp.arrays(
            DTYPES[datatype], hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
        )
    )
    got = m.inputs(sent(datatype, x.shape, contents=(m._CONTENTS[datatype], x.ravel().tolist())))[
        "features"
    ]
    assert got.dtype == x.dtype and got.shape == x.shape
    np.testing.assert_array_equal(got, x)


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=2), elements=st.floats(width=32)))
def test_bf16_is_the_upper_half_of_a_float32(x):
    raw = (x.view(np.uint32) >> 16).astype("<u2").tobytes()
    got = m.inputs(sent("BF16", x.shape, raw=raw))["features"]
    assert got.view(np.uint32).tolist() == (x.view(np.uint32) & 0xFFFF0000).tolist()


@given(
    hnp.arrays(np.float32, (3, 2), elements=st.floats(width=32)),
    hnp.arrays(np.int64, 3),
    st.text(max_size=20),
)
def test_responses_are_read_back_as_they_were(probabilities, predictions, request_id):
    # a view that is not contiguous
    outputs = {"predictions": predictions, "probabilities": probabilities[::-1]}
    values = {"flag": True, "latency_us": 2**40, "model_type": "global"}
    answer = m.InferResponse.FromString(m.response("m", "v1", request_id, outputs, values))
    assert (answer.model_name, answer.model_version, answer.id) == ("m", "v1", request_id)
    assert m.parameters(answer.parameters) == values
    assert [type(v) for v in m.parameters(answer.parameters).values()].count(bool) == 1
    for tensor, raw, (name, array) in zip(
        answer.outputs, answer.raw_output_contents, outputs.items(), strict=True
    ):
        assert (
            tensor.name == name
            and list(tensor.shape) == list(array.shape)
            and raw == array.tobytes()
        )
        assert not tensor.HasField("contents")


BAD_TENSORS = {
    "unknown type": sent("FP31", [1], raw=b"1234"),
    "type in lower case": sent("fp32", [1], raw=b"1234"),
    "BYTES": sent("BYTES", [1], raw=b"\1\0\0\0a"),
    "no type": sent("", [1], raw=b"1234"),
    "short": sent("FP32", [2], raw=b"1234"),
    "long": sent("FP32", [1], raw=b"12345"),
    "negative": sent("FP32", [-1, 1], raw=b"1234"),
    "two negatives": sent("FP32", [-1, -1], raw=b"1234"),
    "overflow": sent("FP32", [2**62, 4], raw=b""),
    "overflow to the right size": sent("FP32", [2**32, 2**32, 1], raw=b""),
    "zero times huge": sent("FP32", [0, 2**62, 2**62], raw=b""),
    "many dimensions": sent("FP32", [1] * 33, raw=b"1234"),
    "thousands of dimensions": sent("FP32", [2**62] * 5000, raw=b"1234"),
    "no data": sent("FP32", [1]),
    "FP16 typed": sent("FP16", [1], contents=("fp32_contents", [1])),
    "BF16 typed": sent("BF16", [1], contents=("fp32_contents", [1])),
    "BOOL byte": sent("BOOL", [1], raw=b"\2"),
    "raw and contents": sent("FP32", [1], raw=b"1234", contents=("fp32_contents", [1])),
    "wrong field": sent("FP32", [1], contents=("fp64_contents", [1])),
    "too few values": sent("FP32", [2], contents=("fp32_contents", [1])),
    "too many values": sent("FP32", [1], contents=("fp32_contents", [1, 2])),
    "INT8 too high": sent("INT8", [1], contents=("int_contents", [128])),
    "INT8 too low": sent("INT8", [1], contents=("int_contents", [-129])),
    "INT16 too high": sent("INT16", [2], contents=("int_contents", [0, 2**15])),
    "UINT8 too high": sent("UINT8", [1], contents=("uint_contents", [256])),
    "UINT16 too high": sent("UINT16", [1], contents=("uint_contents", [2**16])),
}  # fmt: skip


@pytest.mark.parametrize("request_", BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_a_tensor_that_does_not_fit_is_refused_by_name(request_):
    with pytest.raises(InvalidInputError, match="features"):
        m.inputs(request_)


def test_raw_entries_and_inputs_go_together_one_by_one():
    request = sent("FP32", [1], raw=b"1234")
    request.raw_input_contents.append(b"5678")
    with pytest.raises(InvalidInputError, match="2 entries for 1"):
        m.inputs(request)
    request.inputs.add(name="features", datatype="FP32", shape=[1])
    with pytest.raises(InvalidInputError, match="twice"):
        m.inputs(request)
    request.inputs[1].name = "b"
    assert m.inputs(request)["b"].tobytes() == b"5678"
    request.inputs.add(name="c", datatype="FP32", shape=[0])
    with pytest.raises(InvalidInputError, match="'c' has no data"):
        m.inputs(request)


def test_parameters_outputs_and_bytes_that_mean_nothing_are_refused():
    request = m.InferRequest()
    request.parameters["empty"].Clear()
    with pytest.raises(InvalidInputError, match="'empty' has no value"):
        m.parameters(request.parameters)
    with pytest.raises(InvalidInputError, match="3 bytes are not"):
        m.decode(m.InferRequest, b"\xff\xff\xff")
    assert m.requested(request) is None
    request.outputs.add(name="a")
    assert m.requested(request) == ["a"]
    request.outputs.add(name="a")
    with pytest.raises(InvalidInputError, match="twice"):
        m.requested(request)
    request.outputs[1].name = "b"
    request.outputs[1].parameters["classification"].int64_param = 3
    with pytest.raises(NotSupportedError, match="classification"):
        m.requested(request)
    many = m.InferRequest(outputs=[{"name": str(i)} for i in range(65)])
    with pytest.raises(InvalidInputError, match="65 outputs"):
        m.requested(many)


def test_our_classes_are_not_those_of_another_library_in_the_same_process():
    theirs = pytest.importorskip("tritonclient.grpc").service_pb2.ModelInferRequest
    assert (
        theirs.DESCRIPTOR.full_name == m.InferRequest.DESCRIPTOR.full_name
        and theirs is not m.InferRequest
    )
    ours = m.InferRequest(model_name="m", inputs=[{"name": "x", "shape": [2]}])
    assert theirs.FromString(ours.SerializeToString()).inputs[0].shape == [2]
