"""What a request weighs: the same rows as JSON, as JSON with a binary tensor, and as a gRPC
message, byte by byte.

The two binary forms are those of our own client. Sizes are of bodies: headers come on top, a few
hundred bytes.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from flserving.api.client.transports import GrpcCodec, RestCodec
from flserving.errors import InvalidInputError
from flserving.lab.queueing.arrivals import Ints
from flserving.models.processing import Floats

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS = 1000
MOST_FEATURES = 784
WIRE_TYPES = {0: "VARINT", 1: "I64", 2: "LEN", 5: "I32"}
_MODEL = "digits"


def json_body(rows: Floats) -> bytes:
    """The rows float32 [N, D] as most people would send them: ``tolist()`` into a request of
    JSON."""
    request = _request(rows.shape, rows.ravel().tolist())
    return json.dumps(request, separators=(",", ":")).encode()


def short_json_body(rows: Floats) -> bytes:
    """The same with the fewest digits that give every float32 back."""
    request = _request(rows.shape, rows.ravel())
    return orjson.dumps(request, option=orjson.OPT_SERIALIZE_NUMPY)


def binary_body(rows: Floats) -> bytes:
    """JSON that describes the tensor, and behind it the tensor: four bytes a number."""
    return RestCodec({}).infer(_MODEL, None, rows, {}).body or b""


def grpc_body(rows: Floats) -> bytes:
    """A ModelInferRequest with the numbers in raw_input_contents."""
    return GrpcCodec({}).infer(_MODEL, None, rows, {}).body or b""


FORMS = {
    "JSON": json_body,
    "JSON, fewest digits": short_json_body,
    "binary tensor": binary_body,
    "gRPC": grpc_body,
}


def body_sizes(rows: Floats) -> dict[str, int]:
    """Bytes of a request's body by its form, each of them really written."""
    return {form: len(write(rows)) for form, write in FORMS.items()}


def expected_sizes(num_rows: int, num_features: int) -> dict[str, int]:
    """``body_sizes`` of the first rows and features of a table of standard normal numbers, without
    writing the text.

    Exact, and quick enough for a slider: the lengths of all numbers are written once and summed.
    """
    numbers = num_rows * num_features
    shape = (num_rows, num_features)
    empty = json.dumps(_request(shape, []), separators=(",", ":"))
    frame = len(empty) + numbers - 1  # and the commas
    short, long = (int(lengths[num_rows - 1, num_features - 1]) for lengths in _summed_lengths())
    rows = np.zeros(shape, np.float32)  # in binary every number weighs the same
    return {
        "JSON": frame + long,
        "JSON, fewest digits": frame + short,
        "binary tensor": len(binary_body(rows)),
        "gRPC": len(grpc_body(rows)),
    }


def transfer(rows: int, features: int, mbit_per_s: float) -> "pd.DataFrame":
    """Bytes and milliseconds on a line of so many Mbit/s, by form: the time of the bits, without
    the way there."""
    import pandas as pd

    nbytes = pd.Series(expected_sizes(rows, features), name="bytes")
    seconds = nbytes * 8 / (mbit_per_s * 1e6)
    return pd.DataFrame({"bytes": nbytes, "ms": seconds * 1e3})


def _request(shape: tuple[int, ...], data: Any) -> dict[str, Any]:
    tensor = {
        "name": "features",
        "datatype": "FP32",
        "shape": list(shape),
        "data": data,
    }
    return {"inputs": [tensor]}


@functools.cache
def normal_rows() -> Floats:
    """The table behind ``expected_sizes``: float32 [1000, 784]."""
    rng = np.random.default_rng(5)
    return rng.standard_normal((MOST_ROWS, MOST_FEATURES), dtype=np.float32)


@functools.cache
def _summed_lengths() -> tuple[Ints, Ints]:
    """Characters of the first rows and features, summed, int64 [1000, 784]: with the fewest digits,
    and as doubles."""
    numbers = normal_rows().ravel()
    shortest = orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
    as_doubles = map(repr, numbers.tolist())  # json.dumps writes a float as repr does
    return _summed(shortest), _summed(as_doubles)


def _summed(texts: Iterable[bytes | str]) -> Ints:
    lengths = np.array([len(text) for text in texts], np.int64)
    table = lengths.reshape(MOST_ROWS, MOST_FEATURES)
    return table.cumsum(axis=0).cumsum(axis=1)


class WireField(NamedTuple):
    """A field of a message where it lies in the bytes: the key (and length) from ``start``, the
    content to ``end``."""

    path: str
    number: int
    wire_type: str
    start: int
    content: int
    end: int
    depth: int


def wire_fields(message: Any) -> list[WireField]:
    """Every field of a protobuf message in the order of its bytes; a nested message stands before
    its own fields.

    Source: protobuf.dev, "Encoding": a key is the varint ``number << 3 | wire type``.
    """
    return list(_fields(message.SerializeToString(), 0, message.DESCRIPTOR, "", 0))


def _fields(raw: bytes, base: int, kind: Any, path: str, depth: int) -> Iterator[WireField]:
    at = 0
    while at < len(raw):
        start = at
        key, at = _varint(raw, at)
        number = key >> 3
        wire_type = WIRE_TYPES.get(key & 7)
        field = kind.fields_by_number.get(number)
        if field is None or wire_type is None:
            raise InvalidInputError(
                f"byte {base + start} is the key {key}: {kind.full_name} has no such field"
            )
        content = at
        if wire_type == "LEN":
            length, content = _varint(raw, at)
            at = content + length
        elif wire_type == "VARINT":
            _, at = _varint(raw, at)
        elif wire_type == "I64":
            at += 8
        else:
            at += 4
        name = f"{path}{field.name}"
        yield WireField(name, number, wire_type, base + start, base + content, base + at, depth)
        if field.message_type is not None:
            yield from _fields(
                raw[content:at], base + content, field.message_type, f"{name}.", depth + 1
            )


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number that begins at ``at``, seven bits a byte, lowest first; and where it ends."""
    value = 0
    shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if not byte & 0x80:
            return value, at
