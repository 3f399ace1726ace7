"""The messages of gRPC: their classes, from a private descriptor pool, and how they become numpy
arrays and back.

A private pool, because a process that serves may also hold another library's copy of the same
protocol (a notebook that calls itself with tritonclient, say), and the default pool refuses a
symbol that comes twice with other fields.
"""

import functools
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from flserving.api.dataplane import Arrays
from flserving.api.rest.codec import DTYPES, NAMES, from_raw, too_long
from flserving.errors import InvalidInputError, NotSupportedError

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
EXPERIMENTS = "flserving.Experiments"
POOL = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(
    resources.files(__package__).joinpath("descriptors.binpb").read_bytes()
).file:
    POOL.AddSerializedFile(_file.SerializeToString())


def message(name: str) -> Any:
    """The class of a message, by its full name ("inference.ModelInferRequest")."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


InferRequest = message("inference.ModelInferRequest")
InferResponse = message("inference.ModelInferResponse")

_CONTENTS = {  # datatype -> the field of typed contents; FP16 and BF16 have none
    "BOOL": "bool_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "UINT64": "uint64_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
# What no caller means, and only costs time:
_MOST_OUTPUTS = 64
_MOST_DIMENSIONS = 32
_MOST_ELEMENTS = 1 << 40

_SHORT = 64 << 10  # bytes that hold too few fields to take long
_FIELD_COST = 64  # what a field takes to read, and to be counted here, in numbers
# number of a field -> what is in it: fields, or how many numbers a byte may hold (1 and a half for
# what is text)
# fp32_contents and fp64_contents have the size of their numbers
_CONTENTS_COSTS = {6: 1 / 4, 7: 1 / 8}
# the id; the inputs and their contents; raw_input_contents, which are not looked at
_INFER_COSTS: dict[int, Any] = {3: 0.05, 5: {5: _CONTENTS_COSTS}, 7: 0.0}


def check_cost(body: bytes, most_numbers: int) -> None:
    """Whether a ModelInferRequest may be read: what is not raw tensors holds up everybody.

    Raises:
        TooLargeError: To read it takes as long as more than ``most_numbers`` numbers.
        InvalidInputError: It is none.
    """
    if len(body) > _SHORT:
        try:
            _cost(memoryview(body), _INFER_COSTS, 0.0, most_numbers)
        except IndexError:
            raise InvalidInputError(
                f"{len(body)} bytes are not a ModelInferRequest message"
            ) from None


def _cost(body: memoryview, costs: Mapping[int, Any], cost: float, most: int) -> float:
    """``cost`` and that of the fields in ``body``, in numbers. Source: protobuf's encoding, its
    records of tag, length and value."""
    at = 0
    while at < len(body):
        cost += _FIELD_COST
        tag, at = _varint(body, at)
        size = {1: 8, 5: 4}.get(tag & 7, 0)
        if tag & 7 == 0:
            _, at = _varint(body, at)
        elif tag & 7 == 2:
            size, at = _varint(body, at)
            inside = costs.get(tag >> 3, 1.5)
            if isinstance(inside, float):
                cost += size * inside
            else:
                cost = _cost(body[at : at + size], inside, cost, most)
        elif not size:  # groups: no field of the protocol's
            raise IndexError
        at += size
        if cost > most:
            raise too_long(round(cost), most)
    return cost


def _varint(body: memoryview, at: int) -> tuple[int, int]:
    """The number at ``at``, and where it ends."""
    value = shift = 0
    while (byte := body[at]) >= 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise IndexError
    return value | byte << shift, at + 1


def decode(kind: Any, body: bytes) -> Any:
    """The message in ``body``. Raises InvalidInputError where the bytes are none."""
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise InvalidInputError(
            f"{len(body)} bytes are not a {kind.DESCRIPTOR.full_name} message"
        ) from error


def encode(kind: Any, fields: Mapping[str, Any]) -> bytes:
    """A message with these fields, named as in JSON; a field that this copy of the protocol lacks
    is left out."""
    filled: Message = json_format.ParseDict(fields, kind(), ignore_unknown_fields=True)
    return bytes(filled.SerializeToString())


def parameters(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A map of InferParameter as plain values."""
    plain: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        choice = value.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidInputError(
                f"parameter {name!r} has no value: fill one of its fields, or leave it out"
            )
        plain[name] = getattr(value, choice)
    return plain


def inputs(request: Any) -> Arrays:
    """The input tensors of a ModelInferRequest by name; raw ones are views of the message's bytes.

    Raises:
        InvalidInputError: A tensor's name, type, shape and data do not fit together.
    """
    raw = request.raw_input_contents
    tensors: Arrays = {}
    for place, tensor in enumerate(request.inputs):
        name = tensor.name
        shape = list(tensor.shape)
        if name in tensors:
            raise InvalidInputError(f"input {name!r} is there twice: send each once")
        _check_shape(name, shape)
        if not raw:
            tensors[name] = _from_contents(tensor, shape)
            continue
        if tensor.HasField("contents"):
            raise InvalidInputError(
                f"input {name!r} has contents beside raw_input_contents: use one form for all inputs"
            )
        if place >= len(raw):
            raise InvalidInputError(
                f"input {name!r} has no data: raw_input_contents holds {len(raw)} entries"
            )
        tensors[name] = from_raw(name, tensor.datatype, shape, raw[place])
    if len(raw) > len(tensors):
        raise InvalidInputError(
            f"raw_input_contents holds {len(raw)} entries for {len(tensors)} inputs: send one for each, in their order"
        )
    return tensors


def _check_shape(name: str, shape: list[int]) -> None:
    if len(shape) > _MOST_DIMENSIONS:
        raise InvalidInputError(
            f"input {name!r} has {len(shape)} dimensions: at most {_MOST_DIMENSIONS}"
        )
    if min(shape, default=0) < 0:
        raise InvalidInputError(f"input {name!r} has shape {shape}: no dimension may be negative")
    if math.prod(filter(None, shape)) > _MOST_ELEMENTS:
        raise InvalidInputError(
            f"input {name!r} has shape {shape}: more elements than a message can hold"
        )


def _from_contents(tensor: Any, shape: list[int]) -> NDArray[Any]:
    """An input whose numbers are in its typed contents."""
    name = tensor.name
    datatype = tensor.datatype
    count = math.prod(shape)
    field = _CONTENTS.get(datatype)
    if field is None:
        hint = (
            "send it raw" if datatype in ("FP16", "BF16") else f"send one of {', '.join(_CONTENTS)}"
        )
        raise InvalidInputError(
            f"input {name!r} has datatype {datatype[:32]!r}, which has no typed contents: {hint}"
        )
    for other, _ in tensor.contents.ListFields():
        if other.name != field:
            raise InvalidInputError(f"input {name!r} is {datatype} with {other.name}: fill {field}")
    values = getattr(tensor.contents, field)
    if len(values) != count:
        problem = f"has {len(values)} values in {field}" if values else "has no data"
        raise InvalidInputError(
            f"input {name!r} {problem}: shape {shape} needs {count}, in {field} or in raw_input_contents"
        )
    dtype = DTYPES[datatype]
    if dtype.kind not in "iu" or dtype.itemsize >= 4:  # as wide as the field itself
        return np.fromiter(values, dtype, count).reshape(shape)
    wide = np.fromiter(values, np.int64, count)
    limits = np.iinfo(dtype)
    wrong = wide[(wide < limits.min) | (wide > limits.max)]
    if wrong.size:
        raise InvalidInputError(
            f"input {name!r} holds {wrong[0]}: {datatype} is {limits.min} to {limits.max}"
        )
    return wide.astype(dtype).reshape(shape)


def requested(request: Any) -> list[str] | None:
    """Names of the outputs that a ModelInferRequest asks for; None for all of them."""
    names: list[str] = []
    for output in request.outputs:
        if output.name in names:
            raise InvalidInputError(f"output {output.name!r} is there twice: ask for each once")
        if parameters(output.parameters).get("classification"):
            raise NotSupportedError(
                "the classification extension is not offered: ask for 'probabilities'"
            )
        names.append(output.name)
        if len(names) > _MOST_OUTPUTS:
            raise InvalidInputError(
                f"{len(request.outputs)} outputs are asked for: at most {_MOST_OUTPUTS}"
            )
    return names or None


def response(
    model: str,
    version: str,
    request_id: str,
    outputs: Mapping[str, NDArray[Any]],
    values: Mapping[str, bool | int | str],
) -> bytes:
    """A ModelInferResponse, the numbers in raw_output_contents: the only place where every client
    looks for them."""
    answer = InferResponse(id=request_id) if request_id else InferResponse()
    parameters = answer.parameters
    for name, value in values.items():
        kind = type(value)
        if kind is int:
            parameters[name].int64_param = value
        elif kind is str:
            parameters[name].string_param = value
        else:
            parameters[name].bool_param = value
    answer.raw_output_contents.extend([array.tobytes() for array in outputs.values()])
    tensors = tuple([(name, array.dtype, array.shape) for name, array in outputs.items()])
    return _outline(model, version, tensors) + answer.SerializeToString()  # type: ignore[no-any-return]


@functools.lru_cache(1024)
def _outline(
    model: str, version: str, tensors: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]
) -> bytes:
    """What recurs in answers, as bytes: the wire format merges the parts of a message that follow
    each other."""
    outline = InferResponse(model_name=model, model_version=version)
    for name, dtype, shape in tensors:
        outline.outputs.add(name=name, datatype=NAMES[dtype], shape=shape)
    return outline.SerializeToString()  # type: ignore[no-any-return]
