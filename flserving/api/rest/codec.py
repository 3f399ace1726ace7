"""The messages of the Open Inference Protocol V2 over REST: JSON and binary tensors <-> numpy.

orjson reads the text, for its speed with numbers; msgspec checks what was read against the types
below; the numbers themselves go from their list to the array in one step. A number must be JSON:
the bare words NaN and Infinity are refused here. Binary tensors are views of the body; NaN and
infinities in them are refused by the server's validation.
"""

import gc
import math
import struct
from itertools import chain
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import orjson
from msgspec import Meta
from numpy.typing import NDArray

from flserving.api.dataplane import Arrays
from flserving.errors import InvalidInputError, NotSupportedError, TooLargeError

T = TypeVar("T")
_LETTERS = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(f"<{letter}") for name, letter in _LETTERS.items()
}
"""The protocol's names of numbers. BF16 has no numpy type: :func:`from_raw` widens it to float32.
BYTES is refused."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MOST_TENSORS = 16
_MOST_DIMS = 8
_MOST_PARAMETERS = 64
# bytes of JSON that hold too few lists to wake the garbage collector often, or to take long
_SHORT = 16 << 10
MOST_NUMBERS = 1 << 19
"""Numbers in a body that are read while everybody else waits: 25 to 50 ns each. 8,192 rows of 64
features."""
_COSTS = {b",": 1, b"[": 16, b"{": 16, b'"': 3}
"""What one of these takes to read, in numbers (measured: a list in a list in a list 700 ns, a key
320 ns)."""
_NUMBER_NBYTES = 24  # of the longest float64; other long texts are read faster
_Name = Annotated[str, Meta(min_length=1, max_length=256)]
_Shape = Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1, max_length=_MOST_DIMS)]
_Parameters = Annotated[dict[str, bool | int | float | str], Meta(max_length=_MOST_PARAMETERS)]


class InputTensor(msgspec.Struct, frozen=True):
    """One input: ``data`` flat or nested in the form of ``shape``, or ``binary_data_size`` bytes
    after the JSON."""

    name: _Name
    shape: _Shape
    # refused in words where it is none
    datatype: Annotated[str, Meta(extra_json_schema={"enum": [*DTYPES, "BF16"]})]
    data: Annotated[Any, Meta(extra_json_schema={"type": "array", "items": {}})] = None
    parameters: _Parameters | None = None


class RequestedOutput(msgspec.Struct, frozen=True):
    """One output that is wanted, and whether it comes back as bytes (``binary_data``)."""

    name: _Name
    parameters: _Parameters | None = None


class InferRequest(msgspec.Struct, frozen=True):
    inputs: Annotated[list[InputTensor], Meta(min_length=1, max_length=_MOST_TENSORS)]
    id: Annotated[str, Meta(max_length=1024)] | None = None
    outputs: Annotated[list[RequestedOutput], Meta(max_length=_MOST_TENSORS)] | None = None
    parameters: _Parameters | None = None


class ParsedRequest(NamedTuple):
    """A request to infer, read. ``binary`` says of a named output whether it goes back as bytes,
    else the default."""

    inputs: Arrays
    outputs: list[str] | None
    parameters: dict[str, bool | int | float | str]
    id: str | None
    binary: dict[str, bool]
    binary_default: bool


def read_infer(
    body: bytes, json_bytes: int | None = None, most_numbers: int = MOST_NUMBERS
) -> ParsedRequest:
    """The body of a request to infer, of which the first ``json_bytes`` are JSON (None: all; 0: one
    raw FP32 row).

    Raises:
        InvalidInputError, NotSupportedError: It says something that cannot be answered.
        TooLargeError: See :func:`read_json`.
    """
    if json_bytes == 0:
        if not body:
            raise InvalidInputError(
                "the body is empty: a raw request is one row of little-endian FP32"
            )
        features = from_raw("features", "FP32", [1, len(body) // 4], body)
        return ParsedRequest({"features": features}, None, {}, None, {}, True)
    if json_bytes is not None and not 0 < json_bytes <= len(body):
        raise InvalidInputError(
            f"Inference-Header-Content-Length is {json_bytes}, the body has {len(body)} bytes: send the JSON's length"
        )
    text = body if json_bytes is None else memoryview(body)[:json_bytes]
    request = read_json(text, InferRequest, most_numbers)
    at = len(body) if json_bytes is None else json_bytes
    inputs: Arrays = {}
    for tensor in request.inputs:
        size = tensor.parameters.get("binary_data_size") if tensor.parameters else None
        if tensor.name in inputs:
            raise InvalidInputError(f"input {tensor.name!r} is there twice: send each once")
        if size is None:
            inputs[tensor.name] = _from_list(tensor)
            continue
        if tensor.data is not None or type(size) is not int or not 0 <= size <= len(body) - at:
            raise InvalidInputError(
                f"input {tensor.name!r}: binary_data_size is {size!r}, {len(body) - at} bytes are left after the JSON "
                f"and the tensors before it: give its size in bytes, and no data"
            )
        inputs[tensor.name] = from_raw(
            tensor.name, tensor.datatype, tensor.shape, memoryview(body)[at : at + size]
        )
        at += size
    if at != len(body):
        raise InvalidInputError(
            f"{len(body) - at} bytes are left over: name each tensor's binary_data_size"
        )
    parameters = request.parameters or {}
    default = _flag(parameters, "binary_data_output", False)
    if request.outputs is None:
        return ParsedRequest(inputs, None, parameters, request.id, {}, default)
    binary: dict[str, bool] = {}
    for output in request.outputs:
        if output.name in binary:
            raise InvalidInputError(f"output {output.name!r} is there twice: ask for each once")
        if output.parameters and output.parameters.get("classification"):
            raise NotSupportedError(
                "the classification extension is not offered: ask for 'probabilities'"
            )
        binary[output.name] = _flag(output.parameters or {}, "binary_data", default)
    return ParsedRequest(inputs, list(binary) or None, parameters, request.id, binary, default)


def write_infer(
    model: str,
    version: str,
    outputs: Arrays,
    parameters: dict[str, bool | int | str],
    request: ParsedRequest,
    most_numbers: int = MOST_NUMBERS,
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where bytes follow it (else None).

    Raises:
        TooLargeError: It would hold more than ``most_numbers`` numbers as JSON.
    """
    numbers = sum(
        one.size
        for name, one in outputs.items()
        if not request.binary.get(name, request.binary_default)
    )
    if numbers > most_numbers:
        raise TooLargeError(
            f"the answer has {numbers} numbers, {most_numbers} are written as JSON: ask for fewer rows or outputs, or "
            "for binary_data_output, or raise max_numbers"
        )
    tensors: list[dict[str, Any]] = []
    blobs: list[Any] = []
    for name, array in outputs.items():
        tensor: dict[str, Any] = {
            "name": name,
            "datatype": NAMES[array.dtype],
            "shape": array.shape,
        }
        if request.binary.get(name, request.binary_default):
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            blobs.append(np.ascontiguousarray(array).data)
        else:
            tensor["data"] = array.ravel()
        tensors.append(tensor)
    message: dict[str, Any] = {
        "model_name": model,
        "model_version": version,
        "parameters": parameters,
    }
    if request.id is not None:
        message["id"] = request.id
    message["outputs"] = tensors
    # float32 as its shortest decimal form
    text = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join((text, *blobs)), len(text)) if blobs else (text, None)


def read_json(text: bytes | memoryview, kind: type[T], most_numbers: int = MOST_NUMBERS) -> T:
    """``text`` as one of the messages.

    Raises:
        InvalidInputError: It is not JSON (nested at most 1,024 deep), or not such a message.
        TooLargeError: To read it takes as long as more than ``most_numbers`` numbers; it is not
            read.
    """
    if len(text) > _SHORT:
        _check_cost(text, most_numbers)
    collects = len(text) > _SHORT and gc.isenabled()
    if collects:
        # lists of numbers form no cycles: to look for some made a million lists take 0.8 s, not
        # 0.07
        gc.disable()
    try:
        return msgspec.convert(orjson.loads(text), kind)
    except orjson.JSONDecodeError as error:
        # its frames hold the text
        raise InvalidInputError(f"the body is not JSON: {error}") from None
    except msgspec.ValidationError as error:
        raise InvalidInputError(f"the body is not a {kind.__name__}: {error}") from None
    finally:
        if collects:
            gc.enable()


def _check_cost(text: bytes | memoryview, most_numbers: int) -> None:
    """Bytes say little: 16 MiB of empty lists are 5 million objects. So what begins an object is
    counted first."""
    numbers = len(text) // _NUMBER_NBYTES
    if numbers <= most_numbers:
        codes = np.frombuffer(text, np.uint8)
        numbers = sum(
            int(np.count_nonzero(codes == sign[0])) * cost for sign, cost in _COSTS.items()
        )
    if numbers > most_numbers:
        raise too_long(numbers, most_numbers)


def too_long(numbers: int, most_numbers: int) -> TooLargeError:
    """The refusal of a body that takes too long to read."""
    return TooLargeError(
        f"to read the body takes as long as {numbers} numbers, {most_numbers} are let in: send fewer rows, or binary "
        "tensors (raw_input_contents over gRPC), or raise max_numbers"
    )


def from_raw(name: str, datatype: str, shape: list[int], raw: bytes | memoryview) -> NDArray[Any]:
    """Little-endian row-major bytes as an array: a view, but for BF16.

    Raises:
        InvalidInputError: An unknown datatype, or not as many bytes as the shape says.
    """
    dtype = np.dtype("<u2") if datatype == "BF16" else _dtype(name, datatype)
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != len(raw):
        raise InvalidInputError(
            f"input {name!r}: {len(raw)} bytes, {datatype} of shape {shape} takes {wanted}"
        )
    array = np.frombuffer(raw, dtype)
    if datatype == "BF16":  # the upper half of a float32
        array = (array.astype("<u4") << 16).view("<f4")
    elif datatype == "BOOL" and array.size and array.view(np.uint8).max() > 1:
        raise InvalidInputError(f"input {name!r}: a BOOL byte is neither 0 nor 1")
    return _reshaped(name, array, shape)


def _from_list(tensor: InputTensor) -> NDArray[Any]:
    name = tensor.name
    shape = tensor.shape
    values = tensor.data
    if type(values) is not list:
        raise InvalidInputError(f"input {name!r} has no data: send a list, or binary_data_size")
    if tensor.datatype in ("FP16", "BF16"):
        raise InvalidInputError(
            f"input {name!r}: {tensor.datatype} has no JSON form: send it as bytes, or FP32"
        )
    dtype = _dtype(name, tensor.datatype)
    try:
        if values and type(values[0]) is list:
            sizes = {len(values)}
            for axis, wanted in enumerate(shape):
                if sizes - {wanted}:  # no lists at all where an axis before is 0
                    raise InvalidInputError(
                        f"input {name!r}: axis {axis} has {sorted(sizes)} items, shape is {shape}"
                    )
                if axis < len(shape) - 1:
                    sizes = set(map(len, values))
                    values = list(chain.from_iterable(values))
        if len(values) != math.prod(shape):
            raise InvalidInputError(
                f"input {name!r} has {len(values)} numbers, shape {shape} takes {math.prod(shape)}"
            )
        if dtype.kind == "b" and not all(type(value) is bool for value in values):
            raise TypeError("only true and false are BOOL")
        packed = struct.pack(f"<{len(values)}{_LETTERS[tensor.datatype]}", *values)
    except (struct.error, OverflowError, TypeError) as error:
        raise InvalidInputError(
            f"input {name!r}: data is not a table of {tensor.datatype}: {error}"
        ) from None
    return _reshaped(name, np.frombuffer(packed, dtype), shape)


def _reshaped(name: str, array: NDArray[Any], shape: list[int]) -> NDArray[Any]:
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError):  # the product fits because another dimension is 0
        raise InvalidInputError(f"input {name!r}: no array has shape {shape}") from None


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise InvalidInputError(
            f"input {name!r}: datatype {datatype[:32]!r} is not one of {', '.join(DTYPES)}, BF16"
        )
    return dtype


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise InvalidInputError(f"{name} is {value!r:.64}: it is true or false")
    return value
