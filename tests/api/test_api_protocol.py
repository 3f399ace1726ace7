"""JSON and binary tensors <-> numpy: nothing is lost on the way, in either form."""

import gc

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from flserving.api.rest.codec import DTYPES, from_raw, read_infer, write_infer
from flserving.errors import InvalidInputError

ASKED = read_infer(
    b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}], "id": "7"}'
)
SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)


def some(name, data):
    """An array of a datatype with finite numbers, of any shape."""
    finite = {"allow_nan": False, "allow_infinity": False} if name.startswith("FP") else {}
    elements = arrays.from_dtype(DTYPES[name], **finite)
    return data.draw(arrays.arrays(DTYPES[name], SHAPES, elements=elements))


@pytest.mark.parametrize("name", DTYPES)
@given(st.data())
def test_bytes_come_back_as_the_array_that_they_were(name, data):
    array = some(name, data)
    read = from_raw("x", name, list(array.shape), array.tobytes())
    assert (
        read.dtype == array.dtype
        and read.shape == array.shape
        and read.tobytes() == array.tobytes()
    )


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "FP16"])
@pytest.mark.parametrize("nested", [True, False])
@given(st.data())
def test_numbers_in_json_come_back_as_they_were(name, nested, data):
    array = some(name, data)
    values = array.tolist() if nested else array.ravel().tolist()
    one = {"name": "x", "shape": list(array.shape), "datatype": name, "data": values}
    read = read_infer(orjson.dumps({"inputs": [one]})).inputs["x"]
    assert read.dtype == array.dtype and read.shape == array.shape
    np.testing.assert_array_equal(read, array)


@given(
    arrays.arrays(
        np.float32,
        SHAPES,
        elements=arrays.from_dtype(np.dtype("f4"), allow_nan=False, allow_infinity=False),
    )
)
def test_an_answer_in_json_holds_every_float32_exactly(array):
    for view in (array, array[::2]):  # also one that is not contiguous
        body, json_bytes = write_infer("m", "1", {"y": view}, {}, ASKED)
        message = orjson.loads(body)
        assert json_bytes is None and message["id"] == "7"
        (one,) = message["outputs"]
        np.testing.assert_array_equal(np.array(one["data"], np.float32).reshape(one["shape"]), view)


@pytest.mark.parametrize("name", [*DTYPES, "BF16"])
def test_a_byte_too_few_or_too_many_is_refused(name):
    size = 3 * (2 if name == "BF16" else DTYPES[name].itemsize)
    from_raw("x", name, [3], bytes(size))
    for wrong in (size - 1, size + 1):
        with pytest.raises(InvalidInputError, match=f"takes {size}"):
            from_raw("x", name, [3], bytes(wrong))


def test_many_lists_do_not_wake_the_garbage_collector_and_it_is_on_again():
    collections, count = [], lambda phase, _: collections.append(phase)
    one = {"name": "x", "shape": [100_000, 1], "datatype": "FP32", "data": [[1.0]] * 100_000}
    gc.callbacks.append(count)
    try:
        read_infer(orjson.dumps({"inputs": [one]}), most_numbers=1 << 22)
        with pytest.raises(InvalidInputError):
            read_infer(b"[" + b"[]," * 100_000, most_numbers=1 << 22)
    finally:
        gc.callbacks.remove(count)
    assert len(collections) < 20 and gc.isenabled()  # 100,000 lists would wake it 140 times


def test_binary_tensors_are_views_of_the_body():
    head = b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","parameters":{"binary_data_size":8}}]}'
    body = head + np.array([1, 2], "<f4").tobytes()
    read = read_infer(body, len(head)).inputs["x"]
    assert np.shares_memory(read, np.frombuffer(body, np.uint8)) and read.tolist() == [1.0, 2.0]
